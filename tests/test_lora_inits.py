"""LoRA's initialisations from inputs, gradients and the error of quantisation, against independent oracles."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    PeftWarning,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from peft.tuners.lora import eva
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.loftq_utils import replace_lora_weights_loftq as same_function

PLAIN = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
CALL = {"forward_fn": lambda model, x: model(x), **PLAIN}


class Net(nn.Module):
    """`b` and `c` have the same input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h) + self.c(h)


class Pixels(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, **options)

    def forward(self, x):
        return self.conv(x)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def batches(count: int = 3, rows: int = 60) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    spread = 4 * 0.6 ** torch.arange(12)
    return [torch.randn(rows, 12, generator=generator) * spread + spread.flip(0) for _ in range(count)]


def config(init, **more):
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["a", "b", "c"], "init_lora_weights": init, **more})


def layer_of(model, name="a"):
    return model.base_model.model.get_submodule(name)


def factors(model, name="a"):
    layer = layer_of(model, name)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def same_space(A, B):
    """The cosines of the angles between the spaces of two sets of rows."""
    Qa, Qb = (torch.linalg.qr(t.mT)[0] for t in (A, B))
    return torch.linalg.svdvals(Qa.mT @ Qb)


# ---- incremental principal components -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lowrank": True, "lowrank_seed": 0}], ids=["exact", "sketched"])
def test_components_of_batches_are_those_of_all_rows(options):
    X = torch.cat(batches(5))
    X = X @ torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2)))[0]
    pca = IncrementalPCA(n_components=4, **options)
    for part in X.split(37):
        pca.partial_fit(part)
    _, S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert torch.allclose(pca.mean_, X.mean(0), atol=1e-5)
    assert torch.allclose(pca.var_, X.var(0, unbiased=False), rtol=1e-3)
    assert torch.allclose(pca.singular_values_[:3], S[:3], rtol=2e-2)
    assert torch.allclose(same_space(pca.components_[:3], Vh[:3]), torch.ones(3), atol=2e-3)
    assert torch.allclose(pca.explained_variance_ratio_, (S[:4] ** 2 / (S**2).sum()), atol=1e-2)
    assert pca.transform(X).mean(0).abs().max() < 1e-3


def test_one_batch_gives_exact_components_with_signs_that_do_not_depend_on_the_decomposition():
    X = batches(1)[0]
    pca = IncrementalPCA(n_components=12).fit(X)
    _, S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert torch.allclose(pca.singular_values_, S, rtol=1e-4)
    assert torch.allclose((pca.components_ * Vh).sum(1).abs(), torch.ones(12), atol=1e-4)
    assert (pca.components_.gather(1, pca.components_.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: IncrementalPCA(lowrank=True), "n_components must be specified"),
        (lambda: IncrementalPCA(3, lowrank=True, lowrank_q=2), "lowrank_q"),
        (lambda: IncrementalPCA(20).partial_fit(batches()[0]), "n_components=20"),
        (lambda: IncrementalPCA(7).partial_fit(batches()[0][:3]), "number of samples 3"),
        (lambda: IncrementalPCA(2).partial_fit(torch.ones(3)), "matrix"),
        (lambda: IncrementalPCA(2).partial_fit(batches()[0]).partial_fit(torch.ones(9, 5)), "features"),
    ],
)
def test_components_that_cannot_be_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---- EVA ------------------------------------------------------------------------------------------------------------


def test_eva_gives_the_principal_components_of_all_inputs():
    model = get_peft_model(net(), config("eva", eva_config=EvaConfig(rho=1.0, tau=0.999)))
    tensors = {id(p) for p in model.parameters()}
    initialize_lora_eva_weights(model, batches(), **CALL)
    assert {id(p) for p in model.parameters()} == tensors, "an optimizer that was made before trains them"
    X = torch.cat(batches())
    A, B = factors(model)
    _, _, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert torch.allclose(same_space(A, Vh[:3]), torch.ones(3), atol=1e-2)
    assert torch.allclose(A @ A.mT, torch.eye(3), atol=1e-4)
    assert not B.any()
    assert torch.equal(model(X), net()(X)), "the model starts at the base"
    assert model.peft_config["default"].rank_pattern == {}


def test_eva_shares_out_the_ranks_to_the_components_that_explain_most(tmp_path):
    model = get_peft_model(net(), config("eva", eva_config=EvaConfig(rho=2.0)))
    initialize_lora_eva_weights(model, [x * torch.tensor([9.0] + 11 * [1.0]) for x in batches()], **CALL)
    made = model.peft_config["default"]
    ranks = {name: layer_of(model, name).r["default"] for name in "abc"}
    assert sum(ranks.values()) == 9 and max(ranks.values()) <= 6 and len(set(ranks.values())) > 1
    assert made.rank_pattern == {k: r for k, r in ranks.items() if r != 3}
    assert all(layer_of(model, name).scaling["default"] == pytest.approx(2.0) for name in "abc")
    assert made.alpha_pattern == {k: 2.0 * r for k, r in made.rank_pattern.items()}
    for name in "abc":
        factors(model, name)[1].normal_()
    model.save_pretrained(tmp_path)
    x = batches()[0]
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


