"""Prompts and label words: how an example reads as text.

A template turns the columns of one row into `prompt + candidate`; prompts and label words are those of the MeZO code
(arXiv 2305.17333, Table 14), or come from the command line. Only text here: no token ids, no models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True)
class Template:
    """`prompt(data)` is the text before a candidate, `ending(data, candidate)` what a candidate adds to it.

    `calibration(data)` is the prompt without its input, for the calibrated score (surface form competition,
    arXiv 2104.08315).
    """

    prompt: Callable[[dict], str]
    ending: Callable[[dict, object], str]
    calibration: Callable[[dict], str] = lambda data: ""

    def encode(self, sample) -> str:
        return self.prompt(sample.data)

    def verbalize(self, sample, candidate) -> str:
        return self.prompt(sample.data) + self.ending(sample.data, candidate)

    def encode_sfc(self, sample) -> str:
        return self.calibration(sample.data)

    def verbalize_sfc(self, sample, candidate) -> str:
        return self.calibration(sample.data) + self.ending(sample.data, candidate)


def label_words(words: dict, sep: str = "") -> Callable[[dict, object], str]:
    """The ending of a classification task: `sep` and the label word of the candidate."""
    return lambda data, candidate: sep + words[candidate]


def first_answer(candidate):
    """The candidate, or the first of several right ones."""
    return candidate[0] if isinstance(candidate, list) else candidate


def answer_line(data, candidate) -> str:
    """The ending of a generation task: an answer, and the line is over."""
    return f" {first_answer(candidate)}\n"


NO_YES, YES_NO = label_words({0: "No", 1: "Yes"}), label_words({0: "Yes", 1: "No"})

sentiment = Template(
    lambda data: f"{data['sentence'].strip()} It was",
    label_words({0: "terrible", 1: "great"}, sep=" "),
    calibration=lambda data: " It was",
)
rte = Template(
    lambda data: f'{data["premise"]}\nDoes this mean that "{data["hypothesis"]}" is true? Yes or No?\n',
    YES_NO,
)
cb = Template(
    lambda data: f'Suppose {data["premise"]} Can we infer that "{data["hypothesis"]}"? Yes, No, or Maybe?\n',
    label_words({0: "Yes", 1: "No", 2: "Maybe"}),
)
wsc = Template(
    lambda data: (
        f'{data["text"]}\nIn the previous sentence, does the pronoun "{data["span2_text"].lower()}" refer to '
        f"{data['span1_text']}? Yes or No?\n"
    ),
    NO_YES,
)
wic = Template(
    lambda data: (
        f'Does the word "{data["word"]}" have the same meaning in these two sentences? Yes, No?\n'
        f"{data['sentence1']}\n{data['sentence2']}\n"
    ),
    NO_YES,
)
multirc = Template(
    lambda data: (
        f"{data['paragraph']}\nQuestion: {data['question']}\n"
        f'I found this answer "{data["answer"]}". Is that correct? Yes or No?\n'
    ),
    NO_YES,
)


def boolq_prompt(data) -> str:
    question = data["question"] if data["question"].endswith("?") else data["question"] + "?"
    return f"{data['passage']} {question[0].upper()}{question[1:]}\n"


boolq = Template(boolq_prompt, lambda data, candidate: candidate)


def conjunction(data) -> str:
    return "so" if data["question"] == "effect" else "because"


def choice(data, candidate) -> str:
    """A choice in the middle of a sentence: its first word in small letters, unless that is "I"."""
    word, space, rest = candidate.partition(" ")
    return " " + (word if word == "I" else word.lower()) + space + rest


copa = Template(
    lambda data: f"{data['premise'].rstrip().removesuffix('.')} {conjunction(data)}", choice, calibration=conjunction
)
record = Template(
    lambda data: data["passage"].replace("@highlight\n", "- ") + "\n-",
    lambda data, candidate: " " + data["query"].replace("@placeholder", first_answer(candidate)),
    calibration=lambda data: "-",
)
squad = Template(
    lambda data: f"Title: {data['title']}\nContext: {data['context']}\nQuestion: {data['question'].strip()}\nAnswer:",
    answer_line,
)
drop = Template(lambda data: f"Passage: {data['passage']}\nQuestion: {data['question'].strip()}\nAnswer:", answer_line)


def template_columns(text: str) -> list[str]:
    """Names of the columns in a template of the command line; raises ValueError where a brace is not around one."""
    parts = [part[1:] for part in Formatter().parse(text) if part[1] is not None]
    if any(spec or conversion for _, spec, conversion in parts):
        raise ValueError("braces hold the name of a column and nothing else")
    return [name for name, _, _ in parts]


def custom_template(text: str, ending: Callable[[dict, object], str]) -> Template:
    """A template of the command line: `{column}` stands for a cell, `\\n` for a newline.

    The candidate follows after a space, or at once where the template ends in white space. Calibrated, the prompt is
    what stands behind the last cell.
    """
    text = text.replace("\\n", "\n").replace("\\t", "\t")
    sep = "" if text[-1:].isspace() else " "
    parts = [(literal, name) for literal, name, _, _ in Formatter().parse(text)]
    calibration = parts[-1][0] if parts[-1][1] is None else ""
    return Template(
        lambda data: "".join(literal + ("" if name is None else str(data[name]).strip()) for literal, name in parts),
        lambda data, candidate: sep + ending(data, candidate).lstrip(),
        calibration=lambda data: calibration,
    )
