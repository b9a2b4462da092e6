"""A page for each method, from its file: idea, formula, source, fields, and its cells of the capability matrix."""

from __future__ import annotations

import ast
import dataclasses
import enum
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from peft import PromptLearningConfig, registry

from .texts import has_formula, heading, markdown, prose, table, tables

ROOT = Path(__file__).resolve().parent.parent
METHODS = ROOT / "src" / "peft" / "methods"
SHARED = ("peft.config", "peft.target_config", "peft.methods.additive")  # fields that many methods have
FIRST = ("method", "model", "layer", "layers")  # of a method in several files, where its mathematics may be


def docstring(file: Path) -> str:
    """What a file says of itself."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One page.

    Arguments:
        name: the method's name in the registry and in the matrix, such as "ia3".
        title: its name in the field, such as "IA3".
        idea: what it does, in a line.
        doc: the docstring with its mathematics.
        parts: further files: their docstrings.
        config: its configuration; None for what is switched on in another's.
    """

    name: str
    title: str
    idea: str
    doc: str
    parts: tuple[str, ...] = ()
    config: type | None = None

    @property
    def uri(self) -> str:
        """Where the page is on the site."""
        return f"methods/{self.name}.md"


@cache
def entries() -> tuple[Entry, ...]:
    """All methods, by title."""
    found = [_registered(kind) for kind in registry.METHODS]
    known = {sys.modules[e.config.__module__].__file__ for e in found if e.config}
    for file in METHODS.glob("*.py"):
        if str(file) not in known and has_formula(docstring(file)):
            found.append(Entry(file.stem, *heading(docstring(file)), docstring(file)))
    return tuple(sorted(found, key=lambda e: e.title.lower()))


def _registered(kind: Any) -> Entry:
    """The page of a line of the registry."""
    config = registry.config_class(kind)
    file = METHODS.joinpath(*config.__module__.split(".")[2:]).with_suffix(".py")
    name = str(kind.value).lower()
    if file.parent == METHODS:
        return Entry(name, *heading(docstring(file)), docstring(file), config=config)
    files = [f for stem in FIRST if (f := file.parent / f"{stem}.py").exists() and has_formula(docstring(f))]
    first = files[0]
    others = [docstring(f) for f in sorted(file.parent.glob("*.py")) if f != first and _is_part(docstring(f))]
    title = re.sub(r"The configuration of (.+?)\..*", r"\1", docstring(file), flags=re.DOTALL)
    return Entry(
        name, title[:1].upper() + title[1:], heading(docstring(first))[1], docstring(first), (*others,), config
    )


def _is_part(doc: str) -> bool:
    """Whether a file of a method has something to say on its page: mathematics, or a table."""
    return "\n|" in doc or bool(heading(doc)[0] and (has_formula(doc) or "Source" in doc))


def page(entry: Entry) -> str:
    """The page of a method."""
    text = [f"# {entry.title}\n", markdown(entry.doc)]
    if entry.config is not None:
        text.append(f"## Configuration\n\n`peft.{entry.config.__name__}`, `peft_type` {entry.name.upper()}.\n")
        text.extend([_example(entry), _fields(entry.config), *map(_nested, _options(entry.config))])
    else:
        hosts = ", ".join(f"`{host}`" for host in _hosts(entry))
        text.append(f"## Configuration\n\n`use_{entry.name}=True` in {hosts}.\n")
        text.append(_code("LoraConfig", {f"use_{entry.name}": True, **TARGETS}))
    for doc in entry.parts:
        name, idea = heading(doc)
        text.append(f"## {name or idea.rstrip('.')}\n\n{markdown(doc)}")
    text.append(_abilities(entry.name))
    return "\n".join(text)


def _hosts(entry: Entry) -> list[str]:
    """The configurations that switch something on."""
    configs = [e.config for e in entries() if e.config is not None]
    return [c.__name__ for c in configs if f"use_{entry.name}" in {f.name for f in _of(c)}]


def overview() -> str:
    """The page that lists all methods."""
    rows = []
    for e in entries():
        cells = next(iter(_cells(e.name)[1].values()), {"merge_and_unload": ""})
        merges = cells["merge_and_unload"].partition(" ")[0]
        config = f"`{e.config.__name__}`" if e.config else f"`use_{e.name}` of others"
        rows.append([f"[{e.title}]({e.name}.md)", prose(e.idea), config, merges])
    head = ["method", "what it learns", "configuration", "merges"]
    return f"# Methods\n\n{INTRODUCTION}\n{table(head, rows)}"


INTRODUCTION = """Each page is made from the method's own file: its idea, formula and source, its fields, and what was
measured of it. What methods can do beside each other is in the [capability matrix](../matrix.md), what they reach on
one task in the [comparison](../comparison.md), and what the letters mean under [concepts](../concepts.md). `'` after a
matrix is its transpose, but W' and b' are the adapted weight and bias.
"""


