"""Methods whose layers share tensors: VB-LoRA (a bank), RandLoRA (matrices), trainable tokens (rows of tied layers)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import (
    FrodConfig,
    PeftModel,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.core.shared import shared_of
from peft.utils.hotswap import hotswap_adapter


class Two(nn.Module):
    """Two layers of different sizes and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
TARGETS = {"target_modules": ["up", "down"]}


def vblora(**more):
    fields = {"r": 3, "num_vectors": 16, "vector_length": 2, "init_vector_bank_bound": 1.0, **more}
    return VBLoRAConfig(**TARGETS, **fields)


SHARING = {
    "vera": VeraConfig(r=4, **TARGETS),
    "pvera": PveraConfig(r=4, **TARGETS),
    "randlora": RandLoraConfig(r=4, **TARGETS),
    "vblora": VBLoRAConfig(r=2, num_vectors=6, vector_length=2, **TARGETS),
    "unilora": UniLoraConfig(r=2, theta_d_length=16, **TARGETS),
    "tinylora": TinyLoraConfig(r=2, u=4, **TARGETS),
}


@pytest.mark.parametrize("name", SHARING)
def test_what_layers_share_has_the_dtype_of_the_base_where_it_is_asked_for(name, tmp_path):
    def wrapped(**more):
        return get_peft_model(Two().bfloat16(), SHARING[name], **more)

    for model, kind in ((wrapped(), torch.float32), (wrapped(autocast_adapter_dtype=False), torch.bfloat16)):
        shared = [home.tensor("default") for _, home in shared_of(model.base_model)]
        assert {t.dtype for t in shared} == {kind}
    model.add_adapter("second", SHARING[name], autocast_adapter_dtype=False)
    for _, home in shared_of(model.base_model):
        same = home.tensor("second").data_ptr() == home.tensor("default").data_ptr()
        assert same is not home.tensor("default").requires_grad, "what is drawn from a seed is held once"
    model(X.bfloat16()).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(Two().bfloat16(), tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(again(X.bfloat16()), model.eval()(X.bfloat16()))
    assert all(home.tensor("default").dtype is torch.bfloat16 for _, home in shared_of(again.base_model))


SEEDED = {
    "vera": VeraConfig(r=4, init_weights=False, **TARGETS),
    "pvera": PveraConfig(r=4, init_weights=False, **TARGETS),
    "randlora": RandLoraConfig(r=4, init_weights=False, **TARGETS),
    "frod": FrodConfig(init_weights=False, progressbar=False, **TARGETS),
}


def drawn_again(config):
    return replace(config, projection_prng_key=config.projection_prng_key + 1)


def alike(model):
    """Whether two adapters keep all that is drawn once."""
    homes = [home for _, home in shared_of(model.base_model)]
    return bool(homes) and all(h.tensor("default").data_ptr() == h.tensor("second").data_ptr() for h in homes)


@pytest.mark.parametrize("swapped", [False, True], ids=["loaded", "swapped"])
@pytest.mark.parametrize("name", SEEDED)
def test_numbers_written_over_one_adapter_leave_those_that_others_share_with_it(name, swapped, tmp_path):
    model = get_peft_model(Two(), SEEDED[name])
    model.add_adapter("second", SEEDED[name])
    assert alike(model)
    wanted, other = model.eval()(X), get_peft_model(Two(), drawn_again(SEEDED[name])).eval()
    other.peft_config["default"].projection_prng_key -= 1  # as a file of another generator's numbers has it
    if swapped:
        other.save_pretrained(tmp_path)
        hotswap_adapter(model, tmp_path, "second")
    else:
        set_peft_model_state_dict(model, get_peft_model_state_dict(other), "second")
    assert torch.equal(model(X), wanted)
    model.set_adapter("second")
    torch.testing.assert_close(model(X), other(X))


@pytest.mark.parametrize("name", SEEDED)
def test_equal_numbers_of_files_are_kept_once_and_stay_so_when_the_model_moves(name, tmp_path):
    get_peft_model(Two(), SEEDED[name]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Two(), tmp_path)
    model.load_adapter(tmp_path, "second")
    assert alike(model)
    assert alike(model.double())
    model.set_adapter("second")
    second = model.eval()(X.double())
    model.set_adapter("default")
    assert torch.equal(model(X.double()), second)


# ---- VB-LoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("h, kind", [(16, torch.uint8), (300, torch.int16)])
def test_a_file_of_the_weights_in_use_gives_the_same_output(tmp_path, h, kind, dora):
    model = get_peft_model(Two(), vblora(num_vectors=h, topk=3, save_only_topk_weights=True, use_dora=dora)).eval()
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.up.vblora_logits_A_topk"
    assert held[f"{name}_indices"].dtype is kind
    assert held[f"{name}_weights"].shape == (3, 3, 2)
    assert not any(key.endswith(("logits_A", "logits_B")) for key in held)
    again = PeftModel.from_pretrained(Two(), tmp_path).eval()
    torch.testing.assert_close(again(X), model(X))
    again.save_pretrained(tmp_path / "again")
    for key, value in load_file(tmp_path / "again" / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, held[key])


def test_an_adapter_whose_other_logits_are_lost_is_not_trained(tmp_path):
    get_peft_model(Two(), vblora(save_only_topk_weights=True)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Two(), tmp_path, is_trainable=True).train()
    with pytest.raises(RuntimeError, match=r"'default' cannot be trained.*save_only_topk_weights"):
        model(X)
    whole = get_peft_model(Two(), vblora())
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(whole))
    model(X).sum().backward()
    assert model.base_model.vblora_vector_bank.tensor("default").grad.abs().sum() > 0


