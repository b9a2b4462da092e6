"""Adapters at another rank, compared, taken out of two models, and rescaled for a while."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.layouts import LAYOUTS
from conformance.oracles import METHODS
from conformance.rows import adapted, train, tuner_layers
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    PeftWarning,
    PromptTuningConfig,
    RandLoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.algebra import TYPES, convert_to_lora, diff, extract, rescale_adapter_scale, resize, subtract_mutated_init
from peft.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

X = torch.linspace(-1, 1, 24).view(4, 6)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5))


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["0", "2"], **fields})


def model(*configs: Any) -> Any:
    made = get_peft_model(net(), configs[0], adapter_name="x1")
    for name, config in zip(("x2", "x3"), configs[1:], strict=False):
        made.add_adapter(name, config)
    for i, name in enumerate(made.peft_config):
        train(made, name, seed=i)
    return made.eval()


def update(layer: Any, name: str) -> Tensor:
    W = layer.original_weight().double()
    return (layer.adapters[name].method.weight(layer.adapters[name], W) - W).detach()


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor) and t.device.type != "meta":
                self.size = max(self.size, t.numel())
        return result


# ---- one source is itself -----------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"2": 2}, "alpha_pattern": {"0": 7}},
    "rank-stabilised with patterns": {"use_rslora": True, "rank_pattern": {"2": 2}, "alpha_pattern": {"0": 7}},
    "a bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
    "DoRA, rank-stabilised, with patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"0": 1}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "settings of a layer": {"module_config": {"2": {"lora_alpha": 9, "r": 1}}},
}


@pytest.mark.parametrize("alone", [True, False], ids=["no rank", "a rank"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_one_source_of_weight_one_is_itself(fields: dict[str, Any], kind: str, alone: bool) -> None:
    made = model(lora(**fields))
    expected = made(X).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a density of 1 prunes nothing
        rank = {} if alone else {"svd_rank": 6}
        made.add_weighted_adapter(["x1"], [1.0], "same", kind, density=1.0, **rank)
    made.set_adapter("same")
    assert torch.allclose(made(X), expected, rtol=0, atol=1e-6)


PRUNING = [t for t in TYPES if t.startswith(("ties", "dare", "magnitude"))]


@pytest.mark.parametrize("kind", PRUNING)
@pytest.mark.parametrize("layout", ["linear", "conv-2d", "embedding", "attention-packed", "parameter-3-D"])
@pytest.mark.parametrize("method", ["lora", "loha", "hira"])
def test_types_that_prune_nothing_keep_one_source_on_every_layout(method: str, layout: str, kind: str) -> None:
    cell = LAYOUTS[layout]
    if METHODS[method].forbidden(cell):
        pytest.skip("the method is not for this layout")
    made = adapted(method, cell)
    expected = made(cell.x()).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.add_weighted_adapter(["default"], [1.0], "same", kind, density=1.0)
    made.base_model.set_adapter("same")
    assert torch.allclose(made(cell.x()), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("weight", [-1.0, -0.3, 0.0, 2.5])
@pytest.mark.parametrize("kind", [t for t in TYPES if "ties" not in t])
def test_one_source_of_any_weight_is_scaled_by_it(kind: str, weight: float) -> None:
    made = model(lora(use_rslora=True, rank_pattern={"2": 2}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.add_weighted_adapter(["x1"], [weight], "scaled", kind, density=1.0, svd_rank=5)
    for _, layer in tuner_layers(made):
        assert torch.allclose(update(layer, "scaled"), weight * update(layer, "x1"), atol=2e-6)


# ---- nothing dense ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune", "dare_linear", "svd", "cat", "exact"])
def test_no_tensor_of_the_size_of_the_weight_is_made(kind: str) -> None:
    made = wide()
    with Largest() as largest, warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        made.add_weighted_adapter(["x1", "x2"], [0.7, -0.3], "mix", kind, density=0.5)
    assert 0 < largest.size < 400 * 300 // 10


def wide() -> Any:
    base = nn.Sequential(nn.Linear(300, 400))
    made = get_peft_model(base, lora(target_modules=["0"]), adapter_name="x1")
    made.add_adapter("x2", lora(target_modules=["0"], r=4))
    for i, name in enumerate(("x1", "x2")):
        train(made, name, seed=i)
    return made


def test_resizing_comparing_and_converting_make_no_dense_update_either() -> None:
    made = wide()
    with Largest() as largest, warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        resize(made, 2, "x1", "small")
        resize(made, 0.9, "x1", "share")
        diff(made, "x1", "x2")
        convert_to_lora(made, 2, "x2")
    assert 0 < largest.size < 400 * 300 // 10


# ---- another rank -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_larger_rank_is_the_same_function(fields: dict[str, Any]) -> None:
    made = model(lora(**fields))
    expected = made(X).detach()
    report = resize(made, 6, "x1", "large")
    assert report.error == 0
    assert made.active_adapters == ["x1"]
    assert made.peft_config["large"].r == 6
    made.set_adapter("large")
    assert torch.allclose(made(X), expected, atol=1e-6)


def test_a_smaller_rank_is_the_nearest_and_its_error_is_told() -> None:
    made = model(lora())
    with pytest.warns(PeftWarning, match=r"cut to rank 1.*Give a larger rank"):
        report = resize(made, 1, "x1", "small")
    for _, layer in tuner_layers(made):
        U, S, Vh = torch.linalg.svd(update(layer, "x1"))
        assert torch.allclose(update(layer, "small"), S[0] * torch.outer(U[:, 0], Vh[0]), atol=1e-5)
        expected = S[1:].norm() / S.norm()
        assert report.errors[layer.adapters["x1"].path] == pytest.approx(float(expected), rel=1e-4)


def test_a_share_of_the_norm_gives_each_layer_its_rank() -> None:
    made = model(lora(r=4))
    layer = made.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["x1"].weight[:, 1:] *= 1e-3
    report = resize(made, 0.999, "x1", "share")
    assert report.ranks["0"] == 1 < report.ranks["2"]
    assert report.error < 0.001**0.5


@pytest.mark.parametrize("layout", ["conv-2d", "conv-2d-grouped", "embedding", "attention-packed", "parameter-3-D"])
def test_every_layout_is_resized(layout: str) -> None:
    cell = LAYOUTS[layout]
    made = adapted("lora", cell, r=2)
    expected = made(cell.x()).detach()
    resize(made, 4)
    made.set_adapter("resized")
    assert torch.allclose(made(cell.x()), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_what_is_trained_beside_the_factors_is_copied() -> None:
    made = model(lora(target_modules=["0"], modules_to_save=["2"]))
    made.base_model.model[2].modules_to_save["x1"].weight.data.add_(1)
    expected = made(X).detach()
    resize(made, 5, "x1", "large")
    made.set_adapter("large")
    assert torch.allclose(made(X), expected, atol=1e-6)


def test_what_cannot_be_resized_leaves_the_model_as_it_was() -> None:
    made = model(lora())
    names = set(made.state_dict())
    for match, arguments in {
        "no adapter 'y'": (2, "y"),
        "already": (2, "x1", "x1"),
        "is no rank": (0, "x1"),
        r"rank=1\.5": (1.5, "x1"),
        "contains a dot": (2, "x1", "a.b"),
    }.items():
        with pytest.raises(ValueError, match=match):
            resize(made, *arguments)
    assert set(made.state_dict()) == names
    assert list(made.peft_config) == ["x1"]
    with pytest.raises(ValueError, match=r"LOHA.*convert_to_lora"):
        resize(get_peft_model(net(), LoHaConfig(target_modules=["0"])), 2)
    with pytest.raises(TypeError, match="PeftModel"):
        resize(net(), 2)


# ---- two adapters compared ------------------------------------------------------------------------------------------


def test_a_comparison_says_how_far_updates_are_apart() -> None:
    made = model(lora(), lora(r=2, use_rslora=True, target_modules=["0"]))
    found = diff(made, "x1", "x2")
    layer = made.base_model.model[0]
    one, two = update(layer, "x1"), update(layer, "x2")
    first = found.layers["0"]
    assert first.norms == pytest.approx((float(one.norm()), float(two.norm())), rel=1e-6)
    assert first.distance == pytest.approx(float((one - two).norm()), rel=1e-6)
    assert first.cosine == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), rel=1e-5)
    assert first.ranks == (3, 2)
    assert first.scalings == pytest.approx((5 / 3, 5 / 2**0.5))
    second = found.layers["2"]
    assert second.norms[1] is None
    assert second.cosine is None
    assert second.distance == second.norms[0]
    assert found.config["r"] == (3, 2)
    assert set(found.config) == {"r", "use_rslora", "target_modules"}
    assert not found.same
    text = str(found)
    assert "D1: x1, D2: x2" in text
    assert "use_rslora: False against True" in text


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_an_adapter_is_at_no_distance_from_itself(fields: dict[str, Any]) -> None:
    made = model(lora(**fields))
    again = copy.deepcopy(made)
    found = diff(made, "x1", "x1", again)
    assert found.distance <= 1e-14 * found.norms[0]
    assert not found.config
    with torch.no_grad():
        for _, layer in tuner_layers(again):
            layer.lora_B["x1"].weight.mul_(2)
    assert diff(made, "x1", "x1", again).distance > 0


def test_other_methods_and_whole_modules_are_compared_too() -> None:
    made = model(
        lora(target_modules=["0"], modules_to_save=["3"]), LoHaConfig(r=2, target_modules=["0"], modules_to_save=["3"])
    )
    with torch.no_grad():
        made.base_model.model[3].modules_to_save["x2"].weight.fill_(2.0)
        made.base_model.model[3].modules_to_save["x1"].weight.fill_(1.0)
    found = diff(made, "x1", "x2")
    one, two = (update(made.base_model.model[0], n) for n in ("x1", "x2"))
    assert found.layers["0"].distance == pytest.approx(float((one - two).norm()), rel=1e-5)
    assert next(v for k, v in found.others.items() if k.endswith("3.weight")) == 1
    with pytest.raises(ValueError, match="no adapter 'x9'"):
        diff(made, "x1", "x9")


def test_adapters_of_other_shapes_are_not_compared() -> None:
    made = model(lora(target_modules=["0"]))
    other = get_peft_model(nn.Sequential(nn.Linear(7, 8)), lora(target_modules=["0"]), adapter_name="x1")
    with pytest.raises(ValueError, match="other base models"):
        diff(made, "x1", "x1", other)


# ---- the difference of two models ---------------------------------------------------------------------------------


def tuned(base: nn.Module, scale: float = 0.1) -> nn.Module:
    made, generator = copy.deepcopy(base), torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.data.add_(scale * torch.randn(p.shape, generator=generator))
    return made.eval()


def put_on(base: nn.Module, new: Any) -> Any:
    made = get_peft_model(copy.deepcopy(base), new.config)
    set_peft_model_state_dict(made, new.state, strict=True)
    return made.eval()


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if not n.startswith("attention-separate")])
def test_an_extracted_adapter_turns_the_base_into_the_tuned_model(layout: str) -> None:
    cell = LAYOUTS[layout]
    base = cell.model(torch.float32).eval()
    other = tuned(base)
    before = {n: p.clone() for n, p in base.state_dict().items()}
    new = extract(base, other, 1.0, modules_to_save=layout == "attention-encoder")
    expected = other(cell.x()).detach()
    assert torch.allclose(put_on(base, new)(cell.x()), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert all(torch.equal(p, before[n]) for n, p in base.state_dict().items())
    assert not any(type(m).__module__.startswith("peft") for m in base.modules())
    assert new.report.error < 1e-6


def test_a_rank_leaves_the_best_of_its_size_and_the_error_of_each_layer() -> None:
    base, other = net(), tuned(net())
    with pytest.warns(PeftWarning) as told:
        new = extract(base, other, 2)
    assert {str(w.message).split(" ")[0] for w in told} == {"The", "2"}
    assert new.report.others.keys() == {"3.weight", "3.bias"}
    D = (other[2].weight - base[2].weight).detach()
    S = torch.linalg.svdvals(D)
    assert new.report.errors["2"] == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)
    assert new.config.r == 2
    assert "3.weight: not in the adapter" in str(new.report)


def test_what_is_no_matrix_is_kept_whole_when_asked(tmp_path: Path) -> None:
    base, other = net(), tuned(net())
    new = extract(base, other, 1.0, modules_to_save=True)
    assert list(new.config.modules_to_save) == ["3"]
    assert not new.report.others
    new.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(net(), tmp_path)(X), other(X), atol=1e-5)


def test_a_configuration_chooses_the_targets() -> None:
    base, other = net(), tuned(net())
    with pytest.warns(PeftWarning, match=r"tensors have changed that the adapter does not hold"):
        new = extract(base, other, 1.0, LoraConfig(target_modules=["2"]))
    assert new.config.target_modules == {"2"}
    assert new.report.others.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_layer_that_has_not_changed_is_no_target() -> None:
    base, other = net(), net()
    other[2].weight.data.add_(1)
    new = extract(base, other, 4)
    assert new.config.target_modules == {"2"}
    assert new.config.r == 4
    with pytest.raises(ValueError, match="selects"):
        extract(base, other, 4, LoraConfig(target_modules=["0"]))


def test_a_bias_that_has_changed_alone_is_extracted() -> None:
    base, other = net(), net()
    other[0].bias.data.add_(1)
    new = extract(base, other, 2)
    assert new.config.target_modules == {"0"}
    torch.testing.assert_close(put_on(base, new)(X), other(X))


def test_a_small_layer_gets_the_rank_that_it_can_have() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        new = extract(net(), tuned(net()), 6)
    assert new.report.ranks == {"0": 6, "2": 5}
    assert torch.allclose(put_on(net(), new).base_model.model[0](X), tuned(net())[0](X), atol=1e-5)


def test_large_changes_are_projected_on_as_many_directions_as_hold_their_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peft.algebra.factors.EXACT_SIZE", 64)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(400, 300, bias=False))
    other = copy.deepcopy(base)
    other[0].weight.data += torch.randn(300, 70) @ torch.randn(70, 400) + 0.01 * torch.randn(300, 400)
    monkeypatch.setattr(torch.linalg, "svd", _refused)
    new = extract(base, other, 0.9999)
    assert 60 <= new.report.ranks["0"] <= 70
    assert new.report.error <= 0.0101
    made = put_on(base, new).merge_and_unload()
    D, rest = other[0].weight - base[0].weight, made[0].weight - other[0].weight
    assert float(rest.detach().norm() / D.detach().norm()) == pytest.approx(new.report.error, rel=0.05)


def _refused(A: Tensor, *arguments: Any, **options: Any) -> Any:
    if min(A.shape[-2:]) >= 300:
        raise AssertionError("the whole matrix was decomposed")
    return torch._C._linalg.linalg_svd(A, *arguments, **options)


def test_models_that_cannot_be_compared_are_refused() -> None:
    base = net()
    with pytest.raises(ValueError, match="the same"):
        extract(base, net(), 2)
    with pytest.raises(ValueError, match=r"lacks '0.bias'"):
        extract(base, nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5)), 2)
    with pytest.raises(ValueError, match="differ in shape"):
        extract(base, nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5)), 2)
    with pytest.raises(ValueError, match="holds adapters"):
        extract(get_peft_model(net(), lora()).base_model.model, net(), 2)
    with pytest.raises(ValueError, match="is no rank"):
        extract(base, tuned(base), 0)


# ---- what training has changed of a start ---------------------------------------------------------------------------


def test_first_factors_are_subtracted_as_further_ranks() -> None:
    made = model(lora(target_modules=["0"], init_lora_weights="pissa"), lora(target_modules=["0"]))
    made.set_adapter("x1")
    state = get_peft_model_state_dict(made, adapter_name="x1")
    first = get_peft_model_state_dict(made, adapter_name="x2")
    for found in (
        subtract_mutated_init(made, state, "x2"),
        made.base_model.subtract_mutated_init(state, "x2", {}),
        subtract_mutated_init(made, state, "x2", {"state_dict": made.state_dict()}),
    ):
        (a, A), (b, B) = found.items()
        assert torch.equal(A, torch.cat([state[a], first[a]]))
        assert torch.equal(B, torch.cat([state[b], -first[b]], 1))
    with pytest.raises(ValueError, match="no adapter 'x3'"):
        subtract_mutated_init(made, state, "x3")
    with pytest.raises(TypeError, match="no LoRA"):
        subtract_mutated_init(get_peft_model(net(), IA3Config(target_modules=["0"], feedforward_modules=[])), {}, "x")


# ---- rescaled for a while -----------------------------------------------------------------------------------------


def test_scales_come_back_from_nested_blocks_and_errors() -> None:
    made = model(lora(), lora(r=1))
    layer = made.base_model.model[0]
    before, expected = dict(layer.scaling), made(X).detach()
    with pytest.raises(KeyError), rescale_adapter_scale(made, 2):
        with rescale_adapter_scale(made, 0.5):
            assert torch.equal(made(X), expected)
        assert layer.scaling["x1"] == 2 * before["x1"]
        raise KeyError
    assert dict(layer.scaling) == before
    with rescale_adapter_scale(made, 0):
        assert torch.equal(made(X), made.get_base_model()(X))
        made.delete_adapter("x2")
    assert dict(layer.scaling) == {"x1": before["x1"]}
    for wrong in ("2", None, True):
        with pytest.raises(TypeError, match="multiplier"), rescale_adapter_scale(made, wrong):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match="LoraLayer"), rescale_adapter_scale(net(), 2):
        pass


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=["0", "2"], init_r=3, target_r=2, total_step=9),
        LoHaConfig(target_modules=["0", "2"], r=2),
        MissConfig(target_modules=["0", "2"], r=2),
        RandLoraConfig(target_modules=["0", "2"], r=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_scalings_of_other_methods_follow(config: Any) -> None:
    made = model(config)
    last, x = made.base_model.model[2], torch.randn(3, 8)
    base = last.base_layer(x)
    update = last(x) - base
    with rescale_adapter_scale(made, 0.5):
        torch.testing.assert_close(last(x) - base, update / 2)
    torch.testing.assert_close(last(x) - base, update)


SCALED = {
    "lora": lambda: lora(use_rslora=True),
    "adalora": lambda: AdaLoraConfig(init_r=3, lora_alpha=7, target_modules=["0", "2"], total_step=10),
    "loha": lambda: LoHaConfig(r=2, alpha=5, target_modules=["0", "2"]),
    "miss": lambda: MissConfig(r=2, target_modules=["0"]),
}


@pytest.mark.parametrize("second", [*SCALED, "ia3"])
@pytest.mark.parametrize("first", SCALED)
def test_adapters_of_several_methods_in_one_layer_have_scales_of_their_own(first: str, second: str) -> None:
    other = (SCALED | {"ia3": lambda: IA3Config(target_modules=["0"], feedforward_modules=[])})[second]
    both = model(SCALED[first](), other())
    layer = both.base_model.model[0]
    before = dict(layer.scaling.items())
    assert list(before) == (["x1"] if second == "ia3" else ["x1", "x2"])
    both.base_model.set_adapter(["x1", "x2"])
    for name in both.peft_config:
        layer.set_scale(name, 1.0)
    assert dict(layer.scaling.items()) == pytest.approx(before)
    for name in both.peft_config:
        layer.set_scale(name, 0.5)
    layer.scale_layer(4.0)
    assert dict(layer.scaling.items()) == pytest.approx({name: 2 * scale for name, scale in before.items()})
    layer.unscale_layer()
    assert dict(layer.scaling.items()) == pytest.approx(before)


def test_a_scale_that_is_set_inside_stays_and_a_prepared_one_is_the_same_tensor() -> None:
    made, other = model(lora()), model(lora(lora_alpha=1))
    layer = made.base_model.model[0]
    with rescale_adapter_scale(made, 3):
        state = get_peft_model_state_dict(other, adapter_name="x1")
        hotswap_adapter_from_state_dict(made, state, "x1", other.peft_config["x1"])
    assert layer.scaling["x1"] == pytest.approx(1 / 3)
    prepare_model_for_compiled_hotswap(made)
    tensor = layer.scaling["x1"]
    with rescale_adapter_scale(made, 3):
        assert float(layer.scaling["x1"]) == pytest.approx(1)
    assert layer.scaling["x1"] is tensor
    made.merge_adapter()
    with pytest.warns(PeftWarning, match="merged"), rescale_adapter_scale(made, 3):
        pass


def test_weights_and_densities_that_are_no_numbers_are_refused() -> None:
    made = model(lora(), lora())
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            made.add_weighted_adapter(["x1", "x2"], [1.0, weight], "mix")
    with pytest.raises(TypeError, match="no number"):
        made.add_weighted_adapter(["x1", "x2"], [1.0, 1.0], "mix", "ties", density="half")
    with pytest.raises(ValueError, match="negative"):
        made.add_weighted_adapter(["x1", "x2"], [1.0, 1.0], "mix", "ties", density=float("nan"))
    assert list(made.peft_config) == ["x1", "x2"]


def test_prompts_are_compared_by_their_tensors() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=16, eos_token_id=0)
    config.bos_token_id = 0
    prompts = [PromptTuningConfig(num_virtual_tokens=n, task_type="CAUSAL_LM") for n in (2, 2, 3)]
    made = get_peft_model(transformers.GPT2LMHeadModel(config), prompts[0])
    made.add_adapter("b", prompts[1])
    made.add_adapter("c", prompts[2])
    assert diff(made, "default", "default").same
    assert 0 < diff(made, "default", "b").others["prompt_embeddings"] < 10
    assert diff(made, "default", "c").others == {"prompt_embeddings": float("inf")}
