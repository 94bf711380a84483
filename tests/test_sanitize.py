"""benchmarks/sanitize.py without a GPU: it leaves no test out, and reads what compute-sanitizer prints."""

import json
from itertools import chain

import pytest
import sanitize


@pytest.fixture(scope="module")
def tests():
    return sanitize.collect()


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_every_test_is_in_one_process(tests, tool):
    parts = sanitize.parts_of(tests, tool)
    left_out = set(tests) - set(chain(*parts))
    assert sorted([*chain(*parts), *left_out]) == sorted(tests)
    assert max(map(len, parts)) <= sanitize.MOST_TESTS[tool]
    assert all("published" in test for test in left_out)
    assert len(left_out) == (2 if tool == "racecheck" else 0)


def test_what_has_not_passed_is_left(tmp_path):
    results = [
        {"tool": "memcheck", "tests": ["first", "second"], "passed": 2},
        {"tool": "memcheck", "tests": ["third", "fourth"], "passed": 1},
        {"tool": "racecheck", "tests": ["fifth"], "passed": 1},
    ]
    path = tmp_path / "sanitizers.json"
    assert sanitize.kept_results(path, "abc") == []
    path.write_text(json.dumps({"environment": {"commit": "abc"}, "results": results}))
    assert sanitize.kept_results(path, "def") == []
    kept = sanitize.kept_results(path, "abc")
    assert kept == [results[0], results[2]]
    assert sanitize.left_of(["first", "third", "fifth"], kept, "memcheck") == ["third", "fifth"]


@pytest.mark.parametrize(
    ("printed", "passed", "reports", "lines_of_ours"),
    [
        ("390 passed in 60.85s (0:01:00)\n========= ERROR SUMMARY: 0 errors\n", 390, 0, 0),
        (
            "2 failed, 7 passed in 1s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            7,
            0,
            0,
        ),
        (
            "========= Invalid __global__ read of size 4 bytes\n=========     at void hf_quest::append_kernel()+0x10\n"
            "=========     at void at::native::elementwise_kernel()+0x20\n========= ERROR SUMMARY: 2 errors\n",
            0,
            2,
            1,
        ),
        ("8 passed in 3s\n", 8, None, 0),
    ],
    ids=["clean", "racecheck", "errors", "no summary"],
)
def test_findings(printed, passed, reports, lines_of_ours):
    expected = {"passed": passed, "reports": reports, "lines_of_ours": lines_of_ours}
    assert sanitize.findings(printed) == expected
