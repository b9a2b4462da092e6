"""What a prompt method states: the module that makes the prompt, and what files hold of it.

A method is a subclass of `BasePromptEncoder`: its tensors, and `forward` from the numbers of the virtual tokens to
their embeddings (THE DEFINITION). How those enter a model, for every task, is written in `inputs` and `generating`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..errors import listing
from .resuming import follow

KIND: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}  # of first values, whatever is default
MADE = "_made"  # where an encoder holds what it made in evaluation


class BasePromptEncoder(nn.Module):
    """Makes the prompt of one adapter.

    Arguments:
        config: the adapter's configuration, filled in from the model's.
    """

    caches: ClassVar[bool] = False  # the prompt is keys and values of every layer, not tokens in front of the text
    by_task: ClassVar[bool] = False  # each sample has the prompt of its task
    in_decoder: ClassVar[bool] = False  # an encoder-decoder has tokens in front of the decoder's text too
    own_loss: ClassVar[bool] = False  # `loss` takes the place of the model's own
    lasts: ClassVar[bool] = False  # `forward` of this very class reads tensors and `facts` alone: evaluation keeps it
    network: tuple[str, ...] = ()  # children that are needed for training only: files hold what they make
    led: tuple[str, ...] = ()  # parameters of which files hold where they lead

    words: list[Any] | None = None  # the ids of virtual tokens that are words, or nearly
    heads: int  # of keys and values
    layers: int
    stride: int  # from the key of one layer to that of the next, in what it makes
    embedding: Any  # the table of virtual tokens

    def __init__(self, config: PromptLearningConfig) -> None:
        super().__init__()
        self.num_virtual_tokens = int(config.num_virtual_tokens or 0)
        self.token_dim = int(config.token_dim or 0)
        self.rows = self.num_virtual_tokens * int(config.num_transformer_submodules or 1)
        follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        follow(self)

    @classmethod
    def make(cls, config: Any, words: nn.Module) -> BasePromptEncoder:
        """The encoder of a configuration.

        Arguments:
            config: as for the class.
            words: the model's embedding of words, from which a prompt may start.
        """
        return cls(config)

    @classmethod
    def asked(cls, config: Any) -> dict[str, int]:
        """{key in files: how many numbers it has}, of a configuration; sizes that it leaves to the model count once."""
        sizes = [config.num_virtual_tokens, config.token_dim, *((2, config.num_layers) if cls.caches else ())]
        return {"prompt_embeddings": math.prod(n for n in sizes if isinstance(n, int))}

    @classmethod
    def check_outline(cls, config: Any, outline: Mapping[str, Tensor], name: str) -> None:
        """Raise RuntimeError for a prompt that the configuration makes larger than the file has it."""
        for key, wanted in cls.asked(config).items():
            found = outline.get(key)
            if found is not None and wanted > found.numel():
                raise RuntimeError(
                    f"The prompt of adapter {name!r} does not fit: its configuration asks for {wanted} numbers of "
                    f"{key}, and the file holds {tuple(found.shape)}. It belongs to another number of virtual tokens "
                    "or tasks, or to another base model."
                )

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training moves."""
        return list(self.parameters())

    def prompt(self, batch: int, task_ids: Tensor | None = None) -> Tensor:
        """The prompt of each sample, (batch, tokens, size), made anew."""
        self.__dict__.pop(MADE, None)
        indices = torch.arange(self.rows, device=next(self.parameters()).device)
        if self.by_task:
            return self(indices.expand(batch, -1), task_ids)
        return self(indices).expand(batch, -1, -1)

    def facts(self, task_ids: Tensor | None) -> tuple[Any, ...]:
        """What the prompt depends on beside tensors and the number of tokens."""
        return ()

    def train(self, mode: bool = True) -> Any:
        """As torch's; what evaluation has kept is made anew afterwards."""
        self.__dict__.pop(MADE, None)
        return super().train(mode)

    def loss(self, logits: Tensor, labels: Tensor, given: dict[str, Any], others: tuple[int, int] = (0, 0)) -> Tensor:
        """The loss, of a method that has its own; `others` counts virtual tokens in front of its own and behind."""
        raise NotImplementedError

    @torch.no_grad()
    def for_file(self) -> dict[str, Tensor]:
        """The tensors of a file: the prompt itself, as evaluation has it, whatever made it."""
        modes = [(m, m.training) for m in self.modules()]
        try:
            for m, _ in modes:  # a network may have dropout
                m.training = False
            return {"prompt_embeddings": self.prompt(1)[0].detach().clone()}
        finally:
            for m, mode in modes:
                m.training = mode

    def beside_file(self) -> dict[str, nn.Parameter]:
        """What a run needs to go on, where a file holds only what is made of it."""
        return {n: p for n, p in self.named_parameters() if n in self.led or not self.flat}

    def homes(self) -> dict[str, nn.Parameter]:
        """{key in files: the parameter that holds it} once there is no network."""
        return {"prompt_embeddings": self.embedding.weight}

    @torch.no_grad()
    def flatten(self) -> None:
        """Leave the network behind, and hold the prompt that it makes."""
        made = self.for_file()["prompt_embeddings"]
        for name in self.network:
            if name in self._modules:
                delattr(self, name)
        old = self.embedding.weight
        self.embedding = nn.Embedding(made.shape[0], made.shape[1], _weight=made.to(old.dtype))

    @property
    def flat(self) -> bool:
        """Whether there is no network."""
        return not any(name in self._modules for name in self.network)

    def check(self, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """The tensors of a file by key; raises RuntimeError for wrong shapes, ValueError for missing tensors."""
        wanted = {k: tuple(v.shape) for k, v in self.for_file().items()}
        missing = [k for k in wanted if k not in state]
        if missing:
            raise ValueError(f"The file of adapter {name!r} lacks {listing(missing)}; it holds {listing(state)}.")
        wrong = [
            f"{k}: {tuple(state[k].shape)} in the file, {s} here" for k, s in wanted.items() if state[k].shape != s
        ]
        if wrong:
            raise RuntimeError(
                f"The prompt of adapter {name!r} does not fit: {'; '.join(wrong)}. It belongs to another number of "
                "virtual tokens, or to another base model."
            )
        return {k: state[k] for k in wanted}

    @torch.no_grad()
    def resume(self, state: dict[str, Tensor], numbers: dict[str, Tensor]) -> bool:
        """Take the numbers of `beside_file` that a run had; False, and nothing taken, if they do not make the file's.

        Arguments:
            state: the tensors of the file, as `check` returns them.
            numbers: as `beside_file` names them.
        """
        held = self.beside_file()
        if not held or {n: v.shape for n, v in numbers.items()} != {n: p.shape for n, p in held.items()}:
            return False
        before = {n: p.detach().clone() for n, p in held.items()}
        for n, p in held.items():
            p.copy_(numbers[n])
        made = self.for_file()
        same = all(torch.allclose(made[k].cpu(), v.to("cpu", made[k].dtype), 1e-3, 1e-4) for k, v in state.items())
        for n, p in held.items() if not same else ():
            p.copy_(before[n])
        return same

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take the tensors of a file, as `check` returns them; a network is left behind."""
        if not self.flat:
            self.flatten()
        for key, held in self.homes().items():
            held.copy_(state[key])


def embedding(rows: int, size: int, start: Tensor | None = None) -> nn.Embedding:
    """A table of virtual tokens, float32; N(0, 1) without `start`."""
    if start is None:
        return nn.Embedding(rows, size, **KIND)
    return nn.Embedding(rows, size, _weight=start.float().clone())
