"""What hf_quest leans on in Transformers without being told of it: a test for each function of `seam/generate.py`."""

import pytest
import torch
from small_llama import BUDGET, PROMPT, make_model, on_any_device, tokens
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM

from hf_quest import CACHE_NAME, QuestCache
from hf_quest.seam import generate as seam

OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return make_model()


class Told(QuestCache):
    """Notes what every `update` of the first layer finds."""

    def __init__(self, ask):
        super().__init__(BUDGET)
        self.ask, self.answers = ask, []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == 0:
            self.answers.append((key_states.shape[2], self.ask()))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def told(model, ask, **options):
    cache = Told(ask)
    model.generate(tokens(PROMPT), **{CACHE_NAME: cache}, **{**OPTIONS, **options})
    return cache.answers


def test_a_model_that_calls_is_in_the_stack(model):
    """torch.nn.Module calls `forward` by `_call_impl`."""
    assert all(answer for _, answer in told(model, seam.called_by_module))
    assert not seam.called_by_module()


def test_assisted_decoding_is_in_the_stack(model):
    """By GenerationMixin._assisted_decoding."""
    assert all(answer for _, answer in told(model, seam.is_assisted, prompt_lookup_num_tokens=3))
    assert not any(answer for _, answer in told(model, seam.is_assisted))


def test_the_prompt_of_assisted_decoding_is_a_local_of_its_function(model):
    """`input_ids` of GenerationMixin._assisted_decoding, which activates the recording of the past."""
    starts = []

    class Noting(QuestCache):
        def assisted_begins(self, num_prompt):
            starts.append(num_prompt)
            super().assisted_begins(num_prompt)

    model.generate(tokens(PROMPT), **{CACHE_NAME: Noting(BUDGET)}, **OPTIONS, prompt_lookup_num_tokens=3)
    assert starts == [PROMPT]


def test_every_generate_sets_that_the_cache_is_the_users(model):
    """`_is_user_defined`, before its first forward."""
    begun = []

    class Noting(QuestCache):
        def generate_begins(self):
            begun.append(self.get_seq_length())
            super().generate_begins()

    cache = Noting(BUDGET)
    output = model.generate(tokens(PROMPT), **{CACHE_NAME: cache}, **OPTIONS)
    model.generate(torch.cat([output, tokens(9, seed=2)], dim=1), **{CACHE_NAME: cache}, **OPTIONS)
    assert begun == [0, PROMPT + 3]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_the_loops_of_generate_continue_their_own_masks(model, options):
    """`model_kwargs["attention_mask"]` of GenerationMixin._sample and _beam_search; the prompt is read in _prefill."""
    torch.manual_seed(0)
    prompt, *steps = told(
        model, seam.continues_its_masks, **{**OPTIONS, **options, "do_sample": "do_sample" in options}
    )
    assert prompt == (PROMPT, False)
    assert steps == [(1, True)] * 3


def test_a_forward_outside_of_generate_continues_nothing(model):
    cache = Told(seam.continues_its_masks)
    for num_new in (PROMPT, 1):
        model(tokens(num_new), **{CACHE_NAME: cache})
    assert cache.answers == [(PROMPT, False), (1, False)]


class Asking:
    """Asks as a model does."""

    def __init__(self, **hf_device_map):
        self.hf_device_map = hf_device_map

    def ask(self):
        return QuestCache(BUDGET).is_compileable


def test_a_model_on_several_devices_is_not_compiled():
    """The methods of a model ask for `is_compileable`; its `hf_device_map` says where it is."""
    assert Asking(embed=0, head=0).ask()
    assert not Asking(embed=0, head=1).ask()


def test_prompts_are_not_compiled(model):
    """They are read in GenerationMixin._prefill."""
    prompt, *steps = told(model, lambda: seam.innermost(seam.PREFILL) is not None)
    assert prompt == (PROMPT, True)
    assert not any(answer for _, answer in steps)


def test_a_model_that_would_drop_a_cache_keeps_it():
    """`prepare_inputs_for_generation` of Phi-3, which names `original_max_position_embeddings`."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    factors |= {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    config = Phi3Config(
        **size, **heads, max_position_embeddings=256, original_max_position_embeddings=32, rope_parameters=factors
    )
    config._attn_implementation = "quest"
    model = Phi3ForCausalLM(config).eval()
    cache = QuestCache(2048)
    model.generate(tokens(30) % 64, **{CACHE_NAME: cache}, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == 35
    stock = DynamicCache()
    model.set_attn_implementation("sdpa")
    model.generate(tokens(30) % 64, **{CACHE_NAME: stock}, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert stock.get_seq_length() < 35  # it was dropped on the way, which is what this is for


def test_a_custom_generate_finds_what_generate_keeps_from_it(model):
    """By the locals of GenerationMixin.generate."""
    found = []

    def custom(model, input_ids, **kwargs):
        found.extend(seam.given_to_generate(name) for name in ("streamer", "synced_gpus", "use_model_defaults"))
        return input_ids

    class Streamer:
        def put(self, value):
            pass

    streamer = Streamer()
    model.generate(tokens(PROMPT), **OPTIONS, custom_generate=custom, streamer=streamer, synced_gpus=False)
    assert found == [streamer, False, None]
    assert seam.given_to_generate("streamer") is None


def test_a_preparation_of_inputs_is_a_models_own_or_that_of_all(model):
    """GenerationMixin.prepare_inputs_for_generation; Phi-3 has one of its own."""
    assert not seam.has_own_preparation(model)
    assert seam.has_own_preparation(make_model(Phi3ForCausalLM, pad_token_id=0))


def test_on_a_cpu_the_masks_of_a_step_are_made_once(model, monkeypatch):
    """`prepare_inputs_for_generation` makes them for a graph, and the forward once more where there was none to make.

    The locals `generation_config` of the loops of `generate` say whether there are graphs on a CPU.
    """
    asked = []

    class Asked(QuestCache):
        def get_mask_sizes(self, query_length, layer_idx):
            asked.append(query_length)
            return super().get_mask_sizes(query_length, layer_idx)

    for options in ({}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}):
        asked.clear()
        model.generate(tokens(PROMPT), **{CACHE_NAME: Asked(BUDGET)}, **{**OPTIONS, **options})
        forwards = [num_new for num_new in asked if num_new != PROMPT]
        assert len(forwards) <= 3  # of four new tokens, the first of which is the prompt's


def test_a_graph_on_a_cpu_is_told_of(model):
    """By `_compile_all_devices` of the CompileConfig, in the same locals."""
    compiled = on_any_device(backend="eager", mode=None)
    assert not any(answer for _, answer in told(model, seam.compiles_on_cpu))
    prompt, *steps = told(model, seam.compiles_on_cpu, compile_config=compiled, disable_compile=True)
    assert steps
    assert all(answer for _, answer in [prompt, *steps])
