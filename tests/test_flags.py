"""Each supported flag of the library does here what its help says; each other one is refused by name."""

import contextlib
import dataclasses
import io
import itertools
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import run
from cli import arguments, inherited_flags
from cli.inherited_flags import OPTIMIZERS, REFUSED, SUPPORTED
from trainer import OurTrainer
from utils import UsageError
from zo.trajectory import Trajectory

REDEFINED = ("learning_rate", "lr_scheduler_type", "max_grad_norm", "ddp_timeout")  # by OurArguments
# Flags that need several ranks, and where a test starts them.
OTHER_FILES = {"fsdp": "test_sharding.py", "ddp_timeout": "stress/test_ranks.py"}
TRAINERS = ("zo", "regular")


# ---- what is accepted ----


def test_each_field_of_the_library_stands_in_one_table():
    tables = [*SUPPORTED, *REFUSED, *REDEFINED]
    assert sorted(tables) == sorted(field.name for field in dataclasses.fields(TrainingArguments))
    flags_of_groups = [flags.__annotations__ for flags in arguments.FLAG_GROUPS.values()]
    assert set(REDEFINED) <= set(itertools.chain.from_iterable(flags_of_groups))
    assert set(inherited_flags.DERIVED) <= set(REFUSED)


def test_the_parser_has_the_supported_flags_and_our_own():
    from cli.command_line import REMOVED, FlagParser

    options = FlagParser()._option_string_actions
    fields = {field.name for field in dataclasses.fields(arguments.OurArguments)}
    expected = fields - set(REFUSED) - set(REMOVED)
    assert {action.dest for action in options.values()} == expected | {"help", "config"}
    for option in options:
        name = option.lstrip("-").replace("-", "_")
        assert name in expected | {"help", "h", "config"} or name.removeprefix("no_") in expected


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_flag_is_one_line_with_what_to_use(name, capsys):
    for words in ([f"--{name}", "x"], [f"--{name}=x"], [f"--no-{name.replace('_', '-')}"]):
        assert run.main(["--trainer", "zo", *words]) == 2
        assert capsys.readouterr().err == f"run.py: error: --{name} is not supported: {REFUSED[name]}\n"


def test_a_refused_field_is_refused_from_python_too():
    with pytest.raises(UsageError, match=r"--fp16 is not supported.*--load_float16"):
        arguments.OurArguments(fp16=True)
    with pytest.raises(UsageError, match="--include_for_metrics is not supported"):
        arguments.OurArguments(include_for_metrics=["loss"])
    for trainer in TRAINERS:  # what the program itself sets is none
        assert not inherited_flags.refused_values(arguments.OurArguments(trainer=trainer))


def test_a_hint_names_flags_that_exist():
    from cli.command_line import FlagParser

    options = FlagParser()._option_string_actions
    for hint in REFUSED.values():
        assert all(flag in options for flag in re.findall(r"--\w+", hint)), hint


# ---- runs, each made once ----


class Run(NamedTuple):
    """What is left of a run: log, state and objects of its trainer, weights, folder, and what it wrote."""

    log: list[dict]
    state: object
    trainer: OurTrainer
    weights: dict[str, torch.Tensor]
    folder: Path
    stderr: str
    infos: int  # INFO messages of the library's trainer

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log if "loss" in entry]

    @property
    def rates(self) -> list[float]:
        return [entry["learning_rate"] for entry in self.log if "loss" in entry]

    def steps(self, key: str) -> list[int]:
        """Steps of the log's entries that have this key."""
        return [entry["step"] for entry in self.log if key in entry]

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.rpartition("-")[2]) for path in self.folder.glob("checkpoint-*"))

    def norm(self, part: str) -> float:
        """Norm of all weights that have this in their name."""
        return math.sqrt(sum(w.square().sum().item() for name, w in self.weights.items() if part in name))


class Recorder(TrainerCallback):
    """Stands in for an integration of `--report_to`: keeps the logs and names that reach it."""

    entries: list = []  # noqa: RUF012

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append((args.run_name, state.global_step, logs))


