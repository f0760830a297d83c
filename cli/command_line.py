"""The command line: flags, `--config FILE.yaml`, recipes, `--help`; bad input is a UsageError of one line.

    flags on the command line  >  flags in `--config` files  >  values of `--recipe`  >  defaults

The flags themselves are the fields of `OurArguments`; which of the library's are among them stands in
cli/inherited_flags.py.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import shutil
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from cli.arguments import FLAG_GROUPS, OurArguments
from cli.defaults import RECIPES, scale_rate_by_length
from cli.inherited_flags import DESCRIPTIONS, OPTIMIZERS, REFUSED
from utils import UsageError

EXAMPLES = """\
run.py fine-tunes and evaluates language models with forward passes only. Three ways to begin:

  python starter.py starter                # a small model and four tasks, without a model hub

  python run.py --model_name starter/smollm2-135m --data_dir starter --task_name Reviews \\
      --trainer zo --recipe fast --train_as_classification --num_train 1000 --max_steps 400

  python run.py --model_name facebook/opt-125m --task_name SST2 --num_eval 100     # zero-shot, from the hub

python run.py --help has the common flags, --help all has every flag. Recipes and troubleshooting:
XGBLORA_QUICKSTART.md. Data of your own, models, tasks: README.md.
"""

# What `--help` shows; `--help all` shows the rest too.
COMMON_FLAGS: dict[str, tuple[str, ...]] = {
    "data": ("task_name", "data_dir", "num_train", "num_dev", "num_eval", "train_set_seed"),
    "own data (--task_name own)": ("template", "label_words", "label_column"),
    "model": ("model_name", "load_bfloat16", "max_length", "adapter"),
    "what is trained (none of these: all weights)": (
        "lora", "xgblora", "xgblora_steps_per_iteration", "lora_freeze_a", "prefix_tuning", "recipe",
    ),
    "training": (
        "trainer", "max_steps", "per_device_train_batch_size", "learning_rate", "seed",
        "train_as_classification", "zo_eps", "zo_normalize",
    ),
    "evaluation and checkpoints": ("eval_strategy", "eval_steps", "save_steps", "load_best_model_at_end"),
    "output": ("output_dir", "save_model", "save_merged", "predictions", "save_on_interrupt", "overwrite"),
}  # fmt: skip
# The order of the groups in `--help all`, and the group of each flag of our own.
GROUPS = (
    "data", "own data", "model", "adapters", "boosting", "training", "zeroth order", "back-propagation",
    "evaluation and checkpoints", "log", "generation", "several devices", "machine",
)  # fmt: skip
GROUP_OF = {field.name: title for title, flags in FLAG_GROUPS.items() for field in dataclasses.fields(flags)}

# Flags that the program had once.
REMOVED = dict.fromkeys(
    ("xgblora_a_warmup", "xgblora_restart_lr"), "it lost in our measurements (research/EXPERIMENTS.md)"
)


# ---- the parser and its help ----


class FlagFormatter(argparse.HelpFormatter):
    """Writes a flag as one name and a short word for its value, with its default where there is one."""

    def __init__(self, prog: str, **kwargs):
        width = min(shutil.get_terminal_size().columns, 110)
        super().__init__(prog, max_help_position=30, width=width, **kwargs)

    def _format_action_invocation(self, action) -> str:
        if action.choices and action.dest != "help":
            value = "{" + ",".join(map(str, action.choices)) + "}"
            value = value if len(value) <= 30 else "WORD"
        elif action.nargs == "?":
            value = {"help": "[all]", "fsdp": "[full_shard]"}.get(action.dest, "")
            value = value or ("[True|False]" if action.default is True else "")
        else:
            value = action.metavar or {int: "N", float: "X"}.get(action.type, "TEXT")
        return f"--{action.dest} {value}".rstrip()

    def _get_help_string(self, action) -> str:
        text = action.help or ""
        has_no_default = action.default in (None, False, "") or action.dest in ("help", "config")
        if has_no_default or "default" in text:
            return text
        return f"{text} (default: {action.default})".replace("\n", "\\n")


class ShowHelp(argparse.Action):
    """`--help` and `--help all`."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.help_text(full=values == "all"), end="")
        parser.exit()


