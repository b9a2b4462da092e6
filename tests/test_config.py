"""Configurations: fields, files, and what is refused before a model is touched."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import warnings
from pathlib import Path

import pytest

from peft import (
    DeloraConfig,
    LoraConfig,
    OFTConfig,
    OSFConfig,
    PeftConfig,
    PeftType,
    PromptLearningConfig,
    TaskType,
    VeraConfig,
    config,
    registry,
)
from peft.config import PeftConfigMixin
from peft.core import defaults, hub
from peft.errors import PeftStrictError, PeftWarning, UnknownFieldWarning, set_strict
from peft.methods.lora import config as lora

DATA = Path(__file__).parent / "data"
FACTS = json.loads((DATA / "interface.json").read_text())
FILES = json.loads((DATA / "lora_configs.json").read_text())


def write(folder: Path, content: object) -> str:
    """A folder with a configuration file of that content."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "adapter_config.json").write_text(text)
    return str(folder)


def plain(values: dict) -> dict:
    """What must survive a round trip: all but the version, and the order of sets."""
    sets = ("target_modules", "exclude_modules")
    return {k: sorted(v) if k in sets and isinstance(v, list) else v for k, v in values.items() if k != "peft_version"}


# ---- fields


def test_the_fields_of_lora_have_the_known_order_and_defaults():
    fields = dataclasses.fields(LoraConfig)
    assert [f.name for f in fields] == [name for name, _ in FACTS["lora_fields"]] + ["module_config", "scope"]
    for f, (name, default) in zip(fields, FACTS["lora_fields"], strict=False):
        if default != "..." and f.default is not dataclasses.MISSING:
            assert f.default == default, name


@pytest.mark.parametrize("name", sorted(FACTS["options"]))
def test_the_nested_configurations_have_the_known_fields(name):
    fields = dataclasses.fields(getattr(lora, name))
    assert [[f.name, f.default, f.init] for f in fields] == FACTS["options"][name]


@pytest.mark.parametrize("cls", [PeftConfigMixin, PeftConfig, PromptLearningConfig])
def test_the_shared_configurations_have_the_known_fields(cls):
    assert [[f.name, f.default] for f in dataclasses.fields(cls)] == FACTS["shared"][cls.__name__]


@pytest.mark.parametrize("cls", [LoraConfig, PromptLearningConfig, *(getattr(lora, n) for n in FACTS["options"])])
def test_every_field_is_documented(cls):
    assert [f.name for f in dataclasses.fields(cls) if not f.metadata.get("help")] == []


def test_enums_compare_and_serialise_as_strings():
    assert PeftType.LORA == "LORA"
    assert json.dumps({"a": TaskType.CAUSAL_LM}) == '{"a": "CAUSAL_LM"}'
    assert [t.value for t in PeftType] == FACTS["peft_types"]
    assert [t.value for t in TaskType] == FACTS["task_types"]


def test_lists_of_names_become_sets_and_strings_stay():
    config = LoraConfig(target_modules=["a", "b"], exclude_modules=("c",))
    assert config.target_modules == {"a", "b"}
    assert config.exclude_modules == {"c"}
    assert LoraConfig(target_modules="all-linear").target_modules == "all-linear"


def test_a_configuration_can_be_copied_and_pickled():
    config = LoraConfig(r=3, target_modules=["a"], rank_pattern={"a": 2})
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, r=4).r == 4


def test_to_dict_shares_nothing_with_the_configuration():
    config = LoraConfig(rank_pattern={"a": 2})
    config.to_dict()["rank_pattern"]["a"] = 9
    assert config.rank_pattern == {"a": 2}


# ---- files


@pytest.mark.parametrize("name", sorted(FILES["changes"]))
def test_a_file_of_the_original_library_keeps_every_value(name, tmp_path):
    values = {**FILES["base"], **FILES["changes"][name]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # settings of an init that conversion has replaced
        config = PeftConfig.from_pretrained(write(tmp_path, values))
        assert type(config) is LoraConfig
        config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert plain(again) == plain(values)


def test_the_file_is_sorted_indented_and_complete(tmp_path):
    LoraConfig(target_modules={"b", "a"}, task_type=TaskType.CAUSAL_LM).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True)
    assert values["target_modules"] == ["a", "b"]
    assert (values["peft_type"], values["task_type"]) == ("LORA", "CAUSAL_LM")
    assert "runtime_config" not in values
    assert "module_config" not in values


