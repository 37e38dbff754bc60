"""OpenAI's Python client, of several major versions, on every surface."""

import io
import json
import time

import openai

client = openai.OpenAI(max_retries=1)
MODEL = "smollm2-135m-instruct"
ASK = [{"role": "user", "content": "What is flour?"}]

# models
assert MODEL in [model.id for model in client.models.list()]
assert client.models.retrieve(MODEL).id == MODEL

# calls that are waited for
answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=8)
assert answer.choices[0].message.content and answer.usage.completion_tokens <= 8
chunks = client.chat.completions.create(
    model=MODEL, messages=ASK, max_tokens=8, stream=True, stream_options={"include_usage": True}
)
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == answer.choices[0].message.content, text
assert client.completions.create(model=MODEL, prompt="A mill", max_tokens=4).choices[0].text
vectors = client.embeddings.create(model="all-minilm-l6-v2", input=["a", "b"]).data
assert len(vectors) == 2 and isinstance(vectors[0].embedding[0], float)
for kind, fields in (
    (openai.NotFoundError, {"model": "nobody"}),
    (openai.BadRequestError, {"temperature": 9}),
):
    try:
        client.chat.completions.create(**{"model": MODEL, "messages": ASK, **fields})
    except kind as error:
        assert error.body and error.body["message"], error
    else:
        raise AssertionError(kind)

# in the background
response = client.responses.create(model=MODEL, input="What is flour?", background=True)
while response.status in ("queued", "in_progress"):
    time.sleep(0.2)
    response = client.responses.retrieve(response.id)
assert response.status in ("completed", "incomplete") and response.output_text, response
client.responses.delete(response.id)

# a batch
lines = [
    {
        "custom_id": f"line-{n}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": MODEL, "messages": ASK, "max_tokens": 4},
    }
    for n in range(20)
]
file = client.files.create(
    file=("in.jsonl", io.BytesIO("\n".join(map(json.dumps, lines)).encode())), purpose="batch"
)
batch = client.batches.create(
    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
)
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(0.2)
    batch = client.batches.retrieve(batch.id)
assert batch.status == "completed" and batch.request_counts.completed == 20, batch
told = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
assert sorted(each["custom_id"] for each in told) == sorted(each["custom_id"] for each in lines)
assert batch.id in [each.id for each in client.batches.list(limit=5)]
assert client.files.delete(file.id).deleted
