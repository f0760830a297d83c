"""Evaluate a model on a task: scores of options, predictions, metrics."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from distributed import collectives, data_parallel
from scoring import generate, logprobs
from scoring.generate import GenerationSettings
from scoring.metrics import METRICS_BY_KIND
from scoring.packing import Example, loss_terms, num_tokens
from scoring.prompts import EvalBatch, Prompts
from tasks import GENERATION, OPTIONS, TEXT

logger = logging.getLogger("run")


class Evaluator:
    """Scores, predicts and measures a model on the examples of a task, the work divided among the ranks.

    `attach` sets the model, when the model has been loaded.

    Args:
        task: an object of `tasks.get_task`.
        prompts: turns samples of the task into examples.
        generation: how answers are generated, for a task of that kind.
        seed: of generated samples.
        progress: whether to draw a progress bar.
        verbose: log the first prompt of a batch and its prediction.

    Attributes:
        model: the model in evaluation mode; None before `attach`.
        plain_rows: whether the model needs plain rows, see `packing.py`.
        probe: a `linear_probe.LinearProbe` whose scores take the place of the model's own; None without.
    """

    def __init__(
        self,
        task,
        tokenizer,
        prompts: Prompts,
        generation: GenerationSettings | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        verbose: bool = False,
    ):
        self.task = task
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.generation = generation or GenerationSettings()
        self.seed = seed
        self.progress = progress
        self.verbose = verbose
        self.model: nn.Module | None = None
        self.plain_rows = False
        self.probe = None

    def attach(self, model: nn.Module) -> None:
        """Evaluate this model from here on, in packed rows where it can take them."""
        self.model = model
        self.plain_rows = not logprobs.supports_packed_rows(model, self.prompts.max_length)
        if self.plain_rows:
            name = Path(model.config.name_or_path).name or type(model).__name__
            logger.warning("%s can't take packed rows: scoring one padded row per candidate", name)

    def score(self, batch: EvalBatch, progress: bool = True) -> list[list[float]]:
        """Return the score of every candidate of each example.

        A score is the mean log-probability of the candidate's tokens. With calibration prompts a score is the
        sum minus the sum behind the calibration prompt; with a linear probe, the probe's log-probability.
        """
        progress = progress and self.progress
        if self.probe:
            return self.probe.score(self.model, batch.examples, self.plain_rows, progress)
        score = functools.partial(score_over_ranks, self.model, plain_rows=self.plain_rows)
        sums = score(batch.examples, progress=progress)
        if batch.prior is None:
            return _mean_logprobs(batch.examples, sums)
        keys = [tuple(map(tuple, x.encodings)) for x in batch.prior]
        # most tasks have one calibration prompt for all examples
        distinct_prompts = dict(zip(keys, batch.prior, strict=True))
        prior_sums = dict(zip(distinct_prompts, score(list(distinct_prompts.values())), strict=True))
        return [
            [s - p for s, p in zip(example_sums, prior_sums[key], strict=True)]
            for example_sums, key in zip(sums, keys, strict=True)
        ]

    def predict(self, batch: EvalBatch, progress: bool = True) -> list[dict]:
        """Return a dict for each example: the sample's `id`, and the entries of the task's kind.

        Returns:
            Options: `candidates`, `scores`, `prediction`, `gold`, `loss` (cross-entropy of the right option).
            Generated answers: `prediction`, `gold`.
            Texts: `logprob` (of all tokens to be learned), `tokens` (their number).
        """
        predict_kind = {
            OPTIONS: self._predict_options,
            GENERATION: self._predict_answers,
            TEXT: self._predict_texts,
        }[self.task.kind]
        predictions = predict_kind(batch, progress)
        if self.verbose:
            text = self.tokenizer.decode(batch.examples[0].encodings[0])
            logger.info("first prompt, as the model sees it: %r; %s", text, predictions[0])
        return [{"id": s.id, **prediction} for s, prediction in zip(batch.samples, predictions, strict=True)]

    def _predict_options(self, batch: EvalBatch, progress: bool) -> list[dict]:
        predictions = []
        for sample, x, scores in zip(batch.samples, batch.examples, self.score(batch, progress), strict=True):
            predictions.append(
                {
                    "candidates": sample.candidates,
                    "scores": scores,
                    "prediction": sample.candidates[scores.index(max(scores))],
                    "gold": sample.correct_candidate,
                    "loss": -torch.tensor(scores).log_softmax(0)[x.label].item(),
                }
            )
        return predictions

    def _predict_answers(self, batch: EvalBatch, progress: bool) -> list[dict]:
        prompts = [x.encodings[0] for x in batch.examples]
        settings = self.generation

        def answer(indices: Sequence[int]) -> list[str]:
            return generate.generate(
                self.model,
                self.tokenizer,
                [prompts[i] for i in indices],
                eos_token=settings.eos_token,
                max_new_tokens=settings.max_new_tokens,
                use_cache=not self.plain_rows,
                seed=self.seed + collectives.rank(),
                progress=progress and self.progress,
                **settings.sampling,
            )

        answers = data_parallel.map_over_ranks(prompts, [len(prompt) for prompt in prompts], answer)
        return [
            {"prediction": prediction, "gold": sample.correct_candidate}
            for prediction, sample in zip(answers, batch.samples, strict=True)
        ]

    def _predict_texts(self, batch: EvalBatch, progress: bool) -> list[dict]:
        predictions = []
        for x, (mean,) in zip(batch.examples, self.score(batch, progress), strict=True):
            tokens = x.option_lens[0]
            predictions.append({"logprob": mean * tokens, "tokens": tokens})
        return predictions

    def metrics(self, predictions: Sequence[dict]) -> dict[str, float]:
        """Return the metrics of predictions, see `METRICS_BY_KIND`."""
        return METRICS_BY_KIND[self.task.kind](predictions, self.task.metric_name)

    def evaluate(self, batch: EvalBatch, progress: bool = True) -> dict[str, float]:
        """Return the metrics of the model's predictions."""
        return self.metrics(self.predict(batch, progress))

    def objective_loss(self, objective: Callable, batch: EvalBatch, model, inputs: dict) -> Tensor:
        """Return minus the objective of the predictions on some rows of a batch: a loss without a gradient.

        Args:
            objective: function of (predictions, golds), see `metrics.find_metric`.
            batch: all training rows.
            model: not used: the attached model is.
            inputs: `row`, the numbers of the rows [n], int64.

        Returns:
            0-dim fp32.
        """
        with data_parallel.on_this_rank_only():
            predictions = self.predict(batch.select(inputs["row"].tolist()), progress=False)
        answers = [prediction["prediction"] for prediction in predictions]
        golds = [prediction["gold"] for prediction in predictions]
        return torch.tensor(-float(objective(answers, golds)))


