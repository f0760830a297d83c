"""One run on several devices: torchrun starts a process for each, and of zeroth order only numbers go between them.

    torchrun --nproc_per_node 2 run.py --trainer zo …

z is a function of (seed, step, query, element), so that ranks which know the losses of a step take the same step, bit
for bit: a few dozen bytes a rank and step of `zo` go over gloo, whatever the model's size. The batch is drawn as one
process with the product of the batch sizes would draw it and then divided, so that the number of ranks changes rounding
only.

The library's own data parallelism is not used: it would wrap the model, shard the data in another order and average
gradients that do not exist. It is not shown that there are other ranks (`hidden`), and what only one of them may do
goes through `first`. A rank that is lost is an error on all the others.
"""

import atexit
import contextlib
import datetime
import hashlib
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from utils import Interrupted, UsageError

logger = logging.getLogger(__name__)

GATHER_DELAY = float(os.environ.get("ZO_GATHER_DELAY", 0))  # seconds put before every exchange, to try a slow network
WORLD_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "PMI_SIZE",
    "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE",
)
TRAFFIC = {"exchanges": 0, "bytes": 0, "seconds": 0.0}  # what this rank has sent, and waited


class NoJoin(contextlib.nullcontext):
    """Around what a rank does by itself; fsdp.py has another."""

    in_forward = False  # whether an error has left the others waiting


join_context = NO_JOIN = NoJoin()
# Around what a rank does by itself in `run_on_all`; stop_signals.py puts a context here while an evaluation may be left.
local_work: Callable = contextlib.nullcontext


class PeerLost(RuntimeError):
    """Another rank has died or does not answer."""


class PeerFailed(RuntimeError):
    """Another rank could not do its share."""


SHARED_ERRORS = {cls.__name__: cls for cls in (Interrupted, UsageError, FloatingPointError)}


