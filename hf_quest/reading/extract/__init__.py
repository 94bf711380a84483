"""The text of one file, as a program of its own: `extract.main(FILE)`.

What a file holds can take minutes and gigabytes. A process can be ended at any moment, so this package imports nothing
of the other, which would take seconds. It writes a line of JSON for each page it has read, and at last one with the
text or with the reason why there is none.
"""

from dataclasses import asdict
from pathlib import Path

from .markup import read_docx, read_html
from .pdf import read_pdf
from .result import MAX_BYTES, Refused, check, say
from .text import headings, read_markdown, read_text

MAX_MEMORY = 2 * 2**30  # bytes
READERS = {
    ".pdf": read_pdf,
    ".docx": read_docx,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".md": read_markdown,
    ".markdown": read_markdown,
}


def extract(path):
    path = Path(path)
    if path.is_dir():
        raise Refused("is a folder, and not a file.")
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise Refused(
                f"has {num_bytes / 2**20:,.1f} MiB, and the limit is {MAX_BYTES // 2**20}. Give a part of it."
            )
        content = path.read_bytes()
    except FileNotFoundError:
        raise Refused("is not there.") from None
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}.") from None
    read = READERS.get(path.suffix.lower(), read_text)
    found = read(content)
    check(found.text)
    if found.kind == "markdown":
        found.headings = headings(found.text)
    return found


def limit_memory():
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > MAX_MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, hard))


def main(path):
    limit_memory()
    try:
        say(document=asdict(extract(path)))
    except Refused as error:
        say(refused=str(error))
    except MemoryError:
        say(refused=f"takes more than {MAX_MEMORY // 2**30} GiB to read. Give a part of it.")
