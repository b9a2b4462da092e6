"""What one forward carries to every tuner layer of a model."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ..kernels.modes import transformed
from .deferred import Deferred
from .rows import Groups
from .tasks import Tasks
from .watch import Ledger

BASE = "__base__"
REMEMBERED = 1024  # forward passes that may wait for their backward pass
UNKEPT = frozenset(
    (
        "_past",
        "_node",
        "_recalled",
        "_groups",
        "now",
        "_batches",
        "_latest",
        "gates",
        "models",
        "banks",
        "_flags",
        "_turn",
        "owner",
    )
)
BATCHES = 8  # mixed batches whose rows are known again


class Call(Deferred):
    """The per-call record, one object shared by all tuner layers of a model.

    Under gradient checkpointing a layer runs again in the backward pass, when its call is long over. The facts of each
    call are therefore remembered beside the numbers of the autograd nodes that it made; `fact` finds them by the node
    that is being evaluated, in whatever order the backward passes come.

    Attributes:
        names: one adapter name per sample of the batch, or None for the active adapters.
        beams: how often each sample may be repeated (beam search).
        length: tokens per sample, where known; rows of flattened tokens are then told apart.
        tasks: the task of each sample, where the caller says so.
        only: while a module runs on the rows of one adapter, that adapter's name.
        task: while a module runs on the rows of one task, that task, (1,).
        part: while a module runs on some rows of a batch, which these are, and of how many.
        offsets: adapter -> on how many of each row's last positions it acts, (rows,); None where nobody has looked.
        given_offsets: what the caller says of that, one number or None per sample.
        gates: a weak reference to what a gate says of each token, while it is in force.
        keys: the keys and values that stand before those of the text in every layer; None where layers have them.
        ids: the text's own, where the model is given embeddings in their place.
        virtual: how many tokens before the text are no text.
        plain: whether no call was or is mixed, so that layers need not ask.
        owner: the thread whose call the record tells of; to all other threads it says nothing.
    """

    FACTS = ("names", "beams", "length", "tasks", "offsets", "given_offsets", "keys", "ids", "gates")

    def __init__(self) -> None:
        self.names: tuple[str, ...] | None = None
        self.beams = 1
        self.length: int | None = None
        self.tasks: Tasks | None = None
        self._only: str | None = None
        self.task: Tensor | None = None
        self.part: tuple[Tensor, int] | None = None
        self.offsets: dict[str, Tensor] | None = None
        self.given_offsets: list[int | None] | None = None
        self.keys: Any = None
        self.ids: Tensor | None = None
        self.virtual = 0
        self.plain = True
        self.owner: int | None = None
        self._groups: dict[tuple[int, torch.device], Groups] = {}
        self.now: Groups | None = None  # the last of them
        self._forget()

    @property
    def only(self) -> str | None:
        """See `Call`."""
        return None if self.elsewhere() else self._only

    @only.setter
    def only(self, name: str | None) -> None:
        self._only = name

    def _forget(self) -> None:
        self._turn = threading.RLock()
        self._past: deque[tuple[int, int, dict[str, Any]]] = deque(maxlen=REMEMBERED)
        self._node: int | None = None  # the autograd node in whose evaluation the facts were set; None outside backward
        self._recalled: dict[str, Any] | None = None
        self.gates: Any = None
        self.banks = Ledger()  # layer -> factors of a mixed batch's adapters
        self._batches: dict[Any, Groups] = {}  # of the latest mixed batches
        self._latest: tuple[Any, ...] = ()  # the last of them, and what it is of

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {k: v for k, v in self.__dict__.items() if k not in UNKEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _groups={}, now=None, owner=None)
        self._forget()

    # ---- the facts of a call -----------------------------------------------------------------------------------

    def elsewhere(self) -> bool:
        """Whether the record tells of a call in another thread."""
        if torch.compiler.is_compiling() or self.owner is None or self.owner == get_ident():
            return False
        return torch._C._current_autograd_node() is None  # a backward pass has threads of its own

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the record is this thread's; others that need it wait."""
        if torch.compiler.is_compiling():
            yield
            return
        with self._turn:
            before, self.owner = self.owner, get_ident()
            try:
                yield
            finally:
                self.owner = before

    @contextmanager
    def open(self, **facts: Any) -> Iterator[None]:
        """While open, these facts hold (see `FACTS`); restores those of the call around it on exit."""
        with self.alone():
            yield from self._open(facts)

    def _open(self, facts: dict[str, Any]) -> Iterator[None]:
        self.settle()
        before = {key: getattr(self, key) for key in facts}
        node, plain, self._groups, self.now = self._node, self.plain, {}, None
        for key, value in facts.items():
            setattr(self, key, value)
        self.plain = plain and self.names is None
        self.banks.begin()
        start = self.begin()
        try:
            yield
        finally:
            kept = self.remember(start)
            for key, value in before.items():
                setattr(self, key, value)
            self.plain = plain and not (kept and facts.get("names"))
            self._node, self._groups, self.now = node, {}, None
            self.banks.begin()

    def begin(self) -> int:
        """The facts are being set: the number that `remember` asks for when the forward is over."""
        if torch.compiler.is_compiling():
            return 0
        self._node = evaluated()
        return int(torch.autograd._get_sequence_nr())

    def remember(self, start: int) -> bool:
        """The forward is over: keep its facts for the backward pass. Tells whether there can be one."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        end = int(torch.autograd._get_sequence_nr())
        if start < end:
            self._past.append((start, end, {key: getattr(self, key) for key in self.FACTS}))
        return start < end

    def fact(self, key: str) -> Any:
        """A fact of the running call, or of the one of which a part is computed again in the backward pass."""
        if self.elsewhere():
            return 1 if key == "beams" else None
        now = None if torch.compiler.is_compiling() else evaluated()
        if now is None or now == self._node or not self._past:
            return getattr(self, key)
        found = next((facts for start, end, facts in reversed(self._past) if start <= now < end), None)
        if found is None and now >= self._past[-1][1]:
            found = self._recalled  # the node was made in the backward pass: checkpoints within checkpoints
        if found is None and len(self._past) == REMEMBERED and now < self._past[0][0]:
            raise ValueError(
                "A part of a forward pass is computed again (gradient checkpointing), but more than "
                f"{REMEMBERED} passes came between, so what it was called with is forgotten. Call backward() earlier."
            )
        if found is None:
            return getattr(self, key)  # of a forward that said nothing
        self._recalled = found
        return found[key]

    def of(
        self,
        first: Tensor | None,
        beams: int | None = None,
        names: Sequence[str] | None = None,
        task_ids: Any = None,
        offsets: Sequence[int | None] | None = None,
    ) -> AbstractContextManager[None]:
        """`open` for a model that is called with such arguments.

        Arguments:
            first: its main input, as `first_tensor` finds it.
            beams: how often each sample may be repeated; None for a forward.
            names, task_ids, offsets: what the caller says of each sample, or None.
        """
        facts: dict[str, Any] = {"keys": None, "ids": None, "virtual": 0}
        if offsets is not None:
            facts["given_offsets"] = list(offsets)
        length = tokens(first) if beams is None else None
        if names is not None:
            mine, latest = tuple(names), self._latest
            facts["names"] = latest[0] if latest and latest[0] == mine else mine
        if task_ids is not None:
            facts["tasks"] = given = Tasks(task_ids)
            if first is not None and given.ids.shape[0] != first.shape[0]:
                length = None  # else a wrong number of ids might pass for one per sample
        return self.open(beams=beams or 1, length=length, **facts)

    @contextmanager
    def rows(self, index: Tensor, count: int) -> Iterator[None]:
        """While open, a module runs on these of the `count` rows that it was given, of a batch or a part of one."""
        before = self.part
        self.part = (index, count) if before is None else (before[0][index], before[1])
        try:
            yield
        finally:
            self.part = before

    def groups(self, rows: int, device: torch.device, where: str, names: tuple[str, ...]) -> Groups:
        """Row indices of each adapter for an input of `rows` rows.

        Raises ValueError if the rows cannot be assigned to the names without guessing.
        """
        if ".experts." in f".{where}" and re.search(r"\bexperts\.\d+\b", where):
            raise self._unclear(rows, len(names), where)  # it gets some tokens of some samples, whatever their number
        key = (rows, device)
        known = self._groups.get(key) if names is self.names else None
        if known is not None:
            return known
        repeat = self._repeat(rows, len(names))
        if not repeat:
            raise self._unclear(rows, len(names), where)
        found = self._grouped(names, repeat, rows, device)
        if names is self.names:
            self._groups[key] = self.now = found
        return found

    def _grouped(self, names: tuple[str, ...], repeat: int, rows: int, device: torch.device) -> Groups:
        lasting = not transformed() and torch._C._len_torch_dispatch_stack() == 0
        key = (names, repeat, device, torch.is_inference_mode_enabled()) if lasting else None
        latest = self._latest
        if key is not None and latest and latest[0] is names and latest[1:-1] == key[1:]:
            same: Groups = latest[-1]
            return same
        found = None if key is None else self._batches.get(key)
        if found is None:
            lists: dict[str, list[int]] = {}
            for i, name in enumerate(names):
                lists.setdefault(name, []).extend(range(i * repeat, (i + 1) * repeat))
            found = Groups(lists, rows, device)
        if key is not None:
            self._batches.pop(key, None)
            self._batches[key], self._latest = found, (*key, found)
            if len(self._batches) > BATCHES:
                del self._batches[next(iter(self._batches))]
        return found

    def _repeat(self, rows: int, samples: int) -> int:
        """How often each sample stands among the rows of a layer's input; 0 if that is not clear."""
        if rows == samples == 0:
            return 1
        allowed = (1, self.fact("beams"), self.fact("length"))  # sizes may be symbols, which no set holds
        return rows // samples if samples and rows % samples == 0 and rows // samples in allowed else 0

    def task_of_row(self, rows: int, count: int, device: torch.device, where: str) -> Tensor:
        """The task of each row of a layer's input, (rows,) int64.

        Arguments:
            rows: of the input.
            count: how many tasks there are.
            device: of the input.
            where: the layer's path, for messages.

        Raises ValueError if the caller gave none, one that does not exist, or not one for each sample.
        """
        tasks, part = self._tasks(where), self.part
        tasks.check(count)
        whole = rows if part is None else part[1]
        repeat = self._repeat(whole, tasks.ids.shape[0])
        if not repeat:
            raise ValueError(
                f"task_ids has {len(tasks.ids)} entries, but the layer {where!r} received {whole} rows, so its rows "
                "cannot be assigned to tasks. Pass one id per sample; layers that regroup samples cannot be adapted "
                "by task (`exclude_modules`)."
            )
        ids = tasks.ids.to(device)
        ids = ids.repeat_interleave(repeat) if repeat > 1 else ids
        return ids if part is None else ids[part[0]]

    def _tasks(self, where: str) -> Tasks:
        tasks: Tasks | None = self.fact("tasks")
        if tasks is None:
            raise ValueError(
                f"task_ids is missing: the adapter at {where!r} needs the task of each sample. Pass task_ids, a tensor "
                "with one id per sample, to the forward or generate of the model."
            )
        return tasks

    def one_task(self, count: int, device: torch.device, where: str) -> Tensor:
        """The task that all rows that run now have, (1,) int64; arguments as for `task_of_row`.

        Raises ValueError if there is none, or several.
        """
        tasks = self._tasks(where)
        tasks.check(count)
        if self.task is not None:
            return self.task.to(device)
        if tasks.ids.shape[0] > 1 and (torch.compiler.is_compiling() or len(set(tasks.listed)) > 1):
            raise ValueError(
                f"task_ids holds several tasks, but the module around {where!r} reads one weight for the whole batch. "
                "Target the module itself, which then runs once for each task, or pass batches of one task."
            )
        return tasks.first.to(device)

    def by_task(self, rows: int, device: torch.device, where: str) -> list[tuple[Tensor, Tensor]]:
        """(task, (1,); its rows) of each task of a layer's input; a compiled graph takes each row for itself."""
        tasks = self._tasks(where)
        compiling = torch.compiler.is_compiling()
        if tasks.ids.shape[0] == 1 or not (compiling or len(set(tasks.listed)) > 1):
            return [(tasks.first, torch.arange(rows, device=device))]
        ids = self.task_of_row(rows, 2**31, device, where)
        found: dict[int, list[int]] = {}
        for row, task in enumerate(range(rows) if compiling else ids.tolist()):
            found.setdefault(task, []).append(row)
        return [(ids[index[0]][None], torch.tensor(index, device=device)) for index in found.values()]

    def _unclear(self, rows: int, samples: int, where: str) -> ValueError:
        return ValueError(
            f"adapter_names has {samples} entries, but the layer {where!r} received {rows} rows, so its rows cannot be "
            "assigned to adapters. Pass one name per sample; layers that regroup samples cannot take a mixed batch."
        )


def evaluated() -> int | None:
    """The number of the autograd node that is being evaluated; None outside a backward pass."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The main input of a model."""
    preferred = [kwargs.get(k) for k in ("input_ids", "inputs_embeds", "inputs", "input_features", "pixel_values")]
    values = (*args, *preferred, *kwargs.values())
    return next((v for v in values if isinstance(v, Tensor) and v.dim()), None)


def tokens(first: Tensor | None) -> int | None:
    """Tokens per sample: of ids (batch, tokens), or embeddings (batch, tokens, size)."""
    if first is None or first.is_nested:  # which has no one number of them
        return None
    ids = first.dim() == 2 and not first.is_floating_point()
    return first.shape[1] if ids or first.dim() == 3 else None
