"""Pages of submissions, whatever their sizes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gristmill_client.pages import PageSize, pages

Submissions = list[dict[str, Any] | None]
submissions = st.lists(
    st.one_of(
        st.none(),
        st.builds(lambda size: {"body": {"prompt": "x" * size}}, st.integers(0, 2_000)),
        st.just({"body": {"prompt": b"no JSON"}}),
    )
)


@given(submissions, st.integers(1, 20), st.integers(1, 5_000))
def test_every_submission_is_in_one_page_in_its_place(
    given_: Submissions, jobs: int, size: int
) -> None:
    found = [job for page in pages(given_, PageSize(jobs, size)) for job in page]

    wanted = [each for each in given_ if each is not None]
    assert len(found) == len(wanted)
    for job, submission in zip(found, wanted, strict=True):
        if isinstance(job, bytes):
            assert json.loads(job)["body"] == submission["body"]
        else:
            assert submission["body"]["prompt"] == b"no JSON"


@given(submissions, st.integers(1, 20), st.integers(1, 5_000))
def test_no_page_is_empty_or_larger_than_it_may_be(
    given_: Submissions, jobs: int, size: int
) -> None:
    for page in pages(given_, PageSize(jobs, size)):
        assert 1 <= len(page) <= jobs
        assert len(page) == 1 or sum(len(job) for job in page if isinstance(job, bytes)) <= size
