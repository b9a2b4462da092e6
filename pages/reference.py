"""The reference: every public name of the package and of its rooms, with its docstring, which mkdocstrings sets."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from .texts import prose, table

# What the pages are called, and the modules whose names they hold: the first that fits counts.
PAGES: dict[str, tuple[str, str]] = {
    "wrapping": ("Wrapping a model", "create core.targets core.kappa core.state status"),
    "models": ("Models", "model heads mixed_model auto"),
    "files": ("Adapter files", "core.checkpoint core.base_state"),
    "merging": ("Merging files", "stream"),
    "algebra": ("Between adapters", "algebra"),
    "hotswap": ("Swapping and pools", "hotswap"),
    "convert": ("Other formats", "convert"),
    "inspection": ("Looking into adapters", "inspection"),
    "optimizers": ("Optimisers", "optimizers"),
    "configurations": ("Configurations", "config target_config types registry"),
    "methods": ("What belongs to methods", "methods tuners"),
    "errors": ("Errors and warnings", "errors"),
    "helpers": ("Helpers", "utils helpers functional core"),
}
ROOMS = ("", "algebra", "convert", "helpers", "hotswap", "inspection", "optimizers", "stream", "utils", "utils.other")
BRIEF = "methods"  # classes of this page are shown without their members


@cache
def public() -> dict[str, Any]:
    """{name as a user imports it: object} of all that is documented: functions and classes."""
    found: dict[str, Any] = {}
    for room in ROOMS:
        module = import_module(f"peft.{room}".rstrip("."))
        for name in _names(module):
            thing = getattr(module, name)
            if (inspect.isclass(thing) or inspect.isroutine(thing)) and place(thing).startswith("peft."):
                found.setdefault(place(thing), (f"{module.__name__}.{name}", thing))
    return {name: thing for name, thing in found.values()}


def _names(module: ModuleType) -> list[str]:
    """What a module shows: what it lists, or defines."""
    own = [n for n, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
    return sorted(n for n in getattr(module, "__all__", own) if not n.startswith("_"))


def place(thing: Any) -> str:
    """Where something is defined: "peft.create.get_peft_model"."""
    return f"{thing.__module__}.{thing.__qualname__}"


def page_of(thing: Any) -> str:
    """The page that shows it. Raises KeyError for a module that no page is about."""
    module = thing.__module__.removeprefix("peft.")
    for page, (_, modules) in PAGES.items():
        if any(module == m or module.startswith(f"{m}.") for m in modules.split()):
            return page
    raise KeyError(f"No page of the reference is about {thing.__module__}: give it one in PAGES of {__file__}.")


def pages() -> dict[str, str]:
    """{place on the site: text} of the reference."""
    shown: dict[str, list[str]] = {page: [] for page in PAGES}
    for name, thing in public().items():
        shown[page_of(thing)].append(_entry(name, thing))
    made = {f"api/{page}.md": f"# {PAGES[page][0]}\n\n{''.join(entries)}" for page, entries in shown.items() if entries}
    return {"api/index.md": _index(), **made}


def _entry(name: str, thing: Any) -> str:
    brief = page_of(thing) == BRIEF and inspect.isclass(thing)
    options = ["options:", f"  heading: {name}", f"  toc_label: {name.removeprefix('peft.')}"]
    options += ["  members: false"] * brief
    return "\n".join([f"::: {place(thing)}", *(f"    {line}" for line in options), "\n"])


def _index() -> str:
    """All names, each with its first line."""
    parts = [f"# Reference\n\n{INTRODUCTION}"]
    for page, (title, _) in PAGES.items():
        rows = [
            [f"[`{name}`]({page}.md#{place(thing)})", _first(thing)]
            for name, thing in public().items()
            if page_of(thing) == page
        ]
        if rows:
            parts.append(f"## {title}\n\n{table(['name', 'what it is'], rows)}")
    return "\n".join(parts)


def _first(thing: Any) -> str:
    text = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    return prose(text).replace("|", "\\|")


INTRODUCTION = """Every public name, as it is imported. What the fields of a method's configuration mean is on
[its page](../methods/index.md).
"""
