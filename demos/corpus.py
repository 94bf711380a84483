"""Collects the text that the tiny model learns from: the HTML documentation of Debian packages, as plain ASCII lines.

    python demos/corpus.py .corpus

writes `.corpus/train.txt.xz` and `.corpus/heldout.txt.xz`, one paragraph, heading or line of code to a line and an
empty line between files. It needs apt-get, dpkg-deb and tar (Debian 12), and lxml. Whole files are held out, by the
hash of their path, and no paragraph of a held-out file is left in the training text. `--packages sqlite3-doc` takes
that one alone, for a trial.
"""

import argparse
import hashlib
import lzma
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

try:
    import lxml.etree
    import lxml.html
except ModuleNotFoundError:
    sys.exit("This needs lxml: pip install lxml")

PACKAGES = """
    anarchism apache2-doc asymptote-doc bind9-doc cmake-doc debian-handbook debian-policy debian-reference-en
    developers-reference erlang-doc exim4-doc-html gap-doc gimp-help-en git-doc kicad-doc-en libboost1.81-doc
    libglib2.0-doc libgtk-3-doc lilypond-doc-html linux-doc-6.1 llvm-14-doc maint-guide maxima-doc nodejs-doc
    octave-doc openjdk-17-doc postfix-doc postgresql-doc-15 python-django-doc python-pandas-doc python-scipy-doc
    python-sqlalchemy-doc python3.11-doc racket-doc rust-doc sqlite3-doc systemtap-doc
""".split()

# Documentation under licences that let its text be shipped again: PSF, PostgreSQL, public domain, BSD and MIT.
SHIPPED_PACKAGES = ("postgresql-doc-15", "python-django-doc", "python-sqlalchemy-doc", "python3.11-doc", "sqlite3-doc")

HELDOUT_ONE_IN = 50
SHIPPED_ONE_IN = 9
MAX_PACKAGE_CHARACTERS = 12_000_000
MAX_LINE_CHARACTERS = 4_000

NOISE = "//script|//style|//nav|//header|//footer|//form|//*[{}]".format(
    " or ".join(f"contains(@class,'{name}')" for name in ("toc", "nav", "sidebar"))
)
HEADINGS = {"dt", "h1", "h2", "h3", "h4", "h5", "h6"}
BLOCKS = {"p", "pre", "li", "dd", "blockquote", "td"} | HEADINGS
PUNCTUATION = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "¶": "", "→": "->"}
)


@dataclass(frozen=True)
class Page:
    """One documentation file as lines of text."""

    path: str
    lines: list[str]


def held_out(path: str) -> bool:
    """Whether the file at `path` (package first, such as `sqlite3-doc/usr/share/...`) is kept from training."""
    one_in = SHIPPED_ONE_IN if path.split("/")[0] in SHIPPED_PACKAGES else HELDOUT_ONE_IN
    return int(hashlib.sha1(path.encode()).hexdigest(), 16) % one_in == 0


def plain(text: str) -> str:
    """`text` in ASCII, with typographic quotes and dashes spelled plainly and everything else outside ASCII dropped."""
    return unicodedata.normalize("NFKD", text.translate(PUNCTUATION)).encode("ascii", "ignore").decode()


def block_lines(block: lxml.html.HtmlElement) -> list[str]:
    """The lines of one block element: all of a `pre`, one reflowed line of any other."""
    text = plain(block.text_content())
    if block.tag == "pre":
        return [line.rstrip()[:200].expandtabs(4) for line in text.splitlines() if line.strip()]
    line = " ".join(text.split())
    is_text = block.tag in HEADINGS or len(line.split()) >= 4
    return [line] if is_text and len(line) <= MAX_LINE_CHARACTERS else []


def is_innermost(block: lxml.html.HtmlElement) -> bool:
    return block.tag == "pre" or not any(child.tag in BLOCKS for child in block.iterdescendants())


def read_page(root: Path, path: Path) -> Page | None:
    """The text of one HTML file, or None where it is no English prose."""
    try:
        tree = lxml.html.document_fromstring(path.read_bytes())
    except (lxml.etree.ParserError, ValueError):
        return None
    for element in tree.xpath(NOISE):
        if element.getparent() is not None:
            element.drop_tree()
    lines: list[str] = []
    for block in tree.iter(*BLOCKS):
        if is_innermost(block) and not any(parent.tag == "pre" for parent in block.iterancestors()):
            lines.extend(block_lines(block))
    words = " ".join(lines).lower().split()
    if len(words) < 100 or words.count("the") < 0.025 * len(words):
        return None
    return Page(str(path.relative_to(root)), lines)


