"""A Trainer whose checkpoints are whole or not there, and which a signal stops between two steps.

The library's loop decides when to save and evaluate. What is saved here is an adapter or a model, and the state to go
on from, published in one rename; a full disk costs a checkpoint and not the run; an evaluation that a signal cuts off
is made up for. It knows nothing of what a step is.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

import utils
from boosters import peft_files
from distributed import collectives, sharding, stop_signals
from prefix import trained_prefix
from training import checkpoints

logger = logging.getLogger(__name__)

PENDING_EVAL, SIGNAL_CHECKPOINTS = (
    "owed",
    "extra",
)  # in the Trainer's state: an evaluation to be made up for; steps saved out of turn


class StopOnSignal(TrainerCallback):
    """Where a signal has come, ends the run with this step, saved; and makes up for the evaluation that one cut off."""

    def __init__(self, trainer: "ResumableTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.stateful_callbacks.pop(PENDING_EVAL, None):
            self.trainer.make_up()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.signals.agreed_signal:
            self.trainer.save_out_of_turn = not control.should_save
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """The loop comes here too where it leaves an epoch in its middle: nothing is due there."""
        if not self.trainer.signals.agreed_signal:
            return
        if float(state.epoch).is_integer() or state.global_step >= state.max_steps:
            self.trainer.save_out_of_turn &= not control.should_save
        else:
            control.should_log = control.should_evaluate = control.should_save = False


class DivergenceWatch(TrainerCallback):
    """Compares the weights of the ranks: all of them at the start, the trained ones every `every` steps."""

    def __init__(self, settings: dict, every: int):
        self.settings, self.every = settings, every

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        words = json.dumps([self.settings, state.max_steps, state.global_step], sort_keys=True).encode()
        number = float(int.from_bytes(hashlib.sha256(words).digest()[:6]))
        collectives.refuse_divergence(number, "flags or rows")
        collectives.refuse_divergence(
            collectives.tensor_fingerprint(collectives.all_tensors(model, optimizer)), "weights before the first step"
        )

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if self.every and state.global_step % self.every == 0:
            collectives.refuse_divergence(
                collectives.tensor_fingerprint(collectives.optimizer_params(optimizer)),
                f"weights after step {state.global_step}",
            )


class ResumableTrainer(Trainer):
    """Args (besides the Trainer's):
        evaluate_fn(model) -> {name: value}, logged as `eval_<name>`.
        signals: requests to stop, see checkpoint.py.
        settings: what makes this run another run than one with other values; kept in each checkpoint.

    `lora_module`: the `LoRA` whose adapters are trained; set it before `train()`. Without it a `PrefixTuning` of the
    model is trained, or all parameters that require a gradient.
    """

    def __init__(self, *args, evaluate_fn=None, settings=None, signals=None, **kwargs):
        self.evaluate_fn, self.settings = evaluate_fn, settings or {}
        self.signals, self.save_out_of_turn = signals or stop_signals.StopSignals(), False
        self.unsaved: BaseException | str | None = None  # why the last state is not on the disk
        self.lora_module = None
        self._staging = None
        self.full_state: dict | None = None  # the model's state in whole tensors, while it is written
        super().__init__(*args, **kwargs)
        # The Trainer's own limit removes the newest checkpoint at the end where another is best: a rerun would train.
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None

    @property
    def adapter(self):
        """What is trained beside a frozen model, a `LoRA` or a `PrefixTuning`; None trains parameters of the model."""
        return self.lora_module or trained_prefix(self.model)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        sharding.prepare_optimizer(self.optimizer)
        return optimizer

    # ---- evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        with self.signals.interruptible():
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluate_fn(self.model).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        """An evaluation that a signal cuts off is left, and owed: the step is saved, a rerun evaluates it first."""
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except utils.Interrupted:
            self.save_out_of_turn |= not self.control.should_save
            self.state.stateful_callbacks[PENDING_EVAL] = True
            self._save_checkpoint(model, trial)
            self.refuse_unsaved()
            raise

    def make_up(self) -> None:
        """The evaluation that was cut off at this step, as the loop does it."""
        metrics, step = self._evaluate(None, None), self.state.global_step
        if self._determine_best_metric(metrics=metrics, trial=None) and self.args.save_strategy == "best":
            extra = self.state.stateful_callbacks.get(
                SIGNAL_CHECKPOINTS, []
            )  # an undisturbed run would have saved this one
            self.state.stateful_callbacks[SIGNAL_CHECKPOINTS] = [other for other in extra if other != step]
        self._name_best()

    # ---- checkpoints ----

    def _save(self, output_dir=None, state_dict=None):
        """An adapter or a model directory, with the tokenizer; the Trainer would add a pickle of the arguments."""
        state_dict = state_dict or self.full_state
        output_dir = Path(output_dir or self.args.output_dir)
        if self.adapter:
            self.adapter.save_pretrained(output_dir)
        else:
            peft_files.remove_adapter(output_dir)  # of an earlier run: it would be loaded on top
            self.model.save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _get_output_dir(self, trial):
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        """Rank 0 writes, where all have the same weights; the others take over how it went."""
        if collectives.world_size() > 1:
            weights = collectives.tensor_fingerprint(collectives.all_tensors(self.model, self.optimizer))
            collectives.refuse_divergence(weights, f"weights at step {self.state.global_step}")
        step, extra = self.state.global_step, self.state.stateful_callbacks.pop(SIGNAL_CHECKPOINTS, [])
        if extra := [other for other in extra if other != step] + [step] * self.save_out_of_turn:
            self.state.stateful_callbacks[SIGNAL_CHECKPOINTS] = extra

        def write():
            self._write_checkpoint(model, trial)
            return self.state.best_model_checkpoint, self.unsaved and str(self.unsaved)

        self.state.best_model_checkpoint, self.unsaved = self._write_on_main(write, self.optimizer)

    def save_result(self, directory: Path) -> None:
        """Write what was trained, on rank 0."""
        self._write_on_main(lambda: self.save_model(str(directory)), None)

    def _write_on_main(self, write: Callable, optimizer):
        """Call `write` on rank 0, where whole tensors are at hand even if the ranks have divided them."""
        with sharding.full_state_dict(self.model, optimizer) as self.full_state:
            result = collectives.run_on_main(write)
        self.full_state = None
        return result

    def _write_checkpoint(self, model, trial):
        """The Trainer writes into a staging folder; what it wrote is published in one rename, then old ones go."""
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = output_dir / checkpoints.PARTIAL
        shutil.rmtree(self._staging, ignore_errors=True)
        best = self.state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
            self._name_best(name)
            written = self._staging / name
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            (written / checkpoints.SETTINGS).write_text(json.dumps(self.settings, indent=1))
            checkpoints.publish(written, output_dir / name)
        except Exception as error:
            if not checkpoints.is_disk_full(error):
                raise
            self.state.best_model_checkpoint = best
            if not self.unsaved:
                logger.warning(
                    "%s could not be saved (%s); training goes on, and the next save tries again", name, error
                )
            self.unsaved = error
        else:
            self.unsaved = None
            checkpoints.remove_old_checkpoints(output_dir, self.limit, keep=self.state.best_model_checkpoint)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def refuse_unsaved(self) -> None:
        """Raise checkpoint.Unsaved where the last state could not be written."""
        if self.unsaved:
            raise checkpoints.StateNotSaved(
                f"the last state of {self.args.output_dir} could not be saved: {self.unsaved}"
            )

    def _name_best(self, name: str | None = None) -> None:
        """Point to the best step's checkpoint, where there is one (`name` is being written); one that a signal caused
        does not count, since an undisturbed run has none."""
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        counts = self.state.best_global_step not in self.state.stateful_callbacks.get(SIGNAL_CHECKPOINTS, ())
        if counts and (best.name == name or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.adapter:
            self.adapter.load(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        logger.info("loading the best checkpoint, %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)
