"""Caches that are served by operators answer as those that are not: the operators are the specification here."""

import copy

import pytest
import torch
from graphs_on_cpu import captured
from graphs_on_cpu import emulate as emulate_graphs
from kernels_on_cpu import emulate
from small_llama import ANSWER, BUDGET, PROMPT, generate, make_model, tokens
from transformers import GptOssForCausalLM

from hf_quest import CACHE_NAME, QuestCache
from hf_quest.watch import PageReads

OPTIONS = {
    "pages": {},
    "the paper's pages": {"score": "published", "bounds_dtype": None},
    "tokens": {"codes": 2, "candidates": 2},
    "tokens, 4 bits": {"codes": 4, "candidates": 1, "page_size": 8},
}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 37},
    "drafts": {"prompt_lookup_num_tokens": 4},
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def new_cache(request):
    return lambda budget=BUDGET: QuestCache(budget, dense_layers=1, **request.param)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes_of_generate(model, new_cache, monkeypatch, mode):
    prompt = tokens(PROMPT // 2).repeat(1, 2)
    expected = generate(model, prompt, new_cache(), **mode)
    calls = emulate(monkeypatch)
    assert torch.equal(generate(model, prompt, new_cache(), **mode), expected)
    assert {"append", "chain"} <= set(calls)


def test_a_padded_batch(model, new_cache, monkeypatch):
    prompt = tokens(PROMPT, batch_size=2)
    prompt[1, :37] = 0
    mask = (prompt > 0).long()
    expected = generate(model, prompt, new_cache(), attention_mask=mask)
    emulate(monkeypatch)
    assert torch.equal(generate(model, prompt, new_cache(), attention_mask=mask), expected)


def test_a_budget_beyond_the_context(model, new_cache, monkeypatch):
    expected = generate(model, tokens(PROMPT), new_cache(512))
    calls = emulate(monkeypatch)
    assert torch.equal(generate(model, tokens(PROMPT), new_cache(512)), expected)
    assert "chain" not in calls


def test_a_text_that_grows_past_the_budget_is_cropped_and_goes_on(model, new_cache, monkeypatch):
    def write(cache):
        first = generate(model, tokens(BUDGET - 10), cache, max_new_tokens=60)
        cache.crop(-33)
        return generate(model, torch.cat([first[:, :-32], tokens(5, seed=2)], dim=1), cache, max_new_tokens=30)

    expected = write(new_cache())
    emulate(monkeypatch)
    assert torch.equal(write(new_cache()), expected)


def test_what_was_read_is_told(model, new_cache, monkeypatch):
    def read(cache):
        cache.watcher = reads = PageReads()
        generate(model, tokens(PROMPT), cache)
        reads.weigh(cache)
        return reads.attention(-(-cache.get_seq_length() // cache.page_size))

    expected = read(new_cache())
    emulate(monkeypatch)
    torch.testing.assert_close(read(new_cache()), expected)


def test_sinks_reach_the_operators(new_cache, monkeypatch):
    torch.manual_seed(0)
    model = make_model(GptOssForCausalLM, num_local_experts=2, num_experts_per_tok=1, head_dim=16)
    expected = generate(model, tokens(PROMPT), new_cache())
    calls = emulate(monkeypatch)
    assert torch.equal(generate(model, tokens(PROMPT), new_cache()), expected)
    assert "chain" in calls


@pytest.mark.parametrize("budget", [BUDGET, 2048])
def test_a_captured_step_finds_the_storage_by_its_addresses(model, new_cache, monkeypatch, budget):
    """While it moves, on a copy and after a reset."""
    prompt = tokens(PROMPT)
    expected = generate(model, prompt, new_cache(budget), max_new_tokens=4 * ANSWER)
    calls, recordings = emulate(monkeypatch), emulate_graphs(monkeypatch)
    recorder = captured(copy.deepcopy(model))
    cache = new_cache(budget)
    assert torch.equal(generate(recorder, prompt, cache, max_new_tokens=4 * ANSWER), expected)
    assert recordings
    assert "decode" in calls
    assert "chain" not in [name for name in calls if budget == 2048]
    with torch.no_grad():
        twin = copy.deepcopy(cache)
        model(expected[:, -1:], **{CACHE_NAME: twin})
    cache.reset()
    assert torch.equal(generate(recorder, prompt, cache, max_new_tokens=4 * ANSWER), expected)