def test_eva_keeps_the_scaling_with_rank_stabilised_scaling():
    model = get_peft_model(net(), config("eva", use_rslora=True, eva_config=EvaConfig(rho=2.0)))
    initialize_lora_eva_weights(model, batches(), **CALL)
    assert all(layer_of(model, name).scaling["default"] == pytest.approx(6 / math.sqrt(3)) for name in "abc")


def test_eva_leaves_the_scaling_to_the_rank_if_asked():
    made = config("eva", eva_config=EvaConfig(rho=2.0, adjust_scaling_factors=False))
    model = get_peft_model(net(), made)
    initialize_lora_eva_weights(model, batches(), **CALL)
    assert made.alpha_pattern == {}
    assert all(layer_of(model, name).scaling["default"] == 6 / layer_of(model, name).r["default"] for name in "abc")


def test_eva_divides_by_the_root_of_the_singular_value_if_asked():
    plain, white = (
        get_eva_state_dict(net(), batches(1), config("eva", eva_config=EvaConfig(rho=1.0, whiten=whiten)), **CALL)
        for whiten in (False, True)
    )
    X = batches(1)[0]
    S = torch.linalg.svdvals(X - X.mean(0))[:3]
    size = white["a"].norm(dim=1)
    assert torch.allclose(white["a"] / size[:, None], plain["a"], atol=1e-5)
    assert torch.allclose(size[0] ** 2 / size**2, S / S[0], rtol=1e-2)


def test_eva_is_the_same_each_time_and_leaves_the_model_as_it_was():
    model = net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (get_eva_state_dict(model, batches(), config("eva", eva_config=EvaConfig()), **CALL) for _ in "12")
    assert list(first) == ["a", "b", "c"] and all(torch.equal(first[k], second[k]) for k in first)
    assert model.training and not model._forward_pre_hooks and not model.a._forward_pre_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_with_the_same_input_have_the_same_components():
    found = get_eva_state_dict(net(), batches(), config("eva", eva_config=EvaConfig(rho=1.0)), **CALL)
    assert torch.equal(found["b"], found["c"]) and not torch.equal(found["a"][:, :3], found["b"][:, :3])


def test_a_layer_without_a_rank_loses_the_adapter(tmp_path):
    model = get_peft_model(net(), config("eva", eva_config=EvaConfig()))
    state = {"base_model.model.a": torch.eye(12)[:5], "base_model.model.b": torch.eye(16)[:0]}
    with pytest.warns(PeftWarning, match="c"):
        initialize_lora_eva_weights(model, eva_state_dict=state)
    assert type(layer_of(model, "b")) is nn.Linear
    assert torch.equal(factors(model)[0], torch.eye(12)[:5])
    assert model.peft_config["default"].target_modules == {"a", "c"}
    assert [n for n, p in model.named_parameters() if p.requires_grad and ".a." in n]
    model.save_pretrained(tmp_path)
    x = batches()[0]
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


def test_eva_looks_at_tokens_with_a_label_only():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a = nn.Embedding(20, 12), nn.Linear(12, 8)

        def forward(self, input_ids, attention_mask=None, labels=None):
            return self.a(self.e(input_ids))

    torch.manual_seed(0)
    model = Text()
    ids = torch.randint(0, 20, (6, 10))
    mask, labels = torch.ones(6, 10).long(), ids.clone()
    mask[:, 7:] = 0
    labels[:, :2] = -100
    data = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    made = config("eva", target_modules=["a"], eva_config=EvaConfig(rho=1.0))
    found = get_eva_state_dict(model, data, made, show_progress_bar=False)["a"]
    X = model.e(ids[:, 2:7]).flatten(0, 1).detach()
    assert torch.allclose(same_space(found, torch.linalg.svd(X - X.mean(0))[2][:3]), torch.ones(3), atol=1e-3)
    found = get_eva_state_dict(model, [{"input_ids": ids, "labels": labels}], made, show_progress_bar=False)["a"]
    X = model.e(ids[:, 2:]).flatten(0, 1).detach()
    assert torch.allclose(same_space(found, torch.linalg.svd(X - X.mean(0))[2][:3]), torch.ones(3), atol=1e-3)
    with pytest.raises(ValueError, match="attention_mask"):
        eva.prepare_model_inputs_fn_language_modeling({"inputs_embeds": X}, made)


def test_attention_has_no_inputs_for_eva_and_starts_as_a_plain_lora():
    model = get_peft_model(
        nn.Sequential(Self(8)), LoraConfig(r=2, target_modules=["attention"], init_lora_weights="eva", eva_config={})
    )
    x = torch.randn(2, 5, 8)
    with pytest.warns(PeftWarning, match=r"no inputs to look at in '0\.attention'"):
        initialize_lora_eva_weights(model, [x], **CALL)
    assert model.get_nb_trainable_parameters()[0] > 0


