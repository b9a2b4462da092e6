"""QLoRA on a real model: what is learnt, the memory and the time, beside LoRA on bf16 weights and beside a peer.

    python -m benchmarks.qlora FOLDER [--peer OTHER/bin/python] [--steps 80] [--markdown FILE] [--only nf4 bf16]
        [--merge]

SmolLM2-135M-Instruct (the model and the data of `examples/quickstart.py`) learns shell commands from tldr-pages with a
LoRA of rank 16 on every linear layer, batches of 8 short examples, once on weights in bf16 and once on nf4 with double
quantisation. Whole families of tools are held out, and the perplexity is that of their commands alone. Adapters are
left in FOLDER. `--merge` then merges each way into the quantised weights. With `--peer` the other interpreter does the
same, and the step times of both are taken in alternation.

Memory is the resident set of the process: its largest while training, over what it is before the model is loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BATCH, LONGEST, RANK, RATE, WARMUP, HELD_OUT = 8, 128, 16, 1e-3, 8, 192
TEMPLATE = "<|im_start|>user\nWrite one shell command.\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
Batch = dict[str, Any]


def load(kind: str, folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer.

    Arguments:
        kind: "nf4" (double quantisation, computing in bf16) or "bf16".
        folder: as `write_assets` left it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    extra: dict[str, Any] = {}
    if kind == "nf4":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    source = folder / "model"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map={"": "cpu"}, **extra)
    return model, AutoTokenizer.from_pretrained(source)


def adapted(model: Any, kind: str) -> Any:
    """The model with a fresh adapter, as QLoRA (or LoRA on bf16 weights) begins."""
    import torch

    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if kind == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    """The examples of "train" or "held_out"."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def batches(examples: list[dict[str, str]], tokenizer: Any) -> Iterator[Batch]:
    """Batches of 8 examples, padded on the right; labels on the answers and their ends alone."""
    import torch

    for start in range(0, len(examples) - BATCH + 1, BATCH):
        lines = []
        for row in examples[start : start + BATCH]:
            asked = tokenizer(TEMPLATE.format(prompt=row["prompt"]))["input_ids"]
            told = tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id]
            lines.append((asked + told, [-100] * len(asked) + told))
        width = min(LONGEST, max(len(ids) for ids, _ in lines))
        ids = torch.full((BATCH, width), tokenizer.pad_token_id)
        labels, mask = torch.full((BATCH, width), -100), torch.zeros(BATCH, width, dtype=torch.long)
        for n, (line, wanted) in enumerate(lines):
            size = min(width, len(line))
            ids[n, :size], labels[n, :size] = torch.tensor(line[:size]), torch.tensor(wanted[:size])
            mask[n, :size] = 1
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def perplexity(model: Any, held_out: list[Batch]) -> float:
    """Of the answers, each token counted once."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in held_out:
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + tokens * float(model(**batch).loss), count + tokens
    return math.exp(total / count)


def resident(what: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most since `forget_most`."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(what))


def forget_most() -> None:
    """Let "VmHWM" begin at what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


