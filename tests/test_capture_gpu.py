"""`hf_quest.capture` with its CUDA graphs: on any GPU, in any thread, whatever becomes of models and caches."""

import copy
import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from small_llama import generate, make_model, tokens
from test_gpu import OVERLAPPED, agree_to_a_near_tie, digest_of, library, prefilled, write  # noqa: F401, a fixture too
from transformers import CompileConfig, GPT2LMHeadModel, MistralForCausalLM

from hf_quest import CACHE_NAME, QuestCache, capture, tiny
from hf_quest.seam.capture.graphs import recorded_into

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

OVERLAPS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

# Of models of random weights whose head dim the kernels serve.
SERVED = {"hidden_size": 256, "num_hidden_layers": 3, "dtype": torch.bfloat16}


def tiny_model(device="cuda"):
    return tiny.load(attn_implementation="quest", dtype=torch.bfloat16)[0].to(device).eval()


@pytest.fixture
def model():
    return capture(tiny_model())


@pytest.fixture(scope="module")
def ids(library):  # noqa: F811
    return digest_of(library, 2000)


def eager(model, ids, num_tokens=64):
    return write(model, ids, prefilled(model, ids), num_tokens, disable_compile=True)[0]


@torch.no_grad()
def read_again(model, cache, ids):
    """Have `cache` hold what that of `prefilled` does, whose last token is left to a decode step."""
    cache.reset()
    model(ids[:, :-1], **{CACHE_NAME: cache}, logits_to_keep=1)


BLOCKING = """
import sys
import torch
from test_capture_gpu import OVERLAPPED, tiny_model, write_compiled
torch.save(write_compiled(tiny_model(), torch.load(sys.argv[1])).cpu(), sys.argv[2])
"""


def write_compiled(model, ids):
    config = CompileConfig(mode=None, options=OVERLAPPED | {"triton.cudagraphs": False})
    return write(model, ids, prefilled(model, ids), 64, compile_config=config)[0]


@pytest.mark.skipif(not OVERLAPS, reason="kernels overlap from sm_90 on")
def test_kernels_that_overlap_write_what_the_same_write_one_after_another(ids, tmp_path):
    """The others in a process that waits for each of them."""
    torch.save(ids, tmp_path / "ids.pt")
    files = [str(tmp_path / name) for name in ("ids.pt", "tokens.pt")]
    environment = os.environ | {"CUDA_LAUNCH_BLOCKING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", BLOCKING, *files], env=environment, check=True, timeout=250)
    model = capture(tiny_model(), compile=OVERLAPPED)
    cache = prefilled(model, ids)
    written = write(model, ids, cache, 64)[0]
    assert model._compiled_call.recording.cache() is cache
    assert torch.equal(written.cpu(), torch.load(files[1]))


class TestDevices:
    @needs_two_gpus
    def test_a_model_on_another_gpu_than_the_current_one(self, ids):
        model, ids = capture(tiny_model("cuda:1")), ids.to("cuda:1")
        expected, cache = eager(model, ids), prefilled(model, ids)
        assert torch.cuda.current_device() == 0
        for _ in range(2):
            assert torch.equal(write(model, ids, cache)[0], expected)
            assert torch.cuda.current_device() == 0
            read_again(model, cache, ids)
        assert model._compiled_call.recording.cache() is cache

    @needs_two_gpus
    def test_models_on_two_gpus_in_two_threads(self, ids):
        """In each of which the other's GPU is the current one."""
        models = [capture(tiny_model(f"cuda:{gpu}")) for gpu in range(2)]
        expected = [eager(model, ids.to(model.device)).cpu() for model in models]
        assert torch.equal(*expected)
        answers = {}

        def work(gpu):
            with torch.cuda.device(1 - gpu):
                answers[gpu] = write(models[gpu], own := ids.to(f"cuda:{gpu}"), prefilled(models[gpu], own))[0].cpu()

        in_threads(work, range(2))
        assert all(torch.equal(answers[gpu], expected[gpu]) for gpu in range(2))

    def test_another_stream_than_the_default(self, model, ids):
        expected = eager(model, ids)
        cache = prefilled(model, ids)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            answer = write(model, ids, cache)[0]
            torch.cuda.current_stream().synchronize()
        assert torch.equal(answer, expected)
        read_again(model, cache, ids)
        assert torch.equal(write(model, ids, cache)[0], expected)


