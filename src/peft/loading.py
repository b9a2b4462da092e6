"""An adapter on its way from files into a model: looked at first, placed next, read and written last."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .config import PeftConfig
from .core import late, sharded
from .core.base_state import original_modules
from .core.checkpoint import Foreseen, as_it_is, foreseen, open_adapter, poured_into, renamed, set_peft_model_state_dict
from .core.collector import no_collection
from .core.digests import compared
from .core.entries import Entry
from .core.evaluation import evaluate
from .core.files import CONFIG_HASH, Saved, in_hand
from .core.fingerprint import difference, replaced_by
from .core.hub import hub_arguments
from .core.mold import Cast, casts_told
from .core.pour import Pouring, pouring_of
from .core.recall import Recipes, alone, base_of, key_of, recipe_of, usual
from .core.renames import retargeted
from .core.shared import late as drawing_late
from .core.tuner import BaseTuner
from .errors import ChangedConfigWarning, NoMatchingPeftModuleError, OtherBaseWarning, report, told
from .kernels.modes import ordinary
from .known import Content, copied
from .registry import tuner_class

if TYPE_CHECKING:
    from .model import PeftModel

Placed = tuple[Any, Callable[[], Any]]
# Settings of what is made, trained or saved; given tensors compute the same under each.
_OF_TRAINING = frozenset(
    [
        *("r", "inference_mode", "ensure_weight_tying", "save_projection", "target_r", "tfinal", "deltaT"),
        *("beta1", "beta2", "orth_reg_weight"),
    ]
)

_NO_NUMBERS = (
    *("alpha_pattern", "module_config", "loftq_config", "alora_invocation_tokens"),
    *("trainable_token_indices", "token_indices"),
)
_DRAWN = 1 << 26  # bytes that a configuration may ask for beside a small base model


@dataclass
class AdapterFile:
    """The files of one adapter, of which only the heads have been read, and how they are to be loaded.

    Arguments:
        saved: the files.
        name: the adapter's name in the model.
        renames: {regular expression: replacement} for the keys.
        options: `ignore_mismatched_sizes`, `strict`, `torch_device`, `verify_base`.
        base: the base model.
        shared: several processes hold parts of it, and load together.
    """

    saved: Saved
    name: str
    renames: dict[str, str] | None
    options: Mapping[str, Any]
    base: nn.Module
    shared: bool
    autocast: bool = True
    _known: Foreseen | None = None
    _pouring: Pouring | None = None  # what goes where, if the adapter and the file are the usual ones
    _new: bool = False  # the adapter was not there before
    _start: tuple[Any, int] | None = None  # what its recipe is found by, and how much had been reported
    _spread: tuple[Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], ...] = ()  # what methods make of its tensors

    @classmethod
    def of(
        cls, model: nn.Module, model_id: str | os.PathLike[str], name: str, renames: Any, options: Mapping[str, Any]
    ) -> AdapterFile:
        """Look into the files of a folder or repository, to be loaded under `name` into `model`."""
        renames = renames if renames is not None else getattr(model, "_checkpoint_conversion_mapping", None)
        saved = open_adapter(os.fspath(model_id), options.get("strict"), **hub_arguments(options))
        return cls(saved, name, renames or None, options, model, sharded.is_shared(model))

    @property
    def outline(self) -> Mapping[str, Tensor]:
        """The tensors without their numbers, as the model is to see them."""
        return self._seen(self.saved.outline)

    def _seen(self, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = renamed(state, self.renames)
        for spread in self._spread:
            found = spread(found)
        return found

    @no_collection()
    def load(
        self, config: PeftConfig, place: Callable[[bool], Placed], is_trainable: bool, meta: bool
    ) -> tuple[Any, _IncompatibleKeys]:
        """`placed`, then `fill`: the model with the adapter in it, and what `load_adapter` returns."""
        model, undo = self.placed(config, place)
        return model, self.fill(model, undo, is_trainable, meta)

    def placed(self, config: PeftConfig, place: Callable[[bool], Placed]) -> Placed:
        """(the model with the adapter in it, what takes it out again); the adapter's tensors still wait for the file.

        The adapter is made without memory first and held against the file's head. It is made with first values if
        the file does not bring all of them.

        Arguments:
            config: the adapter's configuration.
            place: adds the adapter, on the meta device if told so.
        """
        outline, self._new = self.outline, True
        if config.is_prompt_learning:
            tuner_class(config.peft_type).check_outline(config, outline, self.name)  # type: ignore[arg-type]
        before = copied(config.__dict__)
        self._start = key_of(before, self.autocast), told()
        made: list[Callable[[], Any]] = []
        try:
            with in_hand(outline), casts_told() as casts:
                model, undo, moved = self._outlined(config, place, outline)
                made.append(undo)
                if self._is_poured(model, config, casts):
                    return model, undo
                lacking = self.foresee(model, outline)
                _check_room(lacking, model, outline, self.name)
                if not lacking:
                    complete(model, self.name, lacking)
                    return model, undo
                made.pop()()
                config.__dict__.update({**before, **moved})
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # all has been said the first time
                    self._known = None
                    return place(False)
        except BaseException:
            for step in made:
                step()
            raise

    def _is_poured(self, model: PeftModel, config: PeftConfig, casts: list[Cast]) -> bool:
        """Whether the file holds just what the adapter's molds say."""
        tuner: Any = model._modules.get("base_model")
        if casts and self._kept_by(model) and alone(tuner, config) and not tuner.waiting:
            (header,) = self.saved.heads.values()
            self._pouring = pouring_of(casts, header.tensors) if as_it_is(model, config, self.outline) else None
        return self._pouring is not None

    def _outlined(
        self, config: PeftConfig, place: Callable[[bool], Placed], outline: Mapping[str, Tensor]
    ) -> tuple[Any, Callable[[], Any], dict[str, Any]]:
        """The adapter without memory, and the settings that name its targets anew if they are called otherwise now."""
        try:
            return *_outlined(place), {}
        except NoMatchingPeftModuleError:
            moved = retargeted(self.base, config, outline)
            if not moved:
                raise
            config.__dict__.update(copied(moved))
            return *_outlined(place), moved

    def foresee(self, model: PeftModel, outline: Mapping[str, Tensor] | None = None) -> list[Entry]:
        """The places that the file does not fill; raises what loading would raise of shapes and dtypes."""
        ignore = bool(self.options.get("ignore_mismatched_sizes", False))
        known = foreseen(model, self.outline if outline is None else outline, self.name, ignore)
        self._known = known._replace(fresh=self._new)
        return self._known.lacking

    def fill(self, model: PeftModel, undo: Callable[[], Any], is_trainable: bool, meta: bool) -> _IncompatibleKeys:
        """Read the tensors and write them into the adapter; if that fails, `undo` puts the model back as it was."""
        steps = [undo]
        try:
            if not (is_trainable or self._new):
                steps = [undo, evaluate(model, None)]  # before anything is written
            self._check_base(model, strict := self.options.get("strict"))
            with ordinary(), sharded.as_one(self.shared):
                state = self.saved.read(self.options.get("torch_device"), own=self._new)
            state.update(self.saved.noted(model, self.name))
            if self._pouring is not None:
                result = _IncompatibleKeys([], [])
                poured_into(model, self.name, self._pouring, state)
            else:
                result = set_peft_model_state_dict(
                    model,
                    self._seen(state),
                    adapter_name=self.name,
                    ignore_mismatched_sizes=self.options.get("ignore_mismatched_sizes", False),
                    low_cpu_mem_usage=meta,
                    strict=strict,
                    known=self._known,
                )
            found = self._note(model, result)
            if self._new and not is_trainable:
                evaluate(model, self.name, found)
        except BaseException:
            for step in steps:
                step()
            raise
        return result

    def over(
        self, model: PeftModel, model_id: str | os.PathLike[str], is_trainable: bool, meta: bool
    ) -> _IncompatibleKeys:
        """Write the file over the adapter of its name, which keeps its settings; as for `load_adapter`."""
        kept = model.peft_config[self.name]
        try:
            own = PeftConfig.from_pretrained(model_id, **hub_arguments(self.options))
        except ValueError:
            own = None  # no configuration lies beside the weights, which suffice to fill an adapter that is there
        companions = getattr(model._tuner, "companions", {}).values() if type(own) is type(kept) else ()
        self._spread = tuple(partial(c.spread, self.name, own) for c in companions)
        self.foresee(model)
        if own is not None:
            self._check_settings(model_id, own, kept)
        result = self.fill(model, lambda: None, is_trainable, meta)
        for companion in companions:
            companion.taken_over(self.name, own)
        return result

    def like_another(self, model: PeftModel, config: PeftConfig, is_trainable: bool) -> _IncompatibleKeys | None:
        """The whole of a load, where an adapter like this one has been loaded before; None otherwise.

        Arguments:
            model: the model.
            config: the adapter's configuration.
            is_trainable: as for `load_adapter`.
        """
        tuner: Any = model._modules.get("base_model")
        recipes = self._kept_by(model) and tuner.__dict__.get("_recipes")
        if not recipes or not usual(tuner, config):
            return None
        (header,), key = self.saved.heads.values(), key_of(config.__dict__, self.autocast)
        recipe = next((r for r in recipes if r.fits(key, header, self.name)), None)
        if recipe is None:
            return None
        model._admit(self.name, config)
        tuner.peft_config[self.name], undo = config, list[Callable[[], Any]]()
        try:
            if base_of(header) != recipe.base or self.options.get("verify_base"):
                self._check_base(model, self.options.get("strict"))
            with ordinary():
                made = recipe.made(self.saved.read(self.options.get("torch_device"), own=True))
                undo.append(partial(recipe.take_out, self.name))
                recipe.place(tuner, self.name, config, made, is_trainable)
            tuner._join(tuner.kind_of(config).companion, self.name, undo)
            quiet = not (model.training or tuner.training or tuner.modes_differ) and recipe.evaluating()
            if is_trainable:
                tuner.modes_differ = True
            elif not quiet:
                evaluate(model, None)
        except BaseException:
            for step in reversed(undo):
                step()
            tuner.peft_config.pop(self.name)
            raise
        return _IncompatibleKeys([], [])

    def _kept_by(self, model: PeftModel) -> bool:
        """Whether the model's tuner may keep recipes for files like this one."""
        apart = self.renames or self.options.get("ignore_mismatched_sizes") or len(self.saved.heads) != 1
        return not apart and "base_model" in model._modules and "prompts" not in model.__dict__

    def _note(self, model: PeftModel, result: _IncompatibleKeys) -> list[nn.Module] | None:
        """Keep what has been worked out, if nothing had to be said and every tensor has found its place.

        Returns the modules of the model, adapters' aside, if that has found them.
        """
        known, tuner = self._known, model._modules.get("base_model")
        places = list(known.keys.values()) if known is not None and known.keys and not any(result) else []
        whole = self._pouring is not None or (known is not None and 0 < len(places) == len(known.places))
        if (
            whole
            and tuner is not None
            and self._start is not None
            and told() == self._start[1]
            and self._kept_by(model)
        ):
            (header,) = self.saved.heads.values()
            recipe = recipe_of(tuner, self.name, self._start[0], header, places, self._pouring)
            if recipe is not None:
                Recipes.of(tuner).note(recipe)
                alone = len(model._modules) == len(tuner._modules) == 1
                return [model, tuner, *recipe.standing.modules] if alone else None
        return None

    def _check_base(self, model: PeftModel, strict: bool | None) -> None:
        replaced = replaced_by(model.peft_config[self.name])
        lines, unknown = difference(self.saved.metadata, model, replaced), ""
        if not lines:
            lines, unknown = compared(self.saved.metadata, model, replaced, self.options.get("verify_base"))
        if lines:
            shown = "\n".join(f"  {line}" for line in lines[:8]) + (f"\n  and {len(lines) - 8} more" * (len(lines) > 8))
            kind = type(model.get_base_model()).__name__
            text = (
                f"Adapter {self.name!r} was saved from another base model than this {kind}; its tensors fit, but it "
                f"may be useless here. These parameters differ:\n{shown}"
            )
            report(OtherBaseWarning, text, strict, stacklevel=5)
        if unknown:
            text = f"Whether adapter {self.name!r} was saved from this base model is not known: {unknown}."
            report(OtherBaseWarning, text, strict, stacklevel=5)

    def check_config(self, read: tuple[str, Content] | None) -> None:
        """Warn if the configuration beside the weights, its path and content, is not the one of their save."""
        noted, (path, content) = self.saved.metadata.get(CONFIG_HASH), read or ("", Content())
        if read is not None and noted is not None and content.hash != noted:
            text = (
                f"{path} is not the configuration that was saved with the weights beside it: it has been edited since, "
                "damaged, or comes from another save. The adapter may compute something else than it did."
            )
            report(ChangedConfigWarning, text, self.options.get("strict"), stacklevel=4)

    def _check_settings(self, model_id: str | os.PathLike[str], own: PeftConfig, kept: PeftConfig) -> None:
        """Warn if the tensors were trained with other settings than the adapter has that they are written into."""
        values = [(n, getattr(own, n, None), getattr(kept, n, None)) for n in _settings(kept)]
        values += _starts(own, kept)
        other = [f"{n}={a!r} instead of {b!r}" for n, a, b in values if (a or b) and not _same(a, b)]
        if other:
            text = (
                f"The weights of {os.fspath(model_id)} were saved with {', '.join(other)} of adapter {self.name!r}, "
                "which takes them and keeps its own settings: it may compute something else than it did when it was "
                "saved. Load it under a new name, or delete_adapter first, to have its settings too."
            )
            report(ChangedConfigWarning, text, self.options.get("strict"), stacklevel=4)


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same; of a table's patterns the first that matches counts."""
    return bool(one == other) and (not isinstance(one, dict) or list(one) == list(other))


