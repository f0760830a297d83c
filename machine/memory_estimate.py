"""The estimate of a run's memory, before the model is loaded, and the flags that lower it.

A run holds the weights, the tensors of a forward where they take most (under back-propagation: those that it
saves in all layers), the adapter with its copies, and gradients with the optimizer's state. The shapes are
exact: the model is built without storage, and batches are packed as the run packs them. On a CPU a process
takes more than its tensors; the factors below were measured (bench/RESULTS.md has estimates beside peaks). On
a GPU the estimate is of the memory that is allocated there.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch

from distributed import collectives
from machine.model_shape import (
    BatchShape,
    ModelShape,
    largest_evaluation_batches,
    largest_generation_batch,
    largest_training_batch,
    read_gguf_shape,
    read_model_shape,
)
from scoring.packing import Example

logger = logging.getLogger("run")

# Size of the C heap over that of live tensors, since a freed piece stays where the next one does not fit.
# Measured with SmolLM2-135M in batches of 400 to 2,100 tokens: inference 1.3 (long rows, bf16) to 2.2 (fp32),
# training 1.0 to 1.45.
HEAP_FACTOR_INFERENCE = 1.9
HEAP_FACTOR_TRAINING = 1.25
LIBRARY_BYTES = 30e6  # of libraries that come in with loading and the first forward
FLAGS_BY_PART = {  # part of a run's memory -> the flags that lower it
    "weights": ("load_bfloat16", "load_int8"),
    "activations": ("per_device_train_batch_size", "max_length", "gradient_checkpointing", "load_bfloat16"),
    "adapter": ("xgblora_ensemble", "load_bfloat16"),
    "optimizer": ("lora", "trainer zo", "load_bfloat16"),
}


def megabytes(num_bytes: float) -> str:
    """Return a number of bytes in MB, as messages show it."""
    return f"{num_bytes / 1e6:,.0f}"


@dataclass(frozen=True)
class Estimate:
    """The memory of a run, in bytes.

    Attributes:
        weights: of the model.
        activations: the most that a forward, or a forward with back-propagation, holds.
        adapter: of adapter or prefix, with the host's copies of boosting.
        optimizer: of gradients and the optimizer's state.
        process: of this process before the model is loaded.
        loading: beyond the weights while they are read: a file of another dtype is mapped meanwhile.
        free_memory: free memory, with that of this process.
    """

    weights: float
    activations: float
    adapter: float
    optimizer: float
    process: float
    loading: float = 0.0
    free_memory: float = math.inf

    @property
    def needed(self) -> float:
        """The memory that the run can't do without."""
        return self.process + self.weights + self.activations + self.adapter + self.optimizer

    @property
    def total(self) -> float:
        """The peak: it counts the pages of a mapped file, which the system could drop."""
        return max(self.needed, self.process + self.weights + self.loading)

    def __str__(self):
        parts = ", ".join(f"{name} {megabytes(getattr(self, name))}" for name in FLAGS_BY_PART)
        if self.process:
            parts += f", program {megabytes(self.process)}"
        if self.total > self.needed:
            parts += f"; while loading {megabytes(self.loading)} more than the weights"
        return f"memory: about {megabytes(self.total)} MB ({parts}) of {megabytes(self.free_memory)} MB free"

    def warning(self, args) -> str | None:
        """Return a line with the flags that lower the largest part, None where the memory is enough.

        Args:
            args: the arguments of the run; with `device_map` there is no warning, since the model is spread
                over the memory that there is.
        """
        if self.needed <= self.free_memory or args.device_map:
            return None
        part = max(FLAGS_BY_PART, key=lambda name: getattr(self, name))
        flags = " or ".join(f"--{flag}" for flag in FLAGS_BY_PART[part] if flag_would_help(flag, args))
        advice = f"gets less with {flags}" if flags else "is the model"
        return (
            f"this run needs about {megabytes(self.needed)} MB, "
            f"but {megabytes(self.free_memory)} MB are free; "
            f"most of it ({part}, {megabytes(getattr(self, part))} MB) {advice}"
        )


