"""Where adapters on quantised weights start: LoftQ in place and by turns; PiSSA, OLoRA, MiCA of dequantised weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from conformance.storages import IN, OUT, STORAGES, numbers, payload
from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from peft.core import storage
from tests.storages_road import same

KINDS = ["nf4", "fp4", "int8", "torchao-int8", "torchao-int4", "hqq"]
each = pytest.mark.parametrize("kind", KINDS)
R = 6


def dense():
    """The weight before quantisation."""
    torch.manual_seed(7)
    return nn.Linear(IN, OUT).weight.detach()


def built(kind, **more):
    config = LoraConfig(r=R, target_modules=["layer"], **more)
    return get_peft_model(STORAGES[kind].model(), config).eval()


def layer_of(model):
    return model.base_model.model.layer


def product(model):
    """s B A."""
    layer = layer_of(model)
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def error(found):
    return float((found - dense()).norm())


def answer(layer, x):
    """A layer's output as in training, where no library takes a quicker way that rounds more."""
    with torch.enable_grad():
        return layer(x.clone().requires_grad_()).detach()


def agrees(model, W, kind):
    """Whether the layer computes with W, as closely as its kernel does."""
    layer, x = layer_of(model), STORAGES[kind].x()
    found, wanted = answer(layer, x), F.linear(x, W, layer.get_base_layer().bias)
    return (found - wanted).abs().max() <= max(2e-5, STORAGES[kind].error) * wanted.abs().max()


@pytest.fixture
def file(tmp_path):
    """The dense weight in a file, as the base model's checkpoint has it."""
    save_file({"layer.weight": dense().clone(), "other.weight": torch.ones(2)}, str(tmp_path / "model.safetensors"))
    return str(tmp_path)


@each
@pytest.mark.parametrize("more", [{}, {"lora_alpha": 24}, {"lora_alpha": 3, "use_rslora": True}])
def test_loftq_in_place_is_the_best_there_is_of_its_rank(kind, more, file):
    model = built(kind, **more)
    Q, before = numbers(layer_of(model).get_base_layer()), payload(layer_of(model).get_base_layer())
    replace_lora_weights_loftq(model, file)
    with torch.no_grad():
        W = Q + product(model)
        rest = torch.linalg.svdvals((dense() - Q).double())[R:]
        assert abs(error(W) - float(rest.square().sum().sqrt())) < 1e-4 * error(Q)  # Eckart and Young
        assert error(W) < 0.9 * error(Q)
        assert agrees(model, W, kind)
    same(payload(layer_of(model).get_base_layer()), before)


