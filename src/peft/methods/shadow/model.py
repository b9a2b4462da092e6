"""Shadow over the whole model: a small model reads the text first, and its states run beside those of the blocks.

Definition: that of the original library, whose files need it; it cites no paper.
"""

from __future__ import annotations

import copy as copying
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.draw import check_numbers, usual_defaults
from ...core.layer import BaseTunerLayer, tuner_layers
from ...core.past import past_in, past_of
from ...core.shared import shared_of
from ...core.tuner import BaseTuner
from .backbone import Beside, DetachedShadowModel, body, head_of, made, own_loss, shares, states
from .layers import Following, ShadowLayer, Trail

CHANGES = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")  # of a cache


class Look:
    """Stands before the model's forward and starts the shadow; behind it, it adds the shadow's own loss.

    Arguments:
        tuner: the ShadowModel.
    """

    def __init__(self, tuner: Any):
        self.tuner, self.trail = tuner, None  # type: tuple[Any, Trail | None]
        self.known: Any = None  # caches of the base -> those of the shadow
        self.cache: Any = None

    @property
    def caches(self) -> Any:
        """The shadow's cache beside each of the base model's, for as long as that lives."""
        if self.known is None:
            self.known = weakref.WeakKeyDictionary()
        return self.known

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trail": None, "cache": None, "known": None}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tuner, names = self.tuner, self.tuner._running()
        self.trail = None
        if not names:
            return None
        kwargs = {**({"input_ids": args[0]} if args else {}), **kwargs}  # as every model of transformers has it
        model, self.cache = tuner.model, self._cache(kwargs, tuner.model, names)
        first = {}
        for name in names:
            embeddings = model.get_input_embeddings() if shares(model, tuner.peft_config[name]) else None
            parts = (tuner.shadow_backbone[name], tuner.shadow_projection[name], embeddings)
            own = {**kwargs, "use_cache": name in self.cache}
            first[name] = states(*parts, own, self.cache.get(name))
        self.trail = Trail(first)
        tuner.call.gates = weakref.ref(self.trail)
        return args[:1], {k: v for k, v in kwargs.items() if not (args and k == "input_ids")}

    def _cache(self, kwargs: dict[str, Any], model: Any, names: list[str]) -> dict[str, Any]:
        """The shadows' caches beside that of the base model; none where nothing is cached."""
        past, wanted = past_in(kwargs), kwargs.get("use_cache")
        wanted = getattr(model.config, "use_cache", False) if wanted is None else wanted
        if past is None:
            cached = wanted and not model.training and not torch.compiler.is_compiling()
            return {name: _new() for name in names} if cached else {}
        found = self.caches.get(past, {})
        if any(name not in found for name in names):
            if past.get_seq_length():
                raise ValueError(
                    "The cache was filled without the shadow, which has one beside it. Start with an empty cache, or "
                    "pass use_cache=False and the whole text."
                )
            found = {name: _new() for name in names}
            self._pair(past, found)
        return found

    def _pair(self, past: Any, own: dict[str, Any]) -> None:
        self.caches[past] = own
        for change in CHANGES:
            if hasattr(past, change):
                before = getattr(past, change)
                setattr(past, change, Both(getattr(before, "one", before), [getattr(c, change) for c in own.values()]))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Pair the caches, and add the loss of the shadow's own answer."""
        self.tuner.call.gates = None
        if self.trail is None or output is None:
            return None
        past = past_of(output)
        if self.cache and past is not None and past not in self.caches:
            self._pair(past, self.cache)
        labels, loss = kwargs.get("labels"), getattr(output, "loss", None)
        if labels is not None and loss is not None:
            self._add_loss(output, labels, kwargs.get("attention_mask"))
        return output

    def _add_loss(self, output: Any, labels: Tensor, mask: Tensor | None) -> None:
        tuner, total = self.tuner, None
        for name in self.trail.first if self.trail is not None else ():
            weight, own = tuner.peft_config[name].auxiliary_loss_weight, tuner._own_loss(name, labels, mask)
            if own is not None and weight:
                output.loss = output.loss + weight * own.to(output.loss.device)
                total = own.detach() if total is None else total + own.detach()
        if total is not None:
            output.shadow_loss = total


class Both:
    """A method of a cache that is called for those beside it too."""

    def __init__(self, one: Any, others: list[Any]):
        self.one, self.others = one, others

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for other in self.others:
            other(*args, **kwargs)
        return self.one(*args, **kwargs)


def _new() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


