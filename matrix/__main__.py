"""`python -m matrix`: measure the installed library, write the table.

`--peer PYTHON` measures another interpreter's library with the same experiments and keeps its answers in `peer.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m matrix", description=__doc__)
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter with the other library")
    parser.add_argument("--rows", nargs="*", help="only these methods (printed, nothing is written)")
    parser.add_argument("--columns", nargs="*", help="only columns that contain one of these words")
    parser.add_argument("--json", type=Path, help="write the measurement to this file and stop")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "matrix.md")
    args = parser.parse_args()
    from .measure import measure

    if args.json or args.rows or args.columns:
        found = measure(args.rows, args.columns, verbose=not args.json)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return
    if args.peer:
        command = [args.peer, "-E", "-m", "matrix", "--json", str(HERE / "peer.json")]
        subprocess.run(command, check=True, cwd=HERE.parent)
    from .report import write

    write(measure(), json.loads((HERE / "peer.json").read_text()), args.output)


if __name__ == "__main__":
    sys.exit(main())
