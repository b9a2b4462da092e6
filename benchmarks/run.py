"""Drives two interpreters in alternation and prints what each needed.

    python -m benchmarks --peer OTHER/bin/python [--only wrap decode] [--json FILE] [--markdown FILE] [--png FILE]

A third process, ours again, takes part in the repetitions (but of `methods`): its ratio to ours is the noise. Without
--peer, only ours is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.subjects  # noqa: F401  (registers the measures)
from benchmarks.measure import MEASURES, Measure
from benchmarks.picture import draw
from benchmarks.report import Result, markdown, text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "## Results"
AGAIN = "ours again"


class Side:
    """A worker process: one interpreter, kept alive through the whole run."""

    def __init__(self, name: str, python: str, path: str | None, log: Path) -> None:
        self.name, self.log = name, log
        paths = [str(ROOT), *([path] if path else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
            env=environment,
            cwd=tempfile.gettempdir(),
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request and its reply; {"error": ...} also when the process has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return {"error": f"the worker ended; its last words are in {self.log}"}

    def close(self) -> None:
        """Let the process end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(subject: Measure, sides: Sequence[Side], repeats: int) -> Result:
    """All repetitions of one measure, one step of every side at a time, the order turned each time."""
    sides = [side for side in sides if subject.noise or side.name != AGAIN]
    result = Result(subject, {side.name: [] for side in sides})
    for side in sides:
        side.ask("start", measure=subject.name)
    for turn in range(repeats):
        for side in [*sides[turn % len(sides) :], *sides[: turn % len(sides)]]:
            if side.name in result.errors:
                continue
            reply = side.ask("step")
            if "error" in reply:
                result.errors[side.name] = reply["error"]
            else:
                result.runs[side.name].append(reply["numbers"])
    for side in sides:
        side.ask("stop")
    return result


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ours", default=sys.executable, help="interpreter with this peft (default: the running one)")
    parser.add_argument("--peer", help="interpreter with the peft to compare with")
    parser.add_argument("--ours-path", default=str(ROOT / "src"), help="where ours lies, if it is not installed")
    parser.add_argument("--peer-path", help="where the peer lies, if it is not installed")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), metavar="NAME", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--repeats", type=float, default=1.0, help="factor on every measure's repetitions")
    parser.add_argument("--no-noise", action="store_true", help="leave out the third process")
    parser.add_argument("--json", type=Path, help="write every repetition's numbers here")
    parser.add_argument(
        "--markdown", type=Path, help=f"write the tables here; below the line '{RESULTS}' where the file has it"
    )
    parser.add_argument("--png", type=Path, help="draw ours over the peer's here")
    return parser.parse_args(argv)


def opened(options: argparse.Namespace, log: Path) -> list[Side]:
    """The processes that take part, each introduced on standard output."""
    sides = [Side("ours", options.ours, options.ours_path, log)]
    if options.peer:
        sides.append(Side("peer", options.peer, options.peer_path, log))
    if not options.no_noise:
        sides.append(Side(AGAIN, options.ours, options.ours_path, log))
    for side in sides:
        known = side.ask("hello")
        if "error" in known:
            raise SystemExit(f"{side.name}: {known['error']} (details: {log})")
        print(f"{side.name}: peft {known['peft']}, torch {known['torch']}")
    return sides


def machine() -> str:
    """What the numbers were measured on, in one line."""
    busy = f", {os.getloadavg()[0]:.1f} jobs running on average" if hasattr(os, "getloadavg") else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{busy}, one thread for each process, {platform.system()}."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen measures and report them as they finish."""
    options = arguments(argv)
    log = Path(tempfile.mkstemp(prefix="benchmarks-", suffix=".log")[1])
    sides, results = opened(options, log), []
    start = time.monotonic()
    for subject in (MEASURES[name] for name in options.only or MEASURES):
        begun = time.monotonic()
        result = compare(subject, sides, max(1, round(subject.repeats * options.repeats)))
        results.append(result)
        print(f"\n{text(result)}\n({subject.name}: {time.monotonic() - begun:.0f} s)", flush=True)
    for side in sides:
        side.close()
    print(f"\n{time.monotonic() - start:.0f} s; messages of the processes: {log}")
    if options.json:
        options.json.write_text(json.dumps([result.as_json() for result in results], indent=1) + "\n")
    if options.markdown:
        old = options.markdown.read_text() if options.markdown.exists() else ""
        before = old.partition(RESULTS)[0] + RESULTS if RESULTS in old else ""
        options.markdown.write_text("\n\n".join(filter(None, [before, machine(), markdown(results)])))
    if options.png and not draw(results, options.png):
        print("Nothing was measured on both sides: no picture.")
