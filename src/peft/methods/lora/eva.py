"""EVA: A from the principal components of a layer's inputs, ranks where they explain most.

Each adapted layer's inputs on some batches are decomposed as they come (`pca.py`) until the directions stand still.
A is the first of them, so that A x keeps as much of x as r numbers can; B is zero, so the model starts at the base.
The sum of the ranks is shared out again among the layers: the components with the largest share of their layer's
variance win, up to rho r in a layer. Source: Paischer et al. 2024, arXiv 2410.07170, algorithm 1.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.entries import PREFIX
from ...core.seen import evaluating
from ...core.state import disabled
from ...core.views import main_input
from ...errors import PeftWarning, check_adapters, listing, nearest
from .calibration import Spot, has_inputs, hooked, spots
from .pca import IncrementalPCA

PASSES = 100  # over the data, at most


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """model(**inputs)."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Tensor], peft_config: Any) -> Tensor:
    """Positions (N, 2) of the tokens that count: not padding and, with `use_label_mask`, with a label.

    Without an attention mask no token is padding, as for the model. Raises ValueError for inputs without tokens.
    """
    tokens = next((model_input[k] for k in ("attention_mask", "input_ids", "labels") if k in model_input), None)
    if tokens is None:
        raise ValueError(
            "EVA looks for `attention_mask` or `input_ids` in a batch, to tell where tokens are. Add one, or pass "
            "prepare_model_inputs_fn=None and prepare_layer_inputs_fn=None to count every vector."
        )
    counts = tokens.bool() if "attention_mask" in model_input else torch.ones_like(tokens, dtype=torch.bool)
    options = peft_config.eva_config
    if options.use_label_mask and "labels" in model_input:
        counts = counts & (model_input["labels"] != options.label_mask_value)
    return counts.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The vectors of a layer's input, (batch, tokens, features), at these positions."""
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    return x[model_input.T.unbind()]


