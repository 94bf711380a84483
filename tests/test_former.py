"""Names of version 0.1 that keep working for one version."""

import sys

import pytest
import torch
from small_llama import PROMPT, generate, make_model, tokens

import hf_quest
from hf_quest import CritiPrefill, QuestCache, former
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
    cache.settings.step = "prepared"
    assert cache.shared.step.state == "prepared"
