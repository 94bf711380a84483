"""An audit tells what decode steps really missed of dense attention, and costs the others nothing."""

import copy

import pytest
import torch
from exact_top_k import ExactTopK
from kernels_on_cpu import emulate
from small_llama import ANSWER, BUDGET, PROMPT, generate, greedy, make_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Gemma2ForCausalLM, GptOssForCausalLM

import hf_quest
from hf_quest import CACHE_NAME, H2OCache, MethodCache, PageReads, QuestCache, QuestError, ThinKCache, TokenSelectCache

CACHES = {
    "pages": lambda: QuestCache(BUDGET, dense_layers=1),
    "tokens": lambda: QuestCache(BUDGET, dense_layers=1, codes=2, candidates=2),
    "tokens, offloaded": lambda: QuestCache(BUDGET, dense_layers=1, codes=2, offloading=True),
    "best tokens": lambda: MethodCache(ExactTopK(BUDGET), dense_layers=1),
    "a method that remembers": lambda: TokenSelectCache(BUDGET, dense_layers=1),
}
MODELS = {
    "groups": {},
    "softcap": {"model_class": Gemma2ForCausalLM, "attn_logit_softcapping": 2.0, "head_dim": 16},
    "sinks": {"model_class": GptOssForCausalLM, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(params=CACHES.values(), ids=CACHES)
def cache(request):
    return request.param()


class Directly:
    """A watcher that computes what is missed token by token, in float64."""

    def __init__(self):
        self.missed = {}

    def __call__(self, read):
        if read.layer.is_dense or read.choice is None:
            return
        ids, size = read.choice
        num_queries = read.query.shape[2]
        of_read = torch.zeros(read.query.shape[:3], dtype=torch.float64)
        for row, head, query_idx in torch.cartesian_prod(*map(torch.arange, read.query.shape[:3])).tolist():
            kv_head = head * ids.shape[1] // read.query.shape[1]
            padding = read.layer.left_padding[row]
            keys = read.layer.keys[row, kv_head, padding : read.length - num_queries + query_idx + 1].double()
            logits = keys @ read.query[row, head, query_idx].double() * read.logits.scaling
            if read.logits.softcap is not None:
                logits = read.logits.softcap * (logits / read.logits.softcap).tanh()
            if read.logits.sinks is not None:
                logits = torch.cat([logits, read.logits.sinks[head].detach().double().view(1)])
            weights = logits.softmax(dim=0)[: len(keys)]
            is_missed = torch.ones(len(keys), dtype=torch.bool)
            for chosen in ids[row, kv_head, query_idx].tolist():
                if chosen >= 0:
                    is_missed[chosen * size : (chosen + 1) * size] = False
            of_read[row, head, query_idx] = weights[is_missed].sum()
        self.missed.setdefault(read.layer.layer_idx, []).extend(of_read.unbind(dim=2))


def padded_prompt():
    prompt = tokens(PROMPT, batch_size=2)
    prompt[1, :37] = 0
    return prompt, (prompt > 0).long()


def assert_same(found, expected):
    assert found.steps.keys() == expected.missed.keys() != set()
    for layer, steps in found.steps.items():
        directly = torch.stack(expected.missed[layer])
        # In float32, sums of at most a few hundred weights.
        torch.testing.assert_close(torch.stack(steps).double(), directly, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_what_is_missed_is_that_of_float64(cache, options):
    prompt, mask = padded_prompt()
    cache.watcher = expected = Directly()
    with hf_quest.audit(cache, every=1) as audit:
        generate(make_model(**options), prompt, cache, attention_mask=mask, max_new_tokens=6)
    assert audit.num_steps == 5
    assert_same(audit, expected)
    assert all(0 < missed < audit.worst[layer] <= 1 for layer, missed in audit.missed.items())


def test_every_draft_is_a_step(model):
    cache = CACHES["tokens"]()
    cache.watcher = expected = Directly()
    with hf_quest.audit(cache, every=1) as audit:
        generate(model, tokens(PROMPT // 2).repeat(1, 2), cache, prompt_lookup_num_tokens=4)
    assert_same(audit, expected)


@pytest.mark.parametrize("kind", ["pages", "tokens"])
def test_it_is_the_same_where_operators_serve(model, kind, monkeypatch):
    def audited(**options):
        cache = CACHES[kind]()
        with hf_quest.audit(cache, every=2) as audit:
            generate(model, tokens(PROMPT // 2).repeat(1, 2), cache, **options)
        return audit.steps

    expected = [audited(), audited(prompt_lookup_num_tokens=4)]
    assert "chain" not in (calls := emulate(monkeypatch))
    for found, steps in zip([audited(), audited(prompt_lookup_num_tokens=4)], expected, strict=True):
        assert found.keys() == steps.keys() != set()
        for layer in steps:
            torch.testing.assert_close(torch.stack(found[layer]), torch.stack(steps[layer]))
    assert "chain" in calls


def test_a_budget_beyond_the_context_misses_nothing(model):
    for new_cache in (QuestCache, TokenSelectCache):
        cache = new_cache(1024, dense_layers=1)
        with hf_quest.audit(cache, every=3) as audit:
            generate(model, tokens(PROMPT), cache, max_new_tokens=10)
        assert audit.num_steps == 3
        assert audit.missed == audit.worst == {1: 0.0, 2: 0.0, 3: 0.0}


def test_one_in_so_many_steps_is_audited(model):
    counts = {}
    for every in (1, 4, 64):
        cache = CACHES["pages"]()
        with hf_quest.audit(cache, every) as audit:
            generate(model, tokens(PROMPT), cache, max_new_tokens=ANSWER + 1)
        counts[every] = audit.num_steps
        assert audit.seconds > 0
    assert counts == {1: ANSWER, 4: ANSWER // 4, 64: 1}


class Operations(TorchDispatchMode):
    """Counts operations of PyTorch, but for a watcher's look at the query, which computes nothing."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is not torch.ops.aten.detach.default
        return function(*args, **(kwargs or {}))


def test_a_step_that_is_not_audited_costs_nothing(model):
    cache = CACHES["tokens"]()
    greedy(model, cache, tokens(PROMPT), num_tokens=1)

    def operations_of_a_step(cache):
        with torch.no_grad(), Operations() as operations:
            model(torch.tensor([[5]]), **{CACHE_NAME: cache})
        return operations.count

    expected = [operations_of_a_step(copied) for copied in [copy.deepcopy(cache)] for _ in range(3)]
    with hf_quest.audit(cache, every=3) as audit:
        first, *others = [operations_of_a_step(cache) for _ in range(3)]
    assert first > expected[0]
    assert others == expected[1:]
    assert audit.num_steps == 1


def test_the_output_is_that_without(model, cache):
    prompt, mask = padded_prompt()
    expected = generate(model, prompt, copy.deepcopy(cache), attention_mask=mask)
    with hf_quest.audit(cache, every=2):
        assert not (lambda: cache.is_compileable)()
        assert torch.equal(generate(model, prompt, cache, attention_mask=mask), expected)


def test_who_watched_before_is_told_and_watches_again(model):
    reads, cache = PageReads(), CACHES["pages"]()
    cache.watcher = reads
    with hf_quest.audit(cache) as audit:
        generate(model, tokens(PROMPT), cache, max_new_tokens=4)
        with pytest.raises(QuestError, match="under way already"):
            audit.__enter__()
    assert len(reads.selections[1]) == 3
    assert cache.watcher is reads
    with hf_quest.audit(cache):
        cache.watcher = None
    assert cache.watcher is None


def test_it_says_what_it_found(model):
    cache = CACHES["pages"]()
    audit = hf_quest.audit(cache, every=8)
    assert "No step was audited" in str(audit)
    with audit:
        generate(model, tokens(PROMPT), cache)
    lines = str(audit).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1", "2", "3"]
    assert f"{audit.missed[2]:.2%}" in lines[1]
    assert f"{audit.worst[2]:.2%}" in lines[1]
    assert lines[-1].startswith("3 steps audited in ")


@pytest.mark.parametrize("new_cache", [H2OCache, ThinKCache])
def test_what_drops_tokens_is_refused(new_cache):
    with pytest.raises(QuestError, match="evicts or compresses"):
        hf_quest.audit(new_cache(BUDGET))


def test_wrong_arguments_are_said():
    with pytest.raises(TypeError, match="DynamicCache"):
        hf_quest.audit(DynamicCache())
    for every in (0, -1, 2.5, True, "64"):
        with pytest.raises(ValueError, match="every is a number of steps"):
            hf_quest.audit(QuestCache(BUDGET), every)
