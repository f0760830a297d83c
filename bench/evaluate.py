"""Time evaluation and the forward of a training batch against the plain way, interleaved in one run.

    python bench/evaluate.py --data_dir DIR
    python bench/evaluate.py --data_dir DIR --model_name opt-125m --tokenizer DIR

`plain` scores one row per candidate, batch 1, with the logits of every position; prompts are encoded alike,
and answers are generated one at a time. `plain` runs on a sample of the rows, evenly spaced by length, `ours`
on all rows. The ratio is that of seconds per example, the median of several rounds. The last lines are the
forward of a training batch: `bare` is the model's own forward of the packed tokens with the mask ready,
`padded` has one padded row per candidate and all logits.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from step import plain_loss, random_opt

import run
from machine import resources
from scoring import generate, logprobs, packing


class Case(NamedTuple):
    """A task, its number of demonstrations, and the rows that each side evaluates in a round."""

    task: str
    demonstrations: int
    rows: int
    plain_rows: int


CASES = {
    "SST2": Case("SST2", 0, 872, 24),
    "SST2, 16 demos": Case("SST2", 16, 872, 8),
    "ReCoRD": Case("ReCoRD", 0, 60, 4),
    "Copa": Case("Copa", 0, 100, 20),
    "MultiRC": Case("MultiRC", 0, 800, 12),
    "SQuAD, generated": Case("SQuAD", 0, 64, 6),
}
PEAK_ROWS = 200  # at most, of the process that measures memory


@torch.inference_mode()
def score_one_by_one(model, example: packing.Example) -> list[float]:
    """Return the log-probability of each option: one row each, alone, with all its logits."""
    scores = []
    for ids, option_len in zip(example.encodings, example.option_lens, strict=True):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        log_probs = logits[0, :-1].float().log_softmax(-1)
        token_scores = log_probs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        scores.append(token_scores[-option_len:].sum().item())
    return scores


@torch.inference_mode()
def plain_answer(model, tokenizer, prompt: list[int], stops: list[int], max_new_tokens: int) -> str:
    """Return the answer that is generated behind one prompt."""
    ids = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).split("\n")[0].strip()


def plain_predictions(framework, samples, demonstrations, stops: list[int]) -> list:
    """Return the sums of the options, or the answers, of samples: one candidate or one answer at a time."""
    examples = framework.prompts.examples(samples, demonstrations, gold=False)
    model = framework.model
    if not framework.task.generation:
        return [score_one_by_one(model, x) for x in examples]
    max_new_tokens = framework.args.max_new_tokens
    prompts = [x.encodings[0] for x in examples]
    return [plain_answer(model, framework.tokenizer, ids, stops, max_new_tokens) for ids in prompts]


def make_framework(args, task: str, dtype: str = "float32", model=None) -> run.Framework:
    """Return a framework of this task with its model.

    Args:
        args: model and data of the command line.
        dtype: of the weights.
        model: a model that is loaded already.
    """
    flags = ["--model_name", args.model_name, "--data_dir", args.data_dir, "--task_name", task]
    flags += ["--disable_tqdm", "True", f"--load_bfloat16={dtype == 'bfloat16'}"]
    framework = run.Framework(run.parse(flags), run.get_task(task, args.data_dir))
    if model is not None:
        framework.model = model
        framework.evaluator.attach(model)
    framework.load()
    return framework


def make_sides(framework, case: Case, rows: int) -> dict[str, Callable[[], int]]:
    """Return {"ours" | "plain": function that evaluates, and returns how many examples}."""
    samples = framework.task.sample_subset("validation", 0, rows)
    demonstrations = framework.task.sample_subset("train", 0, case.demonstrations)
    by_length = sorted(samples, key=lambda sample: len(str(sample.data)))
    stops = generate.stop_ids(framework.tokenizer, "\n") if framework.task.generation else []
    rounds = itertools.count()

    def evaluate_packed() -> int:
        framework.evaluate(framework.eval_batch(samples, demonstrations))
        return len(samples)

    def plain() -> int:
        start = next(rounds) % 7 * len(by_length) // (7 * case.plain_rows)
        sample = by_length[start :: len(by_length) // case.plain_rows]
        plain_predictions(framework, sample, demonstrations, stops)
        return len(sample)

    return {"ours": evaluate_packed, "plain": plain}


def seconds_per_example(function: Callable) -> float:
    """Return the seconds of a call; per example, where the function returns how many it evaluated."""
    start = time.perf_counter()
    count = function()
    return (time.perf_counter() - start) / (count if isinstance(count, int) else 1)


def peak_memory_of_case(args, case: str, side: str) -> float:
    """Return the peak memory in MB of a process that evaluates one case, above that before it loads."""
    command = [sys.executable, __file__, "--model_name", args.model_name, "--data_dir", args.data_dir]
    command += ["--dtype", args.dtype, "--cases", case, "--peak", side]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def training_forwards(model, examples: list[packing.Example]) -> dict[str, Callable]:
    """Return {name: a forward of this training batch}."""
    batch = packing.pack(examples)
    mask = logprobs.attention_mask(batch["end"], 0, model.dtype)

    def bare():
        inputs = {"attention_mask": mask, "position_ids": batch["position_ids"], "use_cache": False}
        hidden_states = model.base_model(input_ids=batch["input_ids"], **inputs).last_hidden_state
        model.get_output_embeddings()(hidden_states[batch["read_row"], batch["read_column"]])

    return {
        "padded": lambda: plain_loss(model, examples),
        "ours": lambda: logprobs.loss(model, packing.pack(examples), True),
        "bare": bare,
    }


def time_training_forwards(args, model, rounds: int) -> None:
    """Print the seconds of a training batch's forward: ours, padded rows, and the bare forward."""
    framework = make_framework(args, "SST2", args.dtype, model)
    seconds = {name: [] for name in ("padded", "ours", "bare")}
    for i in range(rounds):
        samples = framework.task.sample_subset("train", i, 16)
        forwards = training_forwards(model, framework.prompts.examples(samples))
        with torch.inference_mode():
            round_seconds = {"padded": [seconds_per_example(forwards["padded"])], "ours": [], "bare": []}
            for _ in range(3):
                round_seconds["ours"].append(seconds_per_example(forwards["ours"]))
                round_seconds["bare"].append(seconds_per_example(forwards["bare"]))
        # The first round warms up, and so does each first run after the padded one, which fills the CPU's
        # caches.
        if i:
            for name, values in round_seconds.items():
                seconds[name].append(median(values[-2:]))
    for name in ("padded", "bare"):
        ratio = median(a / b for a, b in zip(seconds["ours"], seconds[name], strict=True))
        text = f"{1 / ratio:.1f} x faster" if name == "padded" else f"{ratio:.2f} x its time"
        our_seconds = median(seconds["ours"])
        other_seconds = median(seconds[name])
        print(f"training batch of 16 SST2 rows: {our_seconds:.3f} s, {name} {other_seconds:.3f} s: {text}")


