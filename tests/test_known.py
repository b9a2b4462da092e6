"""A configuration that has been read before is copied: as it was, sharing nothing, and never without its warnings."""

from __future__ import annotations

import json
import warnings

import pytest

from peft import IA3Config, LoraConfig, OFTConfig, PeftConfig, PrefixTuningConfig
from peft import known as room
from peft.errors import UnknownFieldWarning

CASES = {
    "plain": LoraConfig(r=4, target_modules=["a", "b"], rank_pattern={"a": 2}, task_type="CAUSAL_LM"),
    "nested": LoraConfig(target_modules=["a"], layer_replication=[(0, 2), (1, 3)], modules_to_save=["head"]),
    "a regular expression": LoraConfig(target_modules=r".*\.q", exclude_modules=["b"]),
    "another method": OFTConfig(target_modules=["a"], oft_block_size=4),
    "IA3": IA3Config(target_modules=["a"], feedforward_modules=["a"]),
    "a prompt": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(room, "_found", {})


@pytest.fixture
def builds(monkeypatch):
    """How often configurations have been made of all their fields."""
    count, real = [], PeftConfig._build.__func__
    monkeypatch.setattr(PeftConfig, "_build", classmethod(lambda cls, *a: count.append(cls) or real(cls, *a)))
    return count


def save(folder, **changes):
    LoraConfig(target_modules=["a"]).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_it_is_as_if_it_had_been_read(tmp_path, builds, case):
    CASES[case].save_pretrained(tmp_path)
    first, second, third, fourth = (PeftConfig.from_pretrained(tmp_path) for _ in range(4))
    assert len(builds) == 3  # the second time once more, to see that it says nothing
    for other in (second, third, fourth):
        assert other == first and type(other) is type(first) and vars(other) == vars(first)
        assert list(vars(other)) == list(vars(first))
    for name, value in vars(third).items():
        if isinstance(value, (list, set, dict)):
            assert vars(fourth)[name] is not value and type(vars(fourth)[name]) is type(value)
            value.clear()
    assert PeftConfig.from_pretrained(tmp_path) == fourth == first


def test_what_is_inside_values_is_copied_too(tmp_path):
    save(tmp_path, layer_replication=[[0, 2]], alpha_pattern={"a": 3})
    for _ in range(4):
        config = PeftConfig.from_pretrained(tmp_path)
        assert config.layer_replication == [[0, 2]] and config.alpha_pattern == {"a": 3}
        config.layer_replication[0].append(7)
        config.alpha_pattern["b"] = 7


@pytest.mark.parametrize(
    ("changes", "category"), [({"unheard_of": 1}, UnknownFieldWarning), ({"loftq_config": {"x": 1}}, UserWarning)]
)
def test_what_is_doubtful_is_said_each_time(tmp_path, changes, category):
    save(tmp_path, **changes)
    for _ in range(4):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            PeftConfig.from_pretrained(tmp_path)
        assert any(issubclass(w.category, category) for w in said)


def test_other_bytes_and_other_values_are_read(tmp_path, builds):
    save(tmp_path)
    for _ in range(3):
        assert PeftConfig.from_pretrained(tmp_path).r == 8
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "r": 5}))
    assert PeftConfig.from_pretrained(tmp_path).r == 5
    del values["lora_alpha"]
    file.write_text(json.dumps(values))
    for alpha in (3, 4, 5, None):
        given = {} if alpha is None else {"lora_alpha": alpha}
        assert PeftConfig.from_pretrained(tmp_path, **given).lora_alpha == (alpha or 8)
    for _ in range(3):
        assert LoraConfig.from_pretrained(tmp_path, r=64).r == 8  # the file's own counts


def test_errors_are_told_each_time(tmp_path):
    save(tmp_path, r="many")
    for _ in range(3):
        with pytest.raises(TypeError, match="r to 'many'"):
            PeftConfig.from_pretrained(tmp_path)


def test_where_a_file_lies_is_not_what_it_says(tmp_path):
    for name in "abcd":
        save(tmp_path / name)
        assert PeftConfig.from_pretrained(tmp_path / name).origin == str(tmp_path / name)


def test_few_are_kept(tmp_path):
    for r in range(1, 3 * room.MOST):
        for _ in range(2):
            assert PeftConfig.from_pretrained(save(tmp_path, r=r)).r == r
    assert len(room._found) <= room.MOST


class Own(LoraConfig):
    """Another program's."""


def test_classes_of_other_programs_are_made_each_time(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr("peft.registry.config_class", lambda kind: Own)
    for _ in range(4):
        assert type(PeftConfig.from_pretrained(tmp_path)) is Own
    monkeypatch.undo()
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
