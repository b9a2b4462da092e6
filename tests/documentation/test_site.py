"""What is made for the site: a page for each method, the reference, links, and nothing that a browser must fetch."""

from __future__ import annotations

import dataclasses
import posixpath
import re

import pytest
import yaml

import peft
from pages import files, methods, reference
from pages.__main__ import LOADED
from pages.texts import heading, markdown, tables
from peft import PeftType, registry

from .blocks import ROOT, pages, without_fences

ENTRIES = {entry.name: entry for entry in methods.entries()}
REGISTERED = [str(kind.value).lower() for kind in registry.METHODS]
each_method = pytest.mark.parametrize("name", REGISTERED)
UNCITED = {"deft", "shadow", "trainable_tokens"}  # their files name no paper
BY_NAME = {"hira", "adamss", "frod"}  # and these one without a number at arXiv


def places() -> dict[str, str]:
    """{place on the site: text} of all pages, with links as the site needs them."""
    found = {f.relative_to(ROOT / "docs").as_posix(): f.read_text() for f in (ROOT / "docs").rglob("*.md")}
    found.update(files.outside(), **reference.pages())
    found.update(
        {entry.uri: methods.page(entry) for entry in ENTRIES.values()}, **{"methods/index.md": methods.overview()}
    )
    return {place: files.linked(text, place) for place, text in found.items()}


@each_method
def test_every_method_has_a_page_with_its_formula_source_fields_and_cells(name):
    text = methods.page(ENTRIES[name])
    assert text.startswith(f"# {ENTRIES[name].title}\n") and "```text\n" in text
    assert ("https://arxiv.org/abs/" in text) == (name not in UNCITED | BY_NAME)
    for field in dataclasses.fields(registry.config_class(name.upper())):
        assert f"| `{field.name}` |" in text
    assert "## What it can do" in text and "| trains | yes |" in re.sub(r"(?<=yes) \|.*", " |", text)


def test_the_overview_names_every_method_once():
    rows = tables(methods.overview().replace("# Methods", "## Methods"))["Methods"][1:]
    found = [row[0].partition("](")[2].removesuffix(".md)") for row in rows]
    assert sorted(found) == sorted(ENTRIES) and set(REGISTERED) <= set(found)


def test_pages_follow_the_registry(monkeypatch):
    fewer = {kind: method for kind, method in registry.METHODS.items() if kind != PeftType.OFT}
    monkeypatch.setattr(registry, "METHODS", fewer)
    methods.entries.cache_clear()
    try:
        assert {e.name for e in methods.entries() if e.config} == set(REGISTERED) - {"oft"}
    finally:
        methods.entries.cache_clear()


def test_every_public_name_is_in_the_reference_once():
    text = "".join(text for place, text in reference.pages().items() if place != "api/index.md")
    shown = re.findall(r"^::: (\S+)", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    named = {thing for name in peft.__all__ if callable(thing := getattr(peft, name))}
    assert {reference.place(thing) for thing in named} <= set(shown)


def test_every_link_leads_to_a_page():
    found = places()
    known = {*found, *(f.relative_to(ROOT / "docs").as_posix() for f in (ROOT / "docs").rglob("*.*"))}
    for place, text in found.items():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            there = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
            assert "://" in target or there in known, f"{place}: {target}"


def test_the_navigation_names_pages_that_exist():
    said = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+\.md", said.partition("\nnav:")[2]))
    assert yaml.safe_load(said)["theme"]["font"] is False
    assert named <= set(places())
    assert {"methods/index.md", "api/index.md", *files.OUTSIDE.values()} <= named


def test_formulas_papers_and_signs_become_markdown():
    doc = "IA3: learnt factors.\n\n    W' = diag(l) W\n\nl_j in [0, 1) and `l_j`: Liu 2022, arXiv 2205.05638.\n"
    assert heading(doc) == ("IA3", "Learnt factors.")
    assert markdown(doc) == (
        "IA3: learnt factors.\n\n```text\nW' = diag(l) W\n```\n\nl\\_j in \\[0, 1) and `l_j`: Liu 2022, "
        "[arXiv 2205.05638](https://arxiv.org/abs/2205.05638).\n"
    )


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/methods/ia3.md"])
def test_pages_of_the_repository_are_pages_of_the_site(page):
    assert page in pages() and without_fences(page)


def test_what_a_browser_would_fetch_is_found():
    assert LOADED.findall('<script src="https://cdn.example/a.js">') == ["https://cdn.example/a.js"]
    assert LOADED.findall('<link rel="stylesheet" href="//fonts.example/a.css">') == ["//fonts.example/a.css"]
    assert not LOADED.findall('<a href="https://arxiv.org/abs/2106.09685"> <script src="../a.js">')
