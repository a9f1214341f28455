// The same with openai for Node.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const load = createRequire(process.cwd() + "/node/");
const OpenAI = load("openai").default;
const { url, model, messages } = JSON.parse(readFileSync(0, "utf8"));
const plain = { model, temperature: 0, max_tokens: 12 };
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const told = {};

told.models = [(await client.models.list()).data[0].id, (await client.models.retrieve(model)).id];
told.chat = (await client.chat.completions.create({ messages, ...plain })).choices[0].message.content;
told.chat_stream = "";
const chunks = await client.chat.completions.create({
  messages,
  stream: true,
  stream_options: { include_usage: true },
  ...plain,
});
for await (const chunk of chunks) {
  told.chat_stream += chunk.choices[0]?.delta.content ?? "";
  told.chat_stream_usage = chunk.usage?.completion_tokens;
}
const runner = client.chat.completions.stream({ messages, ...plain });
told.chat_accumulated = await runner.finalContent();
const completion = { prompt: "Paris is the capital of", ...plain };
told.completion = (await client.completions.create(completion)).choices[0].text;
told.completion_stream = "";
for await (const piece of await client.completions.create({ stream: true, ...completion }))
  told.completion_stream += piece.choices[0].text;
const asked = { model, input: messages, temperature: 0, max_output_tokens: 16 };
told.response = (await client.responses.create(asked)).output_text;
told.response_stream = "";
for await (const event of await client.responses.create({ stream: true, ...asked }))
  if (event.type === "response.output_text.delta") told.response_stream += event.delta;
const vectors = await client.embeddings.create({ model, input: ["one", "two"] });
told.embeddings = vectors.data.map((item) => item.embedding.length);
console.log(JSON.stringify(told));
