"""A single row, as in decoding: products of a matrix and a vector, with the base's bits where nothing is added."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from peft import LoraConfig, get_peft_model
from peft.core.method import Delta
from peft.core.stack import Stack
from peft.kernels import lowrank
from peft.methods.lora.method import LoRA
from test_base_square import put

HALVES = [torch.bfloat16, torch.float16]
DORA = {"use_dora": True}
VIEWS = {"view", "_unsafe_view", "t", "detach", "alias"}


class Operations(TorchDispatchMode):
    """Names of the operations that compute something."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names += [] if name in VIEWS else [name]
        return func(*args, **(kwargs or {}))


def adapted(d, bias=False, dtype=torch.float32, start=False, over=None, **options):
    """A layer under an adapter of this dtype, over a weight of another where one is given."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(d, 7, bias=bias)).to(over or dtype)
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=start, **options)
    model = get_peft_model(base, config, autocast_adapter_dtype=over is not None).eval()
    model = model if over else model.to(dtype)
    if options.get("use_dora") and not start:
        with torch.no_grad():
            model.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(torch.rand(7) + 0.5)
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("over", [None, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d", [1, 2, 33])
@torch.no_grad()
def test_a_row_is_what_it_is_in_a_batch(d, bias, dtype, over, options):
    if over and dtype is not torch.float32:
        return
    model = adapted(d, bias, dtype, over=over, **options)
    batch = torch.randn(5, d).to(over or dtype)
    wanted = model(batch)
    tolerance = 2e-2 if torch.bfloat16 in (dtype, over) else 2e-3 if over else 1e-5
    for shape in ((1, d), (1, 1, d)):
        for _ in range(2):  # the second finds what evaluation keeps
            rows = torch.cat([model(row.view(shape)).reshape(1, 7) for row in batch])
            torch.testing.assert_close(rows, wanted, rtol=tolerance, atol=tolerance)
        assert model(batch[:1].view(shape)).shape == (*shape[:-1], 7)


@pytest.mark.parametrize("options, over", [({}, None), *((o, t) for o in ({}, DORA) for t in HALVES)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d", [1, 2, 33, 512])
@torch.no_grad()
def test_an_update_of_zero_leaves_the_bits_of_the_base(d, bias, options, over):
    model = adapted(d, bias, start=True, over=over, **options)
    if options:  # of a magnitude that is the norm to the last bit
        layer = model.base_model.model[0]
        p = layer.adapters["default"]
        p.lora_magnitude_vector.weight.copy_(p.method.norm(p))
    for x in torch.randn(20, 1, d).to(over or torch.float32):
        y = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), y)


@torch.no_grad()
def test_features_may_lie_apart():
    model = adapted(6)
    for x in (torch.randn(1, 12)[:, ::2], torch.randn(6, 1).t(), torch.randn(2, 1, 6)[1:], torch.randn(6).expand(1, 6)):
        torch.testing.assert_close(model(x), model(torch.cat([x, x]))[:1] if x.dim() == 2 else model(x[0])[None])


WANTED = [({}, ["mv", "mv", "addmv_"]), ({"use_dora": True}, ["mv", "mul_", "mv", "addmv_"])]


@pytest.mark.parametrize("options, wanted", WANTED, ids=str)
@torch.no_grad()
def test_operations_are_few(options, wanted):
    model = adapted(8, **options)
    x = torch.randn(1, 1, 8)
    model(x)
    with Operations() as seen:
        model(x)
    assert seen.names == wanted


class Marked(nn.Parameter):
    """A weight of a class of its own, which a library may have taught one product only."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func not in (torch.mv, torch.Tensor.mv, torch.addmv)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("case", ["autocast", "gradients", "vmap", "a class of weights"])
