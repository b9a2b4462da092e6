"""Checkpoints whose modules have other names now: found again where the match is unique, refused where it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from peft import (
    LoHaConfig,
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.errors import PeftWarning

SIZE = 6
ANY = r"(.*\.)?(q_proj|v_proj|dense|fc)"


def tree(paths, size=SIZE):
    """A model with a linear layer at each path; a path may bring its sizes: {path: (out, in)}."""
    root = nn.Module()
    for path in paths:
        out, inp = paths[path] if isinstance(paths, dict) else (size, size)
        *parents, leaf = path.split(".")
        module = root
        for name in parents:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        module.add_module(leaf, nn.Linear(inp, out))
    root.forward = lambda x: x
    return root


def layers(prefix, count=3, names=("self_attn.q_proj", "self_attn.v_proj"), stack="layers"):
    return [f"{prefix}{'.' if prefix else ''}{stack}.{i}.{name}" for i in range(count) for name in names]


def adapted(paths, kind=LoraConfig, **more):
    model = get_peft_model(tree(paths), kind(target_modules=ANY, r=2, **more))
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def moved(old, new, **more):
    """Save an adapter of one model, load it in another; both states, and what loading answered."""
    saved = get_peft_model_state_dict(adapted(old, **more))
    model = get_peft_model(tree(new), LoraConfig(target_modules=ANY, r=2, **more))
    result = set_peft_model_state_dict(model, saved)
    return saved, get_peft_model_state_dict(model), result


def pair(old, new, count=3, more=(), **kwargs):
    """The layers under some names, and under their new ones; `more` stands in the new model beside."""
    old, new = [[n] if isinstance(n, str) else n for n in (old, new)]
    olds = [p for prefix in old for p in layers(prefix, count, **kwargs)]
    return olds, [p for prefix in new for p in layers(prefix, count, **kwargs)] + list(more)


def swapped(old, new, **kwargs):
    """The layers of `model` with a name within their paths replaced."""
    olds = layers("model", **kwargs)
    return olds, [p.replace(old, new) for p in olds]


BERT = {"names": ["attention.self.q_proj", "output.dense"], "stack": "layer"}
SHARED = {"names": ["block_sparse_moe.shared.fc"]}
# what the releases of transformers and its model classes have done to names
CASES = {
    "a text model inside one for images": pair("model", "model.language_model"),
    "language model one level down": pair("language_model.model", "model.language_model"),
    "back to the old names": pair("model.language_model", "language_model.model"),
    "text model alone again": pair("model.language_model", "model"),
    "beside an encoder of images with fewer layers": pair("model", "model.text", more=layers("model.vision", 2)),
    "headless model": pair("model", ""),
    "from the headless model": pair("", "model"),
    "bert in a classifier": pair("encoder", "bert.encoder", **BERT),
    "bert out of a classifier": pair("bert.encoder", "encoder", **BERT),
    "blocks called layers": swapped("layers", "blocks"),
    "h of gpt": swapped("model.layers", "transformer.h"),
    "attention of another name": swapped("self_attn", "attention"),
    "two towers under one roof": pair(["encoder", "decoder"], ["model.encoder", "model.decoder"]),
    "two towers without the roof": pair(["model.encoder", "model.decoder"], ["encoder", "decoder"]),
    "towers of two kinds": pair(["vision_model", "text_model.final"], ["clip.vision_model", "clip.text_model.final"]),
    "sparse blocks": swapped("block_sparse_moe", "mlp", **SHARED),
    "wrapper of a trainer": pair("module.model", "model"),
    "a single layer": (["net.fc"], ["model.net.fc"]),
    "more than ten layers": pair("model", "model.language_model", count=12),
    "names that hold numbers": pair("model.layer1", "net.layer1", count=1),
    "thinker of an omni model": pair("model", "thinker.model"),
    "decoder of a generator": pair("model.decoder", "decoder.model"),
    "only some layers": tuple(paths[:2] + paths[4:] for paths in pair("model", "model.text")),
}


@pytest.mark.filterwarnings("ignore::peft.errors.MissingTensorsWarning")
@pytest.mark.parametrize("case", CASES)
def test_renamed_modules_are_found_again_by_their_ending_and_shape(case):
    old, new = CASES[case]
    with pytest.warns(PeftWarning, match="other names of modules"):
        saved, state, result = moved(old, new)
    assert not result.unexpected_keys
    for a, b in zip(old, new, strict=False):
        for part in ("lora_A.weight", "lora_B.weight"):
            assert torch.equal(saved[f"base_model.model.{a}.{part}"], state[f"base_model.model.{b}.{part}"])
    untouched = 2 * (len(new) - len(old))
    assert len(result.missing_keys) == untouched


@pytest.mark.filterwarnings("ignore::peft.errors.MissingTensorsWarning")
def test_sizes_tell_two_towers_apart():
    old = dict.fromkeys(layers("model"), (6, 6))
    new = {**dict.fromkeys(layers("model.language_model"), (6, 6)), **dict.fromkeys(layers("model.visual"), (4, 4))}
    with pytest.warns(PeftWarning, match="'model' is now 'model.language_model'"):
        assert not moved(old, new)[2].unexpected_keys


def test_the_rule_is_named_and_the_adapter_is_saved_under_the_new_names():
    with pytest.warns(
        PeftWarning, match=r"'model.layers' is now 'model.language_model.layers'|'model' is now 'model.language_model'"
    ):
        saved, state, _ = moved(layers("model"), layers("model.language_model"))
    assert set(state) == {k.replace("model.model.layers", "model.model.language_model.layers") for k in saved}


def refused(old, new):
    """Loading fails, or leaves everything that is in doubt unexpected; nothing of it is in the model."""
    saved = get_peft_model_state_dict(adapted(old))
    model = adapted(new)
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    with pytest.raises(ValueError, match="nothing was loaded"):
        set_peft_model_state_dict(model, saved)
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    "old, new",
    [
        (layers("model"), layers("model.language_model") + layers("model.vision_tower")),
        (layers("model", 4), layers("model.language_model", 3)),
        (layers("model", 3), [p.replace(".2.", ".3.") for p in layers("net", 3)]),
        (["a.q_proj"], ["b.v_proj"]),
        (dict.fromkeys(layers("model"), (6, 6)), dict.fromkeys(layers("net"), (8, 6))),
        (["x.1.fc", "y.1.fc"], ["z.1.fc"]),
    ],
    ids=["two places", "a layer too many", "another number", "another module", "another shape", "two keys, one place"],
)
def test_what_is_in_doubt_is_refused(old, new):
    refused(old, new)


def test_a_key_whose_module_exists_is_never_moved():
    """The adapter of self_attn is not put on cross_attn, because it is known whose it is."""
    paths = [f"layers.{i}.{kind}.q_proj" for i in range(2) for kind in ("self_attn", "cross_attn")]
    here = LoraConfig(target_modules=r".*self_attn\.q_proj", r=2)
    there = LoraConfig(target_modules=r".*cross_attn\.q_proj", r=2)
    saved = get_peft_model_state_dict(get_peft_model(tree(paths), here))
    with pytest.raises(ValueError, match="nothing was loaded"):
        set_peft_model_state_dict(get_peft_model(tree(paths), there), saved)


def test_keys_that_fit_stay_and_the_rest_is_found():
    old = [*layers("model"), "head.fc"]
    new = [*layers("model.language_model"), "head.fc"]
    with pytest.warns(PeftWarning, match="other names"):
        saved, state, result = moved(old, new)
    assert not result.missing_keys and not result.unexpected_keys
    name = "base_model.model.head.fc.lora_A.weight"
    assert torch.equal(saved[name], state[name])


def test_a_checkpoint_that_fits_is_read_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved(layers("model"), layers("model"))


def test_trained_modules_and_tensors_of_other_methods_move_too():
    old = adapted([*layers("model"), "old.score"], LoHaConfig, modules_to_save=["score"])
    saved = get_peft_model_state_dict(old)
    config = LoHaConfig(target_modules=ANY, r=2, modules_to_save=["score"])
    new = get_peft_model(tree([*layers("model.text"), "new.score"]), config)
    with pytest.warns(PeftWarning, match="'old' is now 'new'"):
        result = set_peft_model_state_dict(new, saved)
    assert not result.missing_keys and not result.unexpected_keys
    state = get_peft_model_state_dict(new)
    assert torch.equal(saved["base_model.model.old.score.weight"], state["base_model.model.new.score.weight"])


def test_key_mapping_comes_first():
    from peft.core.entries import mapped

    saved = get_peft_model_state_dict(adapted(layers("model")))
    both = layers("model.language_model") + layers("model.vision_tower")
    model = adapted(both)
    chosen = {mapped(k, {r"^model\.layers": "model.language_model.layers"}): v for k, v in saved.items()}
    with pytest.warns(UserWarning, match="missing adapter keys"):
        assert not set_peft_model_state_dict(model, chosen).unexpected_keys


FULL = [f"layers.{i}.self_attn.{name}" for i in range(3) for name in ("q_proj", "v_proj")]


@pytest.mark.filterwarnings("ignore::peft.errors.OtherBaseWarning")
@pytest.mark.parametrize("again", [False, True], ids=["new model", "beside another adapter"])
def test_targets_that_are_whole_paths_are_found_under_their_new_names(again, tmp_path):
    old = [f"model.{name}" for name in FULL]
    ranks = {old[0]: 3}
    model = get_peft_model(tree(old), LoraConfig(target_modules=old, r=2, rank_pattern=ranks, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    saved = get_peft_model_state_dict(model)
    towers = [f"model.language_model.{name}" for name in FULL] + [f"model.visual.{name}" for name in FULL[:4]]
    base = tree([*towers, "head.fc"])
    warning = pytest.warns(PeftWarning, match="'model' is now 'model.language_model'")
    if again:
        there = get_peft_model(base, LoraConfig(target_modules=["fc"]))
        with warning:
            there.load_adapter(tmp_path, "new")
    else:
        with warning:
            there = PeftModel.from_pretrained(base, tmp_path, adapter_name="new")
    state = get_peft_model_state_dict(there, adapter_name="new")
    moved = {k.replace("model.model.layers", "model.model.language_model.layers"): v for k, v in saved.items()}
    assert state.keys() == moved.keys() and all(torch.equal(state[k], moved[k]) for k in moved)
    assert there.peft_config["new"].rank_pattern == {"model.language_model.layers.0.self_attn.q_proj": 3}
    there.save_pretrained(tmp_path / "again", selected_adapters=["new"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(tree([*towers, "head.fc"]), tmp_path / "again" / "new")


def test_targets_in_doubt_are_refused_and_nothing_changes(tmp_path):
    old = [f"model.{name}" for name in FULL]
    get_peft_model(tree(old), LoraConfig(target_modules=old, r=2)).save_pretrained(tmp_path)
    base = tree([f"{tower}.{name}" for tower in ("model.language_model", "model.visual") for name in FULL])
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(NoMatchingPeftModuleError):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == before


# ---- exchanged in place ----------------------------------------------------------------------------------------------


def exchanged(model, folder, **options):
    """What a loaded adapter holds after an exchange, and what loading the same file gives."""
    from peft.utils.hotswap import hotswap_adapter

    with pytest.warns(PeftWarning, match="made for other names"):
        hotswap_adapter(model, folder, "default", **options)
    with pytest.warns(PeftWarning, match="made for other names"):
        model.load_adapter(folder, "loaded")
    return [get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "loaded")]


@pytest.mark.filterwarnings("ignore::peft.errors.OtherBaseWarning")
@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("case", [case for case, (old, new) in CASES.items() if len(old) == len(new)])
def test_an_adapter_of_other_names_is_exchanged_as_it_is_loaded(case, rank, kind, tmp_path):
    old, new = CASES[case]
    adapted(old, kind).save_pretrained(tmp_path)
    model = get_peft_model(tree(new), kind(target_modules=ANY, r=rank))
    swapped, loaded = exchanged(model, tmp_path)
    assert swapped.keys() == loaded.keys() and all(torch.equal(swapped[k], loaded[k]) for k in loaded)


@pytest.mark.filterwarnings("ignore::peft.errors.OtherBaseWarning")
def test_an_exchange_gives_tables_of_whole_paths_the_new_names(tmp_path):
    old = [f"model.{name}" for name in FULL]
    tables = {"rank_pattern": {old[0]: 3, rf"^{old[1]}".replace(".", r"\."): 4}, "module_config": {old[2]: {"r": 5}}}
    made = get_peft_model(tree(old), LoraConfig(target_modules=old, r=2, init_lora_weights=False, **tables))
    made.save_pretrained(tmp_path)
    now = [f"model.language_model.{name}" for name in FULL]
    model = get_peft_model(tree(now), LoraConfig(target_modules=ANY, r=2))
    swapped, loaded = exchanged(model, tmp_path)
    assert [swapped[f"base_model.model.{p}.lora_A.weight"].shape[0] for p in now] == [3, 4, 5, 2, 2, 2]
    assert swapped.keys() == loaded.keys() and all(torch.equal(swapped[k], loaded[k]) for k in loaded)
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    again = get_peft_model_state_dict(PeftModel.from_pretrained(tree(now), tmp_path / "again"))
    assert all(torch.equal(again[k], swapped[k]) for k in swapped)


def test_an_exchange_in_doubt_is_refused_and_nothing_changes(tmp_path):
    adapted(layers("model")).save_pretrained(tmp_path)
    model = adapted(layers("model.language_model") + layers("model.vision_tower"))
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    from peft.utils.hotswap import hotswap_adapter

    with pytest.raises(RuntimeError, match="have no place in it"):
        hotswap_adapter(model, tmp_path, "default")
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(before[k], after[k]) for k in before)
