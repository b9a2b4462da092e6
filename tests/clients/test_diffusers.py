"""Adapters inside diffusers' models, against plain models with the same updates added to their weights.

What diffusers asks of the library, and the test that holds it (here, or in the two files beside):

| touchpoint | test |
|---|---|
| `inject_adapter_in_model(config, model, name, state_dict=)`: the keys choose | test_a_file_s_keys... |
| `set_peft_model_state_dict(...)` -> `.unexpected_keys`, `.missing_keys` | test_a_file_s_odd_keys... |
| `rank_pattern`, `alpha_pattern` as `^name` | test_ranks_and_alphas... |
| an unknown field is a TypeError | test_an_unknown_field... |
| the failed load: `active_adapters`, `delete_adapter`, `peft_config.pop` | test_a_failed_load... |
| `set_adapter(list)`, `set_scale`; active, disabled, enabled | test_adapters_weigh... |
| an adapter that a layer lacks is ignored by `set_scale` | test_adapters_of_other_layers... |
| `set_scale` is no product; `scale_layer`, `unscale_layer` are; rsLoRA | test_weights_are_relative... |
| weights by block | test_blocks_have_weights |
| `len(module.r)` names new adapters | test_names_are_counted |
| `merge(safe_merge=, adapter_names=)`, `unmerge()`, `merged_adapters` | test_fusing... |
| `base_layer`, `get_base_layer()`, `_get_submodules`; `del model.peft_config` | test_unloading... |
| `delete_adapter`; the last one takes `peft_config` with it | test_deleting... |
| `get_peft_model_state_dict`, `peft_config[a].to_dict()` as JSON | test_saving... |
| "gaussian", `lora_bias`, DoRA, `modules_to_save`, LoHa, LoKr ... | test_other_adapters |
| `adapter_layer_names` of LoRA, LoHa, LoKr; `disable_input_dtype_casting` | test_weights_stored_in_less |
| `factorization`, LoKrConfig from a file | test_kronecker_files... |
| a sharded model and adapters refuse each other (`BaseTunerLayer`) | test_sharding_is_refused |
| hotswap: the three functions of `peft.utils.hotswap` | test_diffusers_hotswap.py |
| pipelines, text encoders, `set_lora_device`, PeftModel inside | test_diffusers_pipelines.py |
"""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.hooks import apply_layerwise_casting, tensor_parallel
from safetensors import safe_open
from safetensors.torch import load_file

from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftWarning,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from .pixels import TARGETS, added, denoised, factors, network, random

each_model = pytest.mark.parametrize("kind", ["unet", "flux", "sd3"])
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # diffusers warns about itself
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
]
close = {"rtol": 1e-4, "atol": 1e-5}


def loaded(kind: str, **adapters: dict[str, Any]) -> Any:
    """A model with LoRA files loaded under names."""
    model = network(kind)
    for name, state in adapters.items():
        model.load_lora_adapter(dict(state), prefix=None, adapter_name=name)
    return model


