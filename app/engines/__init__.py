"""Engines: sequences of token ids in, generations out. They import no Celery and no Postgres."""

import os

# torch reads this when it first takes memory: large tensors lie in large pages, so that weights and
# KV cache are read with fewer look-ups of addresses.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