@each
def test_loftq_in_place_saved_and_loaded(kind, file, tmp_path):
    model, x = built(kind), STORAGES[kind].x()
    replace_lora_weights_loftq(model, file)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(STORAGES[kind].model(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(answer(again, x), answer(model, x))
        before = numbers(layer_of(model).get_base_layer()) + product(model)
        merged = model.merge_and_unload(quantized="dequantize")
        torch.testing.assert_close(merged.layer.weight, before)
        assert error(merged.layer.weight) < 0.9 * error(numbers(STORAGES[kind].model().layer))


@each
def test_loftq_in_place_can_be_taken_back_layer_by_layer(kind, file):
    model = built(kind)
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    seen = []
    replace_lora_weights_loftq(model, file, callback=lambda model, name: seen.append(name))
    assert seen == ["layer"]
    for found, wanted in zip([p for p in model.parameters() if p.requires_grad], before, strict=True):
        assert torch.equal(found, wanted)


@each
def test_loftq_for_dense_weights_says_what_to_do(kind):
    with pytest.raises(TypeError, match=r"quantised already.*replace_lora_weights_loftq"):
        built(kind, init_lora_weights="loftq", loftq_config=LoftQConfig())


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_by_turns_comes_closer_than_quantising(bits):
    def start(turns):
        base = nn.Sequential(nn.Linear(IN, OUT))
        base[0].weight.data.copy_(dense())
        options = LoftQConfig(loftq_bits=bits, loftq_iter=turns)
        config = LoraConfig(r=R, target_modules=["0"], init_lora_weights="loftq", loftq_config=options)
        model = get_peft_model(base, config)
        with torch.no_grad():
            return model(torch.eye(IN)).mT - base[0].base_layer.bias[:, None]

    held = STORAGES["nf4" if bits == 4 else "int8"].store
    linear = nn.Linear(IN, OUT)
    linear.weight.data.copy_(dense())
    made = held(linear, compress_statistics=False) if bits == 4 else held(linear)
    plain, one, five = error(numbers(made)), error(start(1)), error(start(5))
    assert five < one < 0.9 * plain


STARTS = ["pissa", "pissa_niter_4", "olora", "mica"]


def factors(W, start, s):
    """(A0, B0) by the papers, in double precision; only their product is told where signs are free."""
    if start == "olora":
        Q, T = torch.linalg.qr(W.double())
        return s * Q[:, :R] @ T[:R]
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    return torch.zeros_like(W) if start == "mica" else (U[:, :R] * S[:R]) @ V[:R]


@each
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("alpha", [6, 24])
def test_decompositions_are_of_the_dequantised_weight(kind, start, alpha, tmp_path):
    model = built(kind, init_lora_weights=start, lora_alpha=alpha)
    held = layer_of(model).get_base_layer()
    Q, before = numbers(held), payload(STORAGES[kind].model().layer)
    same(payload(held), before)  # the base is what it was
    with torch.no_grad():
        first = product(model).clone()
        wanted = factors(Q, start, alpha / R)
        if "niter" in start:  # an estimate of the best product, which takes nearly as much of the weight
            assert (Q - first).norm() <= 1.02 * (Q - wanted).norm()
        else:
            assert (first - wanted).norm() <= 1e-4 * max(1, wanted.norm())
        assert agrees(model, Q, kind)  # and so is what it computes: no error is added to quantisation's own
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 50)
        W = Q + product(model) - first
        assert error(W) > error(Q) and agrees(model, W, kind)
        model.save_pretrained(str(tmp_path / "own"))
        again = PeftModel.from_pretrained(STORAGES[kind].model(), str(tmp_path / "own")).eval()
        assert agrees(again, W, kind)
        model.merge_adapter(quantized="dequantize")
        torch.testing.assert_close(numbers(layer_of(model).get_base_layer()).float(), W, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        same(payload(layer_of(model).get_base_layer()), before)


@each
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_no_more_is_lost_than_quantisation_took(kind, start):
    """The papers round the weight once more after its principal part was taken out; here it is not."""
    model = built(kind, init_lora_weights=start)
    held = layer_of(model).get_base_layer()
    with torch.no_grad():
        Q, part = numbers(held), product(model)
        way = storage.of(held, "weight")
        taken = way.take(held, "weight")
        rounded = way.unpack(way.pack(Q - part, taken)).float() + part
        x = torch.eye(IN)
        W = answer(layer_of(model), x).mT - held.bias[:, None]
    assert error(Q) * 0.999 < error(rounded)
    limit = 2e-2 if STORAGES[kind].error > 1e-3 else 1e-4
    assert abs(error(W) - error(Q)) < limit * float(dense().norm())


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_turned_into_an_ordinary_lora_for_the_same_base(kind, start, tmp_path):
    model, x = built(kind, init_lora_weights=start), STORAGES[kind].x()
    model.save_pretrained(str(tmp_path / "init"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 50)
        wanted = answer(model, x)
        model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "init"))
        plain = PeftModel.from_pretrained(STORAGES[kind].model(), str(tmp_path / "plain")).eval()
        assert plain.peft_config["default"].init_lora_weights is True and plain.peft_config["default"].r == 2 * R
        assert (answer(plain, x) - wanted).abs().max() <= max(1e-4, STORAGES[kind].error) * wanted.abs().max()


@each
def test_logical_parameters_are_printed(kind, capsys):
    model = built(kind)
    model.print_trainable_parameters()
    trainable = R * (IN + OUT)
    others = sum(p.numel() for n, p in model.named_parameters() if "layer" not in n)
    bias = layer_of(model).get_base_layer().bias
    every = trainable + IN * OUT + others + (OUT if isinstance(bias, nn.Parameter) else 0)
    wanted = (
        f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {100 * trainable / every:.4f}\n"
    )
    assert capsys.readouterr().out == wanted
