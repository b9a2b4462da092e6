"""Which adapters of a model are active, which are trained, and deleting them: loops over all that holds them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import PeftWarning, check_adapters
from . import unload as unloading
from .roster import Roster
from .snapshot import noted_of, unchanged


class Switching:
    """The part of a tuner that switches adapters; whoever holds prompts without a tuner has it too."""

    active_adapter: str | list[str]
    peft_config: Any

    def layers(self) -> Iterator[tuple[str, Any]]:
        """(path, layer) of all that holds adapters."""
        raise NotImplementedError

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in order."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else list(self.active_adapter)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active, and trainable unless `inference_mode`.

        A merged model is unmerged first, with a warning. Raises ValueError for unknown names and for adapters that
        cannot be active together; the model is then unchanged.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        check_once(names)
        check_adapters(names, self.peft_config)
        chosen = adapter_name if isinstance(adapter_name, str) else list(adapter_name)
        if self._switched(names, inference_mode):
            self.active_adapter = chosen
            return
        layers = [layer for _, layer in self.layers()]
        for layer in layers:
            unloading.check_together(layer, names)
        if any(layer.merged for layer in layers):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
        with unchanged(self, layers):
            self._unmerge(layers)
            for layer in layers:
                layer.activate(names, inference_mode)
        self.active_adapter = chosen
        if (call := self.__dict__.get("call")) is not None:
            call.merged, call.frozen = False, False
            call.disabled = False if not any(layer.disable_adapters for layer in layers) else None

    def roster(self) -> Roster:
        """The layers, and the parameters of each adapter."""
        found: Roster | None = self.__dict__.get("_roster")
        if found is None or not found.current:
            found = self.__dict__["_roster"] = Roster(self)
            if (call := self.__dict__.get("call")) is not None:
                call.frozen = False
        return found

    def _switched(self, names: tuple[str, ...], inference_mode: bool) -> bool:
        """The same where nothing stands in the way: no merge, nothing disabled, one adapter; tells whether it is.

        Layers are told of it, and follow when they run. Where all adapters are frozen, and stay so, none is visited.
        """
        call = self.__dict__.get("call")
        if call is None or len(names) != 1 or call.merged or call.disabled is not False:
            return False
        roster, known = self.roster(), list(self.peft_config)
        before = tuple(self.active_adapters)
        for layer in roster.others:
            unloading.check_together(layer, names)
        restore = noted_of(roster.others) if roster.others else None
        try:
            if not (inference_mode and call.frozen and roster.looks_frozen(known)):
                roster.train(known, () if inference_mode else names)
            for layer in roster.others:
                layer.activate(names, inference_mode)
            call.switch(roster.layers, names=names)
        except BaseException as error:
            if restore is not None:
                restore()
            if call._wanted is not None:  # some layers may have followed
                call.switch(roster.layers, names=before)
            if isinstance(error, (KeyError, AttributeError)):  # a wrapper holds the parameters elsewhere
                return False
            roster.train(known, () if call.frozen else before)
            raise
        call.frozen = inference_mode
        return True

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make these adapters trainable or frozen, whether active or not.

        Raises ValueError for a name that the model does not have.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        check_adapters(names, self.peft_config)
        turned: list[Any] = []
        try:
            for _, layer in self.layers():
                turned += [(p, p.requires_grad) for name in names for p in layer.adapter_parameters(name)]
                layer.set_requires_grad(names, requires_grad)
        except BaseException:
            for parameter, was in turned:
                parameter.requires_grad = was
            raise

    def disable_adapter_layers(self) -> None:
        """Run as the base model, with nothing trainable, until `enable_adapter_layers`."""
        self._warn_of_bias()
        self._enable(False)

    def enable_adapter_layers(self) -> None:
        """Run with the active adapters again; what was trainable and merged before is so again."""
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        layers = [layer for _, layer in self.layers()]
        with unchanged(self, layers):
            for layer in layers:
                layer.enable_adapters(enabled)

    def _warn_of_bias(self) -> None:
        trained = [n for n in self.active_adapters if getattr(self.peft_config.get(n), "bias", "none") != "none"]
        if trained:
            warnings.warn(
                f"The adapter {trained[0]!r} trained biases of the base model "
                f"(bias={self.peft_config[trained[0]].bias!r}), which stay in force: the disabled model does not give "
                "the base model's output.",
                PeftWarning,
                stacklevel=4,
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter everywhere. If it was the only active one, the first remaining one becomes active.

        Raises ValueError for an unknown name, or while the adapter is merged.
        """
        check_adapters([adapter_name], self.peft_config)
        layers = [layer for _, layer in self.layers()]
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(
                f"Cannot delete the adapter {adapter_name!r} while it is merged. Call unmerge_adapter() first."
            )
        remaining = [n for n in self.active_adapters if n != adapter_name]
        others = sorted(n for n in self.peft_config if n != adapter_name)
        follows = not remaining and bool(others) and adapter_name in self.active_adapters
        if follows:
            remaining = others[:1]
            warnings.warn(
                f"Adapter {adapter_name!r} was active and is deleted. Setting active adapter to {remaining[0]!r}.",
                stacklevel=3,
            )
        active = tuple(n for n in remaining if n in self.peft_config)
        with unchanged(self, layers):
            for layer in layers:
                layer.delete_adapter(adapter_name, active)
                if follows:  # otherwise what the other adapters train stays as it is
                    layer.activate(active)
            del self.peft_config[adapter_name]
            self.active_adapter = remaining[0] if len(remaining) == 1 else remaining

    def _unmerge(self, layers: list[Any]) -> None:
        for layer in layers:
            if layer.merged:
                layer.unmerge()


def check_once(names: Sequence[str]) -> None:
    twice = [n for i, n in enumerate(names) if n in names[:i]]
    if twice:
        raise ValueError(f"The adapter {twice[0]!r} is listed twice in {list(names)}; it would be applied twice.")
