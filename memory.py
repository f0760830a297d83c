"""How much memory a run will take, said before the model is loaded, and what to lower where the machine has less.

A run holds the weights, what a forward holds at its widest point (back-propagation: what it keeps of all layers), the
adapter with its copies, and gradients with the optimizer's state. The shapes are exact: the model is built without
storage, and batches are packed as they will be. How much more than its tensors a process takes is measured on a CPU
(`bench/memory.py` prints estimates against peaks); on a GPU the estimate is of what is allocated there.
"""

import copy
import itertools
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import scoring

logger = logging.getLogger("run")

# What the C heap holds over live tensors, since a freed piece stays where the next one does not fit. Measured with
# SmolLM2-135M in batches of 400 to 2,100 tokens; inference 1.3 (long rows, bf16) to 2.2 (fp32), training 1.0 to 1.45.
INFERENCE, TRAINING = 1.9, 1.25
PROGRAM = 30e6  # bytes of libraries that come in with loading and the first forward
TARGETS = ("q_proj", "v_proj"), ("c_attn", "query_key_value", "qkv_proj")  # as lora.py chooses them
CACHE = 192 * 2**20  # bytes of keys and values that generated answers may hold, or a quarter of the weights
FLAGS = {  # part of a run -> what lowers it
    "weights": ("load_bfloat16", "load_int8"),
    "activations": ("per_device_train_batch_size", "max_length", "gradient_checkpointing", "load_bfloat16"),
    "adapter": ("xgblora_ensemble", "load_bfloat16"),
    "optimizer": ("lora", "trainer zo", "load_bfloat16"),
}


class Shape(NamedTuple):
    """A model as far as memory goes: elements of all weights, each once; (out, in) of every matrix in its layers."""

    parameters: int
    vocabulary: int
    linear: dict[str, tuple[int, int]]
    heads: int = 0  # whose scores exist whole: none where a fused kernel does without

    def find(self, names: Sequence[str]) -> list[str]:
        return [name for name in self.linear if any(f".{name}".endswith(f".{wanted}") for wanted in names)]

    def widths(self) -> tuple[int, int, int, int, int, int]:
        """Layers; width of hidden states, of queries, of keys; of the MLP's inside, and of all that is made there
        before the activation: as much, or twice that where there is a gate."""
        layers = 1 + max(int(n) for name in self.linear for n in re.findall(r"\.(\d+)\.", name))
        named = self.find(TARGETS[0]) or self.find(TARGETS[1]) or list(self.linear)
        width = self.linear[named[0]][1]
        queries, keys = (next((self.linear[n][0] for n in self.find([p])), width) for p in ("q_proj", "k_proj"))
        inner = max(size[1] for size in self.linear.values())
        made = sum(out for out, _ in self.linear.values() if out >= inner and out % inner == 0) // layers
        return layers, width, queries, keys, inner, made


class Pack(NamedTuple):
    """Rows of tokens, places where logits are computed, tokens that a cache holds in front of every row."""

    rows: int
    length: int
    reads: int
    cached: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes. `process` is there already, `loading` a file of another dtype, mapped while it is read."""

    weights: float
    activations: float
    adapter: float
    optimizer: float
    process: float
    loading: float = 0.0
    free: float = math.inf  # now, with what the process has

    @property
    def needed(self) -> float:
        return self.process + self.weights + self.activations + self.adapter + self.optimizer

    @property
    def total(self) -> float:
        """The peak: it counts the pages of a mapped file, which the system could drop."""
        return max(self.needed, self.process + self.weights + self.loading)

    def __str__(self):
        parts = ", ".join(f"{name} {getattr(self, name) / 1e6:,.0f}" for name in FLAGS)
        parts += f", program {self.process / 1e6:,.0f}" if self.process else ""
        parts += f"; while loading {self.loading / 1e6:,.0f} more than the weights" if self.total > self.needed else ""
        return f"memory: about {self.total / 1e6:,.0f} MB ({parts}) of {self.free / 1e6:,.0f} MB free"

    def warning(self, args) -> str | None:
        """What to lower, where more is needed than there is."""
        if self.needed <= self.free:
            return None
        part = max(FLAGS, key=lambda name: getattr(self, name))
        flags = " or ".join(f"--{flag}" for flag in FLAGS[part] if helps(flag, args))
        return (
            f"this run needs about {self.needed / 1e6:,.0f} MB, but {self.free / 1e6:,.0f} MB are free; most of it "
            f"({part}, {getattr(self, part) / 1e6:,.0f} MB) " + (f"gets less with {flags}" if flags else "is the model")
        )


def helps(flag: str, args) -> bool:
    """Whether a flag exists, means something to this run and is not taken yet."""
    if flag == "load_bfloat16":
        return args.dtype.itemsize > 2
    if flag == "per_device_train_batch_size":
        return args.trainer != "none" and args.per_device_train_batch_size > 1
    if flag in ("lora", "trainer zo", "gradient_checkpointing"):
        return args.trainer == "regular" and not getattr(args, flag, False)
    return flag == "max_length" or getattr(args, flag, True) is False


def shape(config, trust: bool = False) -> Shape:
    """Of a model that is built without storage: 0.1 s, and no random numbers are drawn."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust)
    linear = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name):
            out, into = module.weight.shape
            linear[name] = (into, out) if isinstance(module, Conv1D) else (out, into)
    heads = config.get_text_config().num_attention_heads if model.config._attn_implementation == "eager" else 0
    return Shape(sum(p.numel() for p in model.parameters()), len(model.get_output_embeddings().weight), linear, heads)


