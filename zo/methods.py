"""The seam of zeroth-order methods, `Method` (plain MeZO), and methods of other papers on it.

A method is where directions come from, at which points the loss is asked for, and how losses become an
update. That is a subclass of `Method`; the engine does everything else. One-sided differences, each query
against the same point, are

    class OneSided(Method):
        def points(self):
            return [(0, 0.0), *((query, 1.0) for query in range(self.queries))]

        def projected(self, losses, eps):
            return [(loss - losses[0]) / eps for loss in losses[1:]]

`METHODS` names the methods of this file.
"""

import math
from dataclasses import dataclass, field, replace
from statistics import stdev

import torch
from torch import Tensor

from zo import counter_rng
from zo.rng_kernels import DirectionSource


@dataclass(eq=False)
class ParamBlock:
    """One trained tensor, and the place of its elements in a direction.

    Args:
        param: the tensor that is updated. With a master: flat [n] fp32 on the host, all parameters of a
            group.
        offset: number of the tensor's first element in a direction.
        group: index of the optimizer's parameter group.
        weight_decay: λ.
        chunk_size: elements that are handled at once; 0 means `counter_rng.CHUNK_SIZE`.
        params: with a master, the parameters whose values it holds.
    """

    param: Tensor
    offset: int
    group: int
    weight_decay: float = 0.0
    chunk_size: int = 0
    params: list[Tensor] = field(default_factory=list)

    @property
    def as_rows(self) -> Tensor:
        """The tensor with rows along its first axis; a scalar is one row."""
        return self.param if self.param.dim() else self.param.view(1)

    @property
    def row_numel(self) -> int:
        """Elements of a row."""
        return self.as_rows.shape[1:].numel()

    @property
    def device(self) -> torch.device:
        """The device of the first parameter; what a master holds is brought there in one transfer."""
        return self.params[0].device if self.params else self.param.device

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat [n] or [copies, n] tensor in the shapes of the parameters of a master."""
        copies = flat.shape[:-1]
        sections = flat.split([p.numel() for p in self.params], dim=-1)
        return [section.view(*copies, *p.shape) for section, p in zip(sections, self.params, strict=True)]

    def write(self, flat: Tensor) -> None:
        """Write a flat [n] tensor into the parameters of a master."""
        for p, values in zip(self.params, self.split(flat.to(self.device)), strict=True):
            p.copy_(values)

    def row_chunks(self) -> list[range]:
        """Return the rows of the tensor in ranges of about `chunk_size` elements."""
        step = max(1, (self.chunk_size or counter_rng.CHUNK_SIZE) // self.row_numel)
        n = len(self.as_rows)
        return [range(begin, min(begin + step, n)) for begin in range(0, n, step)]


def to_single_precision(values: Tensor) -> Tensor:
    """Return half-precision values in fp32, others as they are (the same tensor)."""
    return values.float() if values.element_size() < 4 else values


# ---- the seam ----


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


# ---- methods of papers ----


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
    """One-sided differences, in longer steps where the perturbed losses differ less (arXiv 2506.09034).

    θ ← θ − η g / σ with g = Σ (ℓ(θ + ε uᵢ) − ℓ(θ)) uᵢ / (ε N), uᵢ of ±1, and σ the standard deviation of the
    N perturbed losses. N is the number of queries, 8 in the paper: N + 1 forwards a step.
    """

    least_queries = 2

    def points(self) -> list[tuple[int, float]]:
        return [(0, 0.0), *((query, 1.0) for query in range(self.queries))]

    def projected(self, losses: list[float], eps: float) -> list[float]:
        all_finite = all(map(math.isfinite, losses))
        sigma = stdev(losses[1:]) if all_finite else math.nan  # NaN: the step is skipped
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
        for z_a, z_b in zip(factors[::2], factors[1::2], strict=True):
            for atoms in (z_a, z_b.T):
                atom = step % len(atoms)
                atoms[:atom] = 0
                atoms[atom + 1 :] = 0
        return z


METHODS = {"mezo": Method, "lozo": LOZO, "fzoo": FZOO, "ar1-zo": AR1ZO}
