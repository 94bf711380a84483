"""Every method passes one matrix: it serves all modes of `generate`, notices what goes wrong and undoes it. Those that
evict keep what their papers say."""

import copy
import functools
import io
import itertools
import math
import pickle

import pytest
import torch
from exact_top_k import ExactTopK
from small_llama import ANSWER, PROMPT, feed, generate, greedy, make_model, tokens
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_quest import (
    CACHE_NAME,
    CascadingCache,
    CritiPrefill,
    H2OCache,
    Method,
    MethodCache,
    QuestCache,
    QuestError,
    RecycledAttentionCache,
    SqueezedAttentionCache,
    StreamingLLMCache,
    SubGenCache,
    ThinKCache,
    TokenSelectCache,
    TOVACache,
)
from hf_quest.methods import H2O
from hf_quest.seam.attention import quest_attention

EVICTING = [H2OCache, TOVACache, StreamingLLMCache, CascadingCache]


def exact_top_k_cache(budget=2048, **options):
    """The example of a method of one's own."""
    return MethodCache(ExactTopK(budget), **options)


def quest_cache(budget=2048, **options):
    return QuestCache(budget, page_size=4, **options)


def codes_cache(budget=2048, **options):
    return QuestCache(budget, page_size=4, codes=2, candidates=2, **options)


def mass_cache(budget=2048, **options):
    return QuestCache(budget, page_size=4, codes=2, mass=0.5, **options)


def offloaded_cache(budget=2048, **options):
    return QuestCache(budget, page_size=4, codes=2, candidates=2, offloading=True, **options)


def recycled_cache(budget=2048, **options):
    return RecycledAttentionCache(budget, stride=10, similarity=None, **options)


def recycled_by_similarity_cache(budget=2048, **options):
    return RecycledAttentionCache(budget, stride=10, similarity=-0.1, **options)


def token_select_cache(budget=2048, **options):
    return TokenSelectCache(budget, num_newest=min(3, budget), similarity=-0.1, **options)


def squeezed_cache(budget=2048, **options):
    return SqueezedAttentionCache(budget, share=0.3, num_newest=3, **options)


def think_cache(budget=32, **options):
    return ThinKCache(budget, share=0.7, **options)


COMPRESSING = [think_cache, SubGenCache]
REMEMBERING = [squeezed_cache, recycled_cache, recycled_by_similarity_cache, token_select_cache]
QUESTS = [quest_cache, codes_cache, mass_cache, offloaded_cache]
METHODS = [*QUESTS, exact_top_k_cache, *REMEMBERING, *EVICTING, *COMPRESSING]
BUDGET = 20  # tokens, of a prompt of PROMPT
EVERYTHING = 10_000


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def dense(model):
    """What the model writes by itself."""
    return generate(model, tokens(PROMPT), DynamicCache())


@pytest.fixture(params=EVICTING, ids=lambda evicting: evicting.__name__)
def evicting(request):
    """A cache that keeps some tokens as they were."""
    return request.param


@pytest.fixture(params=[*EVICTING, *COMPRESSING], ids=lambda baseline: baseline.__name__)
def baseline(request):
    """Makes a cache of a method after which something is gone."""
    return request.param


@pytest.fixture(params=METHODS, ids=lambda method: method.__name__)
def method(request):
    """Makes a cache of a method: every one passes this matrix."""
    return request.param


READING = [method for method in METHODS if method not in EVICTING + COMPRESSING]


@pytest.fixture(params=READING, ids=lambda method: method.__name__)
def reading(request):
    """Makes a cache of a method that keeps everything and reads less."""
    return request.param


def small_budget(method):
    """Tokens that are too few: of the best ones BUDGET are enough."""
    return {
        exact_top_k_cache: 4,
        recycled_cache: 10,
        recycled_by_similarity_cache: 10,
        token_select_cache: 4,
        squeezed_cache: 4,
    }.get(method, BUDGET)


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


