"""Adapters made for fused experts, on a model that holds a module for each expert's projections.

The other direction of `experts`: transformers 5 holds `experts.gate_up_proj` (E, 2 I, H) and `experts.down_proj`
(E, H, I); transformers 4, and code outside, hold modules `experts.0.gate_proj` and so on (Mixtral's: w1, w3, w2). An
update of the stack is one of its halves: B A cut into the rows of gate and those of up, with the same A and rank. So

    target parameter gate_up_proj  ->  modules gate_proj and up_proj, or w1 and w3, with the rank of the stack
    target parameter down_proj     ->  module down_proj, or w2
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .entries import PREFIX, plain
from .pattern import TABLES, pattern_value
from .tie import innermost
from .views import supported
from .walking import walk

if TYPE_CHECKING:
    from torch import Tensor, nn

NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
BOTH, DOWN = "gate_up_proj", "down_proj"


class Experts(NamedTuple):
    """One block of experts: its path, how many there are, the names of their projections (gate, up, down)."""

    path: str
    number: int
    names: tuple[str, ...]
    inner: int  # I, the rows of gate
    outer: int  # H, its columns


def blocks(model: nn.Module) -> list[Experts]:
    """The blocks of a model whose experts are modules of their own."""
    found = []
    for path, module in walk(model):
        if path.rpartition(".")[2] != "experts" or "0" not in module._modules:
            continue
        first = module._modules["0"]
        for names in NAMES:
            layers = [innermost(layer) for name in names if (layer := getattr(first, name, None)) is not None]
            if len(layers) == 3 and all(supported(layer) for layer in layers):
                inner, outer = layers[0].weight.shape
                found.append(Experts(path, len(module._modules), names, inner, outer))
    return found


def rewrite(config: Any, model: nn.Module) -> Callable[[], None] | None:
    """Replace target parameters of fused experts by the modules that this model has; None if there are none.

    Returns a function that takes it back.
    """
    wanted = [name for name in getattr(config, "target_parameters", None) or () if _last(name) in (BOTH, DOWN)]
    found = blocks(model) if wanted and config.peft_type == "LORA" else []
    if not found or isinstance(getattr(config, "target_modules", None), str):
        return None
    tables = [table for table in TABLES if getattr(config, table, None) is not None]
    before = {name: getattr(config, name) for name in ("target_modules", "target_parameters", *tables)}
    modules = set(config.target_modules or ())
    for name in wanted:
        for block in found:
            parts = block.names[:2] if _last(name) == BOTH else block.names[2:]
            modules |= {f"experts.{expert}.{part}" for expert in range(block.number) for part in parts}
            for table in tables:
                value = pattern_value(before[table], f"{block.path}.{_last(name)}", None)
                kept = {k: v for k, v in getattr(config, table).items() if not k.endswith(BOTH)}
                pattern = rf"{re.escape(block.path)}\.\d+\.({'|'.join(parts)})"
                setattr(config, table, kept if value is None else {**kept, pattern: value})
    config.target_modules = modules
    config.target_parameters = [name for name in config.target_parameters if name not in wanted] or None
    return taking_back(config, before)


def taking_back(config: Any, before: Mapping[str, Any]) -> Callable[[], None]:
    """What gives fields of a configuration the values from before."""

    def undo() -> None:
        for name, value in before.items():
            setattr(config, name, value)

    return undo


def split(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A checkpoint that may hold factors for fused experts, as one for the modules that this model has."""
    stacked = [key for key in state if key.endswith(("experts.lora_A.weight", "experts.base_layer.lora_A.weight"))]
    found = {block.path: block for block in blocks(model)} if stacked else {}
    new = dict(state) if found else state
    for key in stacked if found else ():
        prefix = PREFIX if key.startswith(PREFIX) else ""
        path = plain(key).removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".base_layer")
        block = found.get(path) or found.get(PREFIX + path)
        other = key.replace(".lora_A.", ".lora_B.")
        pieces = _pieces(block, state[key], state[other]) if block is not None and other in state else {}
        if pieces:
            new = {k: v for k, v in new.items() if k not in (key, other)}
            new |= {f"{prefix}{path}.{name}": value for name, value in pieces.items()}
    return new


def _pieces(block: Experts, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """{"0.w1.lora_A.weight": ...} of one stacked pair: A (E r, in) expert by expert, B (out, r E) rank by rank."""
    count = block.number
    if A.dim() != 2 or len(A) % count or B.shape[1] != len(A):
        return {}
    if (A.shape[1], len(B)) == (block.outer, 2 * block.inner):
        names = block.names[:2]
    elif (A.shape[1], len(B)) == (block.inner, block.outer):
        names = block.names[2:]
    else:
        return {}
    rank = len(A) // count
    a, b = A.unflatten(0, (count, rank)), B.unflatten(1, (rank, count))
    return {
        f"{expert}.{name}.lora_{side}.weight": value.contiguous()
        for expert in range(count)
        for name, rows in zip(names, b[..., expert].chunk(len(names)), strict=True)
        for side, value in (("A", a[expert]), ("B", rows))
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]
