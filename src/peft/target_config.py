"""What the configurations of methods that adapt modules share: the fields that choose the modules, and their checks."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .config import PeftConfig, describe
from .errors import PeftWarning, nearest, report
from .types import PeftType

MODULE_CONFIG = describe(
    "Fields that differ for some modules: {regular expression of the name or of its end: {field: value}}."
)


SCOPE = describe("The parts of the model to stay in: 'text', 'vision', 'audio', 'experts', or a list of such.")
SCOPES = ("text", "vision", "audio", "experts")
AUTO = "auto"  # an alpha that follows the rank
OrAuto = int | Literal["auto"]
CHOSEN = frozenset(
    ["target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern", "scope"]
)  # the fields that choose the layers


class UnknownBiasError(NotImplementedError, ValueError):
    """`bias` names no rule."""


@dataclass
class TargetConfig(PeftConfig):
    """The fields that choose modules. A subclass sets `kind`, and adds its own fields and checks (`check`)."""

    kind: ClassVar[str] = ""  # its peft_type
    added: ClassVar[frozenset[str]] = frozenset()  # fields that the original lacks; not in files while at their default
    ranks: ClassVar[tuple[str, ...]] = ("r",)  # fields that must be at least 1
    any_module: ClassVar[bool] = False  # targets may be modules of any class
    searched: ClassVar[frozenset[str]] = frozenset()  # tables whose keys need only be found in a name
    together: ClassVar[frozenset[str]] = frozenset()  # beside others that count for all layers at once
    below: ClassVar[frozenset[str]] = frozenset()  # tables whose expressions match what follows a dot alone
    corrected: ClassVar[bool] = True  # fan_in_fan_out becomes what the layers have; files of some methods never do so

    target_modules: list[str] | str | None = field(
        default=None,
        metadata=describe(
            "Names of the modules to adapt (or their last parts), a regular expression, or 'all-linear'."
        ),
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata=describe("Names, or a regular expression, of modules to leave out.")
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=describe("Modules that are trained as a whole and saved with the adapter.")
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata=describe("Numbers of the layers to adapt; all layers if not set.")
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata=describe("Name of the list of layers that `layers_to_transform` counts.")
    )
    bias: str = field(
        default="none", metadata=describe("Biases of the base model to train: 'none', 'all' or one's own.")
    )
    target_parameters: list[str] | None = field(
        default=None, metadata=describe("Parameters to adapt, by full name or its last parts.")
    )
    module_config: dict[str, dict[str, Any]] | None = field(default=None, metadata=MODULE_CONFIG)
    layer_replication: list[tuple[int, int]] | None = field(
        default=None,
        metadata=describe("Ranges of layers [start, end) from which the model's list of layers is rebuilt."),
    )
    scope: list[str] | str | None = field(
        default=None,
        kw_only=True,
        metadata=SCOPE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.kind)
        read_names(self)
        check_layers(self)
        check_bias(self, f"{self.kind.lower()}_only")
        for name in self.ranks:
            rank(name, getattr(self, name))
        if isinstance(self, Alpha):
            self.resolve_alpha()
        check_tables(self)
        self.check()
        self._check_module_config()

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Files may choose layers where the choice has no effect; such fields go, with a word."""
        if dropped := idle(kwargs):
            text = "a string as `target_modules` chooses the layers, too, and a pattern needs `layers_to_transform`"
            what = f"{' and '.join(dropped)} in a file of {cls.__name__} has no effect: {text}."
            report(PeftWarning, what, stacklevel=5)
        return super().check_kwargs(**{**kwargs, **dict.fromkeys(dropped)})

    def check(self) -> None:
        """Refuse what cannot be right; a method's own fields."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary; those that the original library lacks only where they are set."""
        values = super().to_dict()
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        added = frozenset({"target_parameters", "layer_replication", "scope"}).union(
            *(vars(c).get("added", ()) for c in type(self).__mro__)
        )
        for name in added:
            if values.get(name) == defaults[name]:
                values.pop(name, None)
        return values