def download(folder: Path, packages: list[str]) -> None:
    """Downloads and unpacks the HTML files of every package below `folder`."""
    debs = folder / "deb"
    debs.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not list(debs.glob(f"{package}_*.deb"))]
    if missing and subprocess.run(["apt-get", "-q", "download", *missing], cwd=debs, check=False).returncode:
        sys.exit(f"apt-get cannot download {' '.join(missing)}: see above. These are packages of Debian 12.")
    for package in packages:
        target = folder / "files" / package
        if not target.exists():
            target.mkdir(parents=True)
            (deb,) = debs.glob(f"{package}_*.deb")
            archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
            subprocess.run(["tar", "-x", "-C", target, "--wildcards", "*.html"], stdin=archive.stdout, check=False)


def page_paths(root: Path, package: str) -> list[Path]:
    """The package's HTML files in an order that their names' hashes decide, without pages of source code."""
    paths = [path for path in (root / package).rglob("*.html") if path.is_file() and "/src/" not in str(path)]
    return sorted(paths, key=lambda path: hashlib.sha1(str(path.relative_to(root)).encode()).digest())


def read_package(root: Path, package: str) -> list[Page]:
    """The package's English pages, up to MAX_PACKAGE_CHARACTERS of text."""
    pages, characters = [], 0
    for path in page_paths(root, package):
        page = read_page(root, path)
        if page:
            pages.append(page)
            characters += sum(map(len, page.lines))
        if characters > MAX_PACKAGE_CHARACTERS:
            break
    return pages


def fingerprint(line: str) -> str:
    """What two near-identical lines share: their letters."""
    return re.sub(r"[^a-z]", "", line.lower())


def deduplicate(pages: list[Page]) -> list[Page]:
    """Drops each line that stood in an earlier page; short ones may come back a few times."""
    seen: Counter[str] = Counter()
    kept = []
    for page in pages:
        lines = []
        for line in page.lines:
            letters = fingerprint(line)
            if seen[letters] < (1 if len(letters) > 30 else 10):
                lines.append(line)
        seen.update({fingerprint(line) for line in lines})
        if sum(map(len, lines)) > 500:
            kept.append(Page(page.path, lines))
    return kept


def join(pages: list[Page]) -> str:
    return "\n\n".join("\n".join(page.lines) for page in pages) + "\n"


def write_text(path: Path, pages: list[Page]) -> None:
    with lzma.open(path, "wt", preset=4) as file:
        file.write(join(pages))
    print(f"{path}: {len(pages)} files, {sum(len(line) for page in pages for line in page.lines) / 1e6:.1f} MB")


def write_shipped(folder: Path, pages: list[Page], max_page_characters: int = 100_000) -> None:
    """Writes the held-out pages that may be shipped, and the list of their paths."""
    shipped = [page for page in pages if page.path.split("/")[0] in SHIPPED_PACKAGES]
    shipped = [page for page in shipped if sum(map(len, page.lines)) <= max_page_characters]
    (folder / "heldout.txt").write_text(join(shipped))
    (folder / "heldout_files.txt").write_text("".join(f"{page.path}\n" for page in shipped))
    print(f"shipped: {len(shipped)} files, {len(join(shipped)) / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    arguments = parser.parse_args()
    folder, packages = arguments.folder, arguments.packages
    for program in ("apt-get", "dpkg-deb", "tar"):
        if shutil.which(program) is None:
            sys.exit(f"This needs {program}: run it on Debian 12.")
    download(folder, packages)
    root = folder / "files"
    with ProcessPoolExecutor() as pool:
        found = pool.map(read_package, [root] * len(packages), packages)
        pages = [page for package in tqdm(found, total=len(packages)) for page in package]
    # Held-out pages come first, so that a paragraph found in both stays out of the training text.
    pages = deduplicate(sorted(pages, key=lambda page: not held_out(page.path)))
    heldout = [page for page in pages if held_out(page.path)]
    training = [page for page in pages if not held_out(page.path)]
    training.sort(key=lambda page: hashlib.sha1(page.path.encode()).digest())
    write_text(folder / "heldout.txt.xz", heldout)
    write_text(folder / "train.txt.xz", training)
    write_shipped(folder, heldout)


if __name__ == "__main__":
    main()
