"""Numbers for people: accuracy, and what a shift of label bias alone could reach."""

from collections.abc import Sequence


def accuracy(predictions: Sequence, golds: Sequence) -> float:
    """Share of predictions that are the gold candidate, or one of them where a gold is a list."""
    hits = (
        prediction in gold if isinstance(gold, list) else prediction == gold
        for prediction, gold in zip(predictions, golds, strict=True)
    )
    return sum(hits) / len(golds)


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
