"""NVFP4 in three forms, AQLM and Transformer Engine, held against numbers worked out here.

Layers of packages that need a graphics card to be built are stand-ins under the names of their classes; the last tests
run the real ones where they are installed.
"""

import copy
import importlib
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.core import storage
from tests import storages_road as road
from tests.storages_common import Net, qualified
from tests.test_storages_blocks import E4M3, bytes_of_e4m3, decoded, made, scaled, unpacked

I, O = 96, 32


def frozen(value):
    return nn.Parameter(value, requires_grad=False)


def pairs():
    """Random codes, two in a byte."""
    return torch.randint(0, 256, (O, I // 2), dtype=torch.uint8)


def scales_of_16():
    return (torch.randint(1, 9, (O, I // 16)) * 16.0).to(E4M3)


class QTensorWrapper(nn.Parameter):
    """A parameter with a form: its codes are its data."""

    def __new__(cls, data, form):
        made = super().__new__(cls, data, requires_grad=False)
        made.metadata = {"qtensor_class": type(form, (), {}), "shape": (O, I), "dtype": torch.float32}
        return made

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), QTensorWrapper(self.data.clone(), self.metadata["qtensor_class"].__name__))


class ModelOpt(nn.Linear):
    """`RealQuantLinear`: codes in the weight, scales in the quantizer beside it."""

    def __init__(self, form):
        super().__init__(I, O)
        self.weight_quantizer = held = nn.Module()
        codes = bytes_of_e4m3(O, I) if form == "FP8QTensor" else pairs()
        if form == "NVFP4QTensor":
            held.register_buffer("_scale", scales_of_16())
            held.register_buffer("_double_scale", torch.tensor(1 / 1024))
        elif form == "MXFP4QTensor":
            held.register_buffer("_scale", torch.randint(120, 123, (O * I // 32, 1), dtype=torch.uint8))
        else:
            held.register_buffer("_scale", torch.tensor(0.001))
        del self.weight
        self.weight = QTensorWrapper(codes, form)

    def numbers(self):
        held, form = self.weight_quantizer, self.weight.metadata["qtensor_class"].__name__
        if form == "FP8QTensor":
            return decoded(self.weight.data) * held._scale
        if form == "MXFP4QTensor":
            return scaled(unpacked(self.weight.data), 2.0 ** (held._scale.float().view(O, -1) - 127), 1, 32)
        return scaled(unpacked(self.weight.data), decoded(held._scale) * held._double_scale, 1, 16)

    def forward(self, x):
        return F.linear(x, self.numbers(), self.bias)


class Compressed(nn.Linear):
    """`CompressedLinear` before its first call; the factor of NVFP4 is the reciprocal one."""

    def __init__(self, form):
        super().__init__(I, O)
        if form == "float":
            self.weight = frozen(bytes_of_e4m3(O, I))
            self.weight_scale = frozen(torch.rand(O, 1) / 500 + 0.001)
            return
        del self.weight
        self.weight_packed = frozen(pairs())
        if form == "nvfp4":
            self.weight_scale, self.weight_global_scale = frozen(scales_of_16()), frozen(torch.tensor([1000.0]))
        else:
            self.weight_scale = frozen(torch.randint(120, 123, (O, I // 32), dtype=torch.uint8))

    def numbers(self):
        if not hasattr(self, "weight_packed"):
            return scaled(decoded(self.weight), self.weight_scale.detach(), 1, I)
        codes, scale = unpacked(self.weight_packed.data), self.weight_scale.detach()
        if scale.dtype is torch.uint8:
            return scaled(codes, 2.0 ** (scale.float() - 127), 1, 32)
        return scaled(codes, decoded(scale) / self.weight_global_scale.detach(), 1, 16)

    def forward(self, x):
        return F.linear(x, self.numbers(), self.bias)


class Additive(nn.Module):
    """AQLM's `QuantizedLinear`; after a call it may keep its codes with columns first, as the package does on CPUs."""

    def __init__(self, i=I, o=O, books=2, bits=8, high=1, wide=8, turns=False):
        super().__init__()
        self.in_features, self.out_features, self.in_group_size, self.out_group_size = i, o, wide, high
        n = 2**bits
        codes = torch.randint(0, n, (o // high, i // wide, books))
        kind = torch.int8 if bits <= 8 else torch.int16
        self.codes = frozen((codes - n * (codes >= n // 2)).to(kind))
        self.codebooks = frozen(torch.randn(books, n, high, wide) / 4)
        self.scales = frozen(torch.rand(o // high, 1, 1, 1) + 0.5)
        self.bias = frozen(torch.randn(o))
        self.gemm_op, self.turns = None, turns

    def numbers(self):
        W, n = torch.zeros(self.out_features, self.in_features), self.codebooks.shape[1]
        turned = self.turns and self.gemm_op is not None
        codes = self.codes.transpose(0, 1) if turned else self.codes
        for a in range(codes.shape[0]):
            for b in range(codes.shape[1]):
                vector = sum(self.codebooks[c, int(codes[a, b, c]) % n] for c in range(codes.shape[2]))
                rows, columns = a * self.out_group_size, b * self.in_group_size
                area = W[rows : rows + self.out_group_size, columns : columns + self.in_group_size]
                area.copy_(vector * self.scales[a, 0, 0, 0])
        return W

    def forward(self, x):
        if self.gemm_op is None:
            self.gemm_op = F.linear
            if self.turns:
                self.codes.data = self.codes.data.transpose(0, 1).contiguous()
        return F.linear(x, self.numbers(), self.bias)


class Float8Tensor(torch.Tensor):
    """A tensor that says it is of a floating dtype, holds E4M3 and one scale, and rounds into itself."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data, scale):
        self.data8, self.scale = data, scale

    def dequantize(self, *, dtype=None):
        return (self.data8.float() * self.scale).to(dtype or torch.float32)

    def quantize_(self, values):
        self.scale = values.abs().amax() / 448
        self.data8 = (values / self.scale).to(E4M3)
        return self

    def __tensor_flatten__(self):
        return ["data8", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, f, kinds, args, kwargs=None):
        name = f.__name__.split(".")[0]
        if name in ("detach", "clone", "alias"):
            one = args[0]
            parts = (one.data8, one.scale)
            return cls(*(t.clone() for t in parts) if name == "clone" else parts)
        held = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return f(*held, **(kwargs or {}))


class Engine(nn.Module):
    """Transformer Engine's `Linear`: no class of torch's; without a bias its bias is empty."""

    def __init__(self, fp8, bias=True, return_bias=False):
        super().__init__()
        self.in_features, self.out_features, self.use_bias = I, O, bias
        self.return_bias = return_bias
        W = torch.randn(O, I) / 10
        if fp8:
            W = Float8Tensor(bytes_of_e4m3(O, I), torch.tensor(0.001))
        self.weight = nn.Parameter(W, requires_grad=False)
        self.bias = frozen(torch.randn(O)) if bias else torch.Tensor()

    def numbers(self):
        W = self.weight
        return W.data8.float() * W.scale if isinstance(W, Float8Tensor) else W

    def forward(self, x, is_first_microbatch=None):
        y = F.linear(x, self.numbers(), self.bias if self.use_bias and not self.return_bias else None)
        return (y, self.bias) if self.return_bias else y


qualified(QTensorWrapper, "modelopt.torch.quantization.qtensor.base_qtensor", "QTensorWrapper")
qualified(ModelOpt, "modelopt.torch.quantization.nn.modules.quant_linear", "RealQuantLinear")
qualified(Compressed, "compressed_tensors.linear.compressed_linear", "CompressedLinear")
qualified(Additive, "aqlm.inference", "QuantizedLinear")
qualified(Float8Tensor, "transformer_engine.pytorch.tensor.float8_tensor", "Float8Tensor")
qualified(Engine, "transformer_engine.pytorch.module.linear", "Linear")

WRITTEN = {
    "modelopt nvfp4": (made(ModelOpt, "NVFP4QTensor"), 0.2),
    "modelopt mxfp4": (made(ModelOpt, "MXFP4QTensor"), 0.2),
    "modelopt fp8": (made(ModelOpt, "FP8QTensor"), 0.04),
    "compressed nvfp4": (made(Compressed, "nvfp4"), 0.2),
    "compressed mxfp4": (made(Compressed, "mxfp4"), 0.2),
    "compressed fp8": (made(Compressed, "float"), 0.04),
    "te fp8": (made(Engine, True), 0.04),
    "te fp8 without a bias": (made(Engine, True, False), 0.04),
}
READ = {
    "aqlm 2x8": made(Additive),
    "aqlm 2x8 on a CPU": made(Additive, I, O, 2, 8, 1, 8, True),
    "aqlm square on a CPU": made(Additive, 32, 32, 1, 8, 1, 1, True),
    "aqlm 1x16": made(Additive, I, O, 1, 16),
    "aqlm with groups of rows": made(Additive, I, O, 2, 4, 2, 8),
    "te": made(Engine, False),
}
LAYERS = {name: make for name, (make, _) in WRITTEN.items()} | READ
each = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@each
def test_read_as_worked_out(make):
    layer = make()
    torch.testing.assert_close(road.read(layer), layer.numbers(), rtol=1e-6, atol=0)
    layer(torch.ones(1, layer.in_features))  # some put their codes in another order now
    torch.testing.assert_close(road.read(layer), make().numbers(), rtol=1e-6, atol=0)


@each
@pytest.mark.parametrize("method", road.METHODS)
def test_adapted_as_on_numbers(make, method):
    road.on_quantised_as_on_dense(make, make().numbers(), method)


@each
def test_copied(make):
    model, _ = road.pair(make, make().numbers())
    x = torch.randn(3, make().in_features)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@each
def test_counted_saved_and_loaded(make):
    road.counted_saved_and_loaded(make, make().numbers())


@pytest.mark.parametrize(("make", "worst"), WRITTEN.values(), ids=WRITTEN)
def test_merged_and_unmerged(make, worst):
    road.merged_and_unmerged(make, make().numbers(), worst)


@pytest.mark.parametrize(("make", "worst"), WRITTEN.values(), ids=WRITTEN)
def test_rewriting_changes_nothing(make, worst):
    road.rewriting_changes_nothing(make)


@pytest.mark.parametrize("name", ["modelopt nvfp4", "compressed nvfp4"])
def test_the_factor_grows_where_numbers_outgrow_it(name):
    make, worst = WRITTEN[name]
    layer, kind = make(), storage.of(make(), "weight")
    wanted = road.read(layer) * 1e4
    kind.write(layer, "weight", wanted)
    assert (road.read(layer) - wanted).norm() < worst * wanted.norm()
    torch.testing.assert_close(road.read(layer), layer.numbers(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [n for n in READ if n.startswith("aqlm")])
def test_numbers_are_not_written_into_aqlm(name):
    make = READ[name]
    model, _ = road.pair(make, make().numbers())
    x = torch.randn(3, make().in_features)
    with torch.no_grad():
        wanted = model(x)
        for mode in ("requantize", "compensated"):
            with pytest.raises(NotImplementedError, match=r"weight of AQLM.*quantized=\"dequantize\""):
                model.merge_adapter(quantized=mode)
            assert torch.equal(model(x), wanted)
    road.merged_and_unmerged(make, make().numbers(), 0, ["dequantize"])


def test_a_payload_of_aqlm_goes_back_after_the_layer_has_turned_its_codes():
    for name in ("aqlm 2x8 on a CPU", "aqlm square on a CPU"):
        layer = READ[name]()
        W, kind = layer.numbers(), storage.of(layer, "weight")
        before = kind.save(layer, "weight")
        layer(torch.ones(1, layer.in_features))
        kind.restore(layer, "weight", before)
        assert torch.equal(layer.numbers(), W)


def test_an_ordinary_weight_of_transformer_engine_is_merged_as_any():
    make = READ["te"]
    model, _ = road.pair(make, make().numbers())
    x = torch.randn(3, I)
    with torch.no_grad():
        wanted = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), wanted)
        model.unmerge_adapter()
        plain = model.merge_and_unload()
        assert type(plain.layer) is Engine
        torch.testing.assert_close(plain(x), wanted)


def test_a_bias_that_is_returned_apart():
    layer = made(Engine, False, True, True)()
    model = road.filled(get_peft_model(Net(layer), LoraConfig(r=2, target_modules="all-linear")))
    twin = road.filled(
        get_peft_model(Net(road.dense(layer.weight, layer.bias)), LoraConfig(target_modules="all-linear", r=2))
    )
    x = torch.randn(3, I)
    y, apart = model(x)
    torch.testing.assert_close(y + apart, twin(x))


@pytest.mark.parametrize("skip", [False, True])
def test_megatron_s_layers_over_transformer_engine(skip):
    """They always give a pair: (W x + b, None), or (W x, b) with `skip_bias_add`."""

    def forward(self, x):
        y = Engine.forward(self, x)
        return y if self.te_return_bias else (y, None)

    kind = type("TEColumnParallelLinear", (Engine,), {"forward": forward})
    qualified(kind, "megatron.core.extensions.transformer_engine", "TEColumnParallelLinear")
    layer = made(kind, True, True, skip)()
    layer.te_return_bias = skip
    W = layer.numbers()
    model = road.filled(get_peft_model(Net(layer), LoraConfig(r=2, target_modules="all-linear")))
    twin = road.filled(get_peft_model(Net(road.dense(W, layer.bias)), LoraConfig(r=2, target_modules="all-linear")))
    x = torch.randn(3, I)
    y, apart = model(x)
    torch.testing.assert_close(y if apart is None else y + apart, twin(x), rtol=1e-4, atol=1e-4)
    assert (apart is None) != skip
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x)[0], layer(x)[0])


@pytest.mark.parametrize("name", ["LayerNormLinear", "LayerNormMLP", "GroupedLinear"])
def test_layers_that_do_more_are_refused(name):
    where = f"transformer_engine.pytorch.module.{name.lower()}"
    layer = qualified(type(name, (nn.Module,), {}), where, name)()
    layer.in_features, layer.out_features, layer.weight = I, O, frozen(torch.randn(O, I))
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        get_peft_model(Net(layer), LoraConfig(r=2, target_modules=["layer"]))


def test_a_part_of_a_weight_of_transformer_engine_is_refused():
    layer = made(Engine, False)()
    layer.tp_size = 2
    with pytest.raises(ValueError, match=r"1/2 of its weight.*tensor-parallel size of 1"):
        get_peft_model(Net(layer), LoraConfig(r=2, target_modules=["layer"]))


@pytest.mark.parametrize("kind", ["modelopt", "compressed"])
def test_other_forms_serve_what_needs_no_numbers(kind):
    if kind == "modelopt":
        layer = made(ModelOpt, "NVFP4QTensor")()
        layer.weight.metadata["qtensor_class"] = type("INT4QTensor", (), {})
    else:
        layer = made(Compressed, "nvfp4")()
        layer.weight_packed = frozen(torch.zeros(O, I // 8, dtype=torch.int32))
    layer.forward = types.MethodType(lambda self, x: x[..., :O] * 2, layer)
    model = road.filled(get_peft_model(Net(layer), LoraConfig(r=2, target_modules=["layer"])))
    lora, x = model.base_model.model.layer, torch.randn(3, I)
    with torch.no_grad():
        update = F.linear(x, lora.lora_B["default"].weight @ lora.lora_A["default"].weight) * lora.scaling["default"]
        torch.testing.assert_close(model(x), x[..., :O] * 2 + update)
        with pytest.raises(NotImplementedError, match=r"cannot be read as numbers here; NVFP4, MXFP4 and FP8 can"):
            model.merge_adapter()


# ---- the real packages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("factor", [None, 0.001])
def test_nvfp4_of_torchao(swizzled, factor):
    kinds = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")

    def make():
        torch.manual_seed(1)
        layer = nn.Linear(I, O)
        over = None if factor is None else torch.tensor(factor)
        W = kinds.NVFP4Tensor.to_nvfp4(layer.weight.detach(), per_tensor_scale=over, is_swizzled_scales=swizzled)
        layer.weight = frozen(W)
        return layer

    held = make().weight
    scale, n = decoded(held.scale).flatten(), I // 16
    if swizzled:  # tiles of 128 x 4, and in each the rows r, r + 32, r + 64, r + 96 side by side
        tiles = -(-n // 4)
        place = [[(c // 4) * 512 + (r % 32) * 16 + (r // 32) * 4 + c % 4 for c in range(n)] for r in range(O)]
        assert len(scale) == tiles * 512
        scale = scale[torch.tensor(place)]
    W = scaled(unpacked(held.qdata), scale.view(O, n) * (1 if factor is None else factor), 1, 16)
    torch.testing.assert_close(road.read(make()), W)
    for method in road.METHODS:
        road.on_quantised_as_on_dense(make, W, method)
    road.counted_saved_and_loaded(make, W)
    road.merged_and_unmerged(make, W, 0.2)
    road.rewriting_changes_nothing(make)


@pytest.mark.parametrize("books", [(1, 8), (2, 8), (1, 16)])
@pytest.mark.parametrize("i", [I, 64])
def test_aqlm_itself(books, i):
    library = pytest.importorskip("aqlm")
    # with several threads the kernel for CPUs adds up into the same numbers at once, and some of its answers are wrong
    pytest.importorskip("numba").set_num_threads(1)
    count, bits = books

    def make():
        torch.manual_seed(1)
        held = Additive(i, 8 if i == 64 else O, count, bits)  # of i = 64 there are as many groups as rows
        layer = library.QuantizedLinear(i, held.out_features, 8, 1, count, bits, bias=True, dtype=torch.float32)
        layer.load_state_dict(held.state_dict())
        return layer.requires_grad_(False)

    rows = make().out_features
    torch.manual_seed(1)
    W = Additive(i, rows, count, bits).numbers()
    layer, x = make(), torch.randn(3, i)
    assert torch.equal(road.read(layer), W)
    torch.testing.assert_close(layer(x), F.linear(x, W, layer.bias))
    assert torch.equal(road.read(layer), W)
    for method in road.METHODS:
        road.on_quantised_as_on_dense(make, W, method, exact=False)
    road.counted_saved_and_loaded(make, W)
    road.merged_and_unmerged(make, W, 0, ["dequantize"])


@pytest.mark.parametrize("form", ["NVFP4_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_modelopt_itself(form):
    library = pytest.importorskip("modelopt.torch.quantization")

    def make():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(I, O))
        library.quantize(net, copy.deepcopy(getattr(library, form)), forward_loop=None)
        net[0].input_quantizer.disable()  # it needs a graphics card
        library.compress(net)
        return net[0].requires_grad_(False)

    layer = make()
    W = ModelOpt.numbers(layer)
    assert torch.equal(road.read(layer), W)
    torch.testing.assert_close(layer(torch.eye(I)).mT, W + layer.bias[:, None], rtol=1e-4, atol=1e-5)
    for method in road.METHODS:
        road.on_quantised_as_on_dense(make, W, method)
    road.counted_saved_and_loaded(make, W)
    road.merged_and_unmerged(make, W, 0.2)


@pytest.mark.parametrize("preset", ["NVFP4A16", "MXFP4A16", "FP8_DYNAMIC"])
def test_tensors_of_compressed_tensors(preset):
    """Its present version has no layer of its own any more; what it packs is what the layer of older ones held."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = importlib.import_module("compressed_tensors.compressors")
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(I, O))
    groups = {"g": quantization.preset_name_to_scheme(preset, ["Linear"])}
    quantization.apply_quantization_config(net, quantization.QuantizationConfig(config_groups=groups))
    dense = net[0]
    if preset == "NVFP4A16":
        dense.weight_global_scale.data.fill_(448 * 6 / dense.weight.detach().abs().max())
    wanted = {"NVFP4A16": 8.0, "MXFP4A16": 2.0**-5, "FP8_DYNAMIC": 0.001}[preset]
    dense.weight_scale.data = torch.full(dense.weight_scale.shape, wanted)
    compressors.compress_module(dense)
    layer = made(Compressed, {"N": "nvfp4", "M": "mxfp4", "F": "float"}[preset[0]])()
    with torch.no_grad():
        for name, p in dense.named_parameters():
            setattr(layer, name, frozen(p.detach().clone()))
    compressors.decompress_module(dense)
    torch.testing.assert_close(road.read(layer), dense.weight.float(), rtol=2**-8, atol=0)
