"""File names, default targets per architecture, and other constants."""

from __future__ import annotations

from typing import Any

from .. import import_utils
from ..core import defaults
from ..core.defaults import (
    CONFIG_NAME,
    DUMMY_MODEL_CONFIG,
    DUMMY_TARGET_MODULES,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SAFETENSORS_WEIGHTS_NAME,
    SEQ_CLS_HEAD_NAMES,
    TOKENIZER_CONFIG_NAME,
    WEIGHTS_NAME,
)
from ..lazy import announce

announce(__name__)

__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "WEIGHTS_NAME",
]

# Methods whose targets have a public name TRANSFORMERS_MODELS_TO_<method>_TARGET_MODULES_MAPPING.
METHODS_WITH_TARGETS = [
    "ADALORA",
    "ADAMSS",
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LILY",
    "LNTUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OFT",
    "OSF",
    "PEANUT",
    "POLY",
    "PSOFT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
]
TARGET_NAMES = {f"TRANSFORMERS_MODELS_TO_{m}_TARGET_MODULES_MAPPING": m for m in METHODS_WITH_TARGETS}
TARGET_NAMES["TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"] = "IA3_FEEDFORWARD_MODULES"

TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}  # caches need no reordering any more


def __getattr__(name: str) -> Any:
    if name in TARGET_NAMES:
        value: Any = defaults.targets_by_model_type(TARGET_NAMES[name])
    elif name in ("ALLOWED_COMPUTE_DTYPES", "UPCAST_DTYPES"):
        value = _dtypes(getattr(defaults, name.removesuffix("S") + "_NAMES"))
    elif name == "is_transformers_le_4_53":
        value = getattr(import_utils, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _dtypes(names: tuple[str, ...]) -> tuple[Any, ...]:
    """The dtypes of these names that this torch has."""
    import torch

    return tuple(getattr(torch, name) for name in names if hasattr(torch, name))
