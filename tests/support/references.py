"""Examples, and the plain computations that fast paths are compared with."""

import random

import torch

from scoring.packing import Example
from support.models import tiny_tokenizer
from zo import counter_rng


def some_examples(n=9, seed=0, beginning=0) -> list[Example]:
    """Return random prompts and options.

    All begin with the same `beginning` tokens, and every third prompt begins as the one before.
    """
    rng = random.Random(seed)
    words = lambda k: [rng.randrange(256) for _ in range(k)]  # noqa: E731
    start = words(beginning)
    prompt, examples = [], []
    for i in range(n):
        prompt = prompt[:20] + words(9) if i % 3 == 1 else start + words(rng.randint(1, 30))
        lens = [rng.randint(1, 4) for _ in range(1 + i % 4)]
        examples.append(Example([prompt + words(k) for k in lens], lens, rng.randrange(len(lens))))
    a = start + words(12)
    b = words(3)
    c = words(1)
    examples.append(Example([a + b, a + b + c, a + b, a + c], [3, 4, 3, 1], 1))  # a prefix, twins, one token
    return examples


def some_prompts(beginning: int) -> list[list[int]]:
    """Return nine random prompts that begin with the same so many tokens."""
    rng = random.Random(0)
    start = [rng.randrange(256) for _ in range(beginning)]
    return [start + [rng.randrange(256) for _ in range(rng.randint(1, 30))] for _ in range(9)]


def gaussian(counter: tuple, start: int, count: int) -> torch.Tensor:
    """Return a stretch of the direction that belongs to a counter (seed, step, query)."""
    return counter_rng.direction_range("gaussian", counter, start, count)


@torch.no_grad()
def plain_logprobs(model, ids: list[int], n: int) -> list[float]:
    """Return the log-probability of each of the last n tokens, with logits of all."""
    logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [logprobs[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))]


def plain_scores(model, examples) -> list[list[float]]:
    """Return the log-probability of each option, each in a row of its own."""
    return [
        [sum(plain_logprobs(model, ids, n)) for ids, n in zip(x.encodings, x.option_lens, strict=True)]
        for x in examples
    ]


def assert_close(scores, reference, tokens=8):
    """Assert that scores agree up to the order of additions: 2e-5, and 1e-5 of the value for each token."""
    for row, expected in zip(scores, reference, strict=True):
        assert len(row) == len(expected)
        for a, b in zip(row, expected, strict=True):
            assert abs(a - b) <= tokens * 2e-5 + 1e-5 * abs(b)


@torch.inference_mode()
def plain_answers(model, prompts, new, stop="\n") -> list[str]:
    """Return answers of greedy search: the whole text goes through the model for every token."""
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
    """Return θ + scale·z of every parameter, in its dtype, as the engine has to compute with it."""
    values = []
    for block in engine.blocks:
        z = engine.directions.z(block, query)
        values.append((block.param.float() + scale * z.view(block.param.shape)).to(block.param.dtype))
    return values


def loss_at(params, values, closure) -> float:
    """Return the loss with these values in the parameters, which get their own back."""
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
        loss = float(closure())
        for p, value in zip(params, before, strict=True):
            p.copy_(value)
    return loss
