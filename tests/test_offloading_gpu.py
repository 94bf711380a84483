"""With `offloading=True` on a GPU: the tokens are the same to the bit, and the GPU's memory has none of the keys."""

import copy
import gc
import pickle

import pytest
import torch
from small_llama import ANSWER, BUDGET, PROMPT, generate, make_model, tokens
from test_gpu import digest_of, library, write  # noqa: F401, a fixture too
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

from hf_quest import CACHE_NAME, CritiPrefill, QuestCache, QuestError, capture, decode_ahead, tiny
from hf_quest.kernels import ops
from hf_quest.storage import Offloaded, host
from hf_quest.storage.pool import TOKEN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "drafts": {"prompt_lookup_num_tokens": 4},
    "chunks": {"prefill_chunk_size": 37},
    "ahead": {"custom_generate": decode_ahead},
    "long": {"max_new_tokens": 300},
}
METHODS = {"pages": {}, "codes": {"codes": 2}, "wide bounds": {"bounds_dtype": None}}
SERVED = {"hidden_size": 256, "num_hidden_layers": 4, "dtype": torch.bfloat16}  # whose head dim the kernels serve


def both(budget=256, **options):
    """A cache in the GPU's memory, and one with offloading."""
    return [QuestCache(budget, offloading=offloading, **options) for offloading in (False, True)]


@torch.no_grad()
def prefilled(model, ids, cache):
    model(ids[:, :-1], **{CACHE_NAME: cache}, logits_to_keep=1)
    return cache


def assert_in_place(cache):
    chosen = [layer for layer in cache.layers if isinstance(layer.storage, Offloaded)]
    assert chosen
    for layer in chosen:
        assert all(host.holds(tensor) and tensor.is_cuda for tensor in (layer.keys, layer.values))
        assert not any(host.holds(tensor) for tensor in layer.storage.beside.values())


def assert_same(cache, expected):
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        (tensors, facts), (others, other_facts) = layer.saved(), other.saved()
        assert facts == other_facts
        assert all(torch.equal(tensor.cpu(), others[name].cpu()) for name, tensor in tensors.items())


class TestHostMemory:
    """What kernels and copies do with a tensor of the GPU in host memory."""

    def test_operations_of_the_gpu_read_and_write_it(self):
        device = torch.device("cuda", torch.cuda.current_device())
        before = torch.cuda.memory_allocated()
        tensor = host.empty((3, 1 << 20), torch.bfloat16, device)
        assert torch.cuda.memory_allocated() == before
        assert tensor.device == device
        content = torch.randn(3, 1 << 20, device="cuda").bfloat16()
        tensor.copy_(content)
        tensor[1] *= 2
        content[1] *= 2
        assert torch.equal(tensor, content)
        assert torch.equal(host.seen_by_cpu(tensor), content.cpu())
        rows = torch.tensor([2, 0], device="cuda")
        assert torch.equal(tensor.index_select(0, rows), content.index_select(0, rows))
        on_device = torch.empty_like(content)
        on_device.copy_(host.seen_by_cpu(tensor, waits=False), non_blocking=True)
        assert torch.equal(on_device, content)

    def test_it_takes_what_was_asked_for_and_goes_with_its_tensor(self):
        gc.collect()
        before, allocated = dict(host.blocks), torch.cuda.memory_allocated()
        tensor = host.empty((3, 1000), torch.float32, torch.device("cuda", 0))
        assert sum(host.blocks.values()) == sum(before.values()) + 12000
        part = tensor[1:].flatten()[5:]
        del tensor
        assert len(host.blocks) == len(before) + 1
        part.fill_(1)
        del part
        assert host.blocks == before
        assert torch.cuda.memory_allocated() == allocated

    def test_after_memory_that_cannot_be_pinned_the_gpu_goes_on(self, monkeypatch):
        """CUDA refuses what is registered already, and then PyTorch cannot pin either."""
        memory = host.block_of_cpu(1 << 20)
        first, unpin = registered_again(memory, monkeypatch)
        monkeypatch.setattr(torch, "empty", failing_to_pin(torch.empty))
        with pytest.raises(QuestError, match="which CUDA cannot pin"):
            host.registered(1 << 20, torch.device("cuda", 0))
        assert torch.ones(3, device="cuda").sum() == 3  # no error is left behind
        monkeypatch.undo()
        unpin()
        del first

    def test_a_driver_that_registers_none_gives_some_of_its_own(self, monkeypatch):
        memory = host.block_of_cpu(1 << 20)
        _, unpin = registered_again(memory, monkeypatch)
        tensor = host.empty((1 << 20,), torch.uint8, torch.device("cuda", 0))
        tensor.fill_(7)
        assert (host.seen_by_cpu(tensor) == 7).all()
        monkeypatch.undo()
        unpin()


