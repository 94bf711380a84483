"""What is behind `hf-quest app`: runs that free what they take, uploads that are read with suspicion, safe HTML."""

import gc
import sys
import threading
import weakref
from itertools import pairwise

import pytest
import torch
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from typer.testing import CliRunner

pytest.importorskip("gradio", reason='the app needs pip install "hf-quest[app]"')

from hf_quest import QuestCache, app, demo, tiny
from hf_quest.app import documents, view
from hf_quest.app.documents import Sample, prompt, read_upload, write
from hf_quest.app.engine import Engine, look, sentence_spans
from hf_quest.cli import app as cli

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
    text, question = write(SHORT)
    run = run_to_end(engine, text, question)
    ids = torch.cat(demo.encode(engine.tokenizer, text, question), dim=1)
    stock = engine.dense_model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert run.dense.token_ids == [token for token in stock if token not in run.dense.stop_ids]


def test_quest_answers_as_the_demo_does(engine):
    text, question = write(SHORT)
    run = run_to_end(engine, text, question)
    cache, answer = QuestCache(BUDGET), demo.Answer(engine.tokenizer)
    ids = demo.encode(engine.tokenizer, text, question)
    demo.prefill(engine.model, cache, ids[0])
    demo.answer_quest(engine.model, cache, *ids, answer, 8)
    assert run.quest.token_ids == [token for token in answer.token_ids if token not in run.quest.stop_ids]


def test_a_run_goes_through_its_phases(engine):
    phases, read = [], []
    for run in engine.run(write(SHORT)[0], "what?", BUDGET, 4):
        phases.append(run.phase)
        read.append(run.num_read)
    assert list(dict.fromkeys(phases)) == ["reading", "answering", "weighing", "finished"]
    assert read[0] == 0
    assert read[-1] == len(run.document_ids)


@pytest.mark.parametrize("phase", ["reading", "answering"])
def test_a_stop_needs_one_more_forward_at_most(engine, phase):
    stopped = threading.Event()
    seen = []
    for run in engine.run(write(Sample("", "facts", 1500))[0], "what?", BUDGET, 64, stopped):
        if stopped.is_set():
            seen.append(run.phase)
        elif run.phase == phase and run.num_read:
            stopped.set()
    assert set(seen) == {"stopped"}
    assert run.quest is None or run.quest.cache is None
    # Nor is what was read weighed, which takes time.
    assert all(each.weights is None for layer in run.reads.selections.values() for each in layer)
    if run.quest is not None:
        assert look(run, engine.tokenizer).sentences == ()


def test_fifty_runs_leave_nothing_behind(engine):
    """Runs that end, that are stopped, and that are dropped in the middle, as when a browser goes away."""

    def live():
        gc.collect()
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        return len(tensors), sum(each.numel() * each.element_size() for each in tensors)

    text, question = write(SHORT)
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
    run = run_to_end(engine, *write(SHORT))
    assert run.quest.cache is run.dense.cache is run.quest.model is None
    seen = look(run, engine.tokenizer)
    assert "".join(seen.page_texts) == engine.tokenizer.decode(run.document_ids)
    assert set(seen.shares) == {None, 2, 3, 4, 5}
    assert all(0 <= share <= 1 for shares in seen.shares.values() for share in shares)


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
    assert engine.name == str(tiny.PATH)


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
        run = run_to_end(engine, write(SHORT)[0], "Why?")
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
        run_to_end(engine, write(SHORT)[0], **options)


def pdf(path, text=None, password=None):
    """A PDF of one page, with a line of text or without."""
    writer = PdfWriter()
    page = writer.add_blank_page(200, 200)
    if text:
        font = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(content)
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    writer.write(path)
    return path


def test_uploads_are_read(tmp_path):
    assert read_upload(pdf(tmp_path / "a.PDF", "Read me")).strip() == "Read me"
    (tmp_path / "b.md").write_text("# Größe")
    assert read_upload(tmp_path / "b.md") == "# Größe"


def test_uploads_are_refused(tmp_path, monkeypatch):
    broken, picture, text = tmp_path / "broken.pdf", tmp_path / "page.exe", tmp_path / "binary.txt"
    broken.write_bytes(b"not a PDF")
    picture.write_bytes(b"MZ")
    text.write_bytes(b"a\0b")
    cases = [
        (broken, r"^broken\.pdf cannot be read as PDF"),
        (picture, r"^page\.exe is not one of \.txt, \.md, \.pdf"),
        (text, r"^binary\.txt is a binary file"),
        (pdf(tmp_path / "scan.pdf"), r"^scan\.pdf holds no text"),
        (pdf(tmp_path / "locked.pdf", "x", "secret"), r"^locked\.pdf is encrypted"),
    ]
    for path, message in cases:
        with pytest.raises(demo.DemoError, match=message):
            read_upload(path)
    monkeypatch.setattr(documents, "MAX_BYTES", 2)
    with pytest.raises(demo.DemoError, match=r"binary\.txt has 0\.0 MiB, and the limit is"):
        read_upload(text)


def test_tasks_ask_what_the_model_knows():
    assert prompt("Summarize", "", is_tiny=True) == prompt("Key points", "", is_tiny=True) == demo.QUESTION
    assert prompt("Key points", "", is_tiny=False).startswith("List the key points")
    assert prompt("Question", " What? ", is_tiny=True) == "what?"
    with pytest.raises(demo.DemoError, match="no question"):
        prompt("Question", "  ", is_tiny=False)


def test_nothing_from_outside_is_html(engine):
    hostile = "<script>alert(1)</script>"
    run = run_to_end(engine, hostile * 60)
    run.quest.token_ids = engine.tokenizer(hostile).input_ids
    seen = look(run, engine.tokenizer)
    shown = [
        view.race(run),
        view.sources(seen.sentences),
        view.page(seen, 1, None),
        view.error(hostile),
        view.status(message=hostile),
    ]
    assert all("<script" not in html for html in shown)
    assert all("&lt;script" in html for html in (shown[0], shown[1], shown[3], shown[4]))


def test_the_command_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_quest.app", None)
    result = CliRunner().invoke(cli, ["app"])
    assert result.exit_code == 1
    assert 'pip install "hf-quest[app]"' in result.stderr


def test_the_command_says_why_a_model_is_not_served(tmp_path):
    result = CliRunner().invoke(cli, ["app", "--model", str(tmp_path)])
    assert result.exit_code == 1
    assert f"{tmp_path} cannot be loaded" in result.stderr
