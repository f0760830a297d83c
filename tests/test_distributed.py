"""Several ranks take the steps of one process: same trajectory, one writer, and an end when one of them is lost."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import ONE, OWN, alone, close, losses, run_two_ranks, start_ranks, write_plan
from support.references import some_examples
from support.runs import adapter_bytes

from distributed import collectives, data_parallel, stop_signals
from scoring import packing
from training import checkpoints
from utils import UsageError
from zo.trajectory import Trajectory

ZO = "--trainer zo --learning_rate 1e-2 --save_model --logging_steps 1 --num_train 16 --per_device_train_batch_size 4"
BOOST = f"{ZO} --xgblora --xgblora_steps_per_iteration 6 --max_steps 13 --train_as_classification"
SHORT = BOOST.replace("13", "9")
STOPS = f"{SHORT} --save_on_interrupt --num_dev 8 --eval_strategy steps --eval_steps 2 --save_steps 4"
ADAPTIVE = "--xgblora_adaptive --xgblora_patience 3 --num_dev 8 --eval_strategy steps --eval_steps 4 --save_steps 4"
# name of the output directory -> (flags of two ranks, those of one process that are others)
SAME = {
    "boost": (BOOST, ""),
    "language": (f"{ZO} --lora --max_steps 8", ""),
    "odd": (f"{ZO} --lora --max_steps 8 --num_train 13 --train_as_classification", ""),
    "full": (f"{ZO} --max_steps 4 --learning_rate 1e-4 --gradient_accumulation_steps 2", ""),
    "queries": (f"{ZO} --lora --max_steps 6 --zo_queries 3 --zo_parallel queries", "--per_device_train_batch_size 4"),
    "adaptive": (f"{BOOST} {ADAPTIVE} --load_best_model_at_end --metric loss", ""),
    "cached": (f"{BOOST} --xgblora_layers top:1 --zo_cache_activations --max_steps 8", ""),
    "prefix": (f"{ZO} --prefix_tuning --max_steps 6", ""),
    "objective": (f"{ZO} --lora --objective accuracy --max_steps 4", ""),
    "regular": (f"{ZO.replace('zo', 'regular')} --lora --max_steps 6 --gradient_accumulation_steps 2", ""),
}
PROBE = "--linear_probing --num_train 16 --train_set_seed 0"
SHOTS = "--trainer none --num_train 3 --train_set_seed 0"


@pytest.fixture(scope="module")
def two(place):
    """{name: (exit status, output) of each rank} of all runs of two ranks."""
    alone(place, "grown", f"{SHORT} {ONE}")
    alone(place, "stopped", f"{STOPS} {ONE}")
    alone(place, "probed-1", PROBE)  # so that the ranks need not import scikit-learn
    lines = {name: (more, None) for name, (more, _) in SAME.items()}
    lines["evaluated"] = (SHOTS, None)
    lines["answered"] = (OWN, None)
    lines["probed"] = (PROBE, None)
    lines["grown"] = (BOOST, None)  # goes on from 9 steps of one process
    lines["calm"] = (f"{SHORT} --save_steps 2", None)
    lines["nan"] = (SHORT, "nan")
    lines["signal"] = (STOPS, "signal")
    lines["evaluating"] = (STOPS, "signal in an evaluation")
    lines["drifted"] = (f"{SHORT} --save_steps 2", "drift")
    lines["other"] = (f"{SHORT} --learning_rate 1e-3 --output_dir stopped", None)
    return run_two_ranks(place, lines)


def weights(name: str, file: str = "boosters") -> dict:
    return load_file(f"{name}/{file}.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all((a[key] - b[key]).abs().max() < 1e-4 for key in a)


@pytest.mark.parametrize("name", list(SAME))
def test_two_ranks_take_the_steps_of_one_process(place, two, name):
    more, other = SAME[name]
    assert [status for status, _ in two[name]] == [0, 0], two[name]
    alone(place, f"{name}-1", f"{more} {ONE} --zo_parallel data {other}")
    ours, theirs = losses(name), losses(f"{name}-1")
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"] and a.get("step_length") == b.get("step_length")
        assert all(close(a[key], b[key]) for key in ("loss", "eval_loss") if key in a), (a, b)
    file = "adapter_model" if name != "full" else "model"
    assert same(weights(name, file), weights(f"{name}-1", file))
    if "regular" not in name:
        ours, theirs = (Trajectory.load(f"{d}/trajectory.safetensors").coefficients for d in (name, f"{name}-1"))
        assert len(ours) == len(theirs) and all(close(a, b, 1e-4) for a, b in zip(ours, theirs, strict=True))
    measured = [json.loads(Path(f"{d}.json").read_text()) for d in (name, f"{name}-1")]
    assert close(measured[0]["loss"], measured[1]["loss"], 1e-4)


def test_the_exchange_of_a_step_is_a_few_bytes(two):
    found = {name: json.loads(Path(f"{name}.json").read_text())["sets"][0]["ranks"] for name in SAME}
    points = {"queries": 6, "regular": 1}
    for name, ranks in found.items():
        assert ranks["number"] == 2 and ranks["bytes_per_step"] == 8 * (points.get(name, 2) + 2)
    assert found["boost"]["imbalance"] < 1.05 < found["cached"]["imbalance"]


def test_only_rank_0_speaks(two):
    ours, theirs = two["boost"]
    assert "merged booster 1 at step 6" in ours[1] and "divided among 2 ranks" in ours[1]
    assert theirs[1] == ""


def test_only_rank_0_writes(two):
    ours, theirs = (set(json.loads(Path(f"boost-{r}-written").read_text())) for r in (0, 1))
    assert {"boost.json", "boost.jsonl"} <= ours and any(path.startswith("boost/") for path in ours)
    assert {path for path in theirs if not path.startswith("boost-1")} == set()


def test_an_evaluation_is_divided_and_put_together_in_order(place, two):
    for name, more in {"evaluated": SHOTS, "answered": OWN, "probed": PROBE}.items():
        assert [status for status, _ in two[name]] == [0, 0]
        if name != "probed":
            alone(place, f"{name}-1", more)
        ours, theirs = (list(map(json.loads, Path(f"{d}.jsonl").read_text().splitlines())) for d in (name, f"{name}-1"))
        assert [(x["id"], x["prediction"]) for x in ours] == [(x["id"], x["prediction"]) for x in theirs]
        assert all(close(a["scores"], b["scores"]) for a, b in zip(ours, theirs, strict=True) if "scores" in a)


def test_another_number_of_ranks_goes_on_with_the_same_run(place, two):
    assert [status for status, _ in two["grown"] + two["calm"]] == [0] * 4
    assert "going on from grown/checkpoint-9" in two["grown"][0][1]
    shutil.copytree("calm", "shrunk")
    alone(place, "shrunk", f"{BOOST} --save_steps 2 {ONE}")
    assert "checkpoint-13" in [path.name for path in checkpoints.list_checkpoints("shrunk")]
    assert same(weights("grown"), weights("boost")) and same(weights("shrunk"), weights("boost"))


def test_what_is_not_finite_on_one_rank_is_skipped_by_all(two):
    assert [status for status, _ in two["nan"]] == [0, 0]
    coefficients = Trajectory.load("nan/trajectory.safetensors").coefficients
    assert [i for i, row in enumerate(coefficients) if row[0] != row[0]] == [2]


@pytest.mark.parametrize("name", ["signal", "evaluating"])
def test_a_signal_to_one_rank_ends_all_and_a_rerun_goes_on(place, two, name):
    assert [status for status, _ in two[name]] == [stop_signals.EXIT_REQUEUE] * 2
    assert "SIGTERM" in two[name][0][1]
    alone(place, name, f"{STOPS} {ONE}")
    assert same(weights(name), weights("stopped"))
    ours, theirs = ([(e["step"], e["eval_loss"]) for e in losses(d) if "eval_loss" in e] for d in (name, "stopped"))
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert all(close(a, b, 1e-4) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def test_a_rank_with_other_weights_is_named_and_nothing_is_saved(two):
    assert [status for status, _ in two["drifted"]] == [1, 1]
    assert "rank 1 of 2 has other weights" in two["drifted"][0][1]
    assert [path.name for path in checkpoints.list_checkpoints("drifted")] == ["checkpoint-2"]


def test_a_refusal_of_rank_0_is_one_of_all(two):
    assert [status for status, _ in two["other"]] == [2, 2]
    assert "learning_rate" in two["other"][0][1].splitlines()[-1] and two["other"][1][1] == ""


def test_a_rank_that_dies_ends_the_others_and_a_rerun_goes_on(place, two):
    line = f"{SHORT} --save_steps 2"
    write_plan(place, "dies.plan", {"lost": (line, "death")})
    rank0, rank1 = start_ranks("dies.plan")
    last_line = rank0.finish().splitlines()[-1]
    assert last_line.startswith("run.py: error") and "another rank died" in last_line
    rank1.finish()
    assert (rank0.status, rank1.status) == (1, -signal.SIGKILL)
    (_, output), _ = run_two_ranks(place, {"lost": (line, None)})["lost"]
    assert "going on from lost/checkpoint-4" in output
    assert adapter_bytes("lost") == adapter_bytes("calm")


def test_shares_hold_about_as_many_tokens():
    sizes = [30, 3, 4, 29, 16, 15, 1]
    assert data_parallel.balance(sizes, 2) == [[0, 2, 5], [1, 3, 4, 6]]
    for ranks in (1, 2, 3, 8):
        parts = data_parallel.balance(sizes, ranks)
        assert sorted(i for part in parts for i in part) == list(range(7))
        pieces = data_parallel.contiguous_split(sizes, ranks)
        assert [i for piece in pieces for i in piece] == list(range(7)) and len(pieces) == ranks
    assert data_parallel.contiguous_split([], 2) == [range(0), range(0)]


def test_the_shares_of_a_batch_make_up_its_loss(monkeypatch):
    """The parts of the loss sum to the loss of the whole batch, for means over examples and over option tokens."""
    examples = some_examples(9)
    for classification in (True, False):
        found = []
        for rank in range(12):  # more ranks than rows
            monkeypatch.setattr(collectives, "world_size", lambda: 12)
            monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
            weigh = lambda rows, c=classification: packing.loss_terms(rows, c)  # noqa: E731
            found.append(data_parallel.ShardingCollator(packing.pack, weigh, packing.num_tokens)(examples))
        assert sum(one["part"] for one in found) == pytest.approx(1, abs=1e-15)
        assert ["input_ids" in one for one in found].count(False) == 2
        counted = "label" if classification else "token_option"
        assert sum(len(one[counted]) for one in found if counted in one) == packing.loss_terms(examples, classification)


def test_a_fingerprint_sees_one_bit_of_any_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float64):
        a, b = torch.ones(7, 3).to(dtype), torch.ones(7, 3).to(dtype)
        assert collectives.tensor_fingerprint([a, b]) == collectives.tensor_fingerprint([b, a])
        b.view(-1).view(torch.uint8)[5] ^= 1
        assert collectives.tensor_fingerprint([a]) != collectives.tensor_fingerprint([b])
    assert collectives.tensor_fingerprint([torch.ones(2, 2)[:, 0], torch.empty(3, device="meta")])


def test_a_rank_may_have_to_have_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    collectives.refuse_shared_gpus(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with (
        pytest.raises(UsageError, match="3 ranks on a machine with 2 GPU"),
        collectives.hide_world_from_trainer(),
    ):
        collectives.refuse_shared_gpus(2)
    collectives.refuse_shared_gpus(0)  # ranks share a CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")  # of this rank alone
    collectives.refuse_shared_gpus(1)


@pytest.mark.parametrize("listed, chosen", [(None, "1"), ("4,6", "6")])
def test_each_rank_of_a_machine_sees_one_gpu(monkeypatch, listed, chosen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed or "")
    assert collectives.choose_gpu() == 2 and os.environ["CUDA_VISIBLE_DEVICES"] == (listed or "")  # one process
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with collectives.hide_world_from_trainer():
        assert collectives.choose_gpu() == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_the_world_is_hidden_from_the_library_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with collectives.hide_world_from_trainer(), collectives.hide_world_from_trainer():
        assert "WORLD_SIZE" not in os.environ and "RANK" not in os.environ
        assert collectives.env_world_size() == 4 and collectives.rank() == 3 and not collectives.is_main_process()
    assert os.environ["WORLD_SIZE"] == "4" and os.environ["RANK"] == "3"
    monkeypatch.delenv("WORLD_SIZE")
    assert collectives.env_world_size() == 1
