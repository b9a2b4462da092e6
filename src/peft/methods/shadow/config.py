"""The configuration of Shadow."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import describe
from ...target_config import TargetConfig, number, probability, rank

SIZES = {
    "shadow_num_hidden_layers": ("num_hidden_layers",),
    "shadow_hidden_size": ("hidden_size",),
    "shadow_num_attention_heads": ("num_attention_heads",),
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
}


@dataclass
class ShadowConfig(TargetConfig):
    """The configuration of Shadow: a small model whose states run beside those of the base model."""

    kind = "SHADOW"
    added = frozenset({"bias"})
    any_module = True
    r: int = field(default=8, metadata=describe("Rank of what a block takes from the shadow."))
    shadow_alpha: float = field(default=0.1, metadata=describe("Multiplies what a block takes."))
    shadow_dropout: float = field(default=0.2, metadata=describe("Dropout on the difference to the shadow, in [0, 1)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))
    shadow_model: str = field(
        default="mirror", metadata=describe("'mirror': the base's kind, random; else a folder or repository.")
    )
    shadow_num_hidden_layers: int | None = field(default=None, metadata=describe("Layers of the mirror; 1 if not set."))
    shadow_hidden_size: int | None = field(default=None, metadata=describe("Hidden size of the mirror."))
    shadow_num_attention_heads: int | None = field(default=None, metadata=describe("Attention heads of the mirror."))
    shadow_intermediate_size: int | None = field(default=None, metadata=describe("Inner size of the mirror."))
    share_embeddings: bool = field(
        default=True, metadata=describe("A mirror of equal size reads the base's embeddings.")
    )
    update_hidden_size: int | None = field(default=None, metadata=describe("Inner size of the shadow's update; r."))
    auxiliary_loss_weight: float = field(default=0.05, metadata=describe("Weight of the shadow's own loss."))

    def check(self) -> None:
        """Numbers; sizes are a mirror's."""
        probability("shadow_dropout", self.shadow_dropout)
        for name in ("shadow_alpha", "auxiliary_loss_weight"):
            number(name, getattr(self, name))
        for name in (*SIZES, "update_hidden_size"):
            if getattr(self, name) is not None:
                rank(name, getattr(self, name))
        wrong = [name for name in SIZES if getattr(self, name) is not None]
        if self.shadow_model != "mirror" and wrong:
            raise ValueError(f"{wrong[0]} is for shadow_model='mirror'; {self.shadow_model!r} has its own sizes.")
        if self.target_parameters:
            raise ValueError("Shadow wraps whole blocks, so target_parameters has no meaning. Use target_modules.")
