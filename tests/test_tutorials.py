"""The programs that users start from, and what other libraries do with a model that has adapters."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import peft
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

# ---- a layer, a sequence, a small network ----------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["linear"], "all-linear"])
def test_a_single_linear_layer_is_a_model(targets, tmp_path):
    base = nn.Linear(100, 200)
    x = torch.randn(3, 100)
    want = base(x)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=targets))
    assert model.get_nb_trainable_parameters() == (8 * (100 + 200), 8 * (100 + 200) + 200 * 100 + 200)
    assert torch.equal(model(x), want)
    with torch.no_grad():
        model.get_base_model().lora_B["default"].weight.normal_()
    adapted = model(x)
    assert not torch.allclose(adapted, want)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), adapted)
    merged = again.merge_and_unload()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), adapted, rtol=1e-5, atol=1e-5)
    plain = model.unload()
    assert plain is base and torch.equal(plain(x), want)


def test_a_sequence_is_targeted_by_its_indices():
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    assert [s.name for s in get_layer_status(model)] == ["model.0", "model.2"]
    assert type(base[1]) is nn.ReLU
    text = repr(model)
    for line in (
        "(base_model): LoraModel(",
        "(0): lora.Linear(",
        "(base_layer): Linear(in_features=4, out_features=8, bias=True)",
        "(lora_dropout): ModuleDict(",
        "(lora_A): ModuleDict(",
        "(default): Linear(in_features=4, out_features=2, bias=False)",
    ):
        assert line in text, line


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(20, 32)
        self.fc2 = nn.Linear(32, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def mlp():
    torch.manual_seed(0)
    return MLP()


@pytest.mark.parametrize(("targets", "count"), [(["fc1"], 8 * 52), (["fc1", "fc2"], 8 * 52 + 8 * 64)])
def test_a_network_is_adapted_in_one_or_both_layers(targets, count, capsys):
    model = get_peft_model(mlp(), LoraConfig(r=8, target_modules=targets))
    everything = 20 * 32 + 32 + 32 * 32 + 32 + 64 + 2 + count
    assert model.get_nb_trainable_parameters() == (count, everything)
    model.print_trainable_parameters()
    assert f"trainable params: {count:,} || all params: {everything:,} ||" in capsys.readouterr().out


def test_layers_have_settings_of_their_own_that_are_saved(tmp_path):
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["fc1", "fc2", "head"],
        rank_pattern={"fc1": 2},
        alpha_pattern={"fc2": 4},
        module_config={"head": {"use_dora": True, "lora_dropout": 0.5, "r": 3}},
        init_lora_weights=False,
    )
    model = get_peft_model(mlp(), config).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path)
    x = torch.randn(5, 20)
    assert torch.equal(again(x), model(x))
    for m in (model, again):
        fc1, fc2, head = (getattr(m.get_base_model(), n) for n in ("fc1", "fc2", "head"))
        assert [(layer.r["default"], layer.scaling["default"]) for layer in (fc1, fc2, head)] == [
            (2, 8.0),
            (8, 0.5),
            (3, 16 / 3),
        ]
        assert [layer.use_dora["default"] for layer in (fc1, fc2, head)] == [False, False, True]
        assert head.lora_dropout["default"].p == 0.5 and type(fc1.lora_dropout["default"]) is nn.Identity
        assert "default" in head.lora_magnitude_vector and not fc1.lora_magnitude_vector


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    x = torch.rand(200, 20)
    y = (x.sum(1) > 10).long()
    model = get_peft_model(mlp(), LoraConfig(r=8, target_modules=["fc1", "fc2"], modules_to_save=["head"]))
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    with model.disable_adapter():
        assert torch.equal(model(x), mlp()(x))


class Dummy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.linear = nn.Linear(10, 10)
        self.lm_head = nn.Linear(10, 10)

    def forward(self, input_ids):
        return self.lm_head(self.linear(self.embedding(input_ids)))


def dummy():
    torch.manual_seed(0)
    return Dummy()


DUMMY = {"lora_alpha": 16, "lora_dropout": 0.1, "r": 64, "bias": "none", "init_lora_weights": False}


def test_adapters_are_injected_into_a_plain_model_and_loaded_from_the_meta_device():
    targets = ["embedding", "linear", "lm_head"]
    model = inject_adapter_in_model(LoraConfig(**DUMMY, target_modules=targets), dummy())
    assert type(model) is Dummy and isinstance(model.linear, LoraLayer)
    state = get_peft_model_state_dict(model)
    assert set(state) == {
        "embedding.lora_embedding_A",
        "embedding.lora_embedding_B",
        *(f"{layer}.lora_{x}.weight" for layer in ("linear", "lm_head") for x in "AB"),
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }

    fresh = inject_adapter_in_model(LoraConfig(**DUMMY, target_modules=targets), dummy(), low_cpu_mem_usage=True)
    assert fresh.linear.lora_A["default"].weight.is_meta and not fresh.linear.weight.is_meta
    set_peft_model_state_dict(fresh, state, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in fresh.parameters())
    tokens = torch.arange(10)[None]
    model.eval(), fresh.eval()
    assert torch.equal(fresh(tokens), model(tokens)) and not torch.equal(model(tokens), dummy()(tokens))


# ---- models as large as they are, without their weights --------------------------------------------------------------


def on_meta(kind, **sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(config)


def test_the_counts_of_llama_2_7b_are_those_of_the_tutorials(capsys):
    base = on_meta("Llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    assert model.get_nb_trainable_parameters() == (4_194_304, 6_742_609_920)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622\n"


def test_the_shape_of_qwen2_half_a_billion_has_default_targets():
    base = on_meta(
        "Qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8))
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert model.get_nb_trainable_parameters() == (540_672, 494_032_768 + 540_672)
    assert all(p.is_meta for p in model.parameters())
    assert model.base_model.model.lm_head.weight is model.base_model.model.model.embed_tokens.weight


# ---- transformers ----------------------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 5, 7, 9], [2, 4, 6, 8]])


def llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, **options)
    return transformers.LlamaForCausalLM(config).eval()


def lora(**changes):
    return LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"], **changes})


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_a_transformers_model_manages_adapters_itself(tmp_path):
    model = llama()
    base = logits(model)
    model.add_adapter(lora(), adapter_name="one")
    model.add_adapter(lora(r=2), adapter_name="two")
    assert model.active_adapters() == ["two"] and type(model).__name__ == "LlamaForCausalLM"
    two = logits(model)
    model.set_adapter("one")
    one = logits(model)
    model.set_adapter(["one", "two"])
    both = logits(model)
    assert model.active_adapters() == ["one", "two"]
    outputs = [base, one, two, both]
    assert not any(torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outputs) for b in outputs[:i])
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), both)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(lora(), adapter_name="one")
    model.set_adapter("one")
    state = model.get_adapter_state_dict("one")
    assert set(state) == {k.removeprefix("base_model.model.") for k in saved_keys()}
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == {"q_proj", "v_proj"}
    with pytest.warns(UserWarning, match="Setting active adapter to 'two'"):
        model.delete_adapter("one")
    assert set(model.peft_config) == {"two"} and model.active_adapters() == ["two"]
    assert torch.equal(logits(model), two)

    again = llama()
    again.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(logits(again), one)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), one)


def saved_keys():
    return get_peft_model_state_dict(get_peft_model(llama(), lora()))


def test_an_auto_class_loads_the_base_and_its_adapter(tmp_path):
    transformers = pytest.importorskip("transformers")
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model))


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = (torch.arange(6) * 3 + i) % 31 + 1
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, steps, held_out=None, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=1,
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Tokens(), eval_dataset=held_out)


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_saves_and_resumes(checkpointing, tmp_path, capsys):
    options = {"gradient_checkpointing": checkpointing}
    if checkpointing:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}

    def fresh():
        return get_peft_model(llama(use_cache=False), LoraConfig(r=4, task_type="CAUSAL_LM"))

    whole = fresh()
    job = trainer(whole, tmp_path / "whole", 5, **options)
    job.train()
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    assert len(losses) == 5 and losses[-1] < losses[0]

    first = trainer(fresh(), tmp_path / "parts", 3, **options)
    first.train()
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= {
        p.name for p in checkpoint.iterdir()
    }
    assert "model.safetensors" not in {p.name for p in checkpoint.iterdir()}

    model = fresh()
    trainer(model, tmp_path / "parts", 5, **options).train(resume_from_checkpoint=str(checkpoint))
    for name, value in trained(model).items():
        torch.testing.assert_close(value, trained(whole)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_trainer_goes_back_to_the_best_checkpoint(tmp_path, capsys):
    model = get_peft_model(llama(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    job = trainer(model, tmp_path, 6, Tokens(), **options)
    job.train()
    best = peft.load_peft_weights(job.state.best_model_checkpoint)
    now = get_peft_model_state_dict(model)
    assert best.keys() == now.keys() and all(torch.equal(best[k], now[k]) for k in best)


def test_accelerate_prepares_unwraps_and_saves(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    before = trained(model)
    loss = wrapped(input_ids=IDS, labels=IDS).loss
    accelerator.backward(loss)
    optimizer.step()
    assert all(not torch.equal(v, before[n]) for n, v in trained(model).items())
    unwrapped = accelerator.unwrap_model(wrapped)
    assert unwrapped is model
    unwrapped.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(wrapped))
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))
    from accelerate.utils.modeling import is_peft_model

    assert is_peft_model(wrapped) and not is_peft_model(llama())


@pytest.mark.parametrize("first", ["transformers.trainer_utils", "peft"])
def test_either_library_may_be_imported_first(first):
    pytest.importorskip("transformers")
    code = (
        f"import {first}; import peft, transformers.trainer_utils; from peft import PeftModel;"
        "import importlib.metadata as m; assert m.version('peft') == peft.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what TRL does ---------------------------------------------------------------------------------------------------


def test_a_reference_adapter_is_a_copy_of_the_first():
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM"))
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    want = logits(model)
    before = model.active_adapter
    model.set_adapter("ref")
    assert torch.equal(logits(model), want)
    model.set_adapter(before)
    assert model.active_adapter == "default" and not any(
        p.requires_grad for n, p in model.named_parameters() if ".ref." in n
    )
    state = get_peft_model_state_dict(model, adapter_name="default")
    set_peft_model_state_dict(model, {k: 2 * v for k, v in state.items()}, adapter_name="ref")
    assert torch.equal(logits(model), want)


def test_the_output_embedding_shows_that_it_is_adapted():
    model = get_peft_model(llama(), lora(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert isinstance(model.get_output_embeddings(), BaseTunerLayer)


def test_merged_weights_can_be_sent_elsewhere_under_the_models_own_names():
    """As for an inference server: merge, walk, strip the names, unmerge."""
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    want = logits(model)
    model.merge_adapter()
    sent = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix in name or "original_module" in name:
            continue
        sent[name.replace("modules_to_save.default.", "")] = parameter.data.clone()
    model.unmerge_adapter()
    server = llama()
    assert server.load_state_dict(sent).missing_keys == []
    torch.testing.assert_close(logits(server), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), want)


# ---- what diffusers does ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.to_q = nn.Linear(4, 4)

    def forward(self, x):
        return self.to_q(self.conv(x).flatten(2).mT)


def block():
    torch.manual_seed(0)
    return Block().eval()


IMAGE = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)


def injected(name="default_0", **changes):
    return inject_adapter_in_model(lora(target_modules=["conv", "to_q"], **changes), block(), name)


@pytest.mark.parametrize("meta", [False, True])
def test_the_keys_of_a_state_dict_say_what_is_adapted(meta):
    want = injected()
    state = {k: v for k, v in get_peft_model_state_dict(want, adapter_name="default_0").items() if "conv" in k}
    model = block()
    config = lora(target_modules=["conv"])
    inject_adapter_in_model(config, model, "default_0", state_dict=state, low_cpu_mem_usage=meta)
    result = set_peft_model_state_dict(model, state, "default_0", low_cpu_mem_usage=meta)
    assert not result.unexpected_keys
    assert isinstance(model.conv, LoraLayer) and type(model.to_q) is nn.Linear
    assert torch.equal(model.conv(IMAGE), want.conv(IMAGE))


def test_scales_are_relative_or_multiply():
    model = inject_adapter_in_model(lora(target_modules=["to_q"], r=2), injected(use_rslora=True), "default_1")
    layer = model.to_q
    first, second = 8 / 4**0.5, 8 / 2
    assert dict(layer.scaling.items()) == {"default_0": first, "default_1": second} and len(layer.r) == 2
    layer.set_scale("default_0", 0.5)
    layer.set_scale("default_0", 0.25)
    model.conv.set_scale("default_1", 3.0)  # it has no such adapter
    assert layer.scaling["default_0"] == 0.25 * first
    layer.set_adapter(["default_0", "default_1"])
    layer.scale_layer(2.0)
    layer.scale_layer(3.0)
    assert [layer.scaling[n] for n in layer.active_adapters] == [6 * 0.25 * first, 6 * second]
    layer.unscale_layer(6.0)
    assert [layer.scaling[n] for n in layer.active_adapters] == [0.25 * first, second]
    layer.unscale_layer()
    assert [layer.scaling[n] for n in layer.active_adapters] == [first, second]


def test_a_scale_scales_what_the_adapter_adds():
    model, x = injected(), torch.randn(2, 4)
    base, whole = block().to_q(x), model.to_q(x)
    model.to_q.set_scale("default_0", 0.5)
    torch.testing.assert_close(model.to_q(x), (base + whole) / 2, rtol=1e-5, atol=1e-6)
    model.to_q.merge()
    torch.testing.assert_close(model.to_q(x), (base + whole) / 2, rtol=1e-5, atol=1e-6)


def test_layers_are_fused_one_by_one_and_unloaded():
    model = injected()
    want, plain = model(IMAGE), block()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            assert "adapter_names" in inspect.signature(module.merge).parameters
            module.merge(safe_merge=True, adapter_names=["default_0"])
            assert module.merged and module.merged_adapters == ["default_0"]
    torch.testing.assert_close(model(IMAGE), want, rtol=1e-5, atol=1e-6)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.unmerge()
    assert torch.equal(model(IMAGE), want)
    for name in ("conv", "to_q"):
        setattr(model, name, getattr(model, name).get_base_layer())
    del model.peft_config
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(IMAGE), plain(IMAGE))  # another memory, perhaps another of the kernels


def test_a_failed_load_is_undone_layer_by_layer():
    model = injected()
    want = model(IMAGE)
    inject_adapter_in_model(lora(target_modules=["to_q"]), model, "broken")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            assert module.active_adapters == ["broken"]
            with pytest.warns(UserWarning, match="'broken' was active and is deleted. Setting.*'default_0'"):
                module.delete_adapter("broken")
    model.peft_config.pop("broken")
    assert torch.equal(model(IMAGE), want) and not any("broken" in n for n, _ in model.named_parameters())


def test_the_configuration_of_an_injected_adapter_can_be_written_as_json():
    values = injected().peft_config["default_0"].to_dict()
    sets = {k for k, v in values.items() if isinstance(v, set)}
    text = json.dumps({k: sorted(v) if k in sets else v for k, v in values.items()})
    assert json.loads(text)["peft_type"] == "LORA" and json.loads(text)["target_modules"] == ["conv", "to_q"]
    assert {"lora_A", "lora_B", "lora_magnitude_vector"} <= set(LoraLayer.adapter_layer_names)
