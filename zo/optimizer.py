"""`ZerothOrder`: train any module with forward passes only (MeZO, arXiv 2305.17333, Algorithm 1).

    zo = ZerothOrder(model, lr=1e-3, eps=1e-2, seed=0)  # every parameter that requires a gradient
    for batch in loader:
        loss = zo.step(lambda: loss_fn(model, batch))  # two forwards, one update; returns (l+ + l-)/2
    zo.trajectory.save("trajectory.safetensors")  # the run: a seed and a number a step; zo.replay rebuilds it

One idea: the trained weights are never perturbed. Where few elements are trained, an fp32 master on the host
holds them, the parameters are given master ± εz and get the master's bits back. Where most are, z is
generated in chunks inside the forward (perturbed_weights.py), and there is no second copy. So a step without
an update changes nothing, in any dtype. z is a pure function of (seed, step, query, element): a resumed run
draws what an uninterrupted one would have drawn. `ZerothOrder` is a `torch.optim.Optimizer`: learning rate
schedulers, parameter groups and state_dict work as usual. A method of another paper is a subclass of `Method`
(methods.py).
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from zo.methods import Method, ParamBlock
from zo.perturbed_weights import CopiesUnsupported, StepDirections
from zo.rng_kernels import DirectionSource
from zo.trained_weights import InPlaceWeights, MasterWeights
from zo.trajectory import Trajectory, round_to_fp32

logger = logging.getLogger(__name__)

MEAN_SQUARE_DECAY = 0.98  # of the running mean square of the projected gradient
MAX_NONFINITE_STEPS = 50  # steps in a row without a finite loss, before giving up


def trains_few(module: nn.Module) -> bool:
    """Return whether fewer than a tenth of a module's elements require a gradient."""
    total = sum(p.numel() for p in module.parameters())
    return 10 * sum(p.numel() for p in module.parameters() if p.requires_grad) < total


class NonFiniteLoss(FloatingPointError):
    """The loss was NaN or infinite for `MAX_NONFINITE_STEPS` steps in a row."""


class GradientScale:
    """Clip projected gradients g, then divide them by the root of a running mean of g².

    Args:
        clip: bound on |g|, applied first; 0 is off.
        normalize: whether to divide. The mean decays by 0.98 a g and is corrected for its start at 0.
    """

    def __init__(self, clip: float = 0.0, normalize: bool = False):
        self.clip = clip
        self.normalize = normalize
        self.reset()

    def reset(self) -> None:
        """Forget the running mean."""
        self.mean_square = 0.0
        self.weight = 1.0  # MEAN_SQUARE_DECAY ** (number of g), for the bias correction

    def scale(self, g: float) -> float:
        """Return g after clip and normaliser, and take it into the running mean; NaN for a NaN or ∞."""
        if not math.isfinite(g):
            return math.nan
        if self.clip:
            g = max(-self.clip, min(self.clip, g))
        if not self.normalize:
            return g
        self.mean_square = MEAN_SQUARE_DECAY * self.mean_square + (1 - MEAN_SQUARE_DECAY) * g * g
        self.weight *= MEAN_SQUARE_DECAY
        mean_square = self.mean_square / (1 - self.weight)
        return g / math.sqrt(mean_square) if mean_square else 0.0


@dataclass
class StepCounts:
    """Numbers of steps.

    Args:
        step: taken so far.
        skipped: with a query whose losses were not finite.
        in_a_row: without any finite loss, up to now.
        zero: whose losses did not differ, which teach nothing.
    """

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0
    zero: int = 0

    def add_step(self, projected_grads: list[float]) -> None:
        """Count a step with these projected gradients.

        Raises:
            NonFiniteLoss: it was one of too many in a row without a finite loss.
        """
        finite = [g for g in projected_grads if math.isfinite(g)]
        self.step += 1
        self.skipped += len(projected_grads) > len(finite)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.zero += not any(projected_grads)
        if self.in_a_row >= MAX_NONFINITE_STEPS:
            raise NonFiniteLoss(
                f"the loss was NaN or infinite in {MAX_NONFINITE_STEPS} steps in a row, up to step "
                f"{self.step}; the weights are those before them. Lower the learning rate or eps, or load "
                "the model in bfloat16 or float32"
            )


