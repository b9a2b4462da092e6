"""GPTQ, AWQ, INC and EETQ: their numbers, words and forwards as published, on layers that stand for the real ones."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from torch import nn

from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    LossyMergeWarning,
    OFTConfig,
    PeftModel,
    get_layer_status,
    get_peft_model,
)
from peft.core import storage
from tests import storages_stand as stand
from tests.storages_common import Net, qualified, same_state
from tests.storages_stand import IN, LAYERS, OUT

each = pytest.mark.parametrize("name", LAYERS)
SOME = ("gptq-4", "gptq-first-acts", "awq", "awq-gemv", "inc-signed-3", "eetq-tiles")
some = pytest.mark.parametrize("name", SOME)
LABELS = {"gptq": "gptq", "awq": "awq", "inc": "inc", "eetq": "eetq"}


def held(module):
    """(storage, payload) of a layer."""
    kind = storage.of(module, "weight")
    return kind, kind.save(module, "weight")


def state(module):
    """Copies of all tensors of a layer."""
    return {k: v.clone() for k, v in module.state_dict().items()}


class Around(Net):
    """A layer beside another, which tells in what dtype the model computes."""

    def __init__(self, layer):
        super().__init__(layer)
        self.norm = nn.LayerNorm(IN)


def lora(layer, **settings):
    """A model around a layer, with an adapter that does something."""
    torch.manual_seed(1)
    return get_peft_model(
        Around(layer), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **settings)
    )


def dense(weight, bias):
    """An ordinary layer of these numbers."""
    made = nn.Linear(IN, OUT)
    made.load_state_dict({"weight": weight.float(), "bias": bias})
    return made


@each
def test_numbers(name):
    made = LAYERS[name]()
    kind, m = storage.of(made.module, "weight"), made.module
    found = kind.read(m, "weight")
    assert torch.equal(found, made.weight) and found.dtype == kind.dtype(m, "weight")
    assert kind.label == LABELS[name.split("-")[0]] and kind.shape(m, "weight") == (OUT, IN) == tuple(found.shape)
    assert kind.numel(m, "weight") == IN * OUT
    assert torch.equal(kind.read(m, "weight", torch.float64), made.weight.double())
    assert not sys.modules.keys() & {"gptqmodel", "auto_gptq", "awq", "neural_compressor", "eetq"}


@each
def test_words_are_those_of_the_format(name):
    made = LAYERS[name]()
    (kind, payload), before = held(made.module), state(made.module)
    torch.manual_seed(3)
    codes = torch.randint(made.low, made.top + 1, (IN, OUT))
    kind.put(made.module, "weight", kind.repack(made.numbers(codes), payload))
    wanted = {**before, **made.again(codes)}
    assert same_state(made.module.state_dict(), wanted)
    assert torch.equal(made.module.numbers().to(made.weight.dtype), made.numbers(codes))
    kind.restore(made.module, "weight", payload)
    assert same_state(made.module.state_dict(), before)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_read_goes_back_bit_by_bit(name, dtype):
    made = LAYERS[name]()
    (kind, payload), before = held(made.module), state(made.module)
    value = kind.read(made.module, "weight", dtype)
    if dtype == torch.float32 or made.weight.dtype == dtype:
        kind.write(made.module, "weight", value)
        assert same_state(made.module.state_dict(), before)
    kind.put(made.module, "weight", kind.repack(value, payload))
    assert same_state(made.module.state_dict(), before)


@each
def test_rounded_with_the_same_settings(name):
    made = LAYERS[name]()
    kind, payload = held(made.module)
    torch.manual_seed(4)
    wanted = 3 * made.weight.float() + made.weight.float().std() * torch.randn(OUT, IN)
    kind.write(made.module, "weight", wanted)
    read = kind.read(made.module, "weight").float()
    _, zeros, scale, group = kind.grouped(held(made.module)[1])
    step = scale[group].T
    inner = (wanted / step + zeros[group].T > -0.5) & (wanted / step + zeros[group].T < made.top - made.low + 0.5)
    assert inner.float().mean() > 0.9  # the range has been fitted, of zeros and scales
    close = (read - wanted).abs() <= step * 0.501 + 2e-3 * wanted.abs()
    assert close[inner].all() and torch.equal(made.module.numbers().to(made.weight.dtype).float(), read)
    error = float((read - wanted).norm() / wanted.norm())
    old = kind.unpack(kind.repack(wanted, payload)).float()
    assert error < float((old - wanted).norm() / wanted.norm())
    assert error < {2: 0.6, 3: 0.3, 4: 0.15, 8: 0.01}[(made.top - made.low).bit_length()]


def test_symmetric_stays_symmetric_and_padding_stays():
    made = stand.gptq(4, symmetric=True)
    kind, _ = held(made.module)
    before = made.module.qzeros.clone()
    kind.write(made.module, "weight", made.weight * 2 + 0.01)
    assert torch.equal(made.module.qzeros, before)
    made = stand.awq(stand.WQLinear_GEMV)
    kind, _ = held(made.module)
    kind.write(made.module, "weight", made.weight * 2 + 0.01)
    assert not made.module.scales[:, IN // stand.GROUP :].any() and made.module.scales[:, : IN // stand.GROUP].all()


@pytest.mark.parametrize(("bits", "zero"), [(2, 0), (3, 8), (4, 0), (8, 0)])
def test_the_largest_stored_zero_of_the_first_format(bits, zero):
    made = stand.gptq(bits, second=False)
    made.module.qzeros.fill_(-1)
    kind, _ = held(made.module)
    assert (kind.grouped(held(made.module)[1])[1] == zero).all()
    assert torch.equal(kind.read(made.module, "weight"), made.module.numbers())
    kind.write(made.module, "weight", made.weight)
    assert int((kind.grouped(held(made.module)[1])[1]).max()) <= 2**bits - (zero == 0)


@each
def test_forward_and_gradients_are_those_of_the_dense_layer(name):
    made = LAYERS[name]()
    model = lora(made.module)
    plain = lora(dense(made.weight, made.module.bias))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" in k}, strict=False)
    x = torch.randn(3, IN)
    ys, grads = [], []
    for net in (model, plain):
        inp = x.clone().requires_grad_()
        y = net(inp)
        params = [p for n, p in net.named_parameters() if "lora" in n]
        ys.append(y.detach())
        grads.append(torch.autograd.grad(y.square().sum(), [inp, *params]))
    torch.testing.assert_close(*ys)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), made.module(x))


def test_small_gradients_of_bfloat16_pass_a_weight_of_float16():
    made = stand.gptq(4)
    model = lora(made.module)
    x = torch.randn(3, IN, dtype=torch.bfloat16, requires_grad=True)
    with model.disable_adapter():
        (found,) = torch.autograd.grad(model(x), x, torch.full((3, OUT), 1e-10, dtype=torch.bfloat16))
    wanted = made.weight.float().sum(0) * 1e-10
    torch.testing.assert_close(found[0].float(), wanted, rtol=0.05, atol=3e-12)


@some
def test_nothing_dense_is_kept(name):
    made = LAYERS[name]()
    model, kept = lora(made.module), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        model(torch.randn(3, IN, requires_grad=True)).sum()
    assert max(kept) < IN * OUT


@each
def test_merge_in_each_way_and_unmerge(name):
    made = LAYERS[name]()
    before, model, x = state(made.module), lora(made.module), torch.randn(3, IN)
    layer = model.base_model.model.layer
    W = made.weight.float() + layer.get_delta_weight("default")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LossyMergeWarning)
        wanted, size = model(x), float(W.norm())
        for mode in ("requantize", "compensated", "dequantize"):
            (error,) = model.merge_adapter(quantized=mode).values()
            base = layer.get_base_layer()
            read = storage.of(base, "weight").read(base, "weight").float()
            assert abs(error.relative - float((read - W).norm()) / size) < 2e-3
            if mode == "dequantize":
                torch.testing.assert_close(model(x), wanted, rtol=5e-3, atol=5e-2)
                assert type(base) is nn.Linear
            else:
                assert type(base) is type(made.module) and torch.equal(base.numbers().float(), read)
                torch.testing.assert_close(model(x), base(x))
            model.unmerge_adapter()
            assert layer.get_base_layer() is made.module and same_state(made.module.state_dict(), before)
            assert torch.equal(model(x), wanted)
        merged = copy.deepcopy(model).merge_and_unload(quantized="requantize")
        assert type(merged.layer) is type(made.module) and not same_state(merged.layer.state_dict(), before)
        plain = model.merge_and_unload(quantized="dequantize")
    torch.testing.assert_close(plain.layer.weight.float(), W.to(plain.layer.weight.dtype).float())


@some
def test_saved_and_loaded(name, tmp_path):
    model, x = lora(LAYERS[name]().module), torch.randn(3, IN)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(Around(LAYERS[name]().module), tmp_path)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


CONFIGS = {
    "dora": lambda: LoraConfig(r=2, target_modules=["layer"], use_dora=True, init_lora_weights=False),
    "pissa": lambda: LoraConfig(r=2, target_modules=["layer"], init_lora_weights="pissa"),
    "loha": lambda: LoHaConfig(r=2, target_modules=["layer"], init_weights=False),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["layer"], init_weights=False),
    "ia3": lambda: IA3Config(target_modules=["layer"], feedforward_modules=[], init_ia3_weights=False),
}


@some
@pytest.mark.parametrize("method", CONFIGS)
def test_other_methods(method, name):
    made = LAYERS[name]()
    torch.manual_seed(1)
    model = get_peft_model(Around(made.module), CONFIGS[method]())
    torch.manual_seed(1)
    plain = get_peft_model(Around(dense(made.weight, made.module.bias)), CONFIGS[method]())
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in names}, strict=False)
    x = torch.randn(3, IN)
    torch.testing.assert_close(model(x), plain(x), rtol=2e-3, atol=2e-3)
    found = model(x)
    with torch.no_grad():
        model.merge_adapter(quantized="dequantize")
        torch.testing.assert_close(model(x), found, rtol=1e-2, atol=5e-2)


@some
def test_found_counted_and_named(name):
    made = LAYERS[name]()
    net = nn.ModuleDict({"one": made.module, "two": nn.Linear(OUT, 4)})
    model = get_peft_model(net, LoraConfig(r=2, target_modules="all-linear"))
    assert model.targeted_module_names == ["one", "two"]
    trained, whole = model.get_nb_trainable_parameters()
    assert trained == 2 * (IN + OUT) + 2 * (OUT + 4) and whole - trained == IN * OUT + OUT * 4 + 4
    assert [status.name for status in get_layer_status(model)] == ["model.one", "model.two"]
    layer = model.base_model.model["one"]
    assert layer.view.shape(layer.get_base_layer()) == (OUT, IN)


def unstated():
    """gptqmodel's layer without the mark by which it says how it takes zeros."""

    class Bare(stand.Grouped):
        pass

    made = stand.gptq(4)
    made.module.__class__ = qualified(Bare, "gptqmodel.nn_modules.qlinear.torch", "TorchLinear")
    return made


