"""Writing a checkpoint's tensors into the places that an adapter has for them: match first, then write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError, MissingTensorsWarning, PeftWarning, UnexpectedTensorsWarning, listing, nearest, report
from . import sharded
from .entries import Entry, base_tensors, plain, spellings
from .layer import AdapterHost, BaseTunerLayer
from .onload import device_of, stored
from .shared import SharedTensors, part
from .tie import storage_key
from .views import PLAIN

Found = dict[str, tuple[Entry, Tensor]]
COPIES, TOKENS = "modules_to_save", ".token_adapter.trainable_tokens_delta"


def fill(
    entries: list[Entry],
    found: Found,
    unexpected: list[str],
    adapter_name: str,
    strict: bool | None,
    fresh: bool = False,
    own: bool = False,
) -> tuple[list[Entry], list[str]]:
    """Write a checkpoint into the tensors of an adapter; nothing is written before all is said.

    Arguments:
        entries: the places; those on the meta device become the checkpoint's tensors.
        found, unexpected: what goes where, and the keys without a place, as `checked` has them.
        adapter_name: for messages.
        strict: turn missing and unexpected tensors into errors; None follows the process-wide setting.
        fresh: the adapter has just been made, so that nobody else holds its tensors.
        own: nor does anybody hold those of the checkpoint, each of which has memory of its own.

    Returns the places without a tensor and the keys without a place.
    """
    missing = [e for e in entries if e.live not in found]
    if missing:
        text = _missing_text(missing, unexpected, adapter_name)
        meta = any(e.tensor.device.type == "meta" for e in missing)
        follows = "\nThey have no values (meta device)." if meta else "\nThey keep the values they had."
        report(MissingTensorsWarning, text, strict, stacklevel=4, follows=follows)
    if unexpected:
        report(UnexpectedTensorsWarning, _unexpected_text(unexpected, entries, adapter_name), strict, stacklevel=4)
    alone = fresh and _alone(entries)
    if torn := [] if alone else torn_in(found):
        text = (
            f"The checkpoint has different values for tensors that are tied in adapter {adapter_name!r}: "
            f"{listing(torn)}. The last of them counts, so the adapter is not the one that was saved. To load that, "
            "set ensure_weight_tying=False in its configuration and name all these modules in target_modules."
        )
        report(PeftWarning, text, strict, stacklevel=4)
    _write_all(found, alone, fresh, own)
    return missing, unexpected


def checked(
    root: nn.Module,
    entries: list[Entry],
    state: Mapping[str, Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool,
    elsewhere: bool = False,
) -> tuple[Found, list[str]]:
    """What goes where, {name in the live model: place and tensor}, and the keys without a place.

    Arguments:
        root: the model that the entries' names are relative to.
        entries: the places.
        state: checkpoint key -> tensor, which may be on the meta device: only shapes and dtypes are looked at.
        adapter_name: for messages.
        ignore_mismatched_sizes: leave tensors of another shape out, with a warning.
        elsewhere: other tensors of the checkpoint have found a place that is none of the entries.

    Raises MisfitError (a RuntimeError and a ValueError) for other shapes, and if nothing fits; TypeError for other
    kinds of numbers.
    """
    found, unexpected = _match(root, entries, state)
    unexpected = [k for k in unexpected if not _repeats(root, k, state, adapter_name)]
    same_kind(found)
    found = _same_shape(found, ignore_mismatched_sizes)
    if not any(e.live in found for e in entries) and (entries or (state and not elsewhere)):
        raise MisfitError(*_nothing_fits(entries, list(state), adapter_name))
    return found, unexpected


# Looking the checkpoint's keys up -------------------------------------------------------------------------


def _match(root: nn.Module, entries: list[Entry], state: Mapping[str, Tensor]) -> tuple[Found, list[str]]:
    """Pair each checkpoint key with its place: the adapter's own first, by its key in files or its name in the live
    model, then a tensor of the base by live name.
    """
    found, left = paired(entries, state)
    if not left:
        return found, []
    base = {plain(e.key): e for e in base_tensors(root)}
    return found, [k for k in left if not _take(base, found, k, state[k])]


def _repeats(root: nn.Module, key: str, state: Mapping[str, Tensor], adapter_name: str) -> bool:
    """Whether a key is the second name of what stands in the file, or in the adapter, once more.

    Files of the other library that hold embeddings have trained copies under their names in the live model, too, and
    the rows of an output layer that shares those of the embedding.
    """
    first = state.get(key.replace(f".{COPIES}.", "."))
    if first is not None and f".{COPIES}." in key:
        return first.shape == state[key].shape
    paths = (path.rpartition(".")[0] for path in spellings(plain(key)))
    layers = (dict(root.named_modules()).get(path) for path in paths) if key.endswith(TOKENS) else ()
    return any(isinstance(m, BaseTunerLayer) and adapter_name in m.shares for m in layers)


def paired(entries: list[Entry], state: Mapping[str, Tensor]) -> tuple[Found, list[str]]:
    """{name in the live model: place and tensor}, and the keys without a place among the entries."""
    places = {**{plain(e.live): e for e in entries}, **{plain(e.key): e for e in entries}}
    found: Found = {}
    return found, [k for k, v in state.items() if not _take(places, found, k, v)]


def torn_in(found: Found) -> list[str]:
    """Keys of places that share their memory but are given different values; a tied one may be transposed."""
    groups: dict[Any, list[tuple[Entry, Tensor]]] = {}
    whole = [pair for pair in found.values() if not sharded.is_spread(pair[0].tensor)]
    for entry, value in whole:
        groups.setdefault((storage_key(entry.tensor), entry.tensor.numel()), []).append((entry, value))
    torn = []
    for (first, one), *rest in (group for group in groups.values() if len(group) > 1):
        for entry, value in rest:
            other = value if value.shape == one.shape or value.dim() < 2 else value.mT
            if not torch.equal(one.cpu(), other.to("cpu", one.dtype)):
                torn += [first.key, entry.key]
    return list(dict.fromkeys(torn))


def _take(places: Mapping[str, Entry], found: Found, key: str, value: Tensor) -> bool:
    entry = places.get(key) or next((places[k] for k in spellings(plain(key)) if k in places), None)
    if entry is None or entry.live in found:
        return False
    found[entry.live] = (entry, value)
    return True


def same_kind(found: Found) -> None:
    """Raise TypeError if a tensor and its place hold numbers of different kinds."""
    for entry, value in found.values():
        if value.dtype is entry.tensor.dtype:
            continue
        if value.is_complex() or value.is_floating_point() != entry.tensor.is_floating_point():
            raise TypeError(
                f"{entry.key} is {value.dtype} in the checkpoint and {entry.tensor.dtype} in the model; numbers of "
                "another kind are not converted. Nothing was loaded."
            )


def _same_shape(found: Found, ignore: bool) -> Found:
    other = [n for n, (e, v) in found.items() if e.tensor.shape != v.shape]
    wrong = [n for n in other for e, v in [found[n]] if sharded.shape(e.tensor) != v.shape and not _taken(e, v)]
    if not wrong:
        return found
    lines = [
        f"  {e.key}: {tuple(v.shape)} in the checkpoint, {tuple(sharded.shape(e.tensor))} in the model"
        for e, v in (found[n] for n in wrong)
    ]
    text = f"{len(wrong)} tensors of the checkpoint have another shape than the model's:\n" + "\n".join(lines)
    if not ignore:
        raise MisfitError(
            f"size mismatch: {text}",
            "\nUse the rank and the base model of the checkpoint, or pass `ignore_mismatched_sizes=True` to leave "
            "these out.",
        )
    report(PeftWarning, text + "\nThey are left out.", strict=False, stacklevel=5)
    return {n: pair for n, pair in found.items() if n not in set(wrong)}


def _taken(entry: Entry, value: Tensor) -> bool:
    p = entry.adapter
    return p is not None and p.method.takes(p, entry.part, tuple(value.shape))


def _nothing_fits(entries: list[Entry], keys: list[str], name: str) -> tuple[str, str]:
    """What was found, and what to do."""
    first = keys[0][:300] if keys else ""
    example = f", such as {first!r}.{nearest(first, [e.key for e in entries[:500]])}" if keys else "."
    want = f"It expects keys such as {entries[0].key!r}." if entries else "It has no tensors."
    facts = (
        f"No tensor of the checkpoint fits adapter {name!r}; nothing was loaded. The checkpoint has {len(keys)} "
        f"tensors{example} {want}"
    )
    return facts, " Check the base model and the configuration, or rename keys with `key_mapping`."


def _missing_text(missing: list[Entry], unexpected: list[str], name: str) -> str:
    lines = _hints([e.key for e in missing], unexpected)
    return (
        f"Found missing adapter keys while loading the checkpoint: it lacks {len(missing)} tensors of "
        f"adapter {name!r}:\n" + "\n".join(lines)
    )


def _unexpected_text(unexpected: list[str], entries: list[Entry], name: str) -> str:
    lines = _hints(unexpected, [e.key for e in entries])
    return f"{len(unexpected)} tensors of the checkpoint have no place in adapter {name!r}:\n" + "\n".join(lines)


def _hints(keys: list[str], choices: Iterable[str]) -> list[str]:
    """A line for each key, with the nearest choice while looking for it costs little; files may hold any text."""
    pool = [c for c in choices if len(c) <= 300]
    near = len(keys) * len(pool) <= 20_000
    return [f"  {k:.300}{nearest(k, pool) if near and len(k) <= 300 else ''}" for k in keys]


# Writing tensors ------------------------------------------------------------------------------------------


def _assigned(entry: Entry) -> bool:
    return entry.tensor.device.type == "meta"


def _alone(entries: list[Entry]) -> bool:
    """Whether no two places are one tensor."""
    return len({id(e.tensor) for e in entries}) == len(entries)


def _put(entry: Entry, value: Tensor, homes: dict[int, torch.device], own: bool) -> bool:
    """A new parameter in place of one without memory that nobody but a plain module holds; False if it is another.

    Arguments:
        entry: the place; no other place has its tensor.
        value: the tensor.
        homes: where the adapters' tensors of layers belong, by layer; filled.
        own: whether nobody else has the tensor and its memory.
    """
    here = entry.owner._parameters.get(entry.attr)
    if (
        type(entry.owner) not in PLAIN
        or type(here) is not nn.Parameter
        or not here.is_meta
        or here.shape != value.shape
        or "_hf_hook" in entry.owner.__dict__
    ):
        return False
    key = id(entry.layer)
    if key not in homes:
        homes[key] = _home(entry)
    like = value.dtype is here.dtype and value.device == homes[key] and type(value) is Tensor
    new = value if like and own else value.detach().to(device=homes[key], dtype=here.dtype, copy=not own)
    entry.owner._parameters[entry.attr] = torch.Tensor._make_subclass(nn.Parameter, new, here.requires_grad)
    return True


@torch.no_grad()
def _write_all(found: Found, alone: bool, fresh: bool, own: bool) -> None:
    """Write the tensors into their places; those of an adapter that was there before are as they were if that fails."""
    homes: dict[int, torch.device] = {}
    part(entry for entry, _ in found.values())
    ready = [(e, v if _assigned(e) else as_held(v, e.tensor)) for e, v in found.values()]
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for entry, value in ready:
            if not (alone and _put(entry, value, homes, own)):
                here = entry.tensor
                if not (fresh or here.is_meta or sharded.is_spread(here)):
                    before.append((here, here.detach().to("cpu", copy=True)))  # no second copy lies on a GPU
                _write(entry, value)
    except BaseException:
        for tensor, was in before:
            tensor.copy_(was)
        raise


def _write(entry: Entry, value: Tensor) -> None:
    """Copy in place; a meta parameter becomes the value, on its base layer's device, and stays the same
    object.
    """
    here = entry.tensor
    if not _assigned(entry) and sharded.shape(here) == value.shape:
        sharded.put(here, value)
        return
    if stored(entry.owner, entry.attr, here, value):
        return
    new = value.detach().to(device=_home(entry), dtype=here.dtype, copy=True)
    new = sharded.like(new, here) if sharded.is_mesh(here) else new
    new = nn.Parameter(new, requires_grad=here.requires_grad) if isinstance(here, nn.Parameter) else new
    try:
        torch.utils.swap_tensors(here, new)
    except RuntimeError:  # something else holds the tensor
        setattr(entry.owner, entry.attr, new)
        if isinstance(entry.layer, BaseTunerLayer):
            entry.layer._replan()


def _home(entry: Entry) -> torch.device:
    """Where an adapter's tensor belongs: beside the base layer's, which accelerate may keep elsewhere until it runs."""
    base = entry.layer
    if isinstance(base, SharedTensors) and base.place is not None:
        return base.place
    while isinstance(base, AdapterHost) and base._below:
        base = base._modules[base._below[0]]  # type: ignore[assignment]
    held = next((t for t in base._parameters.values() if t is not None), None)
    first = next(base.buffers(), None) if held is None else held
    place: Any = getattr(base.__dict__.get("_hf_hook"), "execution_device", None)
    if first is None or (first.is_meta and place is None):
        first = next(
            (t for t in (*base.parameters(), *base.buffers()) if not t.is_meta),
            torch.empty(0, dtype=torch.uint8, device="cpu"),
        )
    return first.device if not first.is_meta else device_of(place)


def as_held(value: Tensor, like: Tensor) -> Tensor:
    """The value as the parameter's kind of tensor: cast, moved, and sharded if the parameter is."""
    value = value.detach().to(dtype=like.dtype)
    return sharded.like(value, like) if sharded.is_mesh(like) else value
