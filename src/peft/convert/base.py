"""The base model of a conversion, with its weights or without."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .names import Base
from .part import ConversionError


def load_base(base: Base, component: str = "") -> nn.Module:
    """The model with its weights, on the CPU; a model in memory is copied."""
    model = base.models.get(base.place(component))
    return build_model(base, component) if model is None else copy.deepcopy(model)


def build_model(base: Base, component: str = "", meta: bool = False, name: str | None = None) -> nn.Module:
    """The model of a folder, by the class that its `config.json` names.

    Arguments:
        base: the base.
        component: which model of a pipeline.
        meta: make it on the meta device, and read no weights.
        name: another class of the same library, if it is there.

    Raises ConversionError if the file names no class, or the class cannot be had.
    """
    config, folder = base.config(component), base.path(component)
    own = config.get("_class_name")  # as diffusers writes it
    names = [own] if own else config.get("architectures") or []
    if not names:
        raise ConversionError(f"{folder / 'config.json'} names no class of model. Give the folder of a whole model.")
    try:
        library: Any = import_module("diffusers" if own else "transformers")
        kind = _class(library, name) or _class(library, names[0])
        if kind is None:
            raise ValueError(f"{library.__name__} {library.__version__} has no class of models of that name")
        if not meta:
            return kind.from_pretrained(folder).eval()
        settings = config if own else library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return kind.from_config(settings) if own else kind(settings)
    except (ImportError, AttributeError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConversionError(unmade(str(names[0]), folder, error)) from error


def _class(library: Any, name: Any) -> Any:
    """The model class of a name that a file gives; nothing else of a library is ever called by it."""
    found = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def unmade(name: str, folder: Any, error: Exception) -> str:
    """Why a base model cannot be made, in one line: libraries list all that they know."""
    cause = str(error).strip().partition("\n")[0][:300].rstrip(" .")
    return (
        f"The base model {name} of {folder} cannot be made: {cause}. Update its library, or pass the model itself, "
        "made on the meta device, from Python (`base=model`)."
    )
