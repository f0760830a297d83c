"""The training loop: Hugging Face's, with a step by `zo/` or by back-propagation, and boosting on top.

`OurTrainer` says what a step is (`create_optimizer`, `training_step`). training/boosting_trainer.py ends the
rounds of boosting, training/resumable_trainer.py says what an evaluation is and what a checkpoint holds, and
the loop itself is the library's. The trainer knows no tasks: it is given `loss_fn` and `evaluate_fn`.
"""

import inspect
import itertools
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from cli.validation import find_method
from distributed import collectives, data_parallel
from scoring import packing
from training import activation_cache
from training.boosting_trainer import BoostingTrainer
from training.replay import replay_rounds
from utils import UsageError
from zo.diagnostics import diagnose, recommendations, rounding_drift
from zo.methods import Method
from zo.optimizer import ZerothOrder
from zo.trajectory import Trajectory

logger = logging.getLogger(__name__)

# Tokens of a batch that keep a CPU's matrix products busy: with fewer, several copies in one forward take
# 0.7–0.96 of the time of as many forwards.
SATURATING_TOKENS = 512
TRAJECTORY = "trajectory.safetensors"


def points_per_forward(tokens: int, points: int, cpu: bool, adapters: bool, batched: str = "auto") -> int:
    """Return how many points one forward of a batch serves.

    This is a rule and never a timing, so that a resume chooses the same.
    On a CPU adapters gain nothing once a batch keeps the matrix products busy (bench/step.py). Full
    parameters always gain, because a block of z then serves all points. The copies of a batch stay within
    evaluation's budget of tokens.

    Args:
        tokens: of the batch.
        points: of the step.
        cpu: whether the model runs on a CPU.
        adapters: whether adapters are trained, and not the weights themselves.
        batched: the value of `--zo_batched`.
    """
    if batched == "off" or (batched == "auto" and adapters and cpu and tokens > SATURATING_TOKENS):
        return 1
    return max(1, min(points, packing.MAX_TOKENS // tokens))


class OurTrainer(BoostingTrainer):
    """A Trainer whose step is zeroth-order (`args.trainer == "zo"`) or regular.

    Args (besides BoostingTrainer's):
        loss_fn: (model, inputs) -> 0-dim fp32 tensor. Where it takes `copies=n` too, it returns [n] losses,
            of n copies of the batch one behind the other, and one forward may serve several points.
    """

    # The library divides the loss of a micro-batch by their number: `compute_loss` multiplies by it.
    loss_is_scaled_for_ga = False

    def __init__(self, *args, loss_fn, **kwargs):
        self.loss_fn = loss_fn
        self.loss_takes_copies = loss_fn is not None and "copies" in inspect.signature(loss_fn).parameters
        self.loss_weight = 1.0  # of a step's loss, the part of this micro-batch on this rank
        self.activation_cache: activation_cache.ActivationCache | None = None
        if getattr(kwargs["model"], "is_quantized", False):
            # The library wants adapters on a quantised model, and knows PEFT's only.
            kwargs["model"]._hf_peft_config_loaded = True
        super().__init__(*args, **kwargs)
        self.zeroth_order = self.args.trainer == "zo"
        self.method = find_method(self.args.zo_method)(self.args.zo_queries)
        self.exchange = data_parallel.LossAllGather(self.args.zo_parallel == "queries", self.signals)

    # ---- the step ----

    def create_optimizer(self, model=None):
        if not self.zeroth_order:
            return self._create_regular_optimizer(model)
        if self.optimizer is None:
            decayed_names = self.get_decay_parameter_names(self.model)  # matrices, not norms and biases
            self.zo = create_zeroth_order(self.model, self.adapter, decayed_names, self.method, self.args)
            self.optimizer = self.zo
        return self.optimizer

    def _create_regular_optimizer(self, model):
        if self.lora_module:
            for p in self.lora_module.parameters():  # those too that only a later round trains
                p.requires_grad_(True)
        try:
            super().create_optimizer(model)
        except (ValueError, ImportError) as error:
            raise UsageError(f"--optim {self.args.optim}: {error}") from error
        if self.lora_module:
            self.lora_module.require_grad()
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (ValueError, TypeError) as error:  # what its --lr_scheduler_kwargs lack, or have
            raise UsageError(f"--lr_scheduler_type {self.args.lr_scheduler_type.value}: {error}") from error

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step and their weight in all: the last of an epoch may be short."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(batch.get("weight", 1) for batch in batches)

    def training_step(self, model, inputs, num_items_in_batch=None):
        weight = inputs.pop("weight", 1)
        self.loss_weight = weight / (num_items_in_batch or weight * self.current_gradient_accumulation_steps)
        if collectives.world_size() > 1:
            return self.shared_step(super().training_step, model, inputs)
        if not self.zeroth_order:
            return super().training_step(model, inputs, num_items_in_batch)
        losses = self.losses_at_points(model, self._prepare_inputs(inputs), self.method.points())
        self.zo.add_losses(losses, self.loss_weight)
        return torch.tensor(math.fsum(losses) / len(losses) * self.loss_weight, device=self.args.device)

    def shared_step(self, regular_step: Callable, model, inputs):
        """Take the `training_step` of one of several ranks; `regular_step` is the library's.

        The ranks exchange their losses with the last micro-batch, which returns the loss of the whole step.
        """
        inputs = self._prepare_inputs(inputs)
        self.loss_weight *= inputs.pop("part")
        tokens = inputs.pop("tokens")
        points = self.method.points() if self.zeroth_order else [(0, 0.0)]
        numbers = self.exchange.points_of_rank(points)
        losses = []
        if inputs and numbers and self.zeroth_order:
            rank_losses = self.losses_at_points(model, inputs, [points[i] for i in numbers])
            losses = [self.loss_weight * loss for loss in rank_losses]
        elif inputs and numbers:
            losses = [float(regular_step(model, inputs))]  # `compute_loss` has multiplied by the weight
        loss_of_point = dict(zip(numbers, losses, strict=True)) if losses else {}
        self.exchange.add(loss_of_point, len(points), tokens * len(numbers))
        totals = [0.0]
        if self.accelerator.sync_gradients:
            totals = self.exchange.total_losses()
            if self.zeroth_order:
                self.zo.add_losses(totals)
            else:
                params = collectives.optimizer_params(self.optimizer)
                data_parallel.sum_gradients([p for p in params if p.requires_grad])
        return torch.tensor(math.fsum(totals) / len(totals), device=self.args.device)

    def losses_at_points(self, model, inputs, points: list[tuple[int, float]]) -> list[float]:
        """Return the loss of a batch at each (query, factor of eps)."""
        model.eval()  # dropout would differ between the forwards
        copies = 1
        if self.loss_takes_copies:
            tokens, cpu = inputs["input_ids"].numel(), self.args.device.type == "cpu"
            copies = points_per_forward(tokens, len(points), cpu, self.zo.master, self.args.zo_batched)
        forward = partial(self.loss_fn, model, inputs)
        with self.compute_loss_context_manager(), self.lower_layers_context(inputs, forward):
            return self.zo.losses_at(points, forward, copies)

    def lower_layers_context(self, inputs, forward: Callable):
        """Return a context in which the layers below all perturbed ones have run already, for all points."""
        can_skip = self.lora_module and self.loss_takes_copies
        place = self.lora_module.first_adapted_layer if can_skip else None
        hidden_states = self.activation_cache(inputs) if self.activation_cache else None
        return activation_cache.reuse_lower_layers(place, forward, hidden_states)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss_fn(model, inputs) * (self.loss_weight * self.current_gradient_accumulation_steps)

    def _clip_grad_norm(self, model):
        return None if self.zeroth_order else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the log's `grad_norm`: under `zo` |g| of the coming update, before clip and normaliser."""
        return self.zo.projected_grad if self.zeroth_order else super()._get_grad_norm(model, grad_norm)

    def log(self, logs, start_time=None):
        if self.zeroth_order and "loss" in logs:
            counts = self.zo.counts
            if self.args.objective:
                logs["zero_gradient_share"] = counts.zero / max(1, counts.step)
            if counts.skipped:
                logs["skipped_steps"] = counts.skipped
                # A NaN that has been logged must not spoil the sums to come.
                self._tr_loss.nan_to_num_(0.0, 0.0, 0.0)
        super().log(logs, start_time)

    # ---- before the first step ----

    def cache_activations(self, plain_rows: bool) -> None:
        """Run the lower layers on every training row, once for the whole run (`--zo_cache_activations`)."""
        place = self.lora_module.first_adapted_layer
        ranks = (collectives.rank(), collectives.world_size()) if self.args.data_parallel_size > 1 else (0, 1)

        def fill():
            arguments = (*place, self.train_dataset, plain_rows, *ranks)
            self.activation_cache = activation_cache.ActivationCache(self.model, *arguments)

        collectives.run_on_all(fill)
        self.train_dataset = self.activation_cache.examples
        self.data_collator.is_local = lambda row: row.cache_rows is not None

    def log_diagnosis(self) -> None:
        """Measure eps, step size and rounding on the first batch, and log what is better (`--zo_check`)."""
        self.create_optimizer()
        inputs = next(batch for batch in self.get_train_dataloader() if "input_ids" in batch)
        self.model.eval()
        log_recommendations(self.zo, partial(self.loss_fn, self.model, self._prepare_inputs(inputs)))
        self.optimizer = None  # a resume may go on in a later round, of other shapes, and makes its own

    # ---- the end of a run ----

    def finish(self, choose_boosters: Callable[[], int] | None = None) -> None:
        """After the last step, merge the current booster, shorten the chain, and write the trajectory.

        Args:
            choose_boosters: returns how many boosters of the finished chain to keep; without it all are kept.
        """
        ended = list(self.rounds.ended)
        last_length = self.end_last_round()
        boosters = choose_boosters() if choose_boosters else None
        if boosters is not None:
            self.lora_module.chain.truncate(boosters)
        if self.zeroth_order and self.method.replayable and collectives.is_main_process():
            best_checkpoint = self.best_checkpoint
            steps = int(best_checkpoint.rpartition("-")[2]) if best_checkpoint else self.state.global_step
            about = {"rounds": ended, "steps": steps, "last": last_length, "boosters": boosters}
            path = Path(self.args.output_dir) / TRAJECTORY
            self.zo.trajectory.save(path, settings=self.settings, **about)

    def load_if_finished(self, checkpoint: str) -> bool:
        is_finished = super().load_if_finished(checkpoint)
        if is_finished and self.zeroth_order:
            self.create_optimizer()
            optimizer_state = torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True)
            self.zo.trajectory = Trajectory(**optimizer_state["trajectory"])
        return is_finished

    def replay(self, trajectory: Trajectory, steps: int | None = None) -> None:
        """Rebuild the weights of a run; by default those of its result. See training/replay.py."""
        replay_rounds(trajectory, self.create_optimizer(), self.lora_module, steps)

    @property
    def forward_passes(self) -> int:
        """Forward passes over a batch in the steps so far (a regular step adds a backward pass to each)."""
        points = len(self.method.points()) if self.zeroth_order else 1
        accumulated = self.args.gradient_accumulation_steps
        batches = len(self.get_train_dataloader())
        epochs, steps = divmod(self.state.global_step, math.ceil(batches / accumulated))
        # The last step of an epoch may be a short one.
        return points * (epochs * batches + steps * accumulated)


def parameter_groups(model, adapter, decayed_names: set[str], weight_decay: float) -> list[dict]:
    """Return what is trained, in the model's order: z runs through the groups one after the other."""
    if adapter:
        return [{"params": list(adapter.parameters())}]
    trained_params = [(name in decayed_names, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for _, p in neighbours], "weight_decay": weight_decay if decays else 0.0}
        for decays, neighbours in itertools.groupby(trained_params, key=lambda entry: entry[0])
    ]


