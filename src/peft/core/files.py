"""Adapter files: written whole or not at all, read with their faults named."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PeftWarning, listing
from .defaults import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder inside `folder` whose files move into place together once the block has succeeded.

    A crash or an exception inside the block leaves the files of `folder` as they were.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield stage
        files = sorted(p for p in stage.iterdir() if p.is_file())
        usual = stage / ".usual"
        usual.touch()
        for file in files:
            shutil.copymode(usual, file)  # safetensors makes files that only their owner can read
            _flush(file)
        for file in files:
            os.replace(file, target / file.name)
        _flush_folder(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _flush(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_weights(state: Mapping[str, Tensor], folder: Path, safe: bool = True) -> Path:
    """Write one adapter's tensors and return the file's path.

    Arguments:
        state: checkpoint key -> tensor, any dtype; tensors that share storage are written apart.
        folder: an existing folder.
        safe: `adapter_model.safetensors`; False writes `adapter_model.bin` (a pickle).
    """
    if not safe:
        torch.save(dict(state), folder / WEIGHTS_NAME)
        return folder / WEIGHTS_NAME
    from safetensors.torch import save_file

    save_file(separate(state), str(folder / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    return folder / SAFETENSORS_WEIGHTS_NAME


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous, each with a storage of its own (only the second and later sharers are
    cloned).
    """
    seen: set[tuple[torch.device, int]] = set()
    out = {}
    for key, tensor in state.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        if tensor.is_contiguous():
            out[key] = tensor.clone() if place in seen else tensor
        else:
            out[key] = tensor.contiguous()
        seen.add(place)
    return out


def check_written(file: Path, state: Mapping[str, Tensor]) -> None:
    """Re-open a safetensors file and compare its header with what should be in it; raises OSError on a
    difference.
    """
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as handle:
        got = {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118
    want = {k: tuple(v.shape) for k, v in state.items()}
    if got != want:
        wrong = sorted(k for k in got.keys() | want.keys() if got.get(k) != want.get(k))
        raise OSError(f"{file} does not hold what was saved: {listing(wrong)} differ. Check the disk and save again.")


def read_weights(file: str | os.PathLike[str], device: str | torch.device | None = None) -> dict[str, Tensor]:
    """All tensors of an adapter file.

    Arguments:
        file: a `.safetensors` file, or a pickle that is read with `weights_only=True`.
        device: where to put the tensors; None reads to the CPU, and loading copies them to each parameter's
            device.

    Raises ValueError naming the file and the cause if it is truncated or no tensor file.
    """
    where = str(device) if device is not None else "cpu"
    state = _read_safetensors(file, where) if str(file).endswith(".safetensors") else _read_pickle(file, where)
    bad = [k for k, v in state.items() if v.is_floating_point() and not _finite(v)]
    if bad:
        text = f"{file} holds NaN or infinite values in {listing(bad)}. The adapter's outputs will not be usable."
        warnings.warn(text, PeftWarning, stacklevel=3)
    return state


def _finite(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(wide).all())


def _read_safetensors(file: str | os.PathLike[str], device: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(file), device=device)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no complete safetensors file ({os.path.getsize(file)} bytes; {error}). "
            "It may be truncated: download or save it again."
        ) from error


def _read_pickle(file: str | os.PathLike[str], device: str) -> dict[str, Tensor]:
    text = f"{file} is a pickle; only its tensors are read. Save the adapter again to get the safer safetensors format."
    warnings.warn(text, PeftWarning, stacklevel=4)
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} could not be read as a file of tensors ({error}). It may be truncated, or hold other objects than "
            "tensors, which are refused: download it again, or convert it to safetensors where you trust it."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} does not hold a dictionary of tensors. Expected what `save_pretrained` writes.")
    return state


_in_hand: ContextVar[Collection[str]] = ContextVar("in_hand", default=())


@contextmanager
def in_hand(keys: Collection[str]) -> Iterator[None]:
    """While open, an adapter is made that will be filled from a file with these keys."""
    token = _in_hand.set(keys)
    try:
        yield
    finally:
        _in_hand.reset(token)


def keys_in_hand() -> Collection[str]:
    """The keys of the file that the adapter which is being made will be filled from; none if there is no file."""
    return _in_hand.get()
