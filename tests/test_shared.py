"""Rows that begin alike keep that once: whatever is done to a cache, it holds what one that copies holds, to the bit,
and the memory of a prefix is there once. Shared ranges are read-only here, so that what writes there ends the tests.
"""

import contextlib
import copy
import ctypes
import gc
import pickle
import random
import weakref
from pathlib import Path

import pytest
import torch
from copied_rows import copying
from small_llama import ANSWER, feed, generate, make_model, tokens

from hf_quest import (
    CACHE_NAME,
    CritiPrefill,
    H2OCache,
    QuestCache,
    RecycledAttentionCache,
    SqueezedAttentionCache,
    TokenSelectCache,
)
from hf_quest.storage import Rows, mapped, shared
from hf_quest.storage.pages import Pages

CPU = torch.device("cpu")
PAGE = 4096  # bytes: of the small model's keys 64 tokens in a head
PROMPT, ROWS, BUDGET = 333, 4, 48  # tokens, in 5 whole units and a part of one

pytestmark = pytest.mark.skipif(mapped.memory_of(CPU) is None, reason="the system maps no memory several times")


@pytest.fixture(autouse=True)
def sealed(monkeypatch):
    """Short prefixes are shared, and nobody can write there."""
    monkeypatch.setattr(mapped.memory_of(CPU), "granule", PAGE)
    fill = shared.Prefix.fill

    def fill_and_seal(prefix, *arguments):
        fill(prefix, *arguments)
        seal(prefix)

    monkeypatch.setattr(shared.Prefix, "fill", fill_and_seal)


def seal(prefix):
    protect = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    protect = protect(("mprotect", ctypes.CDLL(None)))
    for tensor in prefix.tensors:
        num_bytes = (prefix.end + prefix.offset) * tensor.shape[3] * tensor.element_size()
        for address in addresses(prefix, tensor):
            assert protect(address, num_bytes, 1) == 0


def addresses(prefix, tensor):
    """Of the first unit of each row and head."""
    before = prefix.offset * tensor.shape[3] * tensor.element_size()
    return [head.data_ptr() - before for row in tensor for head in row]


@pytest.fixture(scope="module")
def model():
    return make_model(max_position_embeddings=4096)


@torch.no_grad()
def read(model, cache, num_tokens=PROMPT, seed=1):
    model(tokens(num_tokens, seed=seed), **{CACHE_NAME: cache})
    return cache


@torch.no_grad()
def step(model, cache, num_tokens=1, seed=0):
    rows = len(cache.left_padding)
    return model(tokens(num_tokens, seed=seed, batch_size=rows), **{CACHE_NAME: cache}).logits


def repeated(model, new_cache, num_rows=ROWS):
    """Two caches of rows that have read the same: one that shares, and one that copies."""
    caches = [read(model, new_cache()) for _ in range(2)]
    caches[0].batch_repeat_interleave(num_rows)
    with copying():
        caches[1].batch_repeat_interleave(num_rows)
    assert has_prefix(caches[0])
    assert not has_prefix(caches[1])
    return caches


def pages_of(cache):
    return [layer.storage for layer in cache.layers if isinstance(layer.storage, Pages)]


def has_prefix(cache):
    found = {storage.prefix is not None for storage in pages_of(cache)}
    assert len(found) == 1
    return found.pop()


def assert_same(caches):
    """That both hold the same."""
    sharing, copied = caches
    assert sharing.left_padding == copied.left_padding
    for mine, theirs in zip(sharing.layers, copied.layers, strict=True):
        mine, theirs = mine.up_to_date(), theirs.up_to_date()
        assert mine.length == theirs.length
        if isinstance(mine, Pages):
            assert all(torch.equal(*pair) for pair in zip(mine.filled(), theirs.filled(), strict=True))


