"""`generate` with `custom_generate=decode_ahead` writes what it writes without, also where the host is late."""

import copy

import pytest
import torch
from graphs_on_cpu import captured
from graphs_on_cpu import emulate as emulate_graphs
from kernels_on_cpu import emulate
from small_llama import ANSWER, BUDGET, PROMPT, generate, make_model, on_any_device, tokens
from transformers import DynamicCache, GptOssForCausalLM, Phi3ForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from hf_quest import CACHE_NAME, H2OCache, QuestCache, decode_ahead, tiny
from hf_quest.seam import ahead

WISHES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "chunks": {"prefill_chunk_size": 37},
    "one token": {"max_new_tokens": 1},
    "everything told": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(params=[0, 1], autouse=True)
def late(request, monkeypatch):
    """Steps: on a GPU it is one."""
    monkeypatch.setattr(ahead, "steps_late", lambda device: request.param)
    return request.param


def new_cache(**options):
    return QuestCache(BUDGET, dense_layers=1, **options)


def both(model, prompt, caches, **options):
    """What is written without and with it, from the same random numbers."""
    outputs = []
    for cache, how in zip(caches, ({}, {"custom_generate": decode_ahead}), strict=True):
        torch.manual_seed(7)
        outputs.append(generate(model, prompt, cache, **options, **how))
    return outputs


def assert_same(expected, output):
    if torch.is_tensor(expected):
        assert torch.equal(output, expected)
        return
    assert expected.keys() == output.keys()
    assert torch.equal(output.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(output[name]) == len(expected[name])
        assert all(torch.equal(mine, given) for mine, given in zip(output[name], expected[name], strict=True))


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_wishes(model, wish):
    caches = new_cache(), new_cache()
    expected, output = both(model, tokens(PROMPT), caches, **wish)
    assert_same(expected, output)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


class Kept(BaseStreamer):
    def __init__(self):
        self.told, self.is_over = [], False

    def put(self, value):
        assert not self.is_over
        assert value.device.type == "cpu"
        self.told.append(value.clone())

    def end(self):
        self.is_over = True


def ends_of(model, prompt, at, **options):
    """Tokens by which the rows of a greedy text end after `at` tokens or sooner."""
    written = generate(model, prompt, new_cache(), **options)[:, prompt.shape[1] :]
    return sorted({int(row[place]) for row, place in zip(written, at, strict=True)})


@pytest.mark.parametrize("later", [0, 2])
@pytest.mark.parametrize("at", [(0, 0), (3, 9), (23, 5)])
@pytest.mark.parametrize("is_padded", [False, True])
def test_rows_that_end_at_different_tokens(model, late, monkeypatch, later, at, is_padded):
    monkeypatch.setattr(ahead, "steps_late", lambda device: late + later)
    prompt = tokens(PROMPT, batch_size=2)
    if is_padded:
        prompt[1, :37] = 0
    mask = (prompt > 0).long()
    ends = ends_of(model, prompt, at, attention_mask=mask)
    caches, outputs = (new_cache(), new_cache()), []
    for cache, how in zip(caches, ({}, {"custom_generate": decode_ahead}), strict=True):
        options = {"attention_mask": mask, "eos_token_id": ends, "return_dict_in_generate": True, **how}
        outputs.append(generate(model, prompt, cache, output_scores=True, output_logits=True, **options))
    assert_same(*outputs)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    # And the cache goes on as the other one does.
    question = torch.cat([outputs[0].sequences, tokens(9, seed=3, batch_size=2)], dim=1)
    masks = torch.cat([mask, torch.ones(2, question.shape[1] - PROMPT, dtype=torch.int64)], dim=1)
    answers = [generate(model, question, cache, attention_mask=masks) for cache in caches]
    assert torch.equal(*answers)


@pytest.mark.parametrize("at", [0, 6, 22])
def test_what_is_streamed_ends_with_the_text(model, at):
    prompt = tokens(PROMPT)
    ends, streamers = ends_of(model, prompt, (at,)), (Kept(), Kept())
    for streamer, how in zip(streamers, ({}, {"custom_generate": decode_ahead}), strict=True):
        generate(model, prompt, new_cache(), eos_token_id=ends, streamer=streamer, **how)
        assert streamer.is_over
    assert len(streamers[0].told) == len(streamers[1].told)
    assert all(torch.equal(mine, given) for mine, given in zip(*(each.told for each in streamers), strict=True))


def test_stop_strings():
    model, tokenizer = tiny.load(attn_implementation="quest")
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, ["50"])])
    document = "The secret code of Dorlin is 402717. The secret code of Melvan is 935048.\n" * 4
    ids = tokenizer(f"{document}Question: what is the secret code of Melvan? Answer:", return_tensors="pt").input_ids
    caches = QuestCache(64), QuestCache(64)
    expected, output = both(model, ids, caches, stopping_criteria=stop, max_new_tokens=20)
    assert torch.equal(output, expected)
    assert output.shape[1] < ids.shape[1] + 20


