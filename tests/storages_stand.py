"""Layers of quantisers that need a graphics card, as their formats are published: bit by bit, in plain Python.

Each has the qualified name, the attributes and the tensors of the real class, and a forward written from the format.
`Made.weight` are the numbers that went in; nothing here calls what is tested.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from tests.storages_common import qualified

IN, OUT, GROUP = 64, 32, 32
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def number(words, index, bits, width=32, tight=True):
    """The number at a place in words, found bit by bit; the lowest comes first."""
    found = 0
    for bit in range(bits):
        at = index * bits + bit if tight else index // (width // bits) * width + index % (width // bits) * bits + bit
        found |= (words[at // width] >> (at % width) & 1) << bit
    return found


def words(numbers, bits, width=32, tight=True):
    """The words that hold numbers, each with the sign that its highest bit gives it."""
    each = width // bits
    count = -(-len(numbers) * bits // width) if tight else -(-len(numbers) // each)
    made = [0] * count
    for index, n in enumerate(numbers):
        for bit in range(bits):
            at = index * bits + bit if tight else index // each * width + index % each * bits + bit
            made[at // width] |= (int(n) >> bit & 1) << (at % width)
    return [w - 2**width if w >> (width - 1) else w for w in made]


def down(matrix, bits, dtype=torch.int32, tight=True):
    """Each column packed."""
    width = 8 * dtype.itemsize
    return torch.tensor([words(c, bits, width, tight) for c in matrix.T.tolist()], dtype=dtype).T.contiguous()


def across(matrix, bits, dtype=torch.int32, tight=True, order=range(8)):
    """Each row packed; of the runs of eight in it each in an order."""
    rows = [[row[i // 8 * 8 + order[i % 8]] for i in range(len(row))] for row in matrix.tolist()]
    return torch.tensor([words(r, bits, 8 * dtype.itemsize, tight) for r in rows], dtype=dtype)


def up(packed, count, bits, tight=True):
    """Each column read, (count, columns)."""
    width = 8 * packed.dtype.itemsize
    return torch.tensor([[number(c, i, bits, width, tight) for i in range(count)] for c in packed.T.tolist()]).T


def back(packed, count, bits, tight=True, order=range(8)):
    """Each row read, (rows, count)."""
    width, place = 8 * packed.dtype.itemsize, [list(order).index(i) for i in range(8)]
    return torch.tensor(
        [[number(r, i // 8 * 8 + place[i % 8], bits, width, tight) for i in range(count)] for r in packed.tolist()]
    )


class Stand(nn.Module):
    """A layer whose forward reads its tensors."""

    def __init__(self, **attributes):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.__dict__.update(attributes)
        self.register_buffer("bias", torch.linspace(-1, 1, OUT))

    def hold(self, **tensors):
        """Register tensors as buffers."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        return self

    def forward(self, x):
        return F.linear(x, self.numbers().to(x.dtype), self.bias.to(x.dtype))


class Grouped(Stand):
    """GPTQ."""

    add = 0

    def numbers(self):
        q = up(self.qweight, IN, self.bits)
        z = back(self.qzeros, OUT, self.bits) + self.add
        z = z % 2**self.bits if self.add and self.bits != 3 else z
        g = self.g_idx.long()
        return ((q - z[g]) * self.scales[g].float()).T.to(self.scales.dtype)


class TorchLinear(Grouped):
    """gptqmodel's."""

    REQUIRES_FORMAT_V2 = True


class QuantLinear(Grouped):
    """auto-gptq's, which calls its sizes otherwise."""

    add = 1

    def __init__(self, **attributes):
        super().__init__(**attributes)
        del self.in_features, self.out_features
        self.infeatures, self.outfeatures = IN, OUT


class WQLinear_GEMM(Stand):
    """AutoAWQ's layout for many rows."""

    def numbers(self):
        q, z = back(self.qweight, OUT, 4, order=ORDER), back(self.qzeros, OUT, 4, order=ORDER)
        g = torch.arange(IN) // self.group_size
        return ((q - z[g]) * self.scales[g].float()).T.to(self.scales.dtype)


