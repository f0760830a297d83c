"""Where the trained weights live: in the parameters themselves, or in an fp32 master on the host.

`InPlaceWeights` perturbs blocks of parameters inside the forward and updates them where they are, half
precision by stochastic rounding. `MasterWeights` keeps a flat fp32 copy of few parameters, writes master ± εz
into them for a forward and the master's bits after it.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from zo import counter_rng
from zo.methods import Method, ParamBlock, to_single_precision
from zo.perturbed_weights import CopiesUnsupported, PerturbedWeights, Point, StepDirections, kernel_serves
from zo.trajectory import round_to_fp32

logger = logging.getLogger(__name__)

Term = tuple[float, int]  # (coefficient, query) of an update

# Most elements at once on a GPU, where a launch costs more than the elements of a small chunk.
GPU_CHUNK_SIZE = 1 << 24


def decay_factor(rate: float, weight_decay: float) -> float:
    """Return 1 − ηλ, which weight decay multiplies the weights by."""
    return round_to_fp32(1 - rate * weight_decay) if weight_decay else 1.0


class TrainedWeights:
    """The blocks of an optimizer's parameter groups, their losses at perturbed points and their updates."""

    blocks: list[ParamBlock]

    def read_params(self) -> None:
        """Read the values of the parameters, where this object keeps a copy of them."""

    def restore(self) -> None:
        """Write the unperturbed weights into the parameters."""

    def losses(self, closure, points: list[Point], directions: StepDirections, batched: bool) -> list[float]:
        """Return the loss at θ + scale · z_query for each point (query, scale).

        Args:
            closure: returns the loss; where `batched` it takes `copies=` and returns [copies] losses.
            batched: whether one forward serves all points; else there is one point.

        Raises:
            CopiesUnsupported: one forward cannot serve these points.
        """
        raise NotImplementedError

    @torch.no_grad()
    def apply_update(
        self, coefficients: list[list[float]], rates: list[float], directions: StepDirections
    ) -> None:
        """Update each block from its group's coefficients, one a query (NaN: left out), and learning rate."""
        for block in self.blocks:
            terms = [(c, query) for query, c in enumerate(coefficients[block.group]) if not math.isnan(c)]
            if terms:
                self.update_block(block, terms, rates[block.group], directions)

    def update_block(self, block, terms: list[Term], rate: float, directions: StepDirections) -> None:
        """Move a block by −coefficient · z_query for each term (coefficient, query), after weight decay."""
        raise NotImplementedError

    def state(self) -> dict:
        """Return the part of the state that the parameters cannot hold."""
        return {"master": {}, "inner": None}

    def load_state(self, state: dict) -> None:
        """Take what `state` returned, after the parameters have their values."""


