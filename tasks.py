"""Tasks: where the rows come from, what their columns must hold, and which candidates an example has.

Rows are read from `DIR/<TaskName>/{train,validation}.jsonl` (`data_dir`) or from the Hugging Face hub. A task
of the user's own, named `own`, is described on the command line and read from `DIR/{train,validation}.jsonl`.
All rows of a local file are checked at once, but a row becomes a `Sample` only when it is read. This module
knows no model.
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
# The kinds of tasks: options are scored, answers generated, or whole texts learned.
OPTIONS = "options"
GENERATION = "generation"
TEXT = "text"
METRICS = {  # by kind of task; the first is the default
    OPTIONS: ("accuracy", "macro_f1", "loss"),
    GENERATION: ("f1", "em"),
    TEXT: ("loss", "perplexity"),
}


@dataclass(frozen=True)
class Sample:
    """One example.

    Attributes:
        id: its index in the split.
        data: the cells by column.
        correct_candidate: one of `candidates`, or a list of right ones; for generation the right answers.
        candidates: what the model chooses from; None where it generates.
    """

    id: int
    data: dict
    correct_candidate: object = None
    candidates: list | None = None


@dataclass(frozen=True)
class Spec:
    """One row of the table of tasks.

    Attributes:
        columns: column -> the kind of its cells: a type; a tuple of values (a label column); a list with the
            kind of its elements; a dict of kinds; or a function that raises ValueError for a cell that it
            refuses.
        template: makes the prompts; None where the row itself is the text.
        correct: row -> the right candidate, or a list of right ones.
        candidates: row -> the candidates.
        hub: (dataset, configuration) on the hub; None where the task is not there.
        kind: OPTIONS, GENERATION or TEXT.
        distinct: whether a repeated candidate is an error.
    """

    columns: dict
    template: templates.Template | None
    correct: Callable[[dict], object] = lambda row: None
    candidates: Callable[[dict], list | None] = lambda row: None
    hub: tuple[str, str | None] | None = None
    kind: str = OPTIONS
    distinct: bool = False


def classification(template: templates.Template, *columns: str, labels=(0, 1), hub=None) -> Spec:
    """Return the `Spec` of a task with these columns of text and a column `label`."""
    return Spec(
        {**dict.fromkeys(columns, str), "label": labels},
        template,
        correct=lambda row: row["label"],
        candidates=lambda row: list(labels),
        hub=hub,
    )


GLUE = "nyu-mll/glue"
SUPER_GLUE = "aps/super_glue"
SENTIMENT_TASKS = ("Reviews", "Products", "Tweets", "Editorials")  # made by starter.py
TASKS = {
    "SST2": classification(templates.sentiment, "sentence", hub=(GLUE, "sst2")),
    "RTE": classification(templates.rte, "premise", "hypothesis", hub=(SUPER_GLUE, "rte")),
    "CB": classification(templates.cb, "premise", "hypothesis", labels=(0, 1, 2), hub=(SUPER_GLUE, "cb")),
    "BoolQ": Spec(
        {"passage": str, "question": str, "answer": (True, False)},
        templates.boolq,
        correct=lambda row: "Yes" if row["answer"] else "No",
        candidates=lambda row: ["Yes", "No"],
        hub=("google/boolq", None),
    ),
    "WSC": classification(templates.wsc, "text", "span1_text", "span2_text", hub=(SUPER_GLUE, "wsc.fixed")),
    "WIC": classification(templates.wic, "word", "sentence1", "sentence2", hub=(SUPER_GLUE, "wic")),
    "MultiRC": classification(
        templates.multirc,
        "paragraph",
        "question",
        "answer",
        hub=(SUPER_GLUE, "multirc"),
    ),
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
    **{name: classification(templates.sentiment, "sentence") for name in SENTIMENT_TASKS},
}


# ---- a task of the user's own ----


@dataclass(frozen=True)
class CustomTask:
    """The flags that describe a task of the user's own; the fields have the names of the flags."""

    template: str | None = None
    label_words: str | None = None
    label_column: str | None = None
    candidates_column: str | None = None
    answer_index_column: str | None = None
    answer_column: str | None = None


