"""Lay examples out in rows, so that each distinct token goes through the model once.

Token sequences with a common beginning form a tree: the candidates of an example, and examples that begin
alike, such as the questions about one paragraph. The last token of a candidate never goes in, since nothing
reads what it predicts. Trees lie end to end in rows instead of being padded to the longest. One rule makes
the attention mask: a token sees the tokens above it in its tree. Positions count from the root, and logits
are computed only at the places that are read (`logprobs.py`).

`plain_rows=True` everywhere means the plain layout: one right-padded row for each candidate, nothing shared.
The tests compare with plain rows, and a model that can't take packed rows gets them.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A row of this many tokens spends as long in attention as in matrix products (measured, 135M weights, CPU).
ATTENTION_LENGTH = 1000
MAX_TOKENS = 2048  # of one forward in evaluation: more are not faster, and take more memory
MAX_READS = 256  # places where one forward in evaluation computes logits, which take most of its memory
MIN_SHARED_TOKENS = 16  # tokens that all examples must begin with to be worth a cache


@dataclass(frozen=True)
class Example:
    """The token ids of a prompt with each of its options, and which option is right.

    Attributes:
        encodings: for each option, the prompt's tokens and the option's.
        option_lens: for each option, how many of its encoding's tokens are the option's.
        label: index of the right option.
        targets: for each option, the positions of its tokens; None where they are the last ones.
        cache_rows: for each option, where the activation cache holds the hidden state of each token that goes
            into the model; None without a cache.
    """

    encodings: list[list[int]]
    option_lens: list[int]
    label: int = 0
    targets: list[list[int]] | None = None
    cache_rows: list[list[int]] | None = None

    def positions(self, option: int) -> Sequence[int]:
        """Return the positions of an option's tokens in its encoding."""
        if self.targets is not None:
            return self.targets[option]
        length = len(self.encodings[option])
        return range(length - self.option_lens[option], length)


