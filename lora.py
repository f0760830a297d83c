"""Low-rank adapters (LoRA, arXiv 2106.09685), and boosting with them (XGBLoRA, arXiv 2410.19694).

A `LoRALinear` computes W x + scaling · B A x. `LoRA` puts such layers into a model. Under XGBLoRA a round
trains A and B of rank 1, then `merge_and_reinit` gives them to the chain of boosters (boosters/chain.py),
which adds scaling · B A to the weights, and the next round starts with a fresh A and B = 0.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from boosters import peft_files
from boosters.chain import Booster, BoosterChain, Round, check_mergeable, compress
from boosters.peft_files import SavedAdapter
from boosters.targets import TargetLayers, first_layer, layer_number, select_targets
from utils import UsageError, execution_device
from zo.perturbed_weights import CopiesUnsupported

logger = logging.getLogger(__name__)


class LoRALinear(nn.Module):
    """y = W x + b + scaling · B (A x), in the place of an `nn.Linear` (quantised too) or of GPT-2's `Conv1D`.

    Args:
        base_layer: the layer to adapt.
        r: rank; rank 0 adapts nothing.
        alpha: scaling = alpha / r.

    Attributes:
        weight, bias: the parameters of the base layer, under the names that they had.
        fan_in_fan_out: whether `weight` is [in, out], as in `Conv1D`, and not [out, in].
        lora_A: [r, in], fp32 whatever the dtype of the weight; activations are cast.
        lora_B: [out, r], fp32.
        ensemble_factors: (A [R, in], B [out, R] with the scalings in it): merged boosters of an ensemble,
            which are added to the output; None where there are none.
        deltas: (of A [n, r, in] or None, of B [n, out, r]): the batch holds n copies of the same rows, one
            copy behind the other, and copy i sees A and B with perturbation i. None is off.
    """

    def __init__(self, base_layer: nn.Module, r: int, alpha: float):
        super().__init__()
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.weight = base_layer.weight
        self.bias = base_layer.bias
        is_float = self.weight.is_floating_point()
        # The layer itself is called where its weight is quantised, or where a hook of accelerate brings it.
        self.base_layer = None if is_float and not hasattr(base_layer, "_hf_hook") else base_layer
        if not is_float:
            self.out_features, self.in_features = base_layer.out_features, base_layer.in_features
        elif self.fan_in_fan_out:
            self.in_features, self.out_features = self.weight.shape
        else:
            self.out_features, self.in_features = self.weight.shape
        device = execution_device(base_layer)
        self.lora_A = nn.Parameter(torch.zeros(0, device=device))
        self.lora_B = nn.Parameter(torch.zeros(0, device=device))
        self.resize(r, alpha)
        self.ensemble_factors: tuple[Tensor, Tensor] | None = None
        self.deltas: tuple[Tensor | None, Tensor] | None = None

    def resize(self, r: int, alpha: float) -> None:
        """Set A = 0 and B = 0 of another rank, in the same parameters."""
        self.r = r
        self.scaling = alpha / r if r else 0.0
        self.lora_A.data = self.lora_A.new_zeros(r, self.in_features)
        self.lora_B.data = self.lora_B.new_zeros(self.out_features, r)

    def forward(self, x: Tensor) -> Tensor:
        if self.base_layer is not None:
            y = self.base_layer(x)
        else:
            y = nn.functional.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        if not self.r and self.ensemble_factors is None:
            return y
        dtype = y.dtype
        x = x.to(y.device, torch.float32)
        if self.ensemble_factors is not None:
            A, B = self.ensemble_factors
            y = y + nn.functional.linear(nn.functional.linear(x, A), B)
        if self.r:
            y = y + self._adapter_output(x)
        return y.to(dtype)

    def _adapter_output(self, x: Tensor) -> Tensor:
        """Return scaling · B (A x) in fp32; with `deltas`, each copy of the rows with its own A and B."""
        if self.deltas is None:
            return nn.functional.linear(nn.functional.linear(x, self.lora_A) * self.scaling, self.lora_B)
        delta_A, delta_B = self.deltas
        A = self.lora_A if delta_A is None else self.lora_A + delta_A
        B = self.lora_B + delta_B
        projected = x.reshape(len(B), -1, x.shape[-1]) @ A.mT * self.scaling  # [copies, tokens, r]
        return (projected @ B.mT).view(*x.shape[:-1], self.out_features)

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return a delta [out, in] in the layout of `weight`."""
        return delta.T if self.fan_in_fan_out else delta


