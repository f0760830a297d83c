"""Perturbed weights without a perturbed copy: inside a `Streamed` context a function of torch that is given a trained
parameter works with θ + scale·z, of which only a block exists at a time.

Linear layers and GPT-2's Conv1D go through blocks of rows, an embedding touches the rows that are looked up, and what
is small (norms, biases) is perturbed whole for the one call. The parameter itself is never written. One forward may
hold several copies of a batch, one behind the other along the first axis, each under its own perturbation; then z of a
block is generated once for all of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

# What is asked of a parameter without reading its values.
LOOKS = {"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "data_ptr", "element_size", "__len__"}
LOOKS |= {"is_complex", "get_device", "untyped_storage", "storage_offset", "__repr__"}
VIEWS = {"T", "mT", "data", "H", "mH"}


def widened(values: Tensor) -> Tensor:
    """In single precision where it is half precision, else itself."""
    return values.float() if values.element_size() < 4 else values


class NoCopies(RuntimeError):
    """A function that is given a parameter has nothing that could be split into copies."""


class Streamed(TorchFunctionMode):
    """Show the parameters of `slots` as θ + scale·z_query to what runs inside, for each (query, scale) of `points`.

    `direction(slot, query, rows)` gives rows of z, fp32 in the shape of the parameter.
    """

    def __init__(self, slots, points: list[tuple[int, float]], direction: Callable):
        super().__init__()
        self.slots = {id(slot.param): slot for slot in slots}
        self.points, self.direction = points, direction

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        trained = [i for i, a in enumerate((*args, *kwargs.values())) if self.has_slot(a)]
        if not trained or self._looks(func):
            return func(*args, **kwargs)
        if func is F.linear and 1 in trained and len(args) > 1:
            return self.linear(*args, **kwargs)
        if func is torch.addmm and 2 in trained and len(args) == 3 and not kwargs:
            return self.addmm(*args)
        if func is F.embedding and trained == [1] and len(args) > 1:
            return self.embedding(*args, **kwargs)
        return self.whole(func, args, kwargs)

    def has_slot(self, a) -> bool:
        return any(map(self.has_slot, a)) if isinstance(a, list | tuple) else id(a) in self.slots

    @staticmethod
    def _looks(func) -> bool:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return (resolve_name(func) or "").split(".")[-2] not in VIEWS
        return name in LOOKS

    def shown(self, slot, rows) -> list[Tensor]:
        """Rows of θ + scale·z at each point, in the parameter's dtype; z of a query is generated once."""
        matrix, z = slot.matrix, {}
        values = widened(matrix[rows.start : rows.stop] if isinstance(rows, range) else matrix[rows])
        for query, _ in self.points:
            z[query] = self.direction(slot, query, rows) if query not in z else z[query]
        return [(z[q].to(values.dtype) * scale).add_(values).to(slot.param.dtype) for q, scale in self.points]

    def all_of(self, param: Tensor) -> list[Tensor]:
        """A small parameter, whole, at each point."""
        slot = self.slots[id(param)]
        return [value.view(param.shape) for value in self.shown(slot, range(len(slot.matrix)))]

    def biases(self, bias) -> list:
        return self.all_of(bias) if id(bias) in self.slots else [bias] * len(self.points)

    def split(self, x: Tensor) -> list[Tensor]:
        """The copies of a batch that lie one behind the other along the first axis."""
        n = len(self.points)
        if n > 1 and (x.dim() < 2 or len(x) % n):
            raise NoCopies(f"a tensor of shape {list(x.shape)} is not {n} copies")
        return list(x.chunk(n)) if n > 1 else [x]

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
        return torch.cat([w[i] for w, i in zip(shown, self.split(inverse), strict=True)])

    def whole(self, func, args, kwargs):
        """Any other function, once per point, with its parameters perturbed whole and its other tensors split."""
        made: dict[int, list[Tensor]] = {}
        n, splits = len(self.points), 0

        def at(point: int, a):
            nonlocal splits
            if isinstance(a, list | tuple):
                return type(a)(at(point, inner) for inner in a)
            if id(a) in self.slots:
                if id(a) not in made:
                    made[id(a)] = self.all_of(a)
                return made[id(a)][point]
            if n > 1 and isinstance(a, Tensor) and a.dim() > 1:
                splits += 1
                return self.split(a)[point]
            return a

        outs = [func(*(at(i, a) for a in args), **{k: at(i, a) for k, a in kwargs.items()}) for i in range(n)]
        if n > 1 and not splits:
            raise NoCopies(f"{getattr(func, '__name__', func)} is given a parameter and nothing that holds the copies")
        return outs[0] if n == 1 else torch.cat(outs)
