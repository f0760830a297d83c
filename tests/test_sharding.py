"""Weights divided among ranks: the steps of one process, and files that both go on from."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.ranks import ONE, OWN, alone, close, losses, run_two_ranks

from distributed import stop_signals
from training import checkpoints

# With a small epsilon Adam takes a whole step along what is only rounding.
REGULAR = "--trainer regular --save_model --logging_steps 1 --num_train 13 --per_device_train_batch_size 4"
REGULAR += " --adam_epsilon 1e-3"
DEV = "--num_dev 8 --eval_strategy steps --eval_steps 2"
FULL = f"{REGULAR} --learning_rate 1e-3 --lr_scheduler_type constant {DEV} --save_steps 2 --save_on_interrupt"
BOOST = f"{REGULAR} --xgblora --xgblora_steps_per_iteration 3 --max_steps 8 --learning_rate 1e-2"
WORSE = "--learning_rate 1 --optim sgd --seed 1"  # of four steps the second is the best
ACCUMULATED = "--gradient_accumulation_steps 2 --gradient_checkpointing"
# name of the output directory -> flags, beside --fsdp, of two ranks and of one process
SAME = {
    "full": f"{FULL} --max_steps 6",
    "best": f"{FULL} {WORSE} --max_steps 4 --load_best_model_at_end --metric loss",
    "accumulated": f"{REGULAR} --max_steps 3 --num_train 3 {ACCUMULATED}",
    "head": f"{REGULAR} --head_tuning --untie_emb --max_steps 4 --learning_rate 1e-3 --optim sgd",
    "lora": f"{REGULAR} --lora --max_steps 6 --learning_rate 1e-2 --train_as_classification",
    "boost": f"{BOOST} --xgblora_adaptive {DEV}",
    "half": f"{BOOST} --load_bfloat16 --optim sgd --learning_rate 1e-1",
    "prefix": f"{REGULAR} --prefix_tuning --max_steps 4 --learning_rate 1e-2",
    "answered": f"{OWN} --trainer regular --num_train 6 --max_steps 2 --save_model",
    "alone": f"{OWN} --trainer regular --num_train 6 --max_steps 1 --num_eval 1 --save_model",
}
FILES = {"lora": "adapter_model", "boost": "boosters", "half": "boosters", "prefix": "adapter_model"}


@pytest.fixture(scope="module")
def two(place):
    """{name: (exit status, what it said) of each rank} of all runs of two ranks."""
    alone(place, "grown", f"{FULL} --max_steps 2 {ONE}")
    lines = {name: (f"{more} --fsdp full_shard", None) for name, more in SAME.items()}
    lines["grown"] = (f"{SAME['full']} --fsdp", None)  # goes on from 2 steps of one process
    lines["shrunk"] = (f"{SAME['full']} --fsdp", "signal")
    lines["evaluating"] = (f"{SAME['full']} --fsdp", "signal in an evaluation")
    return run_two_ranks(place, lines)


def weights(name: str) -> dict:
    return load_file(f"{name}/{FILES.get(name, 'model')}.safetensors")


def best_step(name: str) -> int:
    last = checkpoints.list_checkpoints(name)[-1]
    return json.loads((last / "trainer_state.json").read_text())["best_global_step"]


@pytest.mark.parametrize("name", list(SAME))
def test_divided_weights_take_the_steps_of_whole_ones(place, two, name):
    assert [status for status, _ in two[name]] == [0, 0], two[name]
    alone(place, f"{name}-1", f"{SAME[name]} {ONE}")
    digits = 2e-2 if name == "half" else 1e-4
    for a, b in zip(losses(name), losses(f"{name}-1"), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert a.get("step_length") == b.get("step_length")
        names = a.keys() & {"loss", "eval_loss", "grad_norm"}
        assert all(close(a[key], b[key], digits) for key in names), (a, b)
    ours, theirs = weights(name), load_file(f"{name}-1/{FILES.get(name, 'model')}.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[key] - theirs[key]).abs().max() < digits for key in ours)
    if name == "best":
        assert checkpoints.list_checkpoints(name)[-1].name == "checkpoint-4" and best_step(name) == 2
    said = [list(map(json.loads, Path(f"{d}.jsonl").read_text().splitlines())) for d in (name, f"{name}-1")]
    assert [x["prediction"] for x in said[0]] == [x["prediction"] for x in said[1]] or name == "half"


def test_one_process_and_two_ranks_go_on_from_each_other(place, two):
    statuses = [status for name in ("grown", "shrunk", "evaluating") for status, _ in two[name]]
    assert statuses == [0, 0, *[stop_signals.EXIT_REQUEUE] * 4]
    assert "going on from grown/checkpoint-2" in two["grown"][0][1]
    for name in ("shrunk", "evaluating"):
        alone(place, name, f"{SAME['full']} {ONE}")
    for name in ("grown", "shrunk", "evaluating"):
        ours = load_file(f"{name}/model.safetensors")
        assert all((ours[key] - value).abs().max() < 1e-4 for key, value in weights("full").items())
