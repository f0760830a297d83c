"""`run.py` end to end on a tiny model: three trainers, three modes, resume, adapters, results."""

import json
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from support.data import TRAIN
from support.models import tiny_model, tiny_tokenizer
from support.runs import BOOST, ZO, adapter_bytes, in_folder, write_gguf
from transformers import AutoModelForCausalLM

import run
from cli import load_model, results
from lora import LoRA
from training import checkpoints

ROOT = Path(run.__file__).parent


def test_a_run_that_is_longer_than_asked_for_is_not_its_result(go, capsys):
    go("--trainer zo --lora --max_steps 4 --output_dir out")
    go("--trainer zo --lora --max_steps 2 --output_dir out", status=2)
    assert "a run of 4 steps" in capsys.readouterr().err
    go("--trainer zo --lora --max_steps 6 --output_dir out")  # a longer one goes on


def test_where_nothing_is_evaluated_or_written_no_weight_is_read(go, monkeypatch):
    def fail(*args):
        raise AssertionError("the model is read")

    monkeypatch.setattr(load_model, "read_model", fail)
    assert "accuracy" not in go("--no_eval --num_train 0")


def test_the_order_of_the_rows_is_part_of_a_run(go, capsys):
    go("--trainer zo --lora --max_steps 2 --output_dir out --data_seed 5")
    go("--trainer zo --lora --max_steps 4 --output_dir out --data_seed 6", status=2)
    assert "data_seed" in capsys.readouterr().err


def test_the_short_step_at_the_end_of_an_epoch_is_counted_as_it_was(go):
    flags = (
        "--trainer zo --lora --num_train 10 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    )
    assert go(f"{flags} --num_train_epochs 2 --output_dir out")["forward_passes"] == 2 * 2 * 5
    assert go(f"{flags} --max_steps 4 --output_dir steps")["forward_passes"] == 2 * (5 + 2)


def test_seeds_stand_in_one_row_whatever_is_written_how_often(go, tmp_path):
    (tmp_path / "kept").mkdir()
    for seed, more in enumerate(
        ("", "--overwrite", "--logging_steps 5 --save_on_interrupt", "--lora_alpha 16")
    ):
        go(f"--trainer zo --lora --max_steps 1 --output_dir out{seed} --seed {seed} {more}")
        (tmp_path / "result.json").rename(tmp_path / "kept" / f"{seed}.json")
    rows = results.results_table(tmp_path / "kept")[1:]
    assert rows and all(row.split()[4] == "4" for row in rows), rows


@pytest.mark.parametrize("trainer", ["regular", "zo"])
@pytest.mark.parametrize("mode", ["", "--lora", "--xgblora --xgblora_steps_per_iteration 2"])
def test_every_trainer_in_every_mode_gives_a_number_and_a_model(go, trainer, mode):
    result = go(
        f"--trainer {trainer} {mode} --max_steps 5 --output_dir out --save_model --save_merged --num_dev 8"
    )
    assert 0 <= result["accuracy"] <= 1 and 0 <= result["dev_accuracy"] <= 1
    assert result["forward_passes"] == (10 if trainer == "zo" else 5)
    assert result["args"]["trainer"] == trainer and result["seed"] == 42
    assert result["versions"]["torch"] == torch.__version__ and result["peak_memory_mb"] > 0
    saved = "adapter_model.safetensors" if mode else "model.safetensors"
    assert (Path("out") / saved).exists()
    merged = go("--trainer none --num_train 0", model="out/merged")
    assert merged["loss"] == pytest.approx(result["loss"], rel=1e-4)


@pytest.mark.parametrize("family", ["opt", "opt-350m", "qwen2", "gpt2"])
def test_other_families_train(go, family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    trained = go(BOOST, model=tmp_path / family)
    assert trained["sets"][0]["boosters"] == 2 and trained["forward_passes"] == 12
    loaded = go("--trainer none --num_train 0 --adapter out", model=tmp_path / family)
    assert loaded["loss"] == pytest.approx(trained["loss"], rel=1e-4)


def test_zero_shot_equals_a_plain_loop(go, model_dir, data_dir):
    result = go("--trainer none --num_train 0")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir).eval(), tiny_tokenizer()
    right = 0
    for sentence, label in TRAIN:
        scores = []
        for word in ("terrible", "great"):
            prompt, text = f"{sentence} It was", f"{sentence} It was {word}"
            ids = tokenizer.encode(text)
            n = len(ids) - len(tokenizer.encode(prompt))
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logprobs[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))) / n)
        right += int(scores[1] > scores[0]) == label
    assert result["accuracy"] == right / len(TRAIN)


