"""The road of an adapter on a quantised linear layer, for layers whose numbers a test has worked out on its own."""

import torch
import torch.nn.functional as F
from torch import nn

from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.core import storage
from tests.storages_common import Net, bits

METHODS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["layer"]),
    "dora": lambda: LoraConfig(r=2, target_modules=["layer"], use_dora=True),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=["layer"]),
    "ia3": lambda: IA3Config(target_modules=["layer"], feedforward_modules=[]),
}


def read(layer, name="weight"):
    """The numbers of a layer's weight, as the storage that is found for it reads them."""
    return storage.of(layer, name).read(layer, name)


def payload(layer, name="weight"):
    """Copies of all tensors by which a layer holds its weight."""
    kind = storage.of(layer, name)
    return [t.detach().clone() for t in kind.tensors(kind.take(layer, name))]


def dense(W, bias=None):
    """An ordinary layer with numbers."""
    made = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(W)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def bias_of(layer):
    """The bias of a layer, or None; some libraries have an empty tensor where there is none."""
    b = getattr(layer, "bias", None)
    return b if b is not None and b.numel() else None


def filled(model, seed=0):
    """The model with small numbers in what its adapter trains, and none of it as it began."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:  # magnitudes and factors of IA3 near where they begin, all else from the same draw
                p.copy_(torch.randn_like(p) / 8 + (p if "magnitude" in name or "ia3" in name else 0))
    return model


def pair(make, W, method="lora"):
    """(the layer adapted, the same adapter on an ordinary layer with the numbers W)."""
    layer = make()
    twin = Net(dense(W, bias_of(layer)))
    return tuple(filled(get_peft_model(net, METHODS[method]())) for net in (Net(layer), twin))


def on_quantised_as_on_dense(make, W, method, exact=True):
    """Outputs, the base's own output, and every gradient.

    Arguments:
        exact: whether two calls of the layer give the same bits.
    """
    model, twin = pair(make, W, method)
    results = []
    for net in (model, twin):
        x = (torch.arange(4 * W.shape[1]).view(4, -1) / 37).sin().requires_grad_()
        y = net(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= 2e-5 * wanted.norm()
    with torch.no_grad(), model.disable_adapter():
        x = torch.randn(3, W.shape[1])
        torch.testing.assert_close(model(x), make()(x), **({"rtol": 0, "atol": 0} if exact else {}))
    assert (model(x) - make()(x)).abs().max() > 0.01


def counted_saved_and_loaded(make, W):
    """Logical parameters are counted, and a file made on the quantised layer is one for the dense layer."""
    model, twin = pair(make, W)
    assert model.get_nb_trainable_parameters() == twin.get_nb_trainable_parameters()
    state = get_peft_model_state_dict(model)
    other = get_peft_model(Net(make()), METHODS["lora"]())
    set_peft_model_state_dict(other, state)
    x = torch.randn(3, W.shape[1])
    torch.testing.assert_close(other(x), model(x))
    assert {k: v.shape for k, v in get_peft_model_state_dict(twin).items()} == {k: v.shape for k, v in state.items()}


def merged_and_unmerged(make, W, worst, modes=("requantize", "compensated", "dequantize")):
    """Each way of merging holds W' as closely as it may, computes with it, and gives the very payload back.

    Arguments:
        worst: the largest relative error of a requantised W'.
    """
    model, _ = pair(make, W)
    base, x = model.base_model.model.layer.get_base_layer(), torch.randn(3, W.shape[1])
    with torch.no_grad():
        wanted, update = model(x), model.base_model.model.layer.get_delta_weight("default")
        before, kind = payload(base), type(base)  # as the first call has left it
        for mode in modes:
            (error,) = model.merge_adapter(quantized=mode).values()
            now = model.base_model.model.layer.get_base_layer()
            held = read(now)
            real = (held - W - update).norm() / (W + update).norm()
            assert abs(error.relative - real) < 1e-3
            torch.testing.assert_close(model(x), F.linear(x, held, bias_of(now)), rtol=1e-4, atol=1e-4)
            if mode == "dequantize":
                torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
            else:
                assert type(now) is kind
                assert real < worst if mode == "requantize" else real < 3 * worst
            model.unmerge_adapter()
            same(payload(model.base_model.model.layer.get_base_layer()), before)
            torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
        plain = model.merge_and_unload(quantized="dequantize")
        assert type(plain.layer) is nn.Linear
        torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-4)


def rewriting_changes_nothing(make):
    """Numbers that were read from a payload go back into it as they were, whether scales are found anew or kept."""
    layer = make()
    kind, before = storage.of(layer, "weight"), payload(layer)
    taken = kind.take(layer, "weight")
    for way in (kind.pack, kind.repack):
        made = way(read(layer), taken)
        same([bits(kind.unpack(made))], [bits(kind.unpack(taken))])
    kind.write(layer, "weight", read(layer))
    assert torch.equal(read(layer), read(make()))
    kind.restore(layer, "weight", taken)
    same(payload(layer), before)


def same(found, wanted):
    """Bit for bit."""
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(bits(one), bits(other))
