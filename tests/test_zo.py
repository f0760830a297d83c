"""The zeroth-order engine: directions are pure functions, nothing drifts, the step is the formula."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from scipy.stats import kstest
from torch import nn

import zo
from zo import NonFiniteLoss, ZerothOrder, gaussian

N = 1 << 20


def test_directions_are_standard_normal():
    z = gaussian((0, 0), 0, N).double()
    assert abs(z.mean()) < 5 / math.sqrt(N)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / N)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / N)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / N)
    assert kstest(z.numpy(), "norm").statistic < 1.95 / math.sqrt(N) + 1 / 65536  # 0.1 % level, and the table's grain


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
    monkeypatch.setattr(zo, "BLOCK", 64)
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


def test_no_global_generator_is_touched():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = tiny_model("opt")
    ZerothOrder(model, lr=1e-3, eps=1e-2).step(lambda: next(model.parameters()).float().sum())
    assert torch.equal(torch.rand(3), expected)


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def a_loss(model):
    ids = torch.arange(20)[None] % 7
    return lambda: model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_learning_rate_0_changes_no_bit(dtype):
    model = tiny_model("llama", dtype=dtype)
    before = bits(model)
    engine = ZerothOrder(model, lr=0.0, eps=1e-2)
    for _ in range(20):
        engine.step(a_loss(model))
    assert math.isfinite(engine.projected_grad) and engine.projected_grad != 0
    assert same(bits(model), before)


def test_an_exception_between_the_forwards_leaves_the_weights():
    model = tiny_model("gpt2")
    before, calls = bits(model), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return a_loss(model)()

    with pytest.raises(KeyboardInterrupt):
        ZerothOrder(model, lr=1.0, eps=1e-2).step(closure)
    assert same(bits(model), before)


def test_a_step_is_the_formula():
    """θ ← θ − η (g z + λθ) on plain tensors, with clip and normaliser, over several steps."""
    torch.manual_seed(0)
    target = torch.randn(50)
    p = nn.Parameter(torch.zeros(50))
    closure = lambda: ((p - target) ** 2).sum()  # noqa: E731
    engine = ZerothOrder([p], lr=0.01, eps=1e-3, seed=9, weight_decay=0.1, clip=30.0, normalize=True)
    theta, mean_square = torch.zeros(50), 0.0
    for step in range(5):
        z = gaussian((9, step), 0, 50)
        plus, minus = (((theta + s * 1e-3 * z - target) ** 2).sum().item() for s in (1, -1))
        g = max(-30.0, min(30.0, (plus - minus) / 2e-3))
        mean_square = 0.98 * mean_square + 0.02 * g * g
        g /= math.sqrt(mean_square / (1 - 0.98 ** (step + 1)))
        theta = theta - 0.01 * (g * z + 0.1 * theta)
        loss = engine.step(closure)
        assert math.isclose(loss, (plus + minus) / 2, rel_tol=1e-5)
        assert torch.allclose(p, theta, atol=1e-5)


def test_the_mean_update_over_seeds_is_the_gradient_step():
    """On a quadratic with known gradient; a wrong sign or scale of g, ε or η can't pass."""
    torch.manual_seed(1)
    curvature, theta0 = torch.rand(6) + 0.5, torch.randn(6)
    gradient, moves, n = curvature * theta0, [], 4000
    for seed in range(n):
        p = nn.Parameter(theta0.clone())
        ZerothOrder([p], lr=0.1, eps=1e-3, seed=seed).step(lambda p=p: (curvature.double() * p.double() ** 2).sum() / 2)
        moves.append(p.detach() - theta0)
    moves = torch.stack(moves).double()
    error = moves.std(0) / math.sqrt(n)
    assert ((moves.mean(0) + 0.1 * gradient).abs() < 4.5 * error + 1e-6).all()
    assert (error < 0.05 * 0.1 * gradient.norm()).all()


