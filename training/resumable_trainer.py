"""A Trainer whose checkpoints are whole or not there, and which a signal stops between two steps.

The library's loop decides when to save and to evaluate. What is saved here is an adapter or a model, and the
state to go on from, published in one rename. A full disk costs a checkpoint and not the run. An evaluation
that a signal cuts off is pending: a rerun begins with it. Nothing here knows what a step is.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from boosters import peft_files
from distributed import collectives, sharding, stop_signals
from prefix import trained_prefix
from training import checkpoints
from utils import Interrupted, UsageError

logger = logging.getLogger(__name__)

# Entries of the Trainer's state, and so of each checkpoint:
PENDING_EVAL = "pending_evaluation"  # True where a signal cut off the evaluation of the checkpoint's step
SIGNAL_CHECKPOINTS = "signal_checkpoints"  # steps that were saved for a signal alone


class StopOnSignal(TrainerCallback):
    """Ends a run that was asked to stop after its current step, saved; begins with a pending evaluation.

    Args:
        signals: requests to stop.
        run_pending_evaluation: evaluates the step of the checkpoint that the run goes on from.

    Attributes:
        saved_by_signal: whether the current step is saved for a signal alone.
    """

    def __init__(self, signals: stop_signals.StopSignals, run_pending_evaluation: Callable[[], None]):
        self.signals = signals
        self.run_pending_evaluation = run_pending_evaluation
        self.saved_by_signal = False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.stateful_callbacks.pop(PENDING_EVAL, None):
            self.run_pending_evaluation()

    def on_step_end(self, args, state, control, **kwargs):
        if self.signals.agreed_signal:
            self.saved_by_signal = not control.should_save
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save at the end of an epoch; the loop also comes here in mid-epoch, where nothing is due."""
        if not self.signals.agreed_signal:
            return
        if float(state.epoch).is_integer() or state.global_step >= state.max_steps:
            self.saved_by_signal &= not control.should_save
        else:
            control.should_log = control.should_evaluate = control.should_save = False


class DivergenceWatch(TrainerCallback):
    """Compares the weights of the ranks: all of them at the start, the trained ones every `every` steps."""

    def __init__(self, settings: dict, every: int):
        self.settings = settings
        self.every = every

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        words = json.dumps([self.settings, state.max_steps, state.global_step], sort_keys=True).encode()
        number = float(int.from_bytes(hashlib.sha256(words).digest()[:6]))
        collectives.refuse_divergence(number, "flags or rows")
        refuse_other_weights(collectives.all_tensors(model, optimizer), "weights before the first step")

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if self.every and state.global_step % self.every == 0:
            tensors = collectives.optimizer_params(optimizer)
            refuse_other_weights(tensors, f"weights after step {state.global_step}")


def refuse_other_weights(tensors: list[Tensor], name: str) -> None:
    """Raise Diverged, naming the ranks, where not all ranks have the same tensors."""
    collectives.refuse_divergence(collectives.tensor_fingerprint(tensors), name)


