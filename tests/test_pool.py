"""Many adapters that take turns on one model: what runs, what is kept where, and what is refused."""

from __future__ import annotations

import functools
import gc
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from benchmarks.measure import calls
from conformance.layouts import LAYOUTS
from conformance.oracles import METHODS
from conformance.rows import adapted, cells, told, train
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.hotswap import AdapterPool, room_for

X = torch.linspace(-1, 1, 24).view(3, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def made(seed: int = 0, **fields: Any) -> Any:
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["layers.0", "layers.1"], **fields})
    model = get_peft_model(Net(), config)
    train(model, seed=seed)
    return model.eval()


def varied(i: int, **fields: Any) -> Any:
    """The i-th of many: ranks, scalings and targets differ."""
    targets = [f"layers.{i % 3}", f"layers.{(i + 1) % 3}"]
    rest = {"r": 1 + i % 4, "lora_alpha": 3 + i, "target_modules": targets, "use_rslora": i % 2 == 0}
    return made(i, **{**rest, **fields})


def pooled(adapters: dict[str, Any], slots: int = 2, memory: int = 3, **options: Any) -> AdapterPool:
    room = room_for([a.peft_config["default"] for a in adapters.values()])
    pool = AdapterPool(get_peft_model(Net(), room), slots, memory, **options)
    for name, adapter in adapters.items():
        pool.register(name, get_peft_model_state_dict(adapter), adapter.peft_config["default"])
    return pool


@pytest.fixture(scope="module")
def eight() -> dict[str, Any]:
    return {f"a{i}": varied(i) for i in range(8)}


# ---- running ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "memory"), [(1, 0), (2, 3), (8, 64)])
def test_each_adapter_answers_as_by_itself_however_little_is_kept(
    eight: dict[str, Any], slots: int, memory: int
) -> None:
    pool = pooled(eight, slots, memory)
    for i in torch.randint(8, (40,), generator=torch.Generator().manual_seed(0)).tolist():
        with pool.using(f"a{i}") as model:
            assert torch.allclose(model(X), eight[f"a{i}"](X), atol=1e-6)
        assert pool.active == f"a{i}"
    status = pool.status()
    assert len(status.slots) <= slots
    assert len(status.memory) <= memory


def test_compiled_code_stays_valid_through_hundreds_of_turns(eight: dict[str, Any]) -> None:
    pool = pooled(eight, slots=3)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(pool.model, backend=counter, fullgraph=True)
    pool.activate("a0")
    compiled(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in torch.randint(8, (100,), generator=torch.Generator().manual_seed(0)).tolist():
            pool.activate(f"a{i}")
            assert torch.allclose(compiled(X), eight[f"a{i}"](X), atol=1e-6)
    assert counter.frame_count == 1


def test_every_sample_of_a_batch_has_its_own_adapter(eight: dict[str, Any]) -> None:
    pool = pooled(eight, slots=3)
    pool.activate("a7")
    chosen = ["a1", None, "a5", "a1", "__base__", "a6"]
    x = torch.randn(6, 8)
    with pool.batch(chosen) as names:
        y = pool.model(x, adapter_names=names)
    for row, name in enumerate(chosen):
        expected = (eight[name] if name in eight else Net())(x[row : row + 1])
        assert torch.allclose(y[row : row + 1], expected, atol=1e-6)
    assert pool.active == "a7"
    assert torch.allclose(pool.model(X), eight["a7"](X), atol=1e-6)
    with pytest.raises(ValueError, match="names 4 adapters, but the pool has 3 slots"), pool.batch(list(eight)[:4]):
        pass


CELLS = [
    c for c in cells() if c[1] == "linear" or (c[0] == "lora" and c[1] in ("conv-2d", "embedding", "attention-packed"))
]


@pytest.mark.parametrize(("method", "layout"), CELLS)
def test_every_method_takes_turns(method: str, layout: str) -> None:
    cell = LAYOUTS[layout]
    one, other, model = (adapted(method, cell) for _ in range(3))
    train(other, seed=5)
    model.__dict__["noise"] = 0
    pool = AdapterPool(model, slots=1 if METHODS[method].alone else 2)
    for name, adapter in {"one": one, "other": other}.items():
        pool.register(name, get_peft_model_state_dict(adapter), adapter.peft_config["default"])
    for name, adapter in (("one", one), ("other", other), ("default", one), ("other", other), ("one", one)):
        pool.activate(name)
        expected = adapter(cell.x())
        assert torch.allclose(
            told(model, method, cell)(cell.x()), expected, rtol=0, atol=2e-6 * float(expected.detach().abs().max())
        )


def test_prompts_take_turns() -> None:
    transformers = pytest.importorskip("transformers")
    from peft import PromptTuningConfig

    def model(seed: int) -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=16)
        prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        found = get_peft_model(transformers.GPT2LMHeadModel(config), prompt)
        torch.manual_seed(seed)
        for parameter in (p for p in found.parameters() if p.requires_grad):
            parameter.data.normal_()
        return found.eval()

    adapters, tokens = {"one": model(1), "two": model(2), "three": model(3)}, torch.tensor([[1, 2, 3]])
    pool = AdapterPool(model(0), slots=2)
    for name, adapter in adapters.items():
        pool.register(name, get_peft_model_state_dict(adapter), adapter.peft_config["default"])
    for name in ("one", "two", "three", "one", "two", "one"):
        pool.activate(name)
        assert torch.equal(pool.model(tokens).logits, adapters[name](tokens).logits)


