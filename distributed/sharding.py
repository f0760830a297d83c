"""Divide weights among the ranks (`--trainer regular --fsdp`) by torch's `fully_shard` (FSDP2).

Every rank holds a part (a shard) of each weight, of its gradient and of its optimizer state; a layer is put
together while it runs. Adapters stay whole on every rank, and `data_parallel.sum_gradients` sums their
gradients. Each forward is an exchange, so all ranks have to call the model equally often (`UnevenForwards`).
Files hold whole tensors, so that a run goes on with any number of ranks, or with one process.

The rest of the program calls `shard_model` once, `prepare_optimizer` and `full_state_dict` around its
checkpoints, `copy_into` for a weight that is computed on every rank, and `forget_model` before another model
is loaded.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed import collectives


def shard_model(model: nn.Module, adapter, device: torch.device) -> None:
    """Divide the weights of a model among the ranks, in place; this can't be undone.

    Args:
        model: all of it on the host; afterwards its shards and the adapter are on `device`.
        adapter: a LoRA or a PrefixTuning, which stays whole on every rank, or None. Has
            `move_with_model(device)` and `parameters()`.
        device: of this rank.

    Raises:
        Diverged: the ranks have not loaded the same weights, which nothing could tell later.
    """
    fingerprint = collectives.tensor_fingerprint([*model.parameters()])
    collectives.refuse_divergence(fingerprint, "weights before the first step")
    whole_params = set()
    if adapter:
        adapter.move_with_model(device)
        whole_params = set(adapter.parameters())
    for p in whole_params:
        p.data = p.data.to(device)
    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for module in (*reversed(blocks), model):  # the inner ones first
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole_params)
    model.register_load_state_dict_pre_hook(_shard_model_state)
    _run_one_token(model, device)  # makes the buffers, which inference mode would spoil for training
    collectives.join_context = UnevenForwards(model)


def forget_model() -> None:
    """Forget the model that was divided last, before another model is loaded."""
    collectives.join_context = collectives.NO_JOIN


@torch.no_grad()
def _run_one_token(model: nn.Module, device: torch.device) -> None:
    model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device))


class UnevenForwards(contextlib.AbstractContextManager):
    """Inside, the ranks may call the model unequally often: a rank that has finished runs it with the others.

    Before each forward, and when it has finished, a rank says whether it is still busy.

    Attributes:
        in_forward: a forward is under way, or an error has broken it off: the other ranks wait for weights
            then, and can't be told of the error.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.uneven = False
        self.in_forward = False
        # Ahead of torch's hook, which gathers weights.
        model.register_forward_pre_hook(self.begin_forward, prepend=True)
        model.register_forward_hook(self.end_forward)

    def begin_forward(self, *_) -> None:
        """Tell the ranks that have finished to run the model too."""
        if self.uneven:
            collectives.gather([1.0])
        self.in_forward = True

    def end_forward(self, *_) -> None:
        """Note that the other ranks do not wait for this one any more."""
        self.in_forward = False

    def __enter__(self):
        self.uneven = True

    def __exit__(self, kind, *_) -> None:
        try:
            while kind is None and any(busy for (busy,) in collectives.gather([0.0])):
                self.uneven = False
                self.model.eval()  # dropout would draw numbers
                _run_one_token(self.model, self.model.device)
                self.uneven = True
        finally:
            self.uneven = False


# ---- from whole tensors to shards ----


def _local_shard(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a whole tensor where `like` is divided, else the tensor itself."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_into(weight: Tensor, values: Tensor) -> None:
    """Overwrite a weight, divided or whole, with values that every rank has."""
    weight.copy_(_local_shard(values, weight))


def _shard_model_state(model: nn.Module, state: dict, prefix: str, *_) -> None:
    """Take the shards out of a state dict that a model is about to load (a hook)."""
    params = {f"{prefix}{name}": p for name, p in model.state_dict(keep_vars=True).items()}
    for name in state.keys() & params.keys():
        state[name] = _local_shard(state[name], params[name])


def _shard_optimizer_state(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """Return a state dict with shards, which an optimizer is about to load (a hook).

    The optimizer would put whole tensors on the device, which may be too small for them.
    """
    params = collectives.optimizer_params(optimizer)

    def shard(value, param: Tensor):
        is_like_param = isinstance(value, Tensor) and value.shape == param.shape
        return _local_shard(value, param) if is_like_param else value

    state = {
        i: {name: shard(value, params[i]) for name, value in param_state.items()}
        for i, param_state in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer load whole tensors where its parameters are divided."""
    optimizer.register_load_state_dict_pre_hook(_shard_optimizer_state)


# ---- from shards to whole tensors ----


def _gather_full_tensors(tree, full_tensors: dict[int, Tensor | None]):
    """Return the same lists and dicts with whole tensors on the host of rank 0, None elsewhere; an exchange.

    Args:
        full_tensors: {id of a divided tensor: its whole}, for tensors that stand under two names.
    """
    if isinstance(tree, dict):
        return {key: _gather_full_tensors(value, full_tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_gather_full_tensors(value, full_tensors) for value in tree)
    if not isinstance(tree, DTensor):
        return tree
    if id(tree) not in full_tensors:
        full_tensor = tree.detach().full_tensor()
        full_tensors[id(tree)] = full_tensor.cpu() if collectives.is_main_process() else None
    return full_tensors[id(tree)]


@contextlib.contextmanager
def full_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[dict[str, Tensor | None] | None]:
    """Give the model's state dict in whole tensors, on rank 0.

    Inside, `optimizer.state_dict()` has whole tensors too. The state is None where nothing is divided, or
    nothing that is divided is trained.
    """
    trained_params = [p for p in model.parameters() if p.requires_grad]
    if not any(isinstance(p, DTensor) for p in trained_params):
        yield None
        return
    model_state = _gather_full_tensors(model.state_dict(keep_vars=True), {})
    if optimizer is None:
        yield model_state
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
    optimizer_state = _gather_full_tensors(optimizer.state_dict(), {})
    hook = optimizer.register_state_dict_post_hook(lambda *_: optimizer_state)
    try:
        yield model_state
    finally:
        hook.remove()
