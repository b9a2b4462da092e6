"""AdaMSS: clusters that are those of scikit-learn, ranks that follow the weight, and the budget of subspaces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peft
from conformance.rows import close
from peft import AdamssConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.methods.adamss import deal
from peft.methods.adamss.asa import target
from peft.methods.adamss.method import AdaMSS
from peft.methods.kmeans import labels

# Labels that scikit-learn 1.9 gives: KMeans(k, init="random", n_init=1, max_iter=10, random_state=123456789).
LABELS = {
    (24, 12, 3, "random"): "121122121121020211111110",
    (40, 5, 7, "random"): "6465561334362314144410631546234344213235",
    (16, 8, 5, "orthogonal"): "3300202300313441",
    (20, 3, 9, "twice"): "07451074510745107451",  # more clusters than points: some are empty
    (12, 1, 2, "random"): "010001110000",
}


def points(n: int, d: int, kind: str) -> torch.Tensor:
    X = torch.randn(n, d, generator=torch.Generator().manual_seed(n * d))
    return torch.linalg.qr(X)[0] if kind == "orthogonal" else X[: n // 4].repeat(4, 1) if kind == "twice" else X


@pytest.mark.parametrize("n, d, k, kind", LABELS)
def test_clusters_are_those_of_scikit_learn(n, d, k, kind):
    found = labels(points(n, d, kind), k, 10, 123456789)
    assert "".join(map(str, found.tolist())) == LABELS[n, d, k, kind]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_directions_found_with_some_rows_at_a_time_are_the_same(shape, bias, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=generator))[0] for n in shape)
    W = left @ torch.diag(torch.tensor([9.0, 5, 3, 1])) @ right.mT + torch.randn(shape, generator=generator) / 100
    W, b = W.bfloat16(), torch.randn(shape[0], generator=generator) / 100 if bias else None
    torch.manual_seed(0)
    whole = deal.leading(W, b, 4)
    monkeypatch.setattr(deal, "LARGE", 100)
    torch.manual_seed(0)
    parts = deal.leading(W, b, 4)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one * (one * other).sum(0).sign(), other, rtol=1e-3, atol=1e-4)


def test_an_adapter_on_a_base_without_numbers_takes_them_when_they_come(tmp_path):
    """Its clusters are those of the file; until the base weight is there nothing can be computed."""
    model = get_peft_model(net(), config())
    trained(model, range(3))
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 12))
    late = PeftModel.from_pretrained(empty, tmp_path, low_cpu_mem_usage=True)
    layer = next(m for m in late.modules() if hasattr(m, "adamss_A"))
    with pytest.raises(RuntimeError, match="base weight, which is not there yet"):
        layer.get_delta_weight("default")
    late.base_model.model.load_state_dict(
        {k: v for k, v in model.base_model.model.state_dict().items() if "adamss" not in k}, strict=False, assign=True
    )
    torch.testing.assert_close(late(X), model(X))


def test_a_file_that_is_not_for_so_many_rows_is_refused_on_a_base_without_numbers(tmp_path):
    get_peft_model(net(), config()).save_pretrained(tmp_path)
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 10), nn.Tanh(), nn.Linear(10, 12))
    with pytest.raises((ValueError, RuntimeError), match=r"clusters of the 9 rows|size mismatch"):
        PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="meta device lacks"), torch.device("meta"):
        get_peft_model(nn.Sequential(nn.Linear(6, 8)), config(target_modules=["0"]))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 12))


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def config(**more) -> AdamssConfig:
    return AdamssConfig(**{"target_modules": ["0", "2", "4"], "r": 5, "num_subspaces": 3, **more})


def trained(model: PeftModel, steps: range) -> dict[int, int]:
    """Steps of training: {step: subspaces that are trainable after it}."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    left = {}
    for step in steps:
        optimizer.zero_grad()
        (model(X) - X.mean()).square().mean().backward()
        model.base_model.update_and_allocate(step)
        optimizer.step()
        left[step] = sum(p.requires_grad for n, p in model.named_parameters() if "adamss_B" in n)
    return left


def test_the_budget_falls_as_the_schedule_has_it_and_frozen_subspaces_stay_as_they_are():
    c = config(use_asa=True, asa_target_subspaces=4, init_warmup=2, final_warmup=10, mask_interval=4)
    torch.manual_seed(1)
    model = get_peft_model(net(), c)
    left = trained(model, range(1, 9))
    assert left == {1: 9, 2: 9, 3: 9, **dict.fromkeys((4, 5, 6, 7), target(c, 9, 4)), 8: 4}
    assert target(c, 9, 4) == int(4 + 5 * 0.75**3) and target(c, 9, 10) == 4
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad and "adamss" in n}
    trained(model, range(9, 14))
    now = dict(model.named_parameters())
    assert len(frozen) == 10 and all(torch.equal(now[n], p) and not now[n].requires_grad for n, p in frozen.items())
    model.add_adapter("other", config())
    for twin in (model, copy.deepcopy(model)):
        twin.set_adapter("other")
        twin.set_adapter("default")
        now = dict(twin.named_parameters())
        assert all(now[n].requires_grad == (n not in frozen) for n in now if "adamss" in n and "default" in n)


