"""Diagnose the settings of a run before training.

Three questions: does ε drown in rounding or leave the linear range, is the rate too large, does the precision
suffice? The loss is measured at θ and at θ ± fε z for a few directions and f = 1, 1/4, 1/16. The second
difference is D(ε) = ℓ₊ + ℓ₋ − 2ℓ₀ = ε² zᵀHz + …. The part of D that stays when ε shrinks is the rounding
noise of the loss. D(ε)/ε² is a sample of zᵀHz, whose mean is the trace of the Hessian. The projected gradient
g shall not depend on ε.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch

from zo.methods import Method
from zo.optimizer import ZerothOrder

FACTORS = (1.0, 1 / 4, 1 / 16)
PROBE_STEP = -1  # the step whose directions are asked for: no training step has this number
MAX_ERROR = 0.1  # of g, at both ends of the recommended range of eps
SAMPLE_SIZE = 10000  # elements of a tensor whose spacing is looked at


@dataclass
class Diagnosis:
    """The measurements of `diagnose`.

    Args:
        noise: standard deviation of the loss by rounding.
        g: root of E g², of the projected gradient without rounding.
        noise_share: error of g by rounding, relative to g.
        nonlinearity: error of g by leaving the linear range, relative to g.
        trace: of the Hessian.
        largest_lr: above this learning rate the expected loss rises; NaN: cannot be told.
        eps: the range in which both errors of g stay below a tenth; an end is None where it was not seen.
        rounding_drift: how far stochastic rounding carries the weights, relative to the updates (0: fp32
            weights).
        forwards: number of forward passes.
    """

    noise: float
    g: float
    noise_share: float
    nonlinearity: float
    trace: float
    largest_lr: float
    eps: tuple[float | None, float | None]
    rounding_drift: float
    forwards: int


def root_mean_square(values) -> float:
    return math.sqrt(fmean(x * x for x in values))


def diagnose(engine: ZerothOrder, closure: Callable, directions: int = 8) -> Diagnosis:
    """Measure on one batch; the weights and the engine's state stay as they are.

    Args:
        closure: returns the loss of the batch, as for `ZerothOrder.step`.
        directions: how many; each costs six forwards.

    Raises:
        ValueError: the loss does not move at all.
    """
    eps = engine.eps
    points = [(0, 0.0)]
    points += [(query, sign * f) for query in range(directions) for f in FACTORS for sign in (1.0, -1.0)]
    loss_at_zero, *losses = engine.losses_at(points, closure, step=PROBE_STEP)
    pairs = list(zip(losses[::2], losses[1::2], strict=True))
    g = {}
    second_difference = {}
    for i, f in enumerate(FACTORS):
        of_factor = pairs[i :: len(FACTORS)]
        g[f] = [(plus - minus) / (2 * f * eps) for plus, minus in of_factor]
        second_difference[f] = [plus + minus - 2 * loss_at_zero for plus, minus in of_factor]

    _, quarter, sixteenth = FACTORS
    ratio = sixteenth / quarter
    smallest_pairs = zip(second_difference[sixteenth], second_difference[quarter], strict=True)
    noise = root_mean_square(a - b * ratio**2 for a, b in smallest_pairs) / math.sqrt(6 * (1 + ratio**4))
    noise_of_g = noise / (math.sqrt(2) * eps)
    sample_g = root_mean_square(g[1.0])
    if not sample_g:
        raise ValueError(f"the loss does not move at all with eps {eps:g}: give a larger eps")
    true_g = math.sqrt(max(sample_g**2 - noise_of_g**2, (0.01 * sample_g) ** 2))
    change = fmean((a - b) ** 2 for a, b in zip(g[1.0], g[quarter], strict=True))
    g_change = math.sqrt(max(change - noise_of_g**2 * (1 + 1 / quarter**2), 0.0)) / (1 - quarter**2)

    curvature = [difference / eps**2 for difference in second_difference[1.0]]
    weighted_curvature = fmean(c * x * x for c, x in zip(curvature, g[1.0], strict=True))
    min_eps = noise_of_g * eps / (MAX_ERROR * true_g) if noise else None
    max_eps = eps * math.sqrt(MAX_ERROR * true_g / g_change) if g_change > 0.01 * true_g else None
    length = engine.param_groups[0]["lr"] * (1.0 if engine.gradient_scale.normalize else sample_g)
    return Diagnosis(
        noise=noise,
        g=true_g,
        noise_share=noise_of_g / true_g,
        nonlinearity=g_change / true_g,
        trace=fmean(curvature),
        largest_lr=largest_rate(engine, sample_g, weighted_curvature),
        eps=(min_eps, max_eps),
        rounding_drift=rounding_drift(engine, length),
        forwards=len(points),
    )


def largest_rate(engine: ZerothOrder, g: float, weighted_curvature: float) -> float:
    """Return the learning rate above which the expected loss rises: 2 E g² / E (zᵀHz g²) for plain steps.

    Args:
        g: root of E g².
        weighted_curvature: E (zᵀHz g²).
    """
    if type(engine.method).projected is not Method.projected:  # in units of its own
        return math.nan
    rate = 2 * g**2 / weighted_curvature if weighted_curvature > 0 else math.inf
    rate *= engine.method.queries * (g if engine.gradient_scale.normalize else 1.0)
    if engine.optim == "momentum":  # steps of 1 / (1 - 0.9)
        return 0.1 * rate
    return rate if engine.optim == "sgd" else math.nan


def rounding_drift(engine: ZerothOrder, length: float) -> float:
    """Return √(spacing / update), by which stochastic rounding moves the weights farther than the updates do.

    Rounding by chance adds a variance of |u| · spacing to an update u that is shorter than the spacing.

    Args:
        length: of an update along one coordinate.
    """
    if engine.master or not length:
        return 0.0
    total = n = 0.0
    for block in engine.blocks:
        if block.param.dtype != torch.float32:
            sample = block.param.detach().flatten()[:SAMPLE_SIZE].abs()
            total += float((sample.float() * torch.finfo(block.param.dtype).eps).sum())
            n += len(sample)
    return math.sqrt(total / n / length) if n else 0.0


def recommendations(diagnosis: Diagnosis, engine: ZerothOrder) -> list[str]:
    """Return what to print: the measurements, and what would be better, a line each."""
    min_eps, max_eps = diagnosis.eps
    eps = engine.eps
    lr = engine.param_groups[0]["lr"]
    lines = [
        f"diagnosis: {diagnosis.forwards} forwards: rounding noise of the loss {diagnosis.noise:.1e}, "
        f"|g| {diagnosis.g:.2g}, of which rounding {diagnosis.noise_share:.0%} and curvature "
        f"{diagnosis.nonlinearity:.0%}; trace of the Hessian {diagnosis.trace:.2g}"
    ]
    if not math.isfinite(diagnosis.g):
        return [*lines, f"diagnosis: the loss is no number at eps {eps:g}"]
    eps_range = "smaller"
    if min_eps:
        eps_range = f"between {min_eps:.1e} and {max_eps:.1e}" if max_eps else f"above {min_eps:.1e}"
    if diagnosis.noise_share > 0.5:
        lines.append(
            f"diagnosis: eps {eps:g} drowns in rounding; better is one {eps_range}, or float32 weights"
        )
    if diagnosis.nonlinearity > 0.5:
        lines.append(f"diagnosis: eps {eps:g} leaves the linear range; better is one {eps_range}")
    if lr > diagnosis.largest_lr and diagnosis.noise_share <= 0.5:  # else the curvature is rounding too
        rate_limit = f"{diagnosis.largest_lr:.1e}"
        lines.append(f"diagnosis: learning rate {lr:g} is above {rate_limit}, from where the loss is to rise")
    if diagnosis.rounding_drift > 1:
        lines.append(
            f"diagnosis: rounding moves these weights {diagnosis.rounding_drift:.0f} x as far as the updates "
            "do; adapters or float32 weights keep the updates"
        )
    if len(lines) > 1:
        return lines
    if math.isnan(diagnosis.largest_lr):
        remark = f"how large a rate optim {engine.optim!r} and this method take cannot be told"
        return [*lines, f"diagnosis: eps {eps:g} fits; {remark}"]
    rate = f"learning rate {lr:g} fit (largest: {diagnosis.largest_lr:.1e})"
    return [*lines, f"diagnosis: eps {eps:g} and {rate}"]
