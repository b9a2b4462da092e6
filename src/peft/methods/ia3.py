"""IA3: learnt factors for the features that a layer gives, or takes.

    W' = diag(l) W,  b' = l b;   on feed-forward targets  W' = W diag(l),  b' = b

l starts at one, so training starts at the base model. Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.defaults import BNB_LAYERS, targets_by_model_type
from ..core.families import Scaling
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Site
from ..core.pattern import suffixes
from ..core.stack import Adapter, Stack
from ..core.tuner import BaseTuner
from ..target_config import TargetConfig, names


@dataclass
class IA3Config(TargetConfig):
    """The configuration of IA3."""

    kind = "IA3"
    added = frozenset({"layers_to_transform", "layers_pattern", "bias"})
    ranks = ()
    feedforward_modules: list[str] | str | None = field(
        default=None, metadata=describe("Targets whose in-features are scaled: ends of names, or a regular expression.")
    )
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_ia3_weights: bool = field(default=True, metadata=describe("Start at one; else random."))

    def check(self) -> None:
        """Feed-forward modules are targets, or ends of their names: "all-linear" is whole names in a file."""
        chosen = self.feedforward_modules
        if chosen is None or isinstance(chosen, str):
            return
        inside: Any = set(names("feedforward_modules", chosen))
        if isinstance(self.target_modules, set):
            ends = {end for name in self.target_modules for end in suffixes(name)}
            if inside - ends:
                raise ValueError(
                    "`feedforward_modules` should be a subset of `target_modules`; "
                    f"{sorted(inside - ends)} are no targets."
                )
        self.feedforward_modules = inside


class IA3(Scaling):
    """W' = diag(l) W, or W diag(l)."""

    linear: ClassVar[dict[str, float]] = {"ia3_l": 1.0}

    def build(self, site: Site) -> dict[str, Any]:
        inside = is_feedforward(site.path, site.settings.feedforward_modules)
        *lead, out, _ = site.view.shape(site.module)
        ones = torch.ones(*lead, site.view.inputs(site.module) if inside else out, **site.kwargs)
        shaped = site.view.vector(site.module, ones) if not lead else ones
        if shaped.dim() == ones.dim():
            shaped = shaped.unsqueeze(-2 if inside else -1)
        return {"ia3_l": nn.Parameter(shaped), "is_feedforward": inside}

    def init(self, p: Adapter, inner: Stack) -> None:
        if not p.settings.init_ia3_weights:
            p.ia3_l.normal_()

    def on_input(self, p: Adapter) -> bool:
        return bool(p.is_feedforward)

    def scale(self, p: Adapter) -> Tensor:
        held = p.held("ia3_l")
        *lead, _, _ = p.layer.view.shape(p.layer.get_base_layer())
        return held.flatten(len(lead))


def is_feedforward(path: str, chosen: Any) -> bool:
    """Whether a module is one of `feedforward_modules`."""
    if isinstance(chosen, str):
        return re.fullmatch(chosen, path) is not None
    return any(path.endswith(name) for name in chosen or ())


class IA3Layer(BaseTunerLayer):
    """A target under IA3 adapters."""

    family = "ia3"
    _bare = True
    adapter_layer_names = ("ia3_l",)
    other_param_names = ("is_feedforward",)
    _parameter_homes = frozenset({"ia3_l"})

    @property
    def is_feedforward(self) -> bool:
        """Whether the features that it takes are scaled, by the first adapter."""
        return any(bool(p.is_feedforward) for p in list(self.adapters.values())[:1])


class IA3Model(BaseTuner):
    """IA3 adapters on a model."""

    prefix = "ia3_"
    layer_classes = name_layers(IA3Layer, globals(), packed=BNB_LAYERS)
    method: ClassVar[IA3] = IA3()

    @classmethod
    def prepare_config(cls, config: Any, model_type: str | None) -> None:
        """Fill in the feed-forward modules that are usual for the model type."""
        if config.feedforward_modules is None:
            known = targets_by_model_type("IA3_FEEDFORWARD_MODULES").get(model_type or "")
            if known is None:
                raise ValueError(
                    f"feedforward_modules is not set, and there is no default for the model type {model_type!r}. "
                    "Please specify `feedforward_modules`: names of targets whose inputs are scaled, or [] for none."
                )
            config.feedforward_modules = known if isinstance(known, str) else set(known)
