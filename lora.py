"""Low-rank adapters (LoRA, arXiv 2106.09685) and the chain of boosters that they become (XGBLoRA, arXiv 2410.19694).

A `LoRALinear` computes W x + scaling · B A x. Under XGBLoRA a round trains rank-1 (A, B), then `merge_and_reinit` adds
scaling · B A to the weight and starts the next round with a fresh A and B = 0. The chain of boosters in fp32 is the
truth and the merged weight its cache: every merge computes W = round(W₀ + Σ scaling · Bᵢ Aᵢ) from the pretrained W₀,
because adding boosters one by one in half precision would lose them. An ensemble keeps the weights as they are and the
boosters beside them, as one adapter that grows.
"""

import contextlib
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from boosters import chain, peft_files
from boosters.chain import Booster, Round
from boosters.peft_files import SavedAdapter
from boosters.targets import DEFAULT_TARGETS, TARGETS_BY_MODEL_TYPE, layer_number, names_ending_in, parse_layer_choice
from distributed.sharding import copy_into
from utils import UsageError, execution_device
from zo.perturbed_weights import CopiesUnsupported

logger = logging.getLogger(__name__)


class LoRALinear(nn.Module):
    """y = W x + b + scaling · B (A x), around an `nn.Linear`, a quantised one too, or GPT-2's `Conv1D`
    (`fan_in_fan_out`: W is [in, out]).

    `weight` and `bias` are the base layer's own parameters under their own names. `lora_A` [r, in] and `lora_B`
    [out, r] are fp32 whatever the base's dtype; activations are cast. scaling = alpha / r. Rank 0 adapts nothing.

    `chain` = (A [k, in], B [out, k] with the scalings in it): an ensemble's boosters, added to the output.
    `deltas` = (of A [n, r, in] or None, of B [n, out, r]): the batch holds n copies one behind the other, and copy i
    sees A and B with perturbation i. None is off.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float):
        super().__init__()
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.weight, self.bias = base.weight, base.bias
        plain = self.weight.is_floating_point() and not hasattr(base, "_hf_hook")
        self.base = None if plain else base  # quantised weights know how to multiply, and hooks bring offloaded ones
        if self.weight.is_floating_point():
            self.out_features, self.in_features = self.weight.T.shape if self.fan_in_fan_out else self.weight.shape
        else:
            self.out_features, self.in_features = base.out_features, base.in_features
        device = execution_device(base)
        self.lora_A, self.lora_B = (nn.Parameter(torch.zeros(0, device=device)) for _ in range(2))
        self.resize(r, alpha)
        self.chain: tuple[Tensor, Tensor] | None = None
        self.deltas: tuple[Tensor | None, Tensor] | None = None

    def resize(self, r: int, alpha: float) -> None:
        """A = 0 and B = 0 of another rank, in the same parameters."""
        self.r, self.scaling = r, alpha / r if r else 0.0
        self.lora_A.data = self.lora_A.new_zeros(r, self.in_features)
        self.lora_B.data = self.lora_B.new_zeros(self.out_features, r)

    def forward(self, x: Tensor) -> Tensor:
        if self.base is not None:
            y = self.base(x)
        else:
            y = nn.functional.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        if not self.r and self.chain is None:
            return y
        x, dtype = x.to(y.device, torch.float32), y.dtype
        if self.chain is not None:
            y = y + nn.functional.linear(nn.functional.linear(x, self.chain[0]), self.chain[1])
        A, B = self.lora_A, self.lora_B
        if self.r and self.deltas is None:
            low = nn.functional.linear(x, A) * self.scaling  # [..., r]
            y = y + nn.functional.linear(low, B)
        elif self.r:
            A, B = (p if delta is None else p + delta for p, delta in zip((A, B), self.deltas, strict=True))
            low = x.reshape(len(B), -1, x.shape[-1]) @ A.mT * self.scaling  # [n, tokens, r]
            y = y + (low @ B.mT).view(y.shape)
        return y.to(dtype)

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """A delta [out, in] as the weight lies."""
        return delta.T if self.fan_in_fan_out else delta


class LoRA:
    """Rank-r adapters on the target layers of `model`, in place; everything else is frozen.

    Args:
        r, alpha: rank and alpha. With `xgblora`, r is 1: another rank raises ValueError, unless `ranks` is given.
        float16: accepted for compatibility; the adapters are fp32 whatever the base.
        seed: A of a round is a function of (seed, round, module name), B starts at 0.
        targets: names of layers or last parts of them; default q_proj and v_proj, else PEFT's for the model type.
        freeze_a: only B is trained, A stays the draw of its round.
        ranks: of round 0, 1, …; the last one is that of all rounds to come.
        layers: "all", "top:N" (the N upper decoder layers) or "random:N" (drawn from (seed, round)); N may be "half".
        ensemble: boosters stay beside the weights, fp32, as one adapter of growing rank; nothing is rounded.

    `lora_modules`: the layers; `boosters`: the merged rounds, {module name: Booster} each; `lengths`: their step
    lengths, which the scalings include; `round` counts rejected ones too. Raises UsageError where no layer matches,
    naming the Linear ones.
    """

    def __init__(
        self, model, r, alpha, float16=False, xgblora=False, seed=0, targets=None, freeze_a=False, ranks=None,
        layers="all", ensemble=False,
    ):  # fmt: skip
        if xgblora and r != 1 and not ranks:
            raise ValueError(f"XGBLoRA boosts with rank 1, not {r}")
        self.model, self.xgblora, self.seed, self.freeze_a = model, xgblora, seed, freeze_a
        self.alpha, self.ranks, self.ensemble = alpha, list(ranks or [r]), ensemble
        linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        fused = TARGETS_BY_MODEL_TYPE.get(model.config.model_type, ())
        found = names_ending_in(linear, targets or DEFAULT_TARGETS) or names_ending_in(linear, targets or fused)
        if not found:
            exist = sorted({name.rsplit(".", 1)[-1] for name in linear})
            wanted = f" called {', '.join(targets)}" if targets else " to adapt"
            raise UsageError(f"no layer{wanted} in this model; its Linear layers are {', '.join(exist)}")
        kind, n = parse_layer_choice(layers)
        numbers = sorted({layer_number(name) for name in found} - {None})
        n = n or (len(numbers) + 1) // 2
        if kind != "all" and n > len(numbers):
            raise UsageError(f"layers {layers}: this model has {len(numbers)} of them")
        if kind != "all" and (odd := [name for name in found if layer_number(name) is None]):
            raise UsageError(f"layers {layers}: {', '.join(odd)} stands in none of the numbered layers")
        if kind == "top":
            found = [name for name in found if layer_number(name) in numbers[-n:]]
        self.drawn = (numbers, n) if kind == "random" else None
        kinds = {name.rsplit(".", 1)[-1] for name in found}
        alike = {name for name in linear if name.rsplit(".", 1)[-1] in kinds}
        self.targets = tuple(sorted(kinds) if alike == set(found) else found)
        self.trained_before = {name: p.requires_grad for name, p in model.named_parameters()}
        self.replaced = {name: linear[name] for name in found}
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        model.requires_grad_(False)
        self.modules: dict[str, LoRALinear] = {}
        for name in found:
            self.modules[name] = LoRALinear(linear[name], 0, alpha)
            model.set_submodule(name, self.modules[name])
        self.lora_modules = list(self.modules.values())
        self.boosters: list[Round] = []
        self.lengths: list[float] = []
        self.round = 0
        self.base: dict[str, Tensor] = {}
        self.sum: dict[str, Tensor] = {}
        if xgblora and not ensemble:  # W₀ and the fp32 sum of the chain, both on the host
            for name, module in self.modules.items():
                if module.weight.is_meta or not module.weight.is_floating_point():
                    raise UsageError("quantised or offloaded weights take no boosters: --xgblora_ensemble keeps them")
                if uses[id(module.weight)] > 1:  # a tied head
                    raise UsageError(f"{name} shares its weight with a layer that a merge would change too: "
                                     "--xgblora_ensemble keeps it")  # fmt: skip
                self.base[name] = module.weight.detach().to("cpu", copy=True)
                self.sum[name] = torch.zeros(module.weight.shape, dtype=torch.float32)
            size = sum(w.nbytes for tensors in (self.base, self.sum) for w in tensors.values())
            logger.info("XGBLoRA: W0 of %d layers, the sum of the chain: %.0f MB on the host", len(found), size / 1e6)
        self.start_round()

    def move_with_model(self, device) -> None:
        """Bring an ensemble's factors to a device; the replaced layers go, so that nothing can be put back."""
        self.replaced.clear()
        for module in self.lora_modules:
            module.chain = module.chain and tuple(part.to(device) for part in module.chain)

    # ---- the live booster ----

    @torch.no_grad()
    def start_round(self) -> None:
        """A ~ Kaiming-uniform(√5), that is U(−1/√in, 1/√in), from (seed, round, name); B = 0; layers and rank of the
        round."""
        rank = self.ranks[min(self.round, len(self.ranks) - 1)]
        active = None
        if self.drawn:
            numbers, n = self.drawn
            order = torch.randperm(len(numbers), generator=self._generator("layers")).tolist()
            active = {numbers[i] for i in order[:n]}
        for name, module in self.modules.items():
            module.resize(rank if active is None or layer_number(name) in active else 0, self.alpha)
            if module.r:
                A = torch.empty(module.lora_A.shape)
                module.lora_A.copy_(nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=self._generator(name)))
        self.require_grad()

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed},{self.round},{name}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def require_grad(self, hold_a: bool = False) -> None:
        """Mark what this round trains: B, and A unless it is held or frozen, of the layers that it adapts."""
        for module in self.lora_modules:
            module.lora_A.requires_grad_(module.r > 0 and not hold_a and not self.freeze_a)
            module.lora_B.requires_grad_(module.r > 0)

    def parameters(self) -> list[nn.Parameter]:
        """Every A and B that some round may train, in the model's order; those of this round require a gradient."""
        return [p for m in self.lora_modules for p in ((m.lora_B,) if self.freeze_a else (m.lora_A, m.lora_B))]

    def set_perturbations(self, deltas: list[Tensor] | None) -> None:
        """Set `deltas` of all layers from one [n, …] perturbation per trained tensor, in the model's order.

        Raises CopiesUnsupported where an expert is adapted: the tokens that it is given mix the copies.
        """
        if deltas is not None and any(".experts." in f".{name}" for name in self.modules):
            raise CopiesUnsupported("an expert is adapted")
        left = iter(deltas or ())
        for module in self.lora_modules:
            module.deltas = None
            if deltas is not None and module.r:
                device = module.lora_B.device
                of_a = next(left).to(device) if module.lora_A.requires_grad else None
                module.deltas = (of_a, next(left).to(device))

    @property
    def current(self) -> Round:
        """The factors of this round as they stand, copied into one piece of memory: a long chain of small ones would
        litter the heap."""
        active = {name: module for name, module in self.modules.items() if module.r}
        factors = [p.detach() for module in active.values() for p in (module.lora_A, module.lora_B)]
        flat = torch.cat([p.flatten().cpu() for p in factors])
        sizes = [p.numel() for p in factors]
        shaped = (part.view(p.shape) for part, p in zip(flat.split(sizes), factors, strict=True))
        return {name: Booster(next(shaped), next(shaped), module.scaling) for name, module in active.items()}

    def is_trained(self) -> bool:
        """Whether the live booster does anything (B ≠ 0)."""
        return any(bool(module.lora_B.any()) for module in self.lora_modules)

    @contextlib.contextmanager
    def scale_current(self, length: float):
        """Show the model the live booster at `length` times its size."""
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
        """The decoder layers of the model, and the number of the lowest one that this round adapts; what lies below is
        the same for every perturbation. None where adapted layers don't stand in one numbered list."""
        numbers = {name: layer_number(name) for name, module in self.modules.items() if module.r}
        stems = {name.partition(f".{number}.")[0] for name, number in numbers.items()}
        if None in numbers.values() or len(stems) != 1:
            return None
        return self.model.get_submodule(stems.pop()), min(numbers.values())

    # ---- the chain ----

    @torch.no_grad()
    def merge_and_reinit(self, length: float = 1.0) -> None:
        """End a round: W = round(W₀ + Σ scaling · Bᵢ Aᵢ), the live booster included; fresh A, B = 0.

        `length` is the step length of the live booster, a factor of its scaling; 0 rejects it. In half precision the
        log says what the one rounding of W loses, relative to the booster. An ensemble keeps W and adds the booster to
        its adapter. Outside XGBLoRA it warns and does nothing.
        """
        if not self.xgblora:
            logger.warning("merge_and_reinit is only for XGBLoRA; nothing was merged")
            return
        live = {name: Booster(b.A, b.B, b.scaling * length) for name, b in self.current.items()}
        self.round += 1
        if length:
            self._append([live], [length])
            self._write_weights(live)
        self.start_round()

    def _append(self, rounds: list[Round], lengths: list[float]) -> None:
        """Put boosters at the end of the chain and into its fp32 sum, or into the adapter of the ensemble."""
        self.boosters += rounds
        self.lengths += lengths
        for name, module in self.modules.items():
            own = [boosters for boosters in rounds if name in boosters]
            if self.ensemble and own:
                A, B = (t.to(module.lora_B.device) for t in chain.concat_factors(own, name, fold=True))
                old = module.chain or (A[:0], B[:, :0])
                module.chain = (torch.cat([old[0], A]), torch.cat([old[1], B], dim=1))
            for b in () if self.ensemble else (boosters[name] for boosters in own):
                self.sum[name].add_(module.to_weight_layout(b.scaled_B @ b.A))

    def _write_weights(self, changed: Round) -> None:
        """Round the sum of the chain into the weights of these layers; say what that loses of a booster."""
        lost, size = 0.0, 0.0
        for name in () if self.ensemble else changed:
            module, exact = self.modules[name], self.merged_fp32(name)
            rounded = exact.to(module.weight.dtype)
            copy_into(module.weight, rounded)
            if rounded is not exact and changed[name] is not None:
                lost += float((rounded.float() - exact).square().sum())
                size += float((changed[name].scaled_B @ changed[name].A).square().sum())
        if size:
            loss = math.sqrt(lost / size)
            advice = "; --xgblora_ensemble would lose nothing" if loss > 0.1 else ""
            logger.info("XGBLoRA: rounding the merged weights loses %.1f%% of this booster%s", 100 * loss, advice)

    def merged_fp32(self, name: str) -> Tensor:
        """W₀ + Σ scaling · Bᵢ Aᵢ of a layer before rounding: fp32, on the host."""
        if not self.ensemble:
            return self.base[name].float() + self.sum[name]
        module = self.modules[name]
        exact = module.weight.float()
        return (exact if module.chain is None else exact + module.to_weight_layout(module.chain[1] @ module.chain[0])).cpu()

    @torch.no_grad()
    def truncate(self, k: int) -> None:
        """Keep the first k boosters; the sum is made anew in their order, so that its bits are those of k merges."""
        kept = self.boosters[:k], self.lengths[:k]
        self.boosters, self.lengths = [], []
        for name, module in self.modules.items():
            module.chain = None
            if not self.ensemble:
                self.sum[name].zero_()
        self._append(*kept)
        self._write_weights(dict.fromkeys(self.modules))

    def staged(self, every: int = 1) -> Iterator[int]:
        """Yield 0, every, 2 · every, … and the length of the chain, while the model shows only so many boosters."""
        chain = list(zip(self.boosters, self.lengths, strict=True))
        self.truncate(0)
        yield 0
        for k, (booster, length) in enumerate(chain, 1):
            with torch.no_grad():
                self._append([booster], [length])
                self._write_weights(dict.fromkeys(self.modules))
            if k % every == 0 or k == len(chain):
                yield k

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict without adapters, the chain and the live booster in the weights (rounded once)."""
        ours = [f"{name}.{part}" for name in self.modules for part in ("lora_", "base.")]
        state = {k: v for k, v in self.model.state_dict().items() if not k.startswith(tuple(ours))}
        with torch.no_grad():
            for name, m in self.modules.items():
                delta = m.to_weight_layout((m.lora_B * m.scaling) @ m.lora_A)
                exact = self.merged_fp32(name).to(delta.device) if self.xgblora else m.weight.float()
                state[f"{name}.weight"] = (exact + delta).to(m.weight.dtype)
        return state

    @torch.no_grad()
    def remove(self) -> None:
        """Put the pretrained model back, bit for bit: its layers, its weights, and what of it was trainable."""
        for name, module in self.modules.items():
            if name in self.base:
                module.weight.copy_(self.base[name])
            self.model.set_submodule(name, self.replaced[name])
        for name, p in self.model.named_parameters():
            if not p.is_meta:  # offloaded ones are made anew at each call, and may not take it
                p.requires_grad_(self.trained_before[name])

    # ---- files ----

    def save_pretrained(self, directory) -> None:
        """Write a PEFT adapter: under XGBLoRA the chain and the live booster as one LoRA, see adapters.py."""
        self._save(directory, SavedAdapter([*self.boosters, self.current], self.lengths, self.round), self.xgblora)

    def _save(self, directory, saved: SavedAdapter, chain: bool) -> None:
        turned = self.lora_modules[0].fan_in_fan_out
        peft_files.save_adapter(directory, self.model, list(self.modules), self.targets, turned, saved, chain)

    def export(self, directory, rank: int) -> float:
        """Write the nearest LoRA of that rank to the chain and the live booster; returns what it lacks, relative."""
        one, lost = chain.compress([*self.boosters, self.current], rank)
        self._save(directory, SavedAdapter([one]), chain=False)
        return lost

    def load(self, directory, boosters: int | None = None, keep_current: bool = True) -> None:
        """Take the state that `save_pretrained` wrote, bit for bit; under XGBLoRA also an adapter made by PEFT, which
        becomes the first booster. With `boosters`, only so many of a chain, all merged; without `live`, all of it.
        Raises UsageError where it does not fit this model."""
        shapes = {name: (m.in_features, m.out_features) for name, m in self.modules.items()}
        saved = peft_files.load_adapter(directory, shapes, self.xgblora)
        (*chain, last), lengths = saved.rounds, saved.lengths
        if not self.xgblora and boosters is not None:
            raise UsageError(f"--boosters {boosters}: {directory} has no chain of boosters")
        self.round = saved.round
        self.start_round()
        fits = {name: len(b.A) for name, b in last.items()} == {n: m.r for n, m in self.modules.items() if m.r}
        if not self.xgblora and not fits:
            rank = len(next(iter(last.values())).A)
            raise UsageError(f"{directory}: an adapter of rank {rank}, but this run has rank {self.ranks[0]}")
        if self.xgblora and not (keep_current and fits and boosters is None):
            if any(bool(b.B.any()) for b in last.values()):
                chain, lengths = [*chain, last], [*lengths, 1.0]
                self.round += 1  # its A is not that of the booster
                self.start_round()
            last = {}
        if boosters is not None and boosters > len(chain):
            raise UsageError(f"--boosters {boosters}: {directory} has a chain of {len(chain)} boosters")
        self.boosters, self.lengths = chain[:boosters], list(lengths[:boosters])
        if self.xgblora:
            self.truncate(len(self.boosters))
        for name, booster in last.items():
            module = self.modules[name]
            module.lora_A.data.copy_(booster.A)
            module.lora_B.data.copy_(booster.B)
            module.scaling = booster.scaling
