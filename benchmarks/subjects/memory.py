"""What the forward pass keeps for the backward pass, to the byte, and what merging changes, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.measure import Numbers, measure, seconds
from benchmarks.models import frozen, stack
from benchmarks.subjects.wrapping import wrapped

MIB = 2.0**20


def kept(model: nn.Module, x: Tensor) -> float:
    """MiB of distinct storages saved for backward, the model's own parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    alive = []  # a freed storage's address could be given out again

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(found.values()) / MIB


@measure(
    "saved for backward, 4 x Linear(1024, 1024), 512 tokens, bf16 base, fp32 adapters, r=8",
    repeats=1,
    unit="MiB",
    ceilings={"dropout 0": 4.4, "dropout 0.1": 6.5, "DoRA": 8.0},
)
def saved() -> Iterator[Numbers]:
    """Exact; the four inputs themselves are 4.0 MiB."""
    x = torch.randn(512, 1024, dtype=torch.bfloat16, requires_grad=True)
    cases = {"dropout 0": {}, "dropout 0.1": {"lora_dropout": 0.1}, "DoRA": {"use_dora": True}}
    while True:
        numbers = {}
        for name, options in cases.items():
            model = wrapped(frozen(stack(4, 1024, dtype=torch.bfloat16)), **options).train()
            numbers[name] = kept(model, x)
        yield numbers


def changed(model: nn.Module, before: dict[str, Tensor]) -> float:
    """Per cent of the base weights whose bits differ from before."""
    pairs = [(p.detach(), before[n]) for n, p in model.named_parameters() if n in before]
    differ = sum(
        int((a.view(torch.uint8) != b.view(torch.uint8)).view(-1, a.element_size()).any(-1).sum()) for a, b in pairs
    )
    return 100.0 * differ / sum(a.numel() for a, _ in pairs)


@measure(
    "merge, then unmerge, 8 x Linear(512, 512), r=16",
    repeats=3,
    ceilings={f"{d}: weights changed|%": 0 for d in ("float32", "bfloat16", "float16", "bfloat16 DoRA")},
)
def merge() -> Iterator[Numbers]:
    """Time of both ways, and how many base weights are not what they were."""
    while True:
        numbers = {}
        for dtype, dora in (
            (torch.float32, False),
            (torch.bfloat16, False),
            (torch.float16, False),
            (torch.bfloat16, True),
        ):
            model = wrapped(stack(8, 512, dtype=dtype), r=16, init_lora_weights=False, use_dora=dora).eval()
            before = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer.weight" in n}
            name = str(dtype).removeprefix("torch.") + " DoRA" * dora
            numbers[f"{name}: merge"] = seconds(model.merge_adapter)
            numbers[f"{name}: unmerge"] = seconds(model.unmerge_adapter)
            numbers[f"{name}: weights changed|%"] = changed(model, before)
        yield numbers
