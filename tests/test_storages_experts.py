"""Fused experts in FP8, in FP4 with scales for each 32, and in MXFP4: transformers' own classes on any machine."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.core import storage
from tests import storages_road as road
from tests.test_storages_blocks import bytes_of_e4m3, decoded, scaled, unpacked

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
if not hasattr(fp8, "FP8Experts"):
    pytest.skip("this version of transformers has no such experts", allow_module_level=True)

E, H, M = 3, 64, 32
SIZES = SimpleNamespace(
    hidden_size=H,
    intermediate_size=M,
    moe_intermediate_size=M,
    num_experts=E,
    num_local_experts=E,
    hidden_act="silu",
    swiglu_limit=7.0,
)
NAMES = ("gate_up_proj", "down_proj")


class Dense(nn.Module):
    """The sum over each token's experts, from numbers (E, O, I)."""

    def __init__(self, held, numbers, gated):
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Parameter(numbers[name].clone()))
            setattr(self, f"{name}_bias", copy.deepcopy(getattr(held, f"{name}_bias", None)))
        self.gated = gated

    def forward(self, hidden_states, top_k_index, top_k_weights):
        rows = []
        for x, chosen, scores in zip(hidden_states, top_k_index, top_k_weights, strict=True):
            row = torch.zeros(H)
            for e, score in zip(chosen.tolist(), scores, strict=True):
                parts = [None if b is None else b[e] for b in (self.gate_up_proj_bias, self.down_proj_bias)]
                h = self.gated(F.linear(x, self.gate_up_proj[e], parts[0]))
                row = row + score * F.linear(h, self.down_proj[e], parts[1])
            rows.append(row)
        return torch.stack(rows)


def silu(h):
    return F.silu(h[:M]) * h[M:]


def clipped(h):
    """gpt-oss: gate and up take turns, both clipped."""
    gate, up = h[0::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def in_fp8(scale):
    """E4M3 in blocks of 32 x 32."""
    layer = fp8.FP8Experts(SIZES, block_size=(32, 32), scale_fmt=scale)
    numbers = {}
    for name in NAMES:
        held = getattr(layer, f"{name}_scale_inv")
        setattr(layer, name, nn.Parameter(bytes_of_e4m3(*getattr(layer, name).shape), requires_grad=False))
        held.data = (2.0 ** -torch.randint(9, 12, held.shape)).to(held.dtype)
        stack = zip(decoded(getattr(layer, name)), held.detach().float(), strict=True)
        numbers[name] = torch.stack([scaled(W, s, 32, 32) for W, s in stack])
    return layer, numbers, silu


def in_fp4(scale):
    """E2M1 in pairs, with a scale for each 32 of a row."""
    layer = fp8.FP8Experts(SIZES, block_size=(32, 32), expert_dtype="fp4", scale_fmt=scale)
    numbers = {}
    for name in NAMES:
        raw = torch.randint(0, 256, getattr(layer, name).shape, dtype=torch.uint8)
        setattr(layer, name, nn.Parameter(raw.view(torch.int8), requires_grad=False))
        held = getattr(layer, f"{name}_scale_inv")
        held.data = (2.0 ** -torch.randint(3, 6, held.shape)).to(held.dtype)
        stack = zip(unpacked(raw), held.detach().float(), strict=True)
        numbers[name] = torch.stack([scaled(W, s, 1, 32) for W, s in stack])
    return layer, numbers, silu


def in_mxfp4(_):
    """The tensors of gpt-oss's checkpoint: blocks (E, O, groups, 16) and scales (E, O, groups)."""
    layer, numbers = mxfp4.Mxfp4GptOssExperts(SIZES), {}
    for name in NAMES:
        rows = getattr(layer, name).shape[1]
        groups = (H if name == "gate_up_proj" else M) // 32
        blocks = torch.randint(0, 256, (E, rows, groups, 16), dtype=torch.uint8)
        scales = torch.randint(122, 125, (E, rows, groups), dtype=torch.uint8)
        layer.register_parameter(f"{name}_blocks", nn.Parameter(blocks, requires_grad=False))
        layer.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))
        stack = zip(unpacked(blocks.flatten(-2)), 2.0 ** (scales.float() - 127), strict=True)
        numbers[name] = torch.stack([scaled(W, s, 1, 32) for W, s in stack])
        getattr(layer, f"{name}_bias").data.normal_()
    return layer, numbers, clipped


KINDS = {
    "fp8": (in_fp8, "float"),
    "fp8 with powers of two": (in_fp8, "ue8m0"),
    "fp4": (in_fp4, "float"),
    "fp4 with powers of two": (in_fp4, "ue8m0"),
    "mxfp4": (in_mxfp4, None),
}
each = pytest.mark.parametrize("kind", KINDS)


