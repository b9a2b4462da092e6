"""Models that transformers spreads by its own tensor-parallel plans: adapters made, loaded, run, merged and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import peft
from peft.core.files import read_weights
from tests import distributed_work as work

pytest.importorskip("transformers", "5.20")

CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"),
    "words": lambda: peft.LoraConfig(target_modules=["q_proj", "o_proj", "embed_tokens", "lm_head"], r=4),
    "dora": lambda: peft.LoraConfig(target_modules=["k_proj", "o_proj", "down_proj"], r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
CHECKS = [*CONFIGS, "traffic"]
IDS = torch.arange(10).view(2, 5)


def small() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))


def spread(folder: str) -> Any:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    assert hasattr(model.model.layers[0].self_attn.q_proj.weight, "device_mesh")
    return model


class Traffic(TorchDispatchMode):
    """How wide what processes sum together is, while this is active."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in str(function) and "all_reduce" in str(function):
            self.widths.append(args[0].shape[-1])
        return function(*args, **(kwargs or {}))


def check_traffic(folder: str) -> None:
    """Adapters add what is as wide as their rank: after each split input, and before each split output's gradient."""
    found = []
    for adapt in (False, True):
        model = spread(folder).requires_grad_(False)
        model = peft.get_peft_model(model, CONFIGS["lora"]()) if adapt else model
        with Traffic() as seen:
            model(inputs_embeds=torch.randn(1, 5, 16, requires_grad=True)).logits.sum().backward()
        found.append(sorted(seen.widths))
    assert found[1] == [4] * 7 + found[0]


def check(name: str, rank: int) -> None:
    """An adapter of one configuration, on every process."""
    folder = work.shared_folder()
    plain = small()
    if rank == 0:
        plain.save_pretrained(f"{folder}/base")
    dist.barrier()
    if name == "traffic":
        return check_traffic(f"{folder}/base")
    one = peft.get_peft_model(plain, CONFIGS[name]())
    values = work.other_values(peft.get_peft_model_state_dict(one))
    peft.set_peft_model_state_dict(one, values)
    if rank == 0:
        one.save_pretrained(f"{folder}/adapter")
    dist.barrier()

    ours = peft.PeftModel.from_pretrained(spread(f"{folder}/base"), f"{folder}/adapter", is_trainable=True)
    theirs = spread(f"{folder}/base")
    theirs.load_adapter(f"{folder}/adapter")  # transformers' own loader reads each process's part
    wanted, found = one(IDS, labels=IDS), ours(IDS, labels=IDS)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.logits, wanted.logits, **close)
    torch.testing.assert_close(theirs(IDS).logits, wanted.logits, **close)
    wanted.loss.backward()
    found.loss.backward()
    work.same_gradients(one, {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}, 1e-5)

    with torch.no_grad():  # transformers takes another way then
        torch.testing.assert_close(ours(IDS).logits, wanted.logits.detach(), **close)
    how = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(ours.generate(input_ids=IDS, **how), one.generate(input_ids=IDS, **how))
    ours.save_pretrained(f"{folder}/again")
    work.same_state(values, read_weights(Path(folder) / "again" / "adapter_model.safetensors"))
    before = work.base_state(ours)
    ours.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, wanted.logits.detach(), **close)
    ours.unmerge_adapter()
    work.same_state(before, work.base_state(ours))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return work.outcomes(__name__, CHECKS, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_are_one(told: dict[str, str | None], name: str) -> None:
    assert told[name] is None, told[name]
