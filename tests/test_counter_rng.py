"""Directions are pure functions of a counter, with the statistics of what they stand for."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from support.references import gaussian

from zo import counter_rng
from zo.counter_rng import direction_range, direction_rows, stochastic_round

N = 1 << 20


def test_directions_are_standard_normal():
    z = gaussian((0, 0), 0, N).double()
    assert abs(z.mean()) < 5 / math.sqrt(N)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / N)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / N)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / N)
    grain_of_table = 1 / 65536
    assert kstest(z.numpy(), "norm").statistic < 1.95 / math.sqrt(N) + grain_of_table  # 0.1 % level


def test_directions_do_not_correlate_across_elements_steps_and_seeds():
    z = gaussian((0, 0), 0, N).double()
    others = {f"lag {lag}": torch.roll(z, lag) for lag in (1, 2, 3, 16, 64, 768, 4096)}
    others |= {f"step {s}": gaussian((0, s), 0, N).double() for s in (1, 2, 3, 1000)}
    others |= {f"seed {s}": gaussian((s, 0), 0, N).double() for s in (1, 2, 42)}
    for name, other in others.items():
        for power in (1, 2):
            a, b = z**power - (power - 1), other**power - (power - 1)
            assert abs((a * b).mean() / (a.std() * b.std())) < 5 / math.sqrt(N), (name, power)


def test_directions_over_steps_are_standard_normal_at_one_element():
    values = torch.stack([gaussian((7, step), 123, 8) for step in range(4000)]).double()
    for column in values.T:
        assert kstest(column.numpy(), "norm").pvalue > 1e-4
    assert (torch.corrcoef(values.T) - torch.eye(8)).abs().max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("start", [0, 1, 2, 12345, (1 << 31) - 3, (1 << 33) + 1])
def test_any_block_of_a_direction_is_the_same_numbers(start, monkeypatch):
    whole = gaussian((3, 4), start, 5001)
    assert torch.equal(gaussian((3, 4), start + 17, 1000), whole[17:1017])
    monkeypatch.setattr(counter_rng, "CHUNK_SIZE", 64)
    assert torch.equal(gaussian((3, 4), start, 5001), whole)


def test_directions_are_these_bits_on_every_machine():
    head = (gaussian((42, 7), 0, 6).double() * 2**19).long().tolist()
    assert head == [328516, -1106768, 187862, -303220, 1129568, 487222]


def test_no_table_entry_lies_near_a_rounding_boundary():
    """A libm may differ in its last bits; an entry moves only if a value lies within that of half a step."""
    from statistics import NormalDist

    upper = [NormalDist().inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)]
    scale = math.sqrt(32768 / math.fsum(x * x for x in upper))
    distance = np.abs(np.array(upper) * scale * 2**19 % 1 - 0.5).min()
    assert distance > 1e-7  # an error of 1e-13 of a value moves it by less than 1e-6 · 1e-13 · 2^19


@pytest.mark.parametrize("name", counter_rng.DISTRIBUTIONS)
@pytest.mark.parametrize("start", [0, 5, (1 << 31) - 30, (1 << 35) - 30])
def test_rows_are_those_of_the_whole_matrix(name, start):
    whole = direction_range(name, (3, 4), start, 7 * 9).view(7, 9)
    index = torch.tensor([6, 0, 3, 3])
    assert torch.equal(direction_rows(name, (3, 4), start, 9, index), whole[index])
    assert torch.equal(direction_range(name, (3, 4), start + 11, 20), whole.flatten()[11:31])


def test_signs_are_fair_and_independent():
    z = direction_range("rademacher", (0, 0), 0, N)
    assert set(z.unique().tolist()) == {-1.0, 1.0} and abs(z.mean()) < 5 / math.sqrt(N)
    for lag in (1, 2, 8, 31, 32, 64, 768):
        assert abs((z * z.roll(lag)).mean()) < 5 / math.sqrt(N), lag
    for other in (direction_range("rademacher", (0, 1), 0, N), direction_range("rademacher", (1, 0), 0, N)):
        assert abs((z * other).mean()) < 5 / math.sqrt(N)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_is_right_in_the_mean(dtype):
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1.0, -2.0, 1e-9, -1e-9, 7e4, 1e-6])
    values = torch.cat([torch.randn(400) * 0.02, special])
    drawn = torch.stack([stochastic_round(values, dtype, (0, s), 7).double() for s in range(3000)])
    near = values.to(dtype)
    exact = near.float() == values
    assert torch.equal(drawn[0, exact], values[exact].double())
    kept = torch.isfinite(near)
    low, high = drawn.min(0).values, drawn.max(0).values
    assert ((low <= values.double()) & (values.double() <= high))[kept].all()
    spacing = (high - low).clamp_min(1e-12)
    error = (drawn.mean(0) - values.double()).abs() / spacing
    assert (error[kept & ~exact] < 5 * 0.5 / math.sqrt(3000) + 1 / 65536).all()
    assert torch.equal(stochastic_round(values[100:], dtype, (0, 3), 107), drawn[3, 100:].to(dtype))
