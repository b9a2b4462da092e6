"""The page on several machines: its numbers follow from its formulas, and its sizes are those of real plans."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from peft import LoraConfig, get_peft_model

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
GB = 1e9
SIZES = {  # width, feed-forward, key and value width, layers, words
    "7B": (4096, 11008, 4096, 32, 32000),
    "70B": (8192, 28672, 1024, 80, 32000),
}


def base(name: str) -> tuple[int, int, int]:
    """Parameters of the model, of one layer, and of what is outside the layers."""
    d, f, kv, layers, words = SIZES[name]
    layer = 2 * d * d + 2 * d * kv + 3 * d * f + 2 * d
    outside = 2 * d * words + d
    return layers * layer + outside, layer, outside


def adapter(name: str, r: int = 16) -> int:
    d, f, kv, layers, _ = SIZES[name]
    return layers * r * (2 * (d + d) + 2 * (d + kv) + 3 * (d + f))


def cells(name: str, way: str, n: int) -> tuple[float, float]:
    """GB that one GPU holds, and that it sends in a step."""
    P, layer, outside = base(name)
    a, ring = adapter(name), (n - 1) / n
    if way == "DDP":
        return (2 * P + 16 * a) / GB, 2 * ring * 4 * a / GB
    held = (2 * P + 16 * a) / n + 2 * (2 * layer + 4 * a / SIZES[name][3]) + 2 * outside
    return held / GB, (2 * ring * (2 * P + 4 * a) + ring * 4 * a) / GB


def rows() -> list[list[str]]:
    found = re.findall(
        r"^\| (7B|70B) \| (DDP|FSDP2) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE
    )
    return [list(row) for row in found]


def test_the_table_holds_every_case() -> None:
    wanted = {
        (m, w, n) for m in SIZES for w in ("DDP", "FSDP2") for n in ("1", "8", "1,024") if (w, n) != ("FSDP2", "1")
    }
    assert {tuple(row[:3]) for row in rows()} == wanted


@pytest.mark.parametrize("row", rows(), ids=" ".join)
def test_the_table_follows_from_the_formulas(row: list[str]) -> None:
    name, way, n, held, sent = row
    memory, traffic = cells(name, way, int(n.replace(",", "")))
    assert float(held) == pytest.approx(memory, rel=0.02, abs=0.01)
    assert float(sent) == pytest.approx(traffic, rel=0.02, abs=0.01)


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_are_those_of_the_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    d, f, kv, layers, words = SIZES[name]
    heads = d // 128
    sizes = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": 2, "vocab_size": words}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv // 128)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    plain = sum(p.numel() for p in model.parameters())
    P, layer, _ = base(name)
    assert plain + (layers - 2) * layer == P
    wrapped = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trained * layers == adapter(name) * 2
