"""The zeroth-order engine: directions are pure functions, nothing drifts, the step is the formula."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_model
from support.references import gaussian, loss_at, perturbed, some_examples
from torch import nn

from cli.validation import find_method
from lora import LoRA
from scoring import logprobs, packing
from utils import UsageError
from zo import counter_rng
from zo.methods import LOZO, Method
from zo.optimizer import NonFiniteLoss, StepCounts, ZerothOrder
from zo.rng_kernels import DirectionSource
from zo.trajectory import Trajectory


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


def test_a_loss_that_is_a_parameter_itself_is_perturbed():
    p = nn.Parameter(torch.tensor(2.0))
    engine = ZerothOrder([p], lr=0.0, eps=0.5, master=False)
    z = engine.directions.z(engine.blocks[0], 0).item()
    assert engine.losses_at([(0, 1.0), (0, -1.0)], lambda: p) == pytest.approx([2 + z / 2, 2 - z / 2])


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
        z = gaussian((9, step, 0), 0, 50)
        plus, minus = (((theta + s * 1e-3 * z - target) ** 2).sum().item() for s in (1, -1))
        g = max(-30.0, min(30.0, (plus - minus) / 2e-3))
        mean_square = 0.98 * mean_square + 0.02 * g * g
        g /= math.sqrt(mean_square / (1 - 0.98 ** (step + 1)))
        theta = theta - 0.01 * (g * z + 0.1 * theta)
        loss = engine.step(closure)
        assert math.isclose(loss, (plus + minus) / 2, rel_tol=1e-5)
        assert torch.allclose(p, theta, atol=1e-5)


def test_the_mean_update_over_directions_is_the_gradient_step():
    """On a quadratic with known gradient; a wrong sign or scale of g, ε or η can't pass."""
    torch.manual_seed(1)
    curvature, theta = torch.rand(6) + 0.5, torch.randn(6)
    gradient, moves, n = curvature * theta, [], 1500
    p = nn.Parameter(theta.clone())
    engine = ZerothOrder([p], lr=0.1, eps=1e-3)
    for _ in range(n):
        p.data.copy_(theta)
        engine.step(lambda: (curvature.double() * p.double() ** 2).sum() / 2)
        moves.append(p.detach() - theta)
    moves = torch.stack(moves).double()
    error = moves.std(0) / math.sqrt(n)
    assert ((moves.mean(0) + 0.1 * gradient).abs() < 4.5 * error + 1e-6).all()
    assert (error < 0.08 * 0.1 * gradient.norm()).all()


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
    before = p.detach().clone()
    for bad in (math.nan, math.inf):
        engine.step(lambda bad=bad: bad)
        assert torch.equal(p, before)
    assert engine.counts == StepCounts(step=3, skipped=2, in_a_row=2)
    engine.step(lambda: (p**2).sum())
    assert not torch.equal(p, before) and engine.counts.in_a_row == 0


def test_fifty_non_finite_losses_in_a_row_stop_the_run():
    p = nn.Parameter(torch.ones(4))
    engine = ZerothOrder([p], lr=0.1, eps=1e-2)
    with pytest.raises(NonFiniteLoss, match="50 steps in a row"):
        for _ in range(60):
            engine.step(lambda: math.nan)
    assert engine.counts.step == 50 and torch.equal(p, torch.ones(4))


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
    engine = ZerothOrder([p], lr=1.0, eps=1e-3, master=True)
    sign = 1 if gaussian((0, 0, 0), 0, 1).item() > 0 else -1
    for _ in range(10):
        engine.counts.step = 0  # the same z each time
        engine.losses = [sign * 1e-8, -sign * 1e-8]  # g = ±1e-5
        engine.step()
    moved = engine.blocks[0].param - 1
    expected = -sign * 10 * 1e-5 * gaussian((0, 0, 0), 0, 100)
    assert torch.allclose(moved, expected, rtol=0.02, atol=2e-6)


