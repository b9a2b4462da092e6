"""How a module is an affine map x -> W x + b: its shape, reading and writing W, applying some W.

One file per layout; a new layer type is one class and one line in `_find`. Views are stateless and shared. W is always
(..., out, in): the stored layout is turned by `matrix` (a view of the storage, never a copy) and back by `raw`.
"""

from __future__ import annotations

import torch
from torch import nn

from ...kernels.modes import NARROW
from .. import storage
from ..direct import FORMS, FORWARD, TURNED
from .conv import ConvView
from .embedding import EmbeddingView, embed_scale
from .engine import EngineView, is_engine, is_fused
from .linear import Conv1DView, LinearView, main_input
from .make import PLAIN, SETTLED, Linear, ModuleDict, ParameterDict, Template, linear_module
from .module import ModuleView
from .parallel import ParallelView, is_parallel
from .parameter import AttentionView, ParameterView, bias_beside

__all__ = [
    "FUSES",
    "LABELS",
    "PLAIN",
    "READS",
    "SETTLED",
    "SUPPORTED",
    "Conv1DView",
    "Linear",
    "LinearView",
    "ModuleDict",
    "ParameterDict",
    "Template",
    "dtype_beside",
    "embed_scale",
    "is_linear",
    "linear_module",
    "main_input",
    "not_linear",
    "reads_weights",
    "supported",
    "view_of",
]

_LINEAR, _CONV1D, _EMBEDDING, _ATTENTION = LinearView(), Conv1DView(), EmbeddingView(), AttentionView()
_WHOLE, _PARALLEL, _ENGINE = ModuleView(), ParallelView(), EngineView()
GROUPED = "multiplies groups of its input by parts of its weight, which is no W x"
ROUTES = "gives the routes that it chooses, which are no W x"
CALLED = ("forward", "__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "__getattribute__")
READS, FUSES = "always", "where it can"
_CONVS = {nn.Conv1d: ConvView(1), nn.Conv2d: ConvView(2), nn.Conv3d: ConvView(3)}
LABELS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "ParamWrapper")
_BY_TYPE: dict[type, LinearView] = {}
SUPPORTED = "nn.Linear, transformers' Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention"


def view_of(m: nn.Module, parameter: str | None = None, whole: bool = False) -> LinearView:
    """The view of a module, of one of its parameters, or of a module of any class as a whole.

    Raises ValueError if the module has no weight matrix that the library knows how to read.
    """
    if whole:
        return _WHOLE
    if parameter is not None:
        if isinstance(m, nn.MultiheadAttention):
            return AttentionView(parameter)
        return ParameterView(parameter, bias_beside(m, parameter))
    view = _BY_TYPE.get(type(m))
    if view is None:
        view = _BY_TYPE[type(m)] = _find(m)
    return view


def _find(m: nn.Module) -> LinearView:
    for kind, view in _CONVS.items():
        if isinstance(m, kind) and not isinstance(m, nn.modules.conv._ConvTransposeNd):
            return view
    if isinstance(m, nn.Embedding):
        return _EMBEDDING
    if isinstance(m, nn.MultiheadAttention):
        return _ATTENTION
    if type(m).__name__ == "Conv1D" and hasattr(m, "nf"):
        meet(type(m))
        return _CONV1D
    if is_parallel(type(m)):
        return _PARALLEL
    if is_engine(type(m)):
        return _ENGINE
    if why := not_linear(type(m)):
        raise ValueError(f"{type(m).__name__} {why}. Adapt the weight itself: name it in target_parameters.")
    sized = hasattr(m, "in_features") and hasattr(m, "out_features") and not is_fused(type(m))
    held = storage.by_class(type(m))
    sized = sized and (held is None or bool(held.weights))
    if isinstance(m, nn.Linear) or sized or _is_packed_linear(type(m)):
        meet(type(m))
        return _LINEAR
    raise ValueError(f"{type(m).__name__} cannot be adapted. Supported layers are {SUPPORTED}.")


def meet(kind: type[nn.Module]) -> None:
    """Note a class of which calling is F.linear: nn.Linear's own subclasses that leave it so, and transformers' Conv1D.

    The latter's product, x V + b, has the bits of F.linear(x, V', b).
    """
    home = "transformers.pytorch_utils"
    stated = getattr(kind.forward, "__module__", ""), getattr(kind.forward, "__qualname__", "")
    if kind.__module__ == home and stated == (home, "Conv1D.forward"):  # and nobody's patch of it
        FORMS[kind] = kind.forward
        TURNED.add(kind)
        return
    own = (getattr(kind, name, None) is not getattr(nn.Linear, name, None) for name in CALLED)
    computed = hasattr(kind, "weight") or hasattr(kind, "bias")  # which parametrizations state as properties
    if issubclass(kind, nn.Linear) and not (computed or any(own)):
        FORMS[kind] = FORWARD


def supported(m: nn.Module) -> bool:
    """Whether `view_of` knows the module."""
    try:
        view_of(m)
    except ValueError:
        return False
    return True


def is_linear(kind: type) -> bool:
    """Whether layers of this class are what `target_modules="all-linear"` means."""
    if not_linear(kind):
        return False
    conv1d = any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in kind.__mro__)
    return conv1d or issubclass(kind, nn.Linear) or is_parallel(kind) or is_engine(kind) or _is_packed_linear(kind)


def not_linear(kind: type) -> str:
    """What a class does that calls itself a linear layer and is none; "" for all others.

    Block diagonal ones are in transformers' DeepSeek-V4, routers of experts in Llama 4 and PhiMoE.
    """
    if any(c.__name__.endswith("GroupedLinear") for c in kind.__mro__) and not is_fused(kind):
        return GROUPED
    router = kind.__name__.endswith("Router") and issubclass(kind, nn.Linear)
    return ROUTES if router and getattr(kind, "forward", None) is not nn.Linear.forward else ""


def _is_packed_linear(kind: type) -> bool:
    found = storage.by_class(kind)
    return found is not None and found.weights == ("weight",)


def reads_weights(parent: nn.Module | None) -> str:
    """How a parent reads the weights of its children instead of calling them, so that they must show W'; "" if not."""
    if isinstance(parent, nn.MultiheadAttention):
        return READS
    return FUSES if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) else ""


def dtype_beside(view: LinearView, m: nn.Module, autocast: bool = False) -> torch.dtype:
    """The dtype of an adapter's tensors beside a weight; `autocast` makes half precision float32.

    Eight bits store a weight, but nothing is drawn, learnt or multiplied in them: beside those it is float32.
    """
    weight = view.sample(m)
    dtype = getattr(m, "compute_dtype", None)
    dtype = dtype or (torch.get_default_dtype() if weight is None else weight.dtype)
    stored = not dtype.is_floating_point or "float8" in str(dtype)
    return torch.float32 if stored or (autocast and dtype in NARROW) else dtype
