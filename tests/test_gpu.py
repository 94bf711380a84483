"""On a GPU `generate` with a QuestCache answers as on the CPU.

A compilation takes longer than all else here, so only one class compiles.
"""

import copy
import functools
import gc
import threading
import weakref

import pytest
import torch
from small_llama import ANSWER, BUDGET, PROMPT, generate, make_model, tokens
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from hf_quest import QuestCache, capture, tiny
from hf_quest.evaluation.documents import Library, documents, heldout_text
from hf_quest.kernels import ops
from hf_quest.seam.generate import CALLS_COMPILED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

OVERLAPPED = {"triton.enable_pdl": True}  # kernels that Inductor makes begin while those before them end


@pytest.fixture(scope="module")
def model():
    return make_model().cuda()


def eager_cache(**options):
    return QuestCache(compile=False, **options)


@pytest.mark.parametrize("budget", [BUDGET, 2048])
@pytest.mark.parametrize("max_cache_len", [None, 512])
def test_greedy(model, budget, max_cache_len):
    cache = eager_cache(budget=budget, max_cache_len=max_cache_len)
    output = generate(model, tokens(PROMPT).cuda(), cache)
    assert torch.equal(output.cpu(), generate(make_model(), tokens(PROMPT), QuestCache(budget=budget)))
    assert all(layer.keys.is_cuda for layer in cache.layers)


