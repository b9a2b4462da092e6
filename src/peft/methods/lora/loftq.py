"""LoftQ: factors that make up for what quantisation takes from a weight.

    Q, A, B = argmin |W - Q - s B A|,   found by turns:  Q = quantised(W - s B A),   s B A = best rank r of W - Q
    W' = Q + s B A

Where the base is not quantised, its numbers stay as they are, and the layer computes with Q in place of W while the
adapter is active (Q is kept beside W: one more copy of the adapted weights). Q follows from W alone, so files hold A
and B only. NF4 is the code-book of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E) in blocks of 64, the
form that bitsandbytes gives a base; 8 bits are whole numbers by row. Source: Li et al. 2023, arXiv 2310.08659,
algorithm 1. Unlike the peer, the scaling s is taken into account, so that the start is the optimum for any lora_alpha.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core import storage
from ...core.homes import derived_again
from ...core.layer import BaseTunerLayer, tuner_layers
from ...core.method import Delta, Site
from ...core.stack import Adapter, Stack
from ...errors import listing
from ...kernels.modes import numbered
from . import init as starts
from .method import LoRA

BLOCK = 64
BELOW = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
NEAR = (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534)
ABOVE = (0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434)
NF4 = (*BELOW, *NEAR, *ABOVE, 0.5626170039176941, 0.7229568362236023, 1.0)


def quantised(W: Tensor, bits: int) -> Tensor:
    """The nearest numbers to W (..., O, I) that 4 bits (NF4, blocks of 64) or 8 bits (whole numbers by row) hold."""
    if bits == 8:
        step = W.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny) / 127
        return (W / step).round() * step
    flat = W.flatten()
    pad = -len(flat) % BLOCK
    blocks = torch.cat([flat, flat.new_zeros(pad)]).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    code = torch.tensor(NF4, dtype=W.dtype, device=W.device)
    nearest = torch.bucketize(blocks / largest, (code[1:] + code[:-1]) / 2)
    return (code[nearest] * largest).flatten()[: len(flat)].view(W.shape)


def alternate(W: Tensor, bits: int, iterations: int, r: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, A, B) after some turns, from a W of float32."""
    rest = W
    for _ in range(iterations):
        Q = quantised(rest, bits)
        A, B = starts.low_rank(W - Q, r, scaling)
        rest = W - scaling * (B @ A)
    return Q, A, B


class LoftQ(Delta):
    """W' = Q + s B A, written as W + (Q - W) + s B A so that it adds to what other adapters make."""

    reads = True
    dropout = LoRA.dropout
    neutral_zeros = False  # Q stands in the place of W whatever A and B are

    def __init__(self) -> None:
        self.of = LoRA()

    def build(self, site: Site) -> dict[str, Any]:
        return self.of.build(site)

    def init(self, p: Adapter, inner: Stack) -> None:
        starts.refuse_groups(p, inner)
        p.cache["loftq"] = alternate(_read(p), *_options(p), p.r, p.scaling)  # `derive` asks for Q next
        starts.put(p, inner, *p.cache["loftq"][1:])

    def derive(self, p: Adapter, inner: Stack) -> None:
        found = p.cache.pop("loftq", None)
        Q = found[0] if found is not None else self._base(p, _read(p))
        p.layer.keep(p, "lora_quantised", Q.to(p.original_weight().dtype))

    follow_base = derived_again

    def prepare(self, p: Adapter) -> None:
        self.of.prepare(p)
        p.hot = None

    def _base(self, p: Adapter, W: Tensor) -> Tensor:
        """Q alone, which needs no decomposition in the last turn."""
        bits, turns = _options(p)
        if turns > 1:
            _, A, B = alternate(W, bits, turns - 1, p.r, p.scaling)
            W = W - p.scaling * (B @ A)
        return quantised(W, bits)

    def quantised(self, p: Adapter) -> Tensor:
        """Q, (..., O, I); taken now if the base weight was not there when the adapter was made."""
        if not p.has("lora_quantised"):
            self.follow_base(p, p.layer.stack(()))
        return p.held_buffer("lora_quantised")

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        error = self.quantised(p)[..., rows, :].float() - p.original_weight()[..., rows, :].float()
        return error.to(W.dtype) + self.of.delta(p, W, rows)

    def bias(self, p: Adapter, b: Tensor | None) -> Tensor | None:
        return self.of.bias(p, b)

    def refuse_merge(self, p: Adapter) -> None:
        self.of.refuse_merge(p)

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        if inner.last is not None or inner.extra is not None or not inner.view.activations:
            return super().forward(p, inner, x)
        return self.of.onto(p, inner, inner.affine(x, self.quantised(p), inner.bias()), x)

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        error = self.quantised(p).float() - p.original_weight().float()
        return self.of.onto(p, inner, (y + inner.linear(x, error)).to(y.dtype), x)


