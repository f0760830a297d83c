"""`mezo.sh`, `finetune.sh` and `icl.sh` print their settings and hand them to one `run.py` call.

All but one of the tests put a stub in Python's place and read the words that it got;
tests/stress/test_scripts.py has the real runs.
"""

import json

import pytest
from support.scripts import record_call, run_script

import run


@pytest.fixture
def call(tmp_path):
    """call(script, settings, *words) -> what the script printed, and the words that it gave to Python."""

    def start(script: str, settings: dict, *words: str, **kind):
        return record_call(tmp_path, script, settings, *words, **kind)

    return start


@pytest.fixture
def arguments(call):
    """arguments(script, settings, *words) -> (arguments of `run.py`, lines that the script printed)."""

    def start(script: str, settings: dict, *words: str):
        recorded = call(script, settings, *words)
        assert recorded.status == 0 and recorded.words[0] == "run.py", recorded
        return run.parse(recorded.words[1:]), recorded.lines

    return start


def test_a_boosted_run_with_every_setting(model_dir, data_dir, tmp_path):
    """The one real run of this file."""
    settings = {
        "MODEL": model_dir,
        "DATA_DIR": data_dir,
        "TASK": "SST2",
        "MODE": "xgblora",
        "BS": 4,
        "LR": 1e-3,
    }
    settings |= {"EPS": 1e-2, "SEED": 3, "TRAIN": 16, "DEV": 8, "EVAL": 4, "STEPS": 8, "EVAL_STEPS": 4}
    settings |= {"XGBLORA_STEPS": 3}
    words = [
        "--result_file",
        str(tmp_path / "r.json"),
        "--output_dir",
        str(tmp_path / "out"),
        "--lora_freeze_a",
    ]
    done = run_script("mezo.sh", settings, *words)
    assert done.returncode == 0, done.stderr
    for line in ("MODE: xgblora", "BS: 4", "LR: 0.001", "EPS: 0.01", "SEED: 3", "TRAIN/EVAL STEPS: 8/4"):
        assert line in done.stdout.splitlines()
    assert "XGBLORA_STEPS: 3" in done.stdout.splitlines()
    result = json.loads((tmp_path / "r.json").read_text())
    expected = {
        "task_name": "SST2", "trainer": "zo", "xgblora": True, "xgblora_steps_per_iteration": 3, "seed": 3,
        "train_set_seed": 3, "num_train": 16, "num_dev": 8, "num_eval": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "zo_eps": 1e-2, "max_steps": 8, "eval_steps": 4, "save_steps": 4,
        "logging_steps": 10,
        "lora_freeze_a": True, "train_as_classification": True, "load_best_model_at_end": True,
        "tag": "mezo-xgblora-8-4", "metric_for_best_model": "accuracy",
    }  # fmt: skip
    assert {name: result["args"][name] for name in expected} == expected
    assert result["sets"][0]["boosters"] in (1, 2, 3)  # of the best checkpoint, at step 4 or 8


@pytest.mark.parametrize(
    "mode, rate, eps, own",
    [
        ("ft", 1e-6, 1e-3, {}),
        ("prefix", 1e-2, 1e-1, {"prefix_tuning": True, "num_prefix": 5, "prefix_init_by_real_act": True}),
        ("lora", 5e-5, 1e-2, {"lora": True}),
    ],
)
def test_modes_take_their_own_learning_rate_and_eps(arguments, mode, rate, eps, own):
    args, lines = arguments("mezo.sh", {"MODE": mode})
    assert (args.learning_rate, args.zo_eps) == (rate, eps) and args.trainer == "zo"
    assert {name: getattr(args, name) for name in own} == own
    assert "LR: by mode" in lines and "EPS: by mode" in lines