# ---- fields ----------------------------------------------------------------------------------------------------------


def _fields(config: type) -> str:
    """Tables of a configuration's fields: its own, then what many methods have."""
    shared = {f.name for c in config.__mro__ if c.__module__ in SHARED and dataclasses.is_dataclass(c) for f in _of(c)}
    if PromptLearningConfig in config.__mro__:
        shared -= {f.name for f in _of(PromptLearningConfig)} - {f.name for f in _of(PromptLearningConfig.__mro__[1])}
    own = table(HEAD, (_row(f) for f in _of(config) if f.name not in shared))
    common = table(HEAD, (_row(f) for f in _of(config) if f.name in shared))
    folded = "".join(f"    {line}\n" for line in common.splitlines())
    return f'{own}\n??? note "Fields that many methods have"\n\n{folded}'


HEAD = ("field", "type", "default", "what it is")


def _of(config: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config)


def _row(field: dataclasses.Field[Any]) -> list[str]:
    kind = str(field.type if isinstance(field.type, str) else getattr(field.type, "__name__", field.type))
    return [
        f"`{field.name}`",
        f"`{kind.replace(' | ', ' or ')}`",
        _default(field),
        prose(field.metadata.get("help", "")),
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return ""
    return f"`{value.value!r}`" if isinstance(value, enum.Enum) else f"`{value!r}`".replace("|", "\\|")


def _options(config: type) -> list[type]:
    """Configurations that are values of a configuration's fields."""
    found = vars(sys.modules[config.__module__]).values()
    return [c for c in found if isinstance(c, type) and dataclasses.is_dataclass(c) and _is_option(c)]


def _is_option(kind: Any) -> bool:
    fields = _of(kind)
    return all("help" in f.metadata for f in fields) and "peft_type" not in {f.name for f in fields}


def _nested(option: type) -> str:
    return f"\n### {option.__name__}\n\n{prose(option.__doc__ or '')}\n\n{table(HEAD, map(_row, _of(option)))}"


TARGETS = {"target_modules": ["q_proj", "v_proj"]}

# ---- an example ------------------------------------------------------------------------------------------------------


def _example(entry: Entry) -> str:
    """A few lines that wrap a model, where no trained adapters have to be there before."""
    from matrix.rows import ROWS

    row, config = ROWS.get(entry.name), entry.config
    if config is None or row is None or row.prepare:
        return ""
    settings: dict[str, Any] = TARGETS if row.base == "layers" else row.settings
    if row.base == "layers" and not _can_be(config, settings):
        settings = {**row.settings, **settings}
    return _code(config.__name__, settings)


def _code(name: str, settings: dict[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items()).replace("'", '"')
    lines = [f"from peft import {name}, get_peft_model", "", f"model = get_peft_model(base, {name}({arguments}))"]
    return "\n".join(["```python", *lines, "model.print_trainable_parameters()", "```", ""])


def _can_be(config: type, settings: dict[str, Any]) -> bool:
    try:
        config(**settings)
    except (TypeError, ValueError):
        return False
    return True


# ---- the matrix ------------------------------------------------------------------------------------------------------


@cache
def _matrix() -> dict[str, list[list[str]]]:
    return tables((ROOT / "docs" / "matrix.md").read_text(encoding="utf-8"))


def _cells(name: str) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Layouts and abilities: {row of the matrix: {column: cell}}, for a method and its variants."""
    found = []
    for title in ("Layouts", "Abilities"):
        head, *rows = _matrix()[title]
        mine = (r for r in rows if name in (r[0].partition(":")[0], r[0].removeprefix("lora:")))
        found.append({r[0]: dict(zip(head[1:], r[1:], strict=True)) for r in mine})
    return found[0], found[1]


def _abilities(name: str) -> str:
    """The method's cells, and why some are empty."""
    parts = []
    for title, lines in zip(("Layouts", "Abilities"), _cells(name), strict=True):
        columns = next(iter(lines.values()), {})
        rows = [[column, *(line[column] for line in lines.values())] for column in columns]
        if any(cell != "-" for row in rows for cell in row[1:]):
            parts.append(f"### {title}\n\n{table(['', *lines], rows)}\n")
    if not parts:
        return ""
    reasons = [r for r in _matrix()["Why not"][1:] if set(r[1].split(", ")) & set(_cells(name)[1])]
    why = "".join(f"- {text} ({columns})\n" for text, _, columns in reasons)
    after = f"### Why not\n\n{why}\n" if why else ""
    return f"## What it can do\n\n{MEASURED}\n{''.join(parts)}{after}"


MEASURED = """Each cell is an experiment, of which the [capability matrix](../matrix.md) tells. After a bar: the other
library, where it differs.
"""
