"""Exchanges between the ranks of one run: torchrun starts a process (a rank) for each device.

    torchrun --nproc_per_node 2 run.py --trainer zo …

z is a function of (seed, step, query, element). Ranks that know the losses of a step therefore take the same
step, bit for bit: of a step under `zo` only a few dozen bytes a rank go over gloo, whatever the model's size.
The batch is drawn as one process with the product of the batch sizes would draw it, and then divided
(data_parallel.py), so that the number of ranks changes rounding only.

The library's own data parallelism is not used: it would wrap the model, shard the data in another order and
average gradients that do not exist. `hide_world_from_trainer` keeps the library from seeing other ranks, and
`run_on_main` does what only one rank may do. When a rank is lost, that is an error on all the others.
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

WORLD_VARIABLES = (  # by which the library (accelerate) would know of other ranks
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "PMI_SIZE",
    "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE",
)
TRAFFIC = {"bytes": 0, "seconds": 0.0}  # what this rank has sent, and how long it has waited

# Those of WORLD_VARIABLES that `hide_world_from_trainer` has taken out of the environment.
_hidden_variables: dict[str, str] = {}


class NoJoin(contextlib.nullcontext):
    """The context around a rank's own work where a forward needs no other rank."""

    in_forward = False  # whether an error has left the other ranks waiting


join_context = NO_JOIN = NoJoin()  # sharding.py puts another one here
# Around a rank's own work in `run_on_all`; stop_signals.py sets it while an evaluation may be left.
local_work: Callable = contextlib.nullcontext


class PeerLost(RuntimeError):
    """Another rank has died or does not answer."""


class PeerFailed(RuntimeError):
    """Another rank could not do its part."""


class Diverged(RuntimeError):
    """A rank holds other weights than the others."""


SHARED_ERRORS = {cls.__name__: cls for cls in (Interrupted, UsageError, FloatingPointError)}


# ---- ranks and GPUs ----


def _world_variable(name: str, default: int) -> int:
    return int(_hidden_variables.get(name) or os.environ.get(name, default))


def env_world_size() -> int:
    """Return how many ranks torchrun has started, as the environment says or said."""
    return _world_variable("WORLD_SIZE", 1)


def world_size() -> int:
    """Return how many ranks have joined the process group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank."""
    return dist.get_rank() if dist.is_initialized() else _world_variable("RANK", 0)


def is_main_process() -> bool:
    """Return whether this process is rank 0, which alone writes files and prints."""
    return rank() == 0


def choose_gpu() -> int:
    """Let this process see one GPU only, chosen by its local rank.

    CUDA must not have started: its start fixes what it sees.

    Returns:
        How many GPUs the process saw before, for `refuse_shared_gpus`.
    """
    gpus = torch.cuda.device_count()  # does not start CUDA
    if env_world_size() > 1 and gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[_world_variable("LOCAL_RANK", 0) % len(devices)]
    return gpus


def refuse_shared_gpus(gpus: int) -> None:
    """Raise UsageError where two ranks of this machine would use one GPU.

    Args:
        gpus: what `choose_gpu` has returned.
    """
    ranks = _world_variable("LOCAL_WORLD_SIZE", 0)
    # A launcher may show each rank its own GPU alone.
    one_is_assigned = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if 0 < gpus < ranks and not one_is_assigned:
        machine = f"{ranks} ranks on a machine with {gpus} GPU(s)"
        raise UsageError(f"--fsdp: {machine}, and each needs one of its own")


@contextlib.contextmanager
def hide_world_from_trainer() -> Iterator[None]:
    """Inside, the environment does not tell of other ranks; the functions of this module know them still."""
    variables = {name: os.environ.pop(name) for name in WORLD_VARIABLES if name in os.environ}
    _hidden_variables.update(variables)
    try:
        yield
    finally:
        os.environ |= variables
        for name in variables:
            del _hidden_variables[name]


def join_process_group(timeout: float, tensors: bool = False) -> None:
    """Meet the other ranks, where torchrun has started several.

    From here on all ranks but rank 0 print errors only.

    Args:
        timeout: seconds after which an exchange fails.
        tensors: whether more than numbers will go between GPUs (nccl).

    Raises:
        UsageError: the environment does not say where the other ranks are.
        PeerLost: the other ranks do not come.
    """
    ranks = env_world_size()
    if ranks == 1:
        return
    if "MASTER_ADDR" not in os.environ:
        problem = "nothing says where the other ranks are: start with torchrun"
        raise UsageError(f"WORLD_SIZE is {ranks}, but {problem}")
    if not dist.is_initialized():
        limit = datetime.timedelta(seconds=timeout)
        with as_peer_lost():
            store, _, _ = next(dist.rendezvous("env://", rank(), ranks, timeout=limit))
            # torchrun's store outlives ranks that are started again: they would find addresses of the dead.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"attempt{attempt}", store)
            backend = "cpu:gloo,cuda:nccl" if tensors and torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank(), world_size=ranks, timeout=limit)
        atexit.register(dist.destroy_process_group)
    if not is_main_process():
        logging.getLogger().setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


# ---- exchanges ----