def test_copies_of_whole_modules_take_turns() -> None:
    adapters = {f"a{i}": made(i, target_modules=["layers.0"], modules_to_save=["layers.2"]) for i in range(3)}
    for i, adapter in enumerate(adapters.values()):
        adapter.base_model.model.layers[2].modules_to_save["default"].weight.data.add_(i)
    adapters["a3"] = made(3, target_modules=["layers.0"])
    pool = pooled(adapters)
    for name in ("a0", "a1", "a3", "a2", "a0", "a3", "a1"):
        pool.activate(name)
        assert torch.allclose(pool.model(X), adapters[name](X), atol=1e-6)


def test_an_adapter_that_starts_from_the_base_weight_takes_its_turn(eight: dict[str, Any]) -> None:
    adapters = {"a0": eight["a0"], "p": made(1, init_lora_weights="pissa"), "a1": eight["a1"]}
    pool = pooled(adapters)
    for name in ("p", "a0", "a1", "p", "a1", "p", "a0"):
        pool.activate(name)
        assert torch.allclose(pool.model(X), adapters[name](X), atol=1e-6)


def test_the_adapter_that_the_model_came_with_is_kept(eight: dict[str, Any]) -> None:
    model, alone = made(3), made(3)
    pool = AdapterPool(model, slots=1, memory=1)
    pool.register("other", get_peft_model_state_dict(made(4)), model.peft_config["default"])
    pool.activate("other")
    assert not torch.allclose(model(X), alone(X))
    pool.activate("default")
    assert torch.equal(model(X), alone(X))


def test_threads_never_see_each_others_adapter(eight: dict[str, Any]) -> None:
    pool = pooled(eight)
    expected = {name: adapter(X).detach() for name, adapter in eight.items()}
    wrong: list[Any] = []

    def serve(seed: int) -> None:
        for i in torch.randint(8, (25,), generator=torch.Generator().manual_seed(seed)).tolist():
            with pool.using(f"a{i}") as model:
                if not torch.allclose(model(X), expected[f"a{i}"], atol=1e-6):
                    wrong.append(i)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- what is kept where -------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """The bytes of all tensors that the process holds, each storage once."""
    gc.collect()
    found: dict[int, int] = {}
    for t in gc.get_objects():
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(t) if isinstance(t, Tensor) else False
        if type(t) in (Tensor, nn.Parameter) and t.device.type != "meta" and not wrapped:  # that holds no bytes itself
            storage = t.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("origin", ["folders", "tensors"])
def test_a_thousand_adapters_take_the_memory_of_those_that_are_kept(origin: str, tmp_path: Path) -> None:
    adapter = made()
    config, state = adapter.peft_config["default"], get_peft_model_state_dict(adapter)
    each = sum(t.numel() * t.element_size() for t in state.values())
    adapter.save_pretrained(tmp_path)
    file = (tmp_path / "adapter_model.safetensors").stat().st_size  # tensors that are read keep its header, too
    pool = AdapterPool(adapter, slots=4, memory=16, spill=tmp_path / "spilled")
    before = live_bytes()
    for i in range(1000):
        pool.register(f"a{i}", tmp_path if origin == "folders" else state, None if origin == "folders" else config)
    assert len(pool) == 1001
    for i in range(0, 1000, 9):
        with pool.using(f"a{i}"):
            pass
    assert live_bytes() - before <= (16 + 1) * file  # and what two slots trade places through
    status = pool.status()
    assert (status.registered, len(status.slots), len(status.memory)) == (1001, 4, 16)
    assert status.memory_bytes == 16 * each
    assert status.slot_bytes == 4 * (each + 2 * 4)  # with a scaling in each of two layers