def _options(p: Adapter) -> tuple[int, int]:
    """Bits and turns."""
    options = p.settings.loftq_config
    return options.get("loftq_bits", 4), options.get("loftq_iter", 1)


def _read(p: Adapter) -> Tensor:
    W = p.original_weight().detach()
    if type(storage.of(p.layer.get_base_layer(), p.layer.view.name)) is not storage.Storage:
        raise TypeError(
            f"init_lora_weights='loftq' quantises the weight of {p.path!r}, which is quantised already. Use "
            "init_lora_weights=True, and then replace_lora_weights_loftq(model)."
        )
    W = W.float()
    if numbered(W) and not torch.isfinite(W).all():
        raise ValueError(f"init_lora_weights='loftq': the base weight of {p.path!r} holds NaN or infinity.")
    if p.r > min(W.shape[-2:]):
        raise ValueError(
            f"init_lora_weights='loftq' takes r={p.r} components, but {p.path!r} is {tuple(W.shape[-2:])} and has "
            f"only {min(W.shape[-2:])}. Lower r, or give this layer its own rank with rank_pattern."
        )
    return W


# ---- a base that is quantised already ------------------------------------------------------------------------


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give an adapter on a quantised base the factors that make up for its error, one turn of LoftQ.

    Arguments:
        peft_model: a PeftModel whose base holds quantised weights.
        model_path: safetensors with the weights before quantisation, a file or a folder; None: where the base came
            from.
        adapter_name: the adapter, a LoRA.
        callback: called as callback(peft_model, path) after each layer; False takes that layer's change back.

    Raises TypeError for another model, ValueError if nothing is quantised or no file is known, FileNotFoundError if
    there is none.
    """
    if not hasattr(peft_model, "peft_config") or not hasattr(peft_model, "base_model"):
        raise TypeError(f"replace_lora_weights_loftq takes a PeftModel, not a {type(peft_model).__name__}.")
    layers = [(path, layer) for path, layer in tuner_layers(peft_model.get_base_model()) if _is_packed(layer)]
    layers = [(path, layer) for path, layer in layers if adapter_name in layer.adapters]
    if not layers:
        raise ValueError(
            f"Adapter {adapter_name!r} adapts no quantised layer, so there is no error to make up for. On a dense "
            "base, use init_lora_weights='loftq'."
        )
    weights = _Weights(model_path or _origin(peft_model))
    for path, layer in layers:
        p = layer.adapters[adapter_name]
        key = f"{path}.{layer.view.name}"
        W = layer.view.matrix(layer.get_base_layer(), weights.read(key))
        Q = p.original_weight().float()
        homes = starts.held(p)
        before = [home.clone() for home in homes]
        factors = starts.low_rank(W.to(Q) - Q, p.r, p.scaling)
        for home, value in zip(homes, layer.view.held(layer.get_base_layer(), *factors), strict=True):
            home.copy_(value.reshape(home.shape))
        if callback is not None and not callback(peft_model, path):
            for home, value in zip(homes, before, strict=True):
                home.copy_(value)


def _is_packed(layer: Any) -> bool:
    if not isinstance(layer, BaseTunerLayer):
        return False
    return type(storage.of(layer.get_base_layer(), layer.view.name)) is not storage.Storage


def _origin(model: Any) -> str:
    config = getattr(model.get_base_model(), "config", None)
    path = getattr(config, "_name_or_path", None) or getattr(model.get_base_model(), "name_or_path", None)
    if not path:
        raise ValueError("The base model does not say where its weights are. Pass model_path, a file or a folder.")
    return str(path)


class _Weights:
    """Tensors of a safetensors file, or of the files of a folder, read one by one."""

    def __init__(self, path: str):
        from ...core.hub import fetch

        names = ("model.safetensors.index.json", "model.safetensors")
        found = path if os.path.isfile(path) else None
        if found is None and os.path.isdir(path):
            found = next((f for n in names if os.path.isfile(f := os.path.join(path, n))), None)
        elif found is None:
            found = fetch(path, names[::-1])
        if found is None:
            raise FileNotFoundError(f"There is no model.safetensors in {path!r}. Pass model_path, a file or a folder.")
        self.path = found
        self.index: dict[str, str] = {}
        if found.endswith(".json"):
            import json

            with open(found, encoding="utf-8") as file:
                self.index = json.load(file)["weight_map"]

    def read(self, key: str) -> Tensor:
        """One tensor; raises ValueError with the names that are there if it is missing."""
        from safetensors import safe_open

        file = os.path.join(os.path.dirname(self.path), self.index[key]) if key in self.index else self.path
        if self.index and key not in self.index:
            raise ValueError(f"{self.path!r} has no tensor {key!r}. It has {listing(sorted(self.index))}.")
        with safe_open(file, framework="pt") as f:
            if key not in f.keys():  # noqa: SIM118  - a reader of the file, no dictionary
                raise ValueError(f"{file!r} has no tensor {key!r}. It has {listing(sorted(f.keys()))}.")
            return f.get_tensor(key)
