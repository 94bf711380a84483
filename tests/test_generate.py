"""Every mode of `generate` with a QuestCache far smaller than the context, each against what it must equal."""

import copy
import gc
import io
import itertools
import math
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llama import ANSWER, BUDGET, PROMPT, feed, generate, greedy, make_model, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    TextStreamer,
    pipeline,
)

from hf_quest import CACHE_NAME, QuestCache, reference
from hf_quest.codes import encode, grid
from hf_quest.kernels import cpu, native
from hf_quest.reference import Score
from hf_quest.storage.copies import copies_in_order


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(
    params=[{}, {"max_cache_len": 512}, {"bounds_dtype": None}, {"codes": 2, "candidates": 2}],
    ids=["growing", "max_cache_len", "wide bounds", "codes"],
)
def new_cache(request):
    return lambda budget=BUDGET: QuestCache(budget=budget, **request.param)


def assert_bounds_are_true(cache):
    """They are those of the keys that every page holds now."""
    for layer in cache.layers[2:]:
        for row, padding in enumerate(layer.left_padding):
            for page, keys in enumerate(layer.keys[row, :, padding : layer.length].split(16, dim=1)):
                expected = torch.stack(keys.aminmax(dim=1), dim=1)
                if layer.scales is not None:
                    expected, scales = reference.to_8_bits(expected)
                    assert torch.equal(layer.scales[row, :, page], scales)
                assert torch.equal(layer.bounds[row, :, page], expected)
                if cache.method.codes is not None and keys.shape[1] == 16:
                    lowest, step = (each[:, None] for each in grid(expected, scales, 2))
                    found = layer.storage.beside["codes"][row, :, padding + 16 * page : padding + 16 * page + 16]
                    assert torch.equal(found, encode(keys, lowest, step, 2))


def left_padded(rows):
    """Token ids and attention mask of several [1, n] rows of different length."""
    longest = max(row.shape[1] for row in rows)
    padding = [longest - row.shape[1] for row in rows]
    input_ids = torch.cat([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, padding, strict=True)])
    attention_mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
    return input_ids, attention_mask


def test_a_small_budget_changes_the_answer(model):
    """Without this none of the equalities below would show that pages were selected."""
    dense = generate(model, tokens(PROMPT), DynamicCache())
    assert not torch.equal(generate(model, tokens(PROMPT), QuestCache(budget=BUDGET)), dense)


@pytest.mark.parametrize("budget", [PROMPT + ANSWER, 2048])
def test_a_budget_that_covers_the_context_is_dense(model, new_cache, budget):
    dense = generate(model, tokens(PROMPT), DynamicCache())
    assert torch.equal(generate(model, tokens(PROMPT), new_cache(budget)), dense)


def test_greedy(model, new_cache):
    expected = greedy(model, new_cache(), tokens(PROMPT))
    assert torch.equal(generate(model, tokens(PROMPT), new_cache()), expected)


def test_batch(model, new_cache):
    prompts = tokens(PROMPT, batch_size=3)
    output = generate(model, prompts, new_cache())
    for row in range(3):
        assert torch.equal(output[row : row + 1], generate(model, prompts[row : row + 1], new_cache()))


@pytest.mark.parametrize("budget", [32, BUDGET, 112, 2048])
def test_left_padded_row_is_the_row_alone(model, new_cache, budget):
    rows = [tokens(PROMPT, seed=3), tokens(PROMPT - 37, seed=4), tokens(20, seed=5), tokens(1, seed=6)]
    input_ids, attention_mask = left_padded(rows)
    cache = new_cache(budget)
    output = generate(model, input_ids, cache, attention_mask=attention_mask)
    assert_bounds_are_true(cache)
    for row, alone in zip(output, rows, strict=True):
        expected = generate(model, alone, new_cache(budget))[0, alone.shape[1] :]
        assert torch.equal(row[input_ids.shape[1] :], expected)


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_sampling(model, new_cache, num_return_sequences):
    torch.manual_seed(0)
    options = {"do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    output = generate(
        model, tokens(PROMPT), new_cache(), num_return_sequences=num_return_sequences, top_k=20, **options
    )
    logits = torch.stack(output.logits, dim=1)
    assert len(output.sequences) == num_return_sequences
    for row, sequence in enumerate(output.sequences):
        expected = feed(model, new_cache(), tokens(PROMPT), sequence[None, PROMPT:])
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)  # batched float32 sums


