"""Adapters that the original library (0.21.2) wrote: they load, compute, learn, merge and are saved here as there.

`golden/README.md` says what the files hold. Nothing in them was made by this library.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peft
from peft import PeftModel

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(folder.parent.name for folder in GOLDEN.glob("*/case.json"))

# Where the other library writes into the base weight (kasa, olora, pissa), or changes the output by merging one of two
# modules that share a weight, this library does what it promises instead, and the file's value is not asked for.
DISABLED_IS_THE_BASE = {"lora-kasa", "lora-olora", "lora-pissa"}
MERGED_IS_THE_OUTPUT = {"lora-llama-layer-replication", "lora-llama-tied-target-embed-tying"}
# Biases of the base are trained, or layers repeated: disabled is another model.
TRAINED_BASE = {
    *("boft-bias", "c3a-bias-all", "lora-bias-all", "lora-bias-lora-only", "oft-bias-only"),
    "lora-llama-layer-replication",
}

# Where the other library's gradient is not that of its own output: the gradient of C3A's input, which all that lies
# before a C3A layer gets, and those of LoHa's factors A with Tucker cores. Conformance tests hold ours to the formula.
NO_GRADIENT = {
    "boft-conv2d-dilated": "",
    "hra-conv2d-dilated": "",
    "oft-conv2d": "",
    "c3a-bias-all": r"layers\.0\.",
    "c3a-linear": r"layers\.0\.",
    "loha-effective-conv1d": r"hada_w\d_a",
    "loha-effective-conv2d": r"hada_w\d_a",
}

# Where the other library's forward is not that of its own merged weights: rotations of a convolution whose patches
# overlap, and those of a dilated one.
RUNS_AS_MERGED = {"boft-conv2d-dilated", "hra-conv2d-dilated", "oft-conv2d"}

# Tokens, or keys and values, beside the weights.
BESIDE = re.compile("prompt|ptuning|prefix|mpt|cpt|cartridge")

# Why there is no W' to merge into.
REFUSED = {
    "lora-alora": "some tokens only",
    "shadow": "depends on the input",
    "poly": "another update for each task",
    "lily": "as the input has it",
    BESIDE.pattern: "changes no weight",
}

# There is no W': the update depends on the input.
INPUT_MATTERS = {"adaption-prompt-gpt2", "adaption-prompt-llama", "adaption-prompt-mistral"}

# There, the vectors that all layers share are named as the first layer's.
NUMBERED = r"base_model\.model\..*\.(tinylora_v)\.default\.(\d+)"
SHARED = r"base_model\.model\..*\.(vblora_vector_bank|unilora_theta_d)"

RUNNING = 1e-4  # relative to the largest value: another order of float32 sums through a whole model
KEPT_FIELDS = {"peft_version", "base_model_name_or_path", "auto_mapping", "revision", "inference_mode"}


# ---- base models, as golden/README.md describes them -------------------------------------------------------------


class Matrix(nn.Module):
    """y = x W, with a bare parameter (in, out)."""

    def __init__(self, inp: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inp, out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Experts(nn.Module):
    """The mean over experts e of tanh(x up_e) down_e."""

    def __init__(self, count: int, inp: int, hidden: int, out: int):
        super().__init__()
        self.num_experts = count
        self.up = nn.Parameter(torch.zeros(count, inp, hidden))
        self.down = nn.Parameter(torch.zeros(count, hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("...i,eih->...eh", x, self.up))
        return torch.einsum("...eh,eho->...o", h, self.down) / self.num_experts


PLAIN = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "mean1": lambda x: x.mean(1),
    "pool": lambda x: x.flatten(2).mean(-1),
    "flatten": lambda x: x.flatten(1),
}


def layer(kind: str, a: dict[str, Any]) -> nn.Module:
    if kind == "Linear":
        return nn.Linear(a["in"], a["out"], bias=a.get("bias", True))
    if kind == "Conv1D":
        return pytest.importorskip("transformers").pytorch_utils.Conv1D(a["out"], a["in"])
    if kind.startswith("conv"):
        options = {k: a[k] for k in ("stride", "padding", "dilation", "groups", "bias") if k in a}
        return getattr(nn, kind.capitalize())(a["in"], a["out"], a["kernel"], **options)
    if kind == "Embedding":
        return nn.Embedding(a["num"], a["dim"])
    if kind == "MHA":
        return nn.MultiheadAttention(a["dim"], a["heads"], batch_first=True, bias=a.get("bias", True))
    if kind in ("LayerNorm", "BatchNorm1d"):
        return getattr(nn, kind)(a["dim"])
    if kind == "ParamLinear":
        return Matrix(a["in"], a["out"])
    assert kind == "Experts", kind
    return Experts(a["num"], a["in"], a["hidden"], a["out"])


class Chain(nn.Module):
    """Layers with dotted names, one after the other."""

    def __init__(self, layers: list[Any]):
        super().__init__()
        self.steps = [(name, kind) for name, kind, _ in layers]
        for name, kind, arguments in layers:
            if kind in PLAIN:
                continue
            *path, leaf = name.split(".")
            parent = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.add_module(leaf, layer(kind, arguments))

    def forward(self, x: Tensor) -> Tensor:
        for name, kind in self.steps:
            if kind in PLAIN:
                x = PLAIN[kind](x)
            elif kind == "MHA":
                x = self.get_submodule(name)(x, x, x, need_weights=False)[0]
            else:
                x = self.get_submodule(name)(x)
        return x


def base_model(case: dict[str, Any]) -> nn.Module:
    base = case["base"]
    if base["family"] == "chain":
        model: nn.Module = Chain(base["layers"])
    else:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, base["config"])(**base["kwargs"], attn_implementation="eager")
        model = getattr(transformers, base["model"])(config)
    result = model.load_state_dict(load_file(GOLDEN / "bases" / case["base_file"]), strict=False)
    assert not result.unexpected_keys
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


# ---- one case ----------------------------------------------------------------------------------------------------


@cache
def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "io.safetensors")


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With this folder as the working directory."""
    before = Path.cwd()
    try:
        os.chdir(folder)
        yield
    finally:
        os.chdir(before)


