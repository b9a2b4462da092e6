"""QLoRA as it is used: a quantised model of transformers is prepared, adapted, trained by Trainer, saved and merged."""

from __future__ import annotations

import copy
import gc
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from conformance.storages import STORAGES, numbers, payload
from peft import (
    AdaptionPromptConfig,
    DeloraConfig,
    HiraConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.core import storage

transformers = pytest.importorskip("transformers")
warnings.filterwarnings("ignore", module="bitsandbytes|torchao|hqq")

IDS = torch.arange(2, 50).view(4, 12)


def bnb(**settings):
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(**settings)


def ao(name, **settings):
    quantization = pytest.importorskip("torchao.quantization")
    settings = {k: v(quantization) if callable(v) else v for k, v in settings.items()}
    return transformers.TorchAoConfig(getattr(quantization, name)(**settings))


KINDS = {
    "nf4": lambda: bnb(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "fp4": lambda: bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage=torch.bfloat16),
    "int8": lambda: bnb(load_in_8bit=True),
    "torchao int8": lambda: ao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": lambda: ao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": lambda: ao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=lambda q: q.PerGroup(32)),
    "torchao float8": lambda: ao("Float8WeightOnlyConfig"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama that was saved as it is."""
    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    where = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(made).save_pretrained(where)
    return str(where)


def load(folder, kind=None):
    """The model, quantised or not."""
    more = {} if kind is None else {"quantization_config": KINDS[kind](), "device_map": {"": "cpu"}}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)


def dense(folder, quantised):
    """The same model on ordinary layers that hold the numbers of the quantised ones."""
    model, held = load(folder), dict(quantised.named_modules())
    with torch.no_grad():
        for path, module in model.named_modules():
            if type(module) is nn.Linear:
                module.weight.copy_(storage.of(held[path], "weight").read(held[path], "weight"))
    return model.requires_grad_(False)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def filled(model, seed=0):
    """The model with numbers in its adapters, so that they do something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) / 8)
    return model


def trained(model, where, **arguments):
    """The model after a run of Trainer that also measures on the way; the losses that it measured."""
    if not model.get_base_model().hf_quantizer.is_trainable:  # Trainer refuses it, whoever's adapters are on it
        return trained_by_hand(model)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    run = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(where),
            max_steps=6,
            learning_rate=3e-2,
            per_device_train_batch_size=4,
            eval_strategy="steps",
            eval_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    run.train()
    return [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]


