"""`compile_prompts`: the answers of the model as it stands, by few graphs, whatever the lengths, chunks and model.

The backend "eager" runs a graph's own operations, so that its answers are the same bits. What inductor makes of them is
compared once, and measured on GPUs.
"""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from graphs_on_cpu import captured, emulate
from small_llama import BUDGET, PROMPT, generate, greedy, make_model, on_any_device, tokens
from test_families import build, left_padded, prompts, quest_cache, warnings_said  # noqa: F401
from test_families import generate as generate_family
from test_methods import ENCODER_DECODERS
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, GPT2LMHeadModel

from hf_quest import CACHE_NAME, CritiPrefill, H2OCache, PageReads, QuestCache, TokenSelectCache, compile_prompts
from hf_quest.seam import compiling
from hf_quest.seam.capture import recording
from hf_quest.seam.region import packed, unpacked

pytestmark = pytest.mark.long

LAYERS = {"num_hidden_layers": 3}
HIDDEN, HEAD_DIM = 64, 16  # of `make_model`
PREFILL = CritiPrefill(budget=64, segment_size=16, block_size=16, threshold=64)


def new_cache(**options):
    return QuestCache(BUDGET, dense_layers=1, **options)


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def model():
    return make_model(**LAYERS)


@pytest.fixture
def compiled(model):
    return compile_prompts(copy.deepcopy(model), backend="eager")


def assert_same_answers(model, compiled, input_ids, make_cache=new_cache, **options):
    expected = generate(model, input_ids, make_cache(), **options)
    assert torch.equal(generate(compiled, input_ids, make_cache(), **options), expected)


class TestOneGraph:
    @pytest.mark.parametrize("prefill", [None, PREFILL], ids=["dense", "segments"])
    def test_for_prompts_of_any_length(self, model, compiled, prefill):
        """Of two tokens, of as many as a hidden state or a head has channels, and of the last one's and one more."""
        for num_tokens in (PROMPT, HIDDEN, HEAD_DIM, 2, 3, 2 * PROMPT + 1):
            assert_same_answers(model, compiled, tokens(num_tokens), lambda: new_cache(prefill=prefill))
        assert num_graphs() == 1

    @pytest.mark.parametrize("chunk", [HIDDEN, 37, PROMPT - 2])
    def test_for_chunks_without_a_mask_and_one_with(self, model, compiled, chunk):
        """On a CPU the first chunk goes without a mask, and on a GPU all do."""
        for num_tokens in (PROMPT, 4 * PROMPT):
            assert_same_answers(model, compiled, tokens(num_tokens), prefill_chunk_size=chunk)
        assert num_graphs() == 2

    def test_for_rows_with_padding_and_conversations(self, model, compiled):
        for num_rows in (2, 3, 4):
            input_ids = tokens(PROMPT, batch_size=num_rows)
            input_ids[1, :37] = 0
            caches = [new_cache(), new_cache()]
            for _ in range(2):
                options = {"attention_mask": (input_ids > 0).long()}
                first, second = (
                    generate(each, input_ids, cache, **options)
                    for each, cache in zip((model, compiled), caches, strict=True)
                )
                assert torch.equal(first, second)
                input_ids = torch.cat([first, tokens(20, seed=2, batch_size=num_rows)], dim=1)
        assert num_graphs() == 1

    def test_for_drafts(self, model, compiled):
        text = tokens(40).repeat(1, 4)
        assert_same_answers(model, compiled, text, prompt_lookup_num_tokens=4)
        assert num_graphs() == 2  # the prompt goes without a mask

    def test_of_inductor(self, model):
        """Sums in another order change float32 logits by some of their 24 bits."""
        compiled = compile_prompts(copy.deepcopy(model))
        for num_tokens in (PROMPT, 2 * PROMPT):
            assert_same_answers(model, compiled, tokens(num_tokens), lambda: new_cache(prefill=PREFILL))
            with torch.no_grad():
                logits, expected = (
                    each(tokens(num_tokens), **{CACHE_NAME: new_cache()}).logits for each in (compiled, model)
                )
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
        assert num_graphs() == 1

    def test_beside_that_of_the_decode_step(self, model, compiled):
        config = on_any_device(backend="eager", mode=None)
        for num_tokens in (PROMPT, PROMPT + 50):
            expected = generate(model, tokens(num_tokens), new_cache())
            output = generate(compiled, tokens(num_tokens), new_cache(), compile_config=config)
            assert torch.equal(output, expected)
            assert num_graphs() == 2