def test_module_config_is_written_when_it_holds_something(tmp_path):
    config = LoraConfig(module_config={"q": {"use_dora": True}})
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).module_config == {"q": {"use_dora": True}}


def test_a_failed_save_leaves_the_old_file(tmp_path):
    LoraConfig(r=2).save_pretrained(tmp_path)
    bad = LoraConfig(r=3)
    bad.auto_mapping = {"a": object()}
    with pytest.raises(TypeError):
        bad.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).r == 2
    assert os.listdir(tmp_path) == ["adapter_config.json"]


def test_saving_to_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(AssertionError, match="should be a directory"):
        LoraConfig().save_pretrained(tmp_path / "x")


def test_unknown_fields_of_a_file_are_dropped_with_a_hint(tmp_path):
    folder = write(tmp_path, {"peft_type": "LORA", "lora_alpa": 3})
    with pytest.warns(UnknownFieldWarning, match="'lora_alpa' Did you mean 'lora_alpha'"):
        assert LoraConfig.from_pretrained(folder).lora_alpha == 8


def test_strictness_makes_unknown_fields_an_error(tmp_path):
    before = set_strict(True)
    try:
        with pytest.raises(PeftStrictError, match="new_field"):
            LoraConfig.from_pretrained(write(tmp_path, {"peft_type": "LORA", "new_field": 3}))
    finally:
        set_strict(before)


def test_runtime_config_of_a_file_is_ignored(tmp_path):
    folder = write(tmp_path, {"peft_type": "LORA", "runtime_config": {"ephemeral_gpu_offload": True}})
    with pytest.warns(UnknownFieldWarning, match="runtime_config"):
        assert LoraConfig.from_pretrained(folder).runtime_config.ephemeral_gpu_offload is False


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "q", "layers_to_transform": [0]},
        {"target_modules": ["q"], "layers_pattern": "layers"},
    ],
)
def test_a_choice_of_layers_without_effect_goes_from_a_file(fields, tmp_path):
    with pytest.raises(ValueError, match="layers_"):
        VeraConfig(**fields)
    with pytest.warns(PeftWarning, match="in a file of VeraConfig has no effect"):
        config = VeraConfig.from_pretrained(write(tmp_path, {"peft_type": "VERA", **fields}))
    assert config.layers_to_transform is None and config.layers_pattern is None


def test_a_share_stays_a_share_and_a_scale_may_be_a_fraction_in_files(tmp_path):
    OSFConfig(effective_rank=1.0).save_pretrained(tmp_path / "share")
    assert type(PeftConfig.from_pretrained(tmp_path / "share").effective_rank) is float  # 1 would be one direction
    DeloraConfig(delora_lambda=0.5).save_pretrained(tmp_path / "scale")
    assert PeftConfig.from_pretrained(tmp_path / "scale").delora_lambda == 0.5
    LoraConfig(lora_alpha=16.0).save_pretrained(tmp_path / "whole")
    assert type(PeftConfig.from_pretrained(tmp_path / "whole").lora_alpha) is int


def test_starts_that_the_other_library_reads_in_capitals_are_read(tmp_path):
    for given in ("Gaussian", "OLORA"):
        assert LoraConfig(init_lora_weights=given).init_lora_weights == given.lower()
        folder = write(tmp_path, {"peft_type": "LORA", "init_lora_weights": given})
        assert LoraConfig.from_pretrained(folder).init_lora_weights == given.lower()


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="ranks"):
        LoraConfig(ranks=3)


def test_the_file_wins_over_arguments(tmp_path):
    folder = write(tmp_path, {"peft_type": "LORA", "r": 5})
    config = LoraConfig.from_pretrained(folder, r=3, lora_alpha=7, cache_dir="x", offload_folder="y")
    assert (config.r, config.lora_alpha) == (5, 7)


