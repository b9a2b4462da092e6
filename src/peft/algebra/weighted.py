"""A new adapter from the weighted updates of several others, as `add_weighted_adapter` makes it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.buffers import tensors_below
from ..core.layer import BaseTunerLayer, tuner_layers
from ..core.onload import brought
from ..core.sharded import adapters_whole, full, put
from ..core.tokens import TokenRows
from ..core.wrappers import ModulesToSaveWrapper
from ..errors import PeftWarning, check_adapters, listing
from ..names import check_adapter_name
from .combine import Recipe, Result, blended, combine
from .lora import biases, checked_targets, even, parts, plain_config, union
from .update import Form, Update, updates

TOLD = 0.01  # truncation that is told


@dataclass
class Report:
    """What a combination or a conversion has left out.

    Attributes:
        errors: {full name of a target: norm of what is missing from its update, relative to the update}.
        ranks: {full name of a target: rank}.
        enough: the rank that would leave out less than a hundredth everywhere, where it is known.
        others: {name of a tensor that the adapter does not hold: the norm of its change over its own}.
    """

    errors: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    enough: int | None = None
    others: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest error."""
        return max(self.errors.values(), default=0.0)

    def add(self, name: str, result: Result, groups: int = 1) -> None:
        """Note one layer."""
        self.errors[name], self.ranks[name] = result.error, result.pair.rank * groups
        if result.enough is not None:
            self.enough = max(self.enough or 0, result.enough * groups)

    def tell(self, advice: str) -> None:
        """Warn if a layer has lost more than a hundredth."""
        if self.error > TOLD:
            worst = max(self.errors, key=self.errors.__getitem__)
            needed = f" Rank {self.enough} would leave out less than 1 %." if self.enough else ""
            warnings.warn(
                f"The update was cut to rank {self.ranks[worst]} at {worst!r}, which leaves out {self.error:.1%} of it "
                f"(relative Frobenius norm), the most of {len(self.errors)} layers.{needed} {advice}",
                PeftWarning,
                stacklevel=4,
            )

    def __str__(self) -> str:
        lines = [f"{name}: rank {self.ranks[name]}, relative error {e:.2e}" for name, e in self.errors.items()]
        lines += [f"{name}: not in the adapter, relative change {c:.2e}" for name, c in self.others.items()]
        return "\n".join(lines)


def add_weighted_adapter(
    tuner: Any, adapters: list[str], weights: list[float], adapter_name: str, recipe: Recipe
) -> Report:
    """Add the combination of some adapters to a tuner; it is inactive and frozen. See `BaseTuner.add_weighted_adapter`.

    Everything is computed before the model is touched, and an error leaves it as it was.
    """
    with adapters_whole(tuner):
        return _add(tuner, adapters, weights, adapter_name, recipe)


def _add(tuner: Any, adapters: list[str], weights: list[float], adapter_name: str, recipe: Recipe) -> Report:
    shares = _checked(tuner, adapters, weights, adapter_name)
    alone = len(adapters) == 1
    recipe.check(prunes=not alone)
    as_it_is = alone and recipe.rank is None and recipe.energy is None
    configs = [tuner.peft_config[name] for name in adapters]
    layers = updates(tuner.model, shares)
    modules = updates(tuner.model, shares, whole=True)
    tokens = all(c.peft_type == "TRAINABLE_TOKENS" and c.token_indices == configs[0].token_indices for c in configs)
    if bool(layers) == bool(modules) and not tokens:
        raise ValueError(
            f"The adapters {listing(adapters)} have no weights to combine, or change weights and replace whole modules."
        )
    if as_it_is:
        recipe = Recipe("linear" if configs[0].peft_type == "LORA" else "exact")
    elif alone:
        recipe = replace(recipe, kind=recipe.unpruned)
    if tokens or modules or _closed(configs, layers):
        config, report = _same_method(tuner, configs, modules or layers), Report()
        values = {path: _linear(found, recipe) for path, found in layers.items()}
        with Added(tuner, adapter_name, config):
            _write_linear(tuner, adapter_name, layers, values)
            write_rest(tuner, adapter_name, shares)
        return report
    whole_sum = recipe.kind == "exact" and len(adapters) > 1  # of DoRA's updates it has no magnitude of its own
    dora = not whole_sum and all(c.peft_type == "LORA" and c.use_dora for c in configs)
    results = even(layers, {path: combine(found, recipe, dora) for path, found in layers.items()})
    report = Report()
    for path, found in layers.items():
        report.add(found[0].p.path, results[path], found[0].form.groups)
    config = _config(tuner, configs, layers, results, report, dora)
    with Added(tuner, adapter_name, config):
        for path, layer in tuner_layers(tuner.model):
            if path in results:
                write(layer.adapters[adapter_name], results[path])
        write_rest(tuner, adapter_name, shares)
    report.tell(recipe.advice)
    return report


