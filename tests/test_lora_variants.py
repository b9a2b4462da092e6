"""Variants of LoRA beside their weights (conformance rows hold those): what they keep, route, look for and refuse."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft
from peft import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    PeftWarning,
    VeloraConfig,
    create_arrow_model,
    get_peft_model,
)
from peft.methods.lora.offsets import last_offsets

HERE = Path(__file__).parent


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(10, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(**more):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["a", "c"], **more}
    model = get_peft_model(net(), LoraConfig(**options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))) * 0.2)
    return model


def layer_of(model, name="a"):
    return model.base_model.model.get_submodule(name)


X = torch.randn(7, 10, generator=torch.Generator().manual_seed(3))

# ---- choosing one ---------------------------------------------------------------------------------------------------

VARIANTS = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
    "use_bdlora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["a"], match_strict=False, nblocks=2)},
    "kasa_config": {"kasa_config": KasaConfig()},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "velora_config": {"velora_config": VeloraConfig(num_groups=3)},
    "arrow_config": {"arrow_config": ArrowConfig()},
}


@pytest.mark.parametrize("first", VARIANTS)
def test_two_variants_at_once_are_refused_by_their_names(first):
    second = next(name for name in VARIANTS if name != first)
    with pytest.raises(ValueError, match=f"(?=.*{first})(?=.*{second}).*Choose one"):
        LoraConfig(**VARIANTS[first], **VARIANTS[second])
    start = "mica" if first in ("monteclora_config", "velora_config") else "pissa"
    with pytest.raises(ValueError, match=f"{first}.*{start!r}"):
        LoraConfig(**VARIANTS[first], init_lora_weights=start)
    if first in ("alora_invocation_tokens", "arrow_config"):
        with pytest.raises(ValueError, match=f"{first} and use_dora"):
            LoraConfig(**VARIANTS[first], use_dora=True)


@pytest.mark.parametrize("name", ["use_bdlora", "kasa_config", "velora_config", "monteclora_config"])
def test_dora_goes_with_the_variants_that_have_a_weight(name):
    model = adapted(**VARIANTS[name], use_dora=True).eval()
    wanted = model(X)
    assert not torch.allclose(wanted, net()(X))
    assert torch.allclose(model.merge_and_unload()(X), wanted, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("name", ["velora_config", "monteclora_config"])
def test_a_variant_may_start_from_parts_of_the_base_weight(name, init, tmp_path):
    plain = net().eval()
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["a", "c"], "init_lora_weights": init}
    model = get_peft_model(net(), LoraConfig(**VARIANTS[name], **options))
    assert torch.allclose(model.eval()(X), plain(X), atol=1e-6)
    assert torch.allclose(model.train()(X), plain(X), atol=1e-6 if name == "velora_config" else 0.02)
    model.save_pretrained(tmp_path / "first")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
    wanted = model.eval()(X)
    assert not torch.allclose(wanted, plain(X), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(X), plain(X))
    model.save_pretrained(tmp_path / "now")
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path / "now").eval()(X), wanted)
    first = str(tmp_path / "first")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=first)
    converted = PeftModel.from_pretrained(net(), tmp_path / "plain").eval()
    assert converted.peft_config["default"].init_lora_weights is True
    assert torch.allclose(converted(X), wanted, atol=1e-5)
    assert torch.allclose(model.merge_and_unload()(X), wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:aLoRA is currently:peft.PeftWarning")
@pytest.mark.parametrize("name", ["alora_invocation_tokens", "arrow_config"])
def test_a_variant_of_linear_layers_names_a_layer_that_is_none(name):
    model = nn.Sequential(nn.Conv1d(4, 8, 3))
    wrong = TypeError if name == "arrow_config" else ValueError
    with pytest.raises(wrong, match=f"{name}.*'0' is a Conv1d"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"], **{**VARIANTS[name], "task_type": None}))
    assert type(model[0]) is nn.Conv1d


@pytest.mark.parametrize("name", ["kasa_config", "monteclora_config", "velora_config", "use_bdlora"])
def test_a_variant_is_saved_and_loaded_exactly(name, tmp_path):
    model = adapted(**VARIANTS[name]).eval()
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(again(X), model(X))
    pickled = copy.deepcopy(model)
    assert torch.equal(pickled(X), model(X))


# ---- a bias of the update -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.emb.weight

    def get_input_embeddings(self):
        return self.emb

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.emb(ids))


def test_a_bias_of_an_embedding_is_saved_loaded_combined_and_converted(tmp_path):
    ids = torch.arange(9)

    def words():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4))

    model = get_peft_model(words(), LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    wanted = model(ids)
    beta = layer_of(model, "0").lora_embedding_bias["default"]
    A, B = (getattr(layer_of(model, "0"), f"lora_embedding_{k}")["default"] for k in "AB")
    assert torch.allclose(wanted, words()(ids) + 4 * ((B @ A).mT + beta), atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "base_model.model.0.lora_embedding_bias" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(PeftModel.from_pretrained(words(), tmp_path)(ids), wanted)
    model.add_weighted_adapter(["default"], [0.5], "mix", combination_type="svd")
    model.set_adapter("mix")
    assert torch.allclose(model(ids), (wanted + words()(ids)) / 2, atol=1e-4)


def test_a_bias_of_an_embedding_is_no_bias_of_the_layer_that_is_tied_to_it():
    options = {"r": 2, "target_modules": ["emb", "head"], "ensure_weight_tying": True, "lora_bias": True}
    with pytest.raises(ValueError, match=r"lora_bias=True.*'head'.*tied"):
        get_peft_model(Tied(), LoraConfig(**options))


def test_the_magnitude_does_not_scale_a_bias_of_the_update():
    model = adapted(use_dora=True, lora_bias=True, target_modules=["a"]).train()
    layer = layer_of(model)
    before = layer(X)
    with torch.no_grad():
        layer.lora_B["default"].bias.add_(1.0)
    assert torch.allclose(layer(X) - before, torch.full_like(before, 1.5), atol=1e-5)


# ---- KaSA -----------------------------------------------------------------------------------------------------------


def test_kasa_starts_at_the_weight_without_its_least_directions_and_disabled_is_the_base():
    model = get_peft_model(net(), LoraConfig(r=3, target_modules=["a"], kasa_config={}))
    U, S, Vh = torch.linalg.svd(net().a.weight.detach(), full_matrices=False)
    W = (U[:, :-3] * S[:-3]) @ Vh[:-3]
    assert torch.allclose(layer_of(model)(X), X @ W.mT + net().a.bias, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(X), net()(X))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.unload()(X), net()(X))


def test_kasas_term_for_the_loss_is_the_papers_and_learns():
    model = adapted(kasa_config=KasaConfig(beta=0.5, gamma=0.25))
    wanted = 0.0
    for name in "ac":
        p = layer_of(model, name)
        A, B, d = p.lora_A["default"].weight, p.lora_B["default"].weight, p.lora_diag["default"]
        wanted = wanted + 0.5 * (d**2).sum()
        wanted = wanted + 0.25 * ((B.mT @ B - torch.eye(4)).norm() + (A @ A.mT - torch.eye(4)).norm())
    found = model.base_model._get_kasa_loss()
    assert torch.allclose(found, wanted)
    found.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.base_model._get_kasa_loss(["other"]) == 0.0


def test_kasa_drops_the_input_of_its_update_only():
    model = adapted(kasa_config=KasaConfig(), lora_dropout=0.5, target_modules=["a"]).train()
    p = layer_of(model)
    torch.nn.init.zeros_(p.lora_B["default"].weight)
    assert torch.allclose(p(X), model.eval() and p(X), atol=1e-6)
    assert not torch.equal(
        adapted(kasa_config=KasaConfig(), lora_dropout=0.5).train()(X), adapted(kasa_config=KasaConfig())(X)
    )


def test_kasa_refuses_by_name():
    with pytest.raises(ValueError, match=r"r=8.*'c'"):
        get_peft_model(net(), LoraConfig(r=8, target_modules=["a", "c"], kasa_config={}))
    model = adapted(kasa_config=KasaConfig())
    model.add_adapter("other", LoraConfig(r=4, target_modules=["a"], kasa_config={}))
    with pytest.raises(ValueError, match="Only one adapter"):
        model.base_model.set_adapter(["default", "other"])


# ---- BD-LoRA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules_bd_a": ["a"], "nblocks": 2}, "neither"),
        ({"target_modules_bd_a": ["a", "c"], "nblocks": 3}, "10 in-features and 4 r"),
        ({"target_modules_bd_b": ["a"], "match_strict": False, "nblocks": 5}, "12 out-features"),
        ({"target_modules_bd_a": ["a"], "target_modules_bd_b": ["c"], "nblocks": 2, "match_strict": True}, None),
    ],
)
def test_blocks_have_to_fit(options, match):
    make = lambda: adapted(use_bdlora=BdLoraConfig(**options))  # noqa: E731
    if match is None:
        shapes = {n: tuple(p.shape) for n, p in make().named_parameters() if p.requires_grad}
        assert sorted(shapes.values()) == sorted([(4, 5), (12, 4), (4, 12), (8, 2)])
        return
    with pytest.raises(ValueError, match=match):
        make()


def test_a_layer_in_both_lists_is_refused():
    with pytest.raises(ValueError, match=r"both of its lists"):
        LoraConfig(use_bdlora={"target_modules_bd_a": ["a"], "target_modules_bd_b": ["a"]})
    model = nn.ModuleDict({"up_a": nn.Linear(4, 4)})
    options = {"target_modules_bd_a": ["up"], "target_modules_bd_b": ["_a"]}
    with pytest.raises(ValueError, match=r"'up_a' is in both lists, by 'up' and '_a'"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["up_a"], use_bdlora=options))


def test_a_blocked_convolution_maps_slices_of_channels():
    def kernel(**options):
        model = get_peft_model(
            nn.Sequential(nn.Conv2d(4, 8, 3, bias=False)),
            LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_bdlora={**options, "nblocks": 2}),
        )
        return layer_of(model, "0").get_delta_weight("default").detach(), layer_of(model, "0")

    _, layer = kernel(target_modules_bd_a=["0"])
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert A.weight.shape == (4, 2, 3, 3) and B.weight.shape == (8, 4, 1, 1)
    x = torch.randn(2, 4, 5, 5)
    assert torch.allclose(layer(x), layer.base_layer(x) + layer.scaling["default"] * B(A(x)), atol=1e-5)
    D, layer = kernel(target_modules_bd_b=["0"])
    assert layer.lora_B["default"].weight.shape == (8, 2, 1, 1)
    assert torch.linalg.matrix_rank(D[:4].flatten(1)) == 2, "half of the ranks reach a half of the output"


def test_groups_and_blocks_of_a_convolution_have_to_fit_together():
    def wrap(blocks, r):
        options = {"target_modules_bd_b": ["0"], "nblocks": blocks}
        model = nn.Sequential(nn.Conv2d(6, 12, 3, groups=2))
        return get_peft_model(model, LoraConfig(r=r, target_modules=["0"], use_bdlora=options))

    assert layer_of(wrap(3, 6), "0").lora_B["default"].weight.shape == (12, 1, 1, 1), "six blocks"
    with pytest.raises(ValueError, match=r"nblocks=3 \(of which 2 groups make 6\) does not divide 4 r"):
        wrap(3, 4)


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_blocked_adapter_of_another_rank_is_swapped_in_block_by_block(side, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    def made(r):
        options = {f"target_modules_bd_{side}": ["a", "c"], "nblocks": 2}
        return adapted(r=r, lora_alpha=r, use_bdlora=options).eval()

    small, large = made(2), made(4)
    small.save_pretrained(tmp_path)
    hotswap_adapter(large, tmp_path, "default")
    assert torch.allclose(large(X), small(X), atol=1e-6)


# ---- VeLoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, "pissa"])
def test_velora_has_loras_output_and_compresses_the_gradient_of_a_only(init):
    options = VeloraConfig(num_groups=3, scale=2.0, init_type="random")
    model = adapted(velora_config=options, target_modules=["a"], init_lora_weights=init).train()
    layer = layer_of(model)
    x = X.clone().requires_grad_()
    A, B, v = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_velora_embed["default"]
    assert v.shape == (4,) and torch.allclose(v.norm(), torch.ones(()))
    y = layer(x)
    W = net().a.weight.detach()
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W = W - (U[:, :4] * S[:4]) @ Vh[:4]
    assert torch.allclose(y, x @ W.mT + net().a.bias + 1.5 * x @ A.mT @ B.mT, atol=1e-5)
    g = torch.randn_like(y)
    y.backward(g)
    padded = nn.functional.pad(X, (0, 2)).view(7, 3, 4)
    rebuilt = (2.0 * (padded @ v)[..., None] * v).flatten(1)[:, :10]
    assert torch.allclose(A.grad, 1.5 * B.mT.detach() @ g.mT @ rebuilt, atol=1e-4)
    assert torch.allclose(B.grad, 1.5 * g.mT @ (X @ A.mT), atol=1e-4)
    assert torch.allclose(x.grad, g @ (W + 1.5 * B @ A), atol=1e-4)


@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once"])
def test_veloras_direction_is_the_mean_group_of_every_batch_or_the_first(kind):
    model = adapted(velora_config=VeloraConfig(num_groups=5, init_type=kind), target_modules=["a"]).train()
    layer = layer_of(model)
    means = []
    for x in (X, X.flip(1) + 1):
        layer(x)
        mean = x.view(7, 5, 2).mean((0, 1))
        means.append(mean / mean.norm())
    assert torch.allclose(layer.lora_velora_embed["default"], means[-1 if kind == "batch_average" else 0], atol=1e-6)
    before = layer.lora_velora_embed["default"].clone()
    model.eval()(X + 3)
    assert torch.equal(layer.lora_velora_embed["default"], before), "evaluation changes nothing"
    layer.train()(torch.zeros(3, 10))
    assert torch.isfinite(layer.lora_velora_embed["default"]).all()


@pytest.mark.parametrize("shape", [(3, 6, 5, 5), (6, 5, 5)])
def test_velora_on_a_convolution_compresses_the_channels_of_every_place(shape):
    torch.manual_seed(0)
    base = nn.Conv2d(6, 8, 3, padding=1, stride=2)
    options = LoraConfig(
        r=2, target_modules=["0"], init_lora_weights=False,
        velora_config=VeloraConfig(num_groups=4, scale=2.0, init_type="random"),
    )  # fmt: skip
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), options).train()
    layer = layer_of(model, "0")
    A, B, v = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_velora_embed["default"]
    assert v.shape == (2,)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, [A, B, x], g)
    plain = get_peft_model(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    plain.load_state_dict(model.state_dict(), strict=False)
    inner = layer_of(plain, "0")
    A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    wanted = inner(x)
    assert torch.allclose(y, wanted, atol=1e-5)
    _, dB, dx = torch.autograd.grad(wanted, [A, B, x], g)
    pairs = x.detach().movedim(-3, -1).unflatten(-1, (3, 2))
    rebuilt = (2.0 * (pairs @ v)[..., None] * v).flatten(-2).movedim(-1, -3)
    (dA,) = torch.autograd.grad(inner(rebuilt), A, g)
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(found, (dA, dB, dx), strict=True))
    torch.compiler.reset()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    again = torch.autograd.grad(fast, [layer.lora_A["default"].weight, layer.lora_B["default"].weight, x], g)
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(found, again, strict=True))


def test_velora_is_plain_where_nothing_of_an_input_is_kept():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.att = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, ids):
            x = self.emb(ids)
            return self.att(x, x, x)[0]

    torch.manual_seed(0)
    options = LoraConfig(r=2, target_modules=["emb", "att"], init_lora_weights=False, velora_config={"num_groups": 2})
    model = get_peft_model(Words(), options)
    found = []
    for mode in (True, False):  # evaluation is LoRA
        model.zero_grad()
        model.train(mode)(torch.arange(6).view(2, 3)).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == 6 and all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv2d(6, 8, 1)], ids=["linear", "conv"])
def test_velora_learns_under_autocast(layer):
    torch.manual_seed(0)
    options = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, velora_config={"num_groups": 2})
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), options).train()
    x = torch.randn(5, 6, *[1] * (layer.weight.dim() - 2), requires_grad=True)
    held = [*(p for p in model.parameters() if p.requires_grad), x]
    wanted = torch.autograd.grad(model(x).square().sum(), held)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    found = torch.autograd.grad(y.float().square().sum(), held)
    assert all((one - two).norm() < 0.03 * two.norm() for one, two in zip(found, wanted, strict=True))


def test_velora_compresses_under_dora_too():
    options = VeloraConfig(num_groups=3, init_type="random")
    model = adapted(velora_config=options, use_dora=True, target_modules=["a"]).train()
    layer = layer_of(model)
    A, B, v = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_velora_embed["default"]
    y = layer(X)
    g = torch.randn_like(y)
    y.backward(g)
    V = net().a.weight + 1.5 * (B @ A).detach()
    m = layer.lora_magnitude_vector["default"].weight
    gain = (m / V.norm(dim=1)).detach()
    assert torch.allclose(y, gain * (X @ V.mT) + net().a.bias, atol=1e-5)
    rebuilt = ((nn.functional.pad(X, (0, 2)).view(7, 3, 4) @ v)[..., None] * v).flatten(1)[:, :10]
    assert torch.allclose(A.grad, 1.5 * B.mT.detach() @ (g * gain).mT @ rebuilt, atol=1e-4)


def test_velora_keeps_a_group_of_numbers_instead_of_the_input():
    def kept(**more):
        model = get_peft_model(nn.Sequential(nn.Linear(64, 8)), LoraConfig(r=2, target_modules=["0"], **more)).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(32, 64, requires_grad=False))
        return sizes

    plain, small = kept(), kept(velora_config=VeloraConfig(num_groups=4))
    assert 32 * 64 in plain and 32 * 64 not in small and 32 * 4 in small


# ---- MonteCLoRA -----------------------------------------------------------------------------------------------------


def test_monteclora_samples_around_a_in_training_and_is_lora_otherwise():
    model = adapted(monteclora_config=MontecloraConfig(sample_scaler=0.1), target_modules=["a"])
    layer = layer_of(model)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    plain = X @ (net().a.weight + 1.5 * B @ A).mT + net().a.bias
    model.eval()
    assert torch.allclose(layer(X), plain, atol=1e-5)
    model.train()
    torch.manual_seed(1)
    drawn = torch.stack([layer(X) for _ in range(400)]).detach()
    assert drawn.std(0).min() > 0
    assert torch.allclose(drawn.mean(0), plain, atol=5 * (drawn.std(0) / 20).max().item())
    sampler = layer.lora_monteclora_sampler["default"]
    assert torch.allclose(sampler.expert_weights.sum(), torch.ones(()))
    layer(X).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (A, B, sampler.std_prior, sampler.expert_weights_prior))


def test_monteclora_samples_where_a_parent_reads_the_weight_too():
    options = LoraConfig(
        r=2, target_modules=["0"], init_lora_weights=False, monteclora_config=MontecloraConfig(sample_scaler=1.0)
    )
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)), options)
    attention = model.base_model.model[0]
    x = torch.randn(2, 3, 8)
    one, other = (attention.train()(x, x, x)[0] for _ in "12")
    assert not torch.allclose(one, other)
    one, other = (attention.eval()(x, x, x)[0] for _ in "12")
    assert torch.equal(one, other)


def test_a_merge_in_training_mode_writes_what_evaluation_computes():
    model = adapted(monteclora_config=MontecloraConfig(sample_scaler=0.5)).train()
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(X), model.eval()(X), atol=1e-5)


def test_monteclora_samples_under_dora_around_what_is_merged():
    options = MontecloraConfig(sample_scaler=0.1)
    model = adapted(monteclora_config=options, use_dora=True, target_modules=["a"])
    layer = layer_of(model)
    wanted = model.eval()(X)
    model.train()
    torch.manual_seed(1)
    drawn = torch.stack([model(X) for _ in range(400)]).detach()
    assert drawn.std(0).min() > 0
    layer(X).sum().backward()
    assert layer.lora_monteclora_sampler["default"].std_prior.grad.any()
    assert model.base_model._get_monteclora_loss() != 0.0
    assert torch.allclose(copy.deepcopy(model).merge_and_unload()(X), wanted, atol=1e-5)


def test_montecloras_terms_are_the_divergences_of_the_distributions():
    options = MontecloraConfig(kl_loss_weight=1.0, dirichlet_prior=0.4, num_samples=3)
    model = adapted(monteclora_config=options, target_modules=["a"]).train()
    sampler = layer_of(model).lora_monteclora_sampler["default"]
    torch.manual_seed(5)
    found = model.base_model._get_monteclora_loss()
    torch.manual_seed(5)
    variance = sampler.variance()
    Dirichlet, Normal = torch.distributions.Dirichlet, torch.distributions.MultivariateNormal
    kl = torch.distributions.kl_divergence
    wanted = kl(Dirichlet(sampler.expert_weights_prior.exp()), Dirichlet(torch.full((3,), 0.4)))
    wanted += 3 * kl(Normal(torch.zeros(4), torch.diag(variance)), Normal(torch.zeros(4), torch.eye(4)))
    v = torch.exp(2 * sampler.std_prior)
    wanted += 4 / 2 * (v.sum() - v.log().sum() - 4)  # of two Wishart distributions with 4 degrees of freedom
    assert torch.allclose(found, wanted, rtol=1e-4)
    assert model.eval().base_model._get_monteclora_loss() == 0.0


def test_the_trainer_adds_montecloras_term():
    from peft.helpers import MontecloraTrainerMixin

    class Base:
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss = model(inputs["x"]).square().mean()
            return (loss, "outputs") if return_outputs else loss

    class Trainer(MontecloraTrainerMixin, Base):
        pass

    options = MontecloraConfig(kl_loss_weight=1.0, use_entropy=True, sample_scaler=0.0)
    model = adapted(monteclora_config=options, lora_dropout=0.0).train()
    torch.manual_seed(0)
    found, outputs = Trainer().compute_loss(model, {"x": X}, return_outputs=True)
    plain = model.eval()(X).square().mean()
    assert outputs == "outputs" and not torch.allclose(found, plain)
    assert torch.allclose(Trainer().compute_loss(model, {"x": X}), plain, atol=1e-6), "evaluation has no such term"
    assert torch.allclose(Trainer().compute_loss(adapted().train(), {"x": X}), adapted()(X).square().mean(), atol=1e-6)


# ---- aLoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "tokens", "offset"),
    [
        ([1, 5, 7, 2], [5, 7], 3),
        ([5, 7, 5, 7, 1], [5, 7], 3),
        ([5, 1, 7], [5, 7], 0),
        ([5], [5, 7], 0),
        ([7, 7], [7], 1),
    ],
)
def test_the_last_occurrence_of_the_tokens_counts(row, tokens, offset):
    assert last_offsets(torch.tensor([row]), tokens).tolist() == [offset]


IDS = torch.tensor([[12, 5, 7, 12, 11, 14], [12, 17, 9, 5, 7, 10], [3, 4, 5, 6, 8, 9]])
ACTING = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def activated(llama, **more):
    options = {
        "r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False,
        "alora_invocation_tokens": [5, 7], "task_type": "CAUSAL_LM", **more,
    }  # fmt: skip
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(llama), LoraConfig(**options)).eval()


def test_an_activated_adapter_acts_from_its_tokens_on(llama):
    model = activated(llama)
    differs = (model(input_ids=IDS).logits - llama(IDS).logits).abs().amax(-1) > 1e-6
    assert torch.equal(differs, ACTING)
    always = activated(llama, alora_invocation_tokens=None)
    whole = always(input_ids=torch.cat([IDS[:1, 1:]], 1)).logits
    first = activated(llama)(input_ids=IDS[:1, 1:]).logits
    assert torch.allclose(whole, first, atol=1e-5), "a row that starts with the tokens is a plain LoRA's"


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_with_and_without_a_cache(llama, beams):
    model = activated(llama)
    options = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cached = model.generate(**options)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    assert not torch.equal(cached[:2], llama.generate(**options)[:2])
    assert torch.equal(cached[2], llama.generate(**options)[2]), "a row without the tokens is the base model's"
    given = [5, 3, None]
    for cache in (True, False):
        assert torch.equal(model.generate(**options, alora_offsets=given, use_cache=cache), cached)


def test_what_the_base_model_has_cached_stays_valid(llama):
    model = activated(llama)
    past = llama(IDS[1:2, :3], use_cache=True).past_key_values
    found = model(input_ids=IDS[1:2, 3:], past_key_values=past).logits
    assert torch.allclose(found, model(input_ids=IDS[1:2]).logits[:, 3:], atol=1e-5)


FIRST = {
    "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "IA3": lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, task_type="CAUSAL_LM"),
    "prompts": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["added", "loaded"])
@pytest.mark.parametrize("first", FIRST)
def test_an_activated_adapter_may_come_after_one_of_any_method(llama, first, loaded, tmp_path):
    alone = activated(llama)
    model = get_peft_model(copy.deepcopy(llama), FIRST[first]())
    if loaded:
        alone.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "late")
    else:
        model.add_adapter("late", copy.copy(alone.peft_config["default"]))
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(alone), "late")
    model.set_adapter("late")
    model.eval()
    options = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model(input_ids=IDS).logits, alone(input_ids=IDS).logits)
    assert torch.equal(model.generate(**options), alone.generate(**options))
    names = ["late", "__base__", "late"]
    if first != "prompts":
        mixed = model(input_ids=IDS, adapter_names=names).logits
        assert torch.allclose(mixed[1], llama(IDS).logits[1], atol=1e-6)
        assert torch.allclose(mixed[0], alone(input_ids=IDS).logits[0], atol=1e-6)
    base = model.unload()
    assert not base._forward_pre_hooks and not base._forward_hooks


def test_an_activated_adapter_that_fails_to_load_leaves_no_hooks(llama, tmp_path):
    activated(llama).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    base = copy.deepcopy(llama)
    model = get_peft_model(base, FIRST["LoHa"]())
    with pytest.raises(ValueError, match="no complete safetensors"):
        model.load_adapter(tmp_path, "late")
    activated(llama, target_modules=["k_proj"]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "r": 3}))
    with pytest.raises(RuntimeError, match="size mismatch"), pytest.warns(peft.errors.ChangedConfigWarning):
        model.load_adapter(tmp_path, "late")
    assert not base._forward_pre_hooks and not model.base_model._forward_pre_hooks


def test_offsets_can_be_given(llama):
    model = activated(llama)
    assert torch.equal(model(input_ids=IDS, alora_offsets=[5, 3, None]).logits, model(input_ids=IDS).logits)
    assert torch.equal(model(input_ids=IDS, alora_offsets=[None, 0, None]).logits, llama(IDS).logits)
    differs = model(input_ids=IDS, alora_offsets=[99, 1, None]).logits != llama(IDS).logits
    assert differs[0].any(-1).all() and differs[1].any(-1).tolist() == [False] * 5 + [True]


def test_each_row_of_a_mixed_batch_has_the_tokens_of_its_adapter(llama):
    model = activated(llama)
    one = model(input_ids=IDS).logits
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False,
                                          alora_invocation_tokens=[12], task_type="CAUSAL_LM"))  # fmt: skip
    mixed = model(input_ids=IDS, adapter_names=["other", "default", "__base__"]).logits
    model.set_adapter("other")
    other = model(input_ids=IDS).logits
    wanted = torch.stack([other[0], one[1], llama(IDS).logits[2]])
    assert torch.allclose(mixed, wanted, atol=1e-5) and not torch.equal(other[0], llama(IDS).logits[0])


def test_an_activated_adapter_compiles_to_one_graph(llama):
    model = activated(llama)
    wanted = model(input_ids=IDS).logits
    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(input_ids=IDS).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_inputs_without_tokens_are_told(llama):
    model = activated(llama)
    with pytest.warns(PeftWarning, match="input_ids"):
        found = model(inputs_embeds=llama.model.embed_tokens(IDS)).logits
    assert torch.equal(found, llama(IDS).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forwards_get_their_own_offsets_again_in_any_order(llama, reentrant):
    def grads(checkpointing, order):
        model = activated(llama).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses = [model(input_ids=ids, labels=ids).loss for ids in (IDS, IDS.roll(1, 1), IDS.flip(0))]
        for i in order:
            losses[i].backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain = grads(False, (0, 1, 2))
    assert any("lora_B" in n for n in plain)
    for order in ((0, 1, 2), (2, 0, 1)):
        found = grads(True, order)
        assert found.keys() == plain.keys()
        assert all(torch.allclose(found[n], g, atol=1e-6) for n, g in plain.items())


def test_an_activated_adapter_is_not_merged_and_leaves_no_trace(llama):
    model = activated(llama)
    with pytest.raises(NotImplementedError, match="aLoRA"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="aLoRA"):
        model.merge_and_unload()
    base = model.unload()
    assert not base._forward_pre_hooks and not base._forward_hooks
    assert torch.equal(base(IDS).logits, llama(IDS).logits)


def test_rows_that_are_regrouped_are_told():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a = nn.Embedding(20, 4), nn.Linear(4, 4)

        def forward(self, input_ids):
            return self.a(self.e(input_ids).flatten(0, 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # no task
        model = get_peft_model(Flat(), LoraConfig(r=2, target_modules=["a"], alora_invocation_tokens=[5]))
    with pytest.raises(ValueError, match="regroup rows"):
        model(input_ids=torch.tensor([[5, 1, 2]]))


# ---- Arrow ----------------------------------------------------------------------------------------------------------


def arrow_case():
    folder = HERE / "data" / "combo-arrow"
    case = json.loads((folder / "case.json").read_text())
    return case, load_file(folder / "io.safetensors"), [str(folder / path) for path in case["task_paths"]]


def arrow_base(case):
    transformers = pytest.importorskip("transformers")
    base = case["base"]
    model = getattr(transformers, base["model"])(getattr(transformers, base["config"])(**base["kwargs"]))
    name = Path(case["base_file"]).name
    model.load_state_dict(load_file(HERE / "golden" / "bases" / name), strict=False)
    return model.eval()


def test_arrow_routes_as_the_other_library_does():
    case, io, paths = arrow_case()
    base = arrow_base(case)
    plain = base(input_ids=io["input.input_ids"], attention_mask=io["input.attention_mask"]).logits
    model = create_arrow_model(base, paths, ArrowConfig(**case["arrow_config"])).eval()
    assert model.active_adapter == "arrow_router" and set(model.peft_config) == set(case["saved"])
    inputs = {key[6:]: value for key, value in io.items() if key.startswith("input.")}
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, io["output"], atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, plain)
    with pytest.raises(RuntimeError, match="router"):
        model.merge_adapter()


def experts(tmp_path, count=3, **more):
    paths = []
    for i in range(count):
        base = net()
        torch.manual_seed(10 + i)
        options = {"r": 2, "lora_alpha": 3, "target_modules": ["a", "c"], "init_lora_weights": False, **more}
        get_peft_model(base, LoraConfig(**options)).save_pretrained(tmp_path / f"e{i}")
        paths.append(str(tmp_path / f"e{i}"))
    return paths


@pytest.mark.parametrize("gks", [False, True])
def test_arrow_is_its_formula_and_leaves_the_experts_as_they_are(tmp_path, gks):
    paths = experts(tmp_path, 5)
    options = ArrowConfig(top_k=2, router_temperature=0.5, use_gks=gks, rng_seed=1)
    model = create_arrow_model(net(), paths[:3], options, paths[3:] if gks else None).eval()
    layer = layer_of(model)
    pairs = [load_file(f"{path}/adapter_model.safetensors") for path in paths]
    A, B = (torch.stack([p[f"base_model.model.a.lora_{k}.weight"] for p in pairs]) for k in "AB")
    A, B = (t[:3] - t[3:].mean(0) if gks else t[:3] for t in (A, B))
    wanted = X @ net().a.weight.mT + net().a.bias
    for i, x in enumerate(X):
        likeness = torch.stack([(torch.linalg.svd(b @ a)[2][0] @ x).abs() for a, b in zip(A, B, strict=True)])
        best = likeness.topk(2)
        w = (best.values / 0.5).softmax(0)
        wanted[i] += sum(w[j] * 1.5 * B[e] @ A[e] @ x for j, e in enumerate(best.indices))
    assert torch.allclose(layer(X), wanted, atol=1e-2)
    name = "base_model.model.a.lora_A.weight"
    assert torch.equal(layer.lora_A["task_0"].weight, pairs[0][name]), (
        "general knowledge is not taken from what is held"
    )
    model.set_adapter("task_1")
    assert torch.allclose(model(X), PeftModel.from_pretrained(net(), paths[1])(X), atol=1e-6)


def test_an_expert_that_comes_later_is_routed_to(tmp_path):
    paths = experts(tmp_path, 3)
    model = create_arrow_model(net(), paths[:2], ArrowConfig(top_k=3, rng_seed=0)).eval()
    before = model(X)
    model.load_adapter(paths[2], "more")
    model.set_adapter("arrow_router")
    assert not torch.allclose(model(X), before)
    model.delete_adapter("more")
    assert torch.equal(model(X), before)


def test_a_router_compiles_to_one_graph_that_follows_the_experts(tmp_path):
    model = create_arrow_model(net(), experts(tmp_path, 2), ArrowConfig(top_k=1, rng_seed=0)).eval()
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(fast(X), model(X), atol=1e-5)
    with torch.no_grad():
        layer_of(model).lora_A["task_1"].weight.mul_(3)
    assert torch.allclose(fast(X), model(X), atol=1e-5)


def test_only_the_router_is_saved_in_its_folder(tmp_path):
    model = create_arrow_model(net(), experts(tmp_path), ArrowConfig(rng_seed=0))
    model.save_pretrained(tmp_path / "out", selected_adapters=["arrow_router"])
    saved = load_file(tmp_path / "out" / "arrow_router" / "adapter_model.safetensors")
    assert set(saved) == {f"base_model.model.{n}.lora_{k}.weight" for n in "ac" for k in "AB"}
    config = json.loads((tmp_path / "out" / "arrow_router" / "adapter_config.json").read_text())
    assert config["arrow_config"]["task_adapter_names"] == ["task_0", "task_1", "task_2"]


def test_arrow_refuses_by_name(tmp_path):
    paths = experts(tmp_path, 2)
    with pytest.raises(ValueError, match="task_specific_adapter_paths"):
        create_arrow_model(net(), [], ArrowConfig())
    with pytest.raises(ValueError, match="general_adapter_paths"):
        create_arrow_model(net(), paths, ArrowConfig(use_gks=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="adapter_config"):
        create_arrow_model(net(), [str(tmp_path / "empty")], ArrowConfig())
    get_peft_model(net(), LoraConfig(r=3, target_modules=["a", "c"])).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"task_1 has r=3"):
        create_arrow_model(net(), [paths[0], str(tmp_path / "wide")], ArrowConfig())
    router = get_peft_model(net(), LoraConfig(r=2, target_modules=["a"], arrow_config=ArrowConfig()))
    with pytest.raises(ValueError, match="no adapter to route to"):
        router(X)


def test_a_temperature_near_zero_takes_the_best_expert_alone(tmp_path):
    paths = experts(tmp_path, 3)
    model = create_arrow_model(net(), paths, ArrowConfig(top_k=3, router_temperature=1e-4, rng_seed=0)).eval()
    sharp = layer_of(model)(X)
    one = create_arrow_model(net(), paths, ArrowConfig(top_k=1, rng_seed=0)).eval()
    assert torch.allclose(sharp, layer_of(one)(X), atol=1e-3)
    assert math.isfinite(sharp.sum())