class TestResults:
    def test_hidden_states_and_logits_of_every_step_are_their_own(self, model, ids):
        options = {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True}
        options |= {"max_new_tokens": 8, "min_new_tokens": 8}
        expected = generate(model, ids, prefilled(model, ids), disable_compile=True, **options)
        cache = prefilled(model, ids)
        output = generate(model, ids, cache, **options)
        assert model._compiled_call.recording.cache() is cache
        assert torch.equal(output.sequences, expected.sequences)
        steps = list(zip(output.hidden_states, expected.hidden_states, strict=True))
        assert len(steps) == 8
        for states, expected_states in steps:
            for state, expected_state in zip(states, expected_states, strict=True):
                # bfloat16 rounds to 8 bits in each of six layers; another step is as far off as it is large.
                assert (state - expected_state).abs().max() <= 2**-5 * expected_state.abs().max()
        addresses = [state.data_ptr() for states, _ in steps for state in states]
        assert len(set(addresses)) == len(addresses)
        for logits, expected_logits in zip(output.logits, expected.logits, strict=True):
            assert (logits - expected_logits).abs().max() <= 2**-5 * expected_logits.abs().max()

    def test_a_copied_cache_is_written_where_it_lies(self, model, ids):
        cache = prefilled(model, ids)
        longer = torch.cat([ids, write(model, ids, cache)[0][None]], dim=1)
        stored = [layer.keys.clone() for layer in cache.layers]
        expected = write(model, longer, copy.deepcopy(cache), disable_compile=True)[0]
        copy_of_it = copy.deepcopy(cache)
        assert torch.equal(write(model, longer, copy_of_it)[0], expected)
        assert model._compiled_call.recording.cache() is copy_of_it
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, stored, strict=True))


def in_threads(work, arguments):
    """Run `work` of each argument in a thread of its own, and raise here what one of them raised."""
    errors = []

    def run(argument):
        try:
            work(argument)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class TestThreads:
    def test_each_writes_what_it_writes_alone(self, model, library):  # noqa: F811
        prompts = [digest_of(library, num_tokens) for num_tokens in (700, 1500, 2500)]
        expected = [eager(model, ids) for ids in prompts]
        answers = {}

        def work(number):
            ids = prompts[number]
            cache, answers[number] = prefilled(model, ids), []
            for _ in range(3):
                answers[number].append(write(model, ids, cache)[0])
                read_again(model, cache, ids)

        in_threads(work, range(len(prompts)))
        for number, answer in enumerate(expected):
            assert all(torch.equal(mine, answer) for mine in answers[number])

    def test_random_numbers_are_drawn_while_a_graph_is_recorded(self):
        is_recording, is_drawn = threading.Event(), threading.Event()
        x, drawn = torch.zeros(4, device="cuda"), []
        graph = torch.cuda.CUDAGraph()

        def draw(_):
            assert is_recording.wait(timeout=60)
            try:
                drawn.append(torch.rand(4, device="cuda").cpu())
            finally:
                is_drawn.set()

        def record():
            with recorded_into(graph, torch.cuda.Stream()):
                y = x + 1
                is_recording.set()
                assert is_drawn.wait(timeout=60)
            return y

        torch.manual_seed(3)
        expected = torch.rand(4, device="cuda").cpu()
        torch.manual_seed(3)
        results = []
        in_threads(lambda job: job(None), [draw, lambda _: results.append(record())])
        graph.replay()
        assert results[0].tolist() == [1] * 4
        assert torch.equal(drawn[0], expected)  # of the usual seed


class TestEnds:
    def test_a_recording_uses_nothing_of_another(self, ids):
        models = [capture(tiny_model()) for _ in range(2)]
        caches = [prefilled(model, ids) for model in models]
        expected = eager(models[1], ids)
        for model, cache in zip(models, caches, strict=True):
            assert torch.equal(write(model, ids, cache)[0], expected)
        recording = models[1]._compiled_call.recording
        del caches[0], cache, models[0], model  # the recording that was made first, and its memory
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        junk = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(500)]  # 2 GB
        read_again(models[0], caches[0], ids)
        assert torch.equal(write(models[0], ids, caches[0])[0], expected)
        assert models[0]._compiled_call.recording is recording
        assert junk

    def test_a_model_is_freed_at_once(self, ids):
        model = capture(tiny_model())
        cache = prefilled(model, ids)
        write(model, ids, cache, 4)
        address = weakref.ref(model)
        gc.collect()
        gc.disable()
        try:
            before = torch.cuda.memory_allocated()
            size = sum(parameter.nbytes for parameter in model.parameters())
            del model
            assert address() is None
            assert before - torch.cuda.memory_allocated() >= size
        finally:
            gc.enable()


