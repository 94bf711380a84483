"""Every mask is obeyed, whatever copies Transformers makes of it, in batches as alone, by forward and by `generate`."""

import copy

import pytest
import torch
from small_llama import BUDGET, PROMPT, generate, make_model, on_any_device, tokens
from test_local import BEYOND, CLOSE, MODELS, build
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessorList

from hf_quest import CACHE_NAME, CritiPrefill, QuestCache
from hf_quest.seam import masks
from hf_quest.watch import SegmentsRead

ANSWER = 12  # tokens
PADDINGS = (0, 37, 5)  # of three rows


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def dense():
    return make_model(attn_implementation="sdpa")


@pytest.fixture
def looks(monkeypatch):
    """Of every look at a 2D mask, for which a GPU is waited for: how many keys it was for."""
    count, seen = masks.count_left_padding, []
    monkeypatch.setattr(
        masks, "count_left_padding", lambda mask, num_keys: seen.append(num_keys) or count(mask, num_keys)
    )
    return seen


@torch.no_grad()
def forward(model, cache, input_ids, mask=None, **options):
    """Logits; positions are counted by the mask, which may be of all tokens so far."""
    if mask is not None and mask.dim() == 2:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        options = {"position_ids": positions, **options}
    return model(input_ids, attention_mask=mask, **{CACHE_NAME: cache}, **options).logits


def padded_rows(num_tokens=PROMPT, paddings=PADDINGS, seed=1):
    input_ids = tokens(num_tokens, seed=seed, batch_size=len(paddings))
    mask = (torch.arange(num_tokens) >= torch.tensor(paddings)[:, None]).long()
    return input_ids * mask, mask


def answer(model, cache, input_ids, is_compiled=False, **options):
    if is_compiled:
        torch._dynamo.reset()
        options["compile_config"] = on_any_device(backend="eager", mode=None)
    options = {"max_new_tokens": ANSWER, "attention_mask": (input_ids > 0).long(), **options}
    return generate(model, input_ids, cache, **options)


