"""Random histories of a model with adapters agree with plain formulas, and end as the base to the bit.

The oracle keeps a dictionary of factors and the lists of names that are active, merged and trainable. It knows nothing
of the library but the names of saved tensors.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peft import LoraConfig, PeftModel, get_layer_status, get_peft_model, get_peft_model_state_dict

LAYERS = ("emb", "conv", "fc", "head")
NAMES = ("a", "b", "c", "d")
TOKENS = torch.tensor([[0, 3, 6, 2, 2], [5, 1, 4, 0, 6], [6, 6, 1, 3, 5]])
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 6e-2}  # relative to the largest logit; both sides round differently


class Small(nn.Module):
    """Tokens to logits, through an embedding, a convolution and linear layers."""

    def __init__(self, tied: bool):
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.out = nn.Linear(7, 3)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.emb(tokens).mT).mT)
        return self.out(self.head(torch.tanh(self.fc(h))))


def formula(W: dict[str, Tensor]) -> Tensor:
    """The logits of `Small` from its weights."""
    h = torch.tanh(F.conv1d(W["emb.weight"][TOKENS].mT, W["conv.weight"], W["conv.bias"], padding=1).mT)
    h = torch.tanh(h @ W["fc.weight"].mT + W["fc.bias"]) @ W["head.weight"].mT
    return h @ W["out.weight"].mT + W["out.bias"]


def update(layer: str, A: Tensor, B: Tensor) -> Tensor:
    """B A in the layout of the layer's weight."""
    if layer == "emb":
        return (B @ A).mT
    return (B.flatten(1) @ A.flatten(1)).view(B.shape[0], *A.shape[1:])


class Lora:
    """What the oracle knows of an adapter."""

    def __init__(self, targets: frozenset[str], scaling: float):
        self.targets, self.scaling = targets, scaling
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.copy: dict[str, Tensor] = {}  # of the module `out`, if it is trained as a whole

    def read(self, state: dict[str, Tensor]) -> None:
        """Take the factors from a state dictionary."""
        tensors = {key.removeprefix("base_model.model."): value.detach().clone() for key, value in state.items()}
        for layer in self.targets:
            keys = ("lora_embedding_A", "lora_embedding_B") if layer == "emb" else ("lora_A.weight", "lora_B.weight")
            A, B = (tensors.pop(f"{layer}.{key}") for key in keys)
            self.factors[layer] = A, B
        self.copy = tensors
        assert set(tensors) <= {"out.weight", "out.bias"}


def config(targets: frozenset[str], r: int, rank_stabilised: bool, copies: bool = False) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=6,
        use_rslora=rank_stabilised,
        target_modules=sorted(targets),
        modules_to_save=["out"] if copies else None,
        init_lora_weights=False,
    )


some_layers = st.sets(st.sampled_from(LAYERS), min_size=1).map(frozenset)
a_name, a_rank = st.sampled_from(NAMES), st.integers(1, 3)


