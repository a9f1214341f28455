// Which part of an answer's text came from which token.
//
// The text is right in any case: it is the server's. Tokens may end inside a character, leave no
// text at all (the end of a turn), or differ from the text by a space at its beginning.

export class TokenAligner {
  #decoder = new TextDecoder();
  #text = ""; // that no token explains yet
  #tokens = []; // whose text has not come yet

  /** Pieces `{text, token}` in order; `token` is null for text that no token explains. */
  feed(text, tokens) {
    this.#text += text;
    for (const token of tokens) {
      const shown = this.#decoder.decode(Uint8Array.from(token.bytes), { stream: true });
      this.#tokens.push({ token, shown });
    }
    return this.#aligned();
  }

  /** What is left when the answer has ended. */
  finish() {
    const pieces = this.#text ? [{ text: this.#text, token: null }] : [];
    this.#text = "";
    this.#tokens = [];
    return pieces;
  }

  #aligned() {
    const pieces = [];
    while (this.#text && this.#tokens.length) {
      const { token, shown } = this.#tokens[0];
      if (this.#text.startsWith(shown)) {
        this.#tokens.shift();
        if (shown) pieces.push(this.#take(shown.length, token));
      } else if (shown.startsWith(this.#text)) {
        break; // its end has not come yet
      } else if (shown.startsWith(" ") && this.#text.startsWith(shown.slice(1))) {
        this.#tokens.shift();
        if (shown.length > 1) pieces.push(this.#take(shown.length - 1, token));
      } else {
        const begin = this.#known();
        if (begin < 0) {
          this.#tokens = [];
          pieces.push(this.#take(this.#text.length, null));
        } else {
          this.#tokens.splice(0, begin);
        }
      }
    }
    return pieces;
  }

  /** The next token with which the text does begin: those before it leave no text. */
  #known() {
    return this.#tokens.findIndex(({ shown }) => shown && this.#text.startsWith(shown));
  }

  #take(length, token) {
    const text = this.#text.slice(0, length);
    this.#text = this.#text.slice(length);
    return { text, token };
  }
}

/** From 0 (unlikely) to 4 (sure). */
export function level(logprob) {
  const probability = Math.exp(logprob);
  return [0.1, 0.3, 0.6, 0.9].filter((bound) => probability >= bound).length;
}

/** A token's text with what cannot be seen made visible. */
export function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
}

export function percent(logprob) {
  const share = Math.exp(logprob) * 100;
  return share >= 99.95 ? "100 %" : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
}
