"""Methods by their own algebra: a training step and one token of each, and the operations that torch runs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import Numbers, added, measure, turns
from benchmarks.models import ALL_LINEAR, Llama, frozen, stack
from benchmarks.subjects.steps import step

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("LoraConfig", {"r": 16, "use_dora": True, "init_lora_weights": False}),
    "LoHa": ("LoHaConfig", {"r": 8, "init_weights": False}),
    "LoKr": ("LoKrConfig", {"r": 8, "init_weights": False}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "OFT": ("OFTConfig", {"oft_block_size": 32}),
}

KEYS = ("evaluation", "forward", "backward")
MOST = {"DoRA": (3, 11, 8), "LoHa": (4, 4, 13), "LoKr": (5, 7, 9), "BOFT": (4, 10, 18), "OFT": (2, 16, 16)}


def adapted(model: nn.Module, name: str, targets: list[str]) -> nn.Module:
    """The model under one of the methods."""
    import peft

    kind, fields = METHODS[name]
    return peft.get_peft_model(model, getattr(peft, kind)(target_modules=targets, **fields))


@measure("train step by method, 4 x Linear(512, 512), 256 tokens", repeats=3, derive=added)
def train_methods() -> Iterator[Numbers]:
    """fp32; the adapted layers alone, without what a model does around them."""
    x = torch.randn(256, 512, requires_grad=True)
    bare = step(frozen(stack(4, 512)), x)
    steps = {name: step(adapted(stack(4, 512), name, ["proj"]).train(), x) for name in METHODS}
    for run in (bare, *steps.values()):
        run()
    while True:
        yield turns(bare, steps, 5)


@measure("one token by method, 8 Llama layers of hidden 512, all-linear", repeats=2, derive=added)
@torch.no_grad()
def token_methods() -> Iterator[Numbers]:
    """Evaluation: what is computed from an adapter's tensors alone may be kept."""
    token, shape = torch.tensor([[1]]), (8, 512, 1376, 8)
    bare = frozen(Llama(*shape)).eval()
    models = {name: adapted(Llama(*shape), name, ALL_LINEAR).eval() for name in METHODS}
    runs = {name: partial(model, token) for name, model in models.items()}
    while True:
        yield turns(lambda: bare(token), runs, 7)


class Counting(TorchDispatchMode):
    """Counts operations that compute; those that look at memory in another way are free."""

    FREE = ("view", "_unsafe_view", "t", "transpose", "detach", "alias", "expand", "unsqueeze", "slice",
            "permute", "reshape", "select", "as_strided", "diagonal", "unbind", "split",
            "split_with_sizes", "squeeze")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in self.FREE
        return func(*args, **(kwargs or {}))


def operations(work: Callable[[], object]) -> int:
    """How many operations one call of `work` runs."""
    with Counting() as counting:
        work()
    return counting.count


def counted(layer: nn.Module) -> Numbers:
    """Operations of one layer, forward with and without gradients, and backward."""
    x = torch.randn(64, 512, requires_grad=True)
    y: list[Tensor] = []
    with torch.no_grad():
        layer.eval()(x), layer(x)
        found = {"evaluation": operations(lambda: layer(x))}
    layer.train()
    found["forward"] = operations(lambda: y.append(layer(x)))
    found["backward"] = operations(y[0].sum().backward)
    return found


@measure(
    "operations of one adapted Linear(512, 512) beyond the bare one's, 64 tokens",
    repeats=1,
    unit="",
    ceilings={f"{name}: {key}": most for name, counts in MOST.items() for key, most in zip(KEYS, counts, strict=True)},
)
def layer_operations() -> Iterator[Numbers]:
    """Counted by torch's dispatcher, views left out."""
    while True:
        bare = counted(frozen(stack(1, 512))[0].proj)  # type: ignore[index]
        numbers = {}
        for name in METHODS:
            layer = adapted(stack(1, 512), name, ["proj"]).base_model.model[0].proj  # type: ignore[union-attr,index]
            numbers.update({f"{name}: {key}": value - bare[key] for key, value in counted(layer).items()})
        yield numbers
