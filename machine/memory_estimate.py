"""How much memory a run will take, said before the model is loaded, and what to lower where the machine has less.

A run holds the weights, what a forward holds at its widest point (back-propagation: what it keeps of all layers), the
adapter with its copies, and gradients with the optimizer's state. The shapes are exact: the model is built without
storage, and batches are packed as they will be. How much more than its tensors a process takes is measured on a CPU
(`bench/memory.py` prints estimates against peaks); on a GPU the estimate is of what is allocated there.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from distributed import collectives
from machine.model_shape import Pack, Shape, answers_pack, evaluation_packs, gguf_shape, shape, training_pack

logger = logging.getLogger("run")

# What the C heap holds over live tensors, since a freed piece stays where the next one does not fit. Measured with
# SmolLM2-135M in batches of 400 to 2,100 tokens; inference 1.3 (long rows, bf16) to 2.2 (fp32), training 1.0 to 1.45.
INFERENCE, TRAINING = 1.9, 1.25
PROGRAM = 30e6  # bytes of libraries that come in with loading and the first forward
FLAGS = {  # part of a run -> what lowers it
    "weights": ("load_bfloat16", "load_int8"),
    "activations": ("per_device_train_batch_size", "max_length", "gradient_checkpointing", "load_bfloat16"),
    "adapter": ("xgblora_ensemble", "load_bfloat16"),
    "optimizer": ("lora", "trainer zo", "load_bfloat16"),
}


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
        if self.needed <= self.free or args.device_map:  # which spreads the model over what there is
            return None
        part = max(FLAGS, key=lambda name: getattr(self, name))
        flags = " or ".join(f"--{flag}" for flag in FLAGS[part] if helps(flag, args))
        most, sizes = getattr(self, part), f"{self.needed / 1e6:,.0f} MB, but {self.free / 1e6:,.0f} MB are free"
        said = f"this run needs about {sizes}; most of it ({part}, {most / 1e6:,.0f} MB) "
        return said + (f"gets less with {flags}" if flags else "is the model")


def helps(flag: str, args) -> bool:
    """Whether a flag exists, means something to this run and is not taken yet."""
    regular = args.trainer == "regular"
    return {
        "load_bfloat16": args.dtype.itemsize > 2,
        "load_int8": not args.load_int8
        and (args.trainer == "none" or args.mode in ("lora", "prefix") or args.xgblora_ensemble),
        "per_device_train_batch_size": args.trainer != "none" and args.per_device_train_batch_size > 1,
        "max_length": True,
        "gradient_checkpointing": regular and not args.gradient_checkpointing,
        "lora": regular and args.mode == "ft",
        "trainer zo": regular,
        "xgblora_ensemble": args.mode == "xgblora" and not args.xgblora_ensemble,
    }[flag]


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
    tokens, mask = p.rows * p.length, p.rows * p.length**2 * size
    layer = tokens * token + mask * 2 * model.heads
    whole = tokens * width * size * layers + layer if checkpointing else layers * layer
    return whole + mask + p.reads * model.vocabulary * (size + 12)


def activations(args, model: Shape, learned, evaluated, copies: Callable[[int], int], new: int) -> float:
    """The most that a forward of the run, or one with back-propagation, holds, and the store of activations."""
    cpu, regular, size = args.device.type == "cpu", args.trainer == "regular", args.dtype.itemsize
    forward, backward = (INFERENCE, TRAINING) if cpu else (1, 1)
    held = [0.0]
    if evaluated and new:
        p = answers_pack(model, evaluated, new, size)
        held.append(forward * (p.rows * p.length * model.cached() * size + inference(model, p, size)))
    elif evaluated:
        held += [forward * inference(model, p, size) for p in evaluation_packs(evaluated)]
    if learned:
        batch = args.per_device_train_batch_size
        steps = args.max_steps * args.gradient_accumulation_steps
        if steps <= 0:
            steps = math.ceil(args.num_train_epochs * len(learned) / batch)
        p = training_pack(learned, batch, steps)
        if regular:
            held.append(backward * kept(model, p, size, args.mode == "ft", args.gradient_checkpointing))
        else:
            held.append(forward * inference(model, p, size, copies(p.rows * p.length)))
    cached = args.zo_cache_activations and cpu
    return max(held) + (sum(len(x.encodings[0]) for x in learned) * model.widths().hidden * size if cached else 0)


def estimate(args, model: Shape, learned, evaluated, copies: Callable[[int], int], file: int, new: int = 0) -> Estimate:
    """Of a run with these choices on these examples. `copies(tokens)`: points that one forward of a training batch of
    so many tokens serves; `file`: bytes an element in the file; `new`: tokens of generated answers, where they are."""
    cpu, size = args.device.type == "cpu", args.dtype.itemsize
    # bitsandbytes: a byte an element and a scale in fp32 a row; half a byte (NF4) and a quantised scale for 64 elements
    packed = 1 if args.load_int8 else 0.5 + 1 / 64 if args.load_int4 else 0
    weights = float(model.parameters * size)
    if packed:
        weights += sum(o * i * (packed - size) + 4 * o * (packed == 1) for o, i in model.linear.values())

    targets = [model.linear[name] for name in model.targets(args.targets)]
    lora = sum((out + into) * max(args.ranks or [args.lora_r]) for out, into in targets)
    prefix = model.cached() * args.num_prefix
    adapter = 4.0 * {"lora": lora, "xgblora": lora, "prefix": prefix}.get(args.mode, 0)
    own = {"ft": model.parameters, "head": model.vocabulary * model.widths().hidden}  # elements of the model's own
    trained = own.get(args.mode, 0) * size + adapter
    if args.trainer == "regular":  # a gradient and Adam's two moments, in the dtype of what is trained
        optimizer = trained * (1 if args.optim.value.startswith(("sgd", "adafactor")) else 3)
    else:  # zo, of adapters: the flat fp32 master, z, and the moments
        states = 1 + args.zo_queries + {"momentum": 1, "adamw": 2}.get(args.zo_optim, 0)
        optimizer = adapter * states if args.trainer == "zo" else 0.0
    whole = weights
    if args.sharded:  # a part of all; whole for a while what lies outside the layers, with its gradient where trained
        parts, outside = collectives.env_world_size(), model.parameters - sum(o * i for o, i in model.linear.values())
        frozen = args.mode in ("lora", "xgblora", "prefix")
        weights = weights / parts + outside * size * (1 if frozen else 2)
        optimizer = optimizer if frozen else optimizer / parts
    if args.mode == "xgblora" and not args.xgblora_ensemble and cpu:  # W0 and the sum of the chain, on the host
        adapter += sum(out * into * (size + 4) for out, into in targets)

    resident = psutil.Process().memory_info().rss
    return Estimate(
        weights, activations(args, model, learned, evaluated, copies, new), adapter, optimizer,
        process=(resident + PROGRAM) * cpu,
        loading=whole - weights + (model.parameters * file if packed or file != size else 0.0) if cpu else 0.0,
        free=psutil.virtual_memory().available + resident if cpu else torch.cuda.mem_get_info(args.device)[0],
    )  # fmt: skip


def estimate_memory(args, config, learned, evaluated, copies: Callable[[int], int], new: int = 0) -> Estimate | None:
    """The estimate, logged, with a warning where the machine has less; None where something is not as expected."""
    try:
        model = shape(config, args.trust_remote_code) if config else gguf_shape(args.model_name)
        file = getattr(config, "dtype", None) or torch.float32
        found = estimate(args, model, learned, evaluated, copies, file.itemsize, new)
        logger.info(found)
        if warning := found.warning(args):
            logger.warning(warning)
        return found
    except Exception as error:  # it is only a service
        logger.debug("no estimate of memory: %r", error)
        return None
