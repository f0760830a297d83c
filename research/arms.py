"""The grid of research/experiments.py: which settings are run, on which rows, with which seeds.

Settings are chosen on dev rows of Reviews and fixed before the other tasks are run for confirmation. One exception: the
rate of the recipe was looked at again, on the same dev rows, after it had lost on Editorials at its first one.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "research" / "runs"
# Flags that version 0.2 removed. Runs with them stay in the tables; today's program refuses these flags.
REMOVED_FLAGS = ("--xgblora_a_warmup", "--xgblora_restart_lr")


@dataclass(frozen=True)
class Arm:
    """Runs of one setting: `flags` of run.py beyond the common ones, for `steps` steps of `batch` rows."""

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
        places = {"dev": ("result/experiments/dev", "Reviews"), "SST2": ("$DATA_DIR", "SST2")}
        where = places.get(self.task, ("starter", self.task))
        words = f"--model_name starter/smollm2-135m --data_dir {where[0]} --task_name {where[1]}"
        words += f" --load_{self.dtype}" if self.dtype != "float32" else ""
        if self.steps:
            words += f" --num_train 1000 --train_as_classification --max_steps {self.steps} --zo_batched on"
            words += f" --per_device_train_batch_size {self.batch} --save_strategy no"
        return f"{words} {self.flags}"

    def line(self, seed: int) -> str:
        """The command that repeats a run, once its JSON is gone where it is one of this file's own kind."""
        if self.flags == BIAS:
            return f"python research/experiments.py run --tasks {self.task} --only '{self.name}' --seeds {seed}"
        return f"python run.py {self.command} --seed {seed}".replace("{seed}", str(seed))

    @property
    def runnable(self) -> bool:
        """Whether today's program has every flag of this arm."""
        return not any(flag in self.flags.split() for flag in REMOVED_FLAGS)

    def path(self, seed: int) -> Path:
        slug = "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name)
        return OUT / self.task / f"{slug}-{self.steps}x{self.batch}-seed{seed}.json"


# Of the main table: a method, and how the names of its settings on the dev rows begin.
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
RECIPE = "upper 15 of 30, η 0.01"  # what `--recipe fast` is, under its name among the arms on the dev rows
CONFIRM = (0, 1, 2, 3, 4)  # seeds of what claims rest on
CONFIRMED = ("Tweets", "SST2", "Products", "Editorials")
BIAS = "bias"  # no run of run.py: see `label_bias`
LORA = "--trainer zo --lora"
BOOST = "--trainer zo --xgblora"
B_ONLY = "--lora_freeze_a --zo_normalize --learning_rate {rate} --zo_eps {eps}"


def base(rate=5e-3, eps=3e-2, rounds=25) -> str:
    return f"{BOOST} {B_ONLY.format(rate=rate, eps=eps)} --xgblora_steps_per_iteration {rounds}"


