"""Hashes of the base model's numbers: whether they are the ones that an adapter was saved from.

Taken where `save_pretrained(hash_base=True)` asks for it, as all of the model is read; `fingerprint` costs nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import listing
from . import sharded
from .base_state import model_below
from .fingerprint import LONGEST, own_modules

NUMBERS = "base_numbers"  # key among a file's remarks
BLOCK = 2**24  # bytes that are brought to the CPU at a time
_DIGITS = 16  # of each tensor's hash; the whole one is of all of them


def numbers(model: nn.Module, replaced: Collection[str] = ()) -> dict[str, str]:
    """What a file notes of its base model's numbers: one SHA-256 of all, and the beginnings of those of each tensor.

    Arguments:
        model: a PeftModel, a model with injected layers, or a plain model.
        replaced: endings of the names of modules that the adapter replaces (`modules_to_save`).

    Raises ValueError while adapters are merged, and for tensors on the meta device, which have no numbers.
    """
    if merged := _merged(model):
        raise ValueError(
            f"hash_base: the adapters {listing(merged)} are merged into the base model, whose own numbers are not "
            "there. Unmerge first."
        )
    found = digests(model, replaced)
    if empty := [name for name, told in found.items() if told.endswith(":")]:
        raise ValueError(f"hash_base: these tensors are on the meta device and have no numbers: {listing(empty)}.")
    noted = {"sha256": _of_all(found), "tensors": found}
    text = json.dumps(noted, separators=(",", ":"))
    return {NUMBERS: text if len(text) <= LONGEST else json.dumps({"sha256": noted["sha256"]})}


def compared(
    noted: Mapping[str, str], model: nn.Module, replaced: Collection[str], wanted: bool | None
) -> tuple[list[str], str]:
    """(how a model's numbers differ from those that a file was saved from, a line a tensor; why that is unknown).

    A tensor that is called otherwise now is found by its hash. One that is kept in another dtype or packed with others
    cannot be compared.

    Arguments:
        noted: the remarks of the file.
        model, replaced: as for `numbers`.
        wanted: False looks at nothing; True says what keeps the numbers from being compared; None compares where the
            file has hashes.
    """
    if wanted is False or (wanted is None and NUMBERS not in noted):
        return [], ""
    whole, before = _read(noted.get(NUMBERS, ""))
    if not whole:
        return [], "its file has no hash of the base's numbers; save_pretrained(..., hash_base=True) notes one"
    if merged := _merged(model):
        return [], f"{listing(merged)} are merged into the base model, whose own numbers are not there; unmerge first"
    now = digests(model, replaced)
    if whole == _of_all(now):
        return [], ""
    if not before:
        return [], "the hash of all numbers is another, and its file has none of single tensors"
    lost = Counter(before.values()) - Counter(now.values())
    other = {
        n: (_dtype(told), _dtype(now.get(n, ""))) for n, told in before.items() if lost[told] and now.get(n) != told
    }
    lines = [f"{n}: other numbers than when it was saved" for n, (then, here) in other.items() if then == here]
    if lines or not other:
        return lines, ""
    name, (then, here) = next(iter(other.items()))
    return [], f"{len(other)} of its tensors are kept otherwise, such as {name}: {then} then, {here or 'nowhere'} now"


@torch.no_grad()
def digests(model: nn.Module, replaced: Collection[str] = ()) -> dict[str, str]:
    """{original name: "dtype:hash"} of the parameters and persistent buffers below the adapters, as they are stored."""
    found: dict[str, str] = {}
    with sharded.summoned(model):
        for prefix, module in own_modules(model, replaced):
            state: dict[str, Tensor] = {}
            module._save_to_state_dict(state, prefix, False)  # what quantised weights consist of, too
            state.update((prefix + n, p) for n, p in module._parameters.items() if p is not None and sharded.is_zero(p))
            found.update((n, _digest(sharded.full(t))) for n, t in state.items() if isinstance(t, Tensor))
    return found


def _digest(tensor: Tensor) -> str:
    """ "dtype:hash"; without a hash for a tensor that has no numbers."""
    whole = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for plain in _plain(tensor):
        if plain.is_meta:
            return f"{_named(tensor)}:"
        for block in plain.detach().reshape(-1).view(torch.uint8).split(BLOCK):
            here = block.cpu()
            if here.numel():
                whole.update((ctypes.c_char * here.numel()).from_address(here.data_ptr()))
    return f"{_named(tensor)}:{whole.hexdigest()[:_DIGITS]}"


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that one of a quantiser's class consists of; a plain one itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor.as_subclass(Tensor).contiguous()


def _named(tensor: Tensor) -> str:
    kind = type(tensor).__name__ if hasattr(tensor, "__tensor_flatten__") else str(tensor.dtype)
    return kind.removeprefix("torch.")


def _dtype(told: str) -> str:
    return told.partition(":")[0]


def _of_all(found: Mapping[str, str]) -> str:
    """The same whatever the modules are called, as releases of transformers rename them."""
    return hashlib.sha256("\n".join(sorted(found.values())).encode()).hexdigest()


def _read(text: str) -> tuple[str, dict[str, str]]:
    """(the hash of all, those of the tensors) that a file notes; nothing for what is no such note."""
    try:
        told = json.loads(text)
        return str(told["sha256"]), {str(k): str(v) for k, v in told.get("tensors", {}).items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return "", {}


def _merged(model: nn.Module) -> list[str]:
    """The adapters that are merged into the base model's weights."""
    layers = (m for m in model_below(model).modules() if hasattr(m, "adapter_layer_names"))
    return list(dict.fromkeys(n for layer in layers for n in getattr(layer, "merged_adapters", ())))
