"""Division of the work among ranks: rows of a batch, points of a step, examples of an evaluation.

The exchanges between ranks are those of collectives.py. With one process the work stays whole.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from distributed import collectives, stop_signals

_on_this_rank_only: ContextVar[bool] = ContextVar("on_this_rank_only", default=False)


def balance(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the indices of each rank's items, so that the sizes of every rank sum up alike.

    The longest item is placed first, each one with the rank that has least so far.
    """
    loads = [0] * ranks
    parts = [[] for _ in range(ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        r = loads.index(min(loads))
        loads[r] += sizes[i]
        parts[r].append(i)
    return [sorted(part) for part in parts]


def contiguous_split(sizes: Sequence[int], ranks: int) -> list[range]:
    """Return the indices of each rank's items: neighbours stay together, and the sizes sum up about alike."""
    total = sum(sizes)
    ends: list[int] = []
    sum_so_far = 0
    for i, n in enumerate(sizes):
        while len(ends) < ranks - 1 and sum_so_far + n / 2 >= total * (len(ends) + 1) / ranks:
            ends.append(i)
        sum_so_far += n
    ends += [len(sizes)] * (ranks - len(ends))
    return [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


class ShardingCollator:
    """Packs this rank's rows of a batch that all ranks draw.

    A batch has `weight`: how much the whole batch counts. Where there are several ranks, it also has `part`,
    the fraction of the loss that this rank's rows make up, and `tokens`, how many tokens these rows have. A
    rank without a row gets nothing else; where each forward needs all ranks, it gets a row whose part is 0.

    Args:
        pack: rows -> batch, a dict of tensors.
        weight: rows -> the number of terms of which the loss is the mean.
        size: row -> its number of tokens.
        divides: False gives each rank the whole batch.

    Attributes:
        is_local: row -> whether this rank keeps something of the row in a cache; rows then stay with their
            rank. With None the ranks get about equally many tokens of each batch.
    """

    def __init__(self, pack: Callable, weight: Callable, size: Callable, divides: bool = True):
        self.pack = pack
        self.weight = weight
        self.size = size
        self.divides = divides
        self.is_local: Callable[..., bool] | None = None

    def __call__(self, batch: Sequence) -> dict[str, Tensor | float]:
        """Return this rank's part of a batch."""
        weight = self.weight(batch)
        if collectives.world_size() == 1:
            return {**self.pack(batch), "weight": weight}
        rows = self.rows_of_rank(batch) if self.divides else batch
        counts = {"weight": weight, "part": self.weight(rows) / weight, "tokens": sum(map(self.size, rows))}
        if not rows and collectives.forwards_are_exchanges():
            rows = batch[:1]  # its part is 0
        return {**self.pack(rows), **counts} if rows else counts

    def rows_of_rank(self, batch: Sequence) -> list:
        """Return the rows of a batch that this rank runs."""
        if self.is_local:
            return [row for row in batch if self.is_local(row)]
        parts = balance([self.size(row) for row in batch], collectives.world_size())
        return [batch[i] for i in parts[collectives.rank()]]


class LossAllGather:
    """The exchange of a step: each rank adds its part of the loss at every point, and all ranks get the sums.

    Args:
        queries: whether each rank computes the losses of other queries on the whole batch, instead of all
            queries on its part of the batch.
        signals: requests to stop, which the exchange of each step carries along.
    """

    def __init__(self, queries: bool, signals: stop_signals.StopSignals):
        self.queries = queries
        self.signals = signals
        self.sums: list[float] = []  # losses of this rank's micro-batches of the step so far, one a point
        self.tokens = 0  # that went through this rank's model for them
        # Sums over all steps, for the report.
        self.steps = 0
        self.bytes = 0
        self.seconds = 0.0
        self.heaviest_load = 0
        self.mean_load = 0.0

    def points_of_rank(self, points: Sequence[tuple[int, float]]) -> list[int]:
        """Return the indices of those (query, factor) at which this rank computes the loss."""
        ranks = collectives.world_size()
        rank = collectives.rank()
        return [i for i, (query, _) in enumerate(points) if not self.queries or query % ranks == rank]

    def add(self, losses: dict[int, float], num_points: int, tokens: int) -> None:
        """Add this rank's part of a micro-batch.

        Args:
            losses: {index of the point: loss}.
            num_points: the number of points of the step, those of other ranks included.
            tokens: how many went through the model for these losses.
        """
        self.sums = self.sums or [0.0] * num_points
        for i, loss in losses.items():
            self.sums[i] += loss
        self.tokens += tokens

    def total_losses(self) -> list[float]:
        """Return the loss of the whole batch at each point, summed in rank order, and begin a new step.

        Loads and requests to stop go along.
        """
        traffic_before = dict(collectives.TRAFFIC)
        rows = collectives.gather([*self.sums, self.tokens, self.signals.local_signal])
        totals = [0.0] * len(self.sums)
        for *sums, _, _ in rows:
            totals = [total + part for total, part in zip(totals, sums, strict=True)]
        *_, loads, local_signals = zip(*rows, strict=True)
        self.signals.merge_signals(local_signals)
        self.steps += 1
        self.bytes += collectives.TRAFFIC["bytes"] - traffic_before["bytes"]
        self.seconds += collectives.TRAFFIC["seconds"] - traffic_before["seconds"]
        self.heaviest_load += max(loads)
        self.mean_load += sum(loads) / len(loads)
        self.sums = []
        self.tokens = 0
        return totals

    def report(self) -> dict:
        """Return what a step sent and waited, and how evenly its tokens were divided (1: evenly)."""
        steps = self.steps or 1
        return {
            "number": collectives.world_size(),
            "bytes_per_step": self.bytes / steps,
            "wait_seconds_per_step": round(self.seconds / steps, 5),
            "imbalance": round(self.heaviest_load / self.mean_load, 4) if self.mean_load else 1.0,
        }


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum the gradients of the ranks in place, each of its part of the loss (`--trainer regular`)."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if collectives.is_divided(p):  # torch has averaged the gradients of divided weights
            p.grad.mul_(collectives.world_size())
            continue
        with collectives.as_peer_lost():
            dist.all_reduce(p.grad)


@contextlib.contextmanager
def on_this_rank_only() -> Iterator[None]:
    """Inside, `map_over_ranks` divides nothing: an evaluation is this rank's own, of its part of a batch."""
    token = _on_this_rank_only.set(True)
    try:
        yield
    finally:
        _on_this_rank_only.reset(token)


def map_over_ranks(keys: Sequence, sizes: Sequence[int], fn: Callable[[list[int]], Sequence]) -> list:
    """Return `fn(indices)` of all items, in the order of the items; the ranks divide the work.

    Args:
        keys: one an item; items whose keys begin alike stay together.
        sizes: the number of tokens of each item.
        fn: indices of items -> a result for each of them, something that JSON can hold.
    """
    if collectives.world_size() == 1 or _on_this_rank_only.get():
        return list(fn(list(range(len(keys)))))
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    parts = contiguous_split([sizes[i] for i in order], collectives.world_size())
    indices = [order[i] for i in parts[collectives.rank()]]

    def results_of_rank() -> list[tuple[int, object]]:
        return list(zip(indices, fn(indices), strict=True)) if indices else []

    results: dict[int, object] = {}
    for pairs in collectives.run_on_all(results_of_rank):
        results |= dict(pairs)
    return [results[i] for i in range(len(keys))]
