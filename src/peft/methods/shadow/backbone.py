"""The small model whose states are the shadow, its projection and head, and the three on their own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.buffers import tensors_below
from ...core.defaults import SEQ_CLS_HEAD_NAMES
from ...core.past import name_among, with_past
from ...core.shared import SharedTensors
from ...core.stack import Slot
from .config import SIZES

IGNORED = -100  # labels that count for nothing, as in transformers


class Beside(SharedTensors):
    """One module of each adapter that stands beside the model, by adapter name."""

    def put(self, name: str, module: nn.Module) -> None:
        """File the module of an adapter, frozen until it is activated."""
        self._modules[name] = module
        self.set_requires_grad(name, False)

    def _get_available_adapters(self) -> set[str]:
        return set(self._modules)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """What the adapter trains of it: not the embeddings of a trained model."""
        module = self._modules.get(name)
        fixed = getattr(module, "fixed_embeddings", None)
        kept = set() if fixed is None else set(fixed.parameters())
        return (p for p in (() if module is None else module.parameters()) if p not in kept)

    def slots(self, name: str) -> list[Slot]:
        """Its tensors; files call every adapter `default` here."""
        module = self._modules.get(name)
        held = () if module is None else tensors_below(module)
        return [Slot(f"default.{leaf}", f"{name}.{leaf}", owner, attr) for owner, leaf, attr in held]

    def delete_adapter(self, name: str, active: tuple[str, ...] = ()) -> None:
        """Forget the module of an adapter."""
        self._modules.pop(name, None)

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def _get_name(self) -> str:
        return nn.ModuleDict.__name__

    def extra_repr(self) -> str:
        return ""


def body(model: Any) -> Any:
    """The model below its head; the decoder, where that is a part of it."""
    found = getattr(model, "base_model", model)
    found = found if isinstance(found, nn.Module) else model
    inner = getattr(found, "decoder", None)
    return inner if isinstance(inner, nn.Module) and hasattr(inner, "set_input_embeddings") else found


def made(model: Any, config: Any) -> nn.Module:
    """The backbone of a configuration for a model: random and small, or a trained one."""
    if config.shadow_model != "mirror":
        from transformers import AutoModel

        trained: nn.Module = AutoModel.from_pretrained(config.shadow_model)
        trained.__dict__["fixed_embeddings"] = trained.get_input_embeddings()  # type: ignore[operator]
        return trained
    own = copy.deepcopy(model.config)
    own.num_hidden_layers = config.shadow_num_hidden_layers or 1
    for field, names in SIZES.items():
        if getattr(config, field) is not None:
            _set(own, names, field, getattr(config, field))
    if config.shadow_hidden_size and hasattr(own, "word_embed_proj_dim"):
        own.word_embed_proj_dim = own.hidden_size  # the states are taken as wide as that, not as words of the base
    heads, shared = (getattr(own, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if config.shadow_num_attention_heads and shared and heads % shared:
        raise ValueError(
            f"shadow_num_attention_heads={heads} cannot share the {shared} key heads of this model. Use a multiple of "
            f"{shared}."
        )
    if isinstance(getattr(own, "layer_types", None), list):
        own.layer_types = [own.layer_types[i % len(own.layer_types)] for i in range(own.num_hidden_layers)]
    mirror: nn.Module = type(body(model))(own)
    if shares(model, config):
        mirror.set_input_embeddings(None)  # type: ignore[operator]
    return mirror


def _set(config: Any, names: tuple[str, ...], field: str, value: int) -> None:
    """Set a size of a model's configuration by the first of these names that it has."""
    known = [name for name in names if hasattr(config, name)]
    if not known:
        raise ValueError(
            f"{field}={value}, but a {type(config).__name__} has none of {', '.join(names)}. Leave it out."
        )
    setattr(config, known[0], value)


def shares(model: Any, config: Any) -> bool:
    """Whether the shadow reads the base model's embeddings."""
    size = config.shadow_hidden_size
    equal = size is None or size == model.config.hidden_size
    return bool(config.share_embeddings and config.shadow_model == "mirror" and equal)


def states(backbone: Any, projection: Any, embeddings: Any, kwargs: dict[str, Any], past: Any = None) -> Tensor:
    """The shadow before the first block, (samples, tokens, size).

    Arguments:
        backbone, projection: the adapter's.
        embeddings: those of the base model, if the shadow reads them.
        kwargs: what the base model is called with.
        past: the shadow's own cache, which grows, while the base's may have the size of what is to come.
    """
    known = inspect.signature(backbone.forward).parameters
    given = {k: v for k, v in kwargs.items() if k in known and k not in ("return_dict", "output_hidden_states")}
    given = with_past(given, name_among(known), past)
    kind = next(backbone.parameters()).dtype
    if isinstance(mask := given.get("attention_mask"), Tensor) and mask.dim() == 4:
        given["attention_mask"] = mask[..., : mask.shape[-2] + (0 if past is None else past.get_seq_length())]
    ids, embedded = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    if embeddings is not None:
        given["inputs_embeds"] = (embeddings(ids) if embedded is None else embedded).to(kind)
    elif ids is None:
        raise ValueError("The shadow has embeddings of its own, so the model needs input_ids, but got inputs_embeds.")
    else:
        given["input_ids"] = ids
    return projection(backbone(**given).last_hidden_state)


def head_of(model: Any) -> tuple[str, Any]:
    """(name, module) of what makes classes of hidden states; ("", None) where the model has none."""
    for name in SEQ_CLS_HEAD_NAMES:
        if isinstance(getattr(model, name, None), nn.Module):
            return name, getattr(model, name)
    return "", None


def own_loss(logits: Tensor, labels: Tensor, task: str | None, mask: Tensor | None) -> Tensor:
    """The cross entropy of the shadow's own answer.

    Arguments:
        logits: (samples, tokens, classes).
        labels: of each token, or of each sample under SEQ_CLS.
        task: the task type.
        mask: which tokens are there; the last of them stands for the sample.
    """
    if task != "SEQ_CLS":
        wanted = labels[:, 1:].to(logits.device)
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
    count = torch.arange(logits.shape[1], device=logits.device)
    last = (mask.to(logits.device) * count).argmax(-1) if mask is not None else count[-1:].expand(len(logits))
    pooled = logits[torch.arange(len(logits), device=logits.device), last].float()
    if labels.is_floating_point():
        wanted = labels.to(pooled.device, pooled.dtype)
        if wanted.dim() > 1:
            return F.binary_cross_entropy_with_logits(pooled, wanted)
        return F.mse_loss(pooled.squeeze(-1), wanted)
    return F.cross_entropy(pooled, labels.flatten().to(pooled.device))


class DetachedShadowModel(nn.Module):
    """The small model on its own: backbone with embeddings, projection and head.

    Arguments:
        backbone, projection, head: its parts; the head may be None.
        embeddings: those of the base model, if the shadow reads them.
    """

    def __init__(self, backbone: Any, projection: nn.Module, head: nn.Module | None, embeddings: nn.Module | None):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        if embeddings is not None:
            backbone.set_input_embeddings(embeddings)
        self.projection, self.head = projection, head

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits, or hidden states where there is no head; arguments are the backbone's."""
        from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

        hidden = self.projection(self.backbone(input_ids=input_ids, **kwargs).last_hidden_state)
        if self.head is None:
            return BaseModelOutput(last_hidden_state=hidden)
        return CausalLMOutput(logits=self.head(hidden))
