"""`hf-quest app` in a real browser: Debian's Chromium, headless, driven by Playwright."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='the app needs pip install "hf-quest[app]"')
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no browser here: apt-get install chromium", allow_module_level=True)

from hf_quest import demo  # noqa: E402
from hf_quest.app import documents, serve  # noqa: E402
from hf_quest.app.documents import Sample, library, write  # noqa: E402
from hf_quest.evaluation.documents import heldout_text  # noqa: E402

expect = playwright.expect
expect.set_options(timeout=60_000)
# `make pictures` sets it: then the pictures are of the documents that ship, which take longer.
PICTURES = os.environ.get("HF_QUEST_PICTURES")
SAMPLES = (
    documents.SAMPLES[::2]
    if PICTURES
    else (
        Sample("Manual, 3,000 tokens, key points", "digest", 3_000),
        Sample("Manual, 2,000 tokens, secret codes", "facts", 2_000, seed=1),
    )
)
# The colours of all pages, as one string.
HEAT = "[...document.querySelectorAll('.hq-strip i')].map(page => page.className.match(/h\\d+/)[0]).join()"
WIDE, NARROW = {"width": 1440, "height": 1440}, {"width": 420, "height": 900}
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def app():
    page, url = serve(port=None, device="cpu", samples=SAMPLES)
    yield page, url
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(app, browser):
    context = browser.new_context(viewport=WIDE)
    yield visit(context, app)
    context.close()


def visit(context, app):
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    tab.goto(app[1])
    expect(tab.locator("#run")).to_be_enabled()
    return tab


def run(tab):
    tab.locator("#run").click()


def open_settings(tab):
    tab.get_by_text("Model and length", exact=True).click()
    tab.wait_for_timeout(1_000)  # Gradio draws the settings now, and sets their first values again some 100 ms later


def shorten(tab, num_tokens):
    open_settings(tab)
    tab.locator("#longest input[type=number]").fill(str(num_tokens))
    tab.locator("#longest input[type=number]").press("Tab")
    expect(tab.locator("#longest input[type=range]")).to_have_value(str(num_tokens))  # the page has taken it


def status(tab):
    return tab.locator("#status")


def finished(tab):
    expect(status(tab)).to_contain_text("Finished", timeout=120_000)


def points(sample):
    """The lines of a sample that mark a key point, in order."""
    return [line for line in write(sample)[0].splitlines() if line.startswith("Key point")]


def test_the_default_document_is_summarized_with_its_sources(tab, tmp_path):
    run(tab)
    expect(status(tab)).to_contain_text(re.compile(r"Reading the document: [\d,]+ of [\d,]+ tokens"))
    finished(tab)
    assert tab.locator(".hq-quest .hq-text").inner_text().splitlines() == points(SAMPLES[0])
    assert tab.locator(".hq-dense .hq-text").inner_text().splitlines() == points(SAMPLES[0])
    expect(tab.locator(".hq-speedup b")).to_have_text(re.compile(r"\d\.\d×"))
    # Where each sentence came from: its first source has words of the sentence.
    pages = demo.encode(library().tokenizer, write(SAMPLES[0])[0], "")[0][0]
    rows = tab.locator(".hq-sources li")
    expect(rows).to_have_count(len(points(SAMPLES[0])))
    for row in rows.all():
        page = int(row.locator("button").first.inner_text().split()[-1]) - 1
        words = library().tokenizer.decode(pages[16 * page : 16 * page + 16]).split()[1:-1]
        assert len(set(words) & set(row.locator("span").inner_text().split())) >= 3
    # A click on a hot page shows its text.
    row.locator("button").first.click()
    expect(tab.locator("#page h3")).to_contain_text(f"Page {page + 1} of")
    expect(tab.locator("#page mark")).to_contain_text(words[0])
    tab.locator(".hq-strip i").nth(5).click()
    expect(tab.locator("#page h3")).to_contain_text("Page 6 of")
    # A layer alone is another picture.
    before = tab.evaluate(HEAT)
    tab.get_by_label("Layer 5").check()
    tab.wait_for_function(f"before => {HEAT} !== before", arg=before)
    tab.get_by_label("All sparse layers").check()
    tab.wait_for_function(f"before => {HEAT} === before", arg=before)
    rows.nth(2).locator("button").first.click()
    expect(tab.locator("#page mark")).to_be_visible()
    take_pictures(tab, Path(PICTURES or tmp_path))


def take_pictures(tab, folder):
    """The README's pictures, and the same page on a telephone, where nothing may stand out sideways."""
    tab.mouse.move(0, 0)
    tab.evaluate("scrollTo(0, 0)")
    tab.add_style_tag(content="* { transition: none !important; }")
    tab.screenshot(path=folder / "app.png")
    tab.evaluate("document.body.classList.add('dark')")
    tab.screenshot(path=folder / "app-dark.png")
    tab.set_viewport_size(NARROW)
    tab.screenshot(path=folder / "app-narrow-dark.png", full_page=True)
    tab.evaluate("document.body.classList.remove('dark')")
    tab.screenshot(path=folder / "app-narrow.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]


def test_a_question_is_answered(tab):
    tab.locator("#document input").click()
    tab.get_by_role("option", name=SAMPLES[1].title).click()
    expect(tab.locator("#question textarea")).to_have_value(write(SAMPLES[1])[1])
    run(tab)
    finished(tab)
    name = write(SAMPLES[1])[1].split()[-1].rstrip("?")
    (code,) = re.findall(rf"The secret code of {name} is (\d+)\.", write(SAMPLES[1])[0])
    expect(tab.locator(".hq-quest .hq-text")).to_have_text(code)
    expect(tab.locator(".hq-dense .hq-text")).to_have_text(code)
    # An answer of one sentence has its source, too.
    tab.locator(".hq-sources button").first.click()
    expect(tab.locator("#page mark")).to_contain_text(f"The secret code of {name}")


def test_a_pdf_is_read(tab, browser, tmp_path):
    hostile = "<img src=x onerror=document.title='broken'><script>document.title='broken'</script>${1+1} {{value}}"
    text = write(SAMPLES[0])[0] + hostile
    printer = browser.new_page()
    printer.set_content("<pre style='white-space:pre-wrap'></pre>")
    printer.evaluate("text => document.querySelector('pre').textContent = text", text)
    pdf = tmp_path / "manual.pdf"
    printer.pdf(path=pdf)
    printer.close()
    tab.locator("#upload input[type=file]").set_input_files(pdf)
    expect(tab.locator("#upload")).to_contain_text("manual")
    shorten(tab, 32)
    run(tab)
    finished(tab)
    expect(tab.locator(".hq-quest .hq-text")).to_contain_text("Key point 1 of 7")
    # What the document says is text: its last pages are shown as they were written, and nothing ran.
    tab.locator(".hq-strip i").last.click()
    expect(tab.locator("#page p")).to_contain_text("<img src=x onerror")
    expect(tab.locator("#page p")).to_contain_text("${1+1} {{value}}")
    assert "broken" not in tab.title()
    # Who then chooses one of the documents that ship is not answered from the upload.
    tab.locator("#document input").click()
    tab.get_by_role("option", name=SAMPLES[1].title).click()
    expect(tab.locator("#upload")).not_to_contain_text("manual")


def test_a_document_beyond_the_context_is_refused(tab, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(heldout_text()[:400_000])
    tab.locator("#upload input[type=file]").set_input_files(path)
    expect(tab.locator("#upload")).to_contain_text("long")
    run(tab)
    expect(tab.get_by_role("alert")).to_contain_text(
        re.compile(r"The document has 1\d\d,\d{3} tokens, .* the model's context ends at 40,960\.")
    )
    expect(tab.locator("#run")).to_be_enabled()


def test_stop_stops_at_once_and_frees(tab, app):
    run(tab)
    expect(tab.locator(".hq-quest .hq-text")).to_contain_text("Key point 1")
    tab.locator("#stop").click()
    expect(status(tab)).to_contain_text("Stopped", timeout=3_000)
    expect(tab.locator("#run")).to_be_enabled()
    assert len(tab.locator(".hq-quest .hq-text").inner_text().splitlines()) < len(points(SAMPLES[0]))
    assert not app[0].visitors.events


def test_two_tabs_at_once(app, browser):
    context = browser.new_context()
    tabs = [visit(context, app) for _ in range(2)]
    for tab in tabs:
        shorten(tab, 16)
    run(tabs[0])
    expect(status(tabs[0])).to_contain_text("Reading")
    run(tabs[1])
    expect(status(tabs[1])).to_contain_text("1 ahead of you")
    for tab in tabs:
        finished(tab)
    assert (
        tabs[0].locator(".hq-quest .hq-text").inner_text() == tabs[1].locator(".hq-quest .hq-text").inner_text() != ""
    )
    context.close()


def test_who_waits_may_stop_or_leave(app, browser):
    context = browser.new_context()
    first, second, third = tabs = [visit(context, app) for _ in range(3)]
    for tab in tabs:
        run(tab)
        expect(status(tab)).to_contain_text("Reading" if tab is first else f"{tabs.index(tab)} ahead of you")
    third.close()
    second.locator("#stop").click()
    expect(status(second)).to_contain_text("Stopped, before the model was free", timeout=3_000)
    wait_for_runs(app, 1)
    # Who comes back has one run, not also the one that was given up.
    shorten(second, 16)
    run(second)
    expect(status(second)).to_contain_text("1 ahead of you")
    first.locator("#stop").click()
    finished(second)
    wait_for_runs(app, 0)
    expect(status(second)).to_contain_text("Finished")
    assert points(SAMPLES[0])[0].startswith(second.locator(".hq-quest .hq-text").inner_text())
    context.close()


def test_no_more_wait_than_may(app, browser, monkeypatch):
    monkeypatch.setattr("hf_quest.app.MAX_WAITING", 0)
    context = browser.new_context()
    tabs = [visit(context, app) for _ in range(2)]
    run(tabs[0])
    expect(status(tabs[0])).to_contain_text("Reading")
    run(tabs[1])
    expect(tabs[1].get_by_role("alert")).to_contain_text("0 runs wait for the model already")
    expect(tabs[1].locator("#run")).to_be_enabled()
    context.close()
    wait_for_runs(app, 0)


def test_a_closed_tab_ends_its_run(tab, app):
    run(tab)
    expect(status(tab)).to_contain_text("Reading")
    wait_for_runs(app, 1)
    tab.close()
    wait_for_runs(app, 0)


def wait_for_runs(app, num_runs):
    """Until so many have the model or wait for it."""
    deadline = time.monotonic() + 10
    while len(app[0].visitors.events) != num_runs and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(app[0].visitors.events) == num_runs


def test_a_bad_model_name_says_so_and_the_model_stays(tab):
    open_settings(tab)
    tab.locator("#model textarea, #model input").fill("no/such-model")
    run(tab)
    expect(tab.get_by_role("alert")).to_contain_text("no/such-model cannot be loaded")
    expect(tab.locator("#run")).to_be_enabled()
