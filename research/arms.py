"""The grid of research/experiments.py: which settings are run, on which rows, with which seeds.

Settings are chosen on dev rows of Reviews and fixed before the other tasks are run for confirmation. There is
one exception: the rate of the recipe was searched again, on the same dev rows, after the recipe had lost on
Editorials at its first rate.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "research" / "runs"
# Flags that version 0.2 removed. Runs with them stay in the tables; today's program refuses these flags.
REMOVED_FLAGS = ("--xgblora_a_warmup", "--xgblora_restart_lr")


@dataclass(frozen=True)
class Arm:
    """Runs of one setting.

    Attributes:
        group: a word that `--groups` selects.
        name: of the setting, in tables and file names.
        flags: of run.py, beyond the common ones; or BIAS.
        steps: of training; 0 where there is none.
        batch: rows of a step.
        seeds: a run for each.
        task: the task, or "dev" for the dev rows of Reviews.
        dtype: of the weights.
    """

    group: str
    name: str
    flags: str
    steps: int = 400
    batch: int = 8
    seeds: tuple[int, ...] = (0, 1)
    task: str = "dev"
    dtype: str = "bfloat16"

    @property
    def command(self) -> str:
        """The flags of the runs, without the seed."""
        folders = {"dev": "result/experiments/dev", "SST2": "$DATA_DIR"}
        folder = folders.get(self.task, "starter")
        task = "Reviews" if self.task == "dev" else self.task
        words = f"--model_name starter/smollm2-135m --data_dir {folder} --task_name {task}"
        words += f" --load_{self.dtype}" if self.dtype != "float32" else ""
        if self.steps:
            words += f" --num_train 1000 --train_as_classification --max_steps {self.steps} --zo_batched on"
            words += f" --per_device_train_batch_size {self.batch} --save_strategy no"
        return f"{words} {self.flags}"

    def line(self, seed: int) -> str:
        """Return the command that repeats a run; for BIAS its JSON must be removed first."""
        if self.flags == BIAS:
            program = "python research/experiments.py run"
            return f"{program} --tasks {self.task} --only '{self.name}' --seeds {seed}"
        return f"python run.py {self.command} --seed {seed}".replace("{seed}", str(seed))

    @property
    def runnable(self) -> bool:
        """Return whether today's program has every flag of this arm."""
        return not any(flag in self.flags.split() for flag in REMOVED_FLAGS)

    def path(self, seed: int) -> Path:
        """Return the file of a run's result."""
        slug = "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name)
        return OUT / self.task / f"{slug}-{self.steps}x{self.batch}-seed{seed}.json"


# Method of the main table -> how the names of its settings on the dev rows begin.
METHODS = {
    "zero-shot": ("zero-shot",),
    "label bias only": ("label bias",),
    "16 demonstrations": ("16 demonstrations",),
    "MeZO, all weights": ("MeZO full",),
    "LOZO r 2, all weights": ("LOZO",),
    "MeZO-LoRA r 8, alpha 16": ("MeZO-LoRA r 8, alpha 16",),
    "MeZO-LoRA r 8, alpha 128, normalised": ("MeZO-LoRA r 8, alpha 128",),
    "MeZO-LoRA r 1": ("MeZO-LoRA r 1",),
    "AR1-ZO, LoRA r 8": ("AR1-ZO",),
    "FZOO, LoRA r 8": ("FZOO",),
    "XGBLoRA, A and B": ("XGBLoRA, ",),
    "XGBLoRA, B only": ("XGBLoRA B only", "LoRA r 1 B only", "rounds of", "ε", "η", "constant rate"),
    "XGBLoRA, recipe fast and around it": ("upper", "recipe fast"),
    "XGBLoRA, A and B, upper half": ("atoms", "A and B, alpha 128"),
    "linear probing": ("linear probing",),
    "first-order LoRA r 8": ("first-order LoRA",),
    "first-order XGBLoRA": ("first-order XGBLoRA",),
}
RECIPE = "upper 15 of 30, η 0.01"  # the arm on the dev rows with the settings of `--recipe fast`
CONFIRM = (0, 1, 2, 3, 4)  # seeds of what claims rest on
CONFIRMED = ("Tweets", "SST2", "Products", "Editorials")
BIAS = "bias"  # no run of run.py: see `label_bias`

# ---- flags that arms share ----

