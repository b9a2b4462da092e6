"""What transformers and accelerate touch of this library: each name and behaviour, and the test that shows it.

TABLE: what is touched -> "file: test" (the file without `test_` and `.py`). A test of this file holds the names against
the files, so that no entry outlives its test.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import inspect
from pathlib import Path

import pytest
from packaging.version import Version

import peft

transformers = pytest.importorskip("transformers", "4.57")

TABLE = {
    # identity
    "the distribution is named peft, and agrees with __version__": "touchpoints: test_the_distribution_answers",
    "version gates (0.20 of the mixin, 0.21 of sharded adapters)": "touchpoints: test_versions_pass_the_gates",
    "imports of transformers.integrations.peft, trainer, fsdp, wav2vec2": "touchpoints: test_imported_names_exist",
    "transformers.trainer_utils imports peft at its own import": "touchpoints: test_the_imports_do_not_go_in_a_circle",
    # PeftAdapterMixin
    "add_adapter: peft_config on the model itself, the rest frozen, no wrapper": (
        "transformers_mixin: test_an_adapter_is_added_to_the_model_itself"
    ),
    "add_adapter: PeftConfig wanted, names taken, unknown targets": (
        "transformers_mixin: test_what_cannot_be_added_is_refused_and_leaves_the_model_as_it_was"
    ),
    "default targets by the model's type; LoraLayer of speech models": (
        "transformers_mixin: test_targets_are_found_by_the_model_s_type_when_none_are_named"
    ),
    "set_adapter of one and several; active_adapters' order; disable, enable": (
        "transformers_mixin: test_one_adapter_is_chosen_then_several_then_none"
    ),
    "set_adapter: unknown names": "transformers_mixin: test_switching_needs_names_that_exist",
    "ModulesToSaveWrapper.set_adapter, refusing lists; active_adapter": (
        "transformers_mixin: test_whole_modules_follow_their_adapter"
    ),
    "several methods on one bare model": "transformers_mixin: test_adapters_of_several_methods_are_switched_alike",
    "load_adapter: inference_mode, requires_grad_ of tuner layers": (
        "transformers_mixin: test_a_folder_is_loaded_for_inference_or_for_training"
    ),
    "load_adapter(peft_config=, adapter_state_dict=)": (
        "transformers_mixin: test_a_configuration_and_a_state_are_loaded_without_files"
    ),
    "load_adapter: PeftConfig.from_pretrained with download arguments": (
        "transformers_mixin: test_a_subfolder_is_read_and_several_adapters_live_side_by_side"
    ),
    "load_adapter: missing_keys as live names": (
        "transformers_mixin: test_tensors_that_a_file_lacks_are_reported_by_their_live_names"
    ),
    "load_adapter: adapter_model.bin": "transformers_mixin: test_a_file_in_the_older_format_is_loaded",
    "load_adapter(hotswap=), enable_peft_hotswap": "transformers_mixin: test_an_adapter_is_exchanged_in_place",
    "hotswap: refusals": "transformers_mixin: test_what_cannot_be_exchanged_is_refused",
    "adapter keys hold the adapter's name or the method's": (
        "transformers_mixin: test_names_of_tensors_hold_the_prefix_by_which_transformers_knows_them"
    ),
    "get_adapter_state_dict: bare keys, state_dict=": "transformers_mixin: test_a_state_has_neither_prefix_nor_name",
    "save_pretrained: prefix, configuration, one active adapter": (
        "transformers_mixin: test_the_active_adapter_is_saved_as_a_peft_model_would"
    ),
    "functional.delete_adapter(model, adapter_name=, prefix=)": (
        "transformers_mixin: test_adapters_are_deleted_one_by_one_or_together"
    ),
    # weight conversion
    "build_peft_weight_mapping: every saved name leads to a live one": (
        "transformers_weights: test_each_saved_name_leads_to_a_live_one"
    ),
    "every method through transformers' loader": (
        "transformers_weights: test_what_is_saved_by_one_is_loaded_by_the_other"
    ),
    "AuxiliaryTrainingWrapper.adapter_state_dict_load_map": (
        "transformers_weights: test_wrappers_tell_where_their_tensors_live"
    ),
    "the model's own conversions (key_mapping, renamed modules)": (
        "transformers_weights: test_modules_that_were_renamed_since_are_found"
    ),
    "the list of conversions that is handed in": "transformers_weights: test_the_model_s_own_steps_follow_ours",
    "experts of files of transformers 4, converted": (
        "transformers_weights: test_factors_of_single_experts_become_those_of_their_stack"
    ),
    "convert_peft_config_for_transformers, get_model_conversion_mapping": (
        "transformers_weights: test_a_configuration_is_rewritten_for_the_stacks_in_place"
    ),
    "_weight_conversions that the model remembers": (
        "transformers_weights: test_a_base_model_is_saved_under_its_own_names_once_the_adapter_is_gone"
    ),
    # Trainer
    "_is_peft_model of PeftMixedModel": "transformers_trainer: test_a_mixed_model_is_known_as_one_of_ours",
    "unwrap_peft_model": "transformers_trainer: test_a_model_is_unwrapped_for_what_patches_base_models",
    "label names by the base model's forward": (
        "transformers_trainer: test_names_of_labels_and_columns_are_those_of_the_base_model"
    ),
    "columns that are unknown": "transformers_trainer: test_columns_that_the_model_does_not_take_are_left_out",
    "checkpoints: save_pretrained(dir, state_dict=), names of files": (
        "transformers_trainer: test_a_checkpoint_holds_the_adapter_and_the_trainer_s_state_alone"
    ),
    "a model that transformers adapted, in a checkpoint": (
        "transformers_trainer: test_a_model_that_transformers_adapted_itself_is_trained_and_saved_as_an_adapter"
    ),
    "resume: load_adapter over live parameters, in place": (
        "transformers_trainer: test_training_that_goes_on_from_a_checkpoint_is_equal_to_the_bit"
    ),
    "resume: the newest checkpoint; load_adapter(dir, name, is_trainable=True)": (
        "transformers_trainer: test_the_newest_checkpoint_is_found_by_itself"
    ),
    "resume: sub-folders of several adapters; active_adapters is a list": (
        "transformers_trainer: test_several_adapters_lie_in_folders_of_their_names_and_all_come_back"
    ),
    "best model, prompt learning too": "transformers_trainer: test_the_best_model_is_there_at_the_end",
    "callbacks": "transformers_trainer: test_a_callback_may_save_the_adapter_too",
    "adapter_model.bin in a checkpoint": "transformers_trainer: test_save_model_and_an_older_format_of_files",
    "evaluation and prediction": ("transformers_trainer: test_evaluation_and_prediction_give_the_metrics_of_the_model"),
    "optimizer": "transformers_trainer: test_only_the_adapter_s_parameters_are_handed_to_the_optimizer",
    "neftune": "transformers_trainer: test_noise_on_embeddings_is_put_on_the_base_model_s_and_taken_off_again",
    "is_quantized, hf_quantizer through __getattr__": (
        "transformers_trainer: test_a_quantised_base_model_may_be_trained_under_an_adapter_only"
    ),
    "trackers: peft_config; class names; get_nb_trainable_parameters": (
        "transformers_trainer: test_a_tracker_receives_the_configurations"
    ),
    "gradient checkpointing, both ways and both kinds": (
        "transformers_trainer: test_gradient_checkpointing_changes_no_gradient"
    ),
    "create_or_update_model_card, library_name": (
        "transformers_hub: test_a_card_is_brought_up_to_date_without_losing_what_the_trainer_wrote"
    ),
    "push_to_hub of Trainer": "transformers_hub: test_a_trainer_pushes_the_adapter_and_a_card_that_names_the_library",
    "push_to_hub on the way": "transformers_hub: test_a_trainer_pushes_each_checkpoint_s_adapter_on_its_way",
    "push_to_hub of models": "transformers_hub: test_a_model_pushes_its_adapter",
    # auto classes, pipelines, generation
    "AutoModel*.from_pretrained(adapter folder)": (
        "transformers_auto: test_an_adapter_s_folder_gives_the_adapted_model"
    ),
    "names of classes in pipelines": "transformers_auto: test_the_names_of_classes_that_pipelines_compare_are_ours",
    "pipelines": "transformers_auto: test_a_pipeline_generates_text",
    "generate": "transformers_generate: test_every_way_to_decode_gives_what_the_merged_model_gives",
    "caches": "transformers_generate: test_every_cache_gives_what_the_merged_model_gives",
    "assisted generation": ("transformers_generate: test_a_smaller_model_proposes_and_the_adapted_one_decides"),
    "prompt learning's generate and cache": "transformers_generate: test_prompts_decode_alike_in_every_cache",
    # many machines
    "_tp_plan, _tp_size through __getattr__": (
        "transformers_parallel: test_the_plan_of_tensor_parallelism_is_the_base_model_s"
    ),
    "load_adapter's gate for sharded models": (
        "transformers_parallel: test_a_model_that_was_not_split_loads_adapters_as_usual"
    ),
    "fsdp_auto_wrap_policy": "transformers_parallel: test_the_policy_wraps_layers_and_trainable_leaves",
    "active_peft_config is a PeftConfig": "transformers_parallel: test_transformers_puts_the_policy_into_its_plugin",
    "active_adapter is one string": "transformers_parallel: test_transformers_asks_accelerate_for_the_adapter_alone",
    # accelerate
    "no unused trainable parameter": "transformers_parallel: test_every_trainable_parameter_has_a_gradient",
    "is_peft_model, also inside wrappers": "accelerate: test_a_model_is_unwrapped_known_and_saved",
    "get/set_peft_model_state_dict(model, adapter_name=model.active_adapter)": (
        "accelerate: test_sharded_models_are_asked_for_the_active_adapter_s_state"
    ),
    "prepare": "accelerate: test_a_prepared_model_trains_as_by_hand",
    "save_state, load_state": "accelerate: test_a_saved_state_goes_on_equal_to_the_bit",
    "get_state_dict, save_function": "accelerate: test_an_unwrapped_model_is_saved_as_users_do",
    "hf_device_map, _hf_hook": "accelerate: test_an_adapted_model_is_dispatched_and_its_map_kept",
    "hooks are kept": "accelerate: test_hooks_around_a_layer_are_kept_when_it_is_adapted_and_unloaded",
    "offloaded bases": "accelerate: test_an_adapter_joins_a_model_that_lies_partly_on_disk",
    "merging under offload": "accelerate: test_a_merge_reaches_weights_that_lie_elsewhere_and_is_taken_back",
    "methods over offloaded bases": (
        "accelerate_offload: test_a_method_runs_and_merges_over_weights_that_lie_elsewhere"
    ),
    "_no_split_modules, infer_auto_device_map": "accelerate: test_an_automatic_map_keeps_layers_whole",
    "load_checkpoint_and_dispatch": "accelerate: test_an_empty_model_is_filled_and_dispatched",
}


@functools.cache
def names_in(name: str) -> set[str]:
    """The tests of a file of this folder."""
    text = (Path(__file__).parent / f"test_{name}.py").read_text(encoding="utf-8")
    return {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


@pytest.mark.parametrize("touched", TABLE)
def test_each_entry_names_a_test(touched):
    file, _, test = TABLE[touched].partition(": ")
    assert test in names_in(file)


NAMES = {
    "peft": """
        PeftConfig PeftModel PeftMixedModel PeftType inject_adapter_in_model get_peft_model_state_dict
        set_peft_model_state_dict""",
    "peft.tuners.tuners_utils": "BaseTunerLayer",
    "peft.utils": "ModulesToSaveWrapper",
    "peft.utils.other": "AuxiliaryTrainingWrapper fsdp_auto_wrap_policy",
    "peft.functional": "delete_adapter",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping",
    "peft.tuners.lora": "LoraLayer",
}


@pytest.mark.parametrize("module", NAMES)
def test_imported_names_exist(module):
    found = importlib.import_module(module)
    for name in NAMES[module].split():
        assert inspect.isclass(getattr(found, name)) or callable(getattr(found, name))
    assert peft.PeftType.LORA.value.lower() == "lora" and peft.PeftType.LORA == "LORA"


def test_the_distribution_answers():
    assert Version(importlib.metadata.version("peft")) == Version(peft.__version__)


def test_versions_pass_the_gates():
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils import check_peft_version, is_peft_available

    assert is_peft_available()
    check_peft_version(min_version=MIN_PEFT_VERSION)
    assert Version(peft.__version__) > Version("0.21.0")


def test_the_imports_do_not_go_in_a_circle():
    import subprocess
    import sys

    for first in ("transformers.trainer_utils, peft", "peft, transformers.trainer_utils"):
        line = f"import {first}; assert transformers.trainer_utils.__name__ and peft.PeftModel and peft.PeftMixedModel"
        done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
