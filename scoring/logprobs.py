"""TODO scoring.logprobs."""

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


def attention_mask(end: Tensor, cached: int, dtype: torch.dtype) -> Tensor:
    """[R, 1, N, cached + N], additive: 0 where a token (third axis) sees another (last axis), the dtype's minimum
    elsewhere. A token sees itself, those above it in its tree, and all that lies in the cache."""
    column = torch.arange(end.shape[1], device=end.device)
    sees = (column[:, None] >= column) & (column[:, None] < end[:, None, :])  # [R, N, N]
    mask = torch.zeros((len(end), end.shape[1], cached + end.shape[1]), dtype=dtype, device=end.device)
    mask[..., cached:].masked_fill_(~sees, torch.finfo(dtype).min)
    return mask[:, None]


@torch.inference_mode()
def encode_shared_prefix(model: nn.Module, ids: list[int]) -> Cache:
    """Keys and values of what all rows begin with: the trained prefix, where there is one, and these tokens, which one
    forward encodes. The cache serves any number of rows."""
    prefix = trained_prefix(model)
    if not ids:
        return prefix.shared_cache(model.dtype)
    device = input_device(model)
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda head, args: (args[0][:, -1:], *args[1:]))  # nobody reads the logits
    try:
        grown = prefix.growing_cache(model) if prefix else DynamicCache(config=model.config)
        model(input_ids=torch.tensor([ids], device=device), past_key_values=grown, use_cache=True)
    finally:
        hook.remove()
    return Cache(layers=[SharedCacheLayer(layer.keys, layer.values) for layer in grown.layers])


def token_logprobs(model: nn.Module, batch: dict[str, Tensor], cache: Cache | None = None, copies: int = 1) -> Tensor:
    """[copies, T] fp32: log-probability of every option token of a packed batch; one forward.

    The rows go in `copies` times, one behind the other, for a model that shows each copy weights of its own. The cache
    holds what all rows begin with, see `beginning`; positions count from behind a trained prefix.
    """
    ids, columns, prefix = batch["input_ids"], batch["read_column"], trained_prefix(model)
    if prefix and not cache:
        cache = prefix.shared_cache(model.dtype)
    cached, front = cache.get_seq_length() if cache else 0, prefix.length if prefix else 0
    if "end" in batch:
        mask = attention_mask(batch["end"], cached, model.dtype).repeat(copies, 1, 1, 1)
        inputs = {"attention_mask": mask, "position_ids": (batch["position_ids"] + front).repeat(copies, 1)}
    else:
        mask = nn.functional.pad(batch["attention_mask"], (cached, 0), value=1)
        inputs = {"attention_mask": mask.repeat(copies, 1)}

    def read(head, args):  # hidden states [copies · R, N, D] -> [copies, M, D]: the logits stay in the model's hands
        rows, at = (index.to(args[0].device) for index in (batch["read_row"], columns))
        return (args[0].unflatten(0, (copies, -1))[:, rows, at], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(read)
    try:
        outputs = model(input_ids=ids.repeat(copies, 1), past_key_values=cache, use_cache=False, **inputs)
        logits = outputs.logits.float()  # [copies, M, V]
    finally:
        hook.remove()
    return logits[:, batch["token_read"], batch["token_target"]] - logits.logsumexp(-1)[:, batch["token_read"]]


def option_logprobs(model: nn.Module, batch: dict[str, Tensor], cache: Cache | None = None, copies: int = 1) -> Tensor:
    """[copies, O] fp32: log-probability of every option."""
    logprobs = token_logprobs(model, batch, cache, copies)
    if logprobs.device.type == "mps":  # which has no `segment_reduce`
        return logprobs.new_zeros(copies, len(batch["option_lens"])).index_add(1, batch["token_option"], logprobs)
    # tokens lie in the order of the options; `index_add` would add them up in another order each time on a GPU
    return torch.segment_reduce(logprobs.T.contiguous(), "sum", lengths=batch["option_lens"], unsafe=True).T


def option_hidden_states(model: nn.Module, batch: dict[str, Tensor], cache: Cache | None = None) -> Tensor:
    """[1, O, D] fp32: what comes to the head where it predicts the token of each option, which has one."""
    found: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: found.append(args[0]))
    try:
        option_logprobs(model, batch, cache)
    finally:
        hook.remove()
    states = found[0].to(batch["read_row"].device)[batch["read_row"], batch["read_column"]][batch["token_read"]].float()
    return torch.zeros_like(states).index_copy(0, batch["token_option"], states)[None]


