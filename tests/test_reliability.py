"""Kill or starve a run: it goes on with the bytes of an undisturbed run, and runs no file that it reads."""

import io
import json
import os
import pickle
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from support import processes
from support.models import tiny_model, tiny_tokenizer
from support.runs import BOOST, adapter_bytes, replace_in_checkpoint

import run
from boosters import rounds
from distributed import stop_signals
from framework import Framework
from scoring import logprobs
from trainer import OurTrainer
from training import boosting_trainer, checkpoints

ROOT = Path(run.__file__).parent
LONG = f"{BOOST} --max_steps 11 --save_on_interrupt"
BEST = f"{LONG} --num_dev 8 --eval_strategy steps --eval_steps 2 --load_best_model_at_end --metric loss"


@pytest.fixture
def calm(go):
    """calm(flags) -> (adapter, logged evaluations, result) of an undisturbed run; `out` is removed."""

    def once(flags: str):
        result = go(flags)
        found = adapter_bytes(), evaluations(), {k: result[k] for k in ("accuracy", "loss", "forward_passes")}
        shutil.rmtree("out")
        return found

    return once


def evaluations(path="out"):
    last = checkpoints.list_checkpoints(path)[-1]
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]


def at_step(monkeypatch, step: int, act, cls=OurTrainer, name="training_step"):
    """Do `act()` in the n-th call of a method, before it."""
    calls, original = [], getattr(cls, name)

    def wrapped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, wrapped)


def send(number):
    return lambda: os.kill(os.getpid(), number)


# ---- signals ----


@pytest.mark.parametrize("number", stop_signals.StopSignals.NUMBERS)
@pytest.mark.parametrize("step", [3, 5])
def test_a_signal_finishes_the_step_saves_it_and_the_rerun_ends_with_the_same_bytes(
    go, calm, monkeypatch, number, step, capsys
):  # fmt: skip
    expected = calm(LONG)[0]
    before = [signal.getsignal(n) for n in stop_signals.StopSignals.NUMBERS]
    with monkeypatch.context() as patch:
        at_step(patch, step, send(number))
        go(LONG, status=stop_signals.EXIT_REQUEUE)
    assert signal.Signals(number).name in capsys.readouterr().err
    assert [signal.getsignal(n) for n in stop_signals.StopSignals.NUMBERS] == before
    assert checkpoints.list_checkpoints("out")[-1].name == f"checkpoint-{step}"
    assert not (Path("out") / "adapter_model.safetensors").exists()
    go(LONG)
    assert adapter_bytes() == expected


@pytest.mark.parametrize("step", [4, 8])  # 8 is the last one, which nothing else would save
def test_a_signal_in_a_line_search_stops_after_its_step(go, calm, monkeypatch, step):
    flags = f"{LONG} --max_steps 8 --xgblora_adaptive --xgblora_patience 4 --num_dev 8 --save_strategy no"
    expected, _, result = calm(f"{flags} --save_strategy steps")
    search = rounds.line_search

    def interrupted_search(lora, dev_loss):
        if len(ended) == step // 4 - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        ended.append(step)
        return search(lora, dev_loss)

    ended = []
    with monkeypatch.context() as patch:
        patch.setattr(boosting_trainer, "line_search", interrupted_search)
        go(flags, status=stop_signals.EXIT_REQUEUE)
    assert [path.name for path in checkpoints.list_checkpoints("out")] == [f"checkpoint-{step}"]
    assert go(flags)["accuracy"] == result["accuracy"]
    assert adapter_bytes() == expected


def test_a_second_interrupt_stops_at_once(go, monkeypatch):
    at_step(monkeypatch, 5, lambda: (send(signal.SIGINT)(), send(signal.SIGINT)()))
    go(LONG, status=130)
    assert checkpoints.list_checkpoints("out")[-1].name == "checkpoint-4"


def test_without_the_flag_an_interrupt_stops_at_once_and_says_so(go, monkeypatch, capsys):
    at_step(monkeypatch, 5, send(signal.SIGINT))
    # A shell starts what it puts into the background with SIGINT ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        go(BOOST, status=130)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("nth", [1, 2, 3, 6])
