"""Perturbed weights without a perturbed copy: inside a `Streamed` context a function of torch that is given a trained
parameter works with θ + scale·z, of which only a block exists at a time.

Linear layers and GPT-2's Conv1D go through blocks of rows, an embedding touches the rows that are looked up, and what
is small (norms, biases) is perturbed whole for the one call. The parameter itself is never written. One forward may
hold several copies of a batch, one behind the other along the first axis, each under its own perturbation; then z of a
block is generated once for all of them. What a model makes of small parameters alone (Gemma's 1 + w) is kept, at each
point, until it meets the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from zo import counter_rng

# What is asked of a parameter without reading its values.
METADATA_OPS = {
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "data_ptr",
    "element_size",
    "__len__",
}
METADATA_OPS |= {"is_complex", "get_device", "untyped_storage", "storage_offset", "__repr__"}
VIEWS = {"T", "mT", "data", "H", "mH"}
MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


@dataclass
class ParamBlock:
    """One trained tensor; its elements are in z from `offset` on. With a master, one for all parameters of a group."""

    param: Tensor
    offset: int
    group: int
    decayed: float = 0.0  # weight decay λ
    block: int = 0  # elements of a block; 0: `directions.BLOCK`
    parts: list[Tensor] = field(default_factory=list)  # with a master: the parameters that it holds
    z: dict[int, Tensor] = field(default_factory=dict)  # with a master: of the queries of this step

    @property
    def matrix(self) -> Tensor:
        """The tensor with rows along its first axis."""
        return self.param if self.param.dim() else self.param.view(1)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.matrix[0].numel()

    @property
    def shown_on(self) -> torch.device:
        """Where what a master holds is wanted: one transfer brings it all there."""
        return self.parts[0].device if self.parts else self.param.device

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat [n], or [copies, n], as views in the shapes of the parameters that a master holds."""
        pieces = flat.split([p.numel() for p in self.parts], dim=-1)
        return [piece.view(*flat.shape[:-1], *p.shape) for piece, p in zip(pieces, self.parts, strict=True)]

    def write(self, flat: Tensor) -> None:
        for p, values in zip(self.parts, self.split(flat.to(self.shown_on)), strict=True):
            p.copy_(values)

    def blocks(self) -> list[range]:
        """The rows of the tensor in blocks of about `block` elements."""
        step = max(1, (self.block or counter_rng.CHUNK_SIZE) // self.width)
        n = len(self.matrix)
        return [range(first, min(first + step, n)) for first in range(0, n, step)]


def to_single_precision(values: Tensor) -> Tensor:
    """In single precision where it is half precision, else itself."""
    return values.float() if values.element_size() < 4 else values


class CopiesUnsupported(RuntimeError):
    """A function that is given a parameter has nothing that could be split into copies."""


class PerturbedWeights(TorchFunctionMode):
    """Show the parameters of `slots` as θ + scale·z_query to what runs inside, for each (query, scale) of `points`.

    `shown(slot, rows, points=points)` gives rows of it at each point, in the parameter's dtype.
    """

    def __init__(self, slots, points: list[tuple[int, float]], shown: Callable):
        super().__init__()
        self.slots = {id(slot.param): slot for slot in slots}
        self.points, self.shown = points, partial(shown, points=points)
        self.turned: dict[int, tuple[Tensor, Tensor]] = {}  # id of W.T -> (it, W)
        self.made: dict[int, list[Tensor]] = {}  # id of what was made of parameters alone -> it at each point
        self.sizes: set[int] = set()  # tokens of whole batches, all copies
        self.largest = 0  # bytes of what was perturbed whole though it is more than a block

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        trained = [i for i, a in enumerate((*args, *kwargs.values())) if self.has_slot(a)]
        if not trained or self._looks(func):
            return func(*args, **kwargs)
        second, third = (id(a) for a in (*args, None, None, None)[1:3])
        if func is F.linear and second in self.slots:
            return self.linear(*args, **kwargs)
        if func is torch.addmm and third in self.slots and len(args) == 3 and not kwargs:
            return self.addmm(*args)
        if func is F.embedding and trained == [1] and second in self.slots:
            return self.embedding(*args, **kwargs)
        if func == torch.Tensor.T.__get__ and id(args[0]) in self.slots and args[0].dim() == 2:
            turned = func(*args, **kwargs)  # a view
            self.turned[id(turned)] = turned, args[0]
            return turned
        if func in MATMUL and trained == [1] and second in self.turned:  # Falcon's x @ W.T
            return self.linear(args[0], self.turned[second][1])
        return self.whole(func, args, kwargs)

    def is_shown(self, a) -> bool:
        return any(id(a) in known for known in (self.slots, self.turned, self.made))

    def has_slot(self, a) -> bool:
        return any(map(self.has_slot, a)) if isinstance(a, list | tuple) else self.is_shown(a)

    @staticmethod
    def _looks(func) -> bool:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return (resolve_name(func) or "").split(".")[-2] not in VIEWS
        return name in METADATA_OPS

    def all_of(self, a: Tensor) -> list[Tensor]:
        """A small parameter, or what was made of some, whole, at each point."""
        if id(a) in self.made:
            return self.made[id(a)]
        if id(a) in self.turned:
            return [value.T for value in self.all_of(self.turned[id(a)][1])]
        slot = self.slots[id(a)]
        if a.numel() > counter_rng.CHUNK_SIZE:
            self.largest = max(self.largest, a.nbytes)
        return [value.view(a.shape) for value in self.shown(slot, range(len(slot.matrix)))]

    def biases(self, bias) -> list:
        return self.all_of(bias) if self.is_shown(bias) else [bias] * len(self.points)

    def keep(self, values: list[Tensor]) -> Tensor:
        """Something that is no batch, at each point: the first of them stands for all."""
        if len(values) > 1:
            self.made[id(values[0])] = values
        return values[0]

    def split(self, x: Tensor) -> list[Tensor]:
        """The copies of a batch that lie one behind the other along the first axis.

        A matrix must have a row for every token of the batch: tokens that were routed to an expert mix the copies.
        """
        n = len(self.points)
        if n == 1:
            return [x]
        if x.dim() == 3 or not (self.sizes and x.is_floating_point()):
            self.sizes.add(x.shape[:-1].numel() if x.is_floating_point() else x.numel())
        if x.dim() < 2 or len(x) % n or (x.dim() == 2 and x.is_floating_point() and len(x) not in self.sizes):
            raise CopiesUnsupported(f"a tensor of shape {list(x.shape)} is not {n} copies")
        return list(x.chunk(n))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        slot = self.slots[id(weight)]
        y = x.new_empty(*x.shape[:-1], len(weight))
        ins, outs = ([part.reshape(-1, part.shape[-1]) for part in self.split(t)] for t in (x, y))
        biases = self.biases(bias)
        for rows in slot.blocks():
            for x_c, y_c, w_c, b in zip(ins, outs, self.shown(slot, rows), biases, strict=True):
                y_c[:, rows.start : rows.stop] = F.linear(x_c, w_c, None if b is None else b[rows.start : rows.stop])
        return y

    def addmm(self, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        slot, y = self.slots[id(weight)], x.new_empty(len(x), weight.shape[1])
        for y_c, b in zip(self.split(y), self.biases(bias), strict=True):
            y_c.copy_(b.expand_as(y_c))
        for rows in slot.blocks():
            for x_c, y_c, w_c in zip(self.split(x), self.split(y), self.shown(slot, rows), strict=True):
                y_c.addmm_(x_c[:, rows.start : rows.stop], w_c)
        return y

    def embedding(self, ids: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        rows, inverse = ids.unique(return_inverse=True)
        shown = self.shown(self.slots[id(weight)], rows)
        if len(ids) == 1:  # positions that serve all rows
            return self.keep([w[inverse] for w in shown])
        return torch.cat([w[i] for w, i in zip(shown, self.split(inverse), strict=True)])

    def whole(self, func, args, kwargs):
        """Any other function, once per point, with its parameters perturbed whole and its other tensors split."""
        held: dict[int, list[Tensor]] = {}
        n, splits, others = len(self.points), 0, 0

        def at(point: int, a):
            nonlocal splits, others
            if isinstance(a, list | tuple):
                return type(a)(at(point, inner) for inner in a)
            if self.is_shown(a):
                if id(a) not in held:
                    held[id(a)] = self.all_of(a)
                return held[id(a)][point]
            if n > 1 and isinstance(a, Tensor):
                others += 1
                if a.dim() > 1:
                    splits += 1
                    return self.split(a)[point]
            return a

        outs = [func(*(at(i, a) for a in args), **{k: at(i, a) for k, a in kwargs.items()}) for i in range(n)]
        if n == 1:
            return outs[0]
        tensors = all(isinstance(out, Tensor) for out in outs)  # attention in one function, say, gives tuples
        if tensors and splits:
            return torch.cat(outs)
        stacked = any(values[0].dim() > 2 for values in held.values())  # experts: see `split`
        if not tensors or others or stacked or outs[0].numel() > counter_rng.CHUNK_SIZE:
            raise CopiesUnsupported(
                f"{getattr(func, '__name__', func)} is given a parameter and nothing that holds the copies"
            )
        return self.keep(outs)