def test_those_stay_that_matter_most():
    c = config(use_asa=True, asa_target_subspaces=2, init_warmup=1, final_warmup=2, mask_interval=2)
    model = get_peft_model(net(), c)
    pairs = [
        (layer.adamss_A["default"][k], layer.adamss_B["default"][k])
        for layer in (model.base_model.model[i] for i in (0, 2, 4))
        for k in range(3)
    ]
    importance = {}
    for step in (1, 2):
        for i, (A, B) in enumerate(pairs):
            with torch.no_grad():
                A.fill_(1.0), B.fill_(1.0)
            A.grad, B.grad = (torch.full_like(t, (i * 4 % 9 + 1) * step) for t in (A, B))
            importance[i] = i * 4 % 9
        model.base_model.update_and_allocate(step)
    best = {i for i, value in importance.items() if value >= 7}
    assert {i for i, (A, B) in enumerate(pairs) if A.requires_grad} == best
    assert all(A.requires_grad is B.requires_grad for A, B in pairs)


def test_a_budget_that_nobody_follows_is_told_once():
    model = get_peft_model(net(), config(use_asa=True, init_warmup=1, final_warmup=3)).train()
    model(X), model(X)
    with pytest.warns(peft.PeftWarning, match="update_and_allocate"):
        model(X)
    model(X)


def test_ranks_that_follow_the_weight_are_taken_from_the_file(tmp_path):
    with torch.no_grad():
        flat, full = net(), net()
        flat[2].weight.copy_(torch.outer(torch.arange(10.0), torch.ones(8)))
    c = config(use_dynamic_rank=True, subspace_rank=3, r=8, random_seed=5)
    ranks = [len(A) for A in get_peft_model(full, c).base_model.model[4].adamss_A["default"]]
    assert max(ranks) > 1
    model = get_peft_model(net(), c)
    state = get_peft_model_state_dict(model)
    key = "base_model.model.4.adamss_{}.0"
    state[key.format("A")], state[key.format("B")] = state[key.format("A")][:1], state[key.format("B")][:, :1]
    peft.set_peft_model_state_dict(model, state)
    layer = model.base_model.model[4]
    assert layer.adamss_A["default"][0].shape[0] == layer.adamss_B["default"][0].shape[1] == 1
    assert torch.isfinite(model(X)).all()


def test_another_base_than_that_of_the_adapter_is_told(tmp_path):
    model = get_peft_model(net(), config())
    model.save_pretrained(tmp_path)
    other = net()
    with torch.no_grad():
        other[0].weight[:, :2] = 0  # clusters may have the same sizes all the same
    with pytest.warns(peft.PeftWarning, match="principal directions of '0' in the file"):
        PeftModel.from_pretrained(other, tmp_path, ignore_mismatched_sizes=True)


def test_a_base_weight_that_is_loaded_behind_the_adapter_is_told():
    model = get_peft_model(net(), config())
    changed = copy.deepcopy(model.state_dict())
    changed["base_model.model.0.base_layer.weight"] = torch.randn(8, 6)
    with pytest.warns(peft.PeftWarning, match="in the new base weight"):
        model.load_state_dict(changed)


def test_an_adapter_added_while_another_is_merged_sees_the_base_weight():
    model = get_peft_model(net(), config())
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "adamss_B" in n:
                p.normal_()
    model.merge_adapter()
    model.add_adapter("second", config())
    for layer in (model.base_model.model[i] for i in (0, 2, 4)):
        assert torch.equal(layer.adamss_newB["second"], layer.adamss_newB["default"])
        assert torch.equal(layer.adamss_places["second"], layer.adamss_places["default"])


@pytest.mark.parametrize("field, value", [("final_warmup", 50), ("mask_interval", 0), ("init_weights", "gaussian")])
def test_settings_that_cannot_be_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        config(use_asa=True, **{field: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_evaluation_puts_the_clusters_together_once(dtype, monkeypatch):
    torch.manual_seed(0)
    config = AdamssConfig(r=4, num_subspaces=2, subspace_rank=2, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 16)).to(dtype), config).eval()
    layer, x, made = model.base_model.model[0], torch.randn(2, 3, 24, dtype=dtype), []
    whole = AdaMSS.up
    monkeypatch.setattr(AdaMSS, "up", lambda self, p: made.append(1) or whole(self, p))
    for _ in range(3):
        y = model(x)
    assert len(made) == 1 and y.dtype is dtype
    p = layer.adapters["default"]
    W = layer.weight.double() + layer.get_delta_weight("default").double()
    b = layer.bias.double() + p.method.up_bias(p).double()
    close(y.double(), x.double() @ W.mT + b, 1e-5 if dtype is torch.float32 else 1e-2)
