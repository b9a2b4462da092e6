"""`python -m parity.quantised FOLDER ANSWERS`: LoRA on bitsandbytes' weights, what the installed library makes of it.

FOLDER holds an adapter for each kind of weight, or gets those that the library makes; ANSWERS is a file of tensors:
outputs in training and evaluation, gradients, what a merge leaves, and what unmerging gives back. Public names alone
are used, so any interpreter's `peft` can stand here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peft import LoraConfig, PeftModel, get_peft_model

WIDE, HIGH = 128, 192


def nf4(i: int, o: int, **settings: Any) -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(i, o, **{"quant_type": "nf4", "compress_statistics": True, **settings})


def fp4(i: int, o: int) -> nn.Module:
    return nf4(i, o, quant_type="fp4", compress_statistics=False)


def int8(i: int, o: int) -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False, threshold=6.0)


KINDS: dict[str, Callable[[int, int], nn.Module]] = {"nf4": nf4, "fp4": fp4, "int8": int8}
# of the configuration; the peer has no bias of LoRA's own that it merges rightly on these weights
FORMS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


class Net(nn.Module):
    """Two quantised layers."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = (self._quantised(kind, i, o) for i, o in ((WIDE, HIGH), (HIGH, WIDE)))
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = kind == "int8", kind != "int8"
        self.config: dict[str, Any] = {}

    @staticmethod
    def _quantised(kind: str, i: int, o: int) -> nn.Module:
        layer = KINDS[kind](i, o)
        layer.load_state_dict(nn.Linear(i, o).state_dict())
        return layer.to("cpu").requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def numbers(layer: Any) -> Tensor:
    """What a layer of bitsandbytes multiplies with."""
    import bitsandbytes.functional as functional

    held, state = layer.weight, getattr(layer, "state", None)
    if getattr(held, "quant_state", None) is not None:
        return functional.dequantize_4bit(held.data, held.quant_state)
    scale = held.SCB if getattr(held, "SCB", None) is not None else state.SCB
    return held.data.float() * (scale.float() / 127)[:, None]


def cases() -> Iterator[tuple[str, str, str]]:
    for kind in KINDS:
        for form in FORMS:
            yield f"{kind}-{form}", kind, form


def adapted(place: Path, kind: str, form: str) -> Any:
    """The model with the adapter that lies there; if none does, with one that is drawn and saved."""
    if not place.exists():
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], **FORMS[form])
        model = get_peft_model(Net(kind), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if p.requires_grad:
                    p.add_(torch.randn(p.shape) / 10) if "magnitude" in name else p.copy_(torch.randn(p.shape) / 10)
        model.save_pretrained(str(place))
    return PeftModel.from_pretrained(Net(kind), str(place), is_trainable=True)


def bases(model: Any) -> list[Tensor]:
    """The numbers of both base layers."""
    return [numbers(layer.base_layer).clone() for layer in (model.base_model.model.up, model.base_model.model.down)]


def training(model: Any, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    y = model.train()(x)
    y.square().mean().backward()
    yield "training", y.detach()
    assert x.grad is not None
    yield "gradient of x", x.grad
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield f"gradient of {name}", p.grad


def disabled(model: Any, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    with model.disable_adapter():
        yield "disabled", model(x)


def merged(model: Any, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"base weight {i}", W) for i, W in enumerate(bases(model)))
    model.merge_adapter()
    yield from ((f"merged weight {i}", W) for i, W in enumerate(bases(model)))
    yield "merged", model(x)
    model.unmerge_adapter()
    yield from ((f"unmerged weight {i}", W) for i, W in enumerate(bases(model)))
    yield "unmerged", model(x)


def evaluation(model: Any, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "evaluation", model.eval()(x)


def answers(make: Callable[[], Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a model with an adapter computes, step by step, each on a new one; and which steps ended in which error."""
    found: dict[str, Tensor] = {}
    errors = {}
    for step in (training, disabled, merged, evaluation):
        torch.manual_seed(2)
        x = torch.randn(8, WIDE)
        try:
            with torch.set_grad_enabled(step is training):
                for name, value in step(make(), x.requires_grad_(step is training)):
                    found[name] = value.detach().float().clone().contiguous()
        except Exception as error:
            errors[step.__name__] = f"{type(error).__name__}: {error}"
    return found, errors


def main(folder: str, file: str) -> None:
    import peft

    torch.set_num_threads(1)
    found, errors = {}, {}
    for case, kind, form in cases():
        told, wrong = answers(partial(adapted, Path(folder) / case, kind, form))
        found |= {f"{case}: {name}": t for name, t in told.items()}
        errors |= {f"{case}: {step}": text for step, text in wrong.items()}
    save_file(found, file, metadata={"library": str(peft.__file__), "errors": json.dumps(errors)})


if __name__ == "__main__":
    main(*sys.argv[1:])
