"""FP8 with scales of tensors, rows and blocks, and MXFP4: held against numbers decoded here bit by bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.core import storage
from tests import storages_road as road
from tests.storages_common import Net, qualified

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def e4m3(code):
    """The value of one byte: a sign, four bits of exponent with bias 7, three of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


def e2m1(code):
    """The value of four bits: a sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def decoded(codes, value=e4m3):
    """A tensor of bytes, each as the number that it stands for."""
    raw = codes.contiguous().view(torch.uint8)
    return torch.tensor([value(b) for b in raw.flatten().tolist()]).view(raw.shape)


def unpacked(codes):
    """Two numbers from each byte of (..., n), the low half first: (..., 2 n)."""
    raw = codes.contiguous().view(torch.uint8)
    pairs = [[e2m1(b & 15), e2m1(b >> 4)] for b in raw.flatten().tolist()]
    return torch.tensor(pairs).view(*raw.shape[:-1], -1)


def scaled(numbers, scale, rows, columns):
    """Each number times the scale of its block, one by one."""
    W = numbers.clone()
    for i in range(W.shape[0]):
        for j in range(0, W.shape[1], columns):
            W[i, j : j + columns] *= float(scale[i // rows, j // columns])
    return W


def bytes_of_e4m3(*shape):
    """Codes of all kinds but NaN."""
    torch.manual_seed(0)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8)
    return raw.masked_fill_((raw & 127) == 127, 3).view(E4M3)


class Block(nn.Linear):
    """`FP8Linear` with a forward that any machine runs: scales of blocks, or one of the tensor."""

    def __init__(self, i, o, block, scale=torch.float32):
        super().__init__(i, o)
        self.block_size = block
        self.weight = nn.Parameter(bytes_of_e4m3(o, i), requires_grad=False)
        counts = () if block is None else (-(-o // block[0]), -(-i // block[1]))
        self.weight_scale_inv = nn.Parameter((2.0 ** -torch.randint(8, 12, counts)).to(scale), requires_grad=False)
        if scale is torch.float32:
            self.weight_scale_inv.data *= 1 + torch.rand(counts)

    def numbers(self):
        block, scale = self.block_size or self.weight.shape, self.weight_scale_inv.detach().float()
        return scaled(decoded(self.weight), scale.reshape(1, 1) if scale.dim() == 0 else scale, *block)

    def forward(self, x):
        return F.linear(x, self.numbers(), self.bias)


class Rows(nn.Linear):
    """`FbgemmFp8Linear`: a scale for each row, in a buffer or a parameter."""

    def __init__(self, i, o, shape=None):
        super().__init__(i, o)
        self.weight = nn.Parameter(bytes_of_e4m3(o, i), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.rand(shape or (o, 1)) / 500 + 0.001, requires_grad=False)

    def numbers(self):
        return scaled(decoded(self.weight), self.weight_scale.reshape(-1, 1), 1, self.in_features)

    def forward(self, x):
        return F.linear(x, self.numbers(), self.bias)


class Turned(Rows):
    """`CompressedTensorsFP8Linear`: the scales of rows lie side by side."""

    def __init__(self, i, o):
        super().__init__(i, o, (1, o))


HERE = "transformers.integrations"
qualified(Block, f"{HERE}.finegrained_fp8", "FP8Linear")
qualified(Rows, f"{HERE}.fbgemm_fp8", "FbgemmFp8Linear")
qualified(Turned, f"{HERE}.compressed_tensors", "CompressedTensorsFP8Linear")


def made(kind, *args):
    """A constructor that makes the same layer each time."""

    def make():
        torch.manual_seed(1)
        return kind(*args).requires_grad_(False)

    return make


LAYERS = {
    "blocks": made(Block, 48, 32, (16, 16)),
    "blocks that do not fill the weight": made(Block, 40, 24, (16, 16)),
    "blocks with powers of two": made(Block, 40, 24, (16, 16), E8M0),
    "a tensor": made(Block, 40, 24, None),
    "rows": made(Rows, 40, 24),
    "rows the other way round": made(Turned, 40, 24),
}
each = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@each
def test_read_as_decoded(make):
    assert torch.equal(road.read(make()), make().numbers())
    assert storage.of(make(), "weight").label == "fp8"


@each
@pytest.mark.parametrize("method", road.METHODS)
def test_adapted_as_on_numbers(make, method):
    road.on_quantised_as_on_dense(make, make().numbers(), method)


@each
def test_counted_saved_and_loaded(make):
    road.counted_saved_and_loaded(make, make().numbers())


@each
def test_merged_and_unmerged(make):
    road.merged_and_unmerged(make, make().numbers(), worst=0.04)


@each
def test_rewriting_changes_nothing(make):
    road.rewriting_changes_nothing(make)


def test_the_nearest_codes_ties_to_even():
    values = [0.0, 2.0**-9, 1.5 * 2.0**-9, 17.0, 19.0, -17.0, 300.0, 448.0, 1e9, 2.0**-11]
    wanted = [0.0, 2.0**-9, 2.0**-8, 16.0, 20.0, -16.0, 288.0, 448.0, 448.0, 0.0]
    layer = nn.Linear(10, 1, bias=False)
    layer.weight = nn.Parameter(torch.zeros(1, 10).to(E4M3), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(torch.tensor(1.0), requires_grad=False)
    layer.__class__ = Block
    layer.block_size = None
    kind = storage.of(layer, "weight")
    found = kind.unpack(kind.repack(torch.tensor([values]), kind.take(layer, "weight")))
    assert found.tolist() == [wanted]


@pytest.mark.parametrize("block", [(128, 128), (16, 32), None])
@pytest.mark.parametrize("scale", ["float", "ue8m0"])
def test_the_class_of_transformers(block, scale):
    real = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = real.FP8Linear(200, 160, block_size=block, scale_fmt=scale)
    layer.weight = nn.Parameter(bytes_of_e4m3(160, 200), requires_grad=False)
    held = layer.weight_scale_inv
    held.data = (2.0 ** -torch.randint(8, 10, held.shape)).to(held.dtype)
    W = Block.numbers(layer).detach()
    assert torch.equal(road.read(layer), W)
    model = road.filled(get_peft_model(Net(layer), LoraConfig(r=2, target_modules="all-linear")))
    assert model.get_nb_trainable_parameters()[1] - model.get_nb_trainable_parameters()[0] == 160 * 200
    assert model.get_model_status().quantization_backend == "fp8"
    before, update = road.payload(layer), model.base_model.model.layer.get_delta_weight("default")
    (error,) = model.merge_adapter().values()
    assert error.relative < 0.04
    assert ((road.read(layer) - W - update).norm() / (W + update).norm()) < 0.04
    model.unmerge_adapter()
    road.same(road.payload(layer), before)
    plain = model.merge_and_unload(quantized="dequantize")
    assert plain.layer.weight.dtype is torch.float32
    torch.testing.assert_close(plain.layer.weight, W + update)


def test_scales_do_not_tell_the_dtype_of_a_model():
    layer, head = LAYERS["blocks with powers of two"](), nn.Linear(24, 4, dtype=torch.bfloat16)
    layer.bias = None
    model = get_peft_model(nn.Sequential(layer, head), LoraConfig(r=2, target_modules=["0"]))
    model.merge_adapter(quantized="dequantize")
    assert model.base_model.model[0].get_base_layer().weight.dtype is torch.bfloat16


def test_the_embedding_of_transformers():
    real = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(real, "FP8Embedding"):
        pytest.skip("this version of transformers has none")
    layer = real.FP8Embedding(10, 16).requires_grad_(False)
    layer.weight = nn.Parameter(bytes_of_e4m3(10, 16), requires_grad=False)
    layer.weight_scale.data = torch.tensor([0.01])
    W = decoded(layer.weight) * torch.tensor(0.01)
    assert torch.equal(road.read(layer), W)
    model = road.filled(get_peft_model(Net(layer), LoraConfig(r=2, target_modules=["layer"])))
    update = model.base_model.model.layer.get_delta_weight("default")
    plain = model.merge_and_unload(quantized="dequantize")
    assert type(plain.layer) is nn.Embedding
    torch.testing.assert_close(plain.layer.weight, W + update)
