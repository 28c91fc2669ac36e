"""Hooks of the documentation site: pages that lie outside docs/, the notebook as a page, and no file from elsewhere."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the site → file of the repository."""
EXTERNAL = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")
"""An element that makes a browser fetch something from another host."""


def on_config(config: Any) -> Any:
    """Lists pages that mkdocs.yml does not name among the guides, so that a new page is never left out."""
    named = set(re.findall(r"[\w-]+\.md", str(config.nav)))
    guides = next(entry["Guides"] for entry in config.nav if "Guides" in entry)
    guides += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages that are made of other files."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "analysis.md", content=_notebook(ROOT / "docs" / "analysis.ipynb")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Makes the repository's relative links those of the site."""
    if page.file.src_uri in OUTSIDE:
        markdown = re.sub(r"\]\((?:\.\./)?docs/", "](", markdown)
    for name, source in OUTSIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}", f"]({name}", markdown)
    return markdown.replace("](analysis.ipynb", "](analysis.md").replace("](../README.md", "](index.md")


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Refuses a page that would load anything from another host.

    Raises:
        PluginError: An element's source is not a file of the site.
    """
    for element in EXTERNAL.findall(output):
        if 'rel="canonical"' not in element:
            raise PluginError(f"{page.file.src_uri} loads a file from elsewhere: {element}")
    return output


def _notebook(path: Path) -> str:
    """A notebook's cells as Markdown; it keeps no outputs."""
    cells = json.loads(path.read_text())["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts) + "\n"
