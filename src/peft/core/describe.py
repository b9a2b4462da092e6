"""The rows of a plan's table: shape, rank and trainable parameters of all that an adapter will add."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import views
from .method import Site
from .pattern import settings
from .plan import Plan, Row, Target
from .shared import late
from .tie import innermost
from .towers import within

if TYPE_CHECKING:
    from .method import Method

Made = list[dict[str, Any]]


def describe(plan: Plan, model: nn.Module, method_of: Callable[[Any], Method]) -> Plan:
    """Fill `rows` and `base_parameters` of a plan, and return it.

    Arguments:
        plan: from `match`.
        model: the model that was matched, on any device; its weights are not read.
        method_of: the method of one target from its settings; it builds the tensors on the meta device.
    """
    made, before = dict[Any, Made](), dict[Any, int]()
    rows = [_row(target, plan, method_of, made, before) for target in plan.targets]
    rows += _shared(plan, method_of)
    rows += _tied(plan, model, method_of, rows)
    rows += _copies(plan, model)
    rows += _tokens(plan, model)
    rows += _biases(plan, model)
    plan.rows = rows
    plan.notes = [*_left(plan), *within(model, (t.path for t in plan.targets))]
    plan.base_parameters = sum(p.numel() for p in model.parameters())
    return plan


def _row(
    target: Target, plan: Plan, method_of: Callable[[Any], Method], made: dict[Any, Made], before: dict[Any, int]
) -> Row:
    base = innermost(target.module)
    chosen = settings(plan.config, target.name)
    shape = _shape(base, target.parameter)
    bias = getattr(base, "bias", None) is not None
    key = (type(base), shape, bias, id(chosen), getattr(base, "groups", 1), target.parameter)
    if key not in made:
        made[key] = _made(method_of(chosen), base, chosen, target)
    count = _count(method_of(chosen), made[key], target, plan.target_modules, before)
    name = target.name or "(the model)"
    rank = getattr(chosen, getattr(chosen, "rank_name", "r"), None)
    alpha = getattr(chosen, getattr(chosen, "alpha_name", ""), None)
    scaling = None if alpha is None else chosen.scaling_for(alpha, rank)
    return Row(name, type(base).__name__, shape, rank, count, target.reason, alpha, scaling)


def _left(plan: Plan) -> Iterator[str]:
    """What to say of ranks that were raised while alpha is still the default of another rank."""
    config = plan.config
    name = getattr(config, "alpha_name", None)
    if name is None:
        return
    usual: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(config)}
    alpha, rank = usual[name], usual[config.rank_name]
    raised = [r for r in plan.rows if r.alpha == alpha and r.rank is not None and r.rank > rank]
    raised = [r for r in raised if config.alpha_for(r.rank) != config.alpha_for(rank)]
    if raised:
        least = min(raised, key=lambda row: row.scaling or 0.0)
        yield (
            f"{name} is {alpha}, the default for {config.rank_name}={rank}, where {len(raised)} of {len(plan.targets)} "
            f"targets have a higher rank: with {least.rank} the update is scaled by {least.scaling:.4g}, not "
            f"{config.scaling_for(alpha, rank):.4g}. {name}='auto' lets it follow the rank; for {least.rank} it is "
            f"{config.alpha_for(least.rank)}."
        )


def _made(method: Method, base: nn.Module, chosen: Any, target: Target) -> Made:
    """What the method builds on this target, and on what a target module consists of."""
    places = _places(base, target, bool(getattr(chosen, "any_module", False)))
    sites = [Site(m, v, chosen, target.path, torch.float32, torch.device("meta")) for m, v in places]
    return [method.build(site) for site in sites]


def _count(method: Method, made: Made, target: Target, names: Any, before: dict[Any, int], tied: bool = False) -> int:
    """Numbers in all that is trained of this, but for what an earlier target has already.

    Arguments:
        method, made, target: see `_made`.
        names: the targets' names, as the configuration will hold them.
        before: where methods note what came before.
        tied: whether the tensors will be those of an embedding, transposed.
    """
    of = getattr(method, "of", method)
    untrained = getattr(of, "untrained", lambda built, tied: ())
    repeated = getattr(of, "repeated", lambda built, path, names, before: ())
    left_out = [{*untrained(m, tied), *repeated(m, target.path, names, before)} for m in made]
    return sum(_numel(v) for m, out in zip(made, left_out, strict=True) for name, v in m.items() if name not in out)


def _places(base: nn.Module, target: Target, any_module: bool) -> list[tuple[nn.Module, Any]]:
    """The modules and views that get adapters of their own."""
    view, whole = views.view_of(base, target.parameter, any_module), target.parameter is None
    parts = view.parts(base) if whole else ()
    places: list[tuple[nn.Module, Any]] = [(base, views.view_of(base, part)) for part in parts] or [(base, view)]
    for name in view.read_children if whole else ():
        child = innermost(base.get_submodule(name))
        places.append((child, views.view_of(child)))
    return places


def _shared(plan: Plan, method_of: Callable[[Any], Method]) -> Iterator[Row]:
    """One row for each tensor that is trained once for all targets."""
    config = copy.copy(plan.config)  # on which methods note what they share
    any_module = bool(getattr(config, "any_module", False))
    places = (p for t in plan.targets for p in _places(innermost(t.module), t, any_module))
    with late(), torch.device("meta"):
        made = method_of(config).shared(config, (view.shape(base) for base, view in places))
    for name, new in made.items():
        if isinstance(new.tensor, nn.Parameter):
            yield Row(name, "", tuple(new.tensor.shape), None, new.tensor.numel(), "shared by all targets")


def _numel(value: Any) -> int:
    if isinstance(value, nn.Module):
        return sum(p.numel() for p in value.parameters())
    return value.numel() if isinstance(value, nn.Parameter) else 0


def _shape(base: nn.Module, parameter: str | None) -> tuple[int, ...]:
    weight = getattr(base, parameter or "weight", None)
    if weight is None:
        weight = getattr(base, "in_proj_weight", None)
    return tuple(getattr(weight, "shape", ()))


def _tied(plan: Plan, model: nn.Module, method_of: Callable[[Any], Method], rows: list[Row]) -> Iterator[Row]:
    """One row for each layer that takes the embedding's tensors: the very same, or transposed ones of its rank."""
    if not plan.target_modules_to_tie:
        return
    lead = next(row for row in rows if row.path == plan.embedding)
    chosen = settings(plan.config, lead.path)
    for path in plan.target_modules_to_tie:
        target = Target(path, model.get_submodule(path), None, f"tied to {lead.path!r}")
        own, count = _row(target, plan, method_of, {}, {}), 0
        if own.kind != lead.kind:
            made = _made(method_of(chosen), innermost(target.module), chosen, target)
            count = _count(method_of(chosen), made, target, plan.target_modules, {}, tied=True)
        alpha = own.alpha if own.rank == lead.rank else None
        yield dataclasses.replace(own, rank=lead.rank, alpha=alpha, trainable=count)


