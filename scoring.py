"""Log-probabilities of options under a model: the one path that training losses and evaluation both take.

Each distinct token goes through the model once. Token sequences with a common beginning form a tree: the candidates of
an example, and examples that begin alike, such as the questions of one paragraph. The last token of a candidate never
goes in, since nothing reads what it predicts. Trees lie end to end in rows instead of being padded to the longest. One
rule makes the attention mask: a token sees the tokens above it in its tree. Positions count from the root, and logits
are computed only at the places that are read. What all examples begin with (shared demonstrations) goes in first, into
a key-value cache. A score equals the plain one-row-per-candidate computation to float rounding; `takes_packed` finds
out whether a model can do this, and where it can't, `plain=True` uses such rows.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import Cache

from placement import input_device
from prefix import KeptLayer, trained_prefix

ATTENTION = 1000  # a row of this many tokens spends as long in attention as in matrix products (measured, 135M, CPU)
TOKENS = 2048  # of one forward in evaluation: more are not faster, and take more memory
READS = 256  # places where one forward in evaluation computes logits, which is what its memory goes to
SHARED = 16  # tokens that all examples must begin with to be worth a cache


@dataclass(frozen=True)
class Example:
    """Token ids of each option behind its prompt, how many of them are the option's, and which option is right.

    The option's tokens are the last ones, unless `targets` names their positions. `places`: of each token that goes
    into the model, where a store (bottom.py) holds its hidden state.
    """

    encodings: list[list[int]]
    option_lens: list[int]
    label: int = 0
    targets: list[list[int]] | None = None
    places: list[list[int]] | None = None

    def positions(self, option: int) -> Sequence[int]:
        """Where in its encoding the tokens of an option stand."""
        if self.targets is not None:
            return self.targets[option]
        return range(len(self.encodings[option]) - self.option_lens[option], len(self.encodings[option]))


@dataclass
class Tree:
    """Token sequences of some examples, merged where they begin alike, as they lie in a row: depth first."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # of each token, where the part of the tree below it ends
    reads: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    # (example, option) -> [(token that predicts it, target id)]
    paths: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (example, option) -> its tokens

    @classmethod
    def of(cls, chosen: Sequence[tuple[int, Example, Sequence[int]]], start: int = 0) -> "Tree":
        """The tree of (index, example, its options); the first `start` tokens, common to all, lie in a cache."""
        tree = cls()
        sequences = [(x.encodings[k][start:-1], i, k, x) for i, x, options in chosen for k in options]
        path: list[int] = []  # nodes from the root to the last token of the sequence at hand
        previous: list[int] = []
        for ids, i, k, x in sorted(sequences, key=lambda sequence: sequence[0]):
            shared, size = common(previous, ids), len(tree.tokens)
            for node in path[shared:]:
                tree.ends[node] = size
            new = len(ids) - shared
            path[shared:] = range(size, size + new)
            tree.tokens += ids[shared:]
            tree.positions += range(start + shared, start + len(ids))
            tree.ends += [0] * new
            tree.paths[i, k] = [*path]
            tree.reads[i, k] = [(path[p - 1 - start], x.encodings[k][p]) for p in x.positions(k)]
            previous = ids
        for node in path:
            tree.ends[node] = len(tree.tokens)
        return tree


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two lists."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def row_cost(length: float) -> float:
    """What a row of this many tokens costs, in tokens: attention grows with the square."""
    return length * (1 + length / ATTENTION)


def trees(examples: Sequence[Example], plain: bool = False, start: int = 0) -> list[Tree]:
    """Examples as trees; those that begin alike share one where that is cheaper. With `plain`, a tree a candidate."""
    if plain:
        return [Tree.of([(i, x, [k])]) for i, x in enumerate(examples) for k in range(len(x.encodings))]
    groups, made, length, reads = [], [], 0, 0
    for i in sorted(range(len(examples)), key=lambda i: examples[i].encodings[0]):
        x = examples[i]
        member = (i, x, range(len(x.encodings)))
        alone = Tree.of([member], start)
        size = len(alone.tokens)
        if groups:
            joined = length + size - (common(groups[-1][-1][1].encodings[0], x.encodings[0]) - start)
            reads += sum(x.option_lens)
            if joined <= TOKENS and reads <= READS and row_cost(joined) < row_cost(length) + row_cost(size):
                groups[-1].append(member)
                length = joined
                continue
        groups.append([member])
        made.append(alone)
        length, reads = size, sum(x.option_lens)
    return [tree if len(group) == 1 else Tree.of(group, start) for tree, group in zip(made, groups, strict=True)]


