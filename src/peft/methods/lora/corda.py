"""CorDA: factors from the weight's singular directions on the inputs that it meets.

    W C = U S V',   C the covariance of the layer's inputs (damped until it can be inverted)
    B = U_k sqrt(S_k / s),   A = sqrt(S_k / s) V_k' C^-1

so that s B A is the best part of W of rank r where errors are weighed by C. "ipm" (instruction-previewed) takes the r
largest directions, to learn in those that the task uses; "kpm" (knowledge-preserved) takes the r smallest of directions
that carry knowledge, given inputs that ask for it. An embedding's inputs are one-hot, so its C is diagonal, the counts
of tokens; the packed projections of attention share one A, so their C is the mean of query's, key's and value's. The
base stays as it is: the first factors are held aside. Source: Yang et al. 2024, arXiv 2406.05223, eq. 1-5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .calibration import Spot, hooked, read, spots, write

NAME = "eigens"
DAMPING, RESIDUE = 0.01, 0.05


class CordaEigens:
    """The r directions of one weight: S (r), U (out, r) and V (in, r), V with the inverse covariance in it."""

    def __init__(self, S_WC: Tensor, U_WC: Tensor, V_WC: Tensor):
        self.S_WC, self.U_WC, self.V_WC = S_WC, U_WC, V_WC


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measure a base model for `init_lora_weights="corda"`; then call `get_peft_model` with the same configuration.

    Arguments:
        model: the base model.
        lora_config: its `corda_config` says which directions, and names files that are read if they exist and written
            if not: `cache_file` for the directions, `covariance_file` for the covariances.
        run_model: runs the model on sample inputs; not needed if a file exists.
        hooked_model: the model whose layers `run_model` calls, if that is another object of the same structure.

    Raises ValueError if there is nothing to run, for layers that were not called or have no inputs of their own, for
    inputs that are not finite, and for files that do not fit.
    """
    options = lora_config.corda_config
    if options is None:
        raise ValueError("preprocess_corda needs `corda_config` in the LoraConfig. Use corda_config=CordaConfig().")
    places = spots(model, lora_config)
    _refuse([s for s in places if not s.view.sees_inputs or s.view.groups(s.module) != 1])
    cached = read(options.cache_file, "cache_file")
    if cached is not None:
        for spot in places:
            spot.set(NAME, _from_cache(spot, cached, options.cache_file))
        return
    covariances = _covariances(places, options, run_model, hooked_model, model)
    found = {}
    for spot in places:
        eigens = _eigens(spot, covariances[spot.name], options.corda_method)
        spot.set(NAME, eigens)
        found.update({f"{spot.file_key(NAME)}.{k}": v for k, v in vars(eigens).items()})
        if not options.prune_temporary_fields:
            spot.set("covariance_matrix", covariances[spot.name])
        if options.verbose:
            print(f"CorDA: {spot.name}: {len(eigens.S_WC)} of {min(spot.view.shape(spot.module))} directions.")
    write(options.cache_file, found)


