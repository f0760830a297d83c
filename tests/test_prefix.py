"""A trained prefix is the plain computation in scoring, training and generation, and the same in PEFT."""

from pathlib import Path

import peft
import pytest
import torch
from support.models import ALL_FAMILIES, tiny_model, tiny_tokenizer
from support.references import some_examples, some_prompts
from transformers import DynamicCache

import prefix
import trainer
from boosters import peft_files
from prefix import PrefixTuning
from scoring import generate, logprobs, packing
from scoring.packing import Example
from utils import UsageError
from zo.optimizer import ZerothOrder


def with_prefix(family, reparam=False, real=True, length=5):
    """A model with a prefix whose values are not those that it starts from."""
    model = tiny_model(family)
    tuning = PrefixTuning(model, length, reparam, real)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in tuning.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, tuning


@torch.inference_mode()
def plain_logits(model, ids: list[int], states: torch.Tensor) -> torch.Tensor:
    """Return logits [tokens, V] of one sequence behind keys and values [layers, 2, 1, heads, tokens, D]."""
    cache = DynamicCache(config=model.config)
    for i, (keys, values) in enumerate(states):
        cache.update(keys, values, i)
    return model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]


def plain_scores(model, examples, states):
    sums = []
    for x in examples:
        sums.append([])
        for ids, n in zip(x.encodings, x.option_lens, strict=True):
            token_logprobs = plain_logits(model, ids, states).log_softmax(-1)
            sums[-1].append(sum(float(token_logprobs[p - 1, ids[p]]) for p in range(len(ids) - n, len(ids))))
    return sums


def within_tolerance(a, b, absolute=2e-5, relative=1e-5):
    """Within the tolerance of a token, times the most tokens that an option has."""
    pairs = [pair for rows in zip(a, b, strict=True) for pair in zip(*rows, strict=True)]
    return all(abs(x - y) <= 4 * absolute + relative * abs(y) for x, y in pairs)


SETTINGS = [{}, {"budget": 1}, {"use_cache": False}, {"use_cache": False, "num_beams": 2}]  # of generation


@pytest.mark.parametrize("beginning", [0, 20])
@pytest.mark.parametrize("reparam", [False, True])
def test_scores_equal_the_plain_computation(family, reparam, beginning):
    model, tuning = with_prefix(family, reparam)
    examples = some_examples(beginning=beginning)
    expected = plain_scores(model, examples, tuning.keys_and_values(torch.float32))
    without = logprobs.score(tiny_model(family), examples)
    assert not within_tolerance(without, expected, 1e-2)
    assert packing.shared_prefix_len(examples) == beginning
    for settings in ({}, {"plain_rows": True}, {"budget": 40}):
        assert within_tolerance(logprobs.score(model, examples, **settings), expected), settings


def test_a_prefix_of_real_activations_is_the_tokens_themselves(family):
    model = tiny_model(family)
    ids = torch.randint(264, (1, 5), generator=torch.Generator().manual_seed(7))[0].tolist()
    text = list(range(20, 40))
    with torch.inference_mode():
        expected = model(torch.tensor([ids + text])).logits[0, 5:]
    tuning = PrefixTuning(model, 5, seed=7)
    torch.testing.assert_close(
        plain_logits(model, text, tuning.keys_and_values(torch.float32)), expected, rtol=1e-4, atol=2e-5
    )
    examples = [Example([text], [4])]
    token_logprobs = expected.log_softmax(-1)
    total = sum(float(token_logprobs[p - 1, text[p]]) for p in range(16, 20))
    assert logprobs.score(model, examples)[0][0] == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("reparam", [False, True])
