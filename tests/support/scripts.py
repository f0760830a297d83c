"""Start the shell scripts: with a stub in place of Python that records its words, or for real."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from support.runs import ROOT

SCRIPTS = ("mezo.sh", "finetune.sh", "icl.sh", "recipe.sh")
# Settings of the caller's shell that the scripts would take.
VARIABLES = (
    "MODEL", "TASK", "MODE", "BS", "LR", "EPS", "SEED", "TRAIN", "DEV", "EVAL", "STEPS", "EVAL_STEPS",
    "EPOCH", "XGBLORA_STEPS", "RECIPE", "NUM_GPU", "DATA_DIR",
)  # fmt: skip


@dataclass
class Call:
    """What a script printed, and the words that it gave to Python (none where it refused)."""

    status: int
    lines: list[str]
    error: str
    words: list[str]


def environment(settings: dict) -> dict:
    """Return this process's environment with exactly these settings of a script."""
    rest = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return rest | {name: str(value) for name, value in settings.items()}


def write_program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def record_call(folder: Path, script: str, settings: dict, *words: str, gpu: bool = False) -> Call:
    """Start a copy of a script in `folder`, whose Python is a stub that writes down its words.

    Args:
        settings: environment variables of the script.
        words: further flags for `run.py`.
        gpu: whether `nvidia-smi` finds a GPU.
    """
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    record = folder / "words"
    record.unlink(missing_ok=True)
    write_program(folder / ".venv/bin/python", f"printf '%s\\n' \"$@\" > '{record}'")
    write_program(folder / "bin/nvidia-smi", f"exit {0 if gpu else 9}")
    variables = environment(settings)
    variables["PATH"] = f"{folder / 'bin'}:{variables['PATH']}"
    done = subprocess.run(
        ["bash", str(folder / script), *words], env=variables, capture_output=True, text=True
    )
    given = record.read_text().splitlines() if record.exists() else []
    return Call(done.returncode, done.stdout.splitlines(), done.stderr, given)


def run_script(script: str, settings: dict, *words: str) -> subprocess.CompletedProcess:
    """Start a script of the checkout as it is."""
    command = ["bash", str(ROOT / script), *words]
    return subprocess.run(command, env=environment(settings), capture_output=True, text=True)
