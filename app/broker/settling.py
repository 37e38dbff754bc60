"""Messages as Celery settles them, and one message that stands for many jobs.

Celery gets a piece for each job of such a message, with its own start, end and revoke. The message
itself is acknowledged when the last of them is, so it comes again, whole, if its worker dies with
one left: rows that have ended by then drop theirs.
"""

from __future__ import annotations

import logging
from typing import Any

from kombu.transport import virtual

from app import telemetry

log = logging.getLogger(__name__)
telemetry.say_once(log)


class _Quiet:
    """A message whose acknowledgement may fail, with a word and not with a traceback.

    It then comes again, and its row says what became of it.
    """

    __slots__ = ()

    def ack_log_error(self, logger: object, errors: Any, multiple: bool = False) -> None:
        try:
            self.ack(multiple=multiple)  # type: ignore[attr-defined]
        except errors as error:
            _say_unsettled("acknowledged", error)
            if isinstance(error, BrokenPipeError):  # Celery connects anew for this one
                raise

    def reject_log_error(self, logger: object, errors: Any, requeue: bool = False) -> None:
        try:
            self.reject(requeue=requeue)  # type: ignore[attr-defined]
        except errors as error:
            _say_unsettled("given back", error)


def _say_unsettled(what: str, error: Exception) -> None:
    sentence = "A message could not be %s (%s): it comes again, and its row is the truth."
    log.warning(sentence, what, type(error).__name__, extra={"action": "not_settled"})


class Message(_Quiet, virtual.Message):
    """What a channel makes of an item of a list."""


class Piece(_Quiet):
    """One job of a message; what it is settled as first counts."""

    __slots__ = ("_bundle", "_is_settled")

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._is_settled = False

    @property
    def delivery_info(self) -> dict[str, Any]:
        """Of the message."""
        return self._bundle.delivery_info

    def ack(self, multiple: bool = False) -> None:
        self._settle(requeue=False)

    def reject(self, requeue: bool = False) -> None:
        self._settle(requeue=requeue)

    def _settle(self, *, requeue: bool) -> None:
        if not self._is_settled:
            self._is_settled = True
            self._bundle.settle(requeue=requeue)


class Bundle:
    """A message of many jobs, which have pieces of it."""

    def __init__(self, message: Any, num_jobs: int) -> None:
        self._message = message
        self._left = num_jobs
        self._comes_again = False

    def piece(self) -> Piece:
        """To be called once for each job."""
        return Piece(self)

    @property
    def delivery_info(self) -> dict[str, Any]:
        info: dict[str, Any] = self._message.delivery_info
        return info

    def settle(self, *, requeue: bool) -> None:
        """A piece is done with, or to come again: then all do, once the last one is."""
        self._left -= 1
        self._comes_again = self._comes_again or requeue
        if self._left:
            self._message.channel.qos.lighten(self._message.delivery_tag)
        elif self._comes_again:
            self._message.reject(requeue=True)
        else:
            self._message.ack()
