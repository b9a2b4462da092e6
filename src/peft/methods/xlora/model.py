"""X-LoRA over the whole model: it loads the experts, shows the gate the model's hidden states, and mixes."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config import PeftConfig
from ...core.checkpoint import load_peft_weights, open_adapter, set_peft_model_state_dict
from ...core.defaults import SAFETENSORS_WEIGHTS_NAME
from ...core.files import in_hand
from ...core.layer import BaseTunerLayer, tuner_layers
from ...core.past import past_in
from ...core.plan import Plan, Target
from ...errors import PeftWarning, report
from ..lora.method import LoRA
from ..lora.model import LoraModel
from .classifier import XLoraClassifier
from .layer import Gated, Scalings

GATE = "internal_xlora_classifier"
KEPT = 8  # forward passes whose parts may be computed again (gradient checkpointing)
_GATED = Gated()


class Look:
    """Stands before the model's forward: runs the scaling pass, and keeps what the gate makes of it in the call.

    Arguments:
        tuner: the XLoraModel.
    """

    def __init__(self, tuner: Any):
        self.tuner, self.recent = tuner, deque(maxlen=KEPT)  # type: tuple[Any, deque[Scalings]]
        self.inside, self.start = False, 0

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        call, gate = self.tuner.call, self.tuner.gate
        if self.inside or gate is None or not self.tuner._mixes():
            return None
        if kwargs.get("use_cache") and past_in(kwargs) is not None:
            raise ValueError(
                "X-LoRA reads the whole text in each forward, so it works without a cache: use_cache=False."
            )
        kwargs = {**kwargs, "use_cache": False} if "use_cache" in kwargs else kwargs
        self._set(gate, float(gate.config.scaling_pass_value))
        self.inside = True
        try:
            with torch.no_grad():
                hidden = last_hidden(self.tuner.model, args, kwargs)
        finally:
            self.inside = False
        self.start = call.begin()
        self._set(gate, gate(hidden))
        return args, kwargs

    def _set(self, gate: Any, values: Tensor | float) -> None:
        self.recent.append(Scalings(gate, values))
        self.tuner.call.gates = weakref.ref(self.recent[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recent": deque(maxlen=KEPT)}

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Keep what was found for parts of the forward that are computed again in the backward pass."""
        if not self.inside and self.tuner.call.gates is not None:
            self.tuner.call.remember(self.start)
            self.tuner.call.gates = None


