"""Examples, and the plain computations that fast paths are compared with."""

import random

import torch

from scoring.packing import Example
from support.models import tiny_tokenizer
from zo import counter_rng


def some_examples(n=9, seed=0, beginning=0) -> list[Example]:
    """Random prompts and options; all begin with the same `beginning` tokens, every third one like the one before."""
    rng = random.Random(seed)
    words = lambda k: [rng.randrange(256) for _ in range(k)]  # noqa: E731
    start, prompt, made = words(beginning), [], []
    for i in range(n):
        prompt = prompt[:20] + words(9) if i % 3 == 1 else start + words(rng.randint(1, 30))
        lens = [rng.randint(1, 4) for _ in range(1 + i % 4)]
        made.append(Example([prompt + words(k) for k in lens], lens, rng.randrange(len(lens))))
    a, b, c = start + words(12), words(3), words(1)
    made.append(Example([a + b, a + b + c, a + b, a + c], [3, 4, 3, 1], 1))  # a prefix, twins, one token
    return made


def some_prompts(beginning: int) -> list[list[int]]:
    rng = random.Random(0)
    start = [rng.randrange(256) for _ in range(beginning)]
    return [start + [rng.randrange(256) for _ in range(rng.randint(1, 30))] for _ in range(9)]


def gaussian(counter: tuple, start: int, count: int) -> torch.Tensor:
    return counter_rng.direction_range("gaussian", counter, start, count)


@torch.no_grad()
def plain_logprobs(model, ids: list[int], n: int) -> list[float]:
    logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [logprobs[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))]


def plain_scores(model, examples) -> list[list[float]]:
    return [
        [sum(plain_logprobs(model, ids, n)) for ids, n in zip(x.encodings, x.option_lens, strict=True)]
        for x in examples
    ]


def assert_close(scores, reference, tokens=8):
    for row, expected in zip(scores, reference, strict=True):
        assert len(row) == len(expected)
        for a, b in zip(row, expected, strict=True):
            assert abs(a - b) <= tokens * 2e-5 + 1e-5 * abs(b)


@torch.inference_mode()
def plain_answers(model, prompts, new, stop="\n") -> list[str]:
    """Greedy search by hand: the whole text goes through the model for every token."""
    tokenizer, answers = tiny_tokenizer(), []
    for prompt in prompts:
        ids, text = list(prompt), ""
        while len(ids) - len(prompt) < new and stop not in text:
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
            text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        answers.append(text.split(stop)[0].strip())
    return answers


def perturbed(model, engine, query: int, scale: float) -> list[torch.Tensor]:
    """θ + scale·z of every parameter, in its dtype, as the engine shall show it."""
    shown = []
    for block in engine.blocks:
        z = engine.directions.z(block, query)
        shown.append((block.param.float() + scale * z.view(block.param.shape)).to(block.param.dtype))
    return shown


def loss_at(params, values, closure) -> float:
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
        loss = float(closure())
        for p, value in zip(params, before, strict=True):
            p.copy_(value)
    return loss
