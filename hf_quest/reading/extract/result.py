"""What was found in a file, or why there is none of it; limits; text without what is no text."""

import json
import re
from dataclasses import dataclass, field

MAX_BYTES = 50 * 2**20
MAX_TEXT = 5_000_000  # characters
UNREADABLE = 0.1  # share of characters that are no text, from which on a file or page is none
INSTALL = 'pip install "hf-quest[documents]"'
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")


class Refused(Exception):
    """Why there is no text, in one line that goes on from the file's name."""


@dataclass
class Extract:
    """`pages` are the characters at which a PDF's pages begin, and `page_numbers` their numbers, from 1; `headings`
    are (character, title); `notes` say what was assumed or left out."""

    text: str
    kind: str
    notes: list = field(default_factory=list)
    pages: list = field(default_factory=list)
    page_numbers: list = field(default_factory=list)
    num_pages: int = 0
    headings: list = field(default_factory=list)


def cleaned(text, kind, notes):
    """Without what is no text: one kind of line end, no control characters, no halves of surrogate pairs."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\v", "\n")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    num_controls = len(CONTROL.findall(text))
    if num_controls + text.count("\ufffd") > UNREADABLE * max(len(text), 1):
        raise Refused("is a binary file, by what it holds. Give text.")
    if num_controls:
        notes = [*notes, f"{counted(num_controls, 'control character')} left out."]
    if text.count("\ufffd"):
        notes = [*notes, f"{counted(text.count(chr(0xFFFD)), 'character')} could not be read and are shown as \ufffd."]
    return Extract(CONTROL.sub("", text), kind, notes)


def check(text):
    if not text:
        raise Refused("is empty.")
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise Refused("holds no text that can be seen: it is blank.")
    if len(text) > MAX_TEXT:
        raise Refused(f"holds {len(text):,} characters, and the limit is {MAX_TEXT:,}. Give a part of it.")


def counted(number, noun):
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def say(**line):
    print(json.dumps(line), flush=True)
