"""`mezo.sh`, `finetune.sh` and `icl.sh` print their settings and hand them to one `run.py` call."""

import json
import os
import subprocess
from pathlib import Path

import run

ROOT = Path(run.__file__).parent


def script(name: str, environment: dict, *words: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, **{k: str(v) for k, v in environment.items()}}
    return subprocess.run(["bash", str(ROOT / name), *words], env=settings, capture_output=True, text=True)


def mezo(environment: dict, *words: str) -> subprocess.CompletedProcess:
    return script("mezo.sh", environment, *words)


def test_a_boosted_run_with_every_setting(model_dir, data_dir, tmp_path):
    environment = {"MODEL": model_dir, "DATA_DIR": data_dir, "TASK": "SST2", "MODE": "xgblora", "BS": 4, "LR": 1e-3}
    environment |= {"EPS": 1e-2, "SEED": 3, "TRAIN": 16, "DEV": 8, "EVAL": 4, "STEPS": 8, "EVAL_STEPS": 4}
    environment |= {"XGBLORA_STEPS": 3}
    words = ["--result_file", str(tmp_path / "r.json"), "--output_dir", str(tmp_path / "out"), "--lora_freeze_a"]
    done = mezo(environment, *words)
    assert done.returncode == 0, done.stderr
    for line in ("MODE: xgblora", "BS: 4", "LR: 0.001", "EPS: 0.01", "SEED: 3", "TRAIN/EVAL STEPS: 8/4"):
        assert line in done.stdout.splitlines()
    assert "XGBLORA_STEPS: 3" in done.stdout.splitlines()
    result = json.loads((tmp_path / "r.json").read_text())
    expected = {
        "task_name": "SST2", "trainer": "zo", "xgblora": True, "xgblora_steps_per_iteration": 3, "seed": 3,
        "train_set_seed": 3, "num_train": 16, "num_dev": 8, "num_eval": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "zo_eps": 1e-2, "max_steps": 8, "eval_steps": 4, "save_steps": 4, "logging_steps": 10,
        "lora_freeze_a": True, "train_as_classification": True, "load_best_model_at_end": True,
        "tag": "mezo-xgblora-8-4", "metric_for_best_model": "accuracy", "load_float16": False,
    }  # fmt: skip
    assert {name: result["args"][name] for name in expected} == expected
    assert result["sets"][0]["boosters"] in (1, 2, 3)  # of the best checkpoint, at step 4 or 8


def test_modes_take_their_own_learning_rate_and_eps(model_dir, data_dir, tmp_path):
    for mode, values in (("ft", (1e-6, 1e-3)), ("lora", (5e-5, 1e-2))):
        environment = {"MODEL": model_dir, "DATA_DIR": data_dir, "MODE": mode, "TRAIN": 8, "DEV": 4, "STEPS": 1}
        result = tmp_path / f"{mode}.json"
        words = ["--result_file", str(result), "--output_dir", str(tmp_path / mode), "--eval_steps", "1"]
        done = mezo(environment, *words, "--save_steps", "1")
        assert done.returncode == 0, done.stderr
        args = json.loads(result.read_text())["args"]
        assert (args["learning_rate"], args["zo_eps"]) == values


def test_sizes_and_the_loss_fit_the_task(tmp_path):
    """Each stops at the missing data, after the settings are printed."""
    sizes = {"WSC": "454/100", "CB": "150/100", "Copa": "300/100", "SST2": "1000/500", "SQuAD": "1000/500"}
    for task, expected in sizes.items():
        done = mezo({"TASK": task, "DATA_DIR": tmp_path})
        assert done.returncode == 2 and f"TRAIN/DEV/EVAL: {expected}/1000" in done.stdout.splitlines()
        extra = next(line for line in done.stdout.splitlines() if line.startswith("Extra args"))
        assert ("--train_as_classification" in extra) == (task not in ("Copa", "SQuAD"))
    assert "TRAIN/DEV/EVAL: 54/10/1000" in mezo({"TASK": "WSC", "TRAIN": 54, "DEV": 10, "DATA_DIR": tmp_path}).stdout


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    done = script("finetune.sh", {"TASK": "SQuAD", "BS": 5, "DATA_DIR": tmp_path})
    assert done.returncode == 2 and "BS=5" in done.stderr.splitlines()[-1]


def test_a_batch_that_is_no_number_is_refused():
    for name in ("mezo.sh", "finetune.sh"):
        for size in ("0", "many"):
            done = script(name, {"BS": size})
            assert done.returncode == 2 and done.stderr == f"{name}: BS={size} is no number of rows\n"


def test_a_recipe_brings_its_mode(tmp_path):
    for recipe, mode in (("fast", "xgblora"), ("atoms", "lora")):
        done = mezo({"RECIPE": recipe, "TASK": "SST2", "DATA_DIR": tmp_path})  # stops at the missing data
        assert done.returncode == 2 and f"MODE: {mode}" in done.stdout.splitlines()
        assert f"--recipe {recipe}" in done.stdout


def test_prefix_mode(model_dir, data_dir, tmp_path):
    environment = {"MODEL": model_dir, "DATA_DIR": data_dir, "MODE": "prefix", "TRAIN": 8, "DEV": 4, "STEPS": 1}
    words = ["--result_file", str(tmp_path / "r.json"), "--output_dir", str(tmp_path / "out"), "--eval_steps", "1"]
    done = script("mezo.sh", environment, *words, "--save_steps", "1")
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "r.json").read_text())["args"]
    assert args["prefix_tuning"] and args["num_prefix"] == 5 and (args["learning_rate"], args["zo_eps"]) == (1e-2, 1e-1)


def test_finetune_sh_back_propagates_for_epochs(model_dir, data_dir, tmp_path):
    environment = {"MODEL": model_dir, "DATA_DIR": data_dir, "MODE": "lora", "TRAIN": 16, "DEV": 4, "EVAL": 4}
    words = ["--result_file", str(tmp_path / "r.json"), "--output_dir", str(tmp_path / "out")]
    done = script("finetune.sh", {**environment, "BS": 4, "EPOCH": 2, "SEED": 3, "LR": 1e-3}, *words)
    assert done.returncode == 0, done.stderr
    assert "EPOCH: 2" in done.stdout.splitlines() and "BS: 4 (4 at a time)" in done.stdout.splitlines()
    result = json.loads((tmp_path / "r.json").read_text())
    expected = {
        "trainer": "regular", "lora": True, "num_train_epochs": 2, "per_device_train_batch_size": 4, "seed": 3,
        "learning_rate": 1e-3, "eval_strategy": "epoch", "train_as_classification": True, "num_dev": 4,
    }  # fmt: skip
    assert {name: result["args"][name] for name in expected} == expected and result["forward_passes"] == 8
    done = script("finetune.sh", {"TASK": "DROP", "DATA_DIR": tmp_path})
    assert "BS: 8 (1 at a time)" in done.stdout.splitlines() and done.returncode == 2


def test_icl_sh_shows_demonstrations(model_dir, data_dir, tmp_path):
    environment = {"MODEL": model_dir, "DATA_DIR": data_dir, "TRAIN": 4, "EVAL": 4}
    for more, train_set in (({}, None), ({"SEED": 5}, 5)):
        done = script("icl.sh", {**environment, **more}, "--result_file", str(tmp_path / "r.json"))
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["args"]["trainer"] == "none" and result["args"]["num_train"] == 4
        assert result["sets"][0]["train_set"] == train_set
