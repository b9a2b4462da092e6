"""Adaptive subspace allocation: of all subspaces of a model, those that matter least are frozen, step by step.

Between two cuts the importance of each number is followed, with I = |w dL/dw| of a step:

    mean <- b1 mean + (1 - b1) I,   spread <- b2 spread + (1 - b2) |I - mean|, of the mean before

A subspace's score is the mean of mean * spread over A_k, plus that over B_k. At a cut T subspaces stay:

    T = t + (total - t) m^exponent,   m = 1 - (step - init_warmup) / (final_warmup - init_warmup)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core.companion import Companion
from ...core.host import changed
from ...core.layer import BaseTunerLayer, tuner_layers
from ...core.stack import Adapter
from ...errors import PeftWarning, report

Subspace = tuple[nn.Parameter, nn.Parameter]


class Subspaces(Companion):
    """The allocation of a model's AdaMSS adapters.

    Arguments:
        tuner: the tuner with the adapters; it may hold adapters of other methods too.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner
        self.calls = self.passes = 0
        self.seen: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}  # mean and spread since the last cut

    def adapters(self, name: str) -> list[Adapter]:
        """The adapter's share of every layer."""
        layers = (layer for _, layer in tuner_layers(self.tuner.model) if isinstance(layer, BaseTunerLayer))
        return [layer.adapters[name] for layer in layers if name in layer.adapters]

    def completed(self, output: Any) -> Any:
        """The output as it is; a word if nobody allocates."""
        wanted = [c for c in self.tuner.peft_config.values() if getattr(c, "use_asa", False) and not c.inference_mode]
        self.passes += bool(wanted) and self.tuner.training
        if wanted and not self.calls and self.passes == max(c.final_warmup for c in wanted):
            text = (
                f"use_asa=True, but after {self.passes} passes no subspace has been measured. Call "
                "model.base_model.update_and_allocate(step) after each backward pass, before zero_grad()."
            )
            report(PeftWarning, text, strict=False, stacklevel=5)
        return output

    def schedule(self, name: str) -> int | None:
        c = self.tuner.peft_config.get(name)
        return self.calls if getattr(c, "use_asa", False) and self.calls < c.final_warmup else None

    @torch.no_grad()
    def update_and_allocate(self, global_step: int) -> None:
        """Measure the subspaces and, at a cut, freeze those that matter least. Frozen ones stay so.

        Call it after `loss.backward()` and before `optimizer.zero_grad()`, once a step.

        Arguments:
            global_step: the number of this step.
        """
        self.calls += 1
        for name, c in self.tuner.peft_config.items():
            if getattr(c, "use_asa", False) and c.init_warmup <= global_step <= c.final_warmup:
                places = [(p, k) for p in self.adapters(name) for k in range(len(p.adamss_A))]
                for t in (t for at in places for t in pair(*at) if t.requires_grad and t.grad is not None):
                    self._measure(t, c)
                if global_step % c.mask_interval == 0:
                    self._cut(places, target(c, len(places), global_step))

    def _measure(self, t: nn.Parameter, c: Any) -> None:
        importance = (t * t.grad).abs()  # type: ignore[operator]
        mean, spread = self.seen.get(t) or (torch.zeros_like(t), torch.zeros_like(t))
        off = (importance - mean).abs()
        b1, b2 = c.asa_importance_beta, c.asa_uncertainty_beta
        self.seen[t] = b1 * mean + (1 - b1) * importance, b2 * spread + (1 - b2) * off

    def _cut(self, places: list[tuple[Adapter, int]], target: int) -> None:
        """Keep the `target` subspaces of the highest score among those that were measured since the last cut."""
        pairs = [pair(*at) for at in places]
        scored = [(self._score(pair), i) for i, pair in enumerate(pairs) if any(t in self.seen for t in pair)]
        for _, i in sorted(scored, key=lambda found: -found[0])[target:]:
            p, k = places[i]
            vars(p)["frozen"] = (*p.frozen, k)  # a switch to the adapter, too, leaves it so
            for t in pairs[i]:
                t.requires_grad_(False)
        changed()
        for t in (t for pair in pairs for t in pair):
            self.seen.pop(t, None)

    def _score(self, pair: Subspace) -> float:
        found = (self.seen[t] for t in pair if t in self.seen)
        return sum(float((mean * spread).mean()) for mean, spread in found)


def pair(p: Adapter, k: int) -> Subspace:
    """A_k and B_k."""
    return p.adamss_A[k], p.adamss_B[k]


def target(c: Any, total: int, step: int) -> int:
    """How many subspaces stay trainable at a step."""
    m = 1 - (step - c.init_warmup) / (c.final_warmup - c.init_warmup)
    return int(c.asa_target_subspaces + (total - c.asa_target_subspaces) * m**c.asa_schedule_exponent)
