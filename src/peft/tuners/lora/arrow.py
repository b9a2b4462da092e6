"""Arrow under the path that other libraries import: making a model that routes each token among saved adapters."""

from __future__ import annotations

import os
from typing import Any

from ...config import PeftConfig
from ...methods.lora.arrow import ROUTER
from ...methods.lora.config import ArrowConfig, LoraConfig
from ...model import PeftModel
from ...registry import MODEL_CLASSES, load
from ...types import plain

__all__ = ["create_arrow_model"]


def create_arrow_model(
    base_model: Any,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model with saved LoRA adapters as experts, and a router among them that is active.

    Arguments:
        base_model: the model that the experts were trained for.
        task_specific_adapter_paths: folders or repositories of the experts, named task_0, task_1 ...; of a
            repository the first two parts are its name, the rest a folder in it.
        arrow_config: how tokens are routed.
        general_adapter_paths: of adapters whose mean is taken from every expert's, named gks_0 ...; needed with
            `use_gks`.
        adapter_kwargs: arguments for loading, such as `revision` or `token`.

    Raises ValueError for missing or differing experts, TypeError for experts on layers that are not linear.
    """
    if not task_specific_adapter_paths:
        raise ValueError("`task_specific_adapter_paths` is empty. Give the folders of the adapters to route among.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("use_gks=True needs `general_adapter_paths`, the folders of the general adapters.")
    experts = {f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    general = {f"gks_{i}": path for i, path in enumerate(general_adapter_paths or ())} if arrow_config.use_gks else {}
    places = {name: _place(path, adapter_kwargs) for name, path in {**experts, **general}.items()}
    configs = {name: PeftConfig.from_pretrained(path, **more) for name, (path, more) in places.items()}
    first = _same(configs)
    kind = load(MODEL_CLASSES[first.task_type]) if first.task_type in MODEL_CLASSES else PeftModel
    model = None
    for name, (path, more) in places.items():
        if model is None:
            model = kind.from_pretrained(base_model, path, name, **more)
        else:
            model.load_adapter(path, name, **more)
    assert model is not None
    arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(experts), list(general)
    router = LoraConfig(
        r=first.r, target_modules=first.target_modules, task_type=first.task_type, arrow_config=arrow_config
    )  # fmt: skip
    model.add_adapter(ROUTER, router)
    model.set_adapter(ROUTER)
    return model


def _place(path: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(folder or repository, arguments for loading)."""
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "adapter_config.json")):
            raise ValueError(f"{path!r} has no adapter_config.json, so it is no adapter's folder.")
        return path, kwargs
    parts = path.strip("/").split("/")
    folder = "/".join(parts[2:])
    return "/".join(parts[:2]), {**kwargs, **({"subfolder": folder} if folder else {})}


def _same(configs: dict[str, Any]) -> Any:
    """The first configuration, which all have to agree with."""
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        if not isinstance(config, LoraConfig):
            raise ValueError(f"{name} is a {plain(config.peft_type)} adapter. Arrow routes among LoRA adapters.")
        for field in ("r", "target_modules"):
            here, there = getattr(config, field), getattr(first, field)
            if (set(here) if isinstance(here, (list, set)) else here) != (
                set(there) if isinstance(there, (list, set)) else there
            ):
                raise ValueError(
                    f"{name} has {field}={here!r}, but {first_name} has {there!r}. Arrow needs experts of one rank on "
                    "the same layers."
                )
    return first
