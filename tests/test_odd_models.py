"""Models and calls out of the ordinary: the right answer, or a refusal that says why."""

from __future__ import annotations

import copy
import importlib
import json
import sys

import pytest
import torch
from torch import nn
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from torch.nn.utils import parametrizations, parametrize, prune

import peft
from conformance import rows
from conformance.layouts import LAYOUTS
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.call import Call


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def adapted(model: nn.Module | None = None, **changes) -> peft.PeftModel:
    """A model with an adapter that does something."""
    config = LoraConfig(**{"r": 2, "target_modules": ["0"], **changes})
    model = get_peft_model(base() if model is None else model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and not p.is_meta:
                p.add_(torch.randn(p.shape, generator=generator).to(p) / 3)
    return model.eval()


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("meta", [False, True], ids=["", "meta"])
def test_a_start_taken_from_the_base_follows_the_base_that_is_loaded_later(init, meta):
    trained = adapted(init_lora_weights=init)
    state = trained.state_dict()
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    if meta:
        with torch.device("meta"):
            later = get_peft_model(base(), config)
    else:
        later = get_peft_model(base(seed=5), config)
    later.load_state_dict(state, assign=meta)
    with torch.no_grad():
        assert torch.allclose(later.eval()(X), trained(X), atol=1e-5)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_computed_weight_is_adapted_but_not_merged(wrap):
    model = base()
    wrap(model[0])
    model = adapted(model)
    with torch.no_grad():
        wanted = model(X)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="'0' is computed at each call"):
                merge()
        assert torch.equal(model(X), wanted)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_replicas_for_data_parallelism_run_on_their_own_tensors(changes, monkeypatch):
    model = adapted(**changes)
    module = sys.modules["torch.nn.parallel.replicate"]

    def scaled(tensors, devices, detach=False):
        return [[t * 1.5 if t.is_floating_point() else t.clone() for t in tensors]]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", scaled)
    monkeypatch.setattr(module, "_get_device_index", lambda *a, **k: 0)
    (replica,) = module.replicate(model, [0])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for t in (*twin.parameters(), *twin.buffers()):
            t.mul_(1.5)
        assert torch.allclose(replica(X), twin(X), atol=1e-5)
        assert not torch.allclose(replica(X), model(X))


def test_a_state_with_the_models_own_names_is_loaded():
    one, two = adapted(), get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    set_peft_model_state_dict(two, one.state_dict())
    wanted = get_peft_model_state_dict(one)
    assert all(torch.equal(v, wanted[k]) for k, v in get_peft_model_state_dict(two).items())


def test_a_state_of_the_base_alone_is_no_adapter():
    model = adapted()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items() if "lora_" not in k}
    with pytest.raises(ValueError, match="No tensor of the checkpoint fits"):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_adapter_on_an_offloaded_base_has_numbers():
    accelerate = pytest.importorskip("accelerate")
    model = base()
    with torch.no_grad():
        wanted = model(X)
    accelerate.cpu_offload(model, torch.device("cpu"))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    assert {p.device.type for n, p in model.named_parameters() if "lora_" in n} == {"cpu"}
    with torch.no_grad():
        assert torch.allclose(model(X), wanted)


