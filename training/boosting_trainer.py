"""A Trainer that trains adapters in rounds (XGBLoRA), each of which ends with a merge.

boosters/rounds.py knows when a round ends and what is known of the rounds that have ended; here it is
connected to the Trainer's loop, its state and its log.
"""

import logging
import math
from collections.abc import Callable

from transformers import TrainerCallback

from boosters.rounds import Rounds, line_search, merge_round
from training.resumable_trainer import DivergenceWatch, ResumableTrainer, StopOnSignal

logger = logging.getLogger(__name__)

ROUNDS = "rounds"  # where the Trainer's state, and so each checkpoint, keeps what is known of the rounds


class EndRounds(TrainerCallback):
    """Ends the rounds of boosting after a step, before the evaluation and the checkpoint of that step.

    An epoch's last round does not end in `on_epoch_end`: that comes after the checkpoint of the epoch's last
    step, and a resume from there would lose the merge.

    Args:
        rounds: what is known of the rounds, which the Trainer's state keeps.
        dev_loss: measures the loss on dev rows.
        end_round: merges the current booster and records it in `rounds`.
    """

    def __init__(self, rounds: Rounds, dev_loss: Callable[[], float], end_round: Callable[[], None]):
        self.rounds = rounds
        self.dev_loss = dev_loss
        self.end_round = end_round

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        max_steps = args.xgblora_steps_per_iteration
        if not max_steps:
            steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
            max_steps = steps_per_epoch * args.xgblora_merge_frequency
        patience = 0
        if args.xgblora_adaptive:
            patience = args.xgblora_patience or max(1, max_steps // 4)
        self.rounds.set_limits(max_steps, patience)
        if ROUNDS in state.stateful_callbacks:
            self.rounds.load_state_dict(state.stateful_callbacks[ROUNDS])
        elif patience:
            self.rounds.dev_loss = self.dev_loss()
        state.stateful_callbacks[ROUNDS] = self.rounds.state_dict()

    def on_step_end(self, args, state, control, **kwargs):
        if self.rounds.is_over(state.global_step, self.dev_loss):
            self.end_round()
        state.stateful_callbacks[ROUNDS] = self.rounds.state_dict()


class BoostingTrainer(ResumableTrainer):
    """A Trainer that ends a round of boosting where one is over (`args.xgblora`).

    Args (besides ResumableTrainer's):
        dev_loss_fn: model -> the loss on dev rows, which `--xgblora_adaptive` goes by.
    """

    def __init__(self, *args, dev_loss_fn: Callable | None = None, **kwargs):
        self.dev_loss_fn = dev_loss_fn
        self.rounds = Rounds()
        super().__init__(*args, **kwargs)
        if self.args.xgblora:
            self.add_callback(EndRounds(self.rounds, self.dev_loss, self.end_round))
            # These come after it: a signal that arrives in a line search stops the run with this step, saved,
            # and the ranks compare merged weights.
            for kind in (StopOnSignal, DivergenceWatch):
                callback = self.pop_callback(kind)
                if callback:
                    self.add_callback(callback)

    def dev_loss(self) -> float:
        return self.dev_loss_fn(self.model)

    def end_round(self) -> float:
        """Merge the current booster; return its step length, which `--xgblora_adaptive` searches for."""
        length, step = 1.0, self.state.global_step
        if self.args.xgblora_adaptive:
            length, self.rounds.dev_loss = line_search(self.lora_module, self.dev_loss)
            logger.info("XGBLoRA: line search: step length %g, dev loss %.4f", length, self.rounds.dev_loss)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # out of accelerate's wrapper
        self.state.log_history.append(merge_round(self.lora_module, optimizer, step, length))
        self.rounds.end(step, length)
        return length

    def end_last_round(self) -> float:
        """After the last step, merge the current booster if it was trained; return its step length."""
        lora = self.lora_module
        return self.end_round() if lora and lora.xgblora and lora.is_trained() else 1.0

    def load_if_finished(self, checkpoint: str) -> bool:
        is_finished = super().load_if_finished(checkpoint)
        if is_finished and self.args.xgblora:
            self.rounds.load_state_dict(self.state.stateful_callbacks[ROUNDS])
        return is_finished
