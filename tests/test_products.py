"""Classes that compute what nn.Linear does go its ways: as few operations, the base's bits, and the same looks.

They are transformers' Conv1D and subclasses that leave nn.Linear's call as it is.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conformance.layouts import turned
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from test_single_row import Operations

VIEWS = {"transpose", "permute", "expand", "slice", "split_with_sizes"}
CONFIGS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.5},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "bias": {"lora_bias": True},
}


class Named(nn.Linear):
    """As libraries have for a name, a hook or an attribute of their own."""


KINDS = {"Conv1D": turned, "subclass": lambda k, d: Named(d, k)}
each_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(base, options=None, config=LoraConfig, **more):
    """One layer under an adapter of numbers that are drawn alike."""
    torch.manual_seed(1)
    stored = {"fan_in_fan_out": type(base) is Conv1D}
    given = {"r": 3, "init_lora_weights": False, **(options or {})} if config is LoraConfig else {}
    model = get_peft_model(nn.Sequential(base), config(target_modules=["0"], **stored, **given, **more))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            nn.init.normal_(parameter)
    return model


def pair(kind, d=24, k=40, **given):
    """The same layer, as a class and nn.Linear hold it, under the same adapter."""
    torch.manual_seed(0)
    other, linear = KINDS[kind](k, d), nn.Linear(d, k)
    with torch.no_grad():
        linear.weight.copy_(other.weight.mT if kind == "Conv1D" else other.weight)
        linear.bias.copy_(other.bias)
    return adapted(other, **given), adapted(linear, **given)


def operations(run):
    with Operations() as seen:
        run()
    return [name for name in seen.names if name not in VIEWS]


def step(model, x):
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("rows", [1, 5, 400])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@each_kind
def test_evaluation_runs_the_operations_of_a_linear_layer(kind, options, rows):
    conv, linear = (model.eval() for model in pair(kind, options=options))
    x = torch.randn(2 if rows > 1 else 1, rows, 24)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), linear(x), rtol=1e-4, atol=1e-4)
        assert operations(lambda: conv(x)) == operations(lambda: linear(x))


@pytest.mark.parametrize("rows", [1, 5, 400])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@each_kind
def test_so_does_training(kind, options, rows):
    conv, linear = (model.train() for model in pair(kind, options=options))
    given = torch.randn(2, rows, 24)
    grads = [step(model, given.clone().requires_grad_()) for model in (conv, linear)]
    for mine, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-3)
    runs = [operations(lambda m=m: step(m, given.clone().requires_grad_())) for m in (conv, linear)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("adapters", [2, 12])
@pytest.mark.parametrize("grad", [False, True])
@each_kind
def test_so_does_a_mixed_batch(kind, adapters, grad):
    models = pair(kind)
    for model in models:
        for i in range(1, adapters):
            torch.manual_seed(10 + i)
            stored = {"fan_in_fan_out": type(model.get_base_model()[0].base_layer) is Conv1D}
            config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, **stored)
            model.add_adapter(str(i), config)
        model.train(grad)
    x, names = torch.randn(24, 24), [str(i % adapters) if i % adapters else "default" for i in range(24)]
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # the second finds the banks
            ys = [model(x, adapter_names=names) for model in models]
        torch.testing.assert_close(*ys, rtol=1e-4, atol=1e-4)
        runs = [operations(lambda m=m: m(x, adapter_names=names)) for m in models]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_kind
@torch.no_grad()
def test_an_update_of_zero_leaves_the_bits_of_the_base(kind, dtype):
    model = adapted(KINDS[kind](40, 24).to(dtype)).eval()
    model.base_model.model[0].lora_B["default"].weight.zero_()
    for shape in ((1, 24), (1, 1, 24), (7, 24), (2, 7, 24)):
        x = torch.randn(shape, dtype=dtype)
        y = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), y)


class Doubled(Conv1D):
    """A subclass with a product of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Other(Named):
    """Likewise."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked(layer, monkeypatch):
    layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)


def patched(layer, monkeypatch):
    own = layer.base_layer.forward
    monkeypatch.setattr(layer.base_layer, "forward", lambda x: 2 * own(x))


def patched_class(layer, monkeypatch, kind=Conv1D):
    kind = kind if layer is None else type(layer.base_layer)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))


def other_class(layer, monkeypatch):
    layer.base_layer.__class__ = Doubled if type(layer.base_layer) is Conv1D else Other


def written(layer, monkeypatch):
    layer.base_layer.weight.data.mul_(2)
    layer.base_layer.bias.data.mul_(2)


def replaced(layer, monkeypatch):
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() * 2, requires_grad=False)
    layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.detach() * 2, requires_grad=False)


CHANGES = (hooked, patched, patched_class, other_class, written, replaced)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@each_kind
def test_what_changes_around_the_base_is_seen(kind, change, rows, train, mixed, monkeypatch):
    model = adapted(KINDS[kind](40, 24)).train(train)
    layer = model.base_model.model[0]
    x, given = torch.randn(rows, 24), {"adapter_names": ["default"] * rows} if mixed else {}
    with torch.set_grad_enabled(train):
        before = [model(x, **given) for _ in range(2)][-1]
        with model.disable_adapter():
            base = model(x)
        change(layer, monkeypatch)
        torch.testing.assert_close(model(x, **given), before + base, rtol=1e-4, atol=1e-4)


def test_a_patch_that_was_there_before_is_run(monkeypatch):
    """As libraries of other kernels put it there when they are imported."""
    from peft.core import direct, views

    monkeypatch.setattr(direct, "FORMS", {})
    monkeypatch.setattr(direct, "TURNED", set())
    monkeypatch.setattr(views, "_BY_TYPE", {})
    patched_class(None, monkeypatch)
    model, x = adapted(turned(40, 24)).eval(), torch.randn(3, 24)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    layer = model.base_model.model[0]
    with torch.no_grad():
        update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        torch.testing.assert_close(model(x), base + update)
    assert not (direct.FORMS or direct.TURNED)


class Called(nn.Linear):
    """One that is more than its forward."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Computed(nn.Linear):
    """One whose weight is made of what it holds."""

    @property
    def weight(self):
        return 2 * self._parameters["weight"]

    @weight.setter
    def weight(self, value):
        self._parameters["weight"] = value

    @property
    def bias(self):
        return 2 * self._parameters["bias"]


class Routed(nn.Linear):
    """One with a product of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [Called, Routed, Computed], ids=lambda c: c.__name__)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("train", [False, True])
def test_a_subclass_with_rules_of_its_own_keeps_them(kind, rows, train):
    base = kind.__new__(kind)
    base.__dict__.update(nn.Linear(24, 40).__dict__)
    model, x = adapted(base).train(train), torch.randn(rows, 24)
    layer = model.base_model.model[0]
    with torch.set_grad_enabled(train):
        update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        for _ in range(2):
            torch.testing.assert_close(model(x), base(x) + update, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_merge_and_a_copy():
    model, x = adapted(turned(40, 24), {"use_dora": True}).eval(), torch.randn(1, 24)
    y = [model(x) for _ in range(2)][-1]
    twin = copy.deepcopy(model)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    assert torch.equal(twin(x), y)


@pytest.mark.parametrize("config", [VeraConfig, IA3Config], ids=lambda c: c.__name__)
def test_other_methods_go_along(config):
    more = {"r": 4} if config is VeraConfig else {"feedforward_modules": []}
    conv, linear = (model.eval() for model in pair("Conv1D", config=config, **more))
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), linear(x), rtol=1e-4, atol=1e-4)
        assert operations(lambda: conv(x)) == operations(lambda: linear(x))
