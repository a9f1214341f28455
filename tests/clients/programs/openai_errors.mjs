// Send every row with openai for Node; tell class, status, code and number of requests of each.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const load = createRequire(process.cwd() + "/node/");
const OpenAI = load("openai").default;
const given = JSON.parse(readFileSync(0, "utf8"));
const results = {};

async function ask(row, client) {
  if (row.body.stream) {
    for await (const chunk of await client.chat.completions.create(row.body)) void chunk;
    return;
  }
  if (row.method === "get") await client.get(row.path, { headers: row.headers });
  else if (row.raw !== null)
    await client.post(row.path, {
      body: row.raw,
      headers: { "Content-Type": "application/json" },
    });
  else await client.post(row.path, { body: row.body, headers: row.headers });
}

for (const row of given.rows) {
  let requests = 0;
  const counted = (url, init) => (requests++, fetch(url, init));
  const client = new OpenAI({ baseURL: given.url, apiKey: row.key, fetch: counted });
  let result = { error: "", status: 200, code: null };
  try {
    await ask(row, client);
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    const { status = null, code = null } = error;
    result = { error: error.constructor.name, status, code };
  }
  results[row.name] = { ...result, requests };
}
console.log(JSON.stringify(results));
