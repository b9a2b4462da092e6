"""Another adapter's weights in place of those that a model runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.measure import calls
from conformance.layouts import LAYOUTS
from conformance.rows import METHODS, adapted, cells, config, train
from peft import (
    FourierFTConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import KasaConfig, LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

SOME = ("linear", "conv-2d", "conv-2d-grouped", "embedding", "attention-packed", "attention-separate", "parameter-two")
CELLS = [c for c in cells() if c[1] in SOME]
FITTING = [m for m, layout in CELLS if layout == "linear" and not METHODS[m].tasks and m != "boft"]  # 8 features


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


X = torch.linspace(-1, 1, 24).view(3, 8)


def made(seed: int = 0, **fields: Any) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": r"layers\.\d", **fields})
    model = get_peft_model(Net(), config)
    train(model, seed=seed)
    return model.eval()


def swap(model: Any, other: PeftModel) -> None:
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])


OTHERS = {
    "the same": {},
    "a smaller rank": {"r": 2},
    "a larger rank": {"r": 7, "lora_alpha": 1},
    "other patterns": {"rank_pattern": {"layers.1": 6}, "r": 3},
    "fewer layers": {"target_modules": ["layers.0", "layers.2"], "r": 5},
    "a bias": {"lora_bias": True},
    "a start from the base weight": {"init_lora_weights": "pissa"},
    "such a start in fewer layers": {"init_lora_weights": "pissa", "target_modules": ["layers.1"], "r": 2},
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_the_model_answers_as_with_the_other_adapter_and_back_again(fields: dict[str, Any], tmp_path: Path) -> None:
    model, other, first = made(), made(1, **fields), made()
    swap(model, other)
    assert torch.allclose(model(X), other(X), atol=1e-6)
    assert model.peft_config["default"].r == other.peft_config["default"].r
    model.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(Net(), tmp_path)(X), other(X), atol=1e-6)
    swap(model, first)
    assert torch.allclose(model(X), first(X), atol=1e-6)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"use_rslora": True}])
def test_variants_are_exchanged(fields: dict[str, Any]) -> None:
    model = made(**fields)
    for other in (made(1, **fields, r=2), made(2, **fields, r=9), made(3, **fields, target_modules=["layers.1"])):
        swap(model, other)
        assert torch.allclose(model(X), other(X), atol=1e-6)


@pytest.mark.parametrize(("method", "layout"), CELLS)
def test_every_method_is_exchanged_on_every_layout(method: str, layout: str) -> None:
    cell = LAYOUTS[layout]
    model, other = adapted(method, cell), adapted(method, cell)
    train(other, seed=5)
    tensors = {id(p) for p in model.parameters()}
    swap(model, other)
    assert torch.equal(model(cell.x()), other(cell.x()))
    assert {id(p) for p in model.parameters()} == tensors


@pytest.mark.filterwarnings("ignore::peft.PeftWarning")
@pytest.mark.parametrize("more", [{}, {"r": 2}], ids=str)
@pytest.mark.parametrize("method", FITTING)
def test_an_adapter_of_fewer_layers_is_itself_or_refused(method: str, more: dict[str, Any]) -> None:
    def wrapped(seed: int, targets: str, **fields: Any) -> PeftModel:
        model = get_peft_model(Net(), config(method, LAYOUTS["linear"], target_modules=targets, **fields))
        train(model, seed=seed)
        return model.eval()

    more = {k: v for k, v in more.items() if k in METHODS[method].fields}
    model, other = wrapped(0, r"layers\.\d"), wrapped(1, r"layers\.1", **more)
    before = model(X)
    try:
        swap(model, other)
    except (ValueError, RuntimeError):
        assert torch.equal(model(X), before)
    else:
        assert torch.allclose(model(X), other(X), atol=1e-5)


@pytest.mark.parametrize("layout", ["conv-2d", "conv-2d-grouped", "embedding", "parameter-3-D", "attention-packed"])
@pytest.mark.parametrize("ranks", [(4, 2), (2, 4)])
def test_ranks_differ_on_every_layout(layout: str, ranks: tuple[int, int]) -> None:
    cell = LAYOUTS[layout]
    model, other = (adapted("lora", cell, r=r) for r in ranks)
    swap(model, other)
    assert torch.allclose(model(cell.x()), other(cell.x()), atol=1e-5)
    state, wanted = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in wanted.items()}
    assert all(torch.equal(v, wanted[k]) for k, v in state.items())


def test_loftq_of_fewer_layers_is_refused() -> None:
    fields = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    with pytest.raises(RuntimeError, match="LoftQ has none that leave a layer as it is"):
        swap(made(**fields), made(1, target_modules=["layers.1"], **fields))


def test_a_saved_adapter_is_exchanged(tmp_path: Path) -> None:
    model, other = made(), made(1, r=2)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.allclose(model(X), other(X), atol=1e-6)


def test_a_model_with_injected_adapters_takes_keys_without_a_prefix() -> None:
    model, other = (inject_adapter_in_model(LoraConfig(r=2, target_modules=["layers.0"]), Net()) for _ in range(2))
    other.layers[0].lora_B["default"].weight.data.normal_()
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])
    assert torch.equal(model(X), other(X))


def test_whole_modules_are_exchanged_too() -> None:
    model, other = (made(s, target_modules=["layers.0"], modules_to_save=["layers.2"]) for s in (0, 1))
    other.base_model.model.layers[2].modules_to_save["default"].weight.data.add_(1)
    swap(model, other)
    assert torch.equal(model(X), other(X))


# ---- compiled models --------------------------------------------------------------------------------------------


KINDS = {"plain": {}, "DoRA": {"use_dora": True}, "a start from the base weight": {"init_lora_weights": "pissa"}}


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_a_prepared_model_is_never_compiled_again(fields: dict[str, Any]) -> None:
    model = made(**fields)
    expected = model(X)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert torch.allclose(model(X), expected, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(50):
            other = made(seed, r=1 + seed % 8, lora_alpha=1 + seed, **fields)
            swap(compiled, other)
            assert torch.allclose(compiled(X), other(X), atol=2e-6)  # compiling again would raise


BESIDE = {
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig()},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig(scale="unit")},
    "kasa": {"kasa_config": KasaConfig()},
    "kasa-dora": {"kasa_config": KasaConfig(), "use_dora": True},
}


def started(seed: int, kind: str, layout: str = "", **fields: Any) -> PeftModel:
    """A model whose adapter holds more of a rank beside A and B: first factors, or d and the least directions."""
    cell = LAYOUTS.get(layout)
    base, x = (Net(), X) if cell is None else (cell.model(), cell.x())
    targets = {"target_modules": r"layers\.\d"} if cell is None else cell.targets
    config = LoraConfig(**{"lora_alpha": 6, **targets, **BESIDE[kind], **fields})
    if kind == "corda":
        preprocess_corda(base, config, lambda: base(x))
    elif kind == "lora_ga":
        preprocess_loraga(base, config, lambda: base(x).square().sum().backward())
    model = get_peft_model(base, config)
    train(model, seed=seed)
    return model.eval()


@pytest.mark.parametrize("kind", BESIDE)
def test_a_prepared_model_has_room_for_what_lies_beside_the_factors(kind: str, tmp_path: Path) -> None:
    model = started(0, kind, r=2)
    expected = model(X)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert torch.allclose(model(X), expected, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(6):
            other = started(seed, kind, r=1 + seed % 4, lora_alpha=1 + seed)
            swap(compiled, other)
            assert torch.allclose(compiled(X), other(X), atol=2e-6)
            if "kasa" in kind:
                terms = [m.base_model._get_kasa_loss() for m in (model, other)]
                torch.testing.assert_close(*terms)
    model.save_pretrained(tmp_path)
    wanted = get_peft_model_state_dict(other)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert state.keys() == wanted.keys() and all(torch.equal(v, state[k]) for k, v in wanted.items())
    assert torch.allclose(PeftModel.from_pretrained(Net(), tmp_path)(X), other(X), atol=1e-6)


@pytest.mark.parametrize("layout", ["conv-2d", "embedding", "parameter-3-D", "attention-packed", "conv-2d-grouped"])
@pytest.mark.parametrize("kind", ["lora_ga", "kasa"])
def test_there_is_such_room_on_every_layout(kind: str, layout: str) -> None:
    if (kind, layout) == ("lora_ga", "conv-2d-grouped"):
        return  # a start from the weight is refused beside groups
    cell = LAYOUTS[layout]
    model, other = started(0, kind, layout, r=2), started(1, kind, layout, r=2 if cell.grouped else 3)
    expected, x = model(cell.x()), cell.x()
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch.testing.assert_close(model(x), expected)
    tensors = {id(p) for p in model.parameters()}
    swap(model, other)
    torch.testing.assert_close(model(x), other(x))
    assert {id(p) for p in model.parameters()} == tensors
    state, wanted = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
    assert all(torch.equal(v, state[k]) for k, v in wanted.items())


def test_a_prepared_model_saves_its_adapter_without_the_room(tmp_path: Path) -> None:
    model, plain = made(rank_pattern={"layers.1": 3}), made(rank_pattern={"layers.1": 3})
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert model.peft_config["default"].r == 8
    assert set(model.peft_config["default"].rank_pattern.values()) == {8}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.allclose(again(X), plain(X), atol=1e-6)
    state, wanted = get_peft_model_state_dict(model), get_peft_model_state_dict(plain)
    assert all(torch.equal(v, state[k]) for k, v in wanted.items())
    model.load_adapter(tmp_path, "default")
    assert torch.allclose(model(X), plain(X), atol=1e-6)


def test_a_scaling_in_double_precision_keeps_its_digits() -> None:
    def doubled(r: int) -> PeftModel:
        torch.manual_seed(r)
        body = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).double()
        config = LoraConfig(r=r, lora_alpha=16, target_modules=["0", "1"], init_lora_weights=False)
        return get_peft_model(body, config).eval()

    model, other, x = doubled(3), doubled(7), torch.ones(2, 5, dtype=torch.float64)
    other.base_model.model.load_state_dict(
        {k: v for k, v in model.base_model.model.state_dict().items() if "base_layer" in k}, strict=False
    )
    before = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(x), before, rtol=1e-14, atol=1e-14)
    swap(model, other)
    torch.testing.assert_close(model(x), other(x), rtol=1e-14, atol=1e-14)


def test_room_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 4 at 'layers\.0', more than target_rank=2"):
        prepare_model_for_compiled_hotswap(made(), target_rank=2)
    with pytest.raises(ValueError, match="no adapter layers"):
        prepare_model_for_compiled_hotswap(Net(), target_rank=2)
    with pytest.raises(ValueError, match="multiple of the 2 groups"):
        prepare_model_for_compiled_hotswap(adapted("lora", LAYOUTS["conv-2d-grouped"]), target_rank=7)
    compiled = torch.compile(made(), backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="ignore")
    with pytest.raises(ValueError, match="check_compiled"):
        prepare_model_for_compiled_hotswap(made(), check_compiled="never")


def test_an_exchange_calls_few_functions_for_each_layer() -> None:
    def stacked(rank: int) -> Any:
        base = nn.Sequential(*(Net() for _ in range(20)))
        return get_peft_model(base, LoraConfig(r=rank, target_modules=r".*layers\.\d", init_lora_weights=False))

    model, other = stacked(8), stacked(4)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    state, config = get_peft_model_state_dict(other), other.peft_config["default"]
    hotswap_adapter_from_state_dict(model, state, "default", config)
    count = calls(lambda: hotswap_adapter_from_state_dict(model, state, "default", config))
    assert count <= 350 * 60


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("use_rslora", (True, False)),
        ("lora_dropout", (0.1, 0.0)),
        ("alpha_pattern", ({}, {"0": 3})),
        ("use_dora", (True, False)),
    ],
)
def test_configurations_that_differ_in_more_than_rank_and_scaling_are_refused(field: str, values: Any) -> None:
    one, other = (LoraConfig(target_modules=["layers.0"], **{field: v}) for v in values)
    with pytest.raises(ValueError, match=f"incompatible: for {field}"):
        check_hotswap_configs_compatible(one, other)
    check_hotswap_configs_compatible(one, one)


def test_other_methods_must_agree_in_what_their_tensors_do_not_say() -> None:
    with pytest.raises(ValueError, match="PEFT types"):
        check_hotswap_configs_compatible(LoraConfig(target_modules=["a"]), IA3Config(target_modules=["a"]))
    one, other = (FourierFTConfig(target_modules=["a"], n_frequency=n) for n in (3, 4))
    with pytest.raises(ValueError, match="n_frequency, 3 != 4"):
        check_hotswap_configs_compatible(one, other)


def test_a_failed_exchange_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(target_modules=["layers.0", "layers.1"])
    before, expected, fields = dict(model.state_dict()), model(X).detach(), dict(vars(model.peft_config["default"]))
    values = {k: v.clone() for k, v in before.items()}
    with pytest.raises(RuntimeError, match=r"no place in it.*layers.2"):
        swap(model, made(1))
    other = made(1, target_modules=["layers.0", "layers.1"], r=7)
    state, config = get_peft_model_state_dict(other), other.peft_config["default"]
    half = {k: v for k, v in state.items() if "layers.1.lora_A" not in k}
    with pytest.raises(RuntimeError, match=r"lacks 'lora_A.weight' of 'layers.1'"):
        hotswap_adapter_from_state_dict(model, half, "default", config)
    with pytest.raises(RuntimeError, match="size mismatch"):
        hotswap_adapter_from_state_dict(model, state, "default", LoraConfig(r=6, target_modules=["layers.0"]))
    with pytest.raises(RuntimeError, match="no tensors"):
        hotswap_adapter_from_state_dict(model, {}, "default", config)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        hotswap_adapter_from_state_dict(model, state, "other", config)

    with monkeypatch.context() as patch:
        patch.setattr("peft.hotswap.swap.rebuild", _fails_later())
        with pytest.raises(MemoryError):
            swap(model, other)
    assert torch.equal(model(X), expected)
    assert vars(model.peft_config["default"]) == fields
    after = model.state_dict()
    assert after.keys() == values.keys()
    assert all(torch.equal(after[k], v) for k, v in values.items())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        swap(model, made(1, target_modules=["layers.0", "layers.1"]))


def _fails_later() -> Any:
    """`rebuild`, which fails when everything else and the first layer have been written."""
    from peft.hotswap.change import rebuild

    calls: list[Any] = []

    def second_fails(change: Any, undo: Any) -> None:
        calls.append(change)
        if len(calls) > 1:
            raise MemoryError
        rebuild(change, undo)

    return second_fails


def test_a_method_without_a_neutral_form_needs_all_its_layers() -> None:
    def model(*targets: str) -> PeftModel:
        return get_peft_model(Net(), IA3Config(target_modules=list(targets), feedforward_modules=[]))

    with pytest.raises(RuntimeError, match=r"no tensors for 'layers.1'"):
        swap(model("layers.0", "layers.1"), model("layers.0"))


def test_dropout_of_attention_warns_once_when_the_layer_is_made() -> None:
    with pytest.warns(PeftWarning, match="lora_dropout"):
        model, other = (adapted("lora", LAYOUTS["attention-packed"], lora_dropout=0.1) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap(model, other)


def test_prompts_are_exchanged() -> None:
    transformers = pytest.importorskip("transformers")
    from peft import PromptTuningConfig

    def model(seed: int) -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=16)
        found = get_peft_model(
            transformers.GPT2LMHeadModel(config), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        )
        torch.manual_seed(seed)
        for parameter in (p for p in found.parameters() if p.requires_grad):
            parameter.data.normal_()
        return found.eval()

    one, other, tokens = model(1), model(2), torch.tensor([[1, 2, 3]])
    swap(one, other)
    assert torch.equal(one(tokens).logits, other(tokens).logits)


class Words(nn.Module):
    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        with torch.no_grad():
            self.embed_tokens.weight += bias

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed_tokens(x))


def worded(folder: Path, bias: float, seed: int) -> torch.Tensor:
    """Saves an adapter on embeddings, with these beside it; gives the answer."""
    config = LoraConfig(r=2, target_modules=["embed_tokens", "head"], init_lora_weights=False)
    torch.manual_seed(seed)
    model = get_peft_model(Words(bias), config).eval()
    model.save_pretrained(folder)
    return model(torch.arange(9))


@pytest.mark.parametrize("bias", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore:The embeddings are saved")
def test_embeddings_saved_beside_an_adapter_are_exchanged_with_it(tmp_path: Path, bias: float) -> None:
    wanted = [worded(tmp_path / "0", 0.0, 1), worded(tmp_path / "1", bias, 2)]
    model = PeftModel.from_pretrained(Words(), tmp_path / "0").eval()
    for i in (1, 0, 1):
        hotswap_adapter(model, str(tmp_path / str(i)), "default")
        with torch.no_grad():
            assert torch.equal(model(torch.arange(9)), wanted[i])


@pytest.mark.filterwarnings("ignore:The embeddings are saved")
def test_embeddings_of_another_size_are_refused(tmp_path: Path) -> None:
    worded(tmp_path, 0.0, 1)
    model = PeftModel.from_pretrained(Words(), tmp_path).eval()
    wide = nn.Embedding(11, 6).weight.detach()
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: wide if "base_layer" in k else v for k, v in load_file(file).items()}, file)
    before = model(torch.arange(9))
    with pytest.raises(RuntimeError, match="brings embeddings of its own"):
        hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(model(torch.arange(9)), before)
