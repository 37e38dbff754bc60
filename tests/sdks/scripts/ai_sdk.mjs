// Vercel's AI SDK with its provider for compatible servers: the happy path.
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, streamText } from "ai";

const mill = createOpenAICompatible({ name: "mill", baseURL: process.env.OPENAI_BASE_URL });
const model = mill("smollm2-135m-instruct");

const { text, usage } = await generateText({ model, prompt: "What is flour?", maxOutputTokens: 8 });
assert(text && usage.outputTokens <= 8);
let streamed = "";
for await (const part of streamText({ model, prompt: "What is flour?", maxOutputTokens: 8 }).textStream)
  streamed += part;
assert.equal(streamed, text);
const { embeddings } = await embedMany({
  model: (mill.embeddingModel ?? mill.textEmbeddingModel)("all-minilm-l6-v2"), values: ["a", "b"],
});
assert.equal(embeddings.length, 2);
