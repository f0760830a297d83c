"""Log-probabilities of options under a model: the one path that training losses and evaluation both take.

A packed batch (`packing.py`) goes through the model in one forward, and only the logits that are read are
computed. The common beginning of all examples (shared demonstrations) goes in first, into a key-value cache.
A score equals the plain computation, one row for each candidate, to float rounding; `supports_packed_rows`
finds out whether a model can do this.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import Cache

from prefix import SharedCacheLayer, trained_prefix
from scoring.packing import (
    MAX_READS,
    MAX_TOKENS,
    MIN_SHARED_TOKENS,
    Example,
    batch_trees,
    build_trees,
    option_keys,
    shared_prefix_len,
    split_by_prefix,
    to_tensors,
)
from utils import input_device


def attention_mask(end: Tensor, num_cached: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of packed rows.

    A token sees itself, the tokens above it in its tree, and the whole cache.

    Args:
        end: [R, N] int64, the column where the part of the tree below each token ends.
        num_cached: number of tokens in the key-value cache.

    Returns:
        [R, 1, N, cached + N]: 0 where a token (third axis) sees another (last axis), otherwise the dtype's
            minimum.
    """
    column = torch.arange(end.shape[1], device=end.device)
    visible = (column[:, None] >= column) & (column[:, None] < end[:, None, :])  # [R, N, N]
    mask = torch.zeros((len(end), end.shape[1], num_cached + end.shape[1]), dtype=dtype, device=end.device)
    mask[..., num_cached:].masked_fill_(~visible, torch.finfo(dtype).min)
    return mask[:, None]


@torch.inference_mode()
def encode_shared_prefix(model: nn.Module, ids: list[int]) -> Cache:
    """Return the keys and values of the common beginning of all rows, for any number of rows.

    The beginning is the trained prefix, where the model has one, and the tokens `ids` behind the prefix.
    """
    prefix = trained_prefix(model)
    if not ids:
        return prefix.shared_cache(model.dtype)
    device = input_device(model)
    head = model.get_output_embeddings()
    # nothing reads the logits: the head computes those of the last token alone
    hook = head.register_forward_pre_hook(lambda head, args: (args[0][:, -1:], *args[1:]))
    try:
        cache = prefix.growing_cache(model) if prefix else DynamicCache(config=model.config)
        model(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
    finally:
        hook.remove()
    return Cache(layers=[SharedCacheLayer(layer.keys, layer.values) for layer in cache.layers])


def token_logprobs(
    model: nn.Module,
    batch: dict[str, Tensor],
    cache: Cache | None = None,
    copies: int = 1,
) -> Tensor:
    """Return the log-probability of every option token of a packed batch; one forward.

    Args:
        batch: see `packing.to_tensors`.
        cache: the common beginning of all rows, see `encode_shared_prefix`. Positions count from behind a
            trained prefix.
        copies: the rows go in so many times, one behind the other, for a model that perturbs each copy by
            itself.

    Returns:
        [copies, T] fp32.
    """
    prefix = trained_prefix(model)
    if prefix and not cache:
        cache = prefix.shared_cache(model.dtype)
    num_cached = cache.get_seq_length() if cache else 0
    if "end" in batch:
        mask = attention_mask(batch["end"], num_cached, model.dtype)
        positions = batch["position_ids"] + (prefix.length if prefix else 0)
        inputs = {"attention_mask": mask.repeat(copies, 1, 1, 1), "position_ids": positions.repeat(copies, 1)}
    else:
        mask = nn.functional.pad(batch["attention_mask"], (num_cached, 0), value=1)
        inputs = {"attention_mask": mask.repeat(copies, 1)}

    def select_places(head, args):
        """Give the head the hidden states [copies, M, D] that are read, out of [copies · R, N, D]."""
        rows, columns = (batch[name].to(args[0].device) for name in ("read_row", "read_column"))
        return (args[0].unflatten(0, (copies, -1))[:, rows, columns], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select_places)
    try:
        outputs = model(
            input_ids=batch["input_ids"].repeat(copies, 1), past_key_values=cache, use_cache=False, **inputs
        )
        logits = outputs.logits.float()  # [copies, M, V]
    finally:
        hook.remove()
    places = batch["token_read"]
    return logits[:, places, batch["token_target"]] - logits.logsumexp(-1)[:, places]


def option_logprobs(
    model: nn.Module,
    batch: dict[str, Tensor],
    cache: Cache | None = None,
    copies: int = 1,
) -> Tensor:
    """Return the log-probability of every option, [copies, O] fp32; arguments as of `token_logprobs`."""
    logprobs = token_logprobs(model, batch, cache, copies)
    if logprobs.device.type == "mps":  # which has no `segment_reduce`
        sums = logprobs.new_zeros(copies, len(batch["option_lens"]))
        return sums.index_add(1, batch["token_option"], logprobs)
    # tokens lie in the order of the options; on a GPU `index_add` would sum them in another order each time
    return torch.segment_reduce(logprobs.T.contiguous(), "sum", lengths=batch["option_lens"], unsafe=True).T


def option_hidden_states(model: nn.Module, batch: dict[str, Tensor], cache: Cache | None = None) -> Tensor:
    """Return the input of the head where the head predicts each option, of one token, [1, O, D] fp32."""
    inputs_of_head: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda head, args: inputs_of_head.append(args[0]))
    try:
        option_logprobs(model, batch, cache)
    finally:
        hook.remove()
    rows, columns = batch["read_row"], batch["read_column"]
    states = inputs_of_head[0].to(rows.device)[rows, columns][batch["token_read"]].float()
    return torch.zeros_like(states).index_copy(0, batch["token_option"], states)[None]


def loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    classification: bool,
    copies: int | None = None,
) -> Tensor:
    """Return the training loss of a packed batch, 0-dim fp32, or [copies] where `copies` is given.

    Args:
        classification: cross-entropy over the options of each example, whose scores are the mean
            log-probabilities of their tokens. Otherwise language modelling: the mean negative log-probability
            of all option tokens of the batch.
        copies: see `token_logprobs`.
    """
    n = copies or 1
    if not classification:
        losses = -token_logprobs(model, batch, copies=n).mean(1)
    else:
        means = option_logprobs(model, batch, copies=n) / batch["option_lens"]
        scores = means.new_full((n, len(batch["label"]), int(batch["option_index"].max()) + 1), -torch.inf)
        scores[:, batch["option_example"], batch["option_index"]] = means
        labels = batch["label"].repeat(n)
        example_losses = nn.functional.cross_entropy(scores.flatten(0, 1), labels, reduction="none")
        losses = example_losses.unflatten(0, (n, -1)).mean(1)
    return losses if copies else losses[0]


@torch.inference_mode()
def score(
    model: nn.Module,
    examples: Sequence[Example],
    budget: int = MAX_TOKENS,
    plain_rows: bool = False,
    progress: bool = False,
    readout: Callable | None = None,
) -> list[list]:
    """Return the log-probability of each option of each example, in input order.

    The model is left in evaluation mode.

    Args:
        budget: tokens of one forward.
        readout: function of (model, batch, cache) -> [1, O, …] that takes the place of `option_logprobs`.

    Raises:
        FloatingPointError: the model gives NaN, which a comparison of scores would hide.
    """
    model.eval()
    parts = [] if plain_rows else split_by_prefix([x.encodings[0] for x in examples])
    if len(parts) > 1:
        scores_by_index: dict[int, list] = {}
        for part in parts:
            part_scores = score(model, [examples[i] for i in part], budget, plain_rows, progress, readout)
            scores_by_index |= zip(part, part_scores, strict=True)
        return [scores_by_index[i] for i in range(len(examples))]
    device = input_device(model)
    readout = readout or option_logprobs
    start = 0 if plain_rows else shared_prefix_len(examples)
    cache = encode_shared_prefix(model, examples[0].encodings[0][:start]) if start else None
    values: dict[tuple[int, int], float] = {}
    with tqdm(total=len(examples), unit="ex", disable=not progress, desc="evaluating", leave=False) as bar:
        forest = build_trees(examples, plain_rows, start)
        for group in batch_trees(forest, budget, MAX_READS, padded=plain_rows):
            tensors = to_tensors(examples, group, plain_rows)
            batch = {name: tensor.to(device) for name, tensor in tensors.items()}
            keys = option_keys(group)
            values |= zip(keys, readout(model, batch, cache)[0].tolist(), strict=True)
            bar.update(sum(k == 0 for _, k in keys))
    scores = [[values[i, k] for k in range(len(x.encodings))] for i, x in enumerate(examples)]
    if any(value != value for row in scores for value in row):
        raise FloatingPointError("the model gives NaN as the log-probability of an option")
    return scores


def supports_packed_rows(model: nn.Module, max_length: int = MAX_TOKENS) -> bool:
    """Return whether this model scores packed rows as it scores plain ones.

    Short examples are scored both ways, with and without a beginning that all of them share and that a cache
    holds. A kernel that drops the mask, positions that can't restart (ALiBi) or windows in attention that are
    shorter than a row or a prompt would give silent wrong numbers; such a model gets plain rows.

    Args:
        max_length: tokens of the longest prompt.
    """
    if _attends_in_windows(model.config.get_text_config(), max(MAX_TOKENS, max_length)):
        return False
    probes = _probe_examples(model.config.get_text_config().vocab_size - 1)
    try:
        packed_scores = [row for examples in probes for row in score(model, examples)]
    except Exception:  # a model that can't take the mask may fail in any way
        return False
    plain_scores = [row for examples in probes for row in score(model, examples, plain_rows=True)]
    absolute, relative = (1e-3, 1e-4) if model.dtype == torch.float32 else (0.1, 0.02)
    if getattr(model, "is_quantized", False):  # a rounding of an activation to 8 bits may go either way
        absolute, relative = 0.5, 0.05
    return all(
        abs(a - b) <= absolute + relative * abs(a)
        for x, y in zip(packed_scores, plain_scores, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def _attends_in_windows(config, max_length: int) -> bool:
    """Return whether a layer may see less than all of a row of `max_length` tokens."""
    layer_kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    # Gemma 2 has some layers with a window, and the window is wide enough
    unlimited_kinds = {"full_attention", "global"} | ({"sliding_attention"} if window else set())
    return bool(window and window <= max_length) or not layer_kinds <= unlimited_kinds


def _probe_examples(largest_id: int) -> tuple[list[Example], list[Example]]:
    """Return short examples of ids up to `largest_id`, and the same behind a prefix that is worth a cache."""
    prompts = [[min(largest_id, 5 + 7 * i + j) for i in range(9 + 4 * j)] for j in range(2)]
    prompts.append([*prompts[1][:-1], 2])  # begins like another one
    long_prompts = [
        [min(largest_id, 3 * i + 1) for i in range(MIN_SHARED_TOKENS)] + prompt for prompt in prompts
    ]
    endings = [[3, 4, 6], [8, 4], [3, 9, 7, 6]]
    lens = [len(ending) for ending in endings]
    short_examples = [Example([prompt + ending for ending in endings], lens) for prompt in prompts]
    long_examples = [Example([prompt + ending for ending in endings], lens) for prompt in long_prompts]
    return short_examples, long_examples
