"""torch.func and derivatives of higher order: functional_call, grad, jvp, hessian, and vmap over stacked adapters.

What is differentiated is what the formulas say, with the constants that papers state (the norm of DoRA): forward mode
and differentiating twice must agree with them wherever a quick form runs in an ordinary training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from conformance.layouts import LAYOUTS
from conformance.rows import FEW, adapted, cells, close, expected, train
from peft import LoraConfig, get_peft_model

State = dict[str, Tensor]
EVERY = [c for c in cells() if c[1] == "linear-3-D"] + [c for c in cells(FEW) if c[1] in ("conv-2d", "embedding")]
FIVE = ("lora", "dora", "ia3", "loha", "oft")


def leaves(model: nn.Module) -> State:
    """The trained tensors by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def values_of(model: nn.Module) -> State:
    """Their numbers, as a function's argument."""
    return {n: p.detach().clone() for n, p in leaves(model).items()}


def direction(values: State) -> State:
    """A direction to move them in."""
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(v.shape, generator=generator).to(v) for n, v in values.items()}


def loss_of(y: Tensor) -> Tensor:
    """One number, of which second derivatives say something about every output."""
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).cos().view(y.shape)  # nothing random under vmap
    return (weights * y).sum() + (weights * y).square().sum()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def along(y: Tensor, held: State, t: State) -> Tensor:
    """How y changes when the leaves move along t, by reverse mode alone."""
    v = torch.zeros_like(y, requires_grad=True)
    back = torch.autograd.grad((y * v).sum(), list(held.values()), create_graph=True)
    return torch.autograd.grad(sum((g * t[n]).sum() for n, g in zip(held, back, strict=True)), v, retain_graph=True)[0]


def twice(y: Tensor, held: State, t: State) -> Tensor:
    """The second derivative of the loss times t, by differentiating a backward pass."""
    first = torch.autograd.grad(loss_of(y), list(held.values()), create_graph=True)
    step = sum((g * t[n]).sum() for n, g in zip(held, first, strict=True))
    found = torch.autograd.grad(step, list(held.values()), allow_unused=True, retain_graph=True)
    return flat(torch.zeros_like(p) if g is None else g for g, p in zip(found, held.values(), strict=True))


def several(values: State, count: int = 3) -> list[State]:
    """States like this one with other numbers."""
    generator = torch.Generator().manual_seed(9)
    return [
        {n: v + 0.1 * torch.randn(v.shape, generator=generator).to(v) for n, v in values.items()} for _ in range(count)
    ]


def stacked(states: list[State]) -> State:
    return {n: torch.stack([s[n] for s in states]) for n in states[0]}


@pytest.mark.parametrize("method, name", EVERY)
def test_derivatives_of_both_modes_and_orders_are_those_of_the_formulas(method: str, name: str) -> None:
    layout = LAYOUTS[name]
    model, x = adapted(method, layout), layout.x()
    held, values = leaves(model), values_of(model)
    t = direction(values)
    wanted = expected(model, method, layout, x)

    def run(state: State) -> Tensor:
        return functional_call(model, state, (x,))

    y, tangent = jvp(run, (values,), (t,))
    close(y, wanted.detach(), 1e-5)
    close(tangent, along(wanted, held, t), 2e-5)
    second = twice(wanted, held, t)
    close(twice(model(x), held, t), second, 1e-4)
    slope, curve = jvp(grad(lambda state: loss_of(run(state))), (values,), (t,))
    close(flat(slope.values()), flat(torch.autograd.grad(loss_of(wanted), list(held.values()))), 2e-5)
    close(flat(curve.values()), second, 1e-4)