class WQLinear_GEMV(Stand):
    """AutoAWQ's layout for one row."""

    def numbers(self):
        g = torch.arange(IN) // self.group_size
        q, z = back(self.qweight, IN, 4), back(self.qzeros, IN // self.group_size, 4)
        return ((q - z[:, g]) * self.scales[:, g].float()).to(self.scales.dtype)


class INCWeightOnlyLinear(Stand):
    """Intel's."""

    dtype, tight = "int", False

    def numbers(self):
        g = torch.arange(IN) // self.group_size
        if self.use_optimum_format:
            q, z = up(self.qweight, IN, self.bits, False), back(self.qzeros, OUT, self.bits, False) + 1
            return ((q - z[g] % 2**self.bits) * self.scales[g].float()).T.to(self.scales.dtype)
        read = back if self.compression_dim == 1 else up
        q = read(self.qweight, (IN, OUT)[1 - self.compression_dim], self.bits, False)
        if not hasattr(self, "qzeros"):
            half = 2 ** (self.bits - 1)
            return ((q + half) % (2 * half) - half) * self.scales[:, g]
        z = read(self.qzeros, (IN // self.group_size, OUT)[1 - self.compression_dim], self.bits, False)
        return (q - z[:, g]) * self.scales[:, g]


class EetqLinear(Stand):
    """transformers' layer for EETQ, whose weight is laid out for one device or another."""

    def __init__(self, **attributes):
        super().__init__(**attributes)
        del self.in_features, self.out_features

    def numbers(self):
        flat = self.weight.flatten().tolist()
        q = torch.tensor([[device_byte(flat, i, o, self.kernel) for i in range(IN)] for o in range(OUT)])
        return (q * self.weight_scales[:, None].float()).to(self.weight_scales.dtype)


def device_place(i, o, kernel):
    """Where the byte of an input and an output lies: in rows, "bytes" with the middle two of four swapped, or tiles."""
    place = i * OUT + o
    if kernel in ("tiles", "other"):
        row = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15).index(i % 16) + i // 16 * 16
        place = ((o // 2 * (IN // 64) + row // 64) * 2 + o % 2) * 64 + row % 64
    if kernel == "other":
        return IN * OUT - 1 - place
    return place if kernel == "rows" else place // 4 * 4 + (0, 2, 1, 3)[place % 4]


def device_byte(flat, i, o, kernel):
    """The number there; kernels add 128 to each byte."""
    byte = flat[device_place(i, o, kernel)]
    return byte if kernel == "rows" else byte % 256 - 128


class MarlinLinear(Stand):
    """A kernel's own order, which is nobody's business."""

    def numbers(self):
        return self.weight_of_kernel.roll(-5).view(OUT, IN).to(self.scales.dtype) * self.scales


@dataclass
class Made:
    """A layer, the numbers that it was made from, and how its words are written anew.

    Attributes:
        module: the layer.
        weight: (O, I), in the dtype of the scales.
        codes, zeros, scale: (I, O) integers and what belongs to each of them.
        again: other integers -> the tensors that hold them, by name.
        top: the largest integer.
    """

    module: nn.Module
    codes: torch.Tensor
    zeros: torch.Tensor
    scale: torch.Tensor
    again: object
    low: int
    top: int
    weight: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.weight = self.numbers(self.codes)

    def numbers(self, codes):
        """The numbers of other integers."""
        return ((codes - self.zeros) * self.scale.float()).T.contiguous().to(self.scale.dtype)


def drawn(bits, symmetric=False, low=0, dtype=torch.float16, first=1):
    """Integers (I, O), zeros and scales (G, O), all from one seed."""
    torch.manual_seed(0)
    q = torch.randint(low, low + 2**bits, (IN, OUT))
    z = torch.randint(first, 2**bits, (IN // GROUP, OUT))
    z = torch.full_like(z, 2 ** (bits - 1)) if symmetric else z
    s = ((torch.rand(IN // GROUP, OUT) + 0.5) / 2**bits).to(dtype)
    return q, z, s


def gptq(bits, acts=False, second=True, symmetric=False, dtype=torch.float16):
    """A layer of gptqmodel, which computes with the second format, or of auto-gptq."""
    kind = TorchLinear if second else QuantLinear
    q, z, s = drawn(bits, symmetric, dtype=dtype)
    g = torch.arange(IN) // GROUP
    g = g[torch.randperm(IN)] if acts else g
    m = kind(bits=bits, group_size=GROUP).hold(qweight=down(q, bits), scales=s, g_idx=g.int())
    m.hold(qzeros=across(z - kind.add, bits))
    return Made(m, q, z[g], s[g], lambda c: {"qweight": down(c, bits)}, 0, 2**bits - 1)


def awq(kind, dtype=torch.float16):
    """A layer of AutoAWQ."""
    q, z, s = drawn(4, dtype=dtype, first=0)
    g, m = torch.arange(IN) // GROUP, kind(w_bit=4, group_size=GROUP)
    if kind is WQLinear_GEMM:
        m.hold(qweight=across(q, 4, order=ORDER), qzeros=across(z, 4, order=ORDER), scales=s)
        return Made(m, q, z[g], s[g], lambda c: {"qweight": across(c, 4, order=ORDER)}, 0, 15)
    wide, zeros = torch.zeros(OUT, 16, dtype=dtype), torch.zeros(OUT, 16, dtype=torch.long)  # filled up
    wide[:, : len(s)], zeros[:, : len(s)] = s.T, z.T
    m.hold(qweight=across(q.T, 4), qzeros=across(zeros, 4), scales=wide)
    return Made(m, q, z[g], s[g], lambda c: {"qweight": across(c.T, 4)}, 0, 15)


def inc(bits, optimum=True, axis=1, zeros=True, dtype=torch.int32):
    """A layer of Intel's Neural Compressor."""
    low = 0 if zeros else -(2 ** (bits - 1))
    q, z, s = drawn(bits, low=low, dtype=torch.float16 if optimum else torch.float32)
    g, m = torch.arange(IN) // GROUP, INCWeightOnlyLinear(bits=bits, group_size=GROUP, compression_dim=axis)
    m.use_optimum_format, m.g_idx = optimum, None
    m.hold(scale_bf16_to_fp8=torch.zeros(1, dtype=torch.bfloat16))
    if optimum:
        m.hold(qweight=down(q, bits, tight=False), qzeros=across(z - 1, bits, tight=False), scales=s)
        return Made(m, q, z[g], s[g], lambda c: {"qweight": down(c, bits, tight=False)}, 0, 2**bits - 1)

    def laid(c):
        return (across if axis == 1 else down)(c.T, bits, dtype, False)

    m.hold(qweight=laid(q), scales=s.T.contiguous())
    if zeros:
        m.hold(qzeros=laid(z))
    offset = z[g] if zeros else torch.zeros_like(q)
    return Made(m, q, offset, s[g], lambda c: {"qweight": laid(c)}, low, low + 2**bits - 1)


def eetq(kernel, dtype=torch.float16):
    """A layer of EETQ with its bytes laid out for a kernel."""
    q, _, _ = drawn(8, low=-128)
    s = ((torch.rand(OUT) + 0.5) / 100).to(dtype)

    def laid(c):
        flat = [0] * (IN * OUT)
        for i in range(IN):
            for o in range(OUT):
                n = int(c[i, o])
                flat[device_place(i, o, kernel)] = n if kernel == "rows" else (n + 128 + 128) % 256 - 128
        return {"weight": torch.tensor(flat, dtype=torch.int8).view(IN, OUT)}

    m = EetqLinear(kernel=kernel).hold(**laid(q), weight_scales=s)
    return Made(m, q, torch.zeros_like(q), s.expand(IN, OUT), laid, -128, 127)


def marlin(kind=MarlinLinear):
    """A layer whose kernel has an order of its own."""
    torch.manual_seed(0)
    q = torch.randint(-8, 8, (OUT, IN))
    m = kind(bits=4, group_size=IN).hold(weight_of_kernel=q.flatten().roll(5), scales=torch.rand(OUT, 1).half() / 8)
    return Made(m, q.T, torch.zeros_like(q.T), m.scales.T.expand(IN, OUT), None, -8, 7)


qualified(TorchLinear, "gptqmodel.nn_modules.qlinear.torch", "TorchLinear")
qualified(MarlinLinear, "gptqmodel.nn_modules.qlinear.marlin", "MarlinLinear")
qualified(QuantLinear, "auto_gptq.nn_modules.qlinear.qlinear_cuda_old", "QuantLinear")
qualified(WQLinear_GEMM, "awq.modules.linear.gemm", "WQLinear_GEMM")
qualified(WQLinear_GEMV, "awq.modules.linear.gemv", "WQLinear_GEMV")
qualified(INCWeightOnlyLinear, "neural_compressor.torch.algorithms.weight_only.modules", "INCWeightOnlyLinear")
qualified(EetqLinear, "transformers.integrations.eetq", "EetqLinear")

LAYERS = {
    **{f"gptq-{b}": (lambda b=b: gptq(b)) for b in (2, 3, 4, 8)},
    **{f"gptq-first-{b}": (lambda b=b: gptq(b, second=False)) for b in (2, 3, 4, 8)},
    "gptq-acts": lambda: gptq(4, acts=True),
    "gptq-first-acts": lambda: gptq(3, acts=True, second=False),
    "gptq-symmetric": lambda: gptq(4, symmetric=True),
    "awq": lambda: awq(WQLinear_GEMM),
    "awq-gemv": lambda: awq(WQLinear_GEMV),
    "inc-4": lambda: inc(4),
    "inc-3": lambda: inc(3),
    "inc-in-4": lambda: inc(4, False, 1),
    "inc-out-2": lambda: inc(2, False, 0, dtype=torch.int8),
    "inc-signed-3": lambda: inc(3, False, 1, zeros=False),
    "inc-signed-8": lambda: inc(8, False, 0, zeros=False),
    "eetq-rows": lambda: eetq("rows"),
    "eetq-bytes": lambda: eetq("bytes"),
    "eetq-tiles": lambda: eetq("tiles"),
}
