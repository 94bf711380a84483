"""On a GPU, rows that begin alike keep that once: the tokens are those of copies to the bit, the memory a fraction."""

import contextlib
import copy
import gc
import os

import pytest
import torch
from copied_rows import copying
from small_llama import generate, make_model
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_quest import CACHE_NAME, QuestCache, capture, decode_ahead
from hf_quest.storage import host, mapped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# What the device lacks is of all processes that use it, and other tests may be among them.
is_alone = "PYTEST_XDIST_WORKER" not in os.environ
PROMPT, QUESTION, ANSWER, ROWS, BUDGET = 20_000, 7, 40, 4, 512  # tokens; of a head of 128, 2 MB hold 8,192
METHODS = {"pages": {}, "codes": {"codes": 2}, "wide bounds": {"bounds_dtype": None}}


@pytest.fixture(scope="module")
def model():
    options = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 65536}
    return make_model(dtype=torch.bfloat16, num_hidden_layers=3, **options).cuda()


def ids(num_tokens, seed, num_rows=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (num_rows, num_tokens), generator=generator).cuda()


@pytest.fixture(scope="module")
def document(model):
    """A cache of one row, for copies, that has read a long prompt."""
    cache = QuestCache(BUDGET, codes=2)
    with torch.no_grad():
        model(ids(PROMPT, 1), **{CACHE_NAME: cache}, logits_to_keep=1)
    return cache


def repeated(model, num_rows=ROWS, **options):
    """Caches of rows that have read the same: one that shares, and one that copies."""
    caches = []
    for mode in (contextlib.nullcontext, copying):
        cache = QuestCache(BUDGET, **options)
        with torch.no_grad(), mode():
            model(ids(PROMPT, 1), **{CACHE_NAME: cache}, logits_to_keep=1)
            cache.batch_repeat_interleave(num_rows)
        caches.append(cache)
    assert all(layer.storage.prefix is not None for layer in caches[0].layers)
    assert all(layer.storage.prefix is None for layer in caches[1].layers)
    return caches


def text(num_rows=ROWS):
    """The prompt, and a question of each row's own."""
    return torch.cat([ids(PROMPT, 1).expand(num_rows, -1), ids(QUESTION, 2, num_rows)], dim=1)


def assert_same(caches):
    for mine, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        pairs = zip(mine.storage.filled(), theirs.storage.filled(), strict=True)
        num_pages = mine.length // 16  # of the last one, bounds are not those of a full page
        for idx, (one, other) in enumerate(pairs):
            end = num_pages if idx > 1 and one.shape[2] < mine.length else num_pages * 16
            assert torch.equal(one[:, :, :end], other[:, :, :end])


class TestMapped:
    def test_a_piece_is_seen_at_all_its_addresses_and_goes_with_the_last(self):
        device = torch.device("cuda", torch.cuda.current_device())
        memory = mapped.memory_of(device)
        assert isinstance(memory, mapped.OfGPU)
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        piece, size = memory.new_piece(64 * memory.granule), 65 * memory.granule
        block = memory.mapped([[piece]] * 16, size, [piece])
        assert block.device == device
        taken = before - torch.cuda.mem_get_info()[0]
        # 80, but for what the driver has at hand, or takes for itself. Of rows that are copies it would be 1,104.
        assert not is_alone or 64 * memory.granule < taken < 100 * memory.granule
        rows = block[: 16 * size].view(16, -1)
        rows[:, 64 * memory.granule :] = torch.arange(16, dtype=torch.uint8, device=device)[:, None]
        rows[3, : 64 * memory.granule] = 9
        assert (rows[:, : 64 * memory.granule] == 9).all()
        assert (block[16 * size :] == 9).all()
        assert rows[:, -1].tolist() == list(range(16))
        del piece, rows
        assert int(block[5]) == 9
        del block
        gc.collect()
        host.release_waiting()
        assert not is_alone or before - torch.cuda.mem_get_info()[0] < 4 * memory.granule

    def test_what_it_gives_back_while_a_graph_is_recorded_waits(self):
        device = torch.device("cuda", torch.cuda.current_device())
        memory = mapped.memory_of(device)
        block, graph, tensor = memory.mapped([[]], memory.granule, []), torch.cuda.CUDAGraph(), torch.ones(3).cuda()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            tensor += 1
            del block
        graph.replay()
        assert tensor.tolist() == [2, 2, 2]
        assert host.waiting
        memory.mapped([[]], memory.granule, [])
        assert not host.waiting