def test_demonstrations_and_calibration_change_the_scores(go):
    losses = [go(f"--trainer none {flags}")["loss"] for flags in ("--num_train 0", "--sfc --num_train 0")]
    losses += [go(f"--trainer none --num_train 2 {flags}")["loss"] for flags in ("--train_set_seed 0", "")]
    assert len(set(losses)) == 4


def test_a_rerun_after_a_crash_ends_with_the_same_bytes(go):
    """In-process: the run dies in the middle of the step after a checkpoint."""
    go(f"{BOOST} --max_steps 11")
    expected = adapter_bytes()
    for path in checkpoints.list_checkpoints("out"):
        if path.name != "checkpoint-6":  # in the middle of the second round
            subprocess.run(["rm", "-r", str(path)], check=True)
    for name in ("adapter_model", "boosters"):
        (Path("out") / f"{name}.safetensors").unlink()
    result = go(f"{BOOST} --max_steps 11")
    assert adapter_bytes() == expected and result["forward_passes"] == 22


@pytest.mark.parametrize("mode", ["", "--load_bfloat16"])
def test_full_parameters_resume_with_the_same_bits(go, mode):
    go(f"{ZO} {mode} --save_steps 3 --weight_decay 0.1")
    expected = (Path("out") / "model.safetensors").read_bytes()
    subprocess.run(["rm", "-r", "out/checkpoint-6", "out/model.safetensors"], check=True)
    go(f"{ZO} {mode} --save_steps 3 --weight_decay 0.1")
    assert (Path("out") / "model.safetensors").read_bytes() == expected


def test_a_finished_run_trains_no_more_and_evaluates(go, caplog):
    caplog.set_level("INFO")
    first = go(BOOST)
    expected = adapter_bytes()
    again = go(BOOST)
    assert "is finished (step 6)" in caplog.text
    assert adapter_bytes() == expected
    assert {k: v for k, v in again.items() if k in ("accuracy", "loss", "forward_passes")} == {
        k: v for k, v in first.items() if k in ("accuracy", "loss", "forward_passes")
    }


def test_a_longer_run_goes_on_from_a_shorter_one(go):
    go(f"{BOOST} --max_steps 9")
    expected = adapter_bytes()
    subprocess.run(["rm", "-r", "out"], check=True)
    go(BOOST)
    go(f"{BOOST} --max_steps 9")
    assert adapter_bytes() == expected


OTHERS = {
    "seed": "--seed 1",
    "zo_eps": "--zo_eps 0.5",
    "learning_rate": "--learning_rate 0.5",
    "xgblora_steps_per_iteration": "--xgblora_steps_per_iteration 3",
    "batch": "--per_device_train_batch_size 4",
    "rows": "--num_train 12",
    "load_bfloat16": "--load_bfloat16",
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_in_the_same_directory_is_refused(go, capsys, name):
    go(BOOST)
    go(f"{BOOST} {OTHERS[name]}", status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("run.py: error:") and f"{name} " in error and "--overwrite" in error
    go(f"{BOOST} {OTHERS[name]} --overwrite")


def test_another_model_or_other_data_in_the_same_directory_is_refused(go, capsys, tmp_path, data_dir):
    go(BOOST)
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "other")  # same shape, other weights
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    go(BOOST, model=tmp_path / "other", status=2)
    assert "model " in capsys.readouterr().err.splitlines()[-1]
    text = (data_dir / "SST2" / "train.jsonl").read_text().replace("warmth", "cold")
    for split in ("train", "validation"):
        (tmp_path / "data" / "SST2").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "SST2" / f"{split}.jsonl").write_text(text)
    go(f"{BOOST} --data_dir {tmp_path / 'data'}", status=2)
    assert "data " in capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_is_known_by_what_it_holds(go, capsys):
    for name, seed in (("one", 1), ("two", 2), ("here", 1)):
        go(f"{BOOST.replace('--output_dir out', f'--output_dir {name}')} --seed {seed} --save_model")
    more = in_folder("more")
    go(f"{more} --adapter here")
    go(f"{more} --adapter one/")  # the same bytes in another place
    go(f"{more} --adapter two", status=2)
    assert "adapter " in capsys.readouterr().err.splitlines()[-1]


def test_no_argument_is_hidden_as_a_secret():
    assert run.parse(["--eos_token", "."]).to_dict()["eos_token"] == "."


@pytest.mark.parametrize("trainer", ["zo", "regular"])
def test_a_run_under_autocast_is_evaluated_as_its_rerun_is(go, trainer):
    flags = f"--trainer {trainer} --lora --max_steps 3 --bf16 --use_cpu --output_dir out"
    assert go(flags)["loss"] == go(flags)["loss"]