def test_beam_search(model, new_cache):
    options = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    cache = new_cache()
    output = generate(model, tokens(PROMPT), cache, num_beams=4, num_return_sequences=4, **options)
    assert_bounds_are_true(cache)
    assert len({tuple(sequence.tolist()) for sequence in output.sequences}) == 4
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        answer = sequence[None, PROMPT:]
        log_probs = feed(model, new_cache(), tokens(PROMPT), answer).log_softmax(dim=-1)
        expected = log_probs.gather(2, answer[..., None]).sum()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-3)  # a sum of 24 logits of batched float32 sums


class TestAssistedDecoding:
    """Speculation changes the speed, never the answer."""

    @pytest.mark.parametrize("seed", range(4))
    def test_prompt_lookup(self, model, new_cache, seed):
        cache, prompt = new_cache(), tokens(PROMPT, seed=seed).repeat(1, 2)
        expected = greedy(model, new_cache(), prompt)
        assert torch.equal(generate(model, prompt, cache, prompt_lookup_num_tokens=6), expected)
        assert_bounds_are_true(cache)

    @pytest.mark.parametrize("seed", range(4))
    def test_assistant_model_that_is_often_right(self, model, new_cache, seed):
        prompt = tokens(PROMPT, seed=seed)
        expected = greedy(model, new_cache(), prompt)
        forwards = []
        hook = model.register_forward_hook(lambda *_: forwards.append(1))
        try:
            output = generate(model, prompt, new_cache(), assistant_model=make_model())
        finally:
            hook.remove()
        assert torch.equal(output, expected)
        assert len(forwards) < ANSWER

    def test_assistant_model_that_is_often_wrong(self, model, new_cache):
        expected = greedy(model, new_cache(), tokens(PROMPT))
        assert torch.equal(generate(model, tokens(PROMPT), new_cache(), assistant_model=make_model(seed=1)), expected)

    def test_layers_with_a_window_that_the_prompt_does_not_fill(self, new_cache):
        """They are dense from the prompt on, and no draft selects pages in them."""
        model = make_model(MistralForCausalLM, sliding_window=1024)
        for seed in range(3):
            prompt = tokens(PROMPT, seed=seed)
            expected = greedy(model, new_cache(), prompt)
            assert torch.equal(generate(model, prompt, new_cache(), assistant_model=copy.deepcopy(model)), expected)

    def test_inputs_embeds(self, model, new_cache):
        prompt = tokens(PROMPT).repeat(1, 2)

        def answer(cache, **options):
            return model.generate(
                inputs_embeds=model.get_input_embeddings()(prompt),
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                max_new_tokens=ANSWER,
                do_sample=False,
                pad_token_id=0,
                **options,
            )

        if not torch.equal(answer(DynamicCache(), prompt_lookup_num_tokens=3), answer(DynamicCache())):
            pytest.skip(
                "in this version Transformers' own assisted decoding of inputs_embeds is not its greedy decoding"
            )
        assert torch.equal(answer(new_cache(), prompt_lookup_num_tokens=3), answer(new_cache()))

    def test_a_cache_that_is_filled_is_filled_again(self, model, new_cache):
        """Transformers feeds the whole text to a filled cache, with a DynamicCache too."""
        cache, prompt = new_cache(), tokens(40).repeat(1, 4)
        for num_tokens in (len(prompt[0]) - 30, len(prompt[0])):
            text = prompt[:, :num_tokens]
            expected = generate(model, text, new_cache())
            assert torch.equal(generate(model, text, cache, prompt_lookup_num_tokens=4), expected)
            assert cache.get_seq_length() == num_tokens + ANSWER - 1

    def test_a_turn_after_assisted_decoding_is_prefilled_densely(self, model, new_cache):
        first, second = new_cache(), new_cache()
        sequence = generate(model, tokens(PROMPT), first, prompt_lookup_num_tokens=6)
        assert torch.equal(generate(model, tokens(PROMPT), second), sequence)
        prompt = torch.cat([sequence, tokens(40, seed=9)], dim=1)
        assert torch.equal(generate(model, prompt, first), generate(model, prompt, second))


