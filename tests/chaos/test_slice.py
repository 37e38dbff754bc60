"""A short part of `make chaos`, always with the same seed: every change meets some faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import run
from tests.chaos.scene import FAULTS

SEED = 20_261_125
SLICE = (1, 3, 5, 13)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_is_killed_or_frozen_or_computes_nonsense_loses_no_job_and_doubles_none(
    tmp_path: Path,
) -> None:
    outcomes = run([FAULTS[number] for number in SLICE], seed=SEED, jobs=120, out=tmp_path)

    wrong = [f"{each.name}: {text}" for each in outcomes for text in each.violations]
    assert not wrong, wrong
    assert [each.number for each in outcomes] == list(SLICE)
    assert sum(each.jobs for each in outcomes) >= 4 * 120
    assert sum(each.lost + each.doubled for each in outcomes) == 0