class After(StoppingCriteria):
    def __init__(self, num_tokens):
        self.num_tokens = num_tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.num_tokens)


def test_criteria_of_ones_own(model):
    caches, stop = (new_cache(), new_cache()), StoppingCriteriaList([After(PROMPT + 5)])
    expected, output = both(model, tokens(PROMPT), caches, stopping_criteria=stop)
    assert torch.equal(output, expected)
    assert caches[1].get_seq_length() == PROMPT + 4


def test_a_prefilled_document(model):
    prefilled, document = new_cache(), tokens(PROMPT)
    with torch.no_grad():
        model(document, **{CACHE_NAME: prefilled})
    question = torch.cat([document, tokens(9, seed=2)], dim=1)
    expected, output = both(model, question, (copy.deepcopy(prefilled), prefilled))
    assert torch.equal(output, expected)


def test_a_model_with_rotary_factors_of_long_texts_reads_again():
    """It would drop the cache at the crossing, which only the preparation of its inputs tells."""
    factors = {"long_factor": [4.0] * 8, "short_factor": [1.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    model = make_model(
        Phi3ForCausalLM,
        rope_parameters=rope,
        original_max_position_embeddings=64,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    expected, output = both(model, tokens(58), (new_cache(), new_cache()))
    assert torch.equal(output, expected)


def test_local_layers():
    torch.manual_seed(0)
    model = make_model(GptOssForCausalLM, num_local_experts=2, num_experts_per_tok=1, head_dim=16, sliding_window=8)
    expected, output = both(model, tokens(60), (new_cache(), new_cache()))
    assert torch.equal(output, expected)


@pytest.mark.parametrize("new", [lambda: H2OCache(64, dense_layers=1), DynamicCache], ids=["evicts", "stock"])
def test_other_caches_are_left_to_transformers(model, new, monkeypatch):
    said = []
    monkeypatch.setattr(ahead, "say_once", said.append)
    expected, output = both(model, tokens(PROMPT), (new(), new()))
    assert torch.equal(output, expected)
    assert len(said) == 1
    assert "Transformers' own loop" in said[0]


def test_beams_are_refused(model):
    cache = new_cache()
    with pytest.raises(ValueError, match="For beam search call generate without"):
        generate(model, tokens(PROMPT), cache, num_beams=2, custom_generate=decode_ahead)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("codes", [None, 2])
def test_a_captured_step_is_not_prepared_again(model, monkeypatch, codes, is_padded):
    prompt = tokens(PROMPT, batch_size=2)
    if is_padded:
        prompt[1, :37] = 0
    options = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 4 * ANSWER}
    expected = generate(model, prompt, new_cache(codes=codes), **options)
    emulate(monkeypatch)
    recordings, prepared = emulate_graphs(monkeypatch), []
    recorder = captured(copy.deepcopy(model))
    prepare = ahead.Steps.prepare
    monkeypatch.setattr(ahead.Steps, "prepare", lambda *arguments: prepared.append(1) or prepare(*arguments))
    cache = new_cache(codes=codes)
    output = generate(recorder, prompt, cache, custom_generate=decode_ahead, **options)
    assert torch.equal(output, expected)
    assert len(recordings) == 1
    assert len(prepared) == 2
    assert cache.get_seq_length() == output.shape[1] - 1


def test_a_compiled_step(late):
    if late == 1:
        pytest.skip("one kind of lateness is enough for what takes so long")
    torch._dynamo.reset()
    model = make_model(num_hidden_layers=2)
    expected = generate(model, tokens(PROMPT), new_cache())
    config = on_any_device(backend="aot_eager", mode=None)
    output = generate(model, tokens(PROMPT), new_cache(), compile_config=config, custom_generate=decode_ahead)
    assert torch.equal(output, expected)
