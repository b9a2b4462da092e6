"""Methods that start from singular values or the largest weights: PSOFT, TinyLoRA, OSF, Super-Tuning."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft
from conformance.rows import close
from peft import (
    OSFConfig,
    PeftModel,
    PeftWarning,
    PsoftConfig,
    SupertuningConfig,
    TinyLoraConfig,
    get_peft_model,
    inject_adapter_in_model,
)


class Net(nn.Module):
    """Three layers, of which the last is small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
TARGETS = {"target_modules": ["up", "down"]}
CASES = [
    (PsoftConfig, {"r": 3}),
    (PsoftConfig, {"r": 3, "psoft_svd": "lowrank"}),
    (PsoftConfig, {"r": 1}),  # nothing to turn, magnitudes alone
    (TinyLoraConfig, {"u": 4}),
    (TinyLoraConfig, {"u": 4, "save_projection": False, "weight_tying": 0.5}),
    (OSFConfig, {"effective_rank": 2}),
    (SupertuningConfig, {"sparsity": 0.5}),
    (SupertuningConfig, {"sparsity": 0.5, "r": 2, "save_precomputed_indices": False}),
]


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn(tensor.shape, generator=generator) / 2)
    return model.eval()


@pytest.mark.filterwarnings("ignore:save_projection=False")
@pytest.mark.parametrize("kind, fields", CASES)
def test_training_starts_at_the_base_and_files_bring_back_the_rest(kind, fields, tmp_path):
    model = get_peft_model(Net(), kind(**fields, **TARGETS))
    torch.testing.assert_close(model(X), Net()(X), rtol=0, atol=1e-6)
    trained(model)
    assert not torch.allclose(model(X), Net()(X), atol=1e-2)
    model.save_pretrained(tmp_path)
    for meta in (False, True):
        again = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=meta)
        assert torch.equal(again.eval()(X), model(X))


@pytest.mark.parametrize("kind, fields", [case for case in CASES if case[1].get("save_projection", True)])
def test_files_say_the_same_over_a_base_in_double_precision(kind, fields, tmp_path):
    """What they leave to the base (signs of singular vectors ...) is what it was in single precision."""
    for seed in range(4):
        plain = Net()
        torch.manual_seed(seed)
        for layer in (plain.up, plain.down):
            layer.reset_parameters()
        double = copy.deepcopy(plain).double()
        model = trained(get_peft_model(plain, kind(**fields, **TARGETS)), seed)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(double, tmp_path).eval()
        torch.testing.assert_close(again(X.double()).float(), model(X), rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [PsoftConfig(r=3, **TARGETS), OSFConfig(effective_rank=2, **TARGETS)])
def test_what_comes_from_the_base_follows_it(config):
    model = trained(get_peft_model(Net(), config))
    other = {k: v + 0.1 * torch.ones_like(v) for k, v in Net().state_dict().items()}
    peft.set_base_model_state_dict(model, other)
    fresh = Net()
    fresh.load_state_dict(other)
    fresh = get_peft_model(fresh, config)
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(model))
    torch.testing.assert_close(fresh.eval()(X), model(X))


def test_psoft_keeps_angles_and_lengths_within_its_subspace():
    layer = trained(get_peft_model(Net(), PsoftConfig(r=3, psoft_mag_a=False, psoft_mag_b=False, **TARGETS)))
    layer = layer.base_model.model.up
    W, D = layer.weight.detach(), layer.get_delta_weight("default")
    assert not torch.allclose(D, torch.zeros_like(D), atol=1e-2)
    torch.testing.assert_close(torch.linalg.svdvals(W + D), torch.linalg.svdvals(W))


def test_the_series_of_psoft_never_leaves_its_bound():
    config = PsoftConfig(r=3, use_cayley_neumann=True, cayley_neumann_eps=0.1, num_cayley_neumann_terms=8, **TARGETS)
    layer = trained(get_peft_model(Net(), config), seed=3).base_model.model.up
    p = layer.adapters["default"]
    R = p.method.rotation(p) / p.psoft_R.vector_b[:, None] / p.psoft_R.vector_a
    torch.testing.assert_close(R @ R.mT, torch.eye(3), atol=1e-4, rtol=0)