def reordered():
    """A layer whose kernel has put its words in an order of its own, in a tensor of the same shape."""

    class Ordered(stand.TorchLinear):
        def numbers(self):
            q = stand.up(self.qweight.flip(0), IN, 4)
            z, g = stand.back(self.qzeros, OUT, 4), self.g_idx.long()
            return ((q - z[g]) * self.scales[g].float()).T.to(self.scales.dtype)

    made = stand.gptq(4)
    made.module.__class__ = qualified(Ordered, "gptqmodel.nn_modules.qlinear.torch", "TorchLinear")
    made.module.qweight = made.module.qweight.flip(0)
    return made


def eight():
    """INC's own arithmetic of eight-bit zeros, which leaves its range; `recover` gives what it computes with."""
    made = stand.inc(8)
    made.module.recover = lambda: made.weight.clone()
    return made


UNPUBLISHED = {
    "marlin": stand.marlin,
    "unstated": unstated,
    "reordered": reordered,
    "eetq-other": lambda: stand.eetq("other"),
    "inc-8": eight,
    "planar": lambda: changed(stand.gptq(4), planar=True),
    "awq-8": lambda: changed(stand.awq(stand.WQLinear_GEMM), w_bit=8),
}


def changed(made, **attributes):
    """A layer with other attributes."""
    made.module.__dict__.update(attributes)
    return made


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_a_layout_that_is_not_published_is_read_through_the_product_and_never_written(name):
    made = UNPUBLISHED[name]()
    before, bias = state(made.module), made.module.bias
    kind, _ = held(made.module)
    assert torch.equal(kind.read(made.module, "weight"), made.weight)
    assert kind.dtype(made.module, "weight") == made.weight.dtype
    assert made.module.bias is bias and same_state(made.module.state_dict(), before)
    model, x = lora(made.module), torch.randn(3, IN, requires_grad=True)
    wanted = model(x)
    (grad,) = torch.autograd.grad(wanted.sum(), x)
    layer = model.base_model.model.layer
    W = made.weight.float() + layer.get_delta_weight("default")
    torch.testing.assert_close(grad, W.sum(0).expand(3, IN), rtol=1e-4, atol=1e-4)
    for mode in ("requantize", "compensated"):
        with pytest.raises(NotImplementedError, match=rf"{type(made.module).__name__}: how its kernel.*dequantize"):
            model.merge_adapter(quantized=mode)
        assert same_state(made.module.state_dict(), before) and torch.equal(model(x), wanted)
    model.merge_adapter(quantized="dequantize")
    torch.testing.assert_close(model(x), wanted, rtol=5e-3, atol=5e-2)
    model.unmerge_adapter()
    assert torch.equal(model(x), wanted) and layer.get_base_layer() is made.module


