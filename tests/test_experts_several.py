"""Adapters of one model that adapt different parameters of the same experts: each as if it were alone."""

from __future__ import annotations

import copy
import warnings
from itertools import permutations
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

transformers = pytest.importorskip("transformers", "5.0")

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 1]])
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
SETS = {"both": [UP, DOWN], "up": [UP], "down": [DOWN], "attention": []}


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def config(kind: str, **changes: Any) -> LoraConfig:
    modules = ["q_proj"] if kind in ("attention", "down") else []
    fields = {"r": 2, "target_modules": modules, "target_parameters": SETS[kind] or None, "init_lora_weights": False}
    return LoraConfig(**{**fields, **changes})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each set: a folder with an adapter made for it alone, and what the model answers with it."""
    found = {}
    for i, kind in enumerate(SETS):
        torch.manual_seed(i + 1)
        model = get_peft_model(base(), config(kind, r=2 + i)).eval()
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        with torch.no_grad():
            found[kind] = folder, model(IDS).logits
    return found


@pytest.fixture(autouse=True)
def aloud():
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.PeftWarning)
        yield


def together(alone: dict[str, Any], kinds: tuple[str, ...]) -> PeftModel:
    model = PeftModel.from_pretrained(base(), alone[kinds[0]][0], adapter_name=kinds[0])
    for kind in kinds[1:]:
        model.load_adapter(alone[kind][0], adapter_name=kind)
    return model.eval()


ORDERS = [*permutations(SETS, 2), ("up", "down", "both"), ("down", "attention", "both", "up")]


@pytest.mark.parametrize("kinds", ORDERS, ids="-".join)
def test_each_adapter_answers_saves_and_merges_as_if_it_were_alone(alone, kinds, tmp_path):
    model = together(alone, kinds)
    with torch.no_grad():
        plain = base()(IDS).logits
        for kind in (*kinds, kinds[0]):
            model.set_adapter(kind)
            torch.testing.assert_close(model(IDS).logits, alone[kind][1])
            trainable = {n for n, p in model.named_parameters() if p.requires_grad}
            assert trainable
            assert all(f".{kind}." in n for n in trainable)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain)
        model.save_pretrained(tmp_path)
        for kind in kinds:
            ours, theirs = (
                load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / kind, alone[kind][0])
            )
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)
            again = PeftModel.from_pretrained(base(), tmp_path / kind).eval()
            torch.testing.assert_close(again(IDS).logits, alone[kind][1])
        for kind in kinds:
            merged = copy.deepcopy(model)
            merged.set_adapter(kind)
            merged.merge_adapter()
            torch.testing.assert_close(merged(IDS).logits, alone[kind][1], rtol=1e-4, atol=1e-5)
            merged.unmerge_adapter()
            with merged.disable_adapter():
                assert torch.equal(merged(IDS).logits, plain)
            torch.testing.assert_close(merged.merge_and_unload()(IDS).logits, alone[kind][1], rtol=1e-4, atol=1e-5)
        model.set_adapter(kinds[-1])
        model.delete_adapter(kinds[0])
        torch.testing.assert_close(model(IDS).logits, alone[kinds[-1]][1])
        assert torch.equal(model.unload()(IDS).logits, plain)


@pytest.mark.parametrize("kinds", permutations(SETS, 2), ids="-".join)
def test_mixed_batches_and_sums(alone, kinds):
    model = together(alone, kinds)
    with torch.no_grad():
        found = model(IDS, adapter_names=list(kinds)).logits
        for i, kind in enumerate(kinds):
            torch.testing.assert_close(found[i], alone[kind][1][i])
        model.base_model.set_adapter(list(kinds))
        both = model(IDS).logits
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(IDS).logits, both, rtol=1e-4, atol=1e-5)
        model.add_weighted_adapter(list(kinds), [1.0, 1.0], "sum", combination_type="cat")
        model.set_adapter("sum")
        torch.testing.assert_close(model(IDS).logits, both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kinds", permutations(SETS, 2), ids="-".join)
def test_training_one_leaves_the_other(alone, kinds):
    model = together(alone, kinds)
    model.set_adapter(kinds[1])
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name=kinds[0]).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = get_peft_model_state_dict(model, adapter_name=kinds[0])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    own = load_file(alone[kinds[1]][0] / "adapter_model.safetensors")
    now = get_peft_model_state_dict(model, adapter_name=kinds[1])
    assert all(not torch.equal(own[k], now[k]) for k in own)


@pytest.mark.parametrize("kinds", permutations(("both", "up", "down"), 2), ids="-".join)
def test_tensors_can_be_set_and_swapped(alone, kinds, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model = together(alone, (*kinds[:1], kinds[1]))
    with torch.no_grad():
        zeros = {k: torch.zeros_like(v) for k, v in get_peft_model_state_dict(model, adapter_name=kinds[1]).items()}
        set_peft_model_state_dict(model, zeros, adapter_name=kinds[1])
        model.set_adapter(kinds[1])
        torch.testing.assert_close(model(IDS).logits, base()(IDS).logits)
        hotswap_adapter(model, str(alone[kinds[1]][0]), kinds[1])
        torch.testing.assert_close(model(IDS).logits, alone[kinds[1]][1])
        model.set_adapter(kinds[0])
        torch.testing.assert_close(model(IDS).logits, alone[kinds[0]][1])


@pytest.mark.parametrize("kinds", [("up", "both"), ("both", "down")], ids="-".join)
def test_a_failed_load_takes_its_layers_out_again(alone, kinds, tmp_path):
    model = together(alone, kinds[:1])
    before = [n for n, _ in model.named_modules()]
    config(kinds[1], rank_pattern={"down_proj": 7}).save_pretrained(tmp_path)
    save_file(load_file(alone[kinds[1]][0] / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    with pytest.raises(RuntimeError):
        model.load_adapter(tmp_path, adapter_name="other")
    assert [n for n, _ in model.named_modules()] == before
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, alone[kinds[0]][1])


@pytest.mark.parametrize("kind", ["both", "up", "down"])
def test_injection_from_a_state_dict(alone, kind):
    """Which modules, the tensors say; which of their parameters, the configuration."""
    folder, expected = alone[kind]
    state = load_file(folder / "adapter_model.safetensors")
    model = base()
    peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(folder), model, state_dict=state)
    set_peft_model_state_dict(model, state, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, expected)


def test_injection_from_a_state_dict_of_other_parameters_is_told(alone):
    state = load_file(alone["both"][0] / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r".*selects 1 parameters of 'model.layers.0.mlp.experts'.*tensors for 2"):
        peft.inject_adapter_in_model(config("up"), base(), state_dict=state)
    state = load_file(alone["attention"][0] / "adapter_model.safetensors")
    with pytest.warns(peft.errors.UnmatchedTargetWarning, match="nothing for the target_parameters.*gate_up_proj"):
        peft.inject_adapter_in_model(config("up", target_modules=["q_proj"]), base(), state_dict=state)


class Router(torch.nn.Module):
    """Gives rows of tokens for samples of them, and where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> Any:
        scores = torch.nn.functional.linear(x.flatten(0, -2), self.weight)
        return (scores, scores.argmax(-1)) if x.shape[-2] < 9 else scores[:-1]


def test_a_router_that_flattens_its_samples_in_a_mixed_batch():
    torch.manual_seed(0)
    body = torch.nn.Sequential(Router())
    fields = {"r": 2, "target_modules": [], "target_parameters": ["0.weight"], "init_lora_weights": False}
    model = get_peft_model(body, LoraConfig(**fields)).eval()
    model.add_adapter("b", LoraConfig(**fields))
    x, names = torch.randn(4, 5, 8), ["b", "default", "__base__", "b"]
    with torch.no_grad():
        scores, chosen = model(x, adapter_names=names)
        for i, name in enumerate(names):
            model.set_adapter("b" if name == "b" else "default")
            with model.disable_adapter() if name == "__base__" else torch.no_grad():
                alone, there = model(x[i : i + 1])
            torch.testing.assert_close(scores.unflatten(0, (4, 5))[i], alone)
            assert torch.equal(chosen.unflatten(0, (4, 5))[i], there)
        with pytest.raises(ValueError, match="gives 33 rows for 4, which cannot be told apart"):
            model(torch.randn(4, 9, 8), adapter_names=names)
