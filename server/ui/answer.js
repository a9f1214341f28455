// One answer as it comes: the request, its text, the times of its tokens.

import { stream } from "./api.js";
import { TokenAligner } from "./tokens.js";

export class Answer {
  text = "";
  thoughts = "";
  failure = null; // RequestFailed
  stopped = false; // by whoever asked
  #abort = new AbortController();
  #sent = performance.now();
  #first = null;
  #last = null;
  #usage = null;
  #reason = null;

  stop() {
    this.stopped = true;
    this.#abort.abort();
  }

  /** Reads the answer to its end, however it ends; `show` gets its pieces, `think` its thoughts. */
  async read(body, key, show, think) {
    const aligner = new TokenAligner();
    try {
      const options = { key, body, signal: this.#abort.signal };
      for await (const chunk of stream("v1/chat/completions", options)) {
        this.#usage = chunk.usage ?? this.#usage;
        for (const choice of chunk.choices) this.#take(choice, aligner, show, think);
      }
    } catch (error) {
      if (!this.stopped) this.failure = error;
    }
    show(aligner.finish());
  }

  #take(choice, aligner, show, think) {
    this.#reason = choice.finish_reason ?? this.#reason;
    const text = choice.delta.content ?? "";
    const thoughts = choice.delta.reasoning ?? choice.delta.reasoning_content ?? "";
    const tokens = thoughts ? [] : (choice.logprobs?.content ?? []); // thoughts have no colours
    if (!text && !thoughts && !tokens.length) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    if (thoughts) {
      this.thoughts += thoughts;
      think(thoughts);
    }
    if (!text && !tokens.length) return;
    this.text += text;
    show(tokens.length ? aligner.feed(text, tokens) : [...aligner.finish(), { text, token: null }]);
  }

  /** Pairs of a value and what it is. */
  figures() {
    const pairs = [];
    const seconds = (this.#last - this.#first) / 1000;
    const count = this.#usage?.completion_tokens;
    if (count > 1 && seconds > 0) pairs.push([((count - 1) / seconds).toFixed(1), "tokens/s"]);
    if (this.#first) pairs.push([Math.round(this.#first - this.#sent), "ms to the first"]);
    if (count !== undefined) pairs.push([count, count === 1 ? "token" : "tokens"]);
    const cached = this.#usage?.prompt_tokens_details?.cached_tokens;
    if (cached) pairs.push([cached, `of ${this.#usage.prompt_tokens} prompt tokens cached`]);
    if (this.stopped) pairs.push(["stopped", ""]);
    if (this.#reason === "length") pairs.push(["cut", "at the limit"]);
    return pairs;
  }
}
