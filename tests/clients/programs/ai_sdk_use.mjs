// Vercel's AI SDK: text, objects and a tool that must be called, whole and streamed.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const find = createRequire(process.cwd() + "/node/");
const load = (name) => import(pathToFileURL(find.resolve(name)));
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { generateObject, generateText, jsonSchema, streamObject, streamText, tool } = await load("ai");
const { url, model, messages, schema } = JSON.parse(readFileSync(0, "utf8"));
globalThis.AI_SDK_LOG_WARNINGS = false;

const given = { name: "jaxllm", baseURL: url, apiKey: "none", supportsStructuredOutputs: true };
const provider = createOpenAICompatible({ ...given, includeUsage: true });
const asked = { model: provider(model), messages, temperature: 0, maxRetries: 0 };
const text = { ...asked, maxOutputTokens: 12 };
const object = { ...asked, maxOutputTokens: 100, schema: jsonSchema(schema) };
const tools = {
  get_weather: tool({
    description: "The weather in a city.",
    inputSchema: jsonSchema(schema),
    execute: async (input) => ({ seen: input }),
  }),
};
const one = { jaxllm: { parallel_tool_calls: false } };
const call = { ...asked, maxOutputTokens: 100, tools, toolChoice: "required", providerOptions: one };
const told = {};

const whole = await generateText(text);
told.text = whole.text;
told.usage = whole.usage.outputTokens;
const streamed = streamText(text);
told.text_stream = "";
for await (const piece of streamed.textStream) told.text_stream += piece;
told.usage_stream = (await streamed.usage).outputTokens;
told.object = (await generateObject(object)).object;
const partial = streamObject(object);
for await (const piece of partial.partialObjectStream) told.object_partial = piece;
told.object_stream = await partial.object;
const calls = async (result) =>
  (await result.toolCalls).map(({ toolName, input }) => [toolName, input]);
const called = await generateText(call);
told.calls = await calls(called);
told.results = called.toolResults.map(({ output }) => output.seen);
const calling = streamText(call);
await calling.consumeStream();
told.calls_stream = await calls(calling);
told.reason = called.finishReason;
console.log(JSON.stringify(told));
