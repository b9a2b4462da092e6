"""`peft.doctor`: what it finds in a training run, and that it finds nothing where nothing is wrong."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import _global_optimizer_pre_hooks

import peft
from peft import AdaLoraConfig, AdamssConfig, LoraConfig, get_peft_model
from peft.inspection.doctor import fingerprint
from tests.conformance.layouts import LAYOUTS
from tests.conformance.rows import adapted, cells, config, told


class Net(nn.Module):
    """Two layers of which the second may stay unused, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.both = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(x)) if self.both else x)


def lora(**fields):
    return LoraConfig(**{"r": 2, "target_modules": ["first", "second"], **fields})


def net(**fields):
    torch.manual_seed(0)
    return get_peft_model(Net(), lora(**fields))


def free(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(optimizer, loss):
    if loss.requires_grad:
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model, optimizer=None, steps=3, times=1.0, given=None):
    optimizer = optimizer or AdamW(free(model), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    with peft.doctor(model, given) as doctor:
        for _ in range(steps):
            step(optimizer, (model(torch.randn(4, 6, generator=generator)) ** 2).sum() * times)
    return doctor.report()


def findings(report):
    assert str(report).startswith("ok" if report.ok else "not ok")
    assert report.ok != any(f.serious for f in report.findings) and json.dumps(report.to_dict())
    return [(f.kind, f.adapter, f.serious) for f in report.findings]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("method, layout", cells(only=lambda kind: kind.name in ("linear", "embedding", "conv-2d")))
def test_no_method_raises_an_alarm(method, layout, steps):
    kind = LAYOUTS[layout]
    model = get_peft_model(kind.model(torch.float32), config(method, kind)) if steps == 1 else adapted(method, kind)
    model = told(model, method, kind).train() if steps == 1 else model.train()
    optimizer = AdamW(free(model), lr=1e-2)
    with peft.doctor(model) as doctor:
        for _ in range(steps):
            y = model(kind.x())
            step(optimizer, (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum())
    report = doctor.report()
    assert report.ok, str(report)
    assert report.adapters["default"]["changed"] > 0
    assert method.startswith("glora") or not report.findings  # one of its five tensors for a layer may do nothing


def test_a_run_without_faults():
    report = train(net(modules_to_save=["head"]))
    assert report.ok and not report.findings and report.steps == 3
    assert report.adapters == {"default": {"trained": 6, "with_gradient": 6, "changed": 6}}
    assert str(report) == "ok after 3 steps\nadapter 'default': 6 tensors trained, 6 with gradients, 6 changed"


def another(model, left_over=False):
    optimizer = SGD(free(model), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    model.add_adapter("b", lora(init_lora_weights=False))
    model.set_adapter("b")
    if left_over:
        optimizer.add_param_group({"params": free(model)})
    else:
        optimizer.zero_grad()
    return train(model, optimizer)


def after(change, *given, **named):
    def run(model):
        optimizer = AdamW(free(model))
        getattr(model.base_model, change)(*given, **named)
        return train(model, optimizer)

    return run


def inactive(model):
    model.add_adapter("b", lora())
    for p in peft.adapter_parameters(model, "b").values():
        p.requires_grad_(True)
    return train(model)


def written(model):
    with peft.doctor(model) as doctor:
        train(model)
        model.base_model.model.first.base_layer.weight.data[0, 0] += 1
    return doctor.report()


def detached(model):
    model.base_model.model.head.requires_grad_(True)
    model.base_model.model.head.register_forward_pre_hook(lambda module, x: (x[0].detach(),))
    return train(model)


FAULTS = {
    "stale": (lambda m: train(m, AdamW(free(net()))), "no change", "4 parameters that are not in the model"),
    "given": (lambda m: train(m, SGD([torch.ones(1)]), given=AdamW(free(net()))), "no change", "5 parameters that are"),
    "another adapter's": (another, "no change", r"one holds those of 'default'"),
    "no rate": (lambda m: train(m, AdamW(free(m), lr=0.0)), "no change", "rate was 0 in all 3 steps"),
    "lost": (lambda m: train(m, SGD(free(m), lr=1e-30)), "no change", "smaller than what float32 keeps"),
    "left over": (lambda m: another(m, left_over=True), "changed while frozen", "an optimiser that steps holds them"),
    "written": (written, "changed while frozen", "something has written"),
    "frozen": (after("set_adapter", "default", inference_mode=True), "frozen", "set_adapter"),
    "disabled": (after("disable_adapter_layers"), "frozen", "disabled"),
    "merged": (after("merge_adapter"), "no gradient", "unmerge_adapter"),
    "inactive": (inactive, "no gradient", r"set_adapter\('b'\)"),
    "detached": (detached, "no gradient", "does not depend on it"),
    "nothing": (lambda m: train(m, steps=0), "no gradient", "no backward pass was seen"),
    "no scale": (lambda m: train(m.eval(), times=0.0), "zero gradient", "multiplied by zero"),
    "too fast": (lambda m: train(m, SGD(free(m), lr=1e38), 4), "not finite", "NaN"),
    "no number": (lambda m: train(m, SGD([nn.Parameter(torch.ones(1))]), 1, torch.nan), "not finite", "gradients"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_cause(fault):
    run, kind, cause = FAULTS[fault]
    report = run(net(init_lora_weights=False))
    assert {f[0] for f in findings(report) if f[2]} == {kind}
    first = report.findings[0]
    assert first.kind == kind and re.search(cause, first.text) and (first.tensors or kind == "frozen")


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_schedule_that_stands_still(by_hand):
    model = get_peft_model(Net(), AdaLoraConfig(target_modules=["first"], total_step=20, tinit=1, tfinal=1))
    next(iter(model.base_model.companions.values())).by_hand = by_hand  # as after a call that was not repeated
    assert findings(train(model)) == [("schedule", "default", True)] * by_hand
    asa = AdamssConfig(target_modules=["first"], r=2, num_subspaces=2, use_asa=True, init_warmup=0, final_warmup=9)
    assert findings(train(get_peft_model(Net(), asa))) == [("schedule", "default", True)]


@pytest.mark.parametrize("fields, serious", [({}, False), ({"modules_to_save": ["second"]}, True)], ids=str)
def test_layers_that_no_batch_uses_are_noted_and_whole_modules_are_an_alarm(fields, serious):
    model = net(target_modules=["first", *([] if fields else ["second"])], **fields)
    model.base_model.model.both = False
    report = train(model)
    assert findings(report) == [("no gradient", "default", serious)]
    assert all(".second." in name for name in report.findings[0].tensors)


def test_steps_that_a_scaler_leaves_out_are_noted():
    model = net()
    optimizer, scaler = AdamW(free(model), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    with peft.doctor(model) as doctor:
        for _ in range(30):
            scaler.scale((model(torch.ones(4, 6)) ** 2).sum() * 1e3).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert doctor.report().ok and {f[0] for f in findings(doctor.report())} <= {"not finite"}


def test_merging_switching_and_adding_are_no_faults():
    model = net()
    with peft.doctor(model) as doctor:
        model.add_adapter("b", lora(init_lora_weights=False))
        model.set_adapter("b")
        train(model)
        model.merge_adapter()
    assert findings(doctor.report()) == [] and list(doctor.report().adapters) == ["b"]
    with peft.doctor(model) as doctor:
        model.merge_and_unload()
    assert findings(doctor.report()) == []


def test_nothing_is_left_behind():
    model = net()
    doctor = peft.doctor(model)
    assert all(p._backward_hooks for p in free(model))
    copy.deepcopy(model)
    del doctor
    with pytest.raises(RuntimeError, match="mine"), peft.doctor(model):
        raise RuntimeError("mine")
    assert not any(p._backward_hooks for p in free(model)) and not _global_optimizer_pre_hooks
    with pytest.raises(TypeError, match="Net has none"):
        peft.doctor(Net())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("size", [0, 1, 63, 5000])
def test_a_fingerprint_is_small_and_sees_every_number(dtype, size):
    t = torch.linspace(-4, 4, size + 1).to(dtype)[1:]
    known = fingerprint(t)
    assert known.numel() < 1024 and torch.equal(known, fingerprint(t.clone()))
    for place in {0, size // 2, size - 1} if size else ():
        other = t.clone()
        other[place] = torch.tensor(7).to(dtype)
        assert not torch.equal(known, fingerprint(other))


def test_a_language_model_under_trainer_and_checkpointing(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=48))
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    rows = [{"input_ids": list(range(n, n + 6)), "labels": list(range(n, n + 6))} for n in range(16)]
    given = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path), gradient_accumulation_steps=2, **given)
    with peft.doctor(model) as doctor:
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert findings(doctor.report()) == [] and doctor.report().steps == 2

    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.disable_input_require_grads()  # as where the base is not a model of transformers
    with peft.doctor(model) as doctor, pytest.warns(UserWarning, match="None of the inputs"):
        model(input_ids=torch.ones(1, 4).long(), use_cache=False).logits.sum().backward()
    first = doctor.report().findings[0]
    assert first.kind == "no gradient" and "enable_input_require_grads" in first.text
