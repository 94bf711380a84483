"""SubGen: what descriptions of its paper say, by an implementation of its own in plain Python."""

import itertools
import math

import pytest
import torch
from small_llama import PROMPT, make_model, tokens
from test_methods import EVERYTHING, Stream, assert_same_state, forward, read

from hf_quest import SubGenCache
from hf_quest.methods.samples import uniform_numbers
from hf_quest.methods.subgen import CENTRE, FIRST, SAMPLE, SAMPLE_BY_NORM, TOKEN
from hf_quest.seam.attention import quest_attention


@pytest.fixture(scope="module")
def model():
    return make_model()


def mix(bits):
    for _ in range(2):
        bits = ((bits >> 16) ^ bits) * 0x45D9F3B % 2**32
    return (bits >> 16) ^ bits


def uniform(seed, number, head, draw):
    return mix(mix(mix(mix(number) ^ seed) ^ head) ^ draw) / 2**32


def plus(sums, weight, values):
    return [total + weight * value for total, value in zip(sums, values, strict=True)]


class Slow:
    """One KV head, in Python's numbers: its newest tokens, samples by norm, and clusters, a list each."""

    def __init__(self, stream, kv_head, method):
        self.method, self.head, self.number = method, kv_head, 0
        self.keys, self.values = (each[0, kv_head].double().tolist() for each in (stream.key, stream.value))
        self.recent, self.by_norm, self.mass, self.clusters = [], [None] * method.num_by_norm, 0.0, []
        self.num_first = min(method.num_first, method.budget // 8)

    def feed(self, new):
        self.recent += new
        if self.number or len(self.recent) > self.method.budget:
            while len(self.recent) > self.method.num_recent:
                self.sample(self.recent.pop(self.num_first))

    def norm(self, token):
        return sum(value**2 for value in self.values[token])

    def draw(self, draw):
        return uniform(self.method.seed, self.number, self.head, draw)

    def sample(self, token):
        self.number += 1
        self.mass += self.norm(token)
        for idx in range(self.method.num_by_norm):
            if self.draw(idx) < self.norm(token) / self.mass:
                self.by_norm[idx] = token
        self.clusters.append({"centre": token, "samples": [token] * self.method.num_samples, "size": 1})
        if len(self.clusters) > self.method.num_clusters:
            self.merge()

    def merge(self):
        def distance(pair):
            return math.dist(*(self.keys[cluster["centre"]] for cluster in pair))

        pair = min(itertools.combinations(self.clusters, 2), key=distance)
        older, newer = sorted(pair, key=lambda cluster: cluster["centre"])
        older["size"] += newer["size"]
        for idx, other in enumerate(newer["samples"]):
            if self.draw(self.method.num_by_norm + idx) < newer["size"] / older["size"]:
                older["samples"][idx] = other
        self.clusters.remove(newer)

    def attend(self, query):
        """[D] float64 of a query, a list of numbers, by the formulas."""

        def weight(token):
            return math.exp(sum(q * k for q, k in zip(query, self.keys[token], strict=True)) / math.sqrt(len(query)))

        denominator, numerator = 0.0, [0.0] * len(self.values[0])
        for token in self.recent:
            denominator += weight(token)
            numerator = plus(numerator, weight(token), self.values[token])
        for cluster in self.clusters:
            share = cluster["size"] / len(cluster["samples"])
            denominator += share * sum(weight(token) for token in cluster["samples"])
        for token in self.by_norm if self.number else []:
            share = self.mass / (len(self.by_norm) * self.norm(token)) * weight(token)
            numerator = plus(numerator, share, self.values[token])
        return torch.tensor(numerator, dtype=torch.float64) / denominator


def entries(cache, kind, kv_head):
    storage = cache.layers[0].storage
    return storage.positions[0, kv_head][storage.beside["kinds"][0, kv_head] == kind].tolist()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_prompt", [3, 40])
@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (4, {}),
        (20, {"seed": 1}),
        (31, {"num_samples": 3, "seed": 2, "num_first": 0}),
        (24, {"recent": 0.1, "num_samples": 2}),
        (25, {"recent": 0.8}),
    ],
    ids=str,
)
def test_attends_as_descriptions_of_its_paper_say(budget, options, num_prompt, num_kv_heads):
    num_tokens, stream = 70, Stream(70, num_kv_heads=num_kv_heads, seed=budget)
    stream.query, stream.key, stream.value = (each.double() for each in (stream.query, stream.key, stream.value))
    cache = SubGenCache(budget, dense_layers=0, **options)
    slow = [Slow(stream, kv_head, cache.method) for kv_head in range(num_kv_heads)]
    stream.feed(cache, 0, num_prompt)
    for head in slow:
        head.feed(list(range(num_prompt)))
    for end in range(num_prompt, num_tokens):
        for kv_head, expected in enumerate(slow):
            assert sorted(entries(cache, TOKEN, kv_head) + entries(cache, FIRST, kv_head)) == expected.recent
            assert entries(cache, FIRST, kv_head) == (list(range(expected.num_first)) if expected.number else [])
            if expected.number:
                assert entries(cache, SAMPLE_BY_NORM, kv_head) == expected.by_norm
                centres = entries(cache, CENTRE, kv_head)[: len(expected.clusters)]  # those after them are none yet
                samples = entries(cache, SAMPLE, kv_head)
                sizes = cache.layers[0].storage.beside["totals"][0, kv_head, len(expected.by_norm) :]
                found = {
                    centre: (samples[idx * len(cluster["samples"]) :][: len(cluster["samples"])], sizes[idx].item())
                    for idx, (centre, cluster) in enumerate(zip(centres, expected.clusters, strict=True))
                }
                assert found == {each["centre"]: (each["samples"], each["size"]) for each in expected.clusters}
        output = stream.feed(cache, end, end + 1)
        for head in slow:
            head.recent.append(end)  # which it attends before the older ones leave
        for idx in range(4):
            expected = slow[idx // stream.module.num_key_value_groups].attend(stream.query[0, idx, end].tolist())
            torch.testing.assert_close(output[0, 0, idx], expected, rtol=1e-5, atol=1e-6)  # weights of 32 bits
        for head in slow:
            head.feed([])


def test_a_prompt_in_pieces_leaves_what_a_prompt_at_once_leaves():
    """The same tokens take part in the same order, so the same ones are sampled."""
    stream, at_once, in_pieces = Stream(200, seed=3), SubGenCache(24, dense_layers=0), SubGenCache(24, dense_layers=0)
    stream.feed(at_once, 0, 200)
    for first in range(0, 200, 7):
        stream.feed(in_pieces, first, min(200, first + 7))
    for name in ("positions", "keys", "values", "numerator", "denominator"):
        one, other = (getattr(cache.layers[0].storage, name) for cache in (at_once, in_pieces))
        assert torch.equal(one, other) or name in ("numerator", "denominator")
        torch.testing.assert_close(one, other)  # a sum of squared norms in another order


def test_over_many_seeds_the_sums_are_those_of_attention():
    """Numerator and denominator, each on average."""
    stream, num_seeds = Stream(60, num_heads=1, num_kv_heads=1, seed=7), 400
    query, key, value = stream.query[0, 0, -1].double(), stream.key[0, 0].double(), stream.value[0, 0].double()
    weights = (key @ query / math.sqrt(8)).exp()
    sums = []
    for seed in range(num_seeds):
        cache = SubGenCache(30, seed=seed, dense_layers=0)
        stream.feed(cache, 0, 60)
        storage = cache.layers[0].storage
        entries = (storage.keys[0, 0].double() @ query / math.sqrt(8)).exp()
        numerator = (entries * storage.numerator[0, 0].exp()) @ storage.values[0, 0].double()
        denominator = entries @ storage.denominator[0, 0].double().exp()
        sums.append(torch.cat([numerator, denominator[None]]))
    sums, expected = torch.stack(sums), torch.cat([weights @ value, weights.sum()[None]])
    error = (sums.mean(dim=0) - expected).abs() / (sums.std(dim=0) / math.sqrt(num_seeds))
    assert error.max() < 4  # standard errors: one of nine, once in 1,700 times


def test_numbers_are_uniform_and_not_alike():
    numbers = uniform_numbers(3, torch.arange(500).view(1, 1, -1).expand(1, 4, -1), 50).flatten()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
    chi_square = ((counts - 5000).square() / 5000).sum()
    assert chi_square < 45  # of 19 degrees of freedom, once in 1,000 times
    assert numbers.unique().numel() > 0.9999 * numbers.numel()
    assert not torch.equal(numbers, uniform_numbers(4, torch.arange(500).view(1, 1, -1).expand(1, 4, -1), 50).flatten())


def test_the_seed_decides(model):
    first, again, other = (read(model, SubGenCache(20, seed=seed)) for seed in (0, 0, 1))
    assert_same_state(first, again)
    assert not torch.equal(first.layers[3].storage.positions, other.layers[3].storage.positions)


def test_memory_is_that_of_the_budget(model):
    cache = read(model, SubGenCache(20, dense_layers=0), 30)
    for layer in cache.layers:
        assert layer.keys.shape[2] == layer.values.shape[2] == 20
        for tensor in layer.storage.tensors().values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert cache.tokens_attended == [20] * 4


@pytest.mark.parametrize("budget", [9, 40])
def test_another_budget_later_keeps_what_was_sampled(model, budget):
    """Fewer entries or more: all keys are counted still, and every cluster and sample is one from before or newer."""
    cache = read(model, SubGenCache(20), 8)
    cache.budget = budget
    for step in range(30):
        assert forward(model, cache, tokens(1, seed=step)).isfinite().all()
        storage, method = cache.layers[3].storage, cache.method
        kinds, totals = storage.beside["kinds"], storage.beside["totals"]
        assert storage.capacity <= budget
        num_seen = storage.length
        num_counted = totals.masked_fill(kinds != CENTRE, 0).sum(dim=-1) + (kinds <= FIRST).sum(dim=-1)
        assert (num_counted == num_seen).all()
    assert (kinds == SAMPLE_BY_NORM).sum(dim=-1).unique().tolist() == [method.num_by_norm]
    assert (kinds == CENTRE).sum(dim=-1).unique().tolist() == [method.num_clusters]


def test_layers_that_share_keys_attend_what_was_there_before_it_was_sampled():
    """Gemma 3n's last layers attend by the keys of others."""
    stream, shared, alone = Stream(60, seed=3), SubGenCache(12, dense_layers=0), SubGenCache(12, dense_layers=0)
    for first, end in [(0, 30), (30, 31), (31, 36), (36, 37)]:
        key, value = shared.update(stream.key[:, :, first:end], stream.value[:, :, first:end], 0)
        outputs = [quest_attention(stream.module, stream.query[:, :, first:end], key, value, None)[0] for _ in range(2)]
        assert torch.equal(*outputs)
        assert torch.equal(outputs[0], stream.feed(alone, first, end))


def test_nothing_is_sampled_within_the_budget(model):
    cache = read(model, SubGenCache(EVERYTHING))
    storage = cache.layers[3].storage
    assert storage.weights is None
    assert storage.positions[0, 0].tolist() == list(range(PROMPT + 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubGenCache(0), "budget of SubGenCache is a number of tokens, 1 or more, not 0"),
        (lambda: SubGenCache(3), "budget of SubGenCache includes a new token, a sample by norm and a cluster"),
        (lambda: SubGenCache(recent=1), "recent is a share of the budget, 0 or more and below 1, not 1"),
        (lambda: SubGenCache(num_first=-1), "num_first is an integer, 0 or more, not -1"),
        (lambda: SubGenCache(num_samples=0), "num_samples is an integer, 1 or more, not 0"),
        (lambda: SubGenCache(seed=-1), "seed is an integer, 0 or more, not -1"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
