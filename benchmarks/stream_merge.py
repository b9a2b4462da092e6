"""Memory and speed of merging a checkpoint that is larger than what may be in memory.

    python -m benchmarks.stream_merge FOLDER [--layers 14] [--experts 4] [--dora] [--keep]

Writes a Llama of 4,096 features in bf16 (14 layers: 6.6 GB) and an adapter of rank 16 into FOLDER, merges them in a
process of its own, and copies the base beside it to compare. With `--experts` it is a Mixtral, whose files hold experts
one by one; a layer's gates and inputs are one tensor of the model then.

What is counted is anonymous memory (RssAnon of /proc/PID/status, read every 5 ms from outside): pages of files that the
system caches belong to nobody. The baseline is a process that has imported torch. CPU seconds do not count waiting for
a core or the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KEYS, VOCABULARY = 4096, 14336, 32, 8, 32000
MERGE = "import sys; from peft import merge_checkpoint; merge_checkpoint(*sys.argv[1:4])"
IDLE = "import torch, time; print(flush=True); time.sleep(9)"


def settings(layers: int, experts: int) -> Any:
    """The configuration of the model."""
    from transformers import LlamaConfig, MixtralConfig

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER // experts if experts else INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
    }
    if experts:
        return MixtralConfig(num_local_experts=experts, architectures=["MixtralForCausalLM"], **sizes)
    return LlamaConfig(architectures=["LlamaForCausalLM"], **sizes)


def empty(config: Any) -> Any:
    """The model without numbers."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, config.architectures[0])(config).to(torch.bfloat16)


def write_base(folder: Path, config: Any) -> int:
    """A checkpoint in shards of about a gigabyte; the bytes of the model's largest tensor."""
    from transformers.core_model_loading import revert_weight_conversion

    model = empty(config)
    config.save_pretrained(str(folder))
    parts: list[dict[str, torch.Size]] = [{}]
    for key, tensor in revert_weight_conversion(model, model.state_dict()).items():
        if sum(s.numel() for s in parts[-1].values()) > 4e8:
            parts.append({})
        parts[-1][key] = tensor.shape
    noise = torch.randn(HIDDEN * 64, dtype=torch.bfloat16) / 64
    places = {}
    for n, part in enumerate(parts, 1):
        name = f"model-{n:05d}-of-{len(parts):05d}.safetensors"
        tensors = {k: noise.repeat(s.numel() // len(noise) + 1)[: s.numel()].view(s).clone() for k, s in part.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(p.numel() * p.element_size() for p in model.parameters())


def write_adapter(folder: Path, config: Any, dora: bool) -> None:
    """A LoRA or DoRA of rank 16 on every matrix of the layers."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if config.architectures[0].startswith("Mixtral"):
        targets["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    chosen = LoraConfig(task_type="CAUSAL_LM", r=16, use_dora=dora, **targets)
    state = get_peft_model_state_dict(get_peft_model(empty(config), chosen, low_cpu_mem_usage=True))
    folder.mkdir()
    chosen.save_pretrained(str(folder))
    made = {k: torch.rand(t.shape) + 1 if "magnitude" in k else torch.randn(t.shape) / 64 for k, t in state.items()}
    save_file(made, folder / "adapter_model.safetensors")


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


def watched(command: list[str]) -> tuple[float, float, int]:
    """Seconds, CPU seconds and the largest anonymous memory of a process."""
    start, before, most = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    child = subprocess.Popen(command)
    while child.poll() is None:
        most = max(most, anonymous(child.pid))
        time.sleep(0.005)
    if child.returncode:
        raise SystemExit(f"The merge failed with {child.returncode}.")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - start, spent, most


def copied(source: Path, target: Path) -> tuple[float, float]:
    """Seconds and CPU seconds to copy a folder's files onto the disk."""
    target.mkdir()
    start, spent = time.perf_counter(), time.process_time()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb+") as handle:
            os.fsync(handle.fileno())
    return time.perf_counter() - start, time.process_time() - spent


def measure(root: Path, config: Any, dora: bool) -> None:
    """One merge, and what it took."""
    (root / "base").mkdir()
    largest = write_base(root / "base", config)
    write_adapter(root / "adapter", config, dora)
    size, adapter = (sum(f.stat().st_size for f in (root / name).iterdir()) for name in ("base", "adapter"))
    copy = copied(root / "base", root / "copy")
    shutil.rmtree(root / "copy")
    before = idle()
    command = [sys.executable, "-c", MERGE, *(str(root / n) for n in ("base", "adapter", "out"))]
    seconds, spent, most = watched(command)
    allowed = 2 * largest + 300e6
    print(f"base {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, adapter {adapter / 1e6:.0f} MB")
    print(f"anonymous memory over torch: {(most - before) / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB")
    for what, (wall, cpu) in (("merge", (seconds, spent)), ("copy", copy)):
        print(f"{what}: {wall:.1f} s ({size / wall / 1e6:.0f} MB/s), {cpu:.1f} CPU s ({size / cpu / 1e6:.0f} MB/s)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    root: Path = options.folder / "stream-merge"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    try:
        measure(root, settings(options.layers, options.experts), options.dora)
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