LORA = "--trainer zo --lora"
BOOST = "--trainer zo --xgblora"
B_ONLY = "--lora_freeze_a --zo_normalize --learning_rate {rate} --zo_eps {eps}"
UPPER = "--xgblora_layers top:{n} --zo_cache_activations"
RECIPE_FAST = "--trainer zo --recipe fast"
SLOW_RECIPE = f"{RECIPE_FAST} --learning_rate 5e-3"  # the recipe's first rate, that of all layers
PROBING = "--linear_probing --num_train 1000 --train_set_seed {seed}"
REGULAR = "--trainer regular --per_device_train_batch_size 16"
# The flags below end with --learning_rate: a rate follows.
SGD = "--lr_scheduler_type constant --zo_eps 1e-2 --learning_rate"
RANK_8 = f"{LORA} --lora_alpha 128 --zo_normalize --zo_eps 1e-2 --learning_rate"
AR1 = f"{LORA} --lora_alpha 1024 --zo_method ar1-zo --zo_normalize --zo_eps 2e-3 --learning_rate"
FZOO = (
    f"{LORA} --lora_alpha 128 --zo_method fzoo --zo_queries 8 --zo_eps 1e-2 --lr_scheduler_type constant "
    "--learning_rate"
)
FULL = "--trainer zo --zo_eps 1e-3 --lr_scheduler_type constant --learning_rate"
BEST_LORA = f"{LORA} {SGD} 1e-3"


def boost_b_only(rate=5e-3, eps=3e-2, rounds=25) -> str:
    """Return the flags of boosting with B alone and normalised steps.

    Args:
        rounds: steps of a round.
    """
    return f"{BOOST} {B_ONLY.format(rate=rate, eps=eps)} --xgblora_steps_per_iteration {rounds}"


# ---- arms on the dev rows ----


def start_arms() -> list[Arm]:
    """Return the arms without a training, and boosting with B alone around its base."""
    no_merge = f"{LORA} --lora_r 1 {B_ONLY.format(rate=5e-3, eps=3e-2)}"
    demonstrations = "--trainer none --num_train 16 --train_set_seed {seed}"
    return [
        Arm("start", "zero-shot", "--trainer none", steps=0, seeds=(0,)),
        Arm("start", "label bias only", BIAS, steps=0),
        Arm("start", "linear probing", PROBING, steps=0),
        Arm("start", "16 demonstrations", demonstrations, steps=0),
        Arm("base", "XGBLoRA B only normalised", boost_b_only()),
        Arm("base", "LoRA r 1 B only normalised, no merge", no_merge),
        *(
            Arm("layers", f"upper {n} of 30", f"{boost_b_only()} {UPPER.format(n=n)}")
            for n in (15, 20, 10, 6)
        ),
        *(Arm("rounds", f"rounds of {n}", boost_b_only(rounds=n)) for n in (10, 50, 100)),
        *(Arm("ε", f"ε {eps:g}", boost_b_only(eps=eps)) for eps in (1e-2, 1e-1)),
        *(Arm("rate", f"η {rate:g}", boost_b_only(rate=rate)) for rate in (3e-3, 8e-3)),
    ]  # fmt: skip


def method_arms() -> list[Arm]:
    """Return the arms of the other methods, those of back-propagation last."""
    rounds = "--xgblora_steps_per_iteration"
    rank_8 = "MeZO-LoRA r 8, alpha 128, normalised"
    fzoo = "FZOO on LoRA r 8, alpha 128, 8 queries"
    slow = f"{BOOST} {rounds} 1000 {SGD.replace('1e-2', '1e-3')} 1e-5"
    normalised = f"{BOOST} --zo_normalize {rounds} 100 --learning_rate 1e-3 --zo_eps 1e-2"
    regular_lora = f"{REGULAR} --lora --learning_rate 1e-3"
    regular_boosting = f"{REGULAR} --xgblora {rounds} 25 --learning_rate 1e-3"
    return [
        Arm("methods", "MeZO-LoRA r 8, alpha 16, published", f"{LORA} {SGD} 5e-5"),
        Arm("methods", "MeZO-LoRA r 8, alpha 16, η 1e-3", f"{LORA} {SGD} 1e-3"),
        Arm("methods", rank_8, f"{RANK_8} 5e-4"),
        *(Arm("methods", f"{rank_8}, η {rate}", f"{RANK_8} {rate}") for rate in ("1e-3", "2e-3")),
        Arm("methods", "MeZO-LoRA r 1, A and B", f"{LORA} --lora_r 1 {SGD} 3e-4"),
        Arm("methods", "XGBLoRA, η 1e-5, ε 1e-3, rounds of 1000", slow),
        Arm("methods", "XGBLoRA, A and B, rounds of 100", f"{BOOST} {rounds} 100 {SGD} 3e-4"),
        Arm("methods", "XGBLoRA, A and B, normalised, rounds of 100", normalised),
        Arm("methods", "AR1-ZO r 8", f"{AR1} 2e-4"),
        Arm("methods", "AR1-ZO r 8, η 5e-4", f"{AR1} 5e-4"),
        Arm("methods", "AR1-ZO r 8, η 1e-3", f"{AR1} 1e-3"),
        Arm("methods", fzoo, f"{FZOO} 1e-4", steps=89),
        Arm("methods", f"{fzoo}, η 3e-5", f"{FZOO} 3e-5", steps=89),
        Arm("methods", f"{fzoo}, η 1e-5", f"{FZOO} 1e-5", steps=89),
        Arm("methods", "first-order LoRA r 8", regular_lora, steps=200, batch=16, seeds=(0,)),
        Arm("methods", "first-order XGBLoRA", regular_boosting, steps=200, batch=16, seeds=(0,)),
    ]


