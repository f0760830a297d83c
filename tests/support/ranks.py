"""Start runs of several ranks, and read what they left behind.

The ranks are forks of this process, which has imported everything already: an import takes longer than a run.
They get the environment that torchrun gives; tests/stress/test_ranks.py has torchrun itself.
"""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import run
from support.rank_program import run_plan
from training import checkpoints

OWN = "--data_dir own --task_name own --template {q}_Answer: --answer_column a --num_train 0"
OWN += " --max_new_tokens 4"
ONE = "--per_device_train_batch_size 8"  # of one process, where each of two ranks has 4 rows
TIMEOUT = 500  # seconds that a process may take


def flags(place: str, name: str, more: str) -> list[str]:
    """Return the flags of a run that writes all its files under one name."""
    words = f"{place} --output_dir {name} --result_file {name}.json --predictions {name}.jsonl {more}".split()
    return [word.replace("_Answer", " Answer") for word in words]


def alone(place: str, name: str, more: str, status: int = 0) -> None:
    """Run in this process; the run has to end with that exit status."""
    assert run.main(flags(place, name, more)) == status


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


class Process:
    """A fork of this process that calls a function; it has variables of its own and writes to a file."""

    def __init__(self, log: str, environment: dict[str, str], fn: Callable, *args):
        self.log = Path(log)
        self.environment = environment
        self.process = multiprocessing.get_context("fork").Process(target=self._call, args=(fn, *args))
        self.process.start()

    def _call(self, fn: Callable, *args) -> None:
        os.environ.update(self.environment)
        file = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        fn(*args)

    def finish(self) -> str:
        """Wait for the end of the process and return its output."""
        self.process.join(TIMEOUT)
        self.kill()
        return self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    @property
    def status(self) -> int | None:
        """The exit status."""
        return self.process.exitcode


def write_plan(place: str, plan: str, lines: dict[str, tuple[str, str | None]]) -> None:
    """Write a plan out of {name: (flags, name of a mishap or None)}."""
    runs = [(flags(place, name, more), mishap) for name, (more, mishap) in lines.items()]
    Path(plan).write_text(json.dumps(runs))


def start_ranks(plan: str, ranks: int = 2) -> list[Process]:
    """Start ranks that run a plan together."""
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
    world["MASTER_PORT"] = free_port()
    return [
        Process(f"{plan}-{rank}.log", {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, run_plan, plan)
        for rank in range(ranks)
    ]


def run_two_ranks(place: str, lines: dict[str, tuple[str, str | None]]) -> dict[str, list]:
    """Run {name: (flags, name of a mishap or None)} on two ranks.

    Returns:
        {name: (exit status, output) of each rank}.
    """
    plan = f"{next(iter(lines))}.plan"
    write_plan(place, plan, lines)
    logs = [process.finish() for process in start_ranks(plan)]
    try:
        outcomes = [json.loads(Path(f"{Path(plan).stem}-{rank}.json").read_text()) for rank in (0, 1)]
        return dict(zip(lines, zip(*outcomes, strict=True), strict=True))
    except (OSError, ValueError):  # a rank has died
        pytest.fail("\n".join(logs))


def losses(name: str) -> list[dict]:
    """Return the log entries of a run with a loss or a step length, out of its last checkpoint."""
    last = checkpoints.list_checkpoints(name)[-1]
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry or "eval_loss" in entry or "step_length" in entry]


def close(a, b, digits: float = 2e-5) -> bool:
    return a == pytest.approx(b, rel=digits, abs=digits)
