"""The configuration of AdaLoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import describe
from ...errors import PeftWarning, report
from ...target_config import number, rank
from ...types import PeftType
from ..lora.config import LoraConfig


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: a low-rank update in the form of a singular value decomposition, whose ranks training shares out.

    Of LoRA's fields `r` and `use_rslora` have no effect; `lora_bias` and `loftq_config` are refused.
    """

    target_r: int = field(default=8, metadata=describe("The mean rank at the end."))
    init_r: int = field(default=12, metadata=describe("The rank of every layer at the start."))
    tinit: int = field(default=0, metadata=describe("Steps before ranks are cut."))
    tfinal: int = field(default=0, metadata=describe("Steps at the end with the ranks as they are."))
    deltaT: int = field(default=1, metadata=describe("Steps from one cut to the next."))
    beta1: float = field(default=0.85, metadata=describe("Smoothing of the importance, in (0, 1)."))
    beta2: float = field(default=0.85, metadata=describe("Smoothing of its uncertainty, in (0, 1)."))
    orth_reg_weight: float = field(
        default=0.5, metadata=describe("Weight of the term that keeps the factors orthogonal.")
    )
    total_step: int | None = field(default=None, metadata=describe("Steps of the whole training; required."))
    rank_pattern: dict | None = field(
        default=None, metadata=describe("What was kept: {path of lora_E: a bool for each rank}; set by training.")
    )

    other_biases: ClassVar[tuple[str, ...]] = ("adalora_only",)
    rank_name = "init_r"

    def __post_init__(self) -> None:
        pattern, self.rank_pattern = self.rank_pattern, None
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        self.rank_pattern = pattern
        self._check_unused()
        self._check_schedule()

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The other library's AdaLoRA passes over `alpha_pattern`, so that its files are trained without."""
        if kwargs.get("alpha_pattern") and str(kwargs.get("peft_version")).startswith("0"):
            text = (
                f"alpha_pattern={kwargs['alpha_pattern']} is left out: the library that saved this AdaLoRA adapter "
                "has trained it without."
            )
            report(PeftWarning, text, strict=False, stacklevel=5)
            kwargs["alpha_pattern"] = {}
        return super().check_kwargs(**kwargs)

    def alpha_for(self, r: int) -> int:
        """Twice the first rank; use_rslora has no effect."""
        return 2 * r

    def scaling_for(self, alpha: float, r: int) -> float:
        """What the update is multiplied by; the first rank counts where alpha is none."""
        return alpha / r if alpha > 0 else 1.0

    def _check_unused(self) -> None:
        """Refuse, or tell, what AdaLoRA has no use for."""
        refused = {"lora_bias": "The update has no bias."}
        for name, reason in refused.items():
            if getattr(self, name):
                raise ValueError(f"{name}=True cannot be used with AdaLoRA. {reason} Leave it out.")
        if self.loftq_config:
            raise ValueError("ADALORA does not support LOFTQ. Leave loftq_config out.")
        unused = {
            "r": (8, "init_r sets the first rank and target_r the last"),
            "use_rslora": (False, "the update is scaled by lora_alpha / init_r"),
        }
        for name, (default, reason) in unused.items():
            if getattr(self, name) != default:
                text = f"{name}={getattr(self, name)} has no effect on AdaLoRA: {reason}."
                report(PeftWarning, text, strict=False, stacklevel=5)
        if not isinstance(self.init_lora_weights, bool):
            text = f"init_lora_weights={self.init_lora_weights!r} has no meaning for AdaLoRA, which starts as for True."
            report(PeftWarning, text, strict=False, stacklevel=5)

    def _check_schedule(self) -> None:
        for name in ("target_r", "init_r", "deltaT"):
            rank(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must lie between 0 and 1; got {getattr(self, name)}.")
        number("orth_reg_weight", self.orth_reg_weight)
        if self.orth_reg_weight < 0:
            raise ValueError(f"`orth_reg_weight` must not be negative; got {self.orth_reg_weight}.")
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(f"AdaLoRA needs `total_step`, the number of training steps; got {self.total_step}.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of the total_step={self.total_step} steps to "
                "share out ranks. Decrease them, or increase total_step."
            )

    def budget(self, t: int, first: int, last: int) -> tuple[int, bool]:
        """How many ranks the whole model has at step t, and whether they are cut then.

        Arguments:
            t: the step, from 1.
            first: all ranks at the start.
            last: all ranks at the end.
        """
        end = int(self.total_step or 0) - self.tfinal
        if t <= self.tinit:
            return first, False
        if t > end:
            return last, True
        left = 1 - (t - self.tinit) / (end - self.tinit)
        return int((first - last) * left**3 + last), t % self.deltaT == 0


def kept(config: Any, path: str) -> int | None:
    """The rank that a configuration's `rank_pattern` has left a module, or None if it says nothing of it."""
    for key, flags in (config.rank_pattern or {}).items():
        if key == f"{path}.lora_E" or key.startswith(f"{path}.lora_E."):
            return int(sum(flags))
    return None
