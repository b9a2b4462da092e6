"""The methods under test, one row each, the models that the tests are about, and what they should compute.

`expected` writes every update out from the tensors themselves, layout by layout, and runs a fresh plain model with the
sum in its weights. Nothing of it is taken from the library, and it is differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.core.layer import BaseTunerLayer, tuner_layers

from .layouts import LAYOUTS, Layout

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora-bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
SUBTRACTING = ("pissa", "pissa-niter", "olora")  # their first B A is taken out of the base weight
FEW = ("lora", "lora-bias", "dora", "pissa")  # where a property does not depend on how A and B began

# Sums of at most a few dozen products in another order: some units in the last place of the largest term. Half
# precision rounds each intermediate result once more, and the two sides round at different places.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def forbidden(method: str, layout: Layout) -> str | None:
    """Why a method cannot be built on a layout: the words that its error must hold."""
    if method == "lora-bias" and (layout.kind in ("embedding", "parameter") or "separate" in layout.name):
        return "lora_bias"
    if layout.grouped and method in (*SUBTRACTING, "orthogonal"):
        return "groups"
    return None


def cells(methods: Any = METHODS, only: Any = None) -> list[tuple[str, str]]:
    """(method, layout) of every pair that can be built; `only` chooses among layouts."""
    return [
        (method, name)
        for name, layout in LAYOUTS.items()
        for method in methods
        if forbidden(method, layout) is None and (only is None or only(layout))
    ]


def config(method: str, layout: Layout, **changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **METHODS[method], **layout.targets, **changes})


def adapted(
    method: str,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = ("default",),
    **changes: Any,
) -> PeftModel:
    """A model with trained-looking adapters of these names, of which the first is active."""
    model = get_peft_model(layout.model(dtype), config(method, layout, **changes), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(method, layout, **changes))
    for i, name in enumerate(names):
        train(model, name, seed=i)
    return model.eval()


@torch.no_grad()
def train(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    """Give every tensor of an adapter other values, as training would; the first ones are remembered."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in tuner_layers(model):
        first = layer.__dict__.setdefault("first", {})
        first[name] = {slot.live: slot.tensor.clone() for slot in layer.slots(name)}
        for slot in layer.slots(name):
            noise = torch.randn(slot.tensor.shape, generator=generator).to(slot.tensor)
            slot.tensor.copy_(slot.tensor * (1 + 0.2 * noise) if "magnitude" in slot.live else slot.tensor + noise / 3)


# ---- what should come out ------------------------------------------------------------------------------------


def expected(model: PeftModel, method: str, layout: Layout, x: Tensor, names: tuple[str, ...] = ("default",)) -> Tensor:
    """The output by the formulas, differentiable in the adapters' tensors."""
    plain = layout.model(x.dtype if x.is_floating_point() else torch.float32)
    return on_plain(plain, model, method, layout, x, names)


def on_plain(
    plain: nn.Module, model: PeftModel, method: str, layout: Layout, x: Tensor, names: tuple[str, ...]
) -> Tensor:
    values: dict[str, Tensor] = {}
    for path, layer in tuner_layers(model.base_model.model):
        where = path.replace("base_layer.", "").removesuffix("base_layer").rstrip(".")
        module = plain.get_submodule(where)
        attr = weight_name(layer)
        prefix = f"{where}." if where else ""
        W = ungrouped(module) if layout.grouped else getattr(module, attr).detach()
        b = getattr(module, "in_proj_bias" if attr == "in_proj_weight" else "bias", None)
        b_name = "in_proj_bias" if attr == "in_proj_weight" else "bias"
        for name in names:
            W = weight(layer, name, method, W, layer.original_weight() if method == "dora" else None)
            if method == "lora-bias":
                b = (0 if b is None else b) + scaling(layer, name) * layer.lora_B[name].bias
        values[prefix + attr] = W.to(getattr(module, attr).dtype)
        if method == "lora-bias" and b is not None:
            if getattr(module, b_name, None) is None:
                setattr(module, b_name, nn.Parameter(torch.zeros_like(b)))
            values[prefix + b_name] = b
        if layout.grouped:
            module.groups, module.weight = 1, nn.Parameter(W.detach())
    limit, plain_layer = None, getattr(plain, "layer", None)
    if isinstance(plain_layer, nn.Embedding) and plain_layer.max_norm is not None:
        limit, plain_layer.max_norm = plain_layer.max_norm, None  # torch would write into the weight
    y = torch.func.functional_call(plain, values, (x,))
    if limit is not None:
        size = y.detach().norm(dim=-1, keepdim=True)
        y = y * torch.where(size > limit, limit / (size + 1e-7), 1.0)
    return y