def _settings(config: PeftConfig) -> list[str]:
    """The fields that change what given tensors compute, as far as the tensors' names and shapes do not tell."""
    found = ["peft_type", *(n for n in _NO_NUMBERS if hasattr(config, n))]
    for field in dataclasses.fields(config):
        of_numbers = isinstance(field.default, (bool, int, float)) and field.name not in _OF_TRAINING
        if of_numbers and "init" not in field.name and "dropout" not in field.name:
            found.append(field.name)
    return found


def _starts(*both: PeftConfig) -> list[tuple[str, Any, Any]]:
    """The fields for first values, where one of two configurations states a start that counts from then on."""
    found = []
    for name, words in both[1].counts.items():
        a, b = (getattr(c, name, None) for c in both)
        if any(isinstance(v, str) and v.startswith(words) for v in (a, b)):
            found.append((name, a, b))
    return found


def complete(model: PeftModel, name: str, lacking: list[Entry]) -> None:
    """Make what no file holds of an adapter; it is asked for once the file is known to fit."""
    if isinstance(tuner := model._modules.get("base_model"), BaseTuner):
        with ordinary():
            late.complete(tuner, name, {(id(e.owner), e.attr) for e in lacking})


def _outlined(place: Callable[[bool], Placed]) -> Placed:
    """The adapter without memory; raises ValueError for sizes that torch cannot even count."""
    try:
        with drawing_late():
            return place(True)
    except (RuntimeError, OverflowError) as error:
        if not any(text in str(error).lower() for text in ("overflow", "can't allocate")):
            raise
        raise ValueError(f"The configuration asks for tensors that no machine can hold: {error}") from error


