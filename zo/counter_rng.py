"""Directions: random numbers that are pure functions of a counter (seed, step, query) and an element's index.

Nothing is stored and no global generator is touched: any block of a direction, on any device, with any number
of threads, is the same bits. One idea: a 32-bit mixing hash of the index under keys of the counter gives
words; a word gives two normal elements by table look-up, or 32 signs. Integer operations and gathers only.
"""

import functools
import hashlib
import math
import struct
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_SIZE = 1 << 19  # elements at a time: enough to outweigh the calls, and little beside the weights
WORDS_PER_KEY = 1 << 30  # words under one key: the index above goes into the key


@functools.cache
def normal_table() -> Tensor:
    """Return [65536] fp32: the quantiles (i + 1/2) / 65536 of N(0, 1), scaled to variance 1.

    They are rounded to multiples of 2^-19. A multiple of 2^-19 below 8 is exact in fp32, and no entry lies so
    close to a rounding boundary that the last bits of a machine's libm could move it
    (tests/test_counter_rng.py), so the table has the same bits everywhere.
    """
    upper_quantiles = [NormalDist().inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)]
    scale = math.sqrt(32768 / math.fsum(x * x for x in upper_quantiles))
    steps = torch.tensor([round(x * scale * 2**19) for x in upper_quantiles])
    return (torch.cat((-steps.flip(0), steps)) / 2**19).float()


@functools.cache
def signed_normal_table(device) -> Tensor:
    """Return `normal_table` in the order of a signed 16-bit index plus 32768."""
    return normal_table().roll(32768).to(device)


@functools.cache
def sign_table(device) -> Tensor:
    """Return [256, 8] fp32: the bits of a byte as -1 and 1, lowest first."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2.0 * bits - 1).to(device)


def direction_key(*counter) -> tuple[int, int]:
    """Return two 32-bit keys of (seed, step, ...), signed: different counters give unrelated streams."""
    digest = hashlib.blake2b(",".join(map(str, counter)).encode(), digest_size=8).digest()
    return struct.unpack("<ii", digest)


def hash32(counter: Tensor, keys: tuple[int, int]) -> Tensor:
    """Return a 32-bit mixing hash of an int32 counter under two keys, in place; products wrap.

    Three rounds of xor-shift and odd multiplication (constants of C. Wellons' `triple32` search), the second
    key added between them, so that two streams are not the same numbers in another order.
    """
    x = counter.mul_(-1640531527).add_(keys[0])
    rounds = ((17, -312814405, keys[1]), (11, -1404298415, keys[0]), (15, 830770091, keys[1]))
    for shift, multiplier, key in rounds:
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(multiplier).add_(key)
    return x.bitwise_xor_((x >> 14).bitwise_and_((1 << 18) - 1))


def words_at(counter: tuple, index: Tensor) -> Tensor:
    """Return words of a stream, int32, at indices (int64, any shape); of a range `word_range` is faster."""
    words = torch.empty_like(index, dtype=torch.int32)
    for key_number in (index // WORDS_PER_KEY).unique().tolist():
        has_key = index // WORDS_PER_KEY == key_number
        words[has_key] = hash32((index[has_key] % WORDS_PER_KEY).int(), direction_key(*counter, key_number))
    return words


def word_range(counter: tuple, start: int, count: int, device) -> Tensor:
    """Return [count] int32: words start … start+count-1 of a stream."""
    ranges = []
    while count > 0:
        key_number, first_index = divmod(start, WORDS_PER_KEY)
        n = min(count, WORDS_PER_KEY - first_index)
        index = torch.arange(first_index, first_index + n, dtype=torch.int32, device=device)
        ranges.append(hash32(index, direction_key(*counter, key_number)))
        start += n
        count -= n
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges)


class Distribution(NamedTuple):
    """Decode words, [n] int32, to elements, [n · per_word] fp32 of mean 0 and variance 1."""

    per_word: int
    decode: Callable[[Tensor], Tensor]


def decode_normals(words: Tensor) -> Tensor:
    """Return two normal elements a word, the lower half of the word first."""
    index = words.view(torch.int16).int().add_(32768)
    return signed_normal_table(words.device).index_select(0, index)


def decode_signs(words: Tensor) -> Tensor:
    """Return 32 signs a word, the lowest bit first."""
    return sign_table(words.device).index_select(0, words.view(torch.uint8).int()).flatten()


DISTRIBUTIONS = {"gaussian": Distribution(2, decode_normals), "rademacher": Distribution(32, decode_signs)}


def direction_range(name: str, counter: tuple, start: int, count: int, device="cpu") -> Tensor:
    """Return [count] fp32: elements start … start+count-1 of a direction.

    Args:
        name: one of `DISTRIBUTIONS`.
        counter: seed, step, and whatever else tells directions apart.
    """
    per_word, decode = DISTRIBUTIONS[name]
    first_word, skip = divmod(start, per_word)
    n_words = -(-(skip + count) // per_word)
    step = CHUNK_SIZE // per_word
    chunks = []
    for begin in range(0, n_words, step):
        chunks.append(decode(word_range(counter, first_word + begin, min(step, n_words - begin), device)))
    return (chunks[0] if len(chunks) == 1 else torch.cat(chunks))[skip : skip + count]


def direction_rows(name: str, counter: tuple, offset: int, row_numel: int, index: Tensor) -> Tensor:
    """Return [len(index), row_numel] fp32: rows of a matrix that begins at element `offset` of z."""
    per_word, decode = DISTRIBUTIONS[name]
    start = offset + index * row_numel
    span = torch.arange(row_numel // per_word + 2, device=index.device)
    rows = torch.empty(len(index), row_numel, device=index.device)
    column = torch.arange(row_numel, device=index.device)
    step = max(1, CHUNK_SIZE // (len(span) * per_word))
    for begin in range(0, len(index), step):
        starts = start[begin : begin + step]
        words = words_at(counter, (starts // per_word)[:, None] + span)
        elements = decode(words.flatten()).view(len(starts), -1)
        torch.gather(elements, 1, (starts % per_word)[:, None] + column, out=rows[begin : begin + step])
    return rows


def stochastic_round(values: Tensor, dtype: torch.dtype, counter: tuple, start: int) -> Tensor:
    """Round [n] fp32 to float16 or bfloat16, up or down by chance: the mean over seeds is the value itself.

    The chance is 16 bits of element start + i of the stream of `counter`. Overflow becomes infinity, as
    rounding to nearest has it.
    """
    first_word, skip = divmod(start, 2)
    chance = word_range(counter, first_word, -(-(skip + len(values)) // 2), values.device).view(torch.int16)
    chance = chance[skip : skip + len(values)].int().bitwise_and_(0xFFFF)
    if dtype == torch.bfloat16:  # the upper half of the bits, with a carry from the lower half by chance
        return chance.add_(values.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(dtype)
    nearest = values.to(dtype)
    error = values - nearest.float()
    nearest = torch.where(nearest == 0, torch.copysign(torch.zeros_like(nearest), error.to(dtype)), nearest)
    bits = nearest.view(torch.int16)
    outward = (error < 0) == (bits < 0)
    neighbour = (bits + torch.where(outward, 1, -1).to(torch.int16)).view(dtype)
    crosses = (chance.float() + 0.5) / 65536 * (neighbour.float() - nearest.float()).abs() < error.abs()
    return torch.where(crosses & (error != 0) & neighbour.isfinite(), neighbour, nearest)
