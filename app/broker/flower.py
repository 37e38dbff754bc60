"""Flower, with the door of the API: `python -m app.broker.flower -A app.worker flower …`.

Flower serves whatever host a request names, and without a password of its own it tells web pages of
all origins to read. It has no option for either, so its application is told here.
"""

from __future__ import annotations

import sys
from typing import Any

import flower.app
import flower.command
from celery.bin.celery import main
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.web import ErrorHandler, OutputTransform

from app.config.callers import HEADERS, refusal
from app.config.file import load


class ClosedFlower(flower.app.Flower):  # type: ignore[misc]
    """Refuses web pages of other origins, and names that are not this server's."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._allowed_hosts = load().settings.flower.allowed_hosts
        self.add_transform(_Headers)

    def find_handler(self, request: HTTPServerRequest, **given: Any) -> Any:
        method, headers = str(request.method), request.headers
        refused = refusal(method, headers, self._allowed_hosts, "flower.allowed_hosts")
        if refused is None:
            return super().find_handler(request, **given)
        told = {"status_code": refused.status, "detail": refused.detail}
        return self.get_handler_delegate(request, _Refused, told)


class _Refused(ErrorHandler):
    def initialize(self, status_code: int, detail: str) -> None:  # type: ignore[override]
        super().initialize(status_code)
        self._detail = detail

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
