"""`run.py` on tasks of every kind: own data, generated answers, texts; what it prints and writes."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from support.data import TRAIN
from support.models import VOCABULARY, tiny_model, tiny_tokenizer
from support.references import assert_close, plain_scores

import run
from cli import results
from scoring import Example, generate, score
from scoring.evaluate import Evaluator
from scoring.metrics import find_metric
from scoring.prompts import Prompts
from tasks import get_task


@pytest.fixture
def go(model_dir, data_dir, tmp_path, monkeypatch):
    """go(flags, *words) -> result of `run.py` in an empty folder; words may hold spaces."""
    monkeypatch.chdir(tmp_path)

    def main(flags: str, *words: str, model=model_dir, data=data_dir, status: int = 0) -> dict:
        common = f"--model_name {model} --data_dir {data} --result_file r.json --disable_tqdm True {flags}"
        assert run.main([*common.split(), *words]) == status
        return json.loads((tmp_path / "r.json").read_text()) if status == 0 else {}

    return main


def lines(path) -> list[dict]:
    return [json.loads(line) for line in open(path)]


def write_own(folder, rows, validation=None):
    folder.mkdir(parents=True, exist_ok=True)
    for split, split_rows in (("train", rows), ("validation", validation or rows)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split_rows))
    return folder


WORDS, LABELS = ["poor", "fine"], ["neg", "pos"]
REVIEWS = [{"review": f"{WORDS[i % 2]} {i}", "label": LABELS[i % 2]} for i in range(12)]
LABEL_WORDS = '{"neg":"terrible","pos":"great"}'
CLASSES = ("--template", "{review} It was", "--label_words", LABEL_WORDS, "--label_column", "label")
QUESTIONS = [{"q": f"{i}+1?", "options": [str(i + 1), "no"], "right": 0, "a": str(i + 1)} for i in range(12)]
CHOICES = ("--template", "{q} Answer:", "--candidates_column", "options", "--answer_index_column", "right")
ANSWERS = ("--template", "{q} Answer:", "--answer_column", "a")
TEXTS = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(12)]
ROLES = ["user", "assistant", "user", "assistant"]
CHAT = [
    {"messages": [{"role": role, "content": f"{i}{sign}"} for role, sign in zip(ROLES, "+-*/", strict=True)]}
    for i in range(12)
]
ZO = "--trainer zo --lora --max_steps 3 --num_train 8 --num_dev 4 --eval_strategy steps --eval_steps 1 "
ZO += "--save_steps 1 --load_best_model_at_end --save_model"
KINDS = {
    "classes": (REVIEWS, CLASSES, "accuracy"),
    "choices": (QUESTIONS, CHOICES, "accuracy"),
    "answers": (QUESTIONS, (*ANSWERS, "--max_new_tokens", "4"), "f1"),
    "texts": (TEXTS, (), "loss"),
    "chat": (CHAT, (), "loss"),
}


@pytest.fixture
def chat_model(model_dir, tmp_path):
    """The tiny model with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    tiny_model("llama").save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.mark.parametrize("kind", KINDS)
def test_own_data_of_every_kind_trains_and_evaluates(go, tmp_path, chat_model, kind):
    rows, flags, metric = KINDS[kind]
    data = write_own(tmp_path / "mine", rows)
    result = go(f"--task_name own {ZO} --predictions p.jsonl", *flags, model=chat_model, data=data)
    assert result["args"]["metric_for_best_model"] == metric
    assert metric in result and f"dev_{metric}" in result
    assert len(lines("p.jsonl")) == 12
    output_dir = tmp_path / "result" / "own-mine-chat-lora-zo-seed42-trainset42"
    assert (output_dir / "adapter_model.safetensors").exists()


def test_predictions_hold_scores_prediction_and_gold(go, tmp_path):
    result = go("--task_name SST2 --predictions p.jsonl")
    rows = lines("p.jsonl")
    assert len(rows) == 8 and rows[0].keys() == {"id", "candidates", "scores", "prediction", "gold", "loss"}
    for row in rows:
        assert row["prediction"] == row["candidates"][row["scores"].index(max(row["scores"]))]
    assert result["accuracy"] == statistics.fmean(row["prediction"] == row["gold"] for row in rows)
    assert result["loss"] == pytest.approx(statistics.fmean(row["loss"] for row in rows))


def evaluator_of(data_dir, model, **calibration) -> Evaluator:
    task, tokenizer = get_task("SST2", str(data_dir)), tiny_tokenizer()
    prompts = Prompts(task, tokenizer, 128, VOCABULARY, **calibration)
    evaluator = Evaluator(task, tokenizer, prompts, progress=False)
    evaluator.attach(model)
    return evaluator


@pytest.mark.parametrize(("name", "plain_rows"), [("llama", False), ("bloom", True)])
def test_an_evaluator_takes_the_rows_that_its_model_takes(data_dir, name, plain_rows):
    model = tiny_model(name)
    evaluator = evaluator_of(data_dir, model)
    batch = evaluator.prompts.eval_batch(evaluator.task.sample_subset("validation", 0, 8))
    assert evaluator.plain_rows == plain_rows
    expected = [
        [s / n for s, n in zip(sums, x.option_lens, strict=True)]
        for sums, x in zip(plain_scores(model, batch.examples), batch.examples, strict=True)
    ]
    assert_close(evaluator.score(batch), expected, tokens=1)


