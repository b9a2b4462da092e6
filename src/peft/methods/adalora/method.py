"""AdaLoRA: a low-rank update in the form of a singular value decomposition, whose ranks are shared out in training.

    W' = W + (s / (rho + 1e-5)) B diag(E) A,   s = lora_alpha,   rho the rank at the start

E starts at zero, so training starts at the base model. A and B are kept orthogonal by a term in the loss; the ranks of
least importance in the whole model lose their E (`budget`). Source: Zhang et al. 2023, arXiv 2303.10512, section 3.

Different from the peer: the loss has the term without a task type too; the budget follows the optimiser's steps by
itself; several adapters may be trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core import sharded
from ...core.method import LowRank, Site
from ...core.stack import Adapter, Stack
from .config import kept

FACTORS = ("lora_A", "lora_B", "lora_E")


class AdaLoRA(LowRank):
    """W' = W + s B diag(E) A."""

    dropout = "lora_dropout"

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        alpha = c.lora_alpha if c.lora_alpha > 0 else float(c.init_r)
        left = kept(c, site.path) if c.inference_mode and not lead else None  # where no ranks will be shared out
        r = c.init_r if left is None else left
        shapes = {"lora_A": (r, inp), "lora_B": (out, r), "lora_E": (r, 1)}
        return {
            "lora_dropout": site.dropout("lora_dropout"),
            **{name: nn.Parameter(torch.empty(*lead, *shape, **site.kwargs)) for name, shape in shapes.items()},
            "r": c.init_r,
            "lora_alpha": c.lora_alpha,
            "scaling": alpha,
            "ranknum": float(c.init_r),
            "kept": None,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        std = 0.02 if p.settings.init_lora_weights else 1.0
        for name in FACTORS:
            getattr(p, name).normal_(std=std)
        if p.settings.init_lora_weights:
            p.lora_E.zero_()

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return p.held("lora_A") * p.held("lora_E"), p.held("lora_B")

    def scaling(self, p: Adapter) -> Any:
        return p.scaling / (p.ranknum + 1e-5)

    def takes(self, p: Adapter, key: str, shape: tuple[int, ...]) -> bool:
        """A file's factors have the ranks that its configuration says were kept."""
        rank, here = kept(p.settings, p.path), getattr(p, key).shape
        axis = len(here) - (1 if key == "lora_B" else 2)
        others = [n for i, n in enumerate(here) if i != axis] == [n for i, n in enumerate(shape) if i != axis]
        return others and len(shape) == len(here) and shape[axis] in (rank, int(p.ranknum))

    def for_file(self, p: Adapter, key: str, value: Tensor) -> Tensor:
        """Files hold the ranks that were kept; experts, whose ranks differ, are filed whole."""
        if p.kept is None or value.dim() != 2 or len(p.kept) != value.shape[1 if key == "lora_B" else 0]:
            return value
        index = torch.tensor(p.kept, device=value.device)
        return value[:, index] if key == "lora_B" else value[index]

    def among_all(self, p: Adapter, key: str, value: Tensor, kept: list[bool]) -> Tensor:
        """A factor of the ranks that were kept among all ranks of p: the others have no E, and p's A and B."""
        held, index = getattr(p, key).detach(), torch.tensor(kept, device="cpu")
        axis, shape = int(key == "lora_B"), sharded.shape(held)
        if value.shape != (*shape[:axis], sum(kept), *shape[axis + 1 :]):
            return value
        none = key == "lora_E" or value.is_meta
        full = torch.zeros(shape, dtype=held.dtype, device="cpu") if none else sharded.full(held).clone()
        full = full.to(value.device)
        return full.index_copy(axis, index.nonzero().squeeze(-1).to(value.device), value.to(full.dtype))

    def written(self, p: Adapter) -> None:
        """Ranks that come back with a file are files' again."""
        if p.kept is None:
            return
        E = sharded.full(p.lora_E.detach()).flatten().cpu()
        if len(p.kept) != len(E) or E[~torch.tensor(p.kept, device="cpu")].any():
            vars(p)["kept"], pattern = None, p.settings.rank_pattern or {}
            p.settings.rank_pattern = {k: v for k, v in pattern.items() if k != f"{p.path}.lora_E"} or None

    def disorder(self, p: Adapter) -> list[Tensor]:
        """How far A and B are from orthogonal: the norm of A A' - I, and of B' B - I."""
        A, B = (sharded.full(p.held(name)) for name in ("lora_A", "lora_B"))
        sharded.refuse_flat((A, B))
        one = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
        return [torch.linalg.matrix_norm(gram - one).mean() for gram in (A @ A.mT, B.mT @ B)]