def assert_go_on_alike(model, caches, seed=0):
    for num_tokens in (1, 1, 9, 1):
        outputs = []
        for cache, mode in zip(caches, (contextlib.nullcontext, copying), strict=True):
            with mode():
                outputs.append(step(model, cache, num_tokens, seed))
        assert torch.equal(*outputs)
    assert_same(caches)


KINDS = {
    "quest": lambda: QuestCache(BUDGET),
    "codes": lambda: QuestCache(BUDGET, codes=2),
    "bounds in 16 bits": lambda: QuestCache(BUDGET, bounds_dtype=None, dense_layers=0),
    "critiprefill": lambda: QuestCache(BUDGET, prefill=CritiPrefill(64, segment_size=32, block_size=16)),
    "room for all": lambda: QuestCache(BUDGET, max_cache_len=500),
    "token select": lambda: TokenSelectCache(BUDGET, num_first=4, num_newest=8),
    "recycled attention": lambda: RecycledAttentionCache(BUDGET),
    "squeezed attention": lambda: SqueezedAttentionCache(BUDGET),
    "the dense layers of h2o": lambda: H2OCache(BUDGET),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_on_as_copies_would(model, kind):
    caches = repeated(model, KINDS[kind])
    assert_same(caches)
    for seed in range(3):
        assert_go_on_alike(model, caches, seed)


def reordered(model, caches, folder):
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 1, 3, 0]))
    return caches


def selected(model, caches, folder):
    for cache in caches:
        cache.batch_select_indices(torch.tensor([3, 0]))
    return caches


def reduced_to_one(model, caches, folder):
    for cache in caches:
        cache.batch_select_indices(torch.tensor([2]))
    assert has_prefix(caches[0])  # which a copy may share, too
    return caches


def repeated_again(model, caches, folder):
    """What a row has of its own by now is shared by those that come from it."""
    for cache, mode in zip(caches, (contextlib.nullcontext, copying), strict=True):
        with mode():
            step(model, cache, 150, seed=5)
            cache.batch_repeat_interleave(2)
    assert {len(chain) for storage in pages_of(caches[0]) for chain in storage.prefix.chains} == {2}
    return caches


def mixed(model, caches, folder):
    """Rows of one prefix take the tokens of rows of another."""
    caches = repeated_again(model, caches, folder)
    for cache in caches:
        cache.reorder_cache(torch.tensor([7, 0, 2, 1, 6, 6, 3, 4]))
    return caches


def cropped(length):
    def crop(model, caches, folder):
        for cache in caches:
            cache.crop(length - cache.get_seq_length())
        return caches

    return crop


def begun_again(model, caches, folder):
    for cache in caches:
        cache.reset()
        step(model, cache, 70)
    return caches


def grown(model, caches, folder):
    for cache, mode in zip(caches, (contextlib.nullcontext, copying), strict=True):
        with mode():
            step(model, cache, 700)
    assert has_prefix(caches[0])
    return caches


def away_and_back(model, caches, folder):
    for layer in (layer for cache in caches for layer in cache.layers):
        layer.offload()
    return caches


def widened(model, caches, folder):
    for cache in caches:
        for layer in cache.layers:
            layer.storage.move(slice(None), layer.storage.capacity, torch.float64)
            layer.storage.move(slice(None), layer.storage.capacity, torch.float32)
    assert has_prefix(caches[0])
    return caches


def padded(model, caches, folder):
    for cache in caches:
        cache.set_left_padding((0, 3, 70, 0))
    return caches


def copied(model, caches, folder):
    copies = copy.deepcopy(caches)
    for cache in caches:  # which must not be seen in the copies
        cache.crop(-20)
        step(model, cache, 100, seed=8)
    assert has_prefix(copies[0])
    return copies


def originals(model, caches, folder):
    for cache in copy.deepcopy(caches):
        cache.crop(-20)
        step(model, cache, 100, seed=8)
    assert has_prefix(caches[0])
    return caches