@pytest.mark.parametrize("compile", [False, True])
def test_steps_are_recorded_as_before(monkeypatch, model, compiled, compile):
    recordings = emulate(monkeypatch)
    expected = generate(model, tokens(PROMPT), new_cache())
    captured(compiled, compile=compile)
    monkeypatch.setattr(compiled._compiled_call, "compiled", torch.compile(recording.call, backend="eager"))
    assert torch.equal(generate(compiled, tokens(PROMPT), new_cache()), expected)
    assert len(recordings) == 1
    assert num_graphs() == 1 + compile


FOR_MORE = "keys or values that the cache handed over are not for its attention only."
NO_ATTENTION = "it attends 0 times with what the cache handed over."
# Families of which every layer is compiled, and such with layers that share keys and values, or look at what is stored.
NOT_ALL = {
    "gemma3n": ("Gemma3nTextDecoderLayer", {FOR_MORE, NO_ATTENTION}),
    "gemma4": ("Gemma4TextDecoderLayer", {FOR_MORE}),
    "gemma4-shared-kv": ("Gemma4TextDecoderLayer", {FOR_MORE, NO_ATTENTION}),
    "doge-masks-of-its-own": ("DogeDecoderLayer", {FOR_MORE}),
}
ALL = ["mistral-window", "mixtral", "phi3", "gemma2", "cohere", "gpt_oss", "llama4", "afmoe", "gpt2", "opt"]
NONE = ("gemma3n", "gemma4-shared-kv", "doge-masks-of-its-own")


@pytest.mark.parametrize("family", [*ALL, *NOT_ALL])
def test_families_answer_as_before_and_say_what_is_not_compiled(family, warnings_said):  # noqa: F811
    model = build(family, "quest")
    compiled = compile_prompts(copy.deepcopy(model), backend="eager")
    for input_ids, options in ((prompts()[0], {"prefill_chunk_size": 20}), (left_padded(), {})):
        expected = generate_family(model, input_ids, quest_cache(16), **options)
        answer = generate_family(compiled, input_ids, quest_cache(16), **options)
        assert all(torch.equal(*pair) for pair in zip(answer, expected, strict=True))
    layer, reasons = NOT_ALL.get(family, (None, set()))
    said = {message for message in warnings_said() if message.startswith("compile_prompts")}
    assert bool(said) == bool(reasons)
    assert said <= {f"compile_prompts leaves a {layer} as it is: {reason}" for reason in reasons}
    assert (num_graphs() > 0) == (family not in NONE)


PARTS = {
    "layer": lambda model: model.model.layers[1],
    "attention": lambda model: model.model.layers[1].self_attn,
    "mlp": lambda model: model.model.layers[1].mlp,
    "projection": lambda model: model.model.layers[1].self_attn.q_proj,
}


class TestLaterChanges:
    """What is put into a model once its prompts have run compiled."""

    def forward(self, model, **options):
        with torch.no_grad():
            return model(tokens(PROMPT), **{CACHE_NAME: new_cache()}, **options)

    @pytest.mark.parametrize("part", PARTS)
    def test_a_hook_is_called_and_changes_what_it_would(self, model, compiled, part):
        plain = self.forward(compiled).logits
        calls, logits = [], []
        for idx, each in enumerate((model, compiled)):

            def halve(module, inputs, output, idx=idx):
                calls.append(idx)
                return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

            handle = PARTS[part](each).register_forward_hook(halve)
            logits.append(self.forward(each).logits)
            handle.remove()
        assert calls == [0, 1]
        assert torch.equal(*logits)
        assert not torch.equal(logits[1], plain)
        assert torch.equal(self.forward(compiled).logits, plain)

    def test_a_hook_of_all_modules(self, model, compiled):
        self.forward(compiled)
        calls = [[], []]
        for each, seen in zip((model, compiled), calls, strict=True):
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, inputs, output, seen=seen: seen.append(type(module))
            )
            self.forward(each)
            handle.remove()
        assert calls[0] == calls[1] != []

    def test_a_config_that_asks_for_hidden_states(self, model, compiled):
        self.forward(compiled)
        outputs = []
        for each in (model, compiled):
            each.config.output_hidden_states = True
            outputs.append(self.forward(each).hidden_states)
        assert len(outputs[0]) == 1 + LAYERS["num_hidden_layers"]
        assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


