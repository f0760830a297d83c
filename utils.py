"""Helpers of every folder: the error of bad input, tokenizers, prompts as token ids, the device of a layer.

`encode_prompt` turns text into numbers; its token ids are those of the MeZO code (arXiv 2305.17333).
"""

import importlib.util
import logging
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

logger = logging.getLogger(__name__)
# Where bitsandbytes is installed, peft imports it, and it logs at every start which kernels it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class UsageError(ValueError):
    """Bad input. The message is one line: what is wrong and what to type instead.

    `run.py` prints the line and exits with 2.
    """


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop.

    Not an `Exception`, so that no `except Exception` on the way takes the signal for a failure.
    """


def load_from_file(name: str):
    """Return the object that `file.py:name` names, or None where there is no such file or no such name in it.

    Raises:
        UsageError: the file is not Python.
    """
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        return None
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UsageError(f"{path}, line {error.lineno}: {error.msg}") from error
    return getattr(module, attribute, None)


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a layer with a weight computes.

    Offloaded weights are copied to this device for each call.
    """
    if not module.weight.is_meta:
        return module.weight.device
    hook = module._hf_hook  # of several hooks the first is the one that brings the weight
    return torch.device(getattr(hook, "hooks", [hook])[0].execution_device)


def input_device(model: nn.Module) -> torch.device:
    """Return the device where token ids go: that of the embedding."""
    return execution_device(model.get_input_embeddings())


def load_tokenizer(path, model_type: str | None = None, trust: bool = False):
    """Return the tokenizer of a hub name, a directory or a `.gguf` file.

    Args:
        path: the name, directory or file.
        model_type: "opt" sets the BOS id to 0, as the MeZO code does: its published numbers rest on
            prompts that start with 0, not with OPT's own 2. Today's tokenizers write the BOS from a
            post-processor, which has to be updated.
        trust: run code that comes with the tokenizer.
    """
    path = str(path)
    if path.endswith(".gguf"):
        tokenizer = AutoTokenizer.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    if model_type == "opt":
        tokenizer.bos_token_id = 0
        tokenizer.update_post_processor()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def encode_prompt(
    task, template, train_samples, eval_sample, tokenizer, max_length: int, sfc: bool = False,
    icl_sfc: bool = False, generation: bool = False, generation_with_gold: bool = False,
    max_new_tokens: int | None = None,
) -> tuple[list[list[int]], list[int]]:  # fmt: skip
    """Return the token ids of every candidate behind its prompt, and how many of them are the candidate's.

    The number of a candidate's tokens is counted on whole strings, len(tok(prompt + candidate)) -
    len(tok(prompt)), because a tokenizer may merge across the seam. A prompt longer than `max_length`
    loses tokens on its left, as many for each candidate of an example, so that all of them keep the
    same context; a BOS stays.

    Args:
        task: gives the text between demonstrations, `train_sep`.
        template: turns samples into text.
        train_samples: demonstrations, in front of the prompt.
        eval_sample: the sample.
        max_length: the longest encoding in tokens.
        sfc: take the prompt without input and without demonstrations.
        icl_sfc: take the prompt without input behind the demonstrations.
        generation: give one prompt, and option length 0.
        generation_with_gold: with `generation`, put the correct answer behind the prompt.
        max_new_tokens: with `generation`, tokens of the answer that `max_length` has to hold too.

    Raises:
        UsageError: no prompt token would be left beside an option, or an option has no token.
    """
    return prompt_tokens(
        task, template, train_samples, eval_sample, tokenizer, max_length, sfc, icl_sfc, generation,
        generation_with_gold, max_new_tokens,
    )[:2]  # fmt: skip


