"""What programs read of layers and models beside answers, and how they build on the public classes."""

import copy
import inspect
import json
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
from peft import BOFTConfig, HRAConfig, IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model, helpers
from tests.clients import tiny

BASES = {
    "linear": (lambda: nn.Linear(6, 4), (6, 4), False),
    "embedding": (lambda: nn.Embedding(10, 6), (10, 6), False),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (4, 8), False),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3), (4, 8), False),
    "attention": (lambda: nn.MultiheadAttention(16, 4), (16, 48), False),
    "turned": (lambda: Conv1D(8, 4), (4, 8), True),
}


def adapted(base, config=None):
    return get_peft_model(nn.Sequential(base), config or LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))


@pytest.mark.parametrize("kind", BASES)
def test_every_layer_says_its_sizes_and_how_its_weight_is_stored(kind):
    make, sizes, turned = BASES[kind]
    layer = adapted(make(), LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=turned)).base_model.model[0]
    assert (layer.in_features, layer.out_features) == sizes
    assert layer.fan_in_fan_out is turned


def test_a_layer_that_is_no_matrix_has_no_sizes():
    config = peft.LNTuningConfig(target_modules=["0"])
    layer = adapted(nn.LayerNorm(4), config).base_model.model[0]
    assert layer.in_features is None and layer.out_features is None


def test_plain_values_are_dictionaries_to_whoever_asks():
    layer = adapted(nn.Linear(6, 4)).base_model.model[0]
    assert isinstance(layer.scaling, dict) and json.loads(json.dumps(layer.scaling)) == {"default": 4.0}
    taken = layer.scaling
    for own in (taken.copy(), copy.deepcopy(taken), copy.copy(taken), pickle.loads(pickle.dumps(taken)), {**taken}):
        assert type(own) is dict and own == {"default": 4.0}
        own["default"] = 0.0
    layer.scaling["default"] *= 2
    assert taken == layer.scaling == {"default": 8.0} == dict(taken)


def test_a_plain_value_that_is_set_as_a_whole_acts():
    layer = adapted(nn.Linear(6, 4)).base_model.model[0]
    x, before = torch.randn(3, 6), layer.scaling.copy()
    y = layer(x)
    layer.scaling = {"default": 0.0}
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.scaling = before
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("feedforward", [[], ["0"]], ids=str)
def test_ia3_says_whether_it_scales_what_it_takes(feedforward):
    config = IA3Config(target_modules=["0"], feedforward_modules=feedforward)
    assert adapted(nn.Linear(6, 4), config).base_model.model[0].is_feedforward is bool(feedforward)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv1d", "conv2d", "turned"])
def test_the_base_weight_is_read_and_set_in_its_own_shape(kind):
    make, _, turned = BASES[kind]
    model = adapted(make(), LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=turned))
    layer = model.base_model.model[0]
    W = layer.get_base_weight()
    assert not W.requires_grad and W.data_ptr() == layer.weight.data_ptr() and W.shape == layer.weight.shape
    new = torch.randn_like(W)
    layer.set_base_weight(new)
    assert layer.get_base_weight().data_ptr() == layer.weight.data_ptr() == new.data_ptr()
    with pytest.raises(ValueError, match="shape"):
        layer.set_base_weight(new[:1])
    layer.merge()
    with pytest.raises(ValueError, match="unmerge"):
        layer.set_base_weight(new)


def test_what_is_derived_from_the_base_weight_follows_what_is_set():
    layer = adapted(nn.Linear(6, 4), LoraConfig(r=2, target_modules=["0"], use_dora=True)).eval().base_model.model[0]
    x, W = torch.randn(3, 6), torch.randn(4, 6)
    with torch.no_grad():
        layer(x)
        layer.set_base_weight(W)
        gain = layer.lora_magnitude_vector["default"].weight / W.norm(dim=1)
        torch.testing.assert_close(layer(x), x @ (gain[:, None] * W).mT + layer.bias)


def test_the_numbers_of_a_quantised_weight_are_read_and_rounded():
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    layer = adapted(base).base_model.model[0]
    W, new = layer.get_base_weight(), torch.randn(64, 64)
    assert W.shape == (64, 64)
    layer.set_base_weight(new)
    assert (layer.get_base_weight() - new).norm() < 0.15 * new.norm()


@pytest.mark.parametrize(
    "config",
    [OFTConfig(oft_block_size=2, r=0), BOFTConfig(boft_block_size=2), HRAConfig(r=2)],
    ids=lambda c: c.peft_type.value,
)
def test_rotations_may_be_asked_to_scale_and_say_that_they_have_no_scaling(config):
    model = adapted(nn.Linear(6, 4), replace(config, target_modules=["0"]))
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    y = model(x)
    layer.scale_layer(1)
    layer.unscale_layer()
    with pytest.warns(peft.utils.PeftWarning, match="no scaling"):
        layer.scale_layer(0.5)
    layer.unscale_layer(0.5)
    assert torch.equal(model(x), y) and not hasattr(layer, "set_scale")


class Longer(PeftModel):
    def __init__(self, model, peft_config, adapter_name="default", **kwargs):
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.head = nn.Linear(4, 2)

    def forward(self, *args, **kwargs):
        return self.head(super().forward(*args, **kwargs))


