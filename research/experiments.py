"""Which method wins, on a real model, with seeds: a grid of `run.py` runs, a small JSON each in research/runs/.

    python research/experiments.py run [--groups base rounds …] [--only WORDS]   # what is not there yet
    python research/experiments.py table               # the tables of research/EXPERIMENTS.md; why.py prints its own
    python research/experiments.py plot                                          # every picture
    python research/experiments.py list                                          # the runs to come, with their commands

SmolLM2-135M of the starter, 1,000 training rows, weights of the arm's dtype where `--dtype` says nothing else; a seed
drives directions, A, order and training set. Settings are chosen on dev rows of Reviews: the last 500 of its training
split, in the place of the validation rows in a folder of their own. Accuracy is that of the last step; beside it AUC
and the accuracy at the best threshold, because a shift of the label bias alone gains much. One process a core with
one thread each. Each JSON holds the command that repeats it; `run` makes the dev rows, and $DATA_DIR is a folder with
SST2/{train,validation}.jsonl in the hub's columns.
"""

import argparse
import contextlib
import gc
import json
import logging
import math
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from arms import BIAS, METHODS, OUT, RECIPE, Arm, grid
from tqdm import tqdm

import run
from scoring.metrics import auc, best_threshold_accuracy

WORK = ROOT / "result" / "experiments"
DEV = WORK / "dev"  # Reviews with dev rows in the place of the validation rows
DEV_ROWS = 500
MIN_SEEDS = 5  # of an interval: with two seeds it would be 12.7 standard errors wide
T95 = {5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, 95 %, by the number of pairs


def make_dev() -> None:
    """Reviews whose last training rows stand in the place of the validation rows."""
    lines = (ROOT / "starter" / "Reviews" / "train.jsonl").read_text().splitlines(keepends=True)
    folder = DEV / "Reviews"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(lines[:-DEV_ROWS]))
    (folder / "validation.jsonl").write_text("".join(lines[-DEV_ROWS:]))


def label_bias(arm: Arm, seed: int) -> None:
    """A number a label, added to its score and fitted on the training rows: what a shift of the label bias alone gives.

    Only the difference counts; cross-entropy has its minimum where the mean probability of a label is its share.
    """

    started, words = time.perf_counter(), os.path.expandvars(arm.command.removesuffix(BIAS)).split()
    args = run.parse([*words, "--trainer", "none", "--seed", str(seed), "--disable_tqdm", "True"])
    task = run.get_task(args.task_name, args.data_dir)
    made, margins, golds = run.Framework(args, task), [], []
    made.load()
    for samples in (task.sample_subset("train", seed, 1000), task.sample_subset("validation", 0, 10**9)):
        margins.append([b - a for a, b in made.evaluator.score(made.eval_batch(samples), progress=False)])
        golds.append([sample.correct_candidate for sample in samples])
    low, high = -20.0, 20.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        above = fmean(1 / (1 + math.exp(-m - middle)) for m in margins[0]) > fmean(golds[0])
        low, high = (low, middle) if above else (middle, high)
    shifted = [m + low for m in margins[1]]
    losses = [math.log1p(math.exp(-m if gold else m)) for m, gold in zip(shifted, golds[1], strict=True)]
    write(arm, seed, {
        "accuracy": fmean((m > 0) == gold for m, gold in zip(shifted, golds[1], strict=True)), "loss": fmean(losses),
        "auc": auc(shifted, golds[1]), "best_threshold": best_threshold_accuracy(shifted, golds[1]),
        "forward_passes": 0, "seconds": round(time.perf_counter() - started, 1), "boosters": 0,
    })  # fmt: skip


def write(arm: Arm, seed: int, found: dict) -> None:
    about = {
        "arm": arm.name,
        "group": arm.group,
        "task": arm.task,
        "seed": seed,
        "steps": arm.steps,
        "batch": arm.batch,
        "weights": arm.dtype,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    path = arm.path(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "command": arm.line(seed), **found}, indent=1, ensure_ascii=False) + "\n")


