"""Layers that are no nn.Linear: transformers' Conv1D in GPT-2, and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Numbers, added, measure, turns
from benchmarks.models import frozen
from benchmarks.subjects.steps import step

GPT2 = "GPT-2, 6 blocks of hidden 384, Conv1D r=8"
CONVS = "4 x Conv2d(128, 128, 3), 4 images of 16 x 16, r=4"
SIDES = ("LoRA", "DoRA")
KERNELS = ("LoRA", "DoRA", "LoHa", "LoKr")
AS_QUICK = {name: 1.0 for name in KERNELS}


def gpt2() -> nn.Module:
    """Takes embeddings, so that a gradient goes down to the bottom."""
    from transformers import GPT2Config, GPT2Model

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2Model(GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=64))

        def forward(self, x: Tensor) -> Tensor:
            return self.model(inputs_embeds=x, use_cache=False).last_hidden_state

    return Hidden()


def convs() -> nn.Module:
    """Four of one shape."""
    return nn.Sequential(*(nn.Conv2d(128, 128, 3, padding=1) for _ in range(4)))


def adapted(base: nn.Module, name: str, targets: list[str], r: int) -> nn.Module:
    """A model under a method."""
    import peft

    kinds: dict[str, Any] = {
        "LoRA": peft.LoraConfig,
        "DoRA": partial(peft.LoraConfig, use_dora=True),
        "LoHa": peft.LoHaConfig,
        "LoKr": peft.LoKrConfig,
    }
    more = {"fan_in_fan_out": True} if targets[0] == "c_attn" else {}
    return peft.get_peft_model(base, kinds[name](r=r, target_modules=targets, **more))


def runs(make: Callable[[], nn.Module], names: tuple[str, ...], targets: list[str], x: Tensor, train: bool) -> Any:
    """(the bare model's work, that of each method)."""
    r = 8 if "c_attn" in targets else 4
    models = {name: adapted(make(), name, targets, r).train(train) for name in names}
    bare = frozen(make()).train(train)
    if train:
        return step(bare, x), {name: step(model, x) for name, model in models.items()}
    return partial(bare, x), {name: partial(model, x) for name, model in models.items()}


@measure(f"one token through {GPT2}", repeats=3, derive=added, limits={name: 1.0 for name in SIDES})
@torch.no_grad()
def conv1d_token() -> Iterator[Numbers]:
    """24 adapted layers whose weights are stored as (in, out)."""
    bare, works = runs(gpt2, SIDES, ["c_attn", "c_proj", "c_fc"], torch.randn(1, 1, 384), False)
    while True:
        yield turns(bare, works, 12)


@measure(f"train step, 128 tokens, {GPT2}", repeats=3, derive=added, limits={name: 1.0 for name in SIDES})
def conv1d_step() -> Iterator[Numbers]:
    """The same in training."""
    x = torch.randn(2, 64, 384, requires_grad=True)
    bare, works = runs(gpt2, SIDES, ["c_attn", "c_proj", "c_fc"], x, True)
    while True:
        yield turns(bare, works, 4)


@measure(f"evaluation of {CONVS}", repeats=3, derive=added, limits=AS_QUICK)
@torch.no_grad()
def convolutions() -> Iterator[Numbers]:
    """A second convolution beside the base's takes as long as that."""
    bare, works = runs(convs, KERNELS, ["0", "1", "2", "3"], torch.randn(4, 128, 16, 16), False)
    while True:
        yield turns(bare, works, 8)


@measure(f"train step of {CONVS}", repeats=3, derive=added, limits=AS_QUICK)
def convolutions_step() -> Iterator[Numbers]:
    """The gradient of a matrix of W's size is a third one."""
    x = torch.randn(4, 128, 16, 16, requires_grad=True)
    bare, works = runs(convs, KERNELS, ["0", "1", "2", "3"], x, True)
    while True:
        yield turns(bare, works, 4)
