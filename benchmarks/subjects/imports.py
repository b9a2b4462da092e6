"""What `import peft` costs on top of `import torch`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.measure import Numbers, measure

OPTIONAL = ("transformers", "accelerate", "huggingface_hub", "bitsandbytes")
PROBE = """
import json, sys, time
start = time.process_time()
import torch
own, before, start = time.process_time() - start, len(sys.modules), time.process_time()
{statement}
spent, loaded = time.process_time() - start, len(sys.modules) - before
optional = sum(name in sys.modules for name in {optional})
print(json.dumps([spent, loaded, optional, own]))
"""


def probe(statement: str) -> tuple[float, float, float, float]:
    """(seconds, modules, optional packages) that a statement adds to a process that has torch, and torch's seconds."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE.format(statement=statement, optional=OPTIONAL)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, modules, optional, own = json.loads(done.stdout.splitlines()[-1])
    return seconds, modules, optional, own


@measure(
    "import over torch",
    repeats=2,
    limits={"import peft": 0.05, "from peft import LoraConfig, get_peft_model": 0.05},
    ceilings={"share of torch's own|%": 3, "modules|": 40, "optional packages imported|": 0},
)
def imports() -> Iterator[Numbers]:
    """`import peft`, and the two names of most scripts, each in a fresh process."""
    while True:
        alone, modules, optional, own = probe("import peft")
        names, more, _, _ = probe("from peft import LoraConfig, get_peft_model")
        yield {
            "import peft": alone,
            "from peft import LoraConfig, get_peft_model": names,
            "share of torch's own|%": 100 * alone / own,
            "modules|": modules,
            "modules with the two names|": more,
            "optional packages imported|": optional,
        }
