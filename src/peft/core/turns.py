"""One thread at a time in a module whose weights are exchanged while it runs."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

from torch import nn

_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):  # a thread that holds one is not there in a forked process
    os.register_at_fork(after_in_child=_turns.clear)


def turn(module: nn.Module) -> AbstractContextManager[bool]:
    """A context in which no other thread is, for this module; one thread may enter it again."""
    lock = _turns.get(module)
    return _turns.setdefault(module, threading.RLock()) if lock is None else lock