class Alpha:
    """What configurations share whose update is scaled by alpha and a rank, and whose alpha may be "auto".

    "auto" becomes a number where the configuration is made: `alpha_for` the rank, for `rank_pattern` and
    `module_config` likewise, so that files hold numbers. An alpha that somebody has written stays.
    """

    alpha_name: ClassVar[str] = "alpha"
    rank_name: ClassVar[str] = "r"
    rank_beside: ClassVar[str] = ""  # of a further update
    alpha_per_rank: ClassVar[int] = 2  # so that the scaling is the same at every rank

    def alpha_for(self, r: int) -> int:
        """What "auto" is at a rank."""
        return self.alpha_per_rank * (r + getattr(self, self.rank_beside, 0))

    def scaling_for(self, alpha: float, r: int) -> float:
        """What the update is multiplied by."""
        return alpha / (r + getattr(self, self.rank_beside, 0))

    def resolve_alpha(self) -> None:
        """A number in place of "auto". Raises TypeError or ValueError if it is neither."""
        name, values = self.alpha_name, vars(self)
        if not isinstance(values[name], str) or values[name] != AUTO:
            number(name, values[name])
            return
        values[name] = self.alpha_for(values[self.rank_name])
        ranks = {key: r for key, r in (values.get("rank_pattern") or {}).items() if isinstance(r, int)}
        found = {key: self.alpha_for(r) for key, r in ranks.items()}
        if set(found.values()) - {values[name]}:
            own = values.get("alpha_pattern") or {}
            values["alpha_pattern"] = {**own, **{key: alpha for key, alpha in found.items() if key not in own}}
        for key, changes in (values.get("module_config") or {}).items():
            if self.rank_name in changes and name not in changes:
                alpha = self.alpha_for(changes[self.rank_name])
                values["module_config"] = {**values["module_config"], key: {**changes, name: alpha}}


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError if a field's value is none of the choices."""
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is unknown.{nearest(str(value), [str(c) for c in choices])} Use one of "
            f"{', '.join(map(repr, choices))}."
        )


def probability(name: str, value: Any) -> None:
    """Raise TypeError or ValueError if a field is no probability below 1."""
    number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`{name}` must be in [0, 1); got {value}.")


def divisor(name: str, value: int, features: tuple[int, int], path: str, way: str = "") -> None:
    """Raise ValueError if a number does not divide a layer's features, (in, out); `way` sets it for this one."""
    common = math.gcd(*features)
    if common % value:
        fits = [d for d in range(1, common + 1) if common % d == 0]
        raise ValueError(
            f"{name}={value} must divide the in-features ({features[0]}) and out-features ({features[1]}) of {path!r}. "
            f"Use one of {fits}{way}, or exclude the layer (`exclude_modules`)."
        )


def rank(name: str, value: Any) -> None:
    """Raise TypeError or ValueError if a field is no integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer of at least 1; got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` should be a positive integer value; got {value}. Use at least 1.")


def number(name: str, value: Any) -> None:
    """Raise TypeError or ValueError if a field is no finite number."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"`{name}` must be a number; got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number; got {value}.")


def check_series(config: Any, turns: bool = True) -> None:
    """Warn where the series of a rotation has one term: the identity, which is all that there will ever be."""
    if config.use_cayley_neumann and config.num_cayley_neumann_terms == 1 and turns:
        text = (
            f"num_cayley_neumann_terms=1 leaves of the series the identity alone: {config.kind}'s rotations change "
            "nothing and are not trained. Use more terms, such as 5, or use_cayley_neumann=False for the exact ones."
        )
        report(PeftWarning, text, strict=False, stacklevel=6)


