"""Engines: sequences of token ids in, generations out. They import no Celery and no Postgres."""
