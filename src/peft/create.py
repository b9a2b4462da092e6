"""Making models with adapters: `get_peft_model` and `inject_adapter_in_model`.

The core is imported when the first model is made, not when the functions are.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .config import PeftConfig, check_config
from .errors import IncompleteError
from .names import check_adapter_name, warn_about_name
from .registry import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, config_class, tuner_class
from .types import plain

if TYPE_CHECKING:
    from .model import PeftModel


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration that a dictionary describes; `peft_type` names its class."""
    if "peft_type" not in config_dict:
        raise IncompleteError("config_dict has no 'peft_type', which says of which method it is, such as 'LORA'.")
    return config_class(config_dict["peft_type"])(**config_dict)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter on a model; the model's targeted layers are replaced in place.

    Arguments:
        model: the base model.
        peft_config: the adapter's configuration; its task type chooses the class that is returned.
        adapter_name: its name, without a dot.
        mixed: make a PeftMixedModel, whose `set_adapter` takes several names. Any model can mix methods.
        autocast_adapter_dtype: keep half-precision adapter parameters in float32.
        revision: the revision of the base model, noted in the configuration.
        low_cpu_mem_usage: make the adapter on the meta device (its weights are loaded next).
    """
    from .core.host import hosts
    from .mixed_model import PeftMixedModel
    from .model import PeftModel

    _check_model(model)
    check_config(peft_config)
    check_adapter_name(adapter_name)
    tuner_class(_method(peft_config))  # a method of a later release is refused before any change
    _note_origin(model, peft_config, revision)
    if hosts(model):
        warnings.warn(
            "The model has adapter layers already; a second PeftModel is put around them. Use `add_adapter` for a "
            "second adapter, or `unload()` first to get the base model back.",
            stacklevel=2,
        )
    warn_about_name(adapter_name, peft_config)
    usual = PeftMixedModel if mixed else PeftModel
    kind = usual if mixed else MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, usual)  # type: ignore[arg-type]
    return kind(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put adapter layers into a model, which is changed and returned itself, without a PeftModel around it.

    The adapter has the dtype of the weights; `peft.functional.cast_adapter_dtype` makes float32 of half precision.

    Arguments:
        peft_config: the adapter's configuration.
        model: any model; it gets the attribute `peft_config`.
        adapter_name: the adapter's name, without a dot.
        low_cpu_mem_usage: make the adapter on the meta device.
        state_dict: adapt exactly the modules that these keys name (the weights are not loaded).

    Raises ValueError for methods that need a PeftModel.
    """
    _check_model(model)
    check_config(peft_config)
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError("Prompt learning and adaption prompts are no layers to inject. Use `get_peft_model`.")
    check_adapter_name(adapter_name)
    tuner = tuner_class(_method(peft_config))
    if tuner.uses_shared_state:
        raise ValueError(f"{tuner.__name__} shares tensors between layers, which only a PeftModel can hold.")
    from .core.snapshot import placing

    with placing(model) as undo:
        tuner(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict, undo=undo)
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, but is {type(model).__name__}. Load the base model first.")


def _method(config: PeftConfig) -> str:
    return plain(config.peft_type)


def _note_origin(model: nn.Module, config: PeftConfig, revision: str | None) -> None:
    """Write the base model's name and revision into the configuration; warn where that changes it."""
    old, new = config.base_model_name_or_path, model.__dict__.get("name_or_path") or _named(model)
    config.base_model_name_or_path = new
    if old and old != new:  # transformers writes "" for a model without a name
        warnings.warn(f"base_model_name_or_path was {old!r} and is now {new!r}, the model's.", stacklevel=3)
    if revision is None:
        return
    if config.revision is not None and config.revision != revision:
        warnings.warn(f"revision was {config.revision!r} in the configuration and is now {revision!r}.", stacklevel=3)
    config.revision = revision


def _named(model: nn.Module) -> str | None:
    """The model's `name_or_path`, or None if it has none or an empty one."""
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None
