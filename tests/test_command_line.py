"""What stands before a run: configuration files, the order of precedence, `--help`, and no flags at all."""

import sys

import pytest

import run
from cli.command_line import COMMON_FLAGS, EXAMPLES, GROUPS, REMOVED, FlagParser, parse
from cli.defaults import RECIPES
from cli.inherited_flags import DESCRIPTIONS
from utils import UsageError


@pytest.fixture
def config(tmp_path):
    """config(text) -> `--config` and the path of a file with this text."""

    def write(text: str | bytes, name: str = "run.yaml") -> list[str]:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(path)]

    return write


# ---- the configuration file ----

FILE = """\
# a comment
trainer: zo
lora: true
zo_normalize: no
save_strategy: no          # a word, not False
zo_batched: on
learning_rate: 1e-3        # a number, not a text
zo-eps: 0.5
max_steps: 12
tag: "007"
num_dev: null
num_eval: ~
lora_targets: [q_proj, v_proj]
eos_token: "\\n\\n"
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-5}
template: "- {text} = 'x': # y"
label_words:
  no: terrible
  1: great
task_name: own
no_reparam: False
"""


def test_values_are_what_the_command_line_would_make_of_them(config):
    args = parse(config(FILE))
    expected = {
        "trainer": "zo", "lora": True, "zo_normalize": False, "zo_batched": "on", "learning_rate": 1e-3,
        "zo_eps": 0.5,
        "max_steps": 12, "tag": "007", "num_dev": None, "num_eval": None, "lora_targets": "q_proj,v_proj",
        "eos_token": "\n\n", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "template": "- {text} = 'x': # y",
        "label_words": '{"no": "terrible", "1": "great"}', "no_reparam": False, "task_name": "own",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.save_strategy == "no"
    assert args.lr_scheduler_type == "cosine_with_min_lr"


def test_the_command_line_wins_over_the_file_and_the_file_over_a_recipe(config):
    recipe = RECIPES["fast"]
    text = "recipe: fast\ntrainer: zo\nxgblora_steps_per_iteration: 7\nseed: 3\nlora_freeze_a: false\n"
    file = config(text)
    args = parse([*file, "--seed", "5"])
    assert (args.seed, args.xgblora_steps_per_iteration, args.lora_freeze_a) == (5, 7, False)
    assert args.xgblora and args.xgblora_layers == recipe["xgblora_layers"] and args.zo_normalize
    first = parse(["--seed", "5", *file])  # wherever it stands
    assert first.seed == 5
    assert parse([*file, "--recipe", "atoms", "--xgblora_steps_per_iteration", "0"]).lora_alpha == 1024


def test_a_truth_alone_is_true():
    assert parse(["--disable_tqdm", "--lora", "--trainer", "zo"]).disable_tqdm is True
    assert parse(["--disable_tqdm", "False"]).disable_tqdm is False


def test_a_later_file_wins_over_an_earlier_one(config):
    files = config("seed: 1\nmax_steps: 2\n", "a.yaml") + config("seed: 3\n", "b.yaml")
    assert (parse(files).seed, parse(files).max_steps) == (3, 2)


BAD = {
    "nearest": (
        "xgblora_steps_per_iteratoin: 3",
        ("xgblora_steps_per_iteratoin", "xgblora_steps_per_iteration?"),
    ),
    "far": ("zzzz: 3", ("unknown flag zzzz",)),
    "dashes in front": ("--seed: 3", ("unknown flag --seed", "seed?")),
    "refused": ("push_to_hub: true", ("--push_to_hub is not supported", "hf upload")),
    "removed": ("xgblora_restart_lr: true", ("--xgblora_restart_lr was removed",)),
    "a file in a file": ("config: other.yaml", ("unknown flag config",)),
    "a wrong value": ("num_train: many", ("--num_train", "many")),
    "a wrong choice": ("trainer: magic", ("--trainer", "magic")),
    "a wrong truth": ("lora: perhaps", ("perhaps",)),
    "twice": ("seed: 1\nlora: true\nseed: 2", ("seed stands there twice", "line 3")),
    "a list": ("- seed\n- 3", ("holds no flags",)),
    "a word": ("seed", ("holds no flags",)),
    "nothing": ("", ("holds no flags",)),
    "two documents": ("seed: 1\n---\nseed: 2", ("line 2",)),
    "not YAML": ("seed: [1", ("line 1",)),
    "a tab": ("seed:\n\t- 1", ("line 2",)),
    "an object": ("seed: !!python/object/apply:os.system ['true']", ("line 1",)),
    "lists of lists": ("lora_targets: [[a]]", ("lora_targets",)),
    "itself": ("label_words: &a {x: *a}", ("--config",)),
    "nested": ("seed: " + "[" * 3000, ("--config",)),
    "not UTF-8": (b"tag: \xff", ("utf-8",)),
    "not for people": (b"seed: \x00", ("--config",)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(name, config, capsys):
    text, words = BAD[name]
    flags = config(text)
    assert run.main(flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"run.py: error: --config {flags[1]}")
    assert all(word in lines[0] for word in words), lines


def test_a_file_that_is_not_there(tmp_path, capsys):
    for path, words in ((tmp_path / "no.yaml", "No such file"), (tmp_path, "directory")):
        assert run.main(["--config", str(path)]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"run.py: error: --config {path}: ")
        assert words in line and line.count("\n") == 1


def test_a_file_runs(config, model_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"model_name: {model_dir}\ndata_dir: {data_dir}\ntrainer: zo\nlora: true\nmax_steps: 2\n"
    assert run.main(config(f"{text}num_train: 8\noutput_dir: out\nresult_file: r.json\n")) == 0
    assert (tmp_path / "out" / "checkpoint-2").is_dir() and (tmp_path / "r.json").is_file()


# ---- flags that are not there ----


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_flag_says_so(name, capsys):
    assert run.main(["--trainer", "zo", f"--{name}", "3"]) == 2
    error = capsys.readouterr().err
    reason = "it lost in our measurements (research/EXPERIMENTS.md)"
    assert error == f"run.py: error: --{name} was removed: {reason}\n"


UNKNOWN = {"--lorra": "did you mean --lora?", "--zo-ep": "did you mean --zo_eps?",
           "--xyzzy": "unknown flag --xyzzy",
           "word": "unknown flag word", "--max_step": "did you mean --max_steps?"}  # fmt: skip


@pytest.mark.parametrize("flag", UNKNOWN)
def test_an_unknown_flag_names_the_nearest(flag):
    with pytest.raises(UsageError, match=UNKNOWN[flag].replace("?", r"\?")):
        parse([flag, "3"] if flag.startswith("-") else [flag])


# ---- help ----


def test_no_flags_show_how_to_begin(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    for argv in (None, []):
        assert run.main(argv) == 2
        assert capsys.readouterr().err == EXAMPLES
    assert EXAMPLES.count("\n  python ") == 3


def test_the_examples_are_understood():
    text = EXAMPLES.replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("  python run.py")]
    assert len(commands) == 2
    for command in commands:
        parse(command.partition("#")[0].split()[2:])


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ending:
        run.main(["--help", *words])
    assert ending.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_shows_common_flags_and_help_all_the_rest(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    short = help_of(capsys)
    full = help_of(capsys, "all")
    names = {word for line in full.splitlines() for word in line.split() if word.startswith("--")}
    for name in FlagParser().names:
        assert f"--{name}" in names
        common = any(name in group for group in COMMON_FLAGS.values())
        assert any(line.strip().split()[:1] == [f"--{name}"] for line in short.splitlines()) == common
    assert 25 <= sum(map(len, COMMON_FLAGS.values())) <= 40 and len(short.splitlines()) <= 110
    assert all(len(line) <= int(columns) for line in short.splitlines())
    assert "None" not in full and "--push_to_hub" not in full and "--xgblora_a_warmup" not in full
    assert help_of(capsys, "all") == full  # a second parser in the same process has the groups too


def test_every_flag_has_a_group_and_a_text():
    parser = FlagParser()
    assert {title for title, actions in parser.groups.items() if actions} == set(GROUPS)
    assert {group for group, _ in DESCRIPTIONS.values()} <= set(GROUPS)
    assert all(action.help for actions in parser.groups.values() for action in actions)


def test_help_of_another_word_is_refused(capsys):
    assert run.main(["--help", "everything"]) == 2
    assert "everything" in capsys.readouterr().err
