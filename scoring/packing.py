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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ATTENTION_LENGTH = (
    1000  # a row of this many tokens spends as long in attention as in matrix products (measured, 135M, CPU)
)
MAX_TOKENS = 2048  # of one forward in evaluation: more are not faster, and take more memory
MAX_READS = 256  # places where one forward in evaluation computes logits, which is what its memory goes to
MIN_SHARED_TOKENS = 16  # tokens that all examples must begin with to be worth a cache


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
            shared, size = common_prefix_len(previous, ids), len(tree.tokens)
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


def common_prefix_len(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two lists."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def row_cost(length: float) -> float:
    """What a row of this many tokens costs, in tokens: attention grows with the square."""
    return length * (1 + length / ATTENTION_LENGTH)


def build_trees(examples: Sequence[Example], plain: bool = False, start: int = 0) -> list[Tree]:
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
            joined = length + size - (common_prefix_len(groups[-1][-1][1].encodings[0], x.encodings[0]) - start)
            reads += sum(x.option_lens)
            if joined <= MAX_TOKENS and reads <= MAX_READS and row_cost(joined) < row_cost(length) + row_cost(size):
                groups[-1].append(member)
                length = joined
                continue
        groups.append([member])
        made.append(alone)
        length, reads = size, sum(x.option_lens)
    return [tree if len(group) == 1 else Tree.of(group, start) for tree, group in zip(made, groups, strict=True)]


def pack(examples: Sequence[Example], plain: bool = False) -> dict[str, Tensor]:
    """Lay examples out for one forward, see `layout`. With `plain`, one row a candidate, right-padded."""
    return to_tensors(examples, build_trees(examples, plain), plain)


def to_tensors(examples: Sequence[Example], forest: Sequence[Tree], plain: bool = False) -> dict[str, Tensor]:
    """Trees as tensors: R rows of N tokens, M places to read, T option tokens, O options, E examples, all int64.

    Tokens [R, N]: `input_ids`, `position_ids`, `end`: the column where the part of the tree below a token ends (0 for
    filling); with `plain` in place of it `attention_mask`. Places [M]: `read_row`, `read_column`. Option tokens [T]:
    `token_read` (index into places), `token_target`, `token_option`. Options [O]: `option_lens`, `option_example`,
    `option_index`. Examples [E], in the order of the trees: `label`. Where the examples have `places`, also `stored`
    [R, N]: the place of each token in the store.
    """
    sizes = [len(tree.tokens) for tree in forest]
    places = [(r, 0) for r in range(len(forest))] if plain else bin_pack(sizes)
    n_rows = max(r for r, _ in places) + 1
    width = max(start + size for (_, start), size in zip(places, sizes, strict=True))
    keys = option_keys(forest)
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


def option_keys(forest: Sequence[Tree]) -> list[tuple[int, int]]:
    """(example, option) of everything that these trees score, in their order."""
    return [key for tree in forest for key in tree.reads]


def bin_pack(sizes: Sequence[int]) -> list[tuple[int, int]]:
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


def batch_trees(forest: Sequence[Tree], tokens: int, reads: int, padded: bool = False) -> Iterator[list[Tree]]:
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


def split_by_prefix(encodings: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of those that begin like most of them, and of the others: a prompt that was cut on its left lost the
    beginning that it had in common with the rest. One part where no beginning is shared by more than half."""
    beginnings = [tuple(ids[:MIN_SHARED_TOKENS]) for ids in encodings]
    usual, n = Counter(beginnings).most_common(1)[0] if beginnings else ((), 0)
    if not len(beginnings) / 2 < n < len(beginnings):
        return [list(range(len(beginnings)))]
    return [[i for i, b in enumerate(beginnings) if (b == usual) == wanted] for wanted in (True, False)]


def shared_prefix_len(examples: Sequence[Example]) -> int:
    """How many tokens all encodings begin with, short of the first place that is read; 0 where no cache is worth it."""
    encodings = [ids for x in examples for ids in x.encodings]
    if len(encodings) < 2:
        return 0
    first_read = min(x.positions(k)[0] - 1 for x in examples for k in range(len(x.encodings)))
    shared = min(common_prefix_len(min(encodings), max(encodings)), first_read)
    return shared if shared >= MIN_SHARED_TOKENS else 0


def num_tokens(x: Example) -> int:
    """About how many tokens of an example go through the model: the prompt once, and all options."""
    return len(x.encodings[0]) - x.option_lens[0] + sum(x.option_lens)


def loss_terms(examples: Sequence[Example], classification: bool) -> int:
    """How many things `scoring.loss` is the mean of: examples, or option tokens."""
    return (
        len(examples) if classification else sum(len(x.positions(k)) for x in examples for k in range(len(x.encodings)))
    )
