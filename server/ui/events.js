// Server-sent events from text, however it was cut up. Knows no connection and no JSON.

export class EventParser {
  #rest = "";
  #data = [];

  /** The data of every event that `text` completes. */
  feed(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    const done = [];
    for (const line of lines) {
      const field = line.endsWith("\r") ? line.slice(0, -1) : line;
      if (field.startsWith("data:")) {
        this.#data.push(field.slice(field[5] === " " ? 6 : 5));
      } else if (field === "" && this.#data.length) {
        done.push(this.#data.join("\n"));
        this.#data = [];
      }
    }
    return done;
  }
}
