"""How two adapters differ: their updates layer by layer, what they train beside them, and their configurations."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checkpoint import adapter_config, get_peft_model_state_dict, walk
from ..core.sharded import adapters_whole
from .factors import Pair, exactly, joined
from .update import Update, updates

NOT_COMPARED = frozenset({"auto_mapping", "peft_version", "inference_mode", "runtime_config"})


@dataclass(frozen=True)
class LayerDiff:
    """One layer's updates D1 and D2, in the Frobenius norm.

    Attributes:
        norms: of D1 and D2; None where an adapter has nothing here.
        distance: the norm of D1 - D2.
        cosine: of the angle between D1 and D2; None where one of them is zero or missing.
        ranks, scalings: of the two; None where there is none.
        bias: the norm of the difference of the biases that they add.
    """

    norms: tuple[float | None, float | None]
    distance: float
    cosine: float | None
    ranks: tuple[int | None, int | None]
    scalings: tuple[float | None, float | None]
    bias: float = 0.0


@dataclass
class AdapterDiff:
    """How two adapters differ; printing it gives a table.

    Attributes:
        names: of the two adapters.
        layers: {full name of a target: how the updates differ}.
        others: {key in files: norm of the difference over that of the first} of what is trained besides, such as whole
            modules, tokens and prompts; infinite where one has no such tensor, or another shape.
        config: {field: (value of the first, value of the second)} of the configurations' fields that differ.
    """

    names: tuple[str, str]
    layers: dict[str, LayerDiff] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def norms(self) -> tuple[float, float]:
        """Of all updates together."""
        one, two = ([layer.norms[i] or 0.0 for layer in self.layers.values()] for i in (0, 1))
        return math.hypot(*one), math.hypot(*two)

    @property
    def distance(self) -> float:
        """The norm of the difference of all updates together."""
        return math.hypot(*(layer.distance for layer in self.layers.values()))

    @property
    def same(self) -> bool:
        """Whether the two are the same function, whatever their configurations say."""
        return self.distance == 0 and not any(x.bias for x in self.layers.values()) and not any(self.others.values())

    def __str__(self) -> str:
        one, two = self.names
        width = max([len("layer"), *map(len, self.layers)])
        head = f"{'layer':<{width}}  {'|D1|':>9}  {'|D2|':>9}  {'|D1-D2|':>9}  {'cosine':>7}  {'ranks':>9}  scalings"
        lines = [f"D1: {one}, D2: {two}", head]
        for name, x in self.layers.items():
            norms = "  ".join(f"{_shown(n, '.3g'):>9}" for n in (*x.norms, x.distance))
            ranks = " ".join(_shown(r, "d") for r in x.ranks)
            scalings = " ".join(_shown(s, ".3g") for s in x.scalings)
            lines.append(f"{name:<{width}}  {norms}  {_shown(x.cosine, '.4f'):>7}  {ranks:>9}  {scalings}")
        total = "  ".join(f"{n:>9.3g}" for n in (*self.norms, self.distance))
        lines.append(f"{'all':<{width}}  {total}")
        lines += [f"{key}: relative difference {value:.3g}" for key, value in self.others.items()]
        lines += [f"{key}: {a!r} against {b!r}" for key, (a, b) in self.config.items()]
        return "\n".join(lines)


@torch.no_grad()
def diff(model: nn.Module, first: str, second: str, other: nn.Module | None = None) -> AdapterDiff:
    """How two adapters of a model differ, or one of it and one of another model with the same base.

    Updates of low rank are compared by their factors; no dense one is made for them.

    Arguments:
        model: a PeftModel, or a model with injected adapters.
        first: an adapter of it.
        second: an adapter of `other`.
        other: a model with the same modules; None: `model`.

    Raises ValueError for unknown names, and where updates of one layer have different shapes.
    """
    other = model if other is None else other
    configs = adapter_config(model, first), adapter_config(other, second)
    found = AdapterDiff((first, second), config=_fields(*configs))
    with adapters_whole(model), adapters_whole(other):
        one, two = (_by_name(m, n) for m, n in ((model, first), (other, second)))
        for name in dict.fromkeys([*one, *two]):
            found.layers[name] = _layer(name, one.get(name), two.get(name))
        rest_one, rest_two = _rest(model, first), _rest(other, second)
    for key in dict.fromkeys([*rest_one, *rest_two]):
        found.others[key] = _relative(rest_one.get(key), rest_two.get(key))
    return found


def _by_name(model: nn.Module, name: str) -> dict[str, Update]:
    return {u.p.path: u for (u,) in updates(model, {name: 1.0}).values()}


def _layer(name: str, one: Update | None, two: Update | None) -> LayerDiff:
    matrices = [None if u is None else _matrix(u) for u in (one, two)]
    a, b = matrices
    norms = tuple(None if m is None else _norm(m) for m in matrices)
    cosine = None
    if a is None or b is None:
        distance = next(n for n in norms if n is not None)
    else:
        if not isinstance(a, Pair) or not isinstance(b, Pair):
            a, b = (m.product() if isinstance(m, Pair) else m for m in (a, b))
        if _shape(a) != _shape(b):
            raise ValueError(f"The updates of {name!r} have the shapes {_shape(a)} and {_shape(b)}: other base models?")
        distance = _norm(joined([a, Pair(-b.A, b.B)]) if isinstance(a, Pair) and isinstance(b, Pair) else a - b)  # type: ignore[operator]
        if norms[0] and norms[1]:
            cosine = max(-1.0, min(1.0, _inner(a, b) / (norms[0] * norms[1])))
    biases = [None if u is None else u.bias() for u in (one, two)]
    return LayerDiff(
        norms,  # type: ignore[arg-type]
        distance,
        cosine,
        tuple(None if u is None else u.rank or None for u in (one, two)),  # type: ignore[arg-type]
        tuple(None if u is None else u.scale for u in (one, two)),  # type: ignore[arg-type]
        _distance(*biases),
    )


def _matrix(u: Update) -> Pair | Tensor:
    """The update, in double precision."""
    if u.factors is None:
        return exactly(u.dense())
    return Pair(*(exactly(t) for t in u.factors.scaled(u.scale)))


def _shape(m: Pair | Tensor) -> tuple[int, ...]:
    return (*m.B.shape[:-1], m.A.shape[-1]) if isinstance(m, Pair) else tuple(m.shape)


def _norm(m: Pair | Tensor) -> float:
    """The Frobenius norm: of B A = Q R S' P' it is that of R S'."""
    D: Any = torch.linalg.qr(m.B).R @ torch.linalg.qr(m.A.mT).R.mT if isinstance(m, Pair) else m
    return float(D.norm())


