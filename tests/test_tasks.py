"""Tasks, prompts as token ids, metrics."""

import json

import datasets
import numpy as np
import pytest
from conftest import TRAIN, shared, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import tasks
from metrics import accuracy, best_threshold_accuracy
from tasks import Sample, get_task
from utils import UsageError, encode_prompt, load_tokenizer


def test_sst2_encodes_to_the_golden_ids():
    tokenizer = load_tokenizer(shared("tokenizer-opt"), "opt")
    task = get_task("SST2", shared("data"))
    template, train, validation = task.get_template(), task.samples["train"], task.samples["validation"]
    compared = 0
    for row in json.loads(shared("golden", "SST2.json").read_text()):
        sample, demos = validation[row["row"]], [train[0], train[1]]
        assert (sample.candidates, sample.correct_candidate) == (row["candidates"], row["correct"])
        cases = {
            "zero_shot": ([], {}),
            "train": ([], {}),
            "demos_2": (demos, {}),
            "sfc": ([], {"sfc": True}),
            "icl_sfc": (demos, {"icl_sfc": True}),
        }
        for name, (shots, flags) in cases.items():
            ours = encode_prompt(task, template, shots, sample, tokenizer, 2048, **flags)
            assert list(ours) == row[name], (row["row"], name)
            compared += 1
    assert compared == 15


def test_a_draw_is_numpys_permutation(data_dir):
    task = get_task("SST2", data_dir)
    drawn = task.sample_subset("train", seed=3, num=5)
    assert [s.id for s in drawn] == np.random.RandomState(3).permutation(32)[:5].tolist()
    assert len(task.sample_subset("train", seed=3, num=10**6)) == 32


def test_samples_are_built_when_looked_at(data_dir):
    task = get_task("SST2", data_dir)
    assert [task.samples["validation"][i].correct_candidate for i in range(8)] == [y for _, y in TRAIN]
    assert isinstance(task.samples["train"].rows[0], dict) and task.generation is False


def test_the_hub_is_asked_for_todays_name(monkeypatch):
    asked = []

    def load_dataset(path, configuration, split):
        asked.append((path, configuration, split))
        return datasets.Dataset.from_list([{"idx": i, "sentence": s, "label": y} for i, (s, y) in enumerate(TRAIN)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = get_task("SST2")
    assert asked == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
    assert task.samples["train"][2].data["sentence"] == TRAIN[2][0]


def test_a_hub_data_set_without_the_column_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"text": "x"}]))
    with pytest.raises(UsageError, match="no column 'sentence'"):
        get_task("SST2")


def test_other_rows_have_another_fingerprint(data_dir, tmp_path):
    (tmp_path / "SST2").mkdir()
    for split in ("train", "validation"):
        text = (data_dir / "SST2" / f"{split}.jsonl").read_text()
        (tmp_path / "SST2" / f"{split}.jsonl").write_text(text.replace("warmth", "cold"))
    assert get_task("SST2", data_dir).fingerprint == get_task("SST2", data_dir).fingerprint
    assert get_task("SST2", data_dir).fingerprint != get_task("SST2", tmp_path).fingerprint


def test_windows_files_are_read(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "SST2").mkdir(exist_ok=True)
        (tmp_path / "SST2" / f"{split}.jsonl").write_bytes(b'\xef\xbb\xbf{"sentence": "fine", "label": 1}\r\n\r\n')
    assert len(get_task("SST2", tmp_path).samples["train"]) == 1


class Letters:
    """A template of single letters: a prompt of any text, options of any text."""

    def encode(self, sample):
        return sample.data["text"]

    def verbalize(self, sample, candidate):
        return sample.data["text"] + candidate

    encode_sfc = staticmethod(lambda sample: "")
    verbalize_sfc = staticmethod(lambda sample, candidate: candidate)


def encode(text, candidates, max_length=100, bos=True, **more):
    sample = Sample(0, {"text": text}, candidates[0], candidates)
    return encode_prompt(tasks.Dataset, Letters(), [], sample, tiny_tokenizer(bos), max_length, **more)


def test_long_prompts_lose_the_same_tokens_on_the_left_for_every_candidate():
    encodings, lens = encode("abcdefghij", ["KL", "M"], max_length=8)
    assert lens == [2, 1] and [len(ids) for ids in encodings] == [8, 7]
    assert encodings[0][:6] == encodings[1][:6] == encode("efghij", ["KL", "M"])[0][0][:6]


def test_a_bos_stays_when_a_prompt_is_cut():
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 256)])
    sample = Sample(0, {"text": "abcdefgh"}, "X", ["X", "YZ"])
    encodings, _ = encode_prompt(tasks.Dataset, Letters(), [], sample, tokenizer, 6)
    assert [ids[0] for ids in encodings] == [256, 256] and [len(ids) for ids in encodings] == [5, 6]


def test_an_option_without_a_prompt_gets_a_start_token():
    for bos in (True, False):
        encodings, lens = encode("text", ["yes", "no"], bos=bos, sfc=True)
        assert lens == [3, 2] and [len(ids) for ids in encodings] == [4, 3]


def test_options_and_prompts_without_tokens_are_refused():
    with pytest.raises(UsageError, match="no token of its own"):
        encode("text", ["yes", ""])
    with pytest.raises(UsageError, match="--max_length 3"):
        encode("text", ["yes", "no"], max_length=3)


def test_generation_prompts_leave_room_and_have_no_option():
    encodings, lens = encode("abcdef", ["x"], max_length=8, generation=True, max_new_tokens=5)
    assert lens == [0] and len(encodings[0]) == 3


def test_accuracy_takes_one_right_answer_or_several():
    assert accuracy([1, "b", "c"], [1, ["a", "b"], ["a"]]) == 2 / 3


def test_the_best_threshold_is_the_best_of_all_thresholds():
    rng = np.random.RandomState(0)
    for _ in range(50):
        margins = rng.randint(-3, 4, size=9).astype(float)  # with ties
        golds = rng.randint(0, 2, size=9).tolist()
        cuts = [-10.0, *np.unique(margins)]
        best = max(np.mean([(m > cut) == g for m, g in zip(margins, golds, strict=True)]) for cut in cuts)
        assert best_threshold_accuracy(margins.tolist(), golds) == pytest.approx(best)
