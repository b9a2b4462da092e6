"""The LoRA tuner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core.checkpoint import get_peft_model_state_dict
from ...core.layer import tuner_layers
from ...core.method import Method
from ...core.tuner import BaseTuner
from ..additive import under_dora
from . import corda, loraga
from .alora import ALoRA, Offsets
from .arrow import Arrow
from .bdlora import BDLoRA
from .calibration import at
from .init import DERIVED, FIRST
from .kasa import KaSA
from .layer import NAMES
from .loftq import LoftQ
from .method import LoRA, OutProjection
from .monteclora import MonteCLoRA
from .residual import joined
from .velora import VeLoRA
from .whole import Whole

_PLAIN, _LOFTQ, _OUT = LoRA(), LoftQ(), OutProjection()
_VARIANTS = {
    "alora_invocation_tokens": ALoRA(),
    "arrow_config": Arrow(),
    "use_bdlora": BDLoRA(),
    "kasa_config": KaSA(),
    "monteclora_config": MonteCLoRA(),
    "velora_config": VeLoRA(),
}


class LoraModel(BaseTuner):
    """LoRA adapters on a model.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    prefix = "lora_"
    layer_classes = NAMES
    companion = Whole

    @classmethod
    def method_of(cls, settings: Any) -> Method:
        chosen = next((m for field, m in _VARIANTS.items() if getattr(settings, field, None)), None)
        method = chosen or (_LOFTQ if settings.init_lora_weights == "loftq" else _PLAIN)
        return under_dora(method) if settings.use_dora else method

    @classmethod
    def out_projection_method_of(cls, settings: Any) -> Method:
        plain = cls.method_of(settings)
        return _OUT if plain is _PLAIN else plain

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._forget(adapter_name)
        if getattr(self.peft_config[adapter_name], "alora_invocation_tokens", None) and not self._offsets:
            look = Offsets(self)
            for module in (self, self.model):  # a task's class calls the tuner, generation the model; never both
                self._offsets.append(module.register_forward_pre_hook(look, with_kwargs=True))
                self._offsets.append(module.register_forward_hook(look.after))

    def unload(self) -> Any:
        self._look_away()
        return super().unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        model = super().merge_and_unload(*args, **kwargs)
        self._look_away()
        return model

    def subtract_mutated_init(
        self, output_state_dict: Mapping[str, Tensor], adapter_name: str, kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a plain LoRA that adds what training has changed: B A - B0 A0, of twice the rank.

        Arguments:
            output_state_dict: the trained adapter's tensors by checkpoint key.
            adapter_name: a loaded adapter with its first factors A0, B0.
            kwargs: `state_dict`: the model's tensors by live name, to be used instead of the live ones.

        Raises ValueError if there is no such adapter, or it does not fit the trained one.
        """
        given = (kwargs or {}).get("state_dict")
        given = given and {k.removeprefix("base_model."): v for k, v in given.items()}
        first = get_peft_model_state_dict(self, given, adapter_name, save_embedding_layers=False)
        return joined(output_state_dict, {f"base_model.{k}": v for k, v in first.items()})

    @property
    def _offsets(self) -> list[Any]:
        """The hooks on the model, if an adapter looks for tokens in its input."""
        return self.__dict__.setdefault("_hooks_on_model", [])

    def _look_away(self) -> None:
        while self._offsets:
            self._offsets.pop().remove()
        self.call.watched = False

    def _forget(self, name: str) -> None:
        """Delete what was measured for the adapter's first values, once all of them are made."""
        options = self.peft_config[name].corda_config if hasattr(self.peft_config[name], "corda_config") else None
        if options is not None and not options.prune_temporary_fields:
            return
        for _, layer in tuner_layers(self.model):
            p = getattr(layer, "adapters", {}).get(name)
            if p is not None and getattr(p, "subtracts", False) and (p.has(FIRST[0]) or p.has(DERIVED[0])):
                for measured in (corda.NAME, loraga.NAME):
                    at(p).drop(measured)
