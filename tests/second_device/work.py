"""What is true of models on another device than the CPU; run as a program, with the library of the device, it prints
what is not."""

from __future__ import annotations

import copy
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from ..conformance.layouts import LAYOUTS, Layout
from ..conformance.oracles import METHODS
from ..conformance.rows import SEVERAL, adapted, config, forbidden, given, mergeable, told, train
from . import registered, waits

CHOSEN = ("linear", "linear-3-D", "conv-2d", "embedding", "attention-packed", "parameter-3-D")


class Apart(nn.Module):
    """Two layers, which may be on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x).tanh().to(self.layer.weight.device))


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to the order of sums, relative to the largest."""
    one, two = found.detach().cpu().double(), wanted.detach().cpu().double()
    error = float((one - two).abs().max() / two.abs().max().clamp_min(1e-6))
    assert error <= tolerance, f"differs by {error:.1e}"


def placed(model: nn.Module, *devices: torch.device) -> None:
    """Every tensor is on one of these devices."""
    held = (*model.named_parameters(), *model.named_buffers())
    assert not (away := [f"{n} on {t.device}" for n, t in held if t.device not in devices]), away


def waits_not(run: Callable[[], Any], ok: Any = None) -> None:
    """Nothing makes the host wait, once all is known that is looked up once; or no more than `ok` does."""
    run()
    assert (found := waits(run)) == ({} if ok is None else waits(ok)), f"waits: {found}"


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradients of what is trained, of a sum of squares."""
    model.zero_grad()
    torch.manual_seed(0)
    run().float().square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def alike(model: nn.Module, other: nn.Module, x: Tensor, place: torch.device, **told: Any) -> None:
    """Output and gradients on the device are those of the CPU's model."""
    with torch.no_grad():
        close(model(x.to(place), **told), other(x, **told))
    found = gradients(model, lambda: model(x.to(place), **told))
    wanted = gradients(other, lambda: other(x, **told))
    assert found.keys() == wanted.keys() and wanted
    for key, g in wanted.items():
        if g.abs().max() > 1e-4:  # others are rounding
            close(found[key], g, 1e-4)


def of_cell(method: str, layout: Layout, place: torch.device) -> Iterator[Callable[[], None]]:
    """What holds of a method on a layout."""
    names, x = ("default", "other"), layout.x()
    cpu, there = adapted(method, layout, names=names), x.to(place)
    model = told(get_peft_model(layout.model().to(place), config(method, layout)), method, layout).eval()
    model.add_adapter("other", config(method, layout))
    for name in names:
        set_peft_model_state_dict(model, get_peft_model_state_dict(cpu, adapter_name=name), adapter_name=name)

    def is_placed() -> None:
        placed(model, place)
        alike(model, cpu, x, place)

    def waits_for_nothing(one: nn.Module = model) -> None:
        with torch.no_grad():
            waits_not(lambda: one(there))
        waits_not(lambda: one(there).float().square().sum().backward())

    def loads() -> None:
        with tempfile.TemporaryDirectory() as folder:
            cpu.save_pretrained(folder)
            for low in (False, True):
                loaded = PeftModel.from_pretrained(layout.model().to(place), folder, low_cpu_mem_usage=low)
                loaded.load_adapter(Path(folder, "other"), "other")
                placed(told(loaded.eval(), method, layout), place)
                with torch.no_grad():
                    close(loaded(there), cpu(x))
        if METHODS[method].tasks is None:
            waits_for_nothing(loaded)

    def merges() -> None:
        with torch.no_grad():
            wanted = model(there)
            model.merge_adapter()
            placed(model, place)
            close(model(there), wanted)
            model.unmerge_adapter()
            assert torch.equal(model(there), wanted)

    def mixes() -> None:
        rows = ["other", "__base__", "default", "other"]
        with torch.no_grad():
            close(model(there, adapter_names=rows), cpu(x, adapter_names=rows))
            waits_not(lambda: model(there, adapter_names=rows))

    yield is_placed
    yield loads
    if METHODS[method].tasks is None:  # tasks are the host's
        yield waits_for_nothing
        if method in SEVERAL and layout.batched and METHODS[method].of_input is None:
            yield mixes
    if mergeable(method, layout):
        yield merges


