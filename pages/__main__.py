"""Build the site into `build/site`, without a network: `python -m pages`; `python -m pages serve` shows it."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from .files import ROOT

SITE = ROOT / "build" / "site"
LOADED = re.compile(
    r'<(?:script|img|iframe|source|link rel="(?:stylesheet|preload|preconnect|icon)")[^>]*"((?:https?:)?//[^"]+)"'
)


def refuse(*asked: Any, **_: Any) -> NoReturn:
    """Stands for connecting, and for asking for an address, while the site is built."""
    raise OSError(f"The site is built without a network, and something asks for {asked[:2]}.")


def loaded_from_elsewhere(folder: Path) -> list[str]:
    """What browsers would load from other places to show the pages."""
    return [f"{file}: {url}" for file in sorted(folder.rglob("*.html")) for url in LOADED.findall(file.read_text())]


def main(command: str = "build") -> None:
    """Run mkdocs; a warning is an error."""
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # an announcement of a successor, by the theme
    from mkdocs.__main__ import cli

    os.chdir(ROOT)
    if command == "build":
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse  # type: ignore
    cli.main([command, "--strict"], standalone_mode=False)
    if command == "build" and (found := loaded_from_elsewhere(SITE)):
        sys.exit("\n".join(["The site loads from elsewhere:", *found]))


if __name__ == "__main__":
    main(*sys.argv[1:2])
