"""Plain references of the zeroth-order methods: the formulas of the papers, slow and obvious.

Each function takes one step: from θ, a list of fp32 tensors, to the next θ, with `loss(θ)` and nothing of the
engine but its random numbers (`counter_rng`), so that both sides draw the same directions.
"""

import math
from statistics import stdev

import torch

from zo.counter_rng import direction_range


def draw(counter: tuple, shapes: list, distribution: str = "gaussian") -> list[torch.Tensor]:
    """Return random tensors of these shapes: consecutive elements of one stream."""
    sizes = [math.prod(shape) for shape in shapes]
    stream = direction_range(distribution, counter, 0, sum(sizes))
    return [part.view(shape) for part, shape in zip(stream.split(sizes), shapes, strict=True)]


def moved(theta: list, z: list, length: float) -> list[torch.Tensor]:
    """Return θ + length · z."""
    return [p + direction * length for p, direction in zip(theta, z, strict=True)]


def mezo(theta, loss, *, step, seed, lr, eps, queries=1):
    """MeZO with n-SPSA (arXiv 2305.17333, Definition 1 and Algorithm 2).

    g_i = (L(θ + ε z_i) − L(θ − ε z_i)) / 2ε,   θ ← θ − η/n Σ g_i z_i,   z_i ~ N(0, I)
    """
    start = theta
    for query in range(queries):
        z = draw((seed, step, query), [p.shape for p in theta])
        g = (loss(moved(start, z, eps)) - loss(moved(start, z, -eps))) / (2 * eps)
        theta = moved(theta, z, -lr * (g / queries))
    return theta


def lozo(theta, loss, *, step, seed, lr, eps, rank, interval):
    """LOZO (arXiv 2410.07698, Algorithm 1): U [m, r] anew in each step, V [n, r] in each interval.

    c = (F(X + ε' U Vᵀ) − F(X − ε' U Vᵀ)) / 2ε',   X ← X − η c U Vᵀ / r;   vectors as in MeZO

    The engine's ε belongs to directions of variance 1, those of the paper have variance r: ε' = ε / √r.
    """
    shapes = [p.shape if p.dim() == 2 else (p.numel(), 1) for p in theta]
    fresh = draw((seed, step, 0, "U"), [(m * n, rank) for m, n in shapes])
    lazy = draw((seed, step // interval, "V"), [(m * n, rank) for m, n in shapes])
    full = draw((seed, step, 0), [p.shape for p in theta])
    eps_of_paper = eps / math.sqrt(rank)
    z = []
    for p, (m, n), u, v, vector in zip(theta, shapes, fresh, lazy, full, strict=True):
        z.append(u[:m] @ v[:n].T if p.dim() == 2 else vector * math.sqrt(rank))
    c = (loss(moved(theta, z, eps_of_paper)) - loss(moved(theta, z, -eps_of_paper))) / (2 * eps_of_paper)
    return moved(theta, z, -lr * c / rank)


def fzoo(theta, loss, *, step, seed, lr, eps, queries):
    """FZOO (arXiv 2506.09034, Algorithm 1): one-sided differences along signs, long steps where losses agree.

    l_i = L(θ + ε u_i),   g = Σ (l_i − L(θ)) u_i / (ε N),   θ ← θ − η g / σ,   σ = deviation of l_1 … l_N
    """
    signs = [draw((seed, step, query), [p.shape for p in theta], "rademacher") for query in range(queries)]
    at_theta = loss(theta)
    losses = [loss(moved(theta, u, eps)) for u in signs]
    sigma = stdev(losses)
    for u, perturbed in zip(signs, losses, strict=True):
        theta = moved(theta, u, -lr * (perturbed - at_theta) / (eps * queries) / sigma)
    return theta


def ar1_zo(theta, loss, *, step, seed, lr, eps):
    """AR1-ZO (arXiv 2605.19767) on adapters A_1, B_1, A_2, B_2, …: row k of each A, column k of each B.

    k = step mod r,   g = (L(θ + ε z) − L(θ − ε z)) / 2ε,   θ ← θ − η g z,   z = 0 outside row and column k
    """
    z = [torch.zeros_like(p) for p in theta]
    for i, direction in enumerate(draw((seed, step, 0), [p.shape for p in theta])):
        if i % 2 == 0:  # A [r, in]
            k = step % direction.shape[0]
            z[i][k] = direction[k]
        else:  # B [out, r]
            k = step % direction.shape[1]
            z[i][:, k] = direction[:, k]
    g = (loss(moved(theta, z, eps)) - loss(moved(theta, z, -eps))) / (2 * eps)
    return moved(theta, z, -lr * g)
