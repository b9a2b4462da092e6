"""Files of kohya's sd-scripts, and of LyCORIS in the same style: one file, names flattened with underscores.

    lora_unet_down_blocks_1_attentions_0_..._to_q.lora_down.weight (r, I), .lora_up.weight (O, r), .alpha ()

The scaling is alpha / r; without alpha it is 1. `dora_scale` holds DoRA's norms, one for each out-feature (LyCORIS also
trains norms of in-features, which is another method). A flattened name is resolved by what the file itself recorded, or
by the names of the base's modules: those of diffusers, or of the original code of a UNet (`ldm`). Sources:
kohya-ss/sd-scripts, networks/lora.py; LyCORIS, docs and modules.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.entries import join
from ..errors import listing
from . import sound
from .build import config_for
from .format import Format, Options, Report, Source, write_safetensors
from .ldm import original_names
from .names import check_shapes, flat, unflatten
from .part import HADA, LOKR, ConversionError, Layer, Part, number
from .vllm import scaled

PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}
READ = {**{prefix: name for name, prefix in PREFIXES.items()}, "lora_te1_": "text_encoder"}
RECORD = "peft_modules"
DOWN, UP, MID, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"
KINDS = {"LORA": (DOWN, UP, MID), "LOHA": HADA, "LOKR": LOKR}
CLIP, CLIP_WRAPPER = "encoder.layers.", "text_model."  # transformers had the wrapper in CLIP's names up to version 4


class Kohya(Format):
    """One file of kohya's or LyCORIS's key style."""

    name = "kohya"
    text = "file of sd-scripts and LyCORIS"
    holds = frozenset({"conv", "dora", "loha", "lokr"})
    suffix, file_name, whole_pipeline = ".safetensors", "lora.safetensors", True

    def recognises(self, source: Source) -> bool:
        return not source.parts and any(key.startswith(tuple(READ)) and "." in key for key in source.keys)

    def why(self, feature: str) -> str:
        return {
            "embedding": "sd-scripts adapts linear layers and convolutions.",
            "lora_bias": "The key style has no biases of adapters.",
        }.get(feature, "")

    # ---- writing -----------------------------------------------------------------------------------------------

    def write(self, parts: Mapping[str, Part], out: Path, options: Options, report: Report) -> None:
        state: dict[str, Tensor] = {}
        record: dict[str, str] = {}
        for component, part in parts.items():
            for layer in part.split()[0]:
                key = prefix_of(component, parts) + flat(wrapped(component, layer.path))
                if key in record:
                    raise ConversionError(
                        f"{layer.path!r} and {record[key]!r} have the same flattened name, {key!r}. Rename a module."
                    )
                record[key] = layer.path
                state |= {f"{key}.{name}": t for name, t in _written(layer, part.method).items()}
        ranks = Counter(x.settings.r for p in parts.values() for x in p.split()[0]).most_common(1)[0][0]
        usual = {p.method for p in parts.values()} == {"LORA"}
        metadata = {
            "ss_network_module": "networks.lora" if usual else "lycoris.kohya",
            "ss_network_dim": str(ranks),
            RECORD: record,
        }
        if any(k.endswith(f".{DORA}") for k in state):
            report.notes.append("diffusers leaves DoRA's norms out of files of this style: write 'diffusers' for it.")
        write_safetensors(self.place(out), state, metadata, report)

    # ---- reading -----------------------------------------------------------------------------------------------

    def read(self, source: Source, options: Options) -> dict[str, Part]:
        layers = grouped(source.state)
        record = _record(source.metadata.get(RECORD, ""))
        parts = {}
        components = dict.fromkeys(_component(key)[0] for key in layers)
        for component in components:
            own = {k: t for k, t in layers.items() if _component(k)[0] == component}
            name = options.component if options.component and len(components) == 1 else _meant(component, options)
            parts[name] = self._part(name, own, record, options)
        return parts

    def _part(
        self, component: str, layers: dict[str, dict[str, Tensor]], record: dict[str, str], options: Options
    ) -> Part:
        kinds = {_method(t, key) for key, t in layers.items()}
        sizes = {key: size_of(t) for key, t in layers.items()}
        paths, modules = resolved(component, sizes, record, options)
        if len(kinds) > 1:
            raise ConversionError(f"The file mixes {listing(sorted(kinds))} for {component!r}; one adapter has one.")
        method, ranks = kinds.pop(), {key: rank_of(t) for key, t in layers.items()}
        full = {key: r or -(-max(layers[key]["lokr_w2"].shape[:2]) // 2) for key, r in ranks.items()}
        config = config_for(
            method,
            {paths[k]: r for k, r in full.items()},
            {paths[k]: alpha_of(t, full[k], bool(ranks[k])) for k, t in layers.items()},
            modules,
            **_fields(method, list(layers.values())),
        )
        state = {join(paths[k], n): v for k, t in layers.items() for n, v in _read(t, method, k).items()}
        return Part(config, state)


def prefix_of(component: str, parts: Mapping[str, Part]) -> str:
    """What the keys of a model begin with; the first of several text encoders is te1."""
    if component not in PREFIXES:
        raise ConversionError(f"Files of sd-scripts have no prefix for {component!r}. They have {listing(PREFIXES)}.")
    several = component == "text_encoder" and any(c.startswith("text_encoder_") for c in parts)
    return "lora_te1_" if several else PREFIXES[component]


def wrapped(component: str, path: str) -> str:
    """The name of a text encoder's module as the files have it."""
    return CLIP_WRAPPER + path if component.startswith("text_encoder") and path.startswith(CLIP) else path


