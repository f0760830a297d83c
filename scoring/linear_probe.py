"""Linear probing: logistic regression on the last hidden state of each prompt, the model as it is.

The accuracy shows how much a model knows of a task before any weight is tuned. All rows must have the same
options.
"""

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import nn

from scoring import evaluate, logprobs
from scoring.packing import Example, common_prefix_len
from utils import UsageError


class LinearProbe:
    """A multinomial logistic regression (scikit-learn), regularised as cross-validation chooses.

    Args:
        states: [E, D], see `prompt_states`.
        labels: index of the right option of each example.
        early: stop at a tolerance of 1e-2 instead of 1e-4.

    Raises:
        UsageError: scikit-learn is missing, or an option has fewer than two rows.
    """

    def __init__(
        self, states: np.ndarray, labels: Sequence[int], early_stopping: bool = False, seed: int = 0
    ):
        try:
            from sklearn.linear_model import LogisticRegressionCV
        except ImportError as error:
            raise UsageError("--linear_probing needs scikit-learn: pip install scikit-learn") from error
        counts = Counter(labels)
        if len(counts) < 2 or min(counts.values()) < 2:
            message = f"--linear_probing needs two training rows of each of two labels, not {dict(counts)}"
            raise UsageError(message)
        self.mean = states.mean(0)
        self.scale = states.std(0) + 1e-6  # a few coordinates are a hundred times the others
        self.regression = LogisticRegressionCV(
            cv=min(5, *counts.values()),
            max_iter=5000,
            tol=1e-2 if early_stopping else 1e-4,
            random_state=seed,
            use_legacy_attributes=False,
            l1_ratios=(0,),
            scoring="neg_log_loss",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.regression.fit(self.normalise(states), labels)

    def normalise(self, states: np.ndarray) -> np.ndarray:
        """Return states [E, D] with mean 0 and standard deviation 1 over the training rows."""
        return (states - self.mean) / self.scale

    def log_probs(self, states: np.ndarray, n_options: int) -> list[list[float]]:
        """Return the log-probability of each option, [E][n_options]; -1e9 where no training row had it."""
        log_probs = np.full((len(states), n_options), -1e9)
        log_probs[:, self.regression.classes_] = self.regression.predict_log_proba(self.normalise(states))
        return log_probs.tolist()

    def score(
        self, model: nn.Module, examples: Sequence[Example], plain_rows: bool = False, progress: bool = False
    ) -> list[list[float]]:
        """Return the log-probability of each option of each example."""
        states = prompt_states(model, examples, plain_rows, progress)
        return self.log_probs(states, len(examples[0].encodings))


def prompt_states(
    model: nn.Module, examples: Sequence[Example], plain_rows: bool = False, progress: bool = False
) -> np.ndarray:
    """Return the input of the head at the last token of each prompt, [E, D] fp32."""
    prompts = [Example([[*_prompt(x), 0]], [1]) for x in examples]
    states = evaluate.score_over_ranks(
        model, prompts, plain_rows=plain_rows, progress=progress, readout=logprobs.option_hidden_states
    )
    return np.array([state for (state,) in states], dtype=np.float32)


def _prompt(example: Example) -> list[int]:
    """Return the tokens in front of an example's options."""
    first_encoding = example.encodings[0]
    encodings_and_lens = zip(example.encodings, example.option_lens, strict=True)
    prompts = {tuple(ids[: len(ids) - n]) for ids, n in encodings_and_lens}
    if len(prompts) == 1:
        return list(prompts.pop())
    # a tokenizer that merges across the seam: the common beginning of all options
    return first_encoding[: min(common_prefix_len(first_encoding, ids) for ids in example.encodings[1:])]