def env_world_size() -> int:
    """How many ranks torchrun has started, as the environment says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


@contextlib.contextmanager
def hide_world_from_trainer(apart: bool = False) -> Iterator[None]:
    """Inside, the environment does not say that there are other ranks; a GPU is chosen by the local rank before.

    Raises UsageError where ranks would share one though they have to be `apart`.
    """
    local, ranks = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    gpus = torch.cuda.device_count()  # does not start CUDA, which would fix the choice
    own = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # a launcher may show each rank its own GPU alone
    if apart and 0 < gpus < ranks and not own:
        raise UsageError(f"--fsdp: {ranks} ranks on a machine with {gpus} GPU(s), and each needs one of its own")
    if env_world_size() > 1 and gpus > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(i) for i in range(gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
    kept = {name: os.environ.pop(name) for name in WORLD_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


def join_process_group(timeout: float, tensors: bool = False) -> None:
    """Meet the other ranks, where there are any; an exchange of more than `timeout` seconds fails. `tensors`: more than
    numbers will go between GPUs."""
    if env_world_size() == 1:
        return
    if "MASTER_ADDR" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {env_world_size()}, but nothing says where the other ranks are: start with torchrun"
        )
    if not dist.is_initialized():
        limit = datetime.timedelta(seconds=timeout)
        with as_peer_lost():
            store, number, ranks = next(dist.rendezvous("env://", timeout=limit))
            # torchrun's store outlives the ranks that it starts again: they would find the addresses of the dead.
            store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "cpu:gloo,cuda:nccl" if tensors and torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=limit)
        atexit.register(dist.destroy_process_group)
    if not is_main_process():
        logging.getLogger().setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


# ---- exchanges ----


def peer_lost_error(error: Exception) -> PeerLost:
    reason = re.sub(r"^\[.*?\] *|\. .*", "", (str(error).strip() or type(error).__name__).splitlines()[0])
    return PeerLost(
        f"another rank died or does not answer ({reason}); the same command goes on from the last checkpoint"
    )


def is_network_error(error: Exception) -> bool:
    """Whether an exchange that is not ours (fsdp) has raised it."""
    return isinstance(error, dist.DistError) or (world_size() > 1 and "gloo" in str(error))


@contextlib.contextmanager
def as_peer_lost() -> Iterator[None]:
    """What the network raises, as one line; `seconds` of WIRE grow by the time spent here."""
    before = time.perf_counter()
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise peer_lost_error(error) from error
    finally:
        TRAFFIC["seconds"] += time.perf_counter() - before


def gather(values: Sequence[float]) -> list[list[float]]:
    """Of every rank, in rank order, as many fp64 numbers as this one gives: one call."""
    if world_size() == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    with as_peer_lost():
        time.sleep(GATHER_DELAY)
        dist.all_gather(everyone, mine)
    TRAFFIC["exchanges"] += 1
    TRAFFIC["bytes"] += mine.nbytes
    return [values.tolist() for values in everyone]


def gather_objects(value) -> list:
    """Of every rank, in rank order, what JSON can say."""
    if world_size() == 1:
        return [value]
    words = json.dumps(value).encode()
    lengths = [int(n) for (n,) in gather([len(words)])]
    mine = torch.frombuffer(bytearray(words.ljust(max(lengths))), dtype=torch.uint8)
    everyone = [torch.empty_like(mine) for _ in lengths]
    with as_peer_lost():
        dist.all_gather(everyone, mine)
    return [json.loads(one.numpy().tobytes()) for one in everyone]


def run_on_all(fn: Callable) -> list:
    """What `fn()` gives on each rank, in rank order. What it raises on one rank, a request to stop among that, is
    raised on all of them, so that none waits for another."""
    if world_size() == 1:
        return [fn()]
    mine, error = None, None
    with join_context:
        try:
            with local_work():
                mine = fn()
        except PeerLost:
            raise
        except (Exception, Interrupted) as raised:
            if join_context.in_forward:
                raise
            error = raised
    everyone = gather_objects([type(error).__name__, str(error)] if error else [None, mine])
    failed = [(number, kind, text) for number, (kind, text) in enumerate(everyone) if kind]
    if failed:
        number, kind, text = failed[0]
        if not error or kind in SHARED_ERRORS:
            error = (
                SHARED_ERRORS[kind](text)
                if kind in SHARED_ERRORS
                else PeerFailed(f"rank {number} failed: {kind}: {text}")
            )
        raise error
    return [found for _, found in everyone]


def run_on_main(fn: Callable):
    """What `fn()` gives on rank 0, which alone calls it, for all ranks; so it may not exchange with them."""
    return run_on_all(lambda: fn() if is_main_process() else None)[0]


# ---- the same weights everywhere ----


class Diverged(RuntimeError):
    """A rank holds other weights than the others."""


def tensor_fingerprint(tensors: Sequence[Tensor]) -> float:
    """48 bits of a hash of the sums of blocks of the tensors' bits, fast wherever the tensors are."""
    digest = hashlib.sha256()
    for t in tensors:
        if not (t.is_meta or isinstance(t, DTensor)):  # of what is divided there is one copy
            flat = t.detach().contiguous().view(-1).view(torch.uint8)
            flat = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
            sums = torch.stack([block.sum(dtype=torch.int64) for block in flat.split(1 << 20)])
            digest.update(json.dumps(sums.tolist()).encode())
    return float(int.from_bytes(digest.digest()[:6]))


def optimizer_params(optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def all_tensors(model, optimizer) -> list[Tensor]:
    """All weights of a model, and what is trained beside it."""
    return [*{id(p): p for p in (*model.parameters(), *optimizer_params(optimizer))}.values()]


def refuse_divergence(number: float, what: str) -> None:
    """Raise Diverged, naming the ranks, where not all have this number."""
    found = [n for (n,) in gather([number])]
    usual = Counter(found).most_common(1)[0][0]  # of equal ones the first: rank 0's
    others = [str(r) for r, n in enumerate(found) if n != usual]
    if others:
        raise Diverged(f"rank {', '.join(others)} of {world_size()} has other {what} than the others: nothing is saved")
