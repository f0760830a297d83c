"""What the precision of the base costs and saves: seconds of a LoRA step, peak memory, and how far scores move.

    python bench/precision.py [--steps 8]

SmolLM2-135M of the starter, 16 rows of Reviews a step, rank-1 boosters beside the weights; one process for each
precision, twice in turn. Memory is that of the process; score error is against float32, mean |Δ log p| of an option.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PRECISIONS = {
    "float32": ("float32", None), "float16": ("float16", None), "bfloat16": ("bfloat16", None),
    "8 bits, float32": ("float32", 8), "8 bits, bfloat16": ("bfloat16", 8), "4 bits, bfloat16": ("bfloat16", 4),
}  # fmt: skip


def measure(name: str, steps: int) -> None:
    """Print one line of JSON: seconds of each step, peak MB, scores of 64 rows."""
    import torch

    import models
    import scoring
    import utils
    from lora import LoRA
    from tasks import get_task
    from utils import encode_prompt, load_tokenizer
    from zo import ZerothOrder

    utils.keep_pages()
    dtype, bits = PRECISIONS[name]
    path = str(ROOT / "starter" / "smollm2-135m")
    model = models.read_model(path, getattr(torch, dtype), bits=bits)
    tokenizer, task = load_tokenizer(path), get_task("Reviews", str(ROOT / "starter"))
    examples = [
        scoring.Example(*encode_prompt(task, task.get_template(), [], s, tokenizer, 512), s.correct_candidate)
        for s in task.sample_subset("train", 0, 64)
    ]
    weights = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    scores = scoring.score(model, examples)
    lora = LoRA(model, 1, 16, xgblora=True, ensemble=True)
    zo = ZerothOrder([{"params": lora.parameters()}], 1e-3, 1e-2, 0, master=True, spread=lora.spread)
    seconds, batch = [], scoring.pack(examples[:16])
    for _ in range(steps):
        start = time.perf_counter()
        zo.step(lambda: scoring.loss(model, batch, True))
        seconds.append(time.perf_counter() - start)
    found = {"seconds": seconds[1:], "mb": utils.peak_memory_mb(), "weights": weights / 1e6, "scores": scores}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--one", choices=list(PRECISIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args.one, args.steps)
    found: dict[str, list[dict]] = {name: [] for name in PRECISIONS}
    for _ in range(2):
        for name, runs in found.items():
            words = [sys.executable, __file__, "--one", name, "--steps", str(args.steps)]
            done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
            runs += [json.loads(done.stdout)] if done.returncode == 0 else []
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    exact = [s for row in found["float32"][0]["scores"] for s in row]
    base = median(s for one in found["float32"] for s in one["seconds"])
    print(f"{'':18} {'step, s':>8} {'/ fp32':>7} {'peak MB':>8} {'weights MB':>11} {'score error':>12}")
    for name, runs in found.items():
        if runs:
            step = median(s for one in runs for s in one["seconds"])
            error = [abs(s - e) for s, e in zip((s for row in runs[0]["scores"] for s in row), exact, strict=True)]
            print(
                f"{name:18} {step:8.3f} {step / base:7.2f} {min(one['mb'] for one in runs):8.0f} "
                f"{runs[0]['weights']:11.0f} {sum(error) / len(error):12.4f}"
            )
    return None


if __name__ == "__main__":
    main()
