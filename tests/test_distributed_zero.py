"""DeepSpeed's ZeRO-3, whose parameters have no elements between uses.

The first half runs everywhere, on a small stand-in of the public interface (`ds_id`, `ds_shape`,
`zero.GatheredParameters`); the second half runs DeepSpeed itself on two processes, where it is installed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft
from peft.core.digests import digests
from peft.core.files import read_weights
from peft.utils.save_and_load import set_base_model_state_dict
from tests import distributed_work as work

METHODS = ["lora", "dora", "head", "tokens", "ia3", "vera"]
CHECKS = [*(f"engine {name}" for name in METHODS), "init", "around"]
FOUND = importlib.util.find_spec("deepspeed") is not None


# A stand-in --------------------------------------------------------------------------------------------------------


class GatheredParameters:
    """As DeepSpeed documents it: inside parameters are whole; changes are kept if there is a modifier rank."""

    def __init__(self, params: Iterable[Any], modifier_rank: int | None = None, fwd_module: Any = None):
        self.params, self.kept = [p for p in params if hasattr(p, "ds_id")], modifier_rank is not None

    def __enter__(self) -> None:
        if any(p.numel() for p in self.params):
            raise RuntimeError("Nested GatheredParameters contexts cannot overlap parameters")
        for p in self.params:
            p.data = p.elsewhere.clone()

    def __exit__(self, *error: object) -> None:
        for p in self.params:
            p.elsewhere = p.data.clone() if self.kept else p.elsewhere
            p.data = torch.empty(0, dtype=p.dtype)


def partitioned(model: nn.Module) -> Any:
    """The model with every parameter elsewhere."""
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape, p.elsewhere = number, p.shape, p.data
        p.data = torch.empty(0, dtype=p.dtype)
    return model


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", module)


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    assert not any(p.numel() for p in model.parameters())  # nothing was left gathered
    return {n: p.elsewhere for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", list(work.CONFIGS))
def test_files_and_merges_gather_what_they_need(stand_in: None, name: str, tmp_path: Path) -> None:
    one = work.adapted(name)
    two = partitioned(work.twin(one))
    state = peft.get_peft_model_state_dict(one)
    two.save_pretrained(tmp_path)
    work.same_state(state, read_weights(tmp_path / "adapter_model.safetensors"))
    work.same_state(work.base_state(one), work.base_state(two))
    values = work.other_values(state)
    for model in (one, two):
        peft.set_peft_model_state_dict(model, values)
    work.same_state(values, peft.get_peft_model_state_dict(two))
    before = everything(two)
    if name == "bias":
        return  # the layer without a bias cannot take one
    two.merge_adapter()
    one.merge_adapter()
    work.same_state(work.base_state(one), work.base_state(two))
    two.unmerge_adapter()
    work.same_state(before, everything(two))


def test_a_file_goes_over_a_live_adapter(stand_in: None, tmp_path: Path) -> None:
    source, model = work.adapted("lora"), partitioned(work.adapted("lora"))
    values = work.other_values(peft.get_peft_model_state_dict(source))
    peft.set_peft_model_state_dict(source, values)
    source.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    work.same_state(values, peft.get_peft_model_state_dict(model))
    everything(model)


def test_base_weights_are_written_where_they_are(stand_in: None) -> None:
    model = partitioned(work.adapted("lora"))
    assert digests(model) == digests(work.net())
    other = work.other_values(work.net().state_dict())
    set_base_model_state_dict(model, other)
    work.same_state(other, work.base_state(model))


@pytest.mark.parametrize("name", ["pissa", "dora", "vera"])
def test_first_values_come_from_whole_weights(stand_in: None, name: str) -> None:
    states = []
    for base in (work.net(), partitioned(work.net())):
        torch.manual_seed(1)
        states.append(peft.get_peft_model_state_dict(peft.get_peft_model(base, work.CONFIGS[name]())))
    work.same_state(*states)


def test_somebody_around_has_gathered_everything(stand_in: None, tmp_path: Path) -> None:
    """As programs do that hand merged weights to another engine while they hold them."""
    one = work.adapted("lora")
    two = partitioned(work.twin(one))
    before = everything(two)
    with GatheredParameters(list(two.parameters())):
        two.merge_adapter()
        one.merge_adapter()
        held = work.base_state(two)
        two.save_pretrained(tmp_path)
        two.unmerge_adapter()
    work.same_state(work.base_state(one), held)
    work.same_state(peft.get_peft_model_state_dict(one), read_weights(tmp_path / "adapter_model.safetensors"))
    work.same_state(before, everything(two))


def test_shapes_in_errors_are_the_whole_tensors(stand_in: None) -> None:
    model = partitioned(work.adapted("lora"))
    state = peft.get_peft_model_state_dict(model)
    key = next(iter(k for k in state if "q.lora_A" in k))
    with pytest.raises(RuntimeError, match=r"\(3, 16\) in the checkpoint, \(4, 16\) in the model"):
        peft.set_peft_model_state_dict(model, {**state, key: torch.zeros(3, 16)})
    work.same_state(state, peft.get_peft_model_state_dict(model))


# DeepSpeed itself --------------------------------------------------------------------------------------------------

SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def check(name: str, rank: int) -> None:
    """One of CHECKS, on every process."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    kind, _, method = name.partition(" ")
    globals()[f"check_{kind}"](rank, *([method] if method else []))


