"""Generate answers, for tasks without options: batched, left-padded, through `model.generate`.

The common beginning of all prompts (shared demonstrations) goes through the model once, into a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from prefix import trained_prefix
from scoring.logprobs import encode_shared_prefix
from scoring.packing import MAX_TOKENS, MIN_SHARED_TOKENS, common_prefix_len, split_by_prefix
from utils import input_device

# Bytes of keys and values that a batch may hold, or a quarter of the weights where that is more.
MAX_CACHE_BYTES = 192 * 2**20


@dataclass(frozen=True)
class GenerationSettings:
    """Hold the choices of how answers are generated.

    Attributes:
        eos_token: the text that ends an answer.
        max_new_tokens: the most tokens of an answer.
        sampling: further arguments of `model.generate`: `do_sample`, `num_beams`, `temperature`, `top_k`,
            `top_p`.
    """

    eos_token: str = "\n"
    max_new_tokens: int = 50
    sampling: dict = field(default_factory=dict)


class BufferLayer(DynamicLayer):
    """Keys and values of one layer, written into a buffer [R, heads, capacity, D].

    The library copies its cache anew with every token: a fifth of an answer's time on a CPU.

    Args:
        capacity: tokens that the buffer holds.
        prefix_states: keys and values [1, heads, tokens, D] of the common beginning of all rows, stored once.
    """

    def __init__(self, capacity: int, prefix_states: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.capacity = capacity
        self.prefix_states = prefix_states
        self.buffers: list[Tensor] | None = None  # of keys and of values
        self.length = 0

    def update(self, keys, values, *args, **kwargs):
        """Append keys and values [R, heads, new tokens, D]; return all of them so far."""
        rows, heads, num_new, _ = keys.shape
        if self.buffers is None:
            self.is_initialized = True
            size = (rows, heads, self.capacity)
            self.buffers = [part.new_empty(*size, part.shape[-1]) for part in (keys, values)]
        for buffer, part in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.length : self.length + num_new] = part
        self.length += num_new
        contents = [buffer[:, :, : self.length] for buffer in self.buffers]
        if self.prefix_states is None:
            return tuple(contents)
        return tuple(
            torch.cat([shared_part.to(part.device).expand(rows, -1, -1, -1), part], dim=-2)
            for shared_part, part in zip(self.prefix_states, contents, strict=True)
        )

    def get_seq_length(self) -> int:
        return self.length + (self.prefix_states[0].shape[-2] if self.prefix_states else 0)


def stop_ids(tokenizer, eos_token: str) -> list[int]:
    """Return every token that ends an answer: the end of text, and those that contain `eos_token`."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
    return sorted({i for i, text in enumerate(texts) if eos_token in text} | {tokenizer.eos_token_id})


