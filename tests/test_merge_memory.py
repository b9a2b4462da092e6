"""What a merge needs beside the weights, its shortest way, and the memory that is used again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    RoadConfig,
    VeraConfig,
    get_peft_model,
)
from peft.core import blocks, onestep, recycled

WIDE, TILE, SMALL = 512, 64 * 2**10, 48 * 2**10  # bytes; SMALL: of what has the size of an adapter
CLOSE = {"rtol": 0.05, "atol": 0.02}  # of halves, too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["0"], init_lora_weights=False),
    "dora": LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "lora and bias": LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_bias=True),
    "loha": LoHaConfig(r=4, target_modules=["0"], init_weights=False),
}


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (memory := t.untyped_storage())._cdata not in known:
                self.live.setdefault(memory._cdata, (StorageWeakRef(memory), memory.nbytes()))
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return out


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(blocks, "TILE_BYTES", TILE)
    monkeypatch.setattr(recycled, "TILE_BYTES", TILE)
    recycled.forget()
    yield
    recycled.forget()


def model(kind: str = "lora", dtype: torch.dtype = torch.float32, width: int = WIDE) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, width, bias="bias" in kind, dtype=dtype))
    return get_peft_model(base, CONFIGS[kind])


def weight(m: Any) -> Tensor:
    return m.base_model.model[0].base_layer.weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merge_needs_one_tile_beside_what_it_keeps(kind: str, dtype: torch.dtype) -> None:
    m = model(kind, dtype)
    size = weight(m).numel() * dtype.itemsize
    assert size > 4 * TILE
    with Peak() as peak:
        m.merge_adapter()
    assert size <= peak.most <= size + TILE + SMALL
    m.unmerge_adapter()
    with Peak() as peak:
        m.merge_and_unload()
    assert peak.most <= TILE + SMALL


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_merge_and_a_checked_one_need_no_more(dtype: torch.dtype) -> None:
    m = model(dtype=dtype)
    m.add_adapter("b", CONFIGS["lora"])
    before = weight(m).clone()
    m.merge_adapter(["default"], safe_merge=True)
    with Peak() as peak, pytest.warns(UserWarning, match="Already merged"):
        m.merge_adapter(["b"], safe_merge=True)
    assert peak.most <= TILE + SMALL
    m.unmerge_adapter()
    assert torch.equal(weight(m), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_for_good_changes_the_weight_in_its_place(dtype: torch.dtype) -> None:
    m, x = model(dtype=dtype, width=64), torch.randn(3, 64, dtype=dtype)
    expected, place = m(x), weight(m).data_ptr()
    merged = m.merge_and_unload()
    assert merged[0].weight.data_ptr() == place
    torch.testing.assert_close(merged(x), expected, **CLOSE)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("kind", ("lora", "dora"))
@pytest.mark.parametrize("width", (48, 192))  # of one block, and of several
def test_the_shortest_way_leaves_what_the_long_one_does(
    kind: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = model(kind, dtype, width), model(kind, dtype, width)
    before, x = weight(short).clone(), torch.randn(2, width, dtype=dtype)
    expected = short.eval()(x)
    layer = short.base_model.model[0]
    assert (dtype is torch.float64 and kind == "dora") or onestep.ordinary(layer, "default") is not None
    short.merge_adapter()
    with monkeypatch.context() as only:
        only.setattr(onestep, "merged", lambda *_: False)
        long.merge_adapter()
    assert torch.equal(weight(short), weight(long)) and not torch.equal(weight(short), before)
    torch.testing.assert_close(short(x), expected, **CLOSE)
    for m in (short, long):
        assert m.base_model.model[0].merged_adapters == ["default"]
        m.unmerge_adapter()
        assert torch.equal(weight(m), before)


OTHERS = {
    "lora and bias": CONFIGS["lora and bias"],
    "ia3": IA3Config(target_modules=["0", "1"], feedforward_modules=["1"], init_ia3_weights=False),
    "lokr": LoKrConfig(r=4, target_modules=["0", "1"], init_weights=False),
    "vera": VeraConfig(r=8, target_modules=["0", "1"], init_weights=False),
    "road": RoadConfig(group_size=8, target_modules=["0", "1"], init_weights=False),
    "oft": OFTConfig(oft_block_size=8, target_modules=["0", "1"], init_weights=False),
    "miss": MissConfig(r=8, target_modules=["0", "1"], init_weights=False),
}


def two_layers(kind: str, dtype: torch.dtype, width: int = 48) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Linear(width, width, dtype=dtype))
    return get_peft_model(base, copy.deepcopy(OTHERS[kind]))


def numbers(m: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in m.named_parameters() if name.endswith(("weight", "bias"))}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("tile", (TILE, 2**12))  # of one block, and of several
def test_every_method_takes_the_shortest_way_and_leaves_what_the_long_one_does(
    kind: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CACHED_BYTES", tile)
    short, long = two_layers(kind, dtype), two_layers(kind, dtype)
    before = numbers(short)
    assert onestep.ordinary(short.base_model.model[0], "default") is not None
    taken = []
    real = onestep.given_back
    with monkeypatch.context() as only:
        only.setattr(onestep, "given_back", lambda layer: taken.append(real(layer)) or taken[-1])
        short.merge_adapter()
        merged = numbers(short)
        short.unmerge_adapter()
    assert all(taken) and equal(numbers(short), before) and not equal(merged, before)
    with monkeypatch.context() as only:
        only.setattr(onestep, "ordinary", lambda *_: None)
        long.merge_adapter()
        assert equal(numbers(long), merged)
        long.unmerge_adapter()
        unloaded = numbers(long.merge_and_unload())
    assert equal(numbers(short.merge_and_unload()), unloaded)


def test_a_bias_that_a_second_merge_changes_comes_back() -> None:
    m = two_layers("lokr", torch.float32)
    m.add_adapter("b", copy.deepcopy(OTHERS["ia3"]))
    layer = m.base_model.model[0]
    before = numbers(layer.base_layer)
    m.merge_adapter(["default"])
    assert torch.equal(layer.base_layer.bias, before["bias"])
    with pytest.warns(UserWarning, match="Already merged"):
        m.merge_adapter(["b"])
    assert not torch.equal(layer.base_layer.bias, before["bias"])
    m.unmerge_adapter()
    assert equal(numbers(layer.base_layer), before)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_layer_that_cannot_be_merged_for_good_leaves_all_as_they_were(kind: str) -> None:
    m = two_layers(kind, torch.float32)
    last = [p for n, p in m.named_parameters() if p.requires_grad][-1]
    with torch.no_grad():
        last.flatten()[0] = torch.nan
    before = numbers(m)
    with pytest.raises(ValueError, match="not finite"):
        m.merge_and_unload()
    now = numbers(m)
    assert now.keys() == before.keys()
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in now.items())
    assert not m.base_model.model[0].merged and not m.base_model.model[0].tied


def unusual() -> dict[str, Any]:
    """Layers that the shortest way leaves to the long one."""
    two, off, hooked = model(), model(), model()
    two.add_adapter("b", CONFIGS["lora"])
    two.base_model.set_adapter(["default", "b"])
    off.base_model.disable_adapter_layers()
    hooked.base_model.model[0].base_layer._hf_hook = object()
    merged = model()
    merged.merge_adapter()
    return {"two active": two, "disabled": off, "offloaded": hooked, "merged": merged}


@pytest.mark.parametrize("name", ("two active", "disabled", "offloaded", "merged"))
def test_what_is_not_ordinary_takes_the_long_way(name: str) -> None:
    assert onestep.ordinary(unusual()[name].base_model.model[0], "default") is None


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ("base", "adapter", "sum"))
@pytest.mark.parametrize("way", ("merge_adapter", "merge_and_unload"))
def test_what_is_not_finite_is_refused_and_nothing_changes(kind: str, dtype: torch.dtype, where: str, way: str) -> None:
    if where == "sum" and kind != "lora":
        return  # a direction stays in range
    m = model(kind, dtype)
    named, most = dict(m.named_parameters()), torch.finfo(dtype).max
    up = named[next(k for k in named if k.endswith(("lora_B.default.weight", "hada_w1_b.default")))]
    with torch.no_grad():
        if where == "base":
            weight(m)[WIDE // 2, 3] = float("nan")
        elif where == "adapter":
            up.view(-1)[-1] = float("inf")
        else:
            weight(m)[3, 3], up[3] = most, most / 8
            named["base_model.model.0.lora_A.default.weight"][:, 3] = 1
    before = {k: p.clone() for k, p in named.items()}
    with pytest.raises(ValueError, match="not finite"):
        getattr(m, way)()
    for k, p in m.named_parameters():
        assert torch.equal(p.nan_to_num(0.5), before[k].nan_to_num(0.5)), k


def test_large_numbers_that_stay_in_range_are_merged() -> None:
    m = model(dtype=torch.float16, width=64)
    with torch.no_grad():
        weight(m).fill_(60000)  # their sum leaves the range, and so does the bound
    merged = m.merge_and_unload()
    assert torch.isfinite(merged[0].weight).all()


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    t = torch.zeros(64, 1024)
    first = recycled.empty_like(t, 2**20)
    place, part = first.data_ptr(), first[3:5]
    part.fill_(7)
    del first
    assert recycled.waiting() == 0
    other = recycled.empty_like(t, 2**20)
    assert other.data_ptr() != place
    other.fill_(1)
    assert (part == 7).all()
    del part
    assert recycled.waiting() == t.numel() * 4
    assert recycled.empty_like(t, 2**20).data_ptr() == place


def test_no_more_memory_waits_than_asked_for() -> None:
    size = 2**18
    held = [recycled.empty_like(torch.empty(n), 2 * size) for n in (size // 4, size // 4, size // 4, size // 2)]
    while held:
        held.pop()
        assert recycled.waiting() <= 2 * size
    assert recycled.waiting() == 2 * size
    recycled.forget(size)
    assert recycled.waiting() <= size


def test_a_merged_weight_that_is_held_elsewhere_survives_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE_BYTES", 2**24)
    monkeypatch.setattr(onestep, "TILE_BYTES", 2**24)
    m = model()
    m.merge_adapter()
    held = weight(m).data
    numbers = held.clone()
    m.unmerge_adapter()
    m.merge_adapter()
    weight(m).data.zero_()
    assert torch.equal(held, numbers)


@pytest.mark.parametrize("stated", ["junk", "0", "-3", "1.5"])
def test_a_tile_that_is_no_number_is_named(stated: str) -> None:
    with pytest.raises(ValueError, match=rf"PEFT_MERGE_TILE_MIB is '{stated}'"):
        recycled._tile(stated)
    assert recycled._tile("3") == 3 * 2**20
