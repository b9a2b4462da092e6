"""Writing what a run has learnt, and going on from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from peft.cli import report
from peft.cli.check import UsageError
from peft.cli.state import CURVE, STATE, replace
from peft.core.commit import make_folders
from peft.core.sharded import full, is_mesh, leads, like

if TYPE_CHECKING:
    from peft.cli.session import Session


def save_adapter(session: Session) -> None:
    """Write the adapter, the log and the loss curve; all processes call, as what is spread is gathered by all."""
    folder, log = session.options.output, session.log
    if session.leads:
        make_folders(folder)
    if session.leads or leads(session.plain) is not None:
        session.plain.save_pretrained(str(folder), is_main_process=session.leads)
    if not session.leads:
        return
    log.peak_memory_gib = report.peak_memory()
    log.save(folder)
    options, measured = session.options, ((0, log.before), (len(log.steps), log.after))
    title = f"{options.method}, r = {options.r}: {Path(options.model).name} on {Path(options.data).name}"
    held_out = {step: m["loss"] for step, m in measured if m}
    if not report.loss_curve(folder / CURVE, log.losses, title, held_out):
        report.say("No loss curve: matplotlib is not installed (pip install matplotlib).")


def save_state(session: Session) -> None:
    """Write the resumable state: adapter, optimizer and the steps so far; all processes call."""
    from peft import get_peft_model_state_dict

    if not session.leads and leads(session.plain) is None:
        return
    state = {
        "adapter": get_peft_model_state_dict(session.plain),
        "optimizer": tree_map_only(Tensor, full, session.optimizer.state_dict()),
        "steps": session.log.steps,
        "before": session.log.before,
    }
    if not session.leads:
        return
    make_folders(session.options.output)
    replace(session.options.output / STATE, lambda path: torch.save(state, path))
    session.log.save(session.options.output)


def restore(session: Session) -> None:
    """Put adapter and optimizer back where the state file left them."""
    from peft import set_peft_model_state_dict

    log, path = session.log, session.options.output / STATE
    if log.examples != len(session.train):
        raise UsageError(
            f"--data {session.options.data}: has {len(session.train)} training examples, the saved run had "
            f"{log.examples}. Restore the file, or use --overwrite."
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises many kinds for a damaged file
        raise UsageError(f"{path}: is damaged ({type(problem).__name__}). Use --overwrite to start again.") from None
    adapter: dict[str, Tensor] = state["adapter"]
    set_peft_model_state_dict(session.plain, adapter)
    session.optimizer.load_state_dict(_spread(session, state["optimizer"]))
    log.steps, log.before, log.status = state["steps"], state["before"], "running"


def _spread(session: Session, state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state with each tensor spread over the processes as its parameter is."""
    parameters = [p for group in session.optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        p = parameters[number]
        if is_mesh(p):
            values.update({k: like(v, p) for k, v in values.items() if isinstance(v, Tensor) and v.shape == p.shape})
    return state
