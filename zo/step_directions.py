"""`StepDirections`: the directions of one step, and parameters perturbed along them."""

import torch
from torch import Tensor

from zo.method import Method
from zo.param_block import ParamBlock, to_single_precision
from zo.rng_kernels import DirectionSource, kernels_available

Point = tuple[int, float]  # (query, scale): the loss is asked for at θ + scale · z_query


def kernel_serves(method: Method, block: ParamBlock) -> bool:
    """Return whether a kernel draws z of a block and adds it: on a GPU, for plain directions and updates."""
    kind = type(method)
    plain = (kind.direction, kind.update) == (Method.direction, Method.update)
    p = block.param
    return plain and kernels_available(p.device) and p.is_contiguous() and p.dtype != torch.float64


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
        """`perturbed_rows` by a kernel, which serves two points of a query at once."""
        start = block.offset + first_row * block.row_numel
        perturbed = {}
        for query in queries:
            scales = [scale for other, scale in points if other == query]
            perturbed[query] = iter(self.source.perturbed((self.step, query), start, values, scales))
        return [next(perturbed[query]) for query, _ in points]