def grid() -> list[Arm]:
    """Every run, the most telling first."""
    first, upper = (
        "--trainer regular --per_device_train_batch_size 16",
        "--xgblora_layers top:{n} --zo_cache_activations",
    )
    no_merge = f"{LORA} --lora_r 1 {B_ONLY.format(rate=5e-3, eps=3e-2)}"
    sgd = "--lr_scheduler_type constant --zo_eps 1e-2 --learning_rate"
    recipe = "--trainer zo --recipe fast"
    probing = "--linear_probing --num_train 1000 --train_set_seed {seed}"
    rank8 = f"{LORA} --lora_alpha 128 --zo_normalize --zo_eps 1e-2 --learning_rate"
    ar1 = f"{LORA} --lora_alpha 1024 --zo_method ar1-zo --zo_normalize --zo_eps 2e-3 --learning_rate"
    fzoo = f"{LORA} --lora_alpha 128 --zo_method fzoo --zo_queries 8 --zo_eps 1e-2 --lr_scheduler_type constant"
    fzoo += " --learning_rate"
    full = "--trainer zo --zo_eps 1e-3 --lr_scheduler_type constant --learning_rate"
    dev = [
        Arm("start", "zero-shot", "--trainer none", steps=0, seeds=(0,)),
        Arm("start", "label bias only", BIAS, steps=0),
        Arm("start", "linear probing", probing, steps=0),
        Arm("start", "16 demonstrations", "--trainer none --num_train 16 --train_set_seed {seed}", steps=0),
        Arm("base", "XGBLoRA B only normalised", base()),
        Arm("base", "LoRA r 1 B only normalised, no merge", no_merge),
        *(Arm("layers", f"upper {n} of 30", f"{base()} {upper.format(n=n)}") for n in (15, 20, 10, 6)),
        *(Arm("rounds", f"rounds of {n}", base(rounds=n)) for n in (10, 50, 100)),
        *(Arm("ε", f"ε {eps:g}", base(eps=eps)) for eps in (1e-2, 1e-1)),
        *(Arm("rate", f"η {rate:g}", base(rate=rate)) for rate in (3e-3, 8e-3)),
        Arm("methods", "MeZO-LoRA r 8, alpha 16, published", f"{LORA} {sgd} 5e-5"),
        Arm("methods", "MeZO-LoRA r 8, alpha 16, η 1e-3", f"{LORA} {sgd} 1e-3"),
        Arm("methods", "MeZO-LoRA r 8, alpha 128, normalised", f"{rank8} 5e-4"),
        *(Arm("methods", f"MeZO-LoRA r 8, alpha 128, normalised, η {rate}", f"{rank8} {rate}")
          for rate in ("1e-3", "2e-3")),
        Arm("methods", "MeZO-LoRA r 1, A and B", f"{LORA} --lora_r 1 {sgd} 3e-4"),
        Arm("methods", "XGBLoRA, η 1e-5, ε 1e-3, rounds of 1000",
            f"{BOOST} --xgblora_steps_per_iteration 1000 {sgd.replace('1e-2', '1e-3')} 1e-5"),
        Arm("methods", "XGBLoRA, A and B, rounds of 100", f"{BOOST} --xgblora_steps_per_iteration 100 {sgd} 3e-4"),
        Arm("methods", "XGBLoRA, A and B, normalised, rounds of 100",
            f"{BOOST} --zo_normalize --xgblora_steps_per_iteration 100 --learning_rate 1e-3 --zo_eps 1e-2"),
        *(Arm("methods", f"AR1-ZO r 8{name}", f"{ar1} {rate}") for name, rate in
          (("", "2e-4"), (", η 5e-4", "5e-4"), (", η 1e-3", "1e-3"))),
        *(Arm("methods", f"FZOO on LoRA r 8, alpha 128, 8 queries{name}", f"{fzoo} {rate}", steps=89) for name, rate in
          (("", "1e-4"), (", η 3e-5", "3e-5"), (", η 1e-5", "1e-5"))),
        Arm("methods", "first-order LoRA r 8", f"{first} --lora --learning_rate 1e-3", steps=200, batch=16, seeds=(0,)),
        Arm("methods", "first-order XGBLoRA",
            f"{first} --xgblora --xgblora_steps_per_iteration 25 --learning_rate 1e-3", 200, 16, (0,)),
        Arm("schedule", "constant rate", f"{base(rate=3e-3)} --lr_scheduler_type constant"),
        *(Arm("A", f"{name}, upper 15, rounds of {n}",
              f"{ar1.replace(LORA, BOOST)} 5e-4 {upper.format(n=15)} {how} --xgblora_steps_per_iteration {n}")
          for name, how, n in (
              *(("atoms of AR1-ZO", "--xgblora_rank_schedule 8", n) for n in (25, 100, 1000)),
              ("A and B, alpha 128", "--zo_method mezo --lora_alpha 128", 100),
              ("atoms of AR1-ZO, η 1e-3", "--learning_rate 1e-3 --xgblora_rank_schedule 8", 100))),
        *(Arm("layers", f"upper 15 of 30, η {rate:g}", f"{base(rate=rate)} {upper.format(n=15)}")
          for rate in (1e-2, 2e-2)),
        *(Arm("recipe", f"recipe fast, {name}", f"{recipe} {flags}", steps, batch) for name, flags, steps, batch in (
            ("no merge", "--xgblora_steps_per_iteration 1000", 400, 8),
            ("rounds of 100", "--xgblora_steps_per_iteration 100", 400, 8),
            ("rate per round", "--xgblora_restart_lr", 400, 8),
            ("ε 1e-2", "--zo_eps 1e-2", 400, 8),
            ("normaliser off", "--zo_normalize False --learning_rate 3e-3 --zo_eps 3e-2", 400, 8),
            ("Rademacher", "--zo_distribution rademacher", 400, 8),
            ("batch 4", "--learning_rate 7e-3", 800, 4),
            ("batch 16", "--learning_rate 1.4e-2", 200, 16),
            ("4 queries", "--zo_queries 4 --learning_rate 2e-2", 100, 8),
            ("rank 8", "--xgblora_rank_schedule 8 --lora_alpha 128 --learning_rate 3.5e-3 --zo_eps 3e-2", 400, 8),
            ("v and o", "--lora_targets v_proj,o_proj", 400, 8),
            ("feed-forward", "--lora_targets gate_proj,up_proj,down_proj --learning_rate 5e-3", 400, 8),
            ("random 15 layers", "--xgblora_layers random:15 --zo_cache_activations False --learning_rate 5e-3 "
             "--zo_eps 3e-2", 400, 8),
            ("A trained too, held for 10 steps", "--lora_freeze_a False --xgblora_a_warmup 10 --learning_rate 3e-3",
             400, 8),
            ("line search, rounds of 50", "--xgblora_steps_per_iteration 50 --xgblora_adaptive --xgblora_patience 50 "
             "--num_dev 64", 300, 8))),
        Arm("full", "MeZO full", "--trainer zo --learning_rate 1e-6 --zo_eps 1e-3 --zo_distribution rademacher"),
        Arm("full", "LOZO r 2, full weights", "--trainer zo --zo_method lozo --learning_rate 1e-6 --zo_eps 1e-3"),
        *(Arm("full", f"{name}, η {rate}", f"{full} {rate}{method}", dtype="float32")
          for rate in ("1e-5", "3e-6", "3e-5")
          for name, method in (("LOZO r 2, full weights", " --zo_method lozo"), ("MeZO full", ""))),
    ]  # fmt: skip
    best8 = f"{LORA} {sgd} 1e-3"
    slow = f"{recipe} --learning_rate 5e-3"  # the recipe's first rate, that of all layers
    return [
        *dev,
        *(arm for task in CONFIRMED for arm in (
            Arm("start", "zero-shot", "--trainer none", steps=0, seeds=(0,), task=task),
            Arm("start", "label bias only", BIAS, steps=0, seeds=CONFIRM, task=task),
            Arm("start", "linear probing", probing, steps=0, task=task),
            Arm("base", "recipe fast", recipe, seeds=CONFIRM, task=task),
            Arm("rate", "recipe fast, η 5e-3", slow, seeds=CONFIRM, task=task),
            Arm("methods", "MeZO-LoRA r 8 at its best", best8, seeds=CONFIRM, task=task),
            Arm("methods", "AR1-ZO r 8 at its best", f"{ar1} 5e-4", seeds=CONFIRM, task=task),
            Arm("methods", "FZOO on LoRA r 8, alpha 128, 8 queries at its best", f"{fzoo} 3e-5", 89, seeds=CONFIRM,
                task=task),
            Arm("methods", "LOZO r 2, full weights at its best", f"{full} 3e-5 --zo_method lozo", seeds=CONFIRM,
                task=task, dtype="float32"),
            Arm("methods", "first-order LoRA r 8", f"{first} --lora --learning_rate 1e-3", 200, 16, task=task),
        )),
        # As many passes as the goals speak of, and half of them.
        *(Arm("long", f"{name}, {steps} steps", flags, steps=steps, seeds=CONFIRM, task=task, dtype="float32")
          for task in CONFIRMED for name, flags, steps in (
              ("recipe fast", recipe, 750),
              ("MeZO-LoRA r 8, falling rate", f"{best8} --lr_scheduler_type linear", 1500),
              ("MeZO-LoRA r 8, alpha 16, published", f"{LORA} {sgd} 5e-5", 1500), ("recipe fast", recipe, 1500),
              ("recipe fast, no merge", f"{recipe} --xgblora_steps_per_iteration 10000", 1500))),
        *(Arm("long", f"{name}, {steps} steps", flags, steps=steps, seeds=(0,), task="SST2", dtype="float32")
          for name, flags, steps in (
              ("XGBLoRA, A and B, rounds of 100", f"{BOOST} --xgblora_steps_per_iteration 100 {sgd} 3e-4", 1500),
              ("recipe fast, η 4e-3, staged", f"{recipe} --learning_rate 4e-3 --staged 20", 10_000),
              ("MeZO-LoRA r 8 at its best", best8, 1500), ("MeZO-LoRA r 8, η 3e-4", f"{LORA} {sgd} 3e-4", 1500),
              ("recipe fast, η 5e-3", slow, 750), ("recipe fast, η 5e-3", slow, 1500))),
        Arm("weights", "recipe fast, η 5e-3, in float32", slow, seeds=(0,), task="SST2", dtype="float32"),
        Arm("weights", "MeZO-LoRA r 8 at its best in float32", best8, seeds=(0,), task="SST2", dtype="float32"),
    ]  # fmt: skip