def flag_would_help(flag: str, args) -> bool:
    """Return whether a flag of FLAGS_BY_PART has an effect on this run and has not been given yet."""
    regular = args.trainer == "regular"
    adapters_only = args.trainer == "none" or args.mode in ("lora", "prefix") or args.xgblora_ensemble
    return {
        "load_bfloat16": args.dtype.itemsize > 2,
        "load_int8": not args.load_int8 and adapters_only,
        "per_device_train_batch_size": args.trainer != "none" and args.per_device_train_batch_size > 1,
        "max_length": True,
        "gradient_checkpointing": regular and not args.gradient_checkpointing,
        "lora": regular and args.mode == "ft",
        "trainer zo": regular,
        "xgblora_ensemble": args.mode == "xgblora" and not args.xgblora_ensemble,
    }[flag]


# ---- activations ----


def forward_bytes(model: ModelShape, batch: BatchShape, itemsize: int, copies: int = 1) -> float:
    """Return the most bytes that a forward without back-propagation holds: in a layer, or at the logits.

    Args:
        model: the shape of the model.
        batch: the shape of the batch.
        itemsize: bytes an element of the activations.
        copies: how often the rows of the batch are repeated in one forward.
    """
    widths = model.widths()
    rows = batch.rows * copies
    tokens = rows * batch.length
    context = batch.num_cached + batch.length
    # Gate, up and their product; residual, norm, output.
    mlp = tokens * (3 * widths.intermediate_size + 4 * widths.hidden_size)
    # Keys and values of the context, repeated for all query heads, and as the cache holds them.
    keys_and_values = rows * context * 2 * (widths.queries + widths.keys * (batch.num_cached > 0))
    attention = tokens * (4 * widths.queries + 2 * widths.hidden_size) + keys_and_values
    # The mask; eager attention has scores and probabilities of each head.
    scores = tokens * context * (1 + 2 * model.score_heads)
    # Logits, and their copy for logsumexp, in fp32.
    logits = batch.reads * copies * model.vocabulary * (8 if itemsize == 4 else itemsize + 8)
    return max(itemsize * max(mlp, attention), logits) + itemsize * scores


def saved_for_backward(
    model: ModelShape, batch: BatchShape, itemsize: int, all_weights: bool, checkpointing: bool
) -> float:  # fmt: skip
    """Return the bytes that back-propagation saves in a forward: what the derivative of each operation needs.

    Args:
        model: the shape of the model.
        batch: the shape of the batch.
        itemsize: bytes an element of the activations.
        all_weights: whether all weights are trained, not adapters alone.
        checkpointing: whether the layers' activations are computed twice instead.
    """
    widths = model.widths()
    # Queries, keys, values, output; inputs of two norms, in fp32.
    per_token = 4 * widths.queries * itemsize + 2 * widths.hidden_size * 4
    if all_weights:  # the inputs of all matrices and norms too
        per_token += (2 * widths.mlp_outputs + widths.queries + 4 * widths.hidden_size) * itemsize
    else:  # the activation and its factor; input of the adapters, in fp32, for each that casts it
        per_token += (2 * widths.mlp_outputs - widths.intermediate_size) * itemsize
        per_token += widths.hidden_size * 4 * (1 if itemsize == 4 else 2)
    mask = batch.rows * batch.length**2 * itemsize
    layer = batch.tokens * per_token + mask * 2 * model.score_heads
    layers = widths.layers * layer
    if checkpointing:
        layers = batch.tokens * widths.hidden_size * itemsize * widths.layers + layer
    return layers + mask + batch.reads * model.vocabulary * (itemsize + 12)


def evaluation_bytes(
    model: ModelShape, examples: Sequence[Example], itemsize: int, max_new_tokens: int
) -> float:  # fmt: skip
    """Return the bytes of the largest forward of an evaluation, with the cache of generated answers.

    Args:
        max_new_tokens: tokens of an answer; 0 where options are scored.
    """
    if not max_new_tokens:
        return max(forward_bytes(model, batch, itemsize) for batch in largest_evaluation_batches(examples))
    batch = largest_generation_batch(model, examples, max_new_tokens, itemsize)
    return batch.tokens * model.cache_per_token() * itemsize + forward_bytes(model, batch, itemsize)