def test_500_steps_bring_a_quadratic_down():
    p = nn.Parameter(torch.ones(10))
    engine = ZerothOrder([p], lr=0.02, eps=1e-3)
    losses = [engine.step(lambda: (p**2).sum()) for _ in range(500)]
    assert losses[0] > 9 and losses[-1] < 1e-2


def test_ten_lines_of_plain_pytorch_train_a_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long()
    engine = ZerothOrder(model, lr=3e-2, eps=1e-2, seed=0)
    schedule = torch.optim.lr_scheduler.LinearLR(engine, 1.0, 0.1, 300)
    for _ in range(300):
        loss = engine.step(lambda: nn.functional.cross_entropy(model(x), y))
        schedule.step()
    assert loss < 0.35
    assert math.isclose(engine.param_groups[0]["lr"], 3e-3)


def test_micro_batches_with_one_z_equal_the_big_batch():
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model, data = nn.Linear(5, 1), torch.randn(8, 5)
        engine = ZerothOrder(model, lr=0.1, eps=1e-2)
        for _ in range(3):
            for rows in data.chunk(parts):
                engine.estimate(lambda m=model, rows=rows: (m(rows) ** 2).mean(), 1 / parts)
            engine.step()
        results.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.allclose(*results, atol=1e-6)


def test_a_non_finite_loss_is_skipped_and_counted():
    p = nn.Parameter(torch.ones(4))
    engine = ZerothOrder([p], lr=0.1, eps=1e-2, normalize=True)
    engine.step(lambda: (p**2).sum())
    before, scalars = p.detach().clone(), dict(engine.scalars)
    for bad in (math.nan, math.inf):
        engine.step(lambda bad=bad: bad)
        assert torch.equal(p, before)
    assert engine.scalars == {**scalars, "step": 3, "skipped": 2, "in_a_row": 2}
    engine.step(lambda: (p**2).sum())
    assert not torch.equal(p, before) and engine.scalars["in_a_row"] == 0


def test_fifty_non_finite_losses_in_a_row_stop_the_run():
    p = nn.Parameter(torch.ones(4))
    engine = ZerothOrder([p], lr=0.1, eps=1e-2)
    with pytest.raises(NonFiniteLoss, match="50 steps in a row"):
        for _ in range(60):
            engine.step(lambda: math.nan)
    assert engine.scalars["step"] == 50 and torch.equal(p, torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(dtype):
    def fresh():
        model = tiny_model("qwen2", dtype=dtype)
        return model, ZerothOrder(model, lr=1e-3, eps=1e-2, seed=3, normalize=True)

    model, engine = fresh()
    for _ in range(6):
        engine.step(a_loss(model))
    first, first_engine = fresh()
    for _ in range(3):
        first_engine.step(a_loss(first))
    second, second_engine = fresh()
    second.load_state_dict(first.state_dict())
    second_engine.load_state_dict(first_engine.state_dict())
    for _ in range(3):
        second_engine.step(a_loss(second))
    assert same(bits(second), bits(model))


def test_updates_too_small_for_bf16_are_not_lost():
    """The fp32 master moves by many updates of a thousandth of bf16's spacing, and then the weight does."""
    p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    engine = ZerothOrder([p], lr=1.0, eps=1e-3)
    sign = 1 if gaussian((0, 0), 0, 1).item() > 0 else -1
    for _ in range(10):
        engine.estimate(lambda: 0.0)
        engine.losses = [sign * 1e-8, -sign * 1e-8]  # g = ±1e-5
        engine.scalars["step"] = 0  # the same z each time
        engine.step()
    moved = engine.blocks[0].master - 1
    expected = -sign * 10 * 1e-5 * gaussian((0, 0), 0, 100)
    assert torch.allclose(moved, expected, rtol=0.02, atol=2e-6)


def test_an_eps_that_is_no_step_is_refused():
    for eps in (0.0, -1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps"):
            ZerothOrder([nn.Parameter(torch.ones(1))], eps=eps)


def test_weights_without_storage_are_refused():
    with pytest.raises(ValueError, match="meta"):
        ZerothOrder(nn.Linear(2, 2, device="meta"))
