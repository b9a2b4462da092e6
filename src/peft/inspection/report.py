"""What is known of an adapter's files once they have been looked into."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import PeftError


class UnreadableAdapterError(PeftError, ValueError):
    """The files of an adapter cannot be read; the message names the file and the cause."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, or that may be.

    Attributes:
        kind: "not finite", "zero", "missing", "unexpected", "rank", "unknown field", "changed", "damaged".
        text: what, where, and what it means.
        serious: whether the adapter is not what its configuration says; else it is only worth knowing.
    """

    kind: str
    text: str
    serious: bool = True


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. The norm is that of its finite numbers."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    norm: float
    finite: bool
    zero: bool


@dataclass(frozen=True)
class TargetInfo:
    """What an adapter has for one module; `rank`, `scaling` and `product_norm` where the method has them.

    `product_norm` is the Frobenius norm of s B A. That is all that is added to the weight, unless DoRA's norms or a
    start from the base's own weight come in.
    """

    path: str
    tensors: tuple[str, ...]
    parameters: int
    rank: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    product_norm: float | None = None


@dataclass
class Inspection:
    """An adapter's folder; `to_dict` gives all of it as plain values."""

    path: str
    method: str
    base_model: str | None
    fingerprint: str | None
    task_type: str | None
    peft_version: str | None
    config: dict[str, Any]
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)
    targets: list[TargetInfo] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # keys that belong to no target
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing serious is wrong."""
        return not any(p.serious for p in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "ok": self.ok}
