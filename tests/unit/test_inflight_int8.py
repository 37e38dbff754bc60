"""Weights in int8: what they compute, where they are taken, and where they are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from app.engines.inflight import int8, loading
from app.engines.inflight.attention import PortableStep
from app.engines.inflight.fused import FusedLayer, fuse_layers
from app.engines.inflight.int8 import Int8Linear
from app.engines.inflight.library import multiplies_int8
from app.engines.inflight.weights import NativeLinear, pack_linears
from app.errors import ConfigError
from tests.unit.inflight_tiny import engine_of
from tests.unit.test_inflight_fused import logits, model_of, steps

needs_instructions = pytest.mark.skipif(
    not multiplies_int8(), reason="this processor does not multiply int8 faster than bfloat16"
)


@needs_instructions
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 12).map(lambda vectors: 16 * vectors),
    outputs=st.integers(1, 100),
    bias=st.booleans(),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),
)
@settings(deadline=None)
def test_a_product_is_that_of_the_rounded_numbers(
    rows: int, inputs: int, outputs: int, bias: bool, spread: float
) -> None:
    # given
    torch.manual_seed(rows)
    linear = nn.Linear(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)
    x = spread * torch.randn(2, rows, inputs).bfloat16()

    # when
    got = NativeLinear(linear.weight, linear.bias, int8=True)(x)

    # then
    wanted = _rounded(x) @ _rounded(linear.weight).T
    wanted = wanted if linear.bias is None else wanted + linear.bias.double()
    torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=1e-3 * spread)


@needs_instructions
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_spoils_its_own_row_alone(value: float) -> None:
    # given
    x = torch.ones(3, 64).bfloat16()
    x[1, 7] = value

    # when
    got = NativeLinear(torch.ones(40, 64).bfloat16(), None, int8=True)(x)

    # then
    assert torch.isfinite(got[[0, 2]]).all()
    assert not torch.isfinite(got[1]).any()


@needs_instructions
@pytest.mark.parametrize("family", ["llama", "gemma2", "starcoder2", "gpt2"])
def test_layers_with_int8_weights_give_nearly_the_same(family: str) -> None:
    # given
    model, shapes = model_of(family)
    step, packed = steps()
    wanted = logits(model, PortableStep.of, shapes, packed)

    # when
    fuse_layers(model, shapes, int8=True)
    pack_linears(model, int8=True)

    # then
    kept = [each for each in model.modules() if isinstance(each, NativeLinear)]
    assert all(each.product.scale for each in kept)
    assert any(isinstance(each, FusedLayer) for each in model.modules()) == (family != "gpt2")
    native = PortableStep.of if family == "gpt2" else step
    got = logits(model, native, shapes, packed)
    assert (got - wanted).norm() < 0.15 * wanted.norm()


def test_where_int8_would_be_slower_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="AVX-512 VNNI"):  # float32
        engine_of("llama", weights="int8")
    monkeypatch.setattr(loading, "multiplies_int8", lambda: False)
    with pytest.raises(ConfigError, match="AVX-512 VNNI"):
        engine_of("llama", dtype="bfloat16", weights="int8")


def test_on_a_device_weights_are_multiplied_part_by_part_to_the_same_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given a layer with an output that is always 0
    linear = nn.Linear(24, 31, dtype=torch.bfloat16)
    linear.weight.data[5] = 0
    layer, x = Int8Linear(linear), torch.randn(1, 5, 24, dtype=torch.bfloat16)
    whole = layer(x)

    # when
    monkeypatch.setitem(int8._PART, "cpu", 24 * 7)

    # then
    torch.testing.assert_close(layer(x), whole)
    torch.testing.assert_close(whole, linear(x), atol=0.05, rtol=0.05)


def _rounded(numbers: Tensor) -> Tensor:
    """Each row to 255 steps, the largest number being one of them."""
    exact = numbers.float()
    largest = exact.abs().amax(-1, keepdim=True)
    scale = largest / 127
    # 127 / largest would be a reciprocal, which is rounded once more.
    steps = (
        exact / scale if numbers.ndim == 2 else exact * (torch.full_like(largest, 127) / largest)
    )
    return steps.nan_to_num().round().double() * scale.double()
