"""The model card of a saved adapter, and the way to the hub."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .core.files import staged
from .version import __version__

if TYPE_CHECKING:
    from .model import PeftModel

VERSIONS = "### Framework versions"
TEMPLATE = """# Model Card for Model ID

Describe here what the adapter was trained for, on which data, and how it was evaluated.
"""


def update_card(model: PeftModel, output_dir: str) -> None:
    """Write `README.md` in a folder, or update the metadata and the version line of the one that is there.

    Arguments:
        model: the model with adapters.
        output_dir: the folder; edits made by hand in its card are kept.
    """
    file = Path(output_dir) / "README.md"
    before = file.read_text(encoding="utf-8") if file.is_file() else None
    try:
        text = _hub_text(model, before)
    except ImportError:
        text = _plain_text(model, before)
    with staged(output_dir) as stage:
        (stage / "README.md").write_text(text, encoding="utf-8")


def _hub_text(model: PeftModel, before: str | None) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard(before) if before is not None else ModelCard.from_template(ModelCardData())
    data = card.data
    for key, value in _metadata(model, data.get("tags"), data.get("pipeline_tag")).items():
        data[key] = value
    card.text = _with_version(card.text)
    return str(card)


def _plain_text(model: PeftModel, before: str | None) -> str:
    """The card without huggingface_hub: metadata of an existing card is kept as it is."""
    if before is not None and before.startswith("---"):
        return _with_version(before)
    lines = []
    for key, value in sorted(_metadata(model, None, None).items()):
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(v)}" for v in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "---\n" + "\n".join(lines) + "\n---\n\n" + _with_version(before or TEMPLATE)


def _metadata(model: PeftModel, tags: list[str] | str | None, pipeline: str | None) -> dict[str, Any]:
    base = model.get_base_model()
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}
    names = {tags} if isinstance(tags, str) else set(tags or ())
    names.update(getattr(base, "model_tags", None) or ())
    data: dict[str, Any] = {"library_name": "peft"}
    name = _name(model, base)
    if _from_transformers(base):
        names.update({"transformers", f"base_model:adapter:{getattr(base, 'name_or_path', '')}"})
    if "LORA" in kinds:
        names.add("lora")
    if name is not None:
        data["base_model"] = name
    if pipeline is None and type(model).__name__ == "PeftModelForCausalLM":
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
    line = f"- PEFT {__version__}"
    if re.search(r"^- PEFT .*$", text, flags=re.MULTILINE):
        return re.sub(r"^- PEFT .*$", line, text, count=1, flags=re.MULTILINE)
    if VERSIONS in text:
        head, _, tail = text.partition(VERSIONS)
        return f"{head}{VERSIONS}\n\n{line}\n{tail.lstrip()}"
    return f"{text.rstrip()}\n\n{VERSIONS}\n\n{line}\n"


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
