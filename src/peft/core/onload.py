"""Weights that accelerate keeps elsewhere, on the CPU or on disk, brought in to be read or changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .sharded.gather import full, is_lent, is_mesh


@contextmanager
def onload_layer(layer: nn.Module, write: bool = True) -> Iterator[None]:
    """Inside the block the weights that accelerate keeps elsewhere are here; changes are taken back.

    Arguments:
        layer: a module, with all that is below it. What is here already is left alone, so blocks may nest.
        write: False where nothing is changed.
    """
    hooked = [(m, hook) for m in modules_of(layer) if "_hf_hook" in m.__dict__ for hook in _hooks(m)]
    found = [(m, hook) for m, hook in hooked if any(p.is_meta for p in m.parameters(hook.place_submodules))]
    for module, hook in found:
        hook.pre_forward(module)
        for parameter in module.parameters(hook.place_submodules) if write else ():
            if parameter.device.type == "cpu":  # it may be the memory that the hook loads from, for tied weights too
                parameter.data = parameter.data.clone()
    try:
        yield
    finally:
        for module, hook in found:
            if write:
                _take_back(module, hook)
            hook.post_forward(module, None)


@contextmanager
def kept_here(module: nn.Module) -> Iterator[None]:
    """Inside the block a module's weights are here, and its forward leaves them as they are put in its place."""
    hook = module.__dict__["_hf_hook"]
    with onload_layer(module, write=False):
        try:
            module.__dict__["_hf_hook"] = _staying(hook)
            yield
        finally:
            module.__dict__["_hf_hook"] = hook


def modules_of(module: nn.Module) -> list[nn.Module]:
    """A module and all below it, each once, adapters' too: `modules`, quicker as it makes no names."""
    found = [module]
    known = {id(module)}
    for m in found:
        for child in m._modules.values():
            if child is not None and id(child) not in known:
                known.add(id(child))
                found.append(child)
    return found


def brought(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a module, from where a hook keeps it; the tensor itself if none does."""
    hook = next(iter(_hooks(module)), None)
    return tensor if hook is None else hook.weights_map[name].to(hook.execution_device)


def stored(module: nn.Module, name: str, tensor: Tensor, value: Tensor) -> bool:
    """Write a value for a tensor of a module into the place that a hook loads it from; False if none does."""
    hook = next(iter(_hooks(module)), None)
    if hook is None or not tensor.is_meta or tensor.shape != value.shape:
        return False
    _keep(hook, name, value.to(tensor.dtype, copy=True))
    return True


def used_at(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where a tensor of a module is when the module runs."""
    hook = next(iter(_hooks(module)), None)
    place = tensor.device if hook is None or not tensor.is_meta else hook.execution_device
    return device_of(place)


def device_of(place: Any) -> torch.device:
    """A device, from how hooks name it; the CPU if they name none."""
    return place if isinstance(place, torch.device) else torch.device("cpu" if place is None else place)


def own_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module with numbers of its own, which stay where the original brings its own in.

    Arguments:
        module: the original.
        memo: as for `copy.deepcopy`; with what stands for the tensors in it, none are brought in.
    """
    staying = {id(hook): _staying(hook) for m in module.modules() for hook in _hooks(m)}
    modes = {id(mode): mode for t in module.parameters() if (mode := getattr(t, "fake_mode", None)) is not None}
    with nullcontext() if memo else onload_layer(module, write=False):
        known = {**_of_meshes(module, memo or {}), **staying, **modes}
        new = copy.deepcopy(module, known)
    for m in new.modules():
        if isinstance(run := m.__dict__.get("forward"), FunctionType):
            m.__dict__["forward"] = _rebound(run, known)
    return new


def _of_meshes(module: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """`memo`, with what the copy holds in place of DTensors: whole tensors where FSDP2, which knows nothing of a copy,
    brings them together, and parts of its own elsewhere, as torch may fail to copy those."""
    found = dict(memo)
    for m in module.modules():
        for name, t in m._parameters.items():
            if t is not None and is_mesh(t) and is_lent(m, name):
                empty = id(t) in memo
                value = torch.empty(t.shape, dtype=t.dtype, device="meta") if empty else full(t.detach()).clone()
                found[id(t)] = nn.Parameter(value, t.requires_grad)
            elif t is not None and is_mesh(t) and id(t) not in memo:
                found[id(t)] = nn.Parameter(t.detach().clone(), t.requires_grad)
    return found


def _rebound(run: FunctionType, known: dict[int, Any]) -> FunctionType:
    """A function that a program put in place of a module's forward, for the copy: what it has enclosed of the module
    that was copied is the copy's.

    Arguments:
        run: the function, which copying has left as it is.
        known: {identity of what was copied: the copy}.
    """
    if id(run) in known:
        return known[id(run)]
    known[id(run)] = run
    cells = [c for c in run.__closure__ or () if c != CellType()]  # all but those that hold nothing yet
    if not cells or len(cells) != len(run.__closure__ or ()):
        return run
    made = tuple(CellType(_of_copy(c.cell_contents, known)) for c in cells)
    new = known[id(run)] = FunctionType(run.__code__, run.__globals__, run.__name__, run.__defaults__, made)
    new.__kwdefaults__ = run.__kwdefaults__
    new.__dict__.update(run.__dict__)
    return new


def _of_copy(value: Any, known: dict[int, Any]) -> Any:
    """What stands for a value that a function has enclosed, in the function of the copy."""
    if isinstance(value, MethodType):
        owner = _of_copy(value.__self__, known)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, FunctionType):
        return _rebound(value, known)
    if type(value) in (dict, list, set):  # in which the function notes what it has done
        return copy.copy(value)
    if isinstance(value, nn.Module) or id(value) in known:
        return known.get(id(value), value)
    if type(value).__module__.partition(".")[0] in ("torch", "builtins") or not hasattr(value, "__dict__"):
        return value
    known[id(value)] = value  # an object that stands between the function and the module
    held = {k: v for k, v in vars(value).items() if type(v) not in (dict, list, set)}
    made = {k: _of_copy(v, known) for k, v in held.items()}
    if any(made[k] is not v for k, v in held.items()):
        known[id(value)] = twin = copy.copy(value)
        vars(twin).update(made)
    return known[id(value)]


def _staying(hook: Any) -> Any:
    """A hook that moves inputs as this one does, and no weights."""
    new = copy.copy(hook)
    if hasattr(new, "hooks"):
        new.hooks = tuple(_staying(h) for h in new.hooks)
    if hasattr(new, "offload"):
        new.offload, new.weights_map = False, None
    return new


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks that bring a module's weights in for its forward."""
    hook = module.__dict__.get("_hf_hook")
    return [h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)]


def _take_back(module: nn.Module, hook: Any) -> None:
    """Write the weights of a module into the place that its hook loads them from."""
    for name, tensor in module.named_parameters(recurse=hook.place_submodules):
        _keep(hook, name, tensor)


def _keep(hook: Any, name: str, tensor: Tensor) -> None:
    store = hook.weights_map
    data = getattr(store, "dataset", store)
    held: Any = getattr(data, "state_dict", data)
    key = getattr(store, "prefix", "") + name
    value = tensor.detach().cpu()
    if key in held or not getattr(data, "save_folder", None):
        held[key] = value
    elif key in data.index:
        from accelerate.utils import offload_weight

        offload_weight(value, key, data.save_folder, data.index)
