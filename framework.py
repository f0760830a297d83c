"""A model and a task: load, inject adapters, evaluate, train, replay, save.

Reads like a recipe, from `load` to `export`. What a step is stands in trainer.py and zo/optimizer.py, what a
prompt and a score are in scoring/; run.py has the program around it.
"""

import functools
import json
import logging
from pathlib import Path

import torch
from torch import Tensor

import prefix
from boosters import peft_files
from boosters.targets import names_ending_in
from cli import load_model, validation
from cli.arguments import OurArguments
from cli.defaults import NOT_PART_OF_RUN_ID, REPLAY_ID
from distributed import collectives, data_parallel, sharding
from lora import LoRA
from machine import memory_estimate
from machine.resources import keep_pages
from prefix import PrefixTuning
from scoring import logprobs, metrics, packing, staged_results
from scoring.evaluate import Evaluator, mean_loss
from scoring.generate import GenerationSettings
from scoring.linear_probe import LinearProbe, prompt_states
from scoring.prompts import EvalBatch, Prompts
from trainer import TRAJECTORY, OurTrainer, points_per_forward
from training import checkpoints
from utils import UsageError
from zo.trajectory import Trajectory

logger = logging.getLogger("run")


class Framework:
    """A model and a task, ready to train and to evaluate.

    Bad data and prompts are refused before `load()` reads the weights. After it `model` is the model in eval
    mode, with its adapters; before it is None.

    Args:
        args: the choices of the run.
        task: the task, or None for a replay, which needs no data.

    Raises:
        UsageError: for a model, an adapter or flags that do not fit together.
    """

    def __init__(self, args: OurArguments, task):
        self.args = args.for_task(task) if task else args
        self.task = task
        sharding.forget_model()
        self.model: torch.nn.Module | None = None
        self.lora_module: LoRA | None = None
        self.trainer: OurTrainer | None = None
        self.estimate: memory_estimate.Estimate | None = None
        # The estimate of memory reads these, as far as they are known before the model is loaded.
        self.train_examples = []
        self.eval_examples = []
        self.prefix_length = prefix_length(args)
        self.config = load_model.read_model_config(args.model_name, args.trust_remote_code)
        self.tokenizer = load_model.read_tokenizer(args.model_name, self.config, args.trust_remote_code)
        rows_with_prefix = args.max_length + self.prefix_length  # a prefix takes positions of its own
        self.max_length = load_model.longest_row(self.config, rows_with_prefix) - self.prefix_length
        self.prompts: Prompts | None = None  # a replay has no task
        self.evaluator: Evaluator | None = None
        self.objective = None
        if task:
            vocabulary = self.config.get_text_config().vocab_size if self.config else len(self.tokenizer)
            self.prompts = make_prompts(self.args, task, self.tokenizer, self.max_length, vocabulary)
            self.evaluator = make_evaluator(self.args, task, self.tokenizer, self.prompts)
            self.objective = metrics.find_metric(self.args.objective) if self.args.objective else None

    # ---- the model ----

    def load(self) -> None:
        """Load the model and inject its adapters, unless that is done already."""
        if self.model is not None:
            return
        args = self.args
        new_tokens = args.max_new_tokens if self.task and self.task.generation else 0
        self.estimate = estimate_memory_of_run(
            args, self.config, self.train_examples, self.eval_examples, new_tokens
        )
        model = load_model_of_run(args)
        for settings in (self.tokenizer, model.config):
            settings.pad_token_id = self.tokenizer.pad_token_id
        if self.evaluator:
            self.evaluator.attach(model)
        if self.prefix_length:
            inject_prefix(model, args, self.prefix_length)
        else:
            self.lora_module = inject_lora(model, args)
        self.model = model

    # ---- evaluation ----

    def eval_batch(self, samples, demonstrations=()) -> EvalBatch:
        """Return what an evaluation on these samples needs."""
        batch = self.prompts.eval_batch(samples, demonstrations)
        self.eval_examples += batch.examples
        return batch

    def predict(self, batch: EvalBatch, progress: bool = True) -> list[dict]:
        """Return the prediction for each example, see `Evaluator.predict`."""
        self.load()
        return self.evaluator.predict(batch, progress)

    def evaluate(self, batch: EvalBatch, progress: bool = True) -> dict[str, float]:
        """Return the metrics of the predictions, see `Evaluator.metrics`."""
        self.load()
        return self.evaluator.evaluate(batch, progress)

    def fit_probe(self, train_samples) -> None:
        """Fit the classifier of `--linear_probing` on the training rows; no weight of the model changes."""
        examples = self.prompts.examples(train_samples)
        self.load()
        evaluator = self.evaluator
        states = prompt_states(evaluator.model, examples, evaluator.plain_rows, evaluator.progress)
        labels = [x.label for x in examples]
        evaluator.probe = LinearProbe(states, labels, self.args.lp_early_stopping, self.args.seed)

    # ---- training ----

    def train(self, train_samples, dev_rows: EvalBatch, output_dir: Path, signals=None) -> None:
        """Train from the start or from a checkpoint; nothing is left to train where the run is finished.

        Afterwards `model` is the trained model: the best checkpoint where the flags ask for it.

        Args:
            train_samples: the rows to learn from.
            dev_rows: the rows that choose checkpoints, step lengths and the length of a chain; may be empty.
            output_dir: where checkpoints, trajectory and result go.
            signals: requests to stop (distributed/stop_signals.py).

        Raises:
            Interrupted: a signal has ended the run, whose state is saved.
            StateNotSaved: the state at the end is not on the disk.
        """
        args = self.args.for_training_set(output_dir)
        self.train_examples = self.prompts.training_examples(train_samples)
        check_training_rows(args, self.task, self.train_examples)
        run_id = run_id_fields(args, self.task, self.config, train_samples, dev_rows.samples)
        checkpoint = collectives.run_on_main(
            functools.partial(checkpoint_to_resume, args, output_dir, run_id)
        )
        collectives.run_on_all(self.load)  # where one rank can't load the model, none goes on
        if args.sharded:
            self._shard()
        self.trainer = trainer = self._make_trainer(args, train_samples, dev_rows, run_id, signals)
        if checkpoint and trainer.load_if_finished(checkpoint):
            logger.info(
                "%s is finished (step %d): nothing left to train", output_dir, trainer.state.global_step
            )
        else:
            run_trainer(trainer, output_dir, checkpoint, self.evaluator.plain_rows)
        # of --bf16: a rerun evaluates without the library's autocast too
        trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        trainer.finish(functools.partial(self.best_chain_length, dev_rows) if args.xgblora_best else None)
        if args.save_model:
            trainer.save_result(output_dir)
        trainer.refuse_unsaved()
        self.model.eval()

    def _make_trainer(self, args, train_samples, dev_rows: EvalBatch, run_id: dict, signals) -> OurTrainer:
        classification = args.train_as_classification
        plain_rows = self.evaluator.plain_rows
        dev_examples = self.prompts.training_examples(dev_rows.samples) if args.xgblora_adaptive else []
        if self.objective:
            batch = self.eval_batch(train_samples)
            inputs = objective_inputs(args, self.train_examples, batch, self.evaluator, self.objective)
        else:
            inputs = loss_inputs(args, self.train_examples, plain_rows)
        trainer = OurTrainer(
            model=self.model,
            args=args,
            **inputs,
            eval_dataset=dev_rows.samples or None,
            processing_class=self.tokenizer,
            evaluate_fn=lambda model: self.evaluate(dev_rows, progress=False),
            dev_loss_fn=lambda model: mean_loss(model, dev_examples, classification, plain_rows),
            settings=run_id,
            signals=signals,
        )
        trainer.lora_module = self.lora_module
        return trainer

    def _shard(self) -> None:
        """Divide the weights among the ranks (`--fsdp`), each part on its device; this can't be undone."""
        # A layer that comes and goes leaves holes in memory, which soon take more than the whole model.
        keep_pages(False)
        adapter = self.lora_module or prefix.trained_prefix(self.model)
        sharding.shard_model(self.model, adapter, self.args.device)
        self.evaluator.attach(self.model)

    def best_chain_length(self, dev_rows: EvalBatch) -> int:
        """Return how many of the first boosters do best on the dev rows (`--xgblora_best`)."""
        metric = self.task.metric_name
        stages = staged_results.evaluate_prefixes(
            self.lora_module, lambda: self.evaluate(dev_rows, progress=False), progress=False
        )
        logger.info("\n".join(staged_results.format_stages(stages, metric)))
        return staged_results.best_prefix(stages, metric)

    # ---- files ----

    def rebuild_from_trajectory(self, path: str, output_dir: Path) -> None:
        """Rebuild the weights of a run from its trajectory, and write them to its output directory.

        Raises:
            UsageError: the file is no trajectory, or one of another run.
        """
        args = self.args.for_replay(output_dir)
        trajectory = read_trajectory(path, args, self.config)
        self.load()
        trainer = OurTrainer(model=self.model, args=args, processing_class=self.tokenizer, loss_fn=None)
        trainer.lora_module = self.lora_module
        trainer.replay(trajectory, args.replay_steps)
        trainer.save_model(str(output_dir))

    def save_merged(self, directory: Path) -> None:
        """Write a plain model directory, adapters merged, that `from_pretrained` loads."""
        self.load()
        state = self.lora_module.plain_state_dict() if self.lora_module else None
        self.model.save_pretrained(directory, state_dict=state)
        self.tokenizer.save_pretrained(directory)

    def export(self, directory: Path) -> None:
        """Write the nearest LoRA of rank `--export_rank`, and say what it lacks."""
        self.load()
        error = self.lora_module.export(directory, self.args.export_rank)
        logger.info("%s: lacks %.2f%% of the adapter (Frobenius norm, all layers)", directory, 100 * error)


