"""Merging from files to files: the same bits as in memory, whole or not at all, and nothing lost on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft
import test_golden as golden
from conformance.rows import LAYOUTS, METHODS, adapted, cells
from peft import PeftModel, get_peft_model, merge_checkpoint
from peft.stream import CheckpointError

transformers = pytest.importorskip("transformers")

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = 40


def llama(**changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(**{"vocab_size": VOCABULARY, "num_key_value_heads": 2, **SIZES, **changes})
    return transformers.LlamaForCausalLM(config)


def mixtral(**changes: Any) -> nn.Module:
    own = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "num_local_experts": 3, **SIZES, **changes}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**own))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **SIZES)
    return transformers.BertForMaskedLM(config)


def qwen() -> nn.Module:
    """Its configuration has a list with a value for each layer."""
    own = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, **SIZES, "num_hidden_layers": 3}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    own.update(use_sliding_window=True, sliding_window=2, layer_types=kinds)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**own))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "down_proj"]),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), ["q_proj", "down_proj"]),
    "mixtral": (mixtral, ["q_proj", "o_proj"]),
    "t5": (t5, ["q", "wo"]),
    "bert": (bert, ["query", "output.dense"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
}


def checkpoint(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32, shard: str = "10KB") -> Path:
    """A base model in a folder, in several shards."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_()
    model.to(dtype).save_pretrained(str(folder), max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def trained(folder: Path, base: Path, config: Any, seed: int = 1, kind: Any = None) -> Path:
    """An adapter for it, with numbers as training leaves them."""
    model = get_peft_model(load(base, kind), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.copy_(p + noise * (0.01 if "magnitude" in name else 0.1))
    model.save_pretrained(str(folder))
    return folder


def load(base: Path, kind: Any = None) -> nn.Module:
    if kind is None:
        kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(str(base), dtype="auto")


def in_memory(out: Path, base: Path, *adapters: Path, weights: Any = None, kind: Any = None) -> Path:
    """The same merge by loading the model."""
    model = PeftModel.from_pretrained(load(base, kind), str(adapters[0]), adapter_name="a0")
    for i, folder in enumerate(adapters[1:], 1):
        model.load_adapter(str(folder), f"a{i}")
    names = [f"a{i}" for i in range(len(adapters))]
    model.base_model.set_adapter(names)
    for name, weight in zip(names, weights or [1] * len(names), strict=True):
        for module in model.modules():
            if weight != 1 and hasattr(module, "set_scale"):
                module.set_scale(name, weight)
    model.base_model.merge_and_unload().save_pretrained(str(out), max_shard_size="10KB")
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the index if it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    held = {name: load_file(folder / name) for name in set(places.values())}
    assert {k: n for n, h in held.items() for k in h} == places
    return {key: held[name][key] for key, name in places.items()}


def same(found: Path, wanted: Path, more: Any = ()) -> None:
    """The same keys and bits; `found` may hold `more` keys, which the base's files have too."""
    got, want = tensors(found), tensors(wanted)
    assert set(got) - set(more) == set(want) - set(more)
    for key in want:
        assert got[key].dtype is want[key].dtype
        assert torch.equal(got[key], want[key]), key


def unfinished(out: Path) -> list[Path]:
    """What a merge has left beside its output."""
    return [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]


# The same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_the_files_are_those_of_a_merge_in_memory(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, targets = MODELS[model]
    base = checkpoint(tmp_path / "base", make(), dtype)
    config = peft.LoraConfig(r=2, target_modules=targets, use_rslora=True, fan_in_fan_out=model == "gpt2")
    adapter = trained(tmp_path / "adapter", base, config)
    done = merge_checkpoint(base, adapter, tmp_path / "out")
    same(tmp_path / "out", in_memory(tmp_path / "want", base, adapter))
    assert done.changed
    assert not done.added
    assert not unfinished(tmp_path / "out")
    load(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()}


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.merges])
@pytest.mark.parametrize("layout", ["linear", "embedding", "parameter-3-D-transposed", "conv-2d"])
def test_every_method_gives_the_bits_of_a_merge_in_memory(method: str, layout: str, tmp_path: Path) -> None:
    if (method, layout) not in cells(merged=True):
        pytest.skip("the method has no place on this layout")
    make = LAYOUTS[layout].model
    dtype = torch.bfloat16
    adapted(method, LAYOUTS[layout], dtype).save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "base").mkdir()
    save_file(make(dtype).state_dict(), tmp_path / "base" / "model.safetensors")
    wanted = PeftModel.from_pretrained(make(dtype), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", model=make(dtype))
    got = tensors(tmp_path / "out")
    assert set(got) == set(wanted)
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize("original", [True, False], ids=["files of each expert", "files of fused experts"])
@pytest.mark.parametrize("router", [False, True])
def test_experts_are_merged_whatever_form_their_files_have(original: bool, router: bool, tmp_path: Path) -> None:
    model = mixtral().to(torch.bfloat16)
    model.save_pretrained(str(tmp_path / "base"), max_shard_size="6KB", save_original_format=original)
    fields = {**EXPERTS, "target_parameters": [*EXPERTS["target_parameters"], *["gate.weight"] * router]}
    adapter = trained(tmp_path / "adapter", tmp_path / "base", peft.LoraConfig(r=2, **fields))
    done = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    in_memory(tmp_path / "want", tmp_path / "base", adapter)
    got, want = load(tmp_path / "out").state_dict(), load(tmp_path / "want").state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert set(tensors(tmp_path / "out")) == set(tensors(tmp_path / "base"))
    assert len(done.changed) == 2 * (3 * 3 if original else 2) + 2 * router


def test_a_base_without_its_head_gets_its_adapters(tmp_path: Path) -> None:
    """Keys of the bare model, `layers.0...`, belong to `model.layers.0...` of the model with a head."""
    whole = llama(tie_word_embeddings=True)
    checkpoint(tmp_path / "whole", whole)
    whole.model.save_pretrained(str(tmp_path / "base"), max_shard_size="10KB")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    adapter = trained(tmp_path / "adapter", tmp_path / "whole", config)
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    merge_checkpoint(tmp_path / "whole", adapter, tmp_path / "want")
    got, want = tensors(tmp_path / "out"), tensors(tmp_path / "want")
    assert {f"model.{k}" for k in got} == set(want)
    assert all(torch.equal(v, want[f"model.{k}"]) for k, v in got.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == settings


# Whole modules, tokens, tied weights --------------------------------------------------------------------------

TIES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "copy of the embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "copies as one": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", TIES)
def test_tied_weights_part_as_they_do_in_memory(case: str, tied: bool, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama(tie_word_embeddings=tied), torch.bfloat16)
    adapter = trained(tmp_path / "adapter", base, peft.LoraConfig(r=2, **TIES[case]))
    merge_checkpoint(base, adapter, tmp_path / "out")
    same(tmp_path / "out", in_memory(tmp_path / "want", base, adapter))
    found, wanted = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("out", "want"))
    assert found["tie_word_embeddings"] is wanted["tie_word_embeddings"]
    assert len(tensors(tmp_path / "out")) == len(tensors(base)) + (tied and not wanted["tie_word_embeddings"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["shared"], ["lm_head"]])
