"""Codes of keys choose the tokens that they say matter most: by laws, and by the formula in float64."""

import dataclasses
import math

import pytest
import torch
from small_llama import PROMPT, generate, make_model, tokens
from transformers import DynamicCache

from hf_quest import QuestCache, QuestError, reference, stripes
from hf_quest.codes import BITS, LEAST, decode, encode, find_candidates, grid, refine, refresh_codes
from hf_quest.evaluation.choices import CHOICES, attended_tokens, grouped_logits
from hf_quest.watch import PageReads

PAGE = 4
ODD = [(0,), (0, 3), (5, 0, 1)]  # left padding of the rows


class Stored:
    """Random keys of rows with left padding and all that is beside them; NaN wherever nothing may be read."""

    def __init__(self, left_padding, length, bits=2, in_8_bits=True, head_dim=16, num_kv_heads=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.bits, self.length, self.left_padding = bits, length, left_padding
        self.padding = torch.tensor(left_padding)
        shape = (len(left_padding), num_kv_heads)
        capacity = -(-length // PAGE) * PAGE + PAGE
        self.keys = torch.full((*shape, capacity, head_dim), torch.nan)
        for row, padding in enumerate(left_padding):
            self.keys[row, :, padding:length] = torch.randn(
                num_kv_heads, length - padding, head_dim, generator=generator
            )
        num_pages = capacity // PAGE
        dtype = torch.int8 if in_8_bits else torch.float32
        self.bounds = torch.zeros(*shape, num_pages, 2, head_dim, dtype=dtype)
        self.scales = torch.zeros(*shape, num_pages, 1, dtype=torch.uint8) if in_8_bits else None
        self.codes = torch.zeros(*shape, capacity, head_dim * bits // 8, dtype=torch.uint8)
        self.refresh(length)

    def refresh(self, num_new):
        where = (num_new, self.length, self.padding, PAGE)
        reference.refresh_bounds(self.keys, self.bounds, self.scales, *where)
        refresh_codes(self.keys, self.bounds, self.scales, self.codes, *where, self.bits)

    def page(self, row, page):
        """[Hkv, S, D] keys of a page and its grid."""
        slots = slice(self.left_padding[row] + PAGE * page, self.left_padding[row] + PAGE * (page + 1))
        scales = None if self.scales is None else self.scales[row, :, page]
        return (
            self.keys[row, :, slots],
            slots,
            [each[:, None] for each in grid(self.bounds[row, :, page], scales, self.bits)],
        )

    def refine(self, query, candidates, num_tokens, group="sum", mass=None):
        where = (self.length, self.padding, PAGE, self.bits)
        return refine(query, self.bounds, self.scales, self.codes, candidates, *where, 0.25, num_tokens, group, mass)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("in_8_bits", [True, False])
def test_a_code_names_the_nearest_value_of_the_grid(bits, in_8_bits):
    stored = Stored((0, 3), 40, bits, in_8_bits)
    for row, page in ((0, 0), (0, 9), (1, 4)):
        keys, slots, (lowest, step) = stored.page(row, page)
        decoded = decode(stored.codes[row, :, slots], lowest, step, bits)
        assert ((decoded - keys).abs() <= step / 2 * (1 + 1e-5)).all()  # a rounding of float32 beside half a step


@pytest.mark.parametrize("bits", BITS)
def test_codes_of_the_values_of_a_grid_are_exact_and_packed_lowest_first(bits):
    levels = torch.arange(2**bits)[:, None].expand(-1, 8)
    lowest, step = torch.full((8,), -3.0), torch.full((8,), 0.5)
    codes = encode(lowest + levels * step, lowest, step, bits)
    assert codes.shape == (2**bits, bits)
    assert torch.equal(decode(codes, lowest, step, bits), lowest + levels * step)
    first = encode(torch.tensor([1.0] + 7 * [0.0]), torch.zeros(8), torch.ones(8), bits)
    assert first.tolist() == [1] + (bits - 1) * [0]


def test_channels_that_are_alike_in_a_page_and_numbers_that_are_none():
    keys = torch.ones(3, 8)
    keys[1, 0] = torch.nan
    keys[2, 1] = torch.inf
    lowest, step = grid(torch.stack([torch.ones(8), torch.ones(8)]), None, 2)
    decoded = decode(encode(keys, lowest, step, 2), lowest, step, 2)
    torch.testing.assert_close(decoded[0], torch.ones(8))
    assert decoded.isfinite().all()


@pytest.mark.parametrize("left_padding", ODD)
@pytest.mark.parametrize("length", [9, 15, 16, 17, 31])
def test_codes_of_full_pages_do_not_hang_on_how_tokens_came(left_padding, length):
    whole, grown = Stored(left_padding, length), Stored(left_padding, length)
    grown.codes.fill_(255)
    for grown.length in range(max(left_padding) + 1, length + 1):
        grown.refresh(1)
    grown.length = length
    for row, padding in enumerate(left_padding):
        full = slice(padding, padding + (length - padding) // PAGE * PAGE)
        # Before the longest padding ends, tokens of the others came together.
        done = slice(max(full.start, padding + -(-(max(left_padding) - padding) // PAGE) * PAGE), full.stop)
        assert torch.equal(whole.codes[row, :, done], grown.codes[row, :, done])


def stripes_of(num_pages, num_stripes):
    """The pages of each stripe, of so many before the newest."""
    return [list(range(stripe, num_pages, num_stripes)) for stripe in range(num_stripes)]


def test_a_small_budget_has_fewer_stripes_so_that_each_has_a_dozen_tokens():
    assert [stripes.count(num, 16) for num in (32, 64, 111, 112, 128, 207, 208, 4096)] == [4, 4, 4, 8, 8, 8, 16, 16]
    assert [stripes.count(num, 32) for num in (64, 128, 223, 224)] == [4, 8, 8, 16]


@pytest.mark.parametrize("num_stripes", stripes.COUNTS)
@pytest.mark.parametrize("num_pages", [0, 1, 5, 16, 17, 40, 100])
@pytest.mark.parametrize("num_candidates", [1, 2, 7, 30, 1000])
@pytest.mark.parametrize("keeps_first", [True, False])
def test_candidates_are_the_best_of_each_stripe(num_pages, num_candidates, keeps_first, num_stripes):
    scores = torch.randn(1, 1, 1, num_pages + 3, generator=torch.Generator().manual_seed(num_pages)).round(decimals=1)
    length = num_pages * PAGE + 2
    where = (length, torch.tensor([0]), num_candidates, PAGE)
    found = find_candidates(scores, *where, keeps_first, num_stripes)[0, 0, 0]
    num = min(num_candidates - 1, num_pages)
    for own, pages in zip(found.tolist(), stripes_of(num_pages, num_stripes), strict=True):
        share = -(-num * len(pages) // max(num_pages, 1))
        by_score = sorted(pages, key=lambda page: (not (keeps_first and page == 0), -scores[0, 0, 0, page], page))
        best = sorted(by_score[:share])
        assert own == best + (len(own) - len(best)) * [-1]


@pytest.mark.parametrize("num_stripes", stripes.COUNTS)
@pytest.mark.parametrize("num_pages", [1, 5, 16, 17, 40, 1000])
@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 500])
def test_shares_are_fair_and_add_up(num_pages, num_tokens, num_stripes):
    """None is a token from its part of the whole, and candidates of as many pages hold what is chosen of them."""
    num_tokens = min(num_tokens, num_pages * PAGE)
    shares = stripes.shares_of_tokens(torch.tensor(num_tokens), torch.tensor(num_pages), num_stripes).tolist()
    assert sum(shares) == num_tokens
    num_candidates = torch.tensor(-(-num_tokens // PAGE))
    of_pages = stripes.shares_of_pages(num_candidates, torch.tensor(num_pages), num_stripes).tolist()
    for share, candidates, pages in zip(shares, of_pages, stripes_of(num_pages, num_stripes), strict=True):
        assert abs(share - num_tokens * len(pages) / num_pages) < 1
        assert share <= candidates * PAGE
        assert candidates <= min(len(pages), stripes.most_pages(int(num_candidates), num_stripes))


def chosen_by_formula(stored, query, candidates, num_tokens, group, mass=None):
    """For each row, KV head and query the tokens, in float64 and without a tensor of all."""
    batch_size, num_heads, num_queries, _ = query.shape
    num_kv_heads = stored.keys.shape[1]
    for row in range(batch_size):
        for head in range(num_kv_heads):
            heads = range(head * num_heads // num_kv_heads, (head + 1) * num_heads // num_kv_heads)
            for idx in range(num_queries):
                num_visible = stored.length - num_queries + idx + 1 - stored.left_padding[row]
                newest = (num_visible - 1) // PAGE
                logits = {}
                for page in candidates[row, head, idx].flatten().tolist():
                    if page < 0:
                        continue
                    _, slots, (lowest, step) = stored.page(row, page)
                    keys = decode(stored.codes[row, head, slots], lowest[head], step[head], stored.bits).double()
                    for offset in range(PAGE):
                        logits[page * PAGE + offset] = [
                            0.25
                            * sum(
                                q * k for q, k in zip(query[row, h, idx].tolist(), keys[offset].tolist(), strict=True)
                            )
                            for h in heads
                        ]
                shares = {token: [] for token in logits}
                for h in range(len(heads)):
                    total = sum(math.exp(each[h]) for each in logits.values())
                    for token, each in logits.items():
                        shares[token].append(math.exp(each[h]) / total)
                agree = {"sum": sum, "share": max}
                if group == "max" or len(heads) == 1:
                    scores = {token: max(each) for token, each in logits.items()}
                else:
                    scores = {token: agree[group](each) for token, each in shares.items()}
                num_best, num_before = min(num_tokens - PAGE, newest * PAGE), 0
                best = []
                for pages in stripes_of(newest, candidates.shape[3]):
                    num_before += len(pages)
                    share = num_best * num_before // max(newest, 1) - len(best)
                    own = [token for token in scores if token // PAGE in pages]
                    best += sorted(own, key=lambda token: (-scores[token], token))[:share]
                if mass is not None:
                    best = those_that_hold(mass, best, scores, num_tokens // LEAST, group == "max" or len(heads) == 1)
                yield sorted(best) + list(range(newest * PAGE, num_visible))


def those_that_hold(mass, chosen, scores, least, are_logits):
    """Of the tokens that are chosen the fewest that hold so much of what all get."""
    weights = {token: math.exp(score) for token, score in scores.items()} if are_logits else scores
    held = []
    for token in sorted(chosen, key=lambda token: (-scores[token], token)):
        if len(held) < least or sum(weights[each] for each in held) < mass * sum(weights.values()):
            held.append(token)
    return held


@pytest.mark.parametrize("group", reference.GROUPS)
@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("left_padding", ODD)
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize(("mass", "num_stripes"), [(None, 16), (None, 4), (0.2, 16), (0.7, 16)])
def test_refine_is_its_formula(group, num_heads, left_padding, num_queries, mass, num_stripes):
    stored = Stored(left_padding, 157, seed=num_heads)
    query = torch.randn(len(left_padding), num_heads, num_queries, 16, generator=torch.Generator().manual_seed(1))
    where = (stored.length, stored.padding, PAGE)
    scores = reference.estimate(query, stored.bounds, stored.scales, 0.25, reference.DEFAULT, where)
    candidates = find_candidates(scores, *where[:2], 20, PAGE, True, num_stripes)
    # Nothing else is read: neither other pages, nor keys.
    stored.keys.fill_(torch.nan)
    found = stored.refine(query, candidates, 44, group, mass)
    expected = list(chosen_by_formula(stored, query, candidates, 44, group, mass))
    assert mass != 0.2 or min(map(len, expected)) < 44 - PAGE
    for ids, right in zip(found.flatten(0, 2).tolist(), expected, strict=True):
        assert ids == right + (44 - len(right)) * [-1]


def test_where_candidates_have_fewer_tokens_than_are_asked_for_all_are_chosen():
    stored = Stored((0,), 30)
    scores = torch.zeros(1, 2, 1, 9)
    candidates = find_candidates(scores, 30, stored.padding, 8, PAGE, True, 16)
    ids = stored.refine(torch.randn(1, 4, 1, 16), candidates, 40)
    assert ids[0, 0, 0].tolist() == [*range(30), *(10 * [-1])]


@pytest.mark.parametrize("candidates", [2, 0])
@pytest.mark.parametrize("mass", [None, 0.5])
def test_it_chooses_what_eval_selection_measures(candidates, mass):
    """The table of real weights is of what a QuestCache does."""
    length, budget = 200, 64
    keys = torch.randn(1, 2, length, 32, generator=torch.Generator().manual_seed(0))
    query = torch.randn(1, 8, 1, 32, generator=torch.Generator().manual_seed(1))
    measured = dataclasses.replace(CHOICES["codes-tokens"], candidates=candidates, mass=mass or 0.0)
    expected = attended_tokens(measured, budget, query, keys, grouped_logits(query, keys, 0.2), 0.2)[:, :, 0]

    cache = QuestCache(budget, codes=2, candidates=candidates or None, mass=mass, dense_layers=0)
    cache.update(keys, keys, 0)
    choice = cache.method.choose(cache.layers[0].storage, query, reference.Logits(0.2), length)
    ids = choice.ids[:, :, 0]
    chosen = torch.zeros(1, 2, length + 1, dtype=torch.bool).scatter(2, ids.masked_fill(ids < 0, length), True)[
        ..., :-1
    ]
    assert choice.size == 1
    most = 2 * (budget - 16 + 8)  # the newest page holds 8 of its 16 tokens
    assert (choice.ids >= 0).sum() == most if mass is None else (choice.ids >= 0).sum() < most
    assert torch.equal(chosen, expected)


@pytest.fixture(scope="module")
def model():
    return make_model()


def mean_difference(model, budget=24, **options):
    """Of logits from dense attention's, of steps after one prompt."""
    caches = [QuestCache(budget, page_size=PAGE, **options), DynamicCache()]
    logits = []
    with torch.no_grad():
        for cache in caches:
            model(tokens(PROMPT), past_key_values=cache)
            steps = [model(tokens(1, seed=seed), past_key_values=cache).logits for seed in range(8)]
            logits.append(torch.cat(steps, dim=1).log_softmax(dim=-1))
    return torch.nn.functional.kl_div(*logits, log_target=True, reduction="batchmean").item()


def test_at_equal_budget_tokens_by_codes_lose_less_than_pages_and_more_bits_and_candidates_less_still(model):
    pages = mean_difference(model)
    few, all_of_them = mean_difference(model, codes=2, candidates=2), mean_difference(model, codes=2, candidates=None)
    fine = mean_difference(model, codes=8, candidates=None)
    assert pages > 2 * few
    assert few > all_of_them
    assert all_of_them > fine


def test_a_budget_beyond_the_context_is_dense_and_reads_no_code(model):
    dense = generate(model, tokens(PROMPT), DynamicCache())
    assert torch.equal(generate(model, tokens(PROMPT), QuestCache(codes=2)), dense)


def test_a_short_row_of_a_batch_attends_all_of_it():
    stored = Stored((0, 130), 157)
    candidates = find_candidates(torch.zeros(2, 2, 1, 40), 157, stored.padding, math.inf, PAGE, True, 4)
    ids = stored.refine(torch.randn(2, 4, 1, 16), candidates, 44, mass=0.2)
    assert (ids[0] >= 0).sum(dim=-1).max() < 44
    assert ids[1, :, 0].tolist() == 2 * [[*range(27), *(17 * [-1])]]


def test_a_mass_attends_fewer_tokens_and_loses_little_more(model):
    """An eighth of the budget and the newest page at the least, the budget at the most."""
    reads, cache = [], QuestCache(48, page_size=PAGE, codes=2, mass=0.9)
    cache.watcher = lambda read: read.choice is not None and reads.append(read.tokens().sum(dim=-1))
    generate(model, tokens(PROMPT), cache)
    num = torch.stack(reads)
    assert 48 // LEAST < num.min() < num.float().mean() < num.max() <= 48
    assert num.float().mean() < 18  # fewer than a budget of 20 does in the mean
    assert cache.method.fused is None
    few, by_mass, all_of_them = (
        mean_difference(model, budget=budget, codes=2, candidates=None, mass=mass)
        for budget, mass in ((20, None), (48, 0.9), (48, None))
    )
    assert all_of_them < by_mass < few


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0.9}, "mass is a share of what tokens get by their codes"),
        *(({"codes": 2, "mass": mass}, "mass is the share of the estimated attention") for mass in (0.0, 1.0, 95, "1")),
    ],
)
def test_a_mass_that_there_is_not_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        QuestCache(**options)


def test_what_a_step_reads_is_counted_with_codes(model):
    cache = QuestCache(24, page_size=PAGE, codes=2, candidates=2, dense_layers=0)
    with torch.no_grad():
        model(tokens(96), past_key_values=cache)
    token = 2 * 16 * 4  # bytes of a key and a value
    # Eleven of 23 pages in four stripes, rounded up in each.
    bounds, codes = 24 * (2 * 16 + 1), 12 * PAGE * 16 * 2 / 8
    assert cache.tokens_attended == 4 * [24]
    assert cache.read_share == pytest.approx((24 + (bounds + codes) / token) / 96)


def test_what_was_read_is_told_by_page(model):
    """Tokens that were chosen are in pages, and their attention is all that was paid."""
    cache = QuestCache(24, page_size=PAGE, codes=2)
    cache.watcher = reads = PageReads()
    generate(model, tokens(PROMPT), cache)
    reads.weigh(cache)
    num_pages = -(-cache.get_seq_length() // PAGE)
    assert reads.layers == [2, 3]
    assert reads.attention(num_pages).sum() == pytest.approx(1)
    for selection in reads.selections[2]:
        for pages, ids in zip(
            selection.page_ids[0, :, 0].tolist(), selection.choice.ids[0, :, 0].tolist(), strict=True
        ):
            assert [page for page in pages if page >= 0] == sorted({token // PAGE for token in ids if token >= 0})


@pytest.mark.parametrize("head_dim", [18, 20])
def test_a_head_dim_that_fills_no_byte(head_dim):
    lowest, step = torch.zeros(head_dim), torch.ones(head_dim)
    keys = torch.arange(head_dim).float() % 2
    assert torch.equal(decode(encode(keys, lowest, step, 1), lowest, step, 1), keys)
    model = make_model(head_dim=head_dim)
    with torch.no_grad():
        model(tokens(PROMPT), past_key_values=(cache := QuestCache(24, page_size=PAGE, codes=1)))
    assert cache.layers[3].storage.beside["codes"].shape[-1] == -(-head_dim // 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"codes": 3}, "one of .1, 2, 4, 8., or None, not 3"), ({"codes": 2, "candidates": 0}, "1 or more, or None")],
    ids=str,
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        QuestCache(**options)


@pytest.mark.parametrize("options", [{"codes": 8}, {"codes": 2, "candidates": None}], ids=str)
def test_what_the_kernels_do_not_know_is_not_compiled(options):
    assert not QuestCache(48, **options).can_be_compiled()


def test_cropping_beyond_a_page_is_refused_as_ever(model):
    cache = QuestCache(24, page_size=PAGE, codes=2)
    with torch.no_grad():
        model(tokens(20), past_key_values=cache)
    with pytest.raises((ValueError, QuestError), match="crop takes minus the number"):
        cache.crop(-21)