class InPlaceWeights(TrainedWeights):
    """The parameters are the only copy; a block is one parameter.

    Args:
        param_groups: the optimizer's.
        method: decides whether a kernel serves, and at how many points.
    """

    def __init__(self, param_groups: list[dict], method: Method):
        self.blocks = []
        self.unchunked_bytes = 0  # of the largest tensor that could not be perturbed in chunks of rows
        offset = 0
        for index, group in enumerate(param_groups):
            for p in filter(lambda p: p.requires_grad, group["params"]):
                self.blocks.append(ParamBlock(p, offset, index, group["weight_decay"]))
                offset += p.numel()
        points = len(method.points())
        for block in filter(lambda block: block.param.is_cuda, self.blocks):
            # A hundredth of all weights may be there a second time, z and all points of a chunk together.
            buffers = 1 if kernel_serves(method, block) and points <= 2 else 3 + points
            block.chunk_size = min(GPU_CHUNK_SIZE, max(counter_rng.CHUNK_SIZE, offset // (100 * buffers)))

    def losses(self, closure, points: list[Point], directions: StepDirections, batched: bool) -> list[float]:
        with PerturbedWeights(self.blocks, points, directions) as weights:
            loss = closure(copies=len(points)) if batched else closure()
        if weights.unchunked_bytes > self.unchunked_bytes:
            self.unchunked_bytes = weights.unchunked_bytes
            size = self.unchunked_bytes / 1e6
            logger.warning("this model's layers need up to %.1f MB of weights perturbed at once", size)
        if weights.is_tracked(loss):
            if batched:
                raise CopiesUnsupported("the loss is made of parameters alone")
            (loss,) = weights.values_at_points(loss)
        return loss.tolist() if batched else [float(loss)]

    def update_block(self, block, terms: list[Term], rate: float, directions: StepDirections) -> None:
        factor = decay_factor(rate, block.weight_decay)
        step = directions.step
        one_term = len(terms) == 1 and block.param.dtype != torch.float16
        by_kernel = one_term and kernel_serves(directions.method, block)
        for rows in block.row_chunks():
            theta = block.as_rows[rows.start : rows.stop]
            start = block.offset + rows.start * block.row_numel
            if by_kernel:
                ((coefficient, query),) = terms
                directions.source.update_values(
                    (step, query), start, theta, coefficient, factor, (step, "rounding")
                )
                continue
            values = to_single_precision(theta)
            if block.weight_decay:
                values.mul_(factor)
            weighted_directions = [(c, directions.z_rows(block, query, rows)) for c, query in terms]
            directions.method.update(values, weighted_directions)
            if values is not theta:
                counter = (directions.source.seed, step, "rounding")
                new_values = counter_rng.stochastic_round(values.flatten(), theta.dtype, counter, start)
                theta.copy_(new_values.view(theta.shape))


TORCH_OPTIMIZERS = {"momentum": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}


class MasterWeights(TrainedWeights):
    """A flat fp32 master on the host for each parameter group; a block is one group.

    Args:
        param_groups: the optimizer's.
        optim: "sgd", or the torch optimizer that takes the estimate as a gradient of the master.
        set_perturbations: called with one [copies, …] perturbation per parameter, or None, for batched
            losses.
    """

    def __init__(self, param_groups: list[dict], optim: str, set_perturbations: Callable | None):
        self.set_perturbations = set_perturbations
        self.blocks = []
        offset = 0
        for index, group in enumerate(param_groups):
            params = [p for p in group["params"] if p.requires_grad]
            flat = torch.empty(sum(p.numel() for p in params), dtype=torch.float32, device="cpu")
            self.blocks.append(ParamBlock(flat, offset, index, group["weight_decay"], params=params))
            offset += flat.numel()
        self.read_params()
        self.torch_optimizer: torch.optim.Optimizer | None = None
        if optim != "sgd":
            kind, options = TORCH_OPTIMIZERS[optim]
            groups = [{"params": [block.param], "weight_decay": block.weight_decay} for block in self.blocks]
            self.torch_optimizer = kind(groups, **options)

    @torch.no_grad()
    def read_params(self) -> None:
        for block in self.blocks:
            for p, values in zip(block.params, block.split(block.param), strict=True):
                values.copy_(p)

    @torch.no_grad()
    def restore(self) -> None:
        for block in self.blocks:
            block.write(block.param)

    def losses(self, closure, points: list[Point], directions: StepDirections, batched: bool) -> list[float]:
        if batched:
            return self._batched_losses(closure, points, directions)
        ((query, scale),) = points
        for block in self.blocks:
            block.write((directions.z(block, query) * scale).add_(block.param))
        return [float(closure())]

    def _batched_losses(self, closure, points: list[Point], directions: StepDirections) -> list[float]:
        perturbations: list[Tensor] = []
        for block in self.blocks:
            block_perturbations = torch.stack([directions.z(block, query) * scale for query, scale in points])
            perturbations += block.split(block_perturbations.to(block.device))
        try:
            self.set_perturbations(perturbations)
            return closure(copies=len(points)).tolist()
        finally:
            self.set_perturbations(None)

    @torch.no_grad()
    def apply_update(
        self, coefficients: list[list[float]], rates: list[float], directions: StepDirections
    ) -> None:
        super().apply_update(coefficients, rates, directions)
        if self.torch_optimizer:
            self.torch_optimizer.step()  # nothing where no block has a gradient
            self.torch_optimizer.zero_grad()
        self.restore()

    def update_block(self, block, terms: list[Term], rate: float, directions: StepDirections) -> None:
        weighted_directions = [(c, directions.z(block, query)) for c, query in terms]
        if self.torch_optimizer:
            block.param.grad = sum(z * c for c, z in weighted_directions)
            self.torch_optimizer.param_groups[block.group]["lr"] = rate
            return
        if block.weight_decay:
            block.param.mul_(decay_factor(rate, block.weight_decay))
        directions.method.update(block.param, weighted_directions)

    def state(self) -> dict:
        """Return the masters that half-precision parameters cannot hold, and the torch optimizer's state."""
        masters = {}
        for i, block in enumerate(self.blocks):
            if any(p.dtype != torch.float32 for p in block.params):
                masters[i] = block.param
        optimizer_state = self.torch_optimizer.state_dict() if self.torch_optimizer else None
        return {"master": masters, "inner": optimizer_state}

    def load_state(self, state: dict) -> None:
        self.read_params()
        for i, values in state["master"].items():
            self.blocks[i].param.copy_(values)
        if self.torch_optimizer:
            self.torch_optimizer.load_state_dict(state["inner"])
        self.restore()
