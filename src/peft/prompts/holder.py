"""The prompts of a model, with or without a tuner around it, and the modules trained beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core import sharded
from ..core import unload as unloading
from ..core.call import Call
from ..core.draw import check_numbers
from ..core.layer import tuner_layers
from ..core.onload import onload_layer
from ..core.shared import is_late
from ..core.switch import Switching
from ..core.tie import places
from ..core.whole import Placing
from ..errors import NothingToDoError, PeftWarning, UnknownNameError, check_adapters, listing, report
from ..kernels.modes import ordinary
from ..registry import tuner_class
from ..types import TaskType
from .checkpointed import Survivor
from .encoders import NO_WEIGHT, Encoders
from .fitting import fit, further_words, word_embeddings
from .joined import Chosen, active, of_samples
from .resuming import PREFIX, noted_in
from .straight import straight

SHOWN = frozenset({"get_prompt", "get_prompt_embedding_to_save", "prompt_tokens", "word_embeddings"})
ALONE = frozenset({"merge_adapter", "unmerge_adapter", "merge_and_unload", "add_weighted_adapter", "unload"})
ALONE |= {"enable_adapter_layers", "disable_adapter_layers"}
LABELS = {"CAUSAL_LM": "tokens", "TOKEN_CLS": "tokens", "SEQ_2_SEQ_LM": "decoder"}


class Beside(Placing):
    """A prompt on its way into a model.

    Arguments:
        prompts: of the model.
        name: the adapter's name.
        undo: receives what takes each step back.
    """

    def __init__(self, prompts: Prompts, name: str, undo: list[Callable[[], Any]]) -> None:
        self.tuner, self.model, self.name, self.undo = prompts, prompts.model, name, undo
        self.places = places(prompts.model)

    def run(self) -> None:
        """Everything, in order: the encoder and the copies of whole modules."""
        prompts, name, config = self.tuner, self.name, self.tuner.peft_config[self.name]
        _check_task(config)
        fit(self.model, config)
        drawn_for_nothing = torch.random.fork_rng(devices=[], enabled=is_late())  # the file brings what they begin with
        with onload_layer(prompts.words, write=False), drawn_for_nothing:
            place = next(prompts.words.parameters()).device
            encoder = tuner_class(config.peft_type).make(config, prompts.words)
            if place.type != "meta":
                check_numbers(encoder, path=f"the adapter {name!r}")
            if any(p.device != place for p in encoder.parameters()):  # fake ones cannot be moved, even there
                encoder.to(place)
        if prompts.alone:
            self._freeze()
        self.whole_modules(config.modules_to_save or ())
        prompts.encoders[name] = encoder
        self.undo.append(partial(prompts.encoders.delete_adapter, name))
        for p in encoder.parameters():
            p.requires_grad_(False)


class Prompts(Switching):
    """What a tuner is for adapted layers: it stands beside the base model, which stays as it is.

    Where there is a tuner too, that one speaks for all adapters, and this one only makes prompts.

    Arguments:
        model: the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.peft_config: dict[str, Any] = {}
        self.encoders = Encoders()
        self.active_adapter: str | list[str] = []
        self.call = Call()
        self.alone = True  # without a tuner
        self.survivor: Survivor | None = None
        self.further = further_words(model)  # of which each layer reads one, beside the words
        self.way: tuple[type | None, tuple[str, ...]] = (None, ())  # down to the words, where it is known to stay

    # What there is ----------------------------------------------------------------------------------------

    @property
    def words(self) -> nn.Module:
        """The base model's embedding of words."""
        return word_embeddings(self.model)

    def shows(self, name: str) -> bool:
        """Whether a PeftModel's attribute of that name is this one's."""
        return name in SHOWN or (self.alone and name in ALONE)

    def chosen(self, given: dict[str, Any]) -> Chosen:
        """What makes the prompts of a call: the active encoders, or those that `adapter_names` says."""
        names = given.get("adapter_names")
        if self.encoders.disable_adapters:
            return Chosen()
        of: Any = self.encoders
        return active(of.active_adapters, of) if names is None else of_samples(names, of)

    def labels(self) -> str:
        """What `labels` are: of "tokens" of the text, of the "decoder", or of a "sample"."""
        names = self.encoders.active_adapters or list(self.encoders)
        return LABELS.get(self.peft_config[names[0]].task_type, "sample")

    def layers(self) -> Iterator[tuple[str, Any]]:
        """(path, layer) of the encoders and the wrappers of whole modules."""
        yield from tuner_layers(self.model)
        yield "prompt_encoder", self.encoders

    # Changing adapters ------------------------------------------------------------------------------------

    def inject_adapter(
        self, model: nn.Module, name: str, undo: list[Callable[[], Any]] | None = None, **options: Any
    ) -> None:
        """Make an adapter's encoder and the copies of whole modules; everything is taken back if that fails."""
        undo = [] if undo is None else undo
        try:
            with sharded.drawing_alike(model), ordinary():
                Beside(self, name, undo).run()
        except BaseException:
            for step in reversed(undo):
                step()
            raise

    def unload(self) -> nn.Module:
        """The base model without prompts; of whole modules the active copy stays."""
        if self.survivor is not None:
            self.survivor.leave()
        return unloading.unload(self, False, None)

    # Running ----------------------------------------------------------------------------------------------

    straight = straight

    def run(self, function: Callable[..., Any], generates: bool, /, *args: Any, **given: Any) -> Any:
        """Call the base model, or its `generate`, with the prompts of the call."""
        if generates:
            from .generating import generate

            return generate(self, function, args, given)
        from .running import forward

        return forward(self, function, args, given)

    def completed(self, output: Any) -> Any:
        """The output as it is."""
        return output

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """The active prompt: (batch, tokens, size), or a filled cache of keys and values.

        Raises ValueError if there is none, or both kinds are.
        """
        from .cache import prefix_cache
        from .inputs import checked_tasks

        front, cached = active(self.encoders.active_adapters, self.encoders)  # type: ignore[arg-type]
        if (front is None) == (cached is None):
            count = "no prompt is" if front is None else "tokens in front and keys and values are both"
            raise ValueError(
                f"get_prompt returns the active prompt, but {count} active. Activate one with set_adapter."
            )
        if cached is not None:
            return prefix_cache(self.model, cached, batch_size)
        return front.prompt(batch_size, checked_tasks(front, task_ids, batch_size))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The prompt as files hold it."""
        check_adapters([adapter_name], self.peft_config)
        return self.for_file(adapter_name)["prompt_embeddings"]

    @property
    def word_embeddings(self) -> nn.Module:
        """The base model's embedding of words."""
        return self.words

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """The numbers of the virtual tokens by adapter."""
        encoders: Any = self.encoders
        return {n: torch.arange(e.rows, device="cpu") for n, e in encoders.items()}

    # What there cannot be ---------------------------------------------------------------------------------

    @property
    def merge_and_unload(self) -> Any:
        """Raises NothingToDoError, so that clients which ask whether there is such a method find none."""
        raise NothingToDoError(NO_WEIGHT.format("merge"))

    merge_adapter = unmerge_adapter = merge_and_unload

    @property
    def add_weighted_adapter(self) -> Any:
        """Raises NothingToDoError, likewise."""
        raise NothingToDoError(NO_WEIGHT.format("add up"))

    # Files ------------------------------------------------------------------------------------------------

    def for_file(self, name: str, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The prompt of an adapter by key in files; nothing for adapters of layers.

        Arguments:
            name: the adapter.
            given: the full state by live name; what it holds of the encoder is taken, and no other process asked.
        """
        encoder: Any = self.encoders._modules.get(name)
        if encoder is None:
            return {}
        with sharded.whole(encoder.modules()) if not given else sharded.with_values(encoder, _of(given, name)):
            found: dict[str, Tensor] = encoder.for_file()
        return found

    def take(self, state: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], Callable[[], None] | None]:
        """(the tensors that are not the prompt's, what writes the prompt's); raises before anything is written."""
        if name not in self.encoders:
            return state, None
        encoder: Any = self.encoders[name]
        with sharded.whole(encoder.modules()):
            mine = encoder.check(state, name)
        numbers = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
        if not (encoder.flat or numbers) and sharded.is_shared(encoder):
            raise ValueError(
                f"A file holds the prompt itself, and the network that makes the prompt of adapter {name!r} is spread "
                "over processes already, so it cannot be left behind. Load the adapter before fully_shard is called."
            )

        def write() -> None:
            with sharded.whole(encoder.modules(), sharded.names(encoder.modules())):
                put()

        def put() -> None:
            if encoder.resume(mine, numbers):
                return
            if not encoder.flat:
                text = f"Adapter {name!r} holds the loaded prompt itself now; the network that made it is left behind."
                report(PeftWarning, text, strict=False, stacklevel=5)
            trained = any(p.requires_grad for p in encoder.parameters())
            encoder.load(mine)
            for p in encoder.trained():
                p.requires_grad_(trained)

        return {k: v for k, v in state.items() if k not in mine and not k.startswith(PREFIX)}, write

    def noted(self, name: str, folder: str | os.PathLike[str]) -> dict[str, Tensor]:
        """What training of an adapter has left in a folder beside its file, if the adapter has a place for it."""
        encoder: Any = self.encoders._modules.get(name)
        if encoder is None or not encoder.beside_file():
            return {}
        return noted_in(folder) or noted_in(os.path.dirname(os.path.abspath(folder)))  # beside folders of adapters


def _of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a model's state holds of the encoder of an adapter, by name in it."""
    parts = ((key.rpartition(f"prompt_encoder.{name}."), value) for key, value in state.items())
    return {leaf: value for (_, found, leaf), value in parts if found}


def _check_task(config: Any) -> None:
    if config.task_type is None:
        raise UnknownNameError(
            f"{type(config).__name__} needs a task_type: it says where the prompt goes and what labels are. Use one of "
            f"{listing(t.value for t in TaskType)}."
        )