def test_the_least_recently_used_makes_room(eight: dict[str, Any]) -> None:
    pool = pooled(eight, slots=3, memory=4)
    for name in ("a0", "a1", "a2", "a0", "a3"):
        pool.activate(name)
    assert list(pool.status().slots) == ["a3", *(n for n in pool.status().slots if n in ("a0", "a2"))]
    assert len(pool.status().slots) == 3
    assert set(pool.status().memory) == {"a0", "a1", "a2", "a3"}
    writes = pool.status().writes
    for name in ("a0", "a2", "a3"):
        pool.activate(name)
    assert pool.status().writes == writes
    reads = pool.status().reads
    pool.activate("a1")
    assert (pool.status().writes, pool.status().reads) == (writes + 1, reads)


def test_what_was_registered_from_memory_comes_back_from_disk(eight: dict[str, Any], tmp_path: Path) -> None:
    pool = pooled(eight, memory=0, spill=tmp_path)
    assert len(list(tmp_path.iterdir())) == 9
    pool.activate("a4")
    assert torch.allclose(pool.model(X), eight["a4"](X), atol=1e-6)
    pool.unregister("a5")
    assert len(list(tmp_path.iterdir())) == 8


def test_adapters_in_folders_are_read_when_they_are_needed(eight: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a0", "a1"):
        eight[name].save_pretrained(tmp_path / name)
    room = room_for([eight["a0"].peft_config["default"], eight["a1"].peft_config["default"]])
    pool = AdapterPool(get_peft_model(Net(), room))
    pool.register("a0", tmp_path / "a0")
    pool.register("a1", tmp_path, subfolder="a1")
    assert pool.status().reads == 0
    for name in ("a0", "a1"):
        pool.activate(name)
        assert torch.allclose(pool.model(X), eight[name](X), atol=1e-6)
    assert pool.status().reads == 2


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_adapters_without_room_are_refused_when_they_are_registered(tmp_path: Path) -> None:
    pool = AdapterPool(made())
    for match, fields in {
        r"rank 7, and the pool's room 2": {"r": 7},
        "rank 5": {"rank_pattern": {"layers.1": 5}},
        "use_dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True},
        "'b' does not fit in the pool: bias='all' trains": {"bias": "all"},
        "modules_to_save.*room_for": {"modules_to_save": ["layers.2"]},
    }.items():
        other = made(1, **fields)
        with pytest.raises(ValueError, match=match):
            pool.register("b", get_peft_model_state_dict(other), other.peft_config["default"])
    state = get_peft_model_state_dict(made())
    with pytest.raises(ValueError, match="PEFT types"):
        pool.register("b", state, IA3Config(target_modules=["layers.0"]))
    with pytest.raises(ValueError, match="give its `config`"):
        pool.register("b", state)
    with pytest.raises(ValueError, match="already"):
        pool.register("default", state, pool.room)
    with pytest.raises(ValueError, match="__base__"):
        pool.register("__base__", state, pool.room)
    with pytest.raises(TypeError, match="string"):
        pool.register(3, state, pool.room)  # type: ignore[arg-type]
    made().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        pool.register("b", tmp_path)
    assert list(pool) == ["default"]


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model, alone = made(), made()
    pool = AdapterPool(model, slots=2)
    other = made(1, target_modules=["layers.2"])
    pool.register("elsewhere", get_peft_model_state_dict(other), other.peft_config["default"])
    with pytest.raises(RuntimeError, match=r"'elsewhere' cannot be put on the model.*layers.2"):
        pool.activate("elsewhere")
    with pytest.raises(ValueError, match=r"no adapter 'elsewere'.*[Dd]id you mean 'elsewhere'"):
        pool.activate("elsewere")
    assert pool.active == "default"
    assert torch.equal(model(X), alone(X))


def test_the_active_adapter_is_not_forgotten(eight: dict[str, Any]) -> None:
    pool = pooled(eight)
    pool.activate("a1")
    with pytest.raises(ValueError, match="is active"):
        pool.unregister("a1")
    pool.unregister("a2")
    assert "a2" not in pool
    with pytest.raises(ValueError, match="no adapter 'a2'"):
        pool.activate("a2")


def test_an_adapter_in_a_slot_is_forgotten(eight: dict[str, Any]) -> None:
    pool = pooled(eight)
    for name in ("a1", "a2", "a3"):
        pool.activate(name)
    for name in ("a1", "a2"):
        pool.unregister(name)
        assert name not in pool and name not in pool.status().slots
    for name in ("a4", "a5", "a3"):
        pool.activate(name)
        assert torch.allclose(pool.model(X), eight[name](X), atol=1e-6)


def test_models_that_cannot_hold_a_pool_are_refused() -> None:
    with pytest.raises(TypeError, match="PeftModel"):
        AdapterPool(Net())
    two = made()
    two.add_adapter("second", LoraConfig(target_modules=["layers.0"]))
    with pytest.raises(ValueError, match="one adapter"):
        AdapterPool(two)
    with pytest.raises(ValueError, match="biases"):
        AdapterPool(made(bias="all"))
    merged = made()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        AdapterPool(merged)
    for arguments in ({"slots": 0}, {"memory": -1}, {"slots": True}, {"memory": 1.5}):
        with pytest.raises(ValueError, match="no number of adapters"):
            AdapterPool(made(), **arguments)


def test_a_room_holds_all_targets_and_the_largest_rank() -> None:
    first = LoraConfig(r=2, target_modules=["a"], rank_pattern={"a": 9}, use_rslora=True)
    room = room_for([first, LoraConfig(r=4, target_modules=["b"], modules_to_save=["head"], lora_dropout=0.1)])
    assert (room.r, room.rank_pattern, room.target_modules) == (9, {}, {"a", "b"})
    assert room.modules_to_save == ["head"]
    assert first.r == 2
    with pytest.raises(ValueError, match="use_dora"):
        room_for([first, LoraConfig(target_modules=["b"], use_dora=True)])
    with pytest.raises(ValueError, match="expressions"):
        room_for([first, LoraConfig(target_modules="b.*")])
    with pytest.raises(ValueError, match="at least one"):
        room_for([])


def test_a_pool_takes_over_a_model_that_was_loaded(eight: dict[str, Any], tmp_path: Path) -> None:
    eight["a3"].save_pretrained(tmp_path)
    pool = AdapterPool(PeftModel.from_pretrained(Net(), tmp_path))
    assert pool.active == "default"
    assert torch.allclose(pool.model(X), eight["a3"](X), atol=1e-6)


# ---- adapters that stay loaded ------------------------------------------------------------------------------------


def test_loading_the_twentieth_adapter_does_as_much_as_the_second(tmp_path: Path) -> None:
    base = nn.Sequential(*(Net() for _ in range(10)))
    made = get_peft_model(base, LoraConfig(r=2, target_modules=r".*layers\.\d", init_lora_weights=False))
    made.save_pretrained(tmp_path)
    made.load_adapter(tmp_path, "a1")
    gc.collect()
    second = calls(lambda: made.load_adapter(tmp_path, "a2"))
    for i in range(3, 20):
        made.load_adapter(tmp_path, f"a{i}")
    gc.collect()
    assert calls(lambda: made.load_adapter(tmp_path, "a20")) <= 1.1 * second


def test_training_mode_reaches_every_module_of_every_adapter() -> None:
    made = get_peft_model(
        Net(), LoraConfig(target_modules=["layers.0"], lora_dropout=0.1, modules_to_save=["layers.2"])
    )
    made.add_adapter("b", LoraConfig(target_modules=["layers.0"], lora_dropout=0.2))
    for mode in (False, True, False):
        made.train(mode)
        assert {m.training for m in made.modules()} == {mode}
    layer = made.base_model.model.layers[0]
    assert layer.train() is layer
    assert layer.lora_dropout["b"].training


# ---- what the documents show --------------------------------------------------------------------------------------


def test_the_document_on_serving_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda _: Net())
    text = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    adapters = {f"customer-{i}": varied(i) for i in (1, 2, 7)}
    for name, adapter in adapters.items():
        adapter.save_pretrained(tmp_path / "adapters" / name)
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    names: dict[str, Any] = {"one": {"x": X}, "batch": {"x": X}, "x": X, "torch": torch}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5  # the last is about adapters without a pool
    with torch._dynamo.config.patch(error_on_recompile=True):
        for block in blocks[:4]:
            exec(block, names)
    assert torch.allclose(names["output"], adapters["customer-7"](X), atol=1e-6)
    assert torch.allclose(names["outputs"], adapters["customer-7"](X), atol=1e-6)
