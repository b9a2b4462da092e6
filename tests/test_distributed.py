"""Two processes that share the data: DDP, and FSDP2, which shares the parameters too. Everything equals one process."""

from __future__ import annotations

import copy
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import peft
from peft.core.digests import digests
from peft.core.files import read_weights
from peft.utils.other import fully_shard_model
from tests import distributed_work as work

METHODS = ["lora", "dora", "head", "tokens", "ia3", "oft", "loha", "vera"]
CHECKS = [
    "ddp",
    *(f"equal {name}" for name in METHODS),
    *(f"mixed {name}" for name in ("lora", "dora")),
    *(f"merge {name}" for name in METHODS),
    "resume",
    "loading",
    "lent",
    *(f"later {name}" for name in (*METHODS, "norms", "pissa")),
    "budget",
    "cut",
    "loss",
    "swap",
    "sum",
    "tied",
    "unshared",
    "counted",
    "base",
    "helper",
    "copies",
    *(f"watched {name}" for name in ("ddp", "before", "after")),
]


def check(name: str, rank: int) -> None:
    """One of CHECKS, on every process."""
    kind, _, method = name.partition(" ")
    globals()[f"check_{kind}"](rank, *([method] if method else []))


def sharded(model: nn.Module) -> nn.Module:
    """The model with each block, and the rest, spread over both processes."""
    for block in model.base_model.model.blocks:
        fully_shard(block)
    return fully_shard(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def check_budget(rank: int) -> None:
    """AdaLoRA shares out ranks by the whole tensors, and the same on every process."""
    fields = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 6}
    models = []
    for spread in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(work.net(), peft.AdaLoraConfig(target_modules=work.TARGETS, **fields))
        model = sharded(model) if spread else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(7):
            work.loss_of(model(work.IDS)).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    one, two = (model.peft_config["default"].rank_pattern for model in models)
    assert one == two and sum(map(sum, one.values())) == 2 * len(one)
    work.same_state(*map(peft.get_peft_model_state_dict, models), rtol=1e-4, atol=1e-5)


def budgeted() -> nn.Module:
    fields = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 6, "lora_alpha": 64}
    return peft.get_peft_model(work.net(), peft.AdaLoraConfig(target_modules=work.TARGETS, **fields))


def check_cut(rank: int) -> None:
    """A file with the ranks that were kept goes over an adapter that has all of them, spread or not."""
    torch.manual_seed(0)
    folder, source = work.shared_folder(), budgeted()
    learner = adam(source)
    for _ in range(7):
        work.loss_of(source(work.IDS)).backward()
        learner.step()
        learner.zero_grad()
    source.save_pretrained(folder, is_main_process=rank == 0)
    dist.barrier()
    model = sharded(budgeted())
    model.load_adapter(folder, "default", is_trainable=True)
    torch.testing.assert_close(model(work.IDS), source(work.IDS), rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].rank_pattern == source.peft_config["default"].rank_pattern
    work.same_state(peft.get_peft_model_state_dict(source), peft.get_peft_model_state_dict(model))


class WithLoss(work.Net):
    """Gives its loss, as transformers' models do."""

    def forward(self, ids: torch.Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(loss=work.loss_of(super().forward(ids)))


def check_loss(rank: int) -> None:
    """AdaLoRA's own term of the loss is computed of whole factors, and its gradient counts once."""
    torch.manual_seed(0)
    one = peft.get_peft_model(WithLoss(), peft.AdaLoraConfig(target_modules=work.TARGETS, total_step=9))
    two = sharded(work.twin(one))
    wanted, found = one(work.IDS).loss, two(work.IDS).loss
    torch.testing.assert_close(found, wanted)
    wanted.backward()
    found.backward()
    work.same_gradients(one, gradients(two), 1e-5)


def check_swap(rank: int) -> None:
    """What is put in place of an adapter stays, when it comes after a forward without a backward, too."""
    folder, one = work.shared_folder(), work.adapted("lora")
    peft.set_peft_model_state_dict(one, work.other_values(peft.get_peft_model_state_dict(one)))
    one.save_pretrained(folder, is_main_process=rank == 0)
    dist.barrier()
    two = fully_shard(work.adapted("lora"))
    with torch.no_grad():
        two(work.IDS)
        peft.utils.hotswap.hotswap_adapter(two, folder, "default")
        for model in (one, two):
            model.merge_adapter()
        torch.testing.assert_close(two(work.IDS), one(work.IDS), rtol=1e-4, atol=1e-5)
    small = sharded(peft.get_peft_model(work.net(), peft.LoraConfig(target_modules=[*work.TARGETS, "embed"], r=2)))
    before = peft.get_peft_model_state_dict(small)
    with pytest.raises(RuntimeError, match=r"larger at .* swap before fully_shard"):
        peft.utils.hotswap.hotswap_adapter(small, folder, "default")
    work.same_state(before, peft.get_peft_model_state_dict(small))
    small(work.IDS)


def check_sum(rank: int) -> None:
    for name in ("lora", "dora", "head", "norms", "vera"):
        found = []
        for spread in (False, True):
            model = work.adapted(name)
            folder = work.shared_folder()
            model.save_pretrained(folder, is_main_process=rank == 0)
            dist.barrier()
            model = fully_shard(model) if spread else model
            model.load_adapter(folder, "other")
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(work.IDS)
                model.add_weighted_adapter(["default", "other"], [0.4, 0.3], "sum", combination_type="linear")
                model.set_adapter("sum", inference_mode=True)
                found.append(model(work.IDS))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5, msg=name)


