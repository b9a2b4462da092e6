"""nn.Embedding, with its scale and its norm limit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Layer, Pair, TransposedView, main_input


class EmbeddingView(TransposedView):
    """nn.Embedding as a linear map of one-hot tokens: weight stored as (V, O), so W is (O, V)."""

    label = "Embedding"
    infix = "embedding_"
    dense = False
    one_hot = True

    def shape(self, m: Layer) -> Pair:
        return (m.embedding_dim, m.num_embeddings)

    def linear(self, m: Layer, x: Tensor, W: Tensor) -> Tensor:
        y = F.embedding(x, W.mT, m.padding_idx, None, 2.0, m.scale_grad_by_freq)  # dense gradients: not of a table
        scale = embed_scale(m)
        return y if scale is None else y * scale

    def vectors(self, m: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return [main_input(args, kwargs).flatten()]

    def drop(self, x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
        # dropout of a one-hot vector keeps or drops a token's whole contribution
        return x, F.dropout(torch.ones(x.shape, dtype=torch.float32, device=x.device), p).unsqueeze(-1)

    def base(self, m: Layer, x: Tensor) -> Tensor:
        return m(x) if m.max_norm is None else self.linear(m, x, self.read(m))

    def finishes(self, m: Layer) -> bool:
        return m.max_norm is not None

    def finish(self, m: Layer, y: Tensor) -> Tensor:
        if m.max_norm is None:
            return y
        size = torch.linalg.vector_norm(y.detach(), ord=m.norm_type, dim=-1, keepdim=True)
        size = size if (scale := embed_scale(m)) is None else size / abs(scale)  # it is rows that are limited
        return y * torch.where(size > m.max_norm, m.max_norm / (size + 1e-7), 1.0).to(y.dtype)

    def absorb(self, m: Layer, W: Tensor, b: Tensor) -> Tensor:
        scale = embed_scale(m)
        return (W + (b if scale is None else b / scale)[:, None]).to(W.dtype)

    def down(self, m: Layer, r: int, blocks: int = 1, **kwargs: Any) -> nn.Parameter:
        return nn.Parameter(torch.empty(r, self.shape(m)[1] // blocks, **kwargs))

    def up(self, m: Layer, r: int, bias: bool = False, blocks: int = 1, **kwargs: Any) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.shape(m)[0], r // blocks, **kwargs))  # a bias is held beside it


def embed_scale(m: Layer) -> Any:
    """The factor by which an embedding multiplies its rows (Gemma), or None; it must be one number."""
    scale = getattr(m, "embed_scale", None)
    if scale is None or isinstance(scale, (int, float)):
        return scale
    return scale if isinstance(scale, Tensor) and scale.numel() == 1 else None
