"""FRoD: `config`, `basis` (what layers of one kind share), `method` (the mathematics), `model`."""

from .config import FrodConfig
from .model import FrodLayer, FrodModel

__all__ = ["FrodConfig", "FrodLayer", "FrodModel"]
