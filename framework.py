"""A model and a task: load, inject adapters, evaluate, train, replay, save.

Reads like a recipe, from `load` to `export`. What a step is stands in trainer.py and zo/optimizer.py, what a prompt and
a score are in scoring/; run.py has the program around it.
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

    Bad data and prompts are refused before `load()` reads the weights. After it `model` is the model in eval mode, with
    its adapters; before it is None.

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
        self.train_examples, self.eval_examples = [], []  # as far as they are known before the model is loaded
        self.prefix_length = self._prefix_length()
        self.config = load_model.read_model_config(args.model_name, args.trust_remote_code)
        self.tokenizer = load_model.read_tokenizer(args.model_name, self.config, args.trust_remote_code)
        rows_with_prefix = args.max_length + self.prefix_length  # a prefix takes positions of its own
        self.max_length = load_model.longest_row(self.config, rows_with_prefix) - self.prefix_length
        self.prompts: Prompts | None = None  # a replay has no task
        self.evaluator: Evaluator | None = None
        self.objective = None
        if task:
            self._read_task()

    def _read_task(self) -> None:
        """Make what turns samples of the task into token ids, and what evaluates them."""
        args = self.args
        vocabulary = self.config.get_text_config().vocab_size if self.config else len(self.tokenizer)
        self.prompts = Prompts(
            self.task,
            self.tokenizer,
            self.max_length,
            vocabulary,
            max_new_tokens=args.max_new_tokens,
            only_train_option=args.only_train_option,
            train_as_classification=args.train_as_classification,
            sfc=args.sfc,
            icl_sfc=args.icl_sfc,
            model_name=args.model_name,
        )
        self.evaluator = Evaluator(
            self.task,
            self.tokenizer,
            self.prompts,
            GenerationSettings(args.eos_token, args.max_new_tokens, args.generating),
            seed=args.seed,
            progress=not args.disable_tqdm and collectives.is_main_process(),
            verbose=args.verbose,
        )
        if args.objective:
            self.objective = metrics.find_metric(args.objective)

    def _prefix_length(self) -> int:
        """Tokens of the prefix that is trained or that `--adapter` holds; an adapter that fits no flag is refused."""
        args = self.args
        if args.adapter and peft_files.read_adapter_config(args.adapter)["peft_type"] == prefix.PEFT_TYPE:
            validation.validate_prefix(args)
            return prefix.saved_length(args.adapter)
        if args.adapter:
            peft_files.read_lora_config(args.adapter)
        return args.num_prefix if args.prefix_tuning else 0

    # ---- the model ----

    def load(self) -> None:
        """Load the model and inject its adapters, unless that is done already."""
        if self.model is not None:
            return
        args = self.args
        self.estimate = self.estimate_memory()
        device = "cpu" if args.sharded else args.device  # a whole model may be too much for its device
        model = load_model.read_model(
            args.model_name, args.dtype, args.trust_remote_code, device, args.bits, args.device_map,
            args.offload_folder,
        )  # fmt: skip
        if args.bits == 4 and args.trainer == "regular":
            load_model.use_differentiable_kernels(model)
        if args.untie_emb:
            load_model.untie_head(model)
        if args.head_tuning:
            load_model.train_head_only(model)
        load_model.check_offloaded(args, model)
        for settings in (self.tokenizer, model.config):
            settings.pad_token_id = self.tokenizer.pad_token_id
        if self.evaluator and not args.sharded:
            self.evaluator.attach(model)
        if self.prefix_length:
            self._inject_prefix(model)
        else:
            self._inject_lora(model)
        self.model = model

    def _inject_prefix(self, model: torch.nn.Module) -> None:
        args = self.args
        reparam = args.prefix_tuning and not args.no_reparam
        module = PrefixTuning(model, self.prefix_length, reparam, args.prefix_init_by_real_act, args.seed)
        if args.adapter:
            module.load(args.adapter)

    def _inject_lora(self, model: torch.nn.Module) -> None:
        """The adapters of `--lora` or `--xgblora`, or those of a saved one that is evaluated."""
        args = self.args
        if args.adapter and args.trainer == "none":
            saved, chain = peft_files.read_lora_config(args.adapter), peft_files.has_chain(args.adapter)
            self.lora_module = LoRA(
                model, 1 if chain else saved["r"], saved["lora_alpha"], xgblora=chain, targets=saved["target_modules"],
                ensemble=args.xgblora_ensemble,
            )  # fmt: skip
        elif args.lora or args.xgblora:
            names = [name for name, _ in model.named_modules()]
            self.lora_module = LoRA(
                model, args.lora_r, args.lora_alpha, xgblora=args.xgblora, seed=args.seed, targets=args.targets,
                freeze_a=args.lora_freeze_a, ranks=args.ranks, layers=args.xgblora_layers,
                ensemble=args.xgblora_ensemble,
            )  # fmt: skip
            missing = [target for target in args.targets if not names_ending_in(names, [target])]
            if missing:
                raise UsageError(f"--lora_targets: no layer called {', '.join(missing)} in this model")
        if args.staged and not self.lora_module.xgblora:
            raise UsageError(f"--staged: {args.adapter} has no chain of boosters")
        if args.adapter and self.lora_module:
            self.lora_module.load(args.adapter, args.boosters, keep_current=args.trainer != "none")

    def estimate_memory(self) -> memory_estimate.Estimate | None:
        """What memory the run will take, logged; None where that can't be told."""
        args, cpu = self.args, self.args.device.type == "cpu"
        new = args.max_new_tokens if self.task and self.task.generation else 0
        adapted = args.lora or args.xgblora or args.prefix_tuning

        def rule(tokens: int) -> int:
            return points_per_forward(tokens, 2 * args.zo_queries, cpu, adapted, args.zo_batched)

        return memory_estimate.estimate_memory(args, self.config, self.train_examples, self.eval_examples, rule, new)

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
        """Train, or go on, or see that it is done already; leaves the trained model (the best one, where asked).

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
        self._check_training_rows()
        run_id = run_id_fields(args, self.task, self.config, train_samples, dev_rows.samples)
        checkpoint = collectives.run_on_main(functools.partial(checkpoint_to_resume, args, output_dir, run_id))
        collectives.run_on_all(self.load)  # where one rank can't load the model, none goes on
        if args.sharded:
            self._shard()
        self.trainer = trainer = self._make_trainer(args, train_samples, dev_rows, run_id, signals)
        if checkpoint and trainer.load_if_finished(checkpoint):
            logger.info("%s is finished (step %d): nothing left to train", output_dir, trainer.state.global_step)
        else:
            self._run_trainer(trainer, output_dir, checkpoint)
        # of --bf16: a rerun evaluates without the library's autocast too
        trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        trainer.finish(functools.partial(self.best_prefix, dev_rows) if args.xgblora_best else None)
        if args.save_model:
            trainer.save_result(output_dir)
        trainer.refuse_unsaved()
        self.model.eval()

    def _check_training_rows(self) -> None:
        """Raise UsageError where the training rows teach nothing, or give no batch."""
        args, examples = self.args, self.train_examples
        if args.train_as_classification and len(examples) > 1 and len({x.label for x in examples}) == 1:
            rows = self.task.samples["train"]
            if len({str(sample.correct_candidate) for sample in rows}) == 1:
                raise UsageError(f"all {len(rows)} training rows have one label: there is nothing to tell apart")
        if args.dataloader_drop_last and len(examples) < args.train_batch_size:
            raise UsageError(
                f"--dataloader_drop_last leaves no batch of {args.train_batch_size} rows out of {len(examples)}"
            )

    def _make_trainer(self, args, train_samples, dev_rows: EvalBatch, run_id: dict, signals) -> OurTrainer:
        classification, plain_rows = args.train_as_classification, self.evaluator.plain_rows
        dev_examples = self.prompts.training_examples(dev_rows.samples) if args.xgblora_adaptive else []
        trainer = OurTrainer(
            model=self.model,
            args=args,
            **self.training_inputs(train_samples),
            eval_dataset=dev_rows.samples or None,
            processing_class=self.tokenizer,
            evaluate_fn=lambda model: self.evaluate(dev_rows, progress=False),
            dev_loss_fn=lambda model: mean_loss(model, dev_examples, classification, plain_rows),
            settings=run_id,
            signals=signals,
        )
        trainer.lora_module = self.lora_module
        return trainer

    def _run_trainer(self, trainer: OurTrainer, output_dir: Path, checkpoint: str | None) -> None:
        """Train from a checkpoint, or from the start where there is none."""
        if self.args.zo_cache_activations:
            trainer.cache_activations(self.evaluator.plain_rows)
        if self.args.zo_check:
            trainer.log_diagnosis()
        if checkpoint:
            logger.info("going on from %s", checkpoint)
        if collectives.is_main_process():
            (output_dir / TRAJECTORY).unlink(missing_ok=True)  # of a shorter run
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.signals.agreed_signal:
            trainer.refuse_unsaved()
        trainer.signals.check()

    def training_inputs(self, train_samples) -> dict:
        """Return the dataset, the collator that packs a batch of it, and the loss, as the Trainer takes them."""
        args, classification = self.args, self.args.train_as_classification
        if self.objective:
            dataset = ObjectiveRows(self.train_examples)
            pack, count, size = dataset.pack, len, dataset.num_tokens
            batch = self.eval_batch(train_samples)
            loss_fn = functools.partial(self.evaluator.objective_loss, self.objective, batch)
        else:
            dataset = self.train_examples
            pack = functools.partial(packing.pack, plain_rows=self.evaluator.plain_rows)
            count = functools.partial(packing.loss_terms, classification=classification)
            size = packing.num_tokens
            loss_fn = functools.partial(logprobs.loss, classification=classification)
        collator = data_parallel.ShardingCollator(pack, count, size, divides=args.zo_parallel == "data")
        return {"train_dataset": dataset, "data_collator": collator, "loss_fn": loss_fn}

    def _shard(self) -> None:
        """Divide the weights among the ranks (`--fsdp`), each with its part on its device; this can't be undone."""
        keep_pages(False)  # a layer that comes and goes leaves holes, which soon take more than the whole model
        adapter = self.lora_module or prefix.trained_prefix(self.model)
        sharding.shard_model(self.model, adapter, self.args.device)
        self.evaluator.attach(self.model)

    def best_prefix(self, dev_rows: EvalBatch) -> int:
        """Return how many of the first boosters do best on the dev rows (`--xgblora_best`)."""
        metric = self.task.metric_name
        stages = staged_results.evaluate_prefixes(
            self.lora_module, lambda: self.evaluate(dev_rows, progress=False), progress=False
        )
        logger.info("\n".join(staged_results.format_stages(stages, metric)))
        return staged_results.best_prefix(stages, metric)

    # ---- files ----

    def replay(self, path: str, output_dir: Path) -> None:
        """Rebuild the weights of a run from its trajectory, and write them to its output directory.

        Raises:
            UsageError: the file is no trajectory, or one of another run.
        """
        try:
            trajectory = Trajectory.load(path)
        except ValueError as error:
            raise UsageError(f"--replay {error}") from error
        args = self.args.for_replay(output_dir)
        current = run_id_fields(args, None, self.config, [], [])
        recorded = trajectory.about.get("settings", {})
        difference = checkpoints.differences(
            {name: value for name, value in recorded.items() if name in REPLAY_ID},
            {name: value for name, value in current.items() if name in REPLAY_ID},
        )
        if difference:
            raise UsageError(f"--replay {path} is of another run: {difference}")
        if args.replay_steps is not None and Path(path).resolve().parent == output_dir.resolve():
            raise UsageError(f"--replay_steps would overwrite the result of {path}: give another --output_dir")
        if (args.replay_steps or 0) > len(trajectory.coefficients):
            raise UsageError(f"--replay_steps {args.replay_steps}: {path} holds {len(trajectory.coefficients)} steps")
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
        missing = self.lora_module.export(directory, self.args.export_rank)
        logger.info("%s: lacks %.2f%% of the adapter (Frobenius norm, all layers)", directory, 100 * missing)


class ObjectiveRows:
    """The training rows as their numbers: with `--objective` a batch is evaluated, which needs samples and not loss.

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
    run_id["batch"] = rows_per_step * args.shares
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
