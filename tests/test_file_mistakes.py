"""Mistakes with folders and files: each is told with the place, the cause and the cure, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, merge_checkpoint
from peft.convert import convert_adapter
from peft.errors import PeftError, UnwritableError
from peft.hotswap import room_for
from peft.inspection import UnreadableAdapterError, inspect_adapter
from test_inspect import command

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(**changes: Any) -> PeftModel:
    return get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"], **changes))


def saved(folder: Path, **changes: Any) -> Path:
    adapted(**changes).save_pretrained(folder)
    return folder


def base(folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(nn.Sequential(nn.Linear(3, 3)).state_dict(), folder / "model.safetensors")
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ---- what cannot be written --------------------------------------------------------------------------------------


def save(source: Path, out: Path) -> None:
    adapted().save_pretrained(out)


def save_two(source: Path, out: Path) -> None:
    model = adapted()
    model.add_adapter("x" * 300, LoraConfig(target_modules=["0"]))
    model.save_pretrained(out)


def save_config(source: Path, out: Path) -> None:
    LoraConfig().save_pretrained(out)


def merge(source: Path, out: Path) -> None:
    merge_checkpoint(source / "base", source / "adapter", out, model=nn.Sequential(nn.Linear(3, 3)))


def convert(source: Path, out: Path) -> None:
    convert_adapter(source / "adapter", "lora", out)


PLACES = {
    "a file above": (lambda here: here / "file" / "x", "a part of the path is a file"),
    "a file far above": (lambda here: here / "file" / "x" / "y", "a part of the path is a file"),
    "a long name": (lambda here: here / "new" / ("x" * 300), "a name in it is longer"),
    "links in a circle": (lambda here: here / "circle" / "x", "lead in a circle"),
    "a null character": (lambda here: here / "a\0b", "no null character"),
}
WRITERS = [save, save_config, merge, convert]


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_cannot_be_written_is_told_and_nothing_is_left(
    case: str, write: Callable[[Path, Path], Any], tmp_path: Path
) -> None:
    place, cause = PLACES[case]
    source = tmp_path / "source"
    source.mkdir()
    saved(source / "adapter"), base(source / "base")
    (here := tmp_path / "here").mkdir()
    (here / "file").write_text("mine")
    (here / "circle").symlink_to("circle")
    before = tree(tmp_path)
    with pytest.raises(UnwritableError, match=f"cannot be written: .*{cause}.*Nothing was written") as found:
        write(source, place(here))
    assert isinstance(found.value, OSError) and isinstance(found.value, PeftError)
    assert repr(str(place(here)))[1:20] in str(found.value)
    assert tree(tmp_path) == before and (here / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=["no permission", "read-only"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_what_the_system_refuses_is_told(
    write: Callable[[Path, Path], Any], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "new" / "out"
    source.mkdir()
    saved(source / "adapter"), base(source / "base")
    before = tree(tmp_path)

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number), str(out))

    made = Path.mkdir

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        refused() if path == out.parent else made(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UnwritableError, match=r"no permission|can only be read") as found:
        write(source, out)
    assert found.value.errno == number and str(tmp_path) in str(found.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_a_name_that_the_system_cannot_write_is_told(
    write: Callable[[Path, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "größer" / "out"
    source.mkdir()
    saved(source / "adapter"), base(source / "base")
    before, made = tree(tmp_path), Path.mkdir

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:  # as where LC_ALL=C and Python's UTF-8 mode is off
        str(path).encode("ascii")
        made(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UnwritableError, match=r"'ascii'.*Choose another name, or start Python with -X utf8"):
        write(source, out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("write", [save, save_config, convert], ids=lambda f: f.__name__)
def test_a_folder_that_is_there_but_cannot_be_written_is_told(
    write: Callable[[Path, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    saved(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    monkeypatch.setattr("peft.config.open", lambda *a, **k: (refused if "x" in a else open)(*a, **k), raising=False)
    with pytest.raises(UnwritableError, match="no permission"):
        write(tmp_path, tmp_path / "out")
    assert not tree(tmp_path / "out")


def test_of_several_adapters_none_is_saved_where_one_folder_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(UnwritableError, match="longer"):
        save_two(tmp_path, tmp_path / "new" / "out")
    assert not tree(tmp_path)


def test_a_wrong_name_of_an_adapter_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters of this model"):
        adapted().save_pretrained(tmp_path / "out", selected_adapters=["other"])
    assert not tree(tmp_path)


def test_the_commands_say_so_in_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "adapter"), base(tmp_path / "base")
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "x")
    for words in (
        ["merge", "--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--out", out],
        ["convert", str(tmp_path / "adapter"), "--to", "lora", "--out", out],
    ):
        code, text = command(*words)
        assert code == 1 and "part of the path is a file" in text.replace("\n", " ") and "Traceback" not in text


# ---- what cannot be read -----------------------------------------------------------------------------------------


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    saved(tmp_path, r=5)
    file = tmp_path / CONFIG
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert PeftConfig.from_pretrained(tmp_path).r == 5
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 3)), tmp_path)
    assert model.peft_config["default"].r == 5 and inspect_adapter(tmp_path).ok
    json.loads(file.read_text(encoding="utf-8-sig"))


def test_a_folder_without_an_adapter_tells_where_adapters_are(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("")
    with pytest.raises(UnreadableAdapterError, match=r"No adapter lies in it or below. An adapter is a folder with"):
        inspect_adapter(tmp_path)
    saved(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(UnreadableAdapterError, match=r"Adapters lie in 'run.checkpoint-2'.*give that folder, '.*-2'"):
        inspect_adapter(tmp_path)


@pytest.mark.parametrize(
    "names, text",
    [
        ([], "the folder is empty. An adapter is a folder with"),
        (["config.json", "model.safetensors"], "It looks like a whole model"),
        ([CONFIG], "adapter_config.json is there, its weights are not"),
        ([WEIGHTS], "Its weights are there, its adapter_config.json is not"),
    ],
)
def test_what_is_missing_is_named(names: list[str], text: str, tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    (folder := tmp_path / "part").mkdir()
    for name in names:
        file = tmp_path / "whole" / name
        (folder / name).write_bytes(file.read_bytes() if file.exists() else b"{}")
    with pytest.raises(UnreadableAdapterError, match=text):
        inspect_adapter(folder)


def test_a_misspelt_folder_is_told_with_the_nearest_one(tmp_path: Path) -> None:
    saved(tmp_path / "my-adapter")
    with pytest.raises(UnreadableAdapterError, match=r"no such folder. Did you mean 'my-adapter'"):
        inspect_adapter(tmp_path / "my-adaptr")


# ---- the same twice, and other kinds ------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["adapter", "../{}/adapter", "link"])
def test_an_adapter_that_is_given_twice_is_not_added_twice(again: str, tmp_path: Path) -> None:
    saved(tmp_path / "adapter"), base(tmp_path / "base")
    (tmp_path / "link").symlink_to("adapter")
    twice = [tmp_path / "adapter", tmp_path / again.format(tmp_path.name)]
    with pytest.raises(ValueError, match=r"given twice.*weight 2"):
        merge_checkpoint(tmp_path / "base", twice, tmp_path / "out", model=nn.Sequential(nn.Linear(3, 3)))
    assert not (tmp_path / "out").exists()


def test_a_room_is_made_from_folders_too(tmp_path: Path) -> None:
    saved(tmp_path / "a", r=3), saved(tmp_path / "b", r=7)
    assert room_for([tmp_path / "a", str(tmp_path / "b"), LoraConfig(target_modules=["0"], r=5)]).r == 7


@pytest.mark.parametrize("given", ["folder", 3, LoraConfig(), {"r": 3}, [3], [nn.Linear(2, 2)], [None]], ids=str)
def test_a_room_of_something_else_is_a_type_error(given: Any) -> None:
    with pytest.raises(TypeError, match="room_for takes"):
        room_for(given)


# ---- the wrong base ----------------------------------------------------------------------------------------------


def blocks(width: int = 6, count: int = 2, name: str = "fc") -> nn.Module:
    return nn.ModuleList([nn.ModuleDict({name: nn.Linear(width, width)}) for _ in range(count)])


OTHERS = {
    "wider": (blocks(8), "size mismatch"),
    "shorter": (blocks(count=1), r"no place .*\n.*1\.fc"),
    "longer": (blocks(count=3), r"lacks 2 tensors .*\n.*2\.fc"),
    "of other names": (blocks(name="dense"), "not found in the base model"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_merge_into_the_wrong_base_tells_which_one_is_meant(case: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    own: Any = blocks()
    own.name_or_path = "their/base"
    get_peft_model(own, LoraConfig(target_modules=["fc"])).save_pretrained(tmp_path / "adapter")
    other, facts = OTHERS[case]
    (tmp_path / "base").mkdir()
    save_file(other.state_dict(), tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=facts) as found:
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", model=other)
    text = str(found.value)
    mark = inspect_adapter(tmp_path / "adapter").fingerprint
    assert f"made for 'their/base' (ModuleList) with the fingerprint {mark}" in text
    assert "Give that base, or an adapter that was made for this one. Nothing was written." in text
    assert "ignore_mismatched_sizes" not in text and "meta" not in text and "key_mapping" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_merge_with_an_edited_configuration_does_not_blame_the_base(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", r=2)
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**values, "r": 3}))
    with pytest.raises(ValueError, match=r"This base has that fingerprint.*have been changed since"):
        merge_checkpoint(base(tmp_path / "base"), adapter, tmp_path / "out", model=nn.Sequential(nn.Linear(3, 3)))
