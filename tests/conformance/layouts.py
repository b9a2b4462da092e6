"""The layouts that every method must serve: a tiny model around one layer, and an input for it.

The adapted layer is `layer` in each model (the whole model in "alone"). `plain` of a layout is the same model from the
same random numbers, so that outputs can be compared with the untouched base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import pytorch_utils as transformers_layers

SAMPLES = 4


class Conv1D(nn.Module):
    """A class of somebody's own, with the name and the attributes of transformers': weight (in, out)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 4), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


def turned(out: int, width: int) -> transformers_layers.Conv1D:
    """transformers' own, of numbers of ordinary size."""
    layer = transformers_layers.Conv1D(out, width)
    nn.init.normal_(layer.weight, std=0.25)
    nn.init.normal_(layer.bias)
    return layer


class Subclass(nn.Linear):
    """A subclass that keeps the contract of nn.Linear."""


class ScaledEmbedding(nn.Embedding):
    """Multiplies its rows, as Gemma's embedding does."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


class Around(nn.Module):
    """A model with one adapted layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Attention(Around):
    """Attention of a sequence, (N, L, E), to parts of itself."""

    def forward(self, x: Tensor) -> Tensor:
        m = self.layer
        k, v = x[..., : m.kdim], x[..., : m.vdim]
        if not m.batch_first:
            x, k, v = (t.transpose(0, 1) for t in (x, k, v))
        y = m(x, k, v, need_weights=False)[0]
        return y if m.batch_first else y.transpose(0, 1)


class Encoder(nn.Module):
    """torch's encoder layer, which reads its parts' weights on its fused path."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Experts(nn.Module):
    """Parameters of a module that is no layer: "up" (out, in) or (experts, out, in), "down" likewise."""

    def __init__(self, up: tuple[int, ...], down: tuple[int, ...], is_transposed: bool = False):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(up) / 3), nn.Parameter(torch.randn(down) / 3)
        self.is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.mT if self.is_transposed else w for w in (self.up, self.down))
        if up.dim() == 2:
            return torch.tanh(x @ up.mT) @ down.mT
        h = torch.tanh(torch.einsum("bi,eoi->beo", x, up))
        return torch.einsum("beo,eio->bi", h, down)


@dataclass(frozen=True)
class Layout:
    """A model, its input and how a configuration selects its layer."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["layer"]})
    tokens: int = 0  # integers below this instead of numbers
    grouped: bool = False
    batched: bool = True
    bias: bool = True

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The base model, always of the same numbers."""
        torch.manual_seed(7)
        return self.build().to(dtype).eval()

    def x(self, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
        """An input."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(0, self.tokens, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The base model, frozen: torch chooses its attention kernel by `requires_grad`."""
        return self.model(dtype).requires_grad_(False)

    @property
    def kind(self) -> str:
        """The first word of the name: linear, conv, embedding, attention or parameter."""
        return self.name.split("-")[0]


def layer(name: str, make: Callable[[], nn.Module], *shape: int, **more: Any) -> Layout:
    """A layout with one layer called `layer`."""
    return Layout(name, lambda: Around(make()), shape, **more)


def attention(name: str, **options: Any) -> Layout:
    def build() -> nn.Module:
        torch.manual_seed(7)
        return Attention(nn.MultiheadAttention(8, 2, **options))

    return Layout(f"attention-{name}", build, (SAMPLES, 3, 8), bias=options.get("bias", True))


def parameters(name: str, names: list[str], shape: tuple[int, ...], down: tuple[int, ...], **more: Any) -> Layout:
    return Layout(
        f"parameter-{name}",
        lambda: Around(Experts(shape, down, **more)),
        (SAMPLES, 6),
        {"target_modules": [], "target_parameters": [f"layer.{n}" for n in names]},
    )


N = SAMPLES
TURNED = {"target_modules": ["layer"], "fan_in_fan_out": True}
LAYOUTS = {
    layout.name: layout
    for layout in (
        layer("linear", lambda: nn.Linear(6, 8), N, 6),
        layer("linear-nobias", lambda: nn.Linear(6, 8, bias=False), N, 6, bias=False),
        layer("linear-1-D", lambda: nn.Linear(6, 8), 6, batched=False),
        layer("linear-3-D", lambda: nn.Linear(6, 8), N, 3, 6),
        layer("linear-4-D", lambda: nn.Linear(6, 8), N, 2, 3, 6),
        layer("linear-subclass", lambda: Subclass(6, 8), N, 6),
        *(
            Layout(name, lambda kind=kind: Around(kind(8, 6)), (N, 3, 6), TURNED)
            for name, kind in {"linear-Conv1D": turned, "linear-Conv1D-own": Conv1D}.items()
        ),
        Layout("linear-alone", lambda: nn.Linear(6, 8), (N, 6), {"target_modules": ["linear"]}),
        layer("conv-1d", lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), N, 4, 9),
        layer("conv-1d-dilated", lambda: nn.Conv1d(4, 8, 3, dilation=2, bias=False), N, 4, 9, bias=False),
        layer("conv-2d", lambda: nn.Conv2d(4, 8, 3, padding=1), N, 4, 5, 5),
        layer("conv-2d-1x1", lambda: nn.Conv2d(4, 8, 1), N, 4, 5, 5),
        layer(
            "conv-2d-rectangular",
            lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
            *(N, 4, 6, 5),
        ),
        layer("conv-2d-same", lambda: nn.Conv2d(4, 8, 3, padding="same", dilation=2), N, 4, 5, 5),
        layer("conv-2d-reflect", lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), N, 4, 5, 5),
        layer("conv-2d-circular", lambda: nn.Conv2d(4, 8, 3, padding=2, padding_mode="circular"), N, 4, 5, 5),
        layer("conv-2d-grouped", lambda: nn.Conv2d(4, 8, 3, groups=2), N, 4, 5, 5, grouped=True),
        layer("conv-2d-unbatched", lambda: nn.Conv2d(4, 8, 3), 4, 5, 5, batched=False),
        layer("conv-3d", lambda: nn.Conv3d(4, 6, (1, 2, 2), padding=(0, 1, 1)), N, 4, 2, 3, 3),
        layer("embedding", lambda: nn.Embedding(10, 6), N, 3, tokens=10),
        layer("embedding-1-D", lambda: nn.Embedding(10, 6), N, tokens=10),
        layer("embedding-padding", lambda: nn.Embedding(10, 6, padding_idx=2), N, 5, tokens=10),
        layer("embedding-max-norm", lambda: nn.Embedding(10, 6, max_norm=2.0), N, 3, tokens=10),
        layer("embedding-scaled", lambda: ScaledEmbedding(10, 6), N, 3, tokens=10),
        attention("packed", batch_first=True),
        attention("packed-sequence-first"),
        attention("packed-nobias", bias=False, batch_first=True),
        attention("separate", kdim=6, vdim=5, batch_first=True),
        attention("separate-sequence-first", kdim=6, vdim=5),
        Layout("attention-encoder", Encoder, (N, 3, 8), {"target_modules": ["self_attn", "linear1", "linear2"]}),
        parameters("2-D", ["up"], (8, 6), (6, 8)),
        parameters("3-D", ["up"], (3, 8, 6), (3, 6, 8)),
        parameters("3-D-transposed", ["up"], (3, 6, 8), (3, 8, 6), is_transposed=True),
        parameters("two", ["up", "down"], (3, 8, 6), (3, 6, 8)),
    )
}
