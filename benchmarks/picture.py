"""All measures as one picture: what ours needs of what the peer needs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import OVER
from benchmarks.report import Result, shown, unit_of

LEAST = 1e-3  # shares below it are drawn as this


def drawn(results: list[Result]) -> list[tuple[str, float, str]]:
    """(name, share of the peer, both values in words) of every number that both sides have."""
    found = []
    for result in results:
        ours, peer = result.best("ours"), result.best("peer")
        for key, value in ours.items():
            told = f"{key}{OVER}" in ours or "added to bare" in key  # by its multiple of the bare model
            if key == "bare" or told or not peer.get(key) or value < 0:
                continue
            unit = unit_of(result.subject, key)
            words = f"{shown(value, unit)} : {shown(peer[key], unit)}"
            found.append((f"{result.subject.name}: {key.split('|')[0]}", value / peer[key], words))
    return found


def draw(results: list[Result], file: Path) -> bool:
    """Write the picture; False where nothing was measured on both sides."""
    bars = drawn(results)[::-1]
    if not bars:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.2 * len(bars) + 1.2), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = [max(share, LEAST) for _, share, _ in bars]
    colours = ["#2a7f62" if share <= 1 else "#b5452c" for share in shares]
    axes.barh(range(len(bars)), [share - LEAST for share in shares], left=LEAST, color=colours, height=0.7)
    axes.set_xscale("log")
    axes.set_xlim(LEAST, max(4.0, 1.5 * max(shares)))
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=6)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    for place, (_, share, words) in enumerate(bars):
        axes.text(max(share, LEAST) * 1.05, place, f"{share:.2g}   ({words})", va="center", fontsize=5)
    axes.set_xlabel("ours over the peer (less is better); in brackets ours : peer")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=130, metadata={"Software": None})
    return True
