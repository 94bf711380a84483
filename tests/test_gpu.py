"""On a GPU `generate` with a QuestCache answers as on the CPU."""

import copy

import pytest
import torch
from small_llama import ANSWER, BUDGET, PROMPT, generate, make_model, tokens

from hf_quest import QuestCache, ops, tiny
from hf_quest.evaluation.documents import Library, documents, heldout_text

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


class TestKernels:
    """The tiny model, whose head dim the kernels serve, in bfloat16."""

    @pytest.fixture(scope="class")
    def tiny_model(self):
        model, tokenizer = tiny.load(attn_implementation="quest", dtype=torch.bfloat16)
        return model.cuda().eval(), Library(tokenizer, heldout_text())

    @pytest.fixture
    def count_selections(self, monkeypatch):
        calls = []
        select = ops.select
        monkeypatch.setattr(ops, "select", lambda *arguments: calls.append(1) or select(*arguments))
        return lambda: len(calls)

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
        model, library = tiny_model
        ids = torch.tensor([paper.ids for paper in documents(library, "facts", 4096, 2, seed=5)]).cuda()
        by_kernels = self.logits(model, QuestCache(budget=budget), ids, 4000, padding)
        assert count_selections() == (96 * 4 if budget == 256 else 0)
        monkeypatch.setattr(ops, "serves", lambda *_: False)
        by_reference = self.logits(model, QuestCache(budget=budget), ids, 4000, padding)
        # Both round to bfloat16 (8 bits) in each of six layers, at other places: near-ties of pages may differ too.
        assert (by_kernels - by_reference).abs().mean() < 2**-6 * by_reference.abs().mean()
        assert (by_kernels.argmax(-1) == by_reference.argmax(-1)).float().mean() > 0.97

    @pytest.mark.parametrize("job", ["passkey", "facts"])
    def test_answers_are_right(self, tiny_model, count_selections, job):
        model, library = tiny_model
        for paper in documents(library, job, 8192, 3, seed=6):
            ids = torch.tensor([paper.ids]).cuda()
            output = generate(model, ids, QuestCache(budget=256), max_new_tokens=8)
            answer = library.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert answer.startswith(paper.answer)
        assert count_selections() > 0