def upper_half_arms() -> list[Arm]:
    """Return the arm of a constant rate, and the arms of boosting in the upper half of the layers."""
    constant = f"{boost_b_only(rate=3e-3)} --lr_scheduler_type constant"
    rank_8 = "--xgblora_rank_schedule 8"
    variants = (  # name, flags, steps of a round
        ("atoms of AR1-ZO", rank_8, 25),
        ("atoms of AR1-ZO", rank_8, 100),
        ("atoms of AR1-ZO", rank_8, 1000),
        ("A and B, alpha 128", "--zo_method mezo --lora_alpha 128", 100),
        ("atoms of AR1-ZO, η 1e-3", f"--learning_rate 1e-3 {rank_8}", 100),
    )
    boosted_ar1 = f"{AR1.replace(LORA, BOOST)} 5e-4 {UPPER.format(n=15)}"
    arms = [Arm("schedule", "constant rate", constant)]
    for name, flags, steps in variants:
        command = f"{boosted_ar1} {flags} --xgblora_steps_per_iteration {steps}"
        arms.append(Arm("A", f"{name}, upper 15, rounds of {steps}", command))
    for rate in (1e-2, 2e-2):
        command = f"{boost_b_only(rate=rate)} {UPPER.format(n=15)}"
        arms.append(Arm("layers", f"upper 15 of 30, η {rate:g}", command))
    return arms


def recipe_arms() -> list[Arm]:
    """Return the arms that change one thing in `--recipe fast`."""
    normaliser_off = "--zo_normalize False --learning_rate 3e-3 --zo_eps 3e-2"
    rank_8 = "--xgblora_rank_schedule 8 --lora_alpha 128 --learning_rate 3.5e-3 --zo_eps 3e-2"
    feed_forward = "--lora_targets gate_proj,up_proj,down_proj --learning_rate 5e-3"
    random_layers = (
        "--xgblora_layers random:15 --zo_cache_activations False --learning_rate 5e-3 --zo_eps 3e-2"
    )  # fmt: skip
    a_warmup = "--lora_freeze_a False --xgblora_a_warmup 10 --learning_rate 3e-3"
    line_search = "--xgblora_steps_per_iteration 50 --xgblora_adaptive --xgblora_patience 50 --num_dev 64"
    variants = (  # name, flags, steps, batch
        ("no merge", "--xgblora_steps_per_iteration 1000", 400, 8),
        ("rounds of 100", "--xgblora_steps_per_iteration 100", 400, 8),
        ("rate per round", "--xgblora_restart_lr", 400, 8),
        ("ε 1e-2", "--zo_eps 1e-2", 400, 8),
        ("normaliser off", normaliser_off, 400, 8),
        ("Rademacher", "--zo_distribution rademacher", 400, 8),
        ("batch 4", "--learning_rate 7e-3", 800, 4),
        ("batch 16", "--learning_rate 1.4e-2", 200, 16),
        ("4 queries", "--zo_queries 4 --learning_rate 2e-2", 100, 8),
        ("rank 8", rank_8, 400, 8),
        ("v and o", "--lora_targets v_proj,o_proj", 400, 8),
        ("feed-forward", feed_forward, 400, 8),
        ("random 15 layers", random_layers, 400, 8),
        ("A trained too, held for 10 steps", a_warmup, 400, 8),
        ("line search, rounds of 50", line_search, 300, 8),
    )
    return [
        Arm("recipe", f"recipe fast, {name}", f"{RECIPE_FAST} {flags}", steps, batch)
        for name, flags, steps, batch in variants
    ]


