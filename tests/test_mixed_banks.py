"""Mixed batches whose low-rank adapters run together: what each row gets is what its adapter alone gives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import calls
from conformance.layouts import Around, Layout
from conformance.rows import METHODS, adapted, close, config, train, tuner_layers
from peft import LoraConfig, get_peft_model
from peft.core.banks import Banks
from peft.core.rows import Groups
from peft.kernels import grouped

LINEAR = Layout("linear", lambda: Around(nn.Linear(12, 16)), (9, 12))
NAMES = ("default", "one", "two", "three")
BATCHES = {
    "equal": ["default", "one", "two"] * 3,
    "sorted": ["default"] * 3 + ["one"] * 3 + ["two"] * 3,
    "few": ["two", "__base__", "default", "two", "two", "__base__", "default", "two", "two"],
    "uneven": ["default"] * 6 + ["one", "three", "two"],
    "one": ["one"] * 9,
}


def unit(method: str) -> bool:
    """Whether each sample counts for itself, without being told of."""
    row = METHODS[method]
    return row.forbidden(LINEAR) is None and not row.tasks and row.of_input is None


KNOWN = [m for m in METHODS if unit(m)]


def several(method: str = "lora", layout: Layout = LINEAR, ranks: tuple[int, ...] = (), **changes):
    """A model with four adapters, of these ranks if they are given."""
    model = adapted(method, layout, **changes)
    for i, name in enumerate(NAMES[1:]):
        mine = {"r": ranks[i + 1]} if ranks else {}
        model.add_adapter(name, config(method, layout, **{**changes, **mine}))
        train(model, name, seed=i + 1)
    return model.eval()


def apart(model, x: Tensor, names: list[str]) -> Tensor:
    """Each sample alone under its adapter."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(x[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


def banked(model) -> list[str]:
    """The adapters that run together in the model's layer."""
    ((_, layer),) = tuner_layers(model)
    return [n for bank in Banks(layer, NAMES).banks for n in bank.names]


def parameters(model) -> list[nn.Parameter]:
    ((_, layer),) = tuner_layers(model)
    for name in NAMES:
        layer.set_requires_grad(name, True)
    return [p for name in NAMES for p in layer.adapter_parameters(name)]


@pytest.fixture(params=["beside", "apart"])
def way(request, monkeypatch):
    """Whether each row is multiplied with the factors of all adapters, or with its own."""
    suits = grouped.suits
    monkeypatch.setattr(
        grouped, "suits", lambda A, *sizes: request.param == "beside" and suits(A[:, :0], *sizes)
    )  # as if the rank were 0, so that only dtype and device count


@pytest.mark.parametrize("batch", ["few", "uneven"])
@pytest.mark.parametrize("method", KNOWN)
def test_each_row_has_its_own_adapter(method, batch):
    model, x, names = several(method), LINEAR.x(), BATCHES[batch]
    with torch.no_grad():
        found = [model(x, adapter_names=names) for _ in range(2)]
        wanted = apart(model, x, names)
    for y in found:
        close(y, wanted, 1e-5)


def test_every_method_that_states_factors_runs_together():
    together = {m for m in KNOWN if len(banked(several(m))) == len(NAMES)}
    assert {"lora", "rslora", "adalora", "vera", "randlora", "vblora", "unilora", "delora", "psoft"} & set(
        KNOWN
    ) <= together


@pytest.mark.parametrize("batch", ["uneven"])
@pytest.mark.parametrize("method", KNOWN)
def test_gradients_are_those_of_the_adapters_alone(method, batch):
    model, names = several(method), BATCHES[batch]
    x = LINEAR.x().requires_grad_()
    with torch.no_grad():
        model(x, adapter_names=names)  # which keeps what has no gradients
    found = gradients(lambda: model(x, adapter_names=names), [x, *parameters(model)])
    grads = []
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else _under(model, name):
            grads.append(gradients(lambda i=i: model(x[i : i + 1]), [x, *parameters(model)], i))
    wanted = [torch.stack(alone).sum(0) for alone in zip(*grads, strict=True)]
    close(*(torch.cat([g.flatten() for g in each]) for each in (found, wanted)), 1e-5)


