"""Names of version 0.1 that keep working for one version."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from small_llama import PROMPT, generate, make_model, tokens
from transformers import MistralForCausalLM

import hf_quest
from hf_quest import CACHE_NAME, CritiPrefill, QuestCache, former
from hf_quest.watch import PageReads


def test_former_modules_are_there():
    from hf_quest.baselines import H2OCache
    from hf_quest.cache import CACHE_NAME, PREPARED
    from hf_quest.pages import PageReads as Reads
    from hf_quest.prefill import BlockScores, attend

    from hf_quest import _build, ops
    from hf_quest.kernels import build
    from hf_quest.kernels import ops as operators

    assert ops is operators
    assert _build is build
    assert (H2OCache, CACHE_NAME, Reads) == (hf_quest.H2OCache, hf_quest.CACHE_NAME, PageReads)
    assert PREPARED == "prepared"
    assert callable(attend)
    assert BlockScores().scores == {}


@pytest.mark.parametrize("name", [*former.MOVED, *former.GATHERED])
def test_every_former_module_can_be_imported(name):
    assert sys.modules[f"hf_quest.{name}"] is getattr(hf_quest, name)


def test_a_recorder_and_who_watched_a_prompt_are_told_what_they_were():
    model, recorded, watched = make_model(), [], []
    cache = QuestCache(48)
    cache.recorder = lambda *arguments: recorded.append(arguments)
    generate(model, tokens(PROMPT), cache)
    layer, query, page_ids, scaling, softcap, sinks = recorded[-1]
    assert layer is cache.layers[3]
    assert (query.shape, page_ids.shape) == ((1, 4, 1, 16), (1, 2, 1, 3))
    assert (scaling, softcap, sinks) == (0.25, None, None)
    assert {arguments[0].layer_idx for arguments in recorded} == {2, 3}

    cache = QuestCache(prefill=CritiPrefill(budget=32, segment_size=32, block_size=16, threshold=64))
    cache.watch_prefill(lambda *arguments: watched.append(arguments))
    with torch.no_grad():
        model(tokens(PROMPT), past_key_values=cache)
    layer_idx, position, query, keys, block_ids = watched[0]
    assert (layer_idx, position, query.shape[-1], keys.shape, block_ids.shape) == (1, 64, 16, (2, 150, 16), (2, 2, 2))
    cache.recorder = reads = PageReads()
    assert cache.watcher is cache.recorder is reads


def test_settings_are_those_of_the_cache():
    cache = QuestCache(48)
    assert (cache.settings.budget, cache.settings.page_size, cache.settings.step) == (48, 16, None)
    cache.settings.budget = 64
    assert cache.budget == cache.settings.budget == 64
    cache.settings.step = "prepared"
    assert cache.shared.step.state == "prepared"


def test_a_cache_that_was_saved_goes_on():
    """Two rows, one of them padded, and a model with a window, saved by version 0.1 after the same forwards."""
    caches = torch.load(Path(__file__).parent / "data" / "caches_0_1.pt", weights_only=False)
    ids, mask = torch.arange(80).view(2, 40) % 250 + 3, torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model, window = make_model(), make_model(MistralForCausalLM, sliding_window=8)
    expected = {"quest": QuestCache(32, max_cache_len=64)}
    expected["window"] = QuestCache(32, max_cache_len=64, compile=False, bounds_dtype=None)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, **{CACHE_NAME: expected["quest"]})
        window(ids[:1], **{CACHE_NAME: expected["window"]})
        for token in range(3):
            window(ids[1:, token : token + 1], **{CACHE_NAME: expected["window"]})
        grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        step = {"attention_mask": grown, "position_ids": positions[:, -1:] + 1}
        for name, forward in (
            ("quest", lambda cache: model(ids[:, :1], **step, **{CACHE_NAME: cache})),
            ("window", lambda cache: window(ids[:1, :1], **{CACHE_NAME: cache})),
        ):
            saved = caches[name]
            assert (saved.budget, saved.max_cache_len, saved.compile) == (32, 64, name == "quest")
            assert saved.method == expected[name].method
            logits, right = (forward(cache).logits for cache in (saved, expected[name]))
            torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)  # weights of another release of PyTorch
            assert pickle.loads(pickle.dumps(saved)).get_seq_length() == expected[name].get_seq_length()
