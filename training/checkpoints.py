"""Checkpoint folders that are whole or not there: writing, checking, finding, removing; the lock of a run.

A checkpoint is written under a temporary name, gets `manifest.json` (sizes and hashes), is flushed to the
disk and renamed. So a folder called `checkpoint-N` has complete content, and what a crash left half-written
has no such name. Nothing here knows what a step or a task is.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from distributed.collectives import run_on_main
from utils import UsageError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SETTINGS = "settings.json"
FORMAT = 2  # of a checkpoint; a run goes on from checkpoints of this format alone
PARTIAL = ".partial"
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


# ---- writing ----


def sha256(path: Path) -> str:
    """Return the hash of a whole file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_ends(path: Path, size: int = 1 << 20) -> list:
    """Return [bytes, hash of the first and the last MB] of a file that may be too large to be read whole."""
    with open(path, "rb") as file:
        head = file.read(size)
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - size))
        return [length, hashlib.sha256(head + file.read()).hexdigest()]


def check_writable(path: Path, flag: str) -> None:
    """Raise UsageError where a file could not be written, before hours go into what it is to hold."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = "it is a directory" if path.is_dir() else ""
    except OSError as error:
        reason = error.strerror
    if reason or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{flag} {path} can't be written" + (f": {reason}" if reason else ""))


def short_hash(value) -> str:
    """Return 16 hexadecimal digits of the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def identify_weights(model_name: str) -> list:
    """Return what tells two models apart: the hub name, or size and both ends of each local weight file."""
    path = Path(model_name)
    if not path.exists():
        return [model_name]
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    return [hash_of_ends(file) for file in files]


def write_atomically(path: Path, text: str) -> None:
    """Write a small file under another name, flush and rename it: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_settings(checkpoint: Path, settings: dict) -> None:
    """Write which run a checkpoint belongs to, for `refuse_other_run`."""
    (checkpoint / SETTINGS).write_text(json.dumps({"format": FORMAT, **settings}, indent=1))


def publish(partial: Path, checkpoint: Path) -> None:
    """Give a written checkpoint its manifest, flush it and rename it to `checkpoint`, which may exist."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {}
    for file in files:
        manifest[str(file.relative_to(partial))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
    for path in [*files, partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    partial.rename(checkpoint)


# ---- reading ----


def find_damage(checkpoint: Path) -> str | None:
    """Return why a checkpoint can't be used, or None where it is complete."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, entry in manifest.items():
            path = checkpoint / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return "its manifest names a file that is not in it"
            if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest can't be read ({error})"
    return None


def list_checkpoints(output_dir) -> list[Path]:
    """Return the folders of a run that have a checkpoint's name, by step."""
    paths = Path(output_dir).glob("checkpoint-*")
    paths = [path for path in paths if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_checkpoint(output_dir) -> Path | None:
    """Return the newest complete checkpoint of a run, or None where none was ever completed.

    Damaged checkpoints are skipped with a warning that names them.

    Raises:
        UsageError: all completed checkpoints are damaged.
    """
    paths = list_checkpoints(output_dir)
    for path in reversed(paths):
        reason = find_damage(path)
        if reason is None:
            return path
        logger.warning("skipping checkpoint %s: %s", path, reason)
    if paths:
        raise UsageError(f"every checkpoint in {output_dir} is damaged; --overwrite starts afresh")
    if (Path(output_dir) / PARTIAL).exists():
        logger.warning("no checkpoint in %s was ever completed: starting afresh", output_dir)
    return None


def describe_difference(saved_settings: dict, settings: dict) -> str:
    """Return what differs between the settings of a saved run and of this run; empty where nothing does."""
    return "; ".join(
        f"{name} {saved_settings.get(name)!r} there, {settings.get(name)!r} now"
        for name in sorted(saved_settings.keys() | settings.keys())
        if saved_settings.get(name) != settings.get(name)
    )


def refuse_other_run(checkpoint: Path, settings: dict) -> None:
    """Check that this run can go on from a checkpoint.

    Raises:
        UsageError: the checkpoint has another format, or belongs to a run with other settings, which are
            named.
    """
    saved_settings = json.loads((checkpoint / SETTINGS).read_text())
    if saved_settings.pop("format", 1) != FORMAT:
        reason = "was written by an earlier version of this program: --overwrite starts afresh"
        raise UsageError(f"{checkpoint} {reason}")
    difference = describe_difference(saved_settings, settings)
    if difference:
        advice = "give another --output_dir, or --overwrite"
        raise UsageError(f"{checkpoint.parent} holds another run ({difference}): {advice}")


# ---- the lock ----


@contextlib.contextmanager
def lock_output_dir(output_dir):
    """Keep other processes from writing into a run's directory; the lock dies with its owner."""
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(output_dir / ".lock", "w")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} is not writable: {error.strerror}") from error
    with lock:
        try:  # not by `filelock`: where flock is missing, that leaves a marker which outlives its owner
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            reason = f"another process is training in {output_dir}; give another --output_dir"
            raise UsageError(reason) from error
        yield


@contextlib.contextmanager
def lock_on_main(output_dir) -> Iterator[None]:
    """Take the lock of a run on rank 0, for all ranks."""
    with contextlib.ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(lock_output_dir(output_dir)))
        yield


# ---- full disks, old checkpoints ----


class StateNotSaved(OSError):
    """The state that a run ended with is not on the disk."""


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk, the quota or the allowed size of a file is at its end."""
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        return True
    # Libraries that write files in C++ or Rust pass on the text of the error alone.
    texts = [os.strerror(number) for number in DISK_FULL_ERRNOS] + ["PytorchStreamWriter failed"]
    return any(text in str(error) for text in texts)


def remove_old_checkpoints(output_dir, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the newest nor `keep`."""
    paths = list_checkpoints(output_dir)
    spared = {paths[-1], Path(keep)} if keep else {paths[-1]}
    excess = len(paths) - max(limit, len(spared)) if limit else 0
    for path in [path for path in paths if path not in spared][: max(0, excess)]:
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(output_dir) -> None:
    """Remove the checkpoints of a run, and nothing else (`--overwrite`)."""
    for path in [*list_checkpoints(output_dir), Path(output_dir) / PARTIAL]:
        shutil.rmtree(path, ignore_errors=True)
