"""The diagnosis of eps, learning rate and precision: measured values against known ones."""

import pytest
import torch
from torch import nn

from zo import ZerothOrder
from zo.diagnostics import diagnose, recommendations


def test_a_diagnosis_knows_a_quadratic():
    """f = ½ Σ h x² with known trace, gradient and largest rate; exact in float64."""
    torch.manual_seed(0)
    h, x = torch.rand(40).double() + 0.5, torch.randn(40)
    p = nn.Parameter(x.clone())
    engine = ZerothOrder([p], lr=1e-3, eps=1e-2, seed=4)
    diagnosis = diagnose(engine, lambda: (h * p.double() ** 2).sum() / 2, directions=600)
    gradient = h * x
    square = gradient.square()
    expected = 2 * square.sum() / (square.sum() * h.sum() + 2 * (h * square).sum())
    assert diagnosis.trace == pytest.approx(h.sum().item(), rel=0.05)
    assert diagnosis.g == pytest.approx(gradient.norm().item(), rel=0.05)
    assert diagnosis.largest_lr == pytest.approx(expected.item(), rel=0.1)
    assert diagnosis.noise_share < 1e-3 and diagnosis.nonlinearity < 1e-3
    assert diagnosis.forwards == 1 + 6 * 600
    assert torch.equal(p, x) and engine.counts.step == 0
    assert "fit" in recommendations(diagnosis, engine)[-1]
    engine.param_groups[0]["lr"] = 10.0
    assert any("learning rate 10 is above" in line for line in recommendations(diagnosis, engine))


@pytest.mark.parametrize("grain", [2e-3, 4e-3])
def test_a_diagnosis_finds_rounding_and_an_eps_that_drowns_in_it(grain):
    p = nn.Parameter(torch.linspace(-1, 1, 50))

    def coarse():
        return ((p.double() - 0.3) ** 2).sum() + grain * torch.sin(p.double() * 1e8).sum() / 5

    diagnosis = diagnose(ZerothOrder([p], eps=1e-4), coarse, directions=40)
    assert 0.5 < diagnosis.noise / grain < 2 and diagnosis.noise_share > 0.5
    assert any("drowns" in line for line in recommendations(diagnosis, ZerothOrder([p], eps=1e-4)))
    low, _ = diagnosis.eps
    good = diagnose(ZerothOrder([p], eps=2 * low), coarse, directions=40)
    assert good.noise_share < 0.25


def test_a_diagnosis_finds_an_eps_that_leaves_the_linear_range():
    p = nn.Parameter(torch.zeros(50))
    engine = ZerothOrder([p], eps=1.0)
    diagnosis = diagnose(engine, lambda: torch.sin(p.double() + 0.3).sum(), directions=40)
    assert diagnosis.nonlinearity > 0.2
    engine = ZerothOrder([p], eps=diagnosis.eps[1])
    inside = diagnose(engine, lambda: torch.sin(p.double() + 0.3).sum(), directions=40)
    assert inside.nonlinearity < 0.15


def test_a_diagnosis_tells_a_rounding_drift():
    p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    engine = ZerothOrder([p], lr=1e-7, eps=1e-2, master=False)
    diagnosis = diagnose(engine, lambda: (p.float() ** 2).sum())
    assert diagnosis.rounding_drift > 10
    assert any("adapters" in line for line in recommendations(diagnosis, engine))


def test_a_diagnosis_leaves_the_step_at_hand_alone():
    p = nn.Parameter(torch.linspace(-1, 1, 50))
    engine = ZerothOrder([p], lr=1e-2, eps=1e-3, master=True)
    loss = lambda: ((p.double() - 0.3) ** 2).sum()  # noqa: E731
    engine.estimate(loss)
    before = engine.state_dict(), list(engine.losses), p.detach().clone()
    z = engine.directions.z(engine.blocks[0], 0)
    diagnose(engine, loss)
    assert engine.state_dict() == before[0] and engine.losses == before[1] and torch.equal(p, before[2])
    assert engine.directions.z(engine.blocks[0], 0) is z


def test_a_loss_that_does_not_move_is_refused():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"does not move at all with eps 0\.001: give a larger eps"):
        diagnose(ZerothOrder([p]), lambda: 1.0)
