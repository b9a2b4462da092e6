"""What AdaLoRA does over the whole model: it adds to the loss, follows the optimiser and shares out the ranks."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...core.companion import Companion
from ...core.entries import PREFIX
from ...errors import PeftWarning, report
from .budget import RankAllocator
from .method import FACTORS, AdaLoRA

_METHOD = AdaLoRA()
_followers: weakref.WeakSet[Any] = weakref.WeakSet()


class Budgets(Companion):
    """The budgets of a model's AdaLoRA adapters.

    After every step of an optimiser that trains them, ranks are shared out (`update_and_allocate`). From the first call
    of that by the user on, it is left to the user.

    Arguments:
        tuner: the tuner with the adapters; it may hold adapters of other methods too.
    """

    allocators: dict[str, RankAllocator]
    by_hand: bool  # the user calls update_and_allocate
    measured: bool  # the step's gradients have been looked at
    passes: int  # losses since the last step that was followed
    optimizers: dict[str, weakref.ref[Any]]  # whose last step has trained an adapter

    def __init__(self, tuner: Any) -> None:
        self.tuner, self.allocators, self.optimizers = tuner, {}, {}
        self.by_hand = self.measured = False
        self.passes = 0
        _followers.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "optimizers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _followers.add(self)

    def added(self, name: str, undo: list[Callable[[], Any]]) -> None:
        self.allocators.pop(name, None)  # of an adapter of this name that was deleted

    # ---- the budget --------------------------------------------------------------------------------------------

    def allocator(self, name: str) -> RankAllocator:
        """The budget of an adapter."""
        found = self.allocators.get(name)
        if found is None or found.peft_config is not self.tuner.peft_config[name]:
            found = self.allocators[name] = RankAllocator(self.tuner.model, self.tuner.peft_config[name], name)
        return found

    @property
    def rankallocator(self) -> RankAllocator | None:
        """The budget of the adapter that is trained; of the first one if there are several."""
        return next((self.allocator(name) for name in self._trained()), None)

    @property
    def trainable_adapter_name(self) -> str | None:
        """The adapter whose budget that is."""
        return next(iter(self._trained()), None)

    def _trained(self) -> list[str]:
        """The adapters of this method that are trained."""
        mine = [n for n, c in self.tuner.peft_config.items() if hasattr(c, "orth_reg_weight") and not c.inference_mode]
        return [n for n in mine if any(p.lora_E.requires_grad for p in self.allocator(n).adapters)]

    def update_and_allocate(self, global_step: int) -> None:
        """Measure how much each rank matters and cut ranks, as the schedule has it for this step.

        Call it after `loss.backward()` and before `optimizer.zero_grad()`, once a step. Without such calls it happens
        after each step of the optimiser by itself.

        Arguments:
            global_step: the number of this step.

        Raises ValueError if there are no gradients.
        """
        self.by_hand = True
        for name in self._trained():
            optimizer = self.optimizers.get(name, _nobody)()
            self._share(name, global_step, not self.measured, None if optimizer is None else optimizer.state)
        self.measured, self.passes = False, 0

    def _share(self, name: str, step: int | None, measure: bool, state: Any) -> None:
        """Share out an adapter's ranks after a step (None: the next one), going by the state of its optimiser."""
        budget = self.allocator(name)
        if state is not None:
            budget.recall(state)
        budget.update_and_allocate(budget.steps + 1 if step is None else step, measure)
        if state is not None:
            budget.note(state)

    def _after_step(self, optimizer: Any) -> None:
        """A step of an optimiser: if it trains an adapter here, share out its ranks."""
        held = {id(q) for group in optimizer.param_groups for q in group["params"]}
        for name in self._trained():
            budget = self.allocator(name)
            if not budget.adapters or id(budget.adapters[0].lora_E) not in held:
                continue
            self.optimizers[name] = weakref.ref(optimizer)
            if self.by_hand:
                if budget.steps >= budget.end:
                    budget.cut_again()
            elif budget.ready():
                self._share(name, None, True, optimizer.state)
                self.measured, self.passes = True, 0

    def schedule(self, name: str) -> int | None:
        steps = self.allocator(name).steps if self._of(name) else None
        return steps if steps is not None and steps < self.tuner.peft_config[name].total_step else None

    def resize_modules_by_rank_pattern(self, rank_pattern: dict[str, list[bool]], adapter_name: str) -> None:
        """Keep only the marked ranks of each layer; the scale stays.

        Arguments:
            rank_pattern: {path of a layer's lora_E, with or without the adapter's name: a bool for each rank}.
            adapter_name: whose ranks.
        """
        plain = {key.removesuffix(f".{adapter_name}"): flags for key, flags in rank_pattern.items()}
        for p in self.allocator(adapter_name).adapters:
            vars(p)["kept"] = plain.get(f"{p.path}.lora_E")
            for name in FACTORS:
                held = getattr(p, name)
                held.data = _METHOD.for_file(p, name, held.data)
            vars(p)["kept"] = None

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: dict[str, list[bool]], state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """The factors of a state dictionary cut to the marked ranks, in place; arguments as above."""
        for key, flags in rank_pattern.items():
            layer = key.removesuffix(f".{adapter_name}").removesuffix(".lora_E")
            for name in (n for n in state_dict if f".{layer}.lora_" in f".{n}"):
                if len(flags) in state_dict[name].shape:
                    state_dict[name] = state_dict[name][:, flags] if ".lora_B" in name else state_dict[name][flags]
        return state_dict

    # ---- files -------------------------------------------------------------------------------------------------

    def for_file(self, name: str, config: Any) -> Any:
        """With the `rank_pattern` of the factors that files hold, which are whole until the last cut."""
        held = {f"{p.path}.lora_E": p for p in self._of(name)}
        if not held:  # of another method
            return config
        flags = {key: p.kept or [True] * p.lora_E.numel() for key, p in held.items()}
        before = config.rank_pattern or {}
        for key in before.keys() & flags.keys():
            if sum(before[key]) == len(flags[key]) < len(before[key]):  # layers that were made so
                flags[key] = before[key]
        pattern = None if all(map(all, flags.values())) else flags
        if pattern == config.rank_pattern:
            return config
        config = copy.copy(config)
        config.rank_pattern = pattern
        return config

    def spread(self, name: str, own: Any, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The factors of a file, which holds the ranks that were kept, in their places among all ranks.

        The other ranks have an E of zero, and the A and B that the adapter has.
        """
        flags, found = _flags(own), dict(state)
        for p in self._of(name):
            kept = flags.get(f"{p.path}.lora_E")
            if kept is None or p.lora_E.numel() != len(kept):
                continue
            for key in FACTORS:
                for full in (f"{PREFIX}{p.path}.{key}", f"{p.path}.{key}"):
                    if full in found:
                        found[full] = _METHOD.among_all(p, key, found[full], kept)
        return found

    def taken_over(self, name: str, own: Any) -> None:
        """Only the ranks of the file are at work; they are those that files hold from now on."""
        if name not in self.tuner.peft_config or not self._of(name):
            return
        flags = _flags(own)
        for p in self._of(name):
            kept = flags.get(f"{p.path}.lora_E")
            vars(p)["kept"] = kept if kept is not None and p.lora_E.numel() == len(kept) else None
        self.tuner.peft_config[name].rank_pattern = flags or None

    def _of(self, name: str) -> list[Any]:
        """The layers' shares of an adapter, if it is of this method."""
        mine = hasattr(self.tuner.peft_config.get(name), "orth_reg_weight")
        return self.allocator(name).adapters if mine else []

    # ---- the loss ----------------------------------------------------------------------------------------------

    def completed(self, output: Any) -> Any:
        """The output with the term for orthogonal factors in its loss, if it has one."""
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            return output
        for name in self._trained():
            parts = [d for p in self._live(name) for d in _METHOD.disorder(p)]
            if parts:
                weight = self.tuner.peft_config[name].orth_reg_weight
                loss = loss + weight * sum(d.to(loss.device) for d in parts) / len(parts)
                self._count(self.tuner.peft_config[name].total_step)
        output.loss = loss
        return output

    def _live(self, name: str) -> list[Any]:
        """The adapter's share of the layers that run it."""
        return [p for p in self.allocator(name).adapters if name in p.layer._live_names()]

    def _count(self, limit: int) -> None:
        """Say so if as many losses were computed as training has steps, and no step was seen."""
        self.passes += self.tuner.training
        if self.passes == limit:
            text = (
                f"AdaLoRA has computed {limit} losses without a step that its budget could follow, so no rank was cut. "
                "Call model.base_model.update_and_allocate(step) after optimizer.step() and before zero_grad()."
            )
            report(PeftWarning, text, strict=False, stacklevel=5)


def _flags(config: Any) -> dict[str, list[bool]]:
    """{path of a layer's lora_E: whether each rank was kept}, as a configuration beside a file tells it."""
    return dict(getattr(config, "rank_pattern", None) or {})  # other methods may have none


def _nobody() -> None:
    """The optimiser of an adapter that no step has trained."""


def _follow(optimizer: Any, args: Any, kwargs: Any) -> None:
    for budgets in list(_followers):
        budgets._after_step(optimizer)


register_optimizer_step_post_hook(_follow)
