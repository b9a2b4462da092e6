"""Merging: W' written into the base weight block by block, and the old payload given back bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftWarning, WrongKindError, check_adapters, report
from ..kernels.modes import ordinary
from . import onestep, storage
from .blocks import Blocks
from .kept import Forgetful
from .kinds import stated_outside
from .lent import own, same_memory
from .memory import identity
from .method import Delta
from .onload import onload_layer, used_at
from .rounding import MergeError, check_mode
from .stack import Adapter


class Mergeable(Blocks, Forgetful):
    """The part of a tuner layer that merges; `stack`, `get_base_layer` and `_replan` are the layer's."""

    adapters: dict[str, Adapter]
    call: Any
    _active: tuple[str, ...]
    _merged: Sequence[str] = ()
    _disabled: bool
    _suspended: list[str] | None = None  # what enabling will merge again
    merge_error: MergeError | None = None  # what the last merge into a quantised weight changed
    seen: Tensor | None = None  # directions that its inputs lie along, for a compensated merge

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the merged adapters, in order; while disabled, of those that enabling will merge again."""
        return list(self._merged if self._suspended is None else self._suspended)

    @merged_adapters.setter
    def merged_adapters(self, names: list[str]) -> None:
        self._merged = list(names)
        self._replan()

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    _replan: Callable[[], None]

    def original_weight(self) -> Tensor:
        """The base weight without any merged adapter, (..., O, I)."""
        base = self.get_base_layer()
        if self._saved is None:
            return self.base_weight()
        return self.view.matrix(base, self._original(self.view.name))

    def base_weight(self) -> Tensor:
        """The base weight as it is now, (..., O, I), brought in if it lies elsewhere."""
        base = self.get_base_layer()
        with onload_layer(base, write=False) if "_hf_hook" in base.__dict__ else nullcontext():
            return self.view.read(base)

    def original_bias(self) -> Tensor | None:
        """The base bias without any merged adapter, (O,), or None."""
        base, name = self.get_base_layer(), self.view.bias_name
        if self._saved is None or name not in self._saved:
            return self.view.bias(base)
        return self._original(name)

    def _original(self, name: str) -> Tensor:
        kind, payload = (self._saved or {})[name]
        return kind.original(payload)

    def original_weight_device(self) -> torch.device:
        """Where the base weight lies when it is used."""
        base = self.get_base_layer()
        return used_at(base, self.view.sample(base))

    def original_key(self, W: Tensor | None) -> Hashable:
        """Equal for two moments between which the base weight, without any merged adapter, has not changed.

        Arguments:
            W: what `original_weight` gives now; it is not needed of a quantised weight.

        None if that is not known.
        """
        base, name = self.get_base_layer(), self.view.name
        kind, payload = (storage.of(base, name), None) if self._saved is None else self._saved[name]
        if not kind.packed:
            return None if W is None else identity(W)
        return kind.key(base, name) if payload is None else kind.payload_key(payload)

    @property
    def packed(self) -> storage.Storage | None:
        """The storage of the base weight if it is quantised, else None."""
        return storage.packed(self.get_base_layer(), self.view.name)

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, quantized: str | None = None
    ) -> None:
        """Write W' and b' into the base layer; the old payload is kept, so that `unmerge` restores every bit.

        Arguments:
            safe_merge: kept for compatibility; every merge is checked and leaves the layer unchanged when it fails.
            adapter_names: which adapters; None means the active ones. Names that the layer lacks are skipped. Where
                the order counts, active ones are merged in the order in which they act.
            quantized: what a quantised weight becomes: "requantize" (W' rounded), "compensated" (rounded so that the
                update's effect stays) or "dequantize" (a dense weight); None is the way of the last merge.

        Raises TypeError for a string, ValueError if the result is not finite or if the answer would change.
        Extra memory: one copy of the weight while merged, and one tile during the call, see `blocks`.
        """
        if quantized is not None:
            self.round_by(quantized)
        names = adapters_to_merge(self, adapter_names)
        self._merge(self._as_active(tuple(n for n in names if n in self.adapters)))

    def _as_active(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names of active adapters in the order in which they act, if it counts: the answer stays then."""
        if len(names) < 2 or not set(names) <= set(self._active):
            return names
        if all(self.adapters[n].method.additive for n in names):
            return names
        return tuple(n for n in self._active if n in names)

    def round_by(self, mode: str, dtype: torch.dtype | None = None, seen: Tensor | None = None) -> None:
        """How a quantised weight takes the merges that follow.

        Arguments:
            mode: as `quantized` of `merge`.
            dtype: of a dense weight in place of a quantised one; None is that in which its numbers are read.
            seen: (I, k), directions that the layer's inputs lie along; None: not known.

        Raises ValueError for an unknown mode.
        """
        check_mode(mode)
        self.__dict__.update(_rounding=mode, _dense_dtype=dtype, seen=seen)

    def _merge(self, names: tuple[str, ...], keep: bool = True) -> None:
        with ordinary():
            if names and not (keep and len(names) == 1 and onestep.merged(self, names[0])):
                with onload_layer(self):
                    self._merge_here(names, keep)

    def merge_for_good(self, names: tuple[str, ...]) -> None:
        """Merge into a base that stays so; by a program's own `merge`, where the layer has one."""
        if names and stated_outside(type(self), "merge"):
            self.merge(False, list(names))
        else:
            self._merge(names, keep=False)

    def _merge_here(self, names: tuple[str, ...], keep: bool) -> None:
        """`_merge`, with all weights in place."""
        self.check_merge(names, stay=keep)
        if self._disabled and keep:  # the base stays the base until the layer is enabled
            wanted = [*self.merged_adapters, *names]
            self.check_finite(tuple(wanted))
            self._suspended = wanted
            self.call.merged = True
            return
        if keep and self._saved is None:
            self.__dict__["_saved"] = self._payload()
        before = list(self._merged)
        try:
            self._write_anew((*before, *names), bool(before))
        except BaseException:
            if self._saved is not None:
                self._restore()
                self._write_anew(tuple(before), bool(before))
                if not before:
                    self.__dict__.pop("_saved", None)
            raise
        self._replan()

    def _write_anew(self, names: tuple[str, ...], over: bool) -> None:
        """Write W' of these adapters; `over` an earlier one, whose rounding is no part of it: bits tell no history."""
        if over:
            self.__dict__["_merged"] = []
            self._begin_again()
        if names:
            self._write(names)
        self.__dict__["_merged"] = list(names)

    def check_merge(self, names: tuple[str, ...], stay: bool = True) -> None:
        """Raise if merging these adapters is impossible or would change the output.

        Arguments:
            names: the adapters.
            stay: whether the other active ones stay at work.
        """
        base = self.get_base_layer()
        self.view.check_stored(base, self._where())
        live = [n for n in self._active if n in self.adapters and n not in self.merged_adapters]
        rest = [n for n in live if stay and n not in names]
        for name in names:
            self.adapters[name].method.refuse_merge(self.adapters[name])
        adds = any(self.adapters[name].method.additive for name in names)
        if adds and "told_more" in self.__dict__ and self.view.own_forward(base):
            text = (
                f"{self._where()!r}, a {type(base).__name__}, has been called with more than its input. An update "
                "is added to what comes of that, but once merged it goes through it: compare the answers."
            )
            report(PeftWarning, text, strict=False, stacklevel=6)
        prefix = tuple(live[: len(names)]) == names
        if rest and not prefix and not all(self.adapters[n].method.additive for n in (*names, *rest)):
            raise ValueError(
                f"Merging {list(names)} at {self._where()!r} while {rest} stay active would change the output, because "
                f"these methods do not commute. Merge the first of {live} first, or all of them."
            )
        b = self.view.bias(base)
        computed = b is not None and self.packed is None and self.view.bias_name not in base._parameters
        if computed and any(a.method.bias(a, b) is not b for a in map(self.adapters.__getitem__, names)):
            self.view.check_held(base, self.view.bias_name, self._where())
        if b is None and not self.view.one_hot and any(map(self._has_bias, names)):
            raise RuntimeError(
                f"The adapter has a bias but the layer {self._where()!r} has none to merge it into. Keep the adapter "
                "unmerged, or train it without a bias (for LoRA: lora_bias=False)."
            )

    def _has_bias(self, name: str) -> bool:
        """Whether an adapter's bias is another one than zero."""
        b = self.adapters[name].method.bias(self.adapters[name], None)
        return b is not None and (b.is_meta or bool(b.count_nonzero()))

    def _payload(self) -> dict[str, Any]:
        base = self.get_base_layer()
        names = [self.view.name] + ([self.view.bias_name] if self.view.bias(base) is not None else [])
        saved = {}
        for n in names:
            kind = storage.of(base, n)
            saved[n] = (kind, base._parameters[n].data if own(base, n) else kind.save(base, n))  # type: ignore[union-attr]
        return saved

    def _rewrites(self) -> bool:
        return self._saved is not None and bool(self.view.name) and self._saved[self.view.name][0].packed

    def _begin_again(self) -> None:
        """The payload's numbers, in the memory that the next merge writes to where that holds the merged ones alone."""
        base, saved = self.get_base_layer(), {name: payload for name, (_, payload) in (self._saved or {}).items()}
        if not all(isinstance(payload, Tensor) and own(base, name, payload) for name, payload in saved.items()):
            self._restore()
            return
        for name, payload in saved.items():
            if not same_memory(held := getattr(base, name), payload):  # a bias that no adapter has changed
                held.detach().copy_(payload)

    def _restore(self) -> None:
        if self._packed_base is not None:
            self._stand_in(self._packed_base.to(self.original_weight_device()))
            self.__dict__["_packed_base"] = None
        base = self.get_base_layer()
        for name, (kind, payload) in (self._saved or {}).items():
            if own(base, name, payload):
                getattr(base, name).data = payload
            else:
                kind.restore(base, name, payload)

    def _stand_in(self, module: nn.Module) -> None:
        """Put a module in place of the innermost one."""
        holder: Any = self
        while isinstance(holder._modules["base_layer"], Mergeable):
            holder = holder._modules["base_layer"]
        holder._modules["base_layer"] = module

    def unmerge(self) -> None:
        """Give back the base layer's payload as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._suspended = None
        if self._merged:
            self._take_back()
        self._tie()
        self._replan()

    def _take_back(self) -> list[str]:
        """Give back the payload and say what was merged; what was untied for the merge stays so."""
        names = list(self._merged)
        self.__dict__["_merged"] = []
        with ordinary():
            if not onestep.given_back(self):
                with onload_layer(self.get_base_layer()):
                    self._restore()
        self.__dict__.pop("_saved", None)
        return names

    def _tie(self) -> None:
        if self.tied is not None:
            self.get_base_layer()._parameters.update(self.tied)
            self.__dict__["tied"] = None

    def go_back(self, names: list[str]) -> None:
        """Have these adapters merged as before, after an error in another layer."""
        if self._suspended is not None:
            self._suspended = names or None
        elif list(self._merged) != names:
            self._take_back()
            self._merge(tuple(names))
        if not names:
            self._tie()
        self._replan()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What adapter `adapter` adds to the weight, in the stored layout."""
        check_adapters([adapter], self.adapters)
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
        return p is not None and p.method.mergeable and self.view.name != ""


def adapters_to_merge(layer: Any, adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters that a merge of `adapter_names` concerns: those not merged yet, with a warning about the others.

    Raises TypeError for a string.
    """
    if isinstance(adapter_names, str):
        raise WrongKindError(
            f"adapter_names must be a list of names, got the string {adapter_names!r}. Use [{adapter_names!r}]."
        )
    names = list(layer.active_adapters if adapter_names is None else adapter_names)
    if layer.merged:
        fresh = [n for n in names if n not in layer.merged_adapters]
        if fresh:
            warnings.warn(f"Already merged: {layer.merged_adapters}. Now additionally merging {fresh}.", stacklevel=3)
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
        names = fresh
    return names
