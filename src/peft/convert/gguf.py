"""LoRA files of llama.cpp: GGUF with `general.type` adapter and `adapter.type` lora.

    blk.0.attn_q.weight.lora_a (r, I), .lora_b (O, r),   scaled by adapter.lora.alpha / r, each with its own r

There is one alpha for all; where that does not do, the rest goes into B. Tensors have llama.cpp's names, which the gguf
package knows for each architecture. Where llama.cpp turns neighbouring values of a head (RoPE's "normal" kind) the rows
of q and k are reordered, as in its base models: row 2 i + j of a head is row i + j n / 2 of transformers. Factors of
token_embd are written as (V, r) and (d, r). Experts are stacked, with one pair for each projection. Source: llama.cpp,
convert_lora_to_gguf and llama-adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import staged
from ..errors import nearest
from .format import Format, Options, Report
from .names import Base
from .part import ConversionError, Layer, Part, features
from .vllm import scaled

PERMUTED = {  # whose query and key rows llama.cpp reorders
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "granite": "GRANITE",
    "smollm3": "SMOLLM3",
    "olmo": "OLMO",
}
AS_THEY_ARE = {
    "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
    "olmo2": "OLMO2",
    "olmoe": "OLMOE",
    "starcoder2": "STARCODER2",
    "gpt2": "GPT2",
}
ARCHITECTURES = {**PERMUTED, **AS_THEY_ARE}
HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


class Gguf(Format):
    """One GGUF file for llama.cpp."""

    name = "gguf"
    text = "GGUF file of a LoRA for llama.cpp"
    holds = frozenset({"embedding", "alora", "stacked"})
    suffix, file_name = ".gguf", "adapter.gguf"

    def why(self, feature: str) -> str:
        return {
            "dora": "llama.cpp adds B A only.",
            "lora_bias": "llama.cpp adds B A only.",
            "bias": "llama.cpp adds B A only.",
            "conv": "llama.cpp adapts matrices.",
            "weights": "llama.cpp takes them from the base.",
            "modules_to_save": "Merge them into the base, and convert that.",
        }.get(feature, "")

    def write(self, parts: Mapping[str, Part], out: Path, options: Options, report: Report) -> None:
        if len(parts) > 1:
            raise ConversionError(f"A GGUF adapter is for one model, and these are {len(parts)}. Give `component`.")
        (component, part), file = next(iter(parts.items())), self.place(out)
        names = Names(_base(part, options), component)
        layers, _ = part.split()
        stacked = {k for f in features(part) if f.name == "stacked" for k in f.keys}
        pairs = [pair for x in layers for pair in _pairs(x, names, stacked)]
        alpha = Counter(a for *_, a in pairs).most_common(1)[0][0]
        if any(a != alpha for *_, a in pairs):
            report.folded.append(f"scalings that differ from alpha {alpha:g}, into B")
        with staged(file.parent) as stage:
            _write(stage / file.name, names, alpha, pairs, part)
        report.files.append(file)


Written = tuple[str, Tensor, Tensor, float]


class Names:
    """The tensors of a base model as llama.cpp names them.

    Arguments:
        base: the folder with its `config.json`.
        component: of which model.
    """

    def __init__(self, base: Base, component: str):
        try:
            import gguf
        except ImportError as error:
            raise ConversionError("Writing GGUF needs the package gguf: pip install gguf.") from error
        found = base.config(component)
        kind = str(found.get("model_type"))
        if kind not in ARCHITECTURES:
            raise ConversionError(
                f"The base is a {kind!r}, for which the order of llama.cpp's rows is not known here."
                f"{nearest(kind, ARCHITECTURES)} Known are {', '.join(sorted(ARCHITECTURES))}."
            )
        self.config: dict[str, Any] = found
        self.permuted = kind in PERMUTED
        self.arch = gguf.MODEL_ARCH[ARCHITECTURES[kind]]
        self.architecture = gguf.MODEL_ARCH_NAMES[self.arch]
        blocks = int(found.get("num_hidden_layers") or found["n_layer"])
        self.table = gguf.get_tensor_name_map(self.arch, blocks)

    def of(self, path: str) -> str:
        """The name of a module's weight."""
        for spelled in (path, f"model.{path}", f"transformer.{path}"):
            name = self.table.get_name(spelled)
            if name is not None:
                if name == "output" and self.tied:
                    raise ConversionError(f"{path!r} is tied to the embedding; llama.cpp has no output weight then.")
                return f"{name}.weight"
        raise ConversionError(
            f"{path!r} is no tensor that llama.cpp has for {self.architecture}."
            f"{nearest(path, self.table.mapping)} Is this adapter for that base?"
        )

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        kinds = ("gemma", "gemma2", "gemma3_text", "gpt2")
        return bool(self.config.get("tie_word_embeddings", self.config.get("model_type") in kinds))

    def heads(self, name: str) -> int:
        """How many heads the rows of a tensor fall into, if llama.cpp has them in another order; else 0."""
        field = HEADS.get(name.split(".")[-2]) if self.permuted else None
        if field is None:
            return 0
        return int(self.config.get(field) or self.config["num_attention_heads"])