def prompt_tokens(
    task, template, train_samples, eval_sample, tokenizer, max_length, sfc=False, icl_sfc=False,
    generation=False, generation_with_gold=False, max_new_tokens=None,
) -> tuple[list[list[int]], list[int], int]:  # fmt: skip
    """Return what `encode_prompt` returns, and how many tokens the longest candidate lost on its left."""
    calibrated = sfc or icl_sfc
    encode = template.encode_sfc if calibrated else template.encode
    verbalize = template.verbalize_sfc if calibrated else template.verbalize
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
    full_texts = texts
    if not sfc:
        full_texts = [(demonstrations + task.train_sep + text).lstrip().strip(" ") for text in texts]
    distinct_texts = list(dict.fromkeys([prompt, *texts, *full_texts]))
    encoded = tokenizer(distinct_texts, return_attention_mask=False, verbose=False)
    ids_of = dict(zip(distinct_texts, encoded["input_ids"], strict=True))
    option_lens = [len(ids_of[text]) - len(ids_of[prompt]) for text in texts]
    encodings = [ids_of[text] for text in full_texts]
    open_ended = generation and not generation_with_gold
    if not open_ended:
        encodings = with_first_token(encodings, option_lens, eval_sample, texts, tokenizer)
    room = max_length - (max_new_tokens or 0 if generation else 0)
    num_cut = max(0, max(map(len, encodings)) - room)
    num_bos = int(num_cut > 0 and encodings[0][0] == tokenizer.bos_token_id)
    if num_cut:
        encodings = [ids[:num_bos] + ids[num_bos + num_cut :] for ids in encodings]
    if any(len(ids) - n - num_bos < 1 for ids, n in zip(encodings, option_lens, strict=True)):
        target = "an answer" if open_ended else f"an option of {max(option_lens)} tokens"
        answer = f" and --max_new_tokens {max_new_tokens}" if generation and max_new_tokens else ""
        raise UsageError(
            f"--max_length {max_length}{answer} leaves no prompt token beside {target} "
            f"(example {eval_sample.id}); "
            f"give --max_length {max_length - room + max(option_lens) + num_bos + 1} or more"
        )
    return encodings, option_lens, num_cut


def with_first_token(encodings, option_lens, eval_sample, texts, tokenizer) -> list[list[int]]:
    """Return the encodings, with a token in front where an option has no prompt.

    The model needs a token from which it predicts the option's first token. A calibration prompt can be empty
    with a tokenizer that writes no BOS.

    Raises:
        UsageError: an option has no token.
    """
    for candidate, n in zip(eval_sample.candidates or texts, option_lens, strict=False):
        if n < 1:
            raise UsageError(f"example {eval_sample.id}: option {candidate!r} has no token of its own")
    if any(len(ids) == n for ids, n in zip(encodings, option_lens, strict=True)):
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [[start, *ids] for ids in encodings]
    return encodings


def text_tokens(tokenizer, row: dict, max_length: int, where: str) -> tuple[list[int], list[int], int]:
    """Return the token ids of a training text, the positions to be learned, and the number cut on the left.

    A row with `messages` goes through the tokenizer's chat template, and what is learned is what the
    assistant says, the end of its turn included. A row with `prompt` and `response` is the two strings and an
    end-of-text token, and the response is learned.

    Args:
        row: the columns.
        max_length: the longest text in tokens.
        where: the row's place, for errors.

    Raises:
        UsageError: the tokenizer has no chat template, or a template whose text for the first turns is not
            the beginning of its text for all; or no token to learn is left.
    """
    is_chat = "messages" in row
    if is_chat:
        text, spans = chat_text(tokenizer, row["messages"], where)
    else:
        text = row["prompt"] + row["response"]
        spans = [(len(row["prompt"]), len(text))]
    # A chat template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=not is_chat, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    ends = [end for _, end in encoded["offset_mapping"]]
    positions = [p for p, end in enumerate(ends) if any(start < end <= stop for start, stop in spans)]
    if not is_chat:
        positions.append(len(ids))
        ids.append(tokenizer.eos_token_id)
    num_cut = max(0, len(ids) - max_length)
    num_bos = int(num_cut > 0 and ids[0] == tokenizer.bos_token_id)
    ids = ids[:num_bos] + ids[num_bos + num_cut :]
    positions = [p - num_cut for p in positions if p - num_cut > 0]
    if not positions:
        raise UsageError(f"{where}: no token to learn within --max_length {max_length}")
    return ids, positions, num_cut


def chat_text(tokenizer, turns: list[dict], where: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat, and the (start, end) of the assistant's turns in this text, in characters.

    Raises:
        UsageError: there is no chat template, it refuses these turns, or it rewrites earlier
            turns when later ones follow.
    """
    if not tokenizer.chat_template:
        raise UsageError("the model's tokenizer has no chat template; columns prompt and response need none")

    def render(n: int, **options) -> str:
        try:
            return tokenizer.apply_chat_template(turns[:n], tokenize=False, **options) if n else ""
        except Exception as error:  # templates raise for roles and orders that their model was not trained on
            raise UsageError(f"{where}: the chat template refuses these turns ({error})") from error

    text, spans = render(len(turns)), []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = render(i, add_generation_prompt=True)
        prompt_and_answer = render(i + 1)
        if not (text.startswith(prompt_and_answer) and prompt_and_answer.startswith(prompt)):
            raise UsageError(f"{where}: the chat template rewrites earlier turns when later ones follow")
        spans.append((len(prompt), len(prompt_and_answer)))
    return text, spans
