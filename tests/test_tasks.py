"""Tasks, prompts as token ids, metrics; the eleven tasks' own ids are in test_golden.py."""

import json

import datasets
import numpy as np
import pytest
from support.data import TRAIN, starter
from support.models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import tasks
from tasks import CustomTask, Sample, get_task
from utils import UsageError, encode_prompt, load_tokenizer, prompt_tokens, text_tokens


def test_only_sampled_rows_of_the_hub_become_samples(monkeypatch):
    rows = datasets.Dataset.from_list([{"sentence": s, "label": y} for s, y in TRAIN])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    task, built = get_task("SST2"), []
    build = task.samples["train"].build
    task.samples["train"].build = lambda i, row: (built.append(i), build(i, row))[1]
    assert [s.id for s in task.sample_subset("train", seed=0, num=2)] == built and len(built) == 2


def test_a_draw_is_numpys_permutation(data_dir):
    task = get_task("SST2", data_dir)
    drawn = task.sample_subset("train", seed=3, num=5)
    assert [s.id for s in drawn] == np.random.RandomState(3).permutation(32)[:5].tolist()
    assert len(task.sample_subset("train", seed=3, num=10**6)) == 32


def test_samples_are_built_when_looked_at(data_dir):
    task = get_task("SST2", data_dir)
    assert [task.samples["validation"][i].correct_candidate for i in range(8)] == [y for _, y in TRAIN]
    assert isinstance(task.samples["train"].rows[0], dict) and task.generation is False


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
        (tmp_path / "SST2" / f"{split}.jsonl").write_bytes(
            b'\xef\xbb\xbf{"sentence": "fine", "label": 1}\r\n\r\n'
        )
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
    with pytest.raises(UsageError, match=r"--max_length 3"):
        encode("text", ["yes", "no"], max_length=3)


def test_generation_prompts_leave_room_and_have_no_option():
    encodings, lens = encode("abcdef", ["x"], max_length=8, generation=True, max_new_tokens=5)
    assert lens == [0] and len(encodings[0]) == 3


def test_what_was_cut_is_told():
    sample = Sample(0, {"text": "abcdefghij"}, "KL", ["KL", "M"])
    for limit, cut in ((100, 0), (12, 0), (8, 4)):
        assert prompt_tokens(tasks.Dataset, Letters(), [], sample, tiny_tokenizer(), limit)[2] == cut


# ---- rows that a task can't use ----

