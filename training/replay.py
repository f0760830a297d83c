"""Replay: the trained weights of a run from its trajectory, without data and without a forward pass."""

import itertools

from boosters.rounds import merge_round
from lora import LoRA
from utils import UsageError
from zo.optimizer import ZerothOrder
from zo.trajectory import Trajectory


def replay_rounds(
    trajectory: Trajectory,
    optimizer: ZerothOrder,
    lora: LoRA | None,
    steps: int | None = None,
) -> None:
    """Take the first steps of a run again, merges of boosters included.

    Args:
        trajectory: what `OurTrainer.finish` wrote: coefficients of the steps, and in `about` how the run's
            rounds ended.
        optimizer: of the pretrained weights, with the run's settings.
        lora: the adapters that the run trained; None where it trained no adapters.
        steps: how many steps; None rebuilds the run's result: its best checkpoint where the run kept the
            best, merged and cut to the boosters that the run kept.

    Raises:
        UsageError: an earlier version of the program took steps in a way that is gone.
    """
    about = trajectory.about
    if about["settings"].get("xgblora_a_warmup"):
        raise UsageError("--replay: this run had --xgblora_a_warmup, which earlier versions alone know")
    last_step = about["steps"] if steps is None else steps
    step_lengths = dict(about["rounds"])
    stops = sorted({0, last_step} | {step for step in step_lengths if step <= last_step})
    for start, stop in itertools.pairwise(stops):
        optimizer.replay(trajectory, range(start, stop))
        if stop in step_lengths:
            merge_round(lora, optimizer, stop, step_lengths[stop])
    if lora and lora.xgblora and lora.is_trained():  # the round that had not ended
        merge_round(lora, optimizer, last_step, about["last"] if steps is None else 1.0)
    if steps is None and about["boosters"] is not None:
        lora.chain.truncate(about["boosters"])
