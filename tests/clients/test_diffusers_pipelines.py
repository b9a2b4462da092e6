"""Pipelines of diffusers: LoRA files of three programs, text encoders, weights; against pipelines of plain weights.

| touchpoint | test |
|---|---|
| `load_lora_weights` of PEFT's, kohya's and diffusers' names, with alphas | test_files_of_three_programs... |
| files that `peft convert` writes | test_what_is_converted... |
| `save_lora_weights` with and without metadata; `_collate_lora_metadata` | test_saving_and_loading... |
| text encoders: `add_adapter`, `set_peft_model_state_dict(..., adapter_name="default")` | test_a_text_encoder... |
| `set_adapters` with weights by component and block; `scale_layer`, `unscale_layer` | test_weights..., test_a_call... |
| `get_active_adapters`, `get_list_adapters`, `disable_lora`, `delete_adapters` | test_lists... |
| `fuse_lora(components)`, `num_fused_loras`, `unfuse_lora`, `unload_lora_weights` | test_fusing..., test_one... |
| `set_lora_device`: `lora_A`, `lora_B`, `lora_magnitude_vector` re-assigned | test_adapters_wait... |
| `isinstance(model, PeftModel)`, then `base_model.model` | test_a_wrapped_model... |
| offloading: hooks taken off and put back on loading | test_loading_under_offloading |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata, _set_state_dict_into_text_encoder
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.convert import convert_adapter
from peft.tuners.tuners_utils import BaseTunerLayer

from .pixels import added, denoised, factors, network, pipeline, pixart, random, said, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # diffusers warns about itself
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
]
close = {"rtol": 1e-3, "atol": 1e-4}
each_pipeline = pytest.mark.parametrize("kind", ["unet", "flux", "sd3"])
PART = {"unet": "unet", "flux": "transformer", "sd3": "transformer"}
FILE = "pytorch_lora_weights.safetensors"


def text_factors(encoder: Any, seed: int, r: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA of a text encoder's attention."""
    made = {}
    for name, module in encoder.named_modules():
        if name.endswith(("q_proj", "v_proj", "out_proj")):
            made[f"{name}.lora_A.weight"] = random(r, module.in_features, seed=seed + len(made))
            made[f"{name}.lora_B.weight"] = random(module.out_features, r, seed=seed + 1 + len(made))
    return made


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names with a component's in front."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def plain(kind: str, updates: Any = (), text: Any = ()) -> Any:
    """A pipeline with updates in its weights."""
    pipe = pipeline(kind)
    added(getattr(pipe, PART[kind]), *updates)
    added(pipe.text_encoder, *text)
    return pipe


def same(pipe: Any, other: Any, **more: Any) -> None:
    """Whether two pipelines make the same picture."""
    torch.testing.assert_close(said(pipe, **more), said(other), **close)


def kohya(state: dict[str, torch.Tensor], prefix: str, alpha: float) -> dict[str, torch.Tensor]:
    """The same in kohya's names."""
    made = {}
    for name, tensor in state.items():
        module, part = name.removesuffix(".weight").rsplit(".", 1)
        flat = f"{prefix}_{module.replace('.', '_')}"
        made[f"{flat}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = tensor
        made[f"{flat}.alpha"] = torch.tensor(alpha)
    return made


@pytest.mark.parametrize("names", ["peft", "diffusers", "kohya"])
def test_files_of_three_programs(names, tmp_path):
    pipe = pipeline("unet")
    one, text = factors(pipe.unet, 1, of="attentions"), text_factors(pipe.text_encoder, 2)
    scale = 1.0
    if names == "peft":
        file = {**prefixed("unet", one), **prefixed("text_encoder", text)}
    elif names == "diffusers":
        rename = {".lora_A.weight": ".lora.down.weight", ".lora_B.weight": ".lora.up.weight"}
        file = prefixed("unet", {k[:-14] + rename[k[-14:]]: v for k, v in one.items()})
        old = convert_state_dict_to_diffusers(dict(text))
        file |= prefixed("text_encoder", old)
    else:
        scale = 0.75
        file = {**kohya(one, "lora_unet", 1.5), **kohya(text, "lora_te_text_model", 1.5)}
    save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / FILE)
    pipe.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="one")
    assert pipe.get_list_adapters() == {"unet": ["one"], "text_encoder": ["one"]}
    same(pipe, plain("unet", [(one, scale)], [(text, scale)]))