def loss(model: nn.Module, batch: dict[str, Tensor], classification: bool, copies: int | None = None) -> Tensor:
    """0-dim fp32 training loss of a packed batch; with `copies`, [copies] of them, see `token_logprobs`.

    `classification`: cross-entropy over the options of each example, whose scores are the mean log-probabilities of
    their tokens. Otherwise language modelling: the mean negative log-probability of all option tokens of the batch.
    """
    n = copies or 1
    if not classification:
        losses = -token_logprobs(model, batch, copies=n).mean(1)
    else:
        means = option_logprobs(model, batch, copies=n) / batch["option_lens"]
        scores = means.new_full((n, len(batch["label"]), int(batch["option_index"].max()) + 1), -torch.inf)
        scores[:, batch["option_example"], batch["option_index"]] = means
        each = nn.functional.cross_entropy(scores.flatten(0, 1), batch["label"].repeat(n), reduction="none")
        losses = each.unflatten(0, (n, -1)).mean(1)
    return losses if copies else losses[0]


@torch.inference_mode()
def score(
    model: nn.Module, examples: Sequence[Example], budget: int = MAX_TOKENS, plain: bool = False, progress: bool = False,
    read: Callable | None = None,
) -> list[list[float]]:  # fmt: skip
    """Log-probability of each option of each example, in input order; the model is left in eval mode. `read` may take
    something else of each option than its log-probability.

    Raises FloatingPointError where the model gives NaN, which a comparison of scores would hide.
    """
    model.eval()
    split = [] if plain else split_by_prefix([x.encodings[0] for x in examples])
    if len(split) > 1:
        found = {}
        for part in split:
            found |= zip(part, score(model, [examples[i] for i in part], budget, plain, progress, read), strict=True)
        return [found[i] for i in range(len(examples))]
    device = input_device(model)
    start = 0 if plain else shared_prefix_len(examples)
    cache = encode_shared_prefix(model, examples[0].encodings[0][:start]) if start else None
    sums: dict[tuple[int, int], float] = {}
    with tqdm(total=len(examples), unit="ex", disable=not progress, desc="evaluating", leave=False) as bar:
        for group in batch_trees(build_trees(examples, plain, start), budget, MAX_READS, padded=plain):
            batch = {name: tensor.to(device) for name, tensor in to_tensors(examples, group, plain).items()}
            sums |= zip(option_keys(group), (read or option_logprobs)(model, batch, cache)[0].tolist(), strict=True)
            bar.update(sum(k == 0 for _, k in option_keys(group)))
    scores = [[sums[i, k] for k in range(len(x.encodings))] for i, x in enumerate(examples)]
    if any(value != value for values in scores for value in values):
        raise FloatingPointError("the model gives NaN as the log-probability of an option")
    return scores


def supports_packed_rows(model: nn.Module, longest: int = MAX_TOKENS) -> bool:
    """Whether this model scores packed rows as it scores plain ones, found by scoring short examples both ways, with
    and without a beginning that all of them share and that a cache holds.

    A kernel that drops the mask, positions that can't restart (ALiBi) or windows in attention that are shorter than a
    row or the `longest` prompt would give silent wrong numbers; such a model gets plain rows.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    windows = {"sliding_attention"} if window else set()  # Gemma 2 has some of them, and a window that is wide enough
    if (window and window <= max(MAX_TOKENS, longest)) or kinds - {"full_attention", "global"} - windows:
        return False
    top = config.vocab_size - 1
    prompts = [[min(top, 5 + 7 * i + j) for i in range(9 + 4 * j)] for j in range(2)]
    prompts.append([*prompts[1][:-1], 2])  # begins like another one
    cached = [[min(top, 3 * i + 1) for i in range(MIN_SHARED_TOKENS)] + p for p in prompts]
    probes = [[Example([[*p, 3, 4, 6], [*p, 8, 4], [*p, 3, 9, 7, 6]], [3, 2, 4]) for p in q] for q in (prompts, cached)]
    try:
        packed = [row for probe in probes for row in score(model, probe)]
    except Exception:  # a model that can't take the mask may fail in any way
        return False
    plain = [row for probe in probes for row in score(model, probe, plain=True)]
    absolute, relative = (1e-3, 1e-4) if model.dtype == torch.float32 else (0.1, 0.02)
    if getattr(model, "is_quantized", False):  # a rounding of an activation to 8 bits may go either way
        absolute, relative = 0.5, 0.05
    return all(
        abs(a - b) <= absolute + relative * abs(a)
        for x, y in zip(packed, plain, strict=True)
        for a, b in zip(x, y, strict=True)
    )
