"""Adapters of different methods on one layer: each maps what the ones before it made."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, registry
from peft.core.layer import tuner_layers as hosts

from .layouts import LAYOUTS
from .oracles import METHODS
from .rows import FEW, adapted, close, config, forbidden, same, train, tuner_layers


def mixable(method: str) -> bool:
    kind = next(k for k in registry.METHODS if registry.config_class(k) is METHODS[method].config)
    whole = getattr(METHODS[method].config, "any_module", False)  # it replaces the layer, so that none can share it
    return METHODS[method].merges and not registry.tuner_class(kind).alone and not whole


ONE_EACH = {METHODS[m].config: m for m in reversed(FEW) if mixable(m)}
PAIRS = list(itertools.permutations([*ONE_EACH.values(), "dora"], 2))
each_pair = pytest.mark.parametrize("first, second", PAIRS)


def both(first: str, second: str, name: str = "linear") -> PeftModel:
    layout = LAYOUTS[name]
    for method in (first, second):
        if forbidden(method, layout):
            pytest.skip(f"{method} cannot be on {name}")
    model = adapted(first, layout)
    model.add_adapter("second", config(second, layout))
    model.__dict__["noise"] = METHODS[second].noise
    train(model, "second", seed=1)
    model.base_model.set_adapter(["default", "second"])
    return model.eval()


def composed(model: PeftModel, first: str, second: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """The formulas of the second method on the weight that those of the first gave."""
    plain = LAYOUTS[name].plain().double()
    ((path, layer),) = tuner_layers(model.base_model.model)
    module = plain.get_submodule(path)
    W, b = module.weight, module.bias
    original = W
    for method, adapter in ((first, "default"), (second, "second")):
        row = METHODS[method]
        W = row.weight(layer, adapter, W, original)
        b = b if row.bias is None else row.bias(layer, adapter, b)
    values = {f"{path}.weight": W, f"{path}.bias": b}
    return torch.func.functional_call(plain, values, (x.double(),)).float()


@each_pair
def test_two_methods_compose_merge_and_come_apart(first, second):
    model, x = both(first, second), LAYOUTS["linear"].x()
    before = {n: p.clone() for n, p in model.base_model.model.named_parameters() if "base_layer" in n}
    with torch.no_grad():
        y = model(x)
        close(y, composed(model, first, second, "linear", x), 1e-5)
        model.merge_adapter()
        close(model(x), y, 1e-5)
        model.unmerge_adapter()
        same(model(x), y)
        with model.disable_adapter():
            same(model(x), LAYOUTS["linear"].plain()(x))
    for n, p in model.base_model.model.named_parameters():
        if n in before:
            same(p, before[n])


@pytest.mark.parametrize("first, second", [p for p in PAIRS if "lora" in p or "dora" in p])
def test_each_sample_may_have_another_method(first, second):
    model, x = both(first, second), LAYOUTS["linear"].x()
    with torch.no_grad():
        found = model(x, adapter_names=["second", "__base__", "default", "second"])
        for i, adapter in enumerate(["second", None, "default", "second"]):
            if adapter is None:
                wanted = LAYOUTS["linear"].plain()(x[i : i + 1])
            else:
                model.set_adapter(adapter)
                wanted = model(x[i : i + 1])
            close(found[i : i + 1], wanted, 1e-5)


@pytest.mark.parametrize("first, second", [p for p in PAIRS if "lora" in p])
def test_a_bundle_of_methods_is_saved_and_loaded(first, second, tmp_path):
    model, x = both(first, second), LAYOUTS["linear"].x()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LAYOUTS["linear"].model(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        same(loaded.eval()(x), model(x))


def test_the_class_for_mixed_methods_switches_several_at_a_time():
    layout = LAYOUTS["linear"]
    model = get_peft_model(layout.model(), config("lora", layout), mixed=True)
    assert type(model) is PeftMixedModel
    model.add_adapter("second", config("ia3", layout))
    model.set_adapter(["default", "second"])
    assert model.base_model.active_adapters == ["default", "second"]
    with pytest.raises(ValueError, match="'thrid'"):
        model.set_adapter(["second", "thrid"])
    model.delete_adapter(["default", "second"])
    assert not any(host._get_available_adapters() for _, host in hosts(model))


def test_a_method_that_works_alone_refuses_company(monkeypatch):
    layout = LAYOUTS["linear"]
    model = get_peft_model(layout.model(), config("lora", layout))
    monkeypatch.setattr(registry.tuner_class("IA3"), "alone", True)
    with pytest.raises(ValueError, match="IA3Model takes adapters of its own method only"):
        model.add_adapter("second", config("ia3", layout))
    assert set(model.peft_config) == {"default"}


@pytest.mark.parametrize("parts", [["linear1"], ["linear1", "linear2"], ["self_attn", "linear2"]])
def test_a_mixed_batch_reaches_layers_that_torch_would_fuse(parts):
    layout = LAYOUTS["attention-encoder"]
    model, x = adapted("lora", layout, names=("default", "other"), target_modules=parts), layout.x()
    names = ["other", "__base__", "default", "other"]
    with torch.no_grad():
        found = model(x, adapter_names=names)
        for i, adapter in enumerate(names):
            model.set_adapter("default" if adapter == "__base__" else adapter)
            wanted = layout.plain()(x) if adapter == "__base__" else model(x)
            close(found[i : i + 1], wanted[i : i + 1], 1e-5)


def test_a_mixed_batch_is_refused_where_a_module_reads_one_weight_for_all():
    layout = LAYOUTS["attention-packed"]
    model, x = adapted("lora", layout, names=("default", "other"), target_modules=["out_proj"]), layout.x()
    with pytest.raises(ValueError, match="Target the module itself, which then runs once for each adapter"):
        model(x, adapter_names=["other", "__base__", "default", "other"])


class Block(torch.nn.Module):
    """A linear layer, and one of torch's that reads the weights of its parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8)
        self.rest = torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.rest(self.first(x))