def assert_rows_are_those_alone(name, paddings, budget, is_compiled=False, num_layers=4):
    """And, if the budget covers the context, those of Transformers' own cache and attention."""
    options = {"num_hidden_layers": num_layers}
    if name != "mistral":
        options["layer_types"] = ["sliding_attention", "full_attention"] * (num_layers // 2)
    model, (input_ids, _) = build(name, **options), padded_rows(paddings=paddings)
    output = answer(model, QuestCache(budget, dense_layers=0), input_ids, is_compiled)
    for row, padding in enumerate(paddings):
        alone = answer(model, QuestCache(budget, dense_layers=0), input_ids[row : row + 1, padding:])
        assert torch.equal(output[row : row + 1, padding:], alone)
    if budget == BEYOND:
        assert torch.equal(output, answer(build(name, "dense", **options), DynamicCache(), input_ids))


@pytest.mark.parametrize("name", MODELS)
class TestRowsWithLocalLayers:
    @pytest.mark.parametrize("budget", [BEYOND, BUDGET], ids=["budget-beyond-the-context", "small-budget"])
    @pytest.mark.parametrize("paddings", [(0, 0), PADDINGS], ids=["unpadded", "padded"])
    def test_are_the_rows_alone(self, name, paddings, budget):
        assert_rows_are_those_alone(name, paddings, budget)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("paddings", [(0, 0), PADDINGS], ids=["unpadded", "padded"])
def test_rows_with_local_layers_are_the_rows_alone_compiled(name, paddings):
    assert_rows_are_those_alone(name, paddings, BUDGET, is_compiled=True, num_layers=2)


COPIES = {
    "contiguous": lambda mask: mask.mT.contiguous().mT.contiguous(),
    "to": lambda mask: mask.to(mask.device, copy=True),
    "clone": lambda mask: mask.clone(),
    "expand": lambda mask: mask.expand(mask.shape[0], 4, -1, -1)[:, :1],
}


class TestCopies:
    """What a mask means is found by its content where Transformers, or who else, copied it."""

    @pytest.fixture
    def change_masks(self, model):
        """Have every mask on its way from the mask function to the attention go through a function."""
        hooks = []

        def change_by(change):
            def before(module, args, kwargs):
                mask = kwargs["attention_mask"]
                return args, {**kwargs, "attention_mask": None if mask is None else change(mask)}

            for layer in model.model.layers:
                hooks.append(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True))

        yield change_by
        for hook in hooks:
            hook.remove()

    @pytest.fixture
    def turns(self, model):
        """Logits of two chunks and two single tokens of three rows, and whether CritiPrefill was at work."""

        def read(paddings=(0, 0, 0), **options):
            cache, watched, logits = QuestCache(BUDGET, **options), [], []
            if "prefill" in options:
                cache.watcher = lambda read: isinstance(read, SegmentsRead) and watched.append(1)
            input_ids, mask = padded_rows(paddings=paddings)
            for first, end in ((0, 64), (64, 148), (148, 149), (149, 150)):
                logits.append(forward(model, cache, input_ids[:, first:end], mask[:, :end]))
            return torch.cat(logits, dim=1), len(watched)

        return read

    @pytest.mark.parametrize("copied", COPIES)
    @pytest.mark.parametrize("paddings", [(0, 0, 0), PADDINGS], ids=["unpadded", "padded"])
    @pytest.mark.parametrize("prefill", [None, CritiPrefill(budget=16, segment_size=16, threshold=16)])
    def test_a_copy_means_what_the_mask_meant(self, turns, change_masks, copied, paddings, prefill):
        options = {"paddings": paddings, "prefill": prefill}
        expected, num_watched = turns(**options)
        change_masks(COPIES[copied])
        logits, num_copied = turns(**options)
        is_token = padded_rows(paddings=paddings)[1].bool()
        assert torch.equal(logits[is_token], expected[is_token])
        assert num_copied == num_watched
        assert (num_watched > 0) == (prefill is not None)

    def test_a_copy_of_a_windows_mask_that_hides_nothing_yet(self):
        """It is alike that of a full layer."""
        quest, input_ids, mask = build("gemma3"), *padded_rows(20, (0, 5))
        expected = forward(quest, QuestCache(BEYOND), input_ids, mask)

        def copied(module, args, kwargs):
            return args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}

        for layer in quest.model.layers:
            layer.self_attn.register_forward_pre_hook(copied, with_kwargs=True)
        assert torch.equal(forward(quest, QuestCache(BEYOND), input_ids, mask)[mask.bool()], expected[mask.bool()])

    @pytest.mark.parametrize("prefill", [None, CritiPrefill(budget=16, segment_size=16, threshold=16)])
    def test_a_changed_copy_is_obeyed(self, model, dense, turns, change_masks, prefill):
        """One element of it, for one row, is as good as any other mask: all is dense by it."""

        def hide_one(mask):
            mask = mask.clone()
            mask[-1, :, -1, 9] = False
            return mask

        change_masks(hide_one)
        cache, stock = QuestCache(BUDGET, prefill=prefill), DynamicCache()
        input_ids, mask = padded_rows(paddings=(0, 0, 5))
        for first, end in ((0, 100), (100, 149)):
            part, shown = input_ids[:, first:end], mask[:, :end]
            expected_mask = (torch.ones(end, end, dtype=torch.bool).tril() & shown[:, None, None].bool())[:, :, first:]
            positions = (shown.cumsum(-1) - 1).clamp(min=0)[:, first:]
            expected = forward(dense, stock, part, hide_one(expected_mask), position_ids=positions)
            is_token = shown[:, first:].bool()
            torch.testing.assert_close(forward(model, cache, part, shown)[is_token], expected[is_token], **CLOSE)


class TestCritiPrefillOfRows:
    PREFILL = CritiPrefill(budget=32, segment_size=32, threshold=32)

    @pytest.mark.parametrize("paddings", [(0, 0), (0, 23), (41, 0, 7)], ids=str)
    @pytest.mark.parametrize("chunk", [64, 100], ids=["whole-segments", "cut-segments"])
    def test_a_later_chunk_and_turn_of_a_row_is_read_as_alone(self, model, paddings, chunk):
        """Of a padded row a chunk ends elsewhere in its segments than alone: it gets the same chunks."""
        input_ids, mask = padded_rows(230, paddings)
        batch, watched = QuestCache(BEYOND, prefill=self.PREFILL), []
        batch.watcher = lambda read: isinstance(read, SegmentsRead) and watched.append(read.position)
        for first, end in ((0, chunk), (chunk, 170), (170, 230)):
            logits = forward(model, batch, input_ids[:, first:end], mask[:, :end])
            assert watched or first == 0
            watched.clear()
            alone_logits = []
            for row, padding in enumerate(paddings):
                cache = QuestCache(BEYOND, prefill=self.PREFILL)
                for begin, finish in ((0, chunk), (chunk, 170), (170, 230)):
                    if finish <= end:
                        alone = forward(model, cache, input_ids[row : row + 1, max(begin, padding) : finish])
                alone_logits.append(alone[0])
            for row, expected in enumerate(alone_logits):
                torch.testing.assert_close(logits[row, -len(expected) :], expected, **CLOSE)

    def test_generate_reads_the_chunks_and_turns_of_unpadded_rows_by_it(self, model):
        watched, prompt = [], tokens(160, batch_size=2)
        cache = QuestCache(BEYOND, prefill=self.PREFILL)
        cache.watcher = lambda read: (
            isinstance(read, SegmentsRead) and watched.append((read.layer.layer_idx, read.position))
        )
        output = answer(model, cache, prompt, prefill_chunk_size=64)
        assert {position for _, position in watched} == {32, 64, 128}
        assert torch.equal(output, answer(model, QuestCache(BEYOND, prefill=self.PREFILL), prompt))
        watched.clear()
        answer(model, cache, torch.cat([output, tokens(90, seed=2, batch_size=2)], dim=1))
        assert min(position for _, position in watched) == 192

    def test_drafts_fill_no_segment(self, model):
        half = tokens(127)
        prompt = torch.cat([half, half], dim=1)[:, :254]  # two short of a segment's edge
        expected = answer(model, QuestCache(BEYOND, prefill=self.PREFILL), prompt)
        drafted = answer(model, QuestCache(BEYOND, prefill=self.PREFILL), prompt, prompt_lookup_num_tokens=8)
        assert torch.equal(drafted, expected)


