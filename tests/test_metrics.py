"""Metrics against their definitions written out."""

import random

import numpy as np
import pytest

from scoring import metrics
from scoring.metrics import accuracy, best_threshold_accuracy, exact_match, f1, macro_f1


def test_accuracy_takes_one_right_answer_or_several():
    assert accuracy([1, "b", "c"], [1, ["a", "b"], ["a"]]) == 2 / 3


def test_macro_f1_where_several_answers_are_right_takes_the_one_that_was_hit():
    predictions = ["b", "a", "c"]
    assert macro_f1(predictions, [["a", "b"], ["b", "a"], ["a"]]) == macro_f1(predictions, ["b", "a", "a"])


def test_macro_f1_is_the_mean_over_classes():
    predictions, golds = list("aabbc"), list("abbbd")
    values = []
    for c in "abcd":
        hit = sum(p == g == c for p, g in zip(predictions, golds, strict=True))
        precision, recall = hit / max(1, predictions.count(c)), hit / max(1, golds.count(c))
        values.append(2 * precision * recall / (precision + recall) if hit else 0)
    assert macro_f1(predictions, golds) == pytest.approx(np.mean(values))


def test_exact_match_ignores_case_punctuation_and_articles():
    assert exact_match("The  Danes!", ["danes"]) == 1
    assert exact_match("the other", ["mother", "other"]) == 1
    assert exact_match("theory", ["ory"]) == 0
    assert exact_match("", ["a", "x"]) == 1 and exact_match("x", [""]) == 0


def test_f1_is_of_the_bag_of_words_and_the_best_reference():
    assert f1("the big red dog", ["a red dog", "cat"]) == pytest.approx(2 * 2 / (3 + 2))
    assert f1("dog dog", ["dog"]) == pytest.approx(2 / 3)
    assert f1("dog", ["cat"]) == 0 and f1("", ["cat"]) == 0
    assert f1("the", [""]) == 1  # nothing to say, and nothing said


def test_the_best_threshold_is_the_best_of_all_thresholds():
    rng = np.random.RandomState(0)
    for _ in range(50):
        margins = rng.randint(-3, 4, size=9).astype(float)  # with ties
        golds = rng.randint(0, 2, size=9).tolist()
        cuts = [-10.0, *np.unique(margins)]
        best = max(np.mean([(m > cut) == g for m, g in zip(margins, golds, strict=True)]) for cut in cuts)
        assert best_threshold_accuracy(margins.tolist(), golds) == pytest.approx(best)


def test_auc_counts_pairs():
    rng = random.Random(0)
    margins = [rng.randrange(6) / 2 for _ in range(40)]
    golds = [rng.randrange(2) for _ in range(40)]
    above = [m for m, g in zip(margins, golds, strict=True) if g == 1]
    below = [m for m, g in zip(margins, golds, strict=True) if g == 0]
    wins = sum((a > b) + (a == b) / 2 for a in above for b in below)
    assert metrics.auc(margins, golds) == pytest.approx(wins / (len(above) * len(below)))
