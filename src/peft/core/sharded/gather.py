"""The one room through which tensors that are spread over processes are made whole and spread again.

Known are torch's DTensor (FSDP2, tensor parallelism), DeepSpeed's ZeRO-3 and FSDP1's flat parameters. They are told by
public marks of the tensors and modules themselves, and the engine is imported only by a program that uses it. Making a
tensor whole is a collective operation: every process must ask for the same tensors in the same order.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

WRITES = frozenset({"merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "add_weighted_adapter"})
WRAPPED = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
Held = tuple[dict[str, Any], str, Tensor]  # where a tensor hangs: the dictionary, its name, itself


def is_mesh(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, spread over the processes of a mesh."""
    return hasattr(tensor, "device_mesh")


def is_lent(module: nn.Module, name: str) -> bool:
    """Whether FSDP2 spreads a module's parameter only between uses: a forward finds it whole, as a plain tensor."""
    placements = getattr(module._parameters.get(name), "placements", ())
    return getattr(module, "_is_fsdp_managed_module", False) and all(p.is_replicate() for p in placements[:-1])


def is_zero(tensor: Any) -> bool:
    """Whether a tensor is one of ZeRO-3's parameters, which has no elements between uses."""
    return hasattr(tensor, "ds_id")


def is_spread(tensor: Any) -> bool:
    """Whether this process may hold only a part of a tensor, as far as the tensor itself tells."""
    return is_mesh(tensor) or is_zero(tensor) or is_flat(tensor)


def is_gathered(tensor: Any) -> bool:
    """Whether a tensor is spread, and can be made whole by itself."""
    return is_mesh(tensor) or is_zero(tensor)


def is_flat(tensor: Any) -> bool:
    """Whether FSDP1 manages a parameter, so that between uses it has one dimension and a part of the elements."""
    return getattr(tensor, "_fsdp_flattened", False) is True


def laid_into(tensor: Any) -> list[tuple[str, nn.Module, str]]:
    """(path below the unit, its module, name) of the parameters that FSDP1 has laid into this one; nothing elsewhere.

    Without `use_orig_params` their modules hold them no more, and a gathered state has their names.
    """
    infos = getattr(tensor, "_param_infos", ())
    return [(f"{where}." if where else "", module, name) for name, module, where in infos]


@overload
def full(tensor: Tensor) -> Tensor: ...
@overload
def full(tensor: None) -> None: ...
def full(tensor: Any) -> Any:
    """The whole tensor, on every process; one that is not spread is handed back as it is, and so is None."""
    if is_mesh(tensor):
        return tensor.full_tensor()
    if is_zero(tensor):
        with _zero([tensor], write=False):
            return tensor.detach().clone()
    return tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; another tensor as it is."""
    return tensor.to_local() if is_mesh(tensor) else tensor  # type: ignore[attr-defined]


def shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def like(value: Tensor, spread: Any) -> Tensor:
    """This process's part of a whole value that all of them have, as a DTensor placed as another one is."""
    mesh, placements = spread.device_mesh, spread.placements
    if is_mesh(value):
        return value.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return _distributed(value, mesh, placements, same=True)


def like_first(value: Tensor, mesh: Any, placements: Any) -> Tensor:
    """A DTensor of the value that the mesh's first process has."""
    return _distributed(value, mesh, placements, same=value.is_meta)


def _distributed(value: Tensor, mesh: Any, placements: Any, same: bool) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    here = value.detach() if value.is_meta else value.detach().to(mesh.device_type)
    known = "src_data_rank" in inspect.signature(distribute_tensor).parameters  # torch 2.7; before, always the first's
    return distribute_tensor(here, mesh, placements, **({"src_data_rank": None} if same and known else {}))


