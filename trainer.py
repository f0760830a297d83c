"""The training loop: Hugging Face's, with the step taken by `zo.py` or by back-propagation, and boosting on top.

`OurTrainer` overrides what a step is (`create_optimizer`, `training_step`), what an evaluation is (`evaluate`), and
what a checkpoint holds (`_save`, `_load_from_checkpoint`); the loop itself is the library's. It knows no tasks:
`loss_fn` and `evaluate_fn` are given to it. A merge happens at the end of a step, before its evaluation and checkpoint.
"""

import contextlib
import inspect
import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

import bottom
import checkpoint
import parallel
import scoring
import shares
from boosting import SEEN, Boosting, line_search, reset_rate, restart_schedule, round_ends
from check import advice, check, rounding_walk
from methods import get_method
from trajectory import Trajectory
from zo import ZerothOrder

logger = logging.getLogger(__name__)

OWED, EXTRA = "owed", "extra"  # in the Trainer's state: an evaluation to be made up for; steps saved out of turn
BUSY = 512  # tokens of a batch that keep a CPU's matrix products busy: below, copies take 0.7–0.96 of the time
TRAJECTORY = "trajectory.safetensors"


def copies(tokens: int, points: int, cpu: bool, adapters: bool, wish: str = "auto") -> int:
    """How many points one forward of a batch serves: a rule on device and tokens, so that a resume chooses the same.

    On a CPU adapters gain nothing once a batch keeps the matrix products busy (bench/step.py); full parameters always
    do, because a block of z then serves all points. Copies go through in groups within evaluation's budget.
    """
    if wish == "off" or (wish == "auto" and adapters and cpu and tokens > BUSY):
        return 1
    return max(1, min(points, scoring.TOKENS // tokens))


class Stopping(TrainerCallback):
    """Where a signal has come, ends the run with this step, saved; and makes up for the evaluation that one cut off."""

    def __init__(self, trainer: "OurTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.stateful_callbacks.pop(OWED, None):
            self.trainer.make_up()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.signals.received:
            self.trainer.save_out_of_turn = not control.should_save
            control.should_save = control.should_training_stop = True


class OurTrainer(Trainer):
    """A Trainer whose step is zeroth-order (`args.trainer == "zo"`) or regular.

    Args (besides the Trainer's):
        loss_fn(model, inputs) -> 0-dim fp32 tensor. Where it takes `copies=n` too, it returns [n] losses, of n copies
            of the batch one behind the other, and a step may ask for several at once.
        evaluate_fn(model) -> {name: value}, logged as `eval_<name>`.
        dev_loss_fn(model) -> the loss on dev rows, which `--xgblora_adaptive` goes by.
        signals: requests to stop, see checkpoint.py.
        settings: what makes this run another run than one with other values; kept in each checkpoint.

    `lora_module`: the `LoRA` whose adapters are trained; set it before `train()`. Without it a `PrefixTuning` of the
    model is trained, or all parameters that require a gradient.
    """

    def __init__(self, *args, loss_fn, evaluate_fn=None, dev_loss_fn=None, settings=None, signals=None, **kwargs):
        self.loss_fn, self.evaluate_fn, self.dev_loss_fn = loss_fn, evaluate_fn, dev_loss_fn
        self.signals, self.save_out_of_turn = signals or parallel.Signals(), False
        self.unsaved: BaseException | None = None  # why the last state is not on the disk
        self.settings = settings or {}
        self.lora_module = None
        self.store: bottom.Store | None = None
        self._staging = None
        if getattr(kwargs["model"], "is_quantized", False):  # the Trainer wants adapters there, and knows PEFT's only
            kwargs["model"]._hf_peft_config_loaded = True
        super().__init__(*args, **kwargs)
        # The Trainer's own limit removes the newest checkpoint at the end where another is best: a rerun would train.
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.model_accepts_loss_kwargs = False  # our loss is a mean: the Trainer shall divide it by the micro-batches
        self.zeroth_order = self.args.trainer == "zo"
        self.takes_copies = loss_fn is not None and "copies" in inspect.signature(loss_fn).parameters
        self.method = get_method(self.args.zo_method)(self.args.zo_queries)
        self.boosting = Boosting(self)
        if self.args.xgblora:
            self.add_callback(self.boosting)
        self.add_callback(Stopping(self))
        if parallel.size() > 1:
            self.add_callback(parallel.Watch(self.settings, self.args.rank_check_steps))
        self.exchange = shares.Exchange(self.args.zo_parallel == "queries", self.signals)

    @property
    def adapter(self):
        """What is trained beside a frozen model, a `LoRA` or a `PrefixTuning`; None trains parameters of the model."""
        return self.lora_module or scoring.trained_prefix(self.model)

    # ---- the step ----

    def create_optimizer(self, model=None):
        args, adapter = self.args, self.adapter
        if not self.zeroth_order:
            if not self.lora_module:
                return super().create_optimizer(model)
            for p in self.lora_module.parameters():  # those too that only a later round trains
                p.requires_grad_(True)
            super().create_optimizer(model)
            self.lora_module.require_grad(self.holds_a)
        elif self.optimizer is None:
            if self.lora_module:
                self.lora_module.require_grad(self.holds_a)
            if adapter:
                groups = [{"params": list(adapter.parameters())}]
            else:
                decayed = self.get_decay_parameter_names(self.model)  # matrices, not norms and biases
                named = [(name in decayed, p) for name, p in self.model.named_parameters() if p.requires_grad]
                groups = [
                    {"params": [p for _, p in run], "weight_decay": args.weight_decay if decays else 0.0}
                    for decays, run in itertools.groupby(named, key=lambda pair: pair[0])
                ]
            self.zo = self.optimizer = ZerothOrder(
                groups, args.learning_rate, args.zo_eps, args.seed, clip=args.max_grad_norm,
                normalize=args.zo_normalize, master=adapter is not None, method=self.method,
                distribution=args.zo_distribution, optim=args.zo_optim, spread=adapter.spread if adapter else None,
            )  # fmt: skip
            walk = rounding_walk(self.zo, args.learning_rate)
            if walk > 1:
                logger.warning(
                    "rounding moves these half-precision weights about %.0f x as far as the updates do (|g| = 1): "
                    "adapters (--lora, --xgblora, --prefix_tuning) or float32 keep them", walk,
                )  # fmt: skip
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        if parallel.size() > 1:
            return self.exchange.step(self, super().training_step, model, inputs)
        if not self.zeroth_order:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs, weight = self._prepare_inputs(inputs), 1 / self.current_gradient_accumulation_steps
        losses = self.ask(model, inputs, self.method.points())
        self.zo.add(losses, weight)
        return torch.tensor(math.fsum(losses) / len(losses) * weight, device=self.args.device)

    def ask(self, model, inputs, points) -> list[float]:
        """The loss of a batch at each of these points."""
        model.eval()  # dropout would differ between the forwards
        with self.compute_loss_context_manager(), self.below(inputs):
            return self.zo.losses_at(points, partial(self.loss_fn, model, inputs), self.copies(inputs, points))

    def below(self, inputs):
        """A context in which the layers below the lowest perturbed one have run already, for all points of a step."""
        found = self.lora_module.lowest if self.lora_module and self.takes_copies else None
        if not (found and found[1]):
            return contextlib.nullcontext()
        layers, first = found
        if self.store:
            hidden = self.store(inputs)
        else:
            hidden = bottom.reached(layers[first], partial(self.loss_fn, self.model, inputs))
        return contextlib.nullcontext() if hidden is None else bottom.given(layers, first, hidden)

    def cache_activations(self, plain: bool) -> None:
        """`--zo_cache_activations`: run the bottom on every training row, once for the whole run."""
        layers, first = self.lora_module.lowest
        ranks = (parallel.rank(), parallel.size()) if self.args.shares > 1 else (0, 1)

        def fill():
            self.store = bottom.Store(self.model, layers, first, self.train_dataset, plain, *ranks)

        parallel.together(fill)
        self.train_dataset = self.store.examples
        self.data_collator.stored = True

    def check(self) -> None:
        """`--zo_check`: measure on the first batch, and say what would be better."""
        self.create_optimizer()
        inputs = next(batch for batch in self.get_train_dataloader() if "input_ids" in batch)
        inputs = self._prepare_inputs(inputs)
        self.model.eval()
        for line in advice(check(self.zo, partial(self.loss_fn, self.model, inputs)), self.zo):
            logger.info(line)
        self.optimizer = None  # a resume makes it for the round that it goes on with

    def copies(self, inputs, points) -> int:
        if not self.takes_copies:
            return 1
        tokens, cpu = inputs["input_ids"].numel(), self.args.device.type == "cpu"
        return copies(tokens, len(points), cpu, self.zo.master, self.args.zo_batched)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss_fn(model, inputs) * self.exchange.part

    def _clip_grad_norm(self, model):
        return None if self.zeroth_order else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """Under `zo` the log's `grad_norm` is |g| of the coming update, before clip and normaliser."""
        if not self.zeroth_order:
            return super()._get_grad_norm(model, grad_norm)
        return self.zo.projected_grad

    def log(self, logs, start_time=None):
        if self.zeroth_order and "loss" in logs and self.args.objective:
            logs["zero_gradient_share"] = self.zo.scalars["zero"] / max(1, self.zo.scalars["step"])
        if self.zeroth_order and "loss" in logs and self.zo.scalars["skipped"]:
            logs["skipped_steps"] = self.zo.scalars["skipped"]
            self._tr_loss.nan_to_num_(0.0, 0.0, 0.0)  # a NaN that has been logged must not spoil the sums to come
        super().log(logs, start_time)

    # ---- boosting ----

    @property
    def round_start(self) -> int:
        """The step at which the round at hand began."""
        return next((e["step"] for e in reversed(self.state.log_history) if "step_length" in e), 0)

    @property
    def round_age(self) -> int:
        """Steps that the round at hand has taken."""
        return self.state.global_step - self.round_start

    @property
    def holds_a(self) -> bool:
        return self.args.xgblora and self.round_age < self.args.xgblora_a_warmup

    def dev_loss(self) -> float:
        return self.dev_loss_fn(self.model)

    def end_round(self) -> float:
        """Merge the live booster, with the step length of a line search where `--xgblora_adaptive`; returns it."""
        length = 1.0
        if self.args.xgblora_adaptive:
            length, loss = line_search(self.lora_module, self.dev_loss)
            self.state.stateful_callbacks[SEEN] = {"dev_loss": loss}
            logger.info("XGBLoRA: line search: step length %g, dev loss %.4f", length, loss)
        self.merge(length)
        return length

    def merge(self, length: float = 1.0) -> None:
        """End a boosting round; the optimizer forgets what it knew of the merged adapters."""
        lora, step = self.lora_module, self.state.global_step
        before = [p.shape for p in lora.parameters()]
        lora.merge_and_reinit(length)
        entry = {"merged_booster": len(lora.boosters)} if length else {"rejected_round": lora.round}
        self.state.log_history.append({**entry, "step_length": length, "step": step})
        if length:
            logger.info("XGBLoRA: merged booster %d at step %d", len(lora.boosters), step)
        else:
            logger.info("XGBLoRA: rejected the booster of round %d at step %d", lora.round, step)
        lora.require_grad(self.holds_a)
        if self.optimizer is None:  # a finished run, loaded again
            return
        if self.zeroth_order:
            self.zo.restart(forget=before != [p.shape for p in lora.parameters()])
        else:
            self.optimizer.optimizer.state.clear()
        if self.args.xgblora_restart_lr and self.lr_scheduler:
            reset_rate(self.lr_scheduler, self.optimizer)

    def train_a(self) -> None:
        """The warm-up of a round is over: A is trained from here on; under `zo` momentum begins anew."""
        self.lora_module.require_grad()
        if self.zeroth_order:
            self.zo.restart()

    def finish(self, keep: Callable[[], int] | None = None) -> None:
        """After the last step: merge the round at hand, keep the first `keep()` boosters, write the trajectory."""
        lora, rounds, last, kept = self.lora_module, round_ends(self.state), 1.0, None
        if lora and lora.xgblora and lora.trained():
            last = self.end_round()
        if keep:
            kept = keep()
            lora.truncate(kept)
        if not (self.zeroth_order and self.method.replayable and parallel.leads()):
            return
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        steps = int(best.rpartition("-")[2]) if best else self.state.global_step
        about = {"settings": self.settings, "rounds": rounds, "steps": steps, "last": last, "boosters": kept}
        self.zo.trajectory.save(Path(self.args.output_dir) / TRAJECTORY, **about)

    def replay(self, trajectory: Trajectory, steps: int | None = None) -> None:
        """Take the first steps of a run again, merges included, without data and without a forward pass; by default
        those of its result, which is what `finish` left."""
        self.create_optimizer()
        about, lora, warmup = trajectory.about, self.lora_module, self.args.xgblora_a_warmup
        whole, steps = steps is None, about["steps"] if steps is None else steps
        ends = dict(about["rounds"])
        thaws = {start + warmup for start in (0, *ends)}
        for first, last in itertools.pairwise(sorted(s for s in {0, *ends, *thaws, steps} if s <= steps)):
            self.zo.replay(trajectory, range(first, last))
            self.state.global_step = last
            if last in ends:
                self.merge(ends[last])
            elif warmup and self.round_age == warmup:
                self.train_a()
        if lora and lora.xgblora and lora.trained():  # the round that was at hand
            self.merge(about["last"] if whole else 1.0)
        if whole and about["boosters"] is not None:
            lora.truncate(about["boosters"])

    def create_scheduler(self, num_training_steps, optimizer=None):
        if not self.args.xgblora_restart_lr:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(self.boosting.round_steps, optimizer)
        restart_schedule(scheduler, lambda: self.round_start)
        return scheduler

    @property
    def forward_passes(self) -> int:
        """Forward passes over a batch that the steps so far took (a regular step adds a backward pass to each)."""
        points = len(self.method.points()) if self.zeroth_order else 1
        return points * self.state.global_step * self.args.gradient_accumulation_steps

    def finished(self, found) -> bool:
        """Whether a checkpoint is the end of this run; if so its state, and the best weights where asked, are taken."""
        state = TrainerState.load_from_json(str(Path(found) / TRAINER_STATE_NAME))
        if state.global_step < self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]:
            return False
        self.state = state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(str(Path(found).parent / Path(best).name) if best else str(found))
        if self.zeroth_order:
            self.create_optimizer()
            saved = torch.load(Path(found) / "optimizer.pt", weights_only=True)
            self.zo.trajectory = Trajectory(**saved["trajectory"])
        return True

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
        except checkpoint.Interrupted:
            self.save_out_of_turn |= not self.control.should_save
            self.state.stateful_callbacks[OWED] = True
            self._save_checkpoint(model, trial)
            raise

    def make_up(self) -> None:
        """The evaluation that was cut off at this step, as the loop does it."""
        metrics = self._evaluate(None, None)
        self._determine_best_metric(metrics=metrics, trial=None)
        self._name_best()

    # ---- checkpoints ----

    def _save(self, output_dir=None, state_dict=None):
        """An adapter or a model directory, with the tokenizer; the Trainer would add a pickle of the arguments."""
        output_dir = Path(output_dir or self.args.output_dir)
        if self.adapter:
            self.adapter.save_pretrained(output_dir)
        else:
            self.model.save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _get_output_dir(self, trial):
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        """Rank 0 writes, where all have the same weights; the others take over how it went."""
        if parallel.size() > 1:
            weights = parallel.fingerprint(parallel.everything(self.model, self.optimizer))
            parallel.refuse_divergence(weights, f"weights at step {self.state.global_step}")
        if self.save_out_of_turn:
            self.state.stateful_callbacks.setdefault(EXTRA, []).append(self.state.global_step)

        def write():
            self._write_checkpoint(model, trial)
            return self.state.best_model_checkpoint, self.unsaved and str(self.unsaved)

        self.state.best_model_checkpoint, self.unsaved = parallel.first(write)

    def _write_checkpoint(self, model, trial):
        """The Trainer writes into a staging folder; what it wrote is published in one rename, then old ones go."""
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = output_dir / checkpoint.PARTIAL
        shutil.rmtree(self._staging, ignore_errors=True)
        best = self.state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
            self._name_best(name)
            written = self._staging / name
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            (written / checkpoint.SETTINGS).write_text(json.dumps(self.settings, indent=1))
            checkpoint.publish(written, output_dir / name)
        except Exception as error:
            if not checkpoint.is_full(error):
                raise
            self.state.best_model_checkpoint = best
            if not self.unsaved:
                logger.warning(
                    "%s could not be saved (%s); training goes on, and the next save tries again", name, error
                )
            self.unsaved = error
        else:
            self.unsaved = None
            checkpoint.rotate(output_dir, self.limit, keep=self.state.best_model_checkpoint)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def refuse_unsaved(self) -> None:
        """Raise checkpoint.Unsaved where the last state could not be written."""
        if self.unsaved:
            raise checkpoint.Unsaved(f"the last state of {self.args.output_dir} could not be saved: {self.unsaved}")

    def _name_best(self, name: str | None = None) -> None:
        """Point to the best step's checkpoint, where there is one (`name` is being written); one that a signal caused
        does not count, since an undisturbed run has none."""
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        counts = self.state.best_global_step not in self.state.stateful_callbacks.get(EXTRA, ())
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
