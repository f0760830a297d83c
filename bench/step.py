"""Time a zeroth-order step against its floor, interleaved in one run, as ratios of medians, with peak memory.

    python bench/step.py --model_name starter/smollm2-135m --data_dir starter --task_name Reviews
    python bench/step.py --model_name opt-125m --data_dir DIR --task_name SST2 --dtypes float32

`floor` is two bare forwards of the batch as the step packs it. `plain-…` is a step without this project's
savings: one padded row per candidate, logits of every position, a `torch.normal` per tensor, four passes over
the weights. `upper-B` trains boosters in the upper half of the layers, so that the lower half runs once for
both signs; `upper-B-cached` has a warm cache, and the lower half does not run at all. A full-parameter step
also has a bound of its own: the floor, three bare sweeps over the weights (θ ← θ + 0 in place) and, gaussian,
two generations of z timed alone. `opt-125m` to `opt-6.7b` stand for random models of that geometry, to be
used with a tokenizer directory (`--tokenizer`). On a GPU everything runs there, and the memory is
`max_memory_allocated`.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import run
from lora import LoRA
from machine import resources
from scoring import logprobs, packing
from trainer import points_per_forward
from training import activation_cache
from zo import counter_rng
from zo.optimizer import ZerothOrder
from zo.rng_kernels import DirectionSource

KINDS = (
    "floor", "lora", "lora-copies", "all-linear", "xgblora-B", "upper-B", "upper-B-cached",
    "full-signs", "full", "plain-lora", "plain-full",
)  # fmt: skip
ALL_LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2",
)  # fmt: skip
# Width, layers, heads (arXiv 2205.01068, table 1).
GEOMETRY = {
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-6.7b": (4096, 32, 32),
}
PEAK_STEPS = 3  # of the process that measures memory


def random_opt(size: str, tokenizer: str, path: Path, device) -> Path:
    """Write a model directory of a geometry with random weights, and return its path.

    Args:
        size: a key of GEOMETRY.
        tokenizer: the directory of a tokenizer, which is copied.
        path: the directory.
        device: where the weights are drawn.
    """
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    width, layers, heads = GEOMETRY[size]
    config = OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = OPTForCausalLM(config).to(torch.float32 if size == "opt-125m" else torch.bfloat16)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


# ---- the plain step ----


def plain_loss(model, examples) -> torch.Tensor:
    """Return the classification loss of one padded row per candidate, with the logits of every position."""
    device = model.device
    rows = [ids for x in examples for ids in x.encodings]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    log_probs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    option_lens = [n for x in examples for n in x.option_lens]
    means = []
    for i, (row, option_len) in enumerate(zip(rows, option_lens, strict=True)):
        positions = torch.arange(len(row) - option_len, len(row), device=device)
        means.append(log_probs[i, positions - 1, torch.tensor(row, device=device)[positions]].mean())
    scores = torch.stack(means).view(len(examples), -1)
    labels = torch.tensor([x.label for x in examples], device=device)
    return torch.nn.functional.cross_entropy(scores, labels)


def plain_step(params, loss: Callable, lr=0.0, eps=1e-3) -> None:
    """Take a step of MeZO that perturbs and restores all parameters in place.

    Args:
        params: the trained parameters.
        loss: () -> loss of the batch.
    """

    def add_noise(scale: float) -> None:
        torch.manual_seed(0)
        for p in params:
            z = torch.normal(0, 1, size=p.shape, dtype=p.dtype, device=p.device)
            p.data = p.data + z * scale

    with torch.inference_mode(False), torch.no_grad():
        add_noise(eps)
        plus = loss()
        add_noise(-2 * eps)
        minus = loss()
        add_noise(eps)
        add_noise(-lr * float(plus - minus) / (2 * eps))


# ---- the kinds of steps ----


@dataclass
class Side:
    """One kind of step on a model of its own.

    Attributes:
        kind: a name in KINDS.
        framework: with the model and its adapters.
        engine: of zeroth-order steps; None for `floor` and `plain-…`.
        cache: of `upper-B-cached`, filled before the first step.
    """

    kind: str
    framework: run.Framework
    engine: ZerothOrder | None = None
    cache: activation_cache.ActivationCache | None = None

    def step(self, batch: dict, examples: list[packing.Example]) -> None:
        """Take a step on a packed batch of these examples."""
        model = self.framework.model
        if self.kind == "floor":
            with torch.inference_mode():
                logprobs.loss(model, batch, True)
                logprobs.loss(model, batch, True)
        elif self.kind.startswith("plain"):
            params = [p for p in model.parameters() if p.requires_grad]
            plain_step(params, lambda: plain_loss(model, examples))
        else:
            self.zeroth_order_step(model, batch)

    def zeroth_order_step(self, model, batch: dict) -> None:
        """Take a step of the engine."""
        batched = "on" if self.kind == "lora-copies" else "auto"
        on_cpu = self.framework.args.device.type == "cpu"
        copies = points_per_forward(batch["input_ids"].numel(), 2, on_cpu, self.engine.master, batched)
        with self.lower_layers(model, batch):
            self.engine.estimate(partial(logprobs.loss, model, batch, True), copies=copies)
        self.engine.step()

    def lower_layers(self, model, batch: dict) -> contextlib.AbstractContextManager:
        """Return a context in which the layers below the adapted ones have run, of `upper-…` alone."""
        if not self.kind.startswith("upper"):
            return contextlib.nullcontext()
        layers, first_layer = self.framework.lora_module.first_adapted_layer
        if self.cache:
            hidden_states = self.cache(batch)
        else:
            forward = partial(logprobs.loss, model, batch, True)
            hidden_states = activation_cache.capture_hidden_states(layers[first_layer], forward)
        return activation_cache.skip_lower_layers(layers, first_layer, hidden_states)

    def fill_cache(self, examples: list[packing.Example]) -> list[packing.Example]:
        """Fill the cache, and return the examples as they refer to it."""
        layers, first_layer = self.framework.lora_module.first_adapted_layer
        model = self.framework.model
        self.cache = activation_cache.ActivationCache(model, layers, first_layer, examples, plain_rows=False)
        return self.cache.examples


def make_side(kind: str, args, dtype: str) -> Side:
    """Return a kind of step on a model of its own.

    Args:
        kind: a name in KINDS.
        args: model and data of the command line.
        dtype: of the weights.
    """
    flags = f"--model_name {args.model_name} --data_dir {args.data_dir} --task_name {args.task_name}"
    flags += f" --trainer zo --load_bfloat16 {dtype == 'bfloat16'}"
    if "-B" in kind:
        flags += " --xgblora --lora_freeze_a"
    elif "lora" in kind:
        flags += " --lora"
    if kind.startswith("upper"):
        flags += " --xgblora_layers top:half"
    framework = run.Framework(run.parse(flags.split()), run.get_task(args.task_name, args.data_dir))
    framework.load()
    if kind == "all-linear":
        framework.lora_module = LoRA(framework.model, 8, 16, targets=ALL_LINEAR)
    if kind == "floor" or kind.startswith("plain"):
        return Side(kind, framework)
    is_full = kind.startswith("full")
    engine = ZerothOrder(
        framework.model,
        1e-9,
        1e-3,
        master=not is_full,
        set_perturbations=None if is_full else framework.lora_module.set_perturbations,
        distribution="rademacher" if kind == "full-signs" else "gaussian",
    )
    return Side(kind, framework, engine)


# ---- seconds and memory ----


def time_sweeps(model) -> dict[str, float]:
    """Return the seconds of a bare sweep over the weights, and of one generation of z for all of them."""
    params = list(model.parameters())
    block = ZerothOrder(params, master=False).blocks[0].chunk_size or counter_rng.CHUNK_SIZE

    def sweep() -> None:
        for p in params:
            p.add_(0.0)

    def draw_z() -> None:
        for p in params:
            for begin in range(0, p.numel(), block):
                columns = range(min(block, p.numel() - begin))
                DirectionSource(0).rows((0, 0), begin, 1, columns, p.device)

    with torch.no_grad():
        return {"sweep": seconds_of_call(sweep, model.device), "z": seconds_of_call(draw_z, model.device)}


def seconds_of_call(work: Callable, device) -> float:
    """Return the seconds of `work()`, with the kernels that it has started on a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else bool
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def peak_memory_of_kind(args, dtype: str, kind: str) -> float:
    """Return the peak memory in MB of a process that takes steps of one kind, above that before it loads."""
    command = [sys.executable, __file__, "--model_name", args.model_name, "--data_dir", args.data_dir]
    command += ["--task_name", args.task_name, "--batch", str(args.batch), "--dtypes", dtype, "--peak", kind]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def to_device(batch: dict, device) -> dict:
    """Return a packed batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def make_groups(args, sides: dict[str, Side]) -> list[list[packing.Example]]:
    """Return the examples of each step, and fill the cache of `upper-B-cached`."""
    framework = next(iter(sides.values())).framework
    samples = framework.task.sample_subset("train", 0, args.batch * args.steps)
    examples = framework.prompts.examples(samples)
    if "upper-B-cached" in sides:
        examples = sides["upper-B-cached"].fill_cache(examples)
    return [examples[i : i + args.batch] for i in range(0, len(examples), args.batch)]


def time_steps(sides: dict[str, Side], groups: list[list[packing.Example]]) -> dict[str, list[float]]:
    """Return {kind, "sweep" or "z": seconds of each round} of interleaved steps; the first round warms up."""
    model = next(iter(sides.values())).framework.model
    device = model.device
    seconds = {name: [] for name in (*sides, "sweep", "z")}
    for i, group in enumerate(groups):
        batch = to_device(packing.pack(group), device)
        round_seconds = {}
        for kind, side in sides.items():
            if device.type == "cuda":  # a GPU chooses kernels and allocates memory when a shape is new
                side.step(batch, group)
            round_seconds[kind] = seconds_of_call(partial(side.step, batch, group), device)
        if i:
            round_seconds |= time_sweeps(model)
            for name, value in round_seconds.items():
                seconds[name].append(value)
    return seconds


def bound_ratio(kind: str, seconds: dict[str, list[float]]) -> str:
    """Return the ratio of a full-parameter step to its bound, as text; empty for the other kinds."""
    if kind not in ("full", "full-signs"):
        return ""
    generations = 2 if kind == "full" else 0
    columns = zip(seconds[kind], seconds["floor"], seconds["sweep"], seconds["z"], strict=True)
    ratios = [step / (floor + 3 * sweep + generations * z) for step, floor, sweep, z in columns]
    return f"{median(ratios):.2f}"


def print_table(args, dtype: str) -> None:
    """Time all kinds in one dtype and print their table."""
    sides = {kind: make_side(kind, args, dtype) for kind in args.kinds}
    groups = make_groups(args, sides)
    seconds = time_steps(sides, groups)
    del sides
    tokens = median(sum(len(x.encodings[0]) - 1 for x in group) for group in groups)
    print(
        f"\n{Path(args.model_name).name}, {args.task_name}, {dtype}, batch {args.batch} (median {tokens:.0f} "
        f"distinct tokens), {torch.get_num_threads()} threads, {len(groups) - 1} interleaved steps each"
    )
    print(f"{'':12} {'seconds':>8} {'/ floor':>8} {'/ bound':>8} {'peak MB':>8}")
    for kind in seconds:
        ratio = median(a / b for a, b in zip(seconds[kind], seconds["floor"], strict=True))
        memory = ""
        if kind in args.kinds and not args.no_peak:
            memory = f"{peak_memory_of_kind(args, dtype, kind):.0f}"
        bound = bound_ratio(kind, seconds)
        print(f"{kind:12} {median(seconds[kind]):8.3f} {ratio:8.2f} {bound:>8} {memory:>8}", flush=True)


def print_peak(args) -> None:
    """Print the peak memory in MB of steps of the kind in `--peak`, above that before the model is loaded."""
    base_memory = resources.peak_memory_mb()
    side = make_side(args.peak, args, args.dtypes[0])
    for group in make_groups(args, {args.peak: side})[:PEAK_STEPS]:
        side.step(to_device(packing.pack(group), side.framework.model.device), group)
    print(resources.peak_memory_mb() - base_memory)


def parse_args() -> argparse.Namespace:
    """Return the choices of the command line."""
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
    return parser.parse_args()


def main() -> None:
    """Print a table for each dtype, or the peak memory of one kind."""
    args = parse_args()
    if not args.default_malloc:
        resources.keep_pages()
    if args.model_name in GEOMETRY:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        path = ROOT / "result" / args.model_name
        args.model_name = str(random_opt(args.model_name, args.tokenizer, path, device))
    if args.peak:
        print_peak(args)
        return
    for dtype in args.dtypes:
        print_table(args, dtype)


if __name__ == "__main__":
    main()
