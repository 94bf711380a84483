"""`hf-quest app`: dense attention and Quest answer side by side in a browser, and the page shows where Quest looked.

It needs the extra `app`. It is part of the package, not of `demos/`, so that the command is there after a pip install.
"""

import itertools
import logging
import os
import threading
import time
from ipaddress import ip_address
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from .. import QuestError, demo
from . import view
from .documents import FILE_TYPES, MAX_BYTES, SAMPLES, TASKS, prompt, read_upload, write
from .engine import MAX_NEW_TOKENS, Engine, look

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
FRAME_SECONDS = 0.1  # between two pictures of a run
STRIP_SECONDS = 1.0  # between two pictures of the strip, which is large
MAX_WAITING = 20  # visitors
UPLOAD_SECONDS = 3600  # that an uploaded file is kept
BUDGETS = (32, 4096, 32)  # lowest, highest, step, in tokens
ALL_LAYERS = "All sparse layers"
EMPTY_PAGE = '<div class="hq-page"><p>Click a page or a source to read its text.</p></div>'

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],  # the pages load nothing from elsewhere
    font_mono=["ui-monospace", "monospace"],
).set(
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
)


class Visitors:
    """Whose runs wait for the model, or have it, with the event by which each can be stopped."""

    def __init__(self):
        self.events = {}  # of (session, number)
        self.numbers = itertools.count()
        self.running = None

    def enter(self, session):
        """The number of a new run, and how many are ahead of it."""
        number = next(self.numbers)
        self.events[session, number] = threading.Event()
        return number, len(self.events) - 1

    def begin(self, session, number):
        """The event that stops the run, or None if it was given up while it waited."""
        self.running = session, number
        return self.events.get(self.running)

    def leave(self, session, number):
        self.events.pop((session, number), None)

    def stop(self, session):
        """Stop the run that has the model, and give up one that waits. Returns whether one waited."""
        mine = [run for run in self.events if run[0] == session]
        waiting = [run for run in mine if run != self.running]
        for run in mine:
            self.events[run].set()
        for run in waiting:
            del self.events[run]
        return bool(waiting)