def cascading_keeps(stream, num_prompt, num_tokens, budget, num_cascades=4, num_first=64, decay=0.9999):
    """The same by sub-caches, each a list, oldest token first (arXiv 2406.17808, algorithm 1)."""
    num_groups, num_kv_heads = stream.module.num_key_value_groups, stream.key.shape[1]
    num_first = min(num_first, budget // 8)
    size, left_over = divmod(budget - num_first, num_cascades)
    sizes = [size + left_over] + [size] * (num_cascades - 1)
    first = [[] for _ in range(num_kv_heads)]
    cascades = [[[] for _ in sizes] for _ in range(num_kv_heads)]
    scores = [dict.fromkeys(range(num_tokens), 0.0) for _ in range(num_kv_heads)]
    for end in range(num_prompt, num_tokens + 1):
        new = range(num_prompt) if end == num_prompt else [end - 1]
        for group in range(num_kv_heads):
            kept = [*first[group], *itertools.chain(*reversed(cascades[group])), *new]
            for token in new:
                seen = [other for other in kept if other <= token]
                heads = range(group * num_groups, (group + 1) * num_groups)
                weights = [stream.weights(token, head, seen) for head in heads]
                for other in kept:
                    weight = max(by_head.get(other, 0.0) for by_head in weights)
                    scores[group][other] = decay * scores[group][other] + (1 - decay) * weight
            for token in new:
                if len(first[group]) < num_first:
                    first[group].append(token)
                else:
                    is_full = sum(map(len, cascades[group])) == sum(sizes)
                    pass_on(cascades[group], sizes, token, token - num_first, scores[group], is_full)
        yield [[*first[group], *itertools.chain(*reversed(cascades[group]))] for group in range(num_kv_heads)]


def pass_on(cascades, sizes, token, num_before, scores, is_full):
    """A new token to the first sub-cache, and what overflows to the next, which accepts every 2^i-th time."""
    for idx, (cascade, size) in enumerate(zip(cascades, sizes, strict=True)):
        if is_full and num_before % 2**idx:
            if scores[token] >= scores[cascade[-1]]:
                cascade[-1] = token
            return
        cascade.append(token)
        if len(cascade) <= size:
            return
        token = cascade.pop(0)


RULES = {
    H2OCache: h2o_keeps,
    TOVACache: tova_keeps,
    StreamingLLMCache: streaming_llm_keeps,
    CascadingCache: cascading_keeps,
}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("budget", [5, 8, 11])
def test_keeps_what_its_paper_says(evicting, budget, num_kv_heads):
    num_prompt, num_tokens = 16, 30
    stream = Stream(num_tokens, num_kv_heads=num_kv_heads, seed=budget)
    cache = evicting(budget=budget, dense_layers=0)
    stream.feed(cache, 0, num_prompt)
    for end, expected in enumerate(RULES[evicting](stream, num_prompt, num_tokens, budget), start=num_prompt):
        if end > num_prompt:
            stream.feed(cache, end - 1, end)
        layer = cache.layers[0]
        positions = layer.storage.positions
        assert positions[0].tolist() == expected
        index = positions[..., None].expand_as(layer.keys)
        assert torch.equal(layer.keys, stream.key.gather(2, index))
        assert torch.equal(layer.values, stream.value.gather(2, index))


@pytest.mark.parametrize("options", [(2, 0, 0.9), (3, 2, 0.5), (1, 4, 1.0), (5, 1, 0.9999)], ids=str)
@pytest.mark.parametrize("num_prompt", [3, 20, 70])
def test_sub_caches_pass_on_what_their_paper_says(options, num_prompt):
    budget, num_tokens, stream = 26, 130, Stream(130, seed=num_prompt)
    names = ("num_cascades", "num_first", "decay")
    cache = CascadingCache(budget, dense_layers=0, **dict(zip(names, options, strict=True)))
    expected = cascading_keeps(stream, num_prompt, num_tokens, budget, *options)
    for end in range(num_prompt, num_tokens + 1):
        stream.feed(cache, 0 if end == num_prompt else end - 1, end)
        assert cache.layers[0].storage.positions[0].tolist() == next(expected)


@pytest.mark.parametrize("num_cascades", [1, 2, 4])
def test_sub_caches_span_more_than_the_budget_and_hold_no_more(num_cascades):
    budget, num_tokens, stream = 32, 400, Stream(400, seed=num_cascades)
    cache = CascadingCache(budget, num_cascades=num_cascades, num_first=0, dense_layers=0)
    for end in range(1, num_tokens + 1):
        stream.feed(cache, end - 1, end)
        assert cache.layers[0].keys.shape[2] <= budget
    span = num_tokens - cache.layers[0].storage.positions.amin(dim=-1)
    expected = budget // num_cascades * (2**num_cascades - 1)
    assert ((span <= expected) & (span > expected - 2**num_cascades)).all()  # what comes next may be due at every level


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cascades": 0}, "num_cascades is an integer, 1 or more, not 0"),
        ({"num_first": -1}, "num_first is an integer, 0 or more, not -1"),
        ({"decay": 0}, "decay is a number above 0 and at most 1, not 0"),
        ({"budget": 8, "num_cascades": 8}, "budget of CascadingCache has 8 sub-caches of one token or more"),
    ],
    ids=str,
)
def test_wrong_sub_caches(options, message):
    with pytest.raises(ValueError, match=message):
        CascadingCache(**options)


