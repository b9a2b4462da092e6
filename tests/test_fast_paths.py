"""Shortcuts give what the formulas give: values, gradients, other derivatives; and know when to stand back.

The layer is large enough, and the input long enough, for every shortcut that small ones would leave aside.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conformance.layouts import TURNED, Around, Layout, turned
from conformance.rows import METHODS, adapted, close, expected, tuner_layers
from conformance.test_gradients import close_each, gradients, leaves
from peft import LoraConfig, get_peft_model
from peft.core.families import Scaling
from peft.core.method import Delta
from peft.core.rotation import Rotation
from peft.methods.lora import method as lora_method
from peft.methods.lora import several

WIDE = {
    "wide": Layout("linear-wide", lambda: Around(nn.Linear(48, 72)), (40, 48), batched=False),
    "bare": Layout("linear-wide-nobias", lambda: Around(nn.Linear(48, 72, bias=False)), (40, 48), batched=False),
    "turned": Layout("linear-wide-Conv1D", lambda: Around(turned(72, 48)), (40, 48), TURNED, batched=False),
}
KNOWN = [m for m, row in METHODS.items() if row.forbidden(WIDE["wide"]) is None and not row.tasks]
MIXING = [  # rows of an input count for themselves, and derivatives are those of torch (OSF cuts gradients down)
    m for m in KNOWN if METHODS[m].of_input is None and not m.startswith("osf")
]
each = pytest.mark.parametrize("method", KNOWN)


def one(method, layout, **changes):
    """A model with one adapter, in double precision where derivatives are compared, and an input that wants one."""
    model = adapted(method, layout, **changes)
    return model, layout.x().requires_grad_()


def calls_the_base(layer):
    """Whether the method states its update apart from the base's output."""
    return isinstance(next(iter(layer.adapters.values())).method, (Delta, Scaling, Rotation))


@each
@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("rows", [1, 40])
def test_values_and_gradients_are_those_of_the_formulas(method, kind, rows):
    layout = WIDE[kind]
    model, x = one(method, layout)
    x = x.detach()[:rows].requires_grad_()
    inputs = [*leaves(model).values(), x]
    y, wanted = model(x), expected(model, method, layout, x)
    close(y, wanted)
    close_each(gradients(y, inputs), gradients(wanted, inputs), 2e-5)  # much cancels in some sums of 3,456 products
    with torch.no_grad():
        close(model(x), wanted)  # once more, from what is kept
        close(model(x), wanted)


@each
def test_second_derivatives_are_those_of_the_formulas(method):
    layout = WIDE["wide"]
    model, x = one(method, layout)
    inputs = [*leaves(model).values(), x]

    def twice(y):
        first = torch.autograd.grad(y.tanh().square().sum(), inputs, create_graph=True)
        size = sum(g.square().sum() for g in first)
        return torch.autograd.grad(size, inputs)

    close_each(twice(model(x)), twice(expected(model, method, layout, x)), 1e-4)


