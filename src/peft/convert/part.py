"""An adapter as converters see it: for each model of a pipeline a part, which is a configuration and its tensors.

What a part has beside plain low-rank factors is called a feature; a format states the features that it can hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..core.entries import PREFIX, join
from ..core.pattern import Selector, settings
from ..errors import PeftError, listing
from ..types import plain

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
LORA = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B")
MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
TENSORS = {"LORA": (*LORA, *MAGNITUDE), "LOHA": HADA, "LOKR": LOKR}
TRAINING_ONLY = ("lora_monteclora_sampler", "lora_velora_embed")
VARIANTS = ("arrow_config", "use_bdlora", "kasa_config", "use_qalora")
FROM_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


class ConversionError(PeftError, ValueError):
    """An adapter cannot be written as asked; the message names what and what can be done."""


@dataclass
class Layer:
    """One target: its tensors by their names in files, and what they are multiplied with."""

    path: str
    tensors: dict[str, Tensor]
    settings: Any

    @property
    def infix(self) -> str:
        """What an embedding's factors have in their names."""
        return "embedding_" if "lora_embedding_A" in self.tensors else ""

    def factor(self, side: str) -> Tensor:
        """A (r, I, ...) or B (O, r, ...) of a low-rank update, as files hold it."""
        key = f"lora_embedding_{side}" if self.infix else f"lora_{side}.weight"
        if key not in self.tensors:
            raise ConversionError(f"{self.path!r} lacks {key!r}: the file is not whole. Save or download it again.")
        return self.tensors[key]

    @property
    def rank(self) -> int:
        """r, of the tensors."""
        return int(self.factor("A").shape[0])

    @property
    def alpha(self) -> float:
        """What the scaling is, times the rank."""
        return number(self._alpha * (math.sqrt(self.settings.r) if self._rooted else 1))

    @property
    def scaling(self) -> float:
        """What the update is multiplied with."""
        return float(self._alpha / (math.sqrt(self.settings.r) if self._rooted else self.settings.r))

    @property
    def _alpha(self) -> float:
        return self.settings.lora_alpha if hasattr(self.settings, "lora_alpha") else self.settings.alpha

    @property
    def _rooted(self) -> bool:
        return bool(getattr(self.settings, "use_rslora", False))

    @property
    def magnitude(self) -> Tensor | None:
        """DoRA's norms, (O,) or shaped to the weight."""
        return next((self.tensors[key] for key in MAGNITUDE if key in self.tensors), None)


@dataclass
class Part:
    """The adapter of one model. Keys have no prefix: they begin with the name of a module of that model."""

    config: Any
    state: dict[str, Tensor]
    noted: dict[str, str] = field(default_factory=dict, repr=False)  # what the file says of its base model

    @property
    def method(self) -> str:
        """LORA, LOHA ..."""
        return plain(self.config.peft_type)

    def split(self) -> tuple[list[Layer], dict[str, Tensor]]:
        """The targets in the file's order, and the tensors that belong to none."""
        kinds = TENSORS.get(self.method, ())
        found: dict[str, dict[str, Tensor]] = {}
        others = {}
        for key, value in self.state.items():
            name = next((k for k in kinds if key == k or key.endswith("." + k)), None)
            if name is None:
                others[key] = value
            else:
                found.setdefault(key.removesuffix(name).removesuffix("."), {})[name] = value
        return [Layer(path, t, settings(self.config, self.name_of(path))) for path, t in found.items()], others

    def name_of(self, path: str) -> str:
        """The name by which a configuration's patterns know what stands at a path of the file.

        Where several parameters of a module are adapted, the layer of the first is innermost.
        """
        module, depth = path.replace(".base_layer", ""), path.count(".base_layer")
        entries = getattr(self.config, "target_parameters", None) or []
        if not entries or (self.config.target_modules and Selector(self.config.target_modules, "").find(module)):
            return module
        names = sorted({e.rpartition(".")[2] for e in entries if _ends(module, e)}, key=_order)
        return f"{module}.{names[-1 - depth]}" if depth < len(names) else module

    def without(self, keys: Iterable[str]) -> Part:
        """The part with these tensors left out."""
        left = set(keys)
        return Part(self.config, {k: v for k, v in self.state.items() if k not in left}, self.noted)


class Feature(NamedTuple):
    """Something that not every format can hold, and the keys of its tensors (none if it is not in tensors)."""

    name: str
    text: str
    keys: tuple[str, ...] = ()
    removable: bool = True  # what is left means the same without it


