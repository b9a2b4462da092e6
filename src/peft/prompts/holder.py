"""The prompts of a model: which adapters there are, which one is active, and the modules trained beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.call import BASE, Call
from ..core.layer import tuner_layers
from ..core.wrappers import ModulesToSaveWrapper
from ..errors import PeftWarning, listing, report
from ..registry import tuner_class
from ..types import TaskType
from .encoder import BasePromptEncoder
from .fitting import fit, word_embeddings
from .mixed import Mixed

NO_WEIGHT = "Prompt learning adds tokens, or keys and values, and changes no weight: there is nothing to {}."


class Prompts:
    """What a tuner is for adapted layers: it stands beside the base model, which stays as it is.

    Arguments:
        model: the base model.
    """

    alone = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.peft_config: dict[str, Any] = {}
        self.encoders = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.call = Call()
        self.disabled = False

    # What there is ----------------------------------------------------------------------------------------

    @property
    def words(self) -> nn.Module:
        """The base model's embedding of words."""
        return word_embeddings(self.model)

    @property
    def encoder(self) -> BasePromptEncoder | None:
        """The encoder of the active adapter; None if there is none, or prompts are switched off."""
        if self.disabled or not self.active_adapters:
            return None
        return self.encoders[self.active_adapters[0]]  # type: ignore[return-value]

    def chosen(self, given: dict[str, Any]) -> Any:
        """What makes the prompts of a call: the active encoder, or those that `adapter_names` says; None if none."""
        names = given.get("adapter_names")
        if names is None or self.disabled or all(n == BASE for n in names):
            return self.encoder if names is None else None
        return Mixed(names, self.encoders)  # type: ignore[arg-type]

    # Changing adapters ------------------------------------------------------------------------------------

    def inject_adapter(
        self, model: nn.Module, name: str, undo: list[Callable[[], Any]] | None = None, **options: Any
    ) -> None:
        """Make an adapter's encoder and the copies of whole modules; everything is taken back if that fails."""
        undo = [] if undo is None else undo
        config = self.peft_config[name]
        try:
            fit(self.model, config)
            encoder = tuner_class(config.peft_type).make(config, self.words)
            for p in self.model.parameters():
                if p.requires_grad:
                    p.requires_grad_(False)
                    undo.append(partial(p.requires_grad_, True))
            self._wrap(name, config.modules_to_save or (), undo)
            self.encoders[name] = encoder.to(next(self.words.parameters()).device)
            undo.append(lambda: self.encoders.pop(name))
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        for p in encoder.parameters():
            p.requires_grad_(False)
        if not self.active_adapters:
            self.set_adapter(name, inference_mode=bool(config.inference_mode))

    def _wrap(self, name: str, entries: Sequence[str], undo: list[Callable[[], Any]]) -> None:
        for path, module in list(self.model.named_modules()):
            if not path or not any(path.endswith(e) for e in entries) or ".modules_to_save." in path:
                continue
            parent, _, leaf = path.rpartition(".")
            owner = self.model.get_submodule(parent)
            if isinstance(owner, ModulesToSaveWrapper):
                continue
            if isinstance(module, ModulesToSaveWrapper):
                module.update(name)
                undo.append(partial(module.delete_adapter, name))
                wrapper = module
            else:
                wrapper = ModulesToSaveWrapper(module, name, self.call, path)
                setattr(owner, leaf, wrapper)
                undo.append(partial(setattr, owner, leaf, module))
            wrapper.set_requires_grad(name, False)

    def set_adapter(self, name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one; it is trained unless `inference_mode`."""
        self.active_adapters = [name]
        for other in self.encoders:
            self.set_requires_grad(other, other == name and not inference_mode)
        for _, wrapper in tuner_layers(self.model):
            wrapper.activate((name,), inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or not."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            for p in self.encoders[name].trained():  # type: ignore[operator]
                p.requires_grad_(requires_grad)
            for _, wrapper in tuner_layers(self.model):
                wrapper.set_requires_grad(name, requires_grad)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; if it was active, the first one that is left becomes so."""
        del self.peft_config[name], self.encoders[name]
        for _, wrapper in tuner_layers(self.model):
            wrapper.delete_adapter(name)
        if name not in self.active_adapters:
            return
        self.active_adapters = []
        left = next(iter(self.encoders), None)
        if left is not None:
            text = f"Adapter {name!r} was active and is deleted; {left!r} is active now."
            report(PeftWarning, text, strict=False, stacklevel=4)
            self.set_adapter(left)

    def unload(self) -> nn.Module:
        """The base model without prompts; of whole modules the active copy stays."""
        for path, wrapper in list(tuner_layers(self.model)):
            parent, _, leaf = path.rpartition(".")
            setattr(
                self.model.get_submodule(parent), leaf, wrapper.unload_and_optionally_merge_module(False, False, None)
            )
        return self.model

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """A context without prompts; nests."""
        was, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = was

    def _warn_of_bias(self) -> None:
        """Prompts train no bias."""

    # Running ----------------------------------------------------------------------------------------------

    def run(self, function: Callable[..., Any], labels: str | None, /, *args: Any, **given: Any) -> Any:
        """Call the base model, or its `generate` (`labels` is None), with the active prompt."""
        from . import generating, running

        if labels is not None:
            return running.forward(self, function, args, given, labels)
        return generating.generate(self, function, args, given)

    def completed(self, output: Any) -> Any:
        """The output as it is."""
        return output

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """The active prompt: (batch, tokens, size), or a filled cache of keys and values."""
        from .cache import prefix_cache
        from .inputs import checked_tasks

        encoder: Any = self.encoders[self.active_adapters[0]]
        if encoder.caches:
            return prefix_cache(self.model, encoder, batch_size)
        return encoder.prompt(batch_size, checked_tasks(encoder, task_ids, batch_size))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The prompt as files hold it."""
        return self.for_file(adapter_name)["prompt_embeddings"]

    @property
    def word_embeddings(self) -> nn.Module:
        """The base model's embedding of words."""
        return self.words

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """The numbers of the virtual tokens by adapter."""
        encoders: Any = self.encoders
        return {n: torch.arange(e.rows) for n, e in encoders.items()}

    # What there cannot be ---------------------------------------------------------------------------------

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(NO_WEIGHT.format("merge"))

    merge_adapter = unmerge_adapter = merge_and_unload

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(NO_WEIGHT.format("add up"))

    # Files ------------------------------------------------------------------------------------------------

    def for_file(self, name: str) -> dict[str, Tensor]:
        """The prompt of an adapter by key in files."""
        return self.encoders[name].for_file()  # type: ignore[operator]

    def take(self, state: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """(the tensors that are not the prompt's, what writes the prompt's); raises before anything is written."""
        encoder: Any = self.encoders[name]
        mine = encoder.check(state, name)

        def write() -> None:
            if not encoder.flat:
                text = f"Adapter {name!r} holds the loaded prompt itself now; the network that made it is left behind."
                report(PeftWarning, text, strict=False, stacklevel=5)
            trained = any(p.requires_grad for p in encoder.parameters())
            encoder.load(mine)
            for p in encoder.trained():
                p.requires_grad_(trained)

        return {k: v for k, v in state.items() if k not in mine}, write


def stand_beside(peft_model: Any, model: nn.Module, config: Any, adapter_name: str) -> None:
    """Give a PeftModel its prompts: `base_model` is the user's model, with no tuner in between.

    Raises ValueError without a task type.
    """
    if config.task_type is None:
        raise ValueError(
            f"{type(config).__name__} needs a task_type: it says where the prompt goes and what labels are. Use one of "
            f"{listing(t.value for t in TaskType)}."
        )
    prompts = Prompts(model)
    prompts.peft_config[adapter_name] = config
    prompts.inject_adapter(model, adapter_name)
    peft_model.__dict__["prompts"] = prompts
    peft_model.base_model, peft_model.prompt_encoder = model, prompts.encoders
