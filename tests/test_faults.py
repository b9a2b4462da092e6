"""Faults of disks, files and processes: the old adapter stays whole, and the error names the file and the cause."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fuzz_files
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.core import commit

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and full disks are those of POSIX")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def adapted(r=2, seed=1, **changes):
    model = get_peft_model(mlp(), LoraConfig(r=r, target_modules=["0", "2"], init_lora_weights=False, **changes))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.normal_()
    return model


X = torch.linspace(-1, 1, 24).view(4, 6)
OLD, NEW = {"r": 2, "seed": 1}, {"r": 4, "seed": 2, "lora_alpha": 32}


def answer(folder):
    return PeftModel.from_pretrained(mlp(), folder)(X)


def is_one_of_both(folder):
    """Whether the folder holds the old adapter or the new one, whole; which of them."""
    got = answer(folder)
    return [torch.equal(got, adapted(**kind).eval()(X)) for kind in (OLD, NEW)]


# A full disk --------------------------------------------------------------------------------------------------------


class Disk:
    """Writing stops with "no space left" at the given call of the given function."""

    def __init__(self, monkeypatch, owner, name, at):
        self.calls, self.at, real = 0, at, getattr(owner, name)

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at:
                raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


CALLS = [(os, "fsync"), (os, "replace"), (commit.json, "dump"), (torch, "from_file")]


@pytest.mark.parametrize(("owner", "name"), CALLS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("size", [10**9, 100])
def test_a_full_disk_leaves_one_whole_adapter(tmp_path, monkeypatch, owner, name, at, size):
    monkeypatch.setenv("PEFT_DURABLE", str(int(name == "fsync")))
    adapted(**OLD).save_pretrained(tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    model = adapted(**NEW)
    with monkeypatch.context() as patch:
        disk = Disk(patch, owner, name, at)
        try:
            model.save_pretrained(tmp_path, max_shard_size=size)
            failed = False
        except OSError as error:
            failed = True
            assert error.errno == errno.ENOSPC and (error.filename or str(tmp_path) in str(error))
    assert failed == (disk.calls >= at)
    old, new = is_one_of_both(tmp_path)
    assert old != new
    assert old or not (failed and name != "replace" and at == 1)
    model.save_pretrained(tmp_path)
    assert is_one_of_both(tmp_path) == [False, True]
    assert sorted(p.name for p in tmp_path.iterdir()) == files


@POSIX
@pytest.mark.parametrize("safe", [True, False])
def test_a_limit_of_the_size_of_files_leaves_the_old_adapter(tmp_path, safe):
    code = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from test_faults import NEW, adapted
model = adapted(**{{**NEW, "r": 4096}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    model.save_pretrained({str(tmp_path)!r}, safe_serialization={safe})
except OSError as error:
    print("OSError", type(error).__name__, error.errno, error)
"""
    adapted(**OLD).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    wanted = f"OSError UnwritableError {errno.EFBIG} {str(tmp_path)!r} cannot be written: the file is larger than"
    assert wanted in done.stdout, done.stdout + done.stderr
    assert is_one_of_both(tmp_path) == [True, False]
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize(("durable", "least"), [("", 0), ("0", 0), ("1", 7)])
def test_the_disk_is_waited_for_where_that_is_asked(tmp_path, monkeypatch, durable, least):
    monkeypatch.setenv("PEFT_DURABLE", durable)
    flushed, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(handle) or real(handle))
    adapted(**OLD).save_pretrained(tmp_path)
    assert len(flushed) >= least if least else not flushed


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_what_a_disk_refuses_without_a_path_is_told_with_one(tmp_path, monkeypatch, code):
    monkeypatch.setenv("PEFT_DURABLE", "1")
    adapted(**OLD).save_pretrained(tmp_path)

    def refuse(handle):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match=WEIGHTS + "|" + CONFIG) as caught:
            adapted(**NEW).save_pretrained(tmp_path)
    assert caught.value.errno == code and is_one_of_both(tmp_path) == [True, False]


# A killed process ----------------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
sys.path[:0] = {path!r}
from test_faults import NEW, adapted
from peft.core import commit
model = adapted(**NEW)
count = 0
def step(at):
    global count
    if (count := count + 1) == at:
        os.kill(os.getpid(), signal.SIGKILL)
