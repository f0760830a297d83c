"""When rounds end and what is kept of them, in real runs; resume and replay give the same bytes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import adapter_bytes, replace_in_checkpoint

from boosters import peft_files
from boosters.rounds import Rounds
from cli.command_line import parse
from scoring import evaluate, logprobs, packing
from scoring.prompts import language_modelling_example
from trainer import OurTrainer
from training import checkpoints
from zo.optimizer import ZerothOrder
from zo.trajectory import Trajectory

COMMON = (
    "--xgblora --xgblora_steps_per_iteration 4 --max_steps 11 --save_steps 1 --save_model "
    "--output_dir out --seed 3"
)
ZO = f"--trainer zo --learning_rate 1e-2 {COMMON}"
REGULAR = f"--trainer regular --learning_rate 1e-2 {COMMON}"
ADAPTIVE = "--xgblora_adaptive --num_dev 8 --xgblora_patience 2"
FORMS = {
    "plain": "",
    "ensemble": "--xgblora_ensemble --load_bfloat16",
    "ranks": "--xgblora_rank_schedule 1,2,1",
    "random layers": "--xgblora_layers random:1 --zo_normalize --lora_freeze_a",
    "upper layers": "--xgblora_layers top:1 --zo_cache_activations",
    "adaptive": ADAPTIVE,
    "adaptive, ranks, random": (
        f"{ADAPTIVE} --xgblora_rank_schedule 2,1 --xgblora_layers random:1 --zo_normalize"
    ),
    "momentum": "--zo_optim momentum",
    "adamw": "--zo_optim adamw --lr_scheduler_type linear",
    "best": "--xgblora_best --num_dev 8 --metric loss",
}


def keep_only(step: int) -> None:
    for path in checkpoints.list_checkpoints("out"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)


@pytest.mark.parametrize("form", FORMS)
def test_resume_and_replay_give_the_same_bytes(go, form):
    """In the middle of a round, on the step of a merge, and just after it."""
    flags = f"{ZO} {FORMS[form]}"
    go(flags)
    expected, trajectory = adapter_bytes(), Path("out/trajectory.safetensors").read_bytes()
    for step in (6, 8, 9):
        shutil.copytree("out", "kept", dirs_exist_ok=True)
        keep_only(step)
        go(flags)
        assert adapter_bytes() == expected, step
        assert Path("out/trajectory.safetensors").read_bytes() == trajectory
        shutil.rmtree("out")
        Path("kept").rename("out")
    go(f"{flags} --replay out/trajectory.safetensors --output_dir again", result=False)
    assert adapter_bytes("again") == expected


@pytest.mark.parametrize("form", ["plain", "ranks", "adaptive", "random"])
def test_a_regular_run_resumes_with_the_same_bytes(go, form):
    more = {
        "plain": "",
        "ranks": "--xgblora_rank_schedule 1,2",
        "adaptive": ADAPTIVE,
        "random": "--xgblora_layers random:1",
    }[form]
    go(f"{REGULAR} {more}")
    expected = adapter_bytes()
    for step in (6, 8):
        shutil.copytree("out", "kept", dirs_exist_ok=True)
        keep_only(step)
        go(f"{REGULAR} {more}")
        assert adapter_bytes() == expected, step
        shutil.rmtree("out")
        Path("kept").rename("out")


def entries(trainer, key):
    return [e for e in trainer.state.log_history if key in e]


@pytest.mark.parametrize("kind", ["zo", "regular"])
def test_the_rank_follows_the_schedule_and_its_last_one_stays(framework, kind):
    made = framework(
        f"--trainer {kind} --xgblora --xgblora_rank_schedule 1,2,4 "
        "--xgblora_steps_per_iteration 2 --max_steps 8"
    )
    ranks = [{len(b.A) for b in boosters.values()} for boosters in made.lora_module.boosters]
    assert ranks == [{1}, {2}, {4}, {4}] and made.lora_module.boosters[1]
    assert {b.scaling for b in made.lora_module.boosters[2].values()} == {16 / 4}


@pytest.mark.parametrize("kind", ["zo", "regular"])
def test_only_the_layers_of_a_round_are_trained(framework, kind):
    made = framework(
        f"--trainer {kind} --xgblora --xgblora_layers random:1 --xgblora_steps_per_iteration 2 --max_steps 8 "
        "--learning_rate 1e-2"
    )
    for boosters in made.lora_module.boosters:
        assert len(boosters) == 2 and all(bool(b.B.any()) for b in boosters.values())


def test_a_change_of_layers_or_rank_begins_the_normaliser_anew(framework, monkeypatch):
    forgotten, restart = [], ZerothOrder.restart
    monkeypatch.setattr(
        ZerothOrder,
        "restart",
        lambda self, forget=False: (forgotten.append(forget), restart(self, forget))[1],
    )
    common = "--trainer zo --zo_normalize --xgblora --xgblora_steps_per_iteration 2 --max_steps 6 --overwrite"
    framework(common)
    assert not any(forgotten)
    forgotten.clear()
    framework(f"{common} --xgblora_rank_schedule 1,2,2")
    assert forgotten[-3:] == [True, False, False]


# ---- the optimizer and the schedule at a merge ----


@pytest.mark.parametrize("optim", ["momentum", "adamw"])
def test_a_merge_resets_the_state_of_a_zeroth_order_optimizer(framework, optim, monkeypatch):
    states, end_round = [], OurTrainer.end_round

    def watching(self):
        states.append(len(self.zo.weights.torch_optimizer.state))
        length = end_round(self)
        states.append(len(self.zo.weights.torch_optimizer.state))
        return length

    monkeypatch.setattr(OurTrainer, "end_round", watching)
    framework(f"--trainer zo --zo_optim {optim} --xgblora --xgblora_steps_per_iteration 3 --max_steps 6")
    assert states == [1, 0, 1, 0]


@pytest.mark.parametrize("kind", ["zo", "regular"])
def test_a_schedule_spans_all_rounds(framework, kind):
    common = (
        f"--trainer {kind} --xgblora --xgblora_steps_per_iteration 4 --max_steps 8 "
        "--learning_rate 1 --overwrite "
        "--lr_scheduler_type linear"
    )
    rates = [e["learning_rate"] for e in entries(framework(common).trainer, "learning_rate")]
    assert rates == pytest.approx([1 - i / 8 for i in range(8)])


# ---- what is known of rounds ----


def test_rounds_end_by_steps_or_where_the_dev_loss_stalls():
    rounds, losses = Rounds(), iter([0.9, 0.9, math.nan, 0.1])
    rounds.set_limits(max_steps=5, patience=2)
    rounds.dev_loss = 1.0
    assert [rounds.is_over(step, lambda: next(losses)) for step in (1, 2, 3, 4)] == [
        False,
        False,
        False,
        True,
    ]
    rounds.end(4, 0.5)
    # NaN does not fall.
    assert [rounds.is_over(step, lambda: next(losses)) for step in (5, 6)] == [False, True]
    rounds.set_limits(max_steps=5)
    assert [rounds.is_over(step, None) for step in (8, 9)] == [False, True]
    assert rounds.ended == [(4, 0.5)] and rounds.current_start == 4


def test_what_is_known_of_rounds_survives_json():
    rounds, loaded = Rounds(), Rounds()
    rounds.end(4, 1.0)
    rounds.end(8, 0.0)
    rounds.dev_loss = 0.25
    loaded.load_state_dict(json.loads(json.dumps(rounds.state_dict())))
    assert (loaded.ended, loaded.dev_loss) == (rounds.ended, rounds.dev_loss)


def test_the_state_of_a_checkpoint_has_the_rounds_and_the_log_is_never_read(go):
    """The same bytes come from a checkpoint whose log history knows of no round."""
    flags = f"{ZO} {ADAPTIVE}"
    go(flags)
    expected, trajectory = adapter_bytes(), Path("out/trajectory.safetensors").read_bytes()
    keep_only(9)
    file = Path("out/checkpoint-9/trainer_state.json")
    state = json.loads(file.read_text())
    rounds = state["stateful_callbacks"]["rounds"]
    assert rounds["ended"] == [
        [e["step"], e["step_length"]] for e in state["log_history"] if "step_length" in e
    ]
    state["log_history"] = [e for e in state["log_history"] if "step_length" not in e]
    replace_in_checkpoint(file.parent, file.name, json.dumps(state).encode())
    go(flags)
    assert adapter_bytes() == expected and Path("out/trajectory.safetensors").read_bytes() == trajectory


# ---- adaptive rounds ----


@pytest.fixture
def dev_loss(monkeypatch):
    """Put a function of the trainer in the place of its dev loss."""
    return lambda of: monkeypatch.setattr(OurTrainer, "dev_loss", of)


def scale(trainer) -> float:
    module = next(m for m in trainer.lora_module.lora_modules if m.r)
    return module.scaling * module.r / 16


ADAPT = (
    "--trainer zo --xgblora --xgblora_steps_per_iteration 4 --max_steps 8 --xgblora_adaptive --num_dev 4 "
    "--xgblora_patience 9"
)


@pytest.mark.parametrize("best", [0.25, 0.5, 1.0, 1.5, 2.0])
def test_the_line_search_takes_the_best_length(framework, dev_loss, best):
    dev_loss(lambda trainer: (scale(trainer) - best) ** 2 - trainer.state.global_step)
    made = framework(ADAPT, rows=28, dev=4)
    assert made.lora_module.lengths == [best, best]
    assert {b.scaling for boosters in made.lora_module.boosters for b in boosters.values()} == {16 * best}
    assert [e["step_length"] for e in entries(made.trainer, "step_length")] == [best, best]


def test_a_booster_that_only_hurts_is_rejected_and_the_next_draws_another_a(framework, dev_loss, caplog):
    caplog.set_level("INFO")
    dev_loss(lambda trainer: scale(trainer) - trainer.state.global_step)
    made = framework(ADAPT, rows=28, dev=4)
    assert made.lora_module.boosters == [] and made.lora_module.round == 2
    assert "rejected the booster of round 2 at step 8" in caplog.text
    pretrained = made.lora_module.chain.pretrained
    assert all(torch.equal(m.weight, pretrained[n]) for n, m in made.lora_module.modules.items())
    third = {n: m.lora_A.clone() for n, m in made.lora_module.modules.items()}
    made.lora_module.round = 0
    made.lora_module.start_round()
    assert not any(torch.equal(m.lora_A, third[n]) for n, m in made.lora_module.modules.items())


def test_a_loss_of_nan_is_no_length(framework, dev_loss):
    dev_loss(lambda trainer: float("nan") if scale(trainer) > 1 else 1 - scale(trainer))
    assert framework(ADAPT, rows=28, dev=4).lora_module.lengths == [1.0, 1.0]


def test_a_round_whose_dev_loss_stalls_ends_early(framework, dev_loss):
    """Falls until step 4 of the run and stands still from there: looks every 2 steps."""
    dev_loss(lambda trainer: 5.0 - min(trainer.state.global_step, 4) - 0.1 * (scale(trainer) == 1))
    flags = (
        ADAPT.replace("--xgblora_steps_per_iteration 4", "--xgblora_steps_per_iteration 20")
        + " --max_steps 9"
    )
    made = framework(f"{flags} --xgblora_patience 2", rows=28, dev=4)
    assert [e["step"] for e in entries(made.trainer, "step_length")] == [6, 8, 9]


def test_the_dev_loss_is_the_training_loss_on_the_dev_rows(framework):
    made = framework(ADAPT, rows=28, dev=4)
    rows = made.task.sample_subset("train", 0, 32)[28:]
    expected = logprobs.loss(made.model, packing.pack(made.prompts.examples(rows)), True).item()
    assert made.trainer.dev_loss() == pytest.approx(expected, abs=1e-5)
    text = [language_modelling_example(x, True) for x in made.prompts.examples(rows)]
    expected = logprobs.loss(made.model, packing.pack(text), False).item()
    assert evaluate.mean_loss(made.model, text, False) == pytest.approx(expected, abs=1e-5)


# ---- what is kept, and how it is looked at ----


def test_layers_that_few_rounds_drew_have_the_rank_of_the_export(go):
    flags = "--trainer zo --xgblora --xgblora_layers random:1 --xgblora_steps_per_iteration 1 --max_steps 4"
    result = go(f"{flags} --learning_rate 5e-2 --export_rank 4 --output_dir out")
    # The export lacks nothing: no layer has more than four boosters.
    exported = go("--trainer none --num_train 0 --adapter out/rank4")
    assert exported["loss"] == pytest.approx(result["loss"], rel=1e-4)


def test_a_round_begins_with_an_a_of_its_own_where_a_live_booster_is_merged_first(go):
    flags = (
        "--trainer zo --xgblora --lora_freeze_a --xgblora_steps_per_iteration 2 "
        "--learning_rate 5e-2 --save_steps 1"
    )
    go(f"{flags} --max_steps 5 --output_dir out")
    go(f"{flags} --max_steps 1 --adapter out/checkpoint-5 --boosters 3 --output_dir more")
    chain = load_file("more/checkpoint-1/boosters.safetensors")
    rows = [one.tobytes() for one in next(v for k, v in chain.items() if k.endswith(".A")).numpy()]
    assert len(rows) == len(set(rows)) == 4


def test_the_best_prefix_on_dev_is_kept(go, caplog):
    caplog.set_level("INFO")
    result = go(f"{ZO} --xgblora_best --num_dev 8 --metric loss --learning_rate 500")["sets"][0]
    kept = Trajectory.load("out/trajectory.safetensors").about["boosters"]
    assert result["boosters"] == kept < 3 and "best loss" in caplog.text
    assert result["dev_loss"] == pytest.approx(min(stage_losses(caplog.text)), abs=1e-3)


def stage_losses(text):
    rows = [line.split() for line in text.splitlines()]
    return [float(r[2]) for r in rows if len(r) >= 3 and r[0].isdigit() and r[1].replace(".", "").isdigit()]


def test_staged_results_of_a_run_and_of_its_adapter_agree(go):
    ran = go(f"{ZO} --staged 1")["sets"][0]["staged"]
    assert [s["boosters"] for s in ran] == [0, 1, 2, 3] and Path("result.png").exists()
    saved = go("--trainer none --num_train 0 --adapter out --staged 2")
    assert saved["sets"][0]["staged"] == [ran[0], ran[2], ran[3]] and saved["loss"] == ran[-1]["loss"]
    for k in (0, 1, 2):
        assert go(f"--trainer none --num_train 0 --adapter out --boosters {k}")["loss"] == ran[k]["loss"]
    go("--trainer none --num_train 0 --adapter out --boosters 4", status=2)
    ensemble = go("--trainer none --num_train 0 --adapter out --xgblora_ensemble --boosters 2")
    assert ensemble["loss"] == pytest.approx(ran[2]["loss"], abs=1e-5)


def test_a_compressed_chain_is_an_adapter_of_its_rank(go):
    result = go(f"{ZO} --export_rank 3 --learning_rate 5e-2")
    config = json.loads(Path("out/rank3/adapter_config.json").read_text())
    assert config["r"] == 3
    assert go("--trainer none --num_train 0 --adapter out/rank3")["loss"] == pytest.approx(
        result["loss"], abs=1e-4
    )
    go("--trainer none --num_train 0 --adapter out --export_rank 1 --output_dir small")
    assert go("--trainer none --num_train 0 --adapter small/rank1")["loss"] != pytest.approx(
        result["loss"], abs=1e-6
    )


def test_training_goes_on_from_a_chain(go):
    go(ZO)
    result = go(f"{ZO} --adapter out --output_dir more")["sets"][0]
    assert result["boosters"] == 6
    go(f"{ZO} --adapter out --output_dir other --xgblora_layers random:1")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--xgblora_best", "--num_dev"),
        ("--xgblora_adaptive", "--num_dev"),
        ("--xgblora_patience 3", "needs --xgblora_adaptive"),
        ("--xgblora_rank_schedule 1,0", "such as 1,1,2,4"),
        ("--xgblora_rank_schedule 1,x", "such as 1,1,2,4"),
        ("--xgblora_layers top:9", "2 of them"),
        ("--xgblora_layers lower", "top:N and random:N"),
        ("--xgblora_layers random:1 --zo_cache_activations", "needs --trainer zo and --xgblora_layers top:N"),
        ("--staged 1 --no_eval", "exclude each other"),
        ("--lora_r 2", "rank 1"),
        ("--export_rank 0", "at least 1"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(go, capsys, flags, message):
    go(f"{ZO} {flags}", status=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("run.py: error")


def test_what_belongs_to_boosting_needs_it(go, capsys):
    plain = "--trainer zo --lora --max_steps 2 --output_dir out"
    for flag in ("--xgblora_adaptive", "--xgblora_best", "--xgblora_rank_schedule 1,2",
                 "--xgblora_ensemble", "--staged 1", "--xgblora_layers random:1"):  # fmt: skip
        go(f"{plain} {flag}", status=2)
        assert "--xgblora" in capsys.readouterr().err.strip().splitlines()[-1]
    go(f"{plain} --xgblora_layers top:1 --zo_cache_activations")  # a LoRA may have layers of its own


def test_a_recipe_sets_what_no_flag_has_set(go):
    args = parse(["--trainer", "zo", "--recipe", "fast"])
    assert (args.xgblora, args.lora_freeze_a, args.zo_normalize, args.zo_cache_activations) == (True,) * 4
    assert (args.xgblora_layers, args.xgblora_steps_per_iteration, args.learning_rate) == (
        "top:half",
        25,
        1e-2,
    )
    # The values are those that the flags would have without the recipe.
    flags = "--trainer zo --recipe fast --zo_normalize False --xgblora_layers all"
    args = parse(flags.split())
    assert (args.zo_normalize, args.xgblora_layers, args.lora_freeze_a) == (False, "all", True)
    flags = "--trainer zo --recipe fast --xgblora_steps_per_iteration 9 --xgblora_layers random:1"
    args = parse(flags.split())
    assert (args.xgblora_layers, args.xgblora_steps_per_iteration, args.zo_cache_activations) == (
        "random:1",
        9,
        False,
    )
    result = go("--trainer zo --recipe fast --max_steps 30 --save_model --output_dir out")["sets"][0]
    names = peft_files.read_lora_config("out")["target_modules"]
    assert result["boosters"] == 2 and all(".1." in name for name in names)  # the upper of two layers
    args = parse(["--trainer", "zo", "--recipe", "atoms"])
    assert (args.mode, args.lora_r, args.lora_alpha, args.learning_rate, args.zo_eps) == (
        "lora",
        8,
        1024,
        5e-4,
        2e-3,
    )
    assert parse(["--trainer", "zo", "--recipe", "atoms", "--learning_rate", "1e-3"]).learning_rate == 1e-3
    assert go("--trainer zo --recipe atoms --max_steps 2")["forward_passes"] == 4
    go("--trainer zo --recipe atoms --xgblora", status=2)
    go("--trainer zo --recipe atoms --lora_r 4", status=2)
    go("--recipe fast", status=2)
    go("--trainer zo --recipe slow", status=2)