class _under:
    def __init__(self, model, name):
        model.set_adapter(name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def gradients(run, inputs: list[Tensor], row: int | None = None) -> list[Tensor]:
    y = run()
    weights = torch.linspace(-1, 1, 9 * y[0].numel()).view(9, *y.shape[1:])
    weights = weights if row is None else weights[row : row + 1]
    found = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("shape", [(9, 12), (9, 5, 12), (9, 2, 3, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 3, 4, 16)])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.usefixtures("way")
def test_any_rank_any_positions_any_dtype(shape, dtype, ranks, batch):
    layout = Layout("linear", lambda: Around(nn.Linear(12, 16)), shape)
    base = get_peft_model(layout.model(dtype), config("lora", layout, r=ranks[0]))
    for i, name in enumerate(NAMES):
        if i:
            base.add_adapter(name, config("lora", layout, r=ranks[i]))
        train(base, name, seed=i)
    model, x = base.eval(), layout.x(dtype)
    with torch.no_grad():
        close(model(x, adapter_names=BATCHES[batch]), apart(model, x, BATCHES[batch]))
    assert len(banked(model)) == len(NAMES)


# ---- what is kept is made anew when it is old ----------------------------------------------------------------


def layer_of(model):
    return tuner_layers(model)[0][1]


def written(model):
    layer_of(model).lora_A["one"].weight.mul_(2)


def new_parameter(model):
    layer_of(model).lora_B["two"].weight = nn.Parameter(torch.randn(16, layer_of(model).r["two"]))


def new_module(model):
    layer_of(model).lora_A["one"] = nn.Linear(12, layer_of(model).r["one"], bias=False)


def new_data(model):
    layer_of(model).lora_A["one"].weight.data = torch.randn(layer_of(model).r["one"], 12)


def scaled(model):
    layer_of(model).scaling["one"] = 7.0


def rescaled(model):
    layer_of(model).set_scale("two", 3.0)


def loaded(model):
    from peft import set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict

    state = {k: v + 1 for k, v in get_peft_model_state_dict(model, adapter_name="two").items()}
    set_peft_model_state_dict(model, state, "two")


def deleted(model):
    model.delete_adapter("one")
    model.add_adapter("one", config("lora", LINEAR))
    train(model, "one", seed=11)


def hooked(model):
    layer_of(model).lora_A["one"].register_forward_hook(lambda m, args, y: y * 3)


def patched(model):
    module = layer_of(model).lora_B["one"]
    module.forward = lambda x: nn.Linear.forward(module, x) * 2


def cast(model):
    model.to(torch.float64)
    model.to(torch.float32)
    written(model)


def stepped(model):
    with torch.enable_grad():
        held = parameters(model)
        optimiser = torch.optim.AdamW(held, lr=0.1)
        model(LINEAR.x(), adapter_names=BATCHES["equal"]).square().sum().backward()
        optimiser.step()


def stepped_as_one(model):
    learnt = [p for n, p in model.named_parameters() if "lora_" in n]
    for p in learnt:
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(learnt, lr=0.1, fused=True).step()  # which writes uncounted


def new_data_at_an_address_of_before(model):
    weight = layer_of(model).lora_A["one"].weight
    for _ in range(4):  # memory that is freed is given out again
        weight.data = weight.data * 2


def in_inference_mode(model):
    with torch.inference_mode():
        layer_of(model).lora_A["one"].weight.mul_(2)


CHANGES = [
    written, new_parameter, new_module, new_data, scaled, rescaled, loaded, deleted, hooked, patched, cast, stepped,
    stepped_as_one,    new_data_at_an_address_of_before, in_inference_mode,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("way")
def test_a_change_of_an_adapter_is_seen(change):
    model, x, names = several(), LINEAR.x(), BATCHES["equal"]
    with torch.no_grad():
        before = model(x, adapter_names=names)
        change(model)
        found = model(x, adapter_names=names)
        assert not torch.allclose(found, before)
        close(found, apart(model, x, names), 1e-5)


@pytest.mark.parametrize("change", [written, scaled, "base", "replaced", "magnitude"])
def test_a_magnitude_follows_its_base(change):
    model, x, names = several("dora"), LINEAR.x(), BATCHES["equal"]
    assert len(banked(model)) == len(NAMES)
    layer = layer_of(model)
    with torch.no_grad():
        before = model(x, adapter_names=names)
        if change == "base":
            layer.base_layer.weight.add_(0.1)
        elif change == "replaced":
            layer.base_layer.weight = nn.Parameter(torch.randn(16, 12))
        elif change == "magnitude":
            layer.lora_magnitude_vector["two"].weight.mul_(2)
        else:
            change(model)
        found = model(x, adapter_names=names)
        assert not torch.allclose(found, before)
        close(found, apart(model, x, names), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 12), (9, 5, 12)])
