"""Costs and errors of a chain of boosters: of merging, seconds against its length, bytes on the disk.

    python research/boosters.py errors    # dtype × size of a booster: one by one, from W0, ensemble
    python research/boosters.py growth    # a step and a merge against the number of boosters
    python research/boosters.py peft      # logits here and in PEFT, bytes of a checkpoint

Errors are relative to the sum of the boosters, in the Frobenius norm, against fp64. Seconds are medians of
interleaved steps on SmolLM2-135M of the starter, batch 16 of Reviews.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import run
from lora import LoRA
from machine import resources
from scoring import logprobs, packing
from trainer import points_per_forward
from zo.optimizer import ZerothOrder

STARTER = ROOT / "starter"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTH = 1024  # of the matrix whose errors are measured
BATCH_SIZE = 16


# ---- errors ----


def print_errors(rounds: int) -> None:
    """Print errors for boosters of rank 1 whose norm is a share of that of W, N(0, 0.02²) of 1024 × 1024."""
    print(f"{rounds} rounds: error relative to the sum of the boosters, in %")
    print(f"{'':10} {'booster / |W|':>14} {'one by one':>11} {'from W0':>9} {'ensemble':>9}")
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for share in (1e-1, 1e-2, 1e-3, 1e-4):
            one_by_one, from_w0, ensemble = merge_errors(dtype, share, rounds)
            row = f"{100 * share:13g}% {one_by_one:11.3g} {from_w0:9.3g} {ensemble:9.3g}"
            print(f"{name:10} {row}", flush=True)


def merge_errors(dtype: torch.dtype, share: float, rounds: int) -> list[float]:
    """Return the errors in % of boosters merged one by one, from W0, and of an ensemble.

    Args:
        dtype: of the weights.
        share: norm of a booster over that of W.
        rounds: number of boosters.
    """
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.config = type("Config", (), {"model_type": "bench", "name_or_path": "bench"})
    model.proj = torch.nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    model.proj.weight.normal_(0, 0.02)
    model.to(dtype)
    start = model.proj.weight.detach().clone()
    lora = LoRA(model, 1, 16, xgblora=True, targets=["proj"])
    module = lora.lora_modules[0]
    chain = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    one_by_one = start.clone()
    ensemble = torch.zeros(WIDTH, WIDTH)
    for _ in range(rounds):
        B = torch.randn(WIDTH, 1)
        size = float(B.norm() * module.lora_A.detach().norm()) * module.scaling
        module.lora_B.data.copy_(B * share * float(start.float().norm()) / size)
        booster = lora.current["proj"]
        one_by_one += (booster.scaled_B @ booster.A).to(dtype)
        ensemble += booster.scaled_B @ booster.A
        chain += booster.scaled_B.double() @ booster.A.double()
        lora.merge_and_reinit()
    from_w0 = module.weight.double() - start.double()
    sums = (one_by_one.double() - start.double(), from_w0, ensemble.double())
    return [100 * float((total - chain).norm() / chain.norm()) for total in sums]


# ---- seconds ----


@dataclass
class Side:
    """A model of its own with a chain of boosters, merged into the weights or beside them."""

    framework: run.Framework
    engine: ZerothOrder

    def step(self, batch: dict) -> None:
        """Take a zeroth-order step on a packed batch."""
        copies = points_per_forward(batch["input_ids"].numel(), 2, True, True)
        self.engine.estimate(partial(logprobs.loss, self.framework.model, batch, True), copies=copies)
        self.engine.step()


def make_chain_side(form: str, num_boosters: int, dtype: str) -> Side:
    """Return a model with a chain of boosters.

    Args:
        form: "merged" or "ensemble".
        num_boosters: length of the chain.
        dtype: of the weights.
    """
    flags = f"--model_name {STARTER / 'smollm2-135m'} --data_dir {STARTER} --task_name Reviews --trainer zo"
    flags += f" --xgblora --lora_freeze_a --xgblora_ensemble {form == 'ensemble'}"
    flags += f" --load_bfloat16 {dtype == 'bfloat16'}"
    framework = run.Framework(run.parse(flags.split()), run.get_task("Reviews", STARTER))
    framework.load()
    lora = framework.lora_module
    grow(lora, num_boosters)
    engine = ZerothOrder(
        framework.model, 1e-9, 1e-2, master=True, set_perturbations=lora.set_perturbations
    )  # fmt: skip
    return Side(framework, engine)


def grow(lora: LoRA, num_boosters: int) -> None:
    """Merge random boosters until the chain has this length."""
    generator = torch.Generator().manual_seed(len(lora.boosters))
    while len(lora.boosters) < num_boosters:
        for module in lora.lora_modules:
            module.lora_B.data.copy_(torch.randn(module.lora_B.shape, generator=generator) * 1e-3)
        lora.merge_and_reinit()


def print_growth(steps: int) -> None:
    """Print seconds of a step and of a merge against the number of boosters."""
    for dtype in ("float32", "bfloat16"):
        print_steps(dtype, steps)
    print("\na merge, bfloat16: seconds, medians of 5")
    for form in ("merged", "ensemble"):
        lora = make_chain_side(form, 0, "bfloat16").framework.lora_module
        for num_boosters, seconds in time_merges(lora):
            print(f"{form:10} {num_boosters:5d} boosters: {seconds:.3f}", flush=True)


def time_merges(lora: LoRA) -> Iterator[tuple[int, float]]:
    """Yield (number of boosters, median seconds of a merge) as a chain grows."""
    for num_boosters in (10, 100, 500, 2000):
        grow(lora, num_boosters - 5)
        seconds = []
        for i in range(5):
            start = time.perf_counter()
            grow(lora, num_boosters - 4 + i)
            seconds.append(time.perf_counter() - start)
        yield num_boosters, median(seconds)


def time_chain_steps(sides: dict, steps: int) -> dict:
    """Return the seconds of interleaved steps of each side, after one to warm up."""
    framework = sides["merged", 1].framework
    samples = framework.task.sample_subset("train", 0, BATCH_SIZE * (steps + 1))
    examples = framework.prompts.examples(samples)
    seconds = {key: [] for key in sides}
    for i in range(steps + 1):
        batch = packing.pack(examples[BATCH_SIZE * i : BATCH_SIZE * (i + 1)])
        for key, side in sides.items():
            start = time.perf_counter()
            side.step(batch)
            if i:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def print_steps(dtype: str, steps: int) -> None:
    """Print seconds of a step, operations and bytes against the number of boosters."""
    keys = [(form, num) for form in ("merged", "ensemble") for num in (1, 10, 100)]
    sides = {(form, num): make_chain_side(form, num, dtype) for form, num in keys}
    seconds = time_chain_steps(sides, steps)
    framework = sides["merged", 1].framework
    model = framework.model
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.lm_head.weight.numel()
    per_rank = sum(m.in_features + m.out_features for m in framework.lora_module.lora_modules)
    threads = torch.get_num_threads()
    print(f"\nSmolLM2-135M, {dtype}, batch {BATCH_SIZE}, {threads} threads, {steps} interleaved steps")
    heads = f"{'k':>5} {'step s':>8} {'/ merged 1':>11} {'FLOPs / same':>13} {'chain MB':>9} {'host MB':>8}"
    print(f"{'':10} {heads}")
    for (form, num), side in sides.items():
        pairs = zip(seconds[form, num], seconds["merged", 1], strict=True)
        ratio = median(a / b for a, b in pairs)
        unmerged = num if form == "ensemble" else 0
        flops = (matrices + per_rank * (1 + unmerged)) / (matrices + per_rank)
        chain_mb = 4 * per_rank * num / 1e6
        chain = side.framework.lora_module.chain
        host_bytes = sum(t.nbytes for t in chain.pretrained.values())
        host_bytes += sum(t.nbytes for t in chain.delta_sum.values())
        row = f"{median(seconds[form, num]):8.3f} {ratio:11.2f} {flops:13.3f} {chain_mb:9.2f}"
        print(f"{form:10} {num:5d} {row} {host_bytes / 1e6:8.0f}")


# ---- PEFT ----


def random_model(model_class, config):
    """Return a model with random weights of seed 0."""
    torch.manual_seed(0)
    return model_class(config).eval()


def print_peft_table() -> None:
    """Print differences of logits between this program and PEFT, and bytes of the files."""
    makers = {
        "OPT-125m geometry": lambda: random_model(OPTForCausalLM, OPTConfig()),
        "SmolLM2-135M (Llama)": lambda: AutoModelForCausalLM.from_pretrained(
            STARTER / "smollm2-135m", dtype="float32"
        ),
        "GPT-2 geometry": lambda: random_model(GPT2LMHeadModel, GPT2Config()),
    }  # fmt: skip
    heads = f"{'max |Δ logit|':>14} {'of max |logit|':>15} {'adapter MB':>11} {'boosters MB':>12}"
    print(f"{'':22} {'boosters':>8} {heads}")
    for name, make_model in makers.items():
        for num_boosters in (1, 16, 100):
            print(f"{name:22} {num_boosters:8d} {peft_row(make_model, num_boosters)}", flush=True)


def peft_row(make_model, num_boosters: int) -> str:
    """Return a row of the table: differences of logits, bytes of adapter and boosters."""
    from peft import PeftModel

    model = make_model().eval()
    lora = LoRA(model, 1, 16, xgblora=True)
    grow(lora, num_boosters)
    ids = torch.arange(64).view(2, 32) * 97 % 5000
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        our_logits = model(input_ids=ids).logits
        lora.save_pretrained(folder)
        peft_logits = PeftModel.from_pretrained(make_model(), folder).eval()(input_ids=ids).logits
        files = ("adapter_model.safetensors", "boosters.safetensors")
        adapter_mb, boosters_mb = ((Path(folder) / file).stat().st_size / 1e6 for file in files)
    difference = float((our_logits - peft_logits).abs().max())
    relative = difference / float(our_logits.abs().max())
    return f"{difference:14.1e} {relative:15.1e} {adapter_mb:11.2f} {boosters_mb:12.2f}"


def main() -> None:
    """Print the table that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=["errors", "growth", "peft"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    resources.keep_pages()
    if args.table == "errors":
        print_errors(args.rounds)
    elif args.table == "growth":
        print_growth(args.steps)
    else:
        print_peft_table()


if __name__ == "__main__":
    main()
