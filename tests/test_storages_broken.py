"""Packages that raise when they are imported or lack what is asked of them: nobody else is concerned."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.storages import borrowed
from tests.storages_common import Net, qualified

PACKAGES = [
    *("aqlm", "auto_gptq", "autoawq", "awq", "bitsandbytes", "compressed_tensors", "deepspeed", "eetq", "gptqmodel"),
    *("hqq", "intel_extension_for_pytorch", "kernels", "megatron", "modelopt", "neural_compressor", "optimum"),
    *("quanto", "torchao", "transformer_engine"),
]
RAISED = [
    "raise ImportError('libcudart.so.13: cannot open shared object file')",
    "raise RuntimeError('compiled for another version of torch')",
    "raise OSError('libbroken.so: undefined symbol')",
    "raise AttributeError('module torch has no attribute _six')",
]

ROAD = """
import sys
sys.path[:0] = [{folder!r}]
import torch
from torch import nn
import peft
from peft import IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model

x = torch.randn(3, 8)
configs = [
    LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights="pissa"),
    OFTConfig(oft_block_size=4, target_modules=["0"]),
    IA3Config(target_modules=["2"], feedforward_modules=[]),
]
for n, config in enumerate(configs):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = get_peft_model(base, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    wanted = model.eval()(x)
    model.save_pretrained(f"{folder}/adapter{{n}}")
    model.print_trainable_parameters()
    model.get_model_status(), model.get_layer_status(), repr(model)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    loaded = PeftModel.from_pretrained(base, f"{folder}/adapter{{n}}").eval()
    torch.testing.assert_close(loaded(x), wanted)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)
    loaded.unmerge_adapter()
    torch.testing.assert_close(loaded.merge_and_unload()(x), wanted, rtol=1e-4, atol=1e-5)
    peft.prepare_model_for_kbit_training(nn.Sequential(nn.Linear(8, 8)))
    peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
assert not [name for name in {packages!r} if name in sys.modules]
print("the whole road")
"""


def broken(folder):
    """A folder of packages that cannot be imported, each of which leaves a note when that is tried."""
    for n, name in enumerate(PACKAGES):
        (folder / name).mkdir()
        note = f"open({str(folder / 'tried')!r}, 'a').write({name!r} + '\\n')\n"
        (folder / name / "__init__.py").write_text(note + RAISED[n % len(RAISED)])


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_broken_packages_concern_nobody_else(tmp_path):
    broken(tmp_path)
    found = run(ROAD.format(folder=str(tmp_path), packages=PACKAGES))
    assert found.endswith("the whole road\n")
    assert not (tmp_path / "tried").exists()  # none of them was asked for at all


def test_broken_packages_beside_transformers(tmp_path):
    """transformers looks for some of these packages itself; what it makes of them is its own affair."""
    pytest.importorskip("transformers")
    broken(tmp_path)
    code = f"""
    import sys, torch
    from transformers import LlamaConfig, LlamaForCausalLM
    import accelerate
    sys.path[:0] = [{str(tmp_path)!r}]
    from peft import LoraConfig, PeftModel, get_peft_model
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**sizes)
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    ids = torch.arange(8)[None]
    wanted = model.eval()(ids).logits
    model.save_pretrained({str(tmp_path / "adapter")!r})
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(config), {str(tmp_path / "adapter")!r}).eval()
    assert torch.equal(loaded(ids).logits, wanted)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    print("the whole road")
    """
    assert run(textwrap.dedent(code)).endswith("the whole road\n")


def test_a_torch_without_the_newest_kinds_of_numbers_is_enough_for_everything_else():
    code = """
    import torch
    del torch.float8_e8m0fnu  # as before torch 2.7
    from torch import nn
    from peft import LoraConfig, get_peft_model
    from peft.storages import codes

    class Own(nn.Sequential):
        pass

    model = get_peft_model(Own(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model(torch.randn(3, 8)).sum().backward()
    try:
        codes.exponents(torch.zeros(2, dtype=torch.uint8))
    except RuntimeError as error:
        print(error)
    """
    assert "E8M0 need torch 2.7" in run(textwrap.dedent(code))


class HQQLinear(nn.Module):
    """A layer of a library of which too little is installed."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = 8, 4, torch.float32
        self.W_q = nn.Parameter(torch.zeros(4, 8, dtype=torch.uint8), requires_grad=False)
        self.meta, self.quant_config, self.bias = {"shape": (4, 8)}, {}, None

    def forward(self, x):
        return x[..., :4]


qualified(HQQLinear, "hqq.core.quantize", "HQQLinear")
HALF = {
    "raises": "raise RuntimeError('compiled for another version of torch')",
    "lacks it": "Nothing = None",
}


@pytest.mark.parametrize("text", HALF.values(), ids=HALF)
def test_a_half_broken_package_is_named_where_a_layer_of_it_is_adapted(text, tmp_path, monkeypatch):
    (tmp_path / "hqq" / "core").mkdir(parents=True)
    for place in ("hqq", "hqq/core"):
        (tmp_path / place / "__init__.py").touch()
    (tmp_path / "hqq" / "core" / "quantize.py").write_text(text)
    for name in [n for n in sys.modules if n.partition(".")[0] == "hqq"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    plain = get_peft_model(Net(nn.Linear(8, 4)), LoraConfig(r=2, target_modules="all-linear"))
    plain.merge_adapter()
    held = Net(HQQLinear())
    x = torch.randn(3, 8)
    named = r"weight of hqq.*hqq.core.quantize.Quantizer.*pip install -U hqq"
    with pytest.raises(ImportError, match=named):  # DoRA needs the numbers to begin with
        get_peft_model(held, LoraConfig(r=2, target_modules=["layer"], use_dora=True))
    assert type(held.layer) is HQQLinear
    model = get_peft_model(held, LoraConfig(r=2, target_modules=["layer"]))
    with torch.no_grad():
        assert torch.equal(model(x), x[..., :4])  # the layer itself works, and LoRA needs no more
    with pytest.raises(ImportError, match=named):
        model.merge_adapter()
    assert not model.base_model.model.layer.merged
    for name in [n for n in sys.modules if n.partition(".")[0] == "hqq"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", ["dequantize_4bit", "quantize_4bit"])
def test_bitsandbytes_without_a_function(name, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    model = get_peft_model(Net(layer.to("cpu")), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    monkeypatch.delattr(bnb.functional, name)
    with pytest.raises(ImportError, match=f"bitsandbytes.functional.{name}.*pip install -U bitsandbytes"):
        model.merge_adapter()
    assert not model.base_model.model.layer.merged


def test_what_is_there_is_borrowed():
    assert borrowed.borrow("torch.nn", "Linear") is nn.Linear