def parse_args() -> argparse.Namespace:
    """Return the choices of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name", default=str(ROOT / "starter/smollm2-135m"))
    parser.add_argument("--tokenizer", help="tokenizer directory for --model_name opt-125m (random weights)")
    parser.add_argument("--data_dir", required=True, help="DIR/<task>/{train,validation}.jsonl of the tasks")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--no_peak", action="store_true", help="leave the memory out")
    parser.add_argument("--default_malloc", action="store_true", help="leave glibc to give freed memory back")
    parser.add_argument("--peak", choices=["ours", "plain"], help="only print the peak memory of this side")
    return parser.parse_args()


def print_case(args, model, name: str) -> None:
    """Time both sides of one case and print a row of the table."""
    case = CASES[name]
    sides = make_sides(make_framework(args, case.task, args.dtype, model), case, case.rows)
    pairs = [
        (seconds_per_example(sides["plain"]), seconds_per_example(sides["ours"])) for _ in range(args.rounds)
    ]
    memory = ""
    if not args.no_peak:
        memory = (
            f"{peak_memory_of_case(args, name, 'plain'):9.0f} {peak_memory_of_case(args, name, 'ours'):8.0f}"
        )
    ratio = median(plain / ours for plain, ours in pairs)
    plain_rate, rate = (1 / median(seconds) for seconds in zip(*pairs, strict=True))
    print(f"{name:18} {case.rows:5d} {plain_rate:11.2f} {rate:10.1f} {ratio:6.1f} {memory}", flush=True)


def main() -> None:
    """Print the table of the cases and the lines of a training batch, or the peak memory of one side."""
    args = parse_args()
    if not args.default_malloc:
        resources.keep_pages()
    if args.model_name == "opt-125m":
        args.model_name = str(random_opt("opt-125m", args.tokenizer, ROOT / "result" / "opt-125m", "cpu"))
    base_memory = resources.peak_memory_mb()
    model = make_framework(args, "SST2", args.dtype).model
    if args.peak:
        case = CASES[args.cases[0]]
        framework = make_framework(args, case.task, args.dtype, model)
        make_sides(framework, case, min(case.rows, PEAK_ROWS))[args.peak]()
        print(resources.peak_memory_mb() - base_memory)
        return
    threads = torch.get_num_threads()
    print(f"\n{Path(args.model_name).name}, {args.dtype}, {threads} threads, {args.rounds} rounds")
    heads = f"{'plain ex/s':>11} {'ours ex/s':>10} {'ratio':>6} {'plain MB':>9} {'ours MB':>8}"
    print(f"{'':18} {'rows':>5} {heads}")
    for name in args.cases:
        print_case(args, model, name)
    time_training_forwards(args, model, 4 * args.rounds)


if __name__ == "__main__":
    main()