def adapted(name: str) -> PeftModel:
    """The base model with the case's adapters loaded and activated."""
    case, folder = read(name)[0], GOLDEN / name
    with warnings.catch_warnings(), inside(folder):  # X-LoRA's configuration names its experts by relative paths
        warnings.simplefilter("ignore")  # tied weights, settings of an init that conversion has replaced
        learns = case.get("trainable", True)  # prompts are loaded as what their network made
        model = PeftModel.from_pretrained(base_model(case), folder, is_trainable=learns)
        if not learns:
            model.set_requires_grad("default", True)
        for step in case.get("ops", []):
            if step["op"] == "load":
                model.load_adapter(folder / step["path"], step["name"], is_trainable=True)
            elif step["op"] == "add_weighted_adapter":
                model.add_weighted_adapter(**{k: v for k, v in step.items() if k not in ("op", "seed")})
            else:
                assert step["op"] in ("base_set_adapter", "set_adapter")
                (model.base_model if step["op"] == "base_set_adapter" else model).set_adapter(step["name"])
    return model.eval()


def run(model: nn.Module, name: str, **more: Any) -> Tensor:
    """The first float output: logits, or both logits of question answering, or the last hidden state."""
    io = read(name)[1]
    inputs = {key[6:]: value for key, value in io.items() if key.startswith("input.")}
    if isinstance(model, PeftModel):
        inputs.update({key[11:]: value for key, value in io.items() if key.startswith("peft_input.")})
    x = (inputs.pop("x"),) if "x" in inputs else ()
    out = model(*x, **inputs, **more)
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "start_logits"):
        return torch.cat([out.start_logits, out.end_logits], dim=-1)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def close(found: Tensor, wanted: Tensor, what: str = "") -> None:
    """Equal up to rounding, relative to the largest value."""
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)} is not {tuple(wanted.shape)}"
    slack = RUNNING * max(1e-3, wanted.abs().max().item())
    error = (found - wanted).abs().max().item()
    assert error <= slack, f"{what}: {error:.2e} apart, more than {slack:.0e}"


