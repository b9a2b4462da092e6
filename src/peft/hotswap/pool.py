"""Thousands of adapters on one base model: a few in the model, some in memory, the rest on disk.

    with pool.using("customer 7") as model:        # one adapter for the whole batch
        model(x)
    with pool.batch(["customer 7", None]) as names:  # one for each sample, None is the base model
        pool.model(x, adapter_names=names)

The model holds a fixed number of adapters, the slots. An adapter runs by having its weights written into a slot, in
place, so that compiled code stays valid. The one that runs by itself is always in the first slot.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import PeftConfig
from ..core.call import BASE
from ..core.checkpoint import get_peft_model_state_dict
from ..core.hub import DOWNLOAD_ARGUMENTS
from ..core.layer import BaseTunerLayer, tuner_layers
from ..errors import UnknownNameError, listing, nearest
from .compatible import unlike
from .compiled import prepare_model_for_compiled_hotswap
from .exchange import Contents, exchange
from .room import has_ranks, largest_rank
from .swap import hotswap_adapter_from_state_dict, put
from .tiers import Tiers


@dataclass(frozen=True)
class PoolStatus:
    """What a pool holds, and what it has done.

    Attributes:
        registered: how many adapters it knows.
        slots: {adapter: its slot in the model}, the active one first.
        memory: the adapters whose weights are in CPU memory, the least recently used first.
        slot_bytes: of all slots' tensors, in the model.
        memory_bytes: of the weights in CPU memory.
        reads: how often weights were read from disk.
        writes: how often an adapter was written into a slot.
        exchanges: how often two slots traded places.
    """

    registered: int
    slots: dict[str, str]
    memory: list[str]
    slot_bytes: int
    memory_bytes: int
    reads: int
    writes: int
    exchanges: int


class AdapterPool:
    """Many adapters on one model, at most `slots` in it and `memory` in CPU memory.

    Arguments:
        model: a PeftModel with one adapter: its configuration says what the adapters of the pool may have: the method,
            all their targets, the largest rank (`room_for` makes it from theirs). It stays registered under its name.
        slots: how many adapters the model holds, and so how many a mixed batch may name.
        memory: how many adapters' weights stay in CPU memory.
        spill: where the weights of adapters go that were registered from memory and have to leave it; None is a
            temporary folder.

    A pool is for serving: the model is set to eval(), and what training changes in a slot is not kept. Calls from
    several threads wait for each other; `using` and `batch` keep the adapters in place until their block ends.

    Raises ValueError for a model without an adapter, with several, or with trained biases or merged weights.
    """

    def __init__(self, model: Any, slots: int = 4, memory: int = 64, spill: str | os.PathLike[str] | None = None):
        _check_count("slots", slots, 1)
        _check_count("memory", memory, 0)
        self.model = model
        name, room = _only_adapter(model)
        self._lock = threading.RLock()
        self._tiers = Tiers(memory, spill)
        self.room = copy.copy(room)  # the first slot's own configuration follows what it holds
        self._tiers.add_state(name, get_peft_model_state_dict(model, adapter_name=name), self.room)
        self.slots = [name, *(_free_name(f"slot_{i}", model) for i in range(1, slots))]
        for slot in self.slots[1:]:
            model.add_adapter(slot, copy.copy(self.room))
        if any(isinstance(layer, BaseTunerLayer) for _, layer in tuner_layers(model)):
            prepare_model_for_compiled_hotswap(model)
        model.set_adapter(name, inference_mode=True)
        model.eval()
        self._held: OrderedDict[str, str | None] = OrderedDict((slot, None) for slot in reversed(self.slots))
        self._held[name] = name  # slot -> adapter, the least recently used first
        self._contents: dict[str, Contents] = {}
        self._aside: list[Tensor] = []
        self._writes = self._exchanges = 0

    # ---- which adapters there are --------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        config: PeftConfig | None = None,
        **options: Any,
    ) -> None:
        """Let the pool know an adapter. Its weights are read when it is first used, and checked then.

        Arguments:
            name: what it is called here; any text but "__base__".
            source: a folder or repository, or the tensors by checkpoint key with `config`.
            config: its configuration; None reads it from the folder.
            options: `subfolder`, `revision`, `token` ..., `key_mapping`.

        Raises ValueError if the name is taken, or the adapter does not fit in the room.
        """
        with self._lock:
            self._check_new(name)
            if isinstance(source, Mapping):
                if config is None:
                    raise ValueError(f"The adapter {name!r} is given by its tensors: give its `config` too.")
                self._check_room(name, config)
                self._tiers.add_state(name, source, config)
                return
            if config is None:
                hub = {k: v for k, v in options.items() if k in DOWNLOAD_ARGUMENTS}
                config = PeftConfig.from_pretrained(os.fspath(source), subfolder=options.get("subfolder"), **hub)
            self._check_room(name, config)
            self._tiers.add_folder(name, source, config, options)

    def unregister(self, name: str) -> None:
        """Forget an adapter. Raises ValueError for the active one."""
        with self._lock:
            self._check_known(name)
            if name == self.active:
                raise ValueError(f"The adapter {name!r} is active. Activate another one first.")
            self._tiers.remove(name)
            for slot, held in list(self._held.items()):
                if held == name:
                    self._held[slot] = None
                    self._held.move_to_end(slot, last=False)

    def __contains__(self, name: object) -> bool:
        return name in self._tiers.sources

    def __len__(self) -> int:
        return len(self._tiers.sources)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._tiers.sources))

    # ---- running them --------------------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """The adapter that the model runs."""
        return self._held[self.slots[0]]

    def activate(self, name: str) -> None:
        """Let the model run an adapter from now on.

        Raises ValueError for an unknown name, and what reading and writing its weights raises; the model then runs the
        same adapter as before.
        """
        with self._lock:
            self._check_known(name)
            slot = self._slot_of(name) or self._bring(name, ())
            first = self.slots[0]
            if slot != first:
                self._held.move_to_end(slot)  # what was active is the next most recent one
                self._trade(slot, first)
            self._held.move_to_end(first)

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """A context in which the model, which it gives, runs an adapter, and other threads wait."""
        with self._lock:
            self.activate(name)
            yield self.model

    @contextmanager
    def batch(self, names: Sequence[str | None]) -> Iterator[list[str]]:
        """A context in which all these adapters are in the model; it gives the `adapter_names` of the forward.

        Arguments:
            names: one for each sample; None or "__base__" for the base model.

        Raises ValueError for unknown names, or more different ones than the pool has slots.
        """
        with self._lock:
            wanted = list(dict.fromkeys(n for n in names if n is not None and n != BASE))
            for name in wanted:
                self._check_known(name)
            if len(wanted) > len(self.slots):
                raise ValueError(
                    f"The batch names {len(wanted)} adapters, but the pool has {len(self.slots)} slots. Make smaller "
                    f"batches, or the pool with slots={len(wanted)}."
                )
            before = self.active
            try:
                where: dict[str | None, str] = {
                    name: self._slot_of(name) or self._bring(name, wanted) for name in wanted
                }
                for slot in where.values():
                    self._held.move_to_end(slot)
                yield [where.get(name, BASE) for name in names]
            finally:
                if before is not None and before != self.active and before in self:
                    self.activate(before)

    def status(self) -> PoolStatus:
        """What the pool holds, and what it has done."""
        with self._lock:
            used = [(held, slot) for slot, held in self._held.items() if held is not None]
            return PoolStatus(
                registered=len(self),
                slots=dict(sorted(used, key=lambda pair: self.slots.index(pair[1]))),
                memory=list(self._tiers.memory),
                slot_bytes=sum(Contents(self.model, slot).nbytes for slot in self.slots),
                memory_bytes=self._tiers.nbytes(),
                reads=self._tiers.reads,
                writes=self._writes,
                exchanges=self._exchanges,
            )

    # ---- moving weights ------------------------------------------------------------------------------------------

    def _slot_of(self, name: str) -> str | None:
        return next((slot for slot, held in self._held.items() if held == name), None)

    def _bring(self, name: str, kept: Sequence[str]) -> str:
        """Write an adapter into the slot that was used least recently; not one with an adapter of `kept`."""
        first = self.slots[0]
        free = [slot for slot, held in self._held.items() if held not in kept]
        slot = next((s for s in free if s != first), first)
        self._write(slot, name)
        return slot

    def _write(self, slot: str, name: str) -> None:
        source = self._tiers.sources[name]
        old = self.model.peft_config[slot]
        new = copy.copy(source.config)
        for field in ("lora_dropout", "inference_mode"):
            if hasattr(old, field):
                setattr(new, field, getattr(old, field))
        try:
            state = self._tiers.state(name)
            if old.is_prompt_learning:
                hotswap_adapter_from_state_dict(self.model, state, slot, new)
                derived = True
            else:
                swap = put(self.model, state, slot, old, new, fixed=True)
                derived = any(change.changed or change.neutral for change in swap.changes)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            kind = next(k for k in (ValueError, TypeError, RuntimeError, OSError) if isinstance(error, k))
            raise kind(f"The adapter {name!r} cannot be put on the model: {error}") from error
        self._held[slot] = name
        if derived:  # there may be other tensors now
            self._contents.pop(slot, None)
        self._writes += 1

    def _trade(self, slot: str, first: str) -> None:
        """Let a slot's adapter run: the first slot's goes there instead."""
        mine, other = self._held[slot], self._held[first]
        for s in (slot, first):
            if s not in self._contents:
                self._contents[s] = Contents(self.model, s)
        one, two = self._contents[slot], self._contents[first]
        if not one.config.is_prompt_learning and one.form == two.form:
            if [(t.shape, t.dtype) for t in self._aside] != one.form[0]:
                self._aside = [torch.empty_like(t, requires_grad=False) for t in one.tensors]
            exchange(one, two, self._aside)
            self._held[slot], self._held[first] = other, mine
            self._exchanges += 1
        elif mine is not None:
            self._write(first, mine)
            self._held[slot] = None
            self._held.move_to_end(slot, last=False)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"An adapter's name is a string, but got {type(name).__name__}.")
        if name == BASE or not name:
            raise ValueError(f"{name!r} cannot be the name of an adapter. Use another one.")
        if name in self:
            raise ValueError(f"There is an adapter {name!r} in the pool already. Unregister it first.")

    def _check_known(self, name: str) -> None:
        if name not in self:
            raise UnknownNameError(
                f"There is no adapter {name!r} in the pool.{nearest(str(name), list(self))} It has "
                f"{listing(list(self)) or 'none'}. Register it first."
            )

    def _check_room(self, name: str, config: PeftConfig) -> None:
        _check_biases(config, f"The adapter {name!r} does not fit in the pool: ")
        if (field := unlike(self.room, config)) is not None:
            raise ValueError(
                f"The adapter {name!r} does not fit in the pool: for {field} it has {getattr(config, field, None)!r}, "
                f"and the pool's room {getattr(self.room, field, None)!r}."
            )
        for field in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, field, None) and not getattr(self.room, field, None):
                raise ValueError(
                    f"The adapter {name!r} does not fit in the pool: its {field} are {getattr(config, field)!r}, and "
                    "the pool's room has none. Make the pool with a configuration that has them (`room_for`)."
                )
        if has_ranks(config) and largest_rank(config) > largest_rank(self.room):
            raise ValueError(
                f"The adapter {name!r} has rank {largest_rank(config)}, and the pool's room {largest_rank(self.room)}."
                " Make the pool with a configuration of that rank (`room_for`)."
            )


def _only_adapter(model: Any) -> tuple[str, Any]:
    """The name and the configuration of a model's one adapter."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not hasattr(model, "add_adapter"):
        raise TypeError(f"A pool needs a PeftModel, but got {type(model).__name__}. Make one with get_peft_model.")
    if len(configs) != 1:
        raise ValueError(
            f"A pool needs a model with one adapter, whose configuration is the room of all; it has {sorted(configs)}."
        )
    (name, config), *_ = configs.items()
    _check_biases(config)
    for path, layer in tuner_layers(model):
        if layer.merged:
            raise ValueError(f"An adapter is merged in {path!r}. Unmerge it first, then make the pool.")
    return name, config


def _check_biases(config: Any, where: str = "") -> None:
    if (bias := getattr(config, "bias", "none")) != "none":
        raise ValueError(f"{where}bias={bias!r} trains the base model's biases, which all adapters of a pool share.")


def _free_name(name: str, model: Any) -> str:
    while name in model.peft_config:
        name += "_"
    return name


def _check_count(argument: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument}={value!r} is no number of adapters. Give a whole number of at least {least}.")
