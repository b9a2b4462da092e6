"""How classes of layers are made: one that a program defines stands on nn.Module and a layer class, in this order."""

from __future__ import annotations

from typing import Any

from torch import nn


def stated_outside(kind: type, name: str) -> bool:
    """Whether a program says what a class of layers does under a name."""
    return not str(getattr(kind, name).__module__).startswith("peft.")


class LayerType(type):
    """The type of layer classes.

    `class Mine(nn.Module, LoraLayer)` would be no class, as LoraLayer is a module by itself, which comes first. And
    whatever such a class holds and computes is its own: it gets the bases that layers have `of_programs`.
    """

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> LayerType:
        ours: list[Any] = [b for b in bases if isinstance(b, LayerType)]
        stated = [b for b in bases if b is not nn.Module] if ours else [*bases]
        foreign = ours and not namespace["__module__"].startswith("peft.")
        if (
            foreign
            and (len(stated) < len(bases) or "forward" in namespace)
            and not any(b.made for b in ours)
            and ours[0].of_programs
        ):
            before, after = ours[0].of_programs
            stated = [before, *(b for b in stated if not issubclass(after, b)), after]
        return super().__new__(mcs, name, tuple(stated), namespace, **kwargs)
