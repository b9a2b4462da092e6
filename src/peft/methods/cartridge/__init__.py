"""Cartridges: `config`, `model` (the mathematics), `utils` (starting from a text, joining files)."""

from .config import CartridgeConfig
from .model import CartridgeEncoder
from .utils import (
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)

__all__ = [
    "CartridgeConfig",
    "CartridgeEncoder",
    "compose_cartridge_adapters",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "prompt_embeddings_from_past_key_values",
]
