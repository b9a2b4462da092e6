"""Changing the scaling of an update after training: for layers whose adapters hold a plain value `scaling`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import PeftWarning
from ..registry import tuner_class
from .layer import BaseTunerLayer


class ScaledLayer(BaseTunerLayer):
    """A layer whose updates can be scaled; a subclass says what their scaling is by itself, if it is not one."""

    def natural_scaling(self, adapter: str) -> float:
        """The scaling that the configuration gives an adapter of the layer's own method, such as alpha / r; or one."""
        return 1.0

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the scaling `scale` times what it is by itself; adapters that the layer lacks are ignored."""
        for name in self._scaled([adapter]):
            self._rescale(name, scale * self._by_itself(name))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        if scale != 1:
            for name in self._scaled(self.active_adapters):
                self._rescale(name, self.adapters[name].scaling * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`; None gives back what it is by itself."""
        for name in self._scaled(self.active_adapters):
            now = self.adapters[name].scaling
            self._rescale(name, self._by_itself(name) if scale is None else now / scale)

    def _scaled(self, names: Sequence[str]) -> list[str]:
        """Those of the names that have an adapter here whose update has a scaling."""
        return [n for n in names if n in self.adapters and issubclass(self._own_kind(n), ScaledLayer)]

    def _by_itself(self, name: str) -> float:
        kind: type[ScaledLayer] = self._own_kind(name)
        return kind.natural_scaling(self, name)

    def _own_kind(self, name: str) -> Any:
        """The layer's class as it were for this adapter alone: adapters of several methods may stand in one layer."""
        classes = tuner_class(self.adapters[name].settings.peft_type).layer_classes
        return next(iter(classes.values()))

    def _rescale(self, name: str, value: Any) -> None:
        p: Any = self.adapters[name]
        if hasattr(p.scaling, "fill_"):
            p.scaling.fill_(float(value))
        else:
            p.scaling = value


class UnscaledLayer(BaseTunerLayer):
    """A layer that turns its weight: programs that scale all layers of a model may ask it, too."""

    def scale_layer(self, scale: float) -> None:
        """Warn that a rotation has no scaling; 1 is what it has."""
        if scale != 1:
            warnings.warn(
                f"Adapters of {self.family.upper()} multiply the weight, so they have no scaling: scale={scale} has no "
                "effect on them. Use disable_adapter() to run without them.",
                PeftWarning,
                stacklevel=2,
            )

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing, as nothing was scaled."""