@pytest.mark.parametrize("make", [eight, *(LAYERS[n] for n in SOME)])
def test_a_layer_without_data_can_be_adapted(make):
    made = make()
    model = lora(made.module.to("meta"), inference_mode=True)
    assert model.base_model.model.layer.view.shape(made.module) == (OUT, IN)


@some
def test_a_layer_that_cannot_run_here_is_taken_at_its_word(name):
    made = LAYERS[name]()
    m = made.module
    kind, payload = held(m)
    if name.startswith("eetq"):
        kind.read(m, "weight")  # what its bytes mean only a product tells

    def nowhere(x):
        raise RuntimeError("no kernel")

    m.forward = nowhere
    assert torch.equal(kind.read(m, "weight"), made.weight)
    kind.write(m, "weight", made.weight * 2)
    assert not torch.equal(kind.read(m, "weight"), made.weight)
    kind.restore(m, "weight", payload)
    assert torch.equal(kind.read(m, "weight"), made.weight)


def test_the_product_is_asked_once():
    made, calls = stand.gptq(4), []
    made.module.register_forward_hook(lambda *_: calls.append(1))
    kind, _ = held(made.module)
    for _ in range(3):
        kind.write(made.module, "weight", kind.read(made.module, "weight") * 1.5)
    assert len(calls) == 1


def test_an_embedding_under_the_name_of_a_linear_layer_is_refused():
    class Table(stand.TorchLinear):
        pass

    made = stand.gptq(4)
    made.module.__class__ = qualified(Table, "gptqmodel.nn_modules.qlinear.torch", "TorchQuantEmbeddings")
    net = nn.ModuleDict({"table": made.module, "one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="TorchQuantEmbeddings is not supported"):
        get_peft_model(net, LoraConfig(target_modules=["table"]))
    model = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    assert model.targeted_module_names == ["one", "two"]


def test_the_copy_that_an_inc_layer_keeps_goes_with_a_merge():
    made = stand.inc(4)
    m = made.module
    forward = m.forward

    def once(x):
        if "weight" not in m.__dict__:
            m.__dict__["weight"] = m.numbers()
        return nn.functional.linear(x, m.__dict__["weight"].to(x.dtype), m.bias)

    m.forward, x = once, torch.randn(3, IN)
    kind, _ = held(m)
    with torch.no_grad():
        m(x)
        kind.write(m, "weight", made.weight * 2)
        assert torch.equal(m(x), forward(x))
