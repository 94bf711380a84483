"""`hf_quest.capture` beside the graph: when a step is recorded and when anew, whose the results are, copies, the end.

The graphs themselves are in test_capture_gpu.py.
"""

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections import namedtuple

import kernels_on_cpu
import pytest
import torch
from graphs_on_cpu import captured, emulate
from small_llama import ANSWER, BUDGET, PROMPT, generate, make_model, on_any_device, tokens
from test_families import FAMILIES, build, prompts, quest_cache
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from hf_quest import CACHE_NAME, QuestCache, capture, compile_prompts
from hf_quest.seam.capture import recording
from hf_quest.seam.capture.fingerprint import fingerprint
from hf_quest.seam.capture.rehearsal import Rehearsal
from hf_quest.seam.capture.values import copied
from hf_quest.seam.generate import CALLS_COMPILED
from hf_quest.storage.pool import TOKEN

LAYERS = {"num_hidden_layers": 2}


def new_cache(budget=BUDGET, **options):
    return QuestCache(budget, dense_layers=1, **options)


def answer_of(model, seed=1, **options):
    return generate(model, tokens(PROMPT, seed=seed), new_cache(), **options)


@pytest.fixture
def recordings(monkeypatch):
    return emulate(monkeypatch)


@pytest.fixture
def model(recordings):
    return captured(make_model(**LAYERS))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.fixture
def refcounts_only():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@contextlib.contextmanager
def lower_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
    @pytest.mark.parametrize("compile", [False, True, {"triton.enable_pdl": True}])
    def test_a_copy_calls_itself(self, copied, compile):
        model = capture(make_model(**LAYERS), compile)
        copy_of_it = copied(model)
        for each in (model, copy_of_it):
            assert each._compiled_call.model() is each
            assert each.get_compiled_call(None) is each._compiled_call
            assert each._compiled_call.compile == compile
            assert (each._compiled_call.compiled is None) == (compile is False)

    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
    def test_a_copy_records_for_itself(self, model, recordings, copied):
        expected = answer_of(model)
        copy_of_it = copied(model)
        model.lm_head.weight.data.neg_()
        assert torch.equal(answer_of(copy_of_it), expected)
        assert not torch.equal(answer_of(model), expected)
        assert len(recordings) == 3  # one for each cache
        assert copy_of_it._compiled_call.recordings is not model._compiled_call.recordings

    def test_it_is_saved(self, model, tmp_path):
        expected = answer_of(model)
        model.save_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="quest")
        assert torch.equal(answer_of(loaded, disable_compile=True), expected)

    @pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, pickled])
    @pytest.mark.parametrize("compile", [False, True])
    def test_it_is_freed_at_once(self, refcounts_only, copied, compile):
        model = copied(capture(make_model(**LAYERS), compile))
        answer_of(model, max_new_tokens=2)
        address = weakref.ref(model)
        del model
        assert address() is None


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(TypeError, match=r"a model of Transformers.*and not a Linear.*capture the one inside"):
        capture(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("compile", "error", "message"),
    [
        ({"triton.enable_pld": True}, RuntimeError, "triton.enable_pld"),
        (None, TypeError, "True, False, or a dict of options of torch.compile, and not None"),
        ("max-autotune", TypeError, "and not 'max-autotune'"),
    ],
)
def test_what_torch_compile_does_not_take_is_refused(compile, error, message):
    model = make_model(**LAYERS)
    with pytest.raises(error, match=message):
        capture(model, compile)
    assert not hasattr(model, "_compiled_call") or model._compiled_call is None


@pytest.mark.parametrize("compile", [True, {}, {"triton.enable_pdl": True}, {"epilogue_fusion": False}])
def test_options_are_those_that_the_step_is_compiled_by(monkeypatch, compile):
    compiled_with = []
    monkeypatch.setattr(torch, "compile", lambda call, options: compiled_with.append(options) or call)
    capture(make_model(**LAYERS), compile)
    assert compiled_with == [None if compile is True else compile]


