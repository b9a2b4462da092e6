"""A model's modules without its numbers: made from config.json, given, or guessed from the names of the tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.buffers import tensors_below
from ..errors import PeftWarning, report
from ..types import plain
from .shards import CheckpointError, Stored

CONFIG = "config.json"
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # with one row for each class


def skeleton(base: Path, tensors: Mapping[str, Stored], config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The model on the meta device, for the task that the adapter was trained for.

    Arguments:
        base: folder of the base model.
        tensors: its tensors by key.
        config: the adapter's configuration.
        shapes: the shapes of the adapter's tensors by key.
    """
    stated = read_config(base)
    kind, settings = known(base, stated, config)
    if kind is None:
        return guessed(base, tensors, config, shapes)
    rows = _classes(shapes, tensors)
    if rows is not None and getattr(settings, "num_labels", rows) != rows:
        settings.num_labels = rows
    with torch.device("meta"):
        try:
            return kind._from_config(settings, attn_implementation="eager")
        except (ValueError, ImportError, TypeError, AttributeError):
            return kind(settings)


def read_config(base: Path) -> dict[str, Any]:
    """What config.json says; nothing where there is none."""
    file = base / CONFIG
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}). Download or copy it again.") from error
    return found if isinstance(found, dict) else {}


def known(base: Path, stated: dict[str, Any], config: Any) -> tuple[Any, Any]:
    """transformers' class of the model that an adapter was trained on, and the model's configuration.

    (None, None) where transformers does not know the model; raises CheckpointError for settings that cannot be.

    Arguments:
        base: folder of the base model.
        stated: what its config.json says.
        config: the adapter's configuration.
    """
    if "model_type" not in stated:
        return None, None
    try:
        import transformers
    except ImportError:
        return None, None
    try:
        settings = transformers.AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what a settings' own check raises is of huggingface_hub, and no ValueError
        if stated["model_type"] not in transformers.CONFIG_MAPPING and isinstance(
            error, (ValueError, OSError, KeyError)
        ):
            return None, None
        cause = " ".join(str(error).split())[:300].rstrip(" .")
        raise CheckpointError(
            f"{base / CONFIG} describes no {stated['model_type']} that transformers {transformers.__version__} can "
            f"make: {cause}. Copy it from the model again."
        ) from error
    names = [n for n in stated.get("architectures") or () if isinstance(n, str)]
    own = _model_class(transformers, names[0]) if names else None
    return _for_task(transformers, own, settings, config), settings


def _for_task(transformers: Any, own: Any, settings: Any, config: Any) -> Any:
    """The class that the adapter was trained on: the checkpoint's own, or that of the task's head."""
    task = plain(config.task_type)
    named = _model_class(transformers, (config.auto_mapping or {}).get("base_model_class"))
    auto = getattr(transformers, TASKS.get(task, ""), None)
    usual = auto._model_mapping.get(type(settings), None) if auto is not None else named
    usual = usual[0] if isinstance(usual, (tuple, list)) else usual
    if usual is None or (own is not None and task in GENERATING and own.__name__ != f"{_stem(usual)}Model"):
        return own
    return usual


def _model_class(transformers: Any, name: Any) -> Any:
    """The model class of a name that a file gives; nothing else of transformers is ever called by it."""
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _stem(kind: type) -> str:
    name = kind.__name__
    return next((name[: name.index(mark)] for mark in ("For", "LMHead", "Model") if mark in name), name)


def _classes(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Stored]) -> int | None:
    """How many classes a head of the adapter's own tells apart."""
    heads = (s for k, s in shapes.items() if k.endswith(HEADS) and not any(k.endswith(f".{n}") for n in tensors))
    return next((s[0] for s in heads if len(s) == 2), None)


def emptied(model: nn.Module) -> nn.Module:
    """A copy of a model without its numbers; buffers that files do not hold stay."""
    memo: dict[int, Any] = {}
    for owner, _, attr in tensors_below(model):
        tensor = getattr(owner, attr)
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


# Where no class is known ------------------------------------------------------------------------------------


def guessed(base: Path, tensors: Mapping[str, Stored], config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Modules from the names and shapes of tensors: matrices are linear layers, or embeddings if the adapter says so.

    Raises CheckpointError where the adapter's configuration asks for what shapes do not tell.
    """
    asked = [n for n in ("target_parameters", "fan_in_fan_out", "layer_replication") if getattr(config, n, None)]
    if asked:
        raise CheckpointError(
            f"The class of the model in {base} is not known here, and {asked[0]}={getattr(config, asked[0])!r} needs "
            "it. Call `merge_checkpoint(..., model=...)` with a model of the class (on the meta device, say)."
        )
    text = (
        f"The class of the model in {base} is not known here: matrices are taken for linear layers, or embeddings "
        "where the adapter's tensors say so. Pass the model itself (`model=...`) to be sure."
    )
    report(PeftWarning, text, strict=False, stacklevel=5)
    root = nn.Module()
    embeddings = [k.rpartition(".lora_embedding_A")[0] for k in shapes if ".lora_embedding_A" in k]
    paths = {key.rpartition(".")[0]: None for key in tensors}
    for path in sorted(paths, key=lambda p: p.count(".")):
        own = {k.rpartition(".")[2]: s for k, s in tensors.items() if k.rpartition(".")[0] == path}
        _put(root, path, _module(own, any(f".{e}".endswith(f".{path}") for e in embeddings)))
    return root


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *above, leaf = path.split(".")
    owner = root
    for name in above:
        if name not in owner._modules:
            owner._modules[name] = nn.Module()
        owner = owner._modules[name]  # type: ignore[assignment]
    if not path:
        root._parameters.update(module._parameters)
    elif leaf in owner._modules:
        owner._modules[leaf]._parameters.update(module._parameters)  # type: ignore[union-attr]
    else:
        owner._modules[leaf] = module


def _module(own: Mapping[str, Stored], embedding: bool) -> nn.Module:
    """A module with these tensors; as a layer where their shapes are those of one."""
    weight = own.get("weight")
    layer = nn.Module()
    if weight is not None and set(own) <= {"weight", "bias"} and 2 <= len(weight.shape) <= 5:
        layer = _layer(weight.shape, "bias" in own, embedding)
    for attr, stored in own.items():
        value = stored.empty()
        if stored.dtype.is_floating_point:
            layer._parameters[attr] = nn.Parameter(value, requires_grad=False)
        else:
            layer.register_buffer(attr, value)
    return layer


def _layer(shape: tuple[int, ...], bias: bool, embedding: bool) -> nn.Module:
    out, inp, *kernel = shape
    if kernel:
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
        return conv(inp, out, tuple(kernel), bias=bias, device="meta")
    return nn.Embedding(out, inp, device="meta") if embedding else nn.Linear(inp, out, bias, device="meta")


def named_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every parameter and saved buffer by each of its names: (module, attribute)."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        saved = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        for attr in (*module._parameters, *saved):
            if held(module, attr) is not None:
                found[f"{path}.{attr}" if path else attr] = (module, attr)
    return found


def held(module: nn.Module, attr: str) -> Any:
    """The parameter or buffer."""
    value = module._parameters.get(attr)
    return module._buffers.get(attr) if value is None else value


def renamed(keys: Collection[str], names: Collection[str], key: str) -> str | None:
    """The one name of the model that a key can mean, with parts before it added or left out; None if there are more."""
    if key in names:
        return key
    longer = [n for n in names if n.endswith(f".{key}") and n not in keys]
    shorter = [n for n in names if key.endswith(f".{n}") and n not in keys]
    return (longer + shorter)[0] if len(longer + shorter) == 1 else None
