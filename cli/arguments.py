"""Every choice of a run: the flags, and what they default to; which of them exclude each other stands in rules.py.

Defaults that depend on other choices are one table, resolved before anything is loaded. Bad input is a UsageError.
"""

import difflib
import logging
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from cli import validation
from cli.defaults import RECIPES, default_rates, scale_rate_by_length, settings_block, warnings
from distributed import collectives
from scoring.metrics import LOWER_IS_BETTER
from tasks import TASKS, CustomTask
from utils import UsageError

logger = logging.getLogger(__name__)


def flag(default, group: str, help: str, **kwargs):
    """A command line flag: a dataclass field with its help and the group that `--help` lists it under."""
    return field(default=default, metadata={"help": help, "group": group, **kwargs})


@dataclass
class OurArguments(TrainingArguments):
    """Every choice of a run; defaults that depend on others are resolved in `__post_init__` and printed."""

    task_name: str = flag("SST2", "data", "one of " + ", ".join(TASKS) + "; or own: see the flags of own data")
    data_dir: str | None = flag(
        None, "data", "read DIR/<task>/{train,validation}.jsonl (own: DIR/{train,validation}.jsonl) instead of the hub"
    )
    num_train: int | None = flag(
        None, "data", "training rows, or demonstrations with --trainer none (default: all, or 0)"
    )
    num_dev: int | None = flag(None, "data", "rows from the end of the training draw to choose checkpoints on")
    num_eval: int | None = flag(None, "data", "validation rows to evaluate on (default: all)")
    num_train_sets: int | None = flag(None, "data", "repeat with this many training sets, seeds s, s+1, …")
    train_set_seed: int | None = flag(None, "data", "draw the training set with this seed instead of --seed")
    result_file: str | None = flag(None, "data", "where the result goes (default: result/<task>-<model>-….json)")
    tag: str = flag("", "data", "a word for the names of result file and output directory")
    predictions: str | None = flag(None, "data", "write one JSON line per evaluated example to this file")
    metric: str | None = flag(
        None,
        "data",
        "choose the best checkpoint by accuracy, macro_f1 or loss; by f1 or em of generated answers; by loss or "
        "perplexity of texts (default: the first of these)",
    )
    verbose: bool = flag(False, "data", "print the first prompt as the model sees it, with the scores of its options")
    no_eval: bool = flag(False, "data", "no evaluation on the validation rows at the end")

    template: str | None = flag(None, "own data", "the prompt, with {column} for a cell: '{review} It was'")
    label_words: str | None = flag(None, "own data", 'JSON: \'{"neg": "terrible", "pos": "great"}\'')
    label_column: str | None = flag(None, "own data", "the column that holds the label")
    candidates_column: str | None = flag(None, "own data", "multiple choice: the column with the list of candidates")
    answer_index_column: str | None = flag(None, "own data", "multiple choice: the column with the index of the answer")
    answer_column: str | None = flag(None, "own data", "generation: the column with the answer or a list of them")

    model_name: str = flag("facebook/opt-125m", "model", "hub name, model directory or .gguf file")
    load_float16: bool = flag(False, "model", "load the weights in float16 (default: float32)")
    load_bfloat16: bool = flag(False, "model", "load the weights in bfloat16; fast where the CPU or GPU has it")
    load_int8: bool = flag(False, "model", "quantise the Linear layers to 8 bits (bitsandbytes); train adapters only")
    load_int4: bool = flag(False, "model", "quantise them to 4 bits (NF4); train adapters only")
    device_map: str | None = flag(
        None, "model", "a model larger than a device: auto spreads its layers over GPUs, host and disk; or FILE.json: "
        "{module: GPU number, cpu or disk}",
    )  # fmt: skip
    offload_folder: str | None = flag(
        None, "model", "with --device_map: where layers go that can't be read from the model's own files"
    )
    no_auto_device: bool = flag(
        False,
        "model",
        "of MeZO's commands: the model stays on one device, as it does here unless --device_map is given",
    )
    trust_remote_code: bool = flag(
        False, "model", "run the code that comes with a model; without it such a model is refused"
    )
    max_length: int = flag(2048, "model", "longest prompt in tokens; longer ones are cut on the left")
    sfc: bool = flag(False, "model", "calibrated scores: minus the score of the option without the input")
    icl_sfc: bool = flag(False, "model", "as --sfc, but the demonstrations stay in front of the missing input")
    adapter: str | None = flag(None, "model", "evaluate, or go on from, this LoRA or prefix (ours or PEFT's)")
    boosters: int | None = flag(None, "model", "of the chain in --adapter, take only the first so many boosters")

    max_new_tokens: int = flag(50, "generation", "longest answer in tokens; prompts leave room for it in --max_length")
    eos_token: str = flag("\n", "generation", "an answer ends at this text (default: a newline)")
    sampling: bool = flag(False, "generation", "sample the answers (by --seed) instead of taking the likeliest token")
    temperature: float = flag(1.0, "generation", "with --sampling: logits are divided by it")
    top_k: int | None = flag(None, "generation", "with --sampling: only the k likeliest tokens")
    top_p: float = flag(0.95, "generation", "with --sampling: only the likeliest tokens that hold this probability")
    num_beams: int = flag(1, "generation", "beam search with this many beams")

    trainer: str = flag("none", "training", "none, regular (back-propagation) or zo", choices=["none", "regular", "zo"])
    only_train_option: bool = flag(True, "training", "the loss reads the option's tokens only, not the prompt's")
    train_as_classification: bool = flag(False, "training", "the loss is cross-entropy over the options")
    objective: str | None = flag(
        None, "training", "zo: what steps raise, no gradient needed: accuracy, f1, em, or file.py:name, a function of "
        "(predictions, right answers)",
    )  # fmt: skip
    non_diff: bool = flag(False, "training", "--objective f1 where answers are generated, accuracy elsewhere")
    zo_eps: float | None = flag(None, "training", "perturbation ε of zo (default: by mode)")
    zo_normalize: bool = flag(False, "training", "divide g by the root of its running mean square")
    zo_queries: int = flag(1, "training", "directions a step, whose updates are averaged")
    zo_distribution: str = flag(
        "gaussian", "training", "of directions: gaussian or rademacher (±1)", choices=["gaussian", "rademacher"]
    )
    zo_optim: str = flag(
        "sgd", "training", "sgd, momentum (0.9) or adamw, for adapters", choices=["sgd", "momentum", "adamw"]
    )
    zo_batched: str = flag(
        "auto", "training", "both signs and all queries in one forward: auto, on or off", choices=["auto", "on", "off"]
    )
    zo_parallel: str = flag(
        "data",
        "training",
        "under torchrun: ranks divide the batch (data) or the directions of a step (queries)",
        choices=["data", "queries"],
    )
    rank_check_steps: int = flag(
        100, "training", "under torchrun: compare the trained weights of all ranks every n steps (0: when saving)"
    )
    ddp_timeout: int = flag(600, "training", "under torchrun: seconds until a rank that does not answer is given up")
    zo_method: str = flag("mezo", "training", "mezo, lozo, fzoo, ar1-zo, or file.py:Name with a subclass of zo.Method")
    zo_check: bool = flag(False, "training", "measure first whether zo_eps, learning rate and precision fit")
    replay: str | None = flag(
        None, "training", "rebuild the weights of a run from its trajectory.safetensors; the flags are those of the run"
    )
    replay_steps: int | None = flag(None, "training", "with --replay: so many steps (default: the run's result)")
    save_on_interrupt: bool = flag(
        False, "training", "on SIGTERM, SIGINT or SIGUSR1 finish the step, save and exit with 75: the command goes on"
    )
    overwrite: bool = flag(False, "training", "remove the checkpoints of an earlier run in --output_dir")
    save_model: bool = flag(False, "training", "write the trained model or adapter into --output_dir")
    save_merged: bool = flag(
        False, "training", "write a plain model directory, adapters merged, to --output_dir/merged"
    )

    lora: bool = flag(False, "adapters", "train LoRA adapters of q_proj and v_proj (or what the model has instead)")
    lora_r: int | None = flag(None, "adapters", "rank (default: 8; 1 with --xgblora)")
    lora_alpha: float = flag(16.0, "adapters", "alpha; adapters are scaled by alpha / rank")
    lora_targets: str | None = flag(
        None, "adapters", "adapt these Linear layers: names or last parts of them, with commas: q_proj,v_proj,fc1,fc2"
    )
    lora_freeze_a: bool = flag(False, "adapters", "train B only; A stays the random draw of its round")
    xgblora: bool = flag(False, "adapters", "boost with rank-1 adapters: train, merge, start afresh")
    xgblora_steps_per_iteration: int = flag(0, "adapters", "merge every N steps; 0 merges by epochs")
    xgblora_merge_frequency: int = flag(1, "adapters", "merge every n epochs (where steps are off)")
    recipe: str | None = flag(
        None, "adapters", "fast: boost B only, normalised, in the upper half of the layers, with cached activations; "
        "atoms: LoRA of rank 8, one row of A and column of B a step, normalised", choices=list(RECIPES),
    )  # fmt: skip
    xgblora_ensemble: bool = flag(
        False, "adapters", "boosters stay beside the weights as one growing adapter: nothing is rounded"
    )
    xgblora_rank_schedule: str | None = flag(
        None, "adapters", "rank of each round, the last one for all to come: 1,1,2,4 (default: 1)"
    )
    xgblora_layers: str = flag(
        "all",
        "adapters",
        "adapt all decoder layers, the upper ones (top:N, top:half), or N drawn anew each round (random:N)",
    )
    xgblora_adaptive: bool = flag(
        False, "adapters", "line search of each booster's step length on the dev rows' loss; a stalled round ends early"
    )
    xgblora_patience: int | None = flag(
        None, "adapters", "adaptive: a round whose dev loss has not fallen for so many steps ends (default: N / 4)"
    )
    xgblora_a_warmup: int = flag(0, "adapters", "hold A for the first n steps of a round, until B has left 0")
    xgblora_restart_lr: bool = flag(False, "adapters", "the learning rate schedule spans a round and begins anew")
    xgblora_best: bool = flag(False, "adapters", "keep the first boosters that do best on the dev rows, drop the rest")
    staged: int = flag(0, "adapters", "also evaluate the first 0, n, 2n, … boosters: a table, and a picture")
    export_rank: int | None = flag(
        None, "adapters", "write the nearest LoRA of this rank to --output_dir/rank<r> and say what it lacks"
    )
    zo_cache_activations: bool = flag(
        False, "training", "with --xgblora_layers top:N: run the layers below once per training row, and keep that"
    )
    prefix_tuning: bool = flag(False, "adapters", "train keys and values in front of every layer's own")
    num_prefix: int = flag(5, "adapters", "tokens of the prefix")
    no_reparam: bool = flag(True, "adapters", "train the prefix itself; False: a small network that makes it")
    prefix_init_by_real_act: bool = flag(
        True, "adapters", "without reparametrisation: start the prefix from the keys and values of random tokens"
    )
    head_tuning: bool = flag(False, "adapters", "train the head only (and with it the embedding, where they are tied)")
    untie_emb: bool = flag(False, "adapters", "give the head weights of its own first")
    linear_probing: bool = flag(
        False, "adapters", "fit a logistic regression on the last hidden state of the training rows; no other training"
    )
    lp_early_stopping: bool = flag(False, "adapters", "with --linear_probing: stop at a tolerance of 1e-2")

    learning_rate: float | None = flag(None, "training", "step size (default: by trainer and mode)")
    lr_scheduler_type: str | None = flag(
        None, "training", "schedule (default: constant under zo, linear to 0 with --zo_normalize or regular)"
    )
    max_grad_norm: float | None = flag(
        None, "training", "zo: bound on |g| (default: 0, off); regular: of the gradient (1)"
    )

    def __post_init__(self):
        zo = self.trainer == "zo"
        modes = {"xgblora": self.xgblora, "lora": self.lora, "prefix": self.prefix_tuning, "head": self.head_tuning}
        modes |= {"probe": self.linear_probing, "ft": True}
        self.mode = next(mode for mode, on in modes.items() if on)
        if self.non_diff and not self.objective:
            self.objective = "auto"
        validation.validate(self)
        if self.ranks or self.lora_r is None:
            self.lora_r = self.ranks[0] if self.ranks else 1 if self.xgblora else 8
        scaling = self.lora_alpha / self.lora_r
        upper = self.xgblora_layers == "top:half"
        if self.lr_scheduler_type is None:
            falls = not zo or self.zo_normalize or self.xgblora_restart_lr
            self.lr_scheduler_type = "linear" if falls else "constant_with_warmup" if self.warmup_steps else "constant"
        # Under a constant rate a run may be prolonged: its length says nothing.
        steps = 0 if self.lr_scheduler_type == "constant" else self.max_steps
        learning_rate, eps = default_rates(
            self.trainer, self.mode, self.zo_normalize, self.lora_freeze_a, scaling, upper, steps
        )
        self.learning_rate = learning_rate if self.learning_rate is None else self.learning_rate
        self.zo_eps = eps if self.zo_eps is None else self.zo_eps
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if zo else 1.0
        self.best_by_task = self.metric_for_best_model is None and (
            self.load_best_model_at_end or self.save_strategy == "best"
        )
        if self.metric_for_best_model and self.greater_is_better is None:  # the library knows "loss" only
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") not in LOWER_IS_BETTER
        self.eos_token = self.eos_token.replace("\\n", "\n")
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        self.remove_unused_columns = False
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self.logging_nan_inf_filter = self.logging_nan_inf_filter and not zo  # it would log NaN as 0
        self.given_output_dir = self.output_dir
        self.output_dir = self.output_dir or "result"
        if self.torch_compile and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            logger.warning("--torch_compile: no C++ compiler on this machine, running eagerly")
            self.torch_compile = False
        self.sharded, self.fsdp = bool(self.fsdp), None  # by distributed/sharding.py: the library takes GPUs only
        gpus = collectives.choose_gpu()
        if self.sharded and not self.use_cpu:
            collectives.refuse_shared_gpus(gpus)
        with collectives.hide_world_from_trainer():
            super().__post_init__()
        for name in set(self.report_to) - {"none", *get_available_reporting_integrations()}:
            raise UsageError(f"--report_to {name}: its package is not installed")
        collectives.join_process_group(self.ddp_timeout, self.sharded)
        if not collectives.is_main_process():
            self.disable_tqdm, self.log_level_replica = True, "error"
        self._n_gpu = min(1, self.n_gpu)  # never DataParallel

    @property
    def shares(self) -> int:
        """Into how many parts the ranks divide a batch."""
        return collectives.world_size() if self.zo_parallel == "data" else 1

    @property
    def train_batch_size(self) -> int:
        """Rows that are drawn at a time, for all ranks."""
        return self.per_device_train_batch_size * self.shares

    @property
    def process_index(self) -> int:
        return collectives.rank()

    local_process_index = process_index  # what one rank does alone, rank 0 does, and not one of each node

    def to_dict(self) -> dict:
        """All arguments; the library hides what is called a token, as if it were a secret."""
        return {**super().to_dict(), "eos_token": self.eos_token}

    def announce(self) -> None:
        """The settings that matter, as they took effect, in one block; then what looks like a mistake."""
        width = max(map(len, block := settings_block(self)))
        logger.info("\n".join(f"{name:{width}}  {value}" for name, value in block.items()))
        for line in warnings(self):
            logger.warning(line)

    def choose_best_by(self, metric: str) -> None:
        """Take the task's metric to choose the best checkpoint by, where no flag says otherwise."""
        if self.best_by_task:
            self.metric_for_best_model, self.greater_is_better = metric, metric not in LOWER_IS_BETTER

    @property
    def own(self) -> CustomTask:
        """What the flags of own data say."""
        return CustomTask(**{f.name: getattr(self, f.name) for f in fields(CustomTask)})

    @property
    def targets(self) -> list[str]:
        """Names of `--lora_targets`; none where lora.py chooses."""
        return [word.strip() for word in (self.lora_targets or "").split(",") if word.strip()]

    @property
    def ranks(self) -> list[int] | None:
        """Ranks of the rounds, where a schedule is given."""
        if self.xgblora_rank_schedule is None:
            return None
        words = self.xgblora_rank_schedule.split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise UsageError(
                f"--xgblora_rank_schedule {self.xgblora_rank_schedule}: ranks with commas, such as 1,1,2,4"
            )
        return [int(word) for word in words]

    @property
    def generating(self) -> dict:
        """What `model.generate` takes of these flags."""
        chosen = {"do_sample": self.sampling, "num_beams": self.num_beams}
        if self.sampling:  # greedy search would warn of flags that it doesn't use
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k or 0}
        return chosen

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.load_float16 else torch.bfloat16 if self.load_bfloat16 else torch.float32

    @property
    def bits(self) -> int | None:
        """Of the Linear layers' weights, where they are quantised."""
        return 8 if self.load_int8 else 4 if self.load_int4 else None

    @property
    def learns(self) -> bool:
        """Whether the training rows are learned from; otherwise they are demonstrations."""
        return self.trainer != "none" or self.linear_probing

    @property
    def model_label(self) -> str:
        """The model's name as it stands in file names."""
        return Path(self.model_name.rstrip("/")).name.removesuffix(".gguf")

    @property
    def task_label(self) -> str:
        """The task's name as it stands in file names: tasks of one's own are told apart by their folder."""
        own = self.task_name == "own" and self.data_dir
        return f"own-{Path(self.data_dir).resolve().name}" if own else self.task_name

    def run_dir(self, train_set: int) -> Path:
        """Output directory of one training set: by default one that no other task, mode or seed shares."""
        if self.given_output_dir:
            several = (self.num_train_sets or 1) > 1
            return Path(self.output_dir) / f"trainset{train_set}" if several else Path(self.output_dir)
        tag = f"-{self.tag}" if self.tag else ""
        name = (
            f"{self.task_label}-{self.model_label}-{self.mode}-{self.trainer}{tag}-seed{self.seed}-trainset{train_set}"
        )
        return Path("result") / name