def _checked(tuner: Any, adapters: Any, weights: Any, name: str) -> dict[str, float]:
    check_adapter_name(name)
    if isinstance(adapters, str):
        raise TypeError(f"adapters must be a list of names, got the string {adapters!r}. Use [{adapters!r}].")
    if name in tuner.peft_config:
        raise ValueError(f"There is an adapter {name!r} already. Delete it first, or choose another adapter_name.")
    if not adapters:
        raise ValueError("adapters is empty. Name at least one adapter to combine.")
    check_adapters(adapters, tuner.peft_config)
    weights = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(f"There are {len(adapters)} adapters but {len(weights)} weights. Give one weight for each.")
    shares: dict[str, float] = {}
    for n, w in zip(adapters, weights, strict=True):
        if n in shares:
            raise ValueError(f"The adapter {n!r} is listed twice. List it once, with the sum of its weights.")
        shares[n] = float(w)
        if not math.isfinite(shares[n]):
            raise ValueError(f"The weight of the adapter {n!r} is {w}. Weights are finite numbers.")
    return shares


# ---- the same method again -----------------------------------------------------------------------------------


def _closed(configs: list[Any], layers: dict[str, list[Update]]) -> bool:
    """Whether all sources are of one method whose updates sum up to one of its own: the same places, sizes, scaling."""
    if len({c.peft_type for c in configs}) > 1 or not layers:
        return False
    for found in layers.values():
        first = found[0].p
        if not first.method.linear or any(u.p.method is not first.method for u in found):
            return False
        if any(not _alike(first, u.p) for u in found[1:]):
            return False
    return True


def _alike(p: Any, q: Any) -> bool:
    """Whether two adapters of a layer differ in nothing but the tensors in which they are affine."""
    if any(p.__dict__.get(key) != q.__dict__.get(key) for key in p.layer._plain):
        return False
    for key, home in p.layer._modules.items():
        if key == "base_layer" or key in p.method.linear or p.name not in home:
            continue
        one = home[p.name]
        if isinstance(one, Tensor) and (q.name not in home or not torch.equal(one, home[q.name])):
            return False
    return all(getattr(p, key).shape == getattr(q, key).shape for key in p.method.linear)


def _linear(found: list[Update], recipe: Recipe) -> dict[str, Tensor]:
    first, weights = found[0].p, torch.tensor([u.weight for u in found], dtype=torch.float32, device="cpu")
    values = {}
    for key, neutral in first.method.linear.items():
        tensors = [getattr(u.p, key).detach() for u in found]
        if recipe.kind == "exact":
            values[key] = blended(tensors, neutral, [u.weight for u in found])
        else:
            values[key] = recipe.function(tensors, weights)
    return values


def _same_method(tuner: Any, configs: list[Any], layers: dict[str, list[Update]]) -> Any:
    config = copy.copy(configs[0])
    config.bias, config.inference_mode = "none", False
    config.target_modules = union([c.target_modules for c in configs])
    return checked_targets(tuner.model, config, (u for found in layers.values() for u in found)) if layers else config


def _write_linear(tuner: Any, name: str, layers: dict[str, list[Update]], values: dict[str, dict[str, Tensor]]) -> None:
    for path, layer in tuner_layers(tuner.model):
        if path not in values:
            continue
        p, source = layer.adapters[name], layers[path][0].p
        for key, home in layer._modules.items():
            if key in values[path]:
                put(getattr(p, key), values[path][key])
            elif key != "base_layer" and source.name in home and isinstance(home[source.name], Tensor):
                put(home[name], home[source.name])  # places that chance or a file has chosen


# ---- a LoRA ---------------------------------------------------------------------------------------------------


def _config(
    tuner: Any,
    configs: list[Any],
    layers: dict[str, list[Update]],
    results: dict[str, Result],
    report: Report,
    dora: bool,
) -> Any:
    changes = {
        "use_dora": dora,
        **_invocation(configs, layers),
        "trainable_token_indices": _tokens(tuner, configs),
        **biases(layers, results),
    }
    usual = next((results[path].pair.rank for path in parts(layers)), None)
    config = plain_config(configs, report.ranks, usual, **changes)
    return checked_targets(tuner.model, config, (u for found in layers.values() for u in found))


def _invocation(configs: list[Any], layers: dict[str, list[Update]]) -> dict[str, Any]:
    """The tokens from which the sources act, if they act on a part of the input; all on the same part, or it raises."""
    if all(u.method.mergeable for found in layers.values() for u in found):
        return {}
    given = [getattr(c, "alora_invocation_tokens", None) for c in configs]
    if not given[0] or any(tokens != given[0] for tokens in given):
        raise ValueError(
            "The adapters depend on their input, each in its own way, so no adapter is their sum. Combine adapters "
            "that act on all of the input, or with the same alora_invocation_tokens."
        )
    return {"alora_invocation_tokens": given[0]}