def test_mezo_sh_alone_is_the_recipe_of_its_authors(arguments):
    args, lines = arguments("mezo.sh", {})
    expected = {
        "model_name": "facebook/opt-1.3b", "task_name": "SST2", "seed": 0, "train_set_seed": 0,
        "num_train": 1000, "num_dev": 500, "num_eval": 1000, "per_device_train_batch_size": 16,
        "max_steps": 20000, "eval_steps": 4000,
        "save_steps": 4000, "save_total_limit": 1, "load_best_model_at_end": True, "save_on_interrupt": True,
        "data_dir": None, "xgblora": False, "lora": False, "load_float16": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert "DATA_DIR: (hub)" in lines


def test_sizes_and_the_loss_fit_the_task(arguments):
    sizes = {
        "WSC": (454, 100),
        "CB": (150, 100),
        "Copa": (300, 100),
        "SST2": (1000, 500),
        "SQuAD": (1000, 500),
    }
    for task, expected in sizes.items():
        args, lines = arguments("mezo.sh", {"TASK": task})
        assert (args.num_train, args.num_dev) == expected
        assert f"TRAIN/DEV/EVAL: {expected[0]}/{expected[1]}/1000" in lines
        assert args.train_as_classification == (task not in ("Copa", "SQuAD"))
    assert arguments("mezo.sh", {"TASK": "WSC", "TRAIN": 54, "DEV": 10})[0].num_train == 54


def test_a_batch_of_long_prompts_is_taken_in_parts(arguments, call):
    for task, parts in {"SST2": (8, 1), "SQuAD": (2, 4), "DROP": (1, 8)}.items():
        args, lines = arguments("finetune.sh", {"TASK": task})
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == parts
        assert f"BS: 8 ({parts[0]} at a time)" in lines
    refused = call("finetune.sh", {"TASK": "SQuAD", "BS": 5})
    assert refused.status == 2 and "BS=5" in refused.error.splitlines()[-1] and not refused.words


@pytest.mark.parametrize("script", ["mezo.sh", "finetune.sh"])
def test_what_a_script_does_not_know_is_refused_in_a_line(call, script):
    for size in ("0", "many"):
        refused = call(script, {"BS": size})
        assert (refused.status, refused.words) == (2, [])
        assert refused.error == f"{script}: BS={size} is no number of rows\n"
    refused = call(script, {"MODE": "nonsense"})
    assert (refused.status, refused.words) == (2, [])
    assert "nonsense" in refused.error and len(refused.error.splitlines()) == 1


def test_a_recipe_brings_its_mode(arguments):
    args, lines = arguments("mezo.sh", {"RECIPE": "fast"})
    assert "MODE: xgblora" in lines and args.recipe == "fast" and args.xgblora_steps_per_iteration == 25
    args, lines = arguments("mezo.sh", {"RECIPE": "atoms"})
    assert "MODE: lora" in lines and args.recipe == "atoms" and args.lora and not args.xgblora


def test_finetune_sh_back_propagates_for_epochs(arguments):
    settings = {"MODE": "lora", "TRAIN": 16, "DEV": 4, "EVAL": 4, "BS": 4, "EPOCH": 2, "SEED": 3, "LR": 1e-3}
    args, lines = arguments("finetune.sh", settings)
    assert "EPOCH: 2" in lines and "BS: 4 (4 at a time)" in lines
    expected = {
        "trainer": "regular", "lora": True, "num_train_epochs": 2, "per_device_train_batch_size": 4,
        "seed": 3, "learning_rate": 1e-3, "eval_strategy": "epoch", "save_strategy": "epoch",
        "train_as_classification": True,
        "num_train": 16, "num_dev": 4, "num_eval": 4, "tag": "finetune-lora-2-4",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_icl_sh_shows_demonstrations(arguments):
    for more, train_set in (({}, None), ({"SEED": 5}, 5)):
        args, _ = arguments("icl.sh", {"TRAIN": 4, "EVAL": 4, **more})
        assert (args.trainer, args.num_train, args.num_eval, args.train_set_seed) == ("none", 4, 4, train_set)


def test_flags_of_run_py_come_last_and_win(arguments):
    args, _ = arguments(
        "mezo.sh", {"MODE": "lora", "BS": 4}, "--per_device_train_batch_size", "2", "--lora_r", "4"
    )
    assert (args.per_device_train_batch_size, args.lora_r) == (2, 4)


@pytest.mark.parametrize("script, half", [("mezo.sh", "--load_float16"), ("finetune.sh", "--load_bfloat16")])
def test_half_precision_on_a_gpu_unless_a_flag_says_otherwise(call, script, half):
    assert half in call(script, {}, gpu=True).words
    assert "--load_float16" not in (words := call(script, {}, "--load_int8", gpu=True).words)
    assert "--load_bfloat16" not in words and words[-1] == "--load_int8"


def test_several_gpus_are_one_torchrun(call):
    words = call("mezo.sh", {"NUM_GPU": 4}).words
    assert words[:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "4", "run.py"]
