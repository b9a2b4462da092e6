"""What evaluation keeps of an adapter's tensors is made anew whenever they, or the base weight, are others."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft import (
    AdaLoraConfig,
    BOFTConfig,
    KasaConfig,
    LoraConfig,
    OFTConfig,
    PsoftConfig,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft import get_peft_model_state_dict as state_of
from peft.core.kept import KEPT
from peft.methods.dora import DoRA
from test_base_square import put

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
KINDS = {
    "dora": lambda: LoraConfig(target_modules=["0"], r=2, use_dora=True),
    "dora-vera": lambda: VeraConfig(target_modules=["0"], r=4, use_dora=True),
    "oft": lambda: OFTConfig(target_modules=["0"], oft_block_size=8, use_cayley_neumann=False),
    "oft-series": lambda: OFTConfig(target_modules=["0"], oft_block_size=8),
    "pissa": lambda: LoraConfig(target_modules=["0"], r=4, init_lora_weights="pissa"),
    "olora": lambda: LoraConfig(target_modules=["0"], r=4, init_lora_weights="olora"),
    "kasa": lambda: LoraConfig(target_modules=["0"], r=4, kasa_config=KasaConfig()),
    "boft": lambda: BOFTConfig(target_modules=["0"], boft_block_size=8),
    "psoft": lambda: PsoftConfig(target_modules=["0"], r=4),
    "tinylora": lambda: TinyLoraConfig(target_modules=["0"], r=2, u=8),
}
each = pytest.mark.parametrize("kind", KINDS)
each_beside_others = pytest.mark.parametrize("kind", [k for k in KINDS if k != "kasa"])  # of which one can be active


def adapted(kind):
    """A model in evaluation whose adapter does something, and the layer."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), KINDS[kind]())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 4)
    return model.eval(), model.base_model.model[0]


@each
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_no_constants_of_an_earlier_one(kind):
    model, _ = adapted(kind)
    with torch.no_grad():
        wanted = model(X)
        traced = torch.jit.trace(model, (X,))  # twice, and compares
        for p in tensors(model):
            p.mul_(1.5)
        assert torch.allclose(traced(X), model(X), atol=1e-5) and not torch.allclose(model(X), wanted, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("switched", [False, True])
@each
def test_a_fused_optimizer_s_steps_are_seen(kind, switched, rows):
    model, _ = adapted(kind)
    learner = torch.optim.AdamW(tensors(model), lr=0.1, fused=True)  # torch does not count what it writes
    for _ in range(2):
        with torch.no_grad():
            for _ in range(3):
                model(X[:rows])
        if switched:
            model.train()
        model(X).pow(2).mean().backward()
        learner.step()
        learner.zero_grad()
        if switched:
            model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(X[:rows]), copy.deepcopy(model)(X[:rows]))


@each
def test_nothing_is_kept_of_tensors_that_other_processes_write(kind):
    model, layer = adapted(kind)
    model.share_memory()
    with torch.no_grad():
        model(X)
        for p in tensors(model):
            p.detach().numpy()[...] *= 1.5  # as another process would, uncounted
        found = model(X)
        model.eval()
        assert torch.equal(found, model(X))
    assert not any(what in layer.adapters["default"].cache for what in KEPT)


def tensors(model):
    """The trained tensors."""
    return [p for p in model.parameters() if p.requires_grad]


def fresh(model):
    """What the model gives where nothing is kept."""
    twin = copy.deepcopy(model)
    assert not any(held(p) is not None and held(p).value for p in adapters(twin))
    with torch.no_grad():
        return twin(X)


def held(p):
    """What an adapter keeps."""
    return next((p.cache[what] for what in KEPT if what in p.cache), None)


def adapters(model):
    return [p for m in model.modules() for p in getattr(m, "adapters", {}).values()]


def check(model):
    """The answer is that of a model that keeps nothing, now and once more."""
    wanted = fresh(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X), wanted)
        torch.testing.assert_close(model(X), wanted)


def flipped_elsewhere(t):
    t.data = t.data.flip(-1).clone()


def flipped_at_the_same_address(t):
    buffer = bytearray(t.numel() * t.element_size())
    put(t, buffer, t.data.clone())
    with torch.no_grad():
        yield
    put(t, buffer, t.data.flip(-1).clone())


@each
def test_something_is_kept(kind):
    model, layer = adapted(kind)
    with torch.no_grad():
        model(X)
    first = held(layer.adapters["default"])
    with torch.no_grad():
        model(X)
    assert first is not None and held(layer.adapters["default"]) is first


@each
def test_tensors_that_change_are_noticed(kind):
    model, _ = adapted(kind)
    for t in tensors(model):
        check(model)
        with torch.no_grad():
            t.mul_(-1.5)
        check(model)
        flipped_elsewhere(t)
        check(model)
        steps = flipped_at_the_same_address(t)
        next(steps)
        check(model)
        next(steps, None)
        check(model)


