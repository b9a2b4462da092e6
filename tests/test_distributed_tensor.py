"""Tensor parallelism: a layer's weight is spread over a mesh, and its adapters are placed as it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import peft
from peft.core.files import read_weights
from tests import distributed_work as work

METHODS = list(work.CONFIGS)
CHECKS = [
    *(f"equal {name}" for name in METHODS),
    "placements",
    "first",
    "dropout",
    "sequence",
    "rows",
    "steps",
    "resume",
    "both",
    "parameter",
]


def check(name: str, rank: int) -> None:
    """One of CHECKS, on every process."""
    kind, _, method = name.partition(" ")
    globals()[f"check_{kind}"](rank, *([method] if method else []))


def plan() -> dict[str, Any]:
    whole = Replicate()
    styles = {"embed": RowwiseParallel(input_layouts=whole), "head": ColwiseParallel(output_layouts=whole)}
    for i in range(2):
        styles[f"blocks.{i}.q"] = ColwiseParallel(output_layouts=whole)
        styles[f"blocks.{i}.v"] = ColwiseParallel(output_layouts=whole)
        styles[f"blocks.{i}.up"], styles[f"blocks.{i}.down"] = ColwiseParallel(), RowwiseParallel()
    return styles


def spread(styles: dict[str, Any] | None = None) -> nn.Module:
    """The base model over both processes."""
    return parallelize_module(work.net(), init_device_mesh("cpu", (2,)), plan() if styles is None else styles)


def pair(name: str, base: nn.Module | None = None) -> tuple[Any, Any]:
    """The same adapter on one process, and over both."""
    one = work.adapted(name)
    two = peft.get_peft_model(spread() if base is None else base, work.CONFIGS[name]())
    peft.set_peft_model_state_dict(two, peft.get_peft_model_state_dict(one))
    return one, two


def same_pass(one: nn.Module, two: nn.Module) -> None:
    wanted, found = one(work.IDS), two(work.IDS)
    torch.testing.assert_close(work.whole(found), wanted, rtol=1e-4, atol=1e-5)
    work.loss_of(wanted).backward()
    work.loss_of(found).backward()
    work.same_gradients(one, {n: p.grad for n, p in two.named_parameters() if p.requires_grad}, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(work.whole(two(work.IDS)), wanted.detach(), rtol=1e-4, atol=1e-5)


def check_equal(rank: int, name: str) -> None:
    """Outputs, every gradient, files, merging, and unmerging to the bit."""
    one, two = pair(name)
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(two))
    same_pass(one, two)
    before = work.base_state(two)
    two.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(two(work.IDS), one(work.IDS), rtol=1e-4, atol=1e-5)
    two.unmerge_adapter()
    work.same_state(before, work.base_state(two))


def check_placements(rank: int) -> None:
    """The factor that counts what the weight is split by is split so, and the other one lies whole everywhere."""
    model = peft.get_peft_model(spread(), work.CONFIGS["lora"]())
    placed = {n: p.placements[0] for n, p in model.named_parameters() if p.requires_grad}
    wanted = {"q.lora_A": Replicate(), "q.lora_B": Shard(0), "down.lora_A": Shard(1), "down.lora_B": Replicate()}
    wanted |= {"embed.lora_embedding_A": Shard(1), "embed.lora_embedding_B": Replicate()}
    for ending, placement in wanted.items():
        assert {p for n, p in placed.items() if ending in n} == {placement}, ending
    A = model.base_model.model.blocks[0].down.lora_A["default"].weight
    assert A.shape == (4, 32) and A.to_local().shape == (4, 16)


def check_first(rank: int) -> None:
    """First values are the first process's, whatever the others drew."""
    torch.manual_seed(rank)
    model = peft.get_peft_model(spread(), work.CONFIGS["lora"]())
    torch.manual_seed(0)
    mine = {k: v.tolist() for k, v in peft.get_peft_model_state_dict(model).items()}
    everybody: list[Any] = [None, None]
    torch.distributed.all_gather_object(everybody, mine)
    assert everybody[0] == everybody[1]
    assert any(any(map(any, v)) for v in mine.values())


def check_dropout(rank: int) -> None:
    config = peft.LoraConfig(target_modules=work.TARGETS, r=4, lora_dropout=0.5)
    model = peft.get_peft_model(spread(), config)
    peft.set_peft_model_state_dict(model, work.other_values(peft.get_peft_model_state_dict(model)))
    torch.manual_seed(3)
    found = model(work.IDS)
    assert not torch.equal(found, model(work.IDS))
    everybody: list[Any] = [None, None]
    torch.distributed.all_gather_object(everybody, found.tolist())
    assert everybody[0] == everybody[1]
    work.loss_of(found).backward()


