"""Remote control: what Celery's commands mean here, and a command of our own.

How many messages a worker holds follows from its models' batches and is not for a command to
change. Commands that would, or that nothing here would heed, answer with a refusal that says what
to do.
"""

from __future__ import annotations

from typing import Any, Final

from celery.worker.control import Panel, control_command, inspect_command, nok

from app.broker.commands import READINESS

_SIZE: Final = "set max_batch_size of the model in models.toml and start the worker again."
REFUSED: Final = {
    "pool_grow": f"A worker's size follows from its models' batches: {_SIZE}",
    "pool_shrink": f"A worker's size follows from its models' batches: {_SIZE}",
    "autoscale": f"There is no autoscaling: {_SIZE} Start more workers for more work.",
    "election": "Workers hold no elections: they run without gossip.",
    "pool_restart": "Send the worker SIGTERM and start it again: a model is loaded once.",
    "rate_limit": "There are no rate limits by task; broker.max_messages bounds a queue.",
}
"""Celery's commands that are answered with a sentence."""


def _refuse(name: str, sentence: str) -> None:
    celerys = Panel.meta[name]

    def refuse(state: Any, **_: Any) -> Any:
        return nok(sentence)

    refuse.__doc__ = f"Refused: {sentence}"
    control_command(name=name, args=celerys.args, signature=celerys.signature)(refuse)


for _name, _sentence in REFUSED.items():
    _refuse(_name, _sentence)


@control_command(  # type: ignore[untyped-decorator]
    args=[("task_name", str), ("hard", float), ("soft", float)],
    signature="<task_name> <hard_secs> [soft_secs]",
)
def time_limit(
    state: Any, task_name: str = "", hard: float | None = None, soft: float | None = None, **_: Any
) -> Any:
    """Set the time limit of a task's later messages that bring none; only a hard one."""
    task = state.app.tasks.get(task_name)
    if task is None:
        return nok(f"There is no task {task_name}.")
    if soft is not None:
        return nok("There are no soft time limits: set the hard one alone.")
    task.time_limit = hard
    state.consumer.update_strategies()  # Celery read the task's limit when it made them
    return {"ok": "time limit set"}


@inspect_command()  # type: ignore[untyped-decorator]
def stats(state: Any, **_: Any) -> dict[str, Any]:
    """What Celery tells of a worker. Of its broker only where it is: among the options of a
    connection are passwords, which Celery knows only some of, and Flower shows them all."""
    told: dict[str, Any] = state.consumer.controller.stats()
    with state.app.connection_for_read() as connection:
        told["broker"] = {"transport": connection.transport_cls, "uri": connection.as_uri()}
    return told


@inspect_command(name=READINESS)  # type: ignore[untyped-decorator]
def readiness(state: Any) -> dict[str, Any]:
    """The answer to `app.broker.commands.workers`: it shows that the hub turns, too."""
    answer: dict[str, Any] = state.consumer.pool.readiness()
    return answer
