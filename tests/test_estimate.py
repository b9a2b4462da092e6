"""`peft.estimate` is within a tenth of what a real step holds, and touches nothing of the user's."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import peft
from peft import get_peft_model
from peft.inspection.asked import EstimateError, inputs_of, model_of, optimizer_of
from peft.inspection.estimate import forward, step
from peft.inspection.hollow import Ledger
from peft.inspection.twin import _beside
from peft.kernels import thin

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")

SMALL = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=200)
MODELS = {
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SMALL, num_key_value_heads=2), "CAUSAL_LM"),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=200), "CAUSAL_LM"),
    "bert": ("BertForSequenceClassification", transformers.BertConfig(**SMALL), "SEQ_CLS"),
    "t5": (
        "T5ForConditionalGeneration",
        transformers.T5Config(d_model=128, d_ff=256, d_kv=32, num_layers=2, num_heads=4, vocab_size=200),
        "SEQ_2_SEQ_LM",
    ),
    "mixtral": (
        "MixtralForCausalLM",
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
        "CAUSAL_LM",
    ),
    "vit": (
        "ViTForImageClassification",
        transformers.ViTConfig(**{**SMALL, "vocab_size": 2}, image_size=64, patch_size=8),
        None,
    ),
}
LINEAR = {"target_modules": "all-linear"}
CONFIGS = {
    "lora": ("LoraConfig", {**LINEAR, "r": 8}),
    "lora-64": ("LoraConfig", {**LINEAR, "r": 64}),
    "dropout": ("LoraConfig", {**LINEAR, "r": 8, "lora_dropout": 0.1}),
    "dora": ("LoraConfig", {**LINEAR, "r": 8, "use_dora": True}),
    "dora-dropout": ("LoraConfig", {**LINEAR, "r": 8, "use_dora": True, "lora_dropout": 0.1}),
    "pissa": ("LoraConfig", {**LINEAR, "r": 8, "init_lora_weights": "pissa_niter_4"}),
    "ia3": ("IA3Config", {**LINEAR, "feedforward_modules": []}),
    "loha": ("LoHaConfig", LINEAR),
    "lokr": ("LoKrConfig", LINEAR),
    "oft": ("OFTConfig", {**LINEAR, "oft_block_size": 32}),
    "boft": ("BOFTConfig", {**LINEAR, "boft_block_size": 8}),
    "vera": ("VeraConfig", {"r": 64, "target_modules": ["q_proj", "o_proj"]}),
    "olora": ("LoraConfig", {**LINEAR, "r": 8, "init_lora_weights": "olora"}),
    "tokens": ("LoraConfig", {"r": 8, "trainable_token_indices": [1, 2]}),
    "saved": ("LoraConfig", {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "adamss": ("AdamssConfig", {**LINEAR, "r": 16, "num_subspaces": 3, "subspace_rank": 2}),
    "adamss-dynamic": ("AdamssConfig", {**LINEAR, "r": 16, "num_subspaces": 3, "use_dynamic_rank": True}),
    "osf": ("OSFConfig", {"target_modules": ["q_proj", "down_proj"]}),
    "poly": ("PolyConfig", {"target_modules": ["q_proj"], "n_tasks": 3}),
    "tasks": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 8, "num_tasks": 2}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 8}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 8}),
}


def configured(method: str, task: str | None):
    name, fields = CONFIGS[method]
    return getattr(peft, name)(task_type=task, **fields)


def made(model: str, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    name, settings, _ = MODELS[model]
    return getattr(transformers, name)(copy.deepcopy(settings)).to(dtype)


def measured(model, config, batch, seq, optimizer="adamw", training=True, checkpointing=False) -> dict[str, int]:
    """The same numbers of a real run, whose tensors a ledger follows."""
    ledger = Ledger()
    base = ledger.hold([*model.parameters(), *model.buffers(), *(t for m in model.modules() for t in _beside(m))])
    inputs = inputs_of(model, config, batch, seq, None, training)
    ledger.hold([v for v in inputs.values() if isinstance(v, torch.Tensor)])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with ledger:
        before = ledger.live
        model = get_peft_model(model, config)
        adapter = ledger.live - before
        found = step(model, inputs, optimizer_of(optimizer), ledger) if training else forward(model, inputs, ledger)
    return {"base": base, "adapter": adapter, **found}


def agree(model, config, batch=4, seq=48, optimizer="adamw", training=True, checkpointing=False) -> None:
    options = {"training": training, "gradient_checkpointing": checkpointing}
    told = peft.estimate(model, config, batch, seq, optimizer, **options)
    real = measured(model, config, batch, seq, optimizer, training, checkpointing)
    off = {k: (getattr(told, k), v) for k, v in real.items() if abs(getattr(told, k) - v) > 0.1 * v}
    assert not off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_step_of_every_method_is_told(method, dtype):
    agree(made("llama", dtype), configured(method, "CAUSAL_LM"))


@pytest.mark.parametrize("method", ["lora", "dropout", "dora", "lokr"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit"])
def test_a_step_of_other_models_is_told(name, method):
    agree(made(name), configured(method, MODELS[name][2]))


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_in_evaluation_is_told(name):
    agree(made(name), configured("lora", MODELS[name][2]), training=False)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_8bit", "adafactor", torch.optim.NAdam])
def test_the_optimiser_s_state_is_told(optimizer):
    agree(made("llama"), configured("lora-64", "CAUSAL_LM"), batch=1, seq=4, optimizer=optimizer)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_checkpointing_is_told(name):
    agree(made(name), configured("dropout", MODELS[name][2]), checkpointing=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_long_inputs_in_blocks_are_told(dtype):
    agree(made("llama", dtype), configured("dropout", "CAUSAL_LM"), batch=8, seq=256)


EXPERTS = {
    "mixtral": MODELS["mixtral"],
    "qwen3": (
        "Qwen3MoeForCausalLM",
        transformers.Qwen3MoeConfig(
            **SMALL, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96
        ),
        "CAUSAL_LM",
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        transformers.GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=32, num_local_experts=8),
        "CAUSAL_LM",
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        transformers.SwitchTransformersConfig(
            d_model=128,
            d_ff=256,
            d_kv=32,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            vocab_size=200,
            num_experts=4,
        ),
        "SEQ_2_SEQ_LM",
    ),
}
FUSED = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.filterwarnings("ignore:The experts of")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [LINEAR, FUSED], ids=["all-linear", "parameters"])
@pytest.mark.parametrize("name", EXPERTS)
def test_adapters_on_experts_and_routers_are_told_and_noted(name, fields, dtype, monkeypatch):
    if name == "switch" and fields is FUSED:
        pytest.skip("its experts are modules")
    monkeypatch.setitem(MODELS, name, EXPERTS[name])
    config = peft.LoraConfig(task_type=EXPERTS[name][2], **fields)
    agree(made(name, dtype), config)
    assert "experts" in peft.estimate(EXPERTS[name][1], config, 1, 4).notes[-1]


QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
    "int8-but-two": {"load_in_8bit": True, "llm_int8_skip_modules": ["down_proj", "lm_head"]},
}


@pytest.mark.parametrize("training", [True, False], ids=["step", "forward"])
@pytest.mark.parametrize("form", QUANTISED)
def test_a_quantised_base_is_told_before_it_is_made_and_after(form, training, tmp_path):
    pytest.importorskip("bitsandbytes")
    packing, config = transformers.BitsAndBytesConfig(**QUANTISED[form]), configured("dropout", "CAUSAL_LM")
    made("llama", torch.bfloat16).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=packing, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    told = peft.estimate(str(tmp_path), config, 4, 48, quantization_config=packing, training=training)
    again = peft.estimate(model, config, 4, 48, training=training)
    agree(model, config, training=training)
    assert (told.base, told.adapter, told.notes) == (again.base, again.adapter, ())
    assert told.peak == pytest.approx(again.peak, rel=1e-2)


def test_a_base_of_tensors_that_lay_out_others_is_told():
    quantization = pytest.importorskip("torchao.quantization")
    model = made("llama", torch.bfloat16)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    agree(model, configured("dora", "CAUSAL_LM"))


def test_a_model_is_left_as_it_is():
    model, before = made("llama"), torch.get_rng_state()
    state, kinds = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    peft.estimate(model, configured("dropout", "CAUSAL_LM"), 2, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert kinds == [type(m) for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_other_threads_compute_in_the_usual_blocks_meanwhile(monkeypatch):
    seen: dict[str, list[int]] = {"here": [], "there": []}

    def looked(*given):
        seen["here"].append(len(list(thin.blocks(4096, 256))))
        with ThreadPoolExecutor(1) as pool:
            seen["there"].append(pool.submit(lambda: len(list(thin.blocks(4096, 256)))).result())
        return step(*given)

    usual = len(list(thin.blocks(4096, 256)))
    monkeypatch.setattr("peft.inspection.estimate.step", looked)
    peft.estimate(made("llama"), configured("lora", "CAUSAL_LM"), 64, 1024)
    assert seen["here"][0] < usual == seen["there"][0] == len(list(thin.blocks(4096, 256)))


def test_what_the_library_keeps_of_seeds_and_sizes_is_whole():
    from peft.core import draw
    from peft.kernels import blocks

    for kept in (draw._places, blocks._eye):
        kept.cache_clear()
    for method in ("FourierFTConfig", "OFTConfig"):
        peft.estimate(made("llama"), getattr(peft, method)(target_modules=["q_proj"]), 2, 8)
    found = draw._places(128 * 128, 1000, 777)
    draw._places.cache_clear()
    assert found.unique().numel() == 1000 and torch.equal(found, draw._places(128 * 128, 1000, 777))
    assert torch.equal(blocks._eye(32, torch.float32, torch.device("cpu")), torch.eye(32))


def test_a_configuration_a_folder_and_models_with_and_without_numbers_are_the_same(tmp_path):
    config, (_, settings, _) = configured("lora", "CAUSAL_LM"), MODELS["llama"]
    with torch.device("meta"):
        bare = transformers.LlamaForCausalLM(settings)
    settings.save_pretrained(tmp_path)
    found = [peft.estimate(m, config, 2, 16) for m in (made("llama"), bare, settings, str(tmp_path))]
    assert len({(f.base, f.adapter, f.activations, f.peak) for f in found}) == 1
    half = peft.estimate(settings, config, 2, 16, dtype=torch.bfloat16)
    assert half.base * 2 - found[0].base < 1024 and half.adapter == found[0].adapter  # tables of angles stay


def test_a_model_that_no_machine_holds_takes_seconds_and_no_memory():
    settings = transformers.LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=4, num_attention_heads=128, dtype="bfloat16"
    )
    found = peft.estimate(settings, configured("lora", "CAUSAL_LM"), 8, 4096, gradient_checkpointing=True)
    assert found.base > 2**34 and found.peak > 2 * found.base


def test_any_module_and_full_training_are_told():
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    found = peft.estimate(net, inputs=torch.zeros(512, 20, device="meta"), optimizer="sgd")
    assert (found.base, found.adapter, found.gradients, found.optimizer) == (5896, 0, 5896, 0)
    assert 512 * 64 * 4 <= found.activations < 512 * 68 * 4
    assert json.loads(json.dumps(found.to_dict()))["peak"] == found.peak
    assert "peak" in str(found) and "gradients" not in str(
        peft.estimate(net, inputs=torch.zeros(1, 20), training=False)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "adam"}, "optimizer='adam' is not known.*adamw"),
        ({"batch": 0}, "batch=0 is not a count"),
        ({"config": {"r": 8}}, "config is a dict"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is no floating dtype"),
        ({"model": 3}, "model is a int"),
        ({"model": "/no/such/folder"}, "cannot be made"),
        ({"model": nn.Linear(2, 2)}, "Pass inputs="),
        (
            {"gradient_checkpointing": True, "model": nn.Linear(2, 2), "inputs": torch.ones(1, 2)},
            "gradient_checkpointing",
        ),
    ],
)
def test_errors_name_the_argument_and_the_cure(change, said):
    values = {"model": MODELS["llama"][1], "config": configured("lora", "CAUSAL_LM"), "batch": 1, "seq": 4, **change}
    with pytest.raises((EstimateError, peft.errors.WrongKindError), match=said):
        peft.estimate(**values)


def test_quantised_weights_of_no_library_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(EstimateError, match=r"'0.weight' is int8 in a Linear, a quantised form that is not known"):
        peft.estimate(model, inputs=torch.ones(1, 4))


def test_a_plan_is_made_of_a_configuration_and_of_its_folder_too(tmp_path):
    model = made("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    wanted = str(peft.plan(model, config))
    assert str(peft.plan(model.config, config)) == str(peft.plan(tmp_path, config)) == wanted
    with pytest.raises(TypeError, match="model is a int"):
        peft.plan(3, config)
    model.config.architectures = None
    assert str(peft.plan(model.config, config, strict=True)) == wanted  # the task says which class is meant
    config.task_type = None
    with pytest.warns(peft.PeftWarning, match=r"plan of LlamaConfig is.*names no class; counted as LlamaForCausalLM"):
        assert str(peft.plan(model.config, config)) == wanted


@pytest.mark.parametrize(
    ("kind", "task", "name"),
    [
        ("WhisperConfig", None, "WhisperForConditionalGeneration"),
        ("WhisperConfig", "SEQ_2_SEQ_LM", "WhisperForConditionalGeneration"),
        ("BartConfig", None, "BartForConditionalGeneration"),
        ("BartConfig", "CAUSAL_LM", "BartForCausalLM"),
        ("LlavaConfig", None, "LlavaForConditionalGeneration"),
        ("ViTConfig", None, "ViTForImageClassification"),
        ("LlamaConfig", None, "LlamaForCausalLM"),
    ],
)
def test_a_configuration_that_names_no_class_stands_for_the_whole_model(kind, task, name):
    config = peft.LoraConfig(target_modules="all-linear", task_type=task)
    assert type(model_of(getattr(transformers, kind)(), config, None, [])).__name__ == name
