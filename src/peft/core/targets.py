"""Which modules and parameters of a model a configuration means.

`match` builds a `Plan`: it walks the model once, raises all that is wrong, reports what selects nothing, and
changes neither the model nor the configuration.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..types import plain
from .base_state import model_below
from .defaults import DUMMY_TARGET_MODULES, TASK_HEADS
from .pattern import pattern_value, settings
from .plan import Plan, Target
from .search import Search, in_order
from .strict import compare, complain, no_match
from .tie import input_embedding, tied_modules
from .walking import walk

__all__ = [
    "Plan",
    "Target",
    "check_target_module_exists",
    "inspect_matched_modules",
    "match",
    "pattern_value",
    "plan",
    "settings",
    "walk",
]


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a configuration selects a module of this name, whatever the rest of the model."""
    module = nn.Module()
    for name in reversed(key.split(".")):
        around = nn.Module()
        around._modules[name] = module
        module = around
    if getattr(config, "scope", None):  # which is told by whole models
        config = copy.copy(config)
        config.scope = None
    search = Search(module, config, lambda m: True, required=False)
    return any(path == key for path, _, _ in search.named())


def match(
    model: nn.Module,
    config: Any,
    state_dict_keys: Iterable[str] | None = None,
    prefix: str = "lora_",
    adapter_name: str = "default",
    *,
    supported: Callable[[nn.Module], bool] | None = None,
    strict: bool | None = None,
) -> Plan:
    """The plan of an adapter: what the configuration selects in the model.

    Arguments:
        model: the user's model, possibly with adapters.
        config: the configuration of the method.
        state_dict_keys: if given, the targets are exactly the modules with keys here; `config` is compared.
        prefix: how the names of the method's tensors begin; needed to read `state_dict_keys`.
        adapter_name: named in messages.
        supported: whether a module can be adapted; None asks `core.views`.
        strict: whether entries that select nothing raise; None follows `peft.set_strict`.

    Raises NoMatchingPeftModuleError if nothing is selected, ValueError for what cannot be adapted.
    Warns with UnmatchedTargetWarning, once per field, of entries that select nothing.
    """
    if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
        return Plan(config)
    search = Search(model, config, supported, required=state_dict_keys is None)
    if state_dict_keys is None:
        search.by_name()
        search.parameters()
    else:
        search.by_state_dict(state_dict_keys, prefix)
    if not search.targets:
        raise no_match(search)
    plan = search.plan()
    _tie(plan, model, search.modules)
    if state_dict_keys is None:
        complain(plan, search, adapter_name, strict)
    else:
        compare(plan, search, search.by_configuration(), strict)
    return plan


def plan(model: nn.Module, config: Any, strict: bool | None = None) -> Plan:
    """What an adapter would change in a model, as a table: `print(peft.plan(model, config))`.

    Arguments:
        model: the model, also on the meta device; also a model that has adapters already. It stays as it is.
        config: the configuration of a method that adapts modules.
        strict: whether entries that select nothing raise; None follows `peft.set_strict`.

    Raises what `match` raises, and ValueError for methods that adapt no modules.
    """
    from .describe import describe
    from .experts import rewrite
    from .replicate import replicate

    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
        raise ValueError(
            f"{type(config).__name__} adapts no modules of the model, so there is nothing to plan. Pass the "
            "configuration of a method with target_modules, such as LoraConfig."
        )
    model = model_below(model)
    undo = replicate(model, getattr(config, "layer_replication", None) or [])
    config = copy.copy(config)
    heads = TASK_HEADS.get(plain(config.task_type), ())
    if heads and hasattr(config, "modules_to_save"):
        given = list(config.modules_to_save or ())
        config.modules_to_save = given + [name for name in heads if name not in given]
    try:
        rewrite(config, model)
        return describe(match(model, config, strict=strict), model, _method_of(config))
    finally:
        undo()


def _method_of(config: Any) -> Callable[[Any], Any]:
    """What makes a target's method from its settings; a tuner states it without looking at a model."""
    from ..registry import tuner_class

    return tuner_class(config.peft_type).method_of


def _tie(plan: Plan, model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    """Find the tied modules; with `ensure_weight_tying`, the embedding's adapter speaks for all of them."""
    embedding = input_embedding(model, modules)
    if embedding is None:
        return
    plan.embedding, plan.tied = embedding[0], tied_modules(embedding, modules)
    if not plan.tied or not getattr(plan.config, "ensure_weight_tying", False):
        return
    group = {plan.embedding, *plan.tied}
    leads = {plan.embedding} if getattr(plan.config, "embedding_leads", False) else group
    if any(t.path in leads for t in plan.targets if t.parameter is None):
        _tie_targets(plan, embedding, modules)
    saved = plan.modules_to_save or []
    if any(path.endswith(entry) for entry in saved for path in group if entry):
        kept = [e for e in saved if not any(path.endswith(e) for path in plan.tied)]
        added = [] if plan.embedding in kept else [plan.embedding]
        plan.modules_to_save, plan.modules_to_tie = kept + added, list(plan.tied)


def _tie_targets(plan: Plan, embedding: tuple[str, nn.Module], modules: list[tuple[str, nn.Module]]) -> None:
    path = embedding[0]
    chosen = {t.path for t in plan.targets if t.parameter is None}
    kept = [t for t in plan.targets if t.path not in plan.tied]
    if not any(t.path == path for t in kept):
        kept = in_order(modules, kept, [Target(*embedding, None, "ensure_weight_tying")])
    plan.targets, plan.target_modules_to_tie = kept, list(plan.tied)
    if path in chosen and not chosen & set(plan.tied):
        return  # the selection says so already
    if isinstance(plan.selection, str):
        plan.selection = rf"(?:{plan.selection}|^{re.escape(path)}$)"
    elif plan.selection is not None:
        tied = {name for p in plan.tied for name in (p, p.rpartition(".")[2])}
        plan.selection = {entry for entry in plan.selection if entry not in tied} | {path}


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Names of the modules that an adapter's configuration selects ("matched"), and others ("unmatched").

    Arguments:
        tuner: a tuner, such as `peft_model.base_model`.
        adapter_name: whose configuration is asked.
    """
    search = Search(tuner.model, tuner.peft_config[adapter_name])
    selected = search.by_configuration()
    result: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path, _ in tuner.model.named_modules():
        result["matched" if path in selected else "unmatched"].append(path)
    return result
