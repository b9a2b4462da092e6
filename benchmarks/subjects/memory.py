"""What the forward pass keeps for the backward pass, to the byte, and what merging changes, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Numbers, measure, seconds
from benchmarks.models import ALL_LINEAR, Llama, frozen, stack
from benchmarks.subjects.methods import BARE, LAYERS, TOKENS, WIDE, Logits
from benchmarks.subjects.wrapping import wrapped

MIB = 2.0**20


def kept(model: nn.Module, x: Tensor) -> float:
    """MiB of distinct storages saved for backward, the model's own parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    alive = []  # a freed storage's address could be given out again

    def pack(t: Tensor) -> Tensor:
        for part in (t,) if t.layout is torch.strided else (t._indices(), t._values()):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
                alive.append(part)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(found.values()) / MIB


@measure(
    "saved for backward, 4 x Linear(1024, 1024), 512 tokens, bf16 base, fp32 adapters, r=8",
    repeats=1,
    unit="MiB",
    ceilings={"dropout 0": 4.4, "dropout 0.1": 6.5, "DoRA": 5.2},
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


BEYOND: dict[str, tuple[torch.dtype, dict[str, object], bool]] = {
    "dropout 0": (torch.float32, {}, False),
    "dropout 0.1": (torch.float32, {"lora_dropout": 0.1}, False),
    "bf16 base": (torch.bfloat16, {}, False),
    "bf16 base, dropout 0.1": (torch.bfloat16, {"lora_dropout": 0.1}, False),
    "A frozen": (torch.float32, {}, True),
}


@measure(
    "saved for backward beyond bare, 2 Llama layers of 256, 128 tokens, all-linear r=8, fp32 adapters",
    repeats=1,
    unit="MiB",
    limits={"dropout 0.1": 0.4, "bf16 base": 0.29, "bf16 base, dropout 0.1": 0.29},
    ceilings={"dropout 0.1": 1.3, "bf16 base": 0.65, "bf16 base, dropout 0.1": 0.71, "A frozen": 0.06},
)
def saved_beyond() -> Iterator[Numbers]:
    """Exact; where A is frozen, the products with it alone, and nothing of the inputs."""
    while True:
        numbers = {}
        for name, (dtype, options, freeze) in BEYOND.items():
            x = torch.randn(2, 64, 256, dtype=dtype, requires_grad=True)
            bare = kept(frozen(Llama(2, 256, 688, 4).to(dtype)), x)
            model = wrapped(Llama(2, 256, 688, 4).to(dtype), target_modules=ALL_LINEAR, **options).train()
            for key, parameter in model.named_parameters():
                if freeze and "lora_A" in key:
                    parameter.requires_grad_(False)
            numbers[name] = kept(model, x) - bare
        yield numbers


@measure(
    "saved for backward beyond bare by method, 2 Llama layers of 512, 256 tokens, all-linear", repeats=1, unit="MiB"
)
def saved_by_method() -> Iterator[Numbers]:
    """Exact. Negative where less of the base is kept than where its norms learn; methods as in `methods`."""
    tokens = torch.randint(8, 64, (1, TOKENS))
    while True:
        bare = kept(Logits(BARE, WIDE).train(), tokens)
        yield {name: kept(Logits(name, WIDE).train(), tokens) - bare for name in LAYERS}


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout as the measured library draws it."""
    try:
        from peft.kernels.masks import dropout
    except ImportError:
        dropout = F.dropout
    return dropout(x, p)


def plain_layer(layer: nn.Module, x: Tensor, scale: float, p: float) -> Tensor:
    """The update as the papers write it, in autograd's own operations, from the parameters of an adapted layer."""
    weights = {name.split(".")[0]: value for name, value in layer.named_parameters() if name.startswith("lora_")}
    W, A, B = layer.base_layer.weight, weights["lora_A"], weights["lora_B"]
    y = F.linear(x, W) + F.linear(F.linear(dropout(x, p), A), B) * scale
    if "lora_magnitude_vector" not in weights:
        return y
    norm = (W + scale * B @ A).norm(dim=1).detach()
    return y * (weights["lora_magnitude_vector"] / norm)


def gradient_gap(**options: object) -> float:
    """Largest difference between the gradients of an adapted stack and of its plain form, over the largest gradient."""
    model = wrapped(frozen(stack(3, 256)), r=16, init_lora_weights=False, **options).train()
    layers = [m for m in model.modules() if hasattr(m, "base_layer")]
    x = torch.randn(64, 256, requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def plain() -> Tensor:
        y = x
        for layer in layers:
            y = plain_layer(layer, y, layer.scaling["default"], float(options.get("lora_dropout", 0)))  # type: ignore[arg-type]
        return y

    found = []
    for forward in (lambda: model(x), plain):
        torch.manual_seed(1)  # one mask for both
        found.append(torch.autograd.grad(forward().square().sum(), wanted))
    gaps = [(a - b).abs().max() / b.abs().max() for a, b in zip(*found, strict=True)]
    return torch.stack(gaps).max().item()


GRADIENTS: dict[str, dict[str, object]] = {
    "dropout 0": {},
    "dropout 0.1": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
}


@measure(
    "gradients against the plain form, 3 x Linear(256, 256), 64 tokens, r=16, fp32",
    repeats=1,
    unit="",
    ceilings=dict.fromkeys(GRADIENTS, 1e-6),
)
def gradients() -> Iterator[Numbers]:
    """Largest gap over the largest gradient, tensor by tensor; the same dropout mask on both sides."""
    while True:
        yield {name: gradient_gap(**options) for name, options in GRADIENTS.items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> float:
    """Per cent of the base weights whose bits differ from before."""
    pairs = [(p.detach(), before[n]) for n, p in model.named_parameters() if n in before]
    differ = sum(
        int((a.view(torch.uint8) != b.view(torch.uint8)).view(-1, a.element_size()).any(-1).sum()) for a, b in pairs
    )
    return 100.0 * differ / sum(a.numel() for a, _ in pairs)


MERGES = ("float32", "bfloat16", "float16", "bfloat16 DoRA")


@measure(
    "merge, then unmerge, 8 x Linear(512, 512), r=16",
    repeats=3,
    limits={f"{kind}: merge": 0.6 for kind in MERGES} | {f"{kind}: unmerge": 0.2 for kind in MERGES},
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


@measure(
    "merge, unmerge, merge_and_unload, 2 x Linear(4096, 4096), r=16",
    repeats=2,
    limits={f"{kind}: {what}": most for kind in MERGES for what, most in (("merge", 0.6), ("merge for good", 0.5))},
)
def merge_large() -> Iterator[Numbers]:
    """Weights of the size that they have in models of a few billion parameters."""
    while True:
        numbers = {}
        for kind in MERGES:
            dtype = getattr(torch, kind.split()[0])
            options = {"r": 16, "init_lora_weights": False, "use_dora": "DoRA" in kind}
            model = wrapped(stack(2, 4096, dtype=dtype), **options).eval()
            numbers[f"{kind}: merge"] = seconds(model.merge_adapter)
            numbers[f"{kind}: unmerge"] = seconds(model.unmerge_adapter)
            numbers[f"{kind}: merge for good"] = seconds(model.merge_and_unload)
        yield numbers
