"""Every kind of file that people have is read as they would expect, or refused in one line that says what to do."""

import codecs
import random
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from dataclasses import asdict

import pytest

pytest.importorskip("mammoth", reason='the documents need pip install "hf-quest[documents]"')

from written_files import docx, encrypted, page_of, pages_of, pdf

from hf_quest.evaluation.documents import heldout_text
from hf_quest.reading import PROGRAM, Document, DocumentError, Stopped, document_of, extract, read_document, reading
from hf_quest.reading.extract import result

TEXT = heldout_text()[:15_000].replace("\t", " ")
CHINESE = "桥梁检查报告显示第三根柱子有细小裂缝。工程师在冬季更换了钢缆，压力表读数正常。\n" * 60
HEBREW = "דוח על מצב הגשר: המהנדס החליף את כבל הפלדה בחורף. " * 40
FRENCH = "Le café de la gare coûte très cher à Zürich. L'été dernier, « les élèves » ont visité le château.\n" * 20
CZECH = "Zpráva o stavu mostu ukazuje, že ocelové lano bylo vyměněno v zimě. Příliš žluťoučký kůň.\n" * 20
LINE = b"(%s) Tj T* " % (b"bridge " * 14)
DRAWN = str.maketrans("'`", "’‘")  # as the encoding of PDF's standard fonts has them


def page(num_lines):
    return b"BT /F1 10 Tf 40 750 Td 12 TL " + LINE * num_lines + b"ET"


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(tmp_path, name, content):
    """In this process, which is faster than in one of its own."""
    return document_of(name, asdict(extract.extract(write(tmp_path, name, content))))


def refusal(tmp_path, name, content):
    with pytest.raises(extract.Refused) as error:
        read(tmp_path, name, content)
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)
    return str(error.value)


def test_a_document_comes_from_a_process_of_its_own(tmp_path):
    assert read_document(write(tmp_path, "-a b.md", "# One\n" + TEXT)) == Document(
        str(tmp_path / "-a b.md"), "# One\n" + TEXT, headings=((0, "One"),)
    )
    steps = [step for step in reading(write(tmp_path, "a.pdf", pdf(pages_of(TEXT)[:2])), "it") if step]
    document = steps.pop()
    assert steps == [(1, 2), (2, 2)]
    assert (document.name, document.num_pages, len(document.pages)) == ("it", 2, 2)
    with pytest.raises(DocumentError, match=r"^it is empty\.$"):
        read_document(write(tmp_path, "a.txt", ""), "it")


ENCODED = {
    "plain": (TEXT.encode(), TEXT, None),
    "UTF-8 with a mark": (codecs.BOM_UTF8 + TEXT.encode(), TEXT, None),
    "UTF-16 LE with a mark": (
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        TEXT,
        "UTF-16, which its first bytes say",
    ),
    "UTF-16 BE with a mark": (
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT,
        "UTF-16, which its first bytes say",
    ),
    "UTF-32 with a mark": (TEXT.encode("utf-32"), TEXT, "UTF-32, which its first bytes say"),
    "UTF-16 LE without a mark": (TEXT.encode("utf-16-le"), TEXT, "UTF-16, which it looks like"),
    "UTF-16 BE without a mark": (TEXT.encode("utf-16-be"), TEXT, "UTF-16, which it looks like"),
    "a quotation in CP1252": (
        f"{TEXT}It’s “quoted” — with dashes.\n".encode("cp1252"),
        "It’s “quoted” —",
        "Windows-1252",
    ),
    "a line in Latin-1": (f"{TEXT}Le café de Zürich.\n".encode("latin-1"), "Le café de Zürich.", "Windows-1252"),
    "French in CP1252": (FRENCH.encode("cp1252"), FRENCH, "Windows-1252"),
    "Czech in CP1250": (
        CZECH.encode("cp1250"),
        CZECH,
        "Windows-1250, which it looks like, with words such as Zpráva, že, ocelové",
    ),
    "GB18030": (CHINESE.encode("gb18030"), CHINESE, "GB18030"),
    "Chinese in UTF-8": (CHINESE.encode(), CHINESE, None),
    "Hebrew in UTF-8": (HEBREW.encode(), HEBREW, None),
    "CR LF": (TEXT.replace("\n", "\r\n").encode(), TEXT, None),
    "CR": (TEXT.replace("\n", "\r").encode(), TEXT, None),
    "half a surrogate pair": (TEXT.encode() + b"\xed\xa0\x80", TEXT, "which it looks like"),
    "emoji": ("👩🏽‍🔧 Bridge ok ✅ ".encode() * 99, "👩🏽‍🔧 Bridge ok ✅ ", None),
}


