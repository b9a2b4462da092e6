"""What `import peft` costs on top of `import torch`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.measure import Numbers, measure

OPTIONAL = ("transformers", "accelerate", "huggingface_hub", "bitsandbytes")
PROBE = """
import json, sys, time, torch
before, start = len(sys.modules), time.process_time()
{statement}
spent, loaded = time.process_time() - start, len(sys.modules) - before
optional = sum(name in sys.modules for name in {optional})
print(json.dumps([spent, loaded, optional]))
"""


def probe(statement: str) -> tuple[float, float, float]:
    """(seconds, modules, optional packages) that a statement adds to a fresh process that has torch."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE.format(statement=statement, optional=OPTIONAL)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, modules, optional = json.loads(done.stdout.splitlines()[-1])
    return seconds, modules, optional


@measure(
    "import over torch",
    repeats=3,
    limits={"import peft": 0.05, "from peft import LoraConfig, get_peft_model": 0.05},
    ceilings={"import peft": 0.15, "optional packages imported|": 0},
)
def imports() -> Iterator[Numbers]:
    """`import peft`, and the two names of most scripts, each in a fresh process."""
    while True:
        alone, modules, optional = probe("import peft")
        names, _, _ = probe("from peft import LoraConfig, get_peft_model")
        yield {
            "import peft": alone,
            "from peft import LoraConfig, get_peft_model": names,
            "modules|": modules,
            "optional packages imported|": optional,
        }
