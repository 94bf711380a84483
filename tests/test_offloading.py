"""With `offloading=True` keys and values of the layers that choose lie in the host's memory, and all else is the same.

Where there is no GPU, that memory is told from other memory of the CPU by its blocks, so what would be in the wrong
place on a GPU is found here. The others stand for the GPU's: nothing may put a copy of a cache's keys there.
"""

import copy
import gc
import math
import mmap
import pickle
import weakref

import pytest
import torch
from kernels_on_cpu import emulate
from small_llama import ANSWER, BUDGET, PROMPT, feed, generate, make_model, on_any_device, tokens
from test_local import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from hf_quest import CACHE_NAME, CritiPrefill, H2OCache, MethodCache, QuestCache, QuestError, decode_ahead
from hf_quest.methods import Quest
from hf_quest.reference import Logits
from hf_quest.seam.reading import attend
from hf_quest.storage import Offloaded, host
from hf_quest.storage.pool import TOKEN

PREFILL = CritiPrefill(budget=32, segment_size=32, block_size=16, threshold=64, layer_fusion=0.3)
METHODS = {"pages": {}, "codes": {"codes": 2, "candidates": 2}}
FAMILIES = ("llama", "gemma3")
MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "copies": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "drafts": {"prompt_lookup_num_tokens": 4},
    "chunks": {"prefill_chunk_size": 37},
    "ahead": {"custom_generate": decode_ahead},
    "long": {"max_new_tokens": 300},  # the storage grows
}


@pytest.fixture(scope="module")
def models():
    return {"llama": make_model(), "gemma3": build("gemma3")}


@pytest.fixture
def model(models):
    return models["llama"]


@torch.no_grad()
def read(model, cache, ids=None, **options):
    model(tokens(PROMPT) if ids is None else ids, **{CACHE_NAME: cache}, **options)
    return cache


def both(**options):
    """A cache in memory, and one with offloading."""
    return [QuestCache(BUDGET, offloading=offloading, **options) for offloading in (False, True)]


def assert_in_place(cache):
    """Keys and values of layers that choose, and nothing else, lie in the host's memory."""
    chosen = [isinstance(layer.storage, Offloaded) for layer in cache.layers]
    assert any(chosen)
    for layer, is_chosen in zip(cache.layers, chosen, strict=True):
        assert is_chosen == (not layer.is_dense)
        for name, tensor in layer.storage.tensors().items():
            assert host.holds(tensor) == (is_chosen and name in ("keys", "values")), (layer.layer_idx, name)


def stored(cache):
    return [tensor for layer in cache.layers for tensor in layer.saved()[0].values()]


def assert_same(cache, expected):
    for tensor, other in zip(stored(cache), stored(expected), strict=True):
        assert torch.equal(tensor, other)


