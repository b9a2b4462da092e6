"""A second adapter like the first is placed by what the first has taught, and is as if it had been placed anew."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn

from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.core.deferred import Deferred
from peft.core.mold import Mold
from peft.core.place import Injection
from peft.core.recall import Recipes, Standing
from peft.core.stack import NOTED
from peft.core.tuner import BaseTuner
from peft.errors import (
    ChangedConfigWarning,
    MissingTensorsWarning,
    OtherBaseWarning,
    PeftWarning,
    UnexpectedTensorsWarning,
    UnmatchedTargetWarning,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 24).view(4, 6)


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 8), nn.Linear(8, width), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def base(blocks=2, width=6, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(blocks))).to(dtype).eval()


def save(folder, seed=1, blocks=2, width=6, dtype=torch.float32, edit=None, **changes):
    settings = {"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False, **changes}
    model = get_peft_model(base(blocks, width, dtype), LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.normal_()
    model.save_pretrained(folder)
    if edit:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **edit}))
    return folder


@pytest.fixture
def injections(monkeypatch):
    """How often adapters have been placed the ordinary way."""
    count, real = [], Injection.run
    monkeypatch.setattr(Injection, "run", lambda self, *a: count.append(self.name) or real(self, *a))
    return count


def facts(model):
    """All that can be seen of a model's adapters."""
    kinds = {n: (type(m).__name__, m.training) for n, m in model.named_modules()}
    state = {n: (t.dtype, t.requires_grad, t.shape) for n, t in model.named_parameters()}
    configs = {n: c.to_dict() for n, c in model.peft_config.items()}
    plain = {}
    for n, m in model.named_modules():
        for p in getattr(m, "adapters", {}).values():
            own = {k: v for k, v in vars(p).items() if k not in NOTED and type(v) in (int, float, str, bool, tuple)}
            like = p.settings is model.peft_config[p.name], p.settings.to_dict()
            plain[n, p.name] = own, p.layer is m, p.shared, p.cache, like
    return kinds, list(kinds), state, configs, plain, list(model.state_dict()), model.get_model_status()


def answers(model, name):
    model.set_adapter(name)
    model.zero_grad()
    torch.manual_seed(0)
    y = model(X.to(next(model.parameters()).dtype))
    y.float().pow(2).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.adapter_parameters(name).values())]


CASES = {
    "plain": ({}, {}),
    "ranks": ({"rank_pattern": {"0.up": 3}, "alpha_pattern": {"down": 5}}, {}),
    "rsLoRA": ({"use_rslora": True}, {}),
    "dropout": ({"lora_dropout": 0.5}, {}),
    "trained with dropout": ({"lora_dropout": 0.5}, {"is_trainable": True}),
    "trainable": ({}, {"is_trainable": True}),
    "without memory first": ({}, {"low_cpu_mem_usage": True}),
    "a device": ({}, {"torch_device": "cpu"}),
    "beside bfloat16": ({"dtype": torch.bfloat16}, {}),
    "in bfloat16": ({"dtype": torch.bfloat16}, {"autocast_adapter_dtype": False}),
}


