"""Answers in the model's own words, for tasks without options: batched, left-padded, through `model.generate`.

What all prompts begin with (shared demonstrations) goes through the model once, into a key-value cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from prefix import trained_prefix
from scoring.logprobs import encode_shared_prefix
from scoring.packing import MAX_TOKENS, MIN_SHARED_TOKENS, common_prefix_len, split_by_prefix
from utils import input_device

MAX_CACHE_BYTES = (
    192 * 2**20
)  # bytes of keys and values that a batch may hold, or a quarter of the weights where that is more


class BufferLayer(DynamicLayer):
    """Keys and values of one layer [R, heads, tokens, D], written into a buffer: the library's own cache is copied anew
    with every token, a fifth of the time that an answer takes on a CPU. What all rows begin with is kept once."""

    def __init__(self, capacity: int, shared: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.capacity, self.shared, self.buffers, self.length = capacity, shared, None, 0

    def update(self, keys, values, *args, **kwargs):
        rows, heads, new, _ = keys.shape
        if self.buffers is None:
            self.is_initialized = True
            self.buffers = [part.new_empty(rows, heads, self.capacity, part.shape[-1]) for part in (keys, values)]
        for buffer, part in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.length : self.length + new] = part
        self.length += new
        own = [buffer[:, :, : self.length] for buffer in self.buffers]
        if self.shared is None:
            return tuple(own)
        return tuple(
            torch.cat([kept.to(part.device).expand(rows, -1, -1, -1), part], dim=-2)
            for kept, part in zip(self.shared, own, strict=True)
        )

    def get_seq_length(self) -> int:
        return self.length + (self.shared[0].shape[-2] if self.shared else 0)


def stop_ids(tokenizer, eos_token: str) -> list[int]:
    """Every token that ends an answer: the end of text, and those with `eos_token` in them ("\\n\\n" for "\\n")."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
    return sorted({i for i, text in enumerate(texts) if eos_token in text} | {tokenizer.eos_token_id})


def prompt_batches(prompts: Sequence[Sequence[int]], new: int, budget: int) -> list[list[int]]:
    """Indices of prompts, longest first, in groups whose padded rows hold at most `budget` tokens, or of one row."""
    groups: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if groups and (len(groups[-1]) + 1) * (len(prompts[groups[-1][0]]) + new) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.inference_mode()
def generate(
    model: nn.Module, tokenizer, prompts: Sequence[list[int]], eos_token: str = "\n", max_new_tokens: int = 50,
    budget: int = MAX_CACHE_BYTES, cached: bool = True, seed: int = 0, progress: bool = False, **sampling,
) -> list[str]:  # fmt: skip
    """The answer to each prompt, in order, up to `eos_token`; `sampling` goes to `model.generate` (greedy without).

    Greedy answers don't depend on the batch, up to ties within float rounding; samples are drawn with a generator
    state of their own, by `seed`.
    """
    model.eval()
    split = split_by_prefix(prompts) if cached else []
    if len(split) > 1:
        found, same = {}, {"eos_token": eos_token, "max_new_tokens": max_new_tokens, "budget": budget, **sampling}
        for part in split:
            some = [prompts[i] for i in part]
            found |= zip(part, generate(model, tokenizer, some, seed=seed, progress=progress, **same), strict=True)
        return [found[i] for i in range(len(prompts))]
    device = input_device(model)
    beams, prefix = sampling.get("num_beams", 1), trained_prefix(model)
    own_cache, shared, tokens = cached and beams == 1, 0, MAX_TOKENS // beams
    if own_cache:
        shared = min(common_prefix_len(min(prompts), max(prompts)), min(map(len, prompts)) - 1)
        shared = shared if shared >= MIN_SHARED_TOKENS and len(prompts) > 1 else 0
        begun = encode_shared_prefix(model, prompts[0][: shared or int(not prefix)])
        per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in begun.layers) // begun.get_seq_length()
        tokens = max(budget, sum(p.nbytes for p in model.parameters()) // 4) // per_token
    if prefix:  # tokens that nothing reads stand for it
        prompts = [[tokenizer.pad_token_id] * prefix.length + ids for ids in prompts]
        shared += prefix.length
    stops = stop_ids(tokenizer, eos_token)
    answers = [""] * len(prompts)
    bar = tqdm(total=len(prompts), unit="ex", disable=not progress, desc="generating", leave=False)
    with bar, torch.random.fork_rng():
        torch.manual_seed(seed)
        for group in prompt_batches([ids[shared:] for ids in prompts], max_new_tokens, tokens):
            width = max(len(prompts[i]) for i in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(group):  # what is shared, filling, the rest of the prompt
                for part in (slice(0, shared), slice(shared - len(prompts[i]), None)):
                    ids[row, part] = torch.tensor(prompts[i][part], dtype=ids.dtype)
                    mask[row, part] = 1
            if own_cache:
                kept = [(layer.keys, layer.values) if shared else None for layer in begun.layers]
                capacity = width - shared + max_new_tokens
                sampling["past_key_values"] = Cache([BufferLayer(capacity, some) for some in kept])
            elif prefix:
                sampling["past_key_values"] = prefix.growing_cache(model, len(group) * beams)
            grown = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
                eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, **sampling,
                synced_gpus=False,  # the library would wait for ranks that have no rows left; run_on_all does
            )  # fmt: skip
            for row, i in enumerate(group):
                text = tokenizer.decode(grown[row, width:], skip_special_tokens=True)
                answers[i] = text.split(eos_token)[0].strip()
            bar.update(len(group))
    return answers
