"""What a selection missed, said with the nearest thing that exists."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable

from ..errors import NoMatchingPeftModuleError, UnmatchedTargetWarning, listing, nearest, report
from . import experts, views
from .defaults import INCLUDE_LINEAR_LAYERS_SHORTHAND
from .pattern import Selector, holding, part_of, suffixes, table, tables
from .plan import Plan, Target
from .search import Search
from .tie import innermost

# Task classes add these to modules_to_save whether the model has them or not.
_TASK_HEADS = frozenset({"classifier", "score", "qa_outputs"})
_SPECIAL = re.compile(r"[\\^$*+?()\[\]{}|]")
_MOST_CHOICES = 2000
_MOST_LISTED = 20


def hint(entry: str, names: Iterable[str], pattern: bool = False) -> str:
    """ "" or the nearest existing name for an entry that selects nothing.

    Arguments:
        entry: what the user wrote.
        names: the paths it could have selected.
        pattern: whether the entry is a regular expression.
    """
    names = list(names)
    if pattern and not _SPECIAL.search(entry):
        if any(name.endswith("." + entry) for name in names):
            return f" A string must match the whole name; for a name's ending pass the list [{entry!r}]."
    elif not pattern and _SPECIAL.search(entry):
        return " Entries of a list are names, not regular expressions; pass the expression as a string."
    depth = entry.count(".")
    if depth == 0:
        choices = dict.fromkeys(name.rpartition(".")[2] for name in names)
    else:
        choices = dict.fromkeys(s for name in names for s in suffixes(name) if s.count(".") == depth)
    return nearest(entry, [c for c in choices if c][:_MOST_CHOICES])


def no_match(search: Search) -> NoMatchingPeftModuleError:
    """The error for a configuration that selects nothing, with the reason and the way out."""
    config, wanted = search.config, search.selector.entries
    if search.state_dict_paths or (not wanted and not search.parameter_selector.entries and not search.all_linear):
        if search.state_dict_paths:
            absent = listing(search.state_dict_paths)
            text = f"None of the state_dict's modules is in {search.model_name}: {absent}."
        else:
            text = "No `target_modules` and no `target_parameters` are given, so there is nothing to adapt."
        return NoMatchingPeftModuleError(f"{text} The model has modules called {_leaf_names(search.names)}.")
    if search.excluded and not search.elsewhere:
        parts = f", or lie outside scope={config.scope!r}" if search.scope is not None else ""
        return NoMatchingPeftModuleError(
            f"All {len(search.excluded)} modules that target_modules selects in {search.model_name} are "
            f"excluded by exclude_modules={getattr(config, 'exclude_modules', None)!r} and modules_to_save="
            f"{getattr(config, 'modules_to_save', None)!r}{parts}: {listing(search.excluded)}. Exclude fewer."
        )
    if search.elsewhere:
        return NoMatchingPeftModuleError(_no_layer(search))
    if search.all_linear:
        left = f" Left out: {listing(f'{p} ({why})' for p, why in search.skipped)}." if search.skipped else ""
        return NoMatchingPeftModuleError(
            f"target_modules='all-linear' found no linear layer to adapt in {search.model_name}.{left} "
            f"Name the modules: it has {_leaf_names(search.names)}."
        )
    stacked = experts.left_out(search)
    missing = _missing(search.selector, lambda: search.names) + _missing(
        search.parameter_selector, search.parameter_names
    )
    return NoMatchingPeftModuleError(
        f"Target modules {', '.join(missing)} not found in the base model ({search.model_name}). Please "
        f"check the target modules and try again; the model has modules called {_leaf_names(search.names)}."
        + (f" Its experts are stacked parameters: {listing(stacked)}. {experts.advice(stacked)}" if stacked else "")
    )


def _no_layer(search: Search) -> str:
    pattern = getattr(search.config, "layers_pattern", None)
    seen = _ranges(search.layers_seen)
    return (
        f"target_modules selects {len(search.elsewhere)} modules of {search.model_name}, but none in "
        f"layers_to_transform={sorted(search.layers or [])} with layers_pattern={pattern!r}: "
        + (
            f"they lie in layers {seen}."
            if seen
            else f"no layer index was found in names such as {search.elsewhere[0]!r}."
        )
        + " Correct the layers, or name the list of layers in layers_pattern."
    )


def _ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers as "0-3, 7"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)


def _leaf_names(names: Iterable[str]) -> str:
    names = list(names)
    called = dict.fromkeys(leaf for name in names if (leaf := name.rpartition(".")[2]) and not leaf.isdigit())
    return listing(called or [n for n in names if n])


def _missing(selector: Selector, names: Callable[[], list[str]]) -> list[str]:
    unused = selector.unused()[:_MOST_LISTED]
    if len(unused) == 1 and re.sub("[ _]", "-", unused[0].lower()) == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return [f"{unused[0]!r} (Did you mean {INCLUDE_LINEAR_LAYERS_SHORTHAND!r}?)"]
    return [_shown(e, names(), selector.regex is not None) for e in unused]


def _shown(entry: str, names: Iterable[str], pattern: bool) -> str:
    found = hint(entry, names, pattern).strip()
    return f"{entry!r} ({found})" if found else repr(entry)


def complain(plan: Plan, search: Search, adapter_name: str, strict: bool | None) -> None:
    """Report every entry of the configuration that selects nothing, once per field; then doubtful ties."""
    for field, missing in _unmatched(plan, search).items():
        shown = [_shown(*entry) for entry in missing[:_MOST_LISTED]]
        more = f" and {len(missing) - _MOST_LISTED} more" if len(missing) > _MOST_LISTED else ""
        report(
            UnmatchedTargetWarning,
            f"Entries of {field} that select nothing in {search.model_name} for the adapter {adapter_name!r}: "
            f"{', '.join(shown)}{more}. Correct or remove them.",
            strict, stacklevel=5,
        )  # fmt: skip
    if search.layers is not None and (empty := search.layers - search.layers_seen) and search.layers_seen:
        report(
            UnmatchedTargetWarning,
            f"Entries of layers_to_transform that select nothing in {search.model_name} for the adapter "
            f"{adapter_name!r}: {sorted(empty)}. The targets lie in layers {_ranges(search.layers_seen)}. Correct or "
            "remove them.",
            strict, stacklevel=5,
        )  # fmt: skip
    _complain_of_layers(plan, search, adapter_name, strict)
    if found := experts.left_out(search):
        report(
            UnmatchedTargetWarning,
            f"The experts of {search.model_name} are stacked parameters and no layers, so target_modules leaves them "
            f"out for the adapter {adapter_name!r}: {listing(found)}. {experts.advice(found)} "
            "exclude_modules=['experts'] says that they are meant to be left out.",
            strict, stacklevel=5,
        )  # fmt: skip
    if search.unused and not search.all_linear:
        report(
            UnmatchedTargetWarning,
            f"target_modules selects {listing(search.unused)} for the adapter {adapter_name!r}, but the mixers of "
            f"{search.model_name} read these weights without calling the modules: there an adapter learns nothing, and "
            "has no effect until it is merged. Leave 'dt_proj' out.",
            strict, stacklevel=5,
        )  # fmt: skip
    _complain_of_ties(plan)


def _complain_of_layers(plan: Plan, search: Search, adapter_name: str, strict: bool | None) -> None:
    """Report parameters outside `layers_to_transform`, which chooses among modules only."""
    if search.layers is None:
        return
    found = [t.name for t in plan.targets if t.parameter and search.layer(t.path) not in search.layers]
    if found:
        report(
            UnmatchedTargetWarning,
            f"layers_to_transform={sorted(search.layers)} restricts target_modules only, so the adapter "
            f"{adapter_name!r} adapts parameters of other layers too: {listing(found)}. Name the wanted ones in full "
            "in target_parameters.",
            strict, stacklevel=6,
        )  # fmt: skip


def compare(plan: Plan, search: Search, configured: set[str], strict: bool | None) -> None:
    """Report how the modules of a state_dict differ from those of the configuration and of the model."""
    paths = {t.path for t in plan.targets if t.parameter is None}
    parts = []
    if unused := search.parameter_selector.unused():
        parts.append(f"the state_dict has nothing for the target_parameters {listing(unused)}")
    if search.state_dict_paths:
        parts.append(f"the model lacks {listing(search.state_dict_paths)}")
    if configured and (more := sorted(paths - configured)):
        parts.append(f"only the state_dict has {listing(more)}")
    if configured and (less := sorted(configured - paths)):
        parts.append(f"only the configuration selects {listing(less)}")
    if parts:
        report(
            UnmatchedTargetWarning,
            f"The targets of the state_dict and of the configuration differ: {'; '.join(parts)}. The state_dict "
            "decides. Correct target_modules if this is not intended.",
            strict,
            stacklevel=5,
        )


Missing = list[tuple[str, list[str], bool]]


def _unmatched(plan: Plan, search: Search) -> dict[str, Missing]:
    """Field -> entries that select nothing, each with the names to choose from and whether it is a regex."""
    result: dict[str, Missing] = {}
    selectors = {"exclude_modules": search.exclude, "target_parameters": search.parameter_selector}
    if not search.all_linear:
        selectors = {"target_modules": search.selector, **selectors}
    for field, selector in selectors.items():
        if unused := selector.unused():
            names = search.parameter_names() if field == "target_parameters" else search.names
            result[field] = [(entry, names, selector.regex is not None) for entry in unused]
    if saved := _unsaved(search):
        result["modules_to_save"] = [(entry, search.names, False) for entry in saved]
    patterned = tables(search.config)
    targets = [name for t in plan.targets for name in _parts(t)] if patterned else []
    for field, patterns in patterned.items():
        keys, used = table(patterns, field, search.config), set()
        for name in targets:
            used.update(holding(keys, field, name))
        if unused := [key for key in keys.keys if key not in used]:
            whole = [name for name in targets if part_of(name) is None]
            result[field] = [(key, whole, True) for key in unused]
    return result


def _parts(target: Target) -> list[str]:
    """The names by which settings of a target are looked up: its own, and those of the parameters it consists of."""
    base = innermost(target.module)
    if target.parameter is not None or not views.supported(base):
        return [target.name]
    view, below = views.view_of(base), f"{target.name}.base_layer".lstrip(".")
    return [
        target.name,
        *(f"{target.name}.{part}" for part in view.parts(base)),
        *(f"{below}.{child}" for child in view.read_children),
    ]


def _unsaved(search: Search) -> list[str]:
    """Entries of modules_to_save that are the end of no module's name."""
    left = {e for e in getattr(search.config, "modules_to_save", None) or [] if e not in _TASK_HEADS}
    for name in search.names:
        if not left:
            break
        if name.endswith(tuple(left)):
            left = {entry for entry in left if not name.endswith(entry)}
    return sorted(left)


