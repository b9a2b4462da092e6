"""The tuner: finds targets, places layers, and speaks for all of them. It holds loops over layers and no maths."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..errors import check_adapters, nearest
from ..kernels.modes import ordinary
from ..registry import tuner_class
from ..types import plain
from ..version import __version__
from . import rounding, sharded
from . import unload as unloading
from .blocks import one_scratch
from .call import Call, first_tensor
from .collector import no_collection
from .combined import Combined
from .files import keys_in_hand
from .handmade import BY_HAND, Placing
from .host import hosts
from .layer import AdapterHost, BaseTunerLayer, tuner_layers
from .place import Injection
from .rounding import MergeError
from .shared import shared_of
from .snapshot import take_back, unchanged
from .switch import Switching, check_once
from .targets import match
from .walking import model_type
from .wrappers import AuxiliaryTrainingWrapper

if TYPE_CHECKING:
    from .seen import Calibration

BIASES = ("none", "all")


class BaseTuner(Switching, Combined, Placing, nn.Module):
    """Adapters on a model: its child `model` is the user's own, with tuner layers in place of the targets.

    Arguments:
        model: the user's model; it is changed in place.
        peft_config: the configuration of `adapter_name`, or {name: configuration}.
        adapter_name: the adapter to inject first; it becomes active.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.
        state_dict: if given, exactly the modules that have keys in it are adapted.
        autocast_adapter_dtype: adapters beside half-precision weights are float32.
        undo: receives the steps that take the injection back.
    """

    prefix: ClassVar[str] = ""
    layer_classes: ClassVar[dict[str, type[BaseTunerLayer]]] = {}  # by the label of a view
    uses_shared_state: ClassVar[bool] = False
    alone: ClassVar[bool] = False  # no other method can be mixed in
    leads: ClassVar[bool] = False  # adapters of its method need it as the tuner, so that one of them must come first
    unmergeable: ClassVar[str] = ""  # why no weight can hold any of its adapters, and what to do
    injection: ClassVar[type[Injection]] = Injection
    companion: ClassVar[type | None] = None  # what a method does over the whole model, made with the tuner
    modes_differ = False  # whether modules of an adapter may be in training in a layer that is in evaluation
    hooks: list[Any]  # on the model, taken off with the adapters
    beside: dict[str, Any]  # what holds adapters outside the model's layers, by name
    waiting: dict[str, Any]  # what is made once an adapter has been held against its file, by adapter name

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        autocast_adapter_dtype: bool = False,
        undo: list[Callable[[], Any]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        known = getattr(model, "peft_config", None)
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        self.__dict__.update(companions={}, beside={}, waiting={}, hooks=[])
        self.__dict__["peft_config"] = {**known, **configs} if isinstance(known, dict) else configs
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.active_adapter: str | list[str] = adapter_name
        self.__dict__["call"] = next((m.call for m in hosts(model) if isinstance(m, BaseTunerLayer)), None) or Call()
        self.call.stands_in(model)
        with no_collection():
            self.inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict, undo)
            self.set_adapter(adapter_name, inference_mode=bool(self.peft_config[adapter_name].inference_mode))
        model.peft_config = self.peft_config

    # ---- what a method's tuner states --------------------------------------------------------------------------

    method: ClassVar[Any] = BY_HAND  # where it is the same for every target

    @classmethod
    def method_of(cls, settings: Any) -> Any:
        """The method of one target, from its configuration."""
        return cls.method

    @classmethod
    def prepare_config(cls, config: Any, model_type: str | None) -> None:
        """Fill in what a configuration leaves to the model's type, before anything is matched."""

    @classmethod
    def out_projection_method_of(cls, settings: Any) -> Any:
        """The method of the out-projection inside a targeted attention module with packed weights."""
        return cls.method_of(settings)

    # ---- injection ---------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        undo: list[Callable[[], Any]] | None = None,
    ) -> None:
        """Add the adapter whose configuration is `peft_config[adapter_name]`; it is not activated.

        The whole plan is made before anything changes, and an error half-way leaves the model as it was. `undo`
        receives the steps that take everything back, for a caller that may fail afterwards.
        """
        config = self.peft_config[adapter_name]
        self._check_new_adapter(model, adapter_name, config)
        if state_dict is None and not keys_in_hand():
            config.peft_version = __version__  # it is made here, wherever its configuration comes from
        self.kind_of(config).prepare_config(config, model_type(model))
        undo = [] if undo is None else undo
        with no_collection(), ordinary(), sharded.drawing_alike(model):
            try:
                self.before_layers(model, adapter_name, autocast_adapter_dtype, undo)
                steps = self.kind_of(config).injection(
                    self, model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, undo
                )
                steps.run(state_dict)
                self.after_layers(model, adapter_name, low_cpu_mem_usage, undo)
                self._join(self.kind_of(config).companion, adapter_name, undo)
            except BaseException:
                take_back(undo)
                raise

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module | None,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        """Put an adapter on one target: a step of `inject_adapter`, under the name by which programs stand in for it.

        Arguments:
            peft_config: the settings; a copy with others may be given.
            adapter_name: the adapter.
            target: the module, or the layer that stands there already.
            target_name, parent: its name and the module around it; None and "" for the model itself.
            current_key: its path in the plan, the parameter's name behind it where that is the target.
            parameter_name: the parameter of `target` that is meant, instead of the module.

        Raises RuntimeError if no injection of that adapter is under way.
        """
        self._injection(adapter_name).target(peft_config, target, target_name, parent, current_key, parameter_name)

    own_step = _create_and_replace  # no program stands in for it where the two are the same

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Put an adapter on the parameters that come next in the plan, as above; returns their names."""
        steps = self._injection(adapter_name)
        for path, parameter in steps.parameters:
            parent, leaf, found = steps.get(path)
            key = f"{path}.{parameter}" if path else parameter
            self._create_and_replace(peft_config, adapter_name, found, leaf, parent, key, parameter_name=parameter)
        return [f"{path}.{parameter}" if path else parameter for path, parameter in steps.parameters]

    def _injection(self, name: str) -> Injection:
        if (found := self.__dict__.get("under_way")) is None or found.name != name:
            raise RuntimeError(
                f"The adapter {name!r} is not being injected. This is a step of `inject_adapter` (and `add_adapter`), "
                "which finds the targets first: call that."
            )
        step: Injection = found
        return step

    def before_layers(self, model: Any, name: str, autocast: bool, undo: list[Callable[[], Any]]) -> None:
        """What an adapter needs before its layers are placed; `undo` receives what takes it back."""

    def after_layers(self, model: Any, name: str, meta: bool, undo: list[Callable[[], Any]]) -> None:
        """What stands beside the layers of an adapter; `undo` receives what takes it back."""

    def _join(self, companion: Any, name: str, undo: list[Callable[[], Any]]) -> None:
        if companion is not None and companion not in self.companions:
            self.companions[companion] = companion(self)
        if companion is not None:
            self.companions[companion].added(name, undo)

    def match(self, model: nn.Module, config: Any, adapter_name: str, state_dict: Any = None) -> Any:
        """The plan of a configuration on this model."""
        return self.kind_of(config).plan_of(model, config, adapter_name, state_dict)

    @classmethod
    def plan_of(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any = None) -> Any:
        """The plan of a configuration of this method."""
        keys = None if state_dict is None else list(state_dict)
        every = (lambda m: True) if cls.is_foreign() or cls.makes_layers() else None
        return match(model, config, keys, cls.prefix, adapter_name, supported=every)

    def kind_of(self, config: Any) -> type[BaseTuner]:
        """The tuner class of a configuration's method: this one's, or another's that is mixed in."""
        kind = type(self) if self.is_foreign() else tuner_class(config.peft_type)
        return type(self) if isinstance(self, kind) else kind

    def _check_new_adapter(self, model: nn.Module, name: str, config: Any) -> None:
        if hasattr(config, "refuse_unsupported"):
            config.refuse_unsupported()
        kind = self.kind_of(config)
        if kind.leads and not isinstance(self, kind):
            raise ValueError(
                f"The adapter {name!r} runs the whole model in its own way ({plain(config.peft_type)}), so it must be "
                "the model's first. Wrap the model with it, then add the others."
            )
        for m in hosts(model):
            if name not in (m.adapters if isinstance(m, BaseTunerLayer) else m._get_available_adapters()):
                continue
            raise ValueError(f"The model has an adapter {name!r} already. Delete it first, or choose another name.")
        bias = getattr(config, "bias", "none")
        own = f"{plain(config.peft_type).lower()}_only"
        if bias not in (*BIASES, own, f"{kind.prefix}only"):
            raise NotImplementedError(
                f"bias={bias!r} is not known.{nearest(str(bias), (*BIASES, own))} Use 'none', 'all' or {own!r}."
            )
        others = [n for n, c in self.peft_config.items() if n != name and getattr(c, "bias", "none") != "none"]
        if bias != "none" and others:
            raise ValueError(
                f"The adapters {others} and {name!r} both train biases of the base model (bias={bias!r}). Only one "
                "adapter of a model can. Use bias='none' for the others."
            )

    # ---- state -------------------------------------------------------------------------------------------------

    def layers(self) -> Iterator[tuple[str, Any]]:
        """(path, layer) of every tuner layer and wrapper."""
        yield from tuner_layers(self.model)
        yield from self.beside.items()
        yield from shared_of(self)

    # ---- merge -------------------------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        quantized: str = "requantize",
        calibration: Calibration | None = None,
    ) -> dict[str, MergeError]:
        """Write adapters into the base weights; `unmerge_adapter` restores every bit.

        Arguments:
            adapter_names: which; None means the active ones.
            safe_merge: kept for compatibility: every merge is checked.
            quantized: what quantised weights become: "requantize" (W' rounded to the same storage, with a warning
                that says how much of the update is lost), "compensated" (rounded to it so that the update's effect
                stays) or "dequantize" (dense weights).
            calibration: for "compensated": batches (mappings of keyword arguments, tuples or single arguments), or a
                function that runs the model; a few show what inputs look like. None: random tokens, if it takes such.

        Returns what the storage of each quantised layer has changed, by its path; see `MergeError`.
        Raises ValueError for an unknown name, for weights that are not finite, and where the output would change; the
        model is then unchanged. Extra memory: one copy of the adapted weights while merged.
        """
        self._check_merge_names(adapter_names)
        layers = self._mergeable(quantized, calibration)
        before = [list(layer.merged_adapters) for layer in layers]
        chosen = self.active_adapters if adapter_names is None else adapter_names
        unloading.untie(layers, chosen, unloading.shared(self.model))
        try:
            with _one_warning_each(), one_scratch():
                for layer in layers:
                    layer.merge(safe_merge, adapter_names)
        except BaseException:
            for layer, names in zip(layers, before, strict=True):
                layer.go_back(names)
            raise
        return rounding.told(layers)

    def _mergeable(self, quantized: str, calibration: Calibration | None) -> list[BaseTunerLayer]:
        """The layers, told how to store what is merged into quantised weights."""
        layers = [layer for _, layer in self.layers() if isinstance(layer, BaseTunerLayer)]
        from .seen import prepare

        prepare(self.model, layers, quantized, calibration)
        return layers

    def _check_merge_names(self, names: list[str] | None) -> None:
        if isinstance(names, str):
            raise TypeError(f"adapter_names must be a list of names, got the string {names!r}. Use [{names!r}].")
        check_once(names or ())
        check_adapters(names or (), self.peft_config, " to merge")
        unloading.check_merge(self.layers(), self.active_adapters if names is None else names)

    def unmerge_adapter(self) -> None:
        """Give back the base weights as they were before the first merge, bit for bit."""
        layers = [layer for _, layer in self.layers()]
        if not any(layer.merged for layer in layers):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with unchanged(self, layers):
            self._unmerge(layers)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        quantized: str = "requantize",
        report: dict[str, MergeError] | None = None,
        calibration: Calibration | None = None,
    ) -> nn.Module:
        """Write adapters into the base weights for good and return the base model, without any trace of adapters.

        Arguments:
            progressbar: show progress.
            safe_merge: kept for compatibility: every merge is checked, and nothing is written before all checks hold.
            adapter_names: which, and no others; None means those at work, merged or active.
            quantized: what quantised weights become, as for `merge_adapter`.
            calibration: what a compensated merge may look at, as for `merge_adapter`.
            report: filled with what the storage of each quantised layer has changed, by its path.
        """
        names = list(self._at_work() if adapter_names is None else adapter_names)
        self._check_merge_names(names if adapter_names is None else adapter_names)
        layers = self._mergeable(quantized, calibration)
        model = unloading.unload(self, progressbar, names)
        found = rounding.told(layers)
        if report is not None:
            report.update(found)
        return model

    def _at_work(self) -> list[str]:
        """The adapters whose updates a forward has: what is merged, and what is active on top."""
        layers = [layer for _, layer in self.layers() if not layer.disable_adapters]
        return list(dict.fromkeys([n for layer in layers for n in layer.merged_adapters] + self.active_adapters))

    def unload(self) -> nn.Module:
        """Return the base model without any trace of adapters, and without merging them."""
        return unloading.unload(self, False, None)

    # ---- python ------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        with nullcontext() if task_ids is None else self.call.of(first_tensor(args, kwargs), task_ids=task_ids):
            return self.completed(self.model(*args, **kwargs))

    def completed(self, output: Any) -> Any:
        """The model's output, with what methods add to it."""
        for companion in self.companions.values():
            output = companion.completed(output)
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "_modules" not in self.__dict__ or "model" not in self._modules:
                raise
            found = (c for c in self.__dict__.get("companions", {}).values() if hasattr(c, name))
            return getattr(next(found, self.model), name)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's configuration as a dictionary; {"model_type": "custom"} if it has none."""
        config = getattr(model, "config", None)
        if config is None:
            return {"model_type": "custom"}
        return config.to_dict() if hasattr(config, "to_dict") else dict(getattr(config, "__dict__", config))


@contextmanager
def _one_warning_each() -> Iterator[None]:
    """The same warning from many layers is shown once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    seen = set()
    for w in caught:
        if (w.category, str(w.message)) not in seen:
            seen.add((w.category, str(w.message)))
            warnings.warn(w.message, w.category, stacklevel=4)


__all__ = ["AdapterHost", "AuxiliaryTrainingWrapper", "BaseTuner"]