def test_a_model_without_an_untied_form_gets_every_tied_weight(targets: list[str], tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", t5())
    adapter = trained(tmp_path / "adapter", base, peft.LoraConfig(r=2, target_modules=targets))
    merge_checkpoint(base, adapter, tmp_path / "out")
    got = load(tmp_path / "out").state_dict()
    want = load(in_memory(tmp_path / "want", base, adapter)).state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.filterwarnings("ignore")
def test_an_update_of_nothing_leaves_tied_weights_tied(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama(tie_word_embeddings=True))
    model = get_peft_model(load(base), peft.LoraConfig(r=2, target_modules=["lm_head"]))  # B is zero
    model.save_pretrained(str(tmp_path / "adapter"))
    done = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert not done.added
    same(tmp_path / "out", base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("equal", [True, False])
def test_files_that_hold_both_tied_weights_keep_both(equal: bool, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama(tie_word_embeddings=True), shard="1GB")
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone() + (not equal)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    adapter = trained(tmp_path / "adapter", base, config)
    merge_checkpoint(base, adapter, tmp_path / "out")
    same(tmp_path / "out", in_memory(tmp_path / "want", base, adapter))


def test_a_new_head_comes_from_the_adapter(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama(pad_token_id=0))
    kind = transformers.LlamaForSequenceClassification
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    adapter = tmp_path / "adapter"
    model = get_peft_model(kind.from_pretrained(str(base), num_labels=3), config)
    nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(str(adapter))
    done = merge_checkpoint(base, adapter, tmp_path / "out")
    assert done.added == ["score.weight"]
    merged = kind.from_pretrained(str(tmp_path / "out"))
    assert torch.equal(merged.score.weight, model.base_model.model.score.modules_to_save["default"].weight)
    assert merged.config.num_labels == 3


def test_trained_biases_are_merged(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", bert(), torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only", lora_bias=True)
    adapter = trained(tmp_path / "adapter", base, config)
    done = merge_checkpoint(base, adapter, tmp_path / "out")
    same(tmp_path / "out", in_memory(tmp_path / "want", base, adapter))
    assert {k.rpartition(".")[2] for k in done.changed} == {"weight", "bias"}


SHARED = {
    "vera": peft.VeraConfig(
        r=4,
        target_modules=["q_proj", "k_proj"],
    ),
    "vblora": peft.VBLoRAConfig(r=2, target_modules=["q_proj", "down_proj"], num_vectors=8, vector_length=8),
    "randlora": peft.RandLoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj", "down_proj"], total_step=10),
    "ln_tuning": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "ia3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(target_modules=["q_proj", "down_proj"], oft_block_size=4),
    "pissa": peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"),
}


@pytest.mark.parametrize("method", SHARED)
def test_methods_that_share_or_derive_tensors_are_merged(method: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama())
    adapter = trained(tmp_path / "adapter", base, SHARED[method])
    merge_checkpoint(base, adapter, tmp_path / "out")
    same(tmp_path / "out", in_memory(tmp_path / "want", base, adapter))


def original(name: str, tmp_path: Path) -> tuple[Path, Path, Path, nn.Module]:
    """Base, adapter and output of a case of the original library, and its base model."""
    case = golden.read(name)[0]
    (tmp_path / "base").mkdir()
    shutil.copy(golden.GOLDEN / "bases" / case["base_file"], tmp_path / "base" / "model.safetensors")
    return tmp_path / "base", golden.GOLDEN / name, tmp_path / "out", golden.base_model(case)


OVER_LLAMA = [name for name in golden.CASES if "-llama" in name]
BESIDE = re.compile(golden.BESIDE.pattern + "|adaption-prompt|-alora|shadow|poly|lily|xlora")
CHANCE = re.compile("adamss")  # its rows are equally far from each other, so that rounding deals them out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in OVER_LLAMA if not BESIDE.search(n) and not CHANCE.search(n)])
def test_adapters_of_the_original_library_are_merged(name: str, tmp_path: Path) -> None:
    base, adapter, out, model = original(name, tmp_path)
    merge_checkpoint(base, adapter, out, model=model)
    wanted = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in tensors(out).items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in OVER_LLAMA if BESIDE.search(name)])
