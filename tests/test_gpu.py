"""On a GPU `generate` with a QuestCache answers as on the CPU."""

import copy

import pytest
import torch
from small_llama import ANSWER, BUDGET, PROMPT, generate, make_model, tokens

from hf_quest import QuestCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def model():
    return make_model().cuda()


@pytest.mark.parametrize("budget", [BUDGET, 2048])
@pytest.mark.parametrize("max_cache_len", [None, 512])
def test_greedy(model, budget, max_cache_len):
    cache = QuestCache(budget=budget, max_cache_len=max_cache_len)
    output = generate(model, tokens(PROMPT).cuda(), cache)
    assert torch.equal(output.cpu(), generate(make_model(), tokens(PROMPT), QuestCache(budget=budget)))
    assert all(layer.keys.is_cuda for layer in cache.layers)


def test_left_padded_row_is_the_row_alone(model):
    short = PROMPT - 37
    input_ids = tokens(PROMPT, batch_size=2).cuda()
    input_ids[1, : PROMPT - short] = 0
    attention_mask = (input_ids > 0).long()
    output = generate(model, input_ids, QuestCache(budget=BUDGET), attention_mask=attention_mask)
    for row, start in ((0, 0), (1, PROMPT - short)):
        alone = generate(model, input_ids[row : row + 1, start:], QuestCache(budget=BUDGET))
        assert torch.equal(output[row, -ANSWER:], alone[0, -ANSWER:])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 37}], ids=str
)
def test_modes(model, options):
    prompt = tokens(PROMPT // 2).repeat(1, 2)
    output = generate(model, prompt.cuda(), QuestCache(budget=BUDGET), **options)
    assert torch.equal(output.cpu(), generate(make_model(), prompt, QuestCache(budget=BUDGET), **options))


def test_copies_of_one_prefilled_document(model):
    document = tokens(PROMPT).cuda()
    prompt = torch.cat([document, tokens(5).cuda()], dim=1)
    prefilled = QuestCache(budget=BUDGET)
    with torch.no_grad():
        model(document, past_key_values=prefilled)
    first, second = (generate(model, prompt, copy.deepcopy(prefilled)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs_in_its_dtype(dtype):
    cache = QuestCache(budget=BUDGET)
    output = generate(make_model(dtype=dtype).cuda(), tokens(PROMPT).cuda(), cache)
    assert output.shape == (1, PROMPT + ANSWER)
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
