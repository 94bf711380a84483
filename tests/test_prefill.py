"""CritiPrefill: each stage against loops, and what must hold of a prompt however it is read."""

import copy
import pickle

import pytest
import torch
from small_llama import PROMPT, generate, make_model, tokens
from torch.testing import assert_close
from transformers import DynamicCache, Gemma2ForCausalLM, GptOssForCausalLM, MistralForCausalLM

from hf_quest import CritiPrefill, QuestCache, prefill_progress
from hf_quest.evaluation import prompts
from hf_quest.prompts import BlockScores, critiprefill, dense, segments
from hf_quest.reference import Logits
from hf_quest.seam import attention

SMALL = CritiPrefill(budget=16, segment_size=16, block_size=8, threshold=32, dense_layers=0)
HEADS = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
SCORE = pytest.mark.parametrize("score", critiprefill.SCORES)
SCALING = 0.4


class Prompt:
    """Random queries, keys and values of rows with left padding; NaN wherever nothing may be read."""

    def __init__(self, lengths, num_heads=4, num_kv_heads=2, head_dim=8, seed=0, spare=24):
        generator = torch.Generator().manual_seed(seed)
        self.num_tokens = max(lengths)
        self.padding = tuple(self.num_tokens - length for length in lengths)
        capacity = -(-(self.num_tokens + spare) // 8) * 8
        self.query = 2 * torch.randn(len(lengths), num_heads, self.num_tokens, head_dim, generator=generator)
        self.keys = torch.full((len(lengths), num_kv_heads, capacity, head_dim), torch.nan)
        self.values = self.keys.clone()
        for row, padding in enumerate(self.padding):
            for stored in (self.keys, self.values):
                new = torch.randn(num_kv_heads, self.num_tokens - padding, head_dim, generator=generator)
                stored[row, :, padding : self.num_tokens] = new
            self.query[row, :, :padding] = torch.nan

    def attend(self, config, first=0, end=None, earlier=None, **options):
        """[B, T, Hq, D] of the queries in slots `first` to `end` - 1."""
        end = self.num_tokens if end is None else end
        earlier = BlockScores() if earlier is None else earlier
        query, stored = self.query[:, :, first:end], (self.keys[:, :, :end], self.values[:, :, :end])
        return segments.attend(query, *stored, self.padding, config, earlier, Logits(SCALING, **options))

    def row(self, row):
        """Query [Hq, n, D], keys and values [Hkv, n, D] of the tokens of one row."""
        slots = slice(self.padding[row], self.num_tokens)
        return self.query[row, :, slots], self.keys[row, :, slots], self.values[row, :, slots]


def expected_scores(query, keys, segment, config):
    """[Hkv, C]: what the blocks before `segment` matter to it, by loops over everything."""
    group = query.shape[0] // keys.shape[0]
    begin = segment * config.segment_size
    scores = torch.zeros(keys.shape[0], begin // config.block_size)
    for kv_head in range(keys.shape[0]):
        blocks = keys[kv_head, :begin].split(config.block_size)
        heads = query[kv_head * group : (kv_head + 1) * group, begin : begin + config.segment_size]
        if config.score == "published":
            logits = torch.zeros(len(blocks))
            for head in heads:
                middle = (head.max(dim=0).values + head.min(dim=0).values) / 2
                for block_idx, block in enumerate(blocks):
                    extremes = block.max(dim=0).values, block.min(dim=0).values
                    logits[block_idx] += max(middle @ extreme for extreme in extremes) / group
            scores[kv_head] = logits.softmax(dim=0)
            continue
        samples = heads[:, :: segments.sample_stride(begin, config.segment_size)].flatten(0, 1)
        for sample in samples:
            logits = torch.stack([(SCALING * (block @ sample)).max() for block in blocks])
            scores[kv_head] += logits.softmax(dim=0) ** 2 / len(samples)
    return scores


def expected_attention(query, keys, values, config, earlier=None, softcap=None, sinks=None):
    """[n, Hq, D] of one row by one masked softmax, and the scores of its segments."""
    num_heads, num_tokens, _ = query.shape
    group = num_heads // keys.shape[0]
    is_visible = torch.ones(num_heads, num_tokens, num_tokens, dtype=torch.bool).tril()
    found = {}
    for segment in range(num_tokens // config.segment_size):
        begin = segment * config.segment_size
        if begin < config.threshold:
            continue
        found[segment] = scores = expected_scores(query, keys, segment, config)
        if earlier is not None:
            found[segment] = scores = (1 - config.layer_fusion) * scores + config.layer_fusion * earlier[segment]
        for kv_head, row in enumerate(scores):
            row = row.clone()
            if config.score == "mass":
                row[0] = torch.inf
            blocks = row.topk(config.num_selected).indices
            is_chosen = torch.zeros(len(row), dtype=torch.bool).index_fill(0, blocks, True)
            rows = slice(begin, begin + config.segment_size)
            heads = slice(kv_head * group, (kv_head + 1) * group)
            is_visible[heads, rows, :begin] = is_chosen.repeat_interleave(config.block_size)
    keys, values = (stored.repeat_interleave(group, dim=0) for stored in (keys, values))
    logits = query @ keys.transpose(1, 2) * SCALING
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~is_visible, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, num_tokens, 1)], dim=2)
    return (logits.softmax(dim=2)[..., :num_tokens] @ values).transpose(0, 1), found