class Histories(RuleBasedStateMachine):
    """The model, and beside it the oracle."""

    @initialize(
        dtype=st.sampled_from(list(ROUNDING)),
        tied=st.booleans(),
        copies=st.booleans(),
        layers=some_layers,
        r=a_rank,
        stable=st.booleans(),
    )
    def start(self, dtype, tied, copies, layers, r, stable):
        self.quiet = warnings.catch_warnings()
        self.quiet.__enter__()
        warnings.simplefilter("ignore")  # tied weights, merges that are undone: what they announce is checked below
        torch.manual_seed(0)
        self.base = Small(tied).to(dtype).eval()
        self.dtype, self.tied, self.copies = dtype, tied, copies
        self.model: PeftModel = get_peft_model(copy.deepcopy(self.base), config(layers, r, stable, copies), "a").eval()
        self.base.requires_grad_(False)  # torch takes another path, and rounds otherwise, for trainable weights
        with torch.no_grad():
            self.wanted_base = self.base(TOKENS)
        self.loaded: dict[str, Lora] = {}
        self.active, self.merged = ["a"], []
        self.trainable: dict[str, bool] = {}
        self.kept: dict[str, bool] | None = None  # what enabling gives back; None while enabled
        self._loaded("a", layers, r, stable)
        self._train("a", True)

    def _loaded(self, name, targets, r, stable):
        self.loaded[name] = Lora(targets, 6 / (math.sqrt(r) if stable else r))
        self._read(name)
        self._train(name, False)

    def _read(self, name):
        self.loaded[name].read(get_peft_model_state_dict(self.model, adapter_name=name))

    def _train(self, name, flag):
        self.trainable[name] = flag
        if self.kept is not None:
            self.kept[name] = flag

    def _activate(self, names, flag=True):
        self.active, self.merged = list(names), []
        for name in self.loaded:
            self._train(name, flag and name in names)

    # ---- what users do -------------------------------------------------------------------------------------------

    @rule(name=a_name, layers=some_layers, r=a_rank, stable=st.booleans())
    def add(self, name, layers, r, stable):
        if name in self.loaded:
            with pytest.raises(ValueError, match="already exists"):
                self.model.add_adapter(name, config(layers, r, stable, self.copies))
            return
        if not self.loaded:
            return  # the last one was deleted
        self.model.add_adapter(name, config(layers, r, stable, self.copies))
        self._loaded(name, layers, r, stable)

    @rule(name=a_name, inference=st.booleans())
    def set_one(self, name, inference):
        if name not in self.loaded:
            with pytest.raises(ValueError, match="no adapter"):
                self.model.set_adapter(name)
            return
        self.model.set_adapter(name, inference_mode=inference)
        self._activate([name], not inference)

    @rule(names=st.permutations(NAMES), count=st.integers(2, 4))
    def set_several(self, names, count):
        names = names[:count]
        if not set(names) <= set(self.loaded):
            with pytest.raises(ValueError, match="no adapter"):
                self.model.base_model.set_adapter(names)
            return
        if self.copies:
            with pytest.raises(ValueError, match="Only one adapter can be active for 'out'"):
                self.model.base_model.set_adapter(names)
            return
        self.model.base_model.set_adapter(names)
        self._activate(names)

    @rule(name=a_name, flag=st.booleans())
    def freeze_or_not(self, name, flag):
        if name in self.loaded:
            self.model.set_requires_grad(name, flag)
            self._train(name, flag)

    @rule()
    def disable(self):
        self.model.base_model.disable_adapter_layers()
        if self.kept is None:
            self.kept, self.trainable = self.trainable, dict.fromkeys(self.loaded, False)

    @rule()
    def enable(self):
        self.model.base_model.enable_adapter_layers()
        if self.kept is not None:
            self.trainable, self.kept = self.kept, None

    @rule(nested=st.booleans())
    def disable_for_a_while(self, nested):
        with self.model.disable_adapter():
            if nested:
                with self.model.disable_adapter():
                    pass
            self._gives_the_base()

    @rule(names=st.none() | st.lists(a_name, min_size=1, max_size=3, unique=True), safe=st.booleans())
    def merge(self, names, safe):
        if not set(names or ()) <= set(self.loaded):
            with pytest.raises(ValueError, match="no adapter"):
                self.model.merge_adapter(names, safe_merge=safe)
            return
        self.model.merge_adapter(names, safe_merge=safe)
        self.merged += [n for n in (self.active if names is None else names) if n not in self.merged]

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = []

    @rule(name=a_name)
    def delete(self, name):
        if name not in self.loaded or name in self.merged:
            with pytest.raises(ValueError, match=r"no adapter|merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.loaded[name], self.trainable[name]
        if self.kept is not None:
            self.kept.pop(name, None)
        left = [n for n in self.active if n != name]
        if self.active and not left and self.loaded:
            left = [min(self.loaded)]
            for other in self.loaded:
                self._train(other, other in left)
        self.active = left

    @precondition(lambda self: not self.merged)
    @rule(name=a_name)
    def train(self, name):
        if name in self.loaded:
            with torch.no_grad():
                for parameter in self.model.adapter_parameters(name).values():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            self._read(name)

    @rule(name=a_name, new=a_name, trainable=st.booleans())
    def save_and_load(self, name, new, trainable):
        """Under another name, or over itself or another adapter of the same shape."""
        if name not in self.loaded:
            return
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            source, fresh = Path(folder) / name, new not in self.loaded
            if not fresh and not self._same_shape(name, new):
                return
            if new in self.merged:
                with pytest.raises(ValueError, match="merged"):
                    self.model.load_adapter(source, new, is_trainable=trainable)
                return
            self.model.load_adapter(source, new, is_trainable=trainable)
        if fresh:
            self.loaded[new] = copy.deepcopy(self.loaded[name])
            self._train(new, False)
        if trainable:
            self._train(new, True)
        self._read(new)
        for layer, pair in self.loaded[name].factors.items():
            assert all(torch.equal(x, y) for x, y in zip(pair, self.loaded[new].factors[layer], strict=True))
        assert all(torch.equal(value, self.loaded[new].copy[key]) for key, value in self.loaded[name].copy.items())

    def _same_shape(self, one, two):
        shapes = [{k: (A.shape, B.shape) for k, (A, B) in self.loaded[n].factors.items()} for n in (one, two)]
        return shapes[0] == shapes[1]

    # ---- what goes wrong -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.loaded)
    @rule(
        what=st.sampled_from(
            [
                (ValueError, lambda m: m.add_adapter("e", LoraConfig(target_modules=["nowhere"]))),
                (ValueError, lambda m: m.add_adapter("e.f", LoraConfig(target_modules=["fc"]))),
                (NotImplementedError, lambda m: m.add_adapter("e", LoraConfig(target_modules=["fc"], use_qalora=True))),
                (ValueError, lambda m: m.load_adapter("nowhere", "e")),
                (ValueError, lambda m: m.base_model.set_adapter(["a", "nobody"])),
                (ValueError, lambda m: m.merge_adapter(["nobody"])),
                (TypeError, lambda m: m.merge_adapter("a")),
                (ValueError, lambda m: m.set_requires_grad("nobody")),
            ]
        )
    )
    def fail(self, what):
        error, action = what
        with pytest.raises(error):
            action(self.model)

    @precondition(lambda self: not self.merged and self.loaded)
    @rule(name=a_name, layer=st.sampled_from(LAYERS))
    def merge_what_is_not_finite(self, name, layer):
        if name not in self.loaded or layer not in self.loaded[name].targets:
            return
        key = next(k for k in self.model.adapter_parameters(name) if f".{layer}." in k)
        tensor = self.model.get_parameter(key)
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=f"(?s){layer}.*not finite"):
            self.model.merge_adapter([name])
        with torch.no_grad():
            tensor.copy_(before)

    # ---- what must hold ------------------------------------------------------------------------------------------

    def _gives_the_base(self):
        with torch.no_grad():
            assert torch.equal(self.model(TOKENS), self.wanted_base)
        self._base_is_untouched()

    def _base_is_untouched(self):
        wanted = dict(self.base.named_parameters(remove_duplicate=False))
        found = {
            n.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): p
            for n, p in self.model.named_parameters(remove_duplicate=False)
            if "lora_" not in n and "modules_to_save" not in n
        }
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(found[key], value), key
            assert not found[key].requires_grad
        if not self.merged:  # enabling will write into one of the two
            assert (found["head.weight"] is found["emb.weight"]) == self.tied

    @invariant()
    def the_output_is_that_of_the_formula(self):
        if self.kept is not None or not (self.active or self.merged):
            self._gives_the_base()
            return
        W = {n: p.detach().float() for n, p in self.base.named_parameters(remove_duplicate=False)}
        for name in dict.fromkeys([*self.merged, *self.active]):
            lora = self.loaded[name]
            for layer, (A, B) in lora.factors.items():
                W[f"{layer}.weight"] = W[f"{layer}.weight"] + lora.scaling * update(layer, A, B)
        for name in self.active:
            W.update({key: value.float() for key, value in self.loaded[name].copy.items()})
        wanted = formula(W)
        with torch.no_grad():
            found = self.model(TOKENS)
        assert found.dtype is self.dtype
        error = (found.float() - wanted).abs().max() / wanted.abs().max()
        assert error <= ROUNDING[self.dtype], f"{error:.1e} apart"
        if not self.merged:
            self._base_is_untouched()

    @precondition(lambda self: self.kept is None and not self.merged and len(self.loaded) > 1)
    @invariant()
    def each_sample_may_have_its_adapter(self):
        names = [*list(self.loaded)[:2], "__base__"]
        with torch.no_grad():
            found = self.model(TOKENS, adapter_names=names)
        torch.testing.assert_close(found[2], self.wanted_base[2], rtol=ROUNDING[self.dtype], atol=ROUNDING[self.dtype])

    @invariant()
    def the_state_is_the_one_that_was_asked_for(self):
        assert set(self.model.peft_config) == set(self.loaded)
        assert self.model.active_adapters == self.active
        for name, flag in self.trainable.items():
            assert {p.requires_grad for p in self.model.adapter_parameters(name).values()} == {flag}, name
        for status in get_layer_status(self.model):
            layer = status.name.removeprefix("model.")
            assert status.enabled == (self.kept is None)
            wanted = {n for n, lora in self.loaded.items() if layer in lora.targets or layer == "out"}
            assert set(status.available_adapters) == wanted
            assert status.merged_adapters == [n for n in self.merged if layer in self.loaded[n].targets]

    def teardown(self):
        if not hasattr(self, "model"):
            return
        with self.model.disable_adapter():
            self._gives_the_base()
        plain = self.model.unload()
        found, wanted = plain.state_dict(), self.base.state_dict()
        for name in self.active if self.kept is None else ():  # a module trained as a whole stays where it runs
            wanted.update(self.loaded[name].copy)
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], v) for k, v in wanted.items())
        if not self.copies:
            with torch.no_grad():
                assert torch.equal(plain(TOKENS), self.wanted_base)
        assert (plain.head.weight is plain.emb.weight) == self.tied
        assert [type(m) for m in plain.modules()] == [type(m) for m in self.base.modules()]
        self.quiet.__exit__(None, None, None)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=150,
    stateful_step_count=25,
    derandomize=True,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


