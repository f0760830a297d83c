"""`--zo_check`: does ε drown in rounding or leave the linear range, is the rate too large, does the precision hold?

Asks for the loss at θ and at θ ± fε z for a few directions and f = 1, 1/4, 1/16. With D(ε) = ℓ₊ + ℓ₋ − 2ℓ₀, which is
ε² zᵀHz + …: what D does not lose when ε shrinks is the rounding noise of the loss; D(ε)/ε² is a sample of zᵀHz, whose
mean is the trace of the Hessian; and the projected gradient g shall not depend on ε.
"""

import math
from dataclasses import dataclass
from statistics import fmean

import torch

from utils import UsageError
from zo.method import Method

FACTORS = (1.0, 1 / 4, 1 / 16)
PROBE = -1  # the step whose directions are asked for: no training step has it


@dataclass
class Diagnosis:
    """`noise`: standard deviation of the loss by rounding. `g`: root of E g². `noise_share`, `bend`: error of g by
    rounding and by leaving the linear range, relative to g. `trace`: of the Hessian. `largest_lr`: above it the
    expected loss rises. `eps`: the range in which both errors stay below a tenth (either end may be None: not seen).
    `walk`: how far stochastic rounding carries the weights, relative to the updates themselves (0: fp32)."""

    noise: float
    g: float
    noise_share: float
    bend: float
    trace: float
    largest_lr: float
    eps: tuple[float | None, float | None]
    walk: float
    forwards: int


def diagnose(engine, closure, directions: int = 8) -> Diagnosis:
    """Measure on one batch; the weights and the engine's state stay as they are."""
    points = [(0, 0.0), *((q, s * f) for q in range(directions) for f in FACTORS for s in (1.0, -1.0))]
    step, engine.scalars["step"] = engine.scalars["step"], PROBE
    try:
        losses = engine.losses_at(points, closure)
    finally:
        engine.scalars["step"] = step
        for slot in engine.slots:
            slot.z.clear()
    eps, at_zero = engine.eps, losses[0]
    pairs = [losses[1 + 2 * i : 3 + 2 * i] for i in range(directions * len(FACTORS))]
    by_factor = {f: pairs[i :: len(FACTORS)] for i, f in enumerate(FACTORS)}
    g = {f: [(plus - minus) / (2 * f * eps) for plus, minus in by_factor[f]] for f in FACTORS}
    second = {f: [plus + minus - 2 * at_zero for plus, minus in by_factor[f]] for f in FACTORS}

    _, middle, least = FACTORS
    left = [a - b * (least / middle) ** 2 for a, b in zip(second[least], second[middle], strict=True)]
    noise = math.sqrt(fmean(x * x for x in left) / (6 * (1 + (least / middle) ** 4)))
    noise_of_g = noise / (math.sqrt(2) * eps)
    seen = math.sqrt(fmean(x * x for x in g[1.0]))
    if not seen:
        raise UsageError(f"--zo_check: the loss does not move at all with eps {eps:g}: give a larger --zo_eps")
    true = math.sqrt(max(seen**2 - noise_of_g**2, (0.01 * seen) ** 2))
    change = fmean((a - b) ** 2 for a, b in zip(g[1.0], g[middle], strict=True))
    bend = math.sqrt(max(change - noise_of_g**2 * (1 + 1 / middle**2), 0.0)) / (1 - middle**2)

    curvature = [d / eps**2 for d in second[1.0]]
    weighted = fmean(c * x * x for c, x in zip(curvature, g[1.0], strict=True))
    largest = 2 * seen**2 / weighted if weighted > 0 else math.inf
    largest *= engine.method.queries * (seen if engine.normalize else 1.0)
    largest *= {"sgd": 1.0, "momentum": 0.1}.get(engine.optim, math.nan)  # steps of 1 / (1 - 0.9); of another kind
    if type(engine.method).projected is not Method.projected:  # in units of its own
        largest = math.nan
    low = noise_of_g * eps / (0.1 * true) if noise else None
    high = eps * math.sqrt(0.1 * true / bend) if bend > 0.01 * true else None

    length = engine.param_groups[0]["lr"] * (1.0 if engine.normalize else seen)
    return Diagnosis(
        noise, true, noise_of_g / true, bend / true, fmean(curvature), largest, (low, high),
        rounding_drift(engine, length), len(losses),
    )  # fmt: skip


def rounding_drift(engine, length: float) -> float:
    """√(spacing / update): rounding by chance adds a variance of |u| · spacing to an update u shorter than that."""
    if engine.master or not length:
        return 0.0
    total = n = 0.0
    for slot in engine.slots:
        if slot.param.dtype != torch.float32:
            sample = slot.param.detach().flatten()[:10000].abs()
            total += float((sample.float() * torch.finfo(slot.param.dtype).eps).sum())
            n += len(sample)
    return math.sqrt(total / n / length) if n else 0.0


def recommendations(found: Diagnosis, engine) -> list[str]:
    """What to print: the measurements, and what would be better, a line each."""
    low, high = found.eps
    lr = engine.param_groups[0]["lr"]
    lines = [
        f"zo_check: {found.forwards} forwards: rounding noise of the loss {found.noise:.1e}, |g| {found.g:.2g}, of "
        f"which rounding {found.noise_share:.0%} and curvature {found.bend:.0%}; trace of the Hessian {found.trace:.2g}"
    ]
    if not math.isfinite(found.g):
        return [*lines, f"zo_check: the loss is no number at eps {engine.eps:g}"]
    window = f"between {low:.1e} and {high:.1e}" if low and high else f"above {low:.1e}" if low else "smaller"
    if found.noise_share > 0.5:
        lines.append(f"zo_check: eps {engine.eps:g} drowns in rounding; better is one {window}, or float32 weights")
    if found.bend > 0.5:
        lines.append(f"zo_check: eps {engine.eps:g} leaves the linear range; better is one {window}")
    if lr > found.largest_lr and found.noise_share <= 0.5:  # else the curvature is rounding too
        lines.append(f"zo_check: learning rate {lr:g} is above {found.largest_lr:.1e}, from where the loss is to rise")
    if found.walk > 1:
        lines.append(
            f"zo_check: rounding moves these weights {found.walk:.0f} x as far as the updates do; adapters (--lora, "
            "--xgblora) or float32 keep them"
        )
    if len(lines) == 1:
        rate = f" and learning rate {lr:g} fit (largest: {found.largest_lr:.1e})"
        unknown = f" fits; how large a rate --zo_optim {engine.optim} and this method take can't be told so"
        lines.append(f"zo_check: eps {engine.eps:g}" + (unknown if math.isnan(found.largest_lr) else rate))
    return lines
