"""Methods activated behind an aLoRA: each position has the weight that its adapters give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.layouts import LAYOUTS
from conformance.oracles import METHODS
from conformance.rows import SEVERAL, config, forbidden, given, train
from peft import LoraConfig, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:aLoRA")
LINEAR = LAYOUTS["linear"]
OFFSETS = [3, None]  # the first row's last three positions
WHOLE = [m for m in SEVERAL if getattr(METHODS[m].config, "any_module", False)]
SECOND = [m for m in SEVERAL if not forbidden(m, LINEAR) and m not in WHOLE]


def stacked(method: str, tokens: list[int] | None, last: tuple[str, ...] = ()) -> Any:
    """A LoRA, an aLoRA if `tokens` are given, with another method behind it, and more adapters."""
    kind = LoraConfig(r=2, **LINEAR.targets, alora_invocation_tokens=tokens)
    model = get_peft_model(LINEAR.model(torch.float32), kind, adapter_name="late")
    train(model, "late", seed=1)
    model.add_adapter("other", config(method, LINEAR))
    model.__dict__["noise"] = METHODS[method].noise
    train(model, "other", seed=2)
    for name in last:
        model.add_adapter(name, LoraConfig(r=2, **LINEAR.targets, alora_invocation_tokens=[1]))
        train(model, name, seed=3)
    return model.eval()


def inputs() -> torch.Tensor:
    x = LINEAR.x()
    return torch.randn(2, 5, x.shape[-1], generator=torch.Generator().manual_seed(0))


def acting() -> torch.Tensor:
    found = torch.zeros(2, 5, 1, dtype=torch.bool)
    found[0, 2:] = True
    return found


@pytest.mark.parametrize("method", SECOND)
def test_each_position_has_the_weight_of_its_adapters(method: str) -> None:
    x, more = inputs(), given(method, slice(0, 2))
    model, plain = stacked(method, [1]), stacked(method, None)
    model.base_model.set_adapter(["late", "other"])
    found = model(x, alora_offsets=OFFSETS, **more)
    plain.base_model.set_adapter(["late", "other"])
    both = plain(x, **more)
    plain.set_adapter("other")
    alone = plain(x, **more)
    assert not torch.allclose(both, alone, atol=1e-4)
    torch.testing.assert_close(found, torch.where(acting(), both, alone), rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    for name in ("late", "other"):
        grads = [p.grad for p in model.adapter_parameters(name).values() if p.requires_grad]
        assert any(g is not None and g.any() for g in grads)


@pytest.mark.parametrize("method", ["loha", "oft", "ia3"])
def test_several_aloras_below_another_method_each_act_on_their_positions(method: str) -> None:
    x = inputs()
    model = stacked(method, [1], last=("later",))
    model.base_model.set_adapter(["late", "later", "other"])
    both = model(x, alora_offsets=OFFSETS)
    model.base_model.set_adapter(["other"])
    alone = model(x, alora_offsets=OFFSETS)
    torch.testing.assert_close(both[~acting().expand_as(both)], alone[~acting().expand_as(alone)])
    assert not torch.allclose(both[0, 2:], alone[0, 2:], atol=1e-4)


def test_merging_beside_an_active_alora_is_refused() -> None:
    model = stacked("loha", [1])
    model.base_model.set_adapter(["late", "other"])
    with pytest.raises(NotImplementedError, match="aLoRA"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="'late'"):
        model.merge_adapter(["other"])
    model.set_adapter("other")
    expected = model(inputs(), alora_offsets=OFFSETS)
    model.merge_adapter()
    torch.testing.assert_close(model(inputs(), alora_offsets=OFFSETS), expected, rtol=1e-4, atol=1e-5)