@pytest.mark.parametrize("method", [m for m in KNOWN if m != "ln-tuning"])  # whose layers' numbers are its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wants", [False, True])
def test_what_a_layer_gives_may_be_changed_in_place(method, dtype, wants):
    """As nn.ReLU(inplace=True) and `hidden += residual` do: torch refuses it of views that a node made."""
    layout = WIDE["wide"]
    model = adapted(method, layout)
    ((_, layer),) = tuner_layers(model)
    layer.get_base_layer().to(dtype)
    inputs, found = list(leaves(model).values()), []
    for changed in (False, True):
        x = layout.x().view(2, -1, 48).to(dtype).requires_grad_(wants)
        torch.manual_seed(0)
        y = layer(x)
        y = y.add_(1).relu_() if changed else (y + 1).relu()
        found.append(torch.autograd.grad(y.double().square().sum(), [*inputs, x][: len(inputs) + wants]))
    close_each(found[1], found[0], 1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("method", MIXING)
def test_forward_mode_and_vmap_are_those_of_the_formulas(method):
    layout = WIDE["wide"]
    model, x = one(method, layout)
    x, along = x.detach(), torch.ones_like(x)
    wanted = expected(model, method, layout, x)
    _, pushed = torch.autograd.functional.jvp(lambda t: expected(model, method, layout, t), x, along)
    found = torch.func.jvp(model, (x,), (along,))
    close(found[0], wanted)
    close(found[1], pushed, 1e-5)
    with torch.no_grad():
        close(torch.vmap(model)(x[:4, None]).squeeze(1), wanted[:4])


@each
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_serves_other_numbers_of_rows(method, grad):
    layout = WIDE["wide"]
    model, x = one(method, layout)
    x = x.detach().repeat(4, 1)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (x,), check_trace=False)
        for rows in (160, 40, 3, 1):
            close(traced(x[:rows]), model(x[:rows]), 2e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_so_it_does_of_layers_of_ordinary_sizes(options):
    model, x = nn.Sequential(nn.Linear(256, 512)), torch.randn(4, 80, 256)
    model = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False, **options)).eval()
    traced = torch.jit.trace(model, (x,), check_trace=False)
    for rows in (80, 3, 1):
        close(traced(x[:, :rows]), model(x[:, :rows]), 2e-5)


@each
def test_a_hook_on_the_base_is_run(method):
    layout = WIDE["wide"]
    model, x = one(method, layout)
    ((_, layer),) = tuner_layers(model)
    wanted, seen = expected(model, method, layout, x), []
    layer.get_base_layer().register_forward_hook(lambda module, args, y: seen.append(1))
    close(model(x), wanted)
    assert seen or METHODS[method].values or not calls_the_base(layer), "the hook was passed by"


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"lora_bias": True}, {"use_dora": True}, {"frozen": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [False, True])
def test_so_it_may_under_the_forms_of_lora_at_ordinary_sizes(options, dtype, inputs):
    options = dict(options)
    frozen = options.pop("frozen", False)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 512)).to(dtype), LoraConfig(target_modules=["0"], **options))
    model.base_model.model[0].lora_A["default"].requires_grad_(not frozen)
    y = model(torch.randn(4, 80, 64, dtype=dtype, requires_grad=inputs))
    y.add_(1).relu_().sum().backward()


@pytest.mark.parametrize(
    ("second", "together"),
    [
        ({}, True),
        ({"use_rslora": True, "r": 3}, True),
        ({"use_dora": True}, False),
        ({"lora_bias": True}, False),
        ({"lora_dropout": 0.5}, False),
        ({"init_lora_weights": "pissa"}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [False, True])
def test_several_plain_adapters_are_added_where_the_product_lies(second, together, grad, monkeypatch):
    torch.manual_seed(0)
    together = together or ("lora_dropout" in second and not grad)
    settings = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10)), LoraConfig(**settings))
    model.add_adapter("two", LoraConfig(**{**settings, **second}))
    model.base_model.set_adapter(["default", "two"])
    model.train(grad)
    layer, x, found = model.base_model.model[0], torch.randn(3, 5, 12), []
    plain = several.several
    monkeypatch.setattr(lora_method, "several", lambda *args: found.append(plain(*args)) or found[-1])
    with torch.set_grad_enabled(grad):
        y = layer(x)
    assert [one is not None for one in found] == ([True] if together else [False] * len(found))
    if "lora_dropout" not in second or not grad:
        W, b = layer.get_base_layer().weight, layer.get_base_layer().bias
        for p in layer.adapters.values():
            W, b = p.method.weight(p, W), p.method.bias(p, b)
        close(y, nn.functional.linear(x, W, b))
    if together:
        handle = layer.lora_A["two"].register_forward_hook(lambda *_: found.append("hook"))
        close(layer(x), y.detach())
        assert "hook" in found
        handle.remove()
