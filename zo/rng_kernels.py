"""Where the engine's directions come from: `Noise`, by the passes of directions.py or, on a GPU, by a kernel.

There each of those dozen passes would read and write memory and wait for its launch: a hundred times the cost of a
plain `normal_`. A Triton kernel makes z in registers instead, with the same bits, and does in one pass what is done
with it: z itself, θ + scale·z at one or two scales, or the update with its stochastic rounding. Triton comes with
torch's CUDA builds; where it is missing the passes serve.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zo import counter_rng

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

BLOCK_SIZE = 1024  # elements that one program of a kernel makes
ELEMENTS_PER_KEY = (
    2 * counter_rng.WORDS_PER_KEY
)  # elements before a key changes, of the distribution with the fewest to a word


@functools.cache
def kernels_available(device: torch.device) -> bool:
    """Whether kernels make the directions there; where they can't on a GPU, the log says why, once."""
    if device.type != "cuda":
        return False
    try:
        if triton is None:
            raise RuntimeError("Triton is not installed")
        DirectionSource(0).shown((), 0, torch.zeros(1, device=device), [1.0])  # it needs a C compiler, say
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("no kernels on %s (%s): full-parameter steps there take many times as long", device, why[0])
        return False
    return True


@dataclass(frozen=True)
class DirectionSource:
    """The source of directions: elements of variance 1 by (seed, counter), see directions.py."""

    seed: int
    distribution: str = "gaussian"

    def rows(self, counter: tuple, offset: int, width: int, rows: range | Tensor, device) -> Tensor:
        """[len(rows), width] fp32: rows of a matrix whose first element is number `offset` of a direction."""
        if not isinstance(rows, range):
            return counter_rng.direction_rows(self.distribution, (self.seed, *counter), offset, width, rows)
        start, count = offset + rows.start * width, len(rows) * width
        if kernels_available(torch.device(device)):
            z = torch.empty(count, device=device)
            self._show(counter, start, z, z[None], ())
        else:
            z = counter_rng.direction_range(self.distribution, (self.seed, *counter), start, count, device)
        return z.view(len(rows), width)

    def shown(self, counter: tuple, start: int, values: Tensor, scales: list[float]) -> list[Tensor]:
        """values + scale·z for each scale, in the dtype of `values`, whose first element is number `start` of z; by a
        kernel, on a GPU."""
        out = values.new_empty(len(scales), *values.shape)
        for i in range(0, len(scales), 2):
            self._show(counter, start, values.view(-1), out[i : i + 2].flatten(1), scales[i : i + 2])
        return list(out)

    def _show(self, counter: tuple, start: int, values: Tensor, out: Tensor, scales) -> None:
        (first, second), table = (*scales, 0.0, 0.0)[:2], counter_rng.signed_normal_table(values.device)
        for at, n in split_by_key(start, len(values)):
            _launch(
                _perturb_kernel, n, values[at:], out[:, at:], out.stride(0), table, n,
                *self._stream(counter, start + at), first, second, SIGNS=self._signs, POINTS=len(scales),
            )  # fmt: skip

    def update(self, counter: tuple, start: int, values: Tensor, coefficient: float, keep: float, rounding: tuple):
        """values ← keep · values − coefficient · z in place, fp32 or bfloat16, which is rounded by chance as
        `directions.stochastic_round` does it under the counter `rounding`; by a kernel, on a GPU."""
        values, chance, table = (
            values.view(-1),
            DirectionSource(self.seed),
            counter_rng.signed_normal_table(values.device),
        )
        for at, n in split_by_key(start, len(values)):
            _launch(
                _update_kernel, n, values[at:], table, n, *self._stream(counter, start + at), coefficient, keep,
                *chance._stream(rounding, start + at), SIGNS=self._signs,
                ROUND=values.dtype == torch.bfloat16,
            )  # fmt: skip

    @property
    def _signs(self) -> bool:
        return self.distribution == "rademacher"

    def _stream(self, counter: tuple, start: int) -> tuple[int, int, int, int]:
        """(first word, elements of it to skip, two keys) of the stretch from element `start` on."""
        word, skip = divmod(start, counter_rng.DISTRIBUTIONS[self.distribution].per_word)
        high, low = divmod(word, counter_rng.WORDS_PER_KEY)
        return low, skip, *counter_rng.direction_key(self.seed, *counter, high)


