"""What a web page of another origin can do to the API of this machine: nothing, in a real browser.

The page comes from another port, and once more under a name that leads to the API itself (DNS
rebinding). It tries all that a page can; what came of each try is in its title when it is done.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import httpx
import pytest

from app.config.settings import Settings
from tests.apis import Hands, running_api

CHROMIUM: Final = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

SECRET: Final = "an answer that no page may read"
SCRIPT: Final = """
const api = API, jobs = JOBS, job_json = JSON.stringify({body: {prompt: "by a page"}});
const said = {};
async function attempt(name, doing) {
  try { said[name] = await doing(); } catch (error) { said[name] = "refused: " + error.name; }
}
async function read(path, options) {
  const answer = await fetch(api + path, options);
  return answer.type + " " + answer.status + " " + (await answer.text());
}
function load(kind, path, attribute = "src") {
  return new Promise(done => {
    const element = document.createElement(kind);
    element.onload = () => done("loaded");
    element.onerror = () => done("refused: error");
    element[attribute] = api + path;
    document.body.append(element);
    setTimeout(() => done("refused: nothing came"), 4000);
  });
}
function framed(path) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.onload = () => {
      try { done("read " + frame.contentDocument.body.innerText); }
      catch { done("refused: closed"); }
    };
    frame.src = api + path;
    document.body.append(frame);
    setTimeout(() => done("refused: nothing came"), 4000);
  });
}
function post_form(path, type, name) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.name = "target" + Math.random();
    document.body.append(frame);
    const form = document.createElement("form");
    Object.assign(form, {method: "POST", action: api + path, enctype: type, target: frame.name});
    const field = document.createElement("input");
    Object.assign(field, {name: name, value: '"}'});
    form.append(field);
    document.body.append(form);
    frame.onload = () => done("refused: it cannot be told");
    form.submit();
    setTimeout(() => done("refused: nothing came"), 4000);
  });
}
(async () => {
  const json = {"Content-Type": "application/json"}, plain = {"Content-Type": "text/plain"};
  const paths = ["/v1/jobs", "/metrics", "/openapi.json", "/v1/jobs/"];
  const [done_id, id] = jobs.map(job => "/v1/jobs/" + job);
  for (const mode of ["cors", "no-cors"]) {
    for (const path of [done_id, id, ...paths])
      await attempt("read " + mode + path, () => read(path, {mode}));
    for (const headers of [plain, json])
      await attempt("submit " + mode + headers["Content-Type"],
        () => read("/v1/jobs", {mode, method: "POST", headers, body: job_json}));
    for (const path of [id + "/cancel", done_id + "/replay"])
      await attempt(mode + path, () => read(path, {mode, method: "POST"}));
    await attempt("delete " + mode, () => read(id, {mode, method: "DELETE"}));
  }
  await attempt("beacon", () => "refused: " + navigator.sendBeacon(api + id + "/cancel"));
  await attempt("form cancel", () => post_form(id + "/cancel", "text/plain", "a"));
  await attempt("form submit", () => post_form("/v1/jobs", "text/plain", job_json.slice(0, -2)));
  await attempt("image", () => load("img", "/static-offline-docs/favicon.png"));
  await attempt("script", () => load("script", "/openapi.json"));
  await attempt("style", async () => load("link", "/static-offline-docs/swagger-ui.css", "href"));
  await attempt("frame", () => framed(done_id));
  await attempt("socket", () => new Promise(done => {
    const socket = new WebSocket(api.replace("http", "ws") + id);
    socket.onopen = () => done("opened");
    socket.onerror = () => done("refused: error");
  }));
  await fetch("/said", {method: "POST", body: JSON.stringify(said)});
})();
"""


class Page:
    """A server of the page, whose other paths lead to the API with the headers as they came.

    A name that leads here is, to the API, a name of the page's owner that leads to the API.
    """

    def __init__(self, base: str, api_port: int, jobs: list[str], *, is_careless: bool) -> None:
        """`base` is where the page finds the API; a careless proxy hides from where it asks."""
        script = SCRIPT.replace("API", json.dumps(base), 1).replace("JOBS", json.dumps(jobs), 1)
        self.said: dict[str, str] = {}
        self.is_done = threading.Event()
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/":
                    body = f"<!doctype html><meta charset=utf-8><body><script>{script}</script>"
                    self.answer(200, {"Content-Type": "text/html"}, body.encode())
                else:
                    self.pass_on()

            def do_POST(self) -> None:
                if self.path == "/said":
                    page.said.update(json.loads(self.body()))
                    self.answer(204, {}, b"")
                    page.is_done.set()
                else:
                    self.pass_on()

            do_DELETE = do_POST

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def pass_on(self) -> None:
                headers = dict(self.headers)
                if is_careless:
                    headers = {"Content-Type": "application/json"}
                url = f"http://127.0.0.1:{api_port}{self.path}"
                answer = httpx.request(
                    self.command, url, headers=headers, content=self.body(), trust_env=False
                )
                self.answer(answer.status_code, {"Content-Type": "text/plain"}, answer.content)

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if status != 204:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port

    def visited(self, url: str, folder: Path) -> dict[str, str]:
        """What came of each try, in a browser that opens the page."""
        thread = threading.Thread(target=self._server.serve_forever, args=[0.05])
        thread.start()
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--no-proxy-server", "--disable-background-networking"),
            *("--disable-features=HttpsUpgrades", f"--user-data-dir={folder}"),
            "--host-resolver-rules=MAP *.example 127.0.0.1",
        ]
        assert CHROMIUM is not None
        with (folder / "log").open("wb") as log:
            browser = subprocess.Popen([CHROMIUM, *options, url], stdout=log, stderr=log)
        try:
            assert self.is_done.wait(180), (folder / "log").read_text()
        finally:
            browser.terminate()
            browser.wait(30)
            self._server.shutdown()
            thread.join()
            self._server.server_close()
        return self.said


@dataclass
class Scene:
    api: httpx.Client
    done: str  #: a job whose answer no page may read
    queued: str  #: one that no page may cancel

    @property
    def port(self) -> int:
        assert self.api.base_url.port
        return self.api.base_url.port

    @property
    def states(self) -> dict[str, str]:
        return {job["id"]: job["state"] for job in self.api.get("/v1/jobs").json()["data"]}

    def page(self, base: str, *, is_careless: bool = False) -> Page:
        return Page(base, self.port, [self.done, self.queued], is_careless=is_careless)


@pytest.fixture
def scene(settings: Settings) -> Iterator[Scene]:
    hands = Hands(settings.database.url)
    with running_api(settings) as api:

        def submit() -> str:
            body = {"body": {"prompt": "of another"}}
            return str(api.post("/v1/jobs", json=body).raise_for_status().json()["id"])

        done, queued = submit(), submit()
        hands.finish(hands.claim(done), response={"choices": [{"text": SECRET}]})
        yield Scene(api, done, queued)
    hands.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"])
def test_a_page_of_another_origin_reads_submits_and_cancels_nothing(
    scene: Scene, tmp_path: Path, host: str
) -> None:
    before = scene.states
    page = scene.page(f"http://127.0.0.1:{scene.port}")

    said = page.visited(f"http://{host}:{page.port}/", tmp_path)

    assert len(said) > 25
    assert not {name: it for name, it in said.items() if not re.match(r"refused: |opaque 0 $", it)}
    assert scene.states == before
    refused = 'status="403"'  # its requests came, and were refused here
    assert [line for line in scene.api.get("/metrics").text.splitlines() if refused in line]


def test_a_page_whose_name_leads_here_reads_submits_and_cancels_nothing(
    scene: Scene, tmp_path: Path
) -> None:
    before = scene.states
    page = scene.page("")

    said = page.visited(f"http://rebound.example:{page.port}/", tmp_path)

    told = " ".join(said.values())
    assert "misdirected_request" in told
    assert SECRET not in told and "gristmill_" not in told and '"has_more"' not in told
    assert scene.states == before


def test_the_page_would_succeed_if_nothing_told_from_where_it_asks(
    scene: Scene, tmp_path: Path
) -> None:
    page = scene.page("", is_careless=True)

    said = page.visited(f"http://rebound.example:{page.port}/", tmp_path)

    assert SECRET in " ".join(said.values())
    assert scene.states.get(scene.queued) != "queued"
    assert len(scene.states) > 2
