"""What the methods that parametrise the update directly have beside the formulas: dropping, places, scaling, errors."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import peft
from conformance.layouts import LAYOUTS
from conformance.oracles import METHODS
from conformance.rows import adapted, close
from peft import (
    C3AConfig,
    FourierFTConfig,
    GraloraConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PeftWarning,
    ShiraConfig,
    WaveFTConfig,
    get_peft_model,
)
from peft.core import draw
from peft.core.layer import BaseTunerLayer, tuner_layers
from peft.core.stack import Adapter
from peft.methods import wavelets
from peft.methods.dora import DoRA
from peft.methods.lokr import factorization


def one(config, out=24, inp=16, **more):
    """(model, its layer under the configuration's adapter)."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(inp, out), nn.Linear(out, out, **more)), config)
    return model.eval(), next(layer for _, layer in tuner_layers(model))


@torch.no_grad()
def moved(layer: BaseTunerLayer) -> torch.Tensor:
    """Random values in all tensors; the update that they make."""
    for parameter in layer.adapter_parameters("default"):
        parameter.normal_()
    return layer.get_delta_weight("default")


# ---- rank_dropout, module_dropout ----------------------------------------------------------------------------------

THINNED = {"loha": LoHaConfig, "lokr": LoKrConfig}


@pytest.mark.parametrize("method", THINNED)
@pytest.mark.parametrize("name", ["linear", "conv-2d", "parameter-3-D", "attention-packed"])
def test_dropped_rows_are_left_out_in_training_only(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout, rank_dropout=0.5), layout.x()
    with torch.no_grad():
        wanted = model(x)
        model.train()
        torch.manual_seed(1)
        assert not torch.allclose(model(x), wanted, atol=1e-3)
        assert not torch.allclose(model(x), model(x), atol=1e-3), "drawn anew each time"
        model.merge_adapter()
        close(model(x), wanted)


@pytest.mark.parametrize(("config", "scaled"), [(LoHaConfig, True), (LoKrConfig, False), (LoKrConfig, True)])
def test_rows_are_kept_whole_and_make_up_for_the_others_if_asked(config, scaled):
    more = {"rank_dropout_scale": scaled} if config is LoKrConfig else {}
    _, layer = one(config(target_modules=["0"], rank_dropout=0.4, **more))
    D = moved(layer)
    p = layer.train().adapters["default"]
    torch.manual_seed(2)
    ratio = p.method.live_delta(p, layer.weight).detach() / D
    kept = ratio.mean(1) > 0
    assert 0 < kept.sum() < len(kept)
    factor = len(kept) / kept.sum() if scaled else 1.0
    close(ratio, kept[:, None] * factor * torch.ones_like(D), 1e-4)


@pytest.mark.parametrize("config", THINNED.values())
def test_module_dropout_leaves_the_whole_update_out_by_chance(config):
    model, layer = one(config(target_modules=["0"], module_dropout=0.3))
    moved(layer)
    x = torch.randn(2, 16)
    with torch.no_grad():
        base, full = layer.base_layer(x), layer(x)
        model.train()
        seen = [layer(x) for _ in range(200)]
    without = sum(torch.equal(y, base) for y in seen)
    assert 30 < without < 90
    assert without + sum(torch.allclose(y, full, atol=1e-5) for y in seen) == 200


def test_a_training_step_with_all_rows_dropped_is_finite():
    _, layer = one(LoHaConfig(target_modules=["0"], rank_dropout=0.999999))
    moved(layer)
    assert torch.isfinite(layer.train()(torch.randn(2, 16))).all()


# ---- dropout of the input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [MissConfig(r=4, miss_dropout=0.5), GraloraConfig(r=4, hybrid_r=2, gralora_dropout=0.5)],
    ids=["miss", "gralora"],
)
def test_dropout_of_the_input_is_of_the_update_only_and_right_on_average(config):
    config.target_modules = {"0"}
    model, layer = one(config)
    moved(layer)
    x = torch.randn(1, 16)
    with torch.no_grad():
        full, base = layer(x), layer.base_layer(x)
        model.train()
        torch.manual_seed(0)
        mean = layer(x.expand(20000, 16)).mean(0)
    close(mean - base[0], full[0] - base[0], 0.1)
    assert not torch.allclose(layer(x), layer(x))


