"""Every method: a training step of 256 tokens and one token of evaluation, beside the bare model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import OVER, Numbers, measure, turns
from benchmarks.models import ALL_LINEAR, Llama, frozen
from benchmarks.subjects.steps import step

TURNS = 1  # repetitions of a method in a row, for which its model is made once
TOKENS = 256
WIDE, NARROW = (512, 1376), (256, 704)  # hidden and inner sizes for a step, and for a token
TEXT = {"task_type": "CAUSAL_LM"}
ATTENTION = ["q_proj", "v_proj"]
TASKS = ("Poly", "multitask prompts")  # which are told the samples' tasks
PROMPT = [1, 2, 3, 4]
BLOCKS = {"target_modules_bd_a": ["o_proj", "down_proj"], "nblocks": 2, "match_strict": False}

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 16}),
    "LoRA, dropout": ("LoraConfig", {"r": 16, "lora_dropout": 0.1}),
    "LoRA, bias": ("LoraConfig", {"r": 16, "lora_bias": True}),
    "DoRA": ("LoraConfig", {"r": 16, "use_dora": True}),
    "DoRA, dropout": ("LoraConfig", {"r": 16, "use_dora": True, "lora_dropout": 0.1}),
    "PiSSA": ("LoraConfig", {"r": 16, "init_lora_weights": "pissa_niter_4"}),
    "KaSA": ("LoraConfig", {"r": 16, "kasa_config": "KasaConfig"}),
    "BD-LoRA": ("LoraConfig", {"r": 16, "use_bdlora": BLOCKS}),
    "MonteCLoRA": ("LoraConfig", {"r": 16, "monteclora_config": "MontecloraConfig"}),
    "VeLoRA": ("LoraConfig", {"r": 16, "velora_config": {"num_groups": 32, "scale": 1.0}}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 100}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "LoHa": ("LoHaConfig", {"r": 8, "init_weights": False}),
    "LoKr": ("LoKrConfig", {"r": 8, "init_weights": False}),
    "OFT": ("OFTConfig", {"oft_block_size": 32}),
    "OFT, Cayley": ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA": ("HRAConfig", {"r": 8}),
    "RoAd": ("RoadConfig", {"group_size": 32}),
    "RoAd 4": ("RoadConfig", {"variant": "road_4", "group_size": 32}),
    "VeRA": ("VeraConfig", {}),
    "PVeRA": ("PveraConfig", {}),
    "RandLoRA": ("RandLoraConfig", {}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 4, "num_vectors": 64, "vector_length": 32, "topk": 2}),
    "Uni-LoRA": ("UniLoraConfig", {"r": 4}),
    "TinyLoRA": ("TinyLoraConfig", {}),
    "FourierFT": ("FourierFTConfig", {}),
    "WaveFT": ("WaveFTConfig", {}),
    "C3A": ("C3AConfig", {"block_size": 32}),
    "MiSS": ("MissConfig", {}),
    "MiSS, bat": ("MissConfig", {"r": 32, "init_weights": "bat"}),
    "MiSS, mini": ("MissConfig", {"r": 32, "mini_r": 8, "init_weights": "mini"}),
    "SHiRA": ("ShiraConfig", {"r": 16}),
    "DeLoRA": ("DeloraConfig", {"r": 16}),
    "GraLoRA": ("GraloraConfig", {"r": 16}),
    "HiRA": ("HiraConfig", {"r": 16}),
    "PSOFT": ("PsoftConfig", {}),
    "GLoRA": ("GloraConfig", {"r": 8}),
    "DEFT": ("DeftConfig", {"r": 16}),
    "OSF": ("OSFConfig", {}),
    "FRoD": ("FrodConfig", {"progressbar": False}),
    "Lily": ("LilyConfig", {"r": 16, "num_B": 2, "stride_A": 1}),
    "PEANuT": ("PeanutConfig", {"r": 16}),
    "BEFT": ("BeftConfig", {}),
    "AdaMSS": ("AdamssConfig", {}),
    "SuperTuning": ("SupertuningConfig", {}),
    "Poly": ("PolyConfig", {"r": 8, "n_tasks": 3, "n_skills": 2}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 16}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 16}),
    "P-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 16, "encoder_hidden_size": 128}),
    "multitask prompts": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 16, "num_tasks": 3}),
    "CPT": ("CPTConfig", {"cpt_token_ids": PROMPT, "cpt_tokens_type_mask": PROMPT, "cpt_mask": [1] * 4}),
    "Cartridge": ("CartridgeConfig", {"num_virtual_tokens": 16}),
    "LLaMA-Adapter": ("AdaptionPromptConfig", {"adapter_len": 10, "adapter_layers": 2}),
    "aLoRA": ("LoraConfig", {"r": 16, "target_modules": ATTENTION, "alora_invocation_tokens": [5, 7]}),
    "trainable tokens": ("TrainableTokensConfig", {"token_indices": [1, 3, 5]}),
    "Shadow": ("ShadowConfig", {"r": 4, "shadow_dropout": 0.0}),
}


BARE, BARE_TEXT = "bare", "bare text model"
NAMES = (*LAYERS, *MODELS)


def is_text(name: str) -> bool:
    """Whether the model is one of transformers, whose input is tokens."""
    return name == BARE_TEXT or name in MODELS


def text_model(hidden: int, inner: int) -> Any:
    """A small model of transformers, for methods that know its kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8))


