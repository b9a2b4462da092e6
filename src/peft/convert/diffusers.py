"""`pytorch_lora_weights.safetensors` as diffusers writes and loads it: one file for all models of a pipeline.

    unet.down_blocks.1. ... .to_q.lora_A.weight, .lora_B.weight

The metadata `lora_adapter_metadata` holds the fields of each model's LoraConfig, with the same prefixes, so ranks and
scalings are exact. Without it diffusers takes the ranks of the tensors, and alpha from `.alpha` or else equal to the
rank. Source: diffusers' documentation of LoRA loading, and files that its 0.42 has written and loaded.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.entries import join
from ..errors import PeftError, listing
from ..registry import config_class
from .build import config_for
from .format import Format, Options, Report, Source, write_safetensors
from .part import COMPONENTS, LORA, MAGNITUDE, ConversionError, Part, features, number

METADATA = "lora_adapter_metadata"
OLDER = (  # endings of earlier versions of diffusers
    (re.compile(r"\.processor\.(\w+?)_lora\.(down|up)\.weight$"), r".\1.lora.\2.weight"),
    (re.compile(r"\.to_out\.lora\.(down|up)\.weight$"), r".to_out.0.lora.\1.weight"),
    (re.compile(r"\.(?:lora|lora_linear_layer)\.down\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.(?:lora|lora_linear_layer)\.up\.weight$"), ".lora_B.weight"),
)
UNKNOWN_TO_THE_PEER = ("module_config",)


class Diffusers(Format):
    """One file with the prefixes of a pipeline's models."""

    name = "diffusers"
    text = "pytorch_lora_weights.safetensors of diffusers"
    holds = frozenset({"conv", "embedding", "dora", "lora_bias"})
    suffix, file_name, whole_pipeline = ".safetensors", "pytorch_lora_weights.safetensors", True

    def recognises(self, source: Source) -> bool:
        ends = (
            "lora_A.weight",
            "lora_embedding_A",
            "lora.down.weight",
            "lora_linear_layer.down.weight",
            "_lora.down.weight",
        )
        return not source.parts and any(key.endswith(ends) and not key.startswith("lora_") for key in source.keys)

    def why(self, feature: str) -> str:
        return "" if feature in ("loha", "lokr") else "diffusers loads factors, biases of B and magnitudes only."

    # ---- writing -----------------------------------------------------------------------------------------------

    def write(self, parts: Mapping[str, Part], out: Path, options: Options, report: Report) -> None:
        state = {f"{component}.{k}": t for component, part in parts.items() for k, t in part.state.items()}
        fields = {f"{c}.{name}": v for c, part in parts.items() for name, v in _fields(part).items()}
        text = json.dumps(dict(sorted(fields.items())), indent=2, default=sorted)  # tables stay in their order
        write_safetensors(self.place(out), state, {METADATA: text}, report)

    # ---- reading -----------------------------------------------------------------------------------------------

    def read(self, source: Source, options: Options) -> dict[str, Part]:
        state = {renamed(k): v for k, v in source.state.items()}
        given = _metadata(source)
        single = options.component or ""
        components = dict.fromkeys(component_of(key, single) for key in state)
        parts = {}
        for component in components:
            prefix = f"{component}." if any(k.startswith(f"{component}.") for k in state) else ""
            own = {k.removeprefix(prefix): v for k, v in state.items() if component_of(k, single) == component}
            fields = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
            parts[component] = _with(fields, own) if fields else _guessed_by_tensors(own)
        return parts


def component_of(key: str, single: str) -> str:
    """The model that a key belongs to: by its first name, or `single` for files of one model."""
    first = key.partition(".")[0]
    return first if first in COMPONENTS else single


def renamed(key: str) -> str:
    """A key of an older version as today's."""
    for pattern, new in OLDER:
        key = pattern.sub(new, key)
    return key


def _fields(part: Part) -> dict[str, Any]:
    """The fields that diffusers makes a LoraConfig of."""
    values = part.config.to_dict()
    if values.get("module_config"):
        layers, _ = part.split()
        values = config_for(
            "LORA",
            {x.path: x.rank for x in layers},
            {x.path: x.scaling * x.rank for x in layers},
            use_dora=any(f.name == "dora" for f in features(part)),
            lora_bias=any(f.name == "lora_bias" for f in features(part)),
        ).to_dict()
    if values["target_modules"] in (None, "all-linear"):  # which mean something in models of transformers only
        values["target_modules"] = sorted(x.path for x in part.split()[0])
    return {k: v for k, v in values.items() if k not in UNKNOWN_TO_THE_PEER}


def _metadata(source: Source) -> dict[str, Any]:
    text = source.metadata.get(METADATA, "")
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ConversionError(f"The metadata {METADATA!r} of {source.file} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConversionError(f"The metadata {METADATA!r} of {source.file} is no JSON object.")
    return found


def _with(fields: dict[str, Any], state: dict[str, Tensor]) -> Part:
    """A part by the configuration that the file states."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Unexpected keyword")
            config = config_class("LORA").from_peft_type(**{**fields, "peft_type": "LORA"})
    except (Warning, PeftError, TypeError, ValueError) as error:
        raise ConversionError(f"The metadata of the file is no configuration of a LoRA: {error}") from error
    config.inference_mode = True
    return Part(config, state)


def _guessed_by_tensors(state: dict[str, Tensor]) -> Part:
    """A part by its tensors: ranks are theirs, alpha is told or the rank."""
    tensors = {k: v for k, v in state.items() if not k.endswith(".alpha")}
    paths = {k.removesuffix(".lora_A.weight"): v.shape[0] for k, v in tensors.items() if k.endswith(".lora_A.weight")}
    strange = [k for k in tensors if not any(k == join(p, n) for p in paths for n in (*LORA, *MAGNITUDE))]
    lost = [k for k in state if k.endswith(".alpha") and k.removesuffix(".alpha") not in paths]
    if strange or lost:
        raise ConversionError(f"Tensors of the file that belong to no factors: {listing([*strange, *lost], 4)}.")
    alphas = {p: number(float(state[f"{p}.alpha"])) if f"{p}.alpha" in state else r for p, r in paths.items()}
    config = config_for(
        "LORA",
        paths,
        alphas,
        use_dora=any(k.endswith(MAGNITUDE) for k in tensors),
        lora_bias=any(k.endswith("lora_B.bias") for k in tensors),
    )
    return Part(config, tensors)
