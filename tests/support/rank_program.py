"""What a rank does in the tests of several ranks: `run.main` for each line of a plan, with the mishap of that
line.

A plan is a file of [flags, name of a mishap or null]. Beside it, each rank writes <plan>-<rank>.json, the
exit status and the output of each run, and <plan>-<rank>-written, the names of all other files that it wrote.
"""

import contextlib
import functools
import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import framework
import run
from distributed import collectives
from trainer import OurTrainer


def stop_self(_trainer) -> None:
    """Ask this rank to stop."""
    os.kill(os.getpid(), signal.SIGTERM)


def die(_trainer) -> None:
    """End without a word, but not where torchrun has started the ranks again."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def fall_silent(_trainer) -> None:
    """Do nothing from here on, and note the time."""
    Path("silence").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP)


def drift(trainer) -> None:
    """Change a trained weight of this rank."""
    with torch.no_grad():
        trainer.lora_module.parameters()[0].view(-1)[0] += 1e-3


def run_out_of_memory(trainer) -> None:
    """Let the next forward break off in its middle."""

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 1 GiB")

    trainer.model.model.layers[0].mlp.forward = forward


def slow_down(_trainer) -> None:
    """Come 0.05 s late to every exchange from here on; the other rank waits."""
    original = collectives.gather

    def gather(values):
        time.sleep(0.05)
        return original(values)

    collectives.gather = gather


# name -> (the method of OurTrainer and its call before which the mishap happens, what happens)
MISHAPS = {
    "signal": ("training_step", 5, stop_self),
    "signal in an evaluation": ("evaluate", 2, stop_self),
    "death": ("training_step", 6, die),
    "silence": ("training_step", 6, fall_silent),
    "out of memory in an evaluation": ("evaluate", 2, run_out_of_memory),
    "slow network": ("training_step", 1, slow_down),
    "drift": ("_save_checkpoint", 2, drift),
}


def call_before(original: Callable, number: int, act: Callable) -> Callable:
    """Return a method that calls `act(self)` before one call of `original`, which is counted from 1."""
    calls = []

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            act(self)
        return original(self, *args, **kwargs)

    return method


def nan_at_third_call(original: Callable) -> Callable:
    """Return a loss function whose third result is NaN."""
    calls = []

    @functools.wraps(original)
    def loss(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1)

    return loss


@contextlib.contextmanager
def prepared(mishap: str | None):
    """Inside, a mishap will happen on rank 1."""
    if mishap is None or os.environ["RANK"] != "1":
        yield
        return
    if mishap == "nan":
        place, name = framework.logprobs, "loss"
        replacement = nan_at_third_call(place.loss)
    else:
        name, number, act = MISHAPS[mishap]
        place = OurTrainer
        replacement = call_before(getattr(place, name), number, act)
    original = getattr(place, name)
    setattr(place, name, replacement)
    try:
        yield
    finally:
        setattr(place, name, original)


def record_written_files() -> set[str]:
    """Return a set to which each path is added that is written, made, moved or removed below this folder."""
    written: set[str] = set()

    def note(event, args):
        writes = event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            names = args[: 2 if event == "os.rename" else 1]
            paths = [os.path.relpath(name) for name in names if isinstance(name, str | Path)]
            written.update(path for path in paths if path != "." and not path.startswith(".."))

    sys.addaudithook(note)
    return written


def run_plan(plan: str) -> None:
    """Run the lines of a plan; end the process, with the exit status of the run where it is the only line."""
    plan = Path(plan)
    prefix = f"{plan.stem}-{os.environ['RANK']}"
    written = record_written_files()
    outcomes = []
    for flags, mishap in json.loads(plan.read_text()):
        output = io.StringIO()
        logging.root.handlers.clear()  # of the run before, whose stream is gone
        with prepared(mishap), contextlib.redirect_stderr(output):
            outcomes.append([run.main(flags), output.getvalue()])
        print(output.getvalue(), file=sys.stderr, end="", flush=True)
        plan.with_name(f"{prefix}-written").write_text(json.dumps(sorted(written)))
        plan.with_name(f"{prefix}.json").write_text(json.dumps(outcomes))
    plan.with_name(f"{prefix}-ended").write_text(str(time.time()))
    sys.exit(outcomes[0][0] if len(outcomes) == 1 else 0)


if __name__ == "__main__":  # under torchrun
    run_plan(sys.argv[1])
