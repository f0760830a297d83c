"""Every choice of a run: the flags, and what they default to.

A dataclass holds each group of flags; `OurArguments` is all of them with the library's. How words become
arguments stands in command_line.py, which choices exclude each other in validation.py. Defaults that depend
on other choices come from a table (defaults.py) and are resolved once, here. Constructing arguments has no
effect on the process, and nothing writes to them afterwards: what depends on the task is a copy (`for_task`).
"""

import copy
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from cli.defaults import RECIPES, default_rates, settings_block, warnings
from cli.inherited_flags import refused_values
from cli.validation import validate, validate_task
from distributed import collectives
from scoring.metrics import LOWER_IS_BETTER
from tasks import OPTIONS, TASKS, CustomTask
from utils import UsageError

logger = logging.getLogger(__name__)


def flag(default, help: str, **kwargs):
    """Return a dataclass field that is a flag of the command line, with its help."""
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class DataFlags:
    """Which rows are learned from and evaluated, and where results go."""

    task_name: str = flag("SST2", "one of " + ", ".join(TASKS) + "; or own: see the flags of own data")
    data_dir: str | None = flag(
        None,
        "read DIR/<task>/{train,validation}.jsonl (own: DIR/{train,validation}.jsonl) instead of the hub",
    )
    num_train: int | None = flag(
        None, "training rows, or demonstrations with --trainer none (default: all, or 0)"
    )
    num_dev: int | None = flag(None, "rows from the end of the training draw to choose checkpoints on")
    num_eval: int | None = flag(None, "validation rows to evaluate on (default: all)")
    num_train_sets: int | None = flag(None, "repeat with this many training sets, seeds s, s+1, …")
    train_set_seed: int | None = flag(None, "draw the training set with this seed instead of --seed")
    result_file: str | None = flag(None, "where the result goes (default: result/<task>-<model>-….json)")
    tag: str = flag("", "a word for the names of result file and output directory")
    predictions: str | None = flag(None, "write one JSON line per evaluated example to this file")
    metric: str | None = flag(
        None,
        "choose the best checkpoint by accuracy, macro_f1 or loss; by f1 or em of generated answers; "
        "by loss or perplexity of texts (default: the first of these)",
    )
    verbose: bool = flag(False, "print the first prompt as the model sees it, with the scores of its options")
    no_eval: bool = flag(False, "no evaluation on the validation rows at the end")

    @property
    def task_label(self) -> str:
        """Return the task's name for file names; the folder tells tasks of the user's own apart."""
        if self.task_name == "own" and self.data_dir:
            return f"own-{Path(self.data_dir).resolve().name}"
        return self.task_name


@dataclass
class CustomTaskFlags:
    """Describe a task of the user's own: template, label words, columns."""

    template: str | None = flag(None, "the prompt, with {column} for a cell: '{review} It was'")
    label_words: str | None = flag(None, 'JSON: \'{"neg": "terrible", "pos": "great"}\'')
    label_column: str | None = flag(None, "the column that holds the label")
    candidates_column: str | None = flag(None, "multiple choice: the column with the list of candidates")
    answer_index_column: str | None = flag(None, "multiple choice: the column with the index of the answer")
    answer_column: str | None = flag(None, "generation: the column with the answer or a list of them")

    @property
    def custom_task(self) -> CustomTask:
        return CustomTask(**{f.name: getattr(self, f.name) for f in fields(CustomTask)})