def hidden_context(step, mask):
    mask[:, 20:60] = 0
    return mask


def window_by_mask(step, mask):
    mask[:, : 40 + step] = 0
    return mask


def only_one_step(step, mask):
    if step == 2:
        mask[:, 20:60] = 0
    return mask


def one_row_paused(step, mask):
    mask[1, PROMPT : PROMPT + 2] = 0
    return mask


def padding_that_changes(step, mask):
    mask[1, : 3 * step] = 0
    return mask


def its_own_token_hidden(step, mask):
    mask[1, -1] = 0
    return mask


@pytest.mark.parametrize("paddings", [(0, 37, 149), (0, BUDGET + 1)])
def test_left_padded_rows_that_are_fed_token_by_token_select_as_alone(model, paddings):
    """Also while a row of the batch has no token yet."""
    input_ids, mask = padded_rows(paddings=paddings)
    cache, caches = QuestCache(BUDGET), [QuestCache(BUDGET) for _ in paddings]
    for slot in range(PROMPT):
        logits = forward(model, cache, input_ids[:, slot : slot + 1], mask[:, : slot + 1])
        for row, padding in enumerate(paddings):
            if slot >= padding:
                alone = forward(model, caches[row], input_ids[row : row + 1, slot : slot + 1])
                torch.testing.assert_close(logits[row : row + 1], alone, **CLOSE)


CHANGES = [hidden_context, window_by_mask, only_one_step, one_row_paused, padding_that_changes, its_own_token_hidden]


