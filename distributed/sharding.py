"""Weights divided among the ranks of torchrun, for `--trainer regular --fsdp`: torch's `fully_shard` (FSDP2).

Every rank holds a part of each weight, of its gradient and of its optimizer state; a layer is put together while it
runs. Adapters stay whole on every rank, and their gradients go where they went before (shares.py). The engine is
torch's; here is what a run around it needs. Each forward is an exchange, so the ranks call the model equally often
(`Company`). What is saved and loaded is whole tensors, so that a run goes on with any number of ranks, or with one.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cli.machine import keep_pages
from distributed import collectives

FSDP_VALUES = {"full_shard", "auto_wrap", "true"}  # what there is; `--fsdp` alone says "true"


def shard_model(model: nn.Module, adapters: Iterable[Tensor], device: torch.device) -> None:
    """Divide the weights of a model in place, all but these adapters; it lies on the host before, on `device` after."""
    keep_pages(False)  # a layer that comes and goes leaves holes, which soon take more than the whole model
    mesh, kept = init_device_mesh(device.type, (collectives.world_size(),)), set(adapters)
    for p in kept:
        p.data = p.data.to(device)
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for block in (*reversed(blocks), model):  # what lies inside first
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    model.register_load_state_dict_pre_hook(shard_model_state)
    with torch.no_grad():  # the first forward makes the buffers, which inference mode would spoil for training
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device))
    collectives.join_context = UnevenForwards(model)


class UnevenForwards(contextlib.AbstractContextManager):
    """Inside, the ranks do different things; one that is done runs the model along with the others until all are.

    `torn`: a forward is under way, or an error has broken it off: the others wait for weights, and can't be told.
    """

    def __init__(self, model: nn.Module):
        self.model, self.uneven, self.in_forward = model, False, False
        model.register_forward_pre_hook(self.begin, prepend=True)  # ahead of the hook that gathers weights
        model.register_forward_hook(self.end)

    def begin(self, *_) -> None:
        if self.uneven:
            collectives.gather([1.0])
        self.in_forward = True

    def end(self, *_) -> None:
        self.in_forward = False

    def __enter__(self):
        self.uneven = True

    def __exit__(self, kind, *_) -> None:
        try:
            while kind is None and any(busy for (busy,) in collectives.gather([0.0])):
                self.uneven = False
                self.model.eval()  # dropout would draw numbers
                with torch.no_grad():
                    self.model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.model.device))
                self.uneven = True
        finally:
            self.uneven = False


# ---- whole tensors ----


def shard_model_state(model: nn.Module, state: dict, prefix: str, *_) -> None:
    """A hook before `load_state_dict` of a model."""
    names = {f"{prefix}{name}": p for name, p in model.state_dict(keep_vars=True).items()}
    for name in state.keys() & names.keys():
        state[name] = local_shard(state[name], names[name])


def shard_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """A hook before `load_state_dict` of an optimizer, which would put whole tensors on the device."""
    trained = collectives.optimizer_params(optimizer)
    state = {
        i: {
            k: local_shard(v, trained[i]) if isinstance(v, Tensor) and v.shape == trained[i].shape else v
            for k, v in of.items()
        }
        for i, of in saved["state"].items()
    }
    return {**saved, "state": state}


def gather_full_tensors(tree, done: dict[int, Tensor]):
    """The same lists and dicts with every divided tensor put together on the host of rank 0 (None elsewhere); all ranks
    call this alike. `done` knows those that two names share."""
    if isinstance(tree, dict):
        return {key: gather_full_tensors(value, done) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gather_full_tensors(value, done) for value in tree)
    if not isinstance(tree, DTensor):
        return tree
    if id(tree) not in done:
        full = tree.detach().full_tensor()
        done[id(tree)] = full.cpu() if collectives.is_main_process() else None
    return done[id(tree)]


@contextlib.contextmanager
def full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[dict[str, Tensor] | None]:
    """The model's state dict in whole tensors, on rank 0; inside, the optimizer's `state_dict()` gives whole ones too.
    None where nothing is divided, or nothing that is divided is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not any(isinstance(p, DTensor) for p in trained):
        yield None
        return
    state = gather_full_tensors(model.state_dict(keep_vars=True), {})
    if optimizer is None:
        yield state
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
    held = gather_full_tensors(optimizer.state_dict(), {})
    hook = optimizer.register_state_dict_post_hook(lambda *_: held)
    try:
        yield state
    finally:
        hook.remove()


logger = logging.getLogger(__name__)


def local_shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have, where `like` is divided (fsdp.py)."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