class XLoraModel(LoraModel):
    """A model with LoRA experts and a gate that mixes them for each token.

    Attributes:
        lora_model: the tuner that holds the experts, which is this one.
    """

    leads = True
    unmergeable = (
        "it mixes its experts anew for each token, so no weight can hold it. Merge one of the experts (folders that "
        "`adapters` of its configuration names), or load it on the base model."
    )
    generating: ClassVar[dict[str, Any]] = {"use_cache": False}

    @classmethod
    def method_of(cls, settings: Any) -> Any:
        """The mixing, or that of an expert."""
        return _GATED if settings.peft_type == "XLORA" else super().method_of(settings)

    @property
    def lora_model(self) -> XLoraModel:
        """The tuner of the experts."""
        return self

    @property
    def gate(self) -> Any:
        """The gate, or None once its adapter is deleted."""
        found = self._modules.get(GATE)
        return found if found is not None and "layers" in found._modules else None

    @property
    def xlora_config(self) -> Any:
        """The configuration of the X-LoRA adapter."""
        return self.gate.config

    # ---- building ----------------------------------------------------------------------------------------------

    def match(self, model: nn.Module, config: Any, adapter_name: str, state_dict: Any = None) -> Any:
        """The gate acts where the experts do."""
        if config.peft_type != "XLORA":
            return super().match(model, config, adapter_name, state_dict)
        plan, wanted = Plan(config), set(config.adapters)
        plan.targets = [
            Target(path, layer, layer.parameter_name, "adapters")
            for path, layer in tuner_layers(model)
            if isinstance(layer, BaseTunerLayer) and wanted & set(layer.adapters)
        ]
        return plan

    def before_layers(self, model: Any, name: str, autocast: bool, undo: list[Callable[[], Any]]) -> None:
        """Load the experts of a gate."""
        config: Any = self.peft_config[name]
        if config.peft_type == "XLORA":
            self._check(model, config)
            for expert, path in config.adapters.items():
                self._load(model, expert, _found(config, expert, path), autocast, undo)

    def _check(self, model: Any, config: Any) -> None:
        if self.gate is not None:
            raise ValueError("The model has an X-LoRA adapter already, and can have one. Delete that first.")
        if not config.adapters:
            raise ValueError("XLoraConfig.adapters names no expert. Give {name: folder of a LoRA adapter}.")
        own = getattr(model, "config", None)
        if getattr(own, "use_cache", False):
            raise ValueError(
                "X-LoRA reads the whole text in each forward, so it works without a cache. Set "
                "`model.config.use_cache = False` first."
            )
        size = getattr(own, "hidden_size", config.hidden_size)
        if size != config.hidden_size:
            raise ValueError(f"hidden_size={config.hidden_size}, but the model's hidden states have {size}. Give that.")
        config.__dict__["numbers"] = {}

    def _load(self, model: Any, name: str, path: str, autocast: bool, undo: list[Callable[[], Any]]) -> None:
        """Load an expert, frozen."""
        if name in self.peft_config:
            raise ValueError(f"The expert {name!r} has the name of another adapter. Name it otherwise.")
        config: Any = PeftConfig.from_pretrained(path)
        if config.peft_type != "LORA" or type(LoraModel.method_of(config)) is not LoRA or config.lora_bias:
            raise ValueError(
                f"The expert {name!r} ({path}) is no plain LoRA: DoRA, lora_bias and the like cannot be mixed token by "
                "token. Convert it with peft.convert_to_lora first."
            )
        config.inference_mode = True
        self.peft_config[name] = config
        steps: list[Callable[[], Any]] = [partial(self.peft_config.pop, name, None)]
        try:
            state = load_peft_weights(path)
            with in_hand(list(state)):
                more: list[Callable[[], Any]] = []
                self.inject_adapter(model, name, autocast, True, None, more)
            steps += more
            state = {key.removeprefix("base_model."): value for key, value in state.items()}
            set_peft_model_state_dict(self, state, name, low_cpu_mem_usage=True)
        except BaseException:
            for step in reversed(steps):
                step()
            raise
        undo += steps

    def after_layers(self, model: Any, name: str, meta: bool, undo: list[Callable[[], Any]]) -> None:
        """Open the gate where the experts are."""
        config: Any = self.peft_config[name]
        if config.peft_type != "XLORA":
            return
        layers = [layer for _, layer in tuner_layers(model) if name in getattr(layer, "adapters", {})]
        weight = layers[0].view.sample(layers[0].get_base_layer())
        device = torch.device("meta") if meta else weight.device
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        gate = XLoraClassifier(name, config, len(layers), device=device, dtype=dtype)
        gate.set_requires_grad(name, False)
        look = Look(self)
        hooks = [model.register_forward_pre_hook(look, with_kwargs=True)]
        hooks.append(model.register_forward_hook(look.after, always_call=True))
        self.hooks.extend(hooks)
        undo += [h.remove for h in hooks]
        before = self._modules.get(GATE)
        self._modules[GATE] = gate
        undo.append(partial(self._modules.__setitem__, GATE, before))
        self.__dict__["routed"] = layers

    # ---- state -------------------------------------------------------------------------------------------------

    def _mixes(self) -> bool:
        """Whether this forward uses the gate."""
        names, layers = self.call.names, self.routed
        if layers[0].disable_adapters:
            return False
        return self.gate.name in (self.active_adapters if names is None else names)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """As for any tuner; with the gate its experts are trained too, if they are to be."""
        super().set_adapter(adapter_name, inference_mode)
        gate = self.gate
        if gate is not None and gate.name in self.active_adapters and gate.config.use_trainable_adapters:
            self.set_requires_grad(list(gate.config.adapters), not inference_mode)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """As for any tuner. The gate cannot be merged; its experts are instead, each in full, as the peer does it."""
        gate, names = self.gate, kwargs.get("adapter_names", args[2] if len(args) > 2 else None)
        if gate is not None and gate.name in (self.active_adapters if names is None else names):
            text = (
                f"The gate of {gate.name!r} mixes the experts anew for each token, which no weight can hold. The "
                f"experts {list(gate.config.adapters)} are merged in full and without it, so the output changes."
            )
            report(PeftWarning, text, stacklevel=4)
            self.set_adapter(list(gate.config.adapters))
        return super().merge_and_unload(*args, **kwargs)

    # ---- the gate's settings and output ------------------------------------------------------------------------

    def set_topk_lora(self, value: int | None) -> None:
        """Use only the experts with the k largest scalings for each token; None uses all."""
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiply the experts' updates by this."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """What the experts' updates are multiplied by."""
        return float(self.xlora_config.global_scaling_weight)

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Scale all experts so in the pass that the gate looks at; None: by one over their number."""
        self.xlora_config.scaling_pass_value = 1 / len(self.xlora_config.adapters) if value is None else value

    def get_latest_scalings(self) -> Tensor | None:
        """The scalings of the last forward, (samples, tokens, layers, experts)."""
        return self.gate.latest

    def get_scalings_log(self) -> list[Tensor]:
        """The scalings of all forwards since logging was enabled."""
        return list(self.gate.log_scalings)

    def enable_scalings_logging(self) -> None:
        """Keep the scalings of every forward."""
        self.gate.logged = True

    def disable_scalings_logging(self) -> None:
        """Stop keeping them; those that are kept stay."""
        self.gate.logged = False

    def clear_scalings_log(self) -> None:
        """Forget the kept scalings."""
        self.gate.log_scalings.clear()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The kept scalings by the length of the text: {tokens: (numbers of the forwards, their scalings)}."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for k, scalings in enumerate(self.gate.log_scalings):
            numbers, tensors = found.setdefault(scalings.shape[1], ([], []))
            numbers.append(k)
            tensors.append(scalings)
        return found


def last_hidden(model: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The last hidden states of a model, from below its head where it has one of transformers' kind."""
    body = getattr(model, "base_model", model)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep")}
    found = body(*args, **{**kwargs, "return_dict": True}) if body is not model else None
    if getattr(found, "last_hidden_state", None) is None:
        kwargs.update(output_hidden_states=True, return_dict=True)
        return model(*args, **kwargs).hidden_states[-1]
    return found.last_hidden_state  # type: ignore[union-attr]


def _found(config: Any, name: str, path: str) -> str:
    """Where an expert lies: a trained one beside the gate; another at `path`, perhaps relative to the gate's folder."""
    origin = config.__dict__.get("origin")
    beside = [] if origin is None else [os.path.join(origin, name)] * config.use_trainable_adapters
    for folder in beside:
        weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if os.path.exists(weights) and any(".lora_" in key for key in open_adapter(folder).outline):
            return folder
    near = "" if origin is None else os.path.join(origin, path)
    return near if near and not os.path.exists(path) and os.path.isdir(near) else path
