"""Conversion to LoRA: the same function after a round trip through a file, exactly or as well as the rank allows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft
from conformance.layouts import LAYOUTS
from conformance.oracles import METHODS
from conformance.rows import adapted, cells, train, tuner_layers
from peft import (
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    PeftWarning,
    VeraConfig,
    convert_to_lora,
    get_peft_model,
    save_as_lora,
)
from peft.algebra import to_lora
from peft.algebra.factors import Spectrum

SOME = (
    *("linear-nobias", "linear-Conv1D", "conv-2d-rectangular", "conv-2d-grouped", "embedding-max-norm"),
    *("attention-packed", "attention-separate", "parameter-two"),
)
# DoRA over LoRA's product that mixes all channels has no weight; and what is no W' has no W' - W
NONE = {(m, "conv-2d-grouped") for m in ("dora", "dora-bias", "velora-dora", "kasa")}
WEIGHTS = [m for m, row in METHODS.items() if row.values is None and getattr(row, "merges", True)]
CELLS = [c for c in cells([m for m in WEIGHTS if m != "tokens"]) if c[1] in SOME and c not in NONE]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def trained(config: Any) -> PeftModel:
    made = get_peft_model(net(), config)
    train(made)
    return made.eval()


def again(made: PeftModel, base: nn.Module, folder: Path, rank: float) -> PeftModel:
    """The model with its adapter saved as a LoRA and loaded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*(LoRA already|fan_in_fan_out|was cut to)")
        save_as_lora(folder, made, rank)
        return PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(("method", "layout"), CELLS)
def test_the_whole_update_as_a_lora_is_the_same_function(method: str, layout: str, tmp_path: Path) -> None:
    cell = LAYOUTS[layout]
    made = adapted(method, cell)
    assert made.supports_lora_conversion()
    expected = made(cell.x()).detach()
    found = again(made, cell.plain(torch.float32), tmp_path, 1.0)(cell.x())
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_layer_of_which_only_the_bias_changes_is_kept(tmp_path: Path) -> None:
    made = trained(LoraConfig(r=2, target_modules=["0", "2"], lora_bias=True))
    with torch.no_grad():
        made.get_submodule("base_model.model.0").lora_B["default"].weight.zero_()
    x = torch.randn(3, 6)
    for rank in (2, 1.0):
        torch.testing.assert_close(again(made, net(), tmp_path, rank)(x), made(x))


