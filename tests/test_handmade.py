"""Layers of a program's own class, registered with `config._register_custom_module`."""

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class LoraLSTM(nn.Module, LoraLayer):
    def __init__(self, base_layer, adapter_name, config=None, r=0, lora_alpha=1, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.in_features, self.fan_in_fan_out = base_layer.input_size, False
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name, r, lora_alpha, config=None, **kwargs):
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, 8, bias=False)
        self.set_adapter(self.active_adapters)

    def forward(self, x):
        out, state = self.base_layer(x)
        for name in self.active_adapters if not self.disable_adapters else ():
            if name in self.lora_A:
                out = out + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return out, state


class LoraDense(nn.Module, LoraLayer):
    def __init__(self, base_layer, adapter_name, *, config, r, lora_alpha, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.update_layer(adapter_name, r, lora_alpha, config)

    def delta(self, name):
        return self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]

    def merge(self, safe_merge=False, adapter_names=None):
        for name in check_adapters_to_merge(self, adapter_names):
            self.get_base_layer().weight.data += self.delta(name)
            self.merged_adapters.append(name)

    def unmerge(self):
        while self.merged_adapters:
            self.get_base_layer().weight.data -= self.delta(self.merged_adapters.pop())

    def forward(self, x):
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        W = self.weight if self.merged else sum(map(self.delta, self.active_adapters), self.weight)
        return nn.functional.linear(x, W, self.bias)


class Doubled(Linear):
    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


def settings(target, layer, **fields):
    config = LoraConfig(target_modules=[target], init_lora_weights=False, **{"r": 2, **fields})
    config._register_custom_module({nn.LSTM if target == "lstm" else nn.Linear: layer})
    return config


@pytest.fixture
def model():
    model = get_peft_model(Net(), settings("lstm", LoraLSTM))
    model.add_adapter("b", settings("lstm", LoraLSTM, r=3, lora_alpha=3))
    return model


def test_a_class_of_a_program_stands_in_place_of_a_module_that_the_library_cannot_adapt(model):
    layer = model.base_model.model.lstm
    assert type(layer) is LoraLSTM and isinstance(layer, LoraLayer) and isinstance(layer, nn.Module)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.lstm.lora_{key}.default.weight" for key in "AB"
    }
    model(X).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None and layer.base_layer.weight_ih_l0.grad is None
    assert str(layer).startswith("LoraLSTM(\n  (base_layer): LSTM")


def test_it_is_switched_and_scaled_like_any_other(model):
    layer, base = model.base_model.model.lstm, Net()
    first = model(X)
    model.set_adapter("b")
    second = model(X)
    assert layer.r == {"default": 2, "b": 3} and [*layer.lora_A] == ["default", "b"]
    assert layer.lora_A["b"].weight.requires_grad and not layer.lora_A["default"].weight.requires_grad
    layer.set_scale("b", 0)
    torch.testing.assert_close(model(X), base(X))
    layer.unscale_layer()
    model.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(model(X), first + second - base(X))
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base(X))
    model.delete_adapter("b")
    torch.testing.assert_close(model(X), first)
    assert model.get_layer_status()[0].available_adapters == ["default"]


@pytest.mark.parametrize("low", [False, True])
def test_it_is_saved_and_loaded_where_the_class_is_registered_again(model, low, tmp_path):
    model.save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LSTM is not supported"):
        PeftModel.from_pretrained(Net(), tmp_path)
    config._register_custom_module({nn.LSTM: LoraLSTM})
    again = PeftModel.from_pretrained(Net(), tmp_path, config=config, low_cpu_mem_usage=low)
    torch.testing.assert_close(again(X), model(X))
    assert get_peft_model_state_dict(again).keys() == get_peft_model_state_dict(model).keys()


def test_it_is_copied_and_pickled(model):
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(X), model(X))
        again.set_adapter("b")
        assert model.base_model.model.lstm.active_adapters == ["default"]


def test_without_a_merge_of_its_own_it_is_unloaded_only(model):
    y = model(X)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="LoraLSTM does not say how it is merged"):
            merge()
        torch.testing.assert_close(model(X), y)
    base = model.unload()
    assert type(base.lstm) is nn.LSTM and torch.equal(base(X), Net()(X))


def test_its_own_merge_is_used():
    base = Net()
    model = get_peft_model(Net(), settings("head", LoraDense, rank_pattern={"head": 3}))
    y, layer = model(X), model.base_model.model.head
    assert layer.r == {"default": 3} and layer.lora_A["default"].weight.shape == (3, 8)
    model.merge_adapter()
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(model(X), y)
    with pytest.raises(ValueError, match="merged in a LoraDense"):
        layer.delete_adapter("default")
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base(X))
    torch.testing.assert_close(model(X), y)
    merged = model.merge_and_unload()
    assert type(merged.head) is nn.Linear
    torch.testing.assert_close(merged(X), y)


def test_mixed_batches_reach_it_as_an_argument(model):
    with pytest.raises(TypeError, match="adapter_names"):  # as its forward has no such
        model.eval()(X, adapter_names=["default", "b"])