def save(at, folder):
    for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "scandir")):
        def call(*args, real=getattr(owner, name), **kwargs):
            step(at)
            return real(*args, **kwargs)
        setattr(owner, name, call)
    model.save_pretrained(folder, max_shard_size=100 if at % 2 else 10**9)
    os._exit(0)
ends = {{}}
for at, folder in {folders!r}.items():
    if (child := os.fork()) == 0:
        save(at, folder)
    ends[at] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""
STEPS = [4, 5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of saves that died at a step, by its number; one process forks them all."""
    folders = {at: str(tmp_path_factory.mktemp(f"step{at}")) for at in STEPS}
    for folder in folders.values():
        adapted(**OLD).save_pretrained(folder)
    code = KILLED.format(path=sys.path, folders=folders)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = {int(at): code for at, code in json.loads(done.stdout.splitlines()[-1]).items()}
    assert set(ends.values()) <= {-signal.SIGKILL, 0} and ends[STEPS[0]] == -signal.SIGKILL, ends
    return {at: Path(folder) for at, folder in folders.items()}


@POSIX
@pytest.mark.parametrize("at", STEPS)
def test_a_killed_save_leaves_one_whole_adapter(killed, tmp_path, at):
    adapted(**OLD).save_pretrained(tmp_path)
    names, tmp_path = sorted(p.name for p in tmp_path.iterdir()), killed[at]
    assert sum(is_one_of_both(tmp_path)) == 1
    before = answer(tmp_path)
    commit.settle(tmp_path)
    assert torch.equal(answer(tmp_path), before)
    adapted(**NEW).save_pretrained(tmp_path)
    assert is_one_of_both(tmp_path) == [False, True] and sorted(p.name for p in tmp_path.iterdir()) == names


def interrupted(folder, safe=True, size=10**9):
    """A save that stopped after its first file had moved."""
    real, moved = os.replace, []

    def replace(source, target):
        if Path(target).parent == folder and moved:
            raise KeyboardInterrupt
        if Path(target).parent == folder:
            moved.append(target)
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            adapted(**NEW).save_pretrained(folder, safe_serialization=safe, max_shard_size=size)
    return moved


@pytest.mark.filterwarnings("ignore:.*is a pickle")
@pytest.mark.parametrize(("safe", "size"), [(True, 10**9), (True, 100), (False, 10**9)])
def test_an_interrupted_move_is_read_as_if_it_had_ended(tmp_path, safe, size):
    adapted(**OLD).save_pretrained(tmp_path)
    assert interrupted(tmp_path, safe, size)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 2  # the folder holds a mixture
    assert is_one_of_both(tmp_path) == [False, True]
    commit.settle(tmp_path)
    assert not list(tmp_path.glob(".saving-*")) and is_one_of_both(tmp_path) == [False, True]


LISTS = ["", "[]", "{}", '{"moving": 3, "replaced": []}', '{"moving": [["a"]], "replaced": [".."]}', "[" * 99999]


@pytest.mark.parametrize("text", LISTS)
def test_a_list_of_moves_that_is_none_is_ignored(tmp_path, text):
    adapted(**OLD).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / ".saving-x").mkdir()
    (tmp_path / "a" / ".saving-x" / "moving.json").write_text(text)
    assert is_one_of_both(tmp_path / "a") == [True, False]
    commit.settle(tmp_path / "a")
    assert not (tmp_path / "a" / ".saving-x").exists() and is_one_of_both(tmp_path / "a") == [True, False]


def test_a_list_of_moves_reaches_no_other_files(tmp_path):
    adapted(**OLD).save_pretrained(tmp_path / "a")
    (tmp_path / "precious").touch()
    stage = tmp_path / "a" / ".saving-x"
    stage.mkdir()
    names = ["../precious", "..", str(tmp_path / "precious"), "../../precious"]
    (stage / "moving.json").write_text(json.dumps({"moving": names, "replaced": [*names, CONFIG]}))
    assert is_one_of_both(tmp_path / "a") == [True, False]
    commit.settle(tmp_path / "a")
    assert (tmp_path / "precious").exists() and is_one_of_both(tmp_path / "a") == [True, False]


# Damaged files -------------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    for end in range(0, len(data), 7):
        (tmp_path / WEIGHTS).write_bytes(data[:end])
        with pytest.raises(ValueError, match=f"{WEIGHTS}.*truncated"):
            load_peft_weights(str(tmp_path))


def test_any_flipped_bit_is_found(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    data, random_ = (tmp_path / WEIGHTS).read_bytes(), random.Random(0)
    head = int.from_bytes(data[:8], "little")
    want = get_peft_model_state_dict(model)
    unnoticed = 0
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << random_.randrange(8)
        (tmp_path / WEIGHTS).write_bytes(bad)
        try:
            got = load_peft_weights(str(tmp_path))
        except ValueError as error:
            assert WEIGHTS in str(error) and ("truncated" in str(error) or "damaged" in str(error))
            continue
        assert 8 <= at < 8 + head  # a remark has changed
        assert got.keys() == want.keys() and all(torch.equal(got[k], v) for k, v in want.items())
        unnoticed += 1
    assert unnoticed < head


def test_swapped_pages_are_found(tmp_path):
    model = adapted(r=1024)
    model.save_pretrained(tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    one, two = slice(start, start + 4096), slice(start + 4096, start + 8192)
    data[one], data[two] = data[two], data[one]
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged"):
        load_peft_weights(str(tmp_path))


def test_a_flipped_bit_of_the_configuration_is_an_error_or_a_warning(tmp_path):
    adapted().save_pretrained(tmp_path)
    data, want, silent = (tmp_path / CONFIG).read_bytes(), answer(tmp_path), 0
    for at in range(0, len(data), 5):
        (tmp_path / CONFIG).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                got = answer(tmp_path)
            except (ValueError, TypeError, RuntimeError, NotImplementedError):
                continue
        if not caught:
            silent += 1
            assert torch.equal(got, want)  # a field of no account, such as the version
    assert silent < len(data) / 5


def test_a_file_without_a_checksum_loads(tmp_path):
    adapted(**OLD).save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    assert is_one_of_both(tmp_path) == [True, False]


# Shards --------------------------------------------------------------------------------------------------------------


def sharded(folder):
    adapted(**OLD).save_pretrained(folder, max_shard_size=100)
    shards = sorted(folder.glob("adapter_model-*.safetensors"))
    assert len(shards) > 2
    return shards, folder / f"{WEIGHTS}.index.json"


def test_a_missing_shard_is_named(tmp_path):
    shards, _ = sharded(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"{WEIGHTS}\.index\.json names '{shards[1].name}', which is missing"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_shard_of_another_save_is_named(tmp_path):
    shards, _ = sharded(tmp_path / "a")
    adapted(r=2, seed=5).save_pretrained(tmp_path / "b", max_shard_size=100)
    shards[1].write_bytes((tmp_path / "b" / shards[1].name).read_bytes())
    with pytest.raises(ValueError, match=rf"{shards[1].name} does not belong to .*another save"):
        PeftModel.from_pretrained(mlp(), tmp_path / "a")


def test_shards_that_hold_other_tensors_are_named(tmp_path):
    shards, _ = sharded(tmp_path)
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(ValueError, match=rf"{shards[0].name} does not belong to"):
        PeftModel.from_pretrained(mlp(), tmp_path)


@pytest.mark.parametrize("place", ["../a.safetensors", "/a.safetensors", "a.bin", 3, None, ["a"]])
def test_an_index_leads_nowhere_else(tmp_path, place):
    _, index = sharded(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = place
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="in the same folder"):
        PeftModel.from_pretrained(mlp(), tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}, "metadata": 3}', "[" * 9999]
)
def test_an_index_that_is_none_is_named(tmp_path, text):
    _, index = sharded(tmp_path)
    index.write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        PeftModel.from_pretrained(mlp(), tmp_path)


# Random files --------------------------------------------------------------------------------------------------------


@POSIX
def test_random_files_end_in_named_errors(tmp_path):
    bench = fuzz_files.Bench(tmp_path, ["LORA", "LOHA", "IA3", "OFT", "VERA", "ADALORA"])
    fuzz_files.campaign(bench, 500)
    assert bench.finds == [] and sum(bench.seen.values()) >= 400
