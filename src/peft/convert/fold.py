"""Writing an adapter that is no plain LoRA as one: on the base model, or from its tensors where these tell all."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..algebra.conversion import to_lora
from ..algebra.update import updates
from ..core.checkpoint import set_peft_model_state_dict
from ..core.files import in_hand
from ..errors import listing
from ..registry import tuner_class
from .base import load_base
from .format import Options, Report
from .part import ConversionError, Feature, Part
from .skeleton import Skeleton

NAME = "default"
SHARE = 1e-6  # an error worth telling


def fold(part: Part, component: str, reasons: list[Feature], options: Options, report: Report) -> Part:
    """The part as a plain LoRA.

    Arguments:
        part: the adapter.
        component: of which model.
        reasons: what makes this necessary.
        options: the base, where the update depends on it, and the rank, where the update has no low rank of its own.
        report: is told what was done, and how much was left out.
    """
    what = " and ".join(f.text for f in reasons)
    bad = [k for k, t in part.state.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise ConversionError(f"{what} cannot be written as a LoRA: {listing(bad, 4)} hold NaN or infinite values.")
    tuner = _loaded(part, _model(part, component, what, options), what)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is a LoRA already")
            new = to_lora(tuner, _rank(tuner, options), NAME)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConversionError(f"{what} cannot be written as a LoRA: {error}") from error
    ranks = sorted(set(new.report.ranks.values()))
    worst = max(new.report.errors.values(), default=0.0)
    left = f", which leaves out up to {worst:.2%} of a layer's update" if worst > SHARE else ""
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks from {ranks[0]} to {ranks[-1]}"
    report.folded.append(f"{what} written as a LoRA of {span}{left}")
    config = new.config
    config.inference_mode = True
    state = {k.removeprefix("model.").replace(f".{NAME}", ""): v for k, v in new.state.items()}
    return Part(config, state, part.noted)


class _Holder(nn.Module):
    """Gives a tuner the place that it has in a PeftModel, by which files name tensors."""

    def __init__(self, tuner: Any):
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config


def _loaded(part: Part, model: nn.Module, what: str) -> Any:
    config = part.config
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ConversionError(f"{what} changes no weights, so it cannot be written as a LoRA.")
    try:
        with warnings.catch_warnings(), in_hand(part.state):
            warnings.simplefilter("ignore")  # what matters is whether each tensor finds its place
            known = part.state if isinstance(model, Skeleton) else None
            tuner = tuner_class(config.peft_type)(model, config, NAME, state_dict=known, autocast_adapter_dtype=False)
            set_peft_model_state_dict(_Holder(tuner), part.state, NAME, strict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConversionError(f"The adapter does not fit the base model: {error}") from error
    return tuner.eval()


def _rank(tuner: Any, options: Options) -> float:
    """The rank that was asked for; else that of the known factors."""
    if options.rank is not None:
        return options.rank
    found = [u for (u,) in updates(tuner, {NAME: 1.0}).values()]
    dense = [u.p.path for u in found if u.factors is None]
    if dense:
        raise ConversionError(
            f"the updates of {listing(dense, 3)} have no low rank of their own. Give `rank`: a number, or the "
            "share of each update's squared norm to keep, such as 0.9999."
        )
    return max(u.factors.rank * u.form.groups for u in found if u.factors is not None) if found else 1


def _model(part: Part, component: str, what: str, options: Options) -> nn.Module:
    needs_base = part.method not in ("LORA", "LOHA", "LOKR") or what_depends(part)
    if options.base is not None:
        return load_base(options.base, component)
    if needs_base:
        raise ConversionError(
            f"{what} cannot be written as a LoRA without the base model, on which the update depends. Give `base`, the "
            "folder of the base model."
        )
    return Skeleton(part)


def what_depends(part: Part) -> bool:
    """Whether a LoRA's update depends on the base's weights, or on more than the file tells."""
    layers, others = part.split()
    init = str(getattr(part.config, "init_lora_weights", True))
    special = any(x.magnitude is not None or ".base_layer" in x.path for x in layers)
    return special or bool(others) or init not in ("True", "False", "None", "gaussian", "orthogonal", "mica", "eva")
