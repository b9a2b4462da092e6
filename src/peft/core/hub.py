"""Finding the files of an adapter: a local folder first, then the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import listing, nearest
from .commit import current
from .defaults import CONFIG_NAME

ADAPTER = "An adapter is a folder with adapter_config.json and adapter_model.safetensors, as save_pretrained writes it."
DEPTH, FOLDERS = 3, 2000  # how far adapters are looked for below a folder that is none

# Arguments of a download; everything else that a caller carries along is not for the hub.
DOWNLOAD_ARGUMENTS = frozenset(
    [
        "cache_dir",
        "endpoint",
        "etag_timeout",
        "force_download",
        "headers",
        "library_name",
        "library_version",
        "local_dir",
        "local_files_only",
        "proxies",
        "repo_type",
        "revision",
        "token",
        "user_agent",
    ]
)


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a download among `kwargs`, and where in a repository the adapter lies."""
    return {k: v for k, v in kwargs.items() if k in DOWNLOAD_ARGUMENTS or k in ("subfolder", "use_auth_token")}


def fetch(
    model_id: str | os.PathLike[str],
    filename: str | Sequence[str],
    subfolder: str | None = None,
    **download: Any,
) -> str:
    """The local path of the first of the files that exists; it is downloaded if `model_id` is no local
    folder.

    Arguments:
        model_id: a folder, or a repository on the Hugging Face Hub such as "user/adapter".
        filename: a file name, or several in the order of preference.
        subfolder: a folder inside `model_id`.
        download: `revision`, `cache_dir`, `token` ... as in `huggingface_hub.hf_hub_download`.

    Raises ValueError, with the files that do exist, if there is none; ImportError if huggingface_hub is
    needed but not installed.
    """
    names = [filename] if isinstance(filename, str) else list(filename)
    folder = os.path.join(model_id, subfolder or "")
    for name in names:
        path = current(folder, name)
        if path is not None:
            return path
    if is_local(model_id):
        raise ValueError(f"Can't find {' or '.join(map(repr, names))} at '{folder}': {_inventory(folder, names)}")
    return _download(os.fspath(model_id), names, subfolder, download)


def is_local(model_id: str | os.PathLike[str]) -> bool:
    """Whether `model_id` can only be a place on this machine: no download is tried for it."""
    text = os.fspath(model_id)
    if not isinstance(model_id, str) or os.path.exists(text) or os.path.isabs(text):
        return True
    return text.startswith((".", "~")) or "\\" in text or text.strip("/").count("/") > 1


def _inventory(folder: str, names: Sequence[str]) -> str:
    """What a folder holds in place of some files, for an error message."""
    if os.path.isfile(folder.rstrip("/" + os.sep)):
        return "this is a file; give the folder that contains it."
    if not os.path.isdir(folder):
        above, name = os.path.split(os.path.normpath(folder))
        beside = os.listdir(above or ".") if os.path.isdir(above or ".") else []
        return f"there is no such folder.{nearest(name, beside)}"
    found = sorted(os.listdir(folder))
    if not found:
        return f"the folder is empty. {ADAPTER}"
    return f"the folder holds {listing(found)}. {_advice(folder, found, names)}"


def _advice(folder: str, found: Sequence[str], names: Sequence[str]) -> str:
    """What to do about a folder that lacks files."""
    if CONFIG_NAME in found and CONFIG_NAME not in names:
        return f"Its {CONFIG_NAME} is there, its weights are not: copy them too, or save the adapter again."
    if any(f.startswith("adapter_model.") for f in found):
        return f"Its weights are there, its {CONFIG_NAME} is not: copy it too, or save the adapter again."
    below = _adapters_below(folder)
    if below:
        example = os.path.join(folder, below[0])
        return f"Adapters lie in {listing(below)}: give that folder, {example!r}, or `subfolder={below[0]!r}`."
    whole = "It looks like a whole model. " if "config.json" in found else ""
    return f"No adapter lies in it or below. {whole}{ADAPTER}"


def _adapters_below(folder: str) -> list[str]:
    """The adapters in the folders below one, by their paths from there; not everything is looked through."""
    below: list[str] = []
    for count, (path, folders, files) in enumerate(os.walk(folder)):
        if CONFIG_NAME in files:
            below.append(os.path.relpath(path, folder))
        deep = os.path.relpath(path, folder).count(os.sep) >= DEPTH
        folders[:] = [] if deep else sorted(f for f in folders if not f.startswith("."))
        if count >= FOLDERS:
            break
    return below


def _download(repo: str, names: list[str], subfolder: str | None, download: dict[str, Any]) -> str:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"'{repo}' is no local folder, and downloading it needs huggingface_hub. Install huggingface_hub, or give "
            "the path of a folder."
        ) from error
    arguments = {k: v for k, v in download.items() if k in DOWNLOAD_ARGUMENTS}
    if "token" not in arguments and download.get("use_auth_token") is not None:
        arguments["token"] = download["use_auth_token"]
    failure: Exception | None = None
    for name in names:
        try:
            return str(hf_hub_download(repo, name, subfolder=subfolder, **arguments))
        except (OSError, ValueError) as error:  # the hub's own errors are OSErrors or ValueErrors
            failure = failure or error
    place = f"'{repo}'" + (f", subfolder '{subfolder}'" if subfolder else "")
    raise ValueError(
        f"Can't find {' or '.join(map(repr, names))} at {place}: there is no such local folder, and the Hugging Face "
        f"Hub answered {type(failure).__name__}: {failure}"
    ) from failure
