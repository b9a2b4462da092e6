"""`peft convert`: an adapter in the format of another program."""

from __future__ import annotations

from peft.cli import report
from peft.cli.check import UsageError
from peft.cli.options import ConvertOptions


def run(options: ConvertOptions) -> int:
    """Convert, and say what was written, what was expressed in another way and what was left out."""
    from peft.convert import convert_adapter

    done = convert_adapter(
        options.adapter,
        options.to,
        options.out,
        source=options.source,
        base=options.base,
        component=options.component,
        rank=_rank(options.rank),
        drop=options.drop,
        overwrite=options.overwrite,
    )
    report.say(f"{done.source} to {done.target}: {done.layers} targets.")
    for line in done.folded:
        report.say(f"Expressed in another way: {line}.")
    for what, keys in done.dropped.items():
        report.say(f"Left out: {what}; {len(keys)} tensors.")
    for line in done.notes:
        report.say(line)
    for file in done.files:
        report.say(f"Wrote {file}")
    return 0


def _rank(text: str | None) -> float | None:
    """16 as a rank, 0.99 or 1.0 as a share."""
    if text is None:
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise UsageError(f"--rank {text}: give a whole number (16), or a share (0.99).") from None
