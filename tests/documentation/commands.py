"""Lines of a shell on the pages: run where this machine can, otherwise read by the program that would run them."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(line: str) -> None:
    """Run a command in the current folder. Raises AssertionError if it fails, KeyError if nothing here knows it."""
    words = shlex.split(line)
    words[0] = words[0].removeprefix(".venv/bin/")
    PROGRAMS[words[0]](words[1:])


def peft(words: list[str]) -> None:
    """The command line itself, in this process."""
    from typer.testing import CliRunner

    from peft.cli.app import build_app

    found = CliRunner().invoke(build_app(), words)
    assert found.exit_code == 0, f"peft {' '.join(words)}\n{found.output}\n{found.exception!r}"
    print(found.output)


def python(words: list[str]) -> None:
    """`python -m MODULE` and `python FILE`."""
    if words[:2] == ["-m", "peft"]:
        return peft(words[2:])
    if words[:2] == ["-m", "venv"]:
        return None
    name = words[1].replace(".", "/") if words[0] == "-m" else words[0].removesuffix(".py")
    file = next(f for f in (ROOT / f"{name}.py", ROOT / name / "__main__.py") if f.exists())
    ast.parse(file.read_text(encoding="utf-8"))
    options = {word for word in words if word.startswith("--")}
    sources = "".join(f.read_text(encoding="utf-8") for f in file.parent.glob("*.py"))
    assert all(f'"{option}"' in sources for option in options), f"{words[0]} has no {options}"
    return None


def torchrun(words: list[str]) -> None:
    """torch's launcher reads its options; what it would start runs as one process."""
    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(words)
    assert read.module
    python(["-m", read.training_script, *read.training_script_args])


def accelerate(words: list[str]) -> None:
    """accelerate's launcher, likewise."""
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    read = launch_command_parser().parse_args(words[1:])
    assert read.module
    python(["-m", read.training_script, *read.training_script_args])


def make(words: list[str]) -> None:
    """Every target is one of the Makefile's, and every variable one that it reads."""
    if shutil.which("make") is not None:
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{word.partition('=')[0]}\b", text, re.MULTILINE) for word in words)


def pip(words: list[str]) -> None:
    """Extras and files that are asked for exist."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = re.findall(r"^(\w+) = \[", project, re.MULTILINE)
    for word in words:
        extras = re.fullmatch(r"\.\[(.+)\]", word)
        assert not extras or set(extras[1].split(",")) <= set(known), word
        assert not word.startswith("requirements/") or (ROOT / word).exists(), word


def bash(words: list[str]) -> None:
    """A script of the repository, of which the shell reads every line."""
    done = subprocess.run(["bash", "-n", str(ROOT / words[0])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def elsewhere(words: list[str]) -> None:
    """Fetching the repository takes a network."""


PROGRAMS = {
    "accelerate": accelerate,
    "bash": bash,
    "cd": elsewhere,
    "git": elsewhere,
    "make": make,
    "peft": peft,
    "pip": pip,
    "pre-commit": elsewhere,
    "python": python,
    "torchrun": torchrun,
}