def custom_spec(task: CustomTask, first_row: dict) -> Spec:
    """Return the `Spec` that these flags describe.

    Args:
        task: the flags. Without any of them the columns `messages`, or `prompt` and `response`, decide.
        first_row: the first training row.

    Raises:
        UsageError: flags are missing or exclude each other, or the template is malformed.
    """
    if task == CustomTask():
        return text_spec(first_row)
    flag_sets = {
        "--label_words and --label_column": (task.label_words, task.label_column),
        "--candidates_column and --answer_index_column": (task.candidates_column, task.answer_index_column),
        "--answer_column": (task.answer_column,),
    }
    flag_names = [names for names, values in flag_sets.items() if any(values)]
    if not task.template or len(flag_names) != 1 or not all(flag_sets[flag_names[0]]):
        raise UsageError(f"--task_name own needs --template and one of: {'; '.join(flag_sets)}")
    columns = prompt_columns(task.template)
    if task.label_words:
        return label_spec(task, columns)
    if task.candidates_column:
        return candidates_spec(task, columns)
    return answer_spec(task, columns)


def text_spec(first_row: dict) -> Spec:
    """Return the `Spec` of rows that are the text themselves: a chat, or a prompt with its response."""
    if "messages" in first_row:
        return Spec({"messages": check_chat}, None, kind=TEXT)
    if "prompt" in first_row and "response" in first_row:
        return Spec({"prompt": str, "response": str}, None, kind=TEXT)
    raise UsageError(
        "--task_name own needs --template with --label_words, --candidates_column or --answer_column, "
        f"or a column messages, or prompt and response; the columns are {', '.join(first_row)}"
    )


def prompt_columns(template: str) -> dict[str, Callable]:
    """Return the columns that a `--template` reads, with the check of their cells."""
    try:
        names = templates.template_columns(template)
    except ValueError as error:
        raise UsageError(f"--template {template!r}: {error}") from error
    if not names:
        raise UsageError(f"--template {template!r} has no {{column}} in it")
    return dict.fromkeys(names, check_prompt_cell)


def parse_label_words(text: str) -> dict[str, str]:
    """Return {label: word} of the JSON in `--label_words`, or raise UsageError unless two words differ."""
    try:
        words = json.loads(text)
        assert isinstance(words, dict) and len(words) > 1
        assert all(isinstance(word, str) and word.strip() for word in words.values())
        assert len(set(words.values())) == len(words)
    except (ValueError, AssertionError):
        example = '\'{"neg": "terrible", "pos": "great"}\''
        message = f"--label_words {text}: not a JSON object of two different words or more, as {example}"
        raise UsageError(message) from None
    return words


def label_key(cell) -> str:
    """Return the key of `--label_words` for a cell: JSON keys are strings, cells may be numbers."""
    return cell if isinstance(cell, str) else json.dumps(cell)


def label_spec(task: CustomTask, columns: dict) -> Spec:
    """Return the `Spec` of classification: a label column, and a word for each label."""
    words = parse_label_words(task.label_words)

    def check_label(cell) -> None:
        if label_key(cell) not in words:
            raise ValueError(f"is {cell!r}, but --label_words has {', '.join(words)}")

    return Spec(
        {**columns, task.label_column: check_label},
        templates.custom_template(task.template, templates.label_words(words)),
        correct=lambda row: label_key(row[task.label_column]),
        candidates=lambda row: list(words),
    )


def candidates_spec(task: CustomTask, columns: dict) -> Spec:
    """Return the `Spec` of multiple choice: a column of candidates, and the index of the right one."""
    return Spec(
        {**columns, task.candidates_column: [str], task.answer_index_column: check_index},
        templates.custom_template(task.template, lambda data, candidate: candidate),
        correct=lambda row: row[task.candidates_column][row[task.answer_index_column]],
        candidates=lambda row: row[task.candidates_column],
        distinct=True,
    )


def answer_spec(task: CustomTask, columns: dict) -> Spec:
    """Return the `Spec` of generation: a column with the answer, or a list of right answers."""
    return Spec(
        {**columns, task.answer_column: right_answers},
        templates.custom_template(task.template, templates.answer_line),
        correct=lambda row: right_answers(row[task.answer_column]),
        kind=GENERATION,
    )


# ---- checks of a cell ----


def check_index(cell) -> None:
    """Raise ValueError where a cell is not the index of a candidate."""
    if isinstance(cell, bool) or not isinstance(cell, int) or cell < 0:
        raise ValueError(f"is {cell!r}, but it must be the index of a candidate, from 0")


def right_answers(cell) -> list[str]:
    """Return the right answers of a cell; raises ValueError where the cell holds none."""
    answers = [cell] if isinstance(cell, str) else cell
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"is {cell!r}, but it must be an answer or a list of right answers")
    return answers


