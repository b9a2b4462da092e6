"""The configuration of a plain LoRA whose factors are given layer by layer."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core.pattern import special
from ..core.targets import match
from ..core.unload import tied_to_embedding
from ..core.views import view_of
from ..methods.lora.config import LoraConfig
from .update import Update

COPIED = (
    *("task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "target_parameters"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "layer_replication", "trainable_token_indices"),
    *("ensure_weight_tying", "fan_in_fan_out", "lora_dropout"),
)


def target_of(update: Update) -> str:
    """The name by which a configuration selects an adapter's layer."""
    p = update.p
    path = p.path if p.path.endswith(".base_layer") else p.path.split(".base_layer")[0]  # a part of a target; or a name
    parameter, base = p.layer.parameter_name, p.layer.get_base_layer()
    if parameter and parameter in view_of(base).parts(base) if _whole(base) else False:
        return path.removesuffix(f".{parameter}")
    return path


def _whole(base: Any) -> bool:
    try:
        return bool(view_of(base).parts(base))
    except ValueError:  # a module of which only parameters can be adapted
        return False


def plain_config(configs: list[Any], ranks: dict[str, int], usual: int | None = None, **changes: Any) -> LoraConfig:
    """A configuration whose layers have these ranks and the scaling 1.

    Arguments:
        configs: of the sources: the first says what is the same for all, all say what is selected.
        ranks: {full name of a target: rank}.
        usual: `r`; None: the most frequent rank.
        changes: further fields.
    """
    first = configs[0]
    values = {name: getattr(first, name) for name in COPIED if getattr(first, name, None) is not None}
    values["target_modules"] = union([c.target_modules for c in configs])
    for name in ("target_parameters", "modules_to_save"):
        found = [e for c in configs for e in getattr(c, name, None) or ()]
        values[name] = list(dict.fromkeys(found)) or None
    usual = usual or Counter(ranks.values()).most_common(1)[0][0]
    named = {pattern(path, ranks): r for path, r in special(ranks, usual).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sources' configurations have said it
        return LoraConfig(
            **{
                **values,
                **dict(r=usual, lora_alpha=usual, rank_pattern=named, alpha_pattern=dict(named)),
                **changes,
            }
        )


def parts(layers: dict[str, list[Update]]) -> set[str]:
    """The layers that are parts of a target, as those of an attention module are: patterns do not tell them apart."""
    return {path for path, found in layers.items() if target_of(found[0]) != found[0].p.path}


def even(layers: dict[str, list[Update]], results: dict[str, Any]) -> dict[str, Any]:
    """The results with one rank for all parts of targets."""
    some = parts(layers)
    r = max((results[path].pair.rank for path in some), default=0)
    return {k: v._replace(pair=v.pair.padded(r)) if k in some else v for k, v in results.items()}


def biases(layers: dict[str, list[Update]], results: dict[str, Any]) -> dict[str, Any]:
    """`lora_bias` where some update has a bias, and `module_config` for the layers that cannot hold one."""
    if all(r.bias is None for r in results.values()):
        return {}
    views = {found[0].p.path: found[0].p.layer.view for found in layers.values()}
    without = [path for path, view in views.items() if not view.bias_name]
    changes = {pattern(path, views): {"lora_bias": False} for path in without}
    return {"lora_bias": True, "module_config": changes or None}


def pattern(path: str, paths: Iterable[str]) -> str:
    """A key of `rank_pattern` that selects one target only: its name, anchored where another one's ends with it."""
    ends = any(other != path and other.endswith("." + path) for other in paths)
    return "^" + re.escape(path) if ends else path


def union(targets: list[Any]) -> Any:
    """What several `target_modules` select: the union of lists, or an expression for several expressions.

    Lists beside an expression give None: the names of the layers have to be listed.
    """
    given = [t for t in targets if t is not None]
    if not given:
        return None
    if all(isinstance(t, str) for t in given):
        different = list(dict.fromkeys(given))
        return different[0] if len(different) == 1 else "|".join(f"({t})" for t in different)
    if any(isinstance(t, str) for t in given):
        return None
    return set().union(*given)


def checked_targets(model: nn.Module, config: Any, updates: Iterable[Update]) -> Any:
    """The configuration, with the layers listed by name if what it selects is not what the updates stand at.

    It ties layers to the embedding only where one update is theirs.
    """
    updates = list(updates)
    if getattr(config, "ensure_weight_tying", False) and not _tied_alike(model, updates):
        config = dataclasses.replace(config, ensure_weight_tying=False)
    wanted: dict[str, bool] = {target_of(u): _is_parameter(u) for u in updates}
    modules, parameters = ({n for n, flag in wanted.items() if flag is kind} for kind in (False, True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = match(model, config)
        if {*plan.module_names} == modules and {*plan.parameter_names} == parameters:
            return config
    except ValueError:  # no such target: names are listed instead
        pass
    return dataclasses.replace(
        config,
        target_modules=modules or None,
        target_parameters=sorted(parameters) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _tied_alike(model: nn.Module, updates: list[Update]) -> bool:
    """Whether layers that share the embedding's weight have updates from the same tied adapters, scaled alike."""
    group = tied_to_embedding(model)
    found: dict[str, set[Any]] = {path: set() for path in group}
    for u in updates:
        if (path := target_of(u)) in found:
            tied = bool(getattr(u.p.settings, "ensure_weight_tying", False))
            found[path].add((u.p.name, tied, u.p.__dict__.get("scaling")))
    first = next(iter(found.values()), set())
    return all(given == first for given in found.values()) and all(tied for _, tied, _ in first)


def _is_parameter(update: Update) -> bool:
    layer = update.p.layer
    return bool(layer.parameter_name) and not _whole(layer.get_base_layer())
