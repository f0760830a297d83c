"""Checkpoints that are whole or not there, and runs that end so that they can go on.

A manifest of sizes and hashes, one rename, the newest complete one; a lock; signals; disks that are full.

A checkpoint is written under a temporary name, gets `manifest.json`, is flushed to the disk and renamed; so a name
`checkpoint-N` stands for complete content, and what a crash left half-written never has one. Nothing here knows what a
step or a task is.
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
PARTIAL = ".partial"
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_ends(path: Path, size: int = 1 << 20) -> list:
    """(bytes, hash of the first and the last MB) of a file that may be too large to be read whole."""
    with open(path, "rb") as file:
        head, length = file.read(size), file.seek(0, os.SEEK_END)
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
    """A short hash of anything JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def identify_weights(model_name: str) -> list:
    """Tells two models of one shape apart: the hub name, or of each local weight file its size and both ends."""
    path = Path(model_name)
    if not path.exists():
        return [model_name]
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    return [hash_of_ends(file) for file in files]


def write_atomically(path: Path, text: str) -> None:
    """Write a small file beside its place, flush it and rename it: readers see the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def publish(partial: Path, final: Path) -> None:
    """Give a written checkpoint its manifest, flush it and rename it to its place; one of that name is replaced."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {str(f.relative_to(partial)): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
    for path in [*files, partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be used, or None where it is complete."""
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
    """The folders of a run that have a checkpoint's name, by step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_checkpoint(output_dir) -> Path | None:
    """The newest complete checkpoint of a run, or None where none was ever completed.

    Damaged ones are skipped with a warning that names them; raises UsageError where all completed ones are damaged.
    """
    found = list_checkpoints(output_dir)
    for path in reversed(found):
        reason = find_damage(path)
        if reason is None:
            return path
        logger.warning("skipping checkpoint %s: %s", path, reason)
    if found:
        raise UsageError(f"every checkpoint in {output_dir} is damaged; --overwrite starts afresh")
    if (Path(output_dir) / PARTIAL).exists():
        logger.warning("no checkpoint in %s was ever completed: starting afresh", output_dir)
    return None


def differences(saved: dict, settings: dict) -> str:
    """What differs between the settings of a run that is there and those of this one; empty where nothing does."""
    return "; ".join(
        f"{name} {saved.get(name)!r} there, {settings.get(name)!r} now"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    )


def refuse_other_run(checkpoint: Path, settings: dict) -> None:
    """Raise UsageError, naming what differs, where a checkpoint belongs to a run with other settings."""
    differ = differences(json.loads((checkpoint / SETTINGS).read_text()), settings)
    if differ:
        raise UsageError(f"{checkpoint.parent} holds another run ({differ}): give another --output_dir, or --overwrite")


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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another process is training in {output_dir}; give another --output_dir") from error
        yield


class StateNotSaved(OSError):
    """The state that a run ended with is not on the disk."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, the quota or the allowed size of a file is at its end. Libraries that write
    files in C++ or Rust pass on only the text of it."""
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        return True
    return any(os.strerror(number) in str(error) for number in DISK_FULL_ERRNOS) or "PytorchStreamWriter failed" in str(
        error
    )


def remove_old_checkpoints(output_dir, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the newest nor `keep`."""
    paths = list_checkpoints(output_dir)
    spared = {paths[-1], Path(keep)} if keep else {paths[-1]}
    excess = len(paths) - max(limit, len(spared)) if limit else 0
    for path in [path for path in paths if path not in spared][: max(0, excess)]:
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(output_dir) -> None:
    """`--overwrite`: remove the checkpoints of a run, and nothing else."""
    for path in [*list_checkpoints(output_dir), Path(output_dir) / PARTIAL]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def lock_on_main(output_dir) -> Iterator[None]:
    """`checkpoint.locked` on rank 0, for all."""
    with contextlib.ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(lock_output_dir(output_dir)))
        yield
