"""Prompts and label words: how an example reads as text.

A template turns the columns of one row into `prompt + candidate`; prompts and label words are those of the MeZO code
(arXiv 2305.17333, Table 14). Only text here: no token ids, no models.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """`prompt(data)` is the text before a candidate, `sep` what joins the two, `words[candidate]` the label word.

    `calibration(data)` is the prompt without its input, for the calibrated score (surface form competition,
    arXiv 2104.08315).
    """

    prompt: Callable[[dict], str]
    words: dict
    sep: str = ""
    calibration: Callable[[dict], str] = lambda data: ""

    def encode(self, sample) -> str:
        return self.prompt(sample.data)

    def verbalize(self, sample, candidate) -> str:
        return self.prompt(sample.data) + self.sep + self.words[candidate]

    def encode_sfc(self, sample) -> str:
        return self.calibration(sample.data)

    def verbalize_sfc(self, sample, candidate) -> str:
        return self.calibration(sample.data) + self.sep + self.words[candidate]


sentiment = Template(
    prompt=lambda data: f"{data['sentence'].strip()} It was",
    calibration=lambda data: " It was",
    words={0: "terrible", 1: "great"},
    sep=" ",
)
