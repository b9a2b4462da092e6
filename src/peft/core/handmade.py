"""Layers whose class a program defines: it says with `config._register_custom_module` for which modules they are, or
puts them in place itself, as a tuner of its own.

Such a class holds its tensors, computes and merges as it likes, under the names of the library's layers. The model
around it switches, trains, saves, loads and unloads it like any other layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ..registry import tuner_class
from . import views
from .buffers import BufferDict
from .call import Call
from .host import changed
from .layer import BaseTunerLayer
from .method import Method, Site
from .pattern import settings
from .stack import Adapter
from .tie import innermost


class ByHand(Method):
    """The method of adapters whose layers compute by themselves."""

    lasting = False

    def build(self, site: Site) -> dict[str, Any]:
        return {}


BY_HAND = ByHand()
_HOMES = (nn.ModuleDict, nn.ParameterDict, BufferDict)


class Handmade(BaseTunerLayer):
    """What the layer classes of programs are, too; what they state themselves comes first."""

    made = True
    by_hand = True

    def _begin(self, base_layer: nn.Module | None) -> None:
        """The layer without adapters, with a home for each kind of tensor; without a base layer, a bare module."""
        if base_layer is None:
            nn.Module.__init__(self)
            self.__dict__.update(view=views.view_of(self, None, True), call=Call(), adapters={})
            return
        self.__dict__["_whole"] = not views.supported(innermost(base_layer))
        self._stand(base_layer)
        self.open_homes()

    def adopt(self, name: str) -> Adapter:
        """The adapter `name`, which is there from the first value that the layer notes for it."""
        if name not in self.adapters:
            self.adapters[name] = Adapter(self, name, BY_HAND, None, "")
            changed()
        return self.adapters[name]

    def _held(self) -> list[tuple[str, Any]]:
        return [(key, home) for key, home in super()._held() if isinstance(home, _HOMES)]

    def _decide(self) -> None:
        self.__dict__.update(_by_task=False, _by_input=False, _run=None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.call.plain and not self.disable_adapters and (names := self.call.fact("names")) is not None:
            kwargs.setdefault("adapter_names", list(names))
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]

    def _get_name(self) -> str:
        return type(self).__name__

    # ---- state, as such classes write it -----------------------------------------------------------------------

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = self.view.sample(self.get_base_layer())
        if device is None and (weight is None or weight.is_meta):
            return
        moved(self, adapter_name, weight.device if device is None else device, None)

    # ---- merges ------------------------------------------------------------------------------------------------

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the merged adapters: the list that the class keeps."""
        names: list[str] = self.__dict__.setdefault("_merged_by_hand", [])
        return names

    @merged_adapters.setter
    def merged_adapters(self, names: list[str]) -> None:
        self.__dict__["_merged_by_hand"] = list(names)

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, quantized: str | None = None
    ) -> None:
        """Raise NotImplementedError, where the class has no merge of its own."""
        self.check_merge(())

    def unmerge(self) -> None:
        """Raise NotImplementedError, where the class has no way back of its own."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is unmerged. Give it `unmerge(self)`.")

    def check_merge(self, names: tuple[str, ...], stay: bool = True) -> None:
        """Raise NotImplementedError where the class does not say how it is merged."""
        stated = next(kind for kind in type(self).__mro__ if "merge" in vars(kind))
        if stated.__module__.startswith("peft."):
            raise NotImplementedError(
                f"{type(self).__name__} does not say how it is merged. Give it `merge(self, safe_merge, "
                "adapter_names)`, or call unload() for the base model without the adapters."
            )

    def check_finite(self, names: tuple[str, ...]) -> None:
        """Nothing: what a merge writes is not known before."""

    def _merge(self, names: tuple[str, ...], keep: bool = True) -> None:
        if names:
            self.merge(True, list(names))

    def go_back(self, names: list[str]) -> None:
        """Have these adapters merged as before, after an error in another layer."""
        if self.merged_adapters != names:
            if self.merged:
                self.unmerge()
            self._merge(tuple(names))

    def delete_adapter(self, adapter_name: str, new_active_adapters: Any = None) -> None:
        """Remove an adapter. Raises ValueError while it is merged."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"The adapter {adapter_name!r} is merged in a {type(self).__name__}. Unmerge it first.")
        super().delete_adapter(adapter_name, new_active_adapters)


class Begun:
    """What comes first in such a class: `super().__init__()` makes a bare module, as nn.Module would."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            super().__init__(*args, **kwargs)
        else:
            self._begin(None)  # type: ignore[attr-defined]


BaseTunerLayer.of_programs = (Begun, Handmade)


class Placing:
    """The part of a tuner that programs call from steps of their own."""

    layer_classes: ClassVar[dict[str, type[BaseTunerLayer]]]

    @classmethod
    def is_foreign(cls) -> bool:
        """Whether a program defines the tuner with all its layers."""
        return not cls.layer_classes and not cls.__module__.startswith("peft.")

    @classmethod
    def makes_layers(cls) -> bool:
        """Whether a program stands in for the making of layers."""
        return cls._create_new_module is not Placing._create_new_module

    @staticmethod
    def _create_new_module(peft_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        """The layer of a module with its first adapter: a step of injection for which programs stand in.

        Arguments:
            peft_config: the adapter's settings.
            adapter_name: the adapter.
            target: the module.
            kwargs: what is stated beside the settings.
        """
        classes = tuner_class(peft_config.peft_type).layer_classes
        made: nn.Module = classes[views.view_of(innermost(target)).label](
            target, adapter_name, config=peft_config, **kwargs
        )
        return made

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of a module, within `_create_and_replace`."""
        self.__dict__["under_way"].put(parent, child_name, new_module, child)