def learner(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def engine(model: nn.Module) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=learner(model), config=SETTINGS)[0]


def check_engine(rank: int, name: str) -> None:
    """A step equals the one of one process; files, base weights, merging, and unmerging to the bit."""
    one = work.adapted(name)
    two = work.twin(one)
    running, optimizer = engine(two), learner(one)
    wanted, found = one(work.IDS), running(work.half(rank))
    torch.testing.assert_close(found, wanted[2 * rank : 2 * rank + 2], rtol=1e-4, atol=1e-6)
    work.loss_of(wanted).backward()
    optimizer.step()
    running.backward(work.loss_of(found))
    running.step()
    state = peft.get_peft_model_state_dict(two)
    work.same_state(peft.get_peft_model_state_dict(one), state, rtol=1e-4, atol=1e-6)
    folder = work.shared_folder()
    two.save_pretrained(folder)
    work.same_state(state, read_weights(f"{folder}/adapter_model.safetensors"))
    values = work.other_values(state)
    for model in (one, two):
        peft.set_peft_model_state_dict(model, values)
    work.same_state(values, peft.get_peft_model_state_dict(two))
    before = work.base_state(two)
    work.same_state(work.base_state(one), before)
    two.merge_adapter()
    one.merge_adapter()
    running.eval()
    with torch.no_grad():
        torch.testing.assert_close(running(work.IDS), one(work.IDS), rtol=1e-4, atol=1e-5)
    two.unmerge_adapter()
    work.same_state(before, work.base_state(two))
    running.destroy()


def check_init(rank: int) -> None:
    """The base is spread before an adapter is made, by the method that looks at its weights."""
    import deepspeed

    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=SETTINGS):
        base = work.Net()
    assert not any(p.numel() for p in base.parameters())
    set_base_model_state_dict(base, dict(work.net().state_dict()))
    torch.manual_seed(1)
    model = peft.get_peft_model(base, work.CONFIGS["pissa"]())
    torch.manual_seed(1)
    one = peft.get_peft_model(work.net(), work.CONFIGS["pissa"]())
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(model), rtol=1e-4, atol=1e-5)
    running = engine(model)
    torch.testing.assert_close(running(work.IDS), one(work.IDS), rtol=1e-4, atol=1e-5)
    running.destroy()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def check_around(rank: int) -> None:
    one = work.adapted("lora")
    two = work.twin(one)
    running = engine(two)
    with gathered(two):
        two.merge_adapter()
        one.merge_adapter()
        work.same_state(work.base_state(one), work.base_state(two))
        two.unmerge_adapter()
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(two))
    running.destroy()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return work.outcomes(__name__, CHECKS, tmp_path_factory.mktemp("processes"), seconds=60)


@pytest.mark.skipif(not FOUND, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_are_one(told: dict[str, str | None], name: str) -> None:
    assert told[name] is None, told[name]
