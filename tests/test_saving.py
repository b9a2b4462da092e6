"""Saving: nothing empty or unread is left behind, what a person wrote stays, and no network is asked."""

from __future__ import annotations

import json
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from benchmarks.measure import calls
from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.core import files
from peft.core.files import write_weights
from peft.core.header import read_header
from peft.core.payload import data_of, is_sound
from peft.errors import PeftStrictError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INDEX = f"{WEIGHTS}.index.json"


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc1(x))


def mlp():
    torch.manual_seed(0)
    return MLP().eval()


def adapted(**changes):
    config = {"r": 2, "target_modules": ["fc1"], "init_lora_weights": False, **changes}
    return get_peft_model(mlp(), LoraConfig(**config)).eval()


def llama(vocab=32):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


X = torch.linspace(-1, 1, 24).view(4, 6)


def contents(folder: Path):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# The file ------------------------------------------------------------------------------------------------------------


def test_a_save_takes_few_calls_for_each_layer(tmp_path):
    """Of Python and C functions, for its two tensors' names, places in the file, and numbers."""
    counts = []
    for layers in (8, 40):
        base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=[str(i) for i in range(layers)]))
        for _ in range(3):  # what is made once for a process, or a folder, is there then
            counts.append(calls(lambda m=model, n=layers: m.save_pretrained(tmp_path / str(n))))
    assert (counts[5] - counts[2]) / 32 <= 105


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    model = adapted(modules_to_save=["head"])
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_what_is_written_is_read_by_others_and_by_us(tmp_path, dtype):
    base = torch.arange(24.0).view(4, 6)
    state = {
        "a": base.to(dtype), "turned": base.T.to(dtype), "part": base.to(dtype)[1:, ::2], "odd": base[0, :3].to(dtype),
        "one": torch.tensor(1.0).to(dtype), "none": torch.zeros(0, 3).to(dtype), "name é \n \" \\": base.to(dtype),
        "bytes": torch.arange(5, dtype=torch.uint8), "flags": base > 3, "whole": base.long(),
    }  # fmt: skip
    state["tied"] = state["a"]
    [file] = write_weights(state, tmp_path, metadata={"note": "é\n"})
    header = read_header(file)
    assert is_sound(data_of(file, header), header) and header.metadata["note"] == "é\n"
    assert (header.start - 8) % 8 == 0
    for got in (load_file(file), files.read_weights(file)):
        assert got.keys() == state.keys()
        assert all(got[k].dtype == v.dtype and got[k].shape == v.shape for k, v in state.items())
        assert all(torch.equal(got[k].double(), v.double()) for k, v in state.items())
    with safe_open(str(file), "pt") as handle:
        assert handle.metadata()["format"] == "pt"


def test_what_the_format_cannot_hold_is_named(tmp_path):
    for state in ({"a": torch.ones(2, dtype=torch.complex128)}, {"__metadata__": torch.ones(2)}):
        with pytest.raises(ValueError, match=f"cannot hold '{next(iter(state))}'"):
            write_weights(state, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("private", [(), ("b",), ("a", "b")])
def test_files_that_only_their_owner_can_read_get_the_usual_permissions(tmp_path, mask, private):
    before = os.umask(mask)
    try:
        with files.staged(tmp_path) as stage:
            for name in "ab":
                (stage / name).write_text(name)
            for name in private:
                (stage / name).chmod(0o600)
        modes = {(tmp_path / name).stat().st_mode & 0o777 for name in "ab"}
    finally:
        os.umask(before)
    assert modes == {0o666 & ~mask} and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_remembered_of_a_save_follows_what_is_saved(tmp_path):
    """The fingerprint follows the model, the hash the configuration, the card its text and the model."""
    model = adapted()
    for folder in "ab":
        model.save_pretrained(tmp_path / folder)
    heads = [read_header(tmp_path / folder / WEIGHTS).metadata for folder in "ab"]
    model.base_model.model.head = nn.Linear(8, 5)
    model.peft_config["default"].lora_dropout = 0.5
    model.save_pretrained(tmp_path / "b")
    changed = read_header(tmp_path / "b" / WEIGHTS).metadata
    assert heads[0] == heads[1]
    assert all(changed[key] != heads[0][key] for key in ("base_fingerprint", "base_shapes", "config_hash"))
    card = tmp_path / "b" / "README.md"
    for text in ("# Mine\n", "# Another\n", "# Mine\n"):
        card.write_text(text)
        model.base_model.model.model_tags = [f"tag-{len(text)}"]
        model.save_pretrained(tmp_path / "b")
        assert text.strip() in card.read_text() and f"tag-{len(text)}" in card.read_text()


# verify --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["the length", "a name", "the last number"])
@pytest.mark.parametrize("size", [10**9, 100])
def test_verify_compares_every_byte_before_the_old_files_go(tmp_path, monkeypatch, where, size):
    adapted().save_pretrained(tmp_path, verify=True, max_shard_size=size)
    before = contents(tmp_path)

    def write(*args, **kwargs):
        written = write_weights(*args, **kwargs)
        data = bytearray(written[-1].read_bytes())
        data[{"the length": 0, "a name": data.index(b"lora_"), "the last number": -1}[where]] ^= 4
        written[-1].write_bytes(data)
        return written

    monkeypatch.setattr("peft.persist.write_weights", write)
    with pytest.raises((OSError, ValueError), match=r"adapter_model.*safetensors"):
        adapted(r=4).save_pretrained(tmp_path, verify=True, max_shard_size=size)
    assert contents(tmp_path) == before


def test_verify_finds_other_numbers_under_a_right_checksum(tmp_path, monkeypatch):
    def write(state, *args):
        return write_weights({k: v + 1 for k, v in state.items()}, *args)

    monkeypatch.setattr("peft.persist.write_weights", write)
    with pytest.raises(OSError, match=r"does not hold what was saved: 'base_model\.model\.fc1\.lora_A\.weight'"):
        adapted().save_pretrained(tmp_path, verify=True)
    assert contents(tmp_path) == {}


# Shards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [False, True])
def test_a_large_adapter_is_written_in_parts_and_read_again(tmp_path, meta):
    model = adapted(modules_to_save=["head"])
    model.save_pretrained(tmp_path, max_shard_size=100, verify=True)
    names = sorted(p.name for p in tmp_path.iterdir())
    shards = [n for n in names if n.startswith("adapter_model-")]
    assert shards == [f"adapter_model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert names == sorted(["README.md", CONFIG, INDEX, *shards]) and len(shards) > 2
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == get_peft_model_state_dict(model).keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in get_peft_model_state_dict(model).values())
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=meta)(X), model(X))
    again = adapted()
    again.load_adapter(tmp_path, "more")
    again.set_adapter("more")
    assert torch.equal(again(X), model(X))