class AdapterLayers:
    """`LoRALinear` layers in the place of a model's own layers; everything else in the model is frozen.

    Args:
        model: a causal language model of the transformers library; it is changed in place.
        targets: the layers to adapt.
        freeze_a: train B only.

    Attributes:
        modules: {module name: `LoRALinear`}, in the model's order. `lora_modules` are its values.
    """

    def __init__(self, model: nn.Module, targets: TargetLayers, freeze_a: bool):
        self.model = model
        self.freeze_a = freeze_a
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._replaced_layers = {name: model.get_submodule(name) for name in targets.names}
        model.requires_grad_(False)
        self.modules: dict[str, LoRALinear] = {}
        for name, layer in self._replaced_layers.items():
            self.modules[name] = LoRALinear(layer, r=0, alpha=0)
            model.set_submodule(name, self.modules[name])
        self.lora_modules = list(self.modules.values())

    def parameters(self) -> list[nn.Parameter]:
        """Return every A and B that some round may train, in the model's order.

        Those that the current round trains require a gradient.
        """
        if self.freeze_a:
            return [module.lora_B for module in self.lora_modules]
        return [p for module in self.lora_modules for p in (module.lora_A, module.lora_B)]

    def require_grad(self) -> None:
        """Let B require a gradient, and A unless it is frozen, in the layers that this round adapts."""
        for module in self.lora_modules:
            module.lora_A.requires_grad_(module.r > 0 and not self.freeze_a)
            module.lora_B.requires_grad_(module.r > 0)

    def set_perturbations(self, deltas: Sequence[Tensor] | None) -> None:
        """Set `deltas` of all layers, so that one forward serves several perturbations.

        Args:
            deltas: [n, …] perturbations of each tensor that requires a gradient, in the model's order; None:
                off.

        Raises:
            CopiesUnsupported: an expert is adapted; the tokens that it gets mix the copies.
        """
        if deltas is not None and any(".experts." in f".{name}" for name in self.modules):
            raise CopiesUnsupported("an expert is adapted")
        remaining = iter(deltas or ())
        for module in self.lora_modules:
            module.deltas = None
            if deltas is not None and module.r:
                device = module.lora_B.device
                delta_A = next(remaining).to(device) if module.lora_A.requires_grad else None
                module.deltas = (delta_A, next(remaining).to(device))

    @property
    def current(self) -> Round:
        """The factors of this round as they stand, copied to the host.

        All of them lie in one piece of memory: a long chain of small tensors would litter the heap.
        """
        adapted_layers = {name: module for name, module in self.modules.items() if module.r}
        params = [p.detach() for module in adapted_layers.values() for p in (module.lora_A, module.lora_B)]
        flat = torch.cat([p.flatten().cpu() for p in params])
        pieces = flat.split([p.numel() for p in params])
        factors = iter([piece.view(p.shape) for piece, p in zip(pieces, params, strict=True)])
        return {name: Booster(next(factors), next(factors), m.scaling) for name, m in adapted_layers.items()}

    def set_current(self, boosters: Round) -> None:
        """Write boosters, whose ranks are those of this round, into the factors that are trained."""
        for name, booster in boosters.items():
            module = self.modules[name]
            module.lora_A.data.copy_(booster.A)
            module.lora_B.data.copy_(booster.B)
            module.scaling = booster.scaling

    def fits_current(self, boosters: Round) -> bool:
        """Return whether boosters have the layers and ranks of this round."""
        ranks = {name: module.r for name, module in self.modules.items() if module.r}
        return {name: len(booster.A) for name, booster in boosters.items()} == ranks

    def is_trained(self) -> bool:
        """Return whether the current booster changes the model, that is B ≠ 0 in some layer."""
        return any(bool(module.lora_B.any()) for module in self.lora_modules)

    @contextlib.contextmanager
    def scale_current(self, length: float) -> Iterator[None]:
        """Inside the context the model has the current booster at `length` times its size."""
        scalings = [module.scaling for module in self.lora_modules]
        try:
            for module in self.lora_modules:
                module.scaling *= length
            yield
        finally:
            for module, scaling in zip(self.lora_modules, scalings, strict=True):
                module.scaling = scaling

    @property
    def first_adapted_layer(self) -> tuple[nn.ModuleList, int] | None:
        """The decoder layers of the model, and the number of the lowest one that this round adapts.

        The layers below compute the same for every perturbation. None where the adapted layers don't stand in
        one numbered list.
        """
        lowest_layer = first_layer(name for name, module in self.modules.items() if module.r)
        if lowest_layer is None:
            return None
        list_name, number = lowest_layer
        return self.model.get_submodule(list_name), number

    def move_with_model(self, device: torch.device) -> None:
        """Move the factors of an ensemble to a device.

        The replaced layers are forgotten, so that `remove` can't follow.
        """
        self._replaced_layers.clear()
        for module in self.lora_modules:
            if module.ensemble_factors is not None:
                module.ensemble_factors = tuple(factor.to(device) for factor in module.ensemble_factors)

    def remove(self) -> None:
        """Put the replaced layers back into the model; what required a gradient before requires it again."""
        for name, layer in self._replaced_layers.items():
            self.model.set_submodule(name, layer)
        for name, p in self.model.named_parameters():
            if not p.is_meta:  # accelerate makes offloaded ones anew at each call, and may refuse the change
                p.requires_grad_(self._required_grad[name])


