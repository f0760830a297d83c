"""The zeroth-order engine: train any module with forward passes only (MeZO, arXiv 2305.17333, Algorithm 1).

    zo = ZerothOrder(model, lr=1e-3, eps=1e-2, seed=0)      # every parameter that requires a gradient
    for batch in loader:
        loss = zo.step(lambda: loss_fn(model, batch))       # two forwards, one update; returns (l+ + l-)/2
    zo.trajectory.save("trajectory.safetensors")            # the run: a seed and a number a step; zo.replay rebuilds it

One idea: the trained weights are never perturbed. Where few elements are trained, an fp32 master on the host holds
them, the model is shown master ± εz and gets the master's bits back. Where most are, z is generated in blocks inside
the forward (streaming.py), and there is no second copy. So a step without an update changes nothing, in any dtype. z is
a pure function of (seed, step, query, element): a resumed run draws what an uninterrupted one would have drawn.
`ZerothOrder` is a `torch.optim.Optimizer`: learning rate schedulers, parameter groups and state_dict work as usual.

A method of another paper is a subclass of `Method`: where directions come from, at which points the loss is asked for,
and how losses become an update. One-sided differences, each query against the same point, are

    class OneSided(Method):
        def points(self):
            return [(0, 0.0), *((q, 1.0) for q in range(self.queries))]

        def projected(self, losses, eps):
            return [(loss - losses[0]) / eps for loss in losses[1:]]

and methods.py has low-rank directions for full weights (LOZO), on the same seam.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zo import counter_rng
from zo.method import Method
from zo.perturbed_weights import CopiesUnsupported, ParamBlock, PerturbedWeights, to_single_precision
from zo.rng_kernels import DirectionSource, kernels_available
from zo.trajectory import Trajectory, round_to_fp32

logger = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 50  # non-finite losses in a row before giving up
MEAN_SQUARE_DECAY = 0.98  # of the running mean square of the projected gradient


class NonFiniteLoss(FloatingPointError):
    """The loss was NaN or infinite for PATIENCE steps in a row."""


class ZerothOrder(torch.optim.Optimizer):
    """MeZO as an optimizer: θ ← θ − η (g z + λθ), g = (ℓ(θ+εz) − ℓ(θ−εz)) / 2ε, z ~ N(0, I) (arXiv 2305.17333, eq. 2).

    Args:
        params: a module (its parameters that require a gradient), or what any torch optimizer takes, with `lr` and
            `weight_decay` (λ) per group if wanted. Parameters of any floating dtype on any device; z runs through
            them in this order.
        lr: learning rate η. eps: perturbation ε > 0. seed: of all directions.
        clip: bound on |g|, applied before normalising; 0 is off.
        normalize: divide g by the root of a running mean of g² (decay 0.98, bias-corrected), so that η is the length
            of a step along one coordinate.
        master: keep the weights and z in fp32 on the host, in one flat buffer a group; by default where fewer than a
            tenth of a module's elements are trained. Otherwise no copy is kept: half-precision weights are updated by
            stochastic rounding, so that the expected update is the exact one.
        method: a `Method` (default: MeZO with `queries` directions a step, whose updates are averaged).
        distribution: of z, "gaussian" or "rademacher" (±1, a third of the price).
        optim: "sgd", or with a master "momentum" (0.9) or "adamw": the estimate goes to torch.optim as a gradient.
        spread: with a master, called with one [copies, …] perturbation per parameter, or None, so that one forward can
            serve several points (`copies` of `estimate`); `LoRA.spread` is one.

    `step(closure)` does it all. A loop that accumulates micro-batches calls `estimate(closure, weight)` for each of
    them, all with the same z, then `step()`. The closure takes no argument and returns a loss (a tensor or a float) of
    the module as it stands; it runs without autograd. Restores the weights if the closure raises.

    Raises ValueError for eps <= 0 or parameters without storage, NonFiniteLoss after 50 non-finite losses in a row.
    """

    def __init__(
        self, params, lr=1e-3, eps=1e-3, seed=0, weight_decay=0.0, clip=0.0, normalize=False, master=None, method=None,
        queries=1, distribution="gaussian", optim="sgd", spread=None,
    ):  # fmt: skip
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps must be a positive number, not {eps}")
        if isinstance(params, nn.Module):
            total = sum(p.numel() for p in params.parameters())
            params = [p for p in params.parameters() if p.requires_grad]
            master = 10 * sum(p.numel() for p in params) < total if master is None else master
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if any(p.is_meta for group in self.param_groups for p in group["params"]):
            raise ValueError("a parameter to train has no storage (it is on the meta device, offloaded)")
        self.eps, self.clip, self.normalize, self.master, self.spread = eps, clip, normalize, bool(master), spread
        self.method, self.noise = method or Method(queries), DirectionSource(seed, distribution)
        kind = type(self.method)
        self.plain = (kind.direction, kind.update) == (Method.direction, Method.update)  # what a kernel can do
        # weight: DECAY^steps, for the bias correction; in_a_row: steps without a finite loss; zero: of equal losses
        self.scalars = {"step": 0, "mean_square": 0.0, "weight": 1.0, "skipped": 0, "in_a_row": 0, "zero": 0}
        self.losses = [0.0] * len(self.method.points())  # of the micro-batches so far
        self.projected_grads: list[float] = []  # of the last step, before clip and normaliser
        self.trajectory, self.one_by_one, self.optim = Trajectory(), False, optim
        self.whole = 0  # bytes of the largest tensor that could not be streamed in blocks
        self.slots = self._slots()
        self.load_master()
        self.inner = self._inner()

    def _slots(self) -> list[ParamBlock]:
        slots, offset = [], 0
        for index, group in enumerate(self.param_groups):
            if self.master:
                parts = [p for p in group["params"] if p.requires_grad]
                size = sum(p.numel() for p in parts)
                slots.append(ParamBlock(torch.empty(size), offset, index, group["weight_decay"], parts=parts))
                offset += size
            else:
                for p in filter(lambda p: p.requires_grad, group["params"]):
                    slots.append(ParamBlock(p, offset, index, group["weight_decay"]))
                    offset += p.numel()
        # On a GPU a launch costs more than the elements of a small block: what is held at once may be 1/100 of all.
        for slot in slots:
            if slot.param.is_cuda:
                held = 1 if self.by_kernel(slot) and len(self.losses) <= 2 else 3 + len(self.losses)
                slot.block = min(1 << 24, max(counter_rng.CHUNK_SIZE, offset // (100 * held)))
        return slots

    def add_param_group(self, param_group: dict) -> None:
        """As torch's: z runs through the new parameters behind the others'. Momentum begins anew."""
        super().add_param_group(param_group)
        if "slots" in vars(self):
            self.restart()

    @torch.no_grad()
    def load_master(self) -> None:
        """Read the parameters as they stand into the fp32 master; call it after writing to them from outside."""
        for slot in self.slots:
            for p, values in zip(slot.parts, slot.split(slot.param) if slot.parts else (), strict=True):
                values.copy_(p)

    def restart(self, forget: bool = False) -> None:
        """Begin anew with a master, after a merge: the parameters may have other values and shapes, and others of them
        may require a gradient. Momentum starts at 0; with `forget` the running mean square of g does too."""
        self.slots = self._slots()
        self.load_master()
        self.inner = self._inner()
        if forget:
            self.scalars |= {"mean_square": 0.0, "weight": 1.0}

    def _inner(self) -> torch.optim.Optimizer | None:
        """The optimizer that takes the estimate as a gradient of the master."""
        if self.optim == "sgd":
            return None
        if not self.master:
            raise ValueError(f"optim {self.optim!r} needs a master: it keeps state for every element")
        kind, more = {"momentum": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}[self.optim]
        return kind([{"params": [slot.param], "weight_decay": slot.decayed} for slot in self.slots], **more)

    @torch.no_grad()
    def restore(self) -> None:
        """Write the master's bits into the parameters."""
        for slot in self.slots:
            if slot.parts:
                slot.write(slot.param)

    def direction(self, slot: ParamBlock, query: int, rows: range | Tensor) -> Tensor:
        """Rows of z of a tensor in this step, fp32, of its shape; kept for the step where there is a master."""
        step = self.scalars["step"]
        if not self.master:
            z = self.method.direction(self.noise, slot, step, query, rows, slot.param.device)
            return z.view(len(rows), *slot.matrix.shape[1:])
        if query not in slot.z:
            whole = range(len(slot.param))
            slot.z[query] = self.method.direction(self.noise, slot, step, query, whole, "cpu").view(-1)
        return slot.z[query]

    def by_kernel(self, slot: ParamBlock) -> bool:
        """Whether one kernel makes z of a tensor and does what is done with it."""
        p = slot.param
        return self.plain and kernels_available(p.device) and p.is_contiguous() and p.dtype != torch.float64

    def shown(self, slot: ParamBlock, rows: range | Tensor, points: list[tuple[int, float]]) -> list[Tensor]:
        """Rows of θ + scale·z_query of a tensor at each (query, scale), in its dtype; z of a query is made once."""
        values = slot.matrix[rows.start : rows.stop] if isinstance(rows, range) else slot.matrix[rows]
        queries = dict.fromkeys(query for query, _ in points)
        if isinstance(rows, range) and self.by_kernel(slot):
            start, of = slot.offset + rows.start * slot.width, {}
            for query in queries:
                scales = [scale for other, scale in points if other == query]
                of[query] = iter(self.noise.shown((self.scalars["step"], query), start, values, scales))
            return [next(of[query]) for query, _ in points]
        zs, wide = {query: self.direction(slot, query, rows) for query in queries}, to_single_precision(values)
        return [(zs[query].to(wide.dtype) * scale).add_(wide).to(values.dtype) for query, scale in points]

    # ---- a step ----

    def estimate(self, closure: Callable, weight: float = 1.0, copies: int = 1) -> float:
        """Add this micro-batch's losses, times `weight`, to those of all points; returns their mean."""
        found = self.losses_at(self.method.points(), closure, copies)
        self.add(found, weight)
        return math.fsum(found) / len(found)

    def add(self, losses: list[float], weight: float = 1.0) -> None:
        """Add losses, one a point, that were found elsewhere."""
        self.losses = [total + weight * value for total, value in zip(self.losses, losses, strict=True)]

    def losses_at(self, points: list[tuple[int, float]], closure: Callable, copies: int = 1) -> list[float]:
        """The loss at θ + factor · ε · z_query for each (query, factor); the weights are restored.

        With `copies` > 1 that many points are served by one forward: the closure is called with `copies=` their number
        and returns as many losses, [copies], each of its own copy of the batch.
        """
        copies = 1 if self.one_by_one else copies
        found: list[float] = []
        try:
            with torch.inference_mode():
                for first in range(0, len(points), copies):
                    group = [(query, factor * self.eps) for query, factor in points[first : first + copies]]
                    ask = closure if copies == 1 else partial(closure, copies=len(group))
                    losses = self._ask(ask, group, copies > 1)
                    found += [float(losses)] if copies == 1 else losses.tolist()
        except CopiesUnsupported as error:
            logger.warning("%s: a forward for each point from here on", error)
            self.one_by_one = True
        finally:
            self.restore()
        return found if len(found) == len(points) else self.losses_at(points, closure)

    def _ask(self, ask: Callable, group: list[tuple[int, float]], batched: bool):
        """The loss at a point, or the losses of a group of points, [copies]."""
        if not self.master:
            with PerturbedWeights(self.slots, group, self.shown) as streamed:
                losses = ask()
            if streamed.largest > self.whole:
                self.whole = streamed.largest
                logger.warning("this model's layers need up to %.1f MB of weights perturbed at once", self.whole / 1e6)
            if streamed.is_shown(losses):
                raise CopiesUnsupported("the loss is made of parameters alone")
            return losses
        if not batched:
            ((query, scale),) = group
            for slot in self.slots:
                slot.write((self.direction(slot, query, range(0)) * scale).add_(slot.param))
            return ask()
        deltas = []
        for slot in self.slots:
            of_points = torch.stack([self.direction(slot, query, range(0)) * scale for query, scale in group])
            deltas += slot.split(of_points.to(slot.shown_on))
        try:
            self.spread(deltas)
            return ask()
        finally:
            self.spread(None)

    def step(self, closure: Callable | None = None) -> float | None:
        """Estimate (where a closure is given) and update; returns the mean loss. A non-finite loss updates nothing."""
        loss = self.estimate(closure) if closure is not None else None
        self.projected_grads = self.method.projected(self.losses, self.eps)
        self.losses = [0.0] * len(self.losses)
        finite = [g for g in self.projected_grads if math.isfinite(g)]
        scalars = self.scalars
        scalars["in_a_row"] = 0 if finite else scalars["in_a_row"] + 1
        scalars["skipped"] += len(self.projected_grads) > len(finite)
        scalars["zero"] += not any(self.projected_grads)  # losses that don't differ teach nothing
        n = len(self.projected_grads)
        scaled = [self._scaled(g) / n if math.isfinite(g) else math.nan for g in self.projected_grads]
        rates = [group["lr"] for group in self.param_groups]
        coefficients = [[round_to_fp32(g if self.inner else rate * g) for g in scaled] for rate in rates]
        self._apply(coefficients, rates)
        decays = any(slot.decayed for slot in self.slots)
        self.trajectory.append(coefficients, rates, keep_rate=decays or self.inner is not None)
        scalars["step"] += 1
        if scalars["in_a_row"] >= MAX_NONFINITE_STEPS:
            raise NonFiniteLoss(
                f"the loss was NaN or infinite in {MAX_NONFINITE_STEPS} steps in a row, up to step {scalars['step']}; the weights "
                "are those before them. Lower the learning rate or eps, or load the model in bfloat16 or float32"
            )
        return loss

    @property
    def projected_grad(self) -> float:
        """|g| of the losses at hand or, after a step, of that step: the root of its mean square over the queries."""
        gs = self.method.projected(self.losses, self.eps) if any(self.losses) else self.projected_grads
        return math.sqrt(math.fsum(g * g for g in gs) / len(gs)) if gs else math.nan

    def _scaled(self, g: float) -> float:
        """g after clip and normaliser."""
        if self.clip:
            g = max(-self.clip, min(self.clip, g))
        if self.normalize:
            scalars = self.scalars
            scalars["mean_square"] = MEAN_SQUARE_DECAY * scalars["mean_square"] + (1 - MEAN_SQUARE_DECAY) * g * g
            scalars["weight"] *= MEAN_SQUARE_DECAY
            mean_square = scalars["mean_square"] / (1 - scalars["weight"])
            g = g / math.sqrt(mean_square) if mean_square else 0.0
        return g

    @torch.no_grad()
    def _apply(self, coefficients: list[list[float]], rates: list[float]) -> None:
        """Update each group from one coefficient a query (NaN: skipped) and its rate."""
        for slot in self.slots:
            queries = [(c, query) for query, c in enumerate(coefficients[slot.group]) if not math.isnan(c)]
            if queries:
                update = self._update_master if self.master else self._update_streamed
                update(slot, queries, rates[slot.group])
        self.restore()
        for slot in self.slots:
            slot.z.clear()

    def _update_master(self, slot: ParamBlock, queries: list[tuple[float, int]], rate: float) -> None:
        zs = [(c, self.direction(slot, query, range(0))) for c, query in queries]
        if self.inner:
            slot.param.grad = sum(z * c for c, z in zs)
            self.inner.param_groups[slot.group]["lr"] = rate
            if slot is self.slots[-1]:
                self.inner.step()
                self.inner.zero_grad()
            return
        if slot.decayed:
            slot.param.mul_(round_to_fp32(1 - rate * slot.decayed))
        self.method.update(slot.param, zs)

    def _update_streamed(self, slot: ParamBlock, queries: list[tuple[float, int]], rate: float) -> None:
        step, kernel = self.scalars["step"], len(queries) == 1 and self.by_kernel(slot)
        keep = round_to_fp32(1 - rate * slot.decayed) if slot.decayed else 1.0
        for rows in slot.blocks():
            block, start = slot.matrix[rows.start : rows.stop], slot.offset + rows.start * slot.width
            if kernel and block.dtype != torch.float16:
                ((coefficient, query),) = queries
                self.noise.update((step, query), start, block, coefficient, keep, (step, "rounding"))
                continue
            values = to_single_precision(block)
            if slot.decayed:
                values.mul_(keep)
            self.method.update(values, [(c, self.direction(slot, query, rows)) for c, query in queries])
            if values is not block:
                counter = (self.noise.seed, step, "rounding")
                rounded = counter_rng.stochastic_round(values.flatten(), slot.param.dtype, counter, start)
                block.copy_(rounded.view(block.shape))

    def replay(self, trajectory: Trajectory, steps: range) -> None:
        """Take these steps of a trajectory again, from the weights as they stand: no loss is asked for."""
        groups = len(self.param_groups)
        for step in steps:
            self.scalars["step"] = step
            rate = trajectory.rates[step] if trajectory.rates else 0.0
            with torch.no_grad():
                self._apply([trajectory.coefficients[step]] * groups, [rate] * groups)
            self.trajectory.append([trajectory.coefficients[step]], [rate], keep_rate=bool(trajectory.rates))
        self.scalars["step"] = steps.stop

    # ---- state ----

    def state_dict(self) -> dict:
        """Groups, the run's scalars and coefficients; the master only where the parameters can't hold its bits."""
        kept = {i: slot.param for i, slot in enumerate(self.slots) if any(p.dtype != torch.float32 for p in slot.parts)}
        inner = self.inner.state_dict() if self.inner else None
        state = {
            "zo": dict(self.scalars),
            "method": dict(vars(self.method)),
            "master": kept,
            "trajectory": dict(vars(self.trajectory)),
            "inner": inner,
        }
        return {**super().state_dict(), **state}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.scalars.update(state_dict["zo"])
        vars(self.method).update(state_dict.get("method", {}))
        self.losses = [0.0] * len(self.method.points())
        for slot in self.slots:
            slot.z.clear()
        self.trajectory = Trajectory(**state_dict["trajectory"])
        self.load_master()
        for i, master in state_dict["master"].items():
            self.slots[i].param.copy_(master)
        if self.inner:
            self.inner.load_state_dict(state_dict["inner"])
        self.restore()
