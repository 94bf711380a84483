"""Sequences of operations on caches against what the specification answers; fuzz.py goes on for as long as asked."""

import json

import fuzz
import pytest

pytestmark = pytest.mark.long

NUM_SEEDS = 20  # sequences in a test
KINDS = {*fuzz.KINDS, *fuzz.CONFIGS} - {"compile_prompts"}  # which takes seconds for every sequence


@pytest.mark.parametrize("first_seed", range(0, 25 * NUM_SEEDS, NUM_SEEDS))
def test_a_cache_answers_as_a_fresh_forward_and_as_each_row_alone(first_seed):
    for seed in range(first_seed, first_seed + NUM_SEEDS):
        program = fuzz.new_program(seed, KINDS)
        failure = fuzz.run(program)
        if failure is not None:
            index, error = failure
            line = f"python tests/fuzz.py --replay '{json.dumps(program)}'"
            raise AssertionError(f"seed {seed}, operation {index}: {error}\n{line}") from error


def test_a_sequence_that_fails_is_made_smaller(monkeypatch):
    """To the one operation that fails, with the plainest of models."""
    forget = fuzz.Operations.do_reset

    def spoil(run, rows):
        forget(run, rows)
        raise fuzz.Wrong("on purpose")

    monkeypatch.setattr(fuzz.Operations, "do_reset", spoil)
    seed = next(seed for seed in range(1000) if "reset" in kinds_of(seed))
    program = fuzz.new_program(seed, KINDS)
    failure = fuzz.run(program)
    smaller, failure = fuzz.shrink(program, failure)
    assert [operation["kind"] for operation in smaller["operations"]] == ["reset"]
    assert failure[0] == 0
    assert smaller["config"]["family"] == "llama"


def kinds_of(seed):
    return [operation["kind"] for operation in fuzz.new_program(seed, KINDS)["operations"]]