@pytest.mark.parametrize("case", ENCODED)
def test_text_is_read_in_its_encoding_and_what_was_assumed_is_said(tmp_path, case):
    content, text, said = ENCODED[case]
    document = read(tmp_path, "notes.txt", content)
    assert text in document.text
    assert not document.text.startswith("\ufeff")
    if said is None:
        assert document.notes == ()
    else:
        assert said in document.notes[0]


@pytest.mark.parametrize(
    "name",
    [
        "-dash.txt",
        "[bold red]brackets.txt",
        "weird name <b>&'\".txt",
        "UPPER.TXT",
        "noext",
        "notes.markdown",
        "data.csv",
    ],
)
def test_a_file_of_any_name_is_text_if_it_holds_text(tmp_path, name):
    assert read(tmp_path, name, TEXT).text == TEXT


@pytest.mark.parametrize(
    ("inserted", "said"),
    [("\0", "1 control character left out."), ("\x1b[31mred\x1b[0m\x07\x08", "4 control characters left out.")],
    ids=["one NUL", "terminal codes"],
)
def test_control_characters_are_left_out_and_counted(tmp_path, inserted, said):
    document = read(tmp_path, "a.txt", TEXT[:3000] + inserted + TEXT[3000:])
    assert document.notes == (said,)
    assert not set(document.text) & set("\0\x1b\x07\x08")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "is empty."),
        ("a.txt", codecs.BOM_UTF8, "is empty."),
        ("a.txt", b" \n\t \n" * 50, "holds no text that can be seen"),
        ("a.txt", "\u200b\u200b\n" * 300, "holds no text that can be seen"),
        ("a.txt", b"PK\x03\x04\x14\0" + random.Random(0).randbytes(3000), "is a ZIP file, by what it holds."),
        ("a.txt", pdf([page(3)]), "is a PDF, by what it holds."),
        ("a.exe", b"MZ\0\x01" + random.Random(1).randbytes(3000), "is a binary file"),
        ("a.txt", b"a word " * 750_000, "holds 5,250,000 characters, and the limit is 5,000,000."),
        ("a.pdf", TEXT, "is not a PDF, by what it holds."),
        ("a.pdf", b"%PDF-1.4\n", "cannot be read as PDF, its end is missing, as after a download that broke off"),
        (
            "a.pdf",
            pdf(pages_of(TEXT)).replace(b"/Catalog", b"/Nothing")[:-400],
            "cannot be read as PDF, its end is miss",
        ),
        ("a.pdf", pdf(pages_of(TEXT)).replace(b"/Kids [", b"/Kids [2 0 R "), "cannot be read as PDF, it is broken"),
        ("a.pdf", pdf([]), "is a PDF without pages."),
        ("a.pdf", pdf([b"q Q"] * 3), "3 pages of 3 without text (a picture, perhaps): 1, 2, 3. Run character recog"),
        ("a.pdf", pdf([b"BT /F1 10 Tf (\\000\\000\\000a) Tj ET"]), "1 page of 1 of which the text cannot be read: 1."),
        ("a.pdf", pdf([page(22_000)]), "1 page of 1 with a drawing of more than 2 MiB: 1. Save it again"),
        ("a.pdf", pdf([b"q Q"], times=2001), "has 2,001 pages, and the limit is 2,000."),
        ("a.pdf", encrypted(pdf([page(3)]), "RC4-128", "secret"), "is encrypted with a password."),
        ("a.pdf", encrypted(pdf([page(3)]), "AES-256", "secret"), "is encrypted with a password."),
        ("a.docx", TEXT, "cannot be read as a Word document"),
        ("a.docx", b"PK\x03\x04", "cannot be read as a Word document"),
        ("a.html", "<script>only()</script>", "is empty."),
        ("a.html", "<b>" * 30_000, "has elements in elements, too many to read."),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_holds_no_text_is_refused(tmp_path, name, content, reason):
    assert reason in refusal(tmp_path, name, content)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DocumentError, match=r"^it is not there\.$"):
        read_document(tmp_path / "gone.txt", "it")
    with pytest.raises(DocumentError, match=r"^it is a folder, and not a file\.$"):
        read_document(tmp_path, "it")


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(result.MAX_BYTES + 2**19)
    with pytest.raises(DocumentError, match=r"has 50\.5 MiB, and the limit is 50\."):
        read_document(path)


def same_letters(text, expected):
    drawn = expected.encode("latin-1", "replace").decode("latin-1").translate(DRAWN)
    assert "".join(text.split()) == "".join(drawn.split())