def gguf_shape(sizes: dict[str, tuple[int, ...]]) -> Shape:
    """From the sizes of the tensors in a `.gguf` file."""
    linear = {}
    for name, size in sizes.items():
        if len(size) == 2 and name.startswith("blk."):
            linear[re.sub(r"attn_([qkv])\.weight$", r"\1_proj", name)] = size
    return Shape(sum(map(math.prod, sizes.values())), sizes["token_embd.weight"][0], linear)


def training_pack(examples: Sequence[scoring.Example], batch: int, steps: int) -> Pack:
    """The largest of as many batches as a run takes, drawn as it draws them (from another seed)."""
    lengths = torch.tensor([float(len(x.encodings[0])) for x in examples])
    generator, best = torch.Generator().manual_seed(0), (-1.0, [])
    for _ in range(min(10, math.ceil(steps * batch / len(examples)))):
        for some in torch.randperm(len(examples), generator=generator).split(batch)[:steps]:
            best = max(best, (float(lengths[some].sum()), some.tolist()))
    packed = scoring.pack([examples[i] for i in best[1]])
    return Pack(*packed["input_ids"].shape, len(packed["read_row"]))


def evaluation_packs(examples: Sequence[scoring.Example]) -> list[Pack]:
    """Of the longest examples, which have most tokens, and of the shortest, which have most places to read."""
    start, found = scoring.shared_beginning(examples), []
    ordered = sorted(examples, key=lambda x: -len(x.encodings[0]))
    used = itertools.accumulate(len(x.encodings[0]) - start for x in ordered)
    enough = next((n for n, tokens in enumerate(used, 1) if tokens > 2 * scoring.TOKENS), len(ordered))
    for some in (ordered[:enough], ordered[-scoring.READS :]):
        group = next(scoring.batches(scoring.trees(some, start=start), scoring.TOKENS, scoring.READS))
        packed = scoring.layout(some, group)
        found.append(Pack(*packed["input_ids"].shape, len(packed["read_row"]), start))
    return found


def inference(model: Shape, p: Pack, size: int, copies: int = 1) -> float:
    """What a forward without back-propagation holds where it is widest: in a layer, or at the logits."""
    _, width, queries, keys, inner, _ = model.widths()
    rows = p.rows * copies
    mlp = rows * p.length * (3 * inner + 4 * width)  # gate, up and their product; residual, norm, output
    seen = rows * (p.cached + p.length) * 2 * (queries + keys * (p.cached > 0))  # keys and values, for all heads
    attention = rows * p.length * (4 * queries + 2 * width) + seen
    scores = rows * p.length * (p.cached + p.length) * (1 + 2 * model.heads)  # the mask, and eager attention's own
    logits = p.reads * copies * model.vocabulary * (8 if size == 4 else size + 8)  # with logsumexp's, in fp32
    return max(size * max(mlp, attention), logits) + size * scores


def kept(model: Shape, p: Pack, size: int, full: bool, checkpointing: bool) -> float:
    """What back-propagation keeps of a forward: what the derivative of each operation asks for."""
    layers, width, queries, _, inner, made = model.widths()
    token = 4 * queries * size + 2 * width * 4  # queries, keys, values, output; inputs of two norms, in fp32
    if full:  # inputs of all matrices and norms too
        token += (2 * made + queries + 4 * width) * size
    else:  # the activation and what it multiplies; x of the adapters, in fp32, and once for each that casts it
        token += (2 * made - inner) * size + width * 4 * (1 if size == 4 else 2)
    tokens = p.rows * p.length
    scores = p.rows * p.length**2 * size * 2 * model.heads
    layer = tokens * token + scores
    whole = tokens * width * size * layers + layer if checkpointing else layers * layer
    return whole + p.reads * model.vocabulary * (size + 12) + p.rows * p.length**2 * size


