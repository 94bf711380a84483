"""A local layer answers as one that keeps everything, keeps what its window reaches and a little more, and says what it
cannot take back.
"""

import copy
import pickle

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from small_llama import BUDGET, PROMPT, generate, greedy, make_model, on_any_device, tokens
from transformers import (
    Cohere2ForCausalLM,
    DynamicCache,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GptOssForCausalLM,
    LlamaConfig,
    MistralForCausalLM,
    Olmo3ForCausalLM,
)

from hf_quest import CACHE_NAME, QuestCache, QuestError
from hf_quest.methods import Quest
from hf_quest.seam.layer import Layer
from hf_quest.seam.local import reaches_of
from hf_quest.seam.state import State
from hf_quest.storage import ring as local_module
from hf_quest.storage.ring import ROOM

WINDOW = 32  # tokens
BEYOND = 2048  # tokens, a budget that covers every context here
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS = {
    "mistral": (MistralForCausalLM, {}, "sdpa"),
    "gemma2": (Gemma2ForCausalLM, {**ALTERNATING, "head_dim": 16, "attn_logit_softcapping": 2.0}, "eager"),
    "gemma3": (Gemma3ForCausalLM, {**ALTERNATING, "head_dim": 16}, "sdpa"),
    "gpt_oss": (GptOssForCausalLM, {**ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2}, "eager"),
    "cohere2": (Cohere2ForCausalLM, ALTERNATING, "sdpa"),
    "olmo3": (Olmo3ForCausalLM, ALTERNATING, "sdpa"),
}
# Float32 sums in another order. What a window leaves out moves these logits by more than a tenth.
CLOSE = {"rtol": 1e-4, "atol": 1e-3}


def build(name, implementation="quest", **options):
    model_class, config, dense = MODELS[name]
    implementation = dense if implementation == "dense" else implementation
    config = {"sliding_window": WINDOW, "pad_token_id": 0, **config, **options}
    return make_model(model_class, attn_implementation=implementation, **config)


def test_layers_may_have_windows_of_their_own():
    windows = {0: {"sliding_window": WINDOW}, 1: {"sliding_window": None}, 2: {"sliding_window": 2 * WINDOW}}
    config = LlamaConfig(num_hidden_layers=3, per_layer_config=windows)
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip(f"transformers {transformers.__version__} makes no cache of its own for them")
    assert reaches_of(config, BEYOND) == {0: WINDOW, 2: 2 * WINDOW}


@torch.no_grad()
def read(model, cache, input_ids):
    return model(input_ids, **{CACHE_NAME: cache}).logits


def copies(cache):
    """By every way to copy it."""
    return copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))


class EverythingKept:
    """What a Ring answers, of a list of all tokens: [B] lists of numbers that stand for tokens."""

    def __init__(self, reach, room):
        self.reach, self.room = reach, room
        self.rows, self.most = [[], []], 0

    @property
    def length(self):
        return len(self.rows[0])

    def append(self, new):
        start = max(0, self.length - self.reach + 1)
        self.rows = [row + more for row, more in zip(self.rows, new, strict=True)]
        self.most = max(self.most, self.length)
        return [row[start:] for row in self.rows]

    def can_crop_to(self, length):
        return length == 0 or max(0, self.most - self.reach - self.room) <= max(0, length - self.reach + 1)


