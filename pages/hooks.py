"""What mkdocs asks while it builds the site (`mkdocs.yml` names this file)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from pages import files, methods, reference


def on_config(config: Any) -> Any:
    """The made pages in the navigation, and how-tos that `mkdocs.yml` does not name."""
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    others = sorted(f.name for f in Path(config.docs_dir).glob("*.md") if f.name not in named)
    next(item for item in config.nav if "How to" in item)["How to"].extend(others)
    made = {
        "METHODS": ("Methods", ["methods/index.md", *({entry.title: entry.uri} for entry in methods.entries())]),
        "REFERENCE": ("Reference", list(reference.pages())),
    }
    items = (made.get(title, (title, value)) for item in config.nav for title, value in item.items())
    config.nav = [{title: value} for title, value in items]
    return config


def on_files(found: Any, config: Any) -> Any:
    """The made pages beside those of `docs/`."""
    made = {**files.outside(), **reference.pages(), "methods/index.md": methods.overview()}
    made.update({entry.uri: methods.page(entry) for entry in methods.entries()})
    for place, text in made.items():
        found.append(File.generated(config, place, content=text))
    return found


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site needs them."""
    return files.linked(markdown, page.file.src_uri)
