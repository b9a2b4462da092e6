"""How a weight's numbers are held, in four verbs: read, write, save and restore.

A storage is found by the qualified class name of the tensor (or of its module), so that no quantiser is ever imported
to be asked. A new storage is one subclass with `names`, registered by defining it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class Storage:
    """A dense tensor in any floating dtype: the values are the payload."""

    names: ClassVar[tuple[str, ...]] = ()  # qualified class names, e.g. "bitsandbytes.nn.modules.Params4bit"
    _by_name: ClassVar[dict[str, Storage]] = {}

    def __init_subclass__(cls) -> None:
        for name in cls.names:
            Storage._by_name[name] = cls()

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The values as a dense tensor; for a dense storage the very tensor, not a copy."""
        return getattr(module, name)

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Put dense values in place of the old ones, in the storage's own form."""
        getattr(module, name).data.copy_(value)

    def save(self, module: nn.Module, name: str) -> Any:
        """The payload, to be handed back to `restore`."""
        return getattr(module, name).detach().clone()

    def restore(self, module: nn.Module, name: str, payload: Any) -> None:
        """Give back the payload bit for bit."""
        getattr(module, name).data.copy_(payload)

    def original(self, payload: Any) -> Tensor:
        """The values of a saved payload as a dense tensor."""
        return payload

    def numel(self, module: nn.Module, name: str) -> int:
        """Number of logical parameters."""
        return getattr(module, name).numel()


class Foreign(Storage):
    """A tensor class that is not known: it can be read if it says how to dequantise, and is never written."""

    def read(self, module: nn.Module, name: str) -> Tensor:
        value = getattr(module, name)
        if type(value).dequantize is not Tensor.dequantize:
            return value.dequantize()
        raise NotImplementedError(
            f"The weight {name!r} of {type(module).__name__} is stored as {_kind(value)}, which cannot be read as "
            "numbers. Methods that only need the layer's forward work; this one needs the values."
        )

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        raise NotImplementedError(
            f"Cannot merge into {name!r} of {type(module).__name__}: it is stored as "
            f"{_kind(getattr(module, name))}, which cannot be written. Keep the adapter unmerged, or load the base "
            "model in a floating-point dtype and merge there."
        )


def _kind(value: Tensor) -> str:
    """What a tensor is, beyond a plain one: its dtype or its class."""
    plain = type(value) in _PLAIN
    return str(value.dtype) if plain else f"{type(value).__module__}.{type(value).__qualname__}"


_DENSE, _FOREIGN = Storage(), Foreign()
_PLAIN = (nn.Parameter, Tensor)
Storage._by_name["torch.distributed.tensor.DTensor"] = _DENSE


def of(module: nn.Module, name: str) -> Storage:
    """The storage of `module.<name>`."""
    value = getattr(module, name)
    kind = type(value)
    found = Storage._by_name.get(f"{kind.__module__}.{kind.__qualname__}") if kind not in _PLAIN else None
    if found is not None:
        return found
    packed = not (value.is_floating_point() or value.is_complex()) or hasattr(value, "__tensor_flatten__")
    return _FOREIGN if packed else _DENSE
