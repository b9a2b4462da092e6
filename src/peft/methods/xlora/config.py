"""The configuration of X-LoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ...config import PeftConfig, describe
from ...target_config import number, probability, rank
from ...types import PeftType


@dataclass
class XLoraConfig(PeftConfig):
    """The configuration of X-LoRA: the experts, and the gate that mixes them."""

    hidden_size: int = field(default=None, metadata=describe("Size of the model's hidden states."))  # type: ignore
    adapters: dict[str, str] = field(
        default=None,  # type: ignore[arg-type]
        metadata=describe("The experts: {name: folder or repository of a LoRA adapter}."),
    )
    enable_softmax: bool = field(default=True, metadata=describe("The scalings of a token sum up to one."))
    enable_softmax_topk: bool = field(default=False, metadata=describe("So do those that top_k_lora leaves."))
    layerwise_scalings: bool = field(default=False, metadata=describe("Each layer has scalings of its own."))
    xlora_depth: int = field(default=1, metadata=describe("Linear layers of the gate."))
    xlora_size: int = field(default=2048, metadata=describe("Size of the gate's inner layers."))
    xlora_dropout_p: float = field(default=0.2, metadata=describe("Dropout between the gate's layers, in [0, 1)."))
    use_trainable_adapters: bool = field(default=False, metadata=describe("Train the experts as well."))
    softmax_temperature: float = field(default=1.0, metadata=describe("Divides the gate's output."))
    top_k_lora: int | None = field(default=None, metadata=describe("How many experts a token has; all if not set."))
    scaling_pass_value: float = field(
        default=0.0, metadata=describe("Scaling of all experts in the pass that the gate looks at; 0 is the base.")
    )
    global_scaling_weight: float = field(default=1.0, metadata=describe("Multiplies the experts' updates."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.XLORA
        if self.hidden_size is None:
            _say("No value was provided for `hidden_size`. This will be set to 4096 by default: give the model's own.")
            self.hidden_size = 4096
        if self.adapters is None:
            _say("No value was provided for `adapters`. Without experts there is nothing to mix.")
            self.adapters = {}
        rank("hidden_size", self.hidden_size)
        rank("xlora_size", self.xlora_size)
        if self.xlora_depth < 1:
            raise ValueError(f"X-LoRA depth must be strictly positive, but xlora_depth={self.xlora_depth}. Use 1.")
        probability("xlora_dropout_p", self.xlora_dropout_p)
        for name in ("softmax_temperature", "scaling_pass_value", "global_scaling_weight"):
            number(name, getattr(self, name))
        if not self.softmax_temperature:
            raise ValueError("softmax_temperature=0 divides by zero. Use a small number for sharp choices.")
        self._check_choice()

    def _check_choice(self) -> None:
        if self.enable_softmax_topk and self.top_k_lora is None:
            _say("`enable_softmax_topk` is set but `top_k_lora` is not, so all scalings go through both softmaxes.")
        if self.enable_softmax_topk and self.enable_softmax:
            _say("`enable_softmax_topk` and `enable_softmax` are both set: scalings go through two softmaxes.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            _say(f"`top_k_lora` value must be at least 1, but is {self.top_k_lora}: no expert is used.")


def _say(text: str) -> None:
    warnings.warn(text, stacklevel=4)
