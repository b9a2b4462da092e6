"""TRL's trainers: the same losses as the same recipe on a plain model whose weights are `W + s B A`, step by step.

What TRL asks of the library, and the test that holds it (here, or in test_trl_names.py):

| touchpoint | test |
|---|---|
| `get_peft_model(model, peft_config)` in all seven trainers | test_training_is_that_of_... |
| a ready PeftModel in each of them | test_training_is_that_of_...[ready] |
| the reference: `model.disable_adapter()`, by `use_adapter(model, None)` | test_training_...[peft_config] |
| the reference: `add_adapter("ref", peft_config["default"])`, `get_parameter` | test_a_ready_model_gets... |
| a second adapter over the same `target_parameters` | test_a_ready_model_gets...[experts] |
| logits longer than labels; `PrefixTuningConfig`, `hf_device_map` | test_prompts_are_trained |
| `trainable_token_indices`, `modules_to_save` edited in place | test_new_tokens_are_trained |
| checkpoints: only adapters, `ref` in its folder; resuming | test_resuming_goes_on... |
| the best model, `save_model`, AutoPeftModel, merging | test_the_best_model..., test_what_is_trained... |
| teacher sync: `get/set_peft_model_state_dict` between adapters | test_a_teacher_follows |
| `isinstance(peft_config, PeftConfig)`, `is_peft_model` | names: test_what_is_no_configuration... |
| `get_peft_model(..., autocast_adapter_dtype=False)` | names: test_adapters_keep_bfloat16 |
| `use_adapter(model, "ref")`: `active_adapter`, `set_adapter` | names: test_use_adapter... |
| `isinstance(get_output_embeddings(), BaseTunerLayer)`, `lm_head` | names: test_an_adapted_head..., test_a_head... |
| `PromptLearningConfig` told apart | names: test_distilling... |
| `lora_magnitude_vector` is not cast to bfloat16 | names: test_magnitudes... |
| vLLM: `merge_adapter`, names as text, `prefix`, `unmerge_adapter` | names: test_weights_for_a_server... |
| `prepare_model_for_kbit_training` with two keywords | names: test_preparing... |
| the command line's `get_peft_config` | names: test_the_command_line... |
| `peft.__version__` against 0.17.1 and 0.20.0 | names: test_versions... |
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

pytest.importorskip("trl")

import trl
from datasets import Dataset
from trl.experimental.sdft.teacher_sync import PEFTAdapterEMACallback

from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from .recipes import PROBE, RECIPES, adapter, base, history, lora, mixtral, tokenizer, trainer
from .tiny import llama

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # TRL and transformers warn about themselves
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
]


class Added(nn.Module):
    """W + s B A, in torch alone."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.scale = scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.b @ self.a)


def twin(model: PeftModel, plain: nn.Module) -> nn.Module:
    """The plain model with the same updates, by torch's parametrizations."""
    plain.requires_grad_(False)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
            update = Added(a, b, layer.scaling["default"])
            parametrize.register_parametrization(plain.get_submodule(name), "weight", update)
    if hasattr(plain, "score"):
        plain.score.requires_grad_(True)
    return plain