def made(name: str, size: tuple[int, int]) -> nn.Module:
    """The bare model, or one under a method."""
    model = text_model(*size) if is_text(name) else Llama(2, *size, 8, 64)
    if name in (BARE, BARE_TEXT):
        if is_text(name):
            model.enable_input_require_grads()  # so that a step goes down to the bottom
        return frozen(model)
    import peft

    kind, fields = (MODELS if is_text(name) else LAYERS)[name]
    nested = {k: getattr(peft, v)() for k, v in fields.items() if k.endswith("_config") and isinstance(v, str)}
    common = TEXT if is_text(name) else {"target_modules": ALL_LINEAR}
    return peft.get_peft_model(model, getattr(peft, kind)(**{**common, **fields, **nested}))


class Logits(nn.Module):
    """A model that gives logits of tokens or their embeddings, and is told its task."""

    def __init__(self, name: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.text = made(name, size), is_text(name)
        self.task = {"task_ids": torch.tensor([1])} if name in TASKS else {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.text:
            return (self.model.base_model if self.task else self.model)(x, **self.task)
        return self.model(input_ids=x, attention_mask=torch.ones_like(x), **self.task).logits


@cache
def passes(name: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """A training step and the evaluation of one token, each run once."""
    wide, narrow = Logits(name, WIDE).train(), Logits(name, NARROW).eval()
    tokens, token = torch.randint(8, 64, (1, TOKENS)), torch.tensor([[9]])
    train = step(wide, tokens if wide.text else torch.randn(1, TOKENS, WIDE[0], requires_grad=True))
    evaluate = torch.no_grad()(lambda: narrow(token))
    train(), evaluate()
    return train, evaluate


def runs(name: str) -> Iterator[Numbers]:
    """Repetitions of a training step and of one token, between those of the bare model."""
    bare, adapted = passes(BARE_TEXT if is_text(name) else BARE), passes.__wrapped__(name)
    while True:
        numbers: Numbers = {}
        for what, before, run, most in zip(("step", "token"), bare, adapted, (3, 24), strict=True):
            found = turns(before, {f"{name}: {what}": run}, most)
            numbers |= {key: value for key, value in found.items() if key != "bare"}
        yield numbers


@measure(
    "every method, 2 Llama layers, all-linear: a step of 256 tokens (hidden 512), one token in evaluation (256)",
    repeats=TURNS * len(NAMES),
    noise=False,
    limits={f"{name}: {what}{OVER}": 1.0 for name in NAMES for what in ("step", "token")},
)
def methods() -> Iterator[Numbers]:
    """One method after the other, each with a model of its own; further repetitions go through all of them again."""
    for name in cycle(NAMES):
        torch.manual_seed(0)
        yield from islice(runs(name), TURNS)
