"""Which optional packages are there, found without importing them."""

from __future__ import annotations

import operator
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version

from .lazy import announce

announce(__name__)


@lru_cache
def _has(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


@lru_cache
def _version(distribution: str) -> Version | None:
    try:
        return Version(version(distribution))
    except PackageNotFoundError:
        return None


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _has("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes has 4-bit layers."""
    found = _version("bitsandbytes")
    return is_bnb_available() and found is not None and found >= Version("0.39")


def is_gptqmodel_available() -> bool:
    """Whether gptqmodel is installed."""
    return _has("gptqmodel")


def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return _has("optimum")


def is_aqlm_available() -> bool:
    """Whether aqlm is installed."""
    return _has("aqlm")


def is_eetq_available() -> bool:
    """Whether eetq is installed."""
    return _has("eetq")


def is_hqq_available() -> bool:
    """Whether hqq is installed."""
    return _has("hqq")


def is_inc_available() -> bool:
    """Whether Intel's neural compressor is installed."""
    return _has("neural_compressor")


def is_torchao_available() -> bool:
    """Whether torchao is installed."""
    return _has("torchao")


def is_te_available() -> bool:
    """Whether NVIDIA's transformer engine is installed."""
    return _has("transformer_engine")


def is_te_pytorch_available() -> bool:
    """Whether NVIDIA's transformer engine is installed with its part for torch."""
    return is_te_available() and _has("transformer_engine.pytorch")


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _has("diffusers")


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed."""
    return _has("torch_xla")


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch has an Intel GPU."""
    import torch

    return hasattr(torch, "xpu") and torch.xpu.is_available()


def __getattr__(name: str) -> bool:
    """`is_<package>_ge_v5_1_0` and `is_<package>_le_4_53`: comparisons with the installed version."""
    found = re.fullmatch(r"is_(transformers|torchao)_(ge|le)_v?(\d+(?:_\d+)*)", name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, relation, number = found.groups()
    installed = _version(package)
    if installed is None:
        return False
    wanted = Version(number.replace("_", "."))
    if relation == "le":  # every patch of a version counts as that version
        return installed.release[: len(wanted.release)] <= wanted.release
    return operator.ge(Version(installed.base_version), wanted)
