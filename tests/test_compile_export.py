"""torch.compile and torch.export of adapted models: one graph, the eager answer, and parameters under their names.

`conformance/test_compile.py` compiles every layout; here are the rows of methods that it leaves out, and exported
programs. Every method is traced by both of torch's ways; of DoRA over another method, which is one code, a few are.
Where a module reads its weight (attention, single parameters) Poly runs it once for each task of a batch, so that a
graph holds the tasks that it was traced with.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, ExportedProgram, export
from torch.func import functional_call

from conformance.layouts import LAYOUTS, Layout
from conformance.rows import METHODS, adapted, close, given, tuner_layers
from peft import IA3Config, LoraConfig, get_peft_model
from peft.helpers import update_forward_signature
from peft.kernels import blocks, rotations

FIVE = ("lora", "dora", "ia3", "loha", "oft")  # a sum, a norm, scales, products of factors, a rotation
DORA = ("adalora-dora", "adamss-dora", "lokr-dora", "shira-dora", "vblora-dora", "velora-dora")  # of all methods'
REST = [n for n, row in METHODS.items() if not row.few and (not n.endswith("-dora") or n in DORA)]


class Net(nn.Module):
    """Tokens, (rows, length), through one layer of each kind whose input an adapter sees; (rows, 12, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 12)
        self.linear = nn.Linear(12, 24)
        self.conv = nn.Conv1d(24, 12, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.linear(self.embed(tokens))).mT)


class Named(nn.Module):
    """A model by the names of its arguments: torch gives sizes of `*args, **kwargs` no names."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, task_ids: Tensor) -> Tensor:
        return self.model(tokens, task_ids=task_ids)


NET = Layout("net", Net, (4, 5), {"target_modules": ["embed", "linear", "conv"]}, tokens=12)
ONLY = {"tokens": ["embed", "linear"], "boft-butterfly": ["conv"]}  # the other layers refuse them, by name


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """No compiled frame of another test, before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net(method: str, **changes: Any) -> nn.Module:
    """The net under an adapter that does something."""
    every = NET.targets["target_modules"] if METHODS[method].few else ["linear"]  # settings differ in their matrices
    changes = {"target_modules": ONLY.get(method, every), **changes}
    model = adapted(method, NET, **changes)
    model._forward_pre_hooks.clear()  # tasks are given as arguments
    return model


def program(model: nn.Module, *inputs: Tensor, strict: bool = False) -> ExportedProgram:
    """The model for any number of rows and any length."""
    rows, length = Dim("rows", min=1, max=64), Dim("length", min=2, max=64)
    tokens = {0: rows, 1: length}
    shapes = {"tokens": tokens, "task_ids": {0: rows}} if len(inputs) > 1 else {"args": (tokens,)}
    return export(model, inputs, dynamic_shapes=shapes, strict=strict)


def others(x: Tensor) -> Tensor:
    """Tokens of another batch: more rows, and longer ones."""
    return torch.cat([x, x.flip(1), x[:1]]).repeat(1, 2)


def right(made: ExportedProgram, model: nn.Module, x: Tensor, *more: Tensor) -> None:
    """Whether the program gives the model's answer to the inputs it was made with, and to others."""
    run = made.module()
    with torch.no_grad():
        close(run(x, *more), model(x, *more))
        twice = [torch.cat([t, t, t[:1]]) for t in more]
        close(run(others(x), *twice), model(others(x), *twice))


# ---- compiling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", REST)
def test_every_other_method_compiles_to_one_graph(method: str) -> None:
    model, x, told = net(method), NET.x(), given(method)
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        close(fast(x, **told), model(x, **told))
        for _ in range(2):
            with model.disable_adapter():
                assert torch.equal(fast(x, **told), model(x, **told))
        for _, layer in tuner_layers(model):
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 0.5)
        close(fast(x, **told), model(x, **told))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which torch itself looks at
