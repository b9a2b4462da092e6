"""How a module is an affine map x -> W x + b: its shape, reading and writing W, applying some W.

One class per layout; a new layer type is one class and one line in `VIEWS`. Views are stateless and shared. W is always
(..., out, in): the stored layout is turned by `matrix` (a view of the storage, never a copy) and back by `raw`.

Letters: O out-features, I in-features (for a convolution: channels times kernel), r rank, E experts, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PeftWarning
from . import storage

Pair = tuple[int, ...]
Layer = Any  # a module of the view's layout: its attributes are known to the view, not to a type checker


class LinearView:
    """nn.Linear and whatever keeps its contract: weight (O, I), features on the last axis."""

    label = "Linear"
    name = "weight"
    bias_name = "bias"
    infix = ""  # LoRA files its tensors as lora_{infix}A and lora_{infix}B
    activations = True  # False: the layer cannot be split into W x and b; the whole module runs with W put in place
    dense = True  # the last axis of the input is W's in-axis
    read_children: tuple[str, ...] = ()  # child layers whose weights the module reads instead of calling them
    methods: tuple[str, ...] = ()  # what else the module's parent may call

    def shape(self, m: Layer) -> Pair:
        """(O, I), with leading axes where the module holds several matrices."""
        return (m.out_features, m.in_features)

    def parts(self, m: Layer) -> tuple[str, ...]:
        """The parameters that are adapted one by one where the module is a target but holds no single matrix."""
        return ()

    def check_dropout(self, path: str, argument: str) -> None:
        """Raise or warn where dropout of the adapter's input is asked for but the input is out of reach."""

    def matrix(self, m: Layer, raw: Tensor) -> Tensor:
        """The stored tensor as (..., O, I), without a copy."""
        return raw

    def raw(self, m: Layer, W: Tensor) -> Tensor:
        """(..., rows, I) in the stored layout; rows may differ from O."""
        return W

    def read(self, m: Layer) -> Tensor:
        """W as numbers, (..., O, I)."""
        return self.matrix(m, storage.of(m, self.name).read(m, self.name))

    def out_axis(self, m: Layer) -> int:
        """The axis of the stored tensor that counts out-features."""
        return 0

    def write_rows(self, m: Layer, start: int, W: Tensor) -> None:
        """Put (..., rows, I) in place of the rows from `start` on; for a dense storage."""
        stored = getattr(m, self.name).data
        stored.narrow(self.out_axis(m), start, W.shape[-2]).copy_(self.raw(m, W))

    def refuse_merge(self, m: Layer) -> None:
        """Raise NotImplementedError where W' cannot be held by the module."""

    def bias(self, m: Layer) -> Tensor | None:
        """b, (O,), or None."""
        return getattr(m, self.bias_name, None)

    def linear(self, m: Layer, x: Tensor, W: Tensor) -> Tensor:
        """W x without bias; W may have any number of rows."""
        return F.linear(x, W)

    def rows(self, h: Tensor, B: Tensor) -> Tensor:
        """B on the feature axis of an output h, (..., r) -> (..., O)."""
        return F.linear(h, B)

    def spread(self, m: Layer, v: Tensor) -> Tensor:
        """(O,) shaped to broadcast over an output."""
        return v

    def drop(self, x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
        """Dropout of the input: (x to use, factor for W x or None)."""
        return F.dropout(x, p), None

    def finish(self, m: Layer, y: Tensor) -> Tensor:
        """What the module does after the affine map."""
        return y

    def base(self, m: Layer, x: Tensor) -> Tensor:
        """The module's own affine map; m's forward unless `finish` undoes the split."""
        return m(x)

    def down(self, m: Layer, r: int, **kwargs: Any) -> nn.Module | nn.Parameter:
        """Holder of A, I -> r, in the shape that checkpoints have for this layout."""
        return linear_module(self.shape(m)[-1], r, **kwargs)

    def up(self, m: Layer, r: int, bias: bool = False, **kwargs: Any) -> nn.Module | nn.Parameter:
        """Holder of B, r -> O."""
        return linear_module(r, self.shape(m)[-2], bias, **kwargs)

    def A(self, m: Layer, held: Tensor) -> Tensor:
        """(..., r, I) from what `down` holds."""
        return held

    def B(self, m: Layer, held: Tensor) -> Tensor:
        """(..., O, r) from what `up` holds."""
        return held

    def held(self, m: Layer, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `A` and `B`: factors in the shape of their holders."""
        return A, B

    def vector(self, m: Layer, v: Tensor) -> Tensor:
        """(O,) in the shape that checkpoints have for one number per out-feature."""
        return v

    def norm_product(self, m: Layer, A: Tensor, B: Tensor) -> Tensor | None:
        """What stands for B A beside the stored weight when a row's norm is taken; None: B A itself."""
        return None


class Conv1DView(LinearView):
    """transformers' Conv1D: weight stored as (I, O)."""

    label = "Linear"

    def shape(self, m: Layer) -> Pair:
        return (m.nf, m.weight.shape[0])

    def matrix(self, m: Layer, raw: Tensor) -> Tensor:
        return raw.mT

    def raw(self, m: Layer, W: Tensor) -> Tensor:
        return W.mT

    def out_axis(self, m: Layer) -> int:
        return 1


class EmbeddingView(LinearView):
    """nn.Embedding as a linear map of one-hot tokens: weight stored as (V, O), so W is (O, V)."""

    label = "Embedding"
    infix = "embedding_"
    dense = False

    def shape(self, m: Layer) -> Pair:
        return (m.embedding_dim, m.num_embeddings)

    def matrix(self, m: Layer, raw: Tensor) -> Tensor:
        return raw.mT

    def raw(self, m: Layer, W: Tensor) -> Tensor:
        return W.mT

    def out_axis(self, m: Layer) -> int:
        return 1

    def linear(self, m: Layer, x: Tensor, W: Tensor) -> Tensor:
        y = F.embedding(x, W.mT, m.padding_idx, None, 2.0, m.scale_grad_by_freq, m.sparse)
        scale = embed_scale(m)
        return y if scale is None else y * scale

    def drop(self, x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
        # dropout of a one-hot vector keeps or drops a token's whole contribution
        return x, F.dropout(torch.ones(x.shape, device=x.device), p).unsqueeze(-1)

    def base(self, m: Layer, x: Tensor) -> Tensor:
        return m(x) if m.max_norm is None else self.linear(m, x, self.read(m))

    def finish(self, m: Layer, y: Tensor) -> Tensor:
        if m.max_norm is None:
            return y
        size = torch.linalg.vector_norm(y.detach(), ord=m.norm_type, dim=-1, keepdim=True)
        return y * torch.where(size > m.max_norm, m.max_norm / (size + 1e-7), 1.0).to(y.dtype)

    def down(self, m: Layer, r: int, **kwargs: Any) -> nn.Parameter:
        return nn.Parameter(torch.empty(r, self.shape(m)[1], **kwargs))

    def up(self, m: Layer, r: int, bias: bool = False, **kwargs: Any) -> nn.Parameter:
        if bias:
            raise ValueError("lora_bias=True has no meaning for an embedding, which has no bias. Set lora_bias=False.")
        return nn.Parameter(torch.empty(self.shape(m)[0], r, **kwargs))


class ConvView(LinearView):
    """nn.Conv1d to nn.Conv3d as a linear map of patches; features on axis 1.

    On a grouped convolution checkpoints hold an ungrouped A (r, all channels, kernel) and a B (O, r / groups) that
    mixes r / groups rows per group. That update is no grouped kernel, so W is read as the equal ungrouped kernel, and
    the layer cannot be merged into its grouped weight.
    """

    dense = False

    def __init__(self, dims: int):
        self.dims, self.label = dims, f"Conv{dims}d"
        self.function: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        self.module: type[nn.Module] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    def shape(self, m: Layer) -> Pair:
        return (m.out_channels, m.in_channels * math.prod(m.kernel_size))

    def matrix(self, m: Layer, raw: Tensor) -> Tensor:
        if m.groups == 1:
            return raw.flatten(1)
        g, per_out, per_in = m.groups, raw.shape[0] // m.groups, raw.shape[1]
        full = raw.new_zeros(g, per_out, g, per_in, *raw.shape[2:])
        index = torch.arange(g, device=raw.device)
        full = full.index_put(
            (index, torch.arange(per_out, device=raw.device)[:, None], index),
            raw.unflatten(0, (g, per_out)).movedim(1, 0),
        )
        return full.flatten(0, 1).flatten(1)

    def raw(self, m: Layer, W: Tensor) -> Tensor:
        return W.unflatten(-1, (m.in_channels, *m.kernel_size))

    def refuse_merge(self, m: Layer) -> None:
        if m.groups != 1:
            raise NotImplementedError(
                f"A low-rank update of a {type(m).__name__} with groups={m.groups} mixes all input channels and is no "
                "grouped kernel, so it cannot be merged. Keep it unmerged, or exclude the layer (`exclude_modules`)."
            )

    def linear(self, m: Layer, x: Tensor, W: Tensor) -> Tensor:
        padding = m.padding
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            padding = 0
        return self.function(x, self.raw(m, W), None, m.stride, padding, m.dilation)

    def rows(self, h: Tensor, B: Tensor) -> Tensor:
        return self.function(h, B.view(*B.shape, *[1] * self.dims))

    def spread(self, m: Layer, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * self.dims)

    def down(self, m: Layer, r: int, **kwargs: Any) -> nn.Module:
        self._check(m, r)
        return self.module(
            m.in_channels,
            r,
            m.kernel_size,
            m.stride,
            m.padding,
            m.dilation,
            bias=False,
            padding_mode=m.padding_mode,
            **kwargs,
        )

    def up(self, m: Layer, r: int, bias: bool = False, **kwargs: Any) -> nn.Module:
        self._check(m, r)
        return self.module(r, m.out_channels, 1, groups=m.groups, bias=bias, **kwargs)

    def _check(self, m: Layer, r: int) -> None:
        if r % m.groups:
            raise ValueError(
                f"r={r} is not a multiple of the {m.groups} groups of this {type(m).__name__}. "
                f"Use r={max(1, round(r / m.groups)) * m.groups}."
            )

    def A(self, m: Layer, held: Tensor) -> Tensor:
        return held.flatten(1)

    def B(self, m: Layer, held: Tensor) -> Tensor:
        held, g = held.flatten(1), m.groups
        if g == 1:
            return held
        blocks = held.unflatten(0, (g, -1))  # (g, O/g, r/g)
        eye = torch.eye(g, dtype=held.dtype, device=held.device)
        return (blocks[:, :, None, :] * eye[:, None, :, None]).flatten(0, 1).flatten(1)

    def held(self, m: Layer, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        ones = [1] * self.dims
        return A.unflatten(1, (m.in_channels, *m.kernel_size)), B.view(*B.shape, *ones)

    def vector(self, m: Layer, v: Tensor) -> Tensor:
        return v.view(1, -1, *[1] * self.dims)

    def norm_product(self, m: Layer, A: Tensor, B: Tensor) -> Tensor | None:
        # checkpoints of grouped convolutions hold magnitudes for this product: B's compact blocks, (O, r/g), are read
        # as (O/g, r), and the result as (O, I/g); it is no norm of the update, but every magnitude is relative to it
        g = m.groups
        if g == 1:
            return None
        blocks = B.unflatten(0, (g, -1)).unflatten(-1, (g, -1))
        compact = torch.stack([blocks[i, :, i] for i in range(g)])
        return (compact.reshape(-1, A.shape[0]) @ A).reshape(B.shape[0], -1)


class ParameterView(LinearView):
    """A parameter of a module that is no layer: (O, I), or experts (E, O, I), stored (E, I, O) if `is_transposed`."""

    label = "ParamWrapper"
    activations = False
    dense = False

    def __init__(self, name: str, bias_name: str | None = None):
        self.name, self.bias_name = name, bias_name or ""

    def shape(self, m: Layer) -> Pair:
        raw = getattr(m, self.name)
        if raw.dim() not in (2, 3):
            raise ValueError(
                f"The parameter {self.name!r} has {raw.dim()} dimensions {tuple(raw.shape)}; only matrices (out, in) "
                "and stacks of matrices (experts, out, in) can be adapted."
            )
        return tuple(self.matrix(m, raw).shape)

    def check_dropout(self, path: str, argument: str) -> None:
        raise ValueError(
            f"{argument} has no meaning for {path!r}, a parameter that its module reads: the adapter has no input of "
            f"its own. Set {argument}=0, or only for this one: module_config={{{path!r}: {{{argument!r}: 0}}}}."
        )

    def matrix(self, m: Layer, raw: Tensor) -> Tensor:
        return raw.mT if self._transposed(m, raw) else raw

    def raw(self, m: Layer, W: Tensor) -> Tensor:
        return W.mT if self._transposed(m, W) else W

    def _transposed(self, m: Layer, raw: Tensor) -> bool:
        return raw.dim() == 3 and bool(getattr(m, "is_transposed", False))

    def out_axis(self, m: Layer) -> int:
        raw = getattr(m, self.name)
        return raw.dim() - (1 if self._transposed(m, raw) else 2)

    def bias(self, m: Layer) -> Tensor | None:
        return getattr(m, self.bias_name) if self.bias_name else None

    def down(self, m: Layer, r: int, **kwargs: Any) -> nn.Module:
        *experts, _, inp = self.shape(m)
        return linear_module(inp, r * math.prod(experts), **kwargs)

    def up(self, m: Layer, r: int, bias: bool = False, **kwargs: Any) -> nn.Module:
        *experts, out, _ = self.shape(m)
        if bias and not self.bias_name:
            raise ValueError(
                f"lora_bias=True has no meaning for {self.name!r}, which has no bias. Set lora_bias=False."
            )
        return linear_module(r * math.prod(experts), out, bias, **kwargs)

    def A(self, m: Layer, held: Tensor) -> Tensor:
        # checkpoints pack A as (E r, I) and B as (O, r E)
        raw = getattr(m, self.name)
        return held.unflatten(0, (raw.shape[0], -1)) if raw.dim() == 3 else held

    def B(self, m: Layer, held: Tensor) -> Tensor:
        raw = getattr(m, self.name)
        return held.unflatten(1, (-1, raw.shape[0])).permute(2, 0, 1) if raw.dim() == 3 else held

    def held(self, m: Layer, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return (A, B) if A.dim() == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))

    def linear(self, m: Layer, x: Tensor, W: Tensor) -> Tensor:
        raise AssertionError("a parameter is put in place, it is not applied")

    def run(
        self, m: Layer, values: Mapping[str, Tensor], outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run `outer`, which is m or stands around it, with tensors in place of m's parameters."""
        held = m._parameters
        before = {name: held[name] for name in values}
        try:
            held.update(values)
            return outer(*args, **kwargs)
        finally:
            held.update(before)


class AttentionView(ParameterView):
    """nn.MultiheadAttention: the packed in-projection (3 E, E), or one of the separate ones.

    The out-projection is a layer of its own.
    """

    read_children = ("out_proj",)
    methods = ("merge_masks",)

    def __init__(self, name: str = "in_proj_weight") -> None:
        packed = name == "in_proj_weight"
        super().__init__(name, "in_proj_bias" if packed else None)
        self.label = "MultiheadAttention" if packed else "ParamWrapper"

    def parts(self, m: Layer) -> tuple[str, ...]:
        return () if m._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")

    def check_dropout(self, path: str, argument: str) -> None:
        path = path.removesuffix(f".{self.name}")
        warnings.warn(
            f"{argument} has no effect on {path!r}: attention reads its weights, so the adapter has no input of its "
            f"own. Set {argument}=0 for it with module_config to silence this.",
            PeftWarning,
            stacklevel=2,
        )


def embed_scale(m: Layer) -> Any:
    """The factor by which an embedding multiplies its rows (Gemma), or None; it must be one number."""
    scale = getattr(m, "embed_scale", None)
    if scale is None or isinstance(scale, (int, float)):
        return scale
    return scale if isinstance(scale, Tensor) and scale.numel() == 1 else None


class Template:
    """Makes modules like a given childless one at a tenth of its constructor's cost: its values, fresh containers."""

    def __init__(self, module: nn.Module):
        self.kind = type(module)
        self.values = {k: v for k, v in module.__dict__.items() if not hasattr(v, "copy")}
        self.containers = [(k, type(v)) for k, v in module.__dict__.items() if hasattr(v, "copy")]

    def new(self) -> Any:
        """A module of its own."""
        module = self.kind.__new__(self.kind)
        d = module.__dict__
        d.update(self.values)
        for key, kind in self.containers:
            d[key] = kind()
        return module


def linear_module(inp: int, out: int, bias: bool = False, **kwargs: Any) -> nn.Linear:
    """nn.Linear with uninitialised weights: its owner fills them, so torch's own draw would be wasted."""
    module: nn.Linear = _TEMPLATE.new()
    module.__dict__["in_features"], module.__dict__["out_features"] = inp, out
    module._parameters["weight"] = nn.Parameter(torch.empty(out, inp, **kwargs))
    module._parameters["bias"] = nn.Parameter(torch.empty(out, **kwargs)) if bias else None
    return module


_TEMPLATE = Template(nn.Linear(1, 1, bias=False))

_LINEAR, _CONV1D, _EMBEDDING, _ATTENTION = LinearView(), Conv1DView(), EmbeddingView(), AttentionView()
_CONVS = {nn.Conv1d: ConvView(1), nn.Conv2d: ConvView(2), nn.Conv3d: ConvView(3)}
SUPPORTED = "nn.Linear, transformers' Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention"


def view_of(m: nn.Module, parameter: str | None = None) -> LinearView:
    """The view of a module, or of one of its parameters.

    Raises ValueError if the module has no weight matrix that the library knows how to read.
    """
    if parameter is not None:
        return (AttentionView if isinstance(m, nn.MultiheadAttention) else ParameterView)(parameter)
    view = _BY_TYPE.get(type(m))
    if view is None:
        view = _BY_TYPE[type(m)] = _find(m)
    return view


_BY_TYPE: dict[type, LinearView] = {}


def _find(m: nn.Module) -> LinearView:
    for kind, view in _CONVS.items():
        if isinstance(m, kind) and not isinstance(m, nn.modules.conv._ConvTransposeNd):
            return view
    if isinstance(m, nn.Embedding):
        return _EMBEDDING
    if isinstance(m, nn.MultiheadAttention):
        return _ATTENTION
    if type(m).__name__ == "Conv1D" and hasattr(m, "nf"):
        return _CONV1D
    if isinstance(m, nn.Linear) or (hasattr(m, "in_features") and hasattr(m, "out_features")):
        return _LINEAR
    raise ValueError(f"{type(m).__name__} cannot be adapted. Supported layers are {SUPPORTED}.")


def supported(m: nn.Module) -> bool:
    """Whether `view_of` knows the module."""
    try:
        view_of(m)
    except ValueError:
        return False
    return True


def reads_weights(parent: nn.Module | None) -> bool:
    """Whether a parent reads the weights of its children instead of calling them, so that they must show W'."""
    return isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
