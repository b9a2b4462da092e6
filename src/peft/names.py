"""The names that adapters may have."""

from __future__ import annotations

import os
import warnings

from torch import nn

from .config import PeftConfig
from .errors import PeftError
from .registry import lookup

CONTAINERS = (nn.ModuleDict, nn.ParameterDict)


class AdapterNameError(PeftError, ValueError, KeyError):
    """A name that no adapter can have."""

    __str__ = Exception.__str__  # a KeyError would print the quoted text


def check_adapter_name(name: str) -> None:
    """Refuse names that cannot be part of a parameter's name."""
    if not isinstance(name, str):
        raise TypeError(f"An adapter's name is a string, but got {type(name).__name__}.")
    if not name:
        raise AdapterNameError("An adapter's name may not be empty. Use a name such as 'default'.")
    if "." in name:
        raise AdapterNameError(
            f"The adapter name {name!r} contains a dot. Names become part of parameter names, where a dot separates "
            f"modules: use {name.replace('.', '_')!r}, for example."
        )
    if "\0" in name or os.path.isabs(name):
        raise AdapterNameError(
            f"The adapter name {name!r} is no name of a folder below the one that adapters are saved in. Use one "
            "without a slash at its start, and without null characters."
        )
    if any(hasattr(kind, name) for kind in CONTAINERS) or name == "training":
        raise AdapterNameError(
            f"The adapter name {name!r} is an attribute of the torch modules that hold adapters by name, so they "
            f"cannot hold one of that name. Use another, such as {name + '_1'!r}."
        )


def warn_about_name(name: str, config: PeftConfig) -> None:
    """Warn where a name is part of the method's own prefix, which confuses other programs that read names."""
    prefix = lookup(config.peft_type).prefix or ""  # type: ignore[arg-type]
    if name in prefix:
        text = f"The adapter name {name!r} should not be contained in the prefix {prefix!r} of the method's tensors."
        warnings.warn(text, stacklevel=3)
