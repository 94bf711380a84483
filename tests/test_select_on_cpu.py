"""csrc/select.cuh against hf_quest/reference.py without a GPU: by threads of the CPU, watched for races and bounds."""

import subprocess

import numpy as np
import pytest
import torch
from on_cpu import build_program, needs_nvcc

from hf_quest import reference

pytestmark = [needs_nvcc, pytest.mark.csrc]

CASES = [  # threads, pages, and how many are wanted
    *((256, *case) for case in [(5, 3), (2047, 1), (2047, 40), (2047, 127), (3000, 2999), (8192, 249)]),
    *((512, *case) for case in [(2047, 40), (8192, 249)]),
]


LOWEST = torch.finfo(torch.float32).min


def scores_of_every_size(num_pages, lowest=LOWEST, highest=torch.inf):
    """More than a list holds may be taken, and the digits of what is taken go up to the last."""
    scores = torch.full((num_pages,), -torch.inf)
    scores[torch.arange(num_pages) // 4 % 5 == 0] = lowest
    scores[:250] = highest
    return scores


SCORES = {
    "normal": lambda num_pages: torch.randn(num_pages),
    "equal": lambda num_pages: torch.full((num_pages,), -7.5),
    "two values": lambda num_pages: torch.randint(2, (num_pages,)).float(),
    "ascending": lambda num_pages: torch.arange(num_pages).float(),
    "close together": lambda num_pages: torch.where(
        torch.rand(num_pages) < 0.01, torch.randn(num_pages), 3 + 1e-5 * torch.rand(num_pages)
    ),
    "every size": scores_of_every_size,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_program("select_on_cpu", tmp_path_factory)


@pytest.mark.parametrize(("num_threads", "num_pages", "num_wanted"), CASES)
@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("keeps_first", [False, True], ids=["published", "first page kept"])
def test_pages_are_those_of_the_reference(program, make, num_threads, num_pages, num_wanted, keeps_first):
    torch.manual_seed(0)
    scores = make(num_pages)
    num_wanted -= keeps_first
    command = [program, str(num_threads), str(num_wanted), str(int(keeps_first))]
    result = subprocess.run(command, input=scores.numpy().tobytes(), capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    page_size = 16
    with_newest = torch.cat([scores, torch.zeros(1)]).view(1, 1, 1, -1)
    num_tokens = (num_pages + 1) * page_size
    where = (num_tokens, torch.zeros(1, dtype=torch.int64), num_wanted + 1 + keeps_first, page_size)
    expected = reference.select(with_newest, *where, keeps_first)[0, 0, 0, int(keeps_first) : -1]
    assert np.frombuffer(result.stdout, dtype=np.int32).tolist() == expected.tolist()