class ResumableTrainer(Trainer):
    """A Trainer that goes on from its newest checkpoint as if nothing had happened.

    Args (besides the Trainer's):
        evaluate_fn: model -> {name: value}, logged as `eval_<name>`.
        settings: what makes this run another run than one with other values; kept in each checkpoint.
        signals: requests to stop, see distributed/stop_signals.py.

    Set `lora_module`, the `LoRA` whose adapters are trained, before `train()`. Without it a `PrefixTuning` of
    the model is trained, or all parameters that require a gradient.
    """

    def __init__(self, *args, evaluate_fn=None, settings=None, signals=None, **kwargs):
        self.evaluate_fn = evaluate_fn
        self.settings = settings or {}
        self.signals = signals or stop_signals.StopSignals()
        self.unsaved: BaseException | str | None = None  # why the last state is not on the disk
        self.lora_module = None
        self._staging: Path | None = None
        self._full_state: dict | None = None  # the model's state in whole tensors, while it is written
        super().__init__(*args, **kwargs)
        # The library's limit may remove the newest checkpoint, where another is best: a rerun would train.
        self.checkpoint_limit = self.args.save_total_limit
        self.args.save_total_limit = None
        self.stop_on_signal = StopOnSignal(self.signals, self.run_pending_evaluation)
        self.add_callback(self.stop_on_signal)
        if collectives.world_size() > 1:
            self.add_callback(DivergenceWatch(self.settings, self.args.rank_check_steps))

    @property
    def adapter(self):
        """Return the module that is trained beside a frozen model: a `LoRA`, a `PrefixTuning`, or None."""
        return self.lora_module or trained_prefix(self.model)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        sharding.prepare_optimizer(self.optimizer)
        return optimizer

    # ---- evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        with self.signals.interruptible():
            values = self.evaluate_fn(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        """Log, save and evaluate; save the step with the evaluation pending where a signal cuts it off."""
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Interrupted:
            self.stop_on_signal.saved_by_signal |= not self.control.should_save
            self.state.stateful_callbacks[PENDING_EVAL] = True
            self._save_checkpoint(model, trial)
            self.refuse_unsaved()
            raise

    def run_pending_evaluation(self) -> None:
        """Evaluate the current step, whose evaluation a signal cut off, as the loop would have done."""
        metrics = self._evaluate(None, None)
        if self._determine_best_metric(metrics=metrics, trial=None) and self.args.save_strategy == "best":
            # An undisturbed run would have saved this step.
            steps = self.state.stateful_callbacks.get(SIGNAL_CHECKPOINTS, [])
            steps = [step for step in steps if step != self.state.global_step]
            self.state.stateful_callbacks[SIGNAL_CHECKPOINTS] = steps
        self._set_best_checkpoint()

    # ---- checkpoints ----

    def _save(self, output_dir=None, state_dict=None):
        """Write an adapter or a model directory, with the tokenizer; the library would add a pickle."""
        output_dir = Path(output_dir or self.args.output_dir)
        if self.adapter:
            self.adapter.save_pretrained(output_dir)
        else:
            peft_files.remove_adapter(output_dir)  # of an earlier run: it would be loaded on top
            self.model.save_pretrained(output_dir, state_dict=state_dict or self._full_state)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _get_output_dir(self, trial):
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        """Let rank 0 write a checkpoint, and tell the other ranks whether the disk took it."""
        step = self.state.global_step
        if collectives.world_size() > 1:
            tensors = collectives.all_tensors(self.model, self.optimizer)
            refuse_other_weights(tensors, f"weights at step {step}")
        steps = self.state.stateful_callbacks.pop(SIGNAL_CHECKPOINTS, [])
        steps = [saved_step for saved_step in steps if saved_step != step]
        if self.stop_on_signal.saved_by_signal:
            steps.append(step)
        if steps:
            self.state.stateful_callbacks[SIGNAL_CHECKPOINTS] = steps

        def write():
            self._write_checkpoint(model, trial)
            return self.state.best_model_checkpoint, self.unsaved and str(self.unsaved)

        self.state.best_model_checkpoint, self.unsaved = self._write_on_main(write, self.optimizer)

    def save_result(self, directory: Path) -> None:
        """Write what was trained, on rank 0."""
        self._write_on_main(lambda: self.save_model(str(directory)), None)

    def _write_on_main(self, write: Callable, optimizer):
        """Call `write` on rank 0, where whole tensors are at hand even if the ranks have divided them."""
        with sharding.full_state_dict(self.model, optimizer) as self._full_state:
            result = collectives.run_on_main(write)
        self._full_state = None
        return result

    def _write_checkpoint(self, model, trial):
        """Let the library write a staging folder, publish that in one rename, and remove old checkpoints."""
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = output_dir / checkpoints.PARTIAL
        shutil.rmtree(self._staging, ignore_errors=True)
        best_checkpoint = self.state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
            self._set_best_checkpoint(name)
            staged_checkpoint = self._staging / name
            self.state.save_to_json(str(staged_checkpoint / TRAINER_STATE_NAME))
            checkpoints.write_settings(staged_checkpoint, self.settings)
            checkpoints.publish(staged_checkpoint, output_dir / name)
        except Exception as error:
            if not checkpoints.is_disk_full(error):
                raise
            self.state.best_model_checkpoint = best_checkpoint
            if not self.unsaved:
                message = "%s could not be saved (%s); training goes on, and the next save tries again"
                logger.warning(message, name, error)
            self.unsaved = error
        else:
            self.unsaved = None
            best_checkpoint = self.state.best_model_checkpoint
            checkpoints.remove_old_checkpoints(output_dir, self.checkpoint_limit, keep=best_checkpoint)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def refuse_unsaved(self) -> None:
        """Raise StateNotSaved where the last state could not be written."""
        if self.unsaved:
            reason = f"the last state of {self.args.output_dir} could not be saved: {self.unsaved}"
            raise checkpoints.StateNotSaved(reason)

    def _set_best_checkpoint(self, new_name: str | None = None) -> None:
        """Point to the checkpoint of the best step, if there is one; `new_name` is the one being written.

        A checkpoint that a signal caused does not count, since an undisturbed run has none.
        """
        best_path = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        counts = self.state.best_global_step not in self.state.stateful_callbacks.get(SIGNAL_CHECKPOINTS, ())
        if counts and (best_path.name == new_name or best_path.is_dir()):
            self.state.best_model_checkpoint = str(best_path)

    @property
    def best_checkpoint(self) -> str | None:
        """The checkpoint that is the run's result (`--load_best_model_at_end`); None: the last step is."""
        return self.state.best_model_checkpoint if self.args.load_best_model_at_end else None

    def load_if_finished(self, checkpoint: str) -> bool:
        """Return whether a checkpoint is the end of this run; if so take its state and the result's weights.

        Raises UsageError where the checkpoint is of a longer run.
        """
        folder = Path(checkpoint).parent
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        last_step = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if state.global_step < last_step:
            return False
        if state.global_step > last_step:
            raise UsageError(
                f"{folder} holds a run of {state.global_step} steps, longer than the {last_step} "
                "asked for: --output_dir other, or --overwrite"
            )
        self.state = state
        if state.stateful_callbacks.pop(PENDING_EVAL, None):
            self._load_from_checkpoint(checkpoint)
            self.run_pending_evaluation()
        best = self.best_checkpoint  # whose folder may have moved
        self._load_from_checkpoint(str(folder / Path(best).name) if best else checkpoint)
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.adapter:
            self.adapter.load(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        logger.info("loading the best checkpoint, %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)
