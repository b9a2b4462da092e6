"""The shortest way of a forward with a prompt gives what the long one does, and sees whatever changes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
from benchmarks.measure import calls
from peft.prompts.encoder import MADE
from peft.prompts.holder import Prompts
from test_prompts import CONFIGS, IN_FRONT, config, llama, made, tasks, text

MOST = {"p-tuning": 110, "p-tuning-lstm": 190, "prefix": 175, "prefix-projection": 205}  # 70 in the others


def logits(model: Any, name: str, batch: int = 2, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**text(batch), **tasks(name, batch), **more).logits


def long_way(model: Any, name: str, batch: int = 2) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prompts, "straight", lambda *args: None)
        return logits(copy.deepcopy(model), name, batch)


def encoder(model: Any) -> Any:
    return model.prompt_encoder["default"]


def takes_it(model: Any, name: str, **more: Any) -> bool:
    return model.prompts.straight({**text(), **tasks(name), **more}) is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("name", IN_FRONT)
def test_it_gives_the_same_bits_with_what_is_kept_and_without(name, base, batch, mode):
    model = made(name, base)
    wanted = long_way(model, name, batch)
    for masked in (True, True, False):
        given = {**text(batch), **tasks(name, batch)}
        if not masked:
            del given["attention_mask"]
        with mode():
            assert model.prompts.straight(given) is not None
            found = model(**given).logits
        assert torch.equal(found, wanted)
    assert MADE in encoder(model).__dict__ and torch.equal(logits(model, name, batch), wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_enters_few_functions_beyond_the_bare_models(name):
    model, ids = made(name), torch.tensor([[5]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tasks(name, 1)}
    with torch.no_grad():
        for _ in range(3):
            model(**given)
        beyond = calls(lambda: model(**given)) - calls(lambda: model.get_base_model()(ids, given["attention_mask"]))
    assert beyond <= MOST.get(name, 70)


def written(e: Any) -> None:
    with torch.no_grad():
        e.trained()[0].mul_(0.5)


def pointed(e: Any) -> None:
    e.trained()[0].data = e.trained()[0].data * 0.5


def replaced(e: Any) -> None:
    module = e.delta_embedding if hasattr(e, "delta_embedding") else e.embedding
    module.weight = nn.Parameter(module.weight.detach() * 0.5)


def other_module(e: Any) -> None:
    name = "delta_embedding" if hasattr(e, "delta_embedding") else "embedding"
    old = getattr(e, name).weight.detach()
    setattr(e, name, nn.Embedding(*old.shape, _weight=old * 0.5))


def hooked(e: Any) -> None:
    e.embedding.register_forward_hook(lambda m, args, y: y * 2)


def hooked_above(e: Any) -> None:
    e.register_forward_hook(lambda m, args, y: y * 2)


def own_forward(e: Any) -> None:
    before = e.embedding.forward
    e.embedding.forward = lambda ids: before(ids) * 2


def trained_on(e: Any) -> None:
    e.train()
    for p in e.trained():
        p.data.mul_(0.5)  # which torch does not count
    e.eval()


def stepped(e: Any) -> None:
    learnt = list(e.trained())
    for p in learnt:
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(learnt, lr=0.1, fused=True).step()  # which writes uncounted


def loaded(e: Any) -> None:
    e.load({k: v * 0.5 for k, v in e.for_file().items()})


CHANGES = [written, pointed, replaced, other_module, hooked, hooked_above, own_forward, trained_on, stepped, loaded]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", IN_FRONT)
def test_what_changes_an_encoder_is_seen(name, change):
    model = made(name)
    before = [logits(model, name) for _ in range(2)][1]
    change(encoder(model))
    for _ in range(2):
        found = logits(model, name)
        assert not torch.equal(found, before)
    if change is not own_forward:  # a copy's would be that of the first
        assert torch.equal(found, long_way(model, name))


def test_a_hook_on_all_modules_is_seen():
    model = made("p-tuning")
    before = [logits(model, "p-tuning") for _ in range(2)][1]
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m)))
    try:
        assert torch.equal(logits(model, "p-tuning"), before) and nn.ReLU in seen
    finally:
        handle.remove()


def test_settings_of_the_projection_and_kinds_of_words_are_seen():
    model = made("cpt")
    before = [logits(model, "cpt") for _ in range(2)][1]
    encoder(model).config.opt_projection_epsilon = 1e-3
    nearer = logits(model, "cpt")
    encoder(model).config.cpt_tokens_type_mask[0] = 4
    fixed = logits(model, "cpt")
    assert not torch.equal(nearer, before) and not torch.equal(fixed, nearer)
    assert torch.equal(fixed, long_way(model, "cpt"))


def test_each_batch_has_the_prompts_of_its_tasks():
    model, given = made("multitask"), text()
    for ids in ([0, 1], [1, 0], [2, 2], [0, 1]):
        with torch.no_grad():
            found = model(**given, task_ids=torch.tensor(ids)).logits
            alone = [
                model(input_ids=given["input_ids"][i : i + 1], task_ids=torch.tensor([t])) for i, t in enumerate(ids)
            ]
        torch.testing.assert_close(found, torch.cat([a.logits for a in alone]), rtol=1e-5, atol=1e-5)
    for wrong in ([0, 3], [-1, 0]):
        with torch.no_grad(), pytest.raises(ValueError, match="0 to 2"):
            model(**given, task_ids=torch.tensor(wrong))


@pytest.mark.parametrize("name", IN_FRONT)
def test_adapters_are_switched_disabled_deleted_and_joined(name):
    model = made(name)
    first = [logits(model, name) for _ in range(2)][1]
    with model.disable_adapter():
        bare = logits(model, name) if name != "multitask" else logits(model, "none")
    torch.manual_seed(3)
    model.add_adapter("b", config(name))
    written(model.prompt_encoder["b"])
    model.set_adapter("b")
    second = [logits(model.eval(), name) for _ in range(2)][1]
    assert bare.shape != first.shape
    assert torch.equal(second, long_way(model, name))
    model.set_adapter(["default", "b"])
    assert logits(model, name).shape[1] == first.shape[1] + 3
    model.delete_adapter("b")
    assert torch.equal(logits(model, name), first)


@pytest.mark.parametrize("name", IN_FRONT)
def test_training_gets_its_gradients_after_evaluation(name):
    model, given = made(name), text()
    logits(model, name)
    model(**given, labels=given["input_ids"], **tasks(name)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder(model).trained())
    assert MADE not in encoder(model).__dict__
    with torch.inference_mode():
        model(**given, **tasks(name))
    model(**given, labels=given["input_ids"], **tasks(name)).loss.backward()


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("around", [torch.enable_grad, lambda: torch.autocast("cpu"), Functions, Dispatched])
def test_it_leaves_the_rest_to_the_long_way(around):
    model = made("p-tuning")
    with torch.no_grad():
        assert takes_it(model, "p-tuning")
        with around():
            assert not takes_it(model, "p-tuning")
        ids = text()["input_ids"]
        for more in ({"labels": ids}, {"position_ids": ids}, {"adapter_names": ["default"] * 2}):
            assert not takes_it(model, "p-tuning", **more)
        assert not takes_it(model, "p-tuning", attention_mask=torch.ones(2, 1, 5, 5))


def test_a_trace_takes_the_long_way():
    model = made("prompt")
    logits(model, "prompt")
    ids = text()["input_ids"]

    with torch.no_grad():
        traced = torch.jit.trace(Straight(model), (ids,), check_trace=False)
    assert torch.equal(traced(ids), ids)


class Straight(nn.Module):
    """One more where the shortest way is taken."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.clone() if self.model.prompts.straight({"input_ids": ids}) is None else ids + 1