# ---- what a Framework is made of ----


def make_prompts(args: OurArguments, task, tokenizer, max_length: int, vocabulary: int) -> Prompts:
    """Return the `Prompts` that turn samples of the task into token ids.

    Args:
        max_length: the longest row in tokens.
        vocabulary: ids are below this number.
    """
    return Prompts(
        task, tokenizer, max_length, vocabulary, max_new_tokens=args.max_new_tokens,
        only_train_option=args.only_train_option, train_as_classification=args.train_as_classification,
        sfc=args.sfc, icl_sfc=args.icl_sfc, model_name=args.model_name,
    )  # fmt: skip


def make_evaluator(args: OurArguments, task, tokenizer, prompts: Prompts) -> Evaluator:
    """Return the `Evaluator`, which predicts and measures."""
    generation = GenerationSettings(args.eos_token, args.max_new_tokens, args.generating)
    progress = not args.disable_tqdm and collectives.is_main_process()
    return Evaluator(
        task, tokenizer, prompts, generation, seed=args.seed, progress=progress, verbose=args.verbose
    )


def estimate_memory_of_run(args: OurArguments, config, train_examples, eval_examples, new_tokens: int):
    """Return the estimate of the memory that the run will take, and log it; None where that can't be told."""
    cpu = args.device.type == "cpu"
    adapted = args.lora or args.xgblora or args.prefix_tuning

    def copies(tokens: int) -> int:
        return points_per_forward(tokens, 2 * args.zo_queries, cpu, adapted, args.zo_batched)

    return memory_estimate.estimate_memory(args, config, train_examples, eval_examples, copies, new_tokens)