def test_a_table_keeps_ways_of_drawing_demonstrations_apart(go, tmp_path):
    (tmp_path / "kept").mkdir()
    for i, more in enumerate(("", "--train_set_seed 0", "--train_set_seed 1")):
        go(f"--num_train 2 {more}")
        (tmp_path / "result.json").rename(tmp_path / "kept" / f"{i}.json")
    assert sorted(
        row.split()[4] for row in results.results_table(tmp_path / "kept")[1:] if " loss " in row
    ) == [
        "1",
        "2",
    ]


@pytest.mark.parametrize(
    "eval_steps, values", [(2, (0.1, 0.9, 0.2, 0.3)), (1, (0.1, 0.2, 0.3, 0.8, 0.9, 0.7, 0.1, 0.1))]
)
def test_the_best_checkpoint_comes_back(go, monkeypatch, eval_steps, values):
    """The model of step 4 is the best that has a checkpoint; its live booster is merged."""
    flags = (
        f"{BOOST} --max_steps 8 --num_dev 4 --eval_strategy steps "
        f"--eval_steps {eval_steps} --load_best_model_at_end"
    )
    flags += " --no_eval --xgblora_steps_per_iteration 3"
    left, evaluate = iter(values), run.Framework.evaluate
    monkeypatch.setattr(
        run.Framework,
        "evaluate",
        lambda self, *a, **k: {**evaluate(self, *a, **k), "accuracy": next(left, 0.5)},
    )
    go(flags)
    best = adapter_bytes()
    lora = LoRA(tiny_model("llama"), 1, 16, xgblora=True, seed=42)
    lora.load("out/checkpoint-4")
    lora.merge_and_reinit()
    lora.save_pretrained("expected")
    assert adapter_bytes("expected") == best
    again = go(flags)  # finished: the best one again
    assert adapter_bytes() == best and again["sets"][0]["boosters"] == 2


@pytest.mark.parametrize("mode", ["--lora --lora_r 3", "--xgblora --xgblora_steps_per_iteration 4"])
def test_a_saved_adapter_evaluates_to_the_same_numbers(go, mode):
    trained = go(f"{ZO} {mode} --load_bfloat16")
    saved = go("--trainer none --num_train 0 --adapter out --load_bfloat16")
    assert saved["accuracy"] == trained["accuracy"] and saved["loss"] == trained["loss"]


def test_any_prefix_of_the_chain_can_be_evaluated(go, capsys):
    """The chain of 11 steps, cut to two boosters, is the checkpoint at step 8: two merged, none trained."""
    go(f"{BOOST} --max_steps 11 --save_steps 8")
    flags = "--trainer none --num_train 0 --adapter"
    losses = [go(f"{flags} out --boosters {k}")["loss"] for k in range(4)]
    assert len(set(losses)) == 4
    assert losses[0] == pytest.approx(go("--trainer none --num_train 0")["loss"], rel=1e-6)
    assert losses[2] == go(f"{flags} out/checkpoint-8")["loss"] and losses[3] == go(f"{flags} out")["loss"]
    go(f"{flags} out --boosters 9", status=2)
    assert "--boosters 9" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("mode", ["--lora", "--xgblora --xgblora_steps_per_iteration 3"])
def test_other_linear_layers_can_be_adapted(go, mode, capsys):
    flags = f"{ZO} {mode} --lora_targets k_proj,down_proj"
    result = go(flags)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "k_proj"]
    assert go("--trainer none --num_train 0 --adapter out")["loss"] == pytest.approx(result["loss"], rel=1e-6)
    go(f"{ZO} {mode} --lora_targets nothing --output_dir other", status=2)
    assert "called nothing" in capsys.readouterr().err.splitlines()[-1]


def test_training_goes_on_from_an_adapter(go):
    go(BOOST)
    result = go(in_folder("more") + " --adapter out")
    assert result["sets"][0]["boosters"] == 4


def test_several_sets_start_from_a_fresh_model_each(go):
    result = go(f"{BOOST} --num_train_sets 2 --train_set_seed 3")
    alone = go(in_folder("alone") + " --train_set_seed 4")
    assert [s["train_set"] for s in result["sets"]] == [3, 4]
    assert adapter_bytes("out/trainset4") == adapter_bytes("alone")
    assert (
        result["accuracy"] == sum(s["accuracy"] for s in result["sets"]) / 2
        and alone["sets"][0]["train_set"] == 4
    )


def test_seed_drives_directions_a_and_the_training_set(go):
    go(BOOST)
    first = adapter_bytes()
    go(in_folder("same"))
    go(in_folder("other") + " --seed 1 --train_set_seed 42")
    assert adapter_bytes("same") == first and adapter_bytes("other") != first


