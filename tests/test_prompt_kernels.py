"""The kernels of CritiPrefill against its PyTorch path in float32."""

import pytest
import torch

from hf_quest import CritiPrefill
from hf_quest.kernels import ops
from hf_quest.prompts import BlockScores, critiprefill, segments
from hf_quest.reference import Logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
HEADS = pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(2, 2), (8, 2), (6, 2), (5, 1), (7, 1), (16, 2), (32, 1)], ids=str
)
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SCALING = 128**-0.5


@pytest.fixture(autouse=True, scope="module")
def build_kernels():
    nothing = torch.zeros(1, 128, 128, device="cuda", dtype=torch.bfloat16)
    assert ops.serves_prompts(nothing, nothing, nothing, 128, 16, 32)


class Prompt:
    """`num_segments` segments from `start` on; NaN where nothing may be read."""

    def __init__(self, num_heads, num_kv_heads, start, num_segments, config, dtype=torch.bfloat16):
        torch.manual_seed(0)
        self.config, self.start, self.end = config, start, start + num_segments * config.segment_size
        num_queries = self.end - start
        # As a model hands them over: tokens first in memory.
        self.query = torch.randn(num_queries, num_heads, 128, device="cuda", dtype=dtype).mul_(3).transpose(0, 1)
        self.keys, self.values = (
            torch.full((num_kv_heads, self.end + 300, 128), torch.nan, device="cuda", dtype=dtype) for _ in range(2)
        )
        for stored in (self.keys, self.values):
            stored[:, : self.end].normal_()
        before = torch.arange(start, self.end, config.segment_size) // config.block_size
        self.block_ids = torch.stack(
            [
                torch.stack([torch.randperm(int(count))[: config.num_selected] for count in before])
                for _ in range(num_kv_heads)
            ]
        ).cuda()

    @property
    def place(self):
        return self.start, self.config.segment_size, self.config.block_size

    def attend(self, sinks=None):
        output = torch.full(
            (self.query.shape[1] + 2, *self.query[:, 0].shape), 7.0, device="cuda", dtype=self.query.dtype
        )
        tokens = (self.query, self.keys[:, : self.end], self.values[:, : self.end])
        ops.prompt_attend(*tokens, self.block_ids, output[1:-1], *self.place, SCALING, sinks)
        assert (output[0] == 7).all()
        assert (output[-1] == 7).all()
        return output[1:-1]

    def expected(self, sinks=None):
        """[R · L, Hq, D] by one masked softmax, in float32."""
        query, keys, values = (
            tensor.float() for tensor in (self.query, self.keys[:, : self.end], self.values[:, : self.end])
        )
        group, segment_size, block_size = len(query) // len(keys), self.config.segment_size, self.config.block_size
        outputs = []
        for segment in range(self.block_ids.shape[1]):
            begin = segment * segment_size
            is_seen = torch.zeros(len(keys), segment_size, self.end, dtype=torch.bool, device="cuda")
            slots = self.block_ids[:, segment, :, None] * block_size + torch.arange(block_size, device="cuda")
            is_seen.scatter_(2, slots.flatten(1)[:, None].expand(-1, segment_size, -1), True)
            own = slice(self.start + begin, self.start + begin + segment_size)
            is_seen[:, :, own] = torch.ones(segment_size, segment_size, dtype=torch.bool, device="cuda").tril()
            is_seen = is_seen.repeat_interleave(group, dim=0)
            logits = query[:, begin : begin + segment_size] @ keys.repeat_interleave(group, 0).transpose(1, 2) * SCALING
            logits = logits.masked_fill(~is_seen, -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks.float()[:, None, None].expand(-1, segment_size, 1)], dim=2)
            weights = logits.softmax(dim=2)[..., : self.end]
            outputs.append(weights @ values.repeat_interleave(group, dim=0))
        return torch.cat(outputs, dim=1).transpose(0, 1)


def check_attention(prompt, sinks=None):
    """The error is a few roundings of the largest value: of weights, which sum to 1, and of the output itself.

    The same attention in PyTorch at the same precision rounds logits, too, and is off by ten times as much.
    """
    exact = prompt.expected(sinks)
    error = (prompt.attend(sinks).float() - exact).abs().max()
    assert error <= exact.abs().max() * torch.finfo(prompt.query.dtype).eps


