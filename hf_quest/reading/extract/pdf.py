"""The text of a PDF, page by page. What cannot be read of it is counted and said."""

import io
import re
import unicodedata

from .result import INSTALL, MAX_TEXT, Extract, Refused, cleaned, counted, first_line, say

MAX_PAGES = 2_000
FARTHEST = 4096  # bytes from a part's number to its type, or from the end of a PDF to its last word
MAX_DRAWING = 2 * 2**20  # bytes by which a PDF says what is on one page
RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
PRESENTED = re.compile("[\ufb1d-\ufdcf\ufdf0-\ufdff\ufe70-\ufefc]+")  # letters as they are drawn, and not as written


def read_pdf(content):
    try:
        import pypdf
    except ModuleNotFoundError:
        raise Refused("is a PDF, which needs pypdf: " + INSTALL) from None
    if b"%PDF-" not in content[:1024]:
        raise Refused("is not a PDF, by what it holds. If it is text, give it a name that ends in .txt.")
    try:
        reader, notes = opened(content)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Refused("is encrypted with a password. Save it without one.")
        num_pages = len(reader.pages)
        if notes:
            notes += missing(reader, num_pages)
    except pypdf.errors.DependencyError:
        raise Refused("is encrypted with AES, which needs cryptography: " + INSTALL) from None
    except (Refused, MemoryError):
        raise
    except Exception as error:  # pypdf raises many kinds for a broken file
        raise Refused(f"cannot be read as PDF, {what_is_wrong(content, error)}. Save it again.") from None
    if not num_pages:
        raise Refused("is a PDF without pages. Save it again.")
    if num_pages > MAX_PAGES:
        raise Refused(f"has {num_pages:,} pages, and the limit is {MAX_PAGES:,}. Give a part of it.")
    return pages_joined(reader, num_pages, notes)


def opened(content):
    """A reader of the PDF, and what is to be said where the list of its parts, which is at its end, is not there."""
    import pypdf

    try:
        return pypdf.PdfReader(io.BytesIO(content)), []
    except pypdf.errors.DependencyError:
        raise
    except Exception:
        *_, catalog = [None, *re.finditer(rb"/Type\s*/Catalog\b", content)]
        if catalog is None:
            raise
        before = content[max(catalog.start() - FARTHEST, 0) : catalog.start()]
        *_, (number, generation) = [(b"0", b"0"), *re.findall(rb"(\d+)\s+(\d+)\s+obj\b", before)]
        # The table that it points to is none, so that pypdf looks for the parts by itself.
        end = b"\nendstream\nendobj\ntrailer\n<< /Root %s %s R >>\nstartxref\n0\n%%%%EOF\n" % (number, generation)
        reader = pypdf.PdfReader(io.BytesIO(content + end))
        return reader, ["The file is broken or its end is missing. What could be found of it was read."]


def missing(reader, num_pages):
    """What a broken file says of its pages and does not hold."""
    count = reader.root_object["/Pages"].get("/Count")
    if isinstance(count, int) and count > num_pages:
        return [f"Of its {counted(count, 'page')} {count - num_pages:,} are missing."]
    return []


def what_is_wrong(content, error):
    if b"%%EOF" not in content[-FARTHEST:]:
        return "its end is missing, as after a download that broke off"
    said = first_line(error)
    return "it is broken" if "b'" in said or 'b"' in said else f"it is broken: {said}"


def pages_joined(reader, num_pages, notes):
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
    found.notes = notes + page_notes(left_out, num_pages, found.text)
    if not texts:
        remedy = "Run character recognition (OCR) on it." if left_out["empty"] else "Save it again, or give its text."
        raise Refused(f"holds no text. {' '.join(found.notes)} {remedy}")
    found.headings = bookmarks(reader, found)
    return found


def page_text(page):
    """What is wrong with a page, or None, and its text."""
    try:
        content = page.get_contents()
        if content is None and page.get("/Contents") is not None:
            return "broken", ""  # what it points to is missing
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