def test_an_objective_is_measured_on_the_rows_of_a_batch(data_dir):
    evaluator = evaluator_of(data_dir, tiny_model("opt"), sfc=True)
    batch = evaluator.prompts.eval_batch(evaluator.task.sample_subset("validation", 0, 8))
    accuracies = []
    for rows in ([0, 3], [5], list(range(8))):
        loss = evaluator.objective_loss(find_metric("accuracy"), batch, None, {"row": torch.tensor(rows)})
        part = batch.select(rows)
        assert len(part.samples) == len(part.examples) == len(part.prior) == len(rows)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(-evaluator.evaluate(part)["accuracy"])
        accuracies.append(-loss.item())
    assert len(set(accuracies)) > 1


def test_a_text_s_loss_is_the_mean_over_its_tokens(go, tmp_path, model_dir):
    result = go("--task_name own", data=write_own(tmp_path / "mine", TEXTS))
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    examples = []
    for row in TEXTS:
        ids = [*tokenizer.encode(row["prompt"] + row["response"]), tokenizer.eos_token_id]
        examples.append(Example([ids], [len(ids) - len(tokenizer.encode(row["prompt"]))]))
    sums = [row[0] for row in score(model, examples, plain_rows=True)]
    loss = -sum(sums) / sum(x.option_lens[0] for x in examples)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)


@pytest.mark.parametrize("rows", [TEXTS, CHAT], ids=["texts", "chat"])
def test_the_loss_that_is_trained_is_the_one_that_is_evaluated(go, tmp_path, chat_model, rows):
    data = write_own(tmp_path / "mine", rows, rows)
    flags = "--trainer zo --lora --max_steps 1 --num_train 12 --per_device_train_batch_size 12"
    flags += " --learning_rate 0 --zo_eps 1e-5 --logging_steps 1 --output_dir out"
    result = go(f"--task_name own {flags}", model=chat_model, data=data)
    state = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(result["loss"], rel=1e-4)


def test_generated_answers_are_scored_by_f1_and_em(go, tmp_path, monkeypatch):
    data = write_own(tmp_path / "mine", QUESTIONS)
    endings = ["", " perhaps", None]
    answers = {
        f"{row['q']} Answer:": "x" if endings[i % 3] is None else row["a"] + endings[i % 3]
        for i, row in enumerate(QUESTIONS)
    }
    settings = {}

    def answer(model, tokenizer, prompts, **more):
        settings.update(more)
        return [answers[tokenizer.decode(ids)] for ids in prompts]

    monkeypatch.setattr(generate, "generate", answer)
    words = (*ANSWERS, "--eos_token", "\\n", "--sampling", "--temperature", "0.5", "--top_k", "7")
    result = go("--task_name own --predictions p.jsonl --seed 3 --max_new_tokens 5", *words, data=data)
    assert result["em"] == pytest.approx(1 / 3) and result["f1"] == pytest.approx((1 + 2 / 3) / 3)
    expected = {"eos_token": "\n", "max_new_tokens": 5, "do_sample": True, "temperature": 0.5, "top_k": 7}
    assert settings.items() >= (expected | {"top_p": 0.95, "seed": 3}).items()
    assert lines("p.jsonl")[0].keys() == {"id", "prediction", "gold"}


def test_calibration_with_demonstrations_subtracts_the_score_behind_them(go, tmp_path):
    flags = "--task_name SST2 --num_train 2 --train_set_seed 0 --predictions p.jsonl"
    scores = {}
    for name in ("", "--sfc", "--icl_sfc"):
        go(f"{flags} {name}")
        scores[name] = [row["scores"] for row in lines("p.jsonl")]
    lens = [len("terrible") + 1, len("great") + 1]
    for name in ("--sfc", "--icl_sfc"):
        differences = [
            [a * n - b for a, b, n in zip(x, y, lens, strict=True)]
            for x, y in zip(scores[""], scores[name], strict=True)
        ]
        # all examples have the same calibration prompt
        assert torch.allclose(torch.tensor(differences), torch.tensor(differences[:1]), atol=1e-3)
    assert scores["--sfc"] != scores["--icl_sfc"]


def test_what_was_cut_is_counted_once(go, caplog):
    caplog.set_level("INFO")
    go("--task_name SST2 --max_length 40")
    messages = [record.message for record in caplog.records if "cut on the left" in record.message]
    long = sum(len(f"{sentence} It was terrible") > 40 for sentence, _ in TRAIN)
    assert 0 < long < 8 and messages == [f"{long} of 8 prompts are longer than 40 tokens: cut on the left"]


def test_verbose_shows_the_prompt_and_the_scores(go, caplog, tmp_path):
    caplog.set_level("INFO")
    go("--task_name SST2 --verbose")
    message = next(record.message for record in caplog.records if record.message.startswith("first prompt"))
    assert "It was" in message and "'scores': [" in message


