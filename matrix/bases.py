"""Tiny base models and their inputs: one for each layout, and one for the abilities of each kind of method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 16  # features of every layer; square, because some methods need it
TOKENS = 20  # vocabulary


class Layer(nn.Module):
    """One layer to adapt, and a head behind it."""

    def __init__(self, target: nn.Module, features: int) -> None:
        super().__init__()
        self.attention = isinstance(target, nn.MultiheadAttention)
        self.target = target
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.target(x, x, x, need_weights=False)[0] if self.attention else self.target(x)
        if y.dim() > 3 or y.shape[-1] != SIZE:  # (batch, channels, places)
            y = y.flatten(2).mean(-1)
        return self.head(torch.tanh(y))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Blocks(nn.Module):
    """Two blocks with a layer `fc` each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Words(nn.Module):
    """An embedding `emb` and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(TOKENS, SIZE)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.emb(x)))


class Normed(nn.Module):
    """A layer, its normalisation `norm`, and a head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.across = isinstance(norm, nn.BatchNorm1d)
        self.fc = nn.Linear(SIZE, SIZE)
        self.norm = norm
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y = self.norm(y.transpose(1, 2)).transpose(1, 2) if self.across else self.norm(y)
        return self.head(torch.tanh(y))


class Holder(nn.Module):
    """A weight that its module uses by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Experts(nn.Module):
    """Three experts whose weights are one parameter each way, (experts, in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, SIZE, SIZE) / 4)
        self.down = nn.Parameter(torch.randn(3, SIZE, SIZE) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(x @ self.up[e]) @ self.down[e] for e in range(3)]).mean(0)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def ids(batch: int, length: int = 6) -> Tensor:
    return torch.randint(1, TOKENS, (batch, length), generator=torch.Generator().manual_seed(3))


def convolution(kind: type, dims: int, kernel: Any = 3, **options: Any) -> Callable[[], tuple[nn.Module, dict]]:
    size = (6,) * dims
    return lambda: (Layer(kind(SIZE, SIZE, kernel, **options), SIZE), {"x": floats(3, SIZE, *size)})


def hugging_face_linear() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(SIZE, SIZE)


def sequence(layer: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, dict]]:
    return lambda: (Layer(layer(), SIZE), {"x": floats(3, 5, SIZE)})


LAYOUTS: dict[str, Callable[[], tuple[nn.Module, dict]]] = {
    "Linear": sequence(lambda: nn.Linear(SIZE, SIZE)),
    "Conv1D (transformers)": sequence(hugging_face_linear),
    "Conv1d": convolution(nn.Conv1d, 1),
    "Conv2d": convolution(nn.Conv2d, 2, padding=1),
    "Conv2d 1x1": convolution(nn.Conv2d, 2, 1),
    "Conv2d stride 2": convolution(nn.Conv2d, 2, stride=2),
    "Conv2d dilated": convolution(nn.Conv2d, 2, dilation=2),
    "Conv2d 3x1 kernel": convolution(nn.Conv2d, 2, (3, 1)),
    "Conv2d grouped": convolution(nn.Conv2d, 2, groups=2),
    "Conv3d": convolution(nn.Conv3d, 3, 2),
    "Embedding": lambda: (Layer(nn.Embedding(TOKENS, SIZE), SIZE), {"x": ids(3)}),
    "MultiheadAttention": sequence(lambda: nn.MultiheadAttention(SIZE, 4, batch_first=True)),
}
NORMS: dict[str, Callable[[], tuple[nn.Module, dict]]] = {
    "LayerNorm": lambda: (Normed(nn.LayerNorm(SIZE)), {"x": floats(3, 5, SIZE)}),
    "BatchNorm1d": lambda: (Normed(nn.BatchNorm1d(SIZE)), {"x": floats(3, 5, SIZE)}),
}
PARAMETERS: dict[str, tuple[Callable[[], tuple[nn.Module, dict]], list[str]]] = {
    "Parameter 2-d": (sequence(Holder), ["target.weight"]),
    "Parameter 3-d": (sequence(Experts), ["target.up", "target.down"]),
}


def llama() -> tuple[nn.Module, dict]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=SIZE, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    x = ids(3)
    x[:, 1:3] = torch.tensor([5, 7])  # the words that switch aLoRA on
    return LlamaForCausalLM(config), {"input_ids": x, "attention_mask": torch.ones_like(x)}


def llama_without_cache() -> tuple[nn.Module, dict]:
    model, inputs = llama()
    model.config.use_cache = False
    return model, inputs


ABILITIES: dict[str, tuple[Callable[[], tuple[nn.Module, dict]], list[str] | None]] = {
    "layers": (lambda: (Blocks(), {"x": floats(3, 5, SIZE)}), ["fc"]),
    "words": (lambda: (Words(), {"x": ids(3)}), ["emb"]),
    "norms": (NORMS["LayerNorm"], ["norm"]),
    "llama": (llama, None),
    "llama without cache": (llama_without_cache, None),
}


def make(builder: Callable[[], tuple[nn.Module, dict]], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict]:
    """A base model (always the same weights) and its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model, inputs = builder()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype).eval(), inputs