@pytest.mark.parametrize("method", ["lora", "dora", "boft-butterfly"])
def test_compiled_autograd_makes_one_graph_of_the_backward_pass(method: str) -> None:
    model, x = net(method).train(), NET.x()

    def step() -> list[Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    wanted, compiler = step(), torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        for found, grad in zip(step(), wanted, strict=True):
            close(found, grad, 1e-5)


@pytest.mark.parametrize("method", FIVE)
def test_values_put_in_place_of_an_adapters_are_seen_by_compiled_code(method: str) -> None:
    model, x = net(method, target_modules=["linear"]), NET.x()
    values = {name: p.detach() + 0.1 for name, p in model.named_parameters() if p.requires_grad}

    def loss(held: dict[str, Tensor]) -> Tensor:
        return functional_call(model, held, (x,)).square().mean()

    fast = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(values)
    wanted = torch.func.grad(loss)(values)
    for name in values:
        close(fast[name], wanted[name], 1e-4)
    assert any(not torch.equal(p.detach(), values[name]) for name, p in model.named_parameters() if name in values)


@pytest.mark.parametrize("change", ["assigned", "moved"])
@pytest.mark.parametrize("method", ["ia3", "loha", "vera", "vblora"])  # whose tensors no module of their own holds
def test_tensors_that_are_replaced_are_those_that_compiled_code_uses(method: str, change: str) -> None:
    model, x = net(method), NET.x()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = fast(x)
        if change == "assigned":
            model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)
        else:
            model.to(torch.float64)
        close(fast(x), model(x))
        assert fast(x).dtype is not before.dtype or not torch.allclose(fast(x), before)


# ---- traces of torch.jit, and ONNX by them -------------------------------------------------------------------


EVERY = [name for name, row in METHODS.items() if row.few or name in REST]
SOLVED = ("boft", "hra", "oft", "psoft")  # which solve equations, as ONNX cannot
QUIET = ("ignore::torch.jit.TracerWarning", "ignore:.*deprecated", "ignore:.*constant folding")  # sizes that stay
quiet = pytest.mark.filterwarnings(*QUIET)
NOT_THERE = ("c3a", "fourierft", "deft-qr", "hra-orthogonal")  # a transform or a decomposition of which it has no word


def few_and_many(x: Tensor, tasks: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """A single token with its task, and more of both than a model was traced with."""
    return [(x[:1, :1], *(t[:1] for t in tasks)), (others(x), *(torch.cat([t, t, t[:1]]) for t in tasks))]


@quiet
@pytest.mark.parametrize("method", EVERY)
def test_a_trace_is_alike_in_training_and_evaluation_and_serves_any_number_of_rows(method: str) -> None:
    model, x, tasks = net(method), NET.x(), tuple(given(method).values())
    model = Named(model) if tasks else model
    one, more = few_and_many(x, tasks)
    for made in (blocks._eye, rotations._above):  # once, which must not be within a trace
        made.cache_clear()
    run = torch.jit.trace(model, one)  # which compares it with one that is made without gradients
    for inputs in (one, (x, *tasks), more):
        close(run(*inputs), model(*inputs), 1e-5)


@quiet
@pytest.mark.parametrize("method", SOLVED)
def test_what_is_on_its_way_to_onnx_solves_no_equations(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(method), NET.x()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    run = torch.jit.trace(model, (x,), check_trace=False)
    close(run(others(x)), model(others(x)), 1e-5)
    assert "linalg_solve" not in str(run.inlined_graph)


@quiet
@pytest.mark.parametrize("method", [name for name in EVERY if name not in NOT_THERE])
def test_traces_are_exported_to_onnx(method: str) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, x, tasks = net(method), NET.x(), tuple(given(method).values())
    names, file = ["tokens", "task_ids"][: 1 + len(tasks)], io.BytesIO()
    axes = {"tokens": {0: "rows", 1: "length"}, "task_ids": {0: "rows"}}
    model = Named(model).eval() if tasks else model
    torch.onnx.export(
        model, (x, *tasks), file, dynamo=False, input_names=names, dynamic_axes={n: axes[n] for n in names}
    )
    run = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for inputs in few_and_many(x, tasks):
        (y,) = run.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
        close(torch.from_numpy(y), model(*inputs).detach(), 2e-5)


# ---- exporting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.few or name in REST])
def test_every_method_is_exported_for_any_number_of_rows(method: str) -> None:
    model, x, told = net(method), NET.x(), tuple(given(method).values())
    model = Named(model) if told else model
    made = program(model, x, *told)
    right(made, model, x, *told)
    assert set(made.graph_signature.parameters) <= {name for name, _ in model.named_parameters()}
    assert set(made.constants) <= {name for name, _ in model.named_buffers()}, "a parameter has become a constant"


@pytest.mark.parametrize("method", FIVE)
def test_a_strict_export_gives_the_same_program(method: str) -> None:
    model, x = net(method), NET.x()
    made = program(model, x, strict=True)
    right(made, model, x)
    assert set(made.graph_signature.parameters) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("method", ["kasa", "osf", "road-1"])
def test_a_strict_export_takes_few_rows_and_many(method: str) -> None:
    model, x = adapted(method, LAYOUTS["linear"]), LAYOUTS["linear"].x()
    shapes = {"args": ({0: Dim("rows", min=2, max=512)},)}
    run = export(model, (x,), dynamic_shapes=shapes, strict=True).module()
    for rows in (x[:2], x.repeat(40, 1)):
        close(run(rows), model(rows))


@pytest.mark.parametrize("strict", [False, True])
def test_merged_and_disabled_models_export_as_the_base(strict: bool) -> None:
    model, x = net("dora", target_modules=["linear", "conv"]), NET.x()
    with torch.no_grad():
        wanted, base = model(x), NET.plain()(x)
        with model.disable_adapter():
            made = program(model, x, strict=strict)
        assert torch.equal(made.module()(x), base)
        model.merge_adapter()
        made = program(model, x, strict=strict)
        close(made.module()(x), wanted)
        model.unmerge_adapter()
        assert not any("lora_" in str(node.target) for node in made.graph.nodes if node.op == "call_function")
        close(program(model, x, strict=strict).module()(x), wanted)


@pytest.mark.parametrize("method", FIVE)
def test_a_program_is_saved_and_loaded_and_takes_the_numbers_of_another_adapter(method: str) -> None:
    model, other, x = (*(net(method, target_modules=["linear"]) for _ in range(2)), NET.x())
    file = io.BytesIO()
    torch.export.save(program(model, x), file)
    file.seek(0)
    made = torch.export.load(file)
    right(made, model, x)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05)
        run = made.module()
        run.load_state_dict(other.state_dict())
        close(run(x), other(x))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="pipelines are of torch.distributed")