def factors(spot: Spot, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r).

    Raises ValueError for another rank than that which the model was measured for.
    """
    eigens = spot.get(NAME)
    if len(eigens.S_WC) != r:
        raise ValueError(f"{spot.path!r} was measured for {len(eigens.S_WC)} directions, but r={r}. Measure it again.")
    root = (eigens.S_WC.float() / scaling).sqrt()
    return root[:, None] * eigens.V_WC.float().mT, eigens.U_WC.float() * root


def missing(path: str) -> NoReturn:
    """Say that a layer was not measured."""
    raise ValueError(
        f"init_lora_weights='corda' found no `{NAME}` at {path!r}. Call peft.tuners.lora.corda.preprocess_corda(model, "
        "lora_config, run_model) on the base model first, with the same target_modules. An adapter whose file lacks "
        "`lora_first_A` needs it to be loaded, too, unless it is saved with `path_initial_model_for_weight_conversion`."
        " A layer that is tied to the embedding has no measurement of its own: set ensure_weight_tying=False."
    )


def _refuse(wrong: list[Spot]) -> None:
    if wrong:
        spot = wrong[0]
        grouped = spot.view.groups(spot.module) != 1
        why = "has groups" if grouped else "is a parameter that its module multiplies by itself, out of sight"
        raise ValueError(
            f"init_lora_weights='corda' needs the inputs of a layer, but {spot.name!r} ({spot.view.label}) {why}. "
            f"Leave it out (`exclude_modules`{'' if grouped else ', `target_parameters`'}), or use "
            "init_lora_weights='pissa'."
        )


def _from_cache(spot: Spot, cached: dict[str, Tensor], file: str) -> CordaEigens:
    keys = {name: f"{spot.file_key(NAME)}.{name}" for name in ("S_WC", "U_WC", "V_WC")}
    missing = [k for k in keys.values() if k not in cached]
    if missing:
        raise ValueError(f"cache_file={file!r} has no {missing[0]!r}. Delete it, or use the configuration it is of.")
    found = CordaEigens(**{name: cached[key].to(_weight(spot).device) for name, key in keys.items()})
    out, inp = spot.view.shape(spot.module)[-2:]
    r = spot.settings.r
    shapes = [tuple(t.shape) for t in (found.S_WC, found.U_WC, found.V_WC)]
    if shapes != [(r,), (out, r), (inp, r)]:
        raise ValueError(
            f"cache_file={file!r} holds other sizes for {spot.path!r}: U {shapes[1]} and V {shapes[2]}, but the weight "
            f"is {(out, inp)} and r={r}. Delete it, or use the configuration it is of."
        )
    return found


def _weight(spot: Spot) -> Tensor:
    return spot.view.read(spot.module)


def _covariances(
    places: list[Spot], options: Any, run: Callable[[], None] | None, other: nn.Module | None, model: nn.Module
) -> dict[str, Tensor]:
    """C of every layer, from the file or by running the model."""
    found = read(options.covariance_file, "covariance_file")
    if found is None:
        if run is None:
            raise ValueError(
                "preprocess_corda needs `run_model`, a function that runs the model on sample inputs: there is neither "
                "a cache_file nor a covariance_file to read."
            )
        found = _measured(places, options.use_float16_for_covariance, run, other or model)
        write(options.covariance_file, found)
    for spot in places:
        size = spot.view.shape(spot.module)[-1]
        wanted = (size,) if spot.view.one_hot else (size, size)
        shape = None if spot.name not in found else tuple(found[spot.name].shape)
        if shape != wanted:
            text = "is missing" if shape is None else f"is {shape}"
            raise ValueError(f"The covariance of {spot.name!r} {text}, expected {wanted}: {_ADVICE}")
    return {spot.name: found[spot.name].to(_weight(spot).device) for spot in places}


_ADVICE = "`run_model` has to call every target, and covariance_file has to be of the same model and targets."


def _measured(places: list[Spot], half: bool, run: Callable[[], None], model: nn.Module) -> dict[str, Tensor]:
    """The mean over calls of X'X, each input being scaled to its largest element."""
    sums: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    by_name = {spot.name: spot for spot in places}

    def seen(name: str, args: Any, kwargs: Any) -> None:
        size = by_name[name].view.shape(by_name[name].module)[-1]
        each = [_square(X.detach(), size, name, half) for X in by_name[name].vectors(args, kwargs)]
        C = each[0] if len(each) == 1 else torch.stack(each).mean(0)
        sums[name], calls[name] = (sums[name] + C if name in sums else C), calls.get(name, 0) + 1
        if not torch.isfinite(sums[name]).all():
            raise ValueError(f"The covariance of {name!r} overflows. Set use_float16_for_covariance=False.")

    with hooked({name: model.get_submodule(spot.stage) for name, spot in by_name.items()}, seen):
        run()
    return {name: C / calls[name] for name, C in sums.items()}


def _square(X: Tensor, size: int, name: str, half: bool) -> Tensor:
    """X'X of vectors, scaled to the largest element; its diagonal, of one-hot ones."""
    if not X.is_floating_point():
        return torch.bincount(X, minlength=size).float()
    if not torch.isfinite(X).all():
        raise ValueError(f"The input of {name!r} holds NaN or infinity, so its covariance has no value.")
    X = X.float()
    X = X / X.abs().max().clamp_min(torch.finfo(X.dtype).tiny)
    X = X.half() if half else X
    return X.mT @ X


def _eigens(spot: Spot, C: Tensor, method: str) -> CordaEigens:
    """The r directions of W C."""
    W, r = _weight(spot).detach().float(), spot.settings.r
    if r > min(W.shape):
        raise ValueError(f"{spot.path!r} is {tuple(W.shape)} and has only {min(W.shape)} directions, but r={r}.")
    C, inverse = damped(C.float(), spot.name)
    diagonal = C.dim() == 1
    U, S, Vh = torch.linalg.svd(W * C if diagonal else W @ C, full_matrices=False)
    V = (Vh * inverse if diagonal else Vh @ inverse).mT
    kept = slice(0, r) if method == "ipm" else slice(len(S) - r, len(S))
    return CordaEigens(*(t.contiguous() for t in (S[kept], U[:, kept], V[:, kept])))


def damped(C: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """C with enough on its diagonal to be inverted well, and its inverse; of a diagonal, diagonals."""
    if C.dim() == 1:
        C = C + DAMPING * C.mean()
        if C.all():
            return C, 1 / C
    for trial, inverse, well in _trials(C) if C.dim() == 2 else ():
        if well:
            return trial, inverse
    raise ValueError(f"The covariance of {path!r} cannot be inverted: are all its inputs zero?")


def _trials(C: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """C with more and more on its diagonal, its inverse, and whether that is one."""
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    mean, damping = C.diagonal().mean(), DAMPING
    while damping < 1e9:
        trial = C + damping * mean * eye
        inverse, info = torch.linalg.inv_ex(trial)
        yield trial, inverse, not info and bool(torch.dist(trial @ inverse, eye) < RESIDUE)
        damping *= 2
