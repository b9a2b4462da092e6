"""Exchanging the weights of adapters in a running model, and many adapters that take turns in it."""

from __future__ import annotations

from .. import lazy

_NAMES = {
    "peft.hotswap.compatible": "CONFIG_KEYS_TO_CHECK check_hotswap_configs_compatible",
    "peft.hotswap.compiled": "prepare_model_for_compiled_hotswap",
    "peft.hotswap.pool": "AdapterPool PoolStatus",
    "peft.hotswap.room": "room_for",
    "peft.hotswap.swap": "hotswap_adapter hotswap_adapter_from_state_dict",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
