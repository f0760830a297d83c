"""Metrics of predictions: accuracy, exact match, F1, and the best accuracy of a shift of the label bias."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

from tasks import GENERATION, METRICS, OPTIONS, TEXT
from utils import UsageError, load_from_file

LOWER_IS_BETTER = ("loss", "perplexity")


def accuracy(predictions: Sequence, golds: Sequence) -> float:
    """Return the fraction of predictions that are the gold, or in it where the gold is a list."""
    hits = (
        prediction in gold if isinstance(gold, list) else prediction == gold
        for prediction, gold in zip(predictions, golds, strict=True)
    )
    return sum(hits) / len(golds)


def macro_f1(predictions: Sequence, golds: Sequence) -> float:
    """Return the mean over the classes that occur of 2·hits / (predicted + gold).

    Of a list of golds counts the gold that was predicted, or else the first.
    """
    pairs = list(zip(predictions, golds, strict=True))
    golds = [(p if p in g else g[0]) if isinstance(g, list) else g for p, g in pairs]
    predicted_counts = Counter(predictions)
    gold_counts = Counter(golds)
    hits = Counter(p for p, g in zip(predictions, golds, strict=True) if p == g)
    return fmean(2 * hits[c] / (predicted_counts[c] + gold_counts[c]) for c in predicted_counts | gold_counts)


def answer_words(answer: str) -> list[str]:
    """Return the words of an answer that count (SQuAD, arXiv 1606.05250).

    They are in lower case, without punctuation and articles.
    """
    letters = "".join(c for c in answer.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1 where the words of the prediction are those of any reference answer, in order; otherwise 0."""
    return float(any(answer_words(prediction) == answer_words(gold) for gold in golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the best F1 of the prediction's bag of words with a reference answer's; 1 if both are empty."""
    return max(bag_f1(Counter(answer_words(prediction)), Counter(answer_words(gold))) for gold in golds)


def bag_f1(a: Counter, b: Counter) -> float:
    """Return the F1 of two bags of words."""
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def find_metric(name: str) -> Callable[[Sequence, Sequence], float]:
    """Return the function (predictions, golds) -> number, of which more is better.

    Args:
        name: accuracy, f1 (mean F1), em (mean exact match), or `file.py:name` of a function.

    Raises:
        UsageError: there is no function of that name.
    """
    metrics = {
        "accuracy": accuracy,
        "f1": lambda predictions, golds: fmean(map(f1, predictions, golds)),
        "em": lambda predictions, golds: fmean(map(exact_match, predictions, golds)),
    }
    if name in metrics:
        return metrics[name]
    metric = load_from_file(name)
    if not callable(metric):
        raise UsageError(f"--objective {name}: there are {', '.join(metrics)}, or file.py:name of a function")
    return metric


def options_metrics(predictions: Sequence[dict], metric_name: str) -> dict[str, float]:
    """Return accuracy (a fraction) and mean loss of chosen options; macro F1 too if it is the metric."""
    answers = [prediction["prediction"] for prediction in predictions]
    golds = [prediction["gold"] for prediction in predictions]
    values = {"accuracy": accuracy(answers, golds)}
    if metric_name == "macro_f1":
        values["macro_f1"] = macro_f1(answers, golds)
    return {**values, "loss": fmean(prediction["loss"] for prediction in predictions)}


def answers_metrics(predictions: Sequence[dict], metric_name: str) -> dict[str, float]:
    """Return F1 and exact match of generated answers, fractions."""
    answers = [prediction["prediction"] for prediction in predictions]
    golds = [prediction["gold"] for prediction in predictions]
    return {name: find_metric(name)(answers, golds) for name in METRICS[GENERATION]}


def texts_metrics(predictions: Sequence[dict], metric_name: str) -> dict[str, float]:
    """Return the mean negative log-probability of a token of the texts, in nats, and the perplexity."""
    tokens = sum(prediction["tokens"] for prediction in predictions)
    loss = -sum(prediction["logprob"] for prediction in predictions) / tokens
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


# kind of task -> function of (predictions, name of the task's metric)
METRICS_BY_KIND = {OPTIONS: options_metrics, GENERATION: answers_metrics, TEXT: texts_metrics}


def best_threshold_accuracy(margins: Sequence[float], golds: Sequence[int]) -> float:
    """Return the best accuracy that any threshold on `margins` reaches, for two classes.

    The threshold is chosen on the examples that it is judged on: an upper bound for moving the label bias.

    Args:
        margins: score of class 1 minus score of class 0; class 1 is predicted above the threshold.
        golds: 0 or 1.
    """
    pairs = sorted(zip(margins, golds, strict=True))
    hits = best = sum(golds)  # threshold below everything: class 1 is predicted for all
    for i, (margin, gold) in enumerate(pairs):
        hits += 1 - 2 * gold
        if i + 1 == len(pairs) or pairs[i + 1][0] > margin:  # a threshold can't part equal margins
            best = max(best, hits)
    return best / len(pairs)


def auc(margins: Sequence[float], golds: Sequence[int]) -> float:
    """Return the area under the ROC curve: how often an example of class 1 lies above one of class 0.

    Equal margins count as half. Arguments as of `best_threshold_accuracy`.
    """
    order = sorted(range(len(margins)), key=lambda i: margins[i])
    ranks = [0.0] * len(margins)
    begin = 0
    while begin < len(order):  # equal margins share the mean of their ranks
        end = begin
        while end + 1 < len(order) and margins[order[end + 1]] == margins[order[begin]]:
            end += 1
        for i in order[begin : end + 1]:
            ranks[i] = (begin + end) / 2 + 1
        begin = end + 1
    n = sum(golds)
    rank_sum = sum(rank for rank, gold in zip(ranks, golds, strict=True) if gold) - n * (n + 1) / 2
    return rank_sum / (n * (len(golds) - n))
