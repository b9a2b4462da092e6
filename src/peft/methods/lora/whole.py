"""What variants of LoRA do over the whole model: terms for the loss, looking at its inputs, forgetting measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ...core.companion import Companion
from ...core.layer import tuner_layers
from . import corda, kasa, loraga, monteclora
from .calibration import at
from .init import DERIVED, FIRST
from .offsets import Offsets


class Whole(Companion):
    """The whole model's part of its LoRA adapters; the terms for the loss are added by whoever trains."""

    looks = False  # for tokens in the model's input

    def added(self, name: str, undo: list[Callable[[], Any]]) -> None:
        config = self.tuner.peft_config[name]
        self._forget(name, config)
        if not getattr(config, "alora_invocation_tokens", None) or self.looks:
            return
        look, hooks, self.looks = Offsets(self.tuner), list[Any](), True
        for module in (
            self.tuner,
            self.tuner.model,
        ):  # a task's class calls the tuner, generation the model, never both
            hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
            hooks.append(module.register_forward_hook(look.after))
        self.tuner.hooks.extend(hooks)
        undo += [hook.remove for hook in hooks]
        undo.append(lambda: setattr(self, "looks", False))

    def _forget(self, name: str, config: Any) -> None:
        """Delete what was measured for the adapter's first values, once all of them are made."""
        if isinstance(getattr(config, "init_lora_weights", None), bool) and not config.module_config:
            return  # nothing was measured
        options = getattr(config, "corda_config", None)
        if options is not None and not options.prune_temporary_fields:
            return
        for _, layer in tuner_layers(self.tuner.model):
            p = getattr(layer, "adapters", {}).get(name)
            if p is not None and getattr(p, "subtracts", False) and (p.has(FIRST[0]) or p.has(DERIVED[0])):
                for measured in (corda.NAME, loraga.NAME):
                    at(p).drop(measured)

    def _get_kasa_loss(self, adapter_names: Sequence[str] | None = None) -> Tensor | float:
        """KaSA's term for the loss, of these adapters (None: the active ones)."""
        return kasa.loss(self._adapters("takes_out", adapter_names))

    def _get_monteclora_loss(self, adapter_names: Sequence[str] | None = None) -> Tensor | float:
        """MonteCLoRA's term for the loss, of these adapters (None: the active ones); 0 outside training."""
        return monteclora.loss(self._adapters("lora_monteclora_sampler", adapter_names))

    def _adapters(self, mark: str, names: Sequence[str] | None) -> Iterator[Any]:
        chosen = self.tuner.active_adapters if names is None else names
        for _, layer in tuner_layers(self.tuner.model):
            for name, p in getattr(layer, "adapters", {}).items():
                if name in chosen and (mark in p.__dict__ or p.has(mark)):
                    yield p