def test_subfolder_is_looked_into(tmp_path):
    LoraConfig(r=6).save_pretrained(tmp_path / "b")
    assert PeftConfig.from_pretrained(tmp_path, subfolder="b").r == 6
    with pytest.raises(ValueError, match=r"Adapters lie in 'b': give that folder, '.*b', or `subfolder='b'`"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_reported_with_what_is_there(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at .*holds 'model.bin'"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        PeftConfig.from_pretrained(str(tmp_path / "none"))


def test_broken_json_is_reported_with_its_position(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config.json' is not valid JSON.*line 1 column 6"):
        PeftConfig.from_pretrained(write(tmp_path, '{"a":'))
    with pytest.raises(ValueError, match="holds a list"):
        PeftConfig.from_pretrained(write(tmp_path, "[]"))


def test_a_file_must_name_its_method(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="missing required keys: 'peft_type'"):
        PeftConfig.from_pretrained(write(tmp_path, {"r": 3}))
    assert LoraConfig.from_pretrained(write(tmp_path, {"r": 3})).r == 3
    with pytest.raises(ValueError, match="Did you mean 'LORA'"):
        PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "LORAA"}))
    monkeypatch.delitem(registry.METHODS, PeftType.LILY)
    with pytest.raises(ImportError, match="The method LILY comes with a later release"):
        PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "LILY"}))


def test_a_configuration_from_a_dictionary():
    from peft import get_peft_config

    assert get_peft_config({"peft_type": "LORA", "r": 3}).r == 3
    assert PeftConfig.from_peft_type(peft_type="LORA", r=3).r == 3
    assert LoraConfig.from_peft_type(r=3).r == 3
    with pytest.raises(TypeError):
        PeftConfig.from_peft_type(r=3)


def test_no_network_is_asked_for_a_local_path(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda *a: pytest.fail("asked the network"))
    for path in (tmp_path, str(tmp_path), "./none", "/none/x", "a/b/c", "~/x"):
        with pytest.raises(ValueError, match="Can't find"):
            hub.fetch(path, "adapter_config.json")


def test_of_several_files_the_first_that_exists_is_taken(tmp_path):
    (tmp_path / "b").write_text("")
    assert hub.fetch(tmp_path, ["a", "b"]) == str(tmp_path / "b")


# ---- what is refused


@pytest.mark.parametrize(
    ("kind", "match", "arguments"),
    [
        (ValueError, "r.*at least 1", {"r": 0}),
        (ValueError, "rank_pattern", {"rank_pattern": {"q": 0}}),
        (TypeError, "integer", {"r": "8"}),
        (TypeError, "integer", {"r": True}),
        (ValueError, "lora_dropout", {"lora_dropout": 1.0}),
        (ValueError, "lora_dropout", {"lora_dropout": -0.1}),
        (ValueError, "Did you mean 'lora_only'", {"bias": "lora-only"}),
        (NotImplementedError, "bias", {"bias": "lora-only"}),
        (ValueError, "Did you mean 'pissa'", {"init_lora_weights": "pisa"}),
        (ValueError, "pissa_niter_<number>", {"init_lora_weights": "pissa_niter_x"}),
        (ValueError, "Did you mean 'CAUSAL_LM'", {"task_type": "CAUSAL"}),
        (ValueError, "layers_to_transform", {"layers_pattern": "h"}),
        (ValueError, "layers_to_transform", {"target_modules": "a.*", "layers_to_transform": [1]}),
        (ValueError, "layers_pattern", {"target_modules": "a.*", "layers_pattern": "h"}),
        (ValueError, "DoRA", {"use_dora": True, "megatron_config": {"a": 1}}),
        (ValueError, "use_bdlora", {"use_bdlora": {"nblocks": 2}, "init_lora_weights": "orthogonal"}),
        (ValueError, "lora_bias", {"lora_bias": True, "init_lora_weights": "pissa"}),
        (ValueError, "loftq_config", {"init_lora_weights": "loftq"}),
        (ValueError, "no regular expression", {"alpha_pattern": {"q(": 2}}),
        (TypeError, "target_parameters", {"target_parameters": "experts.down_proj"}),
        (TypeError, "modules_to_save", {"modules_to_save": "head"}),
        (TypeError, "target_modules", {"target_modules": 3}),
        (TypeError, "hold names", {"target_modules": ["a", 3]}),
        (TypeError, "EvaConfig", {"eva_config": 3}),
        (TypeError, "KasaConfig", {"kasa_config": True}),
        (TypeError, "module_config", {"module_config": {"q": 3}}),
        (ValueError, "Did you mean 'lora_alpha'", {"module_config": {"q": {"lora_alpa": 3}}}),
        (ValueError, "target_modules", {"module_config": {"q": {"target_modules": ["a"]}}}),
    ],
)
def test_what_cannot_be_is_refused_at_once(kind, match, arguments):
    with pytest.raises(kind, match=match):
        LoraConfig(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("EvaConfig", {"rho": 0.5}),
        ("EvaConfig", {"tau": 2}),
        ("LoftQConfig", {"loftq_bits": 3}),
        ("CordaConfig", {"corda_method": "x"}),
        ("LoraGAConfig", {"direction": "x"}),
        ("ArrowConfig", {"router_temperature": 0}),
        ("KasaConfig", {"beta": -1}),
        ("VeloraConfig", {"num_groups": 0}),
        ("MontecloraConfig", {"num_samples": 0}),
        ("BdLoraConfig", {"nblocks": 0}),
    ],
)
def test_nested_configurations_check_their_values(name, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        getattr(lora, name)(**arguments)


@pytest.mark.parametrize(
    "init", [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica", "lora_ga"]
)
def test_what_this_release_can_do_is_not_refused(init):
    config = LoraConfig(
        init_lora_weights=init, use_rslora=True, bias="all", target_parameters=["x"], megatron_config={"a": 1}
    )
    assert config.unsupported() == []
    config.refuse_unsupported()


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("use_qalora", {"use_qalora": True}),
    ],
)
def test_what_comes_later_can_be_read_but_is_refused_by_name(field, arguments):
    config = LoraConfig(**arguments)
    assert field in config.unsupported()
    with pytest.raises(NotImplementedError, match=f"cannot carry out.*{field}="):
        config.refuse_unsupported()