ModelInputs = Callable[[Any, Any], Any]
LayerInputs = Callable[[Any, Any, str], Tensor]


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | dict[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The factors A that EVA gives each layer, {name of the layer: (rank, in)}; the model is not changed.

    Arguments:
        model: a PeftModel, or a plain model with `peft_config`.
        dataloader: batches; it is read again until the components stand still.
        peft_config: the configuration, if the model has none.
        forward_fn: runs the model on one batch.
        prepare_model_inputs_fn: makes of a batch and the configuration what `prepare_layer_inputs_fn` is given; None:
            the batch.
        prepare_layer_inputs_fn: makes of (layer's input, the former's result, layer's name) a matrix (rows, features);
            one for all, or {layer: function}; None: every vector counts.
        adapter_name: whose configuration is asked.
        gather_distributed_inputs: put together what all processes see.
        show_progress_bar: show how many layers stand still.

    Raises ValueError for a missing or other configuration, an empty dataloader, batches that are too small, inputs that
    are not finite, and functions for layers that do not exist.
    """
    adapted = hasattr(model, "get_base_model")
    root: nn.Module = model.get_base_model() if adapted else model  # type: ignore[operator]
    config = peft_config if peft_config is not None else _config(model, adapter_name)
    if config.init_lora_weights != "eva" or config.eva_config is None:
        raise ValueError(f"EVA needs init_lora_weights='eva', but the configuration has {config.init_lora_weights!r}.")
    prefix = PREFIX if adapted else ""
    chosen = spots(root, config)
    places = [spot for spot in chosen if has_inputs(spot)]
    left_out = [spot.path for spot in chosen if not has_inputs(spot)]
    if left_out:
        _warn(f"EVA has no inputs to look at in {listing(left_out)}, which start as with init_lora_weights=True.")
    run = _Run(root, places, config, forward_fn, prepare_model_inputs_fn, prefix, gather_distributed_inputs)
    run.by_layer(prepare_layer_inputs_fn)
    with disabled(root), evaluating(model):
        run.all(dataloader, show_progress_bar)
    return {prefix + path: A for path, A in run.factors().items()}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | dict[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default", gather_distributed_inputs: bool = True, show_progress_bar: bool = True,
) -> None:  # fmt: skip
    """Give an adapter made with `init_lora_weights="eva"` its first factors and ranks; before its training.

    Arguments as for `get_eva_state_dict`, whose result may be given instead of a dataloader. Layers get other ranks,
    those of rank 0 lose the adapter, and the configuration says so in `rank_pattern` and `alpha_pattern`.

    Raises ValueError for a model without adapters, with several active ones, or without data.
    """
    if not hasattr(model, "get_base_model"):
        raise ValueError(f"initialize_lora_eva_weights takes a PeftModel, not a {type(model).__name__}.")
    if len(model.active_adapters) > 1:  # type: ignore[arg-type]
        raise ValueError(f"EVA works with one active adapter; {model.active_adapters} are active. Set one of them.")
    config = _config(model, adapter_name)
    if config.init_lora_weights != "eva":
        raise ValueError(f"EVA needs init_lora_weights='eva', but the configuration has {config.init_lora_weights!r}.")
    measured = eva_state_dict is None
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("EVA needs a dataloader, or an eva_state_dict that get_eva_state_dict has made.")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    from .eva_ranks import give

    give(model, adapter_name, {k.removeprefix(PREFIX): v for k, v in eva_state_dict.items()}, told=measured)


def _config(model: nn.Module, name: str) -> Any:
    configs = getattr(model, "peft_config", None)
    if configs is None:
        raise ValueError("The model has no adapters, so pass `peft_config`.")
    check_adapters([name], configs)
    return configs[name]


def _warn(text: str) -> None:
    warnings.warn(text, PeftWarning, stacklevel=4)


class _Layer:
    """The components of one layer's inputs."""

    def __init__(self, spot: Spot, rho: float):
        self.spot, self.rank = spot, spot.settings.r
        self.most = round(self.rank * rho)
        self.pca: IncrementalPCA | None = None
        # cosine of each component with what it was a batch ago
        self.still = torch.zeros(0, dtype=torch.float32, device="cpu")
        self.prepare: LayerInputs | None = None

    @property
    def ratios(self) -> Tensor:
        """The share of the variance that each component explains."""
        return (
            torch.zeros(0, dtype=torch.float32, device="cpu")
            if self.pca is None
            else self.pca.explained_variance_ratio_.cpu()
        )

    def add(self, X: Tensor) -> None:
        """Take the rows of a batch."""
        if self.pca is None:
            n = min(self.most, X.shape[1])
            self.pca = IncrementalPCA(n, copy=False, lowrank=True, lowrank_seed=42)
            self.pca.partial_fit(X)
            self.still = torch.zeros(n, dtype=torch.float32, device="cpu")
            return
        before = self.pca.components_
        self.pca.partial_fit(X)
        self.still = torch.cosine_similarity(before, self.pca.components_, dim=1).abs().cpu()


class _Run:
    """Going through the data until all layers stand still."""

    def __init__(
        self, root: nn.Module, places: list[Spot], config: Any, forward: Any, prepare: Any, prefix: str, gather: bool
    ):
        self.root, self.config, self.forward, self.prepare, self.prefix = root, config, forward, prepare, prefix
        self.layers = {spot.path: _Layer(spot, config.eva_config.rho) for spot in places}
        self.holder = {path: path for path in self.layers}  # of layers with the same input, the first
        self.gather = gather and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.context: Any = None
        self.small: dict[str, int] = {}

    def by_layer(self, functions: Any) -> None:
        """Who makes rows of a layer's input."""
        if not isinstance(functions, dict):
            for layer in self.layers.values():
                layer.prepare = functions
            return
        given = {k.removeprefix(self.prefix): v for k, v in functions.items()}
        wrong = [k for k in given if k not in self.layers]
        if wrong:
            raise ValueError(
                f"prepare_layer_inputs_fn has functions for {listing(wrong)}, which EVA does not look at."
                f"{nearest(wrong[0], self.layers)}"
            )
        for path, layer in self.layers.items():
            layer.prepare = given.get(path, prepare_layer_inputs_fn_language_modeling)

    def all(self, data: Iterable[Any], show: bool) -> None:
        """Read the data again and again; the bar says how many layers stand still."""
        bar = _bar(len(self.layers)) if show else None
        for number in range(PASSES):
            batches = 0
            for batch in data:
                if not number and not batches:
                    self._group(batch)
                batches += 1
                self._pass(batch, self._take)
                done = self._converged()
                if bar is not None:
                    bar.n = done
                    bar.refresh()
                if done == len(self.layers):
                    return
            if not batches and not number:
                raise ValueError("The dataloader is empty: EVA needs at least one batch.")
            self._check_sizes()
            if not batches:
                break
        _warn("EVA's components have not come to rest: the data has ended, or tau is too large. They are used as is.")

    def _pass(self, batch: Any, hear: Callable[[str, Tensor], None]) -> None:
        batch = _moved(batch, next((p.device for p in self.root.parameters() if not p.is_meta), torch.device("cpu")))
        self.context = self.prepare(batch, self.config) if self.prepare is not None else batch
        modules = {path: self.root.get_submodule(path) for path in self.layers}
        with hooked(modules, lambda path, args, kwargs: hear(path, main_input(args, kwargs))):
            self.forward(self.root, batch)

    def _rows(self, path: str, x: Tensor) -> Tensor:
        layer = self.layers[path]
        if layer.prepare is None:
            (X,) = layer.spot.vectors((x.detach().float(),), {})
        else:
            X = layer.prepare(x, self.context, self.prefix + path).detach().float()
        size = layer.spot.view.shape(layer.spot.module)[-1]
        if X.dim() != 2 or X.shape[1] != size:
            raise ValueError(
                f"The rows of {path!r} should be a matrix of {size} columns, but prepare_layer_inputs_fn gave "
                f"{tuple(X.shape)}. Pass None to count every vector."
            )
        if not torch.isfinite(X).all():
            raise ValueError(f"The input of {path!r} holds NaN or infinity, so it has no components.")
        return _gathered(X) if self.gather else X

    def _group(self, batch: Any) -> None:
        """Layers that are given the same input share its components."""
        seen: dict[str, str] = {}

        def look(path: str, x: Tensor) -> None:
            data = self._rows(path, x).cpu().contiguous()
            mark = hashlib.sha1(data.view(torch.uint8).numpy().tobytes(), usedforsecurity=False).hexdigest()
            self.holder[path] = seen.setdefault(f"{mark} {tuple(data.shape)}", path)

        self._pass(batch, look)
        for path, first in self.holder.items():
            self.layers[first].most = max(self.layers[first].most, self.layers[path].most)

    def _take(self, path: str, x: Tensor) -> None:
        layer = self.layers[path]
        if self.holder[path] != path:
            return
        X = self._rows(path, x)
        needed = min(layer.most, X.shape[1])
        if len(X) < needed:
            if path not in self.small:
                _warn(f"EVA skips batches with fewer rows than components: {path!r} got {len(X)} of {needed}.")
            self.small[path] = max(len(X), self.small.get(path, 0))
            return
        layer.add(X)

    def _check_sizes(self) -> None:
        wrong = [path for path in self.layers if self.layers[self.holder[path]].pca is None]
        if wrong:
            layer = self.layers[self.holder[wrong[0]]]
            raise ValueError(
                f"No batch gave {wrong[0]!r} the {layer.most} rows that its components need (at most "
                f"{self.small.get(self.holder[wrong[0]], 0)}): every target has to be called. Use larger batches, or "
                "lower r or rho."
            )

    def ranks(self) -> dict[str, int]:
        """The sum of the ranks, shared out to the components that explain most."""
        shares = [
            (-float(ratio), order, path)
            for order, path in enumerate(self.layers)
            for ratio in self.layers[self.holder[path]].ratios[: self.layers[path].most]
        ]
        budget = sum(layer.rank for layer in self.layers.values())
        given = dict.fromkeys(self.layers, 0)
        for _, _, path in sorted(shares)[:budget]:
            given[path] += 1
        return given

    def _converged(self) -> int:
        tau, ranks = self.config.eva_config.tau, self.ranks()
        layers = {path: self.layers[self.holder[path]] for path in ranks}
        return sum(
            layers[path].pca is not None and bool((layers[path].still[:rank] >= tau).all())
            for path, rank in ranks.items()
        )

    def factors(self) -> dict[str, Tensor]:
        """A of each layer, (rank, in)."""
        found = {}
        for path, rank in self.ranks().items():
            pca = self.layers[self.holder[path]].pca
            assert pca is not None
            A = pca.components_[:rank]
            if self.config.eva_config.whiten:
                A = A / pca.singular_values_[:rank, None].clamp_min(1e-12).sqrt()
            found[path] = A.clone()
        return found


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc="EVA: layers at rest")


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _moved(v, device) for k, v in batch.items()}
    return type(batch)(_moved(v, device) for v in batch) if type(batch) in (tuple, list) else batch


def _gathered(X: Tensor) -> Tensor:
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, X.cpu())
    return torch.cat(parts).to(X.device)
