"""TODO zo.method."""

import logging

from torch import Tensor

from zo.perturbed_weights import ParamBlock
from zo.rng_kernels import DirectionSource

logger = logging.getLogger(__name__)


class Method:
    """Plain MeZO with n queries, and the seam on which other methods stand.

    `points()`: [(query, factor)], the loss is asked for at θ + factor · ε · z_query. `projected(losses, eps)`: one
    projected gradient a query, of one loss a point in the order of `points()`. `direction(…)`: rows of z_query of one
    tensor, fp32 [len(rows), slot.width]; `rows` is a range, or int64 indices where an embedding looks rows up. With
    adapters `slot.param` is one flat vector of all of them, of width 1, and `rows` is all of it. `update(values, zs)`:
    the new values of some rows, from [(coefficient, rows of z)], in place, fp32 (fp64 of fp64 weights), each z of their
    shape; the coefficient holds rate, clip and normaliser, and is what a trajectory keeps of a step. A method whose
    update needs more has `replayable = False`.
    """

    replayable = True
    full_only = False  # its directions need the tensors of a full fine-tune, and adapters lie in one flat vector
    adapters_only = False  # its directions need the pairs of A and B
    least_queries = 1  # `--zo_queries` that it makes sense with

    def __init__(self, queries: int = 1):
        self.queries = queries

    def points(self) -> list[tuple[int, float]]:
        return [(query, sign) for query in range(self.queries) for sign in (1.0, -1.0)]

    def projected(self, losses: list[float], eps: float) -> list[float]:
        return [(plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]

    def direction(
        self, noise: DirectionSource, slot: ParamBlock, step: int, query: int, rows: range | Tensor, device
    ) -> Tensor:
        return noise.rows((step, query), slot.offset, slot.width, rows, device)

    def update(self, values: Tensor, zs: list[tuple[float, Tensor]]) -> None:
        for coefficient, z in zs:
            values.sub_(z * coefficient)  # rounded twice: `alpha=` would fuse on some CPUs and give other bits