def test_an_eps_that_is_no_step_is_refused():
    for eps in (0.0, -1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps"):
            ZerothOrder([nn.Parameter(torch.ones(1))], eps=eps)


def test_weights_without_storage_are_refused():
    with pytest.raises(ValueError, match="meta"):
        ZerothOrder(nn.Linear(2, 2, device="meta"))


# ---- full parameters: nothing perturbed, nothing copied ----


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("chunk_size", [700, 1 << 18])
def test_streamed_losses_equal_those_of_perturbed_weights(family, distribution, chunk_size, monkeypatch):
    monkeypatch.setattr(counter_rng, "CHUNK_SIZE", chunk_size)
    model = tiny_model(family)
    engine = ZerothOrder(model, eps=1e-2, seed=3, queries=2, distribution=distribution, master=False)
    batch = packing.pack(some_examples())
    closure = partial(logprobs.loss, model, batch, True)
    points = engine.method.points()
    params = list(model.parameters())
    expected = [loss_at(params, perturbed(model, engine, q, s * 1e-2), closure) for q, s in points]
    for copies in (1, 2, 4):
        engine.losses = [0.0] * 4
        engine.estimate(closure, copies=copies)
        assert engine.losses == pytest.approx(expected, rel=2e-6), copies
    assert not engine.forward_per_point  # copies were not given up


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streamed_losses_in_half_precision_are_those_of_rounded_weights(dtype):
    model = tiny_model("llama", dtype=dtype)
    engine = ZerothOrder(model, eps=1e-2, master=False)
    closure = a_loss(model)
    params = list(model.parameters())
    expected = [loss_at(params, perturbed(model, engine, 0, s * 1e-2), closure) for s in (1, -1)]
    engine.estimate(closure)
    assert engine.losses == pytest.approx(expected, rel=1e-3)


class Odd(nn.Module):
    """Parameters that are used in ways of their own: fused attention, a scalar, stacked in a list."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.experts = nn.ParameterList([nn.Parameter(torch.randn(16)) for _ in range(3)])

    def forward(self, x, copies=1):
        y, _ = self.attention(x, x, x, need_weights=False)
        y = y * self.temperature * torch.stack(list(self.experts)).sum(0)
        return y.square().unflatten(0, (copies, -1)).mean((1, 2, 3))


def test_parameters_used_in_their_own_way_are_perturbed_too():
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(3, 6, 16)
    engine = ZerothOrder(model, eps=1e-2, master=False)
    closure = lambda copies=1: model(x.repeat(copies, 1, 1), copies)  # noqa: E731
    params = list(model.parameters())
    expected = [loss_at(params, perturbed(model, engine, 0, s * 1e-2), closure) for s in (1, -1)]
    engine.estimate(closure)
    assert engine.losses == pytest.approx(expected, rel=1e-5)
    engine.losses = [0.0, 0.0]
    # Inside this attention tokens come first: the copies are given up, and the losses are right.
    engine.estimate(closure, copies=2)
    assert engine.losses == pytest.approx(expected, rel=1e-5) and engine.forward_per_point


class Routed(nn.Module):
    """Half of the tokens go to each of two experts: what an expert sees is no batch of copies."""

    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Linear(16, 16), nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x, copies=1):
        x, y = self.first(x), torch.zeros_like(x)
        order = x[..., 0].flatten().argsort()
        for expert, chosen in zip(self.experts, order.chunk(2), strict=True):
            y.view(-1, 16)[chosen] = expert(x.view(-1, 16)[chosen])
        return y.square().unflatten(0, (copies, -1)).mean((1, 2, 3))


UNSPLITTABLE = {
    "experts": lambda model, x, n: model(x.repeat(n, 1, 1), n),
    "a penalty": lambda model, x, n: model(x.repeat(n, 1, 1), n) + model.first.bias.square().sum(),
    "nothing of the batch": lambda model, x, n: model.first.bias.square(),
}


@pytest.mark.parametrize("kind", UNSPLITTABLE)
def test_where_copies_can_t_be_told_apart_each_point_has_a_forward(kind, caplog):
    torch.manual_seed(0)
    model, x = Routed().eval(), torch.randn(4, 6, 16)
    engine = ZerothOrder(model, eps=1e-2, master=False)

    def closure(copies=1):
        return UNSPLITTABLE[kind](model, x, copies).mean(0 if copies == 1 else ())

    params = list(model.parameters())
    expected = [loss_at(params, perturbed(model, engine, 0, s * 1e-2), closure) for s in (1, -1)]
    for _ in range(2):
        engine.losses = [0.0, 0.0]
        engine.estimate(closure, copies=2)
        assert engine.losses == pytest.approx(expected, rel=1e-5) and engine.forward_per_point
    assert len(caplog.records) == 1


def test_adapted_experts_have_a_forward_for_each_point(caplog):
    torch.manual_seed(0)
    model, x = Routed().eval(), torch.randn(4, 6, 16)
    model.config = SimpleNamespace(model_type="routed")
    lora = LoRA(model, 2, 16, targets=["experts.0", "experts.1"])
    for module in lora.lora_modules:
        module.lora_B.data.normal_()
    engine = ZerothOrder(model, eps=1e-2, master=True, set_perturbations=lora.set_perturbations)
    found = []
    for copies in (1, 2):
        engine.losses = [0.0, 0.0]
        engine.estimate(lambda copies=1: model(x.repeat(copies, 1, 1), copies), copies=copies)
        found.append(engine.losses)
    assert found[0] == found[1] and engine.forward_per_point and len(caplog.records) == 1


def test_no_second_copy_and_no_large_temporary(monkeypatch):
    """Every tensor that a step makes is a small part of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4000, 256), nn.Linear(256, 4000), nn.Linear(4000, 1))
    ids, largest = torch.arange(8)[None], [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view and out._base is None:
                largest[0] = max(largest[0], out.numel())
            return out

    engine = ZerothOrder(model, lr=1e-3, eps=1e-2, master=False)
    monkeypatch.setattr(counter_rng, "CHUNK_SIZE", 1 << 14)
    with Watch():
        engine.step(lambda: model(ids).mean())
    assert largest[0] <= 0.02 * sum(p.numel() for p in model.parameters())


STEPS_AT_RATE_0 = [(torch.float32, 100), (torch.float16, 100), (torch.bfloat16, 1000)]


@pytest.mark.parametrize(("dtype", "steps"), STEPS_AT_RATE_0)
def test_a_thousand_steps_at_rate_0_change_no_bit(dtype, steps):
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8).to(dtype), torch.randn(2, 8, dtype=dtype)
    before = bits(model)
    engine = ZerothOrder(model, lr=0.0, eps=1e-2, master=False)
    for _ in range(steps):
        engine.step(lambda: model(x).float().square().mean())
    assert same(bits(model), before) and engine.projected_grad != 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_updates_without_a_master_are_right_in_the_mean(dtype):
    """Updates far below the spacing of the weights: rounding to nearest loses them, chance does not."""
    start, g = torch.linspace(0.5, 2, 64).to(dtype), torch.finfo(dtype).eps / 8
    moves, zs = [], []
    for step in range(400):
        p = nn.Parameter(start.clone())
        engine = ZerothOrder([p], lr=1.0, eps=1e-3, seed=7, master=False)
        engine.counts.step = step
        engine.losses = [g * 1e-3, -g * 1e-3]
        zs.append(engine.directions.z(engine.blocks[0], 0))
        engine.step()
        moves.append(p.detach().float() - start.float())
    moves, zs = torch.stack(moves), torch.stack(zs)
    assert abs((moves * zs).sum() / zs.square().sum() + g) < 0.1 * g  # the slope of the moves along z
    assert ((start.float() - g).to(dtype) == start).all()  # to nearest all of it would be lost


