"""The chain of boosters: the factors of every round in fp32, and the weights computed from them.

Round i of XGBLoRA (arXiv 2410.19694) trains the factors Aᵢ and Bᵢ of a layer. A merge then computes the
weight W = round(W₀ + Σ scaling · Bᵢ Aᵢ) from the pretrained W₀ and the whole chain. Adding the boosters one
after the other to a weight in half precision would lose them. An ensemble does not change W: its boosters
stay beside the weight, as one adapter whose rank grows with every round.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distributed.sharding import copy_into
from utils import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Booster:
    """One round of one layer, which adds scaling · B A to the weight.

    Attributes:
        A: [r, in], fp32 on the host.
        B: [out, r], fp32 on the host.
        scaling: alpha / r, times the step length of the round.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def scaled_B(self) -> Tensor:
        """Return scaling · B, [out, r]."""
        return self.B * self.scaling

    @property
    def delta(self) -> Tensor:
        """Return scaling · B A, [out, in]."""
        return self.scaled_B @ self.A


Round = dict[str, Booster]  # {module name: its booster}, for the layers that the round adapts


class BoosterChain:
    """The boosters of all rounds that have ended, merged into the weights or (ensemble) kept beside them.

    Args:
        layers: {module name: `LoRALinear`}; the chain writes their `weight`, or their `ensemble_factors`.
        ensemble: keep the boosters beside the weights, so that nothing is rounded.

    Attributes:
        boosters: one `Round` for each round that has been merged. A rejected round is not among them.
        lengths: their step lengths. The scalings of the boosters include them.
        pretrained: {module name: W₀}, on the host, in the dtype and layout of the weight; empty in an
            ensemble.
        delta_sum: {module name: Σ scaling · Bᵢ Aᵢ}, fp32 on the host, in the layout of the weight; empty in
            an ensemble.
    """

    def __init__(self, layers: Mapping[str, nn.Module], ensemble: bool):
        self.layers = layers
        self.ensemble = ensemble
        self.boosters: list[Round] = []
        self.lengths: list[float] = []
        self.pretrained: dict[str, Tensor] = {}
        self.delta_sum: dict[str, Tensor] = {}
        if ensemble:
            return
        for name, layer in layers.items():
            self.pretrained[name] = layer.weight.detach().to("cpu", copy=True)
            self.delta_sum[name] = torch.zeros(layer.weight.shape, dtype=torch.float32)
        tensors = [*self.pretrained.values(), *self.delta_sum.values()]
        size = sum(tensor.nbytes for tensor in tensors) / 1e6
        logger.info("XGBLoRA: W0 of %d layers, the sum of the chain: %.0f MB on the host", len(layers), size)

    @torch.no_grad()
    def merge(self, boosters: Round, length: float) -> None:
        """Put the boosters of one round at the end of the chain, and into the weights.

        In half precision the log says how much of these boosters the rounding of the weights loses.
        """
        self.append([boosters], [length])
        if self.ensemble:
            return
        squared_error = squared_norm = 0.0
        for name, booster in boosters.items():
            fp32_weight, rounded_weight = self.write_merged_weight(name)
            if rounded_weight is not fp32_weight:
                squared_error += float((rounded_weight.float() - fp32_weight).square().sum())
                squared_norm += float(booster.delta.square().sum())
        if squared_norm:
            loss = 100 * math.sqrt(squared_error / squared_norm)
            advice = "; --xgblora_ensemble would lose nothing" if loss > 10 else ""
            logger.info("XGBLoRA: rounding the merged weights loses %.1f%% of this booster%s", loss, advice)

    def append(self, rounds: Sequence[Round], lengths: Sequence[float]) -> None:
        """Put rounds at the end of the chain and into its fp32 sum, or into the adapter of the ensemble.

        The merged weights stay as they are: `write_merged_weight` brings them up to date.
        """
        self.boosters += rounds
        self.lengths += lengths
        for name, layer in self.layers.items():
            new_boosters = [boosters[name] for boosters in rounds if name in boosters]
            if not self.ensemble:
                for booster in new_boosters:
                    self.delta_sum[name].add_(layer.to_weight_layout(booster.delta))
            elif new_boosters:
                A, B = (factor.to(layer.lora_B.device) for factor in concat_factors(rounds, name, fold=True))
                if layer.ensemble_factors is not None:
                    A = torch.cat([layer.ensemble_factors[0], A])
                    B = torch.cat([layer.ensemble_factors[1], B], dim=1)
                layer.ensemble_factors = (A, B)

    def write_merged_weight(self, name: str) -> tuple[Tensor, Tensor]:
        """Round W₀ + Σ scaling · Bᵢ Aᵢ of a layer into its weight.

        Returns:
            the weight before and after the rounding, on the host; the same tensor where the model is fp32.
        """
        weight = self.layers[name].weight
        fp32_weight = self.merged_fp32(name)
        rounded_weight = fp32_weight.to(weight.dtype)
        copy_into(weight, rounded_weight)
        return fp32_weight, rounded_weight

    def write_merged_weights(self) -> None:
        """Round the sums of the chain into the weights of all layers; an ensemble has nothing to write."""
        if not self.ensemble:
            for name in self.layers:
                self.write_merged_weight(name)

    def merged_fp32(self, name: str) -> Tensor:
        """Return W₀ + Σ scaling · Bᵢ Aᵢ of a layer: fp32, on the host, in the layout of the weight."""
        if not self.ensemble:
            return self.pretrained[name].float() + self.delta_sum[name]
        layer = self.layers[name]
        weight = layer.weight.float()
        if layer.ensemble_factors is not None:
            A, B = layer.ensemble_factors
            weight = weight + layer.to_weight_layout(B @ A)
        return weight.cpu()

    @torch.no_grad()
    def replace(self, rounds: Sequence[Round], lengths: Sequence[float]) -> None:
        """Make these rounds the whole chain, and write the weights.

        The fp32 sum is computed anew in the order of the rounds, so that its bits are those of as many
        merges.
        """
        self._clear()
        self.append(rounds, lengths)
        self.write_merged_weights()

    def truncate(self, k: int) -> None:
        """Keep the first k boosters, and write the weights."""
        self.replace(self.boosters[:k], self.lengths[:k])

    def staged(self, every: int = 1) -> Iterator[int]:
        """Yield 0, every, 2 · every, … and the chain's length; the model then has only so many boosters.

        The generator has to be run to its end, which leaves the whole chain.
        """
        rounds = list(zip(self.boosters, self.lengths, strict=True))
        self.truncate(0)
        yield 0
        for k, (boosters, length) in enumerate(rounds, 1):
            with torch.no_grad():
                self.append([boosters], [length])
                self.write_merged_weights()
            if k % every == 0 or k == len(rounds):
                yield k

    @torch.no_grad()
    def restore_pretrained(self) -> None:
        """Write W₀ into the weights, bit for bit."""
        for name, weight in self.pretrained.items():
            self.layers[name].weight.copy_(weight)

    def _clear(self) -> None:
        self.boosters, self.lengths = [], []
        for delta_sum in self.delta_sum.values():
            delta_sum.zero_()
        for layer in self.layers.values():
            layer.ensemble_factors = None