@pytest.fixture
def no_garbage():
    """What other tests have left is not collected, and finalised, meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=["waiting", "at once"])
def follow(request, monkeypatch):
    """Layers follow a switch when they run, or at once, as they do when a program has been traced."""
    monkeypatch.setattr(Deferred, "at_once", request.param == "at once")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("follow")
def test_it_is_as_if_it_had_been_placed_anew(tmp_path, injections, case, training):
    settings, options = CASES[case]
    dtype = settings.get("dtype", torch.float32)
    folders = [save(tmp_path / str(i), i, **settings) for i in range(3)]
    autocast = options.get("autocast_adapter_dtype", True)
    models = [PeftModel.from_pretrained(base(dtype=dtype), folders[0], autocast_adapter_dtype=autocast) for _ in "ab"]
    for forget, model in zip((False, True), models, strict=True):
        injections.clear()
        for name, folder in zip("bc", folders[1:], strict=True):
            model.train(training)
            if forget:
                Recipes.of(model.base_model).clear()
            assert not any(map(any, model.load_adapter(folder, name, **options)))
        assert injections == ["b", "c"][: 2 if forget else int(bool(options.get("is_trainable")))]
    one, two = models
    assert facts(one) == facts(two)
    for name in ("c", "b", "default"):
        assert all(map(torch.equal, answers(one, name), answers(two, name)))
    one.delete_adapter("b"), two.delete_adapter("b")
    assert facts(one) == facts(two)
    assert all(map(torch.equal, answers(one, "c"), answers(two, "c")))


def loaded(tmp_path, **settings):
    save(tmp_path / "a", 1, **settings), save(tmp_path / "b", 2, **settings)
    return PeftModel.from_pretrained(base(**{k: v for k, v in settings.items() if k == "dtype"}), tmp_path / "a")


@pytest.mark.usefixtures("follow")
def test_a_load_costs_the_same_however_many_there_are(tmp_path, no_garbage):
    model, calls = loaded(tmp_path), []

    def count(frame, event, arg):
        calls[-1] += event in ("call", "c_call")

    for i in range(12):
        calls.append(0)
        sys.setprofile(count)
        model.load_adapter(tmp_path / "b", f"n{i}")
        sys.setprofile(None)
    assert max(calls[2:]) == min(calls[2:]) < 600


def changed_module(model):
    model.base_model.model[0].norm = nn.LayerNorm(6)


def new_block(model):
    model.base_model.model.append(Block())


def other_layer(model):
    model.base_model.model[1].up = nn.Linear(6, 8)


def other_dtype(model):
    model.base_model.model.to(torch.bfloat16)


def tied(model):
    first, second = model.base_model.model[0], model.base_model.model[1]
    second.up.base_layer.weight = first.up.base_layer.weight


def program(model):
    model.base_model._create_and_replace = type(model.base_model)._create_and_replace.__get__(model.base_model)


def other_weights(model):
    model.base_model.model[0].up.base_layer.weight = nn.Parameter(torch.zeros(8, 6))


def one_dtype(model):
    base = model.base_model.model[0].up.base_layer
    base.weight.data = base.weight.data.double()


def kept_elsewhere(model):
    model.base_model.model[0].up.base_layer._hf_hook = None


def other_class(model):
    model.base_model.model[1].down.base_layer.__class__ = type("Own", (nn.Linear,), {})


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(
    "change",
    [
        *(changed_module, new_block, other_layer, other_dtype, tied, program, other_weights, one_dtype),
        *(kept_elsewhere, other_class),
    ],
    ids=lambda f: f.__name__,
)
def test_a_model_that_is_another_now_is_looked_at_again(tmp_path, injections, change, before):
    model = loaded(tmp_path)
    for i in range(before):
        model.load_adapter(tmp_path / "b", f"before{i}")
    change(model)
    injections.clear()
    with torch.random.fork_rng():
        model.load_adapter(tmp_path / "b", "b") if change is not new_block else None
    if change is new_block:
        with pytest.warns(MissingTensorsWarning), pytest.warns(OtherBaseWarning):
            model.load_adapter(tmp_path / "b", "b")
    assert set(injections) == {"b"}
    if change is other_dtype:
        assert {p.dtype for p in model.adapter_parameters("b").values()} == {torch.float32}


def test_a_model_is_looked_at_one_by_one_only_where_something_has_changed(tmp_path, monkeypatch, injections):
    model, looks, real = loaded(tmp_path), [], Standing.holds
    monkeypatch.setattr(Standing, "holds", lambda self: looks.append(1) or real(self))
    injections.clear()
    model.load_adapter(tmp_path / "b", "b"), model.load_adapter(tmp_path / "b", "c")
    assert len(looks) == 1
    model.delete_adapter("b"), model.set_adapter("c"), model.load_adapter(tmp_path / "b", "b")
    assert len(looks) == 1 and not injections
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["up"]))
    injections.clear()
    model.load_adapter(tmp_path / "b", "e"), model.load_adapter(tmp_path / "b", "f")
    assert len(looks) == 2 and not injections


@pytest.mark.parametrize("step", ["before_layers", "match", "plan_of"])
def test_a_class_in_which_a_program_has_its_own_step_is_asked(tmp_path, injections, monkeypatch, step):
    model, real = loaded(tmp_path), vars(BaseTuner)[step]
    model.load_adapter(tmp_path / "b", "b")
    injections.clear()
    function = getattr(real, "__func__", real)

    def own(*args, **kwargs):
        return function(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(model.base_model), step, own if function is real else classmethod(own))
        model.load_adapter(tmp_path / "b", "c")
    assert injections == ["c"]
    model.load_adapter(tmp_path / "b", "d")
    assert injections == ["c"]


def test_parameters_are_parameters_of_their_own(tmp_path, injections):
    model = loaded(tmp_path)
    model.load_adapter(tmp_path / "b", "b"), model.load_adapter(tmp_path / "b", "c")
    assert set(injections) == {"default"}
    parameters = [q for name in "bc" for q in model.adapter_parameters(name).values()]
    assert len({q.data_ptr() for q in parameters}) == len(parameters) == 16
    for q in parameters:
        assert type(q) is nn.Parameter and q.is_leaf and not q.requires_grad and q._version == 0 and not q._is_view()
        assert q.untyped_storage().nbytes() == q.nbytes and q.data_ptr() % 8 == 0
        copied = copy.deepcopy(q)
        assert type(copied) is nn.Parameter and torch.equal(copied, pickle.loads(pickle.dumps(q)))


def test_other_settings_and_other_shapes_are_placed_anew(tmp_path, injections):
    save(tmp_path / "alpha", 3, lora_alpha=3), save(tmp_path / "rank", 4, r=4)
    save(tmp_path / "layer", 5, target_modules=["up"])
    model = loaded(tmp_path)
    injections.clear()
    for name in ("alpha", "rank", "layer"):
        model.load_adapter(tmp_path / name, name)
        model.load_adapter(tmp_path / name, name + "2")
        assert all(map(torch.equal, answers(model, name), answers(model, name + "2")))
    assert injections == ["alpha", "rank", "layer"]


@pytest.mark.usefixtures("follow")
def test_settings_that_are_changed_later_are_the_adapters_own(tmp_path, injections):
    model = loaded(tmp_path)
    injections.clear()
    layer = model.base_model.model[0].up
    layer.set_scale("default", 7)
    model.load_adapter(tmp_path / "b", "b")
    model.peft_config["b"].target_modules.add("x")
    model.load_adapter(tmp_path / "b", "c")
    assert not injections and layer.scaling["b"] == layer.scaling["c"] == 4
    assert model.peft_config["c"].target_modules == {"up", "down"}


# Nothing becomes silent ----------------------------------------------------------------------------------------------


def nan(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-4:] = b"\x00\x00\xc0\x7f"
    start = raw.index(b'"checksum":"') + 1
    raw[start : start + 8] = b"checkson"
    (folder / WEIGHTS).write_bytes(raw)


def dropped(folder, add=None):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / WEIGHTS)
    key = next(iter(state))
    state = {**{k: v for k, v in state.items() if k != key or add}, **({add: state[key].clone()} if add else {})}
    save_file(state, folder / WEIGHTS)


SAID = {
    "other base": (
        OtherBaseWarning,
        {"width": 6, "blocks": 3, "target_modules": ["0.up", "0.down", "1.up", "1.down"]},
        None,
    ),
    "edited": (ChangedConfigWarning, {"edit": {"lora_alpha": 16}}, None),
    "unmatched": (UnmatchedTargetWarning, {"edit": {"target_modules": ["up", "down", "sideways"]}}, None),
    "not a number": (PeftWarning, {}, nan),
    "missing": (MissingTensorsWarning, {}, dropped),
    "unexpected": (UnexpectedTensorsWarning, {}, lambda folder: dropped(folder, "base_model.model.7.up.lora_A.weight")),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_doubtful_is_said_each_time(tmp_path, case):
    category, settings, damage = SAID[case]
    first = {"target_modules": settings["target_modules"]} if "target_modules" in settings else {}
    model = loaded(tmp_path, **first)
    model.load_adapter(tmp_path / "b", "b")
    folder = save(tmp_path / "c", 3, **settings)
    if damage:
        damage(folder)
    for name in "cd":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.load_adapter(folder, name)
        assert category in {w.category for w in caught}


def test_errors_leave_the_model_as_it_was(tmp_path):
    model = loaded(tmp_path)
    model.load_adapter(tmp_path / "b", "b")
    folder = save(tmp_path / "c", 3)
    facts(model)  # modules that do nothing are made when somebody looks
    before = facts(model)
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        model.load_adapter(folder, "c")
    assert facts(model) == before
    for name in ("c.d", "", "keys", 3):
        with pytest.raises((ValueError, TypeError)):
            model.load_adapter(tmp_path / "b", name)
        assert facts(model) == before
    with pytest.raises(ValueError, match="already"):
        model.base_model.model[0].up.adapters["c"] = model.base_model.model[0].up.adapters["b"]
        model.load_adapter(tmp_path / "b", "c")
    del model.base_model.model[0].up.adapters["c"]
    assert facts(model) == before
    model.load_adapter(tmp_path / "b", "c")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_the_model_has_layers_of_its_own(tmp_path, copied):
    model = loaded(tmp_path)
    model.load_adapter(tmp_path / "b", "b")
    other = copied(model)
    other.load_adapter(tmp_path / "b", "c")
    assert "c" not in model.peft_config and not any(".c." in name for name in model.state_dict())
    assert all(map(torch.equal, answers(other, "c"), answers(model, "b")))


def test_a_cast_with_dropout_is_like_a_layer_made_in_full(monkeypatch):
    models = []
    for cast in (True, False):
        if not cast:
            monkeypatch.setattr(Mold, "of", classmethod(lambda cls, *args: None))
        model = get_peft_model(
            base(), LoraConfig(r=2, lora_dropout=0.3, target_modules=["up"], init_lora_weights=False)
        )
        model.add_adapter("b", LoraConfig(r=2, lora_dropout=0.1, target_modules=["up"]))
        models.append(model)
    one, two = models
    two.load_state_dict(one.state_dict())
    for training in (True, False):
        one.train(training), two.train(training)
        dropouts = [[(n, m.p, m.training) for n, m in x.named_modules() if type(m) is nn.Dropout] for x in models]
        assert len(dropouts[0]) == 4 and dropouts[0] == dropouts[1] and facts(one) == facts(two)
        assert all(map(torch.equal, answers(one, "default"), answers(two, "default")))


def test_of_patterns_the_first_that_matches_counts_after_a_file_too(tmp_path):
    """Files keep their order, and adapters whose patterns have another order are other adapters."""
    one, other = {"up": 2, ".*": 9}, {".*": 9, "up": 2}
    save(tmp_path / "one", alpha_pattern=one, lora_alpha=1)
    save(tmp_path / "other", alpha_pattern=other, lora_alpha=1)
    assert list(json.loads((tmp_path / "one" / CONFIG).read_text())["alpha_pattern"]) == ["up", ".*"]
    model = PeftModel.from_pretrained(base(), tmp_path / "one", "a")
    for name, folder in (("b", "one"), ("c", "other"), ("d", "other"), ("e", "one")):
        model.load_adapter(tmp_path / folder, name)
    layer = model.base_model.model[0].up
    assert dict(layer.scaling) == {"a": 1.0, "b": 1.0, "c": 4.5, "d": 4.5, "e": 1.0}
    with pytest.warns(ChangedConfigWarning, match="alpha_pattern"):
        model.load_adapter(tmp_path / "other", "a")
