"""A model as it is now: its modules, tensors, hooks and flags, to be put back if a load fails."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .host import below, standing

_TABLES = (
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_load_state_dict_post_hooks",
)


def snapshot(model: nn.Module) -> tuple[Callable[[], None], bool]:
    """What puts a model back as it is now, the numbers in its tensors aside; and whether it has adapters.

    Arguments:
        model: any model; its children are looked at too.
    """
    found = below(model)[0]
    adapted = bool(standing(found))
    found = list(model.modules()) if adapted else found
    owned = [(own, own.copy()) for own in map(vars, found)]
    tables = [(table, table.copy()) for own, _ in owned for table in map(own.get, _TABLES) if table]
    flags = [(p, p.requires_grad) for m in found for p in m._parameters.values() if p is not None]
    config = getattr(model, "config", None)
    settings = dict(config.__dict__) if hasattr(config, "__dict__") else None

    def restore() -> None:
        for own, values in owned:
            for name in own.keys() - values.keys():
                del own[name]
            own.update(values)
            for table in filter(None, map(own.get, _TABLES)):
                table.clear()
        for table, kept in tables:
            table.update(kept)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        if settings is not None:
            config.__dict__.update(settings)

    return restore, adapted