class ZerothOrder(torch.optim.Optimizer):
    """MeZO: θ ← θ − η (g z + λθ), g = (ℓ(θ+εz) − ℓ(θ−εz)) / 2ε, z ~ N(0, I) (arXiv 2305.17333, eq. 2).

    Args:
        params: a module (its parameters that require a gradient), or what any torch optimizer takes, with
            `lr` and `weight_decay` (λ) per group if wanted. Parameters of any floating dtype on any device; z
            runs through them in this order.
        lr: learning rate η.
        eps: perturbation ε > 0.
        seed: of all directions.
        clip: bound on |g|, applied before normalising; 0 is off.
        normalize: divide g by the root of a running mean of g² (decay 0.98, bias-corrected), so that η is the
            length of a step along one coordinate.
        master: keep the weights and z in fp32 on the host, in one flat buffer a group; by default where fewer
            than a tenth of a module's elements are trained. Otherwise no copy is kept: half-precision weights
            are updated by stochastic rounding, so that the expected update is the exact one.
        method: a `Method` (default: MeZO with `queries` directions a step, whose updates are averaged).
        distribution: of z, "gaussian" or "rademacher" (±1, a third of the price).
        optim: "sgd", or with a master "momentum" (0.9) or "adamw": the estimate goes to torch.optim as a
            gradient.
        set_perturbations: with a master, called with one [copies, …] perturbation per parameter, or None, so
            that one forward can serve several points (`copies` of `estimate`).

    `step(closure)` does everything. A loop that accumulates micro-batches calls `estimate(closure, weight)`
    for each of them, all with the same z, then `step()`. The closure takes no argument and returns the loss
    (a tensor or a float); it runs without autograd. The weights are restored if the closure raises.

    Raises:
        ValueError: eps <= 0, parameters without storage, an `optim` that needs a master and has none.
        NonFiniteLoss: after 50 non-finite losses in a row.
    """

    def __init__(
        self, params: nn.Module | Iterable, lr: float = 1e-3, eps: float = 1e-3, seed: int = 0,
        weight_decay: float = 0.0, clip: float = 0.0, normalize: bool = False, master: bool | None = None,
        method: Method | None = None, queries: int = 1, distribution: str = "gaussian", optim: str = "sgd",
        set_perturbations: Callable | None = None,
    ):  # fmt: skip
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps must be a positive number, not {eps}")
        if isinstance(params, nn.Module):
            master = trains_few(params) if master is None else master
            params = [p for p in params.parameters() if p.requires_grad]
        if optim != "sgd" and not master:
            raise ValueError(f"optim {optim!r} needs a master: it keeps state for every element")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if any(p.is_meta for group in self.param_groups for p in group["params"]):
            raise ValueError("a parameter to train has no storage (it is on the meta device, offloaded)")
        self.eps = eps
        self.master = bool(master)
        self.optim = optim
        self.method = method or Method(queries)
        self.source = DirectionSource(seed, distribution)
        self.gradient_scale = GradientScale(clip, normalize)
        self.counts = StepCounts()
        self.losses = [0.0] * len(self.method.points())  # of the micro-batches so far
        self.projected_grads: list[float] = []  # of the last step, before clip and normaliser
        self.trajectory = Trajectory()
        self.forward_per_point = False  # True once copies were found not to work
        in_place = partial(InPlaceWeights, method=self.method)
        in_master = partial(MasterWeights, optim=optim, set_perturbations=set_perturbations)
        self._new_weights = in_master if master else in_place
        self.weights = self._new_weights(self.param_groups)
        self._directions = None

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, as torch does; z runs through its parameters last, and momentum begins anew."""
        super().add_param_group(param_group)
        if hasattr(self, "weights"):
            self.restart()

    # ---- weights ----

    def restart(self, forget: bool = False) -> None:
        """Begin anew after a merge: values, shapes and the choice of parameters may be others.

        Momentum starts at 0; with `forget` the running mean square of g does too.
        """
        self.weights = self._new_weights(self.param_groups)
        self._directions = None
        if forget:
            self.gradient_scale.reset()

    @property
    def blocks(self) -> list[ParamBlock]:
        """The blocks that a direction runs through, in the direction's order."""
        return self.weights.blocks

    @property
    def directions(self) -> StepDirections:
        """The directions of the step at hand."""
        if self._directions is None or self._directions.step != self.counts.step:
            self._directions = StepDirections(self.method, self.source, self.counts.step)
        return self._directions

    def load_master(self) -> None:
        """Read the parameters into the fp32 master: to be called after other code wrote to them."""
        self.weights.read_params()

    def restore(self) -> None:
        """Write the master's bits into the parameters."""
        self.weights.restore()

    # ---- a step ----

    def estimate(self, closure: Callable, weight: float = 1.0, copies: int = 1) -> float:
        """Add this micro-batch's losses, times `weight`, to those of all points; return their mean."""
        losses = self.losses_at(self.method.points(), closure, copies)
        self.add_losses(losses, weight)
        return math.fsum(losses) / len(losses)

    def add_losses(self, losses: list[float], weight: float = 1.0) -> None:
        """Add losses, one a point, that were computed elsewhere."""
        self.losses = [total + weight * loss for total, loss in zip(self.losses, losses, strict=True)]

    def losses_at(
        self, points: list[tuple[int, float]], closure: Callable, copies: int = 1, step: int | None = None
    ) -> list[float]:
        """Return the loss at θ + factor · ε · z_query for each (query, factor); the weights are restored.

        Args:
            copies: with n > 1 so many points are served by one forward: the closure is called with `copies=`
                their number and returns as many losses, [copies], each of its own copy of the batch.
            step: whose directions; by default those of the step at hand.
        """
        directions = self.directions if step is None else StepDirections(self.method, self.source, step)
        scaled_points = [(query, factor * self.eps) for query, factor in points]
        copies = 1 if self.forward_per_point else copies
        losses: list[float] = []
        try:
            with torch.inference_mode():
                for begin in range(0, len(scaled_points), copies):
                    group = scaled_points[begin : begin + copies]
                    losses += self.weights.losses(closure, group, directions, batched=copies > 1)
        except CopiesUnsupported as error:
            logger.warning("%s: a forward for each point from here on", error)
            self.forward_per_point = True
        finally:
            self.restore()
        return losses if len(losses) == len(points) else self.losses_at(points, closure, step=step)

    def step(self, closure: Callable | None = None) -> float | None:
        """Estimate (where a closure is given) and update; return the mean loss.

        A query whose losses are not finite updates nothing.
        """
        loss = self.estimate(closure) if closure is not None else None
        self.projected_grads = self.method.projected(self.losses, self.eps)
        self.losses = [0.0] * len(self.losses)
        grads = [self.gradient_scale.scale(g) / len(self.projected_grads) for g in self.projected_grads]
        rates = [group["lr"] for group in self.param_groups]
        as_gradient = self.optim != "sgd"  # the torch optimizer multiplies by the rate
        coefficients = [[round_to_fp32(g if as_gradient else rate * g) for g in grads] for rate in rates]
        self.weights.apply_update(coefficients, rates, self.directions)
        decays = any(block.weight_decay for block in self.blocks)
        self.trajectory.append(coefficients, rates, keep_rate=decays or as_gradient)
        self.counts.add_step(self.projected_grads)
        return loss

    @property
    def projected_grad(self) -> float:
        """|g| of the losses at hand or, after a step, of that step: the root mean square over the queries."""
        gs = self.method.projected(self.losses, self.eps) if any(self.losses) else self.projected_grads
        return math.sqrt(math.fsum(g * g for g in gs) / len(gs)) if gs else math.nan

    def replay(self, trajectory: Trajectory, steps: range) -> None:
        """Take these steps of a trajectory again, from the weights as they stand: no loss is asked for."""
        for step in steps:
            self.counts.step = step
            coefficients = [trajectory.coefficients[step]] * len(self.param_groups)
            rates = [trajectory.rates[step] if trajectory.rates else 0.0] * len(self.param_groups)
            self.weights.apply_update(coefficients, rates, self.directions)
            self.trajectory.append(coefficients, rates, keep_rate=bool(trajectory.rates))
        self.counts.step = steps.stop

    # ---- state ----

    def state_dict(self) -> dict:
        """Return groups, counts and coefficients, and the master where parameters cannot hold its bits."""
        mean = {"mean_square": self.gradient_scale.mean_square, "weight": self.gradient_scale.weight}
        return {
            **super().state_dict(),
            **self.weights.state(),
            "zo": {**vars(self.counts), **mean},
            "method": dict(vars(self.method)),
            "trajectory": dict(vars(self.trajectory)),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Take what `state_dict` returned, after the parameters have their values."""
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        scalars = dict(state_dict["zo"])
        self.gradient_scale.mean_square = scalars.pop("mean_square")
        self.gradient_scale.weight = scalars.pop("weight")
        self.counts = StepCounts(**scalars)
        vars(self.method).update(state_dict.get("method", {}))
        self.losses = [0.0] * len(self.method.points())
        self._directions = None
        self.trajectory = Trajectory(**state_dict["trajectory"])
        self.weights.load_state(state_dict)
