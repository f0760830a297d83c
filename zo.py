"""The zeroth-order engine: train any module with forward passes only (MeZO, arXiv 2305.17333, Algorithm 1).

    zo = ZerothOrder(model, lr=1e-3, eps=1e-2, seed=0)      # every parameter that requires a gradient
    for batch in loader:
        loss = zo.step(lambda: loss_fn(model, batch))       # two forwards, one update; returns (l+ + l-)/2

One idea: the trained weights live in fp32 master values that are never perturbed. The model is shown master ± εz and
gets the master's bits back, so a step without an update changes nothing, in any dtype. z is a pure function of (seed,
step, element index) from a counter hash: nothing is stored, no global generator is touched, and a resumed run draws
what an uninterrupted one would have drawn. `ZerothOrder` is a `torch.optim.Optimizer`, so that learning rate
schedulers, parameter groups and state_dict work as usual. It knows nothing of tasks or of the Hugging Face Trainer.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

BLOCK = 1 << 20  # elements of z at a time: a block's temporaries stay in the cache
PATIENCE = 50  # non-finite losses in a row before giving up


class NonFiniteLoss(FloatingPointError):
    """The loss was NaN or infinite for PATIENCE steps in a row."""


@functools.cache
def normal_table() -> Tensor:
    """[65536] fp32: the quantiles (i + 1/2) / 65536 of N(0, 1), scaled to variance 1, as multiples of 2^-19.

    A multiple of 2^-19 below 8 is exact in fp32, and no entry lies so close to a rounding boundary that the last bits
    of a machine's libm could move it (tests/test_zo.py), so the table has the same bits everywhere.
    """
    upper = [NormalDist().inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)]
    scale = math.sqrt(32768 / math.fsum(x * x for x in upper))
    steps = torch.tensor([round(x * scale * 2**19) for x in upper])
    return (torch.cat((-steps.flip(0), steps)) / 2**19).float()


def direction_key(*counter: int) -> tuple[int, int]:
    """Two 32-bit keys of (seed, step, ...), as signed integers: different counters give unrelated streams."""
    digest = hashlib.blake2b(",".join(map(str, counter)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def hash32(counter: Tensor, keys: tuple[int, int]) -> Tensor:
    """A 32-bit mixing hash of an int32 counter under two keys, in place; products wrap.

    Three rounds of xor-shift and odd multiplication (constants of C. Wellons' `triple32` search), the second key
    added between them, so that two streams are not the same numbers in another order.
    """
    x = counter.mul_(-1640531527).add_(keys[0])
    for shift, multiplier, key in ((17, -312814405, keys[1]), (11, -1404298415, keys[0]), (15, 830770091, keys[1])):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(multiplier).add_(key)
    return x.bitwise_xor_((x >> 14).bitwise_and_((1 << 18) - 1))


def gaussian(counter: tuple[int, ...], start: int, count: int, device="cpu") -> Tensor:
    """Elements start … start+count-1 of the direction of `counter` = (seed, step, ...): [count] fp32, N(0, 1).

    One hash gives two elements, each a 16-bit look-up into the normal table: integer operations and a gather, so the
    same bits on every device, whatever the blocks. The index above 2^32 goes into the key.
    """
    table = normal_table().to(device)
    out = torch.empty(count, device=device)
    done = 0
    while done < count:
        pair = (start + done) // 2
        high, low = pair >> 30, pair & ((1 << 30) - 1)
        skip = (start + done) % 2
        pairs = min((count - done + skip + 1) // 2, BLOCK // 2, (1 << 30) - low)
        bits = hash32(torch.arange(low, low + pairs, dtype=torch.int32, device=device), direction_key(*counter, high))
        index = torch.stack((bits & 0xFFFF, (bits >> 16).bitwise_and_(0xFFFF)), dim=1).flatten()[skip:]
        n = min(len(index), count - done)
        torch.index_select(table, 0, index[:n], out=out[done : done + n])
        done += n
    return out


@dataclass
class Block:
    """Parameters whose fp32 master values lie in one flat buffer; `offset` is where their elements start in z."""

    params: list[Tensor]
    master: Tensor  # [n]
    offset: int
    group: int  # index of the parameter group
    z: Tensor | None = None

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat [n] as views in the shapes of the parameters."""
        pieces = flat.split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]

    def write(self, flat: Tensor) -> None:
        for p, values in zip(self.params, self.split(flat), strict=True):
            p.copy_(values)


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
        host: keep the master and z on the host, in one flat buffer a group; by default where fewer than a tenth of a
            module's elements are trained.

    `step(closure)` does it all. A loop that accumulates micro-batches calls `estimate(closure, weight)` for each of
    them, all with the same z, then `step()`. The closure takes no argument and returns a loss (a tensor or a float)
    of the module as it stands; it runs without autograd. Restores the weights if the closure raises.

    Raises ValueError for eps <= 0 or parameters without storage, NonFiniteLoss after 50 non-finite losses in a row.
    """

    DECAY = 0.98

    def __init__(self, params, lr=1e-3, eps=1e-3, seed=0, weight_decay=0.0, clip=0.0, normalize=False, host=None):
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps must be a positive number, not {eps}")
        if isinstance(params, nn.Module):
            total = sum(p.numel() for p in params.parameters())
            params = [p for p in params.parameters() if p.requires_grad]
            host = 10 * sum(p.numel() for p in params) < total if host is None else host
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.eps, self.seed, self.clip, self.normalize = eps, seed, clip, normalize
        if any(p.is_meta for group in self.param_groups for p in group["params"]):
            raise ValueError("a parameter to train has no storage (it is on the meta device, offloaded)")
        self.scalars = {"step": 0, "mean_square": 0.0, "weight": 1.0, "skipped": 0, "in_a_row": 0}
        self.projected_grad = math.nan  # of the last step, before clip and normaliser
        self.losses = [0.0, 0.0]  # at θ+εz and θ−εz, of the micro-batches so far
        self.host = bool(host)
        self.blocks = self._allocate()
        self.load_master()

    def _allocate(self) -> list["Block"]:
        """On the host one flat master a group, else one a parameter, beside it."""
        blocks, offset = [], 0
        for index, group in enumerate(self.param_groups):
            for params in [group["params"]] if self.host else [[p] for p in group["params"]]:
                size = sum(p.numel() for p in params)
                master = torch.empty(size, device="cpu" if self.host else params[0].device)
                blocks.append(Block(params, master, offset, index))
                offset += size
        return blocks

    @torch.no_grad()
    def load_master(self) -> None:
        """Read the parameters as they stand into the fp32 master; call it after writing to them from outside."""
        for block in self.blocks:
            for p, values in zip(block.params, block.split(block.master), strict=True):
                values.copy_(p)

    @torch.no_grad()
    def restore(self) -> None:
        """Write the master's bits into the parameters."""
        for block in self.blocks:
            block.write(block.master)

    def direction(self, block: "Block") -> Tensor:
        """z of a block in this step, [n] fp32; kept for the step where it is small, generated anew where it is not."""
        if block.z is not None:
            return block.z
        counter = (self.seed, self.scalars["step"])
        z = gaussian(counter, block.offset, block.master.numel(), block.master.device)
        if self.host:
            block.z = z
        return z

    @torch.no_grad()
    def perturb(self, scale: float) -> None:
        """Write master + scale·z into the parameters. The product is rounded before the sum: `alpha=` would fuse."""
        for block in self.blocks:
            block.write((self.direction(block) * scale).add_(block.master))

    def estimate(self, closure: Callable[[], Tensor | float], weight: float = 1.0) -> float:
        """Add this micro-batch's losses, times `weight`, to both sides; returns (ℓ₊+ℓ₋)/2 of it. Two forwards."""
        both = []
        try:
            for sign in (1, -1):
                self.perturb(sign * self.eps)
                with torch.inference_mode():
                    both.append(float(closure()))
        finally:
            self.restore()
        self.losses = [total + weight * value for total, value in zip(self.losses, both, strict=True)]
        return (both[0] + both[1]) / 2

    def step(self, closure: Callable[[], Tensor | float] | None = None) -> float | None:
        """Estimate (where a closure is given) and update; returns (ℓ₊+ℓ₋)/2. A non-finite loss updates nothing."""
        loss = self.estimate(closure) if closure is not None else None
        g = self.projected_grad = (self.losses[0] - self.losses[1]) / (2 * self.eps)
        self.losses = [0.0, 0.0]
        scalars = self.scalars
        if math.isfinite(g):
            scalars["in_a_row"] = 0
            self._update(self._scaled(g))
        else:
            scalars["skipped"] += 1
            scalars["in_a_row"] += 1
        for block in self.blocks:
            block.z = None
        scalars["step"] += 1
        if scalars["in_a_row"] >= PATIENCE:
            raise NonFiniteLoss(
                f"the loss was NaN or infinite in {PATIENCE} steps in a row, up to step {scalars['step']}; the weights "
                "are those before them. Lower the learning rate or eps, or load the model in bfloat16 or float32"
            )
        return loss

    def _scaled(self, g: float) -> float:
        """g after clip and normaliser."""
        if self.clip:
            g = max(-self.clip, min(self.clip, g))
        if self.normalize:
            scalars = self.scalars
            scalars["mean_square"] = self.DECAY * scalars["mean_square"] + (1 - self.DECAY) * g * g
            scalars["weight"] *= self.DECAY
            mean_square = scalars["mean_square"] / (1 - scalars["weight"])
            g = g / math.sqrt(mean_square) if mean_square else 0.0
        return g

    @torch.no_grad()
    def _update(self, g: float) -> None:
        for block in self.blocks:
            group = self.param_groups[block.group]
            if group["weight_decay"]:
                block.master.mul_(1 - group["lr"] * group["weight_decay"])
            block.master.sub_(self.direction(block) * (group["lr"] * g))
        self.restore()

    def state_dict(self) -> dict:
        """Groups and the run's scalars; the master only where the parameters themselves can't hold its bits."""
        kept = {
            i: block.master
            for i, block in enumerate(self.blocks)
            if any(p.dtype != torch.float32 for p in block.params)
        }
        return {**super().state_dict(), "zo": dict(self.scalars), "master": kept}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.scalars.update(state_dict["zo"])
        self.load_master()
        for i, master in state_dict["master"].items():
            self.blocks[i].master.copy_(master)
        self.restore()
