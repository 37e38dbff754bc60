"""Flower, with the door of the API: `python -m app.broker.flower -A app.worker flower …`.

Flower serves whatever host a request names, and without a password of its own it tells web pages of
all origins to read. It has no option for either, so its application is told here.
"""

from __future__ import annotations

import base64
import hmac
import sys
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import flower.app
import flower.command
from celery.bin.celery import main
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.web import ErrorHandler, OutputTransform

from app.config.callers import HEADERS, Refusal, refusal
from app.config.file import load


class ClosedFlower(flower.app.Flower):  # type: ignore[misc]
    """Refuses web pages of other origins, names that are not this server's, and whoever asks for
    metrics without a password, where there are passwords."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._allowed_hosts = load().settings.flower.allowed_hosts
        self.add_transform(_Headers)

    def find_handler(self, request: HTTPServerRequest, **given: Any) -> Any:
        method, headers = str(request.method), request.headers
        refused = refusal(method, headers, self._allowed_hosts, "flower.allowed_hosts")
        if refused is None and request.path.rstrip("/").endswith("/metrics"):
            sent, options = headers.get("Authorization"), self.options
            refused = unknown_scraper(sent, options.basic_auth or (), bool(options.auth))
        if refused is None:
            return super().find_handler(request, **given)
        told = {"status_code": refused.status, "detail": refused.detail}
        return self.get_handler_delegate(request, _Refused, told)


def unknown_scraper(given: str | None, users: Iterable[str], has_login: bool) -> Refusal | None:
    """Why metrics are not told, if they are not: Flower itself tells them to whoever asks.

    `given` is the header Authorization, `users` those of FLOWER_BASIC_AUTH as `user:password`;
    `has_login`: people log in elsewhere (FLOWER_AUTH), which Prometheus cannot.
    """
    known = list(users)
    if not known and not has_login:  # on the loopback address alone
        return None
    scheme, _, encoded = (given or "").partition(" ")
    try:
        told = (
            base64.b64decode(encoded.strip(), validate=True) if scheme.lower() == "basic" else b""
        )
    except ValueError:
        told = b""
    if sum(hmac.compare_digest(told, each.encode()) for each in known):  # each is compared
        return None
    return Refusal(HTTPStatus.UNAUTHORIZED, "Send a user and a password of FLOWER_BASIC_AUTH.")


class _Refused(ErrorHandler):
    def initialize(self, status_code: int, detail: str) -> None:  # type: ignore[override]
        super().initialize(status_code)
        self._detail = detail
        if status_code == HTTPStatus.UNAUTHORIZED:
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')

    def write_error(self, status_code: int, **_: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{self._detail}\n")


class _Headers(OutputTransform):
    """Ours in place of those by which Flower lets all pages read."""

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        for name in [name for name in headers if name.startswith("Access-Control-")]:
            del headers[name]
        for name, value in HEADERS.items():
            headers[name] = value
        return status_code, headers, chunk


if __name__ == "__main__":
    flower.command.Flower = ClosedFlower
    sys.exit(main())
