"""What a chain of boosters costs and keeps: errors of merging, seconds against its length, bytes on the disk.

    python research/boosters.py errors      # dtype × size of a booster, 40 rounds: one by one, from W0, ensemble
    python research/boosters.py growth      # a step and a merge against the number of boosters, merged and ensemble
    python research/boosters.py peft        # logits here and in PEFT, on three architectures; bytes of a checkpoint

Errors are relative to the sum of the boosters, in the Frobenius norm, against fp64. Seconds are medians of interleaved
steps on SmolLM2-135M of the starter, batch 16 of Reviews.
"""

import argparse
import sys
import tempfile
import time
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
from scoring import (
    logprobs,
    packing,
)
from trainer import points_per_forward
from zo.optimizer import ZerothOrder

STARTER = ROOT / "starter"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def errors(rounds: int) -> None:
    """Random boosters of rank 1 whose norm is a share of that of W, N(0, 0.02²) of 1024 × 1024."""
    print(f"{rounds} rounds: error relative to the sum of the boosters, in %")
    print(f"{'':10} {'booster / |W|':>14} {'one by one':>11} {'from W0':>9} {'ensemble':>9}")
    for dtype in DTYPES:
        for share in (1e-1, 1e-2, 1e-3, 1e-4):
            torch.manual_seed(0)
            model = torch.nn.Module()
            model.config = type("Config", (), {"model_type": "bench", "name_or_path": "bench"})
            model.proj = torch.nn.Linear(1024, 1024, bias=False).requires_grad_(False)
            model.proj.weight.normal_(0, 0.02)
            model.to(dtype)
            start = model.proj.weight.detach().clone()
            lora = LoRA(model, 1, 16, xgblora=True, targets=["proj"])
            module, chain = lora.lora_modules[0], torch.zeros(1024, 1024, dtype=torch.float64)
            one_by_one, in_fp32 = start.clone(), torch.zeros(1024, 1024)
            for _ in range(rounds):
                B = torch.randn(1024, 1)
                size = float(B.norm() * module.lora_A.detach().norm()) * module.scaling
                module.lora_B.data.copy_(B * share * float(start.float().norm()) / size)
                booster = lora.current["proj"]
                one_by_one += (booster.scaled_B @ booster.A).to(dtype)
                in_fp32 += booster.scaled_B @ booster.A  # what an ensemble computes with
                chain += booster.scaled_B.double() @ booster.A.double()
                lora.merge_and_reinit()
            found = [one_by_one.double() - start.double(), module.weight.double() - start.double(), in_fp32.double()]
            lost = [100 * float((f - chain).norm() / chain.norm()) for f in found]
            name = str(dtype).removeprefix("torch.")
            print(f"{name:10} {100 * share:13g}% {lost[0]:11.3g} {lost[1]:9.3g} {lost[2]:9.3g}", flush=True)


def side(form: str, k: int, dtype: str):
    """(LoRA, step(batch), framework) on a model of its own, with k boosters in the chain."""
    ensemble = form == "ensemble"
    flags = f"--model_name {STARTER / 'smollm2-135m'} --data_dir {STARTER} --task_name Reviews --trainer zo --xgblora"
    flags += f" --lora_freeze_a --xgblora_ensemble {ensemble} --load_bfloat16 {dtype == 'bfloat16'}"
    made = run.Framework(run.parse(flags.split()), run.get_task("Reviews", STARTER))
    made.load()
    model, lora = made.model, made.lora_module
    grow(lora, k)
    engine = ZerothOrder(model, 1e-9, 1e-2, master=True, set_perturbations=lora.set_perturbations)

    def step(batch) -> None:
        n = points_per_forward(batch["input_ids"].numel(), 2, True, True)
        engine.estimate(partial(logprobs.loss, model, batch, True), copies=n)
        engine.step()

    return lora, step, made


def grow(lora, k: int) -> None:
    generator = torch.Generator().manual_seed(len(lora.boosters))
    while len(lora.boosters) < k:
        for module in lora.lora_modules:
            module.lora_B.data.copy_(torch.randn(module.lora_B.shape, generator=generator) * 1e-3)
        lora.merge_and_reinit()


