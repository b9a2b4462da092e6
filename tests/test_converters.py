"""Adapter files in other formats: what is written adds the same to each weight, by formulas written out here."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import test_golden
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.convert import FORMATS, ConversionError, convert_adapter
from peft.core.layer import BaseTunerLayer, tuner_layers

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}


class Attention(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.to_q, self.to_v = nn.Linear(size, size), nn.Linear(size, 12)
        self.to_out = nn.ModuleList([nn.Linear(size, size)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.to_q(x)) + self.to_v(x).sum()


class Net(nn.Module):
    """A convolution and an attention, named as the models of diffusers are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.tokens = nn.Embedding(10, 8)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn_1": Attention(8)})])

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x).mean((2, 3)) + self.tokens(torch.tensor([1]))
        return self.down_blocks[0]["attn_1"](h)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def saved(config: Any, folder: Path, base: nn.Module | None = None) -> PeftModel:
    """A trained-looking adapter of the net, saved."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net() if base is None else base, config)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model.eval()


def updates(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """{path of a target: W' - W}."""
    found = {}
    for path, layer in tuner_layers(model):
        if not isinstance(layer, BaseTunerLayer) or name not in layer.adapters:
            continue
        W = layer.stack(()).weight()
        found[path.removeprefix("base_model.model.")] = (layer.stack((name,)).weight() - W).detach()
    return found


def of_folder(folder: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*embedding layers")
        return updates(PeftModel.from_pretrained(net(), folder))


def product(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return scaling * B.flatten(1) @ A.flatten(1)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    if found.keys() != expected.keys():
        return False
    return all(torch.allclose(found[k], expected[k].flatten(1), rtol=0, atol=tolerance) for k in found)


NAMES = ["to_q", "to_v", "to_out.0"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_q": 5}},
    "patterns-that-overlap": {"alpha_pattern": {"to_q": 5, ".*": 2}},
    "rslora-patterns": {"use_rslora": True, "rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_q": 5}},
    "module-config": {"module_config": {"to_v": {"r": 3, "lora_alpha": 7, "use_rslora": True}}},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.(to_q|to_v)"},
    "conv": {"target_modules": [*NAMES, "conv_in"]},
    "conv-patterns": {"target_modules": [*NAMES, "conv_in"], "rank_pattern": {"conv_in": 3}},
    "bfloat16": {},
}
FILES = ["kohya", "diffusers"]


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": NAMES, "init_lora_weights": False, **changes})


@pytest.fixture
def adapter(tmp_path: Path, request: Any) -> tuple[Path, dict[str, Tensor]]:
    """The folder of a saved adapter of some variant, and what it adds."""
    folder = tmp_path / "adapter"
    model = saved(config(**VARIANTS[request.param]), folder)
    if request.param == "bfloat16":
        file = folder / "adapter_model.safetensors"
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
        return folder, of_folder(folder)
    return folder, updates(model)


each_variant = pytest.mark.parametrize("adapter", VARIANTS, indirect=True)


# ---- kohya and diffusers ---------------------------------------------------------------------------------------------


@each_variant
def test_a_file_of_kohya_adds_the_same(adapter: Any, tmp_path: Path) -> None:
    folder, expected = adapter
    report = convert_adapter(folder, "kohya", tmp_path / "out.safetensors", component="unet")
    state, found = load_file(tmp_path / "out.safetensors"), {}
    for path in expected:
        key = "lora_unet_" + path.replace(".", "_")
        A, B = (state.pop(f"{key}.lora_{name}.weight").float() for name in ("down", "up"))
        found[path] = product(A, B, float(state.pop(f"{key}.alpha")) / A.shape[0])
    assert not state
    assert same(found, expected)
    assert report.layers == len(expected)


@each_variant
def test_a_file_of_diffusers_adds_the_same(adapter: Any, tmp_path: Path) -> None:
    folder, expected = adapter
    convert_adapter(folder, "diffusers", tmp_path / "out", component="unet")
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as handle:
        fields = json.loads(handle.metadata()["lora_adapter_metadata"])
    fields = {k.removeprefix("unet."): v for k, v in fields.items()}
    assert "module_config" not in fields
    assert fields["target_modules"] != "all-linear"
    made = PeftModel(net(), LoraConfig(**fields))
    state = {k.replace("unet.", "base_model.model.", 1): v for k, v in load_file(file).items()}
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.PeftWarning)
        peft.set_peft_model_state_dict(made, state, strict=True)
    assert same(updates(made), expected)


@pytest.mark.parametrize("to", FILES)
@each_variant
def test_a_round_trip_restores_every_bit(adapter: Any, to: str, tmp_path: Path) -> None:
    folder, expected = adapter
    convert_adapter(folder, to, tmp_path / "file", component="transformer")
    report = convert_adapter(tmp_path / "file", "peft", tmp_path / "back", component="transformer")
    assert report.source == to
    before, after = (load_file(d / "adapter_model.safetensors") for d in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert same(of_folder(tmp_path / "back"), expected)


@pytest.mark.parametrize("to", FILES)
def test_a_plain_adapter_keeps_its_rank_and_alpha(to: str, tmp_path: Path) -> None:
    saved(config(), tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", to, tmp_path / "file", component="unet")
    convert_adapter(tmp_path / "file", "lora", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (2, 6, False)
    assert (written["rank_pattern"], written["alpha_pattern"]) == ({}, {})


@pytest.mark.parametrize("to", FILES)
def test_dora_goes_through_both_files(to: str, tmp_path: Path) -> None:
    model = saved(config(use_dora=True, target_modules=[*NAMES, "conv_in"]), tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", to, tmp_path / "file", component="unet")
    convert_adapter(tmp_path / "file", "peft", tmp_path / "back")
    assert same(of_folder(tmp_path / "back"), updates(model))
    if to == "kohya":
        state = load_file(tmp_path / "file" / "lora.safetensors")
        assert state["lora_unet_conv_in.dora_scale"].shape == (8, 1, 1, 1)


LYCORIS = {
    "loha": LoHaConfig(r=2, alpha=3, init_weights=False),
    "loha-conv": LoHaConfig(r=2, alpha=3, init_weights=False, use_effective_conv2d=True),
    "loha-flat": LoHaConfig(r=2, alpha=3, init_weights=False, rank_pattern={"to_q": 3}),
    "lokr": LoKrConfig(r=1, alpha=3, init_weights=False),
    "lokr-whole": LoKrConfig(r=8, alpha=3, init_weights=False),
    "lokr-both": LoKrConfig(r=1, alpha=3, init_weights=False, decompose_both=True, decompose_factor=4),
    "lokr-core": LoKrConfig(r=1, alpha=3, init_weights=False, use_effective_conv2d=True, decompose_factor=2),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_loha_and_lokr_have_the_keys_of_lycoris(name: str, tmp_path: Path) -> None:
    made = LYCORIS[name]
    made.target_modules = {*NAMES, "conv_in"}
    model = saved(made, tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", "kohya", tmp_path / "file", component="unet")
    keys = load_file(tmp_path / "file" / "lora.safetensors")
    prefix = "hada_w1_" if name.startswith("loha") else "lokr_w1"
    assert any(k.startswith("lora_unet_down_blocks_0_attn_1_to_q." + prefix) for k in keys)
    convert_adapter(tmp_path / "file", "peft", tmp_path / "back")
    assert same(of_folder(tmp_path / "back"), updates(model), 1e-5)


def test_whole_kronecker_factors_carry_their_scaling_because_readers_ignore_alpha(tmp_path: Path) -> None:
    model = saved(LoKrConfig(r=8, alpha=3, init_weights=False, target_modules=["to_q"]), tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", "kohya", tmp_path / "file", component="unet")
    state = {k.partition(".")[2]: v for k, v in load_file(tmp_path / "file" / "lora.safetensors").items()}
    assert state.keys() == {"lokr_w1", "lokr_w2", "alpha"}
    (expected,) = updates(model).values()
    assert torch.allclose(torch.kron(state["lokr_w1"], state["lokr_w2"]), expected, atol=1e-6)


def several(folder: Path) -> None:
    """An adapter of a pipeline: the net, and a text encoder named as transformers 5 names it."""
    saved(config(), folder / "unet")
    text = nn.ModuleDict(
        {"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)})])})}
    )
    saved(config(target_modules=["fc"]), folder / "text_encoder", text)


@pytest.mark.parametrize("to", FILES)
def test_one_file_holds_all_models_of_a_pipeline(to: str, tmp_path: Path) -> None:
    several(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", to, tmp_path / "file")
    convert_adapter(tmp_path / "file", "peft", tmp_path / "back")
    for part in ("unet", "text_encoder"):
        before, after = (load_file(tmp_path / d / part / "adapter_model.safetensors") for d in ("adapter", "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    if to == "kohya":
        keys = load_file(tmp_path / "file" / "lora.safetensors")
        assert any(k.startswith("lora_te_text_model_encoder_layers_0_fc.") for k in keys)


def test_one_of_several_parts_can_be_chosen(tmp_path: Path) -> None:
    several(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", "lora", tmp_path / "one", component="text_encoder")
    assert all("encoder.layers" in k for k in load_file(tmp_path / "one" / "adapter_model.safetensors"))


# ---- names with underscores ------------------------------------------------------------------------------------------


def kohya_file(path: Path, names: list[str], size: tuple[int, int] = (8, 8), **more: Tensor) -> Path:
    """A file as sd-scripts writes it, which records no names."""
    state = dict(more)
    for name in names:
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, size[1])
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(size[0], 2)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    save_file(state, path)
    return path


TO_Q = "down_blocks_0_attn_1_to_q"


def test_underscores_are_resolved_by_the_names_of_the_base(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "a.safetensors", [TO_Q, "down_blocks_0_attn_1_to_out_0"])
    convert_adapter(file, "lora", tmp_path / "out", base=net())
    found = of_folder(tmp_path / "out")
    assert set(found) == {"down_blocks.0.attn_1.to_q", "down_blocks.0.attn_1.to_out.0"}
    state = load_file(file)
    A, B = (state[f"lora_unet_{TO_Q}.lora_{n}.weight"] for n in ("down", "up"))
    assert torch.allclose(found["down_blocks.0.attn_1.to_q"], product(A, B, 0.5), atol=1e-6)


def test_the_headers_of_a_base_on_disk_are_enough(tmp_path: Path) -> None:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    save_file(net().state_dict(), tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    file = kohya_file(tmp_path / "a.safetensors", [TO_Q])
    convert_adapter(file, "lora", tmp_path / "out", base=tmp_path / "base")
    assert set(of_folder(tmp_path / "out")) == {"down_blocks.0.attn_1.to_q"}


def test_the_transformer_of_a_base_is_meant_where_it_has_no_unet(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "a.safetensors", [TO_Q])
    convert_adapter(file, "diffusers", tmp_path / "out", base={"transformer": net()})
    keys = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert set(keys) == {f"transformer.down_blocks.0.attn_1.to_q.lora_{s}.weight" for s in "AB"}


def test_underscores_are_never_guessed(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "a.safetensors", [TO_Q])
    with pytest.raises(ConversionError, match=r"may be dots or not.*Give `base`"):
        convert_adapter(file, "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "size", "said"),
    [
        (["down_blocks_0_attn_1_to_qq"], (8, 8), "fit no module of the base.*Did you mean.*to_q'"),
        ([TO_Q], (8, 9), r"another size than the base's weights.*8 x 9.*\(8, 8\)"),
    ],
)
def test_what_fits_no_module_of_the_base_is_named(names: list[str], size: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=said):
        convert_adapter(kohya_file(tmp_path / "a.safetensors", names, size), "lora", tmp_path / "out", base=net())


def test_a_name_that_two_modules_share_is_told_apart_by_shape_or_refused(tmp_path: Path) -> None:
    base = nn.ModuleDict({"a_b": nn.Linear(3, 4), "a": nn.ModuleDict({"b": nn.Linear(5, 4)})})
    file = kohya_file(tmp_path / "a.safetensors", ["a_b"], (4, 5))
    convert_adapter(file, "peft", tmp_path / "out", base=base)
    (key, *_) = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert key.startswith("base_model.model.a.b.")
    base["a_b"] = nn.Linear(5, 4)
    with pytest.raises(ConversionError, match=r"fits 2 modules of the base \(unet\), 'a_b', 'a\.b'"):
        convert_adapter(file, "peft", tmp_path / "no", base=base)


def test_a_record_of_names_that_are_not_those_of_the_keys_is_not_believed(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "a.safetensors", [TO_Q])
    state = load_file(file)
    save_file(state, file, metadata={"peft_modules": json.dumps({f"lora_unet_{TO_Q}": "conv_in"})})
    with pytest.raises(ConversionError, match="may be dots or not"):
        convert_adapter(file, "lora", tmp_path / "out")


def test_only_the_modules_of_the_file_are_targeted_where_names_end_alike(tmp_path: Path) -> None:
    base = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    file = kohya_file(tmp_path / "a.safetensors", ["b"], (4, 4))
    convert_adapter(file, "lora", tmp_path / "out", base=base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert [p for p, _ in tuner_layers(loaded)] == ["base_model.model.b"]


def unet_names() -> list[str]:
    """The convolutions and projections of a UNet built as Stable Diffusion XL's is."""
    inner = ("conv1", "conv2", "time_emb_proj")
    names = ["conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"]
    for side, count, blocks in (("down", 2, (0, 2, 2)), ("up", 3, (3, 3, 0))):
        for i, attentions in enumerate(blocks):
            names += [f"{side}_blocks.{i}.resnets.{j}.{n}" for j in range(count) for n in inner]
            names += [f"{side}_blocks.{i}.attentions.{j}.proj_in" for j in range(attentions)]
            names += [f"{side}_blocks.{i}.{side}samplers.0.conv"] * (i < 2)
    return [*names, "mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in", "mid_block.resnets.1.conv2"]


ORIGINAL = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.2.0.emb_layers.1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.1.proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks.8.1.proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.2.1.proj_in": "up_blocks.0.attentions.2.proj_in",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.8.0.out_layers.3": "up_blocks.2.resnets.2.conv2",
    "time_embed.0": "time_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}


def test_the_names_of_the_original_code_follow_from_the_structure_of_a_unet() -> None:
    from peft.convert.ldm import original_names

    found = original_names(unet_names())
    assert {old: found.get(old) for old in ORIGINAL} == ORIGINAL
    assert sorted(found.values()) == sorted(unet_names())
    assert original_names(["model.layers.0.q_proj"]) == {}


def test_diffusers_reads_the_names_of_the_original_code_in_the_same_way(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from peft.convert.ldm import original_names

    def unet() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16, 16), norm_num_groups=4, cross_attention_dim=16,
            attention_head_dim=4, down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), use_linear_projection=True,
        )  # fmt: skip

    base, state = unet(), {}
    shapes = {n: m.weight.shape for n, m in base.named_modules() if getattr(m, "weight", None) is not None}
    for old, new in original_names(shapes).items():
        if ".transformer_blocks." in new and len(shapes[new]) == 2:
            key = "lora_unet_" + old.replace(".", "_")
            state[f"{key}.lora_down.weight"] = torch.randn(2, shapes[new][1])
            state[f"{key}.lora_up.weight"] = torch.randn(shapes[new][0], 2)
            state[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "a.safetensors")
    convert_adapter(tmp_path / "a.safetensors", "lora", tmp_path / "out", base=base)
    ours, theirs = PeftModel.from_pretrained(base, tmp_path / "out"), unet()
    kind = diffusers.StableDiffusionXLPipeline
    read, alphas = kind.lora_state_dict(str(tmp_path), weight_name="a.safetensors", unet_config=theirs.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind.load_lora_into_unet(read, alphas, theirs)
    assert same(updates(theirs, "default_0"), updates(ours))


def test_a_convolution_in_three_factors_is_read(tmp_path: Path) -> None:
    key = "lora_unet_conv_in"
    down, mid, up = torch.randn(2, 3, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(8, 2, 1, 1)
    state = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    save_file(state, tmp_path / "a.safetensors")
    convert_adapter(tmp_path / "a.safetensors", "lora", tmp_path / "out", base=net())
    x = torch.randn(1, 3, 5, 5)
    F = torch.nn.functional
    expected = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)  # without alpha the scaling is 1
    kernel = of_folder(tmp_path / "out")["conv_in"].view(8, 3, 3, 3)
    assert torch.allclose(F.conv2d(x, kernel, padding=1), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({f"lora_unet_{TO_Q}.strange": torch.ones(1)}, "no meaning.*strange"),
        ({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "no whole update"),
        ({f"lora_unet_{TO_Q}.dora_scale": torch.ones(1, 8)}, "norms of in-features"),
    ],
)
def test_strange_tensors_of_a_file_are_named(more: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "a.safetensors", [TO_Q], **more)
    with pytest.raises(ConversionError, match=said):
        convert_adapter(file, "lora", tmp_path / "out", base=net())


# ---- diffusers -------------------------------------------------------------------------------------------------------

OLD_KEYS = [
    ("unet.down_blocks.0.attn_1.to_q.lora.{}.weight", ("down", "up"), "to_q"),
    ("unet.down_blocks.0.attn_1.processor.to_q_lora.{}.weight", ("down", "up"), "to_q"),
    ("unet.down_blocks.0.attn_1.processor.to_out_lora.{}.weight", ("down", "up"), "to_out.0"),
    ("unet.down_blocks.0.attn_1.to_q.lora_linear_layer.{}.weight", ("down", "up"), "to_q"),
    ("unet.down_blocks.0.attn_1.to_q.lora_{}.weight", ("A", "B"), "to_q"),
]


@pytest.mark.parametrize(("key", "sides", "name"), OLD_KEYS)
def test_files_of_diffusers_without_metadata_have_alpha_or_the_rank(
    key: str, sides: tuple[str, str], name: str, tmp_path: Path
) -> None:
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    state = {key.format(sides[0]): A, key.format(sides[1]): B}
    for alpha, scaling in ((None, 1.0), (1.0, 0.5)):
        more = {} if alpha is None else {f"unet.down_blocks.0.attn_1.{name}.alpha": torch.tensor(alpha)}
        save_file({**state, **more}, tmp_path / "a.safetensors")
        convert_adapter(tmp_path / "a.safetensors", "lora", tmp_path / "out", overwrite=True)
        found = of_folder(tmp_path / "out")[f"down_blocks.0.attn_1.{name}"]
        assert torch.allclose(found, product(A, B, scaling), atol=1e-6)


def test_a_file_of_diffusers_with_embeddings_alone_is_known_again(tmp_path: Path) -> None:
    saved(config(target_modules=["tokens"]), tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", "diffusers", tmp_path / "file", component="unet", drop=True)
    convert_adapter(tmp_path / "file", "peft", tmp_path / "back")
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "back"))
    assert after and all(torch.equal(before[k], after[k]) for k in after)


def test_the_bias_of_b_goes_to_diffusers_and_back(tmp_path: Path) -> None:
    saved(config(lora_bias=True), tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", "diffusers", tmp_path / "file", component="unet")
    convert_adapter(tmp_path / "file", "lora", tmp_path / "back")
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "back"))
    assert any("lora_B.bias" in k for k in after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_diffusers_itself_loads_the_file(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")

    def unet() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip

    x, t, h = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 3, 16)
    for i, variant in enumerate(
        [{}, {"use_rslora": True, "rank_pattern": {"to_v": 3}}, {"use_dora": True}, {"lora_bias": True}]
    ):
        made = saved(config(target_modules=["to_q", "to_v", "conv1"], **variant), tmp_path / f"a{i}", unet())
        with torch.no_grad():
            expected = made.base_model.model(x, t, h).sample
        report = convert_adapter(tmp_path / f"a{i}", "diffusers", tmp_path / f"f{i}")
        loading = unet()
        loading.load_lora_adapter(report.files[0].parent, prefix="unet", weight_name=report.files[0].name)
        with torch.no_grad():
            assert torch.allclose(loading(x, t, h).sample, expected, atol=1e-5)


def pipeline(diffusers: Any) -> Any:
    """A Stable Diffusion of the smallest size."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=50, bos_token_id=0, eos_token_id=1))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        unet=unet, text_encoder=text, vae=vae, tokenizer=None, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {r".*(to_k|v_proj)": 3}}], ids=str)
def test_a_pipeline_of_diffusers_loads_the_parts_of_one_file(to: str, changes: dict[str, Any], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    plain, loading = pipeline(diffusers), pipeline(diffusers)
    names = {"unet": [*NAMES, "to_k", "proj_in"], "text_encoder": ["q_proj", "v_proj", "out_proj", "fc1"]}
    expected = {}
    for part, targets in names.items():
        made = config(target_modules=targets, **changes)
        expected[part] = updates(saved(made, tmp_path / "adapter" / part, getattr(plain, part)))
    (file,) = convert_adapter(tmp_path / "adapter", to, tmp_path / "file").files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers names targets of its older spellings, too
        loading.load_lora_weights(file.parent, weight_name=file.name)
    for part, wanted in expected.items():
        assert same(updates(getattr(loading, part), "default_0"), wanted)


# ---- engines that serve ------------------------------------------------------------------------------------------


ENGINES = {"vllm": "--max-lora-rank 8", "sglang": "--max-lora-rank [2-8] ", "lorax": "LoRAX ignores"}


@pytest.mark.parametrize("to", ENGINES)
@pytest.mark.parametrize("adapter", [v for v in VARIANTS if "conv" not in v], indirect=True)
def test_a_folder_for_an_engine_has_one_scaling_and_one_rank(adapter: Any, to: str, tmp_path: Path) -> None:
    folder, expected = adapter
    report = convert_adapter(folder, to, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (values["bias"], values["modules_to_save"], values["use_dora"]) == ("none", None, False)
    assert (values["rank_pattern"], values["alpha_pattern"], values["use_rslora"]) == ({}, {}, False)
    scaling = values["lora_alpha"] / values["r"]  # as engines that do not look at use_rslora compute it, too
    state = {k.removeprefix("base_model.model."): v.float() for k, v in load_file(tmp_path / "out" / FILE).items()}
    found = {p: product(state[f"{p}.lora_A.weight"], state[f"{p}.lora_B.weight"], scaling) for p in expected}
    assert all(v.shape[0] == values["r"] for k, v in state.items() if "lora_A" in k)
    assert same(found, expected)
    assert any(re.search(ENGINES[to], note) for note in report.notes)


FILE = "adapter_model.safetensors"


@pytest.mark.parametrize("to", ENGINES)
def test_a_plain_adapter_for_an_engine_keeps_every_bit(to: str, tmp_path: Path) -> None:
    saved(config(use_rslora=True), tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", to, tmp_path / "out")
    before, after = (load_file(tmp_path / d / FILE) for d in ("adapter", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_rank_that_vllm_does_not_take_is_refused(tmp_path: Path) -> None:
    saved(config(r=513), tmp_path / "adapter")
    with pytest.raises(ConversionError, match="rank 513 is more than vLLM's largest max_lora_rank, 512"):
        convert_adapter(tmp_path / "adapter", "vllm", tmp_path / "out")


# ---- refusals --------------------------------------------------------------------------------------------------------


def aLoRA() -> LoraConfig:
    return config(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")


EXTRAS: dict[str, tuple[Callable[[], Any], str]] = {
    "modules_to_save": (lambda: config(modules_to_save=["conv_in"]), "modules trained as a whole.*conv_in"),
    "lora_bias": (lambda: config(lora_bias=True), "biases of B"),
    "bias": (lambda: config(bias="lora_only"), "trained biases of the base"),
    "tokens": (lambda: config(trainable_token_indices={"tokens": [1, 2]}), "trained tokens"),
    "embedding": (lambda: config(target_modules=[*NAMES, "tokens"]), "embeddings.*tokens"),
    "conv": (lambda: config(target_modules=[*NAMES, "conv_in"]), "convolutions.*conv_in"),
}
HELD = {
    "kohya": {"conv"},
    "diffusers": {"conv", "embedding", "lora_bias"},
    "vllm": {"embedding"},
    "sglang": {"embedding"},
    "lorax": set(),
    "lora": set(EXTRAS),
    "peft": set(EXTRAS),
}
REFUSED = [(to, extra) for to, held in HELD.items() for extra in EXTRAS if extra not in held]


@pytest.mark.parametrize(("to", "extra"), REFUSED)
def test_what_a_format_cannot_hold_is_named_and_dropped_only_on_request(to: str, extra: str, tmp_path: Path) -> None:
    make, said = EXTRAS[extra]
    saved(make(), tmp_path / "adapter")
    with pytest.raises(ConversionError, match=f"The format '{to}' cannot hold {said}"):
        convert_adapter(tmp_path / "adapter", to, tmp_path / "out", component="unet")
    assert not (tmp_path / "out").exists()
    report = convert_adapter(tmp_path / "adapter", to, tmp_path / "out", component="unet", drop=True)
    (dropped,) = report.dropped.values()
    assert dropped
    assert report.layers == 3
    if to in ENGINES:
        of_folder(tmp_path / "out")


@pytest.mark.parametrize(("to", "extra"), [(to, extra) for to, held in HELD.items() for extra in sorted(held)])
def test_what_a_format_can_hold_comes_back(to: str, extra: str, tmp_path: Path) -> None:
    saved(EXTRAS[extra][0](), tmp_path / "adapter")
    report = convert_adapter(tmp_path / "adapter", to, tmp_path / "out", component="unet")
    assert not report.dropped
    back = tmp_path / "out"
    if to in FILES:
        convert_adapter(tmp_path / "out", "peft", tmp_path / "back")
        back = tmp_path / "back"
    before, after = load_file(tmp_path / "adapter" / FILE), load_file(back / FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("to", ["kohya", "diffusers", *ENGINES, "lora"])
def test_an_adapter_that_depends_on_its_input_is_refused(to: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved(config(alora_invocation_tokens=[1, 2]), tmp_path / "adapter")
        with pytest.raises(ConversionError, match="aLoRA's invocation tokens"):
            convert_adapter(tmp_path / "adapter", to, tmp_path / "out", component="unet", drop=True)


@pytest.mark.parametrize("to", [*FILES, "vllm"])
def test_nothing_is_overwritten_unless_asked(to: str, tmp_path: Path) -> None:
    saved(config(), tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", to, tmp_path / "out", component="unet")
    with pytest.raises(ConversionError, match="exists already"):
        convert_adapter(tmp_path / "adapter", to, tmp_path / "out", component="unet")
    convert_adapter(tmp_path / "adapter", to, tmp_path / "out", component="unet", overwrite=True)


def test_wrong_arguments_are_told_with_the_nearest_choice(tmp_path: Path) -> None:
    saved(config(), tmp_path / "adapter")
    for arguments, said in [
        ({"to": "khoya"}, "'khoya' is no format. Did you mean 'kohya'"),
        ({"to": "sg-lang"}, "'sg-lang' is no format. Did you mean 'sglang'"),
        ({"to": "kohya"}, "Give `component`: unet"),
        ({"to": "kohya", "component": "unnet"}, "Did you mean 'unet'"),
        ({"to": "lora", "source": "gguf"}, "'gguf' are written, not read"),
        ({"to": "lora", "base": tmp_path / "nowhere"}, "is no folder"),
    ]:
        with pytest.raises(ConversionError, match=said):
            convert_adapter(tmp_path / "adapter", out=tmp_path / "out", **arguments)
    with pytest.raises(ConversionError, match="does not exist"):
        convert_adapter(tmp_path / "nothing", "lora", tmp_path / "out")
    save_file({"x.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=r"no format that can be read.*x\.weight"):
        convert_adapter(tmp_path / "x.safetensors", "lora", tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ConversionError, match="GGUF is only written"):
        convert_adapter(tmp_path / "x.gguf", "lora", tmp_path / "out")


def test_fields_that_are_not_known_may_change_the_result_and_are_refused(tmp_path: Path) -> None:
    saved(config(), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_newlora": True}))
    with pytest.raises(ConversionError, match="use_newlora"):
        convert_adapter(tmp_path / "adapter", "lora", tmp_path / "out")


# ---- writing as a LoRA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loha", "lokr", "lokr-whole", "loha-flat"])
def test_loha_and_lokr_become_a_lora_without_the_base(name: str, tmp_path: Path) -> None:
    made = LYCORIS[name]
    made.target_modules = set(NAMES)
    model = saved(made, tmp_path / "adapter")
    report = convert_adapter(tmp_path / "adapter", "lora", tmp_path / "out", rank=1.0)
    assert any(name[:4].replace("-", "").upper() in line for line in report.folded)
    assert same(of_folder(tmp_path / "out"), updates(model), 1e-5)


NEEDS_BASE = {
    "dora": lambda: config(use_dora=True),
    "vera": lambda: VeraConfig(r=4, target_modules=["to_q"], init_weights=False),
    "pissa": lambda: config(init_lora_weights="pissa"),
}


@pytest.mark.parametrize("name", NEEDS_BASE)
@pytest.mark.parametrize("to", ["lora", "vllm"])
def test_updates_that_depend_on_the_base_are_written_as_a_lora_with_it(name: str, to: str, tmp_path: Path) -> None:
    model = saved(NEEDS_BASE[name](), tmp_path / "adapter")
    with pytest.raises(ConversionError, match="without the base model, on which the update depends"):
        convert_adapter(tmp_path / "adapter", to, tmp_path / "out")
    if name == "dora":
        with pytest.raises(
            ConversionError, match=r"as a LoRA: the updates of .* have no low rank of their own. Give `rank`"
        ):
            convert_adapter(tmp_path / "adapter", to, tmp_path / "out", base=net())
    convert_adapter(tmp_path / "adapter", to, tmp_path / "out", base=net(), rank=1.0 if name == "dora" else None)
    assert same(of_folder(tmp_path / "out"), updates(model), 2e-5)


def one_of_each_method() -> list[str]:
    """The first golden case of each method whose adapter is loaded by itself."""
    found: dict[str, str] = {}
    for name in test_golden.CASES:
        case = json.loads((test_golden.GOLDEN / name / "case.json").read_text())
        kind = json.loads((test_golden.GOLDEN / name / "adapter_config.json").read_text())["peft_type"]
        if not case.get("ops") and kind not in NO_WEIGHTS:
            found.setdefault(kind, name)
    return [*found.values(), "lora-pissa", "lora-kasa", "lora-mha", "dora-rslora", "lora-experts"]


NO_WEIGHTS = {
    *("ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "CARTRIDGE"),
    *("LN_TUNING", "TRAINABLE_TOKENS", "POLY", "BEFT"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in one_of_each_method() if n in test_golden.CASES])
def test_an_adapter_of_any_method_that_changes_weights_is_the_same_as_a_lora(name: str, tmp_path: Path) -> None:
    case, io = test_golden.read(name)
    base = test_golden.base_model(case)
    try:
        convert_adapter(test_golden.GOLDEN / name, "lora", tmp_path, base=base, rank=1.0)
    except ConversionError as error:
        if "trained biases" not in str(error):  # beside another method than LoRA
            assert not test_golden.adapted(name).supports_lora_conversion()
        return
    found = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        wanted = io["merged_output" if name in test_golden.RUNS_AS_MERGED else "output"]
        test_golden.close(test_golden.run(found, name, **case.get("call", {})), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["prompt-gpt2", "lntuning-llama", "poly-linear", "adaption-prompt-gpt2"])
def test_what_is_no_change_of_weights_is_no_lora(name: str, tmp_path: Path) -> None:
    base = test_golden.base_model(test_golden.read(name)[0])
    with pytest.raises(ConversionError, match=r"changes no weights|cannot be written as a LoRA"):
        convert_adapter(test_golden.GOLDEN / name, "lora", tmp_path / "out", base=base)


def test_the_report_says_how_much_a_rank_leaves_out(tmp_path: Path) -> None:
    saved(config(use_dora=True), tmp_path / "adapter")
    report = convert_adapter(tmp_path / "adapter", "lora", tmp_path / "out", base=net(), rank=2)
    (line,) = report.folded
    assert "rank 2, which leaves out up to" in line
    report = convert_adapter(tmp_path / "adapter", "lora", tmp_path / "share", base=net(), rank=0.999)
    assert re.search(r"of ranks from \d to \d,", report.folded[0])


def test_the_base_in_memory_stays_as_it_is(tmp_path: Path) -> None:
    saved(config(use_dora=True), tmp_path / "adapter")
    base = net()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    convert_adapter(tmp_path / "adapter", "lora", tmp_path / "out", base=base, rank=1.0)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_base_that_does_not_fit_is_told(tmp_path: Path) -> None:
    saved(config(use_dora=True), tmp_path / "adapter")
    with pytest.raises(ConversionError, match="does not fit the base model"):
        convert_adapter(tmp_path / "adapter", "lora", tmp_path / "out", base=nn.ModuleDict({"x": nn.Linear(2, 2)}))


def mutated(state: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """The tensors of a file with something wrong in one to three of them."""
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(state))
        value = state.pop(key)
        what = rng.randrange(6)
        if what == 1:
            state[key] = torch.zeros([rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randint(0, 5))])
        elif what == 2:
            state[rng.choice(("x", "lora_unet_x", "unet.", key)) + rng.choice(("", ".alpha", ".lokr_w1"))] = value
        elif what == 3:
            state[key] = value.to(rng.choice((torch.int64, torch.bool, torch.float16)))
        elif what == 4:
            state[key] = value.flatten()
        elif what == 5:
            state[key] = torch.full_like(value, float("nan"))
        if not state:
            return {"x": value}
    return state


@pytest.mark.parametrize("written", ["peft", "kohya", "diffusers"])
@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 64], ids=["empty", "short", "noise"])
def test_a_damaged_file_is_named(content: bytes, written: str, tmp_path: Path) -> None:
    saved(config(), tmp_path / "adapter")
    file = tmp_path / "adapter" / FILE
    if written != "peft":
        (file,) = convert_adapter(tmp_path / "adapter", written, tmp_path / "f", component="unet").files
    file.write_bytes(content)
    with pytest.raises(ConversionError, match=f"{file.name} is no complete safetensors file"):
        convert_adapter(tmp_path / "adapter" if written == "peft" else file, "lora", tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "loha-conv", "lokr-core"])
@pytest.mark.parametrize("written", ["peft", "kohya", "diffusers"])
def test_whatever_is_wrong_with_a_file_the_error_is_one_of_ours(name: str, written: str, tmp_path: Path) -> None:
    made = config(use_dora=True) if name == "lora" else LYCORIS[name]
    made.target_modules = {*NAMES, "conv_in"}
    saved(made, tmp_path / "adapter")
    good = tmp_path / "adapter" / FILE
    if written != "peft":
        if name != "lora" and written == "diffusers":
            pytest.skip("diffusers has no files of LyCORIS")
        (good,) = convert_adapter(tmp_path / "adapter", written, tmp_path / "f", component="unet").files
    with safe_open(good, "pt") as handle:
        metadata = {k: v for k, v in handle.metadata().items() if k != "checksum"}
    rng, original = random.Random(0), load_file(good)
    for i in range(40):
        broken = good if written == "peft" else tmp_path / "b.safetensors"
        save_file(mutated(dict(original), rng), broken, metadata=metadata)
        source = tmp_path / "adapter" if written == "peft" else broken
        base, rank, drop = rng.choice((None, net())), rng.choice((None, 2)), rng.random() < 0.5
        to, out = rng.choice(("lora", "peft", "kohya", "diffusers", "vllm")), tmp_path / "out" / str(i)
        try:
            convert_adapter(source, to, out, component="unet", base=base, rank=rank, drop=drop)
        except ConversionError:
            assert not out.exists()


def test_every_format_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "converting.md").read_text()
    assert all(f"`{name}`" in text for name in FORMATS)


# ---- GGUF ------------------------------------------------------------------------------------------------------------

LLAMA = {**SIZES, "vocab_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": False, "pad_token_id": 0}
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def language_model(name: str = "Llama", **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", "5.0")
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**{**LLAMA, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(made).eval()


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the gguf package reads: fields, and tensors with their axes as numpy has them."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    fields = {k: f.contents() for k, f in reader.fields.items()}
    tensors = {}
    for t in reader.tensors:
        data = torch.from_numpy(t.data.copy())
        half = t.tensor_type == gguf.GGMLQuantizationType.BF16
        shape = tuple(int(n) for n in t.shape[::-1])
        tensors[t.name] = (data.contiguous().view(torch.bfloat16) if half else data).view(shape)
    return fields, tensors


def in_order_of_llama_cpp(W: Tensor, heads: int) -> Tensor:
    """Row 2 i + j of a head is row i + j n / 2."""
    n = W.shape[0] // heads
    rows = [h * n + i + j * (n // 2) for h in range(heads) for i in range(n // 2) for j in (0, 1)]
    return W[rows]


def test_the_order_of_rows_is_that_which_makes_both_kinds_of_rope_agree() -> None:
    from peft.convert.gguf import reordered

    n, heads = 8, 2
    q, k = torch.randn(heads * n, 1), torch.randn(heads * n, 1)

    def halves(v: Tensor, position: int) -> Tensor:
        """Rotation of (i, i + n / 2), as transformers has it."""
        a, b = v.view(heads, 2, n // 2).unbind(1)
        angle = position / 10 ** torch.arange(n // 2)
        return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1).flatten(1)

    def neighbours(v: Tensor, position: int) -> Tensor:
        """Rotation of (2 i, 2 i + 1), as llama.cpp has it for these models."""
        a, b = v.view(heads, n // 2, 2).unbind(2)
        angle = position / 10 ** torch.arange(n // 2)
        return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 2).flatten(1)

    expected = (halves(q, 3) * halves(k, 7)).sum(1)
    found = (neighbours(reordered(q, heads), 3) * neighbours(reordered(k, heads), 7)).sum(1)
    assert torch.allclose(found, expected, atol=1e-5)


GGUF_VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    "rslora-patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3, "o_proj": 4}},
}


@pytest.mark.parametrize(("name", "permuted"), [("Llama", True), ("Mistral", True), ("Qwen2", False)])
@pytest.mark.parametrize("variant", GGUF_VARIANTS)
def test_a_gguf_file_adds_the_same(variant: str, name: str, permuted: bool, tmp_path: Path) -> None:
    base = language_model(name)
    base.config.save_pretrained(tmp_path / "base")
    made = config(target_modules="all-linear", **GGUF_VARIANTS[variant])
    expected = updates(saved(made, tmp_path / "adapter", base))
    report = convert_adapter(tmp_path / "adapter", "gguf", tmp_path / "out.gguf", base=tmp_path / "base")
    fields, state = read_gguf(tmp_path / "out.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == ("llama" if permuted else "qwen2")
    assert report.layers == 14
    for path, D in expected.items():
        _, _, block, rest = path.split(".", 3)
        key = f"blk.{block}.{PLACES[rest]}.weight"
        A, B = state.pop(f"{key}.lora_a"), state.pop(f"{key}.lora_b")
        if permuted and rest.endswith(("q_proj", "k_proj")):
            D = in_order_of_llama_cpp(D, 4 if rest.endswith("q_proj") else 2)
        assert torch.allclose(product(A, B, fields["adapter.lora.alpha"] / B.shape[1]), D, atol=1e-6)
    assert not state


def test_a_plain_gguf_file_keeps_every_bit_and_the_alpha(tmp_path: Path) -> None:
    saved(config(target_modules=["v_proj"]), tmp_path / "adapter", language_model())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        file = tmp_path / "adapter" / FILE
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
        convert_adapter(tmp_path / "adapter", "gguf", tmp_path / "g", base=language_model(), overwrite=True)
        fields, state = read_gguf(tmp_path / "g" / "adapter.gguf")
        assert fields["adapter.lora.alpha"] == 6
        for k, v in load_file(file).items():
            block, side = k.split(".")[4], k.split(".")[-2][-1].lower()
            assert torch.equal(state[f"blk.{block}.attn_v.weight.lora_{side}"], v)


def test_the_factors_of_the_token_embedding_lie_as_llama_cpp_reads_them(tmp_path: Path) -> None:
    made = saved(config(target_modules=["embed_tokens", "lm_head"]), tmp_path / "adapter", language_model())
    with pytest.raises(ConversionError, match=r"whole weights saved beside it.*from the base"):
        convert_adapter(tmp_path / "adapter", "gguf", tmp_path / "out.gguf", base=language_model())
    convert_adapter(tmp_path / "adapter", "gguf", tmp_path / "out.gguf", base=language_model(), drop=True)
    state = read_gguf(tmp_path / "out.gguf")[1]
    assert state["token_embd.weight.lora_a"].shape == (32, 2)
    assert state["token_embd.weight.lora_b"].shape == (16, 2)
    D = updates(made)["model.embed_tokens"]  # (d, V)
    assert torch.allclose(3.0 * state["token_embd.weight.lora_b"] @ state["token_embd.weight.lora_a"].T, D, atol=1e-6)
    assert state["output.weight.lora_b"].shape == (32, 2)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_refused_because_llama_cpp_has_one_weight_for_both(target: str, tmp_path: Path) -> None:
    base = language_model(tie_word_embeddings=True)
    saved(config(target_modules=[target]), tmp_path / "adapter", base)
    with pytest.raises(ConversionError, match="is tied to"):
        convert_adapter(tmp_path / "adapter", "gguf", tmp_path / "out.gguf", base=base, drop=True)


EXPERTS = {
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 4},
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["mlp.experts.down_proj"]])
def test_stacked_experts_go_to_gguf(name: str, parameters: list[str], tmp_path: Path) -> None:
    base = language_model(name, **EXPERTS[name])
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 10}}
    made = config(target_modules=["q_proj"], target_parameters=parameters, **patterns)
    model = saved(made, tmp_path / "adapter", base)
    convert_adapter(tmp_path / "adapter", "gguf", tmp_path / "out.gguf", base=language_model(name, **EXPERTS[name]))
    fields, state = read_gguf(tmp_path / "out.gguf")

    def delta(name: str) -> Tensor:
        A, B = state.pop(f"blk.0.ffn_{name}_exps.weight.lora_a"), state.pop(f"blk.0.ffn_{name}_exps.weight.lora_b")
        return B @ A * (fields["adapter.lora.alpha"] / B.shape[-1])

    expected = updates(model)
    experts = "model.layers.0.mlp.experts"
    assert torch.allclose(delta("down"), expected[experts], atol=1e-5)
    if len(parameters) == 2:
        both = torch.cat([delta("gate"), delta("up")], 1)
        assert torch.allclose(both, expected[f"{experts}.base_layer"], atol=1e-5)
    for to in ("kohya", "diffusers", "vllm"):
        with pytest.raises(ConversionError, match="cannot hold several matrices in one module"):
            convert_adapter(tmp_path / "adapter", to, tmp_path / "out", component="transformer")
    convert_adapter(tmp_path / "adapter", "lora", tmp_path / "out")
    before, after = (load_file(tmp_path / d / FILE) for d in ("adapter", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_invocation_tokens_of_alora_go_to_gguf(tmp_path: Path) -> None:
    made = config(target_modules=["v_proj"], alora_invocation_tokens=[7, 9], task_type="CAUSAL_LM")
    saved(made, tmp_path / "adapter", language_model())
    convert_adapter(tmp_path / "adapter", "gguf", tmp_path / "out.gguf", base=language_model())
    assert read_gguf(tmp_path / "out.gguf")[0]["adapter.alora.invocation_tokens"] == [7, 9]


def test_what_gguf_cannot_hold_is_named(tmp_path: Path) -> None:
    base = language_model()
    for i, (changes, said) in enumerate(
        [
            ({"lora_bias": True}, "biases of B.*llama.cpp adds B A only"),
            ({"use_dora": True}, "without the base model|Give `rank`"),
            ({"modules_to_save": ["lm_head"]}, "modules trained as a whole.*Merge them into the base"),
        ]
    ):
        saved(config(target_modules=["v_proj"], **changes), tmp_path / f"a{i}", language_model())
        with pytest.raises(ConversionError, match=said):
            convert_adapter(tmp_path / f"a{i}", "gguf", tmp_path / "out.gguf", base=base)
    assert not (tmp_path / "out.gguf").exists()


def test_gguf_needs_a_base_that_is_known(tmp_path: Path) -> None:
    saved(config(target_modules=["v_proj"]), tmp_path / "adapter", language_model())
    with pytest.raises(ConversionError, match=r"depend on the base. Give `base`"):
        convert_adapter(tmp_path / "adapter", "gguf", tmp_path / "out.gguf")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "lllama"}))
    with pytest.raises(ConversionError, match=r"is a 'lllama'.*Did you mean 'llama'"):
        convert_adapter(tmp_path / "adapter", "gguf", tmp_path / "out.gguf", base=tmp_path / "base")
    saved(config(), tmp_path / "other")
    with pytest.raises(ConversionError, match=r"is no tensor that llama.cpp has for llama"):
        convert_adapter(tmp_path / "other", "gguf", tmp_path / "out.gguf", base=language_model())