def of_two(method: str, places: tuple[torch.device, torch.device]) -> Iterator[Callable[[], None]]:
    """What holds of a model on two devices."""

    def spread() -> nn.Module:
        torch.manual_seed(0)
        base = Apart().eval()
        base.first.to(places[0])
        base.layer.to(places[1])
        return base

    def is_what_it_is_on_one() -> None:
        torch.manual_seed(0)
        layout = LAYOUTS["linear"]
        cpu = get_peft_model(Apart().eval(), config(method, layout, target_modules=["first", "layer"])).eval()
        cpu.__dict__["noise"] = METHODS[method].noise
        train(cpu)
        with tempfile.TemporaryDirectory() as folder:
            cpu.save_pretrained(folder)
            model = PeftModel.from_pretrained(spread(), folder, is_trainable=True).eval()
        placed(model, *places)
        alike(model, cpu, torch.randn(4, 6), places[0], **given(method))

    yield is_what_it_is_on_one


def of_language_models(place: torch.device) -> Iterator[Callable[[], None]]:
    """What holds of prompts, tokens and copied modules in a model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def base() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=99, num_key_value_heads=2, pad_token_id=0, **sizes)).eval()

    few = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    ids = torch.randint(3, 99, (2, 7))
    seen = {"attention_mask": torch.ones_like(ids)}

    def check(settings: Any) -> None:
        cpu = get_peft_model(base(), copy.deepcopy(settings)).eval()
        model = get_peft_model(base().to(place), copy.deepcopy(settings)).eval()
        placed(model, place)
        model.load_state_dict(cpu.state_dict())
        there = {k: v.to(place) for k, v in seen.items()}
        with torch.no_grad():
            close(model(ids.to(place), **there).logits, cpu(ids, **seen).logits, 1e-4)
            made = [m.generate(input_ids=i, max_new_tokens=3, do_sample=False, **s)
                    for m, i, s in ((cpu, ids, seen), (model, ids.to(place), there))]  # fmt: skip
            assert torch.equal(made[0], made[1].cpu())
        found = gradients(model, lambda: model(ids.to(place), **there).logits)
        wanted = gradients(cpu, lambda: cpu(ids, **seen).logits)
        assert found.keys() == wanted.keys() and wanted
        for key, g in wanted.items():
            close(found[key], g, 1e-3)
        plain = base().to(place)
        plain(ids.to(place), **there)
        asked = sum(waits(lambda: plain(ids.to(place), **there)).values())
        model(ids.to(place), **there)
        assert sum(waits(lambda: model(ids.to(place), **there)).values()) <= asked
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            placed(PeftModel.from_pretrained(base().to(place), folder), place)
        with model.disable_adapter(), torch.no_grad():
            assert torch.equal(model(ids.to(place), **there).logits, plain(ids.to(place), **there).logits)

    for settings in (
        LoraConfig(**lora, trainable_token_indices=[3, 5], modules_to_save=["lm_head"]),
        LoraConfig(**{**lora, "target_modules": ["embed_tokens", "lm_head"]}),
        LoraConfig(**lora, use_dora=True),
        PromptTuningConfig(**few),
        PromptEncoderConfig(**few, encoder_hidden_size=16),
        PrefixTuningConfig(**few),
        PrefixTuningConfig(**few, prefix_projection=True, encoder_hidden_size=16),
    ):
        yield lambda settings=settings: check(settings)  # type: ignore[misc]


def main(library: str) -> int:
    """Go through all, and say what does not hold."""
    place, other = registered(Path(library)), torch.device("second:1")
    warnings.simplefilter("ignore")
    cells = [(m, n) for m in METHODS for n in CHOSEN if forbidden(m, LAYOUTS[n]) is None]
    rooms = {f"{m} on {n}": (of_cell, m, LAYOUTS[n], place) for m, n in cells}
    rooms |= {f"{m} on two": (of_two, m, (place, other)) for m, n in cells if n == "linear"}
    rooms |= {f"{m} without double": (of_cell, m, LAYOUTS[n], other) for m, n in cells if n == "linear"}
    rooms["transformers"] = (of_language_models, place)
    count = wrong = 0
    for title, (room, *args) in rooms.items():
        for check in room(*args):
            count += 1
            try:
                check()
            except Exception:
                wrong += 1
                print(f"---- {title}, {check.__name__}:\n{traceback.format_exc(limit=-4)}")
    print(f"{count} checks, {wrong} failed")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1]), 1))
