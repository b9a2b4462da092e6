"""Shadow: `config`, `layers` (what a block does with the shadow), `backbone` (the small model), `model`."""

from .backbone import DetachedShadowModel
from .config import ShadowConfig
from .layers import ShadowLayer
from .model import ShadowModel

__all__ = ["DetachedShadowModel", "ShadowConfig", "ShadowLayer", "ShadowModel"]
