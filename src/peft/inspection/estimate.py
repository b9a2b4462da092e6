"""What a training step or a forward will need of memory, found without the memory: `peft.estimate`.

The model's structure is copied onto memory that nobody touches (`hollow`), and forward, backward and the optimiser's
step are gone through on it. Every operation is met, every tensor lives as long as it would, and nothing is computed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.base_state import model_below
from ..create import get_peft_model
from ..errors import WrongKindError
from ..kernels import thin
from .asked import EXPERTS, EstimateError, checkpoint, inputs_of, model_of, optimizer_of
from .hollow import Hollow, Ledger, tensors_in
from .twin import copied, quantise


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step, or of a forward in evaluation.

    Attributes:
        base: the base model's parameters and buffers.
        adapter: what the adapter adds to them, copies of `modules_to_save` included.
        gradients: of all that is trained.
        optimizer: the optimiser's state.
        activations: what a forward in training leaves for the backward pass.
        peak: the most that lives at once, all of the above included.
        training: whether it is of a training step; gradients, optimizer and activations are 0 where it is not.
        notes: what the numbers leave out or assume.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    training: bool
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, as json has them."""
        return {**asdict(self), "notes": list(self.notes)}

    def __str__(self) -> str:
        names = ["base", "adapter", "gradients", "optimizer", "activations", "peak"]
        shown = [n for n in names if self.training or n in ("base", "adapter", "peak")]
        lines = [f"{name:<12}{getattr(self, name) / 2**20:>12,.1f} MiB" for name in shown]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def estimate(
    model: Any,
    config: PeftConfig | None = None,
    batch: int = 1,
    seq: int = 512,
    optimizer: str | type[torch.optim.Optimizer] = "adamw",
    *,
    target_seq: int | None = None,
    inputs: Any = None,
    dtype: torch.dtype | None = None,
    quantization_config: Any = None,
    gradient_checkpointing: bool = False,
    training: bool = True,
) -> Estimate:
    """How much memory a run needs, without its weights: `print(peft.estimate(model, config, batch=8, seq=1024))`.

    Tensors are counted as this library's steps on a CPU make them; what single operations need inside, and what an
    allocator leaves unused, is not.

    Arguments:
        model: a model on any device, the meta device too, which stays as it is; or a configuration of transformers, or
            the folder or name of one.
        config: the adapter; None for the model as it stands, all of it trained if nothing in it is frozen.
        batch, seq: rows, and tokens of each.
        optimizer: "adamw", "sgd", "adamw_8bit", "adafactor", or a class of torch.optim.
        target_seq: tokens of the labels of a sequence-to-sequence model; None for `seq`.
        inputs: what the model is called with, in place of `batch` and `seq`: keyword arguments in a dictionary, a
            tensor or a tuple of tensors; of any device.
        dtype: the base's; None for the one it has.
        quantization_config: transformers' BitsAndBytesConfig, for a model given as a configuration; None for its own.
        gradient_checkpointing: recompute activations of a model of transformers.
        training: a step of training; a forward in evaluation if False.

    Raises EstimateError where the model cannot be made, run or counted, WrongKindError for arguments of other kinds.
    """
    _check(config, dict(batch=batch, seq=seq, target_seq=target_seq), dtype)
    make = optimizer_of(optimizer)
    ledger = Hollow()
    notes: list[str] = []
    given, model = model, model_of(model, config, quantization_config, notes)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model's own run
        shadow = copied(model, ledger, dtype)
        if model is not given:
            quantise(shadow, ledger)
        base = ledger.live
        inner = model_below(model)
        called = inputs_of(inner, config, batch, seq, target_seq, training) if inputs is None else inputs
        called = _hollow_inputs(called, ledger, inputs is None and dtype)
        if gradient_checkpointing:
            checkpoint(shadow)
        with ledger, _coarse(shadow, called):
            before = ledger.live
            shadow = shadow if config is None else get_peft_model(shadow, copy.deepcopy(config))
            adapter = ledger.live - before
            found = step(shadow, called, make, ledger) if training else forward(shadow, called, ledger)
    if ledger.guessed:
        notes.append(f"shapes that depend on values ({', '.join(sorted(ledger.guessed))}) are those of zeros")
    if any(getattr(getattr(model, "config", None), name, None) for name in EXPERTS):
        notes.append("tokens are taken to be spread evenly over the experts")
    return Estimate(base, adapter, **found, training=training, notes=tuple(notes))