# ---- scaling -------------------------------------------------------------------------------------------------------

SCALED = {
    "loha": (LoHaConfig(r=4, alpha=6), 1.5),
    "lokr": (LoKrConfig(r=4, alpha=6), 1.5),
    "gralora": (GraloraConfig(r=4, alpha=9, hybrid_r=2), 1.5),
    "shira": (ShiraConfig(r=2), 1.0),
    "miss": (MissConfig(r=4), 1.0),
}


@pytest.mark.parametrize("method", SCALED)
def test_the_scaling_can_be_set_multiplied_and_given_back(method):
    config, natural = SCALED[method]
    config.target_modules = {"0"}
    _, layer = one(config)
    D = moved(layer)
    assert layer.scaling["default"] == natural
    layer.set_scale("default", 3)
    close(layer.get_delta_weight("default"), 3 * D)
    layer.scale_layer(0.5)
    close(layer.get_delta_weight("default"), 1.5 * D)
    layer.unscale_layer(0.5)
    assert layer.scaling["default"] == 3 * natural
    layer.unscale_layer()
    assert layer.scaling["default"] == natural
    layer.set_scale("absent", 2)
    assert layer.scaling["default"] == natural


# ---- places that follow from a seed --------------------------------------------------------------------------------


def test_places_are_different_and_the_same_for_equal_shapes():
    first, second = draw.places(24, 16, 50, 777), draw.places(24, 16, 50, 777)
    assert torch.equal(first, second) and len(set(first.tolist())) == 50
    assert not torch.equal(first, draw.places(24, 16, 50, 778))
    default = torch.randperm(384, generator=torch.Generator())[:50]
    assert torch.equal(draw.places(24, 16, 50, None), default)


@pytest.mark.parametrize("config", [FourierFTConfig(n_frequency=400), WaveFTConfig(n_frequency=400), ShiraConfig(r=20)])
def test_more_places_than_elements_are_refused(config):
    config.target_modules = {"0"}
    with pytest.raises(ValueError, match=r"more than the 384 elements.*'0'"):
        one(config)


def test_coefficients_are_shared_out_by_the_size_of_the_weights():
    model, _ = one(WaveFTConfig(target_modules=["0", "1"], n_frequency=30, proportional_parameters=True))
    counts = [layer.waveft_spectrum["default"].numel() for _, layer in tuner_layers(model)]
    assert counts == [round(60 * 384 / 960), round(60 * 576 / 960)]


def test_a_pattern_gives_a_layer_its_own_number():
    config = FourierFTConfig(target_modules=["0", "1"], n_frequency=30, n_frequency_pattern={"1": 7})
    model, _ = one(config)
    assert [layer.fourierft_spectrum["default"].numel() for _, layer in tuner_layers(model)] == [30, 7]
    with pytest.raises(ValueError, match=r"n_frequency_pattern\['1'\]"):
        FourierFTConfig(n_frequency_pattern={"1": 0})


