"""LN tuning: whole modules, normally the layer norms, trained in a copy.

    y = copy(x),   the copy starting as the module is

The copy has all tensors of the module, which may be of any class, in their dtypes. Source: Zhao 2023, arXiv 2312.11420.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.buffers import tensors_below
from ..core.layer import BaseTunerLayer
from ..core.method import Method, Site
from ..core.onload import own_copy
from ..core.payload import finite
from ..core.stack import Adapter, Stack
from ..core.tuner import BaseTuner
from ..target_config import TargetConfig


@dataclass
class LNTuningConfig(TargetConfig):
    """The configuration of LN tuning; it has no settings but the modules."""

    kind = "LN_TUNING"
    added = frozenset({"layers_to_transform", "layers_pattern", "bias"})
    ranks = ()
    any_module = True

    def check(self) -> None:
        """Modules are copied whole."""
        if self.target_parameters:
            raise ValueError(
                f"LN tuning copies whole modules, so target_parameters={self.target_parameters} has no meaning. Name "
                "the modules that hold them in target_modules."
            )
        if self.bias not in ("none", "all"):
            raise ValueError(f"bias={self.bias!r} has no meaning: a copy trains its bias anyway. Use 'none' or 'all'.")


class Replacement(Method):
    """Another module in place of the target."""

    def build(self, site: Site) -> dict[str, Any]:
        if next(site.module.parameters(), None) is None:
            kind = type(site.module).__name__
            raise ValueError(f"{site.path!r}, a {kind}, has no parameters that a copy could train. Target another one.")
        memo: dict[int, Any] = {}
        if site.device.type == "meta":
            for slot in tensors_below(site.module):  # what files hold; other buffers are copied
                t = getattr(slot[0], slot[2])
                empty = torch.empty_like(t, device="meta")
                memo[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
        made = own_copy(site.module, memo)
        for p in made.parameters():
            p.requires_grad_(p.is_floating_point())
        return {"ln_tuning_layers": made}

    def init(self, p: Adapter, inner: Stack) -> None:
        if p.layer.original() is not inner.base:  # another adapter is merged
            p.ln_tuning_layers.load_state_dict(p.layer.original().state_dict())


class LNTuningLayer(BaseTunerLayer):
    """A module with trained copies, of which one runs."""

    family = "ln_tuning"
    adapter_layer_names = ("ln_tuning_layers",)
    _home_order = ("ln_tuning_layers",)
    _whole = True

    def original(self) -> nn.Module:
        """The user's module."""
        return self.get_base_layer() if self._saved is None else self._saved["module"]

    def original_weight_device(self) -> torch.device:
        sample = self.view.sample(self.original())
        return torch.device("cpu") if sample is None else sample.device

    def _runner(self, stack: Stack) -> Any:
        assert stack.last is not None
        return stack.last.ln_tuning_layers

    def _now(self) -> nn.Module:
        """The module that a forward runs."""
        only = self.call.only
        if only in self.adapters and not self._disabled:
            return self._modules["ln_tuning_layers"][only]  # type: ignore[index]
        run = self.planned()
        return self._modules["base_layer"] if run is None or only is not None else run  # type: ignore

    @property
    def weight(self) -> Tensor:
        """The weight of the module that runs."""
        return self._now().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the module that runs."""
        return self._now().bias  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "adapters" not in self.__dict__:
                raise
        return getattr(self._now(), name)

    # ---- one at a time -----------------------------------------------------------------------------------------

    def check_active(self, names: Sequence[str]) -> None:
        """Raise ValueError if several of these adapters have a copy here: only one can run."""
        mine = [n for n in names if n in self.adapters]
        if len(mine) > 1:
            raise ValueError(f"Only one adapter can be active or merged at {self._where()!r}, but {mine} have copies.")

    def activate(self, names: tuple[str, ...], inference_mode: bool = False) -> None:
        self.check_active(names)
        super().activate(names, inference_mode)

    def check_merge(self, names: tuple[str, ...], stay: bool = True) -> None:
        self.check_active([*self.merged_adapters, *names])
        rest = [n for n in self._live_names() if n not in names]
        if rest and stay:
            raise ValueError(f"Merging {list(names)} at {self._where()!r} while {rest} runs would do nothing yet.")

    def tiles(self, names: tuple[str, ...], into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        for name in names:
            if not all(map(finite, self._modules["ln_tuning_layers"][name].state_dict().values())):  # type: ignore
                raise ValueError(f"The copy of {name!r} at {self._where()!r} is not finite. Nothing was merged.")
        return iter(())

    def check_finite(self, names: tuple[str, ...]) -> None:
        self.tiles(names)

    def _payload(self) -> dict[str, Any]:
        return {"module": self._modules["base_layer"]}

    def _restore(self) -> None:
        if self._saved is not None:
            self._modules["base_layer"] = self._saved["module"]

    def _write(self, names: tuple[str, ...]) -> None:
        self.tiles(names)
        self._modules["base_layer"] = self._modules["ln_tuning_layers"][names[-1]]  # type: ignore[index]


class LNTuningModel(BaseTuner):
    """LN tuning on a model."""

    prefix = "ln_tuning_"
    layer_classes: ClassVar[dict[str, type[BaseTunerLayer]]] = {"Module": LNTuningLayer}
    method: ClassVar[Replacement] = Replacement()
