"""A small client of the HTTP API, sync and async. Of third parties it needs httpx alone.

    with Client("http://127.0.0.1:8000") as gristmill:
        job_id = gristmill.submit({"prompt": "A grist mill is", "max_tokens": 32})
        print(gristmill.result(job_id)["choices"][0]["text"])

`AsyncClient` has the same methods, to be awaited. What a method does is written once, as a flow
that yields the requests to send, the pauses to make and what to hand out (`flows`); each client
only carries flows out.

Answers 408, 429, 502, 503 and 504 and lost connections are tried again for `patience_s`, which
outlasts a restart of the API, and never sooner than Retry-After says. That is safe: a submission
has an idempotency key in any case. Errors are those of `gristmill_client.errors`, by the `code` of
the answer.
"""

from gristmill_client.asynchronous import AsyncClient
from gristmill_client.errors import GristmillError
from gristmill_client.events import JobEvent
from gristmill_client.job import Cancelled, Job, JobFailed
from gristmill_client.options import Chosen, Filters, Options, Submission
from gristmill_client.state import JobState
from gristmill_client.sync import Client

__all__ = [
    "AsyncClient",
    "Cancelled",
    "Chosen",
    "Client",
    "Filters",
    "GristmillError",
    "Job",
    "JobEvent",
    "JobFailed",
    "JobState",
    "Options",
    "Submission",
]
