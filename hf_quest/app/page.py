"""The page and what its buttons do."""

import logging
import time
from pathlib import Path

import gradio as gr

from .. import QuestError, demo
from ..reading import DocumentError, Stopped, reading
from . import view
from .documents import SAMPLES, prompt, write
from .engine import MAX_NEW_TOKENS, TINY
from .form import OTHER, SAMPLE, Form, check_choice
from .look import look
from .visitors import Full, Visitors

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
FRAME_SECONDS = 0.1  # between two pictures of a run
STRIP_SECONDS = 1.0  # between two pictures of the strip, which is large
WAIT_SECONDS = 0.5  # between two looks at whether it is one's turn
UNHEARD = 100  # messages that nobody fetched, after which nobody is there
UPLOAD_SECONDS = 3600  # that an uploaded file is kept
ALL_LAYERS = "All layers"
EMPTY_PAGE = '<div class="hq-page"><p>Click a passage or a source to read its text.</p></div>'
# On a telephone the results are below the settings.
SHOW_STATUS = "() => { if (innerWidth < 900) document.querySelector('#status').scrollIntoView({block: 'start'}); }"


class Page:
    """The components by name, and what happens to them."""

    def __init__(self, engine, samples):
        self.engine = engine
        self.visitors = Visitors()
        self.blocks = gr.Blocks(
            title="Quest: read what matters",
            analytics_enabled=False,
            delete_cache=(UPLOAD_SECONDS // 6, UPLOAD_SECONDS),
        )
        with self.blocks:
            gr.HTML(view.HEADER, js_on_load=None)
            self.seen = gr.State(None, time_to_live=UPLOAD_SECONDS)
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    self.form = Form(engine, samples)
                with gr.Column(scale=3, min_width=300):
                    self.draw_results()
            self.connect()
        self.blocks.visitors = self.visitors
        self.blocks.queue(max_size=None, api_open=False)  # Visitors counts

    def draw_results(self):
        self.status = gr.HTML(view.status(), js_on_load=None, elem_id="status")
        self.subject = gr.HTML(view.subject(), js_on_load=None, elem_id="subject")
        self.race = gr.HTML(view.race(), js_on_load=None, elem_id="race")
        gr.HTML(view.LOOKED, js_on_load=None)
        self.layer = gr.Dropdown(
            [ALL_LAYERS], value=ALL_LAYERS, label="Layer of the model", visible=False, elem_id="layer"
        )
        looks = {"js_on_load": (HERE / "look.js").read_text(), "elem_classes": "hq-look"}
        self.strip = gr.HTML(view.strip([]), elem_id="strip", **looks)
        self.page_text = gr.HTML(EMPTY_PAGE, js_on_load=None, elem_id="page")
        self.sources = gr.HTML(view.sources(), elem_id="sources", **looks)

    def connect(self):
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.form.connect(quick)
        gr.on(
            [self.form.run.click, self.form.question.submit],
            self.answer,
            self.form.wishes,
            [
                self.status,
                self.subject,
                self.race,
                self.strip,
                self.page_text,
                self.sources,
                self.layer,
                self.seen,
                self.form.run,
                self.form.stop,
            ],
            preprocess=False,  # a File's leaves an empty temporary file behind each run
            concurrency_limit=None,  # who waits does so in `answer`, where the order is kept
            trigger_mode="once",
            show_progress="hidden",
            api_visibility="private",
        )
        self.form.run.click(None, None, None, js=SHOW_STATUS, queue=False, api_visibility="private")
        self.form.stop.click(self.leave, None, None, **quick)
        self.layer.change(self.show_layer, [self.seen, self.layer], [self.strip, self.sources], **quick)
        gr.on(
            [self.strip.select, self.sources.select],
            self.show_page,
            [self.seen, self.layer],
            self.page_text,
            **quick,
        )
        self.blocks.unload(self.leave)

    def show_layer(self, seen, layer):
        if seen is None:
            return gr.skip(), gr.skip()
        layer_idx = layer_of(layer)
        return view.strip(seen.shares[layer_idx], look=seen), view.sources(seen, layer_idx)

    def show_page(self, seen, layer, event: gr.EventData):
        if seen is None or not isinstance(event.page, int) or not 0 <= event.page < len(seen.texts):
            return gr.skip()
        return view.page(seen, event.page, layer_of(layer))

    # A run.

    def leave(self, request: gr.Request):
        self.visitors.stop(request.session_hash)

    def answer(self, source, title, upload, task, question, budget, model, model_name, longest, request: gr.Request):
        """What a run changes on the page, step by step."""
        try:
            entry = self.visitors.enter(request.session_hash)
        except Full as error:
            yield {self.status: view.error(str(error))}
            return
        name = model_name.strip() if model == OTHER else model
        name = name if self.engine.may_change else self.form.fixed_model
        file = upload and (upload["path"], upload.get("orig_name") or Path(upload["path"]).name)
        wishes = (task, question, int(budget), name, min(int(longest), MAX_NEW_TOKENS))
        steps = self.steps(entry, (source, title, file), *wishes)
        yield from self.visitors.steps(entry, steps, lambda: self.is_heard(request.session_hash))

    def is_heard(self, session):
        """Whether somebody fetches what is sent to a session. Gradio goes on with runs that nobody ever listens to."""
        messages = self.blocks._queue.pending_messages_per_session.get(session)
        return messages is None or messages.qsize() < UNHEARD

    def steps(self, entry, chosen, *wishes):
        idle = {self.form.run: gr.update(interactive=True), self.form.stop: gr.update(interactive=False)}
        yield {self.form.run: gr.update(interactive=False), self.form.stop: gr.update(interactive=True)}
        try:
            while (ahead := self.visitors.ahead(entry)) and not entry.stopped.is_set():
                yield {self.status: view.status(message=f"Waiting for the model: {ahead} ahead of you.")}
                entry.stopped.wait(WAIT_SECONDS)
            if entry.stopped.is_set():
                yield {self.status: view.status(message="Stopped, before the model was free."), **idle}
                return
            yield from self.compared(entry.stopped, chosen, *wishes)
            yield idle
        except Stopped:
            yield {self.status: view.status(message="Stopped, before the model read anything."), **idle}
        except (demo.DemoError, DocumentError, QuestError) as error:
            yield {self.status: view.error(str(error)), **idle}
        except Exception as error:
            logger.exception("A run failed")
            yield {self.status: view.error(f"The run failed: {demo.first_line(error)}"), **idle}

    def compared(self, stopped, chosen, task, question, budget, name, longest):
        check_choice(*chosen)
        question = prompt(task, question, name == TINY)
        yield {
            self.status: view.status(message="Preparing the document."),
            self.subject: view.subject(),
            self.race: view.race(),
            self.strip: view.strip([]),
            self.page_text: EMPTY_PAGE,
            self.sources: view.sources(),
            self.layer: gr.update(choices=[ALL_LAYERS], value=ALL_LAYERS, visible=False),
            self.seen: None,
        }
        document = yield from self.document(chosen, stopped)
        yield {self.subject: view.subject(document)}
        yield from self.loading(name, stopped)
        runs = self.engine.run(document.text, question, budget, longest, stopped)
        run = yield from self.frames(runs)
        if run.quest is not None:
            yield self.looked(run, look(run, self.engine.tokenizer, document))

    def document(self, chosen, stopped):
        """Read the document that was chosen; yields how far that is."""
        source, title, upload = chosen
        if source == SAMPLE:
            return write(self.form.sample_of(title))[0]
        path, name = upload
        shown = time.monotonic()
        for step in reading(path, name, stopped):
            if time.monotonic() - shown > WAIT_SECONDS:
                yield {self.status: view.opening(name, step if isinstance(step, tuple) else None)}
                shown = time.monotonic()
        return step

    def loading(self, name, stopped):
        """Load the model that was chosen; yields for how long that has gone on."""
        began = shown = time.monotonic()
        for _ in self.engine.using(name, stopped):
            if (now := time.monotonic()) - shown > WAIT_SECONDS or shown == began:
                message = f"Loading {self.form.shown(name)}: {now - began:.0f} s."
                yield {self.status: view.status(message=message)}
                shown = now

    def frames(self, runs):
        """Show a run while it goes on, not more often than can be seen; returns its last state."""
        shown = strip_shown = 0.0
        phase = None
        for run in runs:
            now = time.monotonic()
            if run.phase == phase and now - shown < FRAME_SECONDS:
                continue
            frame = {self.status: view.status(run), self.race: view.race(run)}
            if run.phase == "answering" and now - strip_shown > STRIP_SECONDS:
                frame[self.strip] = view.strip(run.reads.share(run.num_pages).tolist(), run.page_size)
                strip_shown = now
            yield frame
            shown, phase = time.monotonic(), run.phase
        return run

    def looked(self, run, seen):
        layers = [ALL_LAYERS, *(f"Layer {each}" for each in run.reads.layers)]
        return {
            self.status: view.status(run),
            self.race: view.race(run),
            self.strip: view.strip(seen.shares[None], run.page_size, seen),
            self.sources: view.sources(seen),
            self.layer: gr.update(choices=layers, value=ALL_LAYERS, visible=True),
            self.seen: seen,
        }


def layer_of(name):
    """The layer index that a choice stands for, or None for all."""
    return None if name == ALL_LAYERS else int(name.split()[-1])


def build(engine, samples=SAMPLES):
    """The page, as gr.Blocks. `engine` is what all its visitors share."""
    return Page(engine, samples).blocks