@pytest.mark.parametrize("chunk_size", [16, 37, 1000])
def test_chunked_prefill_is_prefill_at_once(model, new_cache, chunk_size):
    expected = generate(model, tokens(PROMPT), new_cache())
    assert torch.equal(generate(model, tokens(PROMPT), new_cache(), prefill_chunk_size=chunk_size), expected)


def test_chunked_prefill_of_a_left_padded_batch(model, new_cache):
    """The first chunks of the short row hold nothing but padding."""
    rows = [tokens(PROMPT, seed=3), tokens(40, seed=4)]
    input_ids, attention_mask = left_padded(rows)
    output = generate(model, input_ids, new_cache(), attention_mask=attention_mask, prefill_chunk_size=32)
    for row, alone in zip(output, rows, strict=True):
        expected = generate(model, alone, new_cache())[0, alone.shape[1] :]
        assert torch.equal(row[PROMPT:], expected)


def test_conversation_continues_on_the_same_cache(model, new_cache):
    cache, oracle = new_cache(), new_cache()
    prompt = tokens(PROMPT)
    for turn in range(3):
        sequence = generate(model, prompt, cache)
        expected = greedy(model, oracle, prompt[:, oracle.get_seq_length() :])
        assert torch.equal(sequence[:, -ANSWER:], expected[:, -ANSWER:])
        prompt = torch.cat([sequence, tokens(30, seed=10 + turn)], dim=1)


def test_padded_conversation_continues_on_the_same_cache(model, new_cache):
    rows = [tokens(PROMPT, seed=3), tokens(PROMPT - 21, seed=4)]
    input_ids, attention_mask = left_padded(rows)
    caches = [new_cache(), new_cache(), new_cache()]
    follow_up = tokens(30, seed=11)
    for _ in range(2):
        output = generate(model, input_ids, caches[0], attention_mask=attention_mask)
        alone = [generate(model, row, cache) for row, cache in zip(rows, caches[1:], strict=True)]
        for row, expected in zip(output, alone, strict=True):
            assert torch.equal(row[-ANSWER:], expected[0, -ANSWER:])
        input_ids = torch.cat([output, follow_up.expand(2, -1)], dim=1)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, ANSWER + 30), value=1)
        rows = [torch.cat([row, follow_up], dim=1) for row in alone]


def test_many_questions_of_one_prefilled_document(model, new_cache):
    document = tokens(PROMPT)
    prefilled = new_cache()
    with torch.no_grad():
        model(document, past_key_values=prefilled)
    for seed in range(3):
        prompt = torch.cat([document, tokens(12, seed=20 + seed)], dim=1)
        fresh = new_cache()
        with torch.no_grad():
            model(document, past_key_values=fresh)
        assert torch.equal(generate(model, prompt, copy.deepcopy(prefilled)), generate(model, prompt, fresh))
    assert prefilled.get_seq_length() == PROMPT


def through_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