class Sequence(nn.Module):
    """Layers between which the tokens are split."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def check_sequence(rank: int) -> None:
    """Hooks of torch's styles may split the tokens too: adapters run inside them."""
    torch.manual_seed(0)
    plain = Sequence()
    rows = Shard(1)
    styles = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=rows)}
    styles["down"] = RowwiseParallel(output_layouts=rows)
    model = parallelize_module(work.twin(plain), init_device_mesh("cpu", (2,)), styles)
    config = peft.LoraConfig(target_modules=["up", "down"], r=4)
    one, two = peft.get_peft_model(plain, config), peft.get_peft_model(model, work.twin(config))
    values = work.other_values(peft.get_peft_model_state_dict(one))
    for m in (one, two):
        peft.set_peft_model_state_dict(m, values)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))
    wanted, found = one(x), two(x[:, 3 * rank : 3 * rank + 3])
    torch.testing.assert_close(found, wanted[:, 3 * rank : 3 * rank + 3], rtol=1e-4, atol=1e-5)
    wanted.pow(2).sum().backward()
    found.pow(2).sum().backward()
    work.same_gradients(one, {n: p.grad for n, p in two.named_parameters() if p.requires_grad}, 1e-4)


def check_rows(rank: int) -> None:
    """Each row of a batch under an adapter of its own."""
    one, two = pair("lora")
    for model in (one, two):
        model.add_adapter("other", work.CONFIGS["ia3"]())
        values = peft.get_peft_model_state_dict(model, adapter_name="other")
        peft.set_peft_model_state_dict(model, work.other_values(values), adapter_name="other")
        model.eval()
    names = ["default", "other", "__base__", "default"]
    with torch.no_grad():
        found, wanted = two(work.IDS, adapter_names=names), one(work.IDS, adapter_names=names)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def check_steps(rank: int) -> None:
    """Gradients that torch leaves in parts are put together by the optimizer, and by clipping."""
    runs = []
    for model in pair("lora"):
        trained = [p for p in model.parameters() if p.requires_grad]
        learner = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(3):
            work.loss_of(model(work.IDS)).backward()
            norm = nn.utils.clip_grad_norm_(trained, 0.01)
            learner.step()
            learner.zero_grad()
        runs.append({**peft.get_peft_model_state_dict(model), "norm": work.whole(norm)})
    work.same_state(*runs, rtol=1e-3, atol=1e-4)


def check_resume(rank: int) -> None:
    """Files hold whole tensors, and a model over the mesh loads them without first values."""
    one, two = pair("dora")
    folder = work.shared_folder()
    two.save_pretrained(folder)
    written = read_weights(Path(folder) / "adapter_model.safetensors")
    assert all(t.numel() for t in written.values())
    again = peft.PeftModel.from_pretrained(spread(), folder, is_trainable=True)
    work.same_state(written, peft.get_peft_model_state_dict(again))
    assert all(hasattr(p, "device_mesh") for p in again.parameters() if p.requires_grad)
    runs = []
    for model in (two, again, one):
        learner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            work.loss_of(model(work.IDS)).backward()
            learner.step()
            learner.zero_grad()
        runs.append(peft.get_peft_model_state_dict(model))
    work.same_state(*runs[:2])
    work.same_state(runs[2], runs[0], rtol=1e-3, atol=1e-4)


def check_both(rank: int) -> None:
    """FSDP2 over one axis of a mesh, tensor parallelism over the other."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    base = parallelize_module(work.net(), mesh["model"], plan())
    one, two = pair("lora", base)
    for block in two.base_model.model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(two, mesh=mesh["data"])
    wanted, found = one(work.IDS), two(work.IDS)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    work.loss_of(wanted).backward()
    work.loss_of(found).backward()
    work.same_gradients(one, {n: p.grad for n, p in two.named_parameters() if p.requires_grad}, 1e-5)
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(two))


class Experts(nn.Module):
    """A stack of matrices that the module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
        return torch.einsum("eoi,bi->beo", held, x)


def check_parameter(rank: int) -> None:
    """Experts on several processes (expert parallelism): W' is put in place as W is spread."""
    from torch.distributed.tensor import distribute_tensor

    plain, model = nn.Sequential(Experts()), nn.Sequential(Experts())
    weight = distribute_tensor(model[0].weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    model[0].weight = nn.Parameter(weight)
    config = peft.LoraConfig(target_modules=[], target_parameters=["0.weight"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two = peft.get_peft_model(plain, config), peft.get_peft_model(model, work.twin(config))
    values = work.other_values(peft.get_peft_model_state_dict(one))
    for m in (one, two):
        peft.set_peft_model_state_dict(m, values)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    wanted, found = one(x), two(x)
    torch.testing.assert_close(found, wanted[:, 2 * rank : 2 * rank + 2])
    wanted.pow(2).sum().backward()
    found.pow(2).sum().backward()
    work.same_gradients(one, {n: p.grad for n, p in two.named_parameters() if p.requires_grad}, 1e-4)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return work.outcomes(__name__, CHECKS, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_are_one(told: dict[str, str | None], name: str) -> None:
    assert told[name] is None, told[name]
