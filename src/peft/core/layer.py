"""The module that stands in a target's place: the target, every adapter's tensors, and the map they make together.

State of a layer: which adapters are *loaded* (`adapters`), which are *active* (`active_adapters`) and which are
*trainable* (their parameters' `requires_grad`). The three are independent. What a forward runs is decided when the state
changes (`_replan`), not on each forward.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import storage
from .call import BASE, Call
from .method import Delta, Method, Site
from .views import LinearView, clone, view_of

TILE_BYTES = 64 * 2**20  # what a merge may allocate beyond the weights themselves


class Slot(NamedTuple):
    """One tensor of an adapter: where it stands in files, in the model, and who holds it."""

    key: str  # relative to the layer's path, without the adapter's name
    live: str  # relative to the layer's path, as in the model's state_dict
    owner: nn.Module
    attr: str

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        held = self.owner._parameters.get(self.attr)
        return self.owner._buffers[self.attr] if held is None else held  # type: ignore[return-value]


class Adapter:
    """`p`: one adapter's share of one layer. `p.lora_A` is `layer.lora_A[name]`, `p.scaling` a plain value."""

    def __init__(self, layer: BaseTunerLayer, name: str, method: Method, settings: Any, path: str):
        self.layer, self.name, self.method, self.settings, self.path = layer, name, method, settings, path
        self.direct: dict[
            str, Any
        ] = {}  # under compile tensors are found by reference, so that names are not guarded
        self.cache: dict[str, Any] = {}

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__") or "layer" not in self.__dict__:
            raise AttributeError(key)
        if torch.compiler.is_compiling():
            return self.direct[key]
        home = self.layer._modules.get(key)
        if home is None or self.name not in home:  # type: ignore[operator]
            raise AttributeError(f"The adapter {self.name!r} has no {key!r}.")
        return home[self.name]  # type: ignore[index]

    def has(self, key: str) -> bool:
        """Whether the adapter owns a tensor or module `key`."""
        home = self.layer._modules.get(key)
        return home is not None and self.name in home  # type: ignore[operator]

    def held(self, key: str) -> Any:
        """The module or parameter `key`, found by the shortest way."""
        if torch.compiler.is_compiling():
            return self.direct[key]
        home = self.layer._modules[key]
        found = home._modules.get(self.name)  # type: ignore[union-attr]
        return home._parameters[self.name] if found is None else found  # type: ignore[union-attr]

    def held_buffer(self, key: str) -> Tensor:
        """A derived tensor."""
        if torch.compiler.is_compiling():
            return self.direct[key]
        return self.layer._modules[key]._buffers[self.name]  # type: ignore[return-value, union-attr]

    def original_weight(self) -> Tensor:
        """The base weight without any merged adapter, (..., O, I)."""
        return self.layer.original_weight()