def through_torch_save(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("store", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_stored_cache_continues_where_it_was(model, new_cache, store):
    cache = new_cache()
    sequence = generate(model, tokens(PROMPT), cache)
    prompt = torch.cat([sequence, tokens(9)], dim=1)
    stored = store(cache)
    assert stored.budget == cache.budget
    assert_bounds_are_true(stored)
    assert torch.equal(generate(model, prompt, stored), generate(model, prompt, cache))
    assert_bounds_are_true(stored)


def test_reset_is_a_new_cache_for_any_batch(model, new_cache):
    cache = new_cache()
    for prompt in (tokens(PROMPT), tokens(70, seed=2, batch_size=2), tokens(PROMPT + 30, seed=3)):
        assert torch.equal(generate(model, prompt, cache), generate(model, prompt, new_cache()))
        assert_bounds_are_true(cache)
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("removed", [1, 15, 16, 17, 100])
def test_crop_then_append_is_append(model, new_cache, removed):
    cropped, fresh = new_cache(), new_cache()
    prompt, other = tokens(PROMPT), tokens(PROMPT, seed=8)
    kept = prompt[:, : PROMPT - removed]
    with torch.no_grad():
        model(torch.cat([kept, other[:, :removed]], dim=1), past_key_values=cropped)
        cropped.crop(-removed)
        model(kept, past_key_values=fresh)
    assert cropped.get_seq_length() == PROMPT - removed
    assert_bounds_are_true(cropped)
    assert torch.equal(generate(model, prompt, cropped), generate(model, prompt, fresh))


@pytest.mark.parametrize("num_rows", range(1, 5))
def test_beams_change_places_without_overwriting_one_that_is_wanted(num_rows):
    for sources in itertools.product(range(num_rows), repeat=num_rows):
        rows, spare = list(range(num_rows)), None
        copies = copies_in_order(sources)
        for target, source in copies:
            held = spare if source is None else rows[source]
            if target is None:
                spare = held
            else:
                rows[target] = held
        assert rows == list(sources)
        assert len(copies) <= sum(map(int.__ne__, sources, range(num_rows))) + num_rows // 2  # a spare for each cycle


def append_random(cache, num_tokens):
    """What was appended to each of two layers: keys and values, [2, B = 3, Hkv = 2, T, D = 4]."""
    appended = torch.randn(2, 2, 3, 2, num_tokens, 4).unbind()
    for layer_idx, (keys, values) in enumerate(appended):
        cache.update(keys, values, layer_idx)[0].quest_layer.handed.is_under_way = False  # no attention follows
    return appended


def small_pages():
    return QuestCache(budget=8, page_size=4, dense_layers=1)


ROWS = st.lists(st.integers(0, 2), min_size=3, max_size=3)


@settings(deadline=None)
@given(
    num_tokens=st.integers(4, 20),
    padding=st.tuples(*[st.integers(0, 3)] * 3),
    first_rows=st.sampled_from([[0, 0, 0], [1, 1, 1], [1, 1, 2]]),  # beams begin as one
    steps=st.lists(st.one_of(st.integers(-1, 5), ROWS), max_size=12),
)
def test_rows_hold_what_those_held_that_they_took_the_place_of(num_tokens, padding, first_rows, steps):
    """A step is a number of new tokens, the crop of one, or the rows to take."""
    cache = small_pages()
    stored = append_random(cache, num_tokens)
    for layer in cache.layers:
        layer.set_left_padding(padding)
    for step in [first_rows, *steps]:
        if isinstance(step, list):
            cache.reorder_cache(torch.tensor(step))
            stored, padding = [tensor[:, step] for tensor in stored], tuple(padding[row] for row in step)
        elif step > 0:
            new = append_random(cache, step)
            stored = [torch.cat(pair, dim=3) for pair in zip(stored, new, strict=True)]
        elif step < 0 and stored[0].shape[3] > 4:
            cache.crop(-1)
            stored = [tensor[:, :, :, :-1] for tensor in stored]
    expected = small_pages()
    for layer_idx, (keys, values) in enumerate(stored):
        expected.update(keys, values, layer_idx)[0].quest_layer.handed.is_under_way = False
        expected.layers[layer_idx].set_left_padding(padding)
    num_tokens = stored[0].shape[3]
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert layer.left_padding == padding
        assert torch.equal(layer.keys[:, :, :num_tokens], other.keys[:, :, :num_tokens])
        assert torch.equal(layer.values[:, :, :num_tokens], other.values[:, :, :num_tokens])
    bounds, expected_bounds = (each.layers[1].bounds for each in (cache, expected))
    for row, num_padding in enumerate(padding):
        num_pages = -(-(num_tokens - num_padding) // 4)
        assert torch.equal(bounds[row, :, :num_pages], expected_bounds[row, :, :num_pages])


def test_what_beams_share_is_not_copied():
    cache = small_pages()
    append_random(cache, 20)
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    append_random(cache, 3)
    for layer in cache.layers:
        layer.keys[1, :, :20] = layer.values[1, :, :20] = torch.nan
    of_pages = [cache.layers[1].bounds, cache.layers[1].scales]
    for tensor, poison in zip(of_pages, (-128, 255), strict=True):
        tensor[1, :, :5] = poison  # which no bound of a number has
    cache.reorder_cache(torch.tensor([0, 1, 1]))
    for layer in cache.layers:
        assert not layer.keys[2, :, :23].isnan().any()
        assert not layer.values[2, :, :23].isnan().any()
        assert torch.equal(layer.keys[2, :, 20:23], layer.keys[1, :, 20:23])
    for tensor, poison in zip(of_pages, (-128, 255), strict=True):
        assert (tensor[2, :, :6] != poison).all()


def test_crop_of_everything_is_a_new_cache(model, new_cache):
    cropped = new_cache()
    input_ids, attention_mask = left_padded([tokens(60, seed=2), tokens(35, seed=3)])
    with torch.no_grad():
        model(input_ids, attention_mask=attention_mask, past_key_values=cropped)
    cropped.crop(-60)
    prompts = tokens(PROMPT, batch_size=2)
    assert torch.equal(generate(model, prompts, cropped), generate(model, prompts, new_cache()))


def test_a_copy_made_in_inference_mode_can_be_used_outside(model, new_cache):
    cache = new_cache()
    sequence = generate(model, tokens(PROMPT), cache)
    with torch.inference_mode():
        copied = copy.deepcopy(cache)
    prompt = torch.cat([sequence, tokens(9)], dim=1)
    assert torch.equal(generate(model, prompt, copied), generate(model, prompt, cache))


def test_rows_can_be_repeated_and_selected(model, new_cache):
    prompts = tokens(PROMPT, batch_size=2)
    cache, alone = new_cache(), new_cache()
    with torch.no_grad():
        model(prompts, past_key_values=cache)
        model(prompts[1:], past_key_values=alone)
    cache.batch_repeat_interleave(2)
    assert_bounds_are_true(cache)
    cache.batch_select_indices(torch.tensor([False, False, False, True]))
    assert_bounds_are_true(cache)
    prompt = torch.cat([prompts[1:], tokens(5)], dim=1)
    assert torch.equal(generate(model, prompt, cache), generate(model, prompt, alone))


def test_rows_change_places(model, new_cache):
    prompts, order = tokens(PROMPT, batch_size=3), torch.tensor([2, 0, 0])
    cache, ordered = new_cache(), new_cache()
    with torch.no_grad():
        model(prompts, past_key_values=cache)
        model(prompts[order], past_key_values=ordered)
    cache.reorder_cache(order)
    assert_bounds_are_true(cache)
    prompt = torch.cat([prompts[order], tokens(5, batch_size=3)], dim=1)
    assert torch.equal(generate(model, prompt, cache), generate(model, prompt, ordered))


def test_budget_can_change_between_calls(model, new_cache):
    document = tokens(PROMPT)
    prompt = torch.cat([document, tokens(5)], dim=1)
    cache = new_cache(2048)
    with torch.no_grad():
        model(document, past_key_values=cache)
    for budget in (32, BUDGET, 2048):
        copied, fresh = copy.deepcopy(cache), new_cache(budget)
        copied.budget = budget
        with torch.no_grad():
            model(document, past_key_values=fresh)
        assert torch.equal(generate(model, prompt, copied), generate(model, prompt, fresh))


def test_inputs_embeds(model, new_cache):
    prompt = tokens(PROMPT)
    embeds = model.get_input_embeddings()(prompt)
    output = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(prompt),
        past_key_values=new_cache(),
        max_new_tokens=ANSWER,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(output, generate(model, prompt, new_cache())[:, PROMPT:])


def test_return_dict_gives_the_cache_back(model, new_cache):
    cache = new_cache()
    output = generate(model, tokens(PROMPT), cache, return_dict_in_generate=True, output_logits=True)
    assert output.past_key_values is cache
    assert cache.get_seq_length() == PROMPT + ANSWER - 1
    expected = feed(model, new_cache(), tokens(PROMPT), output.sequences[:, PROMPT:])
    # `generate` asks the prompt's forward for its last logits only: float32 sums in another order.
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(new_cache, dtype):
    model = make_model(dtype=dtype)
    cache = new_cache()
    assert torch.equal(generate(model, tokens(PROMPT), cache), greedy(model, new_cache(), tokens(PROMPT)))
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    assert {layer.bounds.dtype for layer in cache.layers[2:]} == {cache.method.bounds_dtype or dtype}
    assert_bounds_are_true(cache)
    dense = generate(model, tokens(PROMPT), DynamicCache(), return_dict_in_generate=True, output_logits=True)
    covered = feed(model, new_cache(2048), tokens(PROMPT), dense.sequences[:, PROMPT:])
    expected = torch.stack(dense.logits, dim=1).float()
    # Two orders of summation at this precision, through four layers of activations near 10.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}[dtype]
    torch.testing.assert_close(covered.float(), expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!")


TEXT = (
    "A decode step of a long-context model spends its time reading the KV cache, and most of it does not matter. " * 2
)


def test_pipeline(model, tokenizer, new_cache):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": ANSWER, "do_sample": False, "return_full_text": False}
    output = generator(TEXT, past_key_values=new_cache(), **options)
    inputs = tokenizer(TEXT, return_tensors="pt")
    expected = generate(model, inputs["input_ids"], new_cache())[0, inputs["input_ids"].shape[1] :]
    assert output[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_text_streamer(model, tokenizer, new_cache, capsys):
    inputs = tokenizer(TEXT, return_tensors="pt")
    output = generate(model, inputs["input_ids"], new_cache(), streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


class TestStorage:
    def test_appends_in_place(self, model):
        cache = QuestCache(budget=BUDGET)
        generate(model, tokens(PROMPT), cache, max_new_tokens=2)
        stored = [layer.keys.data_ptr() for layer in cache.layers]
        with torch.no_grad():
            for _ in range(100):
                model(tokens(1), past_key_values=cache)
        assert [layer.keys.data_ptr() for layer in cache.layers] == stored

    def test_grows_geometrically(self, model):
        cache = QuestCache(budget=BUDGET)
        capacities = set()
        with torch.no_grad():
            model(tokens(1), past_key_values=cache)
            for _ in range(40):
                model(tokens(40), past_key_values=cache)
                capacities.add(cache.layers[0].capacity)
        assert len(capacities) <= 7  # 1640 tokens in steps of 256 or an eighth
        assert cache.layers[0].capacity <= 1641 * 9 / 8 + 256 + 16

    def test_beam_search_does_not_grow_it(self, model):
        cache = QuestCache(budget=BUDGET)
        generate(model, tokens(PROMPT), cache, num_beams=3)
        assert {layer.capacity for layer in cache.layers} == {-(-(PROMPT + 256) // 16) * 16}

    def test_max_cache_len_allocates_once(self, model):
        cache = QuestCache(budget=BUDGET, max_cache_len=500)
        generate(model, tokens(PROMPT), cache)
        assert {layer.capacity for layer in cache.layers} == {512}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_dim", [16, 64, 80])
    def test_bounds_are_a_byte_each_and_one_for_every_32_channels_or_a_sixteenth(self, head_dim, dtype):
        model = make_model(head_dim=head_dim, dtype=dtype)
        for bounds_dtype in (torch.int8, None):
            cache = QuestCache(budget=BUDGET, bounds_dtype=bounds_dtype)
            generate(model, tokens(PROMPT), cache, max_new_tokens=2)
            assert all(layer.bounds is None and layer.scales is None for layer in cache.layers[:2])
            for layer in cache.layers[2:]:
                if bounds_dtype is None:
                    assert layer.scales is None
                    assert 16 * layer.bounds.nbytes == layer.keys.nbytes + layer.values.nbytes
                else:
                    num_pages = layer.keys.shape[0] * layer.keys.shape[1] * layer.capacity // 16
                    page_bytes = 2 * head_dim + math.ceil(head_dim / 32)
                    assert layer.bounds.nbytes + layer.scales.nbytes == num_pages * page_bytes

    def test_a_dropped_cache_is_freed_at_once(self, model):
        cache = QuestCache(budget=BUDGET)
        generate(model, tokens(PROMPT), cache)
        freed = [weakref.ref(layer) for layer in cache.layers]
        gc.disable()
        try:
            del cache
            assert [layer() for layer in freed] == [None] * 4
        finally:
            gc.enable()

    @pytest.mark.parametrize(
        ("dtype", "bounds_dtype", "page"),
        [
            (torch.float32, None, 1),
            (torch.bfloat16, None, 1),
            (torch.float32, torch.int8, (2 * 16 + 1) / (2 * 16 * 4)),
            (torch.bfloat16, torch.int8, (2 * 16 + 1) / (2 * 16 * 2)),
        ],
        ids=str,
    )
    def test_read_share_counts_pages_and_bounds(self, dtype, bounds_dtype, page):
        """A page's bounds are as many bytes as `page` tokens."""
        cache = QuestCache(budget=BUDGET, bounds_dtype=bounds_dtype)
        assert cache.read_share == 1.0
        generate(make_model(dtype=dtype), tokens(PROMPT), cache, max_new_tokens=11)
        assert cache.get_seq_length() == 160
        assert cache.tokens_attended == [160, 160, 48, 48]
        assert cache.read_share == (2 * 160 + 2 * (48 + 10 * page)) / (4 * 160)


def test_prefill_in_inference_mode_then_generate(model, new_cache):
    prompt = torch.cat([tokens(PROMPT), tokens(5)], dim=1)
    caches = [new_cache(), new_cache()]
    with torch.inference_mode():
        model(tokens(PROMPT), past_key_values=caches[0])
    with torch.no_grad():
        model(tokens(PROMPT), past_key_values=caches[1])
    assert torch.equal(generate(model, prompt, caches[0]), generate(model, prompt, caches[1]))


def test_a_forward_with_gradients_leaves_the_cache_without_history(model, new_cache):
    cache = new_cache()
    model(tokens(PROMPT), past_key_values=cache)
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in cache.layers)
    copy.deepcopy(cache)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_stock_caches_run_beside_quest(model, static):
    config = model.config
    cache = StaticCache(config=config, max_cache_len=256) if static else DynamicCache(config=config)
    assert torch.equal(generate(model, tokens(PROMPT), cache), generate(model, tokens(PROMPT), QuestCache(budget=2048)))


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, MistralForCausalLM])
def test_rows_of_a_cache_that_was_reset_are_those_of_no_batch(model_class):
    """Its storage is still that of one row."""
    options = {} if model_class is LlamaForCausalLM else {"sliding_window": 8}
    model, cache = make_model(model_class, **options), QuestCache(budget=BUDGET)
    generate(model, tokens(PROMPT), cache)
    cache.reset()
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    prompts = tokens(PROMPT, batch_size=2)
    assert torch.equal(generate(model, prompts, cache), generate(model, prompts, QuestCache(budget=BUDGET)))


def test_crop_by_a_tensor_as_transformers_5_17_has_it_after_drafts(model):
    cache = QuestCache(budget=BUDGET)
    with torch.inference_mode():
        feed(model, cache, tokens(PROMPT), tokens(5))
        cache.crop(torch.tensor(-2))
    assert type(cache.get_seq_length()) is int
    expected = QuestCache(budget=BUDGET)
    feed(model, expected, tokens(PROMPT), tokens(5)[:, :3])
    assert torch.equal(feed(model, cache, tokens(9), tokens(3)), feed(model, expected, tokens(9), tokens(3)))


@pytest.mark.parametrize("score", ["default", Score(0.3, True, "sum")], ids=["default", "sum"])
@pytest.mark.parametrize("by_kernels", [True, False])
def test_defaults_of_pytorch_that_are_not_the_models(model, monkeypatch, score, by_kernels):
    """A user makes other tensors on another device, in another dtype."""
    cpu.first_slots.cache_clear()
    cpu.of_extremes.cache_clear()
    if not by_kernels:
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    answers = []
    for device, dtype in ((None, torch.float32), ("meta", torch.float64)):
        cache, ids = QuestCache(BUDGET, score=score), tokens(PROMPT)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device or "cpu"), torch.no_grad():
                for piece in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
                    logits = model(piece, **{CACHE_NAME: cache}).logits
                cache.reorder_cache(torch.zeros(1, dtype=torch.int64, device="cpu"))
        finally:
            torch.set_default_dtype(torch.float32)
        answers.append(logits)
    assert torch.equal(*answers)
