"""Low-rank adapters (LoRA, arXiv 2106.09685) and the chain of boosters that they become (XGBLoRA, arXiv 2410.19694).

A `LoRALinear` computes W x + scaling · B A x. Under XGBLoRA a round trains rank-1 (A, B), then `merge_and_reinit` adds
scaling · B A to the weight and starts the next round with a fresh A and B = 0. The chain of boosters in fp32 is the
truth and the merged weight its cache: every merge computes W = round(W₀ + Σ scaling · Bᵢ Aᵢ) from the pretrained W₀,
because adding boosters one by one in half precision would lose them.
"""

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from utils import UsageError

logger = logging.getLogger(__name__)

# Where a model has neither q_proj nor v_proj: the layers that PEFT takes for its model type.
TARGETS = {
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "phi3": ("qkv_proj",),
}
PREFIX = "base_model.model."  # of PEFT's names in adapter_model.safetensors


@dataclass(frozen=True)
class Booster:
    """One merged round of one layer: A [r, in], B [out, r], fp32 on the host; its delta is scaling · B A."""

    A: Tensor
    B: Tensor
    scaling: float


class LoRALinear(nn.Module):
    """y = W x + b + scaling · B (A x), around an `nn.Linear` or GPT-2's `Conv1D` (`fan_in_fan_out`: W is [in, out]).

    `weight` and `bias` are the base layer's own parameters under their own names. `lora_A` [r, in] and `lora_B`
    [out, r] are fp32 whatever the base's dtype; activations are cast. scaling = alpha / r.

    `deltas` = (of A [n, r, in] or None, of B [n, out, r]): the batch holds n copies one behind the other, and copy i
    sees A and B with perturbation i. None is off.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float):
        super().__init__()
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.weight, self.bias = base.weight, base.bias
        out_features, in_features = self.weight.T.shape if self.fan_in_fan_out else self.weight.shape
        self.r, self.scaling = r, alpha / r
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=torch.float32))
        self.deltas: tuple[Tensor | None, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        A, B, x = self.lora_A, self.lora_B, x.to(torch.float32)
        if self.deltas is None:
            low = nn.functional.linear(x, A) * self.scaling  # [..., r]
            return (y + nn.functional.linear(low, B)).to(y.dtype)
        A, B = (p if delta is None else p + delta for p, delta in zip((A, B), self.deltas, strict=True))
        low = x.reshape(len(B), -1, x.shape[-1]) @ A.mT * self.scaling  # [n, tokens, r]
        return (y + (low @ B.mT).view(y.shape)).to(y.dtype)

    def oriented(self, delta: Tensor) -> Tensor:
        """A delta [out, in] as the weight lies."""
        return delta.T if self.fan_in_fan_out else delta


class LoRA:
    """Rank-r adapters on the target layers of `model`, in place; everything else is frozen.

    Args:
        r, alpha: rank and alpha. With `xgblora`, r is 1: another rank raises ValueError.
        float16: accepted for compatibility; the adapters are fp32 whatever the base.
        seed: A of a round is a function of (seed, round, module name), B starts at 0.
        targets: names of layers or last parts of them; default q_proj and v_proj, else PEFT's for the model type.
        freeze_a: only B is trained, A stays the draw of its round.

    `lora_modules` lists the layers; `boosters` the merged rounds, one dict {module name: Booster} each, without the
    live one. Raises UsageError where no layer matches, naming the Linear layers that exist.
    """

    def __init__(self, model, r, alpha, float16=False, xgblora=False, seed=0, targets=None, freeze_a=False):
        if xgblora and r != 1:
            raise ValueError(f"XGBLoRA boosts with rank 1, not {r}")
        self.model, self.xgblora, self.seed, self.freeze_a = model, xgblora, seed, freeze_a
        linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        found = []
        for wanted in (targets or ("q_proj", "v_proj"), TARGETS.get(model.config.model_type, ())):
            found = found or [name for name in linear if any(f".{name}".endswith(f".{w}") for w in wanted)]
        if not found:
            exist = sorted({name.rsplit(".", 1)[-1] for name in linear})
            wanted = f" called {', '.join(targets)}" if targets else " to adapt"
            raise UsageError(f"no layer{wanted} in this model; its Linear layers are {', '.join(exist)}")
        self.targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in found}))
        model.requires_grad_(False)
        self.modules: dict[str, LoRALinear] = {}
        for name in found:
            parent, _, child = name.rpartition(".")
            self.modules[name] = LoRALinear(linear[name], r, alpha)
            setattr(model.get_submodule(parent), child, self.modules[name])
        self.lora_modules = list(self.modules.values())
        self.boosters: list[dict[str, Booster]] = []
        self.base: dict[str, Tensor] = {}
        self.sum: dict[str, Tensor] = {}
        if xgblora:  # W₀ and the fp32 sum of the chain, both on the host
            for name, module in self.modules.items():
                self.base[name] = module.weight.detach().to("cpu", copy=True)
                self.sum[name] = torch.zeros(module.weight.shape, dtype=torch.float32)
            size = sum(w.nbytes for tensors in (self.base, self.sum) for w in tensors.values())
            logger.info(
                "XGBLoRA: W0 of %d layers and the sum of the chain: %.0f MB on the host", len(found), size / 1e6
            )
        self._fresh()

    @torch.no_grad()
    def _fresh(self) -> None:
        """A ~ Kaiming-uniform(√5), that is U(−1/√in, 1/√in), from (seed, round, name); B = 0."""
        for name, module in self.modules.items():
            digest = hashlib.blake2b(f"{self.seed},{len(self.boosters)},{name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            A = torch.empty(module.lora_A.shape)
            module.lora_A.copy_(nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator))
            module.lora_B.zero_()
            module.lora_A.requires_grad_(not self.freeze_a)

    def spread(self, deltas: list[Tensor] | None) -> None:
        """Set `deltas` of all layers from one [n, …] perturbation per trained tensor, in the model's order."""
        left = iter(deltas or ())
        for module in self.lora_modules:
            if deltas is None:
                module.deltas = None
            else:
                device = module.lora_B.device
                of_a = None if self.freeze_a else next(left).to(device)
                module.deltas = (of_a, next(left).to(device))

    def trained(self) -> bool:
        """Whether the live booster does anything (B ≠ 0)."""
        return any(bool(module.lora_B.any()) for module in self.lora_modules)

    @torch.no_grad()
    def merge_and_reinit(self) -> None:
        """End a round: W = round(W₀ + Σ scaling · Bᵢ Aᵢ), the live booster included; fresh A, B = 0.

        Outside XGBLoRA it warns and does nothing. In half precision the log says what the one rounding of W loses,
        relative to the booster.
        """
        if not self.xgblora:
            logger.warning("merge_and_reinit is only for XGBLoRA; nothing was merged")
            return
        live = {
            name: Booster(m.lora_A.detach().to("cpu", copy=True), m.lora_B.detach().to("cpu", copy=True), m.scaling)
            for name, m in self.modules.items()
        }
        self._append(live)
        lost, size = 0.0, 0.0
        for name, module in self.modules.items():
            exact = self.exact(name)
            module.weight.copy_(exact)
            if module.weight.dtype != torch.float32:
                lost += float((module.weight.cpu().float() - exact).square().sum())
                size += float((live[name].B @ live[name].A).square().sum()) * live[name].scaling ** 2
        if size:
            logger.info(
                "XGBLoRA: rounding the merged weights loses %.1f%% of this booster", 100 * math.sqrt(lost / size)
            )
        self._fresh()

    def exact(self, name: str) -> Tensor:
        """W₀ + Σ scaling · Bᵢ Aᵢ of a layer before rounding: fp32, on the host."""
        return self.base[name].float() + self.sum[name]

    def _append(self, booster: dict[str, Booster]) -> None:
        """Put a booster at the end of the chain and into its fp32 sum."""
        self.boosters.append(booster)
        for name, b in booster.items():
            self.sum[name].add_(self.modules[name].oriented((b.B * b.scaling) @ b.A))

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict without adapters, the live one added to the weights (rounded once)."""
        state = {k: v for k, v in self.model.state_dict().items() if not k.endswith((".lora_A", ".lora_B"))}
        with torch.no_grad():
            for name, m in self.modules.items():
                delta = m.oriented((m.lora_B * m.scaling) @ m.lora_A)
                exact = self.exact(name).to(delta.device) if self.xgblora else m.weight.float()
                state[f"{name}.weight"] = (exact + delta).to(m.weight.dtype)
        return state

    def save_pretrained(self, directory) -> None:
        """Write a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.

        Under XGBLoRA the chain and the live booster become one LoRA of rank k+1, scaling folded into B; beside it
        `boosters.safetensors` holds the unfolded fp32 factors, so that going on costs no bits.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors, unfolded, scalings = {}, {}, []
        for name, module in self.modules.items():
            chain = [booster[name] for booster in self.boosters]
            chain.append(Booster(module.lora_A.detach().cpu(), module.lora_B.detach().cpu(), module.scaling))
            fold = [b.B * b.scaling if self.xgblora else b.B for b in chain]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([b.A for b in chain])
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.cat(fold, dim=1)
            unfolded[f"{name}.A"] = torch.cat([b.A for b in chain])
            unfolded[f"{name}.B"] = torch.cat([b.B for b in chain], dim=1)
            ranks, scalings = [len(b.A) for b in chain], [b.scaling for b in chain]
        first = self.lora_modules[0]
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.model.config.name_or_path,
            "r": sum(ranks),
            "lora_alpha": sum(ranks) if self.xgblora else first.scaling * first.r,
            "target_modules": list(self.targets),
            "fan_in_fan_out": first.fan_in_fan_out,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        if self.xgblora:
            about = json.dumps({"ranks": ranks, "scalings": scalings})
            # one entry: safetensors writes several in any order, and equal chains shall be equal bytes
            save_file(unfolded, directory / "boosters.safetensors", metadata={"chain": about})

    def load(self, directory, boosters: int | None = None) -> None:
        """Take the state that `save_pretrained` wrote, bit for bit; under XGBLoRA also an adapter made by PEFT, which
        becomes the first booster. With `boosters`, only so many of a chain, all merged. Raises UsageError where it
        does not fit this model."""
        directory = Path(directory)
        if self.xgblora and (directory / "boosters.safetensors").exists():
            tensors, about = read_tensors(directory / "boosters.safetensors")
            ranks, scalings = json.loads(about["chain"]).values()
            factors = self._factors(tensors, "{}.A", "{}.B", sum(ranks), directory)
            rounds = list(zip(ranks, scalings, strict=True))
        else:
            config = adapter_config(directory)
            tensors, _ = read_tensors(directory / "adapter_model.safetensors")
            r, alpha = config["r"], config["lora_alpha"]
            factors = self._factors(tensors, f"{PREFIX}{{}}.lora_A.weight", f"{PREFIX}{{}}.lora_B.weight", r, directory)
            rounds = [(r, alpha / (math.sqrt(r) if config.get("use_rslora") else r))]
        self.boosters = []
        if self.xgblora:
            if not (directory / "boosters.safetensors").exists():
                rounds.append((1, self.lora_modules[0].scaling))
            for total in self.sum.values():
                total.zero_()
        if boosters is not None:
            if not self.xgblora or boosters > len(rounds):
                has = f"a chain of {len(rounds)} boosters" if self.xgblora else "no chain of boosters"
                raise UsageError(f"--boosters {boosters}: {directory} has {has}")
            rounds = [*rounds[:boosters], (0, self.lora_modules[0].scaling)]  # nothing live
        start = 0
        for r, scaling in rounds[:-1]:
            end = start + r
            self._append(
                {n: Booster(A[start:end].clone(), B[:, start:end].clone(), scaling) for n, (A, B) in factors.items()}
            )
            start = end
        self._fresh()
        with torch.no_grad():
            for name, module in self.modules.items():
                if self.xgblora:
                    module.weight.copy_(self.exact(name))
                A, B = factors[name][0][start:], factors[name][1][:, start:]
                if rounds[-1][0] and len(A):
                    if A.shape != module.lora_A.shape:
                        raise UsageError(f"{directory}: an adapter of rank {len(A)}, but this run has rank {module.r}")
                    module.lora_A.copy_(A)
                    module.lora_B.copy_(B)
                    module.scaling = rounds[-1][1]

    def _factors(self, tensors, name_a, name_b, rank, directory) -> dict[str, tuple[Tensor, Tensor]]:
        """{module name: (A [rank, in], B [out, rank])}, every key and shape checked."""
        expected = {}
        for name, module in self.modules.items():
            expected[name_a.format(name)] = (rank, module.lora_A.shape[1])
            expected[name_b.format(name)] = (module.lora_B.shape[0], rank)
        for key in sorted(expected.keys() ^ tensors.keys()):
            raise UsageError(
                f"{directory}: {'no' if key in expected else 'unexpected'} tensor {key}; was the adapter made for this "
                "base model and these target layers?"
            )
        for key, shape in expected.items():
            if tuple(tensors[key].shape) != shape:
                raise UsageError(
                    f"{directory}: {key} is {list(tensors[key].shape)}, but this model wants {list(shape)}"
                )
            if not bool(tensors[key].isfinite().all()):
                raise UsageError(f"{directory}: {key} holds NaN or infinity")
        return {n: (tensors[name_a.format(n)].float(), tensors[name_b.format(n)].float()) for n in self.modules}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; raises UsageError where there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        return load_file(path), about
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: {error}") from error


def adapter_config(directory) -> dict:
    """The `adapter_config.json` of a PEFT LoRA adapter; raises UsageError for what we can't apply as it was meant."""
    path = Path(directory) / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        kind, _, _, targets = config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; --adapter takes a directory with a PEFT LoRA adapter") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not the configuration of a LoRA adapter ({error!r})") from error
    plain = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "bias": "none"}
    odd = [name for name, value in plain.items() if (config.get(name) or value) != value]
    if kind != "LORA" or odd or not isinstance(targets, list):
        raise UsageError(f"{path}: only plain LoRA is supported, not {', '.join(odd) or f'{kind} on {targets}'}")
    return config