def same(output, expected):
    assert_close(output, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


class TestStages:
    @SCORE
    @HEADS
    def test_estimate(self, score, num_heads, num_kv_heads):
        config = CritiPrefill(budget=16, segment_size=32, block_size=8, threshold=32, score=score)
        prompt = Prompt([160], num_heads, num_kv_heads)
        query, keys, _ = prompt.row(0)
        scores = segments.estimate(query[:, 32:], keys, 32, SCALING, config)
        for segment in range(1, 5):
            found = scores[:, segment - 1]
            same(found[:, : 4 * segment], expected_scores(query, keys, segment, config))
            assert (found[:, 4 * segment :] == -1).all()

    def test_weights_whose_squares_are_none_of_their_dtype(self):
        prompt = Prompt([160])
        query, keys, _ = (tensor.half() for tensor in prompt.row(0))
        keys[:, 0] = 3  # a sink
        query += 3
        config = CritiPrefill(budget=16, segment_size=32, block_size=8, threshold=32)
        scores = segments.estimate(query[:, 128:], keys, 128, SCALING, config)
        exact = segments.estimate(query[:, 128:].float(), keys.float(), 128, SCALING, config)
        assert exact[..., 1:].max() < 2**-23  # less than any number of 16 bits, but two
        torch.testing.assert_close(scores, exact, rtol=0.3, atol=0)  # the least of the weights have fewer bits

    def test_fuse_mixes_in_what_the_last_layer_found(self):
        earlier = {}
        first, second = torch.rand(2, 2, 3, 5)
        assert torch.equal(segments.fuse(first, earlier, "place", 0.25), first)
        same(segments.fuse(second, earlier, "place", 0.25), 0.25 * first + 0.75 * second)
        assert torch.equal(segments.fuse(second, earlier, "elsewhere", 0.25), second)

    def test_scores_end_with_their_forward(self):
        state = BlockScores()
        for layer_idx, expected in ((1, {}), (2, {"place": 1}), (5, {"place": 1}), (1, {}), (1, {}), (0, {})):
            state.enter(layer_idx)
            assert state.scores == expected
            state.scores["place"] = 1

    def test_select_takes_the_best_and_keeps_the_sink(self):
        scores = torch.rand(2, 5, 12, generator=torch.Generator().manual_seed(0))
        assert torch.equal(segments.select(scores, 3, False).sort().values, scores.topk(3).indices.sort().values)
        kept = segments.select(scores, 3, True)
        best = scores[..., 1:].topk(2).indices + 1
        assert torch.equal(kept.sort().values, torch.cat([torch.zeros_like(best[..., :1]), best], 2).sort().values)

    @pytest.mark.parametrize("padding", [0, 3, 8])
    def test_gather(self, padding):
        stored = torch.arange(2 * 64 * 4.0).view(2, 64, 4)[:, padding:61]
        block_ids = torch.tensor([[[1, 4], [0, 2], [5, 3]], [[2, 0], [5, 1], [3, 4]]])
        chosen = segments.gather(stored, block_ids, 8)
        for segment in range(3):
            for head in range(2):
                blocks = [stored[head, 8 * block : 8 * block + 8] for block in block_ids[head, segment]]
                assert torch.equal(chosen[segment, head], torch.cat(blocks))

    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_attention_of_two_sets_of_keys_merges_to_that_of_all(self, softcap):
        prompt = Prompt([48])
        query, keys, values = (tensor[None] for tensor in prompt.row(0))
        logits = Logits(SCALING, softcap)
        whole = dense.attention(query, keys, values, False, logits)
        parts = [
            dense.attention(query, keys[:, :, part], values[:, :, part], False, logits)
            for part in (slice(0, 20), slice(20, 48))
        ]
        same(dense.merge(*parts[0], *parts[1], None, torch.empty_like(query)), whole[0])


class TestAttend:
    @SCORE
    @HEADS
    @pytest.mark.parametrize("num_tokens", [31, 32, 47, 48, 49, 100, 128])
    def test_is_attention_to_the_chosen_blocks_and_the_segment(self, score, num_heads, num_kv_heads, num_tokens):
        config = CritiPrefill(budget=16, segment_size=16, block_size=8, threshold=32, score=score)
        prompt = Prompt([num_tokens], num_heads, num_kv_heads)
        same(prompt.attend(config)[0], expected_attention(*prompt.row(0), config)[0])

    @pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sinks": True}, {"softcap": 5.0, "sinks": True}], ids=str)
    def test_softcap_and_sinks(self, options):
        options = {**options, "sinks": torch.randn(4)} if "sinks" in options else options
        prompt = Prompt([100])
        same(prompt.attend(SMALL, **options)[0], expected_attention(*prompt.row(0), SMALL, **options)[0])

    def test_far_from_the_beginning_fewer_queries_are_looked_at(self, monkeypatch):
        monkeypatch.setattr(segments, "SAMPLED_KEYS", 32)
        positions = (0, 31, 32, 63, 64, 2000)
        assert [segments.sample_stride(position, 128) for position in positions] == [4, 4, 8, 8, 16, 128]
        assert [segments.sample_stride(position, 96) for position in (0, 32, 64, 128)] == [4, 8, 16, 32]
        config = CritiPrefill(budget=16, segment_size=32, block_size=8, threshold=32)
        prompt = Prompt([200])
        same(prompt.attend(config)[0], expected_attention(*prompt.row(0), config)[0])

    def test_slabs_change_nothing(self, monkeypatch):
        prompt = Prompt([200])
        whole = prompt.attend(SMALL)
        monkeypatch.setattr(segments, "SLAB_BYTES", 1)
        same(prompt.attend(SMALL), whole)

    def test_scores_of_the_last_layer_take_part(self):
        first, second = Prompt([100], seed=1), Prompt([100], seed=2)
        config = CritiPrefill(budget=16, segment_size=16, block_size=8, threshold=32, layer_fusion=0.5)
        earlier = BlockScores()
        earlier.enter(0)
        first.attend(config, earlier=earlier)
        earlier.enter(1)
        _, found = expected_attention(*first.row(0), config)
        expected, _ = expected_attention(*second.row(0), config, earlier=found)
        same(second.attend(config, earlier=earlier)[0], expected)
        assert not torch.allclose(second.attend(config)[0], expected)

    def test_all_blocks_are_dense_attention(self):
        config = CritiPrefill(budget=64, segment_size=16, block_size=8, threshold=64)
        prompt = Prompt([80])
        assert config.is_sparse(80, 80)
        same(prompt.attend(config), prompt.attend(None))

    @SCORE
    @pytest.mark.parametrize("chunk", [16, 48, 64])
    def test_chunks_that_end_with_segments_are_the_whole(self, score, chunk):
        config = CritiPrefill(budget=16, segment_size=16, block_size=8, threshold=32, score=score)
        prompt = Prompt([185])
        ends = [*range(chunk, 185, chunk), 185]
        chunks = [prompt.attend(config, end - (end - 1) % chunk - 1, end) for end in ends]
        same(torch.cat(chunks, dim=1), prompt.attend(config))

    def test_a_chunk_that_cuts_segments_is_dense_there(self):
        prompt = Prompt([100])
        same(prompt.attend(SMALL, 70)[:, :10], prompt.attend(None, 70)[:, :10])  # 70 to 79 end a segment
        same(prompt.attend(SMALL, 70)[:, 10:26], prompt.attend(SMALL)[:, 80:96])
        same(prompt.attend(SMALL)[:, 96:], prompt.attend(None)[:, 96:])

    @SCORE
    def test_padded_row_is_the_row_alone(self, score):
        config = CritiPrefill(budget=16, segment_size=16, block_size=8, threshold=32, score=score)
        prompt = Prompt([150, 149, 97, 40, 1])
        output = prompt.attend(config)
        for row, padding in enumerate(prompt.padding):
            assert not output[row, :padding].any()
            same(output[row, padding:], expected_attention(*prompt.row(row), config)[0])

    @SCORE
    @pytest.mark.parametrize("first", [48, 80, 112])
    @pytest.mark.parametrize(("budget", "factor"), [(16, 1), (32, 1000)], ids=["spread", "few keys weigh all"])
    def test_nothing_from_the_future_is_read(self, score, first, budget, factor):
        config = CritiPrefill(budget=budget, segment_size=16, block_size=8, threshold=32, score=score)
        prompt = Prompt([128])
        prompt.query *= factor
        expected = prompt.attend(config)[:, :first].clone()
        for tensor in (prompt.query, prompt.keys, prompt.values):
            tensor[:, :, first:] = torch.nan
        assert torch.equal(prompt.attend(config)[:, :first], expected)

    def test_only_the_chosen_blocks_are_read(self, monkeypatch):
        prompt = Prompt([96], 2, 1)
        chosen = []
        select = segments.select
        monkeypatch.setattr(
            segments, "select", lambda *args, **kwargs: chosen.append(select(*args, **kwargs)) or chosen[-1]
        )
        expected = prompt.attend(SMALL)[0, 80:].clone()
        unread = torch.ones(96, dtype=torch.bool)
        unread[80:] = False  # the last segment
        for block in chosen[0][0, -1].tolist():
            unread[8 * block : 8 * block + 8] = False
        assert unread.sum() == 64
        prompt.values[:, :, :96][:, :, unread] = torch.nan
        output = prompt.attend(SMALL)[0]
        assert torch.equal(output[80:], expected)
        assert output[:80].isnan().any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        """At most twice the error of the dense path at the same precision, whose merge it shares."""
        config = CritiPrefill(budget=64, segment_size=16, block_size=8, threshold=64)  # every block, so nothing flips
        prompt = Prompt([80])
        exact = prompt.attend(None)
        for name in ("query", "keys", "values"):
            setattr(prompt, name, getattr(prompt, name).to(dtype))
        yardstick = (prompt.attend(None).float() - exact).abs().max()
        assert (prompt.attend(config).float() - exact).abs().max() <= 2 * yardstick


CONFIG = CritiPrefill(budget=32, segment_size=32, block_size=16, threshold=64)
LONG = 300


def logits_of(model, cache, input_ids, chunk=None, **options):
    """[1, N, V] of a prompt read in one forward, or by chunks."""
    with torch.no_grad():
        chunks = input_ids.split(chunk or input_ids.shape[1], dim=1)
        return torch.cat([model(ids, past_key_values=cache, **options).logits for ids in chunks], dim=1)


@torch.no_grad()
def weights_of_layer_1(model, input_ids):
    """[1, Hq, N, N], of an eager model."""
    return model(input_ids, output_attentions=True).attentions[1]


def close(logits, expected):
    assert_close(logits, expected, rtol=1e-3, atol=1e-3)  # four layers of float32 sums in another order


@pytest.fixture(scope="module")
def model():
    return make_model()


class TestGenerate:
    def test_changes_the_answer(self, model):
        """Without this none of the equalities below would show that segments were sparse."""
        dense = logits_of(model, QuestCache(), tokens(LONG))
        sparse = logits_of(model, QuestCache(prefill=CONFIG), tokens(LONG))
        close(sparse[:, :64], dense[:, :64])
        assert not torch.allclose(sparse[:, 64:], dense[:, 64:], atol=0.1)

    def test_short_prompts_take_the_dense_path(self, model, monkeypatch):
        monkeypatch.delattr(segments, "attend_row")
        prompt = tokens(PROMPT)
        config = CritiPrefill(threshold=4096)
        assert torch.equal(logits_of(model, QuestCache(prefill=config), prompt), logits_of(model, QuestCache(), prompt))

    def test_dense_layers_that_are_all(self, model):
        config = CritiPrefill(budget=32, segment_size=32, block_size=16, threshold=64, dense_layers=4)
        close(
            logits_of(model, QuestCache(prefill=config), tokens(LONG)), logits_of(model, DynamicCache(), tokens(LONG))
        )

    @pytest.mark.parametrize("options", [{}, {"max_cache_len": 400}, {"page_size": 8}, {"dense_layers": 0}], ids=str)
    @pytest.mark.parametrize("chunk", [32, 96])
    def test_chunked_prompt_is_the_whole(self, model, chunk, options):
        whole = logits_of(model, QuestCache(prefill=CONFIG, **options), tokens(LONG))
        close(logits_of(model, QuestCache(prefill=CONFIG, **options), tokens(LONG), chunk), whole)
        output = [
            generate(model, tokens(LONG), QuestCache(prefill=CONFIG, **options), prefill_chunk_size=size)
            for size in (None, chunk)
        ]
        assert torch.equal(*output)

    def test_continued_conversation(self, model):
        """A second turn that begins and ends within segments is what the whole segments between make it."""
        cache = QuestCache(prefill=CONFIG)
        first = logits_of(model, cache, tokens(LONG)[:, :100])
        second = logits_of(model, cache, tokens(LONG)[:, 100:])
        assert cache.get_seq_length() == LONG
        assert first.shape[1] + second.shape[1] == LONG
        edge = QuestCache(prefill=CONFIG)
        logits_of(model, edge, tokens(LONG)[:, :96])
        close(
            logits_of(model, edge, tokens(LONG)[:, 96:])[:, :-1],
            logits_of(model, QuestCache(prefill=CONFIG), tokens(LONG))[:, 96:-1],
        )

    @pytest.mark.parametrize("seed", range(3))
    def test_left_padded_row_is_the_row_alone(self, model, seed):
        rows = [tokens(length, seed=10 * seed + length) for length in (LONG, LONG - 37, 150, 20)]
        input_ids = torch.cat([torch.nn.functional.pad(row, (LONG - row.shape[1], 0)) for row in rows])
        attention_mask = (torch.arange(LONG) >= LONG - torch.tensor([row.shape[1] for row in rows])[:, None]).long()
        output = generate(model, input_ids, QuestCache(prefill=CONFIG), attention_mask=attention_mask)
        for row, alone in zip(output, rows, strict=True):
            expected = generate(model, alone, QuestCache(prefill=CONFIG))[0, alone.shape[1] :]
            assert torch.equal(row[LONG:], expected)

    def test_reset_copies_and_pickles_read_alike(self, model):
        cache = QuestCache(prefill=CONFIG)
        expected = logits_of(model, cache, tokens(LONG))
        for again in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
            assert again.prefill == CONFIG
            again.reset()
            assert torch.equal(logits_of(model, again, tokens(LONG)), expected)

    def test_assisted_decoding_reads_the_prompt_alike(self, model):
        expected = generate(model, tokens(LONG), QuestCache(prefill=CONFIG))
        output = generate(model, tokens(LONG), QuestCache(prefill=CONFIG), prompt_lookup_num_tokens=5)
        assert torch.equal(output, expected)

    def test_outside_of_no_grad(self, model):
        logits = model(tokens(LONG), past_key_values=QuestCache(prefill=CONFIG)).logits
        close(logits, logits_of(model, QuestCache(prefill=CONFIG), tokens(LONG)))

    def test_local_layers_stay_as_they_are(self):
        """Every layer of this Mistral attends a window, so nothing is left to CritiPrefill."""
        local = make_model(MistralForCausalLM, sliding_window=48)
        expected = logits_of(local, DynamicCache(config=local.config), tokens(LONG))
        close(logits_of(local, QuestCache(prefill=CONFIG), tokens(LONG)), expected)

    @pytest.mark.parametrize(
        ("model_class", "options"),
        [
            (Gemma2ForCausalLM, {"head_dim": 16, "sliding_window": 48, "attn_logit_softcapping": 20.0}),
            (
                GptOssForCausalLM,
                {"head_dim": 16, "sliding_window": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
            ),
        ],
        ids=["softcap", "sinks"],
    )
    def test_families_that_need_more_than_sdpa(self, model_class, options):
        family = make_model(model_class, **options)
        dense = logits_of(family, QuestCache(), tokens(LONG))
        everything = CritiPrefill(budget=256, segment_size=32, block_size=16, threshold=256, dense_layers=0)
        close(logits_of(family, QuestCache(prefill=everything), tokens(LONG))[:, :288], dense[:, :288])
        # Of three blocks: the second and third best of one segment are equal but for rounding.
        config = CritiPrefill(budget=48, segment_size=32, block_size=16, threshold=64)
        sparse = logits_of(family, QuestCache(prefill=config), tokens(LONG))
        assert not torch.allclose(sparse, dense, atol=0.01)
        close(logits_of(family, QuestCache(prefill=config), tokens(LONG), 96), sparse)

    def test_mask_of_ones_own_is_dense(self, model):
        mask = torch.ones(1, 1, LONG, LONG, dtype=torch.bool).tril()
        mask[..., 5:9] = False
        mask |= torch.eye(LONG, dtype=torch.bool)
        expected = logits_of(model, DynamicCache(), tokens(LONG), attention_mask=mask)
        close(logits_of(model, QuestCache(prefill=CONFIG), tokens(LONG), attention_mask=mask), expected)

    def test_no_mask_is_made_for_chunks_on_a_gpu(self, model):
        """It could be gigabytes, and the attention behind it needs none. On a CPU it is still made."""
        cache = QuestCache(prefill=CONFIG)
        logits_of(model, cache, tokens(100))
        num_keys, _ = cache.get_mask_sizes(50, 0)
        chunk = {"batch_size": 1, "q_length": 50, "q_offset": 100, "kv_length": num_keys, "config": model.config}
        assert attention.quest_mask(**chunk, device="cuda") is None
        assert attention.quest_mask(**chunk, attention_mask=torch.ones(1, 150, dtype=torch.bool), device="cuda") is None
        assert cache.masks.num_known == 150
        assert attention.quest_mask(**chunk, device="cpu").shape == (1, 1, 50, 150)

    def test_progress(self, model, capsys):
        with prefill_progress(model, LONG) as bar:
            counts = []
            bar.update = lambda num, update=bar.update: counts.append(num) or update(num)
            generate(model, tokens(LONG), QuestCache(prefill=CONFIG), prefill_chunk_size=96)
        assert counts == [96, 96, 96, 12]
        assert "300/300" in capsys.readouterr().err


class TestEvaluation:
    @SCORE
    def test_attention_mass(self, model, score):
        """Of layer 1, which reads what a dense model would have handed to it, by that model's own weights."""
        config = CritiPrefill(budget=32, segment_size=32, block_size=16, threshold=64, score=score)
        chosen = {}
        cache = QuestCache(prefill=config)
        found = prompts.attention_mass(model, tokens(LONG), cache)
        cache = QuestCache(prefill=config)
        cache.watcher = lambda read: chosen.setdefault((read.layer.layer_idx, read.position), read.block_ids)
        logits_of(model, cache, tokens(LONG))
        eager = make_model(attn_implementation="eager")
        weights = weights_of_layer_1(eager, tokens(LONG))
        shares = []
        for (layer_idx, position), block_ids in chosen.items():
            for segment in range(block_ids.shape[1] if layer_idx == 1 else 0):
                start = position + 32 * segment
                is_read = torch.zeros(2, LONG, dtype=torch.bool)
                is_read[:, start:] = True
                for block in range(2):
                    slot = 16 * block_ids[:, segment, block, None] + torch.arange(16)
                    is_read.scatter_(1, slot, True)
                mass = weights[0, :, start : start + 32] * is_read.repeat_interleave(2, dim=0)[:, None]
                shares.append(mass.sum(dim=-1).mean())
        assert list(found) == [1, 2, 3]
        assert len(shares) == (LONG - 64) // 32
        assert found[1] == pytest.approx(sum(shares).item() / len(shares), abs=1e-5)
        assert found[1] < 0.99

    def test_perplexity_with_all_blocks_is_dense(self, model, monkeypatch):
        rows = tokens(2 * LONG).view(2, LONG)
        dense = prompts.perplexity(model, rows)
        everything = CritiPrefill(budget=272, segment_size=16, block_size=16, threshold=272)
        monkeypatch.setattr(prompts, "new_cache", lambda budget: QuestCache(prefill=everything))
        assert prompts.perplexity(model, rows, 272) == pytest.approx(dense, rel=1e-5)
        monkeypatch.setattr(prompts, "new_cache", lambda budget: QuestCache(prefill=CONFIG))
        assert prompts.perplexity(model, rows, 32) != pytest.approx(dense, rel=1e-3)

    def test_read_share_counts_products(self):
        for num_tokens in (64, 100, 300):
            start, stop = CONFIG.segments(0, num_tokens)
            pairs = [position + 1 for position in range(num_tokens)]
            read = [
                CONFIG.budget + position % 32 + 1 if start <= position < stop else position + 1
                for position in range(num_tokens)
            ]
            assert CONFIG.read_share(num_tokens) == pytest.approx(sum(read) / sum(pairs))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"budget": 0}, "budget is a number of tokens"),
        ({"budget": 2.5}, "budget is a number of tokens"),
        ({"segment_size": True}, "segment_size is a number of tokens"),
        ({"block_size": -32}, "block_size is a number of tokens"),
        ({"threshold": -1}, "threshold is a number of tokens"),
        ({"segment_size": 500}, "not divided by blocks"),
        ({"segment_size": 24}, "not divided by blocks"),
        ({"threshold": 1024}, "under the budget"),
        ({"budget": 2049, "threshold": 2050}, "under the budget, 2064 tokens"),
        ({"dense_layers": -1}, "dense_layers is a number of layers"),
        ({"layer_fusion": 1.0}, "layer_fusion is a share"),
        ({"layer_fusion": -0.1}, "layer_fusion is a share"),
        ({"score": "best"}, "score is one of mass, published"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings, reason):
    with pytest.raises(ValueError, match=reason):
        CritiPrefill(**settings)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prefill": "critical"}, "prefill is a CritiPrefill"),
        ({"prefill": CritiPrefill(), "page_size": 64}, "not made of whole pages of 64"),
    ],
    ids=["no CritiPrefill", "pages"],
)
def test_caches_that_cannot_have_it(options, reason):
    with pytest.raises(ValueError, match=reason):
        QuestCache(**options)
