"""LoRA+, LoRA-FA and the Riemannian preconditioner, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftWarning, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.a, self.n, self.c = nn.Embedding(10, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x):
        return self.c(self.n(torch.relu(self.a(self.e(x)))))


def adapted(**more):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["a", "e", "c"], "init_lora_weights": False, **more}
    return get_peft_model(Net(), LoraConfig(**options))


X = torch.arange(10)


def backward(model):
    model(X).square().mean().backward()


def names_of(model, group):
    named = {id(p): n.removeprefix("base_model.model.") for n, p in model.named_parameters()}
    return {named[id(p)] for p in group["params"]}


# ---- LoRA+ ----------------------------------------------------------------------------------------------------------


def test_b_has_a_rate_of_its_own_and_vectors_do_not_decay():
    model = adapted(modules_to_save=["n"], bias="lora_only")
    kwargs = {"loraplus_lr_ratio": 16, "loraplus_lr_embedding": 1e-3, "loraplus_weight_decay": 0.1, "eps": 1e-7}
    made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, **kwargs)
    assert type(made) is torch.optim.AdamW and made.defaults["eps"] == 1e-7
    found = [(names_of(model, g), g["lr"], g["weight_decay"]) for g in made.param_groups]
    assert found == [
        ({"a.lora_A.default.weight", "c.lora_A.default.weight"}, 1e-2, 0.1),
        ({"e.lora_embedding_A.default", "e.lora_embedding_B.default"}, 1e-3, 0.1),
        ({"a.lora_B.default.weight", "c.lora_B.default.weight"}, 0.16, 0.1),
        (
            {"a.base_layer.bias", "c.base_layer.bias", "n.modules_to_save.default.weight",
             "n.modules_to_save.default.bias"},
            0.16,
            0.0,
        ),
    ]  # fmt: skip


def test_every_trainable_parameter_is_optimised_once():
    model = adapted(use_dora=True, modules_to_save=["n"])
    made = create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=4)
    held = [id(p) for g in made.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_one_step_moves_each_factor_by_its_own_rate():
    model = adapted()
    made = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=5)
    layer = model.base_model.model.a
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = A.detach().clone(), B.detach().clone()
    backward(model)
    made.step()
    assert torch.allclose(A, before[0] - 0.1 * A.grad) and torch.allclose(B, before[1] - 0.5 * B.grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_loraplus_refuses_by_name(frozen):
    model = adapted().requires_grad_(not frozen)
    with pytest.raises(ValueError, match="no trainable" if frozen else "loraplus_lr_ratio"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=1 if frozen else 0)


# ---- LoRA-FA --------------------------------------------------------------------------------------------------------


def test_lorafa_freezes_a_and_steps_b_by_adamw_with_the_corrected_gradient():
    model = adapted(modules_to_save=["n"])
    made = create_lorafa_optimizer(model, 4, 6, lr=1e-2, weight_decay=0.1)
    layer = model.base_model.model.a
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    norm = model.base_model.model.n.modules_to_save["default"].weight
    moments, wanted = {B: [0, 0], norm: [0, 0]}, {B: B.detach().double(), norm: norm.detach().double()}
    first = A.detach().clone()
    for t in (1, 2, 3):
        made.zero_grad()
        backward(model)
        gram = torch.linalg.inv(first.double() @ first.double().mT + 1e-8 * torch.eye(4))
        for p, G in ((B, B.grad.double() @ gram / 1.5**2), (norm, norm.grad.double())):
            m, v = moments[p] = [0.9 * moments[p][0] + 0.1 * G, 0.999 * moments[p][1] + 0.001 * G * G]
            size = 1e-2 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            wanted[p] = (wanted[p] - size * m / (v.sqrt() + 1e-6)) * (1 - 1e-3)
        made.step()
        for p, value in wanted.items():
            assert torch.allclose(p.double(), value, atol=1e-5)
    assert torch.equal(A, first) and not A.requires_grad
    assert not model.base_model.model.e.lora_embedding_A["default"].requires_grad


def test_the_corrected_step_is_the_full_gradient_seen_through_a():
    """s dB A is the full gradient, projected on the rows of A."""
    model = adapted(target_modules=["c"])
    layer = model.base_model.model.c
    made = create_lorafa_optimizer(model, 4, 6, lr=1.0)
    layer.base_layer.weight.requires_grad_(True)
    backward(model)
    from peft.optimizers.lorafa import corrected

    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight
    moved = 1.5 * corrected(B.grad, A, 1.5) @ A
    projection = A.mT @ torch.linalg.inv(A @ A.mT) @ A
    assert torch.allclose(moved, layer.base_layer.weight.grad @ projection, atol=1e-5)
    assert isinstance(made, LoraFAOptimizer)


def test_each_pair_has_the_scaling_of_its_layer():
    model = adapted(rank_pattern={"c": 2}, use_rslora=True)
    made = create_lorafa_optimizer(model, 4, 6, lr=1.0)
    found = dict(zip(made.param_groups[0]["names"], made.param_groups[0]["scaling_factors"], strict=True))
    assert found["base_model.model.a.lora_B.default.weight"] == pytest.approx(3.0)
    assert found["base_model.model.c.lora_B.default.weight"] == pytest.approx(6 / math.sqrt(2))
    assert found["base_model.model.e.lora_embedding_B.default"] == pytest.approx(3.0)
    assert found["base_model.model.n.weight"] is None


def test_lorafa_tells_of_a_frozen_factor_that_is_zero():
    model = adapted(init_lora_weights=True)
    with pytest.warns(PeftWarning, match=r"lora_embedding_A.*learn nothing"):
        create_lorafa_optimizer(model, 4, 6, 1e-2)
    create_lorafa_optimizer(adapted(), 4, 6, 1e-2)  # warnings are errors here


def test_lorafa_learns_and_saves_its_state():
    model = adapted(init_lora_weights=True, target_modules=["a", "c"])
    made = create_lorafa_optimizer(model, 4, 6, lr=1e-2)
    losses = []
    for _ in range(10):
        made.zero_grad()
        loss = model(X).square().mean()
        losses.append(loss.item())
        loss.backward()
        made.step()
    assert losses[-1] < losses[0]
    again = create_lorafa_optimizer(model, 4, 6, lr=1e-2)
    again.load_state_dict(made.state_dict())
    assert again.state_dict()["state"].keys() == made.state_dict()["state"].keys()


def test_arguments_of_the_past_warn_and_wrong_ones_raise():
    model = adapted()
    with pytest.warns(FutureWarning, match="use_rslora"), pytest.raises(ValueError, match="use_rslora=True"):
        create_lorafa_optimizer(model, 4, 6, lr=1.0, use_rslora=True)
    with pytest.warns(FutureWarning, match="use_rslora"):
        create_lorafa_optimizer(model, 4, 6, lr=1.0, use_rslora=False)
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(KeyError, match="scaling_factors"):
        LoraFAOptimizer([{"params": [p], "names": ["p"]}]).step()
    p.grad = torch.ones(2)
    old = LoraFAOptimizer([{"params": [p], "names": ["p"], "scaling_factor": 2.0}])
    with pytest.warns(FutureWarning, match="scaling_factor"):
        old.step(lambda: torch.ones(1))
    for wrong in ({"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": -1}):
        with pytest.raises(ValueError, match="Invalid"):
            LoraFAOptimizer([p], **wrong)


# ---- Riemannian preconditioning -------------------------------------------------------------------------------------


def test_both_gradients_are_preconditioned_with_the_factors_before_the_step():
    model = adapted()
    made = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=0.05)
    layer = model.base_model.model.a
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a, b = A.detach().double(), B.detach().double()
    E = model.base_model.model.e.lora_embedding_B["default"]
    e = E.detach().clone()
    backward(model)
    G_A, G_B = A.grad.double(), B.grad.double()
    made.step()
    eye = 0.05 * torch.eye(4)
    assert torch.allclose(A.double(), a - 0.1 * torch.linalg.inv(b.mT @ b + eye) @ G_A, atol=1e-5)
    assert torch.allclose(B.double(), b - 0.1 * G_B @ torch.linalg.inv(a @ a.mT + eye), atol=1e-5)
    assert torch.allclose(E, e - 0.1 * E.grad), "what is no such pair takes a plain step"


def test_a_step_does_not_depend_on_how_the_product_is_split():
    moved = []
    for split in (1.0, 4.0):
        model = adapted(target_modules=["c"])
        layer = model.base_model.model.c
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            A.mul_(split)
            B.div_(split)
        before = (B @ A).detach()
        made = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-4, reg=0.0)
        backward(model)
        made.step()
        moved.append((B @ A - before).detach())
    assert torch.allclose(*moved, atol=1e-6, rtol=1e-2)


def test_the_preconditioned_optimiser_is_one_of_its_class():
    made = create_riemannian_optimizer(adapted(), torch.optim.AdamW, lr=0.1, weight_decay=0.3)
    assert isinstance(made, torch.optim.AdamW) and made.defaults["weight_decay"] == 0.3
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5**step)
    made.step()
    scheduler.step()
    assert made.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(
    ("error", "match", "run"),
    [
        (TypeError, "optimizer_cls", lambda m: create_riemannian_optimizer(m, int, lr=1)),
        (ValueError, "LBFGS", lambda m: create_riemannian_optimizer(m, torch.optim.LBFGS, lr=1)),
        (ValueError, "reg", lambda m: create_riemannian_optimizer(m, torch.optim.SGD, lr=1, reg=-1)),
        (
            ValueError,
            "closure",
            lambda m: create_riemannian_optimizer(m, torch.optim.SGD, lr=1).step(lambda: torch.ones(1)),
        ),
        (
            ValueError,
            "no trainable pair",
            lambda m: create_riemannian_optimizer(m.requires_grad_(False), torch.optim.SGD, lr=1),
        ),
    ],
)
def test_the_riemannian_optimiser_refuses_by_name(error, match, run):
    with pytest.raises(error, match=match):
        run(adapted())
