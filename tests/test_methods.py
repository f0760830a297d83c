"""Methods of other papers against their formulas, and a method of one's own from the documents."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from support import reference_methods
from support.models import tiny_model
from torch import nn
from torch.func import functional_call

import run
from lora import LoRA
from zo.methods import AR1ZO, FZOO, LOZO, Method
from zo.optimizer import ZerothOrder

ROOT = Path(run.__file__).parent
LORA = "--trainer zo --lora --lora_r 4 --learning_rate 1e-3 --max_steps 7 --save_steps 3 --save_model"
LORA += " --output_dir out"


STEPS = 50


class Adapted(nn.Module):
    """Two frozen layers, each with a low-rank A and B that are trained."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.ModuleList([nn.Linear(7, 6), nn.Linear(6, 3)]).requires_grad_(False)
        self.A = nn.ParameterList([torch.randn(4, 7) / 3, torch.randn(4, 6) / 3])
        self.B = nn.ParameterList([torch.randn(6, 4) / 3, torch.randn(3, 4) / 3])

    def adapters(self):
        return [p for pair in zip(self.A, self.B, strict=True) for p in pair]

    def forward(self, x):
        for layer, A, B in zip(self.frozen, self.A, self.B, strict=True):
            x = torch.tanh(layer(x) + x @ A.T @ B.T)
        return x


def losses_of(module, params):
    """(a closure for the engine, the same loss as a function of a list of tensors)."""
    names = {id(p): name for name, p in module.named_parameters()}
    x, target = torch.randn(16, 7), torch.randn(16, 3)
    mean_square = lambda y: float((y - target).double().square().mean())  # noqa: E731

    def at(theta):
        values = {names[id(p)]: value for p, value in zip(params, theta, strict=True)}
        return mean_square(functional_call(module, values, (x,)))

    return lambda: mean_square(module(x)), at


def lozo(interval):
    method = LOZO()
    method.interval = interval
    return method


# name -> (method, reference, rate)
REFERENCES = {
    "mezo": (Method(1), reference_methods.mezo, 1e-2),
    "mezo, 3 queries": (Method(3), partial(reference_methods.mezo, queries=3), 1e-2),
    "lozo": (lozo(20), partial(reference_methods.lozo, rank=2, interval=20), 1e-2),
    "fzoo": (FZOO(5), partial(reference_methods.fzoo, queries=5), 1e-3),
    "ar1-zo": (AR1ZO(), reference_methods.ar1_zo, 1e-2),
}


def compare(name: str, params, module, master: bool):
    """Take 50 steps with the engine and with the reference; yield both θ after each."""
    method, reference, lr = REFERENCES[name]
    closure, loss = losses_of(module, params)
    engine = ZerothOrder(params, lr, 1e-3, seed=4, master=master, method=method)
    theta = [p.detach().clone() for p in params]
    with torch.no_grad():
        for step in range(STEPS):
            engine.step(closure)
            theta = reference(theta, loss, step=step, seed=4, lr=lr, eps=1e-3)
            yield params, theta


@pytest.mark.parametrize("name", ["mezo", "mezo, 3 queries", "lozo", "fzoo"])
def test_full_weights_follow_the_formulas_of_the_paper(name):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    before = [p.detach().clone() for p in module.parameters()]
    for ours, theirs in compare(name, list(module.parameters()), module, master=False):
        for p, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)
    assert all((p - old).abs().max() > 1e-2 for p, old in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["mezo", "mezo, 3 queries", "fzoo", "ar1-zo"])
def test_adapters_follow_the_formulas_of_the_paper(name):
    """MeZO and AR1-ZO bit by bit; FZOO rounds its quotients in another order."""
    torch.manual_seed(0)
    module = Adapted()
    params = module.adapters()
    before = [p.detach().clone() for p in params]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if name == "fzoo" else {"rtol": 0, "atol": 0}
    for ours, theirs in compare(name, params, module, master=True):
        for p, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), expected, **tolerance)
    assert all((p - old).abs().max() > 1e-2 for p, old in zip(params, before, strict=True))


