"""Memory and speed of merging a checkpoint that is larger than what may be in memory.

    python -m benchmarks.stream_merge FOLDER [--layers 14] [--method lora] [--keep]

Writes a Llama of 4,096 features in bf16 (14 layers: 6.6 GB) and an adapter into FOLDER, merges them in a process of its
own, and copies the base beside it to compare. What is counted is anonymous memory (RssAnon of /proc/PID/status, read
every 5 ms from outside): pages of files that the system caches belong to nobody. The baseline is a process that
has imported torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KEYS, VOCABULARY = 4096, 14336, 32, 8, 32000
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // HEADS * KEYS, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MERGE = "import sys; from peft import merge_checkpoint; merge_checkpoint(*sys.argv[1:4])"
IDLE = "import torch, time; print(flush=True); time.sleep(9)"


def write_base(folder: Path, layers: int) -> None:
    """A checkpoint in shards of two layers."""
    folder.mkdir()
    torch.manual_seed(0)
    outer = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    parts = [{f"{name}.weight": shape for name, shape in outer.items()}]
    for i in range(layers):
        here = {f"model.layers.{i}.{name}.weight": shape for name, shape in SIZES.items()}
        here |= {f"model.layers.{i}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        parts.append(here) if i % 2 == 0 else parts[-1].update(here)
    places, total = {}, 0
    for n, part in enumerate(parts, 1):
        name = f"model-{n:05d}-of-{len(parts):05d}.safetensors"
        noise = torch.randn(HIDDEN * 64, dtype=torch.bfloat16) / 64
        tensors = {
            k: noise.repeat(-(-torch.Size(s).numel() // len(noise)))[: torch.Size(s).numel()].view(s)
            for k, s in part.items()
        }
        save_file({k: t.clone() for k, t in tensors.items()}, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(str(folder))


def write_adapter(folder: Path, layers: int, method: str) -> None:
    """A LoRA or DoRA of rank 16 on every matrix of the layers."""
    from peft import LoraConfig

    targets = [name.rpartition(".")[2] for name in SIZES]
    folder.mkdir()
    config = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=targets, use_dora=method == "dora")
    config.save_pretrained(str(folder))
    state = {}
    for i in range(layers):
        for name, (out, inp) in SIZES.items():
            path = f"base_model.model.model.layers.{i}.{name}"
            state[f"{path}.lora_A.weight"] = torch.randn(16, inp) / 64
            state[f"{path}.lora_B.weight"] = torch.randn(out, 16) / 64
            if method == "dora":
                state[f"{path}.lora_magnitude_vector"] = torch.rand(out) + 1
    save_file(state, folder / "adapter_model.safetensors")


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (OSError, ValueError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)


def idle() -> int:
    """Of a process that has imported torch."""
    child = subprocess.Popen([sys.executable, "-c", IDLE], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    size = anonymous(child.pid)
    child.kill()
    child.wait()
    return size


def watched(command: list[str]) -> tuple[float, int]:
    """Seconds and the largest anonymous memory of a process."""
    start, most = time.perf_counter(), 0
    child = subprocess.Popen(command)
    while child.poll() is None:
        most = max(most, anonymous(child.pid))
        time.sleep(0.005)
    if child.returncode:
        raise SystemExit(f"The merge failed with {child.returncode}.")
    return time.perf_counter() - start, most


def copied(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files onto the disk."""
    target.mkdir()
    start = time.perf_counter()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb+") as handle:
            os.fsync(handle.fileno())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--method", choices=["lora", "dora"], default="lora")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    root: Path = options.folder / "stream-merge"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    try:
        write_base(root / "base", options.layers)
        write_adapter(root / "adapter", options.layers, options.method)
        size = sum(f.stat().st_size for f in (root / "base").iterdir())
        adapter = sum(f.stat().st_size for f in (root / "adapter").iterdir())
        copy = copied(root / "base", root / "copy")
        shutil.rmtree(root / "copy")
        before = idle()
        command = [sys.executable, "-c", MERGE, *(str(root / n) for n in ("base", "adapter", "out"))]
        seconds, most = watched(command)
        largest = max(2 * VOCABULARY * HIDDEN, 2 * INNER * HIDDEN)
        allowed = 2 * largest + 300e6
        largest_text = f"largest {largest / 1e6:.0f} MB"
        print(f"{options.method}: base {size / 1e9:.2f} GB, adapter {adapter / 1e6:.0f} MB, {largest_text}")
        print(f"anonymous memory over torch: {(most - before) / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB")
        print(
            f"merge {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s; copy {copy:.1f} s, {size / copy / 1e6:.0f} MB/s"
        )
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
