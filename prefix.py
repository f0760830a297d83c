"""Prefix tuning (arXiv 2101.00190): every token sees trained keys and values in front of a layer's own.

The prefix goes into the model as a pre-filled key-value cache, as in PEFT, in training, scoring and
generation: the attention mask is widened, and the positions of the prompt begin behind the prefix. No
`forward` is patched: the code that runs the model asks for its `trained_prefix`.
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

PEFT_TYPE = "PREFIX_TUNING"  # PEFT's name for prefix tuning
EXACT_WEIGHTS = "prefix.safetensors"  # file of the trained tensors of a reparametrised prefix
REPARAM_WIDTH = 512  # of the embedding and of the hidden layer of the reparametrisation, as in the MeZO code


class SharedCacheLayer(DynamicLayer):
    """Keys and values of one layer that every row of a batch sees before its own; they never grow.

    Args:
        keys: [n, heads, tokens, head_dim]. With n > 1 the rows are n copies of a batch, one copy behind the
            other, and each copy sees its own keys.
        values: the same of values.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys = keys
        self.values = values

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Return the shared keys and values with those of the rows behind them; nothing is stored."""
        return _prepend(self.keys, keys), _prepend(self.values, values)


def _prepend(prefix_states: Tensor, states: Tensor) -> Tensor:
    """Put shared states [n, heads, tokens, head_dim] in front of those of n copies of some rows."""
    rows = len(states) // len(prefix_states)
    repeated_states = (
        prefix_states.repeat_interleave(rows, 0)
        if len(prefix_states) > 1
        else prefix_states.expand(rows, -1, -1, -1)
    )
    return torch.cat([repeated_states.to(states.device), states], dim=-2)


class PrefixTuning(nn.Module):
    """A trained prefix of keys and values for each layer, fp32; everything else in the model is frozen.

    It is found again as `model.prefix_tuning`, see `trained_prefix`.

    Args:
        model: a causal language model of the transformers library.
        length: tokens of the prefix.
        reparam: compute keys and values from a trained embedding E: tanh(E W₁ + b₁) W₂ + b₂. Without it the
            keys and values themselves are trained.
        init_by_real_act: without `reparam`, start from the keys and values of random tokens; else from N(0,
            0.02²).
        seed: of initial values and random tokens; no global generator is touched.

    Attributes:
        shape: (layers, 2, heads, head_dim) of the keys and values of one token.
        layer_devices: the device of each layer.
        deltas: one [n, …] perturbation for each parameter: the batch holds n copies of the same rows, one
            copy behind the other, and copy i sees the parameters with perturbation i. None is off.

    Raises:
        UsageError: the layers have keys and values of unequal shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        length: int,
        reparam: bool = False,
        init_by_real_act: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        device = input_device(model)
        vocab_size = model.config.get_text_config().vocab_size
        tokens = torch.randint(vocab_size, (1, length), generator=generator)
        activations, self.layer_devices = activations_of_tokens(model, tokens.to(device))
        num_layers, _, num_heads, _, head_dim = activations.shape
        self.shape = (num_layers, 2, num_heads, head_dim)
        self.length = length
        self.reparam = reparam
        self.base_model = model.config.name_or_path
        width = math.prod(self.shape)
        if reparam:
            initial = reparam_weights(length, width, generator)
        elif init_by_real_act:
            initial = {"embedding": activations.movedim(-2, 0).reshape(length, width)}
        else:
            initial = {"embedding": 0.02 * torch.randn((length, width), generator=generator)}
        for name, values in initial.items():
            self.register_parameter(name, nn.Parameter(values.float().to(device)))
        self.deltas: Sequence[Tensor] | None = None
        model.requires_grad_(False)
        model.prefix_tuning = self

    def set_perturbations(self, deltas: Sequence[Tensor] | None) -> None:
        """Let one forward serve n perturbations, [n, …] of each parameter; None switches them off."""
        self.deltas = deltas

    def move_with_model(self, device: torch.device) -> None:
        """Note that all layers are on this device from here on."""
        self.layer_devices = [device] * len(self.layer_devices)

    def prompt_embeddings(self) -> Tensor:
        """Return keys and values as PEFT's `prompt_embeddings` hold them, for each perturbation.

        Returns:
            [n, length, layers · 2 · heads · head_dim], fp32; n is 1 without perturbations.
        """
        params = [p[None] for p in self.parameters()]
        if self.deltas is not None:
            params = [p + delta.to(p.device) for p, delta in zip(params, self.deltas, strict=True)]
        if not self.reparam:
            return params[0]
        embedding, weight1, bias1, weight2, bias2 = params
        return torch.tanh(embedding @ weight1 + bias1) @ weight2 + bias2

    def keys_and_values(self, dtype: torch.dtype) -> Tensor:
        """Return the keys and values of all layers: [layers, 2, n, heads, length, head_dim]."""
        states = self.prompt_embeddings().unflatten(-1, self.shape)  # [n, length, layers, 2, heads, head_dim]
        return states.permute(2, 3, 0, 4, 1, 5).to(dtype)

    def shared_cache(self, dtype: torch.dtype) -> Cache:
        """Return a cache for one forward of any number of rows (of n copies of some rows)."""
        return Cache(layers=[SharedCacheLayer(keys, values) for keys, values in self.keys_and_values(dtype)])

    def growing_cache(self, model: nn.Module, rows: int = 1) -> DynamicCache:
        """Return the library's own cache, which begins with the prefix in each of so many rows."""
        cache = DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(self.keys_and_values(model.dtype)):
            device = self.layer_devices[layer]
            keys = keys.to(device).expand(rows, -1, -1, -1)
            values = values.to(device).expand(rows, -1, -1, -1)
            cache.update(keys, values, layer)
        return cache

    # ---- files ----

    @torch.no_grad()
    def save_pretrained(self, directory: str | Path) -> None:
        """Write PEFT's prefix tuning, and beside it the trained tensors of a reparametrised prefix.

        PEFT's file holds the keys and values that the reparametrisation gives; to go on from them needs its
        tensors.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        num_layers, _, num_heads, head_dim = self.shape
        config = {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "num_virtual_tokens": self.length,
            "token_dim": num_heads * head_dim,
            "num_attention_heads": num_heads,
            "num_layers": num_layers,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
            "encoder_hidden_size": num_heads * head_dim,
            "inference_mode": True,
        }
        (directory / peft_files.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        embeddings = {"prompt_embeddings": self.prompt_embeddings()[0].cpu().contiguous()}
        save_file(embeddings, directory / peft_files.WEIGHTS, metadata={"format": "pt"})
        (directory / EXACT_WEIGHTS).unlink(missing_ok=True)  # of an earlier run
        if self.reparam:
            tensors = {name: p.detach().cpu() for name, p in self.named_parameters()}
            save_file(tensors, directory / EXACT_WEIGHTS)

    @torch.no_grad()
    def load(self, directory: str | Path) -> None:
        """Take what `save_pretrained` or PEFT wrote; raises UsageError where it does not fit."""
        length = saved_length(directory)
        if length != self.length:
            flag = f"--num_prefix {self.length}"
            raise UsageError(f"{directory}: a prefix of {length} tokens, but this run has {flag}")
        if self.reparam and not (Path(directory) / EXACT_WEIGHTS).exists():
            problem = "a prefix without reparametrisation"
            raise UsageError(f"{directory}: {problem}: go on from it with --no_reparam")
        path = Path(directory) / (EXACT_WEIGHTS if self.reparam else peft_files.WEIGHTS)
        tensors, _ = peft_files.read_tensors(path)
        params = dict(self.named_parameters()) if self.reparam else {"prompt_embeddings": self.embedding}
        for name, p in params.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != p.shape or not bool(tensor.isfinite().all()):
                raise UsageError(f"{path}: no finite {name} of shape {list(p.shape)}, which this model wants")
            p.copy_(tensor)


def reparam_weights(length: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the initial tensors of tanh(E W₁ + b₁) W₂ + b₂, whose result is [length, width]."""
    scale = REPARAM_WIDTH**0.5
    return {
        "embedding": torch.randn((length, REPARAM_WIDTH), generator=generator),
        "weight1": torch.randn((REPARAM_WIDTH, REPARAM_WIDTH), generator=generator) / scale,
        "bias1": torch.zeros(1, REPARAM_WIDTH),
        "weight2": torch.randn((REPARAM_WIDTH, width), generator=generator) / scale,
        "bias2": torch.zeros(1, width),
    }


