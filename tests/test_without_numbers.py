"""Base models on the meta device: wrapped there, and given their numbers afterwards, in each of torch's ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from conformance.layouts import LAYOUTS
from conformance.oracles import METHODS
from conformance.rows import adapted, config, forbidden, told
from peft import (
    FrodConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

LINEAR = LAYOUTS["linear"]
NAMES = [  # AdaMSS's tensors have sizes that the numbers say: it is refused
    name for name in METHODS if forbidden(name, LINEAR) is None and not name.startswith("adamss")
]


def on_meta(method: str) -> PeftModel:
    """A model without numbers, with an adapter without numbers."""
    with torch.device("meta"):
        base = LINEAR.build().eval()
    return told(get_peft_model(base, config(method, LINEAR)), method, LINEAR).eval()


def assigned(model: nn.Module, state: dict[str, Any]) -> None:
    model.load_state_dict(state, assign=True)


def emptied(model: nn.Module, state: dict[str, Any]) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(state)


def one_by_one(model: nn.Module, state: dict[str, Any]) -> None:
    """As accelerate's loaders do."""
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


@pytest.mark.parametrize("way", [assigned, emptied, one_by_one])
@pytest.mark.parametrize("method", NAMES)
def test_an_adapter_that_was_made_without_numbers_computes_what_it_should_once_they_come(method, way):
    trained = adapted(method, LINEAR)
    state = {k: v.detach().clone() for k, v in trained.state_dict().items()}
    later = on_meta(method)
    way(later, state)
    with torch.no_grad():
        torch.testing.assert_close(later(LINEAR.x()), trained(LINEAR.x()), rtol=1e-5, atol=1e-5)
    for name, value in later.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:save_projection")
def test_shared_numbers_that_no_file_brings_outlive_being_emptied():
    trained = get_peft_model(LINEAR.model(), VeraConfig(r=2, target_modules=["layer"], save_projection=False)).eval()
    wanted = trained(LINEAR.x())
    state = {k: v.detach().clone() for k, v in trained.state_dict().items()}
    assert not any("vera_A" in k for k in state)
    emptied(trained, state)
    assert torch.equal(trained(LINEAR.x()), wanted)


def test_what_is_made_of_weights_that_are_not_there_is_named():
    later = on_meta("fourierft")
    with pytest.raises(ValueError, match=r"'indices' of adapter 'default' at 'layer' is made of the base model's"):
        later(LINEAR.x().to("meta"))


@pytest.mark.filterwarnings("ignore:save_projection")
def test_what_is_made_of_the_weights_of_all_layers_is_not_made_without_them():
    settings = FrodConfig(sparse_rate=0.1, target_modules=["layer"], save_projection=False)
    with torch.device("meta"):
        later = get_peft_model(LINEAR.build(), settings)
    emptied(later, {k: v.clone() for k, v in get_peft_model(LINEAR.model(), settings).state_dict().items()})
    with pytest.raises(ValueError, match="'frod_U' of adapter 'default' at 'layer' is made of the base"):
        later(LINEAR.x())


def test_a_prompt_that_would_have_no_first_values_is_refused():
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
    with accelerate.init_empty_weights(), pytest.raises(ValueError, match="Make the base model in its block"):
        get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with accelerate.init_empty_weights():
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # in torch's copy of one
@pytest.mark.parametrize("method", [name for name in NAMES if not METHODS[name].tasks])
def test_fake_tensors_are_wrapped_and_run(method):
    with FakeTensorMode():
        model = get_peft_model(LINEAR.build(), config(method, LINEAR))
        y = model(torch.randn(LINEAR.shape))
        y.sum().backward()
    assert isinstance(y, FakeTensor) and y.shape == (LINEAR.shape[0], 8)
    assert all(isinstance(p.grad, FakeTensor) for p in model.parameters() if p.requires_grad)


def test_fake_tensors_take_prompts():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    made = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    with FakeTensorMode():
        settings = MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2, task_type="CAUSAL_LM")
        model = get_peft_model(transformers.GPT2LMHeadModel(made), settings)
        found = model(torch.ones(2, 3, dtype=torch.long), task_ids=torch.ones(2, dtype=torch.long)).logits
    assert isinstance(found, FakeTensor) and found.shape == (2, 5, 9)


def test_groups_of_numbers_are_not_made_of_fake_ones():
    with FakeTensorMode(), pytest.raises(ValueError, match="as do fake tensors"):
        get_peft_model(LINEAR.build(), config("adamss", LINEAR))


@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}], ids=str
)
def test_a_lora_whose_tensors_were_emptied_is_given_first_values(fields):
    settings = LoraConfig(r=2, target_modules=["layer"], **fields)
    with torch.device("meta"):
        model = get_peft_model(LINEAR.build(), settings)
    model.to_empty(device="cpu")
    base, layer = LINEAR.model(), model.base_model.model.layer
    layer.base_layer.load_state_dict(base.layer.state_dict())
    layer.reset_lora_parameters("default", settings.init_lora_weights)
    x = LINEAR.x()
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-5)
    A = layer.lora_A["default"].weight
    assert A.count_nonzero() == A.numel()
    before = A.clone()
    layer.reset_lora_parameters("default", False)
    layer.reset_lora_parameters("other", True)
    assert torch.equal(A, before)
    with pytest.raises(ValueError, match=r"init_lora_weights='olora' for 'layer'\. Use "):
        layer.reset_lora_parameters("default", "olora")
    if "init_lora_weights" not in fields:
        layer.reset_lora_parameters("default", "gaussian")
        assert not torch.equal(A, before) and not layer.lora_B["default"].weight.any()
