"""Lily's shared factors, FRoD's shared basis, and what GLoRA and PEANuT refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peft
from conformance.layouts import LAYOUTS
from conformance.rows import adapted, close
from peft import FrodConfig, GloraConfig, LilyConfig, PeanutConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.core.shared import Sight, shared_of
from peft.core.views import view_of
from peft.methods.frod import basis
from peft.methods.frod.basis import kind_of, number_of
from peft.methods.frod.method import FRoD
from peft.methods.lily import suffix


class Net(nn.Module):
    """Four blocks of two layers, one of which has another size in the last block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = [6, 6, 6, 6, 8]
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(6, width[i + 1]), "out": nn.Linear(width[i + 1], 6)}) for i in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = block["out"](torch.tanh(block["fc"](x)))
        return x


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def lily(**more) -> LilyConfig:
    return LilyConfig(**{"target_modules": ["fc", "out"], "r": 3, "init_weights": False, **more})


def held(model: PeftModel, home: str, adapter: str = "default", leaf: str = "fc") -> list[nn.Module]:
    return [getattr(block[leaf], home)[adapter] for block in model.base_model.model.layers]


# ---- Lily --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["fc", "out"], r".*(fc|out)$"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_plan_counts_shared_factors_once(stride, targets):
    config = lily(stride_A=stride, target_modules=targets)
    planned = peft.plan(Net(), config)
    model = get_peft_model(Net(), config)
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("adapter", ["default", "second"])
def test_layers_of_one_kind_share_their_factors(adapter):
    model = get_peft_model(Net(), lily(stride_A=2))
    model.add_adapter("second", lily(stride_A=2))
    A, B = held(model, "lily_A", adapter), held(model, "lily_B", adapter)
    assert A[0] is A[1] and A[2] is not A[0] and A[3] is not A[2]  # the last has another size
    assert B[0] is B[1] is B[2] and B[3] is not B[0]
    assert len({id(m) for m in held(model, "lily_router", adapter)}) == 4
    assert held(model, "lily_B", adapter, "out")[0] is not B[0]


def test_a_file_holds_the_shared_factors_for_every_layer_and_they_are_shared_again(tmp_path):
    model = get_peft_model(Net(), lily(stride_A=2))
    state = get_peft_model_state_dict(model)
    assert len(state) == 24
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=low, is_trainable=True)
        assert torch.equal(loaded(X), model(X))
        A = held(loaded, "lily_A")
        assert A[0].weight is A[1].weight and A[0].weight is not A[2].weight


def test_an_adapter_of_another_tuner_shares_too():
    model = peft.PeftMixedModel(Net(), peft.LoraConfig(target_modules=["out"]), "default")
    model.add_adapter("second", lily())
    assert held(model, "lily_B", "second")[0] is held(model, "lily_B", "second")[2]


def test_a_deep_copy_shares_within_itself():
    model = get_peft_model(Net(), lily())
    twin = copy.deepcopy(model)
    assert held(twin, "lily_B")[0] is held(twin, "lily_B")[1] is not held(model, "lily_B")[0]


def test_the_kind_of_a_layer_is_the_target_that_selects_it():
    assert suffix("layers.0.self_attn.out", ["out", "self_attn.out"]) == "self_attn.out"
    assert suffix("layers.0.out", None) == "out" and suffix("layers.0.out", ".*out") == ""


@pytest.mark.parametrize("targets", ["all-linear", ["fc", "out"]])
@pytest.mark.parametrize("layers", [2, 12])
def test_layers_share_alike_before_and_after_a_file(targets, layers, tmp_path):
    """ "all-linear" stands for names, which files hold: of twenty layers and more those that select them by kind."""

    def net() -> nn.Module:
        return nn.Sequential(*[nn.ModuleDict({"fc": nn.Linear(6, 6), "out": nn.Linear(6, 6)}) for _ in range(layers)])

    model = get_peft_model(net(), LilyConfig(r=2, target_modules=targets))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lily_B" in name}
    assert len(trained) == (4 if targets == "all-linear" and layers == 2 else 2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad and "lily_B" in name} == trained


def test_layers_that_an_expression_selects_share_by_their_shapes():
    """As in the original library, which keeps one B for all of them when it reads the file."""
    base = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 4)})
    model = get_peft_model(nn.Sequential(base), LilyConfig(r=2, target_modules=r"0\.[abc]")).base_model.model[0]
    B = [model[name].lily_B["default"].weight for name in "abc"]
    assert B[0] is B[1] is not B[2]


