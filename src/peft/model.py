"""PeftModel: a model with adapters, by name.

The tree is `PeftModel.base_model` (the tuner) `.model` (the user's model, changed in place), so parameter names start
with `base_model.model.`. Which adapters exist, are active and are trainable is known by the tuner alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from .config import PeftConfig, check_config
from .core import sharded
from .core.call import BASE, first_tensor
from .core.combined import convertible
from .core.embeddings import recorded_vocabulary
from .core.layer import tuner_layers
from .core.snapshot import Undo, placing, snapshot
from .core.state import adapter_parameters, disabled, warn_of_idle_training
from .errors import WrongKindError, check_adapters, listing, nearest
from .names import check_adapter_name, warn_about_name
from .persist import Persistent
from .registry import tuner_class
from .status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status
from .types import plain

CHECKPOINTING = ("gradient_checkpointing_enable", "activation_checkpointing_enable")  # of transformers
INPUTS = ("enable_input_require_grads", "get_input_embeddings")
SPECIAL_ARGUMENTS = frozenset({"adapter_names", "alora_offsets", "task_ids"})


class PeftModel(Persistent, nn.Module):
    """A base model with named adapters.

    Arguments:
        model: the base model; its targeted layers are replaced in place.
        peft_config: the configuration of the first adapter.
        adapter_name: its name, without a dot.
        autocast_adapter_dtype: keep half-precision adapter parameters in float32.
        low_cpu_mem_usage: make the adapter's parameters on the meta device (weights are loaded next).
    """

    head_names: tuple[str, ...] = ()  # modules of the task's head, trained and saved with every adapter

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        check_adapter_name(adapter_name)
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = set(SPECIAL_ARGUMENTS)
        self._input_gradients = False
        self._check_model(model)
        self._add_heads(peft_config)
        self._recorded_vocab = recorded_vocabulary(model, peft_config.base_model_name_or_path)
        if peft_config.is_prompt_learning:
            from .prompts.standing import first_prompt

            return first_prompt(self, model, peft_config, adapter_name)
        tuner = tuner_class(peft_config.peft_type)  # type: ignore[arg-type]
        with placing(model) as undo:
            made = low_cpu_mem_usage, None, autocast_adapter_dtype, undo
            self.base_model = tuner(model, {adapter_name: peft_config}, adapter_name, *made)
            self._prepare(model, undo)

    def _prepare(self, model: nn.Module, undo: Undo) -> None:
        """Set the base model up for layers that are trained in it; `undo` receives what takes that back."""
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1  # type: ignore[union-attr]
        if _checkpoints(model) and any(hasattr(model, name) for name in INPUTS):
            undo.append(snapshot(model))  # which of its modules get hooks is known to the model alone
            self.prepare_model_for_gradient_checkpointing(model)

    @property
    def _tuner(self) -> Any:
        prompts = self.__dict__.get("prompts")
        return self._modules["base_model"] if prompts is None or not prompts.alone else prompts

    def _check_model(self, model: nn.Module) -> None:
        """What a task asks of the model; nothing here."""

    def _add_heads(self, config: PeftConfig) -> None:
        if not self.head_names or not hasattr(config, "modules_to_save"):
            return
        given = list(config.modules_to_save or ())
        config.modules_to_save = given + [n for n in self.head_names if n not in given]

    # What there is ----------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configurations by adapter name."""
        return self._tuner.peft_config

    @peft_config.setter
    def peft_config(self, configs: dict[str, PeftConfig]) -> None:
        """Also how a PeftModel that is put around this one shares its configurations."""
        tuner = self._tuner
        tuner.peft_config = configs
        if "peft_config" in getattr(tuner, "model", self).__dict__:
            tuner.model.peft_config = configs

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self._tuner.active_adapters)

    @property
    def active_adapter(self) -> str | None:
        """The name of the (first) active adapter; None if there is none."""
        return next(iter(self._tuner.active_adapters), None)

    @active_adapter.setter
    def active_adapter(self, adapter_name: str) -> None:
        self.set_adapter(adapter_name)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the (first) active adapter."""
        if self.active_adapter is None:
            raise ValueError("No adapter is active. Add one with `add_adapter`, or choose one with `set_adapter`.")
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that some adapter trains as a whole, or None."""
        named = [getattr(c, "modules_to_save", None) for c in self.peft_config.values()]
        return set().union(*filter(None, named)) or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a forward pass uses some adapter now."""
        names = set(self._tuner.active_adapters)
        layers = (layer for _, layer in tuner_layers(self))
        return any(not layer.disable_adapters and names & set(layer.active_adapters) for layer in layers)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype of the base model."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The user's model, with its targeted layers replaced."""
        return self._tuner.model

    def adapter_parameters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by their names in this model; an optimizer for it takes their values."""
        check_adapters([adapter_name], self.peft_config)
        return adapter_parameters(self, adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer of the adapter can be written as a LoRA."""
        check_adapters([adapter_name], self.peft_config)
        return convertible(self.base_model, adapter_name)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every adapted layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the model: counts, active and merged adapters, irregularities."""
        return get_model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of trainable and of all parameters (adapters included, shared ones once)."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters, and their ratio in per cent."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def __getattr__(self, name: str) -> Any:
        """Everything else is asked of the tuner, and through it of the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or (name.startswith("__") and name.endswith("__")):
                raise
        if name in sharded.WRITES:
            sharded.lent_back(self)
        prompts = self.__dict__.get("prompts")
        shows = prompts is not None and prompts.shows(name)
        found = getattr(prompts if shows else self.base_model, name)
        return self._with_input_gradients(found) if name in CHECKPOINTING else found

    # Running ----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model. `adapter_names` gives each sample its own adapter ("__base__": none)."""
        return self._tuner.completed(self._run(self.get_base_model(), args, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base model; `adapter_names` as in `forward`."""
        model, kwargs = self.get_base_model(), {**kwargs, **getattr(self._tuner, "generating", {})}
        sources = (kwargs, kwargs.get("generation_config"), getattr(model, "generation_config", None))
        beams = [setting(sources, key) or 1 for key in ("num_beams", "num_return_sequences")]
        return self._run(model.generate, args, kwargs, beams=max(beams))

    def _run(self, function: Any, args: tuple, kwargs: dict[str, Any], beams: int | None = None) -> Any:
        """Call the base model without the arguments that are ours; the call's record is restored in any case."""
        prompts = self.__dict__.get("prompts")
        if prompts is not None and not (beams or args) and (whole := prompts.straight(kwargs)) is not None:
            return function(**whole)
        given = names, _, _ = [kwargs.get(k) for k in ("adapter_names", "task_ids", "alora_offsets")]
        if prompts is None:
            kwargs = {k: v for k, v in kwargs.items() if k not in self.special_peft_forward_args}
        else:
            function = functools.partial(prompts.run, function, beams is not None)
        tuner = self._tuner
        if prompts is None and all(v is None for v in given):
            compiling = torch.compiler.is_compiling()
            # after a mixed batch others are told apart from it, for the backward pass
            usual = compiling or tuner.call.plain or not torch.is_grad_enabled()
            if usual and (compiling or not tuner.hooks):
                return function(*args, **kwargs)
            if usual:
                with tuner.call.alone():  # hooks write into the record
                    return function(*args, **kwargs)
        first = first_tensor(args, kwargs)
        if names is not None:
            self._check_names(names, first, tuner)
        with tuner.call.of(first, beams, *given):
            return function(*args, **kwargs)

    def _check_names(self, names: Any, first: torch.Tensor | None, tuner: Any) -> None:
        if not isinstance(names, (list, tuple)):
            raise WrongKindError(f"adapter_names must be a list, a name per sample, but is {type(names).__name__}.")
        if first is not None and first.shape[0] != len(names):
            raise ValueError(
                f"adapter_names has {len(names)} entries, but the batch has {first.shape[0]} samples. Pass one name "
                f"per sample ({BASE!r} for none)."
            )
        known = tuner.peft_config
        unknown = [n for n in dict.fromkeys(names) if n != BASE and n not in known]
        if unknown:
            raise ValueError(
                "adapter_names holds unknown names: "
                f"{listing(map(str, unknown))}.{nearest(str(unknown[0]), self.peft_config)} Existing adapters: "
                f"{listing(self.peft_config)}, and {BASE!r}."
            )
        if tuner.call.merged and any(layer.merged_adapters for _, layer in tuner_layers(self.base_model)):
            raise ValueError("adapter_names cannot be used while adapters are merged. Call `unmerge_adapter()` first.")

    def disable_adapter(self) -> AbstractContextManager[None]:
        """A context in which the model is the base model; nests, and restores the state exactly on leaving it."""
        return self._disabled()

    @contextmanager
    def _disabled(self) -> Iterator[None]:
        self._tuner._warn_of_bias()
        with disabled(self):
            yield

    # Changing adapters ------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter, inactive and not trainable; the model is unchanged if that fails.

        Arguments:
            adapter_name: a new name without a dot.
            peft_config: its configuration; it may be of another method than the first.
            low_cpu_mem_usage: make its parameters on the meta device.
            autocast_adapter_dtype: keep half-precision adapter parameters in float32.
        """
        self._add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, [])

    def _add_adapter(self, adapter_name: str, peft_config: PeftConfig, meta: bool, autocast: bool, undo: list) -> None:
        """`add_adapter`; `undo` receives the steps that take it back."""
        self._admit(adapter_name, peft_config)
        undo.append(lambda: self._tuner.peft_config.pop(adapter_name, None))
        try:
            self._tuner.peft_config[adapter_name] = peft_config
            self._place(adapter_name, peft_config, meta, autocast, undo)
        except BaseException:
            self._tuner.peft_config.pop(adapter_name, None)
            raise

    def _admit(self, adapter_name: str, peft_config: PeftConfig) -> None:
        """Check a new adapter's name and method; the task's head becomes a part of its configuration."""
        check_adapter_name(adapter_name)
        check_config(peft_config)
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name {adapter_name!r} already exists. Delete it first, or take another.")
        self._check_mix(adapter_name, peft_config)
        warn_about_name(adapter_name, peft_config)
        self._add_heads(peft_config)

    def _place(self, name: str, config: PeftConfig, meta: bool, autocast: bool, undo: list) -> None:
        """Put an adapter into the tuner, or where it stands in a model with prompts."""
        if config.is_prompt_learning or "prompts" in self.__dict__:
            from .prompts.standing import place

            return place(self, name, autocast, meta, undo)
        tuner: Any = self.base_model
        tuner.inject_adapter(tuner.model, name, autocast_adapter_dtype=autocast, low_cpu_mem_usage=meta, undo=undo)

    def _check_mix(self, adapter_name: str, peft_config: PeftConfig) -> None:
        """Raise ValueError for a method that cannot stand beside the model's others."""
        there = list(dict.fromkeys([c.peft_type for c in self.peft_config.values()]))
        kinds = {t: tuner_class(t) for t in (peft_config.peft_type, *there)}  # type: ignore[arg-type]
        alone = next((k for k in kinds.values() if getattr(k, "alone", False)), None) if len(kinds) > 1 else None
        if alone is not None:
            raise ValueError(
                f"Adapter {adapter_name!r} is {plain(peft_config.peft_type)}, but the model has adapters of the "
                f"methods {listing(map(plain, there))}, and {alone.__name__} takes adapters of its own method only."
            )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one; its parameters become trainable unless `inference_mode`.

        A model with prompts takes several names too.
        """
        if "prompts" in self.__dict__ and isinstance(adapter_name, (list, tuple)):
            return self._tuner.set_adapter(adapter_name, inference_mode=inference_mode)
        if not isinstance(adapter_name, str):
            raise WrongKindError(
                f"set_adapter takes one name, but got {type(adapter_name).__name__}. For several active adapters use "
                "`model.base_model.set_adapter([...])`."
            )
        check_adapters([adapter_name], self.peft_config)
        self._tuner.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or not, whether or not they are active."""
        self._tuner.set_requires_grad(adapter_names, requires_grad=requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. After the last one the model behaves as the base model."""
        check_adapters([adapter_name], self.peft_config)
        self._tuner.delete_adapter(adapter_name)

    # Gradient checkpointing -------------------------------------------------------------------------------

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients flow through checkpointed layers below which everything is frozen.

        Arguments:
            model: the base model. Quantised models are left to `prepare_model_for_kbit_training`.
        """
        flags = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        if self._input_gradients or any(getattr(model, flag, False) for flag in flags):
            return model
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(_require_gradient)  # type: ignore[operator]
        self._input_gradients = True
        return model

    def _with_input_gradients(self, enable: Any) -> Any:
        """The base model's switch for checkpointing, followed by what frozen inputs need with it."""

        @functools.wraps(enable)
        def switch(*args: Any, **kwargs: Any) -> Any:
            result = enable(*args, **kwargs)
            warn_of_idle_training(self)
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, dict)]
            if all(v.get("use_reentrant", True) for v in given):
                self.prepare_model_for_gradient_checkpointing(self.get_base_model())
            return result

        return switch


def _checkpoints(model: nn.Module) -> bool:
    """Whether the model says that it checkpoints, under the newer or the older name; True if it does not say."""
    known = hasattr(type(model), "is_activation_checkpointing")
    return bool(getattr(model, "is_activation_checkpointing" if known else "is_gradient_checkpointing", True))


def _require_gradient(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def setting(sources: Sequence[Any], key: str) -> Any:
    """The first of the sources, dictionaries or objects, that sets a key."""
    found = (s.get(key) if isinstance(s, dict) else getattr(s, key, None) for s in sources)
    return next((v for v in found if v), None)