def trained_by_hand(model):
    """The same without Trainer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(6):
        loss = model.train()(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@each_kind
def test_the_road_from_loading_to_merging(kind, folder, tmp_path):
    torch.manual_seed(0)
    base = prepare_model_for_kbit_training(load(folder, kind))
    assert base.is_gradient_checkpointing
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    assert {s.quantization_backend for s in model.get_layer_status()} == {model.get_model_status().quantization_backend}
    with model.disable_adapter():
        untouched = logits(model)
    first, *_, last = trained(model, tmp_path)
    assert last < first - 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)

    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(prepare_model_for_kbit_training(load(folder, kind)), str(tmp_path / "adapter"))
    wanted = logits(model)
    assert torch.equal(logits(again), wanted)
    on_dense = PeftModel.from_pretrained(load(folder), str(tmp_path / "adapter"))  # it fits the base as it was, too
    assert on_dense.peft_config["default"].base_model_name_or_path == folder

    class_before = type(again.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight)
    again.merge_adapter()
    assert type(again.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight) is class_before
    again.unmerge_adapter()
    assert torch.equal(logits(again), wanted)
    merged = again.merge_and_unload(quantized="dequantize")
    assert {type(m) for m in merged.modules() if hasattr(m, "in_features")} == {nn.Linear}
    apart = (logits(merged) - wanted).abs().max() / wanted.abs().max()
    # of these activations are rounded, or scales in evaluation
    rounds = {"int8": 0.1, "torchao int8 dynamic": 0.1, "nf4": 0.02, "fp4": 0.02}
    assert apart < rounds.get(kind, 2e-4)


@each_kind
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_gradients_are_those_of_the_dense_model_after_measuring(kind, targets, folder):
    quantised = load(folder, kind)
    with torch.no_grad():
        quantised.eval()(IDS)  # some libraries put weights in another order at the first answer
    config = LoraConfig(target_modules=targets, r=4, layers_to_transform=[0] if targets == ["q_proj"] else None)
    model = filled(get_peft_model(quantised, config))
    twin = filled(get_peft_model(dense(folder, quantised), config))
    for m in (model, twin):
        logits(m)
        m.train()(IDS, labels=IDS).loss.backward()
    found, wanted = ([p.grad for p in m.parameters() if p.requires_grad] for m in (model, twin))
    rounds_inputs = kind in ("int8", "torchao int8 dynamic")
    for mine, other in zip(found, wanted, strict=True):
        assert (mine - other).norm() / other.norm() < (0.15 if rounds_inputs else 1e-4)


PROMPTS = {
    "tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "adaption": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
}


@each_kind
@pytest.mark.parametrize("name", PROMPTS)
def test_gradients_reach_prompts_after_measuring(kind, name, folder):
    quantised = load(folder, kind)
    twin = filled(get_peft_model(dense(folder, quantised), PROMPTS[name]))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in quantised.modules()]
    model = filled(get_peft_model(quantised, PROMPTS[name]))
    for m in (model, twin):
        logits(m)
        m.train()(IDS, labels=IDS).loss.backward()
    found, wanted = ([p.grad for p in m.parameters() if p.requires_grad] for m in (model, twin))
    rough = 0.15 if kind in ("int8", "torchao int8 dynamic") else 0.01  # an adaption prompt's are differences
    for mine, other in zip(found, wanted, strict=True):
        assert (mine - other).norm() / other.norm() < rough
    plain = model.unload()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()] == hooks


@each_kind
def test_logical_parameters_are_counted(kind, folder):
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4)
    wanted = get_peft_model(load(folder), config).get_nb_trainable_parameters()
    model = get_peft_model(load(folder, kind), config)
    assert model.get_nb_trainable_parameters() == wanted
    status = model.get_model_status()
    assert (status.trainable_params, status.total_params) == wanted


@pytest.mark.parametrize("name", STORAGES)
def test_a_layer_of_each_storage_counts_as_its_numbers_do(name):
    model = STORAGES[name].model()
    wanted = model.layer.in_features * model.layer.out_features
    wanted += sum(p.numel() for n, p in model.named_parameters() if not n.startswith("layer."))
    bias = getattr(model.layer, "bias", None)
    wanted += bias.numel() if isinstance(bias, nn.Parameter) else 0  # HQQ keeps it as a mere tensor
    found = get_peft_model(model, LoraConfig(target_modules=["layer"], r=2))
    trainable, every = found.get_nb_trainable_parameters()
    assert every - trainable == wanted


def test_layers_at_which_no_adapter_stands_are_given_back_as_they_were(folder):
    base = load(folder, "torchao int8 dynamic")
    hooks = [len(m._forward_hooks) for m in base.modules()]
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4))
    copy.deepcopy(model)
    assert sum(len(m._forward_hooks) for m in model.modules()) > sum(hooks)
    plain = model.unload()
    assert [len(m._forward_hooks) for m in plain.modules()] == hooks


def test_nothing_is_hooked_if_adapting_fails(folder):
    base = load(folder, "torchao int8 dynamic")
    with pytest.raises(ValueError):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], layers_to_transform=[7]))
    assert not any(m._forward_hooks for m in base.modules())


METHODS = {
    "lora": LoraConfig(target_modules=["layer"], r=2),
    "dora": LoraConfig(target_modules=["layer"], r=2, use_dora=True),
    "oft": OFTConfig(target_modules=["layer"], oft_block_size=16),
    "hira": HiraConfig(target_modules=["layer"], r=2),
    "loha": LoHaConfig(target_modules=["layer"], r=2),
    "delora": DeloraConfig(target_modules=["layer"], r=2),
}


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_no_dense_copy_outlives_a_forward(method, name):
    layout = STORAGES[name]
    model = filled(get_peft_model(layout.model(), METHODS[method]))
    size = layout.model().layer.in_features * layout.model().layer.out_features
    x = layout.x().requires_grad_()
    assert x.numel() < size
    model(x).sum().backward()  # what is made once and kept is there now
    kept = []
    with new_tensors() as made, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    alive = [t for t in made if t.is_floating_point() and t.numel() >= size]
    assert y.requires_grad and any(t is y for t in made)
    assert not [t.shape for t in alive]


@contextmanager
def new_tensors():
    """A list that gets every tensor that was made within and that Python, or the list of what is saved, still holds."""
    found = []
    gc.freeze()  # what is there is looked at no more
    try:
        yield found
        gc.collect()
        found += [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    finally:
        gc.unfreeze()


def saved(layer):
    """Bytes that one forward of a bf16 input keeps for the backward, but for parameters."""
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=8), autocast_adapter_dtype=True)
    x = torch.randn(128, 256, dtype=torch.bfloat16, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def note(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("settings", [{"quant_type": "nf4"}, {"quant_type": "fp4", "compress_statistics": False}])
def test_a_four_bit_layer_keeps_no_more_than_a_dense_one(settings):
    library = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(256, 512, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    packed = library.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, **settings)
    packed.load_state_dict(plain.state_dict())
    assert 0 < saved(packed.to("cpu")) <= 1.1 * saved(plain)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_evaluation_is_the_librarys_own_and_keeps_what_is_stored(kind):
    """On some CPUs bitsandbytes answers in evaluation from a weight in another order, with rounded scales."""
    base, x = STORAGES[kind].model(), torch.randn(3, STORAGES[kind].shape[-1])
    with torch.no_grad():
        alone = base(x)
    fresh = STORAGES[kind].model()
    before = payload(fresh.layer)
    model = get_peft_model(fresh, LoraConfig(target_modules=["layer"], init_lora_weights=False)).eval()
    layer = model.base_model.model.layer
    for _ in range(2):
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(x), alone)
        assert all(map(torch.equal, payload(layer.get_base_layer()), before))
        grad = torch.autograd.grad(model(y := x.clone().requires_grad_()).sum(), y)[0]
        assert grad.abs().max() > 0
        model.train()
        model(x).sum().backward()
        model.eval()
    with torch.no_grad():
        adapted = model(x)
        model.merge_adapter(quantized="requantize")
        model(x)  # the merged weight is brought into another order, too
        model.unmerge_adapter()
        assert torch.equal(model(x), adapted)
    assert all(map(torch.equal, payload(layer.get_base_layer()), before))
    plain = model.unload()
    assert all(map(torch.equal, payload(plain.layer), before))
    assert not plain.layer._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(plain(x), alone)


@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_weight_that_was_brought_into_the_order_of_a_cpu_is_read_as_it_was(compress_statistics):
    functional = pytest.importorskip("bitsandbytes.functional")
    base = STORAGES["nf4"].store(nn.Linear(192, 32), compress_statistics=compress_statistics)
    before = numbers(base)
    held = base.weight
    held.data, held.quant_state = functional._convert_weight_packed_for_cpu(held.data, held.quant_state)
    assert (numbers(base) - before).norm() < 0.005 * before.norm()  # its scales are bfloat16


@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_model_that_has_run_before_it_is_adapted_answers_as_before_while_adapters_are_off(compress_statistics):
    library = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    form = {"compress_statistics": compress_statistics, "quant_type": "nf4", "compute_dtype": torch.bfloat16}
    packed = library.nn.Linear4bit(64, 64, bias=False, **form)
    packed.load_state_dict({"weight": torch.randn(64, 64, dtype=torch.bfloat16) * 0.02})
    base, x = nn.Sequential(packed.to("cpu")).eval(), torch.randn(50, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        alone = base(x)
        model = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
        for _ in range(2):
            with model.disable_adapter():
                assert torch.equal(model(x), alone)
            model.merge_adapter(quantized="requantize")
            model.unmerge_adapter()
        assert torch.equal(model.unload()(x), alone)


@pytest.mark.parametrize("run", [True, False])
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_state_dict_changes_nothing_of_a_four_bit_layer(compress_statistics, run):
    library = pytest.importorskip("bitsandbytes")
    packed = library.nn.Linear4bit(128, 64, compute_dtype=torch.float32, compress_statistics=compress_statistics)
    packed.load_state_dict(nn.Linear(128, 64).state_dict())
    base, x = nn.Sequential(packed.to("cpu")).eval(), torch.randn(5, 128)
    with torch.no_grad():
        if run:
            base(x)  # after which some CPUs hold the weight in another order, which a state dict undoes
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).eval()
        wanted, before = model(x), numbers(packed)
        for _ in range(2):
            state = model.state_dict()
            assert torch.equal(model(x), wanted)
    assert torch.equal(numbers(packed), before)
    assert state["base_model.model.0.base_layer.weight.absmax"].dim() == 1
    assert not model.unload()[0]._state_dict_pre_hooks


@pytest.mark.parametrize("size, said", [(0.05, True), (1.0, False)])
def test_plain_rounding_that_is_coarse_beside_the_update_is_told(size, said):
    base = nn.Sequential(STORAGES["nf4"].store(nn.Linear(192, 32)))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.base_model.model[0].adapter_parameters("default"):
            p.normal_(std=size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = model.merge_adapter()["0"]
    assert (error.noise > 0.3) == said == any("Rounding" in str(w.message) for w in caught)