@dataclass
class Tree:
    """Token sequences of some examples, merged where they begin alike, as they lie in a row: depth first.

    Attributes:
        tokens: token id of each node.
        positions: position of each node in its sequence.
        ends: for each node, the index behind the last node below it.
        reads: {(example, option): [(node that predicts the token, token id), …]}.
        paths: {(example, option): nodes of its sequence}.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    reads: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    paths: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    @classmethod
    def from_options(cls, members: Sequence[tuple[int, Example, Sequence[int]]], start: int = 0) -> "Tree":
        """Build the tree of some options.

        Args:
            members: (index of the example, the example, its options that the tree holds).
            start: number of first tokens, common to all, that lie in a key-value cache and not in the tree.
        """
        tree = cls()
        sequences = [(x.encodings[k][start:-1], i, k, x) for i, x, options in members for k in options]
        path: list[int] = []  # nodes from the root to the last token of the current sequence
        previous_ids: list[int] = []
        for ids, i, k, x in sorted(sequences, key=lambda sequence: sequence[0]):
            shared_len = common_prefix_len(previous_ids, ids)
            size = len(tree.tokens)
            for node in path[shared_len:]:
                tree.ends[node] = size
            num_added = len(ids) - shared_len
            path[shared_len:] = range(size, size + num_added)
            tree.tokens += ids[shared_len:]
            tree.positions += range(start + shared_len, start + len(ids))
            tree.ends += [0] * num_added
            tree.paths[i, k] = [*path]
            tree.reads[i, k] = [(path[p - 1 - start], x.encodings[k][p]) for p in x.positions(k)]
            previous_ids = ids
        for node in path:
            tree.ends[node] = len(tree.tokens)
        return tree


def common_prefix_len(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common beginning of two lists."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def row_cost(length: float) -> float:
    """Return the cost of a row of this many tokens, in tokens: attention grows with the square."""
    return length * (1 + length / ATTENTION_LENGTH)


def build_trees(examples: Sequence[Example], plain_rows: bool = False, start: int = 0) -> list[Tree]:
    """Return examples as trees; examples that begin alike share a tree where that is cheaper.

    Args:
        plain_rows: give each candidate a tree of its own.
        start: number of first tokens, common to all examples, that lie in a key-value cache.
    """
    if plain_rows:
        options = [(i, x, k) for i, x in enumerate(examples) for k in range(len(x.encodings))]
        return [Tree.from_options([(i, x, [k])]) for i, x, k in options]
    groups = []  # members of each tree
    single_trees = []  # tree of the first member of each group
    length = reads = 0  # of the last group
    for i in sorted(range(len(examples)), key=lambda i: examples[i].encodings[0]):
        x = examples[i]
        member = (i, x, range(len(x.encodings)))
        tree = Tree.from_options([member], start)
        size = len(tree.tokens)
        if groups:
            shared_len = common_prefix_len(groups[-1][-1][1].encodings[0], x.encodings[0]) - start
            joined_len = length + size - shared_len
            reads += sum(x.option_lens)
            is_cheaper = row_cost(joined_len) < row_cost(length) + row_cost(size)
            if joined_len <= MAX_TOKENS and reads <= MAX_READS and is_cheaper:
                groups[-1].append(member)
                length = joined_len
                continue
        groups.append([member])
        single_trees.append(tree)
        length = size
        reads = sum(x.option_lens)
    return [
        tree if len(group) == 1 else Tree.from_options(group, start)
        for tree, group in zip(single_trees, groups, strict=True)
    ]


def pack(examples: Sequence[Example], plain_rows: bool = False) -> dict[str, Tensor]:
    """Return the tensors of one forward of these examples, see `to_tensors`."""
    return to_tensors(examples, build_trees(examples, plain_rows), plain_rows)


def to_tensors(
    examples: Sequence[Example],
    forest: Sequence[Tree],
    plain_rows: bool = False,
) -> dict[str, Tensor]:
    """Return trees as int64 tensors.

    There are R rows of N tokens, M places to read, T option tokens, O options and E examples.

    Returns:
        Tokens [R, N]: `input_ids`, `position_ids`, `end`: the column where the part of the tree below a token
            ends (0 for filling); with `plain_rows` in place of it `attention_mask`. Where the examples have
            `cache_rows`, also `cache_rows`: the row of each token in the activation cache.
        Places [M]: `read_row`, `read_column`.
        Option tokens [T]: `token_read` (index into places), `token_target` (token id), `token_option`.
        Options [O]: `option_lens`, `option_example`, `option_index`.
        Examples [E], in the order of the trees: `label`.
    """
    sizes = [len(tree.tokens) for tree in forest]
    starts = [(row, 0) for row in range(len(forest))] if plain_rows else bin_pack(sizes)
    keys = option_keys(forest)
    example_number = {i: e for e, i in enumerate(dict.fromkeys(i for i, _ in keys))}
    token_tensors = _token_tensors(examples, forest, starts)
    if plain_rows:
        token_tensors["attention_mask"] = (token_tensors.pop("end") > 0).long()
    places, option_tokens = _option_tokens(forest, starts, keys)
    token_read, token_target, token_option = zip(*option_tokens, strict=True)
    return {
        **token_tensors,
        "read_row": torch.tensor([row for row, _ in places]),
        "read_column": torch.tensor([column for _, column in places]),
        "token_read": torch.tensor(token_read),
        "token_target": torch.tensor(token_target),
        "token_option": torch.tensor(token_option),
        "option_lens": torch.tensor([len(examples[i].positions(k)) for i, k in keys]),
        "option_example": torch.tensor([example_number[i] for i, _ in keys]),
        "option_index": torch.tensor([k for _, k in keys]),
        "label": torch.tensor([examples[i].label for i in example_number]),
    }


def _token_tensors(
    examples: Sequence[Example], forest: Sequence[Tree], starts: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """Return the tensors [R, N] of `to_tensors`, each tree at its (row, first column)."""
    n_rows = 1 + max(row for row, _ in starts)
    width = max(start + len(tree.tokens) for tree, (_, start) in zip(forest, starts, strict=True))
    names = ["input_ids", "position_ids", "end"]
    if examples[0].cache_rows is not None:
        names.append("cache_rows")
    tensors = {name: torch.zeros((n_rows, width), dtype=torch.int64) for name in names}
    for tree, (row, start) in zip(forest, starts, strict=True):
        span = slice(start, start + len(tree.tokens))
        tensors["input_ids"][row, span] = torch.tensor(tree.tokens)
        tensors["position_ids"][row, span] = torch.tensor(tree.positions)
        tensors["end"][row, span] = torch.tensor(tree.ends) + start
        if "cache_rows" in tensors:
            for (i, k), path in tree.paths.items():
                columns = start + torch.tensor(path)
                tensors["cache_rows"][row, columns] = torch.tensor(examples[i].cache_rows[k])
    return tensors


def _option_tokens(
    forest: Sequence[Tree], starts: Sequence[tuple[int, int]], keys: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Return the places to read (row, column), and (place, token id, option) of every option token.

    A place that several option tokens are read from stands there once.
    """
    option_number = {key: o for o, key in enumerate(keys)}
    places: dict[tuple[int, int], int] = {}
    option_tokens = []
    for tree, (row, start) in zip(forest, starts, strict=True):
        for key, reads in tree.reads.items():
            for node, target in reads:
                place = places.setdefault((row, start + node), len(places))
                option_tokens.append((place, target, option_number[key]))
    return list(places), option_tokens