class TestMaskOfOneNewToken:
    """Against Transformers' own attention and cache. A mask that hides more than left padding makes a step dense."""

    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    @pytest.mark.parametrize("budget", [BEYOND, BUDGET], ids=["budget-beyond-the-context", "small-budget"])
    def test_of_every_kind_is_obeyed(self, change, name, budget, model, dense):
        quest, stock = (model, dense) if name == "llama" else (build(name), build(name, "dense"))
        # Without a config a stock cache keeps everything, as hidden tokens are counted in windows of slots, too.
        cache, stock_cache = QuestCache(budget), DynamicCache()
        input_ids = tokens(PROMPT, batch_size=2)
        mask = torch.ones_like(input_ids)
        for each in ((quest, cache), (stock, stock_cache)):
            forward(*each, input_ids, mask)
        num_compared = 0
        for step in range(5):
            changed = change(step, torch.ones(2, PROMPT + step + 1, dtype=torch.long))
            is_seen = changed[:, -1].bool()
            token = tokens(1, seed=step, batch_size=2)
            logits, expected = (forward(*each, token, changed) for each in ((quest, cache), (stock, stock_cache)))
            is_causal = masks.count_left_padding(changed, PROMPT + step + 1) is not None
            if budget == BEYOND or not is_causal:
                torch.testing.assert_close(logits[is_seen], expected[is_seen], **CLOSE)
                num_compared += 1
            elif change is only_one_step and step > 0:
                assert not torch.allclose(logits, expected, **CLOSE)  # it selects again
            if budget == BUDGET and is_causal:
                return  # from here on the two hold other keys and values
        assert num_compared == 5

    @pytest.mark.parametrize("is_4d", [False, True], ids=["2d", "4d"])
    def test_generate_on_a_prefilled_cache_with_another_mask(self, model, dense, is_4d):
        input_ids, cache, stock = tokens(101, batch_size=2), QuestCache(BEYOND), DynamicCache()
        mask = torch.ones_like(input_ids)
        for each in ((model, cache), (dense, stock)):
            forward(*each, input_ids[:, :100], mask[:, :100])
        mask[:, 30:60] = 0
        if is_4d:
            step = torch.zeros(2, 1, 1, 101).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
            logits = (forward(*each, input_ids[:, 100:], step) for each in ((model, cache), (dense, stock)))
            torch.testing.assert_close(*logits, **CLOSE)
        else:
            outputs = (answer(*each, input_ids, attention_mask=mask) for each in ((model, cache), (dense, stock)))
            assert torch.equal(*outputs)

    def test_two_runs_of_generate_with_other_masks(self, model, dense):
        """The second begins with one token, a mask of which is asked for as that of a step is."""
        outputs = []
        for each, cache in ((model, QuestCache(BEYOND)), (dense, DynamicCache())):
            first = answer(each, cache, tokens(PROMPT, batch_size=2))
            mask = torch.ones_like(first)
            mask[0, 30:60] = 0
            outputs.append(answer(each, cache, first, attention_mask=mask))
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    @pytest.mark.parametrize("chunk_size", [1, 2, 7])
    def test_left_padding_in_chunks(self, name, chunk_size, model, dense):
        quest, stock = (model, dense) if name == "llama" else (build(name), build(name, "dense"))
        input_ids, mask = padded_rows(60, (23, 0))
        options = {"attention_mask": mask, "prefill_chunk_size": chunk_size}
        output = answer(quest, QuestCache(BEYOND), input_ids, **options)
        assert torch.equal(output, answer(stock, DynamicCache(), input_ids, **options))

    @pytest.mark.parametrize("budget", [BEYOND, BUDGET], ids=["budget-beyond-the-context", "small-budget"])
    def test_left_padding_token_by_token(self, model, dense, budget):
        input_ids, mask = padded_rows(100, (23, 0))
        cache, stock, alone = QuestCache(budget), DynamicCache(), QuestCache(budget)
        for slot in range(100):
            token, so_far = input_ids[:, slot : slot + 1], mask[:, : slot + 1]
            logits = forward(model, cache, token, so_far)
            if budget == BEYOND:
                is_token = mask[:, slot].bool()
                expected = forward(dense, stock, token, so_far)
                torch.testing.assert_close(logits[is_token], expected[is_token], **CLOSE)
            if slot >= 23:
                torch.testing.assert_close(logits[:1], forward(model, alone, token[:1]), **CLOSE)

    def test_a_row_without_a_token_gets_its_first_from_generate(self, model):
        """The one slot of its prompt stays hidden."""
        mask = torch.tensor([[1], [0]])
        options = {"return_dict_in_generate": True, "output_logits": True}
        output = answer(model, QuestCache(BUDGET), tokens(1, batch_size=2), attention_mask=mask, **options)
        alone, written = QuestCache(BUDGET), output.sequences[1:, 1:]
        for slot, logits in enumerate(output.logits[1:]):
            torch.testing.assert_close(logits[1:], forward(model, alone, written[:, slot : slot + 1])[:, 0], **CLOSE)

    @pytest.mark.parametrize("num_new", [1, 3])
    def test_none_after_a_padded_prompt_shows_the_padding(self, model, dense, num_new):
        input_ids, mask = padded_rows(60, (23, 0))
        cache, stock = QuestCache(BEYOND), DynamicCache()
        for each in ((model, cache), (dense, stock)):
            forward(*each, input_ids, mask)
        for end in (60, 60 + num_new):
            more, options = (
                tokens(num_new, seed=end, batch_size=2),
                {"position_ids": torch.arange(end, end + num_new)[None]},
            )
            logits = (forward(*each, more, None, **options) for each in ((model, cache), (dense, stock)))
            torch.testing.assert_close(*logits, **CLOSE)


class HidesContext(LlamaForCausalLM):
    """Prepares its steps with a part of its prompt hidden."""

    def prepare_inputs_for_generation(
        self, input_ids, cache=None, past_key_values=None, attention_mask=None, **options
    ):
        options[CACHE_NAME] = past_key_values if cache is None else cache
        if input_ids.shape[1] > PROMPT:
            attention_mask = hidden_context(0, torch.ones_like(input_ids))
        options["attention_mask"] = attention_mask
        return super().prepare_inputs_for_generation(input_ids, **options)


