"""The configuration of LoRA. What cannot be right is refused here, before any model is touched."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from ...config import PeftConfig, describe
from ...errors import PeftWarning, UnknownFieldWarning, nearest, report
from ...target_config import MODULE_CONFIG, SCOPE, Alpha, OrAuto, check_bias, check_layers, number, rank, read_names
from ...types import PeftType
from .options import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
    as_option,
)

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "VeloraConfig",
]

INIT = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "lora_ga", "mica")
OPTIONS = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "runtime_config": LoraRuntimeConfig,
    "use_bdlora": BdLoraConfig,
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
}

# Fields that this release reads and writes but does not carry out, and what to use instead.
NOT_YET = {
    "use_qalora": "Leave it out for plain LoRA.",
}
VARIANTS = (  # the settings that make of an adapter more than a plain one
    *("alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config", "monteclora_config", "velora_config"),
    "use_dora",
)
UNDER_DORA = ("use_bdlora", "kasa_config", "monteclora_config", "velora_config")  # those that have a weight
RSLORA_ALPHA = 16
PLAIN_INIT = (True, False, None, "gaussian", "orthogonal")
FROM_BASE = {"velora_config", "monteclora_config"}  # variants that may start from parts of the base weight
FLAGS = ("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying", "inference_mode")


@dataclass
class LoraConfig(Alpha, PeftConfig):
    """LoRA: W + s B A with factors of rank r, s = lora_alpha / r (Hu et al. 2021, arXiv 2106.09685).

    Raises ValueError for values that cannot be, or not together; TypeError for values of the wrong kind.
    """

    other_biases: ClassVar[tuple[str, ...]] = ()  # further values of `bias`, for the biases of adapted layers
    alpha_name = "lora_alpha"
    counts = {"init_lora_weights": ("pissa", "olora", "corda", "lora_ga", "loftq")}  # noqa: RUF012

    r: int = field(default=8, metadata=describe("Rank of the factors, at least 1."))
    target_modules: list[str] | str | None = field(
        default=None,
        metadata=describe(
            "The modules to adapt. A list: full names, or their last parts. A string: a regular expression for the "
            "full name, or 'all-linear'. None: the usual ones of the architecture."
        ),
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata=describe("Modules to leave alone, written as `target_modules`.")
    )
    lora_alpha: OrAuto = field(
        default=8,
        metadata=describe(
            "The update is scaled by lora_alpha / r. 'auto': 2 r, also where rank_pattern sets r; 16 under use_rslora."
        ),
    )
    lora_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of A, in [0, 1)."))
    fan_in_fan_out: bool = field(
        default=False, metadata=describe("The base weight is stored as (in, out), as in GPT-2's Conv1D.")
    )
    bias: Literal["none", "all", "lora_only"] = field(
        default="none",
        metadata=describe("Which biases of the model are trained: none, all, or those of adapted layers."),
    )
    use_rslora: bool = field(
        default=False,
        metadata=describe("Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."),
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=describe("Modules that are trained as a whole and saved with the adapter.")
    )
    init_lora_weights: (
        bool
        | Literal[
            "gaussian",
            "eva",
            "olora",
            "pissa",
            "pissa_niter_[number of iters]",
            "corda",
            "loftq",
            "orthogonal",
            "lora_ga",
            "mica",
        ]
    ) = field(
        default=True,
        metadata=describe(
            "How A and B start. True: A random, B zero, so that the model is unchanged. 'gaussian': A normal. False: "
            "both random, for tests. 'orthogonal': orthogonal factors. 'pissa', 'pissa_niter_<k>', 'olora', 'corda', "
            "'lora_ga', 'mica': from a decomposition of the weight. 'eva': from the inputs. 'loftq': from the error of "
            "quantisation."
        ),
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata=describe("Numbers of the layers to adapt; only with a list of `target_modules`."),
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata=describe("Name of the list of layers, if the numbers are not found without it."),
    )
    rank_pattern: dict | None = field(
        default_factory=dict,
        metadata=describe("Ranks that differ from r: {regular expression of the name or of its end: rank}."),
    )
    alpha_pattern: dict | None = field(
        default_factory=dict,
        metadata=describe("Values that differ from lora_alpha, written as `rank_pattern`."),
    )
    megatron_config: dict | None = field(
        default=None, metadata=describe("Known to files; Megatron's layers need none of it.")
    )
    megatron_core: str | None = field(
        default="megatron.core", metadata=describe("Known to files; nothing is imported by this name.")
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata=describe("Tokens whose embedding is trained: a list, or {name of the embedding: list}."),
    )
    loftq_config: LoftQConfig | dict = field(default_factory=dict, metadata=describe("Settings of the init 'loftq'."))
    eva_config: EvaConfig | None = field(default=None, metadata=describe("Settings of the init 'eva'."))
    corda_config: CordaConfig | None = field(default=None, metadata=describe("Settings of the init 'corda'."))
    lora_ga_config: LoraGAConfig | None = field(default=None, metadata=describe("Settings of the init 'lora_ga'."))
    use_dora: bool = field(
        default=False,
        metadata=describe(
            "DoRA: train the norm of each row of the weight by itself (Liu et al. 2024, arXiv 2402.09353)."
        ),
    )
    velora_config: VeloraConfig | dict | None = field(default=None, metadata=describe("Turns VeLoRA on."))
    alora_invocation_tokens: list[int] | None = field(
        default=None, metadata=describe("aLoRA: the adapter acts from these tokens on (arXiv 2504.12397).")
    )
    use_qalora: bool = field(default=False, metadata=describe("QA-LoRA for GPTQ layers (arXiv 2309.14717)."))
    qalora_group_size: int = field(default=16, metadata=describe("QA-LoRA: inputs that are pooled together."))
    monteclora_config: MontecloraConfig | None = field(default=None, metadata=describe("Turns MonteCLoRA on."))
    layer_replication: list[tuple[int, int]] | None = field(
        default=None,
        metadata=describe("Stack ranges [start, end) of layers into a deeper model that shares weights."),
    )
    runtime_config: LoraRuntimeConfig = field(
        default_factory=LoraRuntimeConfig, metadata=describe("Settings of this run; they are not saved.")
    )
    lora_bias: bool = field(default=False, metadata=describe("Give B a bias."))
    target_parameters: list[str] | None = field(
        default=None,
        metadata=describe(
            "Parameters to adapt, by full name or its last parts, such as the stacked weights of experts."
        ),
    )
    use_bdlora: BdLoraConfig | None = field(default=None, metadata=describe("Turns BD-LoRA on."))
    arrow_config: ArrowConfig | None = field(default=None, metadata=describe("Turns Arrow's routing on."))
    kasa_config: KasaConfig | None = field(default=None, metadata=describe("Turns KaSA on."))
    ensure_weight_tying: bool = field(
        default=False,
        metadata=describe("Adapt tied layers, such as embedding and head, with the same weights."),
    )
    module_config: dict[str, dict[str, Any]] | None = field(default=None, metadata=MODULE_CONFIG)
    scope: list[str] | str | None = field(default=None, kw_only=True, metadata=SCOPE)

    def _register_custom_module(self, device_mapping: dict[type, type]) -> None:
        """Adapt modules by layers of a program's own; files do not say so, so register them before loading, too.

        Arguments:
            device_mapping: {class of the modules: class of their layers}, each a nn.Module and a LoraLayer.
        """
        self._custom_modules = {**(getattr(self, "_custom_modules", None) or {}), **device_mapping}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self._read_options()
        self._read_names()
        self._check_numbers()
        self._check_choices()
        check_layers(self)
        self._check_combinations()
        self._check_module_config()

    def alpha_for(self, r: int) -> int:
        """Under rsLoRA the same at every rank, which is what its root is for: 16, as in its paper."""
        return RSLORA_ALPHA if self.use_rslora else super().alpha_for(r)

    def scaling_for(self, alpha: float, r: int) -> float:
        """What the update is multiplied by."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary, without `runtime_config`, and without a scope that is not set."""
        values = super().to_dict()
        values.pop("runtime_config")
        if values["scope"] is None:
            del values["scope"]
        return values

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """`runtime_config` of a file is ignored: it belongs to the run that wrote it."""
        if isinstance(kwargs.get("runtime_config"), dict):
            report(UnknownFieldWarning, "`runtime_config` in a file is ignored; pass it to the loading function.")
            kwargs.pop("runtime_config")
        return super().check_kwargs(**kwargs)

    def unsupported(self) -> list[str]:
        """The fields that this release cannot carry out; empty for a configuration that it can."""
        names = [name for name in NOT_YET if getattr(self, name) not in (None, False, {})]
        return names

    def refuse_unsupported(self) -> None:
        """Raise NotImplementedError that names what this release cannot carry out and what to use instead."""
        if getattr(self.runtime_config, "ephemeral_gpu_offload", False):
            text = (
                "ephemeral_gpu_offload=True has no effect: norms are taken from the factors, where the weights lie, "
                "without the dense product that it was made for. Leave it out."
            )
            report(PeftWarning, text, strict=False, stacklevel=5)
        names = self.unsupported()
        if not names:
            return
        lines = [f"{name}={getattr(self, name)!r}. {NOT_YET[name]}" for name in names]
        raise NotImplementedError("This release cannot carry out " + " It cannot carry out ".join(lines))

    def _read_options(self) -> None:
        """Nested configurations from dictionaries."""
        for name, kind in OPTIONS.items():
            setattr(self, name, as_option(kind, name, getattr(self, name)))
        if self.runtime_config is None:
            self.runtime_config = LoraRuntimeConfig()
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = asdict(self.loftq_config)
        if self.loftq_config is None:
            self.loftq_config = {}
        if not isinstance(self.loftq_config, dict):
            raise TypeError(f"`loftq_config` must be a `LoftQConfig` or a dict; got {self.loftq_config!r}.")
        as_option(LoftQConfig, "loftq_config", self.loftq_config)

    def _read_names(self) -> None:
        read_names(self)
        tokens = self.trainable_token_indices
        if tokens is not None and not isinstance(tokens, (list, tuple, dict)):
            raise TypeError(f"`trainable_token_indices` must be a list or a dictionary of lists; got {tokens!r}.")
        for indices in tokens.values() if isinstance(tokens, dict) else [tokens or ()]:
            if not isinstance(indices, (list, tuple)) or any(type(i) is not int for i in indices):
                raise TypeError(f"`trainable_token_indices` must hold whole numbers, the tokens; got {indices!r}.")

    def _check_numbers(self) -> None:
        rank("r", self.r)
        self.resolve_alpha()
        for pattern, r in (self.rank_pattern or {}).items():
            rank(f"rank_pattern[{pattern!r}]", r)
        if self.lora_alpha == 0:
            _warn(
                "`lora_alpha` is 0, so the update is multiplied by 0: the adapter changes nothing and learns nothing."
            )
        for pattern, alpha in (self.alpha_pattern or {}).items():
            number(f"alpha_pattern[{pattern!r}]", alpha)
        number("lora_dropout", self.lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"`lora_dropout` must be in [0, 1); got {self.lora_dropout}.")

    def _check_choices(self) -> None:
        for name in FLAGS:
            if getattr(self, name) not in (True, False, None):
                raise TypeError(f"`{name}` must be True or False; got {getattr(self, name)!r}.")
        check_bias(self, "lora_only", *self.other_biases)
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower() in ("gaussian", "olora"):  # as the other library reads them
            self.init_lora_weights = init = init.lower()  # type: ignore[assignment]
        if init is None or isinstance(init, bool) or init in INIT:
            return
        if not (isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init)):
            raise ValueError(
                f"init_lora_weights={init!r} is unknown.{nearest(str(init), INIT)} Use True, False, "
                f"{', '.join(map(repr, INIT))} or 'pissa_niter_<number>'."
            )

    def _check_combinations(self) -> None:
        init = self.init_lora_weights
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.lora_bias:
            if init not in (True, False):
                raise ValueError(
                    f"lora_bias=True is only supported with init_lora_weights=True or False, got {init!r}."
                )
            if self.megatron_config:
                raise ValueError("lora_bias=True is not supported with megatron_config; leave one of them out.")
        self._check_variants()
        self._check_init_options()
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            _warn("aLoRA is currently only supported for CAUSAL_LM task.")
        patterns = self.rank_pattern or self.alpha_pattern
        if self.use_rslora and patterns and str(init).startswith(("pissa", "olora", "corda", "lora_ga")):
            _warn(
                f"use_rslora with rank_pattern or alpha_pattern and init_lora_weights={init!r}: the saved adapter "
                "cannot be converted to one for the original base model."
            )

    def _check_variants(self) -> None:
        """One variant of LoRA at a time, on a plain start; DoRA goes with some."""
        chosen = [name for name in VARIANTS if getattr(self, name)]
        if len(chosen) > 1 and not (len(chosen) == 2 and chosen[0] in UNDER_DORA and chosen[1] == "use_dora"):
            raise ValueError(f"{' and '.join(chosen)} are variants of LoRA that do not go together. Choose one.")
        init = self.init_lora_weights
        plain = PLAIN_INIT[:-1] if self.use_bdlora else PLAIN_INIT  # halves of one basis have no blocks
        from_base = FROM_BASE.intersection(chosen) and str(init).startswith(("pissa", "olora"))
        if [name for name in chosen if name != "use_dora"] and init not in plain and not from_base:
            raise ValueError(f"{chosen[0]} starts by itself and does not go with init_lora_weights={init!r}. Use True.")
        lists = self.use_bdlora
        both = set(lists.target_modules_bd_a or ()) & set(lists.target_modules_bd_b or ()) if lists else ()
        if both:
            raise ValueError(f"BdLoraConfig has {sorted(both)} in both of its lists. Only one factor can be blocked.")

    def _check_init_options(self) -> None:
        """An init and its settings belong together."""
        init = self.init_lora_weights
        for name, kind, key in (("eva_config", EvaConfig, "eva"), ("corda_config", CordaConfig, "corda")):
            if init == key and getattr(self, name) is None:
                _warn(f"`init_lora_weights` is {key!r} but `{name}` is not specified. Using its defaults.")
                setattr(self, name, kind())
        for name, key in (("eva_config", "eva"), ("corda_config", "corda"), ("lora_ga_config", "lora_ga")):
            if init != key and getattr(self, name) is not None:
                _warn(f"`{name}` specified but will be ignored when `init_lora_weights` is not {key!r}.")
        if init == "loftq" and not self.loftq_config:
            raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        if init != "loftq" and self.loftq_config:
            _warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")
            self.loftq_config = {}


def _warn(message: str) -> None:
    warnings.warn(message, PeftWarning, stacklevel=6)