def test_what_osf_learns_stays_orthogonal_to_the_leading_directions():
    model = get_peft_model(Net(), OSFConfig(effective_rank=2, **TARGETS))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    for layer in (model.base_model.model.up, model.base_model.model.down):
        U, _, Vh = torch.linalg.svd(layer.weight.detach())
        low = layer.osf_svd_params["default"]
        assert not torch.allclose(low["U_low"], U[:, 2:6], atol=1e-3)
        torch.testing.assert_close(U[:, :2].mT @ low["U_low"].detach(), torch.zeros(2, 4), atol=1e-6, rtol=0)
        torch.testing.assert_close(low["V_low"].detach() @ Vh[:2].mT, torch.zeros(4, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(24, 20), (20, 24), (24, 24)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_gradients_of_osf_are_projected_with_few_rows_as_with_many(rows, sizes, dtype):
    """As G - H H' G of the unprojected gradient, for the leading directions H: few rows are projected in its place."""
    torch.manual_seed(rows)
    base = nn.Sequential(nn.Linear(*sizes)).to(dtype)
    model = get_peft_model(base, OSFConfig(effective_rank=6, init_weights=False, target_modules=["0"]))
    layer, x = model.base_model.model[0], torch.randn(rows, sizes[0], dtype=dtype, requires_grad=True)
    low, weight = layer.osf_svd_params["default"], layer.weight.detach().float()
    U, S, Vh = (t.to(dtype).float() for t in torch.linalg.svd(weight, full_matrices=False))
    held = {name: low[name].detach().requires_grad_() for name in low}
    first = (U[:, 6:] * S[6:]) @ Vh[6:]
    z = x.detach().float().requires_grad_()
    wanted = z @ (weight - first + (held["U_low"] * held["S_low"]) @ held["V_low"]).mT + layer.bias.float()
    y = model(x)
    close(y.float(), wanted, 1e-5 if dtype is torch.float32 else 8e-3)
    g = torch.randn_like(y)
    y.backward(g)
    dU, dS, dV, dx = torch.autograd.grad(wanted, [*(held[f"{name}_low"] for name in "USV"), z], g.float())
    high, right = U[:, :6], Vh[:6]
    if dtype is torch.float32:  # what a rounded basis spans is no complement of what another does
        dU, dV = dU - high @ (high.mT @ dU), dV - dV @ right.mT @ right
        close(low["U_low"].grad, dU, 1e-4)
        close(low["V_low"].grad, dV, 1e-4)
    rounding = 1e-4 if dtype is torch.float32 else 8e-3
    close(low["S_low"].grad, dS, rounding)
    close(x.grad.float(), dx, rounding)


def test_a_step_of_osf_with_one_row_makes_no_products_of_matrices():
    """No product of the gradient's size, d x m, with a basis of m vectors."""
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), OSFConfig(target_modules=["0"]))
    with torch.profiler.profile(with_flops=True) as seen:
        model(torch.randn(1, 64)).sum().backward()
    assert 0 < sum(event.flops for event in seen.key_averages()) <= 2 * 64 * (64 + 15 * 32)
    model(torch.empty(0, 64)).sum().backward()  # no rows at all


@pytest.mark.parametrize(
    "rank, kept", [(None, 3), (2, 2), (0.5, 3), (1.0, 6), (2.0, 2), (100, 6)]
)  # of the 6 directions of a layer
def test_osf_reads_ranks_as_numbers_and_shares(rank, kept, tmp_path):
    with pytest.warns(PeftWarning, match="nothing is trained there") if kept == 6 else _quiet():
        model = get_peft_model(Net(), OSFConfig(effective_rank=rank, **TARGETS))
    assert model.base_model.model.up.effective_rank["default"] == kept
    assert model.base_model.model.up.osf_svd_params["default"]["S_low"].shape == (6 - kept,)
    model.save_pretrained(tmp_path)
    assert (
        load_file(tmp_path / "adapter_model.safetensors")["base_model.model.up.osf_svd_params.S_low"].numel()
        == 6 - kept
    )