@pytest.mark.parametrize("dora", [False, True])
def test_what_needs_an_offloaded_weight_at_other_times_brings_it_in(dora, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    wanted = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], use_dora=dora, init_lora_weights=False))
    wanted.save_pretrained(tmp_path)
    model = base()
    accelerate.cpu_offload(model, torch.device("cpu"))
    model = peft.PeftModel.from_pretrained(model, str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(model(X), wanted(X))
        merged = model.merge_and_unload()
        assert merged[0].weight.is_meta
        torch.testing.assert_close(merged(X), wanted(X))


class Words(nn.Sequential):
    """Tells which its embedding is, as transformers' models do."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(12, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 12))

    def get_input_embeddings(self) -> nn.Module:
        return self[0]


OFFLOADED = {
    "tokens": lambda: LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1, 2]}),
    "whole": lambda: LoraConfig(r=2, target_modules=["1"], modules_to_save=["3"]),
    "words": lambda: LoraConfig(r=2, target_modules=["0", "1"]),
    "frod": lambda: peft.FrodConfig(target_modules=["1"]),
    "adamss": lambda: peft.AdamssConfig(target_modules=["1"], r=4),
}


@pytest.mark.parametrize("name", OFFLOADED)
def test_adapters_come_change_places_and_sum_up_where_the_base_is_offloaded(name, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from peft.utils.hotswap import hotswap_adapter

    ids, found = torch.arange(12).view(3, 4), []
    for offloads in (False, True):
        model = Words()
        if offloads:
            accelerate.cpu_offload(model, torch.device("cpu"))
        torch.manual_seed(3)
        model = get_peft_model(model, OFFLOADED[name]())
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        if not offloads:
            model.save_pretrained(tmp_path)
        model.load_adapter(str(tmp_path), "other")
        model.add_weighted_adapter(["default", "other"], [0.6, 0.7], "sum", combination_type="linear")
        model.set_adapter("sum")
        found.append([model(ids)])
        model.set_adapter("default")
        hotswap_adapter(model, str(tmp_path), "default")
        found[-1].append(model(ids))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("which", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize(
    "kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "everywhere", "class"]
)
@pytest.mark.parametrize("dora", [False, True])
def test_hooks_and_patches_of_the_inner_layers_are_honoured(which, kind, dora, monkeypatch):
    model = adapted(target_modules=["0", "2"], use_dora=dora)
    layer = model.base_model.model[2]
    inner = layer.base_layer if which == "base_layer" else getattr(layer, which)["default"]
    seen = []

    def note(module, *_):
        if module is inner:
            seen.append(1)

    if kind == "class":
        plain = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (note(self), plain(self, x))[1])
    elif kind == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(note)
    else:
        getattr(inner, f"register_{kind}_hook")(note)
    try:
        model(X).sum().backward()
    finally:
        if kind == "everywhere":
            handle.remove()
    assert seen == [1]


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    "changes", [{}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_hooks_on_the_factors_of_a_convolution_are_honoured(changes, which):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"))
    model, x, seen = adapted(net, **changes), torch.randn(2, 4, 7, 7), []
    wanted = model(x)
    inner = getattr(net[0], which)["default"]
    handle = inner.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(model(x), wanted, atol=1e-5)
    handle.remove()
    inner.register_forward_hook(lambda _module, _args, y: 0 * y)
    assert seen == [1] and not torch.allclose(model(x), wanted, atol=1e-3)


@pytest.mark.parametrize(
    "compute",
    [
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: parametrizations.weight_norm(m),
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
    ],
    ids=["pruned", "norm", "parametrized"],
)
def test_a_target_parameter_that_is_computed_since_is_refused(compute):
    model = adapted(target_modules=None, target_parameters=["0.weight"])
    compute(model.base_model.model[0].base_layer)
    with pytest.raises(ValueError, match="computed at each call"):
        model(X)
    with model.disable_adapter():
        model(X)


@pytest.mark.parametrize(
    "compute",
    [
        lambda m: prune.l1_unstructured(m, "bias", 0.5),
        lambda m: parametrize.register_parametrization(m, "bias", nn.Softplus(), unsafe=True),
    ],
    ids=["pruned", "parametrized"],
)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    "config",
    [LoraConfig(lora_bias=True), LoraConfig(), IA3Config(feedforward_modules=[], init_ia3_weights=False)],
    ids=["lora_bias", "lora", "ia3"],
)
def test_a_bias_that_is_computed_is_not_merged_into(config, many, compute):
    made, config = base(), copy.deepcopy(config)
    compute(made[0])
    config.target_modules = ["0", "2"] if many else ["0"]
    model = get_peft_model(made, config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.requires_grad)
        wanted = model(X)
        if type(config) is LoraConfig and not config.lora_bias:
            model.merge_adapter()
            torch.testing.assert_close(model(X), wanted)
            return
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="The bias of '0' is computed at each call"):
                merge()
        assert torch.equal(model(X), wanted)


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_hooks_on_factors_are_part_of_a_compiled_graph(changes, which):
    model = adapted(target_modules=["0", "2"], **changes)
    plain = model(X)
    getattr(model.base_model.model[2], which)["default"].register_forward_hook(lambda _module, _args, y: 2 * y)
    wanted = model(X)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager", fullgraph=True)(X)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dora", [False, True])
def test_pruned_factors_are_trained_and_stay_pruned(dora):
    model = adapted(use_dora=dora).train()
    inner = model.base_model.model[0].lora_A["default"]
    prune.l1_unstructured(inner, "weight", 0.5)
    learner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = inner.weight_orig.detach().clone()
    for _ in range(2):
        learner.zero_grad()
        model(X).pow(2).sum().backward()
        learner.step()
    model(X)
    assert not torch.equal(inner.weight_orig, before)
    assert torch.equal(inner.weight, inner.weight_orig * inner.weight_mask) and (inner.weight == 0).sum() == 8


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_factors_that_are_quantised_with_the_rest_are_read(changes, rows):
    quantization = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = adapted(net, target_modules=["0", "2"], r=8, **changes)
    x = torch.randn(rows, 64)
    with torch.no_grad():
        wanted = model(x)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        found = model(x)
    assert not torch.equal(found, wanted)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_a_parametrized_factor_is_computed_at_each_call():
    model = adapted()
    with torch.no_grad():
        wanted = model(X)
        inner = model.base_model.model[0].lora_B["default"]
        parametrize.register_parametrization(inner, "weight", nn.Identity())
        assert torch.allclose(model(X), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
def test_half_precision_adapters_have_gradients(dtype, use_dora):
    config = LoraConfig(r=2, target_modules=["0"], use_dora=use_dora)
    model = get_peft_model(base().to(dtype), config, autocast_adapter_dtype=False)
    model(X.to(dtype)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads and all(g is not None and g.dtype is dtype for g in grads.values())


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_an_empty_batch_gives_an_empty_answer(changes):
    model = adapted(**changes).train()
    y = model(X[:0])
    assert y.shape == (0, 4)
    y.sum().backward()


@pytest.mark.parametrize("kind", ["C3A", "FourierFT", "Hira"])
def test_so_does_one_of_other_methods(kind):
    fields = {"C3A": {"block_size": 2}, "FourierFT": {"n_frequency": 2}}.get(kind, {})
    y = get_peft_model(base(), getattr(peft, f"{kind}Config")(target_modules=["0"], **fields))(X[:0])
    assert y.shape == (0, 4)
    y.sum().backward()


def test_attention_without_biases_gets_them_in_its_own_precision():
    layer = nn.MultiheadAttention(4, 2, bias=False, batch_first=True).bfloat16()
    model = get_peft_model(nn.ModuleDict({"layer": layer}), LoraConfig(target_modules=["layer"], lora_bias=True))
    x = torch.randn(2, 3, 4).bfloat16()
    assert model.base_model.model["layer"](x, x, x)[0].dtype is torch.bfloat16


def test_trained_tokens_of_a_half_precision_model_are_float32():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)).bfloat16()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [3, 5]}))
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in held.values()} == {torch.float32}
    assert model(torch.tensor([3, 1])).dtype is torch.bfloat16


def test_rows_of_single_experts_are_not_guessed():
    call = Call()
    with call.open(names=("a", "b"), length=4):
        assert call.groups(8, torch.device("cpu"), "mlp.up", call.names)["b"].tolist() == [4, 5, 6, 7]
        for rows in (1, 2, 8):
            with pytest.raises(ValueError, match=r"'mlp.experts.0.up' received"):
                call.groups(rows, torch.device("cpu"), "mlp.experts.0.up", call.names)


class Tanh(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Doubled(nn.Linear):
    """Another way to write the same map."""

    def forward(self, x):
        return nn.functional.linear(x * 2, self.weight / 2, self.bias)


def test_a_layer_that_is_not_affine_is_not_merged():
    model = adapted(nn.Sequential(Tanh(8, 4)))
    with pytest.raises(ValueError, match="Tanh, whose forward is not W x"):
        model.merge_adapter()
    model = adapted(nn.Sequential(Doubled(8, 4)))
    with torch.no_grad():
        wanted = model(X)
        model.merge_adapter()
        assert torch.allclose(model(X), wanted, atol=1e-5)


@pytest.mark.parametrize("field", ["bias", "eva_config", "fan_in_fan_out", "megatron_core", "layer_replication"])
def test_what_no_single_module_can_have_is_refused(field):
    with pytest.raises(ValueError, match=f"module_config.*sets '{field}'"):
        LoraConfig(target_modules=["0"], module_config={"0": {field: None}})


def test_submodules_are_attributes():
    for name in ("tuners", "utils", "peft_model", "mapping", "config", "helpers", "optimizers", "tuners.lora.layer"):
        found = peft
        for part in name.split("."):
            found = getattr(found, part)
        assert found is importlib.import_module(f"peft.{name}")
    assert not hasattr(peft, "nonsense")


def test_a_model_without_a_name_is_saved_as_null(tmp_path):
    model = adapted()
    model.get_base_model().name_or_path = ""
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_the_magnitude_is_printed_as_usual():
    text = str(adapted(use_dora=True))
    assert "(default): lora.dora.DoraLinearLayer()" in text


@pytest.mark.parametrize("names", [["linear1.weight"], ["linear1.weight", "linear2.weight"], ["out_proj.weight"]])
def test_parameters_of_modules_whose_parent_reads_them_are_adapted(names):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)).eval()

    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))
    model = adapted(net(), target_modules=[], target_parameters=names)
    want = model(x)  # with gradients the modules are called one by one
    assert not torch.allclose(want, net()(x), atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), net()(x))
        torch.testing.assert_close(model.merge_and_unload()(x), want)


def test_the_bias_beside_an_adapted_parameter_is_trained_as_it_is_saved():
    model = adapted(target_modules=[], target_parameters=["0.weight"], bias="lora_only")
    assert model.base_model.model[0].base_layer.bias.requires_grad
    assert not model.base_model.model[2].bias.requires_grad
    assert "base_model.model.0.base_layer.bias" in get_peft_model_state_dict(model)


@pytest.mark.parametrize("low", [True, False])
def test_an_adapter_with_dropout_is_loaded_beside_one_without(low, tmp_path):
    def alike() -> nn.Module:  # the second layer is made like the first
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    for name, rate in (("plain", 0.0), ("dropped", 0.5)):
        adapted(alike(), target_modules=["0", "1"], lora_dropout=rate).save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(alike(), tmp_path / "plain")
    want = model(X)
    model.load_adapter(tmp_path / "dropped", "other", low_cpu_mem_usage=low)
    assert torch.equal(model(X), want)
    model.set_adapter("other")
    alone = peft.PeftModel.from_pretrained(alike(), tmp_path / "dropped")
    assert torch.equal(model(X), alone(X))
    model.train()
    assert not torch.equal(model(X), model(X))


class Scaled(nn.Embedding):
    embed_scale = -3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


def test_a_norm_limit_is_of_rows_and_not_of_what_their_scale_makes_of_them():
    net, x = nn.Sequential(Scaled(9, 4, max_norm=0.7)), torch.arange(9)
    net(x)  # torch limits the base's own rows in their place
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    answer = model(x).detach()
    model.merge_adapter()
    torch.testing.assert_close(answer, model(x))
    assert answer.norm(dim=-1).max() > 2


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16, "channels"], ids=str)
@pytest.mark.parametrize("method", ["lora", "lora-bias", "dora", "ia3", "loha", "hra", "oft", "boft"])
def test_layers_that_torch_quantises_afterwards_serve_all_that_others_do(method, dtype):
    layout, x = LAYOUTS["linear"], LAYOUTS["linear"].x()
    model = rows.adapted(method, layout, names=("one", "two"))
    wanted, base = {}, layout.plain()(x)
    with torch.no_grad():
        for name in ("two", "one"):
            model.set_adapter(name)
            wanted[name] = model(x)
        kind = {nn.Linear: per_channel_dynamic_qconfig} if dtype == "channels" else {nn.Linear}
        model = quantize_dynamic(model, kind, **({} if dtype == "channels" else {"dtype": dtype}))
        rows.close(model(x), wanted["one"], 0.05)
        for name in ("two", "one"):
            model.set_adapter(name)
            rows.close(model(x), wanted[name], 0.05)
        with model.disable_adapter():
            plain = model(x)
        rows.close(plain, base, 0.05)
        y = model(x)
        model.merge_adapter()
        rows.close(model(x), y, 0.05)
        model.unmerge_adapter()
        rows.close(model(x), y, 1e-6)
        with model.disable_adapter():
            assert torch.equal(model(x), plain)
        rows.close(model.merge_and_unload()(x), y, 0.05)
