"""The adapters that a pool knows: the weights of some in memory, of all on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import PeftConfig
from ..core.checkpoint import load_peft_weights
from ..core.commit import make_folders
from ..core.defaults import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..core.files import write_weights

State = dict[str, Tensor]


@dataclass
class Source:
    """Where a registered adapter comes from.

    Arguments:
        config: its configuration; adapters with equal ones share it.
        folder: where its weights are, or None while they have been in memory only.
        options: `subfolder`, `revision`, `key_mapping` ... for reading it.
    """

    config: Any
    folder: str | None
    options: dict[str, Any] = field(default_factory=dict)
    spilled: bool = False  # the folder is the pool's own


class Tiers:
    """Weights by adapter name: at most `limit` in CPU memory, the least recently used go first.

    Arguments:
        limit: how many adapters' weights stay in memory.
        spill: folder for adapters that were registered from memory and are not used; None: a temporary one.
    """

    def __init__(self, limit: int, spill: str | os.PathLike[str] | None = None):
        self.limit = limit
        self.sources: dict[str, Source] = {}
        self.memory: OrderedDict[str, State] = OrderedDict()
        self.reads = 0
        self.configs: dict[str, Any] = {}
        self.files = 0
        self.spill = None if spill is None else Path(spill)

    def add_folder(self, name: str, folder: str | os.PathLike[str], config: Any, options: dict[str, Any]) -> None:
        """Note an adapter on disk; its weights are read when they are needed.

        Raises FileNotFoundError if a local folder has no weights.
        """
        path = Path(folder, options.get("subfolder") or "")
        if path.is_dir() and not any((path / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise FileNotFoundError(
                f"{path} has no weights: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}. Give the folder that "
                "save_pretrained has written the adapter to."
            )
        self.sources[name] = Source(self._one(config), os.fspath(folder), options)

    def add_state(self, name: str, state: Mapping[str, Tensor], config: Any) -> None:
        """Note an adapter by its tensors, which are copied to CPU memory."""
        if not state:
            raise ValueError(f"The adapter {name!r} has no tensors. Give what get_peft_model_state_dict returns.")
        copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}
        self.sources[name] = Source(self._one(config), None)
        self._hold(name, copies)

    def remove(self, name: str) -> None:
        """Forget an adapter; a file that the pool has written for it goes too."""
        source = self.sources.pop(name)
        self.memory.pop(name, None)
        if source.spilled and source.folder is not None:
            shutil.rmtree(source.folder, ignore_errors=True)

    def state(self, name: str) -> State:
        """The weights of an adapter, from memory or else from disk."""
        if name in self.memory:
            self.memory.move_to_end(name)
            return self.memory[name]
        source = self.sources[name]
        state = load_peft_weights(source.folder or "", **source.options)
        self.reads += 1
        self._hold(name, state)
        return state

    def nbytes(self) -> int:
        """The bytes of all weights in memory."""
        return sum(t.numel() * t.element_size() for state in self.memory.values() for t in state.values())

    def _hold(self, name: str, state: State) -> None:
        self.memory[name] = state
        while len(self.memory) > self.limit:
            oldest = next(iter(self.memory))
            source = self.sources[oldest]
            if source.folder is None:
                source.folder, source.spilled = self._written(self.memory[oldest]), True
            del self.memory[oldest]

    def _written(self, state: State) -> str:
        if self.spill is None:
            self.spill = Path(tempfile.mkdtemp(prefix="adapters-"))
            weakref.finalize(self, shutil.rmtree, self.spill, ignore_errors=True)
        folder = self.spill / str(self.files)
        make_folders(folder)
        self.files += 1
        write_weights(state, folder)
        return os.fspath(folder)

    def _one(self, config: PeftConfig) -> Any:
        """The configuration, or an equal one that is known: thousands of adapters have few different ones."""
        return self.configs.setdefault(repr(sorted(vars(config).items(), key=lambda item: item[0])), config)