def test_a_subclass_of_the_library_s_own_layer_stays_one():
    model = get_peft_model(Net(), settings("head", Doubled))
    layer = model.base_model.model.head
    assert type(layer) is Doubled and "lora.Doubled(" in str(layer)
    plain = get_peft_model(Net(), LoraConfig(target_modules=["head"], r=2))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(X), 2 * plain(X))


def test_a_class_that_is_no_layer_is_refused():
    net = Net()
    with pytest.raises(TypeError, match="Sequential, registered for Linear, is no tuner layer"):
        get_peft_model(net, settings("head", nn.Sequential))
    assert type(net.head) is nn.Linear


def test_one_layer_alone_gets_a_further_adapter_and_one_anew():
    layer = Linear(nn.Linear(6, 4), "a", LoraConfig(init_lora_weights=False), r=2, lora_alpha=2)
    layer.update_layer("b", 3, lora_alpha=6, config=LoraConfig(use_rslora=True))
    assert layer.r == {"a": 2, "b": 3} and layer.scaling["b"] == 6 / 3**0.5 and layer.active_adapters == ["a"]
    assert layer.lora_A["a"].weight.requires_grad and not layer.lora_A["b"].weight.requires_grad
    layer.update_layer("a", r=1, lora_alpha=1)
    x = torch.randn(2, 6)
    assert layer.lora_A["a"].weight.shape == (1, 6) and layer.lora_A["a"].weight.requires_grad
    torch.testing.assert_close(layer(x), layer.base_layer(x))  # B starts at zero


@dataclass
class GainConfig(PeftConfig):
    target_modules: list[str] | None = None
    start: float = 1.0


class GainLayer(BaseTunerLayer):
    adapter_layer_names = ("gain_v",)

    def __init__(self, base_layer, **kwargs):
        self.base_layer, self.out_features = base_layer, base_layer.normalized_shape[0]
        self.gain_v = nn.ParameterDict({})
        self._disable_adapters, self.merged_adapters = False, []

    def update_layer(self, adapter_name, start):
        self.gain_v[adapter_name] = nn.Parameter(torch.full((self.out_features,), start))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)


class Gained(nn.Module, GainLayer):
    def __init__(self, base_layer, adapter_name, start):
        super().__init__()
        GainLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, start)

    def forward(self, x):
        y = self.base_layer(x)
        for name in self.active_adapters if not self.disable_adapters else ():
            y = y * self.gain_v[name] if name in self.gain_v else y
        return y


class GainModel(BaseTuner):
    prefix, tuner_layer_cls, target_module_mapping = "gain_", GainLayer, {}

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(target, GainLayer):
            target.update_layer(adapter_name, config.start)
        else:
            self._replace_module(parent, target_name, Gained(target, adapter_name, config.start), target)


def test_a_tuner_of_a_program_puts_its_layers_in_place_itself():
    x, net = torch.randn(2, 6), nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    y = net(x)
    tuner = GainModel(net, GainConfig(peft_type="GAIN", target_modules=["1"], start=0.5), "a")
    assert [n for n, p in tuner.named_parameters() if p.requires_grad] == ["model.1.gain_v.a"]
    torch.testing.assert_close(tuner(x), y / 2)
    tuner.peft_config["b"] = GainConfig(peft_type="GAIN", target_modules=["1"], start=3.0)
    tuner.inject_adapter(net, "b")
    torch.testing.assert_close(tuner(x), y / 2)
    tuner.set_adapter("b")
    torch.testing.assert_close(tuner(x), 3 * y)
    assert [n for n, p in tuner.named_parameters() if p.requires_grad] == ["model.1.gain_v.b"]
    tuner.set_adapter(["a", "b"])
    torch.testing.assert_close(tuner(x), 1.5 * y)
    assert [*get_peft_model_state_dict(tuner, adapter_name="b")] == ["model.1.gain_v"]
    tuner.disable_adapter_layers()
    torch.testing.assert_close(tuner(x), y)
    tuner.enable_adapter_layers()
    tuner.delete_adapter("a")
    torch.testing.assert_close(tuner(x), 3 * y)
    with pytest.raises(NotImplementedError, match="Gained does not say how it is merged"):
        tuner.merge_and_unload()
    assert type(tuner.unload()[1]) is nn.LayerNorm


def test_what_a_tuner_of_a_program_raises_leaves_the_model_as_it_was():
    class Failing(GainModel):
        def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs):
            if current_key == "1":
                raise KeyError("too late")
            super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key)

    net = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    with pytest.raises(KeyError, match="too late"):
        Failing(net, GainConfig(peft_type="GAIN", target_modules=["0", "1"]), "a")
    assert [type(m) for m in net] == [nn.LayerNorm, nn.LayerNorm] and net[0].weight.requires_grad


