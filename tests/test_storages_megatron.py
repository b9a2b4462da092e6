"""Megatron's parallel layers, as their documentation has them: sizes, tuples, and a bias that is returned apart."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft import BOFTConfig, IA3Config, LoraConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from tests.storages_common import qualified


class Parallel(nn.Module):
    """What both kinds share."""

    def __init__(self, input_size, output_size, bias=True, skip_bias_add=False, parts=1):
        super().__init__()
        self.input_size, self.output_size, self.skip_bias_add = input_size, output_size, skip_bias_add
        self.weight = nn.Parameter(torch.randn(output_size, input_size) / 4)
        self.bias = nn.Parameter(torch.randn(output_size)) if bias else None
        self.parts = parts

    def forward(self, input_, weight=None, runtime_gather_output=None):
        bias = None if self.skip_bias_add else self.bias
        y = F.linear(input_, self.weight if weight is None else weight, bias)
        return y, self.bias if self.skip_bias_add else None


class Column(Parallel):
    """Rows of the weight on each process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.output_size_per_partition, self.gather_output = self.output_size // self.parts, False


class Row(Parallel):
    """Columns of the weight on each process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.input_size_per_partition, self.input_is_parallel = self.input_size // self.parts, True


qualified(Column, "megatron.core.tensor_parallel.layers", "ColumnParallelLinear")
qualified(Row, "megatron.core.tensor_parallel.layers", "RowParallelLinear")


class Block(nn.Module):
    """A feed-forward block as Megatron writes it."""

    def __init__(self, skip=False, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = Column(8, 16, bias, skip), Row(16, 8, bias, skip)

    def forward(self, x):
        h, apart = self.up(x)
        h = torch.tanh(h if apart is None else h + apart)
        y, apart = self.down(h)
        return y if apart is None else y + apart


class Plain(nn.Module):
    """The same with ordinary layers."""

    def __init__(self, block):
        super().__init__()
        self.up, self.down = (
            nn.Linear(m.input_size, m.output_size, m.bias is not None) for m in (block.up, block.down)
        )
        self.load_state_dict(block.state_dict())

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


CONFIGS = {
    "lora": lambda: LoraConfig(r=2, init_lora_weights=False, target_modules=["up", "down"], megatron_config={"a": 1}),
    "dora": lambda: LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", use_dora=True),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["up", "down"], init_weights=False),
    "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=["up", "down"], init_weights=False),
    "ia3": lambda: IA3Config(target_modules=["up", "down"], feedforward_modules=[], init_ia3_weights=False),
}
forms = pytest.mark.parametrize(("skip", "bias"), [(False, True), (True, True), (False, False)])


def pair(method, skip, bias):
    """(adapted block, the same adapter on ordinary layers)."""
    block = Block(skip, bias)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(block), CONFIGS[method]())
    plain = get_peft_model(Plain(block), CONFIGS[method]())
    plain.load_state_dict(model.state_dict())
    return model, plain


@forms
@pytest.mark.parametrize("method", CONFIGS)
def test_as_on_ordinary_layers(method, skip, bias):
    model, plain = pair(method, skip, bias)
    x = torch.randn(3, 8)
    found, wanted = model(x), plain(x)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, Block(skip, bias)(x))
    for y in (found, wanted):
        y.square().sum().backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], msg=name)


@forms
def test_merged_disabled_and_mixed(skip, bias):
    model, _ = pair("lora", skip, bias)
    x, base = torch.randn(3, 8), Block(skip, bias)
    wanted = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    mixed = model.eval()(x, adapter_names=["__base__", "default", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([base(x)[0], wanted[1], base(x)[2]]))
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), wanted)


def test_files_are_those_of_ordinary_layers():
    model, plain = pair("lora", True, True)
    found, wanted = get_peft_model_state_dict(model), get_peft_model_state_dict(plain)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


def test_further_arguments_reach_the_layer():
    model, plain = pair("lora", False, True)
    other = torch.randn(16, 8)
    y, apart = model.base_model.model.up(torch.ones(2, 8), weight=other)
    lora = plain.base_model.model.up
    plain.base_model.model.up.get_base_layer().weight.data = other
    torch.testing.assert_close(y, lora(torch.ones(2, 8)))
    assert apart is None


@pytest.mark.parametrize(("kind", "sizes"), [(Column, r"\(8, 8\)"), (Row, r"\(16, 4\)")])
def test_a_part_of_a_weight_is_refused(kind, sizes):
    block = nn.ModuleDict({"layer": kind(8, 16, parts=2)})
    for method in ("lora", "oft"):
        config = CONFIGS[method]()
        config.target_modules = {"layer"}
        with pytest.raises(ValueError, match=rf"holds {sizes}.*tensor-parallel size of 1"):
            get_peft_model(block, config)
    assert type(block["layer"]) is kind
