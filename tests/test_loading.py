"""Loading: what is wrong is found in a file's head, before anything is made, and a failed load leaves no trace."""

from __future__ import annotations

import json
import random
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft import (
    AdaLoraConfig,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    BOFTConfig,
    FrodConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PeftWarning,
    PrefixTuningConfig,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    preprocess_loraga,
    set_peft_model_state_dict,
)
from peft.core.files import Saved
from peft.core.fingerprint import difference, fingerprint
from peft.core.header import read_header
from peft.core.layer import BaseTunerLayer, tuner_layers
from peft.errors import ChangedConfigWarning, OtherBaseWarning, PeftStrictError
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class MLP(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.fc1 = nn.Linear(size, 8)
        self.fc2 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc2(torch.relu(self.fc1(x))))


def mlp(size=6):
    torch.manual_seed(0)
    return MLP(size).eval()


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["fc1", "fc2"], "init_lora_weights": False, **changes})


def llama(vocab=32, layers=2, kind="LlamaForCausalLM", **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        **changes,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def saved(folder, **changes):
    get_peft_model(mlp(), lora(**changes)).save_pretrained(folder)
    return Path(folder)


def edit(folder: Path, **fields):
    """Change a configuration file, and let the weights forget what it was."""
    rewrite(folder, lambda state: state)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def rewrite(folder: Path, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


# The head -----------------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def put(file: Path, head, data: bytes = bytes(8), length: int | None = None):
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


BAD_HEADS = {
    "no bytes": (b"", b"", None, "shorter than the 8 bytes"),
    "longer than the file": ({"a": ENTRY}, bytes(8), 10**6, "of which"),
    "a pointer of Git LFS": (b"version https://git-lfs", b"", int.from_bytes(b"version ", "little"), "git lfs pull"),
    "longer than allowed": ({"a": ENTRY}, bytes(8), 2**63, "are allowed"),
    "no text": (b"\xff\xfe{}", b"", None, "no valid JSON"),
    "no JSON": (b"{", b"", None, "no valid JSON"),
    "no object": (b"[]", b"", None, "no JSON object"),
    "too deep": (b"[" * 10**5, b"", None, "no valid JSON"),
    "a number without end": (b'{"a":' + b"9" * 10**5 + b"}", b"", None, "no valid JSON"),
    "twice": (b'{"a":1,"a":2}', b"", None, "'a' twice"),
    "remarks": ({"__metadata__": {"a": 1}}, b"", None, "texts"),
    "no entry": ({"a": 3}, b"", None, "not made of dtype"),
    "unknown dtype": ({"a": {**ENTRY, "dtype": "F33"}}, bytes(8), None, "'F33'"),
    "dtype of no text": ({"a": {**ENTRY, "dtype": [1]}}, bytes(8), None, "is not known"),
    "negative shape": ({"a": {**ENTRY, "shape": [-2]}}, bytes(8), None, "which is none"),
    "shape of fractions": ({"a": {**ENTRY, "shape": [2.0]}}, bytes(8), None, "which is none"),
    "shape of truths": ({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8), None, "which is none"),
    "too many axes": ({"a": {**ENTRY, "shape": [1] * 65 + [2]}}, bytes(8), None, "which is none"),
    "beyond any machine": ({"a": {**ENTRY, "shape": [0, 2**61, 2**61]}}, bytes(8), None, "no machine"),
    "one position": ({"a": {**ENTRY, "data_offsets": [0]}}, bytes(8), None, "no two positions"),
    "backwards": ({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), None, "needs 8 bytes"),
    "another size": ({"a": {**ENTRY, "shape": [3]}}, bytes(8), None, "needs 12 bytes"),
    "overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), None, "overlaps"),
    "gap": ({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16), None, "gap"),
    "too little data": ({"a": ENTRY}, bytes(7), None, "it holds 7"),
    "too much data": ({"a": ENTRY}, bytes(9), None, "it holds 9"),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_bad_head_is_an_error_that_names_the_file_and_the_cause(tmp_path, name):
    head, data, length, text = BAD_HEADS[name]
    file = saved(tmp_path) / WEIGHTS
    put(file, head, data, length)
    if name == "no bytes":
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is no complete safetensors file: .*{text}"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_head_that_is_like_another_but_for_its_data_or_its_remarks_is_checked(tmp_path):
    file = saved(tmp_path) / WEIGHTS
    for remarks, size, text in (
        ({"n": "1"}, 8, ""),
        ({"n": "22"}, 8, ""),
        ({"n": "1"}, 7, "holds 7"),
        ({"n": 1}, 8, "texts"),
    ):
        raw = json.dumps({"__metadata__": remarks, "a": ENTRY}, separators=(",", ":")).encode()
        put(file, raw.ljust(-(-len(raw) // 8) * 8), bytes(size))
        if text:
            with pytest.raises(ValueError, match=text):
                read_header(file)
        else:
            head = read_header(file)
            assert head.metadata == remarks and list(head.tensors) == ["a"] and head.tensors["a"].shape == (2,)
    put(file, raw[:-1].replace(b'"a":', b'"b":') + b" ", bytes(8))
    with pytest.raises(ValueError, match="no valid JSON"):
        read_header(file)


def test_what_the_format_allows_is_read(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 5),
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "ünï\n\"'": torch.ones(2, dtype=torch.float64),
        "small": torch.ones(3).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "whole": torch.arange(7),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    saved_here = Saved({str(tmp_path / "a.safetensors"): read_header(tmp_path / "a.safetensors")})
    got = saved_here.read()
    assert got.keys() == tensors.keys()
    assert all(got[k].dtype == v.dtype and torch.equal(got[k].float(), v.float()) for k, v in tensors.items())
    assert {k: (v.shape, v.dtype) for k, v in saved_here.outline.items()} == {
        k: (v.shape, v.dtype) for k, v in tensors.items()
    }


# Nothing is made that the file does not fit --------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made with memory of its own."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor) and not t.is_meta:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


RANKS = [2**20, 10**11]  # the latter no machine could hold


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("new", [True, False])
def test_a_wrong_rank_costs_no_memory(tmp_path, r, new):
    edit(saved(tmp_path), r=r)
    model = get_peft_model(mlp(), lora())
    with Largest() as largest, pytest.raises(RuntimeError, match=r"size mismatch.*\n.*fc1\.lora_A\.weight"):
        if new:
            PeftModel.from_pretrained(mlp(), tmp_path)
        else:
            model.load_adapter(tmp_path, "more")
    assert largest.bytes < 4096


@pytest.mark.parametrize("fields", [{"r": 2**63 - 1}, {"rank_pattern": {"fc1": 2**62}}, {"r": 2**70}])
def test_sizes_beyond_counting_are_refused(tmp_path, fields):
    edit(saved(tmp_path), **fields)
    with pytest.raises((ValueError, TypeError), match=r"no machine can hold|whole number"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_wrong_base_costs_no_memory(tmp_path):
    saved(tmp_path, r=64, modules_to_save=["fc2"])
    base = mlp(size=100_000)
    with Largest() as largest, pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base, tmp_path)
    assert largest.bytes < 4096


@pytest.mark.parametrize("new", [True, False])
def test_tensors_are_read_after_the_head_has_proved_right(tmp_path, monkeypatch, new):
    rewrite(saved(tmp_path), lambda state: {k: torch.zeros(5, 5) for k in state})
    monkeypatch.setattr(Saved, "read", lambda *_: pytest.fail("the tensors were read"))
    model = get_peft_model(mlp(), lora())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "more" if new else "default")


def test_a_configuration_that_asks_for_more_than_the_file_holds_is_refused(tmp_path):
    edit(saved(tmp_path), rank_pattern={"fc2": 10**10})
    rewrite(tmp_path, lambda state: {k: v for k, v in state.items() if "fc1" in k})
    with Largest() as largest, pytest.raises(ValueError, match="more than the base model has"):
        PeftModel.from_pretrained(mlp(), tmp_path)
    assert largest.bytes < 4096


@pytest.mark.parametrize(("kind", "field"), [(PromptTuningConfig, "token_dim"), (PrefixTuningConfig, "num_layers")])
def test_a_prompt_that_is_larger_than_its_file_is_refused(tmp_path, kind, field):
    get_peft_model(llama(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    for name in ("num_virtual_tokens", field):
        edit(tmp_path, **{name: 10**10})
        with pytest.raises((RuntimeError, ValueError), match="does not fit"):
            PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("field", ["num_ranks", "num_tasks"])
def test_prompts_of_more_tasks_or_ranks_than_the_file_has_cost_no_memory(tmp_path, field):
    config = MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    edit(tmp_path, **{field: 10**8})
    base = llama()
    with Largest() as largest, pytest.raises(RuntimeError, match="does not fit"):
        PeftModel.from_pretrained(base, tmp_path)
    assert largest.bytes < 2**20


def test_places_drawn_from_a_seed_are_not_more_than_a_base_models_worth(tmp_path):
    """The rank of Uni-LoRA is in no tensor of its file."""
    get_peft_model(mlp(), UniLoraConfig(target_modules=["fc1"], theta_d_length=8)).save_pretrained(tmp_path)
    edit(tmp_path, r=10**7)
    base = mlp()
    with Largest() as largest, pytest.raises(ValueError, match="bytes that are drawn from its seed"):
        PeftModel.from_pretrained(base, tmp_path)
    assert largest.bytes < 4096
    assert not isinstance(base.fc1, BaseTunerLayer)


def test_the_number_of_butterfly_factors_is_not_counted_out(tmp_path):
    get_peft_model(mlp(), BOFTConfig(target_modules=["fc1"], boft_block_size=2)).save_pretrained(tmp_path)
    edit(tmp_path, boft_n_butterfly_factor=2**62)
    with pytest.raises(ValueError, match="boft_n_butterfly_factor"):
        PeftModel.from_pretrained(mlp(), tmp_path)


@pytest.mark.parametrize("low", [True, False])
def test_what_a_file_lacks_starts_as_a_new_adapter_does(low, tmp_path):
    saved(tmp_path, init_lora_weights=True)
    rewrite(tmp_path, lambda state: {k: v + 1 for k, v in state.items() if "fc1" in k})
    with pytest.warns(PeftWarning, match=r"lacks 2 tensors(.|\n)*They keep the values they had"):
        model = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low)
    assert not any(p.is_meta for p in model.parameters())
    layer = model.base_model.model.fc2
    assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.any()


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    saved(tmp_path)
    torch.manual_seed(3)
    PeftModel.from_pretrained(mlp(), tmp_path)
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    base = mlp()
    torch.manual_seed(3)
    PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(torch.rand(2), want)


def test_two_tensors_are_never_renamed_to_one(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"fc0\.lora_A\.weight' to several tensors"):
        PeftModel.from_pretrained(mlp(), tmp_path, key_mapping={r"^fc\d": "fc0"})


class Draws(Largest):
    """Counts the random numbers that are drawn with memory of their own, too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        random_ = any(word in str(func) for word in ("rand", "uniform", "normal", "bernoulli"))
        if random_ and isinstance(out, torch.Tensor) and not out.is_meta:
            self.count += out.numel()
        return out


SHARED = {
    "vera": (VeraConfig, {"r": 512}, {"save_projection": False}),
    "pvera": (PveraConfig, {"r": 512}, {"save_projection": False}),
    "randlora": (RandLoraConfig, {"r": 2}, {"save_projection": False}),
    "sparse": (RandLoraConfig, {"r": 2, "sparse": True}, {"save_projection": False}),
    "tinylora": (TinyLoraConfig, {"r": 2, "u": 512}, {"save_projection": False}),
    "unilora": (UniLoraConfig, {"r": 64, "save_indices": True}, {"save_indices": False}),
    "vblora": (VBLoRAConfig, {"r": 2, "num_vectors": 90, "vector_length": 4, "topk": 2}, {}),
    "frod": (FrodConfig, {"sparse_rate": 0.5}, {"save_projection": False}),
}


def shared_file(name, folder, monkeypatch, **fields):
    """(configuration, folder of an adapter with it, what counts numpy's draws)."""
    kind, own, _ = SHARED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"target_modules": ["fc1", "fc2"], **own, **fields}
        model = get_peft_model(mlp(size=8), kind(**config))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) / 9) if p.requires_grad else p
        model.save_pretrained(folder)
    dealt, deal = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: (dealt.append(seed), deal(seed))[1])
    x = torch.randn(5, 8)
    return x, model.eval()(x).detach(), dealt


@pytest.mark.filterwarnings("ignore:save_projection")
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("name", SHARED)
def test_what_layers_share_is_not_drawn_where_the_file_brings_it(name, low, tmp_path, monkeypatch):
    x, want, dealt = shared_file(name, tmp_path, monkeypatch)
    base, svd = mlp(size=8), torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a: pytest.fail("V is there"))
    with Draws() as draws:
        model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
    assert draws.count == 0
    assert not dealt
    monkeypatch.setattr(torch.linalg, "eigh", svd)
    torch.testing.assert_close(model(x), want)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.filterwarnings("ignore:save_projection")
@pytest.mark.parametrize("saved_", [True, False])
@pytest.mark.parametrize("name", SHARED)
def test_what_layers_share_is_not_drawn_for_a_file_that_does_not_fit(name, saved_, tmp_path, monkeypatch):
    _, _, dealt = shared_file(name, tmp_path, monkeypatch, **({} if saved_ else SHARED[name][2]))
    wrong = {"u": 2**20} if name == "tinylora" else {"r": 2**20}
    wrong = {"vector_length": 2} if name == "vblora" else wrong
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a: pytest.fail("V was made"))
    if name == "unilora" and not saved_:
        pytest.skip("the file holds one vector, which fits everywhere")
    other, base = mlp(size=12), mlp(size=8)
    other.fc2 = nn.Linear(8, 4)
    with Draws() as draws, pytest.raises((RuntimeError, ValueError)):
        PeftModel.from_pretrained(other, tmp_path)
    assert (draws.count, dealt) == (0, [])
    if name != "frod":
        edit(tmp_path, **wrong)
        with Draws() as draws, pytest.raises((RuntimeError, ValueError), match=r"size mismatch|does not divide"):
            PeftModel.from_pretrained(base, tmp_path)
        assert (draws.count, dealt) == (0, [])
    assert draws.bytes < 2000


@pytest.mark.filterwarnings("ignore:save_projection")
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("name", [name for name, row in SHARED.items() if row[2]])
def test_what_layers_share_is_made_where_no_file_holds_it(name, low, tmp_path, monkeypatch):
    x, want, _ = shared_file(name, tmp_path, monkeypatch, **SHARED[name][2])
    model = PeftModel.from_pretrained(mlp(size=8), tmp_path, low_cpu_mem_usage=low)
    torch.testing.assert_close(model(x), want)
    model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low)
    model.set_adapter("other")
    torch.testing.assert_close(model(x), want)


