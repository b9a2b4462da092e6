"""Intruder dimensions under the path that other libraries import."""

from ...algebra.intruders import reduce_intruder_dimension

__all__ = ["reduce_intruder_dimension"]
