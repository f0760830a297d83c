"""Samples as token ids, for the training loss and for evaluations: bad prompts show before a model is loaded."""

import logging
from typing import NamedTuple

from scoring.packing import Example
from tasks import OPTIONS, TEXT
from utils import UsageError, prompt_tokens, text_tokens

logger = logging.getLogger("run")


class EvalBatch(NamedTuple):
    """Samples and what they are as token ids; `prior` is the calibration prompt of each, or None."""

    samples: list
    examples: list[Example]
    prior: list[Example] | None


class Prompts:
    """What a task's samples are under these flags and this tokenizer, in at most `max_length` tokens.

    Raises UsageError for a prompt that does not fit, an empty option, an id that the `vocabulary` does not have.
    """

    def __init__(self, args, task, tokenizer, max_length: int, vocabulary: int):
        self.args, self.task, self.template = args, task, task.get_template()
        self.tokenizer, self.max_length, self.vocabulary = tokenizer, max_length, vocabulary

    def examples(self, samples, demonstrations=(), sfc=False, icl_sfc=False, gold=True) -> list[Example]:
        """Samples as token ids; `demonstrations` is one list for all samples, or a list of lists, one a sample.

        Where answers are generated, `gold` puts the right one behind the prompt.
        """
        each = demonstrations if demonstrations and isinstance(demonstrations[0], list) else None
        new = self.args.max_new_tokens if self.task.generation else None
        made, cuts = [], 0
        for i, sample in enumerate(samples):
            if self.task.kind == TEXT:
                where = f"task {self.task.name}, example {sample.id}"
                ids, learned, cut = text_tokens(self.tokenizer, sample.data, self.max_length, where)
                made.append(Example([ids], [len(learned)], targets=[learned]))
            else:
                shots = each[i] if each else demonstrations
                encodings, option_lens, cut = prompt_tokens(
                    self.task, self.template, shots, sample, self.tokenizer, self.max_length, sfc, icl_sfc,
                    self.task.generation, self.task.generation and gold, new,
                )  # fmt: skip
                made.append(Example(encodings, option_lens, self.label(sample)))
            cuts += cut > 0
            top = max(map(max, made[-1].encodings))
            if top >= self.vocabulary:
                raise UsageError(
                    f"--model_name {self.args.model_name}: its tokenizer gives id {top}, but the model knows "
                    f"{self.vocabulary} tokens: the tokenizer is of another model"
                )
        if cuts:
            logger.info("%d of %d prompts are longer than %d tokens: cut on the left", cuts, len(made), self.max_length)
        return made

    def label(self, sample) -> int:
        """Index of the right candidate, the first of them where several are right."""
        if self.task.kind != OPTIONS:
            return 0
        right = sample.correct_candidate
        right = right if isinstance(right, list) else [right]
        return next(i for i, candidate in enumerate(sample.candidates) if candidate in right)

    def rows(self, samples, demonstrations=()) -> EvalBatch:
        """What an evaluation on these samples needs."""
        args, prior = self.args, None
        if args.sfc or args.icl_sfc:
            prior = self.examples(samples, demonstrations, sfc=args.sfc, icl_sfc=args.icl_sfc)
        return EvalBatch(samples, self.examples(samples, demonstrations, gold=False), prior)

    def learned(self, samples) -> list[Example]:
        """Samples as the training loss takes them."""
        examples, args = self.examples(samples), self.args
        if args.train_as_classification:
            return examples
        return [language_modelling_example(x, args.only_train_option) for x in examples]


def language_modelling_example(example: Example, only_option: bool) -> Example:
    """The right option alone, to be trained as text: its own tokens, or all tokens behind the first."""
    ids, k = example.encodings[example.label], example.label
    if not only_option:
        return Example([ids], [len(ids) - 1])
    return Example([ids], [example.option_lens[k]], targets=example.targets and [example.targets[k]])
