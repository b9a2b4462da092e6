"""What the processes of a distributed test run: checks by name, each on every process of one gloo group.

`outcomes` starts two processes once for many checks and tells which of them failed, and how.
"""

from __future__ import annotations

import copy
import datetime
import importlib
import json
import os
import socket
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import peft
from peft.utils.save_and_load import get_base_model_state_dict

TARGETS = ["q", "v", "up", "down"]
EXACT = {"rtol": 0.0, "atol": 0.0}


class Block(nn.Module):
    """Half attention, half feed-forward: layers with and without bias, wide and narrow."""

    def __init__(self, d: int):
        super().__init__()
        self.norm, self.q, self.v = nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + torch.tanh(self.q(h)) * self.v(h)
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Tokens in, logits out."""

    _no_split_modules = ("Block",)

    def __init__(self, d: int = 16, words: int = 24, blocks: int = 2):
        super().__init__()
        self.embed, self.head = nn.Embedding(words, d), nn.Linear(d, words)
        self.blocks = nn.ModuleList(Block(d) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(dtype: torch.dtype = torch.float32) -> Net:
    """The same numbers on every process."""
    torch.manual_seed(0)
    return Net().to(dtype)


CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(target_modules=[*TARGETS, "embed"], r=4),
    "dora": lambda: peft.LoraConfig(target_modules=[*TARGETS, "embed"], r=4, use_dora=True),
    "pissa": lambda: peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights="pissa"),
    "bias": lambda: peft.LoraConfig(target_modules=["q", "up", "down"], r=4, lora_bias=True),
    "head": lambda: peft.LoraConfig(target_modules=["q", "v"], r=4, modules_to_save=["head"]),
    "tokens": lambda: peft.LoraConfig(target_modules=["q", "v"], r=4, trainable_token_indices={"embed": [1, 2, 3]}),
    "ia3": lambda: peft.IA3Config(target_modules=["q", "v", "down"], feedforward_modules=["down"]),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=4, r=0),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS, r=4),
    "vera": lambda: peft.VeraConfig(target_modules=TARGETS, r=4),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}
IDS = torch.arange(12).view(4, 3)


def adapted(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model under an adapter that does something, alike on every process."""
    model = peft.get_peft_model(net(dtype), CONFIGS[name]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1)
    return model


def loss_of(y: Tensor) -> Tensor:
    """Something to learn from."""
    return y.float().pow(2).mean()


def whole(tensor: Any) -> Tensor:
    """A DTensor's whole value; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def half(rank: int) -> Tensor:
    """The rows that one of two processes sees."""
    return IDS[2 * rank : 2 * rank + 2]


def same_state(one: dict[str, Tensor], two: dict[str, Tensor], **tolerance: float) -> None:
    """Raise AssertionError unless both hold the same keys and numbers, bit for bit if no tolerance is given."""
    assert one.keys() == two.keys(), sorted(one.keys() ^ two.keys())[:4]
    for key, value in one.items():
        torch.testing.assert_close(whole(two[key]), value, msg=key, **(tolerance or EXACT))


def same_gradients(one: nn.Module, gradients: dict[str, Tensor], tolerance: float) -> None:
    """Raise AssertionError unless every trained parameter of `one` has the gradient given by its name."""
    wanted = {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
    assert wanted.keys() == gradients.keys() and None not in gradients.values()
    for name, value in wanted.items():
        torch.testing.assert_close(whole(gradients[name]), value, rtol=1e-4, atol=tolerance, msg=name)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base weights by their original names, whole, and apart from the model's."""
    return {k: whole(v).detach().clone() for k, v in get_base_model_state_dict(model).items()}


def other_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """New numbers for an adapter, alike on every process; indices stay."""
    generator = torch.Generator().manual_seed(7)
    made = {k: torch.randn(v.shape, generator=generator).to(v.dtype) * 0.1 for k, v in state.items()}
    return {k: made[k] if v.is_floating_point() else v for k, v in state.items()}


def shared_folder() -> str:
    """One new folder for all processes."""
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return str(found[0])


def twin(model: nn.Module) -> Any:
    """A copy with the same numbers."""
    return copy.deepcopy(model)


# Starting -----------------------------------------------------------------------------------------------------------


def outcomes(module: str, checks: list[str], folder: Path, seconds: int = 30) -> dict[str, str | None]:
    """What became of each check: None, or the traceback of the process in which it failed.

    Arguments:
        module: has `check(name, rank)`, which every process calls with its number.
        checks: their names, in the order in which they run; none runs after one that failed.
        folder: for files of the run.
        seconds: after which a process that waits for another one gives up.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(_work, (module, checks, folder, port, seconds), nprocs=2)
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: next((t[name] for t in told if t.get(name)), _unless(name in told[0])) for name in checks}


def _unless(ran: bool) -> str | None:
    return None if ran else "not run, as an earlier check failed"


def _work(rank: int, module: str, checks: list[str], folder: Path, port: int, seconds: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in where.items()})
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    run = importlib.import_module(module).check
    told: dict[str, str | None] = {}
    for name in checks:
        told[name] = None
        try:
            run(name, rank)
            dist.barrier()
        except BaseException:  # the group is broken now: the other process waits for this one
            told[name] = f"process {rank}:\n{traceback.format_exc()}"
            break
    (folder / f"{rank}.json").write_text(json.dumps(told))
    if not any(told.values()):
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of a group that is broken, or of one that a check made, may abort the interpreter at its end