def check_mergeable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UsageError where boosters can't be merged into one of these layers of a pretrained model."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in names:
        weight = model.get_submodule(name).weight
        if weight.is_meta or not weight.is_floating_point():
            raise UsageError("quantised or offloaded weights take no boosters: --xgblora_ensemble keeps them")
        if uses[id(weight)] > 1:  # a tied head
            problem = "shares its weight with a layer that a merge would change too"
            raise UsageError(f"{name} {problem}: --xgblora_ensemble keeps it")


def concat_factors(rounds: Sequence[Round], name: str, fold: bool) -> tuple[Tensor, Tensor]:
    """Concatenate the factors of one layer in all rounds, along the rank.

    Args:
        rounds: at least one of them adapts the layer.
        name: of the layer.
        fold: multiply each B by its scaling.

    Returns:
        A [R, in] and B [out, R], fp32 on the host, where R is the sum of the ranks.
    """
    boosters = [boosters[name] for boosters in rounds if name in boosters]
    A = torch.cat([booster.A for booster in boosters])
    B = torch.cat([booster.scaled_B if fold else booster.B for booster in boosters], dim=1)
    return A, B


def compress(rounds: Sequence[Round], rank: int) -> tuple[Round, float]:
    """Compute the nearest LoRA of a rank to the sum of all rounds, in the Frobenius norm (fp64).

    With B = Q_b R_b and Aᵀ = Q_a R_a the singular values of B A are those of the small matrix R_b R_aᵀ, so
    that B A itself, which is as large as the weight, is never computed.

    Returns:
        the LoRA, with the same rank in every layer and scaling 1; and ‖sum − LoRA‖ / ‖sum‖ over all layers.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    squared_error = squared_norm = 0.0
    for name in dict.fromkeys(name for boosters in rounds for name in boosters):
        A, B = concat_factors(rounds, name, fold=True)
        q_b, r_b = torch.linalg.qr(B.double())
        q_a, r_a = torch.linalg.qr(A.double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        root = s[:rank].sqrt()
        u = u[:, : len(root)] * root
        vh = vh[: len(root)] * root[:, None]
        factors[name] = ((vh @ q_a.T).float(), (q_b @ u).float())
        squared_error += float(s[rank:].square().sum())
        squared_norm += float(s.square().sum())
    largest_rank = max(len(A) for A, _ in factors.values())
    nearest_lora = {}
    for name, (A, B) in factors.items():  # a layer of smaller rank gets rows and columns of zeros
        num_missing = largest_rank - len(A)
        A = nn.functional.pad(A, (0, 0, 0, num_missing))
        B = nn.functional.pad(B, (0, num_missing))
        nearest_lora[name] = Booster(A, B, 1.0)
    return nearest_lora, math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