@pytest.mark.parametrize("flags", [BEST, BEST.replace("--save_steps 2", "--save_steps 4")])
def test_an_evaluation_that_is_cut_off_is_made_up_for(go, calm, monkeypatch, nth, flags):
    """Same bytes, same evaluations, same best checkpoint, also where the save was not due at that step."""
    expected = calm(flags)
    with monkeypatch.context() as patch:
        at_step(patch, nth, send(signal.SIGTERM), Framework, "evaluate")
        go(flags, status=stop_signals.EXIT_REQUEUE)
    assert checkpoints.list_checkpoints("out")[-1].name == f"checkpoint-{min(2 * nth, 11)}"
    result = go(flags)
    assert adapter_bytes() == expected[0]
    assert evaluations() == expected[1][: 5 if nth == 6 else None]  # the last checkpoint is not written again
    assert {k: result[k] for k in expected[2]} == expected[2]


STEPS = BEST.replace("--max_steps 11", "--max_steps 6")
EPOCHS = BEST.replace("--max_steps 11", "--max_steps -1 --num_train_epochs 3 --per_device_train_batch_size 4")
EPOCHS = EPOCHS.replace("--eval_strategy steps --eval_steps 2", "--eval_strategy epoch --save_strategy epoch")


@pytest.mark.parametrize(
    "flags, step",
    [(STEPS, 6), (EPOCHS, 6), (EPOCHS, 8), (EPOCHS, 12), (f"{STEPS} --save_strategy best", 4)],
    ids=["last step", "middle of an epoch", "end of an epoch", "end of the last epoch", "a new best"],
)
def test_a_signal_changes_neither_evaluations_nor_the_best(go, calm, monkeypatch, flags, step):
    losses = {2: 0.7, 4: 0.5, 6: 0.6 if "best" in flags.split()[-1] else 0.2, 8: 0.1, 12: 0.4}
    evaluate = Framework.evaluate

    def forced(self, *args, **kwargs):
        found = evaluate(self, *args, **kwargs)
        return {**found, "loss": losses[self.trainer.state.global_step]}

    monkeypatch.setattr(Framework, "evaluate", forced)
    expected = calm(flags)[:2]
    with monkeypatch.context() as patch:
        at_step(patch, step, send(signal.SIGTERM))
        go(flags, status=stop_signals.EXIT_REQUEUE)
    go(flags)  # what it makes up for at the step of a checkpoint is not written into that one
    assert adapter_bytes() == expected[0] and evaluations() == expected[1][: len(evaluations())]


