"""Start runs of several ranks, and read what they wrote."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import run
from support.runs import ROOT
from training import checkpoints

OWN = "--data_dir own --task_name own --template {q}_Answer: --answer_column a --max_new_tokens 4 --num_train 0"
ONE = "--per_device_train_batch_size 8"


def flags(place: str, name: str, more: str) -> list[str]:
    words = f"{place} --output_dir {name} --result_file {name}.json --predictions {name}.jsonl {more}".split()
    return [word.replace("_Answer", " Answer") for word in words]


def alone(place: str, name: str, more: str, status: int = 0) -> None:
    assert run.main(flags(place, name, more)) == status


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def launch(plan: str, lines: list, *words: str, **environment) -> subprocess.Popen:
    """A process that runs the lines of a plan: (flags, mishap); under torchrun, where there are `words` for it."""
    Path(plan).write_text(json.dumps(lines))
    command = [sys.executable, *(["-m", "torch.distributed.run", *words] if words else [])]
    command += [str(ROOT / "tests" / "ranks.py"), plan]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=500)[0]
    finally:
        process.kill()


def losses(name: str) -> list[dict]:
    last = checkpoints.list_checkpoints(name)[-1]
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry or "eval_loss" in entry or "step_length" in entry]


def close(a, b, digits: float = 2e-5) -> bool:
    return a == pytest.approx(b, rel=digits, abs=digits)