def _base(part: Part, options: Options) -> Base:
    if options.base is not None:
        return options.base
    named = part.config.base_model_name_or_path
    if named and (Path(named) / "config.json").is_file():
        return Base(named)
    raise ConversionError(
        "GGUF has llama.cpp's names and order of rows, which depend on the base. Give `base`, a folder with its "
        f"config.json (the adapter names {named!r}, which is no such folder)."
    )


def _pairs(layer: Layer, names: Names, stacked: set[str]) -> Iterator[Written]:
    """(name, A, B, alpha) of the pairs of one target."""
    if f"{layer.path}.lora_A.weight" in stacked:
        yield from _experts(layer, names)
        return
    name = names.of(layer.path)
    A, B = layer.factor("A"), layer.factor("B")
    if name == EMBEDDING:
        if names.tied:
            raise ConversionError(
                f"{layer.path!r} is tied to the output layer, to which llama.cpp would apply its update, too."
            )
        A = A.mT
    heads = names.heads(name)
    yield name, A, reordered(B, heads) if heads else B, layer.alpha


def reordered(B: Tensor, heads: int) -> Tensor:
    """The rows of B, (O, r), head by head: those of both halves in turn."""
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _experts(layer: Layer, names: Names) -> Iterator[Written]:
    """The pairs of a stacked weight: which one it is, its shape proves."""
    path, r = layer.path.replace(".base_layer", ""), layer.settings.r
    A, B = layer.factor("A"), layer.factor("B")
    E, c = A.shape[0] // r, names.config
    count = c.get("num_local_experts") or c.get("num_experts")
    wide, narrow = int(c["hidden_size"]), int(c.get("moe_intermediate_size") or c["intermediate_size"])
    places = {(wide, 2 * narrow): ("gate", "up"), (narrow, wide): ("down",)}
    found = places.get((A.shape[1], B.shape[0]))
    block = next((int(p) for p in path.split(".") if p.isdigit()), None)
    if count != E or found is None or block is None or not path.endswith("experts"):
        raise ConversionError(
            f"{layer.path!r} ({E} matrices of {B.shape[0]} x {A.shape[1]}) is no weight of the base's {count} experts "
            f"of {narrow} x {wide}, and llama.cpp has no other stacked weights."
        )
    a, b = A.unflatten(0, (E, r)), B.unflatten(1, (r, E)).permute(2, 0, 1)
    for projection, rows in zip(found, b.chunk(len(found), 1), strict=True):
        yield f"blk.{block}.ffn_{projection}_exps.weight", a, rows, layer.alpha


def _write(file: Path, names: Names, alpha: float, pairs: list[Written], part: Part) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(file), names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    tokens = part.config.alora_invocation_tokens
    if tokens:
        kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(tokens), *kinds)
    for name, A, B, own in pairs:
        for ending, t in (("lora_a", A), ("lora_b", scaled(B, own / alpha))):
            _add(writer, f"{name}.{ending}", t.contiguous())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, t: Tensor) -> None:
    """One tensor in its own dtype; other kinds than float32, float16 and bfloat16 as float32."""
    import gguf

    if t.dtype == torch.bfloat16:
        raw = t.view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        return
    writer.add_tensor(name, (t if t.dtype == torch.float16 else t.float()).numpy())
