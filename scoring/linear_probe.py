"""Linear probing: logistic regression on the last hidden state of each prompt, the model as it is.

The measure of what a model knows of a task before anything of it is tuned. For tasks whose rows have the same options.
"""

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import nn

from scoring import evaluate, logprobs, packing
from utils import UsageError


class LinearProbe:
    """A multinomial logistic regression (scikit-learn), its strength of regularisation chosen by cross-validation.

    states: [E, D], see `states`. labels: index of the right option of each. early: stop at a tolerance of 1e-2 instead
    of 1e-4. Raises UsageError where scikit-learn is missing, or an option has fewer than two rows.
    """

    def __init__(self, states: np.ndarray, labels: Sequence[int], early: bool = False, seed: int = 0):
        try:
            from sklearn.linear_model import LogisticRegressionCV
        except ImportError as error:
            raise UsageError("--linear_probing needs scikit-learn: pip install scikit-learn") from error
        counts = Counter(labels)
        if len(counts) < 2 or min(counts.values()) < 2:
            raise UsageError(f"--linear_probing needs two training rows of each of two labels, but has {dict(counts)}")
        self.mean, self.scale = states.mean(0), states.std(0) + 1e-6  # a few coordinates are a hundred times the others
        folds = min(5, *counts.values())
        self.fitted = LogisticRegressionCV(
            cv=folds, max_iter=5000, tol=1e-2 if early else 1e-4, random_state=seed, use_legacy_attributes=False,
            l1_ratios=(0,), scoring="neg_log_loss",
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.fitted.fit(self.normed(states), labels)

    def normed(self, states: np.ndarray) -> np.ndarray:
        return (states - self.mean) / self.scale

    def scores(self, states: np.ndarray, options: int) -> list[list[float]]:
        """Log-probability of each option; of one that no training row had, as low as can be."""
        made = np.full((len(states), options), -1e9)
        made[:, self.fitted.classes_] = self.fitted.predict_log_proba(self.normed(states))
        return made.tolist()


def prompt_states(
    model: nn.Module, examples: Sequence[packing.Example], plain: bool = False, progress: bool = False
) -> np.ndarray:
    """[E, D] fp32: what comes to the head at the last token of each prompt."""
    prompts = []
    for x in examples:
        ends = {tuple(ids[: len(ids) - n]) for ids, n in zip(x.encodings, x.option_lens, strict=True)}
        if len(ends) > 1:  # a tokenizer that merges across the seam: what all options share
            ends = {
                tuple(x.encodings[0][: min(packing.common_prefix_len(x.encodings[0], ids) for ids in x.encodings[1:])])
            }
        prompts.append(packing.Example([[*ends.pop(), 0]], [1]))
    found = evaluate.score_over_ranks(
        model, prompts, plain=plain, progress=progress, read=logprobs.option_hidden_states
    )
    return np.array([state for (state,) in found], dtype=np.float32)
