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


RESULTS = [
    {"tool": "memcheck", "tests": ["first", "second"], "passed": 2, "reports": 0},
    {"tool": "memcheck", "tests": ["third", "fourth"], "passed": 1, "reports": 3},
    {"tool": "racecheck", "tests": ["fifth"], "passed": 1, "reports": 0},
]


def test_what_has_not_passed_whole_is_run_again():
    assert sanitize.passed_tests(RESULTS, "memcheck") == {"first", "second"}


@pytest.mark.parametrize(("commit", "goes_on"), [("abc", True), ("def", False), ("abc-dirty", False), (None, False)])
def test_a_call_goes_on_from_the_results_of_its_commit(tmp_path, commit, goes_on):
    path = tmp_path / "sanitizers.json"
    assert sanitize.earlier_results(path, commit) == []
    written = commit if commit in (None, "abc-dirty") else "abc"
    path.write_text(json.dumps({"environment": {"commit": written}, "results": RESULTS}))
    assert sanitize.earlier_results(path, commit) == (RESULTS if goes_on else [])


def test_reports_of_a_process_that_failed_are_not_lost(tmp_path):
    of_call = {"processor": "a GPU", "lines_of_ours": 0}
    calls = [
        {**RESULTS[1], **of_call, "command": "first call"},
        {**RESULTS[1], **of_call, "passed": 2, "reports": 0, "command": "second call"},
    ]
    report = {"environment": {"command": "second call"}, "num_tests": {"memcheck": 4}, "results": calls}
    sanitize.write(report, tmp_path / "sanitizers.json")
    page = (tmp_path / "sanitizers.md").read_text()
    assert "| memcheck | 4 | 2 | 3 | 0 |" in page
    assert "- command: first call; second call\n" in page
    assert json.loads((tmp_path / "sanitizers.json").read_text()) == report


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