BASE = "--lora --max_steps 4 --logging_steps 1 --learning_rate 1e-2 --per_device_train_batch_size 4"
BASE += " --num_train 16 --no_eval --train_as_classification --disable_tqdm True"
FULL = BASE.replace("--lora ", "").replace("1e-2", "1e-3")


@pytest.fixture(scope="module")
def started(model_dir, data_dir, tmp_path_factory):
    """started(flags, evaluations) -> Run, from a cache where the same flags have been run before.

    evaluations: (accuracy, loss) of each evaluation of the dev rows, in place of the real ones.
    """
    cache: dict[tuple, Run] = {}

    def start(flags: str, evaluations: tuple = ()) -> Run:
        if (flags, evaluations) not in cache:
            folder = tmp_path_factory.mktemp("run")
            words = f"--model_name {model_dir} --data_dir {data_dir} --output_dir {folder / 'out'}"
            words += f" --result_file {folder / 'result.json'} {flags}"
            cache[flags, evaluations] = start_run(words.split(), evaluations, folder / "out")
        return cache[flags, evaluations]

    return start


class Recorded(logging.Handler):
    """Keeps the INFO messages of a logger."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record):
        self.records.append(record)


def start_run(words: list[str], evaluations: tuple, folder: Path) -> Run:
    """Run these flags, with these evaluations in place of the real ones."""
    trainers = []
    evaluate = run.Framework.evaluate
    finish = OurTrainer.finish
    verbosity = transformers.logging.get_verbosity()
    library = logging.getLogger("transformers.trainer")
    handler = Recorded()
    metrics = iter([dict(zip(("accuracy", "loss"), values, strict=True)) for values in evaluations])
    integrations = transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK

    def recording_finish(trainer, *args):
        trainers.append(trainer)
        finish(trainer, *args)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as stderr:
        patch.setattr(OurTrainer, "finish", recording_finish)
        if evaluations:
            patch.setattr(run.Framework, "evaluate", lambda self, *a, **k: next(metrics, {}))
        patch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
        patch.setitem(integrations, "tensorboard", Recorder)
        library.addHandler(handler)
        try:
            assert run.main(words) == 0, stderr.getvalue()
        finally:
            library.removeHandler(handler)
            transformers.logging.set_verbosity(verbosity)
    assert run.Framework.evaluate is evaluate
    trainer = trainers[0]
    return Run(
        log=trainer.state.log_history,
        state=trainer.state,
        trainer=trainer,
        weights={name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        folder=folder,
        stderr=stderr.getvalue(),
        infos=len(handler.records),
    )


def same(a: Run, b: Run) -> bool:
    """Return whether two runs end with the same bits."""
    return all(torch.equal(value, b.weights[name]) for name, value in a.weights.items())


# ---- both trainers: what is observed; `plain` is the run of the base command alone ----


def coefficients(result: Run) -> torch.Tensor:
    """Return what each step of a zeroth-order run multiplied its direction by."""
    return torch.as_tensor(Trajectory.load(result.folder / "trajectory.safetensors").coefficients)


def is_result(result: Run, step: int) -> bool:
    """Tell whether the files of the result are those of this step's checkpoint."""
    name = "adapter_model.safetensors"
    checkpoint = result.folder / f"checkpoint-{step}"
    return (result.folder / name).read_bytes() == (checkpoint / name).read_bytes()


def four_steps_are_an_epoch(result: Run, plain: Run) -> None:
    assert result.steps("loss") == [1, 2, 3, 4]
    assert result.state.epoch == 1
    assert result.rates[0] == 1e-2
    assert result.checkpoints == [4]


def two_epochs_of_one_step(result: Run, plain: Run) -> None:
    """14 rows in batches of 4 are 3 full batches, all in one step."""
    assert (result.state.global_step, result.state.epoch) == (2, 2)
    assert result.steps("loss") == result.checkpoints == [1, 2]
    assert result.trainer.forward_passes == 6 * (2 if result.trainer.zeroth_order else 1)


def one_epoch_of_two_steps(result: Run, plain: Run) -> None:
    """The fourth batch is a step of its own."""
    assert (result.state.global_step, result.state.epoch) == (2, 1)


def step_two_is_best(result: Run, plain: Run) -> None:
    assert result.steps("eval_loss") == result.checkpoints == [2, 4]
    assert result.state.best_global_step == 2 and is_result(result, 2)


