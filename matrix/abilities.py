"""The columns for abilities, tried on a small model of two adapted layers (or a language model)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft

from . import bases
from .layouts import Cell
from .probe import NotAsked, Probe, Wrong, close, fields, need, wrap
from .rows import Row

ABILITIES: dict[str, Cell] = {}


def ability(name: str, grad: bool = False) -> Callable[[Callable[[Probe], str]], Callable[[Probe], str]]:
    """File an experiment as the column `name`."""

    def keep(function: Callable[[Probe], str]) -> Callable[[Probe], str]:
        def cell(row: Row, folder: Path) -> str:
            build, targets = bases.ABILITIES[row.base]
            with torch.set_grad_enabled(grad):
                return function(Probe(row, build, targets, folder))

        ABILITIES[name] = cell
        return function

    return keep


def restored(model: nn.Module, before: dict[str, Tensor]) -> str:
    """Whether the frozen tensors are what they were, bit for bit."""
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    moved = [n for n, old in before.items() if n in after and not torch.equal(old, after[n])]
    if not moved:
        return "yes (exact)"
    worst = max(float((before[n].double() - after[n].double()).abs().max()) for n in moved)
    need(worst < 2e-2, "not restored")
    return f"yes (rounding, {worst:.0e})"


def frozen(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach().clone() for n, t in named if not t.requires_grad}


@ability("base output at init")
def base_at_init(p: Probe) -> str:
    model, inputs = p.wrapped(seed=None)
    a, b = p.run(model, inputs), p.run(p.base()[0], inputs)
    need(a.shape == b.shape, "another shape")
    if torch.equal(a, b):
        return "yes (exact)"
    need(close(a, b), "another output")
    return "yes (close)"


@ability("trains", grad=True)
def trains(p: Probe) -> str:
    model, inputs = p.wrapped(seed=None)
    model.train()
    trained = [q for q in model.parameters() if q.requires_grad]
    need(bool(trained), "nothing trainable")
    before = {n: q.detach().clone() for n, q in model.named_parameters() if not q.requires_grad}
    optimizer, losses = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.0), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (p.run(model, inputs).float() - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    now = dict(model.named_parameters())
    need(losses[-1] < losses[0] - 1e-6, "loss did not fall")
    need(all(torch.equal(old, now[n]) for n, old in before.items()), "frozen weights changed")
    return "yes"


def half(dtype: torch.dtype) -> Callable[[Probe], str]:
    def cell(p: Probe) -> str:
        model, inputs = p.wrapped(dtype)
        out = p.run(model, inputs)
        need(bool(torch.isfinite(out).all()), "not finite")
        out.float().square().mean().backward()
        return "yes" if out.dtype == dtype else f"yes (output {out.dtype})".replace("torch.", "")

    return cell


ability("bf16", grad=True)(half(torch.bfloat16))
ability("fp16", grad=True)(half(torch.float16))


def merging(**options: Any) -> Callable[[Probe], str]:
    def cell(p: Probe) -> str:
        model, inputs = p.wrapped()
        want = p.run(model, inputs)
        merged = model.merge_and_unload(**options).eval()
        need(not hasattr(merged, "peft_config") or isinstance(merged, type(p.base()[0])), "adapter left behind")
        need(close(p.run(merged, inputs), want), "wrong output")
        return "yes"

    return cell


ability("merge_and_unload")(merging())
ability("safe merge")(merging(safe_merge=True))


@ability("unload")
def unload(p: Probe) -> str:
    model, inputs = p.wrapped()
    want = p.run(p.base()[0], inputs)
    need(close(p.run(model.unload().eval(), inputs), want), "not the base")
    return "yes"


def unmerging(dtype: torch.dtype) -> Callable[[Probe], str]:
    def cell(p: Probe) -> str:
        model, inputs = p.wrapped(dtype)
        before, want = frozen(model), p.run(model, inputs)
        model.merge_adapter()
        need(dtype != torch.float32 or close(p.run(model, inputs), want), "merged output wrong")
        model.unmerge_adapter()
        p.run(model, inputs)
        return restored(model, before)

    return cell


ability("unmerge fp32")(unmerging(torch.float32))
ability("unmerge bf16")(unmerging(torch.bfloat16))


@ability("merge a subset")
def merge_subset(p: Probe) -> str:
    model, inputs = p.wrapped()
    p.second(model)
    model.set_adapter("second")
    want = p.run(model, inputs)
    before = frozen(model)
    model.merge_adapter(["second"])
    need(close(p.run(model, inputs), want), "wrong output")
    model.unmerge_adapter()
    return restored(model, before)


@ability("two adapters, switch")
def switching(p: Probe) -> str:
    model, inputs = p.wrapped()
    a = p.run(model, inputs)
    first = p.second(model)
    again = p.run(model, inputs)
    model.set_adapter("second")
    b = p.run(model, inputs)
    model.set_adapter(first)
    need(close(a, again) and close(a, p.run(model, inputs)), "first adapter changed")
    need(not close(a, b, 1e-6), "no effect")
    return "yes"


@ability("two active together")
def together(p: Probe) -> str:
    model, inputs = p.wrapped()
    first = p.second(model)
    a = p.run(model, inputs)
    model.set_adapter("second")
    b = p.run(model, inputs)
    (model.base_model if hasattr(model.base_model, "inject_adapter") else model).set_adapter([first, "second"])
    both = p.run(model, inputs)
    need(not close(both, a, 1e-6) and not close(both, b, 1e-6), "no effect")
    return "yes"


@ability("mixed batch (adapter_names)")
def mixed_batch(p: Probe) -> str:
    model, inputs = p.wrapped()
    first = p.second(model)
    a = p.run(model, inputs)
    model.set_adapter("second")
    b = p.run(model, inputs)
    model.set_adapter(first)
    with model.disable_adapter():
        none = p.run(model, inputs)
    out = p.run(model, inputs, adapter_names=[first, "second", "__base__"])
    if out.shape == a.shape and close(out, a, 1e-6):
        raise Wrong("silently ignored")
    rows = [t[-none.shape[1] :] if t.dim() > 1 else t for t in (out[0], a[0], out[1], b[1], out[2], none[2])]
    need(all(close(x, y) for x, y in zip(rows[::2], rows[1::2], strict=True)), "wrong output")
    return "yes"


@ability("disable_adapter")
def disabling(p: Probe) -> str:
    model, inputs = p.wrapped()
    on, want = p.run(model, inputs), p.run(p.base()[0], inputs)
    with model.disable_adapter():
        off = p.run(model, inputs)
    need(close(on, p.run(model, inputs)), "not enabled again")
    need(close(off, want), "not the base")
    return "yes (exact)" if torch.equal(off, want) else "yes (close)"


@ability("delete_adapter")
def deleting(p: Probe) -> str:
    model, inputs = p.wrapped()
    first = p.second(model)
    model.set_adapter("second")
    b = p.run(model, inputs)
    model.delete_adapter(first)
    need(first not in model.peft_config, "still there")
    left = [n for n, _ in model.named_parameters() if f".{first}." in n or n.endswith("." + first)]
    need(not left, "parameters left behind")
    need(close(b, p.run(model, inputs)), "other adapter changed")
    return "yes"


@ability("add_weighted_adapter")
def weighted(p: Probe) -> str:
    model, inputs = p.wrapped()
    first = p.second(model)
    problems: list[Exception] = []
    for options in ({"combination_type": "linear"}, {}):
        try:
            model.add_weighted_adapter([first, "second"], [0.5, 0.7], "mix", **options)
        except Exception as problem:
            problems.append(problem)
            continue
        model.set_adapter("mix")
        p.run(model, inputs)
        return "yes"
    raise problems[-1]


@ability("convert to LoRA")
def converting(p: Probe) -> str:
    model, inputs = p.wrapped()
    want = p.run(model, inputs)
    config, state = peft.convert_to_lora(model, rank=bases.SIZE)
    again = peft.get_peft_model(p.base()[0], config)
    peft.set_peft_model_state_dict(again, state)
    need(close(p.run(again.eval(), inputs), want, 1e-3), "another output")
    return "yes"


@ability("DoRA's magnitude")
def magnitude(p: Probe) -> str:
    need("use_dora" in fields(p.row), "no such option")
    model, inputs = p.wrapped(use_dora=True)
    plain, _ = p.wrapped()
    need(not close(p.run(model, inputs), p.run(plain, inputs), 1e-6), "no effect")
    return "yes"


def reloading(**options: Any) -> Callable[[Probe], str]:
    def cell(p: Probe) -> str:
        model, inputs = p.wrapped()
        want = p.run(model, inputs)
        again = p.loaded(p.saved(model), **options)
        tensors = [*again.parameters(), *again.buffers()]
        need(all(t.device.type != "meta" for t in tensors), "meta tensors left")
        got = p.run(again, inputs)
        need(close(got, want), "another output")
        return "yes (exact)" if torch.equal(got, want) else "yes (close)"

    return cell


ability("save/load")(reloading())
ability("low_cpu_mem_usage")(reloading(low_cpu_mem_usage=True))


@ability("hotswap")
def swapping(p: Probe) -> str:
    from peft.utils.hotswap import hotswap_adapter

    one, inputs = p.wrapped(seed=5)
    two, _ = p.wrapped(seed=9)
    want = p.run(two, inputs)
    first, second = p.saved(one), p.saved(two)
    model = p.loaded(first)
    hotswap_adapter(model, second, adapter_name="default")
    need(close(p.run(model, inputs), want), "another output")
    return "yes"


@ability("PeftMixedModel")
def mixed_model(p: Probe) -> str:
    model, inputs = p.base()
    targets = ["q_proj"] if p.row.base.startswith("llama") else ["head"] if p.row.base != "layers" else ["layers.0.fc"]
    model = wrap(p, model, inputs, mixed=True)
    other = peft.LoHaConfig if p.row.config == "LoraConfig" else peft.LoraConfig
    model.add_adapter("other", other(r=4, target_modules=targets))
    model.set_adapter(["default", "other"])
    p.randomise(model, 5)
    model.eval()
    both = p.run(model, inputs)
    model.set_adapter("default")
    need(not close(both, p.run(model, inputs), 1e-6), "no effect")
    return "yes"


@ability("modules_to_save")
def whole_modules(p: Probe) -> str:
    need("modules_to_save" in fields(p.row), "no such option")
    model, inputs = p.wrapped(modules_to_save=[p.head()])
    need(any(p.head() in key for key in peft.get_peft_model_state_dict(model)), "head not saved")
    want = p.run(model, inputs)
    need(close(p.run(p.loaded(p.saved(model)), inputs), want), "another output")
    return "yes"


@ability("bias", grad=True)
def biases(p: Probe) -> str:
    need("bias" in fields(p.row), "no such option")
    if not any(n.endswith("bias") for n, _ in p.base()[0].named_parameters()):
        raise NotAsked
    model, inputs = p.wrapped(bias="all")
    trained = [n for n, q in model.named_parameters() if q.requires_grad and n.endswith("bias")]
    need(bool(trained), "no bias is trained")
    with torch.no_grad():
        want = p.run(model, inputs)
        need(close(p.run(p.loaded(p.saved(model)), inputs), want), "another output")
    return "yes"


@ability("layer_replication")
def replication(p: Probe) -> str:
    need("layer_replication" in fields(p.row), "no such option")
    if p.row.prepare:
        raise NotAsked
    more: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    p = Probe(p.row, bases.llama, None, p.folder)
    more = {k: v for k, v in more.items() if not (p.row.blocks and k == "target_modules")}
    model, inputs = p.wrapped(layer_replication=[[0, 2], [1, 2]], **more)
    p.run(model, inputs)
    need(
        sum(type(m).__name__.endswith("DecoderLayer") for m in model.get_base_model().modules()) == 3,
        "layers not replicated",
    )
    return "yes"


PATTERNS = {"rank_pattern": 2, "n_frequency_pattern": 9, "block_size_pattern": 2}


@ability("per-module pattern")
def patterns(p: Probe) -> str:
    known = fields(p.row)
    path = "layers.0.self_attn.q_proj" if p.row.base.startswith("llama") else "layers.1.fc"
    path = "model.layers.0" if p.row.blocks else path
    name = None if p.row.pattern else next((n for n in PATTERNS if n in known), None)
    if name is None:
        need("module_config" in known, "no such option")
        setting = p.row.pattern or ({"r": 2} if "r" in known else None)
        if setting is None:
            raise NotAsked
        model, inputs = p.wrapped(module_config={path: setting}, seed=None if "init_ia3_weights" in setting else 5)
        plain = p.wrapped(seed=None if "init_ia3_weights" in setting else 5)[0]
        need(not close(p.run(model, inputs), p.run(plain, inputs), 1e-6), "no effect")
    else:
        model, inputs = p.wrapped(**{name: {path: PATTERNS[name]}})
        need(_shapes(model) != _shapes(p.wrapped()[0]), f"{name} ignored")
    p.run(model, inputs)
    return f"yes ({name or 'module_config'})"


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(q.shape) for q in model.parameters()]


@ability("gradient checkpointing", grad=True)
def checkpointing(p: Probe) -> str:
    more: dict[str, Any] = {}
    if not p.row.base.startswith("llama"):
        if p.row.prepare:
            raise NotAsked
        names = {"words": ["embed_tokens"], "norms": ["input_layernorm"]}
        p = Probe(p.row, bases.llama, names.get(p.row.base, ["q_proj", "v_proj"]), p.folder)
        more["task_type"] = "CAUSAL_LM"
    model, inputs = p.wrapped(**more)
    model.train()
    plain = _gradients(p, model, inputs)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = _gradients(p, model, inputs)
    need(bool(plain) and all(close(a, b) for a, b in zip(plain, again, strict=True)), "other gradients")
    return "yes"


def _gradients(p: Probe, model: nn.Module, inputs: dict) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    p.run(model, inputs).square().mean().backward()
    return [q.grad.clone() for q in model.parameters() if q.grad is not None]


@ability("compile fullgraph")
def compiling(p: Probe) -> str:
    torch.compiler.reset()
    model, inputs = p.wrapped()
    want = p.run(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    need(close(p.run(compiled, inputs), want), "another output")
    return "yes"


@ability("deepcopy, pickle")
def copying(p: Probe) -> str:
    model, inputs = p.wrapped()
    want = p.run(model, inputs)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        need(close(p.run(again, inputs), want), "another output")
    return "yes"
