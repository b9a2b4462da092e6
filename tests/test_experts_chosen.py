"""Experts under adapters are computed where they are chosen; what comes out is what the whole W' gives."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.layouts import Around, Layout
from conformance.rows import adapted, close, train, tuner_layers
from peft import LoraConfig, get_peft_model
from peft.core.views.chosen import Chosen, Term, composed

E, O, I, N = 5, 6, 8, 7
INDEX = torch.tensor([3, 1, 1, 4, 0, 2, 3])
OFFS = torch.tensor([2, 2, 5, 6, 7], dtype=torch.int32)


def read_in_turns(W: Tensor, x: Tensor) -> Tensor:
    return torch.cat([F.linear(x[i : i + 1], W[e]) for i, e in enumerate(INDEX)])


def with_bias(W: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, W[2], torch.arange(float(O), dtype=x.dtype))


def many_positions(W: Tensor, x: Tensor) -> Tensor:
    return F.linear(x.view(1, N, I), W[-1])


FORMS = {
    "in turns": read_in_turns,
    "bias": with_bias,
    "positions": many_positions,
    "matmul": lambda W, x: x @ W[3].T,
    "matmul t": lambda W, x: torch.mm(x, W[3].t()),
    "reversed": lambda W, x: W[3] @ x.T,
    "transposed": lambda W, x: x @ W.transpose(1, 2)[1],
    "batched": lambda W, x: torch.bmm(W[INDEX], x.unsqueeze(-1)).squeeze(-1),
    "batched rows": lambda W, x: torch.bmm(x.unsqueeze(1), W[INDEX].transpose(-2, -1)),
    "all": lambda W, x: torch.bmm(x.expand(E, N, I), W.mT),
    "broadcast": lambda W, x: x @ W.mT,
    "slice": lambda W, x: torch.matmul(x, W[1:3].mT),
    "twice": lambda W, x: F.linear(x, W[1:3][0]),
    "einsum": lambda W, x: torch.einsum("ni,eoi->neo", x, W),
    "parts": lambda W, x: F.linear(x, W[0].chunk(2, 0)[1]),
    "mask": lambda W, x: x @ W[torch.tensor([True, False, True, False, False])].mT,
    "ellipsis": lambda W, x: F.linear(x, W[0, 2:4]),
    "vector": lambda W, x: W[0] @ x[0],
    "numbers": lambda W, x: W.sum(0) @ x.T,
    "whole first": lambda W, x: W.abs().sum() * F.linear(x, W[0]),
    "unbound": lambda W, x: F.linear(x, W.unbind(0)[1]),
    "as a vector of weights": lambda W, x: x @ W.flatten(0, 1).T,
}  # fmt: skip


def make(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def weight(dtype: torch.dtype = torch.float64, kinds: str = "low", rate: float = 0.0) -> tuple[Tensor, list[Term]]:
    torch.manual_seed(0)
    W, found = make(E, O, I, dtype=dtype), list[Term]()
    for r, kind in enumerate(kinds.split(), 2):
        g = make(E, O, dtype=dtype) if kind == "gained" else None
        A, B = (make(E, O, I), None) if kind == "dense" else (make(E, r, I, dtype=dtype), make(E, O, r, dtype=dtype))
        found.append(Term(A, B, r / 4, rate, g))
    return W, found


def whole(W: Tensor, terms: list[Term], passed: float = 1.0) -> Tensor:
    """W', for a dropout that multiplies with `passed`."""
    for t in terms:
        W = (W if t.g is None else W * t.g[..., None]) + passed * t.s * (t.A if t.B is None else t.B @ t.A)
    return W


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("kinds", ["low", "low low", "gained", "low gained dense", "gained gained low"])
@pytest.mark.parametrize("stored", ["as is", "transposed"])
@pytest.mark.parametrize("form", FORMS)
def test_every_use_gives_values_and_gradients_of_the_whole_weight(form, stored, kinds, rate, monkeypatch):
    """A dropout that multiplies with a number shows whether each update loses its input's features just once."""
    monkeypatch.setattr("peft.kernels.masks.dropout", lambda x, p: x * (1 - p))
    W, updates = weight(kinds=kinds, rate=rate)
    x = torch.randn(N, I, dtype=torch.float64, requires_grad=True)
    inputs = [x, W, *(f for t in updates for f in (t.A, t.B, t.g) if f is not None)]
    gain, terms = composed(updates)
    chosen = Chosen.of(W, terms, gain=gain)
    if stored == "transposed":  # as a view turns it for a module that stores (E, I, O), which turns it back
        chosen = Chosen.of(W, terms, turned=True, gain=gain).mT
    found, wanted = FORMS[form](chosen, x), FORMS[form](whole(W, updates, 1 - rate), x)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["in turns", "batched", "batched rows", "einsum", "reversed"])