def step_four_is_best_and_alone(result: Run, plain: Run) -> None:
    assert result.steps("eval_loss") == [0, 2, 4]
    assert result.checkpoints == [4]
    assert result.state.best_global_step == 4 and is_result(result, 4)


def epochs_are_evaluated_and_better_ones_saved(result: Run, plain: Run) -> None:
    assert result.steps("eval_loss") == [4, 8, 12]
    assert result.checkpoints == [4, 8]


def no_checkpoint_and_the_same_weights(result: Run, plain: Run) -> None:
    assert not result.checkpoints and plain.checkpoints
    assert result.trainer.get_train_dataloader().num_workers == 2
    assert same(result, plain)


def log_goes_where_it_should(result: Run, plain: Run) -> None:
    assert result.steps("loss") == [1, 3]
    assert "4/4" in result.stderr and "4/4" not in plain.stderr  # the progress bar
    assert result.infos > 0 == plain.infos
    assert {name for name, _, _ in Recorder.entries} == {"trial"}
    assert [step for _, step, logs in Recorder.entries if "loss" in logs] == [1, 3]


def no_log_and_the_same_weights(result: Run, plain: Run) -> None:
    assert not result.losses and plain.losses
    assert same(result, plain)


def rows_in_another_order_and_a_rising_rate(result: Run, plain: Run) -> None:
    assert result.losses[0] != pytest.approx(plain.losses[0], rel=1e-6)
    assert result.rates[:3] == [0, 5e-3, 1e-2]


