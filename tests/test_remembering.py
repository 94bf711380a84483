"""Methods that remember what they chose: they choose what their papers say, never by a memory that is not theirs."""

import copy
import math

import pytest
import torch
from small_llama import PROMPT, generate, make_model, tokens
from test_methods import Interrupted, Stream, assert_same_state, forward, interrupted, read

from hf_quest import QuestError, RecycledAttentionCache, SqueezedAttentionCache, TokenSelectCache
from hf_quest.seam.attention import quest_attention

NUM_PROMPT, NUM_TOKENS = 20, 50


@pytest.fixture(scope="module")
def model():
    return make_model()


def cosines(stream, token, other):
    """Cosine of the queries of two tokens, mean over the heads, by the formula."""
    total = 0.0
    for head in stream.query[0].double().tolist():
        one, two = head[token], head[other]
        product = sum(a * b for a, b in zip(one, two, strict=True))
        total += product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in two))
    return total / stream.query.shape[1]


def highest(scores, num_kept):
    """The keys of the highest values, of equal ones the first."""
    return set(sorted(scores, key=lambda token: (-scores[token], token))[:num_kept])


def recycled_reads(stream, budget, stride, similarity):
    """By token, the tokens that each KV head attends (arXiv 2411.05787), in Python's 64 bits: all in a full step, then
    its best and those since.
    """
    num_heads, num_kv_heads = stream.query.shape[1], stream.key.shape[1]
    group, full, best = num_heads // num_kv_heads, None, None
    for token in range(NUM_PROMPT, NUM_TOKENS):
        everything = range(token + 1)
        if len(everything) <= budget:
            yield [set(everything)] * num_kv_heads
            continue
        is_full = full is None or token - full >= stride
        is_full = is_full or (similarity is not None and cosines(stream, token, full) < similarity)
        if not is_full:
            yield [best[head] | set(range(full + 1, token + 1)) for head in range(num_kv_heads)]
            continue
        full, best = token, []
        for kv_head in range(num_kv_heads):
            weights = [
                stream.weights(token, head, everything) for head in range(kv_head * group, (kv_head + 1) * group)
            ]
            scores = {other: max(by_head[other] for by_head in weights) for other in everything}
            best.append(highest(scores, budget - stride + 1))
        yield [set(everything)] * num_kv_heads


def token_select_reads(stream, budget, num_first, num_newest, similarity):
    """The same (arXiv 2411.02886): the first, the newest, and by votes of all heads those between."""
    num_heads, num_kv_heads = stream.query.shape[1], stream.key.shape[1]
    selected_at, voted = None, None
    for token in range(NUM_PROMPT, NUM_TOKENS):
        everything = range(token + 1)
        if len(everything) <= budget:
            yield [set(everything)] * num_kv_heads
            continue
        is_reused = similarity is not None and selected_at is not None and token - selected_at <= num_newest
        if not is_reused or cosines(stream, token, selected_at) < similarity:
            weights = [stream.weights(token, head, everything) for head in range(num_heads)]
            between = range(num_first, token + 1 - num_newest)
            votes = {other: sum(by_head[other] for by_head in weights) for other in between}
            selected_at, voted = token, highest(votes, budget - num_first - num_newest)
        yield [voted | set(range(num_first)) | set(range(token + 1 - num_newest, token + 1))] * num_kv_heads


def clusters_of(keys, num_clusters, seed):
    """Sets of tokens by k-means of their keys' directions, lists of numbers; some may be empty."""
    points = [[x / math.sqrt(sum(y * y for y in key)) for x in key] for key in keys]
    start = sorted(torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))[:num_clusters].tolist())
    centres, before = [points[token] for token in start], None
    while True:
        distances = [[math.dist(point, centre) for centre in centres] for point in points]
        clusters = [set() for _ in centres]
        for token, to_centres in enumerate(distances):
            clusters[to_centres.index(min(to_centres))].add(token)
        if clusters == before:
            return clusters
        means = [mean([points[token] for token in members]) for members in clusters]
        centres, before = [new or old for new, old in zip(means, centres, strict=True)], clusters


def mean(keys):
    return [sum(column) / len(keys) for column in zip(*keys, strict=True)]


