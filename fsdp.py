"""Weights divided among the ranks of torchrun, for `--trainer regular --fsdp`: torch's `fully_shard` (FSDP2).

Every rank holds a part of each weight, of its gradient and of its optimizer state; a layer is put together while it
runs. Adapters stay whole on every rank, and their gradients go where they went before (shares.py). The engine is
torch's; here is what a run around it needs. Each forward is an exchange, so the ranks call the model equally often
(`Company`). What is saved and loaded is whole tensors, so that a run goes on with any number of ranks, or with one.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import parallel
from placement import piece
from utils import keep_pages

WORDS = {"full_shard", "auto_wrap", "true"}  # what there is; `--fsdp` alone says "true"


def shard(model: nn.Module, adapters: Iterable[Tensor], device: torch.device) -> None:
    """Divide the weights of a model in place, all but these adapters; it lies on the host before, on `device` after."""
    keep_pages(False)  # a layer that comes and goes leaves holes, which soon take more than the whole model
    mesh, kept = init_device_mesh(device.type, (parallel.size(),)), set(adapters)
    for p in kept:
        p.data = p.data.to(device)
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for block in (*reversed(blocks), model):  # what lies inside first
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    model.register_load_state_dict_pre_hook(divide)
    with torch.no_grad():  # the first forward makes the buffers, which inference mode would spoil for training
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device))
    parallel.company = Company(model)


class Company(contextlib.AbstractContextManager):
    """Inside, the ranks do different things; one that is done runs the model along with the others until all are.

    `torn`: a forward is under way, or an error has broken it off: the others wait for weights, and can't be told.
    """

    def __init__(self, model: nn.Module):
        self.model, self.apart, self.torn = model, False, False
        model.register_forward_pre_hook(self.begin, prepend=True)  # ahead of the hook that gathers weights
        model.register_forward_hook(self.end)

    def begin(self, *_) -> None:
        if self.apart:
            parallel.gather([1.0])
        self.torn = True

    def end(self, *_) -> None:
        self.torn = False

    def __enter__(self):
        self.apart = True

    def __exit__(self, kind, *_) -> None:
        try:
            while kind is None and any(busy for (busy,) in parallel.gather([0.0])):
                self.apart = False
                self.model.eval()  # dropout would draw numbers
                with torch.no_grad():
                    self.model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.model.device))
                self.apart = True
        finally:
            self.apart = False


# ---- whole tensors ----


def divide(model: nn.Module, state: dict, prefix: str, *_) -> None:
    """A hook before `load_state_dict` of a model."""
    names = {f"{prefix}{name}": p for name, p in model.state_dict(keep_vars=True).items()}
    for name in state.keys() & names.keys():
        state[name] = piece(state[name], names[name])


def divide_state(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """A hook before `load_state_dict` of an optimizer, which would put whole tensors on the device."""
    trained = parallel.trained(optimizer)
    state = {
        i: {
            k: piece(v, trained[i]) if isinstance(v, Tensor) and v.shape == trained[i].shape else v
            for k, v in of.items()
        }
        for i, of in saved["state"].items()
    }
    return {**saved, "state": state}


def whole(tree, done: dict[int, Tensor]):
    """The same lists and dicts with every divided tensor put together on the host of rank 0 (None elsewhere); all ranks
    call this alike. `done` knows those that two names share."""
    if isinstance(tree, dict):
        return {key: whole(value, done) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value, done) for value in tree)
    if not isinstance(tree, DTensor):
        return tree
    if id(tree) not in done:
        full = tree.detach().full_tensor()
        done[id(tree)] = full.cpu() if parallel.leads() else None
    return done[id(tree)]


@contextlib.contextmanager
def gathered(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[dict[str, Tensor] | None]:
    """The model's state dict in whole tensors, on rank 0; inside, the optimizer's `state_dict()` gives whole ones too.
    None where nothing is divided, or nothing that is divided is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not any(isinstance(p, DTensor) for p in trained):
        yield None
        return
    state = whole(model.state_dict(keep_vars=True), {})
    if optimizer is None:
        yield state
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
    held = whole(optimizer.state_dict(), {})
    hook = optimizer.register_state_dict_post_hook(lambda *_: held)
    try:
        yield state
    finally:
        hook.remove()
