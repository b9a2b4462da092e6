"""`peft merge`: adapters into the files of a base model, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft.cli import report
from peft.cli.check import UsageError
from peft.cli.state import kept_quantize

if TYPE_CHECKING:
    from peft.cli.options import MergeOptions


def run(options: MergeOptions) -> int:
    """Merge, and say what was done."""
    from peft.stream import merge_checkpoint

    try:
        done = merge_checkpoint(options.base, options.adapter, options.out, options.weight or None, progressbar=True)
    except (ValueError, TypeError, RuntimeError, ImportError) as problem:  # of files that do not fit together
        raise UsageError(str(problem)) from problem
    for folder in options.adapter:
        kind = kept_quantize(Path(folder))
        if kind is not None:
            report.say(
                f"{folder} was trained on {kind} weights, and is merged into those that were quantised: answers may "
                "differ a little from those of training."
            )
    report.say(f"{done.folder}: {len(done.changed)} tensors changed, {done.size / 1e9:.2f} GB written.")
    if done.resumed:
        report.say(f"Kept from the interrupted merge: {', '.join(done.resumed)}")
    if done.added:
        report.say(f"New in the files: {', '.join(done.added)}")
    if done.left:
        report.say(f"Not copied from the base: {', '.join(done.left)}")
    return 0