def test_each_adapter_has_a_bank_of_its_own():
    model = get_peft_model(Two(), vblora())
    first = model.base_model.vblora_vector_bank.tensor("default").clone()
    model.add_adapter("second", vblora(num_vectors=5))
    bank = model.base_model.vblora_vector_bank
    assert torch.equal(bank.tensor("default"), first)
    assert bank.tensor("second").shape == (5, 2)
    assert bank.tensor("default").requires_grad
    assert not bank.tensor("second").requires_grad


def test_vectors_that_do_not_fit_a_layer_name_it():
    with pytest.raises(ValueError, match=r"vector_length=4 must divide .*'up'. Use one of \[1, 2\]"):
        get_peft_model(Two(), vblora(vector_length=4))
    with pytest.raises(ValueError, match="topk=17 is more than num_vectors=16"):
        vblora(topk=17)


@pytest.mark.parametrize(
    "h, only, wanted", [(16, False, 608), (300, False, 8400 + 600), (16, True, 32 + 99), (300, True, 600 + 140)]
)
def test_what_a_file_would_hold_is_counted_in_float32(capsys, h, only, wanted):
    config = vblora(num_vectors=h, topk=3, save_only_topk_weights=only, modules_to_save=["head"])
    model = get_peft_model(Two(), config)
    own, others = model.get_nb_savable_parameters()
    pieces = 3 * (6 + 8 + 8 + 4) // 2
    assert pieces == 39
    each = (2 + 3 * (0.25 if h == 16 else 0.5)) if only else h
    assert own == int(h * 2 + pieces * each)
    assert others == 10
    model.print_savable_parameters()
    assert f"{own + others:,d}" in capsys.readouterr().out


# ---- RandLoRA ----------------------------------------------------------------------------------------------------


def randlora(**more):
    return RandLoraConfig(**TARGETS, r=3, init_weights=False, **more)


def test_copies_of_the_shared_matrices_in_a_file_are_passed_over(tmp_path, recwarn):
    model = get_peft_model(Two(), randlora()).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    assert sum(key.endswith("randlora_A") for key in held) == 3  # once for all, and again for each layer
    for k in "AB":
        assert torch.equal(held[f"base_model.model.up.randlora_{k}"], held[f"base_model.randlora_{k}"])
        held[f"base_model.model.up.randlora_{k}"] += 1
    save_file(held, file, metadata={"format": "pt"})
    again = PeftModel.from_pretrained(Two(), tmp_path).eval()
    assert torch.equal(again(X), model(X))
    assert not [w for w in recwarn if issubclass(w.category, peft.PeftWarning)]