def test_second_derivatives(form):
    W, updates = weight()
    x = torch.randn(N, I, dtype=torch.float64, requires_grad=True)
    (A, B, s, *_), W = updates[0], W.detach()
    run = lambda x, A, B: FORMS[form](Chosen.of(W, [Term(A, B, s)]), x).tanh()  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (x, A, B))


@pytest.mark.parametrize("kinds", ["low", "low gained"])
@pytest.mark.parametrize("rows", [N, N + 2])
def test_grouped_products(rows, kinds):
    W, updates = weight(torch.float32, kinds)
    x = torch.randn(rows, I)
    gain, terms = composed(updates)
    with torch.no_grad():
        found = F.grouped_mm(x, Chosen.of(W, terms, gain=gain).mT, offs=OFFS)
        wanted = F.grouped_mm(x, whole(W, updates).mT, offs=OFFS)
    torch.testing.assert_close(found[:N], wanted[:N])


def test_half_weights_under_float_adapters():
    W, updates = weight(torch.float32)
    half, x = W.detach().bfloat16(), torch.randn(N, I).bfloat16()
    for form in ("in turns", "batched", "batched rows", "einsum"):
        found = FORMS[form](Chosen.of(half, updates), x)
        assert found.dtype is torch.bfloat16
        wanted = FORMS[form](whole(half.float(), updates), x.float())
        torch.testing.assert_close(found.float(), wanted, rtol=4e-2, atol=4e-2)


def test_it_is_what_w_is_to_whom_asks():
    W, updates = weight()
    found = Chosen.of(W, updates, turned=True)
    assert (found.shape, found.ndim, found.dtype, found.device) == (W.mT.shape, 3, W.dtype, W.device)
    assert found.requires_grad
    assert not Chosen.of(W.detach(), [Term(t.A.detach(), t.B.detach(), t.s) for t in updates]).requires_grad
    assert len(found) == E
    assert isinstance(found, Tensor)
    assert found.data_ptr() != W.data_ptr()
    with pytest.raises(RuntimeError, match="past Python"), torch._C.DisableTorchFunctionSubclass():
        torch.add(found, 1)
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        torch.testing.assert_close(torch.add(found, 1), whole(W, updates).mT + 1)


# ---- in a model ----------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers", "5.0")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


class Routed(nn.Module):
    """Mixtral's experts, each token to two of them."""

    def __init__(self, implementation: str, count: int = 6, hidden: int = 8, inner: int = 16):
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_local_experts": count}
        config = transformers.MixtralConfig(**sizes, num_hidden_layers=1)
        config._experts_implementation = implementation
        self.experts = MixtralExperts(config)
        torch.manual_seed(0)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, torch.tensor([[0, 3], [3, 1], [5, 0]])[: len(x)], torch.full((len(x), 2), 0.5))


def routed(implementation: str, base: Any = None, **changes: Any) -> Any:
    config = LoraConfig(**{"r": 2, "target_parameters": PARAMETERS, "init_lora_weights": False, **changes})
    return get_peft_model(base or Routed(implementation), config).eval()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_transformers_run_as_merged_ones(implementation, dtype):
    model = routed(implementation, Routed(implementation).to(dtype))
    x = torch.randn(3, 8).to(dtype)
    with torch.no_grad():
        found = model(x)
        wanted = copy.deepcopy(model).float().merge_and_unload()(x.float())
    torch.testing.assert_close(found.float(), wanted, **({} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}))


def test_dropout_takes_features_of_each_token_at_each_expert():
    eye = torch.eye(I, dtype=torch.float64).expand(2, I, I)
    seen_through = Chosen.of(torch.zeros(2, I, I, dtype=torch.float64), [Term(eye, eye, 1.0, 0.25)])
    x = torch.ones(1000, I, dtype=torch.float64)
    one, two = F.linear(x, seen_through[0]), F.linear(x, seen_through[1])
    for left in (one, two):
        assert set(left.unique().tolist()) == {0.0, 1 / 0.75}
        assert left.mean().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(one, two)
    assert len(one.unique(dim=0)) > 50  # each token its own
    whole = (seen_through + 0)[0]  # no product: features of an expert, for whatever tokens come
    assert torch.equal(whole, torch.diag(whole.diagonal()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=str)
def test_dropout_of_experts_is_in_training_alone(implementation, changes, dtype):
    model, x = routed(implementation, Routed(implementation).to(dtype), lora_dropout=0.5, **changes), torch.randn(3, 8)
    x = x.to(dtype)
    with torch.no_grad():
        plain, base = model(x), Routed(implementation).to(dtype)(x)
        merged = copy.deepcopy(model).merge_and_unload()(x)
    close(plain, merged, 1e-5 if dtype is torch.float32 else 3e-2)
    first, second = model.train()(x), model(x)
    assert first.dtype is dtype
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), base)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_whole_weight(implementation, dora, monkeypatch):
    model, x = routed(implementation, use_dora=dora), torch.randn(3, 8, requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    assert len(wanted) == (7 if dora else 5)
    short = torch.autograd.grad(model(x).square().sum(), wanted)
    monkeypatch.setattr("peft.core.stack.transformed", lambda: True)
    plain = torch.autograd.grad(model(x).square().sum(), wanted)
    for a, b in zip(short, plain, strict=True):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if type(a) in (Tensor, nn.Parameter)}
        if type(out) is Tensor and out.untyped_storage().data_ptr() not in known:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_of_the_size_of_all_experts_is_made(implementation):
    model = routed(implementation, Routed(implementation, count=32))
    bare, x = Routed(implementation, count=32), torch.randn(1, 8)
    sizes = []
    for run in (bare, model, model):
        with torch.no_grad(), Largest() as seen:
            run(x)
        sizes.append(seen.most)
    assert sizes[1] <= max(p.numel() for n, p in model.named_parameters() if "lora_B" in n)  # once, in another order
    assert sizes[2] <= max(sizes[0], 2 * 32 * 8)
    assert sizes[2] < 32 * 8 * 16 / 4


