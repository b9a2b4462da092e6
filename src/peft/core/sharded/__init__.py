"""Tensors that are spread over processes: gathering and scattering them, and adapters of layers whose weight is so."""

from .gather import (
    WRITES,
    full,
    is_flat,
    is_mesh,
    is_spread,
    is_zero,
    leads,
    lent_back,
    like,
    put,
    refuse_flat,
    shape,
    summoned,
    unwrapped,
    wait,
    whole,
)

__all__ = [
    "WRITES",
    "full",
    "is_flat",
    "is_mesh",
    "is_spread",
    "is_zero",
    "leads",
    "lent_back",
    "like",
    "put",
    "refuse_flat",
    "shape",
    "summoned",
    "unwrapped",
    "wait",
    "whole",
]
