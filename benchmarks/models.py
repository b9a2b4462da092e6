"""Small models in plain torch: a stack of tiny layers, and a decoder with the names and shapes of Llama.

Letters: B batch, T tokens, H hidden size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Block(nn.Module):
    """One linear layer under a name that a configuration can target."""

    def __init__(self, inputs: int, outputs: int, **kwargs: object) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs, **kwargs)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def stack(layers: int, width: int, **kwargs: object) -> nn.Sequential:
    """`layers` layers Linear(width, width), each called `proj`."""
    return nn.Sequential(*(Block(width, width, bias=False, **kwargs) for _ in range(layers)))


class Attention(nn.Module):
    """Causal attention without positions: q_proj, k_proj, v_proj, o_proj."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, heads, T, H / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Gated: down_proj(silu(gate_proj x) * up_proj x)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual path."""

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(hidden, heads)
        self.mlp = FeedForward(hidden, inner)
        self.input_layernorm = nn.RMSNorm(hidden)
        self.post_attention_layernorm = nn.RMSNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Tokens (B, T), or their embeddings (B, T, H), -> logits (B, T, V)."""

    def __init__(self, layers: int, hidden: int, inner: int, heads: int, vocabulary: int = 4096) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(DecoderLayer(hidden, inner, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def frozen(model: nn.Module) -> nn.Module:
    """The model with every parameter frozen: the limit for anything that adapts it."""
    return model.requires_grad_(False)
