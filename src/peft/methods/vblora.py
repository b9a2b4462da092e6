"""VB-LoRA: low-rank factors put together from a bank of vectors that all layers share.

    W' = W + B A,   each piece of v numbers of A's rows and B's columns:  sum over m in top k of softmax(l)_m V[m]

V (h, v) is the bank, one of each adapter, l (h,) the logits of a piece; the softmax runs over its k largest alone. All
start at random, so training does not start at the base model. Source: Li, Han, Ji 2024, arXiv 2405.15179, section 3.

`save_only_topk_weights` keeps the k places and k - 1 weights of a piece; such a file is for inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import describe
from ..core.kept import kept
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import LowRank, Site
from ..core.shared import Shared, unwritten
from ..core.stack import Adapter, Stack
from ..target_config import divisor, number, probability
from .additive import AdditiveConfig, AdditiveModel

KINDS = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32), (2**63, torch.int64))  # of places
LOGITS = ("vblora_logits_A", "vblora_logits_B")


@dataclass
class VBLoRAConfig(AdditiveConfig):
    """The configuration of VB-LoRA."""

    kind = "VBLORA"
    ranks = ("r", "num_vectors", "vector_length", "topk")
    r: int = field(default=4, metadata=describe("Rank."))
    num_vectors: int = field(default=256, metadata=describe("Vectors in the bank."))
    vector_length: int = field(default=256, metadata=describe("Their length, which divides the sizes of each layer."))
    topk: int = field(default=2, metadata=describe("How many vectors each piece is mixed from."))
    save_only_topk_weights: bool = field(
        default=False, metadata=describe("Keep only the weights in use in files, which then serve for inference only.")
    )
    vblora_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of A, in [0, 1)."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_vector_bank_bound: float = field(default=0.02, metadata=describe("The bank starts uniform in +- this."))
    init_logits_std: float = field(default=0.1, metadata=describe("The logits start normal with this deviation."))

    def check(self) -> None:
        """Numbers."""
        probability("vblora_dropout", self.vblora_dropout)
        for name in ("init_vector_bank_bound", "init_logits_std"):
            number(name, getattr(self, name))
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} is more than num_vectors={self.num_vectors}. Use at most as many.")


class VBLoRA(LowRank):
    """W' = W + B A, from a bank."""

    dropout = "vblora_dropout"
    neutral_zeros = False  # equal logits take of all vectors alike

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]]) -> dict[str, Shared]:
        bound = settings.init_vector_bank_bound
        bank = unwritten(settings.num_vectors, settings.vector_length).uniform_(-bound, bound)
        return {"vblora_vector_bank": Shared(nn.Parameter(bank))}

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        (*lead, out, inp), v, h = site.view.shape(site.module), c.vector_length, c.num_vectors
        divisor("vector_length", v, (inp, out), site.path)
        return {
            "vblora_dropout": site.dropout("vblora_dropout"),
            "vblora_logits_A": nn.Parameter(torch.empty(*lead, c.r, inp // v, h, **site.kwargs)),
            "vblora_logits_B": nn.Parameter(torch.empty(*lead, out // v, c.r, h, **site.kwargs)),
            **{"r": c.r, "topk": c.topk, "only_topk": False},
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        for name in LOGITS:
            p.held(name).normal_(0, p.settings.init_logits_std)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        if p.only_topk and p.layer.training:
            raise RuntimeError(
                f"The adapter {p.name!r} cannot be trained: it was saved with save_only_topk_weights=True, so other "
                "logits are lost. Call `model.eval()`, or load a file with all logits."
            )
        return kept(p, lambda: mixed(p), what="factors")

    def split(self, p: Adapter, key: str, value: Tensor) -> dict[str, Tensor]:
        if not p.settings.save_only_topk_weights or not self.parts(key):
            return super().split(p, key, value)
        top, at = value.topk(p.topk, -1)
        at = at.to(next(kind for most, kind in KINDS if value.shape[-1] < most))
        return dict(zip(self.parts(key), (at, top.softmax(-1)[..., :-1].contiguous()), strict=True))

    def parts(self, key: str) -> tuple[str, ...]:
        return (f"{key}_topk_indices", f"{key}_topk_weights") if key.startswith("vblora_logits_") else ()

    def join(self, p: Adapter, key: str, parts: list[Tensor]) -> Tensor:
        at, weights = parts[0].long(), parts[1]
        last = (1 - weights.sum(-1, keepdim=True)).clamp_min(0)
        logits = weights.new_full((*at.shape[:-1], (held := p.held(key)).shape[-1]), -torch.inf, dtype=held.dtype)
        return logits.scatter(-1, at, torch.cat((weights, last), -1).log().to(held.dtype))

    def written(self, p: Adapter) -> None:
        p.__dict__["only_topk"] = bool(p.vblora_logits_A.flatten()[: p.vblora_logits_A.shape[-1]].isinf().any())


def mixed(p: Adapter) -> tuple[Tensor, Tensor]:
    """A and B of the vectors that their logits (..., h) mix, all of them at once."""
    a, b = (p.held(key) for key in LOGITS)
    top, at = torch.cat([a.flatten(0, -2), b.flatten(0, -2)]).topk(p.topk, -1)
    vectors = (top.softmax(-1)[..., None] * F.embedding(at, p.vblora_vector_bank.to(a.device, a.dtype))).sum(1)
    A, B = vectors.split([a.shape[:-1].numel(), b.shape[:-1].numel()])
    return A.view(*a.shape[:-2], -1), B.view(*b.shape[:-1], -1).mT.flatten(-3, -2)


class VBLoRALayer(BaseTunerLayer):
    """A target under VB-LoRA."""

    family = "vblora"
    _sized = True
    adapter_layer_names = LOGITS
    other_param_names = ("r", "topk", "vblora_dropout")
    _home_order = ("vblora_dropout", *LOGITS)
    _parameter_homes = frozenset(LOGITS)


class VBLoRAModel(AdditiveModel):
    """VB-LoRA adapters on a model."""

    prefix = "vblora_"
    uses_shared_state = True
    layer_classes = name_layers(VBLoRALayer, globals())
    method: ClassVar[VBLoRA] = VBLoRA()

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """What a file of the adapter holds, in float32 numbers: (of VB-LoRA, of what else is trained)."""
        c: Any = self.peft_config[adapter]
        held = [m._modules[key] for _, m in self.layers() for key in LOGITS if key in m._modules]
        pieces = sum(home[adapter].numel() for home in held if adapter in home) // c.num_vectors
        place = next(kind for most, kind in KINDS if c.num_vectors < most).itemsize / 4
        each = c.topk - 1 + c.topk * place if c.save_only_topk_weights else c.num_vectors
        others = sum(t.numel() for n, t in self.named_parameters() if t.requires_grad and "vblora_" not in n)
        return c.num_vectors * c.vector_length + int(pieces * each), others

    def print_savable_parameters(self) -> None:
        """Print what a file of the active adapter holds."""
        own, others = self.get_nb_savable_parameters(self.active_adapters[0])
        whole = f"total params to-be-saved: {own + others:,d}"
        print(f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || {whole}")