class FlagParser(HfArgumentParser):
    """HfArgumentParser of our flags and the supported ones of the library, with errors in one line."""

    def __init__(self):
        self.groups: dict[str, list[argparse.Action]] = {title: [] for title in GROUPS}
        super().__init__(OurArguments, add_help=False, allow_abbrev=False, formatter_class=FlagFormatter)
        self.add_argument(
            "-h", "--help", action=ShowHelp, nargs="?", choices=["all"], default=argparse.SUPPRESS,
            help="the common flags, or all of them",
        )  # fmt: skip
        self.add_argument(
            "--config", action="append", metavar="FILE.yaml",
            help="read flags from a file, a line `name: value` each; flags on the command line win",
        )  # fmt: skip

    def _parse_dataclass_field(self, parser, field):
        """Add a field's flag, unless it is refused.

        The base class makes this a static method and calls it on self.
        """
        if field.name in REFUSED or field.name in REMOVED:
            return
        field = copy.copy(field)  # the class's own field, which the next parser needs
        metadata = dict(field.metadata)
        if field.name in DESCRIPTIONS:
            title, metadata["help"] = DESCRIPTIONS[field.name]
        else:
            title = GROUP_OF[field.name]
        field.metadata = metadata
        HfArgumentParser._parse_dataclass_field(parser, field)
        action = self._option_string_actions[f"--{field.name}"]
        if field.name == "optim":
            action.choices = OPTIMIZERS
        if field.type == bool | None:  # the base class makes `--disable_tqdm` alone an error
            action.nargs = "?"
            action.const = True
        self.groups[title].append(action)

    def help_text(self, full: bool) -> str:
        """Return the help: the common flags, or with `full` all of them."""
        flags = {action.dest: action for actions in self.groups.values() for action in actions}
        sections = {"program": [self._option_string_actions[name] for name in ("--help", "--config")]}
        if full:
            sections |= self.groups
        else:
            sections |= {title: [flags[name] for name in names] for title, names in COMMON_FLAGS.items()}
        formatter = self._get_formatter()
        formatter.add_text(
            "python run.py [flags]: fine-tune and evaluate language models with forward passes only"
        )  # fmt: skip
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if not full:
            formatter.add_text(
                "--help all shows every flag. Recipes and troubleshooting: XGBLORA_QUICKSTART.md"
            )  # fmt: skip
        return formatter.format_help()

    @property
    def names(self) -> list[str]:
        """Names of all flags, as a `--config` file has them."""
        return [action.dest for actions in self.groups.values() for action in actions]

    def error(self, message: str):
        raise UsageError(message)


# ---- the configuration file ----


class TextLoader(yaml.SafeLoader):
    """Reads every word of a file as text, and null as None; the type of the flag decides what a word means.

    YAML's own types would make False of `eval_strategy: no` and text of `learning_rate: 1e-5`.
    """