@pytest.mark.parametrize(("method", "options"), [("loha", {"r": 2}), ("dora", {}), ("loha-dora", {"r": 2})])
def test_products_of_matrices_and_magnitudes_run_together_where_that_pays(method, options, shape, dtype):
    layout = Layout("linear", lambda: Around(nn.Linear(12, 16)), shape)
    model = adapted(method, layout, dtype, **options)
    for i, name in enumerate(NAMES[1:]):
        model.add_adapter(name, config(method, layout, **options))
        train(model, name, seed=i + 1)
    model, x = model.eval(), layout.x(dtype)
    assert len(banked(model)) == (0 if method == "loha-dora" else len(NAMES))
    for batch in BATCHES.values():
        with torch.no_grad():
            close(model(x, adapter_names=batch), apart(model, x, batch))


def test_a_layer_that_runs_again_in_a_call_looks_again():
    model, x, names = several(), LINEAR.x(), BATCHES["equal"]
    layer = layer_of(model)
    with torch.no_grad(), layer.call.open(names=tuple(names), beams=1, length=None):
        first = [layer(x) for _ in range(2)]
        close(*first)
        written(model)
        found = layer(x)
    assert not torch.allclose(found, first[0])
    with torch.no_grad():
        close(found, apart(model, x, names), 1e-5)


def test_layers_that_are_told_names_themselves_look_each_time():
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["0", "1"], "init_lora_weights": False}
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(**options)).eval()
    first, second = (layer for _, layer in tuner_layers(model))
    x, names = torch.randn(2, 8), ["default", "__base__"]
    with torch.no_grad():
        model(x, adapter_names=names)
        first(x, adapter_names=names)
        second.lora_B["default"].weight.mul_(2)
        found = second(x, adapter_names=names)
        close(found, torch.cat([second(x[:1]), second.base_layer(x[1:])]), 1e-5)


def test_gradients_go_to_those_that_took_part_alone():
    model, x = several(), LINEAR.x()
    held = parameters(model)
    for batch in ("one", "few", "equal"):
        y = model(x, adapter_names=BATCHES[batch])
        grads = torch.autograd.grad(y.sum(), held, allow_unused=True)
        got = {n for n, g in zip([n for n in NAMES for _ in range(2)], grads, strict=True) if g is not None}
        assert got == set(BATCHES[batch]) - {"__base__"}


def test_in_training_nothing_is_copied_for_later_but_places():
    model, x, names = several(), LINEAR.x(), BATCHES["equal"]
    layer, held = layer_of(model), parameters(model)
    model(x, adapter_names=names).sum().backward()
    kept = layer.call.banks[layer]
    assert all(bank._made is None for bank in kept.banks)
    for p in held:
        p.data.add_(1)  # as optimisers may, which nobody counts
    x.requires_grad_()
    found = model(x, adapter_names=names)
    assert layer.call.banks[layer] is kept
    with torch.no_grad():
        close(found, apart(model, x, names), 1e-5)


def test_dropout_in_training_is_each_adapters_own():
    model, x, names = several(lora_dropout=0.5), LINEAR.x(), BATCHES["equal"]
    layer = layer_of(model)
    with torch.no_grad():
        first = model(x, adapter_names=names)
        layer.train()
        assert not torch.allclose(model(x, adapter_names=names), first)
        layer.eval()
        close(model(x, adapter_names=names), first)