@pytest.mark.parametrize("method, name", EVERY)
def test_stacked_adapters_run_as_one_by_one(method: str, name: str) -> None:
    layout = LAYOUTS[name]
    model, x = adapted(method, layout), layout.x()
    states = several(values_of(model))

    def run(state: State) -> Tensor:
        return functional_call(model, state, (x,))

    def loss(state: State) -> Tensor:
        return loss_of(run(state))

    found, slopes = vmap(run)(stacked(states)), vmap(grad(loss))(stacked(states))
    for i, state in enumerate(states):
        close(found[i], run(state), 1e-5)
        close(flat(g[i] for g in slopes.values()), flat(grad(loss)(state).values()), 2e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_several_gradients_at_once_beside_half_precision(rate: float, dora: bool) -> None:
    model = half(torch.bfloat16, lora_dropout=rate, use_dora=dora)()
    held = list(leaves(model).values())
    y = model(torch.randn(5, 6).bfloat16()).float().flatten()[:3]
    found = torch.autograd.grad(y, held, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(y):
        for several, wanted in zip(found, torch.autograd.grad(one, held, retain_graph=True), strict=True):
            close(several[i], wanted, 3e-2)


@pytest.mark.parametrize("method, name", EVERY)
def test_several_gradients_at_once_are_those_one_by_one(method: str, name: str) -> None:
    layout = LAYOUTS[name]
    model, x = adapted(method, layout).train(), layout.x()
    held = [*leaves(model).values(), *([] if layout.tokens else [x.requires_grad_()])]
    y = model(x).flatten()[:3]
    found = torch.autograd.grad(y, held, torch.eye(3), is_grads_batched=True, retain_graph=True, allow_unused=True)
    for i, one in enumerate(y):
        for several, wanted in zip(
            found, torch.autograd.grad(one, held, retain_graph=True, allow_unused=True), strict=True
        ):
            if wanted is not None and several is not None:
                close(several[i], wanted, 1e-4)
            else:
                assert several is wanted is None


def test_loaded_adapters_are_stacked_under_the_names_of_one() -> None:
    names = ("one", "two", "three")
    model = adapted("lora", LAYOUTS["linear-3-D"], names=names)
    xs = torch.randn(3, 4, 3, 6)  # a batch for each

    def state(name: str) -> list[Tensor]:
        return [p for key, p in model.named_parameters() if f".{name}." in f"{key}."]

    keys = [key for key, _ in model.named_parameters() if ".one." in f"{key}."]
    together = {key: torch.stack(each) for key, *each in zip(keys, *map(state, names), strict=True)}
    found = vmap(lambda held, x: functional_call(model, held, (x,)))(together, xs)
    for name, x, y in zip(names, xs, found, strict=True):
        model.set_adapter(name)
        close(y, model(x))


@pytest.mark.parametrize("method", FIVE)
def test_a_hessian_is_that_of_two_backward_passes(method: str) -> None:
    layout = LAYOUTS["linear"]
    model, x = adapted(method, layout), layout.x()
    values = values_of(model)
    t = direction(values)
    H = hessian(lambda state: loss_of(functional_call(model, state, (x,))))(values)
    found = [sum(torch.tensordot(H[a][b], t[b], dims=t[b].dim()) for b in values) for a in values]
    close(flat(found), twice(model(x), leaves(model), t), 1e-4)


@pytest.mark.parametrize("method", ["lora", "vera", "waveft"])
def test_whole_models_are_stacked_with_their_buffers(method: str) -> None:
    layout = LAYOUTS["linear-3-D"]
    models, x = [adapted(method, layout) for _ in range(2)], layout.x()
    state = torch.func.stack_module_state(models)
    with torch.no_grad():
        found = vmap(lambda parameters, buffers: functional_call(models[0], (parameters, buffers), (x,)))(*state)
        for y, model in zip(found, models, strict=True):
            close(y, model(x), 1e-5)


@pytest.mark.parametrize("method", FIVE)
def test_bases_are_stacked_too(method: str) -> None:
    layout = LAYOUTS["linear-3-D"]
    model, x = adapted(method, layout), layout.x()
    states = several({n: p.detach() for n, p in model.named_parameters()})
    with torch.no_grad():
        before = model(x)
        found = vmap(lambda state: functional_call(model, state, (x,)))(stacked(states))
        for y, state in zip(found, states, strict=True):
            model.load_state_dict({**model.state_dict(), **state})
            close(y, model(x), 1e-5)
        assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "boft", "oft"])
def test_dual_numbers_pass_through_a_layer(method: str) -> None:
    layout = LAYOUTS["conv-2d"]
    model, x = adapted(method, layout), layout.x()
    generator = torch.Generator().manual_seed(1)
    moved = torch.randn(x.shape, generator=generator)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, moved))).tangent
    leaf = x.clone().requires_grad_()
    close(found, along(expected(model, method, layout, leaf), {"x": leaf}, {"x": moved}), 1e-5)


# ---- where quick forms keep less than plain ones ----------------------------------------------------------------


def half(dtype: torch.dtype, **changes: Any) -> Callable[[], nn.Module]:
    """Two layers, the first adapted, in a dtype with adapters in float32."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False, **changes)
        model = get_peft_model(base, config).train()
        train(model)
        return model

    return make


@pytest.mark.parametrize("frozen", ["", "lora_A", "lora_B"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype, rate", [(torch.bfloat16, 0.0), (torch.bfloat16, 0.3), (torch.float32, 0.3)], ids=str)
def test_training_steps_with_dropout_and_half_precision_are_differentiated_twice(
    dtype: torch.dtype, rate: float, dora: bool, frozen: str
) -> None:
    model = half(dtype, lora_dropout=rate, use_dora=dora)()
    for key, p in model.named_parameters():
        if frozen and frozen in key:
            p.requires_grad_(False)
    held = leaves(model)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    values = {**values_of(model), "x": x.detach()}
    t = direction(values)

    def run(state: State) -> Tensor:
        torch.manual_seed(1)
        own = {n: v for n, v in state.items() if n != "x"}
        return functional_call(model, own, (state["x"],)).float()

    torch.manual_seed(1)
    y = model(x).float()
    close(run(values), y)  # the same draws
    found = twice(y, {**held, "x": x}, t)
    wanted = twice_plainly(run, values, t)
    close(found.float(), wanted.float(), 5e-2 if dtype is torch.bfloat16 else 1e-4)


def twice_plainly(run: Callable[[State], Tensor], values: State, t: State) -> Tensor:
    """`twice` under torch.func, where plain forms run."""
    _, curve = jvp(grad(lambda state: loss_of(run(state))), (values,), (t,))
    return flat(curve.values())