def step(model: nn.Module, inputs: Any, make: Callable[..., Any], ledger: Ledger) -> dict[str, int]:
    """The numbers of a training step under a ledger: the second one, as the first finds no state of the optimiser.

    Arguments:
        model: with adapters, its parameters held by the ledger.
        inputs: what it is called with.
        make: the optimiser of a list of parameters.
        ledger: entered already.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise EstimateError("Nothing in the model is trained, so it has no training step. Pass training=False.")
    learner, counted = make(trained), {}
    for _ in range(2):
        before = ledger.peak = ledger.live
        loss = _loss(_call(model, inputs))
        counted["activations"] = ledger.live - before
        loss.backward()
        del loss
        counted["gradients"] = total(p.grad for p in trained if p.grad is not None)
        learner.step()
        learner.zero_grad()
    counted["optimizer"] = total(t for state in learner.state.values() for t in tensors_in(dict(state)))
    return {**counted, "peak": ledger.peak}


def forward(model: nn.Module, inputs: Any, ledger: Ledger) -> dict[str, int]:
    """The numbers of a forward in evaluation, without gradients, under a ledger that is entered already."""
    model.eval()
    ledger.peak = ledger.live
    with torch.no_grad():
        _call(model, inputs)
    return {"gradients": 0, "optimizer": 0, "activations": 0, "peak": ledger.peak}


def total(tensors: Iterable[Tensor]) -> int:
    """The bytes of some tensors' memory, each once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _coarse(model: nn.Module, inputs: Any) -> AbstractContextManager[None]:
    """Let products that go in blocks take at most some 16: they differ in time only, and each would cost a look."""
    widest = max((p.shape[-1] for p in model.parameters() if p.dim() > 1), default=1)
    rows = max((prod(t.shape[:2]) for t in tensors_in(inputs)), default=1)
    return thin.coarse(rows * widest // 16)


def _check(config: Any, counts: Mapping[str, Any], dtype: Any) -> None:
    if config is not None and not isinstance(config, PeftConfig):
        raise WrongKindError(f"config is a {type(config).__name__}. Pass the adapter's configuration, or None.")
    for name, value in counts.items():
        if not (value is None and name == "target_seq") and (type(value) is not int or value < 1):
            raise WrongKindError(f"{name}={value!r} is not a count. Pass a whole number of 1 or more.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise WrongKindError(f"dtype={dtype!r} is no floating dtype of torch. Pass one such as torch.bfloat16.")


def _hollow_inputs(inputs: Any, ledger: Hollow, dtype: Any) -> Any:
    """The same nest: whole numbers as they are, all others hollow, in the base's dtype if it is given."""
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            inputs = torch.ones_like(inputs, device="cpu") if inputs.is_meta else inputs.detach().cpu()
            ledger.hold([inputs])
            return inputs
        return ledger.make(inputs, dtype or None)
    if isinstance(inputs, Mapping):
        return {k: _hollow_inputs(v, ledger, dtype) for k, v in inputs.items()}
    return (
        type(inputs)(_hollow_inputs(v, ledger, dtype) for v in inputs) if isinstance(inputs, list | tuple) else inputs
    )


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _loss(found: Any) -> Tensor:
    """The model's own loss, else a sum of all that it gives."""
    loss = found.get("loss") if isinstance(found, Mapping) else None
    if loss is None:
        parts = [t for t in tensors_in(dict(found) if isinstance(found, Mapping) else found) if t.requires_grad]
        loss = sum(t.float().sum() for t in parts)
    if not isinstance(loss, Tensor):
        raise EstimateError("Nothing that the model gives depends on what is trained. Pass other inputs= or config.")
    return loss