class Parser(HfArgumentParser):
    """HfArgumentParser with `--help` in groups and errors in one line."""

    def _parse_dataclass_field(self, parser, field):  # the base class makes it a static method and calls it on self
        metadata = dict(field.metadata)
        title = metadata.pop("group", None)
        if title:
            groups = {group.title: group for group in self._action_groups}
            parser = groups.get(title) or self.add_argument_group(title)
            field.metadata = metadata
        HfArgumentParser._parse_dataclass_field(parser, field)

    def error(self, message):
        raise UsageError(message)


def take_recipe(parser: Parser, argv) -> None:
    """Make the values of a `--recipe` the defaults of their flags, so that a flag that is given counts more."""
    recipe = RECIPES.get(parser.parse_known_args(argv)[0].recipe, {})
    parser.set_defaults(**recipe)
    chosen = parser.parse_known_args(argv)[0]
    if "learning_rate" in recipe:
        steps = 0 if chosen.lr_scheduler_type == "constant" else chosen.max_steps
        parser.set_defaults(learning_rate=scale_rate_by_length(recipe["learning_rate"], steps))
    if chosen.objective or chosen.non_diff or not chosen.xgblora_layers.startswith("top"):
        parser.set_defaults(zo_cache_activations=False)  # they have no use for it


def parse(argv=None) -> OurArguments:
    """Arguments of the command line; raises UsageError for a flag that does not exist, with the nearest one."""
    parser = Parser(
        OurArguments, allow_abbrev=False, description="Fine-tune and evaluate language models with forward passes only"
    )
    try:
        take_recipe(parser, argv)
        args, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UsageError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        raise UsageError(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    return args
