"""Layers and inputs out of the ordinary: the right answer, or a refusal that names the layer and the way out."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import peft
from conformance.layouts import LAYOUTS, Layout
from conformance.oracles import METHODS
from conformance.rows import adapted, forbidden
from peft import (
    DeloraConfig,
    FrodConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.algebra import extract

LINEAR = LAYOUTS["linear"]
BY_SAMPLE = [  # Lily's router reads the mean of all rows that run together
    name for name, row in METHODS.items() if forbidden(name, LINEAR) is None and not row.tasks and name != "lily"
]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": False, **fields})


# ---- nested tensors ---------------------------------------------------------------------------------------------


@pytest.fixture
def prototype():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
        yield


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("method", BY_SAMPLE)
def test_parts_of_a_nested_tensor_are_what_each_is_alone(method, layout, prototype):
    model = adapted(method, LINEAR)
    parts = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    for learns in (False, True):
        with torch.set_grad_enabled(learns):
            wanted = [model(part) for part in parts]
            found = model(torch.nested.nested_tensor(parts, layout=layout))
        for one, other in zip(found.unbind(), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("fields", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_nested_tensors_give_the_gradients_of_their_parts(fields, layout, prototype):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), lora(**fields))
    parts = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(torch.nested.nested_tensor(parts, layout=layout))
    found = torch.autograd.grad(torch.cat(y.unbind()).square().sum(), trained)
    wanted = torch.autograd.grad(sum(model(part).square().sum() for part in parts), trained)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config", [lora(use_dora=True), IA3Config(feedforward_modules=[]), OFTConfig(oft_block_size=2)], ids=str
)
def test_an_encoder_that_leaves_out_padding_is_what_it_is_with_gradients(config, prototype):
    torch.manual_seed(0)
    part = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    config.target_modules = {"self_attn", "linear1", "linear2"}
    model = get_peft_model(nn.TransformerEncoder(part, 2), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 10)
    x, absent = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    wanted = model(x, src_key_padding_mask=absent)
    with torch.no_grad():
        found = model(x, src_key_padding_mask=absent)
    torch.testing.assert_close(found[~absent], wanted[~absent], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "loha"])
def test_a_mixed_batch_without_positions_is_empty(method, learns):
    model = adapted(method, LINEAR, names=("default", "other"))
    with torch.set_grad_enabled(learns):
        y = model(torch.randn(4, 0, 6), adapter_names=["default", "other", "__base__", "other"])
    assert y.shape == (4, 0, 8)
    if learns:
        y.sum().backward()


# ---- weights of which nothing can be made -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, DeloraConfig])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_inputs_or_outputs_is_left_out_or_refused(config, shape):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(*shape))
    with pytest.raises(ValueError, match=rf"selects '1', but its weight, \({shape[1]}, {shape[0]}\), has no elements"):
        get_peft_model(model, config(target_modules=["0", "1"]))
    model = get_peft_model(model, config(target_modules="all-linear"))
    assert type(model.base_model.model[1]) is nn.Linear


@pytest.mark.parametrize("config", [lora(), lora(use_dora=True), IA3Config(feedforward_modules=[])], ids=str)
def test_complex_numbers_are_refused(config):
    """Adapters of real numbers had gradients of real parts alone."""
    config.target_modules = {"0"}
    with pytest.raises(ValueError, match="selects '0', but its weight holds complex numbers"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), config)


class Held(nn.Module):
    """Matrices in one of torch's containers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        weight = torch.randn(4, 4, dtype=torch.complex64 if kind == "complex" else torch.float32)
        self.held: Any = nn.ParameterDict({"0": weight}) if kind == "dict" else nn.ParameterList([weight])
        if kind == "complex":
            self.held = nn.Module()
            self.held.register_parameter("0", nn.Parameter(weight))


@pytest.mark.parametrize(
    "kind, text", [("dict", "a ParameterDict"), ("list", "a ParameterList"), ("complex", "complex numbers")]
)
def test_parameters_that_no_layer_can_stand_for_are_refused(kind, text):
    with pytest.raises(ValueError, match=f"target_parameters selects 'held.0', which .*{text}"):
        get_peft_model(Held(kind), LoraConfig(target_parameters=["held.0"]))


@pytest.mark.parametrize("module", [nn.LSTM(4, 4), nn.ConvTranspose1d(4, 4, 2), nn.EmbeddingBag(4, 4)], ids=str)
def test_the_way_to_weights_of_other_modules_is_named(module):
    with pytest.raises(
        ValueError, match=r"is not supported; .* Adapt its weights one by one, with target_param"
    ) as found:
        get_peft_model(nn.Sequential(module), lora())
    way = str(found.value).split("target_parameters=['")[1].split("']")[0]
    model = get_peft_model(nn.Sequential(module), LoraConfig(target_parameters=[way]))
    assert any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="Target the layers inside it"):
        get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), lora())


def test_a_weight_whose_elements_share_memory_is_not_merged_into():
    torch.manual_seed(0)
    base = nn.Linear(4, 6)
    base.weight = nn.Parameter(torch.randn(1, 4).expand(6, 4))
    model, x = get_peft_model(nn.Sequential(base), lora()), torch.randn(3, 4)
    wanted = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"Elements of the weight of '0' share memory \(it is expanded\)"):
            merge()
    base.weight.data = base.weight.data.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