class TestAttend:
    @DTYPE
    @HEADS
    def test_heads(self, num_heads, num_kv_heads, dtype):
        config = CritiPrefill(budget=256, segment_size=128, block_size=16, threshold=256)
        check_attention(Prompt(num_heads, num_kv_heads, 384, 3, config, dtype))

    @pytest.mark.parametrize("block_size", [16, 32])
    @pytest.mark.parametrize("segment_size", [128, 384, 512])
    @pytest.mark.parametrize("budget", [16, 96, 128, 160, 1024])
    def test_shapes(self, budget, segment_size, block_size):
        config = CritiPrefill(budget=budget, segment_size=segment_size, block_size=block_size, threshold=1024)
        check_attention(Prompt(4, 2, 1536, 2, config))

    @pytest.mark.parametrize("length", [128, 1024, 2176])
    def test_a_segment_before_which_there_is_nothing(self, length):
        config = CritiPrefill(budget=16, segment_size=length, block_size=16, threshold=16)
        check_attention(Prompt(12, 4, 0, 1, config))

    def test_more_work_than_multiprocessors(self):
        config = CritiPrefill(budget=512, segment_size=128, block_size=16, threshold=512)
        prompt = Prompt(32, 8, 512, 16, config)
        check_attention(prompt)
        expected = prompt.attend()
        assert all(torch.equal(prompt.attend(), expected) for _ in range(20))

    @DTYPE
    def test_sinks(self, dtype):
        config = CritiPrefill(budget=64, segment_size=128, block_size=16, threshold=128)
        check_attention(Prompt(8, 2, 128, 2, config, dtype), sinks=torch.randn(8, device="cuda", dtype=dtype))

    def test_only_the_chosen_blocks_and_the_segment_are_read(self):
        config = CritiPrefill(budget=160, segment_size=128, block_size=32, threshold=512)
        prompt = Prompt(4, 1, 512, 1, config)
        expected = prompt.attend()
        is_read = torch.zeros(prompt.end, dtype=torch.bool, device="cuda")
        is_read[512:] = True
        is_read[(prompt.block_ids[0, 0, :, None] * 32 + torch.arange(32, device="cuda")).flatten()] = True
        prompt.keys[:, : prompt.end][:, ~is_read] = torch.nan
        prompt.values[:, : prompt.end][:, ~is_read] = torch.nan
        assert torch.equal(prompt.attend(), expected)

    def test_far_away_keys(self):
        """Beyond 2^31 bytes from the first one."""
        config = CritiPrefill(budget=128, segment_size=128, block_size=16, threshold=128)
        check_attention(Prompt(1, 1, 128 * 65_537, 1, config))

    def test_large_logits(self):
        config = CritiPrefill(budget=128, segment_size=128, block_size=16, threshold=256)
        prompt = Prompt(4, 2, 256, 2, config)
        prompt.keys *= 30
        check_attention(prompt)


class TestEstimate:
    @DTYPE
    @HEADS
    @pytest.mark.parametrize("block_size", [16, 32])
    def test_heads(self, num_heads, num_kv_heads, block_size, dtype):
        self.check(num_heads, num_kv_heads, 384, 3, 128, block_size, 8, dtype)

    @pytest.mark.parametrize("stride", [4, 16, 64, 128])
    @pytest.mark.parametrize("segment_size", [128, 256, 384, 512])
    @pytest.mark.parametrize("start", [1536, 10752])
    def test_shapes(self, segment_size, start, stride):
        self.check(8, 2, start, 5, segment_size, 16, stride)

    def test_thread_blocks_with_several_chunks_of_keys(self):
        self.check(8, 8, 8192, 64, 128, 16, 4)

    def check(
        self, num_heads, num_kv_heads, start, num_segments, segment_size, block_size, stride, dtype=torch.bfloat16
    ):
        config = CritiPrefill(budget=16, segment_size=segment_size, block_size=block_size, threshold=128)
        prompt = Prompt(num_heads, num_kv_heads, start, num_segments, config, dtype)
        keys = prompt.keys[:, : prompt.end]
        torch.full((1 << 28,), torch.nan, device="cuda")  # what the kernels get to work in
        scores = ops.prompt_estimate(prompt.query, keys, start, segment_size, stride, block_size, SCALING)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "sample_stride", lambda *_: stride)
            expected = segments.estimate(prompt.query.float(), keys.float(), start, SCALING, config)
        is_hidden = expected == -1
        assert torch.equal(scores == -1, is_hidden)
        # Logits are kept in 16 bits, those of 16 to 32 within 2^-7, which twice in an exponent of 2 is 1.1 %; as much
        # again for products that are added up in another order. Scores are compared down to a billionth.
        torch.testing.assert_close(scores[~is_hidden], expected[~is_hidden], rtol=0.02, atol=1e-9)

    @pytest.mark.parametrize("stride", [8, 32])
    def test_nothing_after_a_segment_matters(self, stride):
        config = CritiPrefill(budget=16, segment_size=128, block_size=16, threshold=128)
        prompt = Prompt(8, 2, 256, 4, config)
        arguments = (256, 128, stride, 16, SCALING)
        expected = ops.prompt_estimate(prompt.query, prompt.keys, *arguments)[:, :2]
        prompt.keys[:, 256 + 128 :] = torch.nan
        prompt.query[:, 256:] = torch.nan
        assert torch.equal(ops.prompt_estimate(prompt.query, prompt.keys, *arguments)[:, :2], expected)