def test_attends_to_what_it_kept_and_the_new_token(evicting):
    stream, cache = Stream(31), evicting(budget=9, dense_layers=0)
    stream.feed(cache, 0, 30)
    kept = cache.layers[0].storage.positions[0].tolist()
    output = stream.feed(cache, 30, 31)
    for head in range(4):
        weights = stream.weights(30, head, [*kept[head // 2], 30])
        expected = sum(weight * stream.value[0, head // 2, other] for other, weight in weights.items())
        torch.testing.assert_close(output[0, 0, head], expected)  # float32 sums of ten terms


def test_memory_falls_to_the_budget(model, evicting):
    cache = evicting(budget=BUDGET)
    generate(model, tokens(PROMPT), cache)
    for index, layer in enumerate(cache.layers):
        if index < cache.dense_layers:
            assert layer.num_read == PROMPT + ANSWER - 1
            continue
        for tensor in (layer.keys, layer.values):
            assert tensor.shape[2] == BUDGET
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_length_and_positions_are_those_of_the_tokens_seen(model, method):
    cache, positions = method(budget=BUDGET), []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"][0, -1].item()), with_kwargs=True
    )
    try:
        generate(model, tokens(PROMPT), cache)
    finally:
        hook.remove()
    assert positions == list(range(PROMPT - 1, PROMPT + ANSWER - 1))
    assert cache.get_seq_length() == PROMPT + ANSWER - 1


def test_a_small_budget_changes_the_answer(model, method, dense):
    assert not torch.equal(generate(model, tokens(PROMPT), method(budget=small_budget(method))), dense)


@pytest.mark.parametrize("options", [{"budget": EVERYTHING}, {"budget": BUDGET, "dense_layers": 4}], ids=str)
def test_what_evicts_nothing_is_dense(model, method, options, dense):
    assert torch.equal(generate(model, tokens(PROMPT), method(**options)), dense)


def test_greedy(model, method):
    expected = greedy(model, method(budget=BUDGET), tokens(PROMPT))
    assert torch.equal(generate(model, tokens(PROMPT), method(budget=BUDGET)), expected)


@pytest.mark.parametrize("chunk_size", [None, 64])
def test_left_padded_row_is_the_row_alone(model, method, chunk_size):
    lengths = (PROMPT, PROMPT - 64, 15, 1) if chunk_size else (PROMPT, PROMPT - 37, 15, 1)
    rows = [tokens(length, seed=length) for length in lengths]
    input_ids = torch.cat([torch.nn.functional.pad(row, (PROMPT - row.shape[1], 0)) for row in rows])
    attention_mask = (torch.arange(PROMPT) >= torch.tensor([PROMPT - row.shape[1] for row in rows])[:, None]).long()
    if chunk_size:  # the chunks of a row begin where they do in the batch
        rows, input_ids, attention_mask = rows[:2], input_ids[:2], attention_mask[:2]
    options = {"attention_mask": attention_mask, "prefill_chunk_size": chunk_size}
    output = generate(model, input_ids, method(budget=BUDGET), **options)
    for row, alone in zip(output, rows, strict=True):
        expected = generate(model, alone, method(budget=BUDGET), prefill_chunk_size=chunk_size)
        assert torch.equal(row[PROMPT:], expected[0, alone.shape[1] :])


def test_a_prompt_in_chunks_is_evicted_chunk_by_chunk(model, baseline):
    cache, most = baseline(budget=BUDGET), []
    hook = model.model.layers[3].register_forward_hook(lambda *_: most.append(cache.layers[3].keys.shape[2]))
    try:
        generate(model, tokens(PROMPT), cache, prefill_chunk_size=32)
    finally:
        hook.remove()
    assert set(most) == {BUDGET}


def test_sampling(model, method):
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 20, "num_return_sequences": 3}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output = generate(model, tokens(PROMPT), method(budget=BUDGET), **options)
    logits = torch.stack(output.logits, dim=1)
    for row, sequence in enumerate(output.sequences):
        expected = feed(model, method(budget=BUDGET), tokens(PROMPT), sequence[None, PROMPT:])
        # Batched float32 sums. SubGen's outputs are no averages of values, and as rounding some times as large.
        tolerance = 1e-3 if method is SubGenCache else 1e-4
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=tolerance, atol=tolerance)


def test_beam_search(model, method):
    options = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    cache = method(budget=BUDGET)
    output = generate(model, tokens(PROMPT), cache, num_beams=4, num_return_sequences=4, **options)
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        answer = sequence[None, PROMPT:]
        log_probs = feed(model, method(budget=BUDGET), tokens(PROMPT), answer).log_softmax(dim=-1)
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
        assert torch.equal(layer.keys[:, :, : layer.num_read], expected.keys[:, :, : layer.num_read])
        if layer.evicts:
            assert torch.equal(layer.storage.positions, expected.storage.positions)


def test_reset_serves_another_batch(model, method):
    cache = method(budget=BUDGET)
    generate(model, tokens(PROMPT), cache)
    cache.reset()
    prompts = tokens(PROMPT, seed=2, batch_size=2)
    assert torch.equal(generate(model, prompts, cache), generate(model, prompts, method(budget=BUDGET)))


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


def test_wrong_budget_later_changes_nothing(method):
    cache = method(budget=BUDGET)
    with pytest.raises(ValueError, match="-1"):
        cache.budget = -1
    assert cache.budget == BUDGET


@torch.no_grad()
def forward(model, cache, ids, mask=None):
    """Logits of `ids`, each at the position that its row's tokens so far give it."""
    options = {CACHE_NAME: cache}
    if mask is not None:
        options["attention_mask"] = mask
        options["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, **options).logits


def read(model, cache, num_steps=4):
    """`cache` after a prompt of PROMPT and `num_steps` further tokens."""
    forward(model, cache, tokens(PROMPT))
    for step in range(num_steps):
        forward(model, cache, tokens(1, seed=step))
    return cache


@pytest.fixture(scope="module")
def undisturbed(model):
    """Of a method what `read` leaves, only to compare with, and the logits of `num_new` tokens after that."""

    @functools.cache
    def as_read(method):
        return read(model, method(budget=BUDGET))

    @functools.cache
    def logits_of(method, num_new):
        return forward(model, read(model, method(budget=BUDGET)), tokens(num_new, seed=9)) if num_new else None

    return lambda method, num_new=0: (as_read(method), logits_of(method, num_new))


def assert_same_state(cache, other):
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        assert layer.length == expected.length
        for tensor, other in zip(stored_in(layer), stored_in(expected), strict=True):
            assert torch.equal(tensor, other)


def stored_in(layer):
    """All tensors of its storage, as far as they are filled, and what is remembered."""
    if layer.evicts:
        return list(layer.storage.tensors().values())
    memories = layer.storage.memories.by_reader
    return [*layer.up_to_date().filled(), *(each for memory in memories for each in memory.recall(math.inf).values())]


class Interrupted(Exception):
    pass


def interrupted(model, cache, ids, call):
    """A forward that does not come through its `call`-th call of an attention, an MLP or a linear map."""
    calls = []

    def interrupt(module, *_):
        calls.append(module)
        if len(calls) == call:
            raise Interrupted

    inner = [module for name, module in model.named_modules() if name.endswith(("self_attn", "mlp", "proj"))]
    hooks = [module.register_forward_hook(interrupt) for module in inner]
    try:
        forward(model, cache, ids)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("num_new", [1, 30])
@pytest.mark.parametrize("call", [4, 5, 11, 16, 28, 31, 32])
def test_a_forward_that_was_interrupted_is_noticed_and_undone(model, method, call, num_new, undisturbed):
    cache, ids = read(model, method(budget=BUDGET)), tokens(num_new, seed=9)
    with pytest.raises(Interrupted):
        interrupted(model, cache, ids, call)
    if len({layer.length for layer in cache.layers}) > 1:  # else the first layer had not begun or the last had ended
        with pytest.raises(QuestError, match=f"put back to the {PROMPT + 4} tokens before; repeat the call"):
            forward(model, cache, ids)
    else:
        assert call == 4 or call > 30
    if call <= 30:
        expected, logits = undisturbed(method, num_new)
        assert_same_state(cache, expected)
        assert torch.equal(forward(model, cache, ids), logits)


@pytest.mark.parametrize(
    ("method", "layer_idx"), [("update", 0), *itertools.product(["update", "see", "evict"], [2, 3])]
)
def test_memory_that_ran_out_in_a_layer_is_noticed_and_undone(
    model, baseline, method, layer_idx, monkeypatch, undisturbed
):
    cache, ids = read(model, baseline(budget=BUDGET)), tokens(5, seed=9)

    def run_out(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(cache.layers[layer_idx], method, run_out)
    with pytest.raises(MemoryError):
        forward(model, cache, ids)
    monkeypatch.undo()
    if (method, layer_idx) != ("update", 0):
        with pytest.raises(QuestError, match="repeat the call"):
            forward(model, cache, ids)
    expected, logits = undisturbed(baseline, 5)
    assert_same_state(cache, expected)
    assert torch.equal(forward(model, cache, ids), logits)


def test_a_first_forward_that_was_interrupted_leaves_a_cache_that_says_so_until_reset(model, method, undisturbed):
    cache = method(budget=BUDGET)
    with pytest.raises(Interrupted):
        interrupted(model, cache, tokens(PROMPT), 11)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"its first forward was interrupted.*call cache\.reset\(\)"):
            forward(model, cache, tokens(3))
    cache.reset()
    assert_same_state(read(model, cache), undisturbed(method)[0])


def test_rows_chosen_after_an_interrupted_forward_do_not_hide_it(model, baseline):
    """Layers that keep everything can take a token back whatever the rows, those that evict cannot."""
    for call, after in ((11, "put back to the 154 tokens"), (29, "cannot be used on")):
        cache = read(model, baseline(budget=BUDGET))
        with pytest.raises(Interrupted):
            interrupted(model, cache, tokens(1), call)
        cache.batch_repeat_interleave(2)
        with pytest.raises(QuestError, match=after):
            forward(model, cache, tokens(1, batch_size=2))
    with pytest.raises(QuestError, match="cannot be used on"):
        forward(model, cache, tokens(1, batch_size=2))


def test_a_cache_holds_nothing_beside_its_tokens_between_forwards(model, baseline):
    cache = read(model, baseline(budget=BUDGET))
    assert cache.shared.to_settle == []
    assert all(layer.storage.before is None for layer in cache.layers if layer.evicts)


def test_a_model_with_fewer_layers_is_noticed_and_undone(model, method, undisturbed):
    cache, other = read(model, method(budget=BUDGET)), make_model(num_hidden_layers=3)
    forward(other, cache, tokens(1))
    with pytest.raises(QuestError, match=r"its model has fewer layers.*put back to the 154 tokens"):
        forward(model, cache, tokens(1))
    assert_same_state(cache, undisturbed(method)[0])


def test_a_model_with_more_layers_is_refused(model, method, undisturbed):
    cache = read(model, method(budget=BUDGET))
    other = make_model(num_hidden_layers=5)
    if method in READING:
        with pytest.raises(ValueError, match=r"this model has more.*content of this one is unchanged"):
            forward(other, cache, tokens(1))
        assert_same_state(cache, undisturbed(method)[0])
        return
    for each in (other, model):
        with pytest.raises((ValueError, QuestError), match="cannot be used on"):
            forward(each, cache, tokens(1))


@pytest.mark.parametrize("options", [{"num_key_value_heads": 4}, {"head_dim": 32}], ids=str)
def test_a_model_of_another_shape_is_refused_and_changes_nothing(model, method, options, undisturbed):
    cache = read(model, method(budget=BUDGET))
    with pytest.raises(ValueError, match="it is another model's cache"):
        forward(make_model(**options), cache, tokens(1))
    assert_same_state(cache, undisturbed(method)[0])


def test_another_attention_is_refused_and_changes_nothing(model, method, undisturbed):
    other, empty, cache = make_model(attn_implementation="sdpa"), method(), read(model, method(budget=BUDGET))
    with pytest.raises(QuestError, match=r"never reached Quest's attention.*put back to the 0 tokens"):
        forward(other, empty, tokens(PROMPT))
    with pytest.raises(QuestError, match=r"never reached Quest's attention.*put back to the 154 tokens"):
        forward(other, cache, tokens(1))
    assert_same_state(cache, undisturbed(method)[0])


def test_a_batch_of_another_size_is_refused(model, method):
    cache = method(budget=BUDGET)
    generate(model, tokens(PROMPT), cache)
    with pytest.raises(ValueError, match="The cache holds 1 rows and this batch has 2"):
        forward(model, cache, tokens(1, batch_size=2))


@pytest.mark.parametrize("act", [lambda cache: cache.crop(-1), lambda cache: cache.activate_past_recording()])
def test_tokens_cannot_be_taken_back(model, baseline, act, undisturbed):
    cache = read(model, baseline(budget=BUDGET))
    with pytest.raises(QuestError, match="A cache that evicts cannot take tokens back"):
        act(cache)
    cache.crop(0)
    assert_same_state(cache, undisturbed(baseline)[0])


def test_assisted_decoding_is_refused(model, baseline):
    with pytest.raises(QuestError, match="A cache that evicts cannot take tokens back"):
        generate(model, tokens(PROMPT), baseline(budget=BUDGET), prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("kept", [-9, 0, 1, 10, 13])
def test_tokens_that_were_taken_back_leave_no_trace(model, reading, kept):
    """Of `kept` steps after the prompt, or of -kept tokens less than that; what was chosen since is forgotten."""
    cache, expected = read(model, reading(budget=BUDGET), 15), reading(budget=BUDGET)
    cache.crop(kept - 15)
    if kept < 0:
        forward(model, expected, tokens(PROMPT)[:, :kept])
    else:
        read(model, expected, kept)
    for step in range(12):
        ids = tokens(1, seed=50 + step)
        logits = forward(model, expected, ids)
        torch.testing.assert_close(forward(model, cache, ids), logits, rtol=1e-4, atol=1e-4)  # prompts of other lengths


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": make_model(seed=1)}])
def test_assisted_decoding_writes_what_greedy_decoding_writes(model, reading, options):
    prompt = tokens(PROMPT // 2).repeat(1, 2)  # in which the next tokens can be looked up
    expected = generate(model, prompt, reading(budget=BUDGET))
    assert torch.equal(generate(model, prompt, reading(budget=BUDGET), **options), expected)


HIDDEN = {  # of the newest token, by step
    "part of the document": lambda step, mask: mask.index_fill(1, torch.arange(20, 60), 0) if step == 1 else mask,
    "a window of its own": lambda step, mask: mask.index_fill(1, torch.arange(0, 40 + step), 0),
    "itself": lambda step, mask: mask.index_fill(1, torch.tensor([mask.shape[1] - 1]), 0) if step == 2 else mask,
}


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("padding", [0, 7])
def test_the_mask_of_a_single_token_is_obeyed(model, method, hide, padding):
    caches = [method(budget=EVERYTHING), DynamicCache()]
    mask = (torch.arange(PROMPT) >= torch.tensor([[padding], [0]])).long()
    for cache in caches:
        forward(model, cache, tokens(PROMPT, batch_size=2), mask)
    for step in range(4):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        logits, expected = (forward(model, cache, tokens(1, step, 2), hide(step, mask)) for cache in caches)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("pauses", ["0011010", "1110001", "0000000"])
@pytest.mark.parametrize("padding", [0, 37])
def test_a_row_that_pauses_is_the_row_alone(model, baseline, pauses, padding):
    """The mask hides the slots in which the batch has a token for other rows."""
    batch, alone = baseline(budget=BUDGET), baseline(budget=BUDGET)
    ids, mask = tokens(PROMPT, batch_size=2), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :padding] = 0
    forward(model, batch, ids, mask)
    forward(model, alone, ids[1:, padding:])
    for step, runs in enumerate(map(int, pauses + "11")):
        new = tokens(1, seed=step, batch_size=2)
        mask = torch.cat([mask, torch.tensor([[1], [runs]])], dim=1)
        logits = forward(model, batch, new, mask)[1:]
        if runs:
            torch.testing.assert_close(logits, forward(model, alone, new[1:]), rtol=1e-4, atol=1e-4)  # float32 sums


@pytest.mark.parametrize("padding", [7, BUDGET + 9])
def test_a_row_that_has_no_token_yet_while_others_are_fed_one_by_one_is_the_row_alone(model, baseline, padding):
    batch, alone = baseline(budget=BUDGET), baseline(budget=BUDGET)
    ids, mask = tokens(2 * BUDGET, batch_size=2), torch.ones(2, 2 * BUDGET, dtype=torch.long)
    mask[1, :padding] = 0
    for slot in range(2 * BUDGET):
        logits = forward(model, batch, ids[:, slot : slot + 1], mask[:, : slot + 1])[1:]
        if slot >= padding:
            expected = forward(model, alone, ids[1:, slot : slot + 1])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32 sums


@pytest.mark.parametrize("shown", [1, 13, 30])
def test_a_row_whose_prompt_ends_in_padding_is_the_row_alone(model, baseline, shown):
    """A second prompt of 30 tokens, of which one row has fewer."""
    batch, alone = (read(model, baseline(budget=BUDGET)) for _ in range(2))
    batch.batch_repeat_interleave(2)
    ids, new = tokens(30, seed=7, batch_size=2), tokens(1, seed=8, batch_size=2)
    mask = torch.ones(2, PROMPT + 4 + 30, dtype=torch.long)
    mask[1, PROMPT + 4 + shown :] = 0
    logits = forward(model, batch, ids, mask)[1:, :shown]
    torch.testing.assert_close(logits, forward(model, alone, ids[1:, :shown]), rtol=1e-4, atol=1e-4)  # float32 sums
    logits = forward(model, batch, new, torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1))[1:]
    torch.testing.assert_close(logits, forward(model, alone, new[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [3, 9])
def test_what_is_hidden_for_a_step_outlives_padding_and_goes_in_the_order_of_the_row_alone(model, baseline, padding):
    """While fewer tokens than the budget are visible, some that are hidden stay."""
    batch, alone = baseline(budget=BUDGET, dense_layers=0), baseline(budget=BUDGET, dense_layers=0)
    ids, mask = tokens(BUDGET, batch_size=2), torch.ones(2, BUDGET, dtype=torch.long)
    mask[1, :padding] = 0
    forward(model, batch, ids, mask)
    forward(model, alone, ids[1:, padding:])
    for step in range(padding + 8):
        new, mask = tokens(1, seed=step, batch_size=2), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        shown = mask.clone()
        shown[:, padding : padding + 6] = step % 2
        logits = forward(model, batch, new, shown)[1:]
        expected = forward(model, alone, new[1:], shown[1:, padding:])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32 sums of a batch


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def saved(cache):
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_goes_on_as_the_original(model, method, copied):
    cache = read(model, method(budget=BUDGET))
    copied_cache = copied(cache)
    logits = forward(model, copied_cache, tokens(9, seed=5))
    assert torch.equal(logits, forward(model, cache, tokens(9, seed=5)))
    assert_same_state(copied_cache, cache)


def test_rows_that_were_reordered_repeated_and_selected_go_on_as_they_would_alone(model, method):
    prompts = tokens(PROMPT, batch_size=3)
    cache, alone = method(budget=BUDGET), [method(budget=BUDGET) for _ in range(3)]
    forward(model, cache, prompts)
    for row, other in enumerate(alone):
        forward(model, other, prompts[row : row + 1])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)  # 2 2 0 0 0 0
    cache.batch_select_indices(torch.tensor([True, False, False, True, False, True]))
    cache.batch_select_indices(torch.tensor([1, 0]))
    logits = forward(model, cache, tokens(1, batch_size=2))
    for row, source in enumerate([0, 2]):
        expected = forward(model, alone[source], tokens(1, batch_size=2)[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)  # float32 sums of a batch


@pytest.mark.parametrize("act", ["reset", "reorder_cache", "batch_repeat_interleave", "deepcopy", "step", "budget"])
def test_what_inference_mode_made_serves_outside_of_it(model, method, act):
    cache, expected = method(budget=BUDGET), read(model, method(budget=BUDGET))
    with torch.inference_mode():
        read(model, cache)
    for each in (cache, expected):
        if act == "reset":
            each.reset()
        elif act == "reorder_cache":
            each.reorder_cache(torch.tensor([0]))
        elif act == "batch_repeat_interleave":
            each.batch_repeat_interleave(1)
        elif act == "budget":
            each.budget = BUDGET // 2
    cache = copy.deepcopy(cache) if act == "deepcopy" else cache
    assert torch.equal(forward(model, cache, tokens(1, seed=9)), forward(model, expected, tokens(1, seed=9)))
    model(tokens(1, seed=10), **{CACHE_NAME: cache}).logits.sum().backward()  # with gradients
    forward(model, expected, tokens(1, seed=10))
    assert_same_state(cache, expected)
    model.zero_grad()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompt", ["read inside", "read outside"])
def test_autocast(method, weights, prompt):
    model, logits = make_model(dtype=weights), []
    for cache in (method(budget=EVERYTHING), method(budget=small_budget(method)), DynamicCache()):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=prompt == "read inside"):
            forward(model, cache, tokens(PROMPT))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits.append(torch.cat([forward(model, cache, tokens(count, seed=count)) for count in (1, 7, 1)], dim=1))
    everything, few, expected = logits
    scale = expected.abs().max().item()
    # bfloat16 rounds by 2^-8; SDPA of grouped heads rounds in another order than of repeated ones, in four layers.
    torch.testing.assert_close(everything, expected, rtol=0, atol=2**-4 * scale)
    assert (few - expected).abs().max() > 2**-4 * scale


def test_gradients_are_those_of_a_stock_cache(baseline):
    """In the forward that brings keys and values they get theirs; what is stored has none."""
    model, gradients = make_model().train(), []
    for cache in (baseline(budget=EVERYTHING), DynamicCache()):
        forward(model, cache, tokens(PROMPT))  # without gradients
        for ids in (tokens(30, seed=3), tokens(1, seed=4)):
            model.zero_grad()
            model(ids, **{CACHE_NAME: cache}).logits.square().mean().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
            if isinstance(cache, DynamicCache):  # which keeps the graph, of which nothing is left now
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    for found, expected in zip(gradients[:2], gradients[2:], strict=True):
        assert all(gradient.abs().max() > 0 for gradient in expected[1:])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)  # float32 sums in another order


def test_a_cache_that_trained_can_be_copied_and_goes_on(model, method):
    cache = method(budget=BUDGET)
    model(tokens(PROMPT), **{CACHE_NAME: cache})
    expected = method(budget=BUDGET)
    forward(model, expected, tokens(PROMPT))
    assert_same_state(copy.deepcopy(cache), expected)


def test_offloaded_layers_come_back(model, method):
    cache, expected = (read(model, method(budget=BUDGET)) for _ in range(2))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_same_state(cache, expected)
    method().reset()


def test_a_cache_filled_by_hand_is_one_that_a_model_filled(model, baseline):
    source, by_model = DynamicCache(), baseline(budget=EVERYTHING)
    for cache in (source, by_model):
        forward(model, cache, tokens(PROMPT))
    by_hand, small = baseline(budget=EVERYTHING), baseline(budget=BUDGET)
    for cache in (by_hand, small):
        for layer_idx, layer in enumerate(source.layers):  # in two pieces
            cache.update(layer.keys[:, :, :90], layer.values[:, :, :90], layer_idx)
            cache.update(layer.keys[:, :, 90:], layer.values[:, :, 90:], layer_idx)
    small.budget = BUDGET  # nothing is known to evict by
    assert small.layers[3].keys.shape[2] == PROMPT
    expected = forward(model, by_model, tokens(1, seed=2))
    for cache in (by_hand, small):
        assert torch.equal(forward(model, cache, tokens(1, seed=2)), expected)
    assert small.layers[3].keys.shape[2] == BUDGET


def test_a_cache_filled_by_hand_in_some_layers_is_refused(model, baseline):
    cache = baseline()
    for layer_idx, num_tokens in enumerate([5, 5, 4, 5]):
        cache.update(*torch.zeros(2, 1, 2, num_tokens, 16), layer_idx)
    with pytest.raises(QuestError, match=r"filled 3 of this cache's 4 layers.*cannot be used on"):
        forward(model, cache, tokens(1))


def test_it_is_never_compiled_whoever_asks(baseline):
    asked = {"baseline": baseline}
    exec("answer = baseline().is_compileable", asked)
    assert asked["answer"] is False


BART = {"encoder_layers": 1, "decoder_layers": 4, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.25, "bos_token_id": None}
BART |= {"forced_eos_token_id": None, "max_position_embeddings": 512}
T5 = {"d_kv": 16, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 4, "num_heads": 2, "dropout_rate": 0.0}
ENCODER_DECODERS = {
    "bart": (BartForConditionalGeneration, BartConfig, BART),
    "t5": (T5ForConditionalGeneration, T5Config, T5),
}


@pytest.fixture(params=ENCODER_DECODERS)
def translator(request):
    """An encoder-decoder with attention by Quest and by SDPA, of the same weights."""
    model_class, config_class, options = ENCODER_DECODERS[request.param]
    size = {"vocab_size": 64, "d_model": 32, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
    models = []
    for attention in ("quest", "sdpa"):
        torch.manual_seed(0)
        models.append(model_class(config_class(**size, **options, attn_implementation=attention)).eval())
    return models


@torch.no_grad()
def translate(model, cache):
    source = tokens(20) % 64
    target = [tokens(count, seed=count) % 64 for count in (30, 1, 1, 5, 1)]
    encoded = model.get_encoder()(source)
    return [model(encoder_outputs=encoded, decoder_input_ids=ids, **{CACHE_NAME: cache}).logits for ids in target]


def test_an_encoder_decoder_takes_it_for_self_attention(translator, method):
    quest, stock = translator
    dense = translate(stock, EncoderDecoderCache(DynamicCache(), DynamicCache()))
    everything = translate(quest, EncoderDecoderCache(method(budget=EVERYTHING), DynamicCache()))
    torch.testing.assert_close(everything, dense, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    few = translate(quest, EncoderDecoderCache(method(budget=small_budget(method)), DynamicCache()))
    has_bias = quest.config.model_type == "t5"  # by which nobody chooses
    assert (few[-1] - dense[-1]).abs().max() > 1e-2 or (has_bias and method in READING)


def test_a_position_bias_of_what_was_kept_is_refused(evicting):
    """T5 makes it in layer 0, of as many positions as that hands on."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "d_model": 32, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
    model = T5ForConditionalGeneration(T5Config(**size, **T5, attn_implementation="quest")).eval()
    with pytest.raises(QuestError, match="would hide others than it means"):
        translate(model, EncoderDecoderCache(evicting(budget=BUDGET, dense_layers=0), DynamicCache()))


def test_an_encoder_decoder_cannot_take_it_for_cross_attention(translator, method):
    quest, _ = translator
    for cache in (
        EncoderDecoderCache(DynamicCache(), method()),
        EncoderDecoderCache(method(), method()),
        method(),
    ):
        with pytest.raises(
            QuestError, match=r"cross-attention.*EncoderDecoderCache\(\w+Cache\(\.\.\.\), DynamicCache\(\)\)"
        ):
            translate(quest, cache)


class Taken(Method):
    """Calls what it remembers as the kernels call theirs."""

    def beside_tokens(self, head_dim, dtype):
        return {"bounds": ((), torch.float32)}

    def choose(self, pages, query, logits, length):
        return None


def test_what_a_method_keeps_is_its_own_whatever_its_name(model):
    """The kernels know bounds and scales by name, and only those of the method that they are part of."""
    cache = MethodCache(Taken(budget=BUDGET))
    forward(model, cache, tokens(PROMPT))
    assert all(layer.storage.known_to_kernels == [None, None, None] for layer in cache.layers)
    quest = quest_cache(budget=BUDGET)
    forward(model, quest, tokens(PROMPT))
    assert [layer.storage.known_to_kernels[0] is not None for layer in quest.layers] == [False, False, True, True]


@pytest.mark.parametrize("at", range(4))
def test_memory_that_ran_out_while_storage_grew_leaves_what_there_was(model, method, at, monkeypatch, undisturbed):
    """Of a layer's tensors that are allocated anew, the first, the second ... cannot be had."""
    cache, ids = read(model, method(budget=BUDGET)), tokens(400, seed=9)
    layer = cache.layers[2]
    if layer.evicts:
        pytest.skip("its storage grows by what arrives, see test_memory_that_ran_out_in_a_layer")
    allocate, calls = torch.Tensor.new_empty, []

    def run_out(tensor, *args, **kwargs):
        calls.append(args)
        if len(calls) == at + 1:
            raise MemoryError
        return allocate(tensor, *args, **kwargs)

    grow = layer.storage.allocate

    def grow_until(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", run_out)
            grow(*args)

    monkeypatch.setattr(layer.storage, "allocate", grow_until)
    try:
        forward(model, cache, ids)
    except MemoryError:
        monkeypatch.undo()
        with pytest.raises(QuestError, match="repeat the call"):
            forward(model, cache, ids)
    else:
        monkeypatch.undo()
        assert len(calls) <= at
        return
    expected, logits = undisturbed(method, 400)
    assert_same_state(cache, expected)
    assert torch.equal(forward(model, cache, ids), logits)


def test_a_prompt_is_not_read_sparsely_where_its_weights_are_needed():
    with pytest.raises(ValueError, match="Leave prefill out"):
        MethodCache(H2O(BUDGET), prefill=CritiPrefill())
