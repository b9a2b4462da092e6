"""The Triton kernels beside torch's operations: values, gradients, masks, and the way to them through the library.

Without a GPU they run in Triton's interpreter, on the CPU: it shows that the programs compute the right numbers, and
nothing about a GPU. With one they run on it, and so do the tests that need one. `make kernels` is where Triton is.
"""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton", reason="Triton is not installed: `make kernels` runs these tests with it")

import triton.language as tl  # noqa: E402

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.kernels import choice, lowrank, scaled  # noqa: E402
from peft.kernels.triton import gained, launch, probe, update  # noqa: E402
from peft.kernels.triton.segments import segments  # noqa: E402
from peft.kernels.triton.update import How  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
HALVES, KINDS = (torch.float16, torch.bfloat16), (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # philox counts on overflow; NumPy tells of it
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind)[6:])


@pytest.fixture(autouse=True)
def multiplying(monkeypatch):
    """The interpreter multiplies bfloat16 as if its bits were integers (Triton 3.9): here it takes their values."""
    if triton.knobs.runtime.interpret:
        from triton.runtime.interpreter import InterpreterBuilder

        plain = InterpreterBuilder.create_dot

        def dot(self, a, b, *rest):
            wide = [self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
            return plain(self, *wide, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def chosen(monkeypatch):
    """The library as if the device of these tests were a GPU; lists which forms were used."""
    used: list[str] = []
    monkeypatch.setattr(choice, "devices", frozenset({DEVICE.type}))
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "reasons", {})

    def noted(owner: Any, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (used.append(name), function(*a, **k))[1])

    for name in ("linear", "add", "decode", "mixed", "place"):
        noted(update, name)
    for name in ("add", "norms"):
        noted(gained, name)
    from peft.kernels.triton import bank

    for name in ("mixed", "place"):
        monkeypatch.setattr(bank, name, getattr(update, name))
    return used


def drawn(*shape: int, kind: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, kind)


def near(found: torch.Tensor, wanted: torch.Tensor, kind: torch.dtype) -> None:
    """The same but for rounding in `kind`, as a share of the largest element."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    assert (found - wanted).abs().max() <= probe.LIMITS[kind] / 2 * wanted.abs().max()


SHAPES = [(1, 1, 1, 1), (3, 17, 5, 2), (16, 64, 96, 8), (33, 130, 71, 16), (5, 40, 33, 37), (18, 72, 50, 128)]


@each_kind
@pytest.mark.parametrize(("n", "d", "k", "r"), SHAPES)
def test_shrink_expand_and_outer_are_the_products(n, d, k, r, kind):
    torch.manual_seed(n)
    x, A, B, y = drawn(n, d, kind=kind), drawn(r, d, kind=kind), drawn(k, r, kind=kind), drawn(n, k, kind=kind)
    h = launch.shrink(x, A, r)
    wanted = x.double() @ A.double().mT
    near(h.sum(0), wanted, kind)
    kept = y.clone()
    out = launch.expand(h, B, y, 0.5)
    assert out is y, "the update is accumulated in place"
    near(out, kept.double() + wanted @ B.double().mT * 0.5, kind)
    near(launch.expand(h, B.mT.contiguous(), kept.clone(), 0.5, by_rank=True), out, kind)
    near(launch.outer(h.sum(0), x, r, kind, 2.0), h.sum(0).double().mT @ x.double() * 2.0, kind)


@each_kind
@pytest.mark.parametrize(("n", "d", "k", "r"), [s for s in SHAPES if s[0] <= launch.FEW])
def test_a_few_tokens_take_one_launch(n, d, k, r, kind):
    x, A, B, y = drawn(n, d, kind=kind), drawn(r, d, kind=kind), drawn(k, r, kind=kind), drawn(n, k, kind=kind)
    wanted = y.double() + x.double() @ A.double().mT @ B.double().mT * 0.5
    near(launch.few(x, A, B, y, 0.5), wanted, kind)


def batch(ranks, rows, d, k, kind, positions=1):
    """(y, x, A, B, how) of a mixed batch; rows: (slot, rows of the batch)."""
    total = sum(len(mine) for _, mine in rows) * positions
    starts = torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32, device=DEVICE)
    at = segments(rows, len(ranks), positions, DEVICE)
    factors = drawn(sum(ranks), d, kind=kind, scale=d**-0.5), drawn(sum(ranks), k, kind=kind)
    return drawn(total, k, kind=kind), drawn(total, d, kind=kind), *factors, How(0.7, max(ranks), at=at, starts=starts)


def by_hand(y, x, A, B, how, rows, ranks):
    """The definition, a token at a time."""
    out, T = y.double().clone(), how.at.positions
    starts = [0, *itertools.accumulate(ranks)]
    for slot, mine in rows:
        for t in (row * T + position for row in mine for position in range(T)):
            if slot >= 0:
                a, b = (m[starts[slot] : starts[slot + 1]].double() for m in (A, B))
                out[t] += 0.7 * (x[t].double() @ a.mT @ b)
    return out


BATCHES = {
    "one adapter": ([4], [(0, [0, 1, 2])], 1),
    "mixed ranks, an empty slot, rows in disorder": ([3, 1, 8, 16], [(2, [5, 0]), (0, [4, 1]), (3, [2, 3])], 1),
    "rows without an adapter": ([8, 2], [(-1, [0, 6]), (1, [2, 1, 3]), (0, [5]), (-1, [4])], 3),
    "more tokens than a tile": ([5, 128], [(1, [1]), (0, [0, 2])], 21),
    "no adapter at all": ([4, 4], [(-1, [0, 1])], 2),
}


@each_kind
@pytest.mark.parametrize("name", BATCHES)
def test_each_row_gets_the_update_of_its_adapter(name, kind):
    ranks, rows, positions = BATCHES[name]
    y, x, A, B, how = batch(ranks, rows, 35, 50, kind, positions)
    wanted = by_hand(y, x, A, B, how, rows, ranks)
    near(update.place(y.clone(), x, A, B, how), wanted, kind)
    near(update.plain(y, x, A, B, how), wanted, kind)
    alone = [
        t for slot, mine in rows for row in mine for t in range(row * positions, (row + 1) * positions) if slot < 0
    ]
    assert torch.equal(update.place(y.clone(), x, A, B, how)[alone], y[alone])


def gradients(form, inputs, g):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = form(*inputs)
    return y, torch.autograd.grad(y, inputs, g.to(y.dtype))


def compare(form, plain, inputs, kind):
    """Values and every gradient beside the definition in double precision."""
    y = form(*inputs)
    g = drawn(*y.shape, kind=y.dtype)
    y, found = gradients(form, inputs, g)
    expected, wanted = gradients(plain, [t.double() for t in inputs], g.double())
    near(y, expected, kind)
    for mine, other in zip(found, wanted, strict=True):
        near(mine, other, kind)


@each_kind
@pytest.mark.parametrize("name", [n for n in BATCHES if n != "no adapter at all"])
def test_gradients_of_a_mixed_batch(name, kind):
    ranks, rows, positions = BATCHES[name]
    *inputs, how = batch(ranks, rows, 35, 50, kind, positions)
    compare(lambda *t: update.mixed(*t, how), lambda *t: update.plain(*t, how), inputs, kind)


TWO = [(kind, kind) for kind in KINDS] + [(kind, torch.float32) for kind in HALVES]


@pytest.mark.parametrize(("kind", "thin"), TWO, ids=lambda kind: str(kind)[6:])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(("n", "d", "k", "r"), [(37, 70, 45, 5), (130, 33, 20, 40)])
def test_gradients_under_dropout_are_those_of_one_mask(n, d, k, r, rate, kind, thin):
    x, W, A, B = drawn(n, d, kind=kind), drawn(k, d, kind=kind), drawn(r, d, kind=thin), drawn(r, k, kind=thin)
    how = update.one(x, r, 0.5, rate)
    assert how.scale == pytest.approx(0.5 / (1 - rate))
    mask, b, y = update.mask_of(x, how), drawn(k, kind=kind), drawn(n, k, kind=kind)

    def linear(x, b, A, B):
        return update.plain(x @ W.to(x.dtype).mT + b, x, A, B, how, mask)

    compare(lambda x, b, A, B: update._Linear.apply(x, W, b, A, B, how), linear, (x, b, A, B), kind)
    compare(lambda *t: update._Add.apply(*t, how), lambda *t: update.plain(*t, how, mask), (y, x, A, B), kind)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_is_told_by_the_seed_alone(rate):
    x = drawn(96, 130)
    torch.manual_seed(3)
    first, second = launch.seed_of(x), launch.seed_of(x)
    torch.manual_seed(3)
    assert torch.equal(launch.seed_of(x), first), "torch's generator says where a mask begins"
    mask = launch.mask(x, first, rate)
    assert float(mask.float().mean()) == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / mask.numel()) ** 0.5)
    assert torch.equal(mask, launch.mask(x, first, rate)) and not torch.equal(mask, launch.mask(x, second, rate))
    lines = torch.cat([mask.float().mean(0), mask.float().mean(1)])
    assert (lines - (1 - rate)).abs().max() < 6 * (rate * (1 - rate) / 96) ** 0.5, "no row or column is special"
    one = torch.eye(130, device=DEVICE)  # h of the identity is the mask itself, whatever the blocks
    assert torch.equal(launch.shrink(x, one[:128], 128, seed=first, rate=rate).sum(0), (x * mask)[:, :128])
    back = launch.expand(x.new_ones(1, 96, 1), x.new_ones(130, 1), torch.zeros_like(x), 1.0, seed=first, rate=rate)
    assert torch.equal(back, mask.float())


@pytest.mark.parametrize(("kind", "thin"), TWO, ids=lambda kind: str(kind)[6:])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("biased", [True, False])
def test_a_gain_is_applied_with_all_its_gradients(biased, rate, kind, thin):
    n, d, k, r = 37, 50, 45, 6
    x, y, A, B = drawn(n, d, kind=kind), drawn(n, k, kind=kind), drawn(r, d, kind=thin), drawn(r, k, kind=thin)
    m, norm, b = drawn(k, kind=thin), drawn(k).abs() + 1, drawn(k, kind=kind)
    how = update.one(x, r, 0.5, rate)
    mask, more = update.mask_of(x, how), (b,) if biased else ()

    def form(y, x, A, B, m, b=None):
        return gained._Gained.apply(y, x, A, B, how, m, norm, b)

    def plain(y, x, A, B, m, b=None):
        return gained.plain(y, x, A, B, how, m / norm, b, mask)

    compare(form, plain, (y, x, A, B, m, *more), kind)


@each_kind
@pytest.mark.parametrize(("k", "d", "r"), [(5, 3, 1), (33, 70, 20), (64, 128, 128)])
def test_the_norm_is_that_of_the_dense_sum(k, d, r, kind):
    W, A, B = drawn(k, d, kind=kind), drawn(r, d), drawn(k, r)
    found = gained.norms(W, scaled.square(W), A, B, 0.3)
    near(found, torch.linalg.vector_norm(W.double() + 0.3 * B.double() @ A.double(), dim=-1), torch.float32)
    assert not gained.norms(W * 0, scaled.square(W * 0), A, B * 0, 0.3).any(), "and no number is made of zero"


@pytest.mark.parametrize("form", ["linear", "add", "gain"])
def test_second_derivatives_are_those_of_the_definition(form):
    n, d, k, r, rate = 9, 20, 15, 3, 0.3
    x, y, W, A, B = drawn(n, d), drawn(n, k), drawn(k, d), drawn(r, d), drawn(r, k)
    how, m, norm = update.one(x, r, 0.5, rate), drawn(k), drawn(k).abs() + 1
    mask = update.mask_of(x, how)
    forms = {
        "linear": (
            lambda x, A, B, y, m: update._Linear.apply(x, W, None, A, B, how),
            lambda x, A, B, y, m: update.plain(x @ W.mT, x, A, B, how, mask),
        ),
        "add": (
            lambda x, A, B, y, m: update._Add.apply(y, x, A, B, how),
            lambda x, A, B, y, m: update.plain(y, x, A, B, how, mask),
        ),
        "gain": (
            lambda x, A, B, y, m: gained._Gained.apply(y, x, A, B, how, m, norm, None),
            lambda x, A, B, y, m: gained.plain(y, x, A, B, how, m / norm, None, mask),
        ),
    }

    def twice(function):
        inputs = [t.detach().clone().requires_grad_() for t in (x, A, B, y, m)]
        first = torch.autograd.grad(function(*inputs).tanh().sum(), inputs, create_graph=True, allow_unused=True)
        size = sum(g.square().sum() for g in first if g is not None)
        return torch.autograd.grad(size, inputs, allow_unused=True)

    for found, wanted in zip(*map(twice, forms[form]), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            near(found, wanted, torch.float32)


# ---- through the library -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers, (B, T, 48) -> (B, T, 40)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(48, 64), nn.Linear(64, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


def adapted(kind=torch.float32, names=("default",), **options):
    """A model whose adapters all do something; ranks differ."""
    torch.manual_seed(0)
    model = None
    for i, name in enumerate(names):
        config = LoraConfig(r=4 + 3 * i, lora_alpha=8, target_modules=["one", "two"], **options)
        if model is None:
            model = get_peft_model(Net().to(DEVICE, kind), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model


def test_decoding_takes_the_short_kernel(chosen, monkeypatch):
    model, x = adapted().eval(), drawn(2, 1, 48)
    with torch.no_grad():
        found = model(x)
        assert chosen == ["decode"] * 3, "once in the trial, and once in each layer"
        monkeypatch.setattr(choice, "devices", frozenset())
        near(found, model(x), torch.float32)


@pytest.mark.parametrize("training", [False, True])
def test_a_mixed_batch_takes_the_bank(chosen, monkeypatch, training):
    names, rows, x = ("u1", "u2", "u3"), ["u2", "u1", "__base__", "u2", "u3", "u1", "u2"], drawn(7, 3, 48)

    model, other = adapted(names=names).eval(), adapted(names=names).eval()
    other.load_state_dict(model.state_dict())

    def run(model):
        learning = [p.requires_grad_(training) for n, p in model.named_parameters() if "lora_" in n]
        with torch.set_grad_enabled(training):
            y = model(x, adapter_names=rows)
        return y, torch.autograd.grad(y.square().mean(), learning) if training else ()

    y, found = run(model)
    assert chosen.count("mixed" if training else "place") >= 2 and not choice.reasons
    monkeypatch.setattr(choice, "devices", frozenset())
    expected, wanted = run(other)
    near(y, expected, torch.float32)
    for mine, other in zip(found, wanted, strict=True):
        near(mine, other, torch.float32)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_a_training_step_with_dropout_learns_by_the_kernels(chosen, kind, dora):
    model, x = adapted(kind, use_dora=dora, lora_dropout=0.2).train(), drawn(5, 4, 48, kind=kind)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=0.02)

    def loss():
        return model(x).float().square().mean()

    with torch.no_grad():
        before = loss()
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        assert loss() < 0.9 * before
    assert {"add", "norms"} <= set(chosen) if dora else {"linear"} <= set(chosen)
    assert not choice.reasons


def test_the_seed_tells_what_a_step_drops(chosen):
    model, x = adapted(lora_dropout=0.5).train(), drawn(4, 6, 48)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(model(x))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


# ---- standing back -------------------------------------------------------------------------------------------------


def training(model, x):
    torch.manual_seed(1)
    return model(x).square().mean()


@pytest.mark.parametrize(
    "why", ["float64", "strided", "autocast", "rank", "frozen A", "compile", "vmap", "forward mode", "setting"]
)
def test_where_the_kernels_do_not_apply_torch_takes_over(chosen, monkeypatch, why):
    n, d, k, r = 6, 20, 15, 200 if why == "rank" else 4
    kind = torch.float64 if why == "float64" else torch.float32
    x, W, A, B = (drawn(*s, kind=kind) for s in ((n, d), (k, d), (r, d), (k, r)))
    A.requires_grad_(why != "frozen A"), B.requires_grad_()
    if why == "strided":
        A = drawn(d, r).mT.requires_grad_()
    if why == "setting":
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        assert choice._devices() >= {"cuda"}
        monkeypatch.setenv("PEFT_KERNELS", "torch")
        monkeypatch.setattr(choice, "devices", choice._devices())

    def run(x):
        return lowrank.linear(x, W, None, A, B, 0.5, 0.3 if why != "vmap" else 0.0)

    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=why == "autocast"):
        if why == "compile":
            y = torch.compile(run, backend="eager", fullgraph=True)(x)
        elif why == "vmap":
            with torch.no_grad():
                y = torch.vmap(run)(x[:, None])[:, 0]
        elif why == "forward mode":
            y, _ = torch.func.jvp(run, (x,), (x,))
        else:
            y = run(x)
    assert y.shape == (n, k) and y.isfinite().all()
    assert not chosen


def test_a_setting_that_is_none_is_told(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS", "tritn")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS is 'tritn', but must be one of auto, torch"):
        choice._devices()


def test_a_layer_that_keeps_a_bank_can_be_copied_and_pickled(chosen):
    model, x = adapted(names=("u1", "u2")).eval(), drawn(2, 1, 48)
    with torch.no_grad():
        y = model(x, adapter_names=["u2", "u1"])
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            near(twin(x, adapter_names=["u2", "u1"]), y, torch.float32)
    assert "place" in chosen


def test_a_checkpointed_layer_finds_the_same_mask_again(chosen):
    model, x = adapted(lora_dropout=0.5).train(), drawn(3, 4, 48).requires_grad_()
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(5)
        found.append(torch.autograd.grad(run(x).square().mean(), x)[0])
    near(found[1], found[0], torch.float32)
    assert "linear" in chosen


def test_a_kernel_that_fails_or_lies_is_not_used(chosen, monkeypatch):
    model, x = adapted().eval(), drawn(2, 1, 48)
    with torch.no_grad():
        monkeypatch.setattr(probe.launch, "few", lambda x, A, B, y, scale: y.zero_())
        model(x)
        assert list(choice.reasons.values()) == ["its numbers are not torch's"]
        choice._known.clear()

        def broken(*_):
            raise RuntimeError("no such device")

        monkeypatch.setattr(probe.launch, "few", broken)
        found = model(x)
        assert list(choice.reasons.values()) == ["RuntimeError: no such device"]
        monkeypatch.setattr(choice, "devices", frozenset())
        assert torch.equal(found, model(x))


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peft.kernels.triton import gain, thin

HALF, FULL = ("x", "v", "A", "B", "W", "g", "y", "bias", "inner"), ("h", "u", "squares", "gram", "of_gain", "of_bias")
TYPES = dict.fromkeys(HALF, "*bf16") | dict.fromkeys(FULL, "*fp32") | {
    "gain": "*fp32", "seed": "*i64", "index": "*i64", "tiles": "*i32", "spans": "*i32", "starts": "*i32",
    "scale": "fp32", "rate": "fp32"}
BLOCKS = dict(BLOCK_N=16, BLOCK_R=16, BLOCK_D=32, BLOCK_K=32, PRECISION="ieee", SPLIT=2, PARTS=2)
FLAGS = dict(DROP=True, SEGMENTED=True, GAIN=True, BIAS=True, KIND=triton.language.bfloat16)
for kernel, out in ((thin.shrink, "*fp32"), (thin.expand, "*bf16"), (thin.outer, "*fp32"), (thin.few, "*bf16"),
                    (thin.mask, "*u8"), (gain.back, "*fp32"), (gain.norms, "*fp32")):
    names = kernel.arg_names
    fixed = {n: v for n, v in (BLOCKS | FLAGS).items() if n in names}
    kinds = TYPES | {"out": out} | (dict(A="*fp32", B="*fp32") if kernel is gain.norms else {})
    signature = {n: "constexpr" if n in fixed else kinds.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in fixed.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_every_kernel_compiles_for_a_gpu_without_one(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env)
    if "ptxas" in done.stderr and "Cannot find" in done.stderr:
        pytest.skip("this build of Triton has no assembler for NVIDIA's GPUs")
    assert done.returncode == 0, done.stderr


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@on_gpu
def test_the_kernels_are_right_on_this_gpu():
    for rank, x, form in itertools.product((8, 64, 128), KINDS, probe.TRIED):
        for A in {x, torch.float32}:
            assert probe.right(form, DEVICE, rank, x, A), (form, rank, x, A)


@on_gpu
def test_decoding_can_be_recorded_in_a_graph():
    model, x = adapted(torch.bfloat16).eval(), drawn(4, 1, 48, kind=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            wanted = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
    assert torch.equal(y, wanted) and not choice.reasons


@on_gpu
def test_the_library_uses_them_without_being_asked():
    assert "cuda" in choice.devices
    model, x = adapted(torch.bfloat16, lora_dropout=0.1).train(), drawn(64, 48, kind=torch.bfloat16)
    model(x).float().square().mean().backward()
    assert choice._known and not choice.reasons