# ---- methods, optimizers, copies ----


@pytest.mark.parametrize("queries", [1, 3])
def test_copies_of_adapters_equal_one_forward_a_point(family, queries):
    for freeze_a in (False, True):
        model = tiny_model(family)
        lora = LoRA(model, 2, 16, seed=1, freeze_a=freeze_a)
        for module in lora.lora_modules:
            module.lora_B.data.normal_()
        options = {"master": True, "set_perturbations": lora.set_perturbations}
        engine = ZerothOrder(model, eps=1e-2, queries=queries, **options)
        closure = partial(logprobs.loss, model, packing.pack(some_examples()), True)
        found = []
        for copies in (1, 2, 2 * queries):
            engine.losses = [0.0] * (2 * queries)
            engine.estimate(closure, copies=copies)
            found.append(engine.losses)
        assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)
        assert all(module.deltas is None for module in lora.lora_modules)


def test_queries_are_averaged():
    target, theta = torch.arange(5.0), torch.zeros(5)
    p = nn.Parameter(theta.clone())
    engine = ZerothOrder([p], lr=0.1, eps=1e-3, seed=2, queries=3)
    engine.step(lambda: ((p - target) ** 2).sum())
    for query in range(3):
        z = gaussian((2, 0, query), 0, 5)
        plus, minus = (((s * 1e-3 * z - target) ** 2).sum() for s in (1, -1))
        theta = theta - 0.1 * (plus - minus) / 2e-3 * z / 3
    assert torch.allclose(p, theta, rtol=1e-3)


def test_a_query_that_is_not_finite_is_left_out():
    p = nn.Parameter(torch.ones(5))
    engine = ZerothOrder([p], lr=0.1, eps=1e-3, seed=2, queries=2)
    engine.losses = [math.nan, 1.0, 2.0, 1.0]
    engine.step()
    z = gaussian((2, 0, 1), 0, 5)
    assert torch.allclose(p, 1 - 0.1 * 500 / 2 * z) and engine.counts.skipped == 1
    assert math.isnan(engine.trajectory.coefficients[0][0]) and engine.trajectory.coefficients[0][1] == 25


