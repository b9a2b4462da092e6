"""Auto classes that are given an adapter's folder, and pipelines over adapted models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import peft
from peft import LoraConfig, PeftModel, get_peft_model

from .tiny import IDS, TARGETS, bert_config, logits, moved, seeded, tensors, tokenizer

transformers = pytest.importorskip("transformers", "4.57")

TASKS = {
    "SEQ_CLS": ("SequenceClassification", "text-classification"),
    "TOKEN_CLS": ("TokenClassification", "token-classification"),
    "QUESTION_ANS": ("QuestionAnswering", "question-answering"),
}


def adapted(folder: Path, **changes: Any) -> PeftModel:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes}
    return moved(get_peft_model(base, LoraConfig(**settings)))


def bert_folder(task: str, path: Path) -> Path:
    seeded(getattr(transformers, f"BertFor{TASKS[task][0]}"), bert_config()).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


# ---- auto classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel"])
def test_an_adapter_s_folder_gives_the_adapted_model(kind, llama_folder, tmp_path):
    if kind == "AutoModel":  # adapters of a model without a head
        base = transformers.AutoModel.from_pretrained(llama_folder).eval()
        model = moved(get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS)))
    else:
        model = adapted(llama_folder)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llama_folder)
    there = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    assert not isinstance(there, PeftModel) and list(there.peft_config) == ["default"]
    answers = [m(input_ids=IDS)[0] for m in (there, model)]
    assert torch.equal(*answers)
    there.disable_adapters()
    assert not torch.equal(there(input_ids=IDS)[0], answers[0])


def test_an_adapter_of_another_method_and_one_with_a_head(llama_folder, tmp_path):
    for number, config in enumerate((
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"], trainable_token_indices=[3, 4]),
        LoraConfig(r=2, target_modules=TARGETS, use_dora=True, use_rslora=True, rank_pattern={"v_proj": 3}),
    )):  # fmt: skip
        base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder).eval()
        model = moved(get_peft_model(base, config))
        model.save_pretrained(tmp_path / str(number))
        there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).eval()
        torch.testing.assert_close(logits(there), logits(model))


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="new in transformers 5")
def test_a_folder_that_holds_a_model_and_an_adapter_reads_its_own_model(llama_folder, tmp_path):
    model = adapted(llama_folder)
    model.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert list(there.peft_config) == ["default"]
    torch.testing.assert_close(logits(there), 2 * logits(model))


def test_the_dtype_and_the_place_are_asked_of_the_base_model(llama_folder, tmp_path):
    adapted(llama_folder).save_pretrained(tmp_path)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert there.dtype == torch.bfloat16
    assert torch.isfinite(logits(there)).all()
    placed = transformers.AutoModelForCausalLM.from_pretrained(llama_folder, device_map={"": "cpu"})
    placed.load_adapter(str(tmp_path))
    assert torch.equal(logits(placed), logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)))


@pytest.mark.parametrize("task", TASKS)
def test_heads_of_tasks_come_with_the_adapter(task, tmp_path):
    folder = bert_folder(task, tmp_path / "base")
    kind = getattr(transformers, f"AutoModelFor{TASKS[task][0]}")
    model = moved(get_peft_model(kind.from_pretrained(folder).eval(), LoraConfig(r=2, task_type=task)))
    model.save_pretrained(tmp_path / "adapter")
    assert any("classifier" in key or "qa_outputs" in key for key in tensors(tmp_path / "adapter"))
    there = kind.from_pretrained(tmp_path / "adapter").eval()
    for a, b in zip(there(input_ids=IDS).to_tuple(), model(input_ids=IDS).to_tuple(), strict=True):
        torch.testing.assert_close(a, b)
    ours = getattr(peft, f"AutoPeftModelFor{TASKS[task][0]}").from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(ours(input_ids=IDS)[0], model(input_ids=IDS)[0])


# ---- pipelines -----------------------------------------------------------------------------------------------------


@pytest.fixture
def said():
    """What transformers warns of: a pipeline over a class that it does not know says so."""
    records, logger = [], logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    yield lambda: [r.getMessage() for r in records if "is not supported" in r.getMessage()]
    logger.removeHandler(handler)


def test_a_class_that_a_pipeline_does_not_know_is_warned_of(said):
    class Unknown(transformers.BertModel):
        pass

    transformers.pipeline("text-classification", model=seeded(Unknown, bert_config()), tokenizer=tokenizer())
    assert len(said()) == 1


def test_a_pipeline_generates_text(llama_folder, tmp_path, said):
    model = adapted(llama_folder)
    words = "w3 w4 w5"
    merged = adapted(llama_folder).merge_and_unload()
    options = {"max_new_tokens": 5, "do_sample": False}
    ours = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())
    plain = transformers.pipeline("text-generation", model=merged, tokenizer=tokenizer())
    expected = plain(words, **options)
    assert ours(words, **options) == expected
    assert not said()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    by_name = transformers.pipeline("text-generation", model=str(tmp_path))
    assert list(by_name.model.peft_config) == ["default"]
    assert by_name(words, **options) == expected


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_pipeline_classifies(task, tmp_path, said):
    head, name = TASKS[task]
    base = seeded(getattr(transformers, f"BertFor{head}"), bert_config())
    model = moved(get_peft_model(base, LoraConfig(r=2, task_type=task)))
    assert type(model).__name__ == f"PeftModelFor{head}"
    found = transformers.pipeline(name, model=model, tokenizer=tokenizer())("w3 w4 w5")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[3, 4, 5]])).logits.softmax(-1).reshape(-1, 2).max(-1)
    assert [row["score"] for row in found] == pytest.approx(expected.values.tolist(), rel=1e-4)
    label = "label" if task == "SEQ_CLS" else "entity"
    assert [row[label] for row in found] == [base.config.id2label[int(i)] for i in expected.indices]
    assert not said()


def test_a_pipeline_gives_features(said):
    base = seeded(transformers.BertModel, bert_config())
    for task in ("FEATURE_EXTRACTION", None):
        config = LoraConfig(r=2, target_modules=["query", "value"], task_type=task)
        model = moved(get_peft_model(seeded(transformers.BertModel, bert_config()), config))
        found = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer())("w3 w4 w5")
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state
        torch.testing.assert_close(torch.tensor(found), expected)
        assert not torch.equal(expected, base(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state)
    assert not said()


NAMES = {
    "document-question-answering": ["PeftModelForQuestionAnswering"],
    "feature-extraction": ["PeftModelForFeatureExtraction", "PeftModel"],
    "text-classification": ["PeftModelForSequenceClassification"],
    "text-generation": ["PeftModelForCausalLM"],
    "token-classification": ["PeftModelForTokenClassification"],
}


def test_the_names_of_classes_that_pipelines_compare_are_ours():
    from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

    for task, wanted in NAMES.items():
        assert SUPPORTED_PEFT_TASKS[task] == wanted
    for name in {n for names in SUPPORTED_PEFT_TASKS.values() for n in names}:
        assert getattr(peft, name).__name__ == name and issubclass(getattr(peft, name), PeftModel)
