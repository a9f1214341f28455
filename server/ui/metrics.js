// The few figures of /metrics that the page shows. Knows no drawing and no connection.

const NAMES = {
  running: "vllm:num_requests_running",
  waiting: "vllm:num_requests_waiting",
  kv: "vllm:kv_cache_usage_perc",
  tokens: "vllm:generation_tokens_total",
};

/** Sums over all labels; null for what the server does not tell at the moment. */
export function figures(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{.*\})? ([^ ]+)/.exec(line);
    if (found) sums.set(found[1], (sums.get(found[1]) ?? 0) + Number(found[2]));
  }
  const entries = Object.entries(NAMES);
  return Object.fromEntries(entries.map(([key, name]) => [key, sums.get(name) ?? null]));
}

/** Events per second between two readings of a counter, which begins anew with the server. */
export class Rate {
  #last = null;

  update(count, seconds) {
    const last = this.#last;
    this.#last = count === null ? null : { count, seconds };
    if (!last || count === null || count < last.count || seconds <= last.seconds) return 0;
    return (count - last.count) / (seconds - last.seconds);
  }
}
