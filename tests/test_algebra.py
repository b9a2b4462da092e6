"""Combinations of adapters: what each type computes, that one source is itself, and that the sum is exact."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.layouts import LAYOUTS
from conformance.oracles import METHODS
from conformance.rows import adapted, cells, train, tuner_layers
from peft import BeftConfig, FourierFTConfig, IA3Config, LoraConfig, PeftWarning, ShiraConfig, get_peft_model
from peft.algebra import TYPES
from peft.algebra.factors import Pair, Spectrum
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import merge_utils

SOME = (
    *("linear", "linear-Conv1D", "conv-2d", "conv-2d-grouped", "embedding-scaled"),
    *("attention-packed", "attention-separate", "parameter-3-D-transposed"),
)
# KaSA's least directions of a grouped kernel and LoRA's product over all channels are no one product
SUMMED = [m for m, row in METHODS.items() if getattr(row, "merges", True)]
CELLS = [c for c in cells(SUMMED) if c[1] in SOME and c != ("kasa", "conv-2d-grouped")]
PRUNED = [t for t in TYPES if t.startswith(("ties", "dare", "magnitude"))]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["0", "2"], **fields})


def model(*configs: Any) -> Any:
    made = get_peft_model(net(), configs[0], adapter_name="x1")
    for name, config in zip(("x2", "x3", "x4"), configs[1:], strict=False):
        made.add_adapter(name, config)
    for i, name in enumerate(made.peft_config):
        train(made, name, seed=i)
    return made.eval()


def combined(made: Any, adapters: list[str], weights: list[float], kind: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        report = made.add_weighted_adapter(adapters, weights, "mix", combination_type=kind, **options)
    made.base_model.set_adapter("mix")
    return report


def update(layer: Any, name: str) -> Tensor:
    W = layer.original_weight().double()
    p = layer.adapters[name]
    return (p.method.weight(p, W) - W).detach()


# ---- every method and layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "layout"), CELLS)
def test_a_single_source_of_weight_one_is_the_same_function(method: str, layout: str) -> None:
    made = adapted(method, LAYOUTS[layout])
    x = LAYOUTS[layout].x()
    expected = made(x).detach()
    for i, kind in enumerate(("exact", "svd", "linear")):
        made.add_weighted_adapter(["default"], [1.0], f"same{i}", kind)
        made.base_model.set_adapter(f"same{i}")
        assert torch.allclose(made(x), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("method", "layout"), [c for c in CELLS if not LAYOUTS[c[1]].grouped and METHODS[c[0]].values is None]
)
def test_the_exact_combination_is_the_weighted_sum_of_the_updates(method: str, layout: str) -> None:
    made = adapted(method, LAYOUTS[layout], names=("x1", "x2"))
    made.add_weighted_adapter(["x1", "x2"], [0.7, -1.3], "mix", "exact")
    for _, layer in tuner_layers(made):
        expected = 0.7 * update(layer, "x1") - 1.3 * update(layer, "x2")
        assert torch.allclose(update(layer, "mix"), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("kind", [t for t in TYPES if t not in PRUNED])
def test_variants_of_lora_are_themselves(fields: dict[str, Any], kind: str) -> None:
    made = model(lora(rank_pattern={"2": 3}, alpha_pattern={"0": 5}, **fields))
    x = torch.randn(4, 6)
    expected = made(x).detach()
    combined(made, ["x1"], [1.0], kind)
    assert torch.allclose(made(x), expected, atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"svd_rank": 5, "density": 0.3}], ids=["no rank", "a rank"])
@pytest.mark.parametrize("kind", PRUNED)
def test_a_single_source_is_not_pruned_and_needs_no_density(kind: str, more: dict[str, Any]) -> None:
    made = model(lora())
    x = torch.randn(4, 6)
    expected = made(x).detach()
    combined(made, ["x1"], [1.0], kind, **more)
    assert torch.allclose(made(x), expected, atol=1e-6)
    with pytest.raises(TypeError, match="density"):
        made.add_weighted_adapter(["x1", "mix"], [1.0, 1.0], "other", combination_type=kind)


def test_an_initialisation_from_the_base_weight_is_not_repeated() -> None:
    made = model(lora(init_lora_weights="pissa"))
    x = torch.randn(4, 6)
    expected = made(x).detach()
    combined(made, ["x1"], [1.0], "svd")
    assert torch.allclose(made(x), expected, atol=1e-6)
    assert made.peft_config["mix"].init_lora_weights is True


# ---- what each type computes ------------------------------------------------------------------------------------


def factors(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    p = layer.adapters[name]
    return p.lora_A.weight.detach(), p.lora_B.weight.detach(), p.scaling


def oracle(kind: str, tensors: list[Tensor], weights: list[float], density: float, sign: str) -> Tensor:
    """The combinations as the papers state them, entry by entry, without chance."""

    def largest(t: Tensor) -> Tensor:
        count = int(density * t.numel())
        border = t.abs().flatten().sort(descending=True).values[count - 1]
        return torch.where(t.abs() >= border, t, 0)

    if kind == "plain":
        return sum(w * t for w, t in zip(weights, tensors, strict=True))  # type: ignore[return-value]
    cut = [largest(t) for t in tensors]
    if kind == "magnitude_prune":
        return sum(w * t for w, t in zip(weights, cut, strict=True))  # type: ignore[return-value]
    votes = sum(cut) if sign == "total" else sum(t.sign() for t in cut)
    elected = torch.where(votes >= 0, 1, -1)  # type: ignore[operator]
    agrees = [t.sign() == elected for t in cut]
    total = sum(w * t * m for w, t, m in zip(weights, cut, agrees, strict=True))
    return total / sum(m.float() for m in agrees).clamp(min=1)  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["linear", "magnitude_prune", "ties"])
def test_types_on_factors_take_the_root_of_weight_and_scaling_to_each_side(kind: str, sign: Any) -> None:
    made = model(lora(), lora(lora_alpha=5))
    combined(made, ["x1", "x2"], [0.7, -1.3], kind, density=0.5, majority_sign_method=sign)
    for _, layer in tuner_layers(made):
        (A1, B1, s1), (A2, B2, s2), (A, B, s) = (factors(layer, n) for n in ("x1", "x2", "mix"))
        root = [(0.7 * s1) ** 0.5, (1.3 * s2) ** 0.5]
        name = "plain" if kind == "linear" else kind
        assert s == 1
        assert torch.allclose(A, oracle(name, [A1, A2], [root[0], -root[1]], 0.5, sign), atol=1e-6)
        assert torch.allclose(B, oracle(name, [B1, B2], root, 0.5, sign), atol=1e-6)


@pytest.mark.parametrize("kind", ["svd", "magnitude_prune_svd", "ties_svd"])
def test_types_on_updates_give_the_nearest_matrix_of_the_rank(kind: str) -> None:
    made = model(lora(), lora(r=3))
    combined(made, ["x1", "x2"], [0.7, -1.3], kind, density=0.5, svd_rank=2)
    for _, layer in tuner_layers(made):
        D = [update(layer, n) for n in ("x1", "x2")]
        name = {"svd": "plain"}.get(kind, kind.removesuffix("_svd"))
        U, S, Vh = torch.linalg.svd(oracle(name, D, [0.7, -1.3], 0.5, "total"))
        assert torch.allclose(update(layer, "mix"), U[:, :2] * S[:2] @ Vh[:2], atol=1e-5)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dropping_by_chance_keeps_all_at_density_one_and_nothing_at_zero(kind: str) -> None:
    made = model(lora(), lora())
    with pytest.warns(UserWarning, match="nothing is pruned"):
        made.add_weighted_adapter(["x1", "x2"], [0.5, 0.5], "all", kind, density=1.0, svd_rank=5)
    combined(made, ["x1", "x2"], [0.5, 0.5], kind, density=0.0)
    _, layer = tuner_layers(made)[0]
    assert not update(layer, "mix").any()
    if kind == "dare_linear_svd":
        expected = 0.5 * (update(layer, "x1") + update(layer, "x2"))
        assert torch.allclose(update(layer, "all"), expected, atol=1e-5)


def test_what_chance_keeps_is_rescaled() -> None:
    torch.manual_seed(0)
    kept = merge_utils.prune(torch.ones(1000), 0.25, "random", rescale=True)
    assert set(kept.tolist()) == {0.0, 4.0}
    assert merge_utils.prune(torch.arange(8.0), 0.5, "magnitude").tolist() == [0, 0, 0, 0, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="negative"):
        merge_utils.prune(torch.ones(2), -0.1, "random")


def test_cat_holds_the_factors_side_by_side_and_ranks_may_differ() -> None:
    made = model(lora(), lora(r=3, target_modules=["0"]))
    combined(made, ["x1", "x2"], [2.0, -1.0], "cat")
    assert made.peft_config["mix"].rank_pattern == {"2": 2}
    first = made.base_model.model[0]
    (A1, B1, s1), (A2, B2, s2), (A, B, _) = (factors(first, n) for n in ("x1", "x2", "mix"))
    assert torch.allclose(A, torch.cat([2 * s1 * A1, -s2 * A2]))
    assert torch.equal(B, torch.cat([B1, B2], 1))


def test_clamped_factors_stay_within_the_quantile() -> None:
    made = model(lora(), lora())
    combined(made, ["x1", "x2"], [1.0, 1.0], "svd")
    A, B, _ = factors(made.base_model.model[0], "mix")
    limit = torch.quantile(torch.cat([B.flatten(), A.flatten()]), 0.9)
    made.base_model.set_adapter("x1")
    made.delete_adapter("mix")
    combined(made, ["x1", "x2"], [1.0, 1.0], "svd", svd_clamp=0.9)
    clamped_A, clamped_B, _ = factors(made.base_model.model[0], "mix")
    assert torch.allclose(clamped_A, A.clamp(-limit, limit), atol=1e-6)
    assert torch.allclose(clamped_B, B.clamp(-limit, limit), atol=1e-6)


def test_magnitudes_of_dora_are_combined_beside_the_directions() -> None:
    made = model(lora(use_dora=True), lora(use_dora=True))
    combined(made, ["x1", "x2"], [0.7, -1.3], "cat")
    for _, layer in tuner_layers(made):
        norm = layer.original_weight().norm(dim=-1)
        m = {n: layer.adapters[n].lora_magnitude_vector.weight for n in ("x1", "x2", "mix")}
        assert torch.allclose(m["mix"], norm + 0.7 * (m["x1"] - norm) - 1.3 * (m["x2"] - norm), atol=1e-5)


def test_biases_of_lora_are_summed_with_their_scaling() -> None:
    made = model(lora(lora_bias=True), lora(lora_bias=True, use_rslora=True))
    combined(made, ["x1", "x2"], [0.7, -1.3], "svd")
    for _, layer in tuner_layers(made):
        p = layer.adapters
        expected = 0.7 * p["x1"].scaling * p["x1"].lora_B.bias - 1.3 * p["x2"].scaling * p["x2"].lora_B.bias
        assert torch.allclose(p["mix"].lora_B.bias, expected, atol=1e-6)


def test_a_sum_with_a_bias_in_one_layer_merges_where_another_has_none() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False))
    made = get_peft_model(net, BeftConfig(target_modules=["0"], init_weights=False), adapter_name="x1").eval()
    made.add_adapter("x2", lora(target_modules=["1"]))
    combined(made, ["x1", "x2"], [1.0, 0.5], "exact")
    x = torch.randn(3, 6)
    expected = made(x)
    made.merge_adapter()
    assert torch.allclose(made(x), expected, atol=1e-6)
    plain = made.merge_and_unload()
    assert torch.allclose(plain(x), expected, atol=1e-6) and plain[1].bias is None


def test_a_wide_layer_is_combined_without_its_dense_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Tensor:
        raise AssertionError("a dense update was made")

    made = get_peft_model(nn.Sequential(nn.Linear(300, 200)), lora(target_modules=["0"]), adapter_name="x1")
    made.add_adapter("x2", lora(target_modules=["0"]))
    train(made, "x1", 0)
    train(made, "x2", 1)
    expected = update(made.base_model.model[0], "x1") + update(made.base_model.model[0], "x2")
    monkeypatch.setattr(Pair, "product", refused)
    combined(made, ["x1", "x2"], [1.0, 1.0], "svd", svd_rank=4)
    assert torch.allclose(update(made.base_model.model[0], "mix"), expected, atol=1e-4)


def test_projections_find_a_large_matrix_of_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.algebra.factors.EXACT_SIZE", 50)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    D = torch.randn(120, 4) @ torch.randn(4, 100)
    cut = Spectrum(D, 4).cut(4, torch.float32)
    assert cut.error < 1e-3
    assert torch.allclose(cut.pair.product(), D, atol=1e-3)
    torch.set_rng_state(state)


# ---- other methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FourierFTConfig(n_frequency=7), ShiraConfig(r=1, random_seed=0)])
def test_updates_at_the_same_places_stay_of_their_method(config: Any) -> None:
    config.target_modules = {"0"}
    other = type(config)(**{f: getattr(config, f) for f in ("target_modules",)}, **_sizes(config))
    made = model(config, other)
    combined(made, ["x1", "x2"], [0.5, 0.25], "svd")
    assert made.peft_config["mix"].peft_type == config.peft_type
    layer = made.base_model.model[0]
    expected = 0.5 * update(layer, "x1") + 0.25 * update(layer, "x2")
    assert torch.allclose(update(layer, "mix"), expected, atol=1e-6)


def _sizes(config: Any) -> dict[str, Any]:
    return {f: getattr(config, f) for f in ("r", "n_frequency", "random_seed") if hasattr(config, f)}


def test_updates_at_other_places_become_a_lora() -> None:
    first, second = (FourierFTConfig(n_frequency=7, target_modules=["0"], random_loc_seed=s) for s in (1, 2))
    made = model(first, second)
    report = combined(made, ["x1", "x2"], [0.5, 0.25], "exact")
    assert made.peft_config["mix"].peft_type == "LORA"
    assert report.error == 0
    layer = made.base_model.model[0]
    expected = 0.5 * update(layer, "x1") + 0.25 * update(layer, "x2")
    assert torch.allclose(update(layer, "mix"), expected, atol=1e-6)


def test_ia3_averages_its_factors_and_sums_its_updates_exactly() -> None:
    config = {"target_modules": ["0", "2"], "feedforward_modules": ["2"]}
    made = model(IA3Config(**config), IA3Config(**config))
    combined(made, ["x1", "x2"], [0.5, 0.7], "linear")
    made.add_weighted_adapter(["x1", "x2"], [0.5, 0.7], "sum", "exact")
    held = made.base_model.model[0].ia3_l
    assert torch.allclose(held["mix"], 0.5 * held["x1"] + 0.7 * held["x2"])
    assert torch.allclose(held["sum"], 1 + 0.5 * (held["x1"] - 1) + 0.7 * (held["x2"] - 1), atol=1e-6)


def test_adapters_of_several_methods_are_combined() -> None:
    made = model(lora(), FourierFTConfig(n_frequency=7, target_modules=["0"]), lora(use_dora=True))
    made.add_weighted_adapter(["x1", "x2", "x3"], [0.5, 0.7, 0.1], "mix", "exact")
    layer = made.base_model.model[0]
    expected = 0.5 * update(layer, "x1") + 0.7 * update(layer, "x2") + 0.1 * update(layer, "x3")
    assert torch.allclose(update(layer, "mix"), expected, atol=1e-5)


def test_adapters_that_act_from_a_token_on_are_combined_if_it_is_the_same() -> None:
    with pytest.warns(PeftWarning, match="CAUSAL_LM"):
        configs = [lora(alora_invocation_tokens=t) for t in ([1, 2], [1, 2], [3], None)]
    made = model(*configs)
    combined(made, ["x1", "x2"], [0.5, 0.5], "cat")
    assert made.peft_config["mix"].alora_invocation_tokens == [1, 2]
    for second in ("x3", "x4"):
        with pytest.raises(ValueError, match="same alora_invocation_tokens"):
            made.add_weighted_adapter(["x1", second], [0.5, 0.5], "no", "cat")


# ---- the rest of an adapter -------------------------------------------------------------------------------------


def test_copies_of_whole_modules_are_combined_by_their_change() -> None:
    made = model(lora(target_modules=["0"], modules_to_save=["2"]), lora(target_modules=["0"], modules_to_save=["2"]))
    head = made.base_model.model[2]
    with torch.no_grad():
        head.modules_to_save["x1"].weight.add_(1)
        head.modules_to_save["x2"].weight.mul_(2)
    combined(made, ["x1", "x2"], [0.5, 3.0], "cat")
    W, a, b = head.original_module.weight, head.modules_to_save["x1"].weight, head.modules_to_save["x2"].weight
    assert torch.allclose(head.modules_to_save["mix"].weight, W + 0.5 * (a - W) + 3 * (b - W), atol=1e-5)


def test_rows_of_tokens_are_combined_by_their_change() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    first, second = (lora(target_modules=["1"], trainable_token_indices={"0": i}) for i in ([1, 2], [2, 5]))
    made = get_peft_model(base, first, adapter_name="x1")
    made.add_adapter("x2", second)
    train(made, "x1", 0)
    train(made, "x2", 1)
    combined(made, ["x1", "x2"], [0.5, 3.0], "cat")
    layer = made.base_model.model[0].token_adapter
    W = layer.base_layer.weight
    rows = {n: layer.stack((n,)).weight().mT for n in ("x1", "x2", "mix")}
    assert torch.allclose(rows["mix"], W + 0.5 * (rows["x1"] - W) + 3 * (rows["x2"] - W), atol=1e-5)


# ---- what is refused, and what is told --------------------------------------------------------------------------


def test_the_model_is_as_before_when_a_combination_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(lora(), lora(r=3))
    names = set(made.state_dict())
    for error, arguments in {
        "is unknown": (["x1", "x2"], [1, 1], "mix", "svdd"),
        "no adapter 'y'": (["x1", "y"], [1, 1], "mix"),
        "already": (["x1"], [1], "x2"),
        "empty": ([], [], "mix"),
        "2 adapters but 1": (["x1", "x2"], [1], "mix"),
        "twice": (["x1", "x1"], [1, 1], "mix"),
        "no rank": (["x1"], [1], "mix", "svd", 0),
    }.items():
        with pytest.raises(ValueError, match=error):
            made.add_weighted_adapter(*arguments)
    with pytest.raises(TypeError, match="density"):
        made.add_weighted_adapter(["x1", "x2"], [1, 1], "mix", "ties")
    with pytest.raises(TypeError, match="list"):
        made.add_weighted_adapter("x1", [1], "mix")
    with pytest.raises(RuntimeError, match="frequency"):
        made.add_weighted_adapter(["x1", "x2"], [1, 1], "mix", "ties", density=0.5, majority_sign_method="most")

    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("peft.algebra.weighted.write", fails)
    with pytest.raises(MemoryError):
        made.add_weighted_adapter(["x1", "x2"], [1, 1], "mix")
    assert set(made.state_dict()) == names
    assert list(made.peft_config) == ["x1", "x2"]


def test_what_truncation_leaves_out_is_told() -> None:
    made = model(lora(), lora())
    with pytest.warns(PeftWarning, match=r"cut to rank 2.*Rank 4 would"):
        report = made.add_weighted_adapter(["x1", "x2"], [1.0, 1.0], "mix")
    for path, layer in tuner_layers(made):
        whole = update(layer, "x1") + update(layer, "x2")
        missing = (whole - update(layer, "mix")).norm() / whole.norm()
        assert report.errors[path.rpartition(".")[2]] == pytest.approx(float(missing), rel=1e-3)


def test_lists_beside_an_expression_are_written_out_as_names() -> None:
    made = model(lora(target_modules="0|2"), lora(target_modules=["2"]), lora(target_modules=["0"]))
    made.add_weighted_adapter(["x1", "x2"], [1.0, 1.0], "mix", "exact")
    assert made.peft_config["mix"].target_modules == {"0", "2"}
    made.add_weighted_adapter(["x2", "x3"], [1.0, 1.0], "both", "exact")
    assert made.peft_config["both"].target_modules == {"0", "2"}


def test_a_combination_is_saved_and_loaded(tmp_path: Any) -> None:
    from peft import PeftModel

    made = model(lora(), lora(r=3, target_modules=["0"]))
    combined(made, ["x1", "x2"], [2.0, -1.0], "cat")
    x = torch.randn(3, 6)
    made.save_pretrained(tmp_path, selected_adapters=["mix"])
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path / "mix")(x), made(x))


def test_a_combination_is_frozen_and_not_active() -> None:
    made = model(lora(), lora())
    made.add_weighted_adapter(["x1", "x2"], [0.5, 0.5], "mix", "linear")
    assert made.active_adapters == ["x1"]
    assert not any(p.requires_grad for p in made.adapter_parameters("mix").values())


# ---- intruder dimensions ------------------------------------------------------------------------------------------


def test_intruder_dimensions_are_scaled_down_and_the_rest_stays() -> None:
    torch.manual_seed(0)
    base = nn.Linear(40, 30, bias=False)
    base.weight.data = torch.diag_embed(torch.linspace(3, 1, 30)) @ torch.eye(30, 40)  # left vectors: the axes
    made = get_peft_model(nn.Sequential(base), lora(r=2, lora_alpha=4, target_modules=["0"]), adapter_name="x1")
    layer = made.base_model.model[0]
    u = torch.ones(30) / 30**0.5  # as far from all axes as can be
    v = torch.zeros(40)
    v[35] = 1.0
    layer.lora_B["x1"].weight.data = torch.stack([10 * u, torch.eye(30)[0]], 1)
    layer.lora_A["x1"].weight.data = torch.stack([v, 0.5 * torch.eye(40)[0]])
    before = update(layer, "x1")
    said: list[str] = []
    reduce_intruder_dimension(made, "x1", "less", top_k=3, mitigation_lambda=0.25, logging_sink=said.append)
    assert said == ["0: 1 intruder dimension"]
    assert made.active_adapters == ["less"]
    U, S, Vh = torch.linalg.svd(layer.original_weight().double() + before)
    wanted = before - 0.75 * S[0] * torch.outer(U[:, 0], Vh[0])
    U, S, Vh = torch.linalg.svd(wanted)
    assert torch.allclose(update(layer, "less"), U[:, :2] * S[:2] @ Vh[:2], atol=1e-5)
    A, B, _ = factors(layer, "less")
    assert torch.allclose(A.norm(dim=1), B.norm(dim=0), atol=1e-4)


def test_an_adapter_without_intruders_is_copied() -> None:
    made = model(lora(lora_bias=True))
    reduce_intruder_dimension(made, "x1", "same", threshold_epsilon=0.0, logging_sink=lambda _: None)
    for _, layer in tuner_layers(made):
        for one, other in zip(layer.slots("x1"), layer.slots("same"), strict=True):
            assert torch.equal(one.tensor, other.tensor)


def test_intruders_are_looked_for_in_plain_lora_only() -> None:
    made = model(ShiraConfig(r=1, target_modules=["0"]), lora(use_dora=True))
    with pytest.raises(ValueError, match="SHIRA"):
        reduce_intruder_dimension(made, "x1", "less")
    with pytest.raises(ValueError, match="no plain LoRA"):
        reduce_intruder_dimension(made, "x2", "less", logging_sink=lambda _: None)
    with pytest.raises(ValueError, match="already"):
        reduce_intruder_dimension(made, "x2", "x1")
    assert list(made.peft_config) == ["x1", "x2"]


@pytest.mark.parametrize(
    ("field", "value"), [("top_k", 0), ("top_k", 1.5), ("threshold_epsilon", 1.5), ("mitigation_lambda", float("nan"))]
)
def test_numbers_without_a_meaning_are_refused(field: str, value: Any) -> None:
    made = model(lora())
    with pytest.raises(ValueError, match=field):
        reduce_intruder_dimension(made, "x1", "less", **{field: value}, logging_sink=lambda _: None)
    assert list(made.peft_config) == ["x1"]


@pytest.mark.parametrize("training", [False, True])
def test_a_sum_drops_features_where_its_layers_train_and_nowhere_else(training):
    body = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    config = LoraConfig(r=2, target_modules=["0", "1"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(body, config).train(training)
    model.add_weighted_adapter(["default"], [1.0], "sum")
    assert all(m.training is training for n, m in model.named_modules() if n.endswith(".sum"))
    if not training:
        wanted = model(torch.ones(2, 6))
        model.set_adapter("sum")
        torch.testing.assert_close(model(torch.ones(2, 6)), wanted)
