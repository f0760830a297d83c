"""Real runs of the shell scripts; tests/test_scripts.py reads the words that they give to `run.py`."""

import json

import pytest
from support.scripts import run_script


@pytest.fixture
def result(model_dir, data_dir, tmp_path):
    """result(script, settings, *words) -> the result file of a run of a script."""

    def start(script: str, settings: dict, *words: str) -> dict:
        words = ["--result_file", str(tmp_path / "r.json"), "--output_dir", str(tmp_path / "out"), *words]
        done = run_script(script, {"MODEL": model_dir, "DATA_DIR": data_dir, **settings}, *words)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "r.json").read_text())

    return start


@pytest.mark.parametrize(
    "mode, rate, eps", [("ft", 1e-6, 1e-3), ("lora", 5e-5, 1e-2), ("prefix", 1e-2, 1e-1)]
)
def test_mezo_sh_in_every_mode(result, mode, rate, eps):
    settings = {"MODE": mode, "TRAIN": 8, "DEV": 4, "STEPS": 1}
    args = result("mezo.sh", settings, "--eval_steps", "1", "--save_steps", "1")["args"]
    assert (args["learning_rate"], args["zo_eps"]) == (rate, eps)
    assert args["prefix_tuning"] == (mode == "prefix") and args["lora"] == (mode == "lora")


def test_finetune_sh(result):
    settings = {"MODE": "lora", "TRAIN": 16, "DEV": 4, "EVAL": 4, "BS": 4, "EPOCH": 2, "SEED": 3, "LR": 1e-3}
    measured = result("finetune.sh", settings)
    assert measured["args"]["trainer"] == "regular" and measured["forward_passes"] == 8


def test_icl_sh(result):
    for more, train_set in (({}, None), ({"SEED": 5}, 5)):
        measured = result("icl.sh", {"TRAIN": 4, "EVAL": 4, **more})
        assert measured["args"]["trainer"] == "none" and measured["args"]["num_train"] == 4
        assert measured["sets"][0]["train_set"] == train_set


def test_a_task_without_data_ends_with_one_line(tmp_path):
    done = run_script("mezo.sh", {"TASK": "WSC", "DATA_DIR": tmp_path})
    assert done.returncode == 2 and "TRAIN/DEV/EVAL: 454/100/1000" in done.stdout.splitlines()
    assert done.stderr.splitlines()[-1].startswith("run.py: error:")
