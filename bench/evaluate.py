"""Examples per second of evaluation and of a training batch's forward against the plain way, interleaved in one run.

    python bench/evaluate.py --data_dir DIR
    python bench/evaluate.py --data_dir DIR --model_name opt-125m --tokenizer DIR

`plain` is one row per candidate, batch 1, logits of every position, prompts encoded alike; answers are generated one at
a time. It runs on a sample of the rows (evenly spaced by length), ours on all of them; the ratio is of seconds per
example, the median of several rounds. The last lines are the forward of a training batch: `bare` is the model's own
forward of the packed tokens with the mask ready, `padded` one padded row per candidate with all logits.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from step import plain_loss, random_opt

import run
from machine import resources
from scoring import (
    generate,
    logprobs,
    packing,
)

# name: (task, demonstrations, rows for ours, rows for plain in a round)
CASES = {
    "SST2": ("SST2", 0, 872, 24),
    "SST2, 16 demos": ("SST2", 16, 872, 8),
    "ReCoRD": ("ReCoRD", 0, 60, 4),
    "Copa": ("Copa", 0, 100, 20),
    "MultiRC": ("MultiRC", 0, 800, 12),
    "SQuAD, generated": ("SQuAD", 0, 64, 6),
}


@torch.inference_mode()
def plain_scores(model, example: packing.Example) -> list[float]:
    """Log-probability of each option: one row each, alone, with the logits of all its positions."""
    scores = []
    for ids, n in zip(example.encodings, example.option_lens, strict=True):
        logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
        scores.append(logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][-n:].sum().item())
    return scores


@torch.inference_mode()
def plain_answer(model, tokenizer, prompt: list[int], stops: list[int], new: int) -> str:
    grown = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=new, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, do_sample=False,
    )  # fmt: skip
    return tokenizer.decode(grown[0, len(prompt) :], skip_special_tokens=True).split("\n")[0].strip()


def plain_predictions(framework, samples, demonstrations) -> list:
    """What `Framework.predict` finds, one candidate or one answer at a time: option sums, or answers."""
    examples = framework.prompts.examples(samples, demonstrations, gold=False)
    if not framework.task.generation:
        return [plain_scores(framework.model, x) for x in examples]
    stops, new = framework.stops, framework.args.max_new_tokens
    return [plain_answer(framework.model, framework.tokenizer, x.encodings[0], stops, new) for x in examples]


def framework_of(args, task: str, dtype: str = "float32", model=None):
    flags = [
        "--model_name",
        args.model_name,
        "--data_dir",
        args.data_dir,
        "--task_name",
        task,
        "--disable_tqdm",
        "True",
    ]
    framework = run.Framework(
        run.parse([*flags, f"--load_bfloat16={dtype == 'bfloat16'}"]), run.get_task(task, args.data_dir)
    )
    if model is not None:
        framework.model = framework.evaluator.model = model
    framework.load()
    framework.stops = generate.stop_ids(framework.tokenizer, "\n") if framework.task.generation else None
    return framework


def sides(framework, demos: int, n_ours: int, n_plain: int):
    """(ours, plain): functions that evaluate, and give the number of examples that they saw."""
    samples = framework.task.sample_subset("validation", 0, n_ours)
    shots = framework.task.sample_subset("train", 0, demos)
    order = sorted(samples, key=lambda sample: len(str(sample.data)))
    rounds = iter(range(10**6))

    def ours() -> int:
        framework.evaluate(framework.eval_batch(samples, shots))
        return len(samples)

    def plain() -> int:
        start = next(rounds) % 7 * len(order) // (7 * n_plain)
        plain_predictions(framework, order[start :: len(order) // n_plain], shots)
        return len(order[start :: len(order) // n_plain])

    return ours, plain


def timed(function) -> float:
    """Seconds a call takes; per example, where the function says how many it saw."""
    start = time.perf_counter()
    n = function()
    return (time.perf_counter() - start) / (n if isinstance(n, int) else 1)


def peak(args, case: str, which: str) -> float:
    """Peak resident memory in MB of a process that evaluates one case in one way, above that before it loads."""
    command = [sys.executable, __file__, "--model_name", args.model_name, "--data_dir", args.data_dir]
    command += ["--dtype", args.dtype, "--cases", case, "--peak", which]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def training_forward(args, model, rounds: int) -> None:
    framework = framework_of(args, "SST2", args.dtype, model)
    seconds = {name: [] for name in ("padded", "ours", "bare")}
    for i in range(rounds):
        examples = framework.prompts.examples(framework.task.sample_subset("train", i, 16))
        batch = packing.pack(examples)
        mask = logprobs.attention_mask(batch["end"], 0, model.dtype)

        def bare(batch=batch, mask=mask):
            inputs = {"attention_mask": mask, "position_ids": batch["position_ids"], "use_cache": False}
            hidden = model.base_model(input_ids=batch["input_ids"], **inputs).last_hidden_state
            model.get_output_embeddings()(hidden[batch["read_row"], batch["read_column"]])

        functions = {
            "padded": lambda examples=examples: plain_loss(model, examples),
            "ours": lambda examples=examples: logprobs.loss(model, packing.pack(examples), True),
            "bare": bare,
        }
        with torch.inference_mode():
            took = {"padded": [timed(functions["padded"])], "ours": [], "bare": []}
            for _ in range(3):
                took["ours"].append(timed(functions["ours"]))
                took["bare"].append(timed(functions["bare"]))
        if i:  # the first round warms up, and so does each first run after the padded one, which left the caches full
            for name, values in took.items():
                seconds[name].append(median(values[-2:]))
    for name in ("padded", "bare"):
        ratio = median(a / b for a, b in zip(seconds["ours"], seconds[name], strict=True))
        text = f"{1 / ratio:.1f} x faster" if name == "padded" else f"{ratio:.2f} x its time"
        ours, other = median(seconds["ours"]), median(seconds[name])
        print(f"training batch of 16 SST2 rows: {ours:.3f} s, {name} {other:.3f} s: {text}")


def main() -> None:
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
    args = parser.parse_args()
    if not args.default_malloc:
        resources.keep_pages()
    if args.model_name == "opt-125m":
        args.model_name = str(random_opt("opt-125m", args.tokenizer, ROOT / "result" / "opt-125m", "cpu"))
    before = resources.peak_memory_mb()
    model = framework_of(args, "SST2", args.dtype).model
    if args.peak:
        task, demos, n_ours, n_plain = CASES[args.cases[0]]
        sides(framework_of(args, task, args.dtype, model), demos, min(n_ours, 200), n_plain)[args.peak == "plain"]()
        print(resources.peak_memory_mb() - before)
        return
    print(f"\n{Path(args.model_name).name}, {args.dtype}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    print(f"{'':18} {'rows':>5} {'plain ex/s':>11} {'ours ex/s':>10} {'ratio':>6} {'plain MB':>9} {'ours MB':>8}")
    for name in args.cases:
        task, demos, n_ours, n_plain = CASES[name]
        ours, plain = sides(framework_of(args, task, args.dtype, model), demos, n_ours, n_plain)
        pairs = [(timed(plain), timed(ours)) for _ in range(args.rounds)]
        memory = "" if args.no_peak else f"{peak(args, name, 'plain'):9.0f} {peak(args, name, 'ours'):8.0f}"
        ratio = median(a / b for a, b in pairs)
        slow, fast = (1 / median(side) for side in zip(*pairs, strict=True))
        print(f"{name:18} {n_ours:5d} {slow:11.2f} {fast:10.1f} {ratio:6.1f} {memory}", flush=True)
    training_forward(args, model, 4 * args.rounds)


if __name__ == "__main__":
    main()
