"""`make demo`: a real model learns to judge film reviews, with forward passes only, while you watch.

SmolLM2-135M on the Reviews of the starter: zero-shot, MeZO-LoRA as published (rank 8, alpha 16) and
MeZO-XGBLoRA (`--recipe fast`: rank-1 boosters in the upper half of the layers, B only, normalised steps,
cached activations). Five steps are timed first, so that both trainings fit into six minutes together: a
quarter for MeZO-LoRA, whose curve is flat at this scale, the rest for boosting (at equal forward passes the
two stand in research/EXPERIMENTS.md). Results go to result/demo/*.json, the curves to result/demo/curve.png.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import run
from cli.results import write_result
from machine import resources
from scoring import logprobs, packing
from scoring.metrics import accuracy, best_threshold_accuracy
from zo.optimizer import ZerothOrder

STARTER = ROOT / "starter"
OUT = ROOT / "result" / "demo"
BATCH_SIZE = 8
NUM_TRAIN = 1000
NUM_DEV = 100
NUM_SENTENCES = 5  # that are printed with the answers before and after
EVALUATIONS = 6  # on the dev rows, of each training
SHARES = {"zero-shot": 0, "MeZO-LoRA": 1 / 4, "MeZO-XGBLoRA": 3 / 4}  # of the time
METHODS = {
    "zero-shot": "--trainer none",
    "MeZO-LoRA": "--trainer zo --lora",
    "MeZO-XGBLoRA": "--trainer zo --recipe fast",
}


def make_reviews_framework(flags: str, seed: int) -> run.Framework:
    """Return the model of the starter and its Reviews, with these flags."""
    dtype = "--load_bfloat16" if resources.cpu_has_bf16() or torch.cuda.is_available() else ""
    model = f"--model_name {STARTER / 'smollm2-135m'}"
    words = f"{model} --data_dir {STARTER} --task_name Reviews --seed {seed} {dtype} {flags}".split()
    return run.Framework(run.parse(words), run.get_task("Reviews", STARTER))


def time_step(seed: int) -> float:
    """Return the seconds of a step of two whole forwards: the median of five steps, after one to warm up."""
    framework = make_reviews_framework(METHODS["MeZO-XGBLoRA"], seed)
    examples = framework.prompts.examples(framework.task.sample_subset("train", seed, 6 * BATCH_SIZE))
    framework.load()
    engine = ZerothOrder(framework.model, lr=0.0, eps=1e-2)
    seconds = []
    for i in range(6):
        batch = packing.pack(examples[BATCH_SIZE * i : BATCH_SIZE * (i + 1)])
        start = time.perf_counter()
        engine.step(lambda batch=batch: logprobs.loss(framework.model, batch, True))
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def fit_steps(seconds: float, step_seconds: float, caches_activations: bool) -> int:
    """Return how many steps fit into a time, a multiple of 25.

    In a run of minutes a step takes up to 1.3 times as long as five steps alone. A step is two passes over a
    batch, an evaluation one pass over the dev rows. With cached activations a step is half of that, after
    half a pass over the training rows.

    Args:
        seconds: the time.
        step_seconds: of a step without cache, from `time_step`.
        caches_activations: whether the lower half of the layers is cached.
    """
    evaluations = EVALUATIONS * NUM_DEV / BATCH_SIZE / 2
    steps = seconds / (1.3 * step_seconds) - evaluations
    if caches_activations:
        steps = 2 * (steps - NUM_TRAIN / BATCH_SIZE / 4)
    return max(50, int(steps) // 25 * 25)


def run_flags(name: str, flags: str, steps: int) -> str:
    """Return the flags of a run: those of the method, and those that all methods share."""
    flags += f" --output_dir {OUT / name} --overwrite --train_as_classification"
    flags += f" --per_device_train_batch_size {BATCH_SIZE} --max_steps {steps} --logging_steps 5"
    flags += f" --save_steps {steps} --save_total_limit 1"
    if "--trainer zo" in flags:
        flags += f" --save_model --num_train {NUM_TRAIN} --num_dev {NUM_DEV} --eval_strategy steps"
        flags += f" --eval_steps {max(1, steps // EVALUATIONS)}"
    return flags


def run_method(name: str, flags: str, steps: int, seed: int) -> None:
    """Train and evaluate one method, and write its result file.

    It runs in a process of its own, whose peak memory is that of the method.
    """
    run.logging.basicConfig(level=run.logging.WARNING)
    resources.keep_pages()
    framework = make_reviews_framework(run_flags(name, flags, steps), seed)
    start = time.perf_counter()
    measurement = {"train_set": seed, "forward_passes": 0, "log": []}
    if "--trainer zo" in flags:
        rows = framework.task.sample_subset("train", seed, NUM_TRAIN + NUM_DEV)
        framework.train(rows[:NUM_TRAIN], framework.eval_batch(rows[NUM_TRAIN:]), OUT / name)
        trainer = framework.trainer
        measurement |= {"forward_passes": trainer.forward_passes, "log": trainer.state.log_history}
    measurement["train_seconds"] = round(time.perf_counter() - start, 1)
    measurement |= evaluate_reviews(framework)
    measurement["seconds"] = round(time.perf_counter() - start, 1)
    write_result(OUT / f"{name}.json", framework.args, [measurement])


def evaluate_reviews(framework: run.Framework) -> dict:
    """Return accuracies on the validation rows, the number of boosters, and the first margins."""
    validation = framework.task.sample_subset("validation", 0, sys.maxsize)
    golds = [sample.correct_candidate for sample in validation]
    batch = framework.eval_batch(validation)
    framework.load()
    scores = framework.evaluator.score(batch)
    calibration = framework.prompts.examples(validation[:1], sfc=True)
    negative, positive = logprobs.score(framework.model, calibration)[0]
    margins = [great - terrible for terrible, great in scores]
    return {
        "accuracy": accuracy([int(m > 0) for m in margins], golds),
        "calibrated_accuracy": accuracy([int(m > positive - negative) for m in margins], golds),
        "best_threshold_accuracy": best_threshold_accuracy(margins, golds),
        "boosters": len(framework.lora_module.boosters) if framework.lora_module else 0,
        "margins": margins[:NUM_SENTENCES],
    }


def draw_curves(results: dict[str, dict], path: Path) -> None:
    """Draw loss and dev accuracy against forward passes, with a line at every merge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, accuracies) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    trained_results = list(results.items())[1:]
    for color, (name, result) in zip(("C0", "C1"), trained_results, strict=True):
        log = result["log"]
        points = [(2 * entry["step"], entry["loss"]) for entry in log if "loss" in entry]
        smooth_losses = [fmean(loss for _, loss in points[max(0, i - 3) : i + 1]) for i in range(len(points))]
        losses.plot([passes for passes, _ in points], smooth_losses, color=color, label=name)
        for entry in log:
            if "merged_booster" in entry:
                losses.axvline(2 * entry["step"], color=color, alpha=0.25, lw=1)
        dev = [(2 * e["step"], 100 * e["eval_accuracy"]) for e in log if "eval_accuracy" in e]
        accuracies.plot(*zip(*dev, strict=True), "o-", color=color, label=f"{name}, {NUM_DEV} dev rows")
        end = (result["forward_passes"], 100 * result["accuracy"])
        accuracies.plot(*end, "*", ms=14, color=color, label=f"{name}, validation")
    zero = results["zero-shot"]
    bound = 100 * zero["best_threshold_accuracy"]
    accuracies.axhline(100 * zero["accuracy"], color="0.6", ls=":", label="zero-shot")
    accuracies.axhline(bound, color="0.6", ls="--", label="zero-shot, best threshold")
    passes = f"forward passes of {BATCH_SIZE} rows"
    losses.set(xlabel=passes, ylabel="training loss (mean of 20 steps)", title="vertical lines: merges")
    accuracies.set(xlabel=passes, ylabel="accuracy (%)", title="SmolLM2-135M on Reviews")
    losses.legend()
    accuracies.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def print_report(results: dict[str, dict]) -> None:
    """Print the table of the methods, and the answers to a few sentences before and after training."""
    columns = ("accuracy", "calibrated", "passes", "seconds", "peak MB", "boosters")
    print(f"\n{'method':14}" + "".join(f"{column:>11}" for column in columns))
    for name, r in results.items():
        shares = f"{100 * r['accuracy']:10.1f}%{100 * r['calibrated_accuracy']:10.1f}%"
        counts = (r["forward_passes"], round(r["train_seconds"]), r["peak_memory_mb"], r["boosters"])
        print(f"{name:14}{shares}" + "".join(f"{count:11}" for count in counts))
    bound = 100 * results["zero-shot"]["best_threshold_accuracy"]
    print(f"the best that any threshold on the zero-shot scores could reach: {bound:.1f}%")
    print("\nfive validation sentences: what the model says before and after")
    words = {True: "great", False: "terrible"}
    task = run.get_task("Reviews", STARTER)
    for i, sample in enumerate(task.sample_subset("validation", 0, NUM_SENTENCES)):
        answers = [words[results[name]["margins"][i] > 0] for name in ("zero-shot", "MeZO-XGBLoRA")]
        people = words[sample.correct_candidate == 1]
        print(f"  {sample.data['sentence'][:90]!r}: {' -> '.join(answers)} (people: {people})")
    folder = OUT.relative_to(ROOT)
    print(f"\nresults and picture: {folder}/*.json, {folder / 'curve.png'}")