def test_adapters_that_no_weight_can_hold_are_refused(name: str, tmp_path: Path) -> None:
    base, adapter, out, model = original(name, tmp_path)
    with golden.inside(adapter):  # where X-LoRA's configuration has its experts
        refused("merge|Load the base", base, adapter, out, (ValueError, NotImplementedError), model=model)


# Several adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_are_merged_in_order_times_their_weights(dora: bool, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama(), torch.bfloat16)
    one = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=dora)
    two = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=3)
    folders = [trained(tmp_path / f"{i}.5", base, c, seed=i) for i, c in enumerate((one, two))]
    merge_checkpoint(base, folders, tmp_path / "out", weights=[0.7, -1.5])
    same(tmp_path / "out", in_memory(tmp_path / "want", base, *folders, weights=[0.7, -1.5]))


def test_a_weight_scales_what_the_adapter_adds(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama())
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    adapter = trained(tmp_path / "adapter", base, config)
    for name, weight in (("whole", 1), ("half", 0.5)):
        merge_checkpoint(base, adapter, tmp_path / name, weights=[weight])
    start, whole, half = (tensors(tmp_path / n) for n in ("base", "whole", "half"))
    for key in start:
        torch.testing.assert_close(half[key] - start[key], (whole[key] - start[key]) / 2)


