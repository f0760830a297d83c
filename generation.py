"""Answers in the model's own words, for tasks without options: batched, left-padded, through `model.generate`.

What all prompts begin with (shared demonstrations) goes through the model once, into a key-value cache.
"""

from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from scoring import SHARED, TOKENS, common, prefix_cache


def stop_ids(tokenizer, eos_token: str) -> list[int]:
    """Every token that ends an answer: the end of text, and those with `eos_token` in them ("\\n\\n" for "\\n")."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
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
    budget: int = TOKENS, cached: bool = True, seed: int = 0, progress: bool = False, **sampling,
) -> list[str]:  # fmt: skip
    """The answer to each prompt, in order, up to `eos_token`; `sampling` goes to `model.generate` (greedy without).

    Greedy answers don't depend on the batch, up to ties within float rounding; samples are drawn with a generator
    state of their own, by `seed`.
    """
    model.eval()
    device = next(model.parameters()).device
    shared = min(common(min(prompts), max(prompts)), min(map(len, prompts)) - 1)
    if not cached or len(prompts) < 2 or shared < SHARED or sampling.get("num_beams", 1) > 1:
        shared = 0
    cache = prefix_cache(model, prompts[0][:shared]) if shared else None
    stops = stop_ids(tokenizer, eos_token)
    answers = [""] * len(prompts)
    bar = tqdm(total=len(prompts), unit="ex", disable=not progress, desc="generating", leave=False)
    with bar, torch.random.fork_rng():
        torch.manual_seed(seed)
        for group in prompt_batches([ids[shared:] for ids in prompts], max_new_tokens, budget):
            width = max(len(prompts[i]) for i in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(group):  # what is shared, filling, the rest of the prompt
                for part in (slice(0, shared), slice(shared - len(prompts[i]), None)):
                    ids[row, part] = torch.tensor(prompts[i][part], dtype=ids.dtype)
                    mask[row, part] = 1
            if cache:
                layers = [(layer.keys.expand(len(group), -1, -1, -1), layer.values.expand(len(group), -1, -1, -1))
                          for layer in cache.layers]  # fmt: skip
                sampling["past_key_values"] = DynamicCache(layers)
            grown = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
                eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, **sampling,
            )  # fmt: skip
            for row, i in enumerate(group):
                text = tokenizer.decode(grown[row, width:], skip_special_tokens=True)
                answers[i] = text.split(eos_token)[0].strip()
            bar.update(len(group))
    return answers
