"""Logging of every process: one line an event, for people or for machines, and never a prompt.

Plain text by default; one JSON object a line with GRISTMILL_LOG_FORMAT=json. Ids and counts go in
`extra={...}`: they end the line as `key=value`, or become keys of the object.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any, Final

from app.printable import printable


def setup_logging(level: str | int = "INFO") -> None:
    """Send this process's log to standard error, in place of what was set up before.

    `level` is a name or number of the logging module.
    """
    handler = logging.StreamHandler(sys.stderr)
    as_json = os.environ.get("GRISTMILL_LOG_FORMAT") == "json"
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    handler.addFilter(redact)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.INFO, root.level))
    is_debug = root.level <= logging.DEBUG
    logging.getLogger(_LINE_A_JOB).setLevel(root.level if is_debug else logging.WARNING)


QUIET_S: Final = 60.0
"""What was said is said again when it still holds, or comes back, after so long."""
_MAX_REMEMBERED: Final = 100


def say_once(log: logging.Logger) -> logging.Logger:
    """Let each warning of this logger pass once in a while: an outage is one line, not one a
    second, nor one for each message that it meets."""
    said: dict[str, float] = {}

    def is_news(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        text, now = record.getMessage(), time.monotonic()
        if now - said.get(text, -QUIET_S) < QUIET_S:
            return False
        if len(said) >= _MAX_REMEMBERED:
            said.clear()
        said[text] = now
        return True

    log.addFilter(is_news)
    return log


_TALKATIVE: Final = ("celery.pool", "kombu", "httpcore", "httpx", "asyncio")
"""At DEBUG these print arguments, or a line for every read of a socket."""

_LINE_A_JOB: Final = "celery.worker.strategy"
"""Says at INFO that a message came, of each: a seventh of what a small job costs a worker."""

_DUMPS_BY_LOGGER: Final = {
    "celery": ("message body", "args:", "Task: %r"),
    "kombu": ("message: %r", "Cannot process event"),
}
"""Parts of the templates under which Celery and kombu print a whole message or its arguments."""


def redact(record: logging.LogRecord) -> bool:
    """Cut message bodies, arguments and headers out of Celery's and kombu's records.

    Both print the message when it is unknown, invalid, undecodable or cannot be put back. What
    stays is the sentence in front of the dump; the exception goes too, since its text may quote
    the message.
    """
    dumps = _DUMPS_BY_LOGGER.get(record.name.partition(".")[0], ())
    template = str(record.msg)
    if any(part in template for part in dumps):
        first_words = template.partition("%")[0].partition("\n")[0].rstrip()
        record.msg = f"{first_words} [contents left out]"
        record.args = record.exc_info = record.exc_text = None
    return True


class TextFormatter(logging.Formatter):
    """`2026-11-23T12:00:00.000Z INFO  app.rescue: Sent again. model=smollm2 jobs=3`"""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))  # a message may quote a foreign task's name

    def formatMessage(self, record: logging.LogRecord) -> str:
        extra = "".join(f" {key}={value}" for key, value in _extra(record).items())
        return super().formatMessage(record) + extra


class JsonFormatter(TextFormatter):
    """One object: time, level, logger, message, then the extra fields and the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


_STANDARD_FIELDS: Final = frozenset(vars(logging.makeLogRecord({})))
_NOT_SHOWN: Final = _STANDARD_FIELDS | {
    "message", "asctime",
    "data",  # Celery's own extra: the arguments of a task
    "color_message",  # uvicorn's: the message once more
}  # fmt: skip


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _NOT_SHOWN}