def test_eva_of_a_convolution_takes_its_patches():
    torch.manual_seed(0)
    model = Pixels(stride=2, padding=1)
    x = torch.randn(9, 3, 8, 8) * torch.tensor([9.0, 1.0, 0.1]).view(3, 1, 1)
    made = config("eva", target_modules=["conv"], eva_config=EvaConfig(rho=1.0))
    found = get_eva_state_dict(model, [x], made, **CALL)["conv"]
    X = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(same_space(found, torch.linalg.svd(X - X.mean(0))[2][:3]), torch.ones(3), atol=2e-2)
    adapted = get_peft_model(model, made)
    initialize_lora_eva_weights(adapted, [x], **CALL)
    held = layer_of(adapted, "conv").lora_A["default"].weight
    assert torch.equal(held.flatten(1), found)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda m: initialize_lora_eva_weights(net(), batches(), **CALL), "PeftModel"),
        (lambda m: initialize_lora_eva_weights(m, **CALL), "dataloader"),
        (lambda m: initialize_lora_eva_weights(m, [], **CALL), "empty"),
        (lambda m: initialize_lora_eva_weights(m, [batches()[0][:2]], **CALL), "larger batches"),
        (lambda m: initialize_lora_eva_weights(m, batches(), adapter_name="defualt", **CALL), "default"),
        (lambda m: initialize_lora_eva_weights(m, [batches()[0] * math.nan], **CALL), "NaN"),
        (lambda m: initialize_lora_eva_weights(m, eva_state_dict={"d": torch.ones(1, 12)}), "'d'|d"),
        (lambda m: initialize_lora_eva_weights(m, eva_state_dict={"a": torch.ones(1, 5)}), "12 in-features"),
        (lambda m: get_eva_state_dict(net(), batches(), **CALL), "peft_config"),
        (lambda m: get_eva_state_dict(net(), batches(), config(True), **CALL), "init_lora_weights"),
        (
            lambda m: get_eva_state_dict(m, batches(), **{**CALL, "prepare_layer_inputs_fn": {"x": None}}),
            "prepare_layer_inputs_fn",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::peft.PeftWarning")
def test_eva_refuses_by_name(run, match):
    model = get_peft_model(net(), config("eva", eva_config=EvaConfig()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        run(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- CorDA ----------------------------------------------------------------------------------------------------------


def measured(init="corda", model=None, data=None, **more):
    model = net() if model is None else model
    made = config(init, **more)
    data = batches() if data is None else data
    preprocess_corda(model, made, run_model=lambda: [model(x) for x in data])
    return model, made


def covariance(X, damping=0.01):
    """The damped mean of X'X over batches, each scaled to its largest element."""
    C = sum((x / x.abs().max()).mT @ (x / x.abs().max()) for x in X) / len(X)
    while True:
        D = C + damping * C.diagonal().mean() * torch.eye(len(C))
        if torch.dist(D @ torch.linalg.inv(D), torch.eye(len(C))) < 0.05:
            return D
        damping *= 2


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_the_best_or_the_least_part_of_the_weight_where_errors_weigh_as_the_inputs(method):
    model, made = measured(corda_config=CordaConfig(corda_method=method))
    model = get_peft_model(model, made)
    A, B = factors(model)
    W, C = net().a.weight.detach(), covariance(batches())
    S = torch.linalg.svdvals(W @ C)
    product = 2.0 * B @ A
    if method == "ipm":  # nothing of rank 3 is closer
        assert torch.allclose(torch.linalg.norm((W - product) @ C), S[3:].norm(), rtol=1e-3)
    else:
        assert torch.allclose(torch.linalg.norm(product @ C), S[-3:].norm(), rtol=1e-3)
        assert torch.allclose(torch.linalg.norm((W - product) @ C), S[:-3].norm(), rtol=1e-3)


def test_corda_leaves_the_base_as_it_was_and_starts_at_it(tmp_path):
    model, made = measured(corda_config=CordaConfig())
    model = get_peft_model(model, made)
    x = batches()[0]
    assert torch.allclose(model(x), net()(x), atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))
    assert not hasattr(layer_of(model).base_layer, "eigens"), "what was measured is deleted once it is used"
    model.save_pretrained(tmp_path / "first")
    for name in "abc":
        factors(model, name)[1].add_(0.1)
    wanted = model(x)
    again, made = measured(corda_config=CordaConfig())
    model.save_pretrained(tmp_path / "trained")
    assert torch.allclose(PeftModel.from_pretrained(again, tmp_path / "trained", config=made)(x), wanted, atol=1e-5)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    assert torch.allclose(PeftModel.from_pretrained(net(), tmp_path / "plain")(x), wanted, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "mica"])
def test_a_base_in_double_precision_is_started_from_and_given_back(init, tmp_path):
    x, plain = batches()[0].double(), net().double()
    model = get_peft_model(net().double(), config(init))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    for name in "abc":
        factors(model, name)[1].add_(0.1)
    wanted = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net().double(), tmp_path)(x), wanted)
    single = PeftModel.from_pretrained(net(), tmp_path)  # the first factors, which files leave out, are the same
    torch.testing.assert_close(single(x.float()).double(), wanted, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_what_was_measured_is_not_needed_again_for_a_file_that_was_saved_here(init, tmp_path):
    model, made = measured(corda_config=CordaConfig()) if init == "corda" else graded()
    model = get_peft_model(model, made)
    for name in "abc":
        factors(model, name)[1].add_(0.1)
    model.save_pretrained(tmp_path)
    x = batches()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for low in (False, True):
            again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low)
            assert torch.equal(again(x), model(x))
        second = get_peft_model(net(), config("pissa"))
        second.load_adapter(tmp_path, "second")
        second.set_adapter("second")
        assert torch.equal(second(x), model(x))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path / "again")(x), model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_hot_swapping_brings_the_first_factors_too(init, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    models = []
    for direction in ("ArB2r", "ArBr"):
        method = "ipm" if direction == "ArBr" else "kpm"
        made = measured(corda_config=CordaConfig(corda_method=method)) if init == "corda" else graded(direction)
        models.append(get_peft_model(*made))
        factors(models[-1])[1].add_(0.1)
    one, other = models
    other.save_pretrained(tmp_path)
    x = batches()[0]
    assert not torch.allclose(one(x), other(x), atol=1e-3)
    hotswap_adapter(one, tmp_path, "default")
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_model_of_transformers_loads_the_first_factors_too(init, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    transformers.set_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).eval()
    plain, ids = copy.deepcopy(base), torch.tensor([[3, 4, 5, 6]])
    options = {"corda_config": CordaConfig()} if init == "corda" else {"lora_ga_config": LoraGAConfig()}
    made = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=init, **options)
    if init == "corda":
        preprocess_corda(base, made, lambda: base(input_ids=ids))
    else:
        preprocess_loraga(base, made, lambda: base(input_ids=ids, labels=ids).loss.backward())
    model = get_peft_model(base, made).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * p.requires_grad)
    model.save_pretrained(tmp_path)
    plain.load_adapter(str(tmp_path))
    torch.testing.assert_close(plain.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_file_without_first_factors_asks_for_the_measurement(init, tmp_path):
    model, made = measured(corda_config=CordaConfig()) if init == "corda" else graded()
    model = get_peft_model(model, made)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "first" not in k}, file)
    x = batches()[0]
    base, made = measured(corda_config=CordaConfig()) if init == "corda" else graded()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(PeftModel.from_pretrained(base, tmp_path, config=made)(x), model(x), atol=1e-5)
    if init == "corda":
        with pytest.raises(ValueError, match="lora_first_A"):
            PeftModel.from_pretrained(net(), tmp_path)
    else:
        with pytest.warns(PeftWarning, match="lora_first_A"):
            PeftModel.from_pretrained(net(), tmp_path)