class ShadowModel(BaseTuner):
    """Shadows on a model."""

    prefix = "shadow_"
    leads = True
    unmergeable = "a model of its own runs beside the base, so no weight can hold it. Load it on the base model."
    uses_shared_state = True
    layer_classes: ClassVar[dict[str, type[BaseTunerLayer]]] = {"Module": ShadowLayer}
    method: ClassVar[Following] = Following()

    # ---- building ----------------------------------------------------------------------------------------------

    def match(self, model: nn.Module, config: Any, adapter_name: str, state_dict: Any = None) -> Any:
        """Where nothing is named, all blocks of the model's list of blocks."""
        if getattr(model, "config", None) is None or not hasattr(model.config, "hidden_size"):
            raise ValueError(
                f"Shadow mirrors a model of transformers, but {type(model).__name__} has no configuration that says "
                "its sizes. Use a method that adapts layers, such as LoRA."
            )
        config.__dict__["width"] = model.config.hidden_size
        if config.target_modules is None:
            path, blocks = _blocks(model)
            wanted = config.layers_to_transform
            wanted = range(len(blocks)) if wanted is None else [wanted] if isinstance(wanted, int) else wanted
            config.target_modules = {f"{path}.{k}" for k in wanted}
        return super().match(model, config, adapter_name, state_dict)

    def after_layers(self, model: Any, name: str, meta: bool, undo: list[Callable[[], Any]]) -> None:
        """Put the small model beside the blocks."""
        config: Any = self.peft_config[name]
        if config.peft_type != "SHADOW":
            return
        layer = next(m for _, m in tuner_layers(model) if name in getattr(m, "adapters", {}))
        weight = layer.shadow_down[name].weight
        device = layer.original_weight_device()
        with torch.random.fork_rng(devices=[], enabled=meta), usual_defaults():
            backbone: Any = made(model, config)
            size, width = backbone.config.hidden_size, model.config.hidden_size
            projection = nn.Identity() if size == width else nn.Linear(size, width, bias=False)
        parts = {"shadow_backbone": backbone, "shadow_projection": projection}
        head = head_of(model)[1] if config.task_type == "SEQ_CLS" else None
        if head is not None:
            parts["shadow_head"] = copying.deepcopy(getattr(head, "original_module", head))
        for key, module in parts.items():
            if device.type != "meta":
                check_numbers(module, path=f"the adapter {name!r}")
            if any(p.device != device or p.dtype is not weight.dtype for p in module.parameters()):
                module.to(device if device.type != "meta" else None, weight.dtype)
            if meta or device.type == "meta":
                _without_numbers(module)
            if key not in self._modules:
                self._modules[key] = Beside()
                undo.append(partial(self._modules.pop, key))
            home: Any = self._modules[key]
            home.put(name, module.train(model.training))
            undo.append(partial(home.delete_adapter, name))
        if "look" not in self.__dict__:
            self._watch(model, undo)

    def _watch(self, model: Any, done: list[Callable[[], Any]]) -> None:
        look = self.__dict__["look"] = Look(self)
        self.hooks.append(model.register_forward_pre_hook(look, with_kwargs=True))
        self.hooks.append(model.register_forward_hook(look.after, with_kwargs=True, always_call=True))
        done.append(self._look_away)

    def _look_away(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        self.__dict__.pop("look", None)

    def unload(self) -> nn.Module:
        """The base model without any trace of adapters."""
        self._look_away()
        return super().unload()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: no sum of shadows is a shadow."""
        raise NotImplementedError(
            "Shadows depend on the input and cannot be summed up. Train one, or switch with set_adapter."
        )

    # ---- running -----------------------------------------------------------------------------------------------

    def _running(self) -> list[str]:
        """The shadows that this forward uses."""
        home: Any = self._modules.get("shadow_backbone")
        layer = next((m for _, m in tuner_layers(self.model) if isinstance(m, ShadowLayer)), None)
        if home is None or layer is None or layer.disable_adapters:
            return []
        return [n for n in dict.fromkeys(self.call.names or self.active_adapters) if n in home]

    def _head(self, name: str) -> Any:
        home: Any = self._modules.get("shadow_head")
        if home is not None and name in home:
            return home[name]
        model: Any = self.model
        return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def shadow_auxiliary_loss(self, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """The loss of what the shadow of the last forward would answer by itself; None if there is none."""
        look = self.__dict__.get("look")
        name = next(iter(self._running()), None)
        return (
            None if look is None or look.trail is None or name is None else self._own_loss(name, labels, attention_mask)
        )

    def _own_loss(self, name: str, labels: Tensor, mask: Tensor | None) -> Tensor | None:
        head, first = self._head(name), self.look.trail.first[name]
        if head is None:
            return None
        return own_loss(head(first.to(next(head.parameters()).dtype)), labels, self.peft_config[name].task_type, mask)

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> nn.Module:
        """The small model on its own, with embeddings and head of the base model where it uses these.

        Arguments:
            adapter_name: whose; the active one if not given.
            copy: of its parts; else they are shared with this model.
        """
        names = [n for key, home in shared_of(self) if key == "shadow_backbone" for n in home._get_available_adapters()]
        name = adapter_name or next(iter([*self._running(), *names]), "")
        if name not in names:
            raise ValueError(f"There is no shadow {name!r}. The model has {sorted(names)}.")
        model: Any = self.model
        embeddings = model.get_input_embeddings() if shares(model, self.peft_config[name]) else None
        parts = [self.shadow_backbone[name], self.shadow_projection[name], self._head(name), embeddings]
        parts = [copying.deepcopy(part) for part in parts] if copy or embeddings is not None else parts
        return DetachedShadowModel(*parts)


def _blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """(path, list) of the model's blocks: the first list of as many modules as the configuration has layers."""
    count, inside = model.config.num_hidden_layers, body(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and inside is not None:
            return path, module
    raise ValueError(
        f"No list of {count} blocks was found in this {type(model).__name__}. Name the blocks in target_modules."
    )


def _without_numbers(module: nn.Module) -> None:
    """Put the parameters on the meta device; buffers, which files do not hold, stay."""
    for part in module.modules():
        for key, p in part._parameters.items():
            if p is not None:
                part._parameters[key] = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