def activation_bytes(
    args, model: ModelShape, train_examples: Sequence[Example], eval_examples: Sequence[Example],
    points_per_forward: Callable[[int], int] | None, max_new_tokens: int,
) -> float:  # fmt: skip
    """Return the most bytes that a forward of the run holds, with those of back-propagation, and the cache.

    Args: see `estimate_run`.
    """
    on_cpu = args.device.type == "cpu"
    itemsize = args.dtype.itemsize
    inference_factor = HEAP_FACTOR_INFERENCE if on_cpu else 1
    training_factor = HEAP_FACTOR_TRAINING if on_cpu else 1
    peaks = [0.0]
    if eval_examples:
        peaks.append(inference_factor * evaluation_bytes(model, eval_examples, itemsize, max_new_tokens))
    if train_examples:
        batch_size = args.per_device_train_batch_size
        steps = args.max_steps * args.gradient_accumulation_steps
        if steps <= 0:
            steps = math.ceil(args.num_train_epochs * len(train_examples) / batch_size)
        batch = largest_training_batch(train_examples, batch_size, steps)
        if args.trainer == "regular":
            all_weights = args.mode == "ft"
            saved_bytes = saved_for_backward(model, batch, itemsize, all_weights, args.gradient_checkpointing)
            peaks.append(training_factor * saved_bytes)
        else:
            copies = points_per_forward(batch.tokens)
            peaks.append(inference_factor * forward_bytes(model, batch, itemsize, copies))
    cache = 0
    if args.zo_cache_activations and on_cpu:
        cache = sum(len(x.encodings[0]) for x in train_examples) * model.widths().hidden_size * itemsize
    return max(peaks) + cache


# ---- weights, adapters and optimizer ----


def weight_bytes(args, model: ModelShape) -> float:
    """Return the bytes of the model's weights, packed ones where they are quantised."""
    itemsize = args.dtype.itemsize
    weights = float(model.parameters * itemsize)
    if args.load_int8:  # bitsandbytes: a byte an element, and a scale in fp32 a row
        weights += sum(out * into * (1 - itemsize) + 4 * out for out, into in model.linear.values())
    elif args.load_int4:  # half a byte an element (NF4), and a quantised scale for 64 elements
        weights += sum(out * into * (0.5 + 1 / 64 - itemsize) for out, into in model.linear.values())
    return weights


def adapter_memory(args, model: ModelShape, targets: list[tuple[int, int]]) -> float:
    """Return the bytes of the trained adapter or prefix, in fp32; 0 in the other modes.

    Args:
        targets: (out, in) of the adapted matrices.
    """
    if args.mode == "prefix":
        return 4.0 * model.cache_per_token() * args.num_prefix
    if args.mode in ("lora", "xgblora"):
        rank = max(args.ranks or [args.lora_r])
        return 4.0 * sum((out + into) * rank for out, into in targets)
    return 0.0


def optimizer_bytes(args, model: ModelShape, adapter: float) -> float:
    """Return the bytes of gradients and the optimizer's state.

    Args:
        adapter: bytes of the trained adapter.
    """
    if args.trainer == "zo":  # of adapters: the flat fp32 master, z of each query, and the moments
        moments = {"momentum": 1, "adamw": 2}.get(args.zo_optim, 0)
        return adapter * (1 + args.zo_queries + moments)
    if args.trainer == "none":
        return 0.0
    head = model.vocabulary * model.widths().hidden_size
    elements = {"ft": model.parameters, "head": head}.get(args.mode, 0)
    trained = elements * args.dtype.itemsize + adapter
    # A gradient and Adam's two moments, in the dtype of the trained weights.
    return trained * (1 if args.optim.value.startswith(("sgd", "adafactor")) else 3)


