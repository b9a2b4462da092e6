"""Adapters inside sentence-transformers' models: trained, saved, loaded, switched.

| touchpoint | test |
|---|---|
| `add_adapter`, `set_adapter`, `enable_adapters` ... through transformers' mixin | test_adapters_come_and_go |
| `TaskType.FEATURE_EXTRACTION`, default targets of BERT | test_adapters_come_and_go |
| `get_model_status(SentenceTransformer)` | test_the_status... |
| `fit`, the Trainer: only adapters learn; checkpoints | test_training..., test_the_losses..., test_resuming |
| `PeftConfig.from_pretrained(folder).base_model_name_or_path` on loading | test_a_folder... |
| `load_adapter`, `get_adapter_state_dict` | test_an_adapter_alone... |
| a model whose inner model is a PeftModel | test_a_peft_model_inside |
| CrossEncoder: `ModulesToSaveWrapper`, `keep_in_fp32_modules` | test_a_cross_encoder... |
| merging of models refuses adapters (`peft_config`) | test_models_with_adapters... |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

pytest.importorskip("sentence_transformers")

import datasets
from safetensors.torch import load_file
from sentence_transformers import (
    CrossEncoder,
    InputExample,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.models import Pooling, Transformer
from transformers import BertForSequenceClassification, BertModel

from peft import LoraConfig, PeftModel, TaskType, get_model_status, get_peft_model
from peft.utils import ModulesToSaveWrapper

from .tiny import bert_config, moved, seeded, tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # sentence-transformers and transformers warn about themselves
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
]
datasets.disable_progress_bars()

TEXTS = ["w3 w4 w5", "w6 w7", "w8 w9 w10 w11", "w12"]
PAIRS = {"anchor": TEXTS, "positive": ["w3 w5", "w7 w6", "w11 w9", "w12 w13"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A folder with a BERT that turns words into vectors."""
    folder = tmp_path_factory.mktemp("bert")
    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    seeded(BertModel, bert_config(initializer_range=0.3, **dropped)).save_pretrained(folder / "inner")
    tokenizer().save_pretrained(folder / "inner")
    inner = Transformer(str(folder / "inner"))
    SentenceTransformer(modules=[inner, Pooling(inner.get_word_embedding_dimension())], device="cpu").save(
        str(folder / "whole")
    )
    return str(folder / "whole")


def model(folder: str) -> SentenceTransformer:
    """Read from its folder."""
    return SentenceTransformer(folder, device="cpu")


def lora(**changes: Any) -> LoraConfig:
    """LoRA that does something, on whatever is usual for BERT."""
    fields = {"task_type": TaskType.FEATURE_EXTRACTION, "r": 2, "lora_alpha": 6, "init_lora_weights": False}
    return LoraConfig(**{**fields, **changes})


def vectors(of: SentenceTransformer) -> torch.Tensor:
    """What it makes of the texts."""
    return of.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """By more than rounding."""
    return not torch.allclose(a, b, atol=1e-4)


def test_adapters_come_and_go(base):
    one = model(base)
    plain = vectors(one)
    one.add_adapter(lora(init_lora_weights=True), "first")
    assert torch.equal(vectors(one), plain)
    names = {n.split(".lora_")[0].rsplit(".", 1)[1] for n, _ in one.named_parameters() if "lora_" in n}
    assert names == {"query", "value"}
    assert all(("lora_" in n) == p.requires_grad for n, p in one.named_parameters())
    one.add_adapter(lora(), "second")
    assert one.active_adapters() == ["second"]
    second = vectors(one)
    assert differ(second, plain)
    one.set_adapter("first")
    assert one.active_adapters() == ["first"]
    assert torch.equal(vectors(one), plain)
    one.set_adapter(["first", "second"])
    torch.testing.assert_close(vectors(one), second)
    one.disable_adapters()
    assert torch.equal(vectors(one), plain)
    one.enable_adapters()
    torch.testing.assert_close(vectors(one), second)
    one.delete_adapter("second")
    assert list(one[0].auto_model.peft_config) == ["first"]
    assert torch.equal(vectors(one), plain)