def test_left_padded_row_is_the_row_alone(model):
    short = PROMPT - 37
    input_ids = tokens(PROMPT, batch_size=2).cuda()
    input_ids[1, : PROMPT - short] = 0
    attention_mask = (input_ids > 0).long()
    output = generate(model, input_ids, eager_cache(budget=BUDGET), attention_mask=attention_mask)
    for row, start in ((0, 0), (1, PROMPT - short)):
        alone = generate(model, input_ids[row : row + 1, start:], eager_cache(budget=BUDGET))
        assert torch.equal(output[row, -ANSWER:], alone[0, -ANSWER:])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 37}], ids=str
)
def test_modes(model, options):
    prompt = tokens(PROMPT // 2).repeat(1, 2)
    output = generate(model, prompt.cuda(), eager_cache(budget=BUDGET), **options)
    assert torch.equal(output.cpu(), generate(make_model(), prompt, QuestCache(budget=BUDGET), **options))


def test_copies_of_one_prefilled_document(model):
    document = tokens(PROMPT).cuda()
    prompt = torch.cat([document, tokens(5).cuda()], dim=1)
    prefilled = eager_cache(budget=BUDGET)
    with torch.no_grad():
        model(document, past_key_values=prefilled)
    first, second = (generate(model, prompt, copy.deepcopy(prefilled)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs_in_its_dtype(dtype):
    cache = eager_cache(budget=BUDGET)
    output = generate(make_model(dtype=dtype).cuda(), tokens(PROMPT).cuda(), cache)
    assert output.shape == (1, PROMPT + ANSWER)
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}


class TestKernels:
    """The tiny model, whose head dim the kernels serve, in bfloat16."""

    @pytest.fixture(scope="class")
    def tiny_model(self):
        model, tokenizer = tiny.load(attn_implementation="quest", dtype=torch.bfloat16)
        return model.cuda().eval(), Library(tokenizer, heldout_text())

    @pytest.fixture
    def count_selections(self):
        calls = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                if operator is torch.ops.hf_quest.chain.default:
                    calls.append(operator)
                return operator(*args, **(kwargs or {}))

        with Count():
            yield lambda: len(calls)

    @staticmethod
    def logits(model, cache, ids, num_prompt, padding=0):
        """[B, T, V]: of the tokens after the prompt, fed one by one."""
        attention_mask = torch.ones_like(ids)
        if padding:
            attention_mask[1, :padding] = 0
        steps = [range(num_prompt), *([position] for position in range(num_prompt, ids.shape[1]))]
        with torch.no_grad():
            return torch.cat(
                [
                    model(
                        ids[:, step[0] : step[-1] + 1],
                        attention_mask=attention_mask[:, : step[-1] + 1],
                        past_key_values=cache,
                        logits_to_keep=1,
                    ).logits.float()
                    for step in steps
                ],
                dim=1,
            )

    @pytest.mark.parametrize("padding", [0, 1003])
    @pytest.mark.parametrize("budget", [256, 100_000])
    def test_logits_are_those_of_the_reference(self, tiny_model, monkeypatch, count_selections, budget, padding):
        """By the published score: by that of half the width more pages are near ties, and more tokens with them."""
        model, library = tiny_model
        ids = torch.tensor([paper.ids for paper in documents(library, "facts", 4096, 2, seed=5)]).cuda()
        by_kernels = self.logits(model, QuestCache(budget=budget, score="published"), ids, 4000, padding)
        assert count_selections() == (96 * 4 if budget == 256 else 0)
        monkeypatch.setattr(ops, "serves", lambda *_: False)
        by_reference = self.logits(model, QuestCache(budget=budget, score="published"), ids, 4000, padding)
        # Both round to bfloat16 (8 bits) in each of six layers, at other places: near-ties of pages may differ too.
        assert (by_kernels - by_reference).abs().mean() < 2**-6 * by_reference.abs().mean()
        assert (by_kernels.argmax(-1) == by_reference.argmax(-1)).float().mean() > 0.97

    def test_drafts_select_one_by_one(self, tiny_model, count_selections):
        model, library = tiny_model
        ids = torch.tensor([next(documents(library, "digest", 4096, 1, seed=5)).ids]).cuda()
        expected = generate(model, ids, eager_cache(budget=256), max_new_tokens=48)
        num_steps = count_selections() / 4
        output = generate(model, ids, eager_cache(budget=256), max_new_tokens=48, prompt_lookup_num_tokens=4)
        assert torch.equal(output, expected)
        assert count_selections() / 4 > 2 * num_steps  # for rejected drafts too

    @pytest.mark.parametrize("job", ["passkey", "facts"])
    def test_answers_are_right(self, tiny_model, count_selections, job):
        model, library = tiny_model
        for paper in documents(library, job, 8192, 3, seed=6):
            ids = torch.tensor([paper.ids]).cuda()
            output = generate(model, ids, eager_cache(budget=256), max_new_tokens=8)
            answer = library.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert answer.startswith(paper.answer)
        assert count_selections() > 0


def digest_of(library, num_tokens):
    """[1, num_tokens] tokens of a document and a question whose answer is long."""
    return torch.tensor([next(documents(library, "digest", num_tokens, 1, seed=3)).ids]).cuda()


@torch.no_grad()
def prefilled(model, ids, budget=512):
    cache = QuestCache(budget=budget)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    return cache


def write(model, ids, cache, num_tokens=64, **options):
    """The answer's tokens and their logits, [num_tokens, V]."""
    options |= {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    output = generate(model, ids, cache, return_dict_in_generate=True, output_logits=True, **options)
    return output.sequences[0, ids.shape[1] :], torch.cat(output.logits).float()


def agree_to_a_near_tie(tokens, expected, logits):
    """Whether two answers are one, or part where two tokens are as good as equal to the model.

    bfloat16 rounds to 8 bits in each of six layers, and in a fused kernel at other places: logits nearer than that may
    change places, and everything after is another text.
    """
    differing = (tokens != expected).nonzero()
    if not len(differing):
        return True
    first = differing[0, 0]
    return bool(logits[first, expected[first]] - logits[first, tokens[first]] <= 2**-5 * logits[first].abs().max())


@pytest.fixture(scope="module")
def library():
    return Library(tiny.load()[1], heldout_text()[:300_000])


class TestCapturedDecode:
    """`generate` compiles its decode step by itself and replays it as a CUDA graph: one for each model here."""

    @pytest.fixture(scope="class")
    def models(self):
        torch.compiler.reset()
        counters.clear()
        return {
            dtype: tiny.load(attn_implementation="quest", dtype=dtype)[0].cuda().eval()
            for dtype in (torch.float32, torch.bfloat16)
        }

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_256_tokens_after_16k_are_the_reference_paths(self, models, library, monkeypatch, dtype):
        model, ids = models[dtype], digest_of(library, 16384)
        num_graphs = counters["stats"]["unique_graphs"]
        captured, _ = write(model, ids, prefilled(model, ids), 256, compile_config=CompileConfig(fullgraph=True))
        assert counters["stats"]["unique_graphs"] == num_graphs + 1
        assert counters["inductor"]["cudagraph_skips"] == 0
        monkeypatch.setattr(ops, "serves", lambda *_: False)
        expected, logits = write(model, ids, prefilled(model, ids), 256, disable_compile=True)
        if dtype == torch.float32:
            assert torch.equal(captured, expected)
        else:
            assert agree_to_a_near_tie(captured, expected, logits)

    def test_no_other_graph_for_other_prompts_fresh_caches_a_reset_and_growing_storage(self, models, library):
        model = models[torch.bfloat16]
        config = CompileConfig(fullgraph=True)
        write(model, ids := digest_of(library, 1000), prefilled(model, ids), 4, compile_config=config)
        num_graphs = counters["stats"]["unique_graphs"]
        for num_tokens, num_new in ((4096, 40), (2048, 400), (700, 40)):
            ids = digest_of(library, num_tokens)
            cache = prefilled(model, ids)
            expected, logits = write(model, ids, copy.deepcopy(cache), num_new, disable_compile=True)
            assert agree_to_a_near_tie(write(model, ids, cache, num_new, compile_config=config)[0], expected, logits)
            cache.reset()
            again, _ = write(model, ids, cache, num_new, compile_config=config, prefill_chunk_size=512)
            assert agree_to_a_near_tie(again, expected, logits)
        assert counters["stats"]["unique_graphs"] == num_graphs
        assert counters["inductor"]["cudagraph_skips"] == 0

    def test_a_step_waits_for_nothing(self, models, library, monkeypatch):
        model, ids = models[torch.bfloat16], digest_of(library, 1000)
        cache, config = prefilled(model, ids), CompileConfig(fullgraph=True)
        write(model, ids, copy.deepcopy(cache), 4, compile_config=config)
        steps = []

        def without_waiting(call):
            @functools.wraps(call)
            def run(*args, **kwargs):
                steps.append(call)
                torch.cuda.set_sync_debug_mode("error")
                try:
                    return call(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            return run

        compiled = without_waiting(model.get_compiled_call(config))
        write(model, ids, cache, 2, compile_config=config)  # its first step asks for the mask
        sequence = torch.zeros(1, cache.get_seq_length() + 1, dtype=torch.int64, device="cuda")
        prepare = model.prepare_inputs_for_generation
        is_first = [True]

        @functools.wraps(prepare)
        def prepare_step(*args, **kwargs):  # the prompt, of one token, has its mask looked at
            call = prepare if is_first.pop() else without_waiting(prepare)
            is_first.append(False)
            return call(*args, **kwargs)

        monkeypatch.setattr(model, "prepare_inputs_for_generation", prepare_step)
        monkeypatch.setattr(model, "get_compiled_call", lambda config: compiled)
        write(model, sequence, cache, 4, compile_config=config)
        assert len(steps) >= 6

    def test_a_padded_batch_has_one_graph(self, models, library):
        model = models[torch.bfloat16]
        ids = torch.tensor([paper.ids for paper in documents(library, "facts", 2048, 2, seed=5)]).cuda()
        attention_mask = torch.ones_like(ids)
        attention_mask[1, :777] = 0
        options = {"attention_mask": attention_mask, "compile_config": CompileConfig(fullgraph=True)}
        num_graphs = counters["stats"]["unique_graphs"]
        output = generate(model, ids, QuestCache(budget=256), max_new_tokens=7, **options)
        assert torch.equal(generate(model, ids, QuestCache(budget=256), max_new_tokens=7, **options), output)
        assert counters["stats"]["unique_graphs"] == num_graphs + 1
        for row, start in ((0, 0), (1, 777)):
            alone = generate(model, ids[row : row + 1, start:], eager_cache(budget=256), max_new_tokens=7)
            assert torch.equal(output[row, -7:], alone[0, -7:])


class TestRecordedDecode:
    """`hf_quest.capture`: the same without `generate`'s compilation."""

    @pytest.fixture(scope="class")
    def model(self):
        return capture(tiny.load(attn_implementation="quest", dtype=torch.bfloat16)[0].cuda().eval())

    @pytest.fixture(autouse=True)
    def compile_nothing(self):
        counters.clear()
        yield
        assert not counters["stats"]["unique_graphs"]

    @pytest.mark.parametrize(("num_tokens", "num_new"), [(4096, 64), (700, 400)])
    def test_the_same_tokens_on_one_recording_for_each_cache(self, model, library, num_tokens, num_new):
        ids = digest_of(library, num_tokens)
        cache = prefilled(model, ids)
        expected, _ = write(model, ids, copy.deepcopy(cache), num_new, disable_compile=True)
        tokens, _ = write(model, ids, cache, num_new)
        assert torch.equal(tokens, expected)
        recording = model._compiled_call.recording
        assert recording.cache() is cache
        cache.reset()
        assert torch.equal(write(model, ids, cache, num_new)[0], expected)
        assert model._compiled_call.recording is recording

    def test_a_padded_batch(self, model, library):
        ids = torch.tensor([paper.ids for paper in documents(library, "facts", 2048, 2, seed=5)]).cuda()
        attention_mask = torch.ones_like(ids)
        attention_mask[1, :777] = 0
        output, expected = (
            generate(model, ids, QuestCache(budget=256), attention_mask=attention_mask, **options)
            for options in ({}, {"disable_compile": True})
        )
        assert torch.equal(output, expected)

    @pytest.mark.skipif(not CALLS_COMPILED, reason="in this version assisted decoding calls nothing that is compiled")
    @pytest.mark.parametrize("options", [{}, {"codes": 2}, {"codes": 2, "offloading": True}], ids=str)
    def test_drafts_are_verified_by_recordings(self, model, library, options):
        ids, lookup = digest_of(library, 2048), {"max_new_tokens": 96, "prompt_lookup_num_tokens": 6}
        expected = generate(model, ids, QuestCache(256, **options), disable_compile=True, **lookup)
        cache = QuestCache(256, **options)
        assert torch.equal(generate(model, ids, cache, **lookup), expected)
        recordings = model._compiled_call.recordings[threading.get_ident()]
        assert any(recording.inputs["input_ids"].shape[1] > 1 for recording in recordings)

    def test_it_ends_with_its_cache_at_once(self, model, library):
        ids = digest_of(library, 700)
        cache = prefilled(model, ids)
        write(model, ids, cache)
        assert model._compiled_call.recording is not None
        address = weakref.ref(cache)
        gc.disable()
        try:
            del cache
            assert address() is None
            assert model._compiled_call.recording is None
        finally:
            gc.enable()

    def test_another_cache_is_decoded_without(self, model, library):
        ids = digest_of(library, 700)
        expected = generate(model, ids, None, disable_compile=True)
        assert torch.equal(generate(model, ids, None, cache_implementation="static"), expected)


@pytest.mark.parametrize("compile", [True, OVERLAPPED])
def test_a_compiled_step_is_recorded_once_for_each_cache(library, compile):
    model = capture(tiny.load(attn_implementation="quest", dtype=torch.bfloat16)[0].cuda().eval(), compile)
    num_graphs = counters["stats"]["unique_graphs"]
    for num_tokens in (4096, 700):
        ids = digest_of(library, num_tokens)
        cache = prefilled(model, ids)
        expected, logits = write(model, ids, copy.deepcopy(cache), disable_compile=True)
        assert agree_to_a_near_tie(write(model, ids, cache)[0], expected, logits)
        assert model._compiled_call.recording.cache() is cache
    assert counters["stats"]["unique_graphs"] == num_graphs + 1
