"""The README as a package index shows it, where the files that it links to are not."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"!?\[([^]]*)\]\((?!https?://)[^)]*\)")  # to a file of the repository


class Readme(MetadataHookInterface):
    def update(self, metadata):
        text = (Path(self.root) / "README.md").read_text()
        metadata["readme"] = {"content-type": "text/markdown", "text": LINK.sub(r"\1", text)}