def test_a_weight_is_refused_where_nothing_can_be_scaled(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama())
    adapter = trained(tmp_path / "adapter", base, peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4))
    with pytest.raises(CheckpointError, match=r"weight 0.5.*no scaling at .*q_proj"):
        merge_checkpoint(base, adapter, tmp_path / "out", weights=[0.5])
    with pytest.raises(CheckpointError, match="1 adapters need as many weights, but 2"):
        merge_checkpoint(base, adapter, tmp_path / "out", weights=[1, 1])
    with pytest.raises(CheckpointError, match="must be a finite number"):
        merge_checkpoint(base, adapter, tmp_path / "out", weights=[float("nan")])


def test_a_weight_leaves_whole_modules_as_they_are_and_says_so(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama())
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[2])
    adapter = trained(tmp_path / "adapter", base, config)
    with pytest.warns(peft.PeftWarning, match=r"'model.embed_tokens.token_adapter',.*'model.norm'.*as they are"):
        merge_checkpoint(base, adapter, tmp_path / "out", weights=[0.5])
    same(tmp_path / "out", in_memory(tmp_path / "want", base, adapter, weights=[0.5]))


# Without a class of transformers ------------------------------------------------------------------------------


class Plain(nn.Module):
    """A model of nobody's library: an embedding tied to its head, a convolution, a norm."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 16, dtype=dtype)
        self.mix = nn.Conv1d(16, 16, 3, groups=2, dtype=dtype)
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.inner = nn.Linear(16, 8, dtype=dtype)
        self.head = nn.Linear(16, VOCABULARY, bias=False, dtype=dtype)
        self.head.weight = self.words.weight
        self.register_buffer("steps", torch.tensor(3))


def plain(tmp_path: Path, config: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[Plain, Path, Path]:
    """A model, its folder and an adapter's."""
    torch.manual_seed(0)
    model = Plain(dtype)
    (tmp_path / "base").mkdir()
    state = {k: v for k, v in model.state_dict().items() if k != "head.weight"}
    save_file(state, tmp_path / "base" / "model.safetensors")
    wrapped = get_peft_model(Plain(dtype), config)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.normal_()
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    return model, tmp_path / "base", tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["words", "inner"], ["mix", "inner"], ["head"]])
def test_a_plain_module_is_merged(targets: list[str], tmp_path: Path) -> None:
    model, base, adapter = plain(tmp_path, peft.LoHaConfig(r=2, target_modules=targets[-1:]))
    if targets[0] != targets[-1]:
        shutil.rmtree(adapter)
        wrapped = get_peft_model(Plain(torch.bfloat16), peft.IA3Config(target_modules=targets, feedforward_modules=[]))
        for p in wrapped.parameters():
            p.data.normal_() if p.requires_grad else None
        wrapped.save_pretrained(str(adapter))
    wanted = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    merge_checkpoint(base, adapter, tmp_path / "out", model=Plain(torch.bfloat16))
    got = tensors(tmp_path / "out")
    assert all(torch.equal(got[k], wanted[k]) for k in got)
    assert ("head.weight" in got) is (targets != ["mix", "inner"])


@pytest.mark.filterwarnings("ignore:The adapter changed only some", "ignore:Adapter 'default' was saved from another")
def test_modules_are_guessed_from_the_files_with_a_warning(tmp_path: Path) -> None:
    model, base, adapter = plain(tmp_path, peft.LoraConfig(r=2, target_modules=["words", "inner"]))
    model.head = nn.Linear(1, 1)  # the guess knows of no tie
    wanted = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    with pytest.warns(peft.PeftWarning, match="is not known here.*taken for linear layers"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    got = tensors(tmp_path / "out")
    assert all(torch.equal(got[k], wanted[k]) for k in got)


def test_what_cannot_be_guessed_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["inner"])
    _, base, adapter = plain(tmp_path, config)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_parameters": ["inner.weight"]}))
    with pytest.raises(CheckpointError, match=r"target_parameters=\['inner.weight'\] needs it.*model=\.\.\."):
        merge_checkpoint(base, adapter, tmp_path / "out")


# Interrupted --------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from peft import merge_checkpoint
from peft.stream import shards
begun, copy = [], shards.ShardWriter.copy
def dying(self, stored):
    copy(self, stored)
    begun.append(self.file)
    if len(set(begun)) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
