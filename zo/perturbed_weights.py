"""Perturbed weights without a perturbed copy of them.

Inside a `PerturbedWeights` context a torch function that is given a trained parameter works with
θ + scale · z, of which only some rows exist at a time.

Linear layers and GPT-2's Conv1D go through chunks of rows, an embedding touches the rows that are looked up,
and what is small (norms, biases) is perturbed in one piece for the one call. The parameter itself is never
written. One forward may hold several copies of a batch, one behind the other along the first axis, each under
its own perturbation; then z of a chunk is generated once for all of them. What a model computes from small
parameters alone (Gemma's 1 + w) is remembered, at each point, until it meets the batch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from zo import counter_rng
from zo.methods import Method, ParamBlock, to_single_precision
from zo.rng_kernels import DirectionSource, kernels_available

# Attributes and functions of a parameter that do not read its values.
METADATA_OPS = {
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "data_ptr",
    "element_size",
    "get_device",
    "untyped_storage",
    "storage_offset",
    "__len__",
    "__repr__",
}
VIEWS = {"T", "mT", "data", "H", "mH"}
MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


Point = tuple[int, float]  # (query, scale): the loss is asked for at θ + scale · z_query


def kernel_serves(method: Method, block: ParamBlock) -> bool:
    """Return whether a kernel draws z of a block and adds it: on a GPU, for plain directions and updates."""
    kind = type(method)
    is_plain = (kind.direction, kind.update) == (Method.direction, Method.update)
    p = block.param
    return is_plain and kernels_available(p.device) and p.is_contiguous() and p.dtype != torch.float64


class StepDirections:
    """The directions z_query of one step: rows of z, and rows of θ + scale · z.

    Args:
        method: says what the directions are.
        source: the random numbers.
        step: the number of the step.
    """

    def __init__(self, method: Method, source: DirectionSource, step: int):
        self.method = method
        self.source = source
        self.step = step
        self.cache: dict[tuple[ParamBlock, int], Tensor] = {}

    def z(self, block: ParamBlock, query: int) -> Tensor:
        """Return z of a whole block, fp32 in its shape, and keep it: for masters, which are small."""
        key = (block, query)
        if key not in self.cache:
            self.cache[key] = self.z_rows(block, query, range(len(block.as_rows)))
        return self.cache[key]

    def z_rows(self, block: ParamBlock, query: int, rows: range | Tensor) -> Tensor:
        """Return rows of z of a block, drawn anew: [len(rows), …] fp32."""
        z = self.method.direction(self.source, block, self.step, query, rows, block.param.device)
        return z.view(len(rows), *block.as_rows.shape[1:])

    def perturbed_rows(self, block: ParamBlock, rows: range | Tensor, points: list[Point]) -> list[Tensor]:
        """Return rows of θ + scale · z_query at each point, in the dtype of θ; each z is drawn once."""
        queries = list(dict.fromkeys(query for query, _ in points))
        if not isinstance(rows, range):
            values = block.as_rows[rows]
        else:
            values = block.as_rows[rows.start : rows.stop]
            if kernel_serves(self.method, block):
                return self._perturbed_by_kernel(block, rows.start, values, points, queries)
        z = {query: self.z_rows(block, query, rows) for query in queries}
        theta = to_single_precision(values)
        return [(z[query].to(theta.dtype) * scale).add_(theta).to(values.dtype) for query, scale in points]

    def _perturbed_by_kernel(
        self, block: ParamBlock, first_row: int, values: Tensor, points: list[Point], queries: list[int]
    ) -> list[Tensor]:
        """Return `perturbed_rows` by a kernel, which serves two points of a query at once."""
        start = block.offset + first_row * block.row_numel
        rows_of_query = {}
        for query in queries:
            scales = [scale for point_query, scale in points if point_query == query]
            rows_of_query[query] = iter(self.source.perturb_values((self.step, query), start, values, scales))
        return [next(rows_of_query[query]) for query, _ in points]


class CopiesUnsupported(RuntimeError):
    """One forward cannot serve several points: a function has no argument that could be split into copies."""


def reads_metadata(func) -> bool:
    """Return whether a torch function looks at a parameter without reading its values."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return (resolve_name(func) or "").split(".")[-2] not in VIEWS
    return name in METADATA_OPS


