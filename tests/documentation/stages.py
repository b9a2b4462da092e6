"""What is there when the code of a page begins: files in the folder, and names. Most pages need nothing."""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import device_mesh


def tokenizer() -> Any:
    """One token for each byte, and a template for chats."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    return fast


def llama(width: int = 32) -> Any:
    """A Llama of two layers over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=256)).eval()


def model_folder(name: str, width: int = 32) -> Any:
    """A saved Llama with its tokenizer."""
    model = llama(width)
    model.save_pretrained(name)
    tokenizer().save_pretrained(name)
    return model


def adapter_folder(name: str, targets: Any = "all-linear", **settings: Any) -> None:
    """A saved adapter of that Llama, which changes its answers."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}
    get_peft_model(llama(), LoraConfig(target_modules=targets, **settings)).save_pretrained(name)


def examples(name: str) -> None:
    """Prompts and answers."""
    rows = [{"prompt": f"say {i}: ", "completion": "yes" * (1 + i % 3)} for i in range(24)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokens() -> dict[str, torch.Tensor]:
    """A batch of three texts."""
    ids = torch.arange(2, 26).view(3, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ---- page by page ----------------------------------------------------------------------------------------------------

Names = dict[str, Any]


def method(_: ExitStack) -> Names:
    """A model that is wide enough for the methods' own defaults."""
    return {"base": llama(256)}


def readme(_: ExitStack) -> Names:
    model_folder("FOLDER_OR_HUB_ID")
    adapter_folder("another")
    for name in ("examples.jsonl", "other.jsonl"):
        examples(name)
    return {"batch": tokens()}


def quickstart(_: ExitStack) -> Names:
    model_folder("FOLDER_OR_HUB_ID")
    examples("examples.jsonl")
    return {}


def clients(_: ExitStack) -> Names:
    """For the pages on other libraries' trainers."""
    model_folder("FOLDER_OR_HUB_ID")
    return {}


def programs(_: ExitStack) -> Names:
    """For examples/README.md: also texts of two classes, and an encoder as their base."""
    model_folder("FOLDER_OR_HUB_ID")
    for name in ("examples.jsonl", "other.jsonl"):
        examples(name)
    rows = [{"text": f"{word} {i}", "label": word} for i in range(20) for word in ("good", "bad")]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {}


def serving(stack: ExitStack) -> Names:
    eager = functools.partial(torch.compile, backend="eager")  # graphs are captured as ever; machine code takes long
    stack.enter_context(mock.patch.object(torch, "compile", eager))
    model_folder("FOLDER_OR_HUB_ID")
    for number, targets in ((1, ["q_proj"]), (2, ["q_proj", "v_proj"]), (7, "all-linear")):
        adapter_folder(f"adapters/customer-{number}", targets, r=2 + number)
    batch = tokens()
    return {"batch": batch, "one": {name: tensor[:1] for name, tensor in batch.items()}}


def merging(_: ExitStack) -> Names:
    for name in ("llama-70b", "base"):
        model_folder(name)
    for name in ("my-adapter", "first", "second", "adapter"):
        adapter_folder(name)
    return {"MyModel": llama}


def converting(_: ExitStack) -> Names:
    model_folder("path/to/the/base/model")
    adapter_folder("my-lora")
    return {}


def diffusion(_: ExitStack) -> Names:
    """A pipeline of tiny models, a LoRA file for it, and pictures with captions."""
    from safetensors.torch import save_file

    from clients.pixels import factors, pipeline

    pipe = pipeline("unet")
    pipe.save_pretrained("FOLDER_OR_HUB_ID")
    Path("another-lora").mkdir()
    tensors = {f"unet.{name}": tensor for name, tensor in factors(pipe.unet, seed=1).items()}
    save_file(tensors, "another-lora/pytorch_lora_weights.safetensors")
    return {"batches": [(torch.rand(2, 3, 8, 8) * 2 - 1, ["a b", "c d"])] * 2}


def distributed(stack: ExitStack) -> Names:
    """One process for the engines; where the page takes 1,024, torch's group that only pretends to have them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model_folder("MODEL")
    examples("train.jsonl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    stack.enter_context(mock.patch.dict(os.environ, {**place, "RANK": "0", "WORLD_SIZE": "1"}))  # as torchrun does
    stack.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
    made = device_mesh.init_device_mesh

    def pretended(_: str, shape: tuple[int, ...], **more: Any) -> Any:
        size = torch.Size(shape).numel()
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        return made("cpu", shape, **more)

    stack.enter_context(mock.patch.object(device_mesh, "init_device_mesh", pretended))
    return {"MODEL": "MODEL"}


def quantized(_: ExitStack) -> Names:
    model_folder("FOLDER_OR_HUB_ID", 64)  # kernels for four bits want whole blocks in a row
    examples("examples.jsonl")
    return {"batch": tokens()}


STAGES: dict[str, Callable[[ExitStack], Names]] = {
    "README.md": readme,
    "docs/converting.md": converting,
    "docs/diffusers.md": diffusion,
    "docs/distributed.md": distributed,
    "docs/merging.md": merging,
    "docs/quantization.md": quantized,
    "docs/quickstart.md": quickstart,
    "docs/serving.md": serving,
    "docs/trainer.md": clients,
    "docs/trl.md": clients,
    "examples/README.md": programs,
}


def stage(page: str, stack: ExitStack) -> Names:
    """Set a page's stage in the current folder; the names that its code finds. What is to be undone, `stack` undoes."""
    if page.startswith("docs/methods/"):
        return method(stack)
    return STAGES[page](stack) if page in STAGES else {}
