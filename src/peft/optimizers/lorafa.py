"""LoRA-FA: A stays as it was drawn, and B's gradient is that of the nearest full update.

    G_B  <-  1/s^2  G_B (A A' + delta I)^-1,   then AdamW

With A frozen no layer keeps its input for A's gradient. The corrected gradient makes s B A move along the projection of
the full gradient on what A can see. Sources: Zhang et al. 2023, arXiv 2308.03303; the correction: Wang et al. 2024,
arXiv 2407.18242, theorem 2.1, for a frozen A.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import PeftWarning
from .pairs import pairs

DELTA = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW with the corrected gradient for each pair of factors.

    Arguments:
        params: groups with "params", their "names", and "scaling_factors", one number or None for each parameter; a
            pair is told by its names, "...lora_A..." frozen and "...lora_B..." trained.
        lr: the rate.
        betas, eps, weight_decay: as in AdamW; the decay is applied after the step.
        correct_bias: correct the moments for their start at zero.

    Raises ValueError for values outside their range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        if lr < 0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter: betas[{i}]={beta} - should be in [0.0, 1.0)")
        if eps < 0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scalings = _scalings(group)
            held = dict(zip(group["names"], group["params"], strict=True))
            for name, p, s in zip(group["names"], group["params"], scalings, strict=True):
                if p.grad is None or not p.requires_grad:
                    continue
                A = held.get(_partner(name))
                G = p.grad if A is None or A.dim() != 2 or p.dim() != 2 else corrected(p.grad, A, s)
                self._adam(group, p, G)
        return loss

    def _adam(self, group: dict[str, Any], p: Tensor, G: Tensor) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        state["exp_avg"].lerp_(G, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])


def _partner(name: str) -> str | None:
    """The name of the A that goes with a B."""
    for up, down in (("lora_B", "lora_A"), ("lora_embedding_B", "lora_embedding_A")):
        if up in name:
            return name.replace(up, down)
    return None


def corrected(G: Tensor, A: Tensor, scaling: float | None) -> Tensor:
    """1/s^2 G (A A' + delta I)^-1, in float32."""
    wide = A.float()
    gram = wide @ wide.mT + DELTA * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    solved = G.float() @ torch.linalg.pinv(gram, hermitian=True)
    return (solved / (scaling or 1.0) ** 2).to(G.dtype)


def _scalings(group: dict[str, Any]) -> Any:
    found = group.get("scaling_factors")
    if found is not None:
        return found
    if "scaling_factor" not in group:
        raise KeyError("Expected optimizer param group to define `scaling_factors`.")
    warnings.warn(
        "The group key `scaling_factor` is deprecated: give `scaling_factors`, one for each parameter.",
        FutureWarning,
        stacklevel=3,
    )
    return [group["scaling_factor"]] * len(group["params"])


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """Freeze the factors A of a model's LoRA adapters and optimise the rest.

    Arguments:
        model: a model with LoRA adapters.
        r, lora_alpha: of the adapters; only used where a layer has no scaling of its own.
        lr: the rate.
        weight_decay: of all parameters.
        use_rslora: deprecated; the configuration says it.

    Raises ValueError if `use_rslora` is not what the active adapters have.
    """
    if use_rslora is not None:
        _check_rslora(model, use_rslora)
    found = pairs(model, embeddings=True)
    scaling = {name: pair.scaling for pair in found for name in pair.names}
    _tell_dead([pair.names[0] for pair in found if not pair.A.any()])
    names, params = [], []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name:
            p.requires_grad_(False)
        names.append(name)
        params.append(p)
    group = {
        "params": params,
        "lr": lr,
        "names": names,
        "scaling_factors": [scaling.get(name) for name in names],
        "scaling_factor": lora_alpha / (math.sqrt(r) if use_rslora else r),
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group], lr=lr)


def _tell_dead(names: list[str]) -> None:
    """Warn of frozen factors that are zero, as an embedding's first one is at its start: their updates stay zero."""
    if names:
        text = (
            f"LoRA-FA freezes {names[0]!r}, which is zero ({len(names)} such factors in all): their updates stay zero "
            "and learn nothing. Leave embeddings to another optimizer, or start with numbers: init_lora_weights=False."
        )
        warnings.warn(text, PeftWarning, stacklevel=3)


def _check_rslora(model: Any, given: bool) -> None:
    warnings.warn(
        "`use_rslora` of create_lorafa_optimizer is deprecated: the adapters' configuration says it. Leave it out.",
        FutureWarning,
        stacklevel=3,
    )
    wrong = [n for n in model.active_adapters if getattr(model.peft_config[n], "use_rslora", given) != given]
    if wrong:
        raise ValueError(
            f"use_rslora={given}, but the active adapters {wrong} have another value in their configuration. Leave the "
            "argument out; LoraConfig(use_rslora=...) decides."
        )