class TestWhenAStepIsRecorded:
    def test_once_for_each_cache_and_kind_of_inputs(self, model, recordings):
        cache = new_cache()
        first = generate(model, tokens(PROMPT), cache)
        cache.reset()
        assert torch.equal(generate(model, tokens(PROMPT), cache), first)
        assert torch.equal(answer_of(make_model(**LAYERS)), first)
        assert len(recordings) == 1
        assert model._compiled_call.recording is recordings[0]
        cache.reset()
        cache.budget = PROMPT + ANSWER
        generate(model, tokens(PROMPT), cache)
        cache.reset()
        generate(model, tokens(PROMPT), cache, return_dict_in_generate=True, output_hidden_states=True)
        answer_of(model)
        assert len(recordings) == 4

    def test_a_recording_ends_with_its_cache(self, model, recordings):
        cache = new_cache()
        generate(model, tokens(PROMPT), cache)
        recordings.clear()
        address = weakref.ref(cache)
        del cache
        gc.collect()  # the emulated graph is a cycle
        assert address() is None
        assert model._compiled_call.recording is None

    @pytest.mark.parametrize("local_size", [8, 100])
    def test_not_where_all_layers_are_local(self, recordings, local_size):
        options = {"sliding_window": local_size, **LAYERS}
        model = captured(make_model(MistralForCausalLM, **options))
        expected = generate(make_model(MistralForCausalLM, **options), tokens(PROMPT), new_cache(compile=False))
        assert torch.equal(answer_of(model), expected)
        assert recordings == []

    def test_where_the_masks_of_all_kinds_of_layers_are_none(self, recordings):
        expected = answer_of(make_model(Qwen2ForCausalLM, **LAYERS))
        assert torch.equal(answer_of(captured(make_model(Qwen2ForCausalLM, **LAYERS))), expected)
        assert len(recordings) == 1

    def test_not_where_the_host_waits(self, recordings, caplog):
        """GPT-2 looks at its ids, to warn of padding."""
        model = captured(make_model(GPT2LMHeadModel, pad_token_id=0))
        assert torch.equal(answer_of(model), answer_of(make_model(GPT2LMHeadModel, pad_token_id=0)))
        assert recordings == []
        assert list(model._compiled_call.verdicts.values()) == [False]  # tried once
        assert "the host waits for the GPU" in caplog.text
        assert "_local_scalar_dense" in caplog.text

    def test_not_where_a_mask_comes_with_the_token(self, model, recordings):
        """The prompt has a hole, which no left padding is, and so every step is told of it."""
        mask = torch.ones(1, PROMPT, dtype=torch.int64)
        mask[:, 40:50] = 0
        expected = answer_of(make_model(**LAYERS), attention_mask=mask)
        assert torch.equal(answer_of(model, attention_mask=mask), expected)
        assert recordings == []

    @pytest.mark.parametrize(
        ("mode", "is_another"), [(lower_precision, True), (torch.inference_mode, False), (torch.no_grad, False)]
    )
    def test_anew_in_another_precision(self, model, recordings, mode, is_another):
        expected, cache = answer_of(model, seed=2), new_cache()
        with mode():
            generate(model, tokens(PROMPT), cache)
        num_recordings = len(recordings)
        cache.reset()
        assert torch.equal(generate(model, tokens(PROMPT, seed=2), cache), expected)
        assert len(recordings) - num_recordings == is_another


