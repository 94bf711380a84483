"""Plain text and Markdown, in the encoding that its first bytes name or that it looks like."""

import codecs
import re

from .result import INSTALL, Refused, cleaned

MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"))
MARKS += ((codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"))
WIDE = ("utf_16_le", "utf_16_be")
# Those of two that fit a text equally well come first that more files have.
NARROW = "cp1252 gb18030 big5 cp932 cp949 euc_jp cp1251 cp1250 cp1253 cp1254 cp1255 cp1256 koi8_r".split()
SPOKEN = {"utf_16_le": "UTF-16", "utf_16_be": "UTF-16", "gb18030": "GB18030", "big5": "Big5", "cp932": "Shift JIS"}
SPOKEN |= {"euc_jp": "EUC-JP", "cp949": "CP949", "koi8_r": "KOI8-R"}
SIGNATURES = {
    b"%PDF-": "is a PDF, by what it holds. Give it a name that ends in .pdf.",
    b"PK\x03\x04": "is a ZIP file, by what it holds. If it is a Word document, give it a name that ends in .docx.",
}
NUM_EXAMPLES, LONGEST = (
    3,
    12,
)  # words, and their characters, by which a reader sees whether an encoding was guessed right


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
        return text, f"{spoken(encoding)}, which it looks like{examples(text)}. If letters are wrong, save it as UTF-8"
    raise Refused("is a binary file, or text in an unknown encoding. Save it as UTF-8 text.")


def spoken(encoding):
    """The name that people know an encoding by."""
    return SPOKEN.get(encoding, re.sub(r"^(?:cp|windows-)125(\d)$", r"Windows-125\1", encoding))


def examples(text):
    """Some words whose letters would be wrong in another encoding."""
    found = dict.fromkeys(word[:LONGEST] for word in re.findall(r"\w+", text) if not word.isascii())
    return f", with words such as {', '.join(list(found)[:NUM_EXAMPLES])}" if found else ""


def least_chaos(matches):
    return min((round(match.chaos, 2) for match in matches), default=0)


def same_text(content, *encodings):
    """Whether both can read it, and read the same."""
    try:
        first, second = (content.decode(encoding) for encoding in encodings)
    except UnicodeDecodeError:
        return False
    return first == second


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
