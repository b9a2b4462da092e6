"""The one table of methods: where the configuration and the tuner of each peft_type are, and its prefix.

Nothing is imported before it is asked for: the mappings below import an entry when it is read. A method is
added by one line in `METHODS`, or from outside by `register_peft_method`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import UnknownNameError, nearest
from .lazy import whole
from .types import PeftType, TaskType


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Arguments:
        config: "module:Class" of the configuration, or the class.
        tuner: "module:Class" of the tuner, or the class.
        prefix: what the names of the adapter's tensors start with.
        mixed: whether it can be mixed with other methods in one model.
    """

    config: str | type
    tuner: str | type
    prefix: str | None
    mixed: bool = False


METHODS: dict[PeftType, Method] = {
    PeftType.C3A: Method("peft.methods.c3a:C3AConfig", "peft.methods.c3a:C3AModel", "c3a_"),
    PeftType.FOURIERFT: Method(
        "peft.methods.fourierft:FourierFTConfig", "peft.methods.fourierft:FourierFTModel", "fourierft_"
    ),
    PeftType.IA3: Method("peft.methods.ia3:IA3Config", "peft.methods.ia3:IA3Model", "ia3_", True),
    PeftType.LOHA: Method("peft.methods.loha:LoHaConfig", "peft.methods.loha:LoHaModel", "hada_", True),
    PeftType.BOFT: Method("peft.methods.boft:BOFTConfig", "peft.methods.boft:BOFTModel", "boft_"),
    PeftType.ROAD: Method("peft.methods.road:RoadConfig", "peft.methods.road:RoadModel", "road_", True),
    PeftType.DELORA: Method("peft.methods.delora:DeloraConfig", "peft.methods.delora:DeloraModel", "delora_"),
    PeftType.HRA: Method("peft.methods.hra:HRAConfig", "peft.methods.hra:HRAModel", "hra_"),
    PeftType.OFT: Method("peft.methods.oft:OFTConfig", "peft.methods.oft:OFTModel", "oft_"),
    PeftType.VERA: Method("peft.methods.vera:VeraConfig", "peft.methods.vera:VeraModel", "vera_lambda_"),
    PeftType.LOKR: Method("peft.methods.lokr:LoKrConfig", "peft.methods.lokr:LoKrModel", "lokr_", True),
    PeftType.ADALORA: Method(
        "peft.methods.adalora.config:AdaLoraConfig", "peft.methods.adalora.model:AdaLoraModel", "lora_", True
    ),
    PeftType.ADAPTION_PROMPT: Method(
        "peft.methods.adaption_prompt.config:AdaptionPromptConfig",
        "peft.methods.adaption_prompt.model:AdaptionPromptModel",
        "adaption_",
    ),
    PeftType.LN_TUNING: Method(
        "peft.methods.ln_tuning:LNTuningConfig", "peft.methods.ln_tuning:LNTuningModel", "ln_tuning_"
    ),
    PeftType.POLY: Method("peft.methods.poly:PolyConfig", "peft.methods.poly:PolyModel", "poly_"),
    PeftType.LORA: Method("peft.methods.lora.config:LoraConfig", "peft.methods.lora.model:LoraModel", "lora_", True),
    PeftType.MISS: Method("peft.methods.miss:MissConfig", "peft.methods.miss:MissModel", "miss_"),
    PeftType.PROMPT_TUNING: Method(
        "peft.methods.prompt_tuning:PromptTuningConfig", "peft.methods.prompt_tuning:PromptEmbedding", None
    ),
    PeftType.P_TUNING: Method("peft.methods.p_tuning:PromptEncoderConfig", "peft.methods.p_tuning:PromptEncoder", None),
    PeftType.PREFIX_TUNING: Method(
        "peft.methods.prefix_tuning:PrefixTuningConfig", "peft.methods.prefix_tuning:PrefixEncoder", None
    ),
    PeftType.MULTITASK_PROMPT_TUNING: Method(
        "peft.methods.multitask_prompt_tuning:MultitaskPromptTuningConfig",
        "peft.methods.multitask_prompt_tuning:MultitaskPromptEmbedding",
        None,
    ),
    PeftType.CPT: Method("peft.methods.cpt:CPTConfig", "peft.methods.cpt:CPTEmbedding", None),
    PeftType.CARTRIDGE: Method(
        "peft.methods.cartridge.config:CartridgeConfig", "peft.methods.cartridge.model:CartridgeEncoder", None
    ),
    PeftType.OSF: Method("peft.methods.osf:OSFConfig", "peft.methods.osf:OSFModel", "osf_"),
    PeftType.PSOFT: Method("peft.methods.psoft:PsoftConfig", "peft.methods.psoft:PsoftModel", "psoft_"),
    PeftType.SHIRA: Method("peft.methods.shira:ShiraConfig", "peft.methods.shira:ShiraModel", "shira_", True),
    PeftType.SUPERTUNING: Method(
        "peft.methods.supertuning:SupertuningConfig", "peft.methods.supertuning:SupertuningModel", "supertuning_"
    ),
    PeftType.GRALORA: Method("peft.methods.gralora:GraloraConfig", "peft.methods.gralora:GraloraModel", "gralora_"),
    PeftType.RANDLORA: Method(
        "peft.methods.randlora:RandLoraConfig", "peft.methods.randlora:RandLoraModel", "randlora_"
    ),
    PeftType.BEFT: Method("peft.methods.beft:BeftConfig", "peft.methods.beft:BeftModel", "beft_", True),
    PeftType.DEFT: Method("peft.methods.deft:DeftConfig", "peft.methods.deft:DeftModel", "deft_"),
    PeftType.HIRA: Method("peft.methods.hira:HiraConfig", "peft.methods.hira:HiraModel", "hira_", True),
    PeftType.PVERA: Method("peft.methods.pvera:PveraConfig", "peft.methods.pvera:PveraModel", "pvera_lambda_"),
    PeftType.ADAMSS: Method(
        "peft.methods.adamss.config:AdamssConfig", "peft.methods.adamss.model:AdamssModel", "adamss_"
    ),
    PeftType.FROD: Method("peft.methods.frod.config:FrodConfig", "peft.methods.frod.model:FrodModel", "frod_"),
    PeftType.LILY: Method("peft.methods.lily:LilyConfig", "peft.methods.lily:LilyModel", "lily_"),
    PeftType.GLORA: Method("peft.methods.glora:GloraConfig", "peft.methods.glora:GloraModel", "glora_"),
    PeftType.PEANUT: Method("peft.methods.peanut:PeanutConfig", "peft.methods.peanut:PeanutModel", "peanut_"),
    PeftType.UNILORA: Method("peft.methods.unilora:UniLoraConfig", "peft.methods.unilora:UniLoraModel", "unilora_"),
    PeftType.TINYLORA: Method(
        "peft.methods.tinylora:TinyLoraConfig", "peft.methods.tinylora:TinyLoraModel", "tinylora_"
    ),
    PeftType.TRAINABLE_TOKENS: Method(
        "peft.methods.trainable_tokens:TrainableTokensConfig",
        "peft.methods.trainable_tokens:TrainableTokensModel",
        "trainable_tokens_",
    ),
    PeftType.VBLORA: Method("peft.methods.vblora:VBLoRAConfig", "peft.methods.vblora:VBLoRAModel", "vblora_"),
    PeftType.XLORA: Method("peft.methods.xlora.config:XLoraConfig", "peft.methods.xlora.model:XLoraModel", None),
    PeftType.SHADOW: Method(
        "peft.methods.shadow.config:ShadowConfig", "peft.methods.shadow.model:ShadowModel", "shadow_"
    ),
    PeftType.WAVEFT: Method("peft.methods.waveft:WaveFTConfig", "peft.methods.waveft:WaveFTModel", "waveft_"),
}