def check_prompt_cell(cell) -> None:
    """Raise ValueError where a cell can't stand in a prompt, as texts and numbers can."""
    if not isinstance(cell, str | int | float):
        raise ValueError(f"is {cell!r}, but a prompt takes texts and numbers")


def check_chat(cell) -> None:
    """Raise ValueError where a cell is not a list of {"role", "content"} with an assistant's turn in it."""
    if not isinstance(cell, list) or not all(isinstance(turn, dict) for turn in cell):
        raise ValueError("is not a list of turns")
    for turn in cell:
        if not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError('has a turn without the texts "role" and "content"')
    if not any(turn["role"] == "assistant" and turn["content"] for turn in cell):
        raise ValueError("has no turn of the assistant")


# ---- rows and samples ----


class Samples(Sequence):
    """The samples of one split in file order; a sample is built when it is read.

    Args:
        rows: the rows, a list or a `datasets.Dataset`.
        build: (index, row) -> sample.
    """

    def __init__(self, rows, build: Callable[[int, dict], Sample]):
        self.rows = rows
        self.build = build

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.build(int(index), self.rows[int(index)])


class Dataset:
    """The rows of a task as samples.

    Attributes:
        samples: {"train" | "validation": sequence of samples, in file order}.
        fingerprint: of the rows; two sets of rows have different ones.
        kind: the kind of the task, a key of METRICS.
        generation: whether answers are generated.
        metric_name: the metric by which the best checkpoint is chosen.

    Args:
        name: a name in TASKS, or "own".
        data_dir: the folder that rows are read from; None for the hub.
        custom: the flags of a task of the user's own.
        metric: the metric that is chosen, None for the default of the kind.

    Raises:
        UsageError: rows can't be read or do not fit the task, or the task has no such metric.
    """

    train_sep = "\n\n"

    def __init__(
        self, name: str, data_dir=None, custom: CustomTask | None = None, metric: str | None = None
    ):  # fmt: skip
        self.name = name
        if data_dir is not None:
            folder = Path(data_dir) if custom else Path(data_dir) / name
            self.spec, rows, digests = read_folder(folder, None if custom else TASKS[name], custom)
        elif custom is None:
            self.spec = TASKS[name]
            rows, digests = load_from_hub(name, self.spec)
        else:
            raise UsageError(
                "--task_name own needs --data_dir DIR with DIR/train.jsonl and DIR/validation.jsonl"
            )  # fmt: skip
        self.samples = {split: Samples(rows[split], self._build_sample) for split in SPLITS}
        self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        self.kind = self.spec.kind
        self.generation = self.kind == GENERATION
        self.metric_name = metric or METRICS[self.kind][0]
        if self.metric_name not in METRICS[self.kind]:
            raise UsageError(f"--metric {metric}: task {name} has {', '.join(METRICS[self.kind])}")

    def _build_sample(self, index: int, row: dict) -> Sample:
        return Sample(index, row, self.spec.correct(row), self.spec.candidates(row))

    def get_template(self) -> templates.Template | None:
        """Return the template of the prompts, None where the rows are the text themselves."""
        return self.spec.template

    def sample_subset(self, data_split: str = "train", seed: int = 0, num: int = 100) -> list[Sample]:
        """Return `num` samples of a split by seed, in drawn order; all where the split has no more."""
        samples = self.samples[data_split]
        return [samples[i] for i in np.random.RandomState(seed).permutation(len(samples))[:num]]


def load_from_hub(name: str, spec: Spec) -> tuple[dict, list[str]]:
    """Return ({split: rows}, fingerprint of each split) of a task on the Hugging Face hub.

    Raises:
        UsageError: the task is not there, the hub can't be reached, or a column is missing.
    """
    if spec.hub is None:
        raise UsageError(f"task {name} is not on the hub: run 'make starter', then give --data_dir starter")
    import datasets

    path, configuration = spec.hub
    splits = {}
    for split in SPLITS:
        try:
            splits[split] = datasets.load_dataset(path, configuration, split=split)
        except Exception as error:  # network, cache and client raise many kinds: the advice is the same
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(
                f"could not load {path} from the Hugging Face hub ({reason}); give --data_dir DIR with "
                f"DIR/{name}/train.jsonl and validation.jsonl, or run 'make starter' and take "
                "--task_name Reviews --data_dir starter --model_name starter/smollm2-135m"
            ) from error
        columns = splits[split].column_names
        absent = [column for column in spec.columns if column not in columns]
        if absent:
            raise UsageError(f"{path}, {split}: no column {absent[0]!r}; there are {', '.join(columns)}")
    return splits, [str(rows._fingerprint) for rows in splits.values()]


