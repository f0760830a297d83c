"""The output of the lower layers, run once: for all points of a step, or for all steps on a training row.

The lower layers are the decoder layers below the lowest one that is perturbed. What they give is the same for
every sign and every query of a step, and the same in every step while no weight below is trained.

`capture_hidden_states` runs the lower layers alone. Inside `skip_lower_layers` a forward takes hidden states
from outside in their place. `ActivationCache` keeps the hidden states of all training rows. No `forward` is
patched: pre-hooks do it, and modules that pass on their input.
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
    """Carries hidden states out of a forward, which ends there."""

    def __init__(self, hidden_states: Tensor):
        self.hidden_states = hidden_states


class IdentityLayer(nn.Module):
    """Stands in the place of a decoder layer and passes on the hidden states, [1, R, N, D] or [R, N, D].

    Some models take the output of a layer as the hidden states, others (Falcon, BLOOM, GPT-J) take `[0]` of
    the output. So the output gets an axis in front, which the second kind drops again; the input may have
    that axis or not.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # some models choose a mask by it

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states if hidden_states.dim() == 4 else hidden_states[None]


def capture_hidden_states(layer: nn.Module, forward: Callable) -> Tensor | None:
    """Run a model up to a layer and return the hidden states that come to the layer.

    Args:
        layer: where the forward stops.
        forward: runs the model on R rows of N tokens.

    Returns:
        [R, N, D] in the model's dtype; None where the forward never came to the layer.
    """

    def stop(module, args, kwargs):
        raise _HiddenStatesCaptured(args[0] if args else kwargs["hidden_states"])

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.inference_mode():
            forward()
    except _HiddenStatesCaptured as captured:
        return captured.hidden_states
    finally:
        hook.remove()
    return None


@contextlib.contextmanager
def skip_lower_layers(layers: nn.ModuleList, first_layer: int, hidden_states: Tensor) -> Iterator[None]:
    """Inside, the layers below `first_layer` do nothing, and layer `first_layer` gets given hidden states.

    Args:
        layers: the decoder layers.
        first_layer: number of the layer that gets the hidden states.
        hidden_states: [R, N, D] for a batch of R rows, or for one that holds copies of these rows one behind
            the other.
    """

    def replace_input(module, args, kwargs):
        rows = args[0] if args else kwargs["hidden_states"]
        states = hidden_states.repeat(rows.shape[-3] // len(hidden_states), 1, 1)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    lower_layers = list(layers[:first_layer])
    hook = layers[first_layer].register_forward_pre_hook(replace_input, with_kwargs=True)
    try:
        for i, layer in enumerate(lower_layers):
            layers[i] = IdentityLayer(layer)
        yield
    finally:
        hook.remove()
        for i, layer in enumerate(lower_layers):
            layers[i] = layer


def reuse_lower_layers(
    place: tuple[nn.ModuleList, int] | None, forward: Callable, cached_states: Tensor | None = None
) -> contextlib.AbstractContextManager:
    """Return a context in which `forward` runs the upper layers alone.

    Args:
        place: the decoder layers, and the number of the lowest one that is perturbed; None: not known.
        forward: runs the model; outside the context it is run once, up to the lowest perturbed layer.
        cached_states: the hidden states that come to that layer, where an `ActivationCache` holds them.
    """
    layers, first_layer = place or (None, 0)
    if first_layer == 0:
        return contextlib.nullcontext()
    hidden_states = (
        capture_hidden_states(layers[first_layer], forward) if cached_states is None else cached_states
    )
    return (
        contextlib.nullcontext()
        if hidden_states is None
        else skip_lower_layers(layers, first_layer, hidden_states)
    )


class ActivationCache:
    """The hidden states that come to layer `first`, for every token of the training examples.

    The cache is filled in the order of the examples, in groups within evaluation's budget of tokens, so that
    a resumed run has the same bits.

    Args:
        layers, first: the decoder layers of the model, and the number of the lowest one that is perturbed.
        plain: one padded row a candidate instead of packed rows.
        rank, world_size: of several ranks each keeps every `world_size`-th example, from number `rank` on.

    Attributes:
        states: [tokens, D] on the host, in the model's dtype.
        examples: the given examples; those that are kept here know the rows of their tokens (`cache_rows`).

    Raises:
        UsageError: the machine has no room for the cache.
    """

    def __init__(
        self, model, layers: nn.ModuleList, first_layer: int, examples: Sequence[packing.Example],
        plain_rows: bool, rank: int = 0, world_size: int = 1,
    ):  # fmt: skip
        self.examples = list(examples)
        indices = range(rank, len(examples), world_size)
        trees: list[packing.Tree] = []
        tokens = 0
        for i in indices:
            x = self.examples[i]
            tree = single_tree(0, x)
            cache_rows = [[tokens + node for node in tree.paths[0, k]] for k in range(len(x.encodings))]
            self.examples[i] = dataclasses.replace(x, cache_rows=cache_rows)
            trees.append(tree)
            tokens += len(tree.tokens)
        self.states = self._allocate(model, len(indices), tokens)
        for group in group_by_tokens(trees):
            self._fill(model, layers[first_layer], [self.examples[indices[i]] for i in group], plain_rows)

    def _allocate(self, model, rows: int, tokens: int) -> Tensor:
        width = model.config.get_text_config().hidden_size
        needed_bytes = tokens * width * model.dtype.itemsize
        free_bytes = psutil.virtual_memory().available
        shape = f"{rows} rows, {tokens} tokens of width {width}"
        size = f"--zo_cache_activations: {shape}: {needed_bytes / 1e6:.1f} MB"
        if needed_bytes > 0.9 * free_bytes:
            advice = "take fewer --num_train rows, half precision, or no cache"
            raise UsageError(f"{size}, but {free_bytes / 1e6:.0f} MB are free: {advice}")
        logger.info("%s on the host", size)
        return torch.empty(tokens, width, dtype=model.dtype)

    def _fill(self, model, layer: nn.Module, examples: list[packing.Example], plain_rows: bool) -> None:
        """Run the lower layers on these examples and keep what comes to `layer`."""
        if plain_rows:
            forest = packing.build_trees(examples, plain_rows=True)
        else:
            forest = [single_tree(i, x) for i, x in enumerate(examples)]
        batch = packing.to_tensors(examples, forest, plain_rows)
        is_token = batch["attention_mask" if plain_rows else "end"] > 0  # the rest is filling
        device = input_device(model)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        hidden_states = capture_hidden_states(layer, lambda: logprobs.option_logprobs(model, batch))
        self.states[batch["cache_rows"].cpu()[is_token]] = hidden_states.cpu()[is_token]

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the hidden states of a packed batch of these examples, [R, N, D] on the batch's device."""
        return self.states[batch["cache_rows"].cpu()].to(batch["input_ids"].device)


def single_tree(index: int, example: packing.Example) -> packing.Tree:
    """Return a tree that holds all options of one example and shares nothing with other examples."""
    return packing.Tree.from_options([(index, example, range(len(example.encodings)))])


def group_by_tokens(trees: Sequence[packing.Tree]) -> Iterator[range]:
    """Yield the numbers of trees, in order, in groups of at most evaluation's budget of tokens."""
    begin, tokens = 0, 0
    for i, tree in enumerate(tqdm(trees, desc="caching", unit="row", leave=False)):
        if i > begin and tokens + len(tree.tokens) > packing.MAX_TOKENS:
            yield range(begin, i)
            begin, tokens = i, 0
        tokens += len(tree.tokens)
    if trees:
        yield range(begin, len(trees))
