"""Which layers of a model get adapters: by name, by decoder layer, and drawn anew for each round.

The number of a decoder layer is the first number in the name of a module: 12 in
`model.layers.12.self_attn.q_proj`.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils import UsageError

DEFAULT_TARGETS = ("q_proj", "v_proj")
# For models without q_proj and v_proj: the layers that PEFT takes for the model type.
TARGETS_BY_MODEL_TYPE = {
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "phi3": ("qkv_proj",),  # PEFT has no entry
    "mpt": ("Wqkv",),
    "gpt_bigcode": ("c_attn",),
    "codegen": ("qkv_proj",),
}


@dataclass(frozen=True)
class TargetLayers:
    """The layers that adapters are put into.

    Attributes:
        names: names of the modules, in the model's order.
        peft_targets: what `target_modules` of PEFT's configuration must say to select the same modules.
        numbers: the numbers of their decoder layers, ascending.
        fan_in_fan_out: whether their weights are [in, out], as in GPT-2's `Conv1D`.
        num_random: how many decoder layers each round draws; None where each round adapts all of them.
    """

    names: tuple[str, ...]
    peft_targets: tuple[str, ...]
    numbers: tuple[int, ...]
    fan_in_fan_out: bool
    num_random: int | None

    def random_layers(self, generator: torch.Generator) -> set[int] | None:
        """Draw the numbers of the decoder layers that one round adapts; None stands for all layers."""
        if self.num_random is None:
            return None
        order = torch.randperm(len(self.numbers), generator=generator).tolist()
        return {self.numbers[i] for i in order[: self.num_random]}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the `nn.Linear` (quantised too) and `Conv1D` layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def select_targets(model: nn.Module, targets: Sequence[str] | None, layers: str) -> TargetLayers:
    """Choose the layers of a model that get adapters.

    Args:
        model: a model of the transformers library.
        targets: names of layers, or the last parts of such names. None or empty: q_proj and v_proj, or PEFT's
            choice for the model type where the model has neither.
        layers: "all", "top:N" (the N upper decoder layers) or "random:N" (N drawn for each round); N may be
            "half".

    Raises:
        UsageError: no layer has such a name (the error lists the Linear layers), or `layers` does not fit the
            model.
    """
    linear = linear_layers(model)
    names = names_ending_in(linear, targets or DEFAULT_TARGETS)
    if not names and not targets:
        names = names_ending_in(linear, TARGETS_BY_MODEL_TYPE.get(model.config.model_type, ()))
    if not names:
        existing_names = ", ".join(sorted({last_part(name) for name in linear}))
        name_text = f" called {', '.join(targets)}" if targets else " to adapt"
        raise UsageError(f"no layer{name_text} in this model; its Linear layers are {existing_names}")
    kind, count = parse_layer_choice(layers)
    numbers = sorted({layer_number(name) for name in names} - {None})
    count = count or (len(numbers) + 1) // 2
    if kind != "all":
        _check_layer_choice(layers, names, count, len(numbers))
    if kind == "top":
        numbers = numbers[-count:]
        names = names_of_layers(names, numbers)
    return TargetLayers(
        names=tuple(names),
        peft_targets=_peft_targets(names, linear),
        numbers=tuple(numbers),
        fan_in_fan_out=isinstance(linear[names[0]], Conv1D),
        num_random=count if kind == "random" else None,
    )


def _check_layer_choice(layers: str, names: Sequence[str], count: int, num_layers: int) -> None:
    """Raise UsageError where a model can't give `count` of its `num_layers` numbered layers."""
    if count > num_layers:
        raise UsageError(f"layers {layers}: this model has {num_layers} of them")
    unnumbered = [name for name in names if layer_number(name) is None]
    if unnumbered:
        raise UsageError(f"layers {layers}: {', '.join(unnumbered)} stands in none of the numbered layers")


def _peft_targets(names: Sequence[str], linear: Iterable[str]) -> tuple[str, ...]:
    """Return the last parts of the names where these select the same Linear layers, else the whole names."""
    last_parts = {last_part(name) for name in names}
    selected = {name for name in linear if last_part(name) in last_parts}
    return tuple(sorted(last_parts) if selected == set(names) else names)


def last_part(name: str) -> str:
    """Return `q_proj` of `model.layers.12.self_attn.q_proj`."""
    return name.rsplit(".", 1)[-1]


def layer_number(name: str) -> int | None:
    """Return 12 of `model.layers.12.self_attn.q_proj`; None where a module stands in no numbered layer."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def names_of_layers(names: Iterable[str], numbers: Collection[int]) -> list[str]:
    """Return the names of modules that stand in decoder layers of these numbers."""
    return [name for name in names if layer_number(name) in numbers]


def first_layer(names: Iterable[str]) -> tuple[str, int] | None:
    """Return the list of decoder layers that modules stand in, and the lowest number of a layer among them.

    Returns:
        (name of the `nn.ModuleList`, layer number); None where the modules don't stand in one numbered list.
    """
    numbers = {name: layer_number(name) for name in names}
    lists = {name.partition(f".{number}.")[0] for name, number in numbers.items()}
    if None in numbers.values() or len(lists) != 1:
        return None
    return lists.pop(), min(numbers.values())


def names_ending_in(names: Iterable[str], endings: Sequence[str]) -> list[str]:
    """Return the names of modules that are one of `endings`, or end in one of them behind a dot."""
    return [name for name in names if any(f".{name}".endswith(f".{ending}") for ending in endings)]


def parse_layer_choice(text: str) -> tuple[str, int]:
    """Read `all`, `top:N` or `random:N`.

    Returns:
        ("all" | "top" | "random", N); N is 0 for "all" and for "half".

    Raises:
        UsageError: another text.
    """
    kind, _, number = text.partition(":")
    if text == "all":
        return "all", 0
    if kind in ("top", "random") and (number == "half" or (number.isdecimal() and int(number) > 0)):
        return kind, 0 if number == "half" else int(number)
    raise UsageError(f"layers {text!r}: there are all, top:N and random:N (N may be half)")
