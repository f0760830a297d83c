"""What a model does on every task, zero-shot and with demonstrations, and that the plain computation says the same.

    python tests/stress/tasks.py --data_dir DIR --starter starter

One line a task: metric and seconds over all rows, then on the first `--plain` of them what one row per candidate gives,
its seconds, the largest difference of a log-probability per option token (and, in percent, of what rounding may make
of it: 2e-5 + 1e-5·|log p|), and how many predictions differ.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from evaluate import framework_of, plain_predictions

import tasks
from machine import resources
from scoring import (
    logprobs,
)

LONG = ("BoolQ", "MultiRC", "ReCoRD", "SQuAD", "DROP")


def plain_found(framework, samples, shots, found: list[dict]) -> tuple[list[dict], float, float]:
    """(what the plain computation predicts, largest difference per token, the same relative to its bound)."""
    predicted = plain_predictions(framework, samples, shots)
    if framework.task.generation:
        return [{**one, "prediction": answer} for one, answer in zip(found, predicted, strict=True)], 0.0, 0.0
    plain, worst, relative = [], 0.0, 0.0
    for one, x, sums in zip(found, framework.prompts.examples(samples, shots), predicted, strict=True):
        means = [s / n for s, n in zip(sums, x.option_lens, strict=True)]
        for a, b in zip(one["scores"], means, strict=True):
            worst, relative = max(worst, abs(a - b)), max(relative, abs(a - b) / (2e-5 + 1e-5 * abs(b)))
        plain.append({**one, "prediction": one["candidates"][means.index(max(means))]})
    return plain, worst, relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name", default=str(ROOT / "starter/smollm2-135m"))
    parser.add_argument("--data_dir", required=True, help="DIR/<task>/{train,validation}.jsonl of the eleven tasks")
    parser.add_argument("--starter", default=str(ROOT / "starter"), help="the same of the starter's tasks")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--plain", type=int, default=100, help="rows of the plain computation; a quarter of long tasks")
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=list(tasks.TASKS))
    args = parser.parse_args()
    resources.keep_pages()
    model = None
    print(f"{'':12} {'demos':>5} {'metric':>9} {'seconds':>8} | {'rows':>4} {'ours':>6} {'plain':>6} {'seconds':>8}"
          f" {'differ':>6} {'max diff':>9} {'of bound':>8}")  # fmt: skip
    for demos in args.demonstrations:
        for name, spec in ((name, tasks.TASKS[name]) for name in args.tasks):
            args_of = argparse.Namespace(
                model_name=args.model_name, data_dir=args.data_dir if spec.hub else args.starter
            )
            framework = framework_of(args_of, name, model=model)
            model = framework.model
            if (demos, name) == (args.demonstrations[0], args.tasks[0]):
                logprobs.score(
                    model, framework.prompts.examples(framework.task.sample_subset("train", 0, 8))
                )  # warms up
            samples = framework.task.sample_subset("validation", 0, args.rows)
            shots = framework.task.sample_subset("train", 0, demos)
            start = time.perf_counter()
            found = framework.predict(framework.eval_batch(samples, shots))
            ours = time.perf_counter() - start
            n = args.plain // (4 if name in LONG else 1)
            start = time.perf_counter()
            plain, worst, relative = plain_found(framework, samples[:n], shots, found[:n])
            seconds = time.perf_counter() - start
            metric = framework.task.metric_name
            values = [framework.evaluator.metrics(part)[metric] for part in (found, found[:n], plain)]
            differ = sum(a["prediction"] != b["prediction"] for a, b in zip(found, plain, strict=False))
            shown = f"{worst:9.1e} {relative:8.0%}" if not framework.task.generation else ""
            print(f"{name:12} {demos:5d} {values[0]:9.3f} {ours:8.1f} | {n:4d} {values[1]:6.3f} {values[2]:6.3f} "
                  f"{seconds:8.1f} {differ:6d} {shown}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
