"""Log-probabilities of options under a model: the one path that training losses and evaluation both take.

Each distinct token goes through the model once. The candidates of an example share the tokens that they have in common
and branch behind them; the last token of a candidate never goes in, since nothing reads what it predicts. Several
examples lie end to end in one row instead of being padded to the longest. One rule makes the attention mask: a token
sees an earlier token of the same example that is shared or in its own branch. Positions restart with every example, and
logits are computed only at the places that are read. A score equals the plain one-row-per-candidate computation to
float rounding; `takes_packed` finds out whether a model can do this, and where it can't, `plain=True` uses such rows.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

ATTENTION = 1000  # a row of this many tokens spends as long in attention as in matrix products (measured, 135M, CPU)
TOKENS = 4096  # of one forward in evaluation


@dataclass(frozen=True)
class Example:
    """Token ids of each option behind its prompt, how many of them are the option's, and which option is right."""

    encodings: list[list[int]]
    option_lens: list[int]
    label: int = 0


@dataclass
class Tree:
    """The tokens of one item as they lie in a row: shared ones first, then branch by branch."""

    tokens: list[int]
    positions: list[int]
    branches: list[int]  # -1 where shared
    nodes: list[tuple[int, int]]  # per option: (shared length, start of its branch), to find a position again

    @classmethod
    def of(cls, encodings: Sequence[Sequence[int]]) -> "Tree":
        limit = min(map(len, encodings)) - 1
        shared = next((i for i in range(limit) if len({ids[i] for ids in encodings}) > 1), limit)
        tree = cls(list(encodings[0][:shared]), list(range(shared)), [-1] * shared, [])
        for branch, ids in enumerate(encodings):
            tree.nodes.append((shared, len(tree.tokens)))
            tree.tokens += ids[shared:-1]
            tree.positions += range(shared, len(ids) - 1)
            tree.branches += [branch] * (len(ids) - 1 - shared)
        return tree

    def node(self, option: int, position: int) -> int:
        shared, start = self.nodes[option]
        return position if position < shared else start + position - shared


def pack(examples: Sequence[Example], plain: bool = False) -> dict[str, Tensor]:
    """Lay examples out for one forward: R rows of N tokens, M places to read, T option tokens, O options, E examples.

    Returns int64 tensors. Tokens [R, N]: `input_ids`, `position_ids`, `segment` (which item; -1 is filling), `branch`
    (absent with `plain`). Places [M]: `read_row`, `read_column`. Option tokens [T]: `token_read` (index into places),
    `token_target`, `token_option`. Options [O]: `option_lens`, `option_example`, `option_index`. Examples [E]: `label`.
    With `plain`, one row a candidate, right-padded.
    """
    if plain:
        items = [(e, [k], Tree.of([ids])) for e, x in enumerate(examples) for k, ids in enumerate(x.encodings)]
    else:
        items = [(e, range(len(x.encodings)), Tree.of(x.encodings)) for e, x in enumerate(examples)]
    sizes = [len(tree.tokens) for _, _, tree in items]
    places = [(r, 0) for r in range(len(items))] if plain else fit(sizes)
    n_rows = max(r for r, _ in places) + 1
    width = max(start + size for (_, start), size in zip(places, sizes, strict=True))

    tokens = {name: torch.full((n_rows, width), -1) for name in ("segment", "branch")}
    tokens |= {name: torch.zeros((n_rows, width), dtype=torch.int64) for name in ("input_ids", "position_ids")}
    first_option = [0]
    for x in examples:
        first_option.append(first_option[-1] + len(x.encodings))
    reads: dict[tuple[int, int], int] = {}
    option_tokens = []
    for segment, ((e, options, tree), (r, start)) in enumerate(zip(items, places, strict=True)):
        span = slice(start, start + len(tree.tokens))
        tokens["segment"][r, span] = segment
        for name, values in (("input_ids", tree.tokens), ("position_ids", tree.positions), ("branch", tree.branches)):
            tokens[name][r, span] = torch.tensor(values)
        for branch, k in enumerate(options):
            ids = examples[e].encodings[k]
            for position in range(len(ids) - examples[e].option_lens[k], len(ids)):
                read = reads.setdefault((r, start + tree.node(branch, position - 1)), len(reads))
                option_tokens.append((read, ids[position], first_option[e] + k))
    if plain:
        del tokens["branch"]
    token_columns = zip(*option_tokens, strict=True)
    return {
        **tokens,
        "read_row": torch.tensor([r for r, _ in reads]),
        "read_column": torch.tensor([c for _, c in reads]),
        **{
            f"token_{name}": torch.tensor(v)
            for name, v in zip(("read", "target", "option"), token_columns, strict=True)
        },
        "option_lens": torch.tensor([n for x in examples for n in x.option_lens]),
        "option_example": torch.tensor([e for e, x in enumerate(examples) for _ in x.encodings]),
        "option_index": torch.tensor([k for x in examples for k in range(len(x.encodings))]),
        "label": torch.tensor([x.label for x in examples]),
    }


