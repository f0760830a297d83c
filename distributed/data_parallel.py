"""What each of several ranks does of a batch, of a step, of an evaluation; see parallel.py."""

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distributed import collectives, stop_signals
from scoring.packing import Example, num_tokens


def balance(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Items for each rank, so that their sizes sum up alike: the longest first, each to the rank with least so far."""
    loads, shares = [0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        r = loads.index(min(loads))
        loads[r] += sizes[i]
        shares[r].append(i)
    return [sorted(share) for share in shares]


def contiguous_split(sizes: Sequence[int], ranks: int) -> list[range]:
    """Items for each rank, neighbours together, so that their sizes sum up about alike."""
    total, ends, done = sum(sizes), [], 0
    for i, n in enumerate(sizes):
        while len(ends) < ranks - 1 and done + n / 2 >= total * (len(ends) + 1) / ranks:
            ends.append(i)
        done += n
    ends += [len(sizes)] * (ranks - len(ends))
    return [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


class ShardingCollator:
    """A collator that packs this rank's rows of a batch, which all ranks draw. With them comes `weight`, how much the
    batch counts; of several ranks also `part`, the fraction of its loss that is theirs, and `tokens`, how many they
    are. A rank without a row gets nothing else, or one row for nothing where all have to run `in_step`.

    Args:
        pack(rows) -> batch. weight(rows): of how many things the loss is the mean. size(row): its tokens.
        divides: False gives each rank the whole batch. in_step: every rank runs a row of each batch.
    """

    def __init__(self, pack: Callable, weight: Callable, size: Callable = num_tokens, divides=True, in_step=False):
        self.pack, self.weight, self.size, self.divides, self.in_step = pack, weight, size, divides, in_step
        self.stored = False  # rows whose activations are kept stay with the rank that keeps them

    def __call__(self, batch: Sequence[Example]) -> dict[str, Tensor | float]:
        ranks, rows = collectives.world_size(), batch
        about = {"weight": self.weight(batch)}
        if ranks == 1:
            return {**self.pack(batch), **about}
        if self.divides and self.stored:
            rows = [x for x in batch if x.places is not None]
        elif self.divides:
            rows = [batch[i] for i in balance([self.size(x) for x in batch], ranks)[collectives.rank()]]
        about |= {"part": self.weight(rows) / about["weight"], "tokens": sum(map(self.size, rows))}
        if self.in_step and not rows:
            rows = batch[:1]  # its part is 0
        return {**self.pack(rows), **about} if rows else about


class LossAllGather:
    """A step that the ranks take together: each adds its part of the loss at every point, and all get the sums.

    `queries`: each rank asks at the points of other queries, on the whole batch, instead of on its share of it.
    """

    def __init__(self, queries: bool, signals: stop_signals.StopSignals):
        self.queries, self.signals = queries, signals
        self.sums: list[float] = []  # of this rank's micro-batches so far
        self.load = 0  # tokens that they are
        self.steps, self.bytes, self.seconds, self.most, self.mean = 0, 0, 0.0, 0, 0.0  # of all steps, for the report

    def mine(self, points: Sequence[tuple[int, float]]) -> list[int]:
        """Numbers of the points at which this rank asks."""
        ranks, rank = collectives.world_size(), collectives.rank()
        return [i for i, (query, _) in enumerate(points) if not self.queries or query % ranks == rank]

    def add(self, losses: dict[int, float], points: int, load: int) -> None:
        """This rank's part of a micro-batch: its losses by number of the point, of so many points in all, and how many
        tokens went through the model for them."""
        self.sums = self.sums or [0.0] * points
        for i, loss in losses.items():
            self.sums[i] += loss
        self.load += load

    def total(self) -> list[float]:
        """The losses of the whole batch, summed in rank order. What else all have to know goes along: loads, requests
        to stop."""
        before = dict(collectives.TRAFFIC)
        everyone = collectives.gather([*self.sums, self.load, self.signals.local_signal])
        totals = [0.0] * len(self.sums)
        for *sums, _, _ in everyone:
            totals = [total + one for total, one in zip(totals, sums, strict=True)]
        *_, loads, heard = zip(*everyone, strict=True)
        self.signals.merge(heard)
        self.steps += 1
        self.bytes += collectives.TRAFFIC["bytes"] - before["bytes"]
        self.seconds += collectives.TRAFFIC["seconds"] - before["seconds"]
        self.most, self.mean = self.most + max(loads), self.mean + sum(loads) / len(loads)
        self.sums, self.load = [], 0
        return totals

    def report(self) -> dict:
        """What a step sent and waited, and how evenly its rows were divided (1: evenly)."""
        steps = self.steps or 1
        return {
            "number": collectives.world_size(), "bytes_per_step": self.bytes / steps,
            "wait_seconds_per_step": round(self.seconds / steps, 5),
            "imbalance": round(self.most / self.mean, 4) if self.mean else 1.0,
        }  # fmt: skip


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum the gradients of the ranks, each of its part of the loss (`--trainer regular`)."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if isinstance(p, DTensor):  # fsdp has averaged
            p.grad.mul_(collectives.world_size())
            continue
        with collectives.as_peer_lost():
            dist.all_reduce(p.grad)


_alone: list[bool] = []


@contextlib.contextmanager
def on_this_rank_only():
    """Inside, an evaluation is this rank's own, of its share of a batch."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def map_over_ranks(keys: Sequence, sizes: Sequence[int], fn: Callable[[list[int]], Sequence]) -> list:
    """`fn(indices)`, a result an index, the indices divided among the ranks; the results in order. What has keys that
    begin alike stays together."""
    if collectives.world_size() == 1 or _alone:
        return list(fn(list(range(len(keys)))))
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    mine = [order[i] for i in contiguous_split([sizes[i] for i in order], collectives.world_size())[collectives.rank()]]
    found: dict[int, object] = {}
    for some in collectives.run_on_all(lambda: list(zip(mine, fn(mine) if mine else (), strict=True))):
        found |= dict(some)
    return [found[i] for i in range(len(keys))]
