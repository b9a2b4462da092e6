"""`Trainer` with adapters: what it saves, finds again, keeps and evaluates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model

from . import tiny
from .tiny import TARGETS, bert_config, llama, moved, same, seeded, tensors, trainable

transformers = pytest.importorskip("transformers", "4.57")

ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
TRAINER = {"training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


class Lines(torch.utils.data.Dataset):
    """Random token numbers to be continued, or to be told apart (`classes`)."""

    def __init__(self, count: int = 16, classes: int | None = None):
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(3, tiny.VOCABULARY, (count, 6), generator=generator)
        labels = ids if classes is None else torch.arange(count) % classes
        self.rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def arguments(folder: Path, **changes: Any) -> Any:
    """Six steps with momentum and a schedule, so that every kind of state matters when training goes on."""
    settings = {
        "max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "warmup_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**settings, **changes})


def trainer_of(model: nn.Module, folder: Path, data: Any = None, **changes: Any) -> Any:
    own = {k: changes.pop(k) for k in ("callbacks", "compute_metrics", "eval_dataset") if k in changes}
    data = Lines() if data is None else data
    return transformers.Trainer(model, arguments(folder, **changes), train_dataset=data, **own)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_and_the_trainer_s_state_alone(tmp_path):
    model = get_peft_model(llama(), config())
    trainer_of(model, tmp_path).train()
    for step in (3, 6):
        assert names(tmp_path / f"checkpoint-{step}") == ADAPTER | TRAINER
    saved = tensors(tmp_path / "checkpoint-6")
    assert saved and all("lora_" in key for key in saved)
    assert same(saved, peft.get_peft_model_state_dict(model))
    assert not same(saved, tensors(tmp_path / "checkpoint-3"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-6")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model.eval()))


CONFIGS = {
    "lora": config(lora_dropout=0.3),
    "dora": config(use_dora=True),
    "head": config(modules_to_save=["lm_head"]),
    "tokens": config(trainable_token_indices=[3, 5]),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix_projection": peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_training_that_goes_on_from_a_checkpoint_is_equal_to_the_bit(method, tmp_path):
    whole = get_peft_model(llama(), CONFIGS[method])
    first = trainer_of(whole, tmp_path)
    first.train()

    torch.manual_seed(9)
    halved = get_peft_model(llama(), CONFIGS[method])
    second = trainer_of(halved, tmp_path)
    parameters = {name: id(p) for name, p in halved.named_parameters()}
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert {name: id(p) for name, p in halved.named_parameters()} == parameters  # the optimizer holds them
    assert same(trainable(halved), trainable(whole))
    assert losses(second) == losses(first)


def test_training_with_adalora_goes_on_after_ranks_were_cut(tmp_path):
    settings = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=TARGETS, init_r=6, target_r=2, tinit=1, tfinal=2, total_step=6
    )
    first = get_peft_model(llama(), settings)
    trainer_of(first, tmp_path, save_steps=4).train()
    folder = tmp_path / "checkpoint-4"
    half = peft.PeftConfig.from_pretrained(folder).rank_pattern
    torch.manual_seed(9)
    model = get_peft_model(llama(), dataclasses.replace(settings, rank_pattern=None))
    trainer_of(model, tmp_path / "more", max_steps=4).train(resume_from_checkpoint=str(folder))  # the weights alone
    loaded = PeftModel.from_pretrained(llama(), folder)
    torch.testing.assert_close(tiny.logits(model.eval()), tiny.logits(loaded))

    trainer_of(model, tmp_path / "more", max_steps=6).train(resume_from_checkpoint=str(folder))
    budget = model.base_model.rankallocator
    assert budget.steps == 6 and model.peft_config["default"].rank_pattern == half  # none is cut after step 4
    assert sum(int((p.lora_E != 0).sum()) for p in budget.adapters) == 2 * len(budget.adapters)


def test_the_best_checkpoint_of_adalora_comes_back_at_the_end(tmp_path):
    settings = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=TARGETS, init_r=6, target_r=2, tinit=1, tfinal=1, total_step=6
    )
    model = get_peft_model(llama(), settings)
    best = trainer_of(
        model, tmp_path, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
        eval_dataset=Lines(), metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    best.train()
    folder = best.state.best_model_checkpoint
    loaded = PeftModel.from_pretrained(llama(), folder)
    torch.testing.assert_close(tiny.logits(model.eval()), tiny.logits(loaded))
    model.save_pretrained(tmp_path / "end")
    assert same(tensors(tmp_path / "end"), tensors(Path(folder)))


def test_the_newest_checkpoint_is_found_by_itself(tmp_path):
    trainer_of(get_peft_model(llama(), config()), tmp_path, max_steps=3).train()
    model = get_peft_model(llama(), config())
    trainer = trainer_of(model, tmp_path)
    with tiny.calls(model, "load_adapter") as loads:
        trainer.train(resume_from_checkpoint=True)
    assert loads == [((str(tmp_path / "checkpoint-3"), "default"), {"is_trainable": True})]
    assert trainer.state.global_step == 6
    assert names(tmp_path) >= {"checkpoint-3", "checkpoint-6"}


def test_several_adapters_lie_in_folders_of_their_names_and_all_come_back(tmp_path):
    def two(seed: int) -> PeftModel:
        model = get_peft_model(llama(), config())
        model.add_adapter("other", config(r=3))
        model.set_requires_grad("other")
        moved(model, seed)
        model.set_adapter("other")
        return model

    model = two(1)
    trainer_of(model, tmp_path, max_steps=3).train()
    folder = tmp_path / "checkpoint-3"
    assert names(folder) == ADAPTER | TRAINER | {"other"}
    assert names(folder / "other") >= {"adapter_model.safetensors", "adapter_config.json"}
    again = two(2)
    trainer_of(again, tmp_path, max_steps=3).train(resume_from_checkpoint=str(folder))
    old = transformers.__version__.startswith("4.")  # which forgets the one that lies in the folder itself
    for name in ("other",) if old else ("default", "other"):
        a, b = (peft.get_peft_model_state_dict(m, adapter_name=name) for m in (model, again))
        assert same(a, b)
    assert again.active_adapters == ["other"]
    assert all(".other." in name for name in trainable(again))


@pytest.mark.parametrize("method", CONFIGS)
def test_the_best_model_is_there_at_the_end(method, tmp_path):
    model = get_peft_model(llama(), CONFIGS[method])
    trainer = trainer_of(
        model, tmp_path, eval_dataset=Lines(4), eval_strategy="steps", eval_steps=3, learning_rate=2.0,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = tmp_path / f"checkpoint-{3 * (1 + evaluated.index(min(evaluated)))}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated))
    fresh = PeftModel.from_pretrained(llama(), best)
    assert torch.equal(tiny.logits(fresh), tiny.logits(model.eval()))


def test_a_callback_may_save_the_adapter_too(tmp_path):
    class Saver(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].save_pretrained(Path(args.output_dir) / f"own-{state.global_step}")

    trainer_of(get_peft_model(llama(), config()), tmp_path, callbacks=[Saver()]).train()
    for step in (3, 6):
        assert same(tensors(tmp_path / f"own-{step}"), tensors(tmp_path / f"checkpoint-{step}"))


def test_save_model_and_an_older_format_of_files(tmp_path):
    model = get_peft_model(llama(), config())
    trainer = trainer_of(model, tmp_path)
    trainer.save_model(str(tmp_path / "end"))
    assert names(tmp_path / "end") == ADAPTER | {"training_args.bin"}
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / "adapter_model.bin").exists()
    again = get_peft_model(llama(), config())
    with pytest.warns(peft.PeftWarning, match="is a pickle"):
        trainer_of(moved(again), tmp_path)._load_from_checkpoint(str(tmp_path / "bin"))
    assert same(peft.get_peft_model_state_dict(again), tensors(tmp_path / "end"))


def test_a_model_that_transformers_adapted_itself_is_trained_and_saved_as_an_adapter(tmp_path):
    model = llama()
    model.add_adapter(config())
    trainer_of(model, tmp_path, max_steps=3).train()
    assert names(tmp_path / "checkpoint-3") == (ADAPTER - {"README.md"}) | TRAINER | {"generation_config.json"}
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-3")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model.eval()))


def test_a_mixed_model_is_known_as_one_of_ours(tmp_path):
    from transformers.trainer import _is_peft_model

    model = PeftMixedModel(llama(), config(task_type=None), "default")
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    assert _is_peft_model(model)
    assert not _is_peft_model(llama())
    before = trainable(model)
    assert any(".default" in n for n in before) and any(".other" in n for n in before)
    trainer_of(model, tmp_path, save_strategy="no", max_steps=3).train()
    after = trainable(model)
    assert all(not torch.equal(p, before[n]) for n, p in after.items() if "lora_B" in n or "hada_w2" in n)


# ---- what the trainer asks of the model ----------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "found"), [("SequenceClassification", ["labels"]), ("QuestionAnswering", None)])
def test_names_of_labels_and_columns_are_those_of_the_base_model(head, found, tmp_path):
    base = seeded(getattr(transformers, f"BertFor{head}"), bert_config())
    task = {"SequenceClassification": "SEQ_CLS", "QuestionAnswering": "QUESTION_ANS"}[head]
    model = get_peft_model(base, LoraConfig(r=2, task_type=task))
    trainer = trainer_of(model, tmp_path)
    assert trainer.label_names == (found or ["start_positions", "end_positions"])
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "token_type_ids", *trainer.label_names} <= set(trainer._signature_columns)


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"input_ids": [[3, 4, 5]] * 8, "labels": [[3, 4, 5]] * 8, "text": ["w3 w4 w5"] * 8}
    trainer = trainer_of(get_peft_model(llama(), config()), tmp_path, datasets.Dataset.from_dict(rows))
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "labels"}


def test_evaluation_and_prediction_give_the_metrics_of_the_model(tmp_path):
    base = seeded(transformers.BertForSequenceClassification, bert_config())
    model = moved(get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS")))
    data = Lines(6, classes=2)

    def accuracy(pair: Any) -> dict[str, float]:
        return {"accuracy": float((pair.predictions.argmax(-1) == pair.label_ids).mean())}

    trainer = trainer_of(model, tmp_path, data, eval_dataset=data, compute_metrics=accuracy)
    ids, labels = (torch.stack([row[key] for row in data.rows]) for key in ("input_ids", "labels"))
    expected = tiny.logits(model, ids)
    result = trainer.evaluate()
    assert result["eval_accuracy"] == float((expected.argmax(-1) == labels).float().mean())
    assert result["eval_loss"] == pytest.approx(float(nn.functional.cross_entropy(expected, labels)), rel=1e-5)
    torch.testing.assert_close(torch.from_numpy(trainer.predict(data).predictions), expected)


def test_only_the_adapter_s_parameters_are_handed_to_the_optimizer(tmp_path):
    model = get_peft_model(llama(), config())
    trainer = trainer_of(model, tmp_path, optim="adamw_torch")
    trainer.create_optimizer()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_noise_on_embeddings_is_put_on_the_base_model_s_and_taken_off_again(tmp_path):
    found = []
    for alpha in (None, 5.0):
        model = get_peft_model(llama(), config())
        embedding = model.get_base_model().get_input_embeddings()
        hooks = len(embedding._forward_hooks)
        trainer = trainer_of(model, tmp_path, max_steps=2, neftune_noise_alpha=alpha, save_strategy="no")
        trainer.train()
        found.append(losses(trainer))
        assert len(embedding._forward_hooks) == hooks
    assert found[0] != found[1]


def test_a_model_is_unwrapped_for_what_patches_base_models():
    utils = pytest.importorskip("transformers.trainer_utils")
    if not hasattr(utils, "unwrap_peft_model"):
        pytest.skip("this transformers unwraps by itself")
    base = llama()
    assert utils.unwrap_peft_model(get_peft_model(base, config())) is base
    other = llama()
    assert utils.unwrap_peft_model(PeftMixedModel(other, config(task_type=None), "default")) is other


def test_a_quantised_base_model_may_be_trained_under_an_adapter_only(tmp_path):
    base = llama()
    base.is_quantized, base.hf_quantizer = True, MagicMock(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(base, tmp_path)
    model = get_peft_model(base, config())
    assert model.is_quantized and model.hf_quantizer is base.hf_quantizer
    trainer_of(model, tmp_path)
    base.hf_quantizer.is_trainable = False
    with pytest.raises(ValueError, match="not support training"):
        trainer_of(model, tmp_path)


def test_a_tracker_receives_the_configurations(tmp_path):
    from transformers.integrations import integration_utils

    tracker = MagicMock(config={})
    callback = object.__new__(integration_utils.SwanLabCallback)
    callback.__dict__.update(_initialized=False, _swanlab=tracker, _log_model=None)
    model = PeftModel(llama(), config(task_type=None))
    callback.setup(arguments(tmp_path), transformers.TrainerState(is_world_process_zero=True), model)
    given = tracker.config["peft_config"]["default"]
    assert given is model.peft_config["default"]
    assert json.loads(json.dumps(given.to_dict(), default=sorted))["r"] == 2
    trainable_count, count = model.get_nb_trainable_parameters()
    assert tracker.config["peft_model_trainable_params"] == trainable_count
    assert tracker.config["peft_model_all_param"] == count


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("way", ["PeftModel", "bare", "PeftModel, asked before"])
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_gradient_checkpointing_changes_no_gradient(way, reentrant, tmp_path):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, kwargs = llama(), {"use_reentrant": reentrant}
        if checkpointing and way == "PeftModel, asked before":
            model.gradient_checkpointing_enable(kwargs)
        if way == "bare":
            model.add_adapter(config())
        else:
            model = get_peft_model(model, config())
        again = checkpointing and way != "PeftModel, asked before"
        options = {"gradient_checkpointing": again, "gradient_checkpointing_kwargs": kwargs if again else None}
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
        passes = []
        layer.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        trainer_of(model, tmp_path, save_strategy="no", **options).train()
        results.append((trainable(model), len(passes)))
    (plain, once), (other, twice) = results
    assert twice == 2 * once  # the pass was made again for each backward pass
    assert plain.keys() == other.keys()
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], msg=lambda text, name=name: f"{name}: {text}")