def run_one(job: tuple[Arm, int]) -> None:
    arm, seed = job
    if arm.flags == BIAS:
        return label_bias(arm, seed)
    name = f"{arm.task}-{arm.path(seed).stem}"
    result, predictions = WORK / f"{name}.json", WORK / f"{name}.jsonl"
    command = arm.line(seed).removeprefix("python run.py ")
    more = (
        f"--result_file {result} --predictions {predictions} --output_dir {WORK / name} --overwrite --disable_tqdm True"
    )
    words = [*shlex.split(os.path.expandvars(command)), *shlex.split(more)]
    with open(WORK / f"{name}.log", "w") as log:
        if (inside(words, log) if torch.cuda.is_available() else beside(words, log)) != 0:
            tqdm.write(f"failed: {name}, see {WORK / name}.log")
            return None
    found = json.loads(result.read_text())
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    margins, golds = [r["scores"][1] - r["scores"][0] for r in rows], [r["gold"] for r in rows]
    one = found["sets"][0]
    write(arm, seed, {
        "accuracy": found["accuracy"], "loss": found["loss"], "auc": auc(margins, golds),
        "best_threshold": best_threshold_accuracy(margins, golds), "forward_passes": found["forward_passes"],
        "seconds": one["train_seconds"], "boosters": one.get("boosters", 0),
        **({"staged": one["staged"]} if "staged" in one else {}),
        **({} if torch.cuda.is_available() else {
            "cpu_seconds": one["train_cpu_seconds"], "peak_memory_mb": found["peak_memory_mb"]
        }),
    })  # fmt: skip


def beside(words: list[str], log) -> int:
    """The exit status of a run in a process of its own, whose peak memory is its own too."""
    words = [sys.executable, "run.py", *words]
    return subprocess.run(words, cwd=ROOT, stdout=log, stderr=log, check=False).returncode


def inside(words: list[str], log) -> int:
    """The same in this process: on a GPU a run is over before a new process has imported what it needs."""

    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            return run.main(words) or 0
        except (Exception, SystemExit):
            traceback.print_exc()
            return 1
        finally:
            logging.getLogger().handlers.clear()  # they write to this run's log
            gc.collect()
            torch.cuda.empty_cache()


