"""Adapters of a PeftModel to and from folders."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .config import PeftConfig
from .core import sharded
from .core.checkpoint import get_peft_model_state_dict, load_peft_weights
from .core.commit import check_writable, folders, settle, staged
from .core.defaults import CONFIG_NAME
from .core.digests import numbers
from .core.files import CONFIG_HASH, SHARD_SIZE, check_written, config_hash, write_weights
from .core.fingerprint import fingerprint, replaced_by
from .core.hub import DOWNLOAD_ARGUMENTS, hub_arguments
from .errors import (
    PeftWarning,
    UnknownNameError,
    WrongKindError,
    check_spelling,
    listing,
    nearest,
    report,
)
from .known import Content
from .registry import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .types import plain

# Names among the further arguments that mean something, here or to the programs that hand them on.
FOR_SAVING = frozenset({"state_dict", "save_function", "push_to_hub", "token", "variant"})
FOR_LOADING = DOWNLOAD_ARGUMENTS | {
    "subfolder", "use_auth_token", "ignore_mismatched_sizes", "strict", "torch_device", "torch_dtype", "dtype",
    "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index", "import_allowlist", "verify_base",
}  # fmt: skip

if TYPE_CHECKING:
    from .model import PeftModel


class Persistent:
    """The part of a PeftModel that has to do with files."""

    def save_pretrained(
        self: Any,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: Literal["auto"] | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        verify: bool = False,
        max_shard_size: int | str = SHARD_SIZE,
        hash_base: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save adapters: `default` in the folder itself, each other one in a sub-folder of its name.

        Arguments:
            save_directory: the folder. A crash while saving leaves the old files; with the environment variable
                PEFT_DURABLE=1 so does a failure of the power, as each step waits for the disk.
            safe_serialization: safetensors; False writes a pickle.
            selected_adapters: which adapters; None means all.
            save_embedding_layers: see `get_peft_model_state_dict`.
            is_main_process: only this process writes files. Where parameters are spread over processes all of them
                must call, as gathering takes all; the first one writes.
            path_initial_model_for_weight_conversion: folder with the adapter as it was before training;
                PiSSA, OLoRA and the like are then written as a plain LoRA of twice the rank for the original
                base model.
            verify: read the written files again and compare every byte; an error leaves the old files.
            max_shard_size: bytes, or a text such as "5GB": larger adapters are written as several safetensors files
                with an index, which the other `peft` does not read.
            hash_base: note hashes of the base model's numbers (SHA-256) in the file, against which loading compares
                those of the model it is put on. All of the base is read, here and then: some seconds for each 5 GB.
            kwargs: `state_dict`: the full state by live name, to be used instead of the live tensors.
        """
        check_spelling(kwargs, Persistent.save_pretrained, FOR_SAVING)
        names = selected(self, selected_adapters)
        if hash_base and not safe_serialization:
            raise ValueError("hash_base=True needs safe_serialization=True: a pickle has no place for the hashes.")
        hashes = cache(partial(numbers, self))
        given = kwargs.get("state_dict")
        shared = given is None and sharded.is_shared(self)
        writes = sharded.writes(is_main_process) if shared else is_main_process
        how = safe_serialization, path_initial_model_for_weight_conversion, verify, max_shard_size
        folder = Path(save_directory)
        with sharded.as_one(shared):
            if writes or not shared:
                prepare_folder(folder, sweep=writes)
        targets = {name: folder if name == "default" else folder / name for name in names}
        with folders(folder, *targets.values()) if writes or not shared else nullcontext():
            for name, target in targets.items() if shared or writes else ():
                with sharded.as_one(shared):
                    state = get_peft_model_state_dict(self, given, name, save_embedding_layers=save_embedding_layers)
                    noted = hashes(replaced_by(self.peft_config[name])) if hash_base else {}
                    if not writes:
                        continue
                    if target is not folder:  # that has been done
                        settle(target)
                    save_adapter(self, name, target, state, *how, noted)
        with sharded.as_one(shared):
            if writes:
                self.create_or_update_model_card(str(folder))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put a saved adapter on a base model. If anything fails the base model is as before.

        Arguments:
            model: the base model.
            model_id: folder or repository with the adapter.
            adapter_name: the name it gets here.
            is_trainable: for training; otherwise the adapter is frozen and the model set to eval().
            config: use this configuration instead of the saved one.
            autocast_adapter_dtype: keep half-precision adapter parameters in float32.
            ephemeral_gpu_offload: has no effect here, and warns so: no step is costly enough to be moved to the GPU.
            low_cpu_mem_usage: make the adapter on the meta device first.
            key_mapping: {regular expression: replacement} for the keys of the file.
            kwargs: `subfolder`, `revision`, `token` ..., `ignore_mismatched_sizes`, `strict`, `torch_device`;
                `verify_base`: compare the base's numbers with the hashes that `save_pretrained(hash_base=True)` has
                noted (None: if there are any; True: warn if there are none; False: do not).
        """
        from .core.snapshot import attempts
        from .loading import AdapterFile

        check_spelling(kwargs, Persistent.from_pretrained.__func__, FOR_LOADING)  # type: ignore[attr-defined]
        with sharded.as_one(sharded.is_shared(model)):
            config, content = read_config(model_id, is_trainable, kwargs, config)
            if not isinstance(config, PeftConfig):
                raise ValueError(f"config must be a PeftConfig, but is {type(config).__name__}.")
            file = AdapterFile.of(model, model_id, adapter_name, key_mapping, kwargs)
        by_task = MODEL_TYPE_TO_PEFT_MODEL_MAPPING if cls.__name__ == "PeftModel" else {}
        kind: Any = by_task.get(config.task_type or "", cls)
        place, undo = attempts(
            model,
            config,
            lambda meta: kind(
                model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=meta
            ),
        )
        config.inference_mode = not is_trainable
        set_runtime(config, ephemeral_gpu_offload)
        file.check_config(content)
        file.autocast = autocast_adapter_dtype
        try:
            return file.load(config, place, is_trainable, low_cpu_mem_usage)[0]
        except BaseException:
            undo()
            raise

    def load_adapter(
        self: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> _IncompatibleKeys:
        """Load a saved adapter: as a new one (inactive), or over the weights of an existing one (in place).

        Arguments: as for `from_pretrained`; `torch_device` is where the file is read to (None: the CPU).

        Returns torch's (missing_keys, unexpected_keys). If anything fails the model is as before.
        """
        from .loading import AdapterFile

        check_spelling(kwargs, Persistent.load_adapter, FOR_LOADING)
        kwargs = {"torch_device": torch_device, **kwargs}
        base, there = self.get_base_model(), adapter_name in self.peft_config
        with sharded.as_one(sharded.is_shared(base)):
            file = AdapterFile.of(base, model_id, adapter_name, key_mapping, kwargs)
            config, content = (None, None) if there else read_config(model_id, is_trainable, kwargs)
        if config is None:
            result = file.over(self, model_id, is_trainable, low_cpu_mem_usage)
        else:
            set_runtime(config, ephemeral_gpu_offload)

            def place(meta: bool) -> tuple[Any, Callable[[], Any]]:
                steps: list[Callable[[], Any]] = []
                self._add_adapter(adapter_name, config, meta, autocast_adapter_dtype, steps)
                return self, lambda: [step() for step in reversed(steps)]

            file.check_config(content)
            file.autocast = autocast_adapter_dtype
            found = file.like_another(self, config, is_trainable)
            if found is None:
                _, found = file.load(config, place, is_trainable, low_cpu_mem_usage)
            result = found
        if is_trainable:
            self.set_requires_grad(adapter_name, True)
        return result

    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        """Write `README.md`, or bring the metadata and the version of an existing one up to date."""
        from .card import update_card

        update_card(self, output_dir)

    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> Any:
        """Save the adapters and upload them to the Hugging Face Hub.

        Arguments:
            repo_id: the repository, "user/name".
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message` ...; the rest goes to
                `save_pretrained`.
        """
        from .card import push

        return push(self, repo_id, **kwargs)


# Saving ---------------------------------------------------------------------------------------------------


def selected(model: PeftModel, names: list[str] | None) -> list[str]:
    """The adapters to save; raises ValueError if there are none, or naming those that do not exist."""
    known = list(model.peft_config)
    if isinstance(names, str):
        raise WrongKindError(f"selected_adapters must be a list of names, got the string {names!r}. Use [{names!r}].")
    if not known or (names is not None and not len(names)):
        what = f"selected_adapters is empty; the model has {listing(known)}" if known else "The model has no adapter"
        raise ValueError(f"{what}, so there is nothing to save.")
    if names is None:
        return known
    unknown = [n for n in names if n not in known]
    if unknown:
        hint = nearest(unknown[0], known)
        raise UnknownNameError(
            f"selected_adapters holds {listing(unknown)}, which are no adapters of this model.{hint} It has "
            f"{listing(known)}."
        )
    return [n for n in known if n in names]


def save_adapter(
    model: PeftModel,
    name: str,
    folder: Path,
    state: dict[str, Tensor],
    safe: bool,
    initial: str | None,
    verify: bool,
    max_shard_size: int | str,
    remarks: Mapping[str, str],
) -> None:
    """Write one adapter's weights, with some remarks, and configuration: both or neither."""
    from .hotswap.compiled import true_ranks

    config = true_ranks(model, name, model.peft_config[name])
    for companion in getattr(model._tuner, "companions", {}).values():
        config = companion.for_file(name, config)
    if not state and not _may_be_empty(config):
        raise ValueError(f"Adapter {name!r} has no tensors, so there is nothing to save.")
    if bare := [key for key, tensor in state.items() if tensor.is_meta]:
        raise ValueError(
            f"Adapter {name!r} has tensors without numbers, on the meta device: {listing(bare)}. Load its weights "
            "first, or pass the full state as `state_dict`."
        )
    if initial is not None:
        state, config = _converted(state, config, initial)
    config = for_file(model, config)
    with staged(folder) as stage:
        config.save_pretrained(stage)
        noted = {CONFIG_HASH: _hash_of((stage / CONFIG_NAME).read_bytes())}
        noted.update({**fingerprint(model, replaced_by(config)), **remarks})
        files = write_weights(state, stage, safe, max_shard_size, noted)
        if verify:
            check_written(files, state)


@lru_cache(maxsize=16)
def _hash_of(raw: bytes) -> str:
    """The hash of a configuration file."""
    return config_hash(json.loads(raw))


def _may_be_empty(config: PeftConfig) -> bool:
    return getattr(config, "target_modules", None) == "dummy-target-modules"


def for_file(model: PeftModel, config: PeftConfig) -> PeftConfig:
    """The configuration as it is written: for inference, with the base model's name or class."""
    config = copy.copy(config)
    base = model.get_base_model()
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    config.auto_mapping = None
    if config.task_type is None:
        kind = type(base)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config


def _converted(state: dict[str, Tensor], config: Any, initial: str) -> tuple[dict[str, Tensor], Any]:
    from .methods.lora.residual import convert

    return convert(state, load_peft_weights(initial), config)


def prepare_folder(save_directory: str | os.PathLike[str], sweep: bool) -> Path:
    """The folder; raises ValueError if there is a file of that name, UnwritableError if nothing can be written to it.

    Arguments:
        save_directory: the folder, which need not be there.
        sweep: finish what a crashed save has left behind.
    """
    folder = Path(save_directory)
    if os.path.isfile(folder):
        raise ValueError(f"{folder} is a file. Provide a folder to save adapters in.")
    check_writable(folder)
    if sweep:
        settle(folder)
    return folder


# Loading --------------------------------------------------------------------------------------------------


def read_config(
    model_id: str | os.PathLike[str], is_trainable: bool, kwargs: Mapping[str, Any], given: PeftConfig | None = None
) -> tuple[PeftConfig, tuple[str, Content] | None]:
    """The configuration of a saved adapter, set for training or for inference; path and content of its file.

    One that is `given` is handed back as it is, without a file.
    """
    if given is not None:
        return given, None
    arguments = hub_arguments(kwargs)
    config, path, content = PeftConfig._read(model_id, arguments.pop("subfolder", None), arguments)
    if config.is_prompt_learning and is_trainable:
        raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
    config.inference_mode = not is_trainable
    return config, (path, content)


def set_runtime(config: PeftConfig, ephemeral_gpu_offload: bool) -> None:
    """Put the one run-time option of loading into the configuration, if it has a place for it."""
    if not ephemeral_gpu_offload:
        return
    runtime = getattr(config, "runtime_config", None)
    if runtime is None:
        kind = plain(config.peft_type)
        text = f"ephemeral_gpu_offload=True has no effect on the method {kind}, which has no place for it."
        report(PeftWarning, text, strict=False, stacklevel=4)
    else:
        runtime.ephemeral_gpu_offload = True
