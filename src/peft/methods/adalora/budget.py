"""Which ranks of a model stay: those whose numbers matter most for the loss.

A number's sensitivity is |p dL/dp|, smoothed over steps, and its uncertainty the smoothed change of that; their product
is its importance. A rank's is that of its E and the means of those of its row of A and its column of B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.layer import tuner_layers
from ...core.sharded.gather import full, put
from ...core.stack import Adapter
from ...errors import PeftWarning, report
from .config import AdaLoraConfig
from .method import FACTORS

_STEP, _MEAN, _CHANGE = "adalora_step", "adalora_sensitivity", "adalora_uncertainty"  # in an optimiser's state


class RankAllocator:
    """The budget of one adapter.

    Arguments:
        model: the model with the adapter's layers.
        config: the adapter's configuration; `rank_pattern` is written.
        adapter_name: the adapter.
    """

    def __init__(self, model: Any, config: AdaLoraConfig, adapter_name: str):
        self.peft_config, self.adapter_name = config, adapter_name
        self.adapters: list[Adapter] = []
        self.averages: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # sensitivity and uncertainty
        self.steps = 0
        self.find(model)

    def find(self, model: Any) -> None:
        """The adapter's share of every layer."""
        layers = (layer for _, layer in tuner_layers(model))
        found = (getattr(layer, "adapters", {}).get(self.adapter_name) for layer in layers)
        self.adapters = [p for p in found if isinstance(p, Adapter) and p.has("lora_E")]

    @property
    def ranks(self) -> int:
        """All ranks that the adapter has."""
        return sum(p.lora_E.numel() for p in self.adapters)

    @property
    def end(self) -> int:
        """The step at which ranks are cut for the last time."""
        return int(self.peft_config.total_step or 0) - self.peft_config.tfinal

    def set_total_step(self, total_step: int) -> None:
        """How many steps the schedule has, where that is known only once the data are."""
        self.peft_config.total_step = total_step

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """How many ranks all layers have together at a step, and whether they are cut then."""
        return self.peft_config.budget(
            step, self.ranks, min(self.peft_config.target_r * len(self.adapters), self.ranks)
        )

    def ready(self) -> bool:
        """Whether there are gradients to measure by: those of a layer that did not take part are zero."""
        held = [getattr(p, name) for p in self.adapters for name in FACTORS]
        return any(q.grad is not None for q in held) and all(q.requires_grad for q in held)

    def recall(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Go on from what the state of an optimiser has noted, if it was loaded since: it is of another step then."""
        noted = {(p.path, name): state.get(getattr(p, name), {}) for p in self.adapters for name in FACTORS}
        steps = max((held.get(_STEP, 0) for held in noted.values()), default=0)
        if steps != self.steps and any(_STEP in held for held in noted.values()):
            self.steps = steps
            self.averages = {key: (held[_MEAN], held[_CHANGE]) for key, held in noted.items() if _MEAN in held}

    def note(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Leave the step and the averages in the state of the optimiser, which goes where training is to be resumed."""
        for p in self.adapters:
            for name in FACTORS:
                factor = getattr(p, name)
                if factor.grad is None and not state.get(factor):
                    continue  # optimisers take a state that holds something for one that they have begun
                held, pair = state[factor], self.averages.get((p.path, name))
                found = {} if pair is None else {_MEAN: pair[0], _CHANGE: pair[1]}
                for key in (_MEAN, _CHANGE):
                    held.pop(key, None)
                held.update({_STEP: self.steps, **found})

    def update_and_allocate(self, t: int, measure: bool = True) -> None:
        """What follows step t: measure, and cut ranks where the schedule says so.

        Arguments:
            t: the step, from 1.
            measure: whether the gradients are new.

        Raises ValueError if there are no gradients.
        """
        end, begun = self.end, self.steps
        if t < end and measure:
            if t > 1 and not begun:
                self.tell(t)
            self.measure()
        self.steps = t
        if t > end:
            self.cut_again()
            return
        for p in self.adapters:
            vars(p)["kept"] = None  # ranks come back until the end, so files hold all of them
        budget, due = self.budget_schedule(t)
        if due or t == end:
            self.cut(self.ranks - budget)
        if t == end:
            self.averages = {}

    def tell(self, t: int) -> None:
        """Say that what was measured before step t is not there."""
        text = (
            f"AdaLoRA begins to measure at step {t}, so ranks are shared out by what follows. To go on where a run "
            "has stopped, load the optimizer's state and call update_and_allocate(step) after optimizer.step()."
        )
        report(PeftWarning, text, strict=False, stacklevel=5)

    @torch.no_grad()
    def measure(self) -> None:
        """Update the importance of every number."""
        beta1, beta2 = self.peft_config.beta1, self.peft_config.beta2
        if not self.ready():
            raise ValueError(
                "AdaLoRA shares out ranks by gradients, but its factors have none, or some are frozen. Call "
                "update_and_allocate(step) after loss.backward() and before optimizer.zero_grad()."
            )
        for p in self.adapters:
            for name in FACTORS:
                held = getattr(p, name).detach().float()
                grad = getattr(p, name).grad
                zero = torch.zeros_like(held)
                now = zero if grad is None else (held * grad).abs()
                mean, change = self.averages.get((p.path, name), (zero, zero))
                mean = beta1 * mean + (1 - beta1) * now
                change = beta2 * change + (1 - beta2) * (now - mean).abs()
                self.averages[p.path, name] = mean, change

    def scores(self, p: Adapter) -> Tensor:
        """The importance of each rank, (..., r)."""
        pairs = (self.averages.get((p.path, name)) for name in FACTORS)
        A, B, E = (
            torch.zeros_like(getattr(p, n)) if s is None else s[0] * s[1] for n, s in zip(FACTORS, pairs, strict=True)
        )
        return E.squeeze(-1) + (A.mean(-1) + B.mean(-2))

    @torch.no_grad()
    def cut(self, count: int) -> None:
        """Take the E of the `count` ranks of least importance away; note what is left."""
        if count < 1:
            return
        scores = [full(self.scores(p)) for p in self.adapters]
        threshold = torch.cat([s.flatten().cpu() for s in scores]).kthvalue(count).values.item()
        pattern: dict[str, list[bool]] = {}
        for p, score in zip(self.adapters, scores, strict=True):
            stays = score > threshold
            put(p.lora_E, full(p.lora_E).masked_fill(~stays.unsqueeze(-1), 0))
            pattern[f"{p.path}.lora_E"] = stays.flatten().tolist()
            vars(p)["kept"] = pattern[f"{p.path}.lora_E"] if self.steps >= self.end else None
        self.peft_config.rank_pattern = pattern

    @torch.no_grad()
    def cut_again(self) -> None:
        """Take away what the optimiser has given back to ranks that were cut."""
        for p in self.adapters:
            flags = (self.peft_config.rank_pattern or {}).get(f"{p.path}.lora_E")
            if p.kept is None and flags is not None and len(flags) == p.lora_E.numel():
                vars(p)["kept"] = flags  # the run that cut them has ended before its last cut
            if p.kept is not None:
                E = full(p.lora_E)
                put(p.lora_E, E.masked_fill(~torch.tensor(p.kept, device=E.device).view(E.shape), 0))