def replace_head(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, dims=0))


def hook_head(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output.roll(1, dims=-1))


class TestModels:
    def test_weights_that_were_moved(self, model, ids):
        expected, cache = eager(model, ids), prefilled(model, ids)
        write(model, ids, cache)
        model.cpu()
        torch.cuda.empty_cache()
        junk = torch.full((2**28,), torch.nan, device="cuda")  # 1 GB, where they have been
        model.cuda()
        read_again(model, cache, ids)
        assert torch.equal(write(model, ids, cache)[0], expected)
        assert model._compiled_call.recording.cache() is cache
        assert junk.isnan().all()

    @pytest.mark.parametrize("change", [replace_head, hook_head])
    def test_a_change_is_seen_by_the_next_generate(self, model, ids, change):
        cache = prefilled(model, ids)
        write(model, ids, cache)
        recording = model._compiled_call.recording
        change(model)
        # Of words that come in no text of this model, and are nearly tied.
        expected, logits = write(model, ids, prefilled(model, ids), disable_compile=True)
        read_again(model, cache, ids)
        assert agree_to_a_near_tie(write(model, ids, cache)[0], expected, logits)
        assert model._compiled_call.recording is not recording

    def test_another_dtype(self, model, ids):
        write(model, ids, prefilled(model, ids))
        model.half()
        expected, cache = eager(model, ids), prefilled(model, ids)
        assert torch.equal(write(model, ids, cache)[0], expected)
        assert model._compiled_call.recording.cache() is cache

    def test_weights_may_change_in_place(self, model, ids):
        """Words change their numbers, in the one table of all words and in the text: so do those of the answer."""
        model.generation_config.eos_token_id = None  # or its number could not be written
        cache = prefilled(model, ids)
        before = write(model, ids, cache)[0]
        recording = model._compiled_call.recording
        with torch.no_grad():
            weight = model.lm_head.weight
            assert weight is model.model.embed_tokens.weight
            weight.copy_(weight.roll(1, dims=0))
        renumbered = (ids + 1) % len(weight)
        read_again(model, cache, renumbered)
        after = write(model, renumbered, cache)[0]
        assert model._compiled_call.recording is recording
        assert torch.equal(after, (before + 1) % len(weight))

    def test_a_copy_records_for_itself(self, model, ids):
        expected = eager(model, ids)
        write(model, ids, prefilled(model, ids))
        copy_of_it = copy.deepcopy(model)
        cache = prefilled(copy_of_it, ids)
        assert torch.equal(write(copy_of_it, ids, cache)[0], expected)
        assert copy_of_it._compiled_call.recording.cache() is cache

    @pytest.mark.parametrize("window", [64, 300])
    def test_layers_that_are_all_local_run_without(self, window):
        model = make_model(MistralForCausalLM, sliding_window=window, **SERVED).cuda()
        prompt = tokens(200).cuda()
        expected = generate(model, prompt, QuestCache(64, compile=False))
        capture(model)
        assert torch.equal(generate(model, prompt, QuestCache(64)), expected)
        assert model._compiled_call.recording is None

    def test_a_model_in_which_the_host_waits_runs_without(self, model, ids):
        """GPT-2 looks at its ids, to warn of padding. Nothing is left behind for what is recorded or sampled next."""
        waiting = make_model(GPT2LMHeadModel, pad_token_id=0, **SERVED).cuda()
        prompt = tokens(200).cuda()
        expected = generate(waiting, prompt, QuestCache(64, compile=False))
        capture(waiting)
        assert torch.equal(generate(waiting, prompt, QuestCache(64)), expected)
        assert waiting._compiled_call.recording is None
        generate(waiting, prompt, QuestCache(64), do_sample=True)
        cache = prefilled(model, ids)
        assert torch.equal(write(model, ids, cache)[0], eager(model, ids))
        assert model._compiled_call.recording.cache() is cache

    def test_a_mask_of_ones_own_runs_without(self, model, ids):
        mask = torch.ones_like(ids)
        mask[:, 100:200] = 0
        output, expected = (
            generate(model, ids, QuestCache(512), attention_mask=mask, **options)
            for options in ({}, {"disable_compile": True})
        )
        assert torch.equal(output, expected)
