"""LoRA over a quantised linear layer: one node of the graph, held against plain operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft import LoraConfig, TinyLoraConfig, get_peft_model
from peft.core import quantised, storage
from peft.core.passing import packed_layers
from peft.methods.dora import DoRA

WAYS = ("nf4", "int8")
D, K = 64, 96


def base(way: str, dtype: torch.dtype, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, K, bias=bias, dtype=dtype))
    if way == "int8":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(D, K, bias, dtype, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(model[0].weight.data, requires_grad=False, quant_type="nf4")
    made.bias = model[0].bias
    model[0] = made.to("cpu")
    return model


def adapted(way: str, dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any) -> Any:
    config = LoraConfig(**{"r": 4, "target_modules": ["0"], "init_lora_weights": False, **options})
    return get_peft_model(base(way, dtype, bias), config).train()


def step(model: Any, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of the input and of every parameter that learns."""
    x = x.detach().requires_grad_()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.manual_seed(1)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().sin().sum(), wanted)]


def node_of(model: Any, x: Tensor) -> str:
    fn = model(x.detach().requires_grad_()).grad_fn
    while fn.name().startswith(("View", "Unsafe")):
        fn = fn.next_functions[0][0]
    return fn.name()


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"lora_dropout": 0.3}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"lora_dropout": 0.3}),
        (torch.float32, {"use_rslora": True, "init_lora_weights": "pissa"}),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_one_node_gives_what_plain_operations_give(
    way: str, dtype: torch.dtype, options: dict[str, Any], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = adapted(way, dtype, bias, **options), torch.randn(3, 5, D, dtype=dtype)
    assert "_Linear" in node_of(model, x)
    found = step(model, x)
    monkeypatch.setattr(quantised, "beside", lambda *_: None)
    assert "_Linear" not in node_of(model, x)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.03, "atol": 0.03}
    for one, two in zip(found, step(model, x), strict=True):
        assert one.dtype is two.dtype
        torch.testing.assert_close(one, two, **close)


@pytest.mark.parametrize("way", WAYS)
def test_methods_whose_factors_are_computed_learn_through_it(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TinyLoraConfig(r=2, target_modules=["0"], init_weights=False)
    model, x = get_peft_model(base(way, torch.float32), config).train(), torch.randn(7, D)
    found = step(model, x)
    monkeypatch.setattr(quantised, "beside", lambda *_: None)
    for one, two in zip(found, step(model, x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_can_be_differentiated_again(way: str) -> None:
    model, x = adapted(way), torch.randn(5, D, requires_grad=True)
    assert "_Linear" in node_of(model, x)
    layer = model.base_model.model[0]
    W = layer.base_weight() + 0
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b = layer.get_base_layer().bias

    def penalty(y: Tensor) -> list[Tensor]:
        (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), (x, A, B)))

    scale = layer.scaling["default"]
    plain = penalty(nn.functional.linear(x, W, b) + x @ A.T @ B.T * scale)
    for one, two in zip(penalty(model(x)), plain, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2 * two.abs().max().item())


@pytest.mark.parametrize("what", ("forward hook", "backward hook", "patched", "learnt bias", "autocast", "frozen A"))
def test_plain_operations_take_over(what: str) -> None:
    model, x = adapted("nf4"), torch.randn(5, D)
    layer = model.base_model.model[0]
    inner, heard = layer.get_base_layer(), []
    if what == "forward hook":
        inner.register_forward_hook(lambda m, args, y: heard.append(1) or y * 2)
    elif what == "backward hook":
        inner.register_full_backward_hook(lambda m, into, out: heard.append(1))
    elif what == "patched":
        whole = inner.forward
        inner.forward = lambda x: whole(x) * 2
    elif what == "learnt bias":
        inner.bias.requires_grad_(True)
    elif what == "frozen A":
        layer.lora_A["default"].weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert "_Linear" not in node_of(model, x)
    if "hook" in what:
        step(model, x)
        assert heard


def gate(inner: nn.Module) -> None:
    """What a user may make of a quantised layer: a class below it that does more."""
    kind = type(inner)
    inner.register_parameter("gate", nn.Parameter(torch.tensor(3.0)))
    inner.__class__ = type("Gated", (kind,), {"forward": lambda self, x: kind.forward(self, x) * self.gate})


@pytest.mark.parametrize("learns", (True, False))
def test_a_class_below_the_library_s_is_left_to_plain_operations(learns: bool) -> None:
    model, x = adapted("nf4"), torch.randn(5, D)
    inner = model.base_model.model[0].get_base_layer()
    plain = step(model, x)
    gate(inner)
    inner.gate.requires_grad_(learns)
    assert "_Linear" not in node_of(model, x)
    assert not torch.allclose(step(model, x)[1], plain[1])
    if learns:
        model(x).sum().backward()
        assert inner.gate.grad is not None


def test_factors_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TinyLoraConfig(r=2, target_modules=["0"], init_weights=False)
    model, made = get_peft_model(base("nf4", torch.float32), config).train(), []
    method = next(iter(model.base_model.model[0].adapters.values())).method
    whole = type(method).factors
    monkeypatch.setattr(type(method), "factors", lambda *args: made.append(1) or whole(*args))
    x = torch.randn(5, D, requires_grad=True)
    model(x)
    assert len(made) == 1
    monkeypatch.setattr(quantised.thin, "takes", lambda *args: False)
    model(x)
    assert len(made) == 2


def test_no_library_is_asked_about_modules_without_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    whole = storage.by_class
    monkeypatch.setattr(storage, "by_class", lambda kind: asked.append(kind) or whole(kind))
    assert list(packed_layers([nn.ReLU(), nn.Linear(2, 2)])) == [] and type(None) not in asked and nn.ReLU in asked


def test_what_is_kept_has_the_size_of_the_input_or_of_the_rank() -> None:
    model, kept = adapted("nf4"), []
    x = torch.randn(5, D, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    new = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert sorted(t.numel() for t in new) == [5 * 4, 5 * D]


CHANGES = {
    "nothing": lambda model, layer: None,
    "B": lambda model, layer: layer.lora_B["default"].weight.mul_(3),
    "A elsewhere": lambda model, layer: setattr(
        layer.lora_A["default"].weight, "data", layer.lora_A["default"].weight.flip(0)
    ),
    "m": lambda model, layer: layer.lora_magnitude_vector["default"].weight.mul_(2),
    "scaling": lambda model, layer: layer.set_scale("default", 3.0),
    "a bias": lambda model, layer: layer.get_base_layer().bias.add_(1),
    "training": lambda model, layer: (model.train(), layer.lora_B["default"].weight.data.mul_(2), model.eval()),
    "another base": lambda model, layer: setattr(
        layer.get_base_layer(), "weight", other_base(layer.get_base_layer().weight)
    ),
    "a merge and back": lambda model, layer: (model.merge_adapter(), model.unmerge_adapter()),
    "merged": lambda model, layer: (
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)),
        model.base_model.set_adapter(["b", "default"]),
        model.merge_adapter(["b"]),
    ),
}


