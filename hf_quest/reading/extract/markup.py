"""Word documents and web pages, as Markdown."""

import io
import re
import zipfile

from .result import INSTALL, MAX_BYTES, Refused, cleaned, first_line
from .text import spoken


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
    notes = [] if encoding in ("utf-8", "ascii") else [f"Read as {spoken(encoding)}."]
    return cleaned(re.sub(r"\n{3,}", "\n\n", text).strip(), "markdown", notes)