def test_corda_writes_files_and_reads_them(tmp_path):
    files = {"cache_file": str(tmp_path / "new" / "cache.pt"), "covariance_file": str(tmp_path / "covariance.pt")}
    model, made = measured(corda_config=CordaConfig(**files))
    first = get_peft_model(model, made)
    cached = torch.load(files["cache_file"])
    assert {k: tuple(v.shape) for k, v in cached.items() if k.startswith("a.")} == {
        "a.eigens.S_WC": (3,), "a.eigens.U_WC": (16, 3), "a.eigens.V_WC": (12, 3),
    }  # fmt: skip
    for change in ({}, {"cache_file": None}):
        model, made = net(), config("corda", corda_config=CordaConfig(**{**files, **change}))
        preprocess_corda(model, made)  # nothing is run
        second = get_peft_model(model, made)
        assert all(torch.equal(one, other) for one, other in zip(factors(first), factors(second), strict=True))


def test_corda_honours_the_ranks_of_patterns_and_keeps_what_it_measured_if_asked():
    model, made = measured(rank_pattern={"b": 5}, corda_config=CordaConfig(prune_temporary_fields=False))
    assert len(model.b.eigens.S_WC) == 5 and model.a.covariance_matrix.shape == (12, 12)
    model = get_peft_model(model, made)
    assert factors(model, "b")[0].shape == (5, 16) and hasattr(layer_of(model).base_layer, "eigens")


def test_corda_of_a_convolution_weighs_its_patches():
    torch.manual_seed(0)
    model, x = Pixels(padding=1, bias=False), torch.randn(2, 3, 6, 6)
    W = model.conv.weight.detach().flatten(1).clone()
    made = config("corda", target_modules=["conv"], corda_config=CordaConfig())
    preprocess_corda(model, made, run_model=lambda: model(x))
    adapted = get_peft_model(model, made)
    A, B = (t.flatten(1) for t in factors(adapted, "conv"))
    C = covariance([nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)])
    assert torch.allclose(torch.linalg.norm((W - 2 * B @ A) @ C), torch.linalg.svdvals(W @ C)[3:].norm(), rtol=1e-3)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda m, c: preprocess_corda(m, config("pissa")), "corda_config"),
        (lambda m, c: preprocess_corda(m, c), "run_model"),
        (lambda m, c: preprocess_corda(m, c, lambda: None), "'a' is missing"),
        (lambda m, c: preprocess_corda(m, c, lambda: m(batches()[0] * math.inf)), "NaN or infinity"),
        (lambda m, c: get_peft_model(m, c), "preprocess_corda"),
    ],
)
def test_corda_refuses_by_name(run, match):
    with pytest.raises(ValueError, match=match):
        run(net(), config("corda", corda_config=CordaConfig()))


