"""Optimisers for low-rank adapters."""

from __future__ import annotations

from .. import lazy

_NAMES = {
    "peft.optimizers.lorafa": "create_lorafa_optimizer",
    "peft.optimizers.loraplus": "create_loraplus_optimizer",
    "peft.optimizers.riemannian": "create_riemannian_optimizer",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
