"""The names under which LoRA's layers are printed and recognised: one class per layout, each the core's layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import skip_init

from ...core.alone import renewed
from ...core.defaults import BNB_LAYERS
from ...core.handmade import taken_over
from ...core.layer import name_layers
from ...core.scale import ScaledLayer
from ...core.stack import Adapter, Stack
from .config import VARIANTS


class LoraLayer(ScaledLayer):
    """A target under LoRA adapters; `isinstance(module, LoraLayer)` tells such layers from others."""

    family = "lora"
    adapter_layer_names = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
    _home_order = (
        "lora_dropout",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    _parameter_homes = frozenset({"lora_embedding_A", "lora_embedding_B", "lora_embedding_bias"})

    def never_trained(self, name: str) -> Sequence[nn.Parameter]:
        """MiCA's B, which the layer that is tied to an embedding has for its A."""
        p = self.adapters.get(name)
        if p is None or not p.__dict__.get("keeps_B"):
            return ()
        if "tied_to" in p.__dict__:
            return (p.lora_A.weight,)
        return (p.lora_embedding_B if p.has("lora_embedding_B") else p.lora_B.weight,)

    def check_active(self, names: Sequence[str]) -> None:
        """Raise ValueError for several adapters that each take the same part out of the weight."""
        taking = [n for n in names if n in self.adapters and self.adapters[n].__dict__.get("takes_out")]
        if len(taking) > 1:
            raise ValueError(
                f"Only one adapter of KaSA can be active, but {taking} are: each takes the least directions out of the "
                "weight, so together they would take them out twice. Activate one of them."
            )

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, quantized: str | None = None
    ) -> None:
        if not isinstance(adapter_names, str):
            self.check_active(
                [*self.merged_adapters, *(self.active_adapters if adapter_names is None else adapter_names)]
            )
        super().merge(safe_merge, adapter_names, quantized)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any = None, **kwargs: Any) -> None:
        """Give this layer alone an adapter, or one anew: it is active if its name is. A model's are `add_adapter`'s.

        Arguments:
            adapter_name: its name.
            r, lora_alpha: its rank and alpha, whatever the configuration says.
            config: a LoraConfig with the other settings; None is its defaults.
            kwargs: other fields of it.
        """
        stated = {"r": r, "lora_alpha": lora_alpha, **kwargs}
        if not self.by_hand or self.view.label == "Linear":
            renewed(self, adapter_name, config, stated)
        else:  # of whatever module: a class of a program's has factors of its sizes
            like = skip_init(nn.Linear, self.in_features, self.out_features, bias=False)
            taken_over(self, NAMES["Linear"](like, adapter_name, config=config, **stated), adapter_name)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Give an adapter its first values again, as where `to_empty` has left its tensors without.

        Arguments:
            adapter_name: which; nothing happens if this layer has none of that name.
            init_lora_weights: the adapter's own setting; True or "gaussian" where that leaves the base weight whole;
                False leaves the tensors as they are.

        Raises ValueError for another start.
        """
        p = self.adapters.get(adapter_name)
        if p is None or init_lora_weights is False:
            return
        own, init = p.settings.init_lora_weights, init_lora_weights
        if init != own and (p.subtracts or not (init is True or str(init).lower() == "gaussian")):
            others = "" if p.subtracts else "True, 'gaussian' or "
            raise ValueError(
                f"Unknown initialization init_lora_weights={init!r} for {p.path!r}. Use {others}{own!r}, with which "
                f"the adapter {adapter_name!r} was made."
            )
        self.restart(p, init_lora_weights=init_lora_weights)

    def begin(self, p: Adapter, root: Stack) -> None:
        """Give a new adapter its first values, and those of a `reset_lora_parameters` that a program has put here."""
        super().begin(p, root)
        if not self.begins_alike():
            self.reset_lora_parameters(p.name, p.settings.init_lora_weights)

    def begins_alike(self) -> bool:
        """Whether nothing but the method says what these are."""
        return type(self).reset_lora_parameters is _RESET

    def natural_scaling(self, adapter: str) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        p = self.adapters[adapter]
        return p.lora_alpha / (math.sqrt(p.r) if p.use_rslora else p.r)

    @property
    def lora_variant(self) -> dict[str, Any]:
        """The methods of those adapters that are more than plain LoRA."""
        return {n: a.method for n, a in self.adapters.items() if any(getattr(a.settings, f, None) for f in VARIANTS)}


_RESET = LoraLayer.reset_lora_parameters


class _LoraParameterProxy(nn.Module):
    """A parametrization of torch's that adds an update to a weight.

    `register_parametrization(module, "weight", _LoraParameterProxy(layer.get_delta_weight(adapter)))` makes a module
    compute with W + D, also where its weight is read instead of called. The layers here need no such module: they run
    theirs with W + D in place.

    Arguments:
        delta_weight: the update, of the weight's shape.
    """

    def __init__(self, delta_weight: Tensor):
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: Tensor) -> Tensor:
        return W + self.delta_weight


PACKED = {
    "aqlm": "AqlmLoraLinear",
    "awq": "AwqLoraLinear",
    "eetq": "EetqLoraLinear",
    "gptq": "GPTQLoraLinear",
    "hqq": "HqqLoraLinear",
    "inc": "IncLoraLinear",
    "te": "TeLinear",
    "torchao": "TorchaoLoraLinear",
}
NAMES = name_layers(LoraLayer, globals(), packed=PACKED | BNB_LAYERS)

__all__ = ["NAMES", "LoraLayer", *(kind.__name__ for kind in NAMES.values())]
