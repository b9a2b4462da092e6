"""Configurations for layers that a file states one by one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..algebra.lora import pattern
from ..core.pattern import pattern_value
from ..registry import config_class
from .names import Shapes, overlapping
from .part import number


def config_for(
    method: str,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    modules: Shapes | None = None,
    **fields: Any,
) -> Any:
    """A configuration that gives each of these targets its rank and its alpha.

    Arguments:
        method: LORA, LOHA or LOKR.
        ranks: {name of a target: rank}.
        alphas: {name of a target: alpha}; the scaling is alpha / rank.
        modules: the base's modules, if known: no other one may be selected.
        fields: further fields.
    """
    r, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    names = "alpha" if method != "LORA" else "lora_alpha"
    paths = sorted(ranks)
    targets: Any = paths
    if "" in ranks or (modules is not None and overlapping(paths, modules)):
        targets = "|".join(map(re.escape, paths))
    return config_class(method)(
        **{
            "r": r,
            names: number(alpha),
            "target_modules": targets,
            "rank_pattern": table(ranks, r),
            "alpha_pattern": table({n: number(a) for n, a in alphas.items()}, number(alpha)),
            "inference_mode": True,
            **fields,
        }
    )


def table(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """A pattern for each name whose value is not the usual one, ordered so that each name finds its own."""
    special = {pattern(n, values): v for n, v in values.items() if v != usual}
    wrong = [n for n, v in values.items() if pattern_value(special, n, usual) != v]
    if wrong:  # a name that ends with another one's: whole names, all of them
        special = {f"^{re.escape(n)}$": v for n, v in values.items()}
    return special