@pytest.mark.filterwarnings("ignore:compile_prompts leaves a layer")
def test_layers_that_run_more_than_once_are_left_as_they_are():
    HrmTextConfig = pytest.importorskip("transformers").HrmTextConfig
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        H_cycles=2,
        L_cycles=2,
        max_position_embeddings=512,
        prefix_lm=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="quest").eval()
    compiled = compile_prompts(copy.deepcopy(model), backend="eager")
    caches, ids = [new_cache(), new_cache()], tokens(PROMPT) % 94 + 2
    for each in (ids, ids[:, :1], ids[:, :5]):
        with torch.no_grad():
            first, second = (
                one(each, **{CACHE_NAME: cache}).logits for one, cache in zip((model, compiled), caches, strict=True)
            )
        assert torch.equal(first, second)


def test_an_unknown_backend_is_said_at_once(model):
    with pytest.raises(ValueError, match="There is no backend 'nosuch' for compile_prompts"):
        compile_prompts(model, backend="nosuch")
    with pytest.raises(ValueError, match="would record a prompt's attention once"):
        compile_prompts(model, backend="cudagraphs")


@pytest.mark.parametrize("of", ["bart", "t5"])
def test_a_decoder_with_cross_attention_is_refused(of):
    """Whatever the layers of its encoder are like, which read no prompt."""
    model_class, config_class, options = ENCODER_DECODERS[of]
    model = model_class(config_class(d_model=32, vocab_size=64, attn_implementation="quest", **options))
    with pytest.raises(ValueError, match="found no decoder layer with one attention"):
        compile_prompts(model)
    assert all(module._compiled_call_impl is None for module in model.modules())


class TestWhatStays:
    def test_a_layer_with_the_cache_of_an_encoder_decoder_and_it_is_said(self, warnings_said):  # noqa: F811
        """Some models have one attention for both."""
        hidden, message = torch.zeros(1, 5, 8), "leaves a layer as it is that is given an EncoderDecoderCache"
        with torch.no_grad():
            for cache, is_said in ((DynamicCache(), False), (new_cache(), True)):
                both = EncoderDecoderCache(cache, DynamicCache())
                assert compiling.cache_of_prompt((hidden,), {CACHE_NAME: both}) is None
                assert any(message in each for each in warnings_said()) == is_said

    def test_a_copy_is_not_compiled(self, model, compiled):
        for each in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
            assert_same_answers(model, each, tokens(PROMPT))
        assert num_graphs() == 0

    def test_a_model_in_which_it_is_undone(self, model, compiled):
        assert compile_prompts(compiled, False) is compiled
        assert_same_answers(model, compiled, tokens(PROMPT))
        assert num_graphs() == 0

    def test_gradients(self, model, compiled):
        gradients = []
        for each in (model, compiled):
            each(tokens(PROMPT), labels=tokens(PROMPT), **{CACHE_NAME: new_cache()}).loss.backward()
            gradients.append([parameter.grad for parameter in each.parameters()])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
        assert num_graphs() == 0

    def test_forwards_without_a_cache_of_this_package(self, model, compiled):
        with torch.no_grad():
            assert torch.equal(compiled(tokens(PROMPT)).logits, model(tokens(PROMPT)).logits)
        assert num_graphs() == 0

    def test_what_is_watched(self, model, compiled):
        seen = []
        for each in (model, compiled):
            cache = new_cache(prefill=PREFILL)
            cache.watcher = reads = PageReads()
            generate(each, tokens(PROMPT), cache)
            seen.append(repr(vars(reads)))
        assert seen[0] == seen[1]
        assert num_graphs() == 0

    def test_autocast_and_it_is_said(self, model, compiled, warnings_said):  # noqa: F811
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_answers(model, compiled, tokens(PROMPT))
        assert num_graphs() == 0
        assert "compile_prompts leaves prompts under autocast as they are." in warnings_said()

    def test_what_the_compiler_fails_at_and_it_is_said(self, monkeypatch, model, warnings_said):  # noqa: F811
        def fail(graph, inputs):
            raise RuntimeError("there is no compiler\nof that kind")

        monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: fail)
        assert_same_answers(model, compile_prompts(copy.deepcopy(model)), tokens(PROMPT))
        assert "compile_prompts leaves a LlamaDecoderLayer as it is: there is no compiler." in warnings_said()

    def test_a_model_that_is_compiled_as_a_whole(self, model, compiled):
        expected = greedy(model, new_cache(), tokens(PROMPT), 6)
        assert torch.equal(greedy(torch.compile(compiled, backend="eager"), new_cache(), tokens(PROMPT), 6), expected)