def paired(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Return the mean difference over the seeds that both have, with its 95 % interval from `MIN_SEEDS` seeds on."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[s] - theirs[s] for s in seeds]
    if len(seeds) < MIN_SEEDS:
        return f"{fmean(differences):+.1f}" if seeds else ""
    half = T95.get(len(seeds), 2.0) * stdev(differences) / len(seeds) ** 0.5
    return f"{fmean(differences):+.1f} ± {half:.1f}"


NUMBERS = ("accuracy", "auc", "best_threshold", "loss", "forward_passes")
HEAD = "group", "arm", "seeds", "accuracy", "− base", "AUC", "best threshold", "loss", "passes × rows", "CPU s", "MB"


def finished(arms: list[Arm], task: str) -> list[tuple[Arm, dict[int, dict]]]:
    """(arm, {seed: what its run found}) of a task, of arms that have runs."""
    found = [(a, {s: json.loads(a.path(s).read_text()) for s in a.seeds if a.path(s).exists()}) for a in arms]
    return [(arm, runs) for arm, runs in found if arm.task == task and runs]


def title(task: str) -> str:
    return "Reviews, dev rows" if task == "dev" else task


def percent(runs: dict[int, dict]) -> dict[int, float]:
    return {seed: 100 * run["accuracy"] for seed, run in runs.items()}


def cells(arm: Arm, runs: dict[int, dict]) -> list[str]:
    """Means over the seeds, as the tables show them."""
    mean = {key: fmean(run[key] for run in runs.values()) for key in NUMBERS}
    wide = sum(run.get("weights") == "float32" and bool(arm.steps) for run in runs.values())
    row = [f"{len(runs)}, {wide} in float32" if wide else f"{len(runs)}", f"{100 * mean['accuracy']:.1f}"]
    row += [f"{mean['auc']:.3f}", f"{100 * mean['best_threshold']:.1f}", f"{mean['loss']:.3f}"]
    row += [f"{mean['forward_passes']:.0f} × {arm.batch}"]
    for cost in ("cpu_seconds", "peak_memory_mb"):  # of runs on a CPU; others are busy there too
        spent = [run[cost] for run in runs.values() if cost in run]
        row += [f"{fmean(spent):.0f}" if spent else ""]
    return row


def table(arms: list[Arm]) -> None:
    """A row for each arm that has runs, against the base of its task, or the recipe where that is what it varies."""
    for task in dict.fromkeys(arm.task for arm in arms):
        if not (rows := finished(arms, task)):
            continue
        base = next((percent(runs) for arm, runs in rows if arm.group == "base"), {})
        recipe = next((percent(runs) for arm, runs in rows if arm.name == RECIPE), {})
        print(f"\n{title(task)}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
        for arm, runs in rows:
            seeds, accuracy, *others = cells(arm, runs)
            reference = recipe if arm.group == "recipe" else base
            against = paired(percent(runs), reference) if arm.group != "base" or percent(runs) != reference else ""
            print(f"| {' | '.join([arm.group, arm.name, seeds, accuracy, against, *others])} |")


def best_of_methods(arms: list[Arm]) -> list[tuple[str, int, Arm, dict[int, dict]]]:
    """(method, settings tried, the best of them, its runs) on the dev rows; one of a single seed only where all are."""
    found, rows = [], finished(arms, "dev")
    for method, beginnings in METHODS.items():
        if tried := [(arm, runs) for arm, runs in rows if arm.name.startswith(beginnings)]:
            found.append(
                (method, len(tried), *max(tried, key=lambda row: (len(row[1]) > 1, fmean(percent(row[1]).values()))))
            )
    return found


def main_table(arms: list[Arm]) -> None:
    """Each method at the best of its settings on the dev rows, and how many were tried."""
    heads = "method", "tried", "best", *HEAD[2:4], *HEAD[5:]
    print(f"\nMethods\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for method, tried, arm, runs in best_of_methods(arms):
        print(f"| {' | '.join([method, f'{tried}', arm.name, *cells(arm, runs)])} |")


def plot_costs(arms: list[Arm], path: Path) -> None:
    """Accuracy of the methods against what they cost on a CPU; bfloat16 and float32 were run on different machines."""
    from matplotlib import pyplot

    costs = {"cpu_seconds": "processor seconds", "peak_memory_mb": "peak MB"}
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for i, (method, _, _, runs) in enumerate(best_of_methods(arms)):
        look = {"marker": "os^D"[i // 10], "color": f"C{i % 10}", "linestyle": ""}
        axes[1].plot([], [], label=method, **look)
        for axis, cost in zip(axes, costs, strict=True):
            for dtype in ("bfloat16", "float32"):
                if some := [run for run in runs.values() if cost in run and run.get("weights", "bfloat16") == dtype]:
                    filled = {} if dtype == "bfloat16" else {"markerfacecolor": "none"}
                    axis.plot(fmean(r[cost] for r in some), 100 * fmean(r["accuracy"] for r in some), **look, **filled)
    for axis, label in zip(axes, costs.values(), strict=True):
        axis.set(title=f"{title('dev')}: filled bfloat16, hollow float32", xlabel=label, ylabel="accuracy in %")
        axis.grid(alpha=0.3)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)


def plot_passes(arms: list[Arm], task: str, path: Path) -> None:
    """Accuracy against forward passes, of runs at their end and of a staged one along its chain; over its boosters."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    families: dict[str, list[tuple[float, float]]] = {}
    for arm, runs in finished(arms, task):
        for entry in runs.values():
            if "staged" in entry:
                rows = entry["forward_passes"] * arm.batch / entry["boosters"]
                stages = [(stage["boosters"], 100 * stage["accuracy"]) for stage in entry["staged"]]
                left.plot([rows * k for k, _ in stages[1:]], [a for _, a in stages[1:]], color="0.6", label=arm.name)
                right.plot(*zip(*stages, strict=True), ".-", color="0.4", label=arm.name)
        if arm.steps and arm.group != "weights":
            name = arm.name.removesuffix(f", {arm.steps} steps").removesuffix(", staged")
            passes = fmean(run["forward_passes"] for run in runs.values())
            families.setdefault(name, []).append((passes * arm.batch, fmean(percent(runs).values())))
    for i, (name, points) in enumerate(families.items()):
        left.plot(*zip(*sorted(points), strict=True), "os^D"[i // 10] + ":", color=f"C{i % 10}", label=name)
    left.set(xscale="log", xlabel="forward passes × rows", ylabel="accuracy in %", title=title(task))
    right.set(xlabel="boosters", ylabel="accuracy in %", title=f"{title(task)}, the first boosters of one run")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def plot(arms: list[Arm], path: Path) -> None:
    """Accuracy of every arm with its runs as dots, one panel a task."""
    from matplotlib import pyplot

    panels = {task: rows for task in dict.fromkeys(a.task for a in arms) if (rows := finished(arms, task))}
    if not panels:
        return
    ratios = [len(rows) for rows in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 0.9 * len(panels) + 0.33 * sum(ratios)), layout="constrained", squeeze=False,
        gridspec_kw={"height_ratios": ratios},
    )  # fmt: skip
    for axis, (task, rows) in zip(axes[:, 0], panels.items(), strict=True):
        for i, (_, runs) in enumerate(rows):
            values = list(percent(runs).values())
            axis.plot(values, [i] * len(values), "o", color="C0", alpha=0.5)
            axis.plot(fmean(values), i, "|", color="C3", ms=14, mew=2)
        axis.set_yticks(range(len(rows)), [arm.name for arm, _ in rows])
        axis.invert_yaxis()
        axis.set(title=title(task), xlabel="accuracy in %: each seed, and their mean")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "table", "plot", "list"])
    parser.add_argument("--groups", nargs="+", help="only these groups")
    parser.add_argument("--only", default="", help="only arms whose name holds this")
    parser.add_argument("--tasks", nargs="+", help="only these tasks; dev stands for the dev rows of Reviews")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--dtype", help="weights in this (bfloat16 takes thrice the time where a CPU lacks it)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    arms = [a for a in grid() if (not args.groups or a.group in args.groups) and args.only in a.name]
    arms = [a for a in arms if not args.tasks or a.task in args.tasks]
    arms = [replace(a, seeds=tuple(s for s in a.seeds if not args.seeds or s in args.seeds)) for a in arms]
    if args.what == "table":
        main_table(arms)
        return table(arms)
    if args.what == "plot":
        import matplotlib
        import why

        matplotlib.use("Agg")
        dev = [arm for arm in arms if arm.task == "dev"]
        plot(dev, OUT / "arms.png")
        plot([arm for arm in arms if arm.task != "dev"], OUT / "confirmed.png")
        plot_costs(dev, OUT / "costs.png")
        plot_passes(arms, "SST2", OUT / "passes.png")
        return why.picture(OUT / "why.png")
    jobs = [(arm, seed) for arm in arms if arm.runnable for seed in arm.seeds if not arm.path(seed).exists()]
    if args.what == "list":
        for arm, seed in jobs:
            print(arm.line(seed))
        return None
    make_dev()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # of the workers
    if args.dtype:
        jobs = [(replace(arm, dtype=args.dtype), seed) for arm, seed in jobs]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for _ in tqdm(pool.map(run_one, jobs), total=len(jobs), unit="run", desc="experiments"):
            pass
    return None


if __name__ == "__main__":
    main()
