// Messages on the page. What a model wrote is only ever set as text, never as markup.

import { level, percent, visible } from "./tokens.js";

const conversation = document.getElementById("conversation");
const scroll = document.getElementById("scroll");

const FENCE = /^ *```+ *(\w*)/; // around code

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/** Keeps the end in sight for those who were looking at it. */
function growing(change) {
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  change();
  if (atEnd) scroll.scrollTop = scroll.scrollHeight;
}

export function clear() {
  conversation.replaceChildren();
}

export function addUser(text) {
  const message = element("div", "message user");
  message.append(element("div", "text", text));
  conversation.append(message);
  scroll.scrollTop = scroll.scrollHeight;
  return message;
}

/** One answer: its text, its figures, what became of it. */
export class AnswerView {
  #message = element("div", "message assistant waiting");
  #text = element("div", "text");
  #under = element("div", "under");
  #thoughts = null; // made with the first of them
  #line = null; // the last one, if it goes on
  #inCode = false;
  #opens = false; // the last fence

  constructor() {
    this.#message.append(this.#text, this.#under);
    conversation.append(this.#message);
    scroll.scrollTop = scroll.scrollHeight;
  }

  add(pieces) {
    growing(() => {
      for (const { text, token } of pieces) {
        this.#message.classList.replace("waiting", "running");
        for (const part of text.split(/(?<=\n)/)) this.#addPart(part, token);
      }
    });
  }

  /** A token, or what of it stands on one line. */
  #addPart(text, token) {
    const span = element("span", token ? "token" : "", text);
    if (token) {
      span.dataset.p = level(token.logprob);
      span.alternatives = token;
    }
    if (!this.#line) {
      this.#line = element("span", this.#inCode ? "line code" : "line");
      this.#text.append(this.#line);
    }
    this.#line.append(span);
    // A fence is seen by then; one that names a language opens, whatever stands before it.
    const [, rest] = (this.#line.childElementCount < 8 && FENCE.exec(this.#line.textContent)) || [];
    if (rest !== undefined) {
      this.#opens = !this.#inCode || rest !== "";
      this.#line.className = `line fence ${this.#opens ? "first" : "last"}`;
    }
    if (!text.endsWith("\n")) return;
    if (this.#line.classList.contains("fence")) this.#inCode = this.#opens;
    this.#line = null;
  }

  /** Thoughts stand above the answer, folded. */
  think(text) {
    growing(() => {
      if (!this.#thoughts) {
        this.#thoughts = element("details", "thoughts");
        this.#thoughts.append(element("summary", "", "Thoughts"), element("div", "thought"));
        this.#message.prepend(this.#thoughts);
      }
      this.#message.classList.replace("waiting", "running");
      this.#thoughts.lastChild.append(text);
    });
  }

  /** `figures`: pairs of a value and what it is. */
  end(figures, failure, actions) {
    growing(() => {
      this.#message.classList.remove("waiting", "running");
      if (failure) this.#text.after(element("div", "failure", failure));
      for (const [label, act] of actions) {
        const button = element("button", "quiet", label);
        button.type = "button";
        button.addEventListener("click", () => act(button));
        this.#under.append(button);
      }
      for (const [value, unit] of figures) {
        const figure = element("span", "");
        figure.append(element("b", "", value), ` ${unit}`);
        this.#under.append(figure);
      }
    });
  }

  remove() {
    this.#message.remove();
  }
}

/** What else a token could have been, beside the token that is pointed at. */
export function showAlternatives() {
  const box = document.getElementById("alternatives");
  let shown = null;

  function hide() {
    shown?.classList.remove("shown");
    shown = null;
    box.hidden = true;
  }

  function show(span) {
    hide();
    shown = span;
    span.classList.add("shown");
    const { token, logprob, top_logprobs: top } = span.alternatives;
    const missing = top.every((other) => other.token !== token);
    const rows = missing ? [...top, { token, logprob }] : top;
    box.replaceChildren(...rows.map((row) => alternative(row, row.token === token)));
    box.hidden = false;
    const at = span.getClientRects()[0];
    const left = Math.min(at.left, window.innerWidth - box.offsetWidth - 8);
    const below = at.bottom + 6 + box.offsetHeight < window.innerHeight;
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${below ? at.bottom + 6 : at.top - 6 - box.offsetHeight}px`;
  }

  const over = (event) => {
    const span = event.target.closest?.(".coloured .token");
    if (span && span !== shown) show(span);
    else if (!span) hide();
  };
  document.addEventListener("pointerover", over);
  document.addEventListener("pointerdown", over);
  scroll.addEventListener("scroll", hide, { passive: true });
}

function alternative({ token, logprob }, chosen) {
  const row = element("div", chosen ? "alternative chosen" : "alternative");
  const bar = element("i", "");
  bar.style.width = `${Math.exp(logprob) * 100}%`;
  row.append(bar, element("code", "", visible(token)), element("span", "", percent(logprob)));
  return row;
}
