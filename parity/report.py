"""The page about interchange: counts per method, and every exception with its reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .cases import Case, cases
from .reasons import reason

TOLERANCE = 1e-5
Answers = dict[str, dict[str, Any]]

HEAD = """# Adapter files between this library and the peer

Every method on every layout, on a model with a trained head and with a setting of one module: one library saves, the
other loads, computes, and saves again. `make parity` does it again (the peer is Hugging Face peft 0.21.2 in an
environment of its own). "Same" means: outputs within {tolerance:g} of their largest value, and the file saved again has
the same tensors, bit for bit, and the same fields. Compared are the {both} of {here} cases that both libraries can
make; the others exist here alone.

| | same | differ, for the reasons below | unexplained |
|---|---:|---:|---:|
| saved here, loaded there | {to[same]} | {to[known]} | {to[wrong]} |
| saved there, loaded here | {from_[same]} | {from_[known]} | {from_[wrong]} |
| saved here, loaded here | {own[same]} | {own[known]} | {own[wrong]} |

| method | compared | here -> there | there -> here |
|---|---:|---:|---:|
"""


def write(found: Answers, page: Path) -> int:
    """Write the page; 1 if anything is unexplained."""
    known = list(cases())
    both = [c for c in known if found["here"].get(c.name) == "" and found["there"].get(c.name) == ""]
    own = [c for c in known if found["here"].get(c.name) == ""]
    judged = {
        "to": {c: judge(c, found["to"][c.name]) for c in both},
        "from": {c: judge(c, found["from"][c.name]) for c in both},
        "own": {c: judge(c, found["own"][c.name], excused=False) for c in own},
    }
    counts = {way: Counter(kind for kind, _ in answers.values()) for way, answers in judged.items()}
    text = HEAD.format(
        tolerance=TOLERANCE, both=len(both), here=len(own), to=counts["to"], from_=counts["from"], own=counts["own"]
    )
    for method in dict.fromkeys(c.method for c in known):
        mine = [c for c in both if c.method == method]
        same = [sum(judged[way][c][0] == "same" for c in mine) for way in ("to", "from")]
        text += f"| {method} | {len(mine)} | {same[0]} | {same[1]} |\n"
    text += "\n## What differs\n\n" + _exceptions(judged)
    page.write_text(text)
    wrong = [
        f"{way}: {c.name}: {text}" for way, line in judged.items() for c, (k, text) in line.items() if k == "wrong"
    ]
    print("\n".join(wrong) or f"{len(both)} cases, both ways; {page}")
    return 1 if wrong else 0


def judge(case: Case, answer: Any, excused: bool = True) -> tuple[str, str]:
    """("same" | "known" | "wrong", what differs)."""
    if isinstance(answer, str):
        text = answer
    elif not answer["difference"] <= TOLERANCE:
        text = f"outputs differ by {answer['difference']:.1e}"
    else:
        changed = answer["tensors"] + answer["fields"]
        text = f"saved again, {', '.join(changed[:3])} differ" if changed else ""
    if not text:
        return "same", ""
    return ("known" if excused and reason(case.method, case.where) else "wrong"), text


def _exceptions(judged: dict[str, dict[Case, tuple[str, str]]]) -> str:
    places: dict[tuple[str, str], list[str]] = {}
    for answers in judged.values():
        for case, (kind, text) in answers.items():
            if kind != "same":
                key = (case.method, reason(case.method, case.where) or f"Unexplained: {text}")
                places.setdefault(key, []).append(case.where)
    lines = (f"- **{m}** ({', '.join(dict.fromkeys(where))}): {why}" for (m, why), where in places.items())
    return "\n".join(lines) + "\n"