def test_corda_of_an_embedding_weighs_tokens_by_their_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8))
    W = model[0].weight.detach().mT.clone()
    ids = torch.randint(0, 12, (40,))  # some tokens never come
    made = LoraConfig(
        r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="corda",
        corda_config=CordaConfig(prune_temporary_fields=False),
    )  # fmt: skip
    preprocess_corda(model, made, lambda: [model(ids.view(8, 5)), model(ids)])
    counts = torch.bincount(ids, minlength=20).float()
    assert torch.equal(model[0].covariance_matrix, counts)
    layer = layer_of(get_peft_model(model, made), "0")
    A, B = layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()
    C = counts + 0.01 * counts.mean()
    assert torch.allclose(torch.linalg.norm((W - 2 * B @ A) * C), torch.linalg.svdvals(W * C)[3:].norm(), rtol=1e-3)


class Attending(nn.Module):
    """Attention of some vectors to others."""

    def __init__(self, **options):
        super().__init__()
        self.att = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, q, k, v):
        return self.att(q, k, value=v, need_weights=False)[0]


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 5}])
def test_corda_of_attention_weighs_each_projection_by_its_inputs(sizes):
    torch.manual_seed(0)
    model = Attending(**sizes).eval()
    q, k, v = torch.randn(4, 3, 8), torch.randn(4, 7, sizes.get("kdim", 8)), torch.randn(4, 7, sizes.get("vdim", 8))
    made = LoraConfig(
        r=2, lora_alpha=4, target_modules=["att"], init_lora_weights="corda",
        corda_config=CordaConfig(prune_temporary_fields=False),
    )  # fmt: skip
    before = model(q, k, v)
    preprocess_corda(model, made, lambda: model(q, k, v))
    assert torch.equal(model(q, k, v), before)

    def square(x):
        x = x.flatten(0, -2) / x.abs().max()
        return x.mT @ x

    wanted = dict(zip(["q_proj_weight", "k_proj_weight", "v_proj_weight"], map(square, (q, k, v)), strict=True))
    wanted = wanted if sizes else {"in_proj_weight": (square(q) + square(k) + square(v)) / 3}
    for name, C in wanted.items():
        assert torch.allclose(getattr(model.att, f"covariance_matrix_{name}"), C, atol=1e-5)
    out = model.att.out_proj
    W, b = out.weight.detach(), out.bias.detach()
    heads = torch.linalg.solve(W, (before.detach() - b).flatten(0, 1).mT).mT  # what the output was made of
    assert torch.allclose(model.att.out_proj.covariance_matrix, square(heads), atol=1e-3)
    adapted = get_peft_model(model, made).eval()
    assert torch.allclose(adapted(q, k, v), before, atol=1e-5)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.add_(0.1 if "lora_B" in name else 0.0)
    assert not torch.allclose(adapted(q, k, v), before, atol=1e-2)


def test_corda_refuses_what_multiplies_its_weight_out_of_sight():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.w.mT

    model = nn.Sequential(Holder())
    made = LoraConfig(
        r=2, target_modules=[], target_parameters=["0.w"], init_lora_weights="corda", corda_config=CordaConfig()
    )
    with pytest.raises(ValueError, match="out of sight"):
        preprocess_corda(model, made, lambda: model(torch.randn(3, 4)))


def test_a_cache_of_another_model_is_refused(tmp_path):
    file = str(tmp_path / "cache.pt")
    measured(corda_config=CordaConfig(cache_file=file))
    with pytest.raises(ValueError, match="other sizes"):
        preprocess_corda(net(), config("corda", r=4, corda_config=CordaConfig(cache_file=file)))
    with pytest.raises(ValueError, match=r"0\.eigens"):
        other = LoraConfig(target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(cache_file=file))
        preprocess_corda(nn.Sequential(nn.Linear(12, 16)), other)


# ---- LoRA-GA --------------------------------------------------------------------------------------------------------


def loss_of(model, x):
    return (model(x) - x[:, :10]).square().mean()


def gradient(model, data, name="a"):
    """The mean gradient of one weight over batches."""
    weight = model.get_submodule(name).weight
    grads = [torch.autograd.grad(loss_of(model, x), weight)[0] for x in data]
    return torch.stack(grads).mean(0)


def graded(direction="ArB2r", scale="unit", **more):
    model, made = net(), config("lora_ga", lora_ga_config=LoraGAConfig(direction=direction, scale=scale), **more)

    def step():
        for x in batches():
            loss_of(model, x).backward()

    preprocess_loraga(model, made, step)
    return model, made


