"""The tuner of adaption prompts."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from ...core.layer import tuner_layers
from ...core.place import Injection
from ...core.tie import places
from ...core.tuner import BaseTuner
from ...core.walking import model_type
from ...errors import listing
from .layer import AdaptedAttention, AdaptedAttentionGPT

TARGETS = {
    "llama": ("self_attn", AdaptedAttention),
    "mistral": ("self_attn", AdaptedAttention),
    "gpt2": ("attn", AdaptedAttentionGPT),
}


class Prompts(Injection):
    """Puts a prompt beside the attention of the last `adapter_layers` layers."""

    def run(self, state_dict: Any = None) -> None:
        paths, kind = self._attention()
        self.places = places(self.model)
        if not any(True for _ in tuner_layers(self.model)):
            self._freeze()
        for path in paths:
            parent, leaf, found = self.get(path)
            if not isinstance(found, AdaptedAttention):
                self.put(parent, leaf, kind(found, self.tuner.call, path), found)
                self.tuner.targeted_module_names.append(path)
            layer = self.get(path)[2]
            layer.add(self.name, self.config.adapter_len, self.meta)
            self.undo.append(partial(layer.delete_adapter, self.name))
        self.whole_modules(self.config.modules_to_save or ())

    def _attention(self) -> tuple[list[str], type[AdaptedAttention]]:
        """The paths of the attention modules that get a prompt, and the class that stands there."""
        model, config, family = self.model, self.config, model_type(self.model)
        if family not in TARGETS:
            raise ValueError(
                f"Adaption prompts are for the model types {listing(TARGETS)}, but this model is {family!r}. Use "
                "another method, such as prefix tuning."
            )
        for name in ("adapter_len", "adapter_layers"):
            if getattr(config, name) is None:
                raise ValueError(f"{name} is not set. Give a whole number in AdaptionPromptConfig.")
        usual, kind = TARGETS[family]
        if config.target_modules is None:
            config.target_modules = usual
        found = [path for path, _ in model.named_modules() if path.endswith(f".{config.target_modules}")]
        if config.adapter_layers > len(found):
            raise ValueError(
                f"adapter_layers={config.adapter_layers} is more than the {len(found)} modules named "
                f"{config.target_modules!r} of this model. Use at most that; the usual name here is {usual!r}."
            )
        return found[-config.adapter_layers :], kind


class AdaptionPromptModel(BaseTuner):
    """Adaption prompts on a model of the Llama, Mistral or GPT-2 family.

    Source: Zhang et al. 2023, arXiv 2303.16199.
    """

    prefix = "adaption_"
    injection: ClassVar[type[Injection]] = Prompts
