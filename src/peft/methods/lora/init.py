"""First values of LoRA's factors.

Letters: W (..., O, I) the base weight, r the rank, s the scaling, U S V' a singular value decomposition.

| init_lora_weights | A | B | source |
|---|---|---|---|
| True | uniform on +-1/sqrt(I) (Kaiming, a = sqrt 5) | 0 | arXiv 2106.09685 |
| "gaussian" | normal, std 1/r | 0 | arXiv 2106.09685, section 4.1 |
| False | as torch draws a linear layer | likewise | |
| "orthogonal" | two halves of one orthogonal basis: B A = 0, neither is | | |
| "pissa", "pissa_niter_n" | sqrt(S/s) V' | U sqrt(S/s) | Meng et al. 2024, arXiv 2404.02948, eq. 2-4 |
| "olora" | R of the QR of W | Q of it | Büyükakyüz 2024, arXiv 2406.01775 |
| "mica" | 0 | the last r columns of U, never trained | |
| "eva" | as True, until the inputs are known | 0 | `eva.py` |
| "corda", "lora_ga" | from inputs, from gradients | | `corda.py`, `loraga.py` |
| "loftq" | from the error of quantisation | | `loftq.py` |
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core.defaults import SAFETENSORS_WEIGHTS_NAME
from ...core.draw import triplets
from ...core.files import keys_in_hand
from ...core.header import read_header
from ...errors import PeftWarning, report
from ...kernels.modes import numbered, single
from . import corda, loraga
from .calibration import Spot, at

if TYPE_CHECKING:
    from ...core.stack import Adapter, Stack

MEASURED = {"corda": corda.NAME, "lora_ga": loraga.NAME}
FIRST = ("lora_first_A", "lora_first_B")  # in files: A0 and B0 that cannot be found from the base weight again
DERIVED = ("lora_residual_A", "lora_residual_B")  # found anew at each load
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fill(method: Any, p: Adapter, inner: Stack) -> None:
    """Draw or compute the first A and B of an adapter, and a zero bias.

    Raises ValueError if the initialisation has no meaning for this layer, TypeError for a base dtype that it cannot
    read.
    """
    kind = p.settings.init_lora_weights
    A, B = held(p)
    if p.lora_bias:
        method.up_bias(p).zero_()
    unmeasured = kind in MEASURED and not measured(at(p))
    if kind is True or not kind or str(kind).lower() == "gaussian" or kind == "eva" or unmeasured:
        _draw(p, A, B, True if unmeasured or kind == "eva" else kind, inner.view.infix != "")
        return
    refuse_groups(p, inner)
    if kind == "orthogonal":
        *_, out, inp = inner.view.shape(inner.base)
        put(p, inner, *orthogonal(p.r, inp, out, A.device))
    else:
        p.cache["first"] = principal(p)  # `residual` asks for the same next
        put(p, inner, *p.cache["first"])


def refuse_groups(p: Adapter, inner: Stack) -> None:
    """Raise ValueError at a convolution with groups."""
    if getattr(inner.base, "groups", 1) != 1:
        raise ValueError(
            f"init_lora_weights={p.settings.init_lora_weights!r} has no meaning for {p.path!r}, a convolution with "
            "groups, whose B cannot mix all ranks. Use init_lora_weights=True, or exclude the layer."
        )


def put(p: Adapter, inner: Stack, A: Tensor, B: Tensor) -> None:
    """Put (..., r, I) and (..., O, r) where the adapter holds its factors; all matrices of a stack get the same."""
    home_A, home_B = held(p)
    lead = home_A.numel() // (p.r * inner.view.shape(inner.base)[-1])
    if lead > 1 and A.dim() == 2:
        A, B = A.expand(lead, *A.shape), B.expand(lead, *B.shape)
    A, B = inner.view.held(inner.base, A, B)
    home_A.copy_(A.reshape(home_A.shape))
    home_B.copy_(B.reshape(home_B.shape))


def subtracts(site: Any) -> bool:
    """Whether the literature takes the first B A out of the base weight.

    Raises ValueError where CorDA has no measurement to start from, and no file; LoRA-GA warns.
    """
    kind = site.settings.init_lora_weights
    if kind not in MEASURED:
        return isinstance(kind, str) and (kind.startswith("pissa") or kind == "olora") and not _plain(site, kind)
    if measured(_spot(site)) or _comes_later(site):
        return True
    if kind == "corda":
        corda.missing(site.path)
    loraga.missing(site.path)
    return False


def _plain(site: Any, kind: str) -> bool:
    """Whether a file of the peer library (releases 0.x) holds a plain adapter here, whatever the start is called.

    Warns where its first factors cannot be known.
    """
    if not keys_in_hand() or not str(site.settings.peft_version).startswith("0"):
        return False
    if site.view.infix:
        return True  # there an embedding starts as with True
    if kind.startswith("pissa_") or (kind == "olora" and site.settings.fan_in_fan_out):
        text = (
            f"An adapter that was started with init_lora_weights={kind!r} by another library is loaded: that library "
            "draws its first factors anew each time, or of the transposed weight, and saves them nowhere. The answers "
            "differ from those in training. Where the training run is at hand, save it as a plain LoRA there with "
            "`path_initial_model_for_weight_conversion`."
        )
        report(PeftWarning, text, strict=False, stacklevel=4)
    return False


def measured(spot: Spot) -> bool:
    """Whether the base model holds what the initialisation starts from."""
    return spot.get(MEASURED[spot.settings.init_lora_weights]) is not None


def _spot(site: Any) -> Spot:
    return Spot(site.path, site.module, site.view, site.settings)


def _comes_later(site: Any) -> bool:
    """Whether the first factors are in a file: that in hand, or the one beside a configuration for inference."""
    keys: Collection[str] = keys_in_hand()
    folder = site.settings.__dict__.get("origin")
    if not keys and folder and site.settings.inference_mode and not measured(_spot(site)):
        file = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)  # which transformers will read by itself
        keys = _held_by(file, os.stat(file).st_mtime_ns) if os.path.isfile(file) else ()
    return any(key.endswith(FIRST[0]) for key in keys)


@lru_cache(maxsize=1)
def _held_by(file: str, changed: int) -> Collection[str]:
    """The keys of a file, which every layer asks for."""
    return read_header(file).tensors


def room(site: Any) -> dict[str, Tensor]:
    """Where the first factors of a file go, if the adapter will be filled from one that holds them."""
    if site.settings.init_lora_weights not in MEASURED or not _comes_later(site):
        return {}
    *lead, out, inp = site.view.shape(site.module)
    r = site.settings.r
    shapes = ((*lead, r, inp), (*lead, out, r))
    return {k: torch.nn.Buffer(torch.zeros(s, **site.kwargs)) for k, s in zip(FIRST, shapes, strict=True)}


def residual(p: Adapter) -> tuple[Tensor, Tensor] | None:
    """(A0, B0), whose product the literature takes out of the base weight; None for the other initialisations."""
    first = p.cache.pop("first", None)
    if not p.subtracts or (p.settings.init_lora_weights in MEASURED and not measured(at(p))):
        return None
    A, _ = held(p)
    A0, B0 = principal(p) if first is None else first
    return A0.to(A.dtype).contiguous(), B0.to(A.dtype).contiguous()


def of_tied(p: Adapter, tied: Adapter) -> tuple[Tensor, Tensor]:
    """(A0, B0) of the embedding that p's layer is tied to, transposed; its weight may lie elsewhere, and is p's."""
    if tied.has(DERIVED[0]):
        A0, B0 = (tied.held_buffer(name) for name in DERIVED)
    else:
        W = p.original_weight().detach().mT.float()
        A0, B0 = (t.to(held(p)[0].dtype) for t in decomposed(tied, W, str(p.settings.init_lora_weights)))
    return B0.mT.contiguous(), A0.mT.contiguous()


def held(p: Adapter) -> tuple[Tensor, Tensor]:
    """The parameters A and B, of an embedding or of another layer."""
    if p.has("lora_embedding_A"):
        return p.lora_embedding_A, p.lora_embedding_B
    return p.lora_A.weight, p.lora_B.weight


def _draw(p: Adapter, A: Tensor, B: Tensor, kind: Any, embedding: bool) -> None:
    if embedding:
        # an embedding starts the other way round: its A is looked up, so zero there saves the first update's rows
        nn.init.normal_(A) if not kind else nn.init.zeros_(A)
        nn.init.normal_(B)
        return
    if kind is True or not kind:
        bound = 1 / math.sqrt(A[0].numel())  # Kaiming's bound for a = sqrt 5
        A.uniform_(-bound, bound)
    else:
        A.normal_(std=1 / p.r)
    if kind:
        B.zero_()
        return
    bound = 1 / math.sqrt(B[0].numel())
    B.uniform_(-bound, bound)
    if p.lora_B.bias is not None:
        p.lora_B.bias.uniform_(-bound, bound)


def again(p: Adapter) -> Callable[[dict[str, Tensor]], None] | None:
    """What draws the same for the factors of another layer of the same sizes; None for what looks at the layer."""
    kind = p.settings.init_lora_weights
    if kind is not True and kind is not False:
        return None
    A, B = held(p)
    down, up = (1 / math.sqrt(factor.numel() // len(factor)) for factor in (A, B))

    def draw(made: dict[str, Tensor]) -> None:
        made["lora_A"].uniform_(-down, down)
        if kind:
            made["lora_B"].zero_()
        else:
            made["lora_B"].uniform_(-up, up)

    return draw


def orthogonal(r: int, inp: int, out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A (r, inp) and B (out, r), not zero, whose product is: they use disjoint halves of one orthogonal basis of R^r.

    Raises ValueError if r is odd.
    """
    if r % 2:
        raise ValueError(f'init_lora_weights="orthogonal" needs an even rank, got r={r}. Use r={r + 1}.')
    kind: Any = {"dtype": torch.float32, "device": device}
    Q = torch.linalg.qr(torch.randn(r, r, **kind))[0]
    even, odd = Q[0::2], Q[1::2]
    A = (torch.randn(inp, r // 2, **kind) @ even).mT / 10
    B = torch.randn(out, r // 2, **kind) @ odd / 10
    return A, B


def principal(p: Adapter) -> tuple[Tensor, Tensor]:
    """The factors that come from a decomposition: (r, I) and (O, r) after W's leading axes, in float32 or wider."""
    kind = str(p.settings.init_lora_weights)
    if kind == "corda":
        return corda.factors(at(p), p.r, p.scaling)
    W = p.original_weight()
    if W.dtype not in _NUMBERS:
        raise TypeError(
            f"init_lora_weights={kind!r} needs a base weight in 16, 32 or 64 bits, but {p.path!r} is stored as "
            f"{W.dtype}. Use init_lora_weights=True for this layer."
        )
    if kind == "lora_ga":
        return loraga.factors(at(p), p.r, p.scaling, W)
    return decomposed(p, single(W.detach()), kind)


def decomposed(p: Adapter, W: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The factors of PiSSA, OLoRA or MiCA.

    Raises ValueError for weights that are not finite or have fewer than r directions.
    """
    if numbered(W) and not torch.isfinite(W).all():
        raise ValueError(
            f"init_lora_weights={kind!r} starts from the base weight, but that of {p.path!r} holds NaN or infinity. "
            "Mend the base model, or use init_lora_weights=True."
        )
    if p.r > min(W.shape[-2:]):
        raise ValueError(
            f"init_lora_weights={kind!r} takes r={p.r} components, but {p.path!r} is {tuple(W.shape[-2:])} and has "
            f"only {min(W.shape[-2:])}. Lower r, or give this layer its own rank with rank_pattern."
        )
    if kind == "olora":
        Q, R = torch.linalg.qr(W)
        return R[..., : p.r, :], Q[..., :, : p.r]
    if kind == "mica":
        U = torch.linalg.svd(W, full_matrices=False)[0]
        return W.new_zeros(*W.shape[:-2], p.r, W.shape[-1]), U[..., -p.r :]
    return low_rank(W, p.r, p.scaling, kind)


def low_rank(W: Tensor, r: int, scaling: float, kind: str = "pissa") -> tuple[Tensor, Tensor]:
    """A (..., r, I) and B (..., O, r) of the best s B A of rank r for W; for "pissa_niter_n" by n subspace iterations.

    Those are the same at every load, as a saved adapter is a difference to exactly these factors.
    """
    if kind == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, Vh = triplets(W, r, int(kind.rsplit("_", 1)[1]), seed=0)
    root = (S[..., :r] / scaling).sqrt()
    return root[..., :, None] * Vh[..., :r, :], U[..., :, :r] * root[..., None, :]
