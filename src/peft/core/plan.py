"""What a configuration will change in a model: the result of matching, printable as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .defaults import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from .pattern import Selector, suffixes

if TYPE_CHECKING:
    from torch import nn


class Target(NamedTuple):
    """One module, or one of its parameters, that will be adapted.

    Attributes:
        path: the module's path in the model; "" for the model itself.
        module: the module that stands there now; a tuner layer, if another adapter is there already.
        parameter: the name of the parameter that is adapted, None for the module as a whole.
        reason: the entry of the configuration that selects it.
    """

    path: str
    module: nn.Module
    parameter: str | None
    reason: str

    @property
    def name(self) -> str:
        """The name under which patterns find it: the path, and the parameter's name if there is one."""
        return ".".join(part for part in (self.path, self.parameter) if part)


@dataclass(frozen=True)
class Row:
    """One line of the printed plan; `trainable` is None where the method cannot tell, as are alpha and scaling."""

    path: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    trainable: int | None
    reason: str
    alpha: float | None = None
    scaling: float | None = None


@dataclass
class Plan:
    """All that a configuration selects in a model. Making it has changed neither.

    Attributes:
        targets: in the order of the model; parameters of one module in the order of their registration.
        skipped: paths that were selected but are left out, each with the reason.
        config: the configuration, unchanged.
        embedding, tied: path of the input embedding, and of the modules that share its weight.
        target_modules_to_tie, modules_to_tie: `tied`, if it follows the embedding's adapter or trained copy.
        modules_to_save: what to store as `config.modules_to_save`.
        rows, base_parameters: what the table shows; filled by `describe`.
        notes: what is as it was asked for but often not meant, in a sentence each; shown below the table.
    """

    config: Any
    targets: list[Target] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    embedding: str | None = None
    tied: list[str] = field(default_factory=list)
    target_modules_to_tie: list[str] = field(default_factory=list)
    modules_to_tie: list[str] = field(default_factory=list)
    modules_to_save: list[str] | None = None
    rows: list[Row] = field(default_factory=list)
    base_parameters: int | None = None
    notes: list[str] = field(default_factory=list)
    names: Sequence[str] = field(default=(), repr=False)
    selection: str | set[str] | None = field(default=None, repr=False)
    _stored: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def module_names(self) -> list[str]:
        """Paths of the adapted modules, tied ones last, as the tuner's `targeted_module_names` lists them."""
        return [*(t.path for t in self.targets if t.parameter is None), *self.target_modules_to_tie]

    @property
    def parameter_names(self) -> list[str]:
        """Full names of the adapted parameters, as the tuner's `targeted_parameter_names` lists them."""
        return [t.name for t in self.targets if t.parameter is not None]

    @property
    def target_modules(self) -> str | set[str] | None:
        """What to store as `config.target_modules`: shorthand and defaults resolved, long lists shortened."""
        if self._stored is None and self.selection is not None:
            self._stored = compact(self.selection, self.names, self.config)
        return self._stored

    @property
    def trainable(self) -> int | None:
        """How many parameters the plan trains, None if some target's number is not known."""
        counts = [row.trainable for row in self.rows]
        return None if None in counts else sum(n for n in counts if n is not None)

    def __str__(self) -> str:
        rows = self.rows or [
            Row(t.name or "(the model)", type(t.module).__name__, (), None, None, t.reason) for t in self.targets
        ]
        scaled = any(row.alpha is not None for row in rows)
        numbers = ("rank", "alpha", "scaling", "trainable") if scaled else ("rank", "trainable")
        head = ("path", "type", "shape", *numbers, "reason")
        lines = [_cells(row, scaled) for row in rows]
        empty = ("",) * (len(head) - 2)
        lines += [(path or "(the model)", *empty, f"skipped: {why}") for path, why in self.skipped]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        right = range(3, len(head) - 1)
        text = [
            "  ".join(
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in [head, tuple("-" * w for w in widths), *lines]
        ]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([*(line.rstrip() for line in text), self.summary, *notes])

    @property
    def summary(self) -> str:
        """How many targets there are, and how much is trained."""
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        found = f"{len(self.targets)} target{'' if len(self.targets) == 1 else 's'}{skipped}"
        trainable = self.trainable
        if not self.rows or trainable is None or self.base_parameters is None:
            return found
        copies = sum(row.trainable or 0 for row in self.rows if row.reason != "bias")
        total = self.base_parameters + copies
        share = 100 * trainable / max(total, 1)
        return f"{found}; trainable {trainable:,} of {total:,} parameters ({share:.4f} %)"


def _cells(row: Row, scaled: bool) -> tuple[str, ...]:
    shape, count = " x ".join(map(str, row.shape)), "" if row.trainable is None else f"{row.trainable:,}"
    alphas = ["" if value is None else f"{value:.4g}" for value in (row.alpha, row.scaling)] if scaled else []
    return row.path, row.kind, shape, "" if row.rank is None else str(row.rank), *alphas, count, row.reason


def compact(selection: str | Iterable[str], names: Sequence[str], config: Any) -> str | set[str]:
    """The shortest suffixes that select the same modules as `selection`; short lists and expressions stay.

    Arguments:
        selection: names and suffixes, or a regular expression.
        names: the names of all modules of the model.
        config: lists of IA3 stay as they are, and those with `layers_to_transform`, which exact names escape.
    """
    if isinstance(selection, str):
        return selection
    wanted = set(selection)
    restricted = getattr(config, "layers_to_transform", None) is not None
    if len(wanted) < MIN_TARGET_MODULES_FOR_OPTIMIZATION or restricted or config.peft_type == "IA3":
        return wanted
    selector = Selector(wanted, "target_modules")
    taken = {s for name in names if selector.find(name) is None for s in suffixes(name)}
    free = {name: [s for s in suffixes(name) if s not in taken] for name in wanted}
    return {free[name][-1] for name in wanted} if all(free.values()) else wanted
