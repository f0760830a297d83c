"""Generated answers equal those of one prompt at a time, whatever the batch and the cache."""

import pytest
import torch
from support.models import tiny_model, tiny_tokenizer
from support.references import plain_answers, some_prompts

from scoring import generate


@pytest.mark.parametrize("beginning", [0, 40])
def test_answers_equal_those_of_one_prompt_at_a_time(family, beginning):
    model, prompts = tiny_model(family), some_prompts(beginning)
    expected = plain_answers(model, prompts, 12)
    assert any(expected)
    if beginning:
        prompts[3] = prompts[3][25:]  # as if it had been cut
        expected = plain_answers(model, prompts, 12)
    for settings in ({}, {"budget": 1}, {"use_cache": False}):
        settings |= {"max_new_tokens": 12, "do_sample": False}
        answers = generate.generate(model, tiny_tokenizer(), prompts, **settings)
        assert answers == expected, settings


def test_an_answer_ends_at_the_stop_text_and_at_the_end_of_text():
    model = tiny_model("llama")
    tokenizer, prompts = tiny_tokenizer(), some_prompts(0)
    free = generate.generate(model, tokenizer, prompts, max_new_tokens=12, do_sample=False)
    stop = next(text[3] for text in free if len(text) > 5 and text[3].isascii() and text[3].isprintable())
    expected = plain_answers(model, prompts, 12, stop)
    assert generate.generate(model, tokenizer, prompts, stop, max_new_tokens=12, do_sample=False) == expected
    assert expected != free
    stops = generate.stop_ids(tokenizer, "a")
    assert tokenizer.eos_token_id in stops and tokenizer.encode("a")[-1] in stops and len(stops) == 2


def test_what_all_prompts_begin_with_goes_in_once():
    model, prompts, seen = tiny_model("opt"), some_prompts(40), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    generate.generate(model, tiny_tokenizer(), prompts, max_new_tokens=1, do_sample=False)
    width = max(map(len, prompts)) - 40
    assert seen == [40, 9 * width]


def test_samples_are_drawn_by_seed_and_leave_the_global_generator_alone():
    model, prompts = tiny_model("qwen2"), some_prompts(0)
    state = torch.random.get_rng_state()
    drawn = [
        generate.generate(model, tiny_tokenizer(), prompts, seed=seed, do_sample=True, top_p=0.9, top_k=0)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_beam_search_finds_likelier_answers():
    model, prompts = tiny_model("gpt2"), some_prompts(20)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    beams = generate.generate(model, tiny_tokenizer(), prompts, **settings)
    assert len(beams) == 9 and beams != plain_answers(model, prompts, 6)


def test_batches_hold_their_budget():
    prompts = [[0] * n for n in (5, 50, 20, 7, 300)]
    groups = generate.prompt_batches(prompts, 10, 100)
    assert sorted(i for group in groups for i in group) == list(range(5))
    for group in groups:
        assert len(group) == 1 or len(group) * (max(len(prompts[i]) for i in group) + 10) <= 100