class TestRing:
    """Against a list of all tokens, under whatever is done to it."""

    @staticmethod
    def as_keys(rows):
        keys = torch.tensor(rows, dtype=torch.float32)[:, None, :, None]
        return keys.expand(-1, 2, -1, 4), -keys.expand(-1, 2, -1, 4)

    def append(self, layer, model, new):
        returned = layer.update(*self.as_keys(new))
        for given_back, expected in zip(returned, self.as_keys(model.append(new)), strict=True):
            assert torch.equal(given_back, expected)

    def crop(self, layer, model, num_removed):
        length, before = model.length - num_removed, copy.deepcopy(layer)
        was_before = layer.storage.is_before(length)
        if model.can_crop_to(length):
            layer.crop(-num_removed)
            model.most = min(model.most, length) if length == 0 else model.most
        elif not was_before:
            with pytest.raises(QuestError, match=f"crop cannot take back {num_removed} tokens.*content.*is unchanged"):
                layer.crop(-num_removed)
            assert (layer.length, layer.storage.first) == (before.length, before.storage.first)
            assert torch.equal(layer.keys, before.keys)
            return
        else:  # of the last forward, all of it
            layer.crop(-num_removed)
            model.most = length
        model.rows = [row[:length] for row in model.rows]

    @settings(deadline=None, max_examples=150)
    @given(
        st.sampled_from([(1, 3), (4, 5), (16, 7)]),
        st.sampled_from([None, 300]),
        st.lists(
            st.one_of(
                st.tuples(st.just("append"), st.sampled_from([1, 1, 1, 2, 3, 5, 6, 7, 8, 23, 40])),
                st.tuples(st.just("crop"), st.integers(0, 12)),
                st.tuples(st.just("crop"), st.integers(0, 60)),
                st.tuples(st.just("reorder"), st.sampled_from([[0, 0], [1, 0], [1, 1]])),
                st.tuples(st.just("select"), st.sampled_from([[0, 0], [1, 0], [0, 1]])),
                st.tuples(st.just("repeat"), st.just(0)),
                st.tuples(st.just("copy"), st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])),
                st.tuples(st.just("widen"), st.just(0)),
                st.tuples(st.just("offload"), st.just(0)),
                st.tuples(st.just("reset"), st.just(0)),
            ),
            max_size=12,
        ),
    )
    def test_is_a_list_of_all_tokens_as_far_as_it_reaches(self, sizes, max_cache_len, operations):
        (reach, room), number = sizes, iter(range(1, 10**6))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_module, "ROOM", room)
            # As after autocast, so that keys of a layer may come in several dtypes.
            state = State(Quest(BUDGET), 0, max_cache_len, reaches={0: reach}, saw_autocast=True)
            layer = Layer(state, 0)
            model = EverythingKept(reach, room)
            for name, argument in [("append", 3), *operations, ("append", 1)]:
                if name == "append" and model.length + argument <= (max_cache_len or 10**6):
                    self.append(layer, model, [[next(number) for _ in range(argument)] for _ in range(2)])
                elif name == "crop" and argument <= model.length:
                    self.crop(layer, model, argument)
                elif name == "reorder":
                    layer.reorder_cache(torch.tensor(argument))
                    model.rows = [model.rows[row] for row in argument]
                elif name == "select":
                    layer.batch_select_indices(torch.tensor(argument))
                    model.rows = [model.rows[row] for row in argument]
                elif name == "repeat":
                    layer.batch_repeat_interleave(2)
                    layer.batch_select_indices(torch.tensor([True, False, False, True]))
                elif name == "copy":
                    layer = argument(layer)
                elif name == "widen" and model.length:
                    layer.storage.move(slice(None), layer.capacity, torch.float64)
                elif name == "offload":
                    layer.offload()
                elif name == "reset":
                    layer.reset()
                    model = EverythingKept(reach, room)
                assert layer.get_seq_length() == model.length
                assert layer.num_attended == min(model.length, reach)
                assert layer.capacity <= reach + room


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_long_texts_are_those_of_transformers_own_cache(self, name):
        """A prompt, single tokens, a few and many, over the window and once round the ring."""
        quest, dense = build(name), build(name, "dense")
        cache, stock = QuestCache(BEYOND), DynamicCache(config=dense.config)
        for num_new, seed in ((20, 1), (5, 2), (1, 3), (ROOM + 60, 4), (1, 5), (7, 6), (1, 7), (ROOM + 1, 8), (2, 9)):
            input_ids = tokens(num_new, seed=seed, batch_size=2)
            torch.testing.assert_close(read(quest, cache, input_ids), read(dense, stock, input_ids), **CLOSE)

    def test_memory_is_what_the_window_reaches_and_room(self, name):
        model, cache = build(name), QuestCache(BUDGET)
        read(model, cache, tokens(900))
        read(model, cache, tokens(400, seed=2))
        read(model, cache, tokens(1, seed=3))
        slots = [layer.keys.shape[2] for layer in cache.layers if layer.is_sliding]
        assert slots == [WINDOW + ROOM] * len(slots)
        assert len(slots) == (4 if name == "mistral" else 2)
        assert cache.get_seq_length() == 1301

    def test_crop_then_append_is_append(self, name):
        model, cache, straight = build(name), QuestCache(BUDGET), QuestCache(BUDGET)
        document, more = tokens(700), tokens(20, seed=2)
        for each in (cache, straight):
            read(model, each, document)
        read(model, cache, tokens(ROOM - 10, seed=3))
        cache.crop(10 - ROOM)
        torch.testing.assert_close(read(model, cache, more), read(model, straight, more), **CLOSE)

    def test_assisted_decoding_writes_what_greedy_decoding_writes(self, name):
        model, prompt = build(name), tokens(100).repeat(1, 3)
        expected = generate(model, prompt, QuestCache(BUDGET))
        assert torch.equal(generate(model, prompt, QuestCache(BUDGET), prompt_lookup_num_tokens=5), expected)
        assistant = make_model()  # whose cache, of Transformers' own, has no window: some versions cannot crop one
        assert torch.equal(generate(model, prompt, QuestCache(BUDGET), assistant_model=assistant), expected)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_a_captured_step_is_the_eager_one_round_the_ring(name, monkeypatch):
    monkeypatch.setattr(local_module, "ROOM", 8)  # 40 slots, of which the answer fills the last and the first
    torch._dynamo.reset()
    layers = {"num_hidden_layers": 2} | ({} if name == "mistral" else {"layer_types": ALTERNATING["layer_types"][:2]})
    model, config, prompt = build(name, **layers), on_any_device(backend="eager", mode=None), tokens(28, batch_size=2)
    expected = generate(model, prompt, QuestCache(BUDGET, compile=False), max_new_tokens=40)
    output = generate(model, prompt, QuestCache(BUDGET), max_new_tokens=40, compile_config=config)
    assert torch.equal(output, expected)


