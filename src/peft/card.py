"""The model card of a saved adapter, and the way to the hub."""

from __future__ import annotations

import copy
import functools
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .core.files import staged
from .types import plain
from .version import __version__

if TYPE_CHECKING:
    from .model import PeftModel

VERSIONS = "### Framework versions"
TEMPLATE = """# Model Card for Model ID

Describe here what the adapter was trained for, on which data, and how it was evaluated.
"""


def update_card(model: PeftModel, output_dir: str) -> None:
    """Write `README.md` in a folder, or add what is missing to the one that is there.

    Arguments:
        model: the model with adapters.
        output_dir: the folder. Every character of a card stays as it is, whatever its encoding, but the number of the
            version, and "transformers" as the library's name, which its Trainer writes over ours.
    """
    file = Path(output_dir) / "README.md"
    before = file.read_bytes().decode("utf-8", "surrogateescape") if file.is_file() else None
    text = _new_text(model) if before is None else _updated(_metadata(model), before)
    if text == before:
        return
    with staged(output_dir) as stage:
        (stage / "README.md").write_bytes(text.encode("utf-8", "surrogateescape"))


def _new_text(model: PeftModel) -> str:
    """The hub's template, with the metadata in front; a shorter one without huggingface_hub."""
    try:
        import huggingface_hub  # noqa: F401

        card = copy.deepcopy(_template())
    except ImportError:  # of the hub's library, or of the one that fills in templates
        return _updated(_metadata(model), TEMPLATE)
    for key, value in _metadata(model).items():
        card.data[key] = value
    card.text = _with_version(card.text)
    return str(card)


@functools.cache
def _template() -> Any:
    """The hub's card of any model: to fill its template in takes longer than to save an adapter."""
    from huggingface_hub import ModelCard, ModelCardData

    return ModelCard.from_template(ModelCardData())


LIBRARY = re.compile(r"^(library_name[ \t]*:[ \t]*)transformers(?=[ \t]*\r?$)", re.MULTILINE)
FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def _updated(data: dict[str, Any], text: str) -> str:
    """A card with the metadata that it lacks, and the version; what was written by hand wins."""
    return _with_front(json.dumps(data), text)


@functools.lru_cache(maxsize=4)  # most saves find the card of the one before
def _with_front(metadata: str, text: str) -> str:
    end, data = "\r\n" if "\r\n" in text else "\n", json.loads(metadata)
    found = FRONT.match(text)
    if found is None:
        lines = [line for key, value in sorted(data.items()) for line in _yaml(key, value)]
        return _with_version(end.join(["---", *lines, "---", "", ""]) + text)
    front = LIBRARY.sub(r"\1peft", _with_tags(found[1], data.pop("tags", []), end))
    missing = [key for key in sorted(data) if not re.search(rf"^{key}[ \t]*:", front, re.MULTILINE)]
    front += "".join(line + end for key in missing for line in _yaml(key, data[key]))
    return _with_version(text[: found.start(1)] + front + text[found.end(1) :])


def _yaml(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"{key}:", *(f"- {json.dumps(v)}" for v in value)]
    return [f"{key}: {json.dumps(value)}"]


def _with_tags(front: str, tags: list[str], end: str) -> str:
    """Metadata with tags added to its list; a list in a form that is not known stays as it is."""
    listed = re.search(r"^tags[ \t]*:[ \t]*(#.*)?\r?\n((?:[ \t]*-[ \t].*\n?)*)", front, re.MULTILINE)
    if listed is None:
        known = re.search(r"^tags[ \t]*:", front, re.MULTILINE)
        return front if known or not tags else front + "".join(line + end for line in _yaml("tags", tags))
    items = [line.split("-", 1)[1].split(" #")[0].strip().strip("'\"") for line in listed[2].splitlines()]
    indent = re.match(r"[ \t]*", listed[2])
    new = [f"{indent[0] if indent else ''}- {json.dumps(t)}{end}" for t in tags if t not in items]
    return front[: listed.end()] + "".join(new) + front[listed.end() :]


def _metadata(model: PeftModel) -> dict[str, Any]:
    base = model.get_base_model()
    kinds = {plain(c.peft_type) for c in model.peft_config.values()}
    names = set(getattr(base, "model_tags", None) or ())
    data: dict[str, Any] = {"library_name": "peft"}
    name = _name(model, base)
    if _from_transformers(base):
        names.update({"transformers", f"base_model:adapter:{getattr(base, 'name_or_path', '')}"})
    if "LORA" in kinds:
        names.add("lora")
    if name is not None:
        data["base_model"] = name
    if type(model).__name__ == "PeftModelForCausalLM":
        data["pipeline_tag"] = "text-generation"
    if names:
        data["tags"] = sorted(names)
    return data


def _name(model: PeftModel, base: nn.Module) -> str | None:
    config = getattr(base, "config", None)
    named = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
    return named if isinstance(named, str) else None


def _from_transformers(base: nn.Module) -> bool:
    return any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(base).__mro__)


def _with_version(text: str) -> str:
    """The text with one section on versions, and in it one line on this library."""
    line, end = f"- PEFT {__version__}", "\r\n" if "\r\n" in text else "\n"
    new, count = re.subn(r"^- PEFT v?\d[\w.+@-]*(?=[ \t]*\r?$)", line, text, count=1, flags=re.MULTILINE)
    if count:
        return new
    if VERSIONS in text:
        head, _, tail = text.partition(VERSIONS)
        return f"{head}{VERSIONS}{end}{end}{line}{end}{tail.lstrip()}"
    return f"{text.rstrip()}{end}{end}{VERSIONS}{end}{end}{line}{end}"


def push(model: PeftModel, repo_id: str, **kwargs: Any) -> Any:
    """Save a model's adapters to a temporary folder and upload that.

    Arguments:
        model: the model with adapters.
        repo_id: the repository, "user/name"; it is made if need be.
        kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description`; the rest
            is for `save_pretrained`.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            "push_to_hub needs huggingface_hub. Install it with `pip install huggingface_hub`."
        ) from error
    private, token = kwargs.pop("private", None), kwargs.pop("token", None)
    commit = {
        k: kwargs.pop(k) for k in ("revision", "create_pr", "commit_message", "commit_description") if k in kwargs
    }
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **kwargs)
        return api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **commit)