def test_the_status_of_a_nested_model(base):
    one = model(base)
    one.add_adapter(lora(), "first")
    one.add_adapter(lora(), "second")
    status = get_model_status(one)
    assert status.available_adapters == ["first", "second"]
    assert status.enabled is True
    assert status.active_adapters == ["second"]
    assert status.merged_adapters == []
    one.disable_adapters()
    assert get_model_status(one).enabled is False


def trainer(one: SentenceTransformer, folder: Path, **arguments: Any) -> SentenceTransformerTrainer:
    """A few steps over pairs of texts."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.005,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **arguments,
    }
    return SentenceTransformerTrainer(
        model=one,
        args=SentenceTransformerTrainingArguments(**settings),
        train_dataset=datasets.Dataset.from_dict(PAIRS),
        loss=losses.MultipleNegativesRankingLoss(one),
    )


@pytest.mark.parametrize("way", ["trainer", "fit"])
def test_training_changes_the_adapter_alone(way, base, tmp_path):
    one = model(base)
    one.add_adapter(lora())
    before, first = {n: p.detach().clone() for n, p in one.named_parameters()}, vectors(one)
    if way == "trainer":
        of = trainer(one, tmp_path)
        of.train()
        found = [entry["loss"] for entry in of.state.log_history if "loss" in entry]
        assert len(found) == 4 and found[-1] < found[0]
    else:
        examples = [InputExample(texts=list(pair)) for pair in zip(*PAIRS.values(), strict=True)]
        loader = torch.utils.data.DataLoader(examples, batch_size=4)
        loss = losses.MultipleNegativesRankingLoss(one)
        settings = {"optimizer_params": {"lr": 0.05}, "show_progress_bar": False, "warmup_steps": 0}
        one.fit([(loader, loss)], epochs=1, output_path=str(tmp_path), **settings)
    changed = {n for n, p in one.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    assert differ(vectors(one), first)


class Added(nn.Module):
    """W + s B A, in torch alone."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a.clone()), nn.Parameter(b.clone()), scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.b @ self.a)


