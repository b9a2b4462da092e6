"""What the experiments share: wrapping, randomising, running, comparing. Public names of the library only."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft

from . import bases
from .rows import Row

Builder = Callable[[], tuple[nn.Module, dict]]


class NotAsked(Exception):
    """The question has no meaning for this method."""


class Wrong(Exception):
    """It ran, but the result is not right."""


def need(holds: bool, words: str) -> None:
    if not holds:
        raise Wrong(words)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    a, b = a.double(), b.double()
    return a.shape == b.shape and torch.allclose(a, b, tolerance, tolerance * max(1.0, float(b.abs().max())))


def fields(row: Row) -> set[str]:
    return set(getattr(peft, row.config).__dataclass_fields__)


@dataclass
class Probe:
    """One method on one base.

    Arguments:
        row: the method.
        build: makes the base and its inputs.
        targets: `target_modules`; None leaves them to the library.
        folder: where files may be written.
    """

    row: Row
    build: Builder
    targets: list[str] | None
    folder: Path

    def config(self, **more: Any) -> Any:
        given = {**self.row.settings, **more}
        if self.targets is not None:
            given.setdefault("target_modules", list(self.targets))
        for name, value in given.items():
            if name.endswith("_config") and isinstance(value, str):
                given[name] = getattr(import_module("peft.tuners.lora.config"), value)()
        return getattr(peft, self.row.config)(**copy.deepcopy(given))

    def base(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict]:
        return bases.make(self.build, dtype)

    def wrapped(self, dtype: torch.dtype = torch.float32, seed: int | None = 5, **more: Any) -> tuple[Any, dict]:
        """A fresh base with one adapter, randomised unless `seed` is None, and its inputs."""
        model, inputs = self.base(dtype)
        torch.manual_seed(0)
        model = wrap(self, model, inputs, **more)
        if seed is not None:
            self.randomise(model, seed)
        return model.eval(), inputs

    def randomise(self, model: nn.Module, seed: int) -> None:
        """Move every trainable tensor away from its first values."""
        generator = torch.Generator().manual_seed(seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        need(bool(trained), "nothing trainable")
        with torch.no_grad():
            for p in trained:
                p.add_(0.2 * self.row.cut * torch.randn(p.shape, generator=generator).to(p.dtype))

    def second(self, model: Any, name: str = "second", **more: Any) -> str:
        """Add another randomised adapter, and make the first one active again; returns the first one's name."""
        if self.row.prepare in ("corda", "lora_ga", "eva"):  # the second one has no inputs to start from
            more.setdefault("init_lora_weights", True)
        model.add_adapter(name, self.config(**more))
        first = next(iter(model.peft_config))
        model.set_adapter(name)
        others = [
            p for n, p in model.named_parameters() if p.requires_grad and (f".{first}." in n or n.endswith(first))
        ]
        for p in others:  # some libraries leave the first adapter trainable
            p.requires_grad_(False)
        self.randomise(model, 6)
        model.set_adapter(first)
        model.eval()
        return first

    def run(self, model: nn.Module, inputs: dict, **extra: Any) -> Tensor:
        if self.row.tasks and hasattr(model, "peft_config"):
            extra.setdefault("task_ids", torch.arange(len(next(iter(inputs.values())))) % 3)
            if not self.row.base.startswith("llama") and "adapter_names" not in extra:
                model = getattr(model, "base_model", model)  # the class without a task hands nothing on
        out = model(**inputs, **extra)
        return getattr(out, "logits", out)

    def saved(self, model: Any) -> str:
        folder = tempfile.mkdtemp(dir=self.folder)
        model.save_pretrained(folder)
        return folder

    def loaded(self, folder: str, **more: Any) -> Any:
        return peft.PeftModel.from_pretrained(self.base()[0], folder, **more).eval()

    def head(self) -> str:
        return "lm_head" if self.row.base.startswith("llama") else "head"


def wrap(probe: Probe, model: nn.Module, inputs: dict, mixed: bool = False, **more: Any) -> Any:
    """`get_peft_model`, with what the documentation of the method wants before and after."""
    prepare = PREPARE.get(probe.row.prepare or "")
    if prepare is not None:
        return prepare(probe, model, inputs, mixed, more)
    return peft.get_peft_model(model, probe.config(**more), **({"mixed": True} if mixed else {}))


def _wide(inputs: dict) -> Tensor:
    x = next(iter(inputs.values()))
    x = torch.cat([x] * 12)
    return x + 0.3 * torch.randn_like(x) if x.is_floating_point() else x


def _finish(probe: Probe, model: nn.Module, mixed: bool, config: Any) -> Any:
    return peft.get_peft_model(model, config, **({"mixed": True} if mixed else {}))


def _eva(probe: Probe, model: nn.Module, inputs: dict, mixed: bool, more: dict) -> Any:
    model = _finish(probe, model, mixed, probe.config(**more))
    batches = [_wide(inputs) for _ in range(8)]
    peft.initialize_lora_eva_weights(
        model, batches, forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    return model


def _corda(probe: Probe, model: nn.Module, inputs: dict, mixed: bool, more: dict) -> Any:
    from peft.tuners.lora.corda import preprocess_corda

    config, x = probe.config(**more), _wide(inputs)
    preprocess_corda(model, config, run_model=lambda: [model(sample[None]) for sample in x])
    return _finish(probe, model, mixed, config)


def _lora_ga(probe: Probe, model: nn.Module, inputs: dict, mixed: bool, more: dict) -> Any:
    config, x = probe.config(**more), _wide(inputs)
    peft.preprocess_loraga(model, config, lambda: model(x).square().mean().backward())
    return _finish(probe, model, mixed, config)


def _experts(probe: Probe, model: nn.Module) -> list[str]:
    folders = []
    for seed in (300, 301):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        expert = peft.get_peft_model(copy.deepcopy(model), config)
        probe.randomise(expert, seed)
        folders.append(probe.saved(expert))
    return folders


def _arrow(probe: Probe, model: nn.Module, inputs: dict, mixed: bool, more: dict) -> Any:
    folders = _experts(probe, model)
    config = peft.ArrowConfig(top_k=1, rng_seed=1)
    return peft.create_arrow_model(model, task_specific_adapter_paths=folders, arrow_config=config)


def _xlora(probe: Probe, model: nn.Module, inputs: dict, mixed: bool, more: dict) -> Any:
    adapters = {str(i): folder for i, folder in enumerate(_experts(probe, model))}
    return _finish(probe, model, mixed, probe.config(adapters=adapters, **more))


PREPARE: dict[str, Callable[..., Any]] = {
    "eva": _eva, "corda": _corda, "lora_ga": _lora_ga, "arrow": _arrow, "xlora": _xlora,
}  # fmt: skip
