"""What an adapter adds to a weight that its module reads: in parts where they can be told, so that W' is not made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.modes import HELD
from .kept import kept, lasting, still
from .method import Delta
from .views.chosen import Term

if TYPE_CHECKING:
    from torch import Tensor

    from .stack import Adapter


def update(p: Adapter, W: Tensor) -> Term | None:
    """What the adapter makes of a weight (..., O, I) of the base; None where only W' as a whole tells.

    A dense update is told apart from W only where training drops features of its input.
    """
    method = p.method
    if not isinstance(method, Delta):
        return None
    rate = method.drop_rate(p)
    if W.dim() != 3 and not rate:
        return None  # of a single matrix all is read
    found: Term | None = None if rate else still(p)
    if found is not None and method.factored:
        return found
    made = method.term(p) if method.factored else None
    if made is None:
        dense = rate and type(method).live_weight is Delta.live_weight and method.additive
        made = (method.live_delta(p, W), None, 1.0) if dense else None
    if made is None or any(type(t) not in HELD or t.dim() != W.dim() for t in (W, *made[:2]) if t is not None):
        return None
    A, B, s, *g = made
    term = Term(A, B, s, rate, *g)
    return kept(p, term.laid, base=bool(g)) if lasting(p) and not rate else term
