"""Trainable tokens: new values for some rows of an embedding, the other rows frozen.

    W' = W with the rows of the chosen tokens replaced by delta (n, d), which starts as those rows

Works on an embedding, and on the output layer that is tied to it, which then shares delta. The tensor is called a delta
in files, but holds the rows themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import OutOfRangeError
from ..kernels.modes import single
from .call import Call
from .layer import BaseTunerLayer
from .method import Method, Site
from .stack import Adapter, Slot, Stack
from .views import embed_scale
from .wrappers import AuxiliaryTrainingWrapper


class TokenRows(Method):
    """W' = W with rows replaced.

    Arguments:
        indices: the tokens.
        share: the adapter of a tied layer, whose rows are trained as one with these.
        at_base: whether the rows start as the base's; else random.
        argument: the name of the field that gave the tokens, for messages.
    """

    def __init__(
        self,
        indices: Sequence[int],
        share: Adapter | None = None,
        at_base: bool = True,
        argument: str = "trainable_token_indices",
    ):
        self.indices, self.share, self.at_base, self.argument = list(indices), share, at_base, argument

    def build(self, site: Site) -> dict[str, Any]:
        if site.view.label not in ("Embedding", "Linear"):
            raise ValueError(
                f"{site.path!r} has no tokens: rows are trained of embeddings and linear layers, and this is "
                f"{type(site.module).__name__}. Take it out of target_modules."
            )
        count, width = site.view.shape(site.module)[:: -1 if site.view.infix else 1]
        bad = [i for i in self.indices if not -count <= i < count]
        if bad:
            raise OutOfRangeError(
                f"{self.argument} has {bad}, but {site.path!r} has only {count} tokens (0 to {count - 1})."
            )
        _check_once(self.indices, count, site.path, self.argument)
        if self.share is not None:
            held: nn.Parameter = self.share.trainable_tokens_delta
        else:
            held = nn.Parameter(torch.empty(len(self.indices), width, **site.kwargs))
        index = torch.tensor([i % count for i in self.indices], device=site.place)
        return {"trainable_tokens_delta": held, "token_indices": index}

    def init(self, p: Adapter, inner: Stack) -> None:
        if not self.at_base:
            p.trainable_tokens_delta.normal_()
        elif self.share is None:
            W = p.original_weight()
            p.trainable_tokens_delta.copy_((W.mT if inner.view.infix else W)[p.held_buffer("token_indices")])

    def tie(self, p: Adapter, other: Adapter) -> None:
        p.layer._modules["trainable_tokens_delta"][p.name] = other.trainable_tokens_delta

    def _rows(self, p: Adapter) -> tuple[Tensor, Tensor]:
        new = p.held("trainable_tokens_delta")
        if self.share is not None and isinstance(new, nn.Parameter):  # a replica's is a plain tensor
            new = self._tied(p, new, self.share.held("trainable_tokens_delta"))
        return p.held_buffer("token_indices"), new

    def _tied(self, p: Adapter, own: Tensor, shared: Tensor) -> Tensor:
        """The shared rows: loaders that put new parameters in place know one name of a tied one."""
        if own is shared or not isinstance(shared, nn.Parameter):
            return own
        if not torch.compiler.is_dynamo_compiling():
            p.layer._modules["trainable_tokens_delta"][p.name] = shared
        return shared

    def exact_factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """(A, B) with B A the update: the changes of the rows, times a unit vector for each token."""
        index, new = self._rows(p)
        W = p.original_weight()
        W = single(W.mT if p.layer.view.infix else W)
        change = new.to(W.dtype) - W[index]
        units = change.new_zeros(len(index), len(W)).index_put_(
            (torch.arange(len(index), device=index.device), index), change.new_ones(())
        )
        return (units, change.mT) if p.layer.view.infix else (change, units.mT)

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        index, new = self._rows(p)
        if p.layer.view.infix:  # an embedding: W is (d, V)
            return W.index_copy(-1, index, new.mT[rows].to(W.dtype))
        start = rows.start or 0
        stop = start + W.shape[-2]
        inside = (index >= start) & (index < stop)
        return W.index_copy(-2, index[inside] - start, new[inside].to(W.dtype))

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        index, new = self._rows(p)
        y = inner(x)
        if not p.layer.view.infix:  # an output layer: the tokens are out-features
            b = inner.bias()
            part = inner.linear(x.to(new.dtype), new)
            part = part if b is None else part + b[index]
            return y.index_copy(-1, index, part.to(y.dtype))
        match = x.unsqueeze(-1) == index
        found = new[match.to(torch.uint8).argmax(-1)]
        scale = embed_scale(inner.base)
        found = found if scale is None else found * scale
        return torch.where(match.any(-1, keepdim=True), found.to(y.dtype), y)


def _check_once(indices: Sequence[int], count: int, path: str, argument: str) -> None:
    """Raise ValueError if two indices are the same token: each would train a row of its own, and one would win."""
    seen: dict[int, int] = {}
    for index in indices:
        token = index % count
        if token in seen:
            same = "twice" if seen[token] == index else f"as {seen[token]} and as {index}"
            raise ValueError(f"{argument} names token {token} of {path!r} ({count} tokens) {same}. Name each once.")
        seen[token] = index


class TrainableTokensLayer(BaseTunerLayer):
    """An embedding, or the output layer tied to it, with some rows of its own."""

    adapter_layer_names = ("trainable_tokens_delta",)
    _home_order = ("trainable_tokens_delta",)
    _parameter_homes = frozenset({"trainable_tokens_delta"})


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Stands where the embedding stood; its `token_adapter` is the layer."""

    _below: ClassVar[tuple[str, ...]] = ("token_adapter",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str = "default", call: Call | None = None):
        super().__init__()
        self.token_adapter = TrainableTokensLayer(module_to_save, call)
        self.training = module_to_save.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    @property
    def original_module(self) -> nn.Module:
        """The user's module."""
        return self.token_adapter.base_layer

    @property
    def weight(self) -> Tensor:
        """The weight with the active adapters' rows in place."""
        layer = self.token_adapter
        if layer.planned() is None:
            return layer.weight
        stack = layer.stack(layer._live_names())
        return layer.view.raw(stack.base, stack.weight())

    # the layer below is met by every walk of its own; the wrapper has nothing to add
    adapters: ClassVar[dict[str, Any]] = {}

    @property
    def active_adapters(self) -> list[str]:
        return self.token_adapter.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return self.token_adapter.disable_adapters

    def _get_available_adapters(self) -> set[str]:
        return set()

    def slots(self, name: str) -> list[Slot]:
        """None: the layer's own are met when the walk comes to it."""
        return []

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return {
            f"token_adapter.{slot.key}": f"token_adapter.{slot.live}" for slot in self.token_adapter.slots(adapter_name)
        }

    def adapter_parameters(self, name: str) -> Sequence[nn.Parameter]:
        return ()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        self.token_adapter.set_adapter(adapter_names, inference_mode)

    def activate(self, names: tuple[str, ...], inference_mode: bool = False) -> None:
        """Nothing: the layer is activated itself."""

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self.token_adapter.set_requires_grad(adapter_names, requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        self.token_adapter.enable_adapters(enabled)

    def _set_disabled(self, disabled: bool) -> None:
        self.token_adapter._set_disabled(disabled)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        self.token_adapter.delete_adapter(adapter_name, new_active_adapters)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        inner = self._modules["token_adapter"]
        return self.original_module if isinstance(inner, BaseTunerLayer) else inner  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "token_adapter" not in self._modules or name.startswith("_"):
                raise
        return getattr(self.token_adapter, name)


def check_untargeted(path: str, module: nn.Module) -> None:
    """Raise TypeError if an adapter changes all rows of a module: its tokens would be trained twice over."""
    if isinstance(module, BaseTunerLayer):
        raise TypeError(
            f"trainable_token_indices trains rows of {path!r}, or of what shares its weight, and {path!r} is a target "
            "of an adapter as a whole. Choose one: exclude it from target_modules, or leave the tokens out."
        )


def check_disjoint(layer: BaseTunerLayer, names: Sequence[str]) -> None:
    """Raise ValueError if two of these adapters claim the same token."""
    seen: dict[int, str] = {}
    found = ((n, layer.adapters[n].method) for n in names if n in layer.adapters)
    for name, method in found:
        for token in method.indices if isinstance(method, TokenRows) else ():
            if token in seen:
                raise ValueError(
                    f"The adapters {seen[token]!r} and {name!r} both train token {token}; they cannot be active "
                    "together. Only one adapter at a time can train a token."
                )
            seen[token] = name


def check_same_tokens(chosen: dict[str, list[int]], tied: dict[str, list[str]]) -> None:
    """Raise ValueError if tied embeddings are to be trained for different tokens."""
    for path, indices in chosen.items():
        for other in tied[path]:
            if other in chosen and chosen[other] != indices:
                raise ValueError(
                    f"trainable_token_indices names {path!r} and {other!r}, which share one weight, with different "
                    "tokens, but ensure_weight_tying=True. Give both the same tokens, or name only the embedding."
                )