# ---- layers that do something else ------------------------------------------------------------------------------


class Twofold(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("kind", ["Lora", "LoHa", "FourierFT", "Vera", "OFT"])
def test_a_layer_that_returns_no_tensor_is_refused_by_name(kind):
    fields = {"FourierFT": {"n_frequency": 2}, "OFT": {"oft_block_size": 2}}.get(kind, {})
    model = get_peft_model(nn.Sequential(Twofold(4, 4)), getattr(peft, f"{kind}Config")(target_modules=["0"], **fields))
    with pytest.raises(TypeError, match="'0', a Twofold, returns no tensor but a tuple"):
        model(torch.randn(2, 4))
    with model.disable_adapter():
        assert len(model(torch.randn(2, 4))) == 2


@pytest.mark.parametrize("config", [lora(), lora(use_dora=True), LoHaConfig(target_modules=["0"], r=2)], ids=str)
def test_an_embedding_with_sparse_gradients_has_an_adapter_with_dense_ones(config):
    layout = Layout("embedding", lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True)), (3,), tokens=9)
    model = get_peft_model(layout.model(), config)
    model(layout.x()).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and all(g is not None and g.layout is torch.strided for g in grads)


# ---- names ------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    """A parameter beside a layer, which may be called what adapted layers call the one inside them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.up = name, nn.Parameter(torch.randn(4, 4) / 2)
        self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        return getattr(self, self.name)(x) @ self.up


def named(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict([(name, nn.Linear(4, 4)), ("inner", Inner(name)), ("lora_A", nn.Linear(4, 4))]))


@pytest.mark.parametrize("name", ["base_layer", "original_module", "token_adapter", "lora_B", "default", "weight"])
@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules="all-linear"),
        lora(target_modules=[], target_parameters=["inner.up"]),
        FrodConfig(sparse_rate=0.1, target_modules="all-linear"),
    ],
    ids=["layers", "parameter", "shared"],
)
def test_a_model_may_use_the_names_of_adapters(config, name, tmp_path):
    x = torch.randn(3, 4)
    model = get_peft_model(named(name), copy.deepcopy(config))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 10)
    wanted = model(x)
    assert not torch.allclose(wanted, named(name)(x))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(named(name), tmp_path)(x), wanted)
    plain = model.merge_and_unload()
    assert plain.state_dict().keys() == named(name).state_dict().keys()
    torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-5)


def test_the_keys_of_a_state_name_modules_called_base_layer():
    model = get_peft_model(named("base_layer"), lora(target_modules="all-linear"))
    state, x = get_peft_model_state_dict(model), torch.randn(3, 4)
    other = inject_adapter_in_model(lora(target_modules="all-linear"), named("base_layer"), state_dict=state)
    set_peft_model_state_dict(other, state)
    assert torch.equal(other(x), model(x))


def test_the_difference_of_models_with_modules_called_base_layer_is_extracted():
    base, tuned = named("base_layer"), named("base_layer")
    with torch.no_grad():
        for path in ("base_layer", "inner.base_layer"):
            tuned.get_submodule(path).weight.add_(torch.randn(4, 4) / 10)
    found = extract(base, tuned, 4)
    assert not found.report.others and len(found.state) == 4
    model = get_peft_model(base, found.config)
    set_peft_model_state_dict(model, found.state)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), tuned(x), rtol=1e-4, atol=1e-5)


def test_adapters_of_modules_called_base_layer_are_inspected_and_converted(tmp_path):
    model = get_peft_model(named("base_layer"), LoHaConfig(r=2, target_modules=["base_layer"], init_weights=False))
    model.save_pretrained(tmp_path)
    assert not peft.inspection.inspect_adapter(tmp_path).problems
    made, state = peft.convert_to_lora(model, rank=4)
    other, x = get_peft_model(named("base_layer"), made), torch.randn(3, 4)
    set_peft_model_state_dict(other, state)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)


class Scaled(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


def test_a_merge_into_a_layer_that_is_told_more_than_its_input_warns():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Scaled(4, 4)

        def forward(self, x, **more):
            return self.layer(x, **more)

    model, x = get_peft_model(Around(), lora(target_modules=["layer"])), torch.randn(3, 4)
    model.merge_adapter()
    model.unmerge_adapter()
    model(x, scale=2.0)
    with pytest.warns(peft.errors.PeftWarning, match="'layer', a Scaled, has been called with more than its input"):
        model.merge_adapter()
    model.unmerge_adapter()
    rotated = get_peft_model(Around(), OFTConfig(oft_block_size=2, target_modules=["layer"]))
    wanted = rotated(x, scale=2.0)
    rotated.merge_adapter()  # which is exact, and says nothing
    torch.testing.assert_close(rotated(x, scale=2.0), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "oft", "road-1"])
def test_a_convolutions_output_lies_in_memory_as_without_an_adapter(method):
    layout, last = LAYOUTS["conv-2d"], {"memory_format": torch.channels_last}
    model, x = adapted(method, layout), layout.x()
    wanted = model(x).detach()
    model, x = model.to(**last), x.to(**last)
    assert layout.plain().to(**last)(x).is_contiguous(**last)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            y = model(x)
        assert y.is_contiguous(**last)
        torch.testing.assert_close(y, wanted)
