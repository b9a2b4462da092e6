"""Configurations: what is common to the configurations of all methods, and their files.

A configuration is a dataclass. Its file, `adapter_config.json`, holds every field in sorted order, sets as
sorted lists and enums as strings. A file may come from another version: fields that are unknown here are
dropped with an `UnknownFieldWarning`, while an unknown argument in code is a TypeError.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, TypeVar

from .core import hub
from .core.commit import folders, writing
from .core.defaults import CONFIG_NAME
from .errors import IncompleteError, UnknownFieldWarning, nearest, report
from .known import SCALARS, Content, copier, known, note, same
from .types import PeftType, TaskType
from .version import __version__

MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}
Config = TypeVar("Config", bound="PeftConfigMixin")

# Fields that say which part of the model is adapted, or that hold for the adapter as a whole.
NOT_PER_MODULE = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "target_parameters",
        "trainable_token_indices",
        "layer_replication",
        "ensure_weight_tying",
        "runtime_config",
        "module_config",
        "bias",
        "fan_in_fan_out",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "alora_invocation_tokens",
        "arrow_config",
    ]
)


def describe(text: str, **extra: Any) -> dict[str, Any]:
    """The metadata of a field: its documentation, from which the reference page is made."""
    return {"help": text, **extra}


@dataclass
class PeftConfigMixin:
    """Reading and writing of a configuration."""

    # by field for first values: how those begin that count for good, because the base weight takes part in them
    counts: ClassVar[dict[str, tuple[str, ...]]] = {}

    task_type: str | TaskType | None = field(
        default=None, metadata=describe("The task, which chooses the class that wraps the model.")
    )
    peft_type: str | PeftType | None = field(default=None, metadata=describe("The method; set by the class."))
    auto_mapping: dict | None = field(
        default=None, metadata=describe("Class and library of the base model, if no task is set.")
    )
    peft_version: str | None = field(default=None, metadata=describe("The version that made the configuration."))

    def __post_init__(self) -> None:
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            raise ValueError(
                f"Invalid task type: {self.task_type!r}. Must be one of the following task types: "
                f"{', '.join(tasks)}.{nearest(str(self.task_type), tasks)}"
            )
        if self.peft_version is None:
            self.peft_version = __version__

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens in front of the input."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is adaption prompts."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that shares nothing with `self`; nested configurations too."""
        values = {f.name: _copied(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if not values.get("module_config"):
            values.pop("module_config", None)
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, which is made if need be. The old file survives a
        failure.

        Arguments:
            save_directory: the folder.
            kwargs: `auto_mapping_dict`: a value for `auto_mapping` in the file.

        Raises AssertionError if the path is a file, UnwritableError (an OSError) for what the system refuses.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        values = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        text = _json(values)
        with folders(save_directory):
            _replace(os.path.join(save_directory, CONFIG_NAME), text)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save the file in a repository on the Hugging Face Hub, which is made if need be.

        Arguments:
            repo_id: the repository, such as "user/adapter".
            kwargs: `private` and `token`, and arguments of `HfApi.upload_folder` such as `commit_message`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        repo = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repo, folder_path=folder, **kwargs)

    @classmethod
    def from_pretrained(
        cls: type[Config],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Config:
        """Read a configuration from a folder or from the Hugging Face Hub; the file names the class.

        Arguments:
            pretrained_model_name_or_path: the folder, or the repository's name.
            subfolder: a folder inside.
            kwargs: arguments of the download (`revision`, `token` ...), and values for fields that the file
                lacks.

        Raises ValueError if there is no file, or no valid one; TypeError if it does not name its method.
        """
        return cls._read(pretrained_model_name_or_path, subfolder, kwargs)[0]

    @classmethod
    def _read(
        cls: type[Config], model_id: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]
    ) -> tuple[Config, str, Content]:
        """`from_pretrained`, with the path and the content of the file."""
        path = hub.fetch(model_id, CONFIG_NAME, subfolder, **kwargs)
        with open(path, "rb", buffering=0) as file:
            raw: bytes = file.read()
        found = known(cls, raw, kwargs)
        if found is not None and cls._class_of(found.content.get("peft_type"), "") is found.kind:
            config, content = found.config(), found.content
        else:
            content = Content(_parsed(raw, path))
            values = {"peft_version": "0", **content}  # releases before 0.18 did not say
            target = cls._class_of(values.get("peft_type"), f" in '{path}'")
            own = {k: v for k, v in kwargs.items() if k in target._known() and k not in values}
            config = target._build({**own, **values}, f"'{path}'")
            if not own:
                note(cls, raw, content, lambda fields: target._build({**values, **fields}, f"'{path}'"))
        config.__dict__["origin"] = os.path.dirname(path)  # what the configuration names may lie beside it
        return config, path, content

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The content of a configuration file as a dictionary.

        Raises ValueError, with the position, if the file is not the JSON of one object.
        """
        with open(path_json_file, "rb") as file:
            return _parsed(file.read(), path_json_file)

    @classmethod
    def from_peft_type(cls: type[Config], **kwargs: Any) -> Config:
        """Make the configuration of the class that `peft_type` names, from values of unknown origin.

        Unknown fields are dropped with an `UnknownFieldWarning`.
        """
        return cls._class_of(kwargs.get("peft_type"), "")._build(kwargs, "the given values")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """A place for subclasses to translate the fields of older files; here they stay as they are."""
        return kwargs

    @classmethod
    def _known(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls) if f.init]

    @classmethod
    def _class_of(cls: type[Config], peft_type: str | None, where: str) -> type[Config]:
        """The class that a `peft_type` names; this class if it names none and this is one method's class."""
        from . import registry

        if peft_type is not None:
            return registry.config_class(peft_type)
        if cls in (PeftConfigMixin, PeftConfig, PromptLearningConfig):
            raise IncompleteError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: 'peft_type'{where}. "
                "Call from_pretrained of the method's own class, such as LoraConfig."
            )
        return cls

    @classmethod
    def _build(cls: type[Config], values: dict[str, Any], origin: str) -> Config:
        known = cls._known()
        values = cls.check_kwargs(**values)
        unknown = [k for k in values if k not in known]
        if wanted := sorted(k for k in unknown if _changes_the_result(k, values[k])):
            raise ValueError(
                f"{origin} sets {', '.join(f'{k}={values[k]!r}' for k in wanted)}, which this version of "
                f"{cls.__name__} does not know.{nearest(wanted[0], known)} The adapter would compute something else "
                "without it: use a version that knows it, or take the field out of the file if it is of no account."
            )
        if unknown:
            hints = "; ".join(f"{k!r}{nearest(k, known)}" for k in sorted(unknown))
            report(
                UnknownFieldWarning,
                f"Unexpected keyword arguments for {cls.__name__} in {origin}: {hints}. They are ignored; the file "
                "may come from another version, or a name may be misspelt.",
                stacklevel=4,
            )
        from .fields import checked_fields

        return cls(**checked_fields(cls, {k: v for k, v in values.items() if k in known}, origin))