def _check_room(lacking: list[Entry], model: PeftModel, outline: Mapping[str, Tensor], name: str) -> None:
    """Refuse a configuration that asks for far more memory than the file holds: a base model's worth is allowed."""
    tuner = model._modules.get("base_model")
    drawn = late.awaited(tuner, name) if isinstance(tuner, BaseTuner) else 0
    if not lacking and drawn <= _DRAWN:
        return
    wanted = sum(e.tensor.numel() * e.tensor.element_size() for e in lacking)
    base = (p for _, m in original_modules(model) for p in m._parameters.values() if p is not None)
    held = sum(t.numel() * t.element_size() for t in (*base, *outline.values()))
    if wanted > held:
        largest = max(lacking, key=lambda e: e.tensor.numel())
        raise ValueError(
            f"The configuration asks for {wanted} bytes of tensors that the file does not hold, such as {largest.key} "
            f"of shape {tuple(largest.tensor.shape)}; that is more than the base model has. Nothing was loaded: one of "
            "the two files belongs to another adapter."
        )
    if drawn > max(held, _DRAWN):
        raise ValueError(
            f"The configuration asks for {drawn} bytes that are drawn from its seed, which is more than the base model "
            "has. Nothing was loaded: look at the rank and the other sizes in adapter_config.json."
        )
