"""The numbers of a file: read through memory that is used again, written in blocks, and told by one checksum."""

from __future__ import annotations

import itertools
import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft.core import files, header, payload
from peft.core.header import read_header
from peft.errors import PeftWarning

KINDS = {
    "one kind": {"a": torch.arange(3000.0), "b": torch.ones(2, 5), "c": torch.tensor(2.0), "none": torch.zeros(0, 4)},
    "several": {"a": torch.arange(1001, dtype=torch.uint8), "b": torch.ones(7).double(), "c": torch.ones(3).half()},
    "whole chunks": {"a": torch.arange(1024.0), "b": -torch.arange(1024.0)},
    "nothing": {"none": torch.zeros(0, 4)},
    "small and large": {f"{i:02}": torch.full((n,), float(i)) for i, n in enumerate([3, 1500, 0, 900, 200, 5000, 0])},
    "large of several": {"a": torch.arange(2001).double(), "b": torch.arange(3001).half(), "c": torch.ones(9).bool()},
}


def written(path, state, **remarks):
    payload.write_file(path, state, remarks)
    return read_header(path)


def sum_of(raw: bytes) -> int:
    """The second half of a checksum, from its definition."""
    words = [int.from_bytes(raw[i : i + 8].ljust(8, b"\0"), "little") for i in range(0, len(raw), 8)]
    return sum((2 * (i // 512) + 1) * word for i, word in enumerate(words)) % 2**64


@pytest.fixture(params=[2**20, 2**13, 4096], ids=["one block", "several", "many"])
def block(request, monkeypatch):
    """How much is read or written at once; nothing waits from another test. Larger files are read where they are."""
    monkeypatch.setattr(payload, "BLOCK", request.param)
    monkeypatch.setattr(payload, "_waiting", [])
    yield request.param
    payload._waiting.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again_each_tensor_in_its_own_memory(tmp_path, block, kind):
    state, file = KINDS[kind], tmp_path / "a.safetensors"
    head = written(file, state)
    raw = file.read_bytes()[head.start :]
    assert head.metadata["checksum"] == f"{head.tensors.names}-{sum_of(raw):016x}"
    got = files.Saved({str(file): head}).read(own=True)
    for found in (got, load_file(file), files.read_weights(file)):
        assert found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())
        assert all(found[k].dtype is v.dtype and found[k].shape == v.shape for k, v in state.items())
    assert all(t.untyped_storage().nbytes() == t.nbytes and t.storage_offset() == 0 for t in got.values())
    places = [t.data_ptr() for t in got.values() if t.nbytes]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["00", "05", "06"])
def test_numbers_that_are_not_finite_are_told_of_each_tensor(tmp_path, block, name, own, bad):
    state, file = {k: v.clone() for k, v in KINDS["small and large"].items()}, tmp_path / "a.safetensors"
    state["06"] = torch.ones(1)
    state[name][-1] = bad
    saved = files.Saved({str(file): written(file, state)})
    with pytest.warns(PeftWarning, match=f"in '{name}'"):
        got = saved.read(own=own)
    assert all(torch.equal(got[k].nan_to_num(), v.nan_to_num()) for k, v in state.items())


def test_a_file_leaves_no_numbers_in_the_next(tmp_path, block):
    large, small = KINDS["one kind"], {"a": torch.arange(5.0)}
    headers = {n: written(tmp_path / n, s) for n, s in (("large", large), ("small", small))}
    first = files.Saved({str(tmp_path / "large"): headers["large"]}).read()
    kept = {k: v.clone() for k, v in first.items()}
    assert torch.equal(files.Saved({str(tmp_path / "small"): headers["small"]}).read()["a"], small["a"])
    assert all(torch.equal(first[k], v) for k, v in kept.items())


@pytest.mark.parametrize("place", [0, 4095, 4096, -1])
def test_each_bit_counts(tmp_path, block, place):
    file = tmp_path / "a.safetensors"
    start = written(file, KINDS["one kind"]).start
    raw = bytearray(file.read_bytes())
    raw[start + place if place >= 0 else -1] ^= 8
    file.write_bytes(raw)
    for own in (True, False):
        with pytest.raises(ValueError, match="damaged"):
            files.Saved({str(file): read_header(file)}).read(own=own)


def test_chunks_that_change_places_count(tmp_path, block):
    file = tmp_path / "a.safetensors"
    start = written(file, KINDS["whole chunks"]).start
    raw = file.read_bytes()
    file.write_bytes(raw[:start] + raw[start + 4096 :] + raw[start : start + 4096])
    with pytest.raises(ValueError, match="damaged"):
        files.read_weights(file)


@pytest.mark.parametrize("kind", ["one kind", "small and large", "large of several"])
def test_a_file_that_becomes_shorter_says_so(tmp_path, block, kind):
    file = tmp_path / "a.safetensors"
    saved = files.Saved({str(file): written(file, KINDS[kind])})
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="became shorter"):
        saved.read(own=True)