def pack(examples: Sequence[Example], plain: bool = False) -> dict[str, Tensor]:
    """Lay examples out for one forward, see `layout`. With `plain`, one row a candidate, right-padded."""
    return layout(examples, trees(examples, plain), plain)


def layout(examples: Sequence[Example], forest: Sequence[Tree], plain: bool = False) -> dict[str, Tensor]:
    """Trees as tensors: R rows of N tokens, M places to read, T option tokens, O options, E examples, all int64.

    Tokens [R, N]: `input_ids`, `position_ids`, `end`: the column where the part of the tree below a token ends (0 for
    filling); with `plain` in place of it `attention_mask`. Places [M]: `read_row`, `read_column`. Option tokens [T]:
    `token_read` (index into places), `token_target`, `token_option`. Options [O]: `option_lens`, `option_example`,
    `option_index`. Examples [E], in the order of the trees: `label`. Where the examples have `places`, also `stored`
    [R, N]: the place of each token in the store.
    """
    sizes = [len(tree.tokens) for tree in forest]
    places = [(r, 0) for r in range(len(forest))] if plain else fit(sizes)
    n_rows = max(r for r, _ in places) + 1
    width = max(start + size for (_, start), size in zip(places, sizes, strict=True))
    keys = options(forest)
    rank = {key: o for o, key in enumerate(keys)}
    chosen = {i: e for e, i in enumerate(dict.fromkeys(i for i, _ in keys))}

    names = ["input_ids", "position_ids", "end"] + ["stored"] * (examples[0].places is not None)
    tokens = {name: torch.zeros((n_rows, width), dtype=torch.int64) for name in names}
    reads: dict[tuple[int, int], int] = {}
    option_tokens = []
    for tree, (r, start) in zip(forest, places, strict=True):
        span = slice(start, start + len(tree.tokens))
        tokens["input_ids"][r, span] = torch.tensor(tree.tokens)
        tokens["position_ids"][r, span] = torch.tensor(tree.positions)
        tokens["end"][r, span] = torch.tensor(tree.ends) + start
        for key, wanted in tree.reads.items():
            for node, target in wanted:
                option_tokens.append((reads.setdefault((r, start + node), len(reads)), target, rank[key]))
            if "stored" in tokens:
                i, k = key
                tokens["stored"][r, start + torch.tensor(tree.paths[key])] = torch.tensor(examples[i].places[k])
    if plain:
        tokens["attention_mask"] = (tokens.pop("end") > 0).long()
    token_columns = zip(("read", "target", "option"), zip(*option_tokens, strict=True), strict=True)
    return {
        **tokens,
        "read_row": torch.tensor([r for r, _ in reads]),
        "read_column": torch.tensor([c for _, c in reads]),
        **{f"token_{name}": torch.tensor(values) for name, values in token_columns},
        "option_lens": torch.tensor([len(examples[i].positions(k)) for i, k in keys]),
        "option_example": torch.tensor([chosen[i] for i, _ in keys]),
        "option_index": torch.tensor([k for _, k in keys]),
        "label": torch.tensor([examples[i].label for i in chosen]),
    }


def options(forest: Sequence[Tree]) -> list[tuple[int, int]]:
    """(example, option) of everything that these trees score, in their order."""
    return [key for tree in forest for key in tree.reads]