def test_a_subclass_of_an_encoder_is_asked_each_time():
    model = made("prompt")
    count = []

    class Own(type(encoder(model))):
        def forward(self, indices):
            count.append(1)
            return super().forward(indices)

    encoder(model).__class__ = Own
    for _ in range(3):
        logits(model, "prompt")
    assert len(count) == 3


@pytest.mark.parametrize("name", ["prompt", "multitask"])
def test_another_embedding_of_words_is_seen(name):
    model = made(name)
    before = [logits(model, name) for _ in range(2)][1]
    base = model.get_base_model()
    old = base.get_input_embeddings()
    base.set_input_embeddings(nn.Embedding(*old.weight.shape, _weight=old.weight.detach() * 0.5))
    found = logits(model, name)
    assert not torch.equal(found, before) and torch.equal(found, long_way(model, name))
    base.get_input_embeddings = lambda: old
    assert torch.equal(logits(model, name), before)


def test_a_model_that_says_itself_where_its_words_are_is_asked_each_time():
    class Own(type(llama())):
        def get_input_embeddings(self):
            asked.append(1)
            return super().get_input_embeddings()

    asked: list[int] = []
    model = made("prompt")
    model.get_base_model().__class__ = Own
    logits(model, "prompt")
    asked.clear()
    for _ in range(3):
        logits(model, "prompt")
    assert len(asked) == 3


def test_a_model_of_another_dtype_and_a_copy_have_their_own():
    model = made("p-tuning")
    before = [logits(model, "p-tuning") for _ in range(2)][1]
    twin = copy.deepcopy(model)
    assert encoder(model).__dict__[MADE] is not None and encoder(twin).__dict__[MADE] is None
    written(encoder(twin))
    assert torch.equal(logits(model, "p-tuning"), before) and not torch.equal(logits(twin, "p-tuning"), before)
    model.to(torch.float64)
    found = logits(model, "p-tuning")
    assert found.dtype is torch.float64 and torch.equal(found, long_way(model, "p-tuning"))


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_a_forward_of_a_models_own_is_asked_for_its_arguments_each_time(runs):
    model = made("prefix")
    before, base = logits(model, "prefix"), model.get_base_model()
    forward, none = base.forward, SimpleNamespace(logits=before)

    def own(input_ids=None, attention_mask=None):
        return [none, *(forward(input_ids, attention_mask) for _ in range(runs))][-1]

    base.forward = own
    for _ in range(2):
        if runs == 1:  # its body takes the prompt, as that of a head of transformers 4 does
            assert torch.equal(logits(model, "prefix"), before)
            continue
        with pytest.raises(ValueError, match=f"takes no past_key_values.*that ran {runs} times"):
            logits(model, "prefix")
    del base.forward
    assert torch.equal(logits(model, "prefix"), before)


def test_a_classifier_takes_it_too():
    model = made("prompt", "BertForTokenClassification", "TOKEN_CLS")
    with torch.no_grad():
        assert takes_it(model, "prompt")
    assert torch.equal(logits(model, "prompt"), long_way(model, "prompt"))
