"""The Trainer's step against a ten-line loop, the steps of merges, the regular optimizer at a merge."""

import logging
import math

import pytest
import torch
from support.references import gaussian

from cli import load_model
from lora import LoRA
from scoring import logprobs
from trainer import OurTrainer


def fresh_model(model_dir):
    return load_model.read_model(str(model_dir), torch.float32)


@pytest.mark.parametrize("mode", ["lora", "xgblora", "ft"])
@torch.no_grad()
def test_20_steps_equal_a_plain_loop(framework, model_dir, mode):
    flags = {"lora": "--lora --lora_r 4", "xgblora": "--xgblora --xgblora_steps_per_iteration 8", "ft": ""}[
        mode
    ]
    lr, eps = (1e-3, 1e-2) if mode == "ft" else (2e-2, 1e-2)
    made = framework(
        f"--trainer zo {flags} --max_steps 20 --learning_rate {lr} --zo_eps {eps} --save_strategy no"
    )

    model = fresh_model(model_dir)
    lora = (
        LoRA(model, 1 if mode == "xgblora" else 4, 16, xgblora=mode == "xgblora", seed=7)
        if mode != "ft"
        else None
    )
    params = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for p in params]
    assert len(made.seen) == 20
    for step, batch in enumerate(made.seen):
        theta = torch.cat([p.flatten() for p in params])
        z, losses = gaussian((7, step, 0), 0, len(theta)), []
        for shown in (theta + eps * z, theta - eps * z):
            for p, values in zip(params, shown.split(sizes), strict=True):
                p.copy_(values.view(p.shape))
            losses.append(logprobs.loss(model, batch, classification=True).item())
        g = (losses[0] - losses[1]) / (2 * eps)
        for p, values in zip(params, (theta - lr * g * z).split(sizes), strict=True):
            p.copy_(values.view(p.shape))
        if mode == "xgblora" and (step + 1) % 8 == 0:
            weights = [m.weight + m.scaling * m.lora_B @ m.lora_A for m in lora.lora_modules]
            lora.merge_and_reinit()
            assert all(
                torch.allclose(m.weight, w, atol=1e-6)
                for m, w in zip(lora.lora_modules, weights, strict=True)
            )
    if lora and mode == "xgblora":
        lora.merge_and_reinit()  # the last partial round
    moved = 0.0
    for (name, ours), (_, plain), (_, old) in zip(
        made.model.named_parameters(),
        model.named_parameters(),
        fresh_with_adapters(model_dir, lora).named_parameters(),
        strict=True,
    ):
        assert torch.allclose(ours, plain, atol=2e-4, rtol=1e-3), name
        moved = max(moved, (ours - old).abs().max().item())
    assert moved > 1e-3  # the comparison is of something


def fresh_with_adapters(model_dir, like):
    model = fresh_model(model_dir)
    if like is not None:
        LoRA(model, like.lora_modules[0].r, 16, seed=7)
    return model


def test_normalised_steps_have_the_length_of_the_rate(framework):
    made = framework("--trainer zo --lora --zo_normalize --lora_freeze_a --max_steps 1 --learning_rate 0.25")
    update = torch.cat([m.lora_B.flatten() for m in made.lora_module.lora_modules]).detach()
    z = gaussian((7, 0, 0), 0, len(update))
    assert torch.allclose(update.abs(), 0.25 * z.abs(), rtol=1e-4)


@pytest.mark.parametrize("normalize", ["", "--zo_normalize"])
def test_defaults_with_b_alone_give_the_same_run_at_any_alpha(framework, normalize):
    """B' = scaling · B: rate and ε follow from the scaling, so that the weights move alike."""
    deltas = []
    for alpha in (16, 2):
        flags = (
            f"--trainer zo --lora --lora_r 1 --lora_freeze_a {normalize} --max_steps 4 "
            f"--lora_alpha {alpha} --overwrite"
        )
        modules = framework(flags).lora_module.lora_modules
        deltas.append(torch.cat([(m.scaling * m.lora_B @ m.lora_A).flatten() for m in modules]).detach())
    assert deltas[0].abs().max() > 0 and torch.allclose(*deltas, rtol=2e-2, atol=1e-3 * deltas[0].abs().max())


@pytest.mark.parametrize("kind", ["zo", "regular"])
def test_step_merges_come_before_the_evaluation_and_checkpoint_of_their_step(
    framework, kind, monkeypatch, caplog
):
    events = []
    for cls, name in ((LoRA, "merge_and_reinit"), (OurTrainer, "evaluate"), (OurTrainer, "_save_checkpoint")):
        original = getattr(cls, name)

        def noting(self, *a, original=original, name=name, **k):
            events.append(name)
            return original(self, *a, **k)

        monkeypatch.setattr(cls, name, noting)
    caplog.set_level(logging.INFO)
    made = framework(
        f"--trainer {kind} --xgblora --xgblora_steps_per_iteration 4 --max_steps 10 --num_dev 4 "
        "--eval_strategy steps --eval_steps 4 --save_steps 4",
        rows=28,
        dev=4,
    )
    one = ["merge_and_reinit", "evaluate", "_save_checkpoint"]
    # the partial round is merged after the last step's checkpoint, which keeps it live
    assert events == [*one, *one, "evaluate", "_save_checkpoint", "merge_and_reinit"]
    assert [
        f"XGBLoRA: merged booster {i} at step {s}" in caplog.text for i, s in ((1, 4), (2, 8), (3, 10))
    ] == [True] * 3
    assert len(made.lora_module.boosters) == 3