BAD = {
    "BoolQ": ({"passage": "p", "question": "q", "answer": 1}, "answer is 1"),
    "CB": ({"premise": "p", "hypothesis": "h", "label": 3}, "label is 3"),
    "Copa": (
        {"premise": "p", "choice1": "a", "choice2": "b", "question": "why", "label": 0},
        "question is 'why'",
    ),
    "ReCoRD": (
        {"passage": "p", "query": "q", "entities": ["a"], "answers": ["b"]},
        "not among the candidates",
    ),
    "SQuAD": ({"title": "t", "context": "c", "question": "q", "answers": ["x"]}, "answers is ['x']"),
    "DROP": ({"passage": "p", "question": "q", "answers_spans": {"spans": []}}, "something in it"),
    "MultiRC": ({"paragraph": "p", "question": "q", "answer": "", "label": 0}, "answer is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_its_column(name, tmp_path):
    row, words = BAD[name]
    write_jsonl(tmp_path / name / "train.jsonl", [row])
    with pytest.raises(UsageError) as error:
        get_task(name, tmp_path)
    assert "train.jsonl, row 1" in str(error.value) and words in str(error.value)


# ---- tasks of one's own ----


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def own_task(folder, rows, metric=None, **flags):
    for split in tasks.SPLITS:
        write_jsonl(folder / f"{split}.jsonl", rows)
    return get_task("own", folder, CustomTask(**flags), metric)


WORDS = '{"neg": "terrible", "pos": "great"}'
OWN = {
    "label_words": (
        {"review": " fine film ", "label": "pos"},
        {"template": "{review} It was", "label_words": WORDS, "label_column": "label"},
        ("fine film It was", " great", ["neg", "pos"], "pos"),
    ),
    "labels that are no strings": (
        {"text": "so", "ok": True, "n": 3},
        {"template": "{n}: {text}\\n", "label_words": '{"true": "Yes", "false": "No"}', "label_column": "ok"},
        ("3: so\n", "Yes", ["true", "false"], "true"),
    ),
    "candidates": (
        {"q": "2+2?", "options": ["3", "4"], "right": 1},
        {"template": "{q} Answer:", "candidates_column": "options", "answer_index_column": "right"},
        ("2+2? Answer:", " 4", ["3", "4"], "4"),
    ),
    "answer": (
        {"q": "2+2?", "a": "4"},
        {"template": "{q} Answer:", "answer_column": "a"},
        ("2+2? Answer:", " 4\n", None, ["4"]),
    ),
    "answers": (
        {"q": "2+2?", "a": ["4", "four"]},
        {"template": "{q} Answer:", "answer_column": "a"},
        ("2+2? Answer:", " 4\n", None, ["4", "four"]),
    ),
}


@pytest.mark.parametrize("way", OWN)
def test_flags_describe_a_task_of_ones_own(way, tmp_path):
    row, flags, (prompt, ending, candidates, correct) = OWN[way]
    task = own_task(tmp_path, [row], **flags)
    sample, template = task.samples["train"][0], task.get_template()
    assert (sample.candidates, sample.correct_candidate) == (candidates, correct)
    assert template.encode(sample) == prompt and template.verbalize(sample, correct) == prompt + ending
    assert task.generation == (candidates is None)


WRONG = {
    "no flags": ({"x": "a"}, {}, "--task_name own needs --template"),
    "two ways": ({"x": "a"}, {"template": "{x}", "answer_column": "x", "label_column": "x"}, "one of"),
    "half a way": ({"x": "a"}, {"template": "{x}", "label_column": "x"}, "one of"),
    "no cell": ({"x": "a"}, {"template": "x", "answer_column": "x"}, "no {column}"),
    "braces": ({"x": "a"}, {"template": "{x", "answer_column": "x"}, "--template"),
    "a format": ({"x": "a"}, {"template": "{x:.2f}", "answer_column": "x"}, "--template"),
    "no such column": (
        {"x": "a"},
        {"template": "{y}", "answer_column": "x"},
        "row 1: no column 'y'; there are x",
    ),
    "words": ({"x": "a"}, {"template": "{x}", "label_words": "[1]", "label_column": "x"}, "--label_words"),
    "label": ({"x": "a"}, {"template": "{x}", "label_words": WORDS, "label_column": "x"}, "row 1: x is 'a'"),
    "index": (
        {"x": "a", "c": ["1"], "i": 1},
        {"template": "{x}", "candidates_column": "c", "answer_index_column": "i"},
        "row 1: the index of the answer",
    ),
    "index type": (
        {"x": "a", "c": ["1"], "i": "0"},
        {"template": "{x}", "candidates_column": "c", "answer_index_column": "i"},
        "row 1: i is '0'",
    ),
    "null": ({"x": None}, {"template": "{x}", "answer_column": "x"}, "row 1: x is None"),
    "messages": ({"messages": [{"role": "user", "content": "hi"}]}, {}, "row 1: messages has no turn"),
    "roles": ({"messages": [{"role": "user"}]}, {}, "row 1: messages has a turn without"),
    "metric": ({"prompt": "a", "response": "b"}, {"metric": "accuracy"}, "--metric accuracy"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_description_or_row_is_named(what, tmp_path):
    row, flags, words = WRONG[what]
    with pytest.raises(UsageError) as error:
        own_task(tmp_path, [row], **flags)
    assert words in str(error.value)


def test_a_task_of_ones_own_needs_a_folder():
    with pytest.raises(UsageError, match="--data_dir"):
        get_task("own")


# ---- texts to be learned ----

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "four"},
]
CHAT = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def test_the_assistants_turns_are_learned_and_their_end():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    ids, learned, cut = text_tokens(tokenizer, {"messages": TURNS}, 100, "here")
    assert tokenizer.decode(ids) == "[u]hi[a]yes?</s>[u]2+2[a]four</s>" and cut == 0
    assert tokenizer.decode([ids[p] for p in learned]) == "yes?</s>four</s>"
    ids, learned, cut = text_tokens(tokenizer, {"messages": TURNS}, 8, "here")
    assert cut == 19 and tokenizer.decode([ids[p] for p in learned]) == "four</s>"


def test_smollm2s_chat_template_marks_the_assistant():
    tokenizer = load_tokenizer(starter("smollm2-135m"))
    ids, learned, _ = text_tokens(tokenizer, {"messages": TURNS}, 2048, "here")
    assert tokenizer.decode([ids[p] for p in learned]) == "yes?<|im_end|>\nfour<|im_end|>\n"
    assert ids == tokenizer.apply_chat_template(TURNS)["input_ids"]


def test_a_response_is_learned_with_the_end_of_text():
    tokenizer = tiny_tokenizer()
    ids, learned, _ = text_tokens(tokenizer, {"prompt": "2+2=", "response": "4"}, 100, "here")
    assert tokenizer.decode(ids) == "2+2=4</s>" and tokenizer.decode([ids[p] for p in learned]) == "4</s>"


def test_a_token_across_the_seam_of_prompt_and_response_is_learned():
    """SmolLM2 makes one token of the space that ends the prompt and the word that begins the response."""
    tokenizer = load_tokenizer(starter("smollm2-135m"))
    ids, learned, _ = text_tokens(tokenizer, {"prompt": "Is it? A: ", "response": "yes"}, 100, "here")
    assert tokenizer.decode([ids[p] for p in learned]) == " yes<|im_end|>"


def test_a_chat_template_that_raises_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match=r"here: the chat template refuses these turns .*alternate"):
        text_tokens(tokenizer, {"messages": TURNS}, 100, "here")


def test_half_an_emoji_is_refused(tmp_path):
    (tmp_path / "SST2").mkdir()
    (tmp_path / "SST2" / "train.jsonl").write_text('{"sentence": "fine \\ud83d", "label": 1}\n')
    with pytest.raises(UsageError, match="row 1: half of a surrogate pair"):
        get_task("SST2", tmp_path)


def test_a_column_may_have_any_name(tmp_path):
    task = own_task(
        tmp_path, [{"a.b": "x", "0": "y", "out": "z"}], template="{a.b} {0}:", answer_column="out"
    )
    assert task.get_template().encode(task.samples["train"][0]) == "x y:"


def test_a_prompt_of_nothing_but_a_bos_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 256)])
    sample = Sample(0, {"text": "abcdefgh"}, "X", ["X"])
    with pytest.raises(
        UsageError, match=r"--max_length 2 leaves no prompt token .* give --max_length 3 or more"
    ):
        encode_prompt(tasks.Dataset, Letters(), [], sample, tokenizer, 2)
    assert len(encode_prompt(tasks.Dataset, Letters(), [], sample, tokenizer, 3)[0][0]) == 3
    more = {"generation": True, "max_new_tokens": 5}
    with pytest.raises(
        UsageError, match=r"--max_length 6 and --max_new_tokens 5 .* give --max_length 7 or more"
    ):
        encode_prompt(tasks.Dataset, Letters(), [], sample, tokenizer, 6, **more)


def test_chats_that_cant_be_marked_are_refused():
    with pytest.raises(UsageError, match="no chat template"):
        text_tokens(tiny_tokenizer(), {"messages": TURNS}, 100, "here")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(UsageError, match="here: the chat template rewrites"):
        text_tokens(tokenizer, {"messages": TURNS}, 100, "here")
    with pytest.raises(UsageError, match=r"--max_length 1"):
        text_tokens(tokenizer, {"prompt": "2+2=", "response": "4"}, 1, "here")