def load_model_of_run(args: OurArguments) -> torch.nn.Module:
    """Return the model on its device, with what the flags change in it; adapters come later."""
    device = "cpu" if args.sharded else args.device  # a whole model may be too much for its device
    model = load_model.read_model(
        args.model_name,
        args.dtype,
        args.trust_remote_code,
        device,
        args.bits,
        args.device_map,
        args.offload_folder,
    )
    if args.bits == 4 and args.trainer == "regular":
        load_model.use_differentiable_kernels(model)
    if args.untie_emb:
        load_model.untie_head(model)
    if args.head_tuning:
        load_model.train_head_only(model)
    load_model.check_offloaded(args, model)
    return model


def prefix_length(args: OurArguments) -> int:
    """Return the tokens of the prefix that is trained or that `--adapter` holds, 0 for none.

    Raises:
        UsageError: the adapter does not fit the flags.
    """
    if args.adapter and peft_files.read_adapter_config(args.adapter)["peft_type"] == prefix.PEFT_TYPE:
        validation.validate_prefix(args)
        return prefix.saved_length(args.adapter)
    if args.adapter:
        peft_files.read_lora_config(args.adapter)
    return args.num_prefix if args.prefix_tuning else 0


# ---- adapters ----


def inject_prefix(model: torch.nn.Module, args: OurArguments, length: int) -> None:
    """Put a prefix in front of the model's layers: the one of `--adapter`, or a new one to be trained.

    Args:
        length: tokens of the prefix.
    """
    reparam = args.prefix_tuning and not args.no_reparam
    module = PrefixTuning(model, length, reparam, args.prefix_init_by_real_act, args.seed)
    if args.adapter:
        module.load(args.adapter)