class LoRA(AdapterLayers):
    """Adapters of rank r on the target layers of a model, and under XGBLoRA the rounds of boosting with them.

    Args:
        model: a causal language model of the transformers library; it is changed in place.
        r: rank. With `xgblora` it is 1, unless `ranks` is given.
        alpha: the scaling of an adapter is alpha / r.
        float16: accepted for compatibility; adapters are fp32 whatever the dtype of the model.
        xgblora: merge adapters into the weights round by round.
        seed: the A of a round is a function of (seed, round, module name). B starts at 0.
        targets: names of layers, or last parts of names; see `boosters.targets.select_targets`.
        freeze_a: train B only; A stays what was drawn for the round.
        ranks: of round 0, 1, …; the last one is that of all further rounds.
        layers: "all", "top:N" or "random:N"; see `select_targets`.
        ensemble: keep the boosters beside the weights, fp32, as one adapter of growing rank; nothing is
            rounded.

    Attributes:
        modules: {module name: `LoRALinear`}, in the model's order. `lora_modules` are its values.
        chain: the merged boosters; None outside XGBLoRA.
        round: how many rounds have ended, rejected ones too.

    Raises:
        ValueError: a rank other than 1 with `xgblora`.
        UsageError: no layer matches, or the weights can't take boosters.
    """

    def __init__(
        self, model, r, alpha, float16=False, xgblora=False, seed=0, targets=None, freeze_a=False, ranks=None,
        layers="all", ensemble=False,
    ):  # fmt: skip
        if xgblora and r != 1 and not ranks:
            raise ValueError(f"XGBLoRA boosts with rank 1, not {r}")
        self.alpha = alpha
        self.xgblora = xgblora
        self.seed = seed
        self.ranks = list(ranks or [r])
        self.targets = select_targets(model, targets, layers)
        if xgblora and not ensemble:
            check_mergeable(model, self.targets.names)
        super().__init__(model, self.targets, freeze_a)
        self.chain = BoosterChain(self.modules, ensemble) if xgblora else None
        self.round = 0
        self.start_round()

    @property
    def boosters(self) -> list[Round]:
        """The merged rounds; the current one is not among them."""
        return self.chain.boosters if self.chain else []

    @property
    def lengths(self) -> list[float]:
        """The step length of each merged round, which the scalings of its boosters include."""
        return self.chain.lengths if self.chain else []

    # ---- rounds ----

    @torch.no_grad()
    def start_round(self) -> None:
        """Set layers and rank of the round, draw A, set B = 0.

        A is Kaiming-uniform(√5), that is U(−1/√in, 1/√in).
        """
        rank = self.ranks[min(self.round, len(self.ranks) - 1)]
        numbers = self.targets.random_layers(self._generator("layers"))
        for name, module in self.modules.items():
            module.resize(rank if numbers is None or layer_number(name) in numbers else 0, self.alpha)
            if module.r:
                A = torch.empty(module.lora_A.shape)
                nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=self._generator(name))
                module.lora_A.copy_(A)
        self.require_grad()

    def _generator(self, name: str) -> torch.Generator:
        """Return a generator whose seed is a function of (seed, round, name)."""
        digest = hashlib.blake2b(f"{self.seed},{self.round},{name}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    @torch.no_grad()
    def merge_and_reinit(self, length: float = 1.0) -> None:
        """End a round: give the current booster to the chain, which merges it; draw a fresh A and set B = 0.

        Outside XGBLoRA a warning is logged, and nothing happens.

        Args:
            length: step length of the current booster, a factor of its scaling; 0 rejects the booster.
        """
        if not self.chain:
            logger.warning("merge_and_reinit is only for XGBLoRA; nothing was merged")
            return
        boosters = {name: Booster(b.A, b.B, b.scaling * length) for name, b in self.current.items()}
        self.round += 1
        if length:
            self.chain.merge(boosters, length)
        self.start_round()

    # ---- the model without adapters ----

    @torch.no_grad()
    def plain_state_dict(self) -> dict[str, Tensor]:
        """Return a state dict without adapters: all boosters are in the weights, rounded once."""
        prefixes = tuple(f"{name}.{part}" for name in self.modules for part in ("lora_", "base_layer."))
        state = {key: v for key, v in self.model.state_dict().items() if not key.startswith(prefixes)}
        for name, module in self.modules.items():
            delta = module.to_weight_layout((module.lora_B * module.scaling) @ module.lora_A)
            merged = self.chain.merged_fp32(name).to(delta.device) if self.chain else module.weight.float()
            state[f"{name}.weight"] = (merged + delta).to(module.weight.dtype)
        return state

    def remove(self) -> None:
        """Put the pretrained model back, bit for bit, and what of it required a gradient."""
        if self.chain:
            self.chain.restore_pretrained()
        super().remove()

    # ---- files, see boosters/peft_files.py ----

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a PEFT adapter; under XGBLoRA one LoRA of all boosters, and the chain beside it."""
        adapter = SavedAdapter([*self.boosters, self.current], self.lengths, self.round)
        self._save(directory, adapter, with_chain=self.xgblora)

    def export(self, directory: str | Path, rank: int) -> float:
        """Write the LoRA of a rank that is nearest to the chain with the current booster.

        Returns:
            what the written LoRA lacks, relative to the whole (Frobenius norm).
        """
        nearest_lora, error = compress([*self.boosters, self.current], rank)
        self._save(directory, SavedAdapter([nearest_lora]), with_chain=False)
        return error

    def _save(self, directory: str | Path, adapter: SavedAdapter, with_chain: bool) -> None:
        base_model = self.model.config.name_or_path
        peft_files.save_adapter(directory, adapter, self.targets, base_model, with_chain)

    def load(self, directory: str | Path, boosters: int | None = None, keep_current: bool = True) -> None:
        """Take the state that `save_pretrained` wrote, bit for bit.

        Under XGBLoRA an adapter made by PEFT is accepted too, and becomes the first booster.

        Args:
            directory: of the adapter.
            boosters: take only so many of a chain, all of them merged.
            keep_current: let the last booster of the directory be the current one; else merge it too.

        Raises:
            UsageError: the adapter does not fit this model or this run.
        """
        shapes = {name: (module.in_features, module.out_features) for name, module in self.modules.items()}
        adapter = peft_files.load_adapter(directory, shapes, self.xgblora)
        if not self.chain and boosters is not None:
            raise UsageError(f"--boosters {boosters}: {directory} has no chain of boosters")
        self.round = adapter.round
        self.start_round()
        same_shapes = self.fits_current(adapter.rounds[-1])
        if not self.chain and not same_shapes:
            rank = len(next(iter(adapter.rounds[-1].values())).A)
            raise UsageError(f"{directory}: an adapter of rank {rank}, but this run has rank {self.ranks[0]}")
        if self.chain and not (keep_current and same_shapes and boosters is None):
            adapter = adapter.with_last_merged()
            self.round = adapter.round
            self.start_round()
        *merged_rounds, current_round = adapter.rounds
        if boosters is not None and boosters > len(merged_rounds):
            raise UsageError(
                f"--boosters {boosters}: {directory} has a chain of {len(merged_rounds)} boosters"
            )
        if self.chain:
            self.chain.replace(merged_rounds[:boosters], adapter.lengths[:boosters])
        self.set_current(current_round)
