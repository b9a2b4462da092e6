"""AdaLoRA's budget: which ranks go, when, and what files hold of it."""

from __future__ import annotations

import copy
import json
import types

import pytest
import safetensors.torch
import torch
from torch import nn

import peft
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

FIELDS = {"target_modules": ["one", "two"], "init_r": 6, "target_r": 3, "total_step": 12, "tinit": 2, "tfinal": 3}


class Net(nn.Module):
    """Two layers whose output has a loss, if it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 10), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> types.SimpleNamespace:
        y = self.two(torch.tanh(self.one(x)))
        return types.SimpleNamespace(y=y, loss=None if labels is None else (y - labels).square().mean())


def wrapped(**changes):
    torch.manual_seed(0)
    return get_peft_model(Net(), AdaLoraConfig(**{**FIELDS, **changes}))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 8, generator=generator), torch.randn(16, 5, generator=generator)


def fit(model, steps, by_hand=False, first=1):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, labels = data()
    for step in range(first, first + steps):
        model(x, labels).loss.backward()
        optimizer.step()
        if by_hand:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def ranks(model):
    return [int((p.lora_E != 0).sum()) for p in model.base_model.allocator("default").adapters]


def test_the_loss_has_the_term_for_orthogonal_factors():
    model = wrapped()
    x, labels = data()
    parts = []
    for layer in (model.base_model.model.one, model.base_model.model.two):
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        parts += [(A @ A.T - torch.eye(6)).norm(), (B.T @ B - torch.eye(6)).norm()]
    output = model(x, labels)
    wanted = (output.y - labels).square().mean() + 0.5 * sum(parts) / 4
    torch.testing.assert_close(output.loss, wanted)
    with model.disable_adapter():
        output = model(x, labels)
        torch.testing.assert_close(output.loss, (output.y - labels).square().mean())
    assert model(x).loss is None


def test_ranks_fall_from_the_first_to_the_last_as_the_schedule_has_it():
    config = AdaLoraConfig(**FIELDS)
    assert config.budget(2, 12, 6) == (12, False)
    assert config.budget(5, 12, 6) == (int(6 * (4 / 7) ** 3 + 6), True)
    assert config.budget(10, 12, 6) == (6, True)
    model = fit(wrapped(), 12)
    assert sum(ranks(model)) == 6
    pattern = model.peft_config["default"].rank_pattern
    assert set(pattern) == {"one.lora_E", "two.lora_E"} and sum(map(sum, pattern.values())) == 6
    again = dict(pattern)
    fit(model, 3, first=13)
    assert model.peft_config["default"].rank_pattern == again and sum(ranks(model)) == 6


def test_a_schedule_of_several_steps_cuts_only_then():
    model = fit(wrapped(deltaT=4), 3)
    assert model.peft_config["default"].rank_pattern is None
    fit(model, 1, first=4)
    assert model.peft_config["default"].rank_pattern is not None


def test_the_optimiser_is_followed_as_if_by_hand():
    one, two = fit(wrapped(), 12), fit(wrapped(), 12, by_hand=True)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.peft_config["default"].rank_pattern == two.peft_config["default"].rank_pattern


def test_importance_is_the_product_of_smoothed_sensitivity_and_uncertainty():
    model = wrapped(beta1=0.8, beta2=0.9)
    x, labels = data()
    mean = change = torch.zeros(6, 8)
    for step in (1, 2):
        model.zero_grad()
        model(x, labels).loss.backward()
        A = model.base_model.model.one.lora_A["default"]
        now = (A * A.grad).abs()
        mean = 0.8 * mean + 0.2 * now
        change = 0.9 * change + 0.1 * (now - mean).abs()
        model.base_model.update_and_allocate(step)
    found = model.base_model.rankallocator.averages["one", "lora_A"]
    torch.testing.assert_close(found, (mean, change))


def test_without_gradients_it_says_when_to_call():
    with pytest.raises(ValueError, match="zero_grad"):
        wrapped().base_model.update_and_allocate(1)


def test_training_without_a_step_is_told():
    model, (x, labels) = wrapped(), data()
    for _ in range(11):
        model(x, labels)
    with pytest.warns(peft.PeftWarning, match="update_and_allocate"):
        model(x, labels)


def test_files_hold_the_ranks_that_were_kept_and_answer_as_before(tmp_path):
    model = fit(wrapped(), 12).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert [p.lora_E.numel() for p in loaded.base_model.allocator("default").adapters] == ranks(model)
    x, _ = data()
    torch.testing.assert_close(loaded(x).y, model(x).y)
    loaded.save_pretrained(tmp_path / "again")
    state = peft.load_peft_weights(tmp_path)
    assert all(torch.equal(v, state[k]) for k, v in peft.load_peft_weights(tmp_path / "again").items())


def test_a_file_of_fewer_ranks_comes_back_over_the_adapter_that_has_all(tmp_path):
    model = fit(wrapped(), 12).eval()
    model.save_pretrained(tmp_path)
    x, _ = data()
    expected, places = model(x).y, {n: id(p) for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.base_model.allocator("default").adapters:
            p.lora_E += 1
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert {n: id(p) for n, p in model.named_parameters()} == places
    torch.testing.assert_close(model(x).y, expected)

    other = wrapped()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(other.eval()(x).y, expected)
    assert other.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    for again in (model, other):
        again.save_pretrained(tmp_path / "again")
        state = peft.load_peft_weights(tmp_path)
        assert all(torch.equal(v, state[k]) for k, v in peft.load_peft_weights(tmp_path / "again").items())


@pytest.mark.parametrize("by_tensors", [True, False])
def test_a_file_of_all_ranks_over_an_adapter_that_was_cut_is_saved_whole(by_tensors, tmp_path):
    early = fit(wrapped(), 2).eval()
    early.save_pretrained(tmp_path)
    model = fit(wrapped(), 12)
    if by_tensors:
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(tmp_path))
    else:
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert model.peft_config["default"].rank_pattern is None
    model.save_pretrained(tmp_path / "again")
    state = peft.load_peft_weights(tmp_path / "again")
    assert all(torch.equal(v, state[k]) for k, v in peft.load_peft_weights(tmp_path).items())


def test_a_file_with_broken_ranks_leaves_the_adapter_as_it_was(tmp_path):
    model = fit(wrapped(), 12)
    model.save_pretrained(tmp_path)
    state = {k: v[:-1] if "lora_A" in k else v for k, v in peft.load_peft_weights(tmp_path).items()}
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    other = wrapped()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    assert other.peft_config["default"].rank_pattern is None


@pytest.mark.parametrize("further", [None, 3], ids=["new", "gone further"])
def test_training_goes_on_with_the_step_and_the_averages_that_the_optimizer_has_kept(further):
    x, labels = data()

    def steps(model, optimizer, count):
        for _ in range(count):
            model(x, labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def optimizer_of(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole, half = wrapped(), wrapped()
    steps(whole, optimizer_of(whole), 12)
    first = optimizer_of(half)
    steps(half, first, 5)
    kept = copy.deepcopy((half.state_dict(), first.state_dict()))
    again, second = half, first
    if further is None:
        again = wrapped()
        second = optimizer_of(again)
    else:
        steps(half, first, further)
    again.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    steps(again, second, 7)
    assert again.base_model.allocator("default").steps == 12
    assert again.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert not any("sensitivity" in key for held in second.state.values() for key in held)  # of no use any more


def by_order(model, steps, order, first=1, optimizer=None, state=None):
    """Steps with the user's calls before or after those of the optimizer, or without them."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if state is not None:
        optimizer.load_state_dict(state)
    x, labels = data()
    for step in range(first, first + steps):
        model(x, labels).loss.backward()
        if order == "before":
            model.base_model.update_and_allocate(step)
        optimizer.step()
        if order == "after":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("steps", [7, 9, 12])