@dataclass
class ModelFlags:
    """Which model is loaded, in which precision, on which devices."""

    model_name: str = flag("facebook/opt-125m", "hub name, model directory or .gguf file")
    load_float16: bool = flag(False, "load the weights in float16 (default: float32)")
    load_bfloat16: bool = flag(False, "load the weights in bfloat16; fast where the CPU or GPU has it")
    load_int8: bool = flag(False, "quantise the Linear layers to 8 bits (bitsandbytes); train adapters only")
    load_int4: bool = flag(False, "quantise them to 4 bits (NF4); train adapters only")
    device_map: str | None = flag(
        None,
        "a model larger than a device: auto spreads its layers over GPUs, host and disk; or FILE.json: "
        "{module: GPU number, cpu or disk}",
    )
    offload_folder: str | None = flag(
        None, "with --device_map: where layers go that can't be read from the model's own files"
    )
    no_auto_device: bool = flag(
        False,
        "of MeZO's commands: the model stays on one device, as it does here unless --device_map is given",
    )
    trust_remote_code: bool = flag(
        False, "run the code that comes with a model; without it such a model is refused"
    )
    max_length: int = flag(2048, "longest prompt in tokens; longer ones are cut on the left")
    sfc: bool = flag(False, "calibrated scores: minus the score of the option without the input")
    icl_sfc: bool = flag(False, "as --sfc, but the demonstrations stay in front of the missing input")
    adapter: str | None = flag(None, "evaluate, or go on from, this LoRA or prefix (ours or PEFT's)")
    boosters: int | None = flag(None, "of the chain in --adapter, take only the first so many boosters")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.load_float16 else torch.bfloat16 if self.load_bfloat16 else torch.float32

    @property
    def bits(self) -> int | None:
        """Bits of the Linear layers' weights, where they are quantised."""
        return 8 if self.load_int8 else 4 if self.load_int4 else None

    @property
    def model_label(self) -> str:
        """The model's name in file names."""
        return Path(self.model_name.rstrip("/")).name.removesuffix(".gguf")


@dataclass
class GenerationFlags:
    """Choose how answers are generated."""

    max_new_tokens: int = flag(50, "longest answer in tokens; prompts leave room for it in --max_length")
    eos_token: str = flag("\n", "an answer ends at this text (default: a newline)")
    sampling: bool = flag(False, "sample the answers (by --seed) instead of taking the likeliest token")
    temperature: float = flag(1.0, "with --sampling: logits are divided by it")
    top_k: int | None = flag(None, "with --sampling: only the k likeliest tokens")
    top_p: float = flag(0.95, "with --sampling: only the likeliest tokens that hold this probability")
    num_beams: int = flag(1, "beam search with this many beams")

    @property
    def generating(self) -> dict:
        """Return the arguments of `model.generate`."""
        options = {"do_sample": self.sampling, "num_beams": self.num_beams}
        if self.sampling:  # greedy search would warn of flags that it doesn't use
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k or 0}
        return options


@dataclass
class TrainingFlags:
    """Choose the trainer, its loss and rate, and the files of the trained model."""

    trainer: str = flag("none", "none, regular (back-propagation) or zo", choices=["none", "regular", "zo"])
    only_train_option: bool = flag(True, "the loss reads the option's tokens only, not the prompt's")
    train_as_classification: bool = flag(False, "the loss is cross-entropy over the options")
    learning_rate: float | None = flag(None, "step size (default: by trainer and mode)")
    lr_scheduler_type: str | None = flag(
        None, "schedule (default: constant under zo, linear to 0 with --zo_normalize or regular)"
    )
    max_grad_norm: float | None = flag(
        None, "zo: bound on |g| (default: 0, off); regular: of the gradient (1)"
    )
    save_on_interrupt: bool = flag(
        False, "on SIGTERM, SIGINT or SIGUSR1 finish the step, save and exit with 75: the command goes on"
    )
    overwrite: bool = flag(False, "remove the checkpoints of an earlier run in --output_dir")
    save_model: bool = flag(False, "write the trained model or adapter into --output_dir")
    save_merged: bool = flag(False, "write a plain model directory, adapters merged, to --output_dir/merged")


