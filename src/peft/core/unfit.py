"""Weights of which no adapter can be made, and why."""

from __future__ import annotations

from torch import Tensor, nn

from . import views

COMPLEX = "holds complex numbers, of which no adapter is made"


def unfit(module: nn.Module, weight: Tensor) -> str | None:
    """What to say of a layer with complex numbers, or of no inputs or outputs; None for a weight whose numbers lie on
    other processes, and for modules that are no layers."""
    if not views.supported(module):
        return None
    if weight.dtype.is_complex:
        return f"its weight {COMPLEX}; leave it out with exclude_modules"
    shape = views.view_of(module).shape(module)
    return f"its weight, {shape}, has no elements; leave it out with exclude_modules" if 0 in shape else None


def check_parameter(path: str, name: str, dim: int, owner: nn.Module, targeted: bool) -> None:
    """Raise ValueError if the parameter cannot be adapted."""
    if not path:
        raise ValueError(
            f"target_parameters selects {name!r}, which lies directly on the model ({type(owner).__name__}). Only "
            "parameters of its sub-modules can be adapted: wrap the model in a module, or target another parameter."
        )
    if isinstance(owner, (nn.ParameterList, nn.ParameterDict)):
        raise ValueError(
            f"target_parameters selects '{path}.{name}', which lies in a {type(owner).__name__}: the module around it "
            "reads it by its place there, where no adapter can stand. Make it a parameter of that module itself."
        )
    if (held := owner._parameters.get(name)) is not None and held.dtype.is_complex:
        raise ValueError(f"target_parameters selects '{path}.{name}', which {COMPLEX}.")
    if targeted:
        raise ValueError(
            f"'{path}' is selected by target_modules and its parameter {name!r} by target_parameters. Choose one: "
            "leave the module out of target_modules (target_modules=[] switches the defaults off), or the parameter "
            "out of target_parameters."
        )
    if dim not in (2, 3):
        raise ValueError(
            f"target_parameters selects '{path}.{name}' with {dim} dimension(s). Only matrices (2 dimensions) and "
            "stacks of matrices (3 dimensions, experts first) can be adapted."
        )
