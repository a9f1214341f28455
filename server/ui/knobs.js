// What was asked of answers. Knobs that are empty are not sent: the server's defaults hold.

const STORE = "jaxllm-knobs";
const KEY = "jaxllm-key"; // in the session's storage: it is gone with the tab

/** Where the settings lie over the conversation; the style sheet says the same. */
export const NARROW = "(max-width: 900px)";

export class Knobs {
  #form = document.getElementById("knobs");
  #key = document.getElementById("key");

  constructor() {
    this.#key.value = sessionStorage.getItem(KEY) ?? "";
    this.#restore();
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#form.addEventListener("input", (event) => this.#changed(event.target));
    document.getElementById("reset").addEventListener("click", () => this.#reset());
    this.#apply();
  }

  get key() {
    return this.#key.value.trim();
  }

  get system() {
    return this.#form.elements.system.value.trim();
  }

  get coloured() {
    return this.#form.elements.colour.checked;
  }

  /** Whether every number is one that the server takes; if not, the browser says which is not. */
  check() {
    return this.#form.reportValidity();
  }

  /** Fields of a request. */
  fields() {
    const given = this.#numbers().filter((input) => input.value !== "");
    const fields = Object.fromEntries(given.map((input) => [input.name, Number(input.value)]));
    return this.coloured ? { ...fields, logprobs: true, top_logprobs: 5 } : fields;
  }

  askForKey() {
    const narrow = matchMedia(NARROW).matches;
    document.body.classList.toggle("panel-open", narrow);
    document.body.classList.remove("panel-hidden");
    this.#key.focus();
    this.#key.select();
  }

  #numbers() {
    return [...this.#form.querySelectorAll("input[type=number]")];
  }

  #changed(element) {
    if (element === this.#key) {
      if (this.key) sessionStorage.setItem(KEY, this.key);
      else sessionStorage.removeItem(KEY);
      return;
    }
    const kept = this.#numbers().map((input) => [input.name, input.value]);
    const values = { ...Object.fromEntries(kept), system: this.system, colour: this.coloured };
    sessionStorage.setItem(STORE, JSON.stringify(values));
    this.#apply();
  }

  #restore() {
    const values = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
    for (const input of this.#numbers()) input.value = values[input.name] ?? input.defaultValue;
    this.#form.elements.system.value = values.system ?? "";
    this.#form.elements.colour.checked = values.colour ?? true;
  }

  #reset() {
    sessionStorage.removeItem(STORE);
    this.#restore();
    this.#apply();
  }

  #apply() {
    document.getElementById("conversation").classList.toggle("coloured", this.coloured);
  }
}
