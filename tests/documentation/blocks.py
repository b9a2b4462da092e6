"""The code on the pages: found in their Markdown, and run as it stands there."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pages import files, methods

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^([ ]*)(`{3,})([\w-]*)[^\n]*\n(.*?)^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:\A|\n[ ]*\n)((?:[ ]{4}|\t)[^\s|][^\n]*)")  # a table may be indented
CODE = ("python", "bash")
SHOWN = ("text",)


@dataclass(frozen=True)
class Block:
    """What stands between two fences.

    Arguments:
        page: the file, from the root of the repository.
        line: its first line there.
        language: what the fence says.
        text: the code.
        output: what the page says that it prints: a block of text right behind it; None if there is none.
    """

    page: str
    line: int
    language: str
    text: str
    output: str | None = None


@cache
def pages() -> dict[str, str]:
    """{name: text} of all pages of the site, made ones too."""
    found = {f.relative_to(ROOT).as_posix(): f.read_text() for f in sorted((ROOT / "docs").rglob("*.md"))}
    found.update({file: (ROOT / file).read_text(encoding="utf-8") for file in files.OUTSIDE})
    found.update({f"docs/{entry.uri}": methods.page(entry) for entry in methods.entries()})
    return found


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """All blocks of a page, in order."""
    text, found, end = pages()[page], [], None
    for match in FENCE.finditer(text):
        _, _, language, code = match.groups()
        between = text[end : match.start()] if end is not None else "first"
        code = textwrap.dedent(code)
        if language == "text" and not between.strip() and found[-1].language in CODE:
            before = found.pop()
            found.append(Block(before.page, before.line, before.language, before.text, code))
        else:
            found.append(Block(page, text[: match.start()].count("\n") + 2, language, code))
        end = match.end()
    return tuple(found)


def without_fences(page: str) -> str:
    """The text of a page outside its blocks."""
    return FENCE.sub("", pages()[page])


def run(page: str, names: dict[str, Any], command: Callable[[str], None]) -> list[Block]:
    """Run a page's code from top to bottom in one namespace; each output that the page shows must be what is printed.

    Arguments:
        page: the file.
        names: what is there before the first block.
        command: runs a line of a shell.

    Returns the blocks that were run.
    """
    done = []
    for block in blocks(page):
        if block.language not in CODE:
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if block.language == "python":
                code = "\n" * (block.line - 1) + block.text  # errors show the line of the page
                exec(compile(code, block.page, "exec"), names)
            else:
                for line in lines(block.text):
                    command(line)
        if block.output is not None:
            printed = said.getvalue()
            same = doctest.OutputChecker().check_output(block.output, printed, OPTIONS)
            assert same, f"{page}:{block.line} prints\n{printed}"
        done.append(block)
    return done


OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def lines(text: str) -> list[str]:
    """The commands of a block: continued lines joined, comments gone, one for each part of a chain."""
    whole = re.sub(r"\s*\\\n\s*", " ", text)
    found = (re.sub(r"(^|\s)#.*", "", line).strip() for line in whole.splitlines())
    return [part.strip() for line in found if line for part in line.split("&&")]
