"""accelerate with adapters: training loops, states, and models of which parts lie elsewhere."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import onload_layer

from .tiny import IDS, TARGETS, VOCABULARY, llama, logits, moved, same, tensors, trainable

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers", "4.57")


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


def adapted(seed: int = 0, **changes: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(llama(), config(**changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter's folder."""
    moved(adapted()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


# ---- training ------------------------------------------------------------------------------------------------------


def loader() -> torch.utils.data.DataLoader:
    lines = torch.randint(3, VOCABULARY, (12, 6), generator=torch.Generator().manual_seed(2))
    return torch.utils.data.DataLoader(list(lines), batch_size=2)


class Run:
    """A model with what trains it, prepared by accelerate."""

    def __init__(self, model: nn.Module, **options: Any):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 6)
        made = self.accelerator.prepare(model, optimizer, loader(), scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = made

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for number, ids in enumerate(self.loader):
            if first <= number < last:
                with self.accelerator.accumulate(self.model):
                    loss = self.model(input_ids=ids, labels=ids).loss
                    self.accelerator.backward(loss)
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                losses.append(loss.item())
        return losses


def by_hand(model: nn.Module) -> list[float]:
    """The same loop without accelerate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 6)
    losses = []
    for ids in loader():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_prepared_model_trains_as_by_hand():
    run, plain = Run(adapted().train()), adapted().train()
    assert run.steps(0, 6) == by_hand(plain)
    assert same(trainable(run.accelerator.unwrap_model(run.model)), trainable(plain))


@pytest.mark.parametrize("options", [{"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}], ids=str)
def test_mixed_precision_and_accumulated_gradients_train_the_adapter_alone(options):
    model = adapted().train()
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = trainable(model)
    run = Run(model, **options)
    losses = run.steps(0, 6)
    assert losses[-1] < losses[0] or min(losses) < losses[0]
    after = trainable(model)
    assert all(p.dtype == torch.float32 and not torch.equal(p, before[n]) for n, p in after.items())
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in base.items())


@pytest.mark.parametrize(
    "own",
    [config(lora_dropout=0.2), config(modules_to_save=["lm_head"]), peft.PromptTuningConfig(
        num_virtual_tokens=2, task_type="CAUSAL_LM"
    )],
    ids=["lora", "head", "prompt"],
)  # fmt: skip
def test_a_saved_state_goes_on_equal_to_the_bit(own, tmp_path):
    def made(seed: int) -> PeftModel:
        torch.manual_seed(seed)
        return get_peft_model(llama(), copy.deepcopy(own)).train()

    whole = Run(made(0))
    whole.steps(0, 3)
    whole.accelerator.save_state(tmp_path)
    expected = whole.steps(3, 6)
    result = trainable(whole.model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    again = Run(made(7))
    again.accelerator.load_state(tmp_path)
    assert again.steps(3, 6) == expected
    assert same(trainable(again.model), result)


def test_a_model_is_unwrapped_known_and_saved():
    run = Run(adapted())
    model = run.accelerator.unwrap_model(run.model)
    assert isinstance(model, PeftModel) and model is run.accelerator.unwrap_model(nn.DataParallel(model))
    assert accelerate.utils.is_peft_model(run.model) and accelerate.utils.is_peft_model(nn.DataParallel(model))
    assert not accelerate.utils.is_peft_model(model.get_base_model())


def test_an_unwrapped_model_is_saved_as_users_do(tmp_path):
    run = Run(adapted().train())
    run.steps(0, 2)
    accelerator = run.accelerator
    accelerator.unwrap_model(run.model).save_pretrained(
        tmp_path, is_main_process=accelerator.is_main_process, save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(run.model),
    )  # fmt: skip
    assert all("lora_" in name for name in tensors(tmp_path))
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(accelerator.unwrap_model(run.model).eval()))


def test_hooks_of_saving_and_loading_may_keep_the_adapter_alone(tmp_path):
    run = Run(adapted().train())

    def save(models: list, weights: list, folder: str) -> None:
        for model in models:
            run.accelerator.unwrap_model(model).save_pretrained(folder)
            weights.pop()

    def load(models: list, folder: str) -> None:
        while models:
            run.accelerator.unwrap_model(models.pop()).load_adapter(folder, "default", is_trainable=True)

    run.accelerator.register_save_state_pre_hook(save)
    run.accelerator.register_load_state_pre_hook(load)
    run.steps(0, 3)
    run.accelerator.save_state(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    expected = run.steps(3, 6)
    run.accelerator.load_state(tmp_path)
    assert run.steps(3, 6) == expected


def test_sharded_models_are_asked_for_the_active_adapter_s_state():
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict

    model = moved(adapted())
    state = _get_model_state_dict(model, adapter_only=True)
    assert same(state, get_peft_model_state_dict(model, adapter_name="default"))
    other = adapted(5)
    _set_model_state_dict(other, state, adapter_only=True)
    assert torch.equal(logits(other.eval()), logits(model))


# ---- models of which parts lie elsewhere ---------------------------------------------------------------------------

DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip


def on_disk(llama_folder: Path, folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        llama_folder, device_map=DISK, offload_folder=str(folder)
    ).eval()


def test_an_adapter_joins_a_model_that_lies_partly_on_disk(llama_folder, saved, tmp_path):
    base = on_disk(llama_folder, tmp_path / "base")
    expected = logits(PeftModel.from_pretrained(llama(), saved))
    model = PeftModel.from_pretrained(base, saved, offload_folder=str(tmp_path / "more"))
    torch.testing.assert_close(logits(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()))
    model.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(saved))


def test_a_new_adapter_is_trained_over_a_model_that_lies_partly_on_disk(llama_folder, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(on_disk(llama_folder, tmp_path / "base"), config())
    plain = adapted()
    for m in (model, plain):
        m(input_ids=IDS, labels=IDS).loss.backward()
    there = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(there[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")


PLACES = ["a part on disk", "all on the CPU", "all on disk"]


def offloaded(place: str, llama_folder: Path, saved: Path, tmp_path: Path) -> PeftModel:
    if place == "a part on disk":
        return PeftModel.from_pretrained(on_disk(llama_folder, tmp_path / "base"), saved)
    model = PeftModel.from_pretrained(llama(), saved)
    if place == "all on the CPU":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return accelerate.disk_offload(model, str(tmp_path / "all"), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("place", PLACES)
def test_a_merge_reaches_weights_that_lie_elsewhere_and_is_taken_back(place, llama_folder, saved, tmp_path):
    expected = logits(PeftModel.from_pretrained(llama(), saved))
    model = offloaded(place, llama_folder, saved, tmp_path)
    before = logits(model)
    model.merge_adapter()
    assert all(layer.base_layer.weight.is_meta for layer in lora_layers(model, "layers.1."))
    torch.testing.assert_close(logits(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()))
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def lora_layers(model: nn.Module, part: str) -> list[Any]:
    return [m for n, m in model.named_modules() if part in n and isinstance(m, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("place", PLACES)
def test_a_merged_model_stays_where_it_was(place, llama_folder, saved, tmp_path):
    merged = offloaded(place, llama_folder, saved, tmp_path).merge_and_unload()
    assert isinstance(merged, transformers.LlamaForCausalLM)
    assert merged.model.layers[1].self_attn.q_proj.weight.is_meta
    torch.testing.assert_close(logits(merged), logits(PeftModel.from_pretrained(llama(), saved)))


@pytest.mark.parametrize("place", ["all on the CPU", "all on disk"])
def test_a_merge_that_fails_leaves_what_lies_elsewhere_as_it_was(place, llama_folder, saved, tmp_path):
    model = offloaded(place, llama_folder, saved, tmp_path)
    before = logits(model)
    layer = lora_layers(model, "layers.1.mlp")[0]
    with onload_layer(layer):
        layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter()
    with onload_layer(layer), torch.no_grad():
        good = tensors(saved)["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
        layer.lora_B["default"].weight.copy_(good)
    assert torch.equal(logits(model), before) and not layer.merged


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.filterwarnings("ignore:The weight of 'lm_head' is shared")
def test_a_tied_weight_elsewhere_is_not_changed_for_the_other_module(kind, tmp_path):
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True)
    model = moved(get_peft_model(base, config(target_modules=["lm_head"])), size=0.3)
    expected = logits(model)
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_a_whole_adapted_model_is_offloaded(kind, tmp_path):
    model = moved(adapted())
    expected = logits(model)
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in model.parameters())
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(model), expected)


def test_an_adapted_model_is_dispatched_and_its_map_kept(tmp_path):
    model = moved(adapted())
    expected = logits(model)
    places = {f"base_model.model.{name}": place for name, place in DISK.items()}
    placed = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert placed.hf_device_map == places and hasattr(placed, "_hf_hook")
    torch.testing.assert_close(logits(placed), expected)
    accelerate.hooks.remove_hook_from_submodules(placed)


def test_an_automatic_map_keeps_layers_whole():
    model = adapted()
    layer = model.base_model.model.model.layers[0]
    size = sum(p.numel() * p.element_size() for p in layer.parameters())
    sizes = accelerate.utils.compute_module_sizes(model)
    assert sizes["base_model.model.model.layers.0"] == size
    room = {0: sizes[""] - size // 2, "cpu": 10**9}
    names = model._no_split_modules
    assert "LlamaDecoderLayer" in names
    places = accelerate.infer_auto_device_map(model, max_memory=room, no_split_module_classes=list(names))
    assert {0, "cpu"} == set(places.values())
    for path, module in model.named_modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            parts = {place for name, place in places.items() if name.startswith(f"{path}.") or path.startswith(name)}
            assert len(parts) == 1 and not any(name.startswith(f"{path}.") for name in places)


def test_an_empty_model_is_filled_and_dispatched(llama_folder, saved, tmp_path):
    with accelerate.init_empty_weights():
        base = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(llama_folder)
        ).eval()
    base = accelerate.load_checkpoint_and_dispatch(
        base, str(llama_folder), device_map=dict(DISK), offload_folder=str(tmp_path / "base")
    )
    model = PeftModel.from_pretrained(base, saved)
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(llama(), saved)))


def test_an_empty_adapted_model_is_filled_from_one_checkpoint(tmp_path):
    model = moved(adapted())
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path))
    with accelerate.init_empty_weights():
        empty = get_peft_model(llama(), config())
    filled = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"}).eval()
    assert torch.equal(logits(filled), logits(model))


def test_hooks_around_a_layer_are_kept_when_it_is_adapted_and_unloaded():
    class Count(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
            self.calls += 1
            return args, kwargs

    base, hook = llama(), Count()
    layer = base.model.layers[0].self_attn.q_proj
    accelerate.hooks.add_hook_to_module(layer, hook)
    model = moved(get_peft_model(base, config()))
    logits(model)
    assert hook.calls == 1
    plain = model.merge_and_unload()
    logits(plain)
    assert hook.calls == 2 and plain.model.layers[0].self_attn.q_proj is layer


def test_what_loading_records_is_plain_text(saved):
    text = json.loads((saved / "adapter_config.json").read_text())
    assert all(not str(value).startswith("<") for value in text.values())
