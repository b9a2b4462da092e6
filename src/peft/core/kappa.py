"""KappaTune: which weights to adapt, by their condition numbers.

    kappa(W) = s_max / (s_min + 1e-8),   s the singular values of W

A weight of a small kappa spreads what passes through it evenly over its directions: it holds little that is special,
and has room to learn. For a stack of experts kappa is the mean over them. Source: Ludwig 2025, arXiv 2506.16289.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from .tie import innermost
from .unload import progress
from .views import is_linear, view_of
from .walking import walk

Weight = tuple[str, tuple[int, ...], Callable[[], Tensor]]  # name, (out, in), and what reads its numbers
EPS = 1e-8
EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """Condition numbers of a model's weights, measured when they are first asked for.

    Arguments:
        model: any model with its weights in place.
        max_dim_size_to_analyze: matrices with a longer side are left out.
        moe_param_suffixes: how the names of stacked experts end, (experts, ., .); None for the usual ones.
        show_progress: show a bar, if tqdm is there.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ):
        self.model, self.max_dim_size_to_analyze = model, max_dim_size_to_analyze
        self.moe_param_suffixes = EXPERTS if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self.show_progress = show_progress
        self._condition_numbers: dict[str, float] | None = None
        self._parameter_condition_numbers: dict[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of linear layers, the smallest kappa first; all of them if nothing is given.

        Arguments:
            top_p: this share of them, at least one.
            num_modules: this many; counts before `top_p`.
            threshold: those of at most this kappa; counts last.
        """
        if self._condition_numbers is None:
            self._condition_numbers = self._measured(self._layers())
        return chosen(self._condition_numbers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of parameters that hold stacked experts; arguments as for `get_best_targets`."""
        if self._parameter_condition_numbers is None:
            self._parameter_condition_numbers = self._measured(self._experts())
        return chosen(self._parameter_condition_numbers, top_p, num_modules, threshold)

    def _layers(self) -> Iterator[Weight]:
        for name, module in walk(self.model):
            layer = innermost(module)
            if is_linear(type(layer)):
                yield name, view_of(layer).shape(layer), partial(view_of(layer).read, layer)

    def _experts(self) -> Iterator[Weight]:
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 3 and f".{name}".endswith(self.moe_param_suffixes):
                yield name, tuple(parameter.shape[1:]), parameter.detach

    def _measured(self, weights: Iterator[Weight]) -> dict[str, float]:
        fitting = [(name, read) for name, shape, read in weights if max(shape) <= self.max_dim_size_to_analyze]
        return {name: kappa(read(), name) for name, read in progress(fitting, self.show_progress, "Condition numbers")}


@torch.no_grad()
def kappa(W: Tensor, name: str = "") -> float:
    """The condition number of a matrix, or the mean of those of a stack.

    Raises ValueError for a weight without numbers.
    """
    if W.device.type == "meta":
        raise ValueError(f"{name!r} has no numbers yet (meta device), so it has no singular values. Load the weights.")
    numbers = []
    for matrix in W if W.dim() == 3 else (W,):
        s = torch.linalg.svdvals(matrix.float())
        numbers.append(float(s.max() / (s.min() + EPS)))
    return sum(numbers) / len(numbers)


def chosen(
    numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    """The names with the smallest numbers, in ascending order; see `KappaTuneSelector.get_best_targets`."""
    order = sorted(numbers, key=numbers.__getitem__)
    if num_modules is not None:
        return order[: max(0, num_modules)]
    if top_p is not None:
        return order[: max(1, int(len(order) * top_p))]
    return order if threshold is None else [name for name in order if numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """What to give a LoraConfig: {"target_modules": names, "target_parameters": names or None}.

    Arguments: as for `KappaTuneSelector`; `top_p` is the share of layers, and of stacks of experts, to take.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
