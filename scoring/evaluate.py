"""TODO scoring.evaluate."""

import math
from collections.abc import Sequence

import torch

from distributed.data_parallel import map_over_ranks
from scoring import logprobs
from scoring.packing import Example, loss_terms, num_tokens


def score_over_ranks(
    model, examples: Sequence[Example], plain: bool = False, progress: bool = False, read=None
) -> list[list]:
    """`scoring.score`, divided among the ranks."""
    return map_over_ranks(
        [x.encodings[0] for x in examples],
        [num_tokens(x) for x in examples],
        lambda some: logprobs.score(model, [examples[i] for i in some], plain=plain, progress=progress, read=read),
    )


def mean_loss(model, examples: Sequence[Example], classification: bool, plain: bool = False) -> float:
    """`scoring.loss` of many examples as if they were one batch, in packs of evaluation; NaN where the model gives
    NaN."""
    try:
        sums = score_over_ranks(model, examples, plain=plain)
    except FloatingPointError:
        return math.nan
    if not classification:
        return -sum(map(sum, sums)) / loss_terms(examples, False)
    means = [[s / n for s, n in zip(a, x.option_lens, strict=True)] for a, x in zip(sums, examples, strict=True)]
    losses = [-torch.tensor(m).log_softmax(0)[x.label].item() for m, x in zip(means, examples, strict=True)]
    return math.fsum(losses) / len(losses)