def full_arms() -> list[Arm]:
    """Return the arms that train all weights."""
    published = "--learning_rate 1e-6 --zo_eps 1e-3"
    arms = [
        Arm("full", "MeZO full", f"--trainer zo {published} --zo_distribution rademacher"),
        Arm("full", "LOZO r 2, full weights", f"--trainer zo --zo_method lozo {published}"),
    ]
    for rate in ("1e-5", "3e-6", "3e-5"):
        lozo = f"{FULL} {rate} --zo_method lozo"
        arms.append(Arm("full", f"LOZO r 2, full weights, η {rate}", lozo, dtype="float32"))
        arms.append(Arm("full", f"MeZO full, η {rate}", f"{FULL} {rate}", dtype="float32"))
    return arms


# ---- arms on the other tasks ----


def confirmation_arms(task: str) -> list[Arm]:
    """Return the arms that confirm on another task what the dev rows have shown."""
    fzoo = "FZOO on LoRA r 8, alpha 128, 8 queries at its best"
    lozo = "LOZO r 2, full weights at its best"
    regular = f"{REGULAR} --lora --learning_rate 1e-3"
    return [
        Arm("start", "zero-shot", "--trainer none", steps=0, seeds=(0,), task=task),
        Arm("start", "label bias only", BIAS, steps=0, seeds=CONFIRM, task=task),
        Arm("start", "linear probing", PROBING, steps=0, task=task),
        Arm("base", "recipe fast", RECIPE_FAST, seeds=CONFIRM, task=task),
        Arm("rate", "recipe fast, η 5e-3", SLOW_RECIPE, seeds=CONFIRM, task=task),
        Arm("methods", "MeZO-LoRA r 8 at its best", BEST_LORA, seeds=CONFIRM, task=task),
        Arm("methods", "AR1-ZO r 8 at its best", f"{AR1} 5e-4", seeds=CONFIRM, task=task),
        Arm("methods", fzoo, f"{FZOO} 3e-5", 89, seeds=CONFIRM, task=task),
        Arm("methods", lozo, f"{FULL} 3e-5 --zo_method lozo", seeds=CONFIRM, task=task, dtype="float32"),
        Arm("methods", "first-order LoRA r 8", regular, 200, 16, task=task),
    ]


def long_arms(task: str) -> list[Arm]:
    """Return the arms of as many passes as the goals speak of, and of half of them."""
    variants = (  # name, flags, steps
        ("recipe fast", RECIPE_FAST, 750),
        ("MeZO-LoRA r 8, falling rate", f"{BEST_LORA} --lr_scheduler_type linear", 1500),
        ("MeZO-LoRA r 8, alpha 16, published", f"{LORA} {SGD} 5e-5", 1500),
        ("recipe fast", RECIPE_FAST, 1500),
        ("recipe fast, no merge", f"{RECIPE_FAST} --xgblora_steps_per_iteration 10000", 1500),
    )
    return [
        Arm("long", f"{name}, {steps} steps", flags, steps=steps, seeds=CONFIRM, task=task, dtype="float32")
        for name, flags, steps in variants
    ]


def sst2_arms() -> list[Arm]:
    """Return the arms of one seed on SST2: long ones, and those of weights in float32."""
    boosting = f"{BOOST} --xgblora_steps_per_iteration 100 {SGD} 3e-4"
    variants = (  # name, flags, steps
        ("XGBLoRA, A and B, rounds of 100", boosting, 1500),
        ("recipe fast, η 4e-3, staged", f"{RECIPE_FAST} --learning_rate 4e-3 --staged 20", 10_000),
        ("MeZO-LoRA r 8 at its best", BEST_LORA, 1500),
        ("MeZO-LoRA r 8, η 3e-4", f"{LORA} {SGD} 3e-4", 1500),
        ("recipe fast, η 5e-3", SLOW_RECIPE, 750),
        ("recipe fast, η 5e-3", SLOW_RECIPE, 1500),
    )
    settings = {"seeds": (0,), "task": "SST2", "dtype": "float32"}
    return [
        *(Arm("long", f"{name}, {steps} steps", flags, steps, **settings) for name, flags, steps in variants),
        Arm("weights", "recipe fast, η 5e-3, in float32", SLOW_RECIPE, **settings),
        Arm("weights", "MeZO-LoRA r 8 at its best in float32", BEST_LORA, **settings),
    ]


def grid() -> list[Arm]:
    """Return every arm, the most telling first."""
    arms = [*start_arms(), *method_arms(), *upper_half_arms(), *recipe_arms(), *full_arms()]
    for make_arms in (confirmation_arms, long_arms):
        for task in CONFIRMED:
            arms += make_arms(task)
    return arms + sst2_arms()
