"""`hf-quest app` in a real browser: Debian's Chromium, headless, driven by Playwright."""

import json
import os
import re
import shutil
import threading
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='the app needs pip install "hf-quest[app]"')
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no browser here: apt-get install chromium", allow_module_level=True)

from transformers import AutoTokenizer  # noqa: E402
from written_files import pages_of, pdf  # noqa: E402

from hf_quest import demo, tiny  # noqa: E402
from hf_quest.app import documents, serve  # noqa: E402
from hf_quest.app.documents import Sample, library, write  # noqa: E402
from hf_quest.evaluation.documents import heldout_text  # noqa: E402

expect = playwright.expect
# `make pictures` sets it: then the pictures are of the documents that ship, which take longer.
PICTURES = os.environ.get("HF_QUEST_PICTURES")
expect.set_options(timeout=240_000 if PICTURES else 60_000)
SAMPLES = (
    documents.SAMPLES[::2]
    if PICTURES
    else (
        Sample("Key points, 3,000 tokens", "digest", 3_000),
        Sample("Secret codes, 2,000 tokens", "facts", 2_000, seed=1),
    )
)
# The colours of all passages, as one string.
HEAT = "[...document.querySelectorAll('.hq-strip i')].map(page => page.className.match(/h\\d+/)[0]).join()"
WIDE, NARROW = {"width": 1440, "height": 1000}, {"width": 390, "height": 844}
# Texts, with their contrast where it is below 4.5, by the formula of WCAG 2. What is disabled need not be read.
FAINT = """() => {
  const parse = (color) => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return color.startsWith('color(srgb') ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
  const light = (color) => {
    const [r, g, b] = color.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const below = element.parentElement ? behind(element.parentElement) : [255, 255, 255];
    return over(parse(getComputedStyle(element).backgroundColor), below);
  };
  const shown = [...document.body.querySelectorAll('*')].filter((element) =>
    (element.matches('input, textarea') ? element.value
      : [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
    && element.checkVisibility({ opacityProperty: true, visibilityProperty: true })
    && element.getBoundingClientRect().width > 1
    && !element.closest('script, style, :disabled, input[type=range], input[type=radio]'));
  return shown.map((element) => {
    const back = behind(element);
    const [a, b] = [light(over(parse(getComputedStyle(element).color), back)), light(back)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    return [element.value ?? element.textContent.trim().slice(0, 40), element.className, contrast.toFixed(2)];
  }).filter(([, , contrast]) => contrast < 4.5);
}"""
pytestmark = [pytest.mark.timeout(500 if PICTURES else 180), pytest.mark.any_transformers, pytest.mark.long]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """Where uploaded files are kept."""
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def app(uploads):
    page, url = serve(port=None, device="cpu", samples=SAMPLES)
    yield page, url
    page.close()
    assert not list(uploads.glob("tmp*"))  # runs leave nothing behind


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(app, browser):
    context = browser.new_context(viewport=WIDE)
    yield visit(context, app[1])
    context.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the pictures go."""
    folder = Path(PICTURES) if PICTURES else tmp_path_factory.mktemp("pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def visit(context, url):
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    tab.goto(url)
    expect(tab.locator("#run")).to_be_enabled()
    return tab


def run(tab):
    tab.locator("#run").click()


def shorten(tab, num_tokens):
    tab.locator("#longest input[type=number]").fill(str(num_tokens))
    tab.locator("#longest input[type=number]").press("Tab")
    expect(tab.locator("#longest input[type=range]")).to_have_value(str(num_tokens))  # the page has taken it


def choose_sample(tab, sample):
    tab.locator("#document input").click()
    tab.get_by_role("option", name=sample.title).click()


def choose_layer(tab, name):
    tab.locator("#layer input").click()
    tab.get_by_role("option", name=name).click()


def upload(tab, path):
    tab.get_by_label("Your own file").check()
    tab.locator("#upload input[type=file]").set_input_files(path)
    expect(tab.locator("#upload")).to_contain_text(path.stem)
    expect(tab.locator("#upload a[href*='/file=']")).to_be_visible()  # it has been sent


def status(tab):
    return tab.locator("#status")


def finished(tab):
    expect(status(tab)).to_contain_text("Finished", timeout=240_000)
    expect(tab.locator("#run")).to_be_enabled()


def refused(tab, message):
    expect(tab.get_by_role("alert")).to_contain_text(message)
    expect(tab.locator("#run")).to_be_enabled()


def points(sample):
    """The lines of a sample that mark a key point, in order."""
    return [line for line in write(sample)[0].text.splitlines() if line.startswith("Key point")]


def take_pictures(tab, folder, state, narrow_theme):
    """Three pictures of a state, in which every text can be read and nothing stands out sideways."""
    tab.mouse.move(0, 0)
    tab.add_style_tag(content="* { transition: none !important; }")
    views = (("wide", WIDE, "light"), ("wide", WIDE, "dark"), ("narrow", NARROW, narrow_theme))
    for width, size, theme in views:
        tab.set_viewport_size(size)
        tab.evaluate("theme => document.body.classList.toggle('dark', theme === 'dark')", theme)
        # On a telephone a run brings its status into sight.
        tab.evaluate(
            "top => top ? scrollTo(0, 0) : document.querySelector('#status').scrollIntoView()",
            size == WIDE or state == "empty",
        )
        full = state == "finished" and size == WIDE
        tab.screenshot(path=folder / f"{state}-{width}-{theme}.png", full_page=full)
        assert tab.evaluate(FAINT) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]
        expect(tab.locator("#run")).to_be_in_viewport(ratio=1)
    for each in ("#source", "#race", "#strip"):
        box = tab.locator(each).bounding_box()
        assert 10 <= box["x"] <= 20
        assert box["x"] == pytest.approx(NARROW["width"] - box["x"] - box["width"], abs=2)
    tab.evaluate("document.body.classList.remove('dark')")
    tab.set_viewport_size(WIDE)


def test_the_default_document_is_summarized_with_its_sources(tab, folder):
    take_pictures(tab, folder, "empty", "light")
    run(tab)
    expect(status(tab)).to_contain_text(re.compile(r"Reading the document: [\d,]+ of [\d,]+ tokens"))
    expect(tab.locator(".hq-quest .hq-text")).to_contain_text("Key point 1")
    take_pictures(tab, folder, "running", "light")
    finished(tab)
    expect(tab.locator("#subject")).to_contain_text(f"Document: {SAMPLES[0].title} (")
    assert tab.locator(".hq-quest .hq-text").inner_text().splitlines() == points(SAMPLES[0])
    assert tab.locator(".hq-dense .hq-text").inner_text().splitlines() == points(SAMPLES[0])
    expect(tab.locator(".hq-speedup b")).to_have_text(re.compile(r"\d\.\d×"))
    expect(tab.locator("#race .hq-explained")).to_contain_text("2 of the model’s 6 layers always read everything")
    # Where each sentence came from: its first source has words of the sentence.
    pages = demo.encode(library().tokenizer, write(SAMPLES[0])[0].text, "?")[0][0]
    rows = tab.locator(".hq-sources li")
    expect(rows).to_have_count(len(points(SAMPLES[0])))
    for row in rows.all():
        page = int(row.locator("button").first.inner_text().split()[-1]) - 1
        words = library().tokenizer.decode(pages[16 * page : 16 * page + 16]).split()[1:-1]
        assert len(set(words) & set(row.locator("span").inner_text().split())) >= 3
    # A click on a hot passage shows its text.
    row.locator("button").first.click()
    expect(tab.locator("#page h3")).to_contain_text(f"Passage {page + 1} of")
    expect(tab.locator("#page mark")).to_contain_text(words[0])
    tab.locator(".hq-strip i").nth(5).click()
    expect(tab.locator("#page h3")).to_contain_text("Passage 6 of")
    # A layer alone is another picture, with sources of its own.
    heat, sources = tab.evaluate(HEAT), tab.locator("#sources").inner_text()
    choose_layer(tab, "Layer 5")
    tab.wait_for_function(f"before => {HEAT} !== before", arg=heat)
    expect(tab.locator("#sources h3")).to_contain_text("in layer 5")
    assert tab.locator("#sources").inner_text() != sources
    choose_layer(tab, "All layers")
    tab.wait_for_function(f"before => {HEAT} === before", arg=heat)
    expect(tab.locator("#sources h3")).not_to_contain_text("layer")
    rows.nth(2).locator("button").first.click()
    expect(tab.locator("#page mark")).to_be_visible()
    take_pictures(tab, folder, "finished", "dark")
    the_strip_obeys_the_keyboard(tab, len(pages))


def the_strip_obeys_the_keyboard(tab, num_tokens):
    last = -(-num_tokens // 16)
    strip = tab.get_by_role("slider", name="Passages of the document")
    columns = tab.evaluate(
        "getComputedStyle(document.querySelector('.hq-strip')).gridTemplateColumns.split(' ').length"
    )
    strip.focus()
    moves = [
        ("Home", 1),
        ("ArrowLeft", 1),
        ("ArrowRight", 2),
        ("ArrowDown", 2 + columns),
        ("ArrowLeft", 1 + columns),
        ("ArrowUp", 1),
        ("End", last),
        ("ArrowRight", last),
    ]
    for key, passage in moves:
        strip.press(key)
        expect(strip).to_have_attribute("aria-valuenow", str(passage))
        expect(tab.locator(".hq-here")).to_have_text(f"Passage {passage}")
    strip.press("Enter")
    expect(tab.locator("#page h3")).to_contain_text(f"Passage {last} of")


def test_enter_asks_a_question(tab):
    choose_sample(tab, SAMPLES[1])
    expect(tab.locator("#question textarea, #question input")).to_have_value(write(SAMPLES[1])[1])
    tab.locator("#question textarea, #question input").press("Enter")
    finished(tab)
    name = write(SAMPLES[1])[1].split()[-1].rstrip("?")
    (code,) = re.findall(rf"The secret code of {name} is (\d+)\.", write(SAMPLES[1])[0].text)
    expect(tab.locator(".hq-quest .hq-text")).to_have_text(code)
    expect(tab.locator(".hq-dense .hq-text")).to_have_text(code)
    # An answer of one sentence has its source, too.
    tab.locator(".hq-sources button").first.click()
    expect(tab.locator("#page mark")).to_contain_text(f"The secret code of {name}")


# In which component the focus is, of what label, and whether that can be seen.
FOCUSED = """() => {
  const element = document.activeElement;
  const component = element.closest('#source, #document, #model, #task, #question, #budget, #longest, #run, #stop');
  const style = getComputedStyle(element);
  const name = (element.closest('label') ?? element).textContent.trim();
  return [component?.id, name, style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2];
}"""


def tab_to(tab, component, name=""):
    """Press the Tab key until the focus is there; returns the components on the way."""
    seen = {}
    for _ in range(30):
        tab.keyboard.press("Tab")
        place, label, is_shown = tab.evaluate(FOCUSED)
        assert is_shown, (place, label)
        seen[place] = True
        if place == component and name in label:
            return list(seen)
    raise AssertionError(f"no {component} {name} after {list(seen)}")


def test_the_keyboard_alone_chooses_runs_and_stops(tab):
    assert tab_to(tab, "run") == ["source", "document", "model", "task", "budget", "longest", "run"]
    tab.keyboard.press("Enter")
    expect(status(tab)).to_contain_text("Reading")
    tab_to(tab, "stop")
    tab.keyboard.press("Enter")
    expect(status(tab)).to_contain_text("Stopped", timeout=3_000)
    # Another task shows the question, in which Enter asks.
    tab.reload()
    expect(tab.locator("#run")).to_be_enabled()
    tab_to(tab, "task", "Question")
    tab.keyboard.press("Space")
    expect(tab.locator("#question")).to_be_visible()
    tab_to(tab, "question")
    tab.keyboard.type("what is this?")
    tab.keyboard.press("Enter")
    expect(status(tab)).to_contain_text("Reading")
    tab_to(tab, "stop")
    tab.keyboard.press("Space")
    expect(status(tab)).to_contain_text("Stopped", timeout=3_000)


def test_a_pdf_is_read_and_its_pages_are_named(tab, tmp_path):
    hostile = "<img src=x onerror=document.title='broken'><script>document.title='broken'</script>${1+1} {{value}}"
    pages = pages_of(write(SAMPLES[0])[0].text + "\n" + hostile)
    path = tmp_path / "manual <b>&.pdf"
    path.write_bytes(pdf([*pages, b"q Q"], bookmarks=[(1, "Start <i>"), (2, "Go on")]))
    upload(tab, path)
    expect(tab.locator("#model-note")).to_contain_text("The tiny model inside cannot summarize your file")
    shorten(tab, 32)
    run(tab)
    finished(tab)
    expect(tab.locator("#subject")).to_contain_text(f"Document: manual <b>&.pdf ({len(pages) + 1} PDF pages")
    expect(tab.locator("#subject li")).to_have_text(
        f"Left out: 1 page of {len(pages) + 1} without text (a picture, perhaps): {len(pages) + 1}."
    )
    expect(tab.locator(".hq-quest .hq-text")).to_contain_text("Key point 1 of 7")
    # What the document says is text: its last passages are shown as they were written, and nothing ran.
    tab.locator(".hq-strip i").last.click()
    expect(tab.locator("#page p")).to_contain_text("<img src=x onerror")
    expect(tab.locator("#page p")).to_contain_text("${1+1} {{value}}")
    expect(tab.locator("#page h3")).to_contain_text(f"· PDF page {len(pages)}")
    expect(tab.locator(".hq-here")).to_contain_text(f"· PDF page {len(pages)} · Go on")
    assert "broken" not in tab.title()
    expect(tab.locator(".hq-sources button").first).to_contain_text(re.compile(r"passage \d+ · PDF page \d"))
    tab.locator(".hq-contents button").nth(1).click()
    expect(tab.locator("#page h3")).to_contain_text("· PDF page 2")
    # Who then chooses a sample is not answered from the upload.
    tab.get_by_label("A sample").check()
    run(tab)
    expect(tab.locator("#subject")).to_contain_text(f"Document: {SAMPLES[0].title} (")
    tab.locator("#stop").click()


def test_an_upload_that_failed_or_is_gone_is_not_the_sample(tab, tmp_path, uploads):
    path = tmp_path / "report.txt"
    path.write_text(heldout_text()[:9000])
    tab.get_by_label("Your own file").check()
    run(tab)
    refused(tab, "There is no file yet: choose one, or take a sample.")
    tab.route("**/upload*", lambda route: route.abort())
    tab.locator("#upload input[type=file]").set_input_files(path)
    tab.wait_for_timeout(500)
    run(tab)
    refused(tab, "There is no file yet")
    tab.unroute("**/upload*")
    tab.reload()
    expect(tab.locator("#run")).to_be_enabled()
    upload(tab, path)
    (kept,) = uploads.rglob("report.txt")
    kept.unlink()
    run(tab)
    refused(tab, "report.txt is no longer here: files are kept for an hour. Upload it again.")


def test_a_document_beyond_the_context_is_refused(tab, tmp_path, folder):
    path = tmp_path / "long.txt"
    path.write_text(heldout_text()[:400_000])
    upload(tab, path)
    run(tab)
    refused(tab, re.compile(r"The document has about 1\d\d,\d{3} tokens, and the model's context ends at 40,960\."))
    tab.wait_for_timeout(1_500)
    take_pictures(tab, folder, "refused", "dark")
    expect(tab.get_by_role("alert")).to_be_visible()  # it stays


def assert_nobody_is_left(app):
    """Soon: a run leaves after its last word, which is on the page by then."""
    end = time.monotonic() + 3
    while app[0].visitors.entries:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_file_that_takes_long_is_stopped_at_once(tab, tmp_path, app):
    line = b"(%s) Tj T* " % (b"bridge " * 14)
    path = tmp_path / "slow.pdf"
    path.write_bytes(pdf([b"BT /F1 10 Tf 40 750 Td 12 TL " + line * 19_000 + b"ET"], times=1000))
    upload(tab, path)
    run(tab)
    expect(status(tab)).to_contain_text(re.compile(r"Opening slow\.pdf"))
    tab.locator("#stop").click()
    expect(status(tab)).to_contain_text("Stopped, before the model read anything", timeout=3_000)
    assert_nobody_is_left(app)


def test_stop_stops_at_once_and_frees(tab, app):
    run(tab)
    expect(tab.locator(".hq-quest .hq-text")).to_contain_text("Key point 1")
    tab.locator("#stop").click()
    expect(status(tab)).to_contain_text("Stopped", timeout=3_000)
    expect(tab.locator("#run")).to_be_enabled()
    assert len(tab.locator(".hq-quest .hq-text").inner_text().splitlines()) < len(points(SAMPLES[0]))
    assert_nobody_is_left(app)


def test_who_waits_may_stop_or_leave_and_keeps_the_page(app, browser):
    context = browser.new_context()
    first, second, third = tabs = [visit(context, app[1]) for _ in range(3)]
    shorten(second, 16)
    run(second)
    finished(second)
    before = [second.locator(each).inner_html() for each in ("#race", "#strip", "#sources", "#page", "#run", "#stop")]
    for tab in tabs:
        run(tab)
        message = "Reading" if tab is first else f"{1 if tab is second else 2} ahead of you"
        expect(status(tab)).to_contain_text(message)
    third.close()
    second.locator("#stop").click()
    expect(status(second)).to_contain_text("Stopped, before the model was free", timeout=3_000)
    expect(second.locator("#run")).to_be_enabled()
    wait_for_runs(app, 1)
    first.locator("#stop").click()
    wait_for_runs(app, 0)
    second.wait_for_timeout(1_000)
    after = [second.locator(each).inner_html() for each in ("#race", "#strip", "#sources", "#page", "#run", "#stop")]
    assert after == before
    expect(status(second)).to_contain_text("Stopped, before the model was free")
    # Who comes back is served.
    run(first)
    expect(status(first)).to_contain_text("Reading")
    run(second)
    expect(status(second)).to_contain_text("1 ahead of you")
    first.locator("#stop").click()
    finished(second)
    text, _, end = second.locator(".hq-quest .hq-text").inner_text().partition(" … ")
    assert points(SAMPLES[0])[0].startswith(text)
    assert end == "(cut off: this is the longest answer)"
    wait_for_runs(app, 0)
    context.close()


def test_no_more_wait_than_may(app, browser, monkeypatch):
    monkeypatch.setattr("hf_quest.app.visitors.MAX_WAITING", 0)
    context = browser.new_context()
    tabs = [visit(context, app[1]) for _ in range(2)]
    run(tabs[0])
    expect(status(tabs[0])).to_contain_text("Reading")
    run(tabs[1])
    refused(tabs[1], "0 runs wait for the model already")
    expect(tabs[1].locator(".hq-race")).to_have_count(1)
    context.close()
    wait_for_runs(app, 0)


def test_requests_that_nobody_listens_to_lock_nobody_out(tab, app, monkeypatch):
    """21 new sessions join the queue by the API and never fetch what is sent to them."""
    monkeypatch.setattr("hf_quest.app.page.UNHEARD", 2)
    monkeypatch.setattr("hf_quest.app.page.WAIT_SECONDS", 0.2)
    config = json.load(urllib.request.urlopen(f"{app[1]}config"))
    (answer,) = [each["id"] for each in config["dependencies"] if each["targets"][0][1] == "click" and each["queue"]]
    inputs = ["A sample", SAMPLES[0].title, None, "Summarize", "", 1024, "Tiny model inside", "", 512]
    for number in range(21):
        body = {"data": inputs, "fn_index": answer, "session_hash": f"nobody{number}"}
        request = urllib.request.Request(
            f"{app[1]}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).read()
    wait_for_runs(app, 0, seconds=20)
    shorten(tab, 16)
    monkeypatch.undo()
    run(tab)
    finished(tab)


def test_a_closed_tab_ends_its_run(tab, app):
    run(tab)
    expect(status(tab)).to_contain_text("Reading")
    wait_for_runs(app, 1)
    tab.close()
    wait_for_runs(app, 0)


def wait_for_runs(app, num_runs, seconds=10):
    """Until so many have the model or wait for it."""
    deadline = time.monotonic() + seconds
    while len(app[0].visitors.entries) != num_runs and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(app[0].visitors.entries) == num_runs


def test_a_bad_model_name_says_so_and_the_model_stays(tab):
    tab.get_by_label("Another model").check()
    tab.locator("#model-name input, #model-name textarea").fill("no/such-model")
    run(tab)
    refused(tab, "no/such-model cannot be loaded")


def test_a_stop_while_a_model_loads_is_obeyed_at_once(tab, tmp_path, monkeypatch):
    shutil.copytree(tiny.PATH, tmp_path / "large")
    go, load = threading.Event(), demo.load
    monkeypatch.setattr(demo, "load", lambda *arguments: go.wait(60) and load(*arguments))
    tab.get_by_label("Another model").check()
    tab.locator("#model-name input, #model-name textarea").fill(str(tmp_path / "large"))
    run(tab)
    expect(status(tab)).to_contain_text(re.compile(r"Loading .*large: \d+ s"))
    tab.locator("#stop").click()
    expect(status(tab)).to_contain_text("Stopped, before the model read anything", timeout=3_000)
    # The model before is there, and does not wait.
    tab.get_by_label("Tiny model inside").check()
    shorten(tab, 16)
    run(tab)
    finished(tab)
    go.set()


def test_another_model_is_one_choice_away(tab, tmp_path):
    """A folder with a model that has a chat template: that of the tiny one, as there is no other without a network."""
    shutil.copytree(tiny.PATH, tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %} Answer:"
    tokenizer.save_pretrained(tmp_path / "chatty")
    tab.get_by_label("Another model").check()
    tab.locator("#model-name input, #model-name textarea").fill(str(tmp_path / "chatty"))
    shorten(tab, 16)
    run(tab)
    finished(tab)
    tab.get_by_label("Tiny model inside").check()
    run(tab)
    expect(status(tab)).to_contain_text("Reading")
    tab.locator("#stop").click()
    expect(tab.locator("#run")).to_be_enabled()


def test_behind_a_proxy_the_page_is_below_its_path(browser):
    """The browser's requests to a host and path of their own are passed on, as a proxy does."""
    page, url = serve(port=None, device="cpu", samples=SAMPLES, root_path="/quest")
    context = browser.new_context()

    def pass_on(route):
        if "heartbeat" in route.request.url:  # it never ends
            route.abort()
            return
        there = route.request.url.replace("http://proxy.test/quest/", url)
        headers = {**route.request.headers, "x-forwarded-host": "proxy.test", "x-forwarded-proto": "http"}
        route.fulfill(response=route.fetch(url=there, headers=headers))

    missed = []
    context.route("http://proxy.test/**", lambda route: missed.append(route.request.url) or route.abort())
    context.route("http://proxy.test/quest/**", pass_on)
    tab = visit(context, "http://proxy.test/quest/")
    shorten(tab, 16)
    run(tab)
    finished(tab)
    assert missed == []
    context.close()
    page.close()