@pytest.mark.parametrize(
    "config",
    [MissConfig(r=2), VeraConfig(r=4, d_initial=1.0), LoraConfig(r=3, use_rslora=True, init_lora_weights="pissa")],
    ids=["miss", "vera", "pissa"],
)
def test_known_factors_are_taken_without_a_decomposition(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config.target_modules = {"0"}
    made = trained(config)
    monkeypatch.setattr("peft.algebra.conversion.Spectrum", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        new, state = convert_to_lora(made, 6)
    _, layer = tuner_layers(made)[0]
    prefix = "base_model.model.0.lora_"
    product = state[f"{prefix}B.weight"] @ state[f"{prefix}A.weight"]
    assert torch.allclose(product, layer.get_delta_weight("default"), atol=1e-6)
    assert new.rank_pattern.get("0", new.r) <= 6


def test_a_whole_number_is_the_rank_of_every_layer_and_its_error_is_the_least_there_is() -> None:
    made = trained(LoHaConfig(r=4, target_modules=["0", "2"]))
    with pytest.warns(PeftWarning, match="cut to rank 2"):
        new, state = convert_to_lora(made, 2)
    assert (new.r, new.lora_alpha, new.rank_pattern) == (2, 2, {})
    report = to_lora(made, 2).report
    for path, layer in tuner_layers(made):
        D = layer.get_delta_weight("default")
        product = state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]
        tail = torch.linalg.svdvals(D)[2:].norm() / D.norm()
        assert float((product - D).norm() / D.norm()) == pytest.approx(float(tail), rel=1e-3)
        assert report.errors[path.rpartition(".")[2]] == pytest.approx(float(tail), rel=1e-3)


def test_a_share_gives_each_layer_the_smallest_rank_that_keeps_it(tmp_path: Path) -> None:
    made = trained(LoHaConfig(r=4, target_modules=["0", "2"]))
    new = to_lora(made, 0.9)
    for path, layer in tuner_layers(made):
        square = torch.linalg.svdvals(layer.get_delta_weight("default").double()).square()
        wanted = int((square.cumsum(0) < 0.9 * square.sum()).sum()) + 1
        assert new.report.ranks[path.rpartition(".")[2]] == wanted
        assert new.state[f"{path}.lora_A.weight"].shape[0] == wanted
    assert again(made, net(), tmp_path, 0.9).peft_config["default"].rank_pattern == new.config.rank_pattern


def test_layers_without_an_update_are_left_out(tmp_path: Path) -> None:
    made = trained(LoHaConfig(r=2, target_modules=["0", "2"]))
    with torch.no_grad():
        made.base_model.model[2].hada_w1_a["default"].zero_()
    new = to_lora(made, 0.99)
    assert new.config.exclude_modules == {"2"}
    assert not any(".2." in key for key in new.state)
    x = torch.randn(3, 6)
    assert torch.allclose(again(made, net(), tmp_path, 1.0)(x), made(x), atol=1e-5)


def test_whole_modules_and_tokens_come_along(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4), nn.Linear(4, 3))

    config = LoraConfig(r=2, target_modules=["1"], modules_to_save=["2"], trainable_token_indices={"0": [1, 7]})
    made = get_peft_model(base(), config)
    train(made)
    with torch.no_grad():
        made.base_model.model[2].modules_to_save["default"].weight.add_(1)
    made.eval()
    x = torch.tensor([[1, 2, 7]])
    assert torch.allclose(again(made, base(), tmp_path, 2)(x), made(x), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_become_a_lora_whose_rank_is_their_number(tied: bool) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        found = nn.Sequential()
        found.emb, found.out = nn.Embedding(12, 6), nn.Linear(6, 12)
        found.get_input_embeddings = lambda: found.emb
        if tied:
            found.out.weight = found.emb.weight
        return found

    tokens = torch.arange(12)
    made = get_peft_model(base(), peft.TrainableTokensConfig(token_indices=[3, 7, 1], target_modules=["emb"]))
    train(made)
    expected = made.eval()(tokens)
    for rank in (3, 6, 1.0):
        new = to_lora(made, rank)
        assert set(new.report.errors.values()) == {0.0} and set(new.report.ranks.values()) == {3}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*shared by")
            lora = get_peft_model(base(), new.config)
        peft.set_peft_model_state_dict(lora, new.state, strict=True)
        assert torch.allclose(lora.eval()(tokens), expected, atol=1e-5)
        assert {p.rpartition(".")[2] for p in new.report.ranks} == ({"emb", "out"} if tied else {"emb"})
    assert all(e > 0.01 for e in to_lora(made, 2).report.errors.values())


def test_a_model_with_injected_adapters_is_converted_under_its_own_names() -> None:
    base = net()
    peft.inject_adapter_in_model(MissConfig(r=2, target_modules=["0"]), base)
    base[0].miss_block["default"].data.normal_()
    new, state = convert_to_lora(base, 2)
    assert set(state) == {"0.lora_A.weight", "0.lora_B.weight"}
    assert new.target_modules == {"0"}


def test_random_projections_take_the_place_of_a_large_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.algebra.factors.EXACT_SIZE", 64)
    torch.manual_seed(0)
    D = torch.randn(300, 5) @ torch.randn(5, 200) + 0.01 * torch.randn(300, 200)
    exact = float(torch.linalg.svdvals(D)[5:].norm() / D.norm())
    spectrum = Spectrum(D, 5)
    assert not spectrum.complete
    assert spectrum.cut(5, torch.float32).error == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "8"])
def test_ranks_that_cannot_be_are_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match="is no rank"):
        convert_to_lora(trained(MissConfig(r=2, target_modules=["0"])), rank)


def test_what_cannot_be_converted_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than the update"):
        convert_to_lora(trained(LoHaConfig(r=2, target_modules=["0"])), 7)
    normed = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    made = get_peft_model(normed, LNTuningConfig(target_modules=["1"]))
    assert not made.supports_lora_conversion()
    with pytest.raises(TypeError, match="LN_TUNING"):
        convert_to_lora(made, 2)
    with pytest.warns(PeftWarning, match="CAUSAL_LM"):
        late = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], alora_invocation_tokens=[1]))
    with pytest.raises(TypeError, match="depends on its input"), pytest.warns(PeftWarning, match="LoRA already"):
        convert_to_lora(late, 2)
    with pytest.raises(ValueError, match="bias='all'"):
        convert_to_lora(get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], bias="all")), 2)
    with pytest.raises(ValueError, match="changes nothing"):
        convert_to_lora(get_peft_model(net(), LoHaConfig(r=2, target_modules=["0"])), 0.9)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        save_as_lora(tmp_path, trained(MissConfig(r=2, target_modules=["0"])), 2, adapter_name="other")
    assert not list(tmp_path.iterdir())


def test_a_lora_is_converted_with_a_word() -> None:
    with pytest.warns(PeftWarning, match="LoRA already"):
        convert_to_lora(trained(LoraConfig(r=4, target_modules=["0"])), 4)


def test_the_model_stays_as_it_is() -> None:
    made = trained(LoHaConfig(r=2, target_modules=["0", "2"]))
    before: dict[str, Tensor] = {k: v.clone() for k, v in made.state_dict().items()}
    to_lora(made, 0.5)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert list(made.peft_config) == ["default"]
