"""Tasks: where the rows come from, what their columns must hold, and which candidates an example has.

Rows are read from `DIR/<TaskName>/{train,validation}.jsonl` (`data_dir`) or from the Hugging Face hub; a local file is
validated whole, but a row becomes a `Sample` only when it is asked for. Nothing here knows a model.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import templates
from utils import UsageError

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Sample:
    """One example: `data` are its columns, `correct_candidate` one of `candidates` or a list of them."""

    id: int
    data: dict
    correct_candidate: object
    candidates: list | None = None


@dataclass(frozen=True)
class Spec:
    """One row of the table of tasks. `columns` maps a column to its type; a tuple of values is a label column."""

    columns: dict[str, type | tuple]
    template: templates.Template
    hub: tuple[str, str | None] | None = None  # (dataset, configuration); None: made by starter.py only
    label: str = "label"
    metric: str = "accuracy"


SENTIMENT_COLUMNS = {"sentence": str, "label": (0, 1)}
TASKS = {
    "SST2": Spec(SENTIMENT_COLUMNS, templates.sentiment, hub=("nyu-mll/glue", "sst2")),
    **{name: Spec(SENTIMENT_COLUMNS, templates.sentiment) for name in ("Reviews", "Products", "Tweets", "Editorials")},
}


class Samples(Sequence):
    """The samples of one split in file order; each is built when it is looked at."""

    def __init__(self, rows, build: Callable[[int, dict], Sample]):
        self.rows, self.build = rows, build

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.build(int(index), self.rows[int(index)])


class Dataset:
    """The rows of a task as samples. `fingerprint` tells two sets of rows apart."""

    train_sep = "\n\n"
    generation = False

    def __init__(self, name: str, data_dir=None):
        self.name, self.spec = name, TASKS[name]
        read = (lambda split: read_jsonl(Path(data_dir) / name / f"{split}.jsonl", name)) if data_dir else self._hub
        splits = {split: read(split) for split in SPLITS}
        self.samples = {split: Samples(rows, self._sample) for split, (rows, _) in splits.items()}
        self.fingerprint = hashlib.sha256("".join(digest for _, digest in splits.values()).encode()).hexdigest()[:16]
        self.metric_name = self.spec.metric

    def _hub(self, split: str):
        if self.spec.hub is None:
            raise UsageError(f"task {self.name} is not on the hub: run 'make starter', then give --data_dir starter")
        import datasets

        path, configuration = self.spec.hub
        try:
            rows = datasets.load_dataset(path, configuration, split=split)
        except Exception as error:  # whatever the network, the cache or the hub's client raise, the way out is the same
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(
                f"could not load {path} from the Hugging Face hub ({reason}); give --data_dir DIR with "
                f"DIR/{self.name}/train.jsonl and validation.jsonl, or run 'make starter' and take --task_name Reviews "
                "--data_dir starter --model_name starter/smollm2-135m"
            ) from error
        missing = [column for column in self.spec.columns if column not in rows.column_names]
        if missing:
            raise UsageError(f"{path}, {split}: no column {missing[0]!r}; there are {', '.join(rows.column_names)}")
        return rows, str(rows._fingerprint)

    def _sample(self, index: int, row: dict) -> Sample:
        return Sample(index, row, row[self.spec.label], list(self.spec.columns[self.spec.label]))

    def get_template(self) -> templates.Template:
        return self.spec.template

    def sample_subset(self, data_split: str = "train", seed: int = 0, num: int = 100) -> list[Sample]:
        """`num` samples of a split by seed, in drawn order; all of them where `num` exceeds the split."""
        samples = self.samples[data_split]
        return [samples[i] for i in np.random.RandomState(seed).permutation(len(samples))[:num]]


def read_jsonl(path: Path, task: str) -> tuple[list[dict], str]:
    """(rows, sha256) of a JSON Lines file, every row checked against the task's columns.

    Raises UsageError that names the file, and the row and column where there is one.
    """
    spec = TASKS[task]
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{path}: {reason}; task {task} needs {path.parent}/{{train,validation}}.jsonl") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start})") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, row {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}, row {number}: a row is an object with columns, not {type(row).__name__}")
        for column, kind in spec.columns.items():
            check_cell(f"{path}, row {number}", row, column, kind)
        rows.append(row)
    if not rows:
        raise UsageError(f"{path}: no rows")
    return rows, hashlib.sha256(raw).hexdigest()


def check_cell(where: str, row: dict, column: str, kind: type | tuple) -> None:
    if column not in row:
        raise UsageError(f"{where}: no column {column!r}; there are {', '.join(row)}")
    value = row[column]
    if isinstance(kind, tuple):
        if type(value) is not type(kind[0]) or value not in kind:
            raise UsageError(f"{where}: {column} is {value!r}, but it must be one of {', '.join(map(str, kind))}")
    elif not isinstance(value, kind):
        raise UsageError(f"{where}: {column} is a {type(value).__name__}, but it must be a {kind.__name__}")
    elif kind is str and not value.strip():
        raise UsageError(f"{where}: {column} is empty")


def get_task(name: str, data_dir=None) -> Dataset:
    """The task of that name; raises UsageError for an unknown one, naming those that exist."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return Dataset(name, data_dir)
