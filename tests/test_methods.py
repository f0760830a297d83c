"""Methods of other papers against their formulas, and a method of one's own from the documents."""

import math
import re
from pathlib import Path

import pytest
import torch
from support.models import tiny_model
from support.references import gaussian

import run
from lora import LoRA
from zo import counter_rng
from zo.method import Method
from zo.methods import AR1ZO, FZOO, LOZO
from zo.optimizer import ZerothOrder

ROOT = Path(run.__file__).parent
LORA = "--trainer zo --lora --lora_r 4 --learning_rate 1e-3 --max_steps 7 --save_steps 3 --save_model --output_dir out"


def quadratic(lora):
    """A loss of all A and B with a gradient that is known."""
    target = [torch.full_like(p, 0.3) for p in lora.parameters()]
    return lambda: sum(((p - t) ** 2).sum() for p, t in zip(lora.parameters(), target, strict=True))


@torch.no_grad()
def test_fzoo_is_its_formula():
    lora = LoRA(tiny_model("llama"), 2, 16)
    loss, eps, lr, n = quadratic(lora), 1e-2, 1e-3, 5
    engine = ZerothOrder([{"params": lora.parameters()}], lr, eps, seed=4, master=True, method=FZOO(n))
    theta = torch.cat([p.flatten() for p in lora.parameters()])
    sizes = [p.numel() for p in lora.parameters()]
    for step in range(3):
        zs = [counter_rng.direction_range("rademacher", (4, step, q), 0, len(theta)) for q in range(n)]
        losses = []
        for z in [torch.zeros_like(theta), *zs]:
            for p, values in zip(lora.parameters(), (theta + eps * z).split(sizes), strict=True):
                p.copy_(values.view(p.shape))
            losses.append(loss().item())
        for p, values in zip(lora.parameters(), theta.split(sizes), strict=True):
            p.copy_(values.view(p.shape))
        sigma = torch.tensor(losses[1:]).std()
        g = sum((x - losses[0]) * z for x, z in zip(losses[1:], zs, strict=True)) / (eps * n)
        engine.step(loss)
        theta = theta - lr * g / sigma
        ours = torch.cat([p.flatten() for p in lora.parameters()])
        assert set(zs[0].tolist()) == {-1.0, 1.0} and torch.allclose(ours, theta, atol=2e-5 * theta.abs().max() + 1e-6)
        theta = ours.clone()


@torch.no_grad()
def test_ar1_zo_moves_one_atom_a_step_and_every_atom_in_turn():
    lora = LoRA(tiny_model("llama"), 3, 16)
    loss = quadratic(lora)
    engine = ZerothOrder([{"params": lora.parameters()}], 1e-4, 1e-3, seed=1, master=True, method=AR1ZO())
    full = ZerothOrder([{"params": lora.parameters()}], 1e-4, 1e-3, seed=1, master=True)
    for step in range(6):
        before = [p.clone() for p in lora.parameters()]
        z = full.blocks[0].split(gaussian((1, step, 0), 0, full.blocks[0].param.numel()))
        engine.step(loss)
        g = engine.projected_grads[0]
        for i, (p, old, direction) in enumerate(zip(lora.parameters(), before, z, strict=True)):
            moved = (p - old) if i % 2 == 0 else (p - old).T
            expected = (-1e-4 * g * direction) if i % 2 == 0 else (-1e-4 * g * direction).T
            atom = step % 3
            assert torch.allclose(moved[atom], expected[atom], atol=1e-6)
            assert not moved[[k for k in range(3) if k != atom]].any() and moved[atom].any()


class AsLOZO(LOZO):
    """LOZO of rank 1 with V = scaling · A of a LoRA and the U that its B is perturbed along."""

    def __init__(self, adapters: ZerothOrder, lora: LoRA, weights):
        super().__init__()
        self.adapters, self.lora, self.weights = adapters, lora, weights

    def direction(self, source, block, step, query, rows, device):
        i = next(i for i, w in enumerate(self.weights) if w is block.param)
        flat = self.adapters.blocks[0]
        u = flat.split(Method.direction(self, source, flat, step, query, range(len(flat.param)), device).view(-1))[i]
        module = self.lora.lora_modules[i]
        return u[rows.start : rows.stop] @ (module.scaling * module.lora_A)


@pytest.mark.parametrize("rounds", [1, 3])
@torch.no_grad()
def test_b_alone_with_merges_is_lozo_of_rank_1(rounds):
    """Plain sgd on B with a merge every ν steps moves the target layers as LOZO of rank 1 does, on the same z."""
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
    text = (ROOT / "docs" / "NEW_METHOD.md").read_text()
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    go(f"{LORA} --zo_method fzoo --zo_queries 3")
    go(f"{LORA} --zo_method {tmp_path}/mine.py:Mine --zo_queries 3 --output_dir mine")
    assert adapter_model("mine") == adapter_model()