@dataclass
class ZerothOrderFlags:
    """Zeroth-order steps."""

    zo_eps: float | None = flag(None, "perturbation ε of zo (default: by mode)")
    zo_normalize: bool = flag(False, "divide g by the root of its running mean square")
    zo_queries: int = flag(1, "directions a step, whose updates are averaged")
    zo_distribution: str = flag(
        "gaussian", "of directions: gaussian or rademacher (±1)", choices=["gaussian", "rademacher"]
    )
    zo_optim: str = flag(
        "sgd", "sgd, momentum (0.9) or adamw, for adapters", choices=["sgd", "momentum", "adamw"]
    )
    zo_batched: str = flag(
        "auto", "both signs and all queries in one forward: auto, on or off", choices=["auto", "on", "off"]
    )
    zo_method: str = flag("mezo", "mezo, lozo, fzoo, ar1-zo, or file.py:Name with a subclass of zo.Method")
    zo_check: bool = flag(False, "measure first whether zo_eps, learning rate and precision fit")
    zo_cache_activations: bool = flag(
        False, "with --xgblora_layers top:N: run the layers below once per training row, and keep that"
    )
    objective: str | None = flag(
        None,
        "zo: what steps raise, no gradient needed: accuracy, f1, em, or file.py:name, a function of "
        "(predictions, right answers)",
    )
    non_diff: bool = flag(False, "--objective f1 where answers are generated, accuracy elsewhere")
    recipe: str | None = flag(
        None,
        "fast: boost B only, normalised, in the upper half of the layers, with cached activations; "
        "atoms: LoRA of rank 8, one row of A and column of B a step, normalised",
        choices=list(RECIPES),
    )
    replay: str | None = flag(
        None, "rebuild the weights of a run from its trajectory.safetensors; the flags are those of the run"
    )
    replay_steps: int | None = flag(None, "with --replay: so many steps (default: the run's result)")


@dataclass
class AdapterFlags:
    """Choose the trained part: LoRA, a prefix, the head, a probe; without any of them all weights."""

    lora: bool = flag(False, "train LoRA adapters of q_proj and v_proj (or what the model has instead)")
    lora_r: int | None = flag(None, "rank (default: 8; 1 with --xgblora)")
    lora_alpha: float = flag(16.0, "alpha; adapters are scaled by alpha / rank")
    lora_targets: str | None = flag(
        None, "adapt these Linear layers: names or last parts of them, with commas: q_proj,v_proj,fc1,fc2"
    )
    lora_freeze_a: bool = flag(False, "train B only; A stays the random draw of its round")
    prefix_tuning: bool = flag(False, "train keys and values in front of every layer's own")
    num_prefix: int = flag(5, "tokens of the prefix")
    no_reparam: bool = flag(True, "train the prefix itself; False: a small network that makes it")
    prefix_init_by_real_act: bool = flag(
        True, "without reparametrisation: start the prefix from the keys and values of random tokens"
    )
    head_tuning: bool = flag(False, "train the head only (and with it the embedding, where they are tied)")
    untie_emb: bool = flag(False, "give the head weights of its own first")
    linear_probing: bool = flag(
        False, "fit a logistic regression on the last hidden state of the training rows; no other training"
    )
    lp_early_stopping: bool = flag(False, "with --linear_probing: stop at a tolerance of 1e-2")
    export_rank: int | None = flag(
        None, "write the nearest LoRA of this rank to --output_dir/rank<r> and say what it lacks"
    )

    @property
    def targets(self) -> list[str]:
        """Names of `--lora_targets`; none where boosters/targets.py chooses."""
        return [word.strip() for word in (self.lora_targets or "").split(",") if word.strip()]