shards.ShardWriter.copy = dying
merge_checkpoint(*sys.argv[1:4])
"""


def small(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, adapter, and where the merged model goes."""
    base = checkpoint(tmp_path / "base", llama(), torch.bfloat16, shard="4KB")
    adapter = trained(tmp_path / "adapter", base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    return base, adapter, tmp_path / "out"


def killed(base: Path, adapter: Path, out: Path, shard: int = 3) -> Path:
    """A merge that dies within a shard; where it had got to."""
    arguments = [sys.executable, "-c", KILLED, str(base), str(adapter), str(out), str(shard)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    return out.parent / f".{out.name}.merging"


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, Path, Path]]:
    """A merge that died within its third shard, as it was left each time that it is called: base, adapter, output."""
    place, kept = tmp_path_factory.mktemp("died"), tmp_path_factory.mktemp("kept") / "died"
    paths = small(place)
    killed(*paths)
    shutil.copytree(place, kept)

    def again() -> tuple[Path, Path, Path]:
        shutil.rmtree(place)
        shutil.copytree(kept, place)
        return paths

    return again


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_merge_goes_on_where_it_was(tmp_path: Path, died: Any) -> None:
    base, adapter, out = died()
    stage = out.parent / ".out.merging"
    whole = sorted(stage.iterdir())[:2]
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in whole]
    done = merge_checkpoint(base, adapter, out)
    assert done.resumed == [p.name for p in whole]
    assert before == [((out / p.name).stat().st_ino, (out / p.name).stat().st_mtime_ns) for p in whole]
    assert not unfinished(out)
    same(out, in_memory(tmp_path / "want", base, adapter))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("fault", ["flipped", "cut", "gone", "record"])
def test_a_finished_shard_that_is_no_longer_whole_is_made_anew(fault: str, tmp_path: Path, died: Any) -> None:
    base, adapter, out = died()
    stage = out.parent / ".out.merging"
    first, second, *_ = sorted(stage.iterdir())
    raw = first.read_bytes()
    if fault == "flipped":
        first.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif fault == "cut":
        first.write_bytes(raw[:-1])
    elif fault == "gone":
        first.unlink()
    else:
        record = out.parent / ".out.merging.json"
        record.write_text(record.read_text()[:-9])  # the last line is cut
    done = merge_checkpoint(base, adapter, out)
    assert done.resumed == [first.name if fault == "record" else second.name]
    same(out, in_memory(tmp_path / "want", base, adapter))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("change", ["adapter", "weight", "base"])
def test_another_merge_does_not_go_on_from_it(change: str, tmp_path: Path, died: Any) -> None:
    base, adapter, out = died()
    weights = [0.5] if change == "weight" else None
    if change == "adapter":
        trained(adapter, base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), seed=7)
    elif change == "base":
        os.utime(next(base.glob("*.safetensors")), ns=(1, 1))
    assert merge_checkpoint(base, adapter, out, weights=weights).resumed == []
    same(out, in_memory(tmp_path / "want", base, adapter, weights=weights))


# Faults -------------------------------------------------------------------------------------------------------


def refused(words: str, base: Any, adapter: Any, out: Path, kind: Any = ValueError, **options: Any) -> None:
    """The merge raises, and nothing is left at the output or beside it."""
    with pytest.raises(kind, match=words):
        merge_checkpoint(base, adapter, out, **options)
    assert not out.exists()
    assert not unfinished(out)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    gone = sorted(base.glob("*.safetensors"))[1]
    gone.unlink()
    refused(rf"lacks 1 of its \d+ shards: '{gone.name}'", base, adapter, out)


@pytest.mark.parametrize("left", [-5, 100, 4, 0])
def test_a_truncated_shard_is_named(left: int, tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    cut = sorted(base.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:left])
    refused(rf"{cut.name} is no complete safetensors file.*truncated", base, adapter, out)


@pytest.mark.parametrize("fault", ["header", "length", "index", "names", "outside"])
def test_a_damaged_file_is_named(fault: str, tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    shard, index = sorted(base.glob("*.safetensors"))[0], base / "model.safetensors.index.json"
    raw, table = shard.read_bytes(), json.loads(index.read_text())
    if fault == "header":
        shard.write_bytes(raw[:8] + b"[" + raw[9:])
    elif fault == "length":
        shard.write_bytes(b"\xff" * 8 + raw[8:])
    elif fault == "index":
        index.write_text("{")
    elif fault == "names":
        table["weight_map"]["model.more.weight"] = shard.name
    else:
        table["weight_map"]["model.norm.weight"] = f"../{shard.name}"
    if fault in ("names", "outside"):
        index.write_text(json.dumps(table))
    refused(shard.name if fault in ("header", "length") else index.name, base, adapter, out)


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    other = checkpoint(tmp_path / "other", llama(hidden_size=32), torch.bfloat16)
    refused("q_proj.*another shape|size mismatch", other, adapter, out, (ValueError, RuntimeError))
    fewer = checkpoint(tmp_path / "fewer", llama(num_hidden_layers=1), torch.bfloat16)
    refused(r"layers\.1\.", fewer, adapter, out)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "intermediate_size": 25}))
    refused(r"mlp.*\(24, 16\) in the files, \(25, 16\) in the model", base, adapter, out)