@pytest.mark.parametrize(
    ("direction", "up", "down"),
    [("ArBr", [0, 2, 4], [1, 3, 5]), ("A2rBr", [0, 1, 2], [3, 4, 5]), ("ArB2r", [3, 4, 5], [0, 1, 2])],
)
def test_lora_ga_takes_the_gradients_singular_vectors(direction, up, down):
    model, made = graded(direction)
    A, B = factors(get_peft_model(model, made))
    U, S, Vh = torch.linalg.svd(gradient(net(), batches()))
    assert torch.allclose((A * Vh[down]).sum(1).abs(), torch.ones(3), atol=1e-3)
    assert torch.allclose((B * (U[:, up] * S[up])).sum(0).abs(), S[up] ** 2, rtol=1e-2)


def test_the_first_step_of_b_moves_the_weight_along_the_best_low_rank_part_of_the_gradient():
    model, made = graded("ArB2r")
    model = get_peft_model(model, made)
    layer = layer_of(model)
    for x in batches():
        (loss_of(model, x) / 3).backward()
    A = layer.lora_A["default"].weight
    moved = 2.0 * layer.lora_B["default"].weight.grad @ A  # s dB A
    U, S, Vh = torch.linalg.svd(gradient(net(), batches()))
    best = 4.0 * (U[:, :3] * S[:3]) @ Vh[:3]  # s^2 times the gradient's part of rank r
    assert torch.allclose(moved, best, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_scales_as_asked_and_starts_at_the_base(scale):
    unit = factors(get_peft_model(*graded(scale="unit")))
    model = get_peft_model(*graded(scale=scale))
    A, B = factors(model)
    if scale == "stable":
        assert torch.allclose(B, unit[1] * 16**0.25 / 4)
    elif scale == "gd_scale":
        assert torch.allclose(A, unit[0] / 2) and torch.allclose(B, unit[1] / 2)
    elif scale == "weight_svd":
        assert torch.allclose(B[:, 0].norm(), torch.linalg.svdvals(net().a.weight)[0], rtol=0.1)
    x = batches()[0]
    assert torch.allclose(model(x), net()(x), atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))


def test_lora_ga_of_random_directions_is_the_same_each_time():
    one, other = (factors(get_peft_model(*graded("random"))) for _ in "12")
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_measuring_gradients_leaves_the_model_as_it_was():
    model, made = net(), config("lora_ga", lora_ga_config=LoraGAConfig())
    model.a.weight.requires_grad_(False)
    model.b.bias.grad = mark = torch.ones(10)

    def step():
        assert model.training and model.a.weight.requires_grad and not model.b.bias.requires_grad
        loss_of(model, batches()[0]).backward()

    preprocess_loraga(model, made, step)
    assert not model.training and not model.a.weight.requires_grad and model.a.weight.grad is None
    assert model.b.bias.grad is mark and model.b.bias.requires_grad