def patterns(name: str, value: Any) -> dict[str, Any]:
    """A dictionary whose keys are regular expressions."""
    if not isinstance(value, (dict, type(None))):
        raise TypeError(f"`{name}` must be a dictionary of patterns; got {value!r}.")
    for pattern in value or {}:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{name}` has the key {pattern!r}, which is no regular expression ({error}). Escape special "
                "characters with a backslash."
            ) from error
    return value or {}


def check_tables(config: Any) -> None:
    """Raise TypeError or ValueError if a value for some modules would be none for all."""
    for name in ("rank_pattern", "n_frequency_pattern", "block_size_pattern", "alpha_pattern"):
        for pattern, value in (getattr(config, name, None) or {}).items():
            if not isinstance(value, list) and name not in config.searched:  # a record of kept ranks; the method's own
                (number if name == "alpha_pattern" else rank)(f"{name}[{pattern!r}]", value)


def names(name: str, value: Any) -> list[str]:
    """A collection of names as a list."""
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"`{name}` must be a list of names or a string; got {value!r}.")
    wrong = [v for v in value if not isinstance(v, str)]
    if wrong:
        raise TypeError(f"`{name}` must hold names; got {wrong[0]!r} of type {type(wrong[0]).__name__}.")
    return list(value)


def read_names(config: Any) -> None:
    """Lists of names become sets; strings stay. Patterns are dictionaries."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, str):
            setattr(config, name, set(names(name, value)))
    for name in ("modules_to_save", "target_parameters"):
        value = getattr(config, name)
        if isinstance(value, str):
            raise TypeError(f"`{name}` must be a list of names; got the string {value!r}. Use [{value!r}].")
        names(name, value or ())
    for name in (f.name for f in dataclasses.fields(config) if f.name.endswith("_pattern")):
        if name != "layers_pattern":
            setattr(config, name, patterns(name, getattr(config, name)))


def check_bias(config: Any, *own: str) -> None:
    """Raise if `bias` names no rule."""
    rules = ("none", "all", *own)
    if config.bias not in rules:
        raise UnknownBiasError(
            f"bias={config.bias!r} is unknown.{nearest(str(config.bias), rules)} Use one of {', '.join(rules)}."
        )


def idle(values: Mapping[str, Any]) -> list[str]:
    """The fields that choose layers where something else has chosen them, or none are numbered."""
    if isinstance(values.get("target_modules"), str):
        return [name for name in ("layers_to_transform", "layers_pattern") if values.get(name) is not None]
    alone = values.get("layers_pattern") and values.get("layers_to_transform") is None
    return ["layers_pattern"] if alone else []


def read_layers(config: Any) -> None:
    """A range, or another collection of numbers, becomes a list, which files can hold.

    Raises TypeError where it is neither that nor a number.
    """
    value = config.layers_to_transform
    if value is None or type(value) is int:
        return
    layers = list(value) if hasattr(value, "__iter__") else [value]
    if isinstance(value, str | Mapping) or any(isinstance(v, bool) or not hasattr(v, "__index__") for v in layers):
        raise TypeError(
            f"`layers_to_transform` must be the number of a layer or a list of such; got {value!r}. Use [0, 1] or "
            "range(0, 2)."
        )
    numbers = [operator.index(v) for v in layers]
    config.layers_to_transform = sorted(numbers) if isinstance(value, set | frozenset) else numbers


def check_layers(config: Any) -> None:
    """Raise if the fields that choose layers contradict each other, or choose none; collections become lists."""
    read_layers(config)
    for part in [config.scope] if isinstance(config.scope, str) else names("scope", config.scope or ()):
        choice("scope", part, SCOPES)
    for name in idle(vars(config)):
        if isinstance(config.target_modules, str):
            raise ValueError(
                f"`{name}` cannot be used when `target_modules` is a str. Give a list of names, or write the "
                "layers into the regular expression."
            )
        raise ValueError(
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified. Give the numbers of "
            "the layers, or leave both out."
        )
