"""Threads that share a step, and lose their cores to each other, give what one alone gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from app.engines.inflight.fused import fuse_layers
from app.engines.inflight.library import multiplies_int8, products
from app.engines.inflight.weights import NativeLinear
from tests.unit.test_inflight_fused import logits, model_of, steps

pytestmark = pytest.mark.skipif(
    products() is None, reason="this processor has no bfloat16 products that are ours"
)

MANY = 7
"""More threads than cores: some have none while others want what they have begun."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LARGE = {"hidden_size": 1024, "intermediate_size": 8192}
"""So that cores are lost in the midst of a piece, too."""


@pytest.mark.parametrize(
    ("family", "sizes"), [("llama", {}), ("qwen3", {}), ("olmo2", {}), ("llama", LARGE)]
)
def test_layers_that_many_share_are_those_that_one_computes(
    family: str, sizes: dict[str, int]
) -> None:
    model, shapes = model_of(family, **sizes)
    step, packed = steps()
    fuse_layers(model, shapes)
    with threads(1):
        wanted = logits(model, step, shapes, packed)
    with threads(MANY):
        for _ in range(40):
            assert torch.equal(logits(model, step, shapes, packed), wanted)


@pytest.mark.parametrize("rows", [0, 1, 12, 200])
@pytest.mark.parametrize("int8", [False, True])
def test_a_product_that_many_share_is_the_one_that_one_computes(rows: int, int8: bool) -> None:
    if int8 and not multiplies_int8():
        pytest.skip("this processor does not multiply int8")
    torch.manual_seed(rows)
    linear = NativeLinear(torch.randn(1000, 256).bfloat16(), None, int8=int8)
    x = torch.randn(rows, 256).bfloat16()
    with threads(1):
        wanted = linear(x)
    with threads(MANY):
        for _ in range(40):
            assert torch.equal(linear(x), wanted)


def test_a_number_of_threads_that_changes_is_heeded() -> None:
    linear = NativeLinear(nn.Linear(64, 96).weight.detach().bfloat16(), None)
    x = torch.randn(3, 64).bfloat16()
    wanted = linear(x)
    for number in (1, 5, 2, 9, 3):
        with threads(number):
            assert torch.equal(linear(x), wanted)