class PerturbedWeights(TorchFunctionMode):
    """Let what runs inside see the parameters of `blocks` as θ + scale · z_query.

    Args:
        blocks: one a parameter.
        points: [(query, scale)]; with n > 1 of them the batch holds n copies, and copy i sees point i.
        directions: gives z.

    `unchunked_bytes`: of the largest tensor that was perturbed in one piece though it has more than a chunk's
    elements.
    """

    def __init__(self, blocks: list[ParamBlock], points: list[Point], directions: StepDirections):
        super().__init__()
        self.blocks = {id(block.param): block for block in blocks}
        self.points = points
        self.directions = directions
        self.transposed: dict[int, tuple[Tensor, Tensor]] = {}  # id of W.T -> (W.T, W)
        # id of a tensor that was computed of parameters alone -> its value at each point
        self.derived: dict[int, list[Tensor]] = {}
        self.batch_tokens: set[int] = set()  # tokens of the batches so far, all copies
        self.unchunked_bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tracked = [i for i, a in enumerate((*args, *kwargs.values())) if self.holds_tracked(a)]
        if not tracked or reads_metadata(func):
            return func(*args, **kwargs)
        second_id, third_id = (id(a) for a in (*args, None, None, None)[1:3])
        if func is F.linear and second_id in self.blocks:
            return self.linear(*args, **kwargs)
        if func is torch.addmm and third_id in self.blocks and len(args) == 3 and not kwargs:
            return self.addmm(*args)
        if func is F.embedding and tracked == [1] and second_id in self.blocks:
            return self.embedding(*args, **kwargs)
        if func == torch.Tensor.T.__get__ and id(args[0]) in self.blocks and args[0].dim() == 2:
            view = func(*args, **kwargs)
            self.transposed[id(view)] = view, args[0]
            return view
        if func in MATMUL and tracked == [1] and second_id in self.transposed:  # Falcon's x @ W.T
            return self.linear(args[0], self.transposed[second_id][1])
        return self.apply_at_points(func, args, kwargs)

    # ---- tracked tensors ----

    def is_tracked(self, a) -> bool:
        """Return whether `a` is a parameter, its transpose, or computed of parameters alone."""
        return any(id(a) in registry for registry in (self.blocks, self.transposed, self.derived))

    def holds_tracked(self, a) -> bool:
        """Return whether `a` is tracked, or a list or tuple that holds a tracked tensor."""
        return any(map(self.holds_tracked, a)) if isinstance(a, list | tuple) else self.is_tracked(a)

    def perturbed_rows(self, block: ParamBlock, rows: range | Tensor) -> list[Tensor]:
        """Return rows of a parameter at each point."""
        return self.directions.perturbed_rows(block, rows, self.points)

    def values_at_points(self, a: Tensor) -> list[Tensor]:
        """Return a tracked tensor in one piece, at each point."""
        if id(a) in self.derived:
            return self.derived[id(a)]
        if id(a) in self.transposed:
            return [value.T for value in self.values_at_points(self.transposed[id(a)][1])]
        block = self.blocks[id(a)]
        if a.numel() > counter_rng.CHUNK_SIZE:
            self.unchunked_bytes = max(self.unchunked_bytes, a.nbytes)
        return [value.view(a.shape) for value in self.perturbed_rows(block, range(len(block.as_rows)))]

    def biases(self, bias: Tensor | None) -> list[Tensor | None]:
        """Return the bias of a layer at each point."""
        return self.values_at_points(bias) if self.is_tracked(bias) else [bias] * len(self.points)

    def register_derived(self, values: list[Tensor]) -> Tensor:
        """Remember the values of a tensor that is no batch; the value at the first point stands for all."""
        if len(values) > 1:
            self.derived[id(values[0])] = values
        return values[0]

    def split_copies(self, x: Tensor) -> list[Tensor]:
        """Return the copies of a batch, which lie one behind the other along the first axis.

        A matrix must have a row for every token of the batch: tokens that were routed to an expert mix the
        copies.
        """
        n = len(self.points)
        if n == 1:
            return [x]
        if x.dim() == 3 or not (self.batch_tokens and x.is_floating_point()):
            self.batch_tokens.add(x.shape[:-1].numel() if x.is_floating_point() else x.numel())
        mixed = x.dim() == 2 and x.is_floating_point() and len(x) not in self.batch_tokens
        if x.dim() < 2 or len(x) % n or mixed:
            raise CopiesUnsupported(f"a tensor of shape {list(x.shape)} is not {n} copies")
        return list(x.chunk(n))

    # ---- torch functions ----

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `F.linear`, a chunk of the weight's rows at a time."""
        block = self.blocks[id(weight)]
        y = x.new_empty(*x.shape[:-1], len(weight))
        inputs = [copy.reshape(-1, copy.shape[-1]) for copy in self.split_copies(x)]
        outputs = [copy.reshape(-1, copy.shape[-1]) for copy in self.split_copies(y)]
        biases = self.biases(bias)
        for rows in block.row_chunks():
            columns = slice(rows.start, rows.stop)
            weights = self.perturbed_rows(block, rows)
            for x_i, y_i, w_i, bias_i in zip(inputs, outputs, weights, biases, strict=True):
                y_i[:, columns] = F.linear(x_i, w_i, None if bias_i is None else bias_i[columns])
        return y

    def addmm(self, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Compute `torch.addmm` of GPT-2's Conv1D, whose weight is [in, out], a chunk of rows at a time."""
        block = self.blocks[id(weight)]
        y = x.new_empty(len(x), weight.shape[1])
        for y_i, bias_i in zip(self.split_copies(y), self.biases(bias), strict=True):
            y_i.copy_(bias_i.expand_as(y_i))
        for rows in block.row_chunks():
            weights = self.perturbed_rows(block, rows)
            for x_i, y_i, w_i in zip(self.split_copies(x), self.split_copies(y), weights, strict=True):
                y_i.addmm_(x_i[:, rows.start : rows.stop], w_i)
        return y

    def embedding(self, ids: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        """Compute `F.embedding` with the rows that are looked up."""
        rows, inverse = ids.unique(return_inverse=True)
        weights = self.perturbed_rows(self.blocks[id(weight)], rows)
        if len(ids) == 1:  # positions that serve all rows
            return self.register_derived([w[inverse] for w in weights])
        return torch.cat([w[i] for w, i in zip(weights, self.split_copies(inverse), strict=True)])

    def apply_at_points(self, func, args, kwargs):
        """Call any other function once a point: tracked tensors in one piece, the other tensors split."""
        n = len(self.points)
        tracked: dict[int, list[Tensor]] = {}
        num_untracked = 0
        num_split = 0

        def at(point: int, a):
            nonlocal num_untracked, num_split
            if isinstance(a, list | tuple):
                return type(a)(at(point, item) for item in a)
            if self.is_tracked(a):
                if id(a) not in tracked:
                    tracked[id(a)] = self.values_at_points(a)
                return tracked[id(a)][point]
            if n == 1 or not isinstance(a, Tensor):
                return a
            num_untracked += 1
            if a.dim() < 2:
                return a
            num_split += 1
            return self.split_copies(a)[point]

        outputs = []
        for point in range(n):
            keywords = {name: at(point, a) for name, a in kwargs.items()}
            outputs.append(func(*(at(point, a) for a in args), **keywords))
        if n == 1:
            return outputs[0]
        # Attention in one function gives tuples.
        are_tensors = all(isinstance(output, Tensor) for output in outputs)
        if are_tensors and num_split:
            return torch.cat(outputs)
        stacked = any(values[0].dim() > 2 for values in tracked.values())  # experts: see `split_copies`
        if not are_tensors or num_untracked or stacked or outputs[0].numel() > counter_rng.CHUNK_SIZE:
            name = getattr(func, "__name__", func)
            raise CopiesUnsupported(f"{name} is given a parameter and nothing that holds the copies")
        return self.register_derived(outputs)
