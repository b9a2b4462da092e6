"""What an adapter would change, of a model or of a configuration of which none is made yet."""

from __future__ import annotations

from typing import Any

from ..core import targets
from ..core.plan import Plan
from ..errors import PeftWarning, report
from .asked import model_of, named


def plan(model: Any, config: Any, strict: bool | None = None) -> Plan:
    """What an adapter would change in a model, as a table: `print(peft.plan(model, config))`.

    Arguments:
        model: the model, also on the meta device; also a model that has adapters already. It stays as it is. Or a
            configuration of transformers, its folder or its name, whose model is made without numbers.
        config: the configuration of a method that adapts modules.
        strict: whether entries that select nothing raise; None follows `peft.set_strict`.

    Raises NoMatchingPeftModuleError (a ValueError) where nothing would be adapted, and ValueError for methods that
    adapt no modules.
    """
    notes: list[str] = []
    made = model_of(model, config, None, notes)
    for note in notes:
        report(PeftWarning, f"The plan of {named(model)} is made from its configuration alone: {note}.", strict)
    return targets.plan(made, config, strict)
