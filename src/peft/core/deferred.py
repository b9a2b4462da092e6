"""Switches of adapters that a model's layers follow when somebody looks: the next forward, or whoever asks for a state.

A switch then costs the same for any number of layers. Compiled programs look at layers by themselves, before any of
our code runs; once one has been traced, layers follow at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

_lock = threading.RLock()
FOLLOWING: Any = ()  # what is wanted while layers are on their way
_waiting: weakref.WeakSet[Deferred] = weakref.WeakSet()


class Deferred:
    """The part of a call record that knows what all layers have in common, and what they have not followed yet.

    Attributes:
        plain: see `Call`; False while layers wait, so that none runs as it was.
        disabled: whether all layers are; None where that is not known.
        frozen: whether no adapter is trainable, as far as the switches of adapters say.
        merged: whether some layer may hold a merge.
    """

    plain: bool
    disabled: bool | None = False
    frozen = False
    merged = False
    at_once: ClassVar[bool] = False  # a program has been traced
    _flags: dict[Any, tuple[Tensor, Tensor]] | None = None  # by device, once a program has been traced
    _wanted: tuple[Sequence[Any], tuple[str, ...] | None, bool | None] | None = None
    _after = True  # `plain`, once the layers have followed

    def switch(self, layers: Sequence[Any], names: tuple[str, ...] | None = None, off: bool | None = None) -> None:
        """Have layers follow: these adapters active, all of them switched off or on; None leaves that as it is."""
        with _lock:
            if self._wanted is None:
                self._after, self.plain = self.plain, False
            else:
                names = self._wanted[1] if names is None else names
                off = self._wanted[2] if off is None else off
            self._wanted = (layers, names, off)
            _waiting.add(self)
        if Deferred.at_once:
            self.settle()

    def beside(self) -> list[Any]:
        """The layers of the models that the record is known to be of."""
        of = (m for model in self.__dict__.get("models", ()) for m in model.modules())
        return [m for m in of if m.__dict__.get("call") is self and hasattr(m, "_ready")]

    def stands_in(self, model: Any) -> None:
        """The record is of the layers of a model; a copy of it knows of none."""
        self.__dict__.setdefault("models", weakref.WeakSet()).add(model)

    def forget(self) -> None:
        """There are no layers any more that could follow."""
        with _lock:
            if self._wanted is not None:
                self._wanted, self.plain = None, self._after
            _waiting.discard(self)

    def flag(self, device: torch.device, on: bool) -> Tensor:
        """The tensor that says to traced layers whether they are in force; two that are never written to."""
        found = self.__dict__.setdefault("_flags", {})
        if device not in found:
            with torch.inference_mode(False):
                found[device] = (torch.tensor(False, device=device), torch.tensor(True, device=device))
        tensor: Tensor = found[device][on]
        return tensor

    def settle(self) -> None:
        """Let the layers follow now."""
        if torch.compiler.is_compiling():
            traced()  # while tracing, as a program cannot hold the lock
        elif self._wanted is not None:
            self._follow()

    def _follow(self) -> None:
        with _lock:
            if self._wanted is None or self._wanted is FOLLOWING:  # which only the thread that they follow sees here
                return
            wanted = layers, names, off = self._wanted
            self._wanted = FOLLOWING  # so that other threads wait for the last of them
            try:
                for layer in layers:
                    layer.follow(names, off)
            except BaseException:
                self._wanted = wanted  # some still wait
                raise
            self._wanted, self.plain = None, self._after
            _waiting.discard(self)


def traced() -> bool:
    """A program is being traced: from now on layers follow at once."""
    Deferred.at_once = True
    for call in list(_waiting):
        call._follow()
    return True


traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as assume_constant_result, which imports dynamo