# ---- orders of events that have gone wrong once ------------------------------------------------------------------


def two(**changes) -> PeftModel:
    """Adapter "x" on fc and head, active; "y" on fc and conv."""
    torch.manual_seed(0)
    model = get_peft_model(Small(changes.pop("tied", False)), config(frozenset({"fc", "head"}), 2, False), "x").eval()
    model.add_adapter("y", config(frozenset({"fc", "conv"}), 2, False))
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name.rpartition(".lora_")[2].split(".")[1] for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS)


def test_an_adapter_that_is_set_while_disabled_is_trained_after_enabling():
    model = two()
    model.base_model.disable_adapter_layers()
    model.set_adapter("y")
    model.base_model.enable_adapter_layers()
    assert trainable(model) == {"y"}
    model.base_model.disable_adapter_layers()
    assert trainable(model) == set()
    model.set_requires_grad("x")
    model.base_model.enable_adapter_layers()
    assert trainable(model) == {"x", "y"}


def test_a_frozen_copy_of_a_module_stays_frozen_when_adapters_are_enabled():
    settings = LoraConfig(target_modules=["fc"], modules_to_save=["head"], inference_mode=True)
    model = get_peft_model(Small(False), settings)
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", ["layers", "context"])
def test_layers_that_are_placed_while_disabled_are_disabled_too(how):
    model, base = two(), logits(two().unload())
    if how == "layers":
        model.base_model.disable_adapter_layers()
        model.add_adapter("z", config(frozenset({"emb"}), 2, False))
        model.set_adapter("z")
        assert torch.equal(logits(model), base)
        model.base_model.enable_adapter_layers()
    else:
        with model.disable_adapter():
            model.add_adapter("z", config(frozenset({"emb"}), 2, False))
            model.set_adapter("z")
            assert torch.equal(logits(model), base)
    assert model.get_model_status().enabled is True
    assert not torch.equal(logits(model), base)


