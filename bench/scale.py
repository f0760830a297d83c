"""What a step costs on several ranks: measured on this machine with one and two, fitted, and carried on to many.

    python bench/scale.py

A random OPT of 13M elements in fp32, LoRA of rank 1, prompts of 5 to 60 tokens (as in SST-2), one thread a rank; the
ranks take the shares that training takes and exchange what it exchanges. The model of the cost:

    seconds(n) = a + c · tokens / n · imbalance(n) + (n − 1) · hop

Seconds are of the processor, of the fullest rank, so that other work on the machine does not show; a hop is on top.
a, c: least squares over batches of one process; imbalance: the fullest share over the mean one, of drawn batches; hop:
an exchange between two ranks that wait for each other, since gloo's all_gather is a ring. What the projection assumes
stands above it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

import parallel
import scoring
import shares
import utils
from lora import LoRA
from zo import ZerothOrder

BATCHES, STEPS = (4, 8, 16, 32), 8
RANKS = (1, 2, 8, 64, 1024)


def examples(n: int, seed: int, longest: int = 60) -> list[scoring.Example]:
    rng = np.random.RandomState(seed)
    prompts = [rng.randint(4, 8000, rng.randint(5, longest + 1)).tolist() for _ in range(n)]
    return [scoring.Example([[*ids, 10], [*ids, 11]], [1, 1]) for ids in prompts]


def worker() -> None:
    """One rank: prints, as rank 0, a line of JSON for each batch size, and the seconds of an exchange."""
    torch.set_num_threads(1)
    utils.keep_pages()
    parallel.start(60)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "num_hidden_layers": 8, "ffn_dim": 1024, "word_embed_proj_dim": 256}
    model = OPTForCausalLM(OPTConfig(**shape, num_attention_heads=4, vocab_size=8192)).eval()
    zo = ZerothOrder(LoRA(model, 1, 16).parameters(), 1e-9, 1e-2, master=True)
    share = shares.Share(scoring.pack, len)
    for size in BATCHES:
        seconds, tokens = [], []
        for step in range(STEPS + 2):
            batch = examples(size, 100 * size + step)
            tokens.append(sum(map(shares.tokens, batch)))
            start = time.process_time()
            packed = share(batch)
            part = packed.pop("part", 1.0)
            losses = [0.0, 0.0]
            if packed.pop("tokens", 1):
                losses = zo.losses_at(zo.method.points(), partial(scoring.loss, model, packed, True))
            busy = time.process_time() - start
            everyone = parallel.gather([*(part * loss for loss in losses), busy, 0.0])
            start = time.process_time()
            zo.add([math.fsum(one[i] for one in everyone) for i in range(2)])
            zo.step()
            seconds.append(max(one[2] for one in everyone) + time.process_time() - start)
        found = {"batch": size, "tokens": fmean(tokens[2:]), "seconds": median(seconds[2:])}
        if parallel.leads():
            print(json.dumps(found), flush=True)
    hops = []
    for _ in range(500):
        start = time.perf_counter()
        parallel.gather([0.0] * 4)
        hops.append(time.perf_counter() - start)
    if parallel.leads():
        print(json.dumps({"hop": median(hops), **parallel.WIRE}), flush=True)


def measure(ranks: int) -> list[dict]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, __file__, "--worker"]
    said = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True
    ).stdout
    return [json.loads(line) for line in said.decode().splitlines() if line.startswith("{")]


def imbalance(batch: int, ranks: int, draws: int = 20, longest: int = 60) -> float:
    """The fullest share over the mean one, of `batch` rows drawn and divided as training does."""
    found = []
    for seed in range(draws):
        sizes = [shares.tokens(x) for x in examples(batch, seed, longest)]
        found.append(max(sum(sizes[i] for i in part) for part in shares.balanced(sizes, ranks)) * ranks / sum(sizes))
    return fmean(found)


def project(name: str, elements: float, gpus: int, hop: float) -> None:
    rows, tokens, rate, bandwidth, fixed = 16, 300, 0.4 * 989e12, 50e9, 0.01
    work = 2 * 2 * elements * rows * tokens / rate  # two forwards of 2 · elements floating point operations a token
    print(f"\n{name}: a rank is {gpus} GPU, {rows} rows of 150 to 450 tokens a rank; {work:.2f} s of forwards a step")
    print("| ranks | rows a step | imbalance | exchange, s | step, s | efficiency | gradients instead, s |")
    print("|---|---|---|---|---|---|---|")
    one = fixed + work
    for n in RANKS:
        sizes = np.random.RandomState(0).randint(tokens // 2, tokens * 3 // 2 + 1, rows * n).tolist()
        uneven = max(sum(sizes[i] for i in part) for part in shares.balanced(sizes, n)) * n / sum(sizes)
        exchange, step = (n - 1) * hop, fixed + work * uneven + (n - 1) * hop
        ring = 2 * (n - 1) / n * 2 * elements / bandwidth
        print(f"| {n} | {rows * n} | {uneven:.4f} | {exchange:.4f} | {step:.3f} | {one / step:.3f} | {ring:.2f} |")


def main() -> None:
    one, two = measure(1), measure(2)
    lines, exchange = one[:-1], two[-1]
    tokens, seconds = ([line[name] for line in lines] for name in ("tokens", "seconds"))
    c, a = np.polyfit(tokens, seconds, 1)
    hop = exchange["hop"]
    size = exchange["bytes"] / exchange["exchanges"]
    print(f"a {1e3 * a:.2f} ms, c {1e6 * c:.1f} µs a token; hop {1e6 * hop:.0f} µs, {size:.0f} bytes a rank and step\n")
    print("| batch | tokens | 1 rank, ms | model | 2 ranks, ms | model | faster | imbalance |")
    print("|---|---|---|---|---|---|---|---|")
    for first, second in zip(lines, two[:-1], strict=True):
        n, uneven = first["tokens"], imbalance(first["batch"], 2)
        said = [1e3 * (a + c * n), 1e3 * (a + c * n / 2 * uneven)]
        ms = [1e3 * first["seconds"], 1e3 * second["seconds"]]
        print(
            f"| {first['batch']} | {n:.0f} | {ms[0]:.1f} | {said[0]:.1f} | {ms[1]:.1f} | {said[1]:.1f} "
            f"| {ms[0] / ms[1]:.2f} × | {uneven:.3f} |"
        )
    print(
        "\nAssumed: bf16 at 40 % of 989 TFLOP/s (H100); 10 ms a step that no rank shares; a hop of 25 µs (TCP in one\n"
        "room); the batch grows with the ranks; 66B takes two GPUs, which work in turn. Last column: the time that an\n"
        "all-reduce of bf16 gradients takes at 50 GB/s a rank, which first-order training would add."
    )
    project("OPT-13B", 13e9, 1, 25e-6)
    project("OPT-66B", 66e9, 2, 25e-6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    worker() if parser.parse_args().worker else main()
