"""TODO boosters.targets."""

import logging
import re
from collections.abc import Iterable, Sequence

from utils import UsageError


def layer_number(name: str) -> int | None:
    """12 of `model.layers.12.self_attn.q_proj`; None where a module stands in no numbered layer."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


logger = logging.getLogger(__name__)

DEFAULT_TARGETS = ("q_proj", "v_proj")
TARGETS_BY_MODEL_TYPE = {  # where a model has neither: the layers that PEFT takes for its model type
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "phi3": ("qkv_proj",),  # PEFT has no entry
    "mpt": ("Wqkv",),
    "gpt_bigcode": ("c_attn",),
    "codegen": ("qkv_proj",),
}


def names_ending_in(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Names of modules that are one of `wanted`, or end in one behind a dot."""
    return [name for name in names if any(f".{name}".endswith(f".{w}") for w in wanted)]


def parse_layer_choice(text: str) -> tuple[str, int]:
    """("all" | "top" | "random", N; 0 stands for half) of `all`, `top:N`, `random:N`; raises UsageError for others."""
    kind, _, number = text.partition(":")
    if text == "all":
        return "all", 0
    if kind in ("top", "random") and (number == "half" or (number.isdecimal() and int(number) > 0)):
        return kind, 0 if number == "half" else int(number)
    raise UsageError(f"layers {text!r}: there are all, top:N and random:N (N may be half)")