@each_pipeline
def test_peft_names_load_into_each_pipeline(kind, tmp_path):
    pipe = pipeline(kind)
    one, text = factors(getattr(pipe, PART[kind]), 1), text_factors(pipe.text_encoder, 2)
    pipe.load_lora_weights({**prefixed(PART[kind], one), **prefixed("text_encoder", text)}, adapter_name="one")
    same(pipe, plain(kind, [(one, 1.0)], [(text, 1.0)]))


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_what_is_converted_is_what_diffusers_reads(to, tmp_path):
    targets = ["to_q", "to_k", "to_out.0", "proj_in", "conv1"]
    model = get_peft_model(
        network("unet"), LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    written = tmp_path / "file.safetensors"
    convert_adapter(tmp_path / "adapter", to, written, component="unet")
    if written.is_dir():
        written = next(written.glob("*.safetensors"))
    pipe = pipeline("unet")
    pipe.load_lora_weights(str(written.parent), weight_name=written.name, adapter_name="one")
    torch.testing.assert_close(denoised(pipe.unet, "unet"), denoised(model, "unet"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("told", [True, False])
def test_saving_and_loading_a_pipeline_s_adapters(told, tmp_path):
    pipe = pipeline("unet")
    alpha = 4 if told else 2  # without metadata, alpha is r
    settings = {"r": 2, "lora_alpha": alpha, "init_lora_weights": False}
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "conv1"], **settings))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj", "fc1"], **settings))
    metadata = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder}) if told else {}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **metadata,
    )
    assert {name.split(".")[0] for name in load_file(tmp_path / FILE)} == {"unet", "text_encoder"}
    again = pipeline("unet")
    again.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="default")
    torch.testing.assert_close(said(again), said(pipe), rtol=0, atol=0)
    if told:
        assert again.unet.peft_config["default"].to_dict() == pipe.unet.peft_config["default"].to_dict()
    assert not torch.allclose(said(again), said(pipeline("unet")), atol=1e-3)


def test_a_text_encoder_takes_an_adapter_of_a_training_script(tmp_path):
    pipe, other = pipeline("unet"), pipeline("unet")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for one in (pipe, other):
        one.text_encoder.add_adapter(config)
    state = get_peft_model_state_dict(pipe.text_encoder)
    saved = prefixed("text_encoder", convert_state_dict_to_diffusers(dict(state)))
    _set_state_dict_into_text_encoder(saved, prefix="text_encoder.", text_encoder=other.text_encoder)
    torch.testing.assert_close(said(other), said(pipe), rtol=0, atol=0)


def test_weights_by_component_and_block_and_of_one_call():
    pipe = pipeline("unet")
    one, two = factors(pipe.unet, 1, of="attentions"), factors(pipe.unet, 5)
    text = text_factors(pipe.text_encoder, 2)
    pipe.load_lora_weights({**prefixed("unet", one), **prefixed("text_encoder", text)}, adapter_name="one")
    pipe.load_lora_weights(prefixed("unet", two), adapter_name="two")
    pipe.set_adapters(["one", "two"], [{"text_encoder": 0.5, "unet": {"down": 0.25, "mid": 0.75, "up": 2.0}}, 0.125])
    by_block = {"d": 0.25, "m": 0.75, "u": 2.0}
    updates = [(one, lambda name: by_block[name[0]]), (two, 0.125)]
    same(pipe, plain("unet", updates, [(text, 0.5)]))
    halved = [(one, lambda name: by_block[name[0]] / 2), (two, 0.0625)]
    same(pipe, plain("unet", halved, [(text, 0.25)]), cross_attention_kwargs={"scale": 0.5})
    same(pipe, plain("unet"), cross_attention_kwargs={"scale": 0.0})
    pipe.set_adapters(["one", "two"], [0.5, 1.0])
    same(pipe, plain("unet", [(one, 0.5), (two, 1.0)], [(text, 0.5)]))


def test_a_call_s_scale_in_a_transformer():
    pipe = pipeline("flux")
    one = factors(pipe.transformer, 1)
    pipe.load_lora_weights(prefixed("transformer", one), adapter_name="one")
    same(pipe, plain("flux", [(one, 0.5)]), joint_attention_kwargs={"scale": 0.5})
    same(pipe, plain("flux", [(one, 1.0)]))


def test_lists_and_switches():
    pipe = pipeline("sd3")
    one, two = factors(pipe.transformer, 1), factors(pipe.transformer, 5)
    text = text_factors(pipe.text_encoder, 2)
    pipe.load_lora_weights({**prefixed("transformer", one), **prefixed("text_encoder", text)}, adapter_name="one")
    pipe.load_lora_weights(prefixed("transformer", two), adapter_name="two")
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"], "text_encoder": ["one"]}
    pipe.set_adapters(["one", "two"])
    assert pipe.get_active_adapters() == ["one", "two"]
    both = plain("sd3", [(one, 1.0), (two, 1.0)], [(text, 1.0)])
    same(pipe, both)
    pipe.disable_lora()
    same(pipe, plain("sd3"))
    pipe.enable_lora()
    same(pipe, both)
    pipe.delete_adapters("one")
    assert pipe.get_list_adapters() == {"transformer": ["two"]}
    same(pipe, plain("sd3", [(two, 1.0)]))
    with pytest.raises(ValueError, match="three"):
        pipe.set_adapters("three")


