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
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import checkpoint
from utils import UsageError

logger = logging.getLogger(__name__)

DELAY = float(os.environ.get("ZO_GATHER_DELAY", 0))  # seconds put before every exchange, to try a slow network
WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE")
WIRE = {"exchanges": 0, "bytes": 0, "seconds": 0.0}  # what this rank has sent, and waited


class Alone(contextlib.nullcontext):
    """Around what a rank does by itself; fsdp.py has another."""

    torn = False  # whether an error has left the others waiting


company = ALONE = Alone()


class PeerLost(RuntimeError):
    """Another rank has died or does not answer."""


class PeerFailed(RuntimeError):
    """Another rank could not do its share."""


SHARED = {cls.__name__: cls for cls in (checkpoint.Interrupted, UsageError, FloatingPointError)}


def expected() -> int:
    """How many ranks torchrun has started, as the environment says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def leads() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


@contextlib.contextmanager
def hidden(apart: bool = False) -> Iterator[None]:
    """Inside, the environment does not say that there are other ranks; a GPU is chosen by the local rank before.

    Raises UsageError where ranks would share one though they have to be `apart`.
    """
    local, ranks = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    gpus = torch.cuda.device_count()  # does not start CUDA, which would fix the choice
    own = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # a launcher may show each rank its own GPU alone
    if apart and 0 < gpus < ranks and not own:
        raise UsageError(f"--fsdp: {ranks} ranks on a machine with {gpus} GPU(s), and each needs one of its own")
    if expected() > 1 and gpus > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(i) for i in range(gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
    kept = {name: os.environ.pop(name) for name in WORLD if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


def start(timeout: float, tensors: bool = False) -> None:
    """Meet the other ranks, where there are any; an exchange of more than `timeout` seconds fails. `tensors`: more than
    numbers will go between GPUs."""
    if expected() == 1:
        return
    if "MASTER_ADDR" not in os.environ:
        raise UsageError(f"WORLD_SIZE is {expected()}, but nothing says where the other ranks are: start with torchrun")
    if not dist.is_initialized():
        limit = datetime.timedelta(seconds=timeout)
        with lost():
            store, number, ranks = next(dist.rendezvous("env://", timeout=limit))
            # torchrun's store outlives the ranks that it starts again: they would find the addresses of the dead.
            store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "cpu:gloo,cuda:nccl" if tensors and torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=limit)
        atexit.register(dist.destroy_process_group)
    if not leads():
        logging.getLogger().setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


# ---- exchanges ----


def peer_lost(error: Exception) -> PeerLost:
    reason = re.sub(r"^\[.*?\] *|\. .*", "", (str(error).strip() or type(error).__name__).splitlines()[0])
    return PeerLost(
        f"another rank died or does not answer ({reason}); the same command goes on from the last checkpoint"
    )


def of_network(error: Exception) -> bool:
    """Whether an exchange that is not ours (fsdp) has raised it."""
    return isinstance(error, dist.DistError) or (size() > 1 and "gloo" in str(error))


@contextlib.contextmanager
def lost() -> Iterator[None]:
    """What the network raises, as one line; `seconds` of WIRE grow by the time spent here."""
    before = time.perf_counter()
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise peer_lost(error) from error
    finally:
        WIRE["seconds"] += time.perf_counter() - before


def gather(values: Sequence[float]) -> list[list[float]]:
    """Of every rank, in rank order, as many fp64 numbers as this one gives: one call."""
    if size() == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(size())]
    with lost():
        time.sleep(DELAY)
        dist.all_gather(everyone, mine)
    WIRE["exchanges"] += 1
    WIRE["bytes"] += mine.nbytes
    return [values.tolist() for values in everyone]


def gather_objects(value) -> list:
    """Of every rank, in rank order, what JSON can say."""
    if size() == 1:
        return [value]
    words = json.dumps(value).encode()
    lengths = [int(n) for (n,) in gather([len(words)])]
    mine = torch.frombuffer(bytearray(words.ljust(max(lengths))), dtype=torch.uint8)
    everyone = [torch.empty_like(mine) for _ in lengths]
    with lost():
        dist.all_gather(everyone, mine)
    return [json.loads(one.numpy().tobytes()) for one in everyone]


def together(fn: Callable) -> list:
    """What `fn()` gives on each rank, in rank order. What it raises on one rank, a request to stop among that, is
    raised on all of them, so that none waits for another."""
    if size() == 1:
        return [fn()]
    mine, error = None, None
    with company:
        try:
            with Signals.leaving():
                mine = fn()
        except PeerLost:
            raise
        except (Exception, checkpoint.Interrupted) as raised:
            if company.torn:
                raise
            error = raised
    everyone = gather_objects([type(error).__name__, str(error)] if error else [None, mine])
    failed = [(number, kind, text) for number, (kind, text) in enumerate(everyone) if kind]
    if failed:
        number, kind, text = failed[0]
        if not error or kind in SHARED:
            error = SHARED[kind](text) if kind in SHARED else PeerFailed(f"rank {number} failed: {kind}: {text}")
        raise error
    return [found for _, found in everyone]


def first(fn: Callable):
    """What `fn()` gives on rank 0, which alone calls it, for all ranks; so it may not exchange with them."""
    return together(lambda: fn() if leads() else None)[0]


@contextlib.contextmanager
def locked(output_dir) -> Iterator[None]:
    """`checkpoint.locked` on rank 0, for all."""
    with contextlib.ExitStack() as stack:
        first(lambda: stack.enter_context(checkpoint.locked(output_dir)))
        yield


class Signals(checkpoint.Signals):
    """Requests to stop that one rank may have got alone: `received` is what all ranks know of, at the same step."""

    open: "Signals | None" = None  # while an evaluation may be left

    def know(self) -> None:
        if size() == 1:  # else with the next exchange
            super().know()

    def agree(self, heard: Sequence[float]) -> None:
        """Take what the ranks have heard, each the number of a signal or 0."""
        if any(heard):
            self.received = signal.Signals(int(max(heard))).name

    def check(self) -> None:
        if self.on and size() > 1:
            self.agree([number for (number,) in gather([self.heard])])
        super().check()

    @contextlib.contextmanager
    def interruptible(self):
        """Inside, a request raises Interrupted on all ranks: at once in what each does alone (`together`)."""
        if size() == 1:
            with super().interruptible():
                yield
            return
        self.check()
        Signals.open = self if self.on else None
        try:
            yield
        finally:
            Signals.open = None
        if company is not ALONE:  # which it could not leave
            self.check()

    @classmethod
    @contextlib.contextmanager
    def leaving(cls) -> Iterator[None]:
        """What a rank does alone, and may leave where the evaluation may be left and no other waits for it."""
        if not cls.open or company is not ALONE:
            yield
            return
        try:
            cls.open.at_once = True
            cls.open.leave()
            yield
        finally:
            cls.open.at_once = False


# ---- the same weights everywhere ----


class Diverged(RuntimeError):
    """A rank holds other weights than the others."""


def fingerprint(tensors: Sequence[Tensor]) -> float:
    """48 bits of a hash of the sums of blocks of the tensors' bits, fast wherever the tensors are."""
    digest = hashlib.sha256()
    for t in tensors:
        if not (t.is_meta or isinstance(t, DTensor)):  # of what is divided there is one copy
            flat = t.detach().contiguous().view(-1).view(torch.uint8)
            flat = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
            sums = torch.stack([block.sum(dtype=torch.int64) for block in flat.split(1 << 20)])
            digest.update(json.dumps(sums.tolist()).encode())
    return float(int.from_bytes(digest.digest()[:6]))