class Stack:
    """The base layer under its first adapters, still an affine map: call it, or ask its weight and bias."""

    def __init__(self, layer: BaseTunerLayer, adapters: tuple[Adapter, ...], extra: Any = None):
        self.layer, self.view, self.adapters, self.extra = layer, layer.view, adapters, extra
        self.last = adapters[-1] if adapters else None
        self.inner = Stack(layer, adapters[:-1], extra) if adapters else None

    @property
    def base(self) -> nn.Module:
        return self.layer.get_base_layer()

    def __call__(self, x: Tensor) -> Tensor:
        last = self.last
        if last is not None:
            return last.method.forward(last, self.inner, x)  # type: ignore[arg-type]
        base = self.layer._modules["base_layer"]
        if self.extra is not None:
            return base(x, *self.extra[0], **self.extra[1])  # type: ignore[misc]
        return self.view.base(base, x)  # type: ignore[arg-type]

    def weight(self, rows: slice = slice(None)) -> Tensor:
        """W' of the stack, (..., rows, I)."""
        W = self.view.read(self.base)[..., rows, :]
        for a in self.adapters:
            W = a.method.weight(a, W, rows)
        return W

    def bias(self) -> Tensor | None:
        """b' of the stack, (O,), or None."""
        b = self.view.bias(self.base)
        for a in self.adapters:
            b = a.method.bias(a, b)
        return b

    def linear(self, x: Tensor, W: Tensor) -> Tensor:
        """W x without bias, in W's dtype."""
        return self.view.linear(self.base, x.to(W.dtype) if x.is_floating_point() else x, W)

    def spread(self, v: Tensor) -> Tensor:
        """(O,) shaped to broadcast over an output."""
        return self.view.spread(self.base, v)

    def drop(self, x: Tensor, rate: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Dropout of an input: (x to use, factor for W x or None)."""
        x = x.to(dtype) if x.is_floating_point() else x
        return self.view.drop(x, rate) if rate else (x, None)

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """W x + b."""
        y = self.linear(x, W)
        return y if b is None else y + self.spread(b)


class InPlace:
    """Runs a module that cannot be split into W x + b, with W' and b' put in place."""

    def __init__(self, stack: Stack, depth: int):
        self.stack, self.path = stack, ".".join(["base_layer"] * depth)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        view: Any = self.stack.view
        values = {view.name: self.stack.weight()}
        b = self.stack.bias()
        if b is not None and view.bias_name:
            values[view.bias_name] = b
        return view.run(self.stack.layer._modules["base_layer"], self.path, values, args, kwargs)


class Finish:
    """A stack whose module does something after the affine map (an embedding with max_norm)."""

    def __init__(self, stack: Stack):
        self.stack = stack

    def __call__(self, x: Tensor) -> Tensor:
        return self.stack.view.finish(self.stack.base, self.stack(x))


class Values(MutableMapping[str, Any]):
    """A plain value of every adapter of a layer, by adapter name: `layer.scaling["default"]`."""

    def __init__(self, layer: BaseTunerLayer, key: str):
        self._layer, self._key = layer, key

    def __getitem__(self, name: str) -> Any:
        return self._layer.adapters[name].__dict__[self._key]

    def __setitem__(self, name: str, value: Any) -> None:
        self._layer.adapters[name].__dict__[self._key] = value

    def __delitem__(self, name: str) -> None:
        del self._layer.adapters[name].__dict__[self._key]

    def __iter__(self) -> Iterator[str]:
        return (n for n, a in self._layer.adapters.items() if self._key in a.__dict__)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class BufferDict(nn.Module):
    """Tensors by adapter name that move with the module and are not saved."""

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]
        self._non_persistent_buffers_set.discard(name)

    def __len__(self) -> int:
        return len(self._buffers)


_MODULES, _PARAMETERS, _BUFFERS = nn.ModuleDict(), nn.ParameterDict(), BufferDict()


class AdapterHost(nn.Module):
    """A module that holds adapters in place of one of the user's: a tuner layer or a wrapper of a whole module."""

    _below: ClassVar[
        tuple[str, ...]
    ] = ()  # the children that are the user's own, where further hosts may stand


class BaseTunerLayer(AdapterHost):
    """Stands where the target stood; holds it as `base_layer` and every adapter's tensors under the peer's names.

    Attributes:
        adapter_layer_names: the homes of tensors, in printing order.
        other_param_names: the names of plain values and other homes.
    """

    family: ClassVar[str] = ""
    _below = ("base_layer",)
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    _home_order: ClassVar[tuple[str, ...]] = ()
    _parameter_homes: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        base_layer: nn.Module,
        call: Call | None = None,
        parameter: str | None = None,
        read: bool = False,
    ):
        super().__init__()
        self._modules["base_layer"] = base_layer
        d = self.__dict__
        d["training"] = base_layer.training
        innermost = self.get_base_layer()
        d.update(
            view=view_of(innermost, parameter), parameter_name=parameter, call=call or Call(), _read=read
        )
        d.update(
            adapters={},
            _active=(),
            _disabled=False,
            _merged=[],
            _saved=None,
            _suspended=None,
            _run=None,
            _trainable=None,
        )
        d.update(cast_input_dtype_enabled=True, tied=None, shares=frozenset())

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
        if self._read and not self._disabled and (self._run is not None or self.call.only is not None):
            stack = self.stack(self._names_now())
            return self.view.raw(stack.base, stack.weight())
        base = self.get_base_layer()
        return base.qweight if hasattr(base, "qweight") else base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias; b' where the parent reads it."""
        if self._read and not self._disabled and (self._run is not None or self.call.only is not None):
            return self.stack(self._names_now()).bias()
        return self.get_base_layer().bias  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "adapters" not in self.__dict__:
                raise
        if name in self.other_param_names:
            return Values(self, name)
        if name in self._home_order:
            return nn.ParameterDict() if name in self._parameter_homes else nn.ModuleDict()
        if name == "_qkv_same_embed_dim":
            # torch's fused encoder layer asks this before it reads attention weights past our forward
            return self.get_base_layer()._qkv_same_embed_dim and self._run is None
        if not name.startswith("_") and name != "weight" and name != "bias":
            found = getattr(self.get_base_layer(), name, None)
            if found is not None and not callable(found):
                return found
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ---- adapters ----------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, method: Method, site: Site, init: bool = True) -> Adapter:
        """Build the tensors of adapter `name` here; nothing is left behind if that fails."""
        p = Adapter(self, name, method, site.settings, site.path)
        built = method.build(site)
        self.adapters[name] = p
        try:
            for key, value in built.items():
                self._file(key, name, value, p)
            if init and site.device.type != "meta":
                with torch.no_grad():
                    method.init(p, self.stack(()))
            if self.original_weight_device().type != "meta":
                with torch.no_grad():
                    method.derive(p, self.stack(()))
        except BaseException:
            self._drop(name)
            raise
        return p

    def _file(self, key: str, name: str, value: Any, p: Adapter) -> None:
        if isinstance(value, nn.Module):
            template: nn.Module = _MODULES
        elif isinstance(value, nn.Parameter):
            template = _PARAMETERS
        elif isinstance(value, Tensor):
            template = _BUFFERS
        else:
            p.__dict__[key] = value
            return
        home = self._modules.get(key)
        if home is None:
            home = clone(template)
            self._modules[key] = home
        if isinstance(value, nn.Module):
            value.__dict__["training"] = self.training
            home._modules[name] = value  # type: ignore[union-attr]
        else:
            home[name] = value  # type: ignore[index]

    def keep(self, p: Adapter, key: str, value: Tensor) -> None:
        """File a derived tensor, which moves with the layer and is not saved."""
        self._file(key, p.name, value, p)

    def _drop(self, name: str) -> None:
        for key, home in list(self._modules.items()):
            if key != "base_layer" and name in home:  # type: ignore[operator]
                del home[name]  # type: ignore[attr-defined]
                if not len(home):  # type: ignore[arg-type]
                    del self._modules[key]
        self.adapters.pop(name, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first remaining one becomes active.

        Raises ValueError if it is merged.
        """
        if adapter_name not in self.adapters:
            return
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"Cannot delete the adapter {adapter_name!r} while it is merged. Call unmerge first."
            )
        self._drop(adapter_name)
        self._active = tuple(n for n in self._active if n != adapter_name)
        self._replan()

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    def slots(self, name: str) -> list[Slot]:
        """Every saved tensor of adapter `name`."""
        if name not in self.adapters or name in self.shares:
            return []
        key_of = self.adapters[name].method.checkpoint_key
        found = []
        for key, home in self._modules.items():
            if key == "base_layer" or name not in home or type(home) is BufferDict:  # type: ignore[operator]
                continue
            child = home._modules.get(name)  # type: ignore[union-attr]
            if child is None:
                found.append(Slot(key_of(key), f"{key}.{name}", home, name))  # type: ignore[arg-type]
                continue
            for owner, leaf, attr in tensors_below(child):
                found.append(Slot(key_of(f"{key}.{leaf}"), f"{key}.{name}.{leaf}", owner, attr))
        return found

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of adapter `name`."""
        for slot in self.slots(name):
            tensor = slot.tensor
            if isinstance(tensor, nn.Parameter):
                yield tensor

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in order."""
        return list(self._active)

    @property
    def active_adapter(self) -> list[str]:
        """Same as `active_adapters`."""
        return list(self._active)

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer runs as the base layer."""
        return self._disabled

    @property
    def _disable_adapters(self) -> bool:
        return self._disabled

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the merged adapters, in order."""
        return self._merged

    @merged_adapters.setter
    def merged_adapters(self, names: list[str]) -> None:
        self._merged = list(names)
        self._replan()

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self._merged)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active, and trainable unless `inference_mode`.

        A merged layer is unmerged first, with a warning.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        if self._merged:
            import warnings

            warnings.warn(
                "Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2
            )
            self.unmerge()
        self.activate(names, inference_mode)

    def activate(self, names: tuple[str, ...], inference_mode: bool = False) -> None:
        """`set_adapter` without the look at merges."""
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active = names
        self._replan()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the parameters of these adapters trainable or frozen; unknown names are ignored."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            for parameter in self.adapter_parameters(name):
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Run with the active adapters, or as the base layer, with nothing trainable.

        What is merged is taken out while disabled. Enabling gives back what was trainable and merged before.
        """
        if enabled == (not self._disabled):
            return
        if enabled:
            self._set_disabled(False)
            for name, flag in (self._trainable or {}).items():
                self.set_requires_grad(name, flag)
            self._trainable = None
        else:
            self._trainable = {
                n: any(q.requires_grad for q in self.adapter_parameters(n)) for n in self.adapters
            }
            self.set_requires_grad(list(self.adapters), False)
            self._set_disabled(True)

    def _set_disabled(self, disabled: bool) -> None:
        if disabled == self._disabled:
            return
        self._disabled = disabled
        if disabled and self._merged:
            self._suspended = list(self._merged)
            self.unmerge()
        elif not disabled and self._suspended:
            names, self._suspended = self._suspended, None
            self._merge(tuple(n for n in names if n in self.adapters))
        self._replan()

    def _live_names(self) -> tuple[str, ...]:
        if self._disabled:
            return ()
        return tuple(n for n in self._active if n in self.adapters and n not in self._merged)

    def _replan(self) -> None:
        """Decide what a forward runs."""
        names = self._live_names()
        for name in names:
            p = self.adapters[name]
            p.direct = {k: h[name] for k, h in self._modules.items() if k != "base_layer" and name in h}  # type: ignore
        self.__dict__["_run"] = self._runner(self.stack(names)) if names else None

    def _runner(self, stack: Stack) -> Any:
        if not self.view.activations:
            return InPlace(stack, self.depth)
        return Finish(stack) if getattr(stack.base, "max_norm", None) is not None else stack

    def stack(self, names: Sequence[str], extra: Any = None) -> Stack:
        """The base layer under the named adapters, in this order; names that the layer lacks are left out."""
        return Stack(self, tuple(self.adapters[n] for n in names if n in self.adapters), extra)

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or self.call.names is not None:
            return self._forward(args, kwargs)
        run = self._run
        return self._modules["base_layer"](*args) if run is None else run(*args)  # type: ignore[misc]

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = kwargs.pop("adapter_names", None) or self.call.names
        if self.call.only is not None and not self._disabled:
            return self._alone(args, kwargs)
        if names is not None and not self._disabled:
            return self._mixed(tuple(names), args, kwargs)
        return self._general(self._run, args, kwargs)

    def _general(self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if run is None:
            return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        if not self.view.activations:
            return run(*args, **kwargs)
        x = args[0] if args else kwargs.pop(next(iter(kwargs)))
        rest = (args[1:], kwargs) if args[1:] or kwargs else None
        if rest is None:
            return run(x)
        stack = run.stack if isinstance(run, Finish) else run
        return self.view.finish(stack.base, Stack(self, stack.adapters, rest)(x))

    def _mixed(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each sample under its own adapter."""
        if self._merged:
            raise ValueError(
                f"adapter_names cannot be used while adapters are merged (here {self._merged}). Call unmerge_adapter()."
            )
        base, rest = self._modules["base_layer"], dict(kwargs)
        axis = 0 if getattr(base, "batch_first", True) else 1
        x = args[0] if args else next(iter(rest.values()))
        groups = self.call.groups(x.shape[axis], x.device, self._where(), names)
        present = {n: index for n, index in groups.items() if n != BASE and n in self.adapters}
        if self.view.activations and not rest and len(args) == 1:
            return self._mixed_rows(x, present)
        return self._mixed_parts(groups, axis, args, rest)

    def _where(self) -> str:
        return next((a.path for a in self.adapters.values()), "")

    def _mixed_rows(self, x: Tensor, present: dict[str, Tensor]) -> Tensor:
        """The base once for all rows, then each adapter on its own; other methods run on their rows whole."""
        root = self.stack(())
        y = root(x)
        out = y
        for name, index in present.items():
            p = self.adapters[name]
            rows = x.index_select(0, index)
            part = (
                p.method.onto(p, root, y.index_select(0, index), rows)
                if isinstance(p.method, Delta)
                else p.method.forward(p, root, rows)
            )
            out = out.index_copy(0, index, part)
        return self.view.finish(root.base, out)

    def _mixed_parts(
        self, groups: dict[str, Tensor], axis: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a whole module once per adapter on its rows, and put the results back in order."""
        rows = sum(len(i) for i in groups.values())
        order = torch.cat(list(groups.values())).argsort()
        parts, before = [], self.call.only
        try:
            for name, index in groups.items():
                self.call.only = name
                take = rows_of(index, rows, axis)
                parts.append(self._alone(tuple(map(take, args)), {k: take(v) for k, v in kwargs.items()}))
        finally:
            self.call.only = before
        return join_parts(parts, order, axis)

    def _alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer under the one adapter that the call names."""
        stack = self.stack(self._names_now())
        return self._general(self._runner(stack) if stack.adapters else None, args, kwargs)

    def _names_now(self) -> tuple[str, ...]:
        only = self.call.only
        return self._live_names() if only is None else (only,)

    # ---- merge -------------------------------------------------------------------------------------------------

    def original_weight(self) -> Tensor:
        """The base weight without any merged adapter, (..., O, I)."""
        base = self.get_base_layer()
        if self._saved is None:
            return self.view.read(base)
        return self.view.matrix(base, storage.of(base, self.view.name).original(self._saved[self.view.name]))

    def original_weight_device(self) -> torch.device:
        """Where the base weight lies."""
        return getattr(self.get_base_layer(), self.view.name).device

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W' and b' into the base layer; the old payload is kept, so that `unmerge` restores every bit.

        Arguments:
            safe_merge: kept for compatibility; every merge is checked and leaves the layer unchanged when it fails.
            adapter_names: which adapters; None means the active ones. Names that the layer lacks are skipped.

        Raises TypeError for a string, ValueError if the result is not finite or if the answer would change.
        Extra memory: one copy of the weight while merged, and at most 64 MiB during the call.
        """
        names = adapters_to_merge(self, adapter_names)
        self._merge(tuple(n for n in names if n in self.adapters))

    def _merge(self, names: tuple[str, ...], keep: bool = True) -> None:
        if not names:
            return
        self.check_merge(names)
        if keep and self._saved is None:
            self.__dict__["_saved"] = self._payload()
        before = list(self._merged)
        try:
            self._write(names)
        except BaseException:
            if self._saved is not None:
                self._restore()
                if before:
                    self._write(tuple(before))
                else:
                    self.__dict__["_saved"] = None
            raise
        self._merged = before + list(names)
        self._replan()

    def check_merge(self, names: tuple[str, ...]) -> None:
        """Raise if merging these adapters is impossible or would change the output."""
        base = self.get_base_layer()
        self.view.refuse_merge(base)
        live = [n for n in self._active if n in self.adapters and n not in self._merged]
        rest = [n for n in live if n not in names]
        for name in (*names, *rest):
            if name in names and not self.adapters[name].method.mergeable:
                raise ValueError(
                    f"The adapter {name!r} at {self._where()!r} depends on its input and cannot be merged."
                )
        prefix = tuple(live[: len(names)]) == names
        if rest and not prefix and not all(self.adapters[n].method.additive for n in (*names, *rest)):
            raise ValueError(
                f"Merging {list(names)} at {self._where()!r} while {rest} stay active would change the output, because "
                f"these methods do not commute. Merge the first of {live} first, or all of them."
            )
        if self.view.bias(base) is None and any(
            self.adapters[n].method.bias(self.adapters[n], None) is not None for n in names
        ):
            raise RuntimeError(
                f"The adapter has a bias (lora_bias=True) but the layer {self._where()!r} has none to merge it into. "
                "Keep the adapter unmerged, or train with lora_bias=False."
            )

    def _payload(self) -> dict[str, Any]:
        base = self.get_base_layer()
        names = [self.view.name] + ([self.view.bias_name] if self.view.bias(base) is not None else [])
        return {n: storage.of(base, n).save(base, n) for n in names}

    def _restore(self) -> None:
        base = self.get_base_layer()
        for name, payload in (self._saved or {}).items():
            storage.of(base, name).restore(base, name, payload)

    @torch.no_grad()
    def tiles(self, names: tuple[str, ...]) -> Iterator[tuple[int, Tensor]]:
        """W' in blocks of rows, (start, (..., rows, I)), each checked to be finite.

        Raises ValueError naming the layer if a block holds a value that is not finite.
        """
        stack, base = self.stack(names), self.get_base_layer()
        *lead, out, inp = self.view.shape(base)
        step = max(1, TILE_BYTES // (12 * inp * (lead[0] if lead else 1)))
        dense = type(storage.of(base, self.view.name)) is storage.Storage
        for start in range(0, out, step if dense else out):
            W = stack.weight(slice(start, start + step) if dense else slice(None))
            if not torch.isfinite(W).all():
                raise ValueError(
                    f"Merging {list(names)} into {self._where()!r} gives weights that are not finite. The adapter or the "
                    "base weight holds NaN or infinity, or the sum leaves the range of the dtype. Nothing was merged."
                )
            yield start, W

    @torch.no_grad()
    def _write(self, names: tuple[str, ...]) -> None:
        base = self.get_base_layer()
        kind = storage.of(base, self.view.name)
        b = self.stack(names).bias()
        for start, W in self.tiles(names):
            if type(kind) is storage.Storage:
                self.view.write_rows(base, start, W)
            else:
                kind.write(base, self.view.name, self.view.raw(base, W))
        if b is not None and b is not self.view.bias(base):
            if not torch.isfinite(b).all():
                raise ValueError(
                    f"Merging {list(names)} into {self._where()!r} gives a bias that is not finite."
                )
            storage.of(base, self.view.bias_name).write(base, self.view.bias_name, b)

    def unmerge(self) -> None:
        """Give back the base layer's payload as it was before the first merge, bit for bit."""
        if not self._merged:
            import warnings

            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        if self.tied is not None:
            self.get_base_layer()._parameters[self.view.name] = self.tied
            self.__dict__["tied"] = None
        self.__dict__["_saved"] = None
        self._merged = []
        self._replan()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What adapter `adapter` adds to the weight, in the stored layout."""
        p = self.adapters[adapter]
        base = self.get_base_layer()
        W = self.original_weight()
        with torch.no_grad():
            if isinstance(p.method, Delta):
                return self.view.raw(base, p.method.delta(p, W))
            return self.view.raw(base, p.method.weight(p, W) - W)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's update can be written as a LoRA."""
        p = self.adapters.get(adapter_name)
        return p is not None and isinstance(p.method, Delta)

    # ---- python ------------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_run", None)

    def __repr__(self) -> str:
        shown = self.__class__.__new__(self.__class__)
        children: dict[str, Any] = {"base_layer": self._modules["base_layer"]}
        for name in self._home_order:
            children[name] = self._modules.get(name, getattr(self, name))
        children.update(
            {k: v for k, v in self._modules.items() if k not in children and type(v) is not BufferDict}
        )
        shown.__dict__.update(self.__dict__, _modules=children)
        text = nn.Module.__repr__(shown)
        return f"{self.family}.{text}" if self.family else text


def tensors_below(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, dotted name, attribute) of every parameter and persistent buffer below a module."""
    for name, value in module._parameters.items():
        if value is not None:
            yield module, prefix + name, name
    for name, value in module._buffers.items():
        if value is not None and name not in module._non_persistent_buffers_set:
            yield module, prefix + name, name
    for name, child in module._modules.items():
        if child is not None:
            yield from tensors_below(child, f"{prefix}{name}.")


def rows_of(index: Tensor, rows: int, axis: int) -> Any:
    def take(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() > axis and value.shape[axis] == rows:
            return value.index_select(axis, index)
        return value.index_select(0, index) if value.dim() and value.shape[0] == rows else value

    return take


def join_parts(parts: list[Any], order: Tensor, axis: int) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts, axis).index_select(axis, order)
    if isinstance(first, tuple):
        return tuple(
            None if column[0] is None else join_parts(list(column), order, axis if i == 0 else 0)
            for i, column in enumerate(zip(*parts, strict=True))
        )
    raise TypeError(
        f"Cannot assemble the output of a mixed batch from values of type {type(first).__name__}."
    )


def adapters_to_merge(layer: Any, adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters that a merge of `adapter_names` concerns: those not merged yet, with a warning about the others.

    Raises TypeError for a string.
    """
    import warnings

    if isinstance(adapter_names, str):
        raise TypeError(
            f"adapter_names must be a list of names, got the string {adapter_names!r}. Use [{adapter_names!r}]."
        )
    names = list(layer.active_adapters if adapter_names is None else adapter_names)
    if layer.merged:
        fresh = [n for n in names if n not in layer.merged_adapters]
        if fresh:
            warnings.warn(
                f"Already merged: {layer.merged_adapters}. Now additionally merging {fresh}.", stacklevel=3
            )
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
        names = fresh
    return names


def tuner_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, layer) of every tuner layer and wrapper below a module; its cost does not depend on how many adapters
    are loaded, because the walk never enters an adapter's own modules."""
    stack: list[tuple[str, nn.Module]] = [(prefix, module)]
    seen: set[int] = set()
    while stack:
        path, m = stack.pop()
        if id(m) in seen:
            continue
        seen.add(id(m))
        children = m._modules
        if isinstance(m, AdapterHost):
            yield path, m
            children = {k: children[k] for k in m._below}
        for name in reversed(children):
            child = children[name]
            if child is not None:
                stack.append((f"{path}.{name}" if path else name, child))
