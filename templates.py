"""Prompts and label words: how an example reads as text.

A template turns the columns of one row into `prompt + candidate`. Prompts and label words are those of the
MeZO code (arXiv 2305.17333, Table 14), or come from the command line. This module knows text alone, no token
ids and no model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True)
class Template:
    """The texts of an example; `data` are its columns.

    Attributes:
        prompt: data -> the text before a candidate.
        ending: (data, candidate) -> the text that a candidate adds to the prompt.
        calibration: data -> the prompt without its input, for the calibrated score (surface form competition,
            arXiv 2104.08315).
    """

    prompt: Callable[[dict], str]
    ending: Callable[[dict, object], str]
    calibration: Callable[[dict], str] = lambda data: ""

    def encode(self, sample) -> str:
        """Return the prompt of a sample."""
        return self.prompt(sample.data)

    def verbalize(self, sample, candidate) -> str:
        """Return the prompt of a sample with a candidate behind it."""
        return self.prompt(sample.data) + self.ending(sample.data, candidate)

    def encode_sfc(self, sample) -> str:
        """Return the prompt of a sample without its input."""
        return self.calibration(sample.data)

    def verbalize_sfc(self, sample, candidate) -> str:
        """Return the prompt of a sample without its input, with a candidate behind it."""
        return self.calibration(sample.data) + self.ending(sample.data, candidate)


def label_words(words: dict, sep: str = "") -> Callable[[dict, object], str]:
    """Return the ending of a classification task: `sep` and the label word of the candidate."""
    return lambda data, candidate: sep + words[candidate]


def first_answer(candidate):
    """Return the candidate, or the first of a list of right ones."""
    return candidate[0] if isinstance(candidate, list) else candidate


def answer_line(data, candidate) -> str:
    """Return the ending of a generation task: an answer and the end of the line."""
    return f" {first_answer(candidate)}\n"


NO_YES = label_words({0: "No", 1: "Yes"})
YES_NO = label_words({0: "Yes", 1: "No"})

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
    """Return the passage and the question, capitalised, with one question mark."""
    question = data["question"] if data["question"].endswith("?") else data["question"] + "?"
    return f"{data['passage']} {question[0].upper()}{question[1:]}\n"


boolq = Template(boolq_prompt, lambda data, candidate: candidate)


def copa_conjunction(data) -> str:
    """Return the word between a premise and its effect or cause."""
    return "so" if data["question"] == "effect" else "because"


def copa_choice(data, candidate) -> str:
    """Return a choice in the middle of a sentence: its first word in small letters, unless that is "I"."""
    word, space, rest = candidate.partition(" ")
    return " " + (word if word == "I" else word.lower()) + space + rest


copa = Template(
    lambda data: f"{data['premise'].rstrip().removesuffix('.')} {copa_conjunction(data)}",
    copa_choice,
    calibration=copa_conjunction,
)
record = Template(
    lambda data: data["passage"].replace("@highlight\n", "- ") + "\n-",
    lambda data, candidate: " " + data["query"].replace("@placeholder", first_answer(candidate)),
    calibration=lambda data: "-",
)
squad = Template(
    lambda data: (
        f"Title: {data['title']}\nContext: {data['context']}\n"
        f"Question: {data['question'].strip()}\nAnswer:"
    ),
    answer_line,
)  # fmt: skip
drop = Template(
    lambda data: f"Passage: {data['passage']}\nQuestion: {data['question'].strip()}\nAnswer:",
    answer_line,
)


def template_columns(text: str) -> list[str]:
    """Return the names of the columns in a template of the command line.

    Raises:
        ValueError: a brace is open, or holds more than a name.
    """
    parts = [part[1:] for part in Formatter().parse(text) if part[1] is not None]
    if any(format_spec or conversion for _, format_spec, conversion in parts):
        raise ValueError("braces hold the name of a column and nothing else")
    return [name for name, _, _ in parts]


def custom_template(text: str, ending: Callable[[dict, object], str]) -> Template:
    """Return the template of a text of the command line.

    The candidate follows after a space, or at once where the text ends in white space. The prompt without its
    input is the text behind the last cell.

    Args:
        text: `{column}` stands for a cell, `\\n` for a newline, `\\t` for a tab.
        ending: (data, candidate) -> the text that a candidate adds.
    """
    text = text.replace("\\n", "\n").replace("\\t", "\t")
    sep = "" if text[-1:].isspace() else " "
    parts = [(literal, name) for literal, name, _, _ in Formatter().parse(text)]
    calibration = parts[-1][0] if parts[-1][1] is None else ""

    def prompt(data) -> str:
        cells = ["" if name is None else str(data[name]).strip() for _, name in parts]
        return "".join(literal + cell for (literal, _), cell in zip(parts, cells, strict=True))

    return Template(
        prompt,
        lambda data, candidate: sep + ending(data, candidate).lstrip(),
        calibration=lambda data: calibration,
    )
