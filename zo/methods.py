"""Methods of other papers, each a few lines on the seam of `zo.Method`; `METHODS` has them by name."""

import math
from dataclasses import replace
from statistics import stdev

from torch import Tensor

from zo.method import Method
from zo.param_block import ParamBlock
from zo.rng_kernels import DirectionSource


class LOZO(Method):
    """Low-rank directions for full weights, lazily resampled (arXiv 2410.07698, Algorithm 1).

    z of a matrix is U Vᵀ / √r with U [m, r] fresh in every step and V [n, r] drawn anew every `interval`
    steps, so that the updates of an interval add up to one of rank r. The factor gives its elements variance
    1, as full directions have. Vectors get full directions.
    """

    full_only = True
    rank = 2
    interval = 50

    def direction(self, source: DirectionSource, block: ParamBlock, step, query, rows, device) -> Tensor:
        if block.as_rows.dim() != 2:
            return super().direction(source, block, step, query, rows, device)
        r = self.rank
        u = source.rows((step, query, "U"), block.offset * r, r, rows, device)
        v = source.rows((step // self.interval, "V"), block.offset * r, r, range(block.row_numel), device)
        return u @ v.T / r**0.5


class FZOO(Method):
    """One-sided differences in steps as long as the losses are alike (arXiv 2506.09034): θ ← θ − η g / σ with
    g = Σ (ℓ(θ + ε uᵢ) − ℓ(θ)) uᵢ / (ε N), uᵢ of ±1, and σ the standard deviation of the N perturbed losses.

    N is the number of queries, 8 in the paper: N + 1 forwards a step.
    """

    least_queries = 2

    def points(self) -> list[tuple[int, float]]:
        return [(0, 0.0), *((query, 1.0) for query in range(self.queries))]

    def projected(self, losses: list[float], eps: float) -> list[float]:
        finite = all(map(math.isfinite, losses))
        sigma = stdev(losses[1:]) if finite else math.nan  # NaN: the step is skipped
        return [(loss - losses[0]) / (eps * sigma) if sigma else 0.0 for loss in losses[1:]]

    def direction(self, source: DirectionSource, block: ParamBlock, step, query, rows, device) -> Tensor:
        signs = replace(source, distribution="rademacher")
        return super().direction(signs, block, step, query, rows, device)


class AR1ZO(Method):
    """One atom of a LoRA a step: row k of every A and column k of every B, k = step mod r (arXiv 2605.19767).

    The paper scales adapters by α r instead of α / r, so that an atom's signal does not shrink with the rank:
    with adapters that are scaled by α / r, give α r² (1024 for α = 16 and r = 8).
    """

    adapters_only = True

    def direction(self, source: DirectionSource, block: ParamBlock, step, query, rows, device) -> Tensor:
        z = super().direction(source, block, step, query, rows, device)
        factors = block.split(z.view(-1))  # A [r, in] and B [out, r] in turn
        for of_a, of_b in zip(factors[::2], factors[1::2], strict=True):
            for atoms in (of_a, of_b.T):
                atom = step % len(atoms)
                atoms[:atom] = 0
                atoms[atom + 1 :] = 0
        return z


METHODS = {"mezo": Method, "lozo": LOZO, "fzoo": FZOO, "ar1-zo": AR1ZO}
