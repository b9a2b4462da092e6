"""One graph serves adapters of one shape; what else compiles does so once, and never again on the way back."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from conformance.layouts import LAYOUTS
from conformance.rows import adapted, close, tuner_layers
from peft.utils.hotswap import prepare_model_for_compiled_hotswap


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """A compiled model with two adapters, and how many graphs it has needed."""

    def __init__(self, method, train, prepared=False):
        layout = LAYOUTS["linear"]
        self.model = adapted(method, layout, names=("default", "other")).train(train)
        if prepared:
            prepare_model_for_compiled_hotswap(self.model, target_rank=8)
        self.x, self.counter = layout.x().requires_grad_(train), CompileCounterWithBackend("aot_eager")
        self.fast, self.train = torch.compile(self.model, fullgraph=True, backend=self.counter), train
        self.run()
        assert self.graphs == 1

    @property
    def graphs(self):
        return self.counter.frame_count

    def run(self):
        """A step, or an answer, like that of the model that is not compiled."""
        with torch.set_grad_enabled(self.train):
            y, wanted = self.fast(self.x), self.model(self.x)
            close(y, wanted)
            if self.train:
                held = [self.x, *(p for p in self.model.parameters() if p.requires_grad)]
                for one, two in zip(
                    torch.autograd.grad(y.square().sum(), held, allow_unused=True),
                    torch.autograd.grad(wanted.square().sum(), held, allow_unused=True),
                    strict=True,
                ):
                    assert (one is None) == (two is None)
                    if one is not None:
                        close(one, two, 1e-5)


METHODS = ("lora", "dora", "loha", "oft-series")
both = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


@both
@pytest.mark.parametrize("method", METHODS)
def test_switching_compiles_nothing_and_disabling_once(method, train):
    made = Counted(method, train)
    for name in ("other", "default", "other"):
        made.model.set_adapter(name)
        made.run()
    assert made.graphs == 1
    for _ in range(3):
        with made.model.disable_adapter():
            made.run()
        made.run()
    assert made.graphs == 2, "the base model is a graph of its own, made once"


def rescaled(made):
    """The graphs after each of several changes of the scaling."""
    for scale in (0.5, 2.0, 0.25):
        for _, layer in tuner_layers(made.model):
            layer.set_scale("default", scale)
        made.run()
        yield made.graphs


@both
def test_rescaling_compiles_once_at_most(train):
    """torch takes a number for a constant until it has seen another."""
    assert list(rescaled(Counted("lora", train))) == [2, 2, 2]


@both
def test_rescaling_a_prepared_model_compiles_nothing(train):
    assert list(rescaled(Counted("lora", train, prepared=True))) == [1, 1, 1]