def trained_prefix(model: nn.Module) -> PrefixTuning | None:
    """Return the prefix that a model has been given, or None."""
    return getattr(model, "prefix_tuning", None)


@torch.inference_mode()
def activations_of_tokens(model: nn.Module, tokens: Tensor) -> tuple[Tensor, list[torch.device]]:
    """Compute the keys and values of tokens [1, tokens] in all layers.

    Returns:
        [layers, 2, heads, tokens, head_dim], fp32 on the host; and the device of each layer.

    Raises:
        UsageError: the layers have keys and values of unequal shapes.
    """
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    states = [torch.cat([layer.keys, layer.values]).float().cpu() for layer in cache.layers]
    if len({state.shape for state in states}) != 1:
        raise UsageError("--prefix_tuning: this model's layers have keys and values of unequal shapes")
    return torch.stack(states), [layer.keys.device for layer in cache.layers]


def saved_length(directory: str | Path) -> int:
    """Return how many tokens a saved prefix has; raises UsageError where the directory holds none."""
    config = peft_files.read_adapter_config(directory)
    length = config.get("num_virtual_tokens")
    is_prefix = config["peft_type"] == PEFT_TYPE and not config.get("prefix_projection")
    if not is_prefix or type(length) is not int or length < 1:
        raise UsageError(f"{Path(directory) / peft_files.CONFIG}: not a prefix of ready-made keys and values")
    return length
