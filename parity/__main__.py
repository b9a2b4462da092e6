"""`python -m parity --peer PYTHON`: exchange adapters with another interpreter's library, write the table.

Exit status 1 if something differs that `parity.reasons` does not explain.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m parity", description=__doc__)
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter with the other library")
    parser.add_argument("--half", choices=["save", "load"], help="one half, in this interpreter")
    parser.add_argument("--folder", type=Path, help="where the adapters are (with --half)")
    parser.add_argument("--json", type=Path, help="where the answers go (with --half)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "interchange.md")
    args = parser.parse_args()
    if args.half:
        from . import exchange

        found = getattr(exchange, args.half)(args.folder)
        args.json.write_text(json.dumps({"library": peft.__file__, "found": found}))
        return 0
    if not args.peer:
        parser.error("name the other library's interpreter with --peer")
    from .report import write

    with tempfile.TemporaryDirectory() as folder:
        return write(both_ways(args.peer, Path(folder)), args.output)


def both_ways(peer: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What the steps answer: "here" and "there" save; "own" and "to" load what was saved here, "from" the other's."""
    found = {}
    for name, half, python, files in (
        ("here", "save", sys.executable, "ours"),
        ("there", "save", peer, "theirs"),
        ("own", "load", sys.executable, "ours"),
        ("to", "load", peer, "ours"),
        ("from", "load", sys.executable, "theirs"),
    ):
        adapters = folder / files
        answers = folder / f"{name}.json"
        alone = [] if python == sys.executable else ["-E"]  # a PYTHONPATH of ours is not the other's
        command = [python, *alone, "-m", "parity", "--half", half, "--folder", str(adapters), "--json", str(answers)]
        subprocess.run(command, check=True, cwd=ROOT)
        answer = json.loads(answers.read_text())
        if (answer["library"] == peft.__file__) != (python == sys.executable):
            raise SystemExit(f"{python} imports the library that is compared with: {answer['library']}")
        found[name] = answer["found"]
    return found


if __name__ == "__main__":
    sys.exit(main())