def weight_name(layer: BaseTunerLayer) -> str:
    if layer.parameter_name is not None:
        return layer.parameter_name
    return "in_proj_weight" if isinstance(layer.get_base_layer(), nn.MultiheadAttention) else "weight"


def scaling(layer: BaseTunerLayer, name: str) -> float:
    return 6 / math.sqrt(4) if layer.use_rslora[name] else 6 / 4


def weight(layer: BaseTunerLayer, name: str, method: str, W: Tensor, original: Any) -> Tensor:
    """W' from W, both in the stored layout."""
    homes = layer.lora_embedding_A if "lora_embedding_A" in layer._modules else None
    held = {
        key: home[name] if homes is not None else home[name].weight
        for key, home in layer._modules.items()
        if key in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    }
    A, B = (next(v for k, v in held.items() if k.endswith(end)) for end in ("A", "B"))
    D = product(layer, A, B)
    if method in SUBTRACTING:
        first = layer.first[name]
        A0, B0 = (next(v for k, v in first.items() if f"{end}.{name}" in k) for end in ("A", "B"))
        D = D - product(layer, A0, B0)
    D = scaling(layer, name) * D
    return W + D if method != "dora" else dora(layer, name, W, D)


def dora(layer: BaseTunerLayer, name: str, W: Tensor, D: Tensor) -> Tensor:
    """m V / |V| for the first adapter of a layer, rows being out-features; |V| is a constant of the gradient."""
    m = layer.lora_magnitude_vector[name].weight
    V = (W + D).float() if W.dtype in (torch.float16, torch.bfloat16) else W + D
    base = layer.get_base_layer()
    stored_by_input = isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D"
    if layer.parameter_name is not None and base.is_transposed:
        stored_by_input = True
    if stored_by_input:
        V = V.mT
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        m = m.flatten()
        size = V.detach().flatten(1).norm(dim=1)
        return V * (m / size).view(-1, *[1] * (V.dim() - 1))
    V = V * (m / V.detach().norm(dim=-1)).unsqueeze(-1)
    return V.mT if stored_by_input else V


def product(layer: BaseTunerLayer, A: Tensor, B: Tensor) -> Tensor:
    """B A in the stored layout of the layer's weight."""
    base = layer.get_base_layer()
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        g, flat = base.groups, B.flatten(1)
        out, rank = flat.shape[0] // g, flat.shape[1]
        parts = [flat[i * out : (i + 1) * out] @ A[i * rank : (i + 1) * rank].flatten(1) for i in range(g)]
        return torch.cat(parts).unflatten(1, A.shape[1:])
    if isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D":
        return (B @ A).mT
    if layer.parameter_name is None or getattr(base, layer.parameter_name).dim() == 2:
        return B @ A
    E = getattr(base, layer.parameter_name).shape[0]
    r = A.shape[0] // E
    experts = [B[:, e::E] @ A[e * r : (e + 1) * r] for e in range(E)]
    D = torch.stack(experts)
    return D.mT if base.is_transposed else D


def ungrouped(m: nn.Module) -> Tensor:
    """The kernel without groups that equals a grouped one."""
    W = m.weight.detach()
    out, inp = W.shape[0] // m.groups, W.shape[1]
    full = torch.zeros(W.shape[0], m.in_channels, *W.shape[2:], dtype=W.dtype)
    for i in range(m.groups):
        full[i * out : (i + 1) * out, i * inp : (i + 1) * inp] = W[i * out : (i + 1) * out]
    return full


# ---- comparing -----------------------------------------------------------------------------------------------


def close(found: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    """Equal up to rounding, relative to the largest value."""
    limit = TOLERANCE[found.dtype] if tolerance is None else tolerance
    assert found.shape == wanted.shape, f"{tuple(found.shape)} is not {tuple(wanted.shape)}"
    assert found.dtype is wanted.dtype, f"{found.dtype} is not {wanted.dtype}"
    size = wanted.double().abs().max().clamp_min(1e-30)
    error = ((found.double() - wanted.double()).abs().max() / size).item()
    assert error <= limit, f"relative error {error:.2e} is above {limit:.0e}"


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal to the bit."""
    assert found.dtype is wanted.dtype
    assert torch.equal(found, wanted), f"differs by {(found.double() - wanted.double()).abs().max().item():.2e}"
