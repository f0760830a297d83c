"""When a boosting round ends, and what of its booster is kept (XGBLoRA, arXiv 2410.19694).

A round lasts N steps, or n epochs. `--xgblora_adaptive` looks at the loss on dev rows: a round whose loss no longer
falls ends early, and a line search gives the booster its step length, as gradient boosting does; 0 rejects it.
"""

import functools
import logging
import math
from collections.abc import Callable

from transformers import TrainerCallback, TrainerState

logger = logging.getLogger(__name__)

STEP_LENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # that the line search tries; of equal ones the shortest is taken
SEEN = "boosting"  # where the Trainer's state keeps the dev loss of a round, and a checkpoint with it


def round_ends(state: TrainerState) -> list[tuple[int, float]]:
    """(step, step length) of every round that has ended."""
    return [(e["step"], e["step_length"]) for e in state.log_history if "step_length" in e]


def line_search(lora, dev_loss: Callable[[], float]) -> tuple[float, float]:
    """(step length of the live booster, dev loss with it); a loss that is NaN is none."""
    best, least = 0.0, math.inf
    for length in STEP_LENGTHS:
        with lora.scale_current(length):
            loss = dev_loss()
        if loss < least:
            best, least = length, loss
    return best, least


class Boosting(TrainerCallback):
    """Ends rounds of a trainer, at the end of a step and before its evaluation and checkpoint; trains A once its
    `--xgblora_a_warmup` is over.

    An epoch's merge is not done in `on_epoch_end`: that comes after the checkpoint of the epoch's last step, and a
    resume from there would lose the merge.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    @functools.cached_property
    def round_steps(self) -> int:
        """The longest that a round lasts, in steps."""
        args = self.trainer.args
        if args.xgblora_steps_per_iteration:
            return args.xgblora_steps_per_iteration
        batches = len(self.trainer.get_train_dataloader())
        return math.ceil(batches / args.gradient_accumulation_steps) * args.xgblora_merge_frequency

    @property
    def patience(self) -> int:
        """Steps within which the dev loss of a round has to fall; 0: it isn't looked at."""
        args = self.trainer.args
        if not args.xgblora_adaptive:
            return 0
        return args.xgblora_patience or max(1, self.round_steps // 4)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.patience and SEEN not in state.stateful_callbacks:
            state.stateful_callbacks[SEEN] = {"dev_loss": self.trainer.dev_loss()}

    def on_step_end(self, args, state, control, **kwargs):
        age = self.trainer.round_age
        if age >= self.round_steps or self.stalls(state, age):
            self.trainer.end_round()
        elif args.xgblora_a_warmup and age == args.xgblora_a_warmup:
            self.trainer.train_a()

    def stalls(self, state, age: int) -> bool:
        """Whether the dev loss has not fallen since the last look at it."""
        if not self.patience or age % self.patience:
            return False
        seen, loss = state.stateful_callbacks[SEEN], self.trainer.dev_loss()
        logger.info("XGBLoRA: dev loss %.4f after %d steps of the round (before: %.4f)", loss, age, seen["dev_loss"])
        stalled = not loss < seen["dev_loss"]
        seen["dev_loss"] = loss
        return stalled


def restart_schedule(scheduler, start: Callable[[], int]) -> None:
    """Make a schedule of one round begin anew at step `start()`, the first of the round at hand."""
    scheduler.lr_lambdas = [lambda step, f=f: f(step - start()) for f in scheduler.lr_lambdas]


def reset_rate(scheduler, optimizer) -> None:
    """Compute the rates of the coming step again, after `start()` has changed."""
    rates = [base * f(scheduler.last_epoch) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
