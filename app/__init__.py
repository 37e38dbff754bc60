"""Gristmill: a message-queue driven asynchronous inference worker."""

__version__ = "0.1.0"