def test_an_init_without_its_settings_warns():
    with pytest.warns(PeftWarning, match="eva_config"):
        assert LoraConfig(init_lora_weights="eva").eva_config == lora.EvaConfig()
    with pytest.warns(PeftWarning, match="will be ignored"):
        LoraConfig(eva_config={})


def test_default_targets_have_the_known_values():
    assert defaults.targets_by_model_type("LORA")["llama"] == ["q_proj", "v_proj"]
    assert defaults.targets_by_model_type("LORA")["gemma4"] == r".*language_model\..*\.(q_proj|v_proj)"
    assert defaults.targets_by_model_type("WAVEFT")["gpt2"] == ["mlp.c_proj"]
    assert "mixtral" not in defaults.targets_by_model_type("ADALORA")
    assert defaults.targets_by_model_type("LNTUNING")["gemma3_text"][-1] == "norm"  # at the end of a longer line
    assert "norm" not in defaults.targets_by_model_type("LNTUNING")


VALUES = [
    *(None, True, 3, 1.5, float("nan"), 'é"\n,\\', "", PeftType.LORA, [], {}, [1, "a,\n  b", None], ["é", 'x", "y']),
    *({"b": 1, "a": "x,\n    y"}, {"a": {"b": [1, {"c": []}]}}, [[1, 2], []], {"a": None, "b": float("inf")}, [{}]),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_file_is_written_as_json_writes_it(value):
    values = {"z": value, "a": 1, "m": [value], "b": {"key": value}}
    assert config._json(values) == json.dumps(dict(sorted(values.items())), indent=2)
    assert config._json({"z": value}) == json.dumps({"z": value}, indent=2)
    copied = config._copied(value)
    assert repr(copied) == repr(value) and type(copied) is type(value)
    assert copied is not value or not isinstance(value, (list, dict))


@pytest.mark.parametrize("kind", [[], {}, ["LORA"], 7])
def test_a_method_that_is_no_text_is_no_method(kind):
    with pytest.raises(ValueError, match=r"peft_type is .*, which is no known method"):
        PeftConfig.from_peft_type(peft_type=kind)


@pytest.mark.parametrize("value", [None, "0.1"])
def test_a_probability_that_is_no_number_is_named(value):
    with pytest.raises(TypeError, match="`module_dropout` must be a number"):
        OFTConfig(target_modules=["a"], module_dropout=value)
