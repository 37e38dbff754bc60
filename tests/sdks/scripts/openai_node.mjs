// OpenAI's client for Node: the happy path.
import assert from "node:assert";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ maxRetries: 1 });
const model = "smollm2-135m-instruct";
const messages = [{ role: "user", content: "What is flour?" }];

const answer = await client.chat.completions.create({ model, messages, max_tokens: 8 });
assert(answer.choices[0].message.content);
let text = "";
for await (const chunk of await client.chat.completions.create({
  model, messages, max_tokens: 8, stream: true,
})) text += chunk.choices[0]?.delta?.content ?? "";
assert.equal(text, answer.choices[0].message.content);
const vectors = await client.embeddings.create({ model: "all-minilm-l6-v2", input: ["a", "b"] });
assert.equal(vectors.data.length, 2);

const pause = () => new Promise((go) => setTimeout(go, 200));
let response = await client.responses.create({ model, input: "What is flour?", background: true });
while (["queued", "in_progress"].includes(response.status)) {
  await pause();
  response = await client.responses.retrieve(response.id);
}
assert(response.output_text);

const lines = Array.from({ length: 20 }, (_, n) => JSON.stringify({
  custom_id: `line-${n}`, method: "POST", url: "/v1/chat/completions",
  body: { model, messages, max_tokens: 4 },
}));
const file = await client.files.create({
  file: await toFile(Buffer.from(lines.join("\n")), "in.jsonl"), purpose: "batch",
});
let batch = await client.batches.create({
  input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h",
});
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  await pause();
  batch = await client.batches.retrieve(batch.id);
}
assert.equal(batch.request_counts.completed, 20);
const told = await (await client.files.content(batch.output_file_id)).text();
assert.equal(told.trim().split("\n").length, 20);