def trained(optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(model, optimizer) -> list[Tensor]:
    """All weights of a model, and what is trained beside it."""
    return [*{id(p): p for p in (*model.parameters(), *trained(optimizer))}.values()]


def refuse_divergence(number: float, what: str) -> None:
    """Raise Diverged, naming the ranks, where not all have this number."""
    found = [n for (n,) in gather([number])]
    usual = Counter(found).most_common(1)[0][0]  # of equal ones the first: rank 0's
    others = [str(r) for r, n in enumerate(found) if n != usual]
    if others:
        raise Diverged(f"rank {', '.join(others)} of {size()} has other {what} than the others: nothing is saved")


class Watch(TrainerCallback):
    """Compares the weights of the ranks: all of them at the start, the trained ones every `every` steps."""

    def __init__(self, settings: dict, every: int):
        self.settings, self.every = settings, every

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        words = json.dumps([self.settings, state.max_steps, state.global_step], sort_keys=True).encode()
        number = float(int.from_bytes(hashlib.sha256(words).digest()[:6]))
        refuse_divergence(number, "flags or rows")
        refuse_divergence(fingerprint(everything(model, optimizer)), "weights before the first step")

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if self.every and state.global_step % self.every == 0:
            refuse_divergence(fingerprint(trained(optimizer)), f"weights after step {state.global_step}")
