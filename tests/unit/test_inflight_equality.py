"""Greedy float32 output of the in-flight engine equals `model.generate`, token for token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.engines.base import Generation
from app.engines.inflight.engine import InflightEngine
from app.jobs import FinishReason
from tests.unit.inflight_tiny import (
    FAMILIES,
    VOCAB,
    again,
    engine_of,
    greedy,
    reference,
    run_all,
)


@dataclass(frozen=True)
class Visit:
    """One sequence of a random schedule, in steps of the engine."""

    prompt: tuple[int, ...]
    max_tokens: int
    arrives: int
    cancelled_after: int | None
    priority: int
    tenant: str


_STEM = tuple(range(3, 60))  # what prompts may have in common: nearly two blocks

visits = st.builds(
    Visit,
    prompt=st.one_of(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=50).map(tuple),
        st.builds(
            lambda common, own: _STEM[:common] + tuple(own),
            st.integers(1, len(_STEM)),
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
        ),
    ),
    max_tokens=st.sampled_from([1, 40, 40, 40]),
    arrives=st.integers(0, 8),
    cancelled_after=st.sampled_from([None] * 6 + [0, 2, 9, 30]),
    priority=st.integers(0, 2),
    tenant=st.sampled_from(["a", "b"]),
)


@pytest.mark.parametrize("portable", [False, True], ids=["kernel", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_alone_is_answered_as_by_generate(family: str, portable: bool) -> None:
    engine = engine_of(family, portable=portable)
    for prompt in [(5,), tuple(range(40)), tuple(range(7, 90))]:
        generations = run_all(engine, [greedy(1, prompt, 24)])
        assert generations[1].token_ids == reference(family, prompt, 24)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    schedule=st.lists(visits, min_size=4, max_size=8),
    rows=st.integers(2, 6),
    blocks=st.integers(4, 6),
    prefill_tokens=st.sampled_from([3, 16, 50, 500]),
    way=st.sampled_from(["kernel", "portable", "ahead"]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_company_order_chunks_preemption_and_shared_prefixes_change_no_text(
    family: str,
    schedule: list[Visit],
    rows: int,
    blocks: int,
    prefill_tokens: int,
    way: str,
) -> None:
    engine = engine_of(
        family,
        rows=rows,
        portable=way == "portable",
        ahead=again if way == "ahead" else None,
        cache_tokens=blocks * 32,
        prefill_tokens=prefill_tokens,
    )

    generations = _play(engine, schedule)

    assert generations.keys() == set(range(len(schedule)))
    for place, visit in enumerate(schedule):
        generation = generations[place]
        expected = reference(family, visit.prompt, 40)[: visit.max_tokens]
        if generation.finish_reason is FinishReason.LENGTH:
            assert generation.token_ids == expected
        else:
            assert generation.finish_reason is FinishReason.CANCELLED
            assert visit.cancelled_after is not None
            assert generation.token_ids == expected[: len(generation.token_ids)]
    assert _is_empty(engine)


def _play(engine: InflightEngine, schedule: list[Visit]) -> dict[int, Generation]:
    generations: dict[int, Generation] = {}
    for step in range(2000):
        for place, visit in enumerate(schedule):
            if visit.arrives == step:
                sequence = greedy(
                    place,
                    visit.prompt,
                    visit.max_tokens,
                    tenant=visit.tenant,
                    priority=visit.priority,
                )
                engine.admit(f"batch-{step}", [sequence])
            if visit.cancelled_after is not None and step == visit.arrives + visit.cancelled_after:
                engine.cancel(place)
        generations.update({each.sequence_id: each for each in engine.step()})
        if len(generations) == len(schedule):
            return generations
    raise AssertionError("the engine did not come to an end")


def _is_empty(engine: InflightEngine) -> bool:
    """Every slot and every block is back."""
    scheduler = engine._scheduler
    return (
        not engine.has_work
        and len(scheduler._slots) == scheduler.num_rows
        and scheduler._num_available == scheduler.num_blocks
        and len(set(scheduler._free)) == len(scheduler._free)
    )