def _complain_of_ties(plan: Plan) -> None:
    """Warn if a shared weight is changed in one place only, or if there is nothing to tie."""
    saved = tuple(e for e in getattr(plan.config, "modules_to_save", None) or [] if e)
    group = {plan.embedding, *plan.tied} if plan.embedding is not None else set()
    touched = [t.path for t in plan.targets if t.path in group]
    touched += [path for path in group if path and saved and path.endswith(saved)]
    if not getattr(plan.config, "ensure_weight_tying", False):
        if plan.tied and touched:
            warnings.warn(
                f"The weight of {touched[0]!r} is shared by {listing(sorted(str(p) for p in group))}, and this adapter "
                "changes it in one place only. Merging the adapter would untie them. Set ensure_weight_tying=True to "
                "keep them tied.", stacklevel=5,
            )  # fmt: skip
    elif "ensure_weight_tying" not in vars(plan.config):
        return  # the method ties where there is something to tie
    elif not plan.tied:
        warnings.warn("ensure_weight_tying is set, but no modules of this model share a weight.", stacklevel=5)
    elif not touched and not getattr(plan.config, "trainable_token_indices", None):
        warnings.warn(
            f"ensure_weight_tying is set, but none of the tied modules ({listing(sorted(str(p) for p in group))}) is "
            "in "
            "target_modules or modules_to_save.", stacklevel=5,
        )  # fmt: skip
