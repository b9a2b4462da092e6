"""Docstrings and tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby


def markdown(doc: str) -> str:
    """A docstring as Markdown: what is indented is a block of its own, papers are links."""
    parts = []
    for kind, lines in groupby(doc.strip("\n").splitlines(), key=_kind):
        text = list(lines)
        if kind == "formula":
            parts.append("\n".join(["```text", *(line.removeprefix("    ") for line in text), "```"]))
        elif kind == "table":
            parts.append("\n".join(text))
        elif kind == "prose":
            parts.append(prose(" ".join(line.strip() for line in text)))
    return "\n\n".join(parts) + "\n"


def _kind(line: str) -> str:
    if not line.strip():
        return "blank"
    return "formula" if line.startswith("    ") else "table" if line.startswith("|") else "prose"


def prose(text: str) -> str:
    """Running text, in which only `code` and papers mean something."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else _plain(piece) for piece in pieces)


def _plain(text: str) -> str:
    text = re.sub(r"([\\*_<\[\]])", r"\\\1", text)
    return re.sub(r"arXiv[ :](\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def heading(doc: str) -> tuple[str, str]:
    """("IA3", "Learnt factors for ...") of a docstring that begins "IA3: learnt factors for ..."."""
    name, colon, rest = doc.strip().split("\n\n")[0].replace("\n", " ").partition(": ")
    return (name, rest[:1].upper() + rest[1:]) if colon else ("", name)


def has_formula(doc: str) -> bool:
    """Whether something in it is set apart."""
    return any(_kind(line) == "formula" for line in doc.splitlines())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown without bare bars."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(page: str) -> dict[str, list[list[str]]]:
    """{heading: rows} of the tables of a page, the head of each table first."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in page.splitlines():
        if line.startswith("## "):
            title = line[3:].strip()
        elif line.startswith("|") and not re.fullmatch(r"[|:\- ]+", line):
            found.setdefault(title, []).append([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found