@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_each_form_takes_the_place_of_the_others(tmp_path):
    forms = [{}, {"max_shard_size": 50}, {"safe_serialization": False}, {"max_shard_size": 100}, {"max_shard_size": 50}]
    for r, form in enumerate([*forms, *forms], 1):
        model = adapted(r=r)
        model.save_pretrained(tmp_path, **form)
        assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path)(X), model(X))
        assert len([p for p in tmp_path.iterdir() if p.name == WEIGHTS or p.suffix == ".bin" or p.name == INDEX]) == 1


def test_a_pickle_is_told_and_refused_by_strict_loading(tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.warns(PeftWarning, match="is a pickle"):
        PeftModel.from_pretrained(mlp(), tmp_path)
    with pytest.raises(PeftStrictError, match="is a pickle"):
        PeftModel.from_pretrained(mlp(), tmp_path, strict=True)
    monkeypatch.setattr("peft.errors._strict", True)
    for load in (lambda: adapted().load_adapter(tmp_path, "more"), lambda: load_peft_weights(str(tmp_path))):
        with pytest.raises(PeftStrictError, match="is a pickle"):
            load()


@pytest.mark.parametrize(
    ("size", "bytes_"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("2 KiB", 2048), (7, 7), ("9", 9)]
)
def test_sizes_of_shards(size, bytes_):
    assert files._bytes(size) == bytes_


@pytest.mark.parametrize("size", ["", "GB", "5 XB", -1, 0, "0GB", None, 1.5e400])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        adapted().save_pretrained(tmp_path, max_shard_size=size)
    assert contents(tmp_path) == {}


# No network ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to reach the network fails the test."""

    def refuse(*_, **__):
        pytest.fail("a connection was tried")

    for name in ("socket", "create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.mark.filterwarnings("ignore:The embeddings are saved")
def test_local_folders_need_no_network(tmp_path, offline):
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = get_peft_model(llama(), config)
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"
    model.get_base_model().name_or_path = "someone/some-model"
    model.get_base_model().resize_token_embeddings(40, mean_resizing=False)
    for size in (10**9, 1000):
        model.save_pretrained(tmp_path, verify=True, max_shard_size=size)
        model.save_pretrained(tmp_path, verify=True, max_shard_size=size)
        PeftModel.from_pretrained(llama(vocab=40), tmp_path)
        model.load_adapter(tmp_path, f"more{size}")
        LoraConfig.from_pretrained(tmp_path)
    for place in (tmp_path / "missing", str(tmp_path / "missing"), "./missing"):
        with pytest.raises(ValueError, match="there is no such folder"):
            PeftModel.from_pretrained(llama(), place)


# The card ------------------------------------------------------------------------------------------------------------

CARDS = {
    "comments": "---\n# by hand\nlicense: mit   # yes\nid: '007'\ntags:\n- mine\n---\n\n# Title\n\ntext\n",
    "another library": "---\nlibrary_name: sentence-transformers\nbase_model: someone/base\ntags: [a, b]\n---\ntext\n",
    "no valid metadata": "---\na: [\n---\nbody\n",
    "a list": "---\n- a\n---\nbody\n",
    "none": "# hello\n",
    "other line ends": "---\r\nlicense: mit\r\ntags:\r\n  - mine\r\n---\r\n\r\n# T\r\nline\r\n",
    "a line that only looks like a version": "text\n- PEFT is great, and here is why\n",
    "twice": "---\nlicense: mit\nlicense: apache\n---\nx\n",
    "empty": "",
}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("name", CARDS)
def test_every_line_of_a_card_survives(tmp_path, name, encoding):
    card = (CARDS[name] + ("Grüße\r\n" if "\r" in CARDS[name] else "Grüße\n")).encode(encoding)
    (tmp_path / "README.md").write_bytes(card)
    adapted().save_pretrained(tmp_path)
    once = (tmp_path / "README.md").read_bytes()
    adapted().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == once
    lines = once.split(b"\n")
    assert all(line in lines for line in card.split(b"\n"))
    assert sum(b"PEFT 1" in line or b"PEFT 0" in line for line in lines) == 1
    added = [line.strip() for line in lines if line not in card.split(b"\n")]
    assert (b'- "lora"' in added) == (name != "another library")
    assert (b'library_name: "peft"' in added) == (name != "another library")


def test_the_version_of_a_card_follows(tmp_path):
    (tmp_path / "README.md").write_text("x\n\n### Framework versions\n\n- torch 2\n- PEFT 0.1.dev0+a\n")
    adapted().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "0.1.dev0" not in text and text.count("- PEFT ") == 1 and text.count("- torch 2") == 1


# Embeddings ----------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """A model that names its embedding, and has no configuration."""

    def __init__(self, count):
        super().__init__()
        self.embed, self.fc = nn.Embedding(count, 4), nn.Linear(4, 2)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, x):
        return self.fc(self.embed(x))


def test_embeddings_are_saved_if_they_are_no_longer_as_large_as_when_the_model_was_wrapped(tmp_path):
    model = get_peft_model(Words(5), LoraConfig(r=2, target_modules=["fc"]))
    model.save_pretrained(tmp_path)
    assert not any("embed" in k for k in load_file(tmp_path / WEIGHTS))
    model.get_base_model().embed = nn.Embedding(7, 4)
    with pytest.warns(PeftWarning, match="the vocabulary's size has changed"):
        model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.embed.weight"].shape == (7, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(Words(7), tmp_path)
    assert torch.equal(again.get_base_model().embed.weight, model.get_base_model().embed.weight)


def test_embeddings_that_take_the_place_of_others_are_told_where_adapters_run_on_those(tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(len(list(tmp_path.iterdir())))
        model = get_peft_model(Words(5), LoraConfig(r=2, target_modules=["fc"]))
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(Words(5), tmp_path / "one")
        model.load_adapter(tmp_path / "one", "same")
    with pytest.warns(PeftWarning, match=r"other numbers for .*embed\.weight.* 'default', 'same' were loaded on"):
        model.load_adapter(tmp_path / "two", "other")


@pytest.mark.parametrize("name", [os.path.abspath("elsewhere"), "a\0b"])
def test_a_name_leads_to_no_other_folder(name):
    model = adapted()
    with pytest.raises(ValueError, match="no name of a folder below"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["fc1"]))
    assert list(model.peft_config) == ["default"]


# Leftovers -----------------------------------------------------------------------------------------------------------


def test_only_the_folders_of_the_saved_adapters_are_swept(tmp_path):
    (tmp_path / "checkpoints" / ".saving-of-another").mkdir(parents=True)
    (tmp_path / ".saving-dead").mkdir()
    adapted().save_pretrained(tmp_path)
    assert (tmp_path / "checkpoints" / ".saving-of-another").exists() and not (tmp_path / ".saving-dead").exists()


def test_tensors_without_numbers_are_named_and_nothing_is_written(tmp_path):
    adapted().save_pretrained(tmp_path)
    before = contents(tmp_path)
    bare = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["fc1"]), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"meta device: .*fc1\.lora_A\.weight"):
        bare.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "1KB"}, {"safe_serialization": False}], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_told_when_they_are_saved(options, number, kind, tmp_path):
    model = adapted()
    weight = model.base_model.model.fc1.lora_B["default"].weight
    weight.data = weight.data.to(kind)
    weight.data[1, 1] = number
    with pytest.warns(PeftWarning, match=r"NaN or infinite values in 'base_model\.model\.fc1\.lora_B\.weight'"):
        model.save_pretrained(tmp_path, **options)


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("permissions do not bind this user")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        adapted().save_pretrained(tmp_path)