def test_lora_ga_reads_its_file(tmp_path):
    file = str(tmp_path / "gradients.pt")
    model, made = net(), config("lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, made, lambda: loss_of(model, batches()[0]).backward(), cache_file=file)
    assert set(torch.load(file)) == {f"{name}._peft_loraga_grad" for name in "abc"}
    again = net()
    preprocess_loraga(again, made, lambda: pytest.fail("the file is there"), cache_file=file)
    one, other = factors(get_peft_model(model, made)), factors(get_peft_model(again, made))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", ["embedding", "conv", "attention", "parameter"])
def test_lora_ga_works_wherever_there_is_a_gradient(name):
    torch.manual_seed(0)
    kinds = {
        "embedding": (lambda: nn.Embedding(12, 8), torch.randint(0, 12, (5, 7)), {"target_modules": ["0"]}),
        "conv": (lambda: nn.Conv2d(3, 8, 3), torch.randn(2, 3, 6, 6), {"target_modules": ["0"]}),
        "attention": (lambda: Self(8), torch.randn(2, 5, 8), {"target_modules": ["0.attention"]}),
        "parameter": (lambda: Self(8), torch.randn(2, 5, 8), {"target_parameters": ["0.extra"], "target_modules": []}),
    }
    make, x, targets = kinds[name]
    model = nn.Sequential(make())
    wanted = model(x).detach()
    made = LoraConfig(r=2, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **targets)
    preprocess_loraga(model, made, lambda: model(x).pow(3).mean().backward())
    adapted = get_peft_model(model, made)
    assert adapted.get_nb_trainable_parameters()[0] > 0
    assert torch.allclose(adapted(x), wanted, atol=1e-5)
    B = [p for n, p in adapted.named_parameters() if "lora_" in n and "B" in n]
    assert B and all(p.any() for p in B)
    assert torch.allclose(adapted.merge_and_unload()(x), wanted, atol=1e-5)


class Self(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attention, self.extra = nn.MultiheadAttention(d, 2, batch_first=True), nn.Parameter(torch.randn(d, d))

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0] @ self.extra


def test_lora_ga_without_gradients_says_so_and_starts_as_a_plain_lora():
    with pytest.warns(PeftWarning, match="preprocess_loraga"):
        model = get_peft_model(net(), config("lora_ga", lora_ga_config=LoraGAConfig()))
    x = batches()[0]
    assert torch.equal(model(x), net()(x)) and not factors(model)[1].any()


@pytest.mark.parametrize(
    ("changes", "step", "match"),
    [
        ({"init_lora_weights": True}, lambda m: None, "lora_ga_config"),
        ({}, lambda m: None, "no gradient"),
    ],
)
def test_lora_ga_refuses_by_name(changes, step, match):
    options = {} if changes else {"lora_ga_config": LoraGAConfig()}
    model = net()
    with pytest.raises(ValueError, match=match):
        preprocess_loraga(model, config(changes.get("init_lora_weights", "lora_ga"), **options), lambda: step(model))


def test_lora_ga_refuses_a_rank_that_the_gradient_has_not():
    model, made = graded(r=6)
    with pytest.raises(ValueError, match=r"2 r = 12"):
        get_peft_model(model, made)
    assert type(model.a) is nn.Linear


# ---- LoftQ ----------------------------------------------------------------------------------------------------------


def loftq(bits=4, turns=1, **more):
    return config("loftq", loftq_config=LoftQConfig(loftq_bits=bits, loftq_iter=turns), **more)


def by_hand(W, bits):
    """The nearest codes, one number at a time."""
    if bits == 8:
        step = W.abs().max(1, keepdim=True).values / 127
        return (W / step).round() * step
    from peft.methods.lora.loftq import NF4 as code

    NF4 = torch.tensor(code)

    out = []
    for block in W.flatten().split(64):
        largest = block.abs().max()
        out += [largest * NF4[(NF4 - v / largest).abs().argmin()] for v in block]
    return torch.stack(out).view(W.shape)


def test_the_code_book_is_that_of_normal_float_4():
    """Quantiles of a normal, evenly spaced on each side, scaled to [-1, 1], with an exact zero (QLoRA, appendix E)."""
    from peft.methods.lora.loftq import NF4 as code

    NF4 = torch.tensor(code)

    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    codes = torch.cat([below, torch.zeros(1), above.flip(0)])
    assert torch.allclose(NF4, codes / codes.max(), atol=2e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_turn_of_loftq_is_the_quantised_weight_and_the_best_factors_for_its_error(bits):
    model = get_peft_model(net(), loftq(bits))
    W = net().a.weight.detach()
    Q = by_hand(W, bits)
    A, B = factors(model)
    error = torch.linalg.norm(W - Q - 2 * B @ A)
    assert torch.allclose(error, torch.linalg.svdvals(W - Q)[3:].norm(), rtol=1e-3)
    x = batches()[0]
    wanted = x @ (Q + 2 * B @ A).mT + net().a.bias
    assert torch.allclose(layer_of(model)(x), wanted, atol=1e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(merged.a.weight, Q + 2 * B @ A, atol=1e-6)


def test_more_turns_of_loftq_follow_the_papers_algorithm():
    model = get_peft_model(net(), loftq(4, 3))
    W = net().a.weight.detach()
    product = torch.zeros_like(W)
    for _ in range(3):
        Q = by_hand(W - product, 4)
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        product = (U[:, :3] * S[:3]) @ Vh[:3]
    A, B = factors(model)
    assert torch.allclose(2 * B @ A, product, atol=1e-5)


def test_an_adapter_made_by_a_configuration_of_the_other_library_is_of_this_one(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="pissa", peft_version="0.21.2")
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0 + 0.5 * p.requires_grad)
    model.save_pretrained(tmp_path)
    ids = torch.arange(9)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(ids), model.eval()(ids))


def test_loftq_leaves_the_base_as_it_was_and_its_files_hold_the_factors_only(tmp_path):
    model = get_peft_model(net(), loftq(4, 2))
    x = batches()[0]
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))
    for name in "abc":
        factors(model, name)[1].add_(0.1)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(again(x), model(x))
    wanted = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), wanted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("kind", ["conv", "embedding", "attention", "parameter"])
def test_loftq_works_on_every_layout(kind, dora):
    torch.manual_seed(0)
    make, x, targets = {
        "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 6, 6), {}),
        "embedding": (lambda: nn.Embedding(12, 8), torch.randint(0, 12, (5, 7)), {}),
        "attention": (lambda: Self(8), torch.randn(2, 5, 8), {"target_modules": ["0.attention"]}),
        "parameter": (lambda: Self(8), torch.randn(2, 5, 8), {"target_parameters": ["0.extra"], "target_modules": []}),
    }[kind]
    model = nn.Sequential(make()).eval().requires_grad_(False)
    base = model(x)
    made = LoraConfig(
        r=3, init_lora_weights="loftq", use_dora=dora, loftq_config={"loftq_bits": 4},
        **{"target_modules": ["0"], **targets},
    )  # fmt: skip
    adapted = get_peft_model(model, made).eval()
    with torch.no_grad():
        found = adapted(x)
        assert 0 < (found - base).abs().max() < 0.5
        with adapted.disable_adapter():
            assert torch.equal(adapted(x), base)
        assert torch.allclose(adapted.merge_and_unload()(x), found, atol=1e-5)


