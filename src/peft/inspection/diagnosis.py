"""What is wrong with a training run, from what was seen of each tensor: an alarm where an adapter cannot learn, and
notes where a part of one may have been left out on purpose (experts or towers that a batch does not use)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from ..core.layer import tuner_layers
from ..errors import listing


@dataclass
class Fact:
    """What was seen of one parameter.

    Attributes:
        adapter: whose it is; None of the base model's.
        part: of the adapter: its layers, or a module that is trained as a whole.
        trained: whether it was trainable in some step, or is.
        gradient: the largest |g|; None if none came.
        changed: whether its bits did; None if that cannot be seen here.
        finite: whether its numbers are, now.
        held: by an optimiser that stepped, or that was named; `steps` and the highest `rate` of it.
    """

    name: str
    adapter: str | None
    part: str
    dtype: str
    trained: bool = False
    gradient: float | None = None
    finite_gradient: bool = True
    changed: bool | None = None
    finite: bool = True
    held: bool = False
    steps: int = 0
    rate: float = 0.0


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or worth knowing.

    Attributes:
        kind: "no gradient", "zero gradient", "no change", "frozen", "not finite", "changed while frozen", "schedule".
        adapter: whose; None of the base model.
        tensors: their names in the model.
        text: what it means, the likely cause, and what to do.
        serious: whether the adapter cannot learn as it should; else it is only worth knowing.
    """

    kind: str
    adapter: str | None
    tensors: tuple[str, ...]
    text: str
    serious: bool = True

    def __str__(self) -> str:
        whose = "the base model" if self.adapter is None else f"adapter {self.adapter!r}"
        which = f" ({listing(self.tensors, 3)})" if self.tensors else ""
        return f"{'!' if self.serious else '-'} {self.kind}, {whose}: {self.text}{which}"


@dataclass
class Checkup:
    """The report of `peft.doctor`.

    Attributes:
        steps: of optimisers that hold something of the model.
        adapters: name -> how many tensors are trained, how many of them got gradients, and how many changed.
        findings: serious ones first.
    """

    steps: int
    adapters: dict[str, dict[str, int]]
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing serious was found."""
        return not any(f.serious for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        lines = [f"{'ok' if self.ok else 'not ok'} after {self.steps} steps"]
        for name, n in self.adapters.items():
            told = "{trained} tensors trained, {with_gradient} with gradients, {changed} changed".format(**n)
            lines.append(f"adapter {name!r}: {told}")
        return "\n".join([*lines, *map(str, self.findings)])


@dataclass
class State:
    """What state a model's adapters are in: where some are merged, and how far schedules have come."""

    available: set[str]
    active: set[str]
    disabled: bool
    merged: dict[str, tuple[str, ...]]  # path of a layer -> what is merged there
    schedules: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        """As it is now."""
        hosts = list(tuner_layers(model))
        companions = [c for m in model.modules() for c in m.__dict__.get("companions", {}).values()]
        available = {name for _, host in hosts for name in host._get_available_adapters()}
        steps = [(name, c.schedule(name)) for c in companions for name in available]
        return cls(
            available,
            active={name for _, host in hosts for name in host.active_adapters} & available,
            disabled=all(host.disable_adapters for _, host in hosts),
            merged={path: tuple(host.merged_adapters) for path, host in hosts},
            schedules={name: step for name, step in steps if step is not None},
        )


