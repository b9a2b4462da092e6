"""Looking into adapters: what a folder holds, what is wrong with it, and whether it fits a base model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft import LoHaConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from peft.convert import ConversionError
from peft.errors import PeftError
from peft.inspection import UnreadableAdapterError, check_adapter, inspect_adapter

GOLDEN = sorted(f.parent for f in (Path(__file__).parent / "golden").rglob("adapter_config.json"))
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict({"query": nn.Linear(6, width), "value": nn.Linear(6, width, bias=False)})
    return nn.ModuleDict({"embed": nn.Embedding(10, 6), "block": block, "head": nn.Linear(width, 3)})


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"], **changes})


def saved(folder: Path, made: Any, base: nn.Module | None = None) -> Path:
    """A trained-looking adapter of the net."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base or net(), made)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(folder)
    return folder


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any], **fields: Any) -> Path:
    """The folder with its tensors and fields changed."""
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **fields}))
    return folder


def kinds(folder: Path) -> dict[str, str]:
    return {p.kind: p.text for p in inspect_adapter(folder).problems if p.serious}


# ---- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_nothing_is_wrong_with_the_adapters_of_any_method(folder: Path) -> None:
    found = inspect_adapter(folder)
    assert found.ok, found.problems
    keys = load_file(folder / FILE)
    assert {t.key: t.shape for t in found.tensors} == {k: tuple(v.shape) for k, v in keys.items()}
    assert found.parameters == sum(v.numel() for v in keys.values())
    assert found.bytes == sum(v.numel() * v.element_size() for v in keys.values())
    json.dumps(found.to_dict(), default=str)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"value": 3}, "alpha_pattern": {"query": 5}},
        {"target_modules": ["query", "embed"]},
    ],
)
def test_norms_and_scalings_are_those_of_the_updates(changes: dict[str, Any], tmp_path: Path) -> None:
    made = config(**changes)
    saved(tmp_path, made)
    found = inspect_adapter(tmp_path)
    assert found.base_model is None
    state = load_file(tmp_path / FILE)
    for target in found.targets:
        key = f"base_model.model.{target.path}.lora_"
        A, B = (state.get(f"{key}{s}.weight", state.get(f"{key}embedding_{s}")) for s in "AB")
        assert A is not None and B is not None
        r = (made.rank_pattern or {}).get(target.path.rpartition(".")[2], 2)
        alpha = (made.alpha_pattern or {}).get(target.path.rpartition(".")[2], 6)
        assert (target.rank, target.alpha) == (r, alpha)
        assert target.scaling == pytest.approx(alpha / (r**0.5 if made.use_rslora else r))
        assert target.product_norm == pytest.approx(float(torch.linalg.matrix_norm(B @ A)) * target.scaling, rel=1e-5)


def test_the_fingerprint_of_the_base_is_shown(tmp_path: Path) -> None:
    assert str(inspect_adapter(saved(tmp_path, config())).fingerprint).startswith("sha256:")


