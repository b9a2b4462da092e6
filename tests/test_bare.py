"""The library with torch and safetensors alone.

Runs where nothing else is installed (`make bare`), and in the full environment both as it is and once more in
a process that cannot see any optional package.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model

OPTIONAL = [
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "pyarrow",
    "rich",
    "scipy",
    "sklearn",
    "tokenizers",
    "torchao",
    "tqdm",
    "transformers",
    "typer",
    "yaml",
]

HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not hidden", {file}]))
"""


class Net(nn.Module):
    """Two layers, (B, 8) -> (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


def base() -> Net:
    """The same network every time."""
    torch.manual_seed(1)
    return Net()


def trained() -> tuple[PeftModel, Tensor]:
    """LoRA on both layers after three steps, and an input."""
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["fc1", "fc2"]))
    x, y = torch.randn(16, 8), torch.randn(16, 4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval(), x


def test_a_fresh_adapter_changes_nothing() -> None:
    x = torch.randn(3, 8)
    model = get_peft_model(base(), LoraConfig(target_modules=["fc1"]))
    assert torch.equal(model(x), base()(x))


def test_training_moves_the_adapter_and_leaves_the_base() -> None:
    model, x = trained()
    weights = model.get_base_model().state_dict()
    for name, expected in base().state_dict().items():
        assert torch.equal(weights[name.replace(".", ".base_layer.")], expected)
    assert (model(x) - base()(x)).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), base()(x))


def test_a_saved_adapter_loads_with_equal_outputs(tmp_path: Path) -> None:
    model, x = trained()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x), model(x))


def test_merging_keeps_the_outputs_and_unmerging_restores_every_bit() -> None:
    model, x = trained()
    before, expected = {n: p.clone() for n, p in model.state_dict().items()}, model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_merge_and_unload_gives_back_a_plain_network() -> None:
    model, x = trained()
    expected = model(x)
    plain = model.merge_and_unload()
    assert list(plain.state_dict()) == list(base().state_dict())
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)


STEPS_OF_A_LOADER = "peft.utils.adapter_transforms"  # subclasses of transformers' own: only its loader asks for them


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(peft.__path__, "peft."):
        if not module.name.endswith("__main__") and module.name != STEPS_OF_A_LOADER:
            importlib.import_module(module.name)


def test_all_of_it_holds_with_optional_packages_hidden() -> None:
    pytest.importorskip("transformers", reason="the environment is bare already")
    program = HIDE.format(hidden=set(OPTIONAL), file=repr(__file__))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_name_is_had_without_numpy():
    hidden = "import sys; sys.modules['numpy'] = None; "
    done = subprocess.run(
        [sys.executable, "-c", hidden + "from peft import *; UniLoraConfig, AdamssModel"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