@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse"])
def test_matrices_left_out_of_a_file_are_drawn_again(tmp_path, kind):
    more = {} if kind == "dense" else {kind: True}
    with pytest.warns(peft.PeftWarning, match="keeps randlora_A and randlora_B out of files"):
        model = get_peft_model(Two(), randlora(save_projection=False, projection_prng_key=5, **more)).eval()
    model.save_pretrained(tmp_path)
    assert not any("randlora_A" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.warns(peft.PeftWarning, match="keeps randlora_A and randlora_B out of files"):
        again = PeftModel.from_pretrained(Two(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    shared = model.base_model.randlora_B.tensor("default")
    torch.testing.assert_close(shared.std(), torch.tensor(1.0), atol=1e-2, rtol=0)
    assert (kind != "dense") == bool((shared == 0).any())


def test_a_basis_without_spread_is_refused_instead_of_nan():
    net = nn.Sequential(nn.Linear(1, 4))
    with pytest.raises(ValueError, match=r"r=1 and projection_prng_key=0 draw .*Use a larger r, or another key"):
        get_peft_model(net, RandLoraConfig(r=1, target_modules=["0"]))
    assert type(net[0]) is nn.Linear
    assert get_peft_model(net, RandLoraConfig(r=2, target_modules=["0"]))(torch.ones(1, 1)).isfinite().all()


@pytest.mark.filterwarnings("ignore:save_projection=False")
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("other", [{"r": 2}, {"r": 5}, {"projection_prng_key": 1}, {"target_modules": ["up"]}], ids=str)
@pytest.mark.parametrize("kind", [VeraConfig, PveraConfig, RandLoraConfig])
def test_a_second_adapter_of_other_matrices_is_what_its_file_gives(kind, other, saved, tmp_path):
    fields = {"r": 3, "init_weights": False, "save_projection": saved, "target_modules": ["down"]}
    model = get_peft_model(Two(), kind(**fields))
    model.add_adapter("second", kind(**{**fields, **other}))
    model.add_adapter("alike", kind(**fields))
    model.eval().set_adapter("second")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Two(), tmp_path / "second").eval()
    torch.testing.assert_close(again(X), model(X))
    homes = [home for _, home in shared_of(model.base_model)]
    assert len(homes) == 2 and all(home.tensor("alike") is home.tensor("default") for home in homes)


@pytest.mark.parametrize("name", ["merged", "tensor", "slots", "disable_adapters", "_below"])
@pytest.mark.parametrize("kind", [VeraConfig, VBLoRAConfig])
def test_adapters_may_be_called_what_the_holders_of_shared_tensors_call_their_own(tmp_path, kind, name):
    fields = {"r": 3, "num_vectors": 16, "vector_length": 2} if kind is VBLoRAConfig else {"r": 3}
    model = get_peft_model(Two(), kind(**TARGETS, **fields), adapter_name=name).eval()
    with torch.no_grad():
        for p in model.adapter_parameters(name).values():
            p.normal_()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Two(), tmp_path / name, adapter_name=name).eval()
    assert torch.equal(again(X), model(X))
    model.delete_adapter(name)
    assert not any(f".{name}" in key for key in model.state_dict())


def test_the_scaled_rows_keep_only_their_factors_and_give_their_gradients():
    from peft.kernels.product import plain, scaled_rows

    generator = torch.Generator().manual_seed(0)
    scale, A, gains = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 4), (3, 5), (2, 4, 5)))
    learnt = [t.requires_grad_() for t in (scale, gains)]
    found, wanted = scaled_rows(scale, A, gains), plain(scale, A, gains)
    assert torch.equal(found, wanted)
    seed = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, learnt, seed), torch.autograd.grad(wanted, learnt, seed), strict=True
    ):
        torch.testing.assert_close(one, other)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        scaled_rows(scale, A, gains)
    assert sum(saved) == scale.numel() + A.numel() + gains.numel()


# ---- Trainable tokens --------------------------------------------------------------------------------------------


