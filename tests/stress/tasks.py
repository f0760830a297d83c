"""Evaluate a model on every task, zero-shot and with demonstrations, and compare with the plain computation.

    python tests/stress/tasks.py --data_dir DIR --starter starter

One line a task: metric and seconds over all rows, then on the first `--plain` of them what one row per
candidate gives, its seconds, the largest difference of a log-probability per option token (and, in percent,
of what rounding may make of it: 2e-5 + 1e-5·|log p|), and how many predictions differ.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from evaluate import make_framework, plain_predictions

import tasks
from machine import resources
from scoring import generate, logprobs

LONG = ("BoolQ", "MultiRC", "ReCoRD", "SQuAD", "DROP")


def compare_with_plain(framework, samples, shots, predictions: list[dict]) -> tuple[list[dict], float, float]:
    """Return what the plain computation predicts, and how far its log-probabilities lie from ours.

    Returns:
        its predictions; the largest difference of a log-probability a token; the same as a part of
        what rounding may make of it.
    """
    stops = generate.stop_ids(framework.tokenizer, "\n") if framework.task.generation else []
    predicted = plain_predictions(framework, samples, shots, stops)
    if framework.task.generation:
        return (
            [{**ours, "prediction": text} for ours, text in zip(predictions, predicted, strict=True)],
            0.0,
            0.0,
        )
    plain = []
    largest = relative = 0.0
    for ours, x, sums in zip(predictions, framework.prompts.examples(samples, shots), predicted, strict=True):
        means = [s / n for s, n in zip(sums, x.option_lens, strict=True)]
        for a, b in zip(ours["scores"], means, strict=True):
            largest = max(largest, abs(a - b))
            relative = max(relative, abs(a - b) / (2e-5 + 1e-5 * abs(b)))
        plain.append({**ours, "prediction": ours["candidates"][means.index(max(means))]})
    return plain, largest, relative


def measure(framework, rows: int, demonstrations: int, plain_rows: int) -> str:
    """Return the line of a task: ours on so many rows, and the plain computation on the first of them."""
    task, metrics = framework.task, framework.evaluator.metrics
    samples = task.sample_subset("validation", 0, rows)
    shots = task.sample_subset("train", 0, demonstrations)
    start = time.perf_counter()
    predictions = framework.predict(framework.eval_batch(samples, shots))
    seconds = time.perf_counter() - start
    first = predictions[:plain_rows]
    start = time.perf_counter()
    plain, largest, relative = compare_with_plain(framework, samples[:plain_rows], shots, first)
    plain_seconds = time.perf_counter() - start
    ours_all, ours, theirs = (metrics(part)[task.metric_name] for part in (predictions, first, plain))
    differ = sum(a["prediction"] != b["prediction"] for a, b in zip(first, plain, strict=True))
    line = f"{ours_all:9.3f} {seconds:8.1f} | {plain_rows:4d} {ours:6.3f} {theirs:6.3f}"
    line += f" {plain_seconds:8.1f} {differ:6d}"
    return line if task.generation else f"{line} {largest:9.1e} {relative:8.0%}"


def warm_up(framework) -> None:
    logprobs.score(framework.model, framework.prompts.examples(framework.task.sample_subset("train", 0, 8)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name", default=str(ROOT / "starter/smollm2-135m"))
    parser.add_argument(
        "--data_dir", required=True, help="DIR/<task>/{train,validation}.jsonl of the eleven tasks"
    )
    parser.add_argument("--starter", default=str(ROOT / "starter"), help="the same of the starter's tasks")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument(
        "--plain", type=int, default=100, help="rows of the plain computation; a quarter of long tasks"
    )
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=list(tasks.TASKS))
    args = parser.parse_args()
    resources.keep_pages()
    model = None
    print(f"{'':12} {'demos':>5} {'metric':>9} {'seconds':>8} | "
          f"{'rows':>4} {'ours':>6} {'plain':>6} {'seconds':>8}"
          f" {'differ':>6} {'max diff':>9} {'of bound':>8}")  # fmt: skip
    for demos in args.demonstrations:
        for name in args.tasks:
            data_dir = args.data_dir if tasks.TASKS[name].hub else args.starter
            source = argparse.Namespace(model_name=args.model_name, data_dir=data_dir)
            framework = make_framework(source, name, model=model)
            if model is None:
                warm_up(framework)
            model = framework.model
            plain_rows = args.plain // (4 if name in LONG else 1)
            print(f"{name:12} {demos:5d} {measure(framework, args.rows, demos, plain_rows)}", flush=True)


if __name__ == "__main__":
    main()