@dataclass
class BoostingFlags:
    """XGBLoRA: rounds of adapters that are merged."""

    xgblora: bool = flag(False, "boost with rank-1 adapters: train, merge, start afresh")
    xgblora_steps_per_iteration: int = flag(0, "merge every N steps; 0 merges by epochs")
    xgblora_merge_frequency: int = flag(1, "merge every n epochs (where steps are off)")
    xgblora_ensemble: bool = flag(
        False, "boosters stay beside the weights as one growing adapter: nothing is rounded"
    )
    xgblora_rank_schedule: str | None = flag(
        None, "rank of each round, the last one for all to come: 1,1,2,4 (default: 1)"
    )
    xgblora_layers: str = flag(
        "all",
        "adapt all decoder layers, the upper ones (top:N, top:half), or N drawn anew each round (random:N)",
    )
    xgblora_adaptive: bool = flag(
        False, "line search of each booster's step length on the dev rows' loss; a stalled round ends early"
    )
    xgblora_patience: int | None = flag(
        None, "adaptive: a round whose dev loss has not fallen for so many steps ends (default: N / 4)"
    )
    xgblora_best: bool = flag(False, "keep the first boosters that do best on the dev rows, drop the rest")
    staged: int = flag(0, "also evaluate the first 0, n, 2n, … boosters: a table, and a picture")

    @property
    def ranks(self) -> list[int] | None:
        """Ranks of the rounds, where a schedule is given; raises UsageError where it is none."""
        if self.xgblora_rank_schedule is None:
            return None
        words = self.xgblora_rank_schedule.split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise UsageError(
                f"--xgblora_rank_schedule {self.xgblora_rank_schedule}: ranks with commas, such as 1,1,2,4"
            )
        return [int(word) for word in words]


@dataclass
class RankFlags:
    """Several ranks under torchrun."""

    zo_parallel: str = flag(
        "data",
        "ranks divide the batch (data) or the directions of a step (queries)",
        choices=["data", "queries"],
    )
    rank_check_steps: int = flag(
        100, "compare the trained weights of all ranks every n steps (0: when saving)"
    )
    ddp_timeout: int = flag(600, "seconds until a rank that does not answer is given up")
    log_level_replica: str = "error"  # rank 0 speaks for all


# Title of a group in `--help all` -> its flags.
FLAG_GROUPS = {
    "data": DataFlags,
    "own data": CustomTaskFlags,
    "model": ModelFlags,
    "adapters": AdapterFlags,
    "boosting": BoostingFlags,
    "training": TrainingFlags,
    "zeroth order": ZerothOrderFlags,
    "generation": GenerationFlags,
    "several devices": RankFlags,
}