def choose_steps(minutes: float, seed: int) -> dict[str, int]:
    """Return the steps of each method that fit into a time on this machine, and print them."""
    seconds = time_step(seed)
    steps = {
        name: fit_steps(60 * minutes * share, seconds, caches_activations="fast" in METHODS[name])
        for name, share in SHARES.items()
    }  # fmt: skip
    description = ", ".join(f"{steps[name]} for {name}" for name in list(METHODS)[1:])
    print(f"a step of {BATCH_SIZE} rows takes {seconds:.2f} s here; ", end="")
    print(f"steps that fit into {minutes:g} minutes: {description}")
    return steps


def main() -> int:
    """Run the three methods one after the other, draw the curves and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="for both trainings together")
    parser.add_argument("--steps", type=int, help="of a training, instead of as many as fit into the time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    resources.keep_pages()
    if resources.cpu_has_bf16():
        print("weights in bfloat16, which this CPU has in hardware")
    else:
        print("weights in float32: this CPU has no bfloat16 in hardware")
    steps = dict.fromkeys(METHODS, args.steps) if args.steps else choose_steps(args.minutes, args.seed)
    results = {}
    for name, flags in METHODS.items():
        print(f"\n== {name}: run.py {flags}", flush=True)
        process = multiprocessing.get_context("spawn").Process(
            target=run_method, args=(name, flags, steps[name], args.seed)
        )
        process.start()
        process.join()
        if process.exitcode:
            return 1
        result = json.loads((OUT / f"{name}.json").read_text())
        results[name] = {**result["sets"][0], "peak_memory_mb": result["peak_memory_mb"]}
    draw_curves(results, OUT / "curve.png")
    print_report(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
