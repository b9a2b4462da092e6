"""Public names, and the paths under which other libraries import them; all of it lazy."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import peft
from peft import later, lazy, registry
from peft.types import PeftType

FACTS = json.loads((Path(__file__).parent / "data" / "interface.json").read_text())
DEEP = [(module, name) for module, names in FACTS["deep"].items() for name in names]


@pytest.mark.parametrize("name", sorted(peft.__all__))
def test_every_public_name_can_be_imported(name):
    assert getattr(peft, name) is not None


def test_every_known_name_exists_or_is_announced():
    missing = set(FACTS["peft"]) - set(peft.__all__)
    assert missing <= later.NAMES
    assert not set(peft.__all__) & later.NAMES


@pytest.mark.parametrize("name", sorted(set(FACTS["peft"]) - set(peft.__all__)))
def test_a_later_name_is_an_import_error_that_says_so(name):
    assert not hasattr(peft, name)
    with pytest.raises(ImportError, match=f"{name} comes with a later release"):
        exec(f"from peft import {name}", {})


@pytest.mark.parametrize(("module", "name"), DEEP)
def test_deep_names_exist_or_are_known_to_be_missing(module, name):
    found = hasattr(importlib.import_module(module), name)
    assert found or name in later.NAMES or name in later.INTERNAL


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("from peft.tuners.tuners_utils import BasePromptEncoder", "comes with a later release"),
        ("from peft.import_utils import is_transformers_dtensor_tp", "internal to the original library"),
        ("from peft.utils.integrations import TpInfo", "internal to the original library"),
        ("from peft.utils.constants import is_transformers_dtensor_tp", "internal to the original library"),
    ],
)
def test_a_missing_deep_name_is_an_import_error_that_says_why(statement, reason):
    with pytest.raises(ImportError, match=reason):
        exec(statement, {})


def test_an_unknown_deep_name_is_an_ordinary_import_error():
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from peft.helpers import nonsense", {})


def test_prefix_tuning_has_the_configuration_that_trainers_ask_about(tmp_path):
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True)
    assert isinstance(config, peft.PromptLearningConfig)
    assert config.is_prompt_learning
    config.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert (again.num_virtual_tokens, again.prefix_projection) == (3, True)
    assert again.peft_type == PeftType.PREFIX_TUNING
    with pytest.raises(ValueError, match="init_weights='ones'"):
        peft.PrefixTuningConfig(init_weights="ones")


def test_diffusers_finds_the_tensors_of_adapters_that_it_does_not_cast():
    from peft.tuners.loha.layer import LoHaLayer
    from peft.tuners.lokr.layer import LoKrLayer
    from peft.tuners.lora.layer import LoraLayer

    assert {"hada_w1_a", "hada_t1"} <= set(LoHaLayer.adapter_layer_names)
    assert {"lokr_w1", "lokr_t2"} <= set(LoKrLayer.adapter_layer_names)
    assert not set(LoraLayer.adapter_layer_names) & {*LoHaLayer.adapter_layer_names, *LoKrLayer.adapter_layer_names}


def test_transformers_may_put_a_function_around_the_update_of_a_layer():
    """It does so before it loads an adapter of experts, and calls it by no other way."""
    from peft.tuners.lora.layer import Linear, ParamWrapper

    assert inspect.isfunction(ParamWrapper.update_layer) and ParamWrapper.update_layer is Linear.update_layer


def test_layers_are_replicated_on_the_same_weights():
    from peft.tuners.tuners_utils import replicate_layers

    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    first, second = (layer.weight for layer in model.model.layers)
    replicate_layers(model, [(0, 2), (0, 1)])
    assert [layer.weight is first for layer in model.model.layers] == [True, False, True]
    assert model.model.layers[1].weight is second


@pytest.mark.parametrize("module", FACTS["modules"])
def test_a_deep_module_exists_or_is_announced(module):
    if later.is_later_module(module) or module == "peft.tuners._buffer_dict":
        with pytest.raises(ImportError):
            importlib.import_module(module)
    else:
        importlib.import_module(module)


def test_the_names_that_clients_import_are_the_same_objects():
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import LoraLayer as deep
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    assert LoraLayer is deep
    assert issubclass(LoraLayer, BaseTunerLayer)
    assert issubclass(ModulesToSaveWrapper, AuxiliaryTrainingWrapper)


@pytest.mark.parametrize("method", registry.METHODS.values(), ids=str)
def test_a_method_s_classes_are_where_the_method_is(method):
    for entry in filter(None, (method.config, method.tuner)):
        place, _, name = str(entry).partition(":")
        folder = place.removeprefix("peft.methods.").split(".")[0]
        if place.startswith("peft.methods."):
            exec(f"from peft.tuners.{folder} import {name}", {})


PRINTED = {  # a method: its linear layer, as the other library names and prints it
    "C3A": ("C3ALinear", {"block_size": 4}),
    "DEFT": ("DeftLinear", {"r": 2}),
    "DELORA": ("DeloraLinear", {"r": 2}),
    "FOURIERFT": ("FourierFTLinear", {"n_frequency": 4}),
    "GLORA": ("GloraLinear", {"r": 2}),
    "HRA": ("HRALinear", {"r": 2}),
    "MISS": ("MissLinear", {"r": 2}),
    "WAVEFT": ("WaveFTLinear", {"n_frequency": 4}),
}


@pytest.mark.parametrize("method", PRINTED)
def test_layers_have_the_names_of_their_methods(method):
    name, settings = PRINTED[method]
    config = registry.config_class(method)(target_modules=["0"], **settings)
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).base_model.model[0]
    assert isinstance(layer, getattr(importlib.import_module(f"peft.tuners.{method.lower()}.layer"), name))
    assert repr(layer).startswith(f"{method.lower()}.{name}(")


SHOWN = {  # a method: how its linear layer and what all layers share are printed
    "IA3": ({"feedforward_modules": []}, "Linear(\n  (base_layer)"),
    "BEFT": ({}, "Linear(\n  (base_layer)"),
    "SUPERTUNING": ({"sparsity": 0.5}, "Linear(\n  (base_layer)"),
    "UNILORA": ({"r": 2}, "Linear(\n  in_features=8, out_features=6, bias=True\n  (base_layer)"),
    "RANDLORA": ({"r": 2}, "randlora.Linear(\n  in_features=8, out_features=6, bias=True\n  (base_layer)"),
    "VERA": ({"r": 2}, "vera.Linear(\n  (base_layer)"),
    "ADALORA": ({"init_r": 2, "target_r": 1, "total_step": 9}, "adalora.SVDLinear(\n  (base_layer)"),
}


@pytest.mark.parametrize("method", SHOWN)
def test_layers_are_printed_as_by_the_other_library(method):
    settings, text = SHOWN[method]
    config = registry.config_class(method)(target_modules=["0"], **settings)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    assert repr(model.base_model.model[0]).startswith(text)
    if method == "VERA":
        line = "(vera_A): BufferDict(  (default): Buffer containing: [torch.FloatTensor of size 2x8])"
        assert line in repr(model)


def test_import_star_brings_the_helpers():
    namespace: dict = {}
    exec("from peft.helpers import *", namespace)
    assert {"rescale_adapter_scale", "disable_input_dtype_casting", "update_signature"} <= namespace.keys()


def test_import_star_brings_every_name():
    namespace: dict = {}
    exec("from peft import *", namespace)
    assert set(peft.__all__) <= set(namespace)


def test_the_stub_for_editors_has_the_same_names():
    tree = ast.parse(Path(peft.__file__).with_suffix(".pyi").read_text())
    imported = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    listed = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    assert sorted(ast.literal_eval(listed)) == sorted(peft.__all__)
    assert imported == set(peft.__all__)


def test_dir_shows_the_lazy_names():
    assert {"LoraConfig", "get_peft_model", "plan"} <= set(dir(peft))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean 'LoraConfig'"):
        peft.LoraConfg  # noqa: B018
    with pytest.raises(ImportError):
        exec("from peft.tuners.lora import LoraLayre", {})
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("peft.nonsense")


def test_the_finder_is_installed_once_and_last():
    lazy.install()
    assert [type(f) for f in sys.meta_path].count(lazy.Later) == 1


def test_import_costs_next_to_nothing():
    code = (
        "import sys, torch; before = set(sys.modules); import peft; peft.LoraConfig();"
        "new = set(sys.modules) - before; assert len(new) < 60, len(new);"
        "assert not {'transformers', 'accelerate', 'huggingface_hub'} & new, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, peft; peft.LoraConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def without_lily(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", {k: m for k, m in registry.METHODS.items() if k is not PeftType.LILY})


def test_the_registry_is_a_mapping_that_answers_strings_and_members(without_lily):
    mapping = registry.PEFT_TYPE_TO_CONFIG_MAPPING
    assert isinstance(mapping, Mapping)
    assert mapping["LORA"] is mapping[PeftType.LORA] is peft.LoraConfig
    assert "LILY" not in mapping
    assert registry.PEFT_TYPE_TO_PREFIX_MAPPING["LORA"] == "lora_"
    assert registry.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["CAUSAL_LM"] is peft.PeftModelForCausalLM


def test_a_method_can_be_registered_from_outside(without_lily):
    class Tuner:
        prefix = "lily_"

    register = registry.register_peft_method
    register(name="lily", config_cls=peft.LoraConfig, model_cls=Tuner)
    assert registry.PEFT_TYPE_TO_PREFIX_MAPPING["LILY"] == "lily_"
    assert "LILY" not in registry.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    with pytest.raises(KeyError):
        register(name="lily", config_cls=peft.LoraConfig, model_cls=Tuner)
    registry.METHODS.pop(PeftType.LILY)
    for bad in ("LILY", "lily_", "nonsense"):
        with pytest.raises(ValueError):
            register(name=bad, config_cls=peft.LoraConfig, model_cls=Tuner)
    with pytest.raises(ValueError, match="prefix"):
        register(name="lily", config_cls=peft.LoraConfig, model_cls=Tuner, prefix="other_")


# ---- helpers


def test_small_helpers():
    from peft import utils
    from peft.utils import other

    weight = nn.Parameter(torch.ones(2, 3))
    assert utils.transpose(weight, True).shape == (3, 2)
    assert isinstance(utils.transpose(weight, True), nn.Parameter)
    assert utils.transpose(weight, False) is weight
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert utils._get_submodules(model, "1.0") == (model[1], model[1][0], "0")
    assert other.get_pattern_key(["a.*", "q"], "x.q") == "q"
    assert other.get_pattern_key(["a"], "x.q") == "x.q"
    labels = torch.tensor([[1, 2, -100], [-100, 3, 4]])
    assert utils.shift_tokens_right(labels, 0, 9).tolist() == [[9, 1, 2], [9, 0, 3]]
    with pytest.raises(ValueError, match="pad_token_id"):
        utils.shift_tokens_right(labels, None, 9)
    shared = torch.ones(4)
    assert utils.id_tensor_storage(shared[:2]) == utils.id_tensor_storage(shared[2:])


def test_mixed_precision_keeps_what_is_trained_in_float32():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    model[0].requires_grad_(False)
    peft.cast_mixed_precision_params(model, torch.bfloat16)
    assert (model[0].weight.dtype, model[1].weight.dtype) == (torch.bfloat16, torch.float32)


def test_kbit_preparation_freezes_and_lifts():
    model = nn.Sequential(nn.Linear(2, 2)).half()
    assert peft.prepare_model_for_kbit_training(model) is model
    assert model[0].weight.dtype == torch.float32
    assert not model[0].weight.requires_grad


def test_empty_weights_are_on_the_meta_device():
    from peft.utils.integrations import init_empty_weights

    with init_empty_weights():
        layer = nn.Linear(2, 2)
    assert layer.weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_clone_may_share_its_weights():
    from peft.utils.layers import clone_module

    layer = nn.Linear(2, 2)
    assert clone_module(layer, share_weights=True).weight is layer.weight
    assert clone_module(layer).weight is not layer.weight


def adapted() -> peft.PeftModel:
    return peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"], r=2))


def test_scales_are_multiplied_inside_the_block_only():
    from peft.helpers import rescale_adapter_scale

    model = adapted()
    layer = model.base_model.model[0]
    before = dict(layer.scaling)
    with pytest.raises(RuntimeError, match="stop"), rescale_adapter_scale(model, 0.5):
        assert layer.scaling["default"] == before["default"] / 2
        raise RuntimeError("stop")
    assert dict(layer.scaling) == before
    with pytest.raises(TypeError), rescale_adapter_scale(model, "2"):
        pass
    with pytest.raises(ValueError), rescale_adapter_scale(nn.Linear(1, 1), 2):
        pass


def test_the_cast_of_inputs_can_be_switched_off():
    from peft.helpers import disable_input_dtype_casting

    model = adapted()
    layer = model.base_model.model[0]
    with disable_input_dtype_casting(model):
        assert layer.cast_input_dtype_enabled is False
    assert layer.cast_input_dtype_enabled is True


def test_signatures_follow_the_base_model():
    import inspect

    from peft.helpers import update_signature

    model = adapted()
    x = torch.ones(1, 2)
    expected = model(x)
    update_signature(model, "forward")
    assert "input" in inspect.signature(model.forward).parameters
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError):
        update_signature(model, "backward")


def test_a_folder_with_an_adapter_is_recognised(tmp_path):
    from peft.helpers import check_if_peft_model

    assert not check_if_peft_model(str(tmp_path))
    peft.LoraConfig().save_pretrained(tmp_path)
    assert check_if_peft_model(str(tmp_path))


def test_adapters_can_be_handled_without_a_peft_model():
    from peft import functional

    model = nn.Sequential(nn.Linear(2, 2))
    config = peft.LoraConfig(target_modules=["0"], r=2)
    functional.inject_adapter_in_model(config, model, "a")
    functional.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"], r=2), model, "b")
    functional.set_adapter(model, ["a", "b"])
    assert model[0].active_adapters == ["a", "b"]
    functional.set_requires_grad(model, "a", False)
    assert not model[0].lora_A["a"].weight.requires_grad
    model[0].lora_A["a"].weight.data = model[0].lora_A["a"].weight.data.half()
    functional.cast_adapter_dtype(model, "a")
    assert model[0].lora_A["a"].weight.dtype == torch.float32
    assert functional.delete_adapter(model, "a", "lora_") == ["b"]


@pytest.mark.parametrize("arguments", [{}, {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}])
def test_transformers_loads_an_adapter_by_itself(arguments, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    lora = peft.LoraConfig(init_lora_weights=False, **arguments)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    model.save_pretrained(tmp_path)
    bare = transformers.LlamaForCausalLM(config)
    bare.load_adapter(str(tmp_path), "other")
    loaded = bare.state_dict()
    own = {k: v for k, v in model.state_dict().items() if ".default" in k}
    assert own
    for key, value in own.items():
        name = key.removeprefix("base_model.model.").replace(".default", ".other")
        assert torch.equal(loaded[name], value), name
