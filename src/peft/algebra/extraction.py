"""A LoRA of what fine-tuning has changed: from the difference of two models."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checkpoint import walk
from ..core.layer import tuner_layers
from ..core.tie import plain_path
from ..core.views import supported
from ..core.wrappers import ModulesToSaveWrapper
from ..errors import PeftWarning, listing, nearest
from ..methods.lora.config import LoraConfig
from ..methods.lora.model import LoraModel
from .conversion import Conversion, check_rank, lora_of
from .factors import Pair
from .update import Update, updates

NAME = "default"
SELECTS = (
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "task_type", "base_model_name_or_path", "revision"),
)


@dataclass
class Change(Update):
    """What fine-tuning has added to one layer.

    Arguments:
        p: a placeholder that stands in the layer, on the meta device.
        before, after: the layer in the two models.
    """

    before: Any = None
    after: Any = None

    @property
    def inner_factors(self) -> Pair | None:
        return None

    @torch.no_grad()
    def dense(self, inside: bool = False) -> Tensor:
        W0, W1 = (self.p.layer.view.read(m) for m in (self.before, self.after))
        dtype = torch.promote_types(torch.promote_types(W0.dtype, W1.dtype), torch.float32)
        return self.form.wide(W1.to(W0.device, dtype) - W0.to(dtype))

    @torch.no_grad()
    def bias(self) -> Tensor | None:
        b0, b1 = (self.p.layer.view.bias(m) for m in (self.before, self.after))
        if b0 is None or b1 is None or torch.equal(b0, b1.to(b0)):
            return None
        return b1.to(b0.device, torch.float32) - b0.float()


@torch.no_grad()
def extract(
    base: nn.Module,
    tuned: nn.Module,
    rank: float,
    config: LoraConfig | None = None,
    modules_to_save: bool = False,
    progressbar: bool = False,
) -> Conversion:
    """The LoRA that turns one model into another of the same architecture, as nearly as its rank allows.

    Large matrices are decomposed by random projections. Both models stay as they are.

    Arguments:
        base: the model that the adapter will be put on.
        tuned: the fine-tuned model.
        rank: the rank of every layer, a whole number (less where a matrix has less); or the share of the squared norm
            of each layer's change to keep, in (0, 1], for ranks that differ.
        config: which modules become targets, by the same fields as for training; its ranks do not count. None: every
            linear layer, convolution, embedding, attention, and matrix or stack of matrices that has changed.
        modules_to_save: keep whole copies of the other modules that have changed, such as norms; otherwise they are
            named in a warning and in the report.
        progressbar: show progress.

    Returns the configuration, the tensors, and a report with the error of each layer; `save_pretrained` writes it.
    Raises ValueError if the models have other tensors or shapes, are the same, or hold adapters.
    """
    check_rank(rank)
    changed = _changed(base, tuned)
    wanted = _selection(base, changed, config)
    if modules_to_save:
        wanted.modules_to_save = [*(wanted.modules_to_save or ()), *_whole(base, wanted, changed)] or None
    holder = _placed(base, wanted)
    tuner: Any = holder.base_model
    layers: dict[str, list[Update]] = {
        path: [_change(u, base, tuned, tuner.model)] for path, (u,) in updates(holder, {NAME: 1.0}).items()
    }
    names = {path: _names(u, tuner.model) for path, (u,) in layers.items()}
    covered = {name for found in names.values() for name in found}
    kept = {path: found for path, found in layers.items() if changed.keys() & set(names[path])}
    new = lora_of(tuner.model, tuner.peft_config[NAME], rank, kept, progressbar, at_most=True)
    state, saved = _copies(holder, tuned)
    if not new.state and not state:
        raise ValueError("None of the tensors that have changed is one that the configuration selects.")
    for name, value in changed.items():
        if name not in covered and name not in saved:
            new.report.others[name] = value
    _tell(new)
    return new._replace(state={**new.state, **state})


def _changed(base: nn.Module, tuned: nn.Module) -> dict[str, float]:
    """{name of a tensor that is not the same: the norm of its change over its own}."""
    for model, what in ((base, "base"), (tuned, "tuned")):
        if any(True for _ in tuner_layers(model)):
            raise ValueError(f"The model given as {what!r} holds adapters. Call merge_and_unload() or unload() first.")
    one, two = ({**m.state_dict(keep_vars=True)} for m in (base, tuned))
    for a, b, what in ((one, two, "tuned"), (two, one, "base")):
        missing = [n for n in a if n not in b]
        if missing:
            raise ValueError(
                f"The model given as {what!r} lacks {listing(missing)}.{nearest(missing[0], b)} Both must have the "
                "same architecture."
            )
    shapes = [n for n in one if one[n].shape != two[n].shape]
    if shapes:
        n = shapes[0]
        raise ValueError(
            f"{listing(shapes)} differ in shape: {n} is {tuple(one[n].shape)} in the base model and "
            f"{tuple(two[n].shape)} in the tuned one. Resize the base model's embeddings first, if tokens were added."
        )
    found = {n: _relative(one[n].detach(), two[n].detach()) for n in one}
    found = {n: value for n, value in found.items() if value}
    if not found:
        raise ValueError("The two models are the same: there is nothing to extract.")
    return found


def _relative(one: Tensor, two: Tensor) -> float:
    two = two.to(one.device)
    if torch.equal(one, two.to(one.dtype)) and (one.dtype == two.dtype or torch.equal(one.to(two.dtype), two)):
        return 0.0
    a, change = one.float().norm(), (two.float() - one.float()).norm()
    return float(change / a) if a else math.inf


# ---- which layers ------------------------------------------------------------------------------------------------


def _selection(base: nn.Module, changed: dict[str, float], config: LoraConfig | None) -> Any:
    """The configuration of a placeholder."""
    given: list[Any] = [getattr(m, "groups", None) for m in base.modules()]
    groups = math.lcm(*(g for g in given if isinstance(g, int)))  # of which a rank is a multiple
    fields: dict[str, Any] = {"r": groups, "lora_alpha": groups}
    if config is not None:
        fields.update({n: getattr(config, n) for n in SELECTS if getattr(config, n, None) is not None})
    else:
        fields.update(_defaults(base, changed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a training would have to know
        return LoraConfig(**fields)


def _defaults(base: nn.Module, changed: dict[str, float]) -> dict[str, Any]:
    """Every module and stack of matrices that has changed and can be a target."""
    modules, parameters, inside = [], [], ""
    for path, module in base.named_modules(remove_duplicate=False):
        if inside and path.startswith(inside):
            continue
        target = supported(module)
        if not path and target and changed:  # a model that is one layer is selected by its class
            return {"target_modules": [type(module).__name__.lower()]}
        if not path:
            continue
        own = {f"{path}.{n}": p for n, p in module.named_parameters(recurse=target)}
        if target:
            inside = f"{path}."
            if any(n in changed for n in own):
                modules.append(path)
        else:
            parameters += [n for n, p in own.items() if n in changed and p.dim() in (2, 3)]
    return {"target_modules": modules, "target_parameters": parameters or None}


def _whole(base: nn.Module, wanted: Any, changed: dict[str, float]) -> list[str]:
    """The modules that hold changed tensors which no target and no copy holds, and whose names hide no target."""
    holder = _placed(base, wanted)
    root: Any = holder.get_submodule("base_model.model")
    found = [u for (u,) in updates(holder, {NAME: 1.0}).values()]
    covered = {name for u in found for name in _names(u, root)} | _copies(holder, base)[1]
    owners = dict.fromkeys(n.rpartition(".")[0] for n in changed if n not in covered and "." in n)
    targets = [f".{_path(u, root)}." for u in found]
    return [owner for owner in owners if not any(f".{owner}." in target for target in targets)]


def _placed(base: nn.Module, config: Any) -> nn.Module:
    """A copy of the model without numbers, in which placeholders stand at the targets."""
    tensors = {
        id(t): t for m in base.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
    }
    memo: dict[int, Any] = {}
    for key, t in tensors.items():
        empty = torch.empty_like(t, device="meta")
        memo[key] = nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty
    holder = nn.Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder.base_model = LoraModel(copy.deepcopy(base, memo), copy.copy(config), NAME, low_cpu_mem_usage=True)
    return holder


def _change(u: Update, base: nn.Module, tuned: nn.Module, root: nn.Module) -> Change:
    path = _path(u, root)
    return Change(u.p, before=base.get_submodule(path), after=tuned.get_submodule(path))


def _path(u: Update, root: nn.Module) -> str:
    """The name of an adapted module in a model without adapters; `root` is the one with them."""
    path, parameter = u.p.path, u.p.layer.parameter_name
    path = path.removesuffix(parameter).removesuffix(".") if parameter else path
    return plain_path(root, path)


def _names(u: Update, root: nn.Module) -> list[str]:
    """The names of the tensors that an update of a layer changes."""
    view, path = u.p.layer.view, _path(u, root)
    return [f"{path}.{name}" if path else name for name in (view.name, view.bias_name) if name]


# ---- whole modules -----------------------------------------------------------------------------------------------


def _copies(holder: nn.Module, tuned: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of whole modules by checkpoint key, and their names in the model."""
    state, names, values = {}, set(), tuned.state_dict()
    for entry in walk(holder, NAME):
        if isinstance(entry.layer, ModulesToSaveWrapper):
            name = f"{entry.layer.path}.{entry.part}"
            state[entry.key] = values[name].detach().clone()
            names.add(name)
    return state, names


def _tell(new: Conversion) -> None:
    new.report.tell("Give a larger rank, or a share of the squared norm to keep, such as rank=0.9999.")
    others = new.report.others
    if others:
        worst = max(others, key=others.__getitem__)
        warnings.warn(
            f"{len(others)} tensors have changed that the adapter does not hold, the most {worst!r} "
            f"({others[worst]:.1%} of its norm): {listing(list(others))}. Keep copies of them with "
            "modules_to_save=True, or select them.",
            PeftWarning,
            stacklevel=4,
        )
