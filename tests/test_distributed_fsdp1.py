"""FSDP1: flat parameters, with the original ones kept or not; and the policy that wraps adapters apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import peft
from peft.core.digests import digests
from peft.core.files import read_weights
from peft.utils.other import fsdp_auto_wrap_policy
from peft.utils.save_and_load import set_base_model_state_dict
from tests import distributed_work as work

METHODS = ["lora", "dora", "head", "tokens", "ia3", "oft", "vera"]
CHECKS = [*(f"kept {name}" for name in METHODS), "flat pissa", "flat head", "mixed", "summoned", "refusal", "base"]
CHECKS += ["policy dora", "policy oft", "policy lora", "watched before", "watched after", "watched flat"]
CHECKS += [f"gathered {name}" for name in ("pissa", "head", "bias")]


def check(name: str, rank: int) -> None:
    """One of CHECKS, on every process."""
    kind, _, method = name.partition(" ")
    globals()[f"check_{kind}"](rank, *([method] if method else []))


def wrapped(model: nn.Module, keep: bool = True) -> nn.Module:
    """The model with each block as a unit; without the original parameters adapters must be units of their own."""
    policy = ModuleWrapPolicy({work.Block}) if keep else fsdp_auto_wrap_policy(model)
    return FSDP(model, auto_wrap_policy=policy, use_orig_params=keep, device_id=torch.device("cpu"))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    with FSDP.summon_full_params(model, with_grads=True):
        named = ((n.replace("_fsdp_wrapped_module.", ""), p) for n, p in model.named_parameters())
        return {n: p.grad.clone() for n, p in named if p.requires_grad}


def same_files(one: nn.Module, two: nn.Module, **tolerance: float) -> None:
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(two), **tolerance)


def check_kept(rank: int, name: str, keep: bool = True) -> None:
    one = work.adapted(name)
    two = wrapped(work.twin(one), keep)
    same_files(one, two)
    learners = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (one, two)]
    wanted, found = one(work.IDS), two(work.half(rank))
    torch.testing.assert_close(found, wanted[2 * rank : 2 * rank + 2], rtol=1e-4, atol=1e-6)
    work.loss_of(wanted).backward()
    work.loss_of(found).backward()
    if keep:  # torch does not show gradients whole otherwise
        work.same_gradients(one, gradients(two), 1e-6)
    for learner in learners:
        learner.step()
    same_files(one, two, rtol=1e-4, atol=1e-6)
    work.same_state(work.base_state(one), work.base_state(two))
    values = work.other_values(peft.get_peft_model_state_dict(one))
    peft.set_peft_model_state_dict(two, values)
    work.same_state(values, peft.get_peft_model_state_dict(two))


def check_flat(rank: int, name: str) -> None:
    check_kept(rank, name, keep=False)


def check_policy(rank: int, name: str) -> None:
    """The policy beside original parameters, as transformers' `Trainer` takes it: what is only read is no unit."""
    one = work.adapted(name)
    two = FSDP(
        inner := work.twin(one),
        auto_wrap_policy=fsdp_auto_wrap_policy(inner),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    wanted, found = one(work.IDS), two(work.half(rank))
    torch.testing.assert_close(found, wanted[2 * rank : 2 * rank + 2], rtol=1e-4, atol=1e-6)
    work.loss_of(wanted).backward()
    work.loss_of(found).backward()
    work.same_gradients(one, gradients(two), 1e-6)


def check_mixed(rank: int) -> None:
    """Adapters in float32 beside a base in bfloat16: FSDP1 needs units of one dtype, which the policy makes."""
    one = work.adapted("head", torch.bfloat16)
    two = wrapped(work.twin(one), keep=False)
    found = two(work.half(rank))
    torch.testing.assert_close(found, one(work.IDS)[2 * rank : 2 * rank + 2], rtol=1e-2, atol=1e-2)
    work.loss_of(found).backward()
    same_files(one, two)


def check_summoned(rank: int) -> None:
    """Inside `summon_full_params` merging, unmerging and saving are as in one process."""
    one, two = work.adapted("dora"), wrapped(work.adapted("dora"))
    before, folder = work.base_state(one), work.shared_folder()
    with FSDP.summon_full_params(two):
        two.save_pretrained(folder)
        two.merge_adapter()
    work.same_state(peft.get_peft_model_state_dict(one), read_weights(Path(folder) / "adapter_model.safetensors"))
    one.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(two(work.IDS), one(work.IDS), rtol=1e-4, atol=1e-5)
    with FSDP.summon_full_params(two):
        two.unmerge_adapter()
    work.same_state(before, work.base_state(two))


@contextmanager
def refused() -> Iterator[None]:
    with pytest.raises(ValueError, match=r"summon_full_params\(model\)"):
        yield


def check_refusal(rank: int) -> None:
    """The model inside does not know the unit around it: no part of a tensor is written, on any process."""
    for name in ("lora", "vera", "head"):
        two, folder = wrapped(work.adapted(name)), work.shared_folder()
        two(work.half(rank))
        with refused():
            two.save_pretrained(folder)
        with refused():
            peft.get_peft_model_state_dict(two.module)
        with refused():
            two.merge_adapter()
        assert not list(Path(folder).glob("**/*.safetensors"))
    with FSDP.state_dict_type(two, torch.distributed.fsdp.StateDictType.FULL_STATE_DICT):
        full = two.state_dict()
    if rank == 0:
        two.save_pretrained(folder, state_dict=full)
        written = read_weights(Path(folder) / "adapter_model.safetensors")
        work.same_state(peft.get_peft_model_state_dict(work.adapted("head")), written)
    dist.barrier()


def check_watched(rank: int, how: str) -> None:
    """`peft.doctor` of a model that is wrapped before the watch begins, or after."""
    model = work.adapted("pissa")
    two = model if how == "after" else wrapped(model, how != "flat")
    with peft.doctor(two) as watched:
        two = wrapped(model) if how == "after" else two
        learner = torch.optim.AdamW([p for p in two.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            work.loss_of(two(work.half(rank))).backward()
            learner.step()
            learner.zero_grad()
    report = watched.report()
    assert report.ok and not report.findings, str(report)
    assert len({*report.adapters["default"].values()}) == 1 and report.adapters["default"]["changed"] > 0


def check_gathered(rank: int, name: str) -> None:
    """A state that FSDP1 has gathered is saved by the model inside, as training programs do at their end."""
    two, folder = wrapped(work.adapted(name), keep=False), work.shared_folder()
    two(work.half(rank))
    with FSDP.state_dict_type(two, torch.distributed.fsdp.StateDictType.FULL_STATE_DICT):
        full = two.state_dict()
    if rank == 0:
        two.module.save_pretrained(folder, state_dict=full)
        written = read_weights(Path(folder) / "adapter_model.safetensors")
        work.same_state(peft.get_peft_model_state_dict(work.adapted(name)), written)
    dist.barrier()


def check_base(rank: int) -> None:
    two, plain = wrapped(work.adapted("lora")), work.net()
    assert digests(two) == digests(plain)
    other = work.other_values(plain.state_dict())
    set_base_model_state_dict(two, other)
    work.same_state(other, work.base_state(two))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return work.outcomes(__name__, CHECKS, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_are_one(told: dict[str, str | None], name: str) -> None:
    assert told[name] is None, told[name]