def test_merging_while_disabled_takes_effect_when_enabled():
    model, base = two(), logits(two().unload())
    wanted = logits(model)
    model.base_model.disable_adapter_layers()
    model.merge_adapter()
    assert torch.equal(logits(model), base) and model.get_model_status().merged_adapters == ["x"]
    model.base_model.enable_adapter_layers()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)


def test_what_was_merged_before_disabling_can_be_unmerged_and_replaced_meanwhile():
    model = two()
    wanted = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("y")
    model.base_model.enable_adapter_layers()
    other = two()
    other.set_adapter("y")
    assert torch.equal(logits(model), logits(other))


def test_a_merge_for_good_while_disabled_is_not_lost():
    model = two()
    wanted = logits(model)
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*shared by")
@pytest.mark.filterwarnings("ignore:.*tied")
def test_a_merge_into_a_tied_weight_that_is_disabled_and_enabled_leaves_the_other_module_alone():
    model = two(tied=True)
    embedding = model.get_base_model().emb.weight
    before = embedding.detach().clone()
    model.merge_adapter()
    with model.disable_adapter():
        pass
    assert torch.equal(embedding, before)
    model.unmerge_adapter()
    assert model.get_base_model().head.base_layer.weight is embedding


@pytest.mark.filterwarnings("ignore:.*shared by")
@pytest.mark.filterwarnings("ignore:.*tied")
def test_a_failed_merge_leaves_tied_weights_tied():
    model = two(tied=True)
    with torch.no_grad():
        model.get_base_model().fc.lora_A["x"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter()
    assert model.get_base_model().head.base_layer.weight is model.get_base_model().emb.weight


def test_deleting_the_active_adapter_of_a_layer_activates_the_next():
    layer = two().get_base_model().fc
    with pytest.warns(UserWarning, match="'x' was active and is deleted. Setting active adapter to 'y'"):
        layer.delete_adapter("x")
    assert layer.active_adapters == ["y"] and layer.lora_A["y"].weight.requires_grad
    layer.delete_adapter("y")
    assert layer.active_adapters == []


def test_deleting_the_active_adapter_trains_all_that_the_next_one_has():
    settings = {"target_modules": ["fc"], "modules_to_save": ["head"], "trainable_token_indices": {"emb": [1]}}
    model = get_peft_model(Small(False), LoraConfig(**settings), "x")
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("y", LoraConfig(**settings))
    model.set_adapter("y")
    with pytest.warns(UserWarning, match="Setting active adapter to 'x'"):
        model.delete_adapter("y")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    assert any("modules_to_save" in n for n in wanted) and any("tokens_delta" in n for n in wanted)


def test_deleting_an_inactive_adapter_leaves_the_others_as_trainable_as_they_were():
    model = two()
    model.set_requires_grad("y")
    model.add_adapter("z", config(frozenset({"fc"}), 2, False))
    model.delete_adapter("z")
    assert all(p.requires_grad for name in "xy" for p in model.adapter_parameters(name).values())
