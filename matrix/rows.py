"""The methods: configuration, the base that their abilities are tried on, and what must be done before wrapping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .bases import SIZE


@dataclass(frozen=True)
class Row:
    """One line of the matrix.

    Arguments:
        config: class name of the configuration.
        settings: its arguments; a string for a nested configuration names its class.
        base: the kind of base model (`bases.ABILITIES`).
        prepare: what comes before or after wrapping ("eva", "corda", "lora_ga", "arrow", "xlora").
        tasks: whether its forward needs `task_ids`.
        cut: by how much randomising its tensors is weakened.
        blocks: whether its targets are whole blocks, not layers.
        pattern: settings that one module may have apart; None if a table such as `rank_pattern` sets them.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    base: str = "layers"
    prepare: str | None = None
    tasks: bool = False
    cut: float = 1.0
    blocks: bool = False
    pattern: dict[str, Any] | None = None


def _lora(**more: Any) -> Row:
    prepare = more.get("init_lora_weights")
    chosen = prepare if prepare in ("eva", "corda", "lora_ga") else None
    return Row("LoraConfig", {"r": 4, "lora_alpha": 8, **more}, prepare=chosen)


def _text(config: str, *, base: str = "llama", prepare: str | None = None, tasks: bool = False, **settings: Any) -> Row:
    return Row(config, {"task_type": "CAUSAL_LM", **settings}, base, prepare, tasks)


ROWS: dict[str, Row] = {
    "lora": _lora(),
    "lora:rslora": _lora(use_rslora=True),
    "lora:dora": _lora(use_dora=True),
    "lora:lora_bias": _lora(lora_bias=True),
    "lora:gaussian": _lora(init_lora_weights="gaussian"),
    "lora:orthogonal": _lora(init_lora_weights="orthogonal"),
    "lora:pissa": _lora(init_lora_weights="pissa"),
    "lora:pissa_niter_4": _lora(init_lora_weights="pissa_niter_4"),
    "lora:olora": _lora(init_lora_weights="olora"),
    "lora:loftq": _lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
    "lora:eva": _lora(init_lora_weights="eva", eva_config="EvaConfig"),
    "lora:corda": _lora(init_lora_weights="corda", corda_config="CordaConfig"),
    "lora:lora_ga": _lora(init_lora_weights="lora_ga", lora_ga_config="LoraGAConfig"),
    "lora:kasa": _lora(kasa_config="KasaConfig"),
    "adalora": Row(
        "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 100, "lora_alpha": 8}, pattern={"init_r": 2}
    ),
    "ia3": Row("IA3Config", {"feedforward_modules": []}, pattern={"init_ia3_weights": False}),
    "loha": Row("LoHaConfig", {"r": 4, "alpha": 4}),
    "lokr": Row("LoKrConfig", {"r": 1, "alpha": 2}),
    "oft": Row("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}, pattern={"oft_block_size": 8}),
    "oft:coft": Row(
        "OFTConfig",
        {"oft_block_size": 4, "coft": True, "eps": 0.05, "use_cayley_neumann": False},
        pattern={"oft_block_size": 8},
    ),
    "boft": Row("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 1}, pattern={"boft_block_size": 8}),
    "vera": Row("VeraConfig", {"r": 4}),
    "randlora": Row("RandLoraConfig", {"r": 4, "randlora_alpha": 8}, pattern={"init_weights": False}),
    "vblora": Row("VBLoRAConfig", {"r": 4, "num_vectors": 6, "vector_length": 4, "topk": 2}),
    "fourierft": Row("FourierFTConfig", {"n_frequency": 20, "scaling": 10.0}),
    "waveft": Row("WaveFTConfig", {"n_frequency": 20, "scaling": 5.0}),
    "c3a": Row("C3AConfig", {"block_size": 4}),
    "hra": Row("HRAConfig", {"r": 4}),
    "miss": Row("MissConfig", {"r": 4}),
    "miss:bat": Row("MissConfig", {"r": 4, "init_weights": "bat"}, cut=0.3),
    "shira": Row("ShiraConfig", {"r": 2}, pattern={"r": 4}),
    "road": Row("RoadConfig", {"variant": "road_1", "group_size": 4}, pattern={"variant": "road_2"}),
    "road:road_4": Row("RoadConfig", {"variant": "road_4", "group_size": 4}, pattern={"variant": "road_2"}),
    "delora": Row("DeloraConfig", {"r": 4}),
    "gralora": Row("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "poly": Row("PolyConfig", {"r": 4, "n_tasks": 3, "n_skills": 2, "n_splits": 2}, tasks=True, pattern={"r": 2}),
    "ln_tuning": Row("LNTuningConfig", {}, "norms"),
    "trainable_tokens": Row("TrainableTokensConfig", {"token_indices": [1, 3, 5]}, "words"),
    "prompt_tuning": _text("PromptTuningConfig", num_virtual_tokens=3),
    "prefix_tuning": _text("PrefixTuningConfig", num_virtual_tokens=3),
    "p_tuning": _text("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=12),
    "multitask_prompt_tuning": _text(
        "MultitaskPromptTuningConfig", tasks=True, num_virtual_tokens=3, num_tasks=3, num_ranks=1
    ),
    "cpt": _text("CPTConfig", cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]),
    "adaption_prompt": _text("AdaptionPromptConfig", adapter_len=3, adapter_layers=1),
    "lora:alora": _text(
        "LoraConfig", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[5, 7]
    ),
    "lora:arrow": _text("LoraConfig", prepare="arrow", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "xlora": _text(
        "XLoraConfig", base="llama without cache", prepare="xlora", hidden_size=SIZE, xlora_depth=2, xlora_size=8
    ),
    "cartridge": _text("CartridgeConfig", num_virtual_tokens=4),
    "lora:bdlora": _lora(use_bdlora={"target_modules_bd_a": ["fc", "target"], "nblocks": 2, "match_strict": False}),
    "lora:monteclora": _lora(monteclora_config="MontecloraConfig"),
    "lora:velora": _lora(velora_config={"num_groups": 4, "scale": 1.0, "init_type": "batch_average_once"}),
    "hira": Row("HiraConfig", {"r": 4}),
    "pvera": Row("PveraConfig", {"r": 4}),
    "unilora": Row("UniLoraConfig", {"r": 4, "theta_d_length": 32}),
    "tinylora": Row("TinyLoraConfig", {"r": 2, "u": 4}, pattern={"r": 3}),
    "psoft": Row("PsoftConfig", {"r": 4}),
    "glora": Row("GloraConfig", {"r": 4}),
    "deft": Row("DeftConfig", {"r": 4}),
    "osf": Row("OSFConfig", {"effective_rank": 4}),
    "frod": Row("FrodConfig", {"sparse_rate": 0.1}, pattern={"init_weights": False}),
    "lily": Row("LilyConfig", {"r": 4, "num_B": 2, "stride_A": 1}),
    "peanut": Row("PeanutConfig", {"r": 4}),
    "beft": Row("BeftConfig", {}),
    "adamss": Row("AdamssConfig", {"r": 8, "num_subspaces": 2, "subspace_rank": 2}),
    "supertuning": Row("SupertuningConfig", {"sparsity": 0.8}),
    "shadow": Row("ShadowConfig", {"task_type": "CAUSAL_LM", "r": 4, "shadow_dropout": 0.0}, "llama", blocks=True),
}
