"""What a compensated merge looks at: the directions of the layers' inputs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from peft import LoraConfig, LossyMergeWarning, get_peft_model

transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
warnings.filterwarnings("ignore", module="bitsandbytes")


class Narrow(nn.Module):
    """A layer whose inputs lie along few directions, which no weight tells."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("spread", torch.randn(4, 256, generator=generator) * 4)
        weight = torch.randn(256, 256, generator=generator) / 16
        self.fc = bnb.nn.Linear4bit(256, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        self.fc.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=self.fc)
        self.fc.to("cpu")

    def forward(self, codes):
        return self.fc(codes @ self.spread)


def adapted():
    torch.manual_seed(0)
    model = get_peft_model(Narrow(), LoraConfig(r=4, target_modules=["fc"]))
    nn.init.normal_(model.base_model.model.fc.lora_B["default"].weight, std=0.01)
    return model.eval()


def codes(seed):
    return torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))


def gap(model, wanted, **how):
    """How far the merged model is from the wanted outputs, relative; the model is unmerged again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossyMergeWarning)
        model.merge_adapter(quantized="compensated", **how)
    with torch.no_grad():
        error = (model(codes(1)) - wanted).norm() / wanted.norm()
    model.unmerge_adapter()
    return float(error)


@torch.no_grad()
def test_a_merge_that_knows_the_inputs_is_nearer():
    model = adapted()
    wanted = model(codes(1))
    blind = gap(model, wanted)
    for calibration in ([codes(2)], [(codes(2),)], [{"codes": codes(2)}], lambda m: m(codes(2))):
        assert gap(model, wanted, calibration=calibration) < 0.5 * blind
    assert torch.equal(model(codes(1)), wanted)


def test_merging_twice_in_the_same_way_gives_the_same_weight():
    model, layer = adapted(), lambda: model.base_model.model.fc.get_base_layer().weight
    found = []
    for _ in range(2):
        model.merge_adapter(quantized="compensated", calibration=[codes(2)])
        found.append(layer().detach().clone())
        model.unmerge_adapter()
    assert torch.equal(*found)


def llama(kind="llama"):
    shape = dict(vocab_size=64, hidden_size=64, num_attention_heads=4)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.LlamaConfig(intermediate_size=128, num_hidden_layers=1, **shape)
        model = transformers.LlamaForCausalLM(config)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, False, torch.float32, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(child.weight.data, False, quant_type="nf4", module=new)
                setattr(module, name, new.to("cpu"))
    return model


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_language_model_is_shown_random_tokens_and_left_as_it_was(kind):
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"] if kind == "llama" else ["q", "wo"]
    model = get_peft_model(llama(kind), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model.train()
    model.base_model.model.get_input_embeddings().eval()
    modes = {n: m.training for n, m in model.named_modules()}
    state, hooks = torch.get_rng_state(), [len(m._forward_pre_hooks) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LossyMergeWarning)
        found = model.merge_adapter(quantized="compensated")
    layers = [m for n, m in model.named_modules() if n in {f"base_model.model.{path}" for path in found}]
    assert layers and all(x.seen is not None and x.seen.shape[1] > 1 for x in layers)
    for x in layers:
        torch.testing.assert_close(x.seen.mT @ x.seen, torch.eye(x.seen.shape[1]))
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_does_not_run_on_tokens_alone_is_told_of_and_merged():
    class Needy(transformers.LlamaForCausalLM):
        def forward(self, input_ids, *, pictures):
            return super().forward(input_ids)

    model = llama()
    model.__class__ = Needy
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="pictures.*calibration=BATCHES"):
        model.merge_adapter(quantized="compensated")
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged


@pytest.mark.parametrize(
    ("calibration", "error"),
    [
        ({"codes": codes(2)}, TypeError),
        (codes(2), TypeError),
        ("data", TypeError),
        (3, TypeError),
        ([], ValueError),
        ([torch.ones(2, 3)], RuntimeError),
    ],
)
def test_a_calibration_that_cannot_be_is_refused_and_nothing_is_merged(calibration, error):
    model = adapted()
    with pytest.raises(error):
        model.merge_adapter(quantized="compensated", calibration=calibration)
    assert not model.base_model.model.fc.merged
    with pytest.raises(ValueError, match="calibration is for"):
        model.merge_adapter(quantized="requantize", calibration=[codes(2)])
