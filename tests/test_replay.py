"""`run.py --replay`: the weights of a run again from a few kilobytes; and the engine's flags end to end."""

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.runs import adapter_bytes

import run
from zo.trajectory import Trajectory

RUN = "--trainer zo --learning_rate 1e-2 --seed 3 --save_model --max_steps 11 --save_steps 2"
BOOST = f"{RUN} --xgblora --xgblora_steps_per_iteration 4 --output_dir out"


def trajectory(path="out") -> str:
    return str(Path(path) / "trajectory.safetensors")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--zo_normalize --lora_freeze_a --zo_queries 2",
        "--zo_distribution rademacher --lr_scheduler_type cosine",
        "--zo_optim adamw",
        "--zo_optim momentum --weight_decay 0.1",
    ],
)
def test_a_boosted_run_is_rebuilt_byte_for_byte(go, flags):
    go(f"{BOOST} {flags}")
    go(f"{BOOST} {flags} --replay {trajectory()} --output_dir again", result=False)
    assert adapter_bytes("again") == adapter_bytes("out")


def test_any_number_of_steps_can_be_rebuilt(go):
    go(BOOST)
    go(f"{BOOST} --replay {trajectory()} --replay_steps 8 --output_dir again", result=False)
    assert adapter_bytes("again") == adapter_bytes("out/checkpoint-8")  # two boosters, nothing live yet
    go(f"{BOOST} --replay {trajectory()} --replay_steps 12 --output_dir again", status=2)
    before = adapter_bytes("out")
    go(f"{BOOST} --replay {trajectory()} --replay_steps 8", status=2)  # would overwrite the run's own result
    assert adapter_bytes("out") == before


def test_the_check_says_where_the_loss_is_no_number(go, caplog):
    caplog.set_level("INFO")
    go("--trainer zo --load_float16 --max_steps 1 --zo_check --zo_eps 1000")
    assert "the loss is no number at eps 1000" in caplog.text and " fit (" not in caplog.text


def test_the_best_checkpoint_is_what_is_rebuilt(go):
    flags = f"{BOOST} --num_dev 8 --eval_strategy steps --eval_steps 2 --load_best_model_at_end --metric loss"
    go(flags)
    about = Trajectory.load(trajectory()).about
    state = json.loads(Path("out/checkpoint-11/trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{about['steps']}" and about["rounds"][
        :2
    ] == [
        [4, 1.0],
        [8, 1.0],
    ]
    go(f"{flags} --replay {trajectory()} --output_dir again", result=False)
    assert adapter_bytes("again") == adapter_bytes("out")


def test_a_run_that_was_resumed_has_the_same_trajectory(go):
    go(BOOST)
    expected = Path(trajectory()).read_bytes()
    for path in Path("out").glob("checkpoint-*"):
        if path.name != "checkpoint-6":
            subprocess.run(["rm", "-r", str(path)], check=True)
    Path(trajectory()).unlink()
    go(BOOST)
    assert Path(trajectory()).read_bytes() == expected


@pytest.mark.parametrize("dtype", ["", "--load_bfloat16"])
@pytest.mark.parametrize("method", ["mezo", "lozo"])
def test_full_parameters_are_rebuilt_bit_for_bit(go, dtype, method):
    flags = f"{RUN} {dtype} --zo_method {method} --weight_decay 0.1 --output_dir out"
    go(flags)
    go(f"{flags} --replay {trajectory()} --output_dir again", result=False)
    a, b = load_file("out/model.safetensors"), load_file("again/model.safetensors")
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_replay_writes_what_its_flags_ask_for(go):
    flags = f"{RUN} --lora --output_dir out --save_merged --export_rank 2"
    go(flags)
    go(f"{flags} --replay {trajectory()} --output_dir again", result=False)
    for name in ("merged/model", "rank2/adapter_model"):
        assert Path(f"again/{name}.safetensors").read_bytes() == Path(f"out/{name}.safetensors").read_bytes()


def test_a_run_on_an_objective_is_rebuilt(go):
    flags = (
        f"{RUN} --recipe fast --non_diff --train_as_classification False"  # the recipe leaves its cache out
    )
    go(f"{flags} --output_dir out")
    go(f"{flags} --replay {trajectory()} --output_dir again", result=False)
    assert adapter_bytes("again") == adapter_bytes("out")


def test_a_trajectory_of_another_run_is_refused(go, capsys, tmp_path):
    go(BOOST)
    for flags, word in (
        ("--seed 4", "seed"),
        ("--lora_alpha 3", "lora_alpha"),
        ("--load_bfloat16", "load_bfloat16"),
    ):
        go(f"{BOOST} --replay {trajectory()} {flags} --output_dir again", status=2)
        assert f"{word} " in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "rubbish").write_text("x")
    go(f"{BOOST} --replay rubbish --output_dir again", status=2)
    assert "is not a trajectory" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_only_an_earlier_version_could_take_is_refused(go, capsys):
    go(BOOST)
    file = Trajectory.load(trajectory())
    for steps, status in ((0, 0), (2, 2)):
        file.about["settings"]["xgblora_a_warmup"] = steps
        file.save("earlier.safetensors")
        go(f"{BOOST} --replay earlier.safetensors --output_dir again", status=status, result=False)
    assert "--xgblora_a_warmup" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags", ["--lora", ""])
def test_batched_or_not_a_run_ends_alike(go, flags):
    found = []
    for wish in ("on", "off"):
        result = go(f"{RUN} {flags} --zo_queries 2 --zo_batched {wish} --output_dir {wish}")
        assert result["forward_passes"] == 44
        found.append(result["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_method_of_ones_own_is_taken(go, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from zo import Method\n"
        "class OneSided(Method):\n"
        "    replayable = False\n"
        "    def points(self): return [(0, 0.0), (0, 1.0)]\n"
        "    def projected(self, losses, eps): return [(losses[1] - losses[0]) / eps]\n"
    )
    result = go(f"{RUN} --lora --zo_method {tmp_path / 'mine.py'}:OneSided --output_dir out")
    assert result["forward_passes"] == 22 and not Path(trajectory()).exists()


def test_the_check_is_printed_before_the_run(go, caplog):
    caplog.set_level("INFO")
    go(f"{BOOST} --zo_check --zo_eps 1e-2")
    calm = adapter_bytes()
    said = [record.message for record in caplog.records if record.message.startswith("diagnosis")]
    assert "49 forwards" in said[0] and len(said) >= 2
    go(f"{BOOST} --zo_eps 1e-2 --output_dir other")
    assert adapter_bytes("other") == calm  # it changes nothing


def test_a_finished_run_keeps_its_last_checkpoint_and_writes_its_trajectory_again(go, monkeypatch):
    """With a limit of one checkpoint and the best one early: mezo.sh's flags."""
    values, evaluate = iter([0.1, 0.9, *[0.2] * 40]), run.Framework.evaluate
    monkeypatch.setattr(
        run.Framework,
        "evaluate",
        lambda self, *a, **k: {**evaluate(self, *a, **k), "accuracy": next(values, 0.1)},
    )
    flags = f"{BOOST} --num_dev 8 --eval_strategy steps --eval_steps 2 --load_best_model_at_end --no_eval"
    flags += " --save_total_limit 1"
    go(flags)
    assert {path.name for path in Path("out").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-11"}
    expected, weights = Path(trajectory()).read_bytes(), adapter_bytes()
    Path(trajectory()).unlink()
    Path("out").rename("moved")
    go(flags.replace("--output_dir out", "--output_dir moved"))
    assert Path(trajectory("moved")).read_bytes() == expected and adapter_bytes("moved") == weights