def check_tied(rank: int) -> None:
    """A weight that fully_shard has spread as one for two modules cannot be merged for one of them."""
    base = work.net()
    base.head.weight = base.embed.weight
    model = sharded(peft.get_peft_model(base, peft.LoraConfig(target_modules=["embed", "q"], r=2)))
    before = work.base_state(model)
    with pytest.raises(ValueError, match=r"weight of 'embed' is tied .*`peft merge`"):
        model.merge_adapter()
    work.same_state(before, work.base_state(model))
    with torch.no_grad():
        model(work.IDS)


def check_ddp(rank: int) -> None:
    one = work.adapted("lora")
    two = nn.parallel.DistributedDataParallel(work.twin(one))
    wanted = one(work.IDS)
    work.loss_of(wanted).backward()
    found = two(work.half(rank))
    work.loss_of(found).backward()
    torch.testing.assert_close(found, wanted[2 * rank : 2 * rank + 2])
    work.same_gradients(one, gradients(two.module), 1e-6)
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(two.module))


def check_equal(rank: int, name: str, dtype: torch.dtype = torch.float32, tolerance: float = 1e-6) -> None:
    one = work.adapted(name, dtype)
    two = sharded(work.twin(one))
    wanted = one(work.IDS)
    work.loss_of(wanted).backward()
    found = two(work.half(rank))
    work.loss_of(found).backward()
    torch.testing.assert_close(found, wanted[2 * rank : 2 * rank + 2], rtol=1e-4, atol=tolerance)
    work.same_gradients(one, gradients(two), tolerance)
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(two))


def check_mixed(rank: int, name: str) -> None:
    """Adapters in float32 beside a base in bfloat16, in one group of parameters."""
    model = work.adapted(name, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    check_equal(rank, name, torch.bfloat16, 1e-2)


def check_merge(rank: int, name: str) -> None:
    one = work.adapted(name)
    two = sharded(work.twin(one))
    before, spread = work.base_state(two), {n: type(p) for n, p in two.named_parameters()}
    two.merge_adapter()
    assert {n: type(p) for n, p in two.named_parameters()} == spread
    one.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(two(work.IDS), one(work.IDS), rtol=1e-4, atol=1e-5)
    two.unmerge_adapter()
    work.same_state(before, work.base_state(two))
    assert all(torch.isfinite(v).all() for v in before.values())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int) -> None:
    for _ in range(steps):
        work.loss_of(model(work.half(rank))).backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def check_resume(rank: int) -> None:
    """Saved by all, written by one; a new run that loads the files goes on as if nothing had been."""
    folder = work.shared_folder()
    model = sharded(work.adapted("dora"))
    optimizer = adam(model)
    train(model, optimizer, rank, 2)
    model.save_pretrained(folder)
    kept = copy.deepcopy(optimizer.state_dict())

    written = read_weights(Path(folder) / "adapter_model.safetensors")
    assert written and all(t.numel() for t in written.values())
    work.same_state(written, peft.get_peft_model_state_dict(model))
    again = sharded(peft.PeftModel.from_pretrained(work.net(), folder, is_trainable=True))
    work.same_state(written, peft.get_peft_model_state_dict(again))
    resumed = adam(again)
    resumed.load_state_dict(kept)
    train(model, optimizer, rank, 2)
    train(again, resumed, rank, 2)
    work.same_state(peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(again))


def check_loading(rank: int) -> None:
    """Files go into parameters that are spread already, in place, and a whole state may be given by hand."""
    folder = work.shared_folder()
    source, model = work.adapted("lora"), sharded(work.adapted("lora"))
    values = work.other_values(peft.get_peft_model_state_dict(source))
    peft.set_peft_model_state_dict(source, values)
    if rank == 0:
        source.save_pretrained(folder)
    dist.barrier()
    held = [id(p) for p in model.parameters()]
    model.load_adapter(folder, "default", is_trainable=True)
    assert [id(p) for p in model.parameters()] == held
    work.same_state(values, peft.get_peft_model_state_dict(model))
    full = {n: work.whole(p.detach()) for n, p in model.named_parameters()}
    work.same_state(values, peft.get_peft_model_state_dict(model, state_dict=full))
    if rank == 0:  # no process has to be asked for what is given
        model.save_pretrained(f"{folder}/given", state_dict=full)
        work.same_state(values, read_weights(f"{folder}/given/adapter_model.safetensors"))