def test_a_start_at_any_place_is_read(tmp_path):
    """Other programs do not align the data."""
    save_file({"a": torch.arange(6.0)}, tmp_path / "whole.safetensors")
    raw = (tmp_path / "whole.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    head = raw[8:end].rstrip() + b" "
    head += b" " * (len(head) % 2 == 0)
    (tmp_path / "odd.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + raw[end:])
    assert torch.equal(
        files.read_weights(tmp_path / "whole.safetensors")["a"], files.read_weights(tmp_path / "odd.safetensors")["a"]
    )


def test_tensors_at_any_place_are_read(tmp_path, block):
    """Nor the tensors in it: one byte before numbers of eight."""
    state = {"a": torch.ones(1, dtype=torch.uint8), "b": torch.arange(1500).double(), "c": torch.arange(400).double()}
    raw, head, here = b"", {}, 0
    for name, tensor in state.items():
        part = bytes(tensor.view(torch.uint8).tolist())
        code = {torch.uint8: "U8", torch.float64: "F64"}[tensor.dtype]
        head[name] = {"dtype": code, "shape": [len(tensor)], "data_offsets": [here, here + len(part)]}
        raw, here = raw + part, here + len(part)
    text = json.dumps(head).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw)
    for own in (True, False):
        got = files.Saved({str(file): read_header(file)}).read(own=own)
        assert all(torch.equal(got[k], v) for k, v in state.items())


def test_memory_is_lent_to_one_reader_at_a_time(tmp_path):
    states = [{"a": torch.full((5000,), float(i)), "b": torch.full((7,), -float(i))} for i in range(4)]
    heads = [{str(tmp_path / f"{i}"): written(tmp_path / f"{i}", s)} for i, s in enumerate(states)]
    wrong: list[int] = []

    def read(i):
        for _ in range(50):
            got = files.Saved(heads[i]).read()
            wrong.extend(i for k, v in states[i].items() if not torch.equal(got[k], v))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for step, thread in itertools.product(("start", "join"), threads):
        getattr(thread, step)()
    assert not wrong and len(payload._waiting) <= 1


def test_a_default_device_does_not_matter(tmp_path):
    with torch.device("meta"):
        written(tmp_path / "a.safetensors", {"a": torch.arange(9.0, device="cpu")})
        got = files.read_weights(tmp_path / "a.safetensors")["a"]
    assert torch.equal(got, torch.arange(9.0))


# Heads that are parsed once ------------------------------------------------------------------------------------------


@pytest.fixture
def parses(monkeypatch):
    """How often heads are parsed; none is known at first."""
    count, real = [], header._parsed
    monkeypatch.setattr(header, "_heads", {})
    monkeypatch.setattr(header, "_parsed", lambda *a: count.append(a) or real(*a))
    return count


def test_heads_that_differ_in_nothing_but_the_checksum_are_parsed_once(tmp_path, parses):
    heads = [written(tmp_path / "a", {"a": torch.full((3,), float(i))}, note="é", zeal="x") for i in range(3)]
    assert len(parses) == 1
    assert len({h.metadata["checksum"] for h in heads}) == 3 and heads[0].tensors is heads[2].tensors
    assert [list(h.metadata) for h in heads] == [["checksum", "note", "zeal"]] * 3 and heads[2].metadata["note"] == "é"
    heads[0].metadata["note"] = "changed"
    assert read_header(tmp_path / "a").metadata["note"] == "é"
    assert written(tmp_path / "a", {"a": torch.zeros(3)}, note="other").metadata["note"] == "other"
    assert written(tmp_path / "a", {"a": torch.zeros(4)}, note="other").tensors["a"].shape == (4,) and len(parses) == 3


def rewritten(file, change):
    """The file with another head of whatever length."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    head = change(raw[8:end])
    file.write_bytes(len(head).to_bytes(8, "little") + head + raw[end:])


@pytest.mark.parametrize("value", ["", "x", "a-b", "0" * 50, r"\u0030-1", r"a\"b", "1" * 16 + "-" + "f" * 16 + "0"])
def test_a_checksum_of_any_form_is_read_as_it_is(tmp_path, parses, value):
    file = tmp_path / "a"
    told = written(file, {"a": torch.ones(3)}).metadata["checksum"]
    rewritten(file, lambda head: head.replace(told.encode(), value.encode()))
    assert read_header(file).metadata["checksum"] == json.loads(f'"{value}"')


def test_a_known_head_over_other_data_is_a_fault(tmp_path, parses):
    file = tmp_path / "a"
    written(file, {"a": torch.ones(3)})
    raw = file.read_bytes()
    for damaged in (raw[:-1], raw + b"0"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="no complete safetensors file"):
            read_header(file)
    file.write_bytes(raw)
    assert read_header(file).tensors["a"].shape == (3,)
    rewritten(file, lambda head: head + head[head.index(b'"a":') - 1 :].replace(b'{"a"', b',"a"'))
    with pytest.raises(ValueError, match="no complete safetensors file"):
        read_header(file)


def test_a_head_longer_than_what_is_read_at_once_is_read(tmp_path):
    state = {f"{'x' * 100}.{i}": torch.full((2,), float(i)) for i in range(300)}
    found = written(tmp_path / "a.safetensors", state)
    assert found.start > header._FIRST and found.tensors.keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in files.read_weights(tmp_path / "a.safetensors").items())


def test_few_heads_are_kept(tmp_path, parses):
    for i in range(3 * header._MOST):
        written(tmp_path / "a", {"a": torch.zeros(i)})
    assert len(header._heads) <= header._MOST