@pytest.fixture(scope="module")
def gemma():
    return build("gemma3")


def content(cache):
    """What is stored, of every layer and in order."""
    keys = [layer.storage.newest_keys() for layer in cache.layers]  # other slots may hold anything, NaN too
    return [layer.length for layer in cache.layers], [stored.clone() for stored in keys]


class TestCrop:
    def test_beyond_what_is_kept_it_is_refused_with_the_reason_and_nothing_changes(self, gemma):
        cache = QuestCache(BUDGET)
        read(gemma, cache, tokens(700))
        lengths, keys = content(cache)
        message = f"crop cannot take back {ROOM + 2} tokens: layer 0 attends its newest {WINDOW}.*{ROOM + 1} at most"
        with pytest.raises(QuestError, match=message):
            cache.crop(-ROOM - 2)
        assert content(cache)[0] == lengths
        assert all(torch.equal(*pair) for pair in zip(content(cache)[1], keys, strict=True))

    def test_what_the_message_says_can_be_taken_back_can(self, gemma):
        cache, straight = QuestCache(BUDGET), QuestCache(BUDGET)
        document = tokens(700)
        read(gemma, cache, document)
        read(gemma, straight, document[:, : 700 - ROOM - 1])
        cache.crop(-ROOM - 1)
        torch.testing.assert_close(read(gemma, cache, tokens(1)), read(gemma, straight, tokens(1)), **CLOSE)

    def test_an_earlier_copy_goes_on_as_the_message_says(self, gemma):
        cache = QuestCache(BUDGET)
        read(gemma, cache, tokens(300))
        earlier = copies(cache)
        read(gemma, cache, tokens(ROOM + 50, seed=2))
        read(gemma, cache, tokens(3, seed=2))
        with pytest.raises(QuestError, match=r"copy\.deepcopy of the cache that was made earlier"):
            cache.crop(-ROOM - 53)
        straight = QuestCache(BUDGET)
        read(gemma, straight, tokens(300))
        expected = read(gemma, straight, tokens(9, seed=4))
        for each in earlier:
            assert torch.equal(read(gemma, each, tokens(9, seed=4)), expected)

    def test_all_of_the_last_forward_can_be_taken_back_however_long(self, gemma):
        cache, straight = QuestCache(BUDGET), QuestCache(BUDGET)
        for each in (cache, straight):
            read(gemma, each, tokens(500))
        read(gemma, cache, tokens(2 * ROOM, seed=2))
        cache.crop(-2 * ROOM)
        assert torch.equal(read(gemma, cache, tokens(9, seed=4)), read(gemma, straight, tokens(9, seed=4)))

    @pytest.mark.parametrize("num_tokens", [WINDOW - 1, 700])
    def test_of_everything_as_a_reset(self, gemma, num_tokens):
        cache = QuestCache(BUDGET)
        read(gemma, cache, tokens(num_tokens))
        cache.crop(-num_tokens)
        assert torch.equal(generate(gemma, tokens(50), cache), generate(gemma, tokens(50), QuestCache(BUDGET)))

    def test_storage_that_comes_back_is_asked_for_room_again(self, gemma):
        """A step that a graph may hold goes round what there is, and takes no look at how much."""
        cache, straight = QuestCache(BUDGET), QuestCache(BUDGET)
        for each in (cache, straight):
            read(gemma, each, tokens(20))
        read(gemma, cache, tokens(2 * ROOM, seed=2))
        cache.get_mask_sizes(1, 0)  # as before a decode step
        cache.crop(-2 * ROOM)
        for each in (cache, straight):
            each.get_mask_sizes(1, 0)
        assert cache.shared.rows.room == straight.shared.rows.room < 20 + 2 * ROOM


