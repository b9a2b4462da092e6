"""One graph serves adapters of one shape, the model without them, and any scaling, in training and in evaluation."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from conformance.layouts import LAYOUTS
from conformance.rows import adapted, close, config, given, tuner_layers
from conformance.rows import train as train_adapter
from peft import PeftModel, VeraConfig, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """A compiled model with two adapters, and how many graphs it has needed."""

    def __init__(self, method, train, prepared=False, dtype=torch.float32, start=None, layout="linear"):
        layout = LAYOUTS[layout]
        self.model = adapted(method, layout, dtype, names=("default", "other")).train(train)
        self.model._forward_pre_hooks.clear()  # torch compiles them apart
        self.told = given(method)
        if prepared:
            prepare_model_for_compiled_hotswap(self.model, target_rank=8)
        self.x, self.counter = layout.x(dtype).requires_grad_(train), CompileCounterWithBackend("aot_eager")
        self.fast, self.train = torch.compile(self.model, fullgraph=True, backend=self.counter), train
        with (start and start(self.model)) or nullcontext():
            self.run()
        assert self.graphs == 1

    @property
    def graphs(self):
        """Those that hold operations: torch makes an empty one more where a double is among the inputs."""
        return sum(any(node.op == "call_function" for node in made.graph.nodes) for made in self.counter.graphs)

    def run(self, tolerance=None):
        """A step, or an answer, like that of the model that is not compiled."""
        with torch.set_grad_enabled(self.train):
            y, wanted = (self.seeded(model) for model in (self.fast, self.model))
            close(y, wanted, tolerance)
            if not self.train or not wanted.requires_grad:
                return
            held = [self.x, *(p for p in self.model.parameters() if p.requires_grad)]
            for one, two in zip(
                torch.autograd.grad(y.square().sum(), held, allow_unused=True),
                torch.autograd.grad(wanted.square().sum(), held, allow_unused=True),
                strict=True,
            ):
                if two is None:
                    assert one is None or not one.any(), "what is switched off has gradients of zero"
                else:
                    close(one, two, max(tolerance or 0, 1e-5) if y.dtype is not torch.bfloat16 else None)

    def seeded(self, model):
        torch.manual_seed(0)
        return model(self.x, **self.told)


both = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
FIVE = ("lora", "dora", "loha", "oft-series", "ia3")  # `conformance/test_compile` has all of them, in evaluation


def changes(made):
    """All that must not compile again: other adapters, none, and other scalings."""
    for name in ("other", "default"):
        made.model.set_adapter(name)
        made.run()
        with made.model.disable_adapter():
            made.run()
        made.run()
    for scale in (0.5, 2.0):
        rescale(made.model, scale)
        made.run()


def rescale(model, scale):
    for _, layer in tuner_layers(model):
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", scale)


@both
@pytest.mark.parametrize("method", FIVE)
def test_switching_disabling_and_rescaling_compile_nothing(method, train):
    made = Counted(method, train)
    changes(made)
    assert made.graphs == 1


@pytest.mark.parametrize("method", FIVE)
def test_a_merge_that_is_taken_back_leaves_the_graph_of_before_valid(method):
    made = Counted(method, False)
    made.model.merge_adapter()
    made.model.unmerge_adapter()
    made.run()
    assert made.graphs == 1


@both
@pytest.mark.parametrize("method", FIVE)
def test_the_disabled_model_is_the_base_bit_for_bit(method, train):
    """Whatever the update amounts to, and the gradients of the adapter are zeros."""
    made = Counted(method, train)
    layout, held = LAYOUTS["linear"], [p for p in made.model.parameters() if p.requires_grad]
    with torch.no_grad():
        if train:
            base = torch.compile(layout.plain(), backend="aot_eager")(made.x)
        else:
            base = layout.plain()(made.x)
            for p in made.model.parameters():
                if p.requires_grad:
                    p.fill_(torch.inf)
    with torch.set_grad_enabled(train), made.model.disable_adapter():
        y = made.fast(made.x)
        assert torch.equal(y, base)
        if train:
            x, *grads = torch.autograd.grad(y.square().sum(), [made.x, *held])
            (wanted,) = torch.autograd.grad(layout.plain()(made.x).square().sum(), made.x)
            assert torch.equal(x, wanted)
            assert not any(g.any() for g in grads)
    assert made.graphs == 1


@both
def test_a_model_that_is_compiled_while_disabled_needs_no_other_graph(train):
    made = Counted("lora", train, start=lambda model: model.disable_adapter())
    changes(made)
    assert made.graphs == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_are_disabled_one_by_one_compile_nothing_where_they_are_frozen(frozen):
    """Others are frozen by that, which is another graph."""
    made = Counted("lora", False, start=lambda model: model.set_adapter("default", inference_mode=frozen))
    for _ in range(2):
        made.model.base_model.disable_adapter_layers()
        made.run()
        made.model.base_model.enable_adapter_layers()
        made.run()
    assert made.graphs == (1 if frozen else 2)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_scaling_is_as_exact_as_the_adapter(dtype, train):
    made = Counted("lora", train, dtype=dtype)
    for scale in (0.1, 1 / 3):
        rescale(made.model, scale)
        made.run(1e-14 if dtype is torch.float64 else None)
    assert made.graphs == 1


def test_a_step_whose_scaling_changes_before_its_backward_pass_is_that_of_its_forward():
    made = Counted("lora", True)
    held = [p for p in made.model.parameters() if p.requires_grad]
    y, wanted = made.fast(made.x), made.model(made.x)
    with made.model.disable_adapter():
        made.fast(made.x)
        rescale(made.model, 3.0)
        found, wanted = (torch.autograd.grad(t.square().sum(), held) for t in (y, wanted))
    for one, two in zip(found, wanted, strict=True):
        close(one, two, 1e-5)


def test_two_active_adapters_are_a_graph_of_their_own_which_is_switched_off_too():
    layout = LAYOUTS["linear"]
    made = Counted("lora", False, start=lambda model: model.base_model.set_adapter(["default", "other"]))
    with made.model.disable_adapter():
        made.run()
        with torch.no_grad():
            assert torch.equal(made.fast(made.x), layout.plain()(made.x))
    made.run()
    rescale(made.model, 0.5)
    made.run()
    assert made.graphs == 1
    made.model.set_adapter("other")
    made.run()
    assert made.graphs == 2


def test_merging_is_a_graph_of_its_own_and_unmerging_none():
    made = Counted("lora", False)
    for _ in range(2):
        made.model.merge_adapter()
        made.run()
        made.model.unmerge_adapter()
        made.run()
    assert made.graphs == 2


def test_whole_modules_and_lookups_by_their_new_weight_keep_a_second_graph():
    for made in (Counted("ln-tuning", False), Counted("miss-bat", False, layout="embedding")):
        for _ in range(3):
            with made.model.disable_adapter():
                made.run()
            made.run()
        assert made.graphs == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_compiled_model_are_switched_by_themselves(copied):
    made = Counted("dora", False)
    with made.model.disable_adapter():
        twin = copied(made.model)
    with torch.no_grad():
        base, y = LAYOUTS["linear"].plain()(made.x), made.model(made.x)
        fast = torch.compile(twin, fullgraph=True, backend="aot_eager")
        assert torch.equal(fast(made.x), base)
        close(made.fast(made.x), y)
        with made.model.disable_adapter():
            assert torch.equal(made.fast(made.x), base)
    assert made.graphs == 1


def test_an_adapter_that_comes_later_needs_no_other_graph():
    made = Counted("lora", False)
    made.model.add_adapter("third", config("lora", LAYOUTS["linear"]))
    train_adapter(made.model, "third", 3)
    made.model.set_adapter("third")
    made.run()
    made.model.delete_adapter("default")
    made.run()
    assert made.graphs == 1


def test_the_model_moves_between_dtypes_and_is_right():
    made = Counted("lora", False)
    rescale(made.model, 1 / 3)
    made.model.double()
    made.x = made.x.double()
    made.run(1e-14)
    rescale(made.model, 1 / 7)
    made.run(1e-14)
    assert made.graphs == 2


def test_rescaling_in_inference_mode_leaves_training_as_it_is():
    made = Counted("lora", True)
    with torch.inference_mode():
        rescale(made.model, 0.5)
    made.run()
    with torch.inference_mode(), made.model.disable_adapter():
        pass
    made.run()
    assert made.graphs == 1


def test_the_default_backend_and_sizes_that_change():
    layout = LAYOUTS["linear-3-D"]
    model, x = adapted("lora", layout, names=("default", "other")), layout.x()
    counter = CompileCounterWithBackend("inductor")
    fast = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for rows in (x, torch.cat([x, x, x])):
            torch._dynamo.mark_dynamic(rows, 0)
            close(fast(rows), model(rows))
            with model.disable_adapter():
                close(fast(rows), layout.plain()(rows))
            rescale(model, 0.5 / len(rows))
            close(fast(rows), model(rows))
    assert counter.frame_count == 1


@both
def test_rescaling_a_prepared_model_compiles_nothing(train):
    made = Counted("lora", train, prepared=True)
    for scale in (0.5, 2.0, 0.25):
        rescale(made.model, scale)
        made.run()
    assert made.graphs == 1


class Block(nn.Module):
    """One of several alike."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.layer(x))


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("method", FIVE)
def test_repeated_blocks_that_are_compiled_by_themselves_share_one_graph(method, injected):
    blocks, x = nn.Sequential(*(Block() for _ in range(10))).eval(), torch.randn(3, 6)
    settings = config(method, LAYOUTS["linear"])
    inject = inject_adapter_in_model(settings, blocks) if injected else get_peft_model(blocks, settings)
    wanted, counter = inject.eval()(x), CompileCounterWithBackend("eager")
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        close(inject(x), wanted.detach())
        if not injected:
            with inject.disable_adapter():
                inject(x)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::peft.errors.ChangedConfigWarning")
def test_layers_that_a_failed_load_has_taken_out_are_not_asked_when_another_model_is_compiled(tmp_path):
    layout, settings = LAYOUTS["linear"], VeraConfig(target_modules=["layer"], r=4)
    get_peft_model(layout.model(), settings).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(RuntimeError, match="size mismatch") as held:  # and with it the layers
        PeftModel.from_pretrained(layout.model(), tmp_path)
    model = get_peft_model(layout.model(), settings).eval()
    torch.compile(model, backend="eager", fullgraph=True)(layout.x())
    assert held.value


@pytest.mark.parametrize("method", ["lora", "ia3", "oft-series"])
def test_where_tensors_are_constants_each_state_has_a_graph(method):
    """`TORCHINDUCTOR_FREEZING` makes constants of the tensors of inference: none can choose, or change its numbers."""
    with import_module("torch._inductor.config").patch(freezing=True):
        made = Counted(method, False)
        for name in ("default", "other"):
            made.model.set_adapter(name)
            made.run()
            with made.model.disable_adapter():
                made.run()
            made.model.merge_adapter()
            made.run()
            made.model.unmerge_adapter()
            made.run()
    assert made.graphs >= 6, "active, disabled and merged, of two adapters"