def test_the_losses_are_those_of_a_plain_model_with_the_same_update(base, tmp_path):
    one, plain = model(base), model(base)
    one.add_adapter(lora())
    plain.requires_grad_(False)
    for name, layer in one[0].auto_model.named_modules():
        if hasattr(layer, "lora_A"):
            target, scale = plain[0].auto_model.get_submodule(name), layer.scaling["default"]
            a, b = (p["default"].weight.detach() for p in (layer.lora_A, layer.lora_B))

            parametrize.register_parametrization(target, "weight", Added(a, b, scale))
    found = []
    for each in (one, plain):
        torch.manual_seed(0)
        of = trainer(each, tmp_path)
        of.train()
        found.append([entry["loss"] for entry in of.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_folder_brings_its_base(base, tmp_path):
    one = model(base)
    one.add_adapter(lora())
    trained = vectors(one)
    one.save_pretrained(str(tmp_path))
    assert {f.name for f in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "modules.json"}
    assert not list(tmp_path.glob("model*"))
    again = model(str(tmp_path))
    assert torch.equal(vectors(again), trained)
    assert again[0].model.peft_config["default"].base_model_name_or_path
    assert again.active_adapters() == ["default"]


def test_an_adapter_alone_is_loaded_beside_another(base, tmp_path):
    one = model(base)
    one.add_adapter(lora())
    trained, state = vectors(one), one.get_adapter_state_dict("default")
    one[0].auto_model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in state} == saved.keys()
    other = model(base)
    other.add_adapter(lora(r=3), "first")
    first = vectors(other)
    other.load_adapter(str(tmp_path), "second")
    other.set_adapter("second")
    assert torch.equal(vectors(other), trained)
    other.set_adapter("first")
    assert torch.equal(vectors(other), first)


def test_resuming_goes_on_where_it_stopped(base, tmp_path):
    def start(folder: Path) -> SentenceTransformerTrainer:
        one = model(base)
        torch.manual_seed(3)
        one.add_adapter(lora(lora_dropout=0.5))
        return trainer(one, folder, save_strategy="steps", save_steps=2)

    whole = start(tmp_path / "whole")
    whole.train()
    half = tmp_path / "whole" / "checkpoint-2"
    assert (half / "adapter_model.safetensors").exists() and not (half / "model.safetensors").exists()
    again = start(tmp_path / "again")
    for parameter in again.model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(torch.nan)
    again.train(resume_from_checkpoint=str(half))
    assert torch.equal(vectors(again.model), vectors(whole.model))


def test_a_peft_model_inside(base, tmp_path):
    one = model(base)
    plain = vectors(one)
    one[0].model = get_peft_model(one[0].model, lora())
    tuned = vectors(one)
    assert differ(tuned, plain)
    of = trainer(one, tmp_path)
    of.train()
    tuned = vectors(one)
    one[0].model.save_pretrained(tmp_path / "adapter")
    again = model(base)
    again[0].model = PeftModel.from_pretrained(again[0].model, tmp_path / "adapter")
    assert torch.equal(vectors(again), tuned)
    again[0].model = again[0].model.merge_and_unload()
    torch.testing.assert_close(vectors(again), tuned, rtol=1e-4, atol=1e-5)
    again.save_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(vectors(model(str(tmp_path / "merged"))), tuned, rtol=1e-4, atol=1e-5)


def test_a_cross_encoder_keeps_its_head(tmp_path):
    seeded(BertForSequenceClassification, bert_config(initializer_range=0.3, num_labels=1)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    one = CrossEncoder(str(tmp_path), device="cpu", num_labels=1)
    pairs = list(zip(*PAIRS.values(), strict=True))[:4]
    before = one.predict(pairs, convert_to_tensor=True)
    one.add_adapter(lora(task_type=TaskType.SEQ_CLS, modules_to_save=["classifier"]))
    head = one.model.classifier
    assert isinstance(head, ModulesToSaveWrapper)
    data = datasets.Dataset.from_dict({"a": TEXTS, "b": TEXTS[::-1], "label": [1.0, 0.0, 1.0, 0.0]})
    settings = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "learning_rate": 0.05, "report_to": "none"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    original = head.original_module.weight.clone()
    CrossEncoderTrainer(model=one, args=CrossEncoderTrainingArguments(**settings), train_dataset=data).train()
    assert torch.equal(head.original_module.weight, original)
    assert not torch.equal(head.modules_to_save["default"].weight, original)
    tuned = one.predict(pairs, convert_to_tensor=True)
    assert differ(tuned, before)
    one.set_keep_in_fp32_modules(["0.model.classifier"])
    assert type(head.modules_to_save["default"]) is type(head.original_module) is not nn.Linear
    assert torch.equal(one.predict(pairs, convert_to_tensor=True), tuned)
    one.save_pretrained(str(tmp_path / "saved"))
    again = CrossEncoder(str(tmp_path / "saved"), device="cpu", num_labels=1)
    assert torch.equal(again.predict(pairs, convert_to_tensor=True), tuned)
    one.disable_adapters()
    assert torch.equal(one.predict(pairs, convert_to_tensor=True), before)


def test_models_with_adapters_are_not_averaged(base):
    merging = pytest.importorskip("sentence_transformers.base.merging")
    one, two = model(base), model(base)
    one.add_adapter(lora())
    assert moved(one[0].auto_model).peft_config
    with pytest.raises(ValueError, match="Merging models with PEFT adapters is not supported"):
        merging._validate_models([one, two])
