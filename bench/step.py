"""Seconds of a zeroth-order step against its floor, interleaved in one run, as ratios of medians; peak memory of each.

    python bench/step.py --model_name starter/smollm2-135m --data_dir starter --task_name Reviews
    python bench/step.py --model_name opt-125m --data_dir DIR --task_name SST2 --dtypes float32

The floor is two bare forwards of the batch as the step packs it. `plain` is what a step costs without this project's
savings: one padded row per candidate, logits of every position, a `torch.normal` per tensor, four passes over the
weights. `upper-B` trains boosters in the upper half of the layers, so that the lower half runs once for both signs, and
`upper-B-cached` with a warm cache not at all. A full-parameter step is also set against its own bound: the floor, three
bare sweeps over the weights (θ ← θ + 0 in place) and, gaussian, two generations of z timed alone. `opt-125m` to
`opt-6.7b` stand for random models of that geometry, to be used with a tokenizer directory (`--tokenizer`). On a GPU
everything runs there, and the memory is `max_memory_allocated`.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import run
from lora import LoRA
from machine import resources
from scoring import (
    logprobs,
    packing,
)
from trainer import points_per_forward
from training import activation_cache
from zo import counter_rng
from zo.optimizer import ZerothOrder
from zo.rng_kernels import DirectionSource

KINDS = ("floor", "lora", "lora-copies", "all-linear", "xgblora-B", "upper-B", "upper-B-cached", "full-signs", "full")
KINDS += ("plain-lora", "plain-full")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")


GEOMETRY = {
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-6.7b": (4096, 32, 32),
}  # width, layers, heads (arXiv 2205.01068, table 1)


def random_opt(size: str, tokenizer: str, path: Path, device) -> Path:
    """A model directory of that geometry with random weights and the given tokenizer."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    width, layers, heads = GEOMETRY[size]
    shape = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    torch.manual_seed(0)
    with torch.device(device):
        model = OPTForCausalLM(OPTConfig(**shape)).to(torch.float32 if size == "opt-125m" else torch.bfloat16)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


def plain_loss(model, examples) -> torch.Tensor:
    """One padded row per candidate, logits of every position, cross-entropy over the candidates."""
    rows = [ids for x in examples for ids in x.encodings]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    means, row = [], 0
    for x in examples:
        for option, n in zip(x.encodings, x.option_lens, strict=True):
            places = torch.arange(len(option) - n, len(option), device=model.device)
            means.append(logprobs[row, places - 1, torch.tensor(option, device=model.device)[places]].mean())
            row += 1
    scores = torch.stack(means).view(len(examples), -1)
    return torch.nn.functional.cross_entropy(scores, torch.tensor([x.label for x in examples], device=model.device))


def plain_step(model, params, loss, lr=0.0, eps=1e-3) -> None:
    def sweep(scale):
        torch.manual_seed(0)
        for p in params:
            p.data = p.data + torch.normal(0, 1, size=p.shape, dtype=p.dtype, device=p.device) * scale

    with torch.inference_mode(False), torch.no_grad():
        sweep(eps)
        plus = loss()
        sweep(-2 * eps)
        minus = loss()
        sweep(eps)
        sweep(-lr * float(plus - minus) / (2 * eps))


def side(kind: str, args, dtype: str):
    """step(batch, examples) of one kind, on a model of its own."""
    mode = "--xgblora --lora_freeze_a" if "-B" in kind else "--lora" if "lora" in kind else ""
    common = f"--model_name {args.model_name} --data_dir {args.data_dir} --task_name {args.task_name} --trainer zo"
    framework = run.Framework(
        run.parse(f"{common} {mode} --load_bfloat16 {dtype == 'bfloat16'}".split()),
        run.get_task(args.task_name, args.data_dir),
    )
    if kind.startswith("upper"):
        framework.args.xgblora_layers = f"top:{framework.config.num_hidden_layers // 2}"
    framework.load()
    model = framework.model
    if kind == "all-linear":
        framework.lora_module = LoRA(model, 8, 16, targets=LINEAR)
    params = [p for p in model.parameters() if p.requires_grad]
    if kind == "floor":

        @torch.inference_mode()
        def step(batch, examples):
            logprobs.loss(model, batch, True)
            logprobs.loss(model, batch, True)

    elif kind.startswith("plain"):

        def step(batch, examples):
            plain_step(model, params, lambda: plain_loss(model, examples))

    else:
        full = kind.startswith("full")
        set_perturbations = None if full else framework.lora_module.set_perturbations
        distribution = "rademacher" if kind == "full-signs" else "gaussian"
        engine = ZerothOrder(
            model, 1e-9, 1e-3, master=not full, set_perturbations=set_perturbations, distribution=distribution
        )

        def step(batch, examples):
            wish = "on" if kind == "lora-copies" else "auto"
            tokens, cpu = batch["input_ids"].numel(), framework.args.device.type == "cpu"
            n, forward = points_per_forward(tokens, 2, cpu, engine.master, wish), contextlib.nullcontext()
            if kind.startswith("upper"):
                layers, first = framework.lora_module.first_adapted_layer
                if kind == "upper-B":
                    hidden = activation_cache.capture_hidden_states(
                        layers[first], partial(logprobs.loss, model, batch, True)
                    )
                else:
                    hidden = framework.store(batch)
                forward = activation_cache.skip_lower_layers(layers, first, hidden)
            with forward:
                engine.estimate(partial(logprobs.loss, model, batch, True), copies=n)
            engine.step()

    return framework, step


