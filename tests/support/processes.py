"""Processes of their own for tests, without the seconds that a new Python needs for its imports.

They are forks of this process, in which torch has never had more than one thread.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

import run
from support.runs import ROOT
from trainer import OurTrainer
from training import checkpoints

CONTEXT = multiprocessing.get_context("fork")
OUTPUT = ("stdout", "stderr")  # files that a process leaves in its folder


@dataclass
class Done:
    """The exit status of a process (minus the signal that ended it), and its standard output and error."""

    status: int
    out: str
    err: str


class Child:
    """A process that runs `function(*args)` in a folder and exits with the number that it returns."""

    def __init__(self, function, *args, folder: Path, threads: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.process = CONTEXT.Process(target=enter, args=(function, args, str(folder), threads))
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def finish(self, timeout: float = 300) -> Done:
        """Wait for the end; a process that is killed leaves no text."""
        self.process.join(timeout)
        status = self.process.exitcode
        self.kill()
        files = [self.folder / name for name in OUTPUT]
        return Done(-1 if status is None else status, *(f.read_text() if f.exists() else "" for f in files))


def call(function, *args, folder: Path, threads: int = 1) -> Done:
    """Run a function in a process of its own, to its end."""
    return Child(function, *args, folder=folder, threads=threads).finish()


def enter(function, args, folder: str, threads: int) -> None:
    """What the process does. Its text is kept in memory, because a test may forbid it to write files."""
    os.chdir(folder)
    for name in OUTPUT:
        Path(name).unlink(missing_ok=True)
    torch.set_num_threads(threads)
    logging.root.handlers.clear()  # pytest's; the program sets up its own
    texts, status = [io.StringIO(), io.StringIO()], 70
    with contextlib.redirect_stdout(texts[0]), contextlib.redirect_stderr(texts[1]):
        try:
            status = function(*args) or 0
        except BaseException:
            traceback.print_exc()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for name, text in zip(OUTPUT, texts, strict=True):
        Path(name).write_text(text.getvalue())
    os._exit(status)


def wait_for(condition, seconds: float = 120) -> None:
    """Wait until something is there; a test that needs it fails where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


# ---- what processes do ----


def train(argv: list[str]) -> int:
    return run.main(argv)


def train_starved(argv: list[str], changes: dict[int, int]) -> int:
    """Train while no file may grow beyond so many bytes: {from which step on: bytes, or -1 for any}."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    training_step = OurTrainer.training_step

    def step_with_limit(self, *args):
        limit = changes.get(self.state.global_step + 1)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return training_step(self, *args)

    OurTrainer.training_step = step_with_limit
    return run.main(argv)


def hold_lock(output_dir: str) -> None:
    with checkpoints.lock_output_dir(output_dir):
        Path("locked").touch()
        time.sleep(300)


def kill_three_times(mode: str, argv: list[str]) -> None:
    """Print what tests/stress/crash.py finds of a run that is killed three times."""
    sys.path.append(str(ROOT / "tests" / "stress"))
    import crash

    print(crash.torture([*argv, *crash.MODES[mode].split()], Path.cwd(), 3, 1))


def feed_mutated_bytes(cases: int) -> None:
    """Print how many inputs tests/stress/fuzz.py tried, and its findings."""
    sys.path.append(str(ROOT / "tests" / "stress"))
    import fuzz

    checkpoints.logger.disabled = True
    counts, findings = fuzz.fuzz(cases, 7, progress=False)
    print(sum(counts.values()), *findings)