def test_what_an_earlier_run_left_is_not_taken_for_the_result(go):
    go(f"{BOOST} --learning_rate 1e-1")
    for mode, flag in (("--lora", "--adapter out"), ("", "--model_name out")):
        result = go(f"--trainer zo {mode} --max_steps 2 --save_model --overwrite --output_dir out")
        assert go(f"--trainer none --num_train 0 {flag}")["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_the_final_evaluation_can_be_interrupted(go, calm, monkeypatch):
    expected = calm(LONG)
    with monkeypatch.context() as patch:
        at_step(patch, 1, send(signal.SIGUSR1), Framework, "predict")
        go(LONG, status=stop_signals.EXIT_REQUEUE)
    result = go(LONG)
    assert adapter_bytes() == expected[0] and {k: result[k] for k in expected[2]} == expected[2]


# ---- checkpoints that are not whole ----


def truncate(path: Path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flip(path: Path):
    file = path / "boosters.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


DAMAGES = {
    "truncated": truncate,
    "a flipped bit": flip,
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "a file is missing": lambda path: (path / "optimizer.pt").unlink(),
    "manifest is no JSON": lambda path: (path / "manifest.json").write_text("{"),
    "manifest is a list": lambda path: (path / "manifest.json").write_text("[1]"),
    "manifest names a file elsewhere": lambda path: (path / "manifest.json").write_text(
        json.dumps({"../../../etc/hostname": {"bytes": 1, "sha256": "0"}})
    ),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(go, calm, name, caplog):
    expected = calm(LONG)[0]
    go(LONG)
    shutil.rmtree("out/checkpoint-11")
    DAMAGES[name](Path("out/checkpoint-10"))
    caplog.set_level("INFO")
    go(LONG)
    assert (
        "skipping checkpoint out/checkpoint-10" in caplog.text
        and "going on from out/checkpoint-8" in caplog.text
    )
    assert adapter_bytes() == expected


def test_a_checkpoint_of_an_earlier_version_is_refused_in_a_line(go, capsys):
    """Whatever else differs, and whether or not the run is finished."""
    go(BOOST)
    path = checkpoints.list_checkpoints("out")[-1]
    settings = json.loads((path / "settings.json").read_text())
    assert settings.pop("format") == checkpoints.FORMAT
    replace_in_checkpoint(path, "settings.json", json.dumps(settings).encode())
    for flags in (BOOST, f"{BOOST} --max_steps 12 --lora_alpha 3"):
        go(flags, status=2)
        line = capsys.readouterr().err.splitlines()[-1]
        assert (
            "checkpoint-6 was written by an earlier version" in line and "--overwrite starts afresh" in line
        )
    go(f"{BOOST} --overwrite")


def test_when_all_are_damaged_the_run_is_refused(go, capsys):
    go(BOOST)
    for path in checkpoints.list_checkpoints("out"):
        truncate(path)
    go(BOOST, status=2)
    assert "every checkpoint" in capsys.readouterr().err.splitlines()[-1]
    go(f"{BOOST} --overwrite")


def test_where_none_was_ever_completed_it_starts_afresh_and_says_so(go, caplog):
    Path("out/.partial/checkpoint-2").mkdir(parents=True)
    (Path("out/.partial/checkpoint-2") / "optimizer.pt").write_bytes(b"half")
    go(BOOST)
    assert "was ever completed" in caplog.text and not Path("out/.partial").exists()


def test_a_limit_on_checkpoints_keeps_the_newest_and_the_best(go):
    go(f"{BEST} --save_total_limit 1 --learning_rate 1")
    kept = [path.name for path in checkpoints.list_checkpoints("out")]
    best = json.loads(Path("out/checkpoint-11/trainer_state.json").read_text())["best_model_checkpoint"]
    assert kept[-1] == "checkpoint-11" and set(kept) <= {"checkpoint-11", Path(best).name}


# ---- a full disk ----


def starved(flags, model_dir, data_dir, changes) -> processes.Done:
    """A run in which no file may grow beyond so many bytes from a step on: {step: bytes, or -1 for any}."""
    common = f"--model_name {model_dir} --data_dir {data_dir} --result_file result.json --disable_tqdm True"
    argv = f"{common} --train_as_classification --num_train 16 {flags}".split()
    return processes.call(processes.train_starved, argv, changes, folder=Path.cwd())


def test_a_full_disk_costs_a_checkpoint_and_no_more(calm, model_dir, data_dir):
    expected = calm(LONG)[0]
    done = starved(LONG, model_dir, data_dir, {3: 100, 7: -1})
    assert done.status == 0, done.err[-800:]
    assert done.err.count("could not be saved") == 1 and "checkpoint-4" in done.err
    assert [p.name for p in checkpoints.list_checkpoints("out")] == [
        "checkpoint-2",
        *(f"checkpoint-{i}" for i in (8, 10, 11)),
    ]
    assert adapter_bytes() == expected


def test_a_disk_that_stays_full_ends_the_run_with_1_and_the_old_checkpoint_whole(
    go, calm, model_dir, data_dir
):
    expected = calm(LONG)[0]
    done = starved(LONG, model_dir, data_dir, {5: 100})
    assert done.status == 1 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("run.py: error")
    assert [p.name for p in checkpoints.list_checkpoints("out")] == ["checkpoint-2", "checkpoint-4"]
    assert not Path("out/.partial").exists() and checkpoints.newest_checkpoint("out").name == "checkpoint-4"
    go(LONG)
    assert adapter_bytes() == expected


# ---- failures inside a step ----


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
              RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
)  # fmt: skip
def test_memory_that_is_out_says_what_to_try(go, calm, monkeypatch, capsys, error):
    expected, loss, calls = calm(LONG)[0], logprobs.loss, []

    def failing(model, batch, classification, copies=None):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return loss(model, batch, classification, copies)

    with monkeypatch.context() as patch:
        patch.setattr(logprobs, "loss", failing)
        go(LONG, status=1)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--per_device_train_batch_size" in said and said.startswith("run.py: error: out of memory")
    go(LONG)
    assert adapter_bytes() == expected


def test_losses_that_stay_nan_end_the_run_with_1_and_advice(go, monkeypatch, capsys):
    monkeypatch.setattr(logprobs, "loss", lambda *a, **k: torch.tensor(float("nan")))
    go("--trainer zo --lora --max_steps 80 --output_dir out --learning_rate 1", status=1)
    assert "Lower the learning rate" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("mode", ["--lora", "", "--load_bfloat16"])
def test_an_error_in_the_middle_of_a_step_leaves_the_weights_of_the_last_one(go, monkeypatch, mode):
    """In a callback, and between the two forwards of a step."""
    made, loss, calls = [], logprobs.loss, []

    def failing(model, batch, classification, copies=None):
        calls.append(1)
        if len(calls) == 8:
            raise ZeroDivisionError
        return loss(model, batch, classification)

    def noting(self, *args, **kwargs):
        made.append(self.model)
        return step(self, *args, **kwargs)

    step = OurTrainer.training_step
    monkeypatch.setattr(logprobs, "loss", failing)
    monkeypatch.setattr(OurTrainer, "training_step", noting)
    flags = f"--trainer zo {mode} --zo_batched off --save_steps 1 --output_dir out --learning_rate 1e-2"
    with pytest.raises(ZeroDivisionError):
        go(f"{flags} --max_steps 9")
    state = {k: v.clone() for k, v in made[-1].state_dict().items()}
    done = len(checkpoints.list_checkpoints("out"))
    monkeypatch.setattr(logprobs, "loss", loss)
    made.clear()
    go(f"{flags} --max_steps {done} --output_dir fresh")
    assert all(torch.equal(v, state[k]) for k, v in made[-1].state_dict().items())


# ---- reruns ----


def test_other_batches_of_the_same_sum_go_on(go):
    go(BOOST)
    go(
        f"{BOOST} --max_steps 8 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 2 --logging_steps 1"
    )
    assert checkpoints.list_checkpoints("out")[-1].name == "checkpoint-8"


def test_an_evaluation_writes_nothing_into_a_runs_directory_and_is_never_refused(go):
    go(BOOST)
    before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")}
    go("--trainer none --num_train 0 --output_dir out --seed 9 --adapter out")
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")} == before


def test_the_lock_dies_with_its_owner(go, tmp_path):
    owner = processes.Child(processes.hold_lock, "out", folder=tmp_path)
    processes.wait_for(Path("locked").exists)
    go(BOOST, status=2)
    owner.kill()
    go(BOOST)


# ---- nothing is unpickled that could run ----


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state": Evil()}, buffer)
    return buffer.getvalue()


PICKLES = {"plain pickle": pickle.dumps(Evil()), "torch.save": torch_file()}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_malicious_file_in_a_checkpoint_never_runs(go, name, kind, capsys):
    go(BOOST)
    shutil.rmtree("out/checkpoint-6")
    replace_in_checkpoint(Path("out/checkpoint-4"), name, PICKLES[kind])
    read = name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    go(BOOST, status=2 if read else 0)
    assert not Path("ran").exists() and not (ROOT / "ran").exists()
    if read:
        assert "--overwrite" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "boosters.safetensors"])
