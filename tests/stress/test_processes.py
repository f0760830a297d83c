"""Long forms of tests/test_reliability.py: real processes, killed in every mode, and more mutated bytes."""

import os
import signal
import subprocess
import sys

import pytest
from support import processes
from support.runs import BOOST, ROOT, adapter_bytes


def test_kill_9_and_the_same_command_again(model_dir, data_dir, tmp_path):
    """A Python of its own, as a user starts it."""
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "--model_name",
        str(model_dir),
        "--data_dir",
        str(data_dir),
    ]
    command += (
        f"{BOOST} --num_train 16 --max_steps 400 --save_steps 10 --no_eval --train_as_classification".split()
    )
    command += ["--xgblora_steps_per_iteration", "15", "--save_total_limit", "3"]
    adapters = {}
    for name in ("calm", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "killed":
            with open(folder / "log", "w") as log:
                process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
                processes.wait_for(lambda folder=folder: list(folder.glob("out/checkpoint-*")))
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            assert not (folder / "out" / "adapter_model.safetensors").exists()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        adapters[name] = adapter_bytes(folder / "out")
    assert adapters["killed"] == adapters["calm"]


@pytest.mark.parametrize("mode", ["adaptive", "adamw", "momentum", "ensemble", "full", "regular"])
def test_three_kills_change_no_byte(mode, model_dir, data_dir, tmp_path):
    argv = (
        f"--model_name {model_dir} --data_dir {data_dir} --num_train 16 --num_dev 8 "
        "--max_steps 40 --save_steps 3"
    )
    argv += " --eval_strategy steps --eval_steps 6 --train_as_classification --save_model --disable_tqdm True"
    done = processes.call(processes.kill_three_times, mode, argv.split(), folder=tmp_path)
    assert done.status == 0 and "'same': True" in done.out.splitlines()[-1], done.out + done.err[-1500:]


def test_mutated_bytes_are_refused_or_work(tmp_path):
    done = processes.call(processes.feed_mutated_bytes, 3000, folder=tmp_path)
    assert done.status == 0 and done.out.strip() == "3000", done.out[-2000:] + done.err[-2000:]