@dataclass
class PeftConfig(PeftConfigMixin):
    """The fields that the configurations of all methods share."""

    base_model_name_or_path: str | None = field(
        default=None, metadata=describe("Name or path of the model that the adapter belongs to.")
    )
    revision: str | None = field(default=None, metadata=describe("The revision of the base model."))
    inference_mode: bool = field(default=False, metadata=describe("Load the adapter frozen."))

    def _check_module_config(self) -> None:
        """Refuse entries of `module_config` that are no settings of one module."""
        patterns = getattr(self, "module_config", None)
        if patterns is None:
            return
        if not isinstance(patterns, dict) or not all(isinstance(v, dict) for v in patterns.values()):
            raise TypeError(
                f"module_config is {patterns!r}; expected a dictionary from patterns of module names to dictionaries "
                "of fields, such as {'q_proj': {'use_dora': True}}."
            )
        allowed = [name for name in self._known() if name not in NOT_PER_MODULE]
        for pattern, settings in patterns.items():
            for name in settings:
                if name not in allowed:
                    raise ValueError(
                        f"module_config[{pattern!r}] sets {name!r}, which is no field that one module can "
                        f"have.{nearest(name, allowed)} Use some of {', '.join(allowed)}."
                    )


@dataclass
class PromptLearningConfig(PeftConfig):
    """The fields that the methods with virtual tokens share."""

    num_virtual_tokens: int | None = field(default=None, metadata=describe("How many virtual tokens there are."))
    token_dim: int | None = field(default=None, metadata=describe("Size of one token's embedding."))
    num_transformer_submodules: int | None = field(
        default=None, metadata=describe("1 for a decoder or an encoder, 2 for an encoder with a decoder.")
    )
    num_attention_heads: int | None = field(default=None, metadata=describe("Number of attention heads."))
    num_layers: int | None = field(default=None, metadata=describe("Number of transformer layers."))
    modules_to_save: list[str] | None = field(
        default=None, metadata=describe("Modules that are trained as a whole and saved with the adapter.")
    )

    @property
    def is_prompt_learning(self) -> bool:
        """True: these methods train virtual tokens."""
        return True