def written(model):
    tuner_layers(model)[0][1].lora_B["default"].weight.mul_(2)


def new_data(model):
    weight = tuner_layers(model)[1][1].lora_A["default"].weight
    weight.data = torch.randn_like(weight)


def scaled(model):
    tuner_layers(model)[0][1].set_scale("default", 7.0)


def base_written(model):
    with torch.no_grad():
        tuner_layers(model)[0][1].get_base_layer().gate_up_proj.add_(0.1)


def trained_past_counting(model):
    model.train()
    for _, layer in tuner_layers(model):
        layer.lora_B["default"].weight.data.add_(1)
    model.eval()


@pytest.mark.parametrize("change", [written, new_data, scaled, base_written, trained_past_counting])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_laid_out_anew_follows_the_adapter(implementation, change, dora):
    model, x = routed(implementation, use_dora=dora), torch.randn(3, 8)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(model(x), before)
        change(model)
        found = model(x)
        assert not torch.allclose(found, before)
        wanted = copy.deepcopy(model).merge_and_unload()(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation, most", [("eager", 330), ("batched_mm", 300)])
def test_a_token_costs_so_many_calls(implementation, most):
    """Counted with those of built-in functions, less than the bare module's."""
    x, found = torch.randn(1, 8), []
    for model in (Routed(implementation), routed(implementation).base_model.model):
        with torch.no_grad():
            for _ in range(3):
                model(x)
            seen: list[str] = []
            sys.setprofile(lambda frame, event, arg, seen=seen: seen.append(event) if "call" in event else None)
            model(x)
            sys.setprofile(None)
        found.append(len(seen))
    assert found[1] - found[0] <= most


def test_training_lays_nothing_out():
    model, x = routed("eager"), torch.randn(3, 8)
    model.train()(x).sum().backward()
    assert not any(layer.adapters["default"].cache.get("kept") for _, layer in tuner_layers(model))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_dropout": 0.2}], ids=str)
def test_autocast(implementation, changes):
    model, x = routed(implementation, **changes), torch.randn(3, 8)
    with torch.no_grad():
        wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        close(model(x).float(), wanted, 3e-2)
        with torch.no_grad():
            close(model(x).float(), wanted, 3e-2)
        model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_two_active_adapters():
    model, x = routed("eager"), torch.randn(3, 8)
    model.add_adapter("b", model.peft_config["default"])
    with torch.no_grad():
        model.base_model.set_adapter(["default", "b"])
        both = model(x)
        torch.testing.assert_close(both, copy.deepcopy(model).merge_and_unload()(x), rtol=1e-4, atol=1e-5)


EXPERTS = Layout(
    "experts-by-index",
    lambda: Around(ByIndex()),
    (3, 8),
    {"target_modules": [], "target_parameters": ["layer.up"]},
)  # fmt: skip


class ByIndex(nn.Module):
    """A module of nobody's: a stack of matrices read by index."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(row, self.up[i]) for i, row in zip([2, 0, 3], x, strict=True)])


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "vera", "rslora", "pissa"])
def test_low_rank_methods_on_a_module_of_nobodys(method, monkeypatch):
    model, x = adapted(method, EXPERTS), torch.randn(3, 8)
    train(model)
    with torch.no_grad():
        found = model(x)
        ((_, layer),) = tuner_layers(model)
        assert layer.stack(("default",)).chosen() is not None
        monkeypatch.setattr("peft.core.stack.transformed", lambda: True)
        assert layer.stack(("default",)).chosen() is None
        close(found, model(x), 1e-5)


def test_forward_mode_and_graphs_take_the_whole_weight():
    model, x = routed("eager").double(), torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
        step = (model(x + 1e-6) - model(x - 1e-6)) / 2e-6
        torch.testing.assert_close(tangent, step, rtol=1e-4, atol=1e-6)
        model = adapted("lora", EXPERTS)
        x = torch.randn(3, 8)
        close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), 1e-5)
        close(torch.vmap(model)(x.expand(2, 3, 8)), model(x).expand(2, 3, 6), 1e-5)
