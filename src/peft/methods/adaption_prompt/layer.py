"""Adaption prompts (LLaMA-Adapter): learnt tokens that the upper layers' attention looks at besides, behind a gate.

    y = attention(x) + O( g softmax(q K' / sqrt(d)) V ),   K, V = the layer's keys and values of P (length, hidden)

q are the layer's queries, turned by position as its own are; g starts at 0, so training starts at the base model. The
terms of several active adapters add up; adapters of the projections act on the prompt too, as it passes through them.
GPT-2 has no O here, as its files have none. The base layer's attention runs as it is, whatever its implementation and
cache.
Source: Zhang et al. 2023, arXiv 2303.16199, eq. 4-8.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.call import BASE, Call
from ...core.sharded.edge import for_all_heads
from ...core.sharded.gather import is_spread, together
from ...core.stack import Slot
from ...core.tie import innermost
from ...core.wrappers import AuxiliaryTrainingWrapper


class AdaptedAttention(AuxiliaryTrainingWrapper):
    """An attention module, `model`, with the prompts of adapters beside it."""

    _below: ClassVar[tuple[str, ...]] = ("model",)
    unnamed: ClassVar[bool] = True

    def __init__(self, model: nn.Module, call: Call, path: str):
        super().__init__()
        self.model = model
        self.other_prompts, self.other_gates = nn.ParameterDict(), nn.ParameterDict()  # of adapters that do not run
        self.__dict__.update(call=call, path=path, shown="", training=model.training, _active=())

    def add(self, name: str, length: int, meta: bool) -> None:
        """A prompt from N(0, 1) and a closed gate."""
        W = self._projection().weight
        kwargs: Any = {"dtype": W.dtype if W.is_floating_point() else torch.float32, "device": W.device}
        prompt = torch.empty(1, length, self._width(), **({**kwargs, "device": "meta"} if meta else kwargs))
        self.other_prompts[name] = nn.Parameter(prompt if meta else prompt.normal_(), requires_grad=False)
        self.other_gates[name] = nn.Parameter(torch.zeros(1, **kwargs, requires_grad=False), requires_grad=False)
        self._show(self.shown or name)

    def _show(self, name: str) -> None:
        """Put an adapter's tensors where the module's own names are; files know only these."""
        if self.shown == name or self._is_fixed():
            return
        for key, others in (("adaption_prompt", self.other_prompts), ("adaption_gate", self.other_gates)):
            if self.shown:
                others[self.shown] = self._parameters.pop(key)
            self._parameters[key] = others.pop(name)
        self.__dict__["shown"] = name

    def _is_fixed(self) -> bool:
        """Whether tensors are to stay in their places, as what spreads them over processes knows them by these."""
        managed = getattr(self, "_is_fsdp_managed_module", False)
        return managed or (bool(self.shown) and any(map(is_spread, self.held(self.shown))))

    def held(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """(prompt, gate) of an adapter."""
        if name == self.shown:
            return self.adaption_prompt, self.adaption_gate
        return self.other_prompts[name], self.other_gates[name]

    # ---- state -------------------------------------------------------------------------------------------------

    def _get_available_adapters(self) -> set[str]:
        return {*self.other_prompts, *([self.shown] if self.shown else ())}

    def adapter_parameters(self, name: str) -> Sequence[nn.Parameter]:
        return self.held(name) if name in self._get_available_adapters() else ()

    def slots(self, name: str) -> list[Slot]:
        if name == self.shown:
            return [Slot(key, key, self, key) for key in ("adaption_prompt", "adaption_gate")]
        if name not in self.other_prompts:
            return []
        homes = (("adaption_prompt", "other_prompts"), ("adaption_gate", "other_gates"))
        return [Slot(key, f"{home}.{name}", getattr(self, home), name) for key, home in homes]

    def refuse_merge(self, names: Sequence[str]) -> None:
        """Raise ValueError if one of these adapters has a prompt here."""
        mine = [n for n in names if n in self._get_available_adapters()]
        if mine:
            raise ValueError(
                f"Adaption prompts depend on the input, so they cannot be merged or summed up: {mine}. Keep the "
                "adapter, leave it out of the names, or use unload() for the plain base model."
            )

    def activate(self, names: tuple[str, ...], inference_mode: bool = False) -> None:
        """Run those of `names` that have a prompt here."""
        known = self._get_available_adapters()
        for name in known:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active = tuple(n for n in names if n in known)
        if self._active:
            self._show(self._active[0])

    def _set_disabled(self, disabled: bool) -> None:
        self._disabled = disabled

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Forget an adapter's tensors."""
        self._active = tuple(n for n in self._active if n != adapter_name)
        if adapter_name == self.shown and self.other_prompts:
            self._show(next(iter(self.other_prompts)))
        if adapter_name == self.shown:
            self._parameters.clear()
            self.__dict__["shown"] = ""
        elif adapter_name in self.other_prompts:
            del self.other_prompts[adapter_name], self.other_gates[adapter_name]

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        return self.model

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        names = None if self._disabled else self.call.fact("names")
        if self._disabled or not (names or self._active):
            return out
        x = args[0] if args else kwargs["hidden_states"]
        q = self._queries(x, kwargs)
        y = out[0]
        if names is None:
            for name in self._active:
                y = y + self._update(q, name).to(y.dtype)
            return (y, *out[1:])
        for name, rows in self.call.groups(len(x), x.device, self.path, tuple(names)).items():
            if name != BASE and name in self._get_available_adapters():
                y = y.index_add(0, rows, self._alone(q[rows], name).to(y.dtype))
        return (y, *out[1:])

    def _alone(self, q: Tensor, name: str) -> Tensor:
        """`_update` for rows that have this adapter only: the projections run without others too."""
        before, self.call.only = self.call.only, name
        try:
            return self._update(q, name)
        finally:
            self.call.only = before

    def _update(self, q: Tensor, name: str) -> Tensor:
        """O(g softmax(q K' / sqrt(d)) V) for queries (batch, heads, tokens, d)."""
        prompt, gate = self._inside(name)
        K, V = (self._heads(t, q.shape[-1]) for t in self._keys_values(prompt.to(q.dtype)))
        K, V = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (K, V))
        weights = (q @ K.mT * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).to(q.dtype)
        return self._out((gate.to(q.dtype) * weights @ V).transpose(1, 2).flatten(2))

    def _inside(self, name: str) -> tuple[Tensor, Tensor]:
        """(prompt, gate) of an adapter, as they work on the heads that are here."""
        prompt, gate = self.held(name)
        return prompt, for_all_heads(gate, innermost(self._projection())) if together() else gate

    # ---- what the attention module computes with ----------------------------------------------------------------

    def _projection(self) -> Any:
        """The linear layer of the keys."""
        return self.model.k_proj

    def _width(self) -> int:
        return int(self.model.q_proj.in_features)  # type: ignore[union-attr, arg-type]

    def _heads(self, t: Tensor, size: int) -> Tensor:
        """(batch, tokens, features) as (batch, heads, tokens, size)."""
        return t.unflatten(-1, (-1, size)).transpose(1, 2)

    def _queries(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Queries, turned by their positions."""
        m: Any = self.model
        q = self._heads(m.q_proj(x), m.head_dim)
        turn = sys.modules[type(m).__module__].apply_rotary_pos_emb  # as this architecture turns its own
        return turn(q, q, *kwargs["position_embeddings"])[0]

    def _keys_values(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        m: Any = self.model
        return m.k_proj(prompt), m.v_proj(prompt)

    def _out(self, update: Tensor) -> Tensor:
        m: Any = self.model
        return m.o_proj(update)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "model" not in self.__dict__.get("_modules", ()):
                raise
        return getattr(self.model, name)


class AdaptedAttentionGPT(AdaptedAttention):
    """GPT-2's attention, with one projection for all, no turning, and no projection of the update."""

    def _projection(self) -> Any:
        return self.model.c_attn

    def _width(self) -> int:
        return int(self.model.embed_dim)  # type: ignore[arg-type]

    def _queries(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        m: Any = self.model
        return self._heads(m.c_attn(x).split(m.split_size, -1)[0], m.head_dim)

    def _keys_values(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        m: Any = self.model
        _, K, V = m.c_attn(prompt).split(m.split_size, -1)
        return K, V

    def _out(self, update: Tensor) -> Tensor:
        return update
