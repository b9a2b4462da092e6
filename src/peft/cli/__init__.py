"""The `peft` command: train, eval, generate.

Importing this package costs nothing: torch and transformers are loaded by the command that needs them, after
its options have been checked.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line; without typer and rich, say in one line how to get them."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        sys.exit(f"The peft command needs {' and '.join(missing)}. Install with: pip install 'peft[cli]'")
    share_cores()
    from peft.cli.app import build_app

    build_app()()


def share_cores() -> None:
    """Let waiting OpenMP threads sleep; call it before torch is imported.

    By default they spin, and on a machine that others use too they keep the cores from the threads they wait for:
    a training step then takes up to ten times as long. On a quiet machine the difference is small.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