class TestTheSameTokens:
    @pytest.mark.parametrize("method", METHODS)
    def test_in_eager_steps(self, model, method):
        caches = repeated(model, compile=False, **METHODS[method])
        outputs = [generate(model, text(), cache, max_new_tokens=ANSWER) for cache in caches]
        assert torch.equal(*outputs)
        assert_same(caches)

    @pytest.mark.parametrize("method", ["pages", "codes"])
    def test_compiled_by_generate(self, model, method):
        torch.compiler.reset()
        skips = counters["inductor"]["cudagraph_skips"]
        config = CompileConfig(fullgraph=True)
        caches = repeated(model, **METHODS[method])
        outputs = [generate(model, text(), cache, max_new_tokens=ANSWER, compile_config=config) for cache in caches]
        assert torch.equal(*outputs)
        assert_same(caches)
        assert counters["inductor"]["cudagraph_skips"] == skips

    @pytest.mark.parametrize("options", [{}, {"custom_generate": decode_ahead}], ids=["generate", "ahead"])
    def test_captured(self, options):
        captured = capture(
            make_model(dtype=torch.bfloat16, hidden_size=512, num_hidden_layers=3, max_position_embeddings=65536).cuda()
        )
        caches = repeated(captured, codes=2)
        outputs = [generate(captured, text(), cache, max_new_tokens=ANSWER, **options) for cache in caches]
        assert captured._compiled_call.recording.cache() is caches[1]
        assert torch.equal(*outputs)
        # After a crop the recorded step stores its token where nobody else sees it.
        other = copy.deepcopy(caches[0])
        expected = [layer.storage.keys[:, :, :PROMPT].clone() for layer in other.layers]
        for cache in caches:
            cache.crop(PROMPT - 100 - cache.get_seq_length())
        outputs = [generate(captured, text()[:, : PROMPT - 50], cache, max_new_tokens=ANSWER) for cache in caches]
        assert torch.equal(*outputs)
        stored = [layer.storage.keys[:, :, :PROMPT] for layer in other.layers]
        assert all(torch.equal(*pair) for pair in zip(stored, expected, strict=True))

    @pytest.mark.parametrize(
        "options", [{"num_beams": ROWS}, {"num_return_sequences": ROWS, "do_sample": True}], ids=["beams", "sampled"]
    )
    def test_of_one_row_that_generate_repeats(self, model, document, options):
        outputs = []
        for mode in (contextlib.nullcontext, copying):
            cache = copy.deepcopy(document)
            torch.manual_seed(0)
            with mode():
                outputs.append(generate(model, text(1), cache, max_new_tokens=ANSWER, **options))
            assert (cache.layers[0].storage.prefix is None) == (mode is copying)
        assert torch.equal(*outputs)

    def test_whatever_is_done(self, model):
        def step(cache, num_tokens, seed):
            with torch.no_grad():
                new = ids(num_tokens, seed, len(cache.left_padding))
                return model(new, **{CACHE_NAME: cache}, logits_to_keep=1).logits

        def away(cache):
            for layer in cache.layers:
                layer.offload()
            assert not any(layer.keys.is_cuda for layer in cache.layers)

        caches = repeated(model, codes=2)
        for idx, change in enumerate(
            [
                lambda cache: None,
                lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0, 3])),
                away,
                lambda cache: step(cache, 9000, 77),  # grows
                lambda cache: cache.batch_repeat_interleave(2),
                lambda cache: cache.batch_select_indices(torch.tensor([5, 4, 1, 1])),
                lambda cache: cache.crop(-9050),
                lambda cache: cache.reorder_cache(torch.tensor([1, 2, 3, 0])),
            ]
        ):
            for cache, mode in zip(caches, (contextlib.nullcontext, copying), strict=True):
                with mode():
                    change(cache)
            for num_tokens in (1, 5, 1):
                assert torch.equal(*(step(cache, num_tokens, idx) for cache in caches))
            assert all(layer.storage.prefix is not None for layer in caches[0].layers)
            assert_same(caches)


@pytest.mark.skipif(not is_alone, reason="other processes take memory of the device meanwhile: run it without -n")
class TestMemory:
    def test_a_prefix_is_there_once_and_goes_with_the_cache(self, model):
        gc.collect()
        torch.cuda.empty_cache()
        cache = QuestCache(BUDGET)
        with torch.no_grad():
            model(ids(PROMPT, 1), **{CACHE_NAME: cache}, logits_to_keep=1)
        gc.collect()
        torch.cuda.empty_cache()
        before, of_one = torch.cuda.mem_get_info()[0], sum(2 * layer.keys.nbytes for layer in cache.layers)
        cache.batch_repeat_interleave(32)
        gc.collect()
        torch.cuda.empty_cache()
        granule = mapped.memory_of(cache.layers[0].keys.device).granule
        of_ends = 3 * 2 * 2 * 32 * granule  # layers, keys and values, heads, rows
        beside = sum(each.nbytes for layer in cache.layers for each in layer.storage.beside.values())
        taken = before - torch.cuda.mem_get_info()[0]
        assert taken <= of_ends + beside + 40 * 2**20
        assert taken < 0.7 * 31 * of_one
        copies = [copy.deepcopy(cache) for _ in range(2)]
        taken = before - torch.cuda.mem_get_info()[0]
        assert taken <= 3 * (of_ends + beside) + 120 * 2**20
        del cache, copies
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.mem_get_info()[0] > before
