"""What a method states: what it owns on a target, and what it makes of the target's W and b.

That is its definition (`weight`, `bias`); it may state a shortcut (`forward`) that gives the same answer without W'.
The families below write the shortcut once. The conformance test holds shortcut against definition.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import lowrank
from . import quantised
from .direct import inside, open_linear, summed_up, with_delta
from .folding import Fold, Product
from .kept import kept_factors
from .sharded.gather import full
from .views import LinearView
from .views.chosen import product, thinned

if TYPE_CHECKING:
    from .shared import Shared, SharedTensors, Sight
    from .stack import Adapter, Stack


@dataclass(frozen=True)
class Site:
    """Where an adapter is built: one target, and what its tensors must look like."""

    module: nn.Module  # the innermost base layer
    view: LinearView
    settings: Any  # the configuration with this path's patterns resolved
    path: str
    dtype: torch.dtype
    device: torch.device
    shared: dict[str, SharedTensors] = field(default_factory=dict)
    layer: Any = None  # the tuner layer around it, where there is one yet
    place: torch.device | None = None  # where the layer runs, whatever `device` is; None: not known

    @property
    def kwargs(self) -> dict[str, Any]:
        """dtype and device for tensor constructors."""
        return {"dtype": self.dtype, "device": self.device}

    def original(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(W, b) of the base without any merged adapter, whole."""
        if self.layer is None:
            return full(self.view.read(self.module)), full(self.view.bias(self.module))
        return self.layer.original_weight(), self.layer.original_bias()

    def dropout(self, argument: str) -> nn.Module:
        """The dropout of the adapter's input, at the rate of the setting `argument`; refused where it has no input."""
        rate = getattr(self.settings, argument)
        if not rate:
            return nn.Identity()
        self.view.check_dropout(self.path, argument)
        return nn.Dropout(rate)