def growth(steps: int) -> None:
    for dtype in ("float32", "bfloat16"):
        sides = {(form, k): side(form, k, dtype) for form in ("merged", "ensemble") for k in (1, 10, 100)}
        made = sides["merged", 1][2]
        examples = made.prompts.examples(made.task.sample_subset("train", 0, 16 * (steps + 1)))
        seconds = {key: [] for key in sides}
        for i in range(steps + 1):
            batch = packing.pack(examples[16 * i : 16 * i + 16])
            for key, (_, step, _) in sides.items():
                start = time.perf_counter()
                step(batch)
                if i:
                    seconds[key].append(time.perf_counter() - start)
        base = sides["merged", 1][0]
        layer = sum(p.numel() for p in made.model.parameters() if p.dim() == 2) - made.model.lm_head.weight.numel()
        print(f"\nSmolLM2-135M, {dtype}, batch 16, {torch.get_num_threads()} threads, {steps} interleaved steps")
        print(f"{'':10} {'k':>5} {'step s':>8} {'/ merged 1':>11} {'FLOPs / same':>13} {'chain MB':>9} {'host MB':>8}")
        for (form, k), (lora, _, _) in sides.items():
            ratio = median(a / b for a, b in zip(seconds[form, k], seconds["merged", 1], strict=True))
            per_rank = sum(m.in_features + m.out_features for m in base.lora_modules)
            flops = (layer + per_rank * (1 + (k if form == "ensemble" else 0))) / (layer + per_rank)
            size = 4 * per_rank * k / 1e6
            host = (
                sum(t.nbytes for tensors in (lora.chain.pretrained, lora.chain.delta_sum) for t in tensors.values())
                / 1e6
            )
            shown = median(seconds[form, k])
            print(f"{form:10} {k:5d} {shown:8.3f} {ratio:11.2f} {flops:13.3f} {size:9.2f} {host:8.0f}")
        del sides
    print("\na merge, bfloat16: seconds, medians of 5")
    for form in ("merged", "ensemble"):
        lora, _, _ = side(form, 0, "bfloat16")
        for k in (10, 100, 500, 2000):
            grow(lora, k - 5)
            taken = []
            for i in range(5):
                start = time.perf_counter()
                grow(lora, k - 4 + i)
                taken.append(time.perf_counter() - start)
            print(f"{form:10} {k:5d} boosters: {median(taken):.3f}", flush=True)


def peft_table() -> None:
    from peft import PeftModel

    def random(model_class, config):
        torch.manual_seed(0)
        return model_class(config).eval()

    makers = {
        "OPT-125m geometry": lambda: random(OPTForCausalLM, OPTConfig()),
        "SmolLM2-135M (Llama)": lambda: AutoModelForCausalLM.from_pretrained(STARTER / "smollm2-135m", dtype="float32"),
        "GPT-2 geometry": lambda: random(GPT2LMHeadModel, GPT2Config()),
    }
    print(
        f"{'':22} {'boosters':>8} {'max |Δ logit|':>14} {'of max |logit|':>15} {'adapter MB':>11} {'boosters MB':>12}"
    )
    for name, make in makers.items():
        for k in (1, 16, 100):
            model = make().eval()
            lora = LoRA(model, 1, 16, xgblora=True)
            grow(lora, k)
            ids = torch.arange(64).view(2, 32) * 97 % 5000
            with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
                ours = model(input_ids=ids).logits
                lora.save_pretrained(folder)
                theirs = PeftModel.from_pretrained(make(), folder).eval()(input_ids=ids).logits
                sizes = [
                    (Path(folder) / f).stat().st_size / 1e6
                    for f in ("adapter_model.safetensors", "boosters.safetensors")
                ]
            worst = float((ours - theirs).abs().max())
            relative = worst / float(ours.abs().max())
            print(f"{name:22} {k:8d} {worst:14.1e} {relative:15.1e} {sizes[0]:11.2f} {sizes[1]:12.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=["errors", "growth", "peft"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    resources.keep_pages()
    if args.table == "errors":
        errors(args.rounds)
    elif args.table == "growth":
        growth(args.steps)
    else:
        peft_table()


if __name__ == "__main__":
    main()