def inject_lora(model: torch.nn.Module, args: OurArguments) -> LoRA | None:
    """Inject the adapters of `--lora` or `--xgblora`, or those of a saved adapter that is evaluated.

    Returns:
        The adapters; None where the flags ask for none.

    Raises:
        UsageError: the model has no such layers, or the saved adapter does not fit.
    """
    lora = None
    if args.adapter and args.trainer == "none":
        config = peft_files.read_lora_config(args.adapter)
        has_chain = peft_files.has_chain(args.adapter)
        lora = LoRA(
            model, 1 if has_chain else config["r"], config["lora_alpha"], xgblora=has_chain,
            targets=config["target_modules"], ensemble=args.xgblora_ensemble,
        )  # fmt: skip
    elif args.lora or args.xgblora:
        names = [name for name, _ in model.named_modules()]
        lora = LoRA(
            model, args.lora_r, args.lora_alpha, xgblora=args.xgblora, seed=args.seed, targets=args.targets,
            freeze_a=args.lora_freeze_a, ranks=args.ranks, layers=args.xgblora_layers,
            ensemble=args.xgblora_ensemble,
        )  # fmt: skip
        absent_targets = [target for target in args.targets if not names_ending_in(names, [target])]
        if absent_targets:
            raise UsageError(f"--lora_targets: no layer called {', '.join(absent_targets)} in this model")
    if args.staged and not lora.xgblora:
        raise UsageError(f"--staged: {args.adapter} has no chain of boosters")
    if args.adapter and lora:
        lora.load(args.adapter, args.boosters, keep_current=args.trainer != "none")
    return lora


# ---- training ----


def check_training_rows(args: OurArguments, task, examples) -> None:
    """Raise UsageError where the training rows teach nothing, or give no batch."""
    if args.train_as_classification and len(examples) > 1 and len({x.label for x in examples}) == 1:
        rows = task.samples["train"]
        if len({str(sample.correct_candidate) for sample in rows}) == 1:
            raise UsageError(f"all {len(rows)} training rows have one label: there is nothing to tell apart")
    if args.dataloader_drop_last and len(examples) < args.train_batch_size:
        raise UsageError(
            f"--dataloader_drop_last leaves no batch of {args.train_batch_size} rows out of {len(examples)}"
        )


def loss_inputs(args: OurArguments, examples, plain_rows: bool) -> dict:
    """Return the dataset, the collator that packs a batch of it, and the loss, as the Trainer takes them.

    Args:
        args: the loss, and what ranks divide.
        examples: the training examples.
        plain_rows: whether a row holds one candidate, because the model can't take packed rows.
    """
    classification = args.train_as_classification
    collator = data_parallel.ShardingCollator(
        functools.partial(packing.pack, plain_rows=plain_rows),
        functools.partial(packing.loss_terms, classification=classification),
        packing.num_tokens,
        divides=args.zo_parallel == "data",
    )
    loss_fn = functools.partial(logprobs.loss, classification=classification)
    return {"train_dataset": examples, "data_collator": collator, "loss_fn": loss_fn}


def objective_inputs(args: OurArguments, examples, batch: EvalBatch, evaluator: Evaluator, objective) -> dict:
    """Return dataset, collator and loss of `--objective`, which evaluates the rows of a batch.

    Args:
        args: what ranks divide.
        examples: the training examples, for their sizes.
        batch: the same rows as an evaluation takes them.
        evaluator: predicts.
        objective: what steps raise, a function of (predictions, right answers).
    """
    rows = ObjectiveRows(examples)
    collator = data_parallel.ShardingCollator(
        rows.pack, len, rows.num_tokens, divides=args.zo_parallel == "data"
    )
    loss_fn = functools.partial(evaluator.objective_loss, objective, batch)
    return {"train_dataset": rows, "data_collator": collator, "loss_fn": loss_fn}


