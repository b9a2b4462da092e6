"""Models that transformers spreads by its own tensor-parallel plans: adapters made, loaded, run, merged and saved."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import peft
from peft.algebra import diff
from peft.core.files import read_weights
from peft.errors import OtherProcessError
from peft.utils.other import fully_shard_model
from tests import distributed_work as work

pytest.importorskip("transformers", "5.20")

CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"),
    "words": lambda: peft.LoraConfig(target_modules=["q_proj", "o_proj", "embed_tokens", "lm_head"], r=4),
    "dora": lambda: peft.LoraConfig(target_modules=["k_proj", "o_proj", "down_proj"], r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "head": lambda: peft.LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["lm_head", "down_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj", "o_proj"], total_step=9, task_type="CAUSAL_LM"),
    "frod": lambda: peft.FrodConfig(target_modules=["q_proj", "down_proj"]),
    "glora": lambda: peft.GloraConfig(target_modules=["q_proj", "down_proj"], r=2),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "gate": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
}
UNMERGED = ("prefix", "gate")
FIRST = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "unilora": lambda: peft.UniLoraConfig(target_modules=["q_proj"], r=2),
    "norm": lambda: peft.LoraConfig(target_modules=["q_proj", "router"], r=2),
}
SUMS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2),
    "head": lambda: peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj", "o_proj"], oft_block_size=4, r=0),
    "glora": lambda: peft.GloraConfig(target_modules=["q_proj", "o_proj"], r=2),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}
SWAPS = {
    "words": lambda: peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2),
    "adamss": lambda: peft.AdamssConfig(target_modules=["o_proj"], r=4),
}
SHARED = ("prompt", "cpt", "gate")
CHECKS = [*CONFIGS, "traffic", "first", "tied tokens", "tied words", "sums", "swaps", "failures", "within", "experts"]
CHECKS += [f"shared {name}" for name in SHARED]
IDS = torch.arange(10).view(2, 5)


def small(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64, **more}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, attention_bias=True)
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return model


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


def alike(values: dict[str, torch.Tensor]) -> None:
    """Raise AssertionError unless all processes have the same numbers."""
    mine, everybody = {k: work.whole(v).tolist() for k, v in values.items()}, [None, None]
    dist.all_gather_object(everybody, mine)
    assert everybody[0] == everybody[1] == mine


def check_first(folder: str) -> None:
    """First values are the first process's where the base's weight lies whole on each, too; dropout stays alike."""
    for make in FIRST.values():
        base = spread(folder)
        base.model.router = nn.Linear(16, 4)
        for seed in (dist.get_rank(), 5):
            torch.manual_seed(seed)
            model = peft.get_peft_model(base, make())
            alike(peft.get_peft_model_state_dict(model))
            base = model.unload()
        alike({"drawn next": torch.rand(3)})


def check_tied(folder: str, what: str) -> None:
    """An adapter that comes from a file is tied as one that is made here, and its numbers are those of the file."""
    rows = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]}
    more = rows if what == "tokens" else {"target_modules": ["embed_tokens", "lm_head"]}
    one = peft.get_peft_model(small(tie_word_embeddings=True), peft.LoraConfig(r=2, ensure_weight_tying=True, **more))
    values = peft.get_peft_model_state_dict(one, save_embedding_layers=False)
    peft.set_peft_model_state_dict(one, {k: v for k, v in work.other_values(values).items() if "lm_head" not in k})
    one.save_pretrained(f"{folder}/tied", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    two = peft.PeftModel.from_pretrained(spread(folder), f"{folder}/tied", is_trainable=True)
    two.load_adapter(f"{folder}/tied", "other", is_trainable=True)
    two.set_adapter("other")
    torch.testing.assert_close(two(IDS).logits, one(IDS).logits, rtol=1e-4, atol=1e-5)
    for model in (one, two):
        learner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(IDS).logits.pow(2).mean().backward()
        learner.step()
    torch.testing.assert_close(two(IDS).logits, one(IDS).logits, rtol=1e-4, atol=1e-5)
    for model in (one, two):
        model.merge_adapter()
    torch.testing.assert_close(two(IDS).logits, one(IDS).logits, rtol=1e-4, atol=1e-5)


def pair(folder: str, make: Any) -> tuple[Any, Any]:
    """The same two adapters on one process, and over both."""
    one, two = (peft.get_peft_model(base, make()).eval() for base in (small(), spread(folder)))
    for model in (one, two):
        model.add_adapter("other", make())
    for seed, name in enumerate(("default", "other")):
        values = peft.get_peft_model_state_dict(one, adapter_name=name, save_embedding_layers=False)
        generator = torch.Generator().manual_seed(seed)
        new = {k: v + torch.randn(v.shape, generator=generator) * 0.1 for k, v in values.items()}
        for model in (one, two):
            peft.set_peft_model_state_dict(model, new, adapter_name=name)
    return one, two


def check_sums(folder: str) -> None:
    """Sums of adapters, and what is made of them, of whole tensors."""
    for name, make in SUMS.items():
        logits = []
        for model in pair(folder, make):
            kind = {"combination_type": "linear"} if name != "oft" else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.add_weighted_adapter(["default", "other"], [0.5, 0.7], "sum", **kind)
            model.set_adapter("sum")
            logits.append(model(IDS).logits)
            if name == "lora":
                peft.convert_to_lora(model, 2, "sum")
                logits[-1] = logits[-1] + diff(model, "sum", "other").distance
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def check_swaps(folder: str) -> None:
    """One adapter's tensors take the place of another's, of another rank too, which are placed as the first were."""
    from peft.utils.hotswap import hotswap_adapter

    for name, make in SWAPS.items():
        one, two = pair(folder, make)
        for model in (one, two):  # of which the next takes the place
            if name == "words":
                model.delete_adapter("default")
                model.add_adapter("default", peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=1))
                model.set_adapter("default")
        one.save_pretrained(f"{folder}/{name}", is_main_process=dist.get_rank() == 0)
        dist.barrier()
        for model in (one, two):
            hotswap_adapter(model, f"{folder}/{name}/other", "default")
        assert all(hasattr(p, "device_mesh") for n, p in two.named_parameters() if "lora_" in n)
        torch.testing.assert_close(
            two(IDS).logits, one(IDS).logits, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_failures(folder: str) -> None:
    """What fails on one process fails on all of them, soon, and by name."""
    rank, (_, model) = dist.get_rank(), pair(folder, CONFIGS["lora"])
    target = Path(folder) / "saved"
    model.save_pretrained(str(target), is_main_process=rank == 1)  # whoever it is that writes
    dist.barrier()
    assert (target / "adapter_model.safetensors").is_file()
    taken = Path(folder) / "taken"
    if rank == 0:
        taken.write_text("a file")
    dist.barrier()
    with pytest.raises(ValueError if rank == 0 else OtherProcessError, match="taken is a file"):
        model.save_pretrained(str(taken))
    before = sorted(model.peft_config)
    lost = pytest.raises(ValueError if rank else OtherProcessError, match=r"adapter_config\.json|adapter_model")
    with lost:
        model.load_adapter(str(target) if rank == 0 else f"{folder}/nowhere", "third")
    assert sorted(model.peft_config) == before
    base = spread(folder)
    with pytest.raises(ValueError if rank else OtherProcessError, match=r"adapter_config\.json"):
        peft.PeftModel.from_pretrained(base, str(target) if rank == 0 else f"{folder}/nowhere")
    assert not [n for n, _ in base.named_modules() if "lora" in n]


def check_experts(folder: str) -> None:
    """A copy of experts that lie on several processes runs its own, whatever stands between its forward and them."""
    transformers = pytest.importorskip("transformers")
    settings = pytest.importorskip("transformers.distributed").DistributedConfig
    if "ep_size" not in inspect.signature(settings).parameters:
        return
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    plain = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    if dist.get_rank() == 0:
        plain.save_pretrained(f"{folder}/experts")
    dist.barrier()
    parts = settings(tp_size=2, ep_size=2)
    base = type(plain).from_pretrained(f"{folder}/experts", distributed_config=parts)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["mlp"])
    one, two = peft.get_peft_model(plain, config), peft.get_peft_model(base, work.twin(config))
    values = {k: 2 * v for k, v in work.other_values(peft.get_peft_model_state_dict(one)).items()}
    for model in (one, two):
        peft.set_peft_model_state_dict(model, values)
    wanted, found = one(IDS).logits, two(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    wanted.pow(2).mean().backward()
    found.pow(2).mean().backward()
    work.same_gradients(one, {n: p.grad for n, p in two.named_parameters() if p.requires_grad}, 1e-5)


def check_within(folder: str) -> None:
    """A base that fully_shard has spread by itself takes an adapter of a task class."""
    one, base = peft.get_peft_model(small(), CONFIGS["lora"]()), small()
    peft.set_peft_model_state_dict(one, work.other_values(peft.get_peft_model_state_dict(one)))
    one.save_pretrained(f"{folder}/one", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    fully_shard(base.model.layers[0])
    two = peft.PeftModel.from_pretrained(fully_shard(base), f"{folder}/one")
    with torch.no_grad():
        torch.testing.assert_close(two(IDS).logits, one.eval()(IDS).logits)


def check_shared(folder: str, name: str) -> None:
    """Prompts under fully_shard: gradients, files, loading in place, and a second one."""
    config = {
        "cpt": lambda: peft.CPTConfig(
            cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], task_type="CAUSAL_LM"
        ),
        **FIRST,
        **CONFIGS,
    }[name]
    one, two = (peft.get_peft_model(small(num_hidden_layers=2), config()) for _ in range(2))
    fully_shard_model(two)
    values = work.other_values(peft.get_peft_model_state_dict(one))
    for model in (one, two):
        peft.set_peft_model_state_dict(model, values)
        model(IDS).logits.pow(2).mean().backward()
    work.same_state(values, peft.get_peft_model_state_dict(two))
    work.same_gradients(one, {n: p.grad for n, p in two.named_parameters() if p.requires_grad}, 1e-5)
    full = {n: work.whole(p.detach()) for n, p in two.named_parameters()}
    if dist.get_rank() == 0:  # no process has to be asked for what is given
        work.same_state(values, peft.get_peft_model_state_dict(two, state_dict=full))
    dist.barrier()
    two.save_pretrained(f"{folder}/{name}")
    work.same_state(values, read_weights(Path(folder) / name / "adapter_model.safetensors"))
    if name == "cpt":  # a further one would start from words that are spread
        return
    for model in (one, two):
        model.load_adapter(f"{folder}/{name}", "other")
        more = {k: -2 * v for k, v in values.items()}
        peft.set_peft_model_state_dict(model, more, adapter_name="other")
        model.set_adapter("other", inference_mode=True)
    with torch.no_grad():
        torch.testing.assert_close(two(IDS).logits, one(IDS).logits, rtol=1e-4, atol=1e-5)
        for model in (one, two):
            model.set_adapter("default", inference_mode=True)
        torch.testing.assert_close(two(IDS).logits, one(IDS).logits, rtol=1e-4, atol=1e-5)


def check(name: str, rank: int) -> None:
    """An adapter of one configuration, on every process."""
    folder, kind = work.shared_folder(), name.partition(" ")[0]
    plain = small(tie_word_embeddings=kind == "tied")
    if rank == 0:
        plain.save_pretrained(f"{folder}/base")
    dist.barrier()
    if name not in CONFIGS:
        return globals()[f"check_{kind}"](f"{folder}/base", *name.split()[1:])
    one = peft.get_peft_model(plain, CONFIGS[name]())
    values = work.other_values(peft.get_peft_model_state_dict(one))
    peft.set_peft_model_state_dict(one, values)
    if rank == 0:
        one.save_pretrained(f"{folder}/adapter")
    dist.barrier()

    ours = peft.PeftModel.from_pretrained(spread(f"{folder}/base"), f"{folder}/adapter", is_trainable=name != "prefix")
    ours.train().set_adapter("default")
    wanted, found = one(IDS, labels=IDS), ours(IDS, labels=IDS)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.logits, wanted.logits, **close)
    if name in ("lora", "words", "dora", "ia3"):
        theirs = spread(f"{folder}/base")
        theirs.load_adapter(f"{folder}/adapter")  # transformers' own loader reads each process's part
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
    if name in UNMERGED:
        return
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
