"""Files as people have them, whole and broken, written byte by byte: PDFs, Word documents, web pages."""

import io
import textwrap
import zipfile
import zlib

FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"


def page_of(lines):
    """What a PDF says is on a page of these lines."""
    escaped = (line.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)") for line in lines)
    shown = b"".join(b"(%s) Tj T* " % line.encode("latin-1", "replace") for line in escaped)
    return b"BT /F1 10 Tf 40 750 Td 12 TL " + shown + b"ET"


def pages_of(text, num_lines=50):
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 95)]
    return [page_of(lines[first : first + num_lines]) for first in range(0, len(lines), num_lines)]


def pdf(contents, packed=True, times=1, bookmarks=()):
    """The bytes of a PDF with a page for each of `contents`, `times` over; `bookmarks` are (page, title)."""
    contents = [zlib.compress(content, 9) if packed else content for content in contents]
    filtered = b"/Filter /FlateDecode " if packed else b""
    num_pages, first_content, first_page = len(contents) * times, 4, 4 + len(contents)
    first_bookmark = first_page + num_pages
    outline = first_bookmark + len(bookmarks)
    kids = b" ".join(b"%d 0 R" % (first_page + index) for index in range(num_pages))
    catalog = b"/Type /Catalog /Pages 2 0 R" + (b" /Outlines %d 0 R" % outline if bookmarks else b"")
    objects = [b"<< %s >>" % catalog, b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, num_pages), FONT]
    objects += [
        b"<< %s/Length %d >>\nstream\n%s\nendstream" % (filtered, len(content), content) for content in contents
    ]
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
    objects += [page + b"/Contents %d 0 R >>" % (first_content + index % len(contents)) for index in range(num_pages)]
    for index, (number, title) in enumerate(bookmarks):
        following = b" /Next %d 0 R" % (first_bookmark + index + 1) if index + 1 < len(bookmarks) else b""
        target = b"[%d 0 R /Fit]" % (first_page + number - 1)
        objects.append(b"<< /Title (%s) /Parent %d 0 R /Dest %s%s >>" % (title.encode(), outline, target, following))
    if bookmarks:
        ends = (first_bookmark, outline - 1, len(bookmarks))
        objects.append(b"<< /Type /Outlines /First %d 0 R /Last %d 0 R /Count %d >>" % ends)
    return assembled(objects)


def assembled(objects):
    out, offsets = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = (len(objects) + 1, len(objects) + 1, len(out))
    return out + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
        % (end[0], table, end[1], end[2])
    )


def encrypted(content, algorithm, password=""):
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(content)))
    writer.encrypt(user_password=password, owner_password="owner", algorithm=algorithm)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


CONTENT_TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension="rels" '
    'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/word/document.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
)
RELATIONSHIPS = (
    '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="rId1" '
    'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    'Target="word/document.xml"/></Relationships>'
)
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def docx(paragraphs):
    """The bytes of a Word document of (style, text), the style None or such as Heading1."""
    body = "".join(
        f'<w:p>{f"""<w:pPr><w:pStyle w:val="{style}"/></w:pPr>""" if style else ""}<w:r><w:t>{text}</w:t></w:r></w:p>'
        for style, text in paragraphs
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", CONTENT_TYPES)
        archive.writestr("_rels/.rels", RELATIONSHIPS)
        archive.writestr("word/document.xml", f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>')
    return out.getvalue()
