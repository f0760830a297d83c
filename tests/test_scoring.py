"""Packed scoring equals the plain computation: one row per candidate, full logits, nothing shared."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.data import starter
from support.models import VOCABULARY, tiny_model
from support.references import assert_close, plain_logprobs, plain_scores, some_examples
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

import scoring
from scoring import logprobs, packing
from scoring.packing import Example, loss_terms


@pytest.fixture(scope="module")
def models():
    return {}


def test_the_seam_with_adapters_is_in_the_package():
    model, batch = tiny_model("opt"), scoring.pack(some_examples())
    with torch.no_grad():
        assert scoring.loss(model, batch, classification=True, copies=3).shape == (3,)
        assert scoring.token_logprobs(model, batch, copies=2).shape == (2, len(batch["token_target"]))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("beginning", [0, 40])
def test_scores_equal_the_plain_computation(family, plain, beginning):
    model, examples = tiny_model(family), some_examples(beginning=beginning)
    assert_close(logprobs.score(model, examples, plain_rows=plain), plain_scores(model, examples))


@pytest.mark.parametrize("beginning", [0, 40])
def test_packing_budget_and_order_change_no_score(family, beginning):
    model, examples = tiny_model(family), some_examples(beginning=beginning)
    reference = logprobs.score(model, examples, budget=10**6)
    for budget in (1, 40, 100):
        assert_close(logprobs.score(model, examples, budget=budget), reference)
    order = random.Random(1).sample(range(len(examples)), len(examples))
    shuffled = logprobs.score(model, [examples[i] for i in order])
    assert_close(shuffled, [reference[i] for i in order])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tree_of_options_scores_as_plain_rows(models, family, data):
    """Prompts may begin alike and be cut on the left; options may be prefixes or twins."""
    model = models.setdefault(family, tiny_model(family))
    token = st.integers(0, VOCABULARY - 1)
    examples, beginning = [], data.draw(st.lists(token, max_size=30))
    for _ in range(data.draw(st.integers(1, 4))):
        rest = data.draw(st.lists(st.one_of(token, st.just(7)), min_size=1, max_size=20))
        prompt = (beginning + rest)[-data.draw(st.integers(1, 50)) :]
        option = st.lists(st.integers(0, 2), min_size=1, max_size=4)
        options = data.draw(st.lists(option, min_size=1, max_size=4))
        examples.append(Example([prompt + o for o in options], [len(o) for o in options]))
    assert_close(logprobs.score(model, examples), plain_scores(model, examples))


def test_classification_loss_equals_plain(family):
    model, examples = tiny_model(family), some_examples()
    expected = 0.0
    for x, row in zip(examples, plain_scores(model, examples), strict=True):
        means = torch.tensor([s / n for s, n in zip(row, x.option_lens, strict=True)])
        expected -= means.log_softmax(0)[x.label].item() / len(examples)
    with torch.no_grad():
        loss = logprobs.loss(model, packing.pack(examples), classification=True)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert math.isclose(loss.item(), expected, rel_tol=1e-5)


def test_language_modelling_loss_is_the_mean_over_option_tokens(family):
    model = tiny_model(family)
    examples = [Example([x.encodings[0]], [x.option_lens[0]]) for x in some_examples()]
    tokens = [t for x in examples for t in plain_logprobs(model, x.encodings[0], x.option_lens[0])]
    with torch.no_grad():
        loss = logprobs.loss(model, packing.pack(examples), classification=False)
    assert math.isclose(loss.item(), -sum(tokens) / len(tokens), rel_tol=1e-5)


def test_gradients_through_packed_rows_equal_plain_gradients():
    examples = some_examples()
    grads = []
    for plain in (False, True):
        model = tiny_model("llama")
        logprobs.loss(model, packing.pack(examples, plain_rows=plain), classification=True).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, atol=1e-6, rtol=1e-4)


def test_examples_that_begin_alike_share_a_row():
    beginning = list(range(100, 140))
    examples = [Example([[*beginning, i, 20], [*beginning, i, 21, 22]], [1, 2]) for i in range(5)]
    batch = packing.pack(examples)
    assert batch["input_ids"].numel() == 40 + 5 * 2  # i and 21; the last token of an option never goes in
    batch = packing.pack([Example([[256, *range(i, i + 60)]], [1]) for i in range(3)])
    assert (batch["input_ids"] == 256).sum() == 3  # one token in common isn't worth a longer row


def test_what_all_examples_begin_with_goes_in_once():
    model, beginning = tiny_model("llama"), list(range(60))
    examples = [Example([[*beginning, 100 + i, 1], [*beginning, 100 + i, 2]], [1, 1]) for i in range(30)]
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    scores = logprobs.score(model, examples, budget=10)
    assert seen[0] == 60 and sum(seen) == 60 + 30
    assert_close(scores, plain_scores(model, examples))


def test_one_prompt_that_was_cut_does_not_take_the_cache_from_the_others():
    model, beginning = tiny_model("llama"), list(range(60))
    examples = [Example([[*beginning, 100 + i, 1], [*beginning, 100 + i, 2]], [1, 1]) for i in range(9)]
    examples[4] = Example([[*beginning[20:], 104, 1], [*beginning[20:], 104, 2]], [1, 1])
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    scores = logprobs.score(model, examples)
    assert sum(seen) == 60 + 8 + 41
    assert_close(scores, plain_scores(model, examples))


def test_tokens_to_be_learned_may_stand_anywhere():
    model = tiny_model("opt")
    ids, targets = list(range(30)), [3, 4, 11, 29]
    example = Example([ids], [4], targets=[targets])
    expected = plain_logprobs(model, ids, 29)
    assert_close(logprobs.score(model, [example]), [[sum(expected[p - 1] for p in targets)]])
    assert loss_terms([example], classification=False) == 4
    assert loss_terms([example], classification=True) == 1


def test_in_bf16_predictions_differ_only_where_plain_scores_tie(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    examples = some_examples(60, seed=3, beginning=20)
    packed, plain = logprobs.score(model, examples), logprobs.score(model, examples, plain_rows=True)
    for a, b in zip(packed, plain, strict=True):
        best = b.index(max(b))
        assert a.index(max(a)) == best or b[best] - b[a.index(max(a))] < 0.02 * abs(b[best])


def test_each_distinct_token_goes_in_once_and_the_last_never():
    prompt = list(range(10))
    batch = packing.pack([Example([[*prompt, 20], [*prompt, 21]], [1, 1])])
    assert batch["input_ids"].tolist() == [prompt]
    assert len(batch["read_row"]) == 1  # both options are read from one place


def test_one_forward_serves_a_whole_batch():
    model, calls = tiny_model("opt"), []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    with torch.no_grad():
        logprobs.loss(model, packing.pack(some_examples()), classification=True)
    assert len(calls) == 1


def test_rows_are_balanced():
    sizes = [30, 20, 20, 10, 10, 10]
    spans_of_rows = {}
    for (row, start), size in zip(packing.bin_pack(sizes), sizes, strict=True):
        spans_of_rows.setdefault(row, []).append((start, start + size))
    for spans in spans_of_rows.values():  # no two items overlap, none leaves a hole
        spans.sort()
        assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_families_that_take_packed_rows_are_found(family):
    assert logprobs.supports_packed_rows(tiny_model(family))
    assert logprobs.supports_packed_rows(tiny_model(family, dtype=torch.bfloat16))


def test_alibi_and_sliding_windows_fall_back_to_plain_rows():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    mistral = MistralForCausalLM(
        MistralConfig(**sizes, num_key_value_heads=2, intermediate_size=48, sliding_window=8)
    ).eval()
    for model in (bloom, mistral):
        assert not logprobs.supports_packed_rows(model)
        scores = logprobs.score(model, some_examples(), plain_rows=True)
        assert_close(scores, plain_scores(model, some_examples()))


def test_windows_longer_than_the_probe_are_seen_too():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}

    def model(window):
        return MistralForCausalLM(MistralConfig(**sizes, sliding_window=window)).eval()

    assert not logprobs.supports_packed_rows(model(64))
    assert not logprobs.supports_packed_rows(model(4096), max_length=8192)
    assert logprobs.supports_packed_rows(model(4096)) and logprobs.supports_packed_rows(model(None))


def test_trees_and_batches_have_a_bound():
    beginning = list(range(200)) * 5
    examples = [Example([[*beginning, i % 250, i % 7, 9]], [1]) for i in range(3000)]
    sizes = [len(tree.tokens) for tree in packing.build_trees(examples)]
    assert len(sizes) > 1 and max(sizes) <= packing.MAX_TOKENS
    plain = [Example([[1] * 1500], [1]), *(Example([[1] * 20], [1]) for _ in range(100))]
    for group in packing.batch_trees(packing.build_trees(plain, plain_rows=True), 2048, 10**6, padded=True):
        assert len(group) == 1 or len(group) * len(group[0].tokens) <= 2048


def test_nan_is_an_error_and_not_class_0():
    model = tiny_model("opt")
    model.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        logprobs.score(model, some_examples(2))


def test_half_precision_reads_logits_in_fp32():
    model = tiny_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        assert logprobs.loss(model, packing.pack(some_examples()), classification=True).dtype == torch.float32


def test_smollm2_scores_real_sentences_as_plain_rows_do():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = starter("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ["a film of great warmth and wit", "tedious from the first minute", "no, never."]
    options = [" It was terrible", " It was great", " It was truly wonderful"]
    lens = [len(tokenizer.encode(option)) - 2 for option in options]
    examples = [Example([tokenizer.encode(text + option) for option in options], lens) for text in texts]
    assert_close(logprobs.score(model, examples), plain_scores(model, examples))