def test_osf_that_keeps_all_directions_is_the_base_on_every_path():
    conv = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Linear(4, 2))
    x = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1))
    with pytest.warns(PeftWarning, match="nothing is trained there"):
        model = get_peft_model(copy.deepcopy(conv), OSFConfig(effective_rank=9, target_modules=["0", "1"])).eval()
        model.add_adapter("other", OSFConfig(effective_rank=9, target_modules=["0", "1"]))
    torch.testing.assert_close(model(x), conv(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=["default", "other"]), conv(x))
        model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum", combination_type="exact")
        model.set_adapter("sum")
        torch.testing.assert_close(model(x), conv(x))


class _quiet:
    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


def test_the_ranks_of_osf_are_found_anywhere_in_a_name():
    model = get_peft_model(Net(), OSFConfig(effective_rank=2, rank_pattern={"ow": 4, "^up$": 0.5}, **TARGETS))
    layers = model.base_model.model
    assert (layers.down.effective_rank["default"], layers.up.effective_rank["default"]) == (4, 3)
    assert {"up", "down", "head"} == get_peft_model(Net(), OSFConfig(effective_rank=1)).peft_config[
        "default"
    ].target_modules


def test_tinylora_shares_vectors_between_neighbours():
    model = get_peft_model(Net(), TinyLoraConfig(u=4, weight_tying=0.5, target_modules=["up", "down", "head"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.tinylora_v.0.default",
        "base_model.tinylora_v.1.default",
    }
    layers = model.base_model.model
    vectors = [layer.adapters["default"].vector for layer in (layers.up, layers.down, layers.head)]
    assert vectors == ["tinylora_v.0", "tinylora_v.1", "tinylora_v.1"]
    model.add_adapter("all", TinyLoraConfig(u=2, weight_tying=1.0, **TARGETS))
    model.set_adapter("all")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.tinylora_v.0.all"]
    names = dict(model.named_parameters())
    found = torch.func.functional_call(model, {n: t + 1 for n, t in names.items() if "tinylora" in n}, (X,))
    assert not torch.allclose(found, model(X))


def test_shared_vectors_need_a_model_that_holds_them():
    for config in (
        TinyLoraConfig(**TARGETS),
        peft.VeraConfig(**TARGETS),
        peft.VBLoRAConfig(vector_length=2, **TARGETS),
    ):
        with pytest.raises(ValueError, match="only a PeftModel can hold"):
            inject_adapter_in_model(config, Net())


def test_a_swap_never_takes_zeros_for_nothing(tmp_path):
    small = trained(get_peft_model(Net(), PsoftConfig(r=3, target_modules=["up"])))
    small.save_pretrained(tmp_path)
    model = trained(get_peft_model(Net(), PsoftConfig(r=3, **TARGETS)), seed=2)
    before = model(X)
    with pytest.raises(RuntimeError, match="none that leave a layer as it is"):
        peft.utils.hotswap.hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(model(X), before)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: PsoftConfig(use_cayley_neumann=True, cayley_neumann_eps=1.5), "between 0 and 1"),
        (lambda: PsoftConfig(ab_svd_init="lora"), "psoft_init"),
        (lambda: TinyLoraConfig(weight_tying=2.0), r"in \[0, 1\]"),
        (lambda: TinyLoraConfig(module_config={"up": {"u": 3}}), "counted together"),
        (lambda: SupertuningConfig(lora_alpha=2.0), "Set r as well"),
        (lambda: SupertuningConfig(sparsity=1.0), "sparsity"),
        (lambda: get_peft_model(Net(), SupertuningConfig(sparsity=0.99, **TARGETS)), "leaves none of 'up'"),
        (lambda: get_peft_model(Net(), PsoftConfig(r=7, **TARGETS)), "more than the 6 directions"),
        (lambda: get_peft_model(Net(), OSFConfig(effective_rank=0, **TARGETS)), "Keep at least one"),
    ],
)
def test_mistakes_are_told(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: PsoftConfig(cayley_neumann_eps=0.5), "no effect without the series"),
        (lambda: SupertuningConfig(lora_dropout=0.1), "no effect without a LoRA"),
        (lambda: OSFConfig(target_svd_config={"up": 2}), "target_svd_config has no effect"),
        (lambda: TinyLoraConfig(save_projection=False), "drawn again from projection_seed"),
    ],
)
def test_fields_without_effect_are_told(make, words):
    with pytest.warns(PeftWarning, match=words):
        make()
