"""`Method`: plain MeZO, and the seam on which the methods of other papers stand.

A zeroth-order method is where directions come from, at which points the loss is asked for, and how losses
become an update. That is a subclass of `Method`; the engine does everything else. One-sided differences, each
query against the same point, are

    class OneSided(Method):
        def points(self):
            return [(0, 0.0), *((query, 1.0) for query in range(self.queries))]

        def projected(self, losses, eps):
            return [(loss - losses[0]) / eps for loss in losses[1:]]
"""

import torch
from torch import Tensor

from zo.param_block import ParamBlock
from zo.rng_kernels import DirectionSource


class Method:
    """MeZO with n queries a step, whose updates are averaged (arXiv 2305.17333, Algorithm 1 and its n-SPSA).

    Args:
        queries: number of directions a step.

    Attributes of an instance (numbers, lists, tensors) are part of the optimizer's `state_dict`.
    """

    replayable = True  # False: `update` needs more of a step than the coefficients that a trajectory keeps
    full_only = False  # True: directions need the shapes of tensors, and adapters lie in one flat vector
    adapters_only = False  # True: directions need the pairs of A and B
    least_queries = 1  # the smallest number of queries that makes sense

    def __init__(self, queries: int = 1):
        self.queries = queries

    def points(self) -> list[tuple[int, float]]:
        """Return [(query, factor)]: the loss is asked for at θ + factor · ε · z_query."""
        return [(query, sign) for query in range(self.queries) for sign in (1.0, -1.0)]

    def projected(self, losses: list[float], eps: float) -> list[float]:
        """Return a projected gradient a query, (ℓ₊ − ℓ₋) / 2ε, of the losses at `points()`."""
        return [(plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]

    def direction(
        self, source: DirectionSource, block: ParamBlock, step: int, query: int, rows: range | Tensor,
        device: torch.device | str,
    ) -> Tensor:  # fmt: skip
        """Return rows of z_query of one block: a pure function of (seed, step, query).

        Args:
            source: the random numbers; `source.rows(counter, …)` draws.
            block: `block.as_rows` is the tensor. With a master `block.param` is one flat vector of all
                parameters of a group, which `block.split` gives in their shapes, and `rows` are all of it.
            rows: a range, or int64 indices where an embedding looks rows up.

        Returns:
            [len(rows), block.row_numel] fp32, elements of variance 1.
        """
        return source.rows((step, query), block.offset, block.row_numel, rows, device)

    def update(self, values: Tensor, directions: list[tuple[float, Tensor]]) -> None:
        """Change some rows in place.

        Args:
            values: fp32 (fp64 of fp64 weights), after weight decay.
            directions: [(coefficient, rows of z)]; the coefficient holds learning rate, clip, normaliser and
                1 / queries, and is what a trajectory keeps of a step.
        """
        for coefficient, z in directions:
            # Rounded twice: `alpha=` would fuse on some CPUs and give other bits.
            values.sub_(z * coefficient)
