"""Mutated bytes for everything that is read: only a clean refusal may come of it, or something that works.

    python tests/stress/fuzz.py [--cases 20000] [--seed 0]

Rows, templates and label words, adapters and chains, checkpoints, trajectories and result files. A case
takes a good input and flips, cuts, doubles, splices or swaps bytes of it (or words, of flags). Counted are
refusals (UsageError; ValueError of a trajectory) and inputs that were taken; anything else, or a case of
more than ten seconds, is a finding.
"""

import argparse
import collections
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

from boosters import peft_files
from cli import results
from lora import LoRA
from tasks import CustomTask, get_task
from training import checkpoints
from utils import UsageError
from zo.trajectory import Trajectory

ROWS = [("a film of wit", 1), ("dull — 20 minutes 😴", 0), ('she said "no"\\n', 1)]
SPLICES = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"[" * 3000,
    b'"',
    b"NaN",
    b"1e999",
    b"\\ud83d",
]
SPLICES += [
    b"null",
    b"-1",
    b"9" * 5000,
    b"{x.__class__}",
    b"{0}",
    b"{}",
    b"../../../etc/passwd",
    b"\r\n",
    b"true",
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four changes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[min(i, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[i : min(j, i + 40)]
        elif kind == 2:
            data[i:i] = data[i : min(j, i + 200)]
        elif kind == 3:
            data[i:i] = rng.choice(SPLICES)
        elif kind == 4:
            del data[i:]
        else:
            data[i : i + 1] = rng.randbytes(rng.randint(1, 8))
    return bytes(data)


class Rows:
    """train.jsonl of SST2."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        rows = [{"idx": i, "sentence": s, "label": y} for i, (s, y) in enumerate(ROWS)]
        lines = [json.dumps(row, ensure_ascii=row["idx"] == 0) for row in rows]
        self.good = "\n".join(lines).encode()
        (folder / "SST2").mkdir()
        (folder / "SST2" / "validation.jsonl").write_bytes(self.good)

    def case(self) -> None:
        (self.folder / "SST2" / "train.jsonl").write_bytes(mutate(self.good, self.rng))
        use(get_task("SST2", self.folder))


class OwnTask:
    """Flags and rows of a task of one's own."""

    good = (
        {"template": "{text} It was", "label_words": '{"a": "bad", "b": "good"}', "label_column": "label"},
        {"template": "{text}\\nQ:", "candidates_column": "options", "answer_index_column": "answer"},
        {"template": "{text}", "answer_column": "reply"},
        {},
    )
    row = {"text": "x", "label": "a", "options": ["b", "c"], "answer": 0, "reply": ["y"],  # noqa: RUF012
           "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]}  # fmt: skip

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        self.line = json.dumps(self.row).encode()

    def case(self) -> None:
        flags = dict(self.rng.choice(self.good))
        if flags and self.rng.random() < 0.6:
            name = self.rng.choice(list(flags))
            flags[name] = mutate(flags[name].encode(), self.rng).decode("utf-8", "replace")
        for split in ("train", "validation"):
            data = mutate(self.line, self.rng) if self.rng.random() < 0.5 else self.line
            (self.folder / f"{split}.jsonl").write_bytes(data)
        use(get_task("own", self.folder, CustomTask(**flags)))


def use(task) -> None:
    """Do everything that is done with the samples of a task before a tokenizer sees them."""
    for split in task.samples.values():
        for sample in split:
            if task.get_template() is not None:
                template = task.get_template()
                for candidate in sample.candidates or [sample.correct_candidate]:
                    template.verbalize(sample, candidate).encode()
                    template.verbalize_sfc(sample, candidate).encode()
                template.encode(sample).encode()


class Adapter:
    """The three files of a saved chain, loaded into a model."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        self.model = torch.nn.Module()
        self.model.config = SimpleNamespace(model_type="fuzz", name_or_path="fuzz")
        layers = [torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 4)}) for _ in range(2)]
        self.model.layers = torch.nn.ModuleList(layers)
        self.lora = LoRA(self.model, 1, 16, xgblora=True, layers="random:1", ranks=[1, 2])
        for _ in range(3):
            for module in self.lora.lora_modules:
                module.lora_B.data.normal_()
            self.lora.merge_and_reinit()
        self.lora.save_pretrained(folder)
        self.good = {p.name: p.read_bytes() for p in folder.iterdir()}

    def case(self) -> None:
        name = self.rng.choice(list(self.good))
        for other, data in self.good.items():
            (self.folder / other).write_bytes(mutate(data, self.rng) if other == name else data)
        if self.rng.random() < 0.3:
            (self.folder / peft_files.CHAIN).unlink()
        peft_files.read_lora_config(self.folder)
        self.lora.load(self.folder, self.rng.choice([None, 1]), keep_current=self.rng.random() < 0.5)


class Checkpoint:
    """Any file of a checkpoint, manifest and settings among them."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        written = folder / ".partial" / "checkpoint-2"
        written.mkdir(parents=True)
        (written / "weights").write_bytes(b"0123456789" * 20)
        checkpoints.write_settings(written, {"seed": 1, "model": "x"})
        checkpoints.publish(written, folder / "checkpoint-2")
        self.good = {p.name: p.read_bytes() for p in (folder / "checkpoint-2").iterdir()}

    def case(self) -> None:
        name = self.rng.choice(list(self.good))
        for other, data in self.good.items():
            (self.folder / "checkpoint-2" / other).write_bytes(
                mutate(data, self.rng) if other == name else data
            )
        newest = checkpoints.newest_checkpoint(self.folder)
        if newest:
            checkpoints.refuse_other_run(newest, {"seed": 1, "model": "x"})


class Files:
    """Trajectories and result files."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        trajectory = Trajectory([[0.5, float("nan")]] * 4, [1e-3] * 4)
        trajectory.save(folder / "t.safetensors", steps=4, rounds=[[2, 1.0]], last=1.0, boosters=None)
        self.trajectory = (folder / "t.safetensors").read_bytes()
        args = {"xgblora": True, "lora": False, "model_name": "m", "task_name": "SST2", "trainer": "zo"}
        self.result = json.dumps({"accuracy": 0.5, "loss": 0.7, "sets": [{}], "args": args}).encode()

    def case(self) -> None:
        if self.rng.random() < 0.5:
            (self.folder / "t.safetensors").write_bytes(mutate(self.trajectory, self.rng))
            try:
                Trajectory.load(self.folder / "t.safetensors")
            except ValueError as error:
                raise UsageError(str(error)) from error  # what run.py makes of it
        else:
            (self.folder / "r.json").write_bytes(mutate(self.result, self.rng))
            results.results_table(self.folder)


KINDS = (Rows, OwnTask, Adapter, Checkpoint, Files)


def fuzz(cases: int, seed: int, progress: bool = True) -> tuple[dict, list[str]]:
    """Return ({(kind, "taken" or "refused"): how many}, findings)."""
    rng = random.Random(seed)
    counts = collections.Counter()
    findings = []

    def stop(*args):
        raise TimeoutError("a case took ten seconds")

    before = signal.signal(signal.SIGALRM, stop)
    where = Path(tempfile.mkdtemp())
    try:
        inputs = []
        for kind in KINDS:
            folder = where / kind.__name__
            folder.mkdir()
            inputs.append(kind(folder, rng))
        outside = {p.name for p in where.iterdir()}
        for _ in tqdm(range(cases), disable=not progress, unit="case"):
            target = rng.choice(inputs)
            signal.alarm(10)
            try:
                target.case()
                counts[type(target).__name__, "taken"] += 1
            except UsageError as error:
                counts[type(target).__name__, "refused"] += 1
                if not str(error).strip():
                    findings.append(f"{type(target).__name__}: a refusal that says nothing")
            except Exception:
                findings.append(f"{type(target).__name__}: {traceback.format_exc()[-700:]}")
            finally:
                signal.alarm(0)
        if {p.name for p in where.iterdir()} != outside:
            findings.append("something was written beside the folders of the cases")
    finally:
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(where)
    return counts, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    checkpoints.logger.disabled = True  # every damaged checkpoint is named
    counts, findings = fuzz(args.cases, args.seed)
    for name in (kind.__name__ for kind in KINDS):
        print(f"{name:12} {counts[name, 'taken']:6d} taken {counts[name, 'refused']:6d} refused")
    print(f"{len(findings)} findings")
    for finding in dict.fromkeys(findings):
        print(f"\n{finding}")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