def test_copies_see_perturbations_of_their_own(family, reparam):
    model, tuning = with_prefix(family, reparam)
    batch = packing.pack(some_examples())
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(2)
        deltas = [0.1 * torch.randn(3, *p.shape) for p in tuning.parameters()]
        tuning.set_perturbations(deltas)
        batched = logprobs.loss(model, batch, True, copies=3)
        tuning.set_perturbations(None)
        before = [p.clone() for p in tuning.parameters()]
        for i in range(3):
            for p, start, delta in zip(tuning.parameters(), before, deltas, strict=True):
                p.copy_(start + delta[i])
            torch.testing.assert_close(logprobs.loss(model, batch, True), batched[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_zeroth_order_step_is_the_plain_one(family, copies):
    model, tuning = with_prefix(family)
    batch, start = packing.pack(some_examples()), tuning.embedding.detach().clone()
    groups = [{"params": list(tuning.parameters())}]
    zo = ZerothOrder(groups, 1e-2, 1e-1, 3, master=True, set_perturbations=tuning.set_perturbations)
    z = zo.directions.z(zo.blocks[0], 0).clone().view(start.shape)
    losses = []
    with torch.inference_mode():
        for sign in (1, -1):
            tuning.embedding.copy_(start + sign * 0.1 * z)
            losses.append(float(logprobs.loss(model, batch, True)))
        tuning.embedding.copy_(start)
    zo.estimate(lambda **more: logprobs.loss(model, batch, True, **more), copies=copies)
    zo.step()
    g = (losses[0] - losses[1]) / 0.2
    assert zo.projected_grads[0] == pytest.approx(g, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(tuning.embedding.detach(), start - 1e-2 * zo.projected_grads[0] * z)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("beginning", [0, 20])
def test_answers_equal_those_by_hand(family, settings, beginning):
    model, tuning = with_prefix(family)
    states = tuning.keys_and_values(torch.float32)
    tokenizer, prompts = tiny_tokenizer(), some_prompts(beginning)[:5]
    answers = generate.generate(model, tokenizer, prompts, max_new_tokens=8, do_sample=False, **settings)
    if "num_beams" in settings:  # two beams find no worse a text; that they see the prefix shows against none
        bare = tiny_model(family)
        without = generate.generate(bare, tokenizer, prompts, max_new_tokens=8, do_sample=False, **settings)
        assert answers != without
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, text = list(prompt), ""
        while len(ids) - len(prompt) < 8 and "\n" not in text:
            token = int(plain_logits(model, ids, states)[-1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
            text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert answer == text.split("\n")[0].strip()


@pytest.mark.parametrize("reparam", [False, True])
def test_peft_loads_it_and_gives_the_same_logits(family, reparam, tmp_path):
    model, tuning = with_prefix(family, reparam)
    tuning.save_pretrained(tmp_path)
    expected = plain_logits(model, list(range(9)), tuning.keys_and_values(torch.float32))
    peft_model = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    with torch.inference_mode():
        logits = peft_model(input_ids=torch.tensor([list(range(9))])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
    resumed = PrefixTuning(tiny_model(family), 5, reparam, seed=5)
    resumed.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), tuning.parameters(), strict=True))
    loaded = PrefixTuning(tiny_model(family), 5)
    loaded.load(tmp_path)
    assert torch.equal(loaded.prompt_embeddings(), tuning.prompt_embeddings())


def test_a_prefix_made_by_peft_loads(tmp_path):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft_model = peft.get_peft_model(tiny_model("llama"), config).eval()
    peft_model.save_pretrained(tmp_path)
    ours = tiny_model("llama")
    tuning = PrefixTuning(ours, prefix.saved_length(tmp_path))
    tuning.load(tmp_path)
    with torch.inference_mode():
        expected = peft_model(input_ids=torch.tensor([list(range(9))])).logits[0]
    logits = plain_logits(ours, list(range(9)), tuning.keys_and_values(torch.float32))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


def test_initial_values_come_from_a_private_generator():
    state = torch.get_rng_state()
    kinds = ((), (True,), (False, False))
    tunings = [PrefixTuning(tiny_model("llama"), 3, *kind, seed=seed) for seed in (0, 0, 1) for kind in kinds]
    assert torch.equal(torch.get_rng_state(), state)
    values = [tuning.embedding for tuning in tunings]
    for i in range(3):
        assert torch.equal(values[i], values[3 + i]) and not torch.equal(values[i], values[6 + i])


def test_a_saved_prefix_must_fit(tmp_path):
    _, tuning = with_prefix("llama")
    tuning.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="prefix of 5 tokens"):
        PrefixTuning(tiny_model("llama"), 4).load(tmp_path)
    with pytest.raises(UsageError, match="no_reparam"):
        PrefixTuning(tiny_model("llama"), 5, reparam=True).load(tmp_path)
    with pytest.raises(UsageError, match="prompt_embeddings"):
        PrefixTuning(tiny_model("gpt2"), 5).load(tmp_path)


RUN = "--prefix_tuning --max_steps 6 --output_dir out --save_model --save_steps 2"


@pytest.mark.parametrize("more", ["--trainer zo", "--trainer zo --no_reparam False", "--trainer regular"])
def test_a_run_its_resume_and_its_adapter(go, more, monkeypatch):
    result = go(f"{RUN} {more} --num_dev 8")
    assert result["args"]["zo_eps"] == (0.1 if "zo" in more else None)
    assert result["args"]["learning_rate"] == 1e-2
    files = [peft_files.WEIGHTS] + [prefix.EXACT_WEIGHTS] * ("False" in more)
    expected = [Path("out", name).read_bytes() for name in files]
    calls, step = [], trainer.OurTrainer.training_step

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer.OurTrainer, "training_step", dies)
        go(f"{RUN} {more} --num_dev 8 --overwrite")
    go(f"{RUN} {more} --num_dev 8")
    assert [Path("out", name).read_bytes() for name in files] == expected


def test_a_saved_prefix_is_evaluated_and_gone_on_from(go):
    trained = go(f"{RUN} --trainer zo --learning_rate 1")
    bare = go("--trainer none --num_train 0")
    loaded = go("--trainer none --num_train 0 --adapter out")
    assert loaded["loss"] == pytest.approx(trained["loss"], abs=1e-5) and loaded["loss"] != bare["loss"]
    go("--trainer zo --prefix_tuning --adapter out --max_steps 1 --output_dir more")
    training = "--trainer zo --max_steps 1"
    for flags in (f"{training} --lora", training, "--staged 1", "--save_merged"):
        go(f"{flags} --adapter out --output_dir other", status=2)


def test_a_replay_gives_the_same_bits(go):
    go(f"{RUN} --trainer zo")
    before = Path("out", peft_files.WEIGHTS).read_bytes()
    flags = RUN.replace("dir out", "dir rebuilt")
    go(f"{flags} --trainer zo --replay out/trajectory.safetensors", result=False)
    assert Path("rebuilt", peft_files.WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("kind", ALL_FAMILIES)
def test_every_family_sees_the_prefix_as_it_is(kind):
    bare = tiny_model(kind)
    plain = not logprobs.supports_packed_rows(bare)
    model, tuning = with_prefix(kind)
    examples = some_examples(5)
    expected = plain_scores(model, examples, tuning.keys_and_values(torch.float32))
    assert not within_tolerance(logprobs.score(bare, examples, plain_rows=plain), expected, 1e-2)
    assert within_tolerance(logprobs.score(model, examples, plain_rows=plain), expected)