class ObjectiveRows:
    """The training rows as their numbers: with `--objective` a batch of samples is evaluated, without a loss.

    Args:
        examples: the training examples, for their sizes.
    """

    def __init__(self, examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        return range(len(self.examples))[index]

    def num_tokens(self, row: int) -> int:
        return packing.num_tokens(self.examples[row])

    @staticmethod
    def pack(rows: list[int]) -> dict[str, Tensor]:
        return {"row": torch.tensor(rows)}


def run_trainer(trainer: OurTrainer, output_dir: Path, checkpoint: str | None, plain_rows: bool) -> None:
    """Train from a checkpoint, or from the start where there is none.

    Raises:
        Interrupted: a signal has ended the run.
        StateNotSaved: the state at that signal is not on the disk.
    """
    if trainer.args.zo_cache_activations:
        trainer.cache_activations(plain_rows)
    if trainer.args.zo_check:
        trainer.log_diagnosis()
    if checkpoint:
        logger.info("going on from %s", checkpoint)
    if collectives.is_main_process():
        (output_dir / TRAJECTORY).unlink(missing_ok=True)  # of a shorter run
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.signals.agreed_signal:
        trainer.refuse_unsaved()
    trainer.signals.raise_if_stopped()


# ---- what makes a run this run ----


def run_id_fields(args: OurArguments, task, config, train_samples, dev_samples) -> dict:
    """Return what makes this run this run: model, rows, and every flag that changes what is trained.

    Args:
        args: the choices of the run.
        task: the task, or None for a replay.
        config: the model's configuration, or None of a `.gguf` file.
        train_samples, dev_samples: the rows, by their ids.

    Returns:
        What JSON can say; a checkpoint keeps it, and a rerun that differs in it is refused.
    """
    run_id = {name: value for name, value in args.to_dict().items() if name not in NOT_PART_OF_RUN_ID}
    if args.lr_scheduler_type == "constant" and args.max_steps > 0:
        del run_id["max_steps"], run_id["num_train_epochs"]  # a longer run goes on from a shorter one
    # Other ranks that share the same batch are the same run.
    rows_per_step = run_id.pop("per_device_train_batch_size") * run_id.pop("gradient_accumulation_steps")
    run_id["batch"] = rows_per_step * args.data_parallel_size
    if args.adapter:  # what it holds, wherever it lies
        run_id["adapter"] = checkpoints.short_hash(checkpoints.identify_weights(args.adapter))
    for name in ("zo_method", "objective"):
        run_id[name] = code_fingerprint(run_id[name])
    row_ids = [[sample.id for sample in samples] for samples in (train_samples, dev_samples)]
    run_id["data"] = task.fingerprint if task else None
    run_id["rows"] = checkpoints.short_hash(row_ids)
    settings = config.to_dict() if config else None
    if settings:
        settings.pop("_name_or_path", None)
    run_id["model"] = checkpoints.short_hash([settings, checkpoints.identify_weights(args.model_name)])
    return json.loads(json.dumps(run_id, default=str))


def code_fingerprint(name: str | None) -> str | None:
    """Return for `file.py:name` a hash of the file's text, wherever the file lies; another name as it is."""
    path, _, attribute = (name or "").rpartition(":")
    return f"{checkpoints.short_hash(Path(path).read_text())}:{attribute}" if path else name


def checkpoint_to_resume(args: OurArguments, output_dir: Path, run_id: dict) -> str | None:
    """Return the checkpoint that a run goes on from, or None; raises UsageError where it is another run's."""
    if args.overwrite:
        checkpoints.remove_checkpoints(output_dir)
    checkpoint = checkpoints.newest_checkpoint(output_dir)
    if checkpoint:
        checkpoints.refuse_other_run(checkpoint, run_id)
    return str(checkpoint) if checkpoint else None


def read_trajectory(path: str, args: OurArguments, config) -> Trajectory:
    """Return the trajectory of `--replay`; raises UsageError where it is none, or one of another run."""
    try:
        trajectory = Trajectory.load(path)
    except ValueError as error:
        raise UsageError(f"--replay {error}") from error
    run_id = run_id_fields(args, None, config, [], [])
    recorded_id = trajectory.about.get("settings", {})
    difference = checkpoints.describe_difference(
        {name: value for name, value in recorded_id.items() if name in REPLAY_ID},
        {name: value for name, value in run_id.items() if name in REPLAY_ID},
    )
    if difference:
        raise UsageError(f"--replay {path} is of another run: {difference}")
    if args.replay_steps is not None and Path(path).resolve().parent == Path(args.output_dir).resolve():
        raise UsageError(f"--replay_steps would overwrite the result of {path}: give another --output_dir")
    if (args.replay_steps or 0) > len(trajectory.coefficients):
        raise UsageError(
            f"--replay_steps {args.replay_steps}: {path} holds {len(trajectory.coefficients)} steps"
        )
    return trajectory
