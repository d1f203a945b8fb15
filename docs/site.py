"""Hook of the site (mkdocs.yml): pages from the repository's top, and the notebook as a page."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File

# A README.md would take the place of index.md, so it has another name in the site.
TOP = {
    "about.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}
NOTEBOOK = "first-model"
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the pages at the repository's top, their links into docs/ made relative."""
    top = pathlib.Path(config.config_file_path).parent
    for name, source in TOP.items():
        text = _LINK.sub(_seen_from_docs, (top / source).read_text("utf-8"))
        files.append(File.generated(config, name, content=text))
    notebook = json.loads((top / "docs" / f"{NOTEBOOK}.ipynb").read_text("utf-8"))
    files.append(File.generated(config, f"{NOTEBOOK}.md", content=notebook_page(notebook)))
    return files


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: its text, its code, and what it printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fenced("python", source))
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                image = "".join(data["image/png"]).replace("\n", "")
                parts.append(f"![figure](data:image/png;base64,{image})")
            else:
                parts.append(
                    _fenced("text", "".join(output.get("text", data.get("text/plain", ""))))
                )
    return "\n\n".join(parts) + "\n"


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def on_page_markdown(markdown, page, config, files):
    """Links out of docs/ to the pages above lead to their place in the site."""
    if page.file.src_path in TOP:
        return markdown
    for name, source in TOP.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    return markdown


def _seen_from_docs(found: re.Match) -> str:
    return f"]({found[1].removeprefix('docs/')}{found[2] or ''})"
