"""The task classes: which inputs each task has, and which head it trains; nothing else.

Shapes, wherever they occur: ids and masks (batch, tokens) int64; `inputs_embeds` (batch, tokens, size).
Arguments that are None are not handed on, so that the base model's own defaults hold; `task_ids` is for
multi-task prompts only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .core.defaults import TASK_HEADS
from .model import PeftModel


def _given(**named: Any) -> dict[str, Any]:
    return {k: v for k, v in named.items() if v is not None}


class PeftModelForSequenceClassification(PeftModel):
    """A classifier of whole texts; its head is trained and saved with each adapter."""

    head_names = TASK_HEADS["SEQ_CLS"]

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None,
        output_attentions=None, output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        """Run the base model; `labels` (batch,) are classes or numbers, or (batch, labels)."""
        named = _given(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            return_dict=return_dict, task_ids=task_ids,
        )  # fmt: skip
        return self._run(self._modules["base_model"], (), {**named, **kwargs})


class PeftModelForTokenClassification(PeftModel):
    """A classifier of tokens; its head is trained and saved with each adapter. `labels` are (batch,
    tokens).
    """

    head_names = TASK_HEADS["TOKEN_CLS"]
    forward = PeftModelForSequenceClassification.forward


class _Generating(PeftModel):
    """What the language models share."""

    def _check_model(self, model: nn.Module) -> None:
        if not hasattr(model, "prepare_inputs_for_generation"):
            raise AttributeError(
                f"{type(model).__name__} has no `prepare_inputs_for_generation`, which {type(self).__name__} needs. "
                "Leave `task_type` out of the configuration for models that do not generate."
            )

    def prepare_inputs_for_generation(self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's own preparation of a generation step."""
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The base model's method itself."""
        return self.get_base_model().prepare_inputs_for_generation


class PeftModelForCausalLM(_Generating):
    """A language model that continues a text; `labels` are (batch, tokens), -100 where there is no loss."""

    forward = PeftModelForSequenceClassification.forward


class PeftModelForSeq2SeqLM(_Generating):
    """A language model with an encoder and a decoder."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, decoder_input_ids=None,
        decoder_attention_mask=None, decoder_inputs_embeds=None, labels=None,
        output_attentions=None, output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        """Run the base model; `labels` (batch, tokens), -100 where there is no loss, also make the decoder's
        input.
        """
        named = _given(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds, labels=labels, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, return_dict=return_dict, task_ids=task_ids,
        )  # fmt: skip
        return self._run(self._modules["base_model"], (), {**named, **kwargs})

    def generate(self, **kwargs):
        """Generate with the base model; all arguments by name."""
        return super().generate(**kwargs)


class PeftModelForQuestionAnswering(PeftModel):
    """A model that marks the start and the end of an answer; its head is trained and saved with each
    adapter.
    """

    head_names = TASK_HEADS["QUESTION_ANS"]

    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None,
        inputs_embeds=None, start_positions=None, end_positions=None,
        output_attentions=None, output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        """Run the base model; `start_positions` and `end_positions` (batch,) give the loss."""
        named = _given(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds, start_positions=start_positions,
            end_positions=end_positions, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, return_dict=return_dict, task_ids=task_ids,
        )  # fmt: skip
        return self._run(self._modules["base_model"], (), {**named, **kwargs})


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are the result."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None,
        output_attentions=None, output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        """Run the base model."""
        named = _given(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            return_dict=return_dict, task_ids=task_ids,
        )  # fmt: skip
        return self._run(self._modules["base_model"], (), {**named, **kwargs})
