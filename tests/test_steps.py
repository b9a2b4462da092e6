"""The steps of injection and loading that other programs stand in for or read the source of."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, _LoraParameterProxy
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.save_and_load import _maybe_shard_state_dict_for_tp


class Clipped(nn.Module):
    """A layer around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).clamp(-1, 1) @ self.table


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.clipped = nn.Linear(4, 4), nn.Linear(4, 4), Clipped()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.clipped(self.b(self.a(x)))


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["a", "b"], "init_lora_weights": False, **fields})


ORIGINAL = LoraModel._create_and_replace
X = torch.linspace(-1, 1, 12).view(3, 4)


def stand_in(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.setattr(LoraModel, "_create_and_replace", function)


def test_every_target_goes_through_the_step_with_its_arguments_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def create(self, peft_config, adapter_name, target, target_name, parent, current_key, **more):  # type: ignore
        seen.append((adapter_name, target_name, current_key, getattr(parent, target_name) is target, more))
        return ORIGINAL(self, peft_config, adapter_name, target, target_name, parent, current_key, **more)

    stand_in(monkeypatch, create)
    base = Net()
    model = get_peft_model(base, config(target_parameters=["clipped.table"]))
    assert seen == [
        *(("default", name, name, True, {}) for name in "ab"),
        ("default", "clipped", "clipped.table", True, {"parameter_name": "table"}),
    ]
    seen.clear()
    model.add_adapter("other", config())
    assert [s[:3] for s in seen] == [("other", "a", "a"), ("other", "b", "b")]
    assert all(isinstance(layer, LoraLayer) for layer in (model.base_model.model.a, model.base_model.model.b))


def test_a_target_can_be_left_out_and_get_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(self, peft_config, adapter_name, target, target_name, *rest):  # type: ignore
        if target_name == "a":
            return
        other = copy.copy(peft_config)
        other.r = 3
        ORIGINAL(self, other, adapter_name, target, target_name, *rest)

    stand_in(monkeypatch, create)
    model = get_peft_model(Net(), config())
    assert type(model.base_model.model.a) is nn.Linear
    shapes = {k: tuple(v.shape) for k, v in get_peft_model_state_dict(model).items()}
    assert shapes == {f"base_model.model.b.lora_{k}.weight": s for k, s in (("A", (3, 4)), ("B", (4, 3)))}
    assert model.peft_config["default"].r == 2


def test_a_module_inside_can_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(self, peft_config, adapter_name, target, target_name, parent, current_key):  # type: ignore
        inner = self.model.clipped
        ORIGINAL(self, peft_config, adapter_name, inner.linear, "linear", inner, current_key)

    stand_in(monkeypatch, create)
    model = get_peft_model(Net(), config(target_modules=["a"]))
    assert isinstance(model.base_model.model.clipped.linear, LoraLayer)
    assert set(get_peft_model_state_dict(model)) == {f"base_model.model.clipped.linear.lora_{k}.weight" for k in "AB"}
    plain = copy.deepcopy(model)
    assert torch.allclose(plain.merge_and_unload()(X), model(X), atol=1e-6)


def test_a_module_can_be_put_in_the_place_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    other = nn.Linear(4, 4)

    def create(self, peft_config, adapter_name, target, *rest):  # type: ignore
        ORIGINAL(self, peft_config, adapter_name, other, *rest)

    stand_in(monkeypatch, create)
    model = get_peft_model(Net(), config(target_modules=["a"]))
    assert model.base_model.model.a.base_layer is other


def test_a_step_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(self, peft_config, adapter_name, target, target_name, *rest):  # type: ignore
        if target_name == "b":
            raise KeyError("mine")
        ORIGINAL(self, peft_config, adapter_name, target, target_name, *rest)

    stand_in(monkeypatch, create)
    base = Net()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(KeyError, match="mine"):
        get_peft_model(base, config())
    assert [name for name, _ in base.named_modules()] == names and all(p.requires_grad for p in base.parameters())


def test_parameters_have_a_step_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    original, found = BaseTuner._inject_parameters, []

    def inject(self, peft_config, model, adapter_name, low_cpu_mem_usage):  # type: ignore
        found.append(original(self, peft_config, model, adapter_name, low_cpu_mem_usage))
        return found[-1]

    monkeypatch.setattr(BaseTuner, "_inject_parameters", inject)
    model = get_peft_model(Net(), config(target_parameters=["clipped.table"]))
    assert found == [["clipped.table"]]
    assert model.base_model.model.clipped.parameter_name == "table"


@pytest.mark.parametrize("name", ["default", "other"])
def test_the_step_by_itself_is_refused(name: str) -> None:
    model = get_peft_model(Net(), config())
    tuner = model.base_model
    with pytest.raises(RuntimeError, match=r"not being injected.*inject_adapter"):
        tuner._create_and_replace(tuner.peft_config["default"], name, tuner.model.b, "b", tuner.model, "b")


def test_the_sources_can_be_read() -> None:
    for thing in (LoraModel._create_and_replace, _LoraParameterProxy, _maybe_shard_state_dict_for_tp):
        assert inspect.getsource(thing).lstrip().startswith(("def _", "class _"))
    names = list(inspect.signature(LoraModel._create_and_replace).parameters)
    assert names[1:7] == ["peft_config", "adapter_name", "target", "target_name", "parent", "current_key"]
    assert list(inspect.signature(_maybe_shard_state_dict_for_tp).parameters) == ["model", "state_dict", "adapter_name"]


def test_the_proxy_adds_an_update_where_a_weight_is_read() -> None:
    base = Net()
    plain = copy.deepcopy(base)
    model = get_peft_model(base, config())
    for name in "ab":
        delta = getattr(model.base_model.model, name).get_delta_weight("default")
        register_parametrization(getattr(plain, name), "weight", _LoraParameterProxy(delta))
    assert torch.allclose(plain(X), model(X), atol=1e-6)
    update = torch.zeros(4, 4, requires_grad=True)
    register_parametrization(plain.clipped.linear, "weight", _LoraParameterProxy(update))
    plain(X).sum().backward()
    assert update.grad is not None and bool(update.grad.any())


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this one process."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_tensors_are_spread_as_those_that_they_are_for(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    model = get_peft_model(Net(), config())
    layer = model.base_model.model.a
    weights = {"A": (layer.lora_A["default"], Replicate()), "B": (layer.lora_B["default"], Shard(0))}
    for module, placement in weights.values():
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [placement]))
    whole = {k: torch.randn(4, 2) if "lora_B" in k else torch.randn(2, 4) for k in get_peft_model_state_dict(model)}
    state = dict(whole)
    _maybe_shard_state_dict_for_tp(model, state, "default")
    for part, (_, placement) in weights.items():
        value = state[f"base_model.model.a.lora_{part}.weight"]
        assert isinstance(value, DTensor) and value.placements == (placement,)
        assert torch.equal(value.full_tensor(), whole[f"base_model.model.a.lora_{part}.weight"])
    assert not any(isinstance(v, DTensor) for k, v in state.items() if ".b." in k)
    set_peft_model_state_dict(model, state)
    assert all(torch.equal(v, whole[k]) for k, v in get_peft_model_state_dict(model).items())
