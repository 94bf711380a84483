"""Documents that people have, as text: .txt, .md, .pdf, .docx and .html, read with suspicion, for the app and the demo.

The work is done by `extract` in a process of its own, which ends when it takes too long or is told to stop.
"""

import json
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

FILE_TYPES = (".txt", ".md", ".pdf", ".docx", ".html")
SECONDS = 90  # to read a file
PATIENCE = 0.1  # seconds between two looks at whether to stop
# It is found here and nowhere else, and not as a part of hf_quest, whose import takes seconds.
PROGRAM = f"import sys; sys.path[0] = {str(Path(__file__).parent)!r}; import extract; extract.main(sys.argv[1])"


class DocumentError(Exception):
    """Why a document cannot be read, in one line."""


class Stopped(Exception):
    """Reading was given up."""


@dataclass(frozen=True)
class Document:
    """A document's text and what is known of it.

    `notes` say what was assumed or left out. `pages` are the (character, number) at which a PDF's pages begin, of
    `num_pages`; `headings` the (character, title) of headings or bookmarks. `key_points` are lines that a document made
    here marks.
    """

    name: str
    text: str
    notes: tuple = ()
    pages: tuple = ()
    num_pages: int = 0
    headings: tuple = ()
    key_points: tuple = ()


def read_document(path, name=None):
    """The Document in a file; DocumentError, which calls it `name`, for one without text."""
    *_, document = reading(path, name)
    return document


def reading(path, name=None, stopped=None, seconds=SECONDS):
    """Yield (page, pages) of a PDF while it is read, None now and then, and at last the Document.

    Raises:
        DocumentError: for a file that holds no text, or too much of it, or takes longer than `seconds`.
        Stopped: when the event `stopped` is set.
    """
    name = name or str(path)
    command = [sys.executable, "-c", PROGRAM, str(Path(path).absolute())]  # an absolute path begins with no "-"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    lines = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put(b"")], daemon=True)
    reader.start()
    deadline = time.monotonic() + seconds
    try:
        while True:
            if stopped is not None and stopped.is_set():
                raise Stopped
            if time.monotonic() > deadline:
                raise DocumentError(
                    f"{name} takes longer than {seconds:.0f} s to read. Give a part of it, or its text."
                )
            try:
                line = lines.get(timeout=PATIENCE)
            except queue.Empty:
                yield None
                continue
            said = json.loads(line or '{"refused": "cannot be read: it ended the program that reads it."}')
            if "refused" in said:
                raise DocumentError(f"{name} {said['refused']}")
            if "document" in said:
                yield document_of(name, said["document"])
                return
            yield tuple(said["progress"])
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def document_of(name, found):
    pages = tuple(zip(found["pages"], found["page_numbers"], strict=True))
    return Document(
        name, found["text"], tuple(found["notes"]), pages, found["num_pages"], tuple(map(tuple, found["headings"]))
    )