MODEL_CLASSES: dict[Any, str | type] = {
    TaskType.SEQ_CLS: "peft.heads:PeftModelForSequenceClassification",
    TaskType.SEQ_2_SEQ_LM: "peft.heads:PeftModelForSeq2SeqLM",
    TaskType.CAUSAL_LM: "peft.heads:PeftModelForCausalLM",
    TaskType.TOKEN_CLS: "peft.heads:PeftModelForTokenClassification",
    TaskType.QUESTION_ANS: "peft.heads:PeftModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "peft.heads:PeftModelForFeatureExtraction",
}


def exports() -> dict[str, str]:
    """{module: names} of the configurations and tuners in the table."""
    found: dict[str, str] = {}
    for method in METHODS.values():
        for entry in (method.config, method.tuner):
            if isinstance(entry, str):
                module, _, name = entry.partition(":")
                found[module] = f"{found.get(module, '')} {name}"
    return found


OLDER = {"BONE": PeftType.MISS}  # names of methods in files of older releases


class MissingMethodError(NotImplementedError, ImportError):
    """The method exists, but not in this release."""


def lookup(peft_type: str | PeftType) -> Method:
    """The method of that name.

    Raises ValueError if there is no such method, `MissingMethodError` if this release lacks it.
    """
    named = isinstance(peft_type, str)  # files may hold anything
    known = METHODS.get(peft_type) if named else None  # type: ignore[arg-type]
    if known is not None:
        return known
    names = [t.value for t in PeftType]
    peft_type = OLDER.get(peft_type, peft_type) if named else peft_type
    if peft_type not in names:
        raise UnknownNameError(
            f"peft_type is {peft_type or None!r}, which is no known method.{nearest(str(peft_type), names)} Use one of "
            f"{', '.join(names)}."
        )
    kind = PeftType(peft_type)
    if kind not in METHODS:
        raise MissingMethodError(
            f"The method {kind.value} comes with a later release. This one has {', '.join(k.value for k in METHODS)}."
        )
    return METHODS[kind]


