"""What a run needs, put together in the order in which it can fail cheaply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from peft.cli import report
from peft.cli.batch import Encoder, Layout
from peft.cli.check import UsageError
from peft.cli.data import Example, load_train_and_eval
from peft.cli.model import (
    base_name,
    load_model,
    load_tokenizer,
    make_accelerator,
    meta_model,
    method_config,
    torch_dtype,
)
from peft.cli.options import TrainOptions
from peft.cli.plan import checked_plan
from peft.cli.save import restore
from peft.cli.state import Log, described, earlier_run
from peft.core.sharded import is_flat


@dataclass
class Session:
    """Everything a run needs. `model` is the PeftModel as accelerate wrapped it."""

    options: TrainOptions
    accelerator: Any
    model: nn.Module
    optimizer: Any
    tokenizer: Any
    encoder: Encoder
    layout: Layout
    train: list[Example]
    held_out: list[Example]
    steps: int
    log: Log

    @property
    def leads(self) -> bool:
        """Whether this process prints and saves."""
        return self.accelerator.is_main_process

    @property
    def step_size(self) -> int:
        """Examples in one optimizer step, of all processes together."""
        return self.options.batch * self.options.grad_accum * self.accelerator.num_processes

    @property
    def plain(self) -> Any:
        """The PeftModel without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)


def prepare(options: TrainOptions) -> Session:
    """Load data, check the plan against the architecture, then load weights, add the adapter, resume.

    Raises UsageError or a PeftError before weights are loaded if anything does not fit.
    """
    from peft import get_peft_model

    earlier = earlier_run(options)
    train, held_out = load_train_and_eval(options)
    tokenizer = load_tokenizer(base_name(options.model))
    config = method_config(options)
    checked_plan(meta_model(base_name(options.model)), config)
    accelerator = make_accelerator()
    torch.manual_seed(options.seed)
    base = load_model(base_name(options.model), options.dtype, options.quantize)
    layout = Layout.of(base, tokenizer)
    if options.gradient_checkpointing:
        _save_memory(base)
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = base_name(options.model)
    log = earlier or Log(described(options), examples=len(train), versions=_versions())
    log.trainable_parameters, log.all_parameters = model.get_nb_trainable_parameters()
    optimizer: Any = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=options.lr, weight_decay=0.0
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    _check_engine(accelerator, wrapped)
    encoder = Encoder(tokenizer, options.template, options.max_length)
    steps = step_count(options, len(train), accelerator.num_processes)
    session = Session(options, accelerator, wrapped, optimizer, tokenizer, encoder, layout, train, held_out, steps, log)
    if earlier:
        restore(session)
    if session.leads:
        _announce(session)
    return session


def _check_engine(accelerator: Any, model: nn.Module) -> None:
    """Raise UsageError for engines whose state cannot be kept between steps here."""
    if accelerator.distributed_type == "DEEPSPEED" or any(is_flat(p) for p in model.parameters()):
        raise UsageError(
            "accelerate launch: `peft train` runs with data parallelism and with FSDP2 (--use_fsdp --fsdp_version 2), "
            "not with DeepSpeed or FSDP1. Adapters train with those in transformers' Trainer."
        )


def _save_memory(base: Any) -> None:
    """Switch activation checkpointing on, under the name that this transformers has for it."""
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def step_count(options: TrainOptions, examples: int, processes: int = 1) -> int:
    """Optimizer steps of the whole run: --steps, or the epochs' worth of batches."""
    if options.steps is not None:
        return options.steps
    return math.ceil((options.epochs or 1) * examples / (options.batch * options.grad_accum * processes))


def _announce(session: Session) -> None:
    log, done = session.log, len(session.log.steps)
    share = 100 * log.trainable_parameters / log.all_parameters
    how = f"resuming after step {done}" if done else "starting"
    report.say(
        f"{how}: {session.steps} steps of {session.step_size} examples, "
        f"{session.accelerator.num_processes} x {session.accelerator.device.type}, "
        f"{session.options.quantize + ' in ' if session.options.quantize else ''}"
        f"{str(torch_dtype(session.options.dtype)).removeprefix('torch.')}, {log.trainable_parameters:,} of "
        f"{log.all_parameters:,} parameters trainable ({share:.2f} %)"
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "accelerate")}
