"""What a visitor may ask about: documents that ship, and uploads, which are read with suspicion."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pypdf import PdfReader
from transformers import AutoTokenizer

from .. import demo, tiny
from ..evaluation.documents import Library, documents, heldout_text

FILE_TYPES = (".txt", ".md", ".pdf")
MAX_BYTES = 10 * 2**20
MAX_PAGES = 2_000  # of a PDF

TASKS = ("Summarize", "Key points", "Question")
PROMPTS = {
    "Summarize": "Summarize this document in at most ten sentences.",
    "Key points": "List the key points of this document, in order.",
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
    Sample("Manual, 12K tokens, key points", "digest", 12_000),
    Sample("Manual, 24K tokens, key points", "digest", 24_000, seed=1),
    Sample("Manual, 16K tokens, secret codes", "facts", 16_000, seed=1),
    Sample("Haystack, 8K tokens, a pass key", "passkey", 8_000),
)


@cache
def library():
    return Library(AutoTokenizer.from_pretrained(tiny.PATH), heldout_text())


@cache
def write(sample):
    """The text of a sample and a question for it."""
    (document,) = documents(library(), sample.job, sample.length, 1, sample.seed)
    if sample.job == "digest":
        return document.context, ""
    question = document.question.removeprefix("Question: ").removesuffix(" Answer:").removesuffix(" The pass key is")
    return document.context, question[:1].upper() + question[1:]


def prompt(task, question, is_tiny):
    """What to ask the model for a task."""
    if task == "Question":
        if not question.strip():
            raise demo.DemoError("There is no question. Write one, or choose another task.")
        question = question.strip()
        # The tiny model learned its questions in lower case.
        return question[:1].lower() + question[1:] if is_tiny else question
    return demo.QUESTION if is_tiny else PROMPTS[task]


def read_upload(path):
    """The text of an uploaded file; DemoError for one that is too large, of another type, or without text."""
    path = Path(path)
    if path.suffix.lower() not in FILE_TYPES:
        raise demo.DemoError(f"{path.name} is not one of {', '.join(FILE_TYPES)}.")
    num_bytes = path.stat().st_size
    if num_bytes > MAX_BYTES:
        raise demo.DemoError(
            f"{path.name} has {num_bytes / 2**20:.1f} MiB, and the limit is {MAX_BYTES // 2**20}. Give a smaller file."
        )
    try:
        return read_pdf(path) if path.suffix.lower() == ".pdf" else demo.read_document(path)
    except demo.DemoError as error:
        raise demo.DemoError(str(error).replace(str(path), path.name)) from None


def read_pdf(path):
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise demo.DemoError(f"{path.name} is encrypted. Save it without a password.")
        if len(reader.pages) > MAX_PAGES:
            raise demo.DemoError(f"{path.name} has {len(reader.pages):,} pages, and the limit is {MAX_PAGES:,}.")
        text = "\n".join(page.extract_text() for page in reader.pages)
    except demo.DemoError:
        raise
    except Exception as error:  # pypdf raises many kinds for a broken file
        raise demo.DemoError(f"{path.name} cannot be read as PDF: {demo.first_line(error)}") from error
    if not text.strip():
        raise demo.DemoError(
            f"{path.name} holds no text: its pages are pictures. Run character recognition on it first."
        )
    return text
