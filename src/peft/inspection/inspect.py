"""What an adapter's folder holds, without a base model: its configuration, its tensors, and what is wrong with them."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..config import PeftConfig
from ..convert.part import Part
from ..core.checkpoint import open_adapter
from ..core.defaults import CONFIG_NAME
from ..core.entries import PREFIX
from ..core.files import CONFIG_HASH, Saved, config_hash
from ..core.fingerprint import HASH
from ..core.hub import fetch
from ..core.pattern import settings
from ..errors import nearest
from ..registry import METHODS, config_class
from ..types import PeftType
from .problems import problems_of
from .report import Inspection, Problem, TargetInfo, TensorInfo, UnreadableAdapterError


def inspect_adapter(adapter: str | os.PathLike[str], **download: Any) -> Inspection:
    """Look into an adapter's folder, or a repository on the hub. The base model is not needed.

    Arguments:
        adapter: the folder, or the name of the repository.
        download: `subfolder`, `revision`, `token` ... of a repository.

    Raises UnreadableAdapterError for files that are missing, damaged, or of no known method.
    """
    name = os.fspath(adapter)
    values, config, problems = read_config(name, **download)
    saved, state = read_tensors(name, **download)
    problems += _changed(saved, values)
    tensors = [_info(k, v) for k, v in state.items()]
    state = {k.removeprefix(PREFIX): v for k, v in state.items()}
    found = Inspection(
        path=name,
        method=str(values["peft_type"]),
        base_model=values.get("base_model_name_or_path"),
        fingerprint=saved.metadata.get(HASH),
        task_type=values.get("task_type"),
        peft_version=values.get("peft_version"),
        config=_told(values, config),
        parameters=sum(t.numel() for t in state.values()),
        bytes=sum(t.bytes for t in tensors),
        dtypes=dict(Counter(t.dtype for t in tensors)),
        tensors=tensors,
        problems=problems,
    )
    groups, found.others = grouped(state, found.method)
    found.targets = [_target(path, parts, config, found.method) for path, parts in groups.items()]
    found.problems += problems_of(config, groups, found, state)
    return found


def read_config(adapter: str, **download: Any) -> tuple[dict[str, Any], Any, list[Problem]]:
    """(the file's fields, the configuration, the fields that are not known)."""
    try:
        path = fetch(adapter, CONFIG_NAME, **download)
        values = PeftConfig.from_json_file(path)
        kind = config_class(str(values.get("peft_type")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = {f.name for f in fields(kind) if f.init}
            config = kind.from_peft_type(**{k: v for k, v in values.items() if k in known})
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        raise UnreadableAdapterError(f"The configuration of {adapter} cannot be used: {error}") from error
    unknown = [k for k in values if k not in known and k != "runtime_config"]
    texts = {k: f"the configuration has {k}={values[k]!r}, which is not known{nearest(k, known)}" for k in unknown}
    return values, config, [Problem("unknown field", text, bool(values[k])) for k, text in texts.items()]


def read_tensors(adapter: str, **download: Any) -> tuple[Saved, dict[str, Tensor]]:
    """(the files, the tensors by key)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not finite is among the problems
            saved = open_adapter(adapter, **download)
            state = saved.read()
    except (OSError, TypeError, ValueError) as error:
        raise UnreadableAdapterError(str(error)) from error
    return saved, state


def grouped(state: Mapping[str, Tensor], method: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({module: {name of a tensor: tensor}}, the keys of all other tensors)."""
    prefix = METHODS[PeftType(method)].prefix
    groups: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, value in state.items():
        parts = key.split(".")
        at = next((i for i in range(len(parts) - 1, -1, -1) if prefix and parts[i].startswith(prefix)), None)
        if at is None:
            others.append(key)
        else:
            groups.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = value
    return groups, others


def _info(key: str, t: Tensor) -> TensorInfo:
    numbers = t.float() if t.element_size() == 1 or not t.is_floating_point() else t
    good = torch.isfinite(numbers)
    finite = bool(good.all())
    kept = numbers if finite else numbers[good]
    norm = float(torch.linalg.vector_norm(kept.double())) if kept.numel() else 0.0
    zero = finite and bool(t.numel()) and not bool(t.any())
    name = str(t.dtype).removeprefix("torch.")
    return TensorInfo(key, tuple(t.shape), name, t.numel() * t.element_size(), norm, finite, zero)


def _told(values: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The fields of the file that are not what they would be anyway."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            usual = type(config)().to_dict()
    except (TypeError, ValueError):  # some field has no usual value
        usual = {}
    return {k: v for k, v in sorted(values.items()) if k not in usual or _plain(usual[k]) != v}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda v: sorted(v) if isinstance(v, set | frozenset) else str(v)))


def _changed(saved: Saved, values: dict[str, Any]) -> list[Problem]:
    noted = saved.metadata.get(CONFIG_HASH)
    if noted is None or noted == config_hash(values):
        return []
    text = "adapter_config.json is not the one that was saved with the weights: it has been edited since, or is another"
    return [Problem("changed", text, serious=False)]


def _target(path: str, parts: Mapping[str, Tensor], config: Any, method: str) -> TargetInfo:
    count = sum(t.numel() for t in parts.values())
    own = settings(config, Part(config, {}).name_of(path))
    alpha, r = getattr(own, "lora_alpha", getattr(own, "alpha", None)), getattr(own, "r", None)
    scaling = None
    if method in ("LORA", "LOHA", "LOKR") and isinstance(alpha, int | float) and isinstance(r, int):
        scaling = alpha / (math.sqrt(r) if getattr(own, "use_rslora", False) else r)
    norm = None if scaling is None else _product_norm(parts, scaling, r)
    stacked = norm is None and getattr(config, "target_parameters", None)  # tensors have r times as many rows
    return TargetInfo(path, tuple(parts), count, r if stacked else _rank(parts, r), alpha, scaling, norm)


def _rank(parts: Mapping[str, Tensor], r: Any) -> int | None:
    for key in ("lora_A.weight", "lora_embedding_A", "lora_A", "hada_w1_b"):
        if key in parts and parts[key].dim():
            return int(parts[key].shape[0])
    return r if isinstance(r, int) else None


def _product_norm(parts: Mapping[str, Tensor], scaling: float, r: Any) -> float | None:
    """The norm of s B A by the small squares of its factors; None for other updates, and for several in one."""
    for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        A, B = parts.get(a), parts.get(b)
        if A is not None and B is not None and min(A.dim(), B.dim()) > 1 and A.shape[0] == r:
            A, B = A.double().flatten(1), B.double().flatten(1)
            if A.shape[0] != B.shape[1]:
                return None
            return abs(scaling) * math.sqrt(max(float(((B.mT @ B) * (A @ A.mT)).sum()), 0.0))
    return None
