"""Devices that are not there: torch sees two of another kind than the CPU, of which one has no double precision."""

from __future__ import annotations

import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HOST_WAITS = ("number to host", "numbers to host", "device to host", "host to device")


def compiler() -> str:
    """A C++ compiler, if there is one, else nothing."""
    return shutil.which("g++") or shutil.which("c++") or ""


def built(folder: Path) -> Path:
    """The device, compiled into a folder."""
    from torch.utils import cpp_extension

    library, (libraries,) = folder / "second_device.so", cpp_extension.library_paths()
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    source, made = str(Path(__file__).with_name("device.cpp")), ("-o", str(library))
    options = ("-shared", "-fPIC", "-std=c++20", "-O0", "-w", abi, *includes)
    command = (compiler(), *options, source, *made, f"-L{libraries}", "-lc10", "-ltorch", "-ltorch_cpu")
    subprocess.run(command, check=True)
    return library


def registered(library: Path) -> torch.device:
    """Make the device known to torch, in this process for good, and give the first of its kind."""
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend("second")
    known: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    module = types.ModuleType("torch.second")
    vars(module).update(known)
    torch._register_device_module("second", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device("second:0")


def waits(run: Callable[[], Any]) -> dict[str, int]:
    """How often something makes the host wait for the device."""
    torch.ops.second_device.count(True)
    try:
        run()
    finally:
        torch.ops.second_device.count(False)
    found = torch.ops.second_device.counted()
    return {what: found[what] for what in HOST_WAITS if what in found}
