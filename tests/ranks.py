"""Started by torchrun in the tests of ranks: `run.main` for each line of a plan, with the mishap that it names.

The exit statuses, and what was said, are written beside the plan: <plan>-<rank>.json; the names of what else was
written: <plan>-<rank>-written.
"""

import contextlib
import io
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import framework
import run
from trainer import OurTrainer

RANK, PLAN = int(os.environ["RANK"]), Path(sys.argv[1])
FIRST_ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"


def stop_self():
    os.kill(os.getpid(), signal.SIGTERM)


def die():
    if FIRST_ATTEMPT:
        os.kill(os.getpid(), signal.SIGKILL)


def fall_silent():
    Path("silence").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP)


def drift(trainer):
    with torch.no_grad():
        trainer.lora_module.parameters()[0].view(-1)[0] += 1e-3


def run_out(trainer):
    """Of memory, in the middle of a forward."""

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 1 GiB")

    trainer.model.model.layers[0].mlp.forward = forward


# name -> (the method and its call on rank 1 before which it happens, what happens)
MISHAPS = {
    "signal": ("training_step", 5, lambda trainer: stop_self()),
    "signal in an evaluation": ("evaluate", 2, lambda trainer: stop_self()),
    "death": ("training_step", 6, lambda trainer: die()),
    "silence": ("training_step", 6, lambda trainer: fall_silent()),
    "out of memory in an evaluation": ("evaluate", 2, run_out),
    "drift": ("_save_checkpoint", 2, drift),
}


def mishap(name: str | None):
    """Prepare one; returns what takes it back."""
    if name is None or RANK != 1:
        return lambda: None
    if name == "nan":
        calls, original = [], framework.scoring.loss

        def loss(model, batch, classification, copies=None):
            calls.append(1)
            return original(model, batch, classification, copies) * (float("nan") if len(calls) == 3 else 1)

        framework.scoring.loss = loss
        return lambda: setattr(framework.scoring, "loss", original)
    method, call, act = MISHAPS[name]
    calls, original = [], getattr(OurTrainer, method)

    def wrapped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            act(self)
        return original(self, *args, **kwargs)

    setattr(OurTrainer, method, wrapped)
    return lambda: setattr(OurTrainer, method, original)


written = set()


def note(event, args):
    """An audit hook: what is opened for writing, made, moved or removed below this folder."""
    writes = event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        names = args[: 2 if event == "os.rename" else 1]
        paths = [os.path.relpath(name) for name in names if isinstance(name, str | Path)]
        written.update(path for path in paths if path != "." and not path.startswith(".."))


sys.addaudithook(note)
statuses = []
for flags, name in json.loads(PLAN.read_text()):
    take_back, said = mishap(name), io.StringIO()
    logging.root.handlers.clear()  # of the run before, whose stream is gone
    with contextlib.redirect_stderr(said):
        statuses.append([run.main(flags), said.getvalue()])
    sys.stderr.write(said.getvalue())
    take_back()
    PLAN.with_name(f"{PLAN.stem}-{RANK}-written").write_text(json.dumps(sorted(written)))
    PLAN.with_name(f"{PLAN.stem}-{RANK}.json").write_text(json.dumps(statuses))
    if RANK == 0:
        PLAN.with_name(f"{PLAN.stem}-ended").write_text(str(time.time()))
sys.exit(max(status for status, _ in statuses) if len(statuses) == 1 else 0)
