"""Folders that hold base models, made once."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its parts under trial are tested too


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A saved Llama with its tokenizer: every model is read from the same files."""
    from . import tiny

    folder = tmp_path_factory.mktemp("llama")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
