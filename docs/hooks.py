"""What mkdocs does not do by itself: it takes results and CHANGELOG.md into the site, and looks at what it has built.

A page that loads anything from elsewhere fails the build, and so does a public name that no page documents.
"""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODULES = ("hf_quest", "hf_quest.evaluation", "hf_quest.tiny")


def on_files(files, config):
    """Results are pages of their own, and their plots pictures; so tables can point to their conditions."""
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in (".md", ".svg", ".html", ".json"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    return files


def on_page_markdown(markdown, page, config, files):
    """The same links lead to results on the site as in the repository."""
    if page.file.src_uri.startswith("results/"):
        title = "" if markdown.startswith("# ") else f"# {Path(page.file.src_uri).stem}\n\n"
        return f"{title}{markdown}\n\n[Back to all results](../measured.md)\n"
    if page.file.src_uri == "changelog.md":  # which stands beside docs/ in the repository, and in it on the site
        return markdown.replace("](docs/", "](")
    return re.sub(r"(\]\()((?:\.\./)+)benchmarks/results/", lambda m: m[1] + m[2][3:] + "results/", markdown)


def on_post_build(config):
    pages = {path: path.read_text() for path in Path(config.site_dir).rglob("*.html") if path.parent.name != "results"}
    complaints = [*loaded_from_elsewhere(pages), *undocumented("".join(pages.values()))]
    if complaints:
        raise PluginError("\n".join(complaints))


def loaded_from_elsewhere(pages):
    """What a browser fetches by itself when it shows a page, if that is on another server."""
    for path, html in pages.items():
        links = re.findall(r"<link\b[^>]*>", html)
        loading = [link for link in links if not re.search(r'rel="?(canonical|next|prev)\b', link)]
        loading += re.findall(r"<(?:script|img|iframe|source|video|audio)\b[^>]*>", html)
        for tag in loading:
            if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag):
                yield f"{path.name} loads from elsewhere: {tag}"


def undocumented(html):
    """Public names, and public members of public classes, that no page has an entry of.

    What Transformers' own Cache declares is documented there.
    """
    import importlib

    from transformers import Cache

    entries = set(re.findall(r'\bid="?([\w.]+)', html))
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", "") == module_name
        ]
        for name in names:
            members = public_members(getattr(module, name))
            for each in (name, *(f"{name}.{member}" for member in members if not hasattr(Cache, member))):
                if f"{module_name}.{each}" not in entries:
                    yield f"{module_name}.{each} is public, and no page documents it."


def public_members(value):
    """The names of the methods and properties that a class of ours declares."""
    if not isinstance(value, type) or not value.__module__.startswith("hf_quest"):
        return []
    declared = {name: each for name, each in vars(value).items() if not name.startswith("_")}
    return [name for name, each in declared.items() if isinstance(each, (property, classmethod)) or is_function(each)]


def is_function(value):
    return callable(value) and not isinstance(value, type)
