"""Memory may run out anywhere in a step: nothing is lost by it but the step."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from app.engines.base import Engine, Sequence
from app.engines.generate.engine import GenerateEngine
from app.engines.inflight.engine import InflightEngine
from app.errors import OutOfMemory
from app.jobs import Grammar, SamplingParams
from tests.unit import tiny_models
from tests.unit.inflight_tiny import again, run_ahead

POINTS = 8
"""Operations of a run that fail, one in each try."""


class Full(TorchDispatchMode):
    """The allocator has no room at the given operation of torch; counts them."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at = at
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count - 1 == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return func(*args, **(kwargs or {}))


def sequences() -> list[Sequence]:
    """Rows that begin alike, that leave while others stay, with penalties, limits and a stream."""
    stem = tuple(b"the mill wheel turns by the river, and")
    params = [
        SamplingParams(3, temperature=0.0),
        SamplingParams(7, temperature=0.0, repetition_penalty=1.3, min_tokens=4),
        SamplingParams(6, seed=4, top_p=0.9, logprobs=2),
        SamplingParams(5, seed=5, top_k=5, frequency_penalty=0.5),
        SamplingParams(6, temperature=0.0, grammar=Grammar("regex", "[ab]{4}")),
    ]
    return [Sequence(i, (*stem, 65 + i, 66), each, stream=True) for i, each in enumerate(params)]


def run(engine: Engine) -> dict[int, list[int]]:
    engine.admit("batch", sequences())
    found = {}
    while engine.has_work:
        found.update({each.sequence_id: each.token_ids for each in engine.step()})
    engine.take_tokens()
    return found


@pytest.fixture(scope="module", params=["inflight", "ahead", "generate"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tiny_models.save_llama(tmp_path_factory.mktemp("memory") / "model")
    loaded = tiny_models.load(folder, "generate" if request.param == "generate" else "inflight")
    assert isinstance(loaded, InflightEngine | GenerateEngine)
    if request.param == "ahead" and isinstance(loaded, InflightEngine):
        return run_ahead(loaded, again)
    return loaded


def test_memory_that_runs_out_anywhere_in_a_step_costs_that_step_alone(engine: Engine) -> None:
    # given what a run computes, and how many operations it takes
    whole = run(engine)
    with Full() as full:
        assert run(engine) == whole

    for at in range(0, full.count, max(1, full.count // POINTS)):
        # when any of them has no room
        with Full(at), pytest.raises(OutOfMemory):
            run(engine)

        # then everything was dropped, and the next try is whole
        assert not engine.has_work
        assert not engine.take_tokens()
    assert run(engine) == whole


def test_what_memory_is_kept_for_later_is_given_back_before_the_next_try(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[bool] = []
    module = "app.engines.static" if isinstance(engine, GenerateEngine) else type(engine).__module__

    def give_back(_: torch.device) -> None:
        alive.append(any(each() is not None for each in Held.made))

    monkeypatch.setattr(f"{module}.give_back_memory", give_back)
    with Holding(60), pytest.raises(OutOfMemory):
        run(engine)

    assert alive == [False]  # no frame of the step that failed holds on to what it made
    run(engine)


class Held:
    """Stands for a large tensor."""

    made: ClassVar[list[weakref.ref[Held]]] = []

    def __init__(self) -> None:
        self.made.append(weakref.ref(self))


class Holding(Full):
    """What fails has a large tensor in its frame."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = Held()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        assert held
        return out
