"""The task of each sample of a batch, as the caller of a model gives it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.lowrank import transformed


class Tasks:
    """The ids, (samples,) int64.

    Arguments:
        ids: a tensor, or a sequence of integers.
    """

    def __init__(self, ids: Any):
        held = ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
        if held.shape == (0,):
            held = held.long()  # of an empty list torch makes floating-point numbers
        if held.dim() != 1 or held.is_floating_point() or held.dtype is torch.bool:
            raise ValueError(
                f"task_ids must hold one integer per sample, (samples,), but is {tuple(held.shape)} of {held.dtype}. "
                "Pass a tensor like torch.tensor([0, 2, 1])."
            )
        self.ids = held.long()
        self._range: tuple[int, int] | None = None
        self._listed: list[int] | None = None

    @property
    def first(self) -> Tensor:
        """The first sample's, (1,); a batch without samples has the first task of all, and no use for it."""
        return self.ids[:1] if self.ids.shape[0] else self.ids.new_zeros(1)

    @property
    def listed(self) -> list[int]:
        """The ids as numbers; found once a call, as it waits for the device."""
        if self._listed is None:
            self._listed = self.ids.tolist()
        return self._listed

    def check(self, count: int) -> None:
        """Raise ValueError if an id is none of `count` tasks.

        Ids on a device, which one would have to wait for, and those of a graph are left to the look-up.
        """
        if type(self.ids) is not Tensor or self.ids.device.type != "cpu" or transformed() or not len(self.ids):
            return
        if self._range is None:
            self._range = int(self.ids.min()), int(self.ids.max())
        low, high = self._range
        if low < 0 or high >= count:
            raise ValueError(
                f"task_ids holds {low if low < 0 else high}, but there are {count} tasks (n_tasks={count}). Use ids "
                f"from 0 to {count - 1}, or more tasks in the configuration."
            )
