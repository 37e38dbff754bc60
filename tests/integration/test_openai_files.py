"""Files over a real socket, by OpenAI's own client, in a folder and in a bucket."""

from __future__ import annotations

import hashlib
import io
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import psycopg
import pytest

from app.config.settings import Settings
from app.errors import StorageUnavailable
from app.files import id_in, key_of
from app.intake.file_keeper import FileKeeper
from app.local.ports import free_port
from app.local.servers import EmbeddedRedis
from app.objects import Objects
from app.store import files
from app.store.database import Database
from tests.apis import running_api
from tests.conftest import STUB_MODELS
from tests.waiting import eventually
from tests.workers import rows

LINES = b'{"custom_id": "1"}\n'


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, Any]]:
    """Settings of a bucket at moto's S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="miller",
        aws_secret_access_key="secret",
    ).create_bucket(Bucket="mill")
    yield {
        "url": "s3://mill/grist",
        "options": {
            "endpoint": endpoint,
            "region": "us-east-1",
            "access_key_id": "miller",
            "secret_access_key": "secret",
        },
    }
    server.stop()


@pytest.fixture(scope="module", params=["folder", "bucket"])
def system(
    request: pytest.FixtureRequest,
    empty_databases: Callable[[str], str],
    migrated_template: str,
    redis_server: EmbeddedRedis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Settings, httpx.Client]]:
    given = request.getfixturevalue("bucket") if request.param == "bucket" else {}
    settings = Settings(
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        database={"url": empty_databases(migrated_template)},
        broker={"url": redis_server.url},
        files=given | {"max_bytes": 20_000_000, "max_batch_bytes": 18_000_000},
        models=STUB_MODELS,
    )
    with running_api(settings) as api:
        yield settings, api


@pytest.fixture
def client(system: tuple[Settings, httpx.Client]) -> Iterator[openai.OpenAI]:
    _, api = system
    with openai.OpenAI(
        base_url=str(api.base_url).rstrip("/") + "/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


def test_a_file_goes_round(client: openai.OpenAI) -> None:
    data = random.Random(1).randbytes(17_654_321)

    made = client.files.create(
        file=("prompts.jsonl", io.BytesIO(data)),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )

    assert made.bytes == len(data) and made.filename == "prompts.jsonl"
    assert made.purpose == "batch" and made.status == "processed" and made.id.startswith("file-")
    assert made.expires_at == made.created_at + 3600
    assert client.files.retrieve(made.id) == made
    assert client.files.wait_for_processing(made.id) == made
    assert client.files.content(made.id).read() == data
    assert client.files.delete(made.id).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)


@pytest.mark.parametrize("size", [0, 1, 262_144, 8_000_000])
def test_files_of_any_size_come_back_as_they_were(client: openai.OpenAI, size: int) -> None:
    data = b"g" * size

    made = client.files.create(file=("a", data), purpose="user_data")

    assert made.bytes == size and made.expires_at is None
    assert client.files.content(made.id).read() == data


def test_a_file_for_a_batch_is_kept_for_thirty_days(client: openai.OpenAI) -> None:
    made = client.files.create(file=("a.jsonl", LINES), purpose="batch")

    assert made.expires_at == made.created_at + 30 * 86_400


def test_files_are_listed_page_by_page(client: openai.OpenAI) -> None:
    before = {each.id for each in client.files.list(purpose="vision")}
    made = [client.files.create(file=(f"{n}", b"x"), purpose="vision").id for n in range(5)]

    newest = client.files.list(purpose="vision", limit=2)
    assert [each.id for each in newest.data] == made[:2:-1] and newest.has_more
    everything = [each.id for each in client.files.list(purpose="vision", limit=2, order="asc")]
    assert [each for each in everything if each not in before] == made
    # a page that was deleted is no obstacle to the next one
    first = client.files.list(purpose="vision", limit=2, order="asc", after=made[0])
    for each in first.data:
        client.files.delete(each.id)
    rest = client.files.list(purpose="vision", order="asc", after=first.data[-1].id)
    assert [each.id for each in rest.data] == made[3:]
    assert all(each.purpose != "vision" for each in client.files.list(purpose="batch"))


def test_bytes_that_come_without_a_name_may_be_of_a_batch(client: openai.OpenAI) -> None:
    assert client.files.create(file=LINES, purpose="batch").filename == "upload"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"file": ("a.txt", LINES), "purpose": "batch"}, None),
        ({"file": ("a.jsonl", LINES), "purpose": "milling"}, "purpose"),
        ({"file": ("a.jsonl", LINES), "purpose": "batch_output"}, "purpose"),
        (
            {
                "file": ("a.jsonl", LINES),
                "purpose": "batch",
                "expires_after": {"anchor": "created_at", "seconds": 3599},
            },
            "expires_after[seconds]",
        ),
        (
            {
                "file": ("a.jsonl", LINES),
                "purpose": "batch",
                "expires_after": {"anchor": "created_at", "seconds": -1},
            },
            "expires_after[seconds]",
        ),
        (
            {
                "file": ("a.jsonl", LINES),
                "purpose": "batch",
                "expires_after": {"anchor": "today", "seconds": 3600},
            },
            "expires_after[anchor]",
        ),
    ],
)
def test_what_is_wrong_with_an_upload_is_told_and_nothing_is_kept(
    client: openai.OpenAI, given: dict[str, Any], param: str | None
) -> None:
    before = [each.id for each in client.files.list()]

    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(**given)

    assert refused.value.param == param
    assert [each.id for each in client.files.list()] == before


def test_a_file_that_is_too_large_is_refused_while_it_arrives(client: openai.OpenAI) -> None:
    for size, purpose in ((18_000_001, "batch"), (20_000_001, "user_data")):
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=("a.jsonl", b"x" * size), purpose=purpose)  # type: ignore[arg-type]
        assert refused.value.status_code == 413


def form(*parts: tuple[str, bytes]) -> bytes:
    return b"".join(
        b"--mill\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (head.encode(), data)
        for head, data in parts
    )


PURPOSE = ('name="purpose"', b"user_data")
FILE = ('name="file"; filename="a"', b"grist")
END = b"--mill--\r\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (form(FILE, PURPOSE) + END, 200),  # whatever comes first
        (form(PURPOSE, FILE) + END, 200),
        (form(PURPOSE, FILE), 400),  # cut short
        (form(PURPOSE) + END, 400),
        (form(FILE) + END, 400),
        (form(PURPOSE, FILE, FILE) + END, 400),
        (form(PURPOSE, PURPOSE, FILE) + END, 400),
        (form(PURPOSE, ('name="file"', b"grist")) + END, 400),
        (form(PURPOSE, ('name="note"', b"x" * 3_000), FILE) + END, 400),
        (form(*((f'name="{n}"', b"x") for n in range(30)), PURPOSE, FILE) + END, 400),
        (b"", 400),
        (b"round and round", 400),
        (END, 400),
    ],
)
def test_any_form_is_taken_or_refused(
    system: tuple[Settings, httpx.Client], body: bytes, status: int
) -> None:
    _, api = system
    before = len(api.get("/v1/files").json()["data"])

    answer = api.post(
        "/v1/files",
        content=body,
        headers={"Content-Type": "multipart/form-data; boundary=mill"},
    )

    assert answer.status_code == status, answer.text
    after = len(api.get("/v1/files").json()["data"])
    assert after - before == (status == 200)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "", "multipart/x"])
def test_a_body_that_is_no_form_is_refused(
    system: tuple[Settings, httpx.Client], kind: str
) -> None:
    _, api = system
    answer = api.post("/v1/files", content=b"{}", headers={"Content-Type": kind})

    assert answer.status_code == 400


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "C:\\mill\\a", "a\x00b", "ü" * 400, "", "/", "\u202eexe.txt"]
)
def test_a_name_is_only_a_name(system: tuple[Settings, httpx.Client], name: str) -> None:
    _, api = system
    head = f'name="file"; filename="{name}"'
    answer = api.post(
        "/v1/files",
        content=form((head, b"x"), PURPOSE) + END,
        headers={"Content-Type": "multipart/form-data; boundary=mill"},
    )

    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        shown = answer.json()["filename"]
        assert 0 < len(shown) <= 255 and "/" not in shown and shown.isprintable()


@pytest.mark.parametrize(
    "name", ["file-0", "file-" + "0" * 32, "0" * 32, "batch_" + "0" * 32, "%00", "file-" + "g" * 32]
)
def test_an_unknown_file_is_not_found(system: tuple[Settings, httpx.Client], name: str) -> None:
    _, api = system
    for answer in (
        api.get(f"/v1/files/{name}"),
        api.get(f"/v1/files/{name}/content"),
        api.delete(f"/v1/files/{name}"),
    ):
        assert answer.status_code == 404, answer.text


def test_what_is_gone_leaves_the_storage(
    system: tuple[Settings, httpx.Client], client: openai.OpenAI
) -> None:
    settings, _ = system
    made = {
        name: client.files.create(file=("a.jsonl", LINES), purpose="batch").id
        for name in ("stays", "deleted", "over")
    }
    ids = {name: id_in(file_id) for name, file_id in made.items()}
    client.files.delete(made["deleted"])
    with psycopg.connect(settings.database.url) as connection:
        connection.execute(
            "UPDATE files SET expires_at = now() - interval '2 min' WHERE id = %s", [ids["over"]]
        )
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made["over"])

    with closing(FileKeeper(settings)) as keeper:
        keeper.look()

    objects = Objects.of(settings)
    assert objects.read_range(key_of(ids["stays"]), 0, len(LINES)) == LINES  # type: ignore[arg-type]
    for name in ("deleted", "over"):
        with pytest.raises(StorageUnavailable):
            objects.read_range(key_of(ids[name]), 0, 1)  # type: ignore[arg-type]
    left = {row["id"] for row in rows(settings, "SELECT id FROM files")}
    assert ids["stays"] in left and not {ids["deleted"], ids["over"]} & left


def test_a_file_is_not_deleted_while_a_batch_takes_it(settings: Settings) -> None:
    quick = settings.database.model_copy(update={"lock_timeout_ms": 50})
    with (
        running_api(settings.model_copy(update={"database": quick})) as api,
        closing(Database(settings.database.url)) as database,
    ):
        made = api.post("/v1/files", files={"file": LINES}, data={"purpose": "batch"}).json()
        path = f"/v1/files/{made['id']}"
        with database.begin() as connection:
            files.find(connection, id_in(made["id"]), tenant="default", name="", hold=True)
            assert api.delete(path).status_code == 503
        assert api.delete(path).status_code == 200


def test_a_storage_that_is_away_is_a_503_and_loses_nothing(
    settings: Settings,
) -> None:
    port = free_port()
    away = {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"}
    keys = {"access_key_id": "miller", "secret_access_key": "secret"}
    given = settings.files.model_copy(update={"url": "s3://mill", "options": away | keys})
    with running_api(settings) as api:
        made = api.post("/v1/files", files={"file": LINES}, data={"purpose": "user_data"}).json()
    with running_api(settings.model_copy(update={"files": given})) as api:
        upload = api.post("/v1/files", files={"file": LINES}, data={"purpose": "user_data"})
        download = api.get(f"/v1/files/{made['id']}/content")
        known = api.get(f"/v1/files/{made['id']}")

    for refused in (upload, download):
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        assert "miller" not in refused.text and str(port) not in refused.text
    assert known.status_code == 200
    with running_api(settings) as api:
        assert api.get(f"/v1/files/{made['id']}/content").content == LINES
        assert len(api.get("/v1/files").json()["data"]) == 1


def test_too_many_uploads_at_once_are_refused_and_those_that_run_go_on(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str
) -> None:
    settings = make_settings(
        database={"url": database_url}, broker={"url": redis_url}, files={"max_uploads": 1}
    )
    body = form(PURPOSE, FILE) + END
    go_on = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield body[:-20]
        assert go_on.wait(60)
        yield body[-20:]

    headers = {"Content-Type": "multipart/form-data; boundary=mill"}
    with running_api(settings) as api:
        answers: list[httpx.Response] = []
        slow = threading.Thread(
            target=lambda: answers.append(api.post("/v1/files", content=slowly(), headers=headers))
        )
        slow.start()
        eventually(lambda: rows(settings, "SELECT FROM files"))  # the first one has begun
        second = api.post("/v1/files", content=body, headers=headers)
        go_on.set()
        slow.join()

        assert second.status_code == 503
        assert answers[0].status_code == 200
        assert api.post("/v1/files", content=body, headers=headers).status_code == 200


def test_a_client_that_goes_away_leaves_nothing_behind(settings: Settings) -> None:
    with running_api(settings) as api:
        url = api.base_url
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n"
                b"Content-Type: multipart/form-data; boundary=mill\r\n\r\n"
                + form(PURPOSE)
                + b'--mill\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
                + b"x" * 9_000_000
            )
        going = "SELECT FROM files WHERE state = 'deleted'"
        eventually(lambda: rows(settings, going))
        assert api.get("/v1/files").json()["data"] == []
    with closing(FileKeeper(settings)) as keeper:
        keeper.look()
    assert [
        each for each in (Path(settings.cache_dir) / "files").rglob("*") if each.is_file()
    ] == []


def test_the_digest_of_a_file_is_in_its_row(
    system: tuple[Settings, httpx.Client], client: openai.OpenAI
) -> None:
    settings, _ = system
    made = client.files.create(file=("a", LINES), purpose="user_data")

    [found] = rows(settings, f"SELECT sha256, bytes FROM files WHERE id = '{id_in(made.id)}'")
    assert found == {"sha256": hashlib.sha256(LINES).hexdigest(), "bytes": len(LINES)}
