"""What a run needs to go on and files of adapters lack: the network that makes a prompt, the moves of its words.

It lies in the state of the optimiser, which is saved where training is to be resumed, and nowhere else: files of
adapters stay as small as the prompt. The folder of a `Trainer`'s checkpoint holds both.
"""

from __future__ import annotations

import os
import pickle
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..core import sharded

NOTE = "peft_prompt_encoder"  # in the state of an optimiser
PREFIX = "prompt_encoder_in_training."  # of such tensors beside those of a file
FILE = "optimizer.pt"  # as transformers calls it

_encoders: weakref.WeakSet[Any] = weakref.WeakSet()
follow = _encoders.add


def noted_in(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors that an optimiser saved in a folder has noted of the one prompt that it trained; none without one."""
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        return {}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        notes = [state[NOTE] for state in saved["state"].values() if NOTE in state]
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError):
        return {}  # it is no optimiser's, or damaged: who resumes from it will be told when it is read as one
    return {PREFIX + name: value for name, value in notes[0].items()} if len(notes) == 1 else {}


def _note(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Leave the tensors of each prompt that the optimiser trains in its state; they are no copies."""
    if not _encoders:
        return
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for encoder in list(_encoders):
        mine = encoder.beside_file()
        if any(sharded.is_spread(p) for p in mine.values()):
            continue
        at = next((p for p in mine.values() if id(p) in trained and optimizer.state.get(p)), None)
        if at is not None:
            optimizer.state[at][NOTE] = {name: p.detach() for name, p in mine.items()}


register_optimizer_step_post_hook(_note)