@pytest.mark.parametrize("algorithm", [None, "RC4-128", "AES-128", "AES-256"])
def test_a_pdf_is_read_that_anybody_may_open(tmp_path, algorithm):
    content = pdf(pages_of(TEXT))
    document = read(tmp_path, "a.PDF", encrypted(content, algorithm) if algorithm else content)
    same_letters(document.text, TEXT)
    assert document.notes == ()
    assert [number for _, number in document.pages] == list(range(1, document.num_pages + 1))


def test_pages_without_text_are_counted_and_the_others_keep_their_numbers(tmp_path):
    pages = [page_of([words]) for words in ("one two", "three")]
    document = read(tmp_path, "a.pdf", pdf([b"q Q", pages[0], b"q Q", b"q Q", pages[1], page(22_000)]))
    assert document.notes == (
        "Left out: 3 pages of 6 without text (a picture, perhaps): 1, 3, 4.",
        "Left out: 1 page of 6 with a drawing of more than 2 MiB: 6.",
    )
    assert document.text == "one two\nthree\n"
    assert document.pages == ((0, 2), (8, 5))


def test_a_broken_page_does_not_spoil_the_others(tmp_path):
    content = pdf(pages_of(TEXT), packed=False)
    garbage = random.Random(2).randbytes(1500)
    document = read(tmp_path, "a.pdf", content[:800] + garbage + content[2300:])
    assert document.notes == (f"Left out: 1 page of {document.num_pages} of which the text cannot be read: 1.",)


def test_a_pdf_that_places_single_letters_has_whole_words(tmp_path):
    """As programs write it that set letters apart by less than a space and words by more."""
    line = b"[(B) -20 (r) -15 (i) -10 (dge ) 5 (re) -300 (port)] TJ 0 -12 Td "
    document = read(tmp_path, "a.pdf", pdf([b"BT /F1 10 Tf 40 750 Td " + 3 * line + b"ET"]))
    assert document.text.split() == 3 * ["Bridge", "re", "port"]


@pytest.mark.parametrize("text", ["a" * 30_000, TEXT.replace("\n", " ")], ids=["no space", "one line"])
def test_text_without_lines_or_spaces_is_text(tmp_path, text):
    assert read(tmp_path, "a.txt", text.encode()).text == text


CUT = "The file is broken or its end is missing. What could be found of it was read."


def test_a_pdf_whose_list_of_parts_is_missing_is_read_as_other_readers_do(tmp_path):
    content = pdf(pages_of(TEXT), packed=False)
    document = read(tmp_path, "a.pdf", content[: content.index(b"xref")])
    same_letters(document.text, TEXT)
    assert document.notes == (CUT,)


def test_of_a_pdf_that_was_cut_off_the_whole_pages_are_read_and_the_others_counted(tmp_path):
    lines = [part for line in TEXT.splitlines() for part in textwrap.wrap(line, 95)]
    contents = [page_of(lines[first : first + 20]) for first in range(0, len(lines), 20)]
    whole = pdf(contents, packed=False)
    # As many programs write it, the pages come first, which point to what is on them.
    start, pages, end = (
        whole.index(b"\n%d 0 obj" % number) for number in (4, 4 + len(contents), 3 + 2 * len(contents))
    )
    drawings = whole[start:pages]
    content = whole[:start] + whole[pages:end] + drawings[: drawings.index(b"\n6 0 obj") + 300]
    document = read(tmp_path, "a.pdf", content)
    same_letters(document.text, "".join(lines[:40]))
    num_pages = document.num_pages
    assert document.notes[0] == CUT
    assert (
        f"Left out: {num_pages - 2} pages of {num_pages} of which the text cannot be read: 3, 4, " in document.notes[-1]
    )


def test_bookmarks_are_headings(tmp_path):
    document = read(tmp_path, "a.pdf", pdf(pages_of(TEXT), bookmarks=[(1, "Start"), (3, "  The   end ")]))
    starts = dict(map(reversed, document.pages))
    assert document.headings == ((starts[1], "Start"), (starts[3], "The end"))


def test_a_pdf_from_right_to_left_says_that_its_order_may_be_wrong(tmp_path):
    # A font whose letters A to D are the Hebrew word for "bridge" and a space, as a PDF keeps it: from the left.
    cmap = b"""/CIDInit /ProcSet findresource begin begincmap 1 begincodespacerange <00> <ff> endcodespacerange
    4 beginbfchar <41> <05d2> <42> <05e9> <43> <05e8> <44> <0020> endbfchar endcmap"""
    content = pdf([b"BT /F1 10 Tf 40 750 Td (CBADCBA) Tj ET"], packed=False)
    font = b"/BaseFont /Helvetica"
    number = content.count(b" obj\n") + 1
    unicode_map = b"%d 0 obj\n<< /Length %d >>\nstream\n%s\nendstream\nendobj\nxref" % (number, len(cmap), cmap)
    content = content.replace(font, font + b" /ToUnicode %d 0 R" % number).replace(b"\nxref", b"\n" + unicode_map)
    document = read(tmp_path, "a.pdf", content)
    assert set(document.text.split()) <= {"גשר", "רשג"}
    assert document.notes[0].startswith("It holds text from right to left: ")


