"""LoRA: a low-rank update of a frozen weight.

    W' = W + s B A,   A (r, in), B (out, r),   s = alpha / r,  or alpha / sqrt(r) with rank-stabilised scaling

A starts random and B at zero, so training starts at the base model. Sources: Hu et al. 2021, arXiv 2106.09685, eq. 3;
rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732. Initialisations that the literature writes into the base
weight (PiSSA, OLoRA) keep the base here: with the first factors A0, B0 held aside, W' = W + s (B A - B0 A0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import quantised, storage
from ...core.direct import CONVS, EVERYWHERE, FORMS, FORWARD, TURNED, is_product, summed_up
from ...core.files import keys_in_hand
from ...core.kept import kept, lasting, still
from ...core.lent import same_memory
from ...core.method import LowRank, Method, Site
from ...core.sharded.gather import full, is_mesh, local
from ...core.stack import Adapter, Stack
from ...core.views import PLAIN, Linear
from ...errors import PeftWarning, report
from ...kernels import lowrank
from ...kernels.modes import HELD
from . import init as starts
from . import room
from .row import Row
from .several import several

SIZES = frozenset({"r", "lora_alpha", "scaling"})


class LoRA(LowRank):
    """W' = W + s B A."""

    dropout = "lora_dropout"
    whole = True
    spread = True
    runner = Row

    def build(self, site: Site) -> dict[str, Any]:
        c, m, view = site.settings, site.module, site.view
        bias, beside = bool(c.lora_bias), dict[str, Any]()
        if bias and view.infix:
            beside["lora_embedding_bias"] = nn.Parameter(torch.empty(view.shape(m)[0], **site.kwargs))
        root = math.sqrt(c.r) if c.use_rslora else c.r
        return {
            **starts.room(site),
            "lora_dropout": site.dropout("lora_dropout"),
            f"lora_{view.infix}A": view.down(m, c.r, **site.kwargs),
            f"lora_{view.infix}B": view.up(m, c.r, bias, **site.kwargs),
            **beside,
            "r": c.r,
            "lora_alpha": c.lora_alpha,
            "scaling": c.lora_alpha / root,
            "use_rslora": c.use_rslora,
            "use_dora": c.use_dora,
            "lora_bias": bias,
            "keeps_B": c.init_lora_weights == "mica",
            "subtracts": starts.subtracts(site),
        }

    def untrained(self, built: Mapping[str, Any], tied: bool) -> tuple[str, ...]:
        """The names of what `build` made that training leaves as it is, which a plan does not count."""
        fixed = ("lora_A",) if tied else ("lora_B", "lora_embedding_B")
        return fixed if built["keeps_B"] else ()

    def form(self, site: Site) -> Hashable:
        alike = site.view.dense and type(self) in (LoRA, OutProjection)
        measured = site.settings.init_lora_weights in starts.MEASURED
        return (type(site.module), site.view.shape(site.module)) if alike and not measured else None

    def free(self, p: Adapter) -> frozenset[str]:
        return SIZES if type(self) in (LoRA, OutProjection) and not p.subtracts else frozenset()

    def init(self, p: Adapter, inner: Stack) -> None:
        starts.fill(self, p, inner)

    def again(self, p: Adapter) -> Callable[[dict[str, Tensor]], None] | None:
        plain = type(self) is LoRA and p.layer.view.dense and not (p.lora_bias or p.subtracts)
        return starts.again(p) if plain else None

    def derive(self, p: Adapter, inner: Stack) -> None:
        """A0, B0 of an initialisation that the literature subtracts from the base weight."""
        tied = p.__dict__.get("tied_to")
        if p.has(starts.FIRST[0]):
            pair = None
        elif tied is not None and p.subtracts and tied.subtracts:
            pair = starts.of_tied(p, tied)
        else:
            pair = starts.residual(p)
        if pair is not None:
            saved = p.settings.init_lora_weights in starts.MEASURED and not keys_in_hand()
            pair = pair if saved else room.wide(*pair, self.own_factors(p)[0].shape[-2])
            for key, value in zip(starts.FIRST if saved else starts.DERIVED, pair, strict=True):
                p.layer.keep(p, key, nn.Buffer(value) if saved else value)

    def tie(self, p: Adapter, other: Adapter) -> None:
        """(B A)' = A' B': the embedding's factors, transposed, the same numbers in memory. The scaling stays p's."""
        if p.lora_bias:
            raise ValueError(
                f"lora_bias=True has no meaning for {p.path!r}, a layer that is tied to an embedding: the bias of one "
                "is no bias of the other. Set lora_bias=False, or ensure_weight_tying=False."
            )
        measured = p.settings.init_lora_weights in starts.MEASURED
        if measured or any(q.__dict__.get(mark) for mark in ("takes_out", "blocked") for q in (p, other)):
            super().tie(p, other)  # which refuses: first factors, KaSA's d or blocks would be one layer's alone
        p.lora_A._parameters["weight"] = nn.Parameter(other.lora_embedding_B.detach().mT)
        p.lora_B._parameters["weight"] = nn.Parameter(other.lora_embedding_A.detach().mT)
        if p.r != other.r:
            grown = other.r / p.r
            p.r, p.lora_alpha = other.r, p.lora_alpha * (math.sqrt(grown) if p.use_rslora else grown)
        p.tied_to = other
        if p.subtracts and other.has(starts.DERIVED[0]):
            self.derive(p, p.layer.stack(()))

    def tie_again(self, p: Adapter) -> None:
        """Tie again what a file has put in place apart; what differs there stays apart, as it was trained."""
        other = p.tied_to
        homes = p.lora_A._parameters, p.lora_B._parameters
        now = [home["weight"] for home in homes]
        tied = [other.lora_embedding_B.detach().mT, other.lora_embedding_A.detach().mT]
        pairs = list(zip(now, tied, strict=True))
        plain = all((is_mesh(t) or type(t) is nn.Parameter) and t.device == v.device for t, v in pairs)
        if not plain or now[0].is_meta or all(same_memory(local(t), local(v)) for t, v in pairs):
            return
        if all(torch.equal(full(t.detach()), full(v)) for t, v in pairs):
            for home, held, value in zip(homes, now, tied, strict=True):
                home["weight"] = nn.Parameter(value, held.requires_grad)
            return
        text = (
            f"{p.path!r} is tied to {other.path!r} in adapter {p.name!r}, but the file holds other factors for each. "
            "They are loaded as they are, and no longer tied. Set ensure_weight_tying=False in its configuration."
        )
        report(PeftWarning, text, strict=False, stacklevel=5)

    @torch.no_grad()
    def follow_base(self, p: Adapter, inner: Stack) -> None:
        measured = p.settings.init_lora_weights in starts.MEASURED  # of a base that is no longer there
        stays = not p.subtracts or (measured and (p.has(starts.FIRST[0]) or p.has(starts.DERIVED[0])))
        if not stays and inner.layer.original_weight_device().type != "meta":
            if (tied := p.__dict__.get("tied_to")) is not None and tied.subtracts:
                self.follow_base(tied, tied.layer.stack(()))
            self.derive(p, inner)

    def own_factors(self, p: Adapter, blocks: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
        """(A, B) as trained and saved; factors of several blocks are block diagonal."""
        view = p.layer.view
        if view.infix:
            A, B = p.held("lora_embedding_A"), p.held("lora_embedding_B")
        else:
            A, B = self.held_factors(p)
        if view.dense and blocks == (1, 1):
            return A, B
        m = p.layer.get_base_layer()
        return view.A(m, A, blocks[0]), view.B(m, B, blocks[1])

    def kernels(self, p: Adapter) -> tuple[Tensor, Tensor]:
        own = type(self).factors is LoRA.factors and type(self).own_factors is LoRA.own_factors and not p.subtracts
        view, m = p.layer.view, p.layer.get_base_layer()
        if own and view.kernel(m) and view.groups(m) == 1:
            return self.held_factors(p)
        return self.factors(p)

    def held_factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """The weights of lora_A and lora_B, in their own shapes."""
        down, up = p.held("lora_A"), p.held("lora_B")
        A, B = down.weight, up.weight
        return (A, B) if type(A) in HELD and type(B) in HELD else (numbers(down), numbers(up))

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return self.with_first(p, *self.own_factors(p))

    def with_first(self, p: Adapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """[A; A0] and [B, -B0] where the initialisation takes B0 A0 out of the base weight."""
        if not p.__dict__["subtracts"]:
            return A, B
        A0, B0 = self.first_factors(p)
        return torch.cat([A, A0.to(A.dtype)], -2), torch.cat([B, -B0.to(B.dtype)], -1)

    def first_factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """A0, B0; taken now if the base weight was not there when the adapter was made."""
        if p.has(starts.FIRST[0]):
            return p.held_buffer(starts.FIRST[0]), p.held_buffer(starts.FIRST[1])
        if not p.has(starts.DERIVED[0]):
            self.follow_base(p, p.layer.stack(()))
        return p.held_buffer(starts.DERIVED[0]), p.held_buffer(starts.DERIVED[1])

    def scaling(self, p: Adapter) -> Any:
        return p.scaling

    def fitted(self, p: Adapter, key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        return room.padded(p, key, value, shape)

    def rest(self, p: Adapter) -> None:
        if p.subtracts:
            room.fill(p, *self.first_factors(p))

    def window(self, p: Adapter, key: str, held: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        return room.window(p, key, held, shape)

    def roomy(self, p: Adapter, rank: int) -> dict[str, Tensor]:
        found = room.widened(p, rank)
        if p.has(starts.DERIVED[0]):
            found.update(zip(starts.DERIVED, room.wide(*self.first_factors(p), rank), strict=True))
        return found

    def for_file(self, p: Adapter, key: str, value: Tensor) -> Tensor:
        return room.cut(p, key, value)

    def takes(self, p: Adapter, key: str, shape: tuple[int, ...]) -> bool:
        return room.fits(p, key, shape)

    def up_bias(self, p: Adapter) -> Tensor | None:
        if not p.__dict__["lora_bias"]:
            return None
        return p.held("lora_embedding_bias") if p.layer.view.infix else p.held("lora_B").bias

    def term(self, p: Adapter) -> tuple[Any, ...] | None:
        stated = type(self).forward in (LoRA.forward, InTraining.forward) and not self.some_positions
        stated = stated and (type(self).onto is LoRA.onto if self.direct else not p.layer.training)
        if not stated or hooked(p) or not p.layer.cast_input_dtype_enabled:
            return None
        return (*self.factors(p), self.scaling(p))

    def prepare(self, p: Adapter) -> None:
        """Note what the shortest way needs: the modules, if all of them are plain linear layers."""
        layer = p.layer
        base = layer._modules["base_layer"]
        plain = is_product(base) and layer.packed is None and not (p.lora_bias and p.subtracts)
        if plain and type(p.lora_A) is type(p.lora_B) is Linear:
            drop = None if "lora_dropout" in p.idle else p.lora_dropout
            p.hot = (base, p.lora_A, p.lora_B, drop, hooks_of(base))
        else:
            p.hot = None

    def by_row(self, p: Adapter) -> bool:
        """Whether all that `forward` does with a single row is two more products."""
        one = p.hot[1].in_features == 1  # of which the base's product has other bits
        stated = type(self).forward is LoRA.forward and type(p.scaling) is float
        return stated and not (one or p.lora_bias or p.subtracts)

    def is_plain(self, p: Adapter) -> bool:
        """Whether the adapter's modules stand as noted, and all that they do is two products with a linear layer."""
        drop = p.hot[3]
        drops = drop is not None and drop.training and type(drop) is not nn.Identity and drop.p
        more = p.__dict__["lora_bias"] or p.__dict__["subtracts"] or type(p.scaling) is not float
        return not (drops or more) and _unchanged(p, *p.hot)

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        hot = p.hot
        if hot is not None and inner.last is not None and type(self) is LoRA:
            found = several(p, inner, x)
            if found is not None:
                return found
        if hot is not None and inner.last is None and inner.extra is None and x.dim() > 1 and not x.is_nested:
            base, A, B, drop, hooks = hot
            graph = torch.compiler.is_compiling()
            if not (p.__dict__["lora_bias"] or hooked(p)) if graph else _unchanged(p, base, A, B, drop, hooks):
                held, a, b = base._parameters, A._parameters["weight"], B._parameters["weight"]
                W, bias = held["weight"], held["bias"]
                W = W.mT if type(base) is not nn.Linear and type(base) in TURNED else W
                if p.__dict__["lora_bias"]:
                    up = B._parameters["bias"] * p.scaling
                    bias = up.to(W.dtype) if bias is None else (bias + up).to(W.dtype)
                rate = 0.0 if drop is None or not drop.training or type(drop) is nn.Identity else drop.p
                alike = a.dtype is x.dtype and not rate
                if p.__dict__["subtracts"]:
                    a, b = self.together(p)
                y = None if graph else lowrank.ready(x, W, bias, a, b, p.scaling, rate)
                if y is not None:
                    return y
                own = (type(a) in HELD and type(b) in HELD) or numbers(A) is a  # not if somebody quantised them
                if own and (alike or (W.dtype is x.dtype and not W.requires_grad)):
                    return lowrank.generally(x, W, bias, a, b, p.scaling, rate)
        if inner.packed is not None and type(self).onto is LoRA.onto and not self.by_modules(p):
            y = quantised.beside(self, p, inner, x)
            if y is not None:
                return y
        y = summed_up(self, p, inner, x) if not inner.view.dense else None
        return self.onto(p, inner, inner(x), x) if y is None else y

    def together(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """`factors`; evaluation keeps them."""
        found: tuple[Tensor, Tensor] | None = still(p, "factors")
        if found is None and lasting(p):
            found = kept(p, lambda: self.factors(p), what="factors")
        return self.factors(p) if found is None else found

    def by_modules(self, p: Adapter) -> bool:
        return hooked(p) or not p.layer.cast_input_dtype_enabled

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if inner.view.applied(inner.base) and self.by_modules(p):
            return self.through_modules(p, inner, y, x)
        return super().onto(p, inner, y, x)

    def through_modules(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        """The same, by calling the modules: they may be wrapped, offloaded or hooked."""
        A, B = p.held("lora_A"), p.held("lora_B")
        if p.layer.cast_input_dtype_enabled:
            weight = getattr(A, "weight", x)
            x = x.to(weight.dtype) if weight.is_floating_point() else x
        x = F.dropout(x, self.drop_rate(p))
        update = B(A(x))
        if p.__dict__["subtracts"]:
            A0, B0 = self.first_factors(p)
            update = update - inner.low_rank(x, A0.to(x.dtype), B0.to(x.dtype))
        return (y + update * p.scaling).to(y.dtype)


class InTraining(LoRA):
    """A LoRA whose training takes another way, stated by `onto`."""

    direct = False

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        if p.layer.training:
            return self.onto(p, inner, inner(x), x)
        return super().forward(p, inner, x)


class OutProjection(LoRA):
    """LoRA on the out-projection of a targeted nn.MultiheadAttention: W' = W + 2 s B A.

    The peer adds this update twice, in its forward and in its merge alike, the second time as a constant of the
    gradient; adapter files are trained for it.
    """

    times = 2.0

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        update = super().delta(p, W, rows)
        return update + update.detach()

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        return Method.forward(self, p, inner, x)


def numbers(m: nn.Module) -> Tensor:
    """A factor's weight, or what a quantiser's tensor in its place stands for."""
    kind = storage.packed(m, "weight")
    return m.weight if kind is None else kind.read(m, "weight")  # type: ignore[return-value]


def hooks_of(m: nn.Module) -> tuple[dict[Any, Any], ...]:
    """The hooks that calling a module would run; each dictionary is the module's own."""
    return (m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks)


def hooked(p: Adapter) -> bool:
    """Whether lora_A or lora_B is more than its weight: wrapped, offloaded, hooked or patched."""
    if torch.compiler.is_compiling():  # as the graph is made: torch guards no hooks
        inner = (p.held("lora_A"), p.held("lora_B"))
        return any(len(m._forward_pre_hooks) or len(m._forward_hooks) for m in inner)
    if any(EVERYWHERE) or nn.Linear.forward is not FORWARD:
        return True
    for key in ("lora_A", "lora_B"):
        found = p.held(key)
        kind = type(found)
        if (kind not in PLAIN and CONVS.get(kind) is not kind.forward) or any(hooks_of(found)):
            return True
        if "forward" in found.__dict__:
            return True
    return False


def _unchanged(p: Adapter, base: Any, A: Any, B: Any, drop: Any, hooks: tuple[dict[Any, Any], ...]) -> bool:
    """Whether the modules noted by `prepare` still stand in their places, without hooks or patches."""
    m, name = p.layer._modules, p.name
    return (
        m["base_layer"] is base
        and m["lora_A"]._modules[name] is A
        and m["lora_B"]._modules[name] is B
        and (drop is None if "lora_dropout" not in m else m["lora_dropout"]._modules[name] is drop)
        and (FORWARD if type(base) is nn.Linear else FORMS.get(type(base))) is type(base).forward
        and type(A) is type(B) is Linear
        and nn.Linear.forward is FORWARD
        and "forward" not in base.__dict__
        and "forward" not in A.__dict__
        and "forward" not in B.__dict__
        and "_forward_hooks" not in A.__dict__  # a lean module has tables once there has been a hook
        and "_forward_hooks" not in B.__dict__
        and not any(hooks)
        and not any(EVERYWHERE)
        and "weight" in base._parameters  # some libraries make plain attributes of them
        and "bias" in base._parameters
    )
