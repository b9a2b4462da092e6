"""X-LoRA in a layer: the updates of several LoRA adapters, each scaled anew for each token.

    y = W x + g sum_e c_e(token, layer) s_e B_e A_e x,   c the gate's output for the token

The experts are other adapters of the layer; they stay as they are. There is no one W', so nothing can be merged.
Source: Buehler and Buehler 2024, arXiv 2402.07148. Different from the peer: the whole gate is saved, and the experts'
own folders hold the experts; experts may have any name; tokens of linear layers and embeddings are scaled, not pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.cells import references
from ...core.method import Method, Site
from ...core.stack import Adapter, Stack
from ..lora.method import LoRA


class Scalings:
    """What the gate says in one forward: a tensor (samples, tokens, layers, experts), or one number for all."""

    def __init__(self, gate: Any, values: Tensor | float):
        self.gate, self.values = gate, values


class Gated(Method):
    """Mixes the experts of the layer; it has no tensors there."""

    mergeable = False

    def build(self, site: Site) -> dict[str, Any]:
        if not (site.view.dense or site.view.infix):
            raise ValueError(
                f"X-LoRA scales tokens, but the experts adapt {site.path!r}, a {site.view.label}. Use experts on "
                "linear layers and embeddings."
            )
        numbers = site.settings.__dict__.setdefault("numbers", {})
        return {"routes": True, "number": numbers.setdefault(site.path, len(numbers))}

    def refuse_merge(self, p: Adapter) -> None:
        raise NotImplementedError(
            f"The adapter {p.name!r} mixes its experts anew for each token, so no weight holds it. Keep it unmerged, "
            "or merge one of the experts."
        )

    lasting = False

    def prepare(self, p: Adapter) -> None:
        for a in self.experts(p).values():  # under compile they are found by reference
            a.direct = references(p.layer, a.name)

    def experts(self, p: Adapter) -> dict[int, Adapter]:
        """The experts that the layer has, by their number in the gate's output."""
        held = p.layer.adapters
        return {i: held[n] for i, n in enumerate(p.settings.adapters) if n in held and n not in p.layer.merged_adapters}

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        y, now = inner(x), p.layer.call.fact("gates")
        found = None if now is None else now()
        if not isinstance(found, Scalings):
            raise ValueError(
                f"The layer {p.path!r} runs without the gate of {p.name!r}, which looks at the whole model's input "
                "first. Call the model, not a part of it; with gradient checkpointing, call backward() after each "
                "forward."
            )
        if isinstance(found.values, float) and not found.values:
            return y
        experts = self.experts(p)
        c = self.scalings(p, found, x.shape if inner.view.infix else x.shape[:-1])
        for i, a in experts.items():
            method: LoRA = a.method
            A, B = method.factors(a)
            thin, factor = inner.drop(x, method.drop_rate(a), A.dtype)
            h = inner.linear(thin, A)
            h = h if factor is None else h * factor.to(h.dtype)
            weight = c if isinstance(c, float) else c[..., i, None].to(h.device, h.dtype)
            h = h * (weight * (a.scaling * p.settings.global_scaling_weight))
            y = (y + inner.view.rows(h, B)).to(y.dtype)
        return y

    def scalings(self, p: Adapter, found: Scalings, lead: Any) -> Tensor | float:
        """The scalings of the layer, (*lead, experts), for an input whose tokens are arranged as `lead`."""
        if isinstance(found.values, float):
            return found.values
        c = found.gate.chosen(found.values[..., p.number, :])
        part = p.layer.call.part
        c = c if part is None else c[part[0].to(c.device)]
        if c.shape[:-1] == lead:
            return c
        if c.shape[:-1].numel() != lead.numel():
            raise ValueError(
                f"X-LoRA: the layer {p.path!r} got tokens arranged as {tuple(lead)}, but the model's input has "
                f"{tuple(c.shape[:-1])}. Layers that see other tokens cannot be mixed token by token: use experts "
                "without them."
            )
        return c.reshape(*lead, c.shape[-1])