def test_signs_as_directions():
    p = nn.Parameter(torch.zeros(40))
    engine = ZerothOrder([p], lr=1.0, eps=1e-3, distribution="rademacher")
    engine.losses = [1e-3, -1e-3]
    engine.step()
    assert torch.allclose(p.abs(), torch.ones(40))


@pytest.mark.parametrize("optim", ["momentum", "adamw"])
def test_torch_optimizers_take_the_estimate_as_a_gradient(optim):
    torch.manual_seed(0)
    target, p = torch.randn(9), nn.Parameter(torch.zeros(9))
    plain = nn.Parameter(torch.zeros(9))
    kind, more = {"momentum": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}[optim]
    other = kind([plain], lr=0.01, weight_decay=0.1, **more)
    options = {"lr": 0.01, "eps": 1e-3, "master": True, "optim": optim, "normalize": True}
    engine = ZerothOrder([p], weight_decay=0.1, **options)
    for step in range(6):
        engine.step(lambda: ((p - target) ** 2).sum())
        plain.grad = gaussian((0, step, 0), 0, 9) * engine.trajectory.coefficients[step][0]
        other.step()
        assert torch.allclose(p, plain, atol=1e-6)
    state = copy.deepcopy(engine.state_dict())
    again = ZerothOrder([nn.Parameter(p.detach().clone())], **options)
    again.load_state_dict(state)
    q = again.blocks[0].params[0]
    engine.step(lambda: ((p - target) ** 2).sum())
    again.step(lambda: ((q - target) ** 2).sum())
    assert torch.equal(p, q)
    engine.restart()
    assert not engine.weights.torch_optimizer.state


def test_an_optimizer_with_state_needs_a_master():
    with pytest.raises(ValueError, match="master"):
        ZerothOrder(nn.Linear(3, 3), optim="adamw")


def test_low_rank_directions_are_of_low_rank_and_lazily_drawn():
    model = nn.Linear(30, 20)
    method = LOZO()
    engine = ZerothOrder(model, lr=0.1, eps=1e-3, method=method, master=False)
    weight, bias = engine.blocks
    seen = []
    for step in (0, 1, 49, 50):
        engine.counts.step = step
        z = engine.directions.z(weight, 0)
        assert torch.linalg.matrix_rank(z) == 2
        assert torch.allclose(engine.directions.z_rows(weight, 0, range(5, 9)), z[5:9])
        seen.append(torch.linalg.svd(z)[2][:2])
        assert engine.directions.z(bias, 0).unique().numel() > 10
    spans = [torch.linalg.matrix_rank(torch.cat([seen[0], other]), tol=1e-4) for other in seen]
    assert spans == [2, 2, 2, 4]
    sources = [DirectionSource(seed) for seed in range(300)]
    z = torch.stack([LOZO().direction(source, weight, 0, 0, range(20), "cpu") for source in sources])
    assert abs(z.var() - 1) < 0.05 and abs(z.mean()) < 0.02


def test_a_method_is_a_few_lines():
    class OneSided(Method):
        def points(self):
            return [(0, 0.0), *((q, 1.0) for q in range(self.queries))]

        def projected(self, losses, eps):
            return [(loss - losses[0]) / eps for loss in losses[1:]]

    p, target = nn.Parameter(torch.zeros(6)), torch.arange(6.0)
    engine = ZerothOrder([p], lr=0.01, eps=1e-4, method=OneSided(4))
    for _ in range(400):
        engine.step(lambda: ((p.double() - target) ** 2).sum())
    assert torch.allclose(p, target, atol=0.1)


def test_a_method_of_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from zo import Method\nclass Mine(Method):\n    replayable = False\nclass Other: pass\n")
    assert find_method(f"{path}:Mine").replayable is False and find_method("lozo") is LOZO
    for name in ("nothing", f"{path}:Other", f"{path}:None", "no.py:Mine"):
        with pytest.raises(UsageError, match="--zo_method"):
            find_method(name)


