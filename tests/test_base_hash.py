"""Hashes of the base's numbers: noted when asked for, compared when the adapter is loaded."""

import json
import warnings

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.convert import convert_adapter
from peft.core.digests import NUMBERS
from peft.core.header import read_header
from peft.errors import OtherBaseWarning, PeftStrictError, PeftWarning

FILE = "adapter_model.safetensors"


def base(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential()
    for name in ("first", "second"):
        model.add_module(name, nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    model.add_module("head", nn.Linear(8, 3))
    return model.to(dtype)


def saved(path, model=None, **settings):
    config = LoraConfig(r=2, target_modules=["second.0"], init_lora_weights=False, **settings)
    wrapped = get_peft_model(model or base(), config)
    wrapped.save_pretrained(path, hash_base=True)
    return wrapped


def quiet(model, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PeftModel.from_pretrained(model, path, **options)


def test_nothing_is_noted_or_read_unasked(tmp_path, monkeypatch):
    get_peft_model(base(), LoraConfig(r=2, target_modules=["second.0"])).save_pretrained(tmp_path)
    assert NUMBERS not in read_header(tmp_path / FILE).metadata
    monkeypatch.setattr("peft.core.digests.digests", lambda *_: pytest.fail("the base was read"))
    quiet(base(1), tmp_path)
    with pytest.warns(OtherBaseWarning, match="no hash of the base's numbers"):
        PeftModel.from_pretrained(base(1), tmp_path, verify_base=True)


@pytest.mark.parametrize("place", ["first.0.weight", "second.0.weight", "second.1.running_mean", "head.bias"])
def test_one_number_that_differs_is_found(tmp_path, place):
    saved(tmp_path)
    quiet(base(), tmp_path)
    quiet(base(), tmp_path, verify_base=True)
    other = base()
    with torch.no_grad():
        other.state_dict()[place].view(-1)[-1].add_(1e-6)
    with pytest.warns(OtherBaseWarning, match=rf"\n  {place}: other numbers than when it was saved$"):
        PeftModel.from_pretrained(other, tmp_path)


def test_strict_loading_refuses_and_leaves_the_model(tmp_path):
    saved(tmp_path)
    other = base(1)
    before = [*other.named_modules()], {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(PeftStrictError, match=r"first\.0\.weight: other numbers"):
        PeftModel.from_pretrained(other, tmp_path, strict=True)
    assert [*other.named_modules()] == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in other.state_dict().items())
    quiet(other, tmp_path, verify_base=False, strict=True)


def test_below_adapters_and_for_further_ones(tmp_path):
    """What stands on the model does not count, and a recipe of an earlier load does not pass over the comparison."""
    model = saved(tmp_path / "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["first.0", "second.0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in "cde":
            model.load_adapter(tmp_path / "a", name)
    saved(tmp_path / "other", base(1))
    with pytest.warns(OtherBaseWarning, match=r"second\.0\.weight: other numbers"):
        model.load_adapter(tmp_path / "other", "f")


def test_merged_adapters_hide_the_numbers(tmp_path):
    model = saved(tmp_path / "a")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"hash_base.*'default'.*merged.*Unmerge first"):
        model.save_pretrained(tmp_path / "b", hash_base=True)
    assert not (tmp_path / "b" / FILE).exists()
    with pytest.warns(OtherBaseWarning, match=r"not known: .*'default'.* merged into the base"):
        model.load_adapter(tmp_path / "a", "b")
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "b", hash_base=True)
    quiet(base(), tmp_path / "b")


def test_another_dtype_cannot_be_compared(tmp_path):
    saved(tmp_path)
    with pytest.warns(OtherBaseWarning, match=r"not known: .*float32.*bfloat16"):
        PeftModel.from_pretrained(base(dtype=torch.bfloat16), tmp_path)


def test_other_names_are_found_by_the_hash(tmp_path):
    saved(tmp_path)

    def wrapped():
        outer = nn.Module()
        outer.model = base()
        return outer

    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherBaseWarning)
        with pytest.warns(PeftWarning, match="other names of modules"):
            PeftModel.from_pretrained(wrapped(), tmp_path)
    outer = wrapped()
    outer.model.first[0].bias.data[0] += 1
    with pytest.warns(PeftWarning) as said:
        PeftModel.from_pretrained(outer, tmp_path)
    (text,) = [str(w.message) for w in said if w.category is OtherBaseWarning]
    assert "1 of its tensors are kept otherwise, such as first.0.bias: float32 then, nowhere now" in text


def test_modules_that_the_adapter_replaces_do_not_count(tmp_path):
    saved(tmp_path, modules_to_save=["head"])
    other = base()
    nn.init.ones_(other.head.weight)
    quiet(other, tmp_path)


def test_tensors_without_numbers_and_pickles_are_refused(tmp_path):
    with torch.device("meta"):
        empty = base()
    model = get_peft_model(empty, LoraConfig(r=2, target_modules=["second.0"]))
    state = {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"hash_base.*meta device.*first\.0\.weight"):
        model.save_pretrained(tmp_path, state_dict=state, hash_base=True)
    with pytest.raises(ValueError, match="safe_serialization=True"):
        saved(tmp_path).save_pretrained(tmp_path, safe_serialization=False, hash_base=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", '{"sha256": {}, "tensors": 3}', "[" * 90_000])
def test_notes_that_say_nothing(tmp_path, text):
    """Of a foreign file: whatever it notes, loading goes on."""
    from safetensors.torch import load_file, save_file

    saved(tmp_path)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata={"format": "pt", NUMBERS: text})
    with pytest.warns(OtherBaseWarning, match="not known"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_of_many_tensors_only_one_hash_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("peft.core.digests.LONGEST", 100)
    saved(tmp_path)
    assert list(json.loads(read_header(tmp_path / FILE).metadata[NUMBERS])) == ["sha256"]
    quiet(base(), tmp_path)
    with pytest.warns(OtherBaseWarning, match="hash of all numbers is another"):
        PeftModel.from_pretrained(base(1), tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_compared_as_they_are_stored(tmp_path, kind):
    def packed(seed):
        model = base(seed)
        if kind == "nf4":
            bnb = pytest.importorskip("bitsandbytes")
            layer = bnb.nn.Linear4bit(8, 8, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(model.second[0].weight.data, requires_grad=False, quant_type="nf4")
            model.second[0] = layer.to("cpu")
        else:
            ao = pytest.importorskip("torchao.quantization")
            ao.quantize_(model.second, ao.Int8WeightOnlyConfig(version=2))
        return model

    saved(tmp_path, packed(0))
    quiet(packed(0), tmp_path)
    wrong = packed(1)
    for name in ("first", "head"):
        setattr(wrong, name, getattr(base(0), name))
    wrong.second[1] = base(0).second[1]
    with pytest.warns(OtherBaseWarning, match=r"second\.0\.weight: other numbers"):
        PeftModel.from_pretrained(wrong, tmp_path)


def test_the_note_stays_with_a_converted_folder(tmp_path):
    saved(tmp_path / "a")
    convert_adapter(tmp_path / "a", to="peft", out=tmp_path / "b")
    assert NUMBERS in read_header(tmp_path / "b" / FILE).metadata
