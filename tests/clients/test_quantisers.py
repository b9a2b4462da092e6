"""GPTQ, AWQ and INC in the packages that make them, where these are installed; they run on any machine.

Words are packed bit by bit from the formats (`storages_stand`), and the packages' own layers compute with them: what
this library reads must be what they multiply with, and what it writes what they multiply with afterwards.
"""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch

from peft import LoraConfig, get_peft_model
from peft.core import storage
from tests import storages_stand as stand
from tests.storages_common import same_state
from tests.storages_stand import GROUP, IN, OUT
from tests.test_storages_codes import Around

pytestmark = pytest.mark.filterwarnings("ignore")  # what the packages say of graphics cards
QLINEAR = "gptqmodel.nn_modules.qlinear"
INC = "neural_compressor.torch.algorithms.weight_only.modules"


def found(path):
    """A class, or the test is skipped."""
    module, name = path.rsplit(".", 1)
    pytest.importorskip(module.partition(".")[0], exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(module), name)


def modelled(path, made, bits, acts=False):
    """A layer of gptqmodel with the tensors of a stand-in."""
    sizes = {"in_features": IN, "out_features": OUT, "group_size": GROUP, "bits": bits}
    m = found(f"{QLINEAR}.{path}")(
        sym=False, desc_act=acts, bias=True, pack_dtype=torch.int32, register_buffers=True, **sizes
    )
    for name, buffer in made.module.state_dict().items():
        if hasattr(m, name):
            setattr(m, name, buffer.to(getattr(m, name).dtype).clone())
    if hasattr(m, "qzero_format") and "awq" not in path:
        m.qzero_format(2)
    m.post_init()
    return m.eval()


def gptq(bits, acts):
    return modelled("torch.TorchLinear", stand.gptq(bits, acts), bits, acts), stand.gptq(bits, acts)


def awq_model():
    made = stand.awq(stand.WQLinear_GEMM)
    return modelled("torch_awq.AwqTorchLinear", made, 4), made


def auto_awq():
    made = stand.awq(stand.WQLinear_GEMM)
    m = found("awq.modules.linear.gemm.WQLinear_GEMM")(4, GROUP, IN, OUT, True, "cpu")
    for name, buffer in made.module.state_dict().items():
        setattr(m, name, buffer.to(getattr(m, name).dtype).clone())
    return m, made


def inc(bits, optimum, axis, zeros):
    made = stand.inc(bits, optimum, axis, zeros)
    settings = {"bits": bits, "group_size": GROUP, "zp": zeros, "compression_dim": axis, "use_optimum_format": optimum}
    m = found(f"{INC}.INCWeightOnlyLinear")(IN, OUT, bias=True, **settings)
    g = torch.arange(0, IN, GROUP)
    z = made.zeros[g].T.contiguous().int() if zeros else None
    m.pack(made.codes.T.contiguous().int(), made.scale[g].T.contiguous(), z, made.module.bias)
    return m, made


LAYERS = {
    **{f"gptq-{b}-{a}": (lambda b=b, a=a: gptq(b, a)) for b in (2, 3, 4, 8) for a in (False, True)},
    "gptqmodel-awq": awq_model,
    "autoawq": auto_awq,
    "inc-4": lambda: inc(4, True, 1, True),
    "inc-3": lambda: inc(3, True, 1, True),
    "inc-in-2": lambda: inc(2, False, 1, True),
    "inc-out-4": lambda: inc(4, False, 0, True),
    "inc-signed-8": lambda: inc(8, False, 1, False),
}
each = pytest.mark.parametrize("name", LAYERS)


def unchanged(module, before):
    """Whether all tensors of the weight are as they were; INC adds some, and gives its bias another dtype."""
    now, then = module.state_dict(), {k: v for k, v in before.items() if k != "bias"}
    return same_state({k: now[k] for k in then}, then)


def close(found, wanted):
    """To within what a product in half precision rounds."""
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-2, atol=4e-3 * float(wanted.abs().max()))


@each
@torch.no_grad()
def test_what_is_read_and_written_is_what_the_package_multiplies_with(name):
    module, made = LAYERS[name]()
    kind, x = storage.of(module, "weight"), torch.randn(5, IN).to(made.weight.dtype)
    before, payload = copy.deepcopy(module.state_dict()), kind.save(module, "weight")
    assert torch.equal(kind.read(module, "weight"), made.weight) and "form" in payload
    for key, tensor in made.module.state_dict().items():
        if key not in ("bias", "g_idx"):
            assert torch.equal(before[key], tensor), key
    y = module(x)
    close(y, x @ made.weight.T + module.bias.to(x.dtype))
    kind.write(module, "weight", made.weight)
    assert unchanged(module, before)
    kind.write(module, "weight", made.weight * 2)
    read = kind.read(module, "weight")
    close(module(x), x @ read.T + module.bias.to(x.dtype))
    assert not torch.equal(read, made.weight)
    kind.restore(module, "weight", payload)
    assert unchanged(module, before) and torch.equal(module(x), y)


@each
def test_adapted_trained_and_merged(name):
    module, made = LAYERS[name]()
    dtype = made.weight.dtype
    around = Around(module).to(dtype)
    before = copy.deepcopy(module.state_dict())
    model = get_peft_model(around, LoraConfig(r=2, target_modules="all-linear", lora_alpha=8))
    layer = model.base_model.model.layer
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, IN).to(dtype).requires_grad_()
    W = made.weight.float() + layer.get_delta_weight("default").detach().float()
    y = model(x)
    close(y, (x.float() @ W.T + module.bias.float()).detach())
    y.float().sum().backward()
    close(x.grad, W.sum(0).expand(4, IN))
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    for mode in ("requantize", "dequantize"):
        model.merge_adapter(quantized=mode)
        base = layer.get_base_layer()
        read = storage.of(base, "weight").read(base, "weight").float()
        with torch.no_grad():
            close(model(x), x.float() @ read.T + module.bias.float())
        model.unmerge_adapter()
        assert unchanged(module, before)


@pytest.mark.parametrize("path", ["torch_aten_kernel.TorchAtenLinear", "torch_aten_kernel_awq.TorchAtenAwqLinear"])
@torch.no_grad()
def test_a_kernel_s_own_layout_is_read_through_its_product(path):
    made = stand.awq(stand.WQLinear_GEMM) if "awq" in path else stand.gptq(4)
    module = modelled(path, made, 4)
    module(torch.randn(2, IN).half())  # puts the words in the kernel's order
    kind = storage.of(module, "weight")
    close(kind.read(module, "weight"), made.weight)
    with pytest.raises(NotImplementedError, match="Linear: how its kernel"):
        kind.write(module, "weight", made.weight)
