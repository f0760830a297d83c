"""Training losses, scores and predictions of a language model on examples.

Data goes one way, for training and evaluation alike:

    examples -> prompt -> token ids -> packed batch -> log-probabilities -> loss or score

`prompts` turns samples of a task into token ids (`Example`), `packing` lays examples out in rows, `logprobs`
runs one forward of a packed batch and reads the loss or the scores from its logits. `generate` continues
prompts in the model's own words. `evaluate` puts them together (`Evaluator`): predictions, and their metrics
(`metrics`). `linear_probe` and `staged_results` are two more ways to measure a model.
"""

from scoring.logprobs import loss, score, token_logprobs
from scoring.packing import Example, pack

__all__ = ["Example", "loss", "pack", "score", "token_logprobs"]