class TestMasksThatGenerateDidNotMake:
    """In its loop another mask than its own is one to look at, too."""

    @pytest.mark.parametrize("can_compile", [False, True])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
    def test_of_a_model_that_prepares_its_inputs_otherwise(self, can_compile, options):
        quest, stock = (make_model(HidesContext, attn_implementation=name) for name in ("quest", "sdpa"))
        output = answer(quest, QuestCache(BEYOND, compile=can_compile), tokens(PROMPT), **options)
        assert torch.equal(output, answer(stock, DynamicCache(), tokens(PROMPT), **options))
        assert not torch.equal(output, answer(make_model(), QuestCache(BEYOND), tokens(PROMPT), **options))

    @pytest.mark.parametrize("can_compile", [False, True])
    def test_of_a_hook(self, model, dense, can_compile):
        outputs = []
        for each, cache in ((model, QuestCache(BEYOND, compile=can_compile)), (dense, DynamicCache())):

            def hide(module, args, kwargs, cache=cache):
                length = cache.get_seq_length() + 1
                mask = {"attention_mask": hidden_context(0, torch.ones(1, length, dtype=torch.long))}
                return args, {**kwargs, **(mask if length > PROMPT else {})}

            hook = each.register_forward_pre_hook(hide, with_kwargs=True)
            outputs.append(answer(each, cache, tokens(PROMPT)))
            hook.remove()
        assert torch.equal(*outputs)

    def test_of_a_forward_within_its_loop(self, model, dense):
        outputs = []
        for each, cache in ((model, QuestCache(BEYOND)), (dense, DynamicCache())):

            def look_elsewhere(input_ids, scores, each=each, cache=cache):
                copied = copy.deepcopy(cache)
                mask = hidden_context(0, torch.ones(1, copied.get_seq_length() + 1, dtype=torch.long))
                return forward(each, copied, input_ids[:, -1:], mask)[:, -1]

            outputs.append(answer(each, cache, tokens(PROMPT), logits_processor=LogitsProcessorList([look_elsewhere])))
        assert torch.equal(*outputs)

    @torch.no_grad()
    def test_of_a_loop_that_prepares_its_steps_as_generate_does(self, model, dense):
        logits = []
        for each, cache in ((model, QuestCache(BEYOND)), (dense, DynamicCache())):
            input_ids = tokens(PROMPT)
            forward(each, cache, input_ids, torch.ones_like(input_ids))
            for seed in range(3):
                input_ids = torch.cat([input_ids, tokens(1, seed=seed)], dim=1)
                options = {"attention_mask": hidden_context(0, torch.ones_like(input_ids)), CACHE_NAME: cache}
                logits.append(each(**each.prepare_inputs_for_generation(input_ids, 1, **options)).logits)
        for pair in zip(logits[:3], logits[3:], strict=True):
            torch.testing.assert_close(*pair, **CLOSE)


class TestLooks:
    """A look at a mask waits for the GPU. In the usual case there is one, for the prompt."""

    @pytest.mark.parametrize("paddings", [(0, 0), (0, 23)], ids=["unpadded", "padded"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"num_beams": 2}, {"do_sample": True}, {"prefill_chunk_size": 64}, {"num_return_sequences": 1}],
        ids=str,
    )
    def test_generate_looks_at_its_prompt_alone(self, model, looks, paddings, options):
        input_ids, mask = padded_rows(paddings=paddings)
        answer(model, QuestCache(BUDGET), input_ids, attention_mask=mask, **options)
        steps = [num_keys for num_keys in looks if num_keys > PROMPT]
        assert steps == []

    def test_a_loop_of_plain_forwards_with_a_mask_looks_each_step(self, model, looks):
        cache, mask = QuestCache(BUDGET), torch.ones(1, PROMPT, dtype=torch.long)
        forward(model, cache, tokens(PROMPT), mask)
        looks.clear()
        for step in range(3):
            forward(model, cache, tokens(1, seed=step), torch.ones(1, PROMPT + step + 1, dtype=torch.long))
        assert looks == [PROMPT + 1, PROMPT + 2, PROMPT + 3]

    def test_nor_at_a_step_that_is_compiled(self, looks):
        answer(make_model(num_hidden_layers=1), QuestCache(BUDGET), tokens(PROMPT), is_compiled=True)
        assert [num_keys for num_keys in looks if num_keys > PROMPT] == []

    def test_a_loop_without_masks_never_looks(self, model, looks):
        cache = QuestCache(BUDGET)
        for num_new in (PROMPT, 1, 1, 20, 1):
            forward(model, cache, tokens(num_new))
        assert looks == []
