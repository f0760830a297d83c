"""Tasks: where the rows come from, what their columns must hold, and which candidates an example has.

Rows are read from `DIR/<TaskName>/{train,validation}.jsonl` (`data_dir`) or from the Hugging Face hub; `own` tasks are
described on the command line and read from `DIR/{train,validation}.jsonl`. A local file is validated whole, but a row
becomes a `Sample` only when it is asked for. Nothing here knows a model.
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
OPTIONS, GENERATION, TEXT = "options", "generation", "text"  # the kinds of tasks
METRICS = {  # by kind of task; the first is the default
    OPTIONS: ("accuracy", "macro_f1", "loss"),
    GENERATION: ("f1", "em"),
    TEXT: ("loss", "perplexity"),
}


@dataclass(frozen=True)
class Sample:
    """One example: `data` are its columns, `correct_candidate` one of `candidates` or a list of right ones."""

    id: int
    data: dict
    correct_candidate: object = None
    candidates: list | None = None


@dataclass(frozen=True)
class Spec:
    """One row of the table of tasks.

    `columns` maps a column to what a cell must be: a type, a tuple of values (a label column), a list with the type of
    its elements, or a dict of such; a function may refuse a cell with a ValueError. `correct(row)` and
    `candidates(row)` make the sample; `template` is None where the row itself is the text.
    """

    columns: dict
    template: templates.Template | None
    correct: Callable[[dict], object] = lambda row: None
    candidates: Callable[[dict], list | None] = lambda row: None
    hub: tuple[str, str | None] | None = None  # (dataset, configuration); None: not on the hub
    kind: str = OPTIONS
    distinct: bool = False  # whether a candidate that stands there twice is an error


def labelled(template: templates.Template, *columns: str, labels=(0, 1), hub=None) -> Spec:
    """A task of text columns and a column `label`."""
    return Spec(
        {**dict.fromkeys(columns, str), "label": labels},
        template,
        correct=lambda row: row["label"],
        candidates=lambda row: list(labels),
        hub=hub,
    )


GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"
TASKS = {
    "SST2": labelled(templates.sentiment, "sentence", hub=(GLUE, "sst2")),
    "RTE": labelled(templates.rte, "premise", "hypothesis", hub=(SUPER_GLUE, "rte")),
    "CB": labelled(templates.cb, "premise", "hypothesis", labels=(0, 1, 2), hub=(SUPER_GLUE, "cb")),
    "BoolQ": Spec(
        {"passage": str, "question": str, "answer": (True, False)},
        templates.boolq,
        correct=lambda row: "Yes" if row["answer"] else "No",
        candidates=lambda row: ["Yes", "No"],
        hub=("google/boolq", None),
    ),
    "WSC": labelled(templates.wsc, "text", "span1_text", "span2_text", hub=(SUPER_GLUE, "wsc.fixed")),
    "WIC": labelled(templates.wic, "word", "sentence1", "sentence2", hub=(SUPER_GLUE, "wic")),
    "MultiRC": labelled(templates.multirc, "paragraph", "question", "answer", hub=(SUPER_GLUE, "multirc")),
    "Copa": Spec(
        {"premise": str, "choice1": str, "choice2": str, "question": ("cause", "effect"), "label": (0, 1)},
        templates.copa,
        correct=lambda row: row[f"choice{row['label'] + 1}"],
        candidates=lambda row: [row["choice1"], row["choice2"]],
        hub=(SUPER_GLUE, "copa"),
    ),
    "ReCoRD": Spec(
        {"passage": str, "query": str, "entities": [str], "answers": [str]},
        templates.record,
        correct=lambda row: row["answers"],
        candidates=lambda row: row["entities"],
        hub=(SUPER_GLUE, "record"),
    ),
    "SQuAD": Spec(
        {"title": str, "context": str, "question": str, "answers": {"text": [str]}},
        templates.squad,
        correct=lambda row: row["answers"]["text"],
        hub=("rajpurkar/squad", None),
        kind=GENERATION,
    ),
    "DROP": Spec(
        {"passage": str, "question": str, "answers_spans": {"spans": [str]}},
        templates.drop,
        correct=lambda row: row["answers_spans"]["spans"],
        hub=("ucinlp/drop", None),
        kind=GENERATION,
    ),
    **{name: labelled(templates.sentiment, "sentence") for name in ("Reviews", "Products", "Tweets", "Editorials")},
}


# ---- a task of one's own ----


@dataclass(frozen=True)
class CustomTask:
    """How a task of the user's own is put together; the fields are the flags of the same names."""

    template: str | None = None
    label_words: str | None = None
    label_column: str | None = None
    candidates_column: str | None = None
    answer_index_column: str | None = None
    answer_column: str | None = None