def fit(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(row, start) of each item, in the number of rows that is cheapest: R rows of N tokens cost R·row_cost(N).

    For each number of rows the longest items are placed first, each into the row that is shortest so far.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    best_cost, best = math.inf, []
    for n_rows in range(1, len(sizes) + 1):
        rows = [(0, r) for r in range(n_rows)]
        places = [(0, 0)] * len(sizes)
        for i in order:
            filled, r = rows[0]
            places[i] = (r, filled)
            heapq.heapreplace(rows, (filled + sizes[i], r))
        width = max(filled for filled, _ in rows)
        cost = n_rows * row_cost(width)
        if cost < best_cost:
            best_cost, best = cost, places
        if width == sizes[order[0]]:  # more rows only add filling
            break
    return best


def attention_mask(end: Tensor, cached: int, dtype: torch.dtype) -> Tensor:
    """[R, 1, N, cached + N], additive: 0 where a token (third axis) sees another (last axis), the dtype's minimum
    elsewhere. A token sees itself, those above it in its tree, and all that lies in the cache."""
    column = torch.arange(end.shape[1], device=end.device)
    sees = (column[:, None] >= column) & (column[:, None] < end[:, None, :])  # [R, N, N]
    mask = torch.zeros((len(end), end.shape[1], cached + end.shape[1]), dtype=dtype, device=end.device)
    mask[..., cached:].masked_fill_(~sees, torch.finfo(dtype).min)
    return mask[:, None]


@torch.inference_mode()
def beginning(model: nn.Module, ids: list[int]) -> Cache:
    """Keys and values of what all rows begin with: the trained prefix, where there is one, and these tokens, which one
    forward encodes. The cache serves any number of rows."""
    prefix = trained_prefix(model)
    if not ids:
        return prefix.cache(model.dtype)
    device = input_device(model)
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda head, args: (args[0][:, -1:], *args[1:]))  # nobody reads the logits
    try:
        grown = prefix.growing(model) if prefix else DynamicCache(config=model.config)
        model(input_ids=torch.tensor([ids], device=device), past_key_values=grown, use_cache=True)
    finally:
        hook.remove()
    return Cache(layers=[KeptLayer(layer.keys, layer.values) for layer in grown.layers])


def token_logprobs(model: nn.Module, batch: dict[str, Tensor], cache: Cache | None = None, copies: int = 1) -> Tensor:
    """[copies, T] fp32: log-probability of every option token of a packed batch; one forward.

    The rows go in `copies` times, one behind the other, for a model that shows each copy weights of its own. The cache
    holds what all rows begin with, see `beginning`; positions count from behind a trained prefix.
    """
    ids, columns, prefix = batch["input_ids"], batch["read_column"], trained_prefix(model)
    if prefix and not cache:
        cache = prefix.cache(model.dtype)
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


def option_sums(model: nn.Module, batch: dict[str, Tensor], cache: Cache | None = None, copies: int = 1) -> Tensor:
    """[copies, O] fp32: log-probability of every option."""
    logprobs = token_logprobs(model, batch, cache, copies)
    if logprobs.device.type == "mps":  # which has no `segment_reduce`
        return logprobs.new_zeros(copies, len(batch["option_lens"])).index_add(1, batch["token_option"], logprobs)
    # tokens lie in the order of the options; `index_add` would add them up in another order each time on a GPU
    return torch.segment_reduce(logprobs.T.contiguous(), "sum", lengths=batch["option_lens"], unsafe=True).T


def option_states(model: nn.Module, batch: dict[str, Tensor], cache: Cache | None = None) -> Tensor:
    """[1, O, D] fp32: what comes to the head where it predicts the token of each option, which has one."""
    found: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: found.append(args[0]))
    try:
        option_sums(model, batch, cache)
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
        means = option_sums(model, batch, copies=n) / batch["option_lens"]
        scores = means.new_full((n, len(batch["label"]), int(batch["option_index"].max()) + 1), -torch.inf)
        scores[:, batch["option_example"], batch["option_index"]] = means
        each = nn.functional.cross_entropy(scores.flatten(0, 1), batch["label"].repeat(n), reduction="none")
        losses = each.unflatten(0, (n, -1)).mean(1)
    return losses if copies else losses[0]


