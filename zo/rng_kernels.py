"""Draw directions (`DirectionSource`) by the torch operations of counter_rng.py or by a GPU kernel.

On a GPU each of those dozen operations would read and write memory and wait for its launch: a hundred times
the cost of a plain `normal_`. A Triton kernel makes z in registers instead, with the same bits, and does in
one pass what is done with z: z itself, θ + scale·z at one or two scales, or the update with its stochastic
rounding. Triton comes with torch's CUDA builds; where it is missing the torch operations serve.
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
# Elements before a key changes, of the distribution with the fewest elements a word.
ELEMENTS_PER_KEY = 2 * counter_rng.WORDS_PER_KEY


@functools.cache
def kernels_available(device: torch.device) -> bool:
    """Return whether kernels draw directions on this device; the log says once why a GPU has none."""
    if device.type != "cuda":
        return False
    try:
        if triton is None:
            raise RuntimeError("Triton is not installed")
        # A kernel may fail to build: there may be no C compiler.
        DirectionSource(0).perturb_values((), 0, torch.zeros(1, device=device), [1.0])
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        message = "no kernels on %s (%s): full-parameter steps there take many times as long"
        logger.warning(message, device, reason[0])
        return False
    return True


@dataclass(frozen=True)
class DirectionSource:
    """The random numbers of directions: elements of variance 1 by (seed, counter), see counter_rng.py.

    Args:
        seed: of all directions.
        distribution: one of `counter_rng.DISTRIBUTIONS`.
    """

    seed: int
    distribution: str = "gaussian"

    def rows(self, counter: tuple, offset: int, row_numel: int, rows: range | Tensor, device) -> Tensor:
        """Return [len(rows), row_numel] fp32: rows of a matrix that begins at element `offset` of z."""
        name = self.distribution
        if not isinstance(rows, range):
            return counter_rng.direction_rows(name, (self.seed, *counter), offset, row_numel, rows)
        start = offset + rows.start * row_numel
        count = len(rows) * row_numel
        if kernels_available(torch.device(device)):
            z = torch.empty(count, device=device)
            self._perturb(counter, start, z, z[None], ())
        else:
            z = counter_rng.direction_range(name, (self.seed, *counter), start, count, device)
        return z.view(len(rows), row_numel)

    def perturb_values(self, counter: tuple, start: int, values: Tensor, scales: list[float]) -> list[Tensor]:
        """Return values + scale·z for each scale, in the dtype of `values`, by a kernel; GPU only.

        Args:
            start: number of the first element of `values` in the direction.
        """
        out = values.new_empty(len(scales), *values.shape)
        for i in range(0, len(scales), 2):
            self._perturb(counter, start, values.view(-1), out[i : i + 2].flatten(1), scales[i : i + 2])
        return list(out)

    def _perturb(self, counter: tuple, start: int, values: Tensor, out: Tensor, scales) -> None:
        """Write z (no scales), or values + scale·z at one or two scales, into the rows of `out`."""
        scale, scale2 = (*scales, 0.0, 0.0)[:2]
        table = counter_rng.signed_normal_table(values.device)
        for begin, n in split_by_key(start, len(values)):
            _launch(
                _perturb_kernel, n, values[begin:], out[:, begin:], out.stride(0), table, n,
                *self._stream(counter, start + begin), scale, scale2, SIGNS=self._signs, POINTS=len(scales),
            )  # fmt: skip

    def update_values(
        self, counter: tuple, start: int, values: Tensor, coefficient: float, factor: float, rounding: tuple
    ) -> None:
        """Set values ← factor · values − coefficient · z in place by a kernel; fp32 or bfloat16, GPU only.

        Args:
            start: number of the first element of `values` in the direction.
            rounding: counter of the chance by which bfloat16 is rounded, as in
                `counter_rng.stochastic_round`.
        """
        values = values.view(-1)
        chance = DirectionSource(self.seed)
        table = counter_rng.signed_normal_table(values.device)
        for begin, n in split_by_key(start, len(values)):
            _launch(
                _update_kernel, n, values[begin:], table, n, *self._stream(counter, start + begin),
                coefficient, factor, *chance._stream(rounding, start + begin), SIGNS=self._signs,
                ROUND=values.dtype == torch.bfloat16,
            )  # fmt: skip

    @property
    def _signs(self) -> bool:
        return self.distribution == "rademacher"

    def _stream(self, counter: tuple, start: int) -> tuple[int, int, int, int]:
        """Return (first word, elements of it to skip, two keys) of the elements from `start` on."""
        word, skip = divmod(start, counter_rng.DISTRIBUTIONS[self.distribution].per_word)
        key_number, index = divmod(word, counter_rng.WORDS_PER_KEY)
        return index, skip, *counter_rng.direction_key(self.seed, *counter, key_number)


def split_by_key(start: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (first, number) of elements that lie under one key, from element `start` on."""
    begin = 0
    while begin < count:
        n = min(count - begin, ELEMENTS_PER_KEY - (start + begin) % ELEMENTS_PER_KEY)
        yield begin, n
        begin += n


