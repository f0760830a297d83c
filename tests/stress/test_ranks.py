"""Ranks in trouble, and torchrun itself: what takes a minute and guards a rare path (`make stress`).

The runs of two ranks that `make test` has are in test_distributed.py and test_sharding.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import free_port, run_two_ranks, start_ranks, write_plan
from support.runs import ROOT, adapter_bytes

from training import checkpoints

SHORT = "--trainer zo --learning_rate 1e-2 --save_model --logging_steps 1 --num_train 16"
SHORT += " --per_device_train_batch_size 4 --xgblora --xgblora_steps_per_iteration 6 --max_steps 9"
SHORT += " --train_as_classification --save_steps 2"
FSDP = "--trainer regular --fsdp --num_train 13 --per_device_train_batch_size 4 --learning_rate 1e-3"
FSDP += " --lr_scheduler_type constant --num_dev 8 --eval_strategy steps --eval_steps 2 --save_steps 2"
FSDP += " --max_steps 6 --logging_steps 1 --save_on_interrupt"


@pytest.fixture(scope="module")
def calm(place):
    """Adapters of two ranks to whom nothing happens."""
    run_two_ranks(place, {"calm": (SHORT, None)})
    return adapter_bytes("calm")


def torchrun(plan: str, *words: str) -> subprocess.Popen:
    """Start torchrun, with these words of its command line, on a plan."""
    command = [sys.executable, "-m", "torch.distributed.run", *words, "-m", "support.rank_program", plan]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def finish(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=300)[0]
    finally:
        process.kill()


def test_torchrun_starts_ranks_again_when_one_has_died(place, calm):
    write_plan(place, "dies.json", {"lost": (SHORT, "death")})
    words = ("--nproc_per_node", "2", "--max-restarts", "1")
    output = finish(torchrun("dies.json", *words, "--master_port", free_port()))
    errors = [line for line in output.splitlines() if line.startswith("run.py: error")]
    assert len(errors) == 1 and "another rank died" in errors[0], output
    assert "going on from lost/checkpoint-4" in output, output
    assert adapter_bytes("lost") == calm


def test_two_nodes_and_a_slow_network_cost_a_delay_a_step(place, calm):
    write_plan(place, "meet.json", {"nodes": (SHORT, "slow network")})
    words = ("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d")
    endpoint = f"localhost:{free_port()}"
    agents = [torchrun("meet.json", *words, "--rdzv_endpoint", endpoint) for _ in range(2)]
    output = [finish(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], output
    ranks = json.loads(Path("nodes.json").read_text())["sets"][0]["ranks"]
    assert ranks["bytes_per_step"] == 32 and ranks["wait_seconds_per_step"] > 0.03, ranks
    assert adapter_bytes("nodes") == calm


def test_a_rank_that_does_not_answer_is_given_up(place):
    """Rank 1 stops; without torchrun to end it, rank 0 waits `--ddp_timeout` seconds and exits with 1."""
    write_plan(place, "stops.json", {"silent": (f"{SHORT} --ddp_timeout 4", "silence")})
    rank0, rank1 = start_ranks("stops.json")
    output = rank0.finish()
    rank1.kill()
    assert rank0.status == 1 and "does not answer" in output.splitlines()[-1], output


@pytest.mark.parametrize(
    "mishap, words, saved",
    [
        ("death", "another rank died", [2, 4]),
        ("out of memory in an evaluation", "rank 1: error: out of memory", [2]),
    ],
)
def test_a_rank_that_fails_while_the_others_wait_for_its_weights(place, mishap, words, saved):
    name = mishap.split()[0]
    write_plan(place, f"{name}.plan", {name: (FSDP, mishap)})
    output = "".join(process.finish() for process in start_ranks(f"{name}.plan"))
    errors = [line for line in output.splitlines() if line.startswith("run.py: ")]
    assert any(words in line for line in errors) and "Traceback" not in output, output
    assert [path.name for path in checkpoints.list_checkpoints(name)] == [f"checkpoint-{n}" for n in saved]
