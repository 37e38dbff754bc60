"""Stored chats in the tables: whose they are, which there are, in which order."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest

from app.errors import JobNotFound
from app.store import lists, purging, stored_chats
from app.store.database import Database
from tests.rows import Worker, insert, new_job


def chats(database: Database, number: int, **given: Any) -> list[UUID]:
    """Stored ones that are completed, oldest first."""
    worker = Worker.registered(database)
    ids = []
    for _ in range(number):
        ids += insert(database, new_job(stored=True, **given))
        worker.complete(worker.claim(ids[-1:]))
    return ids


def page(database: Database, **given: Any) -> list[UUID]:
    with database.begin() as connection:
        return stored_chats.page(connection, **{"limit": 10} | given)


def test_a_stored_chat_is_its_tenants_in_each_statement(database: Database) -> None:
    labels = {"a": "b"}
    [mine] = chats(database, 1, tenant="mill", metadata=labels)

    with database.begin() as connection:
        for tenant, told in (("bakery", []), ("mill", [mine])):
            found = stored_chats.find(connection, [mine, uuid4()], tenant=tenant)
            assert [each.job_id for each in found] == told
            changed = stored_chats.relabel(connection, mine, labels, tenant=tenant)
            assert ([changed.job_id] if changed else []) == told
    for asked in ({}, {"metadata": labels}):
        assert page(database, tenant="bakery", **asked) == []
        assert page(database, tenant="mill", **asked) == [mine]
    with pytest.raises(JobNotFound):
        page(database, tenant="bakery", after=mine)


@pytest.mark.parametrize("many", [0, 10_000], ids=["labels of many", "labels of few"])
def test_pages_have_an_order_whatever_the_labels(
    database: Database, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    monkeypatch.setattr(lists, "MANY", many)
    ids = chats(database, 4, metadata={"a": "b", "c": "d"})
    chats(database, 1, metadata={"a": "x"})
    given = {"metadata": {"a": "b"}, "limit": 2}

    assert page(database, **given) == ids[:2]
    assert page(database, **given, after=ids[1]) == ids[2:]
    assert page(database, **given, oldest_first=False) == ids[:1:-1]
    assert page(database, **given, oldest_first=False, after=ids[2]) == ids[1::-1]


def test_what_is_not_kept_is_not_listed_and_may_be_begun_after(database: Database) -> None:
    [purged, old, last] = chats(database, 3)
    insert(database, new_job(stored=True))  # waits
    worker = Worker.registered(database)
    worker.complete(worker.claim(insert(database, new_job())))  # was not to be stored

    with database.begin() as connection:
        purging.purge(connection, purged)
        connection.exec_driver_sql(f"UPDATE results SET response = NULL WHERE job_id = '{old}'")

    assert page(database) == [last]
    assert page(database, after=purged) == page(database, after=old) == [last]
    with database.begin() as connection:
        found = stored_chats.find(connection, [purged, old, last])
        assert [each.job_id for each in found] == [last]
        assert stored_chats.relabel(connection, purged, {"a": "b"}) is None
    assert [each.request for each in found] == [{"prompt": "A mill"}]
