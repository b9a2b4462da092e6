"""Checkpoints whose weights are packed numbers: told by config.json, or by the tensors that go with such weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import listing
from .shards import CheckpointError, Stored

# What ends the names of tensors that belong to packed weights, and who writes them.
MARKS = {
    r"\.weight\.quant_state\.bitsandbytes__\w+": "bitsandbytes, 4 bits",
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map)": "bitsandbytes, 4 bits",
    r"\.(SCB|weight_format)": "bitsandbytes, 8 bits",
    r"\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
    r"\.(weight_packed|weight_shape|weight_zero_point)": "compressed-tensors",
    r"_proj_(blocks|scales)": "MXFP4",
}
SCALE = re.compile(r"\.(weight)_scale(_inv|_2)?$")  # beside numbers of one byte


def _kind(key: str, tensors: Mapping[str, Stored]) -> str | None:
    """Who packs weights with such a tensor."""
    weight = tensors.get(SCALE.sub(r".\1", key)) if SCALE.search(key) else None
    if weight is not None and weight.dtype.itemsize == 1:
        return f"{weight.dtype} with scales"
    return next((who for mark, who in MARKS.items() if re.search(f"{mark}$", key)), None)


def refuse_packed(base: Path, stated: dict[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Raise CheckpointError, with the ways out, where a checkpoint is quantised.

    Arguments:
        base: its folder.
        stated: what config.json says.
        tensors: its tensors by key.
    """
    parts = (stated, *(v for v in stated.values() if isinstance(v, dict)))
    said = next((p["quantization_config"] for p in parts if p.get("quantization_config")), None)
    marked: dict[str, str] = {}
    for key in tensors:
        if kind := _kind(key, tensors):
            marked.setdefault(kind, key)
    if not said and not marked:
        return
    kind = said.get("quant_method", "no method is named") if isinstance(said, dict) else said or ", ".join(marked)
    where = "so its config.json says" if said else f"it holds {listing(marked.values())}"
    raise CheckpointError(
        f"{base} is quantised ({kind}): {where}. Packed numbers are not merged into file by file. Merge into the "
        "checkpoint that it was quantised from, and quantise the result; or load the model and merge in memory: "
        "`PeftModel.from_pretrained(model, adapter).merge_and_unload()`."
    )