def another_adapter_and_a_cosine_above_its_least(result: Run, plain: Run) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert not torch.allclose(result.weights[name], plain.weights[name], atol=0.1)
    cosine = [0.005 + 0.005 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert result.rates == pytest.approx(cosine)


def matrices_decay_and_norms_do_not(result: Run, plain: Run) -> None:
    assert result.norm("mlp") < 0.98 * plain.norm("mlp")
    assert result.norm("norm") > 0.999 * plain.norm("norm")


def losses_are_rounded_and_weights_are_not(result: Run, plain: Run) -> None:
    assert result.losses != plain.losses
    assert result.losses == pytest.approx(plain.losses, abs=0.05)
    assert {w.dtype for w in result.weights.values()} == {torch.float32}
    assert result.trainer.args.device.type == "cpu"


def projected_gradients_are_bounded(result: Run, plain: Run) -> None:
    bound = 1e-2 * 0.01  # learning rate times --max_grad_norm
    assert coefficients(result).abs().max() <= 1.001 * bound < coefficients(plain).abs().min()


class Case(NamedTuple):
    """A row of the table: the flags that it shows, the command, and what is observed."""

    names: str
    words: str  # behind those of `base`
    check: Callable[[Run, Run], None]
    base: str = BASE
    evaluations: tuple = ()
    trainers: tuple[str, ...] = TRAINERS


LONG = BASE.replace("--max_steps 4", "")
SHORT = LONG.replace("--num_train 16", "--num_train 14")
VALUES = ((0.1, 0.9), (0.9, 0.8), (0.2, 0.1))  # accuracy, loss of three evaluations
BEST = "--num_dev 8 --save_model --eval_strategy steps --eval_steps 2 --load_best_model_at_end"
COSINE = '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":0.005}'
TABLE = {
    "base": Case(
        "output_dir max_steps per_device_train_batch_size logging_steps learning_rate",
        "",
        four_steps_are_an_epoch,
    ),
    "epochs": Case(
        "num_train_epochs gradient_accumulation_steps dataloader_drop_last save_strategy logging_strategy",
        "--num_train_epochs 2 --gradient_accumulation_steps 3 --dataloader_drop_last --save_strategy epoch "
        "--logging_strategy epoch",
        two_epochs_of_one_step,
        base=SHORT,
    ),
    "a short batch": Case(
        "num_train_epochs gradient_accumulation_steps",
        "--num_train_epochs 1 --gradient_accumulation_steps 3 --save_strategy no",
        one_epoch_of_two_steps,
        base=SHORT,
    ),
    "the best by the task's metric": Case(
        "eval_strategy eval_steps save_strategy save_steps load_best_model_at_end",
        f"{BEST} --save_strategy steps --save_steps 2",
        step_two_is_best,
        evaluations=VALUES[1:],
    ),
    "the best by another metric": Case(
        "eval_on_start metric_for_best_model save_total_limit",
        f"{BEST} --save_steps 2 --eval_on_start --metric_for_best_model loss --save_total_limit 1",
        step_four_is_best_and_alone,
        evaluations=VALUES,
    ),
    "better ones alone are saved": Case(
        "eval_strategy save_strategy",
        "--num_train_epochs 3 --eval_strategy epoch --save_strategy best --num_dev 8",
        epochs_are_evaluated_and_better_ones_saved,
        base=LONG,
        evaluations=VALUES,
    ),
    "no checkpoint, two processes": Case(
        "save_strategy dataloader_num_workers",
        "--save_strategy no --dataloader_num_workers 2",
        no_checkpoint_and_the_same_weights,
    ),
    "what is shown": Case(
        "logging_first_step logging_steps disable_tqdm log_level report_to run_name",
        "--logging_first_step --logging_steps 3 --disable_tqdm False --log_level info "
        "--report_to tensorboard --run_name trial",
        log_goes_where_it_should,
    ),
    "no log": Case("logging_strategy", "--logging_strategy no", no_log_and_the_same_weights),
    "order of the rows, warm-up": Case(
        "data_seed warmup_steps", "--data_seed 1 --warmup_steps 2", rows_in_another_order_and_a_rising_rate
    ),
    "seed, schedule": Case(
        "seed lr_scheduler_type lr_scheduler_kwargs",
        f"--seed 1 --data_seed 42 --train_set_seed 42 {COSINE}",
        another_adapter_and_a_cosine_above_its_least,
    ),
    "decay": Case("weight_decay", "--weight_decay 10", matrices_decay_and_norms_do_not, base=FULL),
    "autocast": Case("bf16 use_cpu", "--bf16 --use_cpu", losses_are_rounded_and_weights_are_not),
    "bounded steps": Case(
        "max_grad_norm",
        "--max_grad_norm 0.01",
        projected_gradients_are_bounded,
        trainers=("zo",),
    ),
}
ROWS = [(name, trainer) for name, case in TABLE.items() for trainer in case.trainers]


@pytest.mark.parametrize("name, trainer", ROWS)
def test_flag(started, name, trainer):
    case = TABLE[name]
    Recorder.entries.clear()
    plain = started(f"--trainer {trainer} {BASE if case.base in (LONG, SHORT) else case.base}")
    case.check(started(f"--trainer {trainer} {case.base} {case.words}", case.evaluations), plain)


# ---- back-propagation ----

STEP = BASE.replace("--max_steps 4", "--max_steps 1")
STEP += " --trainer regular --max_grad_norm 0 --save_strategy no"


def test_betas_and_epsilon_of_adamw(started):
    settings = "--max_steps 3 --lr_scheduler_type constant"
    plain = started(f"{STEP} {settings}")
    other = started(f"{STEP} {settings} --adam_beta1 0.5 --adam_beta2 0.6 --adam_epsilon 1e-3")
    for result, values in ((plain, (0.9, 0.999, 1e-8)), (other, (0.5, 0.6, 1e-3))):
        group = result.trainer.optimizer.param_groups[0]
        assert (*group["betas"], group["eps"]) == values
    assert not same(plain, other)


def test_a_gradient_is_clipped(started):
    """At B = 0 the gradient of A is 0, so that a step of SGD at rate 1 moves B by the gradient."""
    sgd = f"{STEP} --optim sgd --learning_rate 1"
    bounded = started(f"{sgd} --max_grad_norm 0.01")
    assert started(sgd).norm("lora_B") > 0.02 and bounded.norm("lora_B") == pytest.approx(0.01, rel=1e-3)


def test_momentum_of_sgd(started):
    sgd = f"{STEP} --optim sgd --learning_rate 1 --lr_scheduler_type constant --max_steps 3"
    plain = started(sgd)
    momentum = started(f"{sgd} --optim_args momentum=0.5")
    assert plain.trainer.optimizer.param_groups[0]["momentum"] == 0
    assert momentum.trainer.optimizer.param_groups[0]["momentum"] == 0.5
    assert momentum.losses[:2] == plain.losses[:2] and momentum.losses[2] != plain.losses[2]


CLASSES = {
    "adamw_torch_fused": "AdamW", "adamw_torch": "AdamW", "adamw_bnb_8bit": "AdamW", "sgd": "SGD",
    "adafactor": "Adafactor", "adagrad": "Adagrad", "rmsprop": "RMSprop",
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(started, name):
    if name == "adamw_bnb_8bit":
        pytest.importorskip("bitsandbytes")
    result = started(f"{STEP} --optim {name}")
    optimizer = result.trainer.optimizer.optimizer
    assert type(optimizer).__name__ == CLASSES[name] and result.norm("lora_B") > 0
    if name == "adamw_torch_fused":
        assert optimizer.defaults["fused"] and type(optimizer).__module__.startswith("torch")
        assert TrainingArguments.default_optim == name
    if name.startswith("adamw"):  # its first step has the length of the rate, wherever the gradient is not 0
        moved = result.weights["model.layers.0.self_attn.v_proj.lora_B"]
        assert torch.allclose(moved.abs(), torch.tensor(1e-2), rtol=1e-2)


def test_another_optimizer_is_refused(capsys):
    assert run.main(["--trainer", "regular", "--optim", "galore_adamw"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--optim" in line and "galore_adamw" in line and "adafactor" in line


def test_gradient_checkpointing_computes_twice_and_ends_with_the_same_weights(started, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = []
    forward = LlamaMLP.forward

    def counted(self, *args):
        calls.append(self.training)
        return forward(self, *args)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    counts = []
    runs = []
    for more in ("--run_name plain", "--gradient_checkpointing"):  # a name of its own: not out of the cache
        calls.clear()
        runs.append(started(f"{STEP} --max_steps 2 {more}"))
        counts.append(sum(calls))
    assert counts == [4, 8]
    assert all(torch.allclose(w, runs[1].weights[name], atol=1e-6) for name, w in runs[0].weights.items())


# ---- what excludes each other, what is covered elsewhere ----

EXCLUDED = {
    "--trainer zo --gradient_checkpointing": ("--trainer zo", "--gradient_checkpointing"),
    "--trainer regular --prefix_tuning --gradient_checkpointing": (
        "--prefix_tuning", "--gradient_checkpointing",
    ),
    "--trainer zo --optim sgd": ("--trainer zo", "--optim sgd"),
    "--trainer zo --optim_args momentum=0.9": ("--optim_args", "--trainer regular"),
    "--trainer zo --eval_strategy epoch": ("--eval_strategy", "--num_dev"),
    "--trainer zo --eval_on_start": ("--eval_on_start", "--num_dev"),
    "--trainer zo --report_to comet_ml": ("--report_to comet_ml",),
    "--trainer zo --log_level loud": ("--log_level", "loud"),
    "--trainer zo --save_strategy sometimes": ("sometimes",),
    "--trainer zo --logging_steps 0": ("--logging_steps",),
    "--trainer zo --warmup_steps -1": ("warmup_steps",),
}  # fmt: skip


@pytest.mark.parametrize("flags", EXCLUDED)
def test_exclusions(flags, capsys):
    assert run.main(flags.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in EXCLUDED[flags])


def test_autocast_on_a_cpu_is_asked_for(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run.main(["--trainer", "zo", "--lora", "--bf16"]) == 2
    assert "use_cpu" in capsys.readouterr().err


def test_each_supported_flag_is_covered():
    covered = set(itertools.chain.from_iterable(case.names.split() for case in TABLE.values()))
    covered |= {  # by tests of their own, above
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "optim",
        "optim_args",
        "gradient_checkpointing",
    }
    assert covered | set(OTHER_FILES) == {*SUPPORTED, *REDEFINED}
    for case in TABLE.values():
        words = f"{case.base} {case.words} --output_dir".split()
        assert {f"--{name}" for name in case.names.split()} <= set(words)
    for name, path in OTHER_FILES.items():
        assert f"--{name}" in (Path(__file__).parent / path).read_text()