def test_such_a_class_may_be_the_first_thing_that_is_made():
    code = (
        "from torch import nn; from peft.tuners.tuners_utils import BaseTunerLayer\n"
        "class L(nn.Module, BaseTunerLayer):\n    pass\n"
        "print(L.by_hand, L.__mro__[-2].__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "Module"]


class Making(LoraModel):
    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        if isinstance(target, nn.Linear):
            return Doubled(target, adapter_name, config=lora_config, **kwargs)
        if isinstance(target, nn.LSTM):
            return LoraLSTM(target, adapter_name, lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)


class Deep(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(5, 5, 1)

    def forward(self, x):
        return super().forward(self.conv(x))


def test_a_tuner_whose_making_of_layers_a_program_stands_in_for():
    config = LoraConfig(r=2, target_modules=["lstm", "head", "conv"], rank_pattern={"head": 3}, init_lora_weights=False)
    tuner = Making(Deep(), config, "default")
    kinds = {name: type(tuner.model.get_submodule(name)).__name__ for name in ("lstm", "head", "conv")}
    assert kinds == {"lstm": "LoraLSTM", "head": "Doubled", "conv": "Conv1d"}
    assert tuner.model.head.r == {"default": 3} and isinstance(tuner.model.conv, LoraLayer)
    tuner(X).sum().backward()
    assert all(p.grad is not None for p in tuner.parameters() if p.requires_grad)
    y = tuner(X)
    tuner.model.head.set_scale("default", 0)
    assert not torch.allclose(tuner(X), y)


def test_a_function_put_in_place_of_the_making_of_layers_is_called(monkeypatch):
    first, asked = LoraModel._create_new_module, []

    def make(lora_config, adapter_name, target, **kwargs):
        asked.append(kwargs["target_name"])
        return first(lora_config, adapter_name, target, **kwargs)

    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    plain = get_peft_model(copy.deepcopy(net), config)
    monkeypatch.setattr(LoraModel, "_create_new_module", staticmethod(make))
    model = get_peft_model(copy.deepcopy(net), config)
    assert asked == ["0", "1"] and str(model) == str(plain)
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.merge_and_unload()(x), plain(x))


def test_what_a_program_makes_must_be_a_layer():
    class Wrong(LoraModel):
        @staticmethod
        def _create_new_module(lora_config, adapter_name, target, **kwargs):
            return nn.Identity()

    net = Net()
    with pytest.raises(TypeError, match="gave a Identity for 'head', which is no tuner layer"):
        Wrong(net, LoraConfig(target_modules=["head"]), "default")
    assert type(net.head) is nn.Linear


@pytest.mark.parametrize("calls_first", [False, True])
def test_a_function_put_in_place_of_the_first_values_gives_them(monkeypatch, calls_first):
    first, asked = LoraLayer.reset_lora_parameters, []

    def reset(self, adapter_name, init_lora_weights):
        asked.append((adapter_name, init_lora_weights))
        if calls_first:
            first(self, adapter_name, init_lora_weights)
        nn.init.constant_(self.lora_A[adapter_name].weight, 0.5)

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", reset)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LoraConfig(target_modules=["0", "1"]))
    assert asked == [("default", True)] * 2
    for layer in model.base_model.model:
        assert (layer.lora_A["default"].weight == 0.5).all() and (layer.lora_B["default"].weight == 0).all()


class Tripled(Linear):
    """An update that is three times what the factors say, in the forward and where it is merged."""

    def forward(self, x):
        return self.base_layer(x) + x @ self.get_delta_weight("default").mT

    def get_delta_weight(self, adapter):
        return 3 * super().get_delta_weight(adapter)


@pytest.mark.parametrize("merge", ["adapter", "and_unload"])
def test_a_layer_that_says_its_own_update_is_merged_by_it(merge):
    base = Net()
    model = get_peft_model(Net(), settings("head", Tripled))
    y = model(X)
    assert not torch.allclose(y, base(X), atol=1e-2)
    if merge == "and_unload":
        torch.testing.assert_close(model.merge_and_unload()(X), y)
        return
    model.merge_adapter()
    layer = model.base_model.model.head
    torch.testing.assert_close(layer.base_layer(model.lstm(X)[0][:, -1]), y)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, base.head.weight)


def test_a_merge_of_a_layer_s_own_is_called_for_good_too():
    class Counted(Linear):
        merges = 0

        def merge(self, *args, **kwargs):
            Counted.merges += 1
            super().merge(*args, **kwargs)

    model = get_peft_model(Net(), settings("head", Counted))
    y = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), y)
    assert Counted.merges == 1


@pytest.mark.parametrize("make", [lambda: nn.Conv1d(2, 3, 1), lambda: nn.Bilinear(4, 4, 3)], ids=["conv", "bilinear"])
def test_a_class_over_any_module_gets_factors_of_its_own_sizes(make):
    class Sized(nn.Module, LoraLayer):
        def __init__(self, base_layer, adapter_name, config=None, r=0, lora_alpha=1, **kwargs):
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self.in_features, self.out_features = 2, 3
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha, config)

    base = make()
    config = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5)
    config._register_custom_module({type(base): Sized})
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert (A.in_features, A.out_features, B.out_features) == (2, 2, 3) and A.weight.requires_grad
    assert layer.lora_dropout["default"].p == 0.5 and layer.scaling == {"default": 4.0} and not B.weight.any()