def read_folder(
    folder: Path, spec: Spec | None, custom: CustomTask | None
) -> tuple[Spec, dict[str, list[dict]], list[str]]:
    """Return (spec, {split: rows}, sha256 of each file) of a folder of JSON Lines files, all rows checked.

    Args:
        folder: holds train.jsonl and validation.jsonl.
        spec: of the task; None for a task of the user's own, whose spec depends on the first row.
        custom: the flags of a task of the user's own.
    """
    splits = {}
    digests = []
    for split in SPLITS:
        numbered_rows, digest = read_jsonl(folder / f"{split}.jsonl")
        spec = spec or custom_spec(custom, numbered_rows[0][1])
        for number, row in numbered_rows:
            check_row(f"{folder / split}.jsonl, row {number}", row, spec)
        splits[split] = [row for _, row in numbered_rows]
        digests.append(digest)
    return spec, splits, digests


def read_jsonl(path: Path) -> tuple[list[tuple[int, dict]], str]:
    """Return ([(line number, row)], sha256) of a JSON Lines file.

    Raises:
        UsageError: names the file, and the row where there is one.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
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
        if "\\ud" in line and not is_valid_unicode(row):
            problem = "half of a surrogate pair, such as \\ud83d alone"
            raise UsageError(f"{path}, row {number}: {problem}, is no text")
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UsageError(f"{path}, row {number}: a row is an object with columns, not {kind}")
        rows.append((number, row))
    if not rows:
        raise UsageError(f"{path}: no rows")
    return rows, hashlib.sha256(content).hexdigest()


def is_valid_unicode(row) -> bool:
    """Return whether all texts of a row can be written as UTF-8: half of an emoji can't."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_row(where: str, row: dict, spec: Spec) -> None:
    """Raise UsageError where a row is not what the task needs.

    Args:
        where: file and row, for the message.
        row: the cells by column.
        spec: of the task.
    """
    for column, kind in spec.columns.items():
        if column not in row:
            raise UsageError(f"{where}: no column {column!r}; there are {', '.join(row)}")
        try:
            check_cell(row[column], kind)
        except ValueError as error:
            raise UsageError(f"{where}: {column} {error}") from error
    if spec.kind == OPTIONS:
        check_candidates(where, row, spec)


def check_candidates(where: str, row: dict, spec: Spec) -> None:
    """Raise UsageError where the right answer is no candidate, or a candidate is repeated but must not be."""
    candidates = spec.candidates(row)
    if spec.distinct:
        for candidate in candidates:
            if candidates.count(candidate) > 1:
                raise UsageError(f"{where}: the candidate {candidate!r} stands there twice")
    try:
        correct = spec.correct(row)
    except IndexError as error:
        message = f"{where}: the index of the answer is beyond the {len(candidates)} candidates"
        raise UsageError(message) from error
    if not any(answer in candidates for answer in (correct if isinstance(correct, list) else [correct])):
        raise UsageError(f"{where}: the right answer {correct!r} is not among the candidates")


def check_cell(value, kind) -> None:
    """Raise ValueError where a cell is not of its kind.

    Args:
        value: the cell.
        kind: a value of `Spec.columns`.
    """
    if isinstance(kind, tuple):
        if type(value) is not type(kind[0]) or value not in kind:
            raise ValueError(f"is {value!r}, but it must be one of {', '.join(map(str, kind))}")
    elif isinstance(kind, list):
        if not isinstance(value, list) or not value:
            raise ValueError(f"is {value!r}, but it must be a list with something in it")
        for element in value:
            check_cell(element, kind[0])
    elif isinstance(kind, dict):
        for key, element_kind in kind.items():
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"is {value!r}, but it must be an object with {key!r}")
            check_cell(value[key], element_kind)
    elif not isinstance(kind, type):
        kind(value)
    elif not isinstance(value, kind):
        raise ValueError(f"is a {type(value).__name__}, but it must be a {kind.__name__}")
    elif kind is str and not value.strip():
        raise ValueError("is empty")


def get_task(
    name: str, data_dir=None, custom: CustomTask | None = None, metric: str | None = None
) -> Dataset:  # fmt: skip
    """Return the task of a name in TASKS, or the user's own (name "own").

    Raises:
        UsageError: there is no such task, or its rows do not fit.
    """
    if name != "own" and name not in TASKS:
        raise UsageError(f"unknown task {name!r}; there are {', '.join(TASKS)}, and own")
    return Dataset(name, data_dir, (custom or CustomTask()) if name == "own" else None, metric)
