"""Adapters exchanged in place through diffusers, in compiled models too; see the table in test_diffusers.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from torch._dynamo.testing import CompileCounter

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import check_hotswap_configs_compatible

from .pixels import added, denoised, factors, network, pipeline, said

each_model = pytest.mark.parametrize("kind", ["unet", "flux", "sd3"])
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # diffusers warns about itself
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
]
close = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No compiled frame of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load(model: Any, state: dict[str, Any], **more: Any) -> None:
    """Under the name "one"."""
    model.load_lora_adapter(dict(state), prefix=None, adapter_name="one", **more)


@each_model
@pytest.mark.parametrize("ranks", [(2, 2), (4, 2), (2, 5)])
def test_another_file_takes_the_place_of_the_first(kind, ranks):
    first, second = (factors(network(kind), seed, r) for seed, r in enumerate(ranks))
    model = network(kind)
    if ranks[0] != ranks[1]:
        model.enable_lora_hotswap(target_rank=6)
    load(model, first)
    torch.testing.assert_close(denoised(model, kind), denoised(added(network(kind), (first, 1.0)), kind), **close)
    held = {name: p for name, p in model.named_parameters() if ".one." in name}
    load(model, second, hotswap=True)
    assert all(p is held[name] for name, p in model.named_parameters() if ".one." in name)
    torch.testing.assert_close(denoised(model, kind), denoised(added(network(kind), (second, 1.0)), kind), **close)
    load(model, first, hotswap=True)
    torch.testing.assert_close(denoised(model, kind), denoised(added(network(kind), (first, 1.0)), kind), **close)


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_a_compiled_model_is_not_compiled_again(kind):
    first, second = (factors(network(kind), seed, r) for seed, r in enumerate((2, 5)))
    alphas = {f"m.{name}".replace(".lora_A.weight", ".alpha"): 3.0 for name in second if "lora_A" in name}
    model = network(kind)
    model.enable_lora_hotswap(target_rank=6)
    load(model, first)
    assert all(
        isinstance(layer.scaling["one"], torch.Tensor) for layer in model.modules() if isinstance(layer, BaseTunerLayer)
    )
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    torch.testing.assert_close(denoised(compiled, kind), denoised(added(network(kind), (first, 1.0)), kind), **close)
    frames = counter.frame_count
    assert frames
    prefixed = {f"m.{name}": t for name, t in second.items()}
    model.load_lora_adapter(prefixed, prefix="m", adapter_name="one", hotswap=True, network_alphas=alphas)
    torch.testing.assert_close(denoised(compiled, kind), denoised(added(network(kind), (second, 0.6)), kind), **close)
    assert counter.frame_count == frames


def test_fewer_modules_are_fine_and_more_are_refused():
    plain = network("unet")
    few, many = factors(plain, 1, of="attn1"), factors(plain, 2)
    model = network("unet")
    load(model, many)
    load(model, few, hotswap=True)
    torch.testing.assert_close(denoised(model, "unet"), denoised(added(network("unet"), (few, 1.0)), "unet"), **close)
    model = network("unet")
    load(model, few)
    with pytest.raises(RuntimeError, match="conv1"):
        load(model, many, hotswap=True)


def test_names_that_are_there_or_not():
    model, state = network("flux"), factors(network("flux"), 1)
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        load(model, state, hotswap=True)
    load(model, state)
    with pytest.raises(ValueError, match="already in use"):
        load(model, state)
    with pytest.raises(RuntimeError, match="Call `enable_lora_hotswap` before loading the first adapter"):
        model.enable_lora_hotswap(target_rank=4)


def test_configurations_that_cannot_be_exchanged():
    one = LoraConfig(r=2, target_modules=["to_q"])
    check_hotswap_configs_compatible(one, LoraConfig(r=4, lora_alpha=1, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="use_dora"):
        check_hotswap_configs_compatible(one, LoraConfig(r=2, target_modules=["to_q"], use_dora=True))


def test_a_pipeline_exchanges_its_adapter(tmp_path):
    pipe = pipeline("unet")
    first, second = (factors(network("unet"), seed, r) for seed, r in enumerate((2, 4)))
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights({f"unet.{k}": v for k, v in first.items()}, adapter_name="one")
    pipe.save_lora_weights(tmp_path, unet_lora_layers=second)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="one", hotswap=True)
    torch.testing.assert_close(
        denoised(pipe.unet, "unet"), denoised(added(network("unet"), (second, 1.0)), "unet"), **close
    )
    assert pipe.get_active_adapters() == ["one"]
    assert said(pipe).shape == (1, 8, 8, 3)