def written(model: nn.Module, folder: Path) -> str:
    """A folder with the model's plain weights: some trainers load their reference from where the model came from."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("how", ["peft_config", "ready"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_that_of_the_recipe_on_a_plain_model(recipe, how, tmp_path):
    config = lora(task_type=TaskType.SEQ_CLS if recipe == "Reward" else TaskType.CAUSAL_LM)
    if how == "ready":
        ours = trainer(recipe, get_peft_model(base(recipe), config), tmp_path)
    else:
        ours = trainer(recipe, base(recipe), tmp_path, peft_config=config)
    assert isinstance(ours.model, PeftModel)
    plain = twin(ours.model, base(recipe))
    reference = twin(ours.model, llama()) if how == "ready" else llama()  # as it was at first, or without
    beside = {"ref_model": reference} if recipe in ("DPO", "KTO") else {}
    if recipe in ("GRPO", "RLOO"):
        plain.config._name_or_path = written(reference, tmp_path / "reference")
    theirs = trainer(recipe, plain, tmp_path, **beside)
    torch.manual_seed(1)
    expected = history(theirs)
    torch.manual_seed(1)
    found = history(ours)
    assert len(found) == len(expected) == 3
    assert len({step["grad_norm"] for step in expected}) > 1
    for step, other in zip(found, expected, strict=True):
        assert step == pytest.approx(other, rel=2e-4, abs=2e-6)


MOE = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("recipe", ["DPO", "KTO", "GRPO", "RLOO"])
@pytest.mark.parametrize("made", ["linear", "experts"])
def test_a_ready_model_gets_a_reference(recipe, made, tmp_path):
    model = get_peft_model(llama(), lora()) if made == "linear" else get_peft_model(mixtral(), lora(**MOE))
    with torch.no_grad():
        before = model(**PROBE).logits
    of = trainer(recipe, model, tmp_path)
    assert list(model.peft_config) == ["default", "ref"]
    assert model.active_adapter == "default"
    frozen = {name for name, p in model.named_parameters() if ".ref." in name and not p.requires_grad}
    assert frozen == {name.replace(".default.", ".ref.") for name, _ in model.named_parameters() if ".default." in name}
    history(of)
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(model(**PROBE).logits, before, atol=1e-4)
        model.set_adapter("ref")
        torch.testing.assert_close(model(**PROBE).logits, before)


PROMPTS = {
    "prompts": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_trained(kind, tmp_path):
    model = llama()
    model.hf_device_map = {"": "cpu"}  # a loaded model has one
    of = trainer("SFT", model, tmp_path, {"gradient_checkpointing": False}, peft_config=PROMPTS[kind])
    batch = next(iter(of.get_train_dataloader()))
    with torch.no_grad():
        expected = of.model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}).loss
        assert of.compute_loss(of.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)
    before = {name: p.detach().clone() for name, p in of.model.named_parameters()}
    steps = history(of)
    assert len(steps) == 3
    changed = {name for name, p in of.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("prompt_encoder" in name for name in changed)
    of.save_model(tmp_path / "saved")
    again = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(**PROBE).logits, of.model.eval()(**PROBE).logits)


@pytest.mark.parametrize("fields", [{}, {"trainable_token_indices": {"embed_tokens": [4]}, "modules_to_save": []}])
def test_new_tokens_are_trained(fields, tmp_path):
    source = tokenizer()
    source.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    source.save_pretrained(tmp_path / "chat")
    model, config = llama(), lora(task_type="CAUSAL_LM", **fields)
    vocabulary = model.config.vocab_size
    chat = [[{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]] * 4
    of = trainer(
        "SFT",
        model,
        tmp_path,
        {"chat_template_path": str(tmp_path / "chat")},
        peft_config=config,
        data={"messages": chat},
    )
    new = of.processing_class.convert_tokens_to_ids("<turn>")
    assert new == vocabulary
    assert new in config.trainable_token_indices["embed_tokens"]
    assert config.modules_to_save == ["lm_head"]
    history(of)
    of.save_model(tmp_path / "saved")
    state = adapter(tmp_path / "saved")
    trained = config.trainable_token_indices["embed_tokens"]
    held = {name: tuple(t.shape) for name, t in state.items() if "lora" not in name}
    vocabulary = model.config.vocab_size
    assert held == {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (len(trained), 16),
        "base_model.model.lm_head.weight": (vocabulary, 16),
    }
    other = llama()
    other.resize_token_embeddings(vocabulary)
    other.get_input_embeddings().weight.data.copy_(model.model.embed_tokens.original_module.weight)
    again = PeftModel.from_pretrained(other, tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(**PROBE).logits, of.model.eval()(**PROBE).logits)


@pytest.mark.parametrize(("recipe", "how"), [("SFT", "peft_config"), ("DPO", "ready"), ("Reward", "peft_config")])
def test_resuming_goes_on_where_it_stopped(recipe, how, tmp_path):
    task = TaskType.SEQ_CLS if recipe == "Reward" else TaskType.CAUSAL_LM

    def start(folder: Path) -> object:
        every = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        torch.manual_seed(5)
        config = lora(task_type=task, lora_dropout=0.5)
        if how == "ready":
            return trainer(recipe, get_peft_model(base(recipe), config), folder, every)
        return trainer(recipe, base(recipe), folder, every, peft_config=config)

    expected = history(start(tmp_path / "whole"))
    half, end = (tmp_path / "whole" / f"checkpoint-{n}" for n in (2, 4))
    assert not list(half.glob("model*")) and (half / "ref").is_dir() == (how == "ready")
    again = start(tmp_path / "again")
    for parameter in again.model.parameters():
        if parameter.requires_grad:  # nothing of the start may be left
            parameter.data.fill_(torch.nan)
    assert history(again, resume=str(half)) == expected
    for name in ("default", "ref") if how == "ready" else ("default",):
        found, whole = adapter(tmp_path / "again" / "checkpoint-4", name), adapter(end, name)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_the_best_model_is_the_one_kept(tmp_path):
    every = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the first, where training does anything
    }
    of = trainer("SFT", llama(), tmp_path, every, peft_config=lora(), eval_dataset=Dataset.from_dict(RECIPES["SFT"][0]))
    history(of)
    best = Path(of.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    last = adapter(tmp_path / "checkpoint-3")
    of.save_model(tmp_path / "saved")
    saved, expected = adapter(tmp_path / "saved"), adapter(best)
    assert all(torch.equal(saved[name], t) for name, t in expected.items())
    assert not any(torch.equal(saved[name], t) for name, t in last.items())


def test_what_is_trained_is_found_again_and_merges(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    of = trainer("SFT", str(tmp_path / "base"), tmp_path / "out", peft_config=lora(task_type="CAUSAL_LM"))
    history(of)
    of.save_model(tmp_path / "saved")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    merged = PeftModel.from_pretrained(llama(), tmp_path / "saved").merge_and_unload()
    with torch.no_grad():
        expected = of.model.eval()(**PROBE).logits
        torch.testing.assert_close(again(**PROBE).logits, expected)
        torch.testing.assert_close(merged(**PROBE).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_follows(tmp_path):
    model = get_peft_model(llama(), lora())
    follows = PEFTAdapterEMACallback(model, update_rate=0.5)
    of = trainer("SFT", model, tmp_path, {"max_steps": 2}, callbacks=[follows])
    seen = []

    class Watch(trl.trainer.callbacks.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            layer = model.base_model.model.model.layers[0].self_attn.q_proj
            seen.append((layer.lora_A["default"].weight.clone(), layer.lora_A["teacher"].weight.clone()))

    of.add_callback(Watch())
    history(of)
    (first, after_first), (second, after_second) = seen
    torch.testing.assert_close(after_first, first / 2)
    torch.testing.assert_close(after_second, first / 4 + second / 2)
    assert model.active_adapter == "default"
