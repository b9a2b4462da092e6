"""The names under which other programs look up layers over quantised weights, and what they do with them."""

import copy
import importlib
import pickle
import types

import pytest
import torch
from torch import nn

import peft
from conformance.storages import IN, OUT, STORAGES, numbers
from peft import AdaLoraConfig, IA3Config, LoraConfig, RandLoraConfig, RoadConfig, get_peft_model
from peft.core import storage
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from peft.utils.quantization_utils import resolve_quantization_backend
from tests.storages_common import qualified
from tests.test_storages_more import LAYERS

TARGET = {"target_modules": ["layer"]}
METHODS = {
    "lora": (LoraConfig(r=4, **TARGET), "Linear4bit", "Linear8bitLt"),
    "adalora": (AdaLoraConfig(init_r=4, target_r=2, total_step=9, **TARGET), "SVDLinear4bit", "SVDLinear8bitLt"),
    "ia3": (IA3Config(feedforward_modules=[], **TARGET), "Linear4bit", "Linear8bitLt"),
    "randlora": (RandLoraConfig(r=4, **TARGET), "Linear4bit", "Linear8bitLt"),
    "road": (RoadConfig(group_size=2, **TARGET), "Linear4bit", "Linear8bitLt"),
}


def adapted(kind, config=None):
    return get_peft_model(STORAGES[kind].model(), config or LoraConfig(r=4, **TARGET)).eval()


@pytest.mark.parametrize(("kind", "place"), [("nf4", 1), ("fp4", 1), ("int8", 2)])
@pytest.mark.parametrize("method", METHODS)
def test_layers_of_bitsandbytes(method, kind, place):
    found = getattr(importlib.import_module(f"peft.tuners.{method}.bnb"), METHODS[method][place])
    layer = adapted(kind, METHODS[method][0]).base_model.model.layer
    assert type(layer) is found and isinstance(layer, BaseTunerLayer)
    assert repr(layer).startswith(f"{method}.{METHODS[method][place]}(") and "quantization_backend" not in repr(layer)
    assert isinstance(layer, LoraLayer) == (method == "lora")
    assert type(copy.deepcopy(layer)) is found
    assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("hqq", "hqq.HqqLoraLinear"),
        ("torchao-int8", "torchao.TorchaoLoraLinear"),
        ("torchao-int4", "torchao.TorchaoLoraLinear"),
    ],
)
def test_layers_of_other_libraries(kind, path):
    file, name = path.split(".")
    layer = adapted(kind).base_model.model.layer
    assert type(layer) is getattr(importlib.import_module(f"peft.tuners.lora.{file}"), name)
    assert isinstance(layer, LoraLayer)


@pytest.mark.parametrize(("label", "path"), [("aqlm 2x8", "aqlm.AqlmLoraLinear"), ("te fp8", "te.TeLinear")])
def test_layers_of_libraries_that_are_not_here(label, path):
    file, name = path.split(".")
    net = nn.ModuleDict({"layer": LAYERS[label]()})
    layer = get_peft_model(net, LoraConfig(r=2, **TARGET)).base_model.model["layer"]
    assert type(layer) is getattr(importlib.import_module(f"peft.tuners.lora.{file}"), name)


@pytest.mark.parametrize(
    "path",
    [
        "lora.eetq.EetqLoraLinear",
        "lora.inc.IncLoraLinear",
        "lora.gptq.GPTQLoraLinear",
        "lora.awq.AwqLoraLinear",
        "adalora.gptq.SVDQuantLinear",
    ],
)
def test_names_that_there_are(path):
    file, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(f"peft.tuners.{file}"), name)
    assert issubclass(kind, BaseTunerLayer) and kind.__name__ == name