def custom_spec(own: CustomTask, first_row: dict) -> Spec:
    """The `Spec` of these flags; without any, the columns `messages`, or `prompt` and `response`, say what it is."""
    if own == CustomTask():
        if "messages" in first_row:
            return Spec({"messages": conversation}, None, kind=TEXT)
        if "prompt" in first_row and "response" in first_row:
            return Spec({"prompt": str, "response": str}, None, kind=TEXT)
        raise UsageError(
            "--task_name own needs --template with --label_words, --candidates_column or --answer_column, or a column "
            f"messages, or prompt and response; the columns are {', '.join(first_row)}"
        )
    ways = {
        "--label_words and --label_column": (own.label_words, own.label_column),
        "--candidates_column and --answer_index_column": (own.candidates_column, own.answer_index_column),
        "--answer_column": (own.answer_column,),
    }
    given = [name for name, flags in ways.items() if any(flags)]
    if not own.template or len(given) != 1 or not all(ways[given[0]]):
        raise UsageError(f"--task_name own needs --template and one of: {'; '.join(ways)}")
    try:
        columns = dict.fromkeys(templates.template_columns(own.template), readable)
    except ValueError as error:
        raise UsageError(f"--template {own.template!r}: {error}") from error
    if not columns:
        raise UsageError(f"--template {own.template!r} has no {{column}} in it")

    if own.label_words:
        try:
            words = json.loads(own.label_words)
            assert isinstance(words, dict) and len(words) > 1
            assert all(isinstance(word, str) and word.strip() for word in words.values())
            assert len(set(words.values())) == len(words)
        except (ValueError, AssertionError):
            example = '\'{"neg": "terrible", "pos": "great"}\''
            message = f"--label_words {own.label_words}: not a JSON object of two different words or more, as {example}"
            raise UsageError(message) from None

        def label(cell) -> str:  # JSON keys are strings, cells may be numbers or booleans
            return cell if isinstance(cell, str) else json.dumps(cell)

        def known(cell):
            if label(cell) not in words:
                raise ValueError(f"is {cell!r}, but --label_words has {', '.join(words)}")

        return Spec(
            {**columns, own.label_column: known},
            templates.custom_template(own.template, templates.label_words(words)),
            correct=lambda row: label(row[own.label_column]),
            candidates=lambda row: list(words),
        )
    if own.candidates_column:

        def index(cell):
            if isinstance(cell, bool) or not isinstance(cell, int) or cell < 0:
                raise ValueError(f"is {cell!r}, but it must be the index of a candidate, from 0")

        return Spec(
            {**columns, own.candidates_column: [str], own.answer_index_column: index},
            templates.custom_template(own.template, lambda data, candidate: candidate),
            correct=lambda row: row[own.candidates_column][row[own.answer_index_column]],
            candidates=lambda row: row[own.candidates_column],
            distinct=True,
        )

    def answers(cell) -> list[str]:
        right = [cell] if isinstance(cell, str) else cell
        if not isinstance(right, list) or not right or not all(isinstance(a, str) for a in right):
            raise ValueError(f"is {cell!r}, but it must be an answer or a list of right answers")
        return right

    return Spec(
        {**columns, own.answer_column: answers},
        templates.custom_template(own.template, templates.answer_line),
        correct=lambda row: answers(row[own.answer_column]),
        kind=GENERATION,
    )


def readable(cell) -> None:
    """A cell that can stand in a prompt: a text or a number."""
    if not isinstance(cell, str | int | float):
        raise ValueError(f"is {cell!r}, but a prompt takes texts and numbers")


def conversation(cell) -> None:
    """A list of {"role", "content"} with an assistant's turn in it."""
    if not isinstance(cell, list) or not all(isinstance(turn, dict) for turn in cell):
        raise ValueError("is not a list of turns")
    for turn in cell:
        if not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError('has a turn without the texts "role" and "content"')
    if not any(turn["role"] == "assistant" and turn["content"] for turn in cell):
        raise ValueError("has no turn of the assistant")


# ---- rows and samples ----


class Samples(Sequence):
    """The samples of one split in file order; each is built when it is looked at."""

    def __init__(self, rows, build: Callable[[int, dict], Sample]):
        self.rows, self.build = rows, build

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.build(int(index), self.rows[int(index)])


