"""The bottom of a model: the decoder layers below the lowest perturbed one, whose output is the same for every sign and
every query of a step, and in every step on the same row while nothing below is trained.

`reached` runs the bottom alone; inside `given` a forward hands on what it is given in place of the bottom. `Store`
keeps the output of the bottom for all training rows. No `forward` is patched: pre-hooks, and modules that pass on their
input.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoring import logprobs, packing
from utils import UsageError, input_device

logger = logging.getLogger(__name__)


class _HiddenStatesCaptured(Exception):
    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class IdentityLayer(nn.Module):
    """Stands in the place of a decoder layer and hands on the hidden states, [1, R, N, D] or [R, N, D].

    Some models take what a layer gives as the hidden states, others (Falcon, BLOOM, GPT-J) take `[0]` of it. So it
    gives them an axis in front, which the second kind drops again, and takes either.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # what some models choose a mask by

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states if hidden_states.dim() == 4 else hidden_states[None]


def capture_hidden_states(layer: nn.Module, forward: Callable) -> Tensor | None:
    """[R, N, D]: the hidden states that come to `layer` when `forward()` runs the model, which stops there."""

    def stop(module, args, kwargs):
        raise _HiddenStatesCaptured(args[0] if args else kwargs["hidden_states"])

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.inference_mode():
            forward()
    except _HiddenStatesCaptured as found:
        return found.hidden
    finally:
        hook.remove()
    return None


@contextlib.contextmanager
def skip_lower_layers(layers: nn.ModuleList, first: int, hidden: Tensor) -> Iterator[None]:
    """Inside, layers below number `first` do nothing, and layer `first` sees `hidden` [R, N, D], or copies of it one
    behind the other where the batch holds copies."""

    def hand_over(module, args, kwargs):
        rows = args[0] if args else kwargs["hidden_states"]
        states = hidden.repeat(rows.shape[-3] // len(hidden), 1, 1)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    below = list(layers[:first])
    hook = layers[first].register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        for i, layer in enumerate(below):
            layers[i] = IdentityLayer(layer)
        yield
    finally:
        hook.remove()
        for i, layer in enumerate(below):
            layers[i] = layer


class ActivationCache:
    """What comes to layer `first` for every token of the training examples: [tokens, D] on the host, in the model's
    dtype. `examples` are the given ones, each of which knows its place.

    Of several ranks each keeps every `ranks`-th example, from number `rank` on; the others have no places.
    Filled in the order of the examples, in packs within evaluation's budget, so that a resumed run has the same bits.
    Raises UsageError where the machine has no room for it.
    """

    def __init__(
        self, model, layers: nn.ModuleList, first: int, examples: Sequence[packing.Example], plain: bool,
        rank: int = 0, ranks: int = 1,
    ):  # fmt: skip
        self.examples, trees, size, own = [], [], 0, []
        for i, x in enumerate(examples):
            if i % ranks != rank:
                self.examples.append(x)
                continue
            own.append(i)
            tree = packing.Tree.from_options([(0, x, range(len(x.encodings)))])
            places = [[size + node for node in tree.paths[0, k]] for k in range(len(x.encodings))]
            self.examples.append(dataclasses.replace(x, places=places))
            trees.append(tree)
            size += len(tree.tokens)
        width = model.config.get_text_config().hidden_size
        needed, free = size * width * model.dtype.itemsize, psutil.virtual_memory().available
        what = f"--zo_cache_activations: {len(own)} rows, {size} tokens of width {width}: {needed / 1e6:.1f} MB"
        if needed > 0.9 * free:
            raise UsageError(
                f"{what}, but {free / 1e6:.0f} MB are free: take fewer --num_train rows, half precision, or no cache"
            )
        logger.info("%s on the host", what)
        self.states = torch.empty(size, width, dtype=model.dtype)
        device = input_device(model)
        for group in group_by_tokens(trees):
            members = [self.examples[own[i]] for i in group]
            forest = packing.build_trees(members, plain_rows=True) if plain else [
                packing.Tree.from_options([(e, x, range(len(x.encodings)))]) for e, x in enumerate(members)
            ]  # fmt: skip
            batch = packing.to_tensors(members, forest, plain)
            real = batch["attention_mask" if plain else "end"] > 0
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            hidden = capture_hidden_states(layers[first], lambda batch=batch: logprobs.option_logprobs(model, batch))
            self.states[batch["stored"].cpu()[real]] = hidden.cpu()[real]

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """[R, N, D]: the states of a packed batch of these examples, on its device."""
        return self.states[batch["stored"].cpu()].to(batch["input_ids"].device)


def group_by_tokens(trees: Sequence[packing.Tree]) -> Iterator[range]:
    """Numbers of trees, in order, in groups of at most evaluation's budget of tokens."""
    first, used = 0, 0
    for i, tree in enumerate(tqdm(trees, desc="caching", unit="row", leave=False)):
        if i > first and used + len(tree.tokens) > packing.MAX_TOKENS:
            yield range(first, i)
            first, used = i, 0
        used += len(tree.tokens)
    if trees:
        yield range(first, len(trees))
