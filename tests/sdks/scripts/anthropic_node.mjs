// Anthropic's client for Node: the happy path.
import assert from "node:assert";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ maxRetries: 1 });
const model = "smollm2-135m-instruct";
const messages = [{ role: "user", content: "What is flour?" }];

const message = await client.messages.create({ model, messages, max_tokens: 8 });
assert(message.content[0].text);
const streamed = await client.messages.stream({ model, messages, max_tokens: 8 }).finalMessage();
assert.equal(streamed.content[0].text, message.content[0].text);

let batch = await client.messages.batches.create({
  requests: Array.from({ length: 20 }, (_, n) => ({
    custom_id: `line-${n}`, params: { model, messages, max_tokens: 4 },
  })),
});
while (batch.processing_status !== "ended") {
  await new Promise((go) => setTimeout(go, 200));
  batch = await client.messages.batches.retrieve(batch.id);
}
assert.equal(batch.request_counts.succeeded, 20);
let number = 0;
for await (const result of await client.messages.batches.results(batch.id)) {
  assert.equal(result.result.type, "succeeded");
  number += 1;
}
assert.equal(number, 20);
