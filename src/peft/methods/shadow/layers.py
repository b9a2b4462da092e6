"""Shadow in a block: the hidden states move towards the shadow's, and the shadow follows.

    h <- h + alpha U D dropout(h - s),   h' = block(h),   s <- (1 - g) s + g T(h'),   g = sigmoid(G(h'))

D (r, size) and U (size, r) are matrices, T and G small networks. U starts at zero, so training starts at the base
model. What is done depends on the text, so nothing can be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.layer import BaseTunerLayer
from ...core.method import Method, Site
from ...core.stack import Adapter, Stack

NAMES = ("shadow_down", "shadow_up", "shadow_update_transform", "shadow_update_gate")


class Trail:
    """The shadows of one forward by adapter name: where each started, and where it is."""

    def __init__(self, first: dict[str, Tensor]):
        self.first, self.state = first, dict(first)


class Following(Method):
    """What one adapter owns in a block."""

    mergeable = False

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        d = c.__dict__.get("width") or next(p.shape[-1] for p in site.module.parameters())
        u = c.update_hidden_size or c.r

        def update() -> nn.Module:
            return nn.Sequential(nn.Linear(d, u, **site.kwargs), nn.GELU(), nn.Linear(u, d, **site.kwargs))

        return {
            "shadow_down": nn.Linear(d, c.r, bias=False, **site.kwargs),
            "shadow_up": nn.Linear(c.r, d, bias=False, **site.kwargs),
            "shadow_dropout": nn.Dropout(c.shadow_dropout) if c.shadow_dropout else nn.Identity(),
            "shadow_update_transform": update(),
            "shadow_update_gate": update(),
            "shadow_r": c.r,
            "shadow_alpha": c.shadow_alpha,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        if p.settings.init_weights:
            p.shadow_up.weight.zero_()

    def checkpoint_key(self, key: str) -> str:
        home, _, leaf = key.partition(".")
        return f"{home}.default.{leaf}"  # whatever the adapter is called: so files have it

    def refuse_merge(self, p: Adapter) -> None:
        raise NotImplementedError(
            f"The adapter {p.name!r} moves hidden states along a shadow that depends on the input, so it cannot be "
            "merged. Use unload() for the base model, or unload_shadow() for the small model alone."
        )


class Run:
    """A block with shadows beside it; what the block takes from several adds up."""

    def __init__(self, layer: Any, adapters: Sequence[Adapter]):
        self.layer, self.adapters = layer, tuple(adapters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.layer.call
        trail = call.fact("gates")
        trail = None if trail is None else trail()
        if not isinstance(trail, Trail):
            p = self.adapters[0]
            raise ValueError(
                f"The block {p.path!r} runs without the shadow of {p.name!r}, which reads the whole model's input "
                "first. Call the model, not a part of it."
            )
        args = args or (kwargs.pop("hidden_states"),)
        h = args[0]
        taken = [self.taken(p, h, trail.state[p.name], call.fact("names")) for p in self.adapters]
        out = self.layer._modules["base_layer"]((h + sum(taken)).to(h.dtype), *args[1:], **kwargs)
        after = out[0] if isinstance(out, tuple) else out
        for p in self.adapters:
            s = trail.state[p.name].to(after.device)
            g = torch.sigmoid(p.shadow_update_gate(after.to(s.dtype)))
            trail.state[p.name] = (1 - g) * s + g * p.shadow_update_transform(after.to(s.dtype))
        return out

    def taken(self, p: Adapter, h: Tensor, s: Tensor, names: Any) -> Tensor:
        """What the block takes from one shadow: in a mixed batch, for the rows of its adapter alone."""
        update: Tensor = p.shadow_up(p.shadow_down(p.shadow_dropout(h.to(s.dtype) - s.to(h.device)))) * p.shadow_alpha
        if names is None:
            return update
        mine = torch.tensor([n == p.name for n in names], device=h.device).repeat_interleave(len(h) // len(names))
        return update * mine.view(-1, *[1] * (h.dim() - 1))


class ShadowLayer(BaseTunerLayer):
    """A block of the model under shadows."""

    family = "shadow"
    unnamed: ClassVar[bool] = True  # names of modules in the block leave `base_layer` out, and other methods find them
    adapter_layer_names = (*NAMES, "shadow_dropout")
    other_param_names = ("shadow_r", "shadow_alpha")
    _home_order: ClassVar[tuple[str, ...]] = (*NAMES[:2], "shadow_dropout", *NAMES[2:])
    _whole = True

    def original_weight_device(self) -> torch.device:
        sample: Tensor | None = self.view.sample(self.get_base_layer())
        return torch.device("cpu") if sample is None else sample.device

    def _runner(self, stack: Stack) -> Any:
        return Run(self, stack.adapters)

    def _mixed(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mine = [self.adapters[n] for n in dict.fromkeys(names) if n in self.adapters]
        run: Any = Run(self, mine) if mine else self._modules["base_layer"]
        return run(*args, **kwargs)

    def check_merge(self, names: tuple[str, ...], stay: bool = True) -> None:
        for name in names:
            self.adapters[name].method.refuse_merge(self.adapters[name])

    def __getattr__(self, name: str) -> Any:
        own = name.startswith("_") or "adapters" not in self.__dict__ or name in self._home_order
        if own or not hasattr(self.get_base_layer(), name):
            return super().__getattr__(name)
        return getattr(self.get_base_layer(), name)