def fit(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(row, start) of each item, in the number of rows that is cheapest: R rows of N tokens cost R·N·(1 + N/ATTENTION).

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
        cost = n_rows * width * (1 + width / ATTENTION)
        if cost < best_cost:
            best_cost, best = cost, places
        if width == sizes[order[0]]:  # more rows only add filling
            break
    return best


def attention_mask(segment: Tensor, branch: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1, N, N], additive: 0 where a token (third axis) sees another (last axis), the dtype's minimum elsewhere."""
    order = torch.arange(segment.shape[1], device=segment.device)
    sees = (segment[:, :, None] == segment[:, None, :]) & (order[:, None] >= order)
    sees &= (branch[:, None, :] == -1) | (branch[:, :, None] == branch[:, None, :])
    mask = torch.zeros(sees.shape, dtype=dtype, device=segment.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def token_logprobs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[T] fp32: log-probability of every option token of a packed batch; one forward."""
    if "branch" in batch:
        mask = attention_mask(batch["segment"], batch["branch"], model.dtype)
        inputs = {"attention_mask": mask, "position_ids": batch["position_ids"]}
    else:
        inputs = {"attention_mask": (batch["segment"] >= 0).long()}

    def read(head, args):  # hidden states [R, N, D] -> [1, M, D]: what a model does to its logits stays in its hands
        return (args[0][batch["read_row"], batch["read_column"]].unsqueeze(0), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(read)
    try:
        logits = model(input_ids=batch["input_ids"], use_cache=False, **inputs).logits[0].float()  # [M, V]
    finally:
        hook.remove()
    return logits[batch["token_read"], batch["token_target"]] - logits.logsumexp(-1)[batch["token_read"]]


def option_sums(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[O] fp32: log-probability of every option."""
    logprobs = token_logprobs(model, batch)
    return logprobs.new_zeros(len(batch["option_lens"])).index_add(0, batch["token_option"], logprobs)


def loss(model: nn.Module, batch: dict[str, Tensor], classification: bool) -> Tensor:
    """0-dim fp32 training loss of a packed batch.

    `classification`: cross-entropy over the options of each example, whose scores are the mean log-probabilities of
    their tokens. Otherwise language modelling: the mean negative log-probability of all option tokens of the batch.
    """
    if not classification:
        return -token_logprobs(model, batch).mean()
    means = option_sums(model, batch) / batch["option_lens"]
    shape = (len(batch["label"]), int(batch["option_index"].max()) + 1)
    scores = means.new_full(shape, -torch.inf).index_put((batch["option_example"], batch["option_index"]), means)
    return nn.functional.cross_entropy(scores, batch["label"])


def batches(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of items in groups of at most `budget` tokens (one item at least), longest first."""
    group, used = [], 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if group and used + sizes[i] > budget:
            yield group
            group, used = [], 0
        group.append(i)
        used += sizes[i]
    if group:
        yield group


@torch.inference_mode()
def score(
    model: nn.Module, examples: Sequence[Example], budget: int = TOKENS, plain: bool = False, progress: bool = False
) -> list[list[float]]:
    """Log-probability of each option of each example, in input order; the model is left in eval mode.

    Raises FloatingPointError where the model gives NaN, which a comparison of scores would hide.
    """
    model.eval()
    sizes = [(sum if plain else max)(map(len, x.encodings)) for x in examples]
    scores: list[list[float]] = [[] for _ in examples]
    with tqdm(total=len(examples), unit="ex", disable=not progress, desc="evaluating", leave=False) as bar:
        for group in batches(sizes, budget):
            batch = pack([examples[i] for i in group], plain=plain)
            device = next(model.parameters()).device
            sums = option_sums(model, {name: tensor.to(device) for name, tensor in batch.items()}).tolist()
            for i, n in zip(group, (len(examples[i].encodings) for i in group), strict=True):
                scores[i], sums = sums[:n], sums[n:]
            bar.update(len(group))
    if any(value != value for values in scores for value in values):
        raise FloatingPointError("the model gives NaN as the log-probability of an option")
    return scores


def takes_packed(model: nn.Module) -> bool:
    """Whether this model scores packed rows as it scores plain ones, found by scoring two short examples both ways.

    A kernel that drops the mask, positions that can't restart (ALiBi) or windows in attention would give silent wrong
    numbers; such a model gets plain rows.
    """
    config = model.config.get_text_config()
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return False
    top = config.vocab_size - 1
    prompts = [[min(top, 5 + 7 * i + j) for i in range(9 + 4 * j)] for j in range(2)]
    probe = [Example([[*p, 3, 4, 6], [*p, 8, 4], [*p, 3, 9, 7, 6]], [3, 2, 4]) for p in prompts]
    try:
        packed = score(model, probe)
    except Exception:  # a model that can't take the mask may fail in any way
        return False
    plain = score(model, probe, plain=True)
    absolute, relative = (1e-3, 1e-4) if model.dtype == torch.float32 else (0.1, 0.02)
    return all(
        abs(a - b) <= absolute + relative * abs(a)
        for x, y in zip(packed, plain, strict=True)
        for a, b in zip(x, y, strict=True)
    )
