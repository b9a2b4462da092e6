"""bitsandbytes: NF4 and FP4 with or without double quantisation, and the row-wise int8 of LLM.int8().

The numbers are unpacked and packed by the library's own functions. Source: Dettmers et al. 2023, arXiv 2305.14314, and
2022, arXiv 2208.07339; the functions are documented in `bitsandbytes.functional`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..core.storage import Packed, Payload
from .borrowed import borrow

FUNCTIONAL = "bitsandbytes.functional"
FASTER, KEPT = "support_avx512bf16_for_cpu", "_kept_by_storage"


def _functional(name: str) -> Any:
    return borrow(FUNCTIONAL, name)


class FourBit(Packed):
    """`Params4bit`: two numbers a byte in blocks, each block with its largest magnitude."""

    names = ("bitsandbytes.nn.modules.Params4bit",)
    label = "bnb 4bit"
    trains = True

    def adopt(self, module: nn.Module) -> None:
        # on CPUs with these instructions the first call in evaluation would round the scales for good, and the weight
        # could not be trained through any more
        if not getattr(module, FASTER, False) or _in_time in module._forward_pre_hooks.values():
            return
        module.register_forward_pre_hook(_in_time)
        module.register_state_dict_pre_hook(_as_stored)
        state = module._parameters["weight"].quant_state  # type: ignore[union-attr]
        if state is not None and state.shape[-1] % state.blocksize:  # that form cannot hold it, and the call would fail
            setattr(module, FASTER, False)
        self.restore_order(module)

    def restore_order(self, module: nn.Module) -> None:
        """Have the module hold the payload as it was stored."""
        payload = self.take(module, "weight")
        if payload["state"] is not None:
            data, state = _plain(payload["data"], payload["state"])
            payload = {**payload, "data": data, "state": state}
        self.put(module, "weight", payload)

    def release(self, module: nn.Module) -> None:
        for hooks, ours in ((module._forward_pre_hooks, _in_time), (module._state_dict_pre_hooks, _as_stored)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                setattr(module, FASTER, True)
                self.restore_order(module)

    def differentiable(self, module: nn.Module, name: str) -> bool:
        return not _is_reordered(getattr(module, name).quant_state) or KEPT in module.__dict__

    def take(self, module: nn.Module, name: str) -> Payload:
        found, held = self.look(module, name), getattr(module, name)
        if found["state"] is None:
            return found
        # a copy, as the library changes the state of a weight in place when it brings that into another order
        return {**found, "state": copy.copy(found["state"]), "settings": _settings(held, found["state"])}

    def look(self, module: nn.Module, name: str) -> Payload:
        held: Any = getattr(module, name)
        state = held.quant_state
        if state is None:
            return {"dense": held.data, "state": None}
        data, kept = held.data, module.__dict__.get(KEPT)
        if kept is not None and _is_reordered(state) and kept[0].device == data.device:
            data, state = kept
        return {"data": data, "state": state}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        held: Any = getattr(module, name)
        module.__dict__.pop(KEPT, None)
        if payload["state"] is None:
            held.data = payload["dense"]
            return
        state, device = payload["state"], payload["data"].device
        if state.absmax.device != device:
            state = copy.deepcopy(state)
            state.to(device)
        held.data, held.quant_state = payload["data"], copy.copy(state)
        if getattr(module, "quant_state", None) is not None:
            module.quant_state = held.quant_state

    def unpack(self, payload: Payload) -> Tensor:
        if payload["state"] is None:
            return payload["dense"]
        data, state = _plain(payload["data"], payload["state"])
        return _functional("dequantize_4bit")(data, state)

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        if payload["state"] is None:
            return {"dense": value.to(payload["dense"].dtype), "state": None}
        settings, state = payload["settings"], payload["state"]
        made = value.detach().to(state.dtype).contiguous()
        data, new = _functional("quantize_4bit")(made, **settings)
        new.dtype = state.dtype
        return {"data": data.view(_plain(payload["data"], state)[0].shape), "state": new, "settings": settings}

    def repack(self, value: Tensor, payload: Payload) -> Payload:
        if payload["state"] is None:
            return self.pack(value, payload)
        data, state = _plain(payload["data"], payload["state"])
        codes = _nearest(value.detach().float().flatten(), _magnitudes(state), state)
        made = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
        return {**payload, "data": made.view(data.dtype).view(data.shape), "state": state}

    def tensors(self, payload: Payload) -> list[Tensor]:
        state = payload["state"]
        return [payload["dense"]] if state is None else [payload["data"], state.absmax]

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        held: Any = getattr(module, name)
        return tuple(held.shape if held.quant_state is None else held.quant_state.shape)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        held: Any = getattr(module, name)
        return held.dtype if held.quant_state is None else held.quant_state.dtype


def _settings(held: Any, state: Any) -> dict[str, Any]:
    nested = getattr(state, "nested", False) or getattr(state, "original_nested", False) or held.compress_statistics
    return {
        "blocksize": state.blocksize,
        "compress_statistics": nested,
        "quant_type": state.quant_type,
        "quant_storage": held.quant_storage,
    }


def _magnitudes(state: Any) -> Tensor:
    """The scale of each block, float32."""
    if not state.nested:
        return state.absmax.float()
    found = _functional("dequantize_blockwise")(state.absmax, state.state2)
    return (found + state.offset).float()


def _nearest(values: Tensor, scales: Tensor, state: Any) -> Tensor:
    """The index of the code nearest to each value, under the scale of its block; an even number of them."""
    size, n = state.blocksize, values.numel()
    padded = torch.nn.functional.pad(values, (0, -n % size)).view(-1, size)
    ordered, index = state.code.float().sort()
    scaled = padded / torch.where(scales == 0, torch.ones_like(scales), scales)[:, None]
    found = index[torch.bucketize(scaled, (ordered[1:] + ordered[:-1]) / 2)].flatten()
    return found[: n + n % 2]


def _in_time(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Before a call that the library answers from a weight in another order: keep the payload; otherwise give it back.

    So evaluation is the library's own, bit for bit, and training, reading and merging find what was stored.
    """
    if torch.compiler.is_compiling() or not args or not isinstance(args[0], Tensor):
        return
    held: Any = module.weight
    state = held.quant_state
    quick = getattr(module, FASTER, False) and not module.training and not args[0].requires_grad
    if quick and state is not None and not _is_reordered(state):
        module.__dict__[KEPT] = held.data, copy.copy(state)
    elif not quick and KEPT in module.__dict__:
        FourBit().restore_order(module)


