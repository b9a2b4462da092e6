"""Experts that a model holds as one parameter each, under the names that their projections had as modules.

Since transformers 5, mixture-of-experts models hold `experts.gate_up_proj` (E, 2 I, H) and `experts.down_proj`
(E, H, I), and a router that is no linear layer. A configuration that names w1, w2, w3 or gate_proj, up_proj, down_proj
means parts of these. It is rewritten as the peer does, so that files fit:

    w1 and w3, gate_proj and up_proj  ->  target parameter gate_up_proj, with twice the rank and twice alpha
    w2, down_proj                     ->  target parameter down_proj
    gate                              ->  target parameter gate.weight

Two updates of rank r, stacked, are one of rank 2 r; the scaling stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from . import apart, storage
from .apart import BOTH, DOWN
from .defaults import INCLUDE_LINEAR_LAYERS_SHORTHAND
from .pattern import TABLES, Selector
from .tie import innermost
from .views import supported
from .walking import model_type, walk

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .search import Search

_MIXTRAL, _QWEN = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")
_NAMES = {kind: _MIXTRAL for kind in ("mixtral", "minimax", "minimax_m2")} | {
    kind: _QWEN
    for kind in (
        "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
        "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash",
        "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker", "solar_open",
    )
}  # fmt: skip
_METHODS = frozenset({"LORA"})  # a stack of two updates is one of twice the rank
_ROUTER = "gate"
_DOUBLED = r".*\.gate_up_proj"
_OLD = re.compile(r"(?P<path>.*\.experts)\.\d+\.(?P<name>\w+)\.(?P<home>\w+_)A\.weight")


def rewrite(config: Any, model: nn.Module) -> Callable[[], None]:
    """Replace names of experts' projections in a configuration by the parameters that hold them now, if it has any.

    Returns a function that takes it back. Raises ValueError if one half of a fused parameter is named alone.
    """
    if (back := apart.rewrite(config, model)) is not None:
        return back
    wanted = getattr(config, "target_modules", None)
    names = _NAMES.get(model_type(model))
    if names is None or config.peft_type not in _METHODS or not _sounds_like(wanted, {*names, _ROUTER}):
        return lambda: None
    modules = list(walk(model))
    chosen = _chosen(config, modules, names)
    new = _parameters(config, chosen, names)
    if not new:
        return lambda: None
    fields = ("target_modules", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern")
    before = {name: getattr(config, name) for name in fields}
    if not _is_all_linear(wanted):
        present = [path for path, module in modules if supported(innermost(module))]
        config.target_modules = _still_modules(wanted, present, chosen)
    if getattr(config, "exclude_modules", None):
        config.exclude_modules = _still_modules(config.exclude_modules, [path for path, _ in modules], set(names))
    old = list(config.target_parameters or ())
    config.target_parameters = old + [name for name in new if name not in old]
    root = getattr(config, "use_rslora", False)  # the scaling is alpha / sqrt r then, and not the peer's twice alpha
    for table, factor in (("rank_pattern", 2), ("alpha_pattern", 2**0.5 if root else 2)) if BOTH in new else ():
        value = next(getattr(config, name) for name in TABLES[table] if hasattr(config, name))
        setattr(config, table, {**(getattr(config, table) or {}), _DOUBLED: factor * value})
    return apart.taking_back(config, before)


def _sounds_like(wanted: Any, names: set[str]) -> bool:
    """Whether these targets may mean experts; an expression always may."""
    return bool(wanted) and (isinstance(wanted, str) or any(e.rpartition(".")[2] in names for e in wanted))


def _is_all_linear(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def _chosen(config: Any, modules: list[tuple[str, nn.Module]], names: tuple[str, ...]) -> set[str]:
    """The old names of projections and routers that `target_modules` selects."""
    selector = Selector(config.target_modules, "target_modules")
    exclude = Selector(getattr(config, "exclude_modules", None) or [], "exclude_modules")
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    found = set()
    for path, name, now in _old_names(modules, names):
        if exclude.find(path) is not None or exclude.find(now) is not None or (saved and path.endswith(saved)):
            continue
        if _is_all_linear(config.target_modules) or selector.find(path) is not None:
            found.add(name)
    return found


def _old_names(modules: list[tuple[str, nn.Module]], names: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """(path, last name, path of what holds it now) of the modules that fused experts and their routers used to be."""
    present = {path: innermost(module) for path, module in modules}
    for path, module in present.items():
        fused = module._parameters.get(BOTH)
        if path.rpartition(".")[2] != "experts" or fused is None or fused.dim() != 3:
            continue
        block = path.rpartition(".")[0]
        router = present.get(f"{block}.{_ROUTER}")
        for old in (block, f"{block.rpartition('.')[0]}.block_sparse_moe")[: 1 + (names is _MIXTRAL)]:
            for name in names:
                yield from ((f"{old}.experts.{expert}.{name}", name, path) for expert in range(fused.shape[0]))
            if router is not None and not supported(router) and router._parameters.get("weight") is not None:
                yield f"{old}.{_ROUTER}", _ROUTER, f"{block}.{_ROUTER}"


def _parameters(config: Any, chosen: set[str], names: tuple[str, ...]) -> list[str]:
    """The parameters that hold the chosen projections."""
    *halves, down = names
    named = [name for name in halves if name in chosen]
    if len(named) == 1:
        other = next(name for name in halves if name not in chosen)
        raise ValueError(
            f"target_modules selects {named[0]!r} of the experts, which this model holds together with {other!r} in "
            f"one parameter, 'experts.{BOTH}'. Target {other!r} too, or neither."
        )
    parts = {BOTH: bool(named), DOWN: down in chosen, f"{_ROUTER}.weight": _ROUTER in chosen}
    return [name for name, present in parts.items() if present]


def _still_modules(wanted: Any, paths: list[str], old: set[str]) -> Any:
    """What is left of names of modules: entries that mean an old name stay only if they select one of `paths` too."""
    selector = Selector(wanted, "target_modules")
    for path in paths:
        selector.find(path)
    if isinstance(wanted, str):
        return wanted if selector.used else []
    return type(wanted)(e for e in wanted if e in selector.used or e.rpartition(".")[2] not in old)


# ---- files that were made for the modules --------------------------------------------------------------------------


def fused(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A checkpoint that may hold factors of each expert's projections, as one for the parameters that hold them now.

    The factors of two halves become one pair: A's on top of each other, B's on a diagonal of blocks. Experts lie side
    by side, in A expert by expert, in B rank by rank. Where a factor is missing, all of its group stay as they are.
    A model that has a module for each expert gets the factors of a stack as those of its modules.
    """
    state = apart.split(model, state)
    names = _NAMES.get(model_type(model))
    keys = {key: _OLD.fullmatch(key) for key in state if names is not None}
    if names is None or not any(keys.values()):
        return state
    new = dict(state)
    groups: dict[tuple[str, str], set[str]] = {}
    for match in filter(None, keys.values()):
        groups.setdefault((match["path"], match["home"]), set()).add(match["name"])
    for (path, home), present in groups.items():
        for used in (names[:2], names[2:]):
            place = f"{path}.base_layer" if used == names[:2] and names[2] in present else path
            _fuse(new, path, [f"{name}.{home}" for name in used], f"{place}.{home}")
    return {key.replace(".block_sparse_moe.", ".mlp."): value for key, value in new.items()}