def load(entry: str | type) -> Any:
    """The class that an entry of the table names."""
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    found = getattr(sys.modules.get(module), name, None)  # quicker than to ask for the import again
    return getattr(whole(module), name) if found is None else found


def config_class(peft_type: str | PeftType) -> Any:
    """The configuration class of a method."""
    return load(lookup(peft_type).config)


def tuner_class(peft_type: str | PeftType) -> Any:
    """The tuner class of a method."""
    return load(lookup(peft_type).tuner)


def register_peft_method(
    *,
    name: str,
    config_cls: type,
    model_cls: type,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Add a method from outside.

    Arguments:
        name: the lower-case name of a member of `PeftType`.
        config_cls: the configuration's class.
        model_cls: the tuner's class.
        prefix: what the names of the adapter's tensors start with; the tuner's own prefix, or `name` + "_".
        is_mixed_compatible: whether it can be mixed with other methods in one model.

    Raises ValueError for a bad name or prefix, KeyError if the method exists already.
    """
    if name != name.lower() or name.endswith("_"):
        raise ValueError(f"The name of a method is lower case and does not end in '_'; got {name!r}.")
    names = [t.value for t in PeftType]
    if name.upper() not in names:
        raise ValueError(f"{name.upper()!r} is no member of PeftType.{nearest(name.upper(), names)}")
    kind = PeftType(name.upper())
    if kind in METHODS:
        raise KeyError(f"The method {name!r} is registered already.")
    own = getattr(model_cls, "prefix", None)
    if prefix and own and prefix != own:
        raise ValueError(f"prefix={prefix!r} differs from {model_cls.__name__}.prefix={own!r}. Give one of them.")
    METHODS[kind] = Method(config_cls, model_cls, prefix or own or f"{name}_", is_mixed_compatible)


class Lazy(MutableMapping[Any, Any]):
    """A view of the table; reading an entry imports that entry only, and a class that is put in takes its place."""

    def __init__(self, what: str) -> None:
        self._what = what

    def _keys(self) -> list[PeftType]:
        return [k for k, m in METHODS.items() if m.mixed or self._what != "mixed"]

    def __getitem__(self, key: Any) -> Any:
        if key not in self._keys():
            raise KeyError(key)
        method = METHODS[PeftType(key)]
        if self._what == "prefix":
            return method.prefix
        return load(method.config if self._what == "config" else method.tuner)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key not in self._keys():
            raise UnknownNameError(
                f"{key!r} is no method of this table.{nearest(str(key), [k.value for k in self])} Add a new one with "
                "register_peft_method, which takes its configuration and its tuner together."
            )
        kind = PeftType(key)
        changed = {"tuner" if self._what == "mixed" else self._what: value}
        METHODS[kind] = replace(METHODS[kind], **changed)

    def __delitem__(self, key: Any) -> None:
        raise TypeError(f"The table of methods keeps its entries; put another class in the place of {key!r}.")

    def __contains__(self, key: object) -> bool:
        return key in self._keys()

    def __iter__(self) -> Iterator[PeftType]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __repr__(self) -> str:
        return f"<{self._what} of {', '.join(k.value for k in self)}>"


class LazyClasses(MutableMapping[str, Any]):
    """task type -> class; reading an entry imports it, and a class that is put in takes its place."""

    def __getitem__(self, key: Any) -> Any:
        return load(MODEL_CLASSES[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        MODEL_CLASSES[TaskType(key)] = value

    def __delitem__(self, key: Any) -> None:
        del MODEL_CLASSES[key]

    def __contains__(self, key: object) -> bool:
        return key in MODEL_CLASSES

    def __iter__(self) -> Iterator[str]:
        return (task.value for task in MODEL_CLASSES)

    def __len__(self) -> int:
        return len(MODEL_CLASSES)


PEFT_TYPE_TO_CONFIG_MAPPING = Lazy("config")
PEFT_TYPE_TO_TUNER_MAPPING = Lazy("tuner")
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = Lazy("mixed")
PEFT_TYPE_TO_PREFIX_MAPPING = Lazy("prefix")
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = LazyClasses()