@pytest.mark.parametrize(
    ("key", "sizes"), [("^inner.0", [6, 6]), (r"inner\.\d", [6, 6]), (r".*\d", [6, 2]), ("0", [2, 2]), (r"\d", [6, 2])]
)
@pytest.mark.parametrize("kind", ["fourierft", "c3a"])
def test_an_expression_for_sizes_matches_only_what_follows_a_dot(kind, key, sizes):
    """As in the original library, whose files are to load; a name is matched as it is, or by its last parts."""
    base = nn.Sequential()
    base.add_module("0", nn.Linear(12, 12))
    base.add_module("inner", nn.Sequential(nn.Linear(12, 12)))
    fields = {"fourierft": "n_frequency", "c3a": "block_size"}
    name = fields[kind]
    made = {"fourierft": FourierFTConfig, "c3a": C3AConfig}[kind]
    config = made(target_modules=["0"], **{name: 6, f"{name}_pattern": {key: 2}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [layer for _, layer in tuner_layers(get_peft_model(base, config))]
    found = [p.shape[-1] for layer in layers for n, p in layer.named_parameters() if n.endswith(".default")]
    assert found == sizes


def test_the_whole_name_of_a_layer_gives_its_size_where_no_expression_does():
    """As in the original library: the order of the keys does not count for it."""
    base = nn.Sequential(nn.Sequential(nn.Linear(12, 12)))
    for pattern, size in (({"0.0": 2, "0": 3}, 3), ({"0.0": 2, "1": 3}, 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = C3AConfig(target_modules=["0.0"], block_size=6, block_size_pattern=pattern)
            layer = get_peft_model(copy.deepcopy(base), config).base_model.model[0][0]
        assert layer.c3a_kernel["default"].shape[-1] == size


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (peft.PolyConfig(target_modules=["0"], r=2), ["poly_router", "poly_lora_A", "poly_lora_B"]),
        (
            LoHaConfig(target_modules=["0"], r=2, use_effective_conv2d=True),
            ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
        ),
    ],
    ids=["poly", "loha"],
)
def test_the_parameters_come_in_the_order_that_states_of_optimizers_rely_on(config, names):
    base = nn.Linear(8, 8) if config.peft_type == "POLY" else nn.Conv2d(4, 6, 3)
    model = get_peft_model(nn.Sequential(base), config)
    found = [n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad]
    assert found == names


def test_a_mask_of_ones_own_chooses_the_places():
    with pytest.warns(PeftWarning, match="mask_fn"):
        config = ShiraConfig(target_modules=["0"], r=2, mask_type="rows")
    config.mask_fn = lambda layer, r, **kwargs: torch.ones(24 * 16).masked_fill(torch.arange(384) >= 80, 0).view(24, 16)
    _, layer = one(config)
    D = moved(layer)
    assert D.flatten()[:80].all() and not D.flatten()[80:].any()
    config.mask_fn = lambda layer, r, **kwargs: torch.ones(24, 16)
    with pytest.raises(ValueError, match=r"384 places.*asks for 80"):
        one(config)


# ---- wavelets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", wavelets.LOW)
def test_a_wavelet_is_orthogonal_to_its_shifts(name):
    low, high = (torch.tensor(f, dtype=torch.float64) for f in wavelets.filters(name))
    assert math.isclose(low.sum().item(), math.sqrt(2), abs_tol=1e-9)
    for shift in range(0, len(low), 2):
        for a in (low, high):
            wanted = 1.0 if shift == 0 else 0.0
            assert math.isclose((a[shift:] * a[: len(a) - shift]).sum().item(), wanted, abs_tol=1e-9)
        assert abs((low[shift:] * high[: len(low) - shift]).sum().item()) < 1e-9


@pytest.mark.parametrize("name", ["sym9", "coif4", "db10"])
def test_every_family_makes_an_update_of_the_same_norm(name):
    """The transform is orthogonal, so what is cut off is all that may be lost."""
    _, layer = one(
        WaveFTConfig(target_modules=["0"], n_frequency=384, scaling=1.0, wavelet_family=name), out=24, inp=16
    )
    D = moved(layer)
    c = layer.waveft_spectrum["default"]
    assert 0.1 < (D.norm() / c.norm()).item() < 1.0
    with torch.no_grad():
        c.zero_()
    assert not layer.get_delta_weight("default").any()


def test_a_family_without_a_filter_is_refused_at_once():
    with pytest.raises(ValueError, match="wavelet_family='db11'"):
        WaveFTConfig(wavelet_family="db11")


# ---- sizes that must fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (C3AConfig(block_size=5), r"block_size=5.*\[1, 2, 4, 8\]"),
        (GraloraConfig(r=3, gralora_k=3), r"gralora_k=3 must divide.*\[1, 2, 4, 8\].*module_config"),
        (FourierFTConfig(n_frequency=385), "Use at most 384.*n_frequency_pattern"),
        (ShiraConfig(r=10), "Use r=9 at most"),
        (MissConfig(r=17), "r=17 is larger than the 16 in-features"),
        (MissConfig(r=4, mini_r=5, init_weights="mini"), "mini_r=5 must divide the out-features"),
        (MissConfig(r=3, init_weights="bat"), "r=3 must divide the in-features"),
    ],
    ids=["c3a", "gralora", "fourierft", "shira", "miss", "mini", "bat"],
)
def test_a_size_that_does_not_fit_names_one_that_does_and_changes_nothing(config, words):
    config.target_modules = {"0"}
    base = nn.Sequential(nn.Linear(16, 24))
    with pytest.raises(ValueError, match=words):
        get_peft_model(base, config)
    assert type(base[0]) is nn.Linear


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GraloraConfig(r=5, gralora_k=2), "r=5 and gralora_k=2.*r="),
        (lambda: GraloraConfig(hybrid_r=-1), "hybrid_r"),
        (lambda: LoKrConfig(init_weights="lycori"), "Did you mean 'lycoris'"),
        (lambda: LoKrConfig(decompose_factor=0), "decompose_factor"),
        (lambda: LoHaConfig(rank_dropout=1.0), "rank_dropout"),
        (lambda: LoHaConfig(alpha_pattern={"a": float("nan")}), "alpha_pattern"),
        (lambda: C3AConfig(block_size=0), "block_size"),
        (lambda: C3AConfig(init_weights="xavier"), "init_weights"),
        (lambda: MissConfig(init_weights="bad"), "init_weights"),
    ],
)
def test_a_configuration_that_cannot_be_right_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ---- LoKr's sizes, first values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "factor", "wanted"),
    [(24, -1, (4, 6)), (36, -1, (6, 6)), (127, -1, (1, 127)), (128, 4, (4, 32)), (128, 64, (64, 2)), (10, 4, (2, 5))],
)
def test_a_dimension_is_split_near_its_root_or_by_the_factor(dimension, factor, wanted):
    assert factorization(dimension, factor) == wanted


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(init_weights=False),
        LoKrConfig(init_weights=False),
        FourierFTConfig(n_frequency=20),
        C3AConfig(block_size=4),
        C3AConfig(block_size=4, init_weights="gaussian"),
        C3AConfig(block_size=4, init_weights="kaiming_uniform"),
        WaveFTConfig(n_frequency=20, init_weights=False),
        ShiraConfig(r=2, init_weights=False),
        MissConfig(r=4, init_weights=False),
        GraloraConfig(r=4, init_weights=False),
    ],
    ids=lambda c: f"{c.kind}-{c.init_weights}",
)
def test_a_random_start_changes_the_model(config):
    config.target_modules = {"0"}
    _, layer = one(config)
    assert layer.get_delta_weight("default").abs().max() > 1e-5


