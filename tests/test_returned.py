"""DoRA keeps its own output for the backward pass, which may be changed in place like any other."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from peft import LoraConfig, get_peft_model
from peft.kernels import returned

WAYS = {
    "float32": (torch.float32, False),
    "float64": (torch.float64, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "autocast": (torch.float32, True),
}
EXACT = {torch.float64: 1e-6, torch.float32: 2e-5}  # norms are taken in single precision


def adapted(dtype: torch.dtype, bias: bool = True, layers: int = 1, width: int = 24, **more) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(width, width, bias=bias) for _ in range(layers)]).to(dtype)
    names = [str(i) for i in range(layers)]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=names, use_dora=True, **more)).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model


def gradients(model: nn.Module, shape, finish, way: str) -> list[Tensor]:
    dtype, auto = WAYS[way]
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16) if auto else nullcontext():
        torch.manual_seed(2)
        y = model(x)
        y = finish(y)
    model.zero_grad()
    (y.double() * weights).sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found.double() - wanted.double()).norm() <= tolerance * (wanted.double().norm() + 1e-3))


CHANGES = {
    "relu": (lambda y: y.relu_(), lambda y: y.relu()),
    "product": (lambda y: y.mul_(1.5), lambda y: y * 1.5),
    "part": (lambda y: y[..., :3].zero_() is not None and y, lambda y: torch.cat((y[..., :3] * 0, y[..., 3:]), -1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (24,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_output_may_be_changed_in_place(change: str, way: str, shape, bias: bool, rate: float) -> None:
    model = adapted(WAYS[way][0], bias, lora_dropout=rate)
    inside, aside = CHANGES[change]
    found, wanted = (gradients(model, shape, finish, way) for finish in (inside, aside))
    tolerance = EXACT.get(WAYS[way][0], 2e-2) if way != "autocast" else 2e-2
    assert all(close(a, b, tolerance) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spoiled", [None, "zero magnitude", "zero rows", "small magnitude", "hooked"])
@pytest.mark.parametrize("rows", [7, 64])
def test_gradients_are_those_of_the_definition(way: str, bias: bool, spoiled: str | None, rows: int) -> None:
    model = adapted(WAYS[way][0], bias)
    layer = model.base_model.model[0]
    m, W = layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight
    with torch.no_grad():
        if spoiled == "zero magnitude":
            m[3:5] = 0
        elif spoiled == "small magnitude":
            m[3:5] *= 1e-3
        elif spoiled == "zero rows":
            W[3:5], m[3:5] = 0, 0
    if spoiled == "hooked":
        layer.base_layer.register_forward_hook(lambda module, args, y: y * 2)
    found = gradients(model, (rows, 24), lambda y: y, way)

    leaves = [
        t.detach().double().requires_grad_()
        for t in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, m)
    ]
    A, B, m = leaves
    torch.manual_seed(1)
    x = torch.randn((rows, 24), dtype=WAYS[way][0]).double().requires_grad_()
    weights = torch.randn((rows, 24), dtype=torch.float64)
    s, b = layer.scaling["default"], layer.base_layer.bias
    n = (W.double() + s * B @ A).norm(dim=1).detach()
    y = x @ W.double().T + (0 if b is None else b.double())
    y = y * 2 if spoiled == "hooked" else y
    b = 0 if b is None else b.double()
    (((m / n) * (y - b + s * (x @ A.T @ B.T)) + b) * weights).sum().backward()
    tolerance = EXACT.get(WAYS[way][0], 3e-2) if way != "autocast" else 3e-2
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = {"x": x, "lora_A": A, "lora_B": B, "lora_magnitude": m}
    for name, grad in zip(["x", *names], found, strict=True):
        expected = next(t.grad for key, t in wanted.items() if key == name or f".{key}" in name)
        assert close(grad, expected, tolerance), name


@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_dora_keeps_about_what_lora_keeps(way: str, rate: float) -> None:
    """Each input is the output before it, which is kept once: beyond LoRA's bytes there is the last output alone."""

    def kept(dora: bool) -> int:
        dtype, auto = WAYS[way]
        names = [str(i) for i in range(8)]
        base = nn.Sequential(*[nn.Linear(96, 96) for _ in names]).to(dtype)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=names, use_dora=dora, lora_dropout=rate)).train()
        own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        held = []

        def pack(t: Tensor) -> Tensor:
            held.append(t)
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16) if auto else nullcontext():
            model(torch.randn(512, 96, dtype=dtype, requires_grad=True)).sum()
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(size for place, size in found.items() if place not in own)

    assert kept(True) <= 1.2 * kept(False)


@pytest.mark.parametrize("way", ["float32", "bfloat16"])
def test_a_graph_is_used_twice_and_differentiated_again(way: str) -> None:
    model = adapted(WAYS[way][0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(6, 24, dtype=WAYS[way][0], requires_grad=True)
    y = model(x)
    loss = y.float().square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    again = torch.autograd.grad(loss, parameters, create_graph=True)
    assert all(close(a, b, 3e-2 if way == "bfloat16" else 1e-5) for a, b in zip(again, first, strict=True))
    (of_x,) = torch.autograd.grad(sum(g.square().sum() for g in again), x)
    assert of_x.isfinite().all()
    assert of_x.abs().max() > 0


def test_what_counts_changes_holds_no_memory() -> None:
    out = torch.randn(64, 64)
    data, count = returned.keep(out, torch.ones(64), out)
    assert data.data_ptr() == out.data_ptr()
    assert count[0].untyped_storage().nbytes() == 0
    assert returned.holds(count)
    out[1:2].add_(1)
    assert not returned.holds(count)
