"""One interpreter's end of the comparison: reads a request per line, answers with a line of JSON.

Requests: {"do": "hello"}, {"do": "start", "measure": name}, {"do": "step"}, {"do": "stop"}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks.measure import MEASURES, Numbers


class Worker:
    """Holds the measure that is under way."""

    def __init__(self) -> None:
        self.steps: Iterator[Numbers] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request; whatever goes wrong becomes {"error": text}."""
        try:
            return getattr(self, request["do"])(**{k: v for k, v in request.items() if k != "do"})
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}

    def hello(self) -> dict[str, Any]:
        """Which peft and torch this interpreter has."""
        import torch

        import peft

        return {
            "peft": peft.__version__,
            "where": os.path.dirname(str(peft.__file__)),
            "torch": torch.__version__,
        }

    def start(self, measure: str) -> dict[str, Any]:
        """Choose a measure; its set-up runs with the first step."""
        import torch

        torch.manual_seed(0)
        self.steps = MEASURES[measure].steps()
        return {"ok": True}

    def step(self) -> dict[str, Any]:
        """One repetition."""
        assert self.steps is not None, "start comes first"
        return {"numbers": next(self.steps)}

    def stop(self) -> dict[str, Any]:
        """Let go of the measure's models."""
        self.steps = None
        gc.collect()
        return {"ok": True}


def main() -> None:
    """Serve until standard input ends. What libraries print goes to standard error."""
    import torch

    import benchmarks.subjects  # noqa: F401  (registers the measures)

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
