"""A model and a task: load, inject adapters, score, train, evaluate, replay.

Reads like a recipe, from `model` to `export`. What a step is stands in trainer.py and zo.py, what a prompt is
in prompts.py and a score in scoring.py; run.py has the program around it.
"""

import copy
import functools
import json
import logging
from pathlib import Path

import torch

import prefix
from boosters import peft_files
from boosters.targets import names_ending_in
from cli import load_model, memory_estimate, validation
from cli.arguments import OurArguments
from cli.defaults import NOT_PART_OF_RUN_ID, REPLAY_ID
from cli.machine import keep_pages
from distributed import collectives, data_parallel, sharding
from lora import LoRA
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
    """A model and a task, ready to train and to evaluate. The model is loaded when it is first looked at, so
    that bad data and prompts are refused before."""

    def __init__(self, args: OurArguments, task):
        self.args, self.task = args, task
        sharding.forget_model()
        if task:
            args.choose_best_by(task.metric_name)
            validation.validate_task(args, task)
        self.lora_module: LoRA | None = None
        self.trained, self.evaluated = [], []  # examples, as far as they are known before the model is loaded
        self.estimate: memory_estimate.Estimate | None = None
        self.trainer: OurTrainer | None = None
        self.objective = (
            metrics.find_metric(args.objective) if task and args.objective else None
        )  # a replay has no task
        self.prefix_length = args.num_prefix if args.prefix_tuning else 0
        if args.adapter and peft_files.read_adapter_config(args.adapter)["peft_type"] == prefix.PEFT_TYPE:
            validation.validate_prefix(args)
            self.prefix_length = prefix.saved_length(args.adapter)
        elif args.adapter:
            peft_files.read_lora_config(args.adapter)
        self.config = load_model.read_model_config(args.model_name, args.trust_remote_code)
        self.tokenizer = load_model.read_tokenizer(args.model_name, self.config, args.trust_remote_code)
        front = self.prefix_length  # which takes positions of its own
        self.max_length = load_model.longest_row(self.config, args.max_length + front) - front
        vocabulary = self.config.get_text_config().vocab_size if self.config else len(self.tokenizer)
        self.prompts: Prompts | None = None  # a replay has no task
        self.evaluator: Evaluator | None = None
        if task:
            self.prompts = Prompts(
                task,
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
                task,
                self.tokenizer,
                self.prompts,
                GenerationSettings(args.eos_token, args.max_new_tokens, args.generating),
                seed=args.seed,
                progress=not args.disable_tqdm,
                verbose=args.verbose,
            )

    @functools.cached_property
    def model(self):
        """The model in eval mode on its device, adapters injected."""
        args = self.args
        self.estimate = self.foresee()
        device = "cpu" if args.sharded else args.device  # a whole model may be too much for it
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
        for source in (self.tokenizer, model.config):
            source.pad_token_id = self.tokenizer.pad_token_id
        if self.evaluator and not args.sharded:
            self.evaluator.attach(model)
        if self.prefix_length:
            reparam = args.prefix_tuning and not args.no_reparam
            made = PrefixTuning(model, self.prefix_length, reparam, args.prefix_init_by_real_act, args.seed)
            if args.adapter:
                made.load(args.adapter)
        elif args.adapter and args.trainer == "none":
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
            if lacking := [target for target in args.targets if not names_ending_in(names, [target])]:
                raise UsageError(f"--lora_targets: no layer called {', '.join(lacking)} in this model")
        if args.staged and not self.lora_module.xgblora:
            raise UsageError(f"--staged: {args.adapter} has no chain of boosters")
        if args.adapter and self.lora_module:
            self.lora_module.load(args.adapter, args.boosters, keep_current=args.trainer != "none")
        return model

    def foresee(self) -> memory_estimate.Estimate | None:
        """What memory the run will take, logged; None where that can't be told."""
        args, cpu = self.args, self.args.device.type == "cpu"
        new = args.max_new_tokens if self.task and self.task.generation else 0
        adapted = args.lora or args.xgblora or args.prefix_tuning

        def rule(tokens: int) -> int:
            return points_per_forward(tokens, 2 * args.zo_queries, cpu, adapted, args.zo_batched)

        return memory_estimate.estimate_memory(args, self.config, self.trained, self.evaluated, rule, new)

    # ---- evaluation ----

    def eval_batch(self, samples, demonstrations=()) -> EvalBatch:
        """Return the batch of an evaluation on these samples."""
        batch = self.prompts.eval_batch(samples, demonstrations)
        self.evaluated += batch.examples
        return batch

    def predict(self, batch: EvalBatch, progress: bool = True) -> list[dict]:
        """Return the prediction for each example, see `Evaluator.predict`."""
        return self.loaded_evaluator().predict(batch, progress)

    def evaluate(self, batch: EvalBatch, progress: bool = True) -> dict[str, float]:
        """Return the metrics of the predictions, see `Evaluator.metrics`."""
        return self.loaded_evaluator().evaluate(batch, progress)

    def loaded_evaluator(self) -> Evaluator:
        """Load the model, if it is not loaded yet, and return its evaluator."""
        _ = self.model
        return self.evaluator

    # ---- training ----

    def fit_probe(self, train_samples) -> None:
        """Fit the classifier of `--linear_probing` on the training rows; no weight of the model changes."""
        examples = self.prompts.examples(train_samples)
        evaluator = self.loaded_evaluator()
        states = prompt_states(evaluator.model, examples, evaluator.plain_rows, evaluator.progress)
        labels = [x.label for x in examples]
        evaluator.probe = LinearProbe(states, labels, self.args.lp_early_stopping, self.args.seed)

    def train(self, train_samples, dev_rows: EvalBatch, output_dir: Path, signals=None) -> None:
        """Train, or go on, or see that it is done already; leaves the trained model (the best one, where
        asked).

        Raises checkpoint.Interrupted where a signal has ended the run, Unsaved where its end is not on the
        disk.
        """
        args = copy.copy(self.args)
        args.output_dir = str(output_dir)
        self.trained = examples = self.prompts.training_examples(train_samples)
        dev_examples = self.prompts.training_examples(dev_rows.samples) if args.xgblora_adaptive else []
        if args.train_as_classification and len(examples) > 1 and len({x.label for x in examples}) == 1:
            every = self.task.samples["train"]
            if len({str(sample.correct_candidate) for sample in every}) == 1:
                raise UsageError(f"all {len(every)} training rows have one label: there is nothing to tell apart")
        if args.dataloader_drop_last and len(examples) < args.train_batch_size:
            raise UsageError(
                f"--dataloader_drop_last leaves no batch of {args.train_batch_size} rows out of {len(examples)}"
            )
        settings = self.settings(train_samples, dev_rows.samples)
        found = collectives.run_on_main(functools.partial(checkpoint_to_resume, args, output_dir, settings))
        collectives.run_on_all(lambda: str(self.model.dtype))  # where one rank can't load it, none goes on
        model = self.model
        if args.sharded:
            self.shard()
        self.trainer = trainer = OurTrainer(
            model=model,
            args=args,
            **self.lesson(train_samples, examples),
            eval_dataset=dev_rows.samples or None,
            processing_class=self.tokenizer,
            evaluate_fn=lambda model: self.evaluate(dev_rows, progress=False),
            dev_loss_fn=lambda model: mean_loss(
                model, dev_examples, args.train_as_classification, self.evaluator.plain_rows
            ),
            settings=settings,
            signals=signals,
        )
        trainer.lora_module = self.lora_module
        if found and trainer.load_if_finished(found):
            logger.info("%s is finished (step %d): nothing left to train", output_dir, trainer.state.global_step)
        else:
            if args.zo_cache_activations:
                trainer.cache_activations(self.evaluator.plain_rows)
            if args.zo_check:
                trainer.log_diagnosis()
            if found:
                logger.info("going on from %s", found)
            if collectives.is_main_process():
                (output_dir / TRAJECTORY).unlink(missing_ok=True)  # of a shorter run
            trainer.train(resume_from_checkpoint=found)
            if trainer.signals.agreed_signal:
                trainer.refuse_unsaved()
            trainer.signals.check()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # of --bf16: a rerun evaluates without it too
        trainer.finish(functools.partial(self.best_stage, dev_rows) if args.xgblora_best else None)
        if args.save_model:
            trainer.save_result(output_dir)
        trainer.refuse_unsaved()
        model.eval()

    def lesson(self, train_samples, examples) -> dict:
        """What is learned, as the trainer takes it: rows (with `--objective` their numbers), how a batch of
        them is packed, and its loss."""
        args = self.args
        if self.objective:
            batch = self.eval_batch(train_samples)
            dataset = list(range(len(examples)))
            pack = lambda rows: {"row": torch.tensor(rows)}  # noqa: E731
            weigh = len
            size = lambda i: packing.num_tokens(examples[i])  # noqa: E731
            loss_fn = functools.partial(self.evaluator.objective_loss, self.objective, batch)
        else:
            dataset = examples
            pack = functools.partial(packing.pack, plain_rows=self.evaluator.plain_rows)
            weigh = functools.partial(packing.loss_terms, classification=args.train_as_classification)
            size = packing.num_tokens
            loss_fn = functools.partial(logprobs.loss, classification=args.train_as_classification)
        share = data_parallel.ShardingCollator(pack, weigh, size, args.zo_parallel == "data")
        return {"train_dataset": dataset, "data_collator": share, "loss_fn": loss_fn}

    def shard(self) -> None:
        """From here on a rank has a part of each weight, on its device."""
        keep_pages(False)  # a layer that comes and goes leaves holes, which soon take more than the whole model
        sharding.shard_model(self.model, self.lora_module or prefix.trained_prefix(self.model), self.args.device)
        self.evaluator.attach(self.model)

    def best_stage(self, dev_rows: EvalBatch) -> int:
        """`--xgblora_best`: how many of the boosters do best on the dev rows."""
        metric = self.task.metric_name
        found = staged_results.evaluate_prefixes(
            self.lora_module, lambda: self.evaluate(dev_rows, progress=False), progress=False
        )
        logger.info("\n".join(staged_results.format_stages(found, metric)))
        return staged_results.best_prefix(found, metric)

    def replay(self, path: str, output_dir: Path) -> None:
        """Rebuild the weights of a run from its trajectory, and write them to its output directory."""
        try:
            trajectory = Trajectory.load(path)
        except ValueError as error:
            raise UsageError(f"--replay {error}") from error
        about, args = trajectory.about, copy.copy(self.args)
        args.output_dir, args.eval_strategy, args.load_best_model_at_end = str(output_dir), "no", False
        saved, ours = (
            {k: v for k, v in some.items() if k in REPLAY_ID}
            for some in (about.get("settings", {}), self.settings([], []))
        )
        differ = checkpoints.differences(saved, ours)
        if differ:
            raise UsageError(f"--replay {path} is of another run: {differ}")
        if args.replay_steps is not None and Path(path).resolve().parent == output_dir.resolve():
            raise UsageError(f"--replay_steps would overwrite the result of {path}: give another --output_dir")
        if (args.replay_steps or 0) > len(trajectory.coefficients):
            raise UsageError(f"--replay_steps {args.replay_steps}: {path} holds {len(trajectory.coefficients)} steps")
        trainer = OurTrainer(model=self.model, args=args, processing_class=self.tokenizer, loss_fn=None)
        trainer.lora_module = self.lora_module
        trainer.replay(trajectory, args.replay_steps)
        trainer.save_model(str(output_dir))

    def settings(self, train_samples, dev_samples) -> dict:
        """What makes this run this run: model, rows, and every flag that is not incidental."""
        kept = {k: v for k, v in self.args.to_dict().items() if k not in NOT_PART_OF_RUN_ID}
        if self.args.lr_scheduler_type == "constant" and self.args.max_steps > 0:
            del kept["max_steps"], kept["num_train_epochs"]  # a longer run goes on from a shorter one
        kept["batch"] = kept.pop("per_device_train_batch_size") * kept.pop("gradient_accumulation_steps")
        kept["batch"] *= self.args.shares  # other ranks that share the same batch are the same run
        rows = [[s.id for s in samples] for samples in (train_samples, dev_samples)]
        if self.args.adapter:  # what it holds, wherever it lies
            kept["adapter"] = checkpoints.short_hash(checkpoints.identify_weights(self.args.adapter))
        for name in ("zo_method", "objective"):
            kept[name] = code_fingerprint(kept[name])
        kept |= {"data": self.task.fingerprint if self.task else None, "rows": checkpoints.short_hash(rows)}
        config = {k: v for k, v in self.config.to_dict().items() if k != "_name_or_path"} if self.config else None
        kept["model"] = checkpoints.short_hash([config, checkpoints.identify_weights(self.args.model_name)])
        return json.loads(json.dumps(kept, default=str))

    def save_merged(self, directory: Path) -> None:
        """Write a plain model directory, adapters merged, that `from_pretrained` loads."""
        model = self.model  # loading it makes the adapters
        model.save_pretrained(directory, state_dict=self.lora_module.plain_state_dict() if self.lora_module else None)
        self.tokenizer.save_pretrained(directory)

    def export(self, directory: Path) -> None:
        """`--export_rank`: write the nearest LoRA of that rank, and say what it lacks."""
        _ = self.model  # loading it makes the adapters
        lost = self.lora_module.export(directory, self.args.export_rank)
        logger.info("%s: lacks %.2f%% of the adapter (Frobenius norm, all layers)", directory, 100 * lost)


def code_fingerprint(name: str | None) -> str | None:
    """Of `file.py:name` what stands in the file, wherever it lies; another name as it is."""
    path, _, attribute = (name or "").rpartition(":")
    return f"{checkpoints.short_hash(Path(path).read_text())}:{attribute}" if path else name


def checkpoint_to_resume(args: OurArguments, output_dir: Path, settings: dict) -> str | None:
    """The checkpoint that a run goes on from; raises UsageError where it is another run's."""
    if args.overwrite:
        checkpoints.remove_checkpoints(output_dir)
    found = checkpoints.newest_checkpoint(output_dir)
    if found:
        checkpoints.refuse_other_run(found, settings)
    return str(found) if found else None