def with_copies(copied):
    options = {"r": 2, "target_modules": ["first"], "modules_to_save": [copied], "init_lora_weights": False}
    model = get_peft_model(Block().eval(), LoraConfig(**options))
    model.add_adapter("other", LoraConfig(**options))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "modules_to_save" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model.eval()


def test_a_mixed_batch_reaches_whole_modules_that_torch_would_fuse():
    model, x = with_copies("linear1"), torch.randn(4, 3, 8)
    names = ["other", "__base__", "default", "other"]
    with torch.no_grad():
        found = model(x, adapter_names=names)
        for i, adapter in enumerate(names):
            model.set_adapter("default" if adapter == "__base__" else adapter)
            wanted = Block().eval()(x) if adapter == "__base__" else model(x)
            close(found[i : i + 1], wanted[i : i + 1], 1e-5)


def test_a_whole_module_whose_weight_is_read_refuses_a_mixed_batch():
    model, x = with_copies("out_proj"), torch.randn(4, 3, 8)
    with pytest.raises(ValueError, match=r"'rest\.self_attn\.out_proj' reads one weight"):
        model(x, adapter_names=["other", "__base__", "default", "other"])
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("copied", "names"),
    [("linear1", ["bare", "default", "__base__"]), ("norm1", ["bare", "__base__", "bare"])],
    ids=["beside rows with copies", "no rows have copies"],
)
def test_rows_of_an_adapter_without_a_copy_take_the_original_module(copied, names):
    model, x = with_copies(copied), torch.randn(3, 3, 8)
    model.add_adapter("bare", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    with torch.no_grad():
        found = model.eval()(x, adapter_names=names)
        for i, adapter in enumerate(names):
            model.set_adapter("bare" if adapter == "__base__" else adapter)
            wanted = Block().eval()(x) if adapter == "__base__" else model(x)
            close(found[i : i + 1], wanted[i : i + 1], 1e-5)


def test_a_mixed_batch_of_no_samples_reaches_a_module_that_reads_its_weights():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    model = get_peft_model(Block(), LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False)).eval()
    assert model(torch.zeros(0, 3, 6), adapter_names=[]).shape == (0, 3, 6)
