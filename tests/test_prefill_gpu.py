"""CritiPrefill on a GPU is that of the CPU."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from hf_quest import CACHE_NAME, CritiPrefill, QuestCache, compile_prompts, tiny
from hf_quest.evaluation.documents import heldout_text
from hf_quest.prompts import BlockScores, critiprefill, dense, segments
from hf_quest.reference import Logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("is_causal", [False, True], ids=["before", "causal"])
@pytest.mark.parametrize("cudnn_pays", [0, 2**62], ids=["cudnn", "flash"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_library_attention(is_causal, cudnn_pays, head_dim):
    """Of segments as the strided views that they are: at most twice the CPU's error at the same precision."""
    query = torch.randn(3, 96, 8, head_dim, dtype=torch.bfloat16).transpose(1, 2)
    stored = torch.randn(2, 2, 3 * 96, head_dim, dtype=torch.bfloat16)

    def attend(device, dtype):
        parts = (part.unflatten(1, (3, 96)).transpose(0, 1) for part in stored.to(device, dtype))
        output = dense.attention(query.to(device, dtype), *parts, is_causal, Logits(0.1), cudnn_pays)
        return [tensor.float().cpu() for tensor in output]

    exact, expected = attend("cpu", torch.float32)
    yardstick = (attend("cpu", torch.bfloat16)[0] - exact).abs().max()
    output, logsumexp = attend("cuda", torch.bfloat16)
    assert (output - exact).abs().max() <= 2 * yardstick
    torch.testing.assert_close(logsumexp, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("score", critiprefill.SCORES)
@pytest.mark.parametrize("left_padding", [(0,), (0, 37)], ids=["whole", "padded"])
def test_attend(score, left_padding):
    """Nearly everywhere the same blocks are chosen, and then the attention is the same."""
    config = CritiPrefill(budget=128, segment_size=64, block_size=32, threshold=128, score=score)
    torch.manual_seed(0)
    query = (3 * torch.randn(len(left_padding), 8, 640, 64)).bfloat16()
    stored = torch.randn(2, len(left_padding), 2, 640, 64).bfloat16()
    chosen = {"cpu": [], "cuda": []}

    def attend(device, dtype):
        def watch(*slab):
            chosen[device].append(slab[-1].sort().values.flatten().cpu())

        tensors = (query.to(device, dtype), *stored.to(device, dtype))
        return segments.attend(*tensors, left_padding, config, BlockScores(), Logits(0.125), watch=watch).float().cpu()

    expected, output = attend("cpu", torch.float32), attend("cuda", torch.bfloat16)
    on_cpu, on_gpu = (torch.cat(chosen[device]) for device in ("cpu", "cuda"))
    assert (on_cpu == on_gpu).float().mean() > 0.9  # scores in bfloat16 may turn two blocks that are nearly equal
    assert (output - expected).abs().mean() < 0.02


@pytest.mark.parametrize(
    "config", [None, CritiPrefill(budget=64, segment_size=64, block_size=16, threshold=128)], ids=str
)
def test_chunks_are_the_whole(config):
    """No mask is made for them on a GPU. The model is a trained one: it knows which of two blocks matters."""
    model, tokenizer = tiny.load(attn_implementation="quest", dtype=torch.bfloat16)
    model = model.cuda().eval()
    prompt = tokenizer(heldout_text()[:8000], return_tensors="pt").input_ids[:, :1536].cuda()
    whole, chunked = QuestCache(prefill=config), QuestCache(prefill=config)
    with torch.no_grad():
        expected = model(prompt, past_key_values=whole).logits
        logits = torch.cat([model(part, past_key_values=chunked).logits for part in prompt.split(256, dim=1)], dim=1)
    assert (logits.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean() > 0.9  # bfloat16 sums in another order


@pytest.fixture(scope="module")
def prompt_of_the_tiny_model():
    model, tokenizer = tiny.load(attn_implementation="quest", dtype=torch.float32)
    prompt = tokenizer(heldout_text()[:60_000], return_tensors="pt").input_ids[:, :8192].cuda()
    return model.cuda().eval(), prompt


@torch.no_grad()
@pytest.mark.parametrize("chunk", [8192, 1000], ids=["whole", "chunks"])
def test_a_compiled_prompt_is_nearer_to_float32_or_as_near(prompt_of_the_tiny_model, chunk):
    """By one graph, in chunks of another length too, and with no more memory."""
    exact, prompt = prompt_of_the_tiny_model
    rounded = copy.deepcopy(exact).bfloat16()
    compiled = compile_prompts(copy.deepcopy(rounded))

    def read(model):
        cache = QuestCache(max_cache_len=8192)
        for _ in range(2):  # the first time compiles and loads
            cache.reset()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            parts = [model(part, **{CACHE_NAME: cache}).logits for part in prompt.split(chunk, dim=1)]
        return torch.cat(parts, dim=1).float(), torch.cuda.max_memory_allocated() - before

    graphs = counters["stats"]["unique_graphs"]
    (truth, _), (expected, most), (logits, memory) = (read(model) for model in (exact, rounded, compiled))
    assert counters["stats"]["unique_graphs"] == graphs + 1
    assert (logits - truth).abs().mean() <= 1.1 * (expected - truth).abs().mean()  # which rounding leaves to chance
    assert memory <= 1.01 * most  # which an allocator rounds