class TestForwards:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_hidden_states_and_hooks(self, model, compiled, mode):
        seen, outputs = [], []
        with mode():
            for each in (model, compiled):
                each.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
                cache = new_cache()
                output = each(tokens(PROMPT), output_hidden_states=True, **{CACHE_NAME: cache})
                outputs.append([output.logits, *output.hidden_states])
        assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
        assert torch.equal(*seen)
        assert len(outputs[0]) == 2 + LAYERS["num_hidden_layers"]

    @pytest.mark.parametrize(
        "make_cache",
        [
            lambda: H2OCache(64),
            lambda: TokenSelectCache(64),
            lambda: new_cache(offloading=True),
            lambda: new_cache(codes=2),
        ],
        ids=["evicting", "remembering", "offloading", "codes"],
    )
    def test_other_ways_to_keep_and_to_choose(self, model, compiled, make_cache):
        assert_same_answers(model, compiled, tokens(PROMPT), make_cache, prefill_chunk_size=70)
        assert num_graphs() == 2

    def test_a_mask_of_the_callers(self, model, compiled):
        mask = torch.ones(1, PROMPT, dtype=torch.int64)
        mask[:, 60:90] = 0
        assert_same_answers(model, compiled, tokens(PROMPT), attention_mask=mask)

    def test_an_error_of_the_cache_comes_through_and_leaves_it_usable(self, model, compiled):
        cache = new_cache(max_cache_len=PROMPT + 10)
        first = generate(compiled, tokens(PROMPT), cache, max_new_tokens=5)
        longer = torch.cat([first, tokens(30, seed=2)], dim=1)
        with pytest.raises(ValueError, match="max_cache_len=160 tokens are not enough"):
            generate(compiled, longer, cache)
        assert cache.get_seq_length() == PROMPT + 4
        assert cache.shared.region is None
        cache.crop(-10)
        expected = generate(model, tokens(PROMPT), new_cache(), max_new_tokens=5)
        assert torch.equal(generate(compiled, tokens(PROMPT), cache, max_new_tokens=5), expected)

    def test_threads_with_caches_of_their_own(self, model, compiled):
        lengths, answers = (PROMPT, PROMPT + 31, PROMPT - 40), {}
        threads = [
            threading.Thread(target=lambda n=n: answers.update({n: generate(compiled, tokens(n), new_cache())}))
            for n in lengths
        ]
        limit = torch._dynamo.config.recompile_limit
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for num_tokens in lengths:
            assert torch.equal(answers[num_tokens], generate(model, tokens(num_tokens), new_cache()))
        assert torch._dynamo.config.recompile_limit == limit

    def test_layers_whose_cache_is_no_keyword(self):
        model = make_model(GPT2LMHeadModel, n_embd=64, n_head=4, n_layer=2, n_positions=512)
        compiled = compile_prompts(copy.deepcopy(model), backend="eager")
        assert_same_answers(model, compiled, tokens(PROMPT))
        assert num_graphs() == 1


def test_a_model_is_freed_at_once():
    model = compile_prompts(make_model(**LAYERS), backend="eager")
    generate(model, tokens(PROMPT), new_cache(), max_new_tokens=2)
    gc.collect()
    gc.disable()
    try:
        address = weakref.ref(model)
        del model
        assert address() is None
    finally:
        gc.enable()


def test_what_is_no_model_of_transformers_or_has_no_attention_is_refused():
    with pytest.raises(TypeError, match=r"a model of Transformers, and not a Linear.*pass the one inside"):
        compile_prompts(nn.Linear(2, 2))
    model = make_model(**LAYERS)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="no decoder layer with one attention in a LlamaForCausalLM"):
        compile_prompts(model)


def test_arguments_of_every_kind_reach_the_attention():
    options = {"scaling": 0.25, "window": 7, "softcap": None, "is_causal": True, "cached": False, "dropout": 0.0}
    tensors = {"sinks": torch.ones(2), "position_ids": torch.arange(3)}
    given = {"first": tensors["sinks"], **options, "last": tensors["position_ids"]}
    received = unpacked(*packed(given))
    assert received == given
    assert [type(value) for value in received.values()] == [type(value) for value in given.values()]
    with pytest.raises(TypeError, match="no list, as which layers comes"):
        packed({"layers": [1]})


def test_a_region_is_one_attention_whose_keys_are_for_nothing_else():
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="it attends 0 times"):
        compiling.check_is_region(graph)
