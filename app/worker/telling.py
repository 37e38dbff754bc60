"""What Celery, and so Flower, hears of a job that has ended: only after its row says so."""

from __future__ import annotations

from functools import partial

from app.jobs import JobState
from app.store.claims import Finished
from app.worker.work import TIMED_OUT, Doomed, Job


def tell_ended(job: Job, *, is_committed: bool) -> None:
    """Tell how a job ended, and ack; one that was fenced out is somebody else's to tell."""
    run, record = job.claimed_run, job.claimed_run.record
    if record is None or not is_committed:
        job.ticket.dropped()
        return
    runtime_s = record.device_ns / 1e9
    if record.state is JobState.COMPLETED:
        job.ticket.succeeded(partial(_summary, job, record), runtime_s)
    elif run.ending is TIMED_OUT:
        job.ticket.timed_out()
    elif run.ending is not None:
        job.ticket.failed(run.ending.code, run.ending.message, runtime_s)
    else:
        job.ticket.failed(record.error_code or "", record.error_message or "", runtime_s)


def tell_doomed(job: Doomed, *, is_committed: bool) -> None:
    if is_committed:
        job.ticket.failed(job.ending.code, job.ending.message, 0.0)
    else:
        job.ticket.dropped()


def _summary(job: Job, record: Finished) -> str:
    """What Flower shows as the result: never text of the prompt or the answer."""
    return repr(
        {
            "in": record.input_tokens,  # first what Flower's list has room for
            "out": record.output_tokens,
            "cached": record.cached_tokens,
            "batch": str(job.claimed_run.batch.id)[-8:],
            "size": record.batch_size,
            "model": job.model,
            "cost": None if record.cost is None else f"{record.cost:f} {record.currency}",
        }
    )