@pytest.mark.parametrize("frequency", [1, 2])
def test_epoch_merges_happen_at_the_last_step_of_an_epoch(framework, frequency):
    made = framework(
        f"--trainer zo --xgblora --xgblora_merge_frequency {frequency} --num_train_epochs 4", rows=20
    )
    merged = [
        (e["merged_booster"], e["step"]) for e in made.trainer.state.log_history if "merged_booster" in e
    ]
    steps_per_round = 3 * frequency  # 3 steps an epoch: 8 + 8 + 4 rows
    assert merged == [(i, steps_per_round * i) for i in range(1, 4 // frequency + 1)]


def test_steps_take_precedence_over_epochs(framework):
    made = framework("--trainer zo --xgblora --xgblora_steps_per_iteration 5 --num_train_epochs 3", rows=32)
    assert [e["step"] for e in made.trainer.state.log_history if "merged_booster" in e] == [5, 10, 12]


def test_a_regular_merge_resets_the_optimizers_state(framework, monkeypatch):
    states, end_round = [], OurTrainer.end_round

    def watching(self):
        states.append(len(self.optimizer.state))
        length = end_round(self)
        states.append(len(self.optimizer.state))
        return length

    monkeypatch.setattr(OurTrainer, "end_round", watching)
    made = framework("--trainer regular --xgblora --xgblora_steps_per_iteration 3 --max_steps 6")
    adapters = 2 * len(made.lora_module.lora_modules)
    assert states == [adapters, 0, adapters, 0]


def test_the_regular_trainer_learns_and_keeps_the_base(framework, model_dir):
    made = framework("--trainer regular --lora --max_steps 30 --learning_rate 1e-2", rows=8)
    losses = [e["loss"] for e in made.trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] / 2
    old = fresh_model(model_dir).state_dict()
    assert all(torch.equal(v, old[k]) for k, v in made.model.state_dict().items() if "lora_" not in k)


@pytest.mark.parametrize("loss", ["--train_as_classification", "--train_as_classification False"])
@pytest.mark.parametrize("trainer", ["zo --learning_rate 1e-2", "regular --learning_rate 1e-2 --optim sgd"])
def test_gradient_accumulation_equals_the_big_batch(framework, trainer, loss):
    """13 rows: the last step has one micro-batch of four, and one of one."""
    flags = f"--trainer {trainer} --lora --max_steps 3 --max_grad_norm 0 {loss}"
    big = framework(f"{flags} --per_device_train_batch_size 8", rows=13)
    small = framework(
        f"{flags} --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --overwrite", rows=13
    )
    for a, b in zip(big.lora_module.lora_modules, small.lora_module.lora_modules, strict=True):
        assert a.lora_B.any() and torch.allclose(a.lora_B, b.lora_B, atol=1e-5)
    logs = [[e["loss"] for e in f.trainer.state.log_history if "loss" in e] for f in (big, small)]
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(*logs, strict=True))


def test_the_log_shows_the_mean_of_both_losses_and_the_projected_gradient(framework):
    made = framework("--trainer zo --lora --max_steps 2 --learning_rate 0 --zo_eps 1e-2")
    model = made.model
    z = gaussian((7, 0, 0), 0, sum(p.numel() for p in model.parameters() if p.requires_grad))
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            start = 0
            params = [p for p in model.parameters() if p.requires_grad]
            saved = [p.clone() for p in params]
            for p in params:
                p.add_(sign * 1e-2 * z[start : start + p.numel()].view(p.shape))
                start += p.numel()
            losses.append(logprobs.loss(model, made.seen[0], True).item())
            for p, s in zip(params, saved, strict=True):
                p.copy_(s)
    first = next(e for e in made.trainer.state.log_history if "loss" in e)
    assert math.isclose(first["loss"], sum(losses) / 2, rel_tol=1e-5)
    assert math.isclose(first["grad_norm"], abs(losses[0] - losses[1]) / 2e-2, rel_tol=1e-3, abs_tol=1e-5)


def test_a_nan_loss_is_logged_as_skipped_and_never_as_0(framework, monkeypatch):
    nan, loss = iter([math.nan, math.nan]), logprobs.loss

    def sometimes(model, inputs, classification):
        return loss(model, inputs, classification) * next(nan, 1.0)

    monkeypatch.setattr(logprobs, "loss", sometimes)
    made = framework("--trainer zo --lora --max_steps 3 --learning_rate 1e-2")
    logs = [e for e in made.trainer.state.log_history if "loss" in e]
    assert math.isnan(logs[0]["loss"]) and not math.isnan(logs[-1]["loss"])
    assert logs[-1]["skipped_steps"] == 1


def test_dropout_is_off_in_a_zeroth_order_step(framework):
    made = framework("--trainer zo --lora --max_steps 1")
    assert not made.model.training