def _copies(plan: Plan, model: nn.Module) -> Iterator[Row]:
    """One row for each module of which a copy will be trained."""
    entries = tuple(entry for entry in plan.modules_to_save or [] if entry)
    for path in plan.names:
        if entries and path.endswith(entries):
            module = innermost(model.get_submodule(path))
            count = sum(p.numel() for p in module.parameters())
            yield Row(path, type(module).__name__, _shape(module, None), None, count, "modules_to_save")


def _tokens(plan: Plan, model: nn.Module) -> Iterator[Row]:
    """One row for each embedding of which single rows will be trained."""
    wanted = getattr(plan.config, "trainable_token_indices", None)
    if not wanted:
        return
    if not isinstance(wanted, dict):
        wanted = {plan.embedding or "embed_tokens": wanted}
    for name, indices in wanted.items():
        for path in plan.names:
            if path == name or path.endswith("." + name):
                module = innermost(model.get_submodule(path))
                shape = _shape(module, None)
                count = len(indices) * shape[-1]
                yield Row(path, type(module).__name__, shape, None, count, "trainable_token_indices")


def _biases(plan: Plan, model: nn.Module) -> Iterator[Row]:
    """One row for the biases of the base model that will be trained."""
    rule = getattr(plan.config, "bias", "none")
    if rule == "all":
        copied = tuple(entry for entry in plan.modules_to_save or [] if entry)  # of which the copy's is trained
        named = [(*name.rpartition("."), p) for name, p in model.named_parameters()]
        biases = [p for path, _, leaf, p in named if leaf == "bias" and not (copied and path.endswith(copied))]
    elif isinstance(rule, str) and rule.endswith("_only"):
        biases = [b for t in plan.targets if (b := getattr(innermost(t.module), "bias", None)) is not None]
    else:
        return
    if biases:
        yield Row(f"{len(biases)} biases", "", (), None, sum(b.numel() for b in biases), "bias")
