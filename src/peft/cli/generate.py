"""Answers to prompts; `peft generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft.cli.batch import Encoder
from peft.cli.check import UsageError
from peft.cli.options import GenerateOptions


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Sequence[str], encoder: Encoder, max_new_tokens: int, temperature: float = 0.0
) -> list[str]:
    """The answers to `prompts`, in one batch padded on the left; leaves the model's mode as it was.

    Arguments:
        model: a causal language model with `generate`.
        prompts: without the template.
        encoder: adds the template and makes tokens.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token, higher values sample.
    """
    tokenizer = encoder.tokenizer
    encoded = [encoder.prompt(p)[-encoder.max_length :] for p in prompts]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    T = max(map(len, encoded))
    ids = torch.tensor([[pad or 0] * (T - len(p)) + p for p in encoded])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in encoded])
    device = next(model.parameters()).device
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature}
    training = model.training
    model.eval()
    out = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        **how,
    )
    model.train(training)
    return [tokenizer.decode(row[T:], skip_special_tokens=True).strip() for row in out]


def run(options: GenerateOptions) -> int:
    """`peft generate`: print the answer, and nothing else, to standard output."""
    prompt = sys.stdin.read().strip() if options.prompt == "-" else options.prompt
    if not prompt.strip():
        raise UsageError("--prompt: is empty. Give text, or - and text on standard input.")
    from peft.cli.model import load_adapter
    from peft.cli.state import kept_template

    model, tokenizer = load_adapter(options.adapter, options.model, options.dtype, options.base_only, options.quantize)
    if torch.cuda.is_available() and next(model.parameters()).device.type == "cpu":  # what is quantised is there
        model.to("cuda")
    torch.manual_seed(options.seed)
    encoder = Encoder(tokenizer, options.template or kept_template(options.adapter), sys.maxsize)
    print(generate(model, [prompt], encoder, options.max_new_tokens, options.temperature)[0])
    return 0