@dataclass
class OurArguments(
    DataFlags, CustomTaskFlags, ModelFlags, GenerationFlags, TrainingFlags, ZerothOrderFlags, AdapterFlags,
    BoostingFlags, RankFlags, TrainingArguments,
):  # fmt: skip
    """Every choice of a run, those of the library's `TrainingArguments` among them.

    Raises:
        UsageError: where choices exclude each other, need each other or lie out of range.
    """

    def __post_init__(self):
        if self.non_diff and not self.objective:
            self.objective = "auto"
        for message in refused_values(self):
            raise UsageError(message)
        validate(self, collectives.env_world_size())
        self._resolve_rates()
        self.best_by_task = self.metric_for_best_model is None and (
            self.load_best_model_at_end or self.save_strategy == "best"
        )
        if self.metric_for_best_model and self.greater_is_better is None:  # the library knows "loss" only
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") not in LOWER_IS_BETTER
        self.eos_token = self.eos_token.replace("\\n", "\n")
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        self.given_output_dir = self.output_dir
        self.output_dir = self.output_dir or "result"
        self._resolve_library_fields()
        with collectives.hide_world_from_trainer():
            super().__post_init__()
        for name in set(self.report_to) - {"none", *get_available_reporting_integrations()}:
            raise UsageError(f"--report_to {name}: its package is not installed")

    def _resolve_rates(self) -> None:
        """Give rank, schedule, learning rate, eps and clip their defaults, which depend on other choices."""
        zeroth_order = self.trainer == "zo"
        if self.ranks or self.lora_r is None:
            self.lora_r = self.ranks[0] if self.ranks else 1 if self.xgblora else 8
        if self.lr_scheduler_type is None:
            falls = not zeroth_order or self.zo_normalize
            self.lr_scheduler_type = (
                "linear" if falls else "constant_with_warmup" if self.warmup_steps else "constant"
            )
        # Under a constant rate a run may be prolonged: its length says nothing.
        steps = 0 if self.lr_scheduler_type == "constant" else self.max_steps
        learning_rate, eps = default_rates(
            self.trainer, self.mode, self.zo_normalize, self.lora_freeze_a, self.lora_alpha / self.lora_r,
            upper_half=self.xgblora_layers == "top:half", steps=steps,
        )  # fmt: skip
        self.learning_rate = learning_rate if self.learning_rate is None else self.learning_rate
        self.zo_eps = eps if self.zo_eps is None else self.zo_eps
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if zeroth_order else 1.0

    def _resolve_library_fields(self) -> None:
        """Set what the library's Trainer reads and this program decides."""
        self.remove_unused_columns = False
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.trainer == "zo":  # the filter would log NaN as 0
            self.logging_nan_inf_filter = False
        self.activation_checkpointing = self.gradient_checkpointing  # the library's name of today
        self.sharded = bool(self.fsdp)
        self.fsdp = None  # distributed/sharding.py divides the weights: the library does so on GPUs only

    def for_task(self, task) -> "OurArguments":
        """Return a copy whose objective and metric of the best checkpoint are those of a task.

        Raises:
            UsageError: for choices that this task has no use for.
        """
        args = copy.copy(self)
        if args.objective == "auto":
            args.objective = "accuracy" if task.kind == OPTIONS else "f1"
        if args.best_by_task:
            args.metric_for_best_model = task.metric_name
            args.greater_is_better = task.metric_name not in LOWER_IS_BETTER
        validate_task(args, task)
        return args

    def for_training_set(self, output_dir: Path) -> "OurArguments":
        """Return a copy for the Trainer of one training set, which writes to `output_dir`."""
        args = copy.copy(self)
        args.output_dir = str(output_dir)
        return args

    def for_replay(self, output_dir: Path) -> "OurArguments":
        """Return a copy for a Trainer that evaluates nothing and chooses no checkpoint."""
        args = self.for_training_set(output_dir)
        args.eval_strategy = "no"
        args.load_best_model_at_end = False
        return args

    @property
    def mode(self) -> str:
        """Return the name of the trained part in settings, file names and the table of default rates."""
        modes = {
            "xgblora": self.xgblora,
            "lora": self.lora,
            "prefix": self.prefix_tuning,
            "head": self.head_tuning,
            "probe": self.linear_probing,
        }
        return next((mode for mode, is_trained in modes.items() if is_trained), "ft")

    @property
    def learns(self) -> bool:
        """Return whether the training rows are learned from; otherwise they are demonstrations."""
        return self.trainer != "none" or self.linear_probing

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: at most 1, so that the library never uses DataParallel."""
        return min(1, super().n_gpu)

    @property
    def data_parallel_size(self) -> int:
        """Number of parts into which the ranks divide a batch."""
        return collectives.world_size() if self.zo_parallel == "data" else 1

    @property
    def train_batch_size(self) -> int:
        """Rows that are drawn at a time, for all ranks."""
        return self.per_device_train_batch_size * self.data_parallel_size

    @property
    def process_index(self) -> int:
        return collectives.rank()

    local_process_index = process_index  # what a single rank does, rank 0 does, and not one rank of each node

    def to_dict(self) -> dict:
        """Return all arguments; the library hides fields called a token, as if they were secrets."""
        return {**super().to_dict(), "eos_token": self.eos_token}

    def announce(self) -> None:
        """Log the settings that matter, as they took effect, in one block; then what looks like a mistake."""
        block = settings_block(self)
        width = max(map(len, block))
        logger.info("\n".join(f"{name:{width}}  {value}" for name, value in block.items()))
        for line in warnings(self):
            logger.warning(line)

    def run_dir(self, train_set: int) -> Path:
        """Return the output directory of a training set; by default no other task, mode or seed shares it."""
        if self.given_output_dir:
            several = (self.num_train_sets or 1) > 1
            return Path(self.output_dir) / f"trainset{train_set}" if several else Path(self.output_dir)
        words = [self.task_label, self.model_label, self.mode, self.trainer, self.tag, f"seed{self.seed}"]
        return Path("result") / "-".join(filter(None, [*words, f"trainset{train_set}"]))