# Whose hosts wait for a value in every step, or whose masks are more than causal in every layer.
UNRECORDED = {"gpt2", "opt", "doge-masks-of-its-own", "llama4", "llama4-chunk-crossed-while-decoding"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_it_writes_without(family, recordings):
    model, prompt, cache = copy.deepcopy(build(family, "quest")), prompts()[0], quest_cache(16)
    options = {"max_new_tokens": 6}
    expected = generate(model, prompt, quest_cache(16, compile=False), **options)
    captured(model)
    for _ in range(2):
        assert torch.equal(generate(model, prompt, cache, **options), expected)
        cache.reset()
    is_recorded = family not in UNRECORDED and not any(layer.is_sliding for layer in cache.layers)
    assert len(recordings) == is_recorded


REPEATED = tokens(24, seed=2).repeat(1, 6)  # in which prompt lookup finds drafts, some of which are wrong


def by_lookup(model, cache, **options):
    return generate(model, REPEATED, cache, **{"max_new_tokens": 60, "prompt_lookup_num_tokens": 4} | options)


@pytest.mark.skipif(not CALLS_COMPILED, reason="in this version assisted decoding calls nothing that is compiled")
class TestDrafts:
    @pytest.fixture(params=[False, True], ids=["without kernels", "with kernels"])
    def has_kernels(self, request, monkeypatch):
        if request.param:
            kernels_on_cpu.emulate(monkeypatch)
        return request.param

    @pytest.mark.parametrize("options", [{}, {"codes": 2}, {"offloading": True}, {"budget": 400}], ids=str)
    def test_are_verified_by_recordings(self, model, recordings, has_kernels, options):
        if options.get("codes") and not has_kernels:
            pytest.skip("codes are in no graph without kernels")
        cache = new_cache(**options)
        expected = by_lookup(make_model(**LAYERS), new_cache(**options, compile=False))
        assert torch.equal(by_lookup(model, cache), expected)
        assert {recording.inputs["input_ids"].shape[1] for recording in recordings} >= {1, 5}
        plain = generate(make_model(**LAYERS), REPEATED, new_cache(**options, compile=False), max_new_tokens=60)
        assert torch.equal(expected, plain)
        longer = [tokens(1, seed=3), tokens(9, seed=4)]
        for each in longer:  # plain decoding goes on from what the graphs stored, kept and dropped
            text = torch.cat([expected, each], dim=1)
            expected = generate(make_model(**LAYERS), text, new_cache(**options, compile=False))
            assert torch.equal(generate(model, text, cache), expected)

    def test_each_number_of_them_has_a_recording_of_its_own(self, model, recordings):
        cache = new_cache()
        for _ in range(2):
            by_lookup(model, cache)
            cache.reset()
            by_lookup(model, cache, prompt_lookup_num_tokens=2)
            cache.reset()
        sizes = [recording.inputs["input_ids"].shape[1] for recording in recordings]
        assert len(sizes) == len(set(sizes))
        assert {1, 3, 5} <= set(sizes)

    def test_few_are_not_recorded(self, model, recordings):
        expected = generate(make_model(**LAYERS), REPEATED, new_cache(), max_new_tokens=12)
        assert torch.equal(by_lookup(model, new_cache(), max_new_tokens=12), expected)
        assert [recording for recording in recordings if recording.inputs["input_ids"].shape[1] > 1] == []

    @pytest.mark.parametrize("padding", [7, 30, 60])
    def test_not_of_a_padded_row(self, model, recordings, has_kernels, padding):
        mask = torch.ones_like(REPEATED)
        mask[:, :padding] = 0
        expected = by_lookup(make_model(**LAYERS), new_cache(compile=False), attention_mask=mask)
        assert torch.equal(by_lookup(model, new_cache(), attention_mask=mask), expected)
        assert [recording for recording in recordings if recording.inputs["input_ids"].shape[1] > 1] == []

    def test_of_an_assistant(self, model, recordings, has_kernels):
        assistant = captured(make_model(**LAYERS))
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        expected = generate(make_model(**LAYERS), REPEATED, new_cache(compile=False), max_new_tokens=60)
        found = generate(model, REPEATED, new_cache(), max_new_tokens=60, assistant_model=assistant)
        assert torch.equal(found, expected)
        assert any(recording.inputs["input_ids"].shape[1] > 1 for recording in recordings)

    def test_not_where_the_mask_has_a_hole(self, model, recordings):
        mask = torch.ones_like(REPEATED)
        mask[:, 40:50] = 0
        expected = by_lookup(make_model(**LAYERS), new_cache(compile=False), attention_mask=mask)
        assert torch.equal(by_lookup(model, new_cache(), attention_mask=mask), expected)
        assert recordings == []

    def test_not_beside_a_window(self, recordings):
        options = {"sliding_window": 16, **LAYERS}
        expected = by_lookup(make_model(MistralForCausalLM, **options), new_cache(compile=False))
        assert torch.equal(by_lookup(captured(make_model(MistralForCausalLM, **options)), new_cache()), expected)
        assert recordings == []

    def test_beside_compiled_prompts(self, model, recordings, has_kernels):
        expected = by_lookup(make_model(**LAYERS), new_cache(compile=False))
        assert torch.equal(by_lookup(compile_prompts(model, backend="eager"), new_cache()), expected)
        assert any(recording.inputs["input_ids"].shape[1] > 1 for recording in recordings)

    def test_whatever_the_configuration_for_compilation(self, recordings):
        model, config = capture(make_model(**LAYERS)), on_any_device(mode="max-autotune")
        expected = by_lookup(make_model(**LAYERS), new_cache(compile=False))
        assert torch.equal(by_lookup(model, new_cache(), compile_config=config), expected)
        assert any(recording.inputs["input_ids"].shape[1] > 1 for recording in recordings)

    def test_the_oldest_recordings_go(self, model, recordings, monkeypatch):
        monkeypatch.setattr(recording, "MOST_RECORDINGS", 2)
        cache = new_cache()
        for num_drafts in (4, 2):
            by_lookup(model, cache, prompt_lookup_num_tokens=num_drafts)
            cache.reset()
            assert len(recordings) > 1
            assert len(model._compiled_call.recordings[threading.get_ident()]) <= 2

    def test_a_pool_forgets_those_of_a_recording_that_was_interrupted(self, model, recordings, monkeypatch):
        kernels_on_cpu.emulate(monkeypatch)
        cache, others = new_cache(codes=2, offloading=True, pool=256), tokens(9, seed=4)

        def interrupt(module, arguments):
            if cache.shared.step.is_recording and arguments[0].shape[1] == 5:
                raise KeyboardInterrupt

        hook = model.lm_head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            by_lookup(model, cache)
        hook.remove()
        length, tags = cache.get_seq_length(), cache.layers[1].storage.pool.tags
        assert (tags & TOKEN).max() > length
        with torch.no_grad():
            model(others[:, :1], **{CACHE_NAME: cache})
        assert (tags & TOKEN).max() <= length

    @pytest.mark.parametrize("num_padding", [0, 9])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_every_family(self, family, recordings, num_padding):
        model, prompt = copy.deepcopy(build(family, "quest")), prompts()[0].repeat(1, 2)
        mask = torch.ones_like(prompt)
        mask[:, :num_padding] = 0
        options = {"max_new_tokens": 16, "prompt_lookup_num_tokens": 2, "attention_mask": mask}
        expected = generate(model, prompt, quest_cache(16, compile=False), **options)
        assert torch.equal(generate(captured(model), prompt, quest_cache(16), **options), expected)


class Shift(nn.Module):
    """An adapter, of which PEFT has many: a layer that takes another's place, with a switch."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.is_active = layer, True
        self.amount = nn.Parameter(torch.linspace(-9, 9, len(layer.weight)))

    def forward(self, x):
        return self.layer(x) + self.amount if self.is_active else self.layer(x)


def replace_weight(model):
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())


def load_adapter(model):
    model.lm_head = Shift(model.lm_head)


def switch_adapter(model):
    model.lm_head.is_active = not model.lm_head.is_active


def replace_buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / 2


def hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: -output)


def configure(model):
    model.config.rms_norm_eps = 1e-3


def configure_in_a_dict(model):
    model.config.rope_parameters["rope_theta"] = 5.0


def to_half(model):
    model.model.layers[0].half()


def to_other_memory(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


class TestChangesOfTheModel:
    @pytest.mark.parametrize("change", [replace_weight, load_adapter, replace_buffer, hook])
    def test_are_seen_by_the_next_generate(self, model, recordings, change):
        cache = new_cache()
        before = generate(model, tokens(PROMPT), cache)
        change(model)
        cache.reset()
        after = generate(model, tokens(PROMPT), cache)
        assert len(recordings) == 2
        assert not torch.equal(after, before)
        assert torch.equal(after, answer_of(model, disable_compile=True))

    def test_an_adapter_is_switched_there_and_back(self, model, recordings):
        load_adapter(model)
        cache, answers = new_cache(), []
        for _ in range(3):
            answers.append(generate(model, tokens(PROMPT), cache))
            switch_adapter(model)
            cache.reset()
        assert torch.equal(answers[0], answers[2])
        assert not torch.equal(answers[0], answers[1])
        assert len(recordings) == 3

    def test_weights_may_change_in_place(self, model, recordings):
        cache = new_cache()
        before = generate(model, tokens(PROMPT), cache)
        with torch.no_grad():
            model.lm_head.weight.neg_()
        cache.reset()
        after = generate(model, tokens(PROMPT), cache)
        assert not torch.equal(after, before)
        assert torch.equal(after, answer_of(model, disable_compile=True))
        assert len(recordings) == 1

    def test_a_step_that_could_not_be_recorded_is_tried_again(self, recordings):
        model, cache = captured(make_model(**LAYERS)), new_cache()
        handle = model.lm_head.register_forward_hook(lambda module, args, output: output * output.abs().max().item())
        generate(model, tokens(PROMPT), cache)
        assert recordings == []
        handle.remove()
        cache.reset()
        generate(model, tokens(PROMPT), cache)
        assert len(recordings) == 1


class TestFingerprint:
    @pytest.mark.parametrize(
        "change",
        [
            replace_weight,
            load_adapter,
            replace_buffer,
            hook,
            configure,
            configure_in_a_dict,
            to_half,
            to_other_memory,
            nn.Module.train,
            lambda model: model.resize_token_embeddings(300),
            lambda model: model.set_attn_implementation("sdpa"),
            lambda model: model.model.layers.append(copy.deepcopy(model.model.layers[0])),
            lambda model: setattr(model.model.layers[0], "forward", model.model.layers[1].forward),
        ],
    )
    def test_is_another_after(self, change):
        model = make_model(**LAYERS)
        before = fingerprint(model)
        kept = [*model.parameters(), *model.buffers()]  # or an address might be taken by what follows
        kept = [tensor.data for tensor in kept]
        change(model)
        assert fingerprint(model) != before
        assert kept

    @pytest.mark.parametrize(
        "use",
        [
            lambda model: answer_of(model),
            lambda model: model.state_dict(),
            lambda model: model.lm_head.weight.data.zero_(),
            lambda model: model.eval(),
            lambda model: capture(model),
            lambda model: model.generation_config.update(max_new_tokens=3),
        ],
    )
    def test_is_the_same_after(self, use):
        model = make_model(**LAYERS)
        before = fingerprint(model)
        use(model)
        assert fingerprint(model) == before

    def test_of_quantised_weights(self):
        torchao = pytest.importorskip("torchao.quantization")
        model = make_model(**LAYERS)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        before = fingerprint(model)
        assert fingerprint(model) == before
        weight = model.model.layers[0].mlp.up_proj.weight
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(copy.deepcopy(weight), requires_grad=False)
        assert fingerprint(model) != before


class TestRehearsal:
    """Of operations on a CPU, which has the place of the device."""

    x = torch.arange(6.0)
    mask = x > 2

    @pytest.mark.parametrize(
        "operation",
        [
            lambda x, mask: x.max().item(),
            lambda x, mask: bool(mask.all()),
            lambda x, mask: x.nonzero(),
            lambda x, mask: x[mask],
            lambda x, mask: x.masked_select(mask),
            lambda x, mask: x.index_put_((mask,), x[3:].clone()),
            lambda x, mask: torch.equal(x, x),
            lambda x, mask: x.unique(),
            lambda x, mask: x.to("meta"),
            lambda x, mask: nn.functional.dropout(x, 0.5),
            lambda x, mask: torch.rand(2),
        ],
    )
    def test_of_what_cannot_be_recorded(self, operation):
        with Rehearsal(torch.device("cpu")) as rehearsal:
            operation(self.x.clone(), self.mask)
        assert rehearsal.misfits

    @pytest.mark.parametrize(
        "operation",
        [
            lambda x, mask: x[torch.arange(2)],
            lambda x, mask: torch.where(mask, x, 0.0),
            lambda x, mask: x.__setitem__(0, 1.0),
            lambda x, mask: x.masked_fill_(mask, 0.0),
            lambda x, mask: x.index_put_((mask,), x[0]),
            lambda x, mask: x.to(torch.float16),
            lambda x, mask: x.index_put_((torch.arange(2),), x[:2].clone()),
            lambda x, mask: x.topk(2),
            lambda x, mask: nn.functional.dropout(x, 0.5, training=False),
            lambda x, mask: nn.functional.scaled_dot_product_attention(*(x.view(1, 1, 3, 2) for _ in range(3))),
        ],
    )
    def test_of_what_can(self, operation):
        with Rehearsal(torch.device("cpu")) as rehearsal:
            operation(self.x.clone(), self.mask)
        assert not rehearsal.misfits

    def test_of_what_is_on_another_device(self):
        with Rehearsal(torch.device("meta")) as rehearsal:
            self.x.max().item()
        assert not rehearsal.misfits

    def test_of_numbers_of_the_host(self):
        with Rehearsal(torch.device("meta")) as rehearsal:
            self.x.to("meta")
            torch.empty(6, device="meta")[torch.arange(2)]
        assert rehearsal.misfits == {"aten._to_copy.default", "aten.index.Tensor"}


class TestResults:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_hidden_states_of_every_step_are_their_own(self, model, recordings, mode):
        options = {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True}
        with mode():
            output = answer_of(model, **options)
        expected = answer_of(make_model(**LAYERS), **options)
        assert len(recordings) == 1
        for name in ("hidden_states", "logits"):
            for steps, expected_steps in zip(output[name], expected[name], strict=True):
                # Sums of float32 in another order; those of another step are as far off as they are large.
                torch.testing.assert_close(steps, expected_steps, rtol=1e-4, atol=1e-4)
        addresses = {state.data_ptr() for steps in output.hidden_states for state in steps}
        assert len(addresses) == len(output.hidden_states) * (LAYERS["num_hidden_layers"] + 1)

    def test_copies_of_tensors_in_whatever_holds_them(self):
        x = torch.arange(3.0)
        pair, inner = namedtuple("Pair", "first second")(x, None), BaseModelOutput(last_hidden_state=x)
        output = CausalLMOutputWithPast(logits=x, hidden_states=((x, x + 1), [x], {"a": x}, pair, inner))
        result = copied(output, {})
        x.zero_()
        (first, second), (third,), fourth, fifth, sixth = result.hidden_states
        assert [type(result), type(fifth), type(sixth)] == [CausalLMOutputWithPast, type(pair), BaseModelOutput]
        same = [result.logits, first, third, fourth["a"], fifth.first, sixth.last_hidden_state]
        assert all(tensor is result.logits for tensor in same)
        assert result.logits.tolist() == [0, 1, 2]
        assert second.tolist() == [1, 2, 3]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_cache_has_addresses_of_its_own(copied):
    cache = new_cache()
    generate(make_model(**LAYERS), tokens(PROMPT), cache, max_new_tokens=2)
    for layer in cache.layers:
        layer.storage.has_kernels = True  # as on a GPU, where they find storage by its address
        layer.storage.has_moved()
    cache.get_mask_sizes(1, 0)
    copy_of_it = copied(cache)
    for each in (cache, copy_of_it):
        each.get_mask_sizes(1, 0)
        rows = each.layers[0].storage.on_device.addresses.tolist()
        assert [row[0] for row in rows] == [layer.keys.data_ptr() for layer in each.layers]
        assert rows == [layer.storage.find_addresses() for layer in each.layers]
    assert cache.shared.rows.addresses != copy_of_it.shared.rows.addresses


class TestThreads:
    def test_each_has_its_own_recording_and_its_own_tokens(self, model, recordings):
        seeds, answers = range(2, 5), {}
        expected = {seed: answer_of(make_model(**LAYERS), seed=seed) for seed in seeds}
        all_there = threading.Barrier(len(seeds))

        def work(seed):
            cache = new_cache()
            all_there.wait()
            answers[seed] = [generate(model, tokens(PROMPT, seed=seed), cache)]
            cache.reset()
            all_there.wait()
            answers[seed].append(generate(model, tokens(PROMPT, seed=seed), cache))
            all_there.wait()  # a thread that is gone could leave its number to another

        threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(recordings) == len(seeds)
        for seed in seeds:
            assert all(torch.equal(answer, expected[seed]) for answer in answers[seed])

    def test_recordings_of_threads_that_are_gone_end_with_their_caches(self, model, recordings):
        caches = [new_cache(), new_cache()]
        for cache in caches:
            thread = threading.Thread(target=generate, args=(model, tokens(PROMPT), cache))
            thread.start()
            thread.join()
        recordings.clear()
        caches.clear()
        del cache, thread
        gc.collect()
        assert model._compiled_call.recordings == {}
