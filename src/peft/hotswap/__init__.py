"""Exchanging the weights of adapters in a running model, and many adapters that take turns in it."""

from .compatible import CONFIG_KEYS_TO_CHECK, check_hotswap_configs_compatible
from .compiled import prepare_model_for_compiled_hotswap
from .pool import AdapterPool, PoolStatus
from .room import room_for
from .swap import hotswap_adapter, hotswap_adapter_from_state_dict

__all__ = [
    "CONFIG_KEYS_TO_CHECK",
    "AdapterPool",
    "PoolStatus",
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
    "room_for",
]
