"""Inspect: an evaluation whose questions go as a batch."""

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

task = Task(
    dataset=[Sample(input=f"What is flour {n}?", target="flour") for n in range(5)],
    solver=generate(),
    scorer=includes(),
)
[log] = eval(
    task,
    model="openai/smollm2-135m-instruct",
    model_args={"responses_api": False},
    batch=True,
    max_tokens=8,
    display="none",
)
assert log.status == "success", log.error
assert len(log.samples) == 5 and all(sample.output.completion for sample in log.samples)