def check_lent(rank: int) -> None:
    """After a forward without a backward FSDP2 still shows the root's parameters whole; nothing is written there."""
    model = sharded(work.adapted("lora"))
    values = work.other_values(peft.get_peft_model_state_dict(model))
    with torch.no_grad():
        model(work.IDS)
    peft.set_peft_model_state_dict(model, values)
    one = work.adapted("lora")
    peft.set_peft_model_state_dict(one, values)
    one.merge_adapter()
    with torch.no_grad():
        model(work.IDS)
        model.merge_adapter()
        torch.testing.assert_close(model(work.IDS), one(work.IDS), rtol=1e-4, atol=1e-5)
    work.same_state(values, peft.get_peft_model_state_dict(model))


def check_later(rank: int, name: str) -> None:
    """An adapter that comes when the weights are spread runs beside them, with the same numbers everywhere."""
    folder = work.shared_folder()
    one, model = work.adapted(name), sharded(work.adapted("vera"))
    peft.set_peft_model_state_dict(one, work.other_values(peft.get_peft_model_state_dict(one)))
    if rank == 0:
        one.save_pretrained(folder)
    dist.barrier()
    model.load_adapter(folder, "later")
    model.set_adapter("later", inference_mode=True)
    torch.testing.assert_close(model(work.IDS), one(work.IDS), rtol=1e-4, atol=1e-5)
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(model, adapter_name="later"))


def check_unshared(rank: int) -> None:
    """One that would be trained is told that nobody averages its gradients."""
    model = sharded(work.adapted("lora"))
    torch.manual_seed(rank)
    with pytest.warns(peft.PeftWarning, match="before fully_shard"):
        model.add_adapter("later", work.CONFIGS["lora"]())
    mine = torch.cat([p.detach().flatten() for p in model.adapter_parameters("later").values()])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs)


class Named(work.Net):
    """A model that tells which its embedding is, as transformers' do."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed


def check_counted(rank: int) -> None:
    """The embedding's rows are counted for files without reading a weight that is spread."""
    torch.manual_seed(0)
    one = peft.get_peft_model(Named(), work.CONFIGS["tokens"]())
    two = sharded(work.twin(one))
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(two))
    seen = two.get_input_embeddings().weight
    torch.testing.assert_close(seen, one.get_input_embeddings().weight)


def check_base(rank: int) -> None:
    """The base's weights keep their names, and are loaded under them."""
    model = sharded(work.adapted("lora"))
    plain = work.net()
    assert digests(model) == digests(plain)
    work.same_state(dict(plain.state_dict()), work.base_state(model))
    other = work.other_values(plain.state_dict())
    peft.utils.save_and_load.set_base_model_state_dict(model, other)
    work.same_state(other, work.base_state(model))
    folder = work.shared_folder()
    model.save_pretrained(folder, hash_base=True)
    dist.barrier()
    plain.load_state_dict(other)
    peft.PeftModel.from_pretrained(plain, folder, strict=True)
    assert digests(model) == digests(plain)


def check_helper(rank: int) -> None:
    model = fully_shard_model(work.adapted("lora"))
    whole = [n for n, p in model.named_parameters() if not hasattr(p, "device_mesh")]
    assert not whole
    units = {type(m).__name__ for m in model.modules() if hasattr(m, "reshard")}
    assert units == {"FSDPBlock", "FSDPPeftModel"}
    work.loss_of(model(work.half(rank))).backward()
    with pytest.raises(ValueError, match=r"Blok.*Block"):
        fully_shard_model(work.adapted("lora"), ["Blok"])


def check_copies(rank: int) -> None:
    """Parts inside a machine, copies across machines."""
    one = work.adapted("lora")
    two = fully_shard_model(work.twin(one), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts")))
    work.loss_of(one(work.IDS)).backward()
    work.loss_of(two(work.half(rank))).backward()
    work.same_gradients(one, gradients(two), 1e-6)
    work.same_state(peft.get_peft_model_state_dict(one), peft.get_peft_model_state_dict(two))


def check_watched(rank: int, how: str) -> None:
    """`peft.doctor` of a model that is spread before the watch begins, or after."""
    model = work.adapted("lora")
    spread = {"ddp": nn.parallel.DistributedDataParallel, "before": sharded, "after": lambda model: model}[how](model)
    with peft.doctor(spread) as watched:
        spread = sharded(model) if how == "after" else spread
        train(spread, adam(model), rank, 3)
    report = watched.report()
    assert report.ok and not report.findings, str(report)
    trained = sum(p.requires_grad for p in model.parameters())
    assert report.adapters["default"] == {"trained": trained, "with_gradient": trained, "changed": trained}
    with peft.doctor(spread) as watched:
        train(spread, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), rank, 1)
    assert [f.kind for f in watched.report().findings] == ["no change"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return work.outcomes(__name__, CHECKS, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_are_one(told: dict[str, str | None], name: str) -> None:
    assert told[name] is None, told[name]