def _inner(a: Any, b: Any) -> float:
    """The inner product: of B A and D C it is that of B' D and A C'."""
    if isinstance(a, Pair) and isinstance(b, Pair):
        return float(((a.B.mT @ b.B) * (a.A @ b.A.mT)).sum())
    return float((a * b).sum())


def _distance(one: Tensor | None, two: Tensor | None) -> float:
    given = [t for t in (one, two) if t is not None]
    return float((given[0] - given[1] if len(given) == 2 else given[0]).norm()) if given else 0.0


def _rest(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter trains besides updates of weights, by key in files."""
    if adapter_config(model, name).is_prompt_learning:
        return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    compared = {id(u.p) for (u,) in updates(model, {name: 1.0}).values()}
    return {e.key: e.tensor.detach() for e in walk(model, name) if id(e.adapter) not in compared}


def _relative(one: Tensor | None, two: Tensor | None) -> float:
    if one is None or two is None or one.shape != two.shape:
        return math.inf
    a, b = exactly(one), exactly(two).to(one.device)
    difference = float((a - b).norm())
    return difference / float(a.norm()) if a.any() else (math.inf if difference else 0.0)


def _fields(one: Any, two: Any) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys(f.name for c in (one, two) for f in dataclasses.fields(c) if f.name not in NOT_COMPARED)
    values = {n: (getattr(one, n, None), getattr(two, n, None)) for n in names}
    return {n: pair for n, pair in values.items() if pair[0] != pair[1] and (pair[0] or pair[1])}


def _shown(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
