"""The eleven tasks of the MeZO code: prompts as exact token ids, samples of a folder and of the hub.

`data/README.md` says where rows, ids and tokenizer come from.
"""

import json

import datasets
import pytest
from support.data import DATA

from tasks import get_task
from utils import encode_prompt, load_tokenizer

CHOOSING = ("SST2", "RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC", "Copa", "ReCoRD")
GENERATING = ("SQuAD", "DROP")
# case -> (number of demonstrations, flags of `encode_prompt`)
CHOICE_CASES = {
    "zero_shot": (0, {}),
    "demos_2": (2, {}),
    "train": (0, {}),
    "sfc": (0, {"sfc": True}),
    "icl_sfc": (2, {"icl_sfc": True}),
}
GENERATED = {"generation": True, "max_new_tokens": 50}
GENERATION_CASES = {
    "zero_shot": (0, GENERATED),
    "demos_2": (2, GENERATED),
    "train": (0, {**GENERATED, "generation_with_gold": True}),
}
CASES = {**dict.fromkeys(CHOOSING, CHOICE_CASES), **dict.fromkeys(GENERATING, GENERATION_CASES)}
# task -> (data set, configuration) on the hub
HUB = {
    "SST2": ("nyu-mll/glue", "sst2"),
    "RTE": ("aps/super_glue", "rte"),
    "CB": ("aps/super_glue", "cb"),
    "BoolQ": ("google/boolq", None),
    "WSC": ("aps/super_glue", "wsc.fixed"),
    "WIC": ("aps/super_glue", "wic"),
    "MultiRC": ("aps/super_glue", "multirc"),
    "Copa": ("aps/super_glue", "copa"),
    "ReCoRD": ("aps/super_glue", "record"),
    "SQuAD": ("rajpurkar/squad", None),
    "DROP": ("ucinlp/drop", None),
}


@pytest.fixture(scope="module")
def tokenizer():
    """Load OPT's tokenizer with the tokens of these prompts and no others."""
    return load_tokenizer(DATA / "tokenizer", "opt")


def golden(name: str) -> list[dict]:
    """Read three validation rows of a task: candidates, right answers and the token ids of every case."""
    return [json.loads(line) for line in open(DATA / name / "golden.jsonl", encoding="utf-8")]


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in CASES for case in CASES[name]])
def test_prompts_are_the_golden_ids(name, case, tokenizer):
    task = get_task(name, DATA)
    count, flags = CASES[name][case]
    demonstrations = [task.samples["train"][i] for i in range(count)]
    for row in golden(name):
        sample = task.samples["validation"][row["row"]]
        encodings, option_lens = encode_prompt(
            task, task.get_template(), demonstrations, sample, tokenizer, 2048, **flags
        )
        assert encodings == [row[case]["beginning"] + ending for ending in row[case]["endings"]]
        assert option_lens == row[case]["option_lens"]


@pytest.mark.parametrize("name", CASES)
def test_samples_are_the_golden_ones(name):
    task = get_task(name, DATA)
    rows = golden(name)
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert task.generation == (name in GENERATING)
    for row in rows:
        assert row.keys() == {"row", "candidates", "correct", *CASES[name]}
        sample = task.samples["validation"][row["row"]]
        assert (sample.candidates, sample.correct_candidate) == (row["candidates"], row["correct"])


@pytest.mark.parametrize("name", CASES)
def test_the_hub_is_asked_for_todays_name_and_gives_the_same_samples(name, monkeypatch):
    asked = []
    local = get_task(name, DATA)

    def load_dataset(path, configuration, split):
        asked.append((path, configuration, split))
        return datasets.Dataset.from_list([sample.data for sample in local.samples[split]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = get_task(name)
    assert asked == [(*HUB[name], "train"), (*HUB[name], "validation")]
    for split in ("train", "validation"):
        for ours, theirs in zip(hub.samples[split], local.samples[split], strict=True):
            right = ours.correct_candidate
            assert (ours.candidates, right) == (theirs.candidates, theirs.correct_candidate)
            assert hub.get_template().encode(ours) == local.get_template().encode(theirs)
            assert hub.get_template().verbalize(ours, right) == local.get_template().verbalize(theirs, right)


def test_opt_prompts_start_with_0(tokenizer):
    assert tokenizer.encode("hello") == [0, 42891]