TextLoader.yaml_implicit_resolvers = {
    character: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_mapping(text: str) -> dict:
    """Return the {name: value} of a YAML text.

    Raises:
        UsageError: it is not a mapping of names, or has a name twice.
        yaml.YAMLError: it is not YAML.
    """
    loader = TextLoader(text)
    node = loader.get_single_node()
    if not isinstance(node, yaml.MappingNode):
        raise UsageError("holds no flags, which are lines such as `max_steps: 400`")
    mapping = {}
    for key, value in node.value:
        name = str(loader.construct_object(key, deep=True))
        if name in mapping:
            raise UsageError(f"{name} stands there twice (line {key.start_mark.line + 1})")
        mapping[name] = loader.construct_object(value, deep=True)
    return mapping


def as_number(text):
    """Return the number that a text is in JSON, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, TypeError):
        return text


def as_word(name: str, value) -> str:
    """Return a value of a `--config` file as the word that the command line has for it.

    Args:
        value: text; a list, which the command line writes with commas; or a mapping, which it writes as JSON.
    """
    if isinstance(value, dict):
        if name == "lr_scheduler_kwargs":  # the other one, label_words, holds texts
            value = {key: as_number(item) for key, item in value.items()}
        return json.dumps(value)
    if isinstance(value, list):
        if any(isinstance(item, list | dict) or item is None for item in value):
            raise UsageError(f"{name} is a list of more than words")
        return ",".join(str(item) for item in value)
    return str(value)


def refuse_unknown(parser: FlagParser, name: str, word: str) -> None:
    """Raise UsageError for an unknown flag, with the flag or command in its place, or the nearest flag.

    Args:
        name: the flag without dashes in front, its parts joined by "_".
        word: the flag as it was written.
    """
    for candidate in (name, name.removeprefix("no_")):
        if candidate in REMOVED:
            raise UsageError(f"--{candidate} was removed: {REMOVED[candidate]}")
        if candidate in REFUSED:
            raise UsageError(f"--{candidate} is not supported: {REFUSED[candidate]}")
    matches = difflib.get_close_matches(name, parser.names, 1)
    dashes = "--" if word.startswith("-") else ""
    raise UsageError(f"unknown flag {word}" + (f"; did you mean {dashes}{matches[0]}?" if matches else ""))


def read_config(parser: FlagParser, path: str) -> list[str]:
    """Return the flags of a YAML file as words of a command line.

    Args:
        path: a file of lines `name: value`, names without dashes. A value may be a list or a mapping; null
            leaves the flag out.

    Raises:
        UsageError: there is no such file, it is not a mapping of flags, or a value does not fit its flag.
    """
    try:
        words = []
        for key, value in read_mapping(Path(path).read_text(encoding="utf-8-sig")).items():
            name = key.replace("-", "_")
            if name not in parser.names:
                refuse_unknown(parser, name, key)
            if value is not None:
                words.append(f"--{name}={as_word(name, value)}")
        parser.parse_known_args(words)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"--config {path}{line}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UsageError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"--config {path}: {error}") from error
    return words


# ---- from words to arguments ----


def take_recipe(parser: FlagParser, words: list[str]) -> None:
    """Make the values of a `--recipe` the defaults of their flags: a flag on the command line wins."""
    recipe = RECIPES.get(parser.parse_known_args(words)[0].recipe, {})
    parser.set_defaults(**recipe)
    flags = parser.parse_known_args(words)[0]
    if "learning_rate" in recipe:
        steps = 0 if flags.lr_scheduler_type == "constant" else flags.max_steps
        parser.set_defaults(learning_rate=scale_rate_by_length(recipe["learning_rate"], steps))
    if flags.objective or flags.non_diff or not flags.xgblora_layers.startswith("top"):
        parser.set_defaults(zo_cache_activations=False)  # these flags have no use for the cache


def parse(argv: list[str] | None = None) -> OurArguments:
    """Return the arguments of a command line, `sys.argv` by default.

    Raises:
        UsageError: a flag does not exist or is not supported, or a value does not fit.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = FlagParser()
    try:
        files = parser.parse_known_args(words)[0].config or []
        words = [word for path in files for word in read_config(parser, path)] + words
        take_recipe(parser, words)
        values, unknown_words = parser.parse_known_args(words)
        if unknown_words:
            word = unknown_words[0].split("=")[0]
            refuse_unknown(parser, word.lstrip("-").replace("-", "_"), word)
        names = {field.name for field in dataclasses.fields(OurArguments)}
        return OurArguments(**{name: value for name, value in vars(values).items() if name in names})
    except UsageError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error