# A failed load leaves no trace --------------------------------------------------------------------------------------


def portrait(model):
    """Everything of a model that a load might leave behind."""
    for _, layer in tuner_layers(model):
        layer.active_adapters  # noqa: B018  (layers follow a switch when somebody looks)
    modules = {
        name: (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
        for name, m in model.named_modules()
    }
    parameters = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    config = model.config.to_dict() if hasattr(model, "config") else None
    return (
        modules,
        parameters,
        config,
        [model.active_adapters, list(model.peft_config)] if isinstance(model, PeftModel) else [],
    )


def misshapen(state):
    return {k: torch.zeros(*v.shape[:-1], v.shape[-1] + 1) for k, v in state.items()}


SPOILT = [misshapen, lambda s: {**s, "more": torch.zeros(2)}, lambda s: {"more": torch.zeros(2)}]
CONFIGS = [
    LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 2]),
    LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 1), (0, 2)]),
    LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    VeraConfig(target_modules=["q_proj"], r=4),
    AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("spoil", SPOILT, ids=["misshapen", "unexpected", "nothing"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_failed_load_leaves_no_trace(tmp_path, config, spoil):
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    rewrite(tmp_path, spoil)
    base = llama().train()
    base.gradient_checkpointing_enable()
    base.lm_head.weight.requires_grad_(False)
    before = portrait(base)
    with pytest.raises((ValueError, RuntimeError)):
        PeftModel.from_pretrained(base, tmp_path, strict=True)
    assert portrait(base) == before
    if isinstance(config, AdaLoraConfig):
        return  # its homes of tensors hold parameters, and the layer's own become such, with the same content
    first = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    first = first if config.is_prompt_learning else LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(), first, adapter_name="first").train()
    before = portrait(model)
    with pytest.raises((ValueError, RuntimeError)):
        model.load_adapter(tmp_path, "second", strict=True)
    assert portrait(model) == before


def test_a_passed_configuration_is_as_it_was_after_a_failed_load(tmp_path):
    rewrite(saved(tmp_path), misshapen)
    config = lora(target_modules="all-linear")
    before = dict(vars(config))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(mlp(), tmp_path, config=config)
    assert vars(config) == before


# Nothing that an adapter names is imported ---------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The name of a module that leaves a file when it is imported, and that file."""
    trace = tmp_path / "trace"
    (tmp_path / "evil_adapter_module.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "evil_adapter_module", trace
    sys.modules.pop("evil_adapter_module", None)


FIELDS = [
    {"auto_mapping": {"parent_library": "NAME", "base_model_class": "Evil"}, "task_type": None},
    {"auto_mapping": {"parent_library": "transformers.NAME", "base_model_class": "Evil"}, "task_type": None},
    {"peft_type": "NAME.Evil"},
    {"peft_type": "NAME"},
    {"task_type": "NAME"},
    {"megatron_core": "NAME", "megatron_config": {"a": 1}},
    {"runtime_config": {"NAME": "Evil"}},
    {"eva_config": {"py/object": "NAME.Evil"}},
    {"base_model_name_or_path": "NAME"},
    {"custom_class": "NAME.Evil"},
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: next(iter(f)))
def test_nothing_that_an_adapter_names_is_imported(tmp_path, trap, fields):
    name, trace = trap
    folder = saved(tmp_path / "adapter")
    edit(folder, **{"task_type": "CAUSAL_LM", **json.loads(json.dumps(fields).replace("NAME", name))})
    model = get_peft_model(mlp(), lora())
    for load in (
        lambda: PeftModel.from_pretrained(mlp(), folder),
        lambda: model.load_adapter(folder, "more"),
        lambda: AutoPeftModel.from_pretrained(folder),
        lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
    ):
        try:
            load()
        except (ValueError, TypeError, AttributeError, OSError, ImportError, NotImplementedError):
            continue
    assert not trace.exists() and name not in sys.modules


def test_a_text_to_start_from_runs_no_code_of_its_tokenizer(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "someone/else"}
    edit(tmp_path, **start, tokenizer_kwargs={"trust_remote_code": True})
    stop = classmethod(lambda *_, **__: pytest.fail("a tokenizer was loaded"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", stop)
    PeftModel.from_pretrained(llama(), tmp_path)


# The base model ------------------------------------------------------------------------------------------------------


def test_another_base_is_reported_with_what_differs(tmp_path):
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "base_fingerprint" in read_header(tmp_path / WEIGHTS).metadata
    text = r"model\.embed_tokens\.weight: 1 of 32x16 when it was saved, 1 of 40x16 here"
    base = llama(vocab=40)
    before = portrait(base)
    with pytest.warns(OtherBaseWarning, match=text):
        PeftModel.from_pretrained(llama(vocab=40), tmp_path)
    with pytest.raises(PeftStrictError, match=text):
        PeftModel.from_pretrained(base, tmp_path, strict=True)
    assert portrait(base) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path)


def test_the_fingerprint_is_of_the_base_alone():
    want = fingerprint(llama())
    assert fingerprint(llama().half()) == fingerprint(llama().to("meta")) == want
    for config in CONFIGS:
        if not getattr(config, "layer_replication", None):
            assert fingerprint(get_peft_model(llama(), config)) == want
    assert fingerprint(llama(layers=3)) != want != fingerprint(llama(vocab=33))


def test_heads_that_an_adapter_replaces_do_not_count(tmp_path):
    def classifier(labels):
        return llama(kind="LlamaForSequenceClassification", num_labels=labels)

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = get_peft_model(classifier(3), config)
    noted = fingerprint(model, config.modules_to_save)
    assert difference(noted, classifier(5), config.modules_to_save) == []
    assert difference(fingerprint(model), classifier(5)) == [
        "score.weight: 1 of 3x16 when it was saved, 1 of 5x16 here"
    ]


class Packed(nn.Module):
    """A linear layer whose numbers lie in another form, as quantised ones do."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8))
        self.register_buffer("bias", linear.bias.detach())


def test_a_quantised_base_has_the_same_fingerprint():
    packed = mlp()
    packed.fc1 = Packed(packed.fc1)
    assert fingerprint(packed) == fingerprint(mlp())


def test_new_names_or_another_packing_are_no_other_base():
    base = llama()
    wrapped = nn.Module()
    wrapped.language_model = base
    assert fingerprint(wrapped) != fingerprint(base)
    assert difference(fingerprint(base), wrapped) == []
    one, two = nn.Module(), nn.Module()
    one.gate, one.up = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))
    two.gate_up = nn.Parameter(torch.zeros(6, 4))
    assert difference(fingerprint(one), two) == []


@pytest.mark.parametrize("noted", [{}, {"base_fingerprint": "x"}, {"base_fingerprint": "x", "base_shapes": "[1"}])
def test_files_without_a_usable_fingerprint_load(noted):
    assert difference(noted, mlp()) == []


def test_a_configuration_that_was_edited_is_reported(tmp_path):
    def change(**fields):
        config = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps({**config, **fields}))

    saved(tmp_path)
    change(base_model_name_or_path="another/name", revision="main", peft_version="0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(mlp(), tmp_path)
    change(lora_alpha=16)
    with pytest.warns(ChangedConfigWarning, match=CONFIG):
        PeftModel.from_pretrained(mlp(), tmp_path)
    with pytest.raises(PeftStrictError, match=CONFIG):
        PeftModel.from_pretrained(mlp(), tmp_path, strict=True)


# Names ---------------------------------------------------------------------------------------------------------------

PARTS = [
    "lora",
    "lora_A",
    "lora_B",
    "default",
    "base_layer",
    "foo",
    "foobar",
    "model",
    "weight",
    "bias",
    "0",
    "modules",
]
PARTS += ["to_save", "original_module", "é", "名", "base_model", "A", "_", "-", " ", "adapter", "default_", "x" * 30]


def names(random_, count, joiner=""):
    found: dict[str, None] = {}
    while len(found) < count:
        name = joiner.join(random_.choices(PARTS, k=random_.randint(1, 4)))
        if not hasattr(nn.Module(), name) and name not in ("base_layer", "model"):
            found[name] = None
    return list(found)


class Named(nn.Module):
    """Layers under given names, some of them below others."""

    def __init__(self, names):
        super().__init__()
        for i, name in enumerate(names):
            inner = nn.Module()
            inner.add_module(names[-1 - i], nn.Linear(1, 1, bias=False))
            self.add_module(name, nn.Linear(1, 1, bias=False) if i % 3 else inner)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
def test_random_names_of_modules_and_adapters_make_the_round_trip(tmp_path, seed):
    random_ = random.Random(seed)
    base = names(random_, 300)
    paths = [n for n, m in Named(base).named_modules() if isinstance(m, nn.Linear)]
    adapters = names(random_, 4)

    def config(count):
        targets = "|".join(map(re.escape, random_.sample(paths, count)))
        return LoraConfig(r=1, target_modules=targets, init_lora_weights=False)

    model = get_peft_model(Named(base), config(300), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config(150))
    before = {n: {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name=n).items()} for n in adapters}
    assert [len(before[n]) for n in adapters] == [600, 300, 300, 300]
    model.save_pretrained(tmp_path)
    folders = [tmp_path / n if n != "default" else tmp_path for n in adapters]
    again = PeftModel.from_pretrained(Named(base), folders[0], adapter_name="other")
    for folder, name in zip(folders[1:], adapters[1:], strict=True):
        again.load_adapter(folder, name + "x", strict=True)
    for mine, there in zip(adapters, ["other", *(n + "x" for n in adapters[1:])], strict=True):
        got = get_peft_model_state_dict(again, adapter_name=there)
        assert got.keys() == before[mine].keys() and all(torch.equal(got[k], v) for k, v in before[mine].items())
    new = {k: v + 1 for k, v in before[adapters[1]].items()}
    set_peft_model_state_dict(model, new, adapter_name=adapters[1], strict=True)
    for name in adapters:
        got, want = get_peft_model_state_dict(model, adapter_name=name), new if name == adapters[1] else before[name]
        assert all(torch.equal(got[k], v) for k, v in want.items())


# Over an adapter that is there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"lora_alpha": 99}, {"use_rslora": True}, {"alpha_pattern": {"fc1": 3}}])
def test_weights_of_other_settings_over_an_adapter_that_is_there_are_told(fields, tmp_path):
    same, other = saved(tmp_path / "same"), saved(tmp_path / "other", **fields)
    model = get_peft_model(mlp(), lora())
    with pytest.warns(ChangedConfigWarning, match=f"{next(iter(fields))}=.* instead of .*new name"):
        model.load_adapter(other, "default")
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    with pytest.raises(PeftStrictError, match="instead of"):
        model.load_adapter(other, "default", strict=True)
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(same, "default")
        (same / CONFIG).unlink()
        model.load_adapter(same, "default")


def started(start):
    """A base model whose layers can be measured or decomposed, and an adapter with this start."""
    options = {"loftq": {"loftq_config": {"loftq_bits": 4}}, "mini": {"mini_r": 8}, "bat": {}}
    if start in ("bat", "mini", "miss"):
        return MissConfig(r=2, target_modules=["fc2"], init_weights=start == "miss" or start, **options.get(start, {}))
    if start in ("corda", "lora_ga"):
        options = {start: {f"{start}_config": CordaConfig() if start == "corda" else LoraGAConfig()}}
    return lora(target_modules=["fc2"], init_lora_weights=start, **options.get(start, {}))


def measured(config, base):
    """The base model, with what the start of an adapter is computed from."""
    init = getattr(config, "init_lora_weights", None)
    if init == "corda":
        preprocess_corda(base, config, lambda: base(torch.randn(30, 6)))
    elif init == "lora_ga":
        preprocess_loraga(base, config, lambda: base(torch.randn(30, 6)).square().sum().backward())
        base.zero_grad()
    return base


STARTS = ["pissa", "pissa_niter_2", "olora", "corda", "lora_ga", "loftq"]


@pytest.mark.filterwarnings("ignore:`corda_config`|`lora_ga_config`|Found missing|.* no place in adapter")
@pytest.mark.parametrize(("there", "file"), [(True, s) for s in STARTS] + [(s, True) for s in STARTS] + [
    ("pissa", "pissa_niter_2"), ("olora", "pissa"), ("corda", "lora_ga"), ("miss", "mini"), ("mini", "miss"),
])  # fmt: skip
def test_weights_of_another_start_over_an_adapter_that_is_there_are_told(there, file, tmp_path):
    """The first values of such a start are taken out of the base weight, so they count for good."""
    config = started(file)
    config.save_pretrained(tmp_path)
    other = get_peft_model(measured(config, mlp()), config)
    for p in other.parameters():
        p.data.add_(torch.randn_like(p) / 9) if p.requires_grad else p
    other.save_pretrained(tmp_path)
    own = started(there)
    model, name = get_peft_model(measured(own, mlp()), own), "init_weights" if file == "bat" else "init_"
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    with pytest.raises(PeftStrictError, match=rf"saved with .*{name}.*instead of.*new name, or delete_adapter"):
        model.load_adapter(tmp_path, "default", strict=True)
    assert all(torch.equal(v, state[k]) for k, v in get_peft_model_state_dict(model).items())
    with pytest.warns(ChangedConfigWarning, match=rf"{name}.*instead of"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "new")  # what the message says to do
    model.set_adapter("new")
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("starts", [(True, "gaussian"), ("orthogonal", False), ("pissa", "pissa"), ("loftq", "loftq")])
def test_weights_of_a_start_that_no_longer_counts_are_loaded_without_a_word(starts, tmp_path):
    there, file = (started(s) for s in starts)
    other = get_peft_model(mlp(), file)
    for p in other.parameters():
        p.data.add_(torch.randn_like(p) / 9) if p.requires_grad else p
    other.save_pretrained(tmp_path)
    model, x = get_peft_model(mlp(), there), torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize(("field", "ours", "theirs"), [
    ("trainable_token_indices", [1, 2], [3, 4]),
    ("alora_invocation_tokens", [5], [6]),
])  # fmt: skip
def test_positions_and_tokens_of_another_file_are_told(field, ours, theirs, tmp_path):
    def with_(value):
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **{field: value})
        return get_peft_model(llama(), config)

    with_(theirs).save_pretrained(tmp_path)
    with pytest.warns(ChangedConfigWarning, match=rf"{field}=\[.*\] instead of \["):
        with_(ours).load_adapter(tmp_path, "default")


def test_a_file_given_for_its_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match="this is a file; give the folder that contains it"):
        PeftModel.from_pretrained(mlp(), str(saved(tmp_path) / WEIGHTS))


# Misspelt arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "given", "meant"),
    [
        ("save", {"max_shard_sise": 10}, "max_shard_size"),
        ("save", {"safe_serialisation": False}, "safe_serialization"),
        ("save", {"verfy": True}, "verify"),
        ("from", {"is_trainble": True}, "is_trainable"),
        ("from", {"strct": True}, "strict"),
        ("load", {"subfoldr": "nowhere"}, "subfolder"),
        ("load", {"ignore_mismatched_size": True}, "ignore_mismatched_sizes"),
    ],
)
def test_a_misspelt_argument_is_told_with_the_nearest_one(call, given, meant, tmp_path):
    base = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path, state_dict=None, save_function=None)
    calls = {
        "save": lambda: model.save_pretrained(tmp_path, **given),
        "from": lambda: PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path, **given),
        "load": lambda: model.load_adapter(tmp_path, "new", **given),
    }
    with pytest.warns(PeftWarning, match=rf"no argument '{next(iter(given))}'.*Did you mean '{meant}'"):
        calls[call]()


def test_arguments_that_are_for_others_pass_without_a_word(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, save_function=torch.save, push_to_hub=False, state_dict=None)
        model.load_adapter(tmp_path, "new", device_map="auto", max_memory=None, offload_folder=None, token=None)


# Patterns without end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"(\w+)+[!?]"},
        {"target_modules": r"(a|aa)+b|c"},
        {"target_modules": ".*" * 30 + "[bc]"},
        {"target_modules": ["a" * 60], "rank_pattern": {r"(a|aa)+!": 3}},
        {"target_modules": ["a" * 60], "exclude_modules": r"((a|aa)+)+[!?]"},
    ],
)
def test_a_pattern_that_would_take_for_ever_ends(fields, tmp_path):
    pytest.importorskip("regex")
    net = nn.Module()
    net.add_module("a" * 60, nn.Linear(4, 4))
    get_peft_model(net, LoraConfig(target_modules=["a" * 60])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    base = nn.Module()
    base.add_module("a" * 60, nn.Linear(4, 4))
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"takes longer than a second|not found in"):
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(base, tmp_path)


def test_a_repeated_group_selects_as_ever():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    model = get_peft_model(net, LoraConfig(target_modules=r"(\d+\.)+1", rank_pattern={r"(\d\.)*1": 3}))
    assert model.targeted_module_names == ["0.1"] and model.base_model.model[0][1].r["default"] == 3