def test_unchanged_adapters_are_collected_once():
    model, x, layer = several(), LINEAR.x(), None
    layer = layer_of(model)
    with torch.no_grad():
        for batch in ("equal", "few", "sorted", "one"):
            model(x, adapter_names=BATCHES[batch])
            kept = layer.call.banks[layer]
        model(x, adapter_names=BATCHES["equal"])
        assert layer.call.banks[layer] is kept
        model(x, adapter_names=BATCHES["uneven"])
        assert layer.call.banks[layer].names == {"default", "one", "two", "three"}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_model_has_banks_of_its_own(again):
    model, x, names = several(), LINEAR.x(), BATCHES["equal"]
    with torch.no_grad():
        before = model(x, adapter_names=names)
        other = again(model)
        assert not other.base_model.call.banks
        written(other)
        assert not torch.allclose(other(x, adapter_names=names), before)
        close(model(x, adapter_names=names), before)


def test_what_a_layer_keeps_is_given_to_no_other_of_its_number():
    model, x, names = several(), LINEAR.x(), BATCHES["equal"]
    layer = layer_of(model)
    other, ledger = layer_of(copy.deepcopy(model)), layer.call.banks
    with torch.no_grad():
        model(x, adapter_names=names)
    kept = ledger.take(layer, True)
    assert kept is ledger[layer]
    ledger.give_back(other, kept)
    assert ledger.take(other, True) is None


def test_a_row_without_number_spoils_no_other():
    model, names = several(), BATCHES["uneven"]
    x = LINEAR.x()
    x[0] = torch.inf
    held = parameters(model)
    y = model(x, adapter_names=names)
    assert y[1:].isfinite().all()
    grads = torch.autograd.grad(y[1:].sum(), held)
    finite = {n for n, g in zip([n for n in NAMES for _ in range(2)], grads, strict=True) if g.isfinite().all()}
    assert finite >= {"one", "two", "three"}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch", ["equal", "few", "uneven"])
