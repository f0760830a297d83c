"""The training loop: Hugging Face's, with the step taken by `zo.py` or by back-propagation, and boosting on top.

`OurTrainer` overrides what a step is (`create_optimizer`, `training_step`), saving.py what an evaluation is and what a
checkpoint holds; the loop itself is the library's. It knows no tasks: `loss_fn` and `evaluate_fn` are given to it. A
merge happens at the end of a step, before its evaluation and checkpoint.
"""

import contextlib
import inspect
import itertools
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from boosters.rounds import SEEN, Boosting, line_search, reset_rate, restart_schedule, round_ends
from cli.validation import find_method
from distributed import collectives, data_parallel
from scoring import packing
from training import activation_cache
from training.resumable_trainer import PENDING_EVAL, DivergenceWatch, ResumableTrainer, StopOnSignal
from utils import UsageError
from zo.diagnostics import diagnose, recommendations, rounding_drift
from zo.optimizer import ZerothOrder
from zo.trajectory import Trajectory

logger = logging.getLogger(__name__)

SATURATING_TOKENS = (
    512  # tokens of a batch that keep a CPU's matrix products busy: below, copies take 0.7–0.96 of the time
)
TRAJECTORY = "trajectory.safetensors"


def points_per_forward(tokens: int, points: int, cpu: bool, adapters: bool, wish: str = "auto") -> int:
    """How many points one forward of a batch serves: a rule on device and tokens, so that a resume chooses the same.

    On a CPU adapters gain nothing once a batch keeps the matrix products busy (bench/step.py); full parameters always
    do, because a block of z then serves all points. Copies go through in groups within evaluation's budget.
    """
    if wish == "off" or (wish == "auto" and adapters and cpu and tokens > SATURATING_TOKENS):
        return 1
    return max(1, min(points, packing.MAX_TOKENS // tokens))


class OurTrainer(ResumableTrainer):
    """A Trainer whose step is zeroth-order (`args.trainer == "zo"`) or regular.

    Args (besides SavingTrainer's):
        loss_fn(model, inputs) -> 0-dim fp32 tensor. Where it takes `copies=n` too, it returns [n] losses, of n copies
            of the batch one behind the other, and a step may ask for several at once.
        dev_loss_fn(model) -> the loss on dev rows, which `--xgblora_adaptive` goes by.
    """

    def __init__(self, *args, loss_fn, dev_loss_fn=None, **kwargs):
        self.loss_fn, self.dev_loss_fn = loss_fn, dev_loss_fn
        self.store: activation_cache.ActivationCache | None = None
        self.fraction = 1.0  # of a step's loss that is this micro-batch's, and this rank's
        if getattr(kwargs["model"], "is_quantized", False):  # the Trainer wants adapters there, and knows PEFT's only
            kwargs["model"]._hf_peft_config_loaded = True
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # our loss is a mean: the Trainer shall divide it by the micro-batches
        self.zeroth_order = self.args.trainer == "zo"
        self.takes_copies = loss_fn is not None and "copies" in inspect.signature(loss_fn).parameters
        self.method = find_method(self.args.zo_method)(self.args.zo_queries)
        self.boosting = Boosting(self)
        if self.args.xgblora:
            self.add_callback(self.boosting)
        self.add_callback(StopOnSignal(self))
        if collectives.world_size() > 1:
            self.add_callback(DivergenceWatch(self.settings, self.args.rank_check_steps))
        self.exchange = data_parallel.LossAllGather(self.args.zo_parallel == "queries", self.signals)

    # ---- the step ----

    def create_optimizer(self, model=None):
        args, adapter = self.args, self.adapter
        if not self.zeroth_order:
            for p in self.lora_module.parameters() if self.lora_module else ():  # those too that a later round trains
                p.requires_grad_(True)
            try:
                super().create_optimizer(model)
            except (ValueError, ImportError) as error:
                raise UsageError(f"--optim {args.optim}: {error}") from error
            if self.lora_module:
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
                distribution=args.zo_distribution, optim=args.zo_optim,
                set_perturbations=adapter.set_perturbations if adapter else None,
            )  # fmt: skip
            walk = rounding_drift(self.zo, args.learning_rate)
            if walk > 1:
                logger.warning(
                    "rounding moves these half-precision weights about %.0f x as far as the updates do (|g| = 1): "
                    "adapters (--lora, --xgblora, --prefix_tuning) or float32 keep them", walk,
                )  # fmt: skip
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and how much all of them count: the last one of an epoch may be short."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(batch.get("weight", 1) for batch in batches)

    def training_step(self, model, inputs, num_items_in_batch=None):
        weight = inputs.pop("weight", 1)
        self.fraction = weight / (num_items_in_batch or weight * self.current_gradient_accumulation_steps)
        if collectives.world_size() > 1:
            return self.shared_step(super().training_step, model, inputs)
        if not self.zeroth_order:
            return super().training_step(model, inputs, num_items_in_batch)
        losses = self.ask(model, self._prepare_inputs(inputs), self.method.points())
        self.zo.add_losses(losses, self.fraction)
        return torch.tensor(math.fsum(losses) / len(losses) * self.fraction, device=self.args.device)

    def shared_step(self, regular: Callable, model, inputs):
        """`training_step` of one of several ranks; `regular(model, inputs)` is the library's. The exchange, and the
        loss that is returned, come with the last micro-batch."""
        inputs, exchange, zo = self._prepare_inputs(inputs), self.exchange, self.zeroth_order
        self.fraction, load = self.fraction * inputs.pop("part"), inputs.pop("tokens")
        points = self.method.points() if zo else [(0, 0.0)]
        mine, losses = exchange.points_of_rank(points), []
        if inputs and mine and zo:
            losses = [self.fraction * loss for loss in self.ask(model, inputs, [points[i] for i in mine])]
        elif inputs and mine:
            losses = [float(regular(model, inputs))]  # compute_loss has multiplied by it
        exchange.add(dict(zip(mine, losses, strict=True)) if losses else {}, len(points), load * len(mine))
        totals = [0.0]
        if self.accelerator.sync_gradients:
            totals = exchange.total()
            if zo:
                self.zo.add_losses(totals)
            else:
                data_parallel.sum_gradients(
                    [p for p in collectives.optimizer_params(self.optimizer) if p.requires_grad]
                )
        return torch.tensor(math.fsum(totals) / len(totals), device=self.args.device)

    def ask(self, model, inputs, points) -> list[float]:
        """The loss of a batch at each of these points."""
        model.eval()  # dropout would differ between the forwards
        with self.compute_loss_context_manager(), self.below(inputs):
            return self.zo.losses_at(points, partial(self.loss_fn, model, inputs), self.copies(inputs, points))

    def below(self, inputs):
        """A context in which the layers below the lowest perturbed one have run already, for all points of a step."""
        found = self.lora_module.first_adapted_layer if self.lora_module and self.takes_copies else None
        if not (found and found[1]):
            return contextlib.nullcontext()
        layers, first = found
        if self.store:
            hidden = self.store(inputs)
        else:
            hidden = activation_cache.capture_hidden_states(layers[first], partial(self.loss_fn, self.model, inputs))
        return contextlib.nullcontext() if hidden is None else activation_cache.skip_lower_layers(layers, first, hidden)

    def cache_activations(self, plain: bool) -> None:
        """`--zo_cache_activations`: run the bottom on every training row, once for the whole run."""
        layers, first = self.lora_module.first_adapted_layer
        ranks = (collectives.rank(), collectives.world_size()) if self.args.shares > 1 else (0, 1)

        def fill():
            self.store = activation_cache.ActivationCache(self.model, layers, first, self.train_dataset, plain, *ranks)

        collectives.run_on_all(fill)
        self.train_dataset = self.store.examples
        self.data_collator.is_local = lambda row: row.places is not None

    def check(self) -> None:
        """`--zo_check`: measure on the first batch, and say what would be better."""
        self.create_optimizer()
        inputs = next(batch for batch in self.get_train_dataloader() if "input_ids" in batch)
        inputs = self._prepare_inputs(inputs)
        self.model.eval()
        try:
            diagnosis = diagnose(self.zo, partial(self.loss_fn, self.model, inputs))
        except ValueError as error:
            raise UsageError(f"--zo_check: {error}") from error
        for line in recommendations(diagnosis, self.zo):
            logger.info(line)
        self.optimizer = None  # a resume may go on in a later round, of other shapes, and makes its own

    def copies(self, inputs, points) -> int:
        if not self.takes_copies:
            return 1
        tokens, cpu = inputs["input_ids"].numel(), self.args.device.type == "cpu"
        return points_per_forward(tokens, len(points), cpu, self.zo.master, self.args.zo_batched)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss_fn(model, inputs) * (self.fraction * self.current_gradient_accumulation_steps)  # it divides

    def _clip_grad_norm(self, model):
        return None if self.zeroth_order else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """Under `zo` the log's `grad_norm` is |g| of the coming update, before clip and normaliser."""
        if not self.zeroth_order:
            return super()._get_grad_norm(model, grad_norm)
        return self.zo.projected_grad

    def log(self, logs, start_time=None):
        if self.zeroth_order and "loss" in logs and self.args.objective:
            logs["zero_gradient_share"] = self.zo.counts.zero / max(1, self.zo.counts.step)
        if self.zeroth_order and "loss" in logs and self.zo.counts.skipped:
            logs["skipped_steps"] = self.zo.counts.skipped
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
        if lora and lora.xgblora and lora.is_trained():
            last = self.end_round()
        if keep:
            kept = keep()
            lora.truncate(kept)
        if not (self.zeroth_order and self.method.replayable and collectives.is_main_process()):
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
        if lora and lora.xgblora and lora.is_trained():  # the round that was at hand
            self.merge(about["last"] if whole else 1.0)
        if whole and about["boosters"] is not None:
            lora.truncate(about["boosters"])

    def create_scheduler(self, num_training_steps, optimizer=None):
        restarts = self.args.xgblora_restart_lr
        try:
            scheduler = super().create_scheduler(
                self.boosting.round_steps if restarts else num_training_steps, optimizer
            )
        except (ValueError, TypeError) as error:  # what its --lr_scheduler_kwargs lack, or have
            raise UsageError(f"--lr_scheduler_type {self.args.lr_scheduler_type.value}: {error}") from error
        if not restarts:
            return scheduler
        restart_schedule(scheduler, lambda: self.round_start)
        return scheduler

    @property
    def forward_passes(self) -> int:
        """Forward passes over a batch that the steps so far took (a regular step adds a backward pass to each)."""
        points, of_step = len(self.method.points()) if self.zeroth_order else 1, self.args.gradient_accumulation_steps
        batches = len(self.get_train_dataloader())
        epochs, left = divmod(self.state.global_step, math.ceil(batches / of_step))
        return points * (epochs * batches + left * of_step)  # the last step of an epoch may be a short one

    def finished(self, found) -> bool:
        """Whether a checkpoint is the end of this run; if so its state, and the best weights where asked, are taken."""
        state = TrainerState.load_from_json(str(Path(found) / TRAINER_STATE_NAME))
        last = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if state.global_step < last:
            return False
        if state.global_step > last:
            raise UsageError(
                f"{Path(found).parent} holds a run of {state.global_step} steps, longer than the {last} "
                "asked for: --output_dir other, or --overwrite"
            )
        self.state = state
        if state.stateful_callbacks.pop(PENDING_EVAL, None):
            self._load_from_checkpoint(str(found))
            self.make_up()
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(str(Path(found).parent / Path(best).name) if best else str(found))
        if self.zeroth_order:
            self.create_optimizer()
            saved = torch.load(Path(found) / "optimizer.pt", weights_only=True)
            self.zo.trajectory = Trajectory(**saved["trajectory"])
        return True