def batches(forest: Sequence[Tree], tokens: int, reads: int, padded: bool = False) -> Iterator[list[Tree]]:
    """Trees in groups within these bounds (one tree at least), longest first; `padded` to the longest or not."""
    group, used, read = [], 0, 0
    for tree in sorted(forest, key=lambda tree: -len(tree.tokens)):
        wanted = sum(map(len, tree.reads.values()))
        size = len(group[0].tokens) if padded and group else len(tree.tokens)
        if group and (used + size > tokens or read + wanted > reads):
            yield group
            group, used, read = [], 0, 0
        group.append(tree)
        used, read = used + (size if len(group) > 1 else len(tree.tokens)), read + wanted
    if group:
        yield group


@torch.inference_mode()
def score(
    model: nn.Module, examples: Sequence[Example], budget: int = TOKENS, plain: bool = False, progress: bool = False,
    read: Callable | None = None,
) -> list[list[float]]:  # fmt: skip
    """Log-probability of each option of each example, in input order; the model is left in eval mode. `read` may take
    something else of each option than its log-probability.

    Raises FloatingPointError where the model gives NaN, which a comparison of scores would hide.
    """
    model.eval()
    split = [] if plain else parts([x.encodings[0] for x in examples])
    if len(split) > 1:
        found = {}
        for part in split:
            found |= zip(part, score(model, [examples[i] for i in part], budget, plain, progress, read), strict=True)
        return [found[i] for i in range(len(examples))]
    device = input_device(model)
    start = 0 if plain else shared_beginning(examples)
    cache = beginning(model, examples[0].encodings[0][:start]) if start else None
    sums: dict[tuple[int, int], float] = {}
    with tqdm(total=len(examples), unit="ex", disable=not progress, desc="evaluating", leave=False) as bar:
        for group in batches(trees(examples, plain, start), budget, READS, padded=plain):
            batch = {name: tensor.to(device) for name, tensor in layout(examples, group, plain).items()}
            sums |= zip(options(group), (read or option_sums)(model, batch, cache)[0].tolist(), strict=True)
            bar.update(sum(k == 0 for _, k in options(group)))
    scores = [[sums[i, k] for k in range(len(x.encodings))] for i, x in enumerate(examples)]
    if any(value != value for values in scores for value in values):
        raise FloatingPointError("the model gives NaN as the log-probability of an option")
    return scores


def parts(encodings: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of those that begin like most of them, and of the others: a prompt that was cut on its left lost the
    beginning that it had in common with the rest. One part where no beginning is shared by more than half."""
    beginnings = [tuple(ids[:SHARED]) for ids in encodings]
    usual, n = Counter(beginnings).most_common(1)[0] if beginnings else ((), 0)
    if not len(beginnings) / 2 < n < len(beginnings):
        return [list(range(len(beginnings)))]
    return [[i for i, b in enumerate(beginnings) if (b == usual) == wanted] for wanted in (True, False)]


def shared_beginning(examples: Sequence[Example]) -> int:
    """How many tokens all encodings begin with, short of the first place that is read; 0 where no cache is worth it."""
    encodings = [ids for x in examples for ids in x.encodings]
    if len(encodings) < 2:
        return 0
    first_read = min(x.positions(k)[0] - 1 for x in examples for k in range(len(x.encodings)))
    shared = min(common(min(encodings), max(encodings)), first_read)
    return shared if shared >= SHARED else 0


def takes_packed(model: nn.Module, longest: int = TOKENS) -> bool:
    """Whether this model scores packed rows as it scores plain ones, found by scoring short examples both ways, with
    and without a beginning that all of them share and that a cache holds.

    A kernel that drops the mask, positions that can't restart (ALiBi) or windows in attention that are shorter than a
    row or the `longest` prompt would give silent wrong numbers; such a model gets plain rows.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    windows = {"sliding_attention"} if window else set()  # Gemma 2 has some of them, and a window that is wide enough
    if (window and window <= max(TOKENS, longest)) or kinds - {"full_attention", "global"} - windows:
        return False
    top = config.vocab_size - 1
    prompts = [[min(top, 5 + 7 * i + j) for i in range(9 + 4 * j)] for j in range(2)]
    prompts.append([*prompts[1][:-1], 2])  # begins like another one
    cached = [[min(top, 3 * i + 1) for i in range(SHARED)] + p for p in prompts]
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
