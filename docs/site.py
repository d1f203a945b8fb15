"""Hook of the site (mkdocs.yml): the pages that readers of a repository look for at its top."""

from __future__ import annotations

import pathlib
import re

from mkdocs.structure.files import File

# A README.md would take the place of index.md, so it has another name in the site.
TOP = {
    "about.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the pages at the repository's top, their links into docs/ made relative."""
    top = pathlib.Path(config.config_file_path).parent
    for name, source in TOP.items():
        text = _LINK.sub(_seen_from_docs, (top / source).read_text("utf-8"))
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links out of docs/ to the pages above lead to their place in the site."""
    if page.file.src_path in TOP:
        return markdown
    for name, source in TOP.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    return markdown


def _seen_from_docs(found: re.Match) -> str:
    return f"]({found[1].removeprefix('docs/')}{found[2] or ''})"