def option_keys(forest: Sequence[Tree]) -> list[tuple[int, int]]:
    """Return (example, option) of everything that these trees score, in their order."""
    return [key for tree in forest for key in tree.reads]


def bin_pack(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return (row, start) of each item, in the number of rows that is cheapest.

    R rows of N tokens cost R·row_cost(N). For each number of rows the longest items are placed first, each
    into the row that is shortest so far.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    best_cost = math.inf
    best_starts: list[tuple[int, int]] = []
    for n_rows in range(1, len(sizes) + 1):
        rows = [(0, row) for row in range(n_rows)]  # a heap of (tokens so far, row)
        starts = [(0, 0)] * len(sizes)
        for i in order:
            num_tokens, row = rows[0]
            starts[i] = (row, num_tokens)
            heapq.heapreplace(rows, (num_tokens + sizes[i], row))
        width = max(num_tokens for num_tokens, _ in rows)
        cost = n_rows * row_cost(width)
        if cost < best_cost:
            best_cost = cost
            best_starts = starts
        if width == sizes[order[0]]:  # more rows only add filling
            break
    return best_starts


def batch_trees(
    forest: Sequence[Tree],
    tokens: int,
    reads: int,
    padded: bool = False,
) -> Iterator[list[Tree]]:
    """Yield trees in groups, longest first, each group one tree or within these numbers of tokens and reads.

    Args:
        padded: count each tree of a group with the tokens of the longest, which plain rows are padded to.
    """
    group: list[Tree] = []
    group_tokens = group_reads = 0
    for tree in sorted(forest, key=lambda tree: -len(tree.tokens)):
        tree_reads = sum(map(len, tree.reads.values()))
        size = len(group[0].tokens) if padded and group else len(tree.tokens)
        if group and (group_tokens + size > tokens or group_reads + tree_reads > reads):
            yield group
            group = []
            group_tokens = group_reads = 0
            size = len(tree.tokens)
        group.append(tree)
        group_tokens += size
        group_reads += tree_reads
    if group:
        yield group


def split_by_prefix(encodings: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the indices of the sequences that begin like most of them, and those of the others.

    A prompt that was cut on its left lost the beginning that it had in common with the rest. There is one
    part, of all indices, where no beginning is shared by more than half, or all share one.
    """
    beginnings = [tuple(ids[:MIN_SHARED_TOKENS]) for ids in encodings]
    usual, n = Counter(beginnings).most_common(1)[0] if beginnings else ((), 0)
    if not len(beginnings) / 2 < n < len(beginnings):
        return [list(range(len(beginnings)))]
    usual_part = [i for i, beginning in enumerate(beginnings) if beginning == usual]
    other_part = [i for i, beginning in enumerate(beginnings) if beginning != usual]
    return [usual_part, other_part]


def shared_prefix_len(examples: Sequence[Example]) -> int:
    """Return how many tokens all encodings begin with, short of the first place that is read.

    Fewer than a cache is worth count as 0.
    """
    encodings = [ids for x in examples for ids in x.encodings]
    if len(encodings) < 2:
        return 0
    first_read = min(x.positions(k)[0] - 1 for x in examples for k in range(len(x.encodings)))
    shared_len = min(common_prefix_len(min(encodings), max(encodings)), first_read)
    return shared_len if shared_len >= MIN_SHARED_TOKENS else 0


def num_tokens(example: Example) -> int:
    """Return about how many tokens of an example go through the model: the prompt once, and all options."""
    return len(example.encodings[0]) - example.option_lens[0] + sum(example.option_lens)


def loss_terms(examples: Sequence[Example], classification: bool) -> int:
    """Return how many terms `scoring.loss` is the mean of: examples, or option tokens."""
    if classification:
        return len(examples)
    return sum(len(x.positions(k)) for x in examples for k in range(len(x.encodings)))