def split_by_key(start: int, count: int) -> Iterator[tuple[int, int]]:
    """(first, number) of elements that lie under one key, from element `start` on."""
    at = 0
    while at < count:
        n = min(count - at, ELEMENTS_PER_KEY - (start + at) % ELEMENTS_PER_KEY)
        yield at, n
        at += n


if triton is not None:
    _CHANGING = ["stride", "n", "first", "skip", "k0", "k1", "r_first", "r_skip", "r_k0", "r_k1"]

    def _launch(kernel, n: int, values: Tensor, *args, **constants) -> None:
        with torch.cuda.device_of(values):
            # a product and a sum rounded once, as a GPU would fuse them, are other bits than two passes
            kernel[(triton.cdiv(n, BLOCK_SIZE),)](values, *args, **constants, LANES=BLOCK_SIZE, enable_fp_fusion=False)

    @triton.jit
    def _hash32(word, k0, k1):
        """`directions.hash32`."""
        x = word * -1640531527 + k0
        x = (x ^ ((x >> 17) & 0x7FFF)) * -312814405 + k1
        x = (x ^ ((x >> 11) & 0x1FFFFF)) * -1404298415 + k0
        x = (x ^ ((x >> 15) & 0x1FFFF)) * 830770091 + k1
        return x ^ ((x >> 14) & 0x3FFFF)

    @triton.jit
    def _half_word(at, first, k0, k1):
        """The signed 16 bits of place `at`: the lower half of a word first."""
        word = _hash32(first + (at >> 1), k0, k1)
        return ((word >> ((at & 1) * 16)) << 16) >> 16

    @triton.jit
    def _element(at, first, k0, k1, table, SIGNS: tl.constexpr):
        if SIGNS:
            return ((_hash32(first + (at >> 5), k0, k1) >> (at & 31)) & 1) * 2.0 - 1.0
        else:
            return tl.load(table + _half_word(at, first, k0, k1) + 32768)

    @triton.jit(do_not_specialize=_CHANGING)
    def _perturb_kernel(
        values, out, stride, table, n, first, skip, k0, k1, scale, other,
        SIGNS: tl.constexpr, POINTS: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0) * LANES + tl.arange(0, LANES)
        z = _element(skip + i, first, k0, k1, table, SIGNS)
        if POINTS == 0:
            tl.store(out + i, z, mask=i < n)
        else:
            value = tl.load(values + i, mask=i < n).to(tl.float32)
            tl.store(out + i, z * scale + value, mask=i < n)
            if POINTS == 2:
                tl.store(out + stride + i, z * other + value, mask=i < n)

    @triton.jit(do_not_specialize=_CHANGING)
    def _update_kernel(
        values, table, n, first, skip, k0, k1, coefficient, keep, r_first, r_skip, r_k0, r_k1,
        SIGNS: tl.constexpr, ROUND: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0) * LANES + tl.arange(0, LANES)
        z = _element(skip + i, first, k0, k1, table, SIGNS)
        value = tl.load(values + i, mask=i < n).to(tl.float32) * keep - z * coefficient
        if ROUND:  # bfloat16: the upper half of the bits, with a carry from the lower half by chance
            chance = _half_word(r_skip + i, r_first, r_k0, r_k1) & 0xFFFF
            bits = (value.to(tl.int32, bitcast=True) + chance) >> 16
            tl.store(values + i, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=i < n)
        else:
            tl.store(values + i, value, mask=i < n)