def _ends(module: str, entry: str) -> bool:
    """Whether a parameter of the module may be meant by an entry of `target_parameters`."""
    above = entry.rpartition(".")[0]
    return not above or module == above or module.endswith("." + above)


def _order(name: str) -> tuple[int, str]:
    """The order in which modules hold their parameters: experts have `down_proj` last."""
    return (1 if name.startswith("down") else 0, name)


def features(part: Part) -> list[Feature]:
    """Everything in a part beside plain low-rank factors of linear layers."""
    return [*_whole(part), *_by_layer(part), *_others(part)]


def _whole(part: Part) -> list[Feature]:
    """Features that change what the factors mean."""
    config, found = part.config, []

    def add(name: str, text: str) -> None:
        found.append(Feature(name, text, removable=False))

    if part.method != "LORA":
        add(part.method.lower(), f"the method {part.method}")
        return found
    if config.alora_invocation_tokens:
        add("alora", "aLoRA's invocation tokens")
    found += [
        Feature("variant", f"the variant of {name}", removable=False) for name in VARIANTS if getattr(config, name)
    ]
    init = str(config.init_lora_weights)
    if init.startswith(FROM_BASE):
        add("residual", f"a base changed by init_lora_weights={init!r}")
    if config.layer_replication:
        add("replication", "layer_replication")
    return found


def _by_layer(part: Part) -> list[Feature]:
    layers, _ = part.split()
    if part.method != "LORA":
        return [_feature("conv", "convolutions", [x for x in layers if any(t.dim() > 2 for t in x.tensors.values())])]
    stacked = [x for x in layers if _stacked(part, x)]
    rest = [x for x in layers if x not in stacked]
    text = "several matrices in one module (stacked experts, or an attention's packed projections)"
    found = [
        _feature("stacked", text, stacked),
        _feature("embedding", "embeddings", [x for x in rest if x.infix]),
        _feature("conv", "convolutions", [x for x in rest if not x.infix and x.factor("A").dim() > 2]),
    ]
    dora = [x for x in layers if x.magnitude is not None]
    if dora:
        found.append(Feature("dora", f"DoRA's magnitudes of {listing([x.path for x in dora], 3)}", removable=False))
    biased = [f"{x.path}.lora_B.bias" for x in layers if "lora_B.bias" in x.tensors]
    found.append(Feature("lora_bias", f"biases of B ({listing(biased, 3)})", tuple(biased)))
    return [f for f in found if f.keys or not f.removable]


def _stacked(part: Part, layer: Layer) -> bool:
    if ".base_layer" in layer.path or layer.path == "base_layer":
        return True
    expected = layer.settings.r
    if layer.rank == expected:
        return False
    if getattr(part.config, "target_parameters", None) and layer.rank % expected == 0:
        return True
    raise ConversionError(
        f"{layer.path!r} has rank {layer.rank} in the file and {expected} in the configuration, so its scaling is not "
        "known. Mend r or rank_pattern in adapter_config.json."
    )


def _feature(name: str, text: str, layers: list[Layer]) -> Feature:
    keys = tuple(join(x.path, k) for x in layers for k in x.tensors)
    return Feature(name, f"{text} ({listing([x.path for x in layers], 3)})", keys)


def _others(part: Part) -> list[Feature]:
    """Tensors that stand beside the method's own."""
    if part.method not in TENSORS:
        return []
    _, others = part.split()
    kinds: dict[str, list[str]] = {}
    for key in others:
        kinds.setdefault(_kind(key, part.config), []).append(key)
    return [Feature(name, f"{BESIDE[name]} ({listing(keys, 3)})", tuple(keys)) for name, keys in kinds.items()]


BESIDE = {
    "bias": "trained biases of the base",
    "tokens": "trained tokens",
    "training": "tensors that only training uses",
    "modules_to_save": "modules trained as a whole",
    "weights": "whole weights saved beside it, such as those of embeddings",
}


def _kind(key: str, config: Any) -> str:
    if "trainable_tokens_delta" in key:
        return "tokens"
    if any(name in key for name in TRAINING_ONLY):
        return "training"
    if key.endswith(".bias") and getattr(config, "bias", "none") != "none":
        return "bias"
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    return "modules_to_save" if saved and key.rpartition(".")[0].endswith(saved) else "weights"


def number(value: float) -> float:
    """A whole number as such."""
    return int(value) if float(value).is_integer() else float(value)


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a PEFT file without the prefix that a PeftModel gives."""
    return {key.removeprefix(PREFIX): value for key, value in state.items()}