class Run:
    """One kind of base under one library: trained step by step."""

    def __init__(self, kind: str, folder: Path, steps: int):
        self.kind, self.folder, self.steps, self.done = kind, folder, steps, 0
        self.times: list[float] = []
        self.losses: list[float] = []

    def start(self) -> Batch:
        """Load everything; the perplexity before."""
        import bitsandbytes  # noqa: F401  (its own memory is no part of what is measured)
        import torch
        import transformers

        import peft

        transformers.logging.disable_progress_bar()
        idle = resident("VmRSS")
        model, tokenizer = load(self.kind, self.folder)
        self.held_out = list(batches(rows(self.folder, "held_out"), tokenizer))
        before = perplexity(model, self.held_out)
        model = None  # bitsandbytes leaves weights that have answered on some CPUs in an order that has no gradient
        self.model = adapted(load(self.kind, self.folder)[0], self.kind)
        self.queue = batches(rows(self.folder, "train"), tokenizer)
        chosen = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(chosen, lr=RATE, weight_decay=0.0)
        forget_most()
        self.idle = idle
        trainable, every = self.model.get_nb_trainable_parameters()
        held = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in self.model.parameters()}.values())
        return {
            "peft": peft.__version__, "perplexity before": before, "trainable": trainable, "parameters": every,
            "weights": held, "loaded": resident("VmRSS") - idle,
        }  # fmt: skip

    def step(self) -> float:
        """One step of the optimizer; CPU seconds."""
        import torch

        batch, n = next(self.queue), self.done
        rising, falling = (n + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * n / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(rising, falling)
        self.model.train()
        start = time.process_time()
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.times.append(time.process_time() - start)
        self.losses.append(loss.item())
        self.done += 1
        return self.times[-1]

    def finish(self, name: str) -> Batch:
        """Save the adapter; memory, step time, the perplexity after."""
        peak = resident("VmHWM") - self.idle
        self.model.save_pretrained(str(self.folder / name))
        return {
            "perplexity after": perplexity(self.model, self.held_out),
            "peak": peak,
            "step": sorted(self.times)[len(self.times) // 2],
            "last losses": self.losses[-5:],
        }


def merges(folder: Path) -> list[Batch]:
    """What each way of merging the trained adapter into nf4 weights keeps of the loss that it gains."""
    import warnings

    import torch

    from peft import LossyMergeWarning, PeftModel, prepare_model_for_kbit_training

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", LossyMergeWarning)
    model, tokenizer = load("nf4", folder)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    held_out = list(batches(rows(folder, "held_out"), tokenizer))
    shown = list(batches(rows(folder, "train")[: 6 * BATCH], tokenizer))
    before = math.log(perplexity(model, held_out))
    model = PeftModel.from_pretrained(model, str(folder / "nf4-adapter"))
    gain = before - math.log(perplexity(model, held_out))
    found = [{"merged": "not", "perplexity": math.exp(before - gain), "kept": 1.0}]
    ways = {"requantize": {}, "compensated": {}, "compensated, calibration": {"calibration": shown}, "dequantize": {}}
    for name, how in ways.items():
        start = time.process_time()
        told = model.merge_adapter(quantized=name.split(",")[0], **how)
        spent, merged = time.process_time() - start, math.log(perplexity(model, held_out))
        lost, relative = (sum(getattr(e, k) for e in told.values()) / len(told) for k in ("lost", "relative"))
        model.unmerge_adapter()
        row = {"merged": name, "perplexity": math.exp(merged), "kept": (before - merged) / gain}
        found.append(row | {"lost": lost, "relative": relative, "seconds": spent})
        print(json.dumps(found[-1]), flush=True)
    return found


def merge_table(found: list[Batch]) -> str:
    """The merges as Markdown."""
    lines = [
        "| merged | perplexity | of the gain kept | lost of the update, mean | error over weight | CPU time |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for r in found:
        more = f"{r['lost']:.1%} | {r['relative']:.2%} | {r['seconds']:.0f} s" if "lost" in r else "– | – | –"
        lines.append(f"| {r['merged']} | {r['perplexity']:.2f} | {r['kept']:.1%} | {more} |")
    return "\n".join(lines)


def serve(kind: str, folder: Path, steps: int) -> None:
    """One interpreter's end: a word per line comes in, a line of JSON goes out."""
    import torch

    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = Run(kind, folder, steps)
    for line in sys.stdin:
        word, *rest = line.split()
        print(json.dumps(getattr(run, word)(*rest)), file=replies, flush=True)


class Side:
    """The parent's end of `serve`."""

    def __init__(self, python: str, name: str, kind: str, folder: Path, steps: int):
        self.name, self.kind, self.folder = name, kind, folder
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        # a peer finds the package of benchmarks here, but its own `peft`
        path = str(ROOT) if name == "peer" else f"{ROOT / 'src'}{os.pathsep}{ROOT}"
        code = f"from benchmarks.qlora import serve, Path; serve({kind!r}, Path({str(folder)!r}), {steps})"
        self.process = subprocess.Popen(
            [python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
            env=environment | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, *words: str) -> Any:
        """The answer to one request."""
        assert self.process.stdin and self.process.stdout
        print(*words, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} {self.kind}: the process ended with {self.process.wait()}.")
        return json.loads(line)

    def end(self) -> None:
        """Let the process end."""
        self.process.communicate()


def write_assets(folder: Path) -> None:
    """The model and the examples, as the quickstart makes them, below a folder."""
    if (folder / "held_out.jsonl").is_file():
        return
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "examples")]
    import random

    import quickstart

    quickstart.require_assets()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").symlink_to(quickstart.cached_model())
    parts: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    for row in quickstart.commands():
        parts["held_out" if quickstart.held_out(row["tool"]) else "train"].append(row)
    for name, found in parts.items():
        random.Random(1).shuffle(found)
        kept = found[:HELD_OUT] if name == "held_out" else found
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def measure(kind: str, folder: Path, steps: int, peer: str | None) -> list[Batch]:
    """One kind of base under each library; steps are taken in turns."""
    sides = [Side(sys.executable, "ours", kind, folder, steps)]
    if peer:
        sides.append(Side(peer, "peer", kind, folder, steps))
    found = [{"side": s.name, "base": kind} | s.ask("start") for s in sides]
    print(json.dumps(found), flush=True)
    for _ in range(steps):
        for side in sides:
            side.ask("step")
    for result, side in zip(found, sides, strict=True):
        ours = side.name == "ours"
        result |= side.ask("finish", f"{kind}-adapter" if ours else f"{kind}-adapter-peer")
        side.end()
    return found


def table(results: list[Batch], steps: int) -> str:
    """The results as Markdown."""
    lines = [
        "| base | library | perplexity before | after | weights held | peak memory of training | step, CPU time |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        sizes = " | ".join(f"{r[k] / 2**20:,.0f} MiB" for k in ("weights", "peak"))
        figures = f"{r['perplexity before']:.2f} | {r['perplexity after']:.2f} | {sizes} | {r['step']:.2f} s"
        lines.append(f"| {r['base']} | {r['side']} ({r['peft']}) | {figures} |")
    return "\n".join([*lines, "", f"{steps} steps of {BATCH} examples, one thread, median step."])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", help="an interpreter with another peft")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", nargs="*", default=["nf4", "bf16"], choices=["nf4", "bf16"])
    parser.add_argument("--merge", action="store_true", help="merge the adapter of nf4 in each way")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    folder = options.folder.resolve()
    write_assets(folder)
    results = [r for kind in options.only for r in measure(kind, folder, options.steps, options.peer)]
    text = table(results, options.steps) if results else ""
    if options.merge:
        text = f"{text}\n\n{merge_table(merges(folder))}".strip()
    print(text)
    (folder / "qlora.json").write_text(json.dumps(results, indent=1))
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