def registered_again(memory, monkeypatch):
    """Have the next blocks be this one, which is registered."""
    monkeypatch.setattr(host, "block_of_cpu", lambda num_bytes: memory)
    return host.registered(len(memory), torch.device("cuda", 0))


def failing_to_pin(empty):
    def fail(*arguments, **options):
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return empty(*arguments, **options)

    return fail


class TestTheSameTokens:
    @pytest.fixture(scope="class")
    def models(self):
        return {
            "kernels": make_model(**SERVED).cuda(),
            "pytorch": make_model().cuda(),
            "gemma3": tiny_gemma(),
        }

    @pytest.mark.parametrize("options", MODES.values(), ids=MODES)
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", ["kernels", "pytorch", "gemma3"])
    def test_in_every_mode_of_generate(self, models, name, method, options):
        ids = tokens(PROMPT // 2).repeat(1, 2).cuda()
        answers = []
        for cache in both(BUDGET, compile=False, **METHODS[method]):
            torch.manual_seed(0)
            answers.append(generate(models[name], ids, cache, **{"max_new_tokens": ANSWER, **options}))
        assert_in_place(cache)
        assert torch.equal(*answers)

    @pytest.mark.parametrize("prefill", [None, CritiPrefill(budget=256, segment_size=128, threshold=512)], ids=str)
    @pytest.mark.parametrize("chunk", [None, 700])
    def test_of_padded_rows(self, models, prefill, chunk):
        ids = tokens(1900, batch_size=2).cuda()
        ids[1, :777] = 0
        expected, output = (
            generate(models["kernels"], ids, cache, attention_mask=(ids > 0).long(), prefill_chunk_size=chunk)
            for cache in both(BUDGET, prefill=prefill, compile=False)
        )
        assert torch.equal(output, expected)

    @pytest.mark.parametrize("name", ["kernels", "pytorch"])
    def test_after_everything_that_is_done_to_caches(self, models, name, tmp_path):
        model, found = models[name], []
        with torch.no_grad():
            for idx, cache in enumerate(both(BUDGET, codes=2)):
                model(tokens(PROMPT).cuda(), **{CACHE_NAME: cache})
                cache.batch_repeat_interleave(3)
                model(tokens(5, seed=3, batch_size=3).cuda(), **{CACHE_NAME: cache})
                cache.reorder_cache(torch.tensor([1, 2, 0]).cuda())
                cache.crop(-3)
                cache.batch_select_indices(torch.tensor([2, 0]).cuda())
                for layer in cache.layers:
                    layer.offload()
                cache = copy.deepcopy(cache)
                model(tokens(1, seed=4, batch_size=2).cuda(), **{CACHE_NAME: cache})
                cache = pickle.loads(pickle.dumps(cache))
                model(tokens(700, seed=5, batch_size=2).cuda(), **{CACHE_NAME: cache})
                cache.save(tmp_path / str(idx), model)
                cache = QuestCache.load(tmp_path / str(idx), model)
                model(tokens(1, seed=6, batch_size=2).cuda(), **{CACHE_NAME: cache})
                found.append(cache)
        assert_in_place(found[1])
        assert_same(*found)

    def test_of_a_cache_from_stock(self, models):
        ids, stock = tokens(PROMPT).cuda(), DynamicCache()
        prefilled(models["kernels"], ids, stock)
        expected, output = (
            generate(models["kernels"], ids, QuestCache.from_cache(stock, BUDGET, offloading=offloading, compile=False))
            for offloading in (False, True)
        )
        assert torch.equal(output, expected)

    def test_a_long_text_of_the_tiny_model(self, library):  # noqa: F811
        model = tiny.load(attn_implementation="quest", dtype=torch.bfloat16)[0].cuda().eval()
        ids = digest_of(library, 16384)
        expected, output = (
            write(model, ids, prefilled(model, ids, cache), 64, disable_compile=True)[0] for cache in both(codes=2)
        )
        assert torch.equal(output, expected)


def tiny_gemma():
    from test_local import build

    return copy.deepcopy(build("gemma3")).cuda()


class TestGraphs:
    """One graph for caches in either place."""

    @pytest.mark.parametrize("method", ["pages", "codes"])
    def test_compiled_by_generate(self, library, method):  # noqa: F811
        torch.compiler.reset()
        model = tiny.load(attn_implementation="quest", dtype=torch.bfloat16)[0].cuda().eval()
        ids, config = digest_of(library, 4096), CompileConfig(fullgraph=True)
        skips = counters["inductor"]["cudagraph_skips"]
        expected, output = (
            write(model, ids, prefilled(model, ids, cache), 300, compile_config=config)[0]
            for cache in both(**METHODS[method])
        )
        assert torch.equal(output, expected)
        assert counters["inductor"]["cudagraph_skips"] == skips

    @pytest.mark.parametrize("options", [{}, {"custom_generate": decode_ahead}], ids=["generate", "ahead"])
    @pytest.mark.parametrize("method", ["pages", "codes"])
    def test_captured(self, library, method, options):  # noqa: F811
        model = capture(tiny.load(attn_implementation="quest", dtype=torch.bfloat16)[0].cuda().eval())
        ids = digest_of(library, 4096)
        answers = []
        for cache in both(**METHODS[method]):
            prefilled(model, ids, cache)
            output = generate(model, ids, cache, max_new_tokens=300, min_new_tokens=300, **options)
            assert model._compiled_call.recording.cache() is cache
            answers.append(output)
        assert_in_place(cache)
        assert torch.equal(*answers)

    def test_a_step_waits_for_nothing(self, library):  # noqa: F811
        model = tiny.load(attn_implementation="quest", dtype=torch.bfloat16)[0].cuda().eval()
        ids = digest_of(library, 2000)
        cache = prefilled(model, ids, QuestCache(256, codes=2, offloading=True))
        token = ids[:, -1:]
        with torch.no_grad():
            model(token, **{CACHE_NAME: cache})
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(3):
                    model(token, **{CACHE_NAME: cache})
            finally:
                torch.cuda.set_sync_debug_mode("default")


needs_clusters = pytest.mark.skipif(
    not torch.cuda.is_available() or not ops.has_pools(torch.device("cuda"), 1), reason="needs a GPU with clusters"
)


@needs_clusters
class TestPool:
    """What steps attended lately is read from the GPU's memory, and what is not there any more is not."""

    @pytest.fixture(scope="class")
    def model(self):
        return tiny.load(attn_implementation="quest", dtype=torch.bfloat16)[0].cuda().eval()

    @pytest.fixture(params=[False, True], ids=["eager", "captured"])
    def options(self, request, model):
        """Of `generate`, with a model that is captured or not."""
        if not request.param:
            yield {"disable_compile": True}
            return
        capture(model)
        yield {}
        del model._compiled_call, model.get_compiled_call

    def pools(self, cache):
        return [layer.storage.pool for layer in cache.layers if layer.storage.pool is not None]

    @pytest.mark.parametrize("pool", [256, None, 4096])
    def test_most_is_found_and_tokens_are_the_same(self, model, library, options, pool):  # noqa: F811
        ids, answers = digest_of(library, 8192), []
        for cache in (QuestCache(256, codes=2), QuestCache(256, codes=2, offloading=True, pool=pool)):
            prefilled(model, ids, cache)
            answers.append(generate(model, ids, cache, max_new_tokens=200, min_new_tokens=200, **options))
        looked_up, found = cache.pool_counts
        assert torch.equal(*answers)
        num_heads = sum(pool.tags.shape[1] for pool in self.pools(cache))
        assert 150 * num_heads * 200 < looked_up <= 300 * num_heads * 256
        assert found > looked_up * (0.2 if pool == 256 else 0.5)

    def test_what_is_there_is_what_is_stored(self, model, library, options):  # noqa: F811
        ids = digest_of(library, 4096).repeat(2, 1)
        cache = prefilled(model, ids, QuestCache(256, codes=2, offloading=True))
        generate(model, ids, cache, max_new_tokens=50, min_new_tokens=50, **options)
        for layer in cache.layers[cache.dense_layers :]:
            pool, there = layer.storage.pool, layer.storage.pool.tags != 0
            assert there.any(dim=-1).all()
            tokens_there = pool.tags & TOKEN
            assert (tokens_there[there] < layer.length).all()
            for pooled, stored in ((pool.keys, layer.keys), (pool.values, layer.values)):
                rows = stored.gather(2, tokens_there[..., None].expand(*tokens_there.shape, stored.shape[-1]))
                assert torch.equal(pooled[there], rows[there])

    def test_what_is_there_is_not_read_from_the_host(self, model, library):  # noqa: F811
        ids = digest_of(library, 4096)
        cache = prefilled(model, ids, QuestCache(256, codes=2, offloading=True, pool=4096))
        token = ids[:, -1:]
        with torch.no_grad():
            for _ in range(2):
                expected = model(token, **{CACHE_NAME: cache}).logits
                cache.crop(-1)
            for layer in cache.layers[cache.dense_layers :]:
                for row, head, slot in (layer.storage.pool.tags != 0).nonzero().tolist():
                    place = (row, head, int(layer.storage.pool.tags[row, head, slot]) & TOKEN)
                    layer.keys[place], layer.values[place] = torch.nan, torch.nan
            assert torch.equal(model(token, **{CACHE_NAME: cache}).logits, expected)

    def test_texts_that_are_taken_back_and_go_on_otherwise(self, model, library, options):  # noqa: F811
        ids, answers = digest_of(library, 3000), []
        for cache in both(codes=2):
            prefilled(model, ids, cache)
            output = generate(model, ids, cache, max_new_tokens=100, min_new_tokens=100, **options)
            for seed, num_removed in enumerate((1, 17, 90, 2500)):
                kept = output[:, : cache.get_seq_length() - num_removed]
                cache.crop(-num_removed)
                ids_now = torch.cat([kept, tokens(num_removed, seed=seed).cuda() % 200], dim=1)
                output = generate(model, ids_now, cache, max_new_tokens=60, min_new_tokens=60, **options)
                answers.append(output)
        half = len(answers) // 2
        assert all(torch.equal(*pair) for pair in zip(answers[:half], answers[half:], strict=True))
        assert cache.pool_counts[1] > 0

    def test_rows_that_change_places_while_they_are_decoded(self, model, library):  # noqa: F811
        ids = digest_of(library, 3000)
        expected, output = (
            generate(model, ids, prefilled(model, ids, cache), max_new_tokens=60, num_beams=3)
            for cache in both(codes=2)
        )
        assert torch.equal(output, expected)

    def test_a_batch_for_which_clusters_do_not_fit_has_no_use_of_it(self, model, library):  # noqa: F811
        ids = digest_of(library, 1000).repeat(48, 1)
        caches = both(codes=2)
        expected, output = (
            generate(model, ids, prefilled(model, ids, cache), max_new_tokens=5, disable_compile=True)
            for cache in caches
        )
        assert torch.equal(output, expected)


class TestComing:
    """What comes to the GPU on a stream of its own, while the layer before computes."""

    @pytest.mark.parametrize("prefill", [None, CritiPrefill(budget=512, segment_size=128, threshold=1024)], ids=str)
    def test_long_prompts_in_parts_are_read_the_same_to_the_bit(self, prefill):
        """Parts of a length at which copies take as long as the layers, so that a race would be seen."""
        model = make_model(**SERVED | {"num_hidden_layers": 8}, max_position_embeddings=1 << 17).cuda()
        ids, logits = tokens(1 << 15).cuda(), []
        with torch.no_grad():
            for cache in both(prefill=prefill):
                outputs = [model(part, **{CACHE_NAME: cache}, logits_to_keep=8).logits for part in ids.split(2048, 1)]
                logits.append(torch.cat(outputs))
        assert torch.equal(*logits)

    def test_what_nobody_took_is_not_written_over_others(self):
        """The copy goes on while its memory has been given back."""
        model = make_model(**SERVED, max_position_embeddings=1 << 18).cuda()
        cache = QuestCache(256, offloading=True)
        with torch.no_grad():
            for part in tokens(1 << 17).cuda().split(8192, dim=1):
                model(part, **{CACHE_NAME: cache}, logits_to_keep=1)
        storage = cache.layers[3].storage
        for _ in range(20):
            storage.come(8)
            storage.begin_forward()
            others = [torch.full_like(storage.keys, 7.0, memory_format=torch.contiguous_format) for _ in range(3)]
            torch.cuda.synchronize()
            assert all(bool((other == 7).all()) for other in others)


class TestMemory:
    def test_the_gpu_has_none_of_the_keys(self):
        """Of layers that choose: 65,536 tokens of 2 layers of 2 heads of 64 channels take 67 MB."""
        model, num_tokens = make_model(**SERVED, max_position_embeddings=1 << 17).cuda(), 1 << 16
        gc.collect()  # of what other tests have left
        before, used, caches = torch.cuda.memory_allocated(), [], both()
        while caches:
            cache = caches.pop(0)  # and let go before the next one is filled
            with torch.no_grad():
                for chunk in tokens(num_tokens).cuda().split(4096, dim=1):
                    model(chunk, **{CACHE_NAME: cache}, logits_to_keep=1)
            used.append(torch.cuda.memory_allocated() - before)
            chosen = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers[2:])
            del cache
            gc.collect()
        assert used[0] - used[1] == pytest.approx(chosen, rel=0.02)  # which the allocator rounds

    def test_a_step_brings_none_of_them(self):
        model, num_tokens = make_model(**SERVED, max_position_embeddings=1 << 17).cuda(), 1 << 16
        cache = QuestCache(BUDGET, codes=2, offloading=True)
        with torch.no_grad():
            for chunk in tokens(num_tokens).cuda().split(4096, dim=1):
                model(chunk, **{CACHE_NAME: cache}, logits_to_keep=1)
            model(tokens(1).cuda(), **{CACHE_NAME: cache})
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(tokens(1).cuda(), **{CACHE_NAME: cache})
        assert torch.cuda.max_memory_allocated() - before < cache.layers[3].keys.nbytes / 4

    def test_host_memory_that_is_not_there_is_said_at_once(self, monkeypatch):
        model, cache = make_model(**SERVED).cuda(), QuestCache(BUDGET, offloading=True, compile=False)
        monkeypatch.setattr(host, "available", lambda: 1000)
        with pytest.raises(QuestError, match="bytes of host memory"), torch.no_grad():
            model(tokens(PROMPT).cuda(), **{CACHE_NAME: cache})
        monkeypatch.undo()
        expected = generate(model, tokens(PROMPT).cuda(), QuestCache(BUDGET, compile=False))
        assert torch.equal(generate(model, tokens(PROMPT).cuda(), cache), expected)
