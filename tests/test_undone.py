"""A change that fails anywhere on its way leaves the model as it was; errors are of the classes that clients catch."""

import json
import os
import signal
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import peft
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.core import onestep
from peft.core.deferred import Deferred
from peft.core.layer import tuner_layers
from peft.optimizers import create_loraplus_optimizer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

HERE = os.path.dirname(peft.__file__)
X = torch.linspace(-1, 1, 12).view(2, 6)


class Fault(Exception):
    """Raised where no code expects it."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def config(**settings):
    settings = {"r": 2, "target_modules": ["one", "two"], "init_lora_weights": False, **settings}
    return LoraConfig(**settings)


@pytest.fixture(autouse=True)
def with_gradients():
    """A fault that keeps a context from being left may leave torch without gradients: not for the tests that follow."""
    yield
    torch.set_grad_enabled(True)


def adapted(merged=False):
    model = get_peft_model(net(), config(modules_to_save=["head"]))
    model.add_adapter("other", config(r=3, target_modules=["one"], use_dora=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(0.25)
    if merged:
        model.merge_adapter(["default"])
    return model


def beside_vectors():
    """An adapter whose tensors lie in tables of parameters and of buffers that files lack."""
    model = get_peft_model(net(), config(target_modules=["one"]))
    model.add_adapter("other", VeraConfig(r=2, target_modules=["one", "two"], save_projection=False))
    return model


def state(model):
    """All that a model shows of itself, the objects among it."""
    shown = dict.fromkeys(f"{key} in a file" for key in model.state_dict())
    for path, m in model.named_modules():
        shown[path] = type(m).__name__, id(m), m.training, list(m._modules), list(m._parameters), len(m._forward_hooks)
    for path, p in model.named_parameters(remove_duplicate=False):
        shown[f"{path} "] = id(p), p.requires_grad, p.dtype, p.detach().tolist()
    for path, layer in tuner_layers(model):
        shown[f"{path}  "] = layer.active_adapters, list(layer.merged_adapters), layer.disable_adapters
    if isinstance(model, PeftModel):
        shown["names"] = list(model.peft_config), model.active_adapters
    training = [m for m in model.modules() if m.training]
    with torch.no_grad():
        shown["answer"] = model.eval()(X).tolist()
    for m in training:
        m.training = True
    return shown


def steps(act, events=("call", "c_call")):
    """How many calls the library makes on the way."""
    count = 0

    def look(frame, event, arg):
        nonlocal count
        count += event in events and frame.f_code.co_filename.startswith(HERE)

    sys.setprofile(look)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def fail_at(step, act, events=("call", "c_call")):
    """Have the call of that number raise; whether that came through."""
    count = 0

    def look(frame, event, arg):
        nonlocal count
        if event in events and frame.f_code.co_filename.startswith(HERE):
            count += 1
            if count == step:
                sys.setprofile(None)
                raise Fault

    sys.setprofile(look)
    try:
        act()
    except Fault:
        return True
    finally:
        sys.setprofile(None)
    return False


def doubled(model):
    return {key: value * 2 for key, value in get_peft_model_state_dict(model).items()}


CHANGES = {
    "wrapping": (net, lambda m, d: get_peft_model(m, config(modules_to_save=["head"]))),
    "injecting": (net, lambda m, d: inject_adapter_in_model(config(), m)),
    "from_pretrained": (net, lambda m, d: PeftModel.from_pretrained(m, d)),
    "adding": (adapted, lambda m, d: m.add_adapter("new", config(r=4))),
    "loading": (adapted, lambda m, d: m.load_adapter(d, "new")),
    "loading over": (adapted, lambda m, d: m.load_adapter(d, "default")),
    "writing": (adapted, lambda m, d: set_peft_model_state_dict(m, doubled(m))),
    "merging": (adapted, lambda m, d: m.merge_adapter()),
    "unmerging": (partial(adapted, merged=True), lambda m, d: m.unmerge_adapter()),
    "deleting": (adapted, lambda m, d: m.delete_adapter("default")),
    "deleting another": (adapted, lambda m, d: m.delete_adapter("other")),
    "deleting vectors": (beside_vectors, lambda m, d: m.delete_adapter("other")),
    "switching": (adapted, lambda m, d: m.set_adapter("other")),
    "switching a merged one": (partial(adapted, merged=True), lambda m, d: m.set_adapter("other")),
    "training": (adapted, lambda m, d: m.set_requires_grad("other")),
    "disabling": (adapted, lambda m, d: m.base_model.disable_adapter_layers()),
    "disabling a merged one": (partial(adapted, merged=True), lambda m, d: m.base_model.disable_adapter_layers()),
    "unloading": (adapted, lambda m, d: m.unload()),
    "making room": (adapted, lambda m, d: prepare_model_for_compiled_hotswap(m, target_rank=4)),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a generator that is left
@pytest.mark.parametrize(
    ("change", "at_once"),  # once a program has been traced, layers follow switches at once
    [*((change, False) for change in CHANGES), *((change, True) for change in CHANGES if change.startswith("switch"))],
)
def test_a_change_that_fails_anywhere_leaves_the_model_as_it_was(change, at_once, tmp_path, monkeypatch):
    make, act = CHANGES[change]
    monkeypatch.setattr(Deferred, "at_once", at_once)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = get_peft_model(net(), config(modules_to_save=["head"]))
        saved.save_pretrained(tmp_path)
        done = make()
        act(done, tmp_path)  # what is done once is no step of those that follow
        there = done.state_dict().keys()
        last = min(steps(partial(act, make(), tmp_path)) for _ in range(2))  # the second time may still be longer
        came = 0
        for step in range(1, last - last // 20, max(last // 40, 1)):  # at the very end all is done
            model = make()
            before = state(model)
            if fail_at(step, partial(act, model, tmp_path)):
                came += 1
                assert state(model) == before, f"{change}: the {step}th of {last} calls fails"
                act(model, tmp_path)  # and it can be done afterwards
                assert model.state_dict().keys() == there
        assert came > 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a generator that is left
@pytest.mark.parametrize("change", ["adding", "merging"])
def test_a_change_that_is_interrupted_after_any_call_leaves_the_model_as_it_was(change, tmp_path):
    make, act = CHANGES[change]
    act(make(), tmp_path)
    last = steps(partial(act, make(), tmp_path), events=("return",))
    for step in range(1, last - last // 10, max(last // 400, 1)):
        model = make()
        before = state(model)
        if fail_at(step, partial(act, model, tmp_path), events=("return",)):
            assert state(model) == before, f"{change}: after the {step}th of {last} calls"


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_interrupted_merge_for_good_ends_its_layer_and_can_go_on(settings, monkeypatch):
    model = get_peft_model(net(), config(**settings)).eval()
    wanted = model(X)
    write, at = onestep._write, []

    def written(*given):
        at.append(signal.raise_signal(signal.SIGINT) if not at else None)  # W' stands, and the layer does not know it
        write(*given)

    monkeypatch.setattr(onestep, "_write", written)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.merge_and_unload()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [layer.merged for _, layer in tuner_layers(model)] == [True, False]
    torch.testing.assert_close(model(X), wanted)
    torch.testing.assert_close(model.merge_and_unload()(X), wanted)


def test_training_mode_comes_back_if_a_module_refuses_evaluation(tmp_path):
    class Stubborn(nn.Tanh):
        def train(self, mode=True):
            if not mode:
                raise Fault
            return super().train(mode)

    get_peft_model(net(), config()).save_pretrained(tmp_path)
    model = get_peft_model(net(), config())
    model.base_model.model.act = Stubborn()
    with pytest.raises(Fault):
        model.load_adapter(tmp_path, "new")
    assert "new" not in model.peft_config
    assert all(m.training for m in model.modules())


def test_a_peft_model_can_be_wrapped_again(tmp_path):
    inner = get_peft_model(net(), config())
    answer = inner(X)
    with pytest.warns(UserWarning, match="adapter layers already"):
        outer = get_peft_model(inner, config(target_modules=["head"]), adapter_name="two")
    assert list(outer.peft_config) == list(inner.peft_config) == ["default", "two"]
    assert outer.active_adapters == ["two"]
    both = outer(X)
    outer.save_pretrained(tmp_path, selected_adapters=["two"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(get_peft_model(net(), config()), tmp_path / "two", adapter_name="two")
    assert torch.equal(again(X), both)
    with pytest.warns(UserWarning, match="is deleted"):
        outer.delete_adapter("two")
    assert torch.equal(outer(X), answer)
    plain = outer.merge_and_unload()
    assert type(plain) is Net and not list(tuner_layers(plain))
    assert torch.allclose(plain(X), answer, atol=1e-6)


def test_configurations_can_be_put_in_place():
    model = get_peft_model(net(), config())
    model.peft_config = {**model.peft_config}
    model.add_adapter("two", config())
    assert list(model.base_model.peft_config) == ["default", "two"]


def decoder():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))


def prompted():
    return get_peft_model(decoder(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))


def test_a_load_that_fails_takes_the_hooks_of_checkpointing_back(tmp_path):
    settings = {"target_modules": ["q_proj"], "task_type": TaskType.CAUSAL_LM}
    get_peft_model(decoder(), config(**settings)).save_pretrained(tmp_path)
    other = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**other, "r": 5}))
    model = decoder()
    model.gradient_checkpointing_enable()
    embedding = model.get_input_embeddings()
    attributes, hooks = set(vars(model)), len(embedding._forward_hooks)
    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(model, tmp_path)
    assert set(vars(model)) == attributes and len(embedding._forward_hooks) == hooks
    assert not list(tuner_layers(model)) and all(p.requires_grad for p in model.parameters())
    get_peft_model(model, config(**settings))
    assert len(embedding._forward_hooks) == hooks + 1


def test_a_prompt_has_nothing_that_could_be_merged():
    model = prompted()
    assert not hasattr(model, "merge_and_unload") and not hasattr(model, "merge_adapter")
    with pytest.raises((NotImplementedError, AttributeError), match="changes no weight"):
        model.merge_and_unload()


def broken(folder, text):
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder


REFUSED = {
    "state of no adapter": (lambda d: get_peft_model_state_dict(adapted(), adapter_name="defalt"), KeyError),
    "state for no adapter": (lambda d: set_peft_model_state_dict(adapted(), {}, adapter_name="zz"), KeyError),
    "update of no adapter": (lambda d: adapted().base_model.model.one.get_delta_weight("zz"), KeyError),
    "prompt of no adapter": (lambda d: prompted().get_prompt_embedding_to_save("zz"), KeyError),
    "no method": (lambda d: peft.get_peft_config({"peft_type": "LORRA"}), KeyError),
    "nothing of a method": (lambda d: peft.get_peft_config({}), KeyError),
    "no task": (lambda d: get_peft_model(decoder(), PromptTuningConfig(num_virtual_tokens=2)), KeyError),
    "no name": (lambda d: adapted().set_adapter(None), ValueError),
    "a list": (lambda d: adapted().set_adapter(["default"]), TypeError),
    "letters": (lambda d: adapted().save_pretrained(d, selected_adapters="default"), ValueError),
    "letters for samples": (lambda d: adapted().eval()(X, adapter_names="default"), ValueError),
    "no adapters": (lambda d: peft.convert_to_lora(net(), 2), TypeError),
    "no JSON": (lambda d: PeftModel.from_pretrained(net(), broken(d, "{")), json.JSONDecodeError),
    "no kind": (lambda d: PeftModel.from_pretrained(net(), broken(d, "{}")), KeyError),
    "no pattern": (lambda d: get_peft_model(net(), config(target_modules="one(")), peft.errors.PatternError),
    "rate": (lambda d: create_loraplus_optimizer(adapted(), torch.optim.SGD, lr=-1, loraplus_lr_ratio=2), ValueError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_caught_as_those_of_the_other_library(case, tmp_path):
    act, kind = REFUSED[case]
    with pytest.raises(kind) as error:
        act(tmp_path)
    text = str(error.value)
    assert (len(text) > 20 and not text.startswith(("'", '"'))) or "'" in text[1:-1]


def test_the_name_that_was_meant_is_told():
    words = r"There is no adapter 'defalt'\. Did you mean 'default'\? The model has 'default', 'other'\."
    with pytest.raises(ValueError, match=words):
        adapted().set_adapter("defalt")
    with pytest.raises(ValueError, match=words):
        adapted().delete_adapter("defalt")
