"""torchao: tensor subclasses that hold integers or low-bit floats with scales, and say themselves how to dequantise.

They are packed anew by the class's own constructor from dense numbers, with every setting read off the old tensor:
block size, low-bit dtype, treatment of activations, kernel. What a tensor does not record (the algorithm that chose its
scales, whether symmetric ranges clip) is the constructor's default. Kinds without `dequantize` are read through their
own product with unit vectors. Source: torchao's documentation of `quantize_`, its configurations and tensor classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.storage import Packed, Payload, wider
from .borrowed import borrow
from .codes import split, spread

_PLAIN = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
Make = Callable[[Any, Tensor], Tensor]


class TorchAO(Packed):
    """Any weight tensor of torchao; its parts are put into the same parameter, which stays the one that it was."""

    names = ("torchao.*Tensor",)
    label = "torchao"

    def take(self, module: nn.Module, name: str) -> Payload:
        return _parts(getattr(module, name))

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        held = getattr(module, name)
        now = _parts(held)
        if now.keys() == payload.keys() and now["form"] == payload["form"]:
            for key in payload.keys() - {"form"}:
                setattr(held, key, payload[key])
        else:
            module._parameters[name] = nn.Parameter(_whole(payload), requires_grad=False)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return getattr(module, name).dtype

    def key(self, module: nn.Module, name: str) -> Hashable:
        nested = any(hasattr(t, "__tensor_flatten__") for t in self.take(module, name).values())
        return None if nested else super().key(module, name)

    def unpack(self, payload: Payload) -> Tensor:
        return _numbers(_whole(payload))

    def pull(self, module: nn.Module, name: str, grad: Tensor) -> Tensor | None:
        held = getattr(module, name)
        if not _by_rows(held):
            return None
        compute = wider(grad.dtype, held.dtype)
        scaled, zero = grad.to(compute) * held.scale.view(-1).to(compute), held.zero_point
        made = scaled @ held.qdata.to(compute)
        if zero is None or not (zero.is_cuda or zero.any()):  # looking at it would wait for a GPU
            return made
        return made - (scaled @ zero.view(-1, 1).to(compute))

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        old = _whole(payload)
        value, before = value.detach().to(old.dtype).contiguous(), _numbers(old)
        if torch.equal(value, before):
            return payload
        make = _MAKERS.get(type(old).__name__)
        if make is None:
            raise NotImplementedError(
                f"No numbers can be written into a {type(old).__module__}.{type(old).__qualname__}. Merge with "
                'quantized="dequantize", or keep the adapter unmerged.'
            )
        value = _without_factor(value, old)
        new = _parts(make(old, value))
        return _better(value, new, payload) if _plain(new) and _plain(payload) else new

    def repack(self, value: Tensor, payload: Payload) -> Payload:
        if not _plain(payload):
            return self.pack(value, payload)
        old, value = _whole(payload), value.detach().float()
        same = value == _numbers(old).float()  # their codes are known, whatever the dtype has made of the numbers
        made = _codes(_without_factor(value, old), payload)
        return {**payload, "qdata": torch.where(same, payload["qdata"].float(), made.float()).to(made.dtype)}


def _parts(tensor: Any) -> Payload:
    """The tensors inside, and what else makes the whole of them."""
    names, settings = tensor.__tensor_flatten__()
    form = type(tensor), settings, tuple(tensor.shape), tuple(tensor.stride())
    return {**{n: getattr(tensor, n) for n in names}, "form": form}


def _whole(payload: Payload) -> Any:
    kind, settings, shape, stride = payload["form"]
    inner = {k: v for k, v in payload.items() if k != "form"}
    return kind.__tensor_unflatten__(inner, settings, torch.Size(shape), stride)


def _numbers(tensor: Any) -> Tensor:
    """W as a forward multiplies with it, a factor on the activations included."""
    if hasattr(tensor, "get_original_weight"):
        return tensor.get_original_weight()
    if type(tensor).dequantize is Tensor.dequantize:
        eye = torch.eye(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        return F.linear(eye, tensor).mT.contiguous()
    pre = getattr(tensor, "act_pre_scale", None)
    return tensor.dequantize() if pre is None else tensor.dequantize() * pre


def _without_factor(value: Tensor, tensor: Any) -> Tensor:
    pre = getattr(tensor, "act_pre_scale", None)
    return value if pre is None else value / pre


def _by_rows(tensor: Any) -> bool:
    """Whether W is integers, with one scale for each row and perhaps a zero, and nothing else."""
    plain = (
        type(tensor).__name__ == "Int8Tensor" and tensor.dim() == 2 and getattr(tensor, "act_pre_scale", None) is None
    )
    return plain and list(tensor.block_size) == [1, tensor.shape[1]]


def _block(payload: Payload) -> Any:
    return payload["form"][1]["block_size"]


def _plain(payload: Payload) -> bool:
    """Whether each number has a code of its own, and each block one scale."""
    kind, settings, shape, _ = payload["form"]
    if kind.__name__ not in _PLAIN:
        return False
    blocks = [n // b for n, b in zip(shape, settings["block_size"], strict=True)]
    return list(payload["scale"].shape) == blocks


def _codes(value: Tensor, payload: Payload) -> Tensor:
    """The nearest codes to numbers under the scales of a plain payload."""
    q, settings = payload["qdata"], payload["form"][1]
    x = value.float() / spread(payload["scale"].float(), value.shape, _block(payload))
    x = torch.nan_to_num(x, nan=0.0)
    if q.dtype.is_floating_point:
        top = torch.finfo(q.dtype).max
        return x.clamp(-top, top).to(q.dtype)
    zero = payload.get("zero_point")
    if zero is not None:
        x = x + spread(zero.float(), value.shape, _block(payload))
    bits = int(str(settings.get("target_dtype", torch.int8)).removeprefix("torch.int"))
    half = 2 ** (bits - 1 - bool(settings.get("reduce_range")))
    return x.round().clamp(-half, half - 1).to(q.dtype)


def _better(value: Tensor, new: Payload, old: Payload) -> Payload:
    """For each block the new scale or the old one, whichever holds the numbers more closely; the old one if both do."""
    block, errors = _block(new), []
    new = {**new, "scale": new["scale"].to(old["scale"].dtype)}
    tried = [{**p, "qdata": _codes(value, p)} for p in (old, new)]
    for payload in tried:
        error = (_whole(payload).dequantize().float() - value.float()).square()
        parts = split(error, payload["scale"].shape, block)
        errors.append(torch.nan_to_num(parts.sum([2 * i + 1 for i in range(value.dim())]), nan=torch.inf))
    better = errors[1] < errors[0]
    both = [k for k in ("scale", "zero_point") if k in new and k in old]
    made: Payload = {k: torch.where(better, tried[1][k], old[k]) for k in both}
    scaled: Payload = {**old, **made}
    return {**scaled, "qdata": _codes(value, scaled)}


def _granularity(block: Any, shape: Any) -> Any:
    """What the configurations call a block of this size."""
    block, shape = list(block), list(shape)
    long = [axis for axis, b in enumerate(block) if b != 1]
    if block == shape:
        return _grain("PerTensor")()
    if long in ([], [len(shape) - 1]):
        return _grain("PerRow")() if block[-1] == shape[-1] else _grain("PerGroup")(block[-1])
    short = [axis for axis in range(len(shape)) if block[axis] != shape[axis]]
    return _grain("PerAxis")(short[0]) if len(short) == 1 and block[short[0]] == 1 else _grain("PerBlock")(block)


def _grain(name: str) -> Any:
    return borrow("torchao.quantization.granularity", name)


def _mapping(old: Any) -> Any:
    zero = old.zero_point
    kinds = borrow("torchao.quantization", "MappingType")
    return kinds.ASYMMETRIC if zero is not None and bool(zero.any()) else kinds.SYMMETRIC


def _int8(old: Any, value: Tensor) -> Tensor:
    more = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
    grain = _granularity(old.block_size, old.shape)
    return type(old).from_hp(value, grain, _mapping(old), **{k: getattr(old, k) for k in more if hasattr(old, k)})


def _float8(old: Any, value: Tensor) -> Tensor:
    more = {k: getattr(old, k) for k in ("mm_config", "kernel_preference", "act_quant_kwargs")}
    return type(old).from_hp(value, old.qdata.dtype, _granularity(old.block_size, old.shape), **more)


def _intx(old: Any, value: Tensor) -> Tensor:
    settings: dict[str, Any] = {"mapping_type": _mapping(old), "activation_quantization": old.activation_quantization}
    return type(old).from_hp(value, tuple(old.block_size), old.target_dtype, **settings)


def _int4(old: Any, value: Tensor) -> Tensor:
    more = {"activation_dtype": old.activation_dtype} if getattr(old, "activation_dtype", None) else {}
    new: Any = type(old).from_hp(value, list(old.block_size), **more)
    if getattr(old, "act_pre_scale", None) is not None:
        new.act_pre_scale = old.act_pre_scale
    return new


def _mx(old: Any, value: Tensor) -> Tensor:
    more = {k: getattr(old, k) for k in ("kernel_preference", "act_quant_kwargs", "is_swizzled_scales")}
    return type(old).to_mx(value, old.elem_dtype, old.block_size, **more)


def _nvfp4(old: Any, value: Tensor) -> Tensor:
    more = {k: getattr(old, k) for k in ("is_swizzled_scales", "use_triton_kernel", "act_quant_kwargs")}
    largest = None
    if old.per_tensor_scale is not None:  # 448 is the largest scale of a block, 6 the largest code
        largest = (value.abs().amax().float() / (448 * 6)).reshape(old.per_tensor_scale.shape)
    acts = old.act_per_tensor_scale
    return type(old).to_nvfp4(value, old.block_size, largest, acts, **more)


def _nf4(old: Any, value: Tensor) -> Tensor:
    return type(old).from_tensor(value, old.block_size, old.scaler_block_size)


_MAKERS: dict[str, Make] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Int4PlainInt32Tensor": _int4,
    "Int4PreshuffledTensor": _int4,
    "Int4TilePackedTo4dTensor": _int4,
    "MXTensor": _mx,
    "NVFP4Tensor": _nvfp4,
    "NF4Tensor": _nf4,
}