def saved(model, caches, folder):
    for idx, cache in enumerate(caches):
        cache.save(folder / str(idx), model)
    return [QuestCache.load(folder / str(idx), model) for idx in range(2)]


@torch.inference_mode()
def copied_in_inference_mode(model, caches, folder):
    return copy.deepcopy(caches)


def used_in_inference_mode(model, caches, folder):
    for cache in caches:
        with torch.inference_mode():
            cache.batch_repeat_interleave(2)
            step(model, cache, 3)
            cache.batch_select_indices(torch.arange(4))
    return caches


def stopped(model, caches, folder):
    """A forward ends in the middle, and the next one says so and takes it back."""

    def stop(*arguments):
        raise InterruptedError

    handle = model.model.layers[2].register_forward_pre_hook(stop)
    for cache in caches:
        with pytest.raises(InterruptedError):
            step(model, cache)
    handle.remove()
    for cache in caches:
        with pytest.raises(RuntimeError, match="put back"):
            step(model, cache)
    return caches


CHANGES = {
    "reordered": reordered,
    "selected": selected,
    "reduced to one row": reduced_to_one,
    "repeated again": repeated_again,
    "mixed": mixed,
    "cropped to its prefix": cropped(PROMPT),
    "cropped into its prefix": cropped(PROMPT - 1),
    "cropped to a unit": cropped(PROMPT - 2 * 64),
    "cropped to its first tokens": cropped(10),
    "cropped to nothing": cropped(0),
    "begun again": begun_again,
    "grown": grown,
    "away and back": away_and_back,
    "widened": widened,
    "padded": padded,
    "deep-copied": copied,
    "the original of copies": originals,
    "pickled": lambda model, caches, folder: pickle.loads(pickle.dumps(caches)),
    "saved": saved,
    "copied in inference mode": copied_in_inference_mode,
    "used in inference mode": used_in_inference_mode,
    "stopped": stopped,
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_as_of_copies_whatever_is_done(model, tmp_path, change):
    caches = repeated(model, KINDS["codes"])
    for cache in caches:
        step(model, cache, 21, seed=2)
    caches = CHANGES[change](model, caches, tmp_path)
    assert_same(caches)
    for seed in range(2):
        assert_go_on_alike(model, caches, seed)


class Text:
    """Two caches to which the same is done at random."""

    def __init__(self, model, seed):
        self.model, self.random = model, random.Random(seed)
        self.caches = repeated(model, KINDS[self.random.choice(["quest", "codes", "room for all"])])
        self.kept = []  # copies, with what they held

    @property
    def length(self):
        return self.caches[0].get_seq_length()

    def each(self, change):
        for cache, mode in zip(self.caches, (contextlib.nullcontext, copying), strict=True):
            with mode():
                change(cache)

    def do_step(self):
        num_tokens = self.random.choice([1, 1, 1, 30, 130])
        if self.caches[0].max_cache_len is None or self.length + num_tokens <= self.caches[0].max_cache_len:
            seed = self.random.random()
            self.each(lambda cache: step(self.model, cache, num_tokens, int(seed * 1000)))

    def do_crop(self):
        removed = min(self.random.choice([1, 5, 64, self.length // 2]), self.length - 1)
        self.each(lambda cache: cache.crop(-removed))

    def do_rows(self):
        rows = len(self.caches[0].left_padding)
        sources = torch.tensor([self.random.randrange(rows) for _ in range(self.random.randint(1, 6))])
        self.each(lambda cache: cache.batch_select_indices(sources))

    def do_repeat(self):
        if len(self.caches[0].left_padding) <= 4:
            self.each(lambda cache: cache.batch_repeat_interleave(2))

    def do_reorder(self):
        rows = len(self.caches[0].left_padding)
        sources = torch.tensor([self.random.randrange(rows) for _ in range(rows)])
        self.each(lambda cache: cache.reorder_cache(sources))

    def do_copy(self):
        before, self.caches = self.caches, copy.deepcopy(self.caches)
        self.kept = [*self.kept[-2:], (before, [digest(cache) for cache in before])]


def digest(cache):
    return [tensor.clone() for storage in pages_of(cache) for tensor in storage.filled()[:2]]


@pytest.mark.parametrize("seed", range(8))
def test_it_is_as_of_copies_after_anything_at_random(model, seed):
    text = Text(model, seed)
    names = ["step", "step", "step", "crop", "rows", "repeat", "reorder", "copy"]
    for name in text.random.choices(names, k=40):
        getattr(text, f"do_{name}")()
        assert_same(text.caches)
        for caches, digests in text.kept:  # of what is done to a copy, nothing is seen in what it was made of
            for cache, expected in zip(caches, digests, strict=True):
                assert all(torch.equal(*pair) for pair in zip(digest(cache), expected, strict=True))


def proportional_bytes():
    """Physical memory in use of this process, in which a page with several addresses counts once."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for later
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class TestMemory:
    NUM_TOKENS, HEADS, DIM = 2**17, 2, 64  # so that the system has what PyTorch frees back at once

    def pages(self, num_tokens=NUM_TOKENS):
        pages = Pages(Rows(), None, 16, 16)
        new = torch.ones(1, self.HEADS, num_tokens, self.DIM)
        pages.begin_rows((0,))
        pages.append(new, new)
        return pages, 2 * new.nbytes

    def test_a_prefix_is_there_once(self):
        pages, num_bytes = self.pages()
        before = proportional_bytes()
        pages.select_rows(torch.zeros(16, dtype=torch.int64))
        assert float(pages.keys[:, :, : pages.length].mean()) == float(pages.values[:, :, : pages.length].mean()) == 1
        assert proportional_bytes() - before < 0.1 * num_bytes  # what it took the place of is gone
        pages.append(*(torch.ones(16, self.HEADS, 8, self.DIM),) * 2)
        assert proportional_bytes() - before < 0.1 * num_bytes

    def test_copies_share_it_too(self):
        pages, num_bytes = self.pages()
        pages.select_rows(torch.zeros(16, dtype=torch.int64))
        before = proportional_bytes()
        copies = [copy.deepcopy(pages) for _ in range(8)]
        assert all(float(each.keys[:, :, : each.length].mean()) == 1 for each in copies)
        assert proportional_bytes() - before < 0.5 * num_bytes  # what the rows of eight have of their own

    def test_it_goes_with_the_last_of_its_rows(self):
        before = proportional_bytes()
        pages, num_bytes = self.pages()
        pages.select_rows(torch.zeros(16, dtype=torch.int64))
        other = copy.deepcopy(pages)
        stretches = [weakref.ref(each) for each in pages.prefix.stretches]
        del pages
        gc.collect()
        assert all(each() for each in stretches)
        assert float(other.keys[:, :, : other.length].mean()) == 1
        other.select_rows(torch.tensor([3]))
        assert all(each() for each in stretches)
        del other
        gc.collect()
        assert not any(each() for each in stretches)
        assert proportional_bytes() - before < 0.1 * num_bytes

    def test_a_prefix_that_is_short_is_copied(self, monkeypatch):
        monkeypatch.setattr(mapped.memory_of(CPU), "granule", 8192 * self.DIM * 4)
        pages, _ = self.pages(8192)
        pages.select_rows(torch.zeros(2, dtype=torch.int64))
        assert pages.prefix is None
        assert float(pages.keys[:, :, : pages.length].mean()) == 1

    def test_so_it_is_where_the_system_refuses(self, monkeypatch):
        def refuse(*arguments):
            raise OSError

        pages, _ = self.pages(8192)
        pages.select_rows(torch.zeros(2, dtype=torch.int64))
        monkeypatch.setattr(mapped.OfSystem, "mapped", refuse)
        for other in (copy.deepcopy(pages), pages):
            other.select_rows(torch.tensor([0, 1, 1]))
            assert other.prefix is None
            assert float(other.keys[:, :, : other.length].mean()) == 1


@pytest.mark.parametrize("head_dims", [(96, 96), (64, 128), (80, 48)], ids=str)
@pytest.mark.parametrize("length", [4095, 4096, 5001])
def test_any_head_dim_and_length(head_dims, length):
    """No row has more of its own than the tokens to come take, in whole units."""
    pages = Pages(Rows(), None, 16, 48)
    generator = torch.Generator().manual_seed(0)
    new = [torch.randn(2, 2, length, dim, generator=generator) for dim in head_dims]
    pages.begin_rows((0, 5))
    pages.append(*new)
    pages.select_rows(torch.tensor([0, 0, 1, 1, 1]))
    prefix = pages.prefix
    assert length - prefix.unit // 2 <= prefix.end <= pages.length == length
    assert pages.capacity - prefix.offset - prefix.end == prefix.unit * -(-shared.SPARE // prefix.unit)
    assert pages.left_padding == (0, 0, 5, 5, 5)
    assert pages.room - length >= shared.SPARE
    assert pages.capacity % 48 == 0
    more = [torch.randn(5, 2, pages.room - length, dim, generator=generator) for dim in head_dims]
    pages.append(*more)
    assert pages.prefix is prefix
    for stored, old, own in zip((pages.keys, pages.values), new, more, strict=True):
        assert torch.equal(stored[:, :, : pages.length], torch.cat([old[[0, 0, 1, 1, 1]], own], dim=2))
    assert pages.bytes_of_token == sum(head_dims) * 4


MODES = {
    "sampled": {"num_return_sequences": ROWS, "do_sample": True},
    "beams": {"num_beams": ROWS},
    "several of the beams": {"num_beams": ROWS, "num_return_sequences": 2},
}


class TestGenerate:
    """After a prompt was read by one row, `generate` makes several sequences of it."""

    def caches(self, model, ids):
        """One that repeats itself, one that was repeated, and one that was and copies."""
        caches = [read(model, QuestCache(BUDGET, codes=2)) for _ in range(3)]
        caches[1].batch_repeat_interleave(ROWS)
        with copying():
            caches[2].batch_repeat_interleave(ROWS)
        return caches

    @pytest.mark.parametrize("options", MODES.values(), ids=MODES)
    @pytest.mark.parametrize("question", [1, 17])
    def test_all_go_on_from_it(self, model, options, question):
        ids = torch.cat([tokens(PROMPT), tokens(question, seed=5)], dim=1)
        outputs = []
        for cache in self.caches(model, ids):
            torch.manual_seed(0)
            outputs.append(generate(model, ids, cache, **options))
            assert len(cache.left_padding) == ROWS
            assert cache.get_seq_length() == PROMPT + question + ANSWER - 1
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])

    def test_each_of_several_rows(self, model):
        ids = torch.cat([tokens(PROMPT, batch_size=2), tokens(9, seed=5, batch_size=2)], dim=1)
        whole = generate(model, ids, QuestCache(4096), num_beams=3)
        cache = QuestCache(4096)
        with torch.no_grad():
            model(ids[:, :PROMPT], **{CACHE_NAME: cache})
        assert torch.equal(generate(model, ids, cache, num_beams=3), whole)
        assert has_prefix(cache)

    def test_one_that_holds_all_rows_is_taken_as_it_is(self, model):
        ids = torch.cat([tokens(PROMPT), tokens(9, seed=5)], dim=1)
        cache = read(model, QuestCache(BUDGET))
        cache.batch_repeat_interleave(ROWS)
        generate(model, ids, cache, num_return_sequences=ROWS, do_sample=True)
        assert len(cache.left_padding) == ROWS

    def test_a_forward_is_told_how_to_repeat_them(self, model):
        cache = read(model, QuestCache(BUDGET))
        with pytest.raises(ValueError, match=r"cache.batch_repeat_interleave\(3\)"):
            model(tokens(1, batch_size=3), **{CACHE_NAME: cache})
        assert cache.get_seq_length() == PROMPT


def test_questions_of_different_length_on_one_document(model):
    """The shorter ones begin after slots that the mask hides: each row is what it is alone."""
    document, lengths, answer = tokens(PROMPT), (3, 20, 11), 6
    questions = [tokens(length, seed=length) for length in lengths]
    alone = []
    for question in questions:
        ids = torch.cat([document, question], dim=1)
        alone.append(generate(model, ids, QuestCache(4096), max_new_tokens=answer)[:, -answer:])
    longest = max(lengths)
    rows = [torch.cat([torch.zeros(1, longest - each.shape[1], dtype=torch.int64), each], dim=1) for each in questions]
    ids = torch.cat([document.expand(len(rows), -1), torch.cat(rows)], dim=1)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, PROMPT : PROMPT + longest - length] = 0
    cache = read(model, QuestCache(BUDGET))
    cache.batch_repeat_interleave(len(rows))
    output = generate(model, ids, cache, attention_mask=mask, max_new_tokens=answer)
    assert torch.equal(output[:, -answer:], torch.cat(alone))
    assert has_prefix(cache)


def test_room_that_was_asked_for_decides_what_is_shared(model):
    """Of a prompt that ends within a unit, the last part is copied if the row has room enough then."""
    whole, part = 5 * 64, PROMPT - 5 * 64
    for room, expected in ((PROMPT + 20, whole), (6 * 64, whole), (6 * 64 + 1, PROMPT), (7 * 64, whole)):
        cache = read(model, QuestCache(BUDGET, max_cache_len=room))
        cache.batch_repeat_interleave(ROWS)
        assert all(layer.storage.first_own == expected for layer in cache.layers)
        assert all(room <= layer.storage.room < room + 64 + part for layer in cache.layers)


@pytest.mark.parametrize("at", range(1, 4))
@pytest.mark.parametrize("mode", [contextlib.nullcontext, copying], ids=["shared", "copied"])
def test_memory_that_runs_out_in_a_layer_leaves_the_rows_that_there_were(model, monkeypatch, mode, at):
    expected, cache = (read(model, QuestCache(BUDGET, codes=2)) for _ in range(2))
    allocate, calls = Pages.allocate, []

    def run_out(storage, *arguments):
        calls.append(storage)
        if len(calls) == at:
            raise torch.OutOfMemoryError
        allocate(storage, *arguments)

    monkeypatch.setattr(Pages, "allocate", run_out)
    with mode(), pytest.raises(torch.OutOfMemoryError):
        cache.batch_repeat_interleave(ROWS)
    assert_same([cache, expected])
    assert_go_on_alike(model, [cache, expected])


def test_a_step_in_a_graph_does_not_write_into_a_prefix(model):
    """After a crop a prepared step asks for room, though there is some."""
    caches = repeated(model, KINDS["quest"])
    for cache in caches:
        cache.get_mask_sizes(1, 0)
        assert cache.shared.rows.room >= PROMPT + 1
        cache.crop(-5)
        cache.get_mask_sizes(1, 0)
        assert all(layer.storage.first_own <= PROMPT - 5 for layer in cache.layers)


def test_answers_are_those_of_one_row(model):
    ids, answer = tokens(PROMPT), tokens(ANSWER, seed=3)
    expected = feed(model, QuestCache(BUDGET, codes=2), ids, answer)
    cache = read(model, QuestCache(BUDGET, codes=2))
    cache.batch_repeat_interleave(3)
    with torch.no_grad():
        for idx, token in enumerate(answer[0, :-1]):
            logits = model(token.expand(3, 1), **{CACHE_NAME: cache}).logits
            # A batch of other size is multiplied in another order.
            torch.testing.assert_close(logits[:, 0], expected[:, idx + 1].expand(3, -1), rtol=1e-4, atol=1e-4)