def test_several_sets_have_results_of_their_own_and_a_deviation(go, tmp_path):
    flags = f"{ZO} --num_train_sets 3 --train_set_seed 1 --learning_rate 0.1"
    result = go(f"--task_name SST2 {flags} --predictions p.jsonl")
    set_results = [json.loads((tmp_path / f"r-trainset{k}.json").read_text()) for k in (1, 2, 3)]
    assert [set_result["sets"] for set_result in set_results] == [[s] for s in result["sets"]]
    losses = [set_result["loss"] for set_result in set_results]
    assert len(set(losses)) == 3
    assert result["loss"] == pytest.approx(statistics.fmean(losses))
    assert result["deviation"]["loss"] == pytest.approx(statistics.stdev(losses))
    assert len(lines("p-trainset2.jsonl")) == 8 and not (tmp_path / "p.jsonl").exists()


def test_no_dev_rows_is_a_number_of_dev_rows(go):
    flags = "--task_name SST2 --trainer zo --lora --max_steps 2 --learning_rate 0.1 --output_dir"
    with_none, without = go(f"{flags} a --num_dev 0"), go(f"{flags} b")
    assert with_none["loss"] == without["loss"] and "dev_loss" not in with_none


@pytest.mark.parametrize(
    ("rows", "flags", "metric"),
    [(TEXTS, "--metric", "perplexity"), (TEXTS, "--metric_for_best_model", "perplexity"),
     (QUESTIONS, "--metric", "macro_f1")],
)  # fmt: skip
def test_another_metric_chooses_the_best_checkpoint(go, tmp_path, rows, flags, metric):
    data, more = write_own(tmp_path / "mine", rows), CHOICES if rows is QUESTIONS else ()
    result = go(f"--task_name own {ZO} {flags} {metric} --output_dir out", *more, data=data)
    state = json.loads(Path("out/checkpoint-3/trainer_state.json").read_text())
    assert result["args"]["metric_for_best_model"] == metric and metric in result
    measured = [entry[f"eval_{metric}"] for entry in state["log_history"] if f"eval_{metric}" in entry]
    assert state["best_metric"] == (min if metric == "perplexity" else max)(measured)


def test_macro_f1_where_it_is_asked_for(go):
    assert "macro_f1" not in go("--task_name SST2") and "macro_f1" in go("--task_name SST2 --metric macro_f1")


TASK_FLAGS = {
    "--task_name own --sfc": ("--sfc", "own"),
    "--task_name own --trainer zo --train_as_classification --max_steps 1": ("--train_as_classification",),
    "--task_name own --num_train 2": ("--num_train", "without demonstrations"),
    "--task_name own --metric accuracy": ("--metric accuracy", "perplexity"),
    "--task_name SST2 --answer_column x": ("--task_name own",),
    "--task_name SST2 --sfc --icl_sfc": ("--sfc", "--icl_sfc"),
    "--task_name SST2 --predictions p --no_eval": ("--predictions", "--no_eval"),
    "--task_name SST2 --top_p 0": ("--top_p",),
    "--task_name SST2 --temperature 0": ("--temperature",),
    "--task_name SST2 --max_new_tokens 0": ("--max_new_tokens",),
    "--task_name SST2 --eos_token=": ("--eos_token",),
    "--task_name SST2 --seed 4294967296": ("--seed", "2**32"),
    "--task_name SST2 --trainer zo --lora --zo_method lozo": ("--zo_method lozo", "adapters"),
    "--task_name SST2 --trainer zo --lora --zo_check --zo_eps 1e-12 --max_steps 1": (
        "--zo_check",
        "larger eps",
    ),
}


@pytest.mark.parametrize("flags", TASK_FLAGS)
def test_flags_that_a_task_cant_take_are_refused(go, tmp_path, data_dir, capsys, flags):
    data = write_own(tmp_path / "mine", TEXTS) if "own" in flags else data_dir
    go(flags, data=data, status=2)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("run.py: error: ") and all(word in message for word in TASK_FLAGS[flags])


def test_results_are_printed_as_a_table(go, tmp_path, capsys):
    folder = tmp_path / "result"
    folder.mkdir()
    for seed in (1, 2):
        result = go(f"--task_name SST2 {ZO} --seed {seed} --learning_rate 0.1")
        (folder / f"{seed}.json").write_text(json.dumps(result))
    (folder / "predictions.json").write_text('{"id": 1}\n{"id": 2}\n')
    capsys.readouterr()
    assert results.main([str(folder)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = next(words for words in table if "loss" in words)
    losses = [json.loads((folder / f"{seed}.json").read_text())["loss"] for seed in (1, 2)]
    assert row[:5] == ["SST2", "tiny-llama", "lora", "zo", "2"]
    assert float(row[6]) == pytest.approx(statistics.fmean(losses), abs=1e-4)
    assert float(row[7]) == pytest.approx(statistics.stdev(losses), abs=1e-4)
    assert results.main([str(tmp_path / "nowhere")]) == 2