# ---- a run as a file ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_replay_has_the_bits_of_the_run(tmp_path, dtype, master, decay):
    def fresh():
        model = tiny_model("opt", dtype=dtype)
        return model, ZerothOrder(
            model, 1e-3, 1e-2, seed=5, normalize=True, queries=2, master=master, weight_decay=decay
        )

    model, engine = fresh()
    schedule = torch.optim.lr_scheduler.LinearLR(engine, 1.0, 0.1, 8)
    states = []
    for step in range(8):
        engine.step(lambda: math.nan) if step == 3 else engine.step(a_loss(model))
        schedule.step()
        states.append(bits(model))
    engine.trajectory.save(tmp_path / "t.safetensors", note="x")
    trajectory = Trajectory.load(tmp_path / "t.safetensors")
    assert trajectory.about["note"] == "x" and all(map(math.isnan, trajectory.coefficients[3]))
    again, other = fresh()
    other.replay(trajectory, range(5))
    assert same(bits(again), states[4])
    other.replay(trajectory, range(5, 8))
    assert same(bits(again), states[7])


def test_20000_steps_are_less_than_100_kilobytes(tmp_path):
    p = nn.Parameter(torch.zeros(1))
    engine = ZerothOrder([p], lr=0.1, eps=1e-3)
    for _ in range(20000):
        engine.trajectory.append([[0.1]], [0.1], keep_rate=False)
    engine.trajectory.save(tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").stat().st_size < 100_000


def test_what_is_no_trajectory_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"rubbish")
    for path in (tmp_path / "x", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not a trajectory"):
            Trajectory.load(path)
    engine = ZerothOrder(
        [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))], "lr": 1.0}]
    )
    engine.losses = [1.0, 2.0]
    engine.step()
    other = ZerothOrder([{"params": [p]} for group in engine.param_groups for p in group["params"]])
    other.load_state_dict(engine.state_dict())
    for made in (engine, other):
        with pytest.raises(ValueError, match="learning rates of their own"):
            made.trajectory.save(tmp_path / "y")


# ---- alone, without the Trainer ----


def linear():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(8, 4)
    return layer, lambda: layer(x).square().mean()


@pytest.mark.parametrize("master", [True, False])
def test_what_requires_no_gradient_is_not_trained(master):
    layer, loss = linear()
    layer.weight.requires_grad_(False)
    before = bits(layer)
    ZerothOrder(layer.parameters(), lr=0.1, eps=1e-2, master=master).step(loss)
    assert [torch.equal(a, b) for a, b in zip(bits(layer), before, strict=True)] == [True, False]


def test_going_back_to_a_state_forgets_the_step_at_hand():
    ends = []
    for disturbed in (False, True):
        layer, loss = linear()
        engine = ZerothOrder(layer, lr=0.1, eps=1e-2, master=True)
        engine.step(loss)
        weights, state = copy.deepcopy(layer.state_dict()), copy.deepcopy(engine.state_dict())
        if disturbed:
            engine.step(loss)
            engine.estimate(loss)  # no step follows
        layer.load_state_dict(weights)
        engine.load_state_dict(state)
        engine.step(loss)
        ends.append(bits(layer))
    assert same(*ends)


def test_a_replay_can_be_gone_on_from():
    (one, loss_of_one), (two, loss_of_two) = linear(), linear()
    whole, part = (ZerothOrder(layer, lr=0.1, eps=1e-2) for layer in (one, two))
    for _ in range(5):
        whole.step(loss_of_one)
    part.replay(whole.trajectory, range(3))
    for _ in range(2):
        part.step(loss_of_two)
    assert same(bits(one), bits(two)) and part.trajectory.coefficients == whole.trajectory.coefficients


@pytest.mark.parametrize("master", [True, False])
def test_a_group_that_is_added_later_is_trained(master):
    layer, loss = linear()
    engine = ZerothOrder([layer.bias], lr=0.1, eps=1e-2, master=master)
    before = bits(layer)
    engine.step(loss)
    engine.add_param_group({"params": [layer.weight]})
    assert torch.equal(layer.weight, before[0])
    engine.step(loss)
    assert not any(torch.equal(a, b) for a, b in zip(bits(layer), before, strict=True))


def test_a_methods_own_state_is_part_of_a_state():
    class Anchored(Method):
        """g minus a running mean of g."""

        mean = 0.0

        def projected(self, losses, eps):
            (g,) = super().projected(losses, eps)
            self.mean = 0.9 * self.mean + 0.1 * g
            return [g - self.mean]

    ends = []
    for resumed in (False, True):
        layer, loss = linear()
        engine = ZerothOrder(layer, lr=0.1, eps=1e-2, method=Anchored())
        for _ in range(3):
            engine.step(loss)
        if resumed:
            state = copy.deepcopy(engine.state_dict())
            engine = ZerothOrder(layer, lr=0.1, eps=1e-2, method=Anchored())
            engine.load_state_dict(state)
        engine.step(loss)
        ends.append(bits(layer))
    assert same(*ends)