class Language(nn.Module):
    """An embedding and an output layer, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.head = nn.Embedding(10, 6), nn.Linear(6, 10)
        if tied:
            self.head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed_tokens(ids)))


IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


def tokens(tied: bool, indices: tuple[int, ...] = (4, 1), **more) -> PeftModel:
    model = get_peft_model(Language(tied), TrainableTokensConfig(token_indices=list(indices), **more)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "delta" in n:
                p.add_(torch.arange(p.numel()).view_as(p) / 8)
    return model


def changed(model: PeftModel, tied: bool) -> torch.Tensor:
    """The output by the definition."""
    plain = Language(tied)
    delta = model.base_model.model.embed_tokens.trainable_tokens_delta["default"]
    with torch.no_grad():
        plain.embed_tokens.weight[[4, 1]] = delta
    return plain(IDS)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_of_the_input_embedding_are_replaced_and_the_tied_layer_follows(tmp_path, tied):
    model = tokens(tied)
    wanted = changed(model, tied)
    torch.testing.assert_close(model(IDS), wanted)
    assert model.get_nb_trainable_parameters()[0] == 12
    with model.disable_adapter():
        assert torch.equal(model(IDS), Language(tied)(IDS))
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    names = ["embed_tokens", "head"] if tied else ["embed_tokens"]
    assert keys == {f"base_model.model.{n}.trainable_tokens_delta" for n in names}
    again = PeftModel.from_pretrained(Language(tied), tmp_path).eval()
    assert torch.equal(again(IDS), model(IDS))
    before = model.base_model.model.embed_tokens.base_layer.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), wanted)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.embed_tokens.base_layer.weight, before)
    torch.testing.assert_close(model.merge_and_unload()(IDS), wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_delta_is_one_parameter_also_after_training(tied):
    model = tokens(tied, init_weights=False).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).square().mean().backward()
    optimizer.step()
    model.eval()
    torch.testing.assert_close(model(IDS), changed(model, tied))


@pytest.mark.parametrize("targets", [["head"], "head"])
def test_a_tied_layer_that_is_chosen_without_the_embedding_has_rows_of_its_own(targets, tmp_path):
    model = tokens(True, target_modules=targets)
    assert list(peft.get_peft_model_state_dict(model)) == ["base_model.model.head.trainable_tokens_delta"]
    plain = Language(True)
    with torch.no_grad():
        weight = plain.head.weight.clone()
        weight[[4, 1]] = model.base_model.model.head.trainable_tokens_delta["default"]
        wanted = nn.functional.linear(torch.tanh(plain.embed_tokens(IDS)), weight, plain.head.bias)
        torch.testing.assert_close(model(IDS), wanted)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(Language(True), tmp_path)(IDS), model(IDS))
        torch.testing.assert_close(model.merge_and_unload()(IDS), wanted)


def test_two_adapters_may_be_active_if_their_tokens_differ():
    model = tokens(True)
    model.add_adapter("same", TrainableTokensConfig(token_indices=[1, 2]))
    model.add_adapter("other", TrainableTokensConfig(token_indices=[3]))
    with pytest.raises(ValueError, match="both train token 1"):
        model.base_model.set_adapter(["default", "same"])
    with pytest.raises(ValueError, match="both train token 1"):
        model.merge_adapter(["default", "same"])
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(IDS), changed(model, True))


def test_tokens_that_do_not_exist_or_a_layer_without_any_are_refused_by_name():
    with pytest.raises(ValueError, match=r"token_indices has \[12\], but 'embed_tokens' has only 10 tokens"):
        tokens(False, (12,))
    with pytest.raises(ValueError, match=r"^token_indices names token 3 of 'embed_tokens'"):
        tokens(False, (3, 3))
    with pytest.raises(ValueError, match="'0' has no tokens"):
        get_peft_model(
            nn.Sequential(nn.Conv1d(2, 4, 1)), TrainableTokensConfig(token_indices=[0], target_modules=["0"])
        )


def test_the_usual_paths_of_trainable_tokens_exist():
    from peft.tuners.trainable_tokens import TrainableTokensModel as one
    from peft.tuners.trainable_tokens.config import TrainableTokensConfig as config
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer as layer
    from peft.tuners.trainable_tokens.model import TrainableTokensModel as other

    assert one is other is peft.TrainableTokensModel
    assert config is TrainableTokensConfig
    assert issubclass(layer, nn.Module)