def test_a_subclass_with_a_constructor_of_its_own_is_loaded(tmp_path):
    model = Longer(nn.Sequential(nn.Linear(6, 4)), LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    again = Longer.from_pretrained(nn.Sequential(nn.Linear(6, 4)), tmp_path)
    assert type(again) is Longer and again(torch.randn(3, 6)).shape == (3, 2)


def test_the_signature_of_generate_is_copied_to_encoder_decoders_too():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=30, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    model = get_peft_model(T5ForConditionalGeneration(T5Config(**sizes)), LoraConfig(task_type="SEQ_2_SEQ_LM"))
    helpers.update_generate_signature(model)
    wanted = inspect.signature(T5ForConditionalGeneration.generate).parameters
    assert list(inspect.signature(model.generate).parameters) == list(wanted)[1:]
    start = {"decoder_start_token_id": 0, "max_new_tokens": 2}
    assert model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), **start).shape[0] == 1


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"alora_invocation_tokens": [1]}], ids=str)
def test_a_layer_says_which_of_its_adapters_are_variants_of_lora(fields):
    config = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM", **fields)
    assert [*get_peft_model(tiny.llama(), config).lm_head.lora_variant] == (["default"] if fields else [])


def test_the_schedule_of_adalora_is_told_and_its_length_set_later():
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=5, target_modules=["0"])
    tuner = adapted(nn.Linear(6, 4), config).base_model
    assert tuner.trainable_adapter_name == "default"
    assert tuner.rankallocator.budget_schedule(1) == (4, False) and tuner.rankallocator.budget_schedule(5) == (2, True)
    tuner.rankallocator.set_total_step(50)
    assert config.total_step == 50 and tuner.rankallocator.budget_schedule(5)[0] == 3


def test_a_tuner_says_whether_an_adapter_can_become_a_lora_as_its_model_does():
    for config, can in ((LoraConfig(target_modules=["0"]), True), (peft.LNTuningConfig(target_modules=["0"]), False)):
        model = adapted(nn.Linear(6, 4), config)
        assert model.supports_lora_conversion() is model.base_model.supports_lora_conversion() is can


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"target_modules": ["q_proj"]}, [True, True, False]),
        ({"target_modules": r".*\.1\..*"}, [False, True, False]),
        ({"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.1.q_proj"]}, [True, False, True]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, [True, False, False]),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, [True, True, False]),
        ({}, [False, False, False]),
    ],
    ids=str,
)
def test_a_configuration_is_asked_for_one_name(fields, chosen):
    from peft.tuners.tuners_utils import check_target_module_exists

    names = ["model.layers.0.q_proj", "model.layers.1.q_proj", "lm_head"]
    assert [check_target_module_exists(LoraConfig(**fields), name) for name in names] == chosen


def test_a_language_model_shows_the_base_model_s_preparation_of_steps():
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM"))
    assert model.base_model_prepare_inputs_for_generation == model.get_base_model().prepare_inputs_for_generation


def test_state_that_is_written_under_the_old_private_names_acts():
    """Many programs set these instead of calling `set_adapter` and `enable_adapters`."""
    model = adapted(nn.Linear(6, 4))
    model.add_adapter("b", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    layer, x = model.base_model.model[0], torch.randn(2, 6)
    first = model(x)
    model.set_adapter("b")
    second = model(x)
    for names, y in (("default", first), (["b"], second), ([], layer.base_layer(x))):
        layer._active_adapter = names
        torch.testing.assert_close(model(x), y)
        assert layer.active_adapters == layer._active_adapter == ([names] if isinstance(names, str) else names)
    layer._active_adapter = "default"
    layer._disable_adapters = True
    torch.testing.assert_close(model(x), layer.base_layer(x))
    layer._disable_adapters = False
    torch.testing.assert_close(model(x), first)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
def test_a_dropout_of_everything_leaves_the_base_layer(fields, grad, rows):
    model = adapted(nn.Linear(64, 48), LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, **fields))
    layer, x = model.base_model.model[0], torch.randn(rows, 64, requires_grad=grad)
    layer.lora_dropout["default"].p = 1.0
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    y = model(x)
    if not fields:
        torch.testing.assert_close(y, layer.base_layer(x))
    y.sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().max() == 0


@pytest.fixture
def tables(monkeypatch):
    from peft import registry

    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    monkeypatch.setattr(registry, "MODEL_CLASSES", dict(registry.MODEL_CLASSES))


def test_classes_put_into_the_tables_are_used(tables):
    class Tuner(peft.LoraModel):
        pass

    class Model(peft.PeftModelForCausalLM):
        pass

    peft.PEFT_TYPE_TO_TUNER_MAPPING["LORA"] = Tuner
    peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["CAUSAL_LM"] = Model
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM"))
    assert type(model) is Model and type(model.base_model) is Tuner
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] is Tuner
    with pytest.raises(ValueError, match=r"'LORRA' is no method.*Did you mean 'LORA'"):
        peft.PEFT_TYPE_TO_TUNER_MAPPING["LORRA"] = Tuner
