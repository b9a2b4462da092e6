"""The `peft` command: train, eval, generate.

Importing this package costs nothing: torch and transformers are loaded by the command that needs them, after
its options have been checked.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line; without typer and rich, say in one line how to get them."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        sys.exit(f"The peft command needs {' and '.join(missing)}. Install with: pip install 'peft[cli]'")
    from peft.cli.app import build_app

    build_app()()
