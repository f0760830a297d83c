"""What memory depends on, known before a model is loaded: the sizes of its matrices, and of the largest batches."""

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

FUSED = sorted({name for names in TARGETS_BY_MODEL_TYPE.values() for name in names})


class Widths(NamedTuple):
    """Layers; width of hidden states, queries and keys; of the MLP's inside, and of all that is `made` there before the
    activation: as much, or twice that where there is a gate."""

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    made: int


class Shape(NamedTuple):
    """A model as far as memory goes: elements of all weights, each once; (out, in) of every matrix in its layers."""

    parameters: int
    vocabulary: int
    linear: dict[str, tuple[int, int]]
    heads: int = 0  # whose scores exist whole: none where a fused kernel does without

    def targets(self, names: Sequence[str] | None = None) -> list[str]:
        """The matrices that LoRA adapts, as lora.py chooses them."""
        return names_ending_in(self.linear, names or DEFAULT_TARGETS) or names_ending_in(self.linear, names or FUSED)

    def widths(self) -> Widths:
        layers = 1 + max(int(n) for name in self.linear for n in re.findall(r"\.(\d+)\.", name))
        width = self.linear[(self.targets() or list(self.linear))[0]][1]
        queries, keys = (
            next((self.linear[n][0] for n in names_ending_in(self.linear, [p])), width) for p in ("q_proj", "k_proj")
        )
        inner = max(size[1] for size in self.linear.values())
        made = sum(out for out, _ in self.linear.values() if out >= inner and out % inner == 0) // layers
        return Widths(layers, width, queries, keys, inner, made)

    def cached(self) -> int:
        """Elements of the keys and values of a token, in all layers."""
        w = self.widths()
        return 2 * w.layers * w.keys


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


def gguf_shape(path: str) -> Shape:
    """From the header of a `.gguf` file, whose names are llama.cpp's."""
    linear, sizes = {}, {info.name: tuple(info.shape) for info in GgufHeader.from_file(path).tensors}
    for name, size in sizes.items():
        if len(size) == 2 and name.startswith("blk."):
            linear[re.sub(r"attn_([qkv])\.weight$", r"\1_proj", name)] = size
    return Shape(sum(map(math.prod, sizes.values())), sizes["token_embd.weight"][0], linear)


class Pack(NamedTuple):
    """Rows of tokens, places where logits are computed, tokens that a cache holds in front of every row."""

    rows: int
    length: int
    reads: int
    cached: int = 0


def training_pack(examples: Sequence[packing.Example], batch: int, steps: int) -> Pack:
    """The largest of as many batches as a run takes, drawn as it draws them (from another seed)."""
    lengths = torch.tensor([float(len(x.encodings[0])) for x in examples])
    generator, best = torch.Generator().manual_seed(0), (-1.0, [])
    for _ in range(min(10, math.ceil(steps * batch / len(examples)))):
        for some in torch.randperm(len(examples), generator=generator).split(batch)[:steps]:
            best = max(best, (float(lengths[some].sum()), some.tolist()))
    packed = packing.pack([examples[i] for i in best[1]])
    return Pack(*packed["input_ids"].shape, len(packed["read_row"]))


def evaluation_packs(examples: Sequence[packing.Example]) -> list[Pack]:
    """Of the longest examples, which have most tokens, and of the shortest, which have most places to read."""
    start, found = packing.shared_prefix_len(examples), []
    ordered = sorted(examples, key=lambda x: -len(x.encodings[0]))
    used = itertools.accumulate(len(x.encodings[0]) - start for x in ordered)
    enough = next((n for n, tokens in enumerate(used, 1) if tokens > 2 * packing.MAX_TOKENS), len(ordered))
    for some in (ordered[:enough], ordered[-packing.MAX_READS :]):
        group = next(packing.batch_trees(packing.build_trees(some, start=start), packing.MAX_TOKENS, packing.MAX_READS))
        packed = packing.to_tensors(some, group)
        found.append(Pack(*packed["input_ids"].shape, len(packed["read_row"]), start))
    return found


def answers_pack(model: Shape, examples: Sequence[packing.Example], new: int, size: int) -> Pack:
    """The largest batch of generated answers of `new` tokens, as generation.py chooses it."""
    longest = max(len(x.encodings[0]) for x in examples) + new
    rows = int(max(MAX_CACHE_BYTES, model.parameters * size / 4) / (model.cached() * size * longest))
    rows = max(1, min(len(examples), rows))
    return Pack(rows, longest, rows)
