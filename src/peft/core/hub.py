"""Finding the files of an adapter: a local folder first, then the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import listing
from .commit import current

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
        raise ValueError(f"Can't find {' or '.join(map(repr, names))} at '{folder}': {_inventory(folder)}")
    return _download(os.fspath(model_id), names, subfolder, download)


def is_local(model_id: str | os.PathLike[str]) -> bool:
    """Whether `model_id` can only be a place on this machine: no download is tried for it."""
    text = os.fspath(model_id)
    if not isinstance(model_id, str) or os.path.exists(text) or os.path.isabs(text):
        return True
    return text.startswith((".", "~")) or "\\" in text or text.strip("/").count("/") > 1


def _inventory(folder: str) -> str:
    """What a folder holds, for an error message."""
    if os.path.isfile(folder.rstrip("/" + os.sep)):
        return "this is a file; give the folder that contains it."
    if not os.path.isdir(folder):
        return "there is no such folder."
    found = sorted(os.listdir(folder))
    if not found:
        return "the folder is empty."
    hint = [f for f in found if os.path.isfile(os.path.join(folder, f, "adapter_config.json"))]
    advice = f" Adapters lie in {listing(hint)}: give `subfolder`." if hint else ""
    return f"the folder holds {listing(found)}.{advice}"


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