@pytest.mark.parametrize(("kind", "name"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_a_forward_that_is_put_in_place_of_the_class_s_is_the_one_that_runs(kind, name, monkeypatch):
    """unsloth does this with `peft.tuners.lora.bnb.Linear4bit`, before and after models are built."""
    from peft.tuners.lora import bnb

    before, found = adapted(kind), getattr(bnb, name)
    x = STORAGES[kind].x()

    def forward(self, x, *args, **kwargs):
        a, b, scale = (getattr(self, part)[self.active_adapters[0]] for part in ("lora_A", "lora_B", "scaling"))
        assert not self.disable_adapters and not self.merged
        return self.base_layer(x) + scale * b(a(x)) + 1

    with torch.no_grad():
        wanted = before(x) + 1
        monkeypatch.setattr(found, "forward", forward)
        for model in (before, adapted(kind)):
            torch.testing.assert_close(model(x), wanted, rtol=2e-2, atol=2e-2)


def test_a_step_of_training_through_a_forward_that_was_put_in_place(monkeypatch):
    from peft.tuners.lora import bnb

    model, twin = adapted("nf4").train(), adapted("nf4").train()
    twin.load_state_dict(model.state_dict(), strict=False)

    def forward(self, x):
        a, b = self.lora_A["default"], self.lora_B["default"]
        return self.base_layer(x) + self.scaling["default"] * b(a(self.lora_dropout["default"](x)))

    x = STORAGES["nf4"].x().requires_grad_()
    twin(x).square().sum().backward()
    monkeypatch.setattr(bnb.Linear4bit, "forward", forward)
    model(x.detach().requires_grad_()).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", STORAGES)
def test_weights_are_dequantised_by_the_public_functions(kind):
    layer = STORAGES[kind].model().layer
    W = numbers(layer)
    weight = dequantize_module_weight(layer)
    assert isinstance(weight, nn.Parameter) and torch.equal(weight, W)
    backend = resolve_quantization_backend(layer)
    assert torch.equal(backend.get_base_weight(layer), W) and backend.supports_merge
    held = getattr(layer, "weight", None)
    wanted = "4bit" if kind in ("nf4", "fp4") else "8bit" if kind == "int8" else False
    assert get_bnb_param_type(held) == wanted
    if wanted:
        assert torch.equal(dequantize_bnb_weight(held, state=getattr(layer, "state", None)), W)
    else:
        with pytest.raises(ValueError, match="must be a quantised one of bitsandbytes"):
            dequantize_bnb_weight(held)


@pytest.mark.parametrize("kind", STORAGES)
def test_weights_are_written_by_the_public_backend(kind):
    model = adapted(kind)
    layer = model.base_model.model.layer
    backend, W = resolve_quantization_backend(layer.get_base_layer()), numbers(layer.get_base_layer())
    backend.set_base_weight(layer, W * 0.5)
    found = backend.get_base_weight(layer.get_base_layer())
    assert (found - W * 0.5).norm() < 0.1 * (W * 0.5).norm()


def test_a_dense_layer_has_no_backend():
    assert resolve_quantization_backend(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["bnb", "bnb_4bit", "torchao", "hqq", "aqlm", "eetq", "gptqmodel", "inc", "te"])
def test_what_is_installed_can_be_asked(name):
    from peft import import_utils

    told = getattr(import_utils, f"is_{name}_available")()
    package = {"bnb_4bit": "bitsandbytes", "bnb": "bitsandbytes", "te": "transformer_engine"}.get(name, name)
    there = importlib.util.find_spec("neural_compressor" if name == "inc" else package) is not None
    assert told is there


def test_unknown_layers_of_quantisers_say_what_is_missing():
    """A class that is not known is adapted by methods that need its forward alone."""
    kind = qualified(type("SpecialLinear", (nn.Module,), {}), "someones.quantizer", "SpecialLinear")
    layer = kind()
    layer.in_features, layer.out_features, layer.bias = IN, OUT, None
    layer.weight = nn.Parameter(torch.zeros(OUT, IN // 2, dtype=torch.uint8), requires_grad=False)
    layer.forward = types.MethodType(lambda self, x: x[..., :OUT], layer)
    net = nn.ModuleDict({"layer": layer})
    model = get_peft_model(net, LoraConfig(r=2, init_lora_weights=False, **TARGET))
    lora, x = model.base_model.model["layer"], torch.randn(3, IN)
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    torch.testing.assert_close(lora(x), x[..., :OUT] + lora.scaling["default"] * x @ a.T @ b.T)
    with pytest.raises(NotImplementedError, match=r"torch\.uint8"):
        model.merge_adapter()
    assert storage.of(layer, "weight").packed and peft.PeftType.LORA in {
        c.peft_type for c in model.peft_config.values()
    }
