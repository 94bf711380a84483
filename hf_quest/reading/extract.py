"""The text of one file, as a program of its own: `python extract.py FILE NAME`.

What a file holds can take minutes and gigabytes. A process can be ended at any moment, so this one imports nothing of
the package, which would take seconds. It writes a line of JSON for each page it has read, and at last one with the
text or with the reason why there is none.
"""

import codecs
import io
import json
import re
import sys
import unicodedata
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

MAX_BYTES = 50 * 2**20
MAX_PAGES = 2_000  # of a PDF
MAX_TEXT = 5_000_000  # characters
MAX_DRAWING = 2 * 2**20  # bytes by which a PDF says what is on one page
MAX_MEMORY = 2 * 2**30  # bytes
UNREADABLE = 0.1  # share of characters that are no text, from which on a file or page is none
INSTALL = 'pip install "hf-quest[documents]"'

MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"))
MARKS += ((codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"))
WIDE = ("utf_16_le", "utf_16_be")
# Those of two that fit a text equally well come first that more files have.
NARROW = "cp1252 gb18030 big5 cp932 cp949 euc_jp cp1251 cp1250 cp1253 cp1254 cp1255 cp1256 koi8_r".split()
SPOKEN = {
    "windows-1252": "Windows-1252",
    "utf_16_le": "UTF-16",
    "utf_16_be": "UTF-16",
    "cp1252": "Windows-1252",
    "gb18030": "GB18030",
}
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
PRESENTED = re.compile("[\ufb1d-\ufdcf\ufdf0-\ufdff\ufe70-\ufefc]+")  # letters as they are drawn, and not as written
SIGNATURES = {
    b"%PDF-": "is a PDF, by what it holds. Give it a name that ends in .pdf.",
    b"PK\x03\x04": "is a ZIP file, by what it holds. If it is a Word document, give it a name that ends in .docx.",
}


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


def check(text):
    if not text:
        raise Refused("is empty.")
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise Refused("holds no text that can be seen: it is blank.")
    if len(text) > MAX_TEXT:
        raise Refused(f"holds {len(text):,} characters, and the limit is {MAX_TEXT:,}. Give a part of it.")


def read_text(content):
    for signature, what in SIGNATURES.items():
        if content.startswith(signature):
            raise Refused(what)
    text, encoding = decode(content)
    return cleaned(text, "text", [] if encoding is None else [f"Read as {encoding}."])


def read_markdown(content):
    found = read_text(content)
    found.kind = "markdown"
    return found


def decode(content):
    """The text, and the encoding where that is not UTF-8."""
    for mark, encoding in MARKS:
        if content.startswith(mark):
            named = None if encoding == "utf-8-sig" else f"{encoding.upper()}, which its first bytes say it is"
            return content.decode(encoding, errors="replace"), named
    head = content[:4096]
    if head.count(0) > len(head) / 5:
        return detected(content, WIDE)
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError:
        return detected(content, NARROW)


def detected(content, encodings):
    try:
        from charset_normalizer import from_bytes
    except ModuleNotFoundError:
        raise Refused("is not UTF-8, and to find out what it is needs charset-normalizer: " + INSTALL) from None
    matches = from_bytes(content[: 2**18], cp_isolation=list(encodings))
    fitting = {match.encoding: match for match in matches}
    # The bytes that Western and Central European texts share are read alike by both.
    likely = [name for name in encodings if name in fitting and round(fitting[name].chaos, 2) <= least_chaos(matches)]
    if "cp1250" in likely and same_text(content, "cp1250", "cp1252"):
        likely.insert(0, "cp1252")
    rare = sum(byte > 0x7F for byte in content) < len(content) / 50
    if rare and encodings is NARROW and same_text(content, "cp1252", "cp1252"):
        likely.insert(0, "cp1252")
    for encoding in likely:
        text = content.decode(encoding, errors="replace")
        return text, f"{SPOKEN.get(encoding, encoding)}, which it looks like. If letters are wrong, save it as UTF-8"
    raise Refused("is a binary file, or text in an unknown encoding. Save it as UTF-8 text.")


def least_chaos(matches):
    return min((round(match.chaos, 2) for match in matches), default=0)


def same_text(content, *encodings):
    """Whether both can read it, and read the same."""
    try:
        first, second = (content.decode(encoding) for encoding in encodings)
    except UnicodeDecodeError:
        return False
    return first == second


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


def counted(number, noun):
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def read_pdf(content):
    try:
        import pypdf
    except ModuleNotFoundError:
        raise Refused("is a PDF, which needs pypdf: " + INSTALL) from None
    if b"%PDF-" not in content[:1024]:
        raise Refused("is not a PDF, by what it holds. If it is text, give it a name that ends in .txt.")
    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Refused("is encrypted with a password. Save it without one.")
        num_pages = len(reader.pages)
    except pypdf.errors.DependencyError:
        raise Refused("is encrypted with AES, which needs cryptography: " + INSTALL) from None
    except (Refused, MemoryError):
        raise
    except Exception as error:  # pypdf raises many kinds for a broken file
        raise Refused(f"cannot be read as PDF, it is broken: {first_line(error)}. Save it again.") from None
    if not num_pages:
        raise Refused("is a PDF without pages. Save it again.")
    if num_pages > MAX_PAGES:
        raise Refused(f"has {num_pages:,} pages, and the limit is {MAX_PAGES:,}. Give a part of it.")
    return pages_joined(reader, num_pages)


def pages_joined(reader, num_pages):
    found = Extract("", "pdf", num_pages=num_pages)
    texts, length, left_out = [], 0, {"empty": [], "large": [], "broken": []}
    for number, page in enumerate(reader.pages, start=1):
        say(progress=[number, num_pages])
        kind, text = page_text(page)
        if kind:
            left_out[kind].append(number)
            continue
        found.pages.append(length)
        found.page_numbers.append(number)
        texts.append(text.rstrip() + "\n")
        length += len(texts[-1])
        if length > MAX_TEXT:
            raise Refused(f"holds more than {MAX_TEXT:,} characters, the limit. Give a part of it.")
    found.text = "".join(texts)
    found.notes = page_notes(left_out, num_pages, found.text)
    if not texts:
        remedy = "Run character recognition (OCR) on it." if left_out["empty"] else "Save it again, or give its text."
        raise Refused(f"holds no text. {' '.join(found.notes)} {remedy}")
    found.headings = bookmarks(reader, found)
    return found


def page_text(page):
    """What is wrong with a page, or None, and its text."""
    try:
        content = page.get_contents()
        if content is not None and len(content.get_data()) > MAX_DRAWING:
            return "large", ""
        text = page.extract_text()
    except MemoryError:
        raise
    except Exception:
        return "broken", ""
    if not text.strip():
        return "empty", ""
    try:
        text = cleaned(PRESENTED.sub(lambda letters: unicodedata.normalize("NFKC", letters[0]), text), "pdf", []).text
    except Refused:
        return "broken", ""
    return None, text


def page_notes(left_out, num_pages, text):
    reasons = {
        "empty": "without text (a picture, perhaps)",
        "large": f"with a drawing of more than {MAX_DRAWING // 2**20} MiB",
        "broken": "of which the text cannot be read",
    }
    notes = []
    for kind, numbers in left_out.items():
        if numbers:
            named = ", ".join(map(str, numbers[:5])) + (" …" if len(numbers) > 5 else "")
            notes.append(f"Left out: {counted(len(numbers), 'page')} of {num_pages:,} {reasons[kind]}: {named}.")
    if RIGHT_TO_LEFT.search(text):
        notes.append("It holds text from right to left: a PDF keeps how it looks, and the order of words may be wrong.")
    return notes


def bookmarks(reader, found):
    """The PDF's own list of contents, as far as it can be read."""
    starts = dict(zip(found.page_numbers, found.pages, strict=True))
    titles = []

    def walk(entries):
        for entry in entries:
            if isinstance(entry, list):
                walk(entry)
            else:
                number = reader.get_destination_page_number(entry)
                if number is not None and number + 1 in starts and entry.title:
                    titles.append((starts[number + 1], " ".join(entry.title.split())))

    try:
        walk(reader.outline)
    except Exception:
        return []  # a list of contents is no reason to refuse the text
    return sorted(titles)


def read_docx(content):
    try:
        import mammoth
    except ModuleNotFoundError:
        raise Refused("is a Word document, which needs mammoth: " + INSTALL) from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            num_bytes = sum(part.file_size for part in archive.infolist() if part.filename.endswith(".xml"))
            if num_bytes > MAX_BYTES:
                raise Refused(f"unpacks to {num_bytes / 2**20:,.0f} MiB, and the limit is {MAX_BYTES // 2**20}.")
        no_pictures = mammoth.images.img_element(lambda image: {"src": ""})
        page = mammoth.convert_to_html(io.BytesIO(content), convert_image=no_pictures).value
    except (Refused, MemoryError):
        raise
    except Exception as error:
        raise Refused(f"cannot be read as a Word document: {first_line(error)}. Save it again as .docx.") from None
    return markdown_of(page)


def read_html(content):
    return markdown_of(content)


def markdown_of(page):
    """HTML, as text or as bytes, with its headings and tables in Markdown, and without what no reader sees."""
    try:
        from bs4 import BeautifulSoup
        from markdownify import MarkdownConverter
    except ModuleNotFoundError as error:
        raise Refused(f"needs {error.name}: {INSTALL}") from None
    try:
        soup = BeautifulSoup(page, "html.parser")
        for hidden in soup(["script", "style", "template", "noscript", "svg", "head", "img"]):
            hidden.decompose()
        options = {"heading_style": "ATX", "strip": ["a"], "escape_asterisks": False, "escape_underscores": False}
        text = MarkdownConverter(**options, escape_misc=False).convert_soup(soup)
    except RecursionError:
        raise Refused("has elements in elements, too many to read. Save it as text.") from None
    encoding = (soup.original_encoding or "utf-8").lower()
    notes = [] if encoding in ("utf-8", "ascii") else [f"Read as {SPOKEN.get(encoding, encoding)}."]
    return cleaned(re.sub(r"\n{3,}", "\n\n", text).strip(), "markdown", notes)


def headings(text):
    """(character, title) of every Markdown heading outside of code."""
    found, start, in_code = [], 0, False
    for line in text.splitlines(keepends=True):
        if line.startswith(("```", "~~~")):
            in_code = not in_code
        elif not in_code and (match := re.match(r"#{1,6}\s+(.*?)[\s#]*$", line)) and match[1]:
            found.append((start, match[1]))
        start += len(line)
    return found


READERS = {
    ".pdf": read_pdf,
    ".docx": read_docx,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".md": read_markdown,
    ".markdown": read_markdown,
}


def first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def say(**line):
    print(json.dumps(line), flush=True)


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


if __name__ == "__main__":
    main(sys.argv[1])
