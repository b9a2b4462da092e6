"""Pages that lie at the root of the repository or beside the code, and links between all of them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Files outside `docs/` -> their place on the site.
OUTSIDE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
}
ORIGIN = {place: file for file, place in OUTSIDE.items()}
LINK = re.compile(r"(\]\()([^)#\s]+\.\w+)(#[^)\s]*)?(\))")


def outside() -> dict[str, str]:
    """{place on the site: text} of the files outside `docs/`."""
    return {place: (ROOT / file).read_text(encoding="utf-8") for file, place in OUTSIDE.items()}


def origin(place: str) -> str:
    """The file in the repository that a page is made from, where it is made from one."""
    return ORIGIN.get(place, f"docs/{place}")


def linked(text: str, place: str) -> str:
    """The text of a page with links as the site needs them; in the repository they lead from file to file.

    Arguments:
        text: Markdown.
        place: where the page is on the site, such as "methods/ia3.md".
    """
    here = posixpath.dirname(origin(place))

    def turned(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        if "://" in target:
            return match[0]
        file = posixpath.normpath(posixpath.join(here, target))
        there = OUTSIDE.get(file, posixpath.relpath(file, "docs"))
        return f"{before}{posixpath.relpath(there, posixpath.dirname(place) or '.')}{anchor or ''}{after}"

    return LINK.sub(turned, text)
