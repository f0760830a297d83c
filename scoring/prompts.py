"""Samples of a task as token ids, for training and evaluation: bad prompts show before a model is loaded."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from scoring.packing import Example
from tasks import OPTIONS, TEXT
from utils import UsageError, prompt_tokens, text_tokens

logger = logging.getLogger("run")


class EvalBatch(NamedTuple):
    """Samples to evaluate, the same as token ids, and the calibration prompt of each; None without."""

    samples: list
    examples: list[Example]
    prior: list[Example] | None

    def select(self, indices: Sequence[int]) -> "EvalBatch":
        """Return the part of the batch with these indices."""
        return EvalBatch(*([part[i] for i in indices] if part else None for part in self))


class Prompts:
    """Turns a task's samples into token ids, at most `max_length` of them.

    Args:
        task: an object of `tasks.get_task`.
        max_length: tokens of the longest prompt, with its option or with the answer that is generated.
        vocabulary: number of token ids that the model knows.
        max_new_tokens: the most tokens of a generated answer.
        only_train_option: language modelling learns the right option's tokens, otherwise the prompt's too.
        train_as_classification: train on all options; otherwise language modelling on the right one.
        sfc, icl_sfc: calibrate scores by prompts without the input, for `icl_sfc` with demonstrations.
        model_name: the value of `--model_name`, for messages.
    """

    def __init__(
        self,
        task,
        tokenizer,
        max_length: int,
        vocabulary: int,
        *,
        max_new_tokens: int = 50,
        only_train_option: bool = True,
        train_as_classification: bool = False,
        sfc: bool = False,
        icl_sfc: bool = False,
        model_name: str = "",
    ):
        self.task = task
        self.template = task.get_template()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocabulary = vocabulary
        self.max_new_tokens = max_new_tokens
        self.only_train_option = only_train_option
        self.train_as_classification = train_as_classification
        self.sfc = sfc
        self.icl_sfc = icl_sfc
        self.model_name = model_name

    def examples(self, samples, demonstrations=(), sfc=False, icl_sfc=False, gold=True) -> list[Example]:
        """Return samples as token ids.

        Args:
            demonstrations: one list for all samples, or a list of lists, one for each sample.
            sfc, icl_sfc: give the calibration prompts.
            gold: where answers are generated, put the right one behind the prompt.

        Raises:
            UsageError: a prompt does not fit, an option is empty, or the model does not know an id.
        """
        has_list_each = bool(demonstrations) and isinstance(demonstrations[0], list)
        examples = []
        n_cut = 0
        for i, sample in enumerate(samples):
            shots = demonstrations[i] if has_list_each else demonstrations
            example, num_cut = self._encode(sample, shots, sfc, icl_sfc, gold)
            self._refuse_unknown_ids(example)
            examples.append(example)
            n_cut += num_cut > 0
        if n_cut:
            text = "%d of %d prompts are longer than %d tokens: cut on the left"
            logger.info(text, n_cut, len(examples), self.max_length)
        return examples

    def _encode(self, sample, demonstrations, sfc: bool, icl_sfc: bool, gold: bool) -> tuple[Example, int]:
        """Return a sample as token ids, and how many tokens it lost on its left; see `examples`."""
        task = self.task
        if task.kind == TEXT:
            where = f"task {task.name}, example {sample.id}"
            ids, targets, num_cut = text_tokens(self.tokenizer, sample.data, self.max_length, where)
            return Example([ids], [len(targets)], targets=[targets]), num_cut
        encodings, option_lens, num_cut = prompt_tokens(
            task,
            self.template,
            demonstrations,
            sample,
            self.tokenizer,
            self.max_length,
            sfc,
            icl_sfc,
            generation=task.generation,
            generation_with_gold=task.generation and gold,
            max_new_tokens=self.max_new_tokens if task.generation else None,
        )
        return Example(encodings, option_lens, self.label(sample)), num_cut

    def _refuse_unknown_ids(self, example: Example) -> None:
        largest_id = max(map(max, example.encodings))
        if largest_id >= self.vocabulary:
            raise UsageError(
                f"--model_name {self.model_name}: its tokenizer gives id {largest_id}, but the model knows "
                f"{self.vocabulary} tokens: the tokenizer is of another model"
            )

    def label(self, sample) -> int:
        """Return the index of the right candidate, the first of them where several are right."""
        if self.task.kind != OPTIONS:
            return 0
        right_candidates = sample.correct_candidate
        right_candidates = right_candidates if isinstance(right_candidates, list) else [right_candidates]
        return next(i for i, candidate in enumerate(sample.candidates) if candidate in right_candidates)

    def eval_batch(self, samples, demonstrations=()) -> EvalBatch:
        """Return the batch of an evaluation on these samples; demonstrations as of `examples`."""
        prior = None
        if self.sfc or self.icl_sfc:
            prior = self.examples(samples, demonstrations, sfc=self.sfc, icl_sfc=self.icl_sfc)
        return EvalBatch(samples, self.examples(samples, demonstrations, gold=False), prior)

    def training_examples(self, samples) -> list[Example]:
        """Return samples as the training loss takes them."""
        examples = self.examples(samples)
        if self.train_as_classification:
            return examples
        return [language_modelling_example(example, self.only_train_option) for example in examples]


def language_modelling_example(example: Example, only_option: bool) -> Example:
    """Return the right option alone, to be trained as text: its tokens, or all tokens behind the first."""
    label = example.label
    ids = example.encodings[label]
    if not only_option:
        return Example([ids], [len(ids) - 1])
    targets = [example.targets[label]] if example.targets else None
    return Example([ids], [example.option_lens[label]], targets=targets)
