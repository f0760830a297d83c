"""Several ranks take the steps of one process: same trajectory, one writer, an end when a rank is lost."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import ONE, OWN, alone, close, losses, run_two_ranks, start_ranks, write_plan
from support.references import some_examples
from support.runs import adapter_bytes

from cli.arguments import OurArguments
from distributed import collectives, data_parallel, stop_signals
from scoring import packing
from training import checkpoints
from utils import UsageError
from zo.trajectory import Trajectory

TRAIN = "--learning_rate 1e-2 --save_model --logging_steps 1 --num_train 16 --per_device_train_batch_size 4"
ZO = f"--trainer zo {TRAIN}"
ROUNDS = f"{ZO} --xgblora --xgblora_steps_per_iteration 6 --train_as_classification"
BOOST = f"{ROUNDS} --max_steps 13"
SHORT = f"{ROUNDS} --max_steps 9"
STOPS = f"{SHORT} --save_on_interrupt --num_dev 8 --eval_strategy steps --eval_steps 2 --save_steps 4"
ADAPTIVE = f"{BOOST} --xgblora_adaptive --xgblora_patience 3 --num_dev 8 --eval_strategy steps --eval_steps 4"
QUERIES = f"{ZO} --lora --max_steps 6 --zo_queries 3 --zo_parallel queries"
# name of the output directory -> (flags of two ranks, those of one process that are others)
SAME = {
    "boost": (BOOST, ""),
    "language": (f"{ZO} --lora --max_steps 8", ""),
    "odd": (f"{ZO} --lora --max_steps 8 --num_train 13 --train_as_classification", ""),
    "full": (f"{ZO} --max_steps 4 --learning_rate 1e-4 --gradient_accumulation_steps 2", ""),
    "queries": (QUERIES, "--per_device_train_batch_size 4"),
    "adaptive": (f"{ADAPTIVE} --save_steps 4 --load_best_model_at_end --metric loss", ""),
    "cached": (f"{BOOST} --xgblora_layers top:1 --zo_cache_activations --max_steps 8", ""),
    "prefix": (f"{ZO} --prefix_tuning --max_steps 6", ""),
    "objective": (f"{ZO} --lora --objective accuracy --max_steps 4", ""),
    "regular": (f"--trainer regular {TRAIN} --lora --max_steps 6 --gradient_accumulation_steps 2", ""),
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


def coefficients(name: str) -> list:
    return Trajectory.load(f"{name}/trajectory.safetensors").coefficients


def result(name: str) -> dict:
    return json.loads(Path(f"{name}.json").read_text())


def predictions(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]


def eval_losses(name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_loss"]) for entry in losses(name) if "eval_loss" in entry]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all((a[key] - b[key]).abs().max() < 1e-4 for key in a)


@pytest.mark.parametrize("name", list(SAME))
def test_two_ranks_take_the_steps_of_one_process(place, two, name):
    more, other = SAME[name]
    assert [status for status, _ in two[name]] == [0, 0], two[name]
    alone(place, f"{name}-1", f"{more} {ONE} --zo_parallel data {other}")
    ours, theirs = losses(name), losses(f"{name}-1")
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert a.get("step_length") == b.get("step_length")
        assert all(close(a[key], b[key]) for key in ("loss", "eval_loss") if key in a), (a, b)
    file = "adapter_model" if name != "full" else "model"
    assert same(weights(name, file), weights(f"{name}-1", file))
    if "regular" not in name:
        ours, theirs = coefficients(name), coefficients(f"{name}-1")
        assert all(close(a, b, 1e-4) for a, b in zip(ours, theirs, strict=True))
    assert close(result(name)["loss"], result(f"{name}-1")["loss"], 1e-4)


def test_the_exchange_of_a_step_is_a_few_bytes(two):
    reports = {name: result(name)["sets"][0]["ranks"] for name in SAME}
    points = {"queries": 6, "regular": 1}
    for name, ranks in reports.items():
        assert ranks["number"] == 2 and ranks["bytes_per_step"] == 8 * (points.get(name, 2) + 2)
    assert reports["boost"]["imbalance"] < 1.05 < reports["cached"]["imbalance"]


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
        for a, b in zip(predictions(name), predictions(f"{name}-1"), strict=True):
            assert a["id"] == b["id"] and a["prediction"] == b["prediction"]
            assert close(a.get("scores", 0), b.get("scores", 0))


def test_another_number_of_ranks_goes_on_with_the_same_run(place, two):
    assert [status for status, _ in two["grown"] + two["calm"]] == [0] * 4
    assert "going on from grown/checkpoint-9" in two["grown"][0][1]
    shutil.copytree("calm", "shrunk")
    alone(place, "shrunk", f"{BOOST} --save_steps 2 {ONE}")
    assert "checkpoint-13" in [path.name for path in checkpoints.list_checkpoints("shrunk")]
    assert same(weights("grown"), weights("boost")) and same(weights("shrunk"), weights("boost"))


def test_what_is_not_finite_on_one_rank_is_skipped_by_all(two):
    assert [status for status, _ in two["nan"]] == [0, 0]
    assert [i for i, row in enumerate(coefficients("nan")) if row[0] != row[0]] == [2]


@pytest.mark.parametrize("name", ["signal", "evaluating"])
def test_a_signal_to_one_rank_ends_all_and_a_rerun_goes_on(place, two, name):
    assert [status for status, _ in two[name]] == [stop_signals.EXIT_REQUEUE] * 2
    assert "SIGTERM" in two[name][0][1]
    alone(place, name, f"{STOPS} {ONE}")
    assert same(weights(name), weights("stopped"))
    for (step, loss), (other_step, other_loss) in zip(eval_losses(name), eval_losses("stopped"), strict=True):
        assert step == other_step and close(loss, other_loss, 1e-4)


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
    errors = [line for line in rank0.finish().splitlines() if line.startswith("run.py: error")]
    assert len(errors) == 1 and "another rank died" in errors[0]
    rank1.finish()
    assert (rank0.status, rank1.status) == (1, -signal.SIGKILL)
    (_, output), _ = run_two_ranks(place, {"lost": (line, None)})["lost"]
    assert "going on from lost/checkpoint-4" in output
    assert adapter_bytes("lost") == adapter_bytes("calm")


def test_the_parts_of_ranks_hold_about_as_many_tokens():
    sizes = [30, 3, 4, 29, 16, 15, 1]
    assert data_parallel.balance(sizes, 2) == [[0, 2, 5], [1, 3, 4, 6]]
    for ranks in (1, 2, 3, 8):
        parts = data_parallel.balance(sizes, ranks)
        assert sorted(i for part in parts for i in part) == list(range(7))
        ranges = data_parallel.contiguous_split(sizes, ranks)
        assert [i for part in ranges for i in part] == list(range(7)) and len(ranges) == ranks
    assert data_parallel.contiguous_split([], 2) == [range(0), range(0)]


@pytest.mark.parametrize("classification, name", [(True, "label"), (False, "token_option")])
def test_the_parts_of_a_batch_make_up_its_loss(monkeypatch, classification, name):
    """The parts of the loss sum to the loss of the whole batch, for means over examples and over tokens."""
    examples = some_examples(9)
    weight = partial(packing.loss_terms, classification=classification)
    collator = data_parallel.ShardingCollator(packing.pack, weight, packing.num_tokens)
    monkeypatch.setattr(collectives, "world_size", lambda: 12)  # more ranks than rows
    batches = []
    for rank in range(12):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        batches.append(collator(examples))
    assert sum(batch["part"] for batch in batches) == pytest.approx(1, abs=1e-15)
    assert ["input_ids" in batch for batch in batches].count(False) == 2
    assert sum(len(batch[name]) for batch in batches if name in batch) == weight(examples)


def test_each_rank_gets_a_row_where_a_forward_needs_all_ranks(monkeypatch):
    examples = some_examples(1)
    collator = data_parallel.ShardingCollator(packing.pack, len, packing.num_tokens)
    monkeypatch.setattr(collectives, "world_size", lambda: 4)
    monkeypatch.setattr(collectives, "rank", lambda: 3)
    assert collator(examples) == {"weight": 2, "part": 0, "tokens": 0}
    monkeypatch.setattr(collectives, "join_context", collectives.NoJoin())
    batch = collator(examples)
    assert "input_ids" in batch and batch["part"] == 0


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
    assert collectives.choose_gpu() == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == (listed or "")  # one process may see all
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
        assert collectives.env_world_size() == 4 and collectives.rank() == 3
        assert not collectives.is_main_process()
    assert os.environ["WORLD_SIZE"] == "4" and os.environ["RANK"] == "3"
    monkeypatch.delenv("WORLD_SIZE")
    assert collectives.env_world_size() == 1


def test_arguments_do_not_meet_other_ranks(monkeypatch):
    """The library would start a process group, or fail where nothing says how."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    args = OurArguments(trainer="zo", lora=True, max_steps=1)
    assert args.process_index == 1
    assert not torch.distributed.is_initialized()
    assert dict(os.environ) == environment
