"""What adapters cost on a GPU: decoding under CUDA graphs, a training step, a batch of 64 adapters.

    python -m benchmarks.gpu [--peer OTHER/bin/python] [--repeats 5] [--only decode train mixed] [--json FILE]

The model has the shape of a Llama of a billion parameters and is in bf16. Every figure is the wall time between two
waits for the device, the smallest of all repetitions, as a multiple of the bare frozen model's in the same process. The
library is measured twice, with its Triton kernels and with PEFT_KERNELS=torch, and the peer beside them; repetitions
are taken in turns. Without a GPU nothing is measured, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
NO_GPU = "There is no GPU here, so nothing was measured: torch.cuda.is_available() is False."
Numbers = dict[str, float]


class Sizes(NamedTuple):
    """A model and what it is given."""

    layers: int = 16
    hidden: int = 2048
    inner: int = 8192
    heads: int = 32
    vocabulary: int = 32000
    batch: int = 4
    tokens: int = 512
    adapters: int = 64
    rank: int = 16

    def model(self, device: str) -> Any:
        """The frozen model, in bf16."""
        import torch

        from benchmarks.models import Llama, frozen

        torch.manual_seed(0)
        with torch.device(device):
            return frozen(Llama(self.layers, self.hidden, self.inner, self.heads, self.vocabulary).bfloat16())

    def adapted(self, device: str, **options: Any) -> Any:
        """The same model with an adapter on every linear layer, B not zero."""
        from benchmarks.models import ALL_LINEAR
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, target_modules=ALL_LINEAR, **options)
        return awake(get_peft_model(self.model(device), config))


def awake(model: Any) -> Any:
    """The model with every B drawn, so that the adapters do something."""
    import torch

    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return model


def seconds(work: Callable[[], object], times: int) -> float:
    """Wall time of one call, the mean of several in a row, from one wait for the device to the next."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) / times


def recorded(model: Any, x: Any) -> Callable[[], object]:
    """One forward as a CUDA graph; the forward itself where there is no GPU."""
    import torch

    with torch.no_grad():
        for _ in range(3):
            model(x)
        if x.device.type != "cuda":
            return torch.no_grad()(lambda: model(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
    return graph.replay


def decode(sizes: Sizes, device: str) -> Iterator[Numbers]:
    """One token without gradients, under a CUDA graph."""
    import torch

    x = torch.zeros(1, 1, dtype=torch.long, device=device)
    models = {"bare": sizes.model(device).eval(), "r16": sizes.adapted(device).eval()}
    replays = {name: recorded(model, x) for name, model in models.items()}
    while True:
        yield {name: seconds(replay, 20) for name, replay in replays.items()}


def train(sizes: Sizes, device: str) -> Iterator[Numbers]:
    """Forward, backward and a step of AdamW; the bare model's has gradients of the embeddings alone."""
    import torch

    x = torch.randn(sizes.batch, sizes.tokens, sizes.hidden, device=device, dtype=torch.bfloat16)
    ways: dict[str, dict[str, Any]] = {"r16": {}, "r16, dropout": {"lora_dropout": 0.1}, "DoRA": {"use_dora": True}}
    bare = sizes.model(device)

    def step(model: Any, optimizer: Any = None) -> None:
        model(x.detach().requires_grad_()).float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    while True:
        step(bare)
        numbers = {"bare": seconds(lambda: step(bare), 2)}
        for name, options in ways.items():
            model = sizes.adapted(device, **options).train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            run = lambda model=model, optimizer=optimizer: step(model, optimizer)  # noqa: E731
            seconds(run, 2)
            numbers[name] = seconds(run, 2)
            del model, optimizer, run
        yield numbers


def mixed(sizes: Sizes, device: str) -> Iterator[Numbers]:
    """One token for each of as many rows as there are adapters, each row under its own."""
    import torch

    from benchmarks.models import ALL_LINEAR
    from peft import LoraConfig

    model = sizes.adapted(device).eval()
    for i in range(1, sizes.adapters):
        model.add_adapter(f"number{i}", LoraConfig(r=sizes.rank, target_modules=ALL_LINEAR))
    awake(model)
    names = ["default", *(f"number{i}" for i in range(1, sizes.adapters))]
    bare, x = sizes.model(device).eval(), torch.zeros(len(names), 1, dtype=torch.long, device=device)

    def each() -> None:
        with torch.no_grad():
            model(x, adapter_names=names)

    def alone() -> None:
        with torch.no_grad():
            bare(x)

    while True:
        each(), alone()
        yield {"bare": seconds(alone, 3), f"{len(names)} adapters": seconds(each, 3)}


SUBJECTS = {"decode": decode, "train": train, "mixed": mixed}


def serve() -> None:
    """One interpreter's end: the name of a subject per line comes in, one repetition of it as JSON goes out."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, running = "", None
    for line in sys.stdin:
        if line.strip() != name:
            name, running = line.strip(), None  # lets go of the models of the one before
            running = SUBJECTS[name](Sizes(), "cuda")
        assert running is not None
        print(json.dumps(next(running)), file=replies, flush=True)


class Side:
    """The parent's end of `serve`."""

    def __init__(self, name: str, python: str, **more: str):
        # a peer finds the package of benchmarks here, but its own `peft`
        path = str(ROOT) if name == "peer" else f"{ROOT / 'src'}{os.pathsep}{ROOT}"
        code = "from benchmarks.gpu import serve; serve()"
        self.name, environment = name, os.environ | {"PYTHONPATH": path} | more
        self.process = subprocess.Popen(
            [python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd="/"
        )

    def ask(self, subject: str) -> Numbers:
        """One repetition."""
        assert self.process.stdin and self.process.stdout
        print(subject, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}, {subject}: the process ended with {self.process.wait()}.")
        found: Numbers = json.loads(line)
        return found


def table(subject: str, found: dict[str, list[Numbers]]) -> str:
    """The smallest times of a subject as Markdown, each as a multiple of the same process's bare model."""
    lines = [f"### {subject}: {SUBJECTS[subject].__doc__}", "", "| | bare | adapted | over bare |", "|---|--:|--:|--:|"]
    for side, repetitions in found.items():
        least = {key: min(r[key] for r in repetitions) for key in repetitions[0]}
        for key, value in least.items():
            if key != "bare":
                ratio = value / least["bare"]
                lines.append(f"| {side}, {key} | {least['bare'] * 1e3:.3f} ms | {value * 1e3:.3f} ms | {ratio:.3f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="an interpreter with another peft and a torch for this GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--json", type=Path, help="a file for every repetition")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU)
        return 1
    sides = [Side("ours", sys.executable), Side("ours, torch's operations", sys.executable, PEFT_KERNELS="torch")]
    sides += [Side("peer", options.peer)] if options.peer else []
    results: dict[str, dict[str, list[Numbers]]] = {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    for subject in options.only:
        found = results[subject] = {side.name: [] for side in sides}
        for _ in range(options.repeats):
            for side in sides:
                found[side.name].append(side.ask(subject))
        print(table(subject, found), end="\n\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