def _changes_the_result(name: str, value: Any) -> bool:
    """Whether an unknown field switches something on that changes what an adapter computes.

    As `use_dora`, `kasa_config`, `rank_pattern`, `lora_bias`, `required_features` and, before 0.3, `enable_lora` do.
    """
    forms = ("_config", "_pattern", "_bias", "enable_lora", "required_features")
    return bool(value) and (name.startswith("use_") or name.endswith(forms))


@dataclass
class _Box:
    value: Any


def _copied(value: Any) -> Any:
    """A field's value, which shares nothing with it; configurations in it as dictionaries."""
    if type(value) in SCALARS:
        return value
    copy = copier(value)
    return copy(value) if copy in (list, set, dict, tuple, same) else dataclasses.asdict(_Box(value))["value"]


def _json(values: dict[str, Any]) -> str:
    """As `json.dumps(values, indent=2)` of sorted fields, most of it by the encoder that knows no lines.

    Tables stay in their order: the first pattern that matches a module counts.
    """
    plain = {k: v for k, v in values.items() if type(v) in SCALARS or isinstance(v, Enum)}
    lines = json.dumps(plain, sort_keys=True, separators=(_LINE, ": "))[1:-1].split(_LINE) if plain else []
    found = dict(zip(sorted(plain), lines, strict=True))
    for key, value in values.items():
        if key not in plain:
            found[key] = f"{json.dumps(key)}: {_lines(_plain(value))}"
    return "{\n  " + _LINE.join(found[key] for key in sorted(found)) + "\n}" if found else "{}"


def _lines(value: Any) -> str:
    """A field's value over several lines; of plain values by the encoder that knows no lines."""
    if type(value) in (list, dict) and value:
        inner = value.values() if type(value) is dict else value
        if SCALARS.issuperset(map(type, inner)):
            text = json.dumps(value, separators=(_DEEPER, ": "))
            return f"{text[0]}\n    {text[1:-1]}\n  {text[-1]}"
    return json.dumps(value, indent=2).replace("\n", "\n  ") if value else json.dumps(value)


_DEEPER = ",\n    "
_LINE = ",\n  "  # no text holds it: lines are escaped there


def _plain(value: Any) -> Any:
    """Sets as sorted lists, deeply; all else is left to JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _parsed(raw: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a configuration file."""
    try:
        values = json.loads(raw.decode("utf-8-sig"))  # some editors put a mark in front
    except (ValueError, RecursionError) as error:
        text = f"'{path}' is not valid JSON. Restore the file, or save the adapter again. "
        if isinstance(error, json.JSONDecodeError):
            raise json.JSONDecodeError(text + error.msg, error.doc, error.pos) from error
        raise ValueError(text + str(error)) from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"'{path}' holds a {kind} where the fields of a configuration (a JSON object) are expected.")
    return values


def _replace(path: str, text: str) -> None:
    """Write a file so that at any moment either the old or the new content is there."""
    with writing(path):
        temporary = os.path.join(os.path.dirname(path), f".{os.urandom(8).hex()}.json.tmp")
        file = open(temporary, "x", encoding="utf-8")  # noqa: SIM115
    try:
        with file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_config(peft_config: PeftConfig) -> None:
    """Raise TypeError for what is no configuration."""
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config must be a PeftConfig such as LoraConfig(r=8), but is {type(peft_config).__name__}. "
            "`get_peft_config` makes one from a dictionary."
        )
