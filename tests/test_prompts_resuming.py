"""Going on with a run: files hold prompts, an optimiser's state what made them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import peft
from peft import PeftModel, get_peft_model
from peft.errors import PeftWarning

transformers = pytest.importorskip("transformers")

K, WORDS = 3, 40
METHODS = {
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": K, "encoder_hidden_size": 8}),
    "lstm": ("PromptEncoderConfig", {
        "num_virtual_tokens": K, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5,
    }),
    "prefix_projection": ("PrefixTuningConfig", {"num_virtual_tokens": K, "prefix_projection": True}),
    "cpt": ("CPTConfig", {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4]}),
}  # fmt: skip
WITH_NETWORK = ("p_tuning", "lstm", "prefix_projection")


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=WORDS, **sizes)).eval()


def adapted(method: str, seed: int, **more) -> PeftModel:
    name, kwargs = METHODS[method]
    torch.manual_seed(seed)
    return get_peft_model(base(), getattr(peft, name)(task_type="CAUSAL_LM", **kwargs, **more))


def optimizer_of(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def step(model: PeftModel, optimizer: torch.optim.Optimizer, seed: int) -> float:
    torch.manual_seed(seed)
    ids = torch.randint(3, WORDS, (2, 6))
    loss = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def checkpoint(model: PeftModel, optimizer: torch.optim.Optimizer, folder) -> None:
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def trained(method: str, folder):
    """A run after two steps, its checkpoint, and its next two losses."""
    model = adapted(method, 1)
    optimizer = optimizer_of(model)
    for seed in (1, 2):
        step(model, optimizer, seed)
    checkpoint(model, optimizer, folder)
    return model, [step(model, optimizer, seed) for seed in (3, 4)]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_where_it_was(method, tmp_path):
    model, losses = trained(method, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = adapted(method, 9)
        other.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer = optimizer_of(other)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert [step(other, optimizer, seed) for seed in (3, 4)] == losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_files_and_the_run_are_as_without_it(method, tmp_path):
    model, _ = trained(method, tmp_path / "a")
    assert not any(
        "head" in k or "transform" in k for k in peft.utils.save_and_load.load_peft_weights(str(tmp_path / "a"))
    )
    optimizer = torch.load(tmp_path / "a" / "optimizer.pt", weights_only=True)
    count = sum(p.requires_grad for p in model.parameters())
    assert len(optimizer["param_groups"][0]["params"]) == count
    inference = PeftModel.from_pretrained(base(), tmp_path / "a")
    assert "mlp_head" not in str(inference.prompt_encoder)
    assert "transform" not in str(inference.prompt_encoder)


@pytest.mark.parametrize("damage", ["gone", "of_another_step", "broken", "of_another_size"])
@pytest.mark.parametrize("method", WITH_NETWORK)
def test_without_the_numbers_the_prompt_itself_is_held_with_a_warning(method, damage, tmp_path):
    model, _ = trained(method, tmp_path)
    kept = peft.utils.save_and_load.load_peft_weights(str(tmp_path))["prompt_embeddings"]
    optimizer = tmp_path / "optimizer.pt"
    if damage == "gone":
        optimizer.unlink()
    elif damage == "broken":
        optimizer.write_bytes(optimizer.read_bytes()[:500])
    elif damage == "of_another_step":
        other = adapted(method, 5)
        steps = optimizer_of(other)
        step(other, steps, 1)
        torch.save(steps.state_dict(), optimizer)
    else:
        steps = optimizer_of(model)
        step(model, steps, 1)
        state = steps.state_dict()
        noted = next(s["peft_prompt_encoder"] for s in state["state"].values() if "peft_prompt_encoder" in s)
        name = next(iter(noted))
        noted[name] = noted[name][:1]
        torch.save(state, optimizer)
    other = adapted(method, 9)
    with pytest.warns(PeftWarning, match="holds the loaded prompt itself now"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(other.get_prompt_embedding_to_save("default"), kept)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == ["prompt_encoder.default.embedding.weight"]


def test_an_adapter_of_another_name_goes_on_from_its_folder(tmp_path):
    model = adapted("p_tuning", 1)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    optimizer = optimizer_of(model)
    step(model, optimizer, 1)
    checkpoint(model, optimizer, tmp_path)
    losses = [step(model, optimizer, seed) for seed in (3, 4)]
    again = adapted("p_tuning", 9)
    again.add_adapter("other", copy.deepcopy(again.peft_config["default"]))
    again.set_adapter("other")
    again.load_adapter(tmp_path / "other", "other", is_trainable=True)
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert [step(again, optimizer, seed) for seed in (3, 4)] == losses


def test_copies_are_noted_too_and_others_are_not(tmp_path):
    model = copy.deepcopy(adapted("p_tuning", 1))
    optimizer = optimizer_of(model)
    step(model, optimizer, 1)
    assert sum("peft_prompt_encoder" in s for s in optimizer.state.values()) == 1
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    other.param_groups[0]["params"][0].grad = torch.ones(2)
    other.step()
    assert not any("peft_prompt_encoder" in s for s in other.state.values())


def test_the_saved_prompt_knows_no_dropout():
    model = adapted("lstm", 1).train()
    kept = [model.get_prompt_embedding_to_save("default") for _ in range(2)]
    assert torch.equal(*kept)
    assert model.prompt_encoder.default.lstm_head.training
    assert torch.equal(kept[0], model.eval().get_prompt_embedding_to_save("default"))