@pytest.mark.parametrize("parts", [["unet"], ["text_encoder"], ["unet", "text_encoder"]])
def test_fusing_components_of_a_pipeline(parts):
    pipe = pipeline("unet")
    one, text = factors(pipe.unet, 1), text_factors(pipe.text_encoder, 2)
    pipe.load_lora_weights({**prefixed("unet", one), **prefixed("text_encoder", text)}, adapter_name="one")
    pipe.fuse_lora(components=parts, lora_scale=0.5)
    assert pipe.num_fused_loras == 1 and pipe.fused_loras == {"one"}
    scales = [0.5 if part in parts else 1.0 for part in ("unet", "text_encoder")]
    expected = plain("unet", [(one, scales[0])], [(text, scales[1])])
    same(pipe, expected)
    pipe.unfuse_lora(components=parts)
    assert pipe.num_fused_loras == 0
    same(pipe, expected)
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()  # what is fused stays
    assert not any(isinstance(m, BaseTunerLayer) for part in (pipe.unet, pipe.text_encoder) for m in part.modules())
    only = plain("unet", [(one, scales[0])] * ("unet" in parts), [(text, scales[1])] * ("text_encoder" in parts))
    same(pipe, only)


def test_one_adapter_fused_at_each_stage_of_a_pipeline(tmp_path):
    pipe = pipeline("flux")
    fast, style = factors(pipe.transformer, 1), factors(pipe.transformer, 5)
    pipe.load_lora_weights(prefixed("transformer", fast), adapter_name="fast")
    pipe.fuse_lora(adapter_names=["fast"], lora_scale=0.5, components=["transformer"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    pipe.load_lora_weights(prefixed("transformer", style), adapter_name="style")
    same(pipe, plain("flux", [(fast, 0.5), (style, 1.0)]))
    saved = type(pipe.transformer).from_pretrained(tmp_path, subfolder="transformer")
    torch.testing.assert_close(
        denoised(saved, "flux"), denoised(added(network("flux"), (fast, 0.5)), "flux"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_wait_on_another_device(dora):
    pipe = pipeline("unet")
    config = LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False, use_dora=dora)
    for name in ("one", "two"):
        pipe.unet.add_adapter(config, name)
    pipe.set_adapters("one")
    before = said(pipe)
    pipe.set_lora_device(["two"], "meta")
    where = {n: p.device.type for n, p in pipe.unet.named_parameters()}
    assert {d for n, d in where.items() if ".two" in n} == {"meta"}
    assert {d for n, d in where.items() if ".two" not in n} == {"cpu"}
    assert torch.equal(said(pipe), before)
    pipe.set_lora_device(["one"], "cpu")
    assert torch.equal(said(pipe), before)


def test_a_wrapped_model_is_known_by_the_pipeline(tmp_path):
    pipe = pipeline("unet")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.unet = get_peft_model(pipe.unet, config)
    picture = said(pipe)
    assert not torch.allclose(picture, said(pipeline("unet")), atol=1e-3)
    pipe.unet.save_pretrained(tmp_path / "adapter")
    pipe.save_pretrained(tmp_path / "pipe")
    other = pipeline("unet")
    other.unet = PeftModel.from_pretrained(other.unet, tmp_path / "adapter")
    assert torch.equal(said(other), picture)
    other.unet = other.unet.merge_and_unload()
    torch.testing.assert_close(said(other), picture, **close)
    third = pipeline("unet")
    state = get_peft_model_state_dict(pipe.unet)
    third.load_lora_weights({k.replace("base_model.model", "unet"): v for k, v in state.items()}, adapter_name="one")
    assert torch.equal(said(third), picture)


def test_a_transformer_without_a_loader_of_its_own():
    model = get_peft_model(seeded(pixart), LoraConfig(r=2, target_modules=["to_k", "proj"], init_lora_weights=False))
    tuned, merged = denoised(model, "pixart"), denoised(model.merge_and_unload(), "pixart")
    assert not torch.allclose(tuned, denoised(seeded(pixart), "pixart"), atol=1e-3)
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=1e-5)


def test_loading_under_offloading():
    pipe = pipeline("unet")
    one = factors(pipe.unet, 1)
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    pipe.load_lora_weights(prefixed("unet", one), adapter_name="one")
    same(pipe, plain("unet", [(one, 1.0)]))
    pipe.unload_lora_weights()
    same(pipe, plain("unet"))
