"""The list of deliberate defects is in order; `make mutants` runs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, mutate


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.defect)
def test_each_defect_still_applies_and_names_a_test_that_exists(
    mutant: Mutant, tmp_path: Path
) -> None:
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    shutil.copy(ROOT / mutant.file, tmp_path / mutant.file)
    file, _, test = mutant.tests.partition("::")

    before = mutate(tmp_path, mutant)

    assert (tmp_path / mutant.file).read_text() != before
    assert f"def {test}" in (ROOT / file).read_text()


def test_a_defect_that_no_longer_applies_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("one one")

    with pytest.raises(ValueError, match="occur 2 times"):
        mutate(tmp_path, Mutant("a defect", "file.py", "one", "two"))