def layers(model: Any) -> dict[str, BaseTunerLayer]:
    """Adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


@each_model
def test_a_file_s_keys_choose_the_layers(kind):
    plain = network(kind)
    state = factors(plain, 1)
    model = loaded(kind, one=state)
    assert layers(model).keys() == {name.rpartition(".lora_")[0] for name in state}
    assert list(model.peft_config) == ["one"] and not hasattr(model, "base_model")
    torch.testing.assert_close(denoised(model, kind), denoised(added(plain, (state, 1.0)), kind), **close)


@pytest.mark.parametrize("low", [True, False])
def test_a_file_s_odd_keys_are_told_under_the_adapter_s_name(low):
    state = factors(network("unet"), 1)
    away, model = next(iter(state)), loaded("unet", one=state)
    changed = {**{k: v for k, v in state.items() if k != away}, "x.lora_A.weight": random(2, 2)}
    with pytest.warns(PeftWarning) as told:
        found = set_peft_model_state_dict(model, changed, "one", low_cpu_mem_usage=low)
    assert len(told) == 2
    assert found.unexpected_keys == ["x.lora_A.weight"]
    assert found.missing_keys == [away.replace(".weight", ".one.weight")]


@each_model
def test_ranks_and_alphas_of_their_own(kind):
    plain = network(kind)
    few, many = factors(plain, 1), factors(plain, 2, r=5)
    names = sorted({name.rpartition(".lora_")[0] for name in few})
    state = {k: (many if k.startswith(tuple(f"{n}." for n in names[::3])) else few)[k] for k in few}
    alphas = {f"m.{name}.alpha": float(1 + place % 3) for place, name in enumerate(names)}
    model = network(kind)
    model.load_lora_adapter(
        {f"m.{k}": v for k, v in state.items()}, prefix="m", adapter_name="one", network_alphas=dict(alphas)
    )
    scales = {name: layer.scaling["one"] for name, layer in layers(model).items()}
    assert scales == {n: alphas[f"m.{n}.alpha"] / layer.r["one"] for n, layer in layers(model).items()}
    assert all(key.startswith("^") for key in model.peft_config["one"].rank_pattern)
    torch.testing.assert_close(
        denoised(model, kind), denoised(added(plain, (state, lambda name: scales[name])), kind), **close
    )


def test_an_unknown_field_is_a_type_error():
    state = factors(network("unet"), 1)
    model = network("unet")
    metadata = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"], "of_another_age": 1}
    with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated") as error:
        model.load_lora_adapter(state, prefix=None, metadata=metadata)
    assert "of_another_age" in str(error.value.__cause__)
    assert not layers(model)


@each_model
@pytest.mark.parametrize("first", [False, True])
def test_a_failed_load_leaves_what_was_there(kind, first):
    plain = network(kind)
    good, bad = factors(plain, 1), factors(plain, 2)
    bad[list(bad)[-2]] = random(2, 99)
    model = loaded(kind, **({"one": good} if first else {}))
    before = denoised(model, kind)
    with pytest.raises(Exception, match="99"):
        model.load_lora_adapter(dict(bad), prefix=None, adapter_name="two")
    assert list(getattr(model, "peft_config", {})) == (["one"] if first else [])
    assert not [name for name, _ in model.named_parameters() if ".two." in name]
    assert torch.equal(denoised(model, kind), before)
    model.load_lora_adapter(dict(factors(plain, 3)), prefix=None, adapter_name="two")
    assert "two" in model.peft_config


@each_model
@pytest.mark.parametrize("weights", [None, 0.5, [0.25, 2.0], [0.0, 1.0], [None, -1.0]])
def test_adapters_weigh_what_they_are_given(kind, weights):
    plain = network(kind)
    one, two = factors(plain, 1), factors(plain, 2, r=3)
    model = loaded(kind, one=one, two=two)
    for _ in range(2):  # not cumulative
        model.set_adapters(["one", "two"], weights)
    a, b = weights if isinstance(weights, list) else (weights, weights)
    a, b = (1.0 if w is None else w for w in (a, b))
    expected = denoised(added(network(kind), (one, a), (two, b)), kind)
    assert model.active_adapters() == ["one", "two"]
    torch.testing.assert_close(denoised(model, kind), expected, **close)
    model.disable_adapters()
    assert torch.equal(denoised(model, kind), denoised(plain, kind))
    model.enable_lora()
    torch.testing.assert_close(denoised(model, kind), expected, **close)
    model.disable_lora()
    assert torch.equal(denoised(model, kind), denoised(plain, kind))
    model.enable_adapters()
    model.set_adapter("two")
    assert model.active_adapters() == ["two"]
    torch.testing.assert_close(denoised(model, kind), denoised(added(plain, (two, b)), kind), **close)


def test_adapters_of_other_layers_are_left_alone():
    plain = network("unet")
    one, two = factors(plain, 1, of="down_blocks"), factors(plain, 2, of="attn2")
    model = loaded("unet", one=one, two=two)
    model.set_adapters(["one", "two"], [0.5, 3.0])
    expected = denoised(added(plain, (one, 0.5), (two, 3.0)), "unet")
    torch.testing.assert_close(denoised(model, "unet"), expected, **close)
    only = next(m for name, m in layers(model).items() if "attn2" not in name)
    only.set_scale("two", 7.0)
    assert only.scaling == {"one": 0.5}


@pytest.mark.parametrize("rslora", [False, True])
def test_weights_are_relative_to_alpha_over_r(rslora):
    model = network("unet")
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["to_q", "conv1"], init_lora_weights=False)
    model.add_adapter(config, "one")
    usual = 6 / (math.sqrt(4) if rslora else 4)
    layer = next(iter(layers(model).values()))
    for weight in (0.5, 0.5, 2.0, 1.0):
        model.set_adapters("one", weight)
        assert layer.scaling["one"] == pytest.approx(weight * usual)
    layer.scale_layer(3.0)
    layer.scale_layer(2.0)  # these add up
    assert layer.scaling["one"] == pytest.approx(6 * usual)
    layer.unscale_layer(2.0)
    assert layer.scaling["one"] == pytest.approx(3 * usual)
    layer.unscale_layer(None)
    assert layer.scaling["one"] == pytest.approx(usual)


def test_blocks_have_weights():
    plain = network("unet")
    one, two = factors(plain, 1), factors(plain, 2)
    model = loaded("unet", one=one, two=two)
    weights = {"mid": 0.25, "down": 0.5, "up": {"block_0": [2.0, 3.0]}}
    model.set_adapters(["one", "two"], [weights, 0.75])

    def scale(name: str) -> float:
        if "attentions" not in name:
            return {"d": 0.5, "m": 0.25}.get(name[0], 1.0)
        if name.startswith("up_blocks.0"):
            return 2.0 if ".attentions.0." in name else 3.0
        return {"d": 0.5, "m": 0.25}[name[0]]

    found = {name: layer.scaling["one"] for name, layer in layers(model).items() if "attentions" in name}
    assert found == {name: scale(name) for name in found}
    expected = denoised(added(plain, (one, lambda n: layers(model)[n].scaling["one"]), (two, 0.75)), "unet")
    torch.testing.assert_close(denoised(model, "unet"), expected, **close)


def test_names_are_counted():
    model = network("flux")
    for count in range(3):
        model.load_lora_adapter(factors(network("flux"), count), prefix=None)
    assert list(model.peft_config) == ["default_0", "default_1", "default_2"]
    assert {len(layer.r) for layer in layers(model).values()} == {3}


@each_model
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("names", [None, ["two"], ["one", "two"]])
def test_fusing_and_unfusing(kind, safe, names):
    plain = network(kind)
    one, two = factors(plain, 1), factors(plain, 2)
    model = loaded(kind, one=one, two=two)
    model.set_adapters(["one", "two"], [0.5, 0.25])
    weights = {name: layer.weight.clone() for name, layer in layers(model).items()}
    model.fuse_lora(lora_scale=0.5, safe_fusing=safe, adapter_names=names)
    for layer in layers(model).values():
        assert layer.merged and layer.merged_adapters == (names or ["one", "two"])
    expected = denoised(added(plain, (one, 0.25), (two, 0.125)), kind)  # what is not fused goes on
    torch.testing.assert_close(denoised(model, kind), expected, **close)
    model.unfuse_lora()
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in layers(model).items())
    assert not any(layer.merged for layer in layers(model).values())
    torch.testing.assert_close(denoised(model, kind), expected, **close)  # scale_layer holds
    model.set_adapters(["one", "two"], [0.5, 0.25])
    torch.testing.assert_close(
        denoised(model, kind), denoised(added(network(kind), (one, 0.5), (two, 0.25)), kind), **close
    )


def test_what_is_fused_and_what_is_active_are_two_things():
    plain = network("flux")
    one, two = factors(plain, 1), factors(plain, 2)
    model = loaded("flux", one=one, two=two)  # the last one is active
    model.fuse_lora(adapter_names=["one"])
    expected = denoised(added(network("flux"), (one, 1.0), (two, 1.0)), "flux")
    torch.testing.assert_close(denoised(model, "flux"), expected, **close)
    model.disable_lora()
    assert torch.equal(denoised(model, "flux"), denoised(plain, "flux"))
    model.enable_lora()
    torch.testing.assert_close(denoised(model, "flux"), expected, **close)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapters(["two"], 0.5)
    torch.testing.assert_close(denoised(model, "flux"), denoised(added(plain, (two, 0.5)), "flux"), **close)


@each_model
@pytest.mark.parametrize("fused", [False, True])
def test_unloading_gives_the_model_back(kind, fused):
    plain = network(kind)
    state = factors(plain, 1)
    model = loaded(kind, one=state)
    kinds = {name: type(m) for name, m in plain.named_modules()}
    if fused:
        model.fuse_lora()
    model.unload_lora()
    assert not hasattr(model, "peft_config")
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    expected = denoised(added(plain, (state, 1.0)) if fused else plain, kind)
    torch.testing.assert_close(denoised(model, kind), expected, **close)
    model.load_lora_adapter(dict(state), prefix=None, adapter_name="again")
    assert model.active_adapters() == ["again"]


@each_model
def test_deleting(kind):
    plain = network(kind)
    one, two = factors(plain, 1), factors(plain, 2)
    model = loaded(kind, one=one, two=two)
    model.set_adapters(["one", "two"])
    model.delete_adapters("one")
    assert list(model.peft_config) == ["two"] == model.active_adapters()
    assert not [name for name, _ in model.named_parameters() if ".one." in name]
    torch.testing.assert_close(denoised(model, kind), denoised(added(network(kind), (two, 1.0)), kind), **close)
    model.delete_adapters(["two"])
    assert not hasattr(model, "peft_config")
    assert torch.equal(denoised(model, kind), denoised(plain, kind))
    model.load_lora_adapter(dict(one), prefix=None, adapter_name="one")
    torch.testing.assert_close(denoised(model, kind), denoised(added(plain, (one, 1.0)), kind), **close)


@each_model
def test_saving_tells_all_of_the_configuration(kind, tmp_path):
    model = network(kind)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS[kind],
        rank_pattern={"to_q": 2},
        init_lora_weights=False,
        use_rslora=True,
    )
    model.add_adapter(config, "one")
    model.save_lora_adapter(tmp_path, adapter_name="one")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    assert state.keys() == get_peft_model_state_dict(model, adapter_name="one").keys()
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert told["peft_type"] == "LORA" and set(told["target_modules"]) == set(TARGETS[kind])
    assert LoraConfig(**told).to_dict() == config.to_dict()
    again = network(kind)
    again.load_lora_adapter(tmp_path, prefix=None, adapter_name="one", weight_name=file.name)
    assert again.peft_config["one"].to_dict() == config.to_dict()
    assert torch.equal(denoised(again, kind), denoised(model, kind))


@pytest.mark.parametrize("names", [["one"], ["two"], ["one", "two"]])
def test_deleting_what_is_fused_leaves_it_in_the_weights(names):
    plain = network("unet")
    one, two = factors(plain, 1), factors(plain, 2)
    model = loaded("unet", one=one, two=two)
    model.set_adapters(["one", "two"])
    model.fuse_lora()
    before = denoised(model, "unet")
    model.delete_adapters(names)
    assert torch.equal(denoised(model, "unet"), before)
    assert not [n for n, _ in model.named_parameters() if any(f".{name}." in n for name in names)]
    left = [name for name in ("one", "two") if name not in names]
    for layer in layers(model).values():
        assert layer.merged_adapters == left
    if left:
        model.unfuse_lora()
        kept = {"one": (one, 1.0), "two": (two, 1.0)}[names[0]]
        model.disable_lora()
        torch.testing.assert_close(denoised(model, "unet"), denoised(added(plain, kept), "unet"), **close)
        model.enable_lora()
        torch.testing.assert_close(denoised(model, "unet"), before, **close)


OTHER: dict[str, PeftConfig] = {
    "gaussian": LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights="gaussian"),
    "bias": LoraConfig(r=2, target_modules=["to_out.0", "conv1"], lora_bias=True, init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["to_q", "conv1"], use_dora=True, init_lora_weights=False),
    "excluded": LoraConfig(r=2, target_modules=["to_q", "conv1"], exclude_modules="down.*", init_lora_weights=False),
    "whole": LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_in"], init_lora_weights=False),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], init_weights=False),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], init_weights=False),
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_adapters(kind, tmp_path):
    plain, model = network("unet"), network("unet")
    model.add_adapter(OTHER[kind], "one")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    tuned = denoised(model, "unet")
    assert not torch.allclose(tuned, denoised(plain, "unet"), atol=1e-3)
    model.train()
    model(random(1, 4, 8, 8), 3, random(1, 5, 16)).sample.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    model.eval()
    state = get_peft_model_state_dict(model, adapter_name="one")
    other = network("unet")
    other.add_adapter(OTHER[kind], "one")
    found = set_peft_model_state_dict(other, state, "one")
    assert not found.unexpected_keys
    assert torch.equal(denoised(other, "unet"), tuned)
    model.set_adapters("one", 0.5)
    half = {layer.scaling["one"] for layer in layers(model).values()}
    assert half == {OTHER[kind].to_dict().get("alpha", 8) / 4}
    model.set_adapters("one", 1.0)
    model.fuse_lora()
    torch.testing.assert_close(denoised(model, "unet"), tuned, **close)
    model.unfuse_lora()
    torch.testing.assert_close(denoised(model, "unet"), tuned, rtol=0, atol=0)
    model.unload_lora()
    if kind != "whole":
        assert {name: type(m) for name, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
        assert torch.equal(denoised(model, "unet"), denoised(plain, "unet"))


def test_kronecker_files_say_their_own_sizes():
    plain, expected, state = network("flux"), network("flux"), {}
    for place, (name, module) in enumerate(plain.named_modules()):
        if not name.endswith((".to_q", "proj_mlp")):
            continue
        out, inp = module.weight.shape
        w1, a, b = random(4, 4, seed=place), random(out // 4, 2, seed=place + 50), random(2, inp // 4, seed=place + 90)
        state[f"{name}.lokr_w1"] = w1
        if name.endswith("to_q"):  # too small for two factors
            state[f"{name}.lokr_w2"] = a @ b
        else:
            state |= {f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
        with torch.no_grad():
            expected.get_submodule(name).weight += torch.kron(w1, a @ b)
    model = network("flux")
    model.load_lora_adapter(dict(state), prefix=None, adapter_name="one")
    assert isinstance(model.peft_config["one"], LoKrConfig)
    assert get_peft_model_state_dict(model, adapter_name="one").keys() == state.keys()
    torch.testing.assert_close(denoised(model, "flux"), denoised(expected, "flux"), **close)


def test_factorization_is_the_nearest_to_a_square_or_the_factor_asked_for():
    assert [factorization(n) for n in (36, 250, 127)] == [(6, 6), (10, 25), (1, 127)]
    assert [factorization(n, 4) for n in (36, 250)] == [(4, 9), (2, 125)]


@pytest.mark.parametrize("config", [OTHER["gaussian"], OTHER["loha"], OTHER["lokr"]], ids=["lora", "loha", "lokr"])
def test_weights_stored_in_less(config):
    model = network("unet")
    model.add_adapter(config, "one")
    names = {name for kind in (LoraLayer, LoHaLayer, LoKrLayer) for name in kind.adapter_layer_names}
    before = denoised(model, "unet")
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    own = {name for name in kinds if names & set(name.split("."))}
    assert own and {kinds[name] for name in own} == {torch.float32}
    assert {t for n, t in kinds.items() if n.endswith("to_k.weight")} == {torch.bfloat16}
    torch.testing.assert_close(denoised(model, "unet"), before, rtol=0.05, atol=0.05)


def test_inputs_are_not_cast_where_the_client_stores_them_in_less():
    model = loaded("unet", one=factors(network("unet"), 1))
    before = denoised(model, "unet")
    seen = []
    for layer in layers(model).values():
        layer.base_layer.register_forward_hook(lambda *_, of=layer: seen.append(of.cast_input_dtype_enabled))
    apply_layerwise_casting(model, torch.bfloat16, torch.float32, skip_modules_pattern=())
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    torch.testing.assert_close(denoised(model, "unet"), before, rtol=0.1, atol=0.1)
    assert set(seen) == {False}
    assert all(layer.cast_input_dtype_enabled for layer in layers(model).values())
    with disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in layers(model).values())


def refuse_sharding(model: Any) -> None:
    """The look that diffusers takes before it shards a model."""
    tensor_parallel._check_tp_supported("Flux", {}, None, SimpleNamespace(mesh=None, tp_degree=1), model=model)


def test_sharding_is_refused():
    model = loaded("flux", one=factors(network("flux"), 1))
    with pytest.raises(ValueError, match=r"has adapter \(LoRA\) layers injected"):
        refuse_sharding(model)
    model.unload_lora()
    refuse_sharding(model)