class AsLOZO(LOZO):
    """LOZO of rank 1 with V = scaling · A of a LoRA and the U that its B is perturbed along."""

    def __init__(self, adapters: ZerothOrder, lora: LoRA, weights):
        super().__init__()
        self.adapters, self.lora, self.weights = adapters, lora, weights

    def direction(self, source, block, step, query, rows, device):
        i = next(i for i, w in enumerate(self.weights) if w is block.param)
        flat = self.adapters.blocks[0]
        z = Method.direction(self, source, flat, step, query, range(len(flat.param)), device)
        u = flat.split(z.view(-1))[i]
        module = self.lora.lora_modules[i]
        return u[rows.start : rows.stop] @ (module.scaling * module.lora_A)


@pytest.mark.parametrize("rounds", [1, 3])
@torch.no_grad()
def test_b_alone_with_merges_is_lozo_of_rank_1(rounds):
    """Plain sgd on B with a merge every ν steps moves the layers as LOZO of rank 1 does, on the same z."""
    ids = torch.arange(24).view(2, 12) * 7 % 250
    boosted, full = (tiny_model("llama").double() for _ in range(2))
    start = {n: p.detach().clone() for n, p in full.named_parameters()}
    lora = LoRA(boosted, 1, 16, xgblora=True, seed=3, freeze_a=True)
    weights = [full.get_submodule(name).weight for name in lora.modules]
    full.requires_grad_(False)
    for w in weights:
        w.requires_grad_(True)
    ours = ZerothOrder([{"params": lora.parameters()}], 1e-4, 1e-3, seed=9, master=True)
    theirs = ZerothOrder(weights, 1e-4, 1e-3, seed=9, master=False, method=AsLOZO(ours, lora, weights))
    for _ in range(rounds):
        for _ in range(4):
            theirs.step(lambda: full(input_ids=ids, labels=ids).loss)
            ours.step(lambda: boosted(input_ids=ids, labels=ids).loss)
        lora.merge_and_reinit()
        ours.restart()
    for name, w in zip(lora.modules, weights, strict=True):
        theirs_moved, ours_moved = (x - start[f"{name}.weight"] for x in (w, lora.modules[name].weight))
        assert theirs_moved.abs().max() > 1e-4
        assert torch.allclose(ours_moved, theirs_moved, atol=1e-3 * theirs_moved.abs().max())


@pytest.mark.parametrize("flags", ["--zo_method fzoo --zo_queries 3", "--zo_method ar1-zo"])
def test_resume_and_replay_come_for_nothing(go, flags):
    go(f"{LORA} {flags}")
    expected = adapter_model()
    for path in Path("out").glob("checkpoint-[67]"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    go(f"{LORA} {flags}")
    assert adapter_model() == expected
    go(f"{LORA} {flags} --replay out/trajectory.safetensors --output_dir again", result=False)
    assert adapter_model("again") == expected


def adapter_model(path="out"):
    return (Path(path) / "adapter_model.safetensors").read_bytes()


def test_what_a_method_needs_is_asked_for(go, capsys):
    go("--trainer zo --max_steps 2 --zo_method ar1-zo", status=2)
    assert "A and B" in capsys.readouterr().err
    go("--trainer zo --lora --lora_freeze_a --max_steps 2 --zo_method ar1-zo", status=2)


def test_fzoo_skips_a_step_whose_losses_are_no_numbers():
    for bad in (math.nan, math.inf):
        assert all(math.isnan(g) for g in FZOO(3).projected([0.5, 0.6, bad, 0.4], 1e-2))
    assert FZOO(2).projected([0.5, 0.6, 0.6], 1e-2) == [0.0, 0.0]


def test_the_method_of_the_documents_runs_and_is_fzoo(go, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "zo" / "README.md").read_text(), re.S)
    (tmp_path / "mine.py").write_text(next(block for block in blocks if "class Mine" in block))
    go(f"{LORA} --zo_method fzoo --zo_queries 3")
    go(f"{LORA} --zo_method {tmp_path}/mine.py:Mine --zo_queries 3 --output_dir mine")
    assert adapter_model("mine") == adapter_model()