@pytest.mark.parametrize("name", CASES)
def test_the_output_is_the_same(name):
    case, io = read(name)
    model = adapted(name)
    with torch.no_grad():
        wanted = io["merged_output" if name in RUNS_AS_MERGED else "output"]
        close(run(model, name, **case.get("call", {})), wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", peft.PeftWarning)  # trained biases stay in force
            with model.disable_adapter():
                disabled = run(model, name)
        if name in TRAINED_BASE:
            close(disabled, io["disabled_output"])
            return
        assert torch.equal(disabled, run(base_model(case), name)), "the disabled model is not the base"
        off = name in DISABLED_IS_THE_BASE or "disabled_output" not in io
        close(disabled, io["base_output" if off else "disabled_output"])


@pytest.mark.parametrize("name", [n for n in CASES if any(key.startswith("grad.") for key in read(n)[1])])
def test_the_gradients_are_the_same(name):
    case, io = read(name)
    model = adapted(name)
    run(model, name, **case.get("call", {})).square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    wanted = {key[5:]: grad for key, grad in io.items() if key.startswith("grad.")}
    wanted = {re.sub(SHARED, r"base_model.\1", key): grad for key, grad in wanted.items()}
    wanted = {re.sub(NUMBERED, r"base_model.\1.\2.default", key): grad for key, grad in wanted.items()}
    assert wanted
    for key, grad in wanted.items():
        if name in NO_GRADIENT and re.search(NO_GRADIENT[name], key):
            assert found[key].any(), key
        else:
            close(found[key], grad, key)
    without = {n for n in set(found) - set(wanted) if found[n] is not None and found[n].any()}
    assert not without, "these have a gradient here only"


@pytest.mark.parametrize("name", [n for n in CASES if read(n)[0]["merge"]])
def test_the_merged_output_is_the_same(name):
    case, io = read(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", peft.PeftWarning)  # an untied embedding
        merged = adapted(name).merge_and_unload()
    assert type(merged) is type(base_model(case))
    assert not any("lora_" in n or "base_layer" in n for n, _ in merged.named_parameters())
    with torch.no_grad():
        close(run(merged, name), io["output" if name in MERGED_IS_THE_OUTPUT else "merged_output"])


@pytest.mark.parametrize("name", [n for n in CASES if not read(n)[0]["merge"]])
def test_what_is_not_merged_there_says_why_or_keeps_the_output_here(name):
    why = next((words for kind, words in REFUSED.items() if re.match(kind, name)), None)
    if why is not None:
        with pytest.raises(NotImplementedError, match=why):
            adapted(name).merge_and_unload()
        return
    if name in INPUT_MATTERS:
        with pytest.raises(ValueError, match="depend on the input"):
            adapted(name).merge_and_unload()
        return
    if name == "beft-linear-nobias":
        with pytest.raises(RuntimeError, match="has none to merge it into"):
            adapted(name).merge_and_unload()
        return
    if "grouped" not in name:
        merged = adapted(name).merge_and_unload()
        alone = adapted(name)
        with torch.no_grad():
            close(run(merged, name), run(alone, name))
        return
    with pytest.raises(NotImplementedError, match=r"groups=\d"):
        adapted(name).merge_and_unload()


@pytest.mark.parametrize("name", CASES)
def test_the_saved_files_are_the_same(name, tmp_path):
    model = adapted(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", peft.PeftWarning)  # targeted embeddings are saved with a word
        model.save_pretrained(tmp_path)
    for folder in read(name)[0].get("saved", {"default": "."}).values():
        if folder is None:  # X-LoRA's gate is saved incompletely there
            continue
        there = load_file(GOLDEN / name / folder / "adapter_model.safetensors")
        here = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert here.keys() == there.keys()
        for key, value in there.items():
            assert here[key].dtype is value.dtype
            if folder == "mix" or "_topk_" in key:  # computed here
                close(here[key], value, key)
            else:
                assert torch.equal(here[key], value), key
        assert values(tmp_path / folder) == values(GOLDEN / name / folder)


def values(folder: Path) -> dict[str, Any]:
    """What a configuration file says of the adapter; sets of names are written in any order."""
    found = json.loads((folder / "adapter_config.json").read_text())
    ordered = ("target_modules", "exclude_modules")
    return {
        key: sorted(value) if key in ordered and isinstance(value, list) else value
        for key, value in found.items()
        if key not in KEPT_FIELDS
    }


def test_every_base_is_used():
    assert len(CASES) == 225
    used = {read(name)[0]["base_file"] for name in CASES}
    assert used == {file.name for file in (GOLDEN / "bases").iterdir()}