@pytest.mark.parametrize("method", [*FIVE, "loha-dora"])
def test_a_model_is_cut_into_the_stages_of_a_pipeline(method: str) -> None:
    from torch.distributed.pipelining import SplitPoint, pipeline

    model, x = net(method), NET.x()
    made = pipeline(model.get_base_model(), mb_args=(x,), split_spec={"conv": SplitPoint.BEGINNING})
    assert made.num_stages == 2
    with torch.no_grad():
        close(made(x)[0], model(x))


def test_a_program_is_trained_as_the_model_is() -> None:
    model, x = net("ia3"), NET.x()
    run = program(model, x).module()
    run(x).square().sum().backward()
    model(x).square().sum().backward()
    found, wanted = dict(run.named_parameters()), dict(model.named_parameters())
    for name, p in wanted.items():
        if p.requires_grad:
            close(found[name].grad, p.grad, 1e-5)


class Keyed(nn.Module):
    """A model that is called by keywords, as transformers' are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, tokens: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return self.net(tokens) + shift[:, None]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("by", ["signature", "base"])
def test_sizes_of_keyword_arguments_are_named_as_the_base_model_names_them(by: str, strict: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed", "linear", "conv"], init_lora_weights=False)
    model = get_peft_model(Keyed(), config).eval()
    x = {"tokens": NET.x(), "shift": torch.randn(4, 5)}
    rows, length = Dim("rows", min=1, max=64), Dim("length", min=2, max=64)
    shapes = {key: {0: rows, 1: length} for key in x}
    with torch.no_grad():
        wanted = model(**x)
        if by == "signature":
            update_forward_signature(model)
        what = model if by == "signature" else model.get_base_model()  # which holds the adapters
        made = export(what, (), x, dynamic_shapes=shapes, strict=strict)
        close(made.module()(**x), wanted)
        larger = {"tokens": others(x["tokens"]), "shift": torch.randn(9, 10)}
        close(made.module()(**larger), what(**larger))


def test_an_exported_model_serves_the_adapter_that_was_active() -> None:
    model = adapted("ia3", NET, names=("one", "two"))
    x = NET.x()
    made = {}
    with torch.no_grad():
        for name in ("one", "two"):
            model.set_adapter(name)
            made[name] = program(model, x)
        for name in ("one", "two"):
            model.set_adapter(name)
            close(made[name].module()(x), model(x))


def test_a_model_with_two_active_adapters_is_exported() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False), "one")
    model.add_adapter("two", IA3Config(target_modules=["linear"], feedforward_modules=[], init_ia3_weights=False))
    model.base_model.set_adapter(["one", "two"])
    model, x = model.eval(), NET.x()
    right(program(model, x), model, x)