def generating(model: Shape, examples: Sequence[scoring.Example], new: int, size: int) -> float:
    """Keys and values of a batch of answers, and the forward over its prompts (see generation.py)."""
    layers, _, _, keys, _, _ = model.widths()
    token, longest = 2 * keys * layers * size, max(len(x.encodings[0]) for x in examples) + new
    rows = max(1, min(len(examples), int(max(CACHE, model.parameters * size / 4) / token / longest)))
    return rows * longest * token + inference(model, Pack(rows, longest, rows), size)


def estimate(args, model: Shape, trained, evaluated, copies: Callable[[int], int], file: int, new: int = 0) -> Estimate:
    """Of a run with these choices on these examples. `copies(tokens)`: points that one forward of a training batch of
    so many tokens serves; `file`: bytes an element in the file; `new`: tokens of generated answers, where they are."""
    cpu, regular, adapters = args.device.type == "cpu", args.trainer == "regular", args.mode != "ft"
    packed = 1 if getattr(args, "load_int8", False) else 0.5 if getattr(args, "load_int4", False) else 0
    size = 2 if packed else args.dtype.itemsize
    weights = float(model.parameters * size)
    if packed:  # with a scale in fp32 for each row, or for each 64 elements
        scales = 4 / 64 if packed < 1 else 0
        weights += sum(o * i * (packed + scales - size) + 4 * o * (packed == 1) for o, i in model.linear.values())

    wanted = [[word.strip() for word in args.lora_targets.split(",")]] if args.lora_targets else TARGETS
    targets = [model.linear[name] for name in next(filter(None, map(model.find, wanted)), [])] if adapters else []
    elements = sum((out + into) * max(args.ranks or [args.lora_r]) for out, into in targets)
    adapter = 4.0 * elements
    if args.xgblora and not args.xgblora_ensemble and cpu:  # W0 and the sum of the chain, on the host
        adapter += sum(out * into * (size + 4) for out, into in targets)

    optimizer = 0.0
    if regular:  # a gradient and Adam's two moments, in the dtype of what is trained
        states = 1 if args.optim.value.startswith(("sgd", "adafactor")) else 3
        optimizer = float(states * (4 * elements if adapters else size * model.parameters))
    elif adapters:  # the flat fp32 master, z, and the moments
        optimizer = 4.0 * elements * (1 + args.zo_queries + {"momentum": 1, "adamw": 2}.get(args.zo_optim, 0))

    held = [0.0]
    packs = [] if new else evaluation_packs(evaluated) if evaluated else []
    forward, backward = (INFERENCE, TRAINING) if cpu else (1, 1)
    if new and evaluated:
        held.append(forward * generating(model, evaluated, new, size))
    held += [forward * inference(model, p, size) for p in packs]
    if trained:
        batch, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(trained) / batch)
        p = training_pack(trained, batch, steps * (accumulated if args.max_steps > 0 else 1))
        if regular:
            held.append(backward * kept(model, p, size, not adapters, args.gradient_checkpointing))
        else:
            held.append(forward * inference(model, p, size, copies(p.rows * p.length)))
    store = sum(len(x.encodings[0]) for x in trained) * model.widths()[1] * size if args.zo_cache_activations else 0
    resident = psutil.Process().memory_info().rss
    return Estimate(
        weights, max(held) + store * cpu, adapter, optimizer,
        process=(resident + PROGRAM) * cpu,
        loading=model.parameters * file if cpu and (packed or file != size) else 0.0,
        free=psutil.virtual_memory().available + resident if cpu else torch.cuda.mem_get_info(args.device)[0],
    )  # fmt: skip


def foresee(args, read: Callable[[], Shape], *others, **more) -> Estimate | None:
    """The estimate, logged, with a warning where the machine has less; None where something is not as expected."""
    try:
        found = estimate(args, read(), *others, **more)
        logger.info(found)
        if warning := found.warning(args):
            logger.warning(warning)
        return found
    except Exception as error:  # it is only a service
        logger.debug("no estimate of memory: %r", error)
        return None
