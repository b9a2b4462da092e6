"""The part of a tuner that makes an adapter out of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from ..errors import check_adapters
from ..registry import load
from .host import tuner_layers


def convertible(model: Any, name: str) -> bool:
    """Whether a model has layers of an adapter, and each can be written as a LoRA."""
    asked = [
        layer.supports_lora_conversion(name) if hasattr(layer, "supports_lora_conversion") else False
        for _, layer in tuner_layers(model)
        if name in layer._get_available_adapters() and hasattr(layer, "base_layer")
    ]
    return bool(asked) and all(asked)


class Combined:
    """Adds combinations of adapters; the algebra is loaded when it is first asked for."""

    layers: Callable[[], Iterator[tuple[str, Any]]]
    peft_config: dict[str, Any]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer of the adapter can be written as a LoRA."""
        check_adapters([adapter_name], self.peft_config)
        return convertible(self, adapter_name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> Any:
        """Add an adapter that is the weighted combination of others; it is inactive and frozen.

        Arguments:
            adapters: names of the sources, of any methods and ranks.
            weights: one for each, of either sign.
            adapter_name: the new name.
            combination_type: "svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties",
                "dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd", or "exact", the weighted
                sum of the updates itself. A single source is copied, times its weight.
            svd_rank: the rank of a decomposition; None: the largest of the sources.
            svd_clamp: quantile at which the entries of the new factors are cut.
            svd_full_matrices: kept for compatibility; only the vectors that are used are computed.
            svd_driver: of torch.linalg.svd, on CUDA.
            density: the share of entries that pruning keeps.
            majority_sign_method: how TIES elects signs.

        The result is of the sources' method where its updates sum up to one of its own (SHiRA, FourierFT ... of the
        same places, IA3), else a LoRA. Returns a report of what truncation has left out, and warns if that is more
        than 1 %. Raises ValueError for unknown names or types, TypeError without a needed density; the model is then
        unchanged.
        """
        for _, layer in self.layers():
            if hasattr(layer, "refuse_merge"):
                layer.refuse_merge(adapters)
        algebra = "peft.algebra"
        recipe = load(f"{algebra}:Recipe")(
            combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method
        )
        return load(f"{algebra}:add_weighted_adapter")(self, adapters, weights, adapter_name, recipe)
