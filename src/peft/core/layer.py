"""The module that stands in a target's place: the target, every adapter's tensors, and the map they make together.

State of a layer: which adapters are *loaded* (`adapters`), which are *active* (`active_adapters`) and which are
*trainable* (their parameters' `requires_grad`). The three are independent. What a forward runs is decided when the
state changes (`_replan`), not on each forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .batch import MixedBatch, is_mixed
from .call import Call
from .cells import reference, references
from .gated import Switched
from .homes import Homes
from .host import AdapterHost, tuner_layers
from .kinds import LayerType
from .lean import NO_BUFFERS
from .method import Method, Site
from .public import Public
from .recorded import Recorded
from .sharded.together import Together
from .shown import Shown
from .stack import Adapter, Finish, InPlace, Stack, Values, stack_of
from .views import LABELS, ModuleDict, ParameterDict, view_of

_MISSING = object()


class BaseTunerLayer(Together, MixedBatch, Switched, Shown, Public, Homes, Recorded, metaclass=LayerType):
    """Stands where the target stood; holds it as `base_layer` and every adapter's tensors under the peer's names.

    Attributes:
        adapter_layer_names: the homes of tensors, in printing order if the class states no `_home_order` of all.
        other_param_names: the names of plain values and other homes.
    """

    family: ClassVar[str] = ""
    _below = ("base_layer",)
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    _whole: ClassVar[bool] = False  # it stands for a module of any class
    made: ClassVar[bool] = False  # its class says all of what it holds and computes

    call: Call
    parameter_name: str | None = None
    cast_input_dtype_enabled = True
    _read = ""
    _names: tuple[str, ...] = ()
    _off = False
    _run: Any = None  # what a forward calls; None is the base layer

    def __init__(self, base_layer: nn.Module | None = None, *given: Any, **named: Any):
        """A layer without adapters around `base_layer`, or by itself with one.

        Arguments:
            base_layer: what it stands for.
            given: the record of calls, the parameter that is meant, how a parent reads it; or an adapter's name, its
                configuration and more (`alone.stated`), which may be named, too.
        """
        if self.by_hand:
            self._begin(base_layer)
        elif named or (given and isinstance(given[0], str)):
            from . import alone

            both = alone.stated(given, named)
            name, parameter = both.pop("adapter_name"), both.pop("parameter_name", None)
            config = alone.settings(self.family, both.pop("config", None), both)
            self._stand(base_layer, None, parameter)  # type: ignore[arg-type]
            alone.furnish(self, name, config)
            self.set_adapter((name,))
        else:
            self._stand(base_layer, *given)  # type: ignore[arg-type]

    def _stand(
        self, base_layer: nn.Module, call: Call | None = None, parameter: str | None = None, read: str = ""
    ) -> None:
        d = self.__dict__
        d["training"], d["_parameters"], d["_buffers"] = base_layer.training, {}, NO_BUFFERS
        d["_modules"] = {"base_layer": base_layer}
        innermost = self.get_base_layer()
        d["view"], d["call"], d["adapters"] = view_of(innermost, parameter, self._whole), call or Call(), {}
        if parameter is not None:
            d["parameter_name"] = parameter
        if read and parameter in (None, "weight"):  # no parent reads another parameter
            d["_read"], d["_off"] = read, False  # what the class says of it is guarded in graphs
        if (kind := self.packed) is not None:
            kind.adopt(innermost)

    # ---- what stands below -------------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The innermost wrapped module."""
        found = self._modules["base_layer"]
        while isinstance(found, BaseTunerLayer):
            found = found._modules["base_layer"]
        return found  # type: ignore[return-value]

    @property
    def depth(self) -> int:
        """How many tuner layers stand between this one and the innermost module."""
        n, found = 0, self._modules["base_layer"]
        while isinstance(found, BaseTunerLayer):
            n, found = n + 1, found._modules["base_layer"]
        return n

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; W' where the parent reads weights instead of calling its children."""
        if self._read and (graph := self._read_in_graph()) is not None:
            return self.view.raw(graph.base, graph.live_weight())
        apart = self._apart() if self._read and not self._disabled else None
        if apart is not None:
            return apart
        if self._read and (stack := self._shown()) is not None:
            return self.view.raw(stack.base, stack.live_weight())
        base = self.get_base_layer()
        return base.qweight if hasattr(base, "qweight") else base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias; b' where the parent reads it."""
        read = self._read and self.parameter_name is None  # else a matrix alone
        if read and (graph := self._read_in_graph()) is not None:
            return graph.shown_bias()
        if read and (stack := self._shown()) is not None:
            return stack.shown_bias()
        return self.get_base_layer().bias  # type: ignore[return-value]

    def _shown(self) -> Stack | None:
        """What a parent reads in place of the base layer's numbers; None where it reads those."""
        if self._disabled:
            return None
        if self.call.only is not None:
            return self.stack((self.call.only,))
        return stack_of(self.planned())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "adapters" not in self.__dict__:
                raise
        if name in self._home_order and (idle := self._idle_home(name)) is not None:
            return idle
        if name in self.other_param_names or name in self._plain:
            return Values(self, name)
        if name in self._home_order:
            return ParameterDict() if name in self._parameter_homes else ModuleDict()
        if name == "_qkv_same_embed_dim":
            # torch's fused encoder layer asks this before it reads attention weights past our forward
            return self.get_base_layer()._qkv_same_embed_dim and self.planned() is None and not is_mixed(self.call)
        if not name.startswith("_") and name != "weight" and name != "bias":
            found = getattr(self.get_base_layer(), name, _MISSING)  # None is a value, as of an embedding's max_norm
            plain = isinstance(found, nn.Module) or not callable(found) or name in self.view.methods
            if found is not _MISSING and plain:
                return found
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ---- adapters ----------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, method: Method, site: Site, init: bool = True) -> Adapter:
        """Build the tensors of adapter `name` here; nothing is left behind if that fails."""
        p = Adapter(self, name, method, site.settings, site.path)
        p.shared = site.shared
        site = self._noting(site)
        built = method.build(site)
        try:
            self.adapters[name] = p
            self._forget_plans()
            for key, value in built.items():
                self._file(key, name, value, p)
            with torch.no_grad(), self._in_sight():
                root = self.stack(())
                if init and site.device.type != "meta":
                    self.begin(p, root)
                if self.original_weight_device().type != "meta":
                    method.derive(p, root)
            self._spread(p, site)
        except BaseException:
            self._drop(name)
            raise
        return p

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Remove an adapter. If it was the only active one, the first remaining one becomes active.

        Arguments:
            adapter_name: which; nothing happens if the layer neither has nor names it.
            new_active_adapters: what the caller activates afterwards, so that no choice is made here.

        What a merge of it wrote stays in the base weight. Raises ValueError if that cannot be told apart from what
        else is merged.
        """
        if adapter_name in self.merged_adapters:
            from .bake import bake

            bake(self, adapter_name)
        if adapter_name not in self.adapters and adapter_name not in self._active:
            return
        self._drop(adapter_name)
        if adapter_name not in self._active and "_flag" not in self.__dict__:
            return  # what runs is what ran before
        left = tuple(n for n in self._active if n != adapter_name)
        if new_active_adapters is None and self._active and not left and self.adapters:
            left = (next(iter(self.adapters)),)
            text = f"Adapter {adapter_name!r} was active and is deleted. Setting active adapter to {left[0]!r}."
            warnings.warn(text, stacklevel=2)
            self.activate(left)
        self._active = left
        self._replan()

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    # ---- state -------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active, and trainable unless `inference_mode`.

        A merged layer is unmerged first, with a warning.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        if self.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge()
        self.activate(names, inference_mode)

    def activate(self, names: tuple[str, ...], inference_mode: bool = False) -> None:
        """`set_adapter` without the look at merges."""
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active = names
        self._replan()

    @property
    def _active(self) -> tuple[str, ...]:
        self.call.settle()
        if torch.compiler.is_dynamo_compiling():
            self._noted()
        return self._names

    @_active.setter
    def _active(self, names: tuple[str, ...]) -> None:
        self.call.settle()
        self.__dict__["_names"] = names

    @property
    def _disabled(self) -> bool:  # type: ignore[override]
        self.call.settle()
        if torch.compiler.is_dynamo_compiling():
            self._noted()
        return self._off

    def _set_disabled(self, disabled: bool) -> None:
        if disabled == self._disabled:
            return
        self.__dict__["_off"], self.call.disabled = disabled, None
        if disabled and self._merged:
            self._suspended = self._take_back()
        elif not disabled and self._suspended:
            names, self._suspended = self._suspended, None
            self._merge(tuple(n for n in names if n in self.adapters))
        self._replan()

    def follow(self, names: tuple[str, ...] | None, off: bool | None) -> None:
        """Be as a switch of all layers says; see `Deferred`."""
        d = self.__dict__
        if torch.compiler.is_dynamo_compiling():
            self._noted()
        if names is not None:
            d["_names"] = names
        if off is not None:
            d["_off"] = off
        p = self.adapters.get(self._names[0]) if len(self._names) == 1 else None
        plan = None if p is None or self._off or self._merged else p.plan
        if plan is None:
            self._decide()
        else:
            d["_by_task"], d["_by_input"], d["_run"] = plan
            if "_flag" in d:
                self._regraph()

    def planned(self) -> Any:
        """What a forward calls; None is the base layer."""
        self.call.settle()
        return self._run

    def _live_names(self) -> tuple[str, ...]:
        return () if self._disabled else tuple(n for n in self._active if n in self.adapters and n not in self._merged)

    def _replan(self) -> None:
        """The layer's state has changed: decide anew what a forward runs."""
        self.call.settle()
        self._forget_plans()
        if self._merged:
            self.call.merged = True
        self._decide()

    def _decide(self) -> None:
        names = self._live_names()
        by_task = by_input = False
        for name in names:
            p = self.adapters[name]
            p.direct = references(self, name) | {k: reference(home, name) for k, home in p.shared.items()}
            p.method.prepare(p)
            by_task, by_input = by_task or p.method.by_task, by_input or p.method.by_input
        run = self._runner(self.stack(names)) if names else None
        self.__dict__.update(_by_task=by_task, _by_input=by_input, _run=run)
        lasts = len(names) == 1 and p.method.lasting and not p.shared and not self._merged
        if lasts and all(isinstance(held, nn.Module) for held in p.direct.values()):
            p.plan = (by_task, by_input, run)
        if "_flag" in self.__dict__:
            self._regraph()

    def _runner(self, stack: Stack) -> Any:
        if not self.view.activations:
            return InPlace(stack)
        if self.view.finishes(stack.base):
            return Finish(stack)
        usual = len(stack.adapters) == 1 and type(stack) is Stack and not stack.again
        runner = stack.adapters[0].method.runner if usual else None
        return stack if runner is None else runner(stack)

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if compiling and (run := self._compiled()) is not None:
            if len(args) == 1 and not kwargs and self.call.plain:
                return run(*args)
            if not self.view.activations or (len(args) == 1 and not kwargs):
                return self._forward(args, kwargs, run)
        if kwargs or len(args) != 1 or not self.call.plain:
            if self.call.plain and not (compiling or self.view.activations or "adapter_names" in kwargs):
                return (self._run or self._modules["base_layer"])(*args, **kwargs)  # type: ignore[misc]
            swift = None if compiling or kwargs or len(args) != 1 else self._swift(args[0])
            return self._forward(args, kwargs) if swift is None else swift
        run = self._run
        if run is None:
            return self._modules["base_layer"](*args)  # type: ignore[misc]
        return getattr(run, "long", run)(*args) if compiling else run(*args)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], graph: Any = None) -> Any:
        self.call.settle()
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            self.call.banks.begin()
        else:
            names = self.call.fact("names")
        if self.call.only is not None and not self._disabled:
            return self._alone(args, kwargs)
        if names is not None and not self._disabled:
            return self._mixed(tuple(names), args, kwargs)
        return self._general(self._run if graph is None else graph, args, kwargs)

    def _general(self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if run is None:
            return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        run = getattr(run, "long", run)
        if not self.view.activations:
            return run(*args, **kwargs)
        x = args[0] if args else kwargs.pop(next(iter(kwargs)))
        if not (args[1:] or kwargs):
            return run(x)
        stack = stack_of(run)
        return self.view.finish(stack.base, self.stack([a.name for a in stack.adapters], (args[1:], kwargs))(x))

    def _where(self) -> str:
        return next((a.path for a in self.adapters.values()), "")


def name_layers(
    kind: type[BaseTunerLayer], namespace: dict[str, Any], prefix: str = "", packed: Mapping[str, str] | None = None
) -> dict[str, type[BaseTunerLayer]]:
    """The classes under which a method's layers are printed and recognised: one per label of a view or a storage.

    Arguments:
        kind: the method's own layer class, which they all are.
        namespace: the globals of the method's file, where pickle will look for them.
        prefix: what the names of the classes start with.
        packed: label of a storage -> the name of its linear layers, for those that have one of their own.
    """
    kind._home_order = vars(kind).get("_home_order", kind.adapter_layer_names)
    names = {label: prefix + label for label in LABELS} | {k: prefix + v for k, v in (packed or {}).items()}
    for label, name in names.items():
        attributes = {"__module__": namespace["__name__"], "__doc__": f"{label} under {kind.family}."}
        namespace[name] = LayerType(name, (kind,), attributes | {"made": True})
    return {label: namespace[name] for label, name in names.items()}


__all__ = ["AdapterHost", "BaseTunerLayer", "name_layers", "tuner_layers"]
