"""Single calls and names of TRL's; the table in test_trl.py says which is where."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

pytest.importorskip("trl")

import trl
from accelerate.utils import is_peft_model
from packaging.version import Version
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import get_peft_config, use_adapter

import peft
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from .recipes import PROBE, RECIPES, base, history, lora, trainer
from .tiny import llama, logits, moved

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # TRL and transformers warn about themselves
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
]


def test_versions_pass_trl_s_gates():
    assert Version(peft.__version__) >= Version("0.20.0")
    assert Version(peft.__version__) > Version("0.17.1")
    assert importlib.metadata.version("peft") == peft.__version__


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_no_configuration_or_one_too_many_is_refused_by_trl(recipe, tmp_path):
    with pytest.raises(TypeError, match=r"must be a `peft\.PeftConfig` instance"):
        trainer(recipe, base(recipe), tmp_path, peft_config={"r": 2})
    with pytest.raises(ValueError, match="You passed a `PeftModel` instance together with a `peft_config`"):
        trainer(recipe, get_peft_model(base(recipe), lora()), tmp_path, peft_config=lora())


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_keep_bfloat16(autocast, tmp_path):
    model = get_peft_model(llama().bfloat16(), lora(), autocast_adapter_dtype=autocast)
    kept = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kept == {torch.float32 if autocast else torch.bfloat16}
    of = trainer("SFT", model, tmp_path, {"bf16": True, "max_steps": 1})
    assert history(of)[0]["grad_norm"] > 0
    assert {p.dtype for p in of.model.parameters() if p.requires_grad} == kept


def test_use_adapter_switches_and_switches_back():
    model = get_peft_model(llama(), lora())
    model.add_adapter("ref", model.peft_config["default"])
    moved(model)
    default = logits(model)
    model.set_adapter("ref")
    ref = logits(model)
    model.set_adapter("default")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, expected in ((None, logits(llama())), ("ref", ref)):
        with use_adapter(model, name):
            assert torch.equal(logits(model), expected)
        assert model.active_adapter == "default"
        assert torch.equal(logits(model), default)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    with pytest.raises(RuntimeError, match="inside"), use_adapter(model, "ref"):
        raise RuntimeError("inside")
    assert model.active_adapter == "default"


@pytest.mark.parametrize("recipe", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "Distillation"])
def test_an_adapted_head_is_seen_by_trl(recipe, tmp_path):
    config = lora(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"adapter (to|on) `lm_head`"):
        trainer(recipe, get_peft_model(llama(), config), tmp_path)
    model = get_peft_model(llama(), config)
    assert isinstance(model.get_output_embeddings(), BaseTunerLayer)
    assert model.lm_head is model.get_output_embeddings()


def test_a_head_to_be_cast_is_looked_at_through_the_model(tmp_path):
    of = trainer("GRPO", llama().bfloat16(), tmp_path, {"cast_lm_head_to_fp32": True}, peft_config=lora())
    assert of.model.lm_head.weight.dtype == torch.float32
    assert history(of)[0]["grad_norm"] > 0


def test_distilling_tells_prompts_apart(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert isinstance(config, PromptLearningConfig)
    assert issubclass(PrefixTuningConfig, PromptLearningConfig)
    assert not issubclass(LoraConfig, PromptLearningConfig)
    with pytest.raises(ValueError, match="Prompt-learning PEFT methods"):
        trainer("Distillation", llama(), tmp_path, peft_config=config)


def test_magnitudes_are_known_by_their_name():
    model = get_peft_model(llama().bfloat16(), lora(use_dora=True, init_lora_weights=True))
    before = logits(model)
    for name, parameter in model.named_parameters():  # as TRL does it for quantized models
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert {t for name, t in kinds.items() if "lora_magnitude_vector" in name} == {torch.float32}
    assert {t for name, t in kinds.items() if "lora_magnitude_vector" not in name} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), before, rtol=2e-2, atol=2e-2)
    model.train()(**PROBE, labels=PROBE["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"bias": "all"}])
def test_weights_for_a_server_are_the_merged_ones_under_plain_names(fields):
    model = moved(get_peft_model(llama(), lora(init_lora_weights=True, **fields)))
    expected = logits(model)
    before = {name: p.clone() for name, p in model.named_parameters()}

    class Alone:  # what TRL knows of one process
        is_fsdp = False
        gather_params = staticmethod(lambda parameters: torch.no_grad())

    sync = VLLMGeneration.__new__(VLLMGeneration)
    sync.model, sync._dist, sync.mode = model, Alone(), "colocate"
    sent = {name: weight.clone() for name, weight in sync._iter_named_params()}
    plain = llama()
    assert sent.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(sent)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_preparing_takes_what_trl_gives(checkpointing):
    model = llama()
    model.is_loaded_in_8bit = True
    kwargs = {"use_gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert prepare_model_for_kbit_training(model, **kwargs) is model
    assert model.is_gradient_checkpointing == checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    adapted = get_peft_model(model.train(), lora())
    adapted(**PROBE, labels=PROBE["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_the_command_line_makes_a_configuration():
    assert get_peft_config(trl.ModelConfig(use_peft=False)) is None
    given = trl.ModelConfig(
        use_peft=True,
        lora_r=3,
        lora_alpha=5,
        lora_dropout=0.25,
        lora_target_modules=["q_proj", "v_proj"],
        lora_modules_to_save=["lm_head"],
        use_rslora=True,
        use_dora=True,
    )
    config = get_peft_config(given)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 5, 0.25, "none")
    assert (config.target_modules, config.modules_to_save) == ({"q_proj", "v_proj"}, ["lm_head"])
    assert config.use_rslora and config.use_dora and config.task_type == "CAUSAL_LM"
    experts = trl.ModelConfig(use_peft=True, lora_target_parameters=["mlp.experts.down_proj"])
    assert get_peft_config(experts).target_parameters == ["mlp.experts.down_proj"]
    model = get_peft_model(llama(), config)
    assert is_peft_model(model) and isinstance(model, PeftModel)


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_experimental_trainers_wrap_too(name, tmp_path):
    module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    kind, settings = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    of = trainer("DPO", llama(), tmp_path, {"max_length": 16}, peft_config=lora(), kinds=(kind, settings))
    before = {n: p.clone() for n, p in of.model.named_parameters()}
    assert history(of)[0]["grad_norm"] > 0
    changed = {n for n, p in of.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}
