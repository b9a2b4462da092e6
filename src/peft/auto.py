"""AutoPeftModel classes: base model and adapter from one adapter folder."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from . import lazy
from .config import PeftConfig
from .core.hub import hub_arguments
from .errors import nearest
from .model import PeftModel
from .registry import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .types import plain

_NAMES = {
    "peft.core.defaults": "TOKENIZER_CONFIG_NAME",
    "peft.heads": """
        PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM
        PeftModelForSequenceClassification PeftModelForTokenClassification""",
}
__getattr__, __dir__, _ = lazy.names(__name__, _NAMES)

ALLOWED = ("diffusers", "lerobot", "megatron-core", "transformers")
OPTIONS = ("ignore_mismatched_sizes", "strict", "torch_device")  # of the adapter, not of the base model


class _BaseAutoPeftModel:
    """Reads the configuration of an adapter and loads the base model that it names."""

    auto_class: str | None = None  # of transformers
    task: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is not made directly. Use `{name}.from_pretrained(adapter_folder)`.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, and the adapter on it.

        Arguments:
            pretrained_model_name_or_path: folder or repository of the adapter.
            adapter_name: the adapter's name in the model.
            is_trainable: for training; otherwise frozen and in eval mode.
            config: use this configuration instead of the saved one.
            revision: the revision of the adapter.
            import_allowlist: packages from which a base model's class may be imported.
            kwargs: for the base model's `from_pretrained`; `subfolder`, `token` ... also find the adapter.

        Raises ValueError if the adapter is for another task or names no class that may be used.
        """
        hub = hub_arguments({**kwargs, "revision": revision} if revision else kwargs)
        place = {k: v for k, v in hub.items() if k != "subfolder"}
        saved = PeftConfig.from_pretrained(pretrained_model_name_or_path, subfolder=hub.get("subfolder"), **place)
        auto = cls._class(saved, ALLOWED if import_allowlist is None else tuple(import_allowlist))
        for_base = {k: v for k, v in kwargs.items() if k not in ("subfolder", *OPTIONS)}
        if not saved.base_model_name_or_path:
            raise ValueError(
                f"The adapter at {pretrained_model_name_or_path} does not name its base model. Load it yourself."
            )
        base = auto.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **for_base)
        _resize(base, pretrained_model_name_or_path, hub, kwargs.get("trust_remote_code", False))
        options: dict[str, Any] = {k: kwargs[k] for k in OPTIONS if k in kwargs}
        return cls._peft_class().from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **hub, **options
        )

    @classmethod
    def _peft_class(cls) -> type[PeftModel]:
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cls.task] if cls.task else PeftModel

    @classmethod
    def _class(cls, config: PeftConfig, allowed: tuple[str, ...]) -> Any:
        """The class that loads the base model."""
        task = plain(config.task_type)
        if cls.task is not None:
            if task and task != cls.task:
                raise ValueError(
                    f"{cls.__name__} is for {cls.task}, but the adapter is for {task}.{_right_class(task)}"
                )
            return getattr(importlib.import_module("transformers"), str(cls.auto_class))
        if task:
            raise ValueError(f"The adapter is for {task}.{_right_class(task)}")
        mapping = config.auto_mapping
        if not mapping:
            raise ValueError(
                "The adapter names neither a task nor the class of its base model. Load the base model and use "
                "`PeftModel.from_pretrained`."
            )
        return _imported(mapping["parent_library"], mapping["base_model_class"], allowed)


def _imported(library: str, name: str, allowed: tuple[str, ...]) -> Any:
    """A class of an allowed package; a name from a file must not import anything else."""
    packages = [a.replace("-", ".") for a in allowed]
    if not any(library == p or library.startswith(p + ".") for p in packages):
        raise ValueError(
            f"The adapter's base model is {library}.{name}, and {library!r} is not in an allowed package "
            f"({', '.join(allowed)}). If you trust it, pass `import_allowlist=[{library.partition('.')[0]!r}]`."
        )
    return getattr(importlib.import_module(library), name)


def _right_class(task: str) -> str:
    named = {c.task: c.__name__ for c in _BaseAutoPeftModel.__subclasses__() if c.task}
    return f" Use {named[task]}." if task in named else nearest(task, [t for t in named if t])


def _resize(base: Any, model_id: str | os.PathLike[str], hub: dict[str, Any], trust: bool) -> None:
    """Make room for the tokens of a tokenizer that was saved with the adapter."""
    folder = os.path.join(model_id, hub.get("subfolder") or "")
    if os.path.isdir(model_id) and not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=trust, **hub)
    except (ImportError, OSError, ValueError):
        return
    embeddings = base.get_input_embeddings()
    if len(tokenizer) > embeddings.weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters without a task: the base model's class is the one noted in the adapter."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For adapters of causal language models."""

    auto_class, task = "AutoModelForCausalLM", "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For adapters of encoder-decoder language models."""

    auto_class, task = "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For adapters of text classifiers."""

    auto_class, task = "AutoModelForSequenceClassification", "SEQ_CLS"


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For adapters of token classifiers."""

    auto_class, task = "AutoModelForTokenClassification", "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For adapters of extractive question answering."""

    auto_class, task = "AutoModelForQuestionAnswering", "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For adapters of models whose hidden states are the result."""

    auto_class, task = "AutoModel", "FEATURE_EXTRACTION"
