"""Threads that run one model at a time see each their own call, and leave the model as it was."""

from __future__ import annotations

import importlib.abc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft
from peft import LoraConfig, get_peft_model, registry
from peft.core.call import BASE

IDS = torch.arange(24).view(4, 6) % 20
NAMES = ["default", "other", BASE]


class Net(nn.Module):
    """Layers that are called, attention that reads its weights, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.up(self.embed(ids)))
        return self.head(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Tokens(Net):
    """The same, whose input has the name of tokens."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids)


CONFIGS: dict[str, Callable[[], Any]] = {
    "called": lambda: LoraConfig(r=2, target_modules=["embed", "up"]),
    "dora": lambda: LoraConfig(r=2, target_modules=["up"], use_dora=True),
    "attention": lambda: LoraConfig(r=2, target_modules=["attention"]),
    "parameter": lambda: LoraConfig(r=2, target_parameters=["up.weight"]),
    "tokens": lambda: LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"embed": [1, 2]}),
    "whole": lambda: LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]),
}


@pytest.fixture(autouse=True)
def quick_turns() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def adapted(kind: str, net: type[nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(net(), CONFIGS[kind]())
    model.add_adapter("other", CONFIGS[kind]())
    return filled(model)


def filled(model: Any) -> Any:
    """The model, whose adapters do something, in evaluation."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(key in name for key in ("lora_", "poly_", "modules_to_save", "trainable_tokens")):
                p.add_(torch.randn_like(p) / 4)
    return model.eval()


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Run `work` in some threads at a time; what one of them raises is raised."""
    failed: list[BaseException] = []

    def run(i: int) -> None:
        try:
            with torch.no_grad():
                work(i)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def alike(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_adapter_runs_in_several_threads(kind: str) -> None:
    model = adapted(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        wanted = model(IDS)

    def work(_: int) -> None:
        for _ in range(40):
            alike(model(IDS), wanted)

    in_threads(work)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_mixed_batches_and_plain_ones_do_not_see_each_other(kind: str) -> None:
    model = adapted(kind)
    alone: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in NAMES[:2]:
            model.set_adapter(name)
            alone[name] = model(IDS)
        with model.disable_adapter():
            alone[BASE] = model(IDS)
        model.set_adapter("default")

    def work(i: int) -> None:
        for step in range(15):
            names = [NAMES[(i + step + row) % 3] for row in range(4)]
            wanted = torch.stack([alone[name][row] for row, name in enumerate(names)])
            alike(*((model(IDS, adapter_names=names), wanted) if i % 2 else (model(IDS), alone["default"])))

    in_threads(work)
    assert model.base_model.call.plain and model.base_model.call.names is None
    with torch.no_grad():
        alike(model(IDS), alone["default"])


def test_each_thread_has_its_own_tasks() -> None:
    torch.manual_seed(0)
    model = filled(get_peft_model(Net(), peft.PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["up"])))
    tasks = [torch.tensor([i, (i + 1) % 3, 0, i]) for i in range(3)]
    with torch.no_grad():
        wanted = [model(IDS, task_ids=t) for t in tasks]

    def work(i: int) -> None:
        for _ in range(25):
            alike(model(IDS, task_ids=tasks[i]), wanted[i])

    in_threads(work, 3)


@pytest.mark.filterwarnings("ignore:aLoRA is currently:peft.PeftWarning")
def test_each_thread_finds_the_tokens_of_its_own_text() -> None:
    torch.manual_seed(0)
    model = filled(get_peft_model(Tokens(), LoraConfig(r=2, target_modules=["up"], alora_invocation_tokens=[7, 8])))
    texts = [torch.randint(9, 20, (2, 6 + i)) for i in range(4)]
    for i, text in enumerate(texts):
        text[:, i : i + 2] = torch.tensor([7, 8])
    with torch.no_grad():
        wanted = [model(input_ids=text) for text in texts]

    def work(i: int) -> None:
        for _ in range(25):
            alike(model(input_ids=texts[i]), wanted[i])

    in_threads(work)


def test_all_layers_have_followed_a_switch_before_any_thread_runs() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=r".*")
    model = get_peft_model(nn.Sequential(*(nn.Linear(8, 8) for _ in range(30))), config)
    model.add_adapter("other", config)
    filled(model)
    x, alone = torch.randn(2, 8), {}
    with torch.no_grad():
        for name in NAMES[:2]:
            model.set_adapter(name)
            alone[name] = model(x)
    for step in range(40):
        name = NAMES[step % 2]
        model.set_adapter(name)
        together = threading.Barrier(4)

        def work(_: int, together: threading.Barrier = together, name: str = name) -> None:
            together.wait()
            alike(model(x), alone[name])

        in_threads(work)


def test_a_copy_has_turns_of_its_own() -> None:
    import copy
    import pickle

    model = adapted("attention")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with model.base_model.call.alone(), torch.no_grad():
            done = threading.Thread(target=lambda other=other: other(IDS, adapter_names=["other"] * 4), daemon=True)
            done.start()
            done.join(5)
            assert not done.is_alive()


def test_threads_may_ask_at_once_for_a_package_and_for_a_file_of_it(tmp_path, monkeypatch):
    looking = threading.Event()
    rooms = [f"outer_room_{i}" for i in range(8)]  # without the order of imports, every other one fails

    class Slow(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name in rooms:
                looking.set()
                time.sleep(0.03)

    found: dict[str, Any] = {}

    def ask(place: str) -> None:
        try:
            found[place] = registry.load(f"{place}:Inner")
        except RuntimeError as error:  # Python found that the two wait for each other
            found[place] = error

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [Slow(), *sys.meta_path])
    for room in rooms:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("from .inner import Inner\n")
        (tmp_path / room / "inner.py").write_text("class Inner: ...\n")
        looking.clear()
        threads = [threading.Thread(target=ask, args=(place,)) for place in (room, f"{room}.inner")]
        for thread in threads:
            thread.start()
            looking.wait(10)
        for thread in threads:
            thread.join(20)
    assert all(isinstance(found[room], type) and found[room] is found[f"{room}.inner"] for room in rooms), found