def test_factors_may_lie_in_memory_in_any_order():
    layout = LAYOUTS["linear-3-D"]
    model, x = adapted("lily", layout), layout.x()
    wanted = model(x)
    for name, p in model.named_parameters():
        if "lily" in name:
            p.data = p.data.mT.contiguous().mT
    close(model(x), wanted)


def test_it_cannot_be_merged_and_says_why():
    model = get_peft_model(Net(), lily())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="mixes its experts as the input has it"):
            merge()


def test_layers_that_torch_would_fuse_are_called_with_their_input():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = get_peft_model(block, lily(target_modules=["linear1", "linear2"])).eval()
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2))
    slow = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)
        with model.disable_adapter():
            assert not torch.allclose(model(x), slow, atol=1e-3)


# ---- FRoD --------------------------------------------------------------------------------------------------------


def frod(**more) -> FrodConfig:
    fields = {"target_modules": ["fc", "out"], "sparse_rate": 0.2, "progressbar": False, "init_weights": False}
    return FrodConfig(**{**fields, **more})


@pytest.mark.parametrize(
    ("path", "kind", "number"),
    [
        ("fc", "fc", None),
        ("layers.3.fc", "fc", 3),
        ("model.2.layers.1.self_attn.q_proj", "self_attn_q_proj", 1),
        ("encoder.4.attention.output.dense", "attention_output", 4),
        ("encoder.4.output.dense", "output_dense", 4),
        ("block.0.base_layer.out_proj", "out_proj", 0),
    ],
)
def test_layers_are_sorted_by_the_end_of_their_path_and_by_number(path, kind, number):
    assert (kind_of(path), number_of(path)) == (kind, number)


def test_in_features_of_another_size_are_a_kind_of_their_own():
    state = get_peft_model_state_dict(get_peft_model(Net(), frod()))
    shapes = {k: tuple(v.shape) for k, v in state.items() if "frod_V" in k}
    assert shapes == {
        "base_model.frod_V.fc": (6, 6),
        "base_model.frod_V.out": (6, 6),
        "base_model.frod_V.out_8": (8, 8),
    }


@pytest.mark.parametrize("kept", [True, False])
def test_the_adapter_comes_back_with_and_without_its_basis_in_the_file(tmp_path, kept):
    torch.manual_seed(3)
    model = get_peft_model(Net(), frod(save_projection=kept, projection_prng_key=4))
    model.save_pretrained(tmp_path)
    assert any("frod_V" in k for k in get_peft_model_state_dict(model)) is kept
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(X), model(X))