@pytest.mark.parametrize("order, every", [("before", 1), ("after", 4), ("", 4)])
def test_a_file_answers_as_the_model_at_every_step_of_the_schedule(order, every, steps, tmp_path):
    model = wrapped(deltaT=every)
    by_order(model, steps, order)
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    x, _ = data()
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(x).y, model(x).y)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert (pattern is None) == (steps < 9)
    if pattern:
        kept = {key: sum(flags) for key, flags in pattern.items()}
        assert kept == {f"{n}.lora_E": len(v) for n, v in zip(("one", "two"), _E(tmp_path), strict=True)}


def _E(folder):
    return [v for k, v in sorted(peft.load_peft_weights(folder).items()) if k.endswith("lora_E")]


@pytest.mark.parametrize("order", ["after", ""])
@pytest.mark.parametrize("every", [1, 4])
def test_a_run_goes_on_from_the_adapters_file_as_if_it_had_not_stopped(order, every, tmp_path):
    whole, half, again = wrapped(deltaT=every), wrapped(deltaT=every), wrapped(deltaT=every)
    by_order(whole, 12, order)
    first = by_order(half, 6, order)
    half.save_pretrained(tmp_path)
    with torch.no_grad():
        for p in again.base_model.allocator("default").adapters:
            p.lora_A.normal_(), p.lora_B.normal_()
    again.load_adapter(tmp_path, "default", is_trainable=True)
    by_order(again, 6, order, first=7, state=copy.deepcopy(first.state_dict()))
    assert again.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_calls_that_begin_amid_the_schedule_say_that_nothing_was_measured_before():
    model = wrapped()
    with pytest.warns(peft.PeftWarning, match="begins to measure at step 6"):
        by_order(model, 1, "before", first=6)


