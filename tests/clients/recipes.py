"""TRL's trainers over a few words, and what they log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

from peft import LoraConfig

from .tiny import IDS, llama, llama_config, seeded
from .tiny import tokenizer as words

datasets.disable_progress_bars()

PROBE = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
PROMPTS = [" ".join(f"w{n + k}" for k in range(1 + n % 3)) for n in range(3, 19, 2)]
GOOD = [f" w{n + 3} w{n}" for n in range(3, 19, 2)]
BAD = [f" w{n + 9}" for n in range(3, 19, 2)]
LINES = [prompt + answer for prompt, answer in zip(PROMPTS, GOOD, strict=True)]
PAIRS = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
CHAT = [[{"role": "user", "content": p}] for p in PROMPTS]


def some_reward(completions: list[str], **_: Any) -> list[float]:
    """Likes words of high numbers."""
    return [sum(int(word[1:]) for word in c.split() if word[1:].isdigit()) / 10 for c in completions]


SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    max_position_embeddings pad_token_id bos_token_id eos_token_id"""
GENERATED = {"max_completion_length": 6, "num_generations": 2}
RECIPES: dict[str, tuple[dict[str, Any], ...]] = {  # data, arguments, what the trainer takes beside
    "SFT": ({"text": LINES}, {}, {}),
    "DPO": (PAIRS, {"beta": 0.5}, {}),
    "KTO": ({"prompt": PROMPTS, "completion": GOOD, "label": [True, False] * 4}, {"beta": 0.5}, {}),
    "Reward": ({"chosen": GOOD, "rejected": BAD}, {}, {}),
    "GRPO": ({"prompt": PROMPTS}, {**GENERATED, "beta": 0.5}, {"reward_funcs": some_reward}),
    "RLOO": ({"prompt": PROMPTS}, {**GENERATED, "beta": 0.5}, {"reward_funcs": some_reward}),
    "Distillation": ({"prompt": CHAT}, {"max_completion_length": 6}, {}),
}
COMMON = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 3e-2,
    "disable_tqdm": True,
    "seed": 0,
}


def lora(**changes: Any) -> LoraConfig:
    """LoRA that does something from the start."""
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    return LoraConfig(**{**fields, **changes})


def base(recipe: str) -> nn.Module:
    """The model that a recipe trains."""
    if recipe == "Reward":
        return seeded(LlamaForSequenceClassification, llama_config(num_labels=1, initializer_range=0.3))
    return llama()


def mixtral() -> nn.Module:
    """Two experts, which are rows of one parameter."""
    sizes = {key: getattr(llama_config(), key) for key in SIZES.split()}
    return seeded(MixtralForCausalLM, MixtralConfig(num_local_experts=2, **sizes))


def tokenizer() -> Any:
    """Knows how to write a chat."""
    made = words()
    made.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    return made


def trainer(recipe: str, model: Any, folder: Path, arguments: Any = (), data: Any = None, **more: Any) -> Any:
    """TRL's trainer of that name over its data; `kinds` beside: another (trainer, arguments) over that data."""
    kind, setting = more.pop("kinds", None) or (getattr(trl, f"{recipe}Trainer"), getattr(trl, f"{recipe}Config"))
    usual, settings, taken = RECIPES[recipe]
    made = setting(**{**COMMON, "output_dir": str(folder), **settings, **dict(arguments)})
    if recipe == "Distillation":
        taken = {"teacher_model": llama(num_hidden_layers=1)}
    kept = datasets.Dataset.from_dict(data or usual)
    return kind(model=model, args=made, train_dataset=kept, processing_class=tokenizer(), **taken, **more)


def history(of: Any, resume: str | None = None) -> list[dict[str, float]]:
    """Trained; what is logged of each step, but times and TRL's count of tokens (it starts anew on resuming)."""
    of.train(resume_from_checkpoint=resume)
    steps = [entry for entry in of.state.log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if "time" not in k and k != "num_tokens"} for entry in steps]


def adapter(folder: Path, of: str = "default") -> dict[str, torch.Tensor]:
    """The tensors in a checkpoint's adapter file."""
    return load_file(folder / ("" if of == "default" else of) / "adapter_model.safetensors")