class Diagnosis:
    """On the way to the report.

    Arguments:
        model: that was trained.
        facts: of all its parameters.
        before: its adapters' state when the watch began.
        strange: how many parameters optimisers hold that are not in the model.
    """

    def __init__(self, model: nn.Module, facts: Sequence[Fact], before: State, strange: int) -> None:
        self.model, self.facts, self.before, self.now, self.strange = model, facts, before, State.of(model), strange
        self.steps = max((f.steps for f in facts), default=0)

    def checkup(self) -> Checkup:
        """The report."""
        found, counts = [*self._frozen(), *self._wrote()], {}
        for name in sorted(self.now.available):
            mine = [f for f in self.facts if f.adapter == name and f.trained]
            found += [*self._gradients(name, mine), *self._changes(name, mine), *self._schedule(name, mine)]
            if mine or name in self.now.active:
                learnt = sum(bool(f.gradient) for f in mine), sum(bool(f.changed) for f in mine)
                counts[name] = dict(zip(COUNTS, (len(mine), *learnt), strict=True))
        found += self._broken()
        return Checkup(self.steps, counts, sorted(found, key=lambda f: not f.serious))

    def _gradients(self, name: str, mine: list[Fact]) -> Iterator[Finding]:
        """Tensors of an adapter that are trained and get no gradient, or only zeros."""
        zero = [f for f in mine if f.gradient == 0 and f.finite_gradient]
        if zero and not any(f.gradient for f in mine):
            yield Finding("zero gradient", name, _names(zero), ZERO)
        elif zero and self.steps > FIRST:
            yield Finding("zero gradient", name, _names(zero), PARTLY, False)
        for part in _grouped(mine, lambda f: f.part):
            silent = [f for f in part if f.gradient is None and not f.changed]
            if len(silent) == len(part):
                yield Finding("no gradient", name, _names(silent), self._unreached(name))
            elif silent:
                yield Finding("no gradient", name, _names(silent), PARTLY, False)

    def _changes(self, name: str, mine: list[Fact]) -> Iterator[Finding]:
        """Tensors of an adapter that get gradients, and stay as they are."""
        stuck = [f for f in mine if f.gradient and f.changed is False and f.finite_gradient]
        for those in _grouped(stuck, self._unmoved):
            text = self._unmoved(those[0])
            some = text.startswith(LOST) and any(f.changed for f in mine)  # gradients that are nothing but rounding
            yield Finding("no change", name, _names(those), text, not some)

    def _unreached(self, name: str) -> str:
        """Why an adapter, or a whole part of it, got no gradient."""
        if self.now.disabled:
            return "adapters are disabled. Enable them (`enable_adapter_layers()`, or the end of `disable_adapter()`)."
        if any(name in merged for merged in self.now.merged.values()):
            return "it is merged into the base, which is frozen. Call `unmerge_adapter()` before training."
        if name not in self.now.active:
            return f"it is trainable, but not active. Call `set_adapter({name!r})`."
        if any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            return (
                "checkpointed layers got inputs without gradients. Call `model.enable_input_require_grads()`, or use "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        if all(f.gradient is None for f in self.facts):
            return "no backward pass was seen. Call `peft.doctor` before the steps, and `report()` after them."
        return "the loss does not depend on it: what it stands in was not run, or ran under `no_grad`, or was detached."

    def _unmoved(self, f: Fact) -> str:
        """Why a tensor with gradients stays as it is."""
        if not f.held and self.strange:
            return (
                f"no optimiser holds it, but one holds {self.strange} parameters that are not in the model: it was "
                "made before they were replaced. Make the optimiser once the model is complete."
            )
        if not f.held:
            others = listing(sorted({g.adapter for g in self.facts if g.held and g.adapter not in (None, f.adapter)}))
            whose = f" (one holds those of {others})" if others else ""
            return f"no optimiser that stepped holds it{whose}. Make one of all parameters that have `requires_grad`."
        if not f.steps:
            return "the optimiser has not stepped (a gradient scaler leaves steps out). Watch more steps."
        if f.rate == 0:
            return f"the learning rate was 0 in all {f.steps} steps. Watch more steps if this is a warmup, or raise it."
        return f"{LOST} {f.dtype} keeps of its numbers. Raise the learning rate, or train it in float32."

    def _frozen(self) -> Iterator[Finding]:
        """Nothing of any adapter is trained."""
        if any(f.trained and f.adapter is not None for f in self.facts):
            return
        configs = getattr(getattr(self.model, "module", self.model), "peft_config", {})
        for name in sorted(self.now.active or self.now.available):
            text = f"nothing of it is trainable. Call `set_adapter({name!r})`."
            if getattr(configs.get(name) if isinstance(configs, dict) else None, "inference_mode", False):
                text = "it was loaded for inference. Load it with `is_trainable=True`, or call `set_adapter`."
            if self.now.disabled:
                text = self._unreached(name)
            yield Finding("frozen", name, (), text)

    def _wrote(self) -> Iterator[Finding]:
        """Tensors that are not trained, and have other numbers than before."""
        merged = {path for path, names in self.before.merged.items() if names != self.now.merged.get(path)}
        moved = [f for f in self.facts if f.changed and not f.trained and not _is_below(f.name, merged)]
        for those in _grouped(moved, lambda f: f.adapter or ""):
            text = "something has written into them (a load, a merge that stays, an initialisation)."
            if any(f.steps for f in those):
                text = (
                    "an optimiser that steps holds them (left-over gradients, momentum). Give it trainable ones only."
                )
            yield Finding("changed while frozen", those[0].adapter, _names(those), text)

    def _broken(self) -> Iterator[Finding]:
        """Numbers that are NaN or infinite."""
        for those in _grouped([f for f in self.facts if not f.finite], lambda f: f.adapter or ""):
            text = "they hold NaN or infinity. Lower the learning rate, and load them again."
            yield Finding("not finite", those[0].adapter, _names(those), text)
        for those in _grouped([f for f in self.facts if f.finite > f.finite_gradient], lambda f: f.adapter or ""):
            text = "some gradients were NaN or infinite (a gradient scaler leaves such steps out)."
            yield Finding("not finite", those[0].adapter, _names(those), text, not any(f.changed for f in those))

    def _schedule(self, name: str, mine: list[Fact]) -> Iterator[Finding]:
        """A method's schedule that did not go on with the steps."""
        step = self.now.schedules.get(name)
        if step is not None and step == self.before.schedules.get(name) and any(f.steps for f in mine):
            text = (
                f"its schedule stands at step {step}. Call `model.base_model.update_and_allocate(step)` in each step, "
                "after `backward()` and before `zero_grad()`."
            )
            yield Finding("schedule", name, (), text)


def _names(facts: Sequence[Fact]) -> tuple[str, ...]:
    return tuple(f.name for f in facts)


def _grouped(facts: Sequence[Fact], key: Callable[[Fact], str]) -> list[list[Fact]]:
    return [list(group) for _, group in groupby(sorted(facts, key=key), key=key)]


def _is_below(name: str, paths: Collection[str]) -> bool:
    return any(name.startswith(f"{path}." if path else "") for path in paths)


COUNTS = ("trained", "with_gradient", "changed")
FIRST = 2  # steps in which gradients of zero are usual: the first one of a factor beside zeros, and one of a warmup
ZERO = "the update is multiplied by zero (`lora_alpha=0`, both factors zero), or the losses do not depend on it."
PARTLY = "what they belong to made no difference to the losses (tokens, experts or layers that no batch has used)."
LOST = "the steps are smaller than what"