class Method:
    """A PEFT method, stateless: one object serves every layer of a model."""

    additive = False  # W' - W does not depend on the other adapters: any order gives the same weight
    mergeable = True
    by_task = False  # W' is another one for each task of a batch's samples
    by_input = False  # the update depends on the layer's input, so that there is no W' to read
    lasting = True  # what `prepare` notes holds as long as the layer has the same adapters
    some_positions = False  # it acts on some positions of its input only, so that there is no one W'
    reads = True  # what a forward differentiates holds numbers of W, or what is made of them
    spread = False  # its forward is made of products and sums of x, W and its tensors, which may be DTensors
    runner: ClassVar[Any] = None  # a Stack of one adapter alone with a shorter way, and the `long` one beside it
    factored = False  # `term` states all that it makes of W, so that a module may read W in parts
    by_rows = True  # some out-features of W' can be computed from the same ones of W
    # tensors in which W' is affine, all else of an adapter being the same, with the values at which W' is W
    linear: ClassVar[Mapping[str, float]] = {}
    may_be_empty: ClassVar[frozenset[str]] = frozenset()  # keys of vectors that have no elements in some layers
    copies: ClassVar[tuple[str, ...]] = ()  # keys under which files may hold shared tensors again, for every layer

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        return self

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]]) -> dict[str, Shared]:
        """The tensors that all layers of an adapter share, by name.

        Arguments:
            settings: the configuration.
            shapes: (..., O, I) of every target, worked out as they are asked for.
        """
        return {}

    def shared_by(self, settings: Any, targets: Iterable[Sight]) -> dict[str, Shared]:
        """The same for a method that looks at the targets' weights, too; `shared` is asked otherwise."""
        return self.shared(settings, (t.shape for t in targets))

    def build(self, site: Site) -> dict[str, Any]:
        """The tensors of one target under their checkpoint names (modules or parameters), and plain values."""
        raise NotImplementedError

    def form(self, site: Site) -> Hashable:
        """What tells, beside the settings, which shapes and plain values `build` makes; None: only building does."""
        return None

    def free(self, p: Adapter) -> frozenset[str]:
        """The plain values of which nothing depends that `derive` computes or `prepare` notes."""
        return frozenset()

    def drawn(self, p: Adapter, keys: Collection[str]) -> Mapping[str, Tensor]:
        """Those of the buffers `keys` that come from a seed, with the numbers that `build` gives them elsewhere."""
        return {}

    def init(self, p: Adapter, inner: Stack) -> None:
        """First values of the tensors; never runs on the meta device."""

    def again(self, p: Adapter) -> Callable[[dict[str, Tensor]], None] | None:
        """What `init` does, for tensors by key of another adapter of the same form; None: only `init` does it.

        Stated where nothing is derived, and all that `build` makes are matrices of modules and plain values.
        """
        return None

    def derive(self, p: Adapter, inner: Stack) -> None:
        """What is computed from the base weight and not saved; runs even where `init` is skipped."""

    def follow_base(self, p: Adapter, inner: Stack) -> None:
        """The base weight was replaced: compute anew what was derived from it, but nothing that is trained."""

    def tie(self, p: Adapter, other: Adapter) -> None:
        """Let p share the tensors of `other`, on the embedding that p's layer is tied to: its update, transposed.

        Raises NotImplementedError where the method cannot.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot adapt an embedding and the layer tied to it as one ({p.path!r}). Set "
            "ensure_weight_tying=False, or target only one of the two."
        )

    def prepare(self, p: Adapter) -> None:
        """Note in `p.hot` what a shortcut needs; called whenever the layer's state has changed."""

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        """THE DEFINITION: W -> W'. With `rows`, W holds only these out-features."""
        return W

    def fold(self, p: Adapter, wide: torch.dtype, original: bool) -> Fold | None:
        """`weight` made in the place of W, for merges; None where there is no way.

        Arguments:
            wide: the dtype in which sums are made.
            original: whether W is the base weight without any other adapter.
        """
        return None

    def live_weight(self, p: Adapter, W: Tensor) -> Tensor:
        """W' as a forward uses it: the definition, unless training drops parts of it by chance."""
        return self.weight(p, W)

    def bias(self, p: Adapter, b: Tensor | None) -> Tensor | None:
        """THE DEFINITION: b -> b'."""
        return b

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        """W' x + b'. A shortcut may replace this, never change it."""
        return inner.each_token(x, lambda s: s.affine(x, self.live_weight(p, s.live_weight()), self.bias(p, s.bias())))

    @property
    def everywhere(self) -> Method:
        """The method that does the same on all positions."""
        return self

    def acting(self, p: Adapter, x: Tensor) -> Tensor | None:
        """On which positions of x it acts, to be broadcast over an output; None for none."""
        raise NotImplementedError

    def keeps(self, p: Adapter) -> bool:
        """Whether training keeps numbers of W, or a matrix made of them, from a forward for its backward."""
        return self.reads

    def rowwise(self, p: Adapter) -> bool:
        """Whether `weight` can be asked for some rows only, in this layer."""
        return self.by_rows

    def term(self, p: Adapter) -> tuple[Any, ...] | None:
        """(A, B, s) where y = W x + b becomes y + s B A x; (A, B, s, g): g (y - b) + b + s B A x; None elsewhere.

        Dropout of that x is not told here, nor is a bias of B.
        """
        return None

    def up_bias(self, p: Adapter) -> Tensor | None:
        """A bias of B, (..., O), which the scaling multiplies too."""
        return None

    def refuse_merge(self, p: Adapter) -> None:
        """Raise ValueError where there is no W', NotImplementedError where the layer cannot hold it."""
        if not self.mergeable:
            raise ValueError(f"The adapter {p.name!r} at {p.path!r} depends on its input and cannot be merged.")

    def checkpoint_key(self, key: str) -> str:
        """The key of a tensor in files, from its name in the layer ('lora_A.weight')."""
        return key

    def takes(self, p: Adapter, key: str, shape: tuple[int, ...]) -> bool:
        """Whether a file's tensor of another shape than p's own takes its place.

        Arguments:
            p: the adapter.
            key: the tensor's key in files, relative to the layer.
            shape: its shape in the file.
        """
        return False

    def fitted(self, p: Adapter, key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """A tensor of another size as one of `shape` that does the same; None where there is none."""
        return None

    def rest(self, p: Adapter) -> None:
        """Make of an adapter whose tensors are zeros, and derived ones in place, one that leaves its layer as it is."""

    def window(self, p: Adapter, key: str, held: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """The part of a tensor that a smaller one of `shape` fills, the rest being zeros; None if `fitted` must say."""
        return None

    def roomy(self, p: Adapter, rank: int) -> dict[str, Tensor]:
        """The tensors, by key, that get room for adapters up to a rank; raises ValueError if that cannot be."""
        return {}

    def for_file(self, p: Adapter, key: str, value: Tensor) -> Tensor:
        """A tensor as files hold it; arguments as for `takes`."""
        return value

    def split(self, p: Adapter, key: str, value: Tensor) -> dict[str, Tensor]:
        """A tensor as files hold it, by key: itself, or in the parts that `join` puts together."""
        return {key: self.for_file(p, key, value)}

    def parts(self, key: str) -> tuple[str, ...]:
        """The keys under which files may hold a tensor in parts."""
        return ()

    def join(self, p: Adapter, key: str, parts: list[Tensor]) -> Tensor:
        """The tensor of which files hold the parts."""
        raise NotImplementedError

    def written(self, p: Adapter) -> None:
        """A file was written into p's tensors."""


class Delta(Method):
    """W' = W + delta(W). Where the delta depends on the numbers of W, and not only on its form, `reads` is True."""

    additive = True
    reads = False
    direct = False  # in training, too, what it adds is computed as stated, so that a fused form may take its place
    whole = False  # on a convolution with groups A reads all channels, as LoRA's does, so that B A is no kernel of it
    dropout = ""  # the key of the modules that drop features of its input, if it has any
    sums_from: ClassVar[float] = inf  # so many numbers of rows, as `touched` counts, for each of W: `summed_up`

    def makes_delta(self, p: Adapter) -> bool:
        """Whether `onto` makes a dense matrix of the delta."""
        return type(self).onto is Delta.onto

    def keeps(self, p: Adapter) -> bool:
        return self.reads or self.makes_delta(p)

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        """What is added to W, (..., rows, I)."""
        raise NotImplementedError

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        return (W + self.delta(p, W, rows)).to(W.dtype)

    def exact_factors(self, p: Adapter) -> tuple[Tensor, Tensor] | None:
        """(A, B) with B A the update, where it has a low rank that the method's form tells; else None."""
        return None

    def live_delta(self, p: Adapter, W: Tensor) -> Tensor:
        """`delta` as a forward uses it: training may drop parts of it by chance, which merging never does."""
        return self.delta(p, W)

    def read_delta(self, p: Adapter, W: Tensor) -> Tensor:
        """`live_delta` in a weight that a module reads: dropout takes the same features from all that it multiplies."""
        return thinned(self.live_delta(p, W), self.drop_rate(p) if p.layer.view.drops else 0.0)

    def live_weight(self, p: Adapter, W: Tensor) -> Tensor:
        return with_delta(self, p, W)

    def by_modules(self, p: Adapter) -> bool:
        """Whether modules of the adapter have to be called, as somebody hooked them, so that factors do not do."""
        return False

    def drop_rate(self, p: Adapter) -> float:
        """The dropout of the adapter's input that is in force, 0 outside training."""
        return p.drop_rate(self.dropout) if self.dropout else 0.0

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        found = summed_up(self, p, inner, x) if self.sums_from < inf or not inner.view.dense else None
        found = self.at_once(p, inner, x) if found is None else found
        return self.onto(p, inner, inner(x), x) if found is None else found

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        """`forward` over a plain linear layer with the update inside its product, where that is quicker; else None."""
        return inside(self, p, inner, x) if type(self).onto is Delta.onto else None

    def short(self, p: Adapter) -> tuple[Tensor, Tensor, Any] | None:
        """(A, B, s) with s B A the update of this forward, where two thin products with them are the quickest way."""
        return None

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        """y + delta(W) x, for y = inner(x)."""
        low = self.short(p) if inner.view.dense else None
        if low is not None:
            return lowrank.add(y, x, *low, self.drop_rate(p))

        def update(stack: Stack) -> Tensor:
            D = self.live_delta(p, stack.live_weight() if self.reads else stack.outline())
            z, factor = stack.drop(x, self.drop_rate(p), D.dtype)
            made = stack.linear(z, D)
            return made if factor is None else made * factor

        found = update(inner.root) if self.additive else inner.each_token(x, update)
        return (y + found).to(y.dtype)


class LowRank(Delta):
    """W' = W + scaling * B A, with B (..., O, r) and A (..., r, I)."""

    times = 1.0  # what a merge multiplies the scaled product with
    neutral_zeros = direct = True  # the former: an adapter whose tensors are all zero leaves the layer as it is
    keeps_factors = False  # these are no tensors of the adapter's own, and dear enough for evaluation to keep them

    @property
    def factored(self) -> bool:  # type: ignore[override]
        kind = type(self)
        whole = kind.live_weight is Delta.live_weight and kind.weight is Delta.weight
        return whole and kind.live_delta is Delta.live_delta and kind.delta is LowRank.delta

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """(A, B)."""
        raise NotImplementedError

    def kernels(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """`factors`, those of a convolution perhaps in its shape."""
        return self.factors(p)

    def scaling(self, p: Adapter) -> Any:
        """The factor of B A: a number, or a tensor of one element."""
        return 1.0

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        self.refuse_merge(p)
        A, B = self.factors(p)
        return product(A, B[..., rows, :], self.scaling(p))

    def fold(self, p: Adapter, wide: torch.dtype, original: bool) -> Fold | None:
        if type(self).weight is not Delta.weight or type(self).delta is not LowRank.delta:
            return None
        self.refuse_merge(p)
        return Product(*self.factors(p), self.scaling(p), wide)

    def refuse_merge(self, p: Adapter) -> None:
        if self.whole:
            p.layer.view.refuse_low_rank(p.layer.get_base_layer())

    def term(self, p: Adapter) -> tuple[Any, ...] | None:
        stated = type(self).forward is Delta.forward and type(self).onto is LowRank.onto
        return (*self.factors(p), self.scaling(p)) if stated else None

    def bias(self, p: Adapter, b: Tensor | None) -> Tensor | None:
        extra = self.up_bias(p)
        if extra is None:
            return b
        return extra * self.scaling(p) if b is None else (b + extra * self.scaling(p)).to(b.dtype)

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held = open_linear(inner, x) if type(self).onto is LowRank.onto else None
        if held is None or self.up_bias(p) is not None:
            return quantised.beside(self, p, inner, x) if inner.packed and type(self).onto is LowRank.onto else None
        (A, B), rate = kept_factors(self, p), self.drop_rate(p)
        if held[0].requires_grad and (rate or A.dtype is not x.dtype):
            return None
        return lowrank.linear(x, *held, A, B, self.scaling(p), rate)

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        scale, extra = self.scaling(p), self.up_bias(p)
        A, B = self.kernels(p)
        if not A.numel() or (not self.whole and inner.view.groups(inner.base) != 1):  # no kernel has no channels
            y = super().onto(p, inner, y, x)
            return y if extra is None else (y + inner.spread(extra * scale)).to(y.dtype)
        rate = self.drop_rate(p)
        if inner.view.dense:
            y = y if extra is None else (y + extra * scale).to(y.dtype)
            return lowrank.add(y, x, A, B, scale, rate)
        return (y + inner.low_rank(x, A, B, rate, scale, extra)).to(y.dtype)
