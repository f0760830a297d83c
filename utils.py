"""Small things that every room may use: the error of bad input, tokenizers, prompts as token ids, the machine.

`encode_prompt` is where text becomes numbers; the ids that it gives are those of the MeZO code (arXiv 2305.17333).
"""

import ctypes
import logging
import re
import resource
from pathlib import Path

import torch
from transformers import AutoTokenizer

logger = logging.getLogger(__name__)


class UsageError(ValueError):
    """Bad input: one line that says what is wrong and what to type instead. `run.py` prints it and exits with 2."""


def load_tokenizer(path, model_type: str | None = None):
    """Tokenizer of a hub name, a directory or a `.gguf` file.

    `model_type="opt"` sets the BOS id to 0, as the MeZO code does: its published numbers rest on prompts that start
    with 0, not with OPT's own 2. Today's tokenizers write the BOS from a post-processor, which has to be told.
    """
    path = str(path)
    if path.endswith(".gguf"):
        tokenizer = AutoTokenizer.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
    if model_type == "opt":
        tokenizer.bos_token_id = 0
        tokenizer.update_post_processor()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def encode_prompt(
    task,
    template,
    train_samples,
    eval_sample,
    tokenizer,
    max_length: int,
    sfc: bool = False,
    icl_sfc: bool = False,
    generation: bool = False,
    generation_with_gold: bool = False,
    max_new_tokens: int | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Token ids of every candidate behind its prompt, and how many of them are the candidate's.

    Demonstrations (`train_samples`) are joined by `task.train_sep` and stand in front; `sfc` takes the prompt without
    input and without demonstrations, `icl_sfc` the same with them. `generation` gives one prompt and option length 0,
    with `generation_with_gold` the correct answer behind it. The option length is counted on whole strings,
    len(tok(prompt + candidate)) - len(tok(prompt)), because a tokenizer may merge across the seam.

    A prompt longer than `max_length` loses tokens on its left, as many for each candidate of an example, so that all
    of them keep the same context; a BOS stays. Raises UsageError where no prompt token would be left beside an option
    or where an option has no token.
    """
    shape = (template.encode_sfc, template.verbalize_sfc) if sfc or icl_sfc else (template.encode, template.verbalize)
    encode, verbalize = shape
    demonstrations = task.train_sep.join(
        template.verbalize(sample, sample.correct_candidate).strip() for sample in train_samples
    ).strip()
    prompt = encode(eval_sample).strip(" ")
    if not generation:
        texts = [verbalize(eval_sample, candidate).strip(" ") for candidate in eval_sample.candidates]
    elif generation_with_gold:
        texts = [verbalize(eval_sample, eval_sample.correct_candidate).strip(" ")]
    else:
        texts = [prompt]
    prompt_length = len(tokenizer.encode(prompt))
    option_lens = [len(tokenizer.encode(text)) - prompt_length for text in texts]
    if not sfc:
        texts = [(demonstrations + task.train_sep + text).lstrip().strip(" ") for text in texts]
    encodings = [tokenizer.encode(text) for text in texts]

    open_ended = generation and not generation_with_gold
    if not open_ended:
        empty = [candidate for candidate, n in zip(eval_sample.candidates or texts, option_lens, strict=False) if n < 1]
        if empty:
            raise UsageError(f"example {eval_sample.id}: option {empty[0]!r} has no token of its own")
        if any(len(ids) == n for ids, n in zip(encodings, option_lens, strict=True)):
            # A bare label word (calibration) on a tokenizer without BOS: something must predict its first token.
            start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            encodings = [[start, *ids] for ids in encodings]
    if generation and max_new_tokens is not None:
        max_length -= max_new_tokens
    cut = max(len(ids) for ids in encodings) - max_length
    if cut > 0:
        keep = int(encodings[0][0] == tokenizer.bos_token_id)
        encodings = [ids[:keep] + ids[keep + cut :] for ids in encodings]
    if any(len(ids) - n < 1 for ids, n in zip(encodings, option_lens, strict=True)):
        raise UsageError(
            f"--max_length {max_length} leaves no prompt token beside an option of {max(option_lens)} tokens "
            f"(example {eval_sample.id}); give at least {max(option_lens) + 1}"
        )
    return encodings, option_lens


def keep_pages() -> None:
    """Tell glibc to keep freed memory: eager PyTorch on a CPU otherwise faults every large temporary in anew.

    `bench/step.py --default_malloc` shows what it is worth. Does nothing where there is no glibc.
    """
    trim_threshold, mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 25)  # the most that glibc takes
        libc.mallopt(trim_threshold, 1 << 30)
    except (OSError, AttributeError):
        pass


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (avx512_bf16 or AMX); False where Linux can't tell."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def peak_memory_mb() -> float:
    """Peak memory of this process in MB: allocated on the GPU where there is one, else resident.

    Read from /proc where there is one: `ru_maxrss` of a new process starts at what its parent had.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
