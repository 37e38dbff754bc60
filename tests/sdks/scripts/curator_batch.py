"""Curator: a dataset whose answers come from a batch."""

import os
import tempfile

os.environ["CURATOR_CACHE_DIR"] = tempfile.mkdtemp()
os.environ["CURATOR_DISABLE_CACHE"] = "1"
os.environ["TELEMETRY_ENABLED"] = "0"
os.environ["CURATOR_VIEWER"] = "0"

from bespokelabs import curator

llm = curator.LLM(
    model_name="smollm2-135m-instruct",
    backend="openai",
    batch=True,
    backend_params={
        "base_url": os.environ["OPENAI_BASE_URL"],
        "batch_check_interval": 1,
        "invalid_finish_reasons": [],
    },
    generation_params={"max_tokens": 8},
)
answers = llm([f"What is flour {n}?" for n in range(5)])
rows = getattr(answers, "dataset", answers)
assert len(rows) == 5, rows