def test_a_layer_without_gradients_is_worth_nothing_and_stops_nobody():
    model = wrapped(orth_reg_weight=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, _ = data()
    for _ in range(12):
        torch.tanh(model.base_model.model.one(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pattern = model.peft_config["default"].rank_pattern
    assert not any(pattern["two.lora_E"]) and any(pattern["one.lora_E"])
    (model(x).y.square().mean()).backward()
    optimizer.step()  # which begins the state of factors that it has not trained before


def test_an_adapter_of_a_name_that_was_deleted_has_a_schedule_of_its_own():
    model = fit(wrapped(), 4)
    config = model.peft_config["default"]
    model.add_adapter("other", peft.LoraConfig(target_modules=["one"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    fit(model, 12)
    assert sum(ranks(model)) == 6 and model.base_model.allocator("default").steps == 12


def test_a_pattern_that_no_step_has_cut_is_not_written(tmp_path):
    pattern = {"one.lora_E": [True] * 3 + [False] * 3, "two.lora_E": [False] * 6}
    model = wrapped(rank_pattern=pattern, init_lora_weights=False).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] is None
    torch.manual_seed(0)
    x, _ = data()
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(x).y, model(x).y)


def test_importances_of_half_precision_are_added_up_in_single():
    torch.manual_seed(0)
    model = get_peft_model(Net().bfloat16(), AdaLoraConfig(**FIELDS), autocast_adapter_dtype=False)
    x, labels = (t.bfloat16() for t in data())
    model(x, labels).loss.backward()
    model.base_model.update_and_allocate(1)
    assert all(t.dtype is torch.float32 for pair in model.base_model.rankallocator.averages.values() for t in pair)


@pytest.mark.parametrize("steps", [6, 12])
def test_files_of_other_ranks_take_each_others_place(steps, tmp_path):
    for name, change in (("one", {}), ("other", {"target_r": 2})):
        model = wrapped(**change)
        by_order(model, 12 if name == "one" else steps, "")
        model.eval().save_pretrained(tmp_path / name)
    x, _ = data()
    torch.manual_seed(0)
    swapped = PeftModel.from_pretrained(Net(), tmp_path / "one")
    hotswap_adapter(swapped, tmp_path / "other", "default")
    torch.testing.assert_close(swapped(x).y, model(x).y)
    swapped.save_pretrained(tmp_path / "again")
    torch.manual_seed(0)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "again")(x).y, model(x).y)


def test_a_file_with_cut_ranks_is_loaded_by_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    settings = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    transformers.set_seed(0)
    base = transformers.LlamaForCausalLM(settings)
    plain = copy.deepcopy(base)
    model = get_peft_model(base, AdaLoraConfig(**{**FIELDS, "target_modules": ["q_proj", "v_proj"]}))
    optimizer, ids = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), torch.tensor([[3, 4, 5, 6]])
    for _ in range(12):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    plain.load_adapter(str(tmp_path))
    torch.testing.assert_close(plain.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_files_of_the_other_library_are_without_alpha_pattern(tmp_path):
    plain = fit(wrapped(), 12).eval()
    plain.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = {**json.loads(path.read_text()), "alpha_pattern": {"one": 32}}
    x, _ = data()
    for version in ("0.21.2", peft.__version__):
        path.write_text(json.dumps({**values, "peft_version": version}))
        torch.manual_seed(0)
        with pytest.warns(peft.PeftWarning, match="alpha_pattern|configuration"):
            loaded = PeftModel.from_pretrained(Net(), tmp_path)
        assert torch.allclose(loaded(x).y, plain(x).y) == (version == "0.21.2")


def test_a_layer_that_lost_every_rank_is_saved_and_loaded(tmp_path):
    model = wrapped()
    model.base_model.resize_modules_by_rank_pattern(
        {"one.lora_E.default": [False] * 6, "two.lora_E": [True] * 6}, "default"
    )
    model.peft_config["default"].rank_pattern = {"one.lora_E": [False] * 6, "two.lora_E": [True] * 6}
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert loaded.base_model.model.one.lora_A["default"].shape == (0, 8)
    x, _ = data()
    torch.testing.assert_close(loaded(x).y, model.eval()(x).y)


def test_a_state_dictionary_is_cut_to_a_pattern():
    model = wrapped()
    state = {f"m.one.{n}.default": getattr(model.base_model.model.one, n)["default"] for n in ("lora_A", "lora_B")}
    cut = model.base_model.resize_state_dict_by_rank_pattern(
        {"one.lora_E": [True, False, True, False, False, False]}, dict(state), "default"
    )
    assert torch.equal(cut["m.one.lora_A.default"], state["m.one.lora_A.default"][[0, 2]])
    assert torch.equal(cut["m.one.lora_B.default"], state["m.one.lora_B.default"][:, [0, 2]])


def test_a_copy_has_a_budget_of_its_own():
    model = fit(wrapped(), 3)
    twin = copy.deepcopy(model)
    fit(twin, 9, first=4)
    assert sum(ranks(twin)) == 6 and sum(ranks(model)) > 6


@pytest.mark.parametrize(
    "change, text",
    [
        ({"total_step": None}, "total_step"),
        ({"tinit": 9}, "tfinal"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight"),
        ({"beta1": 1.0}, "beta1"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_r": 0}, "init_r"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(change, text):
    with pytest.raises(ValueError, match=text):
        AdaLoraConfig(**{**FIELDS, **change})


@pytest.mark.parametrize("change", [{"r": 4}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_fields_without_effect_are_told(change):
    with pytest.warns(peft.PeftWarning, match=next(iter(change))):
        AdaLoraConfig(**{**FIELDS, **change})


@pytest.mark.parametrize("first", ["plain", "default"])
def test_beside_another_method_it_adds_to_the_loss_and_cuts_ranks(first):
    configs = {"plain": peft.LoraConfig(r=2, target_modules=["one"]), "default": AdaLoraConfig(**FIELDS)}
    torch.manual_seed(0)
    model = get_peft_model(Net(), configs.pop(first), adapter_name=first)
    for name, config in configs.items():
        model.add_adapter(name, config)
    model.base_model.set_adapter(["plain", "default"])
    x, labels = data()
    out = model(x, labels)
    assert out.loss > (out.y - labels).square().mean()
    fit(model, FIELDS["total_step"])
    assert sum(ranks(model)) == 2 * FIELDS["target_r"]


@pytest.mark.parametrize("first", ["other", "default"])
def test_beside_a_method_without_ranks_both_are_saved_and_loaded(first, tmp_path):
    configs = {
        "other": peft.IA3Config(target_modules=["one"], feedforward_modules=[]),
        "default": AdaLoraConfig(**FIELDS),
    }
    model = get_peft_model(Net(), configs.pop(first), adapter_name=first)
    for name, config in configs.items():
        model.add_adapter(name, config)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "other", "other")  # over the one that is there
    model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("rule", ["lora_only", "adalora_only"])
def test_biases_of_adapted_layers_are_trained_under_either_name(rule):
    model = wrapped(bias=rule)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert trained == {f"base_model.model.{n}.base_layer.bias" for n in ("one", "two")}
    assert {n for n in peft.get_peft_model_state_dict(model) if n.endswith("bias")} == trained