def test_a_malicious_file_in_an_adapter_never_runs(go, name, kind):
    go(BOOST)
    for file in ("adapter_model.safetensors", "boosters.safetensors"):
        if name.endswith(".bin") or file == name:
            (Path("out") / file).unlink()
    (Path("out") / name).write_bytes(PICKLES[kind])
    go("--trainer none --num_train 0 --adapter out", status=0 if name == "adapter_model.safetensors" else 2)
    assert not Path("ran").exists()


CODE = """
import os
os.system("touch ran")
from transformers import LlamaConfig, LlamaForCausalLM
from distributed import stop_signals
from scoring import logprobs
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_by_flag_only(go, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "own-llama", "auto_map": classes})
    )
    (folder / "own.py").write_text(CODE)
    go("--trainer none --num_train 0", model=folder, status=2)
    assert "trust_remote_code" in capsys.readouterr().err.splitlines()[-1] and not Path("ran").exists()
    go("--trainer none --num_train 0 --trust_remote_code", model=folder)
    assert Path("ran").exists()


def test_what_a_run_writes_is_tensors_and_text(go):
    """The only pickles are the Trainer's own three, which hold no code (`weights_only` reads them)."""
    go(f"{BOOST} --save_merged --predictions rows.jsonl")
    for file in (p for p in Path().rglob("*") if p.is_file()):
        if file.suffix in (".pt", ".pth"):
            assert file.name in ("optimizer.pt", "scheduler.pt", "rng_state.pth") and zipfile.is_zipfile(file)
            with torch.serialization.safe_globals([]):
                if file.name != "rng_state.pth":  # numpy's state needs the Trainer's list of safe names
                    torch.load(file, weights_only=True)
        else:
            assert (
                file.suffix in (".json", ".jsonl", ".safetensors", ".lock", ".jinja", "")
                and file.read_bytes()[:2] != b"\x80\x04"
            )