@pytest.mark.parametrize(("factor", "number"), [("A", torch.nan), ("A", 3e38), ("B", torch.nan), ("B", torch.inf)])
def test_an_adapter_that_is_not_finite_spoils_its_own_rows_alone(factor, number, batch):
    model, x, names = several(), 10 * LINEAR.x(), BATCHES[batch]
    with torch.no_grad():
        wanted = apart(model, x, names)
        getattr(layer_of(model), f"lora_{factor}")["two"].weight[0] = number
        found = model(x, adapter_names=names)
    mine = torch.tensor([name == "two" for name in names])
    assert not found[mine].isfinite().all()
    close(found[~mine], wanted[~mine], 1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(9, 12), (9, 5, 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_forward_of_a_batch_gives_the_same_bits_and_rows_without_adapter_the_base_s(batch, dtype, shape):
    model, names = several().to(dtype), BATCHES[batch]
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        first, *others = (model(x, adapter_names=names) for _ in range(3))
        with model.disable_adapter():
            base = model(x)
    assert all(torch.equal(first, other) for other in others)
    free = [i for i, name in enumerate(names) if name == "__base__"]
    assert torch.equal(first[free], base[free])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch", ["equal", "few", "sorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_chooses_the_dtype(dtype, batch):
    model, x, names = several().to(dtype), LINEAR.x(), BATCHES[batch]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = [model(x, adapter_names=names) for _ in range(2)]
        wanted = apart(model, x, names)
    assert found[0].dtype is wanted.dtype
    for y in found:
        close(y.float(), wanted.float(), 0.05)


# ---- other derivatives, hooks, graphs -----------------------------------------------------------------------


def test_second_derivatives_forward_mode_and_vmap():
    model = several().double()
    x, names = LINEAR.x().double().requires_grad_(), BATCHES["uneven"]
    run = lambda z: model(z, adapter_names=names).tanh()  # noqa: E731
    parameters(model)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
    v = torch.randn_like(x)
    with torch.no_grad():
        _, tangent = torch.func.jvp(run, (x.detach(),), (v,))
        step = (run(x + 1e-6 * v) - run(x - 1e-6 * v)) / 2e-6
        close(tangent, step, 1e-6)
        many = torch.stack([x.detach(), v])
        close(torch.vmap(run)(many), torch.stack([run(m) for m in many]))


def test_hooks_of_the_base_see_all_rows_in_their_order():
    model, x, names, seen = several(), LINEAR.x(), BATCHES["uneven"], []
    base = layer_of(model).base_layer
    base.register_forward_hook(lambda m, args, y: seen.append((args[0], y)) or y + 1)
    with torch.no_grad():
        found = model(x, adapter_names=names)
        torch.testing.assert_close(seen[0][0], x)
        torch.testing.assert_close(seen[0][1], nn.functional.linear(x, base.weight, base.bias))
        close(found, apart(model, x, names), 1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("key", ["weight", "bias"])
def test_what_is_no_parameter_of_the_base_is_found(key, learns):
    model, x, names = several(), LINEAR.x(), BATCHES["equal"]
    base = layer_of(model).base_layer
    for step in range(2):
        if step:
            value = torch.randn_like(getattr(base, key))
            delattr(base, key)
            setattr(base, key, value)
        if learns:
            parameters(model)
        with torch.set_grad_enabled(learns):
            close(model(x, adapter_names=names), apart(model, x, names), 1e-5)


def test_a_compiled_graph_holds_all_adapters():
    model, x, names = several(), LINEAR.x(), BATCHES["equal"]
    with torch.no_grad():
        compiled = torch.compile(lambda z: model(z, adapter_names=names), backend="eager")
        close(compiled(x), apart(model, x, names), 1e-5)


def in_turns(adapters):
    """Two layers under so many adapters, and a batch whose rows are under one after the other."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": False}
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(**options), "a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", LoraConfig(**options))
    return model, [f"a{i % adapters}" for i in range(32)], torch.randn(32, 8)


class Counted(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("adapters", [2, 16])
def test_the_number_of_operations_does_not_depend_on_that_of_adapters(adapters):
    model, names, x = in_turns(adapters)
    with torch.no_grad():
        model.eval()(x, adapter_names=names)
        layer = model.base_model.model[0]
        with layer.call.open(names=tuple(names), beams=1, length=None):
            layer(x)  # the rows of each adapter are found out once for all layers
            with Counted() as ops:
                layer(x)
    assert ops.count <= 12, ops.count


@pytest.mark.parametrize("method", ["lora", "vera", "dora"])
def test_what_inference_mode_has_kept_is_not_in_the_way_of_gradients(method):
    model, x, names = several(method), LINEAR.x(), BATCHES["few"]
    model.requires_grad_(False)
    with torch.inference_mode():
        wanted = model(x, adapter_names=names).clone()
    x.requires_grad_()
    y = model(x, adapter_names=names)
    close(y, wanted.clone(), 1e-5)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("adapters", [2, 16])
def test_a_layer_in_a_mixed_batch_takes_few_calls_for_any_number_of_adapters(adapters):
    model, names, x = in_turns(adapters)
    model.eval()
    first, second = model.base_model.model
    with torch.no_grad(), first.call.open(names=tuple(names), beams=1, length=None):
        for _ in range(2):
            first(x), second(x)
        first(x)  # looks at both
        entered = calls(lambda: second(x))
    assert entered <= 43, entered


@pytest.mark.parametrize("adapters", [2, 16])
def test_training_takes_as_many_operations_for_any_number_of_adapters(adapters):
    model, names, x = in_turns(adapters)
    for _, layer in tuner_layers(model.eval()):
        layer.set_requires_grad([f"a{i}" for i in range(adapters)])
    model(x, adapter_names=names)
    with Counted() as ops:
        y = model(x, adapter_names=names)
    assert ops.count <= 2 * 16, ops.count
    kinds = [type(node).__name__ for node, _ in y.grad_fn.next_functions if node is not None]
    assert [type(y.grad_fn).__name__, *kinds].count("_UpdateBackward") == 2
    assert set(kinds) == {"_UpdateBackward", "AccumulateGrad"}


def test_rows_are_told_in_few_groups_of_about_one_size():
    lists = {f"a{i}": list(range(i * 40, i * 40 + count)) for i, count in enumerate([1, 2, 17, 3, 1, 33])}
    groups = Groups(lists, 240, torch.device("cpu"))
    tiers = groups.segments(tuple(lists))
    assert sum(len(t.to) for t in tiers) == 57
    assert sum(t.adapters * (len(t.rows) // t.adapters) for t in tiers) < 2 * 57
    assert len(tiers) <= 6