class TestTheSameTokens:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_in_every_mode_of_generate(self, models, family, method, mode):
        ids = tokens(PROMPT // 2).repeat(1, 2)  # in which a lookup finds something
        answers = []
        for cache in both(**METHODS[method]):
            torch.manual_seed(0)
            options = {"max_new_tokens": ANSWER, "return_dict_in_generate": True, "output_logits": True}
            output = generate(models[family], ids, cache, **options | MODES[mode])
            answers.append((output.sequences, torch.stack(output.logits) if output.logits else torch.zeros(1)))
        assert_in_place(cache)
        assert torch.equal(answers[0][0], answers[1][0])
        assert torch.equal(answers[0][1], answers[1][1])

    @pytest.mark.parametrize("method", ["pages", "codes"])
    def test_in_a_graph(self, method):
        """Which Inductor compiles for the offloaded one alone: that of the other writes what is written without."""
        torch._dynamo.reset()
        model, (cache, offloaded) = make_model(num_hidden_layers=2), both(dense_layers=1, **METHODS[method])
        output = generate(model, tokens(PROMPT), offloaded, compile_config=on_any_device())
        assert torch.equal(output, generate(model, tokens(PROMPT), cache))

    @pytest.mark.parametrize("options", [{}, {"prefill": PREFILL}, {"dense_layers": 0}], ids=["", "segments", "all"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_padded_rows_in_chunks(self, models, family, options):
        ids = tokens(PROMPT, batch_size=3)
        ids[1, :37], ids[2, :101] = 0, 0
        mask = (ids > 0).long()
        for chunk in (None, 40):
            expected, output = (
                generate(models[family], ids, cache, attention_mask=mask, prefill_chunk_size=chunk)
                for cache in both(**options)
            )
            assert torch.equal(output, expected)

    @pytest.mark.parametrize("options", [{}, {"codes": 2}], ids=["", "codes"])
    def test_by_the_operators(self, monkeypatch, options):
        """Which find the storage by its address in a graph."""
        torch._dynamo.reset()
        calls, model = emulate(monkeypatch), make_model(num_hidden_layers=2)
        config = on_any_device(backend="aot_eager", mode=None)  # operators are theirs by any compiler
        expected, output = (
            generate(model, tokens(PROMPT), cache, compile_config=config) for cache in both(dense_layers=1, **options)
        )
        assert torch.equal(output, expected)
        assert {"append", "decode"} <= set(calls)

    def test_with_a_mask_of_ones_own(self, model):
        for cache in (caches := both()):
            read(model, cache)
            mask = torch.ones(1, 1, 1, PROMPT + 1, dtype=torch.bool)
            mask[..., 20:60] = False
            read(model, cache, tokens(1, seed=3), attention_mask=mask)
        assert_same(*caches)

    def test_with_gradients_to_the_forward_under_way(self, model):
        gradients = []
        for cache in both():
            read(model, cache)
            embeddings = model.get_input_embeddings()(tokens(9, seed=3)).detach().requires_grad_()
            model(inputs_embeds=embeddings, **{CACHE_NAME: cache}).logits.sum().backward()
            gradients.append(embeddings.grad)
        assert torch.equal(*gradients)

    def test_of_any_method_that_keeps_every_token(self, model):
        expected, output = (
            feed(model, MethodCache(Quest(BUDGET), offloading=offloading), tokens(PROMPT), tokens(ANSWER, seed=3))
            for offloading in (False, True)
        )
        assert torch.equal(output, expected)


def grown(model, cache, folder):
    read(model, cache, tokens(400, seed=3))
    return cache


def reordered(model, cache, folder):
    cache.batch_repeat_interleave(3)
    read(model, cache, tokens(5, seed=3, batch_size=3))
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    return cache


def selected(model, cache, folder):
    cache.batch_repeat_interleave(3)
    read(model, cache, tokens(5, seed=3, batch_size=3))
    cache.batch_select_indices(torch.tensor([2, 0]))
    return cache


def cropped(model, cache, folder):
    cache.crop(-37)
    return cache


def begun_again(model, cache, folder):
    cache.reset()
    return read(model, cache, tokens(70, seed=3, batch_size=2))


def away_and_back(model, cache, folder):
    for layer in cache.layers:
        layer.offload()
    assert all(host.holds(layer.keys) for layer in cache.layers if isinstance(layer.storage, Offloaded))
    return read(model, cache, tokens(1, seed=3))


def widened(model, cache, folder):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        begun_again(model, cache, folder)
    return read(model, cache, tokens(3, seed=3, batch_size=2))


def saved_and_loaded(model, cache, folder):
    cache.save(folder)
    return QuestCache.load(folder, model)


def taken_from_stock(model, cache, folder):
    stock = DynamicCache()
    read(model, stock)
    return QuestCache.from_cache(stock, BUDGET, offloading=cache.shared.offloading)


def made_in_inference_mode(model, cache, folder):
    cache = copy.deepcopy(cache)
    with torch.inference_mode():
        cache.reset()
        model(tokens(PROMPT), **{CACHE_NAME: cache})
    return read(model, cache, tokens(3, seed=3))


def copied_in_inference_mode(model, cache, folder):
    with torch.inference_mode():
        return copy.deepcopy(cache)


CHANGES = {
    "grown": grown,
    "reordered": reordered,
    "selected": selected,
    "cropped": cropped,
    "begun again": begun_again,
    "away and back": away_and_back,
    "widened": widened,
    "deep-copied": lambda model, cache, folder: copy.deepcopy(cache),
    "pickled": lambda model, cache, folder: pickle.loads(pickle.dumps(cache)),
    "saved and loaded": saved_and_loaded,
    "taken from stock": taken_from_stock,
    "taken from one": lambda model, cache, folder: QuestCache.from_cache(cache, BUDGET, offloading=True),
    "made in inference mode": made_in_inference_mode,
    "copied in inference mode": copied_in_inference_mode,
}


class TestPlace:
    @pytest.mark.parametrize("change", CHANGES)
    def test_it_is_kept_whatever_is_done(self, model, tmp_path, change):
        expected, cache = (
            CHANGES[change](model, read(model, cache), tmp_path / str(idx)) for idx, cache in enumerate(both())
        )
        assert_in_place(cache)
        assert_same(cache, expected)
        ids = tokens(3, seed=4, batch_size=len(cache.left_padding))
        for one in ids.split(1, dim=1):
            assert torch.equal(*(model(one, **{CACHE_NAME: each}).logits for each in (cache, expected)))
        assert_in_place(cache)

    def test_a_loaded_document_lies_where_one_says(self, model, tmp_path):
        in_memory, offloaded = both()
        read(model, in_memory).save(tmp_path / "memory")
        read(model, offloaded).save(tmp_path / "host")
        assert_in_place(loaded := QuestCache.load(tmp_path / "memory", model, offloading=True))
        assert_same(loaded, in_memory)
        loaded = QuestCache.load(tmp_path / "host", model, offloading=False)
        assert not any(host.holds(tensor) for layer in loaded.layers for tensor in layer.storage.tensors().values())
        assert_same(loaded, offloaded)

    def test_the_memory_goes_with_the_cache(self, model):
        gc.collect()
        before = dict(host.blocks)
        cache = read(model, QuestCache(BUDGET, offloading=True))
        assert len(host.blocks) == len(before) + 4  # keys and values of two layers
        kept = cache.layers[3].keys[:, :, 5:7]
        reference = weakref.ref(cache)
        del cache
        assert reference() is None
        assert len(host.blocks) == len(before) + 1  # of which somebody has a part
        del kept
        assert host.blocks == before

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_prompt_in_chunks_is_given_its_room_at_once(self, models, monkeypatch, family):
        made, make = [], host.new_block
        monkeypatch.setattr(host, "new_block", lambda *arguments: made.append(arguments) or make(*arguments))
        cache = QuestCache(BUDGET, offloading=True)
        generate(models[family], tokens(600), cache, prefill_chunk_size=37)
        assert len(made) == sum(2 * isinstance(layer.storage, Offloaded) for layer in cache.layers)
        assert not cache.shared.rows.reserved

    def test_room_for_keys_that_come_in_another_dtype(self, model):
        cache = QuestCache(BUDGET, offloading=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            read(model, cache)
        assert not cache.shared.rows.reserved
        assert_in_place(cache)

    def test_room_for_another_batch_is_no_more_than_that_takes(self, model, monkeypatch):
        cache = read(model, QuestCache(BUDGET, offloading=True), tokens(1500))
        cache.reset()
        room = 8 * cache.layers[3].keys.nbytes
        monkeypatch.setattr(host, "available", lambda: room)
        read(model, cache, tokens(20, batch_size=8))
        assert_in_place(cache)


def steps(model, cache, num_steps, seed, batch_size=1):
    """Logits of so many steps."""
    ids = tokens(num_steps, seed=seed, batch_size=batch_size)
    return torch.cat([model(one, **{CACHE_NAME: cache}).logits for one in ids.split(1, dim=1)], dim=1)


class TestPool:
    """By the operators: what steps have attended is on the device and read from there, as long as it is the same."""

    @pytest.fixture(autouse=True)
    def by_operators(self, monkeypatch):
        emulate(monkeypatch)

    @torch.no_grad()
    def caches(self, model, pool=None):
        """A cache in memory, and one with a pool in which there is something."""
        caches = both(**METHODS["codes"])
        caches[1] = QuestCache(BUDGET, offloading=True, pool=pool, **METHODS["codes"])
        for cache in caches:
            steps(model, read(model, cache), 5, seed=7)
        looked_up, found = caches[1].pool_counts
        assert 0 < found < looked_up
        return caches

    @pytest.mark.parametrize("change", CHANGES)
    @torch.no_grad()
    def test_nothing_of_before_is_read_whatever_is_done(self, model, tmp_path, change):
        caches = self.caches(model)
        caches = [CHANGES[change](model, each, tmp_path / str(idx)) for idx, each in enumerate(caches)]
        rows = len(caches[0].left_padding)
        for seed in (4, 5):
            expected, output = (steps(model, each, 4, seed, rows) for each in caches)
            assert torch.equal(output, expected)
            for each in caches:
                each.crop(-2)

    @torch.no_grad()
    def test_it_has_no_more_room_than_the_storage(self, model):
        """But for being a multiple of 256 tokens."""
        cache = QuestCache(1 << 20, codes=2, dense_layers=1, offloading=True)
        model(tokens(PROMPT), **{CACHE_NAME: cache})
        storage = cache.layers[1].storage
        assert storage.capacity <= storage.pool.tags.shape[2] < storage.capacity + 256

    @pytest.mark.parametrize("mode", MODES)
    def test_in_every_mode_of_generate(self, model, mode):
        ids = tokens(PROMPT // 2).repeat(1, 2)
        answers = []
        for cache in both(**METHODS["codes"]):
            torch.manual_seed(0)
            answers.append(generate(model, ids, cache, **{"max_new_tokens": ANSWER} | MODES[mode]))
        assert torch.equal(*answers)
        assert cache.pool_counts[1] > 0

    def test_of_padded_rows(self, model):
        ids = tokens(PROMPT, batch_size=3)
        ids[1, :37], ids[2, :101] = 0, 0
        answers = [generate(model, ids, each, attention_mask=(ids > 0).long()) for each in both(**METHODS["codes"])]
        assert torch.equal(*answers)

    @torch.no_grad()
    def test_padding_that_is_told_later(self, model):
        mask = torch.ones(1, PROMPT + 6, dtype=torch.long)
        mask[:, :40] = 0
        expected, output = (
            model(tokens(1, seed=4), attention_mask=mask, **{CACHE_NAME: each}).logits for each in self.caches(model)
        )
        assert torch.equal(output, expected)

    @torch.no_grad()
    def test_beams_keep_what_they_share(self, model):
        _, cache = self.caches(model)
        cache.batch_repeat_interleave(2)
        steps(model, cache, 2, seed=4, batch_size=2)
        storage = cache.layers[3].storage
        length = storage.length
        cache.reorder_cache(torch.tensor([0, 0]))  # from now on the rows share everything
        assert not storage.pool.tags.any()
        steps(model, cache, 2, seed=5, batch_size=2)
        assert (storage.pool.tags != 0).any(dim=-1).all()
        cache.reorder_cache(torch.tensor([1, 0]))
        held = storage.pool.tags & TOKEN
        assert (held[storage.pool.tags != 0] < length).all()
        assert (storage.pool.tags != 0).any(dim=-1).all()

    @torch.no_grad()
    def test_its_size_is_a_choice(self, model):
        for pool, size in ((None, 256), (257, 512), (4096, 512)):  # no more than the storage has
            cache = read(model, QuestCache(BUDGET, offloading=True, pool=pool, **METHODS["codes"]))
            sizes = [layer.storage.pool and layer.storage.pool.keys.shape[2] for layer in cache.layers]
            assert sizes == [None, None, size, size]
        for options in ({"offloading": True, "pool": 0, **METHODS["codes"]}, {"offloading": True}, {"pool": 0}):
            cache = read(model, QuestCache(BUDGET, **options))
            assert all(layer.storage.pool is None for layer in cache.layers)
            assert cache.pool_counts == (0, 0)

    @torch.no_grad()
    def test_its_default_size_follows_the_budget(self, model):
        """And one that was chosen does not."""
        for pool, sizes in ((None, [256, 512, 256]), (300, [512, 512, 512])):
            caches = self.caches(model, pool=pool)
            for budget, size in zip((BUDGET, 2 * BUDGET, BUDGET), sizes, strict=True):
                for each in caches:
                    each.budget = budget
                assert [layer.storage.pool.keys.shape[2] for layer in caches[1].layers[2:]] == [size, size]
                expected, output = (steps(model, each, 4, seed=budget) for each in caches)
                assert torch.equal(output, expected)
            assert caches[1].pool_counts[1] > 0

    @torch.no_grad()
    def test_what_rests_comes_back_with_one_for_its_new_budget(self, model):
        _, cache = self.caches(model)
        cache.layers[3].offload()
        cache.budget = 2 * BUDGET
        assert cache.layers[3].storage.pool is None
        steps(model, cache, 1, seed=4)
        assert cache.layers[3].storage.pool.keys.shape[2] == 512

    @torch.no_grad()
    def test_it_is_a_setting_that_is_saved(self, model, tmp_path):
        read(model, QuestCache(BUDGET, offloading=True, pool=512, **METHODS["codes"])).save(tmp_path)
        loaded = QuestCache.load(tmp_path, model)
        assert loaded.layers[3].storage.pool.keys.shape[2] == 512
        loaded = QuestCache.load(tmp_path, model, offloading=False)
        assert loaded.shared.pool is None

    @torch.no_grad()
    def test_it_is_not_there_while_the_cache_rests(self, model):
        _, cache = self.caches(model)
        cache.layers[3].offload()
        assert cache.layers[3].storage.pool is None
        steps(model, cache, 1, seed=4)
        assert cache.layers[3].storage.pool is not None

    @pytest.mark.parametrize("wrong", [-1, 2.5, True, "all", 2**24])
    def test_what_is_no_number_of_tokens(self, wrong):
        with pytest.raises(ValueError, match=r"pool is a number of tokens below .* 0 for no pool, or None"):
            QuestCache(BUDGET, offloading=True, codes=2, pool=wrong)

    def test_where_none_can_be(self):
        with pytest.raises(ValueError, match="pool is for keys and values in the host's memory"):
            QuestCache(BUDGET, codes=2, pool=1024)
        for options in ({}, {"codes": 8}, {"codes": 2, "mass": 0.9}):
            with pytest.raises(ValueError, match="no CUDA kernels with a pool"):
                QuestCache(BUDGET, offloading=True, pool=1024, **options)


class Elsewhere(TorchDispatchMode):
    """Counts the bytes of the largest tensor that an operation has made in other memory than the host's."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and not host.holds(tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes())
        return result


LONG = 3000  # tokens, so that a layer's keys are much more than anything else here


@pytest.fixture(scope="module")
def long_model():
    return make_model(max_position_embeddings=2 * LONG)


class TestNothingIsCopied:
    """To where the GPU's memory would be. A layer's keys are [1, 2, LONG, 16] float32."""

    of_keys = 2 * LONG * 16 * 4

    @pytest.fixture
    def cache(self, long_model):
        cache = QuestCache(BUDGET, offloading=True)
        for chunk in tokens(LONG).split(500, dim=1):
            read(long_model, cache, chunk)
        return cache

    @pytest.mark.parametrize("num_rows", [1, 3])
    def test_in_steps_by_the_operators(self, long_model, cache, monkeypatch, num_rows):
        """Of the layers that choose: dense ones read all."""
        emulate(monkeypatch)
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(num_rows)
        for layer in cache.layers:
            layer.storage.move(slice(None), layer.capacity)  # to what is served by operators
        layer = cache.layers[3]
        query = torch.randn(num_rows, 4, 1, 16)
        with Elsewhere() as elsewhere:
            step_of(layer, query)
        assert elsewhere.most < self.of_keys / 4

    def test_in_steps_in_pytorch(self, cache):
        with Elsewhere() as elsewhere:
            step_of(cache.layers[3], torch.randn(1, 4, 1, 16))
        assert elsewhere.most < self.of_keys / 4

    def test_when_it_grows_and_rows_change(self, cache):
        layer = cache.layers[3]
        with Elsewhere() as elsewhere:
            layer.storage.make_room(2 * LONG)
            layer.batch_repeat_interleave(3)
            layer.reorder_cache(torch.tensor([2, 2, 0]))
            layer.batch_select_indices(torch.tensor([1]))
            layer.crop(-5)
        assert elsewhere.most <= self.of_keys / 2  # a head, while rows change places

    def test_a_chunk_of_a_prompt_has_the_keys_of_a_layer_and_the_next_at_a_time(self, long_model, cache, monkeypatch):
        live, came, at_hand = [], [], Offloaded.at_hand

        def counted(storage, keys, values):
            came.append(storage.coming is not None)
            assert not any(reference() is not None for reference in live)
            copies = at_hand(storage, keys, values)
            assert torch.equal(copies[0], keys)
            assert torch.equal(copies[1], values)
            assert not any(host.holds(tensor) for tensor in copies)
            live.extend(weakref.ref(tensor.untyped_storage()) for tensor in copies)
            return copies

        monkeypatch.setattr(Offloaded, "at_hand", counted)
        read(long_model, cache, tokens(500, seed=3))
        assert came == [True, True]
        assert len(live) == 4
        assert not any(reference() is not None for reference in live)

    def test_what_came_for_a_forward_that_did_not_end_is_not_attended(self, model):
        expected, cache = (read(model, cache) for cache in both())
        for each in (expected, cache):
            with pytest.raises(Stopped):
                stopped(model, each, tokens(20, seed=3))
            with pytest.raises(QuestError, match="did not end"):
                read(model, each, tokens(20, seed=3))
            each.crop(-50)
            read(model, each, tokens(50, seed=4))
        assert cache.get_seq_length() == PROMPT
        assert torch.equal(*(read_logits(model, each, tokens(20, seed=5)) for each in (expected, cache)))


class Stopped(Exception):
    pass


def stopped(model, cache, ids):
    """A forward that ends in the MLP of layer 2, when the keys of layer 3 have come."""

    def stop(*arguments):
        assert not isinstance(cache.layers[3].storage, Offloaded) or cache.layers[3].storage.coming is not None
        raise Stopped

    hook = model.model.layers[2].mlp.register_forward_pre_hook(stop)
    try:
        read(model, cache, ids)
    finally:
        hook.remove()


@torch.no_grad()
def read_logits(model, cache, ids):
    return model(ids, **{CACHE_NAME: cache}).logits


def step_of(layer, query):
    """A step of one layer, as its attention does it."""
    new = torch.randn(query.shape[0], 2, 1, 16)
    layer.update(new, new.clone())
    return attend(layer, query, Logits(0.25))


class TestFaults:
    def test_too_little_memory_is_said_before_anything_is_read(self, model, monkeypatch):
        monkeypatch.setattr(host, "available", lambda: 100_000)
        cache = QuestCache(BUDGET, offloading=True)
        with pytest.raises(QuestError, match=r"offloading=True take [\d,]+ bytes of host memory, of which 100,000"):
            read(model, cache)
        assert cache.get_seq_length() == 0
        monkeypatch.undo()
        assert_same(read(model, cache), read(model, QuestCache(BUDGET)))

    def test_a_prompt_that_finds_no_room_to_grow_leaves_the_cache_as_it_was(self, model, monkeypatch):
        expected, cache = (read(model, cache) for cache in both())
        monkeypatch.setattr(host, "available", lambda: 0)
        with pytest.raises(QuestError, match="What the cache held is unchanged"):
            read(model, cache, tokens(600, seed=3))
        assert cache.get_seq_length() == PROMPT
        monkeypatch.undo()
        assert_same(cache, expected)
        ids = tokens(600, seed=4)
        assert_same(read(model, cache, ids), read(model, expected, ids))

    @pytest.mark.parametrize(
        ("family", "num_given"), [("llama", 0), ("llama", 1), ("llama", 2), ("llama", 3), ("gemma3", 0), ("gemma3", 1)]
    )
    def test_memory_that_the_system_does_not_give(self, models, monkeypatch, family, num_given):
        """In the middle of a forward, after some layers had theirs."""
        model = models[family]
        expected, cache = (read(model, cache) for cache in both())
        given, is_over, make = [], [False], mmap.mmap

        def fail(*arguments, **options):
            if not is_over[0] and len(given) == num_given:
                raise OSError(12, "Cannot allocate memory")
            given.append(arguments)
            return make(*arguments, **options)

        monkeypatch.setattr(mmap, "mmap", fail)
        with pytest.raises(QuestError, match=r"which the system does not give: .*Cannot allocate memory"):
            read(model, cache, tokens(600, seed=3))
        assert cache.get_seq_length() == PROMPT
        is_over[0] = True
        assert_same(cache, expected)
        ids = tokens(600, seed=4)
        assert_same(read(model, cache, ids), read(model, expected, ids))

    @pytest.mark.parametrize("num_given", [0, 3])
    def test_memory_that_the_system_does_not_give_at_first(self, model, monkeypatch, num_given):
        """What it gave goes back at once, and no layer has stored anything."""
        gc.collect()
        given, make, before = [], mmap.mmap, dict(host.blocks)

        def fail(*arguments, **options):
            if len(given) == num_given:
                raise OSError(12, "Cannot allocate memory")
            given.append(arguments)
            return make(*arguments, **options)

        monkeypatch.setattr(mmap, "mmap", fail)
        cache = QuestCache(BUDGET, offloading=True)
        with pytest.raises(QuestError, match="which the system does not give"):
            read(model, cache)
        monkeypatch.undo()
        gc.collect()
        assert host.blocks == before
        assert [layer.length for layer in cache.layers] == [0]
        assert_same(read(model, cache), read(model, QuestCache(BUDGET)))

    def test_while_generate_writes(self, model, monkeypatch):
        """What was written so far is stored, and the text goes on when there is memory."""
        ids, cache = tokens(PROMPT), QuestCache(BUDGET, offloading=True)
        expected = generate(model, ids, QuestCache(BUDGET), max_new_tokens=400)
        make, limit = host.new_block, 2 * 500 * 16 * 4

        def fail(num_bytes, device):
            if num_bytes > limit:
                raise host.no_memory(num_bytes, "for a test")
            return make(num_bytes, device)

        monkeypatch.setattr(host, "new_block", fail)
        with pytest.raises(QuestError, match="for a test"):
            generate(model, ids, cache, max_new_tokens=400)
        num_stored = cache.get_seq_length()
        assert num_stored > PROMPT
        monkeypatch.undo()
        so_far = expected[:, : num_stored + 1]
        rest = generate(model, so_far, cache, max_new_tokens=expected.shape[1] - so_far.shape[1])
        assert torch.equal(rest, expected)

    def test_a_copy_that_finds_no_memory_leaves_the_original(self, model, monkeypatch):
        expected, cache = (read(model, cache) for cache in both())
        monkeypatch.setattr(host, "available", lambda: 0)
        with pytest.raises(QuestError, match="host memory"):
            copy.deepcopy(cache)
        monkeypatch.undo()
        assert_same(cache, expected)

    def test_devices_whose_kernels_do_not_reach_it(self):
        with pytest.raises(QuestError, match=r"for NVIDIA GPUs under Linux.* and this model is on mps"):
            host.empty((1, 2, 3), torch.float32, torch.device("mps"))

    @pytest.mark.parametrize("wrong", ["cpu", 1, None])
    def test_what_is_no_yes_or_no(self, wrong):
        with pytest.raises(ValueError, match="offloading is True or False, not"):
            QuestCache(offloading=wrong)

    def test_methods_that_evict(self):
        with pytest.raises(ValueError, match="leave offloading out"):
            MethodCache(H2OCache().method, offloading=True)


class TestAvailable:
    def test_what_the_system_says_is_some_of_its_memory(self):
        assert 0 < host.available() < 2**50

    @pytest.mark.parametrize("names", host.GROUPS, ids=["second version", "first version"])
    def test_what_a_control_group_has_left(self, tmp_path, names):
        limit, use, statistics, spare = names
        (tmp_path / limit).parent.mkdir(exist_ok=True)
        (tmp_path / limit).write_text("1000\n")
        (tmp_path / use).write_text("700\n")
        (tmp_path / statistics).write_text(f"anon 5\n{spare} 150\n")
        assert host.left_of_group(*names, folder=tmp_path) == 450
        (tmp_path / limit).write_text("max\n")
        assert host.left_of_group(*names, folder=tmp_path) == math.inf
        assert host.left_of_group(*names, folder=tmp_path / "none") == math.inf