def matrices(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def kind_of_matrices() -> basis.Kind:
    kind = basis.Kind(6)
    for i, W in enumerate(matrices()):
        layer = nn.Linear(6, 5)
        layer.weight = nn.Parameter(W.float())
        kind.add(Sight(f"layers.{i}.fc", layer, view_of(layer)))
    return kind


def test_a_basis_from_one_matrix_after_the_other_is_the_same(monkeypatch):
    """Up to the signs of its columns, which no decomposition tells."""
    whole = kind_of_matrices().basis(0.01)
    monkeypatch.setattr(basis, "LARGE", 0)
    monkeypatch.setattr(basis, "PART", 20)
    parts = kind_of_matrices().basis(0.01)
    signs = (whole * parts).sum(0).sign()
    torch.testing.assert_close(parts * signs, whole, rtol=1e-3, atol=1e-4)


def test_a_feature_that_no_weight_reads_has_a_basis_too(monkeypatch):
    monkeypatch.setattr(basis, "LARGE", 0)
    kind = kind_of_matrices()
    for sight in kind.sights.values():
        sight.module.weight.data[:, 2] = 0
    V = kind.basis(0.01)
    assert torch.isfinite(V).all() and V[2].abs().max() < 1e-5
    W = next(kind.matrices())
    U, scale = basis.left(W, V)
    torch.testing.assert_close((U.double() * scale) @ V.double().mT, W.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("singular", [False, True])
def test_the_left_side_is_the_same_with_some_rows_at_a_time(lead, singular, monkeypatch):
    W, V = torch.randn(*lead, 9, 6), torch.randn(6, 6)
    if singular:
        W[..., 2], V[2] = 0, 0
    U, scale = basis.left(W, V)
    monkeypatch.setattr(basis, "LARGE", 10)
    monkeypatch.setattr(basis, "PART", 12)
    parts, norms = basis.left(W, V)
    assert parts.dtype is V.dtype
    torch.testing.assert_close(norms, scale)
    torch.testing.assert_close(parts, U.float())
    assert parts.shape == W.shape


def test_equal_bases_of_files_are_kept_once(tmp_path):
    get_peft_model(Net(), frod()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Net(), tmp_path)
    model.load_adapter(tmp_path, "second")
    tuner = model.base_model
    homes = [home for name, home in shared_of(tuner) if name.startswith(("frod_V", "frod_s_indices"))]
    assert homes and all(home.tensor("default") is home.tensor("second") for home in homes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_middle_of_frod_is_not_made_dense_for_few_rows(dtype, monkeypatch):
    """It holds a hundredth of the numbers; over a weight in half precision it is neither filled in nor rounded."""
    base = nn.Sequential(nn.Linear(24, 16)).to(dtype)
    config = FrodConfig(target_modules=["0"], init_weights=False, sparse_rate=0.1)
    model = get_peft_model(base, config)
    layer, x = model.base_model.model[0], torch.randn(3, 24, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        wanted = x.double() @ (layer.weight + layer.get_delta_weight("default")).double().mT + layer.bias.double()
    monkeypatch.setattr(FRoD, "pieces", None)
    y = model(x)
    y.sum().backward()
    close(y.double(), wanted, 1e-5 if dtype is torch.float32 else 2e-2)
    assert all(p.grad.abs().sum() > 0 for p in (x, *model.parameters()) if p.requires_grad)


def test_a_share_that_chooses_no_place_trains_the_diagonal_and_is_saved(tmp_path):
    model = get_peft_model(Net(), frod(sparse_rate=0))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(X), model(X))


def test_the_left_side_follows_the_basis_of_a_file(tmp_path):
    model = get_peft_model(Net(), frod())
    state = get_peft_model_state_dict(model)
    wanted = model(X)
    for key in [k for k in state if "frod_V" in k]:
        state[key] = -state[key]  # another machine's eigenvectors may have other signs
    peft.set_peft_model_state_dict(model, state)
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_other_targets_has_its_own_basis_and_equal_ones_are_kept_once():
    model = get_peft_model(Net(), frod())
    model.add_adapter("same", frod())
    model.add_adapter("other", frod(layers_to_transform=[0, 1], layers_pattern="layers"))
    homes = model.base_model.frod_V
    assert homes.fc.tensor("same") is homes.fc.tensor("default")
    assert not torch.equal(homes.fc.tensor("other"), homes.fc.tensor("default"))


def test_the_basis_is_that_of_the_base_weight_while_another_adapter_is_merged():
    model = get_peft_model(Net(), frod())
    before = model.base_model.frod_V.fc.tensor("default").clone()
    model.merge_adapter()
    model.add_adapter("second", frod())
    assert torch.equal(model.base_model.frod_V.fc.tensor("second"), before)


def test_a_setting_without_effect_and_settings_that_cannot_be_are_told():
    with pytest.warns(peft.PeftWarning, match="runtime_offload_base_weight"):
        frod(runtime_offload_base_weight=True)
    for wrong in ({"sparse_rate": 1.5}, {"regularization_alpha": 0.0}, {"module_config": {"fc": {"sparse_rate": 0.5}}}):
        with pytest.raises(ValueError, match=r"sparse_rate|regularization_alpha"):
            frod(**wrong)


# ---- GLoRA, PEANuT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (GloraConfig, "config_A_B", "matrix"),
        (GloraConfig, "config_C", "constant"),
        (GloraConfig, "config_D_E", "lora"),
        (PeanutConfig, "act_fn", "rellu"),
        (PeanutConfig, "depth", -1),
        (LilyConfig, "num_B", 1),
        (LilyConfig, "stride_A", 0),
    ],
)
def test_choices_that_do_not_exist_are_refused_by_name(kind, field, value):
    with pytest.raises(ValueError, match=field):
        kind(target_modules=["fc"], **{field: value})


@pytest.mark.parametrize("kind", [PeanutConfig, LilyConfig])
def test_a_layer_s_scaling_can_be_changed_and_given_back(kind):
    model = get_peft_model(Net(), kind(target_modules=["fc"], r=3, scaling=2.0, init_weights=False)).eval()
    layer, y = model.base_model.model.layers[0]["fc"], model(X)
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 6.0 and not torch.allclose(model(X), y)
    layer.unscale_layer()
    assert torch.equal(model(X), y)


def test_an_activation_by_any_name_that_transformers_knows():
    pytest.importorskip("transformers")
    model = get_peft_model(Net(), PeanutConfig(target_modules=["fc"], r=3, act_fn="quick_gelu", init_weights=False))
    assert torch.isfinite(model(X)).all()
