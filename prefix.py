"""Prefix tuning (arXiv 2101.00190): trained keys and values in front of every layer's own, which every token sees.

They go into the model as a pre-filled key-value cache, with the mask widened and the positions of the prompt behind
them, as in PEFT, in training, scoring and generation. No `forward` is patched: who runs the model asks for its
`trained_prefix`.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from boosters import peft_files
from utils import UsageError, input_device

PEFT_TYPE = "PREFIX_TUNING"  # PEFT's name for it
EXACT_WEIGHTS = "prefix.safetensors"  # the trained tensors of a reparametrised prefix
REPARAM_WIDTH = 512  # of its embedding and of its hidden layer, as in the MeZO code


class SharedCacheLayer(DynamicLayer):
    """Keys and values [n, heads, tokens, D] of one layer that every row sees before its own; read, never grown. With
    n > 1 the rows are n copies of a batch, one behind the other, and each copy sees its own."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, keys, values, *args, **kwargs):
        def behind(kept, new):
            rows = len(new) // len(kept)
            front = kept.repeat_interleave(rows, 0) if len(kept) > 1 else kept.expand(rows, -1, -1, -1)
            return torch.cat([front.to(new.device), new], dim=-2)

        return behind(self.keys, keys), behind(self.values, values)


class PrefixTuning(nn.Module):
    """A trained prefix of `length` keys and values per layer, fp32, put into `model.prefix_tuning`; all else is frozen.

    Args:
        reparam: keys and values are what a small network makes of a trained embedding: tanh(E W₁ + b₁) W₂ + b₂. Without
            it they are trained themselves.
        init_by_real_act: without `reparam`, start from the keys and values of random tokens; else from N(0, 0.02²).
        seed: of initial values and tokens; no global generator is touched.

    `deltas` = one [n, …] perturbation per parameter: the batch holds n copies one behind the other, and copy i sees
    parameters with perturbation i. None is off. Raises UsageError where layers have keys and values of unequal shapes.
    """

    def __init__(self, model, length: int, reparam: bool = False, init_by_real_act: bool = True, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        vocabulary, device = model.config.get_text_config().vocab_size, input_device(model)
        tokens = torch.randint(vocabulary, (1, length), generator=generator)
        real, self.layer_devices = activations_of_tokens(model, tokens.to(device))
        self.length, self.reparam, self.shape = length, reparam, (real.shape[0], 2, real.shape[2], real.shape[4])
        self.name = model.config.name_or_path
        size = math.prod(self.shape)
        drawn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        if reparam:
            made = {
                "embedding": drawn(length, REPARAM_WIDTH),
                "weight1": drawn(REPARAM_WIDTH, REPARAM_WIDTH) / REPARAM_WIDTH**0.5, "bias1": torch.zeros(1, REPARAM_WIDTH),
                "weight2": drawn(REPARAM_WIDTH, size) / REPARAM_WIDTH**0.5, "bias2": torch.zeros(1, size),
            }  # fmt: skip
        else:
            start = real.movedim(-2, 0).reshape(length, size) if init_by_real_act else 0.02 * drawn(length, size)
            made = {"embedding": start}
        for name, values in made.items():
            self.register_parameter(name, nn.Parameter(values.float().to(device)))
        self.deltas: Sequence[Tensor] | None = None
        model.requires_grad_(False)
        model.prefix_tuning = self

    def set_perturbations(self, deltas: Sequence[Tensor] | None) -> None:
        self.deltas = deltas

    def move_with_model(self, device) -> None:
        """The layers are on this device from here on."""
        self.layer_devices = [device] * len(self.layer_devices)

    def prompt_embeddings(self) -> Tensor:
        """[n, length, layers · 2 · heads · D]: what stands in PEFT's `prompt_embeddings`, of each perturbation."""
        shown = [p[None] for p in self.parameters()]
        if self.deltas is not None:
            shown = [p + delta.to(p.device) for p, delta in zip(shown, self.deltas, strict=True)]
        if not self.reparam:
            return shown[0]
        embedding, weight1, bias1, weight2, bias2 = shown
        return torch.tanh(embedding @ weight1 + bias1) @ weight2 + bias2

    def keys_and_values(self, dtype: torch.dtype) -> Tensor:
        """[layers, 2, n, heads, length, D]: keys and values."""
        states = self.prompt_embeddings().unflatten(-1, self.shape)  # [n, length, layers, 2, heads, D]
        return states.permute(2, 3, 0, 4, 1, 5).to(dtype)

    def shared_cache(self, dtype: torch.dtype) -> Cache:
        """A cache for one forward of any number of rows (of n copies)."""
        return Cache(layers=[SharedCacheLayer(keys, values) for keys, values in self.keys_and_values(dtype)])

    def growing_cache(self, model, rows: int = 1) -> DynamicCache:
        """The library's own cache, begun with the prefix in each of so many rows."""
        cache = DynamicCache(config=model.config)
        for i, (keys, values) in enumerate(self.keys_and_values(model.dtype)):
            keys, values = (part.to(self.layer_devices[i]).expand(rows, -1, -1, -1) for part in (keys, values))
            cache.update(keys, values, i)
        return cache

    # ---- files ----

    @torch.no_grad()
    def save_pretrained(self, directory) -> None:
        """Write PEFT's prefix tuning, and beside it the exact tensors of a reparametrised one, which PEFT folds."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        layers, _, heads, width = self.shape
        config = {
            "peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM", "base_model_name_or_path": self.name,
            "num_virtual_tokens": self.length, "token_dim": heads * width, "num_attention_heads": heads,
            "num_layers": layers, "num_transformer_submodules": 1, "prefix_projection": False,
            "encoder_hidden_size": heads * width, "inference_mode": True,
        }  # fmt: skip
        (directory / peft_files.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        folded = {"prompt_embeddings": self.prompt_embeddings()[0].cpu().contiguous()}
        save_file(folded, directory / peft_files.WEIGHTS, metadata={"format": "pt"})
        (directory / EXACT_WEIGHTS).unlink(missing_ok=True)  # of an earlier run
        if self.reparam:
            save_file({name: p.detach().cpu() for name, p in self.named_parameters()}, directory / EXACT_WEIGHTS)

    @torch.no_grad()
    def load(self, directory) -> None:
        """Take what `save_pretrained` or PEFT wrote; raises UsageError where it does not fit this model or this run."""
        length = saved_length(directory)
        if length != self.length:
            raise UsageError(f"{directory}: a prefix of {length} tokens, but this run has --num_prefix {self.length}")
        if self.reparam and not (Path(directory) / EXACT_WEIGHTS).exists():
            raise UsageError(f"{directory}: a prefix without reparametrisation: go on from it with --no_reparam")
        file = Path(directory) / (EXACT_WEIGHTS if self.reparam else peft_files.WEIGHTS)
        tensors, _ = peft_files.read_tensors(file)
        own = dict(self.named_parameters()) if self.reparam else {"prompt_embeddings": self.embedding}
        for name, p in own.items():
            saved = tensors.get(name)
            if saved is None or saved.shape != p.shape or not bool(saved.isfinite().all()):
                raise UsageError(f"{file}: no finite {name} of shape {list(p.shape)}, which this model wants")
            p.copy_(saved)


def trained_prefix(model: nn.Module) -> PrefixTuning | None:
    """The prefix that stands in front of this model's layers, where there is one."""
    return getattr(model, "prefix_tuning", None)


@torch.inference_mode()
def activations_of_tokens(model, tokens: Tensor) -> tuple[Tensor, list[torch.device]]:
    """[layers, 2, heads, tokens, D] fp32 on the CPU: keys and values of these tokens [1, tokens]; and each layer's
    device."""
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    states = [torch.cat([layer.keys, layer.values]).float().cpu() for layer in cache.layers]
    if len({s.shape for s in states}) > 1 or not states:
        raise UsageError("--prefix_tuning: this model's layers have keys and values of unequal shapes")
    return torch.stack(states), [layer.keys.device for layer in cache.layers]


def saved_length(directory) -> int:
    """Tokens of a saved prefix; raises UsageError where it is none."""
    config = peft_files.read_adapter_config(directory)
    length = config.get("num_virtual_tokens")
    if config["peft_type"] != PEFT_TYPE or type(length) is not int or length < 1 or config.get("prefix_projection"):
        raise UsageError(f"{Path(directory) / peft_files.CONFIG}: not a prefix of ready-made keys and values")
    return length