class Holder(nn.Module):
    """A block around the experts."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        index = torch.tensor([[0, 2], [1, 2], [1, 0], [2, 1]])
        scores = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.3, 0.7]])
        return self.experts(x, index, scores)


def built(kind):
    """(the experts, their numbers, a dense module of the same numbers)."""
    torch.manual_seed(3)
    build, scale = KINDS[kind]
    layer, numbers, gated = build(scale)
    return layer.requires_grad_(False), numbers, Dense(layer, numbers, gated)


def adapted(module, names=NAMES):
    biased = all(getattr(module, f"{n}_bias", None) is not None for n in names)
    targets = [f"experts.{n}" for n in names]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, lora_bias=biased)
    return road.filled(get_peft_model(Holder(module), config))


def inputs():
    return (torch.arange(4 * H).view(4, H) / 5).sin().requires_grad_()


def answer(model):
    """Output and gradients."""
    x = inputs()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@each
def test_read_as_decoded(kind):
    layer, numbers, _ = built(kind)
    for name in NAMES:
        assert torch.equal(road.read(layer, name), numbers[name])
        assert storage.of(layer, name).shape(layer, name) == numbers[name].shape


@each
@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:]])
def test_adapted_as_on_numbers(kind, names):
    layer, _, dense = built(kind)
    model, twin = adapted(layer, names), adapted(dense, names)
    assert model.get_nb_trainable_parameters() == twin.get_nb_trainable_parameters()
    for found, wanted in zip(answer(model), answer(twin), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@each
def test_saved_and_loaded(kind):
    model = adapted(built(kind)[0])
    state = get_peft_model_state_dict(model)
    other = adapted(built(kind)[0])
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.zero_()
    set_peft_model_state_dict(other, state)
    assert torch.equal(other(inputs()), model(inputs()))


@each
@pytest.mark.parametrize("mode", ["requantize", "compensated", "dequantize"])
def test_merged_and_unmerged(kind, mode):
    layer, numbers, dense = built(kind)
    biases = {name: b.clone() for name, b in layer.named_parameters() if name.endswith("_bias")}
    model, twin = adapted(layer), adapted(dense)
    with torch.no_grad():
        wanted = twin(inputs())
        twin.merge_adapter()
        before = [road.payload(layer, name) for name in NAMES]
        errors = model.merge_adapter(quantized=mode)
        assert len(errors) == 2 and {e.mode for e in errors.values()} == {mode}
        for name in NAMES:
            merged = getattr(dense, name)
            error = (road.read(layer, name) - merged).norm() / merged.norm()
            # FP4 has steps of up to a third of a number
            assert error < (1e-6 if mode == "dequantize" else 0.05 if "fp8" in kind else 0.2)
        if mode == "dequantize":
            torch.testing.assert_close(model(inputs()), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        model.unmerge_adapter()
        assert all(torch.equal(layer.get_parameter(name), b) for name, b in biases.items())
        for name, payload in zip(NAMES, before, strict=True):
            road.same(road.payload(layer, name), payload)
            assert torch.equal(road.read(layer, name), numbers[name])
        torch.testing.assert_close(model(inputs()), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        plain = model.merge_and_unload(quantized="dequantize")
        assert plain.experts is layer
        torch.testing.assert_close(plain(inputs()), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_experts_that_no_token_chose_may_be_named_by_an_id_that_is_none():
    layer, _, dense = built("fp8")
    model, twin = adapted(layer).base_model.model.experts, adapted(dense).base_model.model.experts
    index = torch.tensor([[0, E], [1, 2]])  # routers under expert parallelism mark what others have like this
    scores = torch.tensor([[0.5, 0.5], [0.4, 0.6]])
    x = torch.randn(2, H)
    wanted = torch.cat([twin(x[:1], index[:1, :1], scores[:1, :1]), twin(x[1:], index[1:], scores[1:])])
    torch.testing.assert_close(model(x, index, scores), wanted, rtol=1e-4, atol=1e-3)


def test_what_a_kernel_has_reordered_is_refused_by_name():
    layer, _, _ = built("mxfp4")
    for name in NAMES:
        for held in ("blocks", "scales"):
            delattr(layer, f"{name}_{held}")
        delattr(layer, name)
        setattr(layer, f"{name}_precision_config", object())
    holder = Holder(layer)
    with pytest.raises(NotImplementedError, match=r"Mxfp4GptOssExperts.*Mxfp4Config\(dequantize=True\)"):
        get_peft_model(holder, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    assert holder.experts is layer