@each
def test_parameters_and_modules_that_are_replaced_are_noticed(kind):
    model, layer = adapted(kind)
    for module in [m for m in layer.modules() if m is not layer.base_layer]:
        for name, p in list(module.named_parameters(recurse=False)):
            check(model)
            module._parameters[name] = nn.Parameter(p.detach() * 2)
            check(model)
    for home in [m for k, m in layer._modules.items() if k != "base_layer"]:
        for name, child in list(home._modules.items()):
            home._modules[name] = copy.deepcopy(child)
            with torch.no_grad():
                for p in child.parameters():
                    p.mul_(3)
            check(model)
    for key, home in [(k, m) for k, m in layer._modules.items() if k != "base_layer" and list(m.parameters())]:
        layer._modules[key] = copy.deepcopy(home)
        with torch.no_grad():
            for p in layer._modules[key].parameters():
                p.mul_(0.5)
        check(model)


@each
def test_training_makes_it_each_time(kind):
    """An optimiser may write past torch's counter."""
    model, _ = adapted(kind)
    for train in (True, False):
        check(model)
        model.train(train)(X).square().sum().backward()
        for t in tensors(model):
            t.data.sub_(t.grad, alpha=0.01)
        model.eval()
        check(model)


@each
def test_evaluation_that_begins_again_makes_it_again(kind):
    model, _ = adapted(kind)
    check(model)
    for t in tensors(model):
        t.data.mul_(0.5)
    model.eval()
    check(model)


@each
def test_loading_and_switching_are_noticed(kind):
    model, layer = adapted(kind)
    model.add_adapter("other", KINDS[kind]())
    state = {k: v * 0.5 for k, v in state_of(model).items()}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        check(model)
    set_peft_model_state_dict(model, state)
    check(model)
    if hasattr(layer, "set_scale"):
        layer.set_scale("default", 3.0)
        check(model)
        layer.adapters["default"].scaling = torch.tensor(2.0)
        check(model)
        layer.adapters["default"].scaling.fill_(4.0)
        check(model)


@each_beside_others
def test_merging_others_and_for_good_is_noticed(kind):
    model, layer = adapted(kind)
    model.add_adapter("other", KINDS[kind]())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 8)
    check(model)
    model.base_model.set_adapter(["other", "default"])
    check(model)
    for _ in range(2):
        model.merge_adapter(["other"])
        check(model)
        model.unmerge_adapter()
        check(model)
    model.merge_adapter(["other"])
    check(model)
    layer.delete_adapter("other")  # what it wrote stays
    check(model)


@each
def test_a_base_weight_that_changes_is_noticed(kind):
    model, layer = adapted(kind)
    check(model)
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    check(model)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().flip(0).clone())
    check(model)


@each
def test_copies_keep_nothing(kind):
    model, _ = adapted(kind)
    check(model)
    twin = pickle.loads(pickle.dumps(model))
    check(twin)
    with torch.no_grad():
        for t in tensors(model):
            t.mul_(2)
    check(model)
    check(twin)


@pytest.mark.parametrize("alpha", [8, 8.0])
def test_a_scaling_that_changes_is_noticed(alpha):
    """It may be a whole number at first."""
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["0"], init_r=4, total_step=9, lora_alpha=alpha, use_dora=True)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), config).eval()
    with torch.no_grad():
        for p in tensors(model):
            p.add_(torch.randn_like(p) / 4)
    for scale in (None, 0.5, 2.0):
        if scale is not None:
            model.base_model.model[0].set_scale("default", scale)
        check(model)


@pytest.mark.parametrize("rows", [1, 2])
def test_keeping_can_be_switched_off(rows):
    from peft.helpers import DoraCaching

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], use_dora=True)).eval()
    p, x = model.base_model.model[0].adapters["default"], torch.ones(rows, 4)
    with torch.no_grad():
        for _ in range(3):
            model(x)  # the shortest way of a row knows what is kept
        with DoraCaching(False):
            answer = model(x)
            with DoraCaching():
                assert torch.equal(model(x), answer)
                assert set(KEPT) & set(p.cache)
            model.base_model.model[0].lora_B["default"].weight.data.add_(1)  # which torch does not count
            changed = model(x)
        assert not torch.equal(changed, answer)
    switch = DoraCaching()
    switch(enabled=False)
    try:
        with torch.no_grad():
            assert torch.equal(model(x), changed)
    finally:
        switch(enabled=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_gain_is_kept_under_autocast_too_and_is_that_of_full_precision(dtype, monkeypatch):
    model, layer = adapted("dora")
    layer.get_base_layer().to(dtype)
    made, norm = [], DoRA.norm
    monkeypatch.setattr(DoRA, "norm", lambda *args: made.append(1) or norm(*args))

    def answer(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    for factor in (1, 3):
        layer.lora_B["default"].weight.mul_(factor)
        made.clear()
        found = [answer(X.to(dtype)), answer(X[:1].to(dtype)), model(X.to(dtype))]
        assert len(made) == 1 and found[0].dtype is torch.bfloat16
        A, B = (home["default"].weight.double() for home in (layer.lora_A, layer.lora_B))
        V = layer.weight.double() + layer.scaling["default"] * B @ A
        m = layer.lora_magnitude_vector["default"].weight.double()
        wanted = X.double() @ (m[:, None] * V / V.norm(dim=1, keepdim=True)).mT + layer.bias.double()
        for y, to in zip(found, (wanted, wanted[:1], wanted), strict=True):
            torch.testing.assert_close(y.double(), to, rtol=0.02, atol=0.02)
    layer.get_base_layer().register_forward_hook(lambda m, args, y: y)  # which may change what it likes
    made.clear()
    answer(X.to(dtype)), answer(X.to(dtype))
    assert len(made) == 2