def _fuse(state: dict[str, Tensor], path: str, parts: list[str], place: str) -> None:
    """Replace the factors of these projections of all experts by one pair."""
    count = 0
    while f"{path}.{count}.{parts[0]}A.weight" in state:
        count += 1
    rows = [[f"{path}.{expert}.{part}" for part in parts] for expert in range(count)]
    keys = [f"{part}{side}.weight" for row in rows for part in row for side in "AB"]
    if not keys or any(key not in state for key in keys):
        return
    for side in "AB":
        factors = [[state.pop(f"{part}{side}.weight") for part in row] for row in rows]
        state[f"{place}{side}.weight"] = side_by_side(factors, side)


def side_by_side(factors: list[list[Tensor]], side: str) -> Tensor:
    """One factor for a stack of experts.

    Arguments:
        factors: for each expert those of its halves: A (r, in), B (out, r).
        side: "A" gives (experts x halves x r, in); "B" gives (halves x out, halves x r x experts).
    """
    if side == "A":
        return torch.cat([torch.cat(row) for row in factors])
    return torch.stack([torch.block_diag(*row) for row in factors], -1).flatten(1)


def holds_both(config: Any, down: str) -> bool:
    """Whether a configuration adapts both stacks of experts, so that one's tensors lie under the other's.

    Arguments:
        config: rewritten for the parameters or not.
        down: the old name of the projection that `down_proj` holds.
    """
    named = [name.rpartition(".")[2] for name in getattr(config, "target_parameters", None) or ()]
    if BOTH in named or DOWN in named:
        return BOTH in named and DOWN in named
    if _is_all_linear(config.target_modules):
        return True
    selector = Selector(config.target_modules or [], "target_modules")
    return any(selector.find(f"model.layers.0.{block}.experts.0.{down}") for block in ("mlp", "block_sparse_moe"))


# ---- what is left out ----------------------------------------------------------------------------------------------


def left_out(search: Search) -> list[str]:
    """Names of stacked parameters of experts that the search has not selected, though its entries sound like them."""
    entries = {entry.rpartition(".")[2] for entry in search.selector.entries}
    if search.all_linear and search.model_type in _NAMES and search.config.peft_type in _METHODS:
        return []  # `rewrite` has seen them: what is left is excluded
    if search.selector.regex is not None or not (search.all_linear or entries & {*_MIXTRAL, *_QWEN, BOTH}):
        return []
    places = [(path, module) for path, module in search.modules if "expert" in path.lower()]
    taken = {target.name for target in search.targets} if places else set()
    found = []
    for path, module in places:
        base = innermost(module)
        if supported(base) or search.exclude.find(path) is not None:
            continue
        stacked = (name for name, dims in storage.parameters(base) if dims == 3)
        found += [f"{path}.{name}" for name in stacked if f"{path}.{name}" not in taken]
    return found


def advice(names: Iterable[str]) -> str:
    """How to adapt these parameters."""
    short = sorted({".".join(name.split(".")[-2:]) for name in names})
    return f"Name them as parameters to adapt them: target_parameters={short}."
