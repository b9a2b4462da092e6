"""Changing the scaling of an update after training: for layers whose adapters hold a plain value `scaling`."""

from __future__ import annotations

from typing import Any

from .layer import BaseTunerLayer


class ScaledLayer(BaseTunerLayer):
    """A layer whose updates can be scaled; a subclass says what their scaling is by itself."""

    def natural_scaling(self, adapter: str) -> float:
        """The scaling that the configuration gives, such as alpha / r."""
        raise NotImplementedError

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the scaling `scale` times what it is by itself; adapters that the layer lacks are ignored."""
        if adapter in self.adapters:
            self._rescale(adapter, scale * self.natural_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        if scale != 1:
            for name in self.active_adapters:
                if name in self.adapters:
                    self._rescale(name, self.adapters[name].scaling * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`; None gives back what it is by itself."""
        for name in self.active_adapters:
            if name in self.adapters:
                p = self.adapters[name]
                self._rescale(name, self.natural_scaling(name) if scale is None else p.scaling / scale)

    def _rescale(self, name: str, value: Any) -> None:
        p: Any = self.adapters[name]
        if hasattr(p.scaling, "fill_"):
            p.scaling.fill_(float(value))
        else:
            p.scaling = value
