"""What training does to adapters: who gets gradients and who changes, and where somebody does not, why.

Nothing is copied. Of a tensor's bits 64 sums are kept, of its gradients the largest and the worst number, which stay on
its device until the report. Gradients are met by hooks as they come, and optimisers as they step.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..core.layer import BaseTunerLayer, tuner_layers
from ..core.sharded.gather import is_mesh, is_spread, is_zero, laid_into, unwrapped
from ..core.shared import SharedTensors
from ..errors import WrongKindError
from .diagnosis import Checkup, Diagnosis, Fact, State

LAYERS = "its layers"  # the part of an adapter that stands for all of them; others go by their path
LANES = 64


def doctor(model: nn.Module, optimizer: Any = None) -> Doctor:
    """Watch a model's adapters while it trains: `with peft.doctor(model) as watched:` a few steps, `watched.report()`.

    It may stand around a whole `Trainer.train()`. Without `with`, the report ends the watch. Where tensors are spread
    over processes, all of them must ask for the report.

    Arguments:
        model: a PeftModel, a model with injected layers, or what stands around one (DDP).
        optimizer: what is to train it, to be named where it holds other parameters; those that step are met anyway.

    Raises TypeError if there is no adapter in it.
    """
    return Doctor(model, optimizer)


class Doctor:
    """The watch over a model's training; see `doctor`."""

    def __init__(self, model: nn.Module, optimizer: Any = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.seen: dict[str, Seen] = {}
        self.strange: set[int] = set()  # what optimisers hold that is not in the model
        self.settled = False
        self._report: Checkup | None = None
        if not isinstance(model, nn.Module) or not State.of(model).available:
            raise WrongKindError(f"peft.doctor needs a model with adapters, and this {type(model).__name__} has none.")
        self._hooks: list[Any] = []
        self._find()
        self.before = State.of(model)
        mine = weakref.ref(self)

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            if (doctor := mine()) is not None:
                doctor._step(optimizer)

        self._hooks.append(register_optimizer_step_pre_hook(before_step))
        self._close = weakref.finalize(self, _remove, self._hooks)
        self._close.atexit = False

    def __enter__(self) -> Doctor:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._close()
        if error is None:
            self.report()

    def report(self) -> Checkup:
        """What has been found; the first call, or the end of `with`, ends the watch."""
        if self._report is None:
            self._close()
            if self.optimizer is not None:
                self._note(self.optimizer, steps=0)
            facts = list(self.seen.values())
            for seen in facts:
                seen.settle()
            _join(facts)
            strange = len(self.strange - {id(seen.tensor) for seen in facts})
            self._report = Diagnosis(self.model, facts, self.before, strange).checkup()
        return self._report

    def _find(self) -> None:
        """Take note of every parameter that is new, or not what it was (sharded, cast)."""
        owners = _owners(self.model)
        now = {unwrapped(name): tensor for name, tensor in self.model.named_parameters()}
        for name in self.seen.keys() - now.keys():
            del self.seen[name]
        for name, tensor in now.items():
            known = self.seen.get(name)
            if known is not None and known.tensor is tensor:
                known.follow()
            else:
                self.seen[name] = seen = Seen(tensor, name, *owners.get(id(tensor), (None, "")))
                if tensor.requires_grad:
                    self._hooks.append(tensor.register_hook(seen.meet))

    def _step(self, optimizer: Any) -> None:
        """An optimiser is about to step."""
        known = {id(seen.tensor) for seen in self.seen.values()}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not self.settled or held - known - self.strange:  # a trainer has prepared the model by now
            self._find()
            self.settled = True
        for seen in self.seen.values():
            if seen.tensor.requires_grad:
                seen.trained = True
                if not seen.met and seen.tensor.grad is not None:  # FSDP2 puts gradients there itself
                    seen.look(seen.tensor.grad)
        self._note(optimizer, steps=1)

    def _note(self, optimizer: Any, steps: int) -> None:
        """Take note of what an optimiser holds, and at which rate."""
        mine = {id(seen.tensor): seen for seen in self.seen.values()}
        for group in optimizer.param_groups:
            rate = group.get("lr")
            rate = math.inf if rate is None else float(rate)
            for p in group["params"]:
                if id(p) in mine:
                    mine[id(p)].held = True
                    mine[id(p)].steps += steps
                    mine[id(p)].rate = max(mine[id(p)].rate, rate)
                else:
                    self.strange.add(id(p))


class Seen(Fact):
    """What is known of one parameter, `tensor`, and how it comes to be known."""

    def __init__(self, tensor: nn.Parameter, name: str, adapter: str | None, part: str) -> None:
        super().__init__(name, adapter, part, _dtype(tensor))
        self.tensor, self.shape, self.first = tensor, tensor.shape, fingerprint(tensor)
        self.met = False  # by a hook
        self.worst: tuple[Tensor, Tensor] | None = None  # of all gradients, the largest |g| without and with NaN

    def follow(self) -> None:
        """Begin again with a tensor that has been cast, or spread, in its place."""
        if (self.dtype, self.shape) != (_dtype(self.tensor), self.tensor.shape):
            self.dtype, self.shape, self.first = _dtype(self.tensor), self.tensor.shape, fingerprint(self.tensor)

    def meet(self, grad: Tensor) -> None:
        """A gradient comes, before it is added to others."""
        self.met = True
        self.look(grad)

    @torch.no_grad()
    def look(self, grad: Tensor) -> None:
        """Keep the largest |g| in mind."""
        size = _largest(grad)
        known, worst = (t.to(size.device) for t in self.worst or (size, size))
        self.worst = torch.fmax(known, size), torch.maximum(worst, size)

    def settle(self) -> None:
        """What follows from all that."""
        now = fingerprint(self.tensor)
        self.trained |= self.tensor.requires_grad or self.met
        if self.worst is not None:
            self.gradient, worst = (float(t) for t in self.worst)
            self.finite_gradient = math.isfinite(worst)
        if now is not None and self.first is not None:
            self.changed = not torch.equal(now.cpu(), self.first.cpu())
        if now is not None and (self.trained or self.adapter is not None) and self.tensor.is_floating_point():
            self.finite = math.isfinite(float(_largest(self.tensor)))


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor | None:
    """64 sums of a tensor's bits, eight bytes at a time, and the rest of them; a short one's bits as they are.

    None where this process has no numbers of it.
    """
    here = _here(tensor)
    if here.is_meta:
        return None
    if hasattr(here, "__tensor_flatten__"):  # a quantised weight, in parts
        parts = [fingerprint(getattr(here, name)) for name in here.__tensor_flatten__()[0]]
        return torch.cat([part for part in parts if part is not None])
    bits = here.as_subclass(Tensor).contiguous().reshape(-1).view(torch.uint8)
    whole = bits.numel() // (8 * LANES) * 8 * LANES
    head = bits[:whole] if bits.storage_offset() % 8 == 0 else bits[:whole].clone()
    sums = head.view(torch.int64).view(-1, LANES).sum(0)
    return torch.cat([sums.view(torch.uint8), bits[whole:]])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _here(tensor: Any) -> Tensor:
    """This process's part of a tensor."""
    held = getattr(tensor, "ds_tensor", tensor) if is_zero(tensor) else tensor.to_local() if is_mesh(tensor) else tensor
    return held.detach()


def _largest(tensor: Tensor) -> Tensor:
    """max |t| on the tensor's device; NaN if one of its numbers is."""
    here = _here(tensor)
    here = here.coalesce().values() if here.is_sparse else here
    return torch.linalg.vector_norm(here, math.inf) if here.numel() else here.new_zeros((), dtype=torch.float32)


def _owners(model: nn.Module) -> dict[int, tuple[str, str]]:
    """id of a parameter -> (the adapter, the part of it that it belongs to)."""
    found: dict[int, tuple[str, str]] = {}
    for path, host in tuner_layers(model):
        part = LAYERS if isinstance(host, BaseTunerLayer | SharedTensors) else path
        active = host.active_adapters
        for name in sorted(host._get_available_adapters(), key=lambda n: n not in active):
            for p in host.adapter_parameters(name):
                found.setdefault(id(p), (name, part))
    for p in model.parameters():
        if p.requires_grad and laid_into(p):  # FSDP1 has laid what is trained into one
            found[id(p)] = next(iter(sorted(State.of(model).active)), ""), LAYERS
    return found


def _join(facts: list[Seen]) -> None:
    """Let each process know what all of them do, where tensors are spread over them."""
    if not any(is_spread(f.tensor) for f in facts) or not torch.distributed.is_initialized():
        return
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, [(f.gradient, f.changed, f.finite_gradient, f.finite) for f in facts])
    for f, each in zip(facts, zip(*told, strict=True), strict=True):
        gradients, changes, *finite = zip(*each, strict=True)
        f.gradient = max((g for g in gradients if g is not None), default=None)
        f.changed = any(changes) if any(c is not None for c in changes) else None
        f.finite_gradient, f.finite = map(all, finite)


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()
