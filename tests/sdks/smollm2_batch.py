"""A batch on a real model, SmolLM2, from its file to its answers, by OpenAI's client.

    python -m tests.sdks.smollm2_batch [LINES]

Prints lines a second, and how much the API's memory grew meanwhile. Ends with status 1 unless every
line has one answer of its own.
"""

from __future__ import annotations

import io
import json
import sys
import time

import openai
import psutil

from tests.sdks.system import running_system

MODEL = "smollm2-135m-instruct"


def main(lines: int) -> int:
    with running_system(stubs=False) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        _answer(client, 4)  # the model is loaded
        api = _api()
        before = most = api.memory_info().rss
        began = time.monotonic()
        batch = _submit(client, lines)
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            time.sleep(0.2)
            most = max(most, api.memory_info().rss)
            batch = client.batches.retrieve(batch.id)
        seconds = time.monotonic() - began
        told = [json.loads(each) for each in _output(client, batch)]
    numbers = sorted(int(each["custom_id"]) for each in told)
    texts = [each["response"]["body"]["choices"][0]["message"]["content"] for each in told]
    is_right = numbers == list(range(lines)) and all(texts) and batch.status == "completed"
    is_right = is_right and batch.request_counts.completed == lines
    figures = {
        "lines": lines,
        "lines_per_s": round(lines / seconds, 1),
        "output_tokens": batch.usage.output_tokens,
        "api_mb": [before // 10**6, most // 10**6],
        "is_right": is_right,
    }
    print(json.dumps({"bench": "smollm2_batch"} | figures))
    return int(not is_right)


def _submit(client: openai.OpenAI, lines: int) -> openai.types.Batch:
    rows = (
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": MODEL,
                "max_tokens": 32,
                "messages": [{"role": "user", "content": f"Say something about mill {number}."}],
            },
        }
        for number in range(lines)
    )
    content = io.BytesIO("\n".join(map(json.dumps, rows)).encode())
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )


def _answer(client: openai.OpenAI, max_tokens: int) -> None:
    for _ in range(60):
        try:
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Hello."}],
                max_tokens=max_tokens,
            )
            return
        except openai.InternalServerError:  # no worker is up yet
            time.sleep(1)
    raise TimeoutError("The model is not served.")


def _output(client: openai.OpenAI, batch: openai.types.Batch) -> list[str]:
    if batch.output_file_id is None:
        return []
    return client.files.content(batch.output_file_id).text.splitlines()


def _api() -> psutil.Process:
    for child in psutil.Process().children(recursive=True):
        if child.cmdline()[-1:] == ["api"] or "api" in child.cmdline()[1:5]:
            return child
    raise LookupError("There is no API among the children.")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500))
