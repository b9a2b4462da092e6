"""A tuner layer as a Python object: how it is printed, copied for data parallelism and unpickled."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from .buffers import BufferDict
from .gated import GRAPH
from .stack import Adapter, Late
from .views import LABELS, LinearView


class Shown(nn.Module):
    """The part of a tuner layer that Python asks for."""

    family: ClassVar[str]
    _home_order: ClassVar[tuple[str, ...]]
    _bare: ClassVar[bool] = False  # layers over plain weights are printed without the family
    _sized: ClassVar[bool] = False  # linear layers are printed with their sizes
    view: LinearView
    adapters: dict[str, Adapter]
    parameter_name: str | None
    packed: Any
    _run: Any
    call: Any
    get_base_layer: Any

    def __getstate__(self) -> dict[str, Any]:
        self.call.settle()
        return {k: v for k, v in self.__dict__.items() if k not in GRAPH}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_run", None)

    def extra_repr(self) -> str:
        """The name of the adapted parameter, if it is one of a module that is no layer; how a weight is quantised."""
        if self._sized and type(self).__name__ == "Linear":
            base = self.get_base_layer()
            *_, out, inp = self.view.shape(base)
            return f"in_features={inp}, out_features={out}, bias={getattr(base, 'bias', None) is not None}"
        shown = f"parameter_name={self.parameter_name!r}," if self.view.label == "ParamWrapper" else ""
        kind, plain = self.packed, type(self).__name__.endswith(self.view.label)  # else the name says it
        return shown + (f"quantization_backend={kind.label!r}" if kind is not None and kind.label and plain else "")

    def _replicate_for_data_parallel(self) -> Any:
        """A copy whose adapters are its own; its modules and tensors are put in later, so it looks for them late."""
        self.call.settle()
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["adapters"] = {n: p.bound_to(replica) for n, p in self.adapters.items()}
        for key in GRAPH:
            replica.__dict__.pop(key, None)
        if self._run is not None:
            replica.__dict__["_run"] = Late(replica)
        return replica

    def __repr__(self) -> str:
        shown = self.__class__.__new__(self.__class__)
        children: dict[str, Any] = {"base_layer": self._modules["base_layer"]}
        for name in self._home_order:
            children[name] = self._modules[name] if name in self._modules else getattr(self, name)
        children.update({k: v for k, v in self._modules.items() if k not in children and not isinstance(v, BufferDict)})
        shown.__dict__.update(self.__dict__, _modules=children)
        return nn.Module.__repr__(shown)

    def _get_name(self) -> str:
        name = self.__class__.__name__
        return name if not self.family or (self._bare and name in LABELS) else f"{self.family}.{name}"