def other_base(weight: Any) -> Any:
    way = "nf4" if hasattr(weight, "quant_state") else "int8"
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(D, K, dtype=torch.bfloat16))
    if way == "int8":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model[0].weight
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Params4bit(model[0].weight.data, requires_grad=False, quant_type="nf4").to("cpu")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_gain_over_a_quantised_weight_is_kept_until_something_changes(
    way: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(way, torch.bfloat16, use_dora=True).eval()
    layer, made = model.base_model.model[0], []
    model(torch.randn(2, D).bfloat16())  # after which a library may order its weight anew
    norm = DoRA.norm
    monkeypatch.setattr(DoRA, "norm", lambda *args: made.append(1) or norm(*args))
    x = torch.randn(1, 3, D).bfloat16()
    before = model(x)
    made.clear()
    for _ in range(3):
        assert torch.equal(model(x), before)
    assert not made
    CHANGES[change](model, layer)
    made.clear()
    rows = [torch.cat([model(x[:, i : i + 1]) for i in range(3)], 1), model(x)]
    assert len(made) == (change not in ("nothing", "a merge and back"))
    monkeypatch.setattr("peft.core.kept.KEEPING.on", False)
    wanted = model(x)
    for y in rows:
        torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)
    if change not in ("nothing", "a merge and back"):
        assert not torch.allclose(wanted, before, rtol=0.05, atol=0.05), "the change changes nothing"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_row_over_a_quantised_weight_is_what_plain_operations_give(
    way: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model, x = adapted(way, dtype, **options).eval(), torch.randn(5, 1, D, dtype=dtype)
    found = torch.cat([model(row[None]) for row in x]), model(x), model(x[0])[None]
    with torch.enable_grad(), pytest.MonkeyPatch.context() as plainly:
        plainly.setattr(quantised, "beside", lambda *_: None)
        wanted = model(x).detach()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.03, "atol": 0.03}
    for y, to in zip(found, (wanted, wanted, wanted[:1]), strict=True):
        assert y.dtype is dtype
        torch.testing.assert_close(y, to, **close)
