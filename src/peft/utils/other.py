"""Small helpers around torch and transformers models, under the names that other libraries import."""

from __future__ import annotations

import functools
import inspect
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..core.hub import is_local
from ..errors import nearest
from ..lazy import names
from .constants import TARGET_NAMES

_NAMES = {
    "peft.core.tokens": "TrainableTokensWrapper",
    "peft.core.wrappers": "AuxiliaryTrainingWrapper ModulesToSaveWrapper",
    "peft.core.defaults": """
        CONFIG_NAME EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME
        WEIGHTS_NAME""",
    "peft.utils.quantization_utils": "get_quantization_config",
    "peft.utils.constants": " ".join(["TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", *TARGET_NAMES]),
}
__getattr__, __dir__, _ = names(__name__, _NAMES)


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The weight as (out, in): turned if it is stored as (in, out). A Parameter stays a Parameter."""
    if not fan_in_fan_out:
        return weight
    if isinstance(weight, nn.Parameter):
        return nn.Parameter(weight.T, requires_grad=weight.requires_grad)
    return weight.T


def infer_device() -> str:
    """The kind of the first accelerator of this machine, or "cpu"."""
    for kind in ("cuda", "mps", "mlu", "xpu", "npu"):
        backend = getattr(torch.backends if kind == "mps" else torch, kind, None)
        if backend is not None and backend.is_available():
            return kind
    return "cpu"


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """Device, address and bytes of a tensor's storage: equal for tensors that share it."""
    if tensor.device.type == "meta":
        return tensor.device, id(tensor), tensor.nelement() * tensor.element_size()
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Decoder inputs from labels, (batch, length): one to the right behind the start token; -100 becomes
    padding.

    Raises ValueError if there is no padding token.
    """
    if pad_token_id is None:
        raise ValueError("pad_token_id is None, but it has to stand for ignored labels. Set it in the model's config.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters to `dtype`, trainable ones to float32, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.to(torch.float32 if parameter.requires_grad else dtype)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first pattern that matches a name or its end after a dot as a whole; else the name itself."""
    for pattern in pattern_keys:
        if match_target_against_key(pattern, key_to_match) or re.match(rf"(.*\.)?({pattern})$", key_to_match):
            return pattern
    return key_to_match


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """The match of a regular expression with the whole of a name."""
    return re.fullmatch(target_pattern, key)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a quantised model ready for adapters: freeze it, lift its other parameters to float32, checkpoint
    it.

    Arguments:
        model: the model; changed in place and returned.
        use_gradient_checkpointing: recompute activations in the backward pass.
        gradient_checkpointing_kwargs: arguments of the model's `gradient_checkpointing_enable`.
        auto_clear_cache: empty the accelerator's cache after lifting.
    """
    method = getattr(model, "quantization_method", None)
    loaded = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    others = method in ("gptq", "aqlm", "eetq", "hqq", "torchao") or getattr(model, "is_hqq_quantized", False)
    for parameter in model.parameters():
        parameter.requires_grad = False
    if not others:
        _lift(model)
        if auto_clear_cache:
            _clear_cache()
    if (loaded or others or getattr(model, "is_quantized", False)) and use_gradient_checkpointing:
        _checkpoint(model, gradient_checkpointing_kwargs or {})
    return model


def _lift(model: nn.Module) -> None:
    for parameter in model.parameters():
        half = parameter.dtype in (torch.float16, torch.bfloat16)
        if half and parameter.__class__.__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)


def _clear_cache() -> None:
    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            backend.empty_cache()


def _checkpoint(model: Any, arguments: dict[str, Any]) -> None:
    if arguments.get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(lambda m, x, y: y.requires_grad_(True))
    if "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters:
        chosen = {"use_reentrant": True, **arguments}  # torch asks for it to be said
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=chosen)
        return
    if arguments:
        warnings.warn(
            f"{type(model).__name__}.gradient_checkpointing_enable takes no gradient_checkpointing_kwargs; "
            f"{arguments} is ignored. Upgrade transformers.",
            FutureWarning,
            stacklevel=3,
        )
    model.gradient_checkpointing_enable()


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """A wrapping policy for FSDP: trainable leaves that are called by themselves, and the transformer's layers.

    The classes of the layers come from the variable FSDP_TRANSFORMER_CLS_TO_WRAP (comma separated), else from
    the model's `_no_split_modules`. Raises TypeError if the model has no module of such a class.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    wanted = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    class_names = wanted.split(",") if wanted else sorted(_get_no_split_modules(model))
    found = {type(m).__name__: type(m) for m in model.modules()}
    missing = [name for name in class_names if name not in found]
    if wanted and missing:
        raise TypeError(f"Could not find the transformer layer class {missing[0]!r} to wrap in the model.")
    classes = {found[name] for name in class_names if name in found}
    read = _read_only(model)
    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda m: id(m) not in read and _is_trainable_leaf(m))
    layers = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return functools.partial(_or_policy, policies=[leaves, layers])


