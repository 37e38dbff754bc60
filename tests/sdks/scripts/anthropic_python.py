"""Anthropic's Python client, of several major versions, on every surface."""

import time

import anthropic

client = anthropic.Anthropic(max_retries=1)
MODEL = "smollm2-135m-instruct"
ASK = [{"role": "user", "content": "What is flour?"}]

assert MODEL in [model.id for model in client.models.list()]
message = client.messages.create(model=MODEL, max_tokens=8, messages=ASK, system="Be brief.")
assert message.content[0].text and message.usage.output_tokens <= 8
counted = client.messages.count_tokens(model=MODEL, messages=ASK, system="Be brief.")
assert counted.input_tokens == message.usage.input_tokens + (
    message.usage.cache_read_input_tokens or 0
)
with client.messages.stream(model=MODEL, max_tokens=8, messages=ASK) as stream:
    text = "".join(stream.text_stream)
assert text == stream.get_final_message().content[0].text
for kind, fields in (
    (anthropic.NotFoundError, {"model": "nobody"}),
    (anthropic.BadRequestError, {"stop_sequences": [""]}),
):
    try:
        client.messages.create(**{"model": MODEL, "max_tokens": 4, "messages": ASK, **fields})
    except kind as error:
        assert error.body["error"]["message"], error
    else:
        raise AssertionError(kind)

requests = [
    {"custom_id": f"line-{n}", "params": {"model": MODEL, "max_tokens": 4, "messages": ASK}}
    for n in range(20)
]
batch = client.messages.batches.create(requests=requests)
while batch.processing_status != "ended":
    time.sleep(0.2)
    batch = client.messages.batches.retrieve(batch.id)
assert batch.request_counts.succeeded == 20, batch
results = {each.custom_id: each.result for each in client.messages.batches.results(batch.id)}
assert len(results) == 20 and all(each.message.content for each in results.values())
assert batch.id in [each.id for each in client.messages.batches.list(limit=5)]
assert client.messages.batches.delete(batch.id).id == batch.id
