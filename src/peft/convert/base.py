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
        kind = getattr(library, str(name), None) or getattr(library, names[0])
        if not meta:
            return kind.from_pretrained(folder).eval()
        settings = config if own else library.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return kind.from_config(settings) if own else kind(settings)
    except (ImportError, AttributeError, OSError) as error:
        raise ConversionError(f"The base model {names[0]} of {folder} cannot be made: {error}") from error