def _mean_logprobs(examples: Sequence[Example], sums: Sequence[list[float]]) -> list[list[float]]:
    """Return each option's log-probability divided by its number of tokens."""
    return [
        [s / n for s, n in zip(option_sums, x.option_lens, strict=True)]
        for x, option_sums in zip(examples, sums, strict=True)
    ]


def score_over_ranks(
    model: nn.Module,
    examples: Sequence[Example],
    plain_rows: bool = False,
    progress: bool = False,
    readout: Callable | None = None,
) -> list[list]:
    """Return the result of `logprobs.score`, the examples divided among the ranks."""

    def score(indices: Sequence[int]) -> list[list]:
        part = [examples[i] for i in indices]
        return logprobs.score(model, part, plain_rows=plain_rows, progress=progress, readout=readout)

    first_encodings = [x.encodings[0] for x in examples]
    return data_parallel.map_over_ranks(first_encodings, list(map(num_tokens, examples)), score)


def mean_loss(
    model: nn.Module,
    examples: Sequence[Example],
    classification: bool,
    plain_rows: bool = False,
) -> float:
    """Return `logprobs.loss` of many examples as if they were one batch; NaN where the model gives NaN."""
    try:
        sums = score_over_ranks(model, examples, plain_rows=plain_rows)
    except FloatingPointError:
        return math.nan
    if not classification:
        return -sum(map(sum, sums)) / loss_terms(examples, False)
    means = _mean_logprobs(examples, sums)
    losses = [-torch.tensor(m).log_softmax(0)[x.label].item() for m, x in zip(means, examples, strict=True)]
    return math.fsum(losses) / len(losses)