def build(engine, samples=SAMPLES):
    """The page, as gr.Blocks. `engine` is what all its visitors share."""
    visitors = Visitors()
    titles = [sample.title for sample in samples]

    def enter(request: gr.Request):
        if len(visitors.events) > MAX_WAITING:
            message = f"{MAX_WAITING} runs wait for the model already. Try again later."
            return view.error(message), gr.skip(), gr.skip(), None
        number, ahead = visitors.enter(request.session_hash)
        message = f"Waiting for the model: {ahead} ahead of you." if ahead else "Preparing the document."
        return view.status(message=message), gr.update(interactive=False), gr.update(interactive=True), number

    def answer(number, title, upload, task, question, budget, model_name, max_new_tokens, request: gr.Request):
        session = request.session_hash
        stopped = visitors.begin(session, number)
        if stopped is None:
            return
        idle = (gr.update(interactive=True), gr.update(interactive=False))
        keep = gr.skip()
        try:
            model_name = model_name.strip()
            is_loaded = model_name == engine.name
            yield (
                view.status(message="Preparing the document." if is_loaded else f"Loading {model_name}."),
                view.race(),
                view.strip([]),
                EMPTY_PAGE,
                view.sources(),
                keep,
                None,
                keep,
                keep,
            )
            engine.use(model_name)
            text = read_upload(upload) if upload else write(samples[titles.index(title)])[0]
            question = prompt(task, question, engine.is_tiny)
            shown = strip_shown = 0.0
            for run in engine.run(text, question, int(budget), int(max_new_tokens), stopped):
                now = time.monotonic()
                if run.phase != "weighing" and now - shown < FRAME_SECONDS:
                    continue
                strip = keep
                if run.phase == "answering" and now - strip_shown > STRIP_SECONDS:
                    strip = view.strip(run.reads.share(run.num_pages).tolist(), page_size=run.page_size)
                    strip_shown = now
                yield view.status(run), view.race(run), strip, keep, keep, keep, keep, keep, keep
                shown = time.monotonic()
            if run.quest is None:
                yield view.status(run), view.race(run), keep, keep, keep, keep, keep, *idle
                return
            seen = look(run, engine.tokenizer)
            layers = gr.update(choices=[ALL_LAYERS, *(f"Layer {each}" for each in run.reads.layers)], value=ALL_LAYERS)
            strip, sources = view.strip(seen.shares[None], run.page_size), view.sources(seen.sentences)
            yield view.status(run), view.race(run), strip, keep, sources, layers, seen, *idle
        except (demo.DemoError, QuestError) as error:
            yield view.error(str(error)), keep, keep, keep, keep, keep, keep, *idle
        except Exception as error:
            logger.exception("A run failed")
            yield view.error(f"The run failed: {demo.first_line(error)}"), keep, keep, keep, keep, keep, keep, *idle
        finally:
            visitors.leave(session, number)

    def leave(request: gr.Request):
        if not visitors.stop(request.session_hash):
            return gr.skip()  # `answer` says how far the run came
        message = "Stopped, before the model was free."
        return view.status(message=message), gr.update(interactive=True), gr.update(interactive=False)

    def close(request: gr.Request):
        visitors.stop(request.session_hash)

    def show_layer(seen, layer):
        if seen is None:
            return gr.skip()
        return view.strip(seen.shares[layer_of(layer)])

    def show_page(seen, layer, event: gr.EventData):
        if seen is None or not isinstance(event.page, int) or not 0 <= event.page < len(seen.page_texts):
            return gr.skip()
        return view.page(seen, event.page, layer_of(layer))

    def choose_sample(title):
        sample = samples[titles.index(title)]
        return sample.task, write(sample)[1], None

    def show_question(task):
        return gr.update(visible=task == "Question")

    with gr.Blocks(
        title="Quest: read what matters", analytics_enabled=False, delete_cache=(UPLOAD_SECONDS // 6, UPLOAD_SECONDS)
    ) as page:
        gr.HTML(view.HEADER, js_on_load=None)
        seen = gr.State(None, time_to_live=UPLOAD_SECONDS)
        # A component and no State, which would have the newest run's number when an older one's turn comes.
        number = gr.Number(precision=0, visible="hidden")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                sample = gr.Dropdown(titles, value=titles[0], label="Document", elem_id="document")
                upload = gr.File(
                    label=f"or your own ({' '.join(FILE_TYPES)})",
                    file_types=list(FILE_TYPES),
                    type="filepath",
                    height=120,
                    elem_id="upload",
                )
                task = gr.Radio(TASKS, value=samples[0].task, label="Task", elem_id="task")
                question = gr.Textbox(
                    write(samples[0])[1],
                    label="Question",
                    max_length=2000,
                    visible=samples[0].task == "Question",
                    elem_id="question",
                )
                lowest, highest, step = BUDGETS
                budget = gr.Slider(
                    lowest,
                    highest,
                    1024,
                    step=step,
                    label="Budget",
                    info="Tokens that each KV head may attend for one new token.",
                    elem_id="budget",
                )
                with gr.Accordion("Model and length", open=False):
                    model_name = gr.Textbox(
                        engine.name,
                        label="Any causal model of the hub, or a folder",
                        info="The tiny model inside answers from marked key points, secret codes and pass keys."
                        if engine.may_change
                        else "Fixed while this page is open to other machines.",
                        interactive=engine.may_change,
                        max_length=300,
                        elem_id="model",
                    )
                    max_new_tokens = gr.Slider(
                        16,
                        MAX_NEW_TOKENS,
                        MAX_NEW_TOKENS,
                        step=16,
                        label="Longest answer, in tokens",
                        elem_id="longest",
                    )
                with gr.Row():
                    run = gr.Button("Run", variant="primary", elem_id="run")
                    stop = gr.Button("Stop", variant="secondary", interactive=False, elem_id="stop")
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(view.status(), js_on_load=None, elem_id="status")
                race = gr.HTML(view.race(), js_on_load=None, elem_id="race")
                gr.HTML(
                    '<div class="hq-title">Where Quest looked<small>Quest knows what it reads, so an answer comes with '
                    "its sources.</small></div>",
                    js_on_load=None,
                )
                layer = gr.Radio([ALL_LAYERS], value=ALL_LAYERS, show_label=False, container=False, elem_id="layer")
                looks = {"js_on_load": (HERE / "look.js").read_text(), "elem_classes": "hq-look"}
                strip = gr.HTML(view.strip([]), elem_id="strip", **looks)
                page_text = gr.HTML(EMPTY_PAGE, js_on_load=None, elem_id="page")
                sources = gr.HTML(view.sources(), elem_id="sources", **looks)

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        sample.change(choose_sample, sample, [task, question, upload], **quick)
        task.change(show_question, task, question, **quick)
        run.click(enter, None, [status, run, stop, number], **quick).then(
            answer,
            [number, sample, upload, task, question, budget, model_name, max_new_tokens],
            [status, race, strip, page_text, sources, layer, seen, run, stop],
            concurrency_limit=1,
            trigger_mode="multiple",  # one that was given up is in the queue until its turn
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(leave, None, [status, run, stop], **quick)
        layer.change(show_layer, [seen, layer], strip, **quick)
        gr.on([strip.select, sources.select], show_page, [seen, layer], page_text, **quick)
        page.unload(close)
    page.visitors = visitors
    return page.queue(max_size=None)  # `enter` counts


def layer_of(name):
    """The layer index that a choice stands for, or None for all."""
    return None if name == ALL_LAYERS else int(name.split()[-1])


def is_loopback(host):
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def serve(model=None, device="auto", host="127.0.0.1", port=7860, samples=SAMPLES):
    """Load the model, open the page on `host` and `port` (None for any that is free), and return (page, its URL)."""
    page = build(Engine(model, device, may_change=is_loopback(host)), samples)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=THEME,
        css_paths=HERE / "style.css",
        max_file_size=MAX_BYTES,
        show_error=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
    return page, url