def test_elsewhere_the_base_makes_its_product(case):
    model = adapted(8)
    layer = model.base_model.model[0].base_layer
    x = torch.randn(1, 8)
    with torch.no_grad():
        wanted = model(x)
    if case == "a class of weights":
        layer._parameters["weight"] = torch.Tensor._make_subclass(Marked, layer.weight.data)
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        W, A, B = layer.weight, *(getattr(model.base_model.model[0], k)["default"].weight for k in ("lora_A", "lora_B"))
        if case == "vmap":
            y = torch.vmap(model)(x[None])[0]
        else:
            y = model(x)
            found = lowrank.ready(x, W, None, A, B, 1.0)
            assert found is None if case != "gradients" else found.grad_fn is not None
    assert y.dtype is (torch.bfloat16 if case == "autocast" else torch.float32)
    torch.testing.assert_close(y.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 64])
@torch.no_grad()
def test_a_trace_serves_any_number_of_rows(rows, options):
    model = adapted(8, **options)
    model(torch.randn(rows, 8))  # finds what evaluation keeps
    traced = torch.jit.trace(model.base_model.model, torch.randn(rows, 8), check_trace=False)
    for x in (torch.randn(1, 8), torch.randn(3, 8), torch.randn(64, 8)):
        torch.testing.assert_close(traced(x), model(x))


def short(model, x):
    """Whether a row goes the short way, and what comes out."""
    took = []
    with pytest.MonkeyPatch.context() as watched:
        for kind in (LoRA, Delta):  # the second is what DoRA takes
            whole = kind.forward
            watched.setattr(kind, "forward", lambda *args, whole=whole: took.append(1) or whole(*args))
        y = model(x)
    return not took, y


def replace(layer, key, dim):
    home = getattr(layer, key)
    made = type(home["default"])(*home["default"].weight.shape[::-1], bias=False)
    nn.init.normal_(made.weight)
    home["default"] = made.eval()


class Twice(nn.Module):
    def forward(self, W):
        return 2 * W


def doubled(module, args, y):
    return 2 * y


CHANGES = {
    "nothing": lambda model, layer: None,
    "a hook on the base": lambda model, layer: layer.base_layer.register_forward_hook(doubled),
    "a hook on A": lambda model, layer: layer.lora_A["default"].register_forward_hook(doubled),
    "a hook on B": lambda model, layer: layer.lora_B["default"].register_forward_hook(doubled),
    "a patch of the base": lambda model, layer: setattr(layer.base_layer, "forward", lambda x: x[..., :7] * 3),
    "a patch of A": lambda model, layer: setattr(layer.lora_A["default"], "forward", lambda x: x[..., :3]),
    "a patch of B": lambda model, layer: setattr(layer.lora_B["default"], "forward", lambda h: h.sum(-1, True) + 1),
    "another base": lambda model, layer: layer._modules.update(base_layer=nn.Linear(8, 7)),
    "another A": lambda model, layer: replace(layer, "lora_A", 3),
    "another B": lambda model, layer: replace(layer, "lora_B", 7),
    "another weight": lambda model, layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(7, 8))),
    "another weight of A": lambda model, layer: setattr(
        layer.lora_A["default"], "weight", nn.Parameter(torch.ones(3, 8))
    ),
    "a bias": lambda model, layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.randn(7))),
    "another scaling": lambda model, layer: layer.scaling.__setitem__("default", 5.0),
    "a rescaled layer": lambda model, layer: layer.scale_layer(3.0),
    "a tensor as the scaling": lambda model, layer: layer.scaling.__setitem__("default", torch.tensor(2.0)),
    "a pruned base": lambda model, layer: prune.l1_unstructured(layer.base_layer, "weight", amount=0.5),
    "a pruned bias": lambda model, layer: (
        setattr(layer.base_layer, "bias", nn.Parameter(torch.randn(7))),
        prune.l1_unstructured(layer.base_layer, "bias", amount=0.5),
    ),
    "a weight without a parameter": lambda model, layer: (
        layer.base_layer._parameters.pop("weight"),
        setattr(layer.base_layer, "weight", torch.randn(7, 8)),
    ),
    "a bias without a parameter": lambda model, layer: (
        layer.base_layer._parameters.pop("bias"),
        setattr(layer.base_layer, "bias", torch.randn(7)),
    ),
    "a parametrised base": lambda model, layer: parametrize.register_parametrization(
        layer.base_layer, "weight", Twice()
    ),
    "a parametrised A": lambda model, layer: parametrize.register_parametrization(
        layer.lora_A["default"], "weight", Twice()
    ),
    "dropout": lambda model, layer: layer.lora_dropout.update({"default": nn.Dropout(1.0).train()}),
    "a merge": lambda model, layer: model.merge_adapter(),
    "other weights": lambda model, layer: [p.normal_() for p in model.parameters()],
    "double precision": lambda model, layer: model.double(),
    "half a model": lambda model, layer: layer.base_layer.to(torch.bfloat16),
    "a second adapter": lambda model, layer: (
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)),
        model.base_model.set_adapter(["default", "b"]),
    ),
    "a switch": lambda model, layer: (
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)),
        model.set_adapter("b"),
        model(torch.zeros(1, 8, dtype=layer.base_layer.weight.dtype)),
    ),
    "none active": lambda model, layer: model.base_model.disable_adapter_layers(),
}
STILL = {"nothing", "another weight", "another weight of A", "a bias", "another scaling", "a rescaled layer"}
STILL |= {"other weights", "double precision", "half a model", "a switch"}
KINDS = pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])