class Dataset:
    """The rows of a task as samples. `fingerprint` tells two sets of rows apart; `kind` is a key of METRICS."""

    train_sep = "\n\n"

    def __init__(self, name: str, data_dir=None, own: CustomTask | None = None, metric: str | None = None):
        self.name, splits = name, {}
        if data_dir is None and own is None:
            self.spec = TASKS[name]
            splits = {split: self._hub(split) for split in SPLITS}
        elif data_dir is None:
            raise UsageError("--task_name own needs --data_dir DIR with DIR/train.jsonl and DIR/validation.jsonl")
        else:
            folder = Path(data_dir) if own else Path(data_dir) / name
            self.spec = None if own else TASKS[name]
            for split in SPLITS:
                numbered, digest = read_jsonl(folder / f"{split}.jsonl")
                self.spec = self.spec or custom_spec(own, numbered[0][1])
                for number, row in numbered:
                    check_row(f"{folder / split}.jsonl, row {number}", row, self.spec)
                splits[split] = [row for _, row in numbered], digest
        self.samples = {split: Samples(rows, self._sample) for split, (rows, _) in splits.items()}
        self.fingerprint = hashlib.sha256("".join(digest for _, digest in splits.values()).encode()).hexdigest()[:16]
        self.kind, self.generation = self.spec.kind, self.spec.kind == GENERATION
        self.metric_name = metric or METRICS[self.kind][0]
        if self.metric_name not in METRICS[self.kind]:
            raise UsageError(f"--metric {metric}: task {name} has {', '.join(METRICS[self.kind])}")

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
        return Sample(index, row, self.spec.correct(row), self.spec.candidates(row))

    def get_template(self) -> templates.Template | None:
        return self.spec.template

    def sample_subset(self, data_split: str = "train", seed: int = 0, num: int = 100) -> list[Sample]:
        """`num` samples of a split by seed, in drawn order; all of them where `num` exceeds the split."""
        samples = self.samples[data_split]
        return [samples[i] for i in np.random.RandomState(seed).permutation(len(samples))[:num]]


def read_jsonl(path: Path) -> tuple[list[tuple[int, dict]], str]:
    """([(line number, row)], sha256) of a JSON Lines file; raises UsageError that names the file, and the row where
    there is one."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{path}: {reason}; wanted are {path.parent}/{{train,validation}}.jsonl") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start})") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, row {number}: not JSON ({error})") from error
        if "\\ud" in line and not writable(row):
            raise UsageError(f"{path}, row {number}: half of a surrogate pair, such as \\ud83d alone, is no text")
        if not isinstance(row, dict):
            raise UsageError(f"{path}, row {number}: a row is an object with columns, not {type(row).__name__}")
        rows.append((number, row))
    if not rows:
        raise UsageError(f"{path}: no rows")
    return rows, hashlib.sha256(raw).hexdigest()


def writable(row) -> bool:
    """Whether all texts of a row can be written as UTF-8: half of an emoji can't."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_row(where: str, row: dict, spec: Spec) -> None:
    """Raise UsageError that names the row and the column where a row is not what the task needs."""
    for column, kind in spec.columns.items():
        if column not in row:
            raise UsageError(f"{where}: no column {column!r}; there are {', '.join(row)}")
        try:
            check_cell(row[column], kind)
        except ValueError as error:
            raise UsageError(f"{where}: {column} {error}") from error
    if spec.kind == OPTIONS:
        candidates = spec.candidates(row)
        twice = next((c for c in candidates if candidates.count(c) > 1), None) if spec.distinct else None
        if twice is not None:
            raise UsageError(f"{where}: the candidate {twice!r} stands there twice")
        try:
            correct = spec.correct(row)
        except IndexError as error:
            raise UsageError(f"{where}: the index of the answer is beyond the {len(candidates)} candidates") from error
        if not any(answer in candidates for answer in (correct if isinstance(correct, list) else [correct])):
            raise UsageError(f"{where}: the right answer {correct!r} is not among the candidates")


def check_cell(value, kind) -> None:
    """Raise ValueError where a cell is not of its kind (see `Spec.columns`)."""
    if isinstance(kind, tuple):
        if type(value) is not type(kind[0]) or value not in kind:
            raise ValueError(f"is {value!r}, but it must be one of {', '.join(map(str, kind))}")
    elif isinstance(kind, list):
        if not isinstance(value, list) or not value:
            raise ValueError(f"is {value!r}, but it must be a list with something in it")
        for element in value:
            check_cell(element, kind[0])
    elif isinstance(kind, dict):
        for key, inner in kind.items():
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"is {value!r}, but it must be an object with {key!r}")
            check_cell(value[key], inner)
    elif not isinstance(kind, type):
        kind(value)
    elif not isinstance(value, kind):
        raise ValueError(f"is a {type(value).__name__}, but it must be a {kind.__name__}")
    elif kind is str and not value.strip():
        raise ValueError("is empty")


def get_task(name: str, data_dir=None, own: CustomTask | None = None, metric: str | None = None) -> Dataset:
    """The task of that name, or one of the user's own (name "own"); raises UsageError for an unknown one."""
    if name != "own" and name not in TASKS:
        raise UsageError(f"unknown task {name!r}; there are {', '.join(TASKS)}, and own")
    return Dataset(name, data_dir, (own or CustomTask()) if name == "own" else None, metric)