def create_zeroth_order(model, adapter, decayed_names: set[str], method: Method, args) -> ZerothOrder:
    """Return the zeroth-order optimizer of an adapter, or of all parameters that require a gradient.

    Args:
        decayed_names: names of the parameters that decay.
        args: the learning rate, and the flags of zeroth order.
    """
    optimizer = ZerothOrder(
        parameter_groups(model, adapter, decayed_names, args.weight_decay),
        args.learning_rate,
        args.zo_eps,
        args.seed,
        clip=args.max_grad_norm,
        normalize=args.zo_normalize,
        master=adapter is not None,
        method=method,
        distribution=args.zo_distribution,
        optim=args.zo_optim,
        set_perturbations=adapter.set_perturbations if adapter else None,
    )
    drift = rounding_drift(optimizer, args.learning_rate)
    if drift > 1:
        logger.warning(
            "rounding moves these half-precision weights about %.0f x as far as the updates do "
            "(|g| = 1): adapters (--lora, --xgblora, --prefix_tuning) or float32 keep them",
            drift,
        )
    return optimizer


def log_recommendations(optimizer: ZerothOrder, closure: Callable) -> None:
    """Diagnose a run at its start, from the losses of one batch, and log what is better.

    Raises:
        UsageError: the losses say nothing.
    """
    try:
        diagnosis = diagnose(optimizer, closure)
    except ValueError as error:
        raise UsageError(f"--zo_check: {error}") from error
    for line in recommendations(diagnosis, optimizer):
        logger.info(line)