def sweeps(model) -> tuple[float, float]:
    """(seconds of a bare sweep over the weights, of one generation of z for all of them)."""
    params = list(model.parameters())

    def sweep():
        for p in params:
            p.add_(0.0)

    block = ZerothOrder(params, master=False).blocks[0].chunk_size or counter_rng.CHUNK_SIZE

    def generate():
        for p in params:
            for first in range(0, p.numel(), block):
                DirectionSource(0).rows((0, 0), first, 1, range(min(block, p.numel() - first)), p.device)

    with torch.no_grad():
        return timed(sweep, model.device), timed(generate, model.device)


def timed(work, device) -> float:
    """Seconds of `work()`, with what it left running on a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else bool
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def peak(args, dtype: str, kind: str) -> float:
    """Peak resident memory in MB of a process that takes three steps of one kind, above that before it loads."""
    command = [sys.executable, __file__, "--model_name", args.model_name, "--data_dir", args.data_dir]
    command += ["--task_name", args.task_name, "--batch", str(args.batch), "--dtypes", dtype, "--peak", kind]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name", default=str(ROOT / "starter/smollm2-135m"))
    parser.add_argument("--tokenizer", help="tokenizer directory for --model_name opt-…")
    parser.add_argument("--data_dir", default=str(ROOT / "starter"))
    parser.add_argument("--task_name", default="Reviews")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--default_malloc", action="store_true", help="leave glibc to give freed memory back")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--no_peak", action="store_true", help="leave the memory out")
    parser.add_argument("--peak", choices=KINDS, help="only print the peak memory of this kind")
    args = parser.parse_args()
    if not args.default_malloc:
        resources.keep_pages()
    if args.model_name in GEOMETRY:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        path = ROOT / "result" / args.model_name
        args.model_name = str(random_opt(args.model_name, args.tokenizer, path, device))
    if args.peak:
        before = resources.peak_memory_mb()
    for dtype in args.dtypes:
        sides = {kind: side(kind, args, dtype) for kind in ([args.peak] if args.peak else args.kinds)}
        framework = next(iter(sides.values()))[0]
        device = framework.model.device

        def on_device(batch, device=device):
            return {name: tensor.to(device) for name, tensor in batch.items()}

        examples = framework.prompts.examples(framework.task.sample_subset("train", 0, args.batch * args.steps))
        cached = sides.get("upper-B-cached")
        if cached:
            made = cached[0]
            made.store = activation_cache.ActivationCache(
                made.model, *made.lora_module.first_adapted_layer, examples, plain=False
            )
            examples = made.store.examples
        groups = [examples[i : i + args.batch] for i in range(0, len(examples), args.batch)]
        if args.peak:
            for group in groups[:3]:
                sides[args.peak][1](on_device(packing.pack(group)), group)
            print(resources.peak_memory_mb() - before)
            return
        seconds = {kind: [] for kind in (*args.kinds, "sweep", "z")}
        for i, group in enumerate(groups):
            batch = on_device(packing.pack(group))
            for kind, (_, step) in sides.items():
                if device.type == "cuda":  # which chooses kernels and takes memory when it first sees a shape
                    step(batch, group)
                took = timed(partial(step, batch, group), device)
                if i:  # the first one warms up
                    seconds[kind].append(took)
            if i:
                for name, took in zip(("sweep", "z"), sweeps(framework.model), strict=True):
                    seconds[name].append(took)
        del sides
        real = median(sum(len(x.encodings[0]) - 1 for x in group) for group in groups)
        print(
            f"\n{Path(args.model_name).name}, {args.task_name}, {dtype}, batch {args.batch} (median {real:.0f} "
            f"distinct tokens), {torch.get_num_threads()} threads, {len(groups) - 1} interleaved steps each"
        )
        print(f"{'':12} {'seconds':>8} {'/ floor':>8} {'/ bound':>8} {'peak MB':>8}")
        for kind in (*args.kinds, "sweep", "z"):
            ratio = median(a / b for a, b in zip(seconds[kind], seconds["floor"], strict=True))
            bound, memory = "", ""
            if kind in ("full", "full-signs"):
                zs = 2 * (kind == "full")
                parts = zip(seconds[kind], seconds["floor"], seconds["sweep"], seconds["z"], strict=True)
                bound = f"{median(own / (f + 3 * s + zs * z) for own, f, s, z in parts):.2f}"
            if kind in args.kinds and not args.no_peak:
                memory = f"{peak(args, dtype, kind):.0f}"
            print(f"{kind:12} {median(seconds[kind]):8.3f} {ratio:8.2f} {bound:>8} {memory:>8}", flush=True)


if __name__ == "__main__":
    main()