def test_without_flags_names_are_what_the_documents_say(model_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = f"--model_name {model_dir} --data_dir {data_dir} --num_eval 4"
    assert run.main(common.split()) == 0
    assert (
        run.main(f"{common} --trainer zo --xgblora --max_steps 2 --num_train 8 --num_dev 4 --tag x".split())
        == 0
    )
    assert (tmp_path / "result/SST2-tiny-llama-sampleeval4-onetrainpereval.json").exists()
    assert (tmp_path / "result/SST2-tiny-llama-sampleeval4-ntrain8-ndev4-x-trainset42.json").exists()
    assert (tmp_path / "result/SST2-tiny-llama-xgblora-zo-x-seed42-trainset42/checkpoint-2").is_dir()


def test_learning_rate_and_eps_default_by_mode():
    def defaults(flags):
        args = run.parse(flags.split())
        return args.learning_rate, args.zo_eps, args.lr_scheduler_type.value, args.max_grad_norm, args.lora_r

    assert defaults("--trainer zo") == (1e-6, 1e-3, "constant", 0, 8)
    assert defaults("--trainer zo --lora") == (5e-5, 1e-2, "constant", 0, 8)
    assert defaults("--trainer zo --xgblora")[2:] == ("constant", 0, 1)
    assert defaults("--trainer zo --xgblora --zo_normalize --lora_freeze_a")[2] == "linear"
    assert defaults("--trainer zo --xgblora --learning_rate 1e-5 --zo_eps 1e-3")[:2] == (1e-5, 1e-3)
    assert defaults("--trainer regular --lora")[2:] == ("linear", 1.0, 8)
    assert defaults("--trainer zo --warmup_steps 4")[2] == "constant_with_warmup"


def test_the_rate_of_normalised_steps_falls_with_the_length_of_a_run():
    def rate(steps, flags="--recipe fast"):
        return run.parse(f"--trainer zo {flags} --max_steps {steps}".split()).learning_rate

    assert rate(400) == rate(1500) == 1e-2 and rate(1500, "--recipe atoms") == 5e-4 == 2 * rate(
        6000, "--recipe atoms"
    )
    assert 1500 * rate(1500) ** 2 == pytest.approx(20000 * rate(20000) ** 2)  # Σ η² stays
    for recipe in ("fast", "atoms"):  # a run at a constant rate may go on and on
        constant = f"--recipe {recipe} --lr_scheduler_type constant"
        assert rate(20000, constant) == rate(400, constant)
    assert rate(20000, "--recipe fast --zo_normalize False") == rate(
        400, "--recipe fast --zo_normalize False"
    )


def test_every_command_of_the_evidence_is_understood(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "research"))
    import arms

    lines = {arm.line(0) for arm in arms.grid() if arm.runnable and arm.flags != arms.BIAS}
    assert len(lines) > 100
    for line in lines:
        run.parse(line.removeprefix("python run.py ").split())


def test_weights_in_an_unsafe_format_are_read_without_running_code(go, tmp_path):
    """The OPT checkpoints on the hub are `.bin` files."""
    model = tiny_model("opt")
    folder = tmp_path / "opt-bin"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    plain = go("--trainer none --num_train 0", model=folder)
    model.save_pretrained(tmp_path / "opt")
    tiny_tokenizer().save_pretrained(tmp_path / "opt")
    assert go("--trainer none --num_train 0", model=tmp_path / "opt")["loss"] == plain["loss"]

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({**model.state_dict(), "evil": Evil()}, folder / "pytorch_model.bin")
    go("--trainer none --num_train 0", model=folder, status=2)
    assert not (tmp_path / "ran").exists()


def test_a_gguf_file_is_a_model_that_trains_and_can_be_saved(go, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    trained = go("--trainer zo --max_steps 2 --output_dir out --save_model", model=tmp_path / "tiny.gguf")
    assert go("--trainer none --num_train 0", model="out")["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    go(f"{BOOST} --output_dir boosted", model=tmp_path / "tiny.gguf")


def test_a_gguf_file_has_the_weights_of_the_model(tmp_path):

    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    model = load_model.load_gguf(tmp_path / "tiny.gguf", torch.float32)
    expected = tiny_model("llama").state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_an_adapter_is_merged_without_training(go):
    result = go(BOOST)
    go("--trainer none --num_train 0 --adapter out --no_eval --save_merged --output_dir plain", result=False)
    assert go("--trainer none --num_train 0", model="plain/merged")["loss"] == pytest.approx(
        result["loss"], rel=1e-4
    )


def test_the_engine_alone_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"] == {"packages": ["zo"]}


PROGRAMS = [
    path
    for folder in ("bench", "research", "tests/stress")
    for path in sorted((ROOT / folder).glob("*.py"))
    if not path.name.startswith("test_")
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_the_imports_of_a_program_beside_the_tests_are_there(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(path.parent)])
    assert callable(runpy.run_path(str(path), run_name="imported")["grid" if path.stem == "arms" else "main"])