def taken_over(layer: Any, other: BaseTunerLayer, name: str) -> None:
    """Have an adapter of another layer's tensors and values; it learns if its name is active."""
    p, made = layer.adopt(name), other.adapters[name]
    for key in layer.other_param_names:
        if key in made.__dict__:
            setattr(p, key, made.__dict__[key])
    for key in other._home_order:
        home = getattr(other, key)
        if name in home:
            getattr(layer, key)[name] = home[name]
    layer.set_requires_grad(name, name in layer.active_adapters)


def class_of(config: Any, base: nn.Module) -> type[BaseTunerLayer] | None:
    """The layer class that a configuration has for a module; None where the library's own are meant.

    Raises TypeError for a class that is no layer.
    """
    for kind, layer in (getattr(config, "_custom_modules", None) or {}).items():
        if isinstance(base, kind):
            if not issubclass(layer, BaseTunerLayer):
                raise TypeError(
                    f"{layer.__name__}, registered for {kind.__name__}, is no tuner layer. Derive it from nn.Module "
                    "and peft.tuners.lora.LoraLayer."
                )
            found: type[BaseTunerLayer] = layer
            return found
    return None


def is_programs_own(steps: Any, base: nn.Module) -> bool:
    """Whether a program makes the layer of a module, or states its class."""
    return steps.tuner.makes_layers() or class_of(steps.config, base) is not None


def placed(steps: Any, path: str, parameter: str | None, layer: BaseTunerLayer | None) -> BaseTunerLayer | None:
    """The layer of one target where a program makes it, or its class does; None where the library does.

    Arguments:
        steps: the injection.
        path: of the target.
        parameter: of the module, where that is the target.
        layer: what stands there already, if anything does.

    Raises TypeError if what a program makes is no layer.
    """
    parent, leaf, found = steps.get(path)
    kind = None if parameter else class_of(steps.config, innermost(found))
    makes = parameter is None and steps.tuner.makes_layers()
    own = settings(steps.config, path)
    stated = {"lora_alpha": getattr(own, "lora_alpha", None)}
    if isinstance(layer, Handmade):
        steps.undo += [layer._replan, partial(layer._drop, steps.name)]
        layer.update_layer(steps.name, own.r, config=own, **stated)
    elif layer is None and (makes or kind is not None):
        flags = dict.fromkeys(("loaded_in_8bit", "loaded_in_4bit", "ephemeral_gpu_offload"), False)
        stated |= {"r": getattr(own, "r", None), "target_name": leaf, **flags}
        if kind is None:
            layer = steps.tuner._create_new_module(own, steps.name, found, **stated)
        else:
            layer = kind(found, steps.name, config=own, **stated)
        if not isinstance(layer, BaseTunerLayer):
            raise TypeError(f"_create_new_module gave a {type(layer).__name__} for {path!r}, which is no tuner layer.")
        steps.put(parent, leaf, layer, found)
    else:
        return None
    _settled(layer, steps.name, own, path, steps)
    return layer


def note(steps: Any, path: str) -> None:
    """A layer that a program's own step may have put in place, or given the adapter."""
    layer = steps.get(path)[2]
    if isinstance(layer, Handmade) and layer not in steps.placed:
        steps.undo.append(partial(layer._drop, steps.name))
        _settled(layer, steps.name, settings(steps.config, path), path, steps)


def _settled(layer: Any, name: str, own: Any, path: str, steps: Any) -> None:
    """The adapter as the model around it needs it: with its settings, and beside the base weight."""
    base = layer.get_base_layer()
    steps.placed.append(layer)
    steps.full.append(layer)
    layer.__dict__["call"] = steps.tuner.call
    if layer.by_hand and views.supported(base):
        layer.__dict__["view"] = views.view_of(base)
    p = layer.adopt(name) if layer.by_hand else layer.adapters[name]
    p.path, p.settings, p.shared = path, own, steps.shared
    for key in layer.other_param_names:
        if key not in p.__dict__ and hasattr(own, key) and key not in layer._home_order:
            p.__dict__[key] = getattr(own, key)
    site = steps.site(layer, own, path)
    moved(layer, name, site.device, site.dtype)
    layer._replan()


def moved(layer: BaseTunerLayer, name: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """Have the tensors of an adapter on a device, floating ones of a dtype."""
    for _, _, owner, attr in layer.slots(name):
        table: Any = owner._buffers if owner._parameters.get(attr) is None else owner._parameters
        held = table[attr]
        new = held.detach().to(device, dtype if dtype is not None and held.is_floating_point() else held.dtype)
        if new.device != held.device or new.dtype != held.dtype:
            table[attr] = nn.Parameter(new, held.requires_grad) if table is owner._parameters else new
