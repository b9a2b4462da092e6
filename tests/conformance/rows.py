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
from peft.methods.lora.method import OutProjection

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


def expected(
    model: PeftModel,
    method: str,
    layout: Layout,
    x: Tensor,
    names: tuple[str, ...] = ("default",),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The output by the formulas in double precision, differentiable in the adapters' tensors and in x."""
    plain = layout.plain(dtype).double()
    values: dict[str, Tensor] = {}
    for path, layer in tuner_layers(model.base_model.model):
        where = path.replace("base_layer.", "").removesuffix("base_layer").rstrip(".")
        module, prefix = plain.get_submodule(where), f"{where}." if where else ""
        attr, b_name = names_of(layer)
        W, b = getattr(module, attr), getattr(module, b_name, None)
        for name in names:
            W = weight(layer, name, method, W, getattr(module, attr))
            if method == "lora-bias":
                b = (0 if b is None else b) + scaling(layer, name) * layer.lora_B[name].bias.double()
        values[prefix + attr] = W
        if layout.grouped:
            module.groups, module.weight = 1, nn.Parameter(W.detach())
        if method == "lora-bias" and b is not None:
            if getattr(module, b_name, None) is None:
                setattr(module, b_name, nn.Parameter(torch.zeros_like(b)))
            values[prefix + b_name] = b
    return within_norm(plain, values, x if layout.tokens else x.double()).to(
        torch.float32 if layout.tokens else x.dtype
    )


def within_norm(plain: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """The plain model under these weights; torch's `max_norm` would write into them, so it is applied here."""
    layer = getattr(plain, "layer", None)
    limit = layer.max_norm if isinstance(layer, nn.Embedding) else None
    if limit is not None:
        layer.max_norm = None
    y = torch.func.functional_call(plain, values, (x,))
    if limit is None:
        return y
    size = y.detach().norm(dim=-1, keepdim=True)
    return y * torch.where(size > limit, limit / (size + 1e-7), 1.0)


def names_of(layer: BaseTunerLayer) -> tuple[str, str]:
    """The attributes that hold the adapted weight and its bias."""
    if layer.parameter_name is not None:
        return layer.parameter_name, "bias"
    attention = isinstance(layer.get_base_layer(), nn.MultiheadAttention)
    return ("in_proj_weight", "in_proj_bias") if attention else ("weight", "bias")


def scaling(layer: BaseTunerLayer, name: str) -> float:
    return 6 / math.sqrt(4) if layer.use_rslora[name] else 6 / 4


def factors(layer: BaseTunerLayer, name: str) -> tuple[Tensor, Tensor]:
    """A and B as the layer holds them."""
    if "lora_embedding_A" in layer._modules:
        return layer.lora_embedding_A[name].double(), layer.lora_embedding_B[name].double()
    return layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()


def weight(layer: BaseTunerLayer, name: str, method: str, W: Tensor, original: Tensor) -> Tensor:
    """W' from W, both in the stored layout; a grouped kernel is made into the equal one without groups.

    DoRA's norm is that of the original weight and this one update, whatever other adapters made of W.
    """
    A, B = factors(layer, name)
    D = product(layer, A, B)
    if method in SUBTRACTING:
        A0, B0 = (next(v for k, v in layer.first[name].items() if f"{e}.{name}" in k).double() for e in ("A", "B"))
        D = D - product(layer, A0, B0)
    D = scaling(layer, name) * D
    if isinstance(layer.adapters[name].method, OutProjection):
        D = D + D.detach()  # the update is added twice, the second time without gradient
    base: Any = layer.get_base_layer()
    grouped = getattr(base, "groups", 1) != 1
    if method != "dora":
        return (ungrouped(base, W) if grouped else W) + D
    if not grouped:
        return directed(layer, name, W + D, original + D)
    # what adapter files were trained for: B's compact blocks read as a matrix of r columns
    compact = B.flatten(1).reshape(-1, A.shape[0]) @ A.flatten(1)
    norm_of = original + scaling(layer, name) * compact.reshape(original.shape)
    return directed(layer, name, ungrouped(base, W) + D, norm_of)


def directed(layer: BaseTunerLayer, name: str, V: Tensor, of_norm: Tensor) -> Tensor:
    """m V / |V|, a row per out-feature; |V|, taken of `of_norm`, is a constant of the gradient."""
    m = layer.lora_magnitude_vector[name].weight.double()
    base: Any = layer.get_base_layer()
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        size = of_norm.detach().flatten(1).norm(dim=1)
        return V * (m.flatten() / size).view(-1, *[1] * (V.dim() - 1))
    by_input = isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D"
    by_input = by_input or (layer.parameter_name is not None and getattr(base, "is_transposed", False))
    V, of_norm = (V.mT, of_norm.mT) if by_input else (V, of_norm)
    V = V * (m / of_norm.detach().norm(dim=-1)).unsqueeze(-1)
    return V.mT if by_input else V


def product(layer: BaseTunerLayer, A: Tensor, B: Tensor) -> Tensor:
    """B A in the stored layout of the layer's weight."""
    base: Any = layer.get_base_layer()
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
    D = torch.stack([B[:, e::E] @ A[e * r : (e + 1) * r] for e in range(E)])
    return D.mT if base.is_transposed else D


def ungrouped(m: Any, W: Tensor) -> Tensor:
    """The kernel without groups that equals a grouped one; one without groups already is left as it is."""
    if W.shape[1] == m.in_channels:
        return W
    out, inp = W.shape[0] // m.groups, W.shape[1]
    full = W.new_zeros(W.shape[0], m.in_channels, *W.shape[2:])
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
