"""Poly: a task for each sample, given with each call; and what a call carries into layers that run again."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft.core.call
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model
from peft.core.deferred import Deferred

IDS = torch.randint(1, 32, (4, 6), generator=torch.Generator().manual_seed(0))
TASKS = torch.tensor([0, 1, 2, 0])
OTHERS = torch.tensor([2, 2, 0, 1])
OPTIONS = {"r": 4, "n_tasks": 3, "n_skills": 2, "init_weights": False}


class Blocks(nn.Module):
    """Two layers, each of which can be computed again in the backward pass."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant

    def forward(self, x):
        for layer in (self.a, self.b):
            step = nn.Sequential(layer, nn.Tanh())
            x = step(x) if self.reentrant is None else checkpoint(step, x, use_reentrant=self.reentrant)
        return x


def wrapped(base, **more):
    torch.manual_seed(1)
    model = get_peft_model(base, PolyConfig(**{**OPTIONS, "target_modules": ["a", "b"], **more}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "module_logits" in name:
                p.normal_()
    return model


def blocks(reentrant=None, **more):
    torch.manual_seed(0)
    return wrapped(Blocks(reentrant), **more)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def language(llama):
    return wrapped(copy.deepcopy(llama), target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM").eval()


# ---- what a call says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, words",
    [
        (None, r"task_ids is missing.*'a'.*one id per sample"),
        (torch.tensor([0, 1]), r"2 entries.*4 rows"),
        (torch.tensor([0]), r"1 entries.*4 rows"),
        (torch.tensor([0, 1, 2, 3]), r"task_ids holds 3.*n_tasks=3.*0 to 2"),
        (torch.tensor([0, -1, 2, 2]), "task_ids holds -1"),
        (torch.tensor([0.0, 1, 2, 2]), "one integer per sample"),
        (TASKS[:, None], r"one integer per sample.*\(4, 1\)"),
    ],
)
@pytest.mark.parametrize("shape", [(4, 6), (4, 4, 6)])
def test_wrong_ids_are_told(ids, words, shape):
    model = blocks().eval()
    for target in (model, model.base_model):
        with pytest.raises(ValueError, match=words):
            target(torch.ones(shape), task_ids=ids)
    model(torch.ones(shape), task_ids=[0, 1, 2, 0])


def test_the_tuner_takes_ids_as_the_model_does():
    model, x = blocks().eval(), torch.randn(4, 3, 6)
    assert torch.equal(model.base_model(x, task_ids=TASKS), model(x, task_ids=TASKS))
    assert not torch.equal(model(x, task_ids=TASKS), model(x, task_ids=OTHERS))


def test_a_model_that_needs_no_tasks_takes_ids_too():
    x = torch.randn(4, 6)
    model = get_peft_model(Blocks(), LoraConfig(target_modules=["a"])).eval()
    assert torch.equal(model(x, task_ids=TASKS), model(x))


def test_flattened_tokens_have_the_task_of_their_sample():
    class Flat(Blocks):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).view(x.shape)

    x = torch.randn(4, 5, 6)
    flat, plain = wrapped(Flat()).eval(), blocks().eval()
    flat.load_state_dict(plain.state_dict())
    assert torch.allclose(flat(x, task_ids=TASKS), plain(x, task_ids=TASKS), atol=1e-6)
    with pytest.raises(ValueError, match=r"1 entries.*20 rows"):
        flat(x, task_ids=TASKS[:1])


def test_samples_of_a_mixed_batch_bring_their_tasks(llama):
    model = language(llama)
    model.add_adapter("other", PolyConfig(**OPTIONS, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    names = ["other", "default", "__base__", "default"]
    with torch.no_grad():
        mixed = model(input_ids=IDS, task_ids=TASKS, adapter_names=names).logits
        for i, name in enumerate(names):
            if name == "__base__":
                wanted = llama(IDS[i : i + 1]).logits
            else:
                model.set_adapter(name)
                wanted = model(input_ids=IDS[i : i + 1], task_ids=TASKS[i : i + 1]).logits
            assert torch.allclose(mixed[i : i + 1], wanted, atol=1e-5)


def test_beams_have_the_task_of_their_sample(llama):
    model = language(llama)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(input_ids=IDS, task_ids=TASKS, **options)
    apart = [model.generate(input_ids=IDS[i : i + 1], task_ids=TASKS[i : i + 1], **options) for i in range(4)]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(together, model.generate(input_ids=IDS, task_ids=OTHERS, **options))
    sampled = model.generate(input_ids=IDS, task_ids=TASKS, do_sample=True, num_return_sequences=3, max_new_tokens=2)
    assert len(sampled) == 12


# ---- what the method does -------------------------------------------------------------------------------------------


def test_training_draws_the_skills_of_each_example():
    torch.manual_seed(0)
    model = blocks(n_splits=2)
    p = model.base_model.model.a.adapters["default"]
    with torch.no_grad():
        model.train()
        w = p.method.mixture(p, torch.zeros(4000, dtype=torch.long))
        drawn = 1 / (1 + torch.exp(-p.poly_router.module_logits[0] - torch.rand(4000, 4).logit())).view(4000, 2, 2)
        wanted = (drawn / drawn.sum(-1, keepdim=True)).mean(0)
    assert torch.allclose(w.sum(-1), torch.ones(4000, 2)) and w.std(0).min() > 0.05
    assert torch.allclose(w.mean(0), wanted, atol=0.03)


class Reader(nn.Module):
    """Attention of a batch to itself, under a mask."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x, mask=None, padding=None):
        return self.a(x, x, x, padding, False, mask)[0]


def test_attention_runs_once_for_each_task_with_its_own_masks():
    model = wrapped(Reader(), target_modules=["a"]).eval()
    x = torch.randn(4, 4, 6)  # as many tokens as samples
    together = torch.full((4, 4), -1e9).triu(1)
    per_head = torch.randn(4 * 2, 4, 4)
    padding = torch.tensor([[False, False, i > 1, i > 2] for i in range(4)])
    calls = []
    model.base_model.model.a.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for mask, pad in ((None, None), (together, None), (per_head, None), (None, padding)):
        calls.clear()
        found = model(x, mask, pad, task_ids=TASKS)
        assert len(calls) == 3, "two of the samples have the same task"
        for i in range(4):
            own = mask[2 * i : 2 * i + 2] if mask is per_head else mask
            alone = model(x[i : i + 1], own, None if pad is None else pad[i : i + 1], task_ids=TASKS[i : i + 1])
            assert torch.allclose(found[i : i + 1], alone, atol=1e-5)
    calls.clear()
    model(x, task_ids=[1, 1, 1, 1])
    assert len(calls) == 1
    alone = model.base_model(x[0], task_ids=[2])  # without a batch
    assert torch.allclose(alone, model(x[:1], task_ids=[2])[0], atol=1e-5)


def test_attention_learns_what_each_sample_alone_would():
    model = wrapped(Reader(), target_modules=["a"]).eval()
    x = torch.randn(4, 3, 6)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(x, task_ids=TASKS).square().sum(), trained)
    parts = [model(x[i : i + 1], task_ids=TASKS[i : i + 1]).square().sum() for i in range(4)]
    same(found, torch.autograd.grad(sum(parts), trained))
    model.train()
    assert not torch.equal(model(x, task_ids=TASKS), model(x, task_ids=TASKS)), "training draws"


def test_a_layer_whose_weight_is_read_takes_one_task():
    model = wrapped(Reader(), target_modules=["out_proj"]).eval()
    x = torch.randn(4, 3, 6)
    model(x, task_ids=[2, 2, 2, 2])
    with pytest.raises(ValueError, match="Target the module itself"):
        model(x, task_ids=TASKS)
    with pytest.raises(ValueError, match="task_ids is missing"):
        model(x)


def test_fused_experts_run_once_for_each_task_on_its_tokens():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "task_type": "CAUSAL_LM"}
    model = wrapped(transformers.MixtralForCausalLM(config), target_modules=[], **options).eval()
    with torch.no_grad():
        found = model(input_ids=IDS, task_ids=TASKS).logits
        alone = [model(input_ids=IDS[i : i + 1], task_ids=TASKS[i : i + 1]).logits for i in range(4)]
        assert torch.allclose(found, torch.cat(alone), atol=1e-5)
        assert not torch.allclose(found, model(input_ids=IDS, task_ids=OTHERS).logits, atol=1e-5)


def test_each_task_reaches_layers_that_torch_would_fuse():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True))
    model = wrapped(encoder, target_modules=["linear1", "linear2"]).eval()
    x = torch.randn(4, 3, 6)
    with torch.no_grad():
        found = model(x, task_ids=TASKS)
        alone = [model(x[i : i + 1], task_ids=TASKS[i : i + 1]) for i in range(4)]
    assert torch.allclose(found, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(found, model(x, task_ids=OTHERS), atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_attention_runs_again_with_the_tasks_of_its_own_call(reentrant):
    class Checked(Reader):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    def gradients(base, order):
        model = wrapped(base, target_modules=["a"]).eval()
        torch.manual_seed(2)
        x = torch.randn(4, 3, 6, requires_grad=True)
        losses = [model(x, task_ids=ids).square().sum() for ids in (TASKS, OTHERS)]
        for i in order:
            losses[i].backward()
        return [p.grad for p in model.parameters() if p.requires_grad] + [x.grad]

    same(gradients(Checked(), (0, 1)), gradients(Reader(), (1, 0)))


def test_a_wrong_type_and_splits_that_do_not_divide_are_told():
    with pytest.raises(ValueError, match="poly_type='mhr'"):
        PolyConfig(poly_type="mhr")
    with pytest.raises(ValueError, match=r"n_splits=4 must divide.*\[1, 2, 3, 6\]"):
        get_peft_model(Blocks(), PolyConfig(n_splits=4, target_modules=["a"]))


@pytest.mark.parametrize("ids", [torch.tensor([], dtype=torch.long), []], ids=["tensor", "list"])
@pytest.mark.parametrize(
    "targets", [{}, {"target_modules": [], "target_parameters": ["a.weight"]}], ids=["call", "read"]
)
def test_an_empty_batch_gives_an_empty_answer(ids, targets):
    y = blocks(**targets)(torch.randn(0, 6), task_ids=ids)
    assert y.shape == (0, 6)
    y.sum().backward()


def test_nothing_is_merged():
    model, x = blocks().eval(), torch.randn(4, 6)
    before = model(x, task_ids=TASKS)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="another update for each task"):
            merge()
    assert torch.equal(model(x, task_ids=TASKS), before)


def test_a_saved_adapter_gives_the_same(tmp_path):
    model, x = blocks().eval(), torch.randn(4, 6)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Blocks(), tmp_path)
    assert torch.equal(loaded(x, task_ids=TASKS), model(x, task_ids=TASKS))


def test_a_training_step_compiles_to_one_graph(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(Deferred, "at_once", False)  # as in a process that has compiled nothing yet
    model = blocks()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    fast(torch.randn(4, 3, 6), task_ids=TASKS).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


# ---- layers that run again in the backward pass ---------------------------------------------------------------------


def gradients(model, order, whole=False, between=lambda: None):
    """Of two forwards with different tasks, whose backward passes come in an order."""
    model.train()
    torch.manual_seed(3)
    x = torch.randn(4, 6, requires_grad=True)

    def run(ids):
        return model(x, task_ids=ids).square().sum()

    losses = [checkpoint(run, ids, use_reentrant=False) if whole else run(ids) for ids in (TASKS, OTHERS)]
    between()
    for loss in [sum(losses)] if order is None else [losses[i] for i in order]:
        loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad] + [x.grad]


def same(found, wanted):
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("reentrant, order", itertools.product([True, False], [None, (0, 1), (1, 0)]))
def test_a_checkpointed_layer_runs_again_with_the_tasks_of_its_own_call(reentrant, order):
    same(gradients(blocks(reentrant), order), gradients(blocks(), order))


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_whole_model_may_be_checkpointed(reentrant):
    same(gradients(blocks(reentrant), (0, 1), whole=True), gradients(blocks(), (0, 1)))


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("reentrant", [True, False])
def test_other_calls_in_between_change_nothing(reentrant):
    model = blocks(reentrant)

    def others():
        x = torch.ones(3, 6, requires_grad=True)
        model(x, task_ids=OTHERS[:3]).sum().backward()
        with torch.no_grad():
            model(x, task_ids=OTHERS[:3])
        copy.deepcopy(model)(x, task_ids=TASKS[:3])
        model.zero_grad()

    same(gradients(model, (1, 0), between=others), gradients(blocks(), (1, 0)))
    assert pickle.loads(pickle.dumps(model.base_model.call)).tasks is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_mixed_batch_runs_again_with_its_names(reentrant):
    def gradient(reentrant):
        model = blocks(reentrant).eval()
        model.add_adapter("other", PolyConfig(**OPTIONS, target_modules=["a"]))
        x = torch.ones(4, 6, requires_grad=True)
        y = model(x, task_ids=TASKS, adapter_names=["other", "default", "__base__", "default"])
        y.square().sum().backward()
        return [x.grad]

    same(gradient(reentrant), gradient(None))


def test_a_call_that_is_long_forgotten_is_told(monkeypatch):
    monkeypatch.setattr(peft.core.call, "REMEMBERED", 2)
    model = blocks(reentrant=False)
    first = model(torch.randn(4, 6, requires_grad=True), task_ids=TASKS).sum()
    for _ in range(2):
        model(torch.randn(4, 6, requires_grad=True), task_ids=TASKS)
    with pytest.raises(ValueError, match=r"more than 2 passes.*Call backward\(\) earlier"):
        first.backward()
