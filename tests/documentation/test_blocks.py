"""Every block of code on the site runs: on small models, in order, each page in a folder of its own."""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest

from . import commands
from .blocks import CODE, INDENTED, ROOT, SHOWN, blocks, lines, pages, run, without_fences
from .stages import STAGES, stage

for package in ("transformers", "accelerate", "diffusers", "trl", "typer"):
    pytest.importorskip(package)

WITH_CODE = [page for page in pages() if any(block.language in CODE for block in blocks(page))]


@pytest.mark.parametrize("page", pages())
def test_blocks_say_what_they_are(page):
    assert {block.language for block in blocks(page)} <= {*CODE, *SHOWN}
    assert not INDENTED.findall(without_fences(page))  # such blocks have no language


@pytest.mark.filterwarnings("ignore")  # the libraries that pages are about warn about themselves
@pytest.mark.filterwarnings("error::peft.PeftWarning")
@pytest.mark.parametrize("page", WITH_CODE)
def test_every_block_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        done = run(page, {"__name__": "__main__", **stage(page, stack)}, commands.run)
    assert done == [block for block in blocks(page) if block.language in CODE]


def test_docstrings_show_no_code_that_would_not_run():
    texts = [(file, file.read_text(encoding="utf-8")) for file in (ROOT / "src").rglob("*.py")]
    assert not [file for file, text in texts if re.search(r"^\s*(```|>>> )", text, re.MULTILINE)]


def test_no_stage_is_set_for_a_page_without_code():
    assert set(STAGES) <= set(WITH_CODE)


def test_commands_are_split_as_a_shell_does():
    text = "make one && make two  # both\n# nothing\npeft train \\\n    --r 8\n"
    assert lines(text) == ["make one", "make two", "peft train --r 8"]


def test_an_unknown_command_is_no_code_that_runs():
    with pytest.raises(KeyError):
        commands.run("frobnicate --all")
