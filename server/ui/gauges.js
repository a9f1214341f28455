// How busy the server is: read once a second while somebody looks.

import { request } from "./api.js";
import { figures, Rate } from "./metrics.js";

const PERIOD_MS = 1000;
const REMEMBERED = 40; // readings that the curve shows

export class Gauges {
  #rate = new Rate();
  #history = [];
  #key;

  /** `key` gives the API key to read with. */
  constructor(key) {
    this.#key = key;
    this.#poll();
  }

  async #poll() {
    if (!document.hidden) this.#show(await this.#read());
    setTimeout(() => this.#poll(), PERIOD_MS);
  }

  async #read() {
    try {
      const signal = AbortSignal.timeout(5 * PERIOD_MS);
      const response = await request("metrics", { key: this.#key(), signal, accept: "text/plain" });
      return figures(await response.text());
    } catch {
      return figures("");
    }
  }

  #show({ running, waiting, kv, tokens }) {
    const rate = this.#rate.update(tokens, performance.now() / 1000);
    this.#history = [...this.#history, rate].slice(-REMEMBERED);
    set("running", running);
    set("waiting", waiting);
    set("kv", kv === null ? null : `${(kv * 100).toFixed(kv > 0 && kv < 0.1 ? 1 : 0)} %`);
    set("rate", tokens === null ? null : Math.round(rate));
    document.getElementById("kv-bar").style.width = `${(kv ?? 0) * 100}%`;
    this.#draw();
  }

  #draw() {
    const most = Math.max(1, ...this.#history);
    const step = 60 / (REMEMBERED - 1);
    const first = REMEMBERED - this.#history.length;
    const points = this.#history.map(
      (rate, index) => `${((first + index) * step).toFixed(1)},${(19 - (rate / most) * 14).toFixed(1)}`,
    );
    document.querySelector("#spark polyline").setAttribute("points", points.join(" "));
  }
}

function set(id, value) {
  document.getElementById(id).textContent = value ?? "–";
}