def shares_of(query, clusters, keys):
    """By cluster, the share of attention of one of its tokens if all keys were the centroids of their clusters."""
    weights = {}
    for idx, members in enumerate(clusters):
        if members:
            centroid = mean([keys[member] for member in members])
            product = sum(q * k for q, k in zip(query, centroid, strict=True))
            weights[idx] = math.exp(product / math.sqrt(len(centroid)))
    total = sum(weight * len(clusters[idx]) for idx, weight in weights.items())
    return {idx: weight / total for idx, weight in weights.items()}


def squeezed_reads(stream, budget, share, num_newest, seed):
    """The same (arXiv 2411.09688): the best clusters of all heads together, and all tokens after the prefix."""
    keys, queries = stream.key[0].tolist(), stream.query[0].tolist()
    num_kv_heads, group, prefix, clusters = len(keys), len(queries) // len(keys), 0, None
    for token in range(NUM_PROMPT, NUM_TOKENS):
        length = token + 1
        if length <= budget:
            yield [set(range(length))] * num_kv_heads
            continue
        if length - prefix > 3 * budget // 4:
            prefix = length - max(1, min(num_newest, budget // 2))
            num_clusters = math.ceil(share * prefix)
            clusters = [clusters_of(keys[head][:prefix], num_clusters, seed) for head in range(num_kv_heads)]
        shares = {}
        for head, query in enumerate(queries):
            kv_head = head // group
            for idx, score in shares_of(query[token], clusters[kv_head], keys[kv_head]).items():
                shares[kv_head, idx] = max(shares.get((kv_head, idx), 0.0), score)
        read, room = [set(range(prefix, length)) for _ in keys], num_kv_heads * (budget - length + prefix)
        for kv_head, idx in sorted(shares, key=shares.get, reverse=True):
            room -= len(clusters[kv_head][idx])
            if room < 0:
                break
            read[kv_head] |= clusters[kv_head][idx]
        yield read


RULES = {
    "clusters": (SqueezedAttentionCache, squeezed_reads, {"share": 0.3, "num_newest": 3, "seed": 0}),
    "few clusters": (SqueezedAttentionCache, squeezed_reads, {"share": 0.1, "num_newest": 9, "seed": 1}),
    "clusters of one": (SqueezedAttentionCache, squeezed_reads, {"share": 1.0, "num_newest": 1, "seed": 2}),
    "every stride tokens": (RecycledAttentionCache, recycled_reads, {"stride": 6, "similarity": None}),
    "always full": (RecycledAttentionCache, recycled_reads, {"stride": 1, "similarity": None}),
    "when the query has moved": (RecycledAttentionCache, recycled_reads, {"stride": 9, "similarity": -0.05}),
    "votes": (TokenSelectCache, token_select_reads, {"num_first": 2, "num_newest": 3, "similarity": None}),
    "votes, reused": (TokenSelectCache, token_select_reads, {"num_first": 1, "num_newest": 4, "similarity": -0.05}),
    "votes only": (TokenSelectCache, token_select_reads, {"num_first": 0, "num_newest": 1, "similarity": 0.9}),
    "no votes": (TokenSelectCache, token_select_reads, {"num_first": 4, "num_newest": 7, "similarity": -0.05}),
}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("budget", [11, 25])
@pytest.mark.parametrize(("kind", "rule", "options"), RULES.values(), ids=RULES)
def test_reads_what_its_paper_says(kind, rule, options, budget, num_kv_heads):
    stream = Stream(NUM_TOKENS, num_kv_heads=num_kv_heads, seed=budget)
    cache, found = kind(budget, dense_layers=0, **options), []
    stream.feed(cache, 0, NUM_PROMPT)
    cache.watcher = lambda read: found.append(read.tokens()[0])
    for token, expected in enumerate(rule(stream, budget, **options), start=NUM_PROMPT):
        output = stream.feed(cache, token, token + 1)
        assert [set(row.nonzero()[:, 0].tolist()) for row in found[-1]] == expected
        for head in range(4):
            kv_head = head // stream.module.num_key_value_groups
            weights = stream.weights(token, head, expected[kv_head])
            wanted = sum(weight * stream.value[0, kv_head, other] for other, weight in weights.items())
            torch.testing.assert_close(output[0, 0, head], wanted)  # float32 sums of up to fifty terms
    assert len(found) == NUM_TOKENS - NUM_PROMPT


REMEMBERING = {
    "recycled": lambda budget=20: RecycledAttentionCache(budget, stride=3, similarity=None),
    "recycled by similarity": lambda budget=20: RecycledAttentionCache(budget, stride=12, similarity=0.0),
    "token select": lambda budget=20: TokenSelectCache(budget, similarity=0.0),
    "squeezed": lambda budget=20: SqueezedAttentionCache(budget, share=0.3, num_newest=14),
}


@pytest.fixture(params=REMEMBERING.values(), ids=REMEMBERING)
def remembering(request):
    return request.param


@pytest.mark.parametrize("num_steps", range(5))
@pytest.mark.parametrize("call", [11, 16, 28])
def test_an_interrupted_choice_is_forgotten(model, remembering, num_steps, call):
    """Whether or not it was one that is remembered, in layers that had come to it and in others."""
    cache, expected = (read(model, remembering(), num_steps) for _ in range(2))
    for step in range(3):
        with pytest.raises(Interrupted):
            interrupted(model, cache, tokens(1, seed=9), call)
        with pytest.raises(QuestError, match="repeat the call"):
            forward(model, cache, tokens(1, seed=9))
        assert_same_state(cache, expected)
        ids = tokens(1, seed=20 + step)
        assert torch.equal(forward(model, cache, ids), forward(model, expected, ids))


@pytest.mark.parametrize("num_steps", range(1, 4))
def test_rows_take_what_they_remember_along(model, remembering, num_steps):
    batch, alone = remembering(), [remembering() for _ in range(3)]
    ids = tokens(PROMPT + 10, batch_size=3)
    for first, end in [(0, PROMPT), *((token, token + 1) for token in range(PROMPT, PROMPT + num_steps))]:
        forward(model, batch, ids[:, first:end])
        for row, cache in enumerate(alone):
            forward(model, cache, ids[row : row + 1, first:end])
    batch.reorder_cache(torch.tensor([2, 0, 1]))
    batch.batch_repeat_interleave(2)  # 2 2 0 0 1 1
    batch.batch_select_indices(torch.tensor([5, 0, 3]))
    for step in range(4):
        new = tokens(1, seed=step, batch_size=3)
        logits = forward(model, batch, new)
        for row, source in enumerate([1, 2, 0]):
            expected = forward(model, alone[source], new[row : row + 1])
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)  # float32 sums of a batch


def test_no_more_than_what_is_remembered_can_be_taken_back():
    """Of a method that selects at every step, the last eight choices; and everything since the first."""
    model = make_model()
    cache = read(model, TokenSelectCache(20, similarity=None), 30)
    expected = read(model, TokenSelectCache(20, similarity=None), 30)
    with pytest.raises(QuestError, match=r"remembers its last 8 choices.*Take back 8 at most.*unchanged"):
        cache.crop(-9)
    assert_same_state(cache, expected)
    cache.crop(-8)
    cache.crop(-22)  # to the prompt, after which nothing was chosen yet
    assert_same_state(cache, read(model, TokenSelectCache(20, similarity=None), 0))


@pytest.mark.parametrize("budget", [12, 30, 10_000])
def test_another_budget_begins_anew(model, remembering, budget):
    """A selection of another number of tokens is not used; more than the context is dense."""
    cache, expected = read(model, remembering(), 4), read(model, remembering(10_000), 4)
    cache.budget = expected.budget = budget
    for step in range(4):
        ids = tokens(1, seed=30 + step)
        read_by = []
        for each in (cache, expected):
            each.watcher = lambda read, tokens=read_by: tokens.append(read.tokens())
            forward(model, each, ids)
        num_layers = len(read_by) // 2
        if step == 0 and isinstance(cache, RecycledAttentionCache):
            assert all(tokens.all() for tokens in read_by)  # the first step is full in all layers
        assert torch.equal(read_by[2], read_by[2 + num_layers])  # before which nothing is sparse


def test_clusters_of_a_document_serve_every_question(model):
    """They are made once, and are there again when the cache is cropped to the document."""
    question, other = tokens(40, seed=5), tokens(12, seed=6)
    cache, made = SqueezedAttentionCache(64, share=0.2, num_newest=10), []
    forward(model, cache, tokens(PROMPT))
    cache.squeeze()
    document = cache.layers[2].storage.memories.by_reader[0].versions[-1][1]
    for each in (question, other, question):
        fork = copy.deepcopy(cache)
        for used in (cache, fork):
            made.append(generate(model, torch.cat([tokens(PROMPT), each], dim=1), used, max_new_tokens=6))
        cache.crop(PROMPT - cache.get_seq_length())
        assert cache.layers[2].storage.memories.by_reader[0].versions[-1][1] is document
    assert all(torch.equal(*pair) for pair in zip(made[::2], made[1::2], strict=True))
    assert torch.equal(made[0], made[4])
    assert document["num_tokens"].tolist() == [PROMPT - 10]


def test_heads_attend_the_budget_on_average(model):
    cache, found = SqueezedAttentionCache(40, share=0.2, num_newest=4), []
    forward(model, cache, tokens(PROMPT))
    cache.watcher = lambda read: found.append(read.tokens().sum(dim=-1)) if read.choice else None
    for step in range(8):
        forward(model, cache, tokens(1, seed=step))
    counts = torch.stack(found).double()
    assert 36 < counts.mean() <= 40
    assert (counts.mean(dim=-1) <= 40).all()
    assert (counts > 40).any()


def test_there_is_nothing_to_squeeze_in_an_empty_cache():
    with pytest.raises(ValueError, match="let the model read the document with this cache first"):
        SqueezedAttentionCache().squeeze()


def test_layers_that_share_keys_remember_for_themselves():
    """Gemma 3n's last layers attend by the keys of others."""
    streams = [Stream(NUM_TOKENS, seed=3), Stream(NUM_TOKENS, seed=3)]
    streams[1].query = Stream(NUM_TOKENS, seed=4).query
    options = {"dense_layers": 0, "stride": 9, "similarity": -0.05}
    shared = RecycledAttentionCache(12, **options)
    alone = [RecycledAttentionCache(12, **options) for _ in streams]
    for first, end in [(0, NUM_PROMPT), *((token, token + 1) for token in range(NUM_PROMPT, NUM_TOKENS))]:
        key, value = shared.update(streams[0].key[:, :, first:end], streams[0].value[:, :, first:end], 0)
        for stream, cache in zip(streams, alone, strict=True):
            output, _ = quest_attention(stream.module, stream.query[:, :, first:end], key, value, None)
            assert torch.equal(output, stream.feed(cache, first, end))


def test_padding_that_is_told_later_begins_anew(model, remembering):
    cache = read(model, remembering(), 3)
    cache.set_left_padding((5,))
    assert all(not memory.versions for layer in cache.layers for memory in layer.storage.memories.by_reader)
    assert forward(model, cache, tokens(1)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecycledAttentionCache(64, stride=0), "stride is a number of tokens, 1 or more, not 0"),
        (lambda: RecycledAttentionCache(8, stride=9), "budget of RecycledAttentionCache includes the tokens since"),
        (lambda: RecycledAttentionCache(64, similarity=1.5), "similarity is a cosine, from -1 to 1, or None, not 1.5"),
        (lambda: TokenSelectCache(64, similarity="high"), "similarity is a cosine, from -1 to 1, or None, not 'high'"),
        (lambda: TokenSelectCache(64, num_first=-1), "num_first is a number of tokens, 0 or more, or None, not -1"),
        (lambda: TokenSelectCache(64, num_newest=0), "num_newest is a number of tokens, 1 or more, or None, not 0"),
        (lambda: TokenSelectCache(64, num_first=40, num_newest=30), "includes its first and newest tokens, 70 here"),
        (lambda: SqueezedAttentionCache(1), "budget of SqueezedAttentionCache is a number of tokens, 2 or more, not 1"),
        (lambda: SqueezedAttentionCache(share=0), "share is a number of clusters per token, above 0 and at most 1"),
        (lambda: SqueezedAttentionCache(num_newest=0), "num_newest is an integer, 1 or more, not 0"),
        (lambda: SqueezedAttentionCache(seed=0.5), "seed is an integer, 0 or more, not 0.5"),
        (lambda: TokenSelectCache(0), "budget of TokenSelectCache is a number of tokens, 1 or more, not 0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_they_are_never_compiled(model, remembering):
    asked = {"cache": remembering()}
    exec("answer = cache.is_compileable", asked)
    assert asked["answer"] is False
    assert generate(model, tokens(PROMPT), asked["cache"]).shape[1] > PROMPT
