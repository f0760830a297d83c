"""Sizes of a model's matrices and of the largest batches, known before the model is loaded."""

import copy
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf.reader import GgufHeader
from transformers.pytorch_utils import Conv1D

from boosters.targets import DEFAULT_TARGETS, TARGETS_BY_MODEL_TYPE, names_ending_in
from scoring import packing
from scoring.generate import MAX_CACHE_BYTES

FUSED_TARGETS = sorted({name for names in TARGETS_BY_MODEL_TYPE.values() for name in names})


class Widths(NamedTuple):
    """The number of decoder layers, and widths inside one.

    Attributes:
        layers: number of decoder layers.
        hidden_size: width of the hidden states.
        queries: width of the queries of all heads.
        keys: width of the keys of all heads; the values have the same width.
        intermediate_size: width of the MLP behind its activation function.
        mlp_outputs: width of all that the MLP's first matrices put out: `intermediate_size`,
            or twice that with a gate.
    """

    layers: int
    hidden_size: int
    queries: int
    keys: int
    intermediate_size: int
    mlp_outputs: int


class ModelShape(NamedTuple):
    """The sizes of a model.

    Attributes:
        parameters: elements of all weights, each counted once.
        vocabulary: rows of the head.
        linear: (out, in) of every matrix in the decoder layers, by name.
        score_heads: attention heads whose scores exist as tensors: 0 where a fused kernel does without.
    """

    parameters: int
    vocabulary: int
    linear: dict[str, tuple[int, int]]
    score_heads: int = 0

    def adapted_matrices(self, names: Sequence[str] | None = None) -> list[str]:
        """Return the names of the matrices that LoRA adapts, by the rule of boosters/targets.py.

        Args:
            names: names or last parts of names; without them the default targets.
        """
        matrices = names_ending_in(self.linear, names or DEFAULT_TARGETS)
        return matrices or names_ending_in(self.linear, names or FUSED_TARGETS)

    def widths(self) -> Widths:
        """Return the widths, as the matrices of the decoder layers have them."""
        layers = 1 + max(int(n) for name in self.linear for n in re.findall(r"\.(\d+)\.", name))
        adapted = self.adapted_matrices() or list(self.linear)
        hidden_size = self.linear[adapted[0]][1]
        intermediate_size = max(into for _, into in self.linear.values())
        mlp_outputs = sum(
            out
            for out, _ in self.linear.values()
            if out >= intermediate_size and out % intermediate_size == 0
        )
        queries = self._rows_of("q_proj", hidden_size)
        keys = self._rows_of("k_proj", hidden_size)
        return Widths(layers, hidden_size, queries, keys, intermediate_size, mlp_outputs // layers)

    def _rows_of(self, name: str, default: int) -> int:
        """Return the rows of the first matrix whose name ends so, `default` where there is none."""
        matches = names_ending_in(self.linear, [name])
        return self.linear[matches[0]][0] if matches else default

    def cache_per_token(self) -> int:
        """Return the elements of the keys and values of one token, in all layers."""
        widths = self.widths()
        return 2 * widths.layers * widths.keys


def read_model_shape(config, trust: bool = False) -> ModelShape:
    """Return the shape of a model that is built without storage: it takes 0.1 s and draws no random numbers.

    Args:
        config: the configuration of the model, which is not changed.
        trust: run code that comes with the model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust)
    linear = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name):
            rows, columns = module.weight.shape
            linear[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    eager = model.config._attn_implementation == "eager"
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=len(model.get_output_embeddings().weight),
        linear=linear,
        score_heads=config.get_text_config().num_attention_heads if eager else 0,
    )


def read_gguf_shape(path: str) -> ModelShape:
    """Return the shape of a model from the header of its `.gguf` file, whose names are llama.cpp's."""
    sizes = {tensor.name: tuple(tensor.shape) for tensor in GgufHeader.from_file(path).tensors}
    linear = {}
    for name, size in sizes.items():
        if len(size) == 2 and name.startswith("blk."):
            linear[re.sub(r"attn_([qkv])\.weight$", r"\1_proj", name)] = size
    return ModelShape(sum(map(math.prod, sizes.values())), sizes["token_embd.weight"][0], linear)


class BatchShape(NamedTuple):
    """The sizes of a packed batch.

    Attributes:
        rows: rows of the batch.
        length: tokens of a row.
        reads: positions whose logits are computed.
        num_cached: tokens in front of every row whose keys and values a cache holds.
    """

    rows: int
    length: int
    reads: int
    num_cached: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def largest_training_batch(examples: Sequence[packing.Example], batch_size: int, steps: int) -> BatchShape:
    """Return the shape of the largest of as many batches as a run takes.

    The batches are drawn as the run draws them, from another seed, and from ten epochs at most.

    Args:
        examples: the training rows.
        batch_size: rows of a batch.
        steps: batches of the run.
    """
    lengths = torch.tensor([float(len(x.encodings[0])) for x in examples])
    generator = torch.Generator().manual_seed(0)
    largest = (-1.0, [])  # tokens, and indices of the examples
    for _ in range(min(10, math.ceil(steps * batch_size / len(examples)))):
        order = torch.randperm(len(examples), generator=generator)
        for indices in order.split(batch_size)[:steps]:
            largest = max(largest, (float(lengths[indices].sum()), indices.tolist()))
    packed = packing.pack([examples[i] for i in largest[1]])
    return BatchShape(*packed["input_ids"].shape, len(packed["read_row"]))


def largest_evaluation_batches(examples: Sequence[packing.Example]) -> list[BatchShape]:
    """Return the shapes of two batches: of the longest examples, and of the shortest.

    The longest examples make the batch with the most tokens, the shortest the one with the most logits.
    """
    prefix_len = packing.shared_prefix_len(examples)
    by_length = sorted(examples, key=lambda x: -len(x.encodings[0]))
    tokens_so_far = itertools.accumulate(len(x.encodings[0]) - prefix_len for x in by_length)
    full_counts = (count for count, tokens in enumerate(tokens_so_far, 1) if tokens > 2 * packing.MAX_TOKENS)
    longest = by_length[: next(full_counts, len(by_length))]
    shortest = by_length[-packing.MAX_READS :]
    shapes = []
    for group in (longest, shortest):
        trees = packing.build_trees(group, start=prefix_len)
        batch = next(packing.batch_trees(trees, packing.MAX_TOKENS, packing.MAX_READS))
        packed = packing.to_tensors(group, batch)
        shapes.append(BatchShape(*packed["input_ids"].shape, len(packed["read_row"]), prefix_len))
    return shapes


def largest_generation_batch(
    model: ModelShape, examples: Sequence[packing.Example], max_new_tokens: int, itemsize: int
) -> BatchShape:
    """Return the shape of the largest batch of generated answers, by the rule of scoring/generate.py.

    Args:
        model: the shape of the model.
        examples: the prompts.
        max_new_tokens: tokens of an answer.
        itemsize: bytes an element of weights and cache.
    """
    length = max(len(x.encodings[0]) for x in examples) + max_new_tokens
    budget = max(MAX_CACHE_BYTES, model.parameters * itemsize / 4)
    rows = int(budget / (model.cache_per_token() * itemsize * length))
    rows = max(1, min(len(examples), rows))
    return BatchShape(rows, length, rows)
