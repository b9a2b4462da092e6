"""The table as Markdown: ours beside the peer's, the reasons, the counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .reasons import GAPS, reason

ABSENT = ("no (AttributeError)", "no (ImportError)", "no (MissingMethodError)")

HEAD = """# Capability matrix

Every method x every layout and ability, each cell an experiment that was run: `make matrix` runs them all again.
Measured with peft {ours[peft]}; the peer is Hugging Face peft {peers[peft]}, by the same experiments
(torch {ours[torch]}, CPU). A cell says what this library does and, where it differs, what the peer does after the bar.
`-` means that the question does not arise or that the mathematics forbids it; the reasons stand below.

- Layouts: wrapping works, the randomised adapter changes the output, and its tensors get a gradient.
- Storages: the same on a linear layer whose weight is quantised, and with the adapter disabled the base's own output,
  bit for bit.
- `exact`: bit for bit. `unmerge`: whether every frozen tensor is what it was before the merge.
- `mixed batch`: a name for each sample, against running each adapter alone. `ignored`: all samples got the active one.
- `compile fullgraph`: capture of one graph (backend `eager`), forward.

| | yes | no | does not arise |
|---|---:|---:|---:|
| this library | {0[yes]} | {0[no]} | {0[-]} |
| peer | {1[yes]} | {1[no]} | {1[-]} |
"""


def write(ours: dict[str, Any], peers: dict[str, Any], path: Path) -> None:
    """Write the page."""
    names = [n for n, line in ours["cells"].items() if not absent(line)]
    missing = [n for n in ours["cells"] if n not in names]
    columns = [*ours["layouts"], *ours["storages"], *ours["abilities"]]
    mine = {(r, c): settled(r, c, ours["cells"][r][c]) for r in names for c in columns}
    other = {(r, c): settled(r, c, peers["cells"][r][c]) for r in names for c in columns}
    text = [HEAD.format(counts(mine), counts(other), ours=ours["versions"], peers=peers["versions"])]
    for title in ("Layouts", "Storages", "Abilities"):
        group = ours[title.lower()]
        text.append(f"\n## {title}\n\n| method | {' | '.join(group)} |\n|{'---|' * (len(group) + 1)}\n")
        for r in names:
            text.append(f"| {r} | {' | '.join(cell(mine[r, c], other[r, c]) for c in group)} |\n")
    text.append("\n## Why not\n\n| what | methods | columns |\n|---|---|---|\n")
    for why, pairs in reasons(mine, ours["cells"]).items():
        rows, cols = dict.fromkeys(r for r, _ in pairs), dict.fromkeys(c for _, c in pairs)
        text.append(f"| {why} | {', '.join(rows)} | {', '.join(cols)} |\n")
    left = [f"{r}: {c}. {reason(r, c, GAPS) or a}" for (r, c), a in mine.items() if a.startswith("no")]
    text.append("\n## Missing\n\n" + ("" if left else "Nothing.\n"))
    text.extend(f"- {line}\n" for line in left)
    if missing:
        text.append(f"\nNot in this release: {', '.join(missing)}.\n")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(text))


def absent(line: dict[str, str]) -> bool:
    """Whether the library does not have the method at all."""
    return not any(a.startswith("yes") for a in line.values())


def settled(row: str, column: str, answer: str) -> str:
    """The answer, or "-" where the question does not arise or something forbids a yes."""
    forbidden = answer.startswith("no") and reason(row, column) is not None
    return "-" if answer == "n.a." or forbidden else answer


def counts(cells: dict[tuple[str, str], str]) -> dict[str, int]:
    kinds = [a.split()[0] for a in cells.values()]
    return {kind: kinds.count(kind) for kind in ("yes", "no", "-")}


def cell(mine: str, other: str) -> str:
    """Ours, and the peer's where it differs."""
    short = [a.replace("silently ", "").replace("yes (close)", "yes") for a in (mine, other)]
    same = short[0] == short[1] or mine.split()[0] == other.split()[0] == "-"
    return short[0] if same else f"{short[0]} \\| {short[1]}"


def reasons(mine: dict[tuple[str, str], str], answers: dict[str, dict[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """{reason: the cells it explains}."""
    found: dict[str, list[tuple[str, str]]] = {}
    for (row, column), answer in mine.items():
        why = reason(row, column) if answer == "-" else None
        if why is not None:
            found.setdefault(why, []).append((row, column))
    return found
