"""H2O, TOVA and StreamingLLM: each keeps what its paper says, and serves every mode of `generate`."""

import copy
import math

import pytest
import torch
from small_llama import ANSWER, PROMPT, feed, generate, greedy, make_model, tokens
from transformers import DynamicCache

from hf_quest import QuestError
from hf_quest.attention import quest_attention
from hf_quest.baselines import H2OCache, StreamingLLMCache, TOVACache

BASELINES = [H2OCache, TOVACache, StreamingLLMCache]
BUDGET = 20  # tokens, of a prompt of PROMPT
EVERYTHING = 10_000


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(params=BASELINES, ids=lambda baseline: baseline.__name__)
def baseline(request):
    return request.param


class Stream:
    """One layer's random queries, keys and values, fed as a prompt and then token by token."""

    def __init__(self, num_tokens, num_heads=4, num_kv_heads=2, head_dim=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.query = 2 * torch.randn(1, num_heads, num_tokens, head_dim, generator=generator)
        self.key, self.value = torch.randn(2, 1, num_kv_heads, num_tokens, head_dim, generator=generator)
        self.module = torch.nn.Module()
        self.module.num_key_value_groups = num_heads // num_kv_heads

    def feed(self, cache, first, end):
        """Attention output [1, T, Hq, D] of the tokens `first` to `end - 1`."""
        key, value = cache.update(self.key[:, :, first:end], self.value[:, :, first:end], 0)
        return quest_attention(self.module, self.query[:, :, first:end], key, value, None)[0]

    def weights(self, token, head, kept):
        """Softmax weights of one query over the tokens `kept`, a dict by token, by the formula."""
        group = head // self.module.num_key_value_groups
        query = self.query[0, head, token].tolist()
        keys = {other: self.key[0, group, other].tolist() for other in kept}
        logits = {
            other: sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(len(query))
            for other, key in keys.items()
        }
        total = sum(map(math.exp, logits.values()))
        return {other: math.exp(logit) / total for other, logit in logits.items()}


def h2o_keeps(stream, num_prompt, num_tokens, budget):
    """After every forward the tokens kept by each KV head: sums of weights, half heavy and half recent."""
    num_groups, num_kv_heads = stream.module.num_key_value_groups, stream.key.shape[1]
    kept = [[] for _ in range(num_kv_heads)]
    scores = [{} for _ in range(num_kv_heads)]
    for end in range(num_prompt, num_tokens + 1):
        new = range(num_prompt) if end == num_prompt else [end - 1]
        for group in range(num_kv_heads):
            kept[group] = kept[group] + list(new)
            for token in new:
                for head in range(group * num_groups, (group + 1) * num_groups):
                    seen = [other for other in kept[group] if other <= token]
                    for other, weight in stream.weights(token, head, seen).items():
                        scores[group][other] = scores[group].get(other, 0.0) + weight
            older, recent = kept[group][: -(budget - budget // 2)], kept[group][-(budget - budget // 2) :]
            heavy = sorted(older, key=lambda other, group=group: scores[group][other])[-(budget // 2) :]
            kept[group] = sorted(heavy) + recent
        yield [list(tokens) for tokens in kept]


def tova_keeps(stream, num_prompt, num_tokens, budget):
    """The same: the highest weights of the newest query, mean over all heads, one set for the layer."""
    num_heads = stream.query.shape[1]
    kept = list(range(num_prompt - 1))
    for end in range(num_prompt, num_tokens + 1):
        kept = [*kept, end - 1]
        weights = [stream.weights(end - 1, head, kept) for head in range(num_heads)]
        mean = {other: sum(by_head[other] for by_head in weights) / num_heads for other in kept}
        kept = sorted(sorted(kept, key=mean.get)[-budget:])
        yield [kept] * stream.key.shape[1]


def streaming_llm_keeps(stream, num_prompt, num_tokens, budget):
    """The same: the first four tokens and the newest."""
    for end in range(num_prompt, num_tokens + 1):
        yield [[0, 1, 2, 3, *range(end - budget + 4, end)]] * stream.key.shape[1]


RULES = {H2OCache: h2o_keeps, TOVACache: tova_keeps, StreamingLLMCache: streaming_llm_keeps}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("budget", [5, 8, 11])
def test_keeps_what_its_paper_says(baseline, budget, num_kv_heads):
    num_prompt, num_tokens = 16, 30
    stream = Stream(num_tokens, num_kv_heads=num_kv_heads, seed=budget)
    cache = baseline(budget=budget, dense_layers=0)
    stream.feed(cache, 0, num_prompt)
    for end, expected in enumerate(RULES[baseline](stream, num_prompt, num_tokens, budget), start=num_prompt):
        if end > num_prompt:
            stream.feed(cache, end - 1, end)
        layer = cache.layers[0]
        assert layer.positions[0].tolist() == expected
        index = layer.positions[..., None].expand_as(layer.keys)
        assert torch.equal(layer.keys, stream.key.gather(2, index))
        assert torch.equal(layer.values, stream.value.gather(2, index))


def test_attends_to_what_it_kept_and_the_new_token(baseline):
    stream, cache = Stream(31), baseline(budget=9, dense_layers=0)
    stream.feed(cache, 0, 30)
    kept = cache.layers[0].positions[0].tolist()
    output = stream.feed(cache, 30, 31)
    for head in range(4):
        weights = stream.weights(30, head, [*kept[head // 2], 30])
        expected = sum(weight * stream.value[0, head // 2, other] for other, weight in weights.items())
        torch.testing.assert_close(output[0, 0, head], expected)  # float32 sums of ten terms


def test_memory_falls_to_the_budget(model, baseline):
    cache = baseline(budget=BUDGET)
    generate(model, tokens(PROMPT), cache)
    for index, layer in enumerate(cache.layers):
        num_kept = PROMPT + ANSWER - 1 if index < cache.dense_layers else BUDGET
        for tensor in (layer.keys, layer.values):
            assert tensor.shape[2] == num_kept
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_length_and_positions_are_those_of_the_tokens_seen(model, baseline):
    cache, positions = baseline(budget=BUDGET), []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"][0, -1].item()), with_kwargs=True
    )
    try:
        generate(model, tokens(PROMPT), cache)
    finally:
        hook.remove()
    assert positions == list(range(PROMPT - 1, PROMPT + ANSWER - 1))
    assert cache.get_seq_length() == PROMPT + ANSWER - 1


def test_a_small_budget_changes_the_answer(model, baseline):
    dense = generate(model, tokens(PROMPT), DynamicCache())
    assert not torch.equal(generate(model, tokens(PROMPT), baseline(budget=BUDGET)), dense)


@pytest.mark.parametrize("options", [{"budget": EVERYTHING}, {"budget": BUDGET, "dense_layers": 4}], ids=str)
def test_what_evicts_nothing_is_dense(model, baseline, options):
    dense = generate(model, tokens(PROMPT), DynamicCache())
    assert torch.equal(generate(model, tokens(PROMPT), baseline(**options)), dense)


def test_greedy(model, baseline):
    expected = greedy(model, baseline(budget=BUDGET), tokens(PROMPT))
    assert torch.equal(generate(model, tokens(PROMPT), baseline(budget=BUDGET)), expected)


@pytest.mark.parametrize("chunk_size", [None, 64])
def test_left_padded_row_is_the_row_alone(model, baseline, chunk_size):
    lengths = (PROMPT, PROMPT - 64, 15, 1) if chunk_size else (PROMPT, PROMPT - 37, 15, 1)
    rows = [tokens(length, seed=length) for length in lengths]
    input_ids = torch.cat([torch.nn.functional.pad(row, (PROMPT - row.shape[1], 0)) for row in rows])
    attention_mask = (torch.arange(PROMPT) >= torch.tensor([PROMPT - row.shape[1] for row in rows])[:, None]).long()
    if chunk_size:  # the chunks of a row begin where they do in the batch
        rows, input_ids, attention_mask = rows[:2], input_ids[:2], attention_mask[:2]
    options = {"attention_mask": attention_mask, "prefill_chunk_size": chunk_size}
    output = generate(model, input_ids, baseline(budget=BUDGET), **options)
    for row, alone in zip(output, rows, strict=True):
        expected = generate(model, alone, baseline(budget=BUDGET), prefill_chunk_size=chunk_size)
        assert torch.equal(row[PROMPT:], expected[0, alone.shape[1] :])


def test_a_prompt_in_chunks_is_evicted_chunk_by_chunk(model, baseline):
    cache, most = baseline(budget=BUDGET), []
    hook = model.model.layers[3].register_forward_hook(lambda *_: most.append(cache.layers[3].keys.shape[2]))
    try:
        generate(model, tokens(PROMPT), cache, prefill_chunk_size=32)
    finally:
        hook.remove()
    assert set(most) == {BUDGET}


def test_sampling(model, baseline):
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 20, "num_return_sequences": 3}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output = generate(model, tokens(PROMPT), baseline(budget=BUDGET), **options)
    logits = torch.stack(output.logits, dim=1)
    for row, sequence in enumerate(output.sequences):
        expected = feed(model, baseline(budget=BUDGET), tokens(PROMPT), sequence[None, PROMPT:])
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)  # batched float32 sums


def test_beam_search(model, baseline):
    options = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    cache = baseline(budget=BUDGET)
    output = generate(model, tokens(PROMPT), cache, num_beams=4, num_return_sequences=4, **options)
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        answer = sequence[None, PROMPT:]
        log_probs = feed(model, baseline(budget=BUDGET), tokens(PROMPT), answer).log_softmax(dim=-1)
        expected = log_probs.gather(2, answer[..., None]).sum()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-3)  # a sum of 24 logits of batched float32 sums


def test_a_smaller_budget_evicts_at_once_as_if_it_had_been_so_from_the_start(model, baseline):
    prefilled, small = baseline(budget=EVERYTHING), baseline(budget=BUDGET)
    with torch.no_grad():
        model(tokens(PROMPT), past_key_values=prefilled)
        model(tokens(PROMPT), past_key_values=small)
    fork = copy.deepcopy(prefilled)
    fork.budget = BUDGET
    assert prefilled.layers[3].keys.shape[2] == PROMPT
    for layer, expected in zip(fork.layers, small.layers, strict=True):
        assert torch.equal(layer.positions, expected.positions)
        assert torch.equal(layer.keys, expected.keys)


def test_reset_serves_another_batch(model, baseline):
    cache = baseline(budget=BUDGET)
    generate(model, tokens(PROMPT), cache)
    cache.reset()
    prompts = tokens(PROMPT, seed=2, batch_size=2)
    assert torch.equal(generate(model, prompts, cache), generate(model, prompts, baseline(budget=BUDGET)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget of \w+Cache is a number of tokens, \d or more, not 0\."),
        ({"budget": 2.5}, r"budget of \w+Cache is a number of tokens, \d or more, not 2\.5\."),
        ({"dense_layers": -1}, r"dense_layers is a number of layers, 0 or more, not -1\."),
    ],
    ids=str,
)
def test_wrong_arguments(baseline, options, message):
    with pytest.raises(ValueError, match=message):
        baseline(**options)


def test_wrong_budget_later_changes_nothing(baseline):
    cache = baseline(budget=BUDGET)
    with pytest.raises(ValueError, match="not -1"):
        cache.budget = -1
    assert cache.budget == BUDGET


def test_another_attention_is_refused(baseline):
    model = make_model(attn_implementation="sdpa")
    with pytest.raises(QuestError, match=r"never reached Quest's attention"):
        model(tokens(PROMPT), past_key_values=baseline(budget=BUDGET))


def test_a_batch_of_another_size_is_refused(model, baseline):
    cache = baseline(budget=BUDGET)
    generate(model, tokens(PROMPT), cache)
    with pytest.raises(ValueError, match="The cache holds 1 rows and this batch has 2"):
        model(tokens(1, batch_size=2), past_key_values=cache)


def test_assisted_decoding_is_refused(model, baseline):
    with pytest.raises(QuestError, match="A cache that evicts cannot take tokens back"):
        generate(model, tokens(PROMPT), baseline(budget=BUDGET), prompt_lookup_num_tokens=4)