def prompt_batches(prompts: Sequence[Sequence[int]], new_tokens: int, budget: int) -> list[list[int]]:
    """Return the indices of prompts, longest first, in groups whose padded rows hold at most `budget` tokens.

    A row is a prompt and `new_tokens` tokens behind it. A group has one row at least.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if groups and (len(groups[-1]) + 1) * (len(prompts[groups[-1][0]]) + new_tokens) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[list[int]],
    eos_token: str = "\n",
    max_new_tokens: int = 50,
    budget: int = MAX_CACHE_BYTES,
    use_cache: bool = True,
    seed: int = 0,
    progress: bool = False,
    **sampling,
) -> list[str]:
    """Return the answer to each prompt, in order, up to `eos_token`.

    Greedy answers don't depend on the batch, up to ties within float rounding. Samples are drawn with a
    generator state of their own.

    Args:
        prompts: token ids of each prompt.
        budget: bytes of keys and values that a batch may hold.
        use_cache: store the common beginning of all prompts once, in a cache of our own; not with beams.
        seed: of the samples.
        sampling: goes to `model.generate`; greedy without.
    """
    model.eval()
    parts = split_by_prefix(prompts) if use_cache else []
    if len(parts) > 1:
        settings = {"budget": budget, "seed": seed, "progress": progress, **sampling}
        answers_by_index: dict[int, str] = {}
        for part in parts:
            part_prompts = [prompts[i] for i in part]
            answers = generate(model, tokenizer, part_prompts, eos_token, max_new_tokens, **settings)
            answers_by_index |= zip(part, answers, strict=True)
        return [answers_by_index[i] for i in range(len(prompts))]
    settings = GenerationSettings(eos_token, max_new_tokens, sampling)
    bar = tqdm(total=len(prompts), unit="ex", disable=not progress, desc="generating", leave=False)
    with bar, torch.random.fork_rng():
        torch.manual_seed(seed)
        return _generate_batches(model, tokenizer, prompts, settings, budget, use_cache, bar)


def _generate_batches(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    budget: int,
    use_cache: bool,
    bar: tqdm,
) -> list[str]:
    """Return the answer to each prompt, in order; arguments as of `generate`."""
    pad = tokenizer.pad_token_id
    new_tokens = settings.max_new_tokens
    beams = settings.sampling.get("num_beams", 1)
    prefix = trained_prefix(model)
    device = input_device(model)
    cache, shared_len, tokens = None, 0, MAX_TOKENS // beams
    if use_cache and beams == 1:
        shared_len = _shared_prompt_len(prompts)
        # where nothing is shared, the first token shows how many bytes a token takes
        cache = encode_shared_prefix(model, prompts[0][: shared_len or int(not prefix)])
        tokens = _tokens_within(budget, model, cache)
    if prefix:  # tokens that nothing reads stand for it
        prompts = [[pad] * prefix.length + ids for ids in prompts]
        shared_len += prefix.length
    arguments = {
        "max_new_tokens": new_tokens,
        "eos_token_id": stop_ids(tokenizer, settings.eos_token),
        "pad_token_id": pad,
        # the library would wait for ranks that have no rows left; `run_on_all` does that
        "synced_gpus": False,
        **settings.sampling,
    }
    answers = [""] * len(prompts)
    for group in prompt_batches([ids[shared_len:] for ids in prompts], new_tokens, tokens):
        ids, mask = _pad_prompts([prompts[i] for i in group], shared_len, pad)
        width = ids.shape[1]
        if cache:
            arguments["past_key_values"] = _buffer_cache(
                cache, width - shared_len + new_tokens, shared_len > 0
            )
        elif prefix:
            arguments["past_key_values"] = prefix.growing_cache(model, len(group) * beams)
        output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **arguments)
        for row, i in enumerate(group):
            text = tokenizer.decode(output[row, width:], skip_special_tokens=True)
            answers[i] = text.split(settings.eos_token)[0].strip()
        bar.update(len(group))
    return answers


def _shared_prompt_len(prompts: Sequence[list[int]]) -> int:
    """Return how many tokens all prompts begin with, short of their last; 0 below what a cache is worth."""
    shared_len = min(common_prefix_len(min(prompts), max(prompts)), min(map(len, prompts)) - 1)
    return shared_len if shared_len >= MIN_SHARED_TOKENS and len(prompts) > 1 else 0


def _tokens_within(budget: int, model: nn.Module, cache: Cache) -> int:
    """Return how many tokens' keys and values fit into `budget` bytes, or a quarter of the weights."""
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    weight_bytes = sum(p.nbytes for p in model.parameters())
    return max(budget, weight_bytes // 4) // (cache_bytes // cache.get_seq_length())


def _buffer_cache(cache: Cache, capacity: int, is_shared: bool) -> Cache:
    """Return a cache with room for `capacity` tokens a row, behind those of `cache` where they are shared."""
    shared_parts = [(layer.keys, layer.values) if is_shared else None for layer in cache.layers]
    return Cache(layers=[BufferLayer(capacity, keys_and_values) for keys_and_values in shared_parts])


def _pad_prompts(prompts: Sequence[list[int]], shared_len: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask [R, N] int64 of prompts: the shared tokens, filling, the rest of each prompt."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        for part in (slice(0, shared_len), slice(shared_len - len(prompt), None)):
            ids[row, part] = torch.tensor(prompt[part], dtype=ids.dtype)
            mask[row, part] = 1
    return ids, mask