class RankShare(NamedTuple):
    """Bytes of one rank where weights are divided among the ranks."""

    weights: float
    optimizer: float


def share_of_rank(args, model: ModelShape, weights: float, optimizer: float) -> RankShare:
    """Return the bytes of a rank under `--fsdp`: its part, and all of what lies outside the layers."""
    ranks = collectives.env_world_size()
    outside_layers = model.parameters - sum(out * into for out, into in model.linear.values())
    frozen = args.mode in ("lora", "xgblora", "prefix")
    tensors = 1 if frozen else 2  # a gradient for each weight that is trained
    gathered_bytes = outside_layers * args.dtype.itemsize * tensors
    return RankShare(weights / ranks + gathered_bytes, optimizer if frozen else optimizer / ranks)


def estimate_run(
    args, model: ModelShape, train_examples: Sequence[Example], eval_examples: Sequence[Example],
    points_per_forward: Callable[[int], int] | None, file_itemsize: int, max_new_tokens: int = 0,
) -> Estimate:  # fmt: skip
    """Return the memory of a run with these arguments on these examples.

    Args:
        args: the arguments of the run.
        model: the shape of the model.
        train_examples: the rows to learn from.
        eval_examples: the rows to evaluate on.
        points_per_forward: tokens of a training batch -> points that one forward of the batch serves.
        file_itemsize: bytes an element in the model's file.
        max_new_tokens: tokens of a generated answer; 0 where options are scored.
    """
    on_cpu = args.device.type == "cpu"
    itemsize = args.dtype.itemsize
    all_weights = weights = weight_bytes(args, model)
    targets = [model.linear[name] for name in model.adapted_matrices(args.targets)]
    adapter = adapter_memory(args, model, targets)
    optimizer = optimizer_bytes(args, model, adapter)
    if args.sharded:
        weights, optimizer = share_of_rank(args, model, weights, optimizer)
    if args.mode == "xgblora" and not args.xgblora_ensemble and on_cpu:  # W0 and the fp32 sum of the chain
        adapter += sum(out * into * (itemsize + 4) for out, into in targets)

    loading = 0.0
    if on_cpu:
        converted = args.load_int8 or args.load_int4 or file_itemsize != itemsize
        loading = all_weights - weights + (model.parameters * file_itemsize if converted else 0.0)
    resident = psutil.Process().memory_info().rss
    free_memory = (
        psutil.virtual_memory().available + resident if on_cpu else torch.cuda.mem_get_info(args.device)[0]
    )
    return Estimate(
        weights=weights,
        activations=activation_bytes(
            args, model, train_examples, eval_examples, points_per_forward, max_new_tokens
        ),
        adapter=adapter,
        optimizer=optimizer,
        process=(resident + LIBRARY_BYTES) * on_cpu,
        loading=loading,
        free_memory=free_memory,
    )  # fmt: skip


def estimate_memory(
    args, config, train_examples: Sequence[Example], eval_examples: Sequence[Example],
    points_per_forward: Callable[[int], int], max_new_tokens: int = 0,
) -> Estimate | None:  # fmt: skip
    """Return the estimate of a run and log it, with a warning where the machine has less memory.

    Args:
        args, train_examples, eval_examples, points_per_forward, max_new_tokens: see `estimate_run`.
        config: the configuration of the model, or None of a `.gguf` file.

    Returns:
        The estimate, or None where the model has a shape that this module does not know: an estimate never
        stops a run.
    """
    try:
        if config:
            model = read_model_shape(config, args.trust_remote_code)
            file_dtype = getattr(config, "dtype", None) or torch.float32
        else:
            model = read_gguf_shape(args.model_name)
            file_dtype = torch.float32
        examples = train_examples, eval_examples
        estimate = estimate_run(
            args, model, *examples, points_per_forward, file_dtype.itemsize, max_new_tokens
        )  # fmt: skip
        logger.info(estimate)
        if warning := estimate.warning(args):
            logger.warning(warning)
        return estimate
    except Exception as error:
        logger.debug("no estimate of memory: %r", error)
        return None
