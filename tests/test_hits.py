"""How many of the tokens that steps choose are among those chosen lately: as counted by hand, and of the tiny model."""

from collections import OrderedDict
from itertools import combinations

import pytest
import torch

import hf_quest.tiny
from hf_quest.evaluation import evaluate_hits
from hf_quest.evaluation.documents import heldout_text
from hf_quest.evaluation.hits import (
    NUM_BEFORE,
    TIMES,
    SetPool,
    hits_table,
    lru_shares,
    optimal_shares,
    pool_share,
    share_again,
)

SIZES = (1, 2, 5, 40)


def by_hand(tokens, size):
    held, hits = OrderedDict(), 0
    for time, token in enumerate(tokens):
        hits += token in held and time >= NUM_BEFORE
        held[token] = held.pop(token, None)
        if len(held) > size:
            held.popitem(last=False)
    return hits / (len(tokens) - NUM_BEFORE)


def test_an_lru_of_one_token_at_a_time_is_as_counted_by_hand():
    torch.manual_seed(0)
    tokens = (torch.randn(300).abs() * 15).long()
    expected = [by_hand(tokens.tolist(), size) for size in SIZES]
    assert lru_shares([token.view(1, 1) for token in tokens], SIZES) == pytest.approx(expected)
    assert expected[0] < expected[-1] < 1


def test_of_tokens_chosen_together_as_many_are_there_as_there_is_room_for():
    chosen = [torch.arange(8)[None]] * (NUM_BEFORE + 10)
    assert lru_shares(chosen, (2, 8, 100)) == pytest.approx([0.25, 1, 1])
    assert share_again(chosen) == 1


def most_hits(steps, size):
    """Of all ways to keep `size` tokens from step to step."""
    best = {frozenset(): 0}
    for time, step in enumerate(steps):
        after = {}
        for held, hits in best.items():
            hits += len(held & step) if time >= NUM_BEFORE else 0
            for kept in combinations(sorted(held | step), min(size, len(held | step))):
                after[frozenset(kept)] = max(hits, after.get(frozenset(kept), 0))
        best = after
    return max(best.values())


@pytest.mark.parametrize("seed", range(3))
def test_no_way_to_keep_tokens_is_better_than_the_optimal_one(seed):
    torch.manual_seed(seed)
    chosen = [torch.stack([torch.randperm(7)[:3] for _ in range(2)]) for _ in range(NUM_BEFORE + 12)]
    chosen[-3][1, 2] = -1  # no token
    of_heads = [[{int(token) for token in ids[head] if token >= 0} for ids in chosen] for head in range(2)]
    num_tokens = sum(len(step) for steps in of_heads for step in steps[NUM_BEFORE:])
    sizes = (1, 2, 4)
    expected = [sum(most_hits(steps, size) for steps in of_heads) / num_tokens for size in sizes]
    shares = optimal_shares(chosen, sizes)
    assert shares == pytest.approx(expected)
    assert all(share >= lru for share, lru in zip(shares, lru_shares(chosen, sizes), strict=True))


def test_what_no_pool_has_is_chosen_for_the_first_time():
    chosen = [torch.arange(time, time + 8)[None] for time in range(NUM_BEFORE + 10)]
    assert optimal_shares(chosen, (7, 100)) == pytest.approx([7 / 8, 7 / 8])


def test_no_token_is_where_none_is():
    chosen = [torch.tensor([[3, 70, -1], [2, 5, 9]])] * (NUM_BEFORE + 5)
    assert lru_shares(chosen, (3,)) == pytest.approx([1])
    assert pool_share(chosen, 256, 16, 100) == 1


def test_a_pool_has_a_token_again_until_its_set_is_full_of_others():
    pool, of_set = SetPool(1, 256, 16, 16), torch.arange(17)[None]  # one set in each stripe, of 16 slots
    one_stripe = of_set + (of_set >= 16) * 240  # whose next page is the 17th
    assert not pool.look_up(one_stripe[:, :16], 1000).any()
    assert pool.look_up(one_stripe[:, 1:16], 1001).all()
    assert not pool.look_up(one_stripe[:, 16:], 1002).any()
    assert pool.look_up(one_stripe, 1003)[0].tolist() == [False, *[True] * 16]


def test_a_step_takes_no_slot_of_its_own_tokens():
    pool, page = SetPool(1, 256, 16, 16), torch.arange(16)[None]
    pool.look_up(page, 1000)
    both = torch.cat([page, page + 256], dim=1)
    assert pool.look_up(both, 1001).sum() == 16
    assert pool.look_up(both, 1002)[0].tolist() == [True] * 16 + [False] * 16


def test_the_newest_token_is_never_there():
    pool = SetPool(1, 256, 16, 16)
    assert not pool.look_up(torch.tensor([[99]]), 100).any()
    assert not pool.look_up(torch.tensor([[99]]), 101).any()
    assert pool.look_up(torch.tensor([[99]]), 102).all()


def test_larger_pools_hold_more_of_what_the_tiny_model_chooses(tmp_path):
    model, tokenizer = hf_quest.tiny.load()
    options = {"length": 1024, "budgets": (64, 128), "num_steps": NUM_BEFORE + 16, "num_windows": 1}
    report = evaluate_hits(model, tokenizer, heldout_text()[:20_000], **options)
    assert [record["budget"] for record in report["records"]] == [64, 128]
    for record in report["records"]:
        (shares,), (pools,), (optimal,) = record["lru"], record["pool"], record["optimal"]
        assert shares == sorted(shares)
        assert 0 < record["again"][0] < 1
        assert shares[-1] > 0.9
        for share, pool, best in zip(shares, pools, optimal, strict=True):
            assert pool is None or abs(share - pool) < 0.1
            assert best >= max(share, pool or 0)
    assert [pool is None for pool in report["records"][1]["pool"][0]] == [True, True, False, True, False, False]
    table = hits_table(report)
    assert [str(column.header) for column in table.columns][3:] == [f"{times:g} x" for times in TIMES]
    assert len(table.rows) == 2
    (cell, *_), (largest, *_) = (list(table.columns[column].cells) for column in (3, -1))
    assert [part.count("%") for part in (*cell.split(" / "), *largest.split(" / "))] == [1, 0, 1, 1, 1, 1]


def test_too_few_steps_are_refused():
    model, tokenizer = hf_quest.tiny.load()
    with pytest.raises(ValueError, match="64 steps fill the pool"):
        evaluate_hits(model, tokenizer, heldout_text()[:20_000], length=1024, budgets=(64,), num_steps=NUM_BEFORE)
