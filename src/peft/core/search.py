"""One walk over a model with one configuration: which modules and parameters its fields select."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import Parameter, is_lazy

from ..errors import listing
from ..types import plain
from . import storage, views
from .defaults import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from .pattern import Selector, compiled
from .plan import Plan, Target
from .tie import aliases, innermost
from .towers import scope
from .unfit import check_parameter, unfit
from .walking import kind_of, model_type, walk

# Mamba's fused kernels read these weights without calling the modules.
_MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_MAMBA_FUSED = frozenset({"out_proj", "conv1d"})
_READ = ".dt_proj"  # of mixers of the first Mamba, in whatever model
_MAMBA_METHODS = frozenset({"LORA", "ADALORA", "XLORA", "RANDLORA"})
_SETTLED = frozenset([Parameter, type(None)])  # classes of parameters that have a shape
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\."), re.compile(r"[^.]*\.(\d+)\.")  # a list inside; else at the root


class Search:
    """One walk over a model with one configuration, and what it has found."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        supported: Callable[[nn.Module], bool] | None = None,
        required: bool = True,
    ) -> None:
        self.model, self.config, self.required = model, config, required
        self.supported = supported or ((lambda m: True) if getattr(config, "any_module", False) else views.supported)
        again: list[tuple[str, nn.Module]] = []
        self.modules = list(walk(model, again))
        self.others = aliases(self.modules, again)  # further paths of modules that stand at several places
        self.model_name = type(model).__name__
        self.names = [path for path, _ in self.modules] + [path for paths in self.others.values() for path in paths]
        self.model_type = model_type(model)
        mamba = self.model_type in _MAMBA and config.peft_type in _MAMBA_METHODS
        self.fused = _MAMBA_FUSED if mamba else None
        self.targets: list[Target] = []
        self.skipped: list[tuple[str, str]] = []
        self.layers_seen: set[int] = set()
        self.excluded: list[str] = []
        self.elsewhere: list[str] = []  # selected by name, but outside layers_to_transform
        self.unused: list[str] = []  # whose forward nobody calls
        self.state_dict_paths: list[str] = []
        self.all_linear, self.default = False, False
        self.selection = self._selection()
        self.selector = Selector(self.selection if self.selection is not None else [], "target_modules")
        self.exclude = Selector(getattr(config, "exclude_modules", None) or [], "exclude_modules")
        saved = getattr(config, "modules_to_save", None) or []
        self.saved = compiled(rf"(?:^|\.)(?:{'|'.join(saved)})(?:\.|$)", "modules_to_save") if saved else None
        self.parameter_selector = Selector(getattr(config, "target_parameters", None) or [], "target_parameters")
        parts = getattr(config, "scope", None)
        self.scope = scope(model, parts) if parts else None
        self.layers = self._layers()
        self.layer_regexes = self._layer_regexes()

    def _selection(self) -> str | set[str] | None:
        """`target_modules` with shorthand and defaults resolved; None if there is no module to look for."""
        wanted = getattr(self.config, "target_modules", None)
        if isinstance(wanted, str) and wanted.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            self.all_linear = True
            return self._linear_layers()
        if wanted is None:
            wanted = self._defaults()
            self.default = wanted is not None
        return wanted if wanted is None or isinstance(wanted, str) else set(wanted)

    def _defaults(self) -> Any:
        from .defaults import targets_by_model_type

        method = plain(self.config.peft_type)
        kind = self.model_type
        wanted = targets_by_model_type(method).get(kind)
        if not wanted and self.required and not getattr(self.config, "target_parameters", None):
            raise ValueError(
                f"target_modules is not set, and there is no default for {type(self.model).__name__} (model type "
                f"{kind!r}). Please specify `target_modules`: module names, a regular expression, or 'all-linear'; "
                f"this model has modules called {_leaves(self.modules)}."
            )
        return wanted or None

    def _linear_layers(self) -> set[str]:
        head = self._head()
        found = set()
        for path, module in self.modules:
            kind = kind_of(type(module))
            base = type(innermost(module)) if kind in ("tuner", "aux") else type(module)
            if kind_of(base) != "linear":
                if why := views.not_linear(base):
                    self.skipped.append((path, f"{base.__name__} {why}"))
                continue
            if module is head:
                self.skipped.append((path, "output head"))
            else:
                found.add(path)
        return found

    def _head(self) -> nn.Module | None:
        """The module that "all-linear" leaves alone: the output embedding, else the classifier."""
        model: Any = self.model
        if not hasattr(model, "get_output_embeddings"):
            return None
        try:
            head = model.get_output_embeddings()
        except (NotImplementedError, AttributeError):
            head = None
        if head is None and getattr(self.config, "task_type", None) == "SEQ_CLS":
            head = next((getattr(self.model, n) for n in SEQ_CLS_HEAD_NAMES if hasattr(self.model, n)), None)
        return head

    def _layers(self) -> set[int] | None:
        layers = getattr(self.config, "layers_to_transform", None)
        if layers is None or layers == []:
            return None
        if isinstance(self.selection, str):
            raise ValueError(
                f"layers_to_transform={layers!r} cannot restrict the regular expression target_modules="
                f"{self.selection!r}. Write the layers into the expression, or pass a list of module names."
            )
        return {layers} if isinstance(layers, int) else set(layers)

    def _layer_regexes(self) -> list[re.Pattern[str]]:
        pattern = getattr(self.config, "layers_pattern", None)
        if not pattern:
            return list(_LAYER_INDEX)
        patterns = [pattern] if isinstance(pattern, str) else pattern
        return [compiled(rf"(?:.*?\.)??(?:{p})\.(\d+)\.", "layers_pattern") for p in patterns]

    def layer(self, path: str) -> int | None:
        found = next((m for m in (regex.match(path) for regex in self.layer_regexes) if m), None)
        return int(found.group(found.lastindex or 1)) if found else None

    def by_name(self) -> None:
        """Fill `targets` with the modules that the names select."""
        reasons: dict[str, str] = {}
        for path, module, entry in self.named():
            if (reason := reasons.get(entry)) is None:
                reason = reasons[entry] = self._reason(entry)
            self._add(path, module, reason)

    def named(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Path, module and entry of all modules that the names select, after exclusions."""
        chosen = self.exclude.entries or self.saved is not None or self.layers is not None or self.scope is not None
        if not (self.others or chosen):
            find = self.selector.find
            for path, module in self.modules:
                entry = find(path) if path else self._root(module, find(path))
                if entry is not None:
                    yield path, module, entry
            return
        for path, module in self.modules:
            names = (path, *self.others[path]) if path in self.others else (path,)
            entry = next((e for e in [self.selector.find(n) for n in names] if e is not None), None)
            hidden = bool(self.exclude.entries) and any(self.exclude.find(n) is not None for n in names)
            hidden = hidden or (self.scope is not None and not any(map(self.scope, names)))
            if not path:
                entry = self._root(module, entry)
            if entry is None:
                continue
            if hidden or (self.saved is not None and any(self.saved.search(n) for n in names)):
                self.excluded.append(path)
            elif any(self._in_layers(n, entry) for n in names):
                yield path, module, entry
            else:
                self.elsewhere.append(path)

    def _root(self, module: nn.Module, entry: str | None) -> str | None:
        """For a model that is one layer: the entry that selects it, also by the name of its class."""
        base = innermost(module) if kind_of(type(module)) == "tuner" else module
        if not self._can_adapt(base):
            return None
        name = type(base).__name__.lower()
        entry = next((e for e in self.selector.entries if e.lower() == name), None) if entry is None else entry
        if entry is not None:
            self.selector.used.add(entry)
        return entry

    def _in_layers(self, path: str, entry: str) -> bool:
        if self.layers is None or (entry == path and not self.all_linear):
            return True
        index = self.layer(path)
        if index is not None:
            self.layers_seen.add(index)
        return index in self.layers

    def _reason(self, entry: str) -> str:
        if self.all_linear:
            return INCLUDE_LINEAR_LAYERS_SHORTHAND
        if self.default:
            return f"default of {self.model_type}: {entry!r}"
        return f"regex {entry!r}" if isinstance(self.selection, str) else repr(entry)

    def _can_adapt(self, base: nn.Module) -> bool:
        custom = getattr(self.config, "_custom_modules", None) or {}
        return any(isinstance(base, cls) for cls in custom) or self.supported(base)

    def _add(self, path: str, module: nn.Module, reason: str) -> None:
        last = self.targets[-1] if self.targets else None
        if last is not None and last.module._modules and (path.startswith(last.path + ".") or not last.path):
            self.skipped.append((path, f"part of the target {last.path!r}"))
            return
        problem = self._problem(path, module)
        if problem is None and path.endswith(_READ) and self._is_read(path):
            problem = "the mixer around it reads its weight without calling it" if self.all_linear else None
            self.unused.append(path)
        if problem is None:
            self.targets.append(Target(path, module, None, reason))
        elif self.all_linear:
            self.skipped.append((path, problem))
        else:
            raise ValueError(f"target_modules ({reason}) selects '{path}', but {problem}.")

    def _is_read(self, path: str) -> bool:
        """Whether this is a part of a Mamba mixer that reads the weight itself, in kernels and without them."""
        mixer = self.model.get_submodule(path.rpartition(".")[0])
        return hasattr(mixer, "A_log") and hasattr(mixer, "x_proj")

    def _problem(self, path: str, module: nn.Module) -> str | None:
        """Why this module cannot be adapted, or None."""
        kind = kind_of(type(module))
        held = module._parameters.values()
        if not _SETTLED.issuperset(map(type, held)) and any(map(is_lazy, held)):  # type: ignore[arg-type]
            raise ValueError(
                f"target_modules selects '{path}', a {type(module).__name__} whose weight has no shape yet. Run the "
                "model once on a batch before adapting it."
            )
        weight = module._parameters.get("weight")
        usual = self.supported is views.supported
        if weight is not None and usual and (0 in weight.shape or weight.dtype.is_complex):
            why = unfit(module, weight)
            if why:
                return why
        if kind == "linear" and self.fused is None and usual:
            return None
        if kind == "aux":
            return "another adapter trains a copy of this module; adapt it or save it, not both"
        layer: Any = module
        if kind == "tuner" and layer.parameter_name is not None and not layer.view.parts(innermost(module)):
            return (
                f"another adapter adapts its parameter {module.parameter_name!r}; a module is adapted as a whole or by "
                "parameters"
            )
        base = innermost(module) if kind == "tuner" else module
        if why := views.not_linear(type(base)):
            return f"{type(base).__name__} {why}; adapt the weight itself, with target_parameters=['{path}.weight']"
        if not self._can_adapt(base):
            return (
                f"{type(base).__name__} is not supported; supported layer types are {views.SUPPORTED}. "
                f"{self._way(path, base)}, or use exclude_modules"
            )
        if self.fused is not None and path.rpartition(".")[2] in self.fused:
            return (
                f"the kernels of model type {self.model_type!r} read its weight without calling it, so an "
                "adapter would have no effect; leave out 'out_proj' and 'conv1d'"
            )
        return None

    def _way(self, path: str, base: nn.Module) -> str:
        """What to do about a module that is no layer of a known kind."""
        held = [name for name, dims in storage.parameters(base) if dims in (2, 3)]
        if base._modules or not held or not hasattr(self.config, "target_parameters"):
            return "Target the layers inside it"
        return f"Adapt its weights one by one, with target_parameters=['{path}.{held[0]}']"

    def parameters(self, among: Container[str] | None = None) -> None:
        """Add the parameters that `target_parameters` selects, of the modules `among` these if they are given."""
        if not self.parameter_selector.entries:
            return
        modules = {t.path for t in self.targets}
        found: list[Target] = []
        for path, module in self.modules:
            kind = kind_of(type(module))
            if kind == "aux" or (among is not None and path not in among):
                continue
            base = innermost(module) if kind == "tuner" else module
            for name, dims in storage.parameters(base):
                entry = self.parameter_selector.find(f"{path}.{name}" if path else name)
                if entry is None or (among is None and self.scope is not None and not self.scope(path)):
                    continue
                check_parameter(path, name, dims, base, path in modules)
                found.append(Target(path, module, name, f"parameter {entry!r}"))
        self.targets = in_order(self.modules, self.targets, found)

    def by_state_dict(self, keys: Iterable[str], prefix: str) -> None:
        """Fill `targets` with exactly the modules that have keys; which parameters of them the configuration says."""
        present = set(self.names)
        layers: dict[str, set[int]] = {}  # how many layers files count above those that have keys
        for key in keys:
            if (path := _module_of(key, prefix, self.model, present)) is not None:
                layers.setdefault(path, set()).add(key.count(".base_layer") - path.count(".base_layer"))
        self.parameters(among=layers)
        stated, self.targets = self.targets, []
        held = Counter(t.path for t in stated)
        for path, module in self.modules:
            others = self.others.get(path, ())
            if path not in held and (path in layers or any(other in layers for other in others)):
                self._add(path, module, "state_dict")
        for path, count in held.items():
            if layers[path] != set(range(count)):
                raise ValueError(
                    f"target_parameters={self.parameter_selector.entries} selects {count} parameters of {path!r}, but "
                    f"the state_dict has tensors for {len(layers[path])} of it. Use the target_parameters that the "
                    "adapter was made with."
                )
        self.targets = in_order(self.modules, self.targets, stated)
        self.state_dict_paths = sorted(p for p in layers if p not in present)

    def by_configuration(self) -> set[str]:
        """The paths that the configuration selects, whether or not they can be adapted."""
        return {path for path, _, _ in self.named()}

    def plan(self) -> Plan:
        """The plan of what has been found so far."""
        saved = getattr(self.config, "modules_to_save", None)
        return Plan(
            self.config,
            self.targets,
            self.skipped,
            names=self.names,
            selection=self.selection,
            modules_to_save=list(saved) if saved is not None else None,
        )

    def parameter_names(self) -> list[str]:
        """The names of all parameters that could be adapted."""
        return [f"{path}.{name}" for path, m in self.modules for name, _ in storage.parameters(innermost(m)) if path]


def in_order(modules: list[tuple[str, nn.Module]], one: list[Target], two: list[Target]) -> list[Target]:
    """Both lists in the order of the model."""
    if not one or not two:
        return one or two
    place = {path: i for i, (path, _) in enumerate(modules)}
    return sorted([*one, *two], key=lambda target: place[target.path])


def _module_of(key: str, prefix: str, model: nn.Module, names: Container[str]) -> str | None:
    """The path of the module that a key of an adapter's state dict belongs to, None for other keys.

    `names` are those of the model, which may call modules of its own as an adapted layer calls the one inside it.
    """
    key = key.removeprefix("_orig_mod.")
    if "base_model" not in model._modules:
        key = key.removeprefix("base_model.model.")
    end = f".{key}".rfind(f".{prefix}")
    if end < 0:
        return None
    path = key[: max(end - 1, 0)]
    if "base_layer" not in path or path in names:
        return path
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _leaves(modules: list[tuple[str, nn.Module]]) -> str:
    return listing(dict.fromkeys(path.rpartition(".")[2] for path, m in modules if path and not m._modules))