def write(p: Any, result: Result) -> None:
    """Put factors into an adapter whose scaling is 1."""
    A, B = Form(p.layer).held(result.pair.scaled(1 / (float(p.scaling) * getattr(_inside(p), "times", 1.0))))
    infix = p.layer.view.infix
    for key, value in ((f"lora_{infix}A", A), (f"lora_{infix}B", B)):
        held: Any = getattr(p, key)
        put(getattr(held, "weight", held), value)
    if result.bias is not None:
        put(_inside(p).up_bias(p), result.bias / float(p.scaling))
    if result.magnitude is not None:
        m = p.lora_magnitude_vector.weight
        put(m, result.magnitude.reshape(m.shape))


def _inside(p: Any) -> Any:
    return getattr(p.method, "of", p.method)


# ---- whole modules and tokens -----------------------------------------------------------------------------------


def _tokens(tuner: Any, configs: list[Any]) -> Any:
    """`trainable_token_indices` of the new adapter: the union, by the embedding that each list is for."""
    given = [c.trainable_token_indices for c in configs if getattr(c, "trainable_token_indices", None)]
    if not given or all(g == given[0] for g in given):
        return given[0] if given else None
    names = [n for n, c in tuner.peft_config.items() if any(c is d for d in configs)]
    found: dict[str, list[int]] = {}
    for path, layer in tuner_layers(tuner.model):
        for name in names:
            p = layer.adapters.get(name) if isinstance(layer, BaseTunerLayer) else None
            if p is not None and isinstance(p.method, TokenRows) and name not in layer.shares:
                known = found.setdefault(path.removesuffix(".token_adapter"), [])
                known += [i for i in p.method.indices if i not in known]
    return found


def write_rest(tuner: Any, name: str, shares: dict[str, float]) -> None:
    """Copies of modules and rows of tokens: the original, and the weighted differences from it."""
    for _, layer in tuner_layers(tuner.model):
        if name not in layer._get_available_adapters():
            continue
        if isinstance(layer, ModulesToSaveWrapper) or layer._whole:
            _write_module(layer, name, shares)
        elif isinstance(layer.adapters[name].method, TokenRows) and name not in layer.shares:
            _write_tokens(layer, name, shares)


def _write_module(layer: Any, name: str, shares: dict[str, float]) -> None:
    whole = isinstance(layer, BaseTunerLayer)
    homes = (h for k, h in layer._modules.items() if k not in layer._below and name in h)
    home = next(homes) if whole else layer.adapters
    given: Any = layer.original() if whole else layer.original_module
    original = _saved(given)
    copies = [(_saved(home[n]), w) for n, w in shares.items() if n in home]
    for key, held in _saved(home[name]).items():
        tensors = [c[key] for c, _ in copies]
        if held.is_floating_point() and tensors:
            put(held.data, blended(tensors, full(original[key]).to(tensors[0]), [w for _, w in copies]))
        elif tensors:
            put(held.data, tensors[0])


def _saved(module: Any) -> dict[str, Tensor]:
    """The tensors that files hold of a module; its `state_dict` has hooks of what spreads it over processes."""
    found = ((leaf, owner, attr, getattr(owner, attr)) for owner, leaf, attr in tensors_below(module))
    return {leaf: brought(owner, attr, t) if t.is_meta else t for leaf, owner, attr, t in found}


def _write_tokens(layer: Any, name: str, shares: dict[str, float]) -> None:
    new = layer.adapters[name]
    at = {i: k for k, i in enumerate(full(new.held_buffer("token_indices")).tolist())}
    W = layer.original_weight()
    values = full(new.trainable_tokens_delta).clone()
    start = (W.mT if layer.view.infix else W)[full(new.held_buffer("token_indices"))].to(values)
    rows: dict[int, list[tuple[Tensor, float]]] = {}
    for n, w in shares.items():
        p = layer.adapters.get(n)
        for k, i in enumerate(p.held_buffer("token_indices")) if p is not None else ():
            rows.setdefault(at[int(i)], []).append((p.trainable_tokens_delta[k], w))
    for k, found in rows.items():
        values[k] = blended([t for t, _ in found], start[k], [w for _, w in found])
    put(new.trainable_tokens_delta, values)


class Added:
    """A context with a new adapter in a tuner, which is taken back if what is done in it fails."""

    def __init__(self, tuner: Any, name: str, config: Any):
        self.tuner, self.name, self.config = tuner, name, config
        self.undo: list[Callable[[], Any]] = []
        self.grad = torch.no_grad()

    def __enter__(self) -> None:
        tuner = self.tuner
        tuner.peft_config[self.name] = self.config
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what there is to say of the sources has been said
                tuner.inject_adapter(tuner.model, self.name, undo=self.undo)
        except BaseException:
            tuner.peft_config.pop(self.name, None)
            raise
        for _, layer in tuner_layers(tuner.model):  # it has learnt already: dropout is on where the layer trains
            homes = [home for key, home in layer._modules.items() if key not in layer._below and home is not None]
            for module in [home._modules.get(self.name) for home in homes]:
                if module is not None:
                    module.train(layer.training)
        self.grad.__enter__()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.grad.__exit__(kind, *rest)
        if kind is not None:
            for step in reversed(self.undo):
                step()
            self.tuner.peft_config.pop(self.name, None)