def peer_lost_error(error: Exception) -> PeerLost:
    """Return an error of the network as one line for the person at the terminal."""
    reason = re.sub(r"^\[.*?\] *|\. .*", "", (str(error).strip() or type(error).__name__).splitlines()[0])
    return PeerLost(
        f"another rank died or does not answer ({reason}); the same command goes on from the last checkpoint"
    )


def is_network_error(error: Exception) -> bool:
    """Return whether an exchange that torch makes by itself (of divided weights) has raised this error."""
    return isinstance(error, dist.DistError) or (world_size() > 1 and "gloo" in str(error))


@contextlib.contextmanager
def as_peer_lost() -> Iterator[None]:
    """Raise what the network raises inside as PeerLost; the time spent inside counts as waiting (TRAFFIC)."""
    start = time.perf_counter()
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise peer_lost_error(error) from error
    finally:
        TRAFFIC["seconds"] += time.perf_counter() - start


def _all_gather(tensor: Tensor) -> list[Tensor]:
    tensors = [torch.empty_like(tensor) for _ in range(world_size())]
    with as_peer_lost():
        dist.all_gather(tensors, tensor)
    return tensors


def gather(values: Sequence[float]) -> list[list[float]]:
    """Return the numbers (fp64) of every rank, in rank order; each rank gives equally many."""
    if world_size() == 1:
        return [list(values)]
    tensor = torch.tensor(values, dtype=torch.float64)
    tensors = _all_gather(tensor)
    TRAFFIC["bytes"] += tensor.nbytes
    return [tensor.tolist() for tensor in tensors]


def gather_objects(value) -> list:
    """Return the values of every rank, in rank order; each is something that JSON can hold."""
    if world_size() == 1:
        return [value]
    text = json.dumps(value).encode()
    lengths = [int(length) for (length,) in gather([len(text)])]
    padded = torch.frombuffer(bytearray(text.ljust(max(lengths))), dtype=torch.uint8)
    return [json.loads(tensor.numpy().tobytes()) for tensor in _all_gather(padded)]


def run_on_all(fn: Callable) -> list:
    """Call `fn` on every rank; return the results of all ranks, in rank order.

    What `fn` raises on one rank, a request to stop included, is raised on all ranks: none waits in vain.

    Args:
        fn: takes no argument and returns something that JSON can hold.

    Raises:
        PeerFailed: `fn` failed on another rank, and the error is none of SHARED_ERRORS.
        PeerLost: another rank has died or does not answer.
    """
    if world_size() == 1:
        return [fn()]
    result, error = None, None
    with join_context:
        try:
            with local_work():
                result = fn()
        except PeerLost:
            raise
        except (Exception, Interrupted) as raised:
            if join_context.in_forward:
                raise
            error = raised
    outcomes = gather_objects([type(error).__name__, str(error)] if error else [None, result])
    _raise_first_failure(outcomes, error)
    return [result for _, result in outcomes]


def _raise_first_failure(outcomes: Sequence[Sequence], own_error: BaseException | None) -> None:
    """Raise the error of the first rank that failed; one that SHARED_ERRORS lacks only where it occurred."""
    for number, (kind, text) in enumerate(outcomes):
        if kind in SHARED_ERRORS:
            raise SHARED_ERRORS[kind](text)
        if kind:
            raise own_error or PeerFailed(f"rank {number} failed: {kind}: {text}")


def run_on_main(fn: Callable):
    """Call `fn` on rank 0 alone and return its result on every rank; `fn` may not exchange with others."""
    return run_on_all(lambda: fn() if is_main_process() else None)[0]


def forwards_are_exchanges() -> bool:
    """Return whether a forward needs all ranks, because each holds a part of the weights."""
    return join_context is not NO_JOIN


# ---- the same weights everywhere ----


def is_divided(tensor: Tensor) -> bool:
    """Return whether each rank holds only a part of a tensor."""
    return isinstance(tensor, DTensor)


def tensor_fingerprint(tensors: Sequence[Tensor]) -> float:
    """Return 48 bits of a hash of the sums of blocks of the tensors' bits; fast on any device.

    Left out are tensors on the meta device, and those that the ranks have divided: there is one copy of them.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor.is_meta or is_divided(tensor):
            continue
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        flat = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
        sums = torch.stack([block.sum(dtype=torch.int64) for block in flat.split(1 << 20)])
        digest.update(json.dumps(sums.tolist()).encode())
    return float(int.from_bytes(digest.digest()[:6]))


def optimizer_params(optimizer) -> list[Tensor]:
    """Return the parameters of all groups of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def all_tensors(model, optimizer) -> list[Tensor]:
    """Return all weights of a model and what is trained beside it, each once."""
    return [*{id(p): p for p in (*model.parameters(), *optimizer_params(optimizer))}.values()]


def refuse_divergence(number: float, quantity: str) -> None:
    """Raise Diverged, with the numbers of the ranks, where not all ranks have the same number.

    Args:
        number: a fingerprint that all ranks should share.
        quantity: what the number is made of, for the message.
    """
    numbers = [number for (number,) in gather([number])]
    usual_number = Counter(numbers).most_common(1)[0][0]  # of equally frequent ones the first: rank 0's
    other_ranks = [str(r) for r, number in enumerate(numbers) if number != usual_number]
    if other_ranks:
        ranks = f"rank {', '.join(other_ranks)} of {world_size()}"
        raise Diverged(f"{ranks} has other {quantity} than the others: nothing is saved")
