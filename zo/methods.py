"""Zeroth-order methods other than plain MeZO, each a few lines on the seam of `zo.Method`.

`--zo_method NAME` takes one of these, `--zo_method file.py:Name` a subclass of `zo.Method` in a file of one's own.
"""

import math
from dataclasses import replace
from statistics import stdev

from zo.method import Method
from zo.perturbed_weights import ParamBlock
from zo.rng_kernels import DirectionSource


class LOZO(Method):
    """Low-rank directions for full weights, lazily resampled (arXiv 2410.07698, Algorithm 1).

    z of a matrix is U Vᵀ / √r with U [m, r] fresh in every step and V [n, r] drawn anew every `interval` steps, so that
    the updates of an interval add up to one of rank r. The factor gives its elements variance 1, as full directions
    have. Vectors get full directions.
    """

    full_only = True
    rank, interval = 2, 50

    def direction(self, noise: DirectionSource, slot: ParamBlock, step: int, query: int, rows, device):
        if slot.matrix.dim() != 2:
            return super().direction(noise, slot, step, query, rows, device)
        r = self.rank
        u = noise.rows((step, query, "U"), slot.offset * r, r, rows, device)
        v = noise.rows((step // self.interval, "V"), slot.offset * r, r, range(slot.width), device)
        return u @ v.T / r**0.5


class FZOO(Method):
    """One-sided differences in steps as long as the losses are alike (arXiv 2506.09034): θ ← θ − η g / σ with
    g = Σ (ℓ(θ + ε uᵢ) − ℓ(θ)) uᵢ / (ε N), uᵢ of ±1, and σ the standard deviation of the N perturbed losses.

    N is `--zo_queries`, 8 in the paper: N + 1 forwards a step.
    """

    least_queries = 2

    def points(self):
        return [(0, 0.0), *((query, 1.0) for query in range(self.queries))]

    def projected(self, losses, eps):
        spread = stdev(losses[1:]) if all(map(math.isfinite, losses)) else math.nan  # a step that is skipped
        return [(loss - losses[0]) / (eps * spread) if spread else 0.0 for loss in losses[1:]]

    def direction(self, noise: DirectionSource, slot: ParamBlock, step: int, query: int, rows, device):
        return super().direction(replace(noise, distribution="rademacher"), slot, step, query, rows, device)


class AR1ZO(Method):
    """One atom of a LoRA a step: row k of every A and column k of every B, k = step mod r (arXiv 2605.19767).

    The paper scales adapters by α r instead of α / r, so that an atom's signal doesn't shrink with the rank:
    `--lora_alpha` is α r² then (1024 for α = 16 and r = 8).
    """

    adapters_only = True

    def direction(self, noise: DirectionSource, slot: ParamBlock, step: int, query: int, rows, device):
        z = super().direction(noise, slot, step, query, rows, device)
        parts = slot.split(z.view(-1))  # A [r, in] and B [out, r] in turn
        for of_a, of_b in zip(parts[::2], parts[1::2], strict=True):
            for matrix in (of_a, of_b.T):
                atom = step % len(matrix)
                matrix[:atom] = matrix[atom + 1 :] = 0
        return z


METHODS = {"mezo": Method, "lozo": LOZO, "fzoo": FZOO, "ar1-zo": AR1ZO}
