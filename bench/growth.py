"""How the seconds of a step grow with the size of the model, the batch and the number of queries, as exponents.

    python bench/growth.py

Random models of OPT's shape in fp32, batches of 16 examples of 16 tokens where nothing else is said; medians of
interleaved steps. The exponent is the slope of log seconds over log size, by least squares.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

import scoring
import utils
from lora import LoRA
from trainer import copies
from zo import ZerothOrder

SIZES = {"10M": (256, 8), "40M": (512, 12), "125M": (768, 12), "350M": (1024, 24)}  # width, layers


def batch_of(examples: int, length: int = 16) -> dict:
    rng = np.random.RandomState(0)
    prompts = rng.randint(4, 8000, (examples, length)).tolist()
    return scoring.pack([scoring.Example([[*ids, 10], [*ids, 11]], [1, 1]) for ids in prompts])


def stepper(size: str, mode: str, queries: int = 1):
    """(elements of the model, step(batch)) of an engine on a random model."""
    width, layers = SIZES[size]
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "ffn_dim": 4 * width, "word_embed_proj_dim": width}
    vocabulary = 8192 if size == "10M" else 50272
    heads = {"num_attention_heads": width // 64, "vocab_size": vocabulary}
    model = OPTForCausalLM(OPTConfig(**shape, **heads)).eval()
    n = sum(p.numel() for p in model.parameters())
    lora = LoRA(model, 1, 16) if mode == "lora" else None
    spread = lora.spread if lora else None
    engine = ZerothOrder(model, 1e-9, 1e-2, master=lora is not None, queries=queries, spread=spread)

    def step(batch) -> None:
        at_once = copies(batch["input_ids"].numel(), 2 * queries, True, engine.master)
        engine.estimate(partial(scoring.loss, model, batch, True), copies=at_once)
        engine.step()

    return n, step


def line(name: str, xs: list[float], labels: list[str], steps: list, rounds: int) -> None:
    seconds = [[] for _ in steps]
    for i in range(rounds + 1):
        for taken, (step, batch) in zip(seconds, steps, strict=True):
            start = time.perf_counter()
            step(batch)
            if i:
                taken.append(time.perf_counter() - start)
    medians = [median(taken) for taken in seconds]
    exponent = np.polyfit([math.log(x) for x in xs], [math.log(s) for s in medians], 1)[0]
    shown = "  ".join(f"{label} {s:.3f}" for label, s in zip(labels, medians, strict=True))
    print(f"{name:32} {shown}   exponent {exponent:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    utils.keep_pages()
    for mode in ("lora", "full"):
        made = {size: stepper(size, mode) for size in SIZES}
        ones = [(step, batch_of(16)) for _, step in made.values()]
        line(f"{mode}: model size", [n for n, _ in made.values()], list(SIZES), ones, args.rounds)
        step, counts = made["125M"][1], [4, 8, 16, 32, 64]
        batches = [(step, batch_of(n)) for n in counts]
        line(f"{mode}: batch, 125M", counts, list(map(str, counts)), batches, args.rounds)
        del made, ones, batches, step
        several = [(stepper("125M", mode, q)[1], batch_of(4)) for q in (1, 2, 4, 8)]
        line(f"{mode}: queries, 125M, batch 4", [1, 2, 4, 8], ["1", "2", "4", "8"], several, args.rounds)


if __name__ == "__main__":
    main()