def _as_stored(module: nn.Module, *args: Any) -> None:
    """Before a state dict is made: the library would undo its order itself, and round or mix up the scales."""
    if KEPT in module.__dict__:
        FourBit().restore_order(module)


def _is_reordered(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _plain(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Undo the order in which the library keeps a weight for some CPUs after its first call without gradients.

    Scales that it has taken out of a double quantisation are not put into another one, which would round them again.
    """
    if not _is_reordered(state):
        return data, state
    state = copy.copy(state)
    state.original_nested = False
    plain, state = _functional("_convert_weight_packed_for_cpu_inverse")(data, state)
    if state.absmax.dim() == 2:  # the library leaves the scales as they were
        state.absmax = state.absmax.mT.flatten().float()
    return plain, state


class EightBit(Packed):
    """`Int8Params`: int8 rows with the largest magnitude of each; which inputs are outliers is told by each call."""

    names = ("bitsandbytes.nn.modules.Int8Params",)
    label = "bnb 8bit"
    trains = True

    def take(self, module: nn.Module, name: str) -> Payload:
        held: Any = getattr(module, name)
        state: Any = getattr(module, "state", None)
        scale = held.SCB if getattr(held, "SCB", None) is not None else getattr(state, "SCB", None)
        return {"data": held.data, "scale": scale}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        held: Any = getattr(module, name)
        state: Any = getattr(module, "state", None)
        held.data = payload["data"]
        if payload["scale"] is None:
            return
        if state is not None and getattr(state, "CB", None) is not None:  # the module has run: its state holds both
            state.CB, state.SCB = held.data, payload["scale"]
        else:
            held.CB, held.SCB = held.data, payload["scale"]

    def unpack(self, payload: Payload) -> Tensor:
        if payload["scale"] is None:
            return payload["data"]
        return payload["data"].float() * (payload["scale"].float() / 127)[:, None]

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        if payload["scale"] is None:
            return {"data": value.to(payload["data"].dtype), "scale": None}
        made = value.detach().contiguous()
        made = made.float() if made.device.type == "cpu" else made.half()
        data, scale, _ = _functional("int8_vectorwise_quant")(made)
        return {"data": data, "scale": scale.to(payload["scale"].dtype)}

    def repack(self, value: Tensor, payload: Payload) -> Payload:
        scale = payload["scale"]
        if scale is None:
            return self.pack(value, payload)
        steps = (scale.float() / 127).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        return {"data": (value.float() / steps).round().clamp(-127, 127).to(torch.int8), "scale": scale}
