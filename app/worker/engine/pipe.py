"""The socket between a worker and its engine process: messages, pickled, each behind its length.

The worker's end never waits for the engine process, which may be stopped, frozen or stuck in the
device's driver in the middle of a message: what the socket does not take now is kept here, and
what has come only in part is left for later. The engine's end has threads that may wait.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from typing import Any, Final

_LENGTH: Final = struct.Struct("=Q")
_PIECE_BYTES: Final = 1 << 18


def _framed(message: object) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class WorkerEnd:
    """Sends and receives without ever waiting.

    What is kept for the engine process is bounded: no more rows are sent than it has room for.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self._has_ended = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether something waits here until the socket takes more: call `flush` then."""
        return bool(self._outgoing)

    @property
    def unsent_bytes(self) -> int:
        return len(self._outgoing)

    def send(self, message: object) -> None:
        """Raises `OSError` if the other end is gone."""
        self._outgoing += _framed(message)
        self.flush()

    def flush(self) -> None:
        """Write what the socket takes now; raises `OSError` if the other end is gone."""
        while self._outgoing:
            try:
                with memoryview(self._outgoing)[:_PIECE_BYTES] as piece:
                    sent = self._socket.send(piece)
            except BlockingIOError:
                return
            del self._outgoing[:sent]

    def poll(self) -> bool:
        """Whether `recv` has a message, or the news that no more will come."""
        while not self._is_whole and not self._has_ended:
            try:
                piece = self._socket.recv(_PIECE_BYTES)
            except BlockingIOError:
                return False
            except OSError:
                piece = b""
            self._incoming += piece
            self._has_ended = not piece
        return True

    def recv(self) -> Any:
        """The message that `poll` has found; raises `EOFError` if the other end is gone."""
        if not self._is_whole:
            raise EOFError
        end = _LENGTH.size + _LENGTH.unpack_from(self._incoming)[0]
        with memoryview(self._incoming)[_LENGTH.size : end] as data:
            message = pickle.loads(data)
        del self._incoming[:end]
        return message

    def close(self) -> None:
        self._socket.close()

    @property
    def _is_whole(self) -> bool:
        come = len(self._incoming)
        return come >= _LENGTH.size and (
            come >= _LENGTH.size + _LENGTH.unpack_from(self._incoming)[0]
        )


class EngineEnd:
    """Waits until a message has gone or come. Any threads may send while one receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._sending = threading.Lock()
        self._reader = sock.makefile("rb")

    def send(self, message: object) -> None:
        """Raises `OSError` if the worker is gone."""
        framed = _framed(message)
        with self._sending:
            self._socket.sendall(framed)

    def recv(self) -> Any:
        """The next message; raises `EOFError` or `OSError` if the worker is gone."""
        [length] = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def _read(self, length: int) -> bytes:
        data = self._reader.read(length)
        if len(data) < length:
            raise EOFError
        return data