def fully_shard_model(model: nn.Module, layer_classes: Sequence[str] | None = None, **kwargs: Any) -> nn.Module:
    """Spread a model's parameters over all processes with torch's `fully_shard` (FSDP2): layer by layer, then the rest.

    Adapters stay in the layer that they adapt. They may have another dtype than the base, and be frozen or not.

    Arguments:
        model: changed in place and returned; make the optimizer afterwards.
        layer_classes: names of the classes that are gathered one at a time; by default what the model declares in
            `_no_split_modules`.
        kwargs: for `fully_shard`: `mesh`, `mp_policy`, `reshard_after_forward`, `offload_policy` ...

    Raises ValueError for a class that the model has no module of.
    """
    from torch.distributed.fsdp import fully_shard

    wanted = set(layer_classes if layer_classes is not None else _get_no_split_modules(model))
    found = {type(m).__name__ for m in model.modules()}
    for name in sorted(wanted - found) if layer_classes is not None else ():
        raise ValueError(f"layer_classes names {name!r}, but the model has no such module.{nearest(name, found)}")
    layers = [m for m in model.modules() if type(m).__name__ in wanted and m is not model]
    for layer in reversed(layers):  # inner ones first
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)  # type: ignore[return-value]


def _read_only(model: nn.Module) -> set[int]:
    """Modules of adapters that are read and never called: units of their own would not be gathered for that."""
    from ..core.layer import BaseTunerLayer, tuner_layers

    found: set[int] = set()
    for _, layer in tuner_layers(model):
        for name, p in layer.adapters.items() if isinstance(layer, BaseTunerLayer) else ():
            called = hasattr(p.method, "through_modules") and layer.view.applied(layer.get_base_layer())
            homes = [home for key, home in layer._modules.items() if key != "base_layer" and name in home._modules]
            found.update(id(m) for home in homes if not called for m in home._modules[name].modules())
    return found


def _is_trainable_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and weight.requires_grad


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """The class names that a model and its parts declare as not to be split."""
    return {name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or [])}


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Parent, module and last segment of a module's path."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze every parameter whose name has the adapter's name in it."""
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad = False


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Activate an adapter in the auxiliary wrappers, where it has a part; switch the others off."""
    from ..core.wrappers import AuxiliaryTrainingWrapper

    wrappers: list[Any] = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for wrapper in wrappers:
        wrapper.set_adapter(adapter_name, inference_mode=inference_mode)


def _get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    """The first size of whichever input is given. Raises ValueError if none is."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return int(given.shape[0])


def _get_input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """The last segment of the path of the input embedding."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    embedding = model.get_input_embeddings()
    return next((name.rpartition(".")[2] for name, m in model.named_modules() if m is embedding), default)


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a name is the target, or ends with it after a dot."""
    return key == target_key or key.endswith("." + target_key)


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository on the Hugging Face Hub has a file; None if that cannot be found out."""
    if is_local(repo_id) or os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    try:
        from huggingface_hub import file_exists

        return bool(file_exists(repo_id, filename, **kwargs))
    except Exception as error:  # any failure of the network means: unknown
        warnings.warn(f"Could not ask the Hugging Face Hub for {filename} in {repo_id}: {error}", stacklevel=2)
        return None
