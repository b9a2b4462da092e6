"""`peft train`: prepare a session, fit it, save what was learnt.

    session = prepare(options)      # checks, plan, weights, adapter; resumes an unfinished run
    finished = fit(session)         # False if interrupted; saved either way

accelerate places the model: the same code runs on CPU or GPU and under `accelerate launch` or `torchrun`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from peft.cli import report
from peft.cli.batch import order
from peft.cli.check import UsageError
from peft.cli.data import Example
from peft.cli.evaluate import Metrics, evaluate, sums
from peft.cli.interrupt import interruptible
from peft.cli.model import end_together
from peft.cli.options import TrainOptions
from peft.cli.plan import show_plan
from peft.cli.save import save_adapter, save_state
from peft.cli.session import Session, prepare
from peft.cli.state import STATE, Log, earlier_run

SAVES = 10  # the resumable state is written this many times in a run


def run(options: TrainOptions) -> int:
    """`peft train`: the exit code is 0 when complete, 130 when interrupted (and saved)."""
    if options.dry_run:
        return show_plan(options)
    earlier = earlier_run(options)
    if earlier and earlier.status == "complete":
        report.say(f"The run in {options.output} is complete ({len(earlier.steps)} steps). --overwrite starts again.")
        show_result(earlier)
        return 0
    session = prepare(options)
    measure(session, "before")
    complete = fit(session)
    if complete:
        measure(session, "after")
        finish(session)
    if complete and session.leads:
        show_result(session.log)
        report.say(f"Saved in {options.output}. Try: peft generate --adapter {options.output} --prompt ...")
    end_together(session.accelerator)
    return 0 if complete else 130


def fit(session: Session) -> bool:
    """Train until the last step or an interrupt; print the loss, save the state on the way.

    Returns False if interrupted; the adapter and the state are saved then.
    """
    log, done = session.log, len(session.log.steps)
    session.model.train()
    lengths = [e.length for e in session.train]
    batches = itertools.islice(order(lengths, session.step_size, session.options.seed), done, session.steps)
    with interruptible() as interrupted, _bar(session, done) as show:
        for step, numbers in enumerate(batches, done):
            log.steps.append(_step(session, step, [session.train[i] for i in numbers]))
            show(log)
            if _anywhere(session, interrupted):
                log.status = "stopped"
                break
            if (step + 1) % max(1, session.steps // SAVES) == 0 or step + 1 == session.steps:
                save_state(session)
    if log.status == "stopped":
        _save_stopped(session)
    return log.status != "stopped"


def learning_rate(step: int, steps: int, highest: float, warmup: float) -> float:
    """Linear warm-up (a fraction of the steps if below 1), then a cosine down to nearly 0."""
    rising = max(1.0, warmup * steps if warmup < 1 else warmup)
    return highest * min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _step(session: Session, step: int, examples: list[Example]) -> dict[str, float]:
    """One optimizer step on the examples of all processes; every answer token weighs the same."""
    options, accelerator, start = session.options, session.accelerator, time.perf_counter()
    # dropout depends on the step alone, so that a resumed run is the same run
    torch.manual_seed(_step_seed(session, step))
    rate = learning_rate(step, session.steps, options.lr, options.warmup)
    for group in session.optimizer.param_groups:
        group["lr"] = rate
    mine = [session.encoder(e) for e in examples[accelerator.process_index :: accelerator.num_processes]]
    parts = [mine[i : i + options.batch] for i in range(0, len(mine), options.batch)]
    total = sum(len(answer) for _, answer in mine)
    everywhere = max(1.0, accelerator.reduce(torch.tensor(float(total), device=accelerator.device)).item())
    summed = torch.zeros((), device=accelerator.device)
    for i, part in enumerate(parts):
        with nullcontext() if i == len(parts) - 1 else accelerator.no_sync(session.model):
            batch = session.layout.batch(part, accelerator.device)
            loss = sums(batch.logits(session.model), batch.labels)[0]
            # gradients are averaged over processes, so this is the mean over all tokens everywhere
            accelerator.backward((loss * (accelerator.num_processes / everywhere)).float())
            summed += loss.detach().float()
    mean = accelerator.reduce(summed).item() / everywhere
    _demand_finite(mean, step, session)
    accelerator.clip_grad_norm_([p for p in session.model.parameters() if p.requires_grad], 1.0)
    session.optimizer.step()
    session.optimizer.zero_grad()
    return {"step": step + 1, "loss": mean, "learning_rate": rate, "tokens": everywhere,
            "seconds": time.perf_counter() - start}  # fmt: skip


def _step_seed(session: Session, step: int) -> int:
    return ((session.options.seed * 1_000_003 + step) * 1_009 + session.accelerator.process_index) % 2**63


def _demand_finite(loss: float, step: int, session: Session) -> None:
    if not math.isfinite(loss):
        raise UsageError(
            f"Step {step + 1}: the loss is {loss}. Lower --lr (now {session.options.lr}), or use "
            "--dtype fp32. The step was not taken; the state of the last save is kept."
        )


def measure(session: Session, when: str) -> None:
    """Evaluate on the held-out examples, if any, and note the result in the log as `when` (before, after)."""
    if not session.held_out or getattr(session.log, when):
        return
    with report.progress(disable=not session.leads) as bar:
        task = bar.add_task(when, total=len(session.held_out), loss="")
        found = evaluate(
            session.model, session.held_out, session.encoder, session.layout, session.accelerator,
            session.options.batch, lambda n: bar.advance(task, n),
        )  # fmt: skip
    setattr(session.log, when, found.as_dict())


def finish(session: Session) -> None:
    """Save the adapter, the log and the loss curve of a complete run, and drop the resumable state."""
    session.log.status = "complete"
    save_adapter(session)
    if session.leads:
        (session.options.output / STATE).unlink(missing_ok=True)


def show_result(log: Log) -> None:
    """Print the table of a run: before and after on held-out examples, or the training loss."""
    rows = [
        [when, *Metrics(m["loss"], m["token_accuracy"], int(m["tokens"]), int(m["examples"])).cells()]
        for when, m in (("before", log.before), ("after", log.after))
        if m
    ]
    if rows:
        report.table("Held-out examples", ["", "loss", "perplexity", "token accuracy"], rows)
    recent = report.running_mean(log.losses, 10)[-1]
    report.say(
        f"{len(log.steps)} steps in {log.seconds:.0f} s, training loss {log.losses[0]:.3f} -> {recent:.3f} "
        f"(mean of the last {min(10, len(log.steps))}), {log.trainable_parameters:,} trainable parameters, "
        f"peak {log.peak_memory_gib:.1f} GiB"
    )


@contextmanager
def _bar(session: Session, done: int) -> Iterator[Callable[[Log], None]]:
    """A progress bar on a terminal; elsewhere a line for every tenth of the run."""
    with report.progress(disable=not session.leads) as bar:
        live = bar.console.is_terminal
        task = bar.add_task("train", total=session.steps, completed=done, loss="")
        every = max(1, session.steps // SAVES)

        def show(log: Log) -> None:
            text = f"loss {report.running_mean(log.losses, 10)[-1]:.3f}"
            bar.update(task, completed=len(log.steps), loss=text)
            if session.leads and not live and len(log.steps) % every == 0:
                report.say(f"step {len(log.steps)}/{session.steps} {text} {log.seconds:.0f} s")

        yield show


def _anywhere(session: Session, received: list[int]) -> bool:
    """Whether any process was interrupted: all of them must leave the loop at the same step."""
    if session.accelerator.num_processes == 1:
        return bool(received)
    mine = torch.tensor(float(bool(received)), device=session.accelerator.device)
    return session.accelerator.reduce(mine).item() > 0


def _save_stopped(session: Session) -> None:
    save_state(session)
    save_adapter(session)
    if session.leads:
        report.say(
            f"Interrupted after step {len(session.log.steps)} of {session.steps}; the adapter and its "
            f"state are saved in {session.options.output}. Run the same command again to resume."
        )