def _fields(method: str, layers: list[dict[str, Tensor]]) -> dict[str, Any]:
    """What the tensors tell about a configuration beside ranks and scalings."""
    if method == "LORA":
        return {"use_dora": any(DORA in t for t in layers)}
    cores = {"use_effective_conv2d": any("hada_t1" in t or "lokr_t2" in t for t in layers)}
    if method == "LOHA":
        return cores
    sizes = [(_kronecker(t), _first(t)) for t in layers]
    for factor in (-1, *sorted({n for _, first in sizes for n in first})):
        if all(_may_be(first, size, factor) for size, first in sizes):
            return {**cores, "decompose_both": any("lokr_w1_a" in t for t in layers), "decompose_factor": factor}
    raise ConversionError("The sizes of the file's Kronecker factors are such as no LoKrConfig gives.")


def _first(t: Mapping[str, Tensor]) -> tuple[int, int]:
    """(o1, i1)."""
    whole = t.get("lokr_w1")
    return tuple(whole.shape) if whole is not None else (t["lokr_w1_a"].shape[0], t["lokr_w1_b"].shape[1])  # type: ignore


def _may_be(first: tuple[int, int], size: tuple[int, int], factor: int) -> bool:
    """Whether a configuration with this `decompose_factor` gives (o1, i1) to some kernel, which files do not tell."""
    from ..methods.lokr import factorization

    (o1, i1), (O, wide) = first, size
    kernels = (k for k in range(1, wide + 1) if wide % (k * i1) == 0)
    return factorization(O, factor)[0] == o1 and any(factorization(wide // k, factor)[0] == i1 for k in kernels)


def _written(layer: Layer, method: str) -> dict[str, Tensor]:
    t = dict(layer.tensors)
    if method == "LORA":
        A, B = layer.factor("A"), layer.factor("B")
        found = {DOWN: A, UP: B, ALPHA: scalar(layer.alpha)}
        if layer.magnitude is not None:
            found[DORA] = layer.magnitude.reshape(-1, *[1] * (A.dim() - 1))
        return found
    if rank_of(t) is None:  # readers ask for an alpha, but scale only what has factors
        return {**t, "lokr_w1": scaled(t["lokr_w1"], layer.scaling), ALPHA: scalar(1)}
    return {**t, ALPHA: scalar(layer.alpha)}


def scalar(value: float) -> Tensor:
    """A number as files hold it."""
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def grouped(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{flattened name: {name of a tensor: tensor}}; raises ConversionError for what is no tensor of an adapter."""
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, value in state.items():
        name, _, tensor = key.partition(".")
        if not name.startswith(tuple(READ)) or tensor not in (*KINDS["LORA"], *HADA, *LOKR, ALPHA, DORA):
            strange.append(key)
        else:
            found.setdefault(name, {})[tensor] = value
    if strange:
        raise ConversionError(
            f"{len(strange)} tensors of the file have no meaning in an adapter of kohya's style: {listing(strange, 4)}."
        )
    return found


def _component(key: str) -> tuple[str, str]:
    """The component and the flattened name after its prefix."""
    prefix = next(p for p in READ if key.startswith(p))
    return READ[prefix], key[len(prefix) :]


def _meant(component: str, options: Options) -> str:
    """The component; sd-scripts says unet of transformers, too."""
    there = options.base.components if options.base is not None else []
    return "transformer" if component == "unet" and "unet" not in there and "transformer" in there else component


def _record(text: str) -> dict[str, str]:
    """What the file says its names mean, as far as that is true of the names."""
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str) and k.startswith(tuple(READ)) and _is(k, v)}


def _is(key: str, path: str) -> bool:
    component, name = _component(key)
    return name in (flat(path), flat(wrapped(component, path)))


def resolved(
    component: str, sizes: dict[str, tuple[int, int]], record: dict[str, str], options: Options
) -> tuple[dict[str, str], Any]:
    """{key: name of a module} and the base's modules, if they are known."""
    if options.base is None:
        unknown = [key for key in sizes if key not in record]
        if unknown:
            raise ConversionError(
                f"The underscores in {listing(unknown, 3)} may be dots or not: the names of the base's modules are "
                f"needed to tell. Give `base`, the folder of the base model (with a folder {component!r} if it is a "
                "pipeline)."
            )
        return {key: record[key] for key in sizes}, None
    modules = options.base.modules(component)
    wanted = {_component(key)[1]: size for key, size in sizes.items()}
    wrappers = (flat(CLIP_WRAPPER),) if component.startswith("text_encoder") else ()
    others = original_names(modules) if component == "unet" else {}
    found = unflatten(wanted, modules, wrappers, others, f" ({component})")
    check_shapes({found[name]: size for name, size in wanted.items()}, modules, f" ({component})")
    return {key: found[_component(key)[1]] for key in sizes}, modules


def _method(tensors: Mapping[str, Tensor], key: str) -> str:
    found = [m for m, names in KINDS.items() if any(n in tensors for n in names)]
    if len(found) != 1:
        raise ConversionError(f"{key!r} has {listing(sorted(tensors))}, which is no whole update.")
    (method,) = found
    if method != "LORA" and DORA in tensors:
        raise ConversionError(f"{key!r} has DoRA's norms over {method}, for which there is no method here.")
    alpha = tensors.get(ALPHA)
    if alpha is not None and (alpha.numel() != 1 or not math.isfinite(float(alpha))):
        raise ConversionError(f"The alpha of {key!r} is no number ({tuple(alpha.shape)}).")
    names = {DOWN: "lora_A.weight", UP: "lora_B.weight", MID: sound.MID, DORA: "lora_magnitude_vector"}
    sound.check({names.get(k, k): t for k, t in tensors.items() if k != ALPHA}, method, key)
    return method


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The rank by which readers divide alpha; None where nothing has a rank, so that they do not."""
    for name, axis in ((DOWN, 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if name in tensors:
            return int(tensors[name].shape[axis])
    return None


def alpha_of(tensors: Mapping[str, Tensor], rank: int, scales: bool) -> float:
    """alpha; without one, and where readers do not look at it, it is the rank."""
    alpha = tensors.get(ALPHA)
    return number(float(alpha)) if alpha is not None and scales else rank


def size_of(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(O, I) of an update, I with the kernel."""
    if DOWN in tensors:
        A = tensors[DOWN]
        kernel = tensors[MID][0, 0].numel() if MID in tensors else 1
        return int(tensors[UP].shape[0]), int(A[0].numel()) * kernel
    if "hada_w1_a" in tensors:
        core = "hada_t1" in tensors
        kernel = tensors["hada_t1"][0, 0].numel() if core else 1
        return int(tensors["hada_w1_a"].shape[1 if core else 0]), int(tensors["hada_w1_b"].shape[1]) * kernel
    return _kronecker(tensors)


def _kronecker(t: Mapping[str, Tensor]) -> tuple[int, int]:
    o1, i1 = _first(t)
    if "lokr_w2" in t:
        return int(o1 * t["lokr_w2"].shape[0]), int(i1 * t["lokr_w2"][0].numel())
    core = "lokr_t2" in t
    kernel = t["lokr_t2"][0, 0].numel() if core else 1
    return int(o1 * t["lokr_w2_a"].shape[1 if core else 0]), int(i1 * t["lokr_w2_b"].shape[1] * kernel)


def _read(tensors: Mapping[str, Tensor], method: str, key: str) -> dict[str, Tensor]:
    """The tensors of one target under PEFT's names."""
    if method != "LORA":
        return {k: v for k, v in tensors.items() if k != ALPHA}
    A, B = tensors[DOWN], tensors[UP]
    if MID in tensors:  # A in two factors, the second of which is the kernel: (r, r, kernel) and (r, I, 1)
        A = torch.einsum("uv...,vi->ui...", tensors[MID], A.flatten(1))
    found = {"lora_A.weight": A.contiguous(), "lora_B.weight": B}
    if DORA in tensors:
        m = tensors[DORA]
        if m.shape[0] != B.shape[0] or m.numel() != B.shape[0]:
            raise ConversionError(
                f"{key!r} has norms of in-features ({tuple(m.shape)}), where DoRA here has those of out-features."
            )
        flat_m = m.flatten()
        found["lora_magnitude_vector"] = flat_m if A.dim() == 2 else flat_m.view(1, -1, *[1] * (A.dim() - 2))
    return found
