"""Every layout under torch.compile: one graph, the eager answer, and no second compilation for another adapter."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from .layouts import LAYOUTS
from .rows import FEW, adapted, cells, close, given, tuner_layers

FEW_BUT_BIAS = tuple(m for m in FEW if m not in ("lora-bias", "pissa"))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


# a compilation takes as long as fifty other tests: every layout for two methods, one layout of each kind for the others
KINDS = ("linear-3-D", "linear-Conv1D", "conv-2d", "embedding", "attention-packed", "parameter-3-D")
CELLS = [c for c in cells(FEW_BUT_BIAS) if c[0] in ("lora", "dora") or c[1] in KINDS]


APART = {"ln-tuning"}, {"embedding-max-norm", "attention-encoder"}
LOOKUPS = {("ia3-feedforward", "embedding"), ("miss-bat", "embedding")}


def apart(method, name):
    """Whether the model without the adapter is a graph of its own.

    It is where a module is replaced as a whole or does more than its map, and where only W' states what an adapter does
    and the module's own way of applying it is not known.
    """
    return method in APART[0] or name in APART[1] or (method, name) in LOOKUPS


@pytest.mark.parametrize("method, name", CELLS)
def test_one_graph_serves_two_adapters_of_one_shape(method, name):
    layout = LAYOUTS[name]
    model, x, told = adapted(method, layout, names=("default", "other")), layout.x(), given(method)
    model._forward_pre_hooks.clear()  # torch compiles them apart
    fast, counter = compiled(model)
    with torch.no_grad():
        wanted = {}
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            wanted[adapter] = model(x, **told)
        for adapter in ("default", "other", "default"):
            model.set_adapter(adapter)
            close(fast(x, **told), wanted[adapter])
            assert counter.frame_count == 1, f"compiled again for {adapter!r}"
        for _ in range(2):
            with model.disable_adapter():
                close(fast(x, **told), model(x, **told))
            close(fast(x, **told), model(x, **told))
        for _, layer in tuner_layers(model):
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 0.5)
        close(fast(x, **told), model(x, **told))
    assert counter.frame_count == 1 + apart(method, name), "compiled again without an adapter, or rescaled"


# dropout is drawn in the same way on every layout of a kind
STEPS = [
    (rate, *cell)
    for cell in cells(("lora", "dora"), lambda layout: layout.kind in ("linear", "conv"))
    for rate in ((0.0, 0.3) if cell[1] in KINDS else (0.0,))
]


@pytest.mark.parametrize("rate, method, name", STEPS)
def test_a_training_step_is_one_graph_with_the_eager_gradients(rate, method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout, lora_dropout=rate).train(), layout.x()
    held = [p for p in model.parameters() if p.requires_grad]
    fast, counter = compiled(model)
    torch.manual_seed(0)
    y = fast(x)
    found = torch.autograd.grad(y.square().sum(), held)
    assert counter.frame_count == 1
    assert all(torch.isfinite(g).all() for g in found)
    if rate == 0:  # dropout draws its numbers in another order
        wanted = torch.autograd.grad(model(x).square().sum(), held)
        for one, two in zip(found, wanted, strict=True):
            close(one, two, 1e-5)


def test_the_default_backend_gives_the_eager_answer():
    layout = LAYOUTS["linear-3-D"]
    model, x = adapted("lora", layout), layout.x()
    with torch.no_grad():
        wanted = model(x)
        close(torch.compile(model, fullgraph=True)(x), wanted)


def test_disabling_and_merging_compile_to_the_base():
    layout = LAYOUTS["linear"]
    model, x = adapted("lora", layout), layout.x()
    fast, _ = compiled(model)
    with torch.no_grad():
        wanted, base = model(x), layout.plain()(x)
        close(fast(x), wanted)
        with model.disable_adapter():
            close(fast(x), base)
        model.merge_adapter()
        close(fast(x), wanted)
        model.unmerge_adapter()
        close(fast(x), wanted)
