"""What a visitor may ask about without a file of their own, and what to ask."""

from dataclasses import dataclass
from functools import cache

from transformers import AutoTokenizer

from .. import demo, tiny
from ..evaluation.documents import Library, documents, heldout_text
from ..reading import Document

TASKS = ("Summarize", "Key points", "Question")
PROMPTS = {
    "Summarize": "Summarize this document in at most ten sentences.",
    "Key points": "List the key points of this document, in order, one short line for each.",
}


@dataclass(frozen=True)
class Sample:
    """A document that ships, made of held-out text, with something in it for the tiny model to find."""

    title: str
    job: str
    length: int  # tokens of the tiny model, question included
    seed: int = 0

    @property
    def task(self):
        return "Summarize" if self.job == "digest" else "Question"


SAMPLES = (
    Sample("Key points, 12,000 tokens", "digest", 12_000),
    Sample("Key points, 24,000 tokens", "digest", 24_000, seed=1),
    Sample("Secret codes, 16,000 tokens", "facts", 16_000, seed=1),
    Sample("A pass key, 8,000 tokens", "passkey", 8_000),
    Sample("A short manual, 6,000 tokens", "digest", 6_000, seed=2),
)


@cache
def library():
    return Library(AutoTokenizer.from_pretrained(tiny.PATH), heldout_text())


@cache
def write(sample):
    """The Document of a sample, and a question for it."""
    (made,) = documents(library(), sample.job, sample.length, 1, sample.seed)
    document = Document(sample.title, made.context)
    if sample.job == "digest":
        return document, ""
    question = made.question.removeprefix("Question: ").removesuffix(" Answer:").removesuffix(" The pass key is")
    return document, question[:1].upper() + question[1:]


def prompt(task, question, is_tiny):
    """What to ask the model for a task."""
    if task == "Question":
        if not question.strip():
            raise demo.DemoError("There is no question. Write one, or choose another task.")
        question = question.strip()
        # The tiny model learned its questions in lower case.
        return question[:1].lower() + question[1:] if is_tiny else question
    return demo.QUESTION if is_tiny else PROMPTS[task]