def put(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value, which all processes have, into a tensor in place."""
    if is_zero(tensor):
        with _zero([tensor], write=True):
            tensor.data.copy_(value)
    elif is_mesh(tensor) and not is_mesh(value):
        tensor.copy_(like(value.to(tensor.dtype), tensor))
    else:
        tensor.copy_(value)


@contextmanager
def _zero(tensors: Collection[Any], write: bool) -> Iterator[None]:
    if not tensors:
        yield
        return
    # the values of rank 0 are the ones that are spread again, so that all processes hold the same
    gathered = importlib.import_module("deepspeed").zero.GatheredParameters(tensors, modifier_rank=0 if write else None)
    with ExitStack() as stack:
        try:
            stack.enter_context(gathered)
        except RuntimeError:  # no parameter is gathered twice at a time: somebody around us has done it
            if any(tuple(t.shape) != tuple(t.ds_shape) for t in tensors):
                raise
        yield


def unwrapped(name: str) -> str:
    """A name without the segments of FSDP and checkpointing, which stand around modules without being part of them."""
    return ".".join(s for s in name.split(".") if s not in WRAPPED) if "_wrapped_module" in name else name


def inside(model: nn.Module) -> nn.Module:
    """The model that FSDP1 and checkpointing have been put around."""
    while (below := next((model._modules[name] for name in WRAPPED if name in model._modules), None)) is not None:
        model = below
    return model


def is_shared(model: nn.Module) -> bool:
    """Whether several processes hold parts of a model."""
    return together() and any(is_spread(p) for p in model.parameters())


def leads(model: nn.Module) -> bool | None:
    """Whether this process writes what all of them gather; None where nothing is spread, so that each has it all."""
    return torch.distributed.get_rank() == 0 if is_shared(model) else None


# Modules ------------------------------------------------------------------------------------------------------------


@contextmanager
def whole(modules: Iterable[nn.Module], write: Collection[str] = (), mesh: bool = True) -> Iterator[None]:
    """Inside, the tensors that the given modules hold are whole; afterwards they are spread as before.

    Arguments:
        modules: the modules, without those below them.
        write: names of tensors of which whatever is written into them inside is kept.
        mesh: make DTensors whole too.
    """
    held = [h for m in modules for h in _held(m) if is_spread(h[2])]
    refuse_flat(h[2] for h in held)
    zero = {id(t): t for _, _, t in held if is_zero(t)}
    kept = [t for _, name, t in held if is_zero(t) and name in write]
    with _zero([t for i, t in zero.items() if all(t is not k for k in kept)], False), _zero(kept, True):
        parts = [h for h in held if mesh and is_mesh(h[2])]
        shown: dict[int, Tensor] = {}  # one value for a tensor that hangs in several places
        for home, name, tensor in parts:
            if id(tensor) not in shown:
                value = full(tensor.detach())
                shown[id(tensor)] = (
                    nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                )
            home[name] = shown[id(tensor)]
        try:
            yield
            for home, name, tensor in parts:
                if name in write and (new := home.get(name)) is not None and new.shape == tensor.shape:
                    with torch.no_grad():
                        put(tensor, new.detach())
        finally:
            for home, name, tensor in parts:
                new = home.get(name)
                if new is shown.get(id(tensor), tensor) or (
                    name in write and new is not None and new.shape == tensor.shape
                ):
                    home[name] = tensor
                elif new is not None and new.shape == tensor.shape:  # another tensor has been put there
                    made = like(new, tensor)
                    home[name] = nn.Parameter(made, new.requires_grad) if isinstance(new, nn.Parameter) else made


@contextmanager
def with_values(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a module's parameters have other values, by name; those that are not named stay, unless spread.

    Raises ValueError for a spread parameter without a value.
    """
    held = [(f"{path}.{h[1]}" if path else h[1], *h) for path, m in module.named_modules() for h in _held(m)]
    held = [h for h in held if isinstance(h[3], nn.Parameter)]
    lacking = [name for name, _, _, t in held if name not in values and is_spread(t)]
    if lacking:
        raise ValueError(f"The given state lacks {lacking[0]!r}, of which this process holds a part only.")
    try:
        for name, home, attr, tensor in held:
            if name in values:
                home[attr] = nn.Parameter(values[name].detach().to(tensor.dtype), tensor.requires_grad)
        yield
    finally:
        for _, home, attr, tensor in held:
            home[attr] = tensor


def names(modules: Iterable[nn.Module]) -> set[str]:
    """The names of all tensors that the given modules hold."""
    return {name for m in modules for name in (*m._parameters, *m._buffers)}


def _held(module: nn.Module) -> Iterator[Held]:
    for home in (module._parameters, module._buffers):
        yield from ((home, name, t) for name, t in home.items() if t is not None)


def refuse_flat(tensors: Iterable[Tensor]) -> None:
    """Raise ValueError if these are parameters, a matrix among them, of which FSDP1 shows a part only."""
    flat = [t for t in tensors if is_flat(t)]
    if flat and all(t.dim() == 1 for t in flat):
        raise ValueError(
            "The parameters are spread by FullyShardedDataParallel (FSDP1), which shows them whole only to the model "
            "that it was put around. Do this inside `with FullyShardedDataParallel.summon_full_params(model):`, for "
            "saving and loading pass that model itself to get_peft_model_state_dict and set_peft_model_state_dict, or "
            "give save_pretrained the gathered `state_dict`."
        )


@contextmanager
def summoned(model: nn.Module, write: bool = False) -> Iterator[bool]:
    """Inside, the parameters that FSDP1 has spread below a model are whole, and FSDP2 shows none that is only lent.

    Arguments:
        model: the model that is walked, with the wrappers around it.
        write: keep what is written inside.

    Gives whether parameters were made whole, so that they are gone afterwards.
    """
    lent_back(model)
    kind = _class("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
    if kind is None:
        yield False
        return
    units = [m for m in model.modules() if isinstance(m, kind)]
    refuse_flat(_outside(model, kind))
    flat = [p for m in units for p in m.parameters() if is_flat(p)]
    if not flat or any(p.dim() > 1 for p in flat):  # or somebody around us has made them whole
        yield False
        return
    with kind.summon_full_params(model, writeback=write):
        yield True


def _class(place: str, name: str) -> Any:
    """A class of torch's engine that may stand around modules; None where no processes work together.

    Other packages import the engine for everybody, so that its being there tells nothing.
    """
    return getattr(sys.modules.get(place), name, None) if together() else None


def together() -> bool:
    """Whether several processes work together."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _outside(model: nn.Module, kind: Any) -> Iterator[nn.Parameter]:
    """The parameters of a model that no FSDP1 unit in it manages."""
    if not isinstance(model, kind):
        yield from (p for p in model._parameters.values() if p is not None)
        for child in model._modules.values():
            if child is not None:
                yield from _outside(child, kind)


def lent_back(model: nn.Module) -> None:
    """Have FSDP2 take back what it shows whole after a forward: writing into that would be lost."""
    kind = _class("torch.distributed.fsdp", "FSDPModule")
    for m in model.modules() if kind is not None else ():
        if isinstance(m, kind):
            m.reshard()
