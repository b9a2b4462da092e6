"""A method from outside: its mathematics is all that it states, and everything else works."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import peft
from peft import registry
from peft.core.layer import BaseTunerLayer, name_layers
from peft.core.method import Delta
from peft.core.tuner import BaseTuner
from peft.target_config import TargetConfig

KIND = "LILY"  # a name that the registry knows; its own method is put aside


@dataclass
class ToyConfig(TargetConfig):
    kind = KIND
    ranks = ()
    size: float = 1.0


class Toy(Delta):
    """W' = W + size u 1': one learnt number for each out-feature, added to all of its weights."""

    def build(self, site):
        *lead, out, _ = site.view.shape(site.module)
        return {"toy_u": nn.Parameter(torch.zeros(*lead, out, **site.kwargs)), "size": site.settings.size}

    def delta(self, p, W, rows=slice(None)):
        return (p.size * p.held("toy_u"))[..., rows, None].expand(*W.shape)


class ToyLayer(BaseTunerLayer):
    family = "toy"
    adapter_layer_names = ("toy_u",)
    _home_order = ("toy_u",)
    _parameter_homes = frozenset({"toy_u"})


class ToyModel(BaseTuner):
    prefix = "toy_"
    layer_classes = name_layers(ToyLayer, globals())
    method = Toy()


@pytest.fixture
def toy():
    own = registry.METHODS.pop(peft.PeftType(KIND), None)
    registry.register_peft_method(name=KIND.lower(), config_cls=ToyConfig, model_cls=ToyModel)
    yield
    registry.METHODS.pop(peft.PeftType(KIND))
    if own is not None:
        registry.METHODS[peft.PeftType(KIND)] = own


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.conv, self.out = nn.Embedding(9, 4), nn.Conv1d(4, 6, 3, padding=1, groups=2), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.conv(self.tokens(x).mT).mT)


X = torch.tensor([[1, 5, 8], [0, 2, 2]])


def test_it_trains_merges_mixes_and_comes_back_from_its_file(toy, tmp_path):
    config = ToyConfig(
        target_modules=["tokens", "conv", "out"], modules_to_save=[], module_config={"out": {"size": 2.0}}, size=0.5
    )
    model = peft.get_peft_model(Net(), config)
    plain = Net()
    with torch.no_grad():
        assert torch.allclose(model(X), plain(X), atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert dict(model.base_model.model.out.size) == {"default": 2.0}
    with torch.no_grad():
        y = model.eval()(X)
        for name, size in (("tokens", 0.5), ("conv", 0.5), ("out", 2.0)):
            u = getattr(model.base_model.model, name).toy_u["default"]
            weight = getattr(plain, name).weight
            weight += size * (u[None] if name == "tokens" else u.view(-1, *[1] * (weight.dim() - 1)))
        assert torch.allclose(y, plain(X), atol=1e-6)
        assert not torch.allclose(y, Net()(X))
        model.merge_adapter()
        assert torch.allclose(model(X), y, atol=1e-6)
        model.unmerge_adapter()
        mixed = model(X, adapter_names=["default", "__base__"])
        assert torch.allclose(mixed[0], y[0]) and torch.allclose(mixed[1], Net()(X)[1])
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), y)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["out"]))
    model.base_model.set_adapter(["default", "second"])
    assert "toy.Linear" in repr(model)
