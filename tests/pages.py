"""README.md and the pages of docs/: what is shown in them, for the tests that hold them to it."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *DOCS]


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(program):
    """The words of every command of `program` that a page shows, each once."""
    found = {}
    for page in PAGES:
        lines = (line.partition("#")[0].strip() for block in blocks(page, "sh") for line in block.splitlines())
        inline = re.findall(rf"`({program} [^`]+)`", page.read_text())
        found |= {command: shlex.split(command) for command in (*lines, *inline) if command.startswith(f"{program} ")}
    return list(found.values())
