"""Configurations of methods that clients meet, for a small Llama."""

from __future__ import annotations

import peft
from peft import LoraConfig

from .tiny import TARGETS

METHODS = {
    "lora": LoraConfig(r=2, target_modules=TARGETS),
    "dora": LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "bias": LoraConfig(r=2, target_modules=TARGETS, lora_bias=True),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "parameter": LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["v_proj.weight"]),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=TARGETS),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, target_modules=TARGETS),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "hra": peft.HRAConfig(r=2, target_modules=TARGETS),
    "miss": peft.MissConfig(r=2, target_modules=TARGETS),
    "shira": peft.ShiraConfig(r=2, target_modules=TARGETS),
    "c3a": peft.C3AConfig(block_size=8, target_modules=["q_proj"]),
    "road": peft.RoadConfig(group_size=4, target_modules=["q_proj"]),
    "delora": peft.DeloraConfig(r=2, target_modules=TARGETS),
    "gralora": peft.GraloraConfig(r=4, gralora_k=2, target_modules=["q_proj"]),
    "waveft": peft.WaveFTConfig(n_frequency=5, target_modules=TARGETS),
    "fourierft": peft.FourierFTConfig(n_frequency=5, target_modules=TARGETS),
    "ln_tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}