if triton is not None:
    _NOT_SPECIALIZED = ["stride", "n", "first", "skip", "k0", "k1", "r_first", "r_skip", "r_k0", "r_k1"]

    def _launch(kernel, n: int, values: Tensor, *args, **constants) -> None:
        with torch.cuda.device_of(values):
            # a product and a sum rounded once, as a GPU would fuse them, give other bits than two operations
            kernel[(triton.cdiv(n, BLOCK_SIZE),)](
                values, *args, **constants, BLOCK_SIZE=BLOCK_SIZE, enable_fp_fusion=False
            )

    @triton.jit
    def _hash32(word, k0, k1):
        """Return what `counter_rng.hash32` returns."""
        x = word * -1640531527 + k0
        x = (x ^ ((x >> 17) & 0x7FFF)) * -312814405 + k1
        x = (x ^ ((x >> 11) & 0x1FFFFF)) * -1404298415 + k0
        x = (x ^ ((x >> 15) & 0x1FFFF)) * 830770091 + k1
        return x ^ ((x >> 14) & 0x3FFFF)

    @triton.jit
    def _half_word(at, first, k0, k1):
        """Return the signed 16 bits number `at` of a stream: the lower half of a word comes first."""
        word = _hash32(first + (at >> 1), k0, k1)
        return ((word >> ((at & 1) * 16)) << 16) >> 16

    @triton.jit
    def _element(at, first, k0, k1, table, SIGNS: tl.constexpr):
        if SIGNS:
            return ((_hash32(first + (at >> 5), k0, k1) >> (at & 31)) & 1) * 2.0 - 1.0
        else:
            return tl.load(table + _half_word(at, first, k0, k1) + 32768)

    @triton.jit(do_not_specialize=_NOT_SPECIALIZED)
    def _perturb_kernel(
        values, out, stride, table, n, first, skip, k0, k1, scale, scale2,
        SIGNS: tl.constexpr, POINTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        z = _element(skip + i, first, k0, k1, table, SIGNS)
        if POINTS == 0:
            tl.store(out + i, z, mask=i < n)
        else:
            value = tl.load(values + i, mask=i < n).to(tl.float32)
            tl.store(out + i, z * scale + value, mask=i < n)
            if POINTS == 2:
                tl.store(out + stride + i, z * scale2 + value, mask=i < n)

    @triton.jit(do_not_specialize=_NOT_SPECIALIZED)
    def _update_kernel(
        values, table, n, first, skip, k0, k1, coefficient, factor, r_first, r_skip, r_k0, r_k1,
        SIGNS: tl.constexpr, ROUND: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        z = _element(skip + i, first, k0, k1, table, SIGNS)
        value = tl.load(values + i, mask=i < n).to(tl.float32) * factor - z * coefficient
        if ROUND:  # bfloat16: the upper half of the bits, with a carry from the lower half by chance
            chance = _half_word(r_skip + i, r_first, r_k0, r_k1) & 0xFFFF
            bits = (value.to(tl.int32, bitcast=True) + chance) >> 16
            tl.store(values + i, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=i < n)
        else:
            tl.store(values + i, value, mask=i < n)
