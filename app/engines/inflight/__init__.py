"""The in-flight engine: sequences join and leave between the steps of the model.

The life of a sequence: `scheduler` admits it and gives it blocks of the KV cache (`cache`), the
first of them ready-made where a prompt began alike (`prefix`); each step of `engine` computes its
next tokens, packed with everybody else's, through transformers' own model code with our attention
(`attention`, on CPUs `native`); the sampler picks a token; a finished row leaves at once.

On a CUDA device a step is told to the device in one transfer (`staging`), runs over pages (`paged`,
`kernels`) as a recorded graph (`graphs`), draws its tokens there (`drawing`), and is launched while
the one before still runs (`launcher`).
"""

from app.engines.inflight.engine import InflightEngine

__all__ = ["InflightEngine"]