def test_loftq_refuses_by_name():
    with pytest.raises(ValueError, match="r=11"):
        get_peft_model(net(), loftq(r=11))
    broken = net()
    broken.a.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        get_peft_model(broken, loftq())
    with pytest.raises(ValueError, match="groups"):
        grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
        get_peft_model(
            grouped, LoraConfig(r=2, target_modules=["0"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
        )


class Packed(torch.Tensor):
    """A weight in 8-bit whole numbers that says how to read it."""

    @staticmethod
    def __new__(cls, codes, step):
        return torch.Tensor._make_subclass(cls, codes, False)

    def __init__(self, codes, step):
        self.codes, self.step = codes, step

    def dequantize(self):
        return self.codes.float() * self.step


def quantised_net():
    model = net()
    for layer in (model.a, model.b, model.c):
        step = layer.weight.detach().abs().max() / 7
        codes = (layer.weight.detach() / step).round().to(torch.int8)
        del layer._parameters["weight"]
        layer.weight = Packed(codes, step)
    return model


def test_factors_make_up_for_the_error_of_a_base_that_is_quantised(tmp_path):
    assert same_function is replace_lora_weights_loftq
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    model = get_peft_model(quantised_net(), config(True))
    seen = []

    def keep(found, path):
        assert found is model
        seen.append(path)
        return path != "b"

    replace_lora_weights_loftq(model, str(tmp_path), callback=keep)
    assert seen == ["a", "b", "c"]
    W, Q = net().a.weight.detach(), layer_of(model).original_weight()
    A, B = factors(model)
    assert torch.allclose(torch.linalg.norm(W - Q - 2 * B @ A), torch.linalg.svdvals(W - Q)[3:].norm(), rtol=1e-3)
    assert not factors(model, "b")[1].any(), "the callback took it back"


def test_replacing_refuses_by_name(tmp_path):
    with pytest.raises(TypeError, match="PeftModel"):
        replace_lora_weights_loftq(net())
    with pytest.raises(ValueError, match="no quantised layer"):
        replace_lora_weights_loftq(get_peft_model(net(), config(True)))
    model = get_peft_model(quantised_net(), config(True))
    with pytest.raises(ValueError, match="model_path"):
        replace_lora_weights_loftq(model)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        replace_lora_weights_loftq(model, str(tmp_path))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight.*x"):
        replace_lora_weights_loftq(model, str(tmp_path))


# ---- MiCA -----------------------------------------------------------------------------------------------------------


def test_mica_learns_in_the_directions_that_the_weight_uses_least():
    model = get_peft_model(net(), config("mica"))
    A, B = factors(model)
    U = torch.linalg.svd(net().a.weight.detach(), full_matrices=False)[0]
    assert torch.allclose((B * U[:, -3:]).sum(0).abs(), torch.ones(3), atol=1e-4)
    assert not A.any()
    x = batches()[0]
    assert torch.equal(model(x), net()(x))


@pytest.mark.filterwarnings("ignore::peft.PeftWarning")
def test_mica_never_trains_b():
    model = get_peft_model(net(), config("mica"))
    model.add_adapter("other", config(True))
    model.set_adapter("other")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{n}.lora_A.default.weight" for n in "abc"}


# ---- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "loftq", "mica"])
def test_an_init_works_with_dora_and_learns(init):
    options = {
        "eva": {"eva_config": EvaConfig()},
        "corda": {"corda_config": CordaConfig()},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
        "loftq": {"loftq_config": LoftQConfig()},
        "mica": {},
    }[init]
    model, made = net(), config(init, use_dora=True, **options)
    if init == "corda":
        preprocess_corda(model, made, run_model=lambda: [model(x) for x in batches()])
    elif init == "lora_ga":
        preprocess_loraga(model, made, lambda: loss_of(model, batches()[0]).backward())
    model = get_peft_model(model, made)
    if init == "eva":
        initialize_lora_eva_weights(model, batches(), **CALL)
    x = batches()[0]
    if init != "loftq":
        assert torch.allclose(model(x), net()(x), atol=1e-4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(loss_of(model, x))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model(x)
        assert torch.allclose(model.merge_and_unload()(x), wanted, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "corda", "lora_ga", "loftq", "mica"])
def test_a_start_decomposes_each_weight_once(init, monkeypatch, tmp_path):
    if init == "corda":
        model, made = measured(corda_config=CordaConfig())
    elif init == "lora_ga":
        model, made = graded()
    else:
        model, made = net(), config(init, **({"loftq_config": LoftQConfig()} if init == "loftq" else {}))
    calls = []
    plain = torch.linalg.svd

    def counted(M, *args, **kwargs):
        calls.append(M.shape)
        return plain(M, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    adapted = get_peft_model(model, made)
    assert len(calls) == (0 if init == "corda" else 3)
    adapted.save_pretrained(tmp_path)
    calls.clear()
    PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=True)
    assert len(calls) == (3 if init == "pissa" else 0), "files hold what is not found again from the weight"