A, B = "base_model.model.block.query.lora_A.weight", "base_model.model.block.query.lora_B.weight"
FAULTS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = {
    "not finite": ({}, lambda s: s[A].fill_(float("nan")), {}, "NaN or infinite values in .*query.lora_A"),
    "missing": ({}, lambda s: s.pop(B), {}, "has lora_A.weight but no lora_B.weight"),
    "missing target": ({}, lambda s: [s.pop(k) for k in (A, B)], {}, "target_modules has 'query', for which"),
    "missing magnitude": ({}, lambda s: None, {"use_dora": True}, "use_dora=True, but .* have no lora_magnitude"),
    "missing module": ({}, lambda s: None, {"modules_to_save": ["head"]}, "modules_to_save has 'head', for which"),
    "rank": ({}, lambda s: None, {"r": 4}, "has rank 2 in the file and 4 in the configuration"),
    "unexpected target": ({}, lambda s: None, {"target_modules": ["value", "querry"]}, "Did you mean 'querry'"),
    "unexpected magnitude": ({"use_dora": True}, lambda s: None, {"use_dora": False}, "with use_dora=False"),
    "unknown field": ({}, lambda s: None, {"use_rslorra": True}, "use_rslorra=True, which is not known Did you mean"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name: str, tmp_path: Path) -> None:
    import re

    changes, change, fields, said = FAULTS[name]
    saved(tmp_path, config(**changes))
    assert not kinds(tmp_path)
    changed(tmp_path, change, **fields)
    found = kinds(tmp_path)
    kind = name if name in ("not finite", "unknown field") else name.split()[0]
    assert re.search(said, found[kind]), found
    assert not inspect_adapter(tmp_path).ok


def test_an_untrained_adapter_is_worth_a_note_only(tmp_path: Path) -> None:
    get_peft_model(net(), config()).save_pretrained(tmp_path)
    found = inspect_adapter(tmp_path)
    (note,) = found.problems
    assert (note.kind, note.serious, found.ok) == ("zero", False, True)
    assert "2 of 4 tensors are all zero" in note.text


def test_an_edited_configuration_is_told(tmp_path: Path) -> None:
    saved(tmp_path, config())
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "lora_alpha": 7}))
    assert [p.kind for p in inspect_adapter(tmp_path).problems] == ["changed"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (FILE, b"\x10\x00\x00", "adapter_model.safetensors is no complete safetensors file"),
        (CONFIG, b"{", "adapter_config.json' is not valid JSON"),
        (CONFIG, b'{"peft_type": "LORRA"}', "Did you mean 'LORA'"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_file(
    file: str, content: bytes, said: str, tmp_path: Path
) -> None:
    saved(tmp_path, config())
    (tmp_path / file).write_bytes(content)
    for look in (inspect_adapter, lambda folder: check_adapter(folder, net())):
        with pytest.raises(UnreadableAdapterError, match=said):
            look(tmp_path)
    assert issubclass(UnreadableAdapterError, PeftError)


# ---- check -----------------------------------------------------------------------------------------------------------

FITTING = {
    "lora": lambda: config(),
    "dora": lambda: config(use_dora=True),
    "embedding": lambda: config(target_modules=["embed", "query"]),
    "modules_to_save": lambda: config(modules_to_save=["head"]),
    "bias": lambda: config(bias="lora_only"),
    "tokens": lambda: config(trainable_token_indices={"embed": [1, 2]}),
    "loha": lambda: LoHaConfig(r=2, target_modules=["query"]),
    "vera": lambda: VeraConfig(r=2, target_modules=["query"]),
}


@pytest.mark.parametrize("name", FITTING)
def test_an_adapter_fits_the_base_that_it_was_made_for(name: str, tmp_path: Path) -> None:
    saved(tmp_path, FITTING[name]())
    with torch.device("meta"):
        base = net()
    fit = check_adapter(tmp_path, base)
    assert fit.ok, fit
    assert fit.matched == len(load_file(tmp_path / FILE))


def test_another_width_is_told_with_both_shapes(tmp_path: Path) -> None:
    saved(tmp_path, config())
    fit = check_adapter(tmp_path, net(12))
    assert not fit.ok
    assert fit.misshapen[B] == ((8, 2), (12, 2))
    assert fit.matched == 2
    assert any("query" in line for line in fit.base)


def test_places_and_tensors_without_each_other_are_told_with_the_nearest_name(tmp_path: Path) -> None:
    saved(tmp_path, config())
    changed(tmp_path, lambda s: s.update({A.replace("query", "queri"): s.pop(A)}))
    fit = check_adapter(tmp_path, net())
    assert fit.missing == [A]
    assert fit.unexpected == {A.replace("query", "queri"): A}
    assert not fit.ok


def test_numbers_of_another_kind_do_not_fit(tmp_path: Path) -> None:
    saved(tmp_path, config())
    changed(tmp_path, lambda s: s.update({k: v.to(torch.int32) for k, v in s.items()}))
    fit = check_adapter(tmp_path, net())
    assert not fit.ok and "is torch.int32 in the checkpoint" in fit.refused


def test_a_configuration_that_selects_nothing_is_told(tmp_path: Path) -> None:
    saved(tmp_path, config())
    fit = check_adapter(tmp_path, nn.ModuleDict({"querry": nn.Linear(6, 8)}))
    assert "Did you mean 'querry'" in fit.refused or "querry" in fit.refused
    assert not fit.ok


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama."""
    transformers = pytest.importorskip("transformers", "5.0")
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = transformers.LlamaConfig(**sizes, vocab_size=32, num_hidden_layers=2, pad_token_id=0)
    transformers.LlamaForCausalLM(made).save_pretrained(folder)
    return folder


def of_llama(folder: Path, llama: Path, made: Any, kind: str = "AutoModelForCausalLM", **changes: Any) -> Path:
    import transformers

    base = getattr(transformers, kind).from_pretrained(llama, **changes)
    return saved(folder, made, base)


MADE = {
    "causal": ({"task_type": "CAUSAL_LM"}, "AutoModelForCausalLM", {}),
    "classes": ({"task_type": "SEQ_CLS"}, "AutoModelForSequenceClassification", {"num_labels": 5}),
    "no task": ({}, "AutoModelForCausalLM", {}),
    "no head": ({"task_type": "FEATURE_EXTRACTION"}, "AutoModel", {}),
}


@pytest.mark.parametrize("name", MADE)
def test_the_base_is_built_from_its_folder_without_weights(name: str, llama: Path, tmp_path: Path) -> None:
    fields, kind, changes = MADE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_llama(tmp_path / "a", llama, config(target_modules=["q_proj"], **fields), kind, **changes)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / CONFIG.replace("adapter_", "")).write_text((llama / "config.json").read_text())
    fit = check_adapter(tmp_path / "a", tmp_path / "base")
    assert fit.ok, fit


TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8}
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
SIGHT |= {"patch_size": 4}
QWEN = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
OF_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **SIGHT}},
    ),
    "Qwen2VL": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": {**TEXT, **ROPE}, "vision_config": QWEN},
    ),
    "Gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": TEXT, "vision_config": SIGHT, "mm_tokens_per_image": 4},
    ),
}


@pytest.mark.parametrize("name", OF_IMAGES)
def test_an_adapter_of_a_model_of_images_and_text_is_held_against_it(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", "5.0")
    kind, parts = OF_IMAGES[name]
    made = getattr(transformers, f"{name}Config")(**parts)
    with torch.device("meta"):
        model = getattr(transformers, kind)(made)
    made.architectures = [kind]
    made.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, config(target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM"))
    for parameter in wrapped.to_empty(device="cpu").parameters():
        torch.nn.init.zeros_(parameter)  # of whatever is in memory that is free, a save might warn
    wrapped.save_pretrained(tmp_path / "a")
    fit = check_adapter(tmp_path / "a", tmp_path / "base")
    assert fit.ok and fit.model == kind and fit.matched == 4, fit


@pytest.mark.parametrize(
    "stated, words",
    [
        ({"model_type": "no-such-model", "architectures": ["NoSuchModel"]}, "The base model NoSuchModel of"),
        ({"model_type": "llama", "architectures": ["pipeline"], **TEXT}, "no class of models of that name"),
        ({"model_type": "llama", "hidden_size": 30, "architectures": ["LlamaForCausalLM"]}, "not a multiple of"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TEXT, "vocab_size": -4}, "LlamaForCausalLM"),
    ],
    ids=["unknown", "no class", "sizes that do not go together", "impossible"],
)
def test_a_base_that_transformers_does_not_make_is_one_line(stated: Any, words: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    saved(tmp_path / "a", config(auto_mapping={"base_model_class": "Trainer", "parent_library": "transformers"}))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ConversionError, match=r"cannot be made: .*pass the model itself|describes no llama") as found:
        check_adapter(tmp_path / "a", tmp_path / "base")
    assert words in str(found.value)
    assert "\n" not in str(found.value) and len(str(found.value)) < 700


def test_a_prompt_is_held_against_the_width_of_the_model(llama: Path, tmp_path: Path) -> None:
    made = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    of_llama(tmp_path, llama, made)
    assert check_adapter(tmp_path, llama).ok
    changed(tmp_path, lambda s: s.update(prompt_embeddings=torch.zeros(3, 20)))
    fit = check_adapter(tmp_path, llama)
    assert not fit.ok
    assert "20" in fit.refused


def test_a_base_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path / "a", config())
    (tmp_path / "base").mkdir()
    with pytest.raises(ConversionError, match=r"config\.json does not exist"):
        check_adapter(tmp_path / "a", tmp_path / "base")


# ---- the command line ------------------------------------------------------------------------------------------------


def command(*words: Any) -> tuple[int, str]:
    """Exit code and output of `peft WORDS`."""
    pytest.importorskip("rich")
    testing = pytest.importorskip("typer.testing")
    from peft.cli.app import build_app

    done = testing.CliRunner().invoke(build_app(), [str(w) for w in words])
    return done.exit_code, done.output


def test_the_commands_tell_by_their_exit_code(llama: Path, tmp_path: Path) -> None:
    of_llama(tmp_path / "a", llama, config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    code, text = command("inspect", tmp_path / "a")
    assert (code, "LORA" in text, "No problems found" in text) == (0, True, True)
    code, text = command("check", tmp_path / "a", "--base", llama)
    assert (code, "The adapter fits." in text) == (0, True)
    changed(tmp_path / "a", lambda s: s.pop(next(iter(s))))
    assert command("inspect", tmp_path / "a")[0] == 1
    code, text = command("check", tmp_path / "a", "--base", llama)
    assert (code, "The adapter does not fit." in text, "Missing" in text) == (1, True, True)
    assert command("inspect", tmp_path / "nothing")[0] == 2


def test_json_holds_everything(llama: Path, tmp_path: Path) -> None:
    of_llama(tmp_path / "a", llama, config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    found = json.loads(command("inspect", tmp_path / "a", "--json")[1])
    assert (found["method"], found["ok"], len(found["targets"])) == ("LORA", True, 2)
    assert {"path", "rank", "scaling", "product_norm", "parameters"} <= found["targets"][0].keys()
    assert json.loads(command("check", tmp_path / "a", "--base", llama, "--json")[1])["matched"] == 4


def test_an_adapter_is_converted_on_the_command_line(tmp_path: Path) -> None:
    saved(tmp_path / "a", config(modules_to_save=["head"]))
    code, text = command("convert", tmp_path / "a", "--to", "kohya", "--out", tmp_path / "k", "--component", "unet")
    assert (code, "modules trained as a whole" in text, "--drop" in text) == (2, True, True)
    words = ("--to", "kohya", "--out", tmp_path / "k.safetensors", "--component", "unet", "--drop")
    code, text = command("convert", tmp_path / "a", *words)
    assert (code, "Left out: modules trained as a whole" in text) == (0, True)
    code, text = command("convert", tmp_path / "k.safetensors", "--to", "lora", "--out", tmp_path / "back")
    assert (code, "kohya to lora: 2 targets" in text) == (0, True)
    assert command("convert", tmp_path / "a", "--to", "lora", "--out", tmp_path / "x", "--rank", "few")[0] == 2