def test_a_first_prompt_that_ended_before_its_attention_is_put_back(monkeypatch):
    model, cache = build("mistral"), QuestCache(BUDGET)
    monkeypatch.setattr("hf_quest.attention.check_is_causal", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(model, cache, tokens(700))
    monkeypatch.undo()
    with pytest.raises(QuestError, match="put back to the 0 tokens before; repeat the call"):
        read(model, cache, tokens(700))
    assert torch.equal(read(model, cache, tokens(50)), read(model, QuestCache(BUDGET), tokens(50)))


def test_more_drafts_than_are_kept_besides():
    model, cache = build("mistral", sliding_window=8), QuestCache(BUDGET)
    ids, options = tokens(200).repeat(1, 2), {"max_new_tokens": 310}
    drafted = generate(model, ids, cache, prompt_lookup_num_tokens=300, **options)
    assert torch.equal(drafted, generate(model, ids, QuestCache(BUDGET), **options))
    assert max(layer.keys.shape[2] for layer in cache.layers) <= 8 + 301


@pytest.mark.parametrize("num_new", [1, 20, ROOM, ROOM + 1, 3 * ROOM])
@pytest.mark.parametrize("layer_idx", [1, 2, 3])
def test_a_forward_that_was_interrupted_is_put_back(gemma, num_new, layer_idx):
    def interrupt(*_):
        raise KeyboardInterrupt

    cache, straight = QuestCache(BUDGET), QuestCache(BUDGET)
    for each in (cache, straight):
        read(gemma, each, tokens(700))
    hook = gemma.model.layers[layer_idx].mlp.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            read(gemma, cache, tokens(num_new, seed=2))
    finally:
        hook.remove()
    more = tokens(20, seed=3)
    if layer_idx < 3:  # or all layers were filled, and nothing tells that the forward did not end
        with pytest.raises(QuestError, match="put back to the 700 tokens before; repeat the call"):
            read(gemma, cache, more)
    else:
        cache.crop(-num_new)
    torch.testing.assert_close(read(gemma, cache, more), read(gemma, straight, more), **CLOSE)


@pytest.mark.parametrize("max_cache_len", [24, WINDOW, 40, 400])
def test_max_cache_len_around_the_window(gemma, max_cache_len):
    prompt = tokens(16, batch_size=2)
    num_new = min(max_cache_len, 60) - 15
    expected = greedy(gemma, DynamicCache(config=gemma.config), prompt, num_new)
    cache = QuestCache(BEYOND, max_cache_len=max_cache_len)
    assert torch.equal(generate(gemma, prompt, cache, max_new_tokens=num_new), expected)
    assert {layer.keys.shape[2] for layer in cache.layers if layer.is_sliding} == {min(max_cache_len, WINDOW + ROOM)}


def test_padding_moves_with_its_rows(gemma):
    """Rows of a left-padded batch are those alone after they change places, are repeated and selected."""
    input_ids = tokens(PROMPT, batch_size=2)
    input_ids[1, :37] = 0
    mask = (input_ids > 0).long()
    cache = QuestCache(BUDGET)
    with torch.no_grad():
        gemma(input_ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **{CACHE_NAME: cache})
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 3]))
    more = tokens(5, seed=4, batch_size=2)
    rows, masks = torch.cat([input_ids.flip(0), more], dim=1), torch.cat([mask.flip(0), torch.ones_like(more)], dim=1)
    output = generate(gemma, rows, cache, attention_mask=masks)
    for row, padding in ((0, 37), (1, 0)):
        alone = generate(gemma, rows[row : row + 1, padding:], QuestCache(BUDGET))
        assert torch.equal(output[row : row + 1, padding:], alone)


def test_read_share_and_tokens_attended_count_what_the_window_reaches(gemma):
    cache = QuestCache(BUDGET, dense_layers=0, bounds_dtype=None)
    read(gemma, cache, tokens(20))
    assert cache.tokens_attended == [20] * 4
    assert cache.read_share == 1
    read(gemma, cache, tokens(300, seed=2))
    assert cache.tokens_attended == [WINDOW, BUDGET, WINDOW, BUDGET]
    bounds = 2 * 320 / 16  # a page's two bounds are as many bytes as one token's key and value
    assert cache.read_share == (2 * WINDOW + 2 * BUDGET + bounds) / (2 * WINDOW + 2 * 320)
