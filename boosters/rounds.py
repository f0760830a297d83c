"""When a boosting round ends, and what is known of the rounds that have ended (XGBLoRA, arXiv 2410.19694).

A round lasts N steps, or n epochs. `--xgblora_adaptive` looks at the loss on dev rows: a round whose dev loss
no longer falls ends early, and a line search gives the booster its step length, as gradient boosting does; 0
rejects the booster.
"""

import logging
import math
from collections.abc import Callable

import torch

from zo.optimizer import ZerothOrder

logger = logging.getLogger(__name__)

# The step lengths that the line search tries; of equal losses the shortest length wins.
STEP_LENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


class Rounds:
    """The rounds of a run: how long a round may last, and the end of every round so far.

    This is the one owner of what is known of rounds. `state_dict` goes into each checkpoint. Log history,
    trajectory and `LoRA` are told when a round ends; nobody reads the ends of rounds from them.

    Attributes:
        max_steps: steps after which a round ends; None: rounds end by `end` alone.
        patience: steps within which the dev loss of a round has to fall; 0: nobody looks at the dev loss.
        ended: (step, step length) of every round that has ended; step length 0: its booster was rejected.
        dev_loss: the last loss on dev rows that was measured; None before the first.
    """

    def __init__(self):
        self.max_steps: int | None = None
        self.patience = 0
        self.ended: list[tuple[int, float]] = []
        self.dev_loss: float | None = None

    def set_limits(self, max_steps: int, patience: int = 0) -> None:
        """Set how many steps a round may last, and within how many of them its dev loss has to fall."""
        self.max_steps = max_steps
        self.patience = patience

    @property
    def current_start(self) -> int:
        """The step at which the current round began."""
        return self.ended[-1][0] if self.ended else 0

    def is_over(self, step: int, dev_loss: Callable[[], float]) -> bool:
        """Return whether the current round ends with this step.

        Args:
            step: steps that the run has taken.
            dev_loss: measures the loss on dev rows; called once in `patience` steps.
        """
        age = step - self.current_start
        if self.max_steps is not None and age >= self.max_steps:
            return True
        if not self.patience or age % self.patience:
            return False
        previous_loss, self.dev_loss = self.dev_loss, dev_loss()
        message = "XGBLoRA: dev loss %.4f after %d steps of the round (before: %.4f)"
        logger.info(message, self.dev_loss, age, previous_loss)
        return not self.dev_loss < previous_loss  # NaN does not fall either

    def end(self, step: int, step_length: float) -> None:
        """Record that the current round ended at this step."""
        self.ended.append((step, step_length))

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps; JSON types only."""
        return {"ended": [list(entry) for entry in self.ended], "dev_loss": self.dev_loss}

    def load_state_dict(self, state: dict) -> None:
        """Take over what a checkpoint kept."""
        self.ended = [(step, step_length) for step, step_length in state["ended"]]
        self.dev_loss = state["dev_loss"]


def line_search(lora, dev_loss: Callable[[], float]) -> tuple[float, float]:
    """Return the step length of the current booster with the lowest dev loss, and that loss."""
    best_length = 0.0
    lowest_loss = math.inf
    for length in STEP_LENGTHS:
        with lora.scale_current(length):
            loss = dev_loss()
        if loss < lowest_loss:  # never for NaN
            best_length, lowest_loss = length, loss
    return best_length, lowest_loss


def merge_round(lora, optimizer: torch.optim.Optimizer | None, step: int, step_length: float = 1.0) -> dict:
    """Merge the current booster of a `LoRA` and begin the next round.

    Args:
        optimizer: of the adapters, which forgets what it knew of the booster; None where a finished run is
            loaded again and trains no more.
        step: steps that the run has taken, for the log.
        step_length: factor of the booster's scaling; 0 rejects the booster.

    Returns:
        The entry of this merge in the Trainer's log history.
    """
    shapes = [p.shape for p in lora.parameters()]
    lora.merge_and_reinit(step_length)
    if isinstance(optimizer, ZerothOrder):
        optimizer.restart(forget=shapes != [p.shape for p in lora.parameters()])
    elif optimizer is not None:
        optimizer.state.clear()
    if step_length:
        logger.info("XGBLoRA: merged booster %d at step %d", len(lora.boosters), step)
        entry = {"merged_booster": len(lora.boosters)}
    else:
        logger.info("XGBLoRA: rejected the booster of round %d at step %d", lora.round, step)
        entry = {"rejected_round": lora.round}
    return {**entry, "step_length": step_length, "step": step}