@pytest.mark.parametrize("over", [None, *HALVES], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@KINDS
@torch.no_grad()
def test_whatever_changes_is_seen_by_the_next_row(options, change, over):
    if over and ("without a parameter" in change or change in ("double precision", "half a model")):
        return  # which make the same of any
    model = adapted(8, over=over, **options)
    x = torch.randn(1, 1, 8).to(over or torch.float32)
    model(x)  # the first call of a model looks for much else, and keeps a gain
    assert short(model, x)[0] and short(model, x)[0]
    CHANGES[change](model, model.base_model.model[0])
    model.base_model.model[0].get_base_layer().to(over)
    x = x.to(torch.float64 if change == "double precision" else torch.bfloat16 if "half" in change else x.dtype)
    took, found = short(model, x)
    again, once_more = short(model, x)
    if "adapter" not in change and change not in ("a merge", "none active"):
        assert took == (change in STILL and (not options or change in ("nothing", "a bias", "a switch")))
        assert again == (change in STILL)
    wanted = model(torch.cat([x, x]))[:1]  # two rows never go this way
    rounding = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(x.dtype, 1e-5)
    for y in (found, once_more):
        torch.testing.assert_close(y, wanted, rtol=rounding, atol=rounding if over else 1e-5)
    if change not in ("nothing", "a merge", "double precision"):
        fresh = adapted(8, over=over, **options)(x.to(over or torch.float32)).float()
        assert not torch.allclose(found.float(), fresh), "the change changes nothing"


def gradients(y, model, x):
    """Of some function of y with respect to x and all that learns."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.double().tanh().sum(), [x, *learnt], allow_unused=True)]


@pytest.mark.parametrize("rows", [1, 6, 200])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_seen_by_the_next_step(change, rows):
    model = adapted(8, use_dora=True).train()
    layer = model.base_model.model[0]
    x = torch.randn(rows, 8, requires_grad=True)
    model(x)  # the first call of a model looks for much else
    assert short(model, x)[0] and short(model, x)[0]
    with torch.no_grad():
        CHANGES[change](model, layer)
    kind = torch.float64 if change == "double precision" else torch.bfloat16 if "half" in change else torch.float32
    x = x.detach().to(kind).requires_grad_()
    for turn in range(2):
        took, y = short(model, x)
        if "adapter" not in change and change not in ("a merge", "none active", "a switch"):
            never = {"another weight", "double precision"}  # of W gradients are wanted; single precision alone is taken
            assert took == (
                change in (STILL - {"half a model"} | {"dropout"}) - never and (turn == 1 or change != "other weights")
            )
        found = gradients(y, model, x)
        run = layer._run or layer.base_layer
        wanted = gradients(getattr(run, "long", run)(x), model, x)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=2e-2 if "half" in change else 1e-4, atol=1e-5)


def test_dropout_goes_the_short_way_of_training():
    model = adapted(8, use_dora=True, lora_dropout=0.5).train()
    layer = model.base_model.model[0]
    x = torch.randn(6, 8, requires_grad=True)
    model(x)
    for rate in (0.5, 0.25, "evaluation"):
        if rate == "evaluation":
            model.eval()
        else:
            layer.lora_dropout["default"].p = rate
        made = []
        for long in (False, True):
            torch.manual_seed(1)
            took, y = (False, layer._run.long(x)) if long else short(model, x)
            assert took != long
            made.append(gradients(y, model, x))
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        torch.manual_seed(2)
        assert torch.equal(model(x), made[0][0]) == (rate == "evaluation")


TENSORS = {
    "W": lambda layer: layer.base_layer.weight,
    "A": lambda layer: layer.lora_A["default"].weight,
    "B": lambda layer: layer.lora_B["default"].weight,
    "m": lambda layer: layer.lora_magnitude_vector["default"].weight,
}


def moved(t):
    """To other memory at the same address, with other numbers."""
    put(t, moved.buffer, t.data.flip(0).clone())


WRITES = {
    "in place": lambda t: t.copy_(t.flip(0)),
    "elsewhere": lambda t: setattr(t, "data", t.data.flip(0).clone()),
    "at the same address": moved,
    "unseen before evaluation begins": lambda t: t.data.copy_(t.data.flip(0)),
}


@pytest.mark.parametrize("over", [None, *HALVES], ids=str)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_a_gain_is_of_the_numbers_that_tensors_hold(name, write, over):
    model, x = adapted(8, over=over, use_dora=True), torch.randn(1, 8).to(over or torch.float32)
    layer = model.base_model.model[0]
    t = TENSORS[name](layer)
    moved.buffer = bytearray(t.numel() * t.element_size())
    put(t, moved.buffer, t.data.clone())
    before = model(x)
    assert short(model, x)[0]
    WRITES[write](t)
    if "evaluation" in write:
        if name == "W":
            return  # is frozen
        model.eval()
    took, found = short(model, x)
    wanted, rounding = defined(layer, x.float()).to(x.dtype), {None: 1e-5, torch.float16: 2e-3}.get(over, 2e-2)
    assert not took and short(model, x)[0]
    for y in (found, model(x), model(torch.cat([x, x]))[:1]):
        torch.testing.assert_close(y, wanted, rtol=rounding, atol=rounding)
    assert not torch.allclose(found, before)


def defined(layer, x):
    """m V / |V| x, V = W + s B A."""
    W, A, B, m = (of(layer) for of in TENSORS.values())
    V = W.to(A.dtype) + layer.scaling["default"] * B @ A
    return x @ (m[:, None] * V / V.norm(dim=1, keepdim=True)).T


@pytest.mark.parametrize("what", ["magnitude", "its weight", "training", "the magnitude's home"])
@torch.no_grad()
def test_what_stands_elsewhere_is_seen(what):
    model, x = adapted(8, use_dora=True), torch.randn(1, 8)
    layer = model.base_model.model[0]
    model(x), model(x)
    home = layer.lora_magnitude_vector
    if what == "magnitude":
        home["default"] = copy.deepcopy(home["default"])
    elif what == "its weight":
        home["default"].weight = nn.Parameter(home["default"].weight * 2)
    elif what == "training":
        layer.training = True
        layer.lora_A["default"].weight.data.mul_(2)  # as optimisers may write
    else:
        layer._modules["lora_magnitude_vector"] = copy.deepcopy(home)
    for t in (TENSORS["m"](layer),) if what in ("magnitude", "the magnitude's home") else ():
        t.data.mul_(2)
    took, found = short(model, x)
    assert not took and short(model, x)[0] == (what != "training")
    for y in (found, model(x)):
        torch.testing.assert_close(y, defined(layer, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_gain_belongs_to_the_base_while_another_adapter_is_merged():
    model, x = adapted(8, use_dora=True), torch.randn(1, 8)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["b", "default"])
    wanted = model(x)
    for _ in range(2):
        model.merge_adapter(["b"])
        for _ in range(3):
            torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_both_ways_give_the_same_bits(bias):
    model = adapted(33, bias, use_dora=True)
    for x in torch.randn(20, 1, 33):
        model.eval()
        ways = [short(model, x) for _ in range(3)]
        assert [took for took, _ in ways] == [False, True, True]
        assert all(torch.equal(y, ways[0][1]) for _, y in ways)


@pytest.mark.parametrize(
    "options, taken",
    [({}, True), ({"start": "mica"}, True), ({"start": "pissa"}, False), ({"lora_bias": True}, False)],
    ids=str,
)
@torch.no_grad()
def test_only_what_is_two_more_products_is_taken_so(options, taken):
    model = adapted(8, **options)
    x = torch.randn(1, 8)
    model(x)
    took, found = short(model, x)
    assert took == taken
    torch.testing.assert_close(found, model(torch.cat([x, x]))[:1])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize(
    "change", ["nothing", "a patch of the base", "a hook on A", "another weight", "another scaling"]
)
@KINDS
@torch.no_grad()
def test_a_copy_looks_at_itself(options, copied, change):
    model, x = adapted(8, **options), torch.randn(1, 8)
    model(x)
    wanted = model(x)
    other = copied(model)
    assert torch.equal(other(x), wanted) and torch.equal(other(x), wanted)
    CHANGES[change](other, other.base_model.model[0])
    torch.testing.assert_close(other(x), other(torch.cat([x, x]))[:1])
    same = change == "nothing"
    assert torch.equal(other(x), wanted) == same and torch.equal(model(x), wanted)


@pytest.mark.parametrize("what", [lambda m: prune.random_unstructured(m, "weight", amount=0.5), nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_base_that_keeps_its_weight_elsewhere(what):
    torch.manual_seed(0)
    base = nn.Sequential(what(nn.Linear(8, 7)))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)).eval()
    x = torch.randn(1, 8)
    for _ in range(3):
        torch.testing.assert_close(model(x), model(torch.cat([x, x]))[:1])


def test_a_stack_with_rules_of_its_own_keeps_them():
    class Other(Stack):
        """As that of spread tensors is."""

    layer = adapted(8).base_model.model[0]
    for kind in (Stack, Other):
        stack = kind(layer, tuple(layer.adapters.values()))
        assert (layer._runner(stack) is stack) == (kind is Other)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_a_nested_row():
    model, x = adapted(8), torch.randn(1, 8)
    model(x), model(x)
    nested = torch.nested.nested_tensor([x])
    torch.testing.assert_close(model(nested).unbind()[0], model(x))


@KINDS
def test_gradients_take_the_way_of_training(options):
    model, x = adapted(8, **options), torch.randn(1, 8)
    model(x)
    assert short(model, x)[0] == short(model, x)[0] == bool(options)  # DoRA has a short one for training, too
    with torch.no_grad():
        assert short(model, x)[0] == (not options) and short(model, x)[0]
    with torch.inference_mode():
        assert short(model, x)[0]


@torch.no_grad()
def test_input_of_another_width_is_refused_as_ever():
    model = adapted(8)
    model(torch.randn(1, 8))
    for shape in ((8, 1), (2, 4), (1, 7)):
        with pytest.raises(RuntimeError):
            model(torch.randn(shape))
    assert model(torch.randn(8)).shape == (7,)