# ---- DoRA's magnitude over other methods ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["loha", "lokr", "fourierft", "c3a", "waveft", "shira", "miss", "gralora"])
@pytest.mark.parametrize("name", ["linear", "conv-2d", "parameter-3-D"])
def test_a_magnitude_stands_over_any_additive_method(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout), layout.x()
    ((_, layer),) = tuner_layers(model)
    p = layer.adapters["default"]
    with torch.no_grad():
        W, D = layer.original_weight(), p.method.delta(p, layer.original_weight())
        m = torch.rand(W.shape[:-1]) + 0.5
        over = Over(DoRA(p.method), m)
        layer.adapters["default"] = q = Adapter(layer, "default", over, p.settings, p.path)
        q.__dict__.update({k: v for k, v in p.__dict__.items() if k not in q.__dict__})
        q.idle = p.idle
        layer._replan()
        V = W + D
        wanted = m[..., None] * V / V.norm(dim=-1, keepdim=True)
        close(over.weight(q, W), wanted)
        y = model(x)
        model.merge_adapter()
        close(model(x), y)


class Over(DoRA):
    """DoRA with a magnitude that is given, not held by the layer."""

    def __init__(self, of: DoRA, m: torch.Tensor):
        super().__init__(of.of)
        self.m = m

    def magnitude(self, p: Adapter) -> torch.Tensor:
        return self.m


# ---- every configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", sorted({row.config for row in METHODS.values()} & {*THINNED.values(), C3AConfig}, key=str)
)
def test_a_configuration_survives_its_file_without_fields_that_others_do_not_know(method, tmp_path):
    config = method(target_modules=["0"])
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = method.from_pretrained(tmp_path)
    assert again == config
    assert "target_parameters" not in (tmp_path / "adapter_config.json").read_text()