def test_a_base_that_only_looks_like_the_adapters_own_is_told(tmp_path: Path) -> None:
    _, adapter, out = small(tmp_path)
    other = checkpoint(tmp_path / "other", llama(intermediate_size=24, vocab_size=44), torch.bfloat16)
    with pytest.warns(peft.errors.OtherBaseWarning, match=r"another base.*embed_tokens.*40x16.*44x16"):
        merge_checkpoint(other, adapter, out)


def test_tensors_of_the_adapter_without_a_place_are_named(tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    save_file({**held, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}, file)
    refused(r"no place.*\n.*layers\.9\.self_attn", base, adapter, out)
    save_file(dict(list(held.items())[1:]), file)
    refused(r"lacks 1 tensors", base, adapter, out)


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
def test_a_merge_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    key = next(k for k in held if "layers.1" in k and "lora_B" in k)
    save_file({**held, key: held[key] * torch.inf}, file)
    refused("layers.1.*not finite", base, adapter, out)


def test_the_output_is_no_folder_that_holds_anything(tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    before = {p: p.read_bytes() for p in base.iterdir()}
    for place in (base, adapter, base / "merged", tmp_path, base / ".." / "base"):
        with pytest.raises(CheckpointError, match=r"choose another folder|exists already"):
            merge_checkpoint(base, adapter, place)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        merge_checkpoint(base, adapter, tmp_path / "full")
    out.mkdir()
    merge_checkpoint(base, adapter, out)
    assert before == {p: p.read_bytes() for p in base.iterdir()}


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, out = small(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore
    with pytest.raises(OSError, match=r"needs 0.00 GB more .* 0.00 GB are free"):
        merge_checkpoint(base, adapter, out)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))


def test_a_disk_that_gets_full_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.stream.shards import ShardWriter

    base, adapter, out = small(tmp_path)
    put, room = ShardWriter._put, [12_000]

    def full(self: ShardWriter, data: Any) -> None:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        put(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_put", full)
        with pytest.raises(OSError, match=r"disk of .*out is full.*kept"):
            merge_checkpoint(base, adapter, out)
    assert not out.exists()
    assert merge_checkpoint(base, adapter, out).resumed
    same(out, in_memory(tmp_path / "want", base, adapter))


def test_what_changes_no_weights_is_refused_by_its_name(tmp_path: Path) -> None:
    base, _, out = small(tmp_path)
    model = get_peft_model(load(base), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(str(tmp_path / "prompt"))
    refused("PROMPT_TUNING, which adds tokens.*cannot be merged", base, tmp_path / "prompt", out)


@pytest.mark.filterwarnings("ignore:The (weight of|adapter changed|embeddings)")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["embed_tokens", "down_proj"]])
def test_what_only_the_whole_base_tells_is_made_from_its_files(
    targets: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base", llama(tie_word_embeddings="embed_tokens" in targets), dtype)
    config = peft.FrodConfig(target_modules=targets, save_projection=False)
    adapter = trained(tmp_path / "adapter", base, config)
    merge_checkpoint(base, adapter, tmp_path / "out")
    same(tmp_path / "out", in_memory(tmp_path / "want", base, adapter))


# Layers that are repeated --------------------------------------------------------------------------------------

REPEATED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[list[int]]]] = {
    "llama": (lambda: llama(num_hidden_layers=3), {"target_modules": ["q_proj", "down_proj"]}, [[0, 2], [1, 3]]),
    "fewer": (lambda: llama(num_hidden_layers=3), {"target_modules": ["q_proj"]}, [[2, 3], [0, 1]]),
    "dora": (llama, {"target_modules": ["q_proj"], "use_dora": True}, [[0, 2], [0, 2]]),
    "tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["v_proj"]}, [[0, 2], [1, 2]]),
    "whole": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}, [[0, 1], [0, 2]]),
    "bert": (bert, {"target_modules": ["query"], "bias": "lora_only"}, [[0, 2], [1, 2]]),
    "gpt2": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, [[0, 1], [0, 2]]),
    "mixtral": (
        mixtral,
        {"target_modules": ["q_proj"], **{"target_parameters": ["experts.down_proj"]}},
        [[1, 2], [0, 2]],
    ),
    "qwen": (qwen, {"target_modules": ["q_proj"]}, [[0, 2], [1, 3]]),
}


