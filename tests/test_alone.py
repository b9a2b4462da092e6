"""Layers that a program makes by itself, and modules that it calls in ways of its own."""

import pytest
import torch
from torch import nn

from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.lora import layer as lora
from peft.tuners.vera.layer import Linear as VeraLinear

BASES = {
    "Linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "Conv1d": (lambda: nn.Conv1d(3, 5, 3), (2, 3, 6)),
    "Conv2d": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5), requires_grad=False)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_a_layer_by_itself_runs_and_merges_as_in_a_model(kind, fields):
    torch.manual_seed(0)
    make, shape = BASES[kind]
    base = make()
    before, x = base.weight.detach().clone(), torch.randn(shape)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **fields)
    layer = getattr(lora, kind)(base, adapter_name="a", config=config, r=3, lora_alpha=6)
    assert layer.active_adapters == ["a"] and layer.r == {"a": 3} and layer.lora_alpha == {"a": 6}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in layer.parameters())
    y = layer(x)
    if not fields.get("use_dora"):
        assert layer.get_delta_weight("a").shape == before.shape
    layer.merge(adapter_names=["a"])
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)
    assert not torch.equal(base.weight, before)
    layer.unmerge()
    assert torch.equal(base.weight, before)
    model = get_peft_model(nn.Sequential(make()), LoraConfig(r=3, lora_alpha=6, target_modules=["0"], **fields))
    model.base_model.model[0].load_state_dict({k.replace(".a.", ".default."): v for k, v in layer.state_dict().items()})
    torch.testing.assert_close(model(x), y)


def test_a_layer_of_a_parameter_by_itself_tells_its_update():
    torch.manual_seed(0)
    layer = lora.ParamWrapper(Experts(), "a", "weight", LoraConfig(lora_alpha=4), r=2, lora_alpha=4)
    A, B = torch.randn(6, 5), torch.randn(4, 6)
    layer.lora_A["a"].weight.data, layer.lora_B["a"].weight.data = A, B
    each = [2 * B[:, e::3] @ A.view(3, 2, 5)[e] for e in range(3)]  # experts lie apart in A, side by side in B
    torch.testing.assert_close(layer.get_delta_weight("a"), torch.stack(each))


def test_a_weight_that_lies_the_other_way_round_gets_its_update_so():
    torch.manual_seed(0)
    base, A, B = nn.Linear(6, 4, bias=False), torch.randn(2, 6), torch.randn(4, 2)
    base.weight.data = torch.randn(6, 4)
    layer = lora.Linear(base, "a", LoraConfig(r=2, lora_alpha=4, fan_in_fan_out=True))
    layer.lora_A["a"].weight.data, layer.lora_B["a"].weight.data = A, B
    torch.testing.assert_close(layer.get_delta_weight("a"), 2 * (B @ A).T)


def test_other_methods_and_defaults():
    layer = LoHaLinear(nn.Linear(4, 4), "a", LoHaConfig(), r=2, lora_alpha=6)
    assert layer.r == {"a": 2} and layer.scaling == {"a": 3.0}
    assert lora.Linear(nn.Linear(4, 4), "a", r=2, lora_alpha=8).scaling == {"a": 4.0}  # as before there was `config`


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (TypeError, "lora_alhpa.*lora_alpha", lambda b: lora.Linear(b, "a", LoraConfig(), r=2, lora_alhpa=2)),
        (TypeError, "adapter_name must be its name", lambda b: lora.Linear(b, config=LoraConfig())),
        (TypeError, "adapter_name", lambda b: lora.Linear(b, "a", LoraConfig(), adapter_name="b")),
        (ValueError, "positive integer", lambda b: lora.Linear(b, "a", LoraConfig(), r=0)),
        (TypeError, "^Layers of VERA belong together", lambda b: VeraLinear(b, "a", VeraConfig(r=2))),
        (
            TypeError,
            "belong together",
            lambda b: lora.MultiheadAttention(nn.MultiheadAttention(4, 2), "a", LoraConfig()),
        ),
    ],
)
def test_what_cannot_stand_alone_is_refused(error, match, make):
    with pytest.raises(error, match=match):
        make(nn.Linear(4, 4))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, *, pixel_values):
        return self.proj(pixel_values)


class Sighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.head, self.q = Tower(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.q(self.head(input=self.tower(pixel_values=x)))


@pytest.mark.parametrize("whole", ["tower", "head"])
def test_a_whole_module_is_called_by_names_alone(whole):
    torch.manual_seed(0)
    model, x = Sighted(), torch.randn(2, 4)
    before = model(x)
    model = get_peft_model(model, LoraConfig(target_modules=["q"], modules_to_save=[whole]))
    model.add_adapter("other", LoraConfig(target_modules=["q"], modules_to_save=[whole]))
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".modules_to_save.default" in n)
    if whole == "head":
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x, adapter_names=["default", "other"]), before)


@pytest.mark.parametrize("config", [LoraConfig(r=2), IA3Config(feedforward_modules=[]), OFTConfig(oft_block_size=2)])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_beside_weights_stored_in_eight_bits_are_float32(config, autocast):
    base = nn.Sequential(nn.Linear(4, 4)).to(torch.float8_e4m3fn)
    config.target_modules = ["0"]
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def modes(model):
    """The names of the modules that are in training, below the tuner."""
    return sorted(n.removeprefix("base_model.model.") for n, m in model.named_modules() if m.training and "model." in n)


def small(**fields):
    config = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False, **fields)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), config


def test_what_is_to_learn_is_in_training_though_its_model_is_not():
    model = get_peft_model(*small())
    new = ["0", *(f"0.{k}{e}" for k in ("lora_A", "lora_B", "lora_dropout") for e in ("", ".default"))]
    x = torch.ones(64, 4)
    assert modes(model) == new and not torch.equal(model(x)[0], model(x)[1]), "dropout is in force"
    assert modes(get_peft_model(*small(inference_mode=True))) == []


def test_a_further_adapter_leaves_the_mode_of_the_others(tmp_path):
    model = get_peft_model(*small())
    model.save_pretrained(tmp_path)
    model.eval()
    model.add_adapter("b", small()[1])
    assert modes(model) == ["0.lora_A.b", "0.lora_B.b", "0.lora_dropout.b"]
    for name in "cde":  # from the second on by what was kept of the first
        model.load_adapter(tmp_path, name, is_trainable=name != "e")
        assert modes(model) == ([] if name == "e" else [n for n in modes(model) if n[-1] in "bcd"])
        assert name == "e" or f"0.lora_dropout.{name}" in modes(model)


def test_modes_are_as_before_where_an_adapter_could_not_be_added():
    model = get_peft_model(*small()).eval()
    with pytest.raises(ValueError, match="nope"):
        model.add_adapter("b", LoraConfig(target_modules=["0"], trainable_token_indices={"nope": [0]}))
    assert modes(model) == []