def test_nothing_is_written_outside_the_output_the_result_and_the_predictions(
    go, tmp_path, data_dir, model_dir
):
    """The tree of the program, the model, the data and the working directory stay as they are."""
    places = [p for p in ROOT.iterdir() if p.suffix in (".py", ".sh", ".md")] + [
        Path(data_dir),
        Path(model_dir),
    ]
    snapshot = lambda: {  # noqa: E731
        p: p.stat().st_mtime_ns
        for place in places
        for p in ([place] if place.is_file() else place.rglob("*"))
    }
    before = snapshot()
    go(f"{BOOST} --predictions rows.jsonl --save_merged")
    assert snapshot() == before
    assert {p.name for p in tmp_path.iterdir()} == {"out", "result.json", "rows.jsonl"}


# ---- determinism ----


def test_one_thread_and_two_agree_to_rounding(model_dir, data_dir, tmp_path):
    losses = []
    for threads in (1, 2, 2):
        argv = (
            f"--model_name {model_dir} --data_dir {data_dir} {BOOST} --num_train 16 "
            "--result_file r.json --overwrite"
        )
        argv += " --train_as_classification --disable_tqdm True"
        assert processes.call(processes.train, argv.split(), folder=tmp_path, threads=threads).status == 0
        losses.append(
            (json.loads((tmp_path / "r.json").read_text())["loss"], adapter_bytes(tmp_path / "out"))
        )
    assert losses[1] == losses[2] and losses[0][0] == pytest.approx(losses[1][0], abs=1e-4)


# ---- SIGKILL, and bytes that changed on the disk: short versions of tests/stress/crash.py and fuzz.py ----


def test_three_kills_change_no_byte(model_dir, data_dir, tmp_path):
    """Of a boosted run; tests/stress/test_processes.py has the other modes."""
    argv = (
        f"--model_name {model_dir} --data_dir {data_dir} --num_train 16 --num_dev 8 "
        "--max_steps 40 --save_steps 3"
    )
    argv += " --eval_strategy steps --eval_steps 6 --train_as_classification --save_model --disable_tqdm True"
    done = processes.call(processes.kill_three_times, "xgblora", argv.split(), folder=tmp_path)
    assert done.status == 0 and "'same': True" in done.out.splitlines()[-1], done.out + done.err[-1500:]


def test_mutated_bytes_are_refused_or_work(tmp_path):
    done = processes.call(processes.feed_mutated_bytes, 500, folder=tmp_path)
    assert done.status == 0 and done.out.strip() == "500", done.out[-2000:] + done.err[-2000:]