def test_a_word_document_keeps_headings(tmp_path):
    document = read(
        tmp_path,
        "report.docx",
        docx([("Heading1", "The bridge"), (None, "It holds &amp; stands."), ("Heading2", "End")]),
    )
    assert document.text.split("\n\n") == ["# The bridge", "It holds & stands.", "## End"]
    assert document.headings == ((0, "The bridge"), (document.text.index("##"), "End"))


def test_a_word_document_that_unpacks_to_too_much_is_refused(tmp_path):
    assert "unpacks to " in refusal(tmp_path, "a.docx", docx([(None, "x" * (result.MAX_BYTES + 1))]))


def test_a_web_page_is_its_text(tmp_path):
    page = (
        "<html><head><title>no</title><style>p{}</style></head><body><h1>The <b>bridge</b></h1><p>It_holds 2*3*4, "
        "says <a href='/x'>the report</a>.</p><script>alert(1)</script><table><tr><th>a</th></tr><tr><td>1</td></tr>"
        "</table><p>Größe &lt;b&gt;</p></body></html>"
    )
    document = read(tmp_path, "page.html", page)
    assert document.text.startswith("# The **bridge**\n\nIt_holds 2*3*4, says the report.\n\n| a |")
    assert document.text.endswith("Größe <b>")
    assert document.headings == ((0, "The **bridge**"),)
    assert "alert" not in document.text
    cyrillic = "<meta charset=windows-1251><p>Отчёт о мосте</p>".encode("cp1251")
    assert read(tmp_path, "page.htm", cyrillic).text == "Отчёт о мосте"
    assert read(tmp_path, "page.htm", cyrillic).notes == ("Read as Windows-1251.",)


def test_markdown_keeps_its_markup_and_has_headings_outside_of_code(tmp_path):
    text = "# One #\ntext <b>&amp;\n```\n# no heading\n```\n## Two\n#hash\n"
    document = read(tmp_path, "a.md", text)
    assert document.text == text
    assert document.headings == ((0, "One"), (text.index("## Two"), "Two"))


def slow_pdf(tmp_path):
    """A file of a few kB whose pages take seconds each."""
    return write(tmp_path, "slow.pdf", pdf([page(19_000)], times=1000))


def test_a_file_that_takes_too_long_is_given_up(tmp_path):
    began = time.monotonic()
    with pytest.raises(DocumentError, match=r"slow\.pdf takes longer than 1 s to read\. Give a part of it"):
        list(reading(slow_pdf(tmp_path), "slow.pdf", seconds=1))
    assert time.monotonic() - began < 3


def test_a_stop_is_obeyed_at_once(tmp_path):
    stopped = threading.Event()
    steps = reading(slow_pdf(tmp_path), stopped=stopped)
    assert next(step for step in steps if step) == (1, 1000)
    stopped.set()
    began = time.monotonic()
    with pytest.raises(Stopped):
        list(steps)
    assert time.monotonic() - began < 1


def test_too_much_text_in_a_small_pdf_is_refused(tmp_path):
    path = write(tmp_path, "a.pdf", pdf([page(200)], times=300))
    few = "import extract.pdf; extract.pdf.MAX_TEXT = 100_000; extract.main"
    program = PROGRAM.replace("import extract; extract.main", few)
    said = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout
    assert "holds more than 100,000 characters, the limit." in said.splitlines()[-1]
    assert len(said.splitlines()) < 10  # it did not go on to page 300


def test_a_pdf_that_unpacks_to_gigabytes_is_refused(tmp_path):
    bomb = zlib.compress(zlib.compress(bytes(200_000_000), 9), 9)
    content = pdf([bomb], packed=False).replace(b"<< /Length", b"<< /Filter [/FlateDecode /FlateDecode] /Length")
    assert "holds no text" in refusal(tmp_path, "a.pdf", content)


@pytest.mark.parametrize(
    ("name", "content", "library"),
    [
        ("a.pdf", pdf([page(3)]), "pypdf"),
        ("a.docx", docx([(None, "x")]), "mammoth"),
        ("a.html", "<p>x</p>", "markdownify"),
        ("a.txt", "é".encode("cp1252"), "charset_normalizer"),
    ],
    ids=["PDF", "Word", "HTML", "Windows-1252"],
)
def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch, name, content, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(extract.Refused, match=r'.*needs .+: pip install "hf-quest\[documents\]"$'):
        extract.extract(write(tmp_path, name, content))
