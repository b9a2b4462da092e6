"""The shortest way of a forward: ids behind one prompt, without gradients, where nothing else has to be moved.

It does what `running` does, and leaves to it whatever is not quite ordinary. What an encoder makes is kept until a
tensor, a module, a hook or a setting that it comes from has changed; training makes it each time, and forgets it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ..core.kept import STEPS, Kept
from ..core.past import NAMES
from ..kernels.modes import PLAIN, transformed
from .encoder import MADE, BasePromptEncoder
from .padding import before_text

if TYPE_CHECKING:
    from .holder import Prompts

LAYERS = frozenset({nn.Embedding, nn.Linear, nn.ReLU, nn.Sequential, nn.LSTM})  # that read nothing but their tensors
ANYWHERE = (hooks._global_forward_hooks, hooks._global_forward_pre_hooks)
OTHERS = frozenset({"labels", "inputs_embeds", "decoder_inputs_embeds", "cache_position", *NAMES})
OTHERS |= {"position_ids", "token_type_ids", "adapter_names", "alora_offsets", "input_type_mask"}


class Made:
    """What an encoder has made; a copy of this is None.

    Arguments:
        encoder: whose modules are all known.
        value: what it made.
        facts: what it made that from beside its tensors.
    """

    def __init__(self, encoder: Any, value: Tensor, facts: tuple[Any, ...]):
        modules = list(encoder.modules())
        places: list[tuple[Any, str]] = [(encoder.__dict__, "rows"), (type(encoder).__dict__, "forward")]
        places.append((vars(STEPS), "taken"))
        places += [(encoder._modules, name) for name in encoder.network]
        for m in modules:
            places += [(m.__dict__, "training"), (m.__dict__, "forward")]
            places += [(held, key) for held in (m._modules, m._parameters, m._buffers) for key in held]
        self.value, self.facts, self.kept = value, facts, Kept(value, encoder, places)
        self.hooks = [*ANYWHERE, *(t for m in modules for t in (m._forward_hooks, m._forward_pre_hooks))]

    def __reduce__(self) -> Any:
        return type(None), ()


def straight(prompts: Prompts, given: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of the base model's forward, with the prompt in them; None where `running` has to see to it.

    Arguments:
        prompts: of the model.
        given: the arguments by name.
    """
    encoders: Any = prompts.encoders
    names, ids, mask = encoders._active, given.get("input_ids"), given.get("attention_mask")
    if len(names) != 1 or encoders._disabled or not prompts.alone or ids is None:
        return None
    if not prompts.call.plain:
        prompts.call.settle()
        if not prompts.call.plain:
            return None  # within a mixed batch
    encoder = encoders._modules[names[0]]
    k = encoder.num_virtual_tokens
    if encoder.caches or encoder.rows != k or prompts.survivor is not None or not OTHERS.isdisjoint(given):
        return None
    if prompts.further is not None:
        return None
    if not (mask is None or (type(mask) is Tensor and mask.dim() == 2)) or not _evaluates():
        return None
    if mask is not None and before_text(mask) is not None:
        return None
    made = _prompt(encoder, ids.shape[0], given.get("task_ids")) if ids.shape[0] else None
    if made is None:
        return None
    text = _words(prompts)(ids)
    out = {key: value for key, value in given.items() if value is not None}
    del out["input_ids"]
    out.pop("task_ids", None)
    out["inputs_embeds"] = torch.cat((made.to(text), text), 1)
    if mask is not None:
        out["attention_mask"] = torch.cat((mask.new_ones((mask.shape[0], k)), mask), 1)
    return out


def _evaluates() -> bool:
    """Whether tensors are numbers and nothing else: no gradients, no trace, no mode that looks on or changes dtypes."""
    c = torch._C
    if torch.is_grad_enabled() or transformed() or c._is_any_autocast_enabled() or c._get_tracing_state() is not None:
        return False
    return not (c._len_torch_dispatch_stack() or c._len_torch_function_stack())


def _words(prompts: Prompts) -> Any:
    """`prompts.words`, by the way to it, where transformers states that way and nothing else may."""
    model, (kind, path) = prompts.model, prompts.way
    if type(model) is not kind:
        kind, path = prompts.way = (type(model), _way(model, prompts.words))
    found: Any = model
    for name in path if "get_input_embeddings" not in model.__dict__ else ():
        found = found._modules.get(name)
        if found is None:  # it has been taken apart
            prompts.way = (None, ())
            break
    return prompts.words if found is None or found is model else found


def _way(model: nn.Module, words: nn.Module) -> tuple[str, ...]:
    """The names of the modules down to the embedding of words; none where the model must be asked each time."""
    path = next((tuple(name.split(".")) for name, m in model.named_modules() if m is words and m is not model), ())
    at: Any = model
    for name in path:
        stated = getattr(type(at), "get_input_embeddings", None)
        theirs = stated is None or str(getattr(stated, "__module__", "")).startswith("transformers.")
        if "get_input_embeddings" in at.__dict__ or not theirs:
            return ()
        at = at._modules[name]
    return path


def _prompt(encoder: Any, batch: int, task_ids: Any) -> Tensor | None:
    """The prompt of each sample, (batch, tokens, size); None for tasks that must be looked at first."""
    if not encoder.by_task:
        task_ids = None
    elif type(task_ids) is not Tensor or task_ids.dtype is not torch.int64 or task_ids.shape != (batch,):
        return None
    found: Made | None = encoder.__dict__.get(MADE)
    facts = encoder.facts(task_ids)
    if found is None or found.facts != facts or any(found.hooks) or not found.kept.holds(encoder):
        value = encoder.prompt(batch, task_ids)
        value = value if encoder.by_task else value[:1]
        if not _lasts(encoder):
            return value.expand(batch, -1, -1)
        found = encoder.__dict__[MADE] = Made(encoder, value, facts)
    return found.value.expand(batch, -1, -1) if len(found.value) != batch else found.value


def _lasts(encoder: BasePromptEncoder) -> bool:
    """Whether what is made now may serve later forwards."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several or not type(encoder).__dict__.get("lasts"):
        return False  # what is spread lends whole tensors to a forward, in the same memory each time
    for m in encoder.modules():
        if m.training or "forward" in m.__dict__ or (m is not encoder and type(m) not in LAYERS):
            return False
        tensors = [*m._parameters.values(), *m._buffers.values()]
        if m._forward_hooks or m._forward_pre_hooks or any(t is not None and not _plain(t) for t in tensors):
            return False
    return not any(ANYWHERE)


def _plain(t: Tensor) -> bool:
    return type(t) in PLAIN and not (t.is_meta or t.is_inference())
