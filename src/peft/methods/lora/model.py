"""The LoRA tuner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core.checkpoint import get_peft_model_state_dict
from ...core.method import Method
from ...core.tuner import BaseTuner
from ..additive import under_dora
from .alora import ALoRA
from .arrow import Arrow
from .bdlora import BDLoRA
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