def replicated_in_memory(base: Path, adapter: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and configuration of the merged model; transformers does not save layers that share their weights."""
    merged = PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload()
    return merged.state_dict(), merged.config


@pytest.mark.filterwarnings("ignore:The (weight of|adapter changed)")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REPEATED)
def test_repeated_layers_become_layers_of_the_merged_files(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, fields, ranges = REPEATED[case]
    base = checkpoint(tmp_path / "base", make(), dtype)
    adapter = trained(tmp_path / "adapter", base, peft.LoraConfig(r=2, layer_replication=ranges, **fields))
    done = merge_checkpoint(base, adapter, tmp_path / "out")
    wanted, config = replicated_in_memory(base, adapter)
    merged = load(tmp_path / "out")
    got = merged.state_dict()
    assert set(got) == set(wanted)
    assert all(got[k].dtype is wanted[k].dtype and torch.equal(got[k], wanted[k]) for k in wanted)
    count = sum(stop - start for start, stop in ranges)
    assert merged.config.num_hidden_layers == config.num_hidden_layers == count
    assert getattr(merged.config, "layer_types", None) == getattr(config, "layer_types", None)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert done.added == [k for k in done.added if k in after and k not in before]
    assert set(done.added) == set(after) - set(before)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in after.values())
    if dtype is torch.float32:
        live, ids = PeftModel.from_pretrained(load(base), str(adapter)).eval(), torch.arange(6)[None]
        torch.testing.assert_close(merged.eval()(ids).logits, live(ids).logits, rtol=1e-3, atol=1e-3)


def test_repeated_layers_of_a_single_file_without_a_configuration(tmp_path: Path) -> None:
    """Tensors that the model does not know go with their layer too."""
    model = llama()
    base = checkpoint(tmp_path / "base", model, shard="1GB")
    held = load_file(base / "model.safetensors")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((3,), float(i)) for i in range(2)}
    save_file({**held, **extra}, base / "model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[1, 2], [0, 2]])
    adapter = trained(tmp_path / "adapter", base, config)
    (base / "config.json").unlink()
    merge_checkpoint(base, adapter, tmp_path / "out", model=model)
    got = tensors(tmp_path / "out")
    assert [got[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"][0].item() for i in range(3)] == [1, 0, 1]
    assert len(got) == len(held) + 2 + len([k for k in held if ".layers.1." in k]) + 1
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_merge_of_repeated_layers_goes_on(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama(), torch.bfloat16, shard="4KB")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 1]])
    adapter = trained(tmp_path / "adapter", base, config)
    stage = killed(base, adapter, tmp_path / "out")
    whole = sorted(p.name for p in stage.iterdir())[:2]
    assert merge_checkpoint(base, adapter, tmp_path / "out").resumed == whole
    wanted, _ = replicated_in_memory(base, adapter)
    got = load(tmp_path / "out").state_dict()
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)


def test_adapters_of_repeated_layers_are_merged_together_if_the_first_repeats_them(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", llama())
    ranges = [[0, 2], [1, 2]]
    one, two = (
        trained(tmp_path / f"a{i}", base, peft.LoraConfig(r=2, target_modules=[t], layer_replication=ranges), seed=i)
        for i, t in enumerate(["q_proj", "v_proj"])
    )
    plain_ = trained(tmp_path / "plain", base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    merge_checkpoint(base, [one, two], tmp_path / "out", weights=[1, 0.5])
    model = PeftModel.from_pretrained(load(base), str(one), adapter_name="a0")
    model.load_adapter(str(two), "a1")
    model.base_model.set_adapter(["a0", "a1"])
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a1", 0.5)
    wanted, got = model.merge_and_unload().state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    refused(r"a0 repeats layers.*first adapter is for the layers as they are", base, [plain_, one], tmp_path / "other")


def test_ranges_that_the_base_has_not_are_refused(tmp_path: Path) -> None:
    base, _, out = small(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    adapter = trained(tmp_path / "repeated", base, config)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": [[0, 2], [1, 5]]}))
    refused(r"layer_replication has the range \[1, 5\]", base, adapter, out)


# Packed numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mark", "who"), [
    ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes, 4 bits"),
    ("model.layers.0.mlp.up_proj.SCB", "bitsandbytes, 8 bits"),
    ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
    ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
])  # fmt: skip
def test_packed_weights_are_told_by_their_tensors(mark: str, who: str, tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    file = sorted(base.glob("*.safetensors"))[0]
    save_file({**load_file(file), mark: torch.zeros(3, dtype=torch.uint8)}, file, metadata={"format": "pt"})
    refused(rf"quantised \({who}\): it holds '{mark}'.*quantised from.*merge_and_unload", base, adapter, out)
    refused("quantised", base, adapter, out, model=llama())


def test_packed_numbers_are_refused(tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq"}}))
    refused(r"quantised \(gptq\): so its config.json says.*quantised from.*merge in memory", base, adapter, out)
    refused(r"quantised \(gptq\)", base, adapter, out, model=llama())
    (base / "config.json").write_text(json.dumps(settings))
    for file in base.glob("*.safetensors"):
        held = load_file(file)
        save_file({k: v.to(torch.float8_e4m3fn) if "q_proj" in k else v for k, v in held.items()}, file)
    refused(r"q_proj.*stored as torch.float8_e4m3fn", base, adapter, out)


def test_pickles_and_empty_folders_are_no_base(tmp_path: Path) -> None:
    _, adapter, out = small(tmp_path)
    refused("no folder.*hf download", "some/model", adapter, out)
    (tmp_path / "old").mkdir()
    refused("no safetensors weights", tmp_path / "old", adapter, out)
    (tmp_path / "old" / "pytorch_model.bin").touch()
    refused("pickle 'pytorch_model.bin'", tmp_path / "old", adapter, out)


def test_two_merges_do_not_write_to_one_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    base, adapter, out = small(tmp_path)
    with open(tmp_path / ".out.merging.json", "a+") as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="Another process"):
            merge_checkpoint(base, adapter, out)
    merge_checkpoint(base, adapter, out)


# Files --------------------------------------------------------------------------------------------------------


def test_other_files_are_copied_and_what_is_not_is_told(tmp_path: Path) -> None:
    base, adapter, out = small(tmp_path)
    (base / "vocab.txt").write_text("words")
    (base / "pytorch_model.bin").touch()
    (base / "original").mkdir()
    done = merge_checkpoint(base, adapter, out)
    assert done.left == ["pytorch_model.bin", "original/"]
    assert (out / "vocab.txt").read_text() == "words"
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_tensors_that_no_adapter_touches_keep_their_bytes(tmp_path: Path) -> None:
    """Also those that torch, or the model, knows nothing of; remarks and the order of tensors stay too."""
    base, adapter, out = small(tmp_path)
    shard = sorted(base.glob("*.safetensors"))[0]
    held = load_file(shard)
    save_file({**held, "extra.mask": torch.tensor([True, False, True])}, shard, metadata={"format": "pt", "by": "me"})
    index = base / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["extra.mask"] = shard.name
    index.write_text(json.dumps(table))
    merge_checkpoint(base, adapter, out)
    assert torch.equal(tensors(out)["extra.mask"], torch.tensor([True, False, True]))
    length = int.from_bytes(shard.read_bytes()[:8], "little") + 8
    assert (out / shard.name).read_bytes()[:length] == shard.read_bytes()[:length]


@pytest.mark.parametrize("weight", [[], ["--weight", "0.5"]])
def test_the_command_does_the_same(weight: list[str], tmp_path: Path) -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    from peft.cli.app import build_app

    base, adapter, out = small(tmp_path)
    command = ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out), *weight]
    done = runner.invoke(build_app(), command)
    assert done.exit_code == 0, done.output
    assert "4 tensors" in done.output
    same(out, in_memory(tmp_path / "want", base, adapter, weights=[0.5] if weight else None))
    assert runner.invoke(build_app(), command).exit_code == 2
