"""Numbers for people: accuracy, exact match and F1, and what a shift of label bias alone could reach."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

from utils import UsageError, load_from_file

LOWER_IS_BETTER = ("loss", "perplexity")  # metrics of which less is better


def accuracy(predictions: Sequence, golds: Sequence) -> float:
    """Share of predictions that are the gold candidate, or one of them where a gold is a list."""
    hits = (
        prediction in gold if isinstance(gold, list) else prediction == gold
        for prediction, gold in zip(predictions, golds, strict=True)
    )
    return sum(hits) / len(golds)


def macro_f1(predictions: Sequence, golds: Sequence) -> float:
    """Mean over the classes that occur of 2·hits / (predicted + gold); of a list of golds, the one that was hit, or the
    first."""
    golds = [(p if p in g else g[0]) if isinstance(g, list) else g for p, g in zip(predictions, golds, strict=True)]
    predicted, gold = Counter(predictions), Counter(golds)
    hits = Counter(p for p, g in zip(predictions, golds, strict=True) if p == g)
    return fmean(2 * hits[c] / (predicted[c] + gold[c]) for c in predicted | gold)


def answer_words(answer: str) -> list[str]:
    """The words of an answer that count: lower case, without punctuation and articles (SQuAD, arXiv 1606.05250)."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1 where the words of the prediction are those of any reference answer, in order."""
    return float(any(answer_words(prediction) == answer_words(gold) for gold in golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """The best F1 of the prediction's bag of words with that of a reference answer; 1 where both are empty."""
    return max(bag_f1(Counter(answer_words(prediction)), Counter(answer_words(gold))) for gold in golds)


def bag_f1(a: Counter, b: Counter) -> float:
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def find_metric(name: str) -> Callable[[Sequence, Sequence], float]:
    """(predictions, golds) -> a number of which more is better: accuracy, mean F1, mean exact match, or the function
    `file.py:name`; raises UsageError where there is none of that name."""
    known = {
        "accuracy": accuracy,
        "f1": lambda predictions, golds: fmean(map(f1, predictions, golds)),
        "em": lambda predictions, golds: fmean(map(exact_match, predictions, golds)),
    }
    if name in known:
        return known[name]
    found = load_from_file(name)
    if not callable(found):
        raise UsageError(f"--objective {name}: there are {', '.join(known)}, or file.py:name of a function")
    return found


def best_threshold_accuracy(margins: Sequence[float], golds: Sequence[int]) -> float:
    """The best accuracy that any threshold on `margins` reaches, for two classes; gold 1 lies above the threshold.

    It is chosen on the very examples that it is judged on: a bound on what moving the label bias can give.
    """
    pairs = sorted(zip(margins, golds, strict=True))
    right = best = sum(golds)  # threshold below everything: all are called 1
    for i, (margin, gold) in enumerate(pairs):
        right += 1 - 2 * gold
        if i + 1 == len(pairs) or pairs[i + 1][0] > margin:  # a threshold can't part equal margins
            best = max(best, right)
    return best / len(pairs)


def auc(margins: Sequence[float], golds: Sequence[int]) -> float:
    """Area under the ROC curve: how often an example of class 1 lies above one of class 0, equal margins as half."""
    order = sorted(range(len(margins)), key=lambda i: margins[i])
    ranks, first = [0.0] * len(margins), 0
    while first < len(order):  # equal margins share the mean of their ranks
        last = first
        while last + 1 < len(order) and margins[order[last + 1]] == margins[order[first]]:
            last += 1
        for i in order[first : last + 1]:
            ranks[i] = (first + last) / 2 + 1
        first = last + 1
    n = sum(golds)
    above = sum(rank for rank, gold in zip(ranks, golds, strict=True) if gold) - n * (n + 1) / 2
    return above / (n * (len(golds) - n))