@pytest.mark.parametrize("num_blocks", [64, 65, 300, 8192, 9000])
@pytest.mark.parametrize("num_selected", [1, 63, 64])
def test_select(num_blocks, num_selected):
    scores = torch.rand(2, 5, num_blocks, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    found = segments.select(scores, num_selected, False, has_kernels=True)
    assert torch.equal(found, scores.topk(num_selected).indices.sort().values)


def attend(query, stored, config, left_padding=(0,), **options):
    return segments.attend(query, *stored, left_padding, config, BlockScores(), Logits(SCALING, **options))


@pytest.fixture
def by_kernels_alone(monkeypatch):
    monkeypatch.delattr(segments, "attend_segments")


@pytest.mark.usefixtures("by_kernels_alone")
@pytest.mark.parametrize("config", [{}, {"segment_size": 384}, {"layer_fusion": 0.25}], ids=str)
def test_slabs_and_chunks_change_nothing(config, monkeypatch):
    config = CritiPrefill(budget=256, threshold=768, **config)
    torch.manual_seed(0)
    query = 3 * torch.randn(1, 8, 3840, 128, device="cuda", dtype=torch.bfloat16)
    stored = torch.randn(2, 1, 2, 3840, 128, device="cuda", dtype=torch.bfloat16)
    whole = attend(query, stored, config)
    chunks = [attend(query[:, :, :end][:, :, -1536:], stored[..., :end, :], config) for end in (1536, 3072)]
    assert torch.equal(torch.cat(chunks, dim=1)[:, 768:], whole[:, 768:3072])
    monkeypatch.setattr(segments, "SLAB_BYTES", 1)
    assert torch.equal(attend(query, stored, config), whole)


@pytest.mark.usefixtures("by_kernels_alone")
def test_sinks_of_another_dtype():
    config = CritiPrefill(budget=256, threshold=512)
    torch.manual_seed(0)
    query = torch.randn(1, 8, 1024, 128, device="cuda", dtype=torch.bfloat16)
    stored = torch.randn(2, 1, 2, 1024, 128, device="cuda", dtype=torch.bfloat16)
    sinks = torch.randn(8, device="cuda")
    output = attend(query, stored, config, sinks=sinks)
    assert torch.equal(output, attend(query, stored, config, sinks=sinks.bfloat16()))
    assert not torch.equal(output, attend(query, stored, config))


@pytest.mark.parametrize("score", critiprefill.SCORES)
@pytest.mark.parametrize("left_padding", [(0,), (0, 136)], ids=["whole", "padded"])
def test_attend_of_prompts(score, left_padding, monkeypatch):
    """With kernels and without, most segments choose the same blocks, by which the attention is the same."""
    config = CritiPrefill(budget=256, segment_size=128, block_size=16, threshold=512, score=score)
    torch.manual_seed(0)
    query = 3 * torch.randn(len(left_padding), 8, 2120, 128, device="cuda", dtype=torch.bfloat16)
    storage = torch.randn(2, len(left_padding), 2, 2176, 128, device="cuda", dtype=torch.bfloat16)
    select, chosen, is_same = segments.select, [], []

    def choose(*arguments):
        chosen.append(select(*arguments))
        return chosen[-1]

    def choose_again(*arguments):
        block_ids = chosen.pop(0)
        is_same.append((select(*arguments).sort().values == block_ids.sort().values).all(dim=-1).flatten())
        return block_ids

    with monkeypatch.context() as patch:
        patch.setattr(segments, "select", choose)
        patch.delattr(segments, "attend_segments")
        output = attend(query, storage[..., :2120, :], config, left_padding).float()
    monkeypatch.setattr(ops, "serves_prompts", lambda *_: False)
    monkeypatch.setattr(segments, "select", choose_again)
    expected = attend(query.float(), storage.float()[..., :2120, :], config, left_padding)
    assert torch.cat(is_same).float().mean() > 0.5  # rounded logits turn blocks that are nearly equal
    # The first tokens are attended by PyTorch's kernel, which rounds weights, too.
    assert (output - expected).abs().max() <= 2 * expected.abs().max() * torch.finfo(torch.bfloat16).eps
