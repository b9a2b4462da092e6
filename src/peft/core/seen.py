"""What the layers of a model see: the directions that their inputs lie along, for merges that round with care."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .base_state import original_modules
from .draw import normal
from .rounding import check_mode, dense_dtype

DIRECTIONS, SKETCH = 12, 48  # of the inputs that are kept for a layer, and columns of the sketch they are found in
SHARE = 16  # at most one direction for so many features: conditions on all of them would leave no choice
TOKENS = (8, 128)  # rows and columns of the random tokens

Calibration = Callable[[nn.Module], Any] | Iterable[Any]


class Sketch:
    """X' X G for the inputs X of one layer and a fixed random G, which spans the directions of X that matter."""

    def __init__(self, layer: Any, generator: torch.Generator) -> None:
        self.layer, self.total = layer, torch.zeros((), dtype=torch.float32, device="cpu")
        features = layer.view.shape(layer.get_base_layer())[-1]
        self.G = normal((features, min(SKETCH, features)), generator)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        for x in self.layer.view.vectors(self.layer.get_base_layer(), args, kwargs):
            self.G = self.G.to(x.device)
            x = x.detach().to(self.G.dtype)
            self.total = self.total.to(x.device) + x.mT @ (x @ self.G)

    def directions(self) -> Tensor | None:
        """(I, k), orthonormal, the strongest first; None if the layer has seen nothing."""
        if self.total.dim() == 0 or not torch.isfinite(self.total).all():
            return None
        U, size, _ = torch.linalg.svd(self.total, full_matrices=False)
        k = min(DIRECTIONS, U.shape[0] // SHARE, int((size > 1e-6 * size[0]).sum()))
        return U[:, :k] if k else None


def prepare(model: nn.Module, layers: Iterable[Any], mode: str, calibration: Calibration | None) -> None:
    """Have layers know how quantised weights take the merges that follow; the model is as before.

    Arguments:
        model: the model that holds the layers.
        layers: its tuner layers.
        mode: "requantize", "dequantize" or "compensated".
        calibration: what a compensated merge looks at, as `look` has it.

    Raises ValueError for an unknown mode, and what `look` raises.
    """
    check_mode(mode)
    layers = list(layers)
    if calibration is not None and mode != "compensated":
        raise ValueError(f'calibration is for quantized="compensated", and quantized is {mode!r}. Leave one out.')
    dtype = dense_dtype(m for _, m in original_modules(model)) if mode == "dequantize" else None
    packed = [layer for layer in layers if layer.packed is not None] if mode == "compensated" else []
    seen = look(model, packed, calibration) if packed else {}
    for layer in layers:
        layer.round_by(mode, dtype, seen.get(id(layer)))


def look(model: nn.Module, layers: Sequence[Any], calibration: Calibration | None) -> dict[int, Tensor]:
    """The directions of the inputs of each layer, {id(layer): (I, k)}, in a run of the model; its state stays.

    Arguments:
        model: the model that holds the layers.
        layers: tuner layers. Those that see no vectors (embeddings, modules that read their weights) are left out.
        calibration: batches, each a mapping of keyword arguments, a tuple of arguments or one argument, or a function
            that runs the model that it is given. None: random tokens, where the model is one of language; what stands
            out in the inputs of its layers stands out whatever the tokens are.

    Raises TypeError for a calibration of another kind, ValueError for one without any batch, and what the model raises.
    """
    run = _random_tokens(model) if calibration is None else _runner(calibration)
    plain = [x for x in layers if x.view.activations and not x.view.one_hot and x.view.groups(x.get_base_layer()) == 1]
    if run is None or not plain:
        return {}
    generator = torch.Generator().manual_seed(0)
    sketches = [Sketch(layer, generator) for layer in plain]
    handles = [s.layer.register_forward_pre_hook(s, with_kwargs=True) for s in sketches]
    try:
        with torch.no_grad(), evaluating(model):
            run(model)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        if calibration is not None:
            raise
        warnings.warn(
            f"The model does not run on random tokens alone ({type(error).__name__}: {error}), so that nothing is "
            "known of the inputs of its layers. Give calibration=BATCHES to keep more of the update.",
            stacklevel=5,
        )
        return {}
    finally:
        for handle in handles:
            handle.remove()
    found = {id(s.layer): s.directions() for s in sketches}
    return {key: value for key, value in found.items() if value is not None}


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Every module in evaluation, or in training, and then as it was."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        _ = model.train() if training else model.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _runner(calibration: Calibration) -> Callable[[nn.Module], Any]:
    if isinstance(calibration, (str, bytes, Mapping, Tensor)):
        raise TypeError(
            f"calibration must be batches or a function of the model, got one {type(calibration).__name__}. "
            "Give a list, [batch], even of one batch."
        )
    if callable(calibration) and not isinstance(calibration, Iterable):
        return calibration
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be batches or a function of the model, got {calibration!r}.")

    def run(model: nn.Module) -> None:
        some = False
        for batch in calibration:
            some = True
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        if not some:
            raise ValueError("calibration holds no batch. Give at least one, or a list: an iterator may be used up.")

    return run


def _random_tokens(model: nn.Module) -> Callable[[nn.Module], Any] | None:
    """A run on random tokens, if the model takes tokens."""
    embeddings = getattr(model, "get_input_embeddings", None)
    if getattr(model, "main_input_name", None) != "input_ids" or not callable(embeddings):
        return None
    words = embeddings()
    size = getattr(words, "num_embeddings", None)
    if size is None or not all(hasattr(words, name) for name in ("weight", "forward")):
        return None
    config, (rows, columns) = getattr(model, "config", None), TOKENS
    columns = min(columns, getattr(config, "max_position_embeddings", None) or columns)
    ids = torch.randint(0, int(size), (rows, columns), generator=torch.Generator().manual_seed(0), device="cpu")
    ids = ids.to(words.weight.device)
    names = ["input_ids"] + ["decoder_input_ids"] * bool(getattr(config, "is_encoder_decoder", False))
    return lambda m: m(**dict.fromkeys(names, ids))
